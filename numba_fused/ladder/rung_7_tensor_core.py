"""Tensor cores from Python: the convolution as matrix instructions on TF32 operands.

``mma.sync`` multiplies a 16 x 8 by an 8 x 8 matrix and adds the product to 16 x 8 sums in fp32,
one instruction of a warp, 1024 multiply-adds. Its operands are TF32: floats rounded to 10 fraction
bits, so the relative error is about 3e-4 and the caller has to ask for it with
``precision="tf32"``. Rows of A are output channels, columns of B output rows; how x comes to lie
in registers as B is the subject of `device.tile_shape`, what becomes of the sums of
`device.tensor_tile`.

Launch: a kernel that packs the weights in the order in which lanes want them; then one block a
        tile, twice as in the rung before: for the statistics, and again for everything.
Shapes: x (N, C, D, H, W); out flat; partial (N, tiles, 3, K): count, mean, m2 by channel.
Bytes:  x twice, out once, and small change: packed weights and partial moments.
Next:   ten bits are not fp32.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from numba import cuda, float32, int32

from numba_fused.device.tensor_tile import ACCUMULATORS, PLACE_SIZE, tile_functions
from numba_fused.device.tile_shape import CHANNELS, TileShape
from numba_fused.ladder.rung import Ledger, Operands
from numba_fused.ladder.tensor_cores import (
    LEAST_CAPABILITY,
    TileKind,
    prepare,
    tile_ledger,
    tile_limit,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
keeps_statistics = True
KIND = TileKind(values_per_word=1, split=False, one_pass=False)


def limit(spec: BlockSpec) -> str | None:
    """As all tiles, and the caller must want TF32."""
    if spec.precision != "tf32":
        return "it rounds to TF32: pass precision='tf32'"
    return tile_limit(spec, KIND)


@cache
def kernels(shape: TileShape) -> tuple[Any, Any]:
    """The two kernels, specialised on a tile's shape."""
    f = tile_functions(shape)
    convolve, warp_moments, publish_sums = f.convolve, f.warp_moments, f.publish_sums
    group_statistics, draw_bits = f.group_statistics, f.draw_bits
    finish, store, wait_for_store = f.finish, f.store, f.wait_for_store
    moments_shape, statistics_shape = (3, shape.warps, CHANNELS), (2, shape.channels)
    bounds_of_launch = (shape.threads, shape.blocks_per_processor)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def statistics_kernel(x, scratch, bias):
        """Convolve one tile and leave its channels' moments in `scratch`."""
        moments = cuda.shared.array(moments_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        convolve(acc, x, scratch, int32(cuda.blockIdx.x), place)
        warp_moments(acc, moments, place)
        cuda.syncthreads()
        publish_sums(scratch, bias, moments, place)

    @cuda.jit(launch_bounds=bounds_of_launch)
    def apply_kernel(x, scratch, bias, gamma, beta, kept, out, eps, bounds, seed, dropout):
        """Convolve again, pool the moments of the tile's groups, and finish."""
        drop_threshold, keep_scale = dropout
        memory = cuda.shared.array(0, float32)
        statistics = cuda.shared.array(statistics_shape, float32)
        place = cuda.shared.array(PLACE_SIZE, int32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        convolve(acc, x, scratch, int32(cuda.blockIdx.x), place)
        group_statistics(scratch, eps, statistics, kept, place)
        bits = draw_bits(place, seed, drop_threshold)
        finish(acc, scratch, bias, gamma, beta, statistics, place, bounds, bits, keep_scale)
        cuda.syncthreads()  # others may still read the words where the output is staged
        store(acc, memory, out, place)
        wait_for_store()

    return statistics_kernel, apply_kernel


def forward(launch: Launcher, operands: Operands) -> None:
    """Three launches."""
    two_passes(launch, operands, KIND)


def two_passes(launch: Launcher, operands: Operands, kind: TileKind) -> None:
    """Pack, statistics, apply, on words of one TF32 value or two halves."""
    spec, x, out = operands.spec, operands.x, operands.out
    plan, scratch = prepare(launch, spec, kind, x, operands.weight, out)
    statistics_kernel, apply_kernel = kernels(plan.shape)
    block, shared_bytes = plan.shape.threads, plan.shape.shared_bytes
    launch(
        statistics_kernel,
        int(plan.tiles),
        block,
        x,
        scratch,
        operands.bias,
        shared_bytes=shared_bytes,
    )
    launch(
        apply_kernel,
        int(plan.tiles),
        block,
        x,
        scratch,
        operands.bias,
        operands.gamma,
        operands.beta,
        operands.statistics,
        out,
        operands.eps,
        plan.bounds,
        operands.seed,
        plan.dropout,
        shared_bytes=shared_bytes,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """See the lesson."""
    return tile_ledger(spec, KIND)
