"""What a mistake is: some lines of a right kernel, and what somebody wrote instead.

The wrong kernel is nowhere written out. `Mistake.made` takes the source of the definition that
holds the lines, changes them, executes the result, and for a while puts it wherever the package
uses the right one. So a mistake runs on the very path the rungs run on, the diff that is shown is
the mistake itself, and a line that the right kernel no longer has is an error and not a stale copy.
"""

from __future__ import annotations

import difflib
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numba_fused import verify
from numba_fused.mistakes.naive import NaiveTest

PACKAGE = Path(__file__).parents[1]
BACKWARD = "backward"
INDENT = 4


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One way for a kernel to be wrong.

    Attributes
    ----------
    name : str
        As the command line takes it.
    wrong : str
        What is wrong, in a sentence.
    tempting : str
        Why it looks right.
    definition : function, kernel or class
        What holds the lines, on the module level of its file.
    line : str
        The right line or lines; indentation counts relative to the first.
    instead : str
        What stands there by mistake; empty if nothing does.
    runs : str
        The rung that shows it, or ``"backward"``.
    passes : NaiveTest
        A test one might write that does not see it.
    """

    name: str
    wrong: str
    tempting: str
    definition: Any
    line: str
    instead: str
    runs: str
    passes: NaiveTest

    @contextmanager
    def made(self) -> Iterator[None]:
        """Within this context the package has the mistake; not for several threads at once.

        Raises
        ------
        ValueError
            The definition does not hold the right lines exactly once.
        """
        right, wrong = self.definition, self._changed_definition()
        places = [
            (vars(module), name)
            for key, module in list(sys.modules.items())
            if key.startswith("numba_fused.")
            for name, value in vars(module).items()
            if value is right
        ]
        for scope, name in places:
            scope[name] = wrong
        try:
            yield
        finally:
            for scope, name in places:
                scope[name] = right

    def check(self, case: verify.Case) -> verify.Result:
        """The verifier's verdict on one case, by the same code that judges the rungs."""
        with self.made():
            if self.runs == BACKWARD:
                return verify.check_gradients(case)
            return verify.check(case, self.runs)

    def passes_naive_test(self) -> bool:
        """Whether the naive test really does not see it."""
        with self.made():
            return self.passes.accepts(self.runs)

    @property
    def file(self) -> Path:
        """Of the right lines, relative to the repository."""
        return Path(inspect.getfile(_python(self.definition))).relative_to(PACKAGE.parent)

    def diff(self) -> str:
        """From the right file to the wrong one, in the unified format."""
        first, right, wrong = self._sources()
        before = linecache.getlines(str(PACKAGE.parent / self.file))
        after = [*before[: first - 1], *wrong, *before[first - 1 + len(right) :]]
        names = str(self.file), f"{self.file} with {self.name}"
        return "".join(difflib.unified_diff(before, after, *names))

    def _sources(self) -> tuple[int, list[str], list[str]]:
        """The definition's first line number, its lines, and the changed lines."""
        lines, first = inspect.getsourcelines(_python(self.definition))
        source = "".join(lines)
        found = [
            (indented(self.line, depth), indented(self.instead, depth))
            for depth in range(0, 40, INDENT)
            if f"\n{source}".count("\n" + indented(self.line, depth)) == 1
        ]
        if len(found) != 1:
            raise ValueError(
                f"mistake {self.name!r} changes lines that {_python(self.definition).__name__} in "
                f"{self.file} must hold exactly once, and does not:\n{self.line}\n"
                f"Give the mistake the line as it is now."
            )
        right, wrong = found[0]
        changed = f"\n{source}".replace(f"\n{right}", f"\n{wrong}")[1:]
        return first, lines, changed.splitlines(keepends=True)

    def _changed_definition(self) -> Any:
        """The definition, executed from its changed source in the module it comes from."""
        python = _python(self.definition)
        first, _, wrong = self._sources()
        # A name of its own and the lines where they were: errors point at the mistake.
        name = f"{self.file.name} with {self.name}"
        text = ["\n"] * (first - 1) + wrong
        linecache.cache[name] = sum(map(len, text)), None, text, name
        made: dict[str, Any] = {}
        scope = vars(sys.modules[python.__module__])
        exec(compile("".join(text), name, "exec"), scope, made)
        return made[python.__name__]


def indented(text: str, depth: int) -> str:
    """Whole lines at this depth; nothing stays nothing."""
    return textwrap.indent(text + "\n", " " * depth) if text else ""


def _python(definition: Any) -> Any:
    """The function a kernel was made from, or the function or class itself."""
    return getattr(definition, "py_func", definition)
