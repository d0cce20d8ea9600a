"""Figures and tables from rows alone: nothing here needs a GPU.

One figure a file. `catalogue` says what there is, which rows each takes and how to measure them;
`rows` reads and chooses rows; `style` is what all figures share; `readme` makes the README's
tables. A figure is the same bytes every time, so that it changes in git only when its rows do.
"""

from numba_fused.plot.catalogue import Drawing, Plot, catalogue, choose, draw, save_drawing
from numba_fused.plot.error import error_figure
from numba_fused.plot.heatmap import speedup_heatmap, threads_heatmap
from numba_fused.plot.ladder import ladder_figure
from numba_fused.plot.mask import mask_figure
from numba_fused.plot.memory import memory_figure
from numba_fused.plot.readme import (
    backward_table,
    cases_table,
    ladder_table,
    markers,
    readme_tables,
    update_readme,
)
from numba_fused.plot.roofline import roofline_figure
from numba_fused.plot.rows import NotMeasuredError, Recipe, read_rows
from numba_fused.plot.scaling import scaling_figure
from numba_fused.plot.speedup import speedup_figure
from numba_fused.plot.style import check_suffix, save
from numba_fused.plot.traffic import traffic_bars, traffic_figure

__all__ = [
    "Drawing",
    "NotMeasuredError",
    "Plot",
    "Recipe",
    "backward_table",
    "cases_table",
    "catalogue",
    "check_suffix",
    "choose",
    "draw",
    "error_figure",
    "ladder_figure",
    "ladder_table",
    "markers",
    "mask_figure",
    "memory_figure",
    "read_rows",
    "readme_tables",
    "roofline_figure",
    "save",
    "save_drawing",
    "scaling_figure",
    "speedup_figure",
    "speedup_heatmap",
    "threads_heatmap",
    "traffic_bars",
    "traffic_figure",
    "update_readme",
]
