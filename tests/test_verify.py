"""The judge is judged: it accepts what is right and rejects every kind of wrong answer."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d
from torch.nn.grad import conv1d_input, conv1d_weight

from numba_fused import ladder, rng, verify
from numba_fused.ladder import rung_8_split
from numba_fused.ladder.tensor_cores import tile_shape
from numba_fused.reference import chain, convolution
from numba_fused.spec import BlockSpec
from numba_fused.verify import Case, Result, Tensors, cases, check, judge

MANY = list(cases(11, 250))
# One case that exercises every operator of the chain: all bounds act, dropout drops.
TELLING = next(
    case
    for case in cases(3, 2000, dtype="float32")
    if case.family == "normal"
    and case.spec.precision == "ieee"
    and case.spec.draws
    and 0.1 < case.spec.dropout_p < 0.9
    and case.spec.has_bias
    and case.spec.affine
    and case.spec.min_value < -0.3
    and case.spec.cap < case.spec.max_value
    and 1 < case.spec.num_groups < case.spec.out_channels
    and math.prod(case.spec.output_shape) > 100
)


def right(case: Case, **changes: object) -> Callable[[Tensors, Tensor], None]:
    """PyTorch's fp32 answer, with some of the spec changed."""
    spec = dataclasses.replace(case.spec, **changes)  # pyright: ignore[reportArgumentType]

    def compute(tensors: Tensors, out: Tensor) -> None:
        out.copy_(chain(spec, *tensors, case.keep_mask()))

    return compute


def judged(compute: Callable[[Tensors, Tensor], None], case: Case = TELLING) -> Result:
    return judge(case, compute)


# ---- cases ------------------------------------------------------------------------------------


def test_case_depends_on_seed_and_index_alone() -> None:
    again = next(cases(11, 1, first=37))
    assert again == MANY[37]
    assert next(cases(12, 1, first=37)) != MANY[37]
    for one, two in zip(again.tensors(), MANY[37].tensors(), strict=True):
        assert (one is None) == (two is None)
        assert one is None or two is None or torch.equal(one.nan_to_num(), two.nan_to_num())


def test_no_case_is_degenerate() -> None:
    for case in MANY:
        assert case.spec.constant is None, str(case)
        assert case.spec.min_value < case.spec.cap


def test_cases_stay_within_their_size() -> None:
    for max_macs in (2000, 30_000):
        for case in cases(4, 60, max_macs=max_macs):
            assert case.spec.flops / 2 <= max_macs, str(case)


@pytest.mark.parametrize(
    ("what", "values", "wanted"),
    [
        ("axes", lambda c: len(c.spec.kernel_size), {1, 2, 3}),
        ("kernel", lambda c: max(c.spec.kernel_size), {1, 2, 3, 4, 5}),
        ("stride", lambda c: max(c.spec.stride), {1, 2, 3}),
        ("dilation", lambda c: max(c.spec.dilation), {1, 2, 3}),
        ("padding", lambda c: type(c.arguments["padding"]), {int, str, tuple}),
        ("one-sided padding", lambda c: any(a != b for a, b in c.spec.padding), {True, False}),
        ("groups", lambda c: c.spec.groups, {1, 2, 3, 4}),
        ("one norm group", lambda c: c.spec.num_groups == 1, {True, False}),
        ("a group a channel", lambda c: c.spec.num_groups == c.spec.out_channels, {True, False}),
        ("width beyond a run", lambda c: c.spec.output_size[-1] > 16, {True, False}),
        ("width 1", lambda c: c.spec.output_size[-1] == 1, {True, False}),
        ("width of whole runs", lambda c: c.spec.output_size[-1] % 16 == 0, {True, False}),
        ("p = 0", lambda c: c.spec.dropout_p == 0, {True, False}),
        ("p = 1", lambda c: c.spec.dropout_p == 1, {True, False}),
        ("training", lambda c: c.spec.training, {True, False}),
        ("bias", lambda c: c.spec.has_bias, {True, False}),
        ("affine", lambda c: c.spec.affine, {True, False}),
        ("dtype", lambda c: c.spec.dtype, {"float32", "float64"}),
        ("precision", lambda c: c.spec.precision, {"ieee", "tf32"}),
        ("batch", lambda c: c.spec.batch, {1, 2, 3, 5}),
        ("strided", lambda c: c.strided, {True, False}),
        ("family", lambda c: c.family, set(verify.FAMILIES)),
        ("threads_per_block", lambda c: c.threads_per_block, set(verify.THREADS_PER_BLOCK)),
    ],
)
def test_cases_cover(what: str, values: Callable[[Case], object], wanted: set[object]) -> None:
    assert wanted <= set(map(values, MANY)), what


