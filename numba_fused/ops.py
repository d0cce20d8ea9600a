"""The public function: validate, choose a rung, run it, differentiate it.

A plain eager call launches its rung directly: the dispatcher of PyTorch's custom operators would
cost as much host time as the launch. Where something follows the call (torch.compile,
torch.export, fake tensors, any dispatch mode) it goes through the operators
``numba_fused::block`` and ``numba_fused::block_backward`` instead, whose bodies are the same
`forward` and `gradients`. Transforms of torch.func, which cannot differentiate custom operators,
get PyTorch's own, and the mask from ``numba_fused::keep_mask``, which there is nothing to
differentiate in.
"""

from __future__ import annotations

import marshal
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from numba_fused import backward, ladder, plan
from numba_fused.ladder.rung_0_torch import draw_mask, dropout_mask
from numba_fused.reference import chain, convolution_precision, seed_tensor
from numba_fused.spec import BlockSpec, DegenerateChainWarning, IntOrTuple, Padding

# x, weight, bias, gamma, beta: those that the caller has, in the function's order.
Operands: TypeAlias = tuple[Any, ...]
Options: TypeAlias = tuple[Any, ...]

OPERANDS = "Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? seed"
# A schema has no type for `padding`, which may be a string: None stands for "same".
OPTIONS = (
    "int num_groups, float min_value, float max_value, float? cap, float dropout_p, bool training, "
    "int[] stride, int[]? padding, int[] dilation, int groups, float eps, str precision"
)
OPTION_NAMES = tuple(option.split()[1] for option in OPTIONS.split(", "))
PADDING = OPTION_NAMES.index("padding")

COMPUTED_DTYPES = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
MOST_CALLS = 1024


@dataclass(frozen=True)
class Call:
    """What is known of a call when it has been validated.

    Attributes
    ----------
    spec : BlockSpec
    rung : str, optional
        Name of the one that runs it; None if it is left to PyTorch's operators, on the CPU.
    backward : str, optional
        Name of the variant that differentiates it; None for PyTorch's operators.
    """

    spec: BlockSpec
    rung: str | None
    backward: str | None

    @cached_property
    def statistics_shape(self) -> tuple[int, ...]:
        """Of what forward keeps for backward: the groups' mean and rstd, or nothing."""
        if self.rung is None or self.backward is None:
            return (0,)
        if not ladder.get(self.rung).keeps_statistics:
            return (0,)
        return (2, self.spec.batch, self.spec.num_groups)


# The calls seen so far, by everything that decides whether a call is valid. Validating one takes
# longer than launching its kernels.
_calls: dict[tuple[Any, ...], Call] = {}


