"""What the tensor-core rungs share on the host: the tile's shape and the packed weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from numba_fused.device.fragments import THREADS as PACK_THREADS
from numba_fused.device.fragments import pack_kernel
from numba_fused.device.launch import Launcher
from numba_fused.device.pointwise import clip_bounds
from numba_fused.device.tile_shape import (
    LONGEST_WINDOW,
    PROCESSOR_SHARED_BYTES,
    SYSTEM_SHARED_BYTES,
    WARP,
    TileShape,
    Triple,
)
from numba_fused.ladder.rung import Ledger, sample_limit, seed_bytes, vector_bytes
from numba_fused.spec import BlockSpec

LEAST_CAPABILITY = (8, 0)
MOST_WARPS = 8
MOST_PARKED = 2
# Planes of input for each 16 output channels up to which a few warps pack as fast as the others
# convolve (plots/data/README.md): tiles with more are not parked, all warps pack and convolve.
MOST_PACKED_APART = 16
LARGEST_SHARED_BYTES = 227 * 1024  # of a block
# Instructions of a warp per value, from the disassembly: what the choice of a tile weighs.
OUTPUT_COST, INPUT_COST, RUN_COST, CHUNK_COST = 22, 4, 600, 100
FEW_WARPS_COST = 8
MARKING_BLOCKS = 132


class TileKind(NamedTuple):
    """What distinguishes the tiles of one rung from those of another.

    Attributes
    ----------
    values_per_word : int
        2 halves or 1 TF32 value.
    split : bool
        Whether words come in two parts.
    one_pass : bool
        Whether convolutions wait for their statistics, and need not be repeated.
    """

    values_per_word: int
    split: bool
    one_pass: bool


def tile_limit(spec: BlockSpec, kind: TileKind) -> str | None:
    """Why tensor-core tiles cannot run `spec`, or None."""
    if spec.dtype != "float32":
        return f"tensor cores take fp32 here, and x is {spec.dtype}"
    if spec.groups > 1:
        return f"its tiles mix all input channels, and the convolution has groups={spec.groups}"
    if (reason := sample_limit(spec)) is not None:
        return reason
    candidates = _candidates(spec, kind)
    if not candidates:
        return f"its input tile needs more than {LARGEST_SHARED_BYTES // 1024} KB of shared memory"
    if candidates[0].window_slots > LONGEST_WINDOW:
        return (
            f"{candidates[0].window_slots} values of a row lie under two outputs (stride "
            f"{spec.stride3[2]}, kernel {spec.kernel_size[-1]}, dilation {spec.dilation3[2]}), and "
            f"registers hold {LONGEST_WINDOW}"
        )
    words = spec.batch * current_shape(spec, kind).sample_record_words
    if words >= 2**31:
        return f"its tiles' sums take {words:,} words, and kernels count up to {2**31 - 1:,}"
    return None


def current_shape(spec: BlockSpec, kind: TileKind) -> TileShape:
    """The cheapest tile for `spec` on the current GPU; on an H200 where there is none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return tile_shape(spec, kind, bulk_copies=has_bulk_copies(device))


@lru_cache(maxsize=1024)
def tile_shape(
    spec: BlockSpec, kind: TileKind, aligned: bool = True, bulk_copies: bool = True
) -> TileShape:
    """The cheapest tile for `spec`.

    Parameters
    ----------
    spec : BlockSpec
    kind : TileKind
    aligned : bool
        Whether x and out begin at multiples of 16 bytes.
    bulk_copies : bool
        Whether the GPU has a copy engine for shared memory.
    """
    shape = min(_candidates(spec, kind, bulk_copies), key=_cost)
    return replace(shape, aligned=aligned, bulk_copies=bulk_copies)


