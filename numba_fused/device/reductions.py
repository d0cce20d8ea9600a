"""Group statistics that survive a large mean.

E[x^2] - E[x]^2 subtracts two numbers of size mean^2 and keeps what rounding left of their
difference: at mean 1000 and variance 1, fp32 has no digit of the variance left. Welford's
update works with deviations from the running mean instead, and Chan's formula merges two such
partial results, so the same three numbers travel from thread to warp to block:

    count   how many values
    mean    their mean
    m2      sum of squared deviations from that mean; variance (biased) = m2 / count

Welford, "Note on a method for calculating corrected sums of squares and products" (1962);
Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979).

`count` is kept in the values' own type: exact below 2^24 in fp32 and, above, wrong by less than
the rounding of the mean itself.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int32, uint32

FULL_WARP = 0xFFFFFFFF
WARP = 32
CHAIN = np.float32(128)  # values folded one by one before their moments are merged
LAUNCH_BOUNDS = (1024, 1)  # of kernels with a free block size: 1024 threads leave 64 registers
MOMENTS_SHAPE = (3, WARP)  # shared scratch of `block_moments`: count, mean, m2 of each warp


@cuda.jit(device=True)
def add_value(count, mean, m2, value):
    """Welford: fold one value into (count, mean, m2)."""
    count += float32(1)  # a float32 constant takes the other operand's type, fp32 or fp64
    delta = value - mean
    mean += delta / count
    m2 += delta * (value - mean)
    return count, mean, m2


@cuda.jit(device=True)
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan: the moments of two sets together; either may be empty."""
    if count_b == float32(0):
        return count_a, mean_a, m2_a
    count = count_a + count_b
    share = count_b / count
    delta = mean_b - mean_a
    # Not delta * delta: where set a is empty, its overflow would not vanish against a count of 0.
    return count, mean_a + delta * share, m2_a + m2_b + delta * (delta * (count_a * share))


@cuda.jit(device=True)
def strided_moments(values, first, size):
    """Moments of this thread's share of ``values[first : first + size]``, a block's stride apart.

    CHAIN values at a time, then merged: a chain of n roundings drifts by about sqrt(n) of them,
    and a long chain by more than PyTorch does.
    """
    zero = values.dtype.type(0)
    count, mean, m2 = zero, zero, zero
    count_b, mean_b, m2_b = zero, zero, zero
    for i in range(cuda.threadIdx.x, size, cuda.blockDim.x):
        count_b, mean_b, m2_b = add_value(count_b, mean_b, m2_b, values[first + i])
        if count_b == CHAIN:
            count, mean, m2 = merge(count, mean, m2, count_b, mean_b, m2_b)
            count_b, mean_b, m2_b = zero, zero, zero
    return merge(count, mean, m2, count_b, mean_b, m2_b)


@cuda.jit(device=True)
def warp_sum(value):
    """Sum over a whole warp, the same bits in every lane: a + b rounds as b + a does."""
    distance = WARP // 2
    while distance > 0:
        value += cuda.shfl_xor_sync(FULL_WARP, value, distance)
        distance //= 2
    return value


@cuda.jit(device=True)
def warp_moments(count, mean, m2):
    """Moments of a whole warp, in every lane: Chan's formula for 32 sets at once.

    Four sums cost a third of merging pairs, which divides at each of five levels. The second one
    takes back what rounding the lanes' shares and products did to the mean; that grows with the
    mean, while what it averages, the lanes' distances from it, does not.
    """
    total = warp_sum(count)
    if total == float32(0):
        return count, mean, m2
    share = count / total
    total_mean = warp_sum(mean * share)
    total_mean += warp_sum((mean - total_mean) * share)
    delta = mean - total_mean
    return total, total_mean, warp_sum(m2 + delta * (delta * count))


@cuda.jit(device=True)
def block_moments(count, mean, m2, scratch):
    """Moments of a whole block, in every thread.

    Each warp leaves its three numbers in `scratch`, shared memory of MOMENTS_SHAPE; after one
    barrier every warp merges those of all warps again, so no second barrier is needed to
    broadcast the result. A block that calls this twice puts a `syncthreads` between the calls.
    """
    count, mean, m2 = warp_moments(count, mean, m2)
    warp, lane = cuda.threadIdx.x // WARP, cuda.laneid
    if lane == 0:
        scratch[0, warp], scratch[1, warp], scratch[2, warp] = count, mean, m2
    cuda.syncthreads()
    count -= count  # zeros of the right type: the lanes beyond the last warp hold an empty set
    mean, m2 = count, count
    if lane < cuda.blockDim.x // WARP:
        count, mean, m2 = scratch[0, lane], scratch[1, lane], scratch[2, lane]
    return warp_moments(count, mean, m2)


@cuda.jit(device=True)
def store_partial(partial, index, count, mean, m2):
    """Column `index` of partial (3, tiles): the moments of one tile, for another kernel."""
    partial[0, index], partial[1, index], partial[2, index] = count, mean, m2


@cuda.jit(device=True)
def merge_partials(partial, first, stop, step):
    """Moments of the tiles ``partial[:, first:stop:step]``: this thread's share of a group's."""
    count = partial.dtype.type(0)
    mean, m2 = count, count
    tile = int32(first)
    while tile < stop:
        p = uint32(tile)
        count, mean, m2 = merge(count, mean, m2, partial[0, p], partial[1, p], partial[2, p])
        tile = int32(tile + step)
    return count, mean, m2


@cuda.jit(device=True)
def reciprocal_std(count, m2, eps):
    """rstd = 1 / sqrt(biased variance + eps)."""
    return float32(1) / math.sqrt(m2 / count + eps)
