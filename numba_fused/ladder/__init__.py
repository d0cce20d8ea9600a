"""The ladder: one rung per file, one idea per rung, from the naive chain to the fastest.

This registry is what the command line, the tests, the plots and the README read: a rung added
to `_MODULES` appears in all of them.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numba_fused.ladder import (
    rung_0_torch,
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_10_library_conv,
)
from numba_fused.ladder.rung import Ledger, Operands, Rung, gpu_launcher
from numba_fused.reference import seed_tensor
from numba_fused.spec import BlockSpec, check_threads_per_block

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher
    from numba_fused.simulator import Simulator

__all__ = ["Ledger", "Operands", "Rung", "get", "names", "run", "rungs"]

DEFAULT_THREADS_PER_BLOCK = 256

_MODULES = (
    rung_0_torch,
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_10_library_conv,
)


def _rung(module: ModuleType) -> Rung:
    """The rung of a module, whose file name carries number and name: ``rung_3_epilogue``."""
    _, number, name = module.__name__.rpartition(".")[2].split("_", maxsplit=2)
    return Rung(
        number=int(number),
        name=name,
        idea=(module.__doc__ or "").partition("\n")[0],
        module=module,
        takes_threads_per_block=module not in (rung_0_torch, rung_10_library_conv),
    )


_RUNGS = {rung.name: rung for rung in map(_rung, _MODULES)}


def names() -> list[str]:
    """Names of the rungs, lowest first: what ``variant=`` takes besides ``"auto"``."""
    return list(_RUNGS)


def rungs() -> list[Rung]:
    """The rungs, lowest first."""
    return list(_RUNGS.values())


def get(name: str) -> Rung:
    """The rung called `name`.

    Raises
    ------
    ValueError
        No rung is called that; the message names those there are.
    """
    if name not in _RUNGS:
        raise ValueError(f"unknown variant {name!r}: use 'auto' or one of {', '.join(names())}")
    return _RUNGS[name]


def run(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    spec: BlockSpec,
    seed: int | Tensor | None,
    out: Tensor | None = None,
    threads_per_block: int = DEFAULT_THREADS_PER_BLOCK,
    simulator: Simulator | None = None,
) -> Tensor:
    """Run one rung: the entry below the public function, with every launch choice open.

    Parameters
    ----------
    name : str
        One of `names`.
    x, weight, bias, gamma, beta : Tensor
        Of `spec`'s shapes and dtype, all on one device, any strides. CUDA tensors launch on
        torch's current stream; CPU tensors run in the simulator.
    spec : BlockSpec
        The validated call.
    seed : int or Tensor, optional
        The mask's seed; None draws one from torch's generator.
    out : Tensor, optional
        Contiguous, of ``spec.output_shape``; allocated if not given. Every element is written.
    threads_per_block : int
        A multiple of 32, from 32 to 1024. Rung ``torch`` uses it for the mask only.
    simulator : Simulator, optional
        Runs CPU tensors, and afterwards holds what it counted.

    Returns
    -------
    Tensor
        `out`.

    Raises
    ------
    ValueError
        Unknown rung, a shape it cannot run, or a bad `threads_per_block`.
    """
    rung = get(name)
    check_threads_per_block(threads_per_block)
    reason = rung.limit(spec)
    if reason is not None:
        raise ValueError(f"variant {name!r} cannot run this shape: {reason}")
    if out is None:
        out = torch.empty(spec.output_shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with torch.no_grad():
        operands = Operands(
            spec=spec,
            x=x.detach().contiguous().view(-1),
            weight=weight.detach().contiguous().view(-1),
            bias=_vector(bias, 0.0, x, spec),
            gamma=_vector(gamma, 1.0, x, spec),
            beta=_vector(beta, 0.0, x, spec),
            # Nothing is drawn from torch's generator unless the mask is.
            seed=seed_tensor(seed if spec.draws else 0, x.device),
            out=out.view(-1),
            threads_per_block=threads_per_block,
        )
        rung.forward(_launcher(x.device, simulator), operands)
    return out


def _vector(values: Tensor | None, default: float, x: Tensor, spec: BlockSpec) -> Tensor:
    """A per-channel operand; an absent one becomes its neutral element."""
    if values is None:
        return torch.full((spec.out_channels,), default, dtype=x.dtype, device=x.device)
    return values.detach().contiguous()


def _launcher(device: torch.device, simulator: Simulator | None) -> Launcher:
    if device.type == "cuda":
        return gpu_launcher(device)
    if simulator is None:
        from numba_fused.simulator import Simulator

        simulator = Simulator()
    return simulator.launch
