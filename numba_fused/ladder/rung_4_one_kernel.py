"""One launch: a block per (sample, group) does the whole chain for its group.

The classic fused kernel. A block computes every convolution output of its group, keeps running
moments in registers, reduces them through shared memory, and normalises. The group does not fit
on chip, so the convolution is parked in the output tensor and picked up again: a thread rereads
only what it wrote itself, so no barrier is needed beyond the reduction's.

Launch: N * G blocks, each striding over its group.
Shapes: x (N, C, D, H, W); out flat, (N * K * D * H * W,).
Bytes:  x read, out written, read and written again. With E the bytes of out: x + E read, 2 E
        written - as many as the rung before, but one launch and no extra tensor.
Next:   every tap comes from the cache one 4-byte load at a time, and 64-bit index arithmetic
        outweighs the multiply-adds: tiles in shared memory and outputs blocked in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import cuda, int32

from numba_fused.device.convolution import convolve_at
from numba_fused.device.pointwise import clamp, minimum, normalise
from numba_fused.device.reductions import (
    CHAIN,
    LAUNCH_BOUNDS,
    MOMENTS_SHAPE,
    add_value,
    block_moments,
    merge,
    reciprocal_std,
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
def one_kernel(
    x,
    weight,
    bias,
    gamma,
    beta,
    out,
    group_size,
    num_groups,
    eps,
    geometry,
    bounds,
    seed,
    width,
    drop_threshold,
    keep_scale,
):
    """One block per (sample, group): convolve and sum, reduce, normalise and everything after."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, x.dtype)
    n, group = cuda.blockIdx.x // num_groups, cuda.blockIdx.x % num_groups
    first = cuda.blockIdx.x * group_size
    zero = x.dtype.type(0)
    count, mean, m2 = zero, zero, zero
    count_b, mean_b, m2_b = zero, zero, zero
    i = int32(cuda.threadIdx.x)
    while i < group_size:  # as in `convolve_at`: no register to spare for a range
        value = convolve_at(x, weight, bias, n, group * group_size + i, geometry)
        out[first + i] = value
        count_b, mean_b, m2_b = add_value(count_b, mean_b, m2_b, value)
        if count_b == CHAIN:
            count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
            count_b, mean_b, m2_b = zero, zero, zero
        i = int32(i + cuda.blockDim.x)
    count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
    count, mean, m2 = block_moments(count, mean, m2, scratch)
    rstd = reciprocal_std(count, m2, eps)

    channels = gamma.size // num_groups
    first_channel = group * channels
    for i in range(cuda.threadIdx.x, group_size, cuda.blockDim.x):
        k = first_channel + i // (group_size // channels)
        h = normalise(out[first + i], mean, rstd, gamma[k], beta[k])
        c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])
        out[first + i] = dropout(c, first + i, seed, width, drop_threshold, keep_scale)


limit = sample_limit


def forward(launch: Launcher, operands: Operands) -> None:
    """One launch."""
    launch(
        one_kernel,
        operands.group_count,
        operands.threads_per_block,
        operands.x,
        operands.weight,
        operands.bias,
        operands.gamma,
        operands.beta,
        operands.out,
        *operands.groups,
        operands.eps,
        operands.geometry,
        operands.bounds,
        *operands.dropout,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + E read, 2 E written."""
    tensor = spec.output_bytes
    return Ledger(
        bytes_read=convolution_bytes(spec) + 2 * vector_bytes(spec) + tensor + seed_bytes(spec),
        bytes_written=2 * tensor,
        launches=1,
    )
