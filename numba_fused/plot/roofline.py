"""How close each variant is to what the machine can do with the bytes it moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.explain import H200, MEASURED
from numba_fused.plot.rows import NotMeasuredError, heading, timed
from numba_fused.plot.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    Named,
    legend_below,
    name_at_right,
    new_figure,
    plain_log,
    styled,
)
from numba_fused.results import EAGER, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# FLOP/s, measured: an FFMA kernel, and products of 8192 x 8192 matrices on the tensor cores.
ARITHMETIC = {
    H200: {
        "fp32 units": MEASURED[H200][1],
        "TF32 tensor cores": 385e12,
        "16-bit tensor cores": 770e12,
    }
}
LINES = ((GREY, "-"), (PURPLE, "-."), (GREEN, ":"))


@styled
def roofline_figure(rows: Sequence[Row]) -> Figure:
    """FLOP/s over FLOP per byte of the ledger, under the measured ceilings of the GPU.

    Parameters
    ----------
    rows : sequence of dict
        Of one case and precision, one row a variant.

    Raises
    ------
    NotMeasuredError
        No variant with a ledger has a time.
    """
    shown = [row for row in timed(rows) if row["ledger_bytes"] and row["copy_gb_per_s"]]
    if not shown:
        raise NotMeasuredError("no variant with a ledger has a time")
    first = shown[0]
    flops = bench.case_spec(first["case"], first["precision"]).flops
    points = [
        (row["variant"], flops / row["ledger_bytes"], flops / row["p50_ms"] / 1e9) for row in shown
    ]
    least = flops / first["compulsory_bytes"]
    figure = new_figure(6.2)
    ax = figure.subplots()
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(0.6 * min(x for _, x, _ in points), 2.5 * least)
    _draw_ceilings(ax, first)
    ax.axvline(least, color="black", lw=1, ls=":", label="compulsory bytes")
    ax.set_ylim(0.5 * min(y for _, _, y in points), None)
    names = []
    for variant, x, y in points:
        colour = ORANGE if variant == EAGER else BLUE
        ax.plot([x], [y], "o", color=colour, markersize=9, markeredgecolor="white")
        names.append(Named(x, y, f"{variant}, {y:.3g}", colour))
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    ax.grid(alpha=0.3)
    ax.set_xlabel("FLOP per byte of the ledger (log scale)")
    ax.set_ylabel("TFLOP/s (log scale)")
    figure.suptitle(heading(first))
    name_at_right(ax, names, "variant, TFLOP/s", gap=0.062)
    legend_below(figure, 2)
    return figure


def _draw_ceilings(ax: Axes, row: Row) -> None:
    """Memory as these rows measured it, arithmetic as it was measured once on this GPU."""
    left, right = ax.get_xlim()
    xs = np.geomspace(left, right, 50)
    bandwidth = row["copy_gb_per_s"] / 1e3
    ax.plot(
        xs, bandwidth * xs, color=VERMILION, ls="--", lw=2, label=f"memory at {bandwidth:.3g} TB/s"
    )
    known = ARITHMETIC.get(row["gpu"], {})
    for (name, rate), (colour, line) in zip(known.items(), LINES, strict=False):
        ax.axhline(rate / 1e12, color=colour, ls=line, lw=2, label=f"{name}, {rate / 1e12:.0f}")
