"""auto and torch.compile against eager PyTorch, shape by shape."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.plot.rows import NotMeasuredError, arithmetic
from numba_fused.plot.style import (
    BLUE,
    GREEN,
    ORANGE,
    legend_below,
    new_figure,
    plain_log,
    styled,
    write_beside,
)
from numba_fused.results import Comparison, Row, compare

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def speedup_figure(rows: Sequence[Row]) -> Figure:
    """A line for each case: how many times faster than eager auto and torch.compile are.

    Parameters
    ----------
    rows : sequence of dict
        Of one precision and of named cases.

    Raises
    ------
    NotMeasuredError
        No case has times of auto and of eager PyTorch.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    named = [cases[name] for name in bench.CASES if name in cases]
    shown = [c for c in map(compare, named) if c.times_eager]
    if not shown:
        raise NotMeasuredError("no case has times of auto and of eager PyTorch")
    figure = new_figure(2.6 + 0.36 * len(shown))
    ax = figure.subplots()
    ax.axvline(1, color=ORANGE, lw=2, label="PyTorch eager")
    mean = statistics.geometric_mean(c.times_eager or 1 for c in shown)
    ax.axvline(mean, color=BLUE, ls=":", lw=2, label=f"auto, geometric mean {mean:.2f}")
    for place, comparison in enumerate(shown):
        _draw_case(ax, place, comparison)
    ax.plot([], [], "o", color=BLUE, markersize=9, label="auto")
    ax.plot([], [], "^", color=GREEN, markersize=9, label="torch.compile")
    ax.set_yticks(range(len(shown)), [c.case for c in shown])
    ax.invert_yaxis()
    ax.set_xscale("log", base=2)
    plain_log(ax.xaxis, base=2)
    ax.margins(x=0.12)
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("times faster than eager PyTorch (log scale)")
    figure.suptitle(f"{arithmetic(rows[0])}, {rows[0]['gpu']}")
    legend_below(figure, 2)
    return figure


def _draw_case(ax: Axes, place: int, comparison: Comparison) -> None:
    eager, compiled, auto = comparison.eager_ms, comparison.compile_ms, comparison.auto_ms
    if not eager or not auto:
        return
    ax.plot([1, eager / auto], [place, place], color=BLUE, lw=1.5, alpha=0.5)
    if compiled:
        ax.plot([eager / compiled], [place], "^", color=GREEN, markersize=9)
    ax.plot([eager / auto], [place], "o", color=BLUE, markersize=9)
    write_beside(ax, f"{eager / auto:.2f}", eager / auto, place)
