"""The library's convolution, our statistics and everything after: for wide convolutions.

With many channels a convolution is a matrix product, and the vendor's library has spent years
on those. What it leaves to do is reading its output twice: once for the statistics, once to
apply them with min, clamp and dropout in the same breath. The convolution's bias is added on
the way, which spares the library a pass of its own.

Launch: cuDNN's convolution without bias; then two kernels whose blocks take one *tile* each, of
        up to THREADS threads with ELEMENTS_PER_THREAD values. A tile lies within one *plane*, the
        D * H * W values of one sample and channel; each of its warps takes consecutive values.
Shapes: z, out flat, (N * K * D * H * W,); partial (3, N * K * moments_tiles).
Bytes:  the convolution reads x and writes z; both kernels read z, the second writes out. With E
        the bytes of z: x + 2 E read, 2 E written.

Such kernels are bound by instructions before they are bound by memory, so whatever can be is done
once a tile and not once a value, and memory is accessed 16 bytes at a time where planes are
aligned to that:

* Within a plane bias, gamma and beta are constants. A bias moves a tile's mean and nothing else,
  so it is added to means, never to values: partial means are relative to the bias of the group's
  first channel, and the apply kernel subtracts what its own channel's bias adds to that.
* A thread's values are reduced in two passes over its registers, mean first, then squared
  deviations: exact like Welford's update and free of its division per value.
* The mask is drawn by streams, not by values: a thread walks a stream once and lays its 16
  decisions down as bits in the order of the tile's values. Bit i belongs to value i, wherever
  rows begin and end. Drawing and merging go on while z is on its way from memory.
* The moments kernel takes its tiles in reverse. It begins with what the convolution wrote last
  and ends with what the apply kernel reads first: either may still be in the L2 cache.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import cuda, float32, int32, int64, uint32, uint64

from numba_fused.device.convolution import divide
from numba_fused.device.pointwise import CLIP, clip_bounds
from numba_fused.device.ptx import load_4, store_4
from numba_fused.device.reductions import (
    MOMENTS_SHAPE,
    WARP,
    block_moments,
    merge,
    merge_partials,
    reciprocal_std,
    store_partial,
    warp_moments,
)
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.reference import convolution, convolution_precision
from numba_fused.rng import RUN, keep_bits
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

THREADS = 128
ELEMENTS_PER_THREAD = 32
VECTOR = 4  # values of one 16-byte access
WORD_BITS = 32
MASK_WORDS = THREADS * ELEMENTS_PER_THREAD // WORD_BITS + 1  # a stream may outreach the tile
PARTIALS_PER_GROUP = 256  # aimed at: each block of the apply kernel merges all of its group's
DROP_ALL = 2**32  # the one threshold that needs 33 bits

# ---- parts of the kernels -----------------------------------------------------------------------


@cuda.jit(device=True)
def relative_bias(bias, channel, channels_per_group):
    """Bias of a channel relative to that of its group's first."""
    _, channel_of_group = divide(channel, channels_per_group)
    return bias[uint32(channel)] - bias[uint32(channel - channel_of_group)]


@cuda.jit(device=True)
def first_of_thread(vector):
    """The first of a thread's values in its tile: a warp's are consecutive, lanes take turns."""
    warp, lane = divide(cuda.threadIdx.x, WARP)
    return int32(warp * (WARP * ELEMENTS_PER_THREAD) + lane * vector)


@cuda.jit(device=True)
def draw_mask(keep, seed, plane_row, start, size, width, drop_threshold):
    """Set bit i of `keep` where value i of the tile survives.

    The tile is ``[start, start + size)`` of a plane whose first row is the output's `plane_row`.
    """
    i = int32(cuda.threadIdx.x)
    while i < MASK_WORDS:
        keep[uint32(i)] = uint32(0)
        i = int32(i + cuda.blockDim.x)
    cuda.syncthreads()

    # Streams are numbered from the beginning of the row in which the tile begins.
    runs = int32(divide(int32(width - 1), RUN)[0] + 1)
    row, column = divide(start, width)
    first_stream = uint64((plane_row + row) * runs)
    stream = int32(divide(column, RUN)[0] + cuda.threadIdx.x)
    row, run = divide(stream, runs)
    position = int32(row * width + run * RUN - column)
    while position < size:
        bits = keep_bits(seed, first_stream + uint64(stream), drop_threshold)
        if run == runs - 1:  # the row may end within the run
            bits = uint32(bits & ((uint32(1) << uint32(width - run * RUN)) - uint32(1)))
        if position < 0:  # the tile begins within the run
            bits, position = uint32(bits >> uint32(-position)), int32(0)
        word, bit = divide(position, WORD_BITS)
        pair = uint64(bits) << uint64(bit)
        cuda.atomic.or_(keep, uint32(word), uint32(pair))
        cuda.atomic.or_(keep, uint32(word + 1), uint32(pair >> uint64(WORD_BITS)))
        stream = int32(stream + cuda.blockDim.x)
        row, run = divide(stream, runs)
        position = int32(row * width + run * RUN - column)


