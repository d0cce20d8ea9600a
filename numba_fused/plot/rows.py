"""Which rows a figure is made of, and how to measure those that are not there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from numba_fused import bench, results
from numba_fused.results import DATA, Key, Row

PRECISIONS = ("ieee", "tf32")
MARKS_OF_ROWS = {"case", "variant", "p50_ms", "utc"}  # that every file of rows has, ever had
SHOWN_KEYS = 3


class NotMeasuredError(ValueError):
    """There is nothing to draw a figure from."""


# ---- reading ----------------------------------------------------------------------------------


def read_rows(*paths: str | Path) -> pd.DataFrame:
    """The newest row of everything that was measured, in the order of measuring.

    Parameters
    ----------
    *paths : str or Path
        Files of rows, or folders that hold some.

    Raises
    ------
    ValueError
        There is no file of rows, or the rows are of more than one GPU.
    FileNotFoundError
        There is no such file.
    """
    files = [file for path in paths for file in files_of_rows(Path(path))]
    if not files:
        raise ValueError(
            f"no file of rows in {', '.join(map(str, paths))}: measure some with numba-fused bench "
            f"--out {DATA / 'ladder.csv'}"
        )
    # Without the columns that are empty, whose type would be anyone's guess.
    parts = [results.read(file).dropna(axis="columns", how="all") for file in files]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=list(results.COLUMNS))
    gpus = sorted(frame["gpu"].dropna().unique())
    if len(gpus) > 1:
        raise ValueError(
            f"the rows are of {' and of '.join(gpus)}: name the files of one GPU with --rows"
        )
    frame = frame.sort_values("utc", kind="stable", ignore_index=True)
    keys = pd.Series(list(map(results.key, frame.to_dict("records"))), dtype=object)
    return frame.loc[~keys.duplicated(keep="last")].reset_index(drop=True)


def files_of_rows(path: Path) -> list[Path]:
    """The file itself, or a folder's files of rows; a parquet twin of a CSV file is left out."""
    if not path.is_dir():
        return [path]
    tables = [file for file in sorted(path.glob("*.csv")) if _holds_rows(file)]
    twins = {file.stem for file in tables}
    return tables + [file for file in sorted(path.glob("*.parquet")) if file.stem not in twins]


def _holds_rows(file: Path) -> bool:
    with file.open() as opened:
        return set(opened.readline().strip().split(",")) >= MARKS_OF_ROWS


# ---- choosing ---------------------------------------------------------------------------------


def by_case(frame: pd.DataFrame, precision: str, *, backward: bool = False) -> dict[str, list[Row]]:
    """The rows of each case, variants in ladder order: usual block size, forward or both passes."""
    return results.newest(frame, precision, backward=backward)


def of_case(
    frame: pd.DataFrame, case: str, precisions: Iterable[str], *, backward: bool = False
) -> list[Row]:
    """The rows of one case, as `by_case` has them."""
    return [
        row
        for precision in precisions
        for row in by_case(frame, precision, backward=backward).get(case, [])
    ]


def of_cases(frame: pd.DataFrame, precision: str, wanted: Callable[[str], bool]) -> list[Row]:
    """The rows of the cases whose names `wanted` accepts."""
    found = by_case(frame, precision).items()
    return [row for case, rows in found if wanted(case) for row in rows]


def varies_only(base: str, *parameters: str) -> Callable[[str], bool]:
    """Whether a case, by its name, is `base` but for these parameters."""
    start = bench.case(base)
    same = {parameter: getattr(start, parameter) for parameter in parameters}
    return lambda name: bench.case(name).vary(**same) == start


def all_block_sizes(frame: pd.DataFrame, case: str, precision: str) -> list[Row]:
    """The rows of a case that were measured at a certain block size, one for each size.

    Those with the backward pass have none.
    """
    here = (frame["case"] == case) & (frame["precision"] == precision)
    takes = bench.takes_threads_per_block
    return [
        row
        for row in _records(frame.loc[here])
        if row["threads_per_block"] and takes(row["variant"])
    ]


def timed(rows: Iterable[Row]) -> list[Row]:
    """Those that have a valid time."""
    return [row for row in rows if row["status"] == "ok" and row["p50_ms"]]


def _records(frame: pd.DataFrame) -> list[Row]:
    """Rows with None in their empty cells."""
    return [
        {str(key): None if pd.isna(value) else value for key, value in record.items()}
        for record in frame.to_dict("records")
    ]


# ---- what is not there ------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How to measure what a figure shows.

    Attributes
    ----------
    command : str
    keys : tuple of Key
        What the command measures and the figure shows, as far as that can be listed here; where
        `threads_per_block` is None, the usual one.
    """

    command: str
    keys: tuple[Key, ...] = ()

    def missing(self, frame: pd.DataFrame) -> list[Key]:
        """The keys that there is no row of, not even a failed one."""
        there = set(map(results.key, frame.to_dict("records")))
        usual = filter(results.has_usual_size, there)
        there |= {key._replace(threads_per_block=None) for key in usual}
        return [key for key in self.keys if key not in there]


def bench_recipe(
    case: str, precisions: Sequence[str], variants: Sequence[str] = (), *, backward: bool = False
) -> Recipe:
    """These variants of one case, by default all: the forward pass, or both together."""
    options = [
        *(f"--variant {variant}" for variant in variants),
        *(f"--precision {precision}" for precision in precisions),
        *(["--backward"] if backward else []),
    ]
    out = DATA / ("backward.csv" if backward else "ladder.csv")
    return Recipe(
        f"numba-fused bench --case {case} {' '.join(options)} --out {out}",
        tuple(
            Key(case, variant, precision, None, backward)
            for precision in precisions
            for variant in variants or results.variants()
        ),
    )


@functools.cache
def sweep_recipe(
    name: str, variants: tuple[str, ...] = (), *, usual_block_size: bool = True
) -> Recipe:
    """What a shipped sweep measures of these variants, by default of all."""
    from numba_fused.sweep import Sweep

    command = f"numba-fused sweep {name} --out {DATA / name}.csv"
    try:
        keys = list(Sweep.read(name).levels)
    except RuntimeError:  # without PyYAML the command is known, its rows are not
        return Recipe(command)
    keys = [key for key in keys if not variants or key.variant in variants]
    if usual_block_size:
        keys = [key._replace(threads_per_block=None) for key in keys]
    return Recipe(command, tuple(keys))


def listed(keys: Sequence[Key]) -> str:
    """The first few keys in words, and how many more there are."""
    names = [
        f"{key.case} {key.variant} {key.precision}"
        + (f" @{key.threads_per_block}" if key.threads_per_block else "")
        + " with backward" * key.backward
        for key in keys[:SHOWN_KEYS]
    ]
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return ", ".join(names) + more


def arithmetic(row: Row) -> str:
    """What a row computes in."""
    return f"{row['dtype']} with TF32" if row["precision"] == "tf32" else row["dtype"]


def heading(row: Row) -> str:
    """What a figure of one case is of: the case, its input, its arithmetic, the GPU."""
    return f"{row['case']}: {row['x_shape']}, {arithmetic(row)}, {row['gpu']}"
