"""Tiles of planes: for kernels that go over a whole tensor value by value.

A *plane* is the D * H * W values of one sample and channel, which lie together in memory. Within
one bias, gamma and beta are constants, and the rows of dropout's streams follow each other. A
*tile* is a run of a plane's values, one block's work: up to THREADS threads with
ELEMENTS_PER_THREAD values each, which stay in registers. Planes are cut by themselves, so no tile
reaches into the next one; the last of a plane may be short.

    share    a warp's values are consecutive, and its lanes take turns, so many at a time as one
             access has: 4 of 4 bytes where every plane begins on a multiple of 16, otherwise 1
    partial  (3, tiles): count, mean and m2 of each tile, for the kernel that needs them merged
    keep     the mask of a tile: bit i belongs to its value i, wherever rows begin and end

Kernels that leave partial results take several tiles together where a group would have too many
of them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import cuda, float32, int32, int64, uint32, uint64

from numba_fused.device.convolution import divide
from numba_fused.device.ptx import load_4
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
from numba_fused.rng import RUN, keep_bits
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

THREADS = 128
ELEMENTS_PER_THREAD = 32
VECTOR = 4  # values of one 16-byte access
WORD_BITS = 32
MASK_WORDS = THREADS * ELEMENTS_PER_THREAD // WORD_BITS + 1  # a stream may outreach the tile
DROP_ALL = 2**32  # the one threshold that needs 33 bits

# ---- how planes are cut -------------------------------------------------------------------------


class Tiling:
    """How the planes of one call are cut into tiles.

    Attributes
    ----------
    planes, plane_size, channels_per_group : int
    threads : int
        Per block: fewer than THREADS where planes are small.
    tile_size, tiles : int
        The latter per plane.
    """

    def __init__(self, spec: BlockSpec) -> None:
        self.planes = spec.batch * spec.out_channels
        self.plane_size = math.prod(spec.output_size)
        self.channels_per_group = spec.out_channels // spec.num_groups
        self.threads = min(THREADS, WARP * -(-self.plane_size // (WARP * ELEMENTS_PER_THREAD)))
        self.tile_size = self.threads * ELEMENTS_PER_THREAD
        self.tiles = -(-self.plane_size // self.tile_size)

    def joined(self, partials_per_group: int) -> tuple[int, int]:
        """Size and number, per plane, of tiles so large that a group has about so many."""
        repeats = -(-self.tiles * self.channels_per_group // partials_per_group)
        size = self.tile_size * min(repeats, self.tiles)
        return size, -(-self.plane_size // size)


def vector_width(plane_size: int, *tensors: Any) -> int:
    """Values of one access: VECTOR of 4 bytes where every plane begins on a multiple of 16."""
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    whole = plane_size % VECTOR == 0 and tensors[0].itemsize == 4
    return VECTOR if aligned and whole else 1


# ---- a thread's share of a tile -----------------------------------------------------------------


@cuda.jit(device=True)
def first_of_thread(vector):
    """The first of a thread's values in its tile: a warp's are consecutive, lanes take turns."""
    warp, lane = divide(cuda.threadIdx.x, WARP)
    return int32(warp * (WARP * ELEMENTS_PER_THREAD) + lane * vector)


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


# ---- the mask -----------------------------------------------------------------------------------


def word_threshold(drop_threshold: int, keep_scale: Any) -> tuple[np.uint32, Any]:
    """Threshold of 32 bits and scale for the same dropout: a scale of 0 drops all as well."""
    if drop_threshold == DROP_ALL:
        return np.uint32(DROP_ALL - 1), type(keep_scale)(0)
    return np.uint32(drop_threshold), keep_scale


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


@cuda.jit(device=True)
def drop_or_scale(value, bits, bit, keep_scale):
    """Inverted dropout; what is dropped is multiplied by zero, so that a NaN stays one."""
    kept = keep_scale
    if uint32(bits & uint32(1 << bit)) == uint32(0):
        kept -= keep_scale
    return value * kept


# ---- group statistics ---------------------------------------------------------------------------


@cuda.jit(device=True)
def relative_bias(bias, channel, channels_per_group):
    """Bias of a channel relative to that of its group's first."""
    _, channel_of_group = divide(channel, channels_per_group)
    return bias[uint32(channel)] - bias[uint32(channel - channel_of_group)]


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


def launch_moments(
    launch: Launcher,
    tiling: Tiling,
    joined: tuple[int, int],
    vector: int,
    z: Any,
    bias: Any,
    partial: Any,
) -> None:
    """Write the moments of each tile of z, of `joined` size and number."""
    tile_size, tiles = joined
    launch(
        make_moments_kernel(vector),
        tiling.planes * tiles,
        tiling.threads,
        z,
        bias,
        partial,
        np.int32(tiling.plane_size),
        np.int32(tile_size),
        np.int32(tiles),
        np.int32(tiling.channels_per_group),
    )


@cuda.jit(device=True)
def plane_statistics(partial, bias, plane, partials_per_group, channels_per_group, eps):
    """(centre, rstd) of a plane, in every lane of the warp that merges its group's partials.

    The normalised value is (z - centre) * rstd, where z lacks its bias.
    """
    group, _ = divide(plane, channels_per_group)
    own = int32(group * partials_per_group)
    stop = int32(own + partials_per_group)
    count, mean, m2 = merge_partials(partial, own + cuda.laneid, stop, WARP)
    count, mean, m2 = warp_moments(count, mean, m2)
    _, channel = divide(plane, bias.size)
    centre = mean - relative_bias(bias, channel, channels_per_group)
    return centre, reciprocal_std(count, m2, eps)
