"""Which variant `variant="auto"` means, for a shape, and which one differentiates it."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from numba_fused import backward, ladder
from numba_fused.ladder.rung_9_pipelined import samples_at_once
from numba_fused.spec import BlockSpec

SIMULATOR_MULTIPLY_ADDS = 2_000_000  # about a minute of simulation


# Fastest first where they suit, by measurement on an H200 (plots/data/cases.csv, sweeps.csv).
ORDER = ("pipelined", "split", "tiled", "library_conv", "recompute", "torch")
# Tiles take time in proportion to the multiply-adds of an output, the library's convolutions gain
# with their number: up to here tiles were faster.
MOST_TAPS = {
    ("pipelined", "tf32"): 1000,
    ("pipelined", "ieee"): 2000,
    ("split", "tf32"): 300,
    ("split", "ieee"): 1000,
    ("tiled", "tf32"): 400,
    ("tiled", "ieee"): 400,
}
# The library's matrix products lose more by few output channels than the tiles.
NARROW, MOST_TAPS_NARROW = 64, 3500
FEW_TAPS = 64  # convolved twice sooner than waited for


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
    able = (name for name in ORDER if ladder.get(name).obstacle(spec, capability) is None)
    return next(name for name in able if _suits(name, spec))


def _taps(spec: BlockSpec) -> int:
    """Multiply-adds of an output."""
    return math.prod(spec.weight_shape[1:])


def _suits(name: str, spec: BlockSpec) -> bool:
    """Whether a variant is the fastest for `spec` unless one before it in `ORDER` is."""
    if (name, spec.precision) not in MOST_TAPS:
        return True
    taps = _taps(spec)
    if name == "pipelined" and taps <= FEW_TAPS and samples_at_once(spec) < 2:
        return False  # most blocks wait for the rest of the one sample that they compute
    if name == "tiled" and (spec.dtype != "float32" or (taps <= FEW_TAPS and spec.groups == 1)):
        return False  # the library is slow where channels are in groups, and with large kernels
    if name == "split" and math.prod(spec.kernel_size) == 1:
        return False  # the library's is a matrix product
    narrow = name == "pipelined" and spec.out_channels <= NARROW
    return taps <= (MOST_TAPS_NARROW if narrow else MOST_TAPS[name, spec.precision])


def choose_backward(spec: BlockSpec, device: torch.device | None = None) -> str | None:
    """Name of the backward variant for a GPU; None leaves it to PyTorch's operators.

    The clear variant is for reading: PyTorch's operators are faster. What the tiles do not take
    goes to `library_conv`, all but samples beyond 32-bit indices.
    """
    return _choose_backward(spec, ladder.capability(device))


@lru_cache(maxsize=4096)
def _choose_backward(spec: BlockSpec, capability: tuple[int, int]) -> str | None:
    # Wherever tiles can differentiate they were faster (plots/data/README.md): the library's
    # deterministic gradients of narrow convolutions are slow.
    variants = ("tensor_core", "library_conv")
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
