"""Every kernel compiles for sm_80 and sm_90a without a GPU: no spills, no stack, no stray fp64.

The kernels and the types of their arguments are taken from the rungs themselves: each rung runs
its `forward` on a launcher that records instead of launching, for shapes that the kernels
specialise on in different ways. A kernel is compiled once, however many shapes share it.
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from definition import BOUNDS
from numba.cuda import dispatcher
from test_ptx import ARCHITECTURES, assembled, compiled, tool

import numba_fused as nf
from numba_fused import ladder, rng
from numba_fused.device.cubins import describe
from numba_fused.ladder.rung import Operands

TENSOR_CORE_RUNGS = ("tensor_core", "split", "pipelined")
SMALL = ((1, 2, 4, 4, 4), (4, 2, 3, 3, 3))
TRAINING = {"dropout_p": 0.2, "training": True}
NUMBERS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "tf32": {"dtype": "float32", "precision": "tf32"},
    "fp64": {"dtype": "float64"},
}

# name: (x shape, weight shape, arguments, numbers)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], list[str]]] = {
    "small": (*SMALL, TRAINING, ["fp32", "tf32", "fp64"]),
    "odd": ((1, 2, 5, 5, 5), (4, 2, 3, 3, 3), {}, ["fp32", "tf32", "fp64"]),
    "strided": (
        (1, 2, 5, 6, 7),
        (4, 2, 3, 3, 3),
        {"stride": 2, "padding": 1},
        ["fp32", "tf32"],
    ),
    "degenerate": (*SMALL, {"cap": BOUNDS["min_value"]}, ["fp32", "fp64"]),
    # One sample of the benchmark case: rows are multiples of 4.
    "quads": ((1, 3, 16, 64, 64), (16, 3, 3, 3, 3), TRAINING, ["fp32", "tf32"]),
}


@dataclass(frozen=True)
class Launch:
    """A kernel, the types of its arguments, and the rung that launches it for a case."""

    rung: str
    case: str
    numbers: str
    kernel: Any
    types: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.kernel.py_func.__name__

    @property
    def id(self) -> str:
        return f"{self.rung}-{self.name}-{self.case}-{self.numbers}"


def recorded(case: str, numbers: str) -> list[Launch]:
    """The launches of every rung that can run the case."""
    x_shape, weight_shape, arguments, _ = CASES[case]
    spec = nf.BlockSpec.from_arguments(
        x_shape, weight_shape, num_groups=2, **(BOUNDS | arguments | NUMBERS[numbers])
    )
    dtype = getattr(torch, spec.dtype)
    vector, seed = torch.zeros(spec.out_channels, dtype=dtype), torch.zeros(1, dtype=torch.int64)
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
    launches: list[Launch] = []

    def record(rung: str, kernel: Any, grid: Any, block: Any, *args: Any, **_: Any) -> None:
        """A launcher, but for the rung; `shared_bytes` and `cooperative` change no machine code."""
        arrays = (arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args)
        types = tuple(numba.typeof(array) for array in arrays)
        launches.append(Launch(rung, case, numbers, kernel, types))

    for rung in ladder.rungs():
        if rung.limit(spec) is None:
            rung.forward(functools.partial(record, rung.name), operands)
    keep = torch.zeros(8, dtype=torch.uint8)
    record("mask", rng.keep_mask_kernel, 1, 32, keep, seed, 4, spec.drop_threshold)
    return launches


LAUNCHES = [
    launch for case in CASES for numbers in CASES[case][-1] for launch in recorded(case, numbers)
]
# The first launch of each kernel and types: a kernel object is one specialisation.
VARIANTS = {(launch.kernel, launch.types): launch for launch in reversed(LAUNCHES)}

# What the disassembly must show where rows are multiples of 4: matrix instructions, asynchronous
# copies past the first-level cache, 128-bit accesses. (rung, numbers): (of every kernel but the
# one that packs the weights, and of the last one, which writes the output).
TILE = ["LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.128"]
STORE = ["STG.E.128"]
INSTRUCTIONS = {
    ("tensor_core", "tf32"): (["HMMA.1688.F32.TF32", *TILE], STORE),
    ("split", "fp32"): (["HMMA.16816.F32", *TILE], STORE),
    ("split", "tf32"): (["HMMA.16816.F32", *TILE], STORE),
    ("pipelined", "fp32"): (["HMMA.16816.F32", *TILE], STORE),
    ("pipelined", "tf32"): (["HMMA.16816.F32", *TILE], STORE),
    ("library_conv", "fp32"): (["LDG.E.128"], STORE),
}


def launches_with_quads(rung: str, numbers: str) -> list[Launch]:
    """A rung's launches for rows of multiples of 4, without the one that packs the weights."""
    return [
        launch
        for launch in LAUNCHES
        if (launch.rung, launch.case, launch.numbers) == (rung, "quads", numbers)
        and launch.name != "pack_weights"
    ]


