"""backward/: the gradients are autograd's, whatever the shape, the operands and the schedule.

The kernels run in the simulator. The judge is autograd through `nf.reference`'s chain in fp64, with
the kernels' own mask. Where h lies so close to a bound that rounding decides on which side, the
gradient of the output is zero: there is no right answer there.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
from definition import Operands, random_operands, spec_for
from numba.cuda import dispatcher
from test_ptx import assembled, compiled
from torch import Tensor

import numba_fused as nf
from numba_fused import backward
from numba_fused.backward import clear
from numba_fused.device.cubins import describe
from numba_fused.reference import chain, convolution, full_precision
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec
from numba_fused.verify import LEAST_ERROR, Case, cases, mask_of

ALL: clear.Wanted = (True, True, True, True, True)
BETA_ALONE: clear.Wanted = (False, False, False, False, True)
NAMES = ["x", "weight", "bias", "gamma", "beta"]
SEED = 12345
MARGIN = 1e-3  # far above fp32's rounding of h, even where x has a mean of 1000
TRAINING = {"dropout_p": 0.25, "training": True}

# name: (x shape, weight shape, arguments)
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "3-D": ((2, 2, 3, 4, 5), (4, 2, 2, 3, 2), {"num_groups": 2}),
    "2-D": ((2, 3, 5, 6), (4, 3, 3, 2), {"num_groups": 2}),
    "1-D": ((3, 4, 20), (6, 4, 3), {"num_groups": 3}),
    "kernel 1": ((2, 3, 3, 7), (4, 3, 1, 1), {"num_groups": 2}),
    "kernel of the input's size": ((3, 2, 3, 4), (6, 2, 3, 4), {"num_groups": 2}),
    "stride, padding": (
        (2, 2, 4, 5, 7),
        (2, 2, 1, 2, 3),
        {"num_groups": 1, "stride": (2, 1, 3), "padding": (0, 1, 2)},
    ),
    "stride beyond the kernel": ((2, 2, 9, 8), (4, 2, 2, 2), {"num_groups": 2, "stride": (3, 4)}),
    "dilation": (
        (1, 2, 7, 9),
        (4, 2, 3, 2),
        {"num_groups": 2, "dilation": (2, 4), "padding": 1},
    ),
    "all of them": (
        (2, 2, 8, 9),
        (2, 2, 3, 2),
        {"num_groups": 1, "stride": (2, 3), "padding": (2, 1), "dilation": (2, 3)},
    ),
    "same, even kernel": (
        (1, 2, 4, 9),
        (2, 2, 3, 4),
        {"num_groups": 1, "padding": "same", "dilation": (1, 3)},
    ),
    "padding beyond the kernel": ((1, 1, 2, 3), (2, 1, 2, 2), {"num_groups": 1, "padding": 3}),
    "groups across norm groups": ((2, 4, 4, 5), (6, 2, 2, 2), {"num_groups": 3, "groups": 2}),
    "depthwise": ((2, 4, 4, 6), (8, 1, 2, 2), {"num_groups": 2, "groups": 4}),
    "width 1": ((3, 2, 9, 1), (4, 2, 3, 1), {"num_groups": 2}),
    "width 16": ((1, 2, 2, 18), (4, 2, 2, 3), {"num_groups": 2}),
    "width 17": ((1, 2, 2, 19), (4, 2, 2, 3), {"num_groups": 2}),
    "more values than threads": ((2, 1, 303), (2, 1, 2), {"num_groups": 1}),
    "smallest": ((2, 1, 4), (2, 1, 2), {"num_groups": 1}),
    "more samples than lanes": ((35, 1, 4), (2, 1, 2), {"num_groups": 1}),
}
SOME = ["3-D", "stride, padding", "groups across norm groups"]


def make(
    case: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[BlockSpec, Operands, Tensor]:
    """Spec, random operands and the gradient of the output of one of the cases above."""
    x_shape, weight_shape, arguments = CASES[case]
    tensors = {k: changes.pop(k) for k in ("bias", "affine", "offset") if k in changes}
    operands = random_operands(x_shape, weight_shape, dtype, **tensors)
    spec = spec_for(operands, **(TRAINING | arguments | changes))
    return spec, operands, random_gradient(spec, operands)


def random_gradient(spec: BlockSpec, operands: Operands, margin: float = MARGIN) -> Tensor:
    """Of the output; zero where rounding could move h across a bound."""
    x, weight, bias, gamma, beta = operands.to(torch.float64)
    unbounded = replace(spec, min_value=-math.inf, max_value=math.inf, cap=math.inf, training=False)
    h = chain(unbounded, x, weight, bias, gamma, beta, keep_mask=None)
    gradient = random_operands(spec.output_shape, (1,)).x.to(operands.x)
    for bound in (spec.min_value, spec.max_value, spec.cap):
        gradient[(h - bound).abs() < margin] = 0
    return gradient


def random_cases(count: int, max_macs: int) -> list[Case]:
    """The verify generator's, but for those with NaN or infinities."""
    return [case for case in cases(0, count, max_macs=max_macs) if case.family != "nonfinite"]


