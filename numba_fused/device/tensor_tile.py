"""One tile of the block on tensor cores, from x in global memory to the finished output.

`tile_functions` makes the device functions for one `TileShape`; the rungs that use tensor cores
are built from them and differ in the order of the calls. Accumulators stay in registers from the
first to the last: 64 a lane, ``acc[4 * j + r]`` for position ``j`` along w and

    r    0, 2: row 2 t of the warp's eight      0, 1: channel g of the warp's sixteen
         1, 3: row 2 t + 1                      2, 3: channel g + 8          (lane = 4 g + t)

so a lane holds four whole dropout streams of 16. They hold ``z - bias``, scaled by powers of two
that keep halves from overflowing: one of the tile's input, one of each output channel's weights.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint32, uint64

from numba_fused.device import ptx
from numba_fused.device.convolution import divide
from numba_fused.device.pointwise import clip_float32
from numba_fused.device.tile_shape import (
    CHANNELS,
    COLUMNS,
    RECORD_WORDS,
    ROWS,
    WARP,
    TileShape,
    round_up,
)
from numba_fused.rng import keep_bits

FULL_WARP = 0xFFFFFFFF
ACCUMULATORS = 4 * COLUMNS
# What is noted of a tile in shared memory: where it lies, its number, and the exponents of the
# scales of its last two chunks.
SAMPLE, PLANE, ROW, COLUMN, CHANNEL_TILE, TILE, SCALE = range(7)
PLACE_SIZE = SCALE + 2
INFINITY = float32(math.inf)
# Halves reach 65504: inputs and weights are scaled so that the largest lies in [2^14, 2^15).
LARGEST_EXPONENT = 14
# Upper bits of a sum that has not been published: those of a NaN that no arithmetic makes.
ABSENT = np.uint32(0xFFFFFFFF)
# Barriers of a block's warps that convolve, and of those that pack, who may be the same.
CONVOLVING, PACKING = 1, 2
MOST_RECORDS_AT_ONCE = 4  # that a lane loads before it waits for one
WAIT_NANOSECONDS = 40
SHORTEST_NAP, LONGEST_NAP = 256, 1024  # nanoseconds, of who is patient


class TileFunctions(NamedTuple):
    """Device functions of one `TileShape`; each is documented where it is defined."""

    locate: Any
    warp_place: Any
    stage_input: Any
    accumulate: Any
    convolve: Any
    input_unscale: Any
    extent: Any
    tile_position: Any
    draw_bits: Any
    warp_moments: Any
    publish_sums: Any
    group_statistics: Any
    finish: Any
    move_rows: Any
    store: Any
    wait_for_store: Any
    together: Any
    packing_together: Any
    packing_thread: Any
    chunk_exponent: Any
    pack_words: Any
    clear: Any
    rescale: Any
    packed_tile: Any
    add_chunk: Any
    pool_group: Any
    stage_output: Any
    hand_over: Any
    write_output: Any


@cuda.jit(device=True)
def scale_exponent(peak_bits):
    """Biased exponent of the power of two that brings a largest magnitude into range."""
    exponent = int32(peak_bits >> uint32(23))
    if exponent == 0:  # zeros and subnormals: as if they were the smallest normal number
        exponent = int32(1)
    return min(int32(2 * 127 + LARGEST_EXPONENT - exponent), int32(253))


@cuda.jit(device=True)
def power_of_two(biased_exponent):
    """The float with that biased exponent."""
    return ptx.bits_float(uint32(biased_exponent) << uint32(23))


@cuda.jit(device=True)
def pack_row(a, b, scale):
    """Four words of halves from four values of each of two sources."""
    return (
        ptx.pack_halves(a[0] * scale, b[0] * scale),
        ptx.pack_halves(a[1] * scale, b[1] * scale),
        ptx.pack_halves(a[2] * scale, b[2] * scale),
        ptx.pack_halves(a[3] * scale, b[3] * scale),
    )


@cuda.jit(device=True)
def split_row(a, b, scale):
    """As `pack_row`, and four more words of what rounding left over."""
    high_0, low_0 = ptx.split_halves(a[0] * scale, b[0] * scale)
    high_1, low_1 = ptx.split_halves(a[1] * scale, b[1] * scale)
    high_2, low_2 = ptx.split_halves(a[2] * scale, b[2] * scale)
    high_3, low_3 = ptx.split_halves(a[3] * scale, b[3] * scale)
    return (high_0, high_1, high_2, high_3), (low_0, low_1, low_2, low_3)


@cuda.jit(device=True)
def tf32_row(a):
    """Four values in TF32."""
    return ptx.to_tf32(a[0]), ptx.to_tf32(a[1]), ptx.to_tf32(a[2]), ptx.to_tf32(a[3])


@cuda.jit(device=True)
def multiply_halves(sums, i, a, b):
    """One matrix instruction into four sums: A and B of halves."""
    c0, c1, c2, c3 = sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
    c0, c1, c2, c3 = ptx.mma_half(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3)
    sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = c0, c1, c2, c3


@cuda.jit(device=True)
def four_words(a, i):
    """Number `i` of the A that an array holds."""
    return a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]


@cuda.jit(device=True)
def multiply_pairs(sums, i, a, a_rest, b, b_rest):
    """Three matrix instructions into four sums: halves, and what rounding to them left over."""
    multiply_halves(sums, i, a_rest, b)
    multiply_halves(sums, i, a, b_rest)
    multiply_halves(sums, i, a, b)


@cuda.jit(device=True)
def multiply_tf32(sums, i, a, b):
    """As `multiply_halves`, of TF32 values."""
    c0, c1, c2, c3 = sums[i], sums[i + 1], sums[i + 2], sums[i + 3]
    c0, c1, c2, c3 = ptx.mma_tf32(a[0], a[1], a[2], a[3], b[0], b[1], c0, c1, c2, c3)
    sums[i], sums[i + 1], sums[i + 2], sums[i + 3] = c0, c1, c2, c3


@cuda.jit(device=True)
def finish_value(value, slope, start, bounds, kept):
    """Normalise, min, clamp and drop."""
    value = clip_float32(value * slope + start, bounds[0], bounds[1])
    # A dropped NaN stays NaN, as in PyTorch: multiply, do not replace.
    if uint32(kept) == uint32(0):
        value *= float32(0)
    return value


def last_scale(shape: TileShape) -> int:
    """Where a tile's notes have the exponent of its scale, once all chunks are packed."""
    return SCALE + (shape.chunks - 1) % 2


