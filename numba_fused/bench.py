"""Time the rungs on a GPU: check, time, check again.

A call is timed on the GPU alone, by events around replays of a CUDA graph, so that Python's
launch cost does not hide in it; that cost is measured by itself, as `host_us`. The graph goes
through several sets of inputs and outputs that together exceed twice the L2 cache, so every call
finds its input in memory, not in cache. Outputs are filled with NaN before they are timed and
judged after it against fp64: a kernel that is fast because it is wrong has no time here.

PyTorch runs as it comes: its own dropout (it is not charged for our mask), its default
precision, cudnn.benchmark on.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from numba_fused import ladder, results
from numba_fused.reference import chain
from numba_fused.results import COMPILED, Row, variants
from numba_fused.spec import BlockSpec
from numba_fused.verify import Tensors, Yardstick, mask_of, poisoned, relative_error, yardstick

# Never degenerate: cap is above min_value.
CHAIN = {"min_value": -1.0, "max_value": 1.0, "cap": 0.5, "dropout_p": 0.2, "training": True}
CASES: dict[str, dict[str, Any]] = {
    "kb83": {"x": (128, 3, 16, 64, 64), "weight": (16, 3, 3, 3, 3), "num_groups": 8},
    "kb83-v0": {"x": (128, 3, 16, 32, 32), "weight": (16, 3, 3, 3, 3), "num_groups": 8},
    "kb83-b16": {"x": (16, 3, 16, 64, 64), "weight": (16, 3, 3, 3, 3), "num_groups": 8},
    "kb83-b1": {"x": (1, 3, 16, 64, 64), "weight": (16, 3, 3, 3, 3), "num_groups": 8},
}
DROPOUT_SEED = 83
SAMPLES = 30
SAMPLE_MS = 3.0  # a timed sample is at least this long: event resolution is 0.5 us
MIN_SETS = 3
# PyTorch's default precision admits TF32 convolutions; their error is shown, not judged.
BASELINE_BOUND = 2e-3

Call: TypeAlias = Callable[[int], Tensor]


def case_spec(name: str, dtype: str = "float32") -> BlockSpec:
    """The spec of a named benchmark case.

    Raises
    ------
    ValueError
        No case has that name; the message names those there are.
    """
    if name not in CASES:
        raise ValueError(f"unknown case {name!r}: use one of {', '.join(CASES)}")
    parameters = dict(CASES[name])
    x, weight = parameters.pop("x"), parameters.pop("weight")
    return BlockSpec.from_arguments(x, weight, dtype=dtype, **CHAIN, **parameters)


@dataclass
class Workload:
    """One case on one GPU: rotating inputs and outputs, and the right answers of two of them."""

    name: str
    spec: BlockSpec
    inputs: list[Tensors]
    outs: list[Tensor]
    seed: Tensor
    keep_mask: Tensor | None
    yardsticks: tuple[Yardstick, Yardstick]
    copy_bytes_per_second: float

    @classmethod
    def build(cls, name: str, dtype: str = "float32") -> Workload:
        """Draw the inputs and compute the fp64 answers on the current GPU."""
        spec = case_spec(name, dtype)
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        sets = max(MIN_SETS, math.ceil(2 * l2_bytes / spec.compulsory_bytes) + 1)
        inputs = [_random_inputs(spec, index) for index in range(sets)]
        keep_mask = mask_of(spec, DROPOUT_SEED, "cuda")
        return cls(
            name=name,
            spec=spec,
            inputs=inputs,
            outs=[poisoned(spec, "cuda") for _ in range(sets)],
            seed=torch.tensor([DROPOUT_SEED], device="cuda"),
            keep_mask=keep_mask,
            yardsticks=(
                yardstick(spec, inputs[0], keep_mask),
                yardstick(spec, inputs[-1], keep_mask),
            ),
            copy_bytes_per_second=copy_bandwidth(),
        )

    def row(self) -> Row:
        """The columns that all variants of the case share."""
        spec = self.spec
        return {
            "case": self.name,
            "x_shape": "x".join(map(str, spec.x_shape)),
            "weight_shape": "x".join(map(str, spec.weight_shape)),
            "num_groups": spec.num_groups,
            "dropout_p": spec.dropout_p if spec.draws else 0.0,
            "dtype": spec.dtype,
            "input_sets": len(self.inputs),
            "compulsory_bytes": spec.compulsory_bytes,
            "copy_gb_per_s": self.copy_bytes_per_second / 1e9,
            "floor_ms": self.floor_ms,
            "torch_error": self.yardsticks[0].torch_error,
            **results.provenance(),
        }

    @property
    def floor_ms(self) -> float:
        """Time to copy the compulsory bytes."""
        return 1e3 * self.spec.compulsory_bytes / self.copy_bytes_per_second


def run(
    name: str, chosen: Sequence[str] | None = None, threads_per_block: int = 256
) -> Iterator[Row]:
    """Measure variants of a benchmark case on the current GPU.

    Parameters
    ----------
    name : str
        One of `CASES`.
    chosen : sequence of str, optional
        Variants; all by default.
    threads_per_block : int
        For the rungs that take it.

    Yields
    ------
    dict
        One row a variant; a variant that is wrong, crashes or cannot run has a row that says so.

    Raises
    ------
    RuntimeError
        There is no GPU.
    ValueError
        Unknown case or variant.
    """
    chosen = check_usage(name, chosen)
    with _cudnn_benchmark():
        workload = Workload.build(name)
        for variant in chosen:
            yield workload.row() | measure(workload, variant, threads_per_block)


def check_usage(name: str, chosen: Sequence[str] | None) -> list[str]:
    """The variants to time; raises what `run` would raise, before anything is built."""
    case_spec(name)
    for variant in chosen or ():
        if variant != COMPILED:
            ladder.get(variant)
    if not torch.cuda.is_available():
        raise RuntimeError("timing needs a CUDA GPU and a torch built for it: see numba-fused env")
    return list(chosen or variants())


def measure(workload: Workload, variant: str, threads_per_block: int = 256) -> Row:
    """The columns that depend on the variant."""
    spec = workload.spec
    row: Row = {"variant": variant, "status": "ok"}
    if variant != COMPILED:
        rung = ladder.get(variant)
        if reason := rung.limit(spec):
            return row | {"status": "skipped", "reason": reason}
        ledger = rung.ledger(spec, threads_per_block)
        row |= {"launches": ledger.launches, "ledger_bytes": ledger.bytes_moved}
        if rung.takes_threads_per_block:
            row["threads_per_block"] = threads_per_block
    baseline = variant in (COMPILED, ladder.names()[0])
    try:
        if baseline:
            return row | _measure_baseline(workload, compiled=variant == COMPILED)
        return row | _measure_rung(workload, variant, threads_per_block)
    except Exception as problem:  # a crash is a row with its reason, not a hole
        reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        return row | {"status": "failed", "reason": reason}
    finally:
        torch.cuda.empty_cache()


def _measure_rung(workload: Workload, variant: str, threads_per_block: int) -> Row:
    def call(index: int) -> Tensor:
        return ladder.run(
            variant,
            *workload.inputs[index],
            spec=workload.spec,
            seed=workload.seed,
            out=workload.outs[index],
            threads_per_block=threads_per_block,
        )

    for out in workload.outs:
        out.copy_(poisoned(workload.spec, "cuda"))
    before = workload.yardsticks[0].judge(call(0), workload.keep_mask)
    row: Row = {"error": before.error, "error_bound": before.bound}
    if not before.ok:
        return row | {"status": "failed", "reason": before.reason}
    row |= time_calls(call, len(workload.inputs))
    after = workload.yardsticks[1].judge(workload.outs[-1], workload.keep_mask)
    row["error"] = max(before.error, after.error)
    if not after.ok:
        return row | {"status": "failed", "reason": f"after timing: {after.reason}"}
    return row | _plausible(row["p50_ms"], workload.floor_ms)


def _measure_baseline(workload: Workload, *, compiled: bool) -> Row:
    spec = workload.spec
    function = torch.compile(native_chain, dynamic=False) if compiled else native_chain
    last: list[Tensor] = []

    def call(index: int) -> Tensor:
        with torch.no_grad():
            last[:] = [function(spec, *workload.inputs[index])]
        return last[0]

    error, reason = _baseline_error(workload, call(0), 0)
    row: Row = {"error": error, "error_bound": BASELINE_BOUND}
    if reason:
        return row | {"status": "failed", "reason": reason}
    row |= time_calls(call, len(workload.inputs))
    return row | _plausible(row["p50_ms"], workload.floor_ms)


def native_chain(
    spec: BlockSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """The chain as one writes it in PyTorch, with PyTorch's own dropout."""
    c = chain(spec, x, weight, bias, gamma, beta, None)
    return F.dropout(c, spec.dropout_p, spec.training)


