"""device/launch.py and device/cubins.py: compile once, keep it on disk, launch in microseconds.

Without a GPU a stub stands in for the driver. It reads the parameters of each launch as the
driver would, through the table of addresses it is handed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
from definition import BOUNDS, random_operands
from numba import cuda, float32, int32
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad
from torch.utils._python_dispatch import TorchDispatchMode

import numba_fused as nf
from numba_fused import backward, ladder, ops
from numba_fused import fused_conv_group_norm_min_clamp_dropout as fused
from numba_fused.device import cubins, launch
from numba_fused.device.cubins import Cubin, fingerprint
from numba_fused.device.launch import GpuLauncher, Parameters, flatten
from numba_fused.ladder.replay import MOST_SCRATCH_BYTES, TENSORS, Repeated
from numba_fused.ladder.rung import Rung, gpu_launcher

THREADS = 8
VECTOR_SIGNATURE = (numba.float32[::1],)


# ---- kernels ------------------------------------------------------------------------------------


@cuda.jit
def add_kernel(x, out, term):
    i = cuda.grid(1)
    if i < out.size:
        out[i] = x[i] + term


@cuda.jit
def fill_kernel(out, shape, value):
    """out (rows, columns), shape (rows, columns) as a tuple."""
    i = cuda.grid(1)
    if i < shape[0] * shape[1]:
        out[i // shape[1], i % shape[1]] = value[0]


@cuda.jit
def no_arguments_kernel():
    pass


@cuda.jit
def reverse_kernel(x):
    """Reverse x, one block, through dynamic shared memory of x's size."""
    copy = cuda.shared.array(0, float32)
    for i in range(cuda.threadIdx.x, x.size, cuda.blockDim.x):
        copy[i] = x[i]
    cuda.syncthreads()
    for i in range(cuda.threadIdx.x, x.size, cuda.blockDim.x):
        x[i] = copy[x.size - 1 - i]


@cuda.jit
def exchange_kernel(x, out):
    """Every block reads what another wrote before the grid's barrier."""
    grid = cuda.cg.this_grid()
    if cuda.threadIdx.x == 0:
        x[cuda.blockIdx.x] = cuda.blockIdx.x
    grid.sync()
    if cuda.threadIdx.x == 0:
        out[cuda.blockIdx.x] = x[cuda.gridDim.x - 1 - cuda.blockIdx.x]


@dataclasses.dataclass(frozen=True)
class Tile:
    rows: int
    columns: int = 4


def make_kernel(constant: Any, **options: Any) -> Any:
    """A kernel specialised on `constant`, once in its own closure and once in a callee's."""

    @cuda.jit(device=True)
    def callee(x):
        return x if constant is None else -x

    @cuda.jit(**options)
    def specialised_kernel(x):
        x[0] = callee(x[0])

    return specialised_kernel


# ---- parameters ---------------------------------------------------------------------------------

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "vectors": (torch.zeros(6), torch.zeros(3, dtype=torch.uint8), torch.zeros(0)),
    "matrices": (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 1, 3, dtype=torch.int64)),
    "after a matrix": (torch.zeros(2, 3), torch.zeros(5), torch.zeros(2, 2), 7),
    "no axes": (torch.zeros(()),),
    "numbers": (7, 2.5, True, np.int32(-5), np.uint64(2**64 - 1), np.float32(0.5), np.bool_(True)),
    "tuples": ((np.int32(1), np.int32(2)), ((1, 2.0), (np.float32(3), (True,)))),
    "all": (torch.zeros(6), (np.int32(1), 2), np.float32(3), torch.zeros(1, 2), 4, torch.zeros(1)),
}


def passed(parameters: Parameters, words: list[Any], sizes: list[int]) -> list[bytes]:
    """The bytes of each parameter as the driver finds them."""
    buffer = parameters.buffer()
    parameters.pack(buffer, words)
    table = ctypes.cast(buffer.table_address, ctypes.POINTER(ctypes.c_void_p))
    return [ctypes.string_at(table[i], size) for i, size in enumerate(sizes)]


def ptx_parameter_sizes(types: tuple[Any, ...]) -> list[int]:
    """Sizes of the parameters of a kernel that numba compiles for these types."""
    names = ", ".join(f"a{i}" for i in range(len(types)))
    scope: dict[str, Any] = {}
    exec(f"def kernel({names}): pass", scope)
    ptx, _ = cuda.compile_ptx(scope["kernel"], types, cc=(9, 0))
    _, _, entry = ptx.partition(".entry")
    declared = re.findall(r"\.param \.[a-z](\d+)", entry.partition("{")[0])
    return [SIZES[bits] for bits in declared]


def as_numba_flattens(value: Any) -> Iterator[bytes]:
    """The parameters of an argument, by numba's `_Kernel._prepare_args`."""
    if isinstance(value, Tensor):
        itemsize = value.element_size()
        strides = (stride * itemsize for stride in value.stride())
        words = (0, 0, value.numel(), itemsize, value.data_ptr(), *value.shape, *strides)
        yield from (word.to_bytes(8, "little") for word in words)
    elif isinstance(value, tuple):
        for entry in value:
            yield from as_numba_flattens(entry)
    else:
        yield np.asarray(value).tobytes()


@pytest.mark.parametrize("case", ARGUMENTS)
def test_parameters_are_what_numba_compiles_kernels_for(case: str) -> None:
    """In number, in size, and in value, whatever the buffer held before."""
    args = ARGUMENTS[case]
    kinds, words = flatten(args)
    parameters = Parameters(kinds)
    by_numba = tuple(numba.typeof(a.numpy() if isinstance(a, Tensor) else a) for a in args)
    assert parameters.signature == by_numba
    sizes = ptx_parameter_sizes(by_numba)
    assert len(parameters.offsets) == len(sizes)
    assert passed(parameters, words, sizes) == [b for a in args for b in as_numba_flattens(a)]


def test_tuples_are_told_apart_however_many_there_are() -> None:
    for i in range(3 * launch.MOST_PACKED_TUPLES):
        kinds, words = flatten([(np.int32(i), float(i))])
        assert kinds == ["(id)"]
        assert passed(Parameters(kinds), words, [4, 8]) == [
            np.int32(i).tobytes(),
            np.float64(i).tobytes(),
        ]
    assert len(launch._packed_tuples) <= launch.MOST_PACKED_TUPLES


