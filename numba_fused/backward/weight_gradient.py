"""The gradient of the weight on tensor cores: for each tap, the sum of dz times x under that tap.

As a matrix product with the *positions* of the output, the longest axis there is, summed over:

    dweight[channel, tap] += dz[channel, position] * x[position + tap]

A warp's 16 x 8 instruction takes 16 channels, 8 taps of a row and 16 neighbouring positions. The
sums of all taps stay in registers for as many positions as a block gets, so dz is read once and
nothing is written in between. dz lies in memory channels last (`chain_tiles`) and A wants it
positions last: ``ldmatrix`` transposes it on the way to registers. B wants two neighbouring x in a
word, from an even column on for taps at even places and from an odd one for others: the words of a
row are laid out twice, and where planes and channels begin is chosen for the banks of the lanes'
eight taps. A warp holds A of some rows, one below the other: what it loads of a row of x serves
every row of taps, each with another row of dz.

A block walks along d, so that of the planes of x under a tile all but one are there already: they
take turns in as many slots as the kernel is deep. While a tile is multiplied, the next one is on
its way: the raw plane of x to a region of its own, to be laid out when it has arrived, and dz to
where it will be read. A row's 16 positions of dz belong to one warp, which has copied them and
alone reads them: once they are in registers the next tile's may take their place.

Launch: a block for each (rows of a sample, 16 channels, group of taps); each leaves its sums, which
        a second kernel adds up in a fixed order and rids of their scales.
Shapes: x (N, C, D, H, W), dz of a run of samples, partial (parts, K, taps), dweight flat.
Bytes:  dz and x once for each group of taps, of which narrow convolutions have one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from numba import cuda, float32, float64, int32, int64, uint32, uint64

from numba_fused.backward.chain_tiles import POSITION_WORDS
from numba_fused.device import ptx
from numba_fused.device.convolution import divide
from numba_fused.device.reductions import WARP
from numba_fused.device.tensor_tile import four_words, multiply_halves, multiply_pairs, power_of_two
from numba_fused.device.tile_shape import CHANNELS, TileShape, round_up

WARPS = 8
THREADS = WARPS * WARP
ROWS = 8  # output rows of a tile
MOST_COLUMNS = 64
STEP = 16  # positions of one matrix instruction
TAPS = 8  # taps of one matrix instruction
MOST_INSTRUCTIONS = 12  # of a step, for all rows of taps: their sums are 4 registers each
TILES_PER_PART = 8  # at least, along d and h: adding up the warps' sums takes time, too
SUM_WARPS = 16
# Where the words of odd columns, the next channel and the next plane begin, as banks beyond the
# start of a row. The eight taps of an instruction want four words each: of all places these were
# found to let common kernels have them in fewest turns, 1 to 2 (1.5 for three channels, 3 x 3 x 3).
BANKS, TAP_WORDS = 32, 4
ODD_BANK, CHANNEL_BANK, SLOT_BANK = 6, 22, 22
SUM_WORDS = WARPS * 4 * WARP  # of one matrix instruction, of all warps
TOTALS_SHAPE = (SUM_WARPS, WARP)


def up_to_bank(words: int, bank: int) -> int:
    """The next number of words that ends on a bank."""
    return round_up(words - bank, BANKS) + bank


@dataclass(frozen=True)
class WeightTile:
    """Compile-time numbers of the kernel.

    Attributes
    ----------
    shape : TileShape
        Of the convolution, and of the tiles that wrote dz.
    """

    shape: TileShape

    @property
    def row_taps(self) -> int:
        """Taps of an output channel that lie in the same row."""
        return self.shape.in_channels * self.shape.kernel_size[0] * self.shape.kernel_size[2]

    @property
    def row_groups(self) -> int:
        """How many blocks share the rows of taps of the same positions."""
        return -(-self.shape.kernel_size[1] // MOST_INSTRUCTIONS)

    @property
    def tap_rows(self) -> int:
        """Rows of taps of a block."""
        return -(-self.shape.kernel_size[1] // self.row_groups)

    @property
    def column_groups(self) -> int:
        """How many blocks share the taps of a row."""
        return -(-self.row_taps // (TAPS * (MOST_INSTRUCTIONS // self.tap_rows)))

    @property
    def fragments(self) -> int:
        """Matrix instructions of a step and row of taps: TAPS taps each."""
        return -(-self.row_taps // (TAPS * self.column_groups))

    @property
    def tap_groups(self) -> int:
        """How many blocks share the taps of the same positions."""
        return self.row_groups * self.column_groups

    @property
    def channels(self) -> int:
        """Input channels that a group of taps may touch."""
        if self.column_groups == 1:
            return self.shape.in_channels
        taps_of_channel = self.shape.kernel_size[0] * self.shape.kernel_size[2]
        touched = (self.fragments * TAPS - 2) // taps_of_channel + 2
        return min(self.shape.in_channels, touched)

    @property
    def columns(self) -> int:
        """Output columns of a tile: of as many warps as share a row."""
        steps = -(-min(self.shape.out_size[2], MOST_COLUMNS) // STEP)
        return STEP * 2 ** (steps - 1).bit_length()

    @property
    def in_rows(self) -> int:
        """Rows of x under a tile."""
        return ROWS + self.tap_rows - 1

    @property
    def staged_rows(self) -> int:
        """Staged rows of a plane of x, of all channels."""
        return self.channels * self.in_rows

    @property
    def staged_row(self) -> int:
        """Values of a staged row of x: whole copies, from an aligned column on."""
        needed = self.shape.shift + self.columns + self.shape.kernel_size[2] - 1
        return round_up(needed, 4)

    @property
    def staged_values(self) -> int:
        """Values of the staged plane of x."""
        return self.staged_rows * self.staged_row

    @property
    def has_odd(self) -> bool:
        """Whether any tap needs the words from odd columns on."""
        return self.shape.kernel_size[2] > 1 or self.shape.shift % 2 == 1

    @property
    def odd_words(self) -> int:
        """Words from those of a row's even columns to those of its odd ones."""
        return up_to_bank(self.staged_row // 2, ODD_BANK)

    @property
    def row_words(self) -> int:
        """Words from one row of x to the next: each is there from even and from odd columns on."""
        return self.staged_row // 2 + (self.odd_words if self.has_odd else 0)

    @property
    def channel_words(self) -> int:
        """Words from one channel of x to the next; where there are several planes, any will do."""
        words = self.in_rows * self.row_words
        if self.shape.kernel_size[0] > 1:
            return words
        return up_to_bank(words, CHANNEL_BANK if self.has_odd else TAP_WORDS)

    @property
    def slot_words(self) -> int:
        """Words from one plane of x to the next."""
        return up_to_bank(self.channels * self.channel_words, SLOT_BANK)

    @property
    def x_words(self) -> int:
        """Words of x under a tile: a plane for each tap along d."""
        return round_up(self.shape.kernel_size[0] * self.slot_words, 4)

    @property
    def dz_words(self) -> int:
        """Words of the staged dz."""
        return ROWS * self.columns * POSITION_WORDS

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        words = (self.x_words + self.dz_words) * (2 if self.shape.split else 1)
        return 4 * max(words + self.staged_values, SUM_WORDS)

    @property
    def row_tiles(self) -> int:
        """Tiles along h of a block."""
        return -(-TILES_PER_PART // self.shape.out_size[0])

    @property
    def parts(self) -> int:
        """Blocks that share the rows of a sample."""
        return -(-self.shape.out_size[1] // (ROWS * self.row_tiles))

    def blocks(self, samples: int) -> int:
        """Blocks for some samples."""
        return samples * self.parts * self.shape.packed_tiles * self.tap_groups


@cache
def weight_gradient_kernel(tile: WeightTile) -> Any:
    """The kernel that leaves each block's sums."""
    shape = tile.shape
    in_channels, out_channels, split = shape.in_channels, shape.out_channels, shape.split
    in_d, in_h, in_w = shape.in_size
    out_d, out_h, out_w = shape.out_size
    kernel_d, kernel_h, kernel_w = shape.kernel_size
    channel_taps, taps = kernel_d * kernel_w, in_channels * math.prod(shape.kernel_size)
    padding_d, padding_h, padding_w = shape.padding
    row_taps, tap_rows, fragments = tile.row_taps, tile.tap_rows, tile.fragments
    tap_groups, column_groups = tile.tap_groups, tile.column_groups
    channel_groups, parts = shape.packed_tiles, tile.parts
    position_words = POSITION_WORDS * channel_groups
    part_rows = ROWS * tile.row_tiles
    in_rows, columns, odd_words = tile.in_rows, tile.columns, tile.odd_words
    row_words, channel_words, slot_words = tile.row_words, tile.channel_words, tile.slot_words
    x_words, dz_words = tile.x_words, tile.dz_words
    dz_at, first_plane = x_words, int32(1 - kernel_d)
    low_words = x_words + 2 * dz_words  # x's second halves lie behind both sets of dz
    staged_at = 2 * (x_words + dz_words) if split else x_words + dz_words
    has_odd, vector, shift = tile.has_odd, shape.vector, shape.shift
    staged_rows, staged_values = tile.staged_rows, tile.staged_values
    row_vectors, row_quads = tile.staged_row // vector, tile.staged_row // 4
    row_warps, dz_row = columns // STEP, columns * POSITION_WORDS
    warp_rows, instructions = ROWS * row_warps // WARPS, tap_rows * fragments
    ring_words, parts_of_dz = kernel_d * slot_words, 2 if split else 1
    accumulators, dz_registers = 4 * instructions, 4 * warp_rows * parts_of_dz

    @cuda.jit(device=True)
    def first_of_rows(row_items):
        """A thread's first row of those that a block goes through, and its item in each.

        A block takes as many whole rows of `row_items` at once as it has threads for.
        """
        row, i = divide(int32(ptx.thread_index()), row_items)
        return (row if row < THREADS // row_items else int32(staged_rows)), i

    @cuda.jit(device=True)
    def stage_x(x, staged, sample, first_channel, first_tap_row, place):
        """Start copying the last plane of x under a tile, zeros where there is none.

        Those before it have been laid out already.
        """
        plane, first_h, first_w = place
        first_h = int32(first_h + first_tap_row - padding_h)
        d = int32(plane + kernel_d - 1 - padding_d)
        row, i = first_of_rows(row_vectors)
        w = int32(first_w - padding_w - shift + i * vector)
        inside_row = uint32(w) < uint32(in_w) and uint32(d) < uint32(in_d)
        while row < staged_rows:
            channel, of_channel = divide(row, in_rows)
            channel, h = int32(first_channel + channel), int32(first_h + of_channel)
            inside = inside_row and uint32(h) < uint32(in_h) and channel < in_channels
            index = sample
            if inside:
                index += int32(int32(int32(channel * in_d + d) * in_h + h) * in_w + w)
            target = uint64(int32(staged_at + int32(row * row_vectors + i) * vector))
            if vector == 4:
                ptx.copy_async_4(staged, target, x, uint64(index), inside)
            else:
                ptx.copy_async_1(staged, target, x, uint64(index), inside)
            row = int32(row + THREADS // row_vectors)

    @cuda.jit(device=True)
    def lay_out(words, at, values):
        """Two words of halves, and what rounding left over."""
        a, b, c, d = values
        if split:
            first, first_rest = ptx.split_halves(a, b)
            second, second_rest = ptx.split_halves(c, d)
            ptx.store_2(words, uint64(int32(at + low_words)), first_rest, second_rest)
        else:
            first, second = ptx.pack_halves(a, b), ptx.pack_halves(c, d)
        ptx.store_2(words, uint64(at), first, second)

    @cuda.jit(device=True)
    def lay_out_x(words, staged, slot, scale):
        """Lay out the staged plane of x in halves, each row from even and from odd columns on."""
        row, i = first_of_rows(row_quads)
        while row < staged_rows:
            channel, of_channel = divide(row, in_rows)
            at = int32(slot * slot_words + channel * channel_words)
            at = int32(at + of_channel * row_words + 2 * i)
            quad = int32(row * row_quads + i)
            a, b, c, d = ptx.load_4(staged, uint64(int32(staged_at + 4 * quad)))
            a, b, c, d = a * scale, b * scale, c * scale, d * scale
            lay_out(words, at, (a, b, c, d))
            if has_odd:
                # Beyond the last column is a value of another row, in a word that no tap reads.
                beyond = min(int32(4 * quad + 4), int32(staged_values - 1))
                e = staged[uint64(int32(staged_at + beyond))] * scale
                lay_out(words, int32(at + odd_words), (b, c, d, e))
            row = int32(row + THREADS // row_quads)

    @cuda.jit(device=True)
    def swizzled(position, quad):
        """Where four words of a position lie, so that eight positions fill all banks."""
        _, odd = divide(divide(position, 4)[0], 2)
        return int32(position * POSITION_WORDS + 4 * (quad ^ odd))

    @cuda.jit(device=True)
    def warp_place():
        """The warp's first row of a tile, which its others follow, and its 16 columns."""
        rows, run = divide(divide(int32(ptx.thread_index()), WARP)[0], row_warps)
        return int32(rows * warp_rows), run

    @cuda.jit(device=True)
    def stage_dz(dz, rest, words, sample, channel_group, place):
        """Start copying a warp's share of a tile of dz, zeros where there is no output."""
        plane, first_h, first_w = place
        row, run = warp_place()
        position, quad = divide(int32(ptx.lane_index()), 2)  # 16 bytes a lane
        h, w = int32(first_h + row), int32(first_w + run * STEP + position)
        at = ((int64(sample) * out_d + plane) * out_h + h) * out_w + w
        at = at * position_words + int32(channel_group * POSITION_WORDS + 4 * quad)
        to = int32(dz_at + swizzled(int32(row * columns + run * STEP + position), quad))
        for i in range(warp_rows):
            inside = h + i < out_h and w < out_w
            source = uint64(at + i * (out_w * position_words))
            ptx.copy_async_4(words, uint64(int32(to + i * dz_row)), dz, source, inside)
            if split:
                target = uint64(int32(to + i * dz_row + dz_words))
                ptx.copy_async_4(words, target, rest, source, inside)

    @cuda.jit(device=True)
    def load_dz(a, words):
        """A of the warp's rows: what is rounded, then what is left over."""
        row, run = warp_place()
        # Matrices 0 to 3: positions 0-7 and 8-15 in pairs of channels 0-3 and 4-7.
        matrix, of_matrix = divide(int32(ptx.lane_index()), 8)
        half, quad = divide(matrix, 2)
        position = int32(row * columns + run * STEP + half * 8 + of_matrix)
        at = int32(dz_at + swizzled(position, quad))
        for i in range(warp_rows):
            for part in range(parts_of_dz):
                of_row = uint64(int32(at + i * dz_row + part * dz_words))
                to = 4 * (parts_of_dz * i + part)
                a[to], a[to + 1], a[to + 2], a[to + 3] = ptx.load_matrices(words, of_row)

    @cuda.jit(device=True)
    def split_tap(tap):
        """Channel, and taps along d and w, of one of the taps in a row."""
        channel, of_channel = divide(tap, channel_taps)
        plane, column = divide(of_channel, kernel_w)
        return channel, plane, column

    @cuda.jit(device=True)
    def tap_offset(first_tap, i):
        """Where x under this lane's tap of fragment i lies, for the warp's first positions.

        When the block's first plane of x is the last one under a tile, in slot 0.
        """
        row, run = warp_place()
        lane_tap, position = divide(int32(ptx.lane_index()), 4)
        tap = min(int32(first_tap + TAPS * i + lane_tap), int32(row_taps - 1))
        channel, plane, column = split_tap(tap)
        slot = int32(plane + 1) if plane + 1 < kernel_d else int32(0)
        channel = int32(channel - divide(first_tap, channel_taps)[0])
        pair, odd = divide(int32(column + shift), 2)
        words = int32(slot * slot_words + channel * channel_words + row * row_words)
        return int32(words + odd * odd_words + pair + run * (STEP // 2) + position)

    @cuda.jit(device=True)
    def no_rows(acc, a, words, offsets, rows):
        """Below the last row of x."""

    def rows_of_x(row: int) -> Any:
        """What all rows of x from one on add to the sums."""
        below = rows_of_x(row + 1) if row + 1 < warp_rows + tap_rows - 1 else no_rows

        @cuda.jit(device=True)
        def add_rows(acc, a, words, offsets, rows):
            """Add what a row brings to its rows of taps, if one of the `rows` of dz needs it."""
            if row < rows + tap_rows - 1:
                for i in range(fragments):
                    word = uint64(int32(offsets[i] + row * row_words))
                    b = words[word], words[word + uint64(4)]
                    low = word + uint64(low_words)
                    b_rest = (words[low], words[low + uint64(4)]) if split else b
                    for tap_row in range(tap_rows):
                        of_dz = row - tap_row
                        if 0 <= of_dz < warp_rows:
                            multiply(acc, 4 * (tap_row * fragments + i), a, of_dz, b, b_rest)
                below(acc, a, words, offsets, rows)

        return add_rows

    @cuda.jit(device=True)
    def multiply(acc, to, a, row, b, b_rest):
        """Add the products of 16 positions."""
        if split:
            # Sums of their own: see `tile_shape.LONGEST_CHAIN`.
            sums = cuda.local.array(4, float32)
            for q in range(4):
                sums[q] = float32(0)
            of_row, of_rest = four_words(a, 2 * row), four_words(a, 2 * row + 1)
            multiply_pairs(sums, 0, of_row, of_rest, b, b_rest)
            for q in range(4):
                acc[to + q] += sums[q]
        else:
            multiply_halves(acc, to, four_words(a, row), b)

    add_rows = rows_of_x(0)

    @cuda.jit(device=True)
    def add_tile(acc, words, offsets, dz, rest, sample, channel_group, rows, next_place, continues):
        """Add the products of a tile, and where it `continues` start copying the next one's dz."""
        a = cuda.local.array(dz_registers, uint32)
        load_dz(a, words)
        cuda.syncwarp()  # all lanes' rows have been read
        if continues:
            stage_dz(dz, rest, words, sample, channel_group, next_place)
        first_row, _ = warp_place()
        if first_row < rows:
            add_rows(acc, a, words, offsets, int32(rows - first_row))

    @cuda.jit(device=True)
    def following(place):
        """The place after one: along d, then along w, then along h."""
        plane, h, w = place
        plane = int32(plane + 1)
        if plane == out_d:
            plane, w = first_plane, int32(w + columns)
            if w >= out_w:
                h, w = int32(h + ROWS), int32(0)
        return plane, h, w

    @cuda.jit(launch_bounds=(THREADS, 2))
    def weight_gradient(x, dz, rest, scales, partial, first_sample):
        """Sums of one part of a sample, 16 channels and a group of taps."""
        words, staged = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        acc = cuda.local.array(accumulators, float32)
        offsets = cuda.local.array(fragments, int32)
        part, tap_group = divide(int32(cuda.blockIdx.x), tap_groups)
        part, channel_group = divide(part, channel_groups)
        sample, part_of_sample = divide(part, parts)
        n = int32(first_sample + sample)
        x_sample = int64(n) * (in_channels * in_d * in_h * in_w)
        row_group, column_group = divide(tap_group, column_groups)
        first_tap = int32(column_group * (TAPS * fragments))
        first_tap_row = int32(row_group * tap_rows)
        first_channel = int32(first_tap // channel_taps)
        scale = power_of_two(scales[2 * n + 1])
        for i in range(accumulators):
            acc[i] = float32(0)
        for i in range(fragments):
            offsets[i] = tap_offset(first_tap, i)

        h = int32(part_of_sample * part_rows)
        stop = min(int32(h + part_rows), int32(out_h))
        place = first_plane, h, int32(0)
        stage_x(x, staged, x_sample, first_channel, first_tap_row, place)
        if kernel_d == 1:
            stage_dz(dz, rest, words, sample, channel_group, place)
        slot = int32(0)
        while place[1] < stop:
            ptx.wait_for_copies()
            cuda.syncthreads()  # the tile has arrived, and the one before has been read
            lay_out_x(words, staged, slot, scale)
            cuda.syncthreads()
            next_place = following(place)
            exists = next_place[1] < stop
            if exists:
                stage_x(x, staged, x_sample, first_channel, first_tap_row, next_place)
            continues = exists and next_place[0] >= 0
            if place[0] >= 0:
                rows = min(int32(out_h - place[1]), int32(ROWS))
                add_tile(
                    acc,
                    words,
                    offsets,
                    dz,
                    rest,
                    sample,
                    channel_group,
                    rows,
                    next_place,
                    continues,
                )
            elif continues:
                stage_dz(dz, rest, words, sample, channel_group, next_place)
            slot = int32(slot + 1) if slot + 1 < kernel_d else int32(0)
            for i in range(fragments):  # each plane of x is in the next slot
                # Unsigned, a number below zero is larger than any other.
                offset = uint32(offsets[i] + slot_words)
                offsets[i] = int32(min(offset, uint32(offset - ring_words)))
            place = next_place

        lane, warp = int32(ptx.lane_index()), int32(ptx.thread_index() // WARP)
        cuda.syncthreads()  # the last tile has been read: the sums take its place
        for i in range(instructions):
            for q in range(4):
                staged[uint64(int32(int32(4 * warp + q) * WARP + lane))] = acc[4 * i + q]
            cuda.syncthreads()
            if ptx.thread_index() < 4 * WARP:  # a warp a register of the accumulators
                total = float32(0)
                for other in range(WARPS):
                    total += staged[uint64(ptx.thread_index() + 4 * WARP * other)]
                # Rows of A are the halves of a position in order: channels 0, 8, 1, 9 ...
                row = int32(lane // 4 + warp // 2 * 8)
                k = int32(channel_group * CHANNELS + row // 2 + row % 2 * 8)
                tap_row = int32(first_tap_row + i // fragments)
                tap = int32(first_tap + i % fragments * TAPS + 2 * (lane % 4) + warp % 2)
                if k < out_channels and tap < row_taps and tap_row < kernel_h:
                    channel, plane, column = split_tap(tap)
                    of_channel = int32(int32(plane * kernel_h + tap_row) * kernel_w + column)
                    tap = int32(channel * (channel_taps * kernel_h) + of_channel)
                    at = int64(part) + int64(first_sample) * parts
                    partial[uint64((at * out_channels + k) * taps + tap)] = total
            cuda.syncthreads()

    return weight_gradient


@cache
def weight_sum_kernel(parts: int, size: int) -> Any:
    """The kernel that adds up the sums of the parts of all samples, for `size` weights."""

    @cuda.jit(launch_bounds=(SUM_WARPS * WARP, 1))
    def weight_sum(partial, scales, batch, grad_weight):
        """32 weights a block; its warps take turns with the samples."""
        sums = cuda.shared.array(TOTALS_SHAPE, float64)
        lane, warp = int32(ptx.lane_index()), int32(ptx.thread_index() // WARP)
        i = int32(cuda.blockIdx.x * WARP + lane)
        total = float64(0)
        n = warp
        while n < batch and i < size:
            of_sample = float64(0)
            for part in range(parts):
                of_sample += partial[uint64((int64(n) * parts + part) * size + i)]
            unscale = power_of_two(int32(254) - scales[2 * n])
            total += of_sample * unscale * power_of_two(int32(254) - scales[2 * n + 1])
            n = int32(n + SUM_WARPS)
        sums[warp, lane] = total
        cuda.syncthreads()
        if warp == 0 and i < size:
            total = float64(0)
            for other in range(SUM_WARPS):
                total += sums[other, lane]
            grad_weight[uint64(i)] = total

    return weight_sum
