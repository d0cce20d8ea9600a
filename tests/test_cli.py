"""The command line: what it prints, what it writes, how it exits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from numba_fused import bench, cli, demo, environment, first_call, ladder, profile, results, verify
from numba_fused.environment import advise
from numba_fused.profile import METRICS, STALL, STALLS, short_name
from numba_fused.results import Row

ROOT = Path(__file__).parents[1]
COMMANDS = (
    *("demo", "verify", "explain", "env", "bench", "profile", "sweep", "compare"),
    *("plot", "report", "mistakes", "train", "first-call"),
)


def numba_fused(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The demo without a GPU, on a problem of 32 outputs; returns where its figure goes."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    small = dataclasses.replace(
        demo.MINIATURE, batch=1, out_channels=2, num_groups=2, input_size=(3, 3, 18)
    )
    monkeypatch.setattr(demo, "MINIATURE", small)
    return tmp_path / "demo.png"


def test_module_and_help_of_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "numba_fused", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
    )
    for command in COMMANDS:
        assert command in done.stdout
        helped = numba_fused(command, "--help")
        assert helped.exit_code == 0
        assert "--" in helped.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["verify", "--count", "0"],
        ["verify", "--count", "many"],
        ["verify", "--variant", "fast"],
        ["verify", "--variant", "backward:fast"],
        ["verify", "--device", "tpu"],
        ["verify", "--dtype", "float16"],
        ["verify", "--max-macs", "7"],
        ["explain", "--x", "1,2"],
        ["explain", "--x", "a,b"],
        ["explain", "--cap", "high"],
        ["explain", "--num-groups", "5"],
        ["explain", "--padding", "full"],
        ["explain", "--dropout-p", "nan"],
        ["bench", "--case", "kb99"],
        ["bench", "--case", "kb83-b0"],
        ["bench", "--precision", "fp8"],
        ["bench", "--profile", "fast"],
        ["bench", "--threads-per-block", "100"],
        ["profile", "kb99", "torch"],
        ["profile", "kb83", "fast"],
        ["plot", "--rows", "/nowhere/rows.csv"],
        ["plot", "--precision", "fp8"],
        ["demo", "--figure", "demo.pdf"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_no_traceback(arguments: list[str]) -> None:
    result = numba_fused(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_bad_usage_is_one_line_that_names_the_fix() -> None:
    result = numba_fused("verify", "--variant", "fast")
    assert result.output.startswith("numba-fused: unknown variant 'fast'")
    assert result.output.count("\n") == 1
    assert all(name in result.output for name in verify.names())


# ---- demo -------------------------------------------------------------------------------------


def test_demo_runs_every_rung_and_draws(tiny_demo: Path) -> None:
    result = numba_fused("demo", "--figure", str(tiny_demo))
    assert result.exit_code == 0, result.output
    assert tiny_demo.read_bytes().startswith(b"\x89PNG")
    for rung in ladder.rungs():
        line = next(
            text for text in result.output.splitlines() if f" {rung.number} {rung.name} " in text
        )
        assert line.split()[-1] == ("skipped" if rung.name == "algebra" else "right")
    assert max(map(len, result.output.splitlines())) <= 80
    assert "algebra skipped: it fills in the constant" in result.output


def test_demo_counts_what_the_ledgers_predict(tiny_demo: Path) -> None:
    result = numba_fused("demo", "--figure", str(tiny_demo), "--json")
    lines = json.loads(result.stdout)
    assert [line["name"] for line in lines] == ladder.names()
    ours = [line for line in lines if line["counted_launches"] is not None]
    assert {"unfused", "pointwise", "epilogue", "one_kernel"} <= {line["name"] for line in ours}
    judged = [line for line in lines if line["verdict"] == "right"]
    assert [line["name"] for line in judged] == [n for n in ladder.names() if n != "algebra"]
    for line in judged:
        assert line["error"] <= line["bound"]
    for line in ours:
        assert line["counted_launches"] == line["launches"]
        assert line["counted_bytes"] > 0


def test_demo_exits_with_1_when_a_rung_is_wrong(
    tiny_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ladder.run

    def dishonest(name: str, *operands: object, **rest: object) -> object:
        out = honest(name, *operands, **rest)  # pyright: ignore[reportArgumentType]
        return out.zero_() if name == "pointwise" else out

    monkeypatch.setattr(ladder, "run", dishonest)
    result = numba_fused("demo", "--figure", str(tiny_demo))
    assert result.exit_code == 1
    assert result.output.count("WRONG") == 2  # in the table, and below it with the reason
    assert "pointwise WRONG: " in result.output


# ---- verify -----------------------------------------------------------------------------------

SMALL = ("verify", "--device", "cpu", "--max-macs", "1500", "--seed", "4")


def test_verify_passes_and_counts() -> None:
    result = numba_fused(*SMALL, "--count", "3", "--variant", "one_kernel", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["seed"], found["device"]) == (4, "cpu")
    assert found["numba_cuda"]
    rows = found["results"]
    assert [(row["case"], row["variant"]) for row in rows] == [(i, "one_kernel") for i in range(3)]
    assert all(row["status"] == "ok" and row["error"] <= row["bound"] for row in rows)


def test_verify_failure_prints_a_reproducer_that_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verify.check

    def check(case: verify.Case, variant: str, device: str) -> verify.Result:
        broken = case.index == 2
        return verify.Result("failed", reason="off") if broken else honest(case, variant, device)

    monkeypatch.setattr(verify, "check", check)
    result = numba_fused(*SMALL, "--count", "4", "--variant", "torch")
    assert result.exit_code == 1
    found = re.search(r"numba-fused (verify --seed 4 --only 2 .*)", result.output)
    assert found
    again = numba_fused(*found[1].split(), "--device", "cpu", "--json")
    assert again.exit_code == 1
    assert [row["case"] for row in json.loads(again.stdout)["results"]] == [2]


def test_verify_judges_rungs_and_the_backward_pass_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name in one table; a wrong gradient is a failure like any other."""

    def check(case: verify.Case, variant: str, device: str) -> verify.Result:
        wrong = variant == "backward:clear"
        return (
            verify.Result("failed", reason="off") if wrong else verify.Result("ok", 1.0, 1.0, 2.0)
        )

    monkeypatch.setattr(verify, "check", check)
    result = numba_fused(*SMALL, "--count", "2")
    assert result.exit_code == 1
    table = [line.split()[:3] for line in result.output.splitlines()]
    for name in verify.names():
        assert [name, *(("0", "2") if name == "backward:clear" else ("2", "0"))] in table
    assert result.output.count("--variant backward:clear\n") == 2


