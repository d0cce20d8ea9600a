"""Gradients: whatever ran forward, backward is that of the reference with the same mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definition import BOUNDS, Operands, random_operands
from torch import Tensor

import numba_fused as nf
from numba_fused import fused_conv_group_norm_min_clamp_dropout as fused

TENSOR = ["tensor_core", "split", "pipelined"]  # in fp32 alone
VARIANTS = ["auto", *(name for name in nf.ladder.names() if name not in [*TENSOR, "algebra"])]
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "1-D, stride": ((1, 2, 11), (4, 2, 3), {"num_groups": 2, "stride": 2}),
    "2-D, same, even kernel": ((1, 2, 3, 4), (2, 2, 2, 2), {"num_groups": 1, "padding": "same"}),
    "2-D, groups": ((1, 4, 2, 4), (4, 2, 2, 2), {"num_groups": 4, "groups": 2}),
    "3-D, padding, dilation": (
        (1, 1, 3, 3, 3),
        (2, 1, 2, 2, 2),
        {"num_groups": 2, "padding": (1, 0, 1), "dilation": (2, 1, 1)},
    ),
}
DROPOUT = {"dropout_p": 0.25, "training": True}


def make(case: str) -> tuple[list[Tensor], dict[str, Any]]:
    """fp64 leaves that require gradients, and the call's keywords."""
    x_shape, weight_shape, arguments = CASES[case]
    operands = random_operands(x_shape, weight_shape, torch.float64)
    leaves = [t.requires_grad_() for t in operands if t is not None]
    return leaves, {**BOUNDS, **DROPOUT, **arguments}


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum, so that no two elements of the output count alike."""
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad(out, leaves, weights)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_references(variant: str, case: str) -> None:
    leaves, call = make(case)
    out = fused(*leaves, **call, seed=3, variant=variant)
    kept = torch.from_numpy(nf.keep_mask(3, out.shape, call["dropout_p"]))
    assert not kept.all()
    expected = gradients(nf.reference(*leaves, **call, keep_mask=kept), leaves)
    assert all(expected[i].abs().max() > 1e-3 for i in (0, 1, 3, 4))  # a norm can cancel a bias
    for ours, theirs in zip(gradients(out, leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if "groups" not in CASES[case][2]])
@pytest.mark.parametrize("variant", TENSOR)
def test_gradients_in_fp32(variant: str, case: str) -> None:
    """Backward is PyTorch's in the call's precision, whatever the forward's products were."""
    leaves, call = make(case)
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves]
    call |= {"precision": "tf32" if variant == "tensor_core" else "ieee", "seed": 3}
    ours = gradients(fused(*leaves, **call, variant=variant), leaves)
    theirs = gradients(nf.reference(*leaves, **call), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_constant_of_a_degenerate_chain_has_no_gradient() -> None:
    """Not in PyTorch either: what min and clamp cut passes nothing on."""
    leaves, call = make("1-D, stride")
    call |= {"cap": call["min_value"], "seed": 3}
    with pytest.warns(nf.DegenerateChainWarning):
        out = fused(*leaves, **call, variant="algebra")
    for ours, theirs in zip(
        gradients(out, leaves), gradients(nf.reference(*leaves, **call), leaves), strict=True
    ):
        assert torch.equal(ours, theirs)
        assert not ours.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_draws_the_forwards_mask_again(variant: str) -> None:
    """The mask of the seed drawn in forward, whatever the generator did since."""
    torch.manual_seed(1)
    leaves, call = make("1-D, stride")
    beta = leaves[-1]
    call |= {"min_value": -50.0, "max_value": 50.0, "cap": 40.0}  # nothing is cut
    out = fused(*leaves, **call, variant=variant)
    torch.rand(5)
    (gradient,) = torch.autograd.grad(out.sum(), beta)
    kept = out.detach() != 0
    assert 0.3 < kept.double().mean() < 1
    torch.testing.assert_close(gradient, kept.double().sum((0, 2)) / 0.75)


@pytest.mark.parametrize(
    ("case", "variant"),
    [*((case, "auto") for case in CASES), ("3-D, padding, dilation", "unfused")],
)
def test_gradcheck(case: str, variant: str) -> None:
    """Against finite differences; the bounds are farther from every value than the step."""
    leaves, call = make(case)
    with torch.no_grad():
        unbounded = call | {"min_value": -50.0, "max_value": 50.0, "cap": 50.0, "training": False}
        h = fused(*leaves, **unbounded)
    bounds = [call[name] for name in BOUNDS]
    assert min(float((h - bound).abs().min()) for bound in bounds) > 1e-3
    assert ((h > -1) & (h < 0.5)).any()
    assert (h > 0.5).any()

    def function(*tensors: Tensor) -> Tensor:
        return fused(*tensors, **call, seed=3, variant=variant)

    # The fast mode projects at random: a few simulations instead of one for each element.
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6, fast_mode=variant != "auto")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4])
def test_gradients_only_where_they_are_wanted(wanted: int, variant: str) -> None:
    leaves, call = make("2-D, groups")
    expected = gradients(nf.reference(*leaves, **call, seed=3), leaves)[wanted]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index == wanted)
    out = fused(*leaves, **call, seed=3, variant=variant)
    out.backward(torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape))
    torch.testing.assert_close(leaves[wanted].grad, expected, rtol=1e-9, atol=1e-11)
    assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(5)]


