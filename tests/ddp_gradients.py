"""Gradients of the block under DistributedDataParallel against those of one process.

    torchrun --standalone --nproc-per-node 2 tests/ddp_gradients.py                 two GPUs, nccl
    torchrun --standalone --nproc-per-node 2 tests/ddp_gradients.py --device cpu    gloo

Every rank has its share of a batch; the loss is a mean over it, so the mean of the ranks'
gradients, which is what DDP makes, must be the gradient of the whole batch. Rank 0 prints a line
for each check; the exit status is 1 if one failed.

The dropout mask depends on the seed and the position in the *local* batch. So that there is
something to compare with exactly, the checks choose seeds by what the mask's contract says:

    no dropout      p = 0: no masks
    sharded seeds   each rank passes `seed_of_shard`; together the masks are the whole batch's
    drawn seeds     each rank draws its own from torch's generator, as training code does; the one
                    process computes the shares one by one with the seeds that were drawn
    one seed        control: the same seed on every rank repeats a mask, which must show
    not reduced     control: under `no_sync` the gradient is the rank's own, which must show
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from numba_fused import FusedConvGroupNormMinClampDropout as Fused
from numba_fused.reference import draw_seed
from numba_fused.training import seed_of_shard

Gradients: TypeAlias = dict[str, Tensor]

SEED, DROPOUT_P = 83, 0.2
# Rounding of sums in another order. The loss weighs elements at random, so that its gradients do
# not average a wrong mask away: that makes them differ by about one half.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
CONTROLS = ("one seed", "not reduced")
SEEN = 0.05  # what a control must differ by


@dataclass(frozen=True)
class Setting:
    """What all ranks have in common, and which one this is."""

    x: Tensor  # (N, 3, D, H, W), the whole batch
    weights: Tensor  # of the elements of the whole batch's output in the loss
    variant: str
    rank: int
    ranks: int

    def share(self, rank: int) -> slice:
        size = len(self.x) // self.ranks
        return slice(rank * size, (rank + 1) * size)

    def block(self, dropout_p: float) -> Fused:
        """The same parameters on every rank and at every call."""
        torch.manual_seed(0)
        x = self.x
        block = Fused(3, 16, 3, 8, -1.0, 1.0, dropout_p, cap=0.5, variant=self.variant)
        return block.to(x.device, x.dtype)


def gradients(block: Any, setting: Setting, part: slice, seed: int | Tensor | None) -> Gradients:
    """Gradients of a part's mean loss; `block` may be wrapped in DDP."""
    block.zero_grad()
    out = block(setting.x[part], seed=seed)
    (out * setting.weights[part]).mean().backward()
    module = getattr(block, "module", block)
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def distributed(
    setting: Setting, dropout_p: float, seed: int | None, *, reduced: bool = True
) -> Gradients:
    """Gradients of this rank's share, which DDP averages over the ranks."""
    devices = [setting.x.device.index] if setting.x.is_cuda else None
    block = DistributedDataParallel(setting.block(dropout_p), device_ids=devices)
    torch.manual_seed(SEED + setting.rank)  # what a drawn seed comes from
    with contextlib.nullcontext() if reduced else block.no_sync():
        return gradients(block, setting, setting.share(setting.rank), seed)


def whole(setting: Setting, dropout_p: float) -> Gradients:
    """Gradients of the whole batch under one seed, in this process alone."""
    return gradients(setting.block(dropout_p), setting, slice(None), SEED)


def share_by_share(setting: Setting) -> Gradients:
    """The mean of the shares' gradients with the seeds that the ranks draw, in this process."""
    block, each = setting.block(DROPOUT_P), []
    for rank in range(setting.ranks):
        torch.manual_seed(SEED + rank)
        seed = draw_seed(setting.x.device)
        each.append(gradients(block, setting, setting.share(rank), seed))
    return {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}


def difference(ours: Gradients, expected: Gradients) -> float:
    """The largest relative L2 difference of a parameter's gradient."""
    return max(float((ours[n] - g).norm() / g.norm()) for n, g in expected.items())


def errors(setting: Setting) -> dict[str, float]:
    """How far this rank's gradients are from what one process gets, by check."""
    first = setting.share(setting.rank).start
    sharded = seed_of_shard(SEED, first, setting.weights.shape)
    plain, dropped = whole(setting, 0.0), whole(setting, DROPOUT_P)
    run = partial(distributed, setting)
    return {
        "no dropout": difference(run(0.0, SEED), plain),
        "sharded seeds": difference(run(DROPOUT_P, sharded), dropped),
        "drawn seeds": difference(run(DROPOUT_P, None), share_by_share(setting)),
        "one seed": difference(run(DROPOUT_P, SEED), dropped),
        "not reduced": difference(run(0.0, SEED, reduced=False), plain),
    }


def settle(setting: Setting) -> bool:
    """Run every check on every rank; whether all went as they must."""
    fine = True
    for name, mine in errors(setting).items():
        control = name in CONTROLS
        error = torch.tensor(mine, dtype=torch.float64, device=setting.x.device)
        # The worst of all ranks: the largest error, but a control's smallest.
        dist.all_reduce(error, dist.ReduceOp.MIN if control else dist.ReduceOp.MAX)
        bound = SEEN if control else BOUNDS[setting.x.dtype]
        ok = bool(error > bound if control else error <= bound)
        fine &= ok
        if setting.rank == 0:
            relation = "more than" if control else "at most"
            print(
                f"{setting.variant:<12} {name:<14} differs by {float(error):.1e}, must by "
                f"{relation} {bound:.0e}: {'ok' if ok else 'FAILED'}"
            )
    return fine


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check the block's gradients under DDP.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--variant", nargs="+", default=["auto"])
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--batch", type=int, default=8, help="of all ranks together")
    parser.add_argument("--size", type=int, nargs=3, default=[8, 24, 24], help="depth ... width")
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    asked = arguments(given)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if asked.batch % ranks:
        sys.exit(f"the batch must be a multiple of the {ranks} ranks, but is {asked.batch}")
    if asked.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("nccl" if asked.device == "cuda" else "gloo")
    generator = torch.Generator().manual_seed(SEED)
    shapes = (
        (asked.batch, 3, *asked.size),
        (asked.batch, 16, *(size - 2 for size in asked.size)),
    )
    x, weights = (
        torch.randn(shape, generator=generator).to(device, getattr(torch, asked.dtype))
        for shape in shapes
    )
    try:
        fine = [settle(Setting(x, weights, name, rank, ranks)) for name in asked.variant]
    finally:
        dist.destroy_process_group()
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
