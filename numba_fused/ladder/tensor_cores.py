"""What the tensor-core rungs share on the host: the tile's shape and the packed weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

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
# Two blocks share the 228 KB of an SM, each with 1 KB for the system and up to 2 KB of its own.
SHARED_BYTES = 228 * 1024 // 2 - 3 * 1024
LARGEST_SHARED_BYTES = 224 * 1024
# Instructions of a warp per value, from the disassembly: what the choice of a tile weighs.
OUTPUT_COST, INPUT_COST = 22, 4


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
    spec: BlockSpec, values_per_word: int, split: bool, aligned: bool = True
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
    """
    shape = min(_candidates(spec, values_per_word, split), key=_cost)
    return replace(shape, aligned=aligned)


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
            aligned=True,
        )
        fewer = range((all_planes - 1) // 4 * 4, 0, -4)
        choices = [replace(tile, planes=p) for p in (all_planes, *fewer, 2, 1) if p <= all_planes]
        for limit in (SHARED_BYTES, LARGEST_SHARED_BYTES):
            found = next((c for c in choices if c.shared_bytes <= limit), None)
            if found:
                fitting.append(found)
                break
    small = [tile for tile in fitting if tile.shared_bytes <= SHARED_BYTES]
    return small or fitting


def _triple(values: tuple[int, ...]) -> Triple:
    d, h, w = values
    return d, h, w


def _cost(tile: TileShape) -> float:
    """Instructions of all tiles, roughly."""
    outputs = tile.channels * tile.rows * tile.columns
    inputs = tile.chunks * tile.staged_planes * tile.in_rows * tile.staged_row
    return tile.tiles_per_sample * (OUTPUT_COST * outputs + INPUT_COST * inputs)


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
    packed_tiles, partial_values : int
        16-channel tiles of packed weights; count, mean and m2 of every position and record.
    """

    def __init__(self, spec: BlockSpec, values_per_word: int, split: bool, aligned: bool) -> None:
        self.shape = shape = tile_shape(spec, values_per_word, split, aligned)
        self.tiles = np.int32(spec.batch * shape.tiles_per_sample)
        self.packed_tiles = shape.tiles[0] * shape.channel_warps
        self.partial_values = 3 * int(self.tiles) // shape.tiles[0] * shape.records

        # What is dropped is multiplied by zero anyway, so with p = 1 any scale will do.
        scale = spec.keep_scale or 1.0
        lower, upper = clip_bounds(spec.cap, spec.min_value, spec.max_value)
        self.bounds = np.float32(lower * scale), np.float32(upper * scale)
        last_dropped = np.uint32(max(spec.drop_threshold - 1, 0))
        self.dropout = np.bool_(spec.drop_threshold > 0), last_dropped, np.float32(scale)


tile_plan = lru_cache(maxsize=4096)(TilePlan)


@dataclass
class Scratch:
    """Device memory that the kernels of one call share.

    Attributes
    ----------
    fragments, unscale : Tensor
        The packed weights and the factors that undo their scale.
    partial : Tensor
        Room for count, mean and m2 of each tile and record of channels.
    counters : Tensor
        int32 zeros, as many as asked for.
    """

    fragments: Tensor
    unscale: Tensor
    partial: Tensor
    counters: Tensor


def prepare(
    launch: Launcher, operands: Operands, values_per_word: int, split: bool, counters: int = 0
) -> tuple[TilePlan, Scratch]:
    """Choose the tile, allocate what the kernels share and pack the weights: one launch."""
    device = operands.x.device
    aligned = (operands.x.data_ptr() | operands.out.data_ptr()) % 16 == 0
    plan = tile_plan(operands.spec, values_per_word, split, aligned)
    words = plan.packed_tiles * plan.shape.fragment_words
    scratch = Scratch(
        fragments=torch.empty(words, dtype=torch.uint32, device=device),
        unscale=torch.empty(16 * plan.packed_tiles, dtype=torch.float32, device=device),
        partial=torch.empty(plan.partial_values, dtype=torch.float32, device=device),
        counters=torch.empty(counters, dtype=torch.int32, device=device),
    )
    launch(
        pack_kernel(plan.shape),
        plan.packed_tiles,
        PACK_THREADS,
        operands.weight,
        scratch.fragments,
        scratch.unscale,
        scratch.counters,
    )
    return plan, scratch


def recompute_ledger(spec: BlockSpec, values_per_word: int, split: bool) -> Ledger:
    """x twice and out once, in three launches; besides, the weights, packed, and the moments."""
    return _ledger(spec, values_per_word, split, passes=2)


def one_pass_ledger(spec: BlockSpec, values_per_word: int, split: bool) -> Ledger:
    """x once and out once, in two launches; besides, the weights, packed, and the moments.

    A sample's counter is set to zero, counted up and looked at.
    """
    ledger = _ledger(spec, values_per_word, split, passes=1)
    return replace(
        ledger,
        bytes_read=ledger.bytes_read + 2 * 4 * spec.batch,
        bytes_written=ledger.bytes_written + 3 * 4 * spec.batch,
    )


def _ledger(spec: BlockSpec, values_per_word: int, split: bool, passes: int) -> Ledger:
    plan = tile_plan(spec, values_per_word, split, True)
    fragments = 4 * plan.packed_tiles * plan.shape.fragment_words
    partial = 4 * plan.partial_values
    weight = math.prod(spec.weight_shape) * spec.itemsize
    return Ledger(
        # The weights are read for their scale and for their values; counts and means of the
        # partial moments for the mean and for the variance; scales and bias for the moments
        # and for the output.
        bytes_read=passes * (spec.x_bytes + fragments)
        + 2 * weight
        + partial * 5 // 3
        + 2 * 2 * vector_bytes(spec)
        + 2 * vector_bytes(spec)
        + seed_bytes(spec),
        bytes_written=fragments + 4 * 16 * plan.packed_tiles + partial + spec.output_bytes,
        launches=1 + passes,
    )
