"""backward/library_conv: the library's convolutions and three passes of our own between them.

The kernels run in the simulator, PyTorch's convolutions on the CPU. Who judges is
`test_backward`'s: each gradient's error is at most twice PyTorch's own.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from definition import BOUNDS, Operands, random_operands, spec_for
from numba.cuda import dispatcher
from test_backward import (
    ALL,
    BETA_ALONE,
    H200,
    SEED,
    TRAINING,
    assert_accurate,
    at_beta,
    autograd,
    bits,
    make,
    planted,
    problem,
    random_cases,
    random_gradient,
    run,
)
from test_ptx import assembled, compiled, disassembly
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import numba_fused as nf
from numba_fused import backward
from numba_fused.backward import library_conv
from numba_fused.backward.operands import Operands as CallOperands
from numba_fused.device import planes
from numba_fused.device.cubins import describe
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec
from numba_fused.verify import Case

Call = tuple[BlockSpec, Operands, Tensor]


def gradients(call: Call, **options: Any) -> list[Tensor | None]:
    return run(*call, variant="library_conv", **options)


def launched(simulator: Simulator) -> list[str]:
    return [launch.kernel for launch in simulator.launches]


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("3-D", torch.float32),
        ("1-D", torch.float64),
        ("stride, padding", torch.float32),
        ("all of them", torch.float64),
        ("same, even kernel", torch.float32),  # zeros before and after differ
        ("groups across norm groups", torch.float32),
        ("depthwise", torch.float32),
        ("width 1", torch.float32),
        ("width 16", torch.float32),  # 16 bytes an access
        ("width 17", torch.float32),
    ],
    ids=str,
)
def test_error_is_at_most_twice_torchs_own(case: str, dtype: torch.dtype) -> None:
    call = make(case, dtype)
    assert_accurate(gradients(call), *call)


@pytest.mark.parametrize(
    ("p", "training"),
    [(0.0, True), (0.25, False), (0.9, True), (1.0, True), (1 - 1e-11, True)],
    ids=str,
)
def test_any_dropout(p: float, training: bool) -> None:
    """The last of them rounds to a probability of 1, with a scale that is not 0."""
    call = make("kernel 1", dropout_p=p, training=training)
    assert_accurate(gradients(call), *call)


def test_a_threshold_that_drops_all_fits_a_word() -> None:
    scale = np.float32(4)
    assert planes.word_threshold(2**32 - 1, scale) == (2**32 - 1, 4)
    assert planes.word_threshold(2**32, scale) == (2**32 - 1, 0)  # which a draw may still reach


@pytest.mark.parametrize(
    ("size", "partials"),
    [
        pytest.param((44, 50), 256, id="three-tiles"),
        pytest.param((44, 50), 4, id="two-tiles-joined"),
        pytest.param((2051,), 1, id="odd-plane-joined"),
    ],
)
def test_tiles_of_a_plane(
    size: tuple[int, ...], partials: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither gradients nor bytes show where a plane was cut."""
    monkeypatch.setattr(planes, "THREADS", 32)
    monkeypatch.setattr(library_conv, "PARTIALS_PER_GROUP", partials)
    operands = random_operands((1, 1, *size), (2, 1, *(1,) * len(size)))
    spec = spec_for(operands, num_groups=1, **TRAINING)
    assert planes.Tiling(spec).tiles == 3
    call = spec, operands, random_gradient(spec, operands)
    simulator = Simulator(count=True)
    assert_accurate(gradients(call, simulator=simulator), *call)

    ledger = library_conv.ledger(spec, ALL, has_statistics=False)
    x, tensor, weight = spec.x_bytes, spec.output_bytes, 4 * spec.out_channels
    assert simulator.bytes_read == ledger.bytes_read - 2 * (x + tensor + weight)
    assert simulator.bytes_written == ledger.bytes_written - (tensor + x + weight)


