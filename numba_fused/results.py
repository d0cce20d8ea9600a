"""Rows: every measurement is one, with everything needed to doubt it.

A row is a flat dict with the keys of `COLUMNS`; a file of rows is CSV, or parquet if its name ends
in ``.parquet``. A case that failed or could not run is a row too, with its reason. What follows
from other columns (rates, ratios) is not stored. Two rows measure the same thing if their `Key` is
the same; where they do, the newer one counts.
"""

from __future__ import annotations

import datetime
import functools
import io
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pandas as pd

Row: TypeAlias = dict[str, Any]

DATA = Path("plots/data")
LADDER = DATA / "ladder.csv"
EAGER, COMPILED, AUTO = "torch", "torch.compile", "auto"

COLUMNS = {
    "case": "name of the benchmark case",
    "variant": "rung, torch.compile, or auto",
    "runs": "the rung that auto chose",
    "differentiates": "with backward: the variant of numba_fused.backward; empty for PyTorch's own",
    "status": "ok, failed (wrong or crashed) or skipped (cannot run)",
    "reason": "why it failed or was skipped",
    "x_shape": "N x C x spatial",
    "weight_shape": "K x C/groups x kernel",
    "stride": "by spatial axis",
    "padding": "zeros at either end of each spatial axis; a:b where the ends differ",
    "dilation": "by spatial axis",
    "groups": "groups of the convolution",
    "num_groups": "groups of the normalisation",
    "min_value": "lower bound of the clamp",
    "max_value": "upper bound of the clamp",
    "cap": "what min takes the minimum with",
    "dropout_p": "probability of a drop; 0 when not training",
    "backward": "whether the time is that of forward and backward pass together",
    "dtype": "float32 or float64",
    "precision": "ieee (no TF32, in PyTorch neither) or tf32 (PyTorch's default for convolutions)",
    "threads_per_block": "launch configuration; empty where the variant has its own",
    "p20_ms": "GPU time of one call, with backward of both passes, 20th percentile, milliseconds",
    "p50_ms": "the same, median",
    "p80_ms": "the same, 80th percentile",
    "host_us": "time a call of the public function keeps the host busy, microseconds, median",
    "peak_extra_bytes": "most device memory one call holds besides its inputs and its results: "
    "the output and, with backward, the gradients",
    "forward_peak_extra_bytes": "with backward: the same of its forward pass, which keeps what the "
    "other needs",
    "method": "graph (CUDA-graph replays) or launches (batches of calls)",
    "samples": "timed replays behind the percentiles",
    "input_sets": "sets of inputs rotated through, so that L2 is cold",
    "launches": "kernel launches by the rung's ledger and, with backward, by that of its kernels",
    "ledger_bytes": "bytes that should move by the same ledgers",
    "compulsory_bytes": "bytes no implementation can avoid; with backward, of both passes",
    "copy_gb_per_s": "read plus written by a large copy on this GPU, same run, 1e9 bytes/s",
    "floor_ms": "compulsory_bytes at that rate, milliseconds",
    "error": "relative L2 error against fp64, worst of before and after timing",
    "torch_error": "PyTorch's own error in the same dtype and precision, on the same inputs",
    "error_bound": "largest error that passes",
    "gradient_error": "with backward: the same of the gradient that came closest to its bound",
    "gradient_error_bound": "largest error of that gradient that passes",
    "seconds": "wall time of measuring this row: compiling, checks and its case's set-up included",
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
# Files written before these columns were have them empty.
ADDED = {
    *("stride", "padding", "dilation", "groups", "min_value", "max_value", "cap"),
    *("backward", "differentiates", "seconds"),
    *("forward_peak_extra_bytes", "gradient_error", "gradient_error_bound"),
}
# What pandas must not take for numbers, even where all of a file's values look like them.
TEXT = (
    *("reason", "runs", "differentiates", "x_shape", "weight_shape"),
    *("stride", "padding", "dilation", "cuda"),
)


class Key(NamedTuple):
    """What a row measures: rows of one GPU with the same key are repetitions."""

    case: str
    variant: str
    precision: str
    threads_per_block: int | None
    backward: bool


def key(row: Mapping[str, Any]) -> Key:
    """The key of a row: launch configurations that the variant chose itself are no part of it."""
    threads = None if row["variant"] == AUTO else row.get("threads_per_block")
    backward = row.get("backward")
    return Key(
        case=row["case"],
        variant=row["variant"],
        precision=row["precision"],
        threads_per_block=None if threads is None or pd.isna(threads) else int(threads),
        backward=False if backward is None or pd.isna(backward) else bool(backward),
    )


def variants() -> list[str]:
    """What can be timed: every rung, torch.compile beside eager PyTorch, and auto."""
    from numba_fused import ladder

    names = ladder.names()
    return [names[0], COMPILED, *names[1:], AUTO]


def provenance() -> Row:
    """The columns that say where and with what a row was made."""
    import torch

    return {
        "gpu": gpu_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name.replace("-", "_"): version(name) for name in ("numba", "numba-cuda", "numpy")},
        "commit": commit(),
        "utc": now(),
    }


