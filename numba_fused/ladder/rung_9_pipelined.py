"""One pass: a tile waits in shared memory for its sample's statistics, while the next is convolved.

The tiles that all SMs hold together are more than a sample: 132 blocks with two parked tiles and
one in registers are 26 MB on an H200, and a sample of the benchmark case is 3.4. So nobody has to
convolve twice. And as one phase after the other leaves an SM waiting - for copies, for matrix
instructions, for other blocks - each phase has warps of its own, which hand tiles on:

    pack        4 warps: bring the input to shared memory, scale it and pack it into words
    convolve    8 warps: multiply, publish the tile's sums, park the tile in shared memory
    finish      2 teams of 8 warps, in turns: draw the mask, wait for the sums of the sample's other
                tiles, normalise, min, clamp and drop in place, and have the copy engine write it

Who convolves needs 128 registers a thread, the others 48: warps hand registers to each other
(``setmaxnreg``), or so many would not fit on an SM. Named barriers pass words and tiles on: who
has filled or emptied a buffer arrives, who waits for that synchronises.

Where more than 16 planes of input are packed for each 16 output channels, and on GPUs before
sm_90, all warps do all of it and wait with the tile in registers: to pack and to convolve takes
most of the time then, and 16 warps do it faster than 12.

Sums need neither counter nor fence: before the launch each is marked as absent by bits that no
arithmetic makes, so a reader sees by the value itself whether it is there. The grid is as large as
the GPU can hold at once (a cooperative launch guarantees it), and a sample's tiles are taken by
neighbouring blocks at the same time, so every wait ends.

Launch: a kernel that packs the weights and marks the sums as absent, then persistent blocks.
Shapes: x (N, C, D, H, W); out flat; scratch: packed weights, factors, (N, records, tiles, 2) sums.
Bytes:  x once, out once: nothing is left to save.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from numba import cuda, float32, int32, uint32, uint64

from numba_fused.device import ptx
from numba_fused.device.finishing import finishing_functions
from numba_fused.device.tensor_tile import (
    ACCUMULATORS,
    PLACE_SIZE,
    SCALE,
    TILE,
    last_scale,
    power_of_two,
    tile_functions,
)
from numba_fused.device.tile_shape import CHANNELS, TEAMS, WARP, TileShape
from numba_fused.ladder.rung import Ledger, Operands
from numba_fused.ladder.tensor_cores import (
    LEAST_CAPABILITY,
    TileKind,
    current_shape,
    prepare,
    processor_shared_bytes,
    tile_ledger,
    tile_limit,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
keeps_statistics = True
H200_PROCESSORS = 132
# Barriers: words are packed, or may be overwritten; a team's tile is parked, or is finished.
WORDS_PACKED, WORDS_READ = 3, 4
PARKED, FINISHED = 5, 5 + TEAMS


def kind(spec: BlockSpec) -> TileKind:
    """Pairs of halves, as in rung 8, and tiles that wait."""
    return TileKind(values_per_word=2, split=spec.precision == "ieee", one_pass=True)


@cache
def kernel(shape: TileShape) -> Any:
    """The persistent kernel, specialised on a tile's shape."""
    return parking_kernel(shape) if shape.parked else waiting_kernel(shape)


def parking_kernel(shape: TileShape) -> Any:
    """Warps that pack, convolve and finish, and hand tiles on."""
    pack_tiles, convolve_tiles, finish_tiles = packing(shape), convolving(shape), finishing(shape)
    first_packing, first_finishing = shape.first_packing_thread, shape.first_finishing_thread
    exchanges_registers, parked = shape.exchanges_registers, shape.parked

    @cuda.jit(launch_bounds=(shape.block_threads, shape.blocks_per_processor))
    def pipelined(x, scratch, bias, gamma, beta, kept, out, eps, tiles, bounds, seed, dropout):
        """Tiles ``blockIdx.x``, ``blockIdx.x + gridDim.x`` ... from convolution to output."""
        packed_scale = cuda.shared.array(1, int32)
        parked_scales = cuda.shared.array(parked, int32)
        if cuda.threadIdx.x < first_packing:
            if exchanges_registers:
                ptx.take_registers()
            convolve_tiles(scratch, bias, tiles, packed_scale, parked_scales)
        else:
            if exchanges_registers:
                ptx.give_registers()
            if cuda.threadIdx.x < first_finishing:
                pack_tiles(x, tiles, packed_scale)
            else:
                parameters = bias, gamma, beta, eps
                finish_tiles(
                    scratch, parameters, kept, out, tiles, bounds, seed, dropout, parked_scales
                )

    return pipelined


