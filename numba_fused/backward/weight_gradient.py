"""The gradient of the weight on tensor cores: for each tap, the sum of dz times x under that tap.

As a matrix product with the *positions* of the output, the longest axis there is, summed over:

    dweight[channel, tap] += dz[channel, position] * x[position + tap]

A warp's 16 x 8 instruction takes 16 channels, 8 taps and 16 neighbouring positions of a row. The
sums of all taps stay in registers for as many positions as a block gets, so dz is read once and
nothing is written in between. dz lies in memory channels last (`chain_tiles`) and A wants it
positions last: ``ldmatrix`` transposes it on the way to registers. B wants two neighbouring x in a
word, from an even column on for taps at even places and from an odd one for others: the words of a
row are laid out twice. A block walks along d, so that of the planes of x under a tile all but one
are there already: they take turns in as many slots as the kernel is deep.

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
from numba_fused.device.tensor_tile import power_of_two
from numba_fused.device.tile_shape import CHANNELS, TileShape, round_up

WARPS = 8
THREADS = WARPS * WARP
ROWS = 8  # output rows of a tile
MOST_COLUMNS = 64
STEP = 16  # positions of one matrix instruction
TAPS = 8  # taps of one matrix instruction
MOST_INSTRUCTIONS = 12  # of a step: their sums are 4 registers each
TILES_PER_PART = 8  # at least, along d and h: adding up the warps' sums takes time, too
SUM_WARPS = 16
SUMS_SHAPE, TOTALS_SHAPE = (WARPS, 4 * WARP), (SUM_WARPS, WARP)


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
    def taps(self) -> int:
        """Weights of an output channel."""
        return self.shape.in_channels * math.prod(self.shape.kernel_size)

    @property
    def tap_groups(self) -> int:
        """How many blocks share the taps of the same positions."""
        return -(-self.taps // (TAPS * MOST_INSTRUCTIONS))

    @property
    def instructions(self) -> int:
        """Matrix instructions of a step: TAPS taps each."""
        return -(-self.taps // (TAPS * self.tap_groups))

    @property
    def channels(self) -> int:
        """Input channels that a group of taps may touch."""
        if self.tap_groups == 1:
            return self.shape.in_channels
        taps_of_channel = math.prod(self.shape.kernel_size)
        touched = (self.instructions * TAPS - 2) // taps_of_channel + 2
        return min(self.shape.in_channels, touched)

    @property
    def columns(self) -> int:
        """Output columns of a tile."""
        return min(round_up(self.shape.out_size[2], STEP), MOST_COLUMNS)

    @property
    def row_words(self) -> int:
        """Words of a staged row of x, two values each."""
        return self.columns // 2 + self.shape.kernel_size[2] // 2

    @property
    def in_rows(self) -> int:
        """Rows of x under a tile."""
        return ROWS + self.shape.kernel_size[1] - 1

    @property
    def slot_words(self) -> int:
        """Words of a staged plane of x: every row twice, from even and from odd columns on."""
        return self.channels * self.in_rows * 2 * self.row_words

    @property
    def x_words(self) -> int:
        """Words of the staged x: a plane for each tap along d."""
        return round_up(self.shape.kernel_size[0] * self.slot_words, 4)

    @property
    def dz_words(self) -> int:
        """Words of the staged dz."""
        return ROWS * self.columns * POSITION_WORDS

    @cached_property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return 4 * (self.x_words + self.dz_words) * (2 if self.shape.split else 1)

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
    kernel_plane, kernel_volume = kernel_h * kernel_w, math.prod(shape.kernel_size)
    padding_d, padding_h, padding_w = shape.padding
    taps, tap_groups, instructions = tile.taps, tile.tap_groups, tile.instructions
    channel_groups, parts = shape.packed_tiles, tile.parts
    position_words = POSITION_WORDS * channel_groups
    channels, slot_words, part_rows = tile.channels, tile.slot_words, ROWS * tile.row_tiles
    in_rows, columns, row_words = tile.in_rows, tile.columns, tile.row_words
    x_words, dz_words = tile.x_words, tile.dz_words
    dz_at, rest_at = x_words, x_words + dz_words
    low_words = x_words + 2 * dz_words  # x's second halves lie behind both sets of dz
    steps_per_row, accumulators = columns // STEP, 4 * instructions
    ring_words = kernel_d * slot_words

    @cuda.jit(device=True)
    def value_at(x, row, inside, w):
        """Value of x in a row, zero outside."""
        value = float32(0)
        if inside and uint32(w) < uint32(in_w):
            value = x[uint64(row + w)]
        return value

    @cuda.jit(device=True)
    def stage_x(x, words, sample, first_channel, place, scale):
        """Lay out a plane of x in halves, each row from its even and from its odd columns on.

        It is the last plane under the tile; those before it have been laid out already.
        """
        plane, first_h, first_w = place
        d = int32(plane + kernel_d - 1 - padding_d)
        slot = int32(int32(plane + kernel_d - 1) % kernel_d)
        item = int32(ptx.thread_index())
        while item < channels * in_rows * row_words:
            rest, i = divide(item, row_words)
            channel, row = divide(rest, in_rows)
            channel = int32(first_channel + channel)
            h, w = int32(first_h - padding_h + row), int32(first_w - padding_w + 2 * i)
            inside = uint32(d) < uint32(in_d) and uint32(h) < uint32(in_h)
            inside = inside and channel < in_channels
            first = sample + int32(int32(int32(channel * in_d + d) * in_h + h) * in_w)
            a = value_at(x, first, inside, w) * scale
            b = value_at(x, first, inside, int32(w + 1)) * scale
            c = value_at(x, first, inside, int32(w + 2)) * scale
            target = uint64(int32(slot * slot_words + rest * (2 * row_words) + i))
            if split:
                even, even_rest = ptx.split_halves(a, b)
                odd, odd_rest = ptx.split_halves(b, c)
                words[target + uint64(low_words)] = even_rest
                words[target + uint64(low_words + row_words)] = odd_rest
            else:
                even, odd = ptx.pack_halves(a, b), ptx.pack_halves(b, c)
            words[target], words[target + uint64(row_words)] = even, odd
            item = int32(item + THREADS)

    @cuda.jit(device=True)
    def swizzled(position, quad):
        """Where four words of a position lie, so that eight positions fill all banks."""
        return int32(position * POSITION_WORDS + 4 * (quad ^ (position // 4 % 2)))

    @cuda.jit(device=True)
    def stage_dz(dz, words, target, sample, channel_group, place):
        """Start copying the tile of dz, zeros where there is no output."""
        plane, first_h, first_w = place
        first = (int64(sample) * out_d + plane) * (out_h * out_w)
        item = int32(ptx.thread_index())
        while item < ROWS * columns * 2:
            position, quad = int32(item // 2), int32(item % 2)
            h, w = int32(first_h + position // columns), int32(first_w + position % columns)
            inside = h < out_h and w < out_w
            at = int64(0)
            if inside:
                at = (first + int32(h * out_w + w)) * position_words
                at += int32(channel_group * POSITION_WORDS + 4 * quad)
            to = uint64(int32(target + swizzled(position, quad)))
            ptx.copy_async_4(words, to, dz, uint64(at), inside)
            item = int32(item + THREADS)

    @cuda.jit(device=True)
    def tap_offset(first_tap, i):
        """Words from the first staged row to that under this lane's tap of instruction i.

        Over the output's plane 0, where slots and taps along d agree.
        """
        tap = min(int32(first_tap + TAPS * i + int32(ptx.lane_index()) // 4), int32(taps - 1))
        channel, of_channel = divide(tap, kernel_volume)
        slot, of_plane = divide(of_channel, kernel_plane)
        row, column = divide(of_plane, kernel_w)
        channel = int32(channel - first_tap // kernel_volume)
        words = int32(int32(int32(channel * in_rows + row) * 2 + column % 2) * row_words)
        return int32(slot * slot_words + words + column // 2)

    @cuda.jit(device=True)
    def multiply(acc, i, a, b0, b1):
        """One matrix instruction into the sums of eight taps."""
        c0, c1, c2, c3 = acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]
        c0, c1, c2, c3 = ptx.mma_half(a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3)
        acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3] = c0, c1, c2, c3

    @cuda.jit(device=True)
    def add_tile(acc, words, offsets, rows):
        """Add the products of a staged tile; the 16 positions of a step are a warp's."""
        lane = int32(ptx.lane_index())
        step = int32(ptx.thread_index() // WARP)
        while step < min(rows, int32(ROWS)) * steps_per_row:
            row, run = int32(step // steps_per_row), int32(step % steps_per_row)
            # Matrices 0 to 3: positions 0-7 and 8-15 in pairs of channels 0-3 and 4-7.
            matrix = int32(lane // 8)
            position = int32(step * STEP + matrix // 2 * 8 + lane % 8)
            at = swizzled(position, int32(matrix % 2))
            a = ptx.load_matrices(words, uint64(int32(dz_at + at)))
            base = int32(row * (2 * row_words) + run * (STEP // 2) + lane % 4)
            if split:
                rest = ptx.load_matrices(words, uint64(int32(rest_at + at)))
                for i in range(instructions):
                    b = uint64(int32(base + offsets[i]))
                    b0, b1 = words[b], words[b + uint64(4)]
                    multiply(acc, i, rest, b0, b1)
                    low = b + uint64(low_words)
                    multiply(acc, i, a, words[low], words[low + uint64(4)])
                    multiply(acc, i, a, b0, b1)
            else:
                for i in range(instructions):
                    b = uint64(int32(base + offsets[i]))
                    multiply(acc, i, a, words[b], words[b + uint64(4)])
            step = int32(step + WARPS)

    @cuda.jit(launch_bounds=(THREADS, 2))
    def weight_gradient(x, dz, rest, scales, partial, first_sample):
        """Sums of one part of a sample, 16 channels and a group of taps."""
        words = cuda.shared.array(0, uint32)
        sums = cuda.shared.array(SUMS_SHAPE, float32)
        acc = cuda.local.array(accumulators, float32)
        offsets = cuda.local.array(instructions, int32)
        part, tap_group = divide(int32(cuda.blockIdx.x), tap_groups)
        part, channel_group = divide(part, channel_groups)
        sample, part_of_sample = divide(part, parts)
        n = int32(first_sample + sample)
        x_sample = int64(n) * (in_channels * in_d * in_h * in_w)
        first_tap = int32(tap_group * (TAPS * instructions))
        first_channel = int32(first_tap // kernel_volume)
        scale = power_of_two(scales[2 * n + 1])
        for i in range(accumulators):
            acc[i] = float32(0)
        h = int32(part_of_sample * part_rows)
        stop = min(int32(h + part_rows), int32(out_h))
        while h < stop:
            for w in range(0, out_w, columns):
                for i in range(instructions):
                    offsets[i] = tap_offset(first_tap, i)
                cuda.syncthreads()  # the tile before has been read
                for before in range(1 - kernel_d, 0):
                    place = int32(before), h, int32(w)
                    stage_x(x, words, x_sample, first_channel, place, scale)
                plane = int32(0)
                while plane < out_d:
                    place = plane, h, int32(w)
                    stage_dz(dz, words, dz_at, sample, channel_group, place)
                    if split:
                        stage_dz(rest, words, rest_at, sample, channel_group, place)
                    stage_x(x, words, x_sample, first_channel, place, scale)
                    ptx.wait_for_copies()
                    cuda.syncthreads()
                    add_tile(acc, words, offsets, int32(out_h - h))
                    for i in range(instructions):  # its plane of x is in the next slot
                        offsets[i] = int32(offsets[i] + slot_words)
                        if offsets[i] >= ring_words:
                            offsets[i] = int32(offsets[i] - ring_words)
                    plane = int32(plane + 1)
                    cuda.syncthreads()
            h = int32(h + ROWS)

        lane, warp = int32(ptx.lane_index()), int32(ptx.thread_index() // WARP)
        for i in range(instructions):
            for q in range(4):
                sums[warp, WARP * q + lane] = acc[4 * i + q]
            cuda.syncthreads()
            if ptx.thread_index() < 4 * WARP:  # a warp a register of the accumulators
                total = float32(0)
                for other in range(WARPS):
                    total += sums[other, ptx.thread_index()]
                # Rows of A are the halves of a position in order: channels 0, 8, 1, 9 ...
                row = int32(lane // 4 + warp // 2 * 8)
                k = int32(channel_group * CHANNELS + row // 2 + row % 2 * 8)
                tap = int32(first_tap + TAPS * i + 2 * (lane % 4) + warp % 2)
                if k < out_channels and tap < taps:
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
