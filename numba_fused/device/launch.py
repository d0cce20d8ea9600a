"""Launch a kernel on the GPU.

A *launcher* is any callable ``launch(kernel, grid, block, *args)``. This one puts the kernel
on a CUDA stream; `numba_fused.simulator.Simulator.launch` runs the same kernel in this process.
A rung of the ladder is given one of the two and cannot tell which.
"""

from __future__ import annotations

from typing import Any, Protocol

from numba import cuda
from numba.cuda.core import config

# A small problem cannot fill the GPU: that is its nature, not a mistake to warn of.
config.CUDA_LOW_OCCUPANCY_WARNINGS = 0


class Launcher(Protocol):
    """Runs `kernel` over `grid` blocks of `block` threads."""

    def __call__(self, kernel: Any, grid: int, block: int, *args: Any) -> None:
        """Launch once; returns when the launch is queued (GPU) or done (simulator)."""
        ...


class GpuLauncher:
    """Launches on one stream of one GPU.

    Parameters
    ----------
    device_index : int
        CUDA's ordinal of the GPU that holds the arguments.
    stream : int
        The stream's handle, ``torch.cuda.current_stream().cuda_stream``: work is ordered after
        what torch queued there, and is captured when that stream is being captured.
    """

    def __init__(self, device_index: int, stream: int) -> None:
        self._device_index = device_index
        self._stream = stream

    def __call__(self, kernel: Any, grid: int, block: int, *args: Any) -> None:
        """Queue one launch; arrays are anything with ``__cuda_array_interface__``."""
        with cuda.gpus[self._device_index]:
            kernel[grid, block, cuda.external_stream(self._stream)](*args)
