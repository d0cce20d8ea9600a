"""Rows, provenance, figures and the README's table; and the timing itself where a GPU is."""

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
import torch

from numba_fused import backward as backward_kernels
from numba_fused import bench, ladder, ops, plan, plot, profile, results
from numba_fused.reference import chain
from numba_fused.results import Row
from numba_fused.verify import Tensors, cases, mask_of, poisoned, yardstick

ROOT = Path(__file__).parents[1]
GPU_TIME = bench.gpu_time


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
        "precision": "ieee",
        "backward": False,
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


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_survive_the_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "data" / f"rows.{suffix}"
    results.append(ROWS[:3], path)
    results.append(ROWS[3:], path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    back = results.latest(results.read(path), "kb83")
    wanted = [dict.fromkeys(results.COLUMNS) | r for r in ROWS]
    assert back == wanted


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"numba_fused\[parquet\]"):
        results.check_file(tmp_path / "rows.parquet")
    results.check_file(tmp_path / "rows.csv")


def test_precisions_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    results.append([*ROWS, row("torch", 1.7, utc="2026-03-01T00:00:00", precision="tf32")], path)
    frame = results.read(path)
    assert [r["p50_ms"] for r in results.latest(frame, "kb83", "tf32")] == [1.7]
    assert results.latest(frame, "kb83")[0]["p50_ms"] == 3.4


def test_passes_and_block_sizes_do_not_mix(tmp_path: Path) -> None:
    path, late = tmp_path / "rows.csv", "2026-03-01T00:00:00"
    alone = [
        row("torch", 3.0),
        row("unfused", 2.0, threads_per_block=256),
        row("one_kernel", 4.0, threads_per_block=128, utc=late),
    ]
    both = [row("torch", 15.0, backward=True, utc=late), row("unfused", 14.0, backward=True)]
    larger = row("unfused", 1.0, threads_per_block=1024, utc=late)
    results.append([*alone, *both, larger], path)
    frame = results.read(path)

    def times(rows: list[Row]) -> dict[str, float]:
        return {r["variant"]: r["p50_ms"] for r in rows}

    assert times(results.latest(frame, "kb83")) == {"torch": 3.0, "unfused": 2.0}
    assert times(results.latest(frame, "kb83", backward=True)) == {"torch": 15.0, "unfused": 14.0}
    assert times(results.newest(frame)["kb83"]) == {"torch": 3.0, "unfused": 2.0}
    with pytest.raises(ValueError, match="no tf32 rows with backward of case 'kb83'"):
        results.latest(frame, "kb83", "tf32", backward=True)


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


def test_file_of_before_a_column_was_added_is_read_and_grows(tmp_path: Path) -> None:
    path, old = tmp_path / "rows.csv", ROOT / results.LADDER
    before = [name for name in results.COLUMNS if name not in results.ADDED]
    pd.read_csv(old, dtype=str)[before].to_csv(path, index=False)
    count = len(results.read(path))
    results.append([row("auto", 1.0, seconds=2.5, stride="1x1x1", padding="1")], path)
    frame = results.read(path)
    assert list(frame.columns) == list(results.COLUMNS)
    assert len(frame) == count + 1
    last = frame.iloc[-1]
    assert (last["variant"], last["seconds"], last["padding"]) == ("auto", 2.5, "1")
    assert list(frame["seconds"].isna()) == [True] * count + [False]
    keys = set(map(results.key, frame.to_dict("records")))
    assert ("kb83", "auto", "ieee", None, False) in keys
    assert ("kb83", "one_kernel", "ieee", 256, False) in keys


@pytest.mark.parametrize("left", [1, 40])
def test_line_that_a_crash_cut_short_is_no_row(tmp_path: Path, left: int) -> None:
    path = tmp_path / "rows.csv"
    results.append(ROWS[:3], path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-left])
    assert list(results.read(path)["variant"]) == ["torch", "torch.compile"]
    results.append(ROWS[2:], path)
    assert path.read_bytes().startswith(whole)
    assert list(results.read(path)["variant"]) == [r["variant"] for r in ROWS]


def test_file_of_another_layout_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("case,variant\nkb83,torch\n")
    with pytest.raises(ValueError, match="other columns"):
        results.check_file(path)
    with pytest.raises(ValueError, match="other columns"):
        results.append(ROWS, path)
    assert path.read_text() == "case,variant\nkb83,torch\n"


