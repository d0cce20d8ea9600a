"""backward/tensor_core: the same gradients by tensor-core tiles, in the simulator.

Who judges is `test_backward`'s: each gradient's error is at most twice PyTorch's own. Those with
``precision="tf32"`` are compared with their operands' 11 bits instead.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from definition import BOUNDS, Operands, random_operands, spec_for
from numba.cuda import dispatcher
from test_backward import (
    ALL,
    H200,
    MARGIN,
    SEED,
    TRAINING,
    assert_accurate,
    autograd,
    bits,
    error,
    problem,
    random_cases,
    random_gradient,
    run,
)
from test_ptx import ARCHITECTURES, assembled, compiled, disassembly
from torch import Tensor

import numba_fused as nf
from numba_fused import backward, ops
from numba_fused.backward import input_gradient, tensor_core
from numba_fused.backward.operands import Operands as CallOperands
from numba_fused.backward.operands import Wanted
from numba_fused.device.cubins import describe
from numba_fused.ladder import tensor_cores
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec
from numba_fused.verify import Case

Call = tuple[BlockSpec, Operands, Tensor]

# Margins of random gradients, and the error allowed, with operands of 11 bits.
TF32_MARGIN, TF32_ERROR = 2e-2, 1e-3

# name: (x shape, weight shape, arguments)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3-D, padding": ((1, 2, 3, 3, 5), (4, 2, 3, 2, 3), {"padding": 1}),
    "2-D": ((2, 2, 4, 18), (4, 2, 3, 3), {}),
    "1-D, even kernel": ((2, 4, 46), (6, 4, 4), {"padding": 2, "num_groups": 3}),
    "two sets of channels": ((1, 2, 3, 9), (20, 2, 2, 2), {"num_groups": 5}),
    "kernel 1": ((2, 3, 2, 7), (4, 3, 1, 1), {}),
    "padding beyond the kernel": ((1, 1, 2, 3), (2, 1, 2, 2), {"num_groups": 1, "padding": 3}),
    "rows beyond a tile": ((1, 1, 70, 2), (2, 1, 5, 1), {"num_groups": 1}),
    "columns beyond a tile": ((1, 1, 520), (2, 1, 3), {"num_groups": 1}),
    "rows and columns of warps": ((1, 1, 9, 20), (2, 1, 4, 2), {"num_groups": 1}),
    "two sets of rows": ((1, 7, 4, 2, 4), (4, 7, 3, 2, 1), {}),
    "rows of taps for two blocks": ((1, 1, 15, 2), (2, 1, 13, 1), {"num_groups": 1}),
    "taps for two blocks": ((1, 12, 3, 10), (2, 12, 3, 3), {"num_groups": 1}),
    "tiles in turn": ((1, 1, 2, 8, 4), (2, 1, 2, 2, 3), {"num_groups": 1, "padding": 1}),
    "aligned copies, kernel 1": ((1, 2, 3, 4), (2, 2, 1, 1), {"num_groups": 1, "padding": 1}),
}


def make(case: str, *, margin: float | None = None, **changes: Any) -> Call:
    """Spec, random operands and the gradient of the output of one of the cases."""
    x_shape, weight_shape, arguments = CASES[case]
    operands = random_operands(x_shape, weight_shape)
    given: dict[str, Any] = {"num_groups": 2, **TRAINING, **arguments, **changes}
    spec = spec_for(operands, **given)
    more = {} if margin is None else {"margin": margin}
    return spec, operands, random_gradient(spec, operands, **more)


def gradients(call: Call, **options: Any) -> list[Tensor | None]:
    return run(*call, variant="tensor_core", **options)


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_twice_torchs_own(case: str) -> None:
    call = make(case)
    assert_accurate(gradients(call), *call)


@pytest.mark.parametrize(
    ("x_shape", "weight_shape"),
    [((1, 1, 6, 7), (40, 1, 3, 3)), ((1, 1, 24, 1, 17), (2, 1, 1, 1, 2))],
    ids=["dx", "dweight"],
)
def test_long_chains_drift_no_more_than_pytorchs(x_shape: Any, weight_shape: Any) -> None:
    """360 products a value of dx, 384 of dweight; matrix instructions cut off each sum."""
    operands = random_operands(x_shape, weight_shape)
    spec = spec_for(operands, num_groups=2, padding=(x_shape[2] == 6) * 1)
    call = spec, operands, random_gradient(spec, operands)
    assert_accurate(gradients(call), *call)


@pytest.mark.parametrize("case", ["3-D, padding", "two sets of channels", "taps for two blocks"])
def test_tf32_is_as_good_as_its_operands(case: str) -> None:
    call = make(case, margin=TF32_MARGIN, precision="tf32")
    spec, operands, grad_out = call
    exact = autograd(spec, operands.to(torch.float64), grad_out.double())
    for name, found, wanted in zip(backward.NAMES, gradients(call), exact, strict=True):
        assert found is not None
        assert wanted is not None
        assert error(found, wanted) <= TF32_ERROR * float(wanted.norm()), name


def able(count: int) -> list[Case]:
    """Those of the verify generator's GPU-sized problems that the tiles can run."""
    problems = random_cases(count, max_macs=20_000_000)
    specs = [(case, case.spec) for case in problems if case.spec.precision == "ieee"]
    return [case for case, spec in specs if tensor_core.limit(spec) is None]