def now() -> str:
    """UTC time to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@functools.cache  # a GPU that was lost meanwhile no longer says its name
def gpu_name() -> str:
    """Name of the current GPU; empty without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def gpu_uuid() -> str:
    """What tells the current GPU from all others; empty without one."""
    import torch

    return str(torch.cuda.get_device_properties(0).uuid) if torch.cuda.is_available() else ""


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


# ---- files ------------------------------------------------------------------------------------


def append(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Add rows to a file, which is created if need be.

    Raises
    ------
    ValueError
        A row has a key that is no column, or the file was written with other columns.
    RuntimeError
        The file is parquet and pyarrow is not installed.
    """
    path, rows = Path(path), list(rows)
    unknown = {key for row in rows for key in row} - COLUMNS.keys()
    if unknown:
        raise ValueError(f"no such columns: {', '.join(sorted(unknown))}; see results.COLUMNS")
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    if is_parquet(path):
        _append_parquet(frame, path)
    else:
        _append_csv(frame, path)


def _append_csv(frame: pd.DataFrame, path: Path) -> None:
    """Add lines that are on the disk when this returns, whatever becomes of the machine then."""
    if path.exists():
        _mend(path)
    with path.open("a", newline="") as file:
        frame.to_csv(file, header=file.tell() == 0, index=False)
        file.flush()
        os.fsync(file.fileno())


def _mend(path: Path) -> None:
    """Cut off the line that a crash left unfinished; give rows of before `ADDED` its columns."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    header = whole.partition(b"\n")[0].decode().strip()
    if header and header != ",".join(COLUMNS):
        beside = path.with_name(f"{path.name}.new")
        read(path).to_csv(beside, index=False)
        beside.replace(path)


def check_file(path: Path) -> None:
    """Raise what `append` would raise, before anything is measured for the file."""
    if is_parquet(path):
        _need_pyarrow()
    if path.exists():
        read(path)


def read(path: str | Path) -> pd.DataFrame:
    """Rows of a file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        Its columns are not `COLUMNS`.
    RuntimeError
        The file is parquet and pyarrow is not installed.
    """
    path = Path(path)
    if is_parquet(path):
        _need_pyarrow()
        frame = pd.read_parquet(path)
    else:
        frame = _read_csv(path)
    if differing := sorted((set(COLUMNS) ^ set(frame.columns)) - ADDED):
        raise ValueError(
            f"{path} was written with other columns (differing: {', '.join(differing)}): move it "
            f"away or write to another file"
        )
    return frame.reindex(columns=list(COLUMNS))


def _read_csv(path: Path) -> pd.DataFrame:
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # a line without an end was being written at a crash
    if not whole:
        return pd.DataFrame(columns=list(COLUMNS))
    return pd.read_csv(
        io.StringIO(whole),
        keep_default_na=False,
        na_values=[""],
        dtype=dict.fromkeys(TEXT, "string"),
    )


def check_table(path: Path) -> None:
    """Raise what `write_table` would raise, before anything is measured for the file.

    Raises
    ------
    ValueError
        The name ends in neither ``.csv`` nor ``.parquet``.
    RuntimeError
        It is parquet and pyarrow is not installed.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"rows are written as .csv or .parquet, but got {path.name!r}")
    if is_parquet(path):
        _need_pyarrow()


def write_table(frame: pd.DataFrame, path: Path) -> None:
    """Write a table with columns of its own, in place of what the file held."""
    check_table(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_parquet(path):
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)


def read_table(path: Path) -> pd.DataFrame:
    """What `write_table` wrote."""
    check_table(path)
    return pd.read_parquet(path) if is_parquet(path) else pd.read_csv(path)


def is_parquet(path: Path) -> bool:
    """Whether a file of that name holds parquet; all others hold CSV."""
    return path.suffix == ".parquet"


def _append_parquet(frame: pd.DataFrame, path: Path) -> None:
    """Parquet cannot grow in place: write all rows anew beside the file, then replace it."""
    # Without the columns that are empty, whose type would be anyone's guess.
    parts = [read(path)] if path.exists() else []
    whole = pd.concat([part.dropna(axis="columns", how="all") for part in (*parts, frame)])
    beside = path.with_name(f"{path.name}.new")
    whole.reindex(columns=list(COLUMNS)).to_parquet(beside, index=False)
    beside.replace(path)


def _need_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise RuntimeError(
            "rows in parquet need pyarrow: pip install 'numba_fused[parquet]', or name a .csv file"
        ) from None


# ---- choosing and comparing rows --------------------------------------------------------------


def newest(
    frame: pd.DataFrame, precision: str = "ieee", *, backward: bool = False
) -> dict[str, list[Row]]:
    """The newest row of each case and variant, by case, variants in ladder order.

    Rows of the forward pass and rows of both passes are never together, and only those of the
    usual block size count, or that have none. Cases come in the order they were measured in;
    empty cells are None.
    """
    found: dict[str, dict[str, Row]] = {}
    for record in frame.to_dict("records"):
        row: Row = {str(name): None if pd.isna(value) else value for name, value in record.items()}
        what = key(row)
        if (what.precision, what.backward) != (precision, backward) or not has_usual_size(what):
            continue
        of_case, variant = found.setdefault(row["case"], {}), row["variant"]
        if variant not in of_case or row["utc"] >= of_case[variant]["utc"]:
            of_case[variant] = row
    return {case: [rows[name] for name in _in_order(rows)] for case, rows in found.items()}


def has_usual_size(what: Key) -> bool:
    """Whether a measurement is of the usual block size, or of a variant that has its own."""
    from numba_fused import ladder

    return what.threads_per_block in (None, ladder.DEFAULT_THREADS_PER_BLOCK)


def _in_order(names: Iterable[str]) -> list[str]:
    known = variants()
    return sorted(names, key=lambda n: (known.index(n) if n in known else len(known), n))


def latest(
    frame: pd.DataFrame, case: str, precision: str = "ieee", *, backward: bool = False
) -> list[Row]:
    """The newest row of each variant of a case, as `newest` has them.

    Raises
    ------
    ValueError
        There is no such row of that case in that precision.
    """
    found = newest(frame, precision, backward=backward)
    if case not in found:
        known = ", ".join(sorted(found)) or "none"
        what = f"{precision} rows{' with backward' * backward}"
        raise ValueError(f"no {what} of case {case!r}; there are rows of: {known}")
    return found[case]


def label(row: Row) -> str:
    """A row's variant as figures and tables name it: with what auto chose."""
    return f"{AUTO}: {row['runs']}" if row.get("runs") else row["variant"]


def times_faster(row: Row, rows: Iterable[Row], baseline: str) -> float | None:
    """How many times faster than `baseline` a row is; None where either has no time."""
    base = _milliseconds(rows, baseline)
    return base / row["p50_ms"] if base and row.get("p50_ms") else None


def _milliseconds(rows: Iterable[Row], variant: str) -> float | None:
    times = (r["p50_ms"] for r in rows if r["variant"] == variant and r["status"] == "ok")
    return next(times, None)


@dataclass(frozen=True)
class Comparison:
    """`auto` against PyTorch on one case: milliseconds, None where there is no valid time.

    Attributes
    ----------
    case, precision : str
    runs : str
        The rung that auto chose; empty if auto was not timed.
    floor_ms, eager_ms, compile_ms, auto_ms : float or None
    """

    case: str
    precision: str
    runs: str
    floor_ms: float | None
    eager_ms: float | None
    compile_ms: float | None
    auto_ms: float | None

    @property
    def times_eager(self) -> float | None:
        """How many times faster than eager PyTorch auto is."""
        return self.eager_ms / self.auto_ms if self.eager_ms and self.auto_ms else None

    @property
    def times_best(self) -> float | None:
        """The same against the faster of eager and torch.compile."""
        known = [time for time in (self.eager_ms, self.compile_ms) if time]
        return min(known) / self.auto_ms if known and self.auto_ms else None


def compare(rows: Sequence[Row]) -> Comparison:
    """The comparison of one case, from its rows."""
    auto = next((row for row in rows if row["variant"] == AUTO), {})
    return Comparison(
        case=rows[0]["case"],
        precision=rows[0]["precision"],
        runs=auto.get("runs") or "",
        floor_ms=rows[0].get("floor_ms"),
        eager_ms=_milliseconds(rows, EAGER),
        compile_ms=_milliseconds(rows, COMPILED),
        auto_ms=_milliseconds(rows, AUTO),
    )


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence: how much faster auto is on the whole, and where it is slower."""
    ratios = [c.times_eager for c in comparisons if c.times_eager]
    if not ratios:
        return "auto cannot be compared: no case has a time of it and of eager PyTorch"
    slower = [c.case for c in comparisons if c.times_best and c.times_best < 1]
    return (
        f"auto is {statistics.geometric_mean(ratios):.2f} times faster than eager PyTorch, in the "
        f"geometric mean of {len(ratios)} case{'s' * (len(ratios) > 1)}; slower than the faster of "
        f"eager and torch.compile on: {', '.join(slower) or 'none'}"
    )
