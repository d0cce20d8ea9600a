"""The clear backward pass: any shape, fp32 and fp64, every step a small kernel of its own.

Forward keeps next to nothing, so backward computes the convolution z again, wherever it needs it,
and draws the dropout mask again. With xhat = (z - mean) * rstd and h = xhat * gamma + beta:

    g       = grad_out * mask where min_value < h < max_value and h < cap, 0 elsewhere
    dbeta   = sum of g               over samples and positions
    dgamma  = sum of g * xhat
    dz      = rstd * (g * gamma - mean(g * gamma) - xhat * mean(g * gamma * xhat))
              the means over the (sample, group)
    dbias   = sum of dz
    dweight = for each tap, the sum of dz times the x under that tap
    dx      = for each element, the sum of dz times the weight that lay on it

Launch: group_statistics     a block for each (sample, group), if mean and rstd are not given
        channel_sums         a block for each (sample, channel): sums of g and g * xhat
        sum_over_samples     a warp for each channel: dgamma, dbeta, dbias, one launch for each
        group_means          a thread for each (sample, group)
        convolution_gradient a block for each (sample, channel): writes dz and its sum
        weight_gradient      a block for each weight
        input_gradient       a thread for each element of x
        Kernels whose results nobody wants are not launched.
Shapes: x, dx flat, (N * C * D * H * W,); grad_out, dz flat, (N * K * D * H * W,); mean, rstd and
        the group's two means (N * G,); the sums (N * K,); dweight flat as weight.
Bytes:  with E the bytes of grad_out. The statistics read x; the sums x + E; dz takes x + E again
        and E written; dweight reads x + E; dx reads E and writes x. In all 4 x + 4 E read, and
        x + E written. The E written is dz: scratch as large as the output, N * K * D * H * W
        values, the one tensor here that forward did not need.
Next:   z is computed three times and the mask drawn twice, one value at a time on the CUDA cores.
        `tensor_core` takes all products to the tensor cores and dz to memory in halves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from numba_fused.backward.clear_kernels import (
    channel_sums_kernel,
    convolution_gradient_kernel,
    group_means_kernel,
    group_statistics_kernel,
    input_gradient_kernel,
    sum_over_samples_kernel,
    weight_gradient_kernel,
)
from numba_fused.backward.operands import Operands, Wanted, threads_for
from numba_fused.device.reductions import WARP
from numba_fused.ladder.rung import (
    Ledger,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

limit = sample_limit
least_capability = (0, 0)


def gradients(
    launch: Launcher,
    operands: Operands,
    statistics: tuple[Tensor, Tensor] | None,
    wanted: Wanted,
) -> list[Tensor | None]:
    """dx, dweight (both flat), dbias, dgamma, dbeta; None for those not wanted.

    Parameters
    ----------
    launch : Launcher
    operands : Operands
    statistics : (Tensor, Tensor), optional
        mean and rstd, (N * G,) each; None if forward did not keep them.
    wanted : tuple of bool
        In the order of the result.
    """
    found: list[Tensor | None] = [None] * 5
    if not any(wanted):
        return found
    if statistics is None:
        statistics = group_statistics(launch, operands)
    sum_g, sum_gx = channel_sums(launch, operands, statistics)
    if wanted[3]:
        found[3] = sum_over_samples(launch, operands, sum_gx)
    if wanted[4]:
        found[4] = sum_over_samples(launch, operands, sum_g)
    if not any(wanted[:3]):
        return found
    means = group_means(launch, operands, sum_g, sum_gx)
    dz, sum_dz = convolution_gradient(launch, operands, statistics, means)
    if wanted[0]:
        found[0] = input_gradient(launch, operands, dz)
    if wanted[1]:
        found[1] = weight_gradient(launch, operands, dz)
    if wanted[2]:
        found[2] = sum_over_samples(launch, operands, sum_dz)
    return found


# ---- one function for each kernel ---------------------------------------------------------------


def sum_over_samples(launch: Launcher, operands: Operands, sums: Tensor) -> Tensor:
    """A parameter's gradient: (N * K,) sums to (K,)."""
    channels = operands.spec.out_channels
    total = sums.new_empty(channels)
    launch(sum_over_samples_kernel, channels, WARP, sums, operands.spec.batch, total)
    return total


def group_statistics(launch: Launcher, operands: Operands) -> tuple[Tensor, Tensor]:
    """Mean and rstd of each (sample, group)."""
    arguments = operands.arguments
    mean, rstd = (operands.x.new_empty(arguments.group_count) for _ in range(2))
    launch(
        group_statistics_kernel,
        arguments.group_count,
        threads_for(operands.spec.group_size),
        operands.x,
        operands.weight,
        operands.bias,
        mean,
        rstd,
        *arguments.groups,
        arguments.eps,
        arguments.geometry,
    )
    return mean, rstd