def test_one_case_in_five_is_one_or_two_long_rows() -> None:
    wide = [case for case in MANY if case.index % 5 == verify.WIDE]
    assert len(wide) == len(MANY) / 5
    widths = [case.spec.output_size[-1] for case in wide]
    assert verify.WIDTHS[0] <= min(widths) <= max(widths) <= verify.WIDTHS[1]
    assert {width % rng.RUN for width in widths} >= {0, 1, rng.RUN - 1}
    rows = [math.prod(case.spec.output_size[:-1]) for case in wide]
    assert {1, 2} <= set(rows)
    assert np.mean([count <= 2 for count in rows]) > 0.8  # padding can make more of one


def has_an_idle_warp_over_inputs(case: Case) -> bool:
    """Whether a warp of rung split's tile has no outputs, but taps that reach the input's edge."""
    if ladder.get("split").limit(case.spec) is not None:
        return False
    tile = tile_shape(case.spec, rung_8_split.kind(case.spec))
    width, whole_runs = tile.out_size[2], -(-tile.out_size[2] // rng.RUN) * rng.RUN
    first_input = whole_runs * tile.stride[2] - tile.padding[2]
    return width <= tile.columns - rng.RUN and first_input < tile.in_size[2]


@pytest.mark.parametrize("max_macs", [verify.SIMULATOR_MACS, verify.GPU_MACS])
def test_a_run_of_20_cases_has_warps_beyond_the_last_column(max_macs: int) -> None:
    """What such a warp computes belongs to nobody; counted, it once spoiled the statistics."""
    assert any(map(has_an_idle_warp_over_inputs, cases(0, 20, max_macs=max_macs)))


def test_tensors_are_of_the_spec_and_their_family() -> None:
    for case in MANY[:80]:
        x, weight, bias, gamma, beta = tensors = case.tensors()
        assert tuple(x.shape) == case.spec.x_shape
        assert tuple(weight.shape) == case.spec.weight_shape
        assert {str(t.dtype) for t in tensors if t is not None} == {f"torch.{case.spec.dtype}"}
        assert (bias is not None, gamma is not None) == (case.spec.has_bias, case.spec.affine)
        assert (gamma is None) == (beta is None)
        assert x.is_contiguous() != case.strided or x.numel() == 1
        if case.family == "integers":
            assert torch.equal(x, x.round())
            assert torch.equal(weight, weight.round())
        if case.family == "offset":
            assert x.mean() > 990
        if case.family != "nonfinite":
            assert all(bool(t.isfinite().all()) for t in tensors if t is not None)


def test_nonfinite_cases_keep_something_to_compare() -> None:
    shares = []
    for case in (case for case in MANY if case.family == "nonfinite"):
        ruler = verify.yardstick(case.spec, case.tensors(), case.keep_mask())
        shares.append(float(ruler.reference.isfinite().double().mean()))
    assert min(shares) < 1.0
    assert np.mean([0.0 < share < 1.0 for share in shares]) > 0.2


def test_reproducer_names_the_case() -> None:
    case = next(cases(3, 1, first=9, max_macs=5000, dtype="float64"))
    assert case.reproducer("torch") == (
        "numba-fused verify --seed 3 --only 9 --max-macs 5000 --dtype float64 --variant torch"
    )


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1000"):
        next(cases(0, 1, max_macs=10))


# ---- the judge --------------------------------------------------------------------------------


def test_pytorch_itself_passes() -> None:
    for case in MANY[:120]:
        result = judged(right(case), case)
        assert result.ok, f"{case}: {result.reason}"


def test_bound_is_tight() -> None:
    """Nowhere near what fp32 could be confused with: a few units in the last place."""

    def median(dtype: str, precision: str) -> float:
        chosen = (
            c
            for c in MANY
            if c.family in ("normal", "integers")
            and (c.spec.dtype, c.spec.precision) == (dtype, precision)
        )
        bounds = [judged(right(c), c).bound for c in itertools.islice(chosen, 40)]
        return float(np.median(bounds))

    assert median("float32", "ieee") < 2e-6
    assert median("float64", "ieee") < 1.1e-14
    assert median("float64", "tf32") < 1.1e-14  # which is about fp32 alone
    assert 1e-5 < median("float32", "tf32") < 2e-3


def zeros(tensors: Tensors, out: Tensor) -> None:
    out.zero_()


def nothing(tensors: Tensors, out: Tensor) -> None:
    pass


def all_but_one(tensors: Tensors, out: Tensor) -> None:
    poison = out.flatten()[-1].clone()
    right(TELLING)(tensors, out)
    out.view(-1)[-1:] = poison


def half_precision(tensors: Tensors, out: Tensor) -> None:
    low = tensors.map(lambda t: t.half().float())
    right(TELLING)(low, out)


def one_value_off(tensors: Tensors, out: Tensor) -> None:
    right(TELLING)(tensors, out)
    out.view(-1)[int(out.abs().argmax())] *= 1 + 1e-4


def nan_at_one(tensors: Tensors, out: Tensor) -> None:
    right(TELLING)(tensors, out)
    out.view(-1)[3] = math.nan


def shifted_mask(tensors: Tensors, out: Tensor) -> None:
    keep = TELLING.keep_mask()
    assert keep is not None
    out.copy_(chain(TELLING.spec, *tensors, keep.roll(1)))


def other_mask(tensors: Tensors, out: Tensor) -> None:
    keep = dataclasses.replace(TELLING, dropout_seed=TELLING.dropout_seed + 1).keep_mask()
    out.copy_(chain(TELLING.spec, *tensors, keep))


def crash(tensors: Tensors, out: Tensor) -> None:
    raise IndexError("index 7 is out of range")


def unbiased_variance(tensors: Tensors, out: Tensor) -> None:
    n = TELLING.spec.group_size
    gamma = tensors.gamma
    assert gamma is not None
    right(TELLING)(tensors._replace(gamma=gamma * math.sqrt((n - 1) / n)), out)


WRONG = {
    "zeros": (zeros, "error"),
    "nothing written": (nothing, "never written"),
    "one element not written": (all_but_one, "never written: 1 of"),
    "half precision": (half_precision, "error"),
    "one value off by 1e-4": (one_value_off, "error"),
    "a stray NaN": (nan_at_one, "NaN is not where"),
    "mask shifted by one": (shifted_mask, "not dropped"),
    "mask of another seed": (other_mask, "not dropped"),
    "a crash": (crash, "IndexError: index 7"),
    "unbiased variance": (unbiased_variance, "error"),
    "no dropout": (right(TELLING, training=False), "not dropped"),
    "no rescaling": (right(TELLING, dropout_p=0.0), "not dropped"),
    "no min": (right(TELLING, cap=math.inf), "error"),
    "no lower clamp": (right(TELLING, min_value=-math.inf), "error"),
    "no clamp": (right(TELLING, min_value=-math.inf, max_value=math.inf), "error"),
    "eps forgotten": (right(TELLING, eps=0.0), "error"),
    "one normalisation group": (right(TELLING, num_groups=1), "error"),
}


def test_telling_case_tells() -> None:
    assert judged(right(TELLING)).status == "ok"
    assert TELLING.spec.constant is None


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_answer_is_rejected(mistake: str) -> None:
    compute, reason = WRONG[mistake]
    result = judged(compute)
    assert not result.ok
    assert reason in result.reason


@pytest.mark.parametrize("name", ["bias", "gamma", "beta"])
def test_forgotten_vector_is_rejected(name: str) -> None:
    def forgetful(tensors: Tensors, out: Tensor) -> None:
        right(TELLING)(tensors._replace(**{name: None}), out)

    # A channel's bias would be normalised away if every channel were its own group.
    assert TELLING.spec.num_groups < TELLING.spec.out_channels
    assert not judged(forgetful).ok


def raw_moments(case: Case) -> Callable[[Tensors, Tensor], None]:
    """The chain with E[x^2] - E[x]^2 in fp32 for the variance."""

    def compute(tensors: Tensors, out: Tensor) -> None:
        spec = case.spec
        z = convolution(spec, *tensors[:3])
        grouped = z.view(spec.batch, spec.num_groups, -1)
        mean = grouped.mean(-1, keepdim=True)
        variance = ((grouped * grouped).mean(-1, keepdim=True) - mean * mean).clamp_min(0)
        h = ((grouped - mean) * torch.rsqrt(variance + spec.eps)).view(z.shape)
        if tensors.gamma is not None and tensors.beta is not None:
            shape = (1, -1, *(1,) * len(spec.kernel_size))
            h = h * tensors.gamma.view(shape) + tensors.beta.view(shape)
        c = h.clamp(max=spec.cap).clamp(spec.min_value, spec.max_value)
        keep = case.keep_mask()
        out.copy_(c if keep is None else c * (keep * spec.keep_scale))

    return compute


def test_raw_moments_are_rejected_at_an_offset() -> None:
    """The classic defect that only large means show; padding hides it, being far from the mean."""
    rejected = {"offset": 0, "normal": 0}
    for family in rejected:
        chosen = (
            c
            for c in cases(2, 1000, dtype="float32")
            if c.family == family
            and c.spec.precision == "ieee"
            and c.spec.group_size > 20
            and c.spec.dropout_p < 1
            and not any(map(sum, c.spec.padding))
        )
        for case in itertools.islice(chosen, 10):
            rejected[family] += not judged(raw_moments(case), case).ok
    assert rejected["offset"] >= 9
    assert rejected["normal"] <= 2


def test_swallowed_nan_is_rejected() -> None:
    case = next(
        c
        for c in MANY
        if c.family == "nonfinite" and c.tensors().x.isnan().any() and c.spec.batch > 1
    )

    def swallow(tensors: Tensors, out: Tensor) -> None:
        right(case)(tensors, out)
        out.nan_to_num_(0.0)

    result = judged(swallow, case)
    assert not result.ok
    assert "NaN is not where" in result.reason


def test_wrong_shape_and_dtype_are_rejected() -> None:
    ruler = verify.yardstick(TELLING.spec, TELLING.tensors(), TELLING.keep_mask())
    reference = ruler.reference
    assert "dtype" in ruler.judge(reference).reason
    assert "shape" in ruler.judge(reference.float().flatten()).reason
    assert ruler.judge(reference.float(), TELLING.keep_mask()).ok


def test_constant_zero_answer_has_an_error() -> None:
    """p = 1 leaves nothing but zeros; then the error is the norm of what is not zero."""
    case = next(c for c in MANY if c.spec.draws and c.spec.dropout_p == 1 and c.family == "normal")
    assert judged(zeros, case).status == "ok"
    assert judged(zeros, case).error == 0.0

    def tiny(tensors: Tensors, out: Tensor) -> None:
        out.fill_(1e-3)

    assert not judged(tiny, case).ok


def test_mirror_is_the_same_problem() -> None:
    """The mirrored evaluation differs from the plain one by rounding alone, in every case."""
    for case in itertools.islice((c for c in MANY if c.family != "nonfinite"), 120):
        tensors = case.tensors().map(Tensor.double)
        plain = chain(case.spec, *tensors, case.keep_mask())
        mirrored = verify.mirrored(case.spec, tensors, case.keep_mask())
        assert torch.allclose(plain, mirrored, rtol=1e-6, atol=1e-6), str(case)


# ---- what one right answer does not show ------------------------------------------------------


def test_leftovers_in_fresh_memory_help_nobody() -> None:
    """What a call allocates holds NaN; without that it may hold the right answer, from before."""

    def lazy(tensors: Tensors, out: Tensor) -> None:
        for scratch in (torch.empty(3), torch.empty_like(out), out.new_empty(3)):
            assert scratch.isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == -1).all()
        right(TELLING)(tensors, out)
        out.view(-1)[:2] = torch.empty(2)

    result = judged(lazy)
    assert result.reason.startswith("NaN is not where the reference has it: 2 of")


