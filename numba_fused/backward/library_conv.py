"""The library's convolutions, our kernels for everything between: for wide convolutions.

With many channels the three products of a backward pass are the vendor's ground, as forward's one
is (rung `library_conv`). That leaves three passes over tiles of planes (`device.planes`), with g,
xhat and the means of `clear`:

    moments   of z without its bias, which would move a mean and nothing else
    sums      of g and of g * xhat, over each tile
    gradient  dz over z, in place, and its sum over each tile

What a tile needs of its group its last warp merges from all of the group's tiles, while the other
warps draw the mask and z and grad_out are on their way from memory. Each pass begins where the one
before it ended, in what may still be in the L2 cache: moments and gradient take their tiles in
reverse.

Launch: cuDNN's convolution without bias; moments, sums and gradient, a tile a block; to add up
        the tiles of all samples a block for each channel, one launch for each of dgamma, dbeta and
        dbias; cuDNN's gradients of x and of the weight, by its deterministic algorithms.
        What nobody wants is not launched.
Shapes: z, dz, grad_out flat, (N * K * D * H * W,); partial (3, tiles); sum_g, sum_gx, sum_dz
        (tiles,), N * K times those of a plane.
Bytes:  with E the bytes of z. The convolution reads x and writes E; the moments read E; the sums
        read 2 E; the gradient reads 2 E and writes E; dweight reads x + E; dx reads E and writes x.
        In all 2 x + 7 E read, and x + 2 E written. The one tensor here as large as the output is z,
        which becomes dz.
Next:   where convolutions are narrow, they take less time than what is written and read for them:
        `tensor_core` computes z wherever it needs it, and writes dz in halves.

Statistics that forward kept are not looked at: their means include the bias, and taking a large
one off again would cost digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import cuda, float64, int32, int64, uint32, uint64
from torch import Tensor

from numba_fused.backward.clear_kernels import block_sum
from numba_fused.backward.operands import Operands, Wanted
from numba_fused.device.convolution import divide
from numba_fused.device.planes import (
    ELEMENTS_PER_THREAD,
    MASK_WORDS,
    THREADS,
    VECTOR,
    WORD_BITS,
    Tiling,
    draw_mask,
    drop_or_scale,
    first_of_thread,
    launch_moments,
    make_load_share,
    plane_statistics,
    vector_width,
    word_threshold,
)
from numba_fused.device.ptx import store_4
from numba_fused.device.reductions import WARP, warp_sum
from numba_fused.ladder.rung import (
    Ledger,
    convolution_bytes,
    sample_limit,
    seed_bytes,
    vector_bytes,
)
from numba_fused.reference import convolution, convolution_precision
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

PARTIALS_PER_GROUP = 256  # aimed at: each block of two kernels merges all of its group's

limit = sample_limit
least_capability = (0, 0)

# ---- what the two passes share ------------------------------------------------------------------
#
# `planes` is (plane_size, tiles_per_plane, partials_per_group, channels_per_group), `bounds` is
# (lower, upper), strictly between which the chain passes a gradient, and `mask` (rows_per_plane,
# width, drop_threshold, keep_scale). `affine` is (centre, rstd, gamma, beta) of a plane:
# xhat = (z - centre) * rstd, h = xhat * gamma + beta.


@cache
def make_fetch(vector: int, draws: bool) -> Any:
    """How a block gets what it needs of a tile."""
    load_share = make_load_share(vector)

    @cuda.jit(device=True)
    def fetch(values, gradients, keep, z, grad_out, plane, start, size, plane_size, seed, mask):
        """Read this thread's share of z and grad_out; draw the mask while they are on their way."""
        first, begin = int64(plane) * plane_size + start, first_of_thread(vector)
        load_share(values, z, first, begin, size)
        load_share(gradients, grad_out, first, begin, size)
        if draws:
            rows_per_plane, width, drop_threshold, _ = mask
            plane_row = int64(plane) * rows_per_plane
            draw_mask(keep, uint64(seed[0]), plane_row, start, size, width, drop_threshold)

    return fetch


