"""Rows, provenance, figures and the README's table; and the timing itself where a GPU is."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from numba_fused import bench, ladder, plot, results
from numba_fused.reference import chain
from numba_fused.results import Row
from numba_fused.verify import cases

ROOT = Path(__file__).parents[1]


def row(
    variant: str, p50_ms: float | None, utc: str = "2026-01-01T00:00:00", **rest: object
) -> Row:
    known: Row = {
        "case": "kb83",
        "variant": variant,
        "status": "ok" if p50_ms else "skipped",
        "reason": None if p50_ms else "needs | fewer channels",
        "x_shape": "128x3x16x64x64",
        "weight_shape": "16x3x3x3x3",
        "num_groups": 8,
        "dropout_p": 0.2,
        "dtype": "float32",
        "p20_ms": p50_ms and 0.9 * p50_ms,
        "p50_ms": p50_ms,
        "p80_ms": p50_ms and 1.1 * p50_ms,
        "launches": 2,
        "ledger_bytes": 1_000_000_000,
        "compulsory_bytes": 541_990_000,
        "floor_ms": 0.129,
        "error": 2.3e-7,
        "gpu": "Test GPU",
        "torch": "2.13.0",
        "numba_cuda": "0.30.4",
        "utc": utc,
    }
    return known | rest


ROWS = [
    row("torch", 3.4),
    row("torch.compile", 2.3),
    row("unfused", 20.0),
    row("pointwise", 15.0),
    row("epilogue", None),
]


# ---- rows -------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data" / "rows.csv"
    results.append(ROWS[:3], path)
    results.append(ROWS[3:], path)
    back = results.latest(results.read(path), "kb83")
    wanted = [dict.fromkeys(results.COLUMNS) | r for r in ROWS]
    assert back == wanted


def test_newest_row_wins_and_rungs_come_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    later = row("torch", 3.0, utc="2026-02-01T00:00:00")
    results.append([later, *reversed(ROWS), row("torch", 1.0, case="kb83-v0")], path)
    back = results.latest(results.read(path), "kb83")
    names = ["torch", "torch.compile", "unfused", "pointwise", "epilogue"]
    assert [r["variant"] for r in back] == names
    assert back[0]["p50_ms"] == 3.0


def test_row_with_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such columns: speed"):
        results.append([row("torch", 1.0, speed=9)], tmp_path / "rows.csv")
    assert not (tmp_path / "rows.csv").exists()


def test_file_of_another_layout_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("case,variant\nkb83,torch\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(ROWS, path)
    assert path.read_text() == "case,variant\nkb83,torch\n"


def test_case_without_rows_names_those_there_are() -> None:
    frame = pd.DataFrame([dict.fromkeys(results.COLUMNS) | ROWS[0]])
    with pytest.raises(ValueError, match="'kb84'; there are rows of: kb83"):
        results.latest(frame, "kb84")


def test_provenance_names_versions_commit_and_time() -> None:
    made = results.provenance()
    assert made.keys() <= results.COLUMNS.keys()
    assert made["torch"] == torch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", made["numba_cuda"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["utc"])
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", made["commit"])


def test_times_faster() -> None:
    assert results.times_faster(ROWS[1], ROWS, "torch") == pytest.approx(3.4 / 2.3)
    assert results.times_faster(ROWS[4], ROWS, "torch") is None
    assert results.times_faster(ROWS[1], ROWS[1:], "torch") is None


# ---- figures and the table --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figure_is_the_same_bytes_every_time(tmp_path: Path, suffix: str) -> None:
    paths = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for path in paths:
        plot.save(plot.ladder_figure(ROWS), path)
    one, two = (path.read_bytes() for path in paths)
    assert one == two
    assert len(one) > 5000


def test_figure_shows_every_time_and_the_lines() -> None:
    figure = plot.ladder_figure(ROWS)
    axes = figure.axes[0]
    widths = [bar.get_width() for container in axes.containers for bar in container]
    assert widths == [3.4, 2.3, 20.0, 15.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "torch",
        "torch.compile",
        "unfused",
        "pointwise",
    ]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["PyTorch eager", "torch.compile", "memory floor"]
    assert "ms" in axes.get_xlabel()


def test_figure_leaves_matplotlib_as_it_was() -> None:
    before = mpl.rcParams["font.size"]
    plot.ladder_figure(ROWS)
    assert mpl.rcParams["font.size"] == before


def test_figure_without_times_or_of_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has a time"):
        plot.ladder_figure(ROWS[4:])
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot.save(plot.ladder_figure(ROWS), tmp_path / "ladder.jpg")


def test_markdown_table() -> None:
    lines = plot.markdown_table(ROWS).splitlines()
    assert lines[2].startswith("| torch | 3.4 | 1.00 | 0.68 | 2.3e-07 | 2 | 1000 |")
    assert lines[4].startswith("| unfused | 20 | 0.17 | 0.11 |")
    assert "skipped: needs" in lines[6]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:7]} == {8}
    assert "Test GPU" in lines[-1]


def test_readme_keeps_all_but_the_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    assert plot.update_readme(readme, ROWS)
    text = readme.read_text()
    assert text.startswith(f"before\n{plot.BEGIN}\n|")
    assert text.endswith(f"{plot.END}\nafter\n")
    assert "old" not in text
    assert not plot.update_readme(readme, ROWS)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        plot.update_readme(readme, ROWS)


def test_readme_is_in_step_with_the_rows() -> None:
    rows = ROOT / results.LADDER
    if not rows.exists():
        pytest.skip("nothing has been measured yet")
    table = plot.markdown_table(results.latest(results.read(rows), "kb83"))
    assert table in (ROOT / "README.md").read_text(), "run numba-fused plot --readme README.md"


# ---- timing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bench.CASES)
def test_benchmark_cases_are_not_degenerate(name: str) -> None:
    assert bench.case_spec(name).constant is None


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown case 'kb99': use one of kb83"):
        bench.check_usage("kb99", None)
    with pytest.raises(ValueError, match="unknown variant 'fast'"):
        bench.check_usage("kb83", ["fast"])


def test_faster_than_the_floor_is_a_failure() -> None:
    assert bench._plausible(0.2, 0.129) == {}
    assert bench._plausible(0.05, 0.129)["status"] == "failed"
    assert "below the memory floor" in bench._plausible(0.05, 0.129)["reason"]


def test_native_chain_is_the_reference() -> None:
    spec = next(
        case.spec
        for case in cases(0, 50, dtype="float32")
        if not case.spec.draws and case.family == "normal"
    )
    generator = torch.Generator().manual_seed(0)

    def normal(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=generator)

    channels = (spec.out_channels,)
    x, weight = normal(spec.x_shape), normal(spec.weight_shape)
    bias, gamma, beta = normal(channels), normal(channels), normal(channels)
    native = bench.native_chain(spec, x, weight, bias, gamma, beta)
    reference = chain(spec, x, weight, bias, gamma, beta, None)
    assert torch.equal(native, reference)
    assert native.unique().numel() > 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_timing_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="numba-fused env"):
        next(bench.run("kb83"))


@pytest.mark.gpu
def test_rows_of_a_small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench.run("kb83-b1", ladder.names()))
    assert [row["variant"] for row in rows] == ladder.names()
    for measured in rows:
        assert measured["status"] in ("ok", "skipped"), measured["reason"]
        if measured["status"] == "ok":
            assert measured["p20_ms"] <= measured["p50_ms"] <= measured["p80_ms"]
            assert measured["p50_ms"] >= 0.97 * measured["floor_ms"]
            assert measured["method"] == "graph"


@pytest.mark.gpu
def test_wrong_rung_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(name: str, *operands: object, out: torch.Tensor, **rest: object) -> torch.Tensor:
        return out.zero_()

    monkeypatch.setattr(ladder, "run", zeros)
    (measured,) = bench.run("kb83-b1", ["one_kernel"])
    assert measured["status"] == "failed"
    assert "p50_ms" not in measured


def test_sources_without_history_are_told_their_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_FUSED_COMMIT", "abc123")
    assert results.provenance()["commit"] == "abc123"


def test_constraints_pin_what_is_installed() -> None:
    """The versions that claim to be tested are those the tests run with, where CI runs them."""
    from numba_fused.environment import CONSTRAINTS, inspect

    if os.environ.get("CI") != "true":
        pytest.skip("only where the constraints were installed")
    assert CONSTRAINTS.exists()
    assert inspect().mismatches == {}
