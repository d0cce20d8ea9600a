"""Device memory a call holds besides its inputs and its output."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.plot.rows import NotMeasuredError, heading
from numba_fused.plot.style import (
    BASELINES,
    BLUE,
    VERMILION,
    legend_below,
    new_figure,
    styled,
    write_beside,
)
from numba_fused.plot.traffic import byte_unit
from numba_fused.results import Row, label


@styled
def memory_figure(rows: Sequence[Row]) -> Figure:
    """Bars of the most extra memory of every variant of one case.

    Parameters
    ----------
    rows : sequence of dict
        Of one case and precision, one row a variant.

    Raises
    ------
    NotMeasuredError
        No row has a ``peak_extra_bytes``.
    """
    shown = [row for row in rows if row["peak_extra_bytes"] is not None]
    if not shown:
        raise NotMeasuredError("no row has a peak_extra_bytes")
    first = shown[0]
    output = bench.case_spec(first["case"], first["precision"]).output_bytes
    scale, unit = byte_unit(max(output, *(row["peak_extra_bytes"] for row in shown)))
    figure = new_figure(2.4 + 0.42 * len(shown))
    ax = figure.subplots()
    for place, row in enumerate(shown):
        extra = row["peak_extra_bytes"] / scale
        ax.barh(place, extra, color=BASELINES.get(row["variant"], ("", BLUE))[1])
        write_beside(ax, f"{extra:.3g}", extra, place)
    ax.axvline(output / scale, color=VERMILION, ls="--", lw=2, label="size of the output")
    ax.set_yticks(range(len(shown)), [label(row) for row in shown])
    ax.invert_yaxis()
    ax.set_xlim(0, None)
    ax.margins(x=0.12)
    ax.set_xlabel(f"most memory besides inputs and output ({unit})")
    figure.suptitle(heading(first))
    legend_below(figure, 1)
    return figure
