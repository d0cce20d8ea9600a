"""Finds two threads that touch one word, one of them writing, with nothing to order them.

Each word remembers its last writer and two readers. An access is ordered before the running
thread's when, since it happened,

* the two threads' block has passed a barrier, or their warp a warp collective,
* the grid has passed a grid barrier, or
* the earlier thread (or, by way of a barrier, its warp or block) has fenced and then done an atomic
  on a word on which the running thread's block has done an atomic since: the "last block to arrive"
  pattern.

Two atomics never race; two plain writes do, even of the same value. What is approximate (readers
forgotten, a collective of some lanes taken as one of the whole warp) loses races and never invents
one.
"""

from types import CodeType, FrameType
from typing import Any

from . import sites
from .arrays import ArrayInfo
from .errors import RaceError
from .machine import Machine, Thread, name

_DEED = {"load": "reads it", "store": "writes it", "atomic": "updates it atomically"}


Access = tuple[Thread, int, str, CodeType, int]
"""Who touched a word, when on the machine's clock, how, and from which instruction."""


class RaceDetector:
    """Observer of one launch's accesses; raises `RaceError`."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.words: dict[int, list[Any]] = {}
        self.released: dict[int, dict[Any, int]] = {}

    def access(
        self,
        info: ArrayInfo,
        address: int,
        key: Any,
        kind: str,
        frame: FrameType,
        call: FrameType | None,
    ) -> None:
        """Compare one access with the earlier ones to its word, and remember it."""
        machine = self.machine
        thread = machine.thread
        words = self.words if info.space == "global" else thread.block.words
        access = (thread, machine.clock, kind, frame.f_code, frame.f_lasti)
        word: list[Any] | None = words.get(address)
        if word is None:
            words[address] = word = [None] * 3
        if kind == "load":
            writer, reader, other = word
            if writer and writer[0] is not thread and self._unordered(writer, thread):
                raise self._race(info, key, writer, access)
            # Of many readers keep two that differ, of different warps where there are such: a
            # later writer is then a stranger to at least one of them.
            if (
                reader
                and reader[0] is not thread
                and (
                    other is None
                    or reader[0].warp is not thread.warp
                    or other[1] < thread.warp.epoch
                )
            ):
                word[2] = reader
            word[1] = access
            return
        for earlier in word:
            if (
                earlier
                and earlier[0] is not thread
                and not (kind == "atomic" and earlier[2] == "atomic")
                and self._unordered(earlier, thread)
            ):
                raise self._race(info, key, earlier, access)
        word[0] = access
        if kind == "atomic":
            self._synchronise(address, thread)

    def fence(self) -> None:
        """Note a ``threadfence``: what its thread's atomics release is what came before it."""
        machine = self.machine
        thread = machine.thread
        thread.fence = thread.warp.fence = thread.block.fence = machine.clock
        machine.clock += 1

    def _unordered(self, earlier: Access, thread: Thread) -> bool:
        before, time = earlier[0], earlier[1]
        if before.warp is thread.warp:
            mark = thread.warp.epoch
        elif before.block is thread.block:
            mark = thread.block.epoch
        else:
            mark = self.machine.grid_mark
        if time < mark:
            return False
        return not any(
            time <= known.get(who, -1)
            for known in (thread.block.synced, thread.warp.synced)
            for who in (before, before.warp, before.block)
        )

    def _synchronise(self, address: int, thread: Thread) -> None:
        warp, block = thread.warp, thread.block
        released = self.released.setdefault(address, {})
        for who, time in released.items():
            known = warp.synced if who.block is block else block.synced
            if time > known.get(who, -1):
                known[who] = time
        for who, time in (
            (thread, thread.fence),
            (warp, min(warp.epoch - 1, warp.fence)),
            (block, min(block.epoch - 1, block.fence)),
            *block.synced.items(),
            *warp.synced.items(),
        ):
            if time > released.get(who, -1):
                released[who] = time

    def _race(self, info: ArrayInfo, key: Any, earlier: Access, later: Access) -> RaceError:
        def story(access: Access) -> str:
            thread, _, kind, code, lasti = access
            return f"  {name(thread)} {_DEED[kind]} at {sites.describe(code, lasti)}"

        return RaceError(
            f"race on element {key} of {info} in kernel {self.machine.kernel_name}: no barrier "
            f"orders\n{story(earlier)}\n{story(later)}"
        )
