"""The gradient of x on tensor cores: a convolution of dz with the weights turned round.

For stride 1, with indices of the padded input,

    dx[c, d, h, w] = sum of weight[k, c, a, b, e] * dz[k, d - a, h - b, w - e]

over k and the taps (a, b, e). Few input channels would leave most of a matrix instruction's 16 rows
empty. So a row is not an input channel but a (channel, plane) pair: a plane of dz feeds as many
planes of dx as the kernel is deep, all of them by one instruction. A block walks along d with a
tile of one plane of dz, the next one on its way; with each plane one of dx is complete. It is
written, and its rows start anew as those of the next plane. Rows keep their places, so the weights
take turns: they are packed in ``kernel_d`` orders.

    A[(channel, plane mod kernel_d), 16 channels of dz]    B[16 channels of dz, 8 positions along w]

B is what lies in memory: a position's eight words are 16 channels, and a lane takes two of them.

A warp has up to eight patches of 8 columns, one below the other where there are rows: what
it loads of a row of dz serves three rows of taps, each for another row of dx.

Launch: a kernel that packs; then a block for each (sample, some planes, at most 512 positions).
Shapes: dz of a run of samples as in `chain_tiles`, dx (N, C, D, H, W).
Bytes:  dz once and what tiles share of it, dx once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

from numba import cuda, float32, int32, int64, uint32, uint64

from numba_fused.backward.chain_tiles import POSITION_WORDS
from numba_fused.device import ptx
from numba_fused.device.convolution import divide
from numba_fused.device.reductions import WARP
from numba_fused.device.tensor_tile import (
    INFINITY,
    four_words,
    multiply_halves,
    multiply_pairs,
    power_of_two,
    scale_exponent,
)
from numba_fused.device.tile_shape import (
    CHANNELS,
    PROCESSOR_SHARED_BYTES,
    SYSTEM_SHARED_BYTES,
    TileShape,
)

WARPS = 8
THREADS = WARPS * WARP
COLUMNS = 8  # of one matrix instruction
MOST_PATCHES = 8  # of so many columns of a row each, that a warp has
MOST_ROW_GROUPS = 2  # of 16 rows of A, whose sums of all patches a lane holds in 32 registers each
TAP_ROWS = 3  # whose A a lane holds at once: they share what it loads of dz
LANE_WORDS = 4 * WARP  # of A
LANE_POSITIONS = WARP // 2  # that a warp copies at once
RESIDENT_BLOCKS = 2 * 132  # of an H200
BLOCK_SHARED_BYTES = PROCESSOR_SHARED_BYTES // 2 - SYSTEM_SHARED_BYTES


@cache
def arrangement(shape: TileShape) -> tuple[int, int, int]:
    """Patches, rows of patches, warps along w: those with the least work for all tiles.

    Work is what a warp does for a column of taps: matrix instructions, loads, its share of the
    copies, and about ten other instructions. Two blocks should have room on an SM.
    """
    _, in_h, in_w = shape.in_size
    _, kernel_h, kernel_w = shape.kernel_size
    position_bytes = 2 * 4 * POSITION_WORDS * (2 if shape.split else 1)

    def work(candidate: tuple[int, int, int]) -> tuple[bool, float]:
        patches, patch_rows, column_warps = candidate
        rows = patch_rows * WARPS // column_warps
        columns = COLUMNS * patches // patch_rows * column_warps
        staged_rows, staged_columns = rows + kernel_h - 1, columns + kernel_w - 1
        loads = (patch_rows + kernel_h - 1) * patches // patch_rows
        copies = staged_rows * -(-staged_columns // LANE_POSITIONS) / WARPS
        tiles = -(-in_h // rows) * -(-in_w // columns)
        alone = staged_rows * staged_columns * position_bytes > BLOCK_SHARED_BYTES
        return alone, tiles * (patches * kernel_h + loads + copies + 10)

    sizes = (MOST_PATCHES, 4, 2, 1)
    return min([(p, r, c) for p, r, c in product(sizes, sizes, sizes) if r <= p], key=work)


@dataclass(frozen=True)
class InputTile:
    """Compile-time numbers of the kernel.

    Attributes
    ----------
    shape : TileShape
        Of the convolution, and of the tiles that wrote dz.
    planes : int
        Planes of dx that a block works on.
    """

    shape: TileShape
    planes: int

    @property
    def rows(self) -> int:
        """Rows of A that mean something."""
        return self.shape.in_channels * self.shape.kernel_size[0]

    @property
    def row_groups(self) -> int:
        """Sets of 16 rows of A."""
        return -(-self.rows // CHANNELS)

    @property
    def patches(self) -> int:
        """Patches of a warp: of 8 columns of a row each."""
        return arrangement(self.shape)[0]

    @property
    def patch_rows(self) -> int:
        """Rows of a warp's patches: many, for neighbouring rows share most rows of dz."""
        return arrangement(self.shape)[1]

    @property
    def column_warps(self) -> int:
        """Warps side by side along w."""
        return arrangement(self.shape)[2]

    @property
    def tile_rows(self) -> int:
        """Rows of dx that a block works on at once."""
        return self.patch_rows * WARPS // self.column_warps

    @property
    def warp_columns(self) -> int:
        """Columns of a warp's patches."""
        return COLUMNS * self.patches // self.patch_rows

    @property
    def tile_columns(self) -> int:
        """Columns of dx that a block works on."""
        return self.warp_columns * self.column_warps

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Blocks of a sample along (d, h, w)."""
        d, h, w = self.shape.in_size
        return -(-d // self.planes), -(-h // self.tile_rows), -(-w // self.tile_columns)

    @property
    def staged_rows(self) -> int:
        """Rows of dz under a tile."""
        return self.tile_rows + self.shape.kernel_size[1] - 1

    @property
    def staged_columns(self) -> int:
        """Columns of dz under a tile."""
        return self.tile_columns + self.shape.kernel_size[2] - 1

    @property
    def stage_words(self) -> int:
        """Words of the tile of one plane and 16 channels of dz."""
        positions = self.staged_rows * self.staged_columns
        return positions * POSITION_WORDS * (2 if self.shape.split else 1)

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: one tile is read while the next arrives."""
        return 2 * 4 * self.stage_words

    @property
    def packed_words(self) -> int:
        """Words of A, in all orders."""
        return math.prod(self.shape.kernel_size) * self._words_per_tap

    @property
    def _words_per_tap(self) -> int:
        parts = 2 if self.shape.split else 1
        return self.shape.packed_tiles * self.row_groups * parts * LANE_WORDS

    def blocks(self, samples: int) -> int:
        """Blocks for some samples."""
        return samples * math.prod(self.tiles)


