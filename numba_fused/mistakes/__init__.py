"""The ways such kernels fail in the wild, each one small change away from a right one.

A verifier is worth what it rejects. Here it is shown wrong kernels it has to reject: the shortcuts
that pass the benchmark, the masks that look random, the reductions that work in most blocks. Each
is a changed line of a kernel of this package (`catalogue`), put in its place and given to the
verifier as any rung is (`mistake`), in the simulator, on the verifier's own random cases
(`gallery`). Beside it stands a test that one might write, which the mistake passes (`naive`).
"""

from numba_fused.mistakes.catalogue import MISTAKES
from numba_fused.mistakes.gallery import Verdict, examine, get, names
from numba_fused.mistakes.mistake import Mistake

__all__ = ["MISTAKES", "Mistake", "Verdict", "examine", "get", "names"]
