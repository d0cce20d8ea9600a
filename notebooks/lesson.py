"""What the notebooks share: showing source, comparing a prediction, checking an answer."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from IPython.core.getipython import get_ipython
from IPython.display import Markdown

from numba_fused import plot
from numba_fused.plot.rows import of_case, timed
from numba_fused.results import Row, variants

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "plots" / "data"

if shell := get_ipython():
    shell.run_line_magic("matplotlib", "inline")  # shows the package's figures, too
mpl.rcParams.update(
    {
        "figure.figsize": (7.2, 3.2),
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 11,
    }
)


def show(*definitions: Any) -> Markdown:
    """The source of kernels, device functions or classes, as it stands in the package."""
    blocks = []
    for definition in definitions:
        python = inspect.unwrap(getattr(definition, "py_func", definition))
        source = textwrap.dedent(inspect.getsource(python)).rstrip()
        file = inspect.getsourcefile(python) or ""
        where = f"`{Path(file).relative_to(ROOT)}`\n\n" if Path(file).is_relative_to(ROOT) else ""
        blocks.append(f"{where}```python\n{source}\n```")
    return Markdown("\n\n".join(blocks))


def show_diff(mistake: Any) -> Markdown:
    """A mistake of the gallery as the diff from the right kernel to the wrong one."""
    lines = mistake.diff().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith(("+", "-")))
    text = "\n".join(lines[: last + 1])
    return Markdown(f"```diff\n{text}\n```")


def compare(predicted: float, found: float, unit: str = "") -> None:
    """Print a prediction beside what came out, and how far apart they are."""
    unit = f" {unit}" if unit else ""
    if predicted == found:
        verdict = "exactly"
    elif not predicted or not found:
        verdict = f"off by {_plain(abs(predicted - found))}"
    elif abs(predicted / found - 1) <= 0.1:
        verdict = "within a tenth"
    else:
        ratio = predicted / found
        factor, side = (ratio, "high") if ratio > 1 else (1 / ratio, "low")
        verdict = f"{factor:,.{1 if factor < 10 else 0}f} times too {side}"
    print(f"predicted {_plain(predicted)}{unit}, found {_plain(found)}{unit}: {verdict}")


def _plain(number: float) -> str:
    """Whole numbers in full, others with four digits."""
    return f"{int(number):,}" if float(number).is_integer() else f"{number:.4g}"


def attempt(check: Callable[[Any], None], answer: Any) -> None:
    """Try the reader's answer: `check` raises AssertionError with a hint if it is wrong."""
    if answer is None:
        print("not answered yet; the solution is at the end of the notebook")
        return
    try:
        check(answer)
    except AssertionError as hint:
        print(f"not yet: {hint}")
    else:
        print("right")


def message(error: Exception) -> str:
    """What an error of the simulator says, without folders that differ between machines."""
    text = re.sub(r"/\S*?ipykernel_\d+/\d+\.py", "this notebook", str(error))
    return f"{type(error).__name__}: {re.sub(rf'{re.escape(str(ROOT))}/', '', text)}"


def stored_rows(case: str = "kb83") -> dict[str, Row]:
    """The timed rows of a case by variant, in ladder order; in TF32 what has no row in fp32."""
    frame = plot.read_rows(DATA)
    coarse, fine = (
        {row["variant"]: row for row in timed(of_case(frame, case, [precision]))}
        for precision in ("tf32", "ieee")
    )
    found = coarse | fine
    return {name: found[name] for name in variants() if name in found}


def stored_counters() -> pd.DataFrame:
    """What the profiler counted of the benchmark's forward pass, by variant and kernel.

    The precision is that of `stored_rows`.
    """
    counters = pd.read_csv(DATA / "counters.csv").query("not backward")
    fine = counters.groupby("variant")["precision"].transform("min")  # "ieee" if there is any
    return counters[counters["precision"] == fine].set_index(["variant", "kernel"])
