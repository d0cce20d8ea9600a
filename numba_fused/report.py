"""The whole story of the measured rows as one HTML page that opens from disk.

Figures are part of the page, nothing is fetched, and the same rows give the same bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from numba_fused import bench, plot, results
from numba_fused.plot.readme import Table, any_auto, backward_cells, cases_cells, ladder_cells
from numba_fused.plot.rows import PRECISIONS, by_case, of_case, timed
from numba_fused.plot.style import STYLE, UNDATED
from numba_fused.results import Row, label, times_faster, verdict

TEMPLATE = Path(__file__).with_name("report.html.j2")
MADE_WITH = ("gpu", "driver", "cuda", "python", "torch", "numba", "numba_cuda", "numpy", "commit")
# Of a figure's rows: heading, column, what to multiply it with, format.
NUMBERS = (
    ("threads", "threads_per_block", 1, ".0f"),
    ("ms", "p50_ms", 1, ".4g"),
    ("20 %", "p20_ms", 1, ".4g"),
    ("80 %", "p80_ms", 1, ".4g"),
    ("host us", "host_us", 1, ".0f"),
    ("error", "error", 1, ".1e"),
    ("gradient error", "gradient_error", 1, ".1e"),
    ("extra MB", "peak_extra_bytes", 1e-6, ".1f"),
)


@dataclass(frozen=True)
class Section:
    """One figure on the page.

    Attributes
    ----------
    name, title, about : str
        Of the figure, as in the catalogue.
    image : str
        Data URI of the figure as SVG; empty if there are no rows to draw.
    why : str
        Why there is no figure.
    lacks : str
        Which rows are missing and how to measure them.
    commands : list of str
        How to measure the rows and how to draw the figure.
    rows : Table
    """

    name: str
    title: str
    about: str
    image: str
    why: str
    lacks: str
    commands: list[str]
    rows: Table


def report(frame: pd.DataFrame, case: str = "kb83", options: str = "") -> str:
    """The page.

    Parameters
    ----------
    frame : pandas.DataFrame
        Rows, from `plot.read_rows`.
    case : str
        The case of the figures and tables that are of one case.
    options : str
        What the command line was told besides, to be repeated in the commands on the page.

    Returns
    -------
    str
        HTML, complete in itself.

    Raises
    ------
    RuntimeError
        Jinja is not installed.
    """
    jinja2 = _jinja()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(
        case=case,
        options=options,
        summary=summary(frame, case),
        tables=_tables(frame, case),
        sections=[section(plot.draw(one, frame), options) for one in plot.catalogue(case)],
        provenance=provenance(frame),
    )


def summary(frame: pd.DataFrame, case: str) -> list[str]:
    """What the rows say, in a sentence or two for each precision."""
    said = []
    for precision in PRECISIONS:
        found = by_case(frame, precision)
        if fastest := _fastest(found.get(case, [])):
            said.append(f"{precision}: {fastest}")
        if any_auto(found):
            named = [rows for name, rows in found.items() if name in bench.CASES]
            said.append(f"{precision}: {verdict([results.compare(rows) for rows in named])}.")
    return said


def section(drawing: plot.Drawing, options: str = "") -> Section:
    """What the page says of one figure."""
    one, recipe = drawing.plot, drawing.recipe
    return Section(
        name=one.name,
        title=one.title,
        about=one.about,
        image=data_uri(drawing.figure) if drawing.figure else "",
        why=drawing.why,
        lacks=drawing.lacks,
        commands=[*([recipe.command] if recipe else []), f"numba-fused plot {one.name}{options}"],
        rows=row_cells(drawing.rows),
    )


def data_uri(figure: Figure) -> str:
    """A figure as the address of an image that holds it."""
    written = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(written, format="svg", metadata=UNDATED[".svg"])
    return f"data:image/svg+xml;base64,{base64.b64encode(written.getvalue()).decode()}"


def row_cells(rows: Sequence[Row]) -> Table:
    """The rows behind a figure, without the columns that all of them have empty."""
    numbers = [n for n in NUMBERS if any(row[n[1]] is not None for row in rows)]
    lines = []
    for row in rows:
        cells = [
            "" if row[column] is None else f"{row[column] * factor:{form}}"
            for _, column, factor, form in numbers
        ]
        status = row["status"] if not row["reason"] else f"{row['status']}: {row['reason']}"
        lines.append((row["case"], label(row), row["precision"], *cells, status))
    headings = ("case", "variant", "precision", *(heading for heading, *_ in numbers), "status")
    return Table(headings, lines, "")


def provenance(frame: pd.DataFrame) -> Table:
    """With what the rows were made: a line for each combination, with its times and its rows."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in frame.to_dict("records"):
        made_with = tuple("" if pd.isna(row[name]) else str(row[name]) for name in MADE_WITH)
        found.setdefault(made_with, []).append(str(row["utc"]))
    lines = [(*made_with, min(utc), max(utc), str(len(utc))) for made_with, utc in found.items()]
    headings = (*(name.replace("_", "-") for name in MADE_WITH), "from (UTC)", "to (UTC)", "rows")
    return Table(headings, lines, "")


def _tables(frame: pd.DataFrame, case: str) -> list[tuple[str, Table]]:
    """The README's tables, with a heading each."""
    tables = []
    for precision in PRECISIONS:
        found = by_case(frame, precision)
        if case in found:
            tables.append((f"Ladder, {precision}", ladder_cells(found[case])))
        if any_auto(found):
            tables.append((f"Named cases, {precision}", cases_cells(list(found.values()))))
        if both_passes := of_case(frame, case, [precision], backward=True):
            tables.append((f"Forward and backward, {precision}", backward_cells(both_passes)))
    return tables


def _fastest(rows: Sequence[Row]) -> str:
    """A sentence on the fastest variant of a case; empty if none has a time."""
    if not (shown := timed(rows)):
        return ""
    best = min(shown, key=lambda row: row["p50_ms"])
    floor, milliseconds = best["floor_ms"], best["p50_ms"]
    ratio = times_faster(best, rows, results.EAGER)
    beside = f", {ratio:.2f} times faster than eager PyTorch" if ratio else ""
    return (
        f"the fastest on {best['case']} is {label(best)} with {milliseconds:.3g} ms{beside}; the "
        f"memory floor is {floor:.3g} ms, {100 * floor / milliseconds:.0f} % of that."
    )


def _jinja() -> Any:
    try:
        import jinja2
    except ImportError:
        raise RuntimeError("the report needs Jinja: pip install 'numba_fused[report]'") from None
    return jinja2
