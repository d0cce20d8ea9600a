"""Launch a kernel on the GPU in a few microseconds.

A *launcher* is any callable ``launch(kernel, grid, block, *args)``. This one puts the kernel
on a CUDA stream; `numba_fused.simulator.Simulator.launch` runs the same kernel in this process.
A rung of the ladder is given one of the two and cannot tell which.

Numba's own launch takes each argument apart anew, in Python, for most of a millisecond. Here the
first launch with given argument types compiles the kernel (`cubins`), loads it, and settles where
each of its parameters lies in a buffer (`Parameters`); a later one writes the arguments into such
a buffer and calls the driver. It allocates nothing on the GPU and waits for nothing, so it can be
captured into a CUDA graph; threads share everything but the buffers.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
from numba import from_dtype
from numba.cuda import types

from numba_fused.device.cubins import cubin

Dim: TypeAlias = int | tuple[int, ...]
Geometry: TypeAlias = tuple[int, ...]


class Launcher(Protocol):
    """Runs `kernel` over `grid` blocks of `block` threads."""

    def __call__(
        self,
        kernel: Any,
        grid: Dim,
        block: Dim,
        *args: Any,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Launch once; returns when the launch is queued (GPU) or done (simulator).

        Parameters
        ----------
        kernel
            What ``@cuda.jit`` returned.
        grid, block : int or tuple of 1 to 3 ints
        *args
            Contiguous arrays, Python and NumPy numbers, and tuples of numbers.
        shared_bytes : int
            Dynamic shared memory of a block.
        cooperative : bool
            Have all blocks resident at once, so that they may wait for each other.
        """
        ...


