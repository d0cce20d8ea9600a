"""reference.py: the chain in PyTorch is PyTorch's modules, and the operator's definition."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from definition import BOUNDS, Operands, definition, random_operands, relative_error, spec_for
from torch import Tensor, nn

import numba_fused as nf

MODULES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (19,), 2: (7, 9), 3: (5, 6, 7)}
KERNELS = {1: (4,), 2: (3, 2), 3: (3, 2, 1)}
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "same": {"padding": "same"},
    "no bias, not affine": {"bias": False, "affine": False},
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def modules_chain(
    operands: Operands, num_groups: int, kept: Tensor, p: float, **parameters: Any
) -> Tensor:
    """What a PyTorch user writes, with the modules and a mask by hand."""
    x, weight, *vectors = operands
    dim = weight.ndim - 2
    groups = parameters.get("groups", 1)
    conv = MODULES[dim](
        weight.shape[1] * groups,
        len(weight),
        weight.shape[2:],
        bias=vectors[0] is not None,
        **parameters,
    )
    norm = nn.GroupNorm(num_groups, len(weight), affine=vectors[1] is not None)
    for module, tensors in ((conv, operands[1:3]), (norm, operands[3:])):
        names = ("weight", "bias")
        given = {n: t for n, t in zip(names, tensors, strict=True) if t is not None}
        module.to(x.dtype).load_state_dict(given)
    with torch.no_grad():
        h = norm(conv(x))
        c = torch.min(h, torch.tensor(BOUNDS["cap"], dtype=x.dtype))
        c = torch.clamp(c, BOUNDS["min_value"], BOUNDS["max_value"])
        return c * kept / (1 - p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_equals_the_modules(dim: int, convolution: str, dtype: torch.dtype) -> None:
    arguments = dict(CONVOLUTIONS[convolution])
    has = {name: arguments.pop(name, True) for name in ("bias", "affine")}
    groups = arguments.get("groups", 1)
    shapes = (2, 4, *SIZES[dim]), (6, 4 // groups, *KERNELS[dim])
    operands = random_operands(*shapes, dtype, **has)
    call = {"num_groups": 3, "dropout_p": 0.25, "training": True, **BOUNDS, **arguments}
    shape = nf.reference(*operands, seed=1, **call).shape
    kept = torch.from_numpy(nf.keep_mask(1, shape, 0.25))
    expected = modules_chain(operands, 3, kept, 0.25, **arguments)
    out = nf.reference(*operands, keep_mask=kept, **call)
    assert out.dtype == dtype
    assert 0.05 < (out == 0).float().mean() < 0.5
    torch.testing.assert_close(out, expected)  # bounds of each dtype; fp64 to 1e-7
    if dtype == torch.float64:
        spec = spec_for(operands, **{k: v for k, v in call.items() if k not in BOUNDS})
        assert relative_error(out, definition(spec, operands, kept.numpy())) < 1e-14


def small_call(**changes: Any) -> dict[str, Any]:
    return {"num_groups": 2, "dropout_p": 0.5, "training": True, **BOUNDS} | changes


OPERANDS = random_operands((2, 3, 6, 8), (4, 3, 3, 3))
SHAPE = (2, 4, 4, 6)


def test_seed_means_the_kernels_own_mask() -> None:
    for seed in (5, -5, 2**64 + 5, torch.tensor([5])):
        kept = torch.from_numpy(nf.keep_mask(int(seed), SHAPE, 0.5))
        by_seed = nf.reference(*OPERANDS, seed=seed, **small_call())
        by_mask = nf.reference(*OPERANDS, seed=99, keep_mask=kept, **small_call())
        assert torch.equal(by_seed, by_mask)


def test_without_a_seed_torchs_generator_decides() -> None:
    first, again, other = (
        (torch.manual_seed(s), nf.reference(*OPERANDS, **small_call()))[1] for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("changes", [{"training": False}, {"dropout_p": 0.0}], ids=str)
def test_nothing_is_drawn_in_eval_mode_or_for_p_0(changes: dict[str, Any]) -> None:
    before = torch.random.get_rng_state()
    out = nf.reference(*OPERANDS, **small_call(**changes))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert relative_error(out, definition(spec_for(OPERANDS, num_groups=2), OPERANDS)) < 1e-6


def test_p_1_gives_zeros_and_keeps_nan() -> None:
    x = OPERANDS.x.clone()
    assert (nf.reference(*OPERANDS, **small_call(dropout_p=1.0)) == 0).all()
    x[0, 0, 0, 0] = math.nan
    out = nf.reference(x, *OPERANDS[1:], **small_call(dropout_p=1.0))
    assert out[0].isnan().all()
    assert (out[1] == 0).all()


# ---- NaN and infinities -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_value_poisons_its_sample_and_group_alone(value: float) -> None:
    """With two convolution groups an input channel reaches half of the norm's groups."""
    x, weight = torch.randn(2, 4, 9), torch.randn(4, 2, 3)
    x[1, 3, 4] = value
    out = nf.reference(x, weight, groups=2, seed=0, **small_call())
    expected = torch.zeros(2, 4, 7, dtype=torch.bool)
    expected[1, 2:] = True
    assert torch.equal(out.isnan(), expected)