@pytest.mark.parametrize(
    ("argument", "exception", "message"),
    [
        (torch.zeros(4, 3).T, ValueError, r"shape \(3, 4\) and strides \(1, 3\).*\.contiguous\(\)"),
        ("text", TypeError, "'text' of type str"),
        (None, TypeError, "None of type NoneType"),
        ([1, 2], TypeError, r"\[1, 2\] of type list"),
        ((1, torch.zeros(2)), TypeError, "tuple given to a kernel holds numbers, .*Tensor"),
    ],
    ids=str,
)
def test_other_arguments_are_refused(argument: Any, exception: Any, message: str) -> None:
    with pytest.raises(exception, match=message):
        flatten([argument])


def test_a_tensor_without_memory_is_refused_and_says_why() -> None:
    """Transforms wrap every tensor, even those that are made under them."""

    def launched(x: Tensor) -> Tensor:
        for wrapped in (x, torch.zeros(3)):
            with pytest.raises(TypeError, match=r"has none, as under a transform of torch\.func"):
                flatten([wrapped])
        return x.sum()

    grad(launched)(torch.zeros(3))


# ---- fingerprints -------------------------------------------------------------------------------


@pytest.fixture
def some_toolchain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of a machine with a driver."""
    monkeypatch.setattr(cubins, "toolchain", lambda: "toolchain 1")


def name_of(kernel: Any, signature: Any = VECTOR_SIGNATURE, capability: Any = (9, 0)) -> str:
    return fingerprint(kernel, signature, capability)


CONSTANTS: list[Any] = [
    None, 1, 2, 1.0, True, 0.0, -0.0, math.nan, "1", b"1", (1, 2), (1, (2,)), (1.0, 2),
    np.int32(1), np.int64(1), np.float32(1), np.array([1, 2]), np.array([1, 3]), float32, int32,
    Tile(2), Tile(3), Tile(2, 5), math, np.float32, make_kernel(1), make_kernel(2), make_kernel,
]  # fmt: skip


@pytest.mark.usefixtures("some_toolchain")
def test_equal_kernels_have_equal_fingerprints_and_others_do_not() -> None:
    """The constants differ, each from all others, in value or in type."""
    names = [name_of(make_kernel(constant)) for constant in CONSTANTS]
    assert len(set(names)) == len(CONSTANTS)
    assert names == [name_of(make_kernel(constant)) for constant in CONSTANTS]


@pytest.mark.usefixtures("some_toolchain")
def test_everything_else_the_code_depends_on_changes_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [
        name_of(make_kernel(1)),
        name_of(make_kernel(1, launch_bounds=128)),
        name_of(make_kernel(1, launch_bounds=(128, 2))),
        name_of(make_kernel(1, fastmath=True)),
        name_of(make_kernel(1, max_registers=64)),
        name_of(make_kernel(1), (numba.float64[::1],)),
        name_of(make_kernel(1), capability=(8, 0)),
        name_of(add_kernel),
    ]
    monkeypatch.setattr(cubins, "PACKAGE_SOURCES", "edited")
    names.append(name_of(make_kernel(1)))
    monkeypatch.setattr(cubins, "toolchain", lambda: "toolchain 2")
    names.append(name_of(make_kernel(1)))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", ["device/reductions.py", "ladder/rung_1_unfused.py", "rng.py"])
def test_an_edit_anywhere_in_the_kernel_code_changes_the_sources_digest(
    file: str, tmp_path: Path
) -> None:
    copies = [tmp_path / name for name in ("before", "same", "edited")]
    for copy in copies:
        shutil.copytree(cubins.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with open(copies[2] / file, "a") as source:
        source.write("\n")
    before, same, edited = map(cubins.sources_digest, copies)
    assert before == same == cubins.PACKAGE_SOURCES
    assert edited != before


@pytest.mark.slow
@pytest.mark.usefixtures("some_toolchain")
def test_another_process_finds_the_same_fingerprint() -> None:
    program = (
        "import test_launch as t; t.cubins.toolchain = lambda: 'toolchain 1';"
        f"t.cubins.PACKAGE_SOURCES = {cubins.PACKAGE_SOURCES!r};"
        "print(t.name_of(t.make_kernel((1, 't', t.Tile(3)))))"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == name_of(make_kernel((1, "t", Tile(3))))


@pytest.mark.usefixtures("some_toolchain")
def test_what_only_identity_tells_apart_is_refused() -> None:
    with pytest.raises(TypeError, match=r"callee closes over 'constant': .*type object.*globals?"):
        name_of(make_kernel(object()))


# ---- the disk cache -----------------------------------------------------------------------------


class Compiler:
    """Stands in for numba: notes what it compiles."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def __call__(self, kernel: Any, signature: Any, device_index: int) -> Cubin:
        self.compiled.append(kernel.py_func.__name__)
        code = f"{kernel.py_func.__name__}\n{signature}\n".encode() * 100
        return Cubin(code, f"_Z{kernel.py_func.__name__}", kernel is exchange_kernel)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, some_toolchain: None) -> Compiler:
    """A stub compiler and an empty cache directory."""
    stub = Compiler()
    monkeypatch.setattr(cubins, "compiled", stub)
    monkeypatch.setenv("NUMBA_FUSED_CACHE_DIR", str(tmp_path / "cache"))
    return stub


def get(kernel: Any = add_kernel) -> Cubin:
    return cubins.cubin(kernel, VECTOR_SIGNATURE, 0, (9, 0))


def test_a_kernel_is_compiled_once_and_then_read_from_disk(
    compiler: Compiler, tmp_path: Path
) -> None:
    first = get()
    assert get() == first
    assert get(exchange_kernel) == get(exchange_kernel) != first
    assert compiler.compiled == ["add_kernel", "exchange_kernel"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == sorted(
        f"{name_of(kernel)}.cubin" for kernel in (add_kernel, exchange_kernel)
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: b"\0" * len(data),
    ],
    ids=["empty", "header cut", "end cut", "bit of the code", "bit of the checksum", "zeros"],
)
def test_a_damaged_file_is_compiled_again_and_replaced(
    damage: Callable[[bytes], bytes], compiler: Compiler, tmp_path: Path
) -> None:
    whole = get()
    (file,) = (tmp_path / "cache").iterdir()
    data = file.read_bytes()
    file.write_bytes(damage(data))
    assert get() == whole
    assert compiler.compiled == ["add_kernel"] * 2
    assert file.read_bytes() == data


