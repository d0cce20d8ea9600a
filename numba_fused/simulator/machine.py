"""The scheduler: threads are greenlets, and a thread runs until it waits for somebody.

A thread that waits hands control straight to the next runnable thread of its block; only when
there is none does control return to the hub (the greenlet that called ``launch``). A greenlet
whose thread has returned starts the next thread itself, so a kernel without barriers runs in one
greenlet.
"""

import contextvars
import random
import sys
from collections import Counter, deque
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

from . import sites
from .arrays import (
    ArrayInfo,
    DeviceArray,
    GlobalArray1,
    GlobalArrayN,
    ObservedArray,
    ObservedArray1,
    ScratchArray1,
    ScratchArrayN,
)
from .errors import DeadlockError, SimulationError

WARP_SIZE = 32
MAX_THREADS_PER_BLOCK = 1024
MAX_IDLE_ROUNDS = 1000
"""Rounds over all blocks in which threads only yield before the launch counts as stuck."""

Dim = tuple[int, int, int]


class Group:
    """The lanes of one warp collective that is being gathered."""

    __slots__ = ("threads", "values")

    def __init__(self) -> None:
        self.threads: list[Thread] = []
        self.values: list[Any] = [None] * WARP_SIZE


class Warp:
    """Up to 32 consecutive threads of a block, with what they are waiting for together."""

    __slots__ = (
        "block",
        "epoch",
        "exited",
        "fence",
        "full",
        "groups",
        "pending",
        "pending_epoch",
        "polling",
        "synced",
    )

    def __init__(self, block: "Block", lanes: int):
        self.block = block
        self.full = (1 << lanes) - 1
        self.exited = 0
        self.epoch = block.epoch  # time of the last event that ordered the warp's lanes
        self.fence = -1
        self.groups: dict[tuple[str, int], Group] = {}
        self.polling: dict[tuple[CodeType, int], list[Thread]] = {}  # activemask
        self.synced: dict[Any, int] = {}
        self.pending: dict[Any, Any] = {}
        self.pending_epoch = -1


class Thread:
    """One thread: its coordinates, its greenlet once it has waited, and what it waits for."""

    __slots__ = (
        "block",
        "fence",
        "greenlet",
        "index",
        "lane",
        "result",
        "spins",
        "waits",
        "warp",
        "x",
        "y",
        "z",
    )

    def __init__(self, block: "Block", warp: Warp, index: int, lane: int, x: int, y: int, z: int):
        self.block = block
        self.warp = warp
        self.index = index
        self.lane = lane
        self.x = x
        self.y = y
        self.z = z
        self.greenlet: greenlet | None = None
        self.waits: tuple[str, FrameType] | None = None
        self.result: Any = None
        self.fence = -1
        self.spins = 0


class NamedBarrier:
    """Who has come to one of a block's numbered barriers since it last let anybody pass."""

    __slots__ = ("arrived", "expected", "waiting", "warps")

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.arrived = 0
        self.waiting: list[Thread] = []
        self.warps: set[Warp] = set()


class Block:
    """A block's threads, the runnable ones among them, and its shared memory."""

    __slots__ = (
        "arrived",
        "at_grid_sync",
        "barrier",
        "divergent",
        "dynamic",
        "epoch",
        "fence",
        "live",
        "named_barriers",
        "queue",
        "result",
        "shared",
        "size",
        "synced",
        "threads",
        "values",
        "warps",
        "words",
        "x",
        "y",
        "yielded",
        "z",
    )

    def __init__(self, x: int, y: int, z: int, dim: Dim, epoch: int):
        self.x = x
        self.y = y
        self.z = z
        self.epoch = epoch  # time of the last event that ordered all threads of the block
        self.size = self.live = dim[0] * dim[1] * dim[2]
        self.warps: list[Warp] = []
        self.threads: list[Thread] = []
        index = 0
        for tz in range(dim[2]):
            for ty in range(dim[1]):
                for tx in range(dim[0]):
                    lane = index % WARP_SIZE
                    if lane == 0:
                        self.warps.append(Warp(self, min(WARP_SIZE, self.size - index)))
                    self.threads.append(Thread(self, self.warps[-1], index, lane, tx, ty, tz))
                    index += 1
        self.queue = deque(self.threads)
        self.yielded: list[Thread] = []
        self.at_grid_sync = 0
        self.arrived = 0
        self.barrier: tuple[str, CodeType, int] = ("", Block.__init__.__code__, 0)
        self.divergent = False
        self.values: list[Any] = []
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.result: Any = None
        self.shared: dict[Any, DeviceArray] = {}
        self.dynamic: tuple[np.ndarray, np.ndarray] | None = None
        self.words: dict[int, list[Any]] = {}
        self.synced: dict[Any, int] = {}
        self.fence = -1

    @property
    def block(self) -> "Block":
        """Itself: the race detector orders threads, warps and blocks alike by their block."""
        return self


