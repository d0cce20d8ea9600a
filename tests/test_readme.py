"""The README: its examples run, and the figure it shows is of the rows that are there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import torch
from typer.testing import CliRunner

from numba_fused import cli, plot, results
from numba_fused.plot.rows import of_case, timed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def example(language: str) -> str:
    """The one block in that language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block


def test_python_example_runs() -> None:
    names: dict[str, object] = {}
    exec(example("python"), names)
    y, x = names["y"], names["x"]
    assert isinstance(y, torch.Tensor)
    assert isinstance(x, torch.Tensor)
    assert y.shape == (2, 16, 6, 14, 14)


def test_sweep_example_measures_what_its_axes_say(tmp_path: Path) -> None:
    (file,) = set(re.findall(r"numba-fused sweep (\w+\.yaml)", README))
    (tmp_path / file).write_text(example("yaml"))
    out = ("--out", str(tmp_path / "rows.csv"))
    done = CliRunner().invoke(cli.app, ["sweep", str(tmp_path / file), "--dry-run", *out, "--json"])
    assert done.exit_code == 0, done.output
    for out_channels, plane in itertools.product((16, 32, 64), (16, 32, 64)):
        for name, value, usual in (("out_channels", out_channels, 16), ("plane", plane, 64)):
            assert value == usual or f"{name}={value}" in done.stdout
    assert not (tmp_path / "rows.csv").exists()


def test_figures_shown_are_there_and_of_the_rows_there_are() -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown == ["plots/ladder.png"]
    assert (ROOT / shown[0]).read_bytes().startswith(b"\x89PNG")
    twin = (ROOT / shown[0]).with_suffix(".svg").read_text()
    rows = timed(of_case(plot.read_rows(ROOT / results.DATA), "kb83", ["ieee"]))
    assert rows
    for row in rows:
        assert f">{results.label(row)}<" in twin, "run numba-fused plot"
        assert f">{row['p50_ms']:.3g}<" in twin, "run numba-fused plot"


def test_every_notebook_is_named() -> None:
    notebooks = sorted(file.stem for file in (ROOT / "notebooks").glob("[0-9]*.py"))
    (named,) = re.findall(r"Open `notebooks/`.*?: (.*?)\. Each", README, re.DOTALL)
    assert re.findall(r"\b\d\d\b", named) == [name[:2] for name in notebooks]