def test_second_run_must_give_the_same_bits() -> None:
    def last_bit_off(tensors: Tensors, out: Tensor) -> None:
        right(TELLING)(tensors, out)
        largest = int(out.abs().argmax())
        out.view(-1)[largest] *= 1 + 2**-23

    assert judged(last_bit_off).ok
    assert judge(TELLING, right(TELLING), again=right(TELLING)).ok
    result = judge(TELLING, right(TELLING), again=last_bit_off)
    assert result.status == "failed"
    assert re.match(r"two runs differ: 1 of \d+ elements, the first at \[", result.reason)


def clamp_first(case: Case) -> Callable[[Tensors, Tensor], None]:
    """min after clamp."""

    def compute(tensors: Tensors, out: Tensor) -> None:
        right(case, cap=math.inf)(tensors, out)
        keep = case.keep_mask()
        cap = torch.full_like(out, case.spec.cap)
        out.copy_(out.minimum(cap if keep is None else cap * keep * case.spec.keep_scale))

    return compute


def test_order_of_the_bounds_shows_only_where_they_cross() -> None:
    chosen = [
        case
        for case in MANY
        if case.family == "normal"
        and case.spec.dropout_p <= 0.5
        and math.prod(case.spec.output_shape) > 40  # some of each sample survive
    ]
    assert len(chosen) > 10
    for case in chosen:
        assert judged(clamp_first(case), case).ok
    crossed = [case.crossed() for case in chosen]
    low_caps = [
        case for case in crossed if case.spec.cap < case.spec.min_value < case.spec.max_value
    ]
    assert {case.spec.min_value > case.spec.max_value for case in crossed} == {True, False}
    assert low_caps
    for case in crossed:
        assert case.spec.batch == 1
        assert judged(right(case), case).ok
    assert not any(judged(clamp_first(case), case).ok for case in low_caps)