@cuda.jit(device=True)
def merge_moments(affine, partial, bias, gamma, beta, plane, planes, eps):
    """By one warp, for its block: `affine`, in shared memory."""
    _, _, partials_per_group, channels_per_group = planes
    centre, rstd = plane_statistics(
        partial, bias, plane, partials_per_group, channels_per_group, eps
    )
    if cuda.laneid == 0:
        _, channel = divide(plane, bias.size)
        affine[0], affine[1] = centre, rstd
        affine[2], affine[3] = gamma[uint32(channel)], beta[uint32(channel)]


@cache
def make_go_back(vector: int, draws: bool) -> Any:
    """How a thread goes back through the chain."""

    @cuda.jit(device=True)
    def go_back(values, gradients, keep, size, affine, bounds, mask):
        """Turn z into xhat and grad_out into g.

        What was dropped is multiplied by zero, so that a NaN stays one; what was cut off gets zero
        itself. NaN is on no side of a bound: cut off.
        """
        centre, rstd, gamma, beta = affine[0], affine[1], affine[2], affine[3]
        begin = first_of_thread(vector)
        word, bit = divide(begin, WORD_BITS)
        for v in range(0, ELEMENTS_PER_THREAD, vector):
            if int32(begin + v * WARP) < size:
                bits = uint32(keep[uint32(word + v)] >> uint32(bit)) if draws else uint32(0)
                for e in range(vector):
                    xhat = (values[v + e] - centre) * rstd
                    h = xhat * gamma + beta
                    g = gradients[v + e]
                    if draws:
                        g = drop_or_scale(g, bits, e, mask[3])
                    if not (bounds[0] < h and h < bounds[1]):
                        g = values.dtype.type(0)
                    values[v + e], gradients[v + e] = xhat, g

    return go_back


# ---- the kernels, after `planes.make_moments_kernel` --------------------------------------------


@cache
def make_sums_kernel(vector: int, draws: bool) -> Any:
    """The sums kernel for accesses of `vector` values, with dropout or without."""
    fetch, go_back = make_fetch(vector, draws), make_go_back(vector, draws)

    @cuda.jit(launch_bounds=THREADS)
    def sums_kernel(
        z,
        grad_out,
        bias,
        gamma,
        beta,
        partial,
        sum_g,
        sum_gx,
        tile_size,
        planes,
        eps,
        bounds,
        seed,
        mask,
    ):
        """Sums of g and of g * xhat over one tile, a block's worth of its values at a time."""
        scratch_g = cuda.shared.array(WARP, z.dtype)
        scratch_gx = cuda.shared.array(WARP, z.dtype)
        affine = cuda.shared.array(4, z.dtype)
        keep = cuda.shared.array(MASK_WORDS, uint32)
        values = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        gradients = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        plane, tile_of_plane = divide(int32(cuda.blockIdx.x), planes[1])
        start = int32(tile_of_plane * tile_size)
        stop = int32(min(int32(start + tile_size), planes[0]))
        step = int32(ELEMENTS_PER_THREAD * cuda.blockDim.x)
        zero = z.dtype.type(0)
        total_g, total_gx = zero, zero
        while start < stop:
            size = int32(min(step, int32(stop - start)))
            fetch(values, gradients, keep, z, grad_out, plane, start, size, planes[0], seed, mask)
            if cuda.threadIdx.x >= cuda.blockDim.x - WARP:  # the last warp has the fewest streams
                merge_moments(affine, partial, bias, gamma, beta, plane, planes, eps)
            cuda.syncthreads()
            go_back(values, gradients, keep, size, affine, bounds, mask)
            # A sum of its own keeps the chains of additions, and so the rounding error, short.
            round_g, round_gx = zero, zero
            for v in range(ELEMENTS_PER_THREAD):  # g is zero beyond the tile's end
                round_g += gradients[v]
                round_gx += gradients[v] * values[v]
            total_g += round_g
            total_gx += round_gx
            start = int32(start + step)
            cuda.syncthreads()  # before mask and affine are written anew
        total_g = block_sum(total_g, scratch_g)
        total_gx = block_sum(total_gx, scratch_gx)
        if cuda.threadIdx.x == 0:
            sum_g[cuda.blockIdx.x] = total_g
            sum_gx[cuda.blockIdx.x] = total_gx

    return sums_kernel


