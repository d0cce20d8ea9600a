"""Rungs on tiles and the algebra rung: what is special to them.

That they compute the operator is for test_ladder to say; the kernels run in the simulator here,
too. A tiling is chosen by shape and block size, so the cases aim at the seams: patches that reach
beyond the output, several tiles in a slot, idle warps, chunks of input channels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from definition import UNIT_ROUNDOFF, definition, random_operands, relative_error, spec_for

import numba_fused as nf
from numba_fused.device import tiles
from numba_fused.ladder import rung_5_tiled, rung_6_recompute, rung_11_algebra
from numba_fused.ladder.rung import Operands
from numba_fused.reference import seed_tensor
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

SEED = 7
RUNGS = pytest.mark.parametrize(
    "rung", [rung_5_tiled, rung_6_recompute], ids=["tiled", "recompute"]
)
BENCHMARK = ((128, 3, 16, 64, 64), (16, 3, 3, 3, 3))


def spec_of(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], **arguments: Any) -> BlockSpec:
    """Shapes only, for what needs no tensors."""
    bounds = {"num_groups": 1, "min_value": -1.0, "max_value": 1.0, "cap": 0.5}
    return BlockSpec.from_arguments(x_shape, weight_shape, **(bounds | arguments))


def run(rung: Any, spec: BlockSpec, operands: Any, threads: int, **options: Any) -> torch.Tensor:
    """The rung's output, written over NaN."""
    out = torch.full(spec.output_shape, torch.nan, dtype=operands.x.dtype)
    simulator = options.pop("simulator", None) or Simulator(**options)
    rung.forward(
        simulator.launch,
        Operands(
            spec=spec,
            x=operands.x.view(-1),
            weight=operands.weight.reshape(-1),
            bias=operands.bias,
            gamma=operands.gamma,
            beta=operands.beta,
            seed=seed_tensor(SEED, operands.x.device),
            statistics=torch.empty(0),
            out=out.view(-1),
            threads_per_block=threads,
        ),
    )
    return out


def assert_accurate(out: torch.Tensor, spec: BlockSpec, operands: Any) -> None:
    keep = nf.keep_mask(SEED, spec.output_shape, spec.dropout_p) if spec.draws else None
    exact = definition(spec, operands, keep)
    assert relative_error(out, exact) <= 8 * UNIT_ROUNDOFF[out.dtype]


# ---- the tiling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", range(32, 1025, 32))
@pytest.mark.parametrize(
    "spec",
    [
        spec_of(*BENCHMARK),
        spec_of((8, 32, 32, 64, 64), (32, 1, 3, 3, 3), groups=32, padding=1),
        spec_of((2, 2, 4, 5, 1), (4, 2, 3, 3, 1), dtype="float64"),
        spec_of((1, 4, 5000), (6, 4, 9), stride=3, dilation=5),
    ],
    ids=["benchmark", "depthwise", "width 1", "1-D"],
)
def test_every_block_size_has_a_tiling_that_fits(spec: BlockSpec, threads: int) -> None:
    tiling = tiles.choose_tiling(spec, threads)
    assert tiling is not None
    k, d, h, w = tiling.layout
    assert k * d * h * w <= threads
    assert d * h * w % 32 == 0  # a warp's lanes read the same taps
    staged = tiling.chunk * (tiling.staged + tiling.taps) * spec.itemsize
    moments = math.prod(tiling.moments_shape) * spec.itemsize
    assert staged <= tiles.SHARED_BYTES
    assert staged + moments <= 48 * 1024


def test_the_benchmark_is_blocked_in_registers_as_far_as_they_reach() -> None:
    for threads, values in {128: 64, 256: 64, 512: 64, 1024: 16}.items():
        tiling = tiles.choose_tiling(spec_of(*BENCHMARK), threads)
        assert tiling is not None
        assert tiling.values == values


def test_partial_results_stay_few_however_large_the_sample() -> None:
    """Each block of the apply pass reads those of its groups: they must not grow with it."""
    spec = spec_of((1, 1, 64, 512, 512), (2, 1, 3, 3, 3))
    tiling = rung_5_tiled.tiling_of(spec, 256)
    cover = tiles.cover_of(spec, tiling)
    assert cover.tiles > 10 * tiles.MAX_PARTIALS
    assert cover.slots <= tiles.MAX_PARTIALS
    assert cover.slots * -(-cover.tiles // cover.slots) - cover.tiles < cover.slots


@RUNGS
def test_a_footprint_beyond_shared_memory_is_refused_with_its_size(rung: Any) -> None:
    assert rung.limit(spec_of((1, 1, 12_000), (1, 1, 8_000))) is not None
    assert "shared memory holds 45,056" in rung.limit(spec_of((1, 1, 12_000), (1, 1, 8_000)))
    assert rung.limit(spec_of((1, 1, 12_000), (1, 1, 2_000))) is None


# ---- the seams ----------------------------------------------------------------------------------

SEAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]] = {
    "patches beyond the output": ((1, 2, 3, 13, 19), (5, 2, 2, 3, 2), {"num_groups": 5}, 64),
    "several tiles along every axis": ((1, 1, 5, 19, 20), (3, 1, 2, 2, 2), {"num_groups": 1}, 32),
    "idle warps": ((1, 3, 4, 5), (2, 3, 2, 2), {"num_groups": 1}, 256),
    "kernel height 11": ((1, 1, 13, 5), (2, 1, 11, 2), {"num_groups": 1}, 32),
    "kernel height 8": ((1, 1, 11, 5), (2, 1, 8, 2), {"num_groups": 1}, 32),
    "columns": ((2, 3, 150), (4, 3, 3), {"num_groups": 2, "stride": 2, "padding": 1}, 32),
    "stride and dilation along h": (
        (1, 2, 21, 9),
        (4, 2, 3, 3),
        {"num_groups": 2, "stride": (2, 1), "dilation": (2, 1), "padding": (2, 1)},
        64,
    ),
}


