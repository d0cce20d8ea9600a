"""The operators behind the function: what PyTorch's compilers, modes and transforms make of it."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from definition import BOUNDS, Operands, random_operands
from functorch.compile import make_boxed_func  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import numba_fused as nf
from numba_fused import fused_conv_group_norm_min_clamp_dropout as fused
from numba_fused import ops
from numba_fused.ladder.rung_0_torch import draw_mask

OPERANDS = random_operands((2, 4, 5, 9), (4, 2, 2, 3))
CALL: dict[str, Any] = {
    "num_groups": 2,
    "groups": 2,
    "padding": (1, 0),
    "dropout_p": 0.25,
    "training": True,
    **BOUNDS,
}
HALVES = [torch.float16, torch.bfloat16]
compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


def call(*operands: Any, **changes: Any) -> Tensor:
    return fused(*operands, **CALL | changes)


def leaves(operands: Operands = OPERANDS) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in operands if t is not None]


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum, so that no two elements of the output count alike."""
    weights = torch.linspace(-1, 2, out.numel()).to(out.dtype).view(out.shape)
    return torch.autograd.grad(out, inputs, weights)


class Recorder(TorchDispatchMode):
    """Names of the operators that reach PyTorch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# ---- the operators are what they say ------------------------------------------------------------

# x shape, weight shape, dtype, changes to the call, vectors that are absent
OPERATOR_CASES: dict[str, tuple[Any, ...]] = {
    "1-D, stride, fp64": ((2, 2, 11), (4, 2, 3), torch.float64, {"stride": 2, "padding": 0}, ()),
    "2-D, same, even kernel": ((1, 4, 3, 4), (2, 2, 2, 2), torch.float32, {"padding": "same"}, ()),
    "2-D": ((2, 4, 5, 9), (4, 2, 2, 3), torch.float32, {}, ()),
    "3-D, eval, no vectors": (
        (2, 2, 3, 4, 3),
        (2, 1, 2, 2, 2),
        torch.float32,
        {"padding": "valid", "training": False},
        ("bias", "gamma", "beta"),
    ),
    "bfloat16, beta alone": ((2, 4, 5, 9), (4, 2, 2, 3), torch.bfloat16, {}, ("gamma",)),
    "a rung": ((1, 4, 3, 4), (4, 2, 2, 2), torch.float32, {"variant": "one_kernel"}, ()),
    "empty batch": ((0, 4, 3, 4), (4, 2, 2, 2), torch.float32, {}, ()),
}


def operator_arguments(case: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """What the public function hands to the operator."""
    x_shape, weight_shape, dtype, changes, absent = OPERATOR_CASES[case]
    operands = random_operands(x_shape, weight_shape, dtype)._replace(**dict.fromkeys(absent))
    caught: list[tuple[Any, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(ops, "is_followed", lambda operands: True)
        patch.setattr(ops, "block", lambda *arguments: (caught.append(arguments), None))
        groups = {"groups": x_shape[1] // weight_shape[1]}
        call(*operands, seed=3, **groups | changes)
    return caught[0]


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck_of_the_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schema, fake kernel, autograd registration, and AOT dispatch with dynamic shapes."""
    arguments = operator_arguments(case, monkeypatch)
    operands = [t if t is None else t.requires_grad_() for t in arguments[:5]]
    torch.library.opcheck(ops.block, (*operands, *arguments[5:]))


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_opcheck_of_the_backward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operator_arguments(case, monkeypatch)
    present = [t is not None for t in arguments[:5]]
    without_x = [False, *present[1:]]
    out, statistics = ops.block(*arguments)
    grad_out = torch.randn_like(out)
    for wanted in (present, without_x):
        torch.library.opcheck(ops.block_backward, (grad_out, statistics, *arguments, wanted))


