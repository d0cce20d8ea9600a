"""Eager PyTorch: the vendor's answer, one library kernel (or more) for each operator.

The convolution is cuDNN's, the rest are PyTorch's own kernels. Each reads the whole tensor
from memory and writes it back, and dropout also writes a mask. This is what the other rungs
are measured against.

Bytes: the convolution reads x and writes z; the normalisation reads z twice (statistics, then
apply) and writes h; min, clamp and dropout read and write one tensor each, dropout a mask of
one byte per element besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numba_fused import rng
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    gpu_launcher,
    seed_bytes,
    vector_bytes,
)
from numba_fused.reference import chain, convolution_precision
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher


def dropout_mask(spec: BlockSpec, seed: Tensor | None) -> Tensor | None:
    """The kernels' own mask as a bool tensor beside `seed`; None when nothing is drawn."""
    if seed is None or not spec.draws:
        return None
    return draw_mask(seed, spec.output_shape, spec.dropout_p)


def draw_mask(seed: Tensor, output_shape: Sequence[int], dropout_p: float) -> Tensor:
    """The mask of a drawing spec."""
    if seed.device.type == "cpu":
        return torch.from_numpy(rng.keep_mask(int(seed), output_shape, dropout_p))
    keep = torch.empty(output_shape, dtype=torch.bool, device=seed.device)
    if not keep.numel():
        return keep  # a launch needs a block
    threads = 256
    gpu_launcher(seed.device)(
        rng.keep_mask_kernel,
        -(-keep.numel() // threads),
        threads,
        keep.view(-1).view(torch.uint8),
        seed,
        output_shape[-1],
        round(dropout_p * 2**32),
    )
    return keep


def forward(launch: Launcher, operands: Operands) -> None:
    """Run PyTorch's operators, with the kernels' own mask so that the answers can be compared."""
    spec = operands.spec
    with convolution_precision(spec):
        y = chain(
            spec,
            operands.x.view(spec.x_shape),
            operands.weight.view(spec.weight_shape),
            operands.bias,
            operands.gamma,
            operands.beta,
            dropout_mask(spec, operands.seed),
        )
    operands.out.copy_(y.flatten())


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """As the lesson says; `threads_per_block` is the library's own affair."""
    tensor = spec.output_bytes
    mask = tensor // spec.itemsize if spec.draws else 0
    passes = 4 + spec.draws
    return Ledger(
        bytes_read=convolution_bytes(spec)
        + 2 * vector_bytes(spec)
        + passes * tensor
        + seed_bytes(spec),
        bytes_written=passes * tensor + mask,
        launches=5 + spec.draws,
        library_launches=5 + spec.draws,
    )
