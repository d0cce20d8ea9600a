"""The public function: what it returns on a CPU, what a seed is, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from definition import BOUNDS, Operands, definition, random_operands, relative_error, spec_for
from torch import Tensor

import numba_fused as nf
from numba_fused import fused_conv_group_norm_min_clamp_dropout as fused
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec
from numba_fused.verify import rounded_to_tf32

# Rung `algebra` can be given nothing else.
pytestmark = pytest.mark.filterwarnings("ignore::numba_fused.DegenerateChainWarning")

VARIANTS = ["auto", *nf.ladder.names()]
# For promises that the function keeps for all of them in one place.
FEW = ["auto", "torch", "unfused", "recompute", "pipelined"]
OPERANDS = random_operands((2, 3, 4, 6), (4, 3, 2, 2))
CALL: dict[str, Any] = {
    "num_groups": 2,
    "padding": (1, 0),
    "dropout_p": 0.25,
    "training": True,
    **BOUNDS,
}
SHAPE = (2, 4, 5, 5)


def call(**changes: Any) -> dict[str, Any]:
    """The keywords above with some changed, as the variant, if one is named, can run them."""
    variant = changes.get("variant")
    if variant == "tensor_core":
        changes = {"precision": "tf32"} | changes
    if variant == "algebra":
        changes = {"cap": changes.get("min_value", CALL["min_value"])} | changes
    return CALL | changes


def judged(variant: str, operands: Operands = OPERANDS) -> Operands:
    """Operands that all variants multiply exactly alike: rounded to TF32 where that is done."""
    if variant != "tensor_core":
        return operands
    x, weight = map(rounded_to_tf32, operands[:2])
    return operands._replace(x=x, weight=weight)


def spec_of_call(operands: Operands, keywords: dict[str, Any]) -> BlockSpec:
    """The validated call."""
    return spec_for(operands, **{k: v for k, v in keywords.items() if k != "variant"})


def kept(seed: int, p: float = 0.25) -> Tensor:
    return torch.from_numpy(nf.keep_mask(seed, SHAPE, p))


# ---- results ------------------------------------------------------------------------------------


def cases_in(dtype: torch.dtype) -> list[str]:
    """The variants that can run the call in a dtype."""
    operands = OPERANDS.to(dtype)
    limits = {
        variant: nf.ladder.get(variant).limit(spec_of_call(operands, call(variant=variant)))
        for variant in nf.ladder.names()
    }
    return ["auto", *(variant for variant, limit in limits.items() if limit is None)]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, dtype) for dtype in (torch.float32, torch.float64) for variant in cases_in(dtype)],
    ids=str,
)
def test_every_variant_is_the_reference(variant: str, dtype: torch.dtype) -> None:
    operands, keywords = judged(variant, OPERANDS.to(dtype)), call(variant=variant)
    out = fused(*operands, **keywords, seed=3)
    assert (out.shape, out.dtype, out.is_contiguous()) == (SHAPE, dtype, True)
    del keywords["variant"]
    torch.testing.assert_close(out, nf.reference(*operands, **keywords, seed=3))
    exact = definition(spec_of_call(operands, keywords), operands, kept(3).numpy())
    assert relative_error(out, exact) < (1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("variant", ["auto", "torch", "one_kernel", "library_conv"])
def test_groups_of_the_convolution(variant: str) -> None:
    operands = random_operands((2, 4, 5, 9), (4, 2, 2, 3))
    out = fused(*operands, **call(groups=2), seed=3, variant=variant)
    torch.testing.assert_close(out, nf.reference(*operands, **call(groups=2), seed=3))


@pytest.mark.parametrize("variant", FEW)
def test_inputs_may_have_any_strides_and_stay_as_they_are(variant: str) -> None:
    strided = OPERANDS._replace(
        x=OPERANDS.x.to(memory_format=torch.channels_last),
        weight=OPERANDS.weight.transpose(2, 3).contiguous().transpose(2, 3),
    )
    assert not strided.x.is_contiguous()
    assert not strided.weight.is_contiguous()
    keywords = call(variant=variant, seed=3)
    torch.testing.assert_close(fused(*strided, **keywords), fused(*OPERANDS, **keywords))
    for now, before in zip(strided, OPERANDS, strict=True):
        assert now is not None
        assert before is not None
        assert torch.equal(now, before)


@pytest.mark.parametrize("absent", ["bias", "gamma", "beta"])
@pytest.mark.parametrize("variant", FEW)
def test_any_vector_may_be_absent(variant: str, absent: str) -> None:
    operands = judged(variant)
    neutral = operands._replace(**{absent: torch.full((4,), float(absent == "gamma"))})
    out = fused(*operands._replace(**{absent: None}), **call(variant=variant), seed=3)
    torch.testing.assert_close(out, fused(*neutral, **CALL, seed=3))


def test_cap_none_is_the_benchmarks_chain() -> None:
    with pytest.warns(nf.DegenerateChainWarning, match=r"is -1 for every finite h"):
        out = fused(*OPERANDS, **call(cap=None, training=False))
    assert (out == -1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_batch_gives_an_empty_output(variant: str) -> None:
    out = fused(OPERANDS.x[:0], *OPERANDS[1:], **call(variant=variant), seed=3)
    assert (out.shape, out.dtype) == ((0, *SHAPE[1:]), torch.float32)


def test_variants_that_need_no_gpu_are_launched_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A named rung really runs its kernels; "auto" launches none."""
    launched: list[str] = []
    original = Simulator.launch

    def launch(self: Simulator, kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.py_func.__name__)
        original(self, kernel, *args, **options)

    monkeypatch.setattr(Simulator, "launch", launch)
    for variant in VARIANTS:
        launched.clear()
        keywords = call(variant=variant)
        fused(*OPERANDS, **keywords, seed=3)
        expected = 0
        if variant != "auto":
            ledger = nf.ladder.get(variant).ledger(spec_of_call(OPERANDS, keywords))
            expected = ledger.launches - ledger.library_launches
        assert len(launched) == expected


