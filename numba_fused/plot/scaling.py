"""How time grows along one axis: log-log, with the slope of every line."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.plot.rows import NotMeasuredError, arithmetic, timed
from numba_fused.plot.style import (
    MARKS,
    OTHER_MARKS,
    VERMILION,
    Named,
    name_at_right,
    new_figure,
    plain_log,
    styled,
)
from numba_fused.results import AUTO, Row

Line = list[tuple[float, float]]


@styled
def scaling_figure(rows: Sequence[Row], base: str, axis: str, unit: str) -> Figure:
    """Time over a parameter of the case: eager, torch.compile, auto and the fastest rungs.

    Parameters
    ----------
    rows : sequence of dict
        Of cases that differ in this parameter only.
    base : str
        The case they are but for it.
    axis : str
        The parameter of `bench.Case`.
    unit : str
        What the parameter counts.

    Raises
    ------
    NotMeasuredError
        No variant has times at two values of the parameter.
    """
    shown = timed(rows)
    lines = {name: line for name, line in _lines(shown, axis).items() if len(line) > 1}
    if not lines:
        raise NotMeasuredError(f"no variant has times at two values of {axis}")
    figure = new_figure(5.2)
    ax = figure.subplots()
    floor = sorted({_parameter(row, axis): row["floor_ms"] for row in shown}.items())
    ax.plot(*zip(*floor, strict=True), color=VERMILION, ls="--", lw=2)
    names = [Named(*floor[-1], f"memory floor, {slope(floor):.2f}", VERMILION)]
    others = iter(OTHER_MARKS)
    for variant in _chosen(lines):
        line = lines[variant]
        colour, marker = MARKS.get(variant) or next(others)
        zorder = 4 if variant == AUTO else 3  # auto is over the rung that it runs
        xs, ys = zip(*line, strict=True)
        ax.plot(xs, ys, color=colour, marker=marker, lw=2, markersize=7, zorder=zorder)
        names.append(Named(*line[-1], f"{variant}, {slope(line):.2f}", colour))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    plain_log(ax.xaxis, base=2)
    ax.set_xticks([x for x, _ in floor])
    plain_log(ax.yaxis)
    ax.tick_params(axis="x", labelsize=12)
    ax.grid(alpha=0.3)
    ax.set_xlabel(f"{axis} ({unit}; log scale)")
    ax.set_ylabel("GPU time of one call (ms; log scale)")
    figure.suptitle(f"{base} by {axis}, {arithmetic(shown[0])}, {shown[0]['gpu']}")
    name_at_right(ax, names, "variant, slope", gap=0.075)
    return figure


def slope(line: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms of the upper half of the points."""
    upper = line[-max(2, (len(line) + 1) // 2) :]
    xs, ys = ([math.log(value) for value in values] for values in zip(*upper, strict=True))
    return statistics.linear_regression(xs, ys).slope


def _lines(rows: Sequence[Row], axis: str) -> dict[str, Line]:
    """Of each variant its points in order; of two cases that are the same, the newer counts."""
    found: dict[str, dict[float, float]] = {}
    for row in sorted(rows, key=lambda row: row["utc"]):
        found.setdefault(row["variant"], {})[_parameter(row, axis)] = row["p50_ms"]
    return {variant: sorted(line.items()) for variant, line in found.items()}


def _parameter(row: Row, axis: str) -> float:
    return float(getattr(bench.case(row["case"]), axis))


def _chosen(lines: dict[str, Line]) -> list[str]:
    """The lines that tell most and can still be told apart: `MARKS`, and the fastest others."""
    # Those that reach furthest first, the fastest there before the others.
    others = sorted(lines.keys() - MARKS.keys(), key=lambda v: (-lines[v][-1][0], lines[v][-1][1]))
    return [*(name for name in MARKS if name in lines), *others[: len(OTHER_MARKS)]]
