"""Numba's scalar types as callables on NumPy scalars, with the wrap-around of C."""

from typing import Any

import numpy as np


def cast(dtype: np.dtype, value: Any) -> Any:
    """Convert a scalar to `dtype` as a C cast does: integers wrap, floats round or truncate."""
    try:
        return dtype.type(value)
    except (OverflowError, ValueError):
        if isinstance(value, float):
            return np.float64(value).astype(dtype)
        bits = 8 * dtype.itemsize
        value = int(value) & ((1 << bits) - 1)
        if dtype.kind == "i" and value >> (bits - 1):
            value -= 1 << bits
        return dtype.type(value)


class IntegerType:
    """An integer type of the kernel's namespace: callable, and a dtype for array declarations."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.type = dtype.type

    def __call__(self, value: Any = 0) -> Any:
        """Convert as a C cast does."""
        try:
            return self.type(value)
        except (OverflowError, ValueError):
            return cast(self.dtype, value)

    def __repr__(self) -> str:
        return str(self.dtype)


_INTEGERS = {
    np.dtype(f"{sign}int{bits}"): IntegerType(np.dtype(f"{sign}int{bits}"))
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}


def scalar_type(dtype: np.dtype) -> Any:
    """The callable that stands for `dtype` inside a simulated kernel."""
    return _INTEGERS.get(dtype, dtype.type)


def as_dtype(declared: Any) -> np.dtype:
    """The NumPy dtype of whatever a kernel passes to ``shared.array(shape, dtype)``."""
    return declared.dtype if isinstance(declared, IntegerType) else np.dtype(declared)


NAMED_TYPES = {
    name: scalar_type(np.dtype(name))
    for name in ("float16", "float32", "float64", "complex64", "complex128", *map(str, _INTEGERS))
} | {"boolean": np.bool_, "bool_": np.bool_}
"""Scalar types by the names that ``numba.cuda`` gives them."""