def test_sums_over_samples_round_once() -> None:
    """They are kept in fp64: in fp32 the small values would be lost beside the large ones."""
    sums = torch.zeros(3, 2, 40)  # samples, channels, tiles
    sums[0, :, 0], sums[0, :, 1], sums[1, :, 0] = 2.0**25, 1.0, -(2.0**25)  # of two warps
    sums[2, 1, 39] = 2.0
    total = torch.empty(2)
    arguments = sums.ravel(), np.int32(3), np.int32(40), total
    Simulator().launch(library_conv.sum_tiles_kernel, 2, 64, *arguments)
    assert total.tolist() == [1.0, 3.0]


def test_a_large_mean_costs_no_digits() -> None:
    call = make("2-D", offset=1e3)
    assert_accurate(gradients(call), *call)


def test_a_bias_common_to_a_group_costs_no_digits() -> None:
    """It is never added to a value, where it would leave no more than a few bits of it."""
    spec, operands, grad_out = make("2-D")
    found = []
    for bias in (0.0, 1e6):
        shifted = operands._replace(bias=torch.full((spec.out_channels,), bias))
        found.append(bits(gradients((spec, shifted, grad_out))))
    assert found[0] == found[1]


@pytest.mark.gpu
@pytest.mark.parametrize("case", random_cases(40, max_macs=20_000_000), ids=lambda case: case.index)
def test_random_problems_on_the_gpu(case: Case) -> None:
    """Right, and every bit the same in every run."""
    call = problem(case, "cuda")
    found = gradients(call)
    assert_accurate(found, *call)
    assert bits(gradients(call)) == bits(found)


# ---- bounds, NaN and infinities -----------------------------------------------------------------


def test_gradient_passes_strictly_between_the_bounds() -> None:
    beta = [-1.5, -1.0, -0.99, 0.49, 0.5, 0.75, 1.0, 1.5]
    for bounds, passes in [
        ({"cap": 0.5}, [0, 0, 1, 1, 0, 0, 0, 0]),
        ({"cap": 7.0}, [0, 0, 1, 1, 1, 1, 0, 0]),
        ({"min_value": 2.0}, [0] * 8),
    ]:
        spec, operands = at_beta(beta, **bounds)
        grad_out = torch.ones(spec.output_shape, dtype=torch.float64)
        found = gradients((spec, operands, grad_out), wanted=BETA_ALONE)[4]
        assert found is not None
        assert found.tolist() == [34 * p for p in passes]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "beta", "grad_out"])
