"""The fast backward pass: every product on tensor cores, nothing but dz in between.

The mathematics is that of `clear`. What differs is who does it: z is computed by forward's tiles
and stays in registers (`chain_tiles`); dz goes to memory once, in halves, laid out for the two
products that follow (`weight_gradient`, `input_gradient`). These are as accurate as rung ``split``
is, by three products of halves, or take one of them with ``precision="tf32"``.

dz is as large as half the output (as the output, in two halves), so it is not made all at once: a
run of samples goes through all kernels before the next one, and they share the memory.

Launch: pack the weights; statistics and their pooling, unless forward kept them; then for each run
        of samples the chain, dweight, dx; and at the end the sums over all samples: a kernel for
        dweight, and one for dbias, dgamma and dbeta. The chain is one kernel where the
        tiles of two samples fit on the GPU together, else sums, means and gradient.
        Kernels whose results nobody wants are not launched.
Shapes: those of `clear`; dz and what the halves left over, (samples, D, H, W, K / 2) words each.
Bytes:  with E the bytes of grad_out: x for the statistics; x + E for the chain (twice, in three
        kernels), and E / 2 of dz written (E with ``"ieee"``), which dweight and dx read once each;
        x for dweight; dx.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import cuda, float64, int32, int64, uint64
from torch import Tensor

from numba_fused.backward.chain_tiles import (
    MEANS_THREADS,
    POSITION_WORDS,
    ChainKernels,
    chain_kernels,
)
from numba_fused.backward.clear_kernels import block_sum
from numba_fused.backward.input_gradient import (
    MOST_ROW_GROUPS,
    InputTile,
    input_gradient_kernel,
    pack_kernel,
    quickest_tile,
)
from numba_fused.backward.input_gradient import THREADS as INPUT_THREADS
from numba_fused.backward.operands import Operands, Wanted
from numba_fused.backward.weight_gradient import (
    SUM_WARPS,
    WeightTile,
    weight_gradient_kernel,
    weight_sum_kernel,
)
from numba_fused.backward.weight_gradient import THREADS as WEIGHT_THREADS
from numba_fused.device.reductions import WARP
from numba_fused.device.tensor_tile import power_of_two
from numba_fused.device.tile_shape import CHANNELS, RECORD_WORDS
from numba_fused.ladder.rung import Ledger, seed_bytes, vector_bytes
from numba_fused.ladder.rung_9_pipelined import resident_blocks
from numba_fused.ladder.tensor_cores import (
    LEAST_CAPABILITY,
    TileKind,
    TilePlan,
    pack,
    plan_for,
    processor_shared_bytes,
    tile_limit,
    tile_plan,
    tile_shape,
)
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
MOST_DZ_BYTES = 128 * 2**20  # of a run of samples
MOST_CHANNELS = 1024  # of the output, whose sums `means_kernel` holds in shared memory
OTHER_SHARED_BYTES = 8 * 1024  # what the system takes, and arrays of fixed size
ORIGINAL = (1, 1, 1)
SUM_THREADS = 512


def kind(spec: BlockSpec) -> TileKind:
    """Pairs of halves, in one part or in two."""
    return TileKind(values_per_word=2, split=spec.precision == "ieee", one_pass=False)


def limit(spec: BlockSpec) -> str | None:
    """Why these kernels cannot differentiate `spec`, or None."""
    if (reason := tile_limit(spec, kind(spec))) is not None:
        return reason
    if spec.stride3 != ORIGINAL or spec.dilation3 != ORIGINAL:
        return (
            f"it takes stride 1 and dilation 1, and the convolution has stride {spec.stride} and "
            f"dilation {spec.dilation}"
        )
    if spec.out_channels > MOST_CHANNELS:
        return f"it takes {MOST_CHANNELS} output channels, and there are {spec.out_channels}"
    shape = tile_shape(spec, kind(spec))
    tile = InputTile(shape, 1)
    if tile.row_groups > MOST_ROW_GROUPS:
        return (
            f"in_channels * kernel depth is {tile.rows}, and registers hold "
            f"{MOST_ROW_GROUPS * CHANNELS}"
        )
    needed = max(tile.shared_bytes, WeightTile(shape).shared_bytes) + OTHER_SHARED_BYTES
    if needed > processor_shared_bytes():
        return (
            f"its tiles need {needed // 1024} KB of shared memory, and an SM has "
            f"{processor_shared_bytes() // 1024}"
        )
    return None


@cuda.jit(launch_bounds=(SUM_THREADS, 1))
def parameter_sums_kernel(
    dz_sums, sum_gx, sum_g, scales, batch, tile_positions, wanted, grad_bias, grad_gamma, grad_beta
):
    """dbias, dgamma and dbeta as far as they are `wanted`: block (k, 0), (k, 1) and (k, 2).

    dbias adds up dz over all samples' tiles, rid of their scales; the others their sums of g.
    """
    scratch = cuda.shared.array(WARP, float64)
    k, channels, parameter = int32(cuda.blockIdx.x), int32(cuda.gridDim.x), cuda.blockIdx.y
    if not wanted[parameter]:
        return
    total = float64(0)
    if parameter == 0:
        n = int32(cuda.threadIdx.x // WARP)
        while n < batch:
            of_sample = float64(0)
            first = (int64(n) * channels + k) * tile_positions
            i = int32(cuda.laneid)
            while i < tile_positions:
                of_sample += dz_sums[uint64(first + i)]
                i = int32(i + WARP)
            total += of_sample * power_of_two(int32(254) - scales[2 * n])
            n = int32(n + SUM_THREADS // WARP)
    else:
        sums = sum_gx if parameter == 1 else sum_g
        n = int32(cuda.threadIdx.x)
        while n < batch:
            total += sums[uint64(int64(n) * channels + k)]
            n = int32(n + SUM_THREADS)
    total = block_sum(total, scratch)
    if cuda.threadIdx.x == 0:
        if parameter == 0:
            grad_bias[k] = total
        elif parameter == 1:
            grad_gamma[k] = total
        else:
            grad_beta[k] = total


class BackwardPlan:
    """What of a call depends on its tiles alone.

    Attributes
    ----------
    tiles : TilePlan
        Forward's.
    kernels : ChainKernels
    weight_tile : WeightTile
    input_tile : InputTile
    tile_positions : int
        Tiles of a sample that have the same channels.
    sample_words : int
        Words of a sample's dz, of one part.
    samples, runs : int
        In a run that goes through all kernels, and how many of these there are.
    resident_blocks : int
        What the GPU holds at once of `chain_kernel`.
    chain_record_words : int
        Words of the records that all tiles of a call wait for.
    one_pass : bool
        Whether the chain is one kernel: with all tiles of two samples resident, or most blocks
        would wait for the rest of the one they compute; and with all channels in a tile, so that
        what a block pools fits the memory of its own sums.
    """

    def __init__(self, spec: BlockSpec, tiles: TilePlan) -> None:
        self.tiles = tiles
        shape = tiles.shape
        self.kernels: ChainKernels = chain_kernels(shape)
        self.weight_tile = WeightTile(shape)
        self.tile_positions = shape.tiles_per_sample // shape.tiles[0]
        self.sample_words = math.prod(shape.out_size) * POSITION_WORDS * shape.packed_tiles
        sample_bytes = 4 * self.sample_words * (2 if shape.split else 1)
        runs = -(-spec.batch // max(1, MOST_DZ_BYTES // sample_bytes))
        self.samples = -(-spec.batch // runs)
        self.runs = -(-spec.batch // self.samples)
        self.input_tile = quickest_tile(shape, self.samples)
        self.resident_blocks = resident_blocks(shape)
        planes = spec.batch * spec.out_channels
        self.chain_record_words = RECORD_WORDS * planes * self.tile_positions
        self.one_pass = (
            2 * shape.tiles_per_sample <= self.resident_blocks
            and shape.tiles[0] == 1
            and self.marked_words < 2**31
        )

    @property
    def marked_words(self) -> int:
        """Words that are marked if there is one pass: all records, and a ticket for each run."""
        return int(self.tiles.record_words) + self.chain_record_words + self.runs


backward_plan = lru_cache(maxsize=1024)(BackwardPlan)


def gradients(
    launch: Launcher,
    operands: Operands,
    statistics: tuple[Tensor, Tensor] | None,
    wanted: Wanted,
) -> list[Tensor | None]:
    """As `clear.gradients`."""
    if not any(wanted):
        return [None] * 5
    return Backward(launch, operands, statistics, wanted).gradients()


class Backward:
    """One call: its tensors, and a method for each kernel.

    Parameters
    ----------
    launch, operands, statistics, wanted
        As `gradients` takes them.
    """

    def __init__(
        self,
        launch: Launcher,
        operands: Operands,
        statistics: tuple[Tensor, Tensor] | None,
        wanted: Wanted,
    ) -> None:
        spec = operands.spec
        self.launch, self.operands, self.wanted = launch, operands, wanted
        tiles = plan_for(spec, kind(spec), operands.x, operands.grad_out)
        self.plan = plan = backward_plan(spec, tiles)
        self.shape = tiles.shape
        self.one_pass = plan.one_pass and any(wanted[:3])
        words = plan.marked_words if self.one_pass else int(tiles.record_words)
        absent = words if self.one_pass else 0
        self.scratch = pack(launch, tiles, operands.weight, words, absent)
        self.mean, self.rstd = statistics or self.group_statistics()

        planes, run_positions = spec.batch * spec.out_channels, plan.samples * plan.tile_positions
        if self.one_pass:
            self.tickets = self.scratch[-plan.runs :]
            self.records = self.scratch[-plan.runs - plan.chain_record_words : -plan.runs]
        else:
            words = RECORD_WORDS * run_positions * spec.out_channels
            self.records = self.empty(words, torch.uint32)
            run_threads = plan.samples * self.shape.tiles_per_sample * self.shape.threads
            self.passes = self.empty(2 * run_threads, torch.uint32)
            self.coefficients = self.floats(4 * planes)
        self.sum_g, self.sum_gx = self.floats(planes), self.floats(planes)
        self.scales = self.empty(2 * spec.batch, torch.int32)
        if any(wanted[:3]):
            self.dz = self.empty(plan.samples * plan.sample_words, torch.uint32)
            self.rest = torch.empty_like(self.dz) if self.shape.split else self.dz
            self.dz_records = self.floats(planes * plan.tile_positions)
        if wanted[0]:
            self.grad_x = torch.empty_like(operands.x)
            self.turned_weights = self.empty(plan.input_tile.packed_words, torch.uint32)
            self.unscale = self.floats(CHANNELS * plan.input_tile.row_groups)
        if wanted[1]:
            parts = spec.batch * plan.weight_tile.parts
            self.partial = self.floats(parts * operands.weight.numel())

    def empty(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory on the operands' device."""
        return torch.empty(size, dtype=dtype, device=self.operands.x.device)

    def floats(self, size: int) -> Tensor:
        """Memory for fp32 values."""
        return self.empty(size, torch.float32)

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Strictly between which the chain passes a gradient."""
        cap, min_value, max_value = self.operands.arguments.bounds
        return min_value, min(cap, max_value)

    def gradients(self) -> list[Tensor | None]:
        """All kernels, in order."""
        batch, step = self.operands.spec.batch, self.plan.samples
        if self.wanted[0]:
            self.pack_turned_weights()
        for first in range(0, batch, step):
            samples = min(step, batch - first)
            if self.one_pass:
                self.chain(first, samples)
            else:
                self.sums(first, samples)
                self.means(first, samples)
                if any(self.wanted[:3]):
                    self.convolution_gradient(first, samples)
            if self.wanted[1]:
                self.weight_gradient(first, samples)
            if self.wanted[0]:
                self.input_gradient(first, samples)
        grad_x = self.grad_x if self.wanted[0] else None
        grad_weight = self.weight_sum() if self.wanted[1] else None
        return [grad_x, grad_weight, *self.parameter_sums()]

    # ---- one method for each kernel -------------------------------------------------------------

    def launch_tiles(
        self, kernel: Any, blocks: int, *arguments: Any, cooperative: bool = False
    ) -> None:
        """One of the kernels that convolve."""
        self.launch(
            kernel,
            blocks,
            self.shape.threads,
            self.operands.x,
            self.scratch,
            self.operands.bias,
            *arguments,
            shared_bytes=self.shape.shared_bytes,
            cooperative=cooperative,
        )

    def group_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and rstd of each (sample, group)."""
        operands, batch = self.operands, self.operands.spec.batch
        kept = self.floats(2 * operands.arguments.group_count)
        self.launch_tiles(self.plan.kernels.statistics, batch * self.shape.tiles_per_sample)
        self.launch(
            self.plan.kernels.pool,
            batch * self.shape.tiles[0],
            self.shape.threads,
            self.scratch,
            operands.arguments.eps,
            kept,
        )
        mean, rstd = kept.chunk(2)
        return mean, rstd

    def sums(self, first: int, samples: int) -> None:
        """Records of g's sums, and where the chain passes a gradient."""
        operands, arguments = self.operands, self.operands.arguments
        _, drop_threshold, keep_scale = arguments.dropout
        self.launch_tiles(
            self.plan.kernels.sums,
            samples * self.shape.tiles_per_sample,
            operands.gamma,
            operands.beta,
            self.mean,
            self.rstd,
            operands.grad_out,
            self.records,
            self.passes,
            np.int32(first),
            self.bounds,
            operands.seed,
            drop_threshold,
            keep_scale,
        )

    def means(self, first: int, samples: int) -> None:
        """Sums of each channel, coefficients of dz, scales."""
        self.launch(
            self.plan.kernels.means,
            samples,
            MEANS_THREADS,
            self.records,
            self.operands.gamma,
            self.rstd,
            self.sum_g,
            self.sum_gx,
            self.coefficients,
            self.scales,
            np.int32(first),
        )

    def convolution_gradient(self, first: int, samples: int) -> None:
        """dz of some samples."""
        operands = self.operands
        self.launch_tiles(
            self.plan.kernels.gradient,
            samples * self.shape.tiles_per_sample,
            self.mean,
            self.rstd,
            self.coefficients,
            operands.grad_out,
            self.passes,
            self.dz,
            self.rest,
            self.dz_sums(first),
            np.int32(first),
            operands.arguments.dropout[2],
        )

    def dz_sums(self, first: int) -> Tensor:
        """Where the sums of dz of a run's tiles go."""
        return self.dz_records[first * self.operands.spec.out_channels * self.plan.tile_positions :]

    def chain(self, first: int, samples: int) -> None:
        """`sums`, `means` and `convolution_gradient` in one launch."""
        operands, arguments = self.operands, self.operands.arguments
        _, drop_threshold, keep_scale = arguments.dropout
        tiles = samples * self.shape.tiles_per_sample
        self.launch_tiles(
            self.plan.kernels.one_pass,
            min(tiles, self.plan.resident_blocks),
            operands.gamma,
            operands.beta,
            self.mean,
            self.rstd,
            operands.grad_out,
            self.records,
            self.tickets[first // self.plan.samples :],
            self.sum_g,
            self.sum_gx,
            self.scales,
            self.dz,
            self.rest,
            self.dz_sums(first),
            np.int32(first),
            np.int32(tiles),
            self.bounds,
            operands.seed,
            drop_threshold,
            keep_scale,
            cooperative=True,
        )

    def weight_gradient(self, first: int, samples: int) -> None:
        """What some samples add to dweight."""
        tile = self.plan.weight_tile
        self.launch(
            weight_gradient_kernel(tile),
            tile.blocks(samples),
            WEIGHT_THREADS,
            self.operands.x,
            self.dz,
            self.rest,
            self.scales,
            self.partial,
            np.int32(first),
            shared_bytes=tile.shared_bytes,
        )

    def weight_sum(self) -> Tensor:
        """dweight, flat."""
        weight = self.operands.weight
        found, size = torch.empty_like(weight), weight.numel()
        self.launch(
            weight_sum_kernel(self.plan.weight_tile.parts, size),
            -(-size // WARP),
            SUM_WARPS * WARP,
            self.partial,
            self.scales,
            np.int32(self.operands.spec.batch),
            found,
        )
        return found

    def parameter_sums(self) -> list[Tensor | None]:
        """dbias, dgamma and dbeta."""
        wanted = self.wanted[2:]
        channels = self.operands.spec.out_channels
        found = [self.floats(channels) if want else None for want in wanted]
        if any(wanted):
            unused = self.sum_g  # in place of what the kernel does not touch
            self.launch(
                parameter_sums_kernel,
                (channels, len(wanted)),
                SUM_THREADS,
                self.dz_records if any(self.wanted[:3]) else unused,
                self.sum_gx,
                self.sum_g,
                self.scales,
                np.int32(self.operands.spec.batch),
                np.int32(self.plan.tile_positions),
                wanted,
                *(unused if gradient is None else gradient for gradient in found),
            )
        return found

    def pack_turned_weights(self) -> None:
        """The weights as dx takes them."""
        tile = self.plan.input_tile
        self.launch(
            pack_kernel(tile),
            CHANNELS * tile.row_groups,
            WARP,
            self.operands.weight,
            self.turned_weights,
            self.unscale,
        )

    def input_gradient(self, first: int, samples: int) -> None:
        """dx of some samples."""
        tile = self.plan.input_tile
        self.launch(
            input_gradient_kernel(tile),
            tile.blocks(samples),
            INPUT_THREADS,
            self.dz,
            self.rest,
            self.turned_weights,
            self.unscale,
            self.scales,
            self.grad_x,
            np.int32(first),
            shared_bytes=tile.shared_bytes,
        )


# ---- the ledger ---------------------------------------------------------------------------------


def ledger(spec: BlockSpec, wanted: Wanted, *, has_statistics: bool) -> Ledger:
    """See the lesson; besides, the small change that kernels hand each other.

    Each run of samples reads the parameters again, and each group of taps x and dz.
    """
    if not any(wanted):
        return Ledger(0, 0, 0)
    plan = backward_plan(spec, tile_plan(spec, kind(spec)))
    shape, weight_tile, input_tile = plan.tiles.shape, plan.weight_tile, plan.input_tile
    batch, runs = spec.batch, plan.runs
    vector, weight = vector_bytes(spec), math.prod(spec.weight_shape) * spec.itemsize
    pairs = 2 * batch * spec.num_groups * spec.itemsize
    packed, factors = 4 * shape.unscale_at, vector
    planes = batch * vector  # a number for each (sample, channel)
    records, sums = planes * plan.tile_positions, 4 * int(plan.tiles.record_words)
    passes = 8 * batch * shape.tiles_per_sample * shape.threads
    dz = 4 * batch * plan.sample_words * (2 if shape.split else 1)
    convolving = spec.x_bytes + runs * (packed + factors + vector)
    scales = 8 * batch

    one_pass = plan.one_pass and any(wanted[:3])
    marked = 4 * plan.marked_words if one_pass else 0
    kernels = [(2 * weight, packed + 4 * (shape.records_at - shape.unscale_at) + marked)]
    launches = 1
    if not has_statistics:
        kernels += [(spec.x_bytes + packed + factors + vector, sums), (sums, pairs)]
        launches += 2
    of_tiles = convolving + spec.output_bytes + pairs
    for_sums = of_tiles + runs * (2 * vector + seed_bytes(spec))
    sums_written = 2 * planes + scales
    if one_pass:
        chain_records = RECORD_WORDS * records
        kernels.append((for_sums + chain_records, chain_records + sums_written + dz + records))
        launches += runs
    else:
        kernels.append((for_sums, RECORD_WORDS * records + passes))
        kernels.append(
            (RECORD_WORDS * records + pairs // 2 + runs * vector, sums_written + 4 * planes)
        )
        launches += 2 * runs
        if any(wanted[:3]):
            kernels.append((of_tiles + 3 * planes + passes, dz + records))
            launches += runs
    if wanted[0]:
        turned, unscale = 4 * input_tile.packed_words, 4 * input_tile.rows
        kernels.append((weight, turned + 4 * CHANNELS * input_tile.row_groups))
        kernels.append((dz + scales // 2 + runs * (turned + unscale), spec.x_bytes))
        launches += 1 + runs
    if wanted[1]:
        partial = batch * weight_tile.parts * weight
        kernels.append((weight_tile.tap_groups * (spec.x_bytes + dz) + scales // 2, partial))
        kernels.append((partial + scales, weight))
        launches += 1 + runs
    if wanted[2]:
        kernels.append((records + scales // 2, vector))
    kernels += [(planes, vector)] * sum(wanted[3:])
    launches += any(wanted[2:])
    read, written = map(sum, zip(*kernels, strict=True))
    return Ledger(read, written, launches)