def quickest_tile(shape: TileShape, samples: int) -> InputTile:
    """The tile whose blocks are done after the fewest planes, one after the other.

    Fewer planes a block make more blocks, which may or may not fit on the GPU at once, and more
    planes of dz that two blocks read.
    """

    def steps(tile: InputTile) -> int:
        rounds = -(-tile.blocks(samples) // RESIDENT_BLOCKS)
        return rounds * (tile.planes + shape.kernel_size[0] - 1)

    return min((InputTile(shape, planes) for planes in range(shape.in_size[0], 0, -1)), key=steps)


@cache
def pack_kernel(tile: InputTile) -> Any:
    """The kernel that packs the weights as A, one row a block."""
    shape = tile.shape
    in_channels, out_channels, split = shape.in_channels, shape.out_channels, shape.split
    kernel_d, kernel_h, kernel_w = shape.kernel_size
    kernel_volume = kernel_d * kernel_h * kernel_w
    channel_groups, row_groups, rows = shape.packed_tiles, tile.row_groups, tile.rows
    parts = 2 if split else 1

    @cuda.jit(device=True)
    def weight_at(weight, k, c, tap):
        """A weight, zero where there is none."""
        value = float32(0)
        if k < out_channels:
            value = weight[uint64((int64(k) * in_channels + c) * kernel_volume + tap)]
        return value

    @cuda.jit(launch_bounds=WARP)
    def pack_turned_weights(weight, packed, unscale):
        """Scale a row of A by a power of two, lay it out, and note what takes the scale back.

        Order, slowest first: (plane of dz mod kernel_d) (row of the tile) (column) (16 channels)
        (16 rows) (part) (lane) (4 words).
        """
        row, lane = int32(cuda.blockIdx.x), int32(ptx.lane_index())
        c, slot = int32(row % in_channels), int32(row // in_channels)
        peak = float32(0)
        i = lane
        while i < out_channels * kernel_volume and row < rows:
            k, tap = divide(i, kernel_volume)
            value = abs(weight_at(weight, k, c, tap))
            if value < INFINITY:
                peak = max(peak, value)
            i = int32(i + WARP)
        exponent = scale_exponent(ptx.warp_max(ptx.float_bits(peak)))
        scale = power_of_two(exponent)
        if lane == 0:
            unscale[row] = power_of_two(int32(254) - exponent)
        # Eight words for each tap and 16 channels: word 2 t + w lies with lane t of the row.
        item = lane
        while item < kernel_volume * channel_groups * POSITION_WORDS:
            rest, word = divide(item, POSITION_WORDS)
            rest, channel_group = divide(rest, channel_groups)
            rest, column = divide(rest, kernel_w)
            plane, tile_row = divide(rest, kernel_h)
            tap_d = int32(int32(slot - plane + kernel_d) % kernel_d)
            tap = int32(tap_d * kernel_h + kernel_h - 1 - tile_row)
            tap = int32(tap * kernel_w + kernel_w - 1 - column)
            high, low = uint32(0), uint32(0)
            if row < rows:
                k = int32(channel_group * CHANNELS + word)
                first = weight_at(weight, k, c, tap) * scale
                second = weight_at(weight, int32(k + 8), c, tap) * scale
                high, low = ptx.split_halves(first, second)
            row_group, of_group = divide(row, CHANNELS)
            set_of_a = int32(int32(item // POSITION_WORDS * row_groups + row_group) * parts)
            target_lane = int32(of_group % 8 * 4 + word // 2)
            at = int32(set_of_a * LANE_WORDS + 4 * target_lane + word % 2 * 2 + of_group // 8)
            packed[uint64(at)] = high
            if split:
                packed[uint64(at + LANE_WORDS)] = low
            item = int32(item + WARP)

    return pack_turned_weights


@cache
def input_gradient_kernel(tile: InputTile) -> Any:
    """The kernel that walks along d."""
    shape = tile.shape
    in_channels, split = shape.in_channels, shape.split
    in_d, in_h, in_w = shape.in_size
    out_d, out_h, out_w = shape.out_size
    out_plane = out_h * out_w
    kernel_d, kernel_h, kernel_w = shape.kernel_size
    padding_d, padding_h, padding_w = shape.padding
    channel_groups, row_groups = shape.packed_tiles, tile.row_groups
    planes, patch_rows, column_warps = tile.planes, tile.patch_rows, tile.column_warps
    tile_rows, warp_columns, tile_columns = tile.tile_rows, tile.warp_columns, tile.tile_columns
    patches = tile.patches
    row_patches = patches // patch_rows
    plane_tiles, row_tiles, column_tiles = tile.tiles
    staged_rows, staged_columns = tile.staged_rows, tile.staged_columns
    staged_positions, stage_words = staged_rows * staged_columns, tile.stage_words
    position_words = POSITION_WORDS * channel_groups
    rest_words = staged_positions * POSITION_WORDS
    parts = 2 if split else 1
    set_words = row_groups * parts * LANE_WORDS
    tap_words = channel_groups * set_words
    row_of_sets, group_sums = kernel_w * tap_words, 4 * patches
    tap_words_held = 4 * parts * TAP_ROWS
    accumulators = row_groups * group_sums
    all_exist = in_h % tile_rows == 0 and in_w % tile_columns == 0

    @cuda.jit(device=True)
    def stage(dz, words, target, sample, plane, channel_group, first_h, first_w):
        """Start copying a tile of a plane of dz, zeros where there is no output.

        A warp copies whole rows, two lanes a position.
        """
        row = int32(ptx.thread_index() // WARP)
        column, quad = divide(int32(ptx.lane_index()), 2)
        h = int32(first_h + padding_h - (kernel_h - 1) + row)
        w = int32(first_w + padding_w - (kernel_w - 1) + column)
        at = (int64(sample) * out_d + plane) * out_plane + int32(h * out_w + w)
        at = at * position_words + int32(channel_group * POSITION_WORDS + 4 * quad)
        to = int32(target + int32(row * staged_columns + column) * POSITION_WORDS + 4 * quad)
        while row < staged_rows:
            row_inside = uint32(h) < uint32(out_h)
            for first in range(0, staged_columns, LANE_POSITIONS):
                if first + LANE_POSITIONS <= staged_columns or first + column < staged_columns:
                    inside = row_inside and uint32(int32(w + first)) < uint32(out_w)
                    source = uint64(at + first * position_words)
                    ptx.copy_async_4(
                        words, uint64(int32(to + first * POSITION_WORDS)), dz, source, inside
                    )
            row, h = int32(row + WARPS), int32(h + WARPS)
            at += WARPS * out_w * position_words
            to = int32(to + WARPS * staged_columns * POSITION_WORDS)

    @cuda.jit(device=True)
    def warp_place():
        """The first row and column of this warp in the tile."""
        row_warp, column_warp = divide(int32(ptx.thread_index() // WARP), column_warps)
        return int32(row_warp * patch_rows), int32(column_warp * warp_columns)

    @cuda.jit(device=True)
    def no_rows(acc, first_sum, words, base, packed, at):
        """Below the last row of taps."""

    def rows_of_taps(first_tap: int) -> Any:
        """What all rows of taps from one on add, a few at a time."""
        taps = min(TAP_ROWS, kernel_h - first_tap)
        below = rows_of_taps(first_tap + taps) if first_tap + taps < kernel_h else no_rows

        @cuda.jit(device=True)
        def add_rows(acc, first_sum, words, base, packed, at):
            """Add them to the sums of all patches; a word of dz is loaded once for all taps."""
            a = cuda.local.array(tap_words_held, uint32)
            sums = cuda.local.array(group_sums, float32)  # see tile_shape.LONGEST_CHAIN
            cuda.syncwarp()  # or the compiler loads far ahead and registers run out
            for i in range(taps):
                for part in range(parts):
                    word = uint64(at + ((first_tap + i) * row_of_sets + part * LANE_WORDS))
                    first = 4 * (parts * i + part)
                    a[first], a[first + 1], a[first + 2], a[first + 3] = ptx.load_4(packed, word)
            if split:
                for i in range(group_sums):
                    sums[i] = float32(0)
            for row in range(patch_rows + taps - 1):
                for patch in range(row_patches):
                    of_row = (first_tap + row) * staged_columns + patch * COLUMNS
                    word = uint64(int32(base + of_row * POSITION_WORDS))
                    b = ptx.load_2(words, word)
                    b_rest = ptx.load_2(words, word + uint64(rest_words)) if split else b
                    for i in range(taps):
                        if 0 <= row - i < patch_rows:
                            to = 4 * ((row - i) * row_patches + patch)
                            if split:
                                of_tap, of_rest = four_words(a, 2 * i), four_words(a, 2 * i + 1)
                                multiply_pairs(sums, to, of_tap, of_rest, b, b_rest)
                            else:
                                multiply_halves(acc, first_sum + to, four_words(a, i), b)
            if split:
                for i in range(group_sums):
                    acc[first_sum + i] += sums[i]
            below(acc, first_sum, words, base, packed, at)

        return add_rows

    add_rows = rows_of_taps(0)

    @cuda.jit(device=True)
    def add_group(acc, group, words, base, packed, at):
        """What `add_plane` does, for 16 rows of A."""
        at += group * parts * LANE_WORDS
        for _ in range(kernel_w):
            add_rows(acc, group * group_sums, words, base, packed, at)
            at += tap_words
            base = int32(base + POSITION_WORDS)

    @cuda.jit(device=True)
    def add_plane(acc, words, target, packed, first_set):
        """Add what a staged tile of 16 channels brings to the planes of dx above it."""
        row, column = warp_place()
        position, pair = divide(int32(ptx.lane_index()), 4)
        base = int32(int32(row * staged_columns + column + position) * POSITION_WORDS + 2 * pair)
        base = int32(base + target)
        at = int64(first_set) * set_words + 4 * int32(ptx.lane_index())
        add_group(acc, 0, words, base, packed, at)
        if row_groups == MOST_ROW_GROUPS:
            add_group(acc, 1, words, base, packed, at)

    @cuda.jit(device=True)
    def write_pair(grad_x, at, low, high, rows, columns):
        """Write two neighbours where there are so many rows and columns left."""
        if in_w % 2 == 0:
            if all_exist or (rows > 0 and columns > 0):
                ptx.store_2(grad_x, at, low, high)
        else:
            if rows > 0 and columns > 0:
                grad_x[at] = low
            if rows > 0 and columns > 1:
                grad_x[at + uint64(1)] = high

    @cuda.jit(device=True)
    def finish_plane(acc, grad_x, unscale, factor, n, slot, plane, writes, h, w):
        """Write a complete plane of dx, whose rows are in a slot, and start its rows anew."""
        lane = int32(ptx.lane_index())
        w = int32(w + 2 * (lane % 4))
        for half in range(2 * row_groups):
            row = int32(lane // 4 + 8 * half)
            of_slot, c = divide(row, in_channels)
            first = half // 2 * group_sums + half % 2 * 2
            if of_slot == slot and writes:
                scale = factor * unscale[uint64(row)]
                index = (int64(n) * in_channels + c) * in_d + plane
                index = (index * in_h + h) * in_w + w
                for i in range(patches):
                    r, column = i // row_patches, i % row_patches * COLUMNS
                    low, high = acc[first + 4 * i] * scale, acc[first + 4 * i + 1] * scale
                    at = uint64(index + (r * in_w + column))
                    rows, columns = int32(in_h - h - r), int32(in_w - w - column)
                    write_pair(grad_x, at, low, high, rows, columns)
            for i in range(patches):
                for e in range(2):
                    value = acc[first + 4 * i + e]
                    acc[first + 4 * i + e] = float32(0) if of_slot == slot else value

    @cuda.jit(launch_bounds=(THREADS, 2))
    def input_gradient(dz, rest, packed, unscale, scales, grad_x, first_sample):
        """dx of some planes and a tile of rows and columns of a sample."""
        words = cuda.shared.array(0, uint32)
        acc = cuda.local.array(accumulators, float32)
        tile_of, column_tile = divide(int32(cuda.blockIdx.x), column_tiles)
        tile_of, row_tile = divide(tile_of, row_tiles)
        sample, plane_tile = divide(tile_of, plane_tiles)
        n = int32(first_sample + sample)
        first_h, first_w = int32(row_tile * tile_rows), int32(column_tile * tile_columns)
        warp_h, warp_w = warp_place()
        warp_h, warp_w = int32(warp_h + first_h), int32(warp_w + first_w)
        exists = warp_h < in_h and warp_w < in_w
        factor = power_of_two(int32(254) - scales[2 * n])
        for i in range(accumulators):
            acc[i] = float32(0)

        first_plane = int32(plane_tile * planes)
        end = min(int32(first_plane + planes), int32(in_d))
        # Planes of dz that reach the block's planes of dx, and 16 channels of each at a time.
        plane = int32(first_plane + padding_d - (kernel_d - 1))
        stop = int32(end + padding_d)
        group, buffer = int32(0), int32(0)
        if plane >= 0 and plane < out_d:
            stage(dz, words, 0, sample, plane, 0, first_h, first_w)
            if split:
                stage(rest, words, rest_words, sample, plane, 0, first_h, first_w)
        while plane < stop:
            ptx.wait_for_copies()
            cuda.syncthreads()
            next_group, next_plane = int32(group + 1), plane
            if next_group == channel_groups:
                next_group, next_plane = int32(0), int32(plane + 1)
            if next_plane < stop and next_plane >= 0 and next_plane < out_d:
                target = int32((1 - buffer) * stage_words)
                stage(dz, words, target, sample, next_plane, next_group, first_h, first_w)
                if split:
                    target = int32(target + rest_words)
                    stage(rest, words, target, sample, next_plane, next_group, first_h, first_w)
            _, slot = divide(int32(plane + kernel_d), kernel_d)
            if plane >= 0 and plane < out_d and exists:
                first_set = int32(slot * (kernel_h * kernel_w * channel_groups) + group)
                add_plane(acc, words, int32(buffer * stage_words), packed, first_set)
            if next_group == 0:
                complete = int32(plane - padding_d)
                writes = complete >= first_plane and exists
                finish_plane(
                    acc, grad_x, unscale, factor, n, slot, complete, writes, warp_h, warp_w
                )
            group, plane, buffer = next_group, next_plane, int32(1 - buffer)

    return input_gradient
