"""Draws the gallery: a table of all mistakes, or one of them in full."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from numba_fused.mistakes import catalogue
from numba_fused.mistakes.gallery import Verdict

ROOMY = 110  # columns from which on there is room for the naive tests


def table(verdicts: Sequence[Verdict], width: int) -> RenderableType:
    """Every mistake, what caught it and what the verifier said; in a wide one, what it passes."""
    roomy = width >= ROOMY
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    drawn.add_column("mistake", no_wrap=True)
    drawn.add_column("caught by", no_wrap=True)
    drawn.add_column("the verifier says", ratio=3)
    if roomy:
        drawn.add_column("and yet it passes", ratio=2)
    last_of_subject = {subject[-1].name for subject in catalogue.SUBJECTS}
    for verdict in verdicts:
        cells = [
            Text(verdict.mistake.name),
            _caught_by(verdict),
            Text(verdict.summary),
            Text(verdict.mistake.passes.story),
        ]
        end = verdict.mistake.name in last_of_subject
        drawn.add_row(*cells if roomy else cells[:3], end_section=end)
    caught = sum(verdict.caught for verdict in verdicts)
    caption = (
        f"{caught} of {len(verdicts)} caught. numba-fused mistakes NAME shows one: the lines that "
        f"are wrong, why they look right, and a test that they pass."
    )
    return Group(drawn, Text(caption))


def one(verdict: Verdict) -> RenderableType:
    """A mistake in full: explanation, diff, verdict, and the test that does not see it."""
    mistake = verdict.mistake
    facts = Table.grid(padding=(0, 2))
    facts.add_row("wrong", Text(mistake.wrong))
    facts.add_row("tempting", Text(mistake.tempting))
    facts.add_row("passes", Text(mistake.passes.story))
    facts.add_row("caught by", _caught_by(verdict))
    if verdict.case is not None:
        where = f"case {verdict.case.index} of seed {verdict.case.seed}: {verdict.case}"
        facts.add_row("in", Text(where))
    facts.add_row("message", Text(verdict.message))
    diff = Syntax(mistake.diff().rstrip(), "diff", background_color="default", word_wrap=True)
    return Group(Text(f"\n{mistake.name}\n", style="bold"), facts, Padding(diff, (1, 0, 0, 0)))


def _caught_by(verdict: Verdict) -> Text:
    return Text(verdict.caught_by, style="green" if verdict.caught else "bold red")
