"""Which variant `variant="auto"` means, for a shape, and which one differentiates it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from numba_fused import backward, ladder
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
    rungs = map(ladder.get, (*TILES, *OTHERS) if _is_narrow(spec) else OTHERS)
    return next(r.name for r in rungs if r.obstacle(spec, capability) is None)


def _is_narrow(spec: BlockSpec) -> bool:
    return math.prod(spec.weight_shape[1:]) <= MOST_TAPS


def choose_backward(spec: BlockSpec, device: torch.device | None = None) -> str | None:
    """Name of the backward variant for a GPU; None leaves it to PyTorch's operators.

    The clear variant is for reading: PyTorch's operators are faster. What the tiles do not take
    goes to `library_conv`, all but samples beyond 32-bit indices.
    """
    return _choose_backward(spec, ladder.capability(device))


@lru_cache(maxsize=4096)
def _choose_backward(spec: BlockSpec, capability: tuple[int, int]) -> str | None:
    # library_conv has not been timed on a GPU: the choice rests on what it leaves out. Its three
    # convolutions are those of PyTorch's backward, but between them it makes three passes where
    # PyTorch runs five operators forward and backward, each through tensors of the output's size.
    variants = ("tensor_core", "library_conv") if _is_narrow(spec) else ("library_conv",)
    able = (v for v in variants if backward.obstacle(v, spec, capability) is None)
    return next(able, None)


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
