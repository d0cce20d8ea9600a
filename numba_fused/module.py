"""The block as an `nn.Module`, a drop-in for ``Conv3d + GroupNorm + min + clamp + Dropout``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from numba_fused import ladder
from numba_fused.ops import check_precision, fused_conv_group_norm_min_clamp_dropout
from numba_fused.spec import IntOrTuple, Padding, check_bounds, check_dropout_p

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class FusedConvGroupNormMinClampDropout(nn.Module):
    """Convolution, group normalisation, min, clamp and dropout, fused.

    The positional arguments are those of KernelBench's ``Model`` (level 2, problem 83). The
    parameters live in ``self.conv`` and ``self.norm``, so a state_dict is interchangeable with
    that of the plain PyTorch model; they are initialised as PyTorch initialises them.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int or tuple
    num_groups : int
        Groups of the normalisation; divides `out_channels`.
    min_value, max_value : float
        Bounds of the clamp.
    dropout_p : float
        Probability that an element is dropped, in training.
    cap : float, optional
        Upper operand of the min; None means `min_value`, the degenerate benchmark chain.
    dim : int
        Spatial axes: 1, 2 or 3.
    stride, padding, dilation, groups, bias, device, dtype
        As in ``torch.nn.Conv3d``.
    affine, eps
        As in ``torch.nn.GroupNorm``.
    precision, variant
        As in `fused_conv_group_norm_min_clamp_dropout`.

    Attributes
    ----------
    conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
    norm : nn.GroupNorm
    dropout : nn.Dropout

    Raises
    ------
    ValueError
        Channels not divisible by their groups, `dropout_p` outside [0, 1], a NaN bound, an
        unknown variant: what the PyTorch modules raise.
    TypeError
        A size that is not an int.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTuple,
        num_groups: int,
        min_value: float,
        max_value: float,
        dropout_p: float,
        *,
        cap: float | None = None,
        dim: int = 3,
        stride: IntOrTuple = 1,
        padding: Padding = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        bias: bool = True,
        affine: bool = True,
        eps: float = 1e-5,
        precision: str = "ieee",
        variant: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim not in _CONVOLUTIONS:
            raise ValueError(f"dim must be 1, 2 or 3, but got {dim}")
        check_dropout_p(dropout_p)
        check_bounds(min_value=min_value, max_value=max_value, cap=cap)
        check_precision(precision)
        if variant != "auto":
            ladder.get(variant)
        _check_sizes(in_channels=in_channels, out_channels=out_channels, num_groups=num_groups)
        self.conv = _CONVOLUTIONS[dim](
            in_channels,
            out_channels,
            kernel_size,  # pyright: ignore[reportArgumentType]
            stride=stride,  # pyright: ignore[reportArgumentType]
            padding=padding,  # pyright: ignore[reportArgumentType]
            dilation=dilation,  # pyright: ignore[reportArgumentType]
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.GroupNorm(
            num_groups, out_channels, eps=eps, affine=affine, device=device, dtype=dtype
        )
        self.dropout = nn.Dropout(dropout_p)
        self.min_value = min_value
        self.max_value = max_value
        self.cap = cap
        self.precision = precision
        self.variant = variant

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """Run the block; `seed` fixes the dropout mask of this call."""
        conv, norm = self.conv, self.norm
        return fused_conv_group_norm_min_clamp_dropout(
            x,
            conv.weight,
            conv.bias,
            norm.weight,
            norm.bias,
            num_groups=norm.num_groups,
            min_value=self.min_value,
            max_value=self.max_value,
            cap=self.cap,
            dropout_p=self.dropout.p,
            training=self.training,
            seed=seed,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            eps=norm.eps,
            precision=self.precision,
            variant=self.variant,
        )

    def extra_repr(self) -> str:
        """What the submodules' own lines do not show."""
        return (
            f"min_value={self.min_value}, max_value={self.max_value}, cap={self.cap}, "
            f"precision={self.precision!r}, variant={self.variant!r}"
        )


def _check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, but got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