def fused_conv_group_norm_min_clamp_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    num_groups: int,
    min_value: float,
    max_value: float,
    cap: float | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: int | Tensor | None = None,
    stride: IntOrTuple = 1,
    padding: Padding = 0,
    dilation: IntOrTuple = 1,
    groups: int = 1,
    eps: float = 1e-5,
    precision: str = "ieee",
    variant: str = "auto",
) -> Tensor:
    """``dropout(clamp(min(group_norm(conv(x)), cap), min_value, max_value))`` as one operator.

    Parameters
    ----------
    x : Tensor
        (N, C, [D, [H]], W), of any strides; float32 or float64, or float16 or bfloat16, which are
        computed in float32.
    weight : Tensor
        (K, C / groups, *kernel_size): its rank says whether the convolution is 1-D, 2-D or 3-D.
    bias, gamma, beta : Tensor, optional
        (K,): the convolution's bias, the normalisation's weight and bias.
    num_groups : int
        Groups of the normalisation; divides K. Statistics are the biased variance over
        (K / num_groups, *spatial) of each sample.
    min_value, max_value : float
        Bounds of the clamp; ``min_value > max_value`` gives `max_value`, as in PyTorch.
    cap : float, optional
        Upper operand of the min. None means `min_value`, which makes the chain the constant
        `min_value` and warns about it.
    dropout_p : float
        Probability that an element is dropped; kept ones are scaled by ``1 / (1 - dropout_p)``.
    training : bool
        Whether dropout acts.
    seed : int or Tensor, optional
        Fixes the mask (`keep_mask`): an int, taken modulo 2**64, or an int64 tensor of one
        element on x's device. None draws one from torch's generator of that device.
    stride, padding, dilation : int or tuple
        As in ``torch.nn.functional.conv3d``; `padding` also takes ``"same"`` and ``"valid"``.
    groups : int
        Groups of the convolution.
    eps : float
        Added to the variance.
    precision : str
        ``"ieee"``: error against an fp64 reference at most twice PyTorch's own. ``"tf32"``: the
        convolution's operands may be rounded to 10 fraction bits, as tensor cores take them.
    variant : str
        ``"auto"``, or the name of a rung (`ladder.names`). CPU tensors run a named rung in the
        simulator, for tiny shapes, and ``"auto"`` as PyTorch operators with the same mask.

    Returns
    -------
    Tensor
        (N, K, *output_size), of x's dtype, on its device, contiguous.

    Raises
    ------
    RuntimeError
        Shapes, channels, groups, dtypes or devices that do not fit (what PyTorch raises);
        an unsupported dtype or precision raises its subclass `NotImplementedError`.
    ValueError
        A probability outside [0, 1], a NaN bound, a single value per group, an unknown variant
        or one that cannot run the shape, or not under a transform of torch.func.
    TypeError
        An argument of the wrong type.

    Warns
    -----
    DegenerateChainWarning
        The bounds leave a constant for every finite input.

    Notes
    -----
    Differentiable in x, weight, bias, gamma and beta: backward computes the convolution and the
    mask again instead of keeping them. On a GPU it has kernels of its own (`numba_fused.backward`),
    with cuDNN's convolutions where they are wide; with ``variant="torch"`` it is PyTorch's.
    In eager mode the gradients can be differentiated again; compiled ones cannot.

    Under ``torch.autocast`` the operands are rounded to its dtype, as a convolution's are (float64
    stays), the block is computed in float32, and the result has autocast's dtype.

    ``torch.compile`` and ``torch.export`` see one operator, ``numba_fused::block``, and trace the
    drawing of the seed, so that each call draws its own. Its batch may be dynamic; every other
    size is part of the kernels. Transforms of torch.func (grad, vmap, jvp, ...) differentiate
    PyTorch's operators instead of a rung: for ``"auto"`` and ``"torch"`` alone.
    """
    operands: Operands = (x, weight, bias, gamma, beta)
    options: Options = (
        num_groups, min_value, max_value, cap, dropout_p, training,
        stride, padding, dilation, groups, eps, precision,
    )  # fmt: skip
    if is_followed(operands):
        operands = autocast(operands)
        drawn = traced_seed(seed, x.device) if training and dropout_p > 0 else None
        out, _ = block(*operands, drawn, *schema_options(options), variant)
        return out
    if torch._C._is_any_autocast_enabled():
        operands = autocast(operands)
    call = validated(operands, options, variant)
    if torch._C._are_functorch_transforms_active():
        return transformed(call, variant, seed, operands)
    if derivative_wanted(operands) and call.rung is not None:  # PyTorch's operators know their own
        drawn = seed_tensor(seed, x.device) if call.spec.draws else None  # backward needs it, too
        return _Block.apply(call, drawn, *operands)
    return forward(call, seed, operands)


# ---- what is computed, whoever asks -------------------------------------------------------------


def forward(
    call: Call, seed: int | Tensor | None, operands: Operands, statistics: Tensor | None = None
) -> Tensor:
    """Run a call; the result has x's dtype. Autograd sees nothing of a rung's kernels.

    `statistics` is filled if it is one of `new_statistics`.
    """
    x, spec = operands[0], call.spec
    if call.rung is None:
        mask = dropout_mask(spec, seed_tensor(seed, x.device)) if spec.draws else None
        return in_pytorch(spec, mask, operands)
    with without_autocast(x):
        if x.dtype not in COMPUTED_DTYPES:
            return ladder.run(call.rung, *operands, spec=spec, seed=seed, statistics=statistics)
        tensors = computed(operands)
        out = ladder.run(call.rung, *tensors, spec=spec, seed=seed, statistics=statistics)
        return out.to(x.dtype)


def new_statistics(call: Call, x: Tensor) -> Tensor | None:
    """Memory for what forward keeps for backward, if it keeps anything."""
    if call.statistics_shape == (0,):
        return None
    return x.new_empty(call.statistics_shape, dtype=torch.float32)


def in_pytorch(spec: BlockSpec, keep_mask: Tensor | None, operands: Operands) -> Tensor:
    """The block as PyTorch's operators, contiguous."""
    x = operands[0]
    with convolution_precision(spec), without_autocast(x):
        out = chain(spec, *computed(operands), keep_mask=keep_mask)
        return out.contiguous().to(x.dtype)


