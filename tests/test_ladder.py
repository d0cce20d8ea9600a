"""ladder/: every rung computes the operator, whatever the shape, block size and schedule.

The kernels run in the simulator, so all of this holds on a machine without a GPU. Outputs start
as NaN: an element nobody writes is seen. The judge is `definition`, in extended precision.

Every promise is tested on every rung that can keep it. Rung `tensor_core` is given
``precision="tf32"``, rung `algebra` a degenerate chain; what else a rung refuses is left out here
and refused in its own test. Tensor-core tiles have a file of tests besides, test_tensor_tiles.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from definition import (
    BOUNDS,
    UNIT_ROUNDOFF,
    Operands,
    convolution,
    definition,
    random_operands,
    relative_error,
    spec_for,
)
from torch import Tensor

import numba_fused as nf
from numba_fused import bench, ladder, plan, verify
from numba_fused.ladder import rung_7_tensor_core, rung_8_split, rung_9_pipelined
from numba_fused.ladder.tensor_cores import TilePlan, tile_plan
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

RUNGS = ladder.names()
CHAIN_RUNGS = [name for name in RUNGS if name != "algebra"]  # those that compute the operator
THREADED = [rung.name for rung in ladder.rungs() if rung.takes_threads_per_block]
TENSOR = ["tensor_core", "split", "pipelined"]
KERNEL_RUNGS = [name for name in CHAIN_RUNGS if name in THREADED or name in TENSOR]
SEED = 12345
TRAINING = {"dropout_p": 0.25, "training": True}

# name: (x shape, weight shape, arguments, threads per block). Block sizes go from one warp that
# strides over its group many times to 1024 threads of which a handful has work.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]] = {
    "small": ((2, 3, 2, 3, 6), (4, 3, 2, 2, 2), {"num_groups": 2}, 128),
    "miniature": ((2, 3, 4, 5, 6), (4, 3, 3, 3, 3), {"num_groups": 2}, 128),
    "one group": ((2, 2, 2, 4, 18), (3, 2, 2, 2, 2), {"num_groups": 1}, 64),
    "group per channel": ((1, 2, 4, 4, 5), (5, 2, 3, 2, 1), {"num_groups": 5}, 96),
    "several blocks per group": ((1, 1, 6, 8, 19), (2, 1, 1, 2, 3), {"num_groups": 1}, 32),
    "more threads than values": ((1, 2, 3, 3, 4), (4, 2, 2, 2, 2), {"num_groups": 2}, 1024),
    "kernel 1": ((1, 4, 2, 3, 16), (4, 4, 1, 1, 1), {"num_groups": 4}, 256),
    "kernel of the input's size": ((3, 2, 3, 4, 5), (6, 2, 3, 4, 5), {"num_groups": 2}, 32),
    "not cubic, stride, padding": (
        (1, 3, 3, 4, 7),
        (4, 3, 1, 2, 3),
        {"num_groups": 2, "stride": (2, 1, 3), "padding": (0, 1, 2)},
        64,
    ),
    "dilation": (
        (1, 2, 4, 5, 7),
        (4, 2, 2, 3, 2),
        {"num_groups": 2, "dilation": (3, 2, 4), "padding": 1},
        128,
    ),
    "same, even kernel": (
        (1, 1, 2, 3, 11),
        (2, 1, 2, 2, 4),
        {"num_groups": 1, "padding": "same", "dilation": (1, 1, 3)},
        64,
    ),
    "padding beyond the kernel": (
        (1, 1, 2, 3),
        (2, 1, 2, 2),
        {"num_groups": 1, "padding": 3},
        512,
    ),
    "groups": ((2, 6, 3, 4, 6), (9, 2, 2, 2, 2), {"num_groups": 3, "groups": 3}, 96),
    "depthwise": ((2, 4, 3, 4, 6), (8, 1, 2, 2, 2), {"num_groups": 2, "groups": 4}, 32),
    "groups across norm groups": (
        (2, 4, 3, 4, 5),
        (6, 2, 2, 2, 2),
        {"num_groups": 3, "groups": 2},
        64,
    ),
    "three norm groups": ((2, 4, 2, 4, 5), (6, 4, 2, 2, 2), {"num_groups": 3}, 64),
    "eight channels, eight groups": ((2, 2, 3, 20), (8, 2, 2, 2), {"num_groups": 8}, 96),
    "width 1": ((1, 2, 4, 7, 1), (4, 2, 3, 3, 1), {"num_groups": 2}, 32),
    "width 17": ((1, 2, 3, 3, 19), (4, 2, 2, 2, 3), {"num_groups": 2}, 128),
    "2-D": ((2, 3, 9, 10), (4, 3, 3, 2), {"num_groups": 2, "stride": 2, "padding": (1, 0)}, 64),
    "1-D": ((3, 4, 40), (6, 2, 5), {"num_groups": 3, "groups": 2, "padding": "same"}, 32),
}
SOME = ["miniature", "several blocks per group", "groups across norm groups", "1-D"]
# Of these the first test looks for races, which takes half as much time again: blocks of two, four
# and sixteen warps, rows of two runs, inputs with a halo; on tensor cores as well. In fp64 those of
# SOME follow: several blocks a group, convolution groups, 1-D.
RACED = ["dilation", "three norm groups", "width 17", "2-D", "padding beyond the kernel"]
QUICK = ["small", "three norm groups"]  # for tensor-core tiles, which take a second to simulate
# Rung `split` is made of what the two other tensor-core rungs are made of.
OF_SPLIT = [*QUICK, "2-D", "padding beyond the kernel", "eight channels, eight groups"]


def spec_of(rung: str, operands: Operands, **arguments: Any) -> BlockSpec:
    """The call as `rung` can run it."""
    if rung == "tensor_core":
        arguments = {"precision": "tf32"} | arguments
    if rung == "algebra":
        arguments = {"cap": arguments.get("min_value", BOUNDS["min_value"])} | arguments
    return spec_for(operands, **arguments)


def no_operands(x_shape: tuple[int, ...], weight_shape: tuple[int, ...]) -> Operands:
    """Shapes only, which no memory could hold."""
    return Operands(*(torch.empty(shape, device="meta") for shape in (x_shape, weight_shape)))


def make(
    rung: str, case: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[BlockSpec, Operands, int]:
    """Spec, random operands and threads per block of one of the cases above."""
    x_shape, weight_shape, arguments, threads = CASES[case]
    tensors = {k: changes.pop(k) for k in ("bias", "affine", "offset") if k in changes}
    operands = random_operands(x_shape, weight_shape, dtype, **tensors)
    return spec_of(rung, operands, **(TRAINING | arguments | changes)), operands, threads


def pairs(rungs: list[str], cases: list[str], tensor_cases: list[str]) -> pytest.MarkDecorator:
    """Each rung with each case that it can run; tensor-core rungs with cases of their own."""
    of_rung = dict.fromkeys(TENSOR, tensor_cases)
    of_rung["split"] = [case for case in tensor_cases if len(tensor_cases) < 4 or case in OF_SPLIT]
    possible = [
        (rung, case)
        for rung in rungs
        for case in of_rung.get(rung, cases)
        if ladder.get(rung).limit(make(rung, case)[0]) is None
    ]
    return pytest.mark.parametrize(("rung", "case"), possible)


def run(
    rung: str, spec: BlockSpec, operands: Operands, threads: int = 128, **options: Any
) -> Tensor:
    """The rung's output, written over NaN; races are looked for in the first two tests alone."""
    out = torch.full(spec.output_shape, torch.nan, dtype=operands.x.dtype)
    options = {"seed": SEED, "simulator": Simulator(check_races=False)} | options
    returned = ladder.run(rung, *operands, spec=spec, out=out, threads_per_block=threads, **options)
    assert returned is out
    return out


