"""Run a rung once, watch what it launches, and from then on launch that without running it.

What a rung launches follows from the spec, the block size, the GPU and whether its operands lie
on multiples of 16 bytes. So the host's work - choosing a tile, naming twenty arguments, taking
them apart for the driver - has the same outcome each time, and takes several times as long as
the driver's own. It is done once for operands that do lie so, which is what torch allocates.

The watching is PyTorch's: a dispatch mode sees every operator that the rung calls. Memory that
it allocates is allocated anew for each repetition, and views of it or of operands are followed.
A rung that calls anything else, such as a library's convolution, is not repeated but run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from numba_fused.device.launch import Dim, Gpu, GpuLauncher, Launcher
from numba_fused.device.replay import Launch, Replay
from numba_fused.ladder.rung import Operands, Rung
from numba_fused.spec import BlockSpec

ALIGNMENT = 16
SCRATCH_ALIGNMENT = 512  # torch's own
# A rung may free one scratch tensor before it allocates the next; a repetition holds them all.
MOST_SCRATCH_BYTES = 1 << 26

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}
# Of `Operands`, in the order in which `Repeated` takes them.
TENSORS = ("x", "weight", "bias", "gamma", "beta", "seed", "statistics", "out")
SCRATCH = len(TENSORS)
Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Place(NamedTuple):
    """Where a tensor begins: some bytes into one of `TENSORS`, or into the scratch memory."""

    base: int
    offset: int


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
        with torch.no_grad(), Recorder(launcher) as recorder:
            self._rung.forward(recorder, self._operands(recorder.follow(tensors)))
        if recorder.is_repeatable():
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


class Recorder(TorchDispatchMode):
    """A launcher that notes what it launches while it watches PyTorch's operators.

    Attributes
    ----------
    launches : list of Launch
    scratch_bytes : int
        Of everything that was allocated.
    """

    def __init__(self, launcher: GpuLauncher) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.scratch_bytes = 0
        self._launcher = launcher
        self._known: dict[int, tuple[Tensor, Place]] = {}  # by id; the tensor keeps its id taken
        self._only_launches = True

    def __call__(
        self,
        kernel: Any,
        grid: Dim,
        block: Dim,
        *args: Any,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Launch, and note it."""
        self._launcher(
            kernel, grid, block, *args, shared_bytes=shared_bytes, cooperative=cooperative
        )
        self.launches.append(Launch(kernel, grid, block, args, shared_bytes, cooperative))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and follow what it returns."""
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self._know(result, Place(SCRATCH, self.scratch_bytes))
            size = result.untyped_storage().nbytes()
            self.scratch_bytes += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        elif func.is_view and isinstance(result, Tensor) and id(args[0]) in self._known:
            base, offset = self.place(args[0])
            self._know(result, Place(base, offset + result.data_ptr() - args[0].data_ptr()))
        else:
            self._only_launches = False
        return result

    def follow(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, flat: as many objects, even where one tensor has two roles."""
        views: list[Tensor] = []
        for base, tensor in enumerate(tensors):
            self._know(tensor, Place(base, 0))
            views.append(tensor.view(-1))
        return views

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor begins."""
        return self._known[id(tensor)][1]

    def arrays(self) -> list[Tensor]:
        """All tensors that were launched with."""
        return [arg for launch in self.launches for arg in launch.args if isinstance(arg, Tensor)]

    def is_repeatable(self) -> bool:
        """Whether the launches are all that was done, and it is known with what."""
        return (
            self._only_launches
            and len(self.launches) > 0
            and self.scratch_bytes <= MOST_SCRATCH_BYTES
            and all(id(array) in self._known for array in self.arrays())
        )

    def _know(self, tensor: Tensor, place: Place) -> None:
        self._known[id(tensor)] = tensor, place


class Recording:
    """What a rung launched, ready to be launched with other tensors.

    Parameters
    ----------
    gpu : Gpu
        Where it did.
    recorder : Recorder
        That has seen it.
    """

    def __init__(self, gpu: Gpu, recorder: Recorder) -> None:
        tensors = [Place(base, 0) for base in range(len(TENSORS))]
        self._within = sorted(set(map(recorder.place, recorder.arrays())) - set(tensors))
        self._scratch_bytes = recorder.scratch_bytes
        slots = {place: slot for slot, place in enumerate([*tensors, *self._within])}
        self._replay = Replay(
            gpu, recorder.launches, len(slots), lambda array: slots[recorder.place(array)]
        )

    def repeat(self, launcher: GpuLauncher, out: Tensor, addresses: list[int]) -> None:
        """Launch it on the launcher's stream, the tensors, `out` the last, at these addresses."""
        if self._scratch_bytes:
            scratch = out.new_empty(self._scratch_bytes // out.itemsize)
            addresses.append(scratch.data_ptr())
        within = [addresses[base] + offset for base, offset in self._within]
        self._replay(launcher.stream, addresses[:SCRATCH] + within)