def test_check_repeats_and_crosses_a_quarter_of_the_cases_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A variant that is right at first and then noisy, or right but for crossed bounds."""
    calls = []

    def run(name: str, *tensors: Tensor, spec: BlockSpec, out: Tensor, **options: object) -> None:
        calls.append(spec)
        keep = verify.mask_of(spec, case.dropout_seed, "cpu")
        x, weight, bias, gamma, beta = tensors
        out.copy_(chain(spec, x, weight, bias, gamma, beta, keep))
        wrong = len(calls) == 2 if name == "noisy" else spec.constant is not None
        if wrong:
            out += 1

    monkeypatch.setattr(verify, "check_name", lambda name: None)
    monkeypatch.setattr(ladder, "get", lambda name: ladder.rungs()[0])
    monkeypatch.setattr(ladder, "run", run)
    plain = [c for c in MANY if c.family == "normal" and c.spec.precision == "ieee"]
    for case in plain[:24]:
        reasons = {}
        for variant in ("noisy", "uncrossed"):
            calls.clear()
            reasons[variant] = check(case, variant).reason
        noisy, uncrossed = case.index % 4 == verify.REPEATED, case.index % 4 == verify.CROSSED
        assert ("two runs differ" in reasons["noisy"]) == noisy
        assert ("bounds that cross" in reasons["uncrossed"]) == uncrossed
    assert {c.index % 4 for c in plain[:24]} == {0, 1, 2, 3}


# ---- gradients --------------------------------------------------------------------------------


def autograd(case: Case) -> Callable[[Tensors, Tensor], list[Tensor | None]]:
    """PyTorch's gradients in the case's dtype."""

    def compute(tensors: Tensors, grad_out: Tensor) -> list[Tensor | None]:
        leaves = tensors.map(lambda t: t.clone().requires_grad_())
        chain(case.spec, *leaves, case.keep_mask()).backward(grad_out)
        return [None if t is None else t.grad for t in leaves]

    return compute


def test_pytorchs_gradients_pass() -> None:
    for case in MANY[:60]:
        result = verify.judge_gradients(case, autograd(case))
        assert result.status == ("skipped" if case.family == "nonfinite" else "ok"), str(case)
        assert result.status == "skipped" or result.error <= result.bound


@pytest.mark.parametrize(("precision", "margin"), [("ieee", 1e-3), ("tf32", 1e-2)])
def test_gradient_of_the_output_keeps_clear_of_the_bounds(precision: str, margin: float) -> None:
    fp32 = [c for c in MANY if c.spec.dtype == "float32" and c.family == "normal"]
    cleared = 0
    for case in (of_precision(c, precision) for c in fp32[:20]):
        spec, gradient = case.spec, case.grad_out()
        assert torch.equal(gradient, case.grad_out())
        unbounded = dataclasses.replace(
            spec, min_value=-math.inf, max_value=math.inf, cap=math.inf, training=False
        )
        h = chain(unbounded, *case.tensors().map(Tensor.double), None)
        bounds = (spec.min_value, spec.max_value, spec.cap)
        near = torch.stack([(h - bound).abs() for bound in bounds]).amin(dim=0) < margin
        assert torch.equal(gradient == 0, near)
        cleared += int(near.sum())
    assert cleared > 0


def of_precision(case: Case, precision: str) -> Case:
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, precision=precision))


def in_tf32(case: Case) -> Callable[[Tensors, Tensor], list[Tensor | None]]:
    """PyTorch's gradients as cuDNN computes them where it may use TF32."""

    def compute(tensors: Tensors, grad_out: Tensor) -> list[Tensor | None]:
        with verify.ConvolutionsInTf32():
            return autograd(case)(tensors, grad_out)

    return compute