def test_strided_operands_have_contiguous_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the fake kernels say: a compiler plans with their strides."""
    x, *others, seed = operator_arguments("2-D", monkeypatch)[:6]
    options = operator_arguments("2-D", monkeypatch)[6:]
    x = x.to(memory_format=torch.channels_last)
    assert not x.is_contiguous()
    out, kept = ops.block(x, *others, seed, *options)
    grads = ops.block_backward(out, kept, x, *others, seed, *options, [True] * 5)
    assert all(t.is_contiguous() for t in (out, *grads))


def test_the_operator_draws_no_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operator_arguments("a rung", monkeypatch)
    with pytest.raises(RuntimeError, match="needs a seed"):
        ops.block(*arguments[:5], None, *arguments[6:])


# ---- who goes through them ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["auto", "torch", "one_kernel"])
def test_plain_eager_calls_do_not(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher's time is as long as a launch: inference, training and autocast skip it."""
    monkeypatch.setattr(ops, "block", None)
    monkeypatch.setattr(ops, "block_backward", None)
    inputs = list(map(torch.nn.Parameter, leaves()))
    for context in (torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out = call(*inputs, variant=variant)
    gradients(out, inputs)


def test_a_dispatch_mode_sees_one_operator_each_way() -> None:
    inputs = leaves()
    with Recorder() as recorder:
        out = call(*inputs, seed=3)
        ours = gradients(out, inputs)
    assert [name for name in recorder.names if "numba_fused" in name] == [
        "numba_fused.block.default",
        "numba_fused.block_backward.default",
    ]
    assert not any("convolution" in name for name in recorder.names)
    for a, b in zip(ours, gradients(call(*inputs, seed=3), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_fake_tensors_get_the_shape_and_the_validation() -> None:
    with FakeTensorMode() as mode:
        x, *others = (mode.from_tensor(t) for t in OPERANDS if t is not None)
        outs = [call(x, *others, variant="split", seed=3)]
        with pytest.raises(RuntimeError, match=r"4 channels .*got 3"):
            call(x[:, :3], *others)
    outs.append(call(x, *others, training=False))  # fake tensors outlive their mode
    for out in outs:
        assert (out.shape, out.dtype, out.device.type) == ((2, 4, 6, 7), torch.float32, "cpu")


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": False},
        {"padding": "same"},
        {"padding": "valid", "stride": 2, "dilation": (1, 2)},
        {"variant": "one_kernel"},
        {"seed": torch.tensor(3)},
        {"seed": 2**64 - 7},
    ],
    ids=str,
)
def test_a_compiled_call_is_the_eager_one(changes: dict[str, Any]) -> None:
    inputs = leaves()
    changes = {"seed": 3} | changes
    expected = call(*inputs, **changes)
    out = compiled(lambda *operands: call(*operands, **changes))(*inputs)
    assert torch.equal(out, expected)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_graphs_hold_one_operator_each_way() -> None:
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    inputs = leaves()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled(call, backend=backend)(*inputs).sum().backward()
    for graph, name in zip(graphs, ("block", "block_backward"), strict=True):
        assert graph.count(f"numba_fused.{name}.default") == 1
        assert not any("convolution" in target for target in graph)


def test_each_compiled_call_draws_a_mask_and_follows_manual_seed() -> None:
    def twice(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        return [function(*OPERANDS) for _ in range(2)]

    eager, ours = twice(call), twice(compiled(call))
    assert not torch.equal(*ours)
    assert all(map(torch.equal, eager, ours))

    two_calls = compiled(lambda *operands: (call(*operands), call(*operands)))
    assert not torch.equal(*two_calls(*OPERANDS))


def test_seeds_and_batches_may_change_without_compiling_again() -> None:
    counter = CompileCounter()
    function = compiled(lambda x, seed: call(x, *OPERANDS[1:], seed=seed), backend=counter)
    x = torch.randn(7, *OPERANDS.x.shape[1:])
    for batch, seed in ((7, 1), (5, 2), (3, 3), (2, -4)):
        assert torch.equal(function(x[:batch], seed), call(x[:batch], *OPERANDS[1:], seed=seed))
    assert counter.frame_count <= 2


def test_a_compiled_module_trains_and_evaluates() -> None:
    module = nf.FusedConvGroupNormMinClampDropout(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2)
    fast = compiled(module)
    for mode in (True, False, True):
        module.train(mode)
        torch.manual_seed(1)
        expected = module(OPERANDS.x)
        torch.manual_seed(1)
        assert torch.equal(fast(OPERANDS.x), expected)


def test_a_degenerate_chain_warns_and_does_not_break_the_graph() -> None:
    with pytest.warns(nf.DegenerateChainWarning, match="is -1 for every finite h"):
        out = compiled(call)(*OPERANDS, cap=None, training=False)
    assert (out == -1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 3}, "num_groups=3"),
        ({"dropout_p": 1.5}, "between 0 and 1, but got 1.5"),
        ({"variant": "best"}, "unknown variant 'best'"),
        ({"padding": "full"}, "'padding'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_while_compiling(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        compiled(lambda *operands: call(*operands, **changes))(*OPERANDS)


def test_an_exported_program_is_the_call() -> None:
    module = nf.FusedConvGroupNormMinClampDropout(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2)
    program = torch.export.export(module, (OPERANDS.x,))
    assert "torch.ops.numba_fused.block.default" in str(program.graph)
    torch.manual_seed(1)
    expected = module(OPERANDS.x)
    torch.manual_seed(1)
    assert torch.equal(program.module()(OPERANDS.x), expected)


def test_second_derivatives_of_compiled_calls_are_refused_not_wrong() -> None:
    inputs = leaves()
    out = compiled(call)(*inputs, seed=3)
    (gradient,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


# ---- torch.func ---------------------------------------------------------------------------------


def test_functional_call_takes_other_parameters() -> None:
    module = nf.FusedConvGroupNormMinClampDropout(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2)
    other = nf.FusedConvGroupNormMinClampDropout(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2)
    parameters: dict[str, Tensor] = dict(other.named_parameters())
    out = functional_call(module, parameters, (OPERANDS.x,), {"seed": 3})
    assert torch.equal(out, other(OPERANDS.x, seed=3))
    assert not torch.equal(out, module(OPERANDS.x, seed=3))


def test_transforms_are_the_references() -> None:
    def sums(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda beta: function(*OPERANDS[:4], beta, **CALL, seed=3).square().sum()

    beta = OPERANDS.beta
    assert beta is not None
    for transform in (grad, hessian, lambda f: lambda b: jvp(f, (b,), (b,))[1]):
        ours, theirs = (transform(sums(function))(beta) for function in (fused, nf.reference))
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)
    xs = torch.randn(3, *OPERANDS.x.shape)
    batched = vmap(lambda x: call(x, *OPERANDS[1:], seed=3))(xs)
    for x, out in zip(xs, batched, strict=True):
        torch.testing.assert_close(out, call(x, *OPERANDS[1:], seed=3))


def test_masks_are_drawn_of_plain_tensors_under_transforms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel finds no memory in a wrapped tensor, nor in one that is made under a transform."""
    addresses: list[int] = []

    def drawn(seed: Tensor, *arguments: Any) -> Tensor:
        addresses.extend((seed.data_ptr(), torch.empty(1).data_ptr()))
        return draw_mask(seed, *arguments)

    monkeypatch.setattr(ops, "draw_mask", drawn)
    x, *others = OPERANDS

    def total(x: Tensor, seed: Any) -> Tensor:
        return call(x, *others, seed=seed).sum()

    for seed in (None, 3, torch.tensor(3)):
        grad(total)(x, seed)
        grad(lambda x, seed=seed: grad(total)(x, seed).sum())(x)
        jvp(lambda x, seed=seed: total(x, seed), (x,), (x,))
        vmap(lambda x, seed=seed: total(x, seed), randomness="same")(x[None])
    assert all(addresses)
    assert len(addresses) == 2 * 3 * 4


def test_seeds_may_be_batched() -> None:
    seeds = torch.arange(3)
    batched = vmap(lambda seed: call(*OPERANDS, seed=seed))(seeds)
    for seed, out in zip(seeds, batched, strict=True):
        torch.testing.assert_close(out, call(*OPERANDS, seed=seed))


def test_opcheck_of_the_mask() -> None:
    torch.library.opcheck(ops.keep_mask, (torch.tensor([3]), (2, 3, 4, 5), 0.5))


def test_a_rung_by_name_cannot_be_transformed() -> None:
    with pytest.raises(ValueError, match="'one_kernel' cannot run under a transform"):
        grad(lambda x: call(x, *OPERANDS[1:], variant="one_kernel").sum())(OPERANDS.x)


# ---- half precision and autocast ----------------------------------------------------------------


@pytest.mark.parametrize("function", [call, compiled(call)], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", ["auto", "torch", "one_kernel"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_computed_in_fp32_and_rounded_once(
    dtype: torch.dtype, variant: str, function: Callable[..., Tensor]
) -> None:
    rounded = OPERANDS.to(dtype)
    inputs, wide = leaves(rounded), leaves(rounded.to(torch.float32))
    out, exact = (function(*t, seed=3, variant=variant) for t in (inputs, wide))
    assert out.dtype == dtype
    assert torch.equal(out, exact.to(dtype))
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape).to(dtype)
    ours = torch.autograd.grad(out, inputs, weights)
    theirs = torch.autograd.grad(exact, wide, weights.float())
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


@pytest.mark.parametrize("function", [call, compiled(call)], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", ["auto", "one_kernel"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_rounds_the_operands_and_nothing_else(
    dtype: torch.dtype, variant: str, function: Callable[..., Tensor]
) -> None:
    inputs = leaves()
    with torch.autocast("cpu", dtype):
        out = function(*inputs, seed=3, variant=variant)
        ours = gradients(out, inputs)  # inside, where autocast could reach the backward
    expected = call(*(t.to(dtype) for t in inputs), seed=3, variant=variant)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    for a, b in zip(ours, gradients(expected, inputs), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_autocast_joins_dtypes_but_leaves_fp64_alone() -> None:
    mixed = OPERANDS._replace(x=OPERANDS.x.bfloat16())
    double = OPERANDS.to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        of_mixed, of_double = call(*mixed, seed=3), call(*double, seed=3)
    assert torch.equal(of_mixed, call(*OPERANDS.to(torch.bfloat16), seed=3))
    assert torch.equal(of_double, call(*double, seed=3))


# ---- checkpointing and data parallelism ---------------------------------------------------------


@pytest.mark.parametrize("function", [call, compiled(call)], ids=["eager", "compiled"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(
    use_reentrant: bool, function: Callable[..., Tensor]
) -> None:
    results = []
    for run in (function, functools.partial(checkpoint, function, use_reentrant=use_reentrant)):
        torch.manual_seed(2)
        inputs = leaves()
        out = run(*inputs)
        assert out is not None
        torch.rand(5)
        results.append([out.detach(), *gradients_by_backward(out, inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def gradients_by_backward(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """As `gradients`, through ``backward``, which is all that reentrant checkpoints support."""
    out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
    return [t.grad for t in inputs if t.grad is not None]


def test_distributed_data_parallel_trains_it() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        module = nf.FusedConvGroupNormMinClampDropout(4, 6, 3, 3, -1.0, 1.0, 0.5, cap=0.5, dim=2)
        DistributedDataParallel(module)(OPERANDS.x, seed=3).square().sum().backward()
        ours = [p.grad for p in module.parameters()]
        module.zero_grad()
        module(OPERANDS.x, seed=3).square().sum().backward()
        for a, p in zip(ours, module.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)
    finally:
        dist.destroy_process_group()


# ---- the default backend, GPUs -------------------------------------------------------------------


def on_gpu(operands: Operands = OPERANDS) -> list[Tensor]:
    return [t.cuda() for t in operands if t is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_compiled_for_a_gpu_it_is_the_eager_call(dtype: torch.dtype) -> None:
    inputs = [t.to(dtype).requires_grad_() for t in on_gpu()]
    expected = call(*inputs, seed=3)
    out = torch.compile(call, fullgraph=True)(*inputs, seed=3)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, inputs, weights) for o in (out, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_inductor_takes_seeds_as_they_come(device: str) -> None:
    """The default backend generates code for what is done to a seed that is not a constant."""
    operands = [t.to(device) for t in OPERANDS if t is not None]
    function = torch.compile(call, fullgraph=True)
    for seed in (3, 4, -5, 2**63 - 1):
        assert torch.equal(function(*operands, seed=seed), call(*operands, seed=seed))


@pytest.mark.gpu
def test_cuda_graphs_of_the_compiler_draw_a_mask_each_replay() -> None:
    operands = on_gpu()
    function = torch.compile(call, fullgraph=True, mode="reduce-overhead")
    outs = [function(*operands, min_value=0.125).clone() for _ in range(5)]
    for first, second in itertools.pairwise(outs):
        assert not torch.equal(first, second)


@pytest.mark.gpu
def test_a_captured_training_step_draws_the_backwards_mask_again() -> None:
    """beta's gradient counts what the replayed forward kept."""
    inputs = [t.requires_grad_() for t in on_gpu()]
    wide = {"min_value": -50.0, "max_value": 50.0, "cap": 40.0}  # nothing is cut
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # also: not the default stream
        for _ in range(3):
            torch.autograd.grad(call(*inputs, **wide).sum(), inputs[4])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(*inputs, **wide)
        (gradient,) = torch.autograd.grad(out.sum(), inputs[4])
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(out != 0)
        torch.testing.assert_close(gradient, masks[-1].sum((0, 2, 3)) / 0.75)
    assert not torch.equal(masks[0], masks[1])


@pytest.mark.gpu
def test_transforms_on_a_gpu_are_the_cpus() -> None:
    def sums(x: Tensor, *others: Any) -> Tensor:
        return call(x, *others, seed=3).square().sum()

    ours, theirs = grad(sums)(*on_gpu()), grad(sums)(*OPERANDS)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
