"""What the hardware counted: one call of a variant under Nsight Compute's ``ncu``.

``ncu`` runs this module in a process of its own (`main`), which warms up, then marks one call
for the profiler. Every kernel of that call, PyTorch's included, is replayed from a cold cache until
all counters are taken; the clock is left alone, so durations agree with `bench`.
"""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from numba_fused import results
from numba_fused.results import COMPILED, EAGER

if TYPE_CHECKING:
    from numba_fused.spec import BlockSpec

# The counter's field in `KernelCounters`, and its name in ncu for compute capability 8.0 and 9.0.
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "issue_active": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "ipc": "sm__inst_executed.avg.per_cycle_active",
    "tensor_pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "alu_pipe": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "fma_pipe": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l2_hit_rate": "lts__t_sector_hit_rate.pct",
}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "branch_resolving",
    "dispatch_stall",
    "drain",
    "imc_miss",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "membar",
    "mio_throttle",
    "no_instruction",
    "not_selected",
    "short_scoreboard",
    "sleeping",
    "wait",
)
WARM_UPS = 3


@dataclass(frozen=True)
class Call:
    """Which call is profiled; `bench.run` says what the fields may be.

    Attributes
    ----------
    case, variant, precision : str
    backward : bool
        Count forward and backward pass, all five gradients, and not forward alone.
    """

    case: str
    variant: str
    precision: str = "ieee"
    backward: bool = False


@dataclass(frozen=True)
class KernelCounters:
    """The counters of one kernel launch; None where this GPU does not count.

    Attributes
    ----------
    kernel : str
        Name without namespaces, template and call arguments.
    grid, block : str
        As ``ncu`` prints them.
    nanoseconds : float
    dram_read, dram_written : float
        Bytes.
    issue_active, tensor_pipe, alu_pipe, fma_pipe : float
        Percent of the cycles an SM is active: that a scheduler issues, that a pipe is busy.
    instructions : float
        Warp instructions.
    ipc : float
        Of them per active cycle and SM.
    shared_wavefronts, bank_conflicts : float
        Cycles of the shared-memory data pipe, and how many of them conflicts cost.
    registers : float
        Per thread.
    shared_bytes : float
        Shared memory per block.
    occupancy : float
        Warps resident, percent of what an SM can hold, while it is active.
    l2_hit_rate : float
        Percent of the sectors.
    top_stall : str or None
        What warps wait for most, and how many of them at every issue.
    """

    kernel: str
    grid: str
    block: str
    nanoseconds: float | None
    dram_read: float | None
    dram_written: float | None
    issue_active: float | None
    instructions: float | None
    ipc: float | None
    tensor_pipe: float | None
    alu_pipe: float | None
    fma_pipe: float | None
    shared_wavefronts: float | None
    bank_conflicts: float | None
    registers: float | None
    shared_bytes: float | None
    occupancy: float | None
    l2_hit_rate: float | None
    top_stall: str | None

    @property
    def dram_gb_per_s(self) -> float | None:
        """DRAM bytes read and written per nanosecond."""
        if not self.nanoseconds or self.dram_read is None or self.dram_written is None:
            return None
        return (self.dram_read + self.dram_written) / self.nanoseconds

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for ``json.dumps``."""
        return {**asdict(self), "dram_gb_per_s": self.dram_gb_per_s}


def run(call: Call, kernel: str = "") -> list[KernelCounters]:
    """Profile one call of a variant on a benchmark case.

    Parameters
    ----------
    call : Call
    kernel : str
        Keep the kernels whose name contains this.

    Returns
    -------
    list of KernelCounters
        In the order of their launches.

    Raises
    ------
    ValueError
        Unknown case or variant, a variant that cannot run the case, or no such kernel.
    RuntimeError
        There is no ``ncu``, or it failed; the message holds what it said.
    """
    from numba_fused import bench, ladder

    bench.check_variant(call.variant)
    spec = bench.case_spec(call.case, precision=call.precision)
    if call.variant != COMPILED:
        rung = ladder.get(bench.resolve(call.variant, spec))
        if reason := rung.obstacle(spec, ladder.capability()):
            raise ValueError(f"variant {call.variant!r} cannot run {call.case}: {reason}")
    found = parse(_under_ncu(call))
    kept = [counters for counters in found if kernel in counters.kernel]
    if not kept:
        names = ", ".join(sorted({counters.kernel for counters in found})) or "none"
        raise ValueError(
            f"no kernel of {call.variant} has {kernel!r} in its name; it runs: {names}"
        )
    return kept


def ledger_bytes(call: Call) -> int | None:
    """What the call should move by its ledgers; None where PyTorch computes, which has none."""
    from numba_fused import bench, ladder

    if call.variant == COMPILED or (call.variant == EAGER and call.backward):
        return None
    spec = bench.case_spec(call.case, precision=call.precision)
    rung = ladder.get(bench.resolve(call.variant, spec))
    if call.backward:
        return bench.both_passes(spec, rung).get("ledger_bytes")
    return rung.ledger(spec).bytes_moved


def keep(counters: Sequence[KernelCounters], call: Call, ledger: int | None, path: Path) -> None:
    """Write a call's counters to a file, in place of those it has of the same call.

    A row a launch: the fields of `Call`, `ledger_bytes` of the whole call, the fields of
    `KernelCounters`, and where and with what they were counted (`results.provenance`).

    Raises
    ------
    ValueError, RuntimeError
        As `results.check_table`.
    """
    what = asdict(call)
    common = what | {"ledger_bytes": ledger}
    origin = results.provenance()
    rows = pd.DataFrame([{**common, **c.to_dict(), **origin} for c in counters])
    if path.exists():
        known = results.read_table(path)
        others = ~(known[list(what)] == pd.Series(what)).all(axis="columns")
        rows = pd.concat([known.loc[others], rows], ignore_index=True)
    results.write_table(rows, path)


def _under_ncu(call: Call) -> str:
    """What ``ncu`` prints about the call that `main` marks."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError(
            "profiling needs ncu, which is part of NVIDIA Nsight Compute and of the CUDA toolkit: "
            "install it and put it on PATH (it is often in /usr/local/cuda/bin)"
        )
    metrics = [*METRICS.values(), *map(STALL.format, STALLS)]
    command = [ncu, "--csv", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(metrics)]
    command += [sys.executable, "-m", "numba_fused.profile", json.dumps(asdict(call))]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = re.findall(r"^==ERROR== .*", done.stdout, flags=re.MULTILINE)
    if done.returncode or errors:
        # The last thing the call itself said is the message of its exception.
        said = [*errors, *done.stderr.strip().splitlines()[-1:]]
        raise RuntimeError(f"ncu failed with status {done.returncode}: {' '.join(said)}")
    return done.stdout