def test_gradients_in_tf32_pass_where_that_is_asked_for_alone() -> None:
    chosen = [c for c in MANY if c.spec.dtype == "float32" and c.family == "normal"]
    for case in chosen[:20]:
        loose = verify.judge_gradients(of_precision(case, "tf32"), in_tf32(case))
        assert loose.status == "ok", f"{case}: {loose.reason}"
    strict = verify.judge_gradients(of_precision(TELLING, "ieee"), in_tf32(TELLING))
    assert strict.reason.startswith("gradient of x: error")


def test_operands_in_tf32_are_all_that_precision_tf32_excuses() -> None:
    """Wider bounds for what follows from convolutions, and wide for nothing else."""
    case = of_precision(TELLING, "tf32")
    grad_out, operands = case.grad_out(), (case.tensors(), case.keep_mask())
    strict, loose = (
        verify.gradient_yardsticks(spec, operands[0], grad_out, operands[1])
        for spec in (TELLING.spec, case.spec)
    )
    bounds = {}
    for name, narrow, wide in zip(verify.backward.NAMES, strict, loose, strict=True):
        assert narrow is not None
        assert wide is not None
        assert torch.equal(narrow.reference, wide.reference)
        assert narrow.bound < 2e-5
        bounds[name] = wide.bound
    assert bounds.pop("beta") < 1e-5  # a sum of grad_out
    assert all(1e-4 < bound < 0.02 for bound in bounds.values()), bounds