def test_writers_that_race_leave_a_whole_file(compiler: Compiler, tmp_path: Path) -> None:
    """Every reader sees none or all of it, and no temporary file stays behind."""
    made = Cubin(b"code" * 100_000, "entry", False)
    path = tmp_path / "cache" / "raced.cubin"
    stop = time.monotonic() + 0.5

    def write() -> None:
        while time.monotonic() < stop:
            cubins.write(path, made)

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write) for _ in range(3)]
        while cubins.read(path) is None:
            pass
        while time.monotonic() < stop:
            assert cubins.read(path) == made
        for writer in writers:
            writer.result()
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_directory_name_turns_the_cache_off(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_FUSED_CACHE_DIR", "")
    monkeypatch.chdir(tmp_path)
    assert get() == get()
    assert compiler.compiled == ["add_kernel"] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_no_error(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("NUMBA_FUSED_CACHE_DIR", str(tmp_path / "file"))
    assert get() == get()
    assert compiler.compiled == ["add_kernel"] * 2


def test_the_directory_is_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_FUSED_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cubins.cache_directory() == Path("/home/somebody/.cache/numba_fused")


def test_kernels_without_a_source_file_are_not_kept(compiler: Compiler, tmp_path: Path) -> None:
    """A notebook's: the next cell may change a global that the kernel's code does not show."""
    scope: dict[str, Any] = {"cuda": cuda}
    exec("@cuda.jit\ndef cell_kernel(x): x[0] = SIZE", scope)
    assert get(scope["cell_kernel"]) == get(scope["cell_kernel"])
    assert compiler.compiled == ["cell_kernel"] * 2
    assert not (tmp_path / "cache").exists()


# ---- launches on a stub driver ------------------------------------------------------------------


class Driver:
    """A driver with two GPUs, which reads the parameters of a launch slowly."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: dict[int, list[int]] = {}  # of each thread, the innermost last
        self.status = driver.CUresult.CUDA_SUCCESS

    def __getattr__(self, name: str) -> Any:
        if name.startswith("cu"):
            return lambda *args: self._call(name, *args)
        return getattr(driver, name)

    def _call(self, name: str, *args: Any) -> tuple[Any, ...]:
        self.calls.append((name, *args))
        return driver.CUresult.CUDA_SUCCESS, 9

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]

    def _stack(self) -> list[int]:
        return self.contexts.setdefault(threading.get_ident(), [100])

    def cuDeviceGet(self, index: int) -> tuple[Any, int]:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, int]:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, 100 + device

    def cuCtxGetCurrent(self) -> tuple[Any, int]:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, self._stack()[-1]

    def cuCtxPushCurrent(self, context: int) -> tuple[Any]:  # noqa: N802
        self._stack().append(context)
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, int]:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, self._stack().pop()

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, int]:  # noqa: N802
        self.calls.append(("cuModuleLoadData", self._stack()[-1]))
        return driver.CUresult.CUDA_SUCCESS, self._stack()[-1]

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, Any]:  # noqa: N802
        return driver.CUresult.CUDA_SUCCESS, (module, name)

    def cuLaunchKernel(self, *args: Any) -> tuple[Any]:  # noqa: N802
        return self._launch("cuLaunchKernel", args[:-1])

    def cuLaunchCooperativeKernel(self, *args: Any) -> tuple[Any]:  # noqa: N802
        return self._launch("cuLaunchCooperativeKernel", args)

    def _launch(self, name: str, args: tuple[Any, ...]) -> tuple[Any]:
        function, *geometry, stream, table = args
        assert function[0] == self._stack()[-1], "launched in another context than loaded in"
        time.sleep(0)  # let another thread spoil the buffer, if it can
        words = ctypes.cast(table, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
        count = 15 if b"add" in function[1] else 0
        values = [words[i][0] for i in range(count)]
        self.calls.append((name, function, *geometry, int(stream), values))
        return (self.status,)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> Driver:
    """A stub driver, and no GPU known yet."""
    stub = Driver()
    monkeypatch.setattr(launch, "driver", stub)
    monkeypatch.setattr(launch, "_gpus", {})
    return stub


def add(launcher: Any, x: Tensor, term: int, **options: Any) -> None:
    launcher(add_kernel, 5, 64, x, x, term, **options)


def test_a_launch_hands_the_driver_everything(stub: Driver) -> None:
    x = torch.zeros(6)
    add(GpuLauncher(1, 77), x, 3, shared_bytes=16)
    array = [0, 0, 6, 4, x.data_ptr(), 6, 4]
    geometry = (5, 1, 1, 64, 1, 1, 16)
    (call,) = stub.named("cuLaunchKernel")
    assert call == ("cuLaunchKernel", (101, b"_Zadd_kernel"), *geometry, 77, [*array, *array, 3])


def test_grids_and_blocks_have_up_to_three_axes(stub: Driver) -> None:
    launcher = GpuLauncher(0, 0)
    for grid, block in ((2, 32), ((2,), (32,)), ((2, 3), (8, 4)), ((2, 3, 4), (8, 4, 2))):
        launcher(no_arguments_kernel, grid, block)
    assert [call[2:8] for call in stub.named("cuLaunchKernel")] == [
        (2, 1, 1, 32, 1, 1),
        (2, 1, 1, 32, 1, 1),
        (2, 3, 1, 8, 4, 1),
        (2, 3, 4, 8, 4, 2),
    ]


def test_kernels_are_loaded_once_per_gpu_and_signature(stub: Driver, compiler: Compiler) -> None:
    for _ in range(2):
        for index in (0, 1):
            for x in (torch.zeros(3), torch.zeros(4), torch.zeros(3).double()):
                add(GpuLauncher(index, 0), x, 1)
    assert [context for _, context in stub.named("cuModuleLoadData")] == [100, 100, 101, 101]
    assert len(compiler.compiled) == 2  # the second GPU finds the first one's on disk
    assert len(stub.named("cuLaunchKernel")) == 12


def test_the_threads_own_context_is_current_again_afterwards(stub: Driver) -> None:
    add(GpuLauncher(0, 0), torch.zeros(3), 1)
    add(GpuLauncher(1, 0), torch.zeros(3), 1)
    stub.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError):
        add(GpuLauncher(1, 0), torch.zeros(3), 1)
    assert list(stub.contexts.values()) == [[100]]


def test_a_refused_launch_says_what_was_asked(stub: Driver) -> None:
    stub.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(
        RuntimeError,
        match=r"cannot launch add_kernel with grid \(5, 1, 1\), block \(64, 1, 1\), 99,999 bytes"
        r".*_INVALID_VALUE",
    ):
        add(GpuLauncher(0, 0), torch.zeros(3), 1, shared_bytes=99_999)


def test_the_driver_is_told_of_shared_memory_only_when_it_grows(stub: Driver) -> None:
    launcher = GpuLauncher(0, 0)
    for shared_bytes in (0, 1000, 500, 60_000, 60_000, 1000):
        add(launcher, torch.zeros(3), 1, shared_bytes=shared_bytes)
    assert [call[-1] for call in stub.named("cuFuncSetAttribute")] == [1000, 60_000]
    assert [call[8] for call in stub.named("cuLaunchKernel")] == [
        0,
        1000,
        500,
        60_000,
        60_000,
        1000,
    ]


def test_cooperative_launches_are_asked_for(stub: Driver) -> None:
    """A kernel that waits for its grid would hang without."""
    launcher, x = GpuLauncher(0, 0), torch.zeros(3)
    launcher(exchange_kernel, 3, 32, x, x, cooperative=True)
    add(launcher, x, 1, cooperative=True)
    assert len(stub.named("cuLaunchCooperativeKernel")) == 2
    with pytest.raises(ValueError, match=r"exchange_kernel .*cooperative=True"):
        launcher(exchange_kernel, 3, 32, x, x)


def test_threads_compile_once_and_share_no_buffer(stub: Driver, compiler: Compiler) -> None:
    launches = 200
    start = threading.Barrier(THREADS)

    def work(thread: int) -> None:
        x = torch.zeros(thread + 1)
        start.wait()
        for i in range(launches):
            add(GpuLauncher(0, thread), x, 1000 * thread + i)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert compiler.compiled == ["add_kernel"]
    seen = [(stream, values) for *_, stream, values in stub.named("cuLaunchKernel")]
    assert len(seen) == THREADS * launches
    for stream, values in seen:
        assert values[2] == values[5] == values[9] == values[12] == stream + 1
        assert values[14] // 1000 == stream


# ---- the host path of the public call -----------------------------------------------------------

OPERANDS = random_operands((2, 4, 5, 9), (4, 4, 2, 3))
CALL: dict[str, Any] = {"num_groups": 2, "variant": "torch", **BOUNDS}


def call(**changes: Any) -> dict[str, Any]:
    """The keywords above with some changed."""
    return CALL | changes


def test_a_call_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fused(*OPERANDS, **CALL)
    monkeypatch.setattr(nf.BlockSpec, "from_arguments", None)
    assert torch.equal(fused(*OPERANDS, **CALL), expected)
    with pytest.raises(TypeError):
        fused(OPERANDS.x[:1], *OPERANDS[1:], **CALL)


@pytest.mark.parametrize("changes", [{"num_groups": True}, {"stride": 1.0}, {"stride": (1, True)}])
def test_what_equals_a_valid_argument_is_not_thereby_valid(changes: dict[str, Any]) -> None:
    for stride in (1, (1, 1)):
        fused(*OPERANDS, **call(num_groups=1, stride=stride))
    with pytest.raises(TypeError, match="must be an int"):
        fused(*OPERANDS, **call(**{"num_groups": 1} | changes))


def test_zeros_of_both_signs_are_different_bounds() -> None:
    for zero in (0.0, -0.0):
        out = fused(*OPERANDS, **call(max_value=zero, cap=2.0, min_value=-9.0))
        assert (out == 0).any()
        assert (out.signbit() == (out < 0) | (out == 0) & (math.copysign(1, zero) < 0)).all()


def test_unusual_arguments_are_validated_every_time() -> None:
    """Tensors and lists may have changed since."""
    stride = [1, 1]
    narrow = fused(*OPERANDS, **CALL, stride=stride)
    stride[1] = 2
    assert fused(*OPERANDS, **CALL, stride=stride).shape[-1] < narrow.shape[-1]
    cap = torch.tensor(0.0)
    assert fused(*OPERANDS, **call(cap=cap)).max() == 0
    cap += 0.25
    assert fused(*OPERANDS, **call(cap=cap)).max() == 0.25


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_forward_mode_derivatives_are_not_silently_missing() -> None:
    with forward_ad.dual_level():
        x = forward_ad.make_dual(OPERANDS.x, torch.ones_like(OPERANDS.x))
        with pytest.raises((RuntimeError, NotImplementedError)):
            fused(x, *OPERANDS[1:], **CALL)


def test_absent_vectors_are_made_once() -> None:
    first = ladder._neutral(1.0, 5, torch.float32, torch.device("cpu"))
    assert ladder._neutral(1.0, 5, torch.float32, torch.device("cpu")) is first
    assert torch.equal(first, torch.ones(5))
    other = ladder._neutral(0.0, 5, torch.float32, torch.device("cpu"))
    assert torch.equal(other, torch.zeros(5))


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch, stub: Driver) -> None:
    """CPU tensors launch on a stub driver that does nothing."""
    monkeypatch.setattr(stub, "_launch", lambda *_: (driver.CUresult.CUDA_SUCCESS,))
    for module in (ladder, backward):
        monkeypatch.setattr(module, "launcher_for", lambda device, simulator: GpuLauncher(0, 0))
        monkeypatch.setattr(module, "_bound", {})
    monkeypatch.setattr(ops, "_calls", {})
    monkeypatch.setattr(ops.plan, "check_simulable", lambda spec, variant: None)


@pytest.mark.slow
@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize("variant", ["one_kernel", "epilogue", "pipelined"])
def test_host_time_of_a_call(variant: str) -> None:
    """About 20 us on a quiet machine, for one launch or two; 0.4 ms before any of this."""
    arguments = call(variant=variant)
    with torch.no_grad():
        times = []
        for _ in range(2000):
            start = time.perf_counter()
            fused(*OPERANDS, **arguments)
            times.append(time.perf_counter() - start)
    assert min(times) < 100e-6


# ---- repeated calls -----------------------------------------------------------------------------


class Queue:
    """The launches that reach the driver, with all their parameters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[Any, ...]] = []
        monkeypatch.setattr(launch.LoadedKernel, "queue", self._queued())

    def _queued(self) -> Callable[..., None]:
        def queue(kernel: Any, stream: Any, geometry: Any, cooperative: bool, table: int) -> None:
            pointers = ctypes.cast(table, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))
            parameters = kernel.parameters
            words = [pointers[i][0] for i in range(len(parameters.offsets))]
            time.sleep(0)  # let another thread spoil the buffer, if it can
            assert words == [pointers[i][0] for i in range(len(parameters.offsets))]
            self.launches.append((kernel, int(stream), geometry, cooperative, words))

        return queue

    def taken(self, operands: dict[str, Tensor]) -> list[tuple[Any, ...]]:
        """The launches so far, addresses as names: of operands, or of scratch memory by order."""
        names = {tensor.data_ptr(): name for name, tensor in operands.items()}
        launches, self.launches = self.launches, []
        for kernel, *_, words in launches:
            for i in kernel.parameters.addresses:
                words[i] = names.setdefault(words[i], f"scratch {len(names)}")
        return launches


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, pretend_gpu: None) -> Queue:
    return Queue(monkeypatch)


