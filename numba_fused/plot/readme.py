"""The README's tables: made from rows, put between their markers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import pandas as pd

from numba_fused import bench
from numba_fused.plot.rows import PRECISIONS, arithmetic, by_case, of_case
from numba_fused.results import (
    COMPILED,
    EAGER,
    Comparison,
    Row,
    compare,
    label,
    times_faster,
    verdict,
)


def readme_tables(frame: pd.DataFrame, case: str = "kb83") -> dict[str, str]:
    """The tables that there are rows for, by the name of their markers.

    ``ladder`` is of one case; ``cases`` of the named ones, once one of them has a time of auto;
    ``backward`` of one case, forward and backward pass together. Those of TF32 are ``ladder-tf32``
    and so on.
    """
    tables = {}
    for precision in PRECISIONS:
        suffix = "" if precision == "ieee" else f"-{precision}"
        found = by_case(frame, precision)
        if case in found:
            tables[f"ladder{suffix}"] = ladder_table(found[case])
        if any_auto(found):
            tables[f"cases{suffix}"] = cases_table(list(found.values()))
        if both_passes := of_case(frame, case, [precision], backward=True):
            tables[f"backward{suffix}"] = backward_table(both_passes)
    return tables


def any_auto(found: Mapping[str, Sequence[Row]]) -> bool:
    """Whether a named case has a time of auto: without one there is nothing to compare."""
    return any(compare(rows).auto_ms for name, rows in found.items() if name in bench.CASES)


class Table(NamedTuple):
    """Headings, lines of cells, and a sentence on where the numbers are from."""

    headings: tuple[str, ...]
    lines: list[tuple[str, ...]]
    note: str

    def markdown(self, alignment: Sequence[str]) -> str:
        """As Markdown; `alignment` has what is under each heading, ``---`` or ``--:``."""
        lines = [tuple(cell.replace("|", "\\|") for cell in line) for line in self.lines]
        drawn = [f"| {' | '.join(line)} |" for line in (self.headings, *lines)]
        drawn.insert(1, f"|{'|'.join(alignment)}|")
        return "\n".join([*drawn, "", self.note])


def ladder_table(rows: Sequence[Row]) -> str:
    """The ladder of one case as a Markdown table, with where it was measured."""
    return ladder_cells(rows).markdown(["---", *["--:"] * 6])


def backward_table(rows: Sequence[Row]) -> str:
    """Forward and backward pass of one case as a Markdown table, with where it was measured."""
    return backward_cells(rows).markdown(["---", *["--:"] * 5])


def cases_table(rows_of_cases: Sequence[Sequence[Row]]) -> str:
    """`auto` against PyTorch on the named cases, as a Markdown table with its sum in words.

    Cases that have no name of their own, such as another batch, are left out.
    """
    return cases_cells(rows_of_cases).markdown(["---", *["--:"] * 4, "---", *["--:"] * 2])


def ladder_cells(rows: Sequence[Row]) -> Table:
    """The same as cells."""
    numbers = {
        "error": ("error", 1, ".1e"),
        "launches": ("launches", 1, ".0f"),
        "MB by ledger": ("ledger_bytes", 1e-6, ".0f"),
    }
    return _variant_cells(rows, "Medians", numbers)


def backward_cells(rows: Sequence[Row]) -> Table:
    """The same as cells."""
    numbers = {
        "gradient error": ("gradient_error", 1, ".1e"),
        "peak extra MB": ("peak_extra_bytes", 1e-6, ".0f"),
    }
    return _variant_cells(rows, "Forward and backward pass together, medians", numbers)


# Of a row: its column, what to multiply it with, format.
Number: TypeAlias = tuple[str, float, str]


def _variant_cells(rows: Sequence[Row], what: str, numbers: Mapping[str, Number]) -> Table:
    """A line a variant: its time, beside PyTorch's, and more numbers by their headings."""
    first = rows[0]
    note = (
        f"Case {first['case']}: x {first['x_shape']}, weight {first['weight_shape']}, "
        f"{first['num_groups']} groups, {arithmetic(first)}, dropout {first['dropout_p']:g}, "
        f"non-degenerate bounds. {what} on one {first['gpu']}, torch {first['torch']}, "
        f"numba-cuda {first['numba_cuda']}, {str(first['utc'])[:10]}. "
        f"The {first['compulsory_bytes'] / 1e6:.0f} MB that must be moved take "
        f"{first['floor_ms']:.3f} ms at the rate of a copy."
    )
    lines = [_variant_line(row, rows, list(numbers.values())) for row in rows]
    return Table(("variant", "ms", "x eager", "x compile", *numbers), lines, note)


def _variant_line(row: Row, rows: Sequence[Row], numbers: Sequence[Number]) -> tuple[str, ...]:
    if row["status"] != "ok":
        return (label(row), f"{row['status']}: {row['reason']}", "", "", *[""] * len(numbers))
    return (
        label(row),
        f"{row['p50_ms']:.3g}",
        _cell(times_faster(row, rows, EAGER), ".2f"),
        _cell(times_faster(row, rows, COMPILED), ".2f"),
        *(_cell(row[column], form, factor) for column, factor, form in numbers),
    )


def cases_cells(rows_of_cases: Sequence[Sequence[Row]]) -> Table:
    """The same as cells."""
    named = {rows[0]["case"]: rows for rows in rows_of_cases}
    chosen = [named[name] for name in bench.CASES if name in named]
    comparisons = [compare(rows) for rows in chosen]
    means = [
        _cell(_geometric_mean([getattr(c, ratio) for c in comparisons]), ".2f")
        for ratio in ("times_eager", "times_best")
    ]
    first = chosen[0][0]
    times = ("floor ms", "eager ms", "compile ms", "auto ms")
    return Table(
        ("case", *times, "runs", "x eager", "x faster of both"),
        [*map(_case_line, comparisons), ("geometric mean", *[""] * 5, *means)],
        f"{arithmetic(first)}, one {first['gpu']}, torch {first['torch']}, "
        f"numba-cuda {first['numba_cuda']}, {str(first['utc'])[:10]}: {verdict(comparisons)}.",
    )


def _case_line(comparison: Comparison) -> tuple[str, ...]:
    c = comparison
    times = (c.floor_ms, c.eager_ms, c.compile_ms, c.auto_ms)
    ratios = (c.times_eager, c.times_best)
    return (c.case, *(_cell(t, ".3g") for t in times), c.runs, *(_cell(r, ".2f") for r in ratios))


def _geometric_mean(ratios: Sequence[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [ratio for ratio in ratios if ratio]
    return statistics.geometric_mean(known) if known else None


def markers(table: str) -> tuple[str, str]:
    """What stands before and after a table in the README."""
    return f"<!-- {table}:begin -->", f"<!-- {table}:end -->"


def update_readme(path: str | Path, tables: Mapping[str, str]) -> bool:
    """Put tables, by name, between their markers in a README; whether that changed the file.

    Tables whose markers the README lacks are left out of it.

    Raises
    ------
    ValueError
        It has the markers of no table.
    """
    path = Path(path)
    text = new = path.read_text()
    places = {name: markers(name) for name in tables if all(m in text for m in markers(name))}
    if not places:
        raise ValueError(f"{path} lacks the markers {' and '.join(markers(next(iter(tables))))}")
    for name, (begin, end) in places.items():
        head, _, rest = new.partition(begin)
        new = f"{head}{begin}\n{tables[name]}\n{end}{rest.partition(end)[2]}"
    path.write_text(new)
    return new != text


def _cell(value: float | None, form: str, factor: float = 1) -> str:
    return "" if value is None else f"{value * factor:{form}}"
