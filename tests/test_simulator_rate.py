"""The simulator against numba's own, on one kernel with eight barriers."""

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


def rate(launch, blocks):
    """Threads a second of one launch, whose result is checked."""
    x = np.arange(blocks * THREADS, dtype=np.float32)
    out = np.zeros_like(x)
    start = time.perf_counter()
    launch(blocks, x, out)
    seconds = time.perf_counter() - start
    rows = x.reshape(blocks, THREADS)
    assert np.array_equal(out.reshape(blocks, THREADS), 8 * (rows + rows[:, ::-1]))
    return blocks * THREADS / seconds


def numba_rate():
    """Measured in a process of its own: numba's simulator has to be chosen before import."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("checks", ["races checked", "plain"])
def test_at_least_twenty_times_numbas_simulator(checks, capsys):
    from numba_fused.simulator import Simulator

    sim = Simulator(check_races=checks == "races checked")
    ours = rate(lambda blocks, *args: sim.launch(eight_barriers, blocks, THREADS, *args), 100)
    theirs = numba_rate()
    with capsys.disabled():
        print(f"\n{checks}: {ours:,.0f} threads/s, numba's simulator {theirs:,.0f}")
    assert ours >= 20 * theirs


if __name__ == "__main__":
    print(rate(lambda blocks, *args: eight_barriers[blocks, THREADS](*args), 4))