def problem(case: Case, device: str) -> tuple[BlockSpec, Operands, Tensor]:
    """What `make` gives: at full precision, for `autograd` judges it."""
    spec, operands = replace(case.spec, precision="ieee"), Operands(*case.tensors(device))
    return spec, operands, random_gradient(spec, operands)


def run(
    spec: BlockSpec, operands: Operands, grad_out: Tensor, **options: Any
) -> list[Tensor | None]:
    """The five gradients; races are looked for in the first test alone."""
    options = {
        "seed": SEED,
        "wanted": tuple(t is not None for t in operands),
        "simulator": Simulator(check_races=False),
    } | options
    return list(backward.run(*operands, grad_out, spec=spec, **options))


def autograd(spec: BlockSpec, operands: Operands, grad_out: Tensor) -> list[Tensor | None]:
    """What PyTorch computes in the operands' dtype."""
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in operands]
    x, weight, bias, gamma, beta = leaves
    with full_precision():
        out = chain(spec, x, weight, bias, gamma, beta, mask_of(spec, SEED, x.device))
        found = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], grad_out))
    return [None if t is None else next(found) for t in leaves]


def error(gradient: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient.double() - exact))


def allowed_errors(
    spec: BlockSpec, operands: Operands, grad_out: Tensor, exact: list[Tensor | None]
) -> list[float]:
    """Twice PyTorch's own: the worst of several that are equally good, nudged by a last bit or not.

    In fp64 PyTorch is the judge itself, and what the nudges change is its error.
    """
    generator = torch.Generator().manual_seed(0)
    least = LEAST_ERROR[spec.dtype]
    worst = [0.0 if e is None else least * float(torch.linalg.vector_norm(e)) for e in exact]

    def nudged(t: Tensor) -> Tensor:
        step = torch.randint(-1, 2, t.shape, generator=generator).to(t)
        return t * (1 + torch.finfo(t.dtype).eps * step)

    for sample in range(6):
        tensors: list[Any] = [*operands, grad_out]
        if sample:
            tensors = [None if t is None else nudged(t) for t in tensors]
        found = autograd(spec, Operands(*tensors[:5]), tensors[5])
        for i, (g, e) in enumerate(zip(found, exact, strict=True)):
            if g is not None and e is not None:
                worst[i] = max(worst[i], error(g, e))
    return [2 * w for w in worst]


def assert_accurate(
    found: list[Tensor | None], spec: BlockSpec, operands: Operands, grad_out: Tensor
) -> None:
    """Each gradient's error is at most twice PyTorch's own."""
    exact = autograd(spec, operands.to(torch.float64), grad_out.double())
    allowed = allowed_errors(spec, operands, grad_out, exact)
    assert [g is None for g in found] == [t is None for t in operands]
    for name, g, e, bound in zip(NAMES, found, exact, allowed, strict=True):
        if g is not None and e is not None:
            assert g.shape == e.shape
            assert g.dtype == grad_out.dtype
            assert error(g, e) <= bound, name


def bits(gradients: list[Tensor | None]) -> list[bytes | None]:
    return [None if g is None else g.cpu().numpy().tobytes() for g in gradients]


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.float64) for case in SOME)],
    ids=str,
)
def test_error_is_at_most_twice_torchs_own(case: str, dtype: torch.dtype) -> None:
    call = make(case, dtype)
    assert_accurate(run(*call, simulator=Simulator()), *call)


def test_sums_over_positions_round_once() -> None:
    """In fp32 a thread would lose the 1 between two large values of opposite sign."""
    one, width, threads = torch.ones(1), 1024, 256
    operands = Operands(torch.ones(1, 1, width), torch.ones(1, 1, 1), one, one, 0 * one)
    spec = spec_for(operands, num_groups=1, eps=1.0, min_value=-1.0, max_value=1.0, cap=0.5)
    grad_out = torch.zeros(spec.output_shape)
    grad_out.view(-1)[: 3 * threads : threads] = torch.tensor([2.0**25, 1.0, -(2.0**25)])
    found = run(spec, operands, grad_out)
    assert found[4] == 1.0  # beta: the sum of grad_out
    # bias: less their mean everywhere, which the large ones round away
    assert found[2] == 1.0 - (width - 2) / width