def test_dropped_nan_is_nan() -> None:
    weight = torch.full_like(OPERANDS.weight, math.nan)
    out = nf.reference(OPERANDS.x, weight, seed=0, **small_call())
    assert out.isnan().all()


@pytest.mark.parametrize(("infinity", "becomes"), [(math.inf, 0.5), (-math.inf, -1.0)])
def test_the_bounds_cut_infinities(infinity: float, becomes: float) -> None:
    beta = torch.tensor([infinity, 0.0, 0.0, 0.0])
    out = nf.reference(*OPERANDS[:4], beta, **small_call(training=False))
    assert (out[:, 0] == becomes).all()
    assert out.isfinite().all()


def test_min_above_max_gives_max_except_for_nan() -> None:
    x = OPERANDS.x.clone()
    x[0, 0, 0, 0] = math.nan
    swapped = small_call(min_value=1.0, max_value=-0.25, training=False)
    out = nf.reference(x, *OPERANDS[1:], **swapped)
    assert out[0].isnan().all()
    assert (out[1] == -0.25).all()


# ---- arguments ----------------------------------------------------------------------------------


def test_bad_arguments_are_refused_as_everywhere() -> None:
    with pytest.raises(RuntimeError, match="divisible by num_groups"):
        nf.reference(*OPERANDS, **small_call(num_groups=3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        nf.reference(*OPERANDS, **small_call(dropout_p=2.0))


def test_large_means_do_not_destroy_the_variance() -> None:
    """At mean 1e3 an fp32 E[x^2] - E[x]^2 is off by 6 %."""
    operands = random_operands((1, 1, 4096), (2, 1, 1), bias=False, affine=False)
    x = operands.x + 1e3
    ones = torch.ones(2, 1, 1)
    out = nf.reference(x, ones, **small_call(training=False))
    exact = definition(spec_for(Operands(x, ones), num_groups=2), Operands(x, ones))
    assert relative_error(out, exact) < 1e-4


def test_gradients_flow_strictly_inside_the_bounds() -> None:
    x, weight = torch.randn(1, 1, 50).double(), torch.ones(1, 1, 1).double()
    beta = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    call = {"num_groups": 1, **BOUNDS}
    nf.reference(x, weight, None, torch.ones_like(beta), beta, **call).sum().backward()
    h = F.group_norm(x, 1)
    assert 0 < int(((h > -1) & (h < 0.5)).sum()) < 50
    assert beta.grad is not None
    assert beta.grad.item() == int(((h > -1) & (h < 0.5)).sum())


def test_empty_batch() -> None:
    out = nf.reference(OPERANDS.x[:0], *OPERANDS[1:], seed=0, **small_call())
    assert out.shape == (0, *SHAPE[1:])
    assert np.prod(out.shape) == 0