RUNGS = [rung.name for rung in ladder.rungs() if rung.name not in ("torch", "library_conv")]


def block_spec(name: str = "pipelined", **changes: Any) -> nf.BlockSpec:
    """Something small that a rung can run."""
    bounds = {"min_value": 0.0, "max_value": 1.0} if name == "algebra" else BOUNDS
    arguments = {
        "num_groups": 4,
        "dropout_p": 0.25,
        "training": True,
        "precision": "tf32" if name == "tensor_core" else "ieee",
    }
    x_shape, weight_shape = (2, 3, 4, 6, 8), (16, 3, 2, 3, 3)
    return nf.BlockSpec.from_arguments(x_shape, weight_shape, **bounds | arguments | changes)


def tensors_of(spec: nf.BlockSpec, **changes: Tensor | None) -> dict[str, Any]:
    """Fresh operands, seed and output."""
    operands = random_operands(spec.x_shape, spec.weight_shape)._asdict()
    return {**operands, "seed": torch.tensor([5]), "out": torch.empty(spec.output_shape)} | changes


def run_rung(
    queue: Queue, name: str, spec: nf.BlockSpec, tensors: dict[str, Any] | None = None
) -> list[tuple[Any, ...]]:
    """What a rung launches."""
    tensors = tensors or tensors_of(spec)
    ladder.run(name, **tensors, spec=spec)
    return queue.taken({name: t for name, t in tensors.items() if t is not None})


