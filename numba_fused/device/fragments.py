"""The weights as the matrix instructions want them: packed once a call, read by every tile.

A lane's four words of A for one step lie next to each other, a warp's 128 words too, so that a
step costs a tile one coalesced 128-bit load. Layout, slowest first:

    (16 output channels) (chunk) (part) (step) (lane) (4 words)

Part 0 holds the weights rounded, part 1 (where the shape is split) what the rounding left over.
Weights of a channel are scaled by a power of two so that halves neither overflow nor lose bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from numba import cuda, float32, int32, int64, uint32, uint64

from numba_fused.device import ptx
from numba_fused.device.tensor_tile import ABSENT, power_of_two, scale_exponent
from numba_fused.device.tile_shape import CHANNELS, WARP, TileShape

THREADS = 256
FULL_WARP = 0xFFFFFFFF
INFINITY = float32(math.inf)
LANES_PER_CHANNEL = THREADS // CHANNELS


@cache
def pack_kernel(shape: TileShape) -> Any:
    """The kernel that packs weights for tiles of `shape`, 16 output channels a block."""
    in_channels, out_channels, sources = shape.in_channels, shape.out_channels, shape.sources
    kernel_d, kernel_h, kernel_w = shape.kernel_size
    taps = in_channels * kernel_d * kernel_h * kernel_w
    kernel_plane = kernel_h * kernel_w
    chunks, steps, parts = shape.chunks, shape.steps, shape.parts
    planes, values_per_word = shape.planes, shape.values_per_word
    halves, split = values_per_word == 2, shape.split
    slot_table = shape.slots.reshape(-1)
    part_words = steps * WARP * 4
    packed_tiles, unscale_at, records_at = shape.packed_tiles, shape.unscale_at, shape.records_at

    @cuda.jit(device=True)
    def weight_at(weight, k, source, slot):
        """Weight of channel `k` that meets a source at a slot, zero where there is none."""
        value = float32(0)
        if k < out_channels and source < sources:
            tap_d, c = source // in_channels, source % in_channels
            row = int64(k) * in_channels + c
            value = weight[uint64((row * kernel_d + tap_d) * kernel_plane + slot % kernel_plane)]
        return value

    @cuda.jit(launch_bounds=THREADS)
    def pack_weights(weight, scratch, absent):
        """Pack the weights, note the factors that undo their scale, and mark records as absent.

        `absent` words of records are marked, by all blocks; those beyond the 16-channel tiles do
        nothing else.
        """
        exponents = cuda.shared.array(CHANNELS, int32)
        slots = cuda.const.array_like(slot_table)
        thread = int32(cuda.threadIdx.x)
        first_k = int32(cuda.blockIdx.x * CHANNELS)
        i = int32(cuda.grid(1))
        while i < absent:
            scratch[uint64(records_at + i)] = ABSENT
            i = int32(i + cuda.gridsize(1))
        if int32(cuda.blockIdx.x) >= packed_tiles:
            return

        channel = int32(thread // LANES_PER_CHANNEL)
        k = int32(first_k + channel)
        peak = float32(0)
        if k < out_channels:
            i = int32(thread % LANES_PER_CHANNEL)
            while i < taps:
                value = abs(weight[uint64(int64(k) * taps + i)])
                if value < INFINITY:
                    peak = max(peak, value)
                i = int32(i + LANES_PER_CHANNEL)
        distance = LANES_PER_CHANNEL // 2
        while distance > 0:
            peak = max(peak, cuda.shfl_xor_sync(FULL_WARP, peak, distance))
            distance //= 2
        if thread % LANES_PER_CHANNEL == 0:
            exponent = scale_exponent(ptx.float_bits(peak)) if halves else int32(127)
            exponents[channel] = exponent
            factor = ptx.float_bits(power_of_two(254 - exponent))
            scratch[uint64(unscale_at + first_k + channel)] = factor
        cuda.syncthreads()

        item = thread
        while item < chunks * steps * (WARP * 4):
            word, lane = int32(item % 4), int32(item // 4 % WARP)
            step = int32(item // (4 * WARP))
            chunk, step = int32(step // steps), int32(step % steps)
            channel = int32(lane // 4 + word % 2 * 8)
            slot = slots[step * 4 + lane % 4]
            high, low = uint32(0), uint32(0)
            if slot >= 0:
                plane = int32(chunk * planes + slot // kernel_plane)
                source = int32((2 * plane + word // 2) * values_per_word)
                k, scale = int32(first_k + channel), power_of_two(exponents[channel])
                first = weight_at(weight, k, source, slot)
                if halves:
                    second = weight_at(weight, k, int32(source + 1), slot)
                    high, low = ptx.split_halves(first * scale, second * scale)
                else:
                    high = ptx.to_tf32(first)
            target = (int64(cuda.blockIdx.x) * chunks + chunk) * (parts * part_words)
            target += int32(int32(step * WARP + lane) * 4 + word)
            scratch[uint64(target)] = high
            if split:
                scratch[uint64(target + part_words)] = low
            item = int32(item + THREADS)

    return pack_weights