@pytest.mark.parametrize("num_groups", [1, 2, 4, 8])
def test_any_number_of_groups(num_groups: int) -> None:
    call = make("depthwise", num_groups=num_groups)
    assert_accurate(run(*call), *call)


@pytest.mark.parametrize(
    ("p", "training"), [(0.0, True), (0.25, False), (0.9, True), (1.0, True)], ids=str
)
def test_any_dropout(p: float, training: bool) -> None:
    call = make("2-D", dropout_p=p, training=training)
    assert_accurate(run(*call), *call)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_absent_vectors_have_no_gradient_and_are_neutral(affine: bool, bias: bool) -> None:
    call = make("2-D", affine=affine, bias=bias)
    assert_accurate(run(*call), *call)


@pytest.mark.parametrize("case", random_cases(12, max_macs=1000), ids=lambda case: case.index)
def test_random_problems(case: Case) -> None:
    call = problem(case, "cpu")
    assert_accurate(run(*call), *call)


@pytest.mark.gpu
@pytest.mark.parametrize("case", random_cases(40, max_macs=20_000_000), ids=lambda case: case.index)
def test_random_problems_on_the_gpu(case: Case) -> None:
    call = problem(case, "cuda")
    assert_accurate(run(*call), *call)


@pytest.mark.gpu
def test_the_benchmark_case_on_the_gpu() -> None:
    operands = random_operands((8, 3, 16, 64, 64), (16, 3, 3, 3, 3))
    operands = Operands(*(t.cuda() for t in operands if t is not None))
    spec = spec_for(operands, num_groups=8, dropout_p=0.2, training=True)
    grad_out = random_gradient(spec, operands)
    found = run(spec, operands, grad_out)
    assert_accurate(found, spec, operands, grad_out)
    assert bits(run(spec, operands, grad_out)) == bits(found)


def test_a_large_mean_costs_no_digits() -> None:
    call = make("2-D", offset=1e3)
    assert_accurate(run(*call), *call)


def test_statistics_of_forward_are_used_where_given() -> None:
    spec, operands, grad_out = make("2-D", torch.float64)
    z = convolution(spec, operands.x, operands.weight, operands.bias)
    variance, mean = torch.var_mean(z.view(-1, spec.group_size), dim=1, correction=0)
    statistics = {"mean": mean, "rstd": (variance + spec.eps).rsqrt()}
    simulator = Simulator()
    given = run(spec, operands, grad_out, **statistics, simulator=simulator)
    assert_accurate(given, spec, operands, grad_out)
    assert "group_statistics_kernel" not in [launch.kernel for launch in simulator.launches]
    statistics["rstd"] = 2 * statistics["rstd"]
    assert bits(run(spec, operands, grad_out, **statistics)) != bits(given)


# ---- only what is wanted ------------------------------------------------------------------------


def test_any_subset_of_the_gradients() -> None:
    """The same bits as among all five, in as many launches as the ledger says."""
    call = make("smallest")
    every = run(*call)
    subsets: Any = itertools.product([False, True], repeat=5)
    for wanted in subsets:
        simulator = Simulator(check_races=False)
        some = run(*call, wanted=wanted, simulator=simulator)
        assert bits(some) == bits([g if w else None for g, w in zip(every, wanted, strict=True)])
        ledger = backward.ledger(call[0], wanted, has_statistics=False)
        assert len(simulator.launches) == ledger.launches


# ---- exact answers ------------------------------------------------------------------------------


def integers(shape: tuple[int, ...], seed: int) -> Tensor:
    """-3 to 3: sums of a few hundred products of these are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("case", CASES)
def test_convolution_gradients_of_small_integers_are_exact(case: str) -> None:
    spec, *_ = make(case)
    x, weight = integers(spec.x_shape, 0), integers(spec.weight_shape, 1)
    dz = integers(spec.output_shape, 2)
    none = torch.empty(0)
    operands = clear.Operands(spec, x.ravel(), weight.ravel(), none, none, none, none, seed=none)
    launch = Simulator(check_races=False).launch
    dx = clear.input_gradient(launch, operands, dz.ravel()).view(x.shape)
    dweight = clear.weight_gradient(launch, operands, dz.ravel()).view(weight.shape)
    leaves = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(convolution(spec, *leaves, None), leaves, dz)
    assert torch.equal(dx, expected[0])
    assert torch.equal(dweight, expected[1])


def at_beta(beta: list[float], **arguments: Any) -> tuple[BlockSpec, Operands]:
    """With gamma 0 every value of h is its channel's beta, exactly; two samples of 17."""
    channels = len(beta)
    operands = random_operands((2, 1, 18), (channels, 1, 2), torch.float64)
    operands = operands._replace(
        gamma=torch.zeros(channels).double(), beta=torch.tensor(beta).double()
    )
    return spec_for(operands, num_groups=1, **arguments), operands


