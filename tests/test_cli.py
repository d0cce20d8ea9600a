"""The command line: what it prints, what it writes, how it exits."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from numba_fused import cli, demo, environment, ladder, verify
from numba_fused.environment import advise

ROOT = Path(__file__).parents[1]
COMMANDS = ("demo", "verify", "explain", "env", "bench", "plot")


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
        ["bench", "--threads-per-block", "100"],
        ["plot", "--rows", "/nowhere/rows.csv"],
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
    assert all(name in result.output for name in ladder.names())


# ---- demo -------------------------------------------------------------------------------------


def test_demo_runs_every_rung_and_draws(tiny_demo: Path) -> None:
    result = numba_fused("demo", "--figure", str(tiny_demo))
    assert result.exit_code == 0, result.output
    assert tiny_demo.read_bytes().startswith(b"\x89PNG")
    for rung in ladder.rungs():
        line = next(
            text for text in result.output.splitlines() if f" {rung.number} {rung.name} " in text
        )
        assert "right" in line or "skipped" in line
    assert max(map(len, result.output.splitlines())) <= 80


def test_demo_counts_what_the_ledgers_predict(tiny_demo: Path) -> None:
    result = numba_fused("demo", "--figure", str(tiny_demo), "--json")
    lines = json.loads(result.stdout)
    assert [line["name"] for line in lines] == ladder.names()
    ours = [line for line in lines if line["counted_launches"] is not None]
    assert {"unfused", "pointwise", "epilogue", "one_kernel"} <= {line["name"] for line in ours}
    for line in lines:
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
    assert result.output.count("WRONG") == 1


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