@lru_cache(maxsize=1024)
def _candidates(spec: BlockSpec, kind: TileKind, bulk_copies: bool = True) -> list[TileShape]:
    """Every tile that fits into shared memory, those that are parked first."""
    channel_warps = min(MOST_WARPS, 2 ** math.ceil(math.log2(max(1, spec.out_channels / 16))))
    kernel = _triple(spec.volume(spec.weight_shape)[2:])
    all_planes = -(-kernel[0] * spec.in_channels // (2 * kind.values_per_word))
    planes_at_a_time = {1, 2, *range(4, all_planes, 4), all_planes}
    # Who parks tiles takes registers from others, as sm_90 can, which also has the copy engine.
    apart = kernel[0] * spec.in_channels <= MOST_PACKED_APART * channel_warps
    parks = kind.one_pass and bulk_copies and apart
    largest = min(LARGEST_SHARED_BYTES, processor_shared_bytes() - SYSTEM_SHARED_BYTES)
    fitting: list[TileShape] = []
    for rows, columns in itertools.product((1, 2, 4, 8), repeat=2):
        warps = rows * columns * channel_warps
        if warps > MOST_WARPS:
            continue
        most_parked = MOST_PARKED if parks and warps == MOST_WARPS else 0
        tile = TileShape(
            in_channels=spec.in_channels,
            out_channels=spec.out_channels,
            group_channels=spec.out_channels // spec.num_groups,
            in_size=_triple(spec.volume(spec.x_shape)[2:]),
            out_size=_triple(spec.volume(spec.output_shape)[2:]),
            kernel_size=kernel,
            stride=spec.stride3,
            padding=spec.padding3,
            dilation=spec.dilation3,
            channel_warps=channel_warps,
            row_warps=rows,
            column_warps=columns,
            planes=all_planes,
            values_per_word=kind.values_per_word,
            split=kind.split,
            aligned=True,
            bulk_copies=True,
        )
        choices = (
            replace(tile, planes=p, parked=parked)
            for p in planes_at_a_time
            for parked in range(most_parked, -1, -1)
            if p <= all_planes
        )
        fitting += [tile for tile in choices if tile.shared_bytes + tile.static_bytes <= largest]
    return fitting


def _triple(values: tuple[int, ...]) -> Triple:
    d, h, w = values
    return d, h, w


def _cost(tile: TileShape) -> float:
    """Time of all tiles, roughly: instructions, and how well warps hide each other's waits."""
    outputs = tile.channels * tile.rows * tile.columns
    runs = tile.channels * (1 if tile.whole_rows else tile.rows)
    inputs = tile.chunks * tile.staged_planes * tile.in_rows * tile.staged_row
    instructions = OUTPUT_COST * outputs + INPUT_COST * inputs + RUN_COST * runs
    instructions += CHUNK_COST * WARP * tile.warps * tile.chunks
    resident = tile.blocks_per_processor * tile.block_threads // WARP
    return tile.tiles_per_sample * instructions * (1 + FEW_WARPS_COST / resident)


class TilePlan:
    """Everything about a call's tiles that depends on its spec alone.

    Attributes
    ----------
    shape : TileShape
    tiles : int32
        Of all samples.
    bounds : (float32, float32)
        Those of `clip_bounds`, times the kept values' scale.
    dropout : (bool, uint32, float32)
        Whether to draw, the largest draw that drops, the scale.
    record_words : int32
        Words of the records of all samples.
    """

    def __init__(
        self, spec: BlockSpec, kind: TileKind, aligned: bool = True, bulk_copies: bool = True
    ) -> None:
        self.shape = shape = tile_shape(spec, kind, aligned, bulk_copies)
        self.tiles = np.int32(spec.batch * shape.tiles_per_sample)
        self.record_words = np.int32(spec.batch * shape.sample_record_words)

        # What is dropped is multiplied by zero anyway, so with p = 1 any scale will do.
        scale = spec.keep_scale or 1.0
        lower, upper = clip_bounds(spec.cap, spec.min_value, spec.max_value)
        self.bounds = np.float32(lower * scale), np.float32(upper * scale)
        self.dropout = np.int64(spec.drop_threshold), np.float32(scale)


tile_plan = lru_cache(maxsize=4096)(TilePlan)


@cache
def processor_shared_bytes() -> int:
    """Shared memory of an SM of the current GPU; an H200's where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties().shared_memory_per_multiprocessor
    return PROCESSOR_SHARED_BYTES


@cache
def has_bulk_copies(device: torch.device) -> bool:
    """Whether a GPU has a copy engine for shared memory; the simulator has."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def plan_for(spec: BlockSpec, kind: TileKind, x: Tensor, out: Tensor) -> TilePlan:
    """Choose the tile.

    Parameters
    ----------
    spec : BlockSpec
    kind : TileKind
    x : Tensor
        Flat and contiguous.
    out : Tensor
        The output, or its gradient: what else tiles move.
    """
    aligned = (x.data_ptr() | out.data_ptr()) % 16 == 0
    return tile_plan(spec, kind, aligned, has_bulk_copies(x.device))


def marking_blocks(shape: TileShape, absent: int) -> int:
    """Blocks that pack the weights and mark `absent` words of records."""
    return max(shape.packed_tiles, min(absent // (4 * PACK_THREADS), MARKING_BLOCKS))


def pack(launch: Launcher, plan: TilePlan, weight: Tensor, records: int, absent: int) -> Tensor:
    """Allocate what the kernels share and pack the weights: one launch.

    Parameters
    ----------
    launch : Launcher
    plan : TilePlan
    weight : Tensor
        Flat and contiguous.
    records : int
        Words of all records.
    absent : int
        How many of them are marked as absent, for tiles that wait for them.

    Returns
    -------
    Tensor
        uint32: packed weights, factors, records (see `TileShape`).
    """
    shape = plan.shape
    scratch = torch.empty(shape.records_at + records, dtype=torch.uint32, device=weight.device)
    blocks = marking_blocks(shape, absent)
    launch(pack_kernel(shape), blocks, PACK_THREADS, weight, scratch, np.int32(absent))
    return scratch


def prepare(
    launch: Launcher, spec: BlockSpec, kind: TileKind, x: Tensor, weight: Tensor, out: Tensor
) -> tuple[TilePlan, Tensor]:
    """What forward needs: `plan_for`, and `pack`.

    Where tiles will wait for each other's records, all are marked as absent.
    """
    plan = plan_for(spec, kind, x, out)
    records = int(plan.record_words)
    return plan, pack(launch, plan, weight, records, records if kind.one_pass else 0)


def tile_ledger(spec: BlockSpec, kind: TileKind) -> Ledger:
    """x in each pass and out once; besides, the weights, packed, and the moments.

    Records that are waited for are marked as absent before they are published.
    """
    plan = tile_plan(spec, kind)
    passes = 1 if kind.one_pass else 2
    packed = 4 * plan.shape.unscale_at
    factors = 4 * (plan.shape.records_at - plan.shape.unscale_at)
    records = 4 * int(plan.record_words)
    return Ledger(
        # The weights are read for their scale and for their values; scales and bias for the
        # moments and for the output.
        bytes_read=passes * (spec.x_bytes + packed)
        + 2 * math.prod(spec.weight_shape) * spec.itemsize
        + records
        + 2 * 2 * vector_bytes(spec)
        + 2 * vector_bytes(spec)
        + seed_bytes(spec),
        bytes_written=packed + factors + (3 - passes) * records + spec.output_bytes,
        launches=1 + passes,
    )