@cache
def make_load_share(vector: int) -> Any:
    """How a thread reads its values, `vector` at a time: VECTOR or 1."""

    @cuda.jit(device=True)
    def load_share(values, z, first, begin, size):
        """Read this thread's values, from ``z[first + begin]`` on; zero beyond the tile's end."""
        first += begin
        for v in range(0, ELEMENTS_PER_THREAD, vector):
            if int32(begin + v * WARP) >= size:
                for e in range(vector):
                    values[v + e] = z.dtype.type(0)
            elif vector == VECTOR:
                loaded = load_4(z, uint64(first + v * WARP))
                values[v], values[v + 1], values[v + 2], values[v + 3] = loaded
            else:
                values[v] = z[uint64(first + v * WARP)]

    return load_share


# ---- the kernels --------------------------------------------------------------------------------


@cache
def make_moments_kernel(vector: int) -> Any:
    """The moments kernel for accesses of `vector` values."""
    load_share = make_load_share(vector)

    @cuda.jit(launch_bounds=THREADS)
    def moments_kernel(
        z, bias, partial, plane_size, tile_size, tiles_per_plane, channels_per_group
    ):
        """Moments of one tile in ``partial[:, tile]``, relative to its group's first bias."""
        scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
        values = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        tile = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        plane, tile_of_plane = divide(tile, tiles_per_plane)
        start = int32(tile_of_plane * tile_size)
        size = int32(min(tile_size, int32(plane_size - start)))
        zero = z.dtype.type(0)
        count, mean, m2 = zero, zero, zero
        begin = first_of_thread(vector)
        while begin < size:
            load_share(values, z, int64(plane) * plane_size + start, begin, size)
            count_b, total, m2_b = zero, zero, zero
            for v in range(0, ELEMENTS_PER_THREAD, vector):
                vector_total = values[v]
                for e in range(1, vector):
                    vector_total += values[v + e]
                total += vector_total
                if int32(begin + v * WARP) < size:
                    count_b += float32(vector)
            mean_b = total / count_b
            for v in range(0, ELEMENTS_PER_THREAD, vector):
                if int32(begin + v * WARP) < size:
                    for e in range(vector):
                        deviation = values[v + e] - mean_b
                        m2_b += deviation * deviation
            count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
            begin = int32(begin + ELEMENTS_PER_THREAD * cuda.blockDim.x)
        count, mean, m2 = block_moments(count, mean, m2, scratch)
        if cuda.threadIdx.x == 0:
            _, channel = divide(plane, bias.size)
            mean += relative_bias(bias, channel, channels_per_group)
            store_partial(partial, tile, count, mean, m2)

    return moments_kernel


@cache
def make_apply_kernel(dtype: str, vector: int, draws: bool) -> Any:
    """The apply kernel for accesses of `vector` values, with dropout or without."""
    clip = CLIP[dtype]
    load_share = make_load_share(vector)

    @cuda.jit(launch_bounds=THREADS)
    def apply_kernel(
        z,
        bias,
        partial,
        gamma,
        beta,
        out,
        plane_size,
        tiles_per_plane,
        partials_per_group,
        channels_per_group,
        eps,
        lower,
        upper,
        seed,
        rows_per_plane,
        width,
        drop_threshold,
        keep_scale,
    ):
        """Draw the tile's mask and merge its group's partial moments, then apply both."""
        affine = cuda.shared.array(3, z.dtype)  # h = (z - affine[0]) * affine[1] + affine[2]
        keep = cuda.shared.array(MASK_WORDS, uint32)
        values = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        tile_size = int32(ELEMENTS_PER_THREAD * cuda.blockDim.x)
        plane, tile_of_plane = divide(cuda.blockIdx.x, tiles_per_plane)
        start = int32(tile_of_plane * tile_size)
        size = int32(min(tile_size, int32(plane_size - start)))
        first = int64(plane) * plane_size + start
        begin = first_of_thread(vector)
        load_share(values, z, first, begin, size)
        if draws:
            plane_row = int64(plane) * rows_per_plane
            draw_mask(keep, uint64(seed[0]), plane_row, start, size, width, drop_threshold)
        if cuda.threadIdx.x >= cuda.blockDim.x - WARP:  # one warp: the last has the fewest streams
            group, _ = divide(plane, channels_per_group)
            own = int32(group * partials_per_group)
            stop = int32(own + partials_per_group)
            count, mean, m2 = merge_partials(partial, own + cuda.laneid, stop, WARP)
            count, mean, m2 = warp_moments(count, mean, m2)
            if cuda.laneid == 0:
                _, channel = divide(plane, bias.size)
                affine[0] = mean - relative_bias(bias, channel, channels_per_group)
                affine[1] = reciprocal_std(count, m2, eps) * gamma[uint32(channel)]
                affine[2] = beta[uint32(channel)]
        cuda.syncthreads()

        centre, scale, shift = affine[0], affine[1], affine[2]
        word, bit = divide(begin, WORD_BITS)
        first += begin
        for v in range(0, ELEMENTS_PER_THREAD, vector):
            if int32(begin + v * WARP) < size:
                bits = uint32(keep[uint32(word + v)] >> uint32(bit)) if draws else uint32(0)
                for e in range(vector):
                    c = clip((values[v + e] - centre) * scale + shift, lower, upper)
                    if draws:
                        kept = keep_scale
                        if uint32(bits & uint32(1 << e)) == uint32(0):
                            kept -= keep_scale
                        c *= kept
                    values[v + e] = c
                i = uint64(first + v * WARP)
                if vector == VECTOR:
                    store_4(out, i, values[v], values[v + 1], values[v + 2], values[v + 3])
                else:
                    out[i] = values[v]

    return apply_kernel