def test_case_without_rows_names_those_there_are() -> None:
    frame = pd.DataFrame([dict.fromkeys(results.COLUMNS) | ROWS[0]])
    with pytest.raises(ValueError, match="no ieee rows of case 'kb84'; there are rows of: kb83"):
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
    wrong = row("torch", 3.4, status="failed")
    assert results.times_faster(ROWS[1], [wrong], "torch") is None


def test_auto_is_compared_with_the_faster_of_eager_and_compile() -> None:
    fast = results.compare([*ROWS, row("auto", 1.0, runs="split")])
    assert (fast.times_eager, fast.times_best, fast.runs) == (3.4, 2.3, "split")
    slow = results.compare([*ROWS, row("auto", 2.5, runs="split")])
    slow = replace(slow, case="kb83-v0")
    said = results.verdict([fast, slow])
    mean = (3.4 * 3.4 / 2.5) ** 0.5
    assert f"{mean:.2f} times faster than eager PyTorch" in said
    assert said.endswith("slower than the faster of eager and torch.compile on: kb83-v0")
    untimed = results.compare(ROWS)
    assert untimed.times_eager is untimed.times_best is None
    assert "cannot be compared" in results.verdict([untimed])


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


def test_ladder_table() -> None:
    rows = [*ROWS, row("auto", 1.0, runs="split")]
    lines = plot.ladder_table(rows).splitlines()
    assert lines[2].startswith("| torch | 3.4 | 1.00 | 0.68 | 2.3e-07 | 2 | 1000 |")
    assert lines[4].startswith("| unfused | 20 | 0.17 | 0.11 |")
    assert "skipped: needs" in lines[6]
    assert lines[7].startswith("| auto: split | 1 |")
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines[:8]} == {8}
    assert "Test GPU" in lines[-1]
    assert "float32," in lines[-1]
    assert "float32 with TF32," in plot.ladder_table([row("torch", 1.0, precision="tf32")])


def test_cases_table() -> None:
    other = [row("torch", 1.0, case="kb83-v0"), row("auto", 2.0, case="kb83-v0", runs="torch")]
    lines = plot.cases_table([[*ROWS, row("auto", 1.0, runs="split")], other]).splitlines()
    assert lines[2] == "| kb83 | 0.129 | 3.4 | 2.3 | 1 | split | 3.40 | 2.30 |"
    assert lines[3] == "| kb83-v0 | 0.129 | 1 |  | 2 | torch | 0.50 | 0.50 |"
    assert "1.30 times faster than eager PyTorch" in lines[-1]
    assert lines[-1].endswith("on: kb83-v0.")


