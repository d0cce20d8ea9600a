"""The library's convolution, our statistics and everything after: for wide convolutions.

With many channels a convolution is a matrix product, and the vendor's library has spent years
on those. What it leaves to do is reading its output twice: once for the statistics, once to
apply them with min, clamp and dropout in the same breath. The convolution's bias is added on
the way, which spares the library a pass of its own.

Launch: cuDNN's convolution without bias; then two kernels whose blocks take one *tile* each, of
        up to THREADS threads with ELEMENTS_PER_THREAD values. A tile lies within one *plane*, the
        D * H * W values of one sample and channel; each of its warps takes consecutive values.
Shapes: z, out flat, (N * K * D * H * W,); partial (3, N * K * the moments
        kernel's tiles of a plane).
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

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import cuda, int32, int64, uint32, uint64

from numba_fused.device.convolution import divide
from numba_fused.device.planes import (
    ELEMENTS_PER_THREAD,
    MASK_WORDS,
    THREADS,
    VECTOR,
    WORD_BITS,
    Tiling,
    draw_mask,
    drop_or_scale,
    first_of_thread,
    launch_moments,
    make_load_share,
    plane_statistics,
    vector_width,
    word_threshold,
)
from numba_fused.device.pointwise import CLIP, clip_bounds
from numba_fused.device.ptx import store_4
from numba_fused.device.reductions import WARP
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.reference import convolution, convolution_precision
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

PARTIALS_PER_GROUP = 256  # aimed at: each block of the apply kernel merges all of its group's

# ---- the kernel, besides `planes.make_moments_kernel` -------------------------------------------


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
            centre, rstd = plane_statistics(
                partial, bias, plane, partials_per_group, channels_per_group, eps
            )
            if cuda.laneid == 0:
                _, channel = divide(plane, bias.size)
                affine[0], affine[1] = centre, rstd * gamma[uint32(channel)]
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
                        c = drop_or_scale(c, bits, e, keep_scale)
                    values[v + e] = c
                i = uint64(first + v * WARP)
                if vector == VECTOR:
                    store_4(out, i, values[v], values[v + 1], values[v + 2], values[v + 3])
                else:
                    out[i] = values[v]

    return apply_kernel


# ---- the launch ---------------------------------------------------------------------------------

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
    joined = tiling.joined(PARTIALS_PER_GROUP)
    partial = torch.empty((3, tiling.planes * joined[1]), dtype=out.dtype, device=out.device)
    launch_moments(launch, tiling, joined, vector, z, operands.bias, partial)
    seed, width, drop_threshold, keep_scale = operands.dropout
    drop_threshold, keep_scale = word_threshold(drop_threshold, keep_scale)
    launch(
        make_apply_kernel(spec.dtype, vector, spec.draws),
        tiling.planes * tiling.tiles,
        tiling.threads,
        z,
        operands.bias,
        partial,
        operands.gamma,
        operands.beta,
        out,
        np.int32(tiling.plane_size),
        np.int32(tiling.tiles),
        np.int32(tiling.channels_per_group * joined[1]),
        np.int32(tiling.channels_per_group),
        operands.eps,
        *clip_bounds(*operands.bounds),
        seed,
        np.int32(tiling.plane_size // width),
        np.int32(width),
        drop_threshold,
        keep_scale,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + 2 E read, 2 E written, and the partial results each way."""
    tensor = spec.output_bytes
    tiling = Tiling(spec)
    partial = 3 * tiling.planes * tiling.joined(PARTIALS_PER_GROUP)[1] * spec.itemsize
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
