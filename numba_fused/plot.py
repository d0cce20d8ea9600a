"""Figures from rows: what each rung moves, what each rung takes.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; files are the same bytes
every time, so that a figure changes in git only when its rows do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from numba_fused.results import Comparison, Row, compare, label, times_faster, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, SKY, ORANGE, GREEN, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00"
# Metadata that would change from day to day or from machine to machine.
UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}
BASELINES = {"torch": ("PyTorch eager", ORANGE), "torch.compile": ("torch.compile", GREEN)}
STYLE: dict[Any, Any] = {
    "font.size": 13,  # readable at half width
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.hashsalt": "numba_fused",
    "svg.fonttype": "none",
}


def traffic_bars(
    names: Sequence[str],
    bytes_read: Sequence[int],
    bytes_written: Sequence[int],
    *,
    compulsory: int,
    counted: Sequence[int | None] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw stacked bars of bytes read and written, with a line at the compulsory bytes.

    Parameters
    ----------
    names : sequence of str
        One bar each, the first on top.
    bytes_read, bytes_written : sequence of int
        Predicted bytes.
    compulsory : int
        Where the line goes.
    counted : sequence of (int or None), optional
        Counted bytes, read plus written, marked on the bars.
    ax : matplotlib.axes.Axes, optional
        A new figure if not given.

    Returns
    -------
    matplotlib.axes.Axes
    """
    with mpl.rc_context(STYLE):
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(8, 1.6 + 0.5 * len(names)), layout="constrained")[1]
        scale, unit = _unit(
            max([compulsory, *map(sum, zip(bytes_read, bytes_written, strict=True))])
        )
        read = [b / scale for b in bytes_read]
        written = [b / scale for b in bytes_written]
        places = range(len(names))
        ax.barh(places, read, color=BLUE, label="read")
        ax.barh(places, written, left=read, color=SKY, label="written")
        if counted is not None:
            marks = [(c / scale, y) for y, c in zip(places, counted, strict=True) if c is not None]
            if marks:
                ax.plot(*zip(*marks, strict=True), "kD", label="counted", markersize=7)
        ax.axvline(compulsory / scale, color=VERMILION, ls="--", lw=2, label="compulsory")
        ax.set_yticks(list(places), list(names))
        ax.invert_yaxis()
        ax.set_xlabel(f"global memory traffic of one call ({unit})")
        ax.figure.legend(loc="outside upper center", ncols=4)
    return ax


def traffic_figure(
    names: Sequence[str],
    bytes_read: Sequence[int],
    bytes_written: Sequence[int],
    *,
    compulsory: int,
    counted: Sequence[int | None] | None = None,
) -> Figure:
    """`traffic_bars` as a figure of its own, for `save`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.6 + 0.5 * len(names)), layout="constrained")
        traffic_bars(
            names,
            bytes_read,
            bytes_written,
            compulsory=compulsory,
            counted=counted,
            ax=figure.subplots(),
        )
    return figure


def ladder_figure(rows: Sequence[Row]) -> Figure:
    """Bars of the time of every variant of one case, with the floor and the baselines as lines.

    Parameters
    ----------
    rows : sequence of dict
        One row a variant, as `results.latest` gives them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        No row has a time.
    """
    timed = [row for row in rows if row["status"] == "ok" and row["p50_ms"]]
    if not timed:
        raise ValueError("no row has a time to draw: every one failed or was skipped")
    first = timed[0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.2 + 0.5 * len(timed)), layout="constrained")
        ax = figure.subplots()
        for place, row in enumerate(timed):
            _, colour = BASELINES.get(row["variant"], ("", BLUE))
            ax.barh(place, row["p50_ms"], color=colour)
            ax.plot([row["p20_ms"], row["p80_ms"]], [place, place], color="black", lw=2)
            ax.annotate(
                f"{row['p50_ms']:.3g}",
                (row["p80_ms"], place),
                (6, 0),
                textcoords="offset points",
                va="center",
            )
            if row["variant"] in BASELINES:
                name, colour = BASELINES[row["variant"]]
                ax.axvline(row["p50_ms"], color=colour, ls=":", lw=2, label=name)
        ax.axvline(first["floor_ms"], color=VERMILION, ls="--", lw=2, label="memory floor")
        ax.set_yticks(range(len(timed)), [label(row) for row in timed])
        ax.invert_yaxis()
        ax.set_xscale("log")
        ax.set_xlim(first["floor_ms"] / 1.5, 2 * max(row["p80_ms"] for row in timed))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.set_xlabel("GPU time of one call (ms, log scale)")
        title = f"{first['case']}: {first['x_shape']}, {_arithmetic(first)}, {first['gpu']}"
        ax.set_title(title, fontsize=13)
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG or SVG whose bytes depend on the figure alone.

    Raises
    ------
    ValueError
        The path ends in neither ``.png`` nor ``.svg``.
    """
    path = Path(path)
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure.savefig(path, metadata=UNDATED[path.suffix])


