"""What the variants of the backward pass are handed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from numba_fused.backward.clear_kernels import THREADS
from numba_fused.device.reductions import WARP
from numba_fused.ladder.rung import LaunchArguments, once
from numba_fused.spec import BlockSpec

Wanted = tuple[bool, bool, bool, bool, bool]  # dx, dweight, dbias, dgamma, dbeta


@dataclass(eq=False)
class Operands:
    """The tensors of one call, shaped for the kernels.

    Attributes
    ----------
    spec : BlockSpec
    x, weight : Tensor
        Flat and contiguous.
    bias, gamma, beta : Tensor
        (K,); zeros, ones, zeros where the caller has none.
    grad_out : Tensor
        Flat and contiguous.
    seed : Tensor
        (1,) int64; read only when the spec draws.
    """

    spec: BlockSpec
    x: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    grad_out: Tensor
    seed: Tensor

    @property
    def arguments(self) -> LaunchArguments:
        """What depends on the spec alone."""
        return once(LaunchArguments, self.spec)

    @property
    def channel_blocks(self) -> int:
        """(Sample, channel) pairs: N * K."""
        return self.spec.batch * self.spec.out_channels

    @property
    def channel_threads(self) -> int:
        """For blocks that work on the positions of one channel."""
        return threads_for(self.arguments.sample_size // self.spec.out_channels)


def threads_for(values: int) -> int:
    """Whole warps that cover `values`, up to THREADS."""
    return min(THREADS, -(-values // WARP) * WARP)
