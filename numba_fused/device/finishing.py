"""Finish parked tiles: from convolved values in shared memory to the output, by warps of their own.

The warps that convolve (`device.tensor_tile`) hold 64 sums a thread and need 128 registers; those
that finish take a value after the other from shared memory and need half as many, so that an SM
has room for twice as many of them. They are on their way while the others convolve the next tile:
they draw the mask, wait for the sums of the sample's other tiles, and finish in place.

Two teams of warps take the parked tiles in turns: while one waits - for sums, for memory - the
other computes. A warp has channels of its own, from sums to output, and waits for no other; a lane
takes four dropout streams of 16 columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from numba import cuda, float32, int32, uint32, uint64

from numba_fused.device import ptx
from numba_fused.device.tensor_tile import (
    CHANNEL_TILE,
    COLUMN,
    ROW,
    finish_value,
    power_of_two,
    stream_drawer,
    tile_functions,
)
from numba_fused.device.tile_shape import COLUMNS, WARP, TileShape

QUADS = COLUMNS // 4


class FinishingFunctions(NamedTuple):
    """Device functions of one `TileShape`; each is documented where it is defined."""

    finishing_warp: Any
    team: Any
    team_warp: Any
    draw_streams: Any
    find_coefficients: Any
    finish_parked: Any


@cache
def finishing_functions(shape: TileShape) -> FinishingFunctions:
    """The device functions, specialised on the compile-time numbers of a tile."""
    pool_group = tile_functions(shape).pool_group
    first_finishing = shape.first_finishing_thread
    warps, warp_channels = shape.warps, shape.warp_channels
    tile_channels, tile_rows, column_warps = shape.channels, shape.rows, shape.column_warps
    out_channels, (_, out_h, out_w) = shape.out_channels, shape.out_size
    group_channels = shape.group_channels
    out_row, channel_stride = shape.out_row, shape.channel_stride
    unscale_at = shape.unscale_at
    # Positions of a run that exist wherever it begins inside.
    sure_columns = (out_w - 1) % COLUMNS + 1
    # From a lane's first stream to its second and to its third one.
    second_c, second_row = _stream(WARP, tile_rows, column_warps)
    third_c, third_row = _stream(2 * WARP, tile_rows, column_warps)
    draw = stream_drawer(shape, (second_c, second_row), (third_c, third_row))

    @cuda.jit(device=True)
    def finishing_warp():
        """Number of a warp among those that finish."""
        return uint32(ptx.thread_index() - uint32(first_finishing)) // uint32(WARP)

    @cuda.jit(device=True)
    def team():
        """Number of a warp's team."""
        return finishing_warp() // uint32(warps)

    @cuda.jit(device=True)
    def team_warp():
        """Number of a warp in its team."""
        return finishing_warp() % uint32(warps)

    @cuda.jit(device=True)
    def stream_place():
        """Channel, row and run of columns of a lane's first stream in the tile."""
        lane = ptx.lane_index()
        rest = uint32(lane // uint32(column_warps))
        c = uint32(team_warp() * uint32(warp_channels))
        c = int32(c + rest // uint32(tile_rows))
        return c, int32(rest % uint32(tile_rows)), int32(lane % uint32(column_warps))

    @cuda.jit(device=True)
    def draw_streams(place, seed, drop_threshold):
        """The masks of a lane's four streams."""
        c, row, run = stream_place()
        return draw(place, c, row, run, seed, drop_threshold)

    @cuda.jit(device=True)
    def find_coefficients(scratch, parameters, kept, coefficients, place, keep_scale):
        """Slope, start and unscale of the warp's channels, in ``(3, channels of all teams)``.

        With `u` the factor that takes the scale of a tile's input back, ``z * (slope * (u *
        unscale)) + start`` is normalised. Sums of groups that are not there yet are waited for.
        """
        bias, gamma, beta, eps = parameters
        c = int32(team_warp() * uint32(warp_channels))
        first_k = int32(place[CHANNEL_TILE] * tile_channels + c)
        end_k = min(int32(first_k + warp_channels), int32(out_channels))
        k = int32(first_k + ptx.lane_index())
        group = int32(first_k // group_channels)
        while group * group_channels < end_k:
            centre, rstd = pool_group(scratch, eps, kept, group, first_k, place)
            if k < end_k and k // group_channels == group:
                at = uint32(finishing_warp() * uint32(warp_channels) + ptx.lane_index())
                slope = rstd * gamma[uint32(k)] * keep_scale
                start = (bias[uint32(k)] - centre) * slope + beta[uint32(k)] * keep_scale
                coefficients[0, at], coefficients[1, at] = slope, start
                coefficients[2, at] = ptx.bits_float(scratch[uint64(unscale_at + k)])
            group = int32(group + 1)
        cuda.syncwarp()

    @cuda.jit(device=True)
    def finish_quads(parked, first, width, slope, start, bounds, bits):
        """Finish a stream four neighbours at a time.

        Neighbouring lanes begin with different quads, which lie on different banks.
        """
        turn = ptx.lane_index() // uint32(2)
        for i in range(QUADS):
            quad = int32(uint32(turn + uint32(i)) % uint32(QUADS) * uint32(4))
            if quad < width:
                at = uint64(first) + uint64(quad)
                a, b, c, d = ptx.load_4(parked, at)
                kept = uint32(bits >> uint32(quad))
                a = finish_value(a, slope, start, bounds, kept & uint32(1))
                b = finish_value(b, slope, start, bounds, kept & uint32(2))
                c = finish_value(c, slope, start, bounds, kept & uint32(4))
                d = finish_value(d, slope, start, bounds, kept & uint32(8))
                ptx.store_4(parked, at, a, b, c, d)

    @cuda.jit(device=True)
    def finish_pairs(parked, first, width, slope, start, bounds, bits):
        """Finish a stream two neighbours at a time; all are loaded before one is stored."""
        values = cuda.local.array(COLUMNS, float32)
        for j in range(0, COLUMNS, 2):
            if j < sure_columns or j < width:
                values[j], values[j + 1] = ptx.load_2(parked, uint64(first) + uint64(j))
        for j in range(0, COLUMNS, 2):
            if j < sure_columns or j < width:
                a = finish_value(values[j], slope, start, bounds, bits & uint32(1 << j))
                b = finish_value(values[j + 1], slope, start, bounds, bits & uint32(2 << j))
                ptx.store_2(parked, uint64(first) + uint64(j), a, b)

    @cuda.jit(device=True)
    def finish_singly(parked, first, width, slope, start, bounds, bits):
        """Finish a stream one value after the other."""
        for j in range(COLUMNS):
            if j < sure_columns or j < width:
                at = uint64(first) + uint64(j)
                kept = uint32(bits & uint32(1 << j))
                parked[at] = finish_value(parked[at], slope, start, bounds, kept)

    finish_stream = finish_singly
    if out_w % 4 == 0:
        finish_stream = finish_quads
    elif out_row % 2 == 0:
        finish_stream = finish_pairs

    @cuda.jit(device=True)
    def finish_pair(parked, coefficients, c, row, run, place, unscale, bounds, bits):
        """Finish two streams, of which the first is of channel `c` and `row` of the tile."""
        width = min(int32(out_w - place[COLUMN] - run * COLUMNS), int32(COLUMNS))
        channels = int32(out_channels - place[CHANNEL_TILE] * tile_channels)
        for _ in range(2):
            if c < channels and place[ROW] + row < out_h and width > 0:
                first = int32(int32(c * channel_stride) + int32(row * out_row) + run * COLUMNS)
                at = uint32(team() * uint32(tile_channels) + c)
                slope = coefficients[0, at] * (unscale * coefficients[2, at])
                finish_stream(parked, first, width, slope, coefficients[1, at], bounds, bits)
            c, row = int32(c + second_c), int32(row + second_row)
            bits = uint32(bits >> uint32(COLUMNS))

    @cuda.jit(device=True)
    def finish_parked(parked, coefficients, exponent, place, bounds, bits):
        """Normalise, min, clamp and drop a lane's four streams, in place.

        `exponent` is the biased one of the scale of the tile's input; `bounds` are those of
        `clip_bounds`, already multiplied by the kept values' scale.
        """
        c, row, run = stream_place()
        unscale = power_of_two(254 - exponent)
        low, high = bits
        finish_pair(parked, coefficients, c, row, run, place, unscale, bounds, low)
        c, row = int32(c + third_c), int32(row + third_row)
        finish_pair(parked, coefficients, c, row, run, place, unscale, bounds, high)
        cuda.syncwarp()

    return FinishingFunctions(
        finishing_warp, team, team_warp, draw_streams, find_coefficients, finish_parked
    )


def _stream(stream: int, rows: int, column_warps: int) -> tuple[int, int]:
    """Channel and row of a stream of a warp: runs of a row first, then rows, then channels."""
    return stream // (rows * column_warps), stream // column_warps % rows