def test_enough_of_the_random_problems_can_be_run() -> None:
    assert len(able(600)) >= 20


@pytest.mark.gpu
@pytest.mark.parametrize("case", able(600), ids=lambda case: case.index)
def test_random_problems_on_the_gpu(case: Case) -> None:
    """Right, and every bit the same in every run."""
    call = problem(case, "cuda")
    found = gradients(call)
    assert_accurate(found, *call)
    assert bits(gradients(call)) == bits(found)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_benchmark_case_on_the_gpu(precision: str) -> None:
    """Eight samples of it, through autograd: forward keeps the statistics."""
    operands = random_operands((8, 3, 16, 64, 64), (16, 3, 3, 3, 3))
    operands = Operands(*(t.cuda() for t in operands if t is not None))
    spec = spec_for(operands, num_groups=8, precision=precision, **TRAINING)
    margin = TF32_MARGIN if precision == "tf32" else MARGIN
    grad_out = random_gradient(spec, operands, margin)
    leaves = [t.requires_grad_() for t in operands if t is not None]
    out = nf.fused_conv_group_norm_min_clamp_dropout(
        *leaves, num_groups=8, seed=SEED, precision=precision, **BOUNDS, **TRAINING
    )
    found = torch.autograd.grad(out, leaves, grad_out)
    operands = Operands(*(t.detach() for t in leaves))
    if precision == "ieee":
        assert_accurate(list(found), spec, operands, grad_out)
        return
    exact = autograd(spec, operands.to(torch.float64), grad_out.double())
    for name, one, wanted in zip(backward.NAMES, found, exact, strict=True):
        assert wanted is not None
        assert error(one, wanted) <= TF32_ERROR * float(wanted.norm()), name


@pytest.mark.parametrize("case", ["2-D", "tiles in turn"])
def test_races_and_order(case: str) -> None:
    """No two threads disturb each other, and the order in which they run changes no bit."""
    call = make(case)
    found = gradients(call, simulator=Simulator())
    shuffled = Simulator(check_races=False, schedule_seed=3)
    assert bits(gradients(call, simulator=shuffled)) == bits(found)


@pytest.mark.parametrize(
    ("p", "training"), [(0.0, True), (0.25, False), (0.9, True), (1.0, True)], ids=str
)
def test_any_dropout(p: float, training: bool) -> None:
    call = make("kernel 1", dropout_p=p, training=training)
    assert_accurate(gradients(call), *call)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12], ids=str)
def test_gradients_of_any_magnitude(scale: float) -> None:
    """Halves reach 65504 and end at 6e-8: scales have to follow the data."""
    spec, operands, grad_out = make("kernel 1")
    call = spec, operands, grad_out * scale
    assert_accurate(gradients(call), *call)


@pytest.mark.parametrize("scale", [1e-12, 1e12], ids=str)
def test_operands_of_any_magnitude(scale: float) -> None:
    spec, operands, _ = make("kernel 1")
    operands = operands._replace(x=operands.x * scale, weight=operands.weight / scale)
    call = spec, operands, random_gradient(spec, operands)
    assert_accurate(gradients(call), *call)


