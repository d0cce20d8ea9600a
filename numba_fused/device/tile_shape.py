"""The compile-time numbers of a tensor-core tile: who computes what, and where it lies.

A block computes ``channel_warps * 16`` channels of ``row_warps * 8`` rows of ``column_warps * 16``
columns of one output plane. To its 16 x 8 matrix instructions the convolution is

    C[channel, row] += A[channel, k] * B[k, row]

once for each of 16 columns: a *column of B* is an output row, and its 16 positions along w are
taken one after the other, so that what a lane needs of x for eight (or four) of them is one window
that slides through its registers. Each of the four lanes `t` of a column holds two words of B,
neighbours in shared memory: one *slot*, the values of four *sources* as halves or of two in TF32.
A source is a (tap along d, input channel) pair, a *plane* the slots of four (two) of them.

    window v      for each lane t a (plane, tap along h): planes 4 b + t and tap v % KH while four
                  planes are left, then the remaining pairs, four at a time
    step          one matrix instruction per position: a window and a tap along w
    tail steps    what does not fill a window: each lane has a (plane, tap along h, tap along w)
                  of its own, and loads slot by slot
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np

Triple: TypeAlias = tuple[int, int, int]

WARP = 32
CHANNELS = 16  # rows of A: output channels of a warp
ROWS = 8  # columns of B: output rows of a warp
# The blocks of an SM share its registers and this, an H200's; the system takes some for each.
WARPS_PER_PROCESSOR = 16
TEAMS = 2  # of warps that finish parked tiles
CONVOLVING_WARPS = 8  # of a block that has all of an SM's registers, and shares them unequally
PROCESSOR_SHARED_BYTES, SYSTEM_SHARED_BYTES = 228 * 1024, 1024
COLUMNS = 16  # positions along w of a warp: one dropout stream
RECORD_WORDS = 4  # sum and sum of squares of some channels of a tile, as doubles
WINDOW_POSITIONS = (8, 4, 2)  # of them that share a window: as many as keep it short
SHORT_WINDOW, LONGEST_WINDOW = 10, 24  # slots; 64 accumulators need registers, too
# Products in a chain that keeps fp32's accuracy: a matrix instruction cuts off what does not fit
# its sum, always towards zero, and the errors of a chain add up.
LONGEST_CHAIN = 128
BANKS = 32  # of shared memory, a word each
PADS = np.arange(0, 16, 4)  # words; 128-bit loads begin at multiples of four


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


Pattern: TypeAlias = tuple[tuple[int, int, int], ...]  # (plane, taps along h and w) of four lanes
Loads: TypeAlias = tuple[int, int, tuple[tuple[Pattern, int], ...]]


@lru_cache(maxsize=4096)
def fewest_turns(
    loads: tuple[Loads, ...],
    in_rows: int,
    row_slots: int,
    row_stride: int,
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """The pitches of rows and planes, in words, with which loads take the fewest turns.

    A turn serves 32 words of different banks, or of one address. Lanes ``4 g + t`` of a load are
    in row g of B and in part t of the pattern.

    Parameters
    ----------
    loads : tuple of (int, int, tuple of (Pattern, int))
        Words that a load takes, loads for each part, and the parts with their number.
    in_rows, row_slots : int
        Rows of a plane, and slots of a row.
    row_stride : int
        Rows of x from one row of B to the next.
    dilation : (int, int)
        (h, w).

    Returns
    -------
    (int, int)
        Of the pairs with the fewest turns, the one that takes the least memory.
    """
    rows = (2 * row_slots + PADS)[:, None, None, None, None]
    planes = in_rows * rows + PADS[:, None, None, None]
    turns = np.zeros((len(PADS), len(PADS)), np.int64)
    for width, times, patterns in loads:
        for pattern, count in patterns:
            plane, tap_h, tap_w = np.array(pattern).T
            part_at = plane * planes + tap_h * dilation[0] * rows + 2 * tap_w * dilation[1]
            row_at = np.arange(ROWS)[:, None] * row_stride * rows
            words = (row_at + part_at).reshape(*turns.shape, WARP, 1) + np.arange(width)
            words = np.sort(words.reshape(*turns.shape, width, BANKS))
            first_of_its_address = np.diff(words, prepend=-1) > 0
            of_bank = words[..., None] % BANKS == np.arange(BANKS)
            busiest = (of_bank & first_of_its_address[..., None]).sum(-2).max(-1)
            turns += count * times * busiest.sum(-1)
    sizes = planes.reshape(turns.shape)
    best = np.lexsort((sizes.ravel(), turns.ravel()))[0]
    return int(rows.ravel()[best // len(PADS)]), int(sizes.ravel()[best])


def _patterns(parts: np.ndarray) -> tuple[tuple[Pattern, int], ...]:
    """What lanes differ in, (loads, 4, 3), and how often: a load as a whole may lie anywhere."""
    relative = [tuple(map(tuple, load)) for load in (parts - parts[:, :1]).tolist()]
    return tuple(Counter(relative).items())


@dataclass(frozen=True)
class TileShape:
    """Everything a tensor-core kernel is specialised on: all of the problem but the batch.

    Attributes
    ----------
    in_channels, out_channels, group_channels : int
        Channels of x, of the output, and of one group of the normalisation.
    in_size, out_size : (int, int, int)
        (D, H, W) of x and of the output.
    kernel_size, stride, padding, dilation : (int, int, int)
        (d, h, w).
    channel_warps, row_warps, column_warps : int
        How the block's warps share the tile.
    planes : int
        Planes of slots in shared memory at a time.
    values_per_word : int
        2 halves, or 1 TF32 value.
    split : bool
        Whether a second set of planes holds what rounding to halves left over.
    aligned : bool
        Whether x and out begin at multiples of 16 bytes.
    bulk_copies : bool
        Whether the GPU has a copy engine for shared memory (sm_90 on).
    parked : int
        Convolved tiles that wait in shared memory for warps that finish them; 0 where those that
        convolve do that themselves, from registers.
    """

    in_channels: int
    out_channels: int
    group_channels: int
    in_size: Triple
    out_size: Triple
    kernel_size: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    channel_warps: int
    row_warps: int
    column_warps: int
    planes: int
    values_per_word: int
    split: bool
    aligned: bool
    bulk_copies: bool
    parked: int = 0

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Kernels are looked up by their shape at every launch."""
        return hash(tuple(getattr(self, name) for name in self.__dataclass_fields__))

    @property
    def warps(self) -> int:
        """Warps of a block that convolve."""
        return self.channel_warps * self.row_warps * self.column_warps

    @cached_property
    def threads(self) -> int:
        """Threads of a block that convolve."""
        return WARP * self.warps

    @property
    def packing_threads(self) -> int:
        """Threads of a block that stage and pack the input: those that convolve, or others."""
        return max(WARP, self.threads // 2) if self.parked else self.threads

    @property
    def first_packing_thread(self) -> int:
        """The first of them."""
        return self.threads if self.parked else 0

    @property
    def team_threads(self) -> int:
        """Threads of one of the teams that finish what others have parked."""
        return self.threads if self.parked else 0

    @property
    def first_finishing_thread(self) -> int:
        """The first of them."""
        return self.first_packing_thread + self.packing_threads

    @property
    def exchanges_registers(self) -> bool:
        """Whether warps that convolve take registers from the others of their block."""
        return self.parked > 0 and self.warps == CONVOLVING_WARPS

    @cached_property
    def block_threads(self) -> int:
        """All threads of a block."""
        if not self.parked:
            return self.threads
        return self.first_finishing_thread + TEAMS * self.team_threads

    @cached_property
    def blocks_per_processor(self) -> int:
        """Blocks an SM holds: 16 warps leave a thread 128 registers."""
        return max(1, self.blocks_in(PROCESSOR_SHARED_BYTES))

    def blocks_in(self, processor_shared_bytes: int) -> int:
        """Blocks that registers and an SM's shared memory have room for."""
        of_block = round_up(self.shared_bytes + self.static_bytes + SYSTEM_SHARED_BYTES, 128)
        by_registers = 1
        if not self.exchanges_registers:
            by_registers = WARPS_PER_PROCESSOR * WARP // self.block_threads
        return min(by_registers, processor_shared_bytes // of_block)

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return CHANNELS * self.channel_warps

    @property
    def warp_channels(self) -> int:
        """Output channels of which a warp writes all rows and columns of a tile."""
        return self.channels // self.warps

    @property
    def rows(self) -> int:
        """Output rows of a tile."""
        return ROWS * self.row_warps

    @property
    def columns(self) -> int:
        """Output columns of a tile."""
        return COLUMNS * self.column_warps

    @property
    def tiles(self) -> Triple:
        """Tiles of a sample along (channels, rows, columns), for each output plane."""
        return (
            -(-self.out_channels // self.channels),
            -(-self.out_size[1] // self.rows),
            -(-self.out_size[2] // self.columns),
        )

    @cached_property
    def tiles_per_sample(self) -> int:
        """Tiles of a sample."""
        return self.out_size[0] * math.prod(self.tiles)

    # ---- the input tile -------------------------------------------------------------------

    @property
    def sources(self) -> int:
        """(Tap along d, input channel) pairs."""
        return self.kernel_size[0] * self.in_channels

    @property
    def plane_sources(self) -> int:
        """Sources of a plane: two words' worth."""
        return 2 * self.values_per_word

    @property
    def chunks(self) -> int:
        """How many times `planes` planes are loaded to cover all sources."""
        return -(-self.sources // (self.planes * self.plane_sources))

    @property
    def sums_apart(self) -> bool:
        """Whether the matrix instructions of a window have sums of their own.

        Plain additions, which round, join them to the accumulators.
        """
        return self.split and self.sources * math.prod(self.kernel_size[1:]) > LONGEST_CHAIN

    @property
    def window_positions(self) -> int:
        """Positions along w that share a window."""
        candidates = WINDOW_POSITIONS[1:] if self.sums_apart else WINDOW_POSITIONS
        short = (p for p in candidates if self._slots_under(p) <= SHORT_WINDOW)
        return next(short, WINDOW_POSITIONS[-1])

    @property
    def window_slots(self) -> int:
        """Slots of a window."""
        return self._slots_under(self.window_positions)

    def _slots_under(self, positions: int) -> int:
        taps = (self.kernel_size[2] - 1) * self.dilation[2]
        return (positions - 1) * self.stride[2] + taps + 1

    @property
    def in_rows(self) -> int:
        """Input rows under the tile."""
        taps = (self.kernel_size[1] - 1) * self.dilation[1]
        return (self.rows - 1) * self.stride[1] + taps + 1

    @property
    def row_slots(self) -> int:
        """Slots of an input row, whose last ones are stored two at a time."""
        last = (self.columns - self.window_positions) * self.stride[2]
        return round_up(last + self.window_slots - 2, 4) + 2

    @property
    def row_words(self) -> int:
        """Words from one input row to the next."""
        return self._pitches[0]

    @property
    def plane_words(self) -> int:
        """Words from one plane to the next."""
        return self._pitches[1]

    @cached_property
    def _pitches(self) -> tuple[int, int]:
        """Words from row to row and from plane to plane: a few more than needed, for the banks."""
        window_loads = -(-self.window_slots // 2) * (COLUMNS // self.window_positions)
        return fewest_turns(
            (
                (4, window_loads, _patterns(self._window_parts)),
                (2, COLUMNS, _patterns(self._tail_parts)),
            ),
            self.in_rows,
            self.row_slots,
            self.stride[1],
            self.dilation[1:],
        )

    @property
    def vector(self) -> int:
        """Values of x copied at once: 4 where its rows begin at multiples of 16 bytes."""
        return 4 if self.aligned and self.in_size[2] % 4 == 0 else 1

    @property
    def shift(self) -> int:
        """Columns staged to the left of the first one needed, so that copies are aligned."""
        return -self.padding[2] % self.vector

    @property
    def staged_columns(self) -> int:
        """Columns of the input that are staged: where tiles are parked, and memory is scarce, only
        those under outputs that exist.
        """
        if not self.parked:
            return round_up(self.row_slots, 4)
        taps = (self.kernel_size[2] - 1) * self.dilation[2]
        return round_up((self.out_row - 1) * self.stride[2] + taps + 1, 4)

    @property
    def staged_row(self) -> int:
        """Values from one staged input row to the next."""
        return self.staged_columns + (4 if self.shift else 0)  # load_row takes two quads

    @property
    def staged_planes(self) -> int:
        """Staged planes of fp32 input, one a source."""
        return min(self.planes * self.plane_sources, self.sources)

    # ---- the output tile ------------------------------------------------------------------

    @property
    def whole_rows(self) -> bool:
        """Whether the tile spans whole output rows, which are contiguous in memory then."""
        return self.out_size[2] <= self.columns

    @property
    def out_row(self) -> int:
        """Values from one staged output row to the next."""
        return min(self.out_size[2], self.columns)

    @property
    def store(self) -> int:
        """Values of the output stored at once."""
        _, height, width = self.out_size
        run = height * width if self.whole_rows else width
        return 4 if self.aligned and run % 4 == 0 else 1

    @property
    def bulk_store(self) -> bool:
        """Whether each channel of a tile is one aligned run, which the copy engine can write."""
        return self.bulk_copies and self.whole_rows and self.store == 4

    # ---- shared memory --------------------------------------------------------------------

    @property
    def words(self) -> int:
        """Words of the input tile."""
        return self.planes * self.plane_words * (2 if self.split else 1)

    @property
    def channel_stride(self) -> int:
        """Values from one staged output channel to the next."""
        return round_up(self.rows * self.out_row - 16, 32) + 16

    @property
    def output_values(self) -> int:
        """Values of a staged output tile."""
        return self.channels * self.channel_stride

    @property
    def sure_columns(self) -> int:
        """Positions along w that every warp has; a tile's last columns may lie outside."""
        beside = COLUMNS * (self.column_warps - 1)
        return max(0, self.out_size[2] - beside) if self.whole_rows else 0

    @property
    def staged_input_at(self) -> int:
        """Values before the region that stages the input: words; later, unless parked, output."""
        return round_up(self.words if self.parked else max(self.words, self.output_values), 4)

    @property
    def parked_at(self) -> int:
        """Values before the parked tiles."""
        staged_input = self.staged_planes * self.in_rows * self.staged_row
        return round_up(self.staged_input_at + staged_input, 4)

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 4 * (self.parked_at + self.parked * self.output_values)

    @property
    def static_bytes(self) -> int:
        """Shared memory of a block besides: moments, statistics, peaks, notes of tiles."""
        moments, note = 3 * CHANNELS * self.warps, 8
        if self.parked:
            notes = (3 * self.warps + 2) * note + 2 * self.warps
            return 4 * (moments + TEAMS * 3 * self.channels + notes + note)
        return 4 * (moments + 2 * self.channels + self.warps + 2 * note)

    # ---- the order of the products --------------------------------------------------------

    @property
    def _rows_left(self) -> tuple[int, int]:
        """(Plane, tap along h) pairs beyond the blocks of four planes: in windows, in the tail."""
        rows = self.planes % 4 * self.kernel_size[1]
        kernel_w = self.kernel_size[2]
        tail = rows % 4 if -(-(rows % 4) * kernel_w // 4) < kernel_w else 0
        return rows - tail, tail

    @property
    def windows(self) -> int:
        """Windows of a chunk."""
        return self.planes // 4 * self.kernel_size[1] + -(-self._rows_left[0] // 4)

    @property
    def tail_steps(self) -> int:
        """Tail steps of a chunk."""
        return -(-self._rows_left[1] * self.kernel_size[2] // 4)

    @property
    def steps(self) -> int:
        """Matrix instructions per position and chunk."""
        return self.windows * self.kernel_size[2] + self.tail_steps

    def _row(self, window: int, t: int) -> tuple[int, int] | None:
        """Plane and tap along h of lane `t` in a window, if there is one."""
        kernel_h, blocks = self.kernel_size[1], self.planes // 4
        if window < blocks * kernel_h:
            return 4 * (window // kernel_h) + t, window % kernel_h
        item = 4 * (window - blocks * kernel_h) + t
        plane, tap = 4 * blocks + item // kernel_h, item % kernel_h
        return (plane, tap) if item < self._rows_left[0] else None

    def _tail(self, step: int, t: int) -> tuple[int, int, int] | None:
        """Plane and taps along h and w of lane `t` in a tail step, if there are any."""
        kernel_h, kernel_w = self.kernel_size[1:]
        item = 4 * step + t
        row = self._rows_left[0] + item // kernel_w
        if item >= self._rows_left[1] * kernel_w:
            return None
        return self.planes // 4 * 4 + row // kernel_h, row % kernel_h, item % kernel_w

    @cached_property
    def _window_parts(self) -> np.ndarray:
        """(windows, 4, 3): plane and taps along h and w of each lane; the first tap along w.

        A part that does not exist meets zero weights, but must not bring a NaN of its own: it
        repeats the first, which costs no turn.
        """
        parts = [
            [(*(self._row(v, t) or self._row(v, 0) or (0, 0)), 0) for t in range(4)]
            for v in range(self.windows)
        ]
        return np.array(parts, np.int32).reshape(-1, 4, 3)

    @cached_property
    def _tail_parts(self) -> np.ndarray:
        """(tail_steps, 4, 3): the same for each tail step."""
        parts = [
            [self._tail(s, t) or self._tail(s, 0) for t in range(4)] for s in range(self.tail_steps)
        ]
        return np.array(parts, np.int32).reshape(-1, 4, 3)

    @property
    def window_offsets(self) -> np.ndarray:
        """(windows * 4,): words from a lane's row of x to its part of each window."""
        return self._offsets(self._window_parts)

    @property
    def tail_offsets(self) -> np.ndarray:
        """(tail_steps * 4,): the same for each tail step."""
        return self._offsets(self._tail_parts)

    def _offsets(self, parts: np.ndarray) -> np.ndarray:
        unit = self.plane_words, self.dilation[1] * self.row_words, 2 * self.dilation[2]
        return (parts @ np.array(unit, np.int32)).ravel() if len(parts) else np.zeros(1, np.int32)

    @cached_property
    def slots(self) -> np.ndarray:
        """(steps, 4): ``(plane * KH + tap along h) * KW + tap along w`` of lane `t`, or -1."""
        kernel_h, kernel_w = self.kernel_size[1:]
        slots = np.full((self.steps, 4), -1, np.int32)
        for window, t, w in np.ndindex(self.windows, 4, kernel_w):
            if (row := self._row(window, t)) is not None:
                slots[window * kernel_w + w, t] = (row[0] * kernel_h + row[1]) * kernel_w + w
        for step, t in np.ndindex(self.tail_steps, 4):
            if (part := self._tail(step, t)) is not None:
                slot = (part[0] * kernel_h + part[1]) * kernel_w + part[2]
                slots[self.windows * kernel_w + step, t] = slot
        return slots

    @property
    def parts(self) -> int:
        """Words of A per slot and half of it: the rounded weight, and what rounding left over."""
        return 2 if self.split else 1

    @cached_property
    def fragment_words(self) -> int:
        """Words of A for 16 output channels."""
        return self.chunks * self.parts * self.steps * WARP * 4

    @property
    def packed_tiles(self) -> int:
        """Sets of A: 16 output channels each, as many as the tiles of a position have."""
        return self.tiles[0] * self.channel_warps

    # ---- the moments ----------------------------------------------------------------------

    @property
    def record_channels(self) -> int:
        """Channels whose moments a tile pools: all of one group, and by at most a warp."""
        spatial_warps = self.row_warps * self.column_warps
        return math.gcd(self.group_channels, self.channels, WARP // spatial_warps)

    @property
    def records(self) -> int:
        """Records of moments of one tile position, over all channels."""
        return self.out_channels // self.record_channels

    # ---- scratch memory: packed weights, the factors that undo their scale, records ---------

    @cached_property
    def unscale_at(self) -> int:
        """Words of scratch before the factors."""
        return self.packed_tiles * self.fragment_words

    @cached_property
    def records_at(self) -> int:
        """Words of scratch before the records, one for each (n, record, tile position)."""
        return self.unscale_at + CHANNELS * self.packed_tiles

    @cached_property
    def sample_record_words(self) -> int:
        """Words of a sample's records."""
        return RECORD_WORDS * self.records * (self.tiles_per_sample // self.tiles[0])
