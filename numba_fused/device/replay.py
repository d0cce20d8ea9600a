"""Repeat launches at other addresses, in less time than they first took.

From one call to the next of the same shape, all that changes of what the driver is handed is the
addresses of the arrays. So a `Replay` takes the arguments of some launches apart once and keeps
them in buffers where every address that two launches share is one and the same word, since the
driver reads each parameter wherever the table of a launch points. To repeat the launches is to
fill in those words, all at once, and to call the driver.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from numba_fused.device.launch import (
    WORD,
    Buffer,
    Dim,
    Geometry,
    Gpu,
    LoadedKernel,
    flatten,
    geometry,
)


class Launch(NamedTuple):
    """What a launcher was called with."""

    kernel: Any
    grid: Dim
    block: Dim
    args: tuple[Any, ...]
    shared_bytes: int
    cooperative: bool


class Step(NamedTuple):
    """A launch taken apart."""

    kernel: LoadedKernel
    geometry: Geometry
    cooperative: bool
    words: list[Any]  # as they were when it was recorded
    slots: list[int]  # for each array among its arguments, the word that holds its address


class Replay:
    """The launches of one call, to be repeated on one GPU.

    Parameters
    ----------
    gpu : Gpu
    launches : sequence of Launch
        Already run once there, so that their kernels are loaded and allowed their shared memory.
    slots : int
        How many addresses a repetition is given.
    slot_of : callable
        Which of them an array among the arguments begins at.
    """

    def __init__(
        self, gpu: Gpu, launches: Sequence[Launch], slots: int, slot_of: Callable[[Any], int]
    ) -> None:
        self._gpu = gpu
        self._steps = [taken_apart(gpu, launch, slot_of) for launch in launches]
        self._slots = slots
        self._fill = struct.Struct(f"<{slots}Q").pack_into
        self._idle: list[Buffers] = []  # not in use; append and pop are atomic

    def __call__(self, stream: Any, addresses: Sequence[int]) -> None:
        """Queue the launches on a stream of the GPU, the arrays being at these addresses."""
        try:
            buffers = self._idle.pop()
        except IndexError:
            buffers = Buffers(self._steps, self._slots)
        self._fill(buffers.addresses, 0, *addresses)
        entered = self._gpu.enter()
        try:
            for step, table_address in buffers.tables:
                step.kernel.queue(stream, step.geometry, step.cooperative, table_address)
        finally:
            if entered:
                self._gpu.leave()
        self._idle.append(buffers)


def taken_apart(gpu: Gpu, launch: Launch, slot_of: Callable[[Any], int]) -> Step:
    """The step that repeats a launch."""
    kinds, words = flatten(launch.args)
    return Step(
        kernel=gpu.load(launch.kernel, kinds),
        geometry=geometry(launch.grid, launch.block, launch.shared_bytes),
        cooperative=launch.cooperative,
        words=words,
        slots=[slot_of(arg) for arg in launch.args if hasattr(arg, "data_ptr")],
    )


class Buffers:
    """Parameters of all steps, which one thread at a time may fill in.

    Attributes
    ----------
    addresses : ctypes array
        A word for each slot.
    tables : list of (Step, int)
        Where the driver finds the parameters of each step.
    """

    def __init__(self, steps: Sequence[Step], slots: int) -> None:
        self.addresses = ctypes.create_string_buffer(WORD * slots)
        first = ctypes.addressof(self.addresses)
        self._of_steps: list[Buffer] = []
        self.tables: list[tuple[Step, int]] = []
        for step in steps:
            parameters = step.kernel.parameters
            buffer = parameters.buffer()
            parameters.pack(buffer, step.words)
            for parameter, slot in zip(parameters.addresses, step.slots, strict=True):
                buffer.table[parameter] = first + WORD * slot
            self._of_steps.append(buffer)
            self.tables.append((step, buffer.table_address))