def test_verify_runs_the_backward_variant_it_is_told_to() -> None:
    chosen = (*SMALL, "--only", "1", "--variant", "backward:clear")
    result = numba_fused(*chosen, "--variant", "backward:tensor_core", "--json")
    assert result.exit_code == 0, result.output
    clear, tensor_core = json.loads(result.stdout)["results"]
    assert (clear["variant"], clear["status"]) == ("backward:clear", "ok")
    assert 0 < clear["error"] <= clear["bound"]
    assert (tensor_core["variant"], tensor_core["status"]) == ("backward:tensor_core", "skipped")
    assert tensor_core["reason"]


def test_verify_gives_the_backward_pass_smaller_cases_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And its reproducer draws the same case again."""
    drawn: list[verify.Case] = []

    def check(case: verify.Case, variant: str, device: str) -> verify.Result:
        drawn.append(case)
        return verify.Result("failed", reason="off")

    monkeypatch.setattr(verify, "check", check)
    chosen = ("--variant", "split", "--variant", "backward:clear")
    result = numba_fused("verify", "--device", "cpu", "--only", "5", *chosen)
    assert [c.max_macs for c in drawn] == [verify.SIMULATOR_MACS, verify.SIMULATOR_GRADIENT_MACS]
    assert verify.most_macs("backward:clear", "cuda") == verify.GPU_MACS
    for line in re.findall(r"numba-fused (verify .*)", result.output):
        numba_fused(*line.split(), "--device", "cpu")
    assert drawn[2:] == drawn[:2]


def test_verify_help_spells_a_backward_variant() -> None:
    assert "such as backward:clear" in " ".join(
        numba_fused("verify", "--help").stdout.replace("│", " ").split()
    )


# ---- explain, env -----------------------------------------------------------------------------


def test_explain_prints_the_benchmark_case() -> None:
    result = numba_fused("explain")
    assert result.exit_code == 0
    assert "128 x 16 x 14 x 62 x 62" in result.stdout
    assert "depends on its input" in result.stdout


def test_explain_takes_every_parameter() -> None:
    options = "--x 4,6,20,31 --weight 8,3,3,2 --groups 2 --num-groups 4 --stride 2,1 --padding 1,0"
    words = f"{options} --dilation 1,2 --cap none --no-bias --no-affine --dtype float64"
    account = json.loads(numba_fused("explain", *words.split(), "--json").stdout)
    assert account["output_shape"] == [4, 8, 10, 29]
    assert account["constant"] == -1.0
    assert account["compulsory_bytes"] == 8 * (4 * 6 * 20 * 31 + 8 * 3 * 3 * 2 + 4 * 8 * 10 * 29)


def test_env_reports_versions() -> None:
    found = json.loads(numba_fused("env", "--json").stdout)
    assert found["installed"]["numba-cuda"]
    assert found["tested"]["torch"] == "2.13.0"
    text = numba_fused("env").stdout
    assert found["installed"]["torch"] in text
    assert "Python" in text


FINE = {
    "installed": {"numpy": "2.4.6", "nvidia-nvvm": "13.5.37"},
    "driver": "580.159",
    "gpu": "NVIDIA H200",
    "torch_cuda": "13.0",
    "numba_cuda_problem": "",
    "numba_sees_gpu": True,
    "compiles": True,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"driver": "", "gpu": ""}, ["no NVIDIA driver"]),
        ({"gpu": "", "torch_cuda": ""}, ["torch is a CPU build"]),
        ({"gpu": ""}, ["sees no GPU"]),
        ({"numba_sees_gpu": False}, ["numba.cuda does not"]),
        ({"torch_cuda": "12.8"}, [r"numba_fused\[cuda12\]"]),
        ({"installed": {"numpy": "2.5.2", "nvidia-nvvm": "13.0.88"}}, [r"NumPy 2\.5\.2"]),
        ({"compiles": False}, [r"numba_fused\[cuda13\]"]),
        ({"numba_cuda_problem": "ImportError: x"}, ["does not import"]),
    ],
)
def test_advice_fits_the_problem(change: dict[str, object], said: list[str]) -> None:
    advice = advise(**FINE | change)  # pyright: ignore[reportArgumentType]
    assert len(advice) == len(said)
    for line, pattern in zip(advice, said, strict=True):
        assert re.search(pattern, line)


def test_mismatch_ignores_the_build_tag() -> None:
    found = dataclasses.replace(
        environment.inspect(),
        installed={"torch": "2.13.0+cpu", "numpy": "2.5.0"},
        tested={"torch": "2.13.0", "numpy": "2.4.6", "absent": "1.0"},
    )
    assert found.mismatches == {"numpy": ("2.5.0", "2.4.6")}


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}  # pyright: ignore
    assert names <= environment.read_constraints(environment.CONSTRAINTS).keys()


# ---- bench ------------------------------------------------------------------------------------

TIMES = {"torch": 3.258, "torch.compile": 2.163, "one_kernel": 13.974, "auto": 0.654}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows as a GPU would give them, and one that ran out of memory."""

    def run(
        name: str, chosen: Sequence[str], threads_per_block: int, precision: str, *, backward: bool
    ) -> Iterator[Row]:
        spec = bench.case_spec(name, precision=precision)
        shared = bench.case_row(name, spec, backward=backward)
        shared |= {"gpu": "Test GPU", "floor_ms": 0.129, "utc": "now"}
        for variant in chosen:
            row: Row = shared | {"variant": variant, "status": "ok", "error": 1.1e-7}
            if variant not in TIMES:
                reason = "out of memory: CUDA out of memory Tried to allocate 98.00 GiB"
                yield row | {"status": "failed", "reason": reason}
                continue
            row |= {"p50_ms": TIMES[variant], "host_us": 1077.8}
            if backward:
                row |= {"gradient_error": 3.4e-7, "peak_extra_bytes": 5_678_900_000}
            yield row | ({"runs": "library_conv"} if variant == "auto" else {})

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(bench, "run", run)


