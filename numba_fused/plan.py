"""Which variant `variant="auto"` means, for a shape."""

from __future__ import annotations

from numba_fused import ladder
from numba_fused.spec import BlockSpec

SIMULATOR_MULTIPLY_ADDS = 2_000_000  # about a minute of simulation


def choose(spec: BlockSpec) -> str:
    """Name of the fastest rung that can run `spec` on a GPU.

    By measurement (plots/data/ladder.csv) that is the library's convolution with our statistics
    and apply kernels, from batch 1 to 128; PyTorch's operators run what it cannot.
    """
    return "library_conv" if ladder.get("library_conv").limit(spec) is None else "torch"


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
