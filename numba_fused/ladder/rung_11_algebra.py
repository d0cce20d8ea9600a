"""Algebra: the degenerate chain folded to its constant, for comparison only.

With ``cap <= min_value`` - KernelBench uses one value for both - or ``min_value >= max_value``,
``clamp(min(h, cap), min_value, max_value)`` is one constant for every finite h. Convolution and
normalisation do not reach the output, so this rung does not compute them: it fills the output
with the constant and applies dropout. Published 100x results for this problem are this.

It is no headline, and never chosen unless asked for by name. It computes nothing of the
operator, so its speed says nothing of anybody's kernels; and it is not even right: a NaN, which
the chain carries from x to the output, is lost.

Launch: one thread per dropout stream, that is per run of 16 outputs of a row; the lanes of a
        warp then write their 32 runs together, two at a time, so that the stores are coalesced.
Shapes: out flat, (N * K * D * H * W,).
Bytes:  out written; nothing read but the seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba import cuda, int32, int64, uint32, uint64

from numba_fused.device.reductions import FULL_WARP, WARP
from numba_fused.ladder.rung import Ledger, Operands, sample_limit, seed_bytes
from numba_fused.rng import RUN, keep_bits
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

ALL_KEPT = 0xFFFF
RUNS_AT_ONCE = WARP // RUN


@cuda.jit
def algebra_kernel(out, constant, seed, width, drop_threshold, keep_scale):
    """out = constant, kept or dropped."""
    stream = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
    bits = uint32(ALL_KEPT)
    if drop_threshold > 0:
        bits = keep_bits(uint64(seed[0]), uint64(stream), drop_threshold)

    runs_per_row = int32((width + RUN - 1) // RUN)
    lane, position = int32(cuda.laneid), int32(cuda.laneid % RUN)
    first = stream - lane + lane // RUN
    row, run = first // runs_per_row, int32(first % runs_per_row)
    for step in range(WARP // RUNS_AT_ONCE):
        source = int32(step * RUNS_AT_ONCE + lane // RUN)
        kept = uint32(cuda.shfl_sync(FULL_WARP, int32(bits), source)) >> uint32(position)
        scale = keep_scale
        if kept & uint32(1) == 0:
            scale -= keep_scale
        w = int32(run * RUN + position)
        index = row * width + w
        if w < width and index < out.size:
            out[index] = constant * scale
        run = int32(run + RUNS_AT_ONCE)
        while run >= runs_per_row:
            row, run = row + 1, int32(run - runs_per_row)


def limit(spec: BlockSpec) -> str | None:
    """A chain that depends on its input, which this rung would not compute."""
    if spec.constant is None:
        return "it fills in the constant of a degenerate chain, and this one depends on its input"
    return sample_limit(spec)


def forward(launch: Launcher, operands: Operands) -> None:
    """One launch."""
    spec, out, threads = operands.spec, operands.out, operands.threads_per_block
    constant = spec.constant
    if constant is None:
        raise ValueError(limit(spec))
    width = operands.output_size[2]
    streams = out.numel() // width * -(-width // RUN)
    launch(
        algebra_kernel,
        -(-streams // threads),
        threads,
        out,
        operands.real(constant),
        *operands.dropout,
    )


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """The output written."""
    return Ledger(bytes_read=seed_bytes(spec), bytes_written=spec.output_bytes, launches=1)
