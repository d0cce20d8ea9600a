"""Fp32 accuracy from tensor cores: every value is split into two halves, for three products.

A tensor core multiplies half-precision numbers, of 11 bits, and adds up in fp32. A float has 24.
So x, scaled by a power of two, is written as ``high + low``: the nearest half, and the half
nearest to what is missing, 22 bits together; likewise the weights. Of the four products

    (x_high + x_low) * (w_high + w_low)

the last is too small to matter and the first three are one matrix instruction each, of which one
does the work of 2048 multiply-adds. With ``precision="tf32"`` the first alone is taken: halves
have TF32's 11 bits, and scaled they have range enough.

Launch: the kernels of the rung before, on other words: two halves each, and where they are split,
        a second set with what rounding to halves left over.
Shapes: as in the rung before.
Bytes:  x twice, out once. The convolution is computed twice because writing it down and reading
        it back would take longer.
Next:   the second convolution is still 40 % of the work, and no block loads while it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from numba_fused.ladder.rung import Ledger, Operands
from numba_fused.ladder.rung_7_tensor_core import two_passes
from numba_fused.ladder.tensor_cores import LEAST_CAPABILITY, TileKind, tile_ledger, tile_limit
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.device.launch import Launcher

least_capability = LEAST_CAPABILITY
keeps_statistics = True


def kind(spec: BlockSpec) -> TileKind:
    """Pairs of halves; TF32's precision takes one half of each pair."""
    return TileKind(values_per_word=2, split=spec.precision == "ieee", one_pass=False)


def limit(spec: BlockSpec) -> str | None:
    """As all tiles."""
    return tile_limit(spec, kind(spec))


def forward(launch: Launcher, operands: Operands) -> None:
    """Three launches."""
    two_passes(launch, operands, kind(operands.spec))


def ledger(spec: BlockSpec, threads_per_block: int) -> Ledger:
    """See the lesson; the packed weights and the moments are small change."""
    return tile_ledger(spec, kind(spec))
