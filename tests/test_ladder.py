"""ladder/: every rung computes the operator, whatever the shape, block size and schedule.

The kernels run in the simulator, so all of this holds on a machine without a GPU. Outputs start
as NaN: an element nobody writes is seen. The judge is `definition`, in extended precision.
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
from numba_fused import ladder, plan
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

RUNGS = ladder.names()
KERNEL_RUNGS = [rung.name for rung in ladder.rungs() if rung.takes_threads_per_block]
SEED = 12345
TRAINING = {"dropout_p": 0.25, "training": True}

# name: (x shape, weight shape, arguments, threads per block). Block sizes go from one warp that
# strides over its group many times to 1024 threads of which a handful has work.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], int]] = {
    "miniature": ((2, 3, 4, 5, 6), (4, 3, 3, 3, 3), {"num_groups": 2}, 128),
    "one group": ((2, 2, 3, 4, 18), (3, 2, 2, 2, 2), {"num_groups": 1}, 64),
    "group per channel": ((1, 2, 4, 4, 5), (5, 2, 3, 2, 1), {"num_groups": 5}, 96),
    "several blocks per group": ((1, 1, 6, 8, 19), (2, 1, 1, 2, 3), {"num_groups": 1}, 32),
    "more threads than values": ((1, 2, 3, 3, 4), (4, 2, 2, 2, 2), {"num_groups": 2}, 1024),
    "kernel 1": ((1, 4, 2, 3, 16), (4, 4, 1, 1, 1), {"num_groups": 4}, 256),
    "kernel of the input's size": ((3, 2, 3, 4, 5), (6, 2, 3, 4, 5), {"num_groups": 2}, 32),
    "not cubic, stride, padding": (
        (2, 3, 5, 6, 7),
        (4, 3, 1, 2, 3),
        {"num_groups": 2, "stride": (2, 1, 3), "padding": (0, 1, 2)},
        64,
    ),
    "dilation": (
        (1, 2, 6, 7, 9),
        (4, 2, 2, 3, 2),
        {"num_groups": 2, "dilation": (3, 2, 4), "padding": 1},
        128,
    ),
    "same, even kernel": (
        (1, 2, 3, 4, 17),
        (2, 2, 2, 3, 4),
        {"num_groups": 1, "padding": "same", "dilation": (1, 1, 3)},
        64,
    ),
    "padding beyond the kernel": (
        (1, 1, 2, 2, 3),
        (2, 1, 2, 2, 2),
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
    "width 1": ((2, 2, 6, 7, 1), (4, 2, 3, 3, 1), {"num_groups": 2}, 32),
    "width 17": ((1, 2, 3, 3, 19), (4, 2, 2, 2, 3), {"num_groups": 2}, 128),
    "2-D": ((2, 3, 9, 10), (4, 3, 3, 2), {"num_groups": 2, "stride": 2, "padding": (1, 0)}, 64),
    "1-D": ((3, 4, 40), (6, 2, 5), {"num_groups": 3, "groups": 2, "padding": "same"}, 32),
}
SOME = ["miniature", "several blocks per group", "groups across norm groups", "1-D"]


def make(
    case: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[BlockSpec, Operands, int]:
    """Spec, random operands and threads per block of one of the cases above."""
    x_shape, weight_shape, arguments, threads = CASES[case]
    tensors = {k: changes.pop(k) for k in ("bias", "affine", "offset") if k in changes}
    operands = random_operands(x_shape, weight_shape, dtype, **tensors)
    return spec_for(operands, **(TRAINING | arguments | changes)), operands, threads


def run(
    rung: str, spec: BlockSpec, operands: Operands, threads: int = 128, **options: Any
) -> Tensor:
    """The rung's output, written over NaN; races are looked for in the first test alone."""
    out = torch.full(spec.output_shape, torch.nan, dtype=operands.x.dtype)
    options = {"seed": SEED, "simulator": Simulator(check_races=False)} | options
    returned = ladder.run(rung, *operands, spec=spec, out=out, threads_per_block=threads, **options)
    assert returned is out
    return out