@pytest.mark.parametrize("seam", SEAMS)
@RUNGS
def test_seams(rung: Any, seam: str) -> None:
    x_shape, weight_shape, arguments, threads = SEAMS[seam]
    operands = random_operands(x_shape, weight_shape)
    spec = spec_for(operands, dropout_p=0.25, training=True, **arguments)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


@RUNGS
def test_tiles_that_share_a_slot_are_all_counted(
    rung: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots for the tiles of a sample, and still the same result and ledger."""
    monkeypatch.setattr(tiles, "MAX_PARTIALS", 3)
    operands = random_operands((2, 1, 5, 19, 20), (3, 1, 2, 2, 2))
    spec = spec_for(operands, num_groups=1, dropout_p=0.25, training=True)
    cover = tiles.cover_of(spec, rung_5_tiled.tiling_of(spec, 32))
    assert cover.slots <= 3 < cover.tiles
    simulator = Simulator(count=True, check_races=True, schedule_seed=1)
    assert_accurate(run(rung, spec, operands, 32, simulator=simulator), spec, operands)
    assert simulator.bytes_read == rung.ledger(spec, 32).bytes_read
    assert simulator.bytes_written == rung.ledger(spec, 32).bytes_written


@RUNGS
def test_input_channels_come_in_chunks(rung: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven channels, at most three at a time: the last chunk is not full."""
    operands = random_operands((1, 7, 3, 4, 6), (4, 7, 2, 2, 2))
    spec = spec_for(operands, num_groups=2)
    tiles.choose_tiling.cache_clear()
    monkeypatch.setattr(tiles, "CHUNK_BYTES", 2200)
    tiling = rung_5_tiled.tiling_of(spec, 64)
    try:
        assert 1 < tiling.chunk < 7
        assert 7 % tiling.chunk
        assert_accurate(run(rung, spec, operands, 64), spec, operands)
    finally:
        tiles.choose_tiling.cache_clear()


@RUNGS
def test_wide_convolutions_are_summed_in_short_chains(rung: Any) -> None:
    """2304 products an output: added one by one they err by 15 roundings, in chains by 6."""
    operands = random_operands((1, 256, 6, 9), (4, 256, 3, 3))
    spec = spec_for(operands, num_groups=1)
    exact = definition(spec, operands)
    out = run(rung, spec, operands, 32, check_races=False)
    assert relative_error(out, exact) <= 8 * UNIT_ROUNDOFF[out.dtype]


def test_both_rungs_agree_to_the_last_bit() -> None:
    """The same convolution and moments: keeping z in memory or not changes no rounding."""
    operands = random_operands((1, 2, 3, 13, 19), (5, 2, 2, 3, 2))
    spec = spec_for(operands, num_groups=5, dropout_p=0.25, training=True)
    tiled, recomputed = (run(rung, spec, operands, 64) for rung in (rung_5_tiled, rung_6_recompute))
    assert torch.equal(tiled, recomputed)


# ---- algebra ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("training", [False, True])
def test_the_algebra_rung_writes_the_constant_and_the_mask(width: int, training: bool) -> None:
    operands = random_operands((2, 1, 3, width), (2, 1, 1, 1))
    spec = spec_for(
        operands, num_groups=1, min_value=0.25, cap=0.25, dropout_p=0.5, training=training
    )
    out = run(rung_11_algebra, spec, operands, 64)
    kept = nf.keep_mask(SEED, spec.output_shape, 0.5)
    expected = np.where(kept, 0.5, 0.0) if training else np.full(spec.output_shape, 0.25)
    assert np.array_equal(out.numpy(), expected)


def test_the_algebra_rung_moves_what_its_ledger_says() -> None:
    operands = random_operands((2, 1, 3, 40), (2, 1, 1, 1))
    spec = spec_for(operands, num_groups=1, min_value=0.25, cap=0.25, dropout_p=0.5, training=True)
    simulator = Simulator(count=True)
    run(rung_11_algebra, spec, operands, 64, simulator=simulator)
    ledger = rung_11_algebra.ledger(spec, 64)
    assert simulator.bytes_read == ledger.bytes_read
    assert simulator.bytes_written == ledger.bytes_written == spec.output_bytes


def test_the_algebra_rung_refuses_a_chain_that_depends_on_its_input() -> None:
    spec = spec_of((1, 1, 300), (1, 1, 1))
    assert "constant of a degenerate chain" in str(rung_11_algebra.limit(spec))
    assert rung_11_algebra.limit(dataclasses.replace(spec, cap=-1.0)) is None
    assert rung_11_algebra.limit(dataclasses.replace(spec, max_value=-2.0)) is None