@cuda.jit(device=True)
def merge_sums(means, sum_g, sum_gx, gamma, plane, planes, group_size):
    """By one warp, for its block: means of g * gamma and of g * gamma * xhat over a plane's group.

    `group_size` comes as a floating-point number: float32 / int32 would be a float64.
    """
    _, _, partials_per_group, channels_per_group = planes
    partials_per_plane, _ = divide(partials_per_group, channels_per_group)
    _, channel = divide(plane, gamma.size)
    _, channel_of_group = divide(channel, channels_per_group)
    first_channel = int32(channel - channel_of_group)
    first = int32(divide(plane, channels_per_group)[0] * partials_per_group)
    total_g, total_gx = gamma.dtype.type(0), gamma.dtype.type(0)
    i = int32(cuda.laneid)
    while i < partials_per_group:
        slope = gamma[uint32(first_channel + divide(i, partials_per_plane)[0])]
        total_g += slope * sum_g[uint32(first + i)]
        total_gx += slope * sum_gx[uint32(first + i)]
        i = int32(i + WARP)
    total_g, total_gx = warp_sum(total_g), warp_sum(total_gx)
    if cuda.laneid == 0:
        means[0], means[1] = total_g / group_size, total_gx / group_size


@cache
def make_gradient_kernel(vector: int, draws: bool) -> Any:
    """The gradient kernel for accesses of `vector` values, with dropout or without."""
    fetch, go_back = make_fetch(vector, draws), make_go_back(vector, draws)

    @cuda.jit(launch_bounds=THREADS)
    def gradient_kernel(
        z,
        grad_out,
        bias,
        gamma,
        beta,
        partial,
        sum_g,
        sum_gx,
        sum_dz,
        tiles_per_plane,
        planes,
        eps,
        group_size,
        bounds,
        seed,
        mask,
    ):
        """dz = rstd * (g * gamma - mean_g - xhat * mean_gx) over z, and its sum over one tile."""
        scratch = cuda.shared.array(WARP, z.dtype)
        affine = cuda.shared.array(4, z.dtype)
        means = cuda.shared.array(2, z.dtype)
        keep = cuda.shared.array(MASK_WORDS, uint32)
        values = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        gradients = cuda.local.array(ELEMENTS_PER_THREAD, z.dtype)
        tile = int32(cuda.gridDim.x - 1 - cuda.blockIdx.x)
        plane, tile_of_plane = divide(tile, tiles_per_plane)
        step = int32(ELEMENTS_PER_THREAD * cuda.blockDim.x)
        start = int32(tile_of_plane * step)
        size = int32(min(step, int32(planes[0] - start)))
        fetch(values, gradients, keep, z, grad_out, plane, start, size, planes[0], seed, mask)
        if cuda.threadIdx.x >= cuda.blockDim.x - WARP:
            merge_moments(affine, partial, bias, gamma, beta, plane, planes, eps)
            merge_sums(means, sum_g, sum_gx, gamma, plane, planes, group_size)
        cuda.syncthreads()
        go_back(values, gradients, keep, size, affine, bounds, mask)

        rstd, slope = affine[1], affine[1] * affine[2]
        from_mean, from_variance = rstd * means[0], rstd * means[1]
        begin = first_of_thread(vector)
        first = int64(plane) * planes[0] + start + begin
        total = z.dtype.type(0)
        for v in range(0, ELEMENTS_PER_THREAD, vector):
            if int32(begin + v * WARP) < size:
                for e in range(vector):
                    dz = gradients[v + e] * slope - from_mean - values[v + e] * from_variance
                    values[v + e] = dz
                    total += dz
                i = uint64(first + v * WARP)
                if vector == VECTOR:
                    store_4(z, i, values[v], values[v + 1], values[v + 2], values[v + 3])
                else:
                    z[i] = values[v]
        total = block_sum(total, scratch)
        if cuda.threadIdx.x == 0:
            sum_dz[uint32(tile)] = total

    return gradient_kernel


