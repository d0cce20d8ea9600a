"""Gives the verifier its random cases until it rejects a mistake, and says what gave it away."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from numba_fused.mistakes.catalogue import MISTAKES
from numba_fused.mistakes.mistake import BACKWARD, PACKAGE, Mistake
from numba_fused.verify import Case, Result, cases

SEED = 0
CASES, MAX_MACS = 6000, 3000  # drawn; those below are tried
LEAST_VALUES = 64  # in an output: enough to see a mask
LEAST_POSITIONS = 65  # in a channel's gradient: three warps, as two add in either order alike
# A simulated thread costs what some multiply-adds do.
MOST_THREADS, MOST_GRADIENT_THREADS = 512, 2500

# What a verdict's reason says, and what that means in two or three words; the first counts.
CAUGHT_BY = {
    "RaceError": "race",
    "UninitialisedReadError": "uninitialised read",
    "OutOfBoundsError": "out of bounds",
    "two runs differ": "not deterministic",
    "gradient of": "gradient wrong",
    "never written": "not written",
    "not dropped": "mask differs",
    "NaN is not": "not finite",
    "+Inf is not": "not finite",
    "-Inf is not": "not finite",
    "zero where": "wrong zeros",
    "error": "error above bound",
}


@dataclass(frozen=True)
class Verdict:
    """How a mistake fared.

    Attributes
    ----------
    mistake : Mistake
    case : Case or None
        The first that gave it away.
    tried : int
        How many it took.
    result : Result
        The verifier's, on that case.
    """

    mistake: Mistake
    case: Case | None
    tried: int
    result: Result

    @property
    def caught(self) -> bool:
        """Whether the verifier rejects it."""
        return not self.result.ok

    @property
    def caught_by(self) -> str:
        """What gave it away, in a word or two."""
        if not self.caught:
            return "nothing"
        reason = self.result.reason
        return next((what for words, what in CAUGHT_BY.items() if words in reason), "crash")

    @property
    def message(self) -> str:
        """The verifier's, with paths relative to the repository."""
        return self.result.reason.replace(f"{PACKAGE.parent}/", "")

    @property
    def summary(self) -> str:
        """The message without an error's name, without who was where, and of one line."""
        line = self.message.partition("\n")[0]
        return re.sub(r"^\w+Error: |,? in kernel .*", "", line)

    def to_dict(self) -> dict[str, Any]:
        """What a program would want to know."""
        mistake, case = self.mistake, self.case
        return {
            "name": mistake.name,
            "wrong": mistake.wrong,
            "tempting": mistake.tempting,
            "passes": mistake.passes.story,
            "runs": mistake.runs,
            "diff": mistake.diff(),
            "caught_by": self.caught_by,
            "message": self.message,
            "error": self.result.error,
            "bound": self.result.bound,
            "case": None if case is None else case.index,
            "description": None if case is None else str(case),
            "tried": self.tried,
        }


def names() -> list[str]:
    """Names of the mistakes."""
    return [mistake.name for mistake in MISTAKES]


def get(name: str) -> Mistake:
    """The mistake called `name`.

    Raises
    ------
    ValueError
        None is called that; the message names those there are.
    """
    for mistake in MISTAKES:
        if mistake.name == name:
            return mistake
    raise ValueError(f"unknown mistake {name!r}: use one of {', '.join(names())}")


@cache
def telling_cases(runs: str) -> tuple[Case, ...]:
    """Of the verifier's random cases those that show much and cost little."""
    chosen = _gradients_tell if runs == BACKWARD else _output_tells
    return tuple(filter(chosen, cases(SEED, CASES, max_macs=MAX_MACS)))


def _output_tells(case: Case) -> bool:
    threads = case.threads_per_block * case.spec.batch * case.spec.num_groups
    return math.prod(case.spec.output_shape) >= LEAST_VALUES and threads <= MOST_THREADS


def _gradients_tell(case: Case) -> bool:
    positions = math.prod(case.spec.output_size)
    threads = positions * math.prod(case.spec.weight_shape)  # a block for each weight
    return positions >= LEAST_POSITIONS and threads <= MOST_GRADIENT_THREADS


def examine(mistake: Mistake) -> Verdict:
    """Try random cases until one gives the mistake away."""
    tried = 0
    for case in telling_cases(mistake.runs):
        tried += 1
        result = mistake.check(case)
        if not result.ok:
            return Verdict(mistake, case, tried, result)
    return Verdict(mistake, None, tried, Result("ok"))
