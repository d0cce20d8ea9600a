"""Two files of rows beside each other: what became faster, and by more than the spread."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from numba_fused import results
from numba_fused.results import Key, Row

# What may explain a difference, besides the code.
CIRCUMSTANCES = ("gpu", "driver", "torch", "numba_cuda", "commit")


@dataclass(frozen=True)
class Pair:
    """One measurement in both files.

    Attributes
    ----------
    key : Key
    a_ms, b_ms : float or None
        Median GPU time of a call, milliseconds; None where there is no valid one.
    ratio : float or None
        ``a_ms / b_ms``: how many times faster B is.
    low, high : float or None
        The same from A's 20th and B's 80th percentile, and the other way round.
    note : str
        Why there is no ratio.
    only_in : str
        ``"A"`` or ``"B"`` where the other file has no such row.
    """

    key: Key
    a_ms: float | None = None
    b_ms: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    only_in: str = ""

    @property
    def name(self) -> str:
        """The variant, and whether its backward pass is in the time."""
        return f"{self.key.variant}{' + backward' * self.key.backward}"

    @property
    def differs(self) -> bool:
        """Whether the difference is larger than both spreads together."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for ``json.dumps``."""
        measured = {name: value for name, value in vars(self).items() if name != "key"}
        return {**self.key._asdict(), **measured, "differs": self.differs}


def compare(a: pd.DataFrame, b: pd.DataFrame) -> list[Pair]:
    """Every measurement of either file, in A's order, then what only B has.

    Parameters
    ----------
    a, b : pandas.DataFrame
        From `results.read`; the newest row of a key counts.

    Raises
    ------
    ValueError
        A file holds rows of more than one GPU, or the files have no measurement in common.
    """
    ours, theirs = _by_key(a, "A"), _by_key(b, "B")
    if not ours.keys() & theirs.keys():
        raise ValueError(
            "the files have no measurement in common: the same case, variant, precision, "
            "threads_per_block and backward"
        )
    return [_pair(key, ours.get(key), theirs.get(key)) for key in {**ours, **theirs}]


def circumstances(frame: pd.DataFrame) -> dict[str, str]:
    """Where and with what a file's rows were measured."""
    return {
        name: ", ".join(str(value) for value in frame[name].dropna().unique())
        for name in CIRCUMSTANCES
    }


def by_variant(pairs: Sequence[Pair]) -> dict[str, tuple[int, float, float, float]]:
    """Of each variant: how many ratios, their geometric mean, the least and the greatest.

    A variant with its backward pass is another one.
    """
    found: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.ratio is not None:
            found.setdefault(pair.name, []).append(pair.ratio)
    return {
        variant: (len(ratios), statistics.geometric_mean(ratios), min(ratios), max(ratios))
        for variant, ratios in found.items()
    }


def _by_key(frame: pd.DataFrame, name: str) -> dict[Key, Row]:
    gpus = frame["gpu"].dropna().unique()
    if len(gpus) > 1:
        raise ValueError(f"file {name} has rows of {' and '.join(gpus)}: keep one GPU's in a file")
    return {results.key(row): row for row in frame.to_dict("records")}


def _pair(key: Key, a: Row | None, b: Row | None) -> Pair:
    a_ms, b_ms = (row["p50_ms"] if row and row["status"] == "ok" else None for row in (a, b))
    if a is None or b is None:
        return Pair(key, a_ms, b_ms, only_in="A" if b is None else "B")
    if a_ms is None or b_ms is None:
        unfit = ((name, row["status"]) for name, row in (("A", a), ("B", b)))
        note = "; ".join(f"{status} in {name}" for name, status in unfit if status != "ok")
        return Pair(key, a_ms, b_ms, note=note)
    low, high = a["p20_ms"] / b["p80_ms"], a["p80_ms"] / b["p20_ms"]
    return Pair(key, a_ms, b_ms, a_ms / b_ms, low, high)
