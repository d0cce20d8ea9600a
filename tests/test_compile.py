"""Every kernel compiles for sm_80 and sm_90a without a GPU: no spills, no stack, no stray fp64.

The kernels and the types of their arguments are taken from the rungs themselves: each rung runs
its `forward` on a launcher that records instead of launching.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from numba import cuda
from numba.cuda import dispatcher

import numba_fused as nf
from numba_fused import ladder, rng
from numba_fused.ladder.rung import Operands

ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Recorder:
    """A launcher that notes which kernel is launched with which argument types."""

    def __init__(self) -> None:
        self.launches: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, kernel: Any, grid: int, block: int, *args: Any) -> None:
        types = tuple(
            numba.typeof(arg.numpy() if isinstance(arg, torch.Tensor) else arg) for arg in args
        )
        self.launches[kernel.py_func.__name__] = (kernel, types)


def recorded(dtype_name: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Kernel and signature of every launch of every rung, by kernel name."""
    dtype = DTYPES[dtype_name]
    spec = nf.BlockSpec.from_arguments(
        (1, 2, 4, 4, 4),
        (4, 2, 3, 3, 3),
        num_groups=2,
        min_value=-1.0,
        max_value=1.0,
        cap=0.5,
        dropout_p=0.2,
        training=True,
        dtype=dtype_name,
    )
    recorder = Recorder()
    vector = torch.zeros(4, dtype=dtype)
    seed = torch.zeros(1, dtype=torch.int64)
    operands = Operands(
        spec=spec,
        x=torch.zeros(spec.x_shape, dtype=dtype).view(-1),
        weight=torch.zeros(spec.weight_shape, dtype=dtype).view(-1),
        bias=vector,
        gamma=vector,
        beta=vector,
        seed=seed,
        out=torch.zeros(spec.output_shape, dtype=dtype).view(-1),
        threads_per_block=128,
    )
    for rung in ladder.rungs():
        rung.forward(recorder, operands)
    keep = torch.zeros(8, dtype=torch.uint8)
    recorder(rng.keep_mask_kernel, 1, 32, keep, seed, 4, spec.drop_threshold)
    return recorder.launches


LAUNCHES = {name: recorded(name) for name in DTYPES}
KERNELS = [
    pytest.param(dtype, kernel, id=f"{kernel}-{dtype}")
    for dtype, launches in LAUNCHES.items()
    for kernel in launches
]


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling calls of device functions asks for the current GPU: name one instead."""

    class H200:
        compute_capability = (9, 0)

    monkeypatch.setattr(dispatcher, "get_current_device", lambda: H200)


def compile_ptx(dtype: str, kernel: str, architecture: str) -> str:
    dispatched, types = LAUNCHES[dtype][kernel]
    ptx, _ = cuda.compile_ptx(
        dispatched.py_func,
        types,
        cc=ARCHITECTURES[architecture],
        launch_bounds=dispatched.targetoptions.get("launch_bounds"),
    )
    return ptx


def find_ptxas() -> Path:
    nvidia = pytest.importorskip("nvidia", reason="pip install nvidia-cuda-nvcc brings ptxas")
    found = [p for root in nvidia.__path__ for p in Path(root).rglob("bin/ptxas")]
    assert found, "no ptxas in the nvidia-cuda-nvcc package"
    return found[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "kernel"), KERNELS)
def test_assembles_without_spills_or_stack(
    dtype: str, kernel: str, architecture: str, tmp_path: Path
) -> None:
    source = tmp_path / "kernel.ptx"
    source.write_text(compile_ptx(dtype, kernel, architecture))
    command = [find_ptxas(), "-v", f"-arch={architecture}", source, "-o", tmp_path / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    assert numbers, report
    assert [int(n) for n in numbers.groups()] == [0, 0, 0], report


@pytest.mark.parametrize("kernel", LAUNCHES["float32"])
def test_fp32_kernels_compute_in_fp32(kernel: str) -> None:
    """In numba `float32 * 2` is float64; the simulator, by NumPy's rules, would not notice."""
    assert ".f64" not in compile_ptx("float32", kernel, "sm_90a")


def test_every_rung_with_kernels_is_covered() -> None:
    assert len(LAUNCHES["float32"]) >= len(ladder.rungs())