def multiplied(spec: BlockSpec, operands: Operands) -> Operands:
    """The operands as the products see them: for TF32, x and weight rounded to it."""
    if spec.precision == "ieee":
        return operands
    x, weight = map(verify.rounded_to_tf32, operands[:2])
    return operands._replace(x=x, weight=weight)


def own_reference(spec: BlockSpec, operands: Operands) -> Tensor:
    """PyTorch's answer in the operands' dtype."""
    return ladder.run("torch", *multiplied(spec, operands), spec=spec, seed=SEED)


def mask(spec: BlockSpec) -> np.ndarray:
    return nf.keep_mask(SEED, spec.output_shape, spec.dropout_p)


def bits(t: Tensor) -> bytes:
    return t.numpy().tobytes()


def assert_accurate(out: Tensor, spec: BlockSpec, operands: Operands) -> None:
    """At most twice the error PyTorch makes in the same precision, or two roundings."""
    keep = mask(spec) if spec.draws else None
    tensors = verify.Tensors(*operands)
    ruler = verify.yardstick(spec, tensors, None if keep is None else torch.from_numpy(keep))
    bound = 2 * max(ruler.torch_error, UNIT_ROUNDOFF[out.dtype])
    assert relative_error(out, definition(spec, operands, keep)) <= bound


