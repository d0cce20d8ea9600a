"""Compile a kernel once and keep the machine code on disk.

Compiling one takes seconds, so its cubin is kept in a file whose name is a hash of everything
the machine code depends on. Numba has a cache of its own (``cache=True``), which will not do: it
looks at the file of the kernel alone, so that an edit of a device function in another file is
missed, and compile options are not part of its key.

The directory is ``~/.cache/numba_fused``, or NUMBA_FUSED_CACHE_DIR; an empty string there turns
the cache off. Every file may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import types as python_types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numba_cuda
import numpy as np
from cuda.bindings import driver, nvjitlink  # pyright: ignore[reportAttributeAccessIssue]
from numba import cuda
from numba.cuda import types
from numba.cuda.cudadrv import nvvm
from numba.cuda.dispatcher import CUDADispatcher

PACKAGE = Path(__file__).parents[1]
KERNEL_SOURCES = ("device", "ladder", "backward", "rng.py")  # where kernels and their parts live
DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel.

    Attributes
    ----------
    code : bytes
        The ELF image the driver loads.
    entry_name : str
        The kernel's symbol in it.
    cooperative : bool
        Whether the kernel synchronises its grid, which takes a cooperative launch.
    """

    code: bytes
    entry_name: str
    cooperative: bool

    def to_bytes(self) -> bytes:
        """Checksum, one line of JSON, code."""
        header = {"entry_name": self.entry_name, "cooperative": self.cooperative}
        body = json.dumps(header).encode() + b"\n" + self.code
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Cubin | None:
        """What `to_bytes` made, or None if a byte of it is missing or changed."""
        digest, body = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != digest:
            return None
        header, _, code = body.partition(b"\n")
        return cls(code=code, **json.loads(header))


def cubin(
    kernel: CUDADispatcher,
    signature: tuple[types.Type, ...],
    device_index: int,
    compute_capability: tuple[int, int],
) -> Cubin:
    """The kernel's machine code, from disk if it is there.

    Parameters
    ----------
    kernel : CUDADispatcher
        What ``@cuda.jit`` returned.
    signature : tuple of numba types
        Of its arguments.
    device_index : int
        CUDA's ordinal of a GPU to compile for.
    compute_capability : (int, int)
        That GPU's.

    Raises
    ------
    TypeError
        The kernel depends on a value that cannot be told from another by its contents.
    """
    directory = cache_directory()
    if directory is None or not has_source_file(kernel):
        return compiled(kernel, signature, device_index)
    path = directory / f"{fingerprint(kernel, signature, compute_capability)}.cubin"
    found = read(path)
    if found is None:
        found = compiled(kernel, signature, device_index)
        write(path, found)
    return found


def compiled(kernel: CUDADispatcher, signature: tuple[types.Type, ...], device_index: int) -> Cubin:
    """Compile through numba, for the GPU's own architecture: sm_90a on an H200."""
    with cuda.gpus[device_index]:
        overload = kernel.compile(signature)
        code = overload.library.get_cubin().code
    return Cubin(code, overload.entry_name, overload.cooperative)


# ---- files --------------------------------------------------------------------------------------


def cache_directory() -> Path | None:
    """Where cubins are kept, or None if they are not."""
    chosen = os.environ.get("NUMBA_FUSED_CACHE_DIR")
    if chosen is not None:
        return Path(chosen) if chosen else None
    return Path("~/.cache/numba_fused").expanduser()


def read(path: Path) -> Cubin | None:
    """The cubin in a file; None if there is none, or a damaged one."""
    try:
        return Cubin.from_bytes(path.read_bytes())
    except OSError:
        return None


def write(path: Path, made: Cubin) -> None:
    """Put the file there whole: another process sees none of it or all of it.

    A directory that cannot be written to costs the next process its compile time, no more.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(made.to_bytes())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


# ---- fingerprints -------------------------------------------------------------------------------


def fingerprint(
    kernel: CUDADispatcher,
    signature: tuple[types.Type, ...],
    compute_capability: tuple[int, int],
) -> str:
    """A hash of all that the kernel's machine code depends on."""
    parts = (
        describe(kernel),
        ", ".join(map(str, signature)),
        f"sm_{compute_capability[0]}{compute_capability[1]}",
        toolchain(),
        PACKAGE_SOURCES,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def describe(value: Any) -> str:
    """Text that is equal for equal values only, however deep; 1, 1.0 and True are not equal.

    Raises
    ------
    TypeError
        No such text exists: two objects of that type are told apart by identity alone.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype.str}{value.shape} {value.tobytes().hex()}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(describe, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{describe(k)}: {describe(v)}' for k, v in sorted(value.items()))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return f"{_qualified(type(value))}{describe(fields)}"
    if isinstance(value, types.Type | np.dtype):
        return f"type {value}"
    if isinstance(value, python_types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {_qualified(value)}"
    if isinstance(value, CUDADispatcher):
        return f"{describe(value.targetoptions)} {describe(value.py_func)}"
    if isinstance(value, python_types.FunctionType):
        return " ".join(_function_parts(value))
    raise TypeError(
        f"{value!r} of type {type(value).__name__} has no contents a cache could compare: keep "
        f"numbers, strings, tuples, dataclasses, arrays and device functions in the closure of a "
        f"kernel, make anything else a global of its module, or set NUMBA_FUSED_CACHE_DIR=''"
    )


def _function_parts(function: python_types.FunctionType) -> Iterator[str]:
    """File, code, defaults and closure of a function."""
    yield _qualified(function)
    yield file_digest(function.__code__.co_filename)
    yield _code(function.__code__)
    yield describe(function.__defaults__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{name} = {describe(cell.cell_contents)}"
        except TypeError as error:
            raise TypeError(f"{_qualified(function)} closes over {name!r}: {error}") from None


def _code(code: python_types.CodeType) -> str:
    """Bytecode with the names and constants it refers to."""
    constants = [
        _code(c) if isinstance(c, python_types.CodeType) else repr(c) for c in code.co_consts
    ]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _qualified(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def has_source_file(kernel: CUDADispatcher) -> bool:
    """False for a kernel from a notebook cell: a global that it uses may change unnoticed."""
    return Path(kernel.py_func.__code__.co_filename).is_file()


@functools.lru_cache
def file_digest(file: str) -> str:
    """Hash of a file's contents."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def sources_digest(package: Path) -> str:
    """Hash of all kernel code of the package.

    A kernel's own file would not do: it calls device functions of others.
    """
    files = [
        file
        for place in KERNEL_SOURCES
        for file in sorted([package / place, *(package / place).rglob("*.py")])
        if file.is_file()
    ]
    digests = [f"{file.relative_to(package)} {file_digest(str(file))}" for file in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# Read while the modules are being imported: later the files may no longer be what was imported.
PACKAGE_SOURCES = sources_digest(PACKAGE)


@functools.lru_cache
def toolchain() -> str:
    """Versions of everything between the source and the machine code."""
    status, driver_version = driver.cuDriverGetVersion()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"there is no CUDA driver: {status.name}")
    return (
        f"numba {numba.__version__}, numba-cuda {numba_cuda.__version__}, "
        f"NVVM IR {nvvm.NVVM().get_ir_version()}, nvJitLink {nvjitlink.version()}, "
        f"driver {driver_version}"
    )