def recording() -> Any:
    """That of the only rung and spec that have run."""
    (bound,) = ladder._bound.values()
    return bound.forward._recording


@pytest.mark.parametrize("name", RUNGS)
def test_a_repeated_call_launches_what_the_first_did(name: str, queue: Queue) -> None:
    """In every parameter, but at the addresses of the new tensors."""
    spec = block_spec(name)
    first = run_rung(queue, name, spec)
    assert recording() is not None
    for _ in range(3):
        assert run_rung(queue, name, spec) == first


def test_inference_mode_changes_nothing(queue: Queue) -> None:
    spec = block_spec()
    expected = run_rung(queue, "pipelined", spec)
    ladder._bound.clear()
    with torch.inference_mode():
        launched = [run_rung(queue, "pipelined", spec) for _ in range(2)]
    assert recording() is not None
    assert [*launched, run_rung(queue, "pipelined", spec)] == [expected] * 3


def test_a_strided_output_is_refused_whether_or_not_the_call_is_repeated(queue: Queue) -> None:
    spec = block_spec()
    out = torch.empty(*spec.output_shape, 2)[..., 0]
    for _ in range(2):
        with pytest.raises(ValueError, match="takes contiguous tensors"):
            run_rung(queue, "one_kernel", spec, tensors_of(spec, out=out))
        run_rung(queue, "one_kernel", spec)


def test_what_was_one_tensor_may_be_two_in_the_next_call(queue: Queue) -> None:
    spec, vector = block_spec(), torch.zeros(16)
    run_rung(queue, "pipelined", spec, tensors_of(spec, bias=vector, gamma=vector, beta=vector))
    repeated = run_rung(queue, "pipelined", spec)
    ladder._bound.clear()
    assert repeated == run_rung(queue, "pipelined", spec)


