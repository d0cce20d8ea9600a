"""What each rung takes: bars of time, beside PyTorch's and the memory floor."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from numba_fused.plot.rows import NotMeasuredError, heading, timed
from numba_fused.plot.style import (
    BASELINES,
    BLUE,
    VERMILION,
    legend_below,
    new_figure,
    plain_log,
    styled,
    write_beside,
)
from numba_fused.results import Row, label


@styled
def ladder_figure(rows: Sequence[Row]) -> Figure:
    """Bars of the time of every variant of one case, with the floor and the baselines as lines.

    Where the rows are of both precisions, those with TF32 say so.

    Parameters
    ----------
    rows : sequence of dict
        One row a variant, as `results.latest` gives them: all of the forward pass, or all of
        forward and backward pass together.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    NotMeasuredError
        No row has a time.
    """
    shown = timed(rows)
    if not shown:
        why = "every one failed or was skipped" if rows else "there is none"
        raise NotMeasuredError(f"no row has a time to draw: {why}")
    first = min(shown, key=lambda row: row["precision"])  # "ieee", if there is one
    mixed = len({row["precision"] for row in shown}) > 1
    figure = new_figure(2.4 + 0.45 * len(shown))
    ax = figure.subplots()
    for place, row in enumerate(shown):
        name, colour = BASELINES.get(row["variant"], ("", BLUE))
        ax.barh(place, row["p50_ms"], color=colour)
        ax.plot([row["p20_ms"], row["p80_ms"]], [place, place], color="black", lw=2)
        write_beside(ax, f"{row['p50_ms']:.3g}", row["p80_ms"], place)
        if name:
            ax.axvline(row["p50_ms"], color=colour, ls=":", lw=2, label=name)
    ax.axvline(first["floor_ms"], color=VERMILION, ls="--", lw=2, label="memory floor")
    ax.set_yticks(range(len(shown)), [_name(row, mixed) for row in shown])
    ax.invert_yaxis()
    ax.set_xscale("log")
    left = first["floor_ms"] / 1.5
    ax.set_xlim(left, 2.5 * max(row["p80_ms"] for row in shown))
    plain_log(ax.xaxis)
    ax.set_xlabel(f"GPU time of one call (ms; log scale that starts at {left:.2g})")
    figure.suptitle(heading(first))
    notes = ["forward and backward pass"] if first["backward"] else []
    notes += ["with TF32 where it says so"] if mixed else []
    ax.set_title(", ".join(notes), loc="right", fontsize=13)
    legend_below(figure, 3)
    return figure


def _name(row: Row, mixed: bool) -> str:
    """What a bar is called; of both precisions, TF32 is told apart."""
    return f"{label(row)}, TF32" if mixed and row["precision"] == "tf32" else label(row)
