"""The module: a drop-in for Conv + GroupNorm + min + clamp + Dropout, state_dict included."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from definition import BOUNDS
from torch import Tensor, nn

import numba_fused as nf
from numba_fused import FusedConvGroupNormMinClampDropout as Fused

KERNELBENCH_INIT_INPUTS = [3, 16, 3, 8, 0.0, 1.0, 0.2]  # get_init_inputs() of level 2, problem 83
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
KEYS = ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """The plain model, KernelBench's plus a cap of its own."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        num_groups: int,
        min_value: float,
        max_value: float,
        dropout_p: float,
        cap: float | None = None,
        dim: int = 3,
        **conv: Any,
    ) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[dim](in_channels, out_channels, kernel_size, **conv)
        self.norm = nn.GroupNorm(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout_p)
        self.min_value, self.max_value = min_value, max_value
        self.cap = min_value if cap is None else cap

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = torch.min(x, torch.tensor(self.cap))
        x = torch.clamp(x, min=self.min_value, max=self.max_value)
        return self.dropout(x)


def small(**changes: Any) -> Fused:
    arguments: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": 3,
        "num_groups": 3,
        "dropout_p": 0.5,
        "dim": 2,
        **BOUNDS,
    }
    return Fused(**arguments | changes)


def stir(module: nn.Module) -> None:
    """Give norm.weight and norm.bias values that are not 1 and 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


# ---- drop-in ------------------------------------------------------------------------------------


def test_takes_kernelbenchs_positional_arguments() -> None:
    fused, plain = Fused(*KERNELBENCH_INIT_INPUTS), Model(*KERNELBENCH_INIT_INPUTS)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 4, 8, 8)
    with pytest.warns(nf.DegenerateChainWarning, match="is 0 for every finite h"):
        out = fused.eval()(x)
    assert torch.equal(out, plain.eval()(x))


def test_the_same_manual_seed_gives_the_same_parameters() -> None:
    torch.manual_seed(0)
    fused = Fused(*KERNELBENCH_INIT_INPUTS)
    torch.manual_seed(0)
    plain = Model(*KERNELBENCH_INIT_INPUTS)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("direction", ["plain to fused", "fused to plain"])
@pytest.mark.parametrize(
    ("dim", "convolution"),
    [
        (1, {"stride": 2, "padding": 1}),
        (2, {"padding": "same", "dilation": 2}),
        (3, {"groups": 2, "padding": (0, 1, 2)}),
    ],
)
def test_state_dicts_are_interchangeable(
    dim: int, convolution: dict[str, Any], direction: str
) -> None:
    arguments = (4, 6, (3, 2, 3)[:dim], 3, -1.0, 1.0, 0.2)
    fused, plain = (cls(*arguments, cap=0.5, dim=dim, **convolution) for cls in (Fused, Model))
    source, target = (plain, fused) if direction == "plain to fused" else (fused, plain)
    stir(source)
    assert list(fused.state_dict()) == list(plain.state_dict()) == KEYS
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 4, *(6, 7, 8)[:dim])
    expected = plain.eval()(x)
    assert expected.unique().numel() > 10
    torch.testing.assert_close(fused.eval()(x), expected)


def test_absent_parameters_have_no_keys() -> None:
    assert list(small(bias=False, affine=False).state_dict()) == ["conv.weight"]
    assert list(small(bias=False).state_dict()) == ["conv.weight", "norm.weight", "norm.bias"]


# ---- behaviour ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["auto", "torch", "unfused", "one_kernel"])
def test_train_drops_and_eval_does_not(variant: str) -> None:
    module = small(variant=variant, min_value=0.125)  # then only dropped elements are zero
    stir(module)
    x = torch.randn(2, 4, 5, 6)
    evaluated = module.eval()(x)
    assert (evaluated != 0).all()
    trained = module.train()(x, seed=9)
    kept = torch.from_numpy(nf.keep_mask(9, evaluated.shape, 0.5))
    torch.testing.assert_close(trained, evaluated * kept * 2)


def test_training_steps_differ_and_follow_manual_seed() -> None:
    module, x = small(), torch.randn(2, 4, 5, 6)
    torch.manual_seed(0)
    first, second = module(x), module(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)


def test_every_argument_reaches_the_function() -> None:
    arguments: dict[str, Any] = {
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "groups": 2,
        "eps": 0.5,
    }
    module = small(kernel_size=(2, 3), **arguments)
    stir(module)
    x = torch.randn(2, 4, 6, 9)
    expected = nf.reference(
        x, *module.state_dict().values(), **arguments, **BOUNDS, num_groups=3, dropout_p=0.5,
        training=True, seed=4,
    )  # fmt: skip
    torch.testing.assert_close(module(x, seed=4).detach(), expected)


def test_dtype_reaches_the_parameters() -> None:
    module = small(dtype=torch.float64)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module(torch.randn(1, 4, 5, 6).double()).dtype == torch.float64
    assert small().double().conv.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_share_nothing(clone: Any) -> None:
    module, x = small(variant="torch").eval(), torch.randn(1, 4, 5, 6)
    stir(module)
    before = module(x).detach()
    twin = clone(module)
    stir(module)
    assert torch.equal(twin(x), before)
    assert not torch.equal(module(x), before)


def test_repr_names_what_matters() -> None:
    shown = repr(small(variant="epilogue"))
    for part in (
        "Conv2d(4, 6, kernel_size=(3, 3)",
        "GroupNorm(3, 6",
        "Dropout(p=0.5",
        "min_value=-1.0",
        "max_value=1.0",
        "cap=0.5",
        "precision='ieee'",
        "variant='epilogue'",
    ):
        assert part in shown


# ---- bad arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "exception", "message"),
    [
        ({"num_groups": 4}, ValueError, "divisible by num_groups"),
        ({"groups": 3}, ValueError, "divisible by groups"),
        ({"groups": 0}, ValueError, "groups must be a positive integer"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1, but got 0"),
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, but got 0"),
        ({"out_channels": -6}, ValueError, "out_channels must be at least 1, but got -6"),
        ({"out_channels": 6.0}, TypeError, "out_channels must be an int, but got 6.0"),
        ({"dropout_p": 1.5}, ValueError, "between 0 and 1, but got 1.5"),
        ({"dropout_p": math.nan}, ValueError, "between 0 and 1, but got nan"),
        ({"padding": "full"}, ValueError, "Invalid padding string 'full'"),
        ({"padding": "same", "stride": 2}, ValueError, "not supported for strided"),
        ({"dim": 4}, ValueError, "dim must be 1, 2 or 3, but got 4"),
        ({"variant": "best"}, ValueError, "unknown variant 'best'"),
        ({"precision": "fp8"}, NotImplementedError, "but got 'fp8'"),
        ({"min_value": math.nan}, ValueError, "min_value"),
        ({"max_value": math.nan}, ValueError, "max_value"),
        ({"cap": math.nan}, ValueError, "cap"),
    ],
    ids=str,
)
def test_the_constructor_refuses_what_the_modules_refuse(
    changes: dict[str, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        small(**changes)
