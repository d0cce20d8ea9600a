"""The kernels of the clear backward pass, in the order in which they are launched.

Tensors and `geometry` are as in `device.convolution`: flat, three-dimensional, int32 within a
sample. `bounds` is (cap, min_value, max_value), `mask` (width, drop_threshold, keep_scale) as
`rng.dropout` takes them. Every sum has a fixed order, so every bit is the same in every run.
"""

from __future__ import annotations

from numba import cuda, float64, int32, int64, uint32, uint64

from numba_fused.device.convolution import convolve_at, divide
from numba_fused.device.pointwise import normalise
from numba_fused.device.reductions import (
    CHAIN,
    MOMENTS_SHAPE,
    WARP,
    add_value,
    block_moments,
    merge,
    reciprocal_std,
    warp_sum,
)
from numba_fused.rng import dropout

THREADS = 256  # at most, in a block
LAUNCH_BOUNDS = (THREADS, 1)  # without the 1 the compiler would rather spill than use registers


# ---- the group norm's statistics, if forward did not keep them ----------------------------------


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def group_statistics_kernel(x, weight, bias, mean, rstd, group_size, num_groups, eps, geometry):
    """Mean and rstd of the convolution, one (sample, group) a block."""
    scratch = cuda.shared.array(MOMENTS_SHAPE, x.dtype)
    n, group = divide(int32(cuda.blockIdx.x), num_groups)
    first = int32(group * group_size)
    zero = x.dtype.type(0)
    count, total_mean, m2 = zero, zero, zero
    count_b, mean_b, m2_b = zero, zero, zero
    i = int32(cuda.threadIdx.x)
    while i < group_size:
        value = convolve_at(x, weight, bias, n, int32(first + i), geometry)
        count_b, mean_b, m2_b = add_value(count_b, mean_b, m2_b, value)
        if count_b == CHAIN:
            count, total_mean, m2 = merge(count, total_mean, m2, count_b, mean_b, m2_b)
            count_b, mean_b, m2_b = zero, zero, zero
        i = int32(i + cuda.blockDim.x)
    count, total_mean, m2 = merge(count, total_mean, m2, count_b, mean_b, m2_b)
    count, total_mean, m2 = block_moments(count, total_mean, m2, scratch)
    if cuda.threadIdx.x == 0:
        mean[cuda.blockIdx.x] = total_mean
        rstd[cuda.blockIdx.x] = reciprocal_std(count, m2, eps)


# ---- from grad_out through the chain to the convolution -----------------------------------------


@cuda.jit(device=True)
def volume(size):
    """Values in a (d, h, w) box."""
    return int32(int32(size[0] * size[1]) * size[2])


@cuda.jit(device=True)
def place_of_block(channels, num_groups):
    """Sample, channel and flat (sample, group) of a block that works on one (sample, channel)."""
    n, k = divide(int32(cuda.blockIdx.x), channels)
    group, _ = divide(k, divide(channels, num_groups)[0])
    return n, k, int32(n * num_groups + group)


@cuda.jit(device=True)
def gradient_at(x, weight, bias, grad_out, n, index, affine, geometry, bounds, seed, mask):
    """(g, xhat) at flat output `index` of sample `n`: the gradient of h, the normalised value.

    `affine` is (mean, rstd, gamma, beta) of the place. What was dropped is multiplied by zero, so
    that a NaN stays one; what was cut off gets zero itself. NaN is on no side of a bound: cut off.
    """
    mean, rstd, gamma, beta = affine
    cap, min_value, max_value = bounds
    width, drop_threshold, keep_scale = mask
    z = convolve_at(x, weight, bias, n, index, geometry)
    h = normalise(z, mean, rstd, gamma, beta)
    at = int64(n) * int32(bias.size * volume(geometry[2])) + index
    g = dropout(grad_out[uint64(at)], at, seed, width, drop_threshold, keep_scale)
    if not (min_value < h and h < max_value and h < cap):
        g = x.dtype.type(0)
    return g, (z - mean) * rstd


