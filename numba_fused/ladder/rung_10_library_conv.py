"""The library's convolution, our statistics and everything after: for wide convolutions.

With many channels a convolution is a matrix product, and the vendor's library has spent years
on those. What it leaves to do is reading its output twice: once for the statistics, once to
apply them with min, clamp and dropout in the same breath. The convolution's bias is added on
the way, which spares the library a pass of its own.

Launch: cuDNN's convolution without bias; then two kernels with `tiles_per_group` blocks for each
        (sample, group), THREADS threads each, ELEMENTS_PER_THREAD values a thread, a block's
        stride apart, so that neighbours stay coalesced.
Shapes: z, out flat, (N * K * D * H * W,); partial (3, N * G * tiles_per_group).
Bytes:  the convolution reads x and writes z; both kernels read z, the second writes out. With E
        the bytes of z: x + 2 E read, 2 E written.

Three things keep the instructions down, which is what binds such kernels. A thread's values are
reduced in two passes over its registers, mean first, then squared deviations: exact like
Welford's update and free of its division per value. The mask is drawn by streams, not by values:
a thread walks a stream once, leaves its 16 decisions as bits in shared memory, and every value
picks up its own bit. And channel, row and column of a value are not divided out of its index but
carried along, like the digits of a clock, as the thread steps from one value to the next.
"""

from __future__ import annotations

import torch
from numba import cuda, float32, int32, uint32, uint64

from numba_fused.device.convolution import divide
from numba_fused.device.launch import Launcher
from numba_fused.device.pointwise import clamp, minimum, normalise
from numba_fused.device.reductions import MOMENTS_SHAPE, block_moments, merge, reciprocal_std
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.reference import convolution, full_precision
from numba_fused.rng import RUN, keep_bits
from numba_fused.spec import BlockSpec

THREADS = 256
ELEMENTS_PER_THREAD = 16
TILE = THREADS * ELEMENTS_PER_THREAD
STREAMS = TILE + 1  # a row of width 1 has one stream a value; a tile may begin inside a run


@cuda.jit(device=True)
def advance(high, low, step_high, step_low, base):
    """Add two-digit numbers whose low digit counts to `base`: ``(high, low) + step``."""
    high, low = int32(high + step_high), int32(low + step_low)
    if low >= base:
        high, low = int32(high + 1), int32(low - base)
    return high, low


