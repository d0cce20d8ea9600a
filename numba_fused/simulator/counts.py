"""The microscope: warp requests, sectors, shared-memory wavefronts and bytes per source line."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from . import sites
from .arrays import ArrayInfo

if TYPE_CHECKING:
    from .machine import Block, Machine, Warp

SECTOR_BYTES = 32
BANKS = 32
BANK_BYTES = 4


@dataclass
class Line:
    """What one source line did to one array in one launch.

    Attributes
    ----------
    file, line, text
        The kernel's (or device function's) source line.
    array, space, kind
        The array's name; ``'global'`` or ``'shared'``; ``'load'``, ``'store'`` or ``'atomic'``.
    accesses, bytes
        Lane-level accesses (a vector access by one lane is one) and the bytes they ask for.
    requests
        Warp requests: the k-th execution of one instruction by the lanes of a warp between two
        points where the warp waits is one request, which approximates lockstep.
    sectors
        32-byte sectors touched, summed over requests (global arrays).
    distinct_sectors, distinct_bytes
        Sectors touched in the whole launch, each once, and their bytes inside the array.
    wavefronts, bank_conflicts
        Passes through the 32 banks (shared arrays), and how many of them conflict-free accesses
        of this width would not have needed: 4-byte accesses need one pass per request, 8-byte
        ones one per half warp, 16-byte ones one per quarter.
    """

    file: str
    line: int
    text: str
    array: str
    space: str
    kind: str
    accesses: int = 0
    bytes: int = 0
    requests: int = 0
    sectors: int = 0
    distinct_sectors: int = 0
    distinct_bytes: int = 0
    wavefronts: int = 0
    bank_conflicts: int = 0


@dataclass
class LaunchRecord:
    """One launch: its geometry, its collectives and, with ``count=True``, its lines.

    `collectives` counts barriers once per block, warp collectives once per warp and grid barriers
    once; `intrinsics` counts calls of intrinsics that carry a Python meaning, once per lane.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    threads: int
    shared_bytes: int
    collectives: dict[str, int]
    intrinsics: dict[str, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    @property
    def bytes_read(self) -> int:
        """Bytes of global memory read under the byte model; atomics read and write."""
        return self._bytes("load")

    @property
    def bytes_written(self) -> int:
        """Bytes of global memory written under the byte model; atomics read and write."""
        return self._bytes("store")

    def _bytes(self, kind: str) -> int:
        return sum(
            line.distinct_bytes
            for line in self.lines
            if line.space == "global" and line.kind in (kind, "atomic")
        )


class Executions:
    """What the lanes of a warp did at one instruction since the warp last waited.

    Attributes
    ----------
    done : list of int
        Per lane, how often it has been there.
    calls : list
        Per lane, the call of an intrinsic that its last access belonged to.
    requests : list of list of (lane, offset)
        The k-th holds the lanes' k-th accesses.
    """

    __slots__ = ("calls", "done", "requests")

    def __init__(self) -> None:
        self.done = [0] * 32
        self.calls: list[FrameType | None] = [None] * 32
        self.requests: list[list[tuple[int, int]]] = []


class AccessCounter:
    """Observer of one launch's accesses; `lines` has the result."""

    def __init__(self, machine: "Machine"):
        self.machine = machine
        self.intrinsics: Counter[str] = Counter()
        self._starts: dict[int, list[int]] = {}
        self._infos: dict[Any, ArrayInfo] = {}
        self._lines: dict[Any, Line] = {}
        self._line_of_site: dict[Any, tuple[Line, set[int]]] = {}
        self._sectors: defaultdict[Any, set[int]] = defaultdict(set)

    def access(
        self,
        info: ArrayInfo,
        address: int,
        key: Any,
        kind: str,
        frame: FrameType,
        call: FrameType | None,
    ) -> None:
        """Add one lane's access to its warp's pending request."""
        thread = self.machine.thread
        warp = thread.warp
        if warp.pending_epoch != warp.epoch:
            self._flush(warp)
            warp.pending_epoch = warp.epoch
        code = frame.f_code
        # The raw offset of one instruction varies, so it is looked up: see Places.instruction.
        starts = self._starts.get(id(code)) or self._new_code(frame)
        site = (id(code), starts[frame.f_lasti >> 1], info.key, kind)
        executions = warp.pending.get(site)
        if executions is None:
            executions = warp.pending[site] = Executions()
            if site not in self._line_of_site:
                self._line_of_site[site] = self._line(code, site[1], info, kind)
        lane = thread.lane
        k = executions.done[lane]
        if call is not None and executions.calls[lane] is call:
            k -= 1
        else:
            executions.done[lane] = k + 1
            executions.calls[lane] = call
        if k == len(executions.requests):
            executions.requests.append([])
        executions.requests[k].append((lane, address - info.base))

    def _new_code(self, frame: FrameType) -> list[int]:
        starts = self._starts[id(frame.f_code)] = self.machine.places.starts(frame.f_code)
        return starts

    def end_of_block(self, block: "Block") -> None:
        """Settle what the block's warps still have pending."""
        for warp in block.warps:
            self._flush(warp)

    def _line(
        self, code: CodeType, lasti: int, info: ArrayInfo, kind: str
    ) -> tuple[Line, set[int]]:
        number = sites.line_number(code, lasti)
        key = (code.co_filename, number, info.key, kind)
        if key not in self._lines:
            self._infos[info.key] = info
            text = sites.source_text(code.co_filename, number)
            self._lines[key] = Line(code.co_filename, number, text, info.name, info.space, kind)
        return self._lines[key], self._sectors[key]

    def _flush(self, warp: "Warp") -> None:
        for site, executions in warp.pending.items():
            line, distinct = self._line_of_site[site]
            info = self._infos[site[2]]
            size = info.dtype.itemsize
            for entries in executions.requests:
                line.requests += 1
                line.accesses += len({lane for lane, _ in entries})
                line.bytes += size * len(entries)
                if info.space == "shared":
                    passes, needed = wavefronts(entries, size)
                    line.wavefronts += passes
                    line.bank_conflicts += passes - needed
                else:
                    sectors = {offset // SECTOR_BYTES for _, offset in entries}
                    if SECTOR_BYTES % size or any(offset % size for _, offset in entries):
                        sectors |= {(offset + size - 1) // SECTOR_BYTES for _, offset in entries}
                    line.sectors += len(sectors)
                    distinct |= sectors
        warp.pending.clear()

    def lines(self) -> list[Line]:
        """The lines in order of file, line, array and kind."""
        for key, line in self._lines.items():
            if line.space == "global":
                sectors, extent = self._sectors[key], self._infos[key[2]].nbytes
                line.distinct_sectors = len(sectors)
                line.distinct_bytes = sum(
                    min(SECTOR_BYTES, extent - SECTOR_BYTES * sector) for sector in sectors
                )
        return sorted(
            self._lines.values(), key=lambda line: (line.file, line.line, line.array, line.kind)
        )


def wavefronts(entries: list[tuple[int, int]], size: int) -> tuple[int, int]:
    """Passes through the banks for one warp request, and how few it could have taken.

    Parameters
    ----------
    entries
        (lane, byte offset) of each element; several per lane for a vector access.
    size
        Bytes per element.
    """
    widest = max(Counter(lane for lane, _ in entries).values()) * size
    lanes_per_pass = max(1, 32 * BANK_BYTES // max(BANK_BYTES, widest))
    banks: defaultdict[int, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for lane, offset in entries:
        for word in range(offset // BANK_BYTES, (offset + size - 1) // BANK_BYTES + 1):
            banks[lane // lanes_per_pass][word % BANKS].add(word)
    passes = sum(max(len(words) for words in part.values()) for part in banks.values())
    return passes, len(banks)


def report(launches: list[LaunchRecord]) -> str:
    """A plain-text table of all lines of all launches."""
    columns = (
        ("accesses", "accesses"),
        ("requests", "requests"),
        ("bytes", "bytes"),
        ("sectors", "sectors"),
        ("distinct", "distinct_sectors"),
        ("waves", "wavefronts"),
        ("conflicts", "bank_conflicts"),
    )
    out = []
    for launch in launches:
        out.append(
            f"{launch.kernel}  grid {launch.grid}  block {launch.block}  {launch.threads} threads"
        )
        for what, counts in (("collectives", launch.collectives), ("calls", launch.intrinsics)):
            if counts:
                listed = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
                out.append(f"  {what}: {listed}")
        if launch.lines:
            out.append(
                f"  bytes read {launch.bytes_read}, written {launch.bytes_written}\n"
                + f"  {'line':>5} {'array':<12} {'kind':<13} "
                + " ".join(f"{title:>9}" for title, _ in columns)
                + "  source"
            )
        for line in launch.lines:
            out.append(
                f"  {line.line:>5} {line.array:<12} {line.space + ' ' + line.kind:<13} "
                + " ".join(f"{getattr(line, name):>9}" for _, name in columns)
                + f"  {line.text}"
            )
    return "\n".join(out)
