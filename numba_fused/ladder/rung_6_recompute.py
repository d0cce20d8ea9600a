"""Recompute: the convolution twice, its result never in memory.

The statistics need every value of a group before the first can be normalised, and the values do
not fit on chip: so far they waited in global memory. With tiles the convolution is cheap enough
to do it twice. The first pass keeps nothing but moments; the second computes every tile again
and takes it all the way to the output in registers.

Launch: both with the tiles of the rung before. Statistics: N * channel_blocks * slots blocks.
        Apply: one block per tile, which first merges its groups' partial moments.
Shapes: x flat, (N * C * D * H * W,); out flat, (N * K * D * H * W,); partial flat,
        (N * K * slots * 3,): count, mean, m2 of each channel and slot.
Bytes:  x read twice, out written once, and the partial moments, written and read once. With E
        the bytes of out: 2 x read, E written - 3 E less than unfused rungs read and write for z.
Next:   twice the multiply-adds, all on the CUDA cores. Tensor cores do the same products at
        several times the rate.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from numba import cuda, int32

from numba_fused.device.convolution import divide
from numba_fused.device.tiles import Tiling, cover_of, tile_functions
from numba_fused.ladder.rung import Ledger, Operands, convolution_bytes, seed_bytes, vector_bytes
from numba_fused.ladder.rung_5_tiled import limit, partial_size, tiling_of
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

__all__ = ["apply_kernel", "forward", "ledger", "limit", "statistics_kernel"]


@lru_cache(maxsize=1024)
def statistics_kernel(tiling: Tiling) -> Any:
    """The first kernel: the convolution's moments by channel and slot."""
    f = tile_functions(tiling)
    place_of, convolve = f.place_of, f.convolve
    clear_moments, add_moments, store_partial = f.clear_moments, f.add_moments, f.store_partial
    STAGED, TAPS, VALUES = tiling.chunk * tiling.staged, tiling.chunk * tiling.taps, tiling.values
    MOMENTS = tiling.moments_shape

    @cuda.jit(launch_bounds=tiling.launch_bounds)
    def recompute_statistics_kernel(x, weight, bias, partial, cover, geometry):
        staged = cuda.shared.array(STAGED, x.dtype)
        taps = cuda.shared.array(TAPS, x.dtype)
        moments = cuda.shared.array(MOMENTS, x.dtype)
        values = cuda.local.array(VALUES, x.dtype)
        channel_blocks, tiles_d, tiles_h, tiles_w, slots = cover
        rest, channel_block = divide(int32(cuda.blockIdx.x), channel_blocks)
        n, slot = divide(rest, slots)
        place = place_of(n, channel_block, slot, cover, geometry)
        clear_moments(moments)
        tile = slot
        while tile < int32(int32(tiles_d * tiles_h) * tiles_w):
            place = place_of(n, channel_block, tile, cover, geometry)
            convolve(values, staged, taps, x, weight, bias, place, geometry)
            add_moments(values, moments, place, geometry)
            tile = int32(tile + slots)
        store_partial(partial, moments, place, bias.size, slot, slots)

    return recompute_statistics_kernel


@lru_cache(maxsize=1024)
def apply_kernel(tiling: Tiling) -> Any:
    """The second kernel: the convolution again, and everything after it."""
    f = tile_functions(tiling)
    place_of, group_statistics = f.place_of, f.group_statistics
    convolve, normalise_and_drop, store = f.convolve, f.normalise_and_drop, f.store
    STAGED, TAPS, VALUES = tiling.chunk * tiling.staged, tiling.chunk * tiling.taps, tiling.values
    STATISTICS = tiling.statistics_shape

    @cuda.jit(launch_bounds=tiling.launch_bounds)
    def recompute_apply_kernel(
        x,
        weight,
        bias,
        partial,
        gamma,
        beta,
        out,
        cover,
        geometry,
        num_groups,
        eps,
        bounds,
        seed,
        width,
        drop_threshold,
        keep_scale,
    ):
        staged = cuda.shared.array(STAGED, x.dtype)
        taps = cuda.shared.array(TAPS, x.dtype)
        statistics = cuda.shared.array(STATISTICS, x.dtype)
        values = cuda.local.array(VALUES, x.dtype)
        channel_blocks, tiles_d, tiles_h, tiles_w, slots = cover
        rest, channel_block = divide(int32(cuda.blockIdx.x), channel_blocks)
        n, tile = divide(rest, int32(int32(tiles_d * tiles_h) * tiles_w))
        place = place_of(n, channel_block, tile, cover, geometry)
        group_channels, _ = divide(int32(gamma.size), num_groups)
        group_statistics(statistics, partial, place, slots, group_channels, gamma.size, eps)
        convolve(values, staged, taps, x, weight, bias, place, geometry)
        normalise_and_drop(
            values,
            statistics,
            gamma,
            beta,
            place,
            group_channels,
            geometry,
            bounds,
            seed,
            width,
            drop_threshold,
            keep_scale,
        )
        store(values, out, place, geometry)

    return recompute_apply_kernel


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    spec, out = operands.spec, operands.out
    tiling = tiling_of(spec, operands.threads_per_block)
    cover = cover_of(spec, tiling)
    partial = torch.empty(partial_size(spec, cover.slots), dtype=out.dtype, device=out.device)
    launch(
        statistics_kernel(tiling),
        spec.batch * cover.channel_blocks * cover.slots,
        tiling.threads,
        operands.x,
        operands.weight,
        operands.bias,
        partial,
        cover.arguments,
        operands.geometry,
    )
    launch(
        apply_kernel(tiling),
        spec.batch * cover.channel_blocks * cover.tiles,
        tiling.threads,
        operands.x,
        operands.weight,
        operands.bias,
        partial,
        operands.gamma,
        operands.beta,
        out,
        cover.arguments,
        operands.geometry,
        operands.groups[1],
        operands.eps,
        operands.bounds,
        *operands.dropout,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """2 x read, E written, and the partial moments each way."""
    slots = cover_of(spec, tiling_of(spec, threads_per_block)).slots
    partial = partial_size(spec, slots) * spec.itemsize
    return Ledger(
        bytes_read=2 * convolution_bytes(spec)
        + 2 * vector_bytes(spec)
        + partial
        + seed_bytes(spec),
        bytes_written=spec.output_bytes + partial,
        launches=2,
    )
