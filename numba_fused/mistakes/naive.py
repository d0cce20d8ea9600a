"""Tests one might write for such a kernel, each blind to some mistake.

They run on one small problem, and without the simulator's race detector: as a test on a GPU would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from numba_fused import backward, ladder, rng
from numba_fused.reference import chain
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

TOLERANCE = 1e-2  # KernelBench's, relative and absolute
SEED = 2  # of operands and mask
X_SHAPE, WEIGHT_SHAPE = (2, 2, 3, 18), (4, 2, 2, 3)
ARGUMENTS: dict[str, Any] = {
    "num_groups": 2,
    "min_value": -1.0,
    "max_value": 1.0,
    "cap": 0.5,
    "dropout_p": 0.2,
    "training": True,
}

Compare: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], bool]


def close(found: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Within the tolerance everywhere."""
    return all(
        torch.allclose(f, r, rtol=TOLERANCE, atol=TOLERANCE)
        for f, r in zip(found, right, strict=True)
    )


def dropout_rate(found: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """About as many zeros as there should be, and right values where neither has one."""
    (out,), (expected,) = found, right
    kept = (out != 0) & (expected != 0)
    zeros = [float((t == 0).double().mean()) for t in (out, expected)]
    return abs(zeros[0] - zeros[1]) < 0.1 and close([out[kept]], [expected[kept]])


def only_of_the_convolution(found: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """The gradients of x, weight and bias."""
    return close(found[:3], right[:3])


def loss_falls(found: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """A small step against the gradients descends."""
    return sum(float((f * r).sum()) for f, r in zip(found, right, strict=True)) > 0


@dataclass(frozen=True)
class NaiveTest:
    """A test that looks at too little.

    Attributes
    ----------
    story : str
        What it looks at, to complete "passes ...".
    changes : dict
        To the problem's arguments; besides those of a spec, ``affine``.
    compare : callable
        Whether what was found, the output or the five gradients, will do for what is right.
    threads_per_block : int
    """

    story: str
    changes: dict[str, Any] = field(default_factory=dict)
    compare: Compare = close
    threads_per_block: int = 64

    def accepts(self, runs: str) -> bool:
        """Run the kernels of a rung, or the backward ones, as they are now, and compare."""
        spec, operands = self._problem()
        mask = torch.from_numpy(rng.keep_mask(SEED, spec.output_shape, spec.dropout_p))
        launches = Simulator(check_races=False)
        if runs == "backward":
            leaves = [t.requires_grad_() for t in operands]
            out = chain(spec, *leaves, keep_mask=mask)
            grad_out = _random(spec.output_shape, 5)
            right = torch.autograd.grad(out, leaves, grad_out)
            found = backward.run(
                *operands,
                grad_out,
                spec=spec,
                seed=SEED,
                wanted=(True, True, True, True, True),
                simulator=launches,
            )
            return self.compare([g for g in found if g is not None], right)
        out = torch.zeros(spec.output_shape)
        ladder.run(
            runs,
            *operands,
            spec=spec,
            seed=SEED,
            out=out,
            threads_per_block=self.threads_per_block,
            simulator=launches,
        )
        return self.compare([out], [chain(spec, *operands, keep_mask=mask)])

    def _problem(self) -> tuple[BlockSpec, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        changes = dict(self.changes)
        affine = changes.pop("affine", True)
        channels = WEIGHT_SHAPE[0]
        spec = BlockSpec.from_arguments(X_SHAPE, WEIGHT_SHAPE, **ARGUMENTS | changes)
        gamma, beta = torch.ones(channels), torch.zeros(channels)
        if affine:
            gamma, beta = gamma + 0.5 * _random((channels,), 3), 0.5 * _random((channels,), 4)
        weight = _random(WEIGHT_SHAPE, 1) / 3
        return spec, (_random(X_SHAPE, 0), weight, _random((channels,), 2), gamma, beta)


def _random(shape: Sequence[int], which: int) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(8 * SEED + which))
