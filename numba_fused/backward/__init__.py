"""The backward pass: from the gradient of the output to those of x and the parameters.

Nothing of the output's size is kept from forward: the convolution and the dropout mask are
computed again. `clear` does it for any shape, one idea to a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numba_fused.backward import clear
from numba_fused.backward.clear import Wanted, ledger, limit
from numba_fused.ladder import channel_vector, launcher_for
from numba_fused.reference import seed_tensor
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.simulator import Simulator

NAMES = ("x", "weight", "bias", "gamma", "beta")

__all__ = ["Gradients", "Wanted", "ledger", "limit", "run"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


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
    simulator : Simulator, optional
        Runs CPU tensors, and afterwards holds what it counted.

    Returns
    -------
    tuple
        The five gradients, each of its tensor's shape and contiguous; None where not wanted.

    Raises
    ------
    ValueError
        No seed for a spec that draws, a gradient wanted of an absent tensor, mean without rstd,
        or a sample too large for 32-bit indices.
    """
    tensors = x, weight, bias, gamma, beta
    for name, tensor, want in zip(NAMES, tensors, wanted, strict=True):
        if want and tensor is None:
            raise ValueError(f"a gradient of {name} is wanted, but {name} is None")
    if seed is None and spec.draws:
        raise ValueError("the spec draws a dropout mask: pass forward's seed to draw it again")
    if (mean is None) != (rstd is None):
        raise ValueError("mean and rstd come together: pass both, or neither")
    if (reason := limit(spec)) is not None:
        raise ValueError(f"the backward kernels cannot run this shape: {reason}")
    if spec.batch == 0:
        found = [t.new_zeros(t.shape) if t is not None else None for t in tensors]
    else:
        with torch.no_grad():
            operands = clear.Operands(
                spec=spec,
                x=x.ravel(),
                weight=weight.ravel(),
                bias=channel_vector(bias, 0.0, weight),
                gamma=channel_vector(gamma, 1.0, weight),
                beta=channel_vector(beta, 0.0, weight),
                grad_out=grad_out.ravel(),
                seed=seed_tensor(seed if spec.draws else 0, x.device),
            )
            statistics = None if mean is None or rstd is None else (mean, rstd)
            found = clear.gradients(launcher_for(x.device, simulator), operands, statistics, wanted)
    dx, dweight, dbias, dgamma, dbeta = (
        g.view(t.shape) if want and t is not None and g is not None else None
        for t, g, want in zip(tensors, found, wanted, strict=True)
    )
    return dx, dweight, dbias, dgamma, dbeta
