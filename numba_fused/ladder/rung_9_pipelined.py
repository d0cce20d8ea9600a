"""One pass: each block keeps its convolution in registers until the sample's statistics are known.

The accumulators of all resident blocks together hold more than a sample: 264 blocks of 16,384
values are 17 MB on an H200, and a sample of the benchmark case is 3.4. So nobody has to convolve
twice. A block convolves its tile, publishes its sums, starts to stage the input of its next tile,
draws its mask, waits for the sums of the sample's other tiles, and finishes from registers.

Sums need neither counter nor fence: before the launch each is marked as absent by bits that no
arithmetic makes, so a reader sees by the value itself whether it is there. The grid is as large as
the GPU can hold at once (a cooperative launch guarantees it), and a sample's tiles are taken by
neighbouring blocks at the same time, so every wait ends.

While one block waits, the other block of its SM computes, and the copy engine writes.

Launch: a kernel that packs the weights and marks the sums as absent, then persistent blocks.
Shapes: x (N, C, D, H, W); out flat; scratch: packed weights, factors, (N, records, tiles, 2) sums.
Bytes:  x once, out once: nothing is left to save.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from numba import cuda, float32, int32, uint32

from numba_fused.device import ptx
from numba_fused.device.tensor_tile import ACCUMULATORS, PLACE_SIZE, TILE, tile_functions
from numba_fused.device.tile_shape import CHANNELS, TileShape
from numba_fused.ladder.rung import Ledger, Operands
from numba_fused.ladder.tensor_cores import (
    LEAST_CAPABILITY,
    TileKind,
    prepare,
    processor_shared_bytes,
    tile_ledger,
    tile_limit,
    tile_shape,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
keeps_statistics = True
H200_PROCESSORS = 132


def kind(spec: BlockSpec) -> TileKind:
    """Pairs of halves, as in rung 8, and tiles that wait."""
    return TileKind(values_per_word=2, split=spec.precision == "ieee", one_pass=True)


@cache
def kernel(shape: TileShape) -> Any:
    """The persistent kernel, specialised on a tile's shape."""
    f = tile_functions(shape)
    locate, stage_input, accumulate = f.locate, f.stage_input, f.accumulate
    publish_sums, group_statistics = f.publish_sums, f.group_statistics
    draw_bits = f.draw_bits
    finish, store, wait_for_store = f.finish, f.store, f.wait_for_store
    warps, staged_input_at = shape.warps, shape.staged_input_at
    moments_shape, statistics_shape = (3, warps, CHANNELS), (2, shape.channels)
    bounds_of_launch = (shape.threads, shape.blocks_per_processor)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def pipelined(x, scratch, bias, gamma, beta, kept, out, eps, tiles, bounds, seed, dropout):
        """Tiles ``blockIdx.x``, ``blockIdx.x + gridDim.x`` ... from convolution to output."""
        drop_threshold, keep_scale = dropout
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        staged_input = memory[staged_input_at:]
        moments = cuda.shared.array(moments_shape, float32)
        statistics = cuda.shared.array(statistics_shape, float32)
        peaks = cuda.shared.array(warps, uint32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        next_place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        if cuda.threadIdx.x == 0:
            locate(int32(cuda.blockIdx.x), next_place)
        cuda.syncthreads()
        stage_input(x, staged_input, next_place, 0)
        while next_place[TILE] < tiles:
            if cuda.threadIdx.x < PLACE_SIZE:
                place[cuda.threadIdx.x] = next_place[cuda.threadIdx.x]
            ptx.wait_for_copies()
            cuda.syncthreads()
            accumulate(acc, x, scratch, words, staged_input, peaks, place)
            if cuda.threadIdx.x == 0:
                locate(int32(place[TILE] + cuda.gridDim.x), next_place)
            publish_sums(acc, scratch, bias, moments, place)
            if next_place[TILE] < tiles:
                stage_input(x, staged_input, next_place, 0)
            bits = draw_bits(place, seed, drop_threshold)  # while others publish
            group_statistics(scratch, eps, statistics, kept, place)
            finish(acc, scratch, bias, gamma, beta, statistics, place, bounds, bits, keep_scale)
            store(acc, memory, out, place)
            cuda.syncthreads()  # others read `place`
        wait_for_store()

    return pipelined


@cache
def resident_blocks(shape: TileShape) -> int:
    """Blocks that the current GPU holds at once; an H200's where there is none."""
    processors = H200_PROCESSORS
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties().multi_processor_count
    return processors * shape.blocks_in(processor_shared_bytes())


def samples_at_once(spec: BlockSpec) -> int:
    """Whole samples that the resident blocks compute together."""
    shape = tile_shape(spec, kind(spec))
    return resident_blocks(shape) // shape.tiles_per_sample


def limit(spec: BlockSpec) -> str | None:
    """As the other tensor-core rungs, and a sample's tiles must be resident together."""
    if (reason := tile_limit(spec, kind(spec))) is not None:
        return reason
    if samples_at_once(spec) > 0:
        return None
    shape = tile_shape(spec, kind(spec))
    tiles, blocks = shape.tiles_per_sample, resident_blocks(shape)
    return f"a sample has {tiles} tiles, and the GPU holds {blocks} blocks at once"


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    spec, x, out = operands.spec, operands.x, operands.out
    plan, scratch = prepare(launch, spec, kind(spec), x, operands.weight, out)
    launch(
        kernel(plan.shape),
        min(int(plan.tiles), resident_blocks(plan.shape)),
        plan.shape.threads,
        x,
        scratch,
        operands.bias,
        operands.gamma,
        operands.beta,
        operands.statistics,
        out,
        operands.eps,
        plan.tiles,
        plan.bounds,
        operands.seed,
        plan.dropout,
        shared_bytes=plan.shape.shared_bytes,
        cooperative=True,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """See the lesson; the packed weights and the moments are small change."""
    return tile_ledger(spec, kind(spec))
