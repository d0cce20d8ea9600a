"""spec.py: what a call is refused for, what shape and cost it has, when it is degenerate.

`BlockSpec` knows nothing of torch, so torch is the judge here: the same mistake is made with
`torch.nn.functional`, and the exception types are compared.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import numba_fused as nf
from numba_fused.spec import BlockSpec, check_threads_per_block

NAN, INF = math.nan, math.inf
CALL: dict[str, Any] = {
    "x": (2, 4, 5, 6, 7),
    "weight": (6, 2, 3, 3, 3),
    "groups": 2,
    "num_groups": 3,
    "min_value": -1.0,
    "max_value": 1.0,
    "cap": 0.5,
    "dropout_p": 0.2,
    "training": True,
}


def spec_of(**changes: Any) -> BlockSpec:
    """The valid call above with some of its arguments changed."""
    call = CALL | changes
    return BlockSpec.from_arguments(call.pop("x"), call.pop("weight"), **call)


def torch_chain(device: str = "cpu", **changes: Any) -> torch.Tensor:
    """The same call made with torch's own functions."""
    call = CALL | {"stride": 1, "padding": 0, "dilation": 1, "dtype": "float32"} | changes
    dtype = getattr(torch, call["dtype"])
    x, weight = (torch.zeros(call[name], dtype=dtype, device=device) for name in ("x", "weight"))
    convolve = {3: F.conv1d, 4: F.conv2d}.get(weight.ndim, F.conv3d)
    z = convolve(x, weight, None, *(call[k] for k in ("stride", "padding", "dilation", "groups")))
    h = F.group_norm(z, call["num_groups"])
    m = torch.min(h, torch.tensor(call["cap"], dtype=dtype, device=device))
    c = torch.clamp(m, call["min_value"], call["max_value"])
    return F.dropout(c, call["dropout_p"], call["training"])


