"""What happens to each value by itself once its group's statistics are known."""

from __future__ import annotations

from numba import cuda


@cuda.jit(device=True)
def normalise(value, mean, rstd, gamma, beta):
    """Group normalisation; the mean is subtracted first, so a large one costs no digits."""
    return (value - mean) * rstd * gamma + beta


@cuda.jit(device=True)
def minimum(h, cap):
    """min(h, cap). Written as a comparison that NaN fails, so NaN stays NaN."""
    return cap if h > cap else h


@cuda.jit(device=True)
def clamp(m, min_value, max_value):
    """PyTorch's clamp: NaN stays NaN, and min_value > max_value gives max_value."""
    c = min_value if m < min_value else m
    return max_value if c > max_value else c
