"""Rows: every measurement is one, with everything needed to doubt it.

A row is a flat dict with the keys of `COLUMNS`; a file of rows is CSV. A case that failed or
could not run is a row too, with its reason.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

Row: TypeAlias = dict[str, Any]

DATA = Path("plots/data")
LADDER = DATA / "ladder.csv"
COMPILED = "torch.compile"

COLUMNS = {
    "case": "name of the benchmark case",
    "variant": "rung, or torch.compile",
    "status": "ok, failed (wrong or crashed) or skipped (cannot run)",
    "reason": "why it failed or was skipped",
    "x_shape": "N x C x spatial",
    "weight_shape": "K x C/groups x kernel",
    "num_groups": "groups of the normalisation",
    "dropout_p": "probability of a drop; 0 when not training",
    "dtype": "float32 or float64",
    "threads_per_block": "launch configuration; empty where the variant has its own",
    "p20_ms": "GPU time of one call, 20th percentile, milliseconds",
    "p50_ms": "the same, median",
    "p80_ms": "the same, 80th percentile",
    "host_us": "time the call keeps the host busy, microseconds, median",
    "method": "graph (CUDA-graph replays) or launches (batches of calls)",
    "samples": "timed replays behind the percentiles",
    "input_sets": "sets of inputs rotated through, so that L2 is cold",
    "launches": "kernel launches by the rung's ledger",
    "ledger_bytes": "bytes the rung should move by its ledger",
    "compulsory_bytes": "bytes no implementation can avoid",
    "copy_gb_per_s": "read plus written by a large copy on this GPU, same run, 1e9 bytes/s",
    "floor_ms": "compulsory_bytes at that rate, milliseconds",
    "error": "relative L2 error against fp64, worst of before and after timing",
    "torch_error": "PyTorch's own error in the same dtype, on the same inputs",
    "error_bound": "largest error that passes",
    "gpu": "name of the GPU",
    "driver": "NVIDIA driver",
    "cuda": "CUDA version torch was built for",
    "python": "version",
    "torch": "version",
    "numba": "version",
    "numba_cuda": "version",
    "numpy": "version",
    "commit": "git commit of the package; -dirty if its sources differ from it",
    "utc": "when it was measured",
}


def variants() -> list[str]:
    """What can be timed: every rung, and torch.compile beside eager PyTorch."""
    from numba_fused import ladder

    names = ladder.names()
    return [names[0], COMPILED, *names[1:]]


def provenance() -> Row:
    """The columns that say where and with what a row was made."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "gpu": gpu,
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): version(name) for name in ("numba", "numba-cuda", "numpy")},
        "commit": commit(),
        "utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(distribution: str) -> str:
    """Installed version of a distribution; empty if it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def driver_version() -> str:
    """Version of the NVIDIA driver, as ``nvidia-smi`` says; empty without one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return _output(query).partition("\n")[0]


def commit() -> str:
    """Git commit of the package's sources, with ``-dirty`` if they differ; empty without git.

    Sources that were copied to another machine without their history say theirs in the
    environment variable ``NUMBA_FUSED_COMMIT``.
    """
    if told := os.environ.get("NUMBA_FUSED_COMMIT"):
        return told
    package = Path(__file__).parent
    head = _output(["git", "-C", str(package), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(package), "status", "--porcelain", "--", "."])
    return f"{head}-dirty" if head and changes else head


def _output(command: list[str]) -> str:
    """Standard output of a command; empty if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def append(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Add rows to a CSV file, which is created if need be.

    Raises
    ------
    ValueError
        A row has a key that is no column, or the file was written with other columns.
    """
    path, rows = Path(path), list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}; see results.COLUMNS")
    if path.exists():
        read(path)  # refuses a file of another layout before anything is added to it
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    frame.to_csv(path, mode="a", header=not path.exists(), index=False)


def read(path: str | Path) -> pd.DataFrame:
    """Rows of a CSV file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Its columns are not `COLUMNS`.
    """
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"reason": "string"})
    if list(frame.columns) != list(COLUMNS):
        missing = sorted(set(COLUMNS) ^ set(frame.columns))
        raise ValueError(
            f"{path} was written with other columns (differing: {', '.join(missing)}): move it "
            f"away or write to another file"
        )
    return frame


def latest(frame: pd.DataFrame, case: str) -> list[Row]:
    """The newest row of each variant of a case, in ladder order, torch.compile after torch.

    Empty cells are None.

    Raises
    ------
    ValueError
        There is no row of that case.
    """
    newest: dict[str, Row] = {}
    for record in frame.to_dict("records"):
        row: Row = {str(key): None if pd.isna(value) else value for key, value in record.items()}
        variant = str(row["variant"])
        newer = variant not in newest or row["utc"] >= newest[variant]["utc"]
        if row["case"] == case and newer:
            newest[variant] = row
    if not newest:
        known = ", ".join(sorted(set(frame["case"]))) or "none"
        raise ValueError(f"no rows of case {case!r}; there are rows of: {known}")
    names = [name for name in variants() if name in newest]
    return [newest[name] for name in [*names, *sorted(newest.keys() - set(names))]]


def times_faster(row: Row, rows: Iterable[Row], baseline: str) -> float | None:
    """How many times faster than `baseline` a row is; None where either has no time."""
    base = next((r["p50_ms"] for r in rows if r["variant"] == baseline and r.get("p50_ms")), None)
    return base / row["p50_ms"] if base and row.get("p50_ms") else None
