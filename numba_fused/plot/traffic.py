"""What each rung moves: bars of bytes read and written, beside those that must be moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from numba_fused.plot.style import BLUE, SKY, VERMILION, WIDTH, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
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
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(figsize=(WIDTH, _height(names)), layout="constrained")[1]
    scale, unit = byte_unit(
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
    ax.figure.legend(loc="outside upper center", ncols=4, columnspacing=1.2)
    return ax


@styled
def traffic_figure(
    names: Sequence[str],
    bytes_read: Sequence[int],
    bytes_written: Sequence[int],
    *,
    compulsory: int,
    counted: Sequence[int | None] | None = None,
) -> Figure:
    """`traffic_bars` as a figure of its own, for `save`."""
    figure = new_figure(_height(names))
    traffic_bars(
        names,
        bytes_read,
        bytes_written,
        compulsory=compulsory,
        counted=counted,
        ax=figure.subplots(),
    )
    return figure


def byte_unit(largest: float) -> tuple[float, str]:
    """The decimal unit to give numbers of bytes up to `largest` in: its size and its name."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "bytes"


def _height(names: Sequence[str]) -> float:
    return 1.6 + 0.5 * len(names)
