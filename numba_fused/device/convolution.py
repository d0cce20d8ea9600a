"""One output point of a convolution, straight from its definition.

The tensors are flat and contiguous to the kernels, and every problem is three-dimensional: 1-D
and 2-D ones have leading spatial axes of size 1. `geometry` is what the index arithmetic needs,
six tuples of int32:

    x_shape (N, C, D, H, W), weight_shape (K, C / groups, kd, kh, kw), output_size (D, H, W),
    stride, padding, dilation, each (d, h, w)

Numba widens every integer operation to 64 bits, which a GPU emulates, divisions above all.
Casting a result back to 32 bits lets the compiler compute it in 32 from the start. That is safe
within one sample, which is limited to 2^31 - 4096 values; only a sample's offset needs 64.
"""

from __future__ import annotations

from numba import cuda, int32, int64, uint32, uint64


@cuda.jit(device=True)
def convolve_at(x, weight, bias, n, index, geometry):
    """Value of the convolution at flat output `index` of sample `n`; padding is skipped."""
    x_shape, weight_shape, output_size, stride, padding, dilation = geometry
    channels = weight_shape[1]
    row, w = divide(index, output_size[2])
    plane, h = divide(row, output_size[1])
    k, d = divide(plane, output_size[0])
    first_d = int32(d * stride[0] - padding[0])
    first_h = int32(h * stride[1] - padding[1])
    first_w = int32(w * stride[2] - padding[2])
    first_tap, last_tap = taps_inside(first_w, dilation[2], weight_shape[4], x_shape[4])

    groups, _ = divide(x_shape[1], channels)
    group, _ = divide(k, divide(weight_shape[0], groups)[0])
    sample = int64(n) * int32(int32(x_shape[1] * x_shape[2]) * int32(x_shape[3] * x_shape[4]))
    total = bias[k]
    c = int32(0)
    while c < channels:  # a range would keep its own count in a register besides
        # One sum per channel keeps the chains of additions, and so the rounding error, short.
        channel_sum = x.dtype.type(0)
        for a in range(weight_shape[2]):
            xd = int32(first_d + a * dilation[0])
            if xd < 0 or xd >= x_shape[2]:
                continue
            for b in range(weight_shape[3]):
                xh = int32(first_h + b * dilation[1])
                if xh < 0 or xh >= x_shape[3]:
                    continue
                x_plane = int32((group * channels + c) * x_shape[2] + xd)
                x_start = int32(int32(x_plane * x_shape[3] + xh) * x_shape[4] + first_w)
                w_plane = int32(int32(k * channels + c) * weight_shape[2] + a)
                w_start = int32(int32(w_plane * weight_shape[3] + b) * weight_shape[4])
                x_index = sample + x_start + int32(first_tap * dilation[2])
                w_index, w_stop = int32(w_start + first_tap), int32(w_start + last_tap)
                while w_index < w_stop:
                    # An unsigned index spares the test for Python's counting from the end.
                    channel_sum += x[uint64(x_index)] * weight[uint32(w_index)]
                    x_index += dilation[2]
                    w_index = int32(w_index + 1)
        total += channel_sum
        c = int32(c + 1)
    return total


@cuda.jit(device=True)
def divide(a, b):
    """Quotient and remainder of two non-negative int32, by 32-bit unsigned division."""
    return int32(uint32(a) // uint32(b)), int32(uint32(a) % uint32(b))


@cuda.jit(device=True)
def taps_inside(first, dilation, taps, size):
    """Taps `e` of a row with ``0 <= first + e * dilation < size``, as a half-open range."""
    first_tap, last_tap = int32(0), taps
    if first < 0:
        first_tap, _ = divide(int32(dilation - 1 - first), dilation)
    if first + (taps - 1) * dilation >= size:
        last_tap = int32(0)
        if first < size:
            last_tap = int32(divide(int32(size - 1 - first), dilation)[0] + 1)
    return first_tap, last_tap
