"""DistributedDataParallel: its gradients are those of one process, whatever the masks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ddp_gradients
import pytest
import torch
import torch.distributed as dist

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["--device", "cpu", "--batch", "2", "--size", "3", "3", "19"]  # two streams a row of masks


def two_processes(*options: str) -> list[str]:
    """The lines that the script prints from two processes; they must have found nothing wrong."""
    command = [*TORCHRUN, str(Path(ddp_gradients.__file__)), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one() -> None:
    """With PyTorch's operators and with a kernel in the simulator."""
    lines = two_processes(*TINY, "--variant", "auto", "one_kernel")
    assert [line.split()[0] for line in lines] == ["auto"] * 5 + ["one_kernel"] * 5
    assert all(line.endswith(": ok") for line in lines)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_gpus_have_the_gradients_of_one(dtype: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    lines = two_processes("--dtype", dtype)
    assert len(lines) == 5
    assert all(line.endswith(": ok") for line in lines)


# ---- the checks themselves ----------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[ddp_gradients.Setting]:
    """A group of one process, whose share is the whole batch."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.manual_seed(1)
    yield ddp_gradients.Setting(
        torch.randn(2, 3, 3, 4, 5), torch.randn(2, 16, 1, 2, 3), "auto", rank=0, ranks=1
    )
    dist.destroy_process_group()


def test_controls_that_show_nothing_fail(
    alone: ddp_gradients.Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one process the ranks' seeds cannot be mixed up and nothing needs reducing."""
    assert not ddp_gradients.settle(alone)
    verdicts = {line[13:27].strip(): line.rpartition(" ")[2] for line in printed(capsys)}
    assert verdicts == {
        "no dropout": "ok",
        "sharded seeds": "ok",
        "drawn seeds": "ok",
        "one seed": "FAILED",
        "not reduced": "FAILED",
    }


def test_a_wrong_gradient_fails(
    alone: ddp_gradients.Setting,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One seed on, a mask is another: what DDP gets no longer fits."""
    monkeypatch.setattr(ddp_gradients, "seed_of_shard", lambda seed, *_: seed + 1)
    assert not ddp_gradients.settle(alone)
    (sharded,) = (line for line in printed(capsys) if "sharded seeds" in line)
    assert sharded.endswith("FAILED")


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()
