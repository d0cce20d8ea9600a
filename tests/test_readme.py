"""The README: its examples run, and the figure it shows is of the rows that are there."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pandas as pd
import torch
from typer.testing import CliRunner

from numba_fused import bench, cli, plot, results, training
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


def shown_text(figure: str) -> str:
    """The texts of a figure that the README shows, from its twin in SVG."""
    assert f"(plots/{figure}.png)" in README
    assert (ROOT / f"plots/{figure}.png").read_bytes().startswith(b"\x89PNG")
    return (ROOT / f"plots/{figure}.svg").read_text()


def test_ladder_shown_is_of_the_rows_there_are() -> None:
    text = shown_text("ladder")
    rows = timed(of_case(plot.read_rows(ROOT / results.DATA), "kb83", ["ieee"]))
    assert rows
    for row in rows:
        assert f">{results.label(row)}<" in text, "run numba-fused plot"
        assert f">{row['p50_ms']:.3g}<" in text, "run numba-fused plot"


def test_speedups_shown_are_of_the_rows_there_are() -> None:
    text = shown_text("speedup")
    frame = plot.read_rows(ROOT / results.DATA)
    for case in bench.CASES:
        found = results.compare(of_case(frame, case, ["ieee"]))
        assert f">{found.times_eager:.2f}<" in text, "run numba-fused plot"


def test_training_shown_is_of_the_rows_there_are_and_as_the_text_says() -> None:
    text = shown_text("training")
    frame = pd.read_csv(ROOT / results.DATA / "training.csv")
    agreement = training.agreement(frame)
    assert agreement.ok
    for name, of_run in training.by_implementation(frame).items():
        seconds = of_run.seconds[of_run.timed].median()
        if name != training.REFERENCE:
            assert f">{1e3 * seconds:.3g}<" in text, "run numba-fused train"


def test_every_notebook_is_named() -> None:
    notebooks = sorted(file.stem for file in (ROOT / "notebooks").glob("[0-9]*.py"))
    (named,) = re.findall(r"Open `notebooks/`.*?: (.*?)\. Each", README, re.DOTALL)
    assert re.findall(r"\b\d\d\b", named) == [name[:2] for name in notebooks]