def test_only_fp32_is_rounded_to_tf32() -> None:
    case = next(c for c in MANY if c.spec.dtype == "float64" and c.family == "normal")
    spec, tensors = of_precision(case, "tf32").spec, case.tensors()
    rulers = verify.gradient_yardsticks(spec, tensors, case.grad_out(), case.keep_mask())
    assert rulers[1] is not None
    assert rulers[1].bound < 1e-9
    assert verify.yardstick(spec, tensors, case.keep_mask()).bound < 1e-9


def test_convolutions_in_tf32_round_what_they_multiply_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, gradient = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 9), (4, 3, 2), (4,), (2, 4, 8))
    )
    rounded_x, rounded_weight, rounded_gradient = map(verify.rounded_to_tf32, (x, weight, gradient))
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    with verify.ConvolutionsInTf32():
        z = conv1d(x, weight, bias)
        found = torch.autograd.grad(z, (x, weight, bias), gradient)
    assert torch.equal(z, conv1d(rounded_x, rounded_weight, bias))
    assert not torch.allclose(z, conv1d(x, weight, bias), atol=1e-5)
    dx = conv1d_input(x.shape, rounded_weight, rounded_gradient)
    dweight = conv1d_weight(rounded_x, weight.shape, rounded_gradient)
    torch.testing.assert_close(found, (dx, dweight, gradient.sum((0, 2))))