def parse(printed: str) -> list[KernelCounters]:
    """The counters in ``ncu --csv``'s output, which has a row for each launch and metric."""
    lines = printed.splitlines()
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[header:] if line.startswith('"')):
        launch = launches.setdefault(row["ID"], {"Kernel Name": row["Kernel Name"]})
        launch |= {"Grid Size": row.get("Grid Size", ""), "Block Size": row.get("Block Size", "")}
        launch[row["Metric Name"]] = row["Metric Value"]
    return [_counters(launch) for launch in launches.values()]


def _counters(launch: dict[str, str]) -> KernelCounters:
    numbers = {name: _number(launch.get(metric)) for name, metric in METRICS.items()}
    return KernelCounters(
        kernel=short_name(launch["Kernel Name"]),
        grid=launch["Grid Size"],
        block=launch["Block Size"],
        top_stall=_top_stall(launch),
        **numbers,
    )


def _top_stall(launch: dict[str, str]) -> str | None:
    stalls = {name: _number(launch.get(STALL.format(name))) for name in STALLS}
    counted = {name: warps for name, warps in stalls.items() if warps is not None}
    if not counted:
        return None
    top = max(counted, key=lambda name: counted[name])
    return f"{top} {counted[top]:.2f}"


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # "n/a"
        return None


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template, ABI tag and arguments.

    >>> short_name("cudapy::numba_fused::ladder::rung_1_unfused::min_kernel[abi:v1](Array<float>)")
    'min_kernel'
    """
    name = re.sub(r"(\(anonymous namespace\)|<unnamed>)::", "", kernel)
    found = re.search(r"(\w+)(?=[<(\[]|$)", name)
    return found[1] if found else kernel


def main(call: Call) -> None:
    """Warm up, then run the call between the profiler's marks: what ``ncu`` starts."""
    import torch

    from numba_fused import bench
    from numba_fused.reference import convolution_precision

    torch.backends.cudnn.benchmark = True
    spec = bench.case_spec(call.case, precision=call.precision)
    compute = _both_passes(call, spec) if call.backward else _forward(call, spec)
    with torch.set_grad_enabled(call.backward), convolution_precision(spec):
        for _ in range(WARM_UPS):
            compute()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        compute()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _forward(call: Call, spec: BlockSpec) -> Callable[[], object]:
    """The forward pass, into an output that is there."""
    import torch

    from numba_fused import bench, ladder

    inputs = bench.random_inputs(spec, 0)
    if call.variant in (COMPILED, EAGER):
        return functools.partial(bench.torch_chain(call.variant), spec, *inputs)
    seed = torch.tensor([bench.DROPOUT_SEED], device="cuda")
    out = torch.empty(spec.output_shape, device="cuda")
    rung = bench.resolve(call.variant, spec)
    return functools.partial(ladder.run, rung, *inputs, spec=spec, seed=seed, out=out)


def _both_passes(call: Call, spec: BlockSpec) -> Callable[[], object]:
    """Forward by the variant, backward as the public function does it."""
    import torch

    from numba_fused import bench

    inputs = bench.random_inputs(spec, 0)
    grad_out = bench.random_grad_out(spec, inputs, 0)
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]
    if call.variant in (COMPILED, EAGER):
        forward = functools.partial(bench.torch_chain(call.variant), spec)
    else:
        seed = torch.tensor([bench.DROPOUT_SEED], device="cuda")
        forward = bench.public_block(call.case, call.variant, call.precision, seed)
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad_out)


if __name__ == "__main__":
    main(Call(**json.loads(sys.argv[1])))