@cuda.jit(launch_bounds=(THREADS, 1))
def sum_tiles_kernel(sums, batch, tiles_per_plane, total):
    """(N, K, tiles) to (K,), a channel a block: a parameter's gradient."""
    scratch = cuda.shared.array(WARP, float64)
    channels, k = int32(total.size), int32(cuda.blockIdx.x)
    value = float64(0)
    i = int32(cuda.threadIdx.x)
    while i < int32(batch * tiles_per_plane):
        n, tile = divide(i, tiles_per_plane)
        value += sums[uint32(int32(int32(n * channels) + k) * tiles_per_plane + tile)]
        i = int32(i + cuda.blockDim.x)
    value = block_sum(value, scratch)
    if cuda.threadIdx.x == 0:
        total[uint32(k)] = value


# ---- the launches -------------------------------------------------------------------------------


def gradients(
    launch: Launcher,
    operands: Operands,
    statistics: tuple[Tensor, Tensor] | None,
    wanted: Wanted,
) -> list[Tensor | None]:
    """As `clear.gradients`, but for `statistics`: see above."""
    found: list[Tensor | None] = [None] * 5
    if not any(wanted):
        return found
    spec = operands.spec
    with reproducibly(spec, operands.x.device):
        passes = Passes(launch, operands)
        passes.moments()
        passes.sums()
        if wanted[3]:
            found[3] = passes.sum_tiles(passes.sum_gx, passes.joined[1])
        if wanted[4]:
            found[4] = passes.sum_tiles(passes.sum_g, passes.joined[1])
        if any(wanted[:3]):
            passes.gradient()
        if wanted[2]:
            found[2] = passes.sum_tiles(passes.sum_dz, passes.tiling.tiles)
        if any(wanted[:2]):
            found[:2] = convolution_gradients(operands, passes.z, wanted)
    return found


@contextmanager
def reproducibly(spec: BlockSpec, device: torch.device) -> Iterator[None]:
    """The library at the call's precision, by algorithms that give the same bits in every run."""
    cudnn = torch.backends.cudnn
    with (
        convolution_precision(spec),
        torch.autocast(device.type, enabled=False),
        # `flags` sets each of them: the others as they are by now, TF32 by the line above.
        cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=True,
            allow_tf32=cudnn.allow_tf32,
        ),
    ):
        yield


