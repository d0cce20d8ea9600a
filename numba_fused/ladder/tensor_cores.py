"""What the tensor-core rungs share on the host: the tile's shape and the packed weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from numba_fused.device.fragments import THREADS as PACK_THREADS
from numba_fused.device.fragments import pack_kernel
from numba_fused.device.launch import Launcher
from numba_fused.device.pointwise import clip_bounds
from numba_fused.device.tile_shape import LONGEST_WINDOW, TileShape, Triple
from numba_fused.ladder.rung import Ledger, Operands, sample_limit, seed_bytes, vector_bytes
from numba_fused.spec import BlockSpec

LEAST_CAPABILITY = (8, 0)
MOST_WARPS = 8
# The blocks of an SM share this, and the system takes some for each.
PROCESSOR_SHARED_BYTES, SYSTEM_SHARED_BYTES = 228 * 1024, 1024
LARGEST_SHARED_BYTES = 224 * 1024
# Instructions of a warp per value, from the disassembly: what the choice of a tile weighs.
OUTPUT_COST, INPUT_COST, RUN_COST = 22, 4, 600
MARKING_BLOCKS = 132


def tile_limit(spec: BlockSpec, values_per_word: int, split: bool) -> str | None:
    """Why tensor-core tiles cannot run `spec`, or None."""
    if spec.dtype != "float32":
        return f"tensor cores take fp32 here, and x is {spec.dtype}"
    if spec.groups > 1:
        return f"its tiles mix all input channels, and the convolution has groups={spec.groups}"
    if (reason := sample_limit(spec)) is not None:
        return reason
    candidates = _candidates(spec, values_per_word, split)
    if not candidates:
        return f"its input tile needs more than {LARGEST_SHARED_BYTES // 1024} KB of shared memory"
    if candidates[0].window_slots > LONGEST_WINDOW:
        return (
            f"{candidates[0].window_slots} values of a row lie under two outputs (stride "
            f"{spec.stride3[2]}, kernel {spec.kernel_size[-1]}, dilation {spec.dilation3[2]}), and "
            f"registers hold {LONGEST_WINDOW}"
        )
    return None


@lru_cache(maxsize=1024)
def tile_shape(
    spec: BlockSpec,
    values_per_word: int,
    split: bool,
    aligned: bool = True,
    bulk_copies: bool = True,
) -> TileShape:
    """The cheapest tile for `spec`.

    Parameters
    ----------
    spec : BlockSpec
    values_per_word : int
        2 halves or 1 TF32 value.
    split : bool
        Whether words come in two parts.
    aligned : bool
        Whether x and out begin at multiples of 16 bytes.
    bulk_copies : bool
        Whether the GPU has a copy engine for shared memory.
    """
    shape = min(_candidates(spec, values_per_word, split), key=_cost)
    return replace(shape, aligned=aligned, bulk_copies=bulk_copies)


@lru_cache(maxsize=1024)
def _candidates(spec: BlockSpec, values_per_word: int, split: bool) -> list[TileShape]:
    """Every tile that fits into shared memory, two blocks to an SM if any does."""
    channel_warps = min(MOST_WARPS, 2 ** math.ceil(math.log2(max(1, spec.out_channels / 16))))
    kernel = _triple(spec.volume(spec.weight_shape)[2:])
    all_planes = -(-kernel[0] * spec.in_channels // (2 * values_per_word))
    fitting: list[TileShape] = []
    for rows, columns in itertools.product((1, 2, 4, 8), repeat=2):
        if rows * columns * channel_warps > MOST_WARPS:
            continue
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
            values_per_word=values_per_word,
            split=split,
            whole_output=True,
            aligned=True,
            bulk_copies=True,
        )
        fewer = range((all_planes - 1) // 4 * 4, 0, -4)
        choices = [
            replace(tile, planes=planes, whole_output=whole)
            for planes in (all_planes, *fewer, 2, 1)
            if planes <= all_planes
            for whole in (True, False)
        ]
        for limit in (_share_of_processor(tile), LARGEST_SHARED_BYTES):
            found = next((c for c in choices if c.shared_bytes <= limit), None)
            if found:
                fitting.append(found)
                break
    small = [tile for tile in fitting if tile.shared_bytes <= _share_of_processor(tile)]
    return small or fitting


def _share_of_processor(tile: TileShape) -> int:
    of_block = PROCESSOR_SHARED_BYTES // tile.blocks_per_processor // 128 * 128
    return of_block - SYSTEM_SHARED_BYTES - tile.static_bytes


def _triple(values: tuple[int, ...]) -> Triple:
    d, h, w = values
    return d, h, w


def _cost(tile: TileShape) -> float:
    """Instructions of all tiles, roughly."""
    outputs = tile.channels * tile.rows * tile.columns
    runs = tile.channels * (1 if tile.whole_rows else tile.rows)
    inputs = tile.chunks * tile.staged_planes * tile.in_rows * tile.staged_row
    return tile.tiles_per_sample * (OUTPUT_COST * outputs + INPUT_COST * inputs + RUN_COST * runs)


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
    scratch_words : int
        With the packed weights and their factors.
    marking_blocks : int
        Blocks that pack the weights and mark all records as absent.
    """

    def __init__(
        self,
        spec: BlockSpec,
        values_per_word: int,
        split: bool,
        aligned: bool,
        bulk_copies: bool = True,
    ) -> None:
        self.shape = shape = tile_shape(spec, values_per_word, split, aligned, bulk_copies)
        self.tiles = np.int32(spec.batch * shape.tiles_per_sample)
        self.record_words = np.int32(spec.batch * shape.sample_record_words)
        self.scratch_words = shape.records_at + int(self.record_words)
        blocks = min(int(self.record_words) // (4 * PACK_THREADS), MARKING_BLOCKS)
        self.marking_blocks = max(shape.packed_tiles, blocks)

        # What is dropped is multiplied by zero anyway, so with p = 1 any scale will do.
        scale = spec.keep_scale or 1.0
        lower, upper = clip_bounds(spec.cap, spec.min_value, spec.max_value)
        self.bounds = np.float32(lower * scale), np.float32(upper * scale)
        last_dropped = np.uint32(max(spec.drop_threshold - 1, 0))
        self.dropout = np.bool_(spec.drop_threshold > 0), last_dropped, np.float32(scale)


tile_plan = lru_cache(maxsize=4096)(TilePlan)


@cache
def has_bulk_copies(device: torch.device) -> bool:
    """Whether a GPU has a copy engine for shared memory; the simulator has."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


def prepare(
    launch: Launcher, operands: Operands, values_per_word: int, split: bool, absent: bool = False
) -> tuple[TilePlan, Tensor]:
    """Choose the tile, allocate what the kernels share and pack the weights: one launch.

    Parameters
    ----------
    launch, operands
        As a rung's `forward` gets them.
    values_per_word, split
        As `tile_shape` takes them.
    absent : bool
        Whether to mark all records as absent: some will be waited for.

    Returns
    -------
    plan : TilePlan
    scratch : Tensor
        uint32: packed weights, factors, records (see `TileShape`).
    """
    aligned = (operands.x.data_ptr() | operands.out.data_ptr()) % 16 == 0
    bulk_copies = has_bulk_copies(operands.x.device)
    plan = tile_plan(operands.spec, values_per_word, split, aligned, bulk_copies)
    scratch = torch.empty(plan.scratch_words, dtype=torch.uint32, device=operands.x.device)
    launch(
        pack_kernel(plan.shape),
        plan.marking_blocks if absent else plan.shape.packed_tiles,
        PACK_THREADS,
        operands.weight,
        scratch,
        plan.record_words if absent else np.int32(0),
    )
    return plan, scratch


def recompute_ledger(spec: BlockSpec, values_per_word: int, split: bool) -> Ledger:
    """x twice and out once, in three launches; besides, the weights, packed, and the moments."""
    return _ledger(spec, values_per_word, split, passes=2)


def one_pass_ledger(spec: BlockSpec, values_per_word: int, split: bool) -> Ledger:
    """x once and out once, in two launches; besides, the weights, packed, and the moments.

    Records are marked as absent before they are published.
    """
    ledger = _ledger(spec, values_per_word, split, passes=1)
    marked = 4 * int(tile_plan(spec, values_per_word, split, True).record_words)
    return replace(ledger, bytes_written=ledger.bytes_written + marked)


def _ledger(spec: BlockSpec, values_per_word: int, split: bool, passes: int) -> Ledger:
    plan = tile_plan(spec, values_per_word, split, True)
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
        bytes_written=packed + factors + records + spec.output_bytes,
        launches=1 + passes,
    )
