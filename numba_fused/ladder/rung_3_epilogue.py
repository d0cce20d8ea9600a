"""The convolution's epilogue sums: partial group statistics as the values are written.

Each block of the convolution works inside one (sample, group), so it can reduce its own values
to one (count, mean, m2) while they are still in registers. A second kernel merges a group's
partial results, a few hundred bytes, and applies them: z is read once instead of twice.

Launch: both kernels with `blocks_per_group` blocks for each (sample, group); a thread takes
        ELEMENTS_PER_THREAD elements, a block's stride apart, so that neighbours stay coalesced.
Shapes: x flat, (N * C * D * H * W,); z, out flat; partial (3, N * G * blocks_per_group).
Bytes:  x read, z written and read, out written, and the partial results: written once, read by
        each block of their group. With E the bytes of z: x + E read, 2 E written.
Next:   z still goes through memory, and a second launch waits for the first. With one block per
        group nobody else needs the statistics, and the two kernels can be one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numba import cuda

from numba_fused.device.convolution import convolve_at
from numba_fused.device.pointwise import clamp, minimum, normalise
from numba_fused.device.reductions import (
    LAUNCH_BOUNDS,
    MOMENTS_SHAPE,
    add_value,
    block_moments,
    merge_partials,
    reciprocal_std,
    store_partial,
)
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.rng import dropout
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

ELEMENTS_PER_THREAD = 8


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def convolution_moments_kernel(x, weight, bias, z, partial, group_size, num_groups, geometry):
    """The convolution of one tile of a group, and the tile's moments in ``partial[:, block]``."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, x.dtype)
    tile = cuda.blockDim.x * ELEMENTS_PER_THREAD
    blocks_per_group = (group_size + tile - 1) // tile
    group, block = cuda.blockIdx.x // blocks_per_group, cuda.blockIdx.x % blocks_per_group
    count = x.dtype.type(0)
    mean, m2 = count, count
    for element in range(ELEMENTS_PER_THREAD):
        i = block * tile + element * cuda.blockDim.x + cuda.threadIdx.x
        if i < group_size:
            index = group % num_groups * group_size + i
            value = convolve_at(x, weight, bias, group // num_groups, index, geometry)
            z[group * group_size + i] = value
            count, mean, m2 = add_value(count, mean, m2, value)
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    if cuda.threadIdx.x == 0:
        store_partial(partial, cuda.blockIdx.x, count, mean, m2)


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def merge_and_apply_kernel(
    z,
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
    """Merge the group's partial moments, the same way in each of its blocks, then apply them."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
    tile = cuda.blockDim.x * ELEMENTS_PER_THREAD
    blocks_per_group = (group_size + tile - 1) // tile
    group, block = cuda.blockIdx.x // blocks_per_group, cuda.blockIdx.x % blocks_per_group
    own, stop = group * blocks_per_group, (group + 1) * blocks_per_group
    count, mean, m2 = merge_partials(partial, own + cuda.threadIdx.x, stop, cuda.blockDim.x)
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    rstd = reciprocal_std(count, m2, eps)

    channels = gamma.size // num_groups
    for element in range(ELEMENTS_PER_THREAD):
        i = block * tile + element * cuda.blockDim.x + cuda.threadIdx.x
        if i < group_size:
            index = group * group_size + i
            k = group % num_groups * channels + i // (group_size // channels)
            h = normalise(z[index], mean, rstd, gamma[k], beta[k])
            c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])
            out[index] = dropout(c, index, seed, width, drop_threshold, keep_scale)


def blocks_per_group(spec: BlockSpec, threads_per_block: int) -> int:
    """Tiles of ``threads_per_block * ELEMENTS_PER_THREAD`` values that cover one group."""
    return -(-spec.group_size // (threads_per_block * ELEMENTS_PER_THREAD))


limit = sample_limit


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches of the same grid."""
    spec, out, threads = operands.spec, operands.out, operands.threads_per_block
    blocks = operands.group_count * blocks_per_group(spec, threads)
    z = torch.empty_like(out)
    partial = torch.empty((3, blocks), dtype=out.dtype, device=out.device)
    launch(
        convolution_moments_kernel,
        blocks,
        threads,
        operands.x,
        operands.weight,
        operands.bias,
        z,
        partial,
        *operands.groups,
        operands.geometry,
    )
    launch(
        merge_and_apply_kernel,
        blocks,
        threads,
        z,
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
    """x + E read, 2 E written, and the partial results each way."""
    tensor = spec.output_bytes
    blocks = spec.batch * spec.num_groups * blocks_per_group(spec, threads_per_block)
    partial = 3 * blocks * spec.itemsize
    return Ledger(
        bytes_read=convolution_bytes(spec)
        + 2 * vector_bytes(spec)
        + tensor
        + partial
        + seed_bytes(spec),
        bytes_written=2 * tensor + partial,
        launches=2,
    )
