"""Rebuilds a kernel from its Python function so that ``cuda`` means the simulator.

The code object stays the same; globals and closure cells are replaced: ``cuda`` and what was
imported from it, ``math``, numba's scalar types, device functions and plain Python helpers
(rebuilt in turn), modules (seen through a proxy that translates their attributes), and objects
with an attribute `simulated_as`, which stands for them.
"""

import builtins
import math
import sys
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from .errors import SimulationError
from .namespace import Cuda, Math
from .scalars import NAMED_TYPES, scalar_type

_OPAQUE = {"numpy", "numba", "llvmlite", "torch", "greenlet", *sys.stdlib_module_names}
"""Packages whose modules and functions are used as they are."""


class ModuleProxy:
    """A module whose attributes are translated when they are first used."""

    def __init__(self, module: ModuleType, translate: Callable[[Any], Any]):
        self._module = module
        self._translate = translate

    def __getattr__(self, name: str) -> Any:
        value = self._translate(getattr(self._module, name))
        setattr(self, name, value)
        return value


class Translator:
    """Translates functions and what they refer to, each once.

    Parameters
    ----------
    cuda
        The namespace that replaces ``numba.cuda``.
    transparent
        Receives the ids of the code objects of intrinsics' meanings, whose memory accesses belong
        to the line that calls the intrinsic.
    called
        Told the name of an intrinsic at each call; None not to be told.
    """

    def __init__(self, cuda: Cuda, transparent: set[int], called: Callable[[str], None] | None):
        from numba import cuda as numba_cuda
        from numba.core.types import Type

        self._cuda = cuda
        self._math = Math()
        self._transparent = transparent
        self._called = called
        self._inside_meaning = False
        self._functions: dict[Any, FunctionType] = {}
        self._proxies: dict[int, ModuleProxy] = {}
        self._cuda_module = numba_cuda
        self._numba_type = Type
        self._cuda_names = {
            id(getattr(numba_cuda, name)): name
            for name in (*vars(Cuda), *vars(cuda))
            if not name.startswith("_") and hasattr(numba_cuda, name)
        }

    def __call__(self, value: Any) -> Any:
        """The simulated counterpart of `value`, or `value` itself where it needs none."""
        if id(value) in self._cuda_names:
            name = self._cuda_names[id(value)]
            if name == "laneid":
                raise SimulationError("write cuda.laneid: imported by name it cannot be simulated")
            return getattr(self._cuda, name)
        if isinstance(value, ModuleType):
            return self._module(value)
        if hasattr(value, "simulated_as"):
            return self._meaning(value)
        if hasattr(value, "py_func"):
            return self._function(value.py_func)
        if isinstance(value, FunctionType):
            package = (value.__module__ or "").partition(".")[0]
            return value if package in _OPAQUE else self._function(value)
        if isinstance(value, BuiltinFunctionType) and value.__module__ == "math":
            return getattr(self._math, value.__name__)
        if isinstance(value, type):
            return scalar_type(np.dtype(value)) if issubclass(value, np.integer) else value
        if isinstance(value, self._numba_type):
            name = str(value).replace("bool", "boolean")
            return NAMED_TYPES.get(name, value)
        if type(value) is tuple:
            return tuple(map(self, value))
        return value

    def _module(self, module: ModuleType) -> Any:
        if module is self._cuda_module:
            return self._cuda
        if module is math:
            return self._math
        package = module.__name__.partition(".")[0]
        if package in _OPAQUE and package != "numba":
            return module
        return self._proxies.setdefault(id(module), ModuleProxy(module, self))

    def _meaning(self, intrinsic: Any) -> Any:
        outer, self._inside_meaning = self._inside_meaning, True
        try:
            meaning = self(intrinsic.simulated_as)
        finally:
            self._inside_meaning = outer
        called = self._called
        if called is None or not callable(meaning):
            return meaning
        name = getattr(intrinsic, "__name__", None) or getattr(meaning, "__name__", "intrinsic")

        def counted(*args: Any, **kwargs: Any) -> Any:
            called(name)
            return meaning(*args, **kwargs)

        self._transparent.add(id(counted.__code__))
        return counted

    def _function(self, function: Any) -> FunctionType:
        key = (id(function), self._inside_meaning)
        if key in self._functions:
            return self._functions[key]
        # A code object of its own: closures made by one factory share theirs, but each is a
        # function of its own to the compiler, with shared memory of its own.
        code = function.__code__.replace()
        if self._inside_meaning:
            self._transparent.add(id(code))
        scope: dict[str, Any] = {"__builtins__": builtins, "__name__": function.__module__}
        cells = function.__closure__ or ()
        new_cells = tuple(CellType() for _ in cells)
        rebuilt = FunctionType(code, scope, function.__name__, None, new_cells)
        # Known before its globals are translated: they may lead back here.
        self._functions[key] = rebuilt
        for name in names(code):
            if name in function.__globals__:
                scope[name] = self(function.__globals__[name])
            elif name == "float":
                scope[name] = np.float64  # numba's float() is a double, not a weak Python float
        for old, new in zip(cells, new_cells, strict=True):
            new.cell_contents = self(old.cell_contents)
        rebuilt.__defaults__ = function.__defaults__ and tuple(map(self, function.__defaults__))
        rebuilt.__kwdefaults__ = function.__kwdefaults__ and {
            name: self(value) for name, value in function.__kwdefaults__.items()
        }
        return rebuilt


def names(code: CodeType) -> set[str]:
    """Names that a function, and the functions written inside it, may look up as globals."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= names(constant)
    return found
