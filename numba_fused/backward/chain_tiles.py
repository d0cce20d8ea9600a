"""Back through the chain by tensor-core tiles: from grad_out to the convolution's gradient.

A tile is forward's (`device.tensor_tile`): its convolution is computed once more and stays in
registers, in which a lane holds channels g and g + 8, rows 2 t and 2 t + 1 and 16 columns. What
backward needs besides is the same tile of grad_out, staged in shared memory.

dz takes the two means of its whole group, so there are two steps, and a wait between them:

    sums        g = grad_out * mask where the chain passes a gradient; its sums and, one bit a
                value, where it passes: neither mask nor bounds are looked at again
    gradient    dz = rstd * (g * gamma - mean(g * gamma) - xhat * mean(g * gamma * xhat))

Where the tiles of two samples fit on the GPU together, `chain_kernel` does both: like forward's
rung ``pipelined`` it publishes its sums, waits for those of the sample's other tiles, and
finishes from registers and from grad_out, which still lies in shared memory. Elsewhere each step
is a kernel that convolves for itself, and a third one between them pools the sums.

dz goes to memory as tensor cores want it, channels last and in halves, scaled by a power of two a
sample so that the largest comes close to their range. A *position* (n, d, h, w) has, for each 16
channels, eight words: word i holds channels i and i + 8. With ``precision="ieee"`` a second array
of the same shape holds what rounding to halves left over.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from numba import cuda, float32, float64, int32, int64, uint32, uint64

from numba_fused.device import ptx
from numba_fused.device.convolution import divide
from numba_fused.device.reductions import WARP, warp_sum
from numba_fused.device.tensor_tile import (
    ABSENT,
    ACCUMULATORS,
    CHANNEL_TILE,
    COLUMN,
    INFINITY,
    PLACE_SIZE,
    PLANE,
    ROW,
    SAMPLE,
    TILE,
    last_scale,
    power_of_two,
    record_loader,
    scale_exponent,
    tile_functions,
)
from numba_fused.device.tile_shape import CHANNELS, COLUMNS, RECORD_WORDS, ROWS, TileShape

FULL_WARP = 0xFFFFFFFF
POSITION_WORDS = CHANNELS // 2  # of dz, for 16 channels of a position
# A record is of a tile's channel: bits of the sums of g and of g * xhat, of the largest |g|, and
# how far the exponent of x's scale lies below LARGEST_EXPONENT. Two words are published together.
LARGEST_EXPONENT = 255
NAN_BITS = 0x7FFFFFFF
MEANS_THREADS = 256
# A scale beyond 2^100 would have its products with rstd and gamma overflow.
LARGEST_SCALE = 127 + 100


class ChainKernels(NamedTuple):
    """The kernels for one `TileShape`: `one_pass` is instead of the three before it."""

    statistics: Any
    pool: Any
    sums: Any
    means: Any
    gradient: Any
    one_pass: Any


@cache
def chain_kernels(shape: TileShape) -> ChainKernels:
    """The kernels, specialised on the compile-time numbers of a tile."""
    f = tile_functions(shape)
    convolve, warp_moments, publish_sums = f.convolve, f.warp_moments, f.publish_sums
    pool_statistics = f.group_statistics
    warp_place, extent, input_unscale = f.warp_place, f.extent, f.input_unscale
    tile_position, draw_bits, move_rows = f.tile_position, f.draw_bits, f.move_rows
    locate, stage_input, accumulate = f.locate, f.stage_input, f.accumulate
    scale_at = last_scale(shape)

    threads, warps = shape.threads, shape.warps
    spatial_warps = shape.row_warps * shape.column_warps
    channel_tiles, row_tiles, column_tiles = shape.tiles
    tile_channels, tiles_per_sample = shape.channels, shape.tiles_per_sample
    out_channels, group_channels = shape.out_channels, shape.group_channels
    out_d, out_h, out_w = shape.out_size
    out_plane, group_count = out_h * out_w, out_channels // group_channels
    tile_positions = out_d * row_tiles * column_tiles
    unscale_at, split, chunk_channels = shape.unscale_at, shape.split, shape.channel_warps
    out_row, channel_stride = shape.out_row, shape.channel_stride
    in_pairs = out_row % 2 == 0 and out_w % 2 == 0
    sure_columns = shape.sure_columns if out_channels % CHANNELS == 0 else 0
    position_words = POSITION_WORDS * shape.packed_tiles
    group_size = group_channels * out_d * out_plane
    share_of_group, root_of_group = 1 / group_size, float32(math.sqrt(group_size))
    records_at_once, load_records = record_loader(tile_positions)
    found_values = 2 * records_at_once
    means_warps = MEANS_THREADS // WARP
    moments_shape, statistics_shape = (3, warps, CHANNELS), (2, tile_channels)
    # Small arrays are flat: `chain_kernel` has one memory for all of them, no larger than what
    # `TileShape.static_bytes` counts for moments and statistics.
    warp_channels = warps * CHANNELS
    sums_size, channels_size = 3 * warp_channels, 3 * out_channels
    small_size = sums_size + 2 * tile_channels
    staged_input_at = shape.staged_input_at
    bounds_of_launch = (threads, shape.blocks_per_processor)

    # ---- the group norm's statistics, if forward did not keep them ------------------------------

    @cuda.jit(launch_bounds=bounds_of_launch)
    def statistics_kernel(x, scratch, bias):
        """Convolve one tile and leave its channels' sums in `scratch`."""
        moments = cuda.shared.array(moments_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        convolve(acc, x, scratch, int32(cuda.blockIdx.x), place)
        warp_moments(acc, moments, place)
        cuda.syncthreads()
        publish_sums(scratch, bias, moments, place)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def pool_kernel(scratch, eps, kept):
        """Mean and rstd of each group, (2, N, G): the channels of one tile of a sample a block."""
        statistics = cuda.shared.array(statistics_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        n, channel_tile = divide(int32(cuda.blockIdx.x), channel_tiles)
        if cuda.threadIdx.x == 0:
            place[SAMPLE], place[CHANNEL_TILE] = n, channel_tile
            place[PLANE], place[ROW], place[COLUMN] = 0, 0, 0
        cuda.syncthreads()
        pool_statistics(scratch, eps, statistics, kept, place)

    # ---- what the two passes share --------------------------------------------------------------

    @cuda.jit(device=True)
    def staged_row(row):
        """Where a lane's first value of a row is staged: of its channel g."""
        channel_warp, row_warp, column_warp = warp_place()
        c = int32(channel_warp * CHANNELS + int32(ptx.lane_index()) // 4)
        first = int32(c * channel_stride + int32(row_warp * ROWS + row) * out_row)
        return int32(first + column_warp * COLUMNS)

    @cuda.jit(device=True)
    def load_pair(staged, at, column, columns):
        """Two neighbours of a staged row, at a column; zero beyond the last of its columns."""
        first, second = float32(0), float32(0)
        if in_pairs:
            if column < sure_columns or column < columns:
                first, second = ptx.load_2(staged, uint64(at))
        else:
            if column < sure_columns or column < columns:
                first = staged[uint64(at)]
            if column + 1 < sure_columns or column + 1 < columns:
                second = staged[uint64(at + 1)]
        return first, second

    @cuda.jit(device=True)
    def channel_of_lane(place, half):
        """A lane's channel g or g + 8, and whether it exists; 0 if it does not."""
        channel_warp, _, _ = warp_place()
        c = int32(channel_warp * CHANNELS + int32(ptx.lane_index()) // 4 + 8 * half)
        k = int32(place[CHANNEL_TILE] * tile_channels + c)
        exists = k < out_channels
        return (k if exists else int32(0)), exists

    @cuda.jit(device=True)
    def normalise(acc, half, scratch, bias, mean, rstd, place):
        """Turn the accumulators of a lane's channel into xhat."""
        k, _ = channel_of_lane(place, half)
        group = uint64(int32(place[SAMPLE] * group_count + k // group_channels))
        scale = rstd[group]
        unit = input_unscale(place) * ptx.bits_float(scratch[uint64(unscale_at + k)])
        shift = (bias[uint64(k)] - mean[group]) * scale
        scale *= unit
        for r in range(2):
            for j in range(COLUMNS):
                i = 4 * j + 2 * half + r
                acc[i] = acc[i] * scale + shift

    @cuda.jit(device=True)
    def over_rows(value):
        """Sum over the four lanes that share a channel."""
        value += cuda.shfl_xor_sync(FULL_WARP, value, 1)
        return value + cuda.shfl_xor_sync(FULL_WARP, value, 2)

    @cuda.jit(device=True)
    def largest_over_rows(value):
        """The largest of the four lanes that share a channel; NaNs are dropped."""
        value = max(value, cuda.shfl_xor_sync(FULL_WARP, value, 1))
        return max(value, cuda.shfl_xor_sync(FULL_WARP, value, 2))

    @cuda.jit(device=True)
    def record_of(place, first_sample, c):
        """Number of the record of a tile's channel `c`, counted from a sample on."""
        k = int32(place[CHANNEL_TILE] * tile_channels + c)
        row = int64(place[SAMPLE] - first_sample) * out_channels + k
        return row * tile_positions + tile_position(place)

    @cuda.jit(device=True)
    def warp_channel(half):
        """Where a small array holds a value of a lane's channel, summed over its warp."""
        return int32(
            ptx.thread_index() // WARP * CHANNELS + int32(ptx.lane_index()) // 4 + 8 * half
        )

    @cuda.jit(device=True)
    def first_of_warps(c):
        """Where it holds the first of the warps' values of a tile's channel `c`."""
        return int32(c // CHANNELS * spatial_warps * CHANNELS + c % CHANNELS)

    # ---- the first step: sums of g, and where the chain passes it -------------------------------

    @cuda.jit(device=True)
    def sum_channel(acc, staged, bits, half, of_warps, gamma, beta, place, bounds, keep_scale):
        """Leave the sums and largest values of a lane's channel; where it passes a gradient."""
        lane = int32(ptx.lane_index())
        first_row = int32(2 * (lane % 4))
        rows, columns = extent(place)
        k, exists = channel_of_lane(place, half)
        slope, start = gamma[uint64(k)], beta[uint64(k)]
        sum_g, sum_gx, largest_g = float32(0), float32(0), float32(0)
        passed = uint32(0)
        inside = columns if exists else int32(0)
        for r in range(2):
            row = int32(first_row + r)
            if row < rows:  # a branch, or all loads come first, and registers run out
                at = int32(staged_row(row) + half * (8 * channel_stride))
                for j in range(0, COLUMNS, 2):
                    pair = load_pair(staged, int32(at + j), j, inside)
                    for e in range(2):
                        xhat = acc[4 * (j + e) + 2 * half + r]
                        h = xhat * slope + start
                        kept = uint32(bits & uint32(1 << (COLUMNS * r + j + e)))
                        # What was dropped is multiplied by zero, so that a NaN stays one.
                        g = pair[e] * (keep_scale if kept != uint32(0) else float32(0))
                        if bounds[0] < h and h < bounds[1]:
                            passed = uint32(passed | kept)
                        else:
                            g = float32(0)
                        sum_g += g
                        sum_gx += g * xhat
                        largest_g = max(largest_g, abs(g))
        sum_g, sum_gx, largest_g = over_rows(sum_g), over_rows(sum_gx), largest_over_rows(largest_g)
        if lane % 4 == 0:
            at = warp_channel(half)
            of_warps[at], of_warps[warp_channels + at] = sum_g, sum_gx
            of_warps[2 * warp_channels + at] = largest_g
        return passed

    @cuda.jit(device=True)
    def publish_records(of_warps, records, place, first_sample):
        """Publish the sums of the tile's channels, counted from `first_sample` on."""
        c = int32(ptx.thread_index())
        if c < tile_channels and place[CHANNEL_TILE] * tile_channels + c < out_channels:
            at = first_of_warps(c)
            sum_g, sum_gx, largest_g = float32(0), float32(0), float32(0)
            for _ in range(spatial_warps):
                sum_g += of_warps[at]
                sum_gx += of_warps[warp_channels + at]
                largest_g = max(largest_g, of_warps[2 * warp_channels + at])
                at = int32(at + CHANNELS)
            present = ptx.float_bits(sum_gx)
            if present == ABSENT:  # a NaN: another one will do
                present = uint32(NAN_BITS)
            below = uint32(LARGEST_EXPONENT - place[scale_at])
            record = uint64(RECORD_WORDS * record_of(place, first_sample, c))
            ptx.publish(records, record, ptx.join_words(ptx.float_bits(sum_g), present))
            ptx.publish(
                records, record + uint64(2), ptx.join_words(ptx.float_bits(largest_g), below)
            )

    @cuda.jit(launch_bounds=bounds_of_launch)
    def sums_kernel(
        x,
        scratch,
        bias,
        gamma,
        beta,
        mean,
        rstd,
        grad_out,
        records,
        passes,
        first_sample,
        bounds,
        seed,
        drop_threshold,
        keep_scale,
    ):
        """Sums of g and g * xhat of one tile, and a bit for each value that passes a gradient.

        `bounds` is (lower, upper), strictly between which the chain passes one. A lane's bits are
        two words, one a channel: 16 columns of two rows.
        """
        staged = cuda.shared.array(0, float32)
        of_warps = cuda.shared.array(sums_size, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        tile = int32(first_sample * tiles_per_sample + cuda.blockIdx.x)
        convolve(acc, x, scratch, tile, place)
        cuda.syncthreads()  # the words are not needed any more: grad_out goes there
        move_rows(grad_out, staged, place, False, int32(ptx.thread_index() // WARP))
        # The mask is drawn while grad_out is on its way.
        low, high = draw_bits(place, seed, drop_threshold)
        normalise(acc, 0, scratch, bias, mean, rstd, place)
        normalise(acc, 1, scratch, bias, mean, rstd, place)
        ptx.wait_for_copies()
        cuda.syncthreads()
        low = sum_channel(acc, staged, low, 0, of_warps, gamma, beta, place, bounds, keep_scale)
        high = sum_channel(acc, staged, high, 1, of_warps, gamma, beta, place, bounds, keep_scale)
        at = int64(cuda.blockIdx.x) * (threads * 2) + 2 * int32(ptx.thread_index())
        ptx.store_2(passes, uint64(at), low, high)
        cuda.syncthreads()
        publish_records(of_warps, records, place, first_sample)

    # ---- between the steps: what dz takes of its group, and its scale ---------------------------

    @cuda.jit(device=True)
    def pool_channels(records, first_record, of_channels, step, kept, n, sum_g, sum_gx, scales):
        """Pool the records of a sample, from `first_record` on, a channel a warp of `step`.

        `of_channels`, (3, K), takes the sums of g and g * xhat and the largest |g|. With `kept`,
        memory takes the sums, (N, K) each, and the exponent of the scale of x.
        """
        found = cuda.local.array(found_values, float64)
        k = int32(ptx.thread_index() // WARP)
        while k < out_channels:
            total_g, total_gx = float64(0), float64(0)
            largest_g, below = uint32(0), uint32(0)
            entry = int32(ptx.lane_index())
            first = (first_record + int32(k * tile_positions)) * RECORD_WORDS
            while entry - int32(ptx.lane_index()) < tile_positions:
                load_records(records, first, entry, found)
                for i in range(records_at_once):
                    total_g += ptx.bits_float(ptx.low_bits(found[2 * i]))
                    total_gx += ptx.bits_float(ptx.high_bits(found[2 * i]))
                    # Of floats that are not negative, the largest has the largest bits.
                    largest_g = max(largest_g, ptx.low_bits(found[2 * i + 1]))
                    below = max(below, ptx.high_bits(found[2 * i + 1]))
                entry = int32(entry + records_at_once * WARP)
            total_g, total_gx = warp_sum(total_g), warp_sum(total_gx)
            largest_g, below = ptx.warp_max(largest_g), ptx.warp_max(below)
            if ptx.lane_index() == 0:
                of_channels[k], of_channels[out_channels + k] = total_g, total_gx
                of_channels[2 * out_channels + k] = ptx.bits_float(largest_g)
                if kept:
                    at = uint64(int64(n) * out_channels + k)
                    sum_g[at], sum_gx[at] = total_g, total_gx
                    if k == 0:
                        scales[2 * n + 1] = LARGEST_EXPONENT - int32(below)
            k = int32(k + step)

    @cuda.jit(device=True)
    def pool_groups(of_channels, gamma, rstd, n, step):
        """Turn `of_channels` into the coefficients of dz, but for its scale: a group a thread.

        With them, ``dz = c0 * g - (c1 + c2 * xhat)``. Returns the bits of a bound of dz.
        """
        bound = uint32(0)
        group = int32(ptx.thread_index())
        while group < group_count:
            from_mean, from_variance, largest_g = float64(0), float64(0), float32(0)
            first_k = int32(group * group_channels)
            for c in range(group_channels):
                k = int32(first_k + c)
                slope = gamma[uint64(k)]
                from_mean += float64(slope) * of_channels[k]
                from_variance += float64(slope) * of_channels[out_channels + k]
                largest_g = max(largest_g, abs(slope) * of_channels[2 * out_channels + k])
            scale = rstd[uint64(int32(n * group_count + group))]
            mean_g = float32(from_mean * share_of_group)
            mean_gx = float32(from_variance * share_of_group)
            for c in range(group_channels):
                k = int32(first_k + c)
                of_channels[k] = gamma[uint64(k)] * scale
                of_channels[out_channels + k] = scale * mean_g
                of_channels[2 * out_channels + k] = scale * mean_gx
            # No xhat is larger: their squares add up to the size of the group.
            most = scale * (largest_g + abs(mean_g) + root_of_group * abs(mean_gx))
            if most < INFINITY:
                bound = max(bound, ptx.float_bits(most))
            group = int32(group + step)
        return bound

    @cuda.jit(device=True)
    def gradient_exponent(bound, bounds, of_warps):
        """Exponent of the scale of dz, from the bounds of all threads; has a barrier."""
        bound, lane = ptx.warp_max(bound), ptx.lane_index()
        if lane == 0:
            bounds[ptx.thread_index() // WARP] = bound
        cuda.syncthreads()
        other = bounds[lane] if lane < of_warps else bound
        return min(scale_exponent(ptx.warp_max(other)), int32(LARGEST_SCALE))

    @cuda.jit(launch_bounds=(MEANS_THREADS, 1))
    def means_kernel(records, gamma, rstd, sum_g, sum_gx, coefficients, scales, first_sample):
        """Pool the records of one sample a block.

        Writes the sums of each channel, (N, K) each; four coefficients of dz for each (sample,
        channel), of which three are used (see `gradient_kernel`); and for each sample the biased
        exponents of the scales of dz and of x.
        """
        of_channels = cuda.shared.array(channels_size, float32)
        bounds = cuda.shared.array(means_warps, uint32)
        first_record = int64(cuda.blockIdx.x) * (out_channels * tile_positions)
        n = int32(first_sample + cuda.blockIdx.x)
        pool_channels(
            records, first_record, of_channels, means_warps, True, n, sum_g, sum_gx, scales
        )
        cuda.syncthreads()
        bound = pool_groups(of_channels, gamma, rstd, n, MEANS_THREADS)
        exponent = gradient_exponent(bound, bounds, means_warps)
        k = int32(ptx.thread_index())
        if k == 0:
            scales[2 * n] = exponent
        factor = power_of_two(exponent)
        while k < out_channels:
            ptx.store_4(
                coefficients,
                uint64(4 * (int64(n) * out_channels + k)),
                of_channels[k] * factor,
                of_channels[out_channels + k] * factor,
                of_channels[2 * out_channels + k] * factor,
                float32(0),
            )
            k = int32(k + MEANS_THREADS)

    # ---- the second step: dz --------------------------------------------------------------------

    @cuda.jit(device=True)
    def form_channel(acc, staged, bits, half, of_warps, place, coefficients, keep_scale):
        """Turn xhat of a lane's channel into dz, and leave its sum."""
        lane = int32(ptx.lane_index())
        first_row = int32(2 * (lane % 4))
        rows, columns = extent(place)
        _, exists = channel_of_lane(place, half)
        slope, from_mean, from_variance = coefficients
        slope *= keep_scale
        total = float32(0)
        inside = columns if exists else int32(0)
        for r in range(2):
            row = int32(first_row + r)
            if row < rows:
                at = int32(staged_row(row) + half * (8 * channel_stride))
                for j in range(0, COLUMNS, 2):
                    pair = load_pair(staged, int32(at + j), j, inside)
                    for e in range(2):
                        i = 4 * (j + e) + 2 * half + r
                        value = float32(-from_mean - acc[i] * from_variance)
                        if uint32(bits & uint32(1 << (COLUMNS * r + j + e))) != uint32(0):
                            value += pair[e] * slope
                        if j + e >= inside:
                            value = float32(0)
                        total += value
                        acc[i] = value
        total = over_rows(total)
        if lane % 4 == 0:
            of_warps[warp_channel(half)] = total

    @cuda.jit(device=True)
    def write_totals(of_warps, records, place, first_sample):
        """Write the sums of dz of the tile's channels, counted from `first_sample` on."""
        c = int32(ptx.thread_index())
        if c < tile_channels and place[CHANNEL_TILE] * tile_channels + c < out_channels:
            at = first_of_warps(c)
            total = float32(0)
            for _ in range(spatial_warps):
                total += of_warps[at]
                at = int32(at + CHANNELS)
            records[uint64(record_of(place, first_sample, c))] = total

    @cuda.jit(device=True)
    def load_coefficients(coefficients, place, half):
        """Those of a lane's channel, from memory."""
        k, _ = channel_of_lane(place, half)
        at = uint64(4 * (int64(place[SAMPLE]) * out_channels + k))
        slope, from_mean, from_variance, _ = ptx.load_4(coefficients, at)
        return slope, from_mean, from_variance

    @cuda.jit(device=True)
    def write_gradient(acc, dz, rest, place, first_sample):
        """Write a warp's values: eight lanes have the eight words of a position."""
        rows, columns = extent(place)
        channel_warp, row_warp, column_warp = warp_place()
        lane = int32(ptx.lane_index())
        first_row = int32(2 * (lane % 4))
        h = int32(place[ROW] + row_warp * ROWS + first_row)
        w = int32(place[COLUMN] + column_warp * COLUMNS)
        plane = int64(place[SAMPLE] - first_sample) * out_d + place[PLANE]
        position = plane * out_plane + int32(h * out_w + w)
        word = int32(place[CHANNEL_TILE] * chunk_channels + channel_warp) * POSITION_WORDS
        first = position * position_words + int32(word + lane // 4)
        for r in range(2):
            if first_row + r < rows:
                for j in range(COLUMNS):
                    if j < columns:
                        at = uint64(first + (r * out_w + j) * position_words)
                        low, high = acc[4 * j + r], acc[4 * j + 2 + r]
                        if split:
                            dz[at], rest[at] = ptx.split_halves(low, high)
                        else:
                            dz[at] = ptx.pack_halves(low, high)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def gradient_kernel(
        x,
        scratch,
        bias,
        mean,
        rstd,
        coefficients,
        grad_out,
        passes,
        dz,
        rest,
        records,
        first_sample,
        keep_scale,
    ):
        """dz of one tile, and its sum for each channel, both scaled.

        ``dz = c0 * g - (c1 + c2 * xhat)`` with the coefficients of `means_kernel`. `dz` takes the
        nearest halves, `rest` what they leave over, where there is such an array.
        """
        staged = cuda.shared.array(0, float32)
        of_warps = cuda.shared.array(warp_channels, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        tile = int32(first_sample * tiles_per_sample + cuda.blockIdx.x)
        convolve(acc, x, scratch, tile, place)
        cuda.syncthreads()
        move_rows(grad_out, staged, place, False, int32(ptx.thread_index() // WARP))
        at = int64(cuda.blockIdx.x) * (threads * 2) + 2 * int32(ptx.thread_index())
        bits = ptx.load_2(passes, uint64(at))
        normalise(acc, 0, scratch, bias, mean, rstd, place)
        normalise(acc, 1, scratch, bias, mean, rstd, place)
        ptx.wait_for_copies()
        cuda.syncthreads()
        of_channel = load_coefficients(coefficients, place, 0)
        form_channel(acc, staged, bits[0], 0, of_warps, place, of_channel, keep_scale)
        of_channel = load_coefficients(coefficients, place, 1)
        form_channel(acc, staged, bits[1], 1, of_warps, place, of_channel, keep_scale)
        write_gradient(acc, dz, rest, place, first_sample)
        cuda.syncthreads()
        write_totals(of_warps, records, place, first_sample)

    # ---- both steps in one pass -----------------------------------------------------------------

    @cuda.jit(device=True)
    def scaled_coefficients(of_channels, factor, place, half):
        """Those of a lane's channel, from shared memory."""
        k, _ = channel_of_lane(place, half)
        return (
            of_channels[k] * factor,
            of_channels[out_channels + k] * factor,
            of_channels[2 * out_channels + k] * factor,
        )

    @cuda.jit(device=True)
    def take_ticket(tickets):
        """How many tiles were taken before, of those that were nobody's from the start.

        Tickets count from `ABSENT` on, whose successor is zero.
        """
        return int32(uint32(cuda.atomic.add(tickets, 0, uint32(1)) + uint32(1)))

    @cuda.jit(launch_bounds=bounds_of_launch)
    def chain_kernel(
        x,
        scratch,
        bias,
        gamma,
        beta,
        mean,
        rstd,
        grad_out,
        records,
        tickets,
        sum_g,
        sum_gx,
        scales,
        dz,
        rest,
        dz_records,
        first_sample,
        tiles,
        bounds,
        seed,
        drop_threshold,
        keep_scale,
    ):
        """`tiles` tiles, from x to dz: first ``blockIdx.x``, then whichever is the next.

        What `sums_kernel`, `means_kernel` and `gradient_kernel` do, for shapes with all channels in
        one tile. `records`, of all samples, and the word `tickets` have been marked as absent.

        Blocks take tiles in order, each when it is about to be free. So the tiles of a sample are
        begun one soon after the other, and nobody waits for a block that is late. And every wait
        ends: only the last sample begun can have tiles that are nobody's, too few blocks wait for
        it to be all, and no block that waits has a tile in reserve.
        """
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        staged_input = memory[staged_input_at:]
        # One after the other: the sums of warps; those of channels, which become coefficients.
        small = cuda.shared.array(small_size, float32)
        totals = small[channels_size:]
        peaks = cuda.shared.array(warps, uint32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        next_place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        if cuda.threadIdx.x == 0:
            locate(int32(first_sample * tiles_per_sample + cuda.blockIdx.x), next_place)
        cuda.syncthreads()
        stage_input(x, staged_input, next_place, 0)
        while next_place[TILE] < first_sample * tiles_per_sample + tiles:
            if cuda.threadIdx.x < PLACE_SIZE:
                place[cuda.threadIdx.x] = next_place[cuda.threadIdx.x]
            ptx.wait_for_copies()
            cuda.syncthreads()
            accumulate(acc, x, scratch, words, staged_input, peaks, place)
            cuda.syncthreads()  # the words are not needed any more: grad_out goes there
            warp = int32(ptx.thread_index() // WARP)
            if warp < warps:  # all are: a branch, or registers run out in `accumulate`
                move_rows(grad_out, memory, place, False, warp)
            low, high = draw_bits(place, seed, drop_threshold)  # while it is on its way
            normalise(acc, 0, scratch, bias, mean, rstd, place)
            normalise(acc, 1, scratch, bias, mean, rstd, place)
            ptx.wait_for_copies()
            cuda.syncthreads()
            low = sum_channel(acc, memory, low, 0, small, gamma, beta, place, bounds, keep_scale)
            high = sum_channel(acc, memory, high, 1, small, gamma, beta, place, bounds, keep_scale)
            cuda.syncthreads()
            publish_records(small, records, place, 0)
            cuda.syncthreads()  # the sums of warps are published

            n, first = place[SAMPLE], tile_position(place) == 0
            first_record = int64(n) * (out_channels * tile_positions)
            pool_channels(records, first_record, small, warps, first, n, sum_g, sum_gx, scales)
            cuda.syncthreads()
            if cuda.threadIdx.x == threads - 1:  # groups are pooled by the first threads
                taken = int32(first_sample * tiles_per_sample + cuda.gridDim.x)
                locate(int32(taken + take_ticket(tickets)), next_place)
            bound = pool_groups(small, gamma, rstd, place[SAMPLE], threads)
            exponent = gradient_exponent(bound, peaks, warps)
            if next_place[TILE] < first_sample * tiles_per_sample + tiles:
                stage_input(x, staged_input, next_place, 0)
            if cuda.threadIdx.x == 0 and tile_position(place) == 0:
                scales[2 * place[SAMPLE]] = exponent
            factor = power_of_two(exponent)

            of_channel = scaled_coefficients(small, factor, place, 0)
            form_channel(acc, memory, low, 0, totals, place, of_channel, keep_scale)
            of_channel = scaled_coefficients(small, factor, place, 1)
            form_channel(acc, memory, high, 1, totals, place, of_channel, keep_scale)
            cuda.syncthreads()
            write_totals(totals, dz_records, place, first_sample)
            write_gradient(acc, dz, rest, place, first_sample)
            cuda.syncthreads()  # others read `place`

    return ChainKernels(
        statistics_kernel, pool_kernel, sums_kernel, means_kernel, gradient_kernel, chain_kernel
    )