class Passes:
    """What the kernels of one call share, and a method for each of them.

    Parameters
    ----------
    launch, operands
        As `gradients` takes them.

    Attributes
    ----------
    z : Tensor
        The convolution without its bias, flat; `gradient` turns it into dz.
    tiling : Tiling
    joined : (int, int)
        Size and number, per plane, of the tiles whose results each block merges.
    sum_g, sum_gx : Tensor
        Of each joined tile.
    sum_dz : Tensor
        Of each tile.
    """

    def __init__(self, launch: Launcher, operands: Operands) -> None:
        spec, arguments = operands.spec, operands.arguments
        self.launch, self.operands = launch, operands
        x, weight = operands.x.view(spec.x_shape), operands.weight.view(spec.weight_shape)
        self.z = convolution(spec, x, weight, None).contiguous().view(-1)
        self.tiling = tiling = Tiling(spec)
        self.joined = tiling.joined(PARTIALS_PER_GROUP)
        self.vector = vector_width(tiling.plane_size, self.z, operands.grad_out)
        partials = tiling.planes * self.joined[1]
        self.partial = self.z.new_empty((3, partials))
        self.sum_g, self.sum_gx = self.z.new_empty(partials), self.z.new_empty(partials)
        self.sum_dz = self.z.new_empty(tiling.planes * tiling.tiles)

        of_planes = (
            tiling.plane_size,
            self.joined[1],
            tiling.channels_per_group * self.joined[1],
            tiling.channels_per_group,
        )
        self.planes = tuple(map(np.int32, of_planes))
        cap, min_value, max_value = arguments.bounds
        width, drop_threshold, keep_scale = arguments.dropout
        rows_per_plane = np.int32(tiling.plane_size // width)
        mask = rows_per_plane, np.int32(width), *word_threshold(drop_threshold, keep_scale)
        self.chain = (min_value, min(cap, max_value)), operands.seed, mask

    def moments(self) -> None:
        """Moments of each joined tile."""
        bias = self.operands.bias
        launch_moments(
            self.launch, self.tiling, self.joined, self.vector, self.z, bias, self.partial
        )

    def sums(self) -> None:
        """Sums of g and of g * xhat of each joined tile."""
        self.launch(
            make_sums_kernel(self.vector, self.operands.spec.draws),
            self.sum_g.numel(),
            self.tiling.threads,
            *self.tensors,
            np.int32(self.joined[0]),
            self.planes,
            self.operands.arguments.eps,
            *self.chain,
        )

    def gradient(self) -> None:
        """dz over z, and its sums of each tile."""
        arguments = self.operands.arguments
        self.launch(
            make_gradient_kernel(self.vector, self.operands.spec.draws),
            self.sum_dz.numel(),
            self.tiling.threads,
            *self.tensors,
            self.sum_dz,
            np.int32(self.tiling.tiles),
            self.planes,
            arguments.eps,
            arguments.real(self.operands.spec.group_size),
            *self.chain,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """With which the arguments of both passes begin."""
        o = self.operands
        vectors = o.bias, o.gamma, o.beta
        return self.z, o.grad_out, *vectors, self.partial, self.sum_g, self.sum_gx

    def sum_tiles(self, sums: Tensor, tiles_per_plane: int) -> Tensor:
        """A parameter's gradient, from what each tile has of it."""
        total = torch.empty_like(self.operands.bias)
        batch = np.int32(self.operands.spec.batch)
        tiles = np.int32(tiles_per_plane)
        self.launch(sum_tiles_kernel, total.numel(), THREADS, sums, batch, tiles, total)
        return total


def convolution_gradients(
    operands: Operands, dz: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None]:
    """dx and dweight by the library, contiguous; None for those not wanted."""
    spec = operands.spec
    x, padding = operands.x.view(spec.x_shape), [before for before, _ in spec.padding]
    # The library pads as much after as before: zeros of our own stand in where that will not do.
    zeros = [zeros for pair in reversed(spec.padding) for zeros in pair]
    uneven = any(before != after for before, after in spec.padding)
    if uneven:
        x, padding = F.pad(x, zeros), [0] * len(padding)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dz.view(spec.output_shape),
        x,
        operands.weight.view(spec.weight_shape),
        None,  # a bias has no part in it
        spec.stride,
        padding,
        spec.dilation,
        False,  # not transposed
        [0] * len(padding),
        spec.groups,
        [wanted[0], wanted[1], False],
    )
    if uneven and dx is not None:
        dx = F.pad(dx, [-count for count in zeros])
    dx, dweight = (None if g is None else g.contiguous() for g in (dx, dweight))
    return dx, dweight


# ---- the ledger ---------------------------------------------------------------------------------


def ledger(spec: BlockSpec, wanted: Wanted, *, has_statistics: bool) -> Ledger:
    """See the lesson; besides, the parameters, partial results and sums each kernel touches.

    Statistics of forward change nothing: they are not looked at.
    """
    if not any(wanted):
        return Ledger(0, 0, 0)
    tiling = Tiling(spec)
    tensor, vector = spec.output_bytes, vector_bytes(spec)
    partials = tiling.planes * tiling.joined(PARTIALS_PER_GROUP)[1] * spec.itemsize
    of_tiles = tiling.planes * tiling.tiles * spec.itemsize
    operands = convolution_bytes(spec) - vector  # the bias is not the library's
    weight = operands - spec.x_bytes
    again = 2 * tensor + 3 * vector + 3 * partials + seed_bytes(spec)  # read by both passes
    library = [(operands, tensor)]  # bytes read and written
    ours = [(tensor + vector, 3 * partials), (again, 2 * partials)]
    if any(wanted[:3]):
        ours.append((again + 2 * partials + vector, tensor + of_tiles))
    if wanted[0]:
        library.append((tensor + weight, spec.x_bytes))
    if wanted[1]:
        library.append((spec.x_bytes + tensor, weight))
    if wanted[2]:
        ours.append((of_tiles, vector))
    ours += [(partials, vector)] * sum(wanted[3:])
    read, written = map(sum, zip(*ours, *library, strict=True))
    return Ledger(read, written, len(ours) + len(library), len(library))