def gradients(
    call: Call,
    seed: Tensor | None,
    statistics: Tensor | None,
    grad_out: Tensor,
    operands: Operands,
    wanted: Sequence[bool],
    *,
    create_graph: bool,
) -> list[Tensor]:
    """Gradients of the operands that are `wanted`, in order.

    Kernels know of no graph, so gradients that are to be differentiated again are PyTorch's.
    """
    if call.backward is None or create_graph:
        return in_pytorch_backward(
            call.spec, seed, grad_out, operands, wanted, create_graph=create_graph
        )
    x, weight, bias, gamma, beta = computed(operands)
    of_x, of_weight, of_bias, of_gamma, of_beta = wanted
    mean, rstd = (None, None) if statistics is None else statistics.view(2, -1)
    found = backward.run(
        x,
        weight,
        bias,
        gamma,
        beta,
        grad_out.to(x.dtype),
        spec=call.spec,
        seed=seed,
        mean=mean,
        rstd=rstd,
        wanted=(of_x, of_weight, of_bias, of_gamma, of_beta),
        variant=call.backward,
    )
    return [gradient.to(operands[0].dtype) for gradient in found if gradient is not None]


def in_pytorch_backward(
    spec: BlockSpec,
    seed: Tensor | None,
    grad_out: Tensor,
    operands: Operands,
    wanted: Sequence[bool],
    *,
    create_graph: bool,
) -> list[Tensor]:
    """As `gradients`, by recomputing the block as PyTorch's operators."""
    mask = dropout_mask(spec, seed)
    with convolution_precision(spec), without_autocast(grad_out), torch.enable_grad():
        # Views, because an operand may depend on another: these gradients are partial ones.
        views: list[Any] = [None if t is None else t.view_as(t) for t in operands]
        targets = [view.requires_grad_() for view, want in zip(views, wanted, strict=True) if want]
        out = chain(spec, *computed(tuple(views)), keep_mask=mask).to(grad_out.dtype)
        return list(torch.autograd.grad(out, targets, grad_out, create_graph=create_graph))


def computed(operands: Operands) -> Operands:
    """The operands in the dtype they are computed in."""
    dtype = COMPUTED_DTYPES.get(operands[0].dtype)
    if dtype is None:
        return operands
    return tuple(None if t is None else t.to(dtype) for t in operands)


def autocast(operands: Operands) -> Operands:
    """The operands in autocast's dtype where it is on: what it does to a convolution's."""
    x = operands[0]
    if not isinstance(x, Tensor) or not torch.is_autocast_enabled(x.device.type):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype)
        if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in operands
    )


_NOTHING = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """No autocast on a tensor's device inside: the block has chosen its own dtypes."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    return torch.autocast(tensor.device.type, enabled=False)


# ---- eager calls --------------------------------------------------------------------------------


def derivative_wanted(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether autograd has to know of the call, in backward or in forward mode."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in operands:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


class _Block(torch.autograd.Function):
    """The block to autograd."""

    @staticmethod
    def forward(ctx: Any, call: Call, seed: Tensor | None, *operands: Tensor | None) -> Tensor:
        ctx.call = call
        statistics = new_statistics(call, operands[0])  # type: ignore[arg-type]
        out = forward(call, seed, operands, statistics)
        ctx.save_for_backward(seed, statistics, *operands)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        seed, statistics, *operands = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        found = gradients(
            ctx.call,
            seed,
            statistics,
            grad_out,
            tuple(operands),
            wanted,
            # Autograd turns gradients on inside a backward that is to be differentiated again.
            create_graph=torch.is_grad_enabled(),
        )
        each = iter(found)
        return (None, None, *(next(each) if want else None for want in wanted))


# ---- calls that something follows ---------------------------------------------------------------

_PLAIN = {Tensor, nn.Parameter, NoneType}


def is_followed(operands: Operands) -> bool:
    """Whether a tracer or a dispatch mode has to see one operator instead of what it launches."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if _PLAIN.issuperset(map(type, operands)):
        return False
    return any(isinstance(t, Tensor) and type(t) not in _PLAIN for t in operands)


def traced_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """As `seed_tensor`, value for value, in what compilers trace: out of place, within int64."""
    if seed is None:
        return torch.ops.aten.random(torch.empty(1, dtype=torch.int64, device=device))
    if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63:
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    return seed_tensor(seed, device)


