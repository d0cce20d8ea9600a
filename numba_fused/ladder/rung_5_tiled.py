"""Tiles: the input staged in shared memory, the outputs blocked in registers.

The naive convolution fetches two words from the cache for every multiply-add, and computes an
index for each. Here a block stages the input that a whole tile of outputs looks at, and each
thread computes up to 64 outputs, some channels by some rows: a word it fetches feeds many
multiply-adds, and the arithmetic units, not the loads, set the pace. `device.tiles` does it.

Launch: the convolution with N * channel_blocks * slots blocks: `slots` blocks, at most 128,
        share the tiles of a sample and channel block and sum each channel as they write it.
        Then one block per tile: it merges its groups' partial moments and rewrites the tile.
Shapes: x flat, (N * C * D * H * W,); out flat, (N * K * D * H * W,), holds first z, then the
        result; partial flat, (N * K * slots * 3,): count, mean, m2 of each channel and slot.
Bytes:  x read, z written and read, out written, and the partial moments, written and read once.
        With E the bytes of z: x + E read, 2 E written.
Next:   the convolution has become so cheap that moving z out and back costs about as much as
        computing it. The next rung computes it twice instead.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from numba import cuda, int32

from numba_fused.device.convolution import divide
from numba_fused.device.tiles import (
    Tiling,
    choose_tiling,
    cover_of,
    shared_memory_limit,
    tile_functions,
)
from numba_fused.ladder.rung import (
    Ledger,
    Operands,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher


@lru_cache(maxsize=1024)
def convolution_kernel(tiling: Tiling) -> Any:
    """The first kernel: the convolution, and its moments by channel and slot."""
    f = tile_functions(tiling)
    place_of, convolve, store = f.place_of, f.convolve, f.store
    clear_moments, add_moments, store_partial = f.clear_moments, f.add_moments, f.store_partial
    STAGED, TAPS, VALUES = tiling.chunk * tiling.staged, tiling.chunk * tiling.taps, tiling.values
    MOMENTS = tiling.moments_shape

    @cuda.jit(launch_bounds=tiling.launch_bounds)
    def tiled_convolution_kernel(x, weight, bias, z, partial, cover, geometry):
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
            store(values, z, place, geometry)
            add_moments(values, moments, place, geometry)
            tile = int32(tile + slots)
        store_partial(partial, moments, place, bias.size, slot, slots)

    return tiled_convolution_kernel


@lru_cache(maxsize=1024)
def apply_kernel(tiling: Tiling) -> Any:
    """The second kernel: everything else, in place."""
    f = tile_functions(tiling)
    place_of, group_statistics = f.place_of, f.group_statistics
    load, normalise_and_drop, store = f.load, f.normalise_and_drop, f.store
    VALUES, STATISTICS = tiling.values, tiling.statistics_shape

    @cuda.jit(launch_bounds=tiling.launch_bounds)
    def tiled_apply_kernel(
        out,
        partial,
        gamma,
        beta,
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
        statistics = cuda.shared.array(STATISTICS, out.dtype)
        values = cuda.local.array(VALUES, out.dtype)
        channel_blocks, tiles_d, tiles_h, tiles_w, slots = cover
        rest, channel_block = divide(int32(cuda.blockIdx.x), channel_blocks)
        n, tile = divide(rest, int32(int32(tiles_d * tiles_h) * tiles_w))
        place = place_of(n, channel_block, tile, cover, geometry)
        group_channels, _ = divide(int32(gamma.size), num_groups)
        group_statistics(statistics, partial, place, slots, group_channels, gamma.size, eps)
        load(values, out, place, geometry)
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

    return tiled_apply_kernel


def limit(spec: BlockSpec) -> str | None:
    """A sample beyond 32-bit indices, or a kernel whose footprint exceeds shared memory."""
    return sample_limit(spec) or shared_memory_limit(spec)


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    spec, out = operands.spec, operands.out
    tiling = tiling_of(spec, operands.threads_per_block)
    cover = cover_of(spec, tiling)
    # Nothing is shared between channels any more: one at a time takes fewer registers.
    apply_tiling = replace(tiling, channels=1)
    apply_cover = cover_of(spec, apply_tiling)
    partial = torch.empty(partial_size(spec, cover.slots), dtype=out.dtype, device=out.device)
    launch(
        convolution_kernel(tiling),
        spec.batch * cover.channel_blocks * cover.slots,
        tiling.threads,
        operands.x,
        operands.weight,
        operands.bias,
        out,
        partial,
        cover.arguments,
        operands.geometry,
    )
    launch(
        apply_kernel(apply_tiling),
        spec.batch * apply_cover.channel_blocks * apply_cover.tiles,
        tiling.threads,
        out,
        partial,
        operands.gamma,
        operands.beta,
        apply_cover.arguments,
        operands.geometry,
        operands.groups[1],
        operands.eps,
        operands.bounds,
        *operands.dropout,
    )


def tiling_of(spec: BlockSpec, threads_per_block: int) -> Tiling:
    """The tiling of a problem that `limit` lets through."""
    tiling = choose_tiling(spec, threads_per_block)
    if tiling is None:
        raise ValueError(shared_memory_limit(spec))
    return tiling


def partial_size(spec: BlockSpec, slots: int) -> int:
    """Words of the partial moments: three for each channel and slot."""
    return spec.batch * spec.out_channels * slots * 3


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """x + E read, 2 E written, and the partial moments each way."""
    tensor = spec.output_bytes
    slots = cover_of(spec, tiling_of(spec, threads_per_block)).slots
    partial = partial_size(spec, slots) * spec.itemsize
    return Ledger(
        bytes_read=convolution_bytes(spec)
        + 2 * vector_bytes(spec)
        + tensor
        + partial
        + seed_bytes(spec),
        bytes_written=2 * tensor + partial,
        launches=2,
    )