def options(name: str, *values: str) -> list[str]:
    return [word for value in values for word in (f"--{name}", value)]


@pytest.mark.parametrize("width", [100, 150])
def test_bench_table_fits_the_terminal(
    timed: None, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=width))
    result = numba_fused("bench", *options("case", "kb83", "3d-32-64-k1"))
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "kb83 ieee on Test GPU: memory floor 0.129 ms for 542 MB" in result.stdout
    auto = next(line for line in lines if line.startswith(" auto"))
    #                       ms   GB/s  floor x eager x compile error host us
    assert auto.split() == [
        *("auto:", "library_conv"),
        *("0.654", "828", "20", "4.98", "3.31", "1.1e-07", "1078", "ok"),
    ]
    assert "unfused failed: out of memory: CUDA out of memory Tried" in result.stdout
    assert "4.98 times faster than eager PyTorch" in " ".join(result.stdout.split())


@pytest.mark.parametrize("width", [100, 150])
def test_bench_of_both_passes_says_so(
    timed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=width))
    out = tmp_path / "rows.csv"
    cases = options("case", "kb83", "kb83-b1")
    result = numba_fused("bench", "--backward", *cases, "--out", str(out))
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert "kb83 ieee, forward + backward on Test GPU: memory floor 0.129 ms for 1,184 MB" in lines
    auto = next(line for line in lines if line.startswith(" auto"))
    #                   ms   extra MB floor x eager x compile error, gradients', host us
    assert auto.split()[2:] == [
        *("0.654", "5,679", "20", "4.98", "3.31", "1.1e-07", "3.4e-07", "1078", "ok"),
    ]
    assert "forward + backward:" in lines
    assert set(results.read(out)["backward"]) == {True}
    told = json.loads(numba_fused("bench", "--backward", "--variant", "auto", "--json").stdout)
    assert [row["backward"] for row in told] == [True]
    alone = numba_fused("bench", "--variant", "auto", *cases).stdout
    assert "backward" not in alone
    assert "gradient" not in alone


