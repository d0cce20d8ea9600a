"""Numba types kernels itself, at compile time; to a Python type checker all of it is Any."""

from typing import Any

def __getattr__(name: str) -> Any: ...
