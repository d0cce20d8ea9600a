"""The operator from its definition, in NumPy's extended precision: who judges the judges.

It shares no code with the package, and on x86 its 64-bit mantissa makes even fp64 results look
inexact. Also here: the random operands and the measure of error that several test files use.
"""

from __future__ import annotations

import itertools
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from numba_fused.spec import BlockSpec

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
BOUNDS: dict[str, Any] = {
    "min_value": -1.0,
    "max_value": 1.0,
    "cap": 0.5,
}  # not degenerate, and all three act


class Operands(NamedTuple):
    """x, weight, bias, gamma, beta: the tensors of a call, in the function's order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Operands:
        vectors = (None if t is None else t.to(dtype) for t in self[2:])
        return Operands(self.x.to(dtype), self.weight.to(dtype), *vectors)


def random_operands(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    affine: bool = True,
    offset: float = 0.0,
) -> Operands:
    """Normal operands that depend on the shapes alone; every gamma and beta is distinct."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((x_shape, weight_shape)).encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    channels = weight_shape[0]
    return Operands(
        normal(*x_shape) + offset,
        normal(*weight_shape),
        normal(channels) if bias else None,
        1 + 0.5 * normal(channels) if affine else None,
        0.5 * normal(channels) if affine else None,
    )


def spec_for(operands: Operands, **arguments: Any) -> BlockSpec:
    """The validated call of these operands, with the bounds above unless others are given."""
    return BlockSpec.from_arguments(
        operands.x.shape,
        operands.weight.shape,
        has_bias=operands.bias is not None,
        affine=operands.gamma is not None,
        dtype=str(operands.x.dtype).removeprefix("torch."),
        **(BOUNDS | arguments),
    )


def convolution(spec: BlockSpec, operands: Operands) -> np.ndarray:
    """z[n, k, o] = bias[k] + sum over c, t of x[n, c, o * stride + t * dilation] w[k, c, t]."""
    x, weight = (t.detach().numpy().astype(np.longdouble) for t in operands[:2])
    x = np.pad(x, [(0, 0), (0, 0), *spec.padding])
    z = np.zeros(spec.output_shape, dtype=np.longdouble)
    outputs, inputs = (count // spec.groups for count in (spec.out_channels, spec.in_channels))
    for k, c in itertools.product(range(spec.out_channels), range(inputs)):
        for tap in itertools.product(*map(range, spec.kernel_size)):
            window = tuple(
                slice(t * d, t * d + (o - 1) * s + 1, s)
                for t, d, o, s in zip(
                    tap, spec.dilation, spec.output_size, spec.stride, strict=True
                )
            )
            z[:, k] += x[:, k // outputs * inputs + c][:, *window] * weight[k, c, *tap]
    return z + (0 if operands.bias is None else per_channel(operands.bias, z.ndim))


def definition(spec: BlockSpec, operands: Operands, keep: np.ndarray | None = None) -> np.ndarray:
    """The whole chain; `keep` is the dropout mask, used where the spec draws."""
    z = convolution(spec, operands)
    grouped = z.reshape(spec.batch, spec.num_groups, spec.group_size)
    mean, variance = (f(grouped, axis=2, keepdims=True) for f in (np.mean, np.var))
    h = ((grouped - mean) / np.sqrt(variance + np.longdouble(spec.eps))).reshape(z.shape)
    if operands.gamma is not None:
        h = h * per_channel(operands.gamma, z.ndim)
    if operands.beta is not None:
        h = h + per_channel(operands.beta, z.ndim)
    c = np.minimum(np.maximum(np.minimum(h, spec.cap), spec.min_value), spec.max_value)
    if keep is None or not spec.draws:
        return c
    return c * (np.where(keep, 1 / (1 - np.longdouble(spec.dropout_p)), 0) if keep.any() else 0)


def per_channel(vector: Tensor, ndim: int) -> np.ndarray:
    return vector.detach().numpy().astype(np.longdouble).reshape(-1, *(1,) * (ndim - 2))


def relative_error(actual: Tensor, exact: np.ndarray) -> float:
    """||actual - exact|| / ||exact||; NaN where `actual` holds one, so that it passes no bound."""
    difference = actual.detach().numpy().astype(np.longdouble) - exact
    return float(np.sqrt((difference**2).sum()) / np.sqrt((exact**2).sum()))
