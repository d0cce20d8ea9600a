"""One pass: each block keeps its convolution in registers until the sample's statistics are known.

The accumulators of all resident blocks together hold more than a sample: 264 blocks of 16,384
values are 17 MB on an H200, and a sample of the benchmark case is 3.4. So nobody has to convolve
twice. A block convolves its tile, publishes its moments, counts itself as arrived, waits until
the sample's other tiles have arrived, and finishes from registers; then it takes the next tile.
The grid is as large as the GPU can hold at once (a cooperative launch guarantees it), and a
sample's tiles are taken by neighbouring blocks at the same time, so every wait ends.

While one block waits or stores, the other block of its SM computes.

Launch: a kernel that packs the weights, then persistent blocks.
Shapes: x (N, C, D, H, W); out flat; partial (N, tiles, 3, K); counters (N,) arrivals.
Bytes:  x once, out once: nothing is left to save.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from numba import cuda, float32, int32, uint32

from numba_fused.device import ptx
from numba_fused.device.tensor_tile import ACCUMULATORS, PLACE_SIZE, SAMPLE, TILE, tile_functions
from numba_fused.device.tile_shape import CHANNELS, TileShape
from numba_fused.ladder.rung import Ledger, Operands
from numba_fused.ladder.tensor_cores import (
    LEAST_CAPABILITY,
    one_pass_ledger,
    prepare,
    tile_limit,
    tile_shape,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
VALUES_PER_WORD = 2
H200_PROCESSORS = 132
WAIT_NANOSECONDS = 40


@cache
def kernel(shape: TileShape) -> Any:
    """The persistent kernel, specialised on a tile's shape."""
    locate, accumulate, publish_moments, group_statistics, finish, store = tile_functions(shape)
    warps, words_size, tiles_per_sample = shape.warps, shape.words, shape.tiles_per_sample
    moments_shape, statistics_shape = (3, warps, CHANNELS), (2, shape.channels)
    bounds_of_launch = (shape.threads, shape.blocks_per_processor)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def pipelined(
        x,
        fragments,
        unscale,
        bias,
        gamma,
        beta,
        partial,
        counters,
        out,
        eps,
        tiles,
        bounds,
        seed,
        dropout,
    ):
        """Tiles ``blockIdx.x``, ``blockIdx.x + gridDim.x`` ... from convolution to output."""
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        staged = memory[words_size:]
        moments = cuda.shared.array(moments_shape, float32)
        statistics = cuda.shared.array(statistics_shape, float32)
        peaks = cuda.shared.array(warps, uint32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        if cuda.threadIdx.x == 0:
            locate(int32(cuda.blockIdx.x), place)
        cuda.syncthreads()
        while place[TILE] < tiles:
            unscale_x = accumulate(acc, x, fragments, words, staged, peaks, place)
            publish_moments(acc, unscale_x, unscale, bias, partial, moments, place)
            wait_for_sample(counters, place[SAMPLE], tiles_per_sample)
            group_statistics(partial, eps, statistics, place)
            finish(
                acc,
                unscale_x,
                unscale,
                bias,
                gamma,
                beta,
                statistics,
                place,
                bounds,
                seed,
                dropout,
            )
            store(acc, staged, out, place)
            cuda.syncthreads()  # the next tile is staged where this one was stored from
            if cuda.threadIdx.x == 0:
                locate(int32(place[TILE] + cuda.gridDim.x), place)
            cuda.syncthreads()

    return pipelined


@cuda.jit(device=True)
def wait_for_sample(counters, n, tiles_per_sample):
    """Publish this block's moments and wait for those of the sample's other tiles."""
    cuda.threadfence()
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cuda.atomic.add(counters, n, 1)
        while ptx.load_acquire(counters, n) < tiles_per_sample:
            cuda.nanosleep(WAIT_NANOSECONDS)
    cuda.syncthreads()


@cache
def resident_blocks(shape: TileShape) -> int:
    """Blocks that the current GPU holds at once; an H200's where there is none."""
    processors = H200_PROCESSORS
    if torch.cuda.is_available():
        processors = torch.cuda.get_device_properties().multi_processor_count
    by_memory = 228 * 1024 // (shape.shared_bytes + 4 * 1024)
    return processors * min(shape.blocks_per_processor, by_memory)


def limit(spec: BlockSpec) -> str | None:
    """As the other tensor-core rungs, and a sample's tiles must be resident together."""
    split = spec.precision == "ieee"
    if (reason := tile_limit(spec, VALUES_PER_WORD, split)) is not None:
        return reason
    shape = tile_shape(spec, VALUES_PER_WORD, split)
    tiles, blocks = shape.tiles_per_sample, resident_blocks(shape)
    if tiles <= blocks:
        return None
    return f"a sample has {tiles} tiles, and the GPU holds {blocks} blocks at once"


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    spec = operands.spec
    plan, scratch = prepare(
        launch, operands, VALUES_PER_WORD, split=spec.precision == "ieee", counters=spec.batch
    )
    launch(
        kernel(plan.shape),
        min(int(plan.tiles), resident_blocks(plan.shape)),
        plan.shape.threads,
        operands.x,
        scratch.fragments,
        scratch.unscale,
        operands.bias,
        operands.gamma,
        operands.beta,
        scratch.partial,
        scratch.counters,
        operands.out,
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
    return one_pass_ledger(spec, VALUES_PER_WORD, split=spec.precision == "ieee")
