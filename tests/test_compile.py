"""Every kernel compiles for sm_80 and sm_90a without a GPU: no spills, no stack, no stray fp64.

The kernels and the types of their arguments are taken from the rungs themselves: each rung runs
its `forward` on a launcher that records instead of launching, for shapes that the kernels
specialise on in different ways. A kernel is compiled once, however many shapes share it.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from definition import BOUNDS
from numba.cuda import dispatcher
from test_ptx import ARCHITECTURES, assembled, compiled, disassembly

import numba_fused as nf
from numba_fused import ladder, rng
from numba_fused.device.cubins import describe
from numba_fused.ladder import tensor_cores
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
    "small": (*SMALL, TRAINING, ["fp32", "fp64"]),
    "odd": ((1, 2, 5, 5, 5), (4, 2, 3, 3, 3), {}, ["fp32", "fp64"]),
    "strided": (
        (1, 2, 5, 6, 7),
        (4, 2, 3, 3, 3),
        {"stride": 2, "padding": 1},
        ["fp32"],
    ),
    "degenerate": (*SMALL, {"cap": BOUNDS["min_value"]}, ["fp32", "fp64"]),
    # One sample of the benchmark case, kb83: rows are multiples of 4.
    "quads": (
        (1, 3, 16, 64, 64),
        (16, 3, 3, 3, 3),
        {"num_groups": 8, **TRAINING},
        ["fp32", "tf32"],
    ),
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


def recorded(case: str, numbers: str, bulk_copies: bool = True) -> list[Launch]:
    """The launches of every rung that can run the case, on a GPU with or without a copy engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_cores, "has_bulk_copies", lambda device: bulk_copies)
        return _recorded(case, numbers)


def _recorded(case: str, numbers: str) -> list[Launch]:
    x_shape, weight_shape, arguments, _ = CASES[case]
    given: dict[str, Any] = {"num_groups": 2, **BOUNDS, **arguments, **NUMBERS[numbers]}
    spec = nf.BlockSpec.from_arguments(x_shape, weight_shape, **given)
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
        statistics=torch.empty(0),
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


def all_recorded(bulk_copies: bool) -> list[Launch]:
    return [
        launch
        for case in CASES
        for numbers in CASES[case][-1]
        for launch in recorded(case, numbers, bulk_copies)
    ]


# What each architecture runs: sm_80 has neither a copy engine nor instructions for one.
ALL_LAUNCHES = {"sm_90a": all_recorded(True), "sm_80": all_recorded(False)}
LAUNCHES = ALL_LAUNCHES["sm_90a"]
# The first launch of each kernel and types: a kernel object is one specialisation.
VARIANTS = {
    architecture: {(launch.kernel, launch.types): launch for launch in reversed(launches)}
    for architecture, launches in ALL_LAUNCHES.items()
}

# What the disassembly must show where rows are multiples of 4: matrix instructions, asynchronous
# copies past the first-level cache, 128-bit accesses. (rung, numbers): (of every kernel but the
# one that packs the weights, and of the last one, which writes the output).
TILE = ["LDGSTS.E.BYPASS.128", "LDS.128", "LDG.E.128"]
STORE = ["STG.E.128"]
COPY_ENGINE = ["FENCE.VIEW.ASYNC.S", "UBLKCP.G.S"]
TELL, TOLD = "STG.E.64.STRONG.GPU", ["LDG.E.64.STRONG.GPU"]  # what blocks publish
INSTRUCTIONS = {
    ("tensor_core", "tf32"): (["HMMA.1688.F32.TF32", *TILE], [*TOLD, *COPY_ENGINE]),
    ("split", "fp32"): (["HMMA.16816.F32", *TILE], [*TOLD, *COPY_ENGINE]),
    ("split", "tf32"): (["HMMA.16816.F32", *TILE], [*TOLD, *COPY_ENGINE]),
    ("pipelined", "fp32"): (["HMMA.16816.F32", *TILE, TELL], [*TOLD, *COPY_ENGINE]),
    ("pipelined", "tf32"): (["HMMA.16816.F32", *TILE, TELL], [*TOLD, *COPY_ENGINE]),
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


def is_surplus(launch: Launch, architecture: str) -> bool:
    """Whether it differs from the main variants in two ways at once: compiling takes seconds."""
    differences = (
        architecture != "sm_90a",
        launch.numbers != "fp32",
        launch.case in ("odd", "strided"),
    )
    return sum(differences) > 1


class H200:
    compute_capability = (9, 0)


REGISTERS = 65_536  # of an SM
# Tile kernels add up sums of a tile and of a group in fp64: conversions to it and back that their
# source has. One more would be a stray one.
DOUBLES = {
    "pack_weights": (0, 0),
    "statistics_kernel": (3, 0),
    "apply_kernel": (0, 2),
    "pipelined": (3, 2),
}


@pytest.mark.parametrize(
    ("launch", "architecture"),
    [
        pytest.param(
            launch,
            architecture,
            id=f"{launch.id}-{architecture}",
        )
        for architecture in ARCHITECTURES
        for launch in reversed(VARIANTS[architecture].values())
        if not is_surplus(launch, architecture)
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
    assert [int(n) for n in memory.groups()] == [0, 0, 0], report
    if bounds := launch.kernel.targetoptions.get("launch_bounds"):
        threads, blocks = bounds if isinstance(bounds, tuple) else (bounds, 1)
        assert int(registers[1]) * threads * blocks <= REGISTERS
    if launch.numbers != "fp64":
        # In numba `float32 * 2` is float64; the simulator, by NumPy's rules, would not notice.
        if launch.rung in TENSOR_CORE_RUNGS:
            there, back = (ptx.count(f"cvt.{kinds}") for kinds in ("f64.f32", "rn.f32.f64"))
            assert (there, back) == DOUBLES[launch.name]
            assert not re.search(r"cvt\.rn\.f64\.[su]", ptx)
        else:
            assert ".f64" not in ptx
    if architecture == "sm_90a" and (wanted := wanted_instructions(launch)):
        found = disassembly(cubin)
        assert [name for name in wanted if f" {name}" not in found] == []


@pytest.mark.parametrize(("rung", "numbers"), INSTRUCTIONS)
def test_rungs_with_wanted_instructions_are_covered(rung: str, numbers: str) -> None:
    assert launches_with_quads(rung, numbers)


def test_the_cache_can_tell_every_kernel_by_its_contents() -> None:
    """`cubins.fingerprint` refuses a kernel whose closure holds what has no contents."""
    for launch in VARIANTS["sm_90a"].values():
        assert describe(launch.kernel)


def test_every_rung_with_kernels_is_covered() -> None:
    launching = {launch.rung for launch in LAUNCHES}
    assert {rung.name for rung in ladder.rungs() if rung.number > 0} <= launching
