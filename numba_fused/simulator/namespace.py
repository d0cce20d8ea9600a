"""What ``cuda`` and ``math`` mean inside a simulated kernel."""

import math
import sys
from collections.abc import Callable
from fractions import Fraction
from types import CodeType, FrameType
from typing import Any

import numpy as np

from . import sites
from .arrays import DeviceArray, array_info
from .errors import SimulationError
from .machine import WARP_SIZE, Machine, own_code
from .scalars import NAMED_TYPES, as_dtype, cast

_getframe = sys._getframe
FULL_MASK = 0xFFFFFFFF
SPINS_BEFORE_YIELD = 64
"""Atomics in a row by one thread after which others get a turn: it may be spinning on a lock."""


class ThreadIdx:
    """``cuda.threadIdx``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    @property
    def x(self) -> int:
        """Along the first axis."""
        return self._machine.thread.x

    @property
    def y(self) -> int:
        """Along the second axis."""
        return self._machine.thread.y

    @property
    def z(self) -> int:
        """Along the third axis."""
        return self._machine.thread.z


class BlockIdx:
    """``cuda.blockIdx``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    @property
    def x(self) -> int:
        """Along the first axis."""
        return self._machine.thread.block.x

    @property
    def y(self) -> int:
        """Along the second axis."""
        return self._machine.thread.block.y

    @property
    def z(self) -> int:
        """Along the third axis."""
        return self._machine.thread.block.z


class Extent:
    """``cuda.blockDim`` and ``cuda.gridDim``, by the machine's attribute that holds them."""

    def __init__(self, machine: Machine, attribute: str):
        self._machine = machine
        self._attribute = attribute

    @property
    def x(self) -> int:
        """Along the first axis."""
        return getattr(self._machine, self._attribute)[0]

    @property
    def y(self) -> int:
        """Along the second axis."""
        return getattr(self._machine, self._attribute)[1]

    @property
    def z(self) -> int:
        """Along the third axis."""
        return getattr(self._machine, self._attribute)[2]


class Shared:
    """``cuda.shared``: one array per declaration and block.

    As in the compiled kernel, a declaration is a place in the source of one function: called
    twice, or in a loop, it is the same memory; two declarations on one line are two arrays.
    """

    def __init__(self, machine: Machine):
        self._machine = machine

    def array(self, shape: Any, dtype: Any) -> DeviceArray:
        """Shared array; all declarations of shape 0 are views of the dynamic shared memory."""
        machine = self._machine
        frame = _getframe(1)
        key = (id(frame.f_code), machine.places.instruction(frame))
        block = machine.thread.block
        array = block.shared.get(key)
        if array is None:
            array = block.shared[key] = self._declare(key, frame, shape, as_dtype(dtype))
        elif array.dtype != as_dtype(dtype) or shape not in (array.shape, array.size, 0):
            raise SimulationError(
                f"shared array declared as {shape}, {as_dtype(dtype)} here, and as {array.info} "
                f"by another thread of the block{machine.where()}"
            )
        return array

    def _declare(self, key: Any, frame: FrameType, shape: Any, dtype: np.dtype) -> DeviceArray:
        machine = self._machine
        name = sites.assigned_name(frame.f_code, frame.f_lasti)
        if shape == 0:
            block = machine.thread.block
            if block.dynamic is None:
                size = machine.shared_bytes
                block.dynamic = (np.empty(size, np.uint8), np.zeros(size, np.int8))
            memory, written = block.dynamic
            usable = machine.shared_bytes // dtype.itemsize * dtype.itemsize
            data = memory[:usable].view(dtype)
            valid = written[:usable].view(f"i{dtype.itemsize}")
        else:
            data, valid = np.empty(shape, dtype), np.zeros(shape, np.int8)
        return machine.wrap(data, valid, array_info(key, name, "shared", data))


class Local:
    """``cuda.local``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def array(self, shape: Any, dtype: Any) -> DeviceArray:
        """A thread's own array; nothing in it counts as written, each time it is declared."""
        frame = _getframe(1)
        name = sites.assigned_name(frame.f_code, frame.f_lasti)
        data = np.empty(shape, as_dtype(dtype))
        info = array_info(None, name, "local", data)
        return self._machine.wrap(data, np.zeros(shape, np.int8), info)