def test_absent_vectors_are_the_neutral_ones_again(queue: Queue) -> None:
    spec = block_spec(has_bias=False, affine=False)
    absent = dict.fromkeys(("bias", "gamma", "beta"))
    first, second = (
        run_rung(queue, "one_kernel", spec, tensors_of(spec, **absent)) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("which", ["x", "weight", "bias", "out"])
@pytest.mark.parametrize("misaligned_first", [False, True])
def test_tensors_off_the_alignment_are_not_taken_for_aligned_ones(
    which: str, misaligned_first: bool, queue: Queue
) -> None:
    """The tile's kernels are others for these."""
    spec = block_spec()
    aligned = tensors_of(spec)
    moved = torch.empty(aligned[which].numel() + 1)[1:].view(aligned[which].shape)
    misaligned = aligned | {which: moved}
    calls = [misaligned, aligned] if misaligned_first else [aligned, misaligned]
    launched = [run_rung(queue, "pipelined", spec, tensors) for tensors in (*calls, *calls)]
    assert launched[:2] == launched[2:]
    one, other = ([kernel for kernel, *_ in launches] for launches in launched[:2])
    assert (one != other) == (which in ("x", "out"))


def test_a_seed_may_lie_anywhere(queue: Queue) -> None:
    spec = block_spec()
    run_rung(queue, "pipelined", spec)
    repeat, seeds = recording().repeat, []
    recording().repeat = lambda *arguments: (seeds.append(arguments[2][5]), repeat(*arguments))
    every = torch.arange(4)
    for seed in every:
        run_rung(queue, "pipelined", spec, tensors_of(spec, seed=seed))
    assert seeds == [every.data_ptr() + 8 * i for i in range(4)]


def test_strided_operands_are_copied_and_run(queue: Queue) -> None:
    spec = block_spec()
    expected = run_rung(queue, "pipelined", spec)
    tensors = tensors_of(spec)
    tensors["x"] = tensors["x"].to(memory_format=torch.channels_last_3d)
    launches = run_rung(queue, "pipelined", spec, tensors)
    assert [launch[:4] for launch in launches] == [launch[:4] for launch in expected]
    assert all("x" not in words for *_, words in launches)


@pytest.mark.parametrize("name", ["torch", "library_conv"])
def test_rungs_that_call_pytorchs_operators_run_every_time(name: str, queue: Queue) -> None:
    spec = block_spec(training=False)
    for _ in range(2):
        tensors = tensors_of(spec)
        with ConvolutionCounter() as counter:
            run_rung(queue, name, spec, tensors)
        assert counter.convolutions == 1
    assert recording() is None


class ConvolutionCounter(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.convolutions += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def rung_of(forward: Callable[..., None]) -> Any:
    """A rung with this `forward`, for one spec."""
    spec = block_spec("one_kernel")
    module: Any = types.SimpleNamespace(forward=forward)
    return Repeated(Rung(99, "of a test", "", module, False), spec, 128)


def repeats(forward: Callable[..., None]) -> bool:
    """Whether the second call repeats the first instead of running `forward`."""
    runs: list[int] = []

    def counted(launch: Any, operands: Any) -> None:
        runs.append(1)
        forward(launch, operands)

    rung, tensors = rung_of(counted), tensors_of(block_spec("one_kernel"))
    for _ in range(3):
        rung(GpuLauncher(0, 7), tuple(tensors.get(name, torch.empty(0)) for name in TENSORS))
    return len(runs) == 1


def views(launch: Any, operands: Any) -> None:
    """Parts of one allocation and parts of an operand."""
    scratch = torch.empty(96, dtype=torch.uint32)
    first, second = scratch[:32].view(torch.float32), scratch[32:]
    launch(add_kernel, 1, 32, first, operands.out.view(2, -1)[1], 1)
    launch(add_kernel, 1, 32, second, torch.empty_like(operands.bias), 2)


def test_views_of_scratch_memory_and_of_operands_are_followed(queue: Queue) -> None:
    rung, first = rung_of(views), None
    for _ in range(3):
        tensors = tensors_of(block_spec("one_kernel"))
        rung(GpuLauncher(0, 7), tuple(tensors.get(name, torch.empty(0)) for name in TENSORS))
        (*_, one), (*_, two) = queue.launches
        queue.launches = []
        half = tensors["out"].numel() // 2 * 4
        assert one[4 + 7] - tensors["out"].data_ptr() == half  # each array is 7 parameters
        assert two[4] - one[4] == 32 * 4
        sizes = [one[2], one[9], one[14], two[2], two[9], two[14]]
        assert first in (None, sizes)
        first = sizes
    assert rung._recording is not None


def test_recording_does_not_import_the_compiler() -> None:
    """It takes two seconds, of which a first call would be made."""
    program = (
        "import sys, torch; from numba_fused.device.recording import Recorder\n"
        "with Recorder(None, [torch.ones(3)]) as recorder: (view,) = recorder.follow()\n"
        "assert recorder.knows(view)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


UNREPEATABLE: dict[str, Callable[..., Any]] = {
    "a tensor filled": lambda launch, o: launch(add_kernel, 1, 32, o.x, torch.zeros(3), 1),
    "an operand written": lambda launch, o: (o.out.zero_(), launch(add_kernel, 1, 32, o.x, o.x, 1)),
    "a value read": lambda launch, o: launch(add_kernel, 1, 32, o.x, o.x, int(o.seed)),
    "a tensor of its own": lambda launch, o: launch(add_kernel, 1, 32, o.x, CONSTANT_TABLE, 1),
    "a copy": lambda launch, o: launch(add_kernel, 1, 32, o.x, o.x.clone(), 1),
    "nothing launched": lambda launch, o: None,
    "much memory": lambda launch, o: launch(
        add_kernel, 1, 32, o.x, torch.empty(MOST_SCRATCH_BYTES // 4 + 1), 1
    ),
}
CONSTANT_TABLE = torch.arange(5.0)


@pytest.mark.usefixtures("pretend_gpu")
def test_what_only_launches_is_repeated() -> None:
    assert repeats(lambda launch, o: launch(add_kernel, 1, 32, o.x, o.x, 1))
    assert repeats(views)


@pytest.mark.usefixtures("pretend_gpu")
@pytest.mark.parametrize("what", UNREPEATABLE)
def test_what_does_anything_else_is_not(what: str) -> None:
    assert not repeats(UNREPEATABLE[what])


# ---- the backward pass ---------------------------------------------------------------------------

EVERY: backward.Wanted = (True, True, True, True, True)
BETA_ALONE: backward.Wanted = (False, False, False, False, True)
LAUNCHING = ("clear", "tensor_core")  # library_conv calls cuDNN


def run_backward(
    queue: Queue, variant: str, spec: nf.BlockSpec, wanted: backward.Wanted = EVERY, **changes: Any
) -> list[tuple[Any, ...]]:
    """What a variant launches; its gradients have the shapes of their operands."""
    tensors = tensors_of(spec)
    del tensors["out"]
    groups = torch.empty(2, spec.batch * spec.num_groups)
    tensors |= {"grad_out": torch.empty(spec.output_shape), "mean": groups[0], "rstd": groups[1]}
    tensors |= changes
    found = backward.run(**tensors, spec=spec, wanted=wanted, variant=variant)
    named = {name: t for name, t in tensors.items() if t is not None}
    for name, gradient, want in zip(backward.NAMES, found, wanted, strict=True):
        assert (gradient is not None) == want
        if gradient is not None:
            assert gradient.shape == tensors[name].shape
            named[f"gradient of {name}"] = gradient
    return queue.taken(named)


def backward_recording() -> Any:
    """That of the only variant, spec and wanted gradients that have run."""
    ((_, repeated),) = backward._bound.values()
    return repeated._recording


@pytest.mark.parametrize("wanted", [EVERY, (False, True, False, True, False)])
@pytest.mark.parametrize("variant", LAUNCHING)
def test_a_repeated_backward_pass_launches_what_the_first_did(
    variant: str, wanted: backward.Wanted, queue: Queue
) -> None:
    spec = block_spec()
    first = run_backward(queue, variant, spec, wanted)
    assert any("gradient of weight" in words for *_, words in first)
    assert backward_recording() is not None
    for _ in range(3):
        assert run_backward(queue, variant, spec, wanted) == first


def test_what_is_wanted_and_known_makes_another_backward_pass(queue: Queue) -> None:
    spec, counts = block_spec(), []
    calls: list[dict[str, Any]] = [{}, {"mean": None, "rstd": None}, {"wanted": BETA_ALONE}]
    for changes in calls:
        counts.append([len(run_backward(queue, "tensor_core", spec, **changes)) for _ in range(2)])
    assert [first == again for first, again in counts] == [True] * 3
    assert len({first for first, _ in counts}) == 3


@pytest.mark.parametrize("misaligned_first", [False, True])
def test_a_gradient_off_the_alignment_is_not_taken_for_an_aligned_one(
    misaligned_first: bool, queue: Queue
) -> None:
    spec = block_spec()
    moved = torch.empty(math.prod(spec.output_shape) + 1)[1:].view(spec.output_shape)
    calls: list[dict[str, Any]] = [{"grad_out": moved}, {}]
    calls = calls if misaligned_first else calls[::-1]
    launched = [run_backward(queue, "tensor_core", spec, **call) for call in (*calls, *calls)]
    assert launched[:2] == launched[2:]
    one, other = ([kernel for kernel, *_ in launches] for launches in launched[:2])
    assert one != other


def test_a_strided_gradient_is_copied_and_run(queue: Queue) -> None:
    spec = block_spec()
    expected = run_backward(queue, "tensor_core", spec)
    strided = torch.empty(spec.output_shape).to(memory_format=torch.channels_last_3d)
    launches = run_backward(queue, "tensor_core", spec, grad_out=strided)
    assert [launch[:4] for launch in launches] == [launch[:4] for launch in expected]
    assert all("grad_out" not in words for *_, words in launches)


def test_gradients_of_two_calls_share_no_memory(queue: Queue) -> None:
    spec, tensors = block_spec(), tensors_of(block_spec())
    del tensors["out"]
    gradient = torch.empty(spec.output_shape)
    calls = [
        backward.run(**tensors, grad_out=gradient, spec=spec, wanted=EVERY, variant="tensor_core")
        for _ in range(4)
    ]
    places = [t.data_ptr() for found in calls for t in found if t is not None]
    assert len(places) == 20
    assert len(set(places)) == 20


def test_repetitions_follow_the_stream(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = block_spec()
    for stream in (0, 3, 0, 4):
        launcher = GpuLauncher(0, stream)
        monkeypatch.setattr(ladder, "launcher_for", lambda *_, launcher=launcher: launcher)
        assert {launch[1] for launch in run_rung(queue, "pipelined", spec)} == {stream}


def test_repetitions_restore_the_threads_own_context(
    stub: Driver, pretend_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "launcher_for", lambda device, simulator: GpuLauncher(1, 0))
    spec, current = block_spec(), []
    monkeypatch.setattr(
        stub, "_launch", lambda *_: (current.append(stub._stack()[-1]), (stub.status,))[1]
    )
    for _ in range(2):
        ladder.run("one_kernel", **tensors_of(spec), spec=spec)
    stub.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match="cannot launch one_kernel"):
        ladder.run("one_kernel", **tensors_of(spec), spec=spec)
    assert current == [101] * 3
    assert list(stub.contexts.values()) == [[100]]


def test_threads_that_repeat_share_no_buffer(queue: Queue) -> None:
    """`Queue` finds a buffer that changes while it is read."""
    spec = block_spec()
    run_rung(queue, "pipelined", spec)
    start, seen = threading.Barrier(THREADS), queue.launches

    def work(_: int) -> set[int]:
        tensors = tensors_of(spec)
        start.wait()
        for _ in range(100):
            ladder.run("pipelined", **tensors, spec=spec)
        return {tensors[name].data_ptr() for name in ("x", "out")}

    with ThreadPoolExecutor(THREADS) as pool:
        pairs = list(pool.map(work, range(THREADS)))
    last = [words for kernel, *_, words in seen if len(words) == len(seen[-1][4])]
    addresses = [{words[i] for i in seen[-1][0].parameters.addresses} for words in last]
    assert len(addresses) == 100 * THREADS
    assert all(any(pair <= found for pair in pairs) for found in addresses)


# ---- on a GPU -----------------------------------------------------------------------------------


def on_gpu(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


@pytest.mark.gpu
def test_every_kind_of_argument_arrives() -> None:
    device = on_gpu()
    launcher = gpu_launcher(device)
    out = torch.zeros(3, 5, dtype=torch.float64, device=device)
    launcher(fill_kernel, 1, 32, out, (np.int32(3), 5), (2.5,))
    assert (out == 2.5).all()
    for dtype in (torch.uint8, torch.int64, torch.float32, torch.float64):
        x = torch.arange(100, device=device).to(dtype)
        y = torch.empty_like(x)
        launcher(add_kernel, 4, 32, x, y, np.int32(7))
        assert torch.equal(y, x + 7)
    launcher(no_arguments_kernel, 1, 1)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_launches_are_ordered_on_torchs_current_stream() -> None:
    device = on_gpu()
    x = torch.zeros(1 << 22, device=device)
    for _ in range(20):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launcher = gpu_launcher(device)
            x.mul_(1.0)
            launcher(add_kernel, -(-x.numel() // 256), 256, x, x, np.float32(1))
            x.add_(1.0)
        torch.cuda.current_stream().wait_stream(stream)
    assert (x == 40).all()


@pytest.mark.gpu
def test_a_graph_captures_a_launch_and_replays_it() -> None:
    device = on_gpu()
    x = torch.zeros(1000, device=device)
    gpu_launcher(device)(add_kernel, 4, 256, x, x, np.float32(1))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu_launcher(device)(add_kernel, 4, 256, x, x, np.float32(1))
    assert (x == 1).all()
    for _ in range(3):
        graph.replay()
    assert (x == 4).all()


@pytest.mark.gpu
def test_the_public_call_replays_from_a_graph_with_fresh_masks() -> None:
    """With absent vectors first seen during capture, which must not outlive the graph's memory."""
    x, weight = torch.randn(2, 3, 8, 9, device="cuda"), torch.randn(7, 3, 3, 3, device="cuda")
    arguments = call(num_groups=7, variant="one_kernel", min_value=0.125)
    fused(x, weight, torch.zeros(7, device="cuda"), **arguments)  # compiles
    ladder._neutrals.clear()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(x, weight, **arguments, dropout_p=0.5, training=True)
    assert not ladder._neutrals
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)
    in_eval = fused(x, weight, **arguments)
    torch.testing.assert_close(out[out != 0], 2 * in_eval[out != 0])


def direct_and_repeated(name: str, spec: nf.BlockSpec) -> list[tuple[Tensor, Tensor]]:
    """Outputs for several operands, by a rung that has not run yet and by one that repeats."""
    pairs: list[tuple[Tensor, Tensor]] = []
    calls = [{k: t.cuda() for k, t in tensors_of(spec).items()} for _ in range(3)]
    for tensors in calls:
        ladder._bound.clear()
        pairs.append((ladder.run(name, **tensors, spec=spec).clone(), tensors["out"]))
    for tensors in calls:
        tensors["out"].fill_(torch.nan)
        ladder.run(name, **tensors, spec=spec)
    assert recording() is not None
    return pairs


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNGS)
def test_repeated_calls_compute_what_first_calls_do(name: str) -> None:
    spec = block_spec(name)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_stream = direct_and_repeated(name, spec)
    stream.synchronize()
    for first, repeated in (*direct_and_repeated(name, spec), *on_stream):
        assert torch.equal(first, repeated)


@pytest.mark.gpu
def test_a_graph_captures_a_repeated_call() -> None:
    spec = block_spec()
    tensors: dict[str, Any] = {k: t.cuda() for k, t in tensors_of(spec).items()}
    expected = ladder.run("pipelined", **tensors, spec=spec).clone()
    ladder.run("pipelined", **tensors, spec=spec)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ladder.run("pipelined", **tensors, spec=spec)
    tensors["out"].fill_(torch.nan)
    graph.replay()
    assert torch.equal(tensors["out"], expected)


@pytest.mark.gpu
def test_threads_that_never_used_the_gpu_can_repeat_a_call() -> None:
    spec = block_spec()
    calls = [{k: t.cuda() for k, t in tensors_of(spec).items()} for _ in range(THREADS)]
    expected = [ladder.run("pipelined", **tensors, spec=spec).clone() for tensors in calls]
    torch.cuda.synchronize()

    def work(tensors: dict[str, Any]) -> None:
        for _ in range(100):
            ladder.run("pipelined", **tensors, spec=spec)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, calls))
    torch.cuda.synchronize()
    for tensors, out in zip(calls, expected, strict=True):
        assert torch.equal(tensors["out"], out)


@pytest.mark.gpu
def test_threads_that_never_used_the_gpu_can_launch() -> None:
    device = on_gpu()
    tensors = [torch.zeros(1000, device=device) for _ in range(THREADS)]
    torch.cuda.synchronize()

    def work(x: Tensor) -> None:
        launcher = GpuLauncher(0, 0)
        for _ in range(100):
            launcher(add_kernel, 4, 256, x, x, np.float32(1))

    threads = [threading.Thread(target=work, args=(x,)) for x in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all((x == 100).all() for x in tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("kilobytes", [1, 48, 49, 96])
def test_shared_memory_beyond_48_kilobytes(kilobytes: int) -> None:
    x = torch.arange(kilobytes * 256, dtype=torch.float32, device="cuda")
    expected = x.flip(0)
    gpu_launcher(on_gpu())(reverse_kernel, 1, 256, x, shared_bytes=kilobytes * 1024)
    assert torch.equal(x, expected)


@pytest.mark.gpu
def test_a_cooperative_grid_waits_for_itself() -> None:
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    x, out = (torch.full((blocks,), -1, dtype=torch.int64, device="cuda") for _ in range(2))
    for _ in range(50):
        x.fill_(-1)
        gpu_launcher(on_gpu())(exchange_kernel, blocks, 64, x, out, cooperative=True)
        assert torch.equal(out, torch.arange(blocks, device="cuda").flip(0))


@pytest.mark.gpu
def test_each_gpu_runs_its_own_launches() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = [torch.zeros(1000, device=on_gpu(index)) for index in (0, 1)]
    for current in (0, 1):
        with torch.cuda.device(current):
            for x in tensors:
                gpu_launcher(x.device)(add_kernel, 4, 256, x, x, np.float32(1))
            assert torch.cuda.current_device() == current
    assert all((x == 2).all() for x in tensors)


@pytest.mark.gpu
def test_a_cubin_from_disk_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_FUSED_CACHE_DIR", str(tmp_path))
    for compiles in (True, False):
        monkeypatch.setattr(launch, "_gpus", {})  # nothing is loaded
        if not compiles:
            monkeypatch.setattr(cubins, "compiled", None)
        x = torch.zeros(10, device="cuda")
        gpu_launcher(on_gpu())(add_kernel, 1, 32, x, x, np.float32(1))
        assert (x == 1).all()
    assert len(list(tmp_path.iterdir())) == 1