def packing(shape: TileShape) -> Any:
    """What the warps do that pack."""
    f = tile_functions(shape)
    locate, stage_input, chunk_exponent = f.locate, f.stage_input, f.chunk_exponent
    together, packing_thread, pack_words = f.packing_together, f.packing_thread, f.pack_words
    packing_warps = shape.packing_threads // WARP
    passing = shape.threads + shape.packing_threads
    chunks, staged_input_at = shape.chunks, shape.staged_input_at
    places_size = 2 * PLACE_SIZE

    @cuda.jit(device=True)
    def place_at(turn):
        """Where of two places that of a turn begins."""
        return uint64(turn % uint32(2) * uint32(PLACE_SIZE))

    @cuda.jit(device=True)
    def pack_tiles(x, tiles, packed_scale):
        """Bring the input of the block's tiles to shared memory and pack it into words."""
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        staged = memory[staged_input_at:]
        peaks = cuda.shared.array(packing_warps, uint32)
        places = cuda.shared.array(places_size, int32)
        tile, turn = int32(cuda.blockIdx.x), uint32(0)
        if packing_thread() == 0:
            locate(tile, places)
        together()
        stage_input(x, staged, places, 0)
        while tile < tiles:
            place = ptx.beyond(places, place_at(turn))
            next_place = ptx.beyond(places, place_at(turn + uint32(1)))
            tile = int32(tile + cuda.gridDim.x)
            if packing_thread() == 0:
                locate(tile, next_place)
            exponent, chunk = int32(127), int32(0)
            while chunk < chunks:
                ptx.wait_for_copies()
                together()
                exponent = chunk_exponent(staged, peaks, chunk, exponent)
                if turn > 0 or chunk > 0:
                    ptx.barrier(WORDS_READ, int32(passing))
                pack_words(staged, words, power_of_two(exponent))
                if packing_thread() == 0:
                    packed_scale[0] = exponent
                ptx.arrive(WORDS_PACKED, int32(passing))
                together()
                chunk = int32(chunk + 1)
                if chunk < chunks:
                    stage_input(x, staged, place, chunk)
                elif tile < tiles:
                    stage_input(x, staged, next_place, 0)
            turn = uint32(turn + uint32(1))

    return pack_tiles


