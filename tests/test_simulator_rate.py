"""The simulator against numba's own, on one kernel with eight barriers."""

# numba declares its device API as empty classes, which no call in a kernel can satisfy:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from numba import cuda, float32

THREADS = 128


@cuda.jit
def eight_barriers(x, out):
    tile = cuda.shared.array(THREADS, float32)
    t = cuda.threadIdx.x
    i = cuda.grid(1)
    v = x[i]
    for _ in range(4):
        tile[t] = v
        cuda.syncthreads()
        v = v + tile[THREADS - 1 - t]
        cuda.syncthreads()
    out[i] = v


def rate(launch, blocks, clock):
    """Threads per second by `clock` of one launch, whose result is checked."""
    x = np.arange(blocks * THREADS, dtype=np.float32)
    out = np.zeros_like(x)
    start = clock()
    launch(blocks, x, out)
    seconds = clock() - start
    rows = x.reshape(blocks, THREADS)
    assert np.array_equal(out.reshape(blocks, THREADS), 8 * (rows + rows[:, ::-1]))
    return blocks * THREADS / seconds


def numba_rate():
    """Measured in a process of its own: numba's simulator has to be chosen before import.

    By the wall clock, for its threads sleep while they wait; ours never sleeps, and its processor
    time is what the wall clock would say on an idle machine.
    """
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.slow
def test_at_least_twenty_times_numbas_simulator(capsys):
    """Twenty times without the race detector, which numba's has not, and eight times with it."""
    from numba_fused.simulator import Simulator

    plain, checked = (
        rate(
            lambda *args, s=s: s.launch(eight_barriers, args[0], THREADS, *args[1:]),
            100,
            time.process_time,
        )
        for s in (Simulator(check_races=False), Simulator())
    )
    theirs = numba_rate()
    with capsys.disabled():
        print(
            f"\nthreads/s with 8 barriers: {plain:,.0f}; {checked:,.0f} with races checked; "
            f"numba's simulator {theirs:,.0f}"
        )
    assert plain >= 20 * theirs
    assert checked >= 8 * theirs


if __name__ == "__main__":
    print(rate(lambda blocks, *args: eight_barriers[blocks, THREADS](*args), 8, time.perf_counter))