def test_samples_of_different_magnitude() -> None:
    """Each has a scale of its own: the small one's dx keeps its digits beside the large one's."""
    spec, operands, grad_out = make("kernel 1")
    grad_out = grad_out * torch.tensor([1.0, 2.0**-40]).view(2, 1, 1, 1)
    dx, *_ = gradients((spec, operands, grad_out), wanted=(True, False, False, False, False))
    exact, *_ = autograd(spec, operands.to(torch.float64), grad_out.double())
    assert dx is not None
    assert exact is not None
    assert error(dx[1], exact[1]) < 1e-6 * float(exact[1].norm())


def test_what_is_not_a_number_goes_where_torch_sends_it() -> None:
    """A NaN of grad_out poisons its group of its sample, even where it was dropped."""
    spec, operands, grad_out = make("kernel 1")
    keep = torch.from_numpy(nf.keep_mask(SEED, spec.output_shape, spec.dropout_p))
    dropped = (~keep[1, 3]).nonzero()
    found = False
    for place in dropped.tolist():  # one that the bounds let through
        with_nan = grad_out.clone()
        with_nan[(1, 3, *place)] = math.nan
        exact = autograd(spec, operands.to(torch.float64), with_nan.double())
        assert exact[3] is not None
        if exact[3].isnan().any():
            found = True
            ours = gradients((spec, operands, with_nan))
            for one, other in zip(ours, exact, strict=True):
                assert one is not None
                assert other is not None
                assert torch.equal(one.isnan(), other.isnan())
            break
    assert found


# ---- the chain in one pass ----------------------------------------------------------------------

IN_ONE_PASS, IN_THREE_KERNELS = {"chain_kernel"}, {"sums_kernel", "means_kernel", "gradient_kernel"}
BOTH_WAYS = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "three kernels"])


def hold(patch: pytest.MonkeyPatch, blocks: int) -> None:
    """As if the GPU held so many blocks at once."""
    patch.setattr(tensor_core, "resident_blocks", lambda shape: blocks)
    patch.setattr(tensor_core, "backward_plan", tensor_core.BackwardPlan)


def several_tiles() -> Call:
    """Three samples of three tiles."""
    operands = random_operands((3, 1, 3, 2, 4), (2, 1, 1, 1, 1))
    spec = spec_for(operands, num_groups=1, **TRAINING)
    plan = tensor_core.backward_plan(spec, tensor_cores.tile_plan(spec, tensor_core.kind(spec)))
    assert plan.tiles.shape.tiles_per_sample == 3
    return spec, operands, random_gradient(spec, operands)