class GpuLauncher:
    """Launches on one stream of one GPU; arrays are torch tensors, or look like them.

    Parameters
    ----------
    device_index : int
        CUDA's ordinal of the GPU that holds the arguments.
    stream : int
        The stream's handle, ``torch.cuda.current_stream().cuda_stream``: work is ordered after
        what torch queued there, and is captured when that stream is being captured.
    """

    def __init__(self, device_index: int, stream: int) -> None:
        self.gpu = gpu(device_index)
        self.stream = driver.CUstream(stream)

    def __call__(
        self,
        kernel: Any,
        grid: Dim,
        block: Dim,
        *args: Any,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Queue one launch; the first one of a kernel compiles it."""
        kinds, words = flatten(args)
        loaded = self.gpu.kernels.get((kernel, *kinds)) or self.gpu.load(kernel, kinds)
        entered = self.gpu.enter()
        try:
            loaded.launch(self.stream, grid, block, words, shared_bytes, cooperative)
        finally:
            if entered:
                self.gpu.leave()


# ---- arguments ----------------------------------------------------------------------------------
#
# To numba a parameter list is flat. A number is one parameter, a tuple its entries, and an array
#
#     meminfo, parent, number of values, itemsize, address, *shape, *strides in bytes
#
# of 8 bytes each, the first two null. The driver takes a table of addresses, one a parameter,
# and reads each parameter where its address points to. So words that never change (nulls,
# itemsizes) are in the buffer from the start, and a one-dimensional array comes down to two words.

# struct's codes, which also serve as names of the types: an int is an int64, a float a float64.
SCALAR_CODES: dict[type, str] = {
    bool: "?",
    int: "q",
    float: "d",
    np.bool_: "?",
    np.int8: "b",
    np.int16: "h",
    np.int32: "i",
    np.int64: "q",
    np.uint8: "B",
    np.uint16: "H",
    np.uint32: "I",
    np.uint64: "Q",
    np.float32: "f",
    np.float64: "d",
}
SCALAR_TYPES: dict[str, types.Type] = {
    code: types.boolean if code == "?" else from_dtype(np.dtype(kind))
    for kind, code in SCALAR_CODES.items()
}
WORD = 8
CONSTANTS = (0, 1, 2, 4, 8)  # words at the head of each buffer: null, and the itemsizes
ADDRESS = 4  # an array's address among its parameters


class PackedTuple(NamedTuple):
    """A tuple of numbers, ready for the buffer."""

    value: tuple[Any, ...]
    code: str  # nested in parentheses as the tuple is
    data: bytes  # a word for each number


# By id: a rung passes the same tuple object launch after launch. The entry refers to the tuple, so
# no other object can come to have its id.
_packed_tuples: dict[int, PackedTuple] = {}
MOST_PACKED_TUPLES = 1024


def flatten(args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What the arguments are, and the words of the buffer that they fill.

    Returns
    -------
    kinds : list
        A struct code for a number or tuple, a dtype for a one-dimensional array, a dtype and the
        number of axes for any other: what a compiled kernel is specific to.
    words : list
        A number as it is, a tuple as bytes; address and number of values of a one-dimensional
        array, and shape and strides of any other.
    """
    kinds: list[Any] = []
    words: list[Any] = []
    for arg in args:
        code = SCALAR_CODES.get(type(arg))
        if code is not None:
            kinds.append(code)
            words.append(arg)
        elif type(arg) is tuple:
            packed = _packed_tuples.get(id(arg)) or pack_tuple(arg)
            kinds.append(packed.code)
            words.append(packed.data)
        else:
            try:
                if not arg.is_contiguous():
                    raise ValueError(
                        f"a kernel takes contiguous tensors, but got one of shape "
                        f"{tuple(arg.shape)} and strides {arg.stride()}: use .contiguous()"
                    )
                kinds.append(arg.dtype)
                words.append(arg.data_ptr())
                words.append(arg.numel())
                if arg.ndim != 1:
                    kinds.append(arg.ndim)
                    words += arg.shape
                    words += [stride * arg.element_size() for stride in arg.stride()]
            except AttributeError:
                raise TypeError(
                    f"a kernel takes CUDA tensors, numbers and tuples of numbers, but got "
                    f"{arg!r} of type {type(arg).__name__}"
                ) from None
            except RuntimeError as error:
                raise TypeError(
                    f"a kernel takes tensors with memory of their own, but one of shape "
                    f"{tuple(arg.shape)} has none, as under a transform of torch.func: launch in "
                    f"the body of an operator (torch.library.custom_op), where tensors are plain"
                ) from error
    return kinds, words


def pack_tuple(value: tuple[Any, ...]) -> PackedTuple:
    """Pack a tuple of numbers and of such tuples, and remember it."""
    if len(_packed_tuples) >= MOST_PACKED_TUPLES:
        _packed_tuples.clear()
    packed = _packed_tuples[id(value)] = PackedTuple(value, *_pack(value))
    return packed


def _pack(value: Any) -> tuple[str, bytes]:
    """Code and words of a number or tuple."""
    if type(value) is tuple:
        codes, words = zip(*map(_pack, value), strict=True) if value else ((), ())
        return f"({''.join(codes)})", b"".join(words)
    if type(value) not in SCALAR_CODES:
        raise TypeError(
            f"a tuple given to a kernel holds numbers, but got {value!r} of type "
            f"{type(value).__name__}"
        )
    code = SCALAR_CODES[type(value)]
    return code, struct.pack("<" + _field(code), value)


def _field(code: str) -> str:
    """struct's format of a number in a word of its own."""
    return f"{code}{WORD - struct.calcsize('<' + code)}x"


def _type_of_numbers(code: str) -> types.Type:
    """Numba's type of a number or tuple with that code."""
    open_tuples: list[list[types.Type]] = [[]]
    for character in code:
        if character == "(":
            open_tuples.append([])
        elif character == ")":
            entries = tuple(open_tuples.pop())
            open_tuples[-1].append(types.BaseTuple.from_types(entries))
        else:
            open_tuples[-1].append(SCALAR_TYPES[character])
    return open_tuples[0][0]


class Parameters:
    """Where the parameters of a kernel lie in the buffer of a launch.

    Parameters
    ----------
    kinds : sequence
        As `flatten` returns them.

    Attributes
    ----------
    signature : tuple of numba types
        Of the kernel's arguments.
    offsets : list of int
        Of each flat parameter in the buffer, in the kernel's order.
    addresses : list of int
        Which of the flat parameters are the addresses of the arrays.
    """

    def __init__(self, kinds: Sequence[Any]) -> None:
        self.offsets: list[int] = []
        self.addresses: list[int] = []
        self._fields = "<"
        self._size = WORD * len(CONSTANTS)
        signature: list[types.Type] = []
        for kind, following in itertools.zip_longest(kinds, kinds[1:]):
            if isinstance(kind, str):
                signature.append(self._add_numbers(kind))
            elif not isinstance(kind, int):
                signature.append(
                    self._add_array(kind, following if isinstance(following, int) else 1)
                )
        self.signature = tuple(signature)
        self._struct = struct.Struct(self._fields)

    def buffer(self) -> Buffer:
        """A new buffer."""
        return Buffer(self._size, self.offsets)

    def pack(self, buffer: Buffer, words: Sequence[Any]) -> None:
        """Write the words of a launch into its buffer."""
        self._struct.pack_into(buffer.memory, WORD * len(CONSTANTS), *words)

    def _add_numbers(self, code: str) -> types.Type:
        count = sum(character not in "()" for character in code)
        self._fields += f"{WORD * count}s" if code[0] == "(" else _field(code)
        self.offsets += self._next_words(count)
        return _type_of_numbers(code)

    def _add_array(self, dtype: Any, axes: int) -> types.Array:
        element = np.dtype(str(dtype).removeprefix("torch."))
        null, itemsize = (WORD * CONSTANTS.index(constant) for constant in (0, element.itemsize))
        count_of_words = 2 if axes == 1 else 2 + 2 * axes
        self._fields += f"{count_of_words}Q"
        address, size, *shape_and_strides = self._next_words(count_of_words)
        if axes == 1:
            shape_and_strides = [size, itemsize]
        self.addresses.append(len(self.offsets) + ADDRESS)
        self.offsets += [null, null, size, itemsize, address, *shape_and_strides]
        return types.Array(from_dtype(element), axes, "C")

    def _next_words(self, count: int) -> range:
        """Offsets of the next `count` words."""
        first, self._size = self._size, self._size + WORD * count
        return range(first, self._size, WORD)


class Buffer:
    """Memory for the parameters of one launch, and the table of their addresses."""

    def __init__(self, size: int, offsets: Sequence[int]) -> None:
        self.memory = ctypes.create_string_buffer(size)
        struct.pack_into(f"<{len(CONSTANTS)}Q", self.memory, 0, *CONSTANTS)
        first = ctypes.addressof(self.memory)
        self.table = (ctypes.c_void_p * len(offsets))(*(first + offset for offset in offsets))
        self.table_address = ctypes.addressof(self.table)


# ---- kernels on a GPU ---------------------------------------------------------------------------


class LoadedKernel:
    """A kernel for one signature, loaded on one GPU.

    Attributes
    ----------
    parameters : Parameters
    """

    def __init__(
        self, name: str, function: Any, parameters: Parameters, synchronises_grid: bool
    ) -> None:
        self.parameters = parameters
        self._name = name
        self._function = function
        self._synchronises_grid = synchronises_grid
        self._shared_bytes = 0  # dynamic shared memory that launches may ask for
        self._buffers: list[Buffer] = []  # not in use; append and pop are atomic

    def launch(
        self,
        stream: Any,
        grid: Dim,
        block: Dim,
        words: Sequence[Any],
        shared_bytes: int,
        cooperative: bool,
    ) -> None:
        """Queue one launch."""
        if shared_bytes > self._shared_bytes:
            self._allow(shared_bytes)
        if self._synchronises_grid and not cooperative:
            raise ValueError(f"{self._name} synchronises its grid: launch with cooperative=True")
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = self.parameters.buffer()
        self.parameters.pack(buffer, words)
        self.queue(stream, geometry(grid, block, shared_bytes), cooperative, buffer.table_address)
        self._buffers.append(buffer)

    def queue(self, stream: Any, geometry: Geometry, cooperative: bool, table_address: int) -> None:
        """Queue a launch of parameters that lie ready: the driver copies them before it returns."""
        if cooperative:
            (status,) = driver.cuLaunchCooperativeKernel(
                self._function, *geometry, stream, table_address
            )
        else:
            (status,) = driver.cuLaunchKernel(self._function, *geometry, stream, table_address, 0)
        if status:
            raise RuntimeError(
                f"cannot launch {self._name} with grid {geometry[:3]}, block {geometry[3:6]}, "
                f"{geometry[6]:,} bytes of dynamic shared memory: {status.name}"
            )

    def _allow(self, shared_bytes: int) -> None:
        """Above 48 KB, static shared memory included, the driver wants to be told beforehand."""
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with _lock:
            if shared_bytes > self._shared_bytes:
                check(driver.cuFuncSetAttribute(self._function, attribute, shared_bytes))
                self._shared_bytes = shared_bytes


def geometry(grid: Dim, block: Dim, shared_bytes: int) -> Geometry:
    """Three axes of the grid, three of the block, and the dynamic shared memory."""
    return (*_three(grid), *_three(block), shared_bytes)


def _three(dim: Dim) -> tuple[int, ...]:
    return (*dim, 1, 1)[:3] if isinstance(dim, tuple) else (dim, 1, 1)


class Gpu:
    """One GPU, torch's context on it, and the kernels loaded there.

    Attributes
    ----------
    kernels : dict
        By kernel and kinds of its arguments.
    """

    def __init__(self, index: int) -> None:
        check(driver.cuInit(0))
        device = check(driver.cuDeviceGet(index))
        major, minor = (
            check(driver.cuDeviceGetAttribute(attribute, device))
            for attribute in (
                driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self._index = index
        self._compute_capability = (major, minor)
        self._context = check(driver.cuDevicePrimaryCtxRetain(device))
        self._context_address = int(self._context)
        self.kernels: dict[tuple[Any, ...], LoadedKernel] = {}

    def enter(self) -> bool:
        """Make torch's context current; whether it was not, so that `leave` must follow.

        A thread that has not used this GPU yet, or uses another one, has another context.
        """
        _, context = driver.cuCtxGetCurrent()
        if int(context) == self._context_address:
            return False
        check(driver.cuCtxPushCurrent(self._context))
        return True

    def leave(self) -> None:
        """Make the thread's own context current again."""
        check(driver.cuCtxPopCurrent())

    def load(self, kernel: Any, kinds: Sequence[Any]) -> LoadedKernel:
        """Compile the kernel, or find it compiled, and load it."""
        key = (kernel, *kinds)
        with _lock:  # one thread compiles, the others find the result
            if key not in self.kernels:
                self.kernels[key] = self._load(kernel, Parameters(kinds))
            return self.kernels[key]

    def _load(self, kernel: Any, parameters: Parameters) -> LoadedKernel:
        made = cubin(kernel, parameters.signature, self._index, self._compute_capability)
        check(driver.cuCtxPushCurrent(self._context))
        try:
            module = check(driver.cuModuleLoadData(made.code))
            function = check(driver.cuModuleGetFunction(module, made.entry_name.encode()))
        finally:
            check(driver.cuCtxPopCurrent())
        return LoadedKernel(kernel.py_func.__name__, function, parameters, made.cooperative)


_lock = threading.Lock()
_gpus: dict[int, Gpu] = {}


def gpu(index: int) -> Gpu:
    """The GPU with CUDA's ordinal `index`."""
    found = _gpus.get(index)
    if found is None:
        with _lock:
            found = _gpus.get(index) or Gpu(index)
            _gpus[index] = found
    return found


def check(result: tuple[Any, ...]) -> Any:
    """The value of a driver call.

    Raises
    ------
    RuntimeError
        The call failed.
    """
    status, *values = result
    if status:
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values[0] if values else None
