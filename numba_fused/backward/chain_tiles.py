"""Back through the chain by tensor-core tiles: from grad_out to the convolution's gradient.

A tile is forward's (`device.tensor_tile`): its convolution is computed once more and stays in
registers, in which a lane holds channels g and g + 8, rows 2 t and 2 t + 1 and 16 columns. What
backward needs besides is the same tile of grad_out, staged in shared memory.

Two such passes are needed, because dz takes the two means of its whole group:

    sums        g = grad_out * mask where the chain passes a gradient; its sums and, one bit a
                value, where it passes: neither mask nor bounds are looked at again
    gradient    dz = rstd * (g * gamma - mean(g * gamma) - xhat * mean(g * gamma * xhat))

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
    ACCUMULATORS,
    CHANNEL_TILE,
    COLUMN,
    INFINITY,
    PLACE_SIZE,
    PLANE,
    ROW,
    SAMPLE,
    SCALE,
    power_of_two,
    scale_exponent,
    tile_functions,
)
from numba_fused.device.tile_shape import CHANNELS, COLUMNS, ROWS, TileShape

FULL_WARP = 0xFFFFFFFF
POSITION_WORDS = CHANNELS // 2  # of dz, for 16 channels of a position
# Of a tile's channel: sums of g and of g * xhat, the largest |g|, the exponent of x's scale.
RECORD_VALUES = 4
MEANS_THREADS = 256
# A scale beyond 2^100 would have its products with rstd and gamma overflow.
LARGEST_SCALE = 127 + 100


class ChainKernels(NamedTuple):
    """The kernels for one `TileShape`, in the order in which they are launched."""

    statistics: Any
    pool: Any
    sums: Any
    means: Any
    gradient: Any


@cache
def chain_kernels(shape: TileShape) -> ChainKernels:
    """The kernels, specialised on the compile-time numbers of a tile."""
    f = tile_functions(shape)
    convolve, publish_sums, pool_statistics = f.convolve, f.publish_sums, f.group_statistics
    warp_place, extent, input_unscale = f.warp_place, f.extent, f.input_unscale
    tile_position, draw_bits, move_rows = f.tile_position, f.draw_bits, f.move_rows

    threads, warps = shape.threads, shape.warps
    spatial_warps = shape.row_warps * shape.column_warps
    channel_tiles, row_tiles, column_tiles = shape.tiles
    tile_channels, tiles_per_sample = shape.channels, shape.tiles_per_sample
    out_channels, group_channels = shape.out_channels, shape.group_channels
    out_d, out_h, out_w = shape.out_size
    out_plane, group_count = out_h * out_w, out_channels // group_channels
    tile_positions = out_d * row_tiles * column_tiles
    last_scale = SCALE + (shape.chunks - 1) % 2
    unscale_at, split, chunk_channels = shape.unscale_at, shape.split, shape.channel_warps
    out_row, channel_stride = shape.out_row, shape.channel_stride
    in_pairs = out_row % 2 == 0 and out_w % 2 == 0
    position_words = POSITION_WORDS * shape.packed_tiles
    group_size = group_channels * out_d * out_plane
    share_of_group, root_of_group = 1 / group_size, float32(math.sqrt(group_size))
    means_warps = MEANS_THREADS // WARP
    moments_shape, statistics_shape = (3, warps, CHANNELS), (2, tile_channels)
    sums_shape, totals_shape = (warps, CHANNELS, RECORD_VALUES), (warps, CHANNELS)
    channels_shape, groups_shape = (3, out_channels), (2, group_count)
    bounds_of_launch = (threads, shape.blocks_per_processor)

    # ---- the group norm's statistics, if forward did not keep them ------------------------------

    @cuda.jit(launch_bounds=bounds_of_launch)
    def statistics_kernel(x, scratch, bias):
        """Convolve one tile and leave its channels' sums in `scratch`."""
        moments = cuda.shared.array(moments_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        convolve(acc, x, scratch, int32(cuda.blockIdx.x), place)
        publish_sums(acc, scratch, bias, moments, place)

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
    def load_pair(staged, at, columns):
        """Two neighbours of a staged row; zero beyond the last of its columns."""
        first, second = float32(0), float32(0)
        if columns > 0:
            if in_pairs:
                first, second = ptx.load_2(staged, uint64(at))
            else:
                first = staged[uint64(at)]
                if columns > 1:
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
    def normalising(scratch, bias, mean, rstd, place, k):
        """Factor and summand that make xhat of an accumulator of channel `k`."""
        group = uint64(int32(place[SAMPLE] * group_count + k // group_channels))
        scale = rstd[group]
        unit = input_unscale(place) * ptx.bits_float(scratch[uint64(unscale_at + k)])
        return scale * unit, (bias[uint64(k)] - mean[group]) * scale

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

    # ---- the first pass: sums of g, and where the chain passes it -------------------------------

    @cuda.jit(device=True)
    def sum_channel(acc, staged, bits, half, of_warps, channel, bounds, keep_scale):
        """Leave the sums and largest values of a lane's channel; where it passes a gradient."""
        place, scratch, bias, gamma, beta, mean, rstd = channel
        lane = int32(ptx.lane_index())
        first_row = int32(2 * (lane % 4))
        rows, columns = extent(place)
        k, exists = channel_of_lane(place, half)
        scale, shift = normalising(scratch, bias, mean, rstd, place, k)
        slope, start = gamma[uint64(k)], beta[uint64(k)]
        sum_g, sum_gx, largest_g = float32(0), float32(0), float32(0)
        passed = uint32(0)
        for r in range(2):
            at = int32(staged_row(first_row + r) + half * (8 * channel_stride))
            inside = columns if exists and first_row + r < rows else int32(0)
            for j in range(0, COLUMNS, 2):
                pair = load_pair(staged, int32(at + j), int32(inside - j))
                for e in range(2):
                    xhat = acc[4 * (j + e) + 2 * half + r] * scale + shift
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
            warp, c = ptx.thread_index() // WARP, lane // 4 + 8 * half
            of_warps[warp, c, 0], of_warps[warp, c, 1] = sum_g, sum_gx
            of_warps[warp, c, 2] = largest_g
        return passed

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
        of_warps = cuda.shared.array(sums_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        tile = int32(first_sample * tiles_per_sample + cuda.blockIdx.x)
        convolve(acc, x, scratch, tile, place)
        cuda.syncthreads()  # the words are not needed any more: grad_out goes there
        move_rows(grad_out, staged, place, False)
        # The mask is drawn while grad_out is on its way.
        low, high = draw_bits(place, seed, drop_threshold)
        ptx.wait_for_copies()
        cuda.syncthreads()
        channel = place, scratch, bias, gamma, beta, mean, rstd
        low = sum_channel(acc, staged, low, 0, of_warps, channel, bounds, keep_scale)
        high = sum_channel(acc, staged, high, 1, of_warps, channel, bounds, keep_scale)
        at = int64(cuda.blockIdx.x) * (threads * 2) + 2 * int32(ptx.thread_index())
        ptx.store_2(passes, uint64(at), low, high)
        cuda.syncthreads()

        c = int32(ptx.thread_index())
        if c < tile_channels and place[CHANNEL_TILE] * tile_channels + c < out_channels:
            first = c // CHANNELS * spatial_warps
            sum_g, sum_gx, largest_g = float32(0), float32(0), float32(0)
            for i in range(spatial_warps):
                sum_g += of_warps[first + i, c % CHANNELS, 0]
                sum_gx += of_warps[first + i, c % CHANNELS, 1]
                largest_g = max(largest_g, of_warps[first + i, c % CHANNELS, 2])
            record = uint64(RECORD_VALUES * record_of(place, first_sample, c))
            exponent = float32(place[last_scale])
            ptx.store_4(records, record, sum_g, sum_gx, largest_g, exponent)

    # ---- between the passes: what dz takes of its group, and its scale --------------------------

    @cuda.jit(launch_bounds=(MEANS_THREADS, 1))
    def means_kernel(records, gamma, rstd, sum_g, sum_gx, coefficients, scales, first_sample):
        """Pool the records of one sample a block.

        Writes the sums of each channel, (N, K) each; four coefficients of dz for each (sample,
        channel), of which three are used (see `gradient_kernel`); and for each sample the biased
        exponents of the scales of dz and of x.
        """
        of_channels = cuda.shared.array(channels_shape, float32)
        of_groups = cuda.shared.array(groups_shape, float32)
        bounds = cuda.shared.array(means_warps, uint32)
        sample = int32(cuda.blockIdx.x)
        n = int32(first_sample + sample)
        thread, lane = int32(ptx.thread_index()), int32(ptx.lane_index())
        warp = int32(thread // WARP)
        k = warp
        while k < out_channels:
            total_g, total_gx = float64(0), float64(0)
            largest_g, least_scale = uint32(0), uint32(255)
            i = lane
            while i < tile_positions:
                record = (int64(sample) * out_channels + k) * tile_positions + i
                values = ptx.load_4(records, uint64(RECORD_VALUES * record))
                total_g += values[0]
                total_gx += values[1]
                # Of floats that are not negative, the largest has the largest bits.
                largest_g = max(largest_g, ptx.float_bits(values[2]))
                least_scale = min(least_scale, uint32(values[3]))
                i = int32(i + WARP)
            total_g, total_gx = warp_sum(total_g), warp_sum(total_gx)
            largest_g = ptx.warp_max(largest_g)
            least_scale = uint32(255) - ptx.warp_max(uint32(uint32(255) - least_scale))
            if lane == 0:
                sum_g[uint64(int64(n) * out_channels + k)] = total_g
                sum_gx[uint64(int64(n) * out_channels + k)] = total_gx
                of_channels[0, k], of_channels[1, k] = total_g, total_gx
                of_channels[2, k] = ptx.bits_float(largest_g)
                if k == 0:
                    scales[2 * n + 1] = int32(least_scale)
            k = int32(k + means_warps)
        cuda.syncthreads()

        bound = uint32(0)
        group = thread
        while group < group_count:
            from_mean, from_variance, largest_g = float64(0), float64(0), float32(0)
            for c in range(group_channels):
                k = int32(group * group_channels + c)
                slope = gamma[uint64(k)]
                from_mean += float64(slope) * of_channels[0, k]
                from_variance += float64(slope) * of_channels[1, k]
                largest_g = max(largest_g, abs(slope) * of_channels[2, k])
            scale = rstd[uint64(int32(n * group_count + group))]
            mean_g = float32(from_mean * share_of_group)
            mean_gx = float32(from_variance * share_of_group)
            of_groups[0, group], of_groups[1, group] = scale * mean_g, scale * mean_gx
            # No xhat is larger: their squares add up to the size of the group.
            most = scale * (largest_g + abs(mean_g) + root_of_group * abs(mean_gx))
            if most < INFINITY:
                bound = max(bound, ptx.float_bits(most))
            group = int32(group + MEANS_THREADS)
        bound = ptx.warp_max(bound)
        if lane == 0:
            bounds[warp] = bound
        cuda.syncthreads()
        for w in range(means_warps):
            bound = max(bound, bounds[w])
        exponent = min(scale_exponent(bound), int32(LARGEST_SCALE))
        if thread == 0:
            scales[2 * n] = exponent
        factor = power_of_two(exponent)
        k = thread
        while k < out_channels:
            group = int32(k // group_channels)
            slope = gamma[uint64(k)] * rstd[uint64(int32(n * group_count + group))]
            ptx.store_4(
                coefficients,
                uint64(4 * (int64(n) * out_channels + k)),
                slope * factor,
                of_groups[0, group] * factor,
                of_groups[1, group] * factor,
                float32(0),
            )
            k = int32(k + MEANS_THREADS)

    # ---- the second pass: dz --------------------------------------------------------------------

    @cuda.jit(device=True)
    def form_channel(acc, staged, bits, half, of_warps, channel, coefficients, keep_scale):
        """Turn the accumulators of a lane's channel into dz, and leave their sum."""
        place, scratch, bias, mean, rstd = channel
        lane = int32(ptx.lane_index())
        first_row = int32(2 * (lane % 4))
        rows, columns = extent(place)
        k, exists = channel_of_lane(place, half)
        scale, shift = normalising(scratch, bias, mean, rstd, place, k)
        of_k = uint64(4 * (int64(place[SAMPLE]) * out_channels + k))
        slope, from_mean, from_variance, _ = ptx.load_4(coefficients, of_k)
        slope *= keep_scale
        total = float32(0)
        for r in range(2):
            at = int32(staged_row(first_row + r) + half * (8 * channel_stride))
            inside = columns if exists and first_row + r < rows else int32(0)
            for j in range(0, COLUMNS, 2):
                pair = load_pair(staged, int32(at + j), int32(inside - j))
                for e in range(2):
                    i = 4 * (j + e) + 2 * half + r
                    xhat = acc[i] * scale + shift
                    value = -(xhat * from_variance + from_mean)
                    if uint32(bits & uint32(1 << (COLUMNS * r + j + e))) != uint32(0):
                        value += pair[e] * slope
                    if j + e >= inside:
                        value = float32(0)
                    total += value
                    acc[i] = value
        total = over_rows(total)
        if lane % 4 == 0:
            of_warps[ptx.thread_index() // WARP, lane // 4 + 8 * half] = total

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
        of_warps = cuda.shared.array(totals_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        tile = int32(first_sample * tiles_per_sample + cuda.blockIdx.x)
        convolve(acc, x, scratch, tile, place)
        cuda.syncthreads()
        move_rows(grad_out, staged, place, False)
        at = int64(cuda.blockIdx.x) * (threads * 2) + 2 * int32(ptx.thread_index())
        bits = ptx.load_2(passes, uint64(at))
        ptx.wait_for_copies()
        cuda.syncthreads()

        channel = place, scratch, bias, mean, rstd
        form_channel(acc, staged, bits[0], 0, of_warps, channel, coefficients, keep_scale)
        form_channel(acc, staged, bits[1], 1, of_warps, channel, coefficients, keep_scale)
        write_gradient(acc, dz, rest, place, first_sample)
        cuda.syncthreads()
        c = int32(ptx.thread_index())
        if c < tile_channels and place[CHANNEL_TILE] * tile_channels + c < out_channels:
            first = c // CHANNELS * spatial_warps
            total = float32(0)
            for i in range(spatial_warps):
                total += of_warps[first + i, c % CHANNELS]
            records[uint64(record_of(place, first_sample, c))] = total

    return ChainKernels(statistics_kernel, pool_kernel, sums_kernel, means_kernel, gradient_kernel)
