"""What all figures share: size, type, colours, scales, and files that are the same every time.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; no figure relies on them
alone. A figure is as wide as a page and can be read at half that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from numba_fused.results import AUTO, COMPILED, EAGER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

BLUE, SKY, ORANGE, GREEN, VERMILION = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00"
PURPLE, GREY = "#CC79A7", "#595959"
BASELINES = {EAGER: ("PyTorch eager", ORANGE), COMPILED: ("torch.compile", GREEN)}
# Colour and marker of a line: the baselines, auto, and whatever else is drawn, in this order.
MARKS = {EAGER: (ORANGE, "s"), COMPILED: (GREEN, "^"), AUTO: (BLUE, "o")}
OTHER_MARKS = ((PURPLE, "D"), (SKY, "v"), (GREY, "X"))
WIDTH = 7.2  # inches
STYLE: dict[Any, Any] = {
    "font.size": 14,  # 7 points at half width
    "figure.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 13,
    "savefig.dpi": 150,
    "svg.hashsalt": "numba_fused",
    "svg.fonttype": "none",
}
# Metadata that would change from day to day or from machine to machine.
UNDATED: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
}


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let `draw` see matplotlib with `STYLE`, and leave matplotlib as it was."""

    @functools.wraps(draw)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(height: float) -> Figure:
    """An empty figure of the common width; `height` in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


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


def plain_log(axis: Axis, *, base: int = 10) -> None:
    """Make a log axis say 0.1, 1, 10 (or 1, 2, 4) instead of powers; its limits must be set."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if base == 10 and high < 100 * low else (1,)
    axis.set_major_locator(LogLocator(base=base, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, columns: int, **options: Any) -> None:
    """One legend for all axes, under the figure, each label once."""
    found = {}
    for ax in figure.axes:
        handles, labels = ax.get_legend_handles_labels()
        found |= {
            label: handle
            for handle, label in zip(handles, labels, strict=True)
            if label not in found
        }
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, **options
    )


def write_beside(ax: Axes, text: str, x: float, y: float) -> None:
    """Write a number right of the end of a bar, legible where a line runs through it."""
    ax.annotate(
        text,
        (x, y),
        (7, 0),
        textcoords="offset points",
        va="center",
        fontsize=13,
        bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
    )


# ---- names beside points ----------------------------------------------------------------------


class Named(NamedTuple):
    """A point and what is to stand beside it."""

    x: float
    y: float
    text: str
    colour: str


def name_at_right(ax: Axes, points: Sequence[Named], heading: str, *, gap: float) -> None:
    """Write the names of points in a column right of the axes, none upon another.

    The limits of the axes must be what they will be. `gap` is the least distance between two
    names, as a share of the height.
    """
    place = {"xycoords": "axes fraction", "va": "bottom", "fontsize": 12.5, "style": "italic"}
    ax.annotate(heading, (1.05, 1.02), **place)
    to_share = ax.transData + ax.transAxes.inverted()
    ordered = sorted(points, key=lambda point: point.y)
    heights = spread([float(to_share.transform((p.x, p.y))[1]) for p in ordered], gap)
    for point, height in zip(ordered, heights, strict=True):
        ax.annotate(
            point.text,
            (point.x, point.y),
            (1.05, height),
            textcoords="axes fraction",
            va="center",
            fontsize=12.5,
            arrowprops={
                "arrowstyle": "-",
                "color": point.colour,
                "lw": 1,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),  # from the start of the text, never across it
            },
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, and below 1 unless there are too many."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    ceiling = max(0.98, gap * (len(moved) - 1))
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], ceiling)
        ceiling = moved[index] - gap
    return moved
