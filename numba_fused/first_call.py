"""What the first call of a process costs: kernels compiled, or loaded from the disk cache.

Each measurement is a process of its own (`main`), which imports everything, puts its tensors on
the GPU and waits for them; then the clock runs until the first output is there. The first process
finds an empty cache of kernels and fills it, the second finds it full. Libraries have caches, too,
which are left as they are: the driver's, and the operating system's of files.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

from numba_fused import bench, results

COLD, WARM = "cold", "warm"


def run(case: str = "kb83-b1", precision: str = "ieee", repeats: int = 3) -> pd.DataFrame:
    """Time the first call of new processes through the public function, ``variant="auto"``.

    Parameters
    ----------
    case : str
        As `bench.run` takes it; a small one, or its tensors take longer than its kernels.
    precision : str
        ``"ieee"`` or ``"tf32"``.
    repeats : int
        Pairs of processes, each pair with a cache directory of its own.

    Returns
    -------
    pandas.DataFrame
        A row a process: case, precision, cache (``"cold"`` or ``"warm"``), seconds, and where and
        with what it was measured (`results.provenance`).

    Raises
    ------
    ValueError
        Unknown case or precision.
    RuntimeError
        There is no GPU, or a process failed: then the message ends with its last line.
    """
    bench.check_usage(case, precision=precision)
    common = {"case": case, "precision": precision, **results.provenance()}
    rows = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as directory:
            for cache in (COLD, WARM):
                seconds = _in_new_process(case, precision, Path(directory))
                rows.append({"cache": cache, "seconds": seconds, **common})
    return pd.DataFrame(rows)


def _in_new_process(case: str, precision: str, cache: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "numba_fused.first_call", case, precision],
        env=os.environ | {"NUMBA_FUSED_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"the process that was to be timed failed: {' '.join(said)}")
    return float(done.stdout)


def main(case: str, precision: str) -> None:
    """Print the seconds that this process's first call takes."""
    import torch

    import numba_fused as nf

    inputs = bench.random_inputs(bench.case_spec(case, precision=precision), 0)
    keywords = bench.case(case).keywords(precision)
    torch.cuda.synchronize()
    start = time.perf_counter()
    nf.fused_conv_group_norm_min_clamp_dropout(*inputs, seed=bench.DROPOUT_SEED, **keywords)
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
