"""Watch a function launch kernels, and from then on launch them without running it.

The watching is PyTorch's: a dispatch mode sees every operator that the function calls. Memory that
it allocates is allocated anew for each repetition, and views of it or of the tensors it was given
are followed. A function that calls anything else, such as a library's convolution, cannot be
repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from numba_fused.device.launch import Dim, Gpu, GpuLauncher
from numba_fused.device.replay import Launch, Replay

ALIGNMENT = 16  # of tensors that kernels may load in whole words of 128 bits
SCRATCH_ALIGNMENT = 512  # torch's own

ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class Place(NamedTuple):
    """Where a tensor begins: some bytes into a tensor given, or else allocated; in that order."""

    base: int
    offset: int


class Recorder(TorchDispatchMode):
    """A launcher that notes what it launches while it watches PyTorch's operators.

    Parameters
    ----------
    launcher : GpuLauncher
    tensors : sequence of Tensor
        That the function is given, or views of them: see `follow`.

    Attributes
    ----------
    given : int
        How many.
    launches : list of Launch
    sizes : list of int
        Bytes of each allocation.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: guarding `__torch_dispatch__` would import the compiler, 2 s of the first call."""
        return False

    def __init__(self, launcher: GpuLauncher, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = len(tensors)
        self.launches: list[Launch] = []
        self.sizes: list[int] = []
        self._launcher = launcher
        self._tensors = tensors
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
            self._know(result, Place(self.given + len(self.sizes), 0))
            self.sizes.append(result.untyped_storage().nbytes())
        elif func.is_view and isinstance(result, Tensor) and id(args[0]) in self._known:
            base, offset = self.place(args[0])
            self._know(result, Place(base, offset + result.data_ptr() - args[0].data_ptr()))
        else:
            self._only_launches = False
        return result

    def follow(self) -> list[Tensor]:
        """The tensors given, flat: as many objects, even where one tensor has two roles."""
        views: list[Tensor] = []
        for base, tensor in enumerate(self._tensors):
            self._know(tensor, Place(base, 0))
            views.append(tensor.view(-1))
        return views

    def place(self, tensor: Tensor) -> Place:
        """Where a tensor begins."""
        return self._known[id(tensor)][1]

    def knows(self, tensor: Tensor) -> bool:
        """Whether it was given or allocated, or is a view of what was."""
        return id(tensor) in self._known

    def allocated(self, tensor: Tensor) -> bool:
        """Whether it begins where something was allocated."""
        base, offset = self.place(tensor) if self.knows(tensor) else (0, 0)
        return base >= self.given and offset == 0

    def arrays(self) -> list[Tensor]:
        """All tensors that were launched with."""
        return [arg for launch in self.launches for arg in launch.args if isinstance(arg, Tensor)]

    def is_repeatable(self) -> bool:
        """Whether the launches are all that was done, and it is known with what."""
        found_all = all(map(self.knows, self.arrays()))
        return self._only_launches and len(self.launches) > 0 and found_all

    def _know(self, tensor: Tensor, place: Place) -> None:
        self._known[id(tensor)] = tensor, place


class Recording:
    """What a function launched, ready to be launched with other tensors.

    Parameters
    ----------
    gpu : Gpu
        Where it did.
    recorder : Recorder
        That has seen it.
    results : sequence of Tensor
        That it returned: whole allocations of its own, see `Recorder.allocated`.
    """

    def __init__(self, gpu: Gpu, recorder: Recorder, results: Sequence[Tensor] = ()) -> None:
        self._of_results = [recorder.place(result).base for result in results]
        self._shapes = {recorder.place(result).base: result.shape for result in results}
        self._scratch_bytes = 0
        self._allocations: list[tuple[int, int]] = []  # base, and where in the scratch memory
        for base, size in enumerate(recorder.sizes, recorder.given):
            self._allocations.append((base, self._scratch_bytes))
            if base not in self._shapes:
                self._scratch_bytes += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
        self._places = sorted(set(map(recorder.place, recorder.arrays())))
        slots = {place: slot for slot, place in enumerate(self._places)}
        self._replay = Replay(
            gpu, recorder.launches, len(slots), lambda array: slots[recorder.place(array)]
        )

    def repeat(self, launcher: GpuLauncher, like: Tensor, addresses: list[int]) -> list[Tensor]:
        """Launch it on the launcher's stream, the tensors given at these addresses.

        Parameters
        ----------
        launcher : GpuLauncher
        like : Tensor
            On the device, in the dtype of the results.
        addresses : list of int
            Changed: those of the allocations are added.

        Returns
        -------
        list of Tensor
            Results, new.
        """
        made = {base: like.new_empty(shape) for base, shape in self._shapes.items()}
        if self._allocations:  # without a dtype, which takes time to name
            scratch = like.new_empty(self._scratch_bytes // like.itemsize)
            start = scratch.data_ptr()
            for base, offset in self._allocations:
                result = made.get(base)
                addresses.append(start + offset if result is None else result.data_ptr())
        words = [addresses[base] + offset for base, offset in self._places]
        self._replay(launcher.stream, words)
        return [made[base] for base in self._of_results]
