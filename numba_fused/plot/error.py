"""How far each variant is from fp64, beside what it may be."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from numba_fused import results
from numba_fused.plot.rows import NotMeasuredError
from numba_fused.plot.style import BLUE, VERMILION, legend_below, new_figure, styled
from numba_fused.results import Row

PRECISION_MARKS = {"ieee": (BLUE, "o", "full"), "tf32": (VERMILION, "D", "none")}


@styled
def error_figure(rows: Sequence[Row]) -> Figure:
    """Relative error of every variant of one case against fp64, at both precisions.

    Parameters
    ----------
    rows : sequence of dict
        Of one case, of one or both precisions.

    Raises
    ------
    NotMeasuredError
        No row has an error.
    """
    shown = [row for row in rows if row["error"]]
    if not shown:
        raise NotMeasuredError("no row has an error")
    there = {row["variant"] for row in shown}
    variants = [variant for variant in results.variants() if variant in there]
    figure = new_figure(2.4 + 0.42 * len(variants))
    ax = figure.subplots()
    # The two precisions a little apart, so that neither hides the other.
    offsets = {"ieee": -0.14, "tf32": 0.14}
    for row in shown:
        colour, marker, fill = PRECISION_MARKS[row["precision"]]
        place = variants.index(row["variant"]) + offsets[row["precision"]]
        ax.plot(
            [row["error"]],
            [place],
            marker,
            color=colour,
            fillstyle=fill,
            markersize=9,
            markeredgewidth=2,
            label=row["precision"],
        )
        if row["error_bound"]:
            ax.plot([row["error_bound"]], [place], "k|", ms=13, mew=2, label="largest that passes")
    ax.set_yticks(range(len(variants)), variants)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("relative L2 error against fp64 (log scale)")
    first = shown[0]
    figure.suptitle(f"{first['case']}: {first['x_shape']}, {first['dtype']}, {first['gpu']}")
    legend_below(figure, 3)
    return figure
