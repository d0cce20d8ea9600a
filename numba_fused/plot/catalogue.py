"""All figures of measured rows: what each shows, which rows it takes, how to measure them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from numba_fused import bench
from numba_fused.plot.error import error_figure
from numba_fused.plot.heatmap import speedup_heatmap, threads_heatmap
from numba_fused.plot.ladder import ladder_figure
from numba_fused.plot.mask import mask_figure
from numba_fused.plot.memory import memory_figure
from numba_fused.plot.roofline import roofline_figure
from numba_fused.plot.rows import (
    PRECISIONS,
    NotMeasuredError,
    Recipe,
    all_block_sizes,
    bench_recipe,
    listed,
    of_case,
    of_cases,
    sweep_recipe,
    varies_only,
)
from numba_fused.plot.scaling import scaling_figure
from numba_fused.plot.speedup import speedup_figure
from numba_fused.plot.style import UNDATED, save
from numba_fused.results import AUTO, COMPILED, EAGER, Key, Row

COMPARED = (EAGER, COMPILED, AUTO)
# What the sweeps `channels` and `kernel` vary.
CHANNELS_BASE = "kb83-b16,plane=32,padding=same"
KERNEL_BASE = "kb83-b32,padding=same"


@dataclass(frozen=True)
class Plot:
    """One figure of the catalogue.

    Attributes
    ----------
    name : str
        What the command line and the file are called.
    title : str
    about : str
        How to read it.
    select : callable
        Its rows, of all.
    draw : callable
        The figure, of its rows; raises `NotMeasuredError` where they do not suffice.
    recipe : callable
        How to measure its rows; None where none are needed.
    """

    name: str
    title: str
    about: str
    select: Callable[[pd.DataFrame], list[Row]]
    draw: Callable[[Sequence[Row]], Figure]
    recipe: Callable[[], Recipe] | None


@dataclass(frozen=True)
class Drawing:
    """What came of a figure.

    Attributes
    ----------
    plot : Plot
    rows : list of dict
        What it was made of.
    figure : matplotlib.figure.Figure or None
    why : str
        Why there is no figure.
    recipe : Recipe or None
    missing : list of Key
        What it would also show, had it been measured.
    """

    plot: Plot
    rows: list[Row]
    figure: Figure | None
    why: str
    recipe: Recipe | None
    missing: list[Key]

    def files(self, folder: Path) -> list[Path]:
        """Where it is saved; nowhere without a figure."""
        return [folder / f"{self.plot.name}{suffix}" for suffix in UNDATED if self.figure]

    def to_dict(self, folder: Path) -> dict[str, Any]:
        """What came of it as plain data, for ``json.dumps``."""
        return {
            "figure": self.plot.name,
            "files": [str(file) for file in self.files(folder)],
            "why": self.why,
            "missing": [key._asdict() for key in self.missing],
            "measure": self.recipe.command if self.recipe else "",
        }

    @property
    def lacks(self) -> str:
        """The missing rows in words, and how to measure them; empty if none is missing."""
        if self.recipe is None or not (self.missing or self.why):
            return ""
        rows = f"{len(self.missing)} rows are missing ({listed(self.missing)}). "
        return f"{rows if self.missing else ''}Measure on a GPU: {self.recipe.command}"


def catalogue(case: str = "kb83") -> tuple[Plot, ...]:
    """Every figure; those of a single case are of `case`.

    Raises
    ------
    ValueError
        No case has that name.
    """
    bench.case(case)
    return (*_of_one_case(case), *_of_many_cases(), MASK)


def choose(names: Sequence[str], case: str = "kb83") -> list[Plot]:
    """The figures of these names; all without any.

    Raises
    ------
    ValueError
        There is no such figure; the message names those there are.
    """
    known = {plot.name: plot for plot in catalogue(case)}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown figure {name!r}: use some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names or known)]


def draw(plot: Plot, frame: pd.DataFrame) -> Drawing:
    """Make a figure, or say what it lacks."""
    rows = plot.select(frame)
    recipe = plot.recipe() if plot.recipe else None
    missing = recipe.missing(frame) if recipe else []
    try:
        figure, why = plot.draw(rows), ""
    except NotMeasuredError as problem:
        figure, why = None, str(problem)
    return Drawing(plot, rows, figure, why, recipe, missing)


def save_drawing(drawing: Drawing, folder: Path) -> None:
    """Write a figure into a folder, as PNG and as SVG; nothing if there is none."""
    if drawing.figure:
        for file in drawing.files(folder):
            save(drawing.figure, file)


def _of_one_case(case: str) -> list[Plot]:
    def plot(
        name: str,
        title: str,
        about: str,
        figure: Callable[[Sequence[Row]], Figure],
        precisions: Sequence[str] = ("ieee",),
        variants: Sequence[str] = (),
        *,
        backward: bool = False,
    ) -> Plot:
        select = partial(of_case, case=case, precisions=precisions, backward=backward)
        recipe = partial(bench_recipe, case, precisions, variants, backward=backward)
        return Plot(name, title, about, select, figure, recipe)

    how = (
        "The time of every variant that could run: medians, with the 20th and 80th percentile as a "
        "black line. The memory floor is the time of moving each input and output once, at the "
        "rate of a large copy measured in the same run; nothing can be left of it."
    )
    both = (
        " Here a call is a forward pass and the gradients of all five operands; the floor counts "
        "the gradients, too. The variant is that of the forward pass: the backward pass is the one "
        "that its call chooses."
    )
    return [
        plot("ladder", "The ladder", how, ladder_figure),
        plot("ladder-tf32", "The ladder with TF32", how, ladder_figure, ("tf32",)),
        plot(
            "backward",
            "Forward and backward",
            how + both,
            ladder_figure,
            variants=COMPARED,
            backward=True,
        ),
        plot(
            "roofline",
            "Roofline",
            "Arithmetic done in a second over arithmetic for each byte that the variant should "
            "move. A point under the slanted line is as fast as its bytes allow; a point far below "
            "it is bound by something else, most often by instructions. A point above it was "
            "served by the caches. torch.compile has no ledger, so no point.",
            roofline_figure,
        ),
        plot(
            "error",
            "Error against fp64",
            "The error of each variant on random inputs, the worse of before and after timing. A "
            "variant beyond its bound has no time anywhere here.",
            error_figure,
            PRECISIONS,
        ),
        plot(
            "memory",
            "Peak memory",
            "The most device memory one call holds besides its inputs and its output. A fused "
            "kernel needs next to none; the unfused chain holds tensors of the output's size.",
            memory_figure,
        ),
    ]


def _of_many_cases() -> list[Plot]:
    slopes = (
        "Both axes are logarithmic, and the number beside each name is the slope of its line over "
        "the upper half of the points: 1 is in proportion, less means that a fixed cost still "
        "shows. The memory floor is that of a copy."
    )

    def select(*parameters: str, base: str = "kb83") -> Callable[[pd.DataFrame], list[Row]]:
        return partial(of_cases, precision="ieee", wanted=varies_only(base, *parameters))

    return [
        Plot(
            "scaling",
            "Scaling with the batch",
            slopes,
            select("batch"),
            partial(scaling_figure, base="kb83", axis="batch", unit="samples"),
            partial(sweep_recipe, "batch"),
        ),
        Plot(
            "scaling-plane",
            "Scaling with the plane",
            slopes + " Work grows with the square of the plane's side, so 2 is in proportion here.",
            select("plane"),
            partial(scaling_figure, base="kb83", axis="plane", unit="height and width"),
            partial(sweep_recipe, "plane"),
        ),
        Plot(
            "scaling-kernel",
            "Scaling with the kernel",
            slopes + " Work grows with the cube of the kernel's side, so 3 is in proportion here.",
            select("kernel_size", base=KERNEL_BASE),
            partial(scaling_figure, base="kb83-b32", axis="kernel_size", unit="along each axis"),
            partial(sweep_recipe, "kernel"),
        ),
        Plot(
            "scaling-groups",
            "Scaling with the groups",
            "Both axes are logarithmic. The groups change neither the bytes nor the arithmetic: "
            "what they change is how many statistics there are, of how many values each.",
            select("num_groups"),
            partial(scaling_figure, base="kb83", axis="num_groups", unit="of the normalisation"),
            partial(sweep_recipe, "groups"),
        ),
        Plot(
            "speedup",
            "Speed-up by shape",
            "How many times faster than eager PyTorch auto is on each named case; left of the "
            "solid line it would be slower.",
            partial(of_cases, precision="ieee", wanted=bench.CASES.__contains__),
            speedup_figure,
            partial(sweep_recipe, "cases", COMPARED),
        ),
        Plot(
            "channels",
            "Speed-up by channels",
            "Each cell says how many times faster auto is than the faster of eager PyTorch and "
            "torch.compile, for that many channels in and out. Wide convolutions are the "
            "library's home ground.",
            select("in_channels", "out_channels", base=CHANNELS_BASE),
            partial(speedup_heatmap, x="in_channels", y="out_channels"),
            partial(sweep_recipe, "channels"),
        ),
        Plot(
            "threads",
            "Threads per block",
            "Each cell is a time relative to the same variant's best: 1 is the best block size.",
            partial(all_block_sizes, case="kb83", precision="ieee"),
            threads_heatmap,
            partial(sweep_recipe, "threads", usual_block_size=False),
        ),
    ]


MASK = Plot(
    "mask",
    "Keep rate of the dropout mask",
    "How far the share of kept elements is from 1 - p, in standard errors of a fair mask. About "
    "one point in twenty should be outside the band, and no place of a stream should lean to one "
    "side. The masks are computed here, by the mirror of the kernels' generator, and are the same "
    "to the bit.",
    lambda frame: [],
    lambda rows: mask_figure(),
    None,
)
