"""The block as an `nn.Module`, a drop-in for ``Conv3d + GroupNorm + min + clamp + Dropout``."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from numba_fused import ladder
from numba_fused.ops import fused_conv_group_norm_min_clamp_dropout
from numba_fused.spec import (
    IntOrTuple,
    Padding,
    check_bounds,
    check_dropout_p,
    check_precision,
)

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

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

    Notes
    -----
    `conv`, `norm` and `dropout` hold parameters and settings; they are not called, and neither
    are their hooks.
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
        self.conv: Convolution = _CONVOLUTIONS[dim](
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

    @classmethod
    def from_modules(
        cls,
        conv: Convolution,
        norm: nn.GroupNorm,
        dropout: nn.Dropout,
        min_value: float,
        max_value: float,
        cap: float | None = None,
        *,
        precision: str = "ieee",
        variant: str = "auto",
    ) -> FusedConvGroupNormMinClampDropout:
        """The block of a model's own modules, which become its submodules.

        Nothing is copied: parameters, their optimizer and `conv`, `norm` and `dropout` themselves
        are shared with the model they came from. `to_modules` gives them back.

        Parameters
        ----------
        conv : nn.Conv1d, nn.Conv2d or nn.Conv3d
            With ``padding_mode="zeros"``.
        norm : nn.GroupNorm
        dropout : nn.Dropout
            Its mode, training or not, becomes the block's.
        min_value, max_value, cap, precision, variant
            As in the constructor.

        Returns
        -------
        FusedConvGroupNormMinClampDropout

        Raises
        ------
        TypeError
            A module of another kind, a subclass included: it may compute something else.
        ValueError
            Another padding mode, `norm` for another number of channels than `conv` gives, or a
            module with hooks, which nothing would call.
        """
        _check_module("conv", conv, *_CONVOLUTIONS.values())
        _check_module("norm", norm, nn.GroupNorm)
        _check_module("dropout", dropout, nn.Dropout)
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', but conv has {conv.padding_mode!r}")
        if norm.num_channels != conv.out_channels:
            raise ValueError(
                f"norm must have as many channels as conv gives, {conv.out_channels}, but has "
                f"{norm.num_channels}"
            )
        fused = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            norm.num_groups,
            min_value,
            max_value,
            dropout.p,
            cap=cap,
            dim=len(conv.kernel_size),
            groups=conv.groups,
            precision=precision,
            variant=variant,
            device="meta",  # these parameters are never used
        )
        fused.conv, fused.norm, fused.dropout = conv, norm, dropout
        fused.training = dropout.training
        return fused

    def to_modules(self) -> tuple[Convolution, nn.GroupNorm, nn.Dropout]:
        """Convolution, normalisation and dropout as PyTorch's modules, sharing the parameters."""
        return self.conv, self.norm, self.dropout

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


def _check_module(name: str, module: Any, *kinds: type[nn.Module]) -> None:
    if type(module) not in kinds:
        raise TypeError(
            f"{name} must be {' or '.join(f'nn.{kind.__name__}' for kind in kinds)}, but got "
            f"{type(module).__name__}"
        )
    if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks:
        raise ValueError(
            f"{name} has hooks, which the fused block would not call: remove them first (those of "
            f"weight_norm, spectral_norm and pruning with their own remove functions)"
        )


def _check_sizes(**sizes: Any) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, but got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
