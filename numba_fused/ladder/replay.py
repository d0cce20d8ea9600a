"""Run a rung once, watch what it launches, and from then on launch that without running it.

What a rung launches follows from the spec, the block size, the GPU and whether its operands lie
on multiples of 16 bytes. So the host's work - choosing a tile, naming twenty arguments, taking
them apart for the driver - has the same outcome each time, and takes several times as long as
the driver's own. It is done once for operands that do lie so, which is what torch allocates.

A rung that calls anything but launches, such as a library's convolution, is not repeated but run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from numba_fused.device.launch import GpuLauncher, Launcher
from numba_fused.device.recording import ALIGNMENT, Recorder, Recording
from numba_fused.ladder.rung import Operands, Rung
from numba_fused.spec import BlockSpec

# A rung may free one scratch tensor before it allocates the next; a repetition holds them all.
MOST_SCRATCH_BYTES = 1 << 26
# Of `Operands`, in the order in which `Repeated` takes them.
TENSORS = ("x", "weight", "bias", "gamma", "beta", "seed", "statistics", "out")
Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Repeated:
    """A rung with one spec on one device: watched once, and its launches repeated.

    Parameters
    ----------
    rung : Rung
    spec : BlockSpec
        That the rung can run there.
    threads_per_block : int
    """

    def __init__(self, rung: Rung, spec: BlockSpec, threads_per_block: int) -> None:
        self._rung = rung
        self._spec = spec
        self._threads_per_block = threads_per_block
        self._recording: Recording | None = None
        self._repeatable = True  # as far as is known

    def __call__(self, launch: Launcher, tensors: Tensors) -> None:
        """Write the block's output into the last of the tensors.

        Parameters
        ----------
        launch : Launcher
        tensors : tuple of Tensor
            `TENSORS`, on the device; contiguous, but for x and weight.
        """
        if self._repeatable and isinstance(launch, GpuLauncher):
            addresses = plain_addresses(tensors)
            if addresses is not None:
                if self._recording is not None:
                    self._recording.repeat(launch, tensors[-1], addresses)
                else:
                    self._record(launch, tensors)
                return
        x, weight, *others = tensors
        with torch.no_grad():
            flat = [x.ravel(), weight.ravel(), *(t.view(-1) for t in others)]
            self._rung.forward(launch, self._operands(flat))

    def _operands(self, flat: Sequence[Tensor]) -> Operands:
        named = dict(zip(TENSORS, flat, strict=True))
        return Operands(spec=self._spec, threads_per_block=self._threads_per_block, **named)

    def _record(self, launcher: GpuLauncher, tensors: Tensors) -> None:
        """Run the rung, and keep what it launched if that is all it did."""
        with torch.no_grad(), Recorder(launcher, tensors) as recorder:
            self._rung.forward(recorder, self._operands(recorder.follow()))
        if recorder.is_repeatable() and sum(recorder.sizes) <= MOST_SCRATCH_BYTES:
            self._recording = Recording(launcher.gpu, recorder)
        else:
            self._repeatable = False


def plain_addresses(tensors: Tensors) -> list[int] | None:
    """Addresses of the tensors; None if a rung might launch something else for these.

    Kernels take contiguous tensors. A rung may choose them by the alignment of any tensor but
    the seed and the statistics, which they access word by word.
    """
    x, weight, *_, out = tensors
    if not (x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()):
        return None
    addresses = [tensor.data_ptr() for tensor in tensors]
    of_x, of_weight, of_bias, of_gamma, of_beta, _, _, of_out = addresses
    together = of_x | of_weight | of_bias | of_gamma | of_beta | of_out
    return None if together % ALIGNMENT else addresses