def test_gradients_that_are_zero_throughout_have_a_bound_too() -> None:
    case = next(c for c in MANY if c.spec.draws and c.spec.dropout_p == 1 and c.family == "normal")
    result = verify.judge_gradients(case, autograd(case))
    least = verify.LEAST_ERROR[case.spec.dtype]
    assert (result.status, result.error) == ("ok", 0.0)
    assert 2 * least <= result.bound <= 3 * least


WRONG_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "off by 1e-4": (lambda g: g * (1 + 1e-4), r"error (1.00e-04|9.99e-05) is above the bound"),
    "zero": (torch.zeros_like, "error 1.00e"),
    "of the wrong sign": (torch.neg, "error 2.00e"),
    "none": (lambda g: None, "none"),
    "not finite": (lambda g: g.index_fill(0, torch.tensor([0]), math.inf), r"\+Inf is not where"),
    "of another shape": (lambda g: g.flatten()[:-1], "shape"),
    "in half precision": (lambda g: g.half().float(), "error"),
}


@pytest.mark.parametrize("which", range(5), ids=["x", "weight", "bias", "gamma", "beta"])
@pytest.mark.parametrize("mistake", WRONG_GRADIENTS)
def test_wrong_gradient_is_rejected(mistake: str, which: int) -> None:
    change, reason = WRONG_GRADIENTS[mistake]

    def compute(tensors: Tensors, grad_out: Tensor) -> list[Tensor | None]:
        found = autograd(TELLING)(tensors, grad_out)
        gradient = found[which]
        assert gradient is not None
        found[which] = change(gradient)
        return found

    result = verify.judge_gradients(TELLING, compute)
    assert not result.ok
    name = verify.backward.NAMES[which]
    assert re.match(f"gradient of {name}: {reason}", result.reason), result.reason


