"""Five kernels, five round trips: every operator of the chain by itself.

The chain as it is written on paper. Each kernel reads the whole tensor its predecessor wrote,
does one thing to it and writes it back.

Launch: one thread per output element; for the normalisation one block per (sample, group).
Shapes: x flat, (N * C * D * H * W,); z, h, m, c, out flat, (N * K * D * H * W,).
Bytes:  the convolution reads x and writes z; the normalisation reads z twice, once for the
        statistics and once to apply them, and writes h; min, clamp and dropout each read one
        tensor and write one. With E the bytes of one such tensor: x + 5 E read, 5 E written.
Next:   min, clamp and dropout do almost no arithmetic, so they cost nothing but their bytes:
        the next rung does them while a value is in a register anyway.
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
from numba_fused.rng import dropout
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def convolution_kernel(x, weight, bias, z, sample_size, geometry):
    """z = conv(x, weight, bias), one thread per output element."""
    index = cuda.grid(1)
    if index < z.size:
        n, index_in_sample = index // sample_size, index % sample_size
        z[index] = convolve_at(x, weight, bias, n, index_in_sample, geometry)


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def group_norm_kernel(z, gamma, beta, h, group_size, num_groups, eps):
    """One block per (sample, group): statistics in a first pass, normalisation in a second."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, z.dtype)
    first = cuda.blockIdx.x * group_size
    count, mean, m2 = strided_moments(z, first, group_size)
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    rstd = reciprocal_std(count, m2, eps)

    channels = gamma.size // num_groups
    first_channel = cuda.blockIdx.x % num_groups * channels
    for i in range(cuda.threadIdx.x, group_size, cuda.blockDim.x):
        k = first_channel + i // (group_size // channels)
        h[first + i] = normalise(z[first + i], mean, rstd, gamma[k], beta[k])


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def min_kernel(h, m, cap):
    """m = min(h, cap)."""
    index = cuda.grid(1)
    if index < h.size:
        m[index] = minimum(h[index], cap)


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def clamp_kernel(m, c, min_value, max_value):
    """c = clamp(m, min_value, max_value)."""
    index = cuda.grid(1)
    if index < m.size:
        c[index] = clamp(m[index], min_value, max_value)


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def dropout_kernel(c, out, seed, width, drop_threshold, keep_scale):
    """out = dropout(c), the mask drawn on the spot."""
    index = cuda.grid(1)
    if index < c.size:
        out[index] = dropout(c[index], index, seed, width, drop_threshold, keep_scale)


limit = sample_limit


def forward(launch: Launcher, operands: Operands) -> None:
    """Five launches; four when dropout does not act, and the clamp then writes the output."""
    spec, out = operands.spec, operands.out
    blocks, threads = operands.blocks, operands.threads_per_block
    cap, min_value, max_value = operands.bounds
    z, h, m = (torch.empty_like(out) for _ in range(3))
    c = torch.empty_like(out) if spec.draws else out

    launch(
        convolution_kernel,
        blocks,
        threads,
        operands.x,
        operands.weight,
        operands.bias,
        z,
        operands.sample_size,
        operands.geometry,
    )
    launch(
        group_norm_kernel,
        operands.group_count,
        threads,
        z,
        operands.gamma,
        operands.beta,
        h,
        *operands.groups,
        operands.eps,
    )
    launch(min_kernel, blocks, threads, h, m, cap)
    launch(clamp_kernel, blocks, threads, m, c, min_value, max_value)
    if spec.draws:
        launch(dropout_kernel, blocks, threads, c, out, *operands.dropout)


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + 5 E read, 5 E written; one E less each without dropout."""
    tensor, stages = spec.output_bytes, 4 + spec.draws
    return Ledger(
        bytes_read=convolution_bytes(spec)
        + 2 * vector_bytes(spec)
        + stages * tensor
        + seed_bytes(spec),
        bytes_written=stages * tensor,
        launches=stages,
    )