def wanted_instructions(launch: Launch) -> list[str]:
    """What `INSTRUCTIONS` wants of a launch's kernel, for whichever case it was recorded first."""
    wanted: list[str] = []
    for (rung, numbers), (every, last) in INSTRUCTIONS.items():
        launches = launches_with_quads(rung, numbers)
        for other in launches:
            if (other.kernel, other.types) == (launch.kernel, launch.types):
                wanted += every + last * (other is launches[-1])
    return wanted


def is_slow(launch: Launch, architecture: str) -> bool:
    """Whether it differs from the main variants in two ways at once."""
    differences = (
        architecture != "sm_90a",
        launch.numbers != "fp32",
        launch.case in ("odd", "strided"),
    )
    return sum(differences) > 1


class H200:
    compute_capability = (9, 0)


REGISTERS = 65_536  # of an SM
# Of 128 registers one is missing: a word that is written and read once a tile.
ONE_WORD_SPILLED = {("split-apply_kernel-quads-fp32", "sm_80")}


@pytest.mark.parametrize(
    ("launch", "architecture"),
    [
        pytest.param(
            launch,
            architecture,
            id=f"{launch.id}-{architecture}",
            marks=[pytest.mark.slow] if is_slow(launch, architecture) else [],
        )
        for launch in reversed(VARIANTS.values())
        for architecture in ARCHITECTURES
        # Tensor-core kernels take seconds each: the surplus is left out, not put off.
        if not (launch.rung in TENSOR_CORE_RUNGS and is_slow(launch, architecture))
    ],
)
def test_machine_code(
    launch: Launch, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One test for all that is promised of it: compiling a kernel takes seconds."""
    # Compiling calls of device functions asks for the current GPU: name one instead.
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: H200)
    ptx, cubin = compiled(launch.kernel, launch.types, architecture), tmp_path / "kernel.cubin"
    report = assembled(ptx, architecture, cubin)

    memory = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    registers = re.search(r"Used (\d+) registers", report)
    assert memory, report
    assert registers, report
    if (launch.id, architecture) not in ONE_WORD_SPILLED:
        assert [int(n) for n in memory.groups()] == [0, 0, 0], report
    assert int(memory[2]) <= 4, report
    if bounds := launch.kernel.targetoptions.get("launch_bounds"):
        threads, blocks = bounds if isinstance(bounds, tuple) else (bounds, 1)
        assert int(registers[1]) * threads * blocks <= REGISTERS
    if launch.numbers != "fp64":
        # In numba `float32 * 2` is float64; the simulator, by NumPy's rules, would not notice.
        assert ".f64" not in ptx
    if architecture == "sm_90a" and (wanted := wanted_instructions(launch)):
        found = disassembly(cubin)
        assert [name for name in wanted if f" {name}" not in found] == []


def disassembly(cubin: Path) -> str:
    command = [tool("nvdisasm"), "-c", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("rung", "numbers"), INSTRUCTIONS)
def test_rungs_with_wanted_instructions_are_covered(rung: str, numbers: str) -> None:
    assert launches_with_quads(rung, numbers)


def test_the_cache_can_tell_every_kernel_by_its_contents() -> None:
    """`cubins.fingerprint` refuses a kernel whose closure holds what has no contents."""
    for launch in VARIANTS.values():
        assert describe(launch.kernel)


def test_every_rung_with_kernels_is_covered() -> None:
    launching = {launch.rung for launch in LAUNCHES}
    assert {rung.name for rung in ladder.rungs() if rung.number > 0} <= launching