@cuda.jit(device=True)
def block_sum(value, scratch):
    """Sum over a whole block, in every thread; `scratch` is shared memory of WARP values."""
    value = warp_sum(value)
    warp, lane = cuda.threadIdx.x // WARP, cuda.laneid
    if lane == 0:
        scratch[warp] = value
    cuda.syncthreads()
    value = scratch.dtype.type(0)
    if lane < cuda.blockDim.x // WARP:
        value = scratch[lane]
    return warp_sum(value)


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def channel_sums_kernel(
    x,
    weight,
    bias,
    gamma,
    beta,
    grad_out,
    mean,
    rstd,
    sum_g,
    sum_gx,
    num_groups,
    geometry,
    bounds,
    seed,
    mask,
):
    """Sums of g and of g * xhat, one (sample, channel) a block, in fp64: they round once."""
    scratch_g = cuda.shared.array(WARP, float64)
    scratch_gx = cuda.shared.array(WARP, float64)
    n, k, group = place_of_block(int32(bias.size), num_groups)
    affine = mean[group], rstd[group], gamma[k], beta[k]
    positions = volume(geometry[2])
    first = int32(k * positions)
    total_g, total_gx = float64(0), float64(0)
    i = int32(cuda.threadIdx.x)
    while i < positions:
        index = int32(first + i)
        g, xhat = gradient_at(
            x, weight, bias, grad_out, n, index, affine, geometry, bounds, seed, mask
        )
        total_g += g
        total_gx += g * xhat
        i = int32(i + cuda.blockDim.x)
    total_g = block_sum(total_g, scratch_g)
    total_gx = block_sum(total_gx, scratch_gx)
    if cuda.threadIdx.x == 0:
        sum_g[cuda.blockIdx.x] = total_g
        sum_gx[cuda.blockIdx.x] = total_gx


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def sum_over_samples_kernel(sums, batch, total):
    """(N, K) to (K,), one warp a channel: a parameter's gradient from each sample's."""
    value = sums.dtype.type(0)
    n = int32(cuda.laneid)
    while n < batch:
        value += sums[uint64(int64(n) * total.size + cuda.blockIdx.x)]
        n = int32(n + WARP)
    value = warp_sum(value)
    if cuda.laneid == 0:
        total[cuda.blockIdx.x] = value


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def group_means_kernel(sum_g, sum_gx, gamma, mean_g, mean_gx, group_size, num_groups):
    """Means over each group of g * gamma and of g * gamma * xhat, one (sample, group) a thread.

    `group_size` comes as a floating-point number: float32 / int32 would be a float64.
    """
    group = int32(cuda.grid(1))
    if group < mean_g.size:
        channels, _ = divide(int32(gamma.size), num_groups)
        k = int32(divide(group, num_groups)[1] * channels)
        total_g, total_gx = gamma.dtype.type(0), gamma.dtype.type(0)
        at = int64(group) * channels
        stop = at + channels
        while at < stop:
            scale = gamma[k]
            total_g += scale * sum_g[uint64(at)]
            total_gx += scale * sum_gx[uint64(at)]
            at += 1
            k = int32(k + 1)
        mean_g[group] = total_g / group_size
        mean_gx[group] = total_gx / group_size


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def convolution_gradient_kernel(
    x,
    weight,
    bias,
    gamma,
    beta,
    grad_out,
    mean,
    rstd,
    mean_g,
    mean_gx,
    dz,
    sum_dz,
    num_groups,
    geometry,
    bounds,
    seed,
    mask,
):
    """dz = rstd * (g * gamma - mean_g - xhat * mean_gx) and its sum, one (sample, channel) a block.

    Moving one value of a group moves the group's mean and variance, and so every other value: the
    two means take back from dz what it would change of them. So where a channel is a group of its
    own the sum is zero but for rounding, of which a sum in fp64 adds none.
    """
    scratch = cuda.shared.array(WARP, float64)
    n, k, group = place_of_block(int32(bias.size), num_groups)
    affine = mean[group], rstd[group], gamma[k], beta[k]
    from_mean, from_variance = mean_g[group], mean_gx[group]
    positions = volume(geometry[2])
    first, block_first = int32(k * positions), int64(cuda.blockIdx.x) * positions
    total = float64(0)
    i = int32(cuda.threadIdx.x)
    while i < positions:
        index = int32(first + i)
        g, xhat = gradient_at(
            x, weight, bias, grad_out, n, index, affine, geometry, bounds, seed, mask
        )
        value = affine[1] * (g * affine[2] - from_mean - xhat * from_variance)
        dz[uint64(block_first + i)] = value
        total += value
        i = int32(i + cuda.blockDim.x)
    total = block_sum(total, scratch)
    if cuda.threadIdx.x == 0:
        sum_dz[cuda.blockIdx.x] = total


# ---- from the convolution to its operands -------------------------------------------------------


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def weight_gradient_kernel(x, dz, grad_weight, geometry):
    """One weight a block: the sum of dz times the x that weight met, over samples and positions."""
    scratch = cuda.shared.array(WARP, x.dtype)
    x_shape, weight_shape, output_size, stride, padding, dilation = geometry
    k, x_channel, a, b, e = weight_of_block(x_shape, weight_shape)
    positions = volume(output_size)
    total = x.dtype.type(0)
    i = int32(cuda.threadIdx.x)
    while i < positions:
        row, w = divide(i, output_size[2])
        d, h = divide(row, output_size[1])
        xd = int32(d * stride[0] - padding[0] + a * dilation[0])
        xh = int32(h * stride[1] - padding[1] + b * dilation[1])
        xw = int32(w * stride[2] - padding[2] + e * dilation[2])
        if inside(xd, x_shape[2]) and inside(xh, x_shape[3]) and inside(xw, x_shape[4]):
            x_plane = int32(x_channel * x_shape[2] + xd)
            x_index = int32(int32(x_plane * x_shape[3] + xh) * x_shape[4] + xw)
            x_sample = int32(x_shape[1] * volume(x_shape[2:]))
            dz_index, dz_sample = int32(k * positions + i), int32(weight_shape[0] * positions)
            total += product_over_samples(x, dz, x_index, dz_index, x_sample, dz_sample, x_shape[0])
        i = int32(i + cuda.blockDim.x)
    total = block_sum(total, scratch)
    if cuda.threadIdx.x == 0:
        grad_weight[cuda.blockIdx.x] = total


