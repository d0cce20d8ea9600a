"""Array views that kernels index: checked for bounds, initialisation and, when asked, observed.

There are three families, so that features that are off cost nothing: plain global arrays, arrays
with a map of written words (shared and local), and observed arrays, which report every access to
the race detector and the counters.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import index as _index
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import OutOfBoundsError, SimulationError, UninitialisedReadError
from .scalars import cast

if TYPE_CHECKING:
    from .machine import Machine

_getframe = sys._getframe


@dataclass(slots=True, eq=False)
class ArrayInfo:
    """What stays the same for all views of one array.

    Attributes
    ----------
    key : hashable
        Identity across blocks: the argument's name, or the place that declares a shared array.
    base, nbytes
        Host address of the lowest byte, and the distance to the end of the highest element.
    """

    key: Any
    name: str
    space: str
    shape: tuple[int, ...]
    dtype: np.dtype
    base: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.space} array '{self.name}' (shape {self.shape}, {self.dtype})"


def array_info(key: Any, name: str, space: str, data: np.ndarray) -> ArrayInfo:
    """Describe `data`, finding the extent of strided views as well."""
    low, high = np.lib.array_utils.byte_bounds(data)
    return ArrayInfo(key, name, space, data.shape, data.dtype, low, high - low if data.size else 0)


class DeviceArray:
    """What every array a kernel sees has: shape, dtype, size, ndim, len(), slices, atomics."""

    __slots__ = ("data", "dtype", "info", "machine", "ndim", "shape", "size", "valid")

    def __init__(
        self, machine: "Machine", data: np.ndarray, valid: np.ndarray | None, info: ArrayInfo
    ):
        self.machine = machine
        self.data = data
        self.valid = valid
        self.info = info
        self.shape = data.shape
        self.dtype = data.dtype
        self.size = data.size
        self.ndim = data.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        return self.read(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.write(key, value)

    def checked_key(self, key: Any) -> tuple[int, ...]:
        """Return `key` as a tuple of ints, or raise `OutOfBoundsError`."""
        try:
            indices = tuple(_index(k) for k in (key if isinstance(key, tuple) else (key,)))
        except TypeError:
            indices = None
        if indices is None or len(indices) != self.ndim:
            raise SimulationError(f"cannot index {self.info} with {key!r}{self.machine.where()}")
        if any(not 0 <= k < n for k, n in zip(indices, self.shape, strict=True)):
            shown = indices[0] if self.ndim == 1 else indices
            raise OutOfBoundsError(
                f"index {shown} is outside {self.info}"
                + ("" if self.shape == self.info.shape else f", here a view of {self.shape}")
                + self.machine.where()
            )
        return indices

    def is_view_key(self, key: Any) -> bool:
        """Whether `key` selects a part of the array rather than one element."""
        keys = key if isinstance(key, tuple) else (key,)
        return len(keys) < self.ndim or any(isinstance(k, slice) for k in keys)

    def view(self, key: Any) -> "DeviceArray":
        """Return a part of the array, same memory, checked against its own shape."""
        valid = None if self.valid is None else self.valid[key]
        return self.machine.wrap(self.data[key], valid, self.info)

    def read(self, key: Any) -> Any:
        """Load with every check spelled out: the way taken when the quick one finds a problem."""
        if self.is_view_key(key):
            return self.view(key)
        indices = self.checked_key(key)
        if self.valid is not None and not self.valid[indices]:
            shown = indices[0] if self.ndim == 1 else indices
            raise UninitialisedReadError(
                f"element {shown} of {self.info} is read before anything wrote it"
                + self.machine.where()
            )
        return self.data[indices]

    def write(self, key: Any, value: Any) -> None:
        """Store with every check spelled out; integers wrap as they do on hardware."""
        if self.info.space == "const":
            raise SimulationError(f"{self.info} is read-only{self.machine.where()}")
        indices = self.checked_key(key)
        self.data[indices] = cast(self.dtype, value)
        if self.valid is not None:
            self.valid[indices] = -1

    def atomic(self, key: Any, update: Callable[[Any], Any]) -> Any:
        """Replace the element by ``update(element)`` and return what was there before."""
        old = self.read(self.checked_key(key))
        self.write(key, update(old))
        return old


class GlobalArray1(DeviceArray):
    """One-dimensional global array, unobserved."""

    __slots__ = ()

    def __getitem__(self, i: Any) -> Any:
        try:
            if i >= 0:
                return self.data[i]
        except (IndexError, TypeError):
            pass
        return self.read(i)

    def __setitem__(self, i: Any, value: Any) -> None:
        try:
            if i >= 0:
                self.data[i] = value
                return
        except (IndexError, TypeError, OverflowError, ValueError):
            pass
        self.write(i, value)


class GlobalArrayN(DeviceArray):
    """Global array of any rank, unobserved."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        try:
            if len(key) == self.ndim and min(key) >= 0:
                return self.data[key]
        except (IndexError, TypeError, ValueError):
            pass
        return self.read(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        try:
            if len(key) == self.ndim and min(key) >= 0:
                self.data[key] = value
                return
        except (IndexError, TypeError, OverflowError, ValueError):
            pass
        self.write(key, value)


class ScratchArray1(DeviceArray):
    """One-dimensional shared or local array: remembers which words were written."""

    __slots__ = ()
    valid: np.ndarray

    def __getitem__(self, i: Any) -> Any:
        try:
            if i >= 0 and self.valid[i]:
                return self.data[i]
        except (IndexError, TypeError):
            pass
        return self.read(i)

    def __setitem__(self, i: Any, value: Any) -> None:
        try:
            if i >= 0:
                self.data[i] = value
                self.valid[i] = -1
                return
        except (IndexError, TypeError, OverflowError, ValueError):
            pass
        self.write(i, value)


class ScratchArrayN(DeviceArray):
    """Shared or local array of any rank: remembers which words were written."""

    __slots__ = ()
    valid: np.ndarray

    def __getitem__(self, key: Any) -> Any:
        try:
            if len(key) == self.ndim and min(key) >= 0 and self.valid[key]:
                return self.data[key]
        except (IndexError, TypeError, ValueError):
            pass
        return self.read(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        try:
            if len(key) == self.ndim and min(key) >= 0:
                self.data[key] = value
                self.valid[key] = -1
                return
        except (IndexError, TypeError, OverflowError, ValueError):
            pass
        self.write(key, value)


class ObservedArray(DeviceArray):
    """Global or shared array that reports each access to the launch's observers."""

    __slots__ = ("axes", "base")

    def __init__(
        self, machine: "Machine", data: np.ndarray, valid: np.ndarray | None, info: ArrayInfo
    ):
        super().__init__(machine, data, valid, info)
        self.base = data.__array_interface__["data"][0]
        self.axes = tuple(zip(data.shape, data.strides, strict=True))

    def address(self, key: Any) -> int | None:
        """Byte address of an element, None for a slice; raises `OutOfBoundsError`."""
        address = self.base
        try:
            keys = key if key.__class__ is tuple else (key,)
            if len(keys) == self.ndim:
                for k, (n, stride) in zip(map(_index, keys), self.axes, strict=True):
                    if not 0 <= k < n:
                        break
                    address += k * stride
                else:
                    return address
        except TypeError:
            pass
        if self.is_view_key(key):
            return None
        self.checked_key(key)
        raise AssertionError("checked_key accepts what the quick check refuses")

    def __getitem__(self, key: Any) -> Any:
        address = self.address(key)
        if address is None:
            return self.view(key)
        self.machine.observe(self.info, address, key, "load", _getframe(1))
        if self.valid is None or self.valid[key]:
            return self.data[key]
        return self.read(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        address = self.address(key)
        if address is None:
            self.write(key, value)
            return
        self.machine.observe(self.info, address, key, "store", _getframe(1))
        try:
            self.data[key] = value
        except (OverflowError, TypeError, ValueError):
            self.write(key, value)
        if self.valid is not None:
            self.valid[key] = -1

    def atomic(self, key: Any, update: Callable[[Any], Any]) -> Any:
        """As `DeviceArray.atomic`, observed as one access."""
        address = self.address(key)
        if address is not None:
            self.machine.observe(self.info, address, key, "atomic", _getframe(1))
        return super().atomic(key, update)


class ObservedArray1(ObservedArray):
    """One-dimensional observed array: its addresses are cheaper."""

    __slots__ = ("stride",)

    def __init__(
        self, machine: "Machine", data: np.ndarray, valid: np.ndarray | None, info: ArrayInfo
    ):
        super().__init__(machine, data, valid, info)
        self.stride = data.strides[0]

    def address(self, key: Any) -> int | None:
        """As `ObservedArray.address`."""
        try:
            k = _index(key)
            if 0 <= k < self.size:
                return self.base + k * self.stride
        except TypeError:
            pass
        return super().address(key)
