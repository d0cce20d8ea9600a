"""Two axes at once: a cell for each pair of values, with its number in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.plot.rows import NotMeasuredError, arithmetic, timed
from numba_fused.plot.style import new_figure, styled
from numba_fused.results import Row, compare, label

# Both can be read by the colour-blind, and in print.
DIVERGING, SEQUENTIAL = "PuOr_r", "cividis_r"
BAR_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10, 20, 50)
Cells = Mapping[tuple[Any, Any], float]


@styled
def speedup_heatmap(rows: Sequence[Row], x: str, y: str) -> Figure:
    """How many times faster auto is than the faster of eager and torch.compile.

    Parameters
    ----------
    rows : sequence of dict
        Of cases that differ in these two parameters only.
    x, y : str
        Parameters of `bench.Case`.

    Raises
    ------
    NotMeasuredError
        No case has times of auto and of eager PyTorch.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    cells = {}
    for name, of_case in cases.items():
        if ratio := compare(of_case).times_best:
            case = bench.case(name)
            cells[getattr(case, x), getattr(case, y)] = ratio
    if not cells:
        raise NotMeasuredError("no case has times of auto and of PyTorch")
    # As far to either side of 1, which is white: neither faster nor slower.
    reach = max(1.25, *(max(ratio, 1 / ratio) for ratio in cells.values()))
    bounds = (1 / reach, reach)
    figure = _heatmap(cells, DIVERGING, bounds, "times faster (log scale; 1 is even)")
    figure.axes[0].set(xlabel=f"{x} (count)", ylabel=f"{y} (count)")
    figure.suptitle(
        f"auto against the faster of eager and compile\n{arithmetic(rows[0])}, {rows[0]['gpu']}"
    )
    return figure


@styled
def threads_heatmap(rows: Sequence[Row]) -> Figure:
    """Time by block size, relative to the variant's best.

    Parameters
    ----------
    rows : sequence of dict
        Of one case and precision.

    Raises
    ------
    NotMeasuredError
        No variant has times at two block sizes.
    """
    times: dict[str, dict[int, float]] = {}
    for row in timed(rows):
        times.setdefault(label(row), {})[int(row["threads_per_block"])] = row["p50_ms"]
    times = {variant: by_size for variant, by_size in times.items() if len(by_size) > 1}
    if not times:
        raise NotMeasuredError("no variant has times at two block sizes")
    cells = {
        (threads, variant): time / min(by_size.values())
        for variant, by_size in times.items()
        for threads, time in by_size.items()
    }
    bounds = (1.0, max(1.25, *cells.values()))
    figure = _heatmap(cells, SEQUENTIAL, bounds, "time, relative to the variant's best (log scale)")
    figure.axes[0].set(xlabel="threads per block (count)", ylabel="")
    first = rows[0]
    figure.suptitle(f"{first['case']}, {arithmetic(first)}, {first['gpu']}")
    return figure


def _heatmap(cells: Cells, colours: str, bounds: tuple[float, float], said: str) -> Figure:
    """Cells by (x, y), both ascending if they are numbers; a dash where nothing was measured."""
    columns, lines = (_levels([key[index] for key in cells]) for index in (0, 1))
    grid = np.full((len(lines), len(columns)), np.nan)
    for (x, y), value in cells.items():
        grid[lines.index(y), columns.index(x)] = value
    figure = new_figure(2.6 + 0.55 * len(lines))
    ax = figure.subplots()
    ax.set_facecolor("#e8e8e8")
    palette, (low, high) = mpl.colormaps[colours], bounds
    norm = LogNorm(low, high)
    edges = (np.arange(size + 1) - 0.5 for size in reversed(grid.shape))
    mesh = ax.pcolormesh(*edges, grid, cmap=palette, norm=norm, edgecolors="white", linewidth=1)
    for line, column in np.ndindex(grid.shape):
        value = grid[line, column]
        empty = np.isnan(value)
        colour = "black" if empty or _is_light(palette(float(norm(value)))) else "white"
        text = "–" if empty else f"{value:.3g}" if value < 100 else f"{value:.0f}"
        ax.text(column, line, text, ha="center", va="center", color=colour, fontsize=12.5)
    ax.set_xticks(range(len(columns)), [str(value) for value in columns])
    ax.set_yticks(range(len(lines)), [str(value) for value in lines])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, location="bottom", label=said, aspect=40, pad=0.02)
    ticks = [tick for tick in BAR_TICKS if low <= tick <= high]
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.minorticks_off()
    return figure


def _levels(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers in order, names as they come."""
    once = list(dict.fromkeys(values))
    return once[::-1] if any(isinstance(value, str) for value in once) else sorted(once)


def _is_light(colour: Sequence[float]) -> bool:
    red, green, blue, _ = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
