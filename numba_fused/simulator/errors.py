"""What the simulator raises when a kernel does something hardware would not forgive."""


class SimulationError(RuntimeError):
    """A kernel broke a rule of the machine; the base of every error raised on a kernel's behalf."""


class DeadlockError(SimulationError):
    """Threads wait for each other, or for threads that have returned, and nothing can proceed."""


class OutOfBoundsError(SimulationError, IndexError):
    """An array index outside the array's shape (negative indices included)."""


class UninitialisedReadError(SimulationError):
    """A shared or local word was read that nobody had written."""


class RaceError(SimulationError):
    """Two threads touched one word, at least one wrote it, and no barrier ordered them."""