@pytest.mark.parametrize(("blocks", "schedule"), [(6, None), (8, 1)])
def test_persistent_blocks_take_several_samples_in_any_order(
    blocks: int, schedule: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = several_tiles()
    hold(monkeypatch, blocks)
    simulator = Simulator(schedule_seed=schedule)
    found = gradients(call, simulator=simulator)
    (launch,) = (one for one in simulator.launches if one.kernel == "chain_kernel")
    assert launch.grid == (blocks, 1, 1)
    hold(monkeypatch, 5)  # fewer than the tiles of two samples
    simulator = Simulator(check_races=False)
    assert bits(gradients(call, simulator=simulator)) == bits(found)
    assert set(launched(simulator)) > IN_THREE_KERNELS
    assert_accurate(found, *call)


@pytest.mark.parametrize("case", ["two sets of channels", "two sets of rows", "1-D, even kernel"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_one_pass_gives_the_bits_of_three_kernels(
    case: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make(case, precision=precision)
    simulators = [Simulator(check_races=False) for _ in range(2)]
    found = gradients(call, simulator=simulators[0])
    hold(monkeypatch, 0)
    assert bits(gradients(call, simulator=simulators[1])) == bits(found)
    either = IN_ONE_PASS | IN_THREE_KERNELS
    assert either.intersection(launched(simulators[0])) == IN_ONE_PASS
    assert either.intersection(launched(simulators[1])) == IN_THREE_KERNELS


@pytest.mark.parametrize(("channels", "one_pass"), [(128, True), (130, False)])
def test_all_channels_must_be_in_one_tile(channels: int, one_pass: bool) -> None:
    arguments: dict[str, Any] = {"num_groups": 2, **BOUNDS}
    spec = BlockSpec.from_arguments((1, 1, 4, 4), (channels, 1, 2, 2), **arguments)
    tiles = tensor_cores.tile_plan(spec, tensor_core.kind(spec))
    assert tensor_core.backward_plan(spec, tiles).one_pass == one_pass


def test_a_nan_is_not_taken_for_an_absent_sum() -> None:
    """Not even one that has all bits set, as what marks a record as absent."""
    spec, operands, grad_out = make("kernel 1", dropout_p=0.0)
    nan = torch.full(grad_out.shape, -1, dtype=torch.int32).view(torch.float32)
    _, _, _, dgamma, _ = gradients((spec, operands, nan))
    assert dgamma is not None
    assert dgamma.isnan().any()


# ---- only what is wanted, a run of samples at a time --------------------------------------------


def launched(simulator: Simulator) -> list[str]:
    return [launch.kernel for launch in simulator.launches]


def test_only_what_is_wanted_is_launched() -> None:
    call = make("kernel 1")
    every = gradients(call)
    chain = IN_ONE_PASS | IN_THREE_KERNELS
    last = {"weight_gradient", "input_gradient", "parameter_sums_kernel"} | chain
    for which, needs in {
        0: {"input_gradient", "chain_kernel"},
        1: {"weight_gradient", "chain_kernel"},
        2: {"parameter_sums_kernel", "chain_kernel"},
        3: {"parameter_sums_kernel", "sums_kernel", "means_kernel"},
        4: {"parameter_sums_kernel", "sums_kernel", "means_kernel"},
    }.items():
        wanted: Any = tuple(i == which for i in range(5))
        simulator = Simulator(check_races=False)
        some = gradients(call, wanted=wanted, simulator=simulator)
        assert bits(some) == bits([g if w else None for g, w in zip(every, wanted, strict=True)])
        assert last.intersection(launched(simulator)) == needs


@pytest.mark.parametrize(("processors", "planes"), [(1, 5), (2, 3)])
def test_planes_of_a_block_change_no_bit(
    processors: int, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of dx walk over one plane where the GPU is empty, over more where it is full."""
    operands = random_operands((1, 2, 5, 3, 6), (4, 2, 3, 2, 3))
    spec = spec_for(operands, num_groups=2, padding=1, **TRAINING)
    call = spec, operands, random_gradient(spec, operands)
    found = gradients(call)
    monkeypatch.setattr(input_gradient, "RESIDENT_BLOCKS", processors)
    monkeypatch.setattr(tensor_core, "backward_plan", tensor_core.BackwardPlan)
    simulator = Simulator()
    assert bits(gradients(call, simulator=simulator)) == bits(found)
    (launch,) = (one for one in simulator.launches if one.kernel == "input_gradient")
    assert launch.grid == (-(-5 // planes), 1, 1)
    assert_accurate(found, *call)


@BOTH_WAYS
def test_runs_of_samples_change_no_bit(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """dz of all samples at once would be as large as the output."""
    call = make("1-D, even kernel")
    found = gradients(call)
    monkeypatch.setattr(tensor_core, "MOST_DZ_BYTES", 1)
    hold(monkeypatch, 100 * one_pass)
    simulator = Simulator(check_races=False)
    assert bits(gradients(call, simulator=simulator)) == bits(found)
    for kernel in IN_ONE_PASS if one_pass else IN_THREE_KERNELS:
        assert launched(simulator).count(kernel) == call[0].batch


def test_statistics_of_forward_are_used_where_given() -> None:
    call = spec, operands, _ = make("kernel 1")
    x, weight, bias, _, _ = operands.to(torch.float64)
    z = torch.nn.functional.conv2d(x, weight, bias)
    variance, mean = torch.var_mean(z.view(-1, spec.group_size), dim=1, correction=0)
    statistics = {"mean": mean.float(), "rstd": (variance + spec.eps).rsqrt().float()}
    simulator = Simulator(check_races=False)
    assert_accurate(gradients(call, **statistics, simulator=simulator), *call)
    assert "statistics_kernel" not in launched(simulator)


@BOTH_WAYS
@pytest.mark.parametrize(
    ("case", "wanted", "has_statistics"),
    [
        ("1-D, even kernel", ALL, False),
        ("taps for two blocks", ALL, True),
        ("2-D", (False, True, True, False, True), False),
    ],
)
def test_ledger_is_what_the_simulator_counts(
    case: str,
    wanted: Wanted,
    has_statistics: bool,
    one_pass: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within what tiny shapes add: whole sectors, records counted as atomics, overlapping tiles."""
    monkeypatch.setattr(tensor_core, "MOST_DZ_BYTES", 1)  # a sample at a time
    hold(monkeypatch, 100 * one_pass)
    call = make(case)
    pairs = torch.ones(2, call[0].batch * call[0].num_groups)
    statistics = {"mean": pairs[0], "rstd": pairs[1]} if has_statistics else {}
    simulator = Simulator(count=True, check_races=False)
    gradients(call, wanted=wanted, simulator=simulator, **statistics)
    ledger = tensor_core.ledger(call[0], wanted, has_statistics=has_statistics)
    assert len(simulator.launches) == ledger.launches
    assert simulator.bytes_read == pytest.approx(ledger.bytes_read, rel=0.1)
    assert simulator.bytes_written == pytest.approx(ledger.bytes_written, rel=0.1)


def test_the_taps_of_an_instruction_have_banks_of_their_own() -> None:
    """Eight taps want four words each of 32 banks: nearly all of them at once, for the benchmark's.

    With rows one right after the other it takes four turns.
    """
    operands = random_operands((1, 3, 4, 5, 8), (4, 3, 3, 3, 3))
    spec = spec_for(operands, num_groups=2, precision="tf32", **TRAINING)
    simulator = Simulator(count=True, check_races=False)
    wanted = (False, True, False, False, False)
    grad_out = torch.ones(spec.output_shape)
    gradients((spec, operands, grad_out), wanted=wanted, simulator=simulator)
    (launch,) = (launch for launch in simulator.launches if launch.kernel == "weight_gradient")
    (loads,) = (line for line in launch.lines if line.text.startswith("b = words[word]"))
    assert loads.wavefronts < 1.6 * loads.requests


# ---- through the public function ----------------------------------------------------------------


CALL_OF = ops.call_of


def differentiate(
    variant: str,
    backward_variant: str | None,
    dtype: torch.dtype,
    patch: pytest.MonkeyPatch,
    **how: Any,
) -> list[Tensor]:
    """Gradients through the public function, as on a GPU; the kernels run in the simulator."""

    def call_of(spec: BlockSpec, *_: Any) -> ops.Call:
        return replace(CALL_OF(spec, variant, torch.device("cpu")), backward=backward_variant)

    def block(*operands: Tensor) -> Tensor:
        return nf.fused_conv_group_norm_min_clamp_dropout(
            *operands, num_groups=2, seed=SEED, **BOUNDS, **TRAINING
        )

    patch.setattr(ops, "call_of", call_of)
    patch.setattr(ops, "_calls", {})
    x_shape, weight_shape, _ = CASES["kernel 1"]
    operands = random_operands(x_shape, weight_shape)
    leaves = [t.to(dtype).requires_grad_() for t in operands if t is not None]
    run_block = torch.compile(block, **how) if how else block
    return list(torch.autograd.grad(run_block(*leaves).float().square().sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autograd_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = differentiate("auto", None, dtype, monkeypatch)
    found = differentiate("auto", "tensor_core", dtype, monkeypatch)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)


def test_what_forward_keeps_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and rstd come from a forward rung that keeps them, in eager mode and compiled."""
    wanted = differentiate("auto", None, torch.float32, monkeypatch)
    given: list[Any] = []
    honest = backward.run

    def watched(*arguments: Any, **options: Any) -> Any:
        given.append(options["mean"])
        return honest(*arguments, **options)

    monkeypatch.setattr(backward, "run", watched)
    for how in ({}, {"backend": "aot_eager", "fullgraph": True}):
        found = differentiate("split", "tensor_core", torch.float32, monkeypatch, **how)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    differentiate("one_kernel", "tensor_core", torch.float32, monkeypatch)
    assert [mean is not None for mean in given] == [True, True, False]


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "arguments", "reason"),
    [
        ((1, 2, 9, 9), (4, 2, 3, 3), {"stride": 2}, "takes stride 1 and dilation 1"),
        ((1, 2, 9, 9), (4, 2, 3, 3), {"dilation": 2}, "takes stride 1 and dilation 1"),
        ((1, 2, 9, 9), (4, 1, 3, 3), {"groups": 2}, "groups=2"),
        ((1, 2, 9, 9), (4, 2, 3, 3), {"dtype": "float64"}, "x is float64"),
        ((1, 40, 9, 9), (4, 40, 3, 3), {}, "in_channels * kernel depth is 40"),
        ((1, 2, 9, 9), (2048, 2, 1, 1), {}, "takes 1024 output channels, and there are 2048"),
    ],
)
def test_limits_are_told(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], arguments: dict[str, Any], reason: str
) -> None:
    given: dict[str, Any] = {"num_groups": 2, **BOUNDS, **arguments}
    spec = BlockSpec.from_arguments(x_shape, weight_shape, **given)
    operands = random_operands(x_shape, weight_shape, getattr(torch, spec.dtype))
    with pytest.raises(ValueError, match=re.escape(reason)):
        run(spec, operands, torch.zeros(spec.output_shape), variant="tensor_core")


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown backward variant 'quick': use one of clear, "):
        run(*make("kernel 1"), variant="quick")


# ---- machine code -------------------------------------------------------------------------------

# What the disassembly of each kernel must show.
INSTRUCTIONS = {
    "statistics_kernel": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128"],
    "sums_kernel": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128"],
    "gradient_kernel": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.128"],
    "chain_kernel": [
        "HMMA.16816.F32",
        "LDGSTS.E.BYPASS.128",
        "LDS.128",
        "STG.E.64.STRONG.GPU",
        "LDG.E.64.STRONG.GPU",
    ],
    "weight_gradient": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4"],
    "input_gradient": ["HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDS.64", "LDG.E.128"],
}
PRECISIONS = ("ieee", "tf32")


def recorded(precision: str, architecture: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every kernel and the types of its arguments, for one sample of the benchmark case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_cores, "has_bulk_copies", lambda device: architecture != "sm_80")
        in_one_pass = _recorded(precision)
        hold(patch, 0)
        return in_one_pass | _recorded(precision)


def _recorded(precision: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    launches: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def record(kernel: Any, grid: Any, block: Any, *args: Any, **_: Any) -> None:
        arrays = (arg.numpy() if isinstance(arg, Tensor) else arg for arg in args)
        launches[kernel.py_func.__name__] = kernel, tuple(map(numba.typeof, arrays))

    operands = random_operands((1, 3, 16, 64, 64), (16, 3, 3, 3, 3))
    spec = spec_for(operands, num_groups=8, precision=precision, **TRAINING)
    tensors: Any = [t.ravel() for t in (*operands, torch.zeros(spec.output_shape)) if t is not None]
    call = CallOperands(spec, *tensors, seed=torch.zeros(1, dtype=torch.int64))
    tensor_core.gradients(record, call, None, ALL)
    return launches


KERNELS = {
    (precision, architecture): recorded(precision, architecture)
    for precision in PRECISIONS
    for architecture in ARCHITECTURES
    if precision == "ieee" or architecture == "sm_90a"  # compiling takes seconds
}
UNIQUE = [
    pytest.param(*key, name, marks=pytest.mark.slow if key[1] == "sm_80" else ())
    for key, launches in KERNELS.items()
    for name, launch in launches.items()
    if key[0] == "ieee" or launch not in KERNELS["ieee", key[1]].values()
]


@pytest.mark.parametrize(("precision", "architecture", "name"), UNIQUE)
def test_machine_code(
    precision: str, architecture: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No spills, no stack, what each kernel is about, and the cache can tell it by its contents."""
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: H200)
    kernel, types = KERNELS[precision, architecture][name]
    cubin = tmp_path / "kernel.cubin"
    report = assembled(compiled(kernel, types, architecture), architecture, cubin)
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    if architecture == "sm_90a":
        found = disassembly(cubin)
        assert [i for i in INSTRUCTIONS.get(name, []) if f" {i}" not in found] == []
    assert describe(kernel)