def _baseline_error(workload: Workload, out: Tensor, index: int) -> tuple[float, str]:
    """Error of an output with PyTorch's own mask, against the answer under that same mask."""
    spec = workload.spec
    kept = out != 0
    with torch.no_grad():
        wide = workload.inputs[index].map(Tensor.double)
        unmasked = chain(replace(spec, training=False), *wide, None)
    error = relative_error(out, unmasked * (kept * spec.keep_scale))
    rate, expected = float(kept.double().mean()), 1 - spec.dropout_p * spec.draws
    if abs(rate - expected) > 6 * math.sqrt(0.25 / kept.numel()) + 1e-4:
        return error, f"keeps {rate:.4f} of the elements, not {expected:.4f}"
    if not error <= BASELINE_BOUND:
        return error, f"error {error:.2e} is above the bound {BASELINE_BOUND:.2e}"
    return error, ""


def _plausible(p50_ms: float, floor_ms: float) -> Row:
    """Nothing beats the floor; what seems to has been measured wrongly."""
    if p50_ms >= 0.97 * floor_ms:
        return {}
    reason = f"{p50_ms:.4f} ms is below the memory floor of {floor_ms:.4f} ms: measured wrongly"
    return {"status": "failed", "reason": reason}


# ---- timing -----------------------------------------------------------------------------------