class Machine:
    """Runs one launch at a time; the namespace a kernel sees calls into it.

    `observers` are called as ``observer(info, address, key, kind, frame, call)`` for each
    access to a global or shared array.
    """

    def __init__(self, schedule_seed: int | None) -> None:
        self.rng = None if schedule_seed is None else random.Random(schedule_seed)
        self.places = sites.Places({id(code) for code in own_code(Machine)})
        self.observers: list[Callable[..., None]] = []
        # Greenlets have contexts of their own, and NumPy keeps its error state in the context:
        # all threads share one in which overflow is silent, as it is on hardware.
        self.context = contextvars.copy_context()
        self.context.run(np.seterr, all="ignore")
        self.thread: Any = None
        self.kernel_name = ""
        self.grid: Dim = (1, 1, 1)
        self.block_dim: Dim = (1, 1, 1)
        self.shared_bytes = 0
        self.clock = 0
        self.grid_mark = 0
        self.events = 0
        self.collectives: Counter[str] = Counter()
        self.end_of_block: Callable[[Block], None] | None = None

    # ------------------------------------------------------------------ launching

    def launch(
        self, kernel: Callable, name: str, grid: Dim, block_dim: Dim, args: list, shared_bytes: int
    ) -> None:
        """Run every thread of the grid; raises what the kernel raises, with the place noted."""
        self.kernel = kernel
        self.args = args
        self.kernel_name = name
        self.grid = grid
        self.block_dim = block_dim
        self.shared_bytes = shared_bytes
        self.collectives = Counter()
        self.grid_mark = self.clock
        self.hub = getcurrent()
        self.idle: list[greenlet] = []
        self.workers: list[greenlet] = []
        try:
            self._run_grid()
        except SimulationError:
            raise
        except Exception as error:
            place = sites.innermost_kernel_frame(error.__traceback__)
            error.add_note(f"simulated{self.where(place)}")
            raise
        finally:
            self.thread = None
            for worker in self.workers:
                if not worker.dead:
                    worker.throw()

    def _run_grid(self) -> None:
        gx, gy, gz = self.grid
        order = [(x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)]
        if self.rng:
            self.rng.shuffle(order)
        live: list[Block] = []
        finished = 0
        for x, y, z in order:
            block = Block(x, y, z, self.block_dim, self.clock)
            if self.rng:
                self.rng.shuffle(block.queue)
            self._run_block(block)
            if block.live:
                live.append(block)
            else:
                finished += 1
        idle_rounds = 0
        while live:
            events = self.events
            for block in live:
                block.queue.extend(block.yielded)
                block.yielded.clear()
                if block.queue:
                    self._run_block(block)
            remaining = [block for block in live if block.live]
            finished += len(live) - len(remaining)
            live = remaining
            if live and all(block.at_grid_sync == block.size for block in live):
                if finished:
                    raise DeadlockError(
                        f"{finished} of {finished + len(live)} blocks returned without the grid "
                        f"barrier the others wait at\n{self._waiting(live[0])}"
                    )
                self._release_grid(live)
            idle_rounds = idle_rounds + 1 if self.events == events else 0
            if idle_rounds > MAX_IDLE_ROUNDS:
                stuck = "\n".join(self._waiting(block) for block in live[:4])
                raise DeadlockError(f"threads spin and nothing can end it\n{stuck}")

    def _run_block(self, block: Block) -> None:
        """Run a block until it is done, or all it can do is wait for other blocks."""
        while True:
            while block.queue:
                thread = block.queue.popleft()
                self.thread = thread
                worker = thread.greenlet
                if worker is None:
                    worker = self.idle.pop() if self.idle else self._new_worker()
                worker.switch()
            if not self._release_polling(block):
                break
        waiting = block.live - len(block.yielded) - block.at_grid_sync
        if block.live == 0:
            if self.end_of_block:
                self.end_of_block(block)
        elif not block.yielded and (waiting or block.at_grid_sync != block.size):
            raise DeadlockError(f"nothing can proceed\n{self._waiting(block)}")

    def _new_worker(self) -> greenlet:
        worker = greenlet(self._work, self.hub)
        worker.gr_context = self.context
        self.workers.append(worker)
        return worker

    def _work(self) -> None:
        """Run one thread after another; the thread to start next is `self.thread`."""
        me = getcurrent()
        kernel, args = self.kernel, self.args
        while True:
            thread = self.thread
            kernel(*args)
            block = thread.block
            thread.waits = None
            block.live -= 1
            self.events += 1
            warp = thread.warp
            warp.exited |= 1 << thread.lane
            if warp.groups:
                self._check_exit(thread)
            queue = block.queue
            if queue and queue[0].greenlet is None:
                self.thread = queue.popleft()
                continue
            self.idle.append(me)
            if queue:
                self.thread = queue.popleft()
                self.thread.greenlet.switch()
            else:
                self.hub.switch()

    # ------------------------------------------------------------------ waiting and waking

    def suspend(self, thread: Thread) -> None:
        """Let others run; returns when somebody has put `thread` back into its block's queue."""
        if thread.greenlet is None:
            thread.greenlet = getcurrent()
        queue = thread.block.queue
        if queue:
            following = queue[0]
            if following is thread:
                queue.popleft()
                return
            worker = following.greenlet
            if worker is None and self.idle:
                worker = self.idle.pop()
            if worker is not None:
                queue.popleft()
                self.thread = following
                worker.switch()
                return
        self.hub.switch()

    def _wake(self, threads: list[Thread], thread: Thread) -> None:
        """Make `threads` runnable; natural order lets `thread`, the last to arrive, go on."""
        queue = thread.block.queue
        if self.rng is None:
            queue.extend(other for other in threads if other is not thread)
        else:
            queue.extend(threads)
            self.rng.shuffle(queue)
            self.suspend(thread)

    def barrier(
        self, kind: str, frame: FrameType, value: Any = None, reduce: Callable | None = None
    ) -> Any:
        """Wait for all threads of the block; return ``reduce(values)`` of what they brought."""
        thread = self.thread
        block = thread.block
        thread.waits = (kind, frame)
        if block.arrived == 0:
            block.barrier = (kind, frame.f_code, frame.f_lasti)
            if reduce:
                block.values.clear()
        else:
            # The raw offset settles most cases; of one instruction it varies, see Places.starts.
            first_kind, code, lasti = block.barrier
            if (
                code is not frame.f_code
                or kind != first_kind
                or (
                    lasti != frame.f_lasti
                    and self.places.starts(code)[lasti >> 1] != self.places.instruction(frame)
                )
            ):
                block.divergent = True
        block.arrived += 1
        if reduce:
            block.values.append(value)
        if block.arrived == block.size and not block.divergent:
            self.clock += 1
            self.events += 1
            self.collectives[kind] += 1
            block.epoch = self.clock
            for warp in block.warps:
                warp.epoch = self.clock
            block.arrived = 0
            if reduce:
                block.result = reduce(block.values)
            self._wake(block.threads, thread)
        else:
            self.suspend(thread)
        thread.waits = None
        return block.result

    def named_barrier(self, which: int, threads: int, waits: bool, frame: FrameType) -> None:
        """Be the next of `threads` at a numbered barrier, and wait there or only be counted.

        What the warps that came did before is ordered before what those that waited do next.
        """
        thread = self.thread
        block = thread.block
        kind = f"barrier {which}"
        barrier = block.named_barriers.get(which)
        if barrier is None:
            barrier = block.named_barriers[which] = NamedBarrier(threads)
        if barrier.expected != threads:
            thread.waits = (kind, frame)
            raise SimulationError(
                f"{kind} was joined for {barrier.expected} threads, and is now for "
                f"{threads}{self.where()}"
            )
        barrier.arrived += 1
        barrier.warps.add(thread.warp)
        if waits:
            thread.waits = (kind, frame)
            barrier.waiting.append(thread)
        if barrier.arrived == threads:
            self._pass(barrier)
            del block.named_barriers[which]
            self.collectives[kind] += 1
            self._wake(barrier.waiting if waits else [*barrier.waiting, thread], thread)
        elif waits:
            self.suspend(thread)
        thread.waits = None

    def _pass(self, barrier: NamedBarrier) -> None:
        known: dict[Any, int] = {}
        for warp in barrier.warps:
            for who, time in warp.synced.items():
                known[who] = max(time, known.get(who, -1))
        known |= dict.fromkeys(barrier.warps, self.clock)
        self.clock += 1
        self.events += 1
        for warp in {thread.warp for thread in barrier.waiting}:
            warp.epoch = self.clock
            warp.synced.update(known)

    def exchange(
        self,
        kind: str,
        mask: int,
        value: Any,
        frame: FrameType,
        combine: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Gather one value from each lane of `mask`; every lane gets the whole list of 32.

        Or what `combine` makes of that list, once for all of them.

        All warp collectives are this one. Lanes that do not exist in a short last warp are
        ignored, as hardware does with lanes that never started.
        """
        thread = self.thread
        warp = thread.warp
        thread.waits = (kind, frame)
        named = int(mask) & 0xFFFFFFFF
        mask = named & warp.full
        if not mask >> thread.lane & 1:
            raise SimulationError(
                f"{kind}: lane {thread.lane} is not in its own mask {named:#010x}{self.where()}"
            )
        if mask & warp.exited:
            self._exited_in_mask(kind, mask, warp)
        key = (kind, mask)
        group = warp.groups.get(key)
        if group is None:
            group = warp.groups[key] = Group()
        group.values[thread.lane] = value
        group.threads.append(thread)
        if len(group.threads) == mask.bit_count():
            del warp.groups[key]
            self.clock += 1
            self.events += 1
            self.collectives[kind] += 1
            warp.epoch = self.clock
            if combine:
                group.values = combine(group.values)
            self._wake(group.threads, thread)
        else:
            self.suspend(thread)
        thread.waits = None
        return group.values

    def _exited_in_mask(self, kind: str, mask: int, warp: Warp) -> None:
        lanes = ranges([lane for lane in range(WARP_SIZE) if mask & warp.exited & (1 << lane)])
        raise DeadlockError(
            f"{kind} with mask {mask:#010x} names lanes {lanes}, which have returned{self.where()}"
        )

    def _check_exit(self, thread: Thread) -> None:
        for (kind, mask), group in thread.warp.groups.items():
            if mask >> thread.lane & 1:
                self.thread = group.threads[0]
                self._exited_in_mask(kind, mask, thread.warp)

    def active_mask(self, frame: FrameType) -> int:
        """Lanes that sit at this very instruction once no lane of the block can go on."""
        thread = self.thread
        here = frame.f_code, self.places.instruction(frame)
        thread.waits = ("activemask", frame)
        thread.warp.polling.setdefault(here, []).append(thread)
        self.suspend(thread)
        thread.waits = None
        return thread.result

    def _release_polling(self, block: Block) -> bool:
        for warp in block.warps:
            for threads in warp.polling.values():
                mask = sum(1 << thread.lane for thread in threads)
                for thread in threads:
                    thread.result = mask
                block.queue.extend(threads)
                self.collectives["activemask"] += 1
                self.events += 1
            warp.polling.clear()
        if self.rng:
            self.rng.shuffle(block.queue)
        return bool(block.queue)

    def grid_barrier(self, frame: FrameType) -> None:
        """Wait for all threads of all blocks."""
        thread = self.thread
        thread.waits = ("grid.sync", frame)
        thread.block.at_grid_sync += 1
        self.suspend(thread)
        thread.waits = None

    def _release_grid(self, blocks: list[Block]) -> None:
        self.clock += 1
        self.events += 1
        self.collectives["grid.sync"] += 1
        self.grid_mark = self.clock
        if self.rng:
            self.rng.shuffle(blocks)
        for block in blocks:
            block.at_grid_sync = 0
            block.epoch = self.clock
            for warp in block.warps:
                warp.epoch = self.clock
            block.queue.extend(block.threads)
            if self.rng:
                self.rng.shuffle(block.queue)

    def pause(self, kind: str, frame: FrameType) -> None:
        """Let every other thread of the grid have a turn: what a spinning thread needs."""
        thread = self.thread
        thread.waits = (kind, frame)
        thread.spins = 0
        thread.block.yielded.append(thread)
        self.suspend(thread)
        thread.waits = None

    # ------------------------------------------------------------------ arrays

    def wrap(self, data: np.ndarray, valid: np.ndarray | None, info: ArrayInfo) -> DeviceArray:
        """The cheapest view of `data` that checks what has to be checked."""
        if self.observers and info.space in ("global", "shared"):
            observed = ObservedArray1 if data.ndim == 1 else ObservedArray
            return observed(self, data, valid, info)
        if valid is None:
            return (GlobalArray1 if data.ndim == 1 else GlobalArrayN)(self, data, valid, info)
        return (ScratchArray1 if data.ndim == 1 else ScratchArrayN)(self, data, valid, info)

    def observe(self, info: ArrayInfo, address: int, key: Any, kind: str, frame: FrameType) -> None:
        """Tell the observers of one access, charged to the kernel's own source line."""
        call = None
        if id(frame.f_code) in self.places.transparent:
            frame, call = self.places.outside(frame)
        for observer in self.observers:
            observer(info, address, key, kind, frame, call)

    # ------------------------------------------------------------------ words for messages

    def where(self, place: tuple[CodeType, int] | None = None) -> str:
        """``, in kernel k, block (..), thread (..), at file:line: text`` for the running thread."""
        if self.thread is None:
            return ""
        if place is None and self.thread.waits:
            place = self.places(self.thread.waits[1])
        if place is None:
            frame = sys._getframe(1)
            while frame.f_back and frame.f_code.co_filename.startswith(sites.HERE):
                frame = frame.f_back
            place = self.places(frame)
        return f", in kernel {self.kernel_name}, {name(self.thread)}, at {sites.describe(*place)}"

    def _waiting(self, block: Block) -> str:
        """Who of a block waits where, and who has returned."""
        groups: dict[Any, list[int]] = {}
        for thread in block.threads:
            waits = thread.waits and (thread.waits[0], *self.places(thread.waits[1]))
            groups.setdefault(waits, []).append(thread.index)
        masks = [
            f"{kind} with mask {mask:#010x} has lanes {ranges([t.lane for t in group.threads])} "
            f"of the warp of threads {warp_start}-{warp_start + warp.full.bit_count() - 1}"
            for warp_start, warp in zip(range(0, block.size, WARP_SIZE), block.warps, strict=True)
            for (kind, mask), group in warp.groups.items()
        ]
        lines = [f"kernel {self.kernel_name}, block ({block.x}, {block.y}, {block.z}):"]
        for waits, indices in groups.items():
            if waits is None:
                lines.append(f"threads {ranges(indices)} have returned")
            else:
                kind, code, lasti = waits
                place = sites.describe(code, lasti)
                lines.append(f"threads {ranges(indices)} wait at {kind}, {place}")
        return "\n  ".join(lines + masks)


def own_code(cls: type) -> list[CodeType]:
    """Code objects of a class's methods."""
    return [f.__code__ for f in vars(cls).values() if hasattr(f, "__code__")]


def name(thread: Thread) -> str:
    """``block (x, y, z), thread (x, y, z)``."""
    block = thread.block
    return f"block ({block.x}, {block.y}, {block.z}), thread ({thread.x}, {thread.y}, {thread.z})"


def ranges(numbers: list[int]) -> str:
    """``0-31, 64`` for a list of integers."""
    numbers = sorted(numbers)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
