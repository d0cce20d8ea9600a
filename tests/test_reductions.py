"""Group statistics stay accurate over long groups and however a group is cut up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from definition import definition, random_operands, relative_error, spec_for
from numba import cuda

import numba_fused as nf
from numba_fused import ladder
from numba_fused.device import reductions
from numba_fused.ladder import rung_10_library_conv
from numba_fused.ladder.rung import convolution_bytes, vector_bytes
from numba_fused.simulator import Simulator

VALUES_PER_THREAD = 2000  # one unbroken Welford chain of these is off by 3e-7 to 6e-7
ONE_ROUNDING = 2.0**-23


@cuda.jit
def moments_kernel(values, out):
    """Moments of all values, by one block: out = (count, mean, m2)."""
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, values.dtype)
    moments = reductions.strided_moments(values, 0, values.size)
    count, mean, m2 = reductions.block_moments(moments[0], moments[1], moments[2], scratch)
    if cuda.threadIdx.x == 0:
        out[0], out[1], out[2] = count, mean, m2


# ---- long chains --------------------------------------------------------------------------------


def long_group() -> np.ndarray:
    """Log-normal: rare large values, after which many small ones are added to a large sum."""
    generator = np.random.default_rng(0)
    return generator.lognormal(sigma=2, size=32 * VALUES_PER_THREAD).astype(np.float32)


def test_long_chains_do_not_drift() -> None:
    values, out = long_group(), np.full(3, np.nan, np.float32)
    Simulator(check_races=False).launch(moments_kernel, 1, 32, values, out)
    exact = values.astype(np.float64)
    assert out[0] == values.size
    assert abs(out[1] - exact.mean()) < ONE_ROUNDING
    assert abs(out[2] / (values.size * exact.var()) - 1) < ONE_ROUNDING


@pytest.mark.slow
def test_the_one_kernel_rung_breaks_its_chains_too() -> None:
    """Its loop convolves as it sums, so it cannot call `strided_moments`."""
    x = torch.from_numpy(long_group()).view(1, 1, -1)
    weight = torch.ones(1, 1, 1)
    bounds = {"num_groups": 1, "min_value": -1.0, "max_value": 1.0, "cap": 0.5}
    spec = nf.BlockSpec.from_arguments(x.shape, weight.shape, **bounds)
    simulator = Simulator(check_races=False)
    out = ladder.run(
        "one_kernel", x, weight, spec=spec, seed=0, threads_per_block=32, simulator=simulator
    )
    exact = nf.reference(x.double(), weight.double(), **bounds)
    assert torch.linalg.vector_norm(out - exact) < ONE_ROUNDING * torch.linalg.vector_norm(exact)


# ---- merging ------------------------------------------------------------------------------------


@cuda.jit
def partial_kernel(values, partial, tile):
    """Moments of each tile of `values`, a tile a block, in ``partial[:, block]``."""
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, values.dtype)
    first = cuda.blockIdx.x * tile
    size = min(tile, values.size - first)
    moments = reductions.strided_moments(values, first, size)
    count, mean, m2 = reductions.block_moments(moments[0], moments[1], moments[2], scratch)
    if cuda.threadIdx.x == 0:
        reductions.store_partial(partial, cuda.blockIdx.x, count, mean, m2)


@cuda.jit
def merge_kernel(partial, first, stop, out):
    """Moments of the tiles from `first` to `stop`, by one warp."""
    tile = first + cuda.threadIdx.x
    count, mean, m2 = reductions.merge_partials(partial, tile, stop, cuda.blockDim.x)
    count, mean, m2 = reductions.warp_moments(count, mean, m2)
    if cuda.threadIdx.x == 0:
        out[0], out[1], out[2] = count, mean, m2


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_moments_of_a_block_whose_threads_have_little_or_nothing(threads: int) -> None:
    values, out = np.array([1001, 999, 1003] * 15, np.float32), np.full(3, np.nan, np.float32)
    Simulator().launch(moments_kernel, 1, threads, values, out)
    assert out[0] == 45
    assert out[1] == pytest.approx(values.astype(float).mean(), rel=2 * ONE_ROUNDING)
    assert out[2] == pytest.approx(45 * values.astype(float).var(), rel=1e-5)


def test_values_near_the_largest_float_do_not_overflow() -> None:
    """The total of 512 such values would be infinite, the mean is not. Half the warps are empty."""
    values, out = np.full(512, 3e38, np.float32), np.full(3, np.nan, np.float32)
    Simulator().launch(moments_kernel, 1, 1024, values, out)
    assert out.tolist() == [512, np.float32(3e38), 0]


@pytest.mark.parametrize(("tile", "first", "stop"), [(40, 0, 25), (7, 3, 100), (300, 1, 2)])
def test_partial_moments_merge_into_those_of_the_whole(tile: int, first: int, stop: int) -> None:
    values = np.random.default_rng(0).normal(1000, 1, 1000).astype(np.float32)
    tiles = math.ceil(values.size / tile)
    partial, out = np.full((3, tiles), np.nan, np.float32), np.full(3, np.nan, np.float32)
    Simulator().launch(partial_kernel, tiles, 64, values, partial, tile)
    Simulator().launch(merge_kernel, 1, 32, partial, first, stop, out)
    exact = values[first * tile : stop * tile].astype(float)
    assert out[0] == exact.size
    assert abs(out[1] - exact.mean()) <= np.spacing(np.float32(1000))
    assert out[2] == pytest.approx(exact.size * exact.var(), rel=1e-4)


# ---- rung `library_conv`: planes cut into tiles --------------------------------------------------


@pytest.mark.parametrize(
    ("size", "partials", "offset"),
    [
        pytest.param((70, 70), 256, 0, id="two-tiles"),
        pytest.param((90, 140), 4, 0, id="moments-tile-of-three"),
        pytest.param((70, 70), 256, 1, id="output-not-aligned"),
        pytest.param((67, 91), 1, 0, id="odd-plane"),
        pytest.param((5000,), 256, 0, id="one-row"),
        pytest.param((4100, 1), 256, 0, id="width-1"),
    ],
)
def test_tiles_of_a_plane(
    size: tuple[int, ...], partials: int, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics, mask and bytes do not show where a plane was cut, nor how wide accesses are."""
    monkeypatch.setattr(rung_10_library_conv, "PARTIALS_PER_GROUP", partials)
    operands = random_operands((1, 1, *size), (3, 1, *(1,) * len(size)))
    spec = spec_for(operands, num_groups=1, dropout_p=0.25, training=True)
    assert rung_10_library_conv.Tiling(spec).tiles > 1
    buffer = torch.full((offset + math.prod(spec.output_shape),), torch.nan)
    out = buffer[offset:].view(spec.output_shape)
    simulator = Simulator(count=True)
    ladder.run("library_conv", *operands, spec=spec, seed=7, out=out, simulator=simulator)

    exact = definition(spec, operands, nf.keep_mask(7, spec.output_shape, spec.dropout_p))
    in_torch = ladder.run("torch", *operands, spec=spec, seed=7)
    assert relative_error(out, exact) <= 2 * relative_error(in_torch, exact)

    ledger = ladder.get("library_conv").ledger(spec)
    read_by_library = convolution_bytes(spec) - vector_bytes(spec)  # not the bias
    assert simulator.bytes_read == ledger.bytes_read - read_by_library
    assert simulator.bytes_written == ledger.bytes_written - spec.output_bytes


def test_wide_accesses_only_where_every_plane_begins_on_16_bytes() -> None:
    width, buffer = rung_10_library_conv.vector_width, torch.zeros(64)
    assert width(8, buffer, buffer) == width(12, buffer, buffer[4:]) == 4
    assert width(8, buffer, buffer[1:]) == width(8, buffer[2:], buffer) == 1
    assert width(10, buffer, buffer) == width(8, buffer.double(), buffer.double()) == 1


@pytest.mark.parametrize("bias", [1e6, -3e30])
def test_a_bias_common_to_a_group_costs_no_digits(bias: float) -> None:
    """It is never added to a value, where it would leave no more than a few bits of it."""
    operands = random_operands((1, 1, 300), (4, 1, 1), bias=False)
    spec = spec_for(operands, num_groups=2)
    expected = ladder.run("library_conv", *operands, spec=spec, seed=0)
    operands = operands._replace(bias=torch.full((4,), bias))
    assert torch.equal(ladder.run("library_conv", *operands, spec=spec, seed=0), expected)
