"""The module: a drop-in for Conv + GroupNorm + min + clamp + Dropout, state_dict included."""

from __future__ import annotations

import copy
import math
import operator
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_modules_compute_in_fp32(dtype: torch.dtype) -> None:
    module = small().to(dtype)
    stir(module)
    assert {p.dtype for p in module.parameters()} == {dtype}
    wide, x = copy.deepcopy(module).float(), torch.randn(2, 4, 5, 6).to(dtype)
    out = module(x, seed=3)
    assert torch.equal(out, wide(x.float(), seed=3).to(dtype))
    out.float().square().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


def test_half_is_what_the_plain_model_gives_in_half() -> None:
    module = small().eval()
    plain = Model(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2).eval()
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 5, 6)
    exact = plain(x)
    assert (module.half()(x.half()) - exact).abs().max() < 5e-3


def test_an_empty_batch_goes_through_and_back() -> None:
    module, x = small(), torch.randn(0, 4, 5, 6, requires_grad=True)
    out = module(x)
    assert out.shape == (0, 6, 3, 4)
    out.sum().backward()
    assert x.grad is not None
    assert all((p.grad == 0).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["auto", "one_kernel"])
@pytest.mark.parametrize("frozen", ["conv", "norm", "conv.bias"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen: str, variant: str) -> None:
    module, twin = small(variant=variant), small(variant=variant)
    x = torch.randn(2, 4, 5, 6)
    twin.load_state_dict(module.state_dict())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    for m in (module, twin):
        m(x, seed=3).square().sum().backward()
    for (name, ours), theirs in zip(module.named_parameters(), twin.parameters(), strict=True):
        if name.startswith(frozen):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_meta_modules_can_be_materialised() -> None:
    module, source, x = small(device="meta"), small().eval(), torch.randn(1, 4, 5, 6)
    assert all(p.is_meta for p in module.parameters())
    module = module.to_empty(device="cpu")
    module.load_state_dict(source.state_dict())
    assert torch.equal(module.eval()(x), source(x))


@pytest.mark.gpu
def test_to_a_gpu_and_back() -> None:
    module, x = small().eval(), torch.randn(2, 4, 5, 6)
    expected = module(x)
    on_gpu = module.to("cuda")(x.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(module.to("cpu")(x), expected)


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


# ---- from PyTorch's modules and back -------------------------------------------------------------

CONVERTED: dict[str, tuple[nn.Module, nn.Module]] = {
    "1-D, stride": (nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.GroupNorm(3, 6)),
    "2-D, same, dilation": (
        nn.Conv2d(4, 6, (2, 3), padding="same", dilation=2),
        nn.GroupNorm(2, 6, eps=0.1),
    ),
    "3-D, groups, no bias": (
        nn.Conv3d(4, 6, 2, groups=2, bias=False, padding=(0, 1, 2)),
        nn.GroupNorm(6, 6),
    ),
    "not affine": (nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6, affine=False)),
    "fp64": (nn.Conv2d(4, 6, 3).double(), nn.GroupNorm(3, 6).double()),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_modules_become_the_block_and_come_back(case: str) -> None:
    conv, norm = (copy.deepcopy(module) for module in CONVERTED[case])
    assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    assert isinstance(norm, nn.GroupNorm)
    stir(norm)
    dropout = nn.Dropout(0.25)
    generator = torch.random.get_rng_state()
    block = Fused.from_modules(conv, norm, dropout, -1.0, 1.0, 0.5)
    assert torch.equal(torch.random.get_rng_state(), generator)
    x = torch.randn(2, 4, *(7, 8, 9)[: conv.weight.ndim - 2], dtype=conv.weight.dtype)
    plain = torch.clamp(norm(conv(x)).clamp(max=0.5), -1.0, 1.0)
    torch.testing.assert_close(block.eval()(x), plain)
    kept = torch.from_numpy(nf.keep_mask(3, plain.shape, 0.25))
    torch.testing.assert_close(block.train()(x, seed=3), plain * kept / 0.75)

    returned = block.to_modules()
    assert all(map(operator.is_, returned, (conv, norm, dropout)))
    again = Fused.from_modules(*returned, -1.0, 1.0, 0.5)
    assert repr(again) == repr(block)


def test_conversion_keeps_mode_and_optimizer() -> None:
    """Parameters are shared, so whoever holds them trains the block."""
    conv, norm, dropout = nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.Dropout(0.5).eval()
    optimizer = torch.optim.SGD([*conv.parameters(), *norm.parameters()], lr=0.1)
    block = Fused.from_modules(conv, norm, dropout, -1.0, 1.0, 0.5, precision="tf32")
    assert not block.training
    assert (block.precision, block.variant) == ("tf32", "auto")
    x, before = torch.randn(2, 4, 5, 6), conv.weight.detach().clone()
    block(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.conv.weight, before)


SPECTRAL = nn.utils.spectral_norm(nn.Conv2d(4, 6, 3))
CONV, NORM, DROPOUT = nn.Conv2d(4, 6, 3), nn.GroupNorm(3, 6), nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("modules", "exception", "message"),
    [
        ((nn.ConvTranspose2d(4, 6, 3), NORM, DROPOUT), TypeError, "conv .*got ConvTranspose2d"),
        ((nn.LazyConv2d(6, 3), NORM, DROPOUT), TypeError, "conv must be nn.Conv1d .*LazyConv2d"),
        ((CONV, nn.BatchNorm2d(6), DROPOUT), TypeError, "norm must be nn.GroupNorm, .*BatchNorm2d"),
        ((CONV, NORM, nn.Dropout2d(0.5)), TypeError, "dropout must be nn.Dropout, .*Dropout2d"),
        ((CONV, NORM, nn.Identity()), TypeError, "dropout must be nn.Dropout, .*Identity"),
        ((CONV, nn.GroupNorm(3, 9), DROPOUT), ValueError, "channels as conv gives, 6, but has 9"),
        (
            (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), NORM, DROPOUT),
            ValueError,
            "padding_mode must be 'zeros', but conv has 'reflect'",
        ),
        ((SPECTRAL, NORM, DROPOUT), ValueError, "conv has hooks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_modules_that_compute_something_else_are_refused(
    modules: tuple[Any, Any, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        Fused.from_modules(*modules, -1.0, 1.0, 0.5)


def test_conversion_checks_bounds_variant_and_precision() -> None:
    with pytest.raises(ValueError, match="min_value"):
        Fused.from_modules(CONV, NORM, DROPOUT, math.nan, 1.0)
    with pytest.raises(ValueError, match="unknown variant 'best'"):
        Fused.from_modules(CONV, NORM, DROPOUT, -1.0, 1.0, variant="best")
    with pytest.raises(NotImplementedError, match="but got 'fp8'"):
        Fused.from_modules(CONV, NORM, DROPOUT, -1.0, 1.0, precision="fp8")


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
