"""Convolution by tiles: the input in shared memory, the outputs in registers.

A block computes a *tile*: some output channels of a box of output positions. It stages the input
that the box looks at and the taps of its channels in shared memory, a chunk of input channels at
a time. Each thread computes a *patch* of the tile, `channels` x `rows` x `columns` values held in
registers, so that a word fetched from shared memory feeds many multiply-adds:

    one tap of one input channel     rows * columns words of x and `channels` taps are fetched,
                                     channels * rows * columns products are added
    the tap one row further down     finds rows - 1 of its x already in registers

Lanes of a warp lie side by side along w: their loads and stores are coalesced, and the 16 lanes
of a run share its dropout stream, so each draws a few of the patch's streams for all of them.

What the compiler must know - patch, layout, extents - is in a `Tiling`; `tile_functions` builds
the device functions of one. Everything else is an argument: see `device.convolution` for
`geometry`; `place` is (n, first_k, channel_count, d, h, w) of the tile's first value, where
`channel_count` is how many of the tile's channels exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int32, int64, uint32, uint64

from numba_fused.device.convolution import divide
from numba_fused.device.pointwise import clamp, minimum, normalise
from numba_fused.device.reductions import (
    FULL_WARP,
    WARP,
    merge,
    reciprocal_std,
    warp_moments,
)
from numba_fused.rng import RUN, keep_bits
from numba_fused.spec import BlockSpec, Triple

SHARED_BYTES = 44 * 1024  # for staged input and taps; the rest of 48 KB is for statistics
CHUNK_BYTES = 32 * 1024  # more input channels at a time are staged up to here
CHAIN = 512  # products added one by one: a chain of n roundings drifts by about sqrt(n) of them
MAX_PARTIALS = 128  # a channel's partial moments in one sample; each block of the apply reads them
BANKS = 32


# ---- which tiling ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """A block's tile and its division among threads: what kernels are specialised for.

    Attributes
    ----------
    threads : int
        Of a block; those beyond the layout help to stage the input.
    channels, rows, columns : int
        A thread's patch. Its rows are adjacent, its columns ``layout[3]`` apart.
    layout : tuple of int
        Threads along (k, d, h, w); w varies fastest.
    kernel, stride, dilation : tuple of int
        As (d, h, w).
    extent : tuple of int
        Input (d, h, w) that a tile looks at.
    pitch : int
        Words from one staged row to the next.
    chunk : int
        Input channels staged at a time.
    sums_apart : bool
        Whether each chunk is summed by itself before it joins the others.
    """

    threads: int
    channels: int
    rows: int
    columns: int
    layout: tuple[int, int, int, int]
    kernel: Triple
    stride: Triple
    dilation: Triple
    extent: Triple
    pitch: int
    chunk: int
    sums_apart: bool

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Output channels and (d, h, w) of a tile."""
        k, d, h, w = self.layout
        return k * self.channels, d, h * self.rows, w * self.columns

    @property
    def values(self) -> int:
        """Outputs of a thread."""
        return self.channels * self.rows * self.columns

    @property
    def staged(self) -> int:
        """Words of one staged input channel."""
        return self.extent[0] * self.extent[1] * self.pitch

    @property
    def taps(self) -> int:
        """Words of one staged input channel's taps."""
        return math.prod(self.kernel) * self.box[0]

    @property
    def load_lanes(self) -> int:
        """Lanes that stage one row together: few enough to be busy, enough for whole sectors."""
        return min((16, WARP), key=self.staging)

    def staging(self, lanes: int) -> int:
        """Rough count of instructions to stage one input channel with `lanes` lanes a row."""
        rows = -(-self.extent[0] * self.extent[1] * lanes // self.threads)
        return rows * (22 + 12 * -(-self.extent[2] // lanes))

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shared memory of `add_moments`: (count, mean, m2) by channel and warp, and one more."""
        return 3, self.box[0], math.prod(self.layout[1:]) // WARP + 1

    @property
    def statistics_shape(self) -> tuple[int, int]:
        """Result of `group_statistics`: mean and rstd of at most one group a channel."""
        return 2, self.box[0]

    @property
    def launch_bounds(self) -> tuple[int, int]:
        """Enough blocks on a multiprocessor for 512 threads, which leaves each 128 registers."""
        return self.threads, max(1, 512 // self.threads)


class Cover(NamedTuple):
    """How many tiles a problem takes.

    Attributes
    ----------
    channel_blocks : int
        Along the output channels; a tile's channels belong to one group of the convolution.
    d, h, w : int
        Along the output's axes.
    slots : int
        Blocks that share these tiles when the convolution is summed; each leaves one partial
        result a channel.
    """

    channel_blocks: int
    d: int
    h: int
    w: int
    slots: int

    @property
    def tiles(self) -> int:
        """Tiles of one sample and channel block."""
        return self.d * self.h * self.w

    @property
    def arguments(self) -> tuple[np.int32, ...]:
        """For the kernels, in 32 bits."""
        return tuple(map(np.int32, self))


def cover_of(spec: BlockSpec, tiling: Tiling) -> Cover:
    """The tiles that cover one sample of `spec`."""
    k, d, h, w = tiling.box
    size = spec.volume(spec.output_shape)[2:]
    tiles_d, tiles_h, tiles_w = (-(-n // m) for n, m in zip(size, (d, h, w), strict=True))
    channel_blocks = spec.groups * -(-(spec.out_channels // spec.groups) // k)
    tiles = tiles_d * tiles_h * tiles_w
    tiles_per_slot = -(-tiles // MAX_PARTIALS)
    return Cover(channel_blocks, tiles_d, tiles_h, tiles_w, -(-tiles // tiles_per_slot))


@lru_cache(maxsize=1024)
def choose_tiling(spec: BlockSpec, threads: int) -> Tiling | None:
    """The tiling of the fewest instructions by a rough count, None if none fits shared memory."""
    fitting = (t for t in _tilings(spec, threads) if _shared_bytes(t, spec) <= SHARED_BYTES)
    return min(fitting, key=lambda tiling: _instructions(tiling, spec), default=None)


def shared_memory_limit(spec: BlockSpec) -> str | None:
    """Why no tile of `spec` fits shared memory whatever the block size, or None."""
    if choose_tiling(spec, 1024) is not None:
        return None
    smallest = min(_shared_bytes(tiling, spec) for tiling in _tilings(spec, WARP))
    return (
        f"the smallest tile looks at {smallest:,} bytes of input and taps, and shared memory holds "
        f"{SHARED_BYTES:,}; use variant='epilogue'"
    )


def _tilings(spec: BlockSpec, threads: int) -> Iterator[Tiling]:
    """Every patch that registers hold, in every layout of whole warps."""
    _, height, width = spec.volume(spec.output_shape)[2:]
    channels = spec.out_channels // spec.groups
    # A third of the registers, and 32 besides, hold addresses and what was fetched.
    registers = (min(128, 65536 // threads) - 32) * 2 // 3
    most = registers if spec.dtype == "float32" else registers // 4  # every value is wider, too
    most //= 2 if _chain(spec) > CHAIN else 1
    patches = [
        (k, rows, columns)
        for k in _powers(channels, 8)
        for rows in _powers(height, 16)
        for columns in (_powers(width, 4) if height == 1 else [1])
        if k * rows * columns <= most
    ]
    warps = threads // WARP
    for k, rows, columns in patches:
        for positions in (WARP * n for n in range(1, warps + 1) if warps % n == 0):
            threads_k = _powers(-(-channels // k), threads // positions)[-1]
            # The largest power of two in a number: threads along w divide any warp's lanes evenly.
            for threads_w in _powers(-(-width // columns), positions & -positions):
                for threads_h in _powers(-(-height // rows), positions // threads_w):
                    threads_d, idle = divmod(positions, threads_w * threads_h)
                    if not idle:
                        layout = (threads_k, threads_d, threads_h, threads_w)
                        yield _tiling(spec, threads, (k, rows, columns), layout)


def _tiling(
    spec: BlockSpec,
    threads: int,
    patch: tuple[int, int, int],
    layout: tuple[int, int, int, int],
) -> Tiling:
    """Fill in what follows from patch and layout: extent, pitch and chunk."""
    depth, height, width = spec.volume(spec.output_shape)[2:]
    channels, rows, columns = patch
    _, threads_d, threads_h, threads_w = layout
    kd, kh, kw = spec.volume(spec.weight_shape)[2:]
    # Threads beyond the output look at nothing, but a patch is computed whole.
    outputs = (
        min(threads_d, depth),
        min(threads_h, -(-height // rows)) * rows,
        min(threads_w, width) if columns == 1 else threads_w * columns,
    )
    extent_d, extent_h, extent_w = (
        (n - 1) * stride + (k - 1) * dilation + 1
        for n, stride, k, dilation in zip(
            outputs, spec.stride3, (kd, kh, kw), spec.dilation3, strict=True
        )
    )
    tiling = Tiling(
        threads=threads,
        channels=channels,
        rows=rows,
        columns=columns,
        layout=layout,
        kernel=(kd, kh, kw),
        stride=spec.stride3,
        dilation=spec.dilation3,
        extent=(extent_d, extent_h, extent_w),
        pitch=_pitch(extent_w, rows * spec.stride3[1], threads_w * spec.stride3[2]),
        chunk=1,
        sums_apart=_chain(spec) > CHAIN,
    )
    per_channel = (tiling.staged + tiling.taps) * spec.itemsize
    most = max(1, min(CHUNK_BYTES // per_channel, CHAIN // (kd * kh * kw)))
    available = spec.in_channels // spec.groups
    chunks = -(-available // most)
    return replace(tiling, chunk=-(-available // chunks))


def _chain(spec: BlockSpec) -> int:
    """Products that make one output."""
    return spec.in_channels // spec.groups * math.prod(spec.kernel_size)


def _pitch(width: int, row_step: int, lanes_step: int) -> int:
    """A pitch that has the lanes of the next row of threads read the next banks."""
    candidates = range(width, width + BANKS)
    suits = (p for p in candidates if (row_step * p - lanes_step) % BANKS == 0)
    return next(suits, width)


def _shared_bytes(tiling: Tiling, spec: BlockSpec) -> int:
    return tiling.chunk * (tiling.staged + tiling.taps) * spec.itemsize


def _instructions(tiling: Tiling, spec: BlockSpec) -> float:
    """Rough count for one sample, of one lane: what tilings are compared by."""
    kd, kh, kw = tiling.kernel
    k, rows, columns = tiling.channels, tiling.rows, tiling.columns
    patch = k * rows * columns
    window = columns * len({row + tap for row in range(rows) for tap in range(kh)})
    row_of_taps = kh * patch + 1.5 * (window + kh * k) + 8
    staging = tiling.staging(tiling.load_lanes) + 12 * -(-tiling.taps // tiling.threads)
    streams = -(-patch // min(RUN, tiling.layout[3]))
    epilogue = 20 * patch + 180 * streams + 40 * k + 200
    channels = spec.in_channels // spec.groups
    warps = tiling.threads // WARP
    tiles = cover_of(spec, tiling)
    per_tile = channels * (kd * kw * row_of_taps + staging) + epilogue
    return tiles.channel_blocks * tiles.tiles * warps * per_tile


def _powers(size: int, limit: int) -> list[int]:
    """Powers of two up to the first that reaches `size`, none above `limit`."""
    powers = [1]
    while powers[-1] < size and powers[-1] * 2 <= limit:
        powers.append(powers[-1] * 2)
    return powers


# ---- on the device -----------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_sum(value):
    """Sum over a warp, in every lane and to the same last bit in each."""
    distance = WARP // 2
    while distance > 0:
        value += cuda.shfl_xor_sync(FULL_WARP, value, distance)
        distance //= 2
    return value


@cuda.jit(device=True)
def tile_origin(tile, cover):
    """(d, h, w) of tile number `tile`, counted in tiles."""
    rest, w = divide(tile, cover[3])
    d, h = divide(rest, cover[2])
    return d, h, w


class TileFunctions(NamedTuple):
    """The device functions of one tiling; see `tile_functions`."""

    place_of: Any
    convolve: Any
    clear_moments: Any
    add_moments: Any
    store_partial: Any
    group_statistics: Any
    normalise_and_drop: Any
    load: Any
    store: Any


@lru_cache(maxsize=1024)
def tile_functions(tiling: Tiling) -> TileFunctions:
    """Build the device functions of `tiling`.

    In all of them `values` is the thread's patch, a local array of channels, rows, columns.
    """
    THREADS, CHANNELS, ROWS, COLUMNS = (
        tiling.threads,
        tiling.channels,
        tiling.rows,
        tiling.columns,
    )
    POSITIONS = ROWS * COLUMNS
    VALUES = CHANNELS * POSITIONS
    _, THREADS_D, THREADS_H, THREADS_W = tiling.layout
    SPATIAL_THREADS = THREADS_D * THREADS_H * THREADS_W
    SPATIAL_WARPS = SPATIAL_THREADS // WARP
    BOX_K, BOX_D, BOX_H, BOX_W = tiling.box
    KERNEL_D, KERNEL_H, KERNEL_W = tiling.kernel
    TAPS = KERNEL_D * KERNEL_H * KERNEL_W
    TAPS_AT_ONCE = max(n for n in range(1, 8) if KERNEL_H % n == 0)
    FACTORS = TAPS_AT_ONCE * CHANNELS
    STRIDE_D, STRIDE_H, STRIDE_W = tiling.stride
    DILATION_D, DILATION_H, DILATION_W = tiling.dilation
    EXTENT_D, EXTENT_H, EXTENT_W = tiling.extent
    PITCH, CHUNK, SUMS_APART = tiling.pitch, tiling.chunk, tiling.sums_apart
    LOAD_LANES = tiling.load_lanes
    LOADERS = THREADS // LOAD_LANES
    LOADS = -(-EXTENT_W // LOAD_LANES)
    SHARERS = min(RUN, THREADS_W)  # lanes that share a dropout stream
    TURNS = -(-VALUES // SHARERS)

    @cuda.jit(device=True)
    def place_of(n, channel_block, tile, cover, geometry):
        """Where the tile begins: (n, first_k, channel_count, d, h, w)."""
        x_shape, weight_shape = geometry[0], geometry[1]
        groups, _ = divide(x_shape[1], weight_shape[1])
        group, block = divide(channel_block, divide(cover[0], groups)[0])
        channels, _ = divide(weight_shape[0], groups)
        first = int32(block * BOX_K)
        d, h, w = tile_origin(tile, cover)
        return (
            n,
            int32(group * channels + first),
            min(int32(BOX_K), int32(channels - first)),
            int32(d * BOX_D),
            int32(h * BOX_H),
            int32(w * BOX_W),
        )

    @cuda.jit(device=True)
    def patch():
        """(k, d, h, w) of this thread's first value within the tile."""
        k, position = divide(int32(cuda.threadIdx.x), int32(SPATIAL_THREADS))
        row, w = divide(position, int32(THREADS_W))
        d, h = divide(row, int32(THREADS_H))
        return int32(k * CHANNELS), d, int32(h * ROWS), w

    @cuda.jit(device=True)
    def inside(place, output_size):
        """How many channels, rows and places along w, from its first value on, are outputs.

        All three are zero for a thread that has nothing to compute.
        """
        k, d, h, w = patch()
        channels = int32(place[2] - k)
        rows = int32(output_size[1] - place[4] - h)
        columns = int32(output_size[2] - place[5] - w)
        if channels <= 0 or int32(place[3] + d) >= output_size[0] or rows <= 0 or columns <= 0:
            channels, rows, columns = int32(0), int32(0), int32(0)
        return channels, rows, columns

    @cuda.jit(device=True)
    def exists(j, rows, columns):
        """Whether position `j` of the patch is an output, by what `inside` says."""
        return j // COLUMNS < rows and (COLUMNS == 1 or j % COLUMNS * THREADS_W < columns)

    @cuda.jit(device=True)
    def first_index(place, geometry):
        """Output index of the sample, that of this thread's first value in it, a channel's size."""
        output_size = geometry[2]
        k, d, h, w = patch()
        plane = int32(int32(output_size[0] * output_size[1]) * output_size[2])
        row = int32(int32(place[3] + d) * output_size[1] + int32(place[4] + h))
        index = int32(int32(place[1] + k) * plane + row * output_size[2] + int32(place[5] + w))
        return uint64(place[0]) * uint64(int32(geometry[1][0] * plane)), index, plane

    @cuda.jit(device=True)
    def stage_taps(taps, weight, place, first_c, chunk, geometry):
        """taps[c, a, b, e, k] of a chunk of input channels; zeros for channels beyond the last."""
        per_channel = int32(geometry[1][1] * TAPS)
        i = int32(cuda.threadIdx.x)
        while i < chunk * TAPS * BOX_K:
            tap, k = divide(i, int32(BOX_K))
            value = weight.dtype.type(0)
            if k < place[2]:
                source = int32(int32(place[1] + k) * per_channel + first_c * TAPS + tap)
                value = weight[uint32(source)]
            taps[uint32(i)] = value
            i = int32(i + THREADS)

    @cuda.jit(device=True)
    def stage_input(staged, x, place, first_c, chunk, geometry):
        """staged[c, d, h, w] of a chunk of input channels; zeros outside x."""
        x_shape, weight_shape, _, stride, padding, _ = geometry
        first_d = int32(place[3] * stride[0] - padding[0])
        first_h = int32(place[4] * stride[1] - padding[1])
        groups, _ = divide(x_shape[1], weight_shape[1])
        group, _ = divide(place[1], divide(weight_shape[0], groups)[0])
        first_c = int32(group * weight_shape[1] + first_c)
        sample_size = int32(int32(x_shape[1] * x_shape[2]) * int32(x_shape[3] * x_shape[4]))
        sample = uint64(place[0]) * uint64(sample_size)
        row, lane = divide(int32(cuda.threadIdx.x), int32(LOAD_LANES))
        first_w = int32(place[5] * stride[2] - padding[2] + lane)
        while row < chunk * EXTENT_D * EXTENT_H:
            plane, h = divide(row, int32(EXTENT_H))
            c, d = divide(plane, int32(EXTENT_D))
            d, h = int32(first_d + d), int32(first_h + h)
            width = uint32(0)  # a row outside x has no columns inside
            if uint32(d) < uint32(x_shape[2]) and uint32(h) < uint32(x_shape[3]):
                width = uint32(x_shape[4])
            x_row = int32(int32(int32(first_c + c) * x_shape[2] + d) * x_shape[3] + h)
            source = int32(x_row * x_shape[4] + first_w)
            target = uint64(row * PITCH + lane)
            for load in range(LOADS):
                value = x.dtype.type(0)
                # What is negative as a signed number is large as an unsigned one.
                if uint32(first_w + load * LOAD_LANES) < width:
                    value = x[sample + uint64(uint32(source + load * LOAD_LANES))]
                if lane + load * LOAD_LANES < EXTENT_W:
                    staged[target + uint64(load * LOAD_LANES)] = value
            row = int32(row + LOADERS)

    @cuda.jit(device=True)
    def add_products(values, staged, taps, chunk):
        """Add a staged chunk of input channels to the patch."""
        window = cuda.local.array(POSITIONS, staged.dtype)
        # Loops that index a local array are unrolled, so that the taps of a column meet in one
        # stretch of code, where what two of them fetch is fetched once.
        factors = cuda.local.array(FACTORS, staged.dtype)
        k, d, h, w = patch()
        corner = int32(int32(d * STRIDE_D * EXTENT_H + h * STRIDE_H) * PITCH + w * STRIDE_W)
        plane = int32(0)
        while plane < chunk * KERNEL_D:
            c, a = divide(plane, int32(KERNEL_D))
            x_plane = int32(corner + (c * EXTENT_D + a * DILATION_D) * (EXTENT_H * PITCH))
            tap = int32(0)
            while tap < KERNEL_H // TAPS_AT_ONCE * KERNEL_W:
                b, e = divide(tap, int32(KERNEL_W))
                b = int32(b * TAPS_AT_ONCE)
                first_x = uint64(uint32(x_plane + b * DILATION_H * PITCH + e * DILATION_W))
                first_tap = int32((plane * KERNEL_H + b) * KERNEL_W + e)
                first_factor = uint64(uint32(first_tap * BOX_K + k))
                for b in range(TAPS_AT_ONCE):
                    for i in range(CHANNELS):
                        factor = first_factor + uint64(b * KERNEL_W * BOX_K + i)
                        factors[b * CHANNELS + i] = taps[factor]
                for b in range(TAPS_AT_ONCE):
                    for j in range(POSITIONS):
                        row = j // COLUMNS * STRIDE_H + b * DILATION_H
                        column = j % COLUMNS * THREADS_W * STRIDE_W
                        window[j] = staged[first_x + uint64(row * PITCH + column)]
                    for i in range(CHANNELS):
                        for j in range(POSITIONS):
                            values[i * POSITIONS + j] += window[j] * factors[b * CHANNELS + i]
                tap = int32(tap + 1)
            plane = int32(plane + 1)

    @cuda.jit(device=True)
    def convolve(values, staged, taps, x, weight, bias, place, geometry):
        """The convolution of the patch; `staged` and `taps` are shared memory for one chunk."""
        sums = cuda.local.array(VALUES, x.dtype)
        channels, _, _ = inside(place, geometry[2])
        k, _, _, _ = patch()
        for v in range(VALUES):
            values[v] = x.dtype.type(0)
        c = int32(0)
        while c < geometry[1][1]:
            chunk = min(int32(CHUNK), int32(geometry[1][1] - c))
            cuda.syncthreads()  # nobody reads the chunk before any more
            stage_taps(taps, weight, place, c, chunk, geometry)
            stage_input(staged, x, place, c, chunk, geometry)
            cuda.syncthreads()
            if channels > 0:
                if SUMS_APART:
                    for v in range(VALUES):
                        sums[v] = x.dtype.type(0)
                    add_products(sums, staged, taps, chunk)
                    for v in range(VALUES):
                        values[v] += sums[v]
                else:
                    add_products(values, staged, taps, chunk)
            c = int32(c + CHUNK)
        for i in range(CHANNELS):
            if i < channels:
                shift = bias[uint32(place[1] + k + i)]
                for j in range(POSITIONS):
                    values[i * POSITIONS + j] += shift

    @cuda.jit(device=True)
    def clear_moments(moments):
        """Begin a sum: `moments`, shared memory, holds those of no values at its last place.

        What belongs to channel number `i` there is touched by thread `i` alone.
        """
        i = cuda.threadIdx.x
        if i < BOX_K:
            for q in range(3):
                moments[q, i, SPATIAL_WARPS] = moments.dtype.type(0)

    @cuda.jit(device=True)
    def add_moments(values, moments, place, geometry):
        """Add a tile. A warp reduces its values of a channel in two passes over its registers."""
        _, rows, columns = inside(place, geometry[2])
        k, _, _, _ = patch()
        warp = int32(cuda.threadIdx.x // WARP % SPATIAL_WARPS)
        zero = values.dtype.type(0)
        size = zero
        for j in range(POSITIONS):
            if exists(j, rows, columns):
                size += float32(1)
        size = warp_sum(size)
        for i in range(CHANNELS):
            total, squares = zero, zero
            for j in range(POSITIONS):
                if exists(j, rows, columns):
                    total += values[i * POSITIONS + j]
            centre = warp_sum(total) / max(size, values.dtype.type(1))
            for j in range(POSITIONS):
                if exists(j, rows, columns):
                    deviation = values[i * POSITIONS + j] - centre
                    squares += deviation * deviation
            squares = warp_sum(squares)
            if cuda.laneid == 0 and k < BOX_K:
                moments[0, k + i, warp] = size
                moments[1, k + i, warp] = centre
                moments[2, k + i, warp] = squares
        cuda.syncthreads()
        i = cuda.threadIdx.x
        if i < BOX_K:
            s = int32(SPATIAL_WARPS)
            count, mean, m2 = moments[0, i, s], moments[1, i, s], moments[2, i, s]
            while s > 0:
                s = int32(s - 1)
                count, mean, m2 = merge(
                    count, mean, m2, moments[0, i, s], moments[1, i, s], moments[2, i, s]
                )
            s = int32(SPATIAL_WARPS)
            moments[0, i, s], moments[1, i, s], moments[2, i, s] = count, mean, m2

    @cuda.jit(device=True)
    def store_partial(partial, moments, place, channels, slot, slots):
        """The moments of the tiles added so far; `channels` are those of all tiles."""
        i = int32(cuda.threadIdx.x)
        if i < place[2]:
            p = (int64(place[0]) * channels + int32(place[1] + i)) * slots + slot
            for q in range(3):
                partial[uint64(p * 3 + q)] = moments[q, i, SPATIAL_WARPS]

    @cuda.jit(device=True)
    def group_statistics(statistics, partial, place, slots, group_channels, channels, eps):
        """statistics[:, g]: mean and rstd of the g-th group that the tile's channels belong to.

        A warp merges a group's partial moments: `slots` triples for each of its channels.
        """
        first_group, _ = divide(place[1], group_channels)
        last_group, _ = divide(int32(place[1] + place[2] - 1), group_channels)
        group = int32(first_group + cuda.threadIdx.x // WARP)
        while group <= last_group:
            row = int64(place[0]) * channels + int32(group * group_channels)
            first = row * slots
            count = partial.dtype.type(0)
            mean, m2 = count, count
            s = int32(cuda.laneid)
            while s < group_channels * slots:
                p = uint64(first + s) * uint64(3)
                triple = partial[p], partial[p + uint64(1)], partial[p + uint64(2)]
                count, mean, m2 = merge(count, mean, m2, triple[0], triple[1], triple[2])
                s = int32(s + WARP)
            count, mean, m2 = warp_moments(count, mean, m2)
            if cuda.laneid == 0:
                statistics[0, group - first_group] = mean
                statistics[1, group - first_group] = reciprocal_std(count, m2, eps)
            group = int32(group + THREADS // WARP)
        cuda.syncthreads()

    @cuda.jit(device=True)
    def normalise_patch(values, statistics, gamma, beta, place, group_channels, bounds):
        """Normalise, min and clamp."""
        k, _, _, _ = patch()
        first_group, _ = divide(place[1], group_channels)
        for i in range(CHANNELS):
            # Without a branch: a channel that does not exist takes the last one's parameters.
            channel = int32(place[1] + min(int32(k + i), int32(place[2] - 1)))
            group = uint32(divide(channel, group_channels)[0] - first_group)
            mean, rstd = statistics[0, group], statistics[1, group]
            scale, shift = gamma[uint32(channel)], beta[uint32(channel)]
            for j in range(POSITIONS):
                h = normalise(values[i * POSITIONS + j], mean, rstd, scale, shift)
                c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])
                values[i * POSITIONS + j] = c

    @cuda.jit(device=True)
    def drop(values, place, geometry, seed, width, drop_threshold, keep_scale):
        """Dropout. Lanes that share streams take turns: each draws every SHARERS-th for all."""
        output_size = geometry[2]
        k, d, h, w = patch()
        sharer = w % SHARERS
        first_sharer = cuda.laneid - sharer
        streams_per_row, _ = divide(int32(width + RUN - 1), int32(RUN))
        rows = int32(output_size[0] * output_size[1])
        channel = int64(place[0]) * geometry[1][0] + int32(place[1] + k)
        first_row = channel * rows + int32(int32(place[3] + d) * output_size[1] + place[4] + h)
        for turn in range(TURNS):
            i, j = divide(int32(turn * SHARERS + sharer), int32(POSITIONS))
            row, column = divide(j, int32(COLUMNS))
            run, _ = divide(int32(place[5] + w - sharer + column * THREADS_W), int32(RUN))
            stream = (first_row + int32(i * rows + row)) * streams_per_row + run
            mine = int32(keep_bits(uint64(seed[0]), uint64(stream), drop_threshold))
            for source in range(SHARERS):
                v = turn * SHARERS + source
                if v < VALUES:
                    bits = uint32(cuda.shfl_sync(FULL_WARP, mine, first_sharer + source))
                    position = uint32(place[5] + w + v % COLUMNS * THREADS_W) % uint32(RUN)
                    factor = keep_scale
                    if bits >> position & uint32(1) == 0:
                        factor -= keep_scale
                    values[v] *= factor

    @cuda.jit(device=True)
    def normalise_and_drop(
        values,
        statistics,
        gamma,
        beta,
        place,
        group_channels,
        geometry,
        bounds,
        seed,
        width,
        drop_threshold,
        keep_scale,
    ):
        """Everything after the convolution, on the patch."""
        normalise_patch(values, statistics, gamma, beta, place, group_channels, bounds)
        if drop_threshold > 0:
            drop(values, place, geometry, seed, width, drop_threshold, keep_scale)

    @cuda.jit(device=True)
    def load(values, z, place, geometry):
        """The patch from tensor `z`."""
        channels, rows, columns = inside(place, geometry[2])
        sample, channel_index, plane = first_index(place, geometry)
        for i in range(CHANNELS):
            index, channel_rows = channel_index, rows if i < channels else int32(0)
            for j in range(POSITIONS):
                values[i * POSITIONS + j] = z.dtype.type(0)
                if exists(j, channel_rows, columns):
                    column = j % COLUMNS * THREADS_W
                    values[i * POSITIONS + j] = z[sample + uint64(uint32(index + column))]
                if j % COLUMNS == COLUMNS - 1:
                    index = int32(index + geometry[2][2])
            channel_index = int32(channel_index + plane)

    @cuda.jit(device=True)
    def store(values, z, place, geometry):
        """The patch to tensor `z`."""
        channels, rows, columns = inside(place, geometry[2])
        sample, channel_index, plane = first_index(place, geometry)
        for i in range(CHANNELS):
            index, channel_rows = channel_index, rows if i < channels else int32(0)
            for j in range(POSITIONS):
                if exists(j, channel_rows, columns):
                    column = j % COLUMNS * THREADS_W
                    z[sample + uint64(uint32(index + column))] = values[i * POSITIONS + j]
                if j % COLUMNS == COLUMNS - 1:
                    index = int32(index + geometry[2][2])
            channel_index = int32(channel_index + plane)

    return TileFunctions(
        place_of=place_of,
        convolve=convolve,
        clear_moments=clear_moments,
        add_moments=add_moments,
        store_partial=store_partial,
        group_statistics=group_statistics,
        normalise_and_drop=normalise_and_drop,
        load=load,
        store=store,
    )