def time_calls(call: Call, sets: int) -> Row:
    """GPU and host time of one call, as row columns.

    Parameters
    ----------
    call : callable
        ``call(index)`` queues one call on input set `index`.
    sets : int
        Number of input sets to rotate through.
    """
    host_us = _host_us(call, sets)
    try:
        replay, method = _captured(call, sets), "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        replay, method = (lambda: [call(index) for index in range(sets)]), "launches"
    _event_ms(replay)  # the first replay uploads the graph
    inner = max(1, math.ceil(SAMPLE_MS / _event_ms(replay)))

    def sample() -> None:
        for _ in range(inner):
            replay()

    times = [_event_ms(sample) / (inner * sets) for _ in range(SAMPLES)]
    p20, p50, p80 = (float(p) for p in np.percentile(times, (20, 50, 80)))
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "host_us": host_us,
        "method": method,
        "samples": SAMPLES,
    }


def _captured(call: Call, sets: int) -> Callable[[], object]:
    """A CUDA graph of one call on every set; calls are warm already."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for index in range(sets):
            call(index)
    return graph.replay


def _event_ms(work: Callable[[], object]) -> float:
    """GPU time between events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _host_us(call: Call, sets: int) -> float:
    """How long a call keeps Python busy: few enough of them that the queue never fills."""
    samples = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(8):
            call(index % sets)
        samples.append((time.perf_counter() - start) / 8)
    torch.cuda.synchronize()
    return 1e6 * float(np.median(samples))


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes per second, read plus written, of a large copy on the current GPU."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_event_ms(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * size / (1e-3 * float(np.median(times[2:])))


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose its fastest algorithm, as a careful PyTorch user would."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _random_inputs(spec: BlockSpec, index: int) -> Tensors:
    generator = torch.Generator("cuda").manual_seed(index)
    dtype = getattr(torch, spec.dtype)

    def normal(shape: Sequence[int], scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(tuple(shape), dtype=dtype, device="cuda", generator=generator)
        return offset + scale * values

    channels = (spec.out_channels,)
    return Tensors(
        normal(spec.x_shape),
        normal(spec.weight_shape, 1 / math.sqrt(math.prod(spec.weight_shape[1:]))),
        normal(channels),
        normal(channels, 0.5, 1.0),
        normal(channels, 0.5),
    )