@pytest.mark.parametrize("absent", ["bias", "gamma", "beta"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_absent_vectors_leave_the_other_gradients_alone(variant: str, absent: str) -> None:
    leaves, call = make("2-D, groups")
    operands = Operands(*leaves)._replace(**{absent: None})
    neutral = torch.full((4,), float(absent == "gamma"), dtype=torch.float64)
    full = operands._replace(**{absent: neutral})
    present = [t for t in operands if t is not None]
    ours = gradients(fused(*operands, **call, seed=3, variant=variant), present)
    theirs = gradients(nf.reference(*full, **call, seed=3), present)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_recorded_where_nothing_is_wanted(variant: str) -> None:
    leaves, call = make("1-D, stride")
    with torch.no_grad():
        assert not fused(*leaves, **call, variant=variant).requires_grad
    assert fused(*leaves, **call, variant=variant).requires_grad
    detached = [leaf.detach() for leaf in leaves]
    assert not fused(*detached, **call, variant=variant).requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_operands_may_depend_on_each_other(variant: str) -> None:
    """Each path counts once: through gamma, and through the beta that is made from it."""
    leaves, call = make("1-D, stride")
    x, weight, bias, gamma, _ = leaves

    def operands(same: bool) -> tuple[Tensor, ...]:
        if same:
            return x, weight, bias, gamma, gamma
        return x, weight * x.mean(), bias, gamma, gamma.square()

    for same in (False, True):
        ours = gradients(fused(*operands(same), **call, seed=3, variant=variant), [x, gamma])
        theirs = gradients(nf.reference(*operands(same), **call, seed=3), [x, gamma])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_penalty_is_the_references(variant: str) -> None:
    """Second derivatives are right, too; never are they silently missing."""
    leaves, call = make("1-D, stride")

    def penalty(out: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(out.sum() + gradient.square().sum(), leaves)

    ours = penalty(fused(*leaves, **call, seed=3, variant=variant))
    for a, b in zip(ours, penalty(nf.reference(*leaves, **call, seed=3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["auto", "one_kernel"])
def test_a_gradient_penalty_works_in_half_precision(variant: str) -> None:
    """The casts are part of the graph: second derivatives arrive at the halves."""
    leaves, call = make("1-D, stride")
    halves = [t.detach().bfloat16().requires_grad_() for t in leaves]
    wide = [t.detach().float().requires_grad_() for t in halves]
    penalties = []
    for operands in (halves, wide):
        out = fused(*operands, **call, seed=3, variant=variant)
        (gradient,) = torch.autograd.grad(out.float().sum(), operands[0], create_graph=True)
        penalties.append(torch.autograd.grad(gradient.float().square().sum(), operands[1])[0])
    assert penalties[1].abs().max() > 1
    error = (penalties[0].float() - penalties[1]).norm() / penalties[1].norm()
    assert error < 2e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_batches_have_zero_gradients(variant: str) -> None:
    leaves, call = make("2-D, groups")
    x = leaves[0].detach()[:0].requires_grad_()
    fused(x, *leaves[1:], **call, seed=3, variant=variant).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for leaf in leaves[1:]:
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


@pytest.mark.parametrize("variant", ["auto", "unfused"])
def test_a_training_step_of_the_module_moves_every_parameter(variant: str) -> None:
    torch.manual_seed(0)
    module = nf.FusedConvGroupNormMinClampDropout(
        2, 4, 2, 2, -1.0, 1.0, 0.25, cap=0.5, dim=2, variant=variant
    )
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x, target = torch.randn(2, 2, 4, 5), torch.full((2, 4, 3, 4), 0.3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (module(x, seed=3) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for now, then in zip(module.parameters(), before, strict=True):
        assert not torch.equal(now, then)