def test_bench_of_both_passes_refuses_what_is_of_one(timed: None) -> None:
    result = numba_fused("bench", "--backward", "--threads-per-block", "128")
    assert result.exit_code == 2
    assert "threads_per_block=128 does not go with backward" in result.output


def test_bench_runs_cases_in_precisions_and_adds_their_rows(timed: None, tmp_path: Path) -> None:
    out = tmp_path / "rows.parquet"
    chosen = ["torch", "torch.compile", "auto"]
    arguments = [*options("case", "all"), *options("variant", *chosen), "--out", str(out)]
    result = numba_fused("bench", *arguments, *options("precision", "ieee", "tf32"), "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == len(bench.CASES) * 2 * len(chosen)
    frame = results.read(out)
    for precision in ("ieee", "tf32"):
        found = results.newest(frame, precision)
        assert list(found) == list(bench.CASES)
        assert [row["variant"] for row in found["2d-3-64"]] == chosen


def test_bench_exits_with_1_when_a_variant_fails(timed: None) -> None:
    assert numba_fused("bench", "--variant", "unfused").exit_code == 1
    assert numba_fused("bench", "--variant", "one_kernel").exit_code == 0


def test_bench_refuses_a_file_of_another_layout_before_it_times(
    timed: None, tmp_path: Path
) -> None:
    out = tmp_path / "rows.csv"
    out.write_text("case,variant\nkb83,torch\n")
    result = numba_fused("bench", "--variant", "torch", "--out", str(out))
    assert result.exit_code == 2
    assert "other columns" in result.output


# ---- profile ----------------------------------------------------------------------------------

KERNELS = {
    "void cudnn::winograd_nonfused::conv<float, 3>(const float *, float *)": 1.0,
    "numba_fused::ladder::rung_10::moments_kernel[abi:v1](Array<float, 1, C, mutable>)": 2.0,
}


def recorded_csv() -> str:
    """The shape of what ncu --csv prints: one line for each launch and metric."""
    columns = "ID,Process ID,Kernel Name,Block Size,Grid Size,Section Name"
    names = [*columns.split(","), "Metric Name", "Metric Unit", "Metric Value"]
    lines = ["==PROF== Connected to process 7", "printed by the call, not by ncu"]
    lines += ["==PROF== Disconnected from process 7", quoted(*names)]
    for index, (kernel, factor) in enumerate(KERNELS.items()):
        values = dict.fromkeys(METRICS.values(), f"{1000 * factor:,.2f}")
        values |= {STALL.format(stall): f"{factor:.2f}" for stall in STALLS}
        values[STALL.format("long_scoreboard")] = f"{10 * factor:.2f}"
        values[METRICS["dram_read"]] = "440,912,640"
        values[METRICS["dram_written"]] = "2,502,400"
        values[METRICS["nanoseconds"]] = "388,800"
        values[METRICS["tensor_pipe"]] = "n/a"
        for metric, value in values.items():
            launch = (str(index), "7", kernel, "(256, 1, 1)", "(132, 1, 1)", "Command line")
            lines.append(quoted(*launch, metric, "unit", value))
    return "\n".join(lines)


def quoted(*cells: str) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


@pytest.fixture
def fake_ncu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An ncu that notes what it is asked and prints what is in `printed`; returns its folder."""
    script = tmp_path / "ncu"
    script.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/printed\n'
        f"cat {tmp_path}/status >&2 2> /dev/null && exit 1\nexit 0\n"
    )
    script.chmod(0o755)
    (tmp_path / "printed").write_text(recorded_csv())
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def test_profile_shows_the_counters_of_every_kernel(fake_ncu: Path) -> None:
    result = numba_fused("profile", "kb83", "library_conv")
    assert result.exit_code == 0, result.output
    text = result.stdout
    assert "DRAM 886.8 MB; the whole call by its ledger: 1,864.8 MB" in " ".join(text.split())
    rows = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert rows["kernel"] == ["conv", "moments_kernel"]
    assert rows["time, us"] == ["388.8", "388.8"]
    assert rows["DRAM GB/s"] == ["1,140", "1,140"]
    assert rows["ALU pipe, %"] == ["1000.0", "2000.0"]
    assert rows["tensor pipe, %"] == []
    assert rows["most waited for"] == ["long_scoreboard", "long_scoreboard"]
    assert len(rows.keys() & {line[0] for line in cli.PROFILE_LINES}) == len(cli.PROFILE_LINES)
    asked = (fake_ncu / "asked").read_text()
    assert "--clock-control none" in asked
    assert asked_of(fake_ncu) == profile.Call("kb83", "library_conv", "ieee", backward=False)


def asked_of(fake_ncu: Path) -> profile.Call:
    """The call that the process under ncu was started for."""
    asked = (fake_ncu / "asked").read_text()
    return profile.Call(**json.loads(asked.partition("-m numba_fused.profile ")[2]))


def test_profile_of_both_passes_counts_against_both_ledgers(fake_ncu: Path, tmp_path: Path) -> None:
    path = tmp_path / "counters.csv"
    both = numba_fused("profile", "kb83", "auto", "--backward", "--out", str(path))
    assert asked_of(fake_ncu) == profile.Call("kb83", "auto", "ieee", backward=True)
    spec = bench.case_spec("kb83")
    moved = bench.both_passes(spec, ladder.get(bench.resolve("auto", spec)))["ledger_bytes"]
    said = " ".join(both.stdout.split())
    assert "kb83, ieee, forward + backward: DRAM 886.8 MB" in said
    assert f"the whole call by its ledger: {moved / 1e6:,.1f} MB" in said
    numba_fused("profile", "kb83", "auto", "--out", str(path))
    rows = results.read_table(path)
    assert list(rows["backward"]) == [True, True, False, False]
    assert len(set(rows["ledger_bytes"])) == 2
    assert "ledger" not in numba_fused("profile", "kb83", "torch", "--backward").stdout
    numba_fused("bench", "--profile", "split", "--precision", "tf32", "--backward")
    assert asked_of(fake_ncu) == profile.Call("kb83", "split", "tf32", backward=True)


def test_profile_of_one_kernel_and_as_json(fake_ncu: Path) -> None:
    by_option = numba_fused("profile", "kb83", "library_conv", "--kernel", "moments", "--json")
    by_bench = numba_fused("bench", "--profile", "library_conv:moments", "--json")
    assert json.loads(by_option.stdout) == json.loads(by_bench.stdout)
    (launch,) = json.loads(by_option.stdout)
    assert launch["kernel"] == "moments_kernel"
    assert launch["top_stall"] == "long_scoreboard 20.00"
    assert launch["tensor_pipe"] is None
    assert launch["grid"] == "(132, 1, 1)"


def test_profile_keeps_the_last_counters_of_each_call(fake_ncu: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows" / "counters.csv"
    for variant in ("library_conv", "torch", "library_conv"):
        result = numba_fused("profile", "kb83", variant, "--out", str(path))
        assert result.exit_code == 0, result.output
    rows = results.read_table(path)
    assert list(rows["variant"]) == ["torch"] * 2 + ["library_conv"] * 2
    assert list(rows["kernel"]) == ["conv", "moments_kernel"] * 2
    assert set(rows["ledger_bytes"]) == {
        profile.ledger_bytes(profile.Call("kb83", v)) for v in ("torch", "library_conv")
    }
    assert set(rows["dram_read"]) == {440_912_640}
    assert not rows["commit"].isna().to_numpy().any()


@pytest.mark.parametrize("width", [100, 150])
def test_profile_table_fits_the_terminal(
    fake_ncu: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    header = recorded_csv().splitlines()[3]
    body = "\n".join(recorded_csv().splitlines()[4:])
    copies = [re.sub(r'^"(\d)"', rf'"{i}\1"', body, flags=re.M) for i in range(5)]
    (fake_ncu / "printed").write_text("\n".join([header, *copies]))
    monkeypatch.setattr(cli, "console", Console(width=width))
    lines = numba_fused("profile", "kb83", "torch").stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert sum(line.count("388.8") for line in lines) == 10


def test_first_calls_are_of_processes_that_share_a_cache_in_pairs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caches: list[Path] = []

    def process(case: str, precision: str, cache: Path) -> float:
        assert (case, precision, cache.is_dir()) == ("kb83-b1", "tf32", True)
        caches.append(cache)
        return 8.0 / len(caches)

    monkeypatch.setattr(first_call, "_in_new_process", process)
    monkeypatch.setattr(bench, "check_gpu", lambda: None)
    path = tmp_path / "first.csv"
    command = ("first-call", "--precision", "tf32", "--repeats", "2", "--out", str(path))
    result = numba_fused(*command)
    assert result.exit_code == 0, result.output
    assert caches[0] == caches[1] != caches[2] == caches[3]
    rows = results.read_table(path)
    assert list(rows["cache"]) == ["cold", "warm"] * 2
    assert list(rows["seconds"]) == [8.0, 4.0, pytest.approx(8 / 3), 2.0]
    cells = {
        line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()
    }
    assert cells["cold"] == ["2.67", "5.33", "8.00"]


def test_a_first_call_that_fails_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "check_gpu", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = numba_fused("first-call")
    assert result.exit_code == 2
    assert "process that was to be timed failed: RuntimeError: " in result.output


def test_profile_without_ncu_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = numba_fused("profile", "kb83", "one_kernel")
    assert result.exit_code == 2
    assert "Nsight Compute" in result.output


def test_profile_repeats_what_ncu_complains_of(fake_ncu: Path) -> None:
    (fake_ncu / "printed").write_text("==ERROR== ERR_NVGPUCTRPERM - no permission\n")
    refused = numba_fused("profile", "kb83", "one_kernel")
    assert refused.exit_code == 2
    assert "ERR_NVGPUCTRPERM" in refused.output
    (fake_ncu / "printed").write_text("")
    (fake_ncu / "status").write_text("Traceback\nRuntimeError: no GPU in the call\n")
    crashed = numba_fused("profile", "kb83", "one_kernel")
    assert crashed.exit_code == 2
    assert "RuntimeError: no GPU in the call" in crashed.output


def test_profile_of_no_such_kernel_names_those_there_are(fake_ncu: Path) -> None:
    result = numba_fused("profile", "kb83", "library_conv", "--kernel", "softmax")
    assert result.exit_code == 2
    assert "it runs: conv, moments_kernel" in result.output


@pytest.mark.parametrize(
    ("printed", "short"),
    [
        (
            "sm80_xmma_fprop_implicit_gemm_f32f32_nn_v1",
            "sm80_xmma_fprop_implicit_gemm_f32f32_nn_v1",
        ),
        ("void at::native::<unnamed>::elementwise_kernel<4, int>(int, T2)", "elementwise_kernel"),
        ("void (anonymous namespace)::RowwiseMoments<float>(long)", "RowwiseMoments"),
        ("cudapy::rung_3::merge_kernel[abi:v1][abi:cw51](Array<int>)", "merge_kernel"),
        ("triton_poi_fused_clamp_0", "triton_poi_fused_clamp_0"),
    ],
)
def test_short_kernel_names(printed: str, short: str) -> None:
    assert short_name(printed) == short
