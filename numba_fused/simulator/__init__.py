"""Runs any ``@cuda.jit`` kernel from its Python source, without a GPU, and watches it.

    from numba_fused.simulator import Simulator

    sim = Simulator(count=True)
    sim.launch(kernel, grid, block, x, out, n, shared_bytes=0)
    print(sim.report())                        # requests, sectors, bank conflicts per source line
    print(sim.bytes_read, sim.bytes_written)   # global traffic under the byte model of `Simulator`

How it works:

* `translate` rebuilds the function with other globals: the same bytecode runs, but ``cuda`` is the
  `namespace` here, device functions are rebuilt likewise, float32 and its kin are NumPy's scalar
  types, and an intrinsic made of PTX is whatever Python function its `simulated_as` names.
* `machine` runs each thread as a greenlet until it has to wait: at a barrier, a warp collective, a
  grid barrier. Who arrives last at one wakes the others. When nobody can go on and somebody still
  waits, that is a `DeadlockError` that lists who waits where.
* `arrays` gives the kernel views that check bounds and refuse to read shared or local words
  nobody wrote. With races or counts on, every access is also reported to `races` and `counts`.

It is stricter than hardware: all threads of a block must meet at the same ``syncthreads``, a
returned thread does not count as arrived, negative indices are errors.

Arithmetic is NumPy's on the kernel's own types, unsigned wrap-around included. It differs from
compiled code where NumPy's promotion differs from numba's: Python literals are weak here
(``float32(x) * 2`` stays float32; numba makes it float64), and the local integers that numba types
int64 are unbounded Python ints. Kernels that cast explicitly see no difference. A shuffle from a
lane that takes no part gives NaN or 0xDEADBEEF; atomics in a row and ``nanosleep`` let other
threads run, so that spinning ends; all blocks of a grid are resident at once.
"""

from .counts import LaunchRecord, Line
from .errors import (
    DeadlockError,
    OutOfBoundsError,
    RaceError,
    SimulationError,
    UninitialisedReadError,
)
from .simulator import Simulator

__all__ = [
    "DeadlockError",
    "LaunchRecord",
    "Line",
    "OutOfBoundsError",
    "RaceError",
    "SimulationError",
    "Simulator",
    "UninitialisedReadError",
]