# ---- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["auto", "unfused", "torch"])
@pytest.mark.parametrize(
    "seed", [0, 7, -7, 2**64 - 7, 2**64 + 7, 2**70, torch.tensor(7), torch.tensor([[-7]])], ids=str
)
def test_a_seed_is_the_mask_of_its_value_modulo_2_to_the_64(
    seed: int | Tensor, variant: str
) -> None:
    positive = call(min_value=0.125)  # then only dropped elements are zero
    out = fused(*OPERANDS, **positive, seed=seed, variant=variant)
    assert torch.equal(out != 0, kept(int(seed) % 2**64))


@pytest.mark.parametrize("variant", ["auto", "one_kernel", "torch"])
def test_without_a_seed_torchs_generator_decides(variant: str) -> None:
    outs = []
    for manual in (0, 0, 1):
        torch.manual_seed(manual)
        outs += [fused(*OPERANDS, **CALL, variant=variant) for _ in range(2)]
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    for other in (1, 4, 5):
        assert not torch.equal(outs[0], outs[other])


def test_variants_draw_the_same_seed() -> None:
    outs = [
        (torch.manual_seed(5), fused(*OPERANDS, **call(min_value=0.125, variant=v)))[1] != 0
        for v in VARIANTS
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("changes", [{"training": False}, {"dropout_p": 0.0}, {"seed": 4}], ids=str)
@pytest.mark.parametrize("variant", ["auto", "unfused", "torch"])
def test_the_generator_is_left_alone_where_nothing_is_drawn(
    variant: str, changes: dict[str, Any]
) -> None:
    before = torch.random.get_rng_state()
    fused(*OPERANDS, **call(**changes), variant=variant)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("variant", FEW)
def test_eval_mode_is_p_0(variant: str) -> None:
    in_eval = fused(*OPERANDS, **call(variant=variant, training=False))
    assert (in_eval != 0).all()
    assert torch.equal(in_eval, fused(*OPERANDS, **call(variant=variant, dropout_p=0.0)))
    in_training = fused(*OPERANDS, **call(variant=variant), seed=3)
    torch.testing.assert_close(in_training, in_eval * kept(3) / 0.75)


@pytest.mark.parametrize("variant", FEW)
def test_p_1_gives_zeros_and_keeps_nan(variant: str) -> None:
    weight = OPERANDS.weight.clone()
    weight[1, 2, 0, 1] = math.nan  # of channel 1, which is in group 0 of 2
    out = fused(OPERANDS.x, weight, *OPERANDS[2:], **call(variant=variant, dropout_p=1.0))
    expected = torch.zeros(SHAPE)
    expected[:, :2] = math.nan
    assert torch.equal(out.isnan(), expected.isnan())
    assert (out.nan_to_num() == 0).all()


# ---- bad input ----------------------------------------------------------------------------------

X, WEIGHT, VECTOR = OPERANDS.x, OPERANDS.weight, torch.zeros(4)
# changes to the call, the exception, and what its message has to say
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x is no tensor": ({"x": [[1.0]]}, TypeError, "x must be a Tensor, but got list"),
    "weight is no tensor": ({"weight": None}, TypeError, "weight must be a Tensor, but got None"),
    "gamma is no tensor": ({"gamma": 1.0}, TypeError, "gamma must be a Tensor or None, .*float"),
    "weight of another dtype": (
        {"weight": WEIGHT.double()},
        RuntimeError,
        r"x and weight .*float32 and torch.float64: convert one with .to\(torch.float32\)",
    ),
    "bias of another dtype": ({"bias": VECTOR.half()}, RuntimeError, "x and bias .*float16"),
    "beta of another dtype": ({"beta": VECTOR.double()}, RuntimeError, "x and beta .*float64"),
    "weight on another device": (
        {"weight": WEIGHT.to("meta")},
        RuntimeError,
        r"x and weight must be on one device, but got cpu and meta: move one with .to\('cpu'\)",
    ),
    "bias of another size": (
        {"bias": VECTOR[:3]},
        RuntimeError,
        r"bias .*\[4\], but got shape \[3\]",
    ),
    "gamma of another rank": (
        {"gamma": VECTOR.view(4, 1)},
        RuntimeError,
        r"gamma .*shape \[4, 1\]",
    ),
    "x without a batch axis": ({"x": X[0]}, RuntimeError, r"x of 4 dim.*got 3.*x.unsqueeze\(0\)"),
    "weight of rank 2": ({"weight": WEIGHT[0, 0]}, RuntimeError, "weight|bias"),
    "channel count": ({"x": X[:, :2]}, RuntimeError, "3 channels .*got 2"),
    "groups": ({"groups": 3}, RuntimeError, "groups=3"),
    "num_groups": ({"num_groups": 3}, RuntimeError, "4 channels and num_groups=3"),
    "kernel beyond the input": ({"x": X[..., :1]}, RuntimeError, r"\[6, 1\].*smaller.*\[2, 2\]"),
    "stride 0": ({"stride": 0}, RuntimeError, "stride must be at least 1, but got"),
    "negative padding": ({"padding": -1}, RuntimeError, "padding must be at least 0, but got"),
    "p above 1": ({"dropout_p": 1.5}, ValueError, "between 0 and 1, but got 1.5"),
    "p NaN": ({"dropout_p": math.nan}, ValueError, "dropout_p .*NaN"),
    "bad p in eval mode": ({"dropout_p": 2.0, "training": False}, ValueError, "but got 2.0"),
    "min NaN": ({"min_value": math.nan}, ValueError, "min_value .*NaN"),
    "max NaN": ({"max_value": math.nan}, ValueError, "max_value .*NaN"),
    "cap NaN": ({"cap": math.nan}, ValueError, "cap .*NaN"),
    "min no number": ({"min_value": None}, TypeError, "min_value must be a number, .*None"),
    "unknown variant": ({"variant": "best"}, ValueError, "'best': use 'auto' or .*one_kernel"),
    "unknown precision": ({"precision": "fp8"}, NotImplementedError, "'ieee'.*but got 'fp8'"),
    "seed of another type": ({"seed": 1.5}, TypeError, "seed must be an int .*1.5 of type float"),
    "seed a bool": ({"seed": True}, TypeError, "seed must be an int .*True"),
    "seed of another dtype": ({"seed": torch.tensor(1.0)}, TypeError, "int64 .*float32"),
    "two seeds": ({"seed": torch.tensor([1, 2])}, TypeError, r"one element, .*shape \[2\]"),
    "seed on another device": (
        {"seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        RuntimeError,
        r"seed is on meta, x on cpu: use seed.to\(x.device\)",
    ),
}


def no_launch(*args: object, **options: object) -> None:
    raise AssertionError("something was launched")


@pytest.mark.parametrize("variant", ["auto", "pointwise"])
@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_refused_before_anything_runs(
    mistake: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, exception, message = BAD[mistake]
    arguments: dict[str, Any] = OPERANDS._asdict() | call(variant=variant) | changes
    monkeypatch.setattr(Simulator, "launch", no_launch)
    monkeypatch.setattr("numba_fused.ops.chain", no_launch)
    generator = torch.random.get_rng_state()
    with pytest.raises(exception, match=message) as caught:
        fused(**arguments)
    assert caught.type is exception
    assert torch.equal(torch.random.get_rng_state(), generator)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_unsupported_dtypes_are_refused(dtype: torch.dtype) -> None:
    """`NotImplementedError`, a `RuntimeError`, is what torch raises for integers."""
    with pytest.raises(NotImplementedError, match=r"float32 or float64, for example x.float\(\)"):
        fused(*OPERANDS.to(dtype), **CALL)


def test_devices_without_kernels_are_refused() -> None:
    operands = [t.to("meta") for t in OPERANDS if t is not None]
    with pytest.raises(NotImplementedError, match=r"x is on meta.*use x.cuda\(\) or x.cpu\(\)"):
        fused(*operands, **CALL)


def test_shapes_that_would_simulate_for_hours_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Simulator, "launch", no_launch)
    x = torch.zeros(128, 3, 64, 64)
    with pytest.raises(ValueError, match=r"variant='unfused'.* limit is .*'auto'.*x.cuda\(\)"):
        fused(x, *OPERANDS[1:], **CALL, variant="unfused")
    for variant in ("auto", "torch"):
        assert fused(x, *OPERANDS[1:], **CALL, variant=variant).shape == (128, 4, 65, 63)


def test_a_variant_that_cannot_run_the_shape_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nf.ladder.get("epilogue").module
    monkeypatch.setattr(module, "limit", lambda spec: "4 channels, at most 3", raising=False)
    monkeypatch.setattr(nf.ladder, "_bound", {})  # an equal call may be remembered as runnable
    with pytest.raises(ValueError, match="'epilogue' cannot run this shape: 4 channels"):
        fused(*OPERANDS, **CALL, variant="epilogue")


def test_there_is_nothing_public_that_does_not_exist() -> None:
    for name in nf.__all__:
        assert getattr(nf, name) is not None