def test_readme_keeps_all_but_the_tables(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    begin, end = plot.markers("ladder")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    tables = {"ladder": "| new |", "cases": "| absent |"}
    assert plot.update_readme(readme, tables)
    assert readme.read_text() == f"before\n{begin}\n| new |\n{end}\nafter\n"
    assert not plot.update_readme(readme, tables)
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        plot.update_readme(readme, tables)


def test_readme_is_in_step_with_the_rows() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, table in plot.readme_tables(plot.read_rows(ROOT / results.DATA)).items():
        begin, end = plot.markers(name)
        if begin in readme or name == "ladder":
            wanted = f"{begin}\n{table}\n{end}"
            assert wanted in readme, "run numba-fused plot --readme README.md"


# ---- cases ------------------------------------------------------------------------------------

# facts: output of a sample, GFLOP of the convolution, MB no implementation can avoid.
KNOWN = {
    "kb83": ((16, 14, 62, 62), 17.9, 542),
    "kb83-v0": ((16, 14, 30, 30), 4.2, 128),
    "kb83-b16": ((16, 14, 62, 62), 2.2, 68),
    "kb83-b1": ((16, 14, 62, 62), 0.1, 4),
    "3d-8-16": ((16, 32, 64, 64), 14.5, 201),
    "3d-16-32": ((32, 32, 64, 64), 29.0, 201),
    "3d-32-64": ((64, 32, 64, 64), 58.0, 202),
    "3d-64-128": ((128, 16, 32, 32), 29.0, 51),
    "3d-32-64-s2": ((64, 16, 32, 32), 7.2, 84),
    "3d-32-64-k1": ((64, 32, 64, 64), 4.3, 403),
    "3d-3-16-k5": ((16, 16, 64, 64), 12.6, 80),
    "3d-32-depthwise": ((32, 32, 64, 64), 1.8, 268),
    "2d-3-64": ((64, 224, 224), 11.1, 861),
    "2d-64-64": ((64, 112, 112), 29.6, 206),
    "2d-256-256": ((256, 28, 28), 29.6, 54),
}


@pytest.mark.parametrize("name", bench.CASES)
def test_benchmark_cases_are_what_their_names_say(name: str) -> None:
    spec = bench.case_spec(name)
    output, gigaflop, megabytes = KNOWN[name]
    assert spec.constant is None
    assert spec.output_shape[1:] == output
    assert round(spec.flops / 1e9, 1) == gigaflop
    assert round(spec.compulsory_bytes / 1e6) == megabytes


def test_there_are_fifteen_cases_and_every_batch_of_the_first() -> None:
    assert bench.case_names(["all"]) == list(bench.CASES) == list(KNOWN)
    assert bench.case_names(["kb83-b64", "kb83-b64", "kb83"]) == ["kb83-b64", "kb83"]
    assert bench.case_spec("kb83-b1024").x_shape == (1024, 3, 16, 64, 64)
    assert bench.case_spec("kb83-b128") == bench.case_spec("kb83")
    with pytest.raises(ValueError, match="unknown case 'kb83-b0'"):
        bench.case_names(["kb83-b0"])


def test_public_arguments_of_a_case_give_its_spec() -> None:
    case = bench.case("3d-32-64-s2")
    assert bench.case_spec("3d-32-64-s2", "tf32") == bench.BlockSpec.from_arguments(
        case.x_shape, case.weight_shape, **case.keywords("tf32")
    )
    assert bench.case_spec("3d-32-64-s2", "tf32").precision == "tf32"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "kb83"),
        ({"batch": 128, "kernel_size": (3, 3, 3), "cap": 0.5}, "kb83"),
        ({"batch": 16}, "kb83-b16"),
        ({"plane": 8, "batch": 1}, "kb83-b1,plane=8"),
        ({"input_size": (8, 64, 64)}, "kb83,input_size=8x64x64"),
        ({"input_size": (16, 64, 32)}, "kb83,input_size=16x64x32"),
        (
            {"padding": "same", "kernel_size": (3, 1, 1), "dropout_p": 0, "dtype": "float64"},
            "kb83,kernel_size=3x1x1,padding=same,dropout_p=0.0,dtype=float64",
        ),
    ],
)
def test_every_call_has_one_name_that_says_it_all(changes: dict[str, Any], name: str) -> None:
    assert bench.case_name("kb83", **changes) == name
    assert bench.case(name) == bench.case("kb83").vary(**changes)
    assert bench.case_name(name) == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kb83,planes=8", "unknown parameter 'planes' of a case: use one of plane, batch"),
        ("kb83,batch=1.5", "parameter batch of a case takes one number, but got '1.5'"),
        ("kb83,stride=1xtwo", "parameter stride of a case takes ints joined by x"),
        ("kb83,", "unknown case 'kb83,'"),
    ],
)
def test_name_that_says_nothing_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bench.case(name)


# ---- what happens to a variant ----------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> bench.Workload:
    """A workload of two small input sets on the CPU, where rungs run in the simulator."""
    tiny = bench.Case(batch=1, in_channels=2, input_size=(4, 20), out_channels=4, num_groups=2)
    monkeypatch.setitem(bench.CASES, "tiny", tiny)
    spec = bench.case_spec("tiny")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of the baselines' own dropout

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [
        Tensors(normal(*spec.x_shape), normal(*spec.weight_shape), normal(4), normal(4), normal(4))
        for _ in range(2)
    ]
    keep_mask = mask_of(spec, bench.DROPOUT_SEED, "cpu")
    first, last = (yardstick(spec, tensors, keep_mask) for tensors in inputs)
    monkeypatch.setattr(bench, "gpu_time", fill_and_time)
    monkeypatch.setattr(bench, "host_us", lambda call, sets: 50.0)
    monkeypatch.setattr(bench, "peak_extra_bytes", lambda call, result_bytes: 0)
    return bench.Workload(
        name="tiny",
        spec=spec,
        inputs=inputs,
        outs=[poisoned(spec, "cpu") for _ in inputs],
        seed=torch.tensor([bench.DROPOUT_SEED]),
        keep_mask=keep_mask,
        yardsticks=(first, last),
        copy_bytes_per_second=4e12,
    )


