"""The ladder: one rung per file, one idea per rung, from the naive chain to the fastest.

This registry is what the command line, the tests, the plots and the README read: a rung added
to `_MODULES` appears in all of them.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from numba_fused.ladder import (
    rung_0_torch,
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_5_tiled,
    rung_6_recompute,
    rung_7_tensor_core,
    rung_8_split,
    rung_9_pipelined,
    rung_10_library_conv,
    rung_11_algebra,
)
from numba_fused.ladder.replay import Repeated
from numba_fused.ladder.rung import Ledger, Operands, Rung, gpu_launcher
from numba_fused.reference import seed_tensor
from numba_fused.spec import BlockSpec, check_threads_per_block

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher
    from numba_fused.simulator import Simulator

__all__ = [
    "Ledger",
    "Operands",
    "Rung",
    "capability",
    "channel_vector",
    "get",
    "launcher_for",
    "names",
    "run",
    "rungs",
]

DEFAULT_THREADS_PER_BLOCK = 256

_MODULES = (
    rung_0_torch,
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_5_tiled,
    rung_6_recompute,
    rung_7_tensor_core,
    rung_8_split,
    rung_9_pipelined,
    rung_10_library_conv,
    rung_11_algebra,
)

_ANY_BLOCK_SIZE = (
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_5_tiled,
    rung_6_recompute,
    rung_11_algebra,
)


def _rung(module: ModuleType) -> Rung:
    """The rung of a module, whose file name carries number and name: ``rung_3_epilogue``."""
    _, number, name = module.__name__.rpartition(".")[2].split("_", maxsplit=2)
    return Rung(
        number=int(number),
        name=name,
        idea=(module.__doc__ or "").partition("\n")[0],
        module=module,
        takes_threads_per_block=module in _ANY_BLOCK_SIZE,
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


# What the simulator and a machine without a GPU are taken for: the GPU the rows were measured on.
H200_CAPABILITY = (9, 0)


@cache
def capability(device: torch.device | None = None) -> tuple[int, int]:
    """Compute capability of a GPU, the current one by default; an H200's where there is none.

    The simulator, which runs the CPU's tensors, is taken for one.
    """
    if not torch.cuda.is_available() or (device is not None and device.type == "cpu"):
        return H200_CAPABILITY
    return torch.cuda.get_device_capability(device)


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
    statistics: Tensor | None = None,
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
    statistics : Tensor, optional
        (2, N, num_groups) fp32, contiguous: takes mean and rstd of each (sample, group), from a
        rung with `Rung.keeps_statistics`; others leave it alone.
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
        Unknown rung, a shape or a GPU it cannot run on, or a bad `threads_per_block`.
    """
    key = name, id(spec), x.device, threads_per_block, statistics is not None
    bound = _bound.get(key)
    if bound is None:
        bound = bind(spec, key)
    if out is None:
        out = x.new_empty(bound.output_shape)  # faster than to name dtype and device
    if bound.empty:
        return out
    bias = channel_vector(bias, 0.0, weight)
    gamma = channel_vector(gamma, 1.0, weight)
    beta = channel_vector(beta, 0.0, weight)
    # Nothing is drawn from torch's generator unless the mask is.
    drawn = seed_tensor(seed, x.device) if bound.draws else _neutral(0, 1, torch.int64, x.device)
    launch = launcher_for(x.device, simulator)
    if statistics is None:
        statistics = _neutral(0.0, 0, torch.float32, x.device)
    bound.forward(launch, (x, weight, bias, gamma, beta, drawn, statistics, out))
    return out


class Bound:
    """A rung that can run a spec on a device, and what of a call depends on those alone."""

    def __init__(
        self, name: str, spec: BlockSpec, device: torch.device, threads_per_block: int
    ) -> None:
        rung = get(name)
        check_threads_per_block(threads_per_block)
        on_gpu = device.type == "cuda"
        reason = rung.obstacle(spec, capability(device)) if on_gpu else rung.limit(spec)
        if reason is not None:
            raise ValueError(f"variant {name!r} cannot run this shape: {reason}")
        self.spec = spec
        self.output_shape = spec.output_shape
        self.empty = spec.batch == 0
        self.draws = spec.draws
        self.forward = Repeated(rung, spec, threads_per_block)


# Name, the spec's id, device, threads_per_block, and whether statistics are kept. The id is faster
# than the spec's hash, and to it 0.0 and -0.0 are different bounds; the entry refers to the spec,
# so no other object can come to have its id.
Key: TypeAlias = tuple[str, int, torch.device, int, bool]
_bound: dict[Key, Bound] = {}
MOST_BOUND = 1024


def bind(spec: BlockSpec, key: Key) -> Bound:
    """Check that a rung can run, and remember it."""
    name, _, device, threads_per_block, _ = key
    bound = Bound(name, spec, device, threads_per_block)
    if len(_bound) >= MOST_BOUND:
        _bound.clear()
    _bound[key] = bound
    return bound


def channel_vector(values: Tensor | None, default: float, weight: Tensor) -> Tensor:
    """A per-channel operand; an absent one becomes its neutral element."""
    if values is None:
        return _neutral(default, weight.shape[0], weight.dtype, weight.device)
    return values.contiguous()


# Never written to, so that any call on any stream may read them.
_neutrals: dict[tuple[float, int, torch.dtype, torch.device], Tensor] = {}


def _neutral(value: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of equal values, made once: filling one takes a launch.

    What is allocated while a CUDA graph is captured belongs to the graph, and what is made while
    torch traces a program is no tensor: neither is kept.
    """
    key = value, size, dtype, device
    kept = _neutrals.get(key)
    if kept is not None:
        return kept
    made = torch.full((size,), value, dtype=dtype, device=device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or type(made) is not Tensor:
        return made
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams do not wait for this one
    return _neutrals.setdefault(key, made)


def launcher_for(device: torch.device, simulator: Simulator | None) -> Launcher:
    """Torch's current stream of a GPU, or the simulator for the CPU."""
    if device.type == "cuda":
        return gpu_launcher(device)
    if simulator is None:
        from numba_fused.simulator import Simulator

        simulator = Simulator()
    return simulator.launch