# ---- right answers ------------------------------------------------------------------------------

LONG = {"miniature", "several blocks per group", "kernel of the input's size"}  # in tiles of 128


@pairs(RUNGS, list(CASES), [case for case in CASES if case not in LONG])
def test_every_rung_computes_the_operator(rung: str, case: str) -> None:
    spec, operands, threads = make(rung, case)
    simulator = Simulator(check_races=case in RACED)
    out = run(rung, spec, operands, threads, simulator=simulator)
    assert_accurate(out, spec, operands)


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("rung", [name for name in RUNGS if name not in TENSOR])
def test_every_rung_but_the_tensor_cores_computes_in_fp64(rung: str, case: str) -> None:
    spec, operands, threads = make(rung, case, torch.float64)
    out = run(rung, spec, operands, threads, simulator=Simulator(check_races=True))
    assert_accurate(out, spec, operands)


@pytest.mark.parametrize(("bias", "affine"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("rung", RUNGS)
def test_absent_vectors_are_neutral(rung: str, affine: bool, bias: bool) -> None:
    spec, operands, threads = make(rung, "small", bias=bias, affine=affine)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


@pytest.mark.parametrize("num_groups", [1, 4, 12])
@pytest.mark.parametrize("rung", RUNGS)
def test_any_number_of_groups(rung: str, num_groups: int) -> None:
    operands = random_operands((1, 2, 4, 6), (12, 2, 2, 2))
    spec = spec_of(rung, operands, num_groups=num_groups, **TRAINING)
    assert_accurate(run(rung, spec, operands), spec, operands)


@pytest.mark.parametrize("threads", [32, 96, 256, 1024])
@pytest.mark.parametrize("rung", THREADED)
def test_any_block_size(rung: str, threads: int) -> None:
    """Groups of 200 values: larger than the first two blocks, smaller than the last two."""
    operands = random_operands((1, 2, 5, 12), (4, 2, 1, 3))
    spec = spec_of(rung, operands, num_groups=1, **TRAINING)
    assert spec.group_size == 200
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


@pytest.mark.parametrize("rung", CHAIN_RUNGS)
def test_a_large_mean_leaves_the_variance_alone(rung: str) -> None:
    """Inputs offset by 1e3, once through a convolution, once as they are (exactly)."""
    spec, operands, threads = make(rung, "small", offset=1e3)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)

    x = random_operands((1, 1, 60), (2, 1, 1), offset=1e3).x
    x = verify.rounded_to_tf32(x)  # the products are exact in every precision, then
    operands = Operands(x, torch.ones(2, 1, 1))
    spec = spec_of(rung, operands, num_groups=2)
    out = run(rung, spec, operands, 64)
    assert_accurate(out, spec, operands)
    assert relative_error(out, definition(spec, operands)) < 1e-4  # E[x^2] - E[x]^2: 1e-2


@pytest.mark.parametrize("rung", CHAIN_RUNGS)
def test_eps_is_added_to_the_variance(rung: str) -> None:
    spec, operands, threads = make(rung, "small", eps=0.7)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


# ---- exact answers ------------------------------------------------------------------------------


def integers(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """-3 to 3; sums of a few hundred products of these are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


class FirstKernel(Simulator):
    """Runs the first launch alone, and keeps what it wrote into its parameter `z`."""

    class Done(Exception):  # noqa: N818
        """Skips the launches that follow."""

    z: Tensor

    def launch(self, kernel: Any, grid: Any, block: Any, *args: Any, **options: Any) -> None:
        super().launch(kernel, grid, block, *args, **options)
        self.z = inspect.signature(kernel.py_func).bind(*args).arguments["z"]
        raise self.Done


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rung", ["unfused", "epilogue"])
def test_convolution_of_small_integers_is_exact(rung: str, case: str, dtype: torch.dtype) -> None:
    spec, operands, threads = make(rung, case, dtype)
    operands = Operands(*(integers(t.shape, dtype) for t in operands[:3] if t is not None))
    simulator = FirstKernel(check_races=False)
    with pytest.raises(FirstKernel.Done):
        run(rung, spec, operands, threads, simulator=simulator)
    z = simulator.z.view(spec.output_shape)
    assert np.array_equal(z.numpy(), convolution(spec, operands))


@pairs(CHAIN_RUNGS, SOME, QUICK)
def test_gamma_zero_leaves_each_channel_its_own_beta(rung: str, case: str) -> None:
    spec, operands, threads = make(rung, case, dropout_p=0.5)
    channels = spec.out_channels
    beta = torch.linspace(-1.2, 0.7, channels)
    operands = operands._replace(gamma=torch.zeros(channels), beta=beta)
    expected = beta.clamp(max=0.5).clamp(-1.0, 1.0).view(-1, *(1,) * len(spec.output_size))
    kept = torch.from_numpy(mask(spec))
    assert expected.unique().numel() == channels
    assert torch.equal(run(rung, spec, operands, threads), kept * 2 * expected)


@pytest.mark.parametrize(
    ("rung", "threads"),
    [(rung, threads) for rung in CHAIN_RUNGS for threads in (64, 256)[: 1 + (rung in THREADED)]],
)
def test_statistics_are_exact_where_rounding_cannot_happen(rung: str, threads: int) -> None:
    """Groups of 64 values 7 +- 1: mean 7, variance 1, and with eps = 3 rstd is 1/2."""
    signs = (torch.arange(2 * 2 * 32) * 5 // 3 % 2 * 2 - 1).float().view(2, 2, 32)
    signs[1] *= torch.tensor([1.0, -1.0]).view(2, 1)
    signs = torch.cat([signs, -signs], dim=2)  # every (sample, group) is balanced
    weight = torch.eye(2).view(2, 2, 1)
    gamma, beta = torch.tensor([1.0, 0.5]), torch.tensor([0.0, -0.5])
    operands = Operands(signs, weight, torch.full((2,), 7.0), gamma, beta)
    spec = spec_of(rung, operands, num_groups=2, eps=3.0)
    assert spec.group_size == 64
    h = signs / 2 * gamma.view(2, 1) + beta.view(2, 1)
    assert torch.equal(run(rung, spec, operands, threads), h)


# ---- NaN and infinities -------------------------------------------------------------------------


def plant(operands: Operands, name: str, position: tuple[int, ...], value: float) -> Operands:
    planted = getattr(operands, name).clone()
    planted[position] = value
    return operands._replace(**{name: planted})


BAD_VALUES = [math.nan, math.inf, -math.inf]
POSITIONS = {"x": (1, 3, 1, 2, 2), "weight": (4, 1, 0, 1, 1), "bias": (1,), "beta": (5,)}
# Two convolution groups over three norm groups: some of both stay clean. And without groups.
GROUPED = pairs(CHAIN_RUNGS, ["groups across norm groups"], ["three norm groups"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("x", value) for value in BAD_VALUES),
        ("weight", math.inf),
        ("bias", -math.inf),
        ("beta", math.nan),
        ("beta", -math.inf),
    ],
)
@GROUPED
def test_bad_values_go_where_torch_sends_them(
    rung: str, case: str, name: str, value: float
) -> None:
    spec, operands, threads = make(rung, case)
    operands = plant(operands, name, POSITIONS[name], value)
    out, expected = run(rung, spec, operands, threads), own_reference(spec, operands)
    assert out.isfinite().any()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", BAD_VALUES)
@pairs(KERNEL_RUNGS, ["groups across norm groups"], ["three norm groups"])
def test_a_bad_gamma_spoils_its_channel_alone(rung: str, case: str, value: float) -> None:
    """Infinite ones as the formula has it: torch folds the mean into beta, and inf - inf is NaN.

    So do the tensor-core rungs; in the channel itself they may have NaN instead.
    """
    spec, operands, threads = make(rung, case)
    operands = multiplied(spec, plant(operands, "gamma", (3,), value))
    out, exact = run(rung, spec, operands, threads), definition(spec, operands, mask(spec))
    assert np.isfinite(exact[:, :3]).all()
    if rung in TENSOR:
        exact[:, 3] = np.where(out[:, 3].isnan(), np.nan, exact[:, 3])
    np.testing.assert_allclose(out.numpy(), exact.astype(float), rtol=1e-5, atol=1e-5)


@pairs(CHAIN_RUNGS, ["depthwise"], ["small"])
def test_nan_poisons_one_group_of_one_sample_and_outlives_dropout(rung: str, case: str) -> None:
    """Where each channel sees one input channel; elsewhere every group of the sample sees it."""
    spec, operands, threads = make(rung, case, dropout_p=0.5)
    out = run(rung, spec, plant(operands, "x", (1, 0, 0, 0, 0), math.nan), threads)
    expected = torch.zeros(spec.output_shape, dtype=torch.bool)
    # Input channel 0 of 4 makes channels 0 and 1, which share group 0 of 2.
    expected[1, : 4 if spec.groups > 1 else None] = True
    assert torch.equal(out.isnan(), expected)
    assert not mask(spec)[1, :4].all()


@pytest.mark.parametrize("rung", CHAIN_RUNGS)
def test_min_above_max_gives_max_except_for_nan(rung: str) -> None:
    spec, operands, threads = make(rung, "small", min_value=1.0, max_value=-0.25, training=False)
    out = run(rung, spec, plant(operands, "x", (0, 0, 0, 0, 0), math.nan), threads)
    assert out[0].isnan().all()
    assert (out[1] == -0.25).all()


@pytest.mark.parametrize("rung", CHAIN_RUNGS)
def test_infinite_bounds_bound_nothing(rung: str) -> None:
    spec, operands, threads = make(
        rung, "three norm groups", min_value=-math.inf, max_value=math.inf, cap=math.inf
    )
    out = run(rung, spec, operands, threads)
    assert out.abs().max() > 2
    assert_accurate(out, spec, operands)


# ---- dropout ------------------------------------------------------------------------------------


@pairs(RUNGS, ["kernel 1", "width 1", "width 17"], ["kernel 1"])
def test_the_mask_is_the_same_for_every_rung_and_block_size(rung: str, case: str) -> None:
    """With min_value above 0 an element is zero exactly where it is dropped."""
    spec, operands, _ = make(rung, case, min_value=0.25, dropout_p=0.5)
    sizes = (32, 160, 1024 if case == "width 17" else 96)
    for threads in sizes if rung in THREADED else sizes[:1]:
        out = run(rung, spec, operands, threads)
        assert np.array_equal(out.numpy() != 0, mask(spec))
        assert out.max() == 2 * spec.cap


@pytest.mark.parametrize("seed", [-1, 2**64 + 3, 0x61C8864680B583EB, torch.tensor([7])], ids=str)
@pairs(RUNGS, ["width 1"], ["kernel 1"])
def test_every_kind_of_seed(rung: str, case: str, seed: int | Tensor) -> None:
    spec, operands, threads = make(rung, case, min_value=0.25, dropout_p=0.5)
    out = run(rung, spec, operands, threads, seed=seed)
    kept = nf.keep_mask(int(seed), spec.output_shape, 0.5)
    assert np.array_equal(out.numpy() != 0, kept)


@pytest.mark.parametrize("rung", CHAIN_RUNGS)
def test_p_1_gives_zeros_and_keeps_nan(rung: str) -> None:
    spec, operands, threads = make(rung, "small", dropout_p=1.0)
    out = run(rung, spec, plant(operands, "x", (0, 0, 0, 0, 0), math.nan), threads)
    assert out[0].isnan().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("changes", [{"training": False}, {"dropout_p": 0.0}], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_without_dropout_nothing_is_drawn(rung: str, changes: dict[str, Any]) -> None:
    spec, operands, threads = make(rung, "small", **changes)
    before = torch.random.get_rng_state()
    out = run(rung, spec, operands, threads, seed=None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_accurate(out, spec, operands)


# ---- reproducibility ----------------------------------------------------------------------------


@pairs(KERNEL_RUNGS, ["groups across norm groups", "width 17"], ["small"])
def test_bits_do_not_depend_on_the_run_or_the_schedule(rung: str, case: str) -> None:
    spec, operands, threads = make(rung, case)
    first = run(rung, spec, operands, threads)
    for schedule in (1, 2):
        simulator = Simulator(schedule_seed=schedule, check_races=False)
        again = run(rung, spec, operands, threads, simulator=simulator)
        assert bits(again) == bits(first)


# ---- the ledger ---------------------------------------------------------------------------------


TILE_PLANS: dict[str, Callable[[BlockSpec], TilePlan]] = {
    "tensor_core": lambda spec: tile_plan(spec, rung_7_tensor_core.KIND),
    "split": lambda spec: tile_plan(spec, rung_8_split.kind(spec)),
    "pipelined": lambda spec: tile_plan(spec, rung_9_pipelined.kind(spec)),
}


def assert_counted(rung: str, spec: BlockSpec, operands: Operands, threads: int) -> None:
    """To the byte where every element of x is used: these cases have no stride, no dilation.

    A ledger counts bytes, memory moves sectors of 32: a rung that writes an array from several
    source lines is charged twice for the sectors in which one line's part ends and another's
    begins. Rung `epilogue` has one such array, of three parts. The tensor-core rungs have one,
    too, but eight records of sums are whole sectors.

    What a block publishes is written once and read once by whoever waits for it. To the simulator
    both are atomic, read and written at once, and of a record each double is a line of its own:
    it counts records four times.
    """
    simulator = Simulator(count=True, check_races=False)
    run(rung, spec, operands, threads, simulator=simulator)
    ledger = ladder.get(rung).ledger(spec, threads)
    assert len(simulator.launches) == ledger.launches
    records = 4 * int(TILE_PLANS[rung](spec).record_words) if rung in TENSOR else 0
    assert simulator.bytes_read == ledger.bytes_read + 3 * records
    excess = simulator.bytes_written - ledger.bytes_written - 3 * records
    assert excess in range({"epilogue": 2 * 32 + 1}.get(rung, 1))


@pairs(KERNEL_RUNGS, [*SOME, "kernel 1", "width 17"], ["eight channels, eight groups"])
def test_ledger_is_what_the_simulator_counts(rung: str, case: str) -> None:
    assert_counted(rung, *make(rung, case))


@pairs(KERNEL_RUNGS, ["several blocks per group"], ["eight channels, eight groups"])
def test_ledger_without_dropout_has_no_seed(rung: str, case: str) -> None:
    assert_counted(rung, *make(rung, case, training=False))


@pytest.mark.parametrize(
    ("case", "training"), [("1-D", True), ("groups across norm groups", False)]
)
@pytest.mark.parametrize("rung", [name for name in KERNEL_RUNGS if name not in TENSOR])
def test_ledger_in_fp64(rung: str, case: str, training: bool) -> None:
    assert_counted(rung, *make(rung, case, torch.float64, training=training))


def test_ledgers_of_the_benchmark_fall_to_the_compulsory_bytes() -> None:
    """Each idea saves traffic, or costs less than a hundredth more for what else it brings."""
    spec = bench.case_spec("kb83")
    moved = {rung.name: rung.ledger(spec).bytes_moved for rung in ladder.rungs()}
    assert moved["unfused"] > 2 * moved["pointwise"] > 2 * moved["epilogue"]
    for name in ("one_kernel", "tiled"):
        assert moved[name] == pytest.approx(moved["epilogue"], rel=0.01)
    assert moved["tiled"] > 2 * moved["recompute"]
    for name in ("tensor_core", "split"):
        assert moved[name] == pytest.approx(moved["recompute"], rel=0.01)
    assert moved["split"] > 1.15 * moved["pipelined"]
    assert spec.compulsory_bytes <= moved["pipelined"] < 1.01 * spec.compulsory_bytes
    assert moved["algebra"] < spec.compulsory_bytes


# ---- arguments ----------------------------------------------------------------------------------


def test_the_registry_is_in_order_and_has_a_lesson_for_each_rung() -> None:
    assert RUNGS[:5] == ["torch", "unfused", "pointwise", "epilogue", "one_kernel"]
    assert [rung.number for rung in ladder.rungs()] == list(range(12))
    for rung in ladder.rungs():
        assert ladder.get(rung.name) is rung
        assert rung.idea
        assert rung.idea.endswith(".")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    spec, operands, _ = make("torch", "small")
    with pytest.raises(ValueError, match="unknown variant 'fastest'") as caught:
        run("fastest", spec, operands)
    assert all(name in str(caught.value) for name in RUNGS)


@pytest.mark.parametrize("threads", [0, 16, 100, 1056, -32])
@pytest.mark.parametrize("rung", RUNGS)
def test_bad_block_sizes_write_nothing(rung: str, threads: int) -> None:
    spec, operands, _ = make(rung, "small")
    out = torch.full(spec.output_shape, torch.nan)
    with pytest.raises(ValueError, match=f"multiple of 32 from 32 to 1024, but got {threads}"):
        ladder.run(rung, *operands, spec=spec, seed=0, out=out, threads_per_block=threads)
    assert out.isnan().all()


# rungs, shapes of x and weight, arguments, what the message has to say
LIMITS: dict[str, tuple[list[str], tuple[int, ...], tuple[int, ...], dict[str, Any], str]] = {
    "TF32 only if asked for": (
        ["tensor_core"],
        (1, 2, 9),
        (4, 2, 3),
        {"precision": "ieee"},
        "rounds to TF32: pass precision='tf32'",
    ),
    "no groups": (TENSOR, (1, 2, 9), (4, 1, 3), {"groups": 2}, "all input channels.*groups=2"),
    "windows fit into registers": (
        TENSOR,
        (1, 1, 64),
        (2, 1, 3),
        {"dilation": 12},
        r"26 values .* under two outputs \(stride 1, kernel 3, dilation 12\).* registers hold 24",
    ),
    "tiles fit into shared memory": (
        TENSOR,
        (1, 1, 1800, 16),
        (2, 1, 1, 3),
        {"stride": (200, 1)},
        "input tile needs more than 227 KB of shared memory",
    ),
    "a sample fits into the GPU": (
        ["pipelined"],
        (1, 1, 64, 1024, 1024),
        (2, 1, 1, 1, 1),
        {},
        r"a sample has \d+ tiles, and the GPU holds \d+ blocks at once",
    ),
    "a constant must be one": (
        ["algebra"],
        (1, 2, 9),
        (4, 2, 3),
        {"cap": 0.5},
        "degenerate chain, and .* depends on its input",
    ),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_rung_says_which_limit_a_shape_hits(what: str) -> None:
    rungs, x_shape, weight_shape, arguments, message = LIMITS[what]
    operands = no_operands(x_shape, weight_shape)
    for rung in rungs:
        spec = spec_of(rung, operands, num_groups=1, **arguments)
        with pytest.raises(ValueError, match=f"'{rung}' cannot run this shape: .*{message}"):
            ladder.run(rung, *operands, spec=spec, seed=0)


@pytest.mark.parametrize("rung", TENSOR)
def test_tensor_cores_take_fp32_alone(rung: str) -> None:
    spec, operands, _ = make(rung, "small", torch.float64)
    with pytest.raises(ValueError, match="tensor cores take fp32 here, and x is float64"):
        run(rung, spec, operands)


@pytest.mark.parametrize("rung", RUNGS)
def test_an_empty_batch_launches_nothing(rung: str) -> None:
    _, operands, _ = make(rung, "small")
    operands = operands._replace(x=operands.x[:0])
    spec = spec_of(rung, operands, num_groups=2, **TRAINING)
    simulator = Simulator()
    assert run(rung, spec, operands, simulator=simulator).shape == spec.output_shape
    assert not simulator.launches


@pytest.mark.parametrize("rung", RUNGS)
def test_any_strides(rung: str) -> None:
    """Channels last, reversed axes and every other element of a buffer give the same bits."""
    spec, operands, threads = make(rung, "small")
    expected = run(rung, spec, operands, threads)
    strided = Operands(
        operands.x.to(memory_format=torch.channels_last_3d),
        operands.weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        *(torch.stack([t, t.neg()], dim=1)[:, 0] for t in operands[2:] if t is not None),
    )
    assert not any(t.is_contiguous() for t in strided if t is not None)
    assert bits(run(rung, spec, strided, threads)) == bits(expected)


@pytest.mark.parametrize("rung", [rung.name for rung in ladder.rungs() if rung.number > 0])
def test_a_sample_beyond_32_bit_indices_is_refused(rung: str) -> None:
    """Nor one whose last tile, of 4096 values at most, would reach beyond them."""

    def limit(width: int) -> str | None:
        spec = spec_of(rung, no_operands((1, 1, width), (1, 1, 1)), num_groups=1)
        return ladder.get(rung).limit(spec)

    largest = limit(2**31 - 4096)
    assert largest is None or (rung == "pipelined" and "blocks at once" in largest)
    assert "2,147,479,553 values" in str(limit(2**31 - 4095))


def test_auto_falls_back_to_torch_where_the_kernels_cannot_run() -> None:
    fits, does_not = (
        spec_for(no_operands((1, 1, 2**31 - missing), (1, 1, 1)), num_groups=1)
        for missing in (4096, 4095)
    )
    assert plan.choose(fits) != "torch"
    assert plan.choose(does_not) == "torch"