def test_gradients_of_a_second_run_must_have_the_same_bits() -> None:
    def last_bit_off(tensors: Tensors, grad_out: Tensor) -> list[Tensor | None]:
        found = autograd(TELLING)(tensors, grad_out)
        gamma = found[3]
        assert gamma is not None
        gamma[int(gamma.abs().argmax())] *= 1 + 2**-23
        return found

    plain = autograd(TELLING)
    assert verify.judge_gradients(TELLING, plain, again=plain).ok
    result = verify.judge_gradients(TELLING, plain, again=last_bit_off)
    assert result.reason.startswith("gradient of gamma: two runs differ: 1 of")


def test_crash_of_a_backward_pass_is_a_failure() -> None:
    def crash(tensors: Tensors, grad_out: Tensor) -> list[Tensor | None]:
        raise IndexError("index 7 is out of range")

    assert verify.judge_gradients(TELLING, crash).reason == "IndexError: index 7 is out of range"


def runs(case: Case, variant: str) -> bool:
    """Whether a variant of the backward pass can run the case, and has something to show."""
    told = verify.backward.obstacle(variant, case.spec, ladder.H200_CAPABILITY) is None
    return told and case.family != "nonfinite" and bool(case.grad_out().any())


@pytest.mark.parametrize(
    ("variant", "precision", "count"),
    [("clear", "ieee", 4), ("tensor_core", "ieee", 1), ("tensor_core", "tf32", 1)],
)
def test_backward_kernels_pass(variant: str, precision: str, count: int) -> None:
    small = (c for c in cases(6, 400, max_macs=1000) if math.prod(c.spec.weight_shape) < 30)
    chosen = (c for c in small if c.spec.precision == precision and runs(c, variant))
    for case in itertools.islice(chosen, count):
        result = verify.check_gradients(case, variant=variant)
        assert result.status == "ok", f"{case}: {result.reason}"
        assert 0 < result.error <= result.bound < math.inf


def test_the_variant_asked_for_is_the_one_that_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice, and by its name among the rungs' too."""
    ran = []

    def run(*operands: Tensor, variant: str, **_: object) -> list[Tensor | None]:
        ran.append(variant)
        return [None] * 5

    monkeypatch.setattr(verify.backward, "run", run)
    monkeypatch.setattr(verify.backward, "obstacle", lambda *_: None)
    for variant in verify.backward.VARIANTS:
        reason = "gradient of x: none"
        assert verify.check_gradients(TELLING, variant=variant).reason == reason
        assert check(TELLING, f"backward:{variant}").reason == reason
    assert ran == [v for v in verify.backward.VARIANTS for _ in range(2)]


def test_what_a_backward_variant_cannot_run_is_skipped_with_its_reason() -> None:
    case = next(c for c in MANY if c.spec.dtype == "float64")
    result = check(case, "backward:tensor_core")
    assert (result.status, result.ok) == ("skipped", True)
    assert "x is float64" in result.reason
    with pytest.raises(ValueError, match="unknown backward variant 'quick'"):
        verify.check_gradients(case, variant="quick")


# ---- rungs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(cases(0, 4, max_macs=3000)), ids=lambda case: case.index)
def test_rungs_pass(case: Case) -> None:
    for name in ladder.names():
        result = check(case, name)
        assert result.ok, f"{case.reproducer(name)}: {result.reason}"


def test_unknown_name_is_an_error() -> None:
    for name in ("fast", "backward:fast", "clear"):
        with pytest.raises(ValueError, match=f"unknown variant '{name}'") as told:
            check(TELLING, name)
        assert str(told.value).endswith(", ".join(verify.names()))


def test_limit_is_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder.Rung, "limit", lambda self, spec: "only on Tuesdays")
    result = check(TELLING, "one_kernel")
    assert (result.status, result.reason, result.ok) == ("skipped", "only on Tuesdays", True)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(cases(1, 20, max_macs=2_000_000)), ids=lambda c: c.index)
def test_rungs_pass_on_the_gpu(case: Case) -> None:
    for name in ladder.names():
        result = check(case, name, "cuda")
        assert result.ok, f"{case.reproducer(name)}: {result.reason}"