def check_suffix(path: Path) -> None:
    """Raise `ValueError` unless `save` knows the format."""
    if path.suffix not in UNDATED:
        raise ValueError(f"a figure is saved as .png or .svg, but got {path.name!r}")


# ---- the README's tables ----------------------------------------------------------------------


def ladder_table(rows: Sequence[Row]) -> str:
    """The ladder of one case as a Markdown table, with where it was measured."""
    first = rows[0]
    lines = [
        "| variant | ms | x eager | x compile | error | launches | MB by ledger |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["status"] != "ok":
            why = f"{row['status']}: {row['reason']}".replace("|", "\\|")
            lines.append(f"| {label(row)} | {why} | | | | | |")
            continue
        ledger = row["ledger_bytes"]
        cells = (
            label(row),
            f"{row['p50_ms']:.3g}",
            _cell(times_faster(row, rows, "torch"), ".2f"),
            _cell(times_faster(row, rows, "torch.compile"), ".2f"),
            f"{row['error']:.1e}",
            _cell(row["launches"], ".0f"),
            _cell(ledger and ledger / 1e6, ".0f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Case {first['case']}: x {first['x_shape']}, weight {first['weight_shape']}, "
        f"{first['num_groups']} groups, {_arithmetic(first)}, dropout {first['dropout_p']:g}, "
        f"non-degenerate bounds. Medians on one {first['gpu']}, torch {first['torch']}, "
        f"numba-cuda {first['numba_cuda']}, {str(first['utc'])[:10]}. "
        f"The {first['compulsory_bytes'] / 1e6:.0f} MB that must be moved take "
        f"{first['floor_ms']:.3f} ms at the rate of a copy.",
    ]
    return "\n".join(lines)


def cases_table(rows_of_cases: Sequence[Sequence[Row]]) -> str:
    """`auto` against PyTorch on every case, as a Markdown table with its sum in words."""
    comparisons = [compare(rows) for rows in rows_of_cases]
    lines = [
        "| case | floor ms | eager ms | compile ms | auto ms | runs | x eager | x faster of both |",
        "|---|--:|--:|--:|--:|---|--:|--:|",
        *map(_case_line, comparisons),
    ]
    first = rows_of_cases[0][0]
    return "\n".join(
        [
            *lines,
            "",
            f"{_arithmetic(first)}, one {first['gpu']}, torch {first['torch']}, "
            f"numba-cuda {first['numba_cuda']}, {str(first['utc'])[:10]}: {verdict(comparisons)}.",
        ]
    )


def _case_line(comparison: Comparison) -> str:
    c = comparison
    times = (c.floor_ms, c.eager_ms, c.compile_ms, c.auto_ms)
    ratios = (c.times_eager, c.times_best)
    cells = [c.case, *(_cell(t, ".3g") for t in times), c.runs, *(_cell(r, ".2f") for r in ratios)]
    return f"| {' | '.join(cells)} |"


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


def _arithmetic(row: Row) -> str:
    return f"{row['dtype']} with TF32" if row["precision"] == "tf32" else row["dtype"]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "bytes"