def schema_options(options: Options) -> Options:
    """The options as the operators' schema spells them; a compiler can trace this."""
    *numbers, stride, padding, dilation, groups, eps, precision = options
    if padding == "same":
        padding = None
    elif padding == "valid":
        padding = 0
    return (*numbers, _ints(stride), _ints(padding), _ints(dilation), groups, eps, precision)


def _ints(value: Any) -> Any:
    return (value,) if isinstance(value, int) else value


def python_options(options: Options) -> Options:
    """The options as the public function takes them."""
    padding = "same" if options[PADDING] is None else options[PADDING]
    return (*options[:PADDING], padding, *options[PADDING + 1 :])


@torch.library.custom_op(
    "numba_fused::block",
    mutates_args=(),
    schema=f"({OPERANDS}, {OPTIONS}, str variant) -> (Tensor out, Tensor statistics)",
)
def block(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The block as an operator of PyTorch; deterministic, because its seed is an operand.

    Besides the output it returns what forward keeps for backward (`Call.statistics_shape`).
    """
    *operands, seed = arguments[:6]
    options, variant = python_options(arguments[6:-1]), arguments[-1]
    call = validated(tuple(operands), options, variant)
    seed = _checked_seed(call.spec, seed, operands[0].device)
    statistics = new_statistics(call, operands[0])
    out = forward(call, seed, tuple(operands), statistics)
    nothing = out.new_empty((0,), dtype=torch.float32)
    return out, nothing if statistics is None else statistics


@block.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    operands, options, variant = arguments[:5], python_options(arguments[6:-1]), arguments[-1]
    x = operands[0]
    batch, *sizes = x.shape
    known = batch if isinstance(batch, int) else 2  # what is valid for two samples is for more
    call = call_of(specified(operands, options, variant, (known, *sizes)), variant, x.device)
    kept = call.statistics_shape
    kept = kept if kept == (0,) else (2, batch, kept[2])
    out = x.new_empty((batch, *call.spec.output_shape[1:]))
    return out, x.new_empty(kept, dtype=torch.float32)


@torch.library.custom_op(
    "numba_fused::block_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor statistics, {OPERANDS}, {OPTIONS}, str variant, "
    "bool[] wanted) -> Tensor[]",
)
def block_backward(*arguments: Any) -> list[Tensor]:
    """The gradients of `block`'s operands that are `wanted`, contiguous."""
    grad_out, statistics, *operands, seed = arguments[:8]
    options, variant, wanted = python_options(arguments[8:-2]), arguments[-2], arguments[-1]
    call = validated(tuple(operands), options, variant)
    seed = _checked_seed(call.spec, seed, operands[0].device)
    kept = statistics if statistics.numel() > 0 else None
    with autograd_in_operator():
        each = gradients(call, seed, kept, grad_out, tuple(operands), wanted, create_graph=False)
    return [gradient.contiguous() for gradient in each]


@block_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    operands, wanted = arguments[2:7], arguments[-1]
    return [t.new_empty(t.shape) for t, want in zip(operands, wanted, strict=True) if want]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(statistics, *inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:5]
    each = iter(block_backward(grad_out, *ctx.saved_tensors, *ctx.options, wanted))
    others = len(ctx.needs_input_grad) - len(wanted)
    return (*(next(each) if want else None for want in wanted), *(None,) * others)


block.register_autograd(_backward, setup_context=_save)


def autograd_in_operator() -> AbstractContextManager[Any]:
    """Autograd works inside, as it otherwise does not in the body of an operator."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(),
        excluded.remove(torch._C.DispatchKey.AutogradFunctionality),
    )


def _checked_seed(spec: BlockSpec, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The operator draws no seed of its own: backward would not know it."""
    if not spec.draws:
        return None
    if seed is None:
        raise RuntimeError("dropout acts, so numba_fused::block needs a seed, but got None")
    return seed_tensor(seed, device)


# ---- transforms of torch.func -------------------------------------------------------------------


def transformed(call: Call, variant: str, seed: int | Tensor | None, operands: Operands) -> Tensor:
    """The block as operators that the transforms can differentiate and batch."""
    if variant not in ("auto", "torch"):
        raise ValueError(
            f"variant={variant!r} cannot run under a transform of torch.func: use "
            f"variant='auto' (PyTorch with the same mask)"
        )
    spec, mask = call.spec, None
    if spec.draws:
        drawn = seed_tensor(seed, operands[0].device)
        mask = keep_mask(drawn, spec.output_shape, spec.dropout_p)
    return in_pytorch(spec, mask, operands)


@torch.library.custom_op("numba_fused::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, output_shape: Sequence[int], dropout_p: float) -> Tensor:
    """The dropout mask as an operator, because transforms wrap even the tensors made under them.

    A kernel finds no memory in a wrapped tensor. In the body of an operator they are plain.
    """
    return draw_mask(seed, output_shape, dropout_p)


@keep_mask.register_fake
def _(seed: Tensor, output_shape: Sequence[int], dropout_p: float) -> Tensor:
    return seed.new_empty(output_shape, dtype=torch.bool)


# ---- validation ---------------------------------------------------------------------------------


def validated(operands: Operands, options: Options, variant: str) -> Call:
    """A call found valid, remembered; warns if its chain is degenerate."""
    key = call_key(operands, (*options, variant))
    call = None if key is None else _calls.get(key)
    if call is None:
        call = call_of(specified(operands, options, variant), variant, operands[0].device)
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        if key is not None:
            _calls[key] = call
    if call.spec.constant is not None:
        warnings.warn(call.spec.degeneracy, DegenerateChainWarning, stacklevel=3)
    return call


def call_of(spec: BlockSpec, variant: str, device: torch.device) -> Call:
    """Who runs a call and who differentiates it."""
    rung = rung_for(spec, variant, device)
    in_torch = device.type == "cpu" or rung == "torch"
    return Call(spec, rung, None if in_torch else plan.choose_backward(spec, device))


def rung_for(spec: BlockSpec, variant: str, device: torch.device) -> str | None:
    """The rung that a variant means for tensors of a device."""
    if variant == "auto":
        return None if device.type == "cpu" else plan.choose(spec, device)
    if variant != "torch" and device.type == "cpu":
        plan.check_simulable(spec, variant)
    return variant


def specified(
    operands: Operands, options: Options, variant: str, x_shape: Sequence[int] | None = None
) -> BlockSpec:
    """Check everything about a call but its seed; `x_shape` stands in for x's."""
    check_operands(*operands)
    x, weight, bias, gamma, _ = operands
    spec = BlockSpec.from_arguments(
        x.shape if x_shape is None else x_shape,
        weight.shape,
        **dict(zip(OPTION_NAMES, options, strict=True)),
        has_bias=bias is not None,
        affine=gamma is not None,
        dtype=str(COMPUTED_DTYPES.get(x.dtype, x.dtype)).removeprefix("torch."),
    )
    if variant != "auto":
        ladder.get(variant)
    return spec


def call_key(operands: Operands, options: Options) -> tuple[Any, ...] | None:
    """What calls must have in common for one's validation to be good for the other.

    To a dict 1, 1.0 and True are the same key, and so are 0.0 and -0.0; marshalled they differ.
    Of what cannot be marshalled, or is no tensor, nothing is remembered.
    """
    try:
        tensors = [None if t is None else (t.shape, t.dtype, t.device) for t in operands]
        return (*tensors, *map(type, options), marshal.dumps(options, 2))
    except (AttributeError, ValueError):
        return None


def check_operands(x: Any, weight: Any, bias: Any, gamma: Any, beta: Any) -> None:
    """Check that the tensors are tensors of one dtype and device, the vectors (K,) each.

    Raises
    ------
    TypeError
        Not a tensor.
    RuntimeError
        Another dtype or device than x's, or a vector of another shape than (K,); one of gamma
        and beta without the other is fine.
    """
    named = {"x": x, "weight": weight, "bias": bias, "gamma": gamma, "beta": beta}
    for name, tensor in named.items():
        required = name in ("x", "weight")
        if not isinstance(tensor, Tensor):
            if tensor is None and not required:
                continue
            raise TypeError(
                f"{name} must be a Tensor{'' if required else ' or None'}, but got "
                f"{type(tensor).__name__}"
            )
        if tensor.dtype != x.dtype:
            raise RuntimeError(
                f"x and {name} must have one dtype, but got {x.dtype} and {tensor.dtype}: "
                f"convert one with .to({x.dtype})"
            )
        if tensor.device != x.device:
            raise RuntimeError(
                f"x and {name} must be on one device, but got {x.device} and {tensor.device}: "
                f"move one with .to({str(x.device)!r})"
            )
        if not required and tensor.shape != weight.shape[:1]:
            raise RuntimeError(
                f"{name} must have one value per output channel, shape {list(weight.shape[:1])}, "
                f"but got shape {list(tensor.shape)}"
            )
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"x is on {x.device}, and the kernels run on CUDA GPUs: use x.cuda() or x.cpu()"
        )
