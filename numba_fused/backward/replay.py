"""Run the backward pass once, watch what it launches, and from then on launch that alone.

As `ladder.replay`, for calls that return gradients: what a variant launches follows from the spec,
the gradients wanted, whether forward kept its statistics, and whether the tensors lie on multiples
of 16 bytes. A variant that calls a library's convolutions is not repeated but run.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from numba_fused.backward.operands import Operands, Wanted
from numba_fused.device.launch import GpuLauncher, Launcher
from numba_fused.device.recording import ALIGNMENT, Recorder, Recording
from numba_fused.spec import BlockSpec

# Of `Operands`, in the order in which `Repeated` takes them; mean and rstd may follow.
TENSORS = ("x", "weight", "grad_out", "bias", "gamma", "beta", "seed")
ALIGNED = 6  # kernels may be chosen by the alignment of these; of three, they take contiguous ones
CONTIGUOUS = 3


class Repeated:
    """A variant with one spec on one device: watched once, and its launches repeated.

    Parameters
    ----------
    variant : module
        With a function `gradients`, as `clear` has it.
    spec : BlockSpec
        That the variant can differentiate there.
    wanted : tuple of bool
    """

    def __init__(self, variant: ModuleType, spec: BlockSpec, wanted: Wanted) -> None:
        self._variant = variant
        self._spec = spec
        self._wanted = wanted
        self._recording: Recording | None = None
        self._repeatable = True  # as far as is known

    def __call__(self, launch: Launcher, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The five gradients, flat; None where not wanted.

        Parameters
        ----------
        launch : Launcher
        tensors : sequence of Tensor
            `TENSORS`, and mean and rstd in every call or in none; on the device, and contiguous,
            but for x, weight and grad_out.
        """
        if self._repeatable and isinstance(launch, GpuLauncher):
            addresses = plain_addresses(tensors)
            if addresses is not None:
                if self._recording is None:
                    return self._record(launch, tensors)
                found = iter(self._recording.repeat(launch, tensors[2], addresses))
                return [next(found) if want else None for want in self._wanted]
        with torch.no_grad():
            flat = [t.ravel() for t in tensors[:CONTIGUOUS]]
            return self._run(launch, [*flat, *(t.view(-1) for t in tensors[CONTIGUOUS:])])

    def _run(self, launch: Launcher, flat: Sequence[Tensor]) -> list[Tensor | None]:
        named = dict(zip(TENSORS, flat, strict=False))
        rest = flat[len(TENSORS) :]
        statistics = (rest[0], rest[1]) if rest else None
        operands = Operands(spec=self._spec, **named)
        return self._variant.gradients(launch, operands, statistics, self._wanted)

    def _record(self, launcher: GpuLauncher, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Run the variant, and keep what it launched if that is all it did."""
        with torch.no_grad(), Recorder(launcher, tensors) as recorder:
            found = self._run(recorder, recorder.follow())
        results = [gradient for gradient in found if gradient is not None]
        if recorder.is_repeatable() and all(map(recorder.allocated, results)):
            self._recording = Recording(launcher.gpu, recorder, results)
        else:
            self._repeatable = False
        return found


def plain_addresses(tensors: Sequence[Tensor]) -> list[int] | None:
    """Addresses of the tensors; None if a variant might launch something else for these."""
    if not all(t.is_contiguous() for t in tensors[:CONTIGUOUS]):
        return None
    addresses = [tensor.data_ptr() for tensor in tensors]
    together = 0
    for address in addresses[:ALIGNED]:
        together |= address
    return None if together % ALIGNMENT else addresses