def channel_sums(
    launch: Launcher, operands: Operands, statistics: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Sums of g and of g * xhat over the positions of each (sample, channel)."""
    sum_g, sum_gx = (operands.x.new_empty(operands.channel_blocks) for _ in range(2))
    _launch_chain(launch, channel_sums_kernel, operands, statistics, sum_g, sum_gx)
    return sum_g, sum_gx


def group_means(
    launch: Launcher, operands: Operands, sum_g: Tensor, sum_gx: Tensor
) -> tuple[Tensor, Tensor]:
    """Means of g * gamma and of g * gamma * xhat over each (sample, group)."""
    arguments, threads = operands.arguments, threads_for(operands.arguments.group_count)
    mean_g, mean_gx = (sum_g.new_empty(arguments.group_count) for _ in range(2))
    launch(
        group_means_kernel,
        -(-arguments.group_count // threads),
        threads,
        sum_g,
        sum_gx,
        operands.gamma,
        mean_g,
        mean_gx,
        arguments.real(operands.spec.group_size),
        arguments.groups[1],
    )
    return mean_g, mean_gx


def convolution_gradient(
    launch: Launcher,
    operands: Operands,
    statistics: tuple[Tensor, Tensor],
    means: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """dz, and its sums over the positions of each (sample, channel)."""
    dz = torch.empty_like(operands.grad_out)
    sum_dz = dz.new_empty(operands.channel_blocks)
    _launch_chain(launch, convolution_gradient_kernel, operands, statistics, *means, dz, sum_dz)
    return dz, sum_dz


def _launch_chain(
    launch: Launcher,
    kernel: Any,
    operands: Operands,
    statistics: tuple[Tensor, Tensor],
    *own: Tensor,
) -> None:
    """One of the two kernels that go back through the chain; `own` is what they do not share."""
    arguments = operands.arguments
    launch(
        kernel,
        operands.channel_blocks,
        operands.channel_threads,
        operands.x,
        operands.weight,
        operands.bias,
        operands.gamma,
        operands.beta,
        operands.grad_out,
        *statistics,
        *own,
        arguments.groups[1],
        arguments.geometry,
        arguments.bounds,
        operands.seed,
        arguments.dropout,
    )


def weight_gradient(launch: Launcher, operands: Operands, dz: Tensor) -> Tensor:
    """Gradient of the weight, flat."""
    grad_weight = torch.empty_like(operands.weight)
    launch(
        weight_gradient_kernel,
        grad_weight.numel(),
        operands.channel_threads,
        operands.x,
        dz,
        grad_weight,
        operands.arguments.geometry,
    )
    return grad_weight


def input_gradient(launch: Launcher, operands: Operands, dz: Tensor) -> Tensor:
    """Gradient of x, flat."""
    grad_x = torch.empty_like(operands.x)
    batch = operands.spec.batch
    sample_size = grad_x.numel() // batch
    threads = threads_for(sample_size)
    blocks_per_sample = -(-sample_size // threads)
    launch(
        input_gradient_kernel,
        batch * blocks_per_sample,
        threads,
        dz,
        operands.weight,
        grad_x,
        np.int32(blocks_per_sample),
        operands.arguments.geometry,
    )
    return grad_x


# ---- the ledger ---------------------------------------------------------------------------------


def ledger(spec: BlockSpec, wanted: Wanted, *, has_statistics: bool) -> Ledger:
    """See the lesson; besides, the parameters, statistics and sums that each kernel touches."""
    if not any(wanted):
        return Ledger(0, 0, 0)
    tensor, vector = spec.output_bytes, vector_bytes(spec)
    weight = math.prod(spec.weight_shape) * spec.itemsize
    pairs = 2 * spec.batch * spec.num_groups * spec.itemsize  # two numbers for each group
    sums = spec.batch * vector  # a number for each (sample, channel)
    recomputed = convolution_bytes(spec) + 2 * vector + tensor + pairs + seed_bytes(spec)
    kernels = [(recomputed, 2 * sums)]  # bytes read and written
    if not has_statistics:
        kernels.append((convolution_bytes(spec), pairs))
    if any(wanted[:3]):
        kernels.append((2 * sums + vector, pairs))
        kernels.append((recomputed + pairs, tensor + sums))
    if wanted[0]:
        kernels.append((tensor + weight, spec.x_bytes))
    if wanted[1]:
        kernels.append((spec.x_bytes + tensor, weight))
    kernels += [(sums, vector)] * sum(wanted[2:])
    read, written = map(sum, zip(*kernels, strict=True))
    return Ledger(read, written, len(kernels))