def own_reference(spec: BlockSpec, operands: Operands) -> Tensor:
    """PyTorch's answer in the operands' dtype."""
    return nf.reference(
        *operands,
        seed=SEED,
        num_groups=spec.num_groups,
        stride=spec.stride,
        padding=[before for before, _ in spec.padding],
        dilation=spec.dilation,
        groups=spec.groups,
        eps=spec.eps,
        min_value=spec.min_value,
        max_value=spec.max_value,
        cap=spec.cap,
        dropout_p=spec.dropout_p,
        training=spec.training,
    )


def mask(spec: BlockSpec) -> np.ndarray:
    return nf.keep_mask(SEED, spec.output_shape, spec.dropout_p)


def bits(t: Tensor) -> bytes:
    return t.numpy().tobytes()


def assert_accurate(out: Tensor, spec: BlockSpec, operands: Operands) -> None:
    """At most twice the error PyTorch makes in the same dtype, or two roundings."""
    exact = definition(spec, operands, mask(spec) if spec.draws else None)
    torch_out = ladder.run("torch", *operands, spec=spec, seed=SEED)
    bound = 2 * max(relative_error(torch_out, exact), UNIT_ROUNDOFF[out.dtype])
    assert relative_error(out, exact) <= bound


# ---- right answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), *((case, torch.float64) for case in SOME)],
    ids=str,
)
@pytest.mark.parametrize("rung", RUNGS)
def test_error_is_at_most_twice_torchs_own(rung: str, case: str, dtype: torch.dtype) -> None:
    spec, operands, threads = make(case, dtype)
    out = run(rung, spec, operands, threads, simulator=Simulator(check_races=True))
    assert_accurate(out, spec, operands)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rung", RUNGS)
def test_absent_vectors_are_neutral(rung: str, affine: bool, bias: bool) -> None:
    spec, operands, threads = make("miniature", bias=bias, affine=affine)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


@pytest.mark.parametrize("num_groups", [1, 2, 4, 12])
@pytest.mark.parametrize("rung", RUNGS)
def test_any_number_of_groups(rung: str, num_groups: int) -> None:
    operands = random_operands((1, 2, 4, 6), (12, 2, 2, 2))
    spec = spec_for(operands, num_groups=num_groups, **TRAINING)
    assert_accurate(run(rung, spec, operands), spec, operands)


@pytest.mark.parametrize("threads", [32, 64, 96, 128, 256, 512, 1024])
@pytest.mark.parametrize("rung", KERNEL_RUNGS)
def test_any_block_size(rung: str, threads: int) -> None:
    """Groups of 200 values: larger than the first three blocks, smaller than the last ones."""
    operands = random_operands((1, 2, 5, 12), (4, 2, 1, 3))
    spec = spec_for(operands, num_groups=1, **TRAINING)
    assert spec.group_size == 200
    assert_accurate(run(rung, spec, operands, threads), spec, operands)


@pytest.mark.parametrize("rung", RUNGS)
def test_a_large_mean_leaves_the_variance_alone(rung: str) -> None:
    """Inputs offset by 1e3, once through a convolution, once as they are (exactly)."""
    spec, operands, threads = make("miniature", offset=1e3)
    assert_accurate(run(rung, spec, operands, threads), spec, operands)

    x = random_operands((1, 1, 300), (2, 1, 1), offset=1e3).x
    operands = Operands(x, torch.ones(2, 1, 1))
    spec = spec_for(operands, num_groups=2)
    out = run(rung, spec, operands, 64)
    assert_accurate(out, spec, operands)
    assert relative_error(out, definition(spec, operands)) < 1e-4  # E[x^2] - E[x]^2: 1e-2