@cuda.jit(device=True)
def weight_of_block(x_shape, weight_shape):
    """Output channel, channel of x and tap (a, b, e) of the weight a block works on."""
    channels = weight_shape[1]
    rest, e = divide(int32(cuda.blockIdx.x), weight_shape[4])
    rest, b = divide(rest, weight_shape[3])
    rest, a = divide(rest, weight_shape[2])
    k, c = divide(rest, channels)
    groups, _ = divide(x_shape[1], channels)
    group, _ = divide(k, divide(weight_shape[0], groups)[0])
    return k, int32(group * channels + c), a, b, e


@cuda.jit(device=True)
def inside(position, size):
    """Whether a position of the padded input is one of the input."""
    return position >= 0 and position < size


@cuda.jit(device=True)
def product_over_samples(x, dz, x_index, dz_index, x_sample, dz_sample, batch):
    """Sum of x times dz at one position of every sample.

    A sum of its own keeps the chains of additions, and so the rounding error, short.
    """
    total = x.dtype.type(0)
    x_at, dz_at = int64(x_index), int64(dz_index)
    n = int32(0)
    while n < batch:
        total += dz[uint64(dz_at)] * x[uint64(x_at)]
        x_at += x_sample
        dz_at += dz_sample
        n = int32(n + 1)
    return total


@cuda.jit(launch_bounds=LAUNCH_BOUNDS)
def input_gradient_kernel(dz, weight, grad_x, blocks_per_sample, geometry):
    """One element of x a thread."""
    x_shape = geometry[0]
    n, block = divide(int32(cuda.blockIdx.x), blocks_per_sample)
    sample_size = int32(x_shape[1] * volume(x_shape[2:]))
    index = int32(block * cuda.blockDim.x + cuda.threadIdx.x)
    if index < sample_size:
        value = input_gradient_at(dz, weight, n, index, geometry)
        grad_x[uint64(int64(n) * sample_size + index)] = value


@cuda.jit(device=True)
def input_gradient_at(dz, weight, n, index, geometry):
    """Gradient at flat input `index` of sample `n`: every output it fed, by the weight it met."""
    x_shape, weight_shape, output_size, stride, padding, dilation = geometry
    channels, taps = weight_shape[1], volume(weight_shape[2:])
    rest, w = divide(index, x_shape[4])
    rest, h = divide(rest, x_shape[3])
    x_channel, d = divide(rest, x_shape[2])
    group, c = divide(x_channel, channels)
    groups, _ = divide(x_shape[1], channels)
    outputs, _ = divide(weight_shape[0], groups)
    first = int32(group * outputs)  # of the output channels that saw this input channel
    positions = volume(output_size)
    dz_first = int64(n) * int32(weight_shape[0] * positions) + int32(first * positions)
    weight_first = int32(int32(first * channels + c) * taps)

    total = dz.dtype.type(0)
    for a in range(weight_shape[2]):
        out_d = output_met(d, a, stride[0], padding[0], dilation[0], output_size[0])
        if out_d < 0:
            continue
        for b in range(weight_shape[3]):
            out_h = output_met(h, b, stride[1], padding[1], dilation[1], output_size[1])
            if out_h < 0:
                continue
            for e in range(weight_shape[4]):
                out_w = output_met(w, e, stride[2], padding[2], dilation[2], output_size[2])
                if out_w < 0:
                    continue
                out_row = int32(out_d * output_size[1] + out_h)
                dz_index = dz_first + int32(out_row * output_size[2] + out_w)
                w_row = int32(a * weight_shape[3] + b)
                w_index = int32(weight_first + int32(w_row * weight_shape[4] + e))
                tap_sum = dz.dtype.type(0)
                k = int32(0)
                while k < outputs:
                    tap_sum += dz[uint64(dz_index)] * weight[uint32(w_index)]
                    dz_index += positions
                    w_index = int32(w_index + int32(channels * taps))
                    k = int32(k + 1)
                total += tap_sum
    return total


@cuda.jit(device=True)
def output_met(position, tap, stride, padding, dilation, size):
    """Output whose `tap` lies on input `position`, along one axis; -1 if there is none."""
    distance = int32(position + padding - tap * dilation)
    if distance < 0:
        return int32(-1)
    output, remainder = divide(distance, stride)
    if remainder > 0 or output >= size:
        return int32(-1)
    return output
