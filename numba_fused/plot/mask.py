"""Whether the dropout mask keeps the share it should: overall, and at each place of a stream."""

from __future__ import annotations

import functools
import math

import numpy as np
from matplotlib.figure import Figure

from numba_fused import rng
from numba_fused.plot.style import BLUE, SKY, legend_below, new_figure, styled

PROBABILITIES = (0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99)
SEEDS = 12  # for each probability
STREAM = 16  # draws of one stream: a run of the last axis
ELEMENTS = 2**17  # of a mask
CASE_P = 0.2  # the benchmark's


@styled
def mask_figure() -> Figure:
    """Deviation of the keep rate from 1 - p, in standard errors: by p, and by place in a stream.

    The masks are those of `rng.keep_mask`, which are the kernels' to the bit; no GPU is needed.
    """
    figure = new_figure(6.6)
    upper, lower = figure.subplots(2, 1, sharey=True)
    by_p, by_place = deviations()
    for ax in (upper, lower):
        ax.axhspan(-2, 2, color=SKY, alpha=0.35, lw=0, label="95 % of fair masks")
        ax.axhline(0, color="black", lw=1)
        ax.set_ylim(-4.5, 4.5)
        ax.set_ylabel("deviation\n(standard errors)")
    places = np.repeat(np.arange(len(PROBABILITIES)), SEEDS)
    upper.plot(places, by_p.ravel(), "o", color=BLUE, alpha=0.6, label="one seed")
    upper.set_xticks(range(len(PROBABILITIES)), [f"{p:g}" for p in PROBABILITIES])
    upper.set_xlabel(f"p, probability of a drop ({ELEMENTS:,} elements a seed)")
    lower.plot(np.repeat(np.arange(STREAM), SEEDS), by_place.T.ravel(), "o", color=BLUE, alpha=0.6)
    lower.set_xticks(range(STREAM))
    lower.set_xlabel(f"position in a stream of {STREAM} draws (p = {CASE_P:g})")
    figure.suptitle("keep rate of the dropout mask, less 1 - p")
    legend_below(figure, 2)
    return figure


@functools.cache
def deviations() -> tuple[np.ndarray, np.ndarray]:
    """In standard errors: by (p, seed), and for `CASE_P` by (seed, place in a stream)."""
    by_p = [
        [_deviation(_mask(SEEDS * index + seed, p), p) for seed in range(SEEDS)]
        for index, p in enumerate(PROBABILITIES)
    ]
    by_place = [
        [_deviation(column, CASE_P) for column in _mask(1000 + seed, CASE_P).T]
        for seed in range(SEEDS)
    ]
    return np.array(by_p), np.array(by_place)


def _mask(seed: int, p: float) -> np.ndarray:
    """Lines are streams."""
    return rng.keep_mask(seed, (1, ELEMENTS // STREAM, STREAM), p)[0]


def _deviation(keep: np.ndarray, p: float) -> float:
    return float((keep.mean() - (1 - p)) / math.sqrt(p * (1 - p) / keep.size))