@pytest.mark.parametrize("rung", RUNGS)
def test_eps_is_added_to_the_variance(rung: str) -> None:
    spec, operands, threads = make("miniature", eps=0.7)
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
    spec, operands, threads = make(case, dtype)
    operands = Operands(*(integers(t.shape, dtype) for t in operands[:3] if t is not None))
    simulator = FirstKernel(check_races=False)
    with pytest.raises(FirstKernel.Done):
        run(rung, spec, operands, threads, simulator=simulator)
    z = simulator.z.view(spec.output_shape)
    assert np.array_equal(z.numpy(), convolution(spec, operands))


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("rung", RUNGS)
def test_gamma_zero_leaves_each_channel_its_own_beta(rung: str, case: str) -> None:
    spec, operands, threads = make(case, dropout_p=0.5)
    channels = spec.out_channels
    beta = torch.linspace(-1.2, 0.7, channels)
    operands = operands._replace(gamma=torch.zeros(channels), beta=beta)
    expected = beta.clamp(max=0.5).clamp(-1.0, 1.0).view(-1, *(1,) * len(spec.output_size))
    kept = torch.from_numpy(mask(spec))
    assert expected.unique().numel() == channels
    assert torch.equal(run(rung, spec, operands, threads), kept * 2 * expected)


@pytest.mark.parametrize("threads", [64, 256])
@pytest.mark.parametrize("rung", RUNGS)
def test_statistics_are_exact_where_rounding_cannot_happen(rung: str, threads: int) -> None:
    """Groups of 64 values 7 +- 1: mean 7, variance 1, and with eps = 3 rstd is 1/2."""
    signs = (torch.arange(2 * 2 * 32) * 5 // 3 % 2 * 2 - 1).float().view(2, 2, 32)
    signs[1] *= torch.tensor([1.0, -1.0]).view(2, 1)
    signs = torch.cat([signs, -signs], dim=2)  # every (sample, group) is balanced
    weight = torch.eye(2).view(2, 2, 1)
    gamma, beta = torch.tensor([1.0, 0.5]), torch.tensor([0.0, -0.5])
    operands = Operands(signs, weight, torch.full((2,), 7.0), gamma, beta)
    spec = spec_for(operands, num_groups=2, eps=3.0)
    assert spec.group_size == 64
    h = signs / 2 * gamma.view(2, 1) + beta.view(2, 1)
    assert torch.equal(run(rung, spec, operands, threads), h)


# ---- NaN and infinities -------------------------------------------------------------------------


def plant(operands: Operands, name: str, position: tuple[int, ...], value: float) -> Operands:
    planted = getattr(operands, name).clone()
    planted[position] = value
    return operands._replace(**{name: planted})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("x", (1, 3, 1, 2, 2)),
        ("weight", (4, 1, 0, 1, 1)),
        ("bias", (1,)),
        ("beta", (5,)),
    ],
)
@pytest.mark.parametrize("rung", RUNGS)
def test_bad_values_go_where_torch_sends_them(
    rung: str, name: str, position: tuple[int, ...], value: float
) -> None:
    """Two convolution groups over three norm groups: some of both stay clean."""
    spec, operands, threads = make("groups across norm groups")
    operands = plant(operands, name, position, value)
    out, expected = run(rung, spec, operands, threads), own_reference(spec, operands)
    assert out.isfinite().any()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rung", KERNEL_RUNGS)
def test_a_bad_gamma_spoils_its_channel_alone(rung: str, value: float) -> None:
    """Infinite ones as the formula has it: torch folds the mean into beta, and inf - inf is NaN."""
    spec, operands, threads = make("groups across norm groups")
    operands = plant(operands, "gamma", (3,), value)
    out, exact = run(rung, spec, operands, threads), definition(spec, operands, mask(spec))
    assert np.isfinite(exact[:, :3]).all()
    np.testing.assert_allclose(out.numpy(), exact.astype(float), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rung", RUNGS)
def test_nan_poisons_one_group_of_one_sample_and_outlives_dropout(rung: str) -> None:
    spec, operands, threads = make("depthwise", dropout_p=0.5)
    out = run(rung, spec, plant(operands, "x", (1, 0, 0, 0, 0), math.nan), threads)
    expected = torch.zeros(spec.output_shape, dtype=torch.bool)
    expected[1, :4] = True  # input channel 0 makes channels 0 and 1, which share group 0 of 2
    assert torch.equal(out.isnan(), expected)
    assert not mask(spec)[1, :4].all()


@pytest.mark.parametrize("rung", RUNGS)
def test_min_above_max_gives_max_except_for_nan(rung: str) -> None:
    spec, operands, threads = make("miniature", min_value=1.0, max_value=-0.25, training=False)
    out = run(rung, spec, plant(operands, "x", (0, 0, 0, 0, 0), math.nan), threads)
    assert out[0].isnan().all()
    assert (out[1] == -0.25).all()


@pytest.mark.parametrize("rung", RUNGS)
def test_infinite_bounds_bound_nothing(rung: str) -> None:
    spec, operands, threads = make(
        "miniature", min_value=-math.inf, max_value=math.inf, cap=math.inf
    )
    out = run(rung, spec, operands, threads)
    assert out.abs().max() > 2
    assert_accurate(out, spec, operands)


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["1-D", "kernel 1", "width 1", "width 17"])
@pytest.mark.parametrize("rung", RUNGS)
def test_the_mask_is_the_same_for_every_rung_and_block_size(rung: str, case: str) -> None:
    """With min_value above 0 an element is zero exactly where it is dropped."""
    spec, operands, _ = make(case, min_value=0.25, dropout_p=0.5)
    for threads in (32, 160, 1024 if case == "width 17" else 96):
        out = run(rung, spec, operands, threads)
        assert np.array_equal(out.numpy() != 0, mask(spec))
        assert out.max() == 2 * spec.cap


