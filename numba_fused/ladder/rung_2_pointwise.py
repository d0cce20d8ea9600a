"""Pointwise operators ride along: min, clamp and dropout happen as the normalisation writes.

The normalisation's second pass holds every value in a register on its way to memory. Doing min,
clamp and dropout right there costs a few instructions and saves three reads and three writes of
the whole tensor. This is the fusion a pointwise compiler finds.

Launch: the convolution with one thread per output element; then one block per (sample, group).
Shapes: x flat, (N * C * D * H * W,); z, out flat, (N * K * D * H * W,).
Bytes:  the convolution reads x and writes z; the second kernel reads z twice and writes out.
        With E the bytes of one such tensor: x + 2 E read, 2 E written.
Next:   z is read once only to learn its mean and variance, by a kernel that did not make it.
        The convolution had every value in a register: the next rung sums there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numba import cuda

from numba_fused.device.pointwise import clamp, minimum, normalise
from numba_fused.device.reductions import (
    LAUNCH_BOUNDS,
    MOMENTS_SHAPE,
    block_moments,
    reciprocal_std,
    strided_moments,
)
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.ladder.rung_1_unfused import convolution_kernel
from numba_fused.rng import dropout
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def group_norm_min_clamp_dropout_kernel(
    z,
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
    """One block per (sample, group): statistics, then everything else in one pass."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
    first = cuda.blockIdx.x * group_size
    count, mean, m2 = strided_moments(z, first, group_size)
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    rstd = reciprocal_std(count, m2, eps)

    channels = gamma.size // num_groups
    first_channel = cuda.blockIdx.x % num_groups * channels
    for i in range(cuda.threadIdx.x, group_size, cuda.blockDim.x):
        k = first_channel + i // (group_size // channels)
        h = normalise(z[first + i], mean, rstd, gamma[k], beta[k])
        c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])
        out[first + i] = dropout(c, first + i, seed, width, drop_threshold, keep_scale)


limit = sample_limit


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    out, threads = operands.out, operands.threads_per_block
    z = torch.empty_like(out)
    launch(
        convolution_kernel,
        operands.blocks,
        threads,
        operands.x,
        operands.weight,
        operands.bias,
        z,
        operands.sample_size,
        operands.geometry,
    )
    launch(
        group_norm_min_clamp_dropout_kernel,
        operands.group_count,
        threads,
        z,
        operands.gamma,
        operands.beta,
        out,
        *operands.groups,
        operands.eps,
        operands.bounds,
        *operands.dropout,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + 2 E read, 2 E written."""
    tensor = spec.output_bytes
    return Ledger(
        bytes_read=convolution_bytes(spec) + 2 * vector_bytes(spec) + 2 * tensor + seed_bytes(spec),
        bytes_written=2 * tensor,
        launches=2,
    )