def fill_and_time(call: bench.Call, sets: int, poison: Callable[[], None] = lambda: None) -> Row:
    poison()
    for index in range(sets):
        call(index)
    return {"p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.1, "method": "graph", "samples": 1}


def test_measured_rung_has_its_time_error_and_ledger(tiny: bench.Workload) -> None:
    measured = bench.measure(tiny, "one_kernel", threads_per_block=64)
    assert measured["status"] == "ok", measured
    assert measured["p50_ms"] == 1.0
    assert 0 < measured["error"] <= measured["error_bound"]
    assert (measured["launches"], measured["threads_per_block"]) == (1, 64)
    assert measured["ledger_bytes"] == ladder.get("one_kernel").ledger(tiny.spec, 64).bytes_moved
    assert tiny.row().keys() | measured.keys() < results.COLUMNS.keys()


def test_auto_names_the_rung_it_runs(tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "choose", lambda spec: "epilogue")
    measured = bench.measure(tiny, "auto", threads_per_block=64)
    assert (measured["status"], measured["runs"]) == ("ok", "epilogue")
    assert measured["threads_per_block"] == ladder.DEFAULT_THREADS_PER_BLOCK


def test_host_time_is_that_of_the_public_function(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def public(*operands: torch.Tensor, **keywords: object) -> torch.Tensor:
        asked.append(keywords | {"grad": torch.is_grad_enabled()})
        return ladder.run("torch", *operands, spec=tiny.spec, seed=tiny.seed)

    monkeypatch.setattr(ops, "fused_conv_group_norm_min_clamp_dropout", public)
    monkeypatch.setattr(bench, "host_us", lambda call, sets: (len(asked), call(0), len(asked)))
    calls_before, _, calls_after = bench.measure(tiny, "epilogue")["host_us"]
    assert calls_after == calls_before + 1
    assert {call["variant"] for call in asked} == {"epilogue"}
    assert not any(call["grad"] for call in asked)
    assert all(call["seed"] is tiny.seed for call in asked)


@pytest.mark.parametrize("variant", ["torch", "torch.compile"])
def test_baselines_are_judged_before_and_after(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    measured = bench.measure(tiny, variant)
    assert measured["status"] == "ok", measured
    assert measured["error_bound"] == tiny.yardsticks[0].bound

    def broken(call: bench.Call, sets: int) -> Row:
        timed = fill_and_time(call, sets)
        call(sets - 1).mul_(1.01)
        return timed

    monkeypatch.setattr(bench, "gpu_time", broken)
    measured = bench.measure(tiny, variant)
    assert measured["status"] == "failed"
    assert measured["reason"].startswith("after timing: error")


def test_baselines_run_at_the_precision_of_the_case(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def timed(call: bench.Call, sets: int) -> Row:
        seen.append(torch.backends.cudnn.allow_tf32)
        return fill_and_time(call, sets)

    monkeypatch.setattr(bench, "gpu_time", timed)
    bench.measure(tiny, "torch")
    tiny.spec = bench.case_spec("tiny", "tf32")
    measured = bench.measure(tiny, "torch")
    assert seen == [False, True]
    assert measured["error_bound"] == bench.TF32_BASELINE_BOUND


def test_wrong_after_timing_is_a_failure(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(call: bench.Call, sets: int) -> Row:
        timed = fill_and_time(call, sets)
        tiny.outs[-1].zero_()
        return timed

    monkeypatch.setattr(bench, "gpu_time", broken)
    measured = bench.measure(tiny, "epilogue")
    assert measured["status"] == "failed"
    assert measured["reason"].startswith("after timing: error")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has a lot"),
            "out of memory: CUDA out of memory Tried to allocate 9 GiB",
        ),
        (RuntimeError("CUDA error: misaligned address\nhints"), "CUDA error: misaligned address"),
        (ZeroDivisionError(), "ZeroDivisionError"),
    ],
)
def test_crash_is_a_row_with_its_reason(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, problem: Exception, reason: str
) -> None:
    def crash(*_: object, **__: object) -> torch.Tensor:
        raise problem

    monkeypatch.setattr(ladder, "run", crash)
    measured = bench.measure(tiny, "epilogue")
    assert measured["status"] == "failed"
    assert reason in measured["reason"]
    assert "\n" not in measured["reason"]


def test_rung_that_cannot_run_is_skipped_with_its_limit(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ladder.get("epilogue").module
    monkeypatch.setattr(module, "limit", lambda spec: "needs a newer GPU", raising=False)
    measured = bench.measure(tiny, "epilogue")
    assert measured == {"status": "skipped", "reason": "needs a newer GPU"}


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(results, "gpu_name", lambda: "Test GPU")
    monkeypatch.setattr(results, "gpu_uuid", lambda: "GPU-test")
    monkeypatch.setattr(bench, "_gpu_is_lost", lambda: False)


def test_case_that_does_not_fit_has_a_failed_row_for_every_variant(
    pretend_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> bench.Workload:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB. Buy more")

    monkeypatch.setattr(bench.Workload, "build", build)
    rows = list(bench.run("kb83-b1024", precision="tf32"))
    assert [row["variant"] for row in rows] == results.variants()
    assert {row["status"] for row in rows} == {"failed"}
    assert all("Tried to allocate 99 GiB" in row["reason"] for row in rows)
    assert {(row["x_shape"], row["precision"]) for row in rows} == {("1024x3x16x64x64", "tf32")}
    assert rows[0].keys() < results.COLUMNS.keys()


def test_after_a_lost_gpu_the_rest_fail_with_the_reason(
    tiny: bench.Workload, pretend_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(workload: bench.Workload, variant: str, *_: object, **__: object) -> Row:
        measured.append(variant)
        return {"status": "ok"} if variant == "torch" else {"status": "failed", "reason": "crash"}

    monkeypatch.setattr(bench.Workload, "build", lambda *_: tiny)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "_gpu_is_lost", lambda: "unfused" in measured)
    rows = list(bench.run("tiny", ["torch", "unfused", "pointwise", "auto"]))
    assert measured == ["torch", "unfused"]
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed"]
    assert [row.get("reason") for row in rows] == [
        None,
        "crash",
        "the GPU was lost to unfused",
        "the GPU was lost to unfused",
    ]
    assert {row["case"] for row in rows} == {"tiny"}


def test_cases_of_one_workload_set_it_up_once(
    tiny: bench.Workload, pretend_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[tuple[str, str]] = []

    def build(name: str, spec: bench.BlockSpec) -> bench.Workload:
        built.append((name, spec.precision))
        return tiny

    monkeypatch.setattr(bench.Workload, "build", build)
    monkeypatch.setattr(bench, "measure", lambda *_, **__: {"status": "ok"})
    stand = bench.Bench()
    asked = [("tiny", "ieee"), ("tiny", "ieee"), ("tiny", "tf32"), ("kb83-b1", "tf32")]
    rows = [stand.row(name, "one_kernel", 64, precision) for name, precision in asked]
    assert built == [asked[0], *asked[2:]]
    assert [(row["case"], row["precision"]) for row in rows] == asked
    assert {row["threads_per_block"] for row in rows} == {64}
    assert "threads_per_block" not in stand.row("tiny", "auto")
    both = stand.row("tiny", "one_kernel", precision="ieee", backward=True)
    alone = stand.row("tiny", "one_kernel", precision="ieee")
    assert len(built) == 4
    assert (both["backward"], alone["backward"]) == (True, False)
    assert "threads_per_block" not in both
    assert both["floor_ms"] > alone["floor_ms"]
    assert all(row["seconds"] >= 0 for row in rows)


# ---- forward and backward -----------------------------------------------------------------------

BLOCK = ops.fused_conv_group_norm_min_clamp_dropout
OPERANDS = ("x", "weight", "bias", "gamma", "beta")


@pytest.mark.parametrize("variant", ["epilogue", "auto", "torch", "torch.compile"])
def test_both_passes_are_timed_and_all_gradients_judged(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(plan, "choose", lambda spec: "epilogue")
    measured = bench.measure(tiny, variant, 64, backward=True)
    assert measured["status"] == "ok", measured
    assert measured["p50_ms"] == 1.0
    assert 0 < measured["error"] <= measured["error_bound"]
    assert 0 < measured["gradient_error"] <= measured["gradient_error_bound"] < 1e-4
    assert {"peak_extra_bytes", "forward_peak_extra_bytes", "host_us"} < measured.keys()
    assert "threads_per_block" not in measured  # the public function has none to choose
    assert measured.get("runs") == ("epilogue" if variant == "auto" else None)
    by = plan.choose_backward(tiny.spec) if variant in ("auto", "epilogue") else None
    assert measured.get("differentiates") == by
    if by is None:
        assert not {"launches", "ledger_bytes"} & measured.keys()
    else:
        alone = ladder.get("epilogue").ledger(tiny.spec).bytes_moved
        assert measured["ledger_bytes"] > alone
    assert measured.keys() < results.COLUMNS.keys()


@pytest.mark.parametrize("place", range(5), ids=OPERANDS)
@pytest.mark.parametrize("variant", ["auto", "torch"])
def test_each_wrong_gradient_is_a_failure_that_names_it(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, variant: str, place: int
) -> None:
    def spoilt(honest: Callable[..., torch.Tensor], first: int) -> Callable[..., torch.Tensor]:
        def function(*arguments: Any, **keywords: Any) -> torch.Tensor:
            operands = list(arguments)
            right = operands[first + place]
            operands[first + place] = right.detach() + 0.99 * (right - right.detach())
            return honest(*operands, **keywords)

        return function

    monkeypatch.setattr(plan, "choose", lambda spec: "epilogue")
    monkeypatch.setattr(ops, BLOCK.__name__, spoilt(BLOCK, 0))
    monkeypatch.setattr(bench, "native_chain", spoilt(bench.native_chain, 1))
    measured = bench.measure(tiny, variant, backward=True)
    assert measured["status"] == "failed"
    assert measured["reason"].startswith(f"gradient of {OPERANDS[place]}: error")
    assert measured["gradient_error"] > measured["gradient_error_bound"]
    assert "p50_ms" not in measured


def test_wrong_output_is_a_failure_however_right_its_gradients(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, BLOCK.__name__, lambda *a, **k: BLOCK(*a, **k) + 0.01)
    measured = bench.measure(tiny, "epilogue", backward=True)
    assert measured["status"] == "failed"
    assert not measured["reason"].startswith("gradient")


@pytest.mark.parametrize("variant", ["epilogue", "torch"])
def test_results_that_replays_do_not_write_are_a_failure(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    def captured(call: bench.Call, sets: int) -> Callable[[], None]:
        for index in range(sets):
            call(index)
        return lambda: None

    def event_ms(work: Callable[[], object]) -> float:
        work()
        return 5.0

    monkeypatch.setattr(bench, "gpu_time", GPU_TIME)
    monkeypatch.setattr(bench, "_captured", captured)
    monkeypatch.setattr(bench, "_event_ms", event_ms)
    measured = bench.measure(tiny, variant, backward=True)
    assert measured["status"] == "failed"
    assert measured["reason"].startswith("after timing: ")
    assert (measured["method"], measured["p50_ms"]) == ("graph", 5.0 / 2)


def test_step_accumulates_nothing_and_keeps_no_graph(tiny: bench.Workload) -> None:
    def forward(*operands: torch.Tensor) -> torch.Tensor:
        return chain(tiny.spec, *operands, tiny.keep_mask)  # pyright: ignore[reportCallIssue]

    step = bench.Step(forward, tiny.differentiated)
    assert step.results == [[], []]
    step(1)
    before = [tensor.clone() for tensor in step.results[1]]
    step(1)
    assert all(map(torch.equal, before, step.results[1]))
    assert step.results[0] == []
    assert not any(tensor.requires_grad for tensor in step.results[1])
    leaves = [leaf for of_set in tiny.differentiated.leaves for leaf in of_set]
    assert all(leaf.grad is None for leaf in leaves)
    assert leaves[0].data_ptr() == tiny.inputs[0].x.data_ptr()
    step.poison()
    assert all(bool(tensor.isnan().all()) for tensor in step.results[1])


@pytest.mark.parametrize(("precision", "margin"), [("ieee", 1e-3), ("tf32", 1e-2)])
def test_gradient_of_the_output_avoids_the_bounds_and_zero(precision: str, margin: float) -> None:
    spec = bench.BlockSpec.from_arguments(
        (4, 2, 30, 40), (4, 2, 3, 3), num_groups=2, precision=precision, **bench.CHAIN
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(spec.x_shape, generator=generator)
    weight = torch.randn(spec.weight_shape, generator=generator)
    tensors = Tensors(x, weight, None, None, None)
    gradient = bench.random_grad_out(spec, tensors, 0)
    free = replace(spec, min_value=-9.0, max_value=9.0, cap=9.0)
    h = chain(free, x.double(), weight.double(), None, None, None, None)
    distance = torch.stack([(h - bound).abs() for bound in (-1.0, 0.5, 1.0, 0.0)]).amin(dim=0)
    assert bool((gradient[distance < 0.99 * margin] == 0).all())
    assert bool((gradient[distance > 1.01 * margin] != 0).all())
    assert 0 < int((gradient == 0).sum()) < 0.05 * gradient.numel()
    assert not torch.equal(gradient, bench.random_grad_out(spec, tensors, 1))
    assert torch.equal(gradient, bench.random_grad_out(spec, tensors, 0))


def test_right_gradients_are_computed_once_for_all_variants(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    honest = bench.gradient_yardsticks
    monkeypatch.setattr(
        bench, "gradient_yardsticks", lambda *rest: made.append(rest) or honest(*rest)
    )
    for variant in ("torch", "epilogue", "pointwise"):
        assert bench.measure(tiny, variant, backward=True)["status"] == "ok"
    assert len(made) == 2  # of the first and the last input set


def test_compulsory_bytes_of_both_passes() -> None:
    spec = bench.case_spec("kb83")
    x, out = 128 * 3 * 16 * 64 * 64 * 4, 128 * 16 * 14 * 62 * 62 * 4
    parameters = (16 * 81 + 3 * 16) * 4
    both = bench.case_row("kb83", spec, backward=True)
    assert both["compulsory_bytes"] == 3 * (x + parameters) + 2 * out
    assert bench.case_row("kb83", spec)["compulsory_bytes"] == x + parameters + out
    assert both["backward"] is True


def test_both_passes_are_held_against_their_own_floor(tiny: bench.Workload) -> None:
    # A copy so slow that 1 ms is possible for the forward pass, and not for both.
    tiny.copy_bytes_per_second = 1e3 * tiny.spec.compulsory_bytes
    assert bench.measure(tiny, "epilogue")["status"] == "ok"
    measured = bench.measure(tiny, "epilogue", backward=True)
    assert "below the memory floor" in measured["reason"]


@pytest.mark.parametrize("fails", ["forward", "backward", "answers"])
def test_out_of_memory_in_either_pass_is_a_row_with_its_reason(
    tiny: bench.Workload, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 is full")

    if fails == "answers":
        monkeypatch.setattr(bench.Differentiated, "build", full)
    else:
        assert tiny.differentiated
        place = {"forward": (ops, BLOCK.__name__), "backward": (torch.autograd, "grad")}[fails]
        monkeypatch.setattr(*place, full)
    measured = bench.measure(tiny, "epilogue", backward=True)
    assert (measured["status"], measured["reason"]) == (
        "failed",
        "out of memory: CUDA out of memory Tried to allocate 9 GiB",
    )


def test_block_size_goes_with_the_forward_pass_alone() -> None:
    assert bench.takes_threads_per_block("one_kernel")
    assert not bench.takes_threads_per_block("one_kernel", backward=True)
    bench.check_usual_threads(ladder.DEFAULT_THREADS_PER_BLOCK)
    with pytest.raises(ValueError, match="threads_per_block=64 does not go with backward"):
        bench.check_usual_threads(64)


# ---- timing -----------------------------------------------------------------------------------


def test_one_at_a_time_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def time_something(name: str) -> None:
        with bench.gpu_to_itself():
            seen.extend([name, name])

    monkeypatch.setattr(results, "gpu_uuid", lambda: "GPU-one")
    thread = threading.Thread(target=time_something, args=("theirs",))
    with bench.gpu_to_itself():
        seen.append("mine")
        thread.start()
        thread.join(0.2)
        seen.append("mine")
        monkeypatch.setattr(results, "gpu_uuid", lambda: "GPU-two")
        time_something("another GPU")
    thread.join(10)
    assert seen == ["mine", "mine", "another GPU", "another GPU", "theirs", "theirs"]


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown case 'kb99': use one of kb83"):
        bench.check_usage("kb99", None)
    with pytest.raises(ValueError, match="unknown variant 'fast'"):
        bench.check_usage("kb83", ["fast"])
    with pytest.raises(NotImplementedError, match="precision"):
        bench.check_usage("kb83", ["auto"], "fp8")


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


def test_graph_that_does_not_fit_is_not_timed_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(call: bench.Call, sets: int) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "_captured", captured)
    with pytest.raises(torch.OutOfMemoryError):
        bench.gpu_time(lambda index: torch.empty(0), 1)


def test_torch_compile_starts_afresh_for_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives up on a function after 8 shapes, silently: there are 15 cases."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    honest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **rest: honest(f, backend=backend, **rest))
    small = bench.BlockSpec.from_arguments((1, 2, 4, 20), (4, 2, 3, 3), num_groups=2, **bench.CHAIN)
    for width in range(20, 30):
        spec = replace(small, input_size=(4, width))
        operands = (torch.randn(spec.x_shape), torch.randn(spec.weight_shape))
        bench.compiled_chain()(spec, *operands, None, None, None)
    assert len(compiled) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_timing_without_a_gpu_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="numba-fused env"):
        next(bench.run("kb83"))


@pytest.mark.gpu
def test_rows_of_a_small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench.run("kb83-b1"))
    assert [row["variant"] for row in rows] == results.variants()
    for measured in rows:
        assert measured["status"] in ("ok", "skipped"), measured["reason"]
        if measured["status"] == "ok":
            assert measured["p20_ms"] <= measured["p50_ms"] <= measured["p80_ms"]
            assert measured["p50_ms"] >= 0.97 * measured["floor_ms"]
            assert measured["method"] == "graph"
            assert 0 <= measured["peak_extra_bytes"] < 20 * measured["compulsory_bytes"]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_rows_of_both_passes_of_a_small_case(precision: str) -> None:
    alone = next(bench.run("kb83-b1", ["torch"], precision=precision))
    chosen = ["torch", "torch.compile", "library_conv", "auto"]
    rows = list(bench.run("kb83-b1", chosen, precision=precision, backward=True))
    assert [row["variant"] for row in rows] == chosen
    for measured in rows:
        assert measured["status"] == "ok", measured["reason"]
        assert measured["backward"] is True
        assert measured["method"] == "graph"
        assert measured["gradient_error"] <= measured["gradient_error_bound"]
        assert measured["p50_ms"] >= 0.97 * measured["floor_ms"]
        # The forward pass is a part of the step, which holds the gradients besides.
        forward, step = measured["forward_peak_extra_bytes"], measured["peak_extra_bytes"]
        assert 0 <= forward <= step + bench.gradient_bytes(bench.case_spec("kb83-b1"))
        assert step >= 0
    assert rows[0]["p50_ms"] > alone["p50_ms"]


@pytest.mark.gpu
def test_wrong_rung_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(name: str, *operands: object, out: torch.Tensor, **rest: object) -> torch.Tensor:
        return out.zero_()

    monkeypatch.setattr(ladder, "run", zeros)
    (measured,) = bench.run("kb83-b1", ["one_kernel"])
    assert measured["status"] == "failed"
    assert "p50_ms" not in measured


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_profiler_is_shown_one_call_after_warming_up(
    monkeypatch: pytest.MonkeyPatch, backward: bool
) -> None:
    seen = []
    module = backward_kernels if backward else ladder
    honest = module.run

    def run(*operands: Any, **rest: Any) -> object:
        seen.append("run")
        return honest(*operands, **rest)

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    profile.main(profile.Call("kb83-b1", "auto", backward=backward))
    assert seen == ["run"] * profile.WARM_UPS + ["start", "run", "stop"]


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