@pytest.mark.parametrize("seed", [-1, 2**64 + 3, 0x61C8864680B583EB, torch.tensor([7])], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_every_kind_of_seed(rung: str, seed: int | Tensor) -> None:
    spec, operands, threads = make("1-D", min_value=0.25, dropout_p=0.5)
    out = run(rung, spec, operands, threads, seed=seed)
    kept = nf.keep_mask(int(seed), spec.output_shape, 0.5)
    assert np.array_equal(out.numpy() != 0, kept)


@pytest.mark.parametrize("rung", RUNGS)
def test_p_1_gives_zeros_and_keeps_nan(rung: str) -> None:
    spec, operands, threads = make("miniature", dropout_p=1.0)
    out = run(rung, spec, plant(operands, "x", (0, 0, 0, 0, 0), math.nan), threads)
    assert out[0].isnan().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("changes", [{"training": False}, {"dropout_p": 0.0}], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_without_dropout_nothing_is_drawn(rung: str, changes: dict[str, Any]) -> None:
    spec, operands, threads = make("miniature", **changes)
    before = torch.random.get_rng_state()
    out = run(rung, spec, operands, threads, seed=None)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_accurate(out, spec, operands)


# ---- reproducibility ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", SOME)
@pytest.mark.parametrize("rung", KERNEL_RUNGS)
def test_bits_do_not_depend_on_the_run_or_the_schedule(rung: str, case: str) -> None:
    spec, operands, threads = make(case)
    first = run(rung, spec, operands, threads)
    for schedule in (None, 1, 2):
        simulator = Simulator(schedule_seed=schedule, check_races=False)
        again = run(rung, spec, operands, threads, simulator=simulator)
        assert bits(again) == bits(first)


# ---- the ledger ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype", "training"),
    [
        *((case, torch.float32, True) for case in [*SOME, "kernel 1", "width 17"]),
        ("several blocks per group", torch.float32, False),
        ("1-D", torch.float64, True),
        ("groups across norm groups", torch.float64, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rung", KERNEL_RUNGS)
def test_ledger_is_what_the_simulator_counts(
    rung: str, case: str, dtype: torch.dtype, training: bool
) -> None:
    """To the byte where every element of x is used: these cases have no stride, no dilation.

    A ledger counts bytes, memory moves sectors of 32: a rung that writes an array from several
    source lines is charged twice for the sectors in which one line's part ends and another's
    begins. Rung `epilogue` has one such array, of three parts.
    """
    spec, operands, threads = make(case, dtype, training=training)
    simulator = Simulator(count=True, check_races=False)
    run(rung, spec, operands, threads, simulator=simulator)
    ledger = ladder.get(rung).ledger(spec, threads)
    assert len(simulator.launches) == ledger.launches
    assert simulator.bytes_read == ledger.bytes_read
    excess = simulator.bytes_written - ledger.bytes_written
    assert excess in range({"epilogue": 2 * 32 + 1}.get(rung, 1))


def test_a_higher_rung_never_moves_more_than_the_one_below() -> None:
    """On a case of the benchmark's proportions; the last one trades launches for nothing."""
    spec, _, _ = make("miniature")
    moved = [ladder.get(name).ledger(spec, 128).bytes_moved for name in KERNEL_RUNGS]
    assert moved == sorted(moved, reverse=True)
    assert min(moved) >= spec.compulsory_bytes


# ---- arguments ----------------------------------------------------------------------------------


def test_the_registry_is_in_order_and_has_a_lesson_for_each_rung() -> None:
    assert RUNGS[:5] == ["torch", "unfused", "pointwise", "epilogue", "one_kernel"]
    assert [rung.number for rung in ladder.rungs()] == sorted({r.number for r in ladder.rungs()})
    for rung in ladder.rungs():
        assert ladder.get(rung.name) is rung
        assert rung.idea
        assert rung.idea.endswith(".")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    spec, operands, _ = make("miniature")
    with pytest.raises(ValueError, match="unknown variant 'fastest'") as caught:
        run("fastest", spec, operands)
    assert all(name in str(caught.value) for name in RUNGS)


@pytest.mark.parametrize("threads", [0, 16, 100, 1056, -32])
@pytest.mark.parametrize("rung", RUNGS)
def test_bad_block_sizes_write_nothing(rung: str, threads: int) -> None:
    spec, operands, _ = make("miniature")
    out = torch.full(spec.output_shape, torch.nan)
    with pytest.raises(ValueError, match=f"multiple of 32 from 32 to 1024, but got {threads}"):
        ladder.run(rung, *operands, spec=spec, seed=0, out=out, threads_per_block=threads)
    assert out.isnan().all()


def test_a_rung_says_which_limit_a_shape_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, operands, _ = make("miniature")
    module = ladder.get("one_kernel").module
    limit: Callable[[BlockSpec], str] = lambda spec: f"{spec.out_channels} channels, at most 3"  # noqa: E731
    monkeypatch.setattr(module, "limit", limit, raising=False)
    with pytest.raises(ValueError, match="'one_kernel' cannot run this shape: 4 channels"):
        run("one_kernel", spec, operands)


@pytest.mark.parametrize("rung", RUNGS)
def test_an_empty_batch_launches_nothing(rung: str) -> None:
    _, operands, _ = make("miniature")
    operands = operands._replace(x=operands.x[:0])
    spec = spec_for(operands, num_groups=2, **TRAINING)
    simulator = Simulator()
    assert run(rung, spec, operands, simulator=simulator).shape == spec.output_shape
    assert not simulator.launches


@pytest.mark.parametrize("rung", RUNGS)
def test_any_strides(rung: str) -> None:
    """Channels last, reversed axes and every other element of a buffer give the same bits."""
    spec, operands, threads = make("miniature")
    expected = run(rung, spec, operands, threads)
    strided = Operands(
        operands.x.to(memory_format=torch.channels_last_3d),
        operands.weight.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0),
        *(torch.stack([t, t.neg()], dim=1)[:, 0] for t in operands[2:] if t is not None),
    )
    assert not any(t.is_contiguous() for t in strided if t is not None)
    assert bits(run(rung, spec, strided, threads)) == bits(expected)


def samples_of(width: int) -> BlockSpec:
    """Shapes only: no tensor of this size is ever made."""
    return BlockSpec.from_arguments(
        (1, 1, width), (1, 1, 1), num_groups=1, min_value=-1.0, max_value=1.0, cap=0.5
    )


@pytest.mark.parametrize("rung", [rung.name for rung in ladder.rungs() if rung.number > 0])
def test_a_sample_beyond_32_bit_indices_is_refused(rung: str) -> None:
    """Nor one whose last tile, of 4096 values at most, would reach beyond them."""
    assert ladder.get(rung).limit(samples_of(2**31 - 4096)) is None
    assert "2,147,479,553 values" in str(ladder.get(rung).limit(samples_of(2**31 - 4095)))


def test_auto_falls_back_to_torch_where_the_kernels_cannot_run() -> None:
    assert plan.choose(samples_of(2**31 - 4096)) == "library_conv"
    assert plan.choose(samples_of(2**31 - 4095)) == "torch"