# ---- the launch ---------------------------------------------------------------------------------


class Tiling:
    """How the planes of one call are cut into tiles.

    Attributes
    ----------
    plane_size, channels_per_group : int
    threads : int
        Per block: fewer than THREADS where planes are small.
    tile_size, tiles : int
        Of the apply kernel, the latter per plane.
    moments_tile_size, moments_tiles : int
        The same of the moments kernel: several of the apply kernel's tiles where groups would
        have too many partial results otherwise.
    """

    def __init__(self, spec: BlockSpec) -> None:
        self.plane_size = math.prod(spec.output_size)
        self.channels_per_group = spec.out_channels // spec.num_groups
        self.threads = min(THREADS, WARP * -(-self.plane_size // (WARP * ELEMENTS_PER_THREAD)))
        self.tile_size = self.threads * ELEMENTS_PER_THREAD
        self.tiles = -(-self.plane_size // self.tile_size)
        repeats = -(-self.tiles * self.channels_per_group // PARTIALS_PER_GROUP)
        self.moments_tile_size = self.tile_size * min(repeats, self.tiles)
        self.moments_tiles = -(-self.plane_size // self.moments_tile_size)


def vector_width(plane_size: int, *tensors: torch.Tensor) -> int:
    """Values of one access: VECTOR of 4 bytes where every plane begins on a multiple of 16."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    whole = plane_size % VECTOR == 0 and tensors[0].itemsize == 4
    return VECTOR if aligned and whole else 1


limit = sample_limit
least_capability = (8, 0)  # min and max that keep a NaN


def forward(launch: Launcher, operands: Operands) -> None:
    """The library's convolution, then two launches."""
    spec, out = operands.spec, operands.out
    x, weight = operands.x.view(spec.x_shape), operands.weight.view(spec.weight_shape)
    with convolution_precision(spec):
        z = convolution(spec, x, weight, None).contiguous().view(-1)

    tiling = Tiling(spec)
    vector = vector_width(tiling.plane_size, z, out)
    planes = spec.batch * spec.out_channels
    partial = torch.empty((3, planes * tiling.moments_tiles), dtype=out.dtype, device=out.device)
    launch(
        make_moments_kernel(vector),
        planes * tiling.moments_tiles,
        tiling.threads,
        z,
        operands.bias,
        partial,
        np.int32(tiling.plane_size),
        np.int32(tiling.moments_tile_size),
        np.int32(tiling.moments_tiles),
        np.int32(tiling.channels_per_group),
    )
    seed, width, drop_threshold, keep_scale = operands.dropout
    if drop_threshold == DROP_ALL:  # a scale of 0 drops all as well
        drop_threshold, keep_scale = DROP_ALL - 1, operands.real(0.0)
    launch(
        make_apply_kernel(spec.dtype, vector, spec.draws),
        planes * tiling.tiles,
        tiling.threads,
        z,
        operands.bias,
        partial,
        operands.gamma,
        operands.beta,
        out,
        np.int32(tiling.plane_size),
        np.int32(tiling.tiles),
        np.int32(tiling.channels_per_group * tiling.moments_tiles),
        np.int32(tiling.channels_per_group),
        operands.eps,
        *clip_bounds(*operands.bounds),
        seed,
        np.int32(tiling.plane_size // width),
        np.int32(width),
        np.uint32(drop_threshold),
        keep_scale,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + 2 E read, 2 E written, and the partial results each way."""
    tensor = spec.output_bytes
    partial = 3 * spec.batch * spec.out_channels * Tiling(spec).moments_tiles * spec.itemsize
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
