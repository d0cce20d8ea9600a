"""Group statistics stay accurate over long groups: chains of roundings are kept short."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import cuda

import numba_fused as nf
from numba_fused import ladder
from numba_fused.device import reductions
from numba_fused.simulator import Simulator

VALUES_PER_THREAD = 16_000  # one unbroken Welford chain of these is off by 5e-7 to 1e-6
ONE_ROUNDING = 2.0**-23


@cuda.jit
def moments_kernel(values, out):
    """Moments of all values, by one block: out = (count, mean, m2)."""
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, values.dtype)
    moments = reductions.strided_moments(values, 0, values.size)
    count, mean, m2 = reductions.block_moments(moments[0], moments[1], moments[2], scratch)
    if cuda.threadIdx.x == 0:
        out[0], out[1], out[2] = count, mean, m2


def long_group() -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal(32 * VALUES_PER_THREAD).astype(np.float32)


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
