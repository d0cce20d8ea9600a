"""What happens to each value by itself once its group's statistics are known."""

from __future__ import annotations

from typing import Any

from numba import cuda

from numba_fused.device.ptx import maximum_nan, minimum_nan


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


def clip_bounds(cap: Any, min_value: Any, max_value: Any) -> tuple[Any, Any]:
    """(lower, upper) for which `CLIP` is `minimum` and `clamp` in one.

    >>> clip_bounds(0.5, -1.0, 1.0)
    (-1.0, 0.5)
    >>> clip_bounds(0.5, 1.0, -1.0)     # a clamp whose bounds cross gives max_value
    (-1.0, -1.0)
    """
    lower = min(min_value, max_value)
    return lower, max(lower, min(cap, max_value))


@cuda.jit(device=True)
def clip_float32(h, lower, upper):
    """clamp(min(h, cap), min_value, max_value) with bounds of `clip_bounds`; NaN stays NaN."""
    return maximum_nan(minimum_nan(h, upper), lower)


@cuda.jit(device=True)
def clip_float64(h, lower, upper):
    """As `clip_float32`, for the type that has no such instructions."""
    return clamp(h, lower, upper)


CLIP = {"float32": clip_float32, "float64": clip_float64}