@cuda.jit(launch_bounds=THREADS)
def moments_kernel(z, bias, partial, group_size, num_groups):
    """Moments of one tile of ``z + bias`` in ``partial[:, block]``."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
    values = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
    tiles_per_group = (group_size + TILE - 1) // TILE
    group, tile = cuda.blockIdx.x // tiles_per_group, cuda.blockIdx.x % tiles_per_group
    channels = bias.size // num_groups
    plane = int32(group_size // channels)
    first_channel = group % num_groups * channels
    first = group * group_size
    count = z.dtype.type(0)
    total, m2 = count, count
    channel, position = divide(int32(tile * TILE + cuda.threadIdx.x), plane)
    channel_step, position_step = divide(THREADS, plane)
    for element in range(ELEMENTS_PER_THREAD):
        i = int32(tile * TILE + element * THREADS + cuda.threadIdx.x)
        if i < group_size:
            values[element] = z[uint64(first + i)] + bias[uint64(first_channel + channel)]
            total += values[element]
            count += float32(1)
        channel, position = advance(channel, position, channel_step, position_step, plane)
    mean = total / max(count, z.dtype.type(1))
    for element in range(ELEMENTS_PER_THREAD):
        i = int32(tile * TILE + element * THREADS + cuda.threadIdx.x)
        if i < group_size:
            deviation = values[element] - mean
            m2 += deviation * deviation
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    if cuda.threadIdx.x == 0:
        partial[0, cuda.blockIdx.x] = count
        partial[1, cuda.blockIdx.x] = mean
        partial[2, cuda.blockIdx.x] = m2


@cuda.jit(launch_bounds=THREADS)
def apply_kernel(
    z,
    bias,
    partial,
    gamma,
    beta,
    out,
    group_size,
    num_groups,
    eps,
    bounds,
    seed,
    width,
    drop_threshold,
    keep_scale,
):
    """Merge the group's partial moments and draw the tile's mask, then apply both."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
    keep = cuda.shared.array(STREAMS, uint32)
    tiles_per_group = (group_size + TILE - 1) // TILE
    group, tile = cuda.blockIdx.x // tiles_per_group, cuda.blockIdx.x % tiles_per_group
    channels = bias.size // num_groups
    plane = int32(group_size // channels)
    first_channel = group % num_groups * channels
    first = group * group_size + tile * TILE
    size = int32(min(TILE, group_size - tile * TILE))

    # The tile begins at column `first_w` of some row; its streams are numbered from there.
    first_row, first_w = first // width, int32(first % width)
    streams_per_row = int32((width + RUN - 1) // RUN)
    first_stream = first_row * streams_per_row + first_w // RUN
    if drop_threshold > 0:
        last = first + size - 1
        last_stream = last // width * streams_per_row + last % width // RUN
        for s in range(cuda.threadIdx.x, last_stream - first_stream + 1, THREADS):
            keep[s] = keep_bits(uint64(seed[0]), uint64(first_stream + s), drop_threshold)

    count = z.dtype.type(0)
    mean, m2 = count, count
    for t in range(cuda.threadIdx.x, tiles_per_group, THREADS):
        p = group * tiles_per_group + t
        count, mean, m2 = merge(count, mean, m2, partial[0, p], partial[1, p], partial[2, p])
    count, mean, m2 = block_moments(count, mean, m2, scratch)  # its barrier publishes `keep` too
    rstd = reciprocal_std(count, m2, eps)

    channel, position = divide(int32(tile * TILE + cuda.threadIdx.x), plane)
    channel_step, position_step = divide(THREADS, plane)
    row, w = divide(int32(first_w + cuda.threadIdx.x), int32(width))
    row_step, w_step = divide(THREADS, int32(width))
    for element in range(ELEMENTS_PER_THREAD):
        i = int32(element * THREADS + cuda.threadIdx.x)
        if i < size:
            k = uint64(first_channel + channel)
            value = z[uint64(first + i)] + bias[k]
            h = normalise(value, mean, rstd, gamma[k], beta[k])
            c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])
            if drop_threshold > 0:
                stream = int32(row * streams_per_row + w // RUN - first_w // RUN)
                scale = keep_scale
                if keep[uint32(stream)] >> uint32(w % RUN) & uint32(1) == 0:
                    scale -= keep_scale
                c *= scale
            out[uint64(first + i)] = c
        channel, position = advance(channel, position, channel_step, position_step, plane)
        row, w = advance(row, w, row_step, w_step, int32(width))


def tiles_per_group(spec: BlockSpec) -> int:
    """Tiles of TILE values that cover one group."""
    return -(-spec.group_size // TILE)


limit = sample_limit


def forward(launch: Launcher, operands: Operands) -> None:
    """The library's convolution in full fp32, then two launches."""
    spec, out = operands.spec, operands.out
    blocks = operands.group_count * tiles_per_group(spec)
    partial = torch.empty((3, blocks), dtype=out.dtype, device=out.device)
    x, weight = operands.x.view(spec.x_shape), operands.weight.view(spec.weight_shape)
    with full_precision():
        z = convolution(spec, x, weight, None).contiguous().view(-1)
    launch(
        moments_kernel,
        blocks,
        THREADS,
        z,
        operands.bias,
        partial,
        *operands.groups,
    )
    launch(
        apply_kernel,
        blocks,
        THREADS,
        z,
        operands.bias,
        partial,
        operands.gamma,
        operands.beta,
        out,
        *operands.groups,
        operands.eps,
        operands.bounds,
        *operands.dropout,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + 2 E read, 2 E written, and the partial results each way."""
    tensor = spec.output_bytes
    partial = 3 * spec.batch * spec.num_groups * tiles_per_group(spec) * spec.itemsize
    return Ledger(
        bytes_read=convolution_bytes(spec)
        + 3 * vector_bytes(spec)
        + 2 * tensor
        + partial
        + seed_bytes(spec),
        bytes_written=2 * tensor + partial,
        launches=3,
        library_launches=1,
    )
