"""The backward pass: from the gradient of the output to those of x and the parameters.

Nothing of the output's size is kept from forward: the convolution and the dropout mask are
computed again. `clear` does it for any shape, one idea to a kernel; `library_conv` leaves the
convolutions to cuDNN; `tensor_core` is the fast one, for narrow convolutions.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from numba_fused.backward import clear, library_conv, tensor_core
from numba_fused.backward.operands import Wanted
from numba_fused.backward.replay import Repeated
from numba_fused.ladder import capability, channel_vector, launcher_for
from numba_fused.ladder.rung import Ledger, once
from numba_fused.reference import seed_tensor
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.simulator import Simulator

NAMES = ("x", "weight", "bias", "gamma", "beta")

__all__ = ["NAMES", "VARIANTS", "Gradients", "Wanted", "ledger", "obstacle", "run"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


VARIANTS: dict[str, ModuleType] = {
    "clear": clear,
    "library_conv": library_conv,
    "tensor_core": tensor_core,
}


def obstacle(variant: str, spec: BlockSpec, capability: tuple[int, int]) -> str | None:
    """Why a variant cannot differentiate `spec` on a GPU of this compute capability, or None.

    Raises
    ------
    ValueError
        No variant is called that; the message names those there are.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown backward variant {variant!r}: use one of {', '.join(VARIANTS)}")
    module = VARIANTS[variant]
    if capability < module.least_capability:
        needed, found = ("{}.{}".format(*c) for c in (module.least_capability, capability))
        return f"it needs compute capability {needed}, and this GPU has {found}"
    return once(module.limit, spec)


def ledger(
    spec: BlockSpec, wanted: Wanted, *, has_statistics: bool, variant: str = "clear"
) -> Ledger:
    """Bytes and launches that a variant should need.

    Parameters
    ----------
    spec : BlockSpec
    wanted : tuple of bool
        Which of the five gradients are computed.
    has_statistics : bool
        Whether forward kept mean and rstd.
    variant : str
        One of `VARIANTS` that can run `spec`.
    """
    return VARIANTS[variant].ledger(spec, wanted, has_statistics=has_statistics)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    grad_out: Tensor,
    *,
    spec: BlockSpec,
    seed: int | Tensor | None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    wanted: Wanted,
    variant: str = "clear",
    simulator: Simulator | None = None,
) -> Gradients:
    """Gradients of x, weight, bias, gamma and beta.

    Parameters
    ----------
    x, weight, bias, gamma, beta : Tensor
        Forward's, of `spec`'s shapes and dtype, all on one device, any strides. CUDA tensors
        launch on torch's current stream; CPU tensors run in the simulator.
    grad_out : Tensor
        Gradient of the output, of ``spec.output_shape``, any strides.
    spec : BlockSpec
        Forward's validated call.
    seed : int or Tensor, optional
        Of forward's mask; not looked at where the spec draws none.
    mean, rstd : Tensor, optional
        Of each (sample, group), (N * num_groups,) in x's dtype: both, or neither if forward did
        not keep them.
    wanted : tuple of bool
        Which of the five to compute: none of a tensor that is None.
    variant : str
        One of `VARIANTS`.
    simulator : Simulator, optional
        Runs CPU tensors, and afterwards holds what it counted.

    Returns
    -------
    tuple
        The five gradients, each of its tensor's shape and contiguous; None where not wanted.

    Raises
    ------
    ValueError
        An unknown variant or one that cannot run the shape, no seed for a spec that draws, a
        gradient wanted of an absent tensor, or mean without rstd.
    """
    if (reason := obstacle(variant, spec, capability(x.device))) is not None:
        raise ValueError(f"backward variant {variant!r} cannot run this shape: {reason}")
    tensors = x, weight, bias, gamma, beta
    for operand, tensor, want in zip(NAMES, tensors, wanted, strict=True):
        if want and tensor is None:
            raise ValueError(f"a gradient of {operand} is wanted, but {operand} is None")
    if seed is None and spec.draws:
        raise ValueError("the spec draws a dropout mask: pass forward's seed to draw it again")
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd come together: pass both, or neither")
    if spec.batch == 0:
        found = [t.new_zeros(t.shape) if t is not None else None for t in tensors]
    else:
        operands = (
            x,
            weight,
            grad_out,
            channel_vector(bias, 0.0, weight),
            channel_vector(gamma, 1.0, weight),
            channel_vector(beta, 0.0, weight),
            seed_tensor(seed if spec.draws else 0, x.device),
        )
        statistics = () if mean is None or rstd is None else (mean, rstd)
        compute = bind(variant, spec, x.device, wanted, bool(statistics))
        found = compute(launcher_for(x.device, simulator), (*operands, *statistics))
    dx, dweight, dbias, dgamma, dbeta = (
        g.view(t.shape) if want and t is not None and g is not None else None
        for t, g, want in zip(tensors, found, wanted, strict=True)
    )
    return dx, dweight, dbias, dgamma, dbeta


# By variant, the spec's id (the entry refers to the spec, so no other can have it), device, the
# gradients wanted, and whether there are statistics.
Key: TypeAlias = tuple[str, int, torch.device, Wanted, bool]
_bound: dict[Key, tuple[BlockSpec, Repeated]] = {}
MOST_BOUND = 1024


def bind(
    variant: str, spec: BlockSpec, device: torch.device, wanted: Wanted, has_statistics: bool
) -> Repeated:
    """What computes such calls."""
    key = variant, id(spec), device, wanted, has_statistics
    if (entry := _bound.get(key)) is None:
        if len(_bound) >= MOST_BOUND:
            _bound.clear()
        entry = _bound[key] = spec, Repeated(VARIANTS[variant], spec, wanted)
    return entry[1]