def convolving(shape: TileShape) -> Any:
    """What the warps do that convolve."""
    f = tile_functions(shape)
    locate, clear, rescale, add_chunk = f.locate, f.clear, f.rescale, f.add_chunk
    together, packed_tile = f.together, f.packed_tile
    warp_moments, publish_sums, stage_output = f.warp_moments, f.publish_sums, f.stage_output
    warps, chunks, parked = shape.warps, shape.chunks, shape.parked
    passing_words = shape.threads + shape.packing_threads
    passing_tiles = shape.threads + shape.team_threads
    parked_at, output_values = shape.parked_at, shape.output_values
    scale_at = last_scale(shape)
    moments_shape, places_size = (3, warps, CHANNELS), warps * PLACE_SIZE

    @cuda.jit(device=True)
    def note_at(size):
        """Where this warp's notes begin; found anew, rather than held in a register."""
        return uint64(ptx.thread_index() // uint32(WARP) * uint32(size))

    @cuda.jit(device=True)
    def convolve_tiles(scratch, bias, tiles, packed_scale, parked_scales):
        """Convolve the block's tiles, publish their sums, and park them.

        Each warp has notes of its own in shared memory: registers are for sums.
        """
        words, memory = cuda.shared.array(0, uint32), cuda.shared.array(0, float32)
        moments = cuda.shared.array(moments_shape, float32)
        places = cuda.shared.array(places_size, int32)
        turns = cuda.shared.array(warps, uint32)
        acc = cuda.local.array(ACCUMULATORS, float32)
        if ptx.lane_index() == 0:
            turns[note_at(1)] = 0
            locate(int32(cuda.blockIdx.x), ptx.beyond(places, note_at(PLACE_SIZE)))
        cuda.syncwarp()
        while places[note_at(PLACE_SIZE) + uint64(TILE)] < tiles:
            clear(acc)
            place = ptx.beyond(places, note_at(PLACE_SIZE))
            chunk = int32(0)
            while chunk < chunks:
                ptx.barrier(WORDS_PACKED, int32(passing_words))
                exponent = packed_scale[0]
                rescale(acc, chunk, exponent, place[SCALE + (chunk + 1) % 2])
                if ptx.lane_index() == 0:
                    place[SCALE + chunk % 2] = exponent
                cuda.syncwarp()
                add_chunk(acc, scratch, words, packed_tile(place), chunk)
                ptx.arrive(WORDS_READ, int32(passing_words))
                chunk = int32(chunk + 1)
            place = ptx.beyond(places, note_at(PLACE_SIZE))
            warp_moments(acc, moments, place)
            together()
            publish_sums(scratch, bias, moments, place)
            turn = ptx.beyond(turns, note_at(1))
            if turn[0] >= uint32(parked):  # the tile that lay there before must be finished
                team = uint32(turn[0] + uint32(parked)) % uint32(TEAMS)
                ptx.barrier(int32(FINISHED + team), int32(passing_tiles))
            slot = uint32(turn[0] % uint32(parked))
            first = uint64(parked_at + slot * uint32(output_values))
            stage_output(acc, ptx.beyond(memory, first), place)
            if ptx.thread_index() == 0:
                parked_scales[slot] = place[scale_at]
            cuda.syncwarp()
            ptx.arrive(int32(PARKED + turn[0] % uint32(TEAMS)), int32(passing_tiles))
            cuda.syncwarp()
            if ptx.lane_index() == 0:
                turn[0] += uint32(1)
                locate(int32(place[TILE] + cuda.gridDim.x), place)
            cuda.syncwarp()

    return convolve_tiles


def finishing(shape: TileShape) -> Any:
    """What the warps do that finish."""
    f, g = tile_functions(shape), finishing_functions(shape)
    locate, hand_over, write_output = f.locate, f.hand_over, f.write_output
    wait_for_store, draw_streams = f.wait_for_store, g.draw_streams
    finishing_warp, team, team_warp = g.finishing_warp, g.team, g.team_warp
    find_coefficients, finish_parked = g.find_coefficients, g.finish_parked
    passing = shape.threads + shape.team_threads
    parked, parked_at, output_values = shape.parked, shape.parked_at, shape.output_values
    coefficients_shape = (3, TEAMS * shape.channels)
    places_size = TEAMS * shape.warps * PLACE_SIZE

    @cuda.jit(device=True)
    def finish_tiles(scratch, parameters, kept, out, tiles, bounds, seed, dropout, parked_scales):
        """Finish every second of the block's tiles: a warp its channels, without the others."""
        drop_threshold, keep_scale = dropout
        memory = cuda.shared.array(0, float32)
        coefficients = cuda.shared.array(coefficients_shape, float32)
        places = cuda.shared.array(places_size, int32)
        place = ptx.beyond(places, uint64(finishing_warp() * uint32(PLACE_SIZE)))
        if ptx.lane_index() == 0:
            locate(int32(cuda.blockIdx.x + team() * cuda.gridDim.x), place)
        cuda.syncwarp()
        while place[TILE] < tiles:
            bits = draw_streams(place, seed, drop_threshold)
            find_coefficients(scratch, parameters, kept, coefficients, place, keep_scale)
            ptx.barrier(int32(PARKED + team()), int32(passing))
            slot = uint32(team() % uint32(parked))
            staged = ptx.beyond(memory, uint64(parked_at + slot * uint32(output_values)))
            finish_parked(staged, coefficients, parked_scales[slot], place, bounds, bits)
            hand_over()
            cuda.syncwarp()
            write_output(staged, out, place, int32(team_warp()))
            wait_for_store()
            cuda.syncwarp()
            ptx.arrive(int32(FINISHED + team()), int32(passing))
            if ptx.lane_index() == 0:
                locate(int32(place[TILE] + TEAMS * cuda.gridDim.x), place)
            cuda.syncwarp()

    return finish_tiles


def waiting_kernel(shape: TileShape) -> Any:
    """Warps that do all there is to do, one after the other, and wait with a tile in registers."""
    f = tile_functions(shape)
    locate, stage_input, accumulate = f.locate, f.stage_input, f.accumulate
    warp_moments, publish_sums = f.warp_moments, f.publish_sums
    group_statistics, draw_bits = f.group_statistics, f.draw_bits
    finish, store, wait_for_store = f.finish, f.store, f.wait_for_store
    warps, staged_input_at = shape.warps, shape.staged_input_at
    moments_shape, statistics_shape = (3, warps, CHANNELS), (2, shape.channels)

    @cuda.jit(launch_bounds=(shape.threads, shape.blocks_per_processor))
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
            wait_for_store()  # the words go where the tile before was stored from
            cuda.syncthreads()
            accumulate(acc, x, scratch, words, staged_input, peaks, place)
            if cuda.threadIdx.x == 0:
                locate(int32(place[TILE] + cuda.gridDim.x), next_place)
            warp_moments(acc, moments, place)
            cuda.syncthreads()
            publish_sums(scratch, bias, moments, place)
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


def samples_at_once(spec: BlockSpec) -> float:
    """Samples whose sums the resident blocks publish before they finish a tile.

    A block parks tiles, and holds one more in registers.
    """
    shape = current_shape(spec, kind(spec))
    return resident_blocks(shape) * (shape.parked + 1) / shape.tiles_per_sample


def limit(spec: BlockSpec) -> str | None:
    """As the other tensor-core rungs, and a sample's tiles must be in flight together."""
    if (reason := tile_limit(spec, kind(spec))) is not None:
        return reason
    if samples_at_once(spec) >= 1:
        return None
    shape = current_shape(spec, kind(spec))
    tiles, blocks = shape.tiles_per_sample, resident_blocks(shape)
    return (
        f"a sample has {tiles} tiles, and the GPU holds {blocks} blocks at once, of "
        f"{shape.parked + 1} each"
    )


def forward(launch: Launcher, operands: Operands) -> None:
    """Two launches."""
    spec, x, out = operands.spec, operands.x, operands.out
    plan, scratch = prepare(launch, spec, kind(spec), x, operands.weight, out)
    launch(
        kernel(plan.shape),
        min(int(plan.tiles), resident_blocks(plan.shape)),
        plan.shape.block_threads,
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
