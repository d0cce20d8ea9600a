"""The front door: `Simulator`."""

import inspect
import numbers
from typing import Any

import numpy as np

from .arrays import array_info
from .counts import AccessCounter, LaunchRecord, report
from .errors import SimulationError
from .machine import MAX_THREADS_PER_BLOCK, Dim, Machine
from .namespace import Cuda, transparent_code
from .races import RaceDetector
from .translate import Translator


class Simulator:
    """Runs ``@cuda.jit`` kernels from their Python source, in this process, on the CPU.

    Parameters
    ----------
    count : bool
        Count requests, sectors, wavefronts and bytes per source line (slow).
    check_races : bool
        Raise `RaceError` when two threads touch one word, one writing, and nothing orders them.
        Bounds and initialisation are always checked.
    schedule_seed : int or None
        Run blocks and threads in a random order, drawn anew at every point where they wait; None
        is the natural order.

    Attributes
    ----------
    launches : list of LaunchRecord
        One record per completed launch.

    Notes
    -----
    **Byte model.** Every source line that touches a global array is charged each distinct 32-byte
    sector of that array once per launch: caches are assumed to hold a line's own reuse within a
    launch, and nothing between lines or between launches. Arrays are assumed to begin on a sector
    boundary, and a last sector that the array fills in part is charged for that part, so that
    reading a whole array once costs exactly ``array.nbytes``. Loads count as read, stores as
    written, atomics as both. Local and constant arrays are not charged.
    """

    def __init__(
        self, *, count: bool = False, check_races: bool = True, schedule_seed: int | None = None
    ):
        self.launches: list[LaunchRecord] = []
        self._count = count
        self._check_races = check_races
        self._counter: AccessCounter | None = None
        self._races: RaceDetector | None = None
        self._machine = Machine(schedule_seed)
        self._machine.places.transparent |= transparent_code()
        self._translator = Translator(
            Cuda(self._machine, self._fence),
            self._machine.places.transparent,
            self._intrinsic_called if count else None,
        )

    def launch(
        self,
        kernel: Any,
        grid: Any,
        block: Any,
        *args: Any,
        shared_bytes: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Run ``kernel[grid, block](*args)`` to its end.

        Parameters
        ----------
        kernel
            A ``@cuda.jit`` dispatcher, or the plain function it was made from.
        grid, block : int or tuple of 1 to 3 ints
            Launch geometry.
        *args
            NumPy arrays and CPU tensors (both modified in place, any strides), numbers, tuples.
        shared_bytes : int
            Size of the dynamic shared memory.
        cooperative : bool
            Whether a GPU must hold all blocks at once, which the simulator does anyway.

        Raises
        ------
        SimulationError
            One of its subclasses says which rule the kernel broke, and where.
        ValueError
            The geometry is not launchable.
        TypeError
            An argument is of a kind no kernel takes, or their number is wrong.
        """
        grid_dim, block_dim = _dim("grid", grid), _dim("block", block)
        threads_per_block = int(np.prod(block_dim))
        if threads_per_block > MAX_THREADS_PER_BLOCK:
            raise ValueError(
                f"block {block_dim} has {threads_per_block} threads; the limit is "
                f"{MAX_THREADS_PER_BLOCK}"
            )
        source = getattr(kernel, "py_func", kernel)
        function = self._translator(kernel)
        parameters = inspect.signature(source).bind(*args).arguments
        machine = self._machine
        self._counter = AccessCounter(machine) if self._count else None
        self._races = RaceDetector(machine) if self._check_races else None
        machine.observers = [o.access for o in (self._races, self._counter) if o is not None]
        machine.end_of_block = self._counter.end_of_block if self._counter else None
        names = [*parameters, *(f"argument {i}" for i in range(len(parameters), len(args)))]
        values = [self._argument(name, value) for name, value in zip(names, args, strict=False)]
        name = source.__name__
        machine.launch(function, name, grid_dim, block_dim, values, shared_bytes)
        record = LaunchRecord(
            kernel=name,
            grid=grid_dim,
            block=block_dim,
            threads=int(np.prod(grid_dim)) * threads_per_block,
            shared_bytes=shared_bytes,
            collectives=dict(machine.collectives),
        )
        if self._counter:
            record.intrinsics = dict(self._counter.intrinsics)
            record.lines = self._counter.lines()
        self.launches.append(record)

    @property
    def bytes_read(self) -> int:
        """Bytes of global memory read by all launches, under the byte model above."""
        self._require_counts()
        return sum(launch.bytes_read for launch in self.launches)

    @property
    def bytes_written(self) -> int:
        """Bytes of global memory written by all launches, under the byte model above."""
        self._require_counts()
        return sum(launch.bytes_written for launch in self.launches)

    def report(self) -> str:
        """A plain-text table of every launch, one row per source line, array and kind."""
        return report(self.launches)

    def _require_counts(self) -> None:
        if not self._count:
            raise SimulationError("bytes are only counted by Simulator(count=True)")

    def _fence(self) -> None:
        if self._races:
            self._races.fence()

    def _intrinsic_called(self, name: str) -> None:
        if self._counter:
            self._counter.intrinsics[name] += 1

    def _argument(self, name: str, value: Any) -> Any:
        if isinstance(value, np.generic):
            return value
        if hasattr(value, "detach") and hasattr(value, "numpy"):
            value = value.detach().numpy()
        if isinstance(value, np.ndarray):
            return self._machine.wrap(value, None, array_info(name, name, "global", value))
        if isinstance(value, tuple):
            return tuple(self._argument(f"{name}[{i}]", v) for i, v in enumerate(value))
        if isinstance(value, float):
            return np.float64(value)  # numba passes a double, not a weak Python float
        if value is None or isinstance(value, numbers.Number):
            return value
        raise TypeError(f"argument {name!r} is a {type(value).__name__}, which no kernel takes")


def _dim(what: str, value: Any) -> Dim:
    dims = tuple(int(n) for n in (value if isinstance(value, tuple | list) else (value,)))
    if not 1 <= len(dims) <= 3 or min(dims) < 1:
        raise ValueError(f"{what} must be 1 to 3 positive ints, not {value!r}")
    x, y, z = (*dims, 1, 1)[:3]
    return x, y, z
