"""Which variant `variant="auto"` means, for a shape."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from numba_fused import ladder
from numba_fused.spec import BlockSpec

SIMULATOR_MULTIPLY_ADDS = 2_000_000  # about a minute of simulation


# Fastest first, by measurement on an H200 (plots/data/README.md). Tensor-core tiles have been timed
# on convolutions of up to 81 multiply-adds an output, where they are three to four times as fast as
# the library's; they take time in proportion, and for larger ones nobody has looked yet.
TILES, MOST_TAPS = ("pipelined", "split"), 81
OTHERS = ("library_conv", "recompute", "torch")


def choose(spec: BlockSpec, device: torch.device | None = None) -> str:
    """Name of the fastest rung that can run `spec` on a GPU.

    Parameters
    ----------
    spec : BlockSpec
    device : torch.device, optional
        The GPU; the current one by default.
    """
    return _choose(spec, ladder.capability(device))


@lru_cache(maxsize=4096)
def _choose(spec: BlockSpec, capability: tuple[int, int]) -> str:
    small = math.prod(spec.weight_shape[1:]) <= MOST_TAPS
    rungs = map(ladder.get, (*TILES, *OTHERS) if small else OTHERS)
    return next(r.name for r in rungs if r.obstacle(spec, capability) is None)


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
