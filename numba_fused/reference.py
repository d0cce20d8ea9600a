"""The chain in PyTorch operators: the judge of everything else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from numba_fused import rng
from numba_fused.spec import BlockSpec

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    seed: int | Tensor | None = None,
    keep_mask: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Compute the block with PyTorch's operators, differentiably, on any device and dtype.

    Parameters
    ----------
    x, weight, bias, gamma, beta
        As in `fused_conv_group_norm_min_clamp_dropout`, of any floating dtype.
    seed : int or Tensor, optional
        Fixes the dropout mask, the same one the kernels use. None draws one from torch's
        generator.
    keep_mask : Tensor, optional
        bool, of the output's shape: which elements dropout keeps. Overrides `seed`.
    **parameters
        The block's keywords: `num_groups`, `min_value`, `max_value`, `cap`, `dropout_p`,
        `training`, `stride`, `padding`, `dilation`, `groups`, `eps`; `precision` and `variant`
        say how to compute and not what, so they change nothing here.

    Returns
    -------
    Tensor
        (N, K, *output_size), of x's dtype.

    Raises
    ------
    RuntimeError, ValueError, TypeError
        As `BlockSpec.from_arguments`.
    """
    what = {k: v for k, v in parameters.items() if k != "variant"}
    spec = BlockSpec.from_arguments(x.shape, weight.shape, **what)
    if keep_mask is not None and keep_mask.shape != spec.output_shape:
        raise RuntimeError(
            f"keep_mask must have the output's shape {list(spec.output_shape)}, but got "
            f"{list(keep_mask.shape)}"
        )
    if spec.draws and keep_mask is None:
        seed = seed_tensor(seed, x.device)
        mask = rng.keep_mask(int(seed), spec.output_shape, spec.dropout_p)
        keep_mask = torch.from_numpy(mask).to(x.device)
    return chain(spec, x, weight, bias, gamma, beta, keep_mask)


def chain(
    spec: BlockSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    keep_mask: Tensor | None,
) -> Tensor:
    """The five operators; `keep_mask` is used only where the spec draws."""
    if gamma is None and beta is not None:
        gamma = torch.ones_like(beta)  # the backward of group_norm crashes on a beta by itself
    z = convolution(spec, x, weight, bias)
    h = F.group_norm(z, spec.num_groups, gamma, beta, spec.eps)
    m = torch.minimum(h, torch.full((), spec.cap, dtype=h.dtype, device=h.device))
    c = torch.clamp(m, spec.min_value, spec.max_value)
    if keep_mask is None or not spec.draws:
        return c
    return c * (keep_mask.to(c.dtype) * spec.keep_scale)


def full_precision() -> AbstractContextManager[None]:
    """No TF32 inside cuDNN's convolutions, which PyTorch admits by default for fp32 tensors."""
    return _cudnn(allow_tf32=False)


def convolution_precision(spec: BlockSpec) -> AbstractContextManager[None]:
    """What cuDNN may do inside the block: TF32 where the call's precision allows it."""
    return full_precision() if spec.precision == "ieee" else _cudnn(allow_tf32=True)


def _cudnn(*, allow_tf32: bool) -> AbstractContextManager[None]:
    """cuDNN as the user has set it, but for TF32."""
    cudnn = torch.backends.cudnn
    if cudnn.allow_tf32 == allow_tf32:
        return nullcontext()  # setting the flags takes as long as a launch
    return cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=allow_tf32,
    )


def convolution(spec: BlockSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution alone. F.pad takes the padding, which may differ before and after."""
    if any(before != after for before, after in spec.padding):
        x = F.pad(x, [zeros for pair in reversed(spec.padding) for zeros in pair])
        padding: tuple[int, ...] = (0,) * len(spec.padding)
    else:
        padding = tuple(before for before, _ in spec.padding)
    convolve = CONVOLUTIONS[len(spec.kernel_size)]
    return convolve(x, weight, bias, spec.stride, padding, spec.dilation, spec.groups)


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of `device`: an int64 tensor of one element, there."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """`seed` as the kernels read it: one int64 on `device`, so that a CUDA graph can renew it.

    Raises
    ------
    TypeError
        `seed` is neither None, an int, nor an int64 tensor of one element.
    RuntimeError
        A seed tensor is on another device.
    """
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, but got {seed.dtype} of "
                f"shape {list(seed.shape)}"
            )
        if seed.device != device:
            raise RuntimeError(f"seed is on {seed.device}, x on {device}: use seed.to(x.device)")
        return seed.detach().reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed must be an int or an int64 tensor of one element, but got {seed!r} of type "
            f"{type(seed).__name__}"
        )
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=device)