def test_bad_values_go_where_torch_sends_them(name: str, value: float) -> None:
    spec, operands, grad_out = make("groups across norm groups")
    if name == "grad_out":
        grad_out = planted(grad_out, 7, value)
    else:
        operands = operands._replace(**{name: planted(getattr(operands, name), 1, value)})
    call = spec, operands, grad_out
    found, expected = gradients(call), autograd(*call)
    assert all(g is not None and g.isfinite().any() for g in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_a_nan_gradient_is_lost_where_the_value_is_cut_and_kept_where_it_is_dropped() -> None:
    spec, operands = at_beta([0.0, 0.75], dropout_p=0.5, training=True)
    kept = nf.keep_mask(SEED, spec.output_shape, 0.5)
    (n, w), *_ = zip(*(~kept[:, 0]).nonzero(), strict=True)
    grad_out = torch.ones(spec.output_shape, dtype=torch.float64)
    grad_out[int(n), :, int(w)] = math.nan
    found = gradients((spec, operands, grad_out), wanted=BETA_ALONE)[4]
    assert found is not None
    assert found[0].isnan()
    assert found[1] == 0


# ---- every bit the same -------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["2-D", "more values than threads"])
def test_races_and_order(case: str) -> None:
    """No two threads disturb each other, and the order in which they run changes no bit."""
    call = make(case)
    found = gradients(call, simulator=Simulator())
    shuffled = Simulator(check_races=False, schedule_seed=3)
    assert bits(gradients(call, simulator=shuffled)) == bits(found)


class Flags(TorchDispatchMode):
    """Notes how the library is set at each of its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if "convolution" in str(func):
            cudnn = torch.backends.cudnn
            flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
            self.seen.append((*flags, torch.is_autocast_enabled("cpu")))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_library_is_deterministic_at_the_calls_precision(
    precision: str, benchmark: bool
) -> None:
    """Its other settings are the user's, who finds them as they were."""
    call = make("smallest", precision=precision)
    cudnn = torch.backends.cudnn
    settings: Any = {"enabled": True, "benchmark": benchmark, "deterministic": False}
    for allow_tf32 in (False, True):
        with (
            cudnn.flags(**settings, allow_tf32=allow_tf32),
            torch.autocast("cpu", torch.bfloat16),
            Flags() as flags,
        ):
            found = gradients(call)
            after = cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
            assert after == (True, benchmark, False, allow_tf32)
            assert torch.is_autocast_enabled("cpu")
        assert flags.seen == [(True, benchmark, True, precision == "tf32", False)] * 2
        assert all(g is not None and g.dtype == torch.float32 for g in found)


# ---- only what is wanted ------------------------------------------------------------------------


def test_any_subset_of_the_gradients() -> None:
    """The same bits as among all five, in as many launches as the ledger says."""
    call = make("smallest")
    every = gradients(call)
    subsets: Any = itertools.product([False, True], repeat=5)
    for wanted in subsets:
        simulator = Simulator(check_races=False)
        with Flags() as flags:
            some = gradients(call, wanted=wanted, simulator=simulator)
        assert bits(some) == bits([g if w else None for g, w in zip(every, wanted, strict=True)])
        ledger = library_conv.ledger(call[0], wanted, has_statistics=True)
        assert len(simulator.launches) == ledger.launches - ledger.library_launches
        assert ("gradient_kernel" in launched(simulator)) == any(wanted[:3])
        assert len(flags.seen) == any(wanted) + any(wanted[:2])


def test_a_sample_beyond_32_bit_indices_is_refused() -> None:
    shapes = (1, 1, 2**31), (1, 1, 1)
    spec = BlockSpec.from_arguments(*shapes, num_groups=1, **BOUNDS)
    assert "2,147,483,648 values" in (backward.obstacle("library_conv", spec, (9, 0)) or "")


# ---- machine code -------------------------------------------------------------------------------

# What the disassembly must show where planes are multiples of four floats.
VECTORS = {"sums_kernel": ["LDG.E.128"], "gradient_kernel": ["LDG.E.128", "STG.E.128"]}


def recorded(width: int, dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Our own kernels and the types of their arguments."""
    launches: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def record(kernel: Any, grid: Any, block: Any, *args: Any, **_: Any) -> None:
        arrays = (arg.numpy() if isinstance(arg, Tensor) else arg for arg in args)
        launches[kernel.py_func.__name__] = kernel, tuple(map(numba.typeof, arrays))

    operands = random_operands((1, 2, width), (4, 2, 1), dtype)
    spec = spec_for(operands, num_groups=2, **TRAINING)
    grad_out = torch.zeros(spec.output_shape, dtype=dtype)
    tensors: Any = [t.ravel() for t in (*operands, grad_out) if t is not None]
    call = CallOperands(spec, *tensors, seed=torch.zeros(1, dtype=torch.int64))
    library_conv.gradients(record, call, None, ALL)
    return launches


KERNELS = {
    "quads": recorded(64, torch.float32),
    "odd": recorded(63, torch.float32),
    "fp64": recorded(64, torch.float64),
}


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90a"])
@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        *itertools.product(KERNELS, ["sums_kernel", "gradient_kernel"]),
        *itertools.product(["quads", "fp64"], ["sum_tiles_kernel"]),
    ],
)
def test_machine_code(
    numbers: str, name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No spills, no stack, no stray fp64, and the cache can tell the kernel by its contents."""
    # Compiling calls of device functions asks for the current GPU: name one instead.
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: H200)
    kernel, types = KERNELS[numbers][name]
    ptx, cubin = compiled(kernel, types, architecture), tmp_path / "kernel.cubin"
    report = assembled(ptx, architecture, cubin)
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    if numbers != "fp64" and name != "sum_tiles_kernel":
        assert ".f64" not in ptx
    if numbers == "quads" and architecture == "sm_90a":
        found = disassembly(cubin)
        assert [i for i in VECTORS.get(name, []) if f" {i}" not in found] == []
    assert describe(kernel)