def test_gradient_passes_strictly_between_the_bounds() -> None:
    beta = [-1.5, -1.0, -0.99, 0.49, 0.5, 0.75, 1.0, 1.5]
    for bounds, passes in [
        ({"cap": 0.5}, [0, 0, 1, 1, 0, 0, 0, 0]),
        ({"cap": 7.0}, [0, 0, 1, 1, 1, 1, 0, 0]),
        ({"min_value": -math.inf, "cap": math.inf}, [1, 1, 1, 1, 1, 1, 0, 0]),
        ({"min_value": 2.0}, [0] * 8),
    ]:
        spec, operands = at_beta(beta, **bounds)
        grad_out = torch.ones(spec.output_shape, dtype=torch.float64)
        found = run(spec, operands, grad_out, wanted=BETA_ALONE)[4]
        assert found is not None
        assert found.tolist() == [34 * p for p in passes]


def test_the_backward_mask_is_the_forward_mask() -> None:
    """Every element's gradient is a power of two of its own, so dbeta spells the mask."""
    spec, operands = at_beta([0.0, 0.1], dropout_p=0.5, training=True)
    weights = 2.0 ** torch.arange(34, dtype=torch.float64).view(2, 1, 17)
    found = run(spec, operands, weights.expand(spec.output_shape))[4]
    kept = torch.from_numpy(nf.keep_mask(SEED, spec.output_shape, 0.5))
    out = nf.ladder.run("unfused", *operands, spec=spec, seed=SEED)
    assert torch.equal(out[:, 1] != 0, kept[:, 1])
    assert found is not None
    assert torch.equal(found, (2 * kept * weights).sum((0, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_empty_batch_has_zero_gradients_and_launches_nothing(dtype: torch.dtype) -> None:
    _, operands, _ = make("2-D", dtype)
    operands = operands._replace(x=operands.x[:0])
    spec = spec_for(operands, num_groups=2, **TRAINING)
    simulator = Simulator()
    found = run(spec, operands, torch.empty(spec.output_shape, dtype=dtype), simulator=simulator)
    assert not simulator.launches
    for gradient, tensor in zip(found, operands, strict=True):
        assert gradient is not None
        assert tensor is not None
        assert torch.equal(gradient, torch.zeros_like(tensor))


# ---- NaN and infinities -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "beta", "grad_out"])
def test_bad_values_go_where_torch_sends_them(name: str, value: float) -> None:
    """Two convolution groups over three norm groups: some of each stay clean."""
    spec, operands, grad_out = make("groups across norm groups")
    if name == "grad_out":
        grad_out = planted(grad_out, 7, value)
    else:
        operands = operands._replace(**{name: planted(getattr(operands, name), 1, value)})
    found, expected = run(spec, operands, grad_out), autograd(spec, operands, grad_out)
    assert all(g is not None and g.isfinite().any() for g in found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def planted(t: Tensor, position: int, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[position] = value
    return t


def test_a_nan_gradient_is_lost_where_the_value_is_cut_and_kept_where_it_is_dropped() -> None:
    """As in PyTorch: dropout multiplies by zero, min and clamp choose."""
    spec, operands = at_beta([0.0, 0.75], dropout_p=0.5, training=True)
    kept = nf.keep_mask(SEED, spec.output_shape, 0.5)
    for n, w in itertools.product(range(2), range(0, 17, 4)):
        grad_out = torch.ones(spec.output_shape, dtype=torch.float64)
        grad_out[n, :, w] = math.nan
        found = run(spec, operands, grad_out, wanted=BETA_ALONE)[4]
        assert found is not None
        assert found[0].isnan()
        assert found[1] == 0
    assert not kept[:, :, ::4].all()


# ---- reproducibility ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["2-D", "more samples than lanes"])
def test_bits_do_not_depend_on_the_schedule(case: str) -> None:
    call = make(case)
    first = bits(run(*call))
    for schedule in (1, 2):
        simulator = Simulator(schedule_seed=schedule, check_races=False)
        assert bits(run(*call, simulator=simulator)) == first


def test_any_strides() -> None:
    spec, operands, grad_out = make("2-D")
    expected = run(spec, operands, grad_out[:1, :1].expand_as(grad_out).contiguous())
    strided = Operands(
        operands.x.to(memory_format=torch.channels_last),
        operands.weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        *(torch.stack([t, t.neg()], dim=1)[:, 0] for t in operands[2:] if t is not None),
    )
    assert not any(t.is_contiguous() for t in strided if t is not None)
    found = run(spec, strided, grad_out[:1, :1].expand_as(grad_out))
    assert bits(found) == bits(expected)


# ---- the ledger ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "training", "has_statistics"),
    [
        (ALL, True, False),
        (ALL, False, True),
        ((False, False, False, True, True), True, True),
        ((True, False, False, False, False), True, False),
        ((False, True, True, False, False), True, False),
    ],
    ids=str,
)
def test_ledger_is_what_the_simulator_counts(
    wanted: clear.Wanted, training: bool, has_statistics: bool
) -> None:
    """To the byte where every element of x is used."""
    call = make("groups across norm groups", training=training)
    spec = call[0]
    pairs = torch.ones(2, spec.batch * spec.num_groups)
    statistics = {"mean": pairs[0], "rstd": pairs[1]} if has_statistics else {}
    simulator = Simulator(count=True, check_races=False)
    run(*call, wanted=wanted, simulator=simulator, **statistics)
    ledger = backward.ledger(spec, wanted, has_statistics=has_statistics)
    counted = simulator.bytes_read, simulator.bytes_written, len(simulator.launches)
    assert counted == (ledger.bytes_read, ledger.bytes_written, ledger.launches)


# ---- arguments ----------------------------------------------------------------------------------


def test_bad_calls_are_refused_before_anything_is_launched() -> None:
    simulator = Simulator()
    call = make("width 1", bias=False)
    for options, message in [
        ({"wanted": ALL}, "gradient of bias is wanted, but bias is None"),
        ({"seed": None}, "pass forward's seed"),
        ({"mean": torch.ones(6)}, "pass both, or neither"),
        ({"rstd": torch.ones(6)}, "pass both, or neither"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*call, **options, simulator=simulator)
    assert not simulator.launches


def test_a_sample_beyond_32_bit_indices_is_refused() -> None:
    shapes = (1, 1, 2**31), (1, 1, 1)
    spec = BlockSpec.from_arguments(*shapes, num_groups=1, min_value=-1.0, max_value=1.0, cap=0.5)
    x = torch.zeros(1).expand(shapes[0])  # nothing is allocated
    with pytest.raises(ValueError, match="one sample has 2,147,483,648 values"):
        run(spec, Operands(x, torch.ones(shapes[1])), x)


# ---- machine code -------------------------------------------------------------------------------


class H200:
    compute_capability = (9, 0)


def recorded(dtype: torch.dtype) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every kernel and the types of its arguments."""
    launches: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def record(kernel: Any, grid: Any, block: Any, *args: Any, **_: Any) -> None:
        arrays = (arg.numpy() if isinstance(arg, Tensor) else arg for arg in args)
        launches[kernel.py_func.__name__] = kernel, tuple(map(numba.typeof, arrays))

    spec, operands, grad_out = make("3-D", dtype)
    tensors: Any = [t.ravel() for t in (*operands, grad_out) if t is not None]
    call = clear.Operands(spec, *tensors, seed=torch.zeros(1, dtype=torch.int64))
    clear.gradients(record, call, None, ALL)
    return launches


SUMMING = ("channel_sums_kernel", "convolution_gradient_kernel")
KERNELS = {dtype: recorded(dtype) for dtype in (torch.float32, torch.float64)}


@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90a"])
@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for dtype in KERNELS for name in KERNELS[dtype]], ids=str
)
def test_machine_code(
    dtype: torch.dtype,
    name: str,
    architecture: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No spills, no stack, fp64 for sums alone, and the cache can tell the kernel's contents."""
    # Compiling calls of device functions asks for the current GPU: name one instead.
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: H200)
    kernel, types = KERNELS[dtype][name]
    ptx = compiled(kernel, types, architecture)
    report = assembled(ptx, architecture, tmp_path / "kernel.cubin")
    assert " 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    if dtype == torch.float32:
        wide = set(re.findall(r"\b(\w+)(?:\.\w+)*\.f64", ptx))
        assert not wide & {"mul", "fma", "div", "sqrt"}
        assert ("add" in wide) == (name in SUMMING)
    assert describe(kernel)
