"""notebooks/: each is a pair in step, was executed, runs without a GPU, and has a lesson's parts.

The parts: what the reader will be able to do; predictions, each a cell with a number that a later
cell compares; exercises, each with a check that the given solution passes.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.py"))
WHY = "needs the notebooks extra: pip install -e '.[notebooks]'"

every_notebook = pytest.mark.parametrize("name", NAMES)


@cache
def read(name: str) -> Any:
    """The committed notebook."""
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())


def cells(name: str, kind: str) -> list[Any]:
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == kind]


def source(cell: Any) -> str:
    return "".join(cell["source"])


def outputs(name: str) -> list[Any]:
    return [output for cell in cells(name, "code") for output in cell["outputs"]]


def text_of(output: Any) -> str:
    """What a reader reads of an output: its stream, or its data but for pictures."""
    data = {kind: text for kind, text in output.get("data", {}).items() if "image" not in kind}
    return "\n".join("".join(text) for text in [output.get("text", ""), *data.values()])


def test_notebooks_are_numbered_without_a_gap() -> None:
    assert [int(name.split("_")[0]) for name in NAMES] == list(range(1, len(NAMES) + 1))
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == NAMES


@every_notebook
def test_twins_are_in_step(name: str) -> None:
    jupytext = pytest.importorskip("jupytext", reason=WHY)
    pair = [jupytext.read(NOTEBOOKS / f"{name}.{suffix}") for suffix in ("py", "ipynb")]
    script, notebook = (
        [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in twin.cells]
        for twin in pair
    )
    assert script == notebook, "run: jupytext --sync notebooks/0*.py, and execute the notebook"


@pytest.mark.slow
@every_notebook
def test_it_runs(name: str) -> None:
    nb_run = pytest.importorskip("nbmake.nb_run", reason=WHY)
    pytest.importorskip("ipykernel", reason=WHY)
    result = nb_run.NotebookRun(NOTEBOOKS / f"{name}.ipynb", default_timeout=240).execute()
    assert result.error is None, result.error.trace
    printed = [o for c in result.nb.cells if c.cell_type == "code" for o in c.outputs]
    assert [o["text"] for o in printed if o.get("name") == "stderr"] == []


# ---- what is committed --------------------------------------------------------------------------


@every_notebook
def test_it_was_executed_from_top_to_bottom(name: str) -> None:
    code = cells(name, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert outputs(name)


@every_notebook
def test_outputs_hold_no_errors_and_no_warnings(name: str) -> None:
    for output in outputs(name):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", text_of(output)


@every_notebook
def test_outputs_are_the_same_on_every_machine(name: str) -> None:
    for output in outputs(name):
        text = text_of(output)
        assert str(ROOT) not in text
        assert not re.search(r"(?<![\w.`/])/(?:home|root|tmp|usr|opt|var|Users|private)/", text)
        assert not re.search(r"\bat 0x[0-9a-f]{6,}", text), "an object's address"


# ---- the parts of a lesson ----------------------------------------------------------------------


@every_notebook
def test_it_begins_with_what_the_reader_will_be_able_to_do(name: str) -> None:
    first = source(read(name)["cells"][0])
    assert first.startswith(f"# {int(name.split('_')[0])}. ")
    assert "**After this notebook you can**" in first


@every_notebook
def test_every_prediction_has_a_default_and_is_compared(name: str) -> None:
    asked = [
        (source(cell), following)
        for cell, *following in (read(name)["cells"][i:] for i in range(len(read(name)["cells"])))
        if cell["cell_type"] == "markdown" and "**Predict" in source(cell)
    ]
    assert len(asked) >= 5
    for question, following in asked:
        default, comparison = following[0], following[1]
        assert {default["cell_type"], comparison["cell_type"]} == {"code"}, question
        names = re.findall(r"\b(?:predicted_\w+|[xE]_times)\b(?=[^=]*=[^=])", source(default))
        assert names, f"no default: {question}"
        assert re.search(r"\b(?:compare|measure)\(", source(comparison)), question
        for predicted in names:
            assert predicted in source(comparison), question


@every_notebook
def test_every_exercise_has_a_checked_solution(name: str) -> None:
    text = "\n".join(map(source, cells(name, "markdown")))
    exercises = [int(n) for n in re.findall(r"^\*\*Exercise (\d)\.\*\*", text, re.MULTILINE)]
    assert exercises == list(range(1, len(exercises) + 1))
    assert len(exercises) >= 3
    code = cells(name, "code")
    solutions = [cell for cell in code if "solution" in cell["metadata"].get("tags", [])]
    assert len(solutions) == len(exercises)
    for number, cell in zip(exercises, solutions, strict=True):
        assert cell["metadata"]["jupyter"] == {"source_hidden": True}
        assert f"check_{number}(solution_{number})" in source(cell)
        assert f"attempt(check_{number}, " in "\n".join(map(source, code))


@every_notebook
def test_links_lead_somewhere(name: str) -> None:
    text = "\n".join(map(source, cells(name, "markdown")))
    for target in re.findall(r"\]\(([\w/.-]+\.\w+)\)", text):
        assert (NOTEBOOKS / target).exists(), target