class Const:
    """``cuda.const``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def array_like(self, array: np.ndarray) -> DeviceArray:
        """A read-only view of a host array."""
        frame = _getframe(1)
        data = np.asarray(array).view()
        data.flags.writeable = False
        name = sites.assigned_name(frame.f_code, frame.f_lasti)
        return self._machine.wrap(data, None, array_info(None, name, "const", data))


class Atomic:
    """``cuda.atomic``: each returns the old value; arithmetic wraps in the array's type."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def _update(self, array: DeviceArray, index: Any, value: Any, new: Callable) -> Any:
        machine = self._machine
        thread = machine.thread
        thread.spins += 1
        if thread.spins > SPINS_BEFORE_YIELD:
            machine.pause("atomic", _getframe(1))
        value = cast(array.dtype, value)
        return array.atomic(index, lambda old: new(old, value))

    def add(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``old + value``."""
        return self._update(array, index, value, lambda old, v: old + v)

    def sub(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``old - value``."""
        return self._update(array, index, value, lambda old, v: old - v)

    def and_(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``old & value``."""
        return self._update(array, index, value, lambda old, v: old & v)

    def or_(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``old | value``."""
        return self._update(array, index, value, lambda old, v: old | v)

    def xor(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``old ^ value``."""
        return self._update(array, index, value, lambda old, v: old ^ v)

    def exch(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store `value`."""
        return self._update(array, index, value, lambda old, v: v)

    def inc(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``0 if old >= value else old + 1``."""
        return self._update(array, index, value, lambda old, v: 0 if old >= v else old + 1)

    def dec(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """Store ``value if old == 0 or old > value else old - 1``."""
        return self._update(
            array, index, value, lambda old, v: v if old == 0 or old > v else old - 1
        )

    def max(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """The larger; a NaN in `value` is not stored."""
        return self._update(array, index, value, lambda old, v: v if v > old else old)

    def min(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """The smaller; a NaN in `value` is not stored."""
        return self._update(array, index, value, lambda old, v: v if v < old else old)

    def nanmax(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """The larger; a NaN loses against a number."""
        return self._update(array, index, value, np.fmax)

    def nanmin(self, array: DeviceArray, index: Any, value: Any) -> Any:
        """The smaller; a NaN loses against a number."""
        return self._update(array, index, value, np.fmin)

    def cas(self, array: DeviceArray, index: Any, old: Any, value: Any) -> Any:
        """`value` where the element equals `old`."""
        expected = cast(array.dtype, old)
        return self._update(array, index, value, lambda found, v: v if found == expected else found)

    def compare_and_swap(self, array: DeviceArray, old: Any, value: Any) -> Any:
        """As `cas`, on element 0."""
        return self.cas(array, 0, old, value)


class GridGroup:
    """``cuda.cg.this_grid()``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def sync(self) -> None:
        """Wait for all threads of all blocks."""
        self._machine.grid_barrier(_getframe(1))


class CooperativeGroups:
    """``cuda.cg``."""

    def __init__(self, machine: Machine):
        self._machine = machine

    def this_grid(self) -> GridGroup:
        """The group of all threads of the launch."""
        return GridGroup(self._machine)


class Cuda:
    """``cuda`` inside a simulated kernel. Anything it lacks raises `AttributeError` by name.

    Beyond numba's names there are, for the Python meaning of intrinsics, `exchange_sync`, in which
    a warp works together (each lane brings a value and gets what all 32 make together), and
    `named_barrier`, for some of a block's warps.
    """

    warpsize = WARP_SIZE

    def __init__(self, machine: Machine, fence: Callable[[], None]):
        self._machine = machine
        self._fence = fence
        self.threadIdx = ThreadIdx(machine)
        self.blockIdx = BlockIdx(machine)
        self.blockDim = Extent(machine, "block_dim")
        self.gridDim = Extent(machine, "grid")
        self.shared = Shared(machine)
        self.local = Local(machine)
        self.const = Const(machine)
        self.atomic = Atomic(machine)
        self.cg = CooperativeGroups(machine)

    def __getattr__(self, name: str) -> Any:
        try:
            return NAMED_TYPES[name]
        except KeyError:
            raise AttributeError(f"the simulator has no cuda.{name}") from None

    # ------------------------------------------------------------------ coordinates

    @property
    def laneid(self) -> int:
        """Position of the thread in its warp."""
        return self._machine.thread.lane

    def grid(self, ndim: int) -> int | tuple[int, ...]:
        """The thread's position in the grid along 1 to 3 axes."""
        machine = self._machine
        t, b, d = machine.thread, machine.thread.block, machine.block_dim
        position = (b.x * d[0] + t.x, b.y * d[1] + t.y, b.z * d[2] + t.z)
        return position[0] if ndim == 1 else position[:ndim]

    def gridsize(self, ndim: int) -> int | tuple[int, ...]:
        """Threads in the grid along 1 to 3 axes."""
        machine = self._machine
        size = tuple(b * g for b, g in zip(machine.block_dim, machine.grid, strict=True))
        return size[0] if ndim == 1 else size[:ndim]

    # ------------------------------------------------------------------ barriers and fences

    def syncthreads(self) -> None:
        """Wait for all threads of the block."""
        self._machine.barrier("syncthreads", _getframe(1))

    def syncthreads_count(self, predicate: Any) -> int:
        """Wait; return how many threads brought a true predicate."""
        return self._machine.barrier("syncthreads_count", _getframe(1), bool(predicate), sum)

    def syncthreads_and(self, predicate: Any) -> int:
        """Wait; return 1 if all predicates are true."""
        return self._machine.barrier(
            "syncthreads_and", _getframe(1), bool(predicate), lambda values: int(all(values))
        )

    def syncthreads_or(self, predicate: Any) -> int:
        """Wait; return 1 if any predicate is true."""
        return self._machine.barrier(
            "syncthreads_or", _getframe(1), bool(predicate), lambda values: int(any(values))
        )

    def syncwarp(self, mask: int = FULL_MASK) -> None:
        """Wait for the lanes of `mask`."""
        self._machine.exchange("syncwarp", mask, None, _getframe(1))

    def named_barrier(self, which: Any, threads: Any, waits: bool) -> None:
        """Be the next of `threads` at barrier number `which`; wait for the others, or go on."""
        self._machine.named_barrier(int(which), int(threads), waits, _getframe(1))

    def threadfence(self) -> None:
        """Release the thread's writes to later atomics."""
        self._fence()

    threadfence_block = threadfence
    threadfence_system = threadfence

    def nanosleep(self, nanoseconds: int) -> None:
        """Let all other threads have a turn."""
        self._machine.pause("nanosleep", _getframe(1))

    # ------------------------------------------------------------------ warp collectives

    def exchange_sync(
        self, mask: int, value: Any, combine: Callable[[list[Any]], Any] = tuple
    ) -> Any:
        """All 32 lanes' values, None for lanes outside `mask`; or what `combine` makes of them."""
        return self._machine.exchange("exchange_sync", mask, value, _getframe(1), combine)

    def _shuffle(self, kind: str, mask: int, value: Any, source: int, frame: FrameType) -> Any:
        values = self._machine.exchange(kind, mask, value, frame)
        if not 0 <= source < WARP_SIZE:
            return value
        return undefined_like(value) if values[source] is None else values[source]

    def shfl_sync(self, mask: int, value: Any, src_lane: int) -> Any:
        """Lane `src_lane`'s value, modulo 32."""
        return self._shuffle("shfl_sync", mask, value, int(src_lane) % WARP_SIZE, _getframe(1))

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        """The value of the lane `delta` below; below lane 0, the own value."""
        source = self.laneid - int(delta)
        return self._shuffle("shfl_up_sync", mask, value, source, _getframe(1))

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        """The value of the lane `delta` above; above lane 31, the own value."""
        source = self.laneid + int(delta)
        return self._shuffle("shfl_down_sync", mask, value, source, _getframe(1))

    def shfl_xor_sync(self, mask: int, value: Any, lane_mask: int) -> Any:
        """The value of lane ``laneid ^ lane_mask``; above lane 31, the own value."""
        source = self.laneid ^ int(lane_mask)
        return self._shuffle("shfl_xor_sync", mask, value, source, _getframe(1))

    def _votes(self, kind: str, mask: int, predicate: Any, frame: FrameType) -> list[bool]:
        values = self._machine.exchange(kind, mask, bool(predicate), frame)
        return [value for value in values if value is not None]

    def all_sync(self, mask: int, predicate: Any) -> bool:
        """Whether all predicates are true."""
        return all(self._votes("all_sync", mask, predicate, _getframe(1)))

    def any_sync(self, mask: int, predicate: Any) -> bool:
        """Whether any predicate is true."""
        return any(self._votes("any_sync", mask, predicate, _getframe(1)))

    def eq_sync(self, mask: int, predicate: Any) -> bool:
        """Whether all predicates are equal."""
        return len(set(self._votes("eq_sync", mask, predicate, _getframe(1)))) == 1

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        """Mask of the lanes whose predicate is true."""
        values = self._machine.exchange("ballot_sync", mask, bool(predicate), _getframe(1))
        return sum(1 << lane for lane, value in enumerate(values) if value)

    def match_any_sync(self, mask: int, value: Any) -> int:
        """Mask of the lanes whose value equals the own."""
        values = self._machine.exchange("match_any_sync", mask, value, _getframe(1))
        return sum(1 << lane for lane, v in enumerate(values) if v is not None and v == value)

    def match_all_sync(self, mask: int, value: Any) -> tuple[int, bool]:
        """Mask of all lanes and True if their values are equal, else 0 and False."""
        values = self._machine.exchange("match_all_sync", mask, value, _getframe(1))
        lanes = [lane for lane, v in enumerate(values) if v is not None]
        same = all(values[lane] == value for lane in lanes)
        return (sum(1 << lane for lane in lanes) if same else 0), same

    def activemask(self) -> int:
        """Lanes that wait at this very call when nobody can go on."""
        return self._machine.active_mask(_getframe(1))

    def lanemask_lt(self) -> int:
        """Mask of the lower lanes."""
        return (1 << self.laneid) - 1

    # ------------------------------------------------------------------ scalar functions

    def popc(self, x: Any) -> int:
        """Number of set bits."""
        return _bits(x)[0].bit_count()

    def clz(self, x: Any) -> int:
        """Number of leading zeros in the width of the type."""
        bits, width = _bits(x)
        return width - bits.bit_length()

    def ffs(self, x: Any) -> int:
        """Position of the lowest set bit from 1, 0 for none."""
        bits, _ = _bits(x)
        return (bits & -bits).bit_length()

    def brev(self, x: Any) -> Any:
        """Bits in reverse order."""
        bits, width = _bits(x)
        reverse = int(f"{bits:0{width}b}"[::-1], 2)
        return cast(x.dtype, reverse) if isinstance(x, np.generic) else reverse

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c`` rounded once."""
        if a.__class__ is np.float32:
            return np.float32(_round_to_odd_sum(float(a) * float(b), float(c)))
        return np.float64(_exact_fma(float(a), float(b), float(c)))

    def cbrt(self, x: Any) -> Any:
        """Cube root."""
        return np.cbrt(x)

    def selp(self, condition: Any, if_true: Any, if_false: Any) -> Any:
        """``if_true if condition else if_false``."""
        return if_true if condition else if_false

    # ------------------------------------------------------------------ cache-hinted accesses

    def _load(self, array: DeviceArray, index: Any) -> Any:
        return array[index]

    def _store(self, array: DeviceArray, index: Any, value: Any) -> None:
        array[index] = value

    ldca = ldcg = ldcs = ldlu = ldcv = _load
    stcg = stcs = stwb = stwt = _store


def _bits(x: Any) -> tuple[int, int]:
    """Bit pattern and width of an integer; a Python int is 64 bits wide, as in numba."""
    width = 8 * x.dtype.itemsize if isinstance(x, np.generic) else 64
    return int(x) & ((1 << width) - 1), width


def _round_to_odd_sum(a: float, b: float) -> float:
    """``a + b`` in double, the last bit set where inexact, so that rounding to float32 is right."""
    total = a + b
    if not math.isfinite(total):
        return total
    part = total - a
    error = (a - (total - part)) + (b - part)
    odd = int(math.frexp(total)[0] * 2**53) & 1
    if error and not odd:
        return math.nextafter(total, math.copysign(math.inf, error))
    return total


def _exact_fma(a: float, b: float, c: float) -> float:
    if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return float(exact) if exact else a * b + c


def undefined_like(value: Any) -> Any:
    """What a shuffle returns from a lane that takes no part: NaN, or a recognisable integer."""
    if isinstance(value, (float, np.floating)):
        return type(value)("nan")
    if isinstance(value, np.integer):
        return cast(value.dtype, 0xDEADBEEFDEADBEEF)
    return 0xDEADBEEF


_UFUNCS: dict[str, np.ufunc] = {
    "acos": np.arccos,
    "acosh": np.arccosh,
    "asin": np.arcsin,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "atanh": np.arctanh,
    "cbrt": np.cbrt,
    "copysign": np.copysign,
    "cos": np.cos,
    "cosh": np.cosh,
    "degrees": np.degrees,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "fabs": np.fabs,
    "fmod": np.fmod,
    "hypot": np.hypot,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "pow": np.power,
    "radians": np.radians,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
}


class Math:
    """``math`` with the rules of CUDA: float32 in, float32 out, and NaN or Inf, not exceptions."""

    def __getattr__(self, name: str) -> Any:
        function = _UFUNCS.get(name)
        if function is not None:
            function = _in_double(function)
        elif name in ("erf", "erfc", "gamma", "lgamma"):
            function = _in_double(getattr(math, name))
        else:
            function = getattr(math, name)
        setattr(self, name, function)
        return function


def _in_double(function: Callable) -> Callable:
    """Compute in double precision and round to float32 when all arguments are float32."""
    float32, float64 = np.float32, np.float64

    def rounded(*args: Any) -> Any:
        result = function(*map(float64, args))
        for argument in args:
            if argument.__class__ is not float32:
                return float64(result)
        return float32(result)

    return rounded


def transparent_code() -> set[int]:
    """Ids of the code objects that may lie between a kernel's line and a memory access."""
    codes: list[CodeType] = []
    for cls in (Cuda, Atomic, GridGroup, CooperativeGroups, Shared, Local, Const):
        codes += own_code(cls)
    return {id(code) for code in codes}