def exception_of(call: Callable[[], object]) -> Exception | None:
    """What `call` raises, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None


# ---- bad arguments ------------------------------------------------------------------------------

# (changes to CALL, our exception, what its message has to say: the value, the limit, the fix).
# A fourth entry says why torch raises something else for it, or nothing.
BAD: list[tuple[dict[str, Any], type[Exception], list[str], str]] = [
    # ranks
    ({"x": (5, 6, 7)}, RuntimeError, ["x of 5 dim", "got 3", "[5, 6, 7]"], ""),
    ({"x": (1, 2, 4, 5, 6, 7)}, RuntimeError, ["x of 5 dim", "got 6"], ""),
    (
        {"x": (4, 5, 6, 7)},
        RuntimeError,
        ["x of 5 dim", "got 4", "x.unsqueeze(0)"],
        "torch's conv3d adds the batch axis and its group_norm then takes channels for samples",
    ),
    ({"weight": (6, 2)}, RuntimeError, ["3, 4 or 5 dim", "got 2", "[6, 2]"], ""),
    ({"weight": (6, 2, 1, 3, 3, 3)}, RuntimeError, ["3, 4 or 5 dim", "got 6"], ""),
    # channels and groups
    ({"weight": (6, 4, 3, 3, 3)}, RuntimeError, ["groups=2", "8 channels", "got 4"], ""),
    ({"weight": (5, 2, 3, 3, 3)}, RuntimeError, ["multiple of groups=2", "5"], ""),
    ({"weight": (0, 2, 3, 3, 3)}, RuntimeError, ["positive multiple of groups=2", "0"], ""),
    ({"groups": 3}, RuntimeError, ["groups=3", "6 channels", "got 4"], ""),
    ({"groups": 0}, RuntimeError, ["groups must be at least 1", "0"], ""),
    ({"groups": -1}, RuntimeError, ["groups must be at least 1", "-1"], ""),
    ({"groups": 2.0}, TypeError, ["groups must be an int", "2.0", "float"], ""),
    ({"num_groups": 4}, RuntimeError, ["divisible by num_groups", "6 channels", "=4"], ""),
    ({"num_groups": -1}, RuntimeError, ["num_groups must be at least 1", "-1"], ""),
    (
        {"num_groups": 0},
        RuntimeError,
        ["num_groups must be at least 1", "0"],
        "torch divides by it before it looks: ZeroDivisionError",
    ),
    ({"num_groups": 2.0}, TypeError, ["num_groups must be an int", "2.0", "float"], ""),
    (
        {"weight": (6, 0, 3, 3, 3), "x": (2, 0, 5, 6, 7)},
        RuntimeError,
        ["at least 1", "got 0"],
        "torch returns an output of no channels, on which no group is defined",
    ),
    # sizes
    (
        {"x": (2, 4, 2, 6, 7)},
        RuntimeError,
        ["padded input size [2, 6, 7]", "kernel [3, 3, 3]", "enlarge"],
        "",
    ),
    ({"dilation": 3}, RuntimeError, ["padded input size [5, 6, 7]", "kernel [7, 7, 7]"], ""),
    ({"x": (2, 4, 0, 6, 7)}, RuntimeError, ["[0, 6, 7]", "enlarge"], ""),
    ({"x": (2, 4, 0, 6, 7), "padding": 2}, RuntimeError, ["[0, 6, 7]", "empty"], ""),
    ({"weight": (6, 2, 0, 3, 3)}, RuntimeError, ["at least 1", "[0, 3, 3]"], ""),
    ({"stride": 0}, RuntimeError, ["stride must be at least 1", "0"], ""),
    ({"stride": (1, -1, 1)}, RuntimeError, ["stride must be at least 1", "[1, -1, 1]"], ""),
    ({"dilation": 0}, RuntimeError, ["dilation must be at least 1", "0"], ""),
    ({"padding": -1}, RuntimeError, ["padding must be at least 0", "-1"], ""),
    ({"stride": (1, 1)}, RuntimeError, ["stride", "3 ints", "got [1, 1]"], ""),
    ({"padding": (1, 1)}, RuntimeError, ["padding", "3 ints", "got [1, 1]"], ""),
    ({"dilation": (1,) * 4}, RuntimeError, ["dilation", "3 ints", "got [1, 1, 1, 1]"], ""),
    ({"stride": 1.5}, TypeError, ["stride must be an int", "1.5", "float"], ""),
    ({"stride": "2"}, TypeError, ["stride must be an int", "'2'", "str"], ""),
    ({"stride": None}, TypeError, ["stride must be an int", "None"], ""),
    ({"stride": True}, TypeError, ["stride must be an int", "True"], ""),
    ({"padding": 0.5}, TypeError, ["padding must be an int", "0.5", "float"], ""),
    ({"padding": "full"}, RuntimeError, ["'same', 'valid' or ints", "'full'"], ""),
    ({"padding": "same", "stride": 2}, RuntimeError, ["'same' needs stride 1", "2"], ""),
    # one value per group
    (
        {"x": (1, 4, 3, 3, 3), "num_groups": 6},
        ValueError,
        ["more than 1 value per group", "[1, 6, 1, 1, 1]", "fewer groups"],
        "",
    ),
    # probabilities and bounds
    ({"dropout_p": 1.5}, ValueError, ["between 0 and 1", "1.5"], ""),
    ({"dropout_p": -0.1}, ValueError, ["between 0 and 1", "-0.1"], ""),
    ({"dropout_p": INF}, ValueError, ["between 0 and 1", "inf"], ""),
    (
        {"dropout_p": NAN},
        ValueError,
        ["dropout_p", "NaN"],
        "torch's Python check lets NaN pass and its C++ check raises RuntimeError; one type for "
        "all bad probabilities is simpler",
    ),
    ({"dropout_p": "a"}, TypeError, ["dropout_p must be a number", "'a'"], ""),
    ({"dropout_p": None}, TypeError, ["dropout_p must be a number", "None"], ""),
    *(
        ({name: NAN}, ValueError, [name, "NaN"], "torch returns NaN everywhere")
        for name in ("min_value", "max_value", "cap")
    ),
    ({"eps": NAN}, ValueError, ["eps", "NaN"], "torch returns NaN everywhere"),
    ({"min_value": "a"}, TypeError, ["min_value must be a number", "'a'"], ""),
    ({"cap": "a"}, TypeError, ["cap must be a number", "'a'"], ""),
    ({"max_value": None}, TypeError, ["max_value must be", "None"], "to torch, no bound: pass inf"),
    # dtypes
    (
        {"dtype": "int64"},
        NotImplementedError,
        ["int64", "float32 or float64", "x.float()"],
        "",
    ),
    ({"dtype": "complex64"}, NotImplementedError, ["complex64", "float32 or float64"], ""),
    *(
        ({"dtype": name}, NotImplementedError, [name, "x.float()"], "no kernels for it, yet")
        for name in ("float16", "bfloat16")
    ),
]


@pytest.mark.parametrize(
    ("changes", "exception", "says", "torch_differs"),
    [pytest.param(*case, id=str(case[0])) for case in BAD],
)
def test_bad_arguments_raise_what_torch_raises(
    changes: dict[str, Any], exception: type[Exception], says: list[str], torch_differs: str
) -> None:
    with pytest.raises(exception) as caught:
        spec_of(**changes)
    assert caught.type is exception
    for part in says:
        assert part in str(caught.value)
    if "eps" not in changes:  # torch_chain leaves it alone: torch takes any float for it
        assert (type(exception_of(lambda: torch_chain(**changes))) is exception) == (
            not torch_differs
        )


def test_the_call_that_every_bad_one_is_a_change_of_is_valid() -> None:
    assert spec_of().output_shape == tuple(torch_chain().shape)


@pytest.mark.parametrize("threads", [0, 16, 31, 33, 1025, 1056, -32, 64.5])
def test_threads_per_block_must_be_whole_warps_that_fit(threads: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"from 32 to 1024, but got {threads}")):
        check_threads_per_block(threads)


def test_threads_per_block_32_to_1024_are_fine() -> None:
    for threads in range(32, 1025, 32):
        check_threads_per_block(threads)


def test_a_spec_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(AttributeError):
        spec_of().groups = 5  # pyright: ignore[reportAttributeAccessIssue]


# ---- shapes -------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a convolution in every spelling, some of which no input is large enough for."""
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> st.SearchStrategy[Any]:
        number = st.integers(low, high)
        return st.one_of(number, st.lists(number, min_size=axes, max_size=axes).map(tuple))

    groups = draw(st.integers(1, 3))
    sizes, kernel = (
        tuple(draw(st.lists(st.integers(1, high), min_size=axes, max_size=axes)))
        for high in (12, 5)
    )
    named = draw(st.sampled_from(["same", "valid", None, None]))
    return {
        "x": (draw(st.integers(0, 3)), groups * draw(st.integers(1, 3)), *sizes),
        "weight": (groups * draw(st.integers(1, 3)), None, *kernel),
        "stride": 1 if named == "same" else draw(per_axis(1, 4)),
        "padding": named or draw(per_axis(0, 3)),
        "dilation": draw(per_axis(1, 3)),
        "groups": groups,
        "num_groups": 1,
    }


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_output_shape_is_torchs(call: dict[str, Any]) -> None:
    """Torch's "meta" device computes shapes alone; what it refuses, we refuse."""
    out_channels, _, *kernel = call["weight"]
    call["weight"] = (out_channels, call["x"][1] // call["groups"], *kernel)
    expected = exception_of(lambda: torch_chain("meta", **call))
    if expected is not None:
        with pytest.raises(type(expected)):
            spec_of(**call)
        return
    assert spec_of(**call).output_shape == tuple(torch_chain("meta", **call).shape)


@pytest.mark.parametrize(
    ("kernel", "dilation", "zeros"),
    [
        (1, 1, (0, 0)),
        (2, 1, (0, 1)),
        (3, 1, (1, 1)),
        (4, 1, (1, 2)),
        (4, 3, (4, 5)),
        (2, 2, (1, 1)),
    ],
)
def test_same_padding_puts_the_odd_zero_after_as_torch_does(
    kernel: int, dilation: int, zeros: tuple[int, int]
) -> None:
    spec = spec_of(
        x=(1, 1, 9),
        weight=(1, 1, kernel),
        groups=1,
        num_groups=1,
        padding="same",
        dilation=dilation,
    )
    assert spec.padding == (zeros,)
    assert spec.output_size == (9,)
    x, weight = torch.arange(1.0, 10.0).view(1, 1, 9), torch.arange(1.0, kernel + 1).view(1, 1, -1)
    padded = F.pad(x, spec.padding[0])
    assert torch.equal(
        F.conv1d(padded, weight, dilation=dilation),
        F.conv1d(x, weight, padding="same", dilation=dilation),
    )


def test_spellings_of_the_same_call_are_one_spec() -> None:
    assert spec_of(stride=2, padding=1, dilation=1) == spec_of(
        stride=[2, 2, 2], padding=(1,), dilation=(1, 1, 1)
    )
    assert spec_of(padding="valid") == spec_of(padding=0)
    assert spec_of(weight=(6, 2, 1, 1, 1), padding="same") == spec_of(weight=(6, 2, 1, 1, 1))
    assert spec_of(cap=None).cap == spec_of().min_value


def test_kernels_see_five_dimensions() -> None:
    spec = spec_of(x=(2, 4, 9), weight=(6, 2, 3), stride=2, padding=1)
    assert spec.volume(spec.x_shape) == (2, 4, 1, 1, 9)
    assert spec.volume(spec.weight_shape) == (6, 2, 1, 1, 3)
    assert (spec.stride3, spec.padding3, spec.dilation3) == ((1, 1, 2), (0, 0, 1), (1, 1, 1))


# ---- as a key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["min_value", "max_value", "cap"])
def test_specs_whose_bounds_differ_in_sign_alone_are_different_keys(bound: str) -> None:
    """What is remembered for 0.0 must not be found for -0.0, whose results are -0.0."""
    bounds = {"min_value": -2.0, "max_value": 2.0, "cap": 1.0}
    positive, negative = (spec_of(**(bounds | {bound: zero})) for zero in (0.0, -0.0))
    assert positive != negative
    assert {positive: "+", negative: "-"}[spec_of(**(bounds | {bound: -0.0}))] == "-"


def test_equal_calls_are_one_key() -> None:
    one, other = spec_of(), spec_of()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert one != spec_of(eps=1e-3)
    assert one != tuple(vars(one).values())


# ---- cost ---------------------------------------------------------------------------------------


def test_the_benchmark_case_is_18_gigaflops_and_542_megabytes() -> None:
    spec = spec_of(x=(128, 3, 16, 64, 64), weight=(16, 3, 3, 3, 3), groups=1, num_groups=8)
    assert spec.output_shape == (128, 16, 14, 62, 62)
    assert spec.group_size == 2 * 14 * 62 * 62
    assert spec.flops == 17_854_857_216 == 2 * 81 * 128 * 16 * 14 * 62 * 62
    assert spec.x_bytes == 100_663_296
    assert spec.output_bytes == 440_860_672
    assert spec.parameter_bytes == 4 * (16 * 81 + 3 * 16)
    assert round(spec.compulsory_bytes / 1e6) == 542


def test_bytes_follow_dtype_and_the_parameters_there_are() -> None:
    spec, double = spec_of(), spec_of(dtype="float64")
    bare = spec_of(has_bias=False, affine=False)
    assert double.compulsory_bytes == 2 * spec.compulsory_bytes
    assert spec.compulsory_bytes - bare.compulsory_bytes == 3 * 6 * 4


@given(groups=st.sampled_from([1, 2, 4]), kernel=st.integers(1, 3))
def test_flops_count_the_taps_of_one_convolution_group(groups: int, kernel: int) -> None:
    x, weight = (2, 8, 7), (4, 8 // groups, kernel)
    spec = spec_of(x=x, weight=weight, groups=groups, num_groups=2)
    assert spec.flops == 2 * (2 * 4 * (8 - kernel)) * (8 // groups * kernel)


# ---- degeneracy ---------------------------------------------------------------------------------

BOUNDS = st.one_of(
    st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, INF, -INF]), st.floats(-10, 10, width=16)
)


@settings(max_examples=200, deadline=None)
@given(BOUNDS, BOUNDS, BOUNDS)
def test_constant_is_what_every_finite_input_becomes(low: float, high: float, cap: float) -> None:
    spec = spec_of(min_value=low, max_value=high, cap=cap)
    edges = [b for b in (low, high, cap) if math.isfinite(b)]
    near = [math.nextafter(b, towards) for b, towards in itertools.product(edges, (-INF, INF))]
    h = torch.tensor([*torch.linspace(-1e4, 1e4, 999).tolist(), *edges, *near, 1e300, -1e300, 0.0])
    h = h.double()
    h = h[torch.isfinite(h)]
    values = torch.clamp(torch.min(h, torch.tensor(cap).double()), low, high).unique()
    if spec.constant is None:
        assert values.numel() > 1
    else:
        assert values.tolist() == [spec.constant]


@pytest.mark.parametrize(
    ("low", "high", "cap", "constant"),
    [(0.0, 1.0, None, 0.0), (-1.0, 1.0, -2.0, -1.0), (2.0, 1.0, 5.0, 1.0), (-1.0, 1.0, 0.5, None)],
)
def test_degeneracy_is_said_in_words(
    low: float, high: float, cap: float | None, constant: float | None
) -> None:
    spec = spec_of(min_value=low, max_value=high, cap=cap)
    assert spec.constant == constant
    if constant is None:
        assert "depends on its input" in spec.degeneracy
    else:
        assert f"is {constant:g} for every finite h" in spec.degeneracy
        assert "Pass a cap above min_value" in spec.degeneracy


@pytest.mark.parametrize(("cap", "constant"), [(None, "-0.25"), (-3.0, "-0.25"), (0.5, None)])
def test_the_function_warns_of_a_constant_and_names_it(
    cap: float | None, constant: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    y = nf.fused_conv_group_norm_min_clamp_dropout(
        torch.randn(1, 1, 9),
        torch.randn(2, 1, 3),
        num_groups=1,
        min_value=-0.25,
        max_value=1,
        cap=cap,
    )
    degenerate = [w for w in recwarn if w.category is nf.DegenerateChainWarning]
    if constant is None:
        assert not degenerate
        return
    assert len(degenerate) == 1
    assert f"is {constant} for every finite h" in str(degenerate[0].message)
    assert degenerate[0].filename == __file__  # it points at the caller
    assert (y == float(constant)).all()


def test_nearly_degenerate_is_not_degenerate() -> None:
    assert spec_of(cap=math.nextafter(-1.0, INF)).constant is None
