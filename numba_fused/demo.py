"""The first thing a newcomer runs: every rung, on a real problem, with the proof beside it.

With a GPU it is the benchmark case, timed. Without one it is a miniature of it in the simulator,
which runs the same kernels from the same source and counts every byte they move.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from numba_fused import bench, ladder
from numba_fused.spec import BlockSpec
from numba_fused.verify import Tensors, Yardstick, mask_of, poisoned, yardstick

CASE = "kb83"
# The benchmark case with a small volume: same channels, kernel and groups, whole runs of 16.
MINIATURE = BlockSpec.from_arguments(
    (2, 3, 4, 5, 18), (16, 3, 3, 3, 3), num_groups=8, **bench.CHAIN
)
SEED = 83


@dataclass(frozen=True)
class Line:
    """One row of the demo's table; None where a column does not apply.

    Attributes
    ----------
    number, name, idea
        The rung's.
    verdict : str
        ``"right"``, or ``"skipped"`` or ``"WRONG"`` and why.
    launches, bytes_read, bytes_written : int
        Predicted by the rung's ledger.
    counted_launches, counted_bytes : int
        What the simulator saw; bytes are read plus written.
    milliseconds : float
        GPU time.
    sectors : int
        32-byte sectors that warps asked the caches for, in the simulator.
    error, bound : float
        Relative error against fp64, and the largest that passes.
    """

    number: int
    name: str
    idea: str
    verdict: str
    launches: int
    bytes_read: int
    bytes_written: int
    counted_launches: int | None = None
    counted_bytes: int | None = None
    milliseconds: float | None = None
    sectors: int | None = None
    error: float | None = None
    bound: float | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.verdict.startswith("WRONG")


def spec() -> BlockSpec:
    """The problem the demo runs on this machine."""
    return bench.case_spec(CASE) if torch.cuda.is_available() else MINIATURE


def run() -> Iterator[Line]:
    """Run every rung on this machine's problem and judge it."""
    return _on_gpu() if torch.cuda.is_available() else _in_simulator()


def _on_gpu() -> Iterator[Line]:
    of_rung = {rung.name: at_its_precision(rung, spec()).precision for rung in ladder.rungs()}
    runs = itertools.groupby(ladder.names(), key=of_rung.__getitem__)
    for row in itertools.chain.from_iterable(
        bench.run(CASE, list(names), precision=precision) for precision, names in runs
    ):
        rung = ladder.get(row["variant"])
        ledger = rung.ledger(bench.case_spec(CASE))
        verdicts = {"ok": "right", "skipped": "skipped", "failed": "WRONG"}
        verdict = verdicts[row["status"]]
        yield Line(
            rung.number,
            rung.name,
            rung.idea,
            f"{verdict}: {row['reason']}" if row.get("reason") else verdict,
            ledger.launches,
            ledger.bytes_read,
            ledger.bytes_written,
            milliseconds=row.get("p50_ms"),
            error=row.get("error"),
            bound=row.get("error_bound"),
        )


def _in_simulator() -> Iterator[Line]:
    tensors = _inputs(MINIATURE)
    keep = mask_of(MINIATURE, SEED, "cpu")
    for rung in ladder.rungs():
        problem = at_its_precision(rung, MINIATURE)
        yield simulate(rung, problem, tensors, yardstick(problem, tensors, keep), keep)


def at_its_precision(rung: ladder.Rung, spec: BlockSpec) -> BlockSpec:
    """`spec`, in TF32 for a rung that knows nothing else."""
    coarse = replace(spec, precision="tf32")
    return coarse if rung.limit(spec) and not rung.limit(coarse) else spec


def simulate(
    rung: ladder.Rung,
    spec: BlockSpec,
    tensors: Tensors,
    ruler: Yardstick,
    keep: torch.Tensor | None,
) -> Line:
    """Run one rung in the simulator, count what it does and judge its output."""
    from numba_fused.simulator import Simulator

    ledger = rung.ledger(spec)
    identity = (rung.number, rung.name, rung.idea)
    predicted = (ledger.launches, ledger.bytes_read, ledger.bytes_written)
    if reason := rung.obstacle(spec, ladder.capability()):
        return Line(*identity, f"skipped: {reason}", *predicted)
    simulator, start = Simulator(count=True), time.perf_counter()
    out = poisoned(spec, "cpu")
    try:
        ladder.run(rung.name, *tensors, spec=spec, seed=SEED, out=out, simulator=simulator)
    except Exception as problem:  # one rung's crash is its verdict; the others still run
        return Line(*identity, f"WRONG: {type(problem).__name__}: {problem}", *predicted)
    seconds = time.perf_counter() - start
    result = ruler.judge(out, keep)
    # What PyTorch's own kernels move, nobody here counts.
    ours = not ledger.library_launches
    touched = [line for launch in simulator.launches for line in launch.lines]
    return Line(
        *identity,
        "right" if result.ok else f"WRONG: {result.reason}",
        *predicted,
        counted_launches=len(simulator.launches) if ours else None,
        counted_bytes=simulator.bytes_read + simulator.bytes_written if ours else None,
        sectors=sum(line.sectors for line in touched) if ours else None,
        error=result.error,
        bound=result.bound,
        seconds=seconds,
    )


def _inputs(spec: BlockSpec) -> Tensors:
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    channels = spec.out_channels
    return Tensors(
        normal(*spec.x_shape),
        normal(*spec.weight_shape) / 9,  # 81 taps: z comes out with variance 1
        normal(channels),
        1 + 0.5 * normal(channels),
        0.5 * normal(channels),
    )
