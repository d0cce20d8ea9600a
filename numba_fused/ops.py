"""The public function: validate, choose a rung, run it, differentiate it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from numba_fused import ladder, plan
from numba_fused.ladder.rung_0_torch import dropout_mask
from numba_fused.reference import chain, full_precision, seed_tensor
from numba_fused.spec import BlockSpec, DegenerateChainWarning, IntOrTuple, Padding

PRECISIONS = ("ieee",)


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
        (N, C, [D, [H]], W), float32 or float64, any strides.
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
        ``"ieee"``: error against an fp64 reference at most twice PyTorch's own.
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
        or one that cannot run the shape.
    TypeError
        An argument of the wrong type.

    Warns
    -----
    DegenerateChainWarning
        The bounds leave a constant for every finite input.

    Notes
    -----
    Differentiable in x, weight, bias, gamma and beta: backward recomputes the chain with
    PyTorch's operators and the forward's own mask, so it costs what eager PyTorch costs.
    """
    operands = check_operands(x, weight, bias=bias, gamma=gamma, beta=beta)
    spec = BlockSpec.from_arguments(
        x.shape,
        weight.shape,
        num_groups=num_groups,
        min_value=min_value,
        max_value=max_value,
        cap=cap,
        dropout_p=dropout_p,
        training=training,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        eps=eps,
        has_bias=bias is not None,
        affine=gamma is not None,
        dtype=str(x.dtype).removeprefix("torch."),
    )
    check_precision(precision)
    if variant != "auto":
        ladder.get(variant)
    seed = seed_tensor(seed, x.device) if spec.draws else None
    if spec.constant is not None:
        warnings.warn(spec.degeneracy, DegenerateChainWarning, stacklevel=2)
    if x.device.type == "cpu" and variant == "auto":
        return chain(spec, *operands, dropout_mask(spec, seed))
    if variant == "auto":
        variant = plan.choose(spec)
    elif x.device.type == "cpu" and variant != "torch":
        plan.check_simulable(spec, variant)
    return _Block.apply(spec, variant, seed, *operands)


class _Block(torch.autograd.Function):
    """Forward by a rung of the ladder, backward by differentiating PyTorch's operators."""

    @staticmethod
    def forward(
        ctx: Any, spec: BlockSpec, variant: str, seed: Tensor | None, *operands: Tensor | None
    ) -> Tensor:
        ctx.spec, ctx.seed = spec, seed
        ctx.save_for_backward(*operands)
        x, weight, *vectors = operands
        assert x is not None
        assert weight is not None
        return ladder.run(variant, x, weight, *vectors, spec=spec, seed=seed)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Autograd turns gradients on inside a backward that is to be differentiated again.
        create_graph = torch.is_grad_enabled()
        wanted = ctx.needs_input_grad[3:]
        mask = dropout_mask(ctx.spec, ctx.seed)
        with full_precision(), torch.enable_grad():
            # Views, because an operand may depend on another: these gradients are partial ones.
            views: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
            x, weight, bias, gamma, beta = views
            targets = [t for t, want in zip(views, wanted, strict=True) if want]
            out = chain(ctx.spec, x, weight, bias, gamma, beta, mask)
            gradients = torch.autograd.grad(out, targets, grad_out, create_graph=create_graph)
        each = iter(gradients)
        return (None, None, None, *(next(each) if want else None for want in wanted))


def check_operands(
    x: Any, weight: Any, **vectors: Any
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check that the tensors are tensors of one dtype and device, the vectors (K,) each.

    Returns
    -------
    tuple
        x, weight and the vectors, in order.

    Raises
    ------
    TypeError
        Not a tensor.
    RuntimeError
        Another dtype or device than x's, or a vector of another shape than (K,); one of gamma
        and beta without the other is fine.
    """
    for name, tensor in {"x": x, "weight": weight, **vectors}.items():
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
    bias, gamma, beta = vectors.values()
    return x, weight, bias, gamma, beta


def check_precision(precision: str) -> None:
    """Raise `NotImplementedError` for a precision no rung computes in yet."""
    if precision not in PRECISIONS:
        raise NotImplementedError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, but got {precision!r}"
        )