@cache
def stream_drawer(shape: TileShape, second: tuple[int, int], third: tuple[int, int]) -> Any:
    """The function that draws a lane's four dropout streams.

    `second` and `third` are channels and rows from the first stream to those; the fourth lies
    as far from the third as the second from the first.
    """
    tile_channels, out_channels = shape.channels, shape.out_channels
    out_d, out_h, out_w = shape.out_size
    row_streams = -(-out_w // COLUMNS)
    channel_streams = out_d * out_h * row_streams
    to_second = second[0] * channel_streams + second[1] * row_streams
    to_third = third[0] * channel_streams + third[1] * row_streams

    @cuda.jit(device=True)
    def draw_two(stream, seed, drop_threshold):
        """The masks of two streams, 16 bits each."""
        first = keep_bits(seed, uint64(stream), drop_threshold)
        second = keep_bits(seed, uint64(stream + to_second), drop_threshold)
        return uint32(first | second << uint32(COLUMNS))

    @cuda.jit(device=True)
    def draw_streams(place, c, row, run, seed, drop_threshold):
        """Two words: the first and second, the third and fourth stream of a tile's lane.

        The first is of the tile's channel `c`, its `row`, and `run` 16 columns from its first.
        """
        low = high = uint32(0xFFFFFFFF)
        if drop_threshold > 0:
            k = int32(place[CHANNEL_TILE] * tile_channels + c)
            row = int32(place[PLANE] * out_h + place[ROW] + row)
            stream = (int64(place[SAMPLE]) * out_channels + k) * channel_streams
            stream += int32(row * row_streams + place[COLUMN] // COLUMNS + run)
            word = uint64(seed[0])
            low = draw_two(stream, word, drop_threshold)
            high = draw_two(stream + to_third, word, drop_threshold)
        return low, high

    return draw_streams


@cache
def record_loader(entries: int, patient: bool = False) -> tuple[int, Any]:
    """How many of a run of `entries` records a lane loads at once, and the function that does.

    One that is patient looks less often the longer it waits, and leaves more to other warps.
    """
    at_once = min(MOST_RECORDS_AT_ONCE, -(-entries // WARP))

    @cuda.jit(device=True)
    def load_records(records, first, entry, found):
        """Two doubles each of records `entry`, `entry` + 32 ..., once all of a warp's are there.

        `first` is the word at which the run begins; beyond its end there are zeros.
        """
        waiting, nap = True, uint32(SHORTEST_NAP if patient else WAIT_NANOSECONDS)
        while waiting:
            absent = False
            for i in range(at_once):
                found[2 * i], found[2 * i + 1] = float64(0), float64(0)
                if entry + i * WARP < entries:
                    at = uint64(first + int32((entry + i * WARP) * RECORD_WORDS))
                    found[2 * i] = ptx.load_published(records, at)
                    found[2 * i + 1] = ptx.load_published(records, at + uint64(2))
            for i in range(2 * at_once):
                absent = absent or ptx.high_bits(found[i]) == ABSENT
            waiting = cuda.any_sync(FULL_WARP, absent)  # a warp stays together
            if waiting:
                cuda.nanosleep(nap)
                if patient:
                    nap = min(uint32(2 * nap), uint32(LONGEST_NAP))

    return at_once, load_records


@cache
def tile_functions(shape: TileShape) -> TileFunctions:
    """The device functions, specialised on the compile-time numbers of a tile."""
    threads, warps = shape.threads, shape.warps
    packing, first_packing = shape.packing_threads, shape.first_packing_thread
    row_warps, column_warps = shape.row_warps, shape.column_warps
    spatial_warps = row_warps * column_warps
    tile_channels, tile_rows, tile_columns = shape.channels, shape.rows, shape.columns
    warp_channels = shape.warp_channels
    channel_tiles, row_tiles, column_tiles = shape.tiles
    in_channels, out_channels = shape.in_channels, shape.out_channels
    in_d, in_h, in_w = shape.in_size
    out_d, out_h, out_w = shape.out_size
    in_plane, out_plane = in_h * in_w, out_h * out_w
    kernel_w = shape.kernel_size[2]
    stride_d, stride_h, stride_w = shape.stride
    padding_d, padding_h, padding_w = shape.padding
    dilation_d, dilation_w = shape.dilation[0], shape.dilation[2]

    sources, chunks, planes = shape.sources, shape.chunks, shape.planes
    vector, shift = shape.vector, shape.shift
    staged_planes, staged_row = shape.staged_planes, shape.staged_row
    staged_plane, row_vectors = shape.in_rows * staged_row, staged_row // vector
    in_rows, row_words, plane_words = shape.in_rows, shape.row_words, shape.plane_words
    row_slots, row_quads = shape.row_slots, -(-shape.row_slots // 4)
    staged_columns, all_staged = shape.staged_columns, 4 * row_quads <= shape.staged_columns
    split, halves, plane_sources = shape.split, shape.values_per_word == 2, shape.plane_sources
    multiply = multiply_halves if halves else multiply_tf32
    scale_at = last_scale(shape)
    low_words = planes * plane_words
    windows, window_table = shape.windows, shape.window_offsets
    window_positions = shape.window_positions
    tail_steps, tail_table = shape.tail_steps, shape.tail_offsets
    window_words, weight_words = 2 * round_up(shape.window_slots, 2), 4 * kernel_w
    many_parts = COLUMNS // window_positions > 2
    sums_apart, part_sums = shape.sums_apart, 4 * window_positions
    part_words = shape.steps * WARP * 4
    chunk_words, fragment_words = shape.parts * part_words, shape.fragment_words

    record_channels, records = shape.record_channels, shape.records
    record_entries = record_channels * spatial_warps
    group_channels, group_count = shape.group_channels, out_channels // shape.group_channels
    group_records = group_channels // record_channels
    tile_positions = out_d * row_tiles * column_tiles
    group_entries = group_records * tile_positions
    records_at_once, load_records = record_loader(group_entries, shape.parked > 0)
    found_values = 2 * records_at_once
    share_of_group = 1 / (group_channels * out_d * out_plane)

    unscale_at, records_at = shape.unscale_at, shape.records_at
    sample_record_words = shape.sample_record_words

    staged_input_at = shape.staged_input_at
    run_values, whole_rows, out_row = shape.store, shape.whole_rows, shape.out_row
    sure_columns, channel_stride = shape.sure_columns, shape.channel_stride
    even_rows = out_row % 2 == 0
    bulk_store = shape.bulk_store
    draw_streams = stream_drawer(shape, (0, 1), (8, 0))

    @cuda.jit(device=True)
    def together():
        """Wait for the threads that convolve."""
        ptx.barrier(CONVOLVING, int32(threads))

    @cuda.jit(device=True)
    def packing_together():
        """Wait for the threads that pack."""
        ptx.barrier(PACKING, int32(packing))

    @cuda.jit(device=True)
    def packing_thread():
        """Number of a thread among those that pack."""
        return uint32(ptx.thread_index() - uint32(first_packing))

    @cuda.jit(device=True)
    def locate(tile, place):
        """Note where a tile lies, in shared memory: registers have better to do than hold it."""
        rest, place[CHANNEL_TILE] = divide(tile, channel_tiles)
        rest, column_tile = divide(rest, column_tiles)
        rest, row_tile = divide(rest, row_tiles)
        place[SAMPLE], place[PLANE] = divide(rest, out_d)
        place[ROW] = row_tile * tile_rows
        place[COLUMN] = column_tile * tile_columns
        place[TILE] = tile
        place[SCALE] = place[SCALE + 1] = 127

    @cuda.jit(device=True)
    def warp_place():
        """Channel, row and column position of this warp in the tile, in warps."""
        warp = int32(ptx.thread_index() // WARP)
        return (
            int32(warp // spatial_warps),
            int32(warp // column_warps % row_warps),
            int32(warp % column_warps),
        )

    # ---- the input: from x to words in shared memory ------------------------------------------

    @cuda.jit(device=True)
    def stage_input(x, staged, place, chunk):
        """Start copying a chunk of the input tile to shared memory, zeros where there is none."""
        n, d, h, w = place[SAMPLE], place[PLANE], place[ROW], place[COLUMN]
        sample = int64(n) * (in_channels * in_d * in_plane)
        first_d = int32(d * stride_d - padding_d)
        first_h = int32(h * stride_h - padding_h)
        first_w = int32(w * stride_w - padding_w - shift)
        position = int32(packing_thread())
        while position < in_rows * row_vectors:
            x_h = int32(first_h + position // row_vectors)
            x_w = int32(first_w + position % row_vectors * vector)
            in_plane_index = int32(x_h * in_w + x_w)
            inside_plane = uint32(x_h) < uint32(in_h) and uint32(x_w) < uint32(in_w)
            for plane in range(staged_planes):
                source = int32(chunk * staged_planes + plane)
                x_d = int32(first_d + source // in_channels * dilation_d)
                inside = inside_plane and source < sources and uint32(x_d) < uint32(in_d)
                x_plane = int32(source % in_channels * in_d + x_d)
                index = sample + int32(int32(x_plane * in_plane) + in_plane_index)
                if not inside:
                    index = sample
                target = uint64(position * vector) + uint64(plane * staged_plane)
                if vector == 4:
                    ptx.copy_async_4(staged, target, x, uint64(index), inside)
                else:
                    ptx.copy_async_1(staged, target, x, uint64(index), inside)
            position = int32(position + packing)

    @cuda.jit(device=True)
    def wait_for_store():
        """Wait, with the barrier that follows, until what was stored may be overwritten."""
        if bulk_store:
            ptx.wait_for_copies_out()

    @cuda.jit(device=True)
    def peak_exponent(staged, peaks):
        """Scale of the staged values: see `scale_exponent`. Infinities have no say in it."""
        peak = float32(0)
        quad = int32(packing_thread())
        while quad < staged_planes * staged_plane // 4:
            for value in ptx.load_4(staged, uint64(4 * quad)):
                peak = max(peak, abs(value))  # max drops a NaN
            quad = int32(quad + packing)
        if peak == INFINITY:
            peak = float32(0)
            i = int32(packing_thread())
            while i < staged_planes * staged_plane:
                value = abs(staged[uint32(i)])
                if value < INFINITY:
                    peak = max(peak, value)
                i = int32(i + packing)
        bits, lane = ptx.warp_max(ptx.float_bits(peak)), ptx.lane_index()
        if lane == 0:
            peaks[packing_thread() // uint32(WARP)] = bits
        packing_together()
        other = peaks[lane] if lane < packing // WARP else bits
        return scale_exponent(ptx.warp_max(other))

    @cuda.jit(device=True)
    def load_row(staged, first):
        """Four staged values, `shift` beyond a multiple of four."""
        a, b, c, d = ptx.load_4(staged, uint64(first))
        if shift == 0:
            return a, b, c, d
        e, f, g, _ = ptx.load_4(staged, uint64(first) + uint64(4))
        if shift == 1:
            return b, c, d, e
        if shift == 2:
            return c, d, e, f
        return d, e, f, g

    @cuda.jit(device=True)
    def load_source(staged, source, index, column):
        """Four staged values of a source of the chunk; zeros where there is no such value."""
        if source < staged_planes and (all_staged or column < staged_columns):
            return load_row(staged, int32(source * staged_plane + index))
        return float32(0), float32(0), float32(0), float32(0)

    @cuda.jit(device=True)
    def store_slots(words, target, column, low, high):
        """Four slots of a row, two words each; the row's last ones may be two only."""
        ptx.store_4(words, target, low[0], high[0], low[1], high[1])
        if column + 2 < row_slots:
            ptx.store_4(words, target + uint64(4), low[2], high[2], low[3], high[3])

    @cuda.jit(device=True)
    def pack_words(staged, words, scale):
        """Turn staged values into slots: four sources as pairs of halves, or two in TF32."""
        position = int32(packing_thread())
        while position < in_rows * row_quads:
            row, column = int32(position // row_quads), int32(position % row_quads * 4)
            index = int32(row * staged_row + column)
            for plane in range(planes):
                target = uint64(row * row_words + 2 * column) + uint64(plane * plane_words)
                source = plane_sources * plane
                a = load_source(staged, source, index, column)
                b = load_source(staged, source + 1, index, column)
                if halves:
                    c = load_source(staged, source + 2, index, column)
                    e = load_source(staged, source + 3, index, column)
                    if split:
                        first, first_rest = split_row(a, b, scale)
                        second, second_rest = split_row(c, e, scale)
                        store_slots(words, target, column, first, second)
                        target += uint64(low_words)
                        store_slots(words, target, column, first_rest, second_rest)
                    else:
                        first, second = pack_row(a, b, scale), pack_row(c, e, scale)
                        store_slots(words, target, column, first, second)
                else:
                    store_slots(words, target, column, tf32_row(a), tf32_row(b))
            position = int32(position + packing)

    # ---- the convolution: from words to accumulators -------------------------------------------

    @cuda.jit(device=True)
    def load_window(words, first, window):
        """Copy the slots under neighbouring positions to registers."""
        for i in range(0, window_words, 4):
            window[i], window[i + 1], window[i + 2], window[i + 3] = ptx.load_4(
                words, uint64(first) + uint64(i)
            )

    @cuda.jit(device=True)
    def sweep(acc, words, first_word, scratch, first_fragment):
        """Add one product of the chunk: all its steps with one part of the weights."""
        window = cuda.local.array(window_words, uint32)
        weights = cuda.local.array(weight_words, uint32)
        sums = cuda.local.array(part_sums, float32)
        windows_at = cuda.const.array_like(window_table)
        lane = int32(ptx.lane_index())
        _, row_warp, column_warp = warp_place()
        row = int32(row_warp * ROWS + lane // 4)
        base = int32(row * (stride_h * row_words) + column_warp * (2 * COLUMNS * stride_w))
        base = int32(base + first_word)
        start = uint64(first_fragment + 4 * lane)
        v = int32(0)
        while v < windows:  # a range would keep two more counters in registers
            first = int32(base + windows_at[4 * v + lane % 4])
            if many_parts:
                for tap in range(kernel_w):
                    step = uint64(v * kernel_w) + uint64(tap)
                    a = ptx.load_4(scratch, start + step * uint64(4 * WARP))
                    weights[4 * tap], weights[4 * tap + 1] = a[0], a[1]
                    weights[4 * tap + 2], weights[4 * tap + 3] = a[2], a[3]
            for part in range(COLUMNS // window_positions):
                cuda.syncwarp()  # or the compiler loads all parts at once, and registers run out
                load_window(words, int32(first + part * (2 * window_positions * stride_w)), window)
                if sums_apart:
                    for i in range(part_sums):
                        sums[i] = float32(0)
                for tap in range(kernel_w):
                    if many_parts:  # loaded once, or the loads alone would take the registers
                        cuda.syncwarp()
                        i = 4 * tap
                        a = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
                    else:
                        step = uint64(v * kernel_w) + uint64(tap)
                        a = ptx.load_4(scratch, start + step * uint64(4 * WARP))
                    for j in range(window_positions):
                        word = 2 * (j * stride_w + tap * dilation_w)
                        b = window[word], window[word + 1]
                        if sums_apart:
                            multiply(sums, 4 * j, a, b)
                        else:
                            multiply(acc, 4 * (part * window_positions + j), a, b)
                if sums_apart:
                    for i in range(part_sums):
                        acc[part * part_sums + i] += sums[i]
            v = int32(v + 1)
        if tail_steps > 0:
            tails_at = cuda.const.array_like(tail_table)
            s = int32(0)
            while s < tail_steps:
                first = int32(base + tails_at[4 * s + lane % 4])
                step = uint64(s) + uint64(windows * kernel_w)
                a = ptx.load_4(scratch, start + step * uint64(4 * WARP))
                for position in range(COLUMNS):
                    b = ptx.load_2(words, uint64(first) + uint64(2 * position * stride_w))
                    if sums_apart:
                        for i in range(4):
                            sums[i] = float32(0)
                        multiply(sums, 0, a, b)
                        for i in range(4):
                            acc[4 * position + i] += sums[i]
                    else:
                        multiply(acc, 4 * position, a, b)
                s = int32(s + 1)

    @cuda.jit(device=True)
    def chunk_exponent(staged, peaks, chunk, before):
        """Exponent of the scale of a staged chunk, `before` that of the chunk before it.

        It may only fall from chunk to chunk: rising it could overflow the sums.
        """
        exponent = int32(127)
        if halves:
            exponent = peak_exponent(staged, peaks)
            if chunk > 0:
                exponent = min(exponent, before)
        return exponent

    @cuda.jit(device=True)
    def clear(acc):
        """Begin a tile."""
        for i in range(ACCUMULATORS):
            acc[i] = float32(0)

    @cuda.jit(device=True)
    def rescale(acc, chunk, exponent, before):
        """Scale the sums as the next chunk will be, whose exponent may have fallen."""
        if halves and chunk > 0 and exponent < before:
            factor = power_of_two(max(int32(127 + exponent - before), int32(0)))
            for i in range(ACCUMULATORS):
                acc[i] *= factor

    @cuda.jit(device=True)
    def packed_tile(place):
        """Number of the set of packed weights that a warp takes."""
        channel_warp, _, _ = warp_place()
        return int32(place[CHANNEL_TILE] * (tile_channels // CHANNELS) + channel_warp)

    @cuda.jit(device=True)
    def add_chunk(acc, scratch, words, channel_tile, chunk):
        """Add the products of a chunk that is packed."""
        first = int32(channel_tile * fragment_words + chunk * chunk_words)
        if split:
            # Smallest products first: what is added to a large sum loses its last bits.
            sweep(acc, words, low_words, scratch, first)
            sweep(acc, words, 0, scratch, int32(first + part_words))
        sweep(acc, words, 0, scratch, first)

    @cuda.jit(device=True)
    def accumulate(acc, x, scratch, words, staged, peaks, place):
        """Convolve the tile, whose first chunk is staged, into `acc`, by warps that also pack.

        Another tile's may be staged after the next barrier.
        """
        clear(acc)
        chunk = int32(0)
        while chunk < chunks:
            if chunk > 0:
                ptx.wait_for_copies()
                together()
            channel_tile = packed_tile(place)
            before = place[SCALE + (chunk + 1) % 2]
            exponent = chunk_exponent(staged, peaks, chunk, before)
            rescale(acc, chunk, exponent, before)
            if ptx.thread_index() == 0:
                place[SCALE + chunk % 2] = exponent
            pack_words(staged, words, power_of_two(exponent))
            together()
            if chunk + 1 < chunks:
                stage_input(x, staged, place, int32(chunk + 1))
            add_chunk(acc, scratch, words, channel_tile, chunk)
            chunk = int32(chunk + 1)

    @cuda.jit(device=True)
    def convolve(acc, x, scratch, tile, place):
        """One tile from beginning to end, by a block that has no other."""
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        staged = memory[staged_input_at:]
        peaks = cuda.shared.array(warps, uint32)
        if cuda.threadIdx.x == 0:
            locate(tile, place)
        cuda.syncthreads()
        stage_input(x, staged, place, 0)
        ptx.wait_for_copies()
        cuda.syncthreads()
        accumulate(acc, x, scratch, words, staged, peaks, place)

    @cuda.jit(device=True)
    def input_unscale(place):
        """The factor that takes the scale of a tile's input back."""
        return power_of_two(254 - place[scale_at]) if halves else float32(1)

    # ---- the statistics: from accumulators to mean and rstd ------------------------------------

    @cuda.jit(device=True)
    def extent(place):
        """Rows and columns of this warp's positions that exist."""
        _, row_warp, column_warp = warp_place()
        rows = int32(out_h - place[ROW] - row_warp * ROWS)
        columns = int32(out_w - place[COLUMN] - column_warp * COLUMNS)
        return (
            min(max(rows, int32(0)), int32(ROWS)),
            min(max(columns, int32(0)), int32(COLUMNS)),
        )

    @cuda.jit(device=True)
    def replace_outside(acc, rows, columns, low, high):
        """Overwrite what lies outside: channel g's with `low`, channel g + 8's with `high`."""
        first_row = int32(2 * int32(ptx.lane_index() % 4))
        for j in range(COLUMNS):
            for r in range(2):
                if first_row + r >= rows or (j >= sure_columns and j >= columns):
                    acc[4 * j + r] = low
                    acc[4 * j + 2 + r] = high

    @cuda.jit(device=True)
    def shuffled_sum(value, lanes):
        """Sum over each run of `lanes` neighbouring lanes, a power of two."""
        distance = lanes // 2
        while distance > 0:
            value += cuda.shfl_xor_sync(FULL_WARP, value, distance)
            distance //= 2
        return value

    @cuda.jit(device=True)
    def warp_moments(acc, moments, place):
        """Count, mean and m2 of the warp's channels to ``moments[:, warp, channel]``.

        Two passes over the registers, mean first, and no division a value.
        """
        rows, columns = extent(place)
        outside = rows < ROWS or columns < COLUMNS
        if outside:
            replace_outside(acc, rows, columns, float32(0), float32(0))
        low, high = float32(0), float32(0)
        for j in range(COLUMNS):
            low += acc[4 * j] + acc[4 * j + 1]
            high += acc[4 * j + 2] + acc[4 * j + 3]
        count = float32(int32(rows * columns))
        share = float32(1) / max(count, float32(1))
        low, high = shuffled_sum(low, 4) * share, shuffled_sum(high, 4) * share
        if outside:
            replace_outside(acc, rows, columns, low, high)
        low_m2, high_m2 = float32(0), float32(0)
        for j in range(COLUMNS):
            for r in range(2):
                deviation = acc[4 * j + r] - low
                low_m2 += deviation * deviation
                deviation = acc[4 * j + 2 + r] - high
                high_m2 += deviation * deviation
        low_m2, high_m2 = shuffled_sum(low_m2, 4), shuffled_sum(high_m2, 4)
        warp, g = ptx.thread_index() // WARP, ptx.lane_index() // 4
        if ptx.lane_index() % 4 == 0:
            moments[0, warp, g], moments[0, warp, g + 8] = count, count
            moments[1, warp, g], moments[1, warp, g + 8] = low, high
            moments[2, warp, g], moments[2, warp, g + 8] = low_m2, high_m2

    @cuda.jit(device=True)
    def publish_sums(scratch, bias, moments, place):
        """Publish sum and sum of squares of the tile's records of channels.

        A thread takes one (channel, warp) of `moments`; a record's lie in neighbouring lanes. Sums
        are in fp64, where the difference of mean square and squared mean, which comes of them in
        the end, keeps all digits that fp32 values have.
        """
        entry = int32(ptx.thread_index())
        if entry // WARP * WARP < CHANNELS * warps:  # whole warps: they shuffle
            c = int32(min(entry, CHANNELS * warps - 1) // spatial_warps)
            k = int32(place[CHANNEL_TILE] * tile_channels + c)
            stored = entry < CHANNELS * warps and entry % record_entries == 0 and k < out_channels
            k = min(k, int32(out_channels - 1))
            warp = c // CHANNELS * spatial_warps + entry % spatial_warps
            unit = input_unscale(place) * ptx.bits_float(scratch[uint64(unscale_at + k)])
            count = float64(moments[0, warp, c % CHANNELS])
            mean = float64(moments[1, warp, c % CHANNELS] * unit + bias[uint64(k)])
            m2 = float64(moments[2, warp, c % CHANNELS] * unit * unit)
            total = shuffled_sum(count * mean, record_entries)
            squares = shuffled_sum(m2 + count * mean * mean, record_entries)
            if stored:
                record = int64(place[SAMPLE]) * records + k // record_channels
                record = record * tile_positions + tile_position(place)
                at = uint64(records_at + record * RECORD_WORDS)
                ptx.publish(scratch, at, present(total))
                ptx.publish(scratch, at + uint64(2), present(squares))

    @cuda.jit(device=True)
    def tile_position(place):
        """Number of a tile among its sample's tiles of the same channels."""
        row = int32(place[PLANE] * row_tiles + place[ROW] // tile_rows)
        return int32(int32(row * column_tiles) + place[COLUMN] // tile_columns)

    @cuda.jit(device=True)
    def present(value):
        """The value; if it is a NaN, one whose bits do not stand for an absent record."""
        if ptx.high_bits(value) == ABSENT:
            return float64(math.nan)
        return value

    @cuda.jit(device=True)
    def keep_statistics(kept, mean, rstd, group, first_k, place):
        """Write mean and rstd of a group to memory, for the first tile of its first channel."""
        if group * group_channels >= first_k and tile_position(place) == 0:
            at = int64(place[SAMPLE]) * group_count + group
            kept[uint64(at)], kept[uint64(at + kept.size // 2)] = mean, rstd

    @cuda.jit(device=True)
    def pool_group(scratch, eps, kept, group, first_k, place):
        """Mean and rstd of a group, by a warp, from the records of all tiles of the sample.

        Records that are not there yet are waited for. `kept`, (2, N, G) or empty, takes what a
        backward pass will want to know, unless the group begins before channel `first_k`.
        """
        found = cuda.local.array(found_values, float64)
        first = records_at + int64(place[SAMPLE]) * sample_record_words
        first = int32(first + int32(group * (group_entries * RECORD_WORDS)))
        total, squares = float64(0), float64(0)
        entry = int32(ptx.lane_index())
        while entry - ptx.lane_index() < group_entries:
            load_records(scratch, first, entry, found)
            for i in range(records_at_once):
                total += found[2 * i]
                squares += found[2 * i + 1]
            entry = int32(entry + records_at_once * WARP)
        mean = shuffled_sum(total, WARP) * share_of_group
        variance = shuffled_sum(squares, WARP) * share_of_group - mean * mean
        if variance < 0:  # of equal values, by rounding
            variance = float64(0)
        centre, rstd = float32(mean), float32(1) / math.sqrt(float32(variance) + eps)
        if kept.size > 0 and ptx.lane_index() == 0:
            keep_statistics(kept, centre, rstd, group, first_k, place)
        return centre, rstd

    @cuda.jit(device=True)
    def group_statistics(scratch, eps, statistics, kept, place):
        """Mean and rstd of each of the tile's channels to ``statistics[:, channel]``."""
        first_k = int32(place[CHANNEL_TILE] * tile_channels)
        last_k = min(int32(first_k + tile_channels), out_channels) - 1
        group = int32(first_k // group_channels + ptx.thread_index() // WARP)
        while group <= last_k // group_channels:
            centre, rstd = pool_group(scratch, eps, kept, group, first_k, place)
            c = int32(max(int32(group * group_channels), first_k) - first_k + ptx.lane_index())
            end = min(int32((group + 1) * group_channels - first_k), tile_channels)
            while c < end:
                statistics[0, c], statistics[1, c] = centre, rstd
                c = int32(c + WARP)
            group = int32(group + warps)
        cuda.syncthreads()

    # ---- the rest: from accumulators to out ----------------------------------------------------

    @cuda.jit(device=True)
    def draw_bits(place, seed, drop_threshold):
        """A lane's share of the mask: a word for channel g and one for g + 8, two rows each."""
        channel_warp, row_warp, column_warp = warp_place()
        lane = int32(ptx.lane_index())
        c = int32(channel_warp * CHANNELS + lane // 4)
        row = int32(row_warp * ROWS + 2 * (lane % 4))
        return draw_streams(place, c, row, column_warp, seed, drop_threshold)

    @cuda.jit(device=True)
    def finish(acc, scratch, bias, gamma, beta, statistics, place, bounds, bits, keep_scale):
        """Normalise, min, clamp and drop, in registers.

        `bounds` are those of `clip_bounds`, already multiplied by the kept values' scale, as gamma
        and beta are here; `bits` are those of `draw_bits`.
        """
        channel_warp, _, _ = warp_place()
        first_k = int32(place[CHANNEL_TILE] * tile_channels)
        first_c = int32(channel_warp * CHANNELS + int32(ptx.lane_index()) // 4)
        for r in range(4):
            c = int32(first_c + r // 2 * 8)
            if first_k + c >= out_channels:  # a channel that is not stored
                c = int32(0)
            k = uint32(first_k + c)
            slope = statistics[1, c] * gamma[k] * keep_scale
            start = (bias[k] - statistics[0, c]) * slope + beta[k] * keep_scale
            slope *= input_unscale(place) * ptx.bits_float(scratch[uint64(unscale_at) + k])
            kept = bits[r // 2]
            for j in range(COLUMNS):
                bit = uint32(kept & uint32(1 << (COLUMNS * (r % 2) + j)))
                acc[4 * j + r] = finish_value(acc[4 * j + r], slope, start, bounds, bit)

    @cuda.jit(device=True)
    def stage_output(acc, staged, place):
        """Bring the finished values into rows in shared memory."""
        channel_warp, row_warp, column_warp = warp_place()
        rows, columns = extent(place)
        lane = int32(ptx.lane_index())
        first = int32(int32(channel_warp * CHANNELS + lane // 4) * channel_stride)
        first = int32(first + int32(row_warp * ROWS + 2 * (lane % 4)) * out_row)
        first = int32(first + column_warp * COLUMNS)
        for r in range(4):
            if 2 * (lane % 4) + r % 2 < rows:
                row = r // 2 * (8 * channel_stride) + r % 2 * out_row
                for j in range(0, COLUMNS, 2):
                    target = uint64(first) + uint64(row + j)
                    if even_rows:
                        if j < sure_columns or j < columns:
                            ptx.store_2(staged, target, acc[4 * j + r], acc[4 * j + 4 + r])
                    else:
                        if j < sure_columns or j < columns:
                            staged[target] = acc[4 * j + r]
                        if j + 1 < sure_columns or j + 1 < columns:
                            staged[target + uint64(1)] = acc[4 * j + 4 + r]

    @cuda.jit(device=True)
    def move_rows(tensor, staged, place, outwards, warp):
        """Move the tile's channels between shared memory and a tensor of the output's shape.

        Out of shared memory, or into it by asynchronous copies; neighbours move together. This
        is number `warp` of the warps that have their share of channels.
        """
        n, d, h, w = place[SAMPLE], place[PLANE], place[ROW], place[COLUMN]
        height, width = min(tile_rows, int32(out_h - h)), min(tile_columns, int32(out_w - w))
        if whole_rows:  # one run of values a channel
            height, width = 1, int32(height * out_w)
        lane = int32(ptx.lane_index())
        first_k = int32(place[CHANNEL_TILE] * tile_channels)
        c = int32(warp * warp_channels)
        end = min(int32(c + warp_channels), int32(out_channels - first_k))
        while c < end:
            start = (int64(n) * out_channels + first_k + c) * (out_d * out_plane)
            start += int32(d * out_plane + h * out_w + w)
            for row in range(height):
                i = int32(lane * run_values)
                while i < width:
                    there = uint64(start + int32(row * out_w + i))
                    here = uint64(int32(c * channel_stride + row * out_row + i))
                    if not outwards:
                        if run_values == 4:
                            ptx.copy_async_4(staged, here, tensor, there, True)
                        else:
                            ptx.copy_async_1(staged, here, tensor, there, True)
                    elif run_values == 4:
                        values = ptx.load_4(staged, here)
                        ptx.store_4(tensor, there, values[0], values[1], values[2], values[3])
                    else:
                        tensor[there] = staged[here]
                    i = int32(i + WARP * run_values)
            c = int32(c + 1)

    @cuda.jit(device=True)
    def copy_output(staged, out, place, warp):
        """Let the copy engine write the staged channels, a run of rows each."""
        n, d, h = place[SAMPLE], place[PLANE], place[ROW]
        values = int32(min(tile_rows, int32(out_h - h)) * out_w)
        first_k = int32(place[CHANNEL_TILE] * tile_channels)
        # The engine takes a warp's requests one after the other: every warp has its share.
        c = int32(warp * warp_channels + ptx.lane_index())
        if ptx.lane_index() < warp_channels and first_k + c < out_channels:
            start = (int64(n) * out_channels + first_k + c) * (out_d * out_plane)
            start += int32(d * out_plane + h * out_w)
            ptx.copy_out(out, uint64(start), staged, uint64(int32(c * channel_stride)), values)

    @cuda.jit(device=True)
    def write_output(staged, out, place, warp):
        """Write a warp's share of the staged tile to `out`, after a barrier."""
        if bulk_store:
            copy_output(staged, out, place, warp)
        else:
            move_rows(out, staged, place, True, warp)

    @cuda.jit(device=True)
    def hand_over():
        """Let what this thread has staged be seen by whoever writes it, after a barrier."""
        if bulk_store:
            ptx.hand_to_copy_engine()

    @cuda.jit(device=True)
    def store(acc, staged, out, place):
        """Write the tile to `out` by way of shared memory."""
        stage_output(acc, staged, place)
        hand_over()
        cuda.syncthreads()
        write_output(staged, out, place, int32(ptx.thread_index() // WARP))

    return TileFunctions(
        locate,
        warp_place,
        stage_input,
        accumulate,
        convolve,
        input_unscale,
        extent,
        tile_position,
        draw_bits,
        warp_moments,
        publish_sums,
        group_statistics,
        finish,
        move_rows,
        store,
        wait_for_store,
        together,
        packing_together,
        packing_thread,
        chunk_exponent,
        pack_words,
        clear,
        rescale,
        packed_tile,
        add_chunk,
        pool_group,
        stage_output,
        hand_over,
        write_output,
    )
