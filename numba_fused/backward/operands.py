"""What the variants of the backward pass are handed, and the sums over samples they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from numba_fused.backward.clear_kernels import THREADS, sum_over_samples_kernel
from numba_fused.device.reductions import WARP
from numba_fused.ladder.rung import LaunchArguments, once
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

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


def sum_over_samples(launch: Launcher, operands: Operands, sums: Tensor) -> Tensor:
    """A parameter's gradient: (N * K,) sums to (K,)."""
    channels = operands.spec.out_channels
    total = sums.new_empty(channels)
    launch(sum_over_samples_kernel, channels, WARP, sums, operands.spec.batch, total)
    return total
