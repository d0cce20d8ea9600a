"""device/tile_shape.py, tensor_tile.py, fragments.py: what is special to tensor-core tiles.

That the rungs keep the operator's promises is for test_ladder to say. Here: the numbers of a tile,
its seams, the scales that keep halves from overflowing, and the blocks that wait for each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
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
)
from hypothesis import assume, given
from hypothesis import strategies as st
from test_ladder import SEED, TENSOR, TRAINING, assert_accurate, bits, mask, plant, run, spec_of

from numba_fused import bench, ladder, verify
from numba_fused.device.tile_shape import LONGEST_WINDOW, WARP, TileShape, round_up
from numba_fused.ladder import rung_9_pipelined, tensor_cores
from numba_fused.ladder.rung import once
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

WORD_FORMATS = ["tensor_core", "pipelined"]  # words of one TF32 value, words of two halves
UNBOUNDED = {"min_value": -math.inf, "max_value": math.inf, "cap": math.inf}


def shape_of(rung: str, spec: BlockSpec, aligned: bool = True) -> TileShape:
    if rung == "tensor_core":
        return tensor_cores.tile_shape(spec, 1, False, aligned)
    return tensor_cores.tile_shape(spec, 2, spec.precision == "ieee", aligned)


def forget_shapes() -> None:
    tensor_cores._candidates.cache_clear()
    tensor_cores.tile_shape.cache_clear()
    tensor_cores.tile_plan.cache_clear()
    once.cache_clear()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets limits of `tensor_cores`, so that small problems need many tiles or chunks."""

    def change(**values: int) -> None:
        monkeypatch.undo()
        for name, value in values.items():
            monkeypatch.setattr(tensor_cores, name, value)
        forget_shapes()

    yield change
    monkeypatch.undo()
    forget_shapes()


# ---- the numbers of a tile ----------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn) -> TileShape:
    """The tile of a call of any size that tiles can run: nothing is computed."""
    axes = draw(st.integers(1, 3))

    def per_axis(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation = per_axis(1, 5), per_axis(1, 3)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(s + extra for s, extra in zip(span, per_axis(1, 70), strict=True))
    in_channels, num_groups = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    spec = BlockSpec.from_arguments(
        (2, in_channels, *size),
        (num_groups * draw(st.integers(1, 12)), in_channels, *kernel),
        num_groups=num_groups,
        stride=per_axis(1, 3),
        padding=per_axis(0, 5),
        dilation=dilation,
        precision=draw(st.sampled_from(["ieee", "tf32"])),
        **BOUNDS,
    )
    rung = "tensor_core" if spec.precision == "tf32" else "split"
    assume(ladder.get(rung).limit(spec) is None)
    return shape_of(rung, spec, draw(st.booleans()))


KB83 = shape_of("split", bench.case_spec("kb83"))


@given(shapes())
def test_a_tile_fits_into_a_block(shape: TileShape) -> None:
    assert shape.shared_bytes <= tensor_cores.LARGEST_SHARED_BYTES
    assert shape.warps <= tensor_cores.MOST_WARPS
    assert shape.window_slots <= LONGEST_WINDOW


@given(shapes())
def test_tiles_and_chunks_cover_everything_once(shape: TileShape) -> None:
    sizes = (shape.channels, shape.rows, shape.columns)
    needed = (shape.out_channels, *shape.out_size[1:])
    for size, count, need in zip(sizes, shape.tiles, needed, strict=True):
        assert (count - 1) * size < need <= count * size
    chunk_sources = shape.planes * shape.plane_sources
    assert (shape.chunks - 1) * chunk_sources < shape.sources <= shape.chunks * chunk_sources
    assert shape.chunks == 1 or shape.staged_planes == chunk_sources


@given(shapes())
def test_every_tap_of_every_plane_has_one_slot(shape: TileShape) -> None:
    used = np.sort(shape.slots[shape.slots >= 0])
    assert used.tolist() == list(range(shape.planes * math.prod(shape.kernel_size[1:])))
    assert shape.slots.shape == (shape.steps, 4)


@given(shapes())
def test_weights_meet_the_words_they_belong_to(shape: TileShape) -> None:
    """A lane's slot says where its weights come from, its offset where its words do."""
    _, kernel_h, kernel_w = shape.kernel_size
    for step, t in zip(*np.nonzero(shape.slots >= 0), strict=True):
        row, tap_w = divmod(int(shape.slots[step, t]), kernel_w)
        plane, tap_h = divmod(row, kernel_h)
        window, tap = divmod(int(step), kernel_w)
        if window < shape.windows:
            first = shape.window_offsets[4 * window + t] + 2 * tap * shape.dilation[2]
        else:
            first = shape.tail_offsets[4 * (step - shape.windows * kernel_w) + t]
        in_row = tap_h * shape.dilation[1] * shape.row_words + 2 * tap_w * shape.dilation[2]
        assert first == plane * shape.plane_words + in_row


@given(shapes())
def test_lanes_stay_inside_the_words_of_the_tile(shape: TileShape) -> None:
    """Whatever the row, the column and the tap; and rows of input do not run into each other."""
    last_row = (shape.rows - 1) * shape.stride[1]
    last_column = (shape.columns - shape.window_positions) * shape.stride[2]
    words = shape.planes * shape.plane_words - last_row * shape.row_words
    window = int(shape.window_offsets.max()) + 2 * last_column
    assert window + 2 * round_up(shape.window_slots, 2) <= words
    assert int(shape.tail_offsets.max()) + 2 * (shape.columns - 1) * shape.stride[2] + 2 <= words
    assert last_row + (shape.kernel_size[1] - 1) * shape.dilation[1] < shape.in_rows
    assert last_column + shape.window_slots <= shape.row_slots
    assert shape.in_rows * shape.row_words <= shape.plane_words


@given(shapes())
def test_vector_accesses_are_aligned(shape: TileShape) -> None:
    strides = (shape.row_words, shape.plane_words, shape.words, shape.staged_row)
    assert not any(stride % 4 for stride in (*strides, shape.channel_stride))
    assert not (shape.window_offsets % 4).any()
    assert not (shape.tail_offsets % 2).any()
    assert shape.shift < shape.vector
    assert (shape.padding[2] + shape.shift) % shape.vector == 0
    assert shape.vector == 1 or shape.in_size[2] % 4 == 0
    assert shape.store == 1 or math.prod(shape.out_size[1:]) % 4 == 0


def passes(shape: TileShape, window: int) -> int:
    """Passes through the 32 banks that the worst quarter of a warp's 128-bit load takes."""
    lane = np.arange(WARP)
    first = lane // 4 * shape.stride[1] * shape.row_words
    quads = (first + shape.window_offsets[4 * window + lane % 4]) // 4
    quarters = (set(quarter.tolist()) for quarter in quads.reshape(4, 8))  # same address: one pass
    return max(max(Counter(quad % 8 for quad in quarter).values()) for quarter in quarters)


@given(shapes())
def test_windows_over_four_planes_have_banks_of_their_own(shape: TileShape) -> None:
    """At stride 1; what is left of the planes may take two passes."""
    assume(shape.stride[1] == 1)
    for window in range(shape.windows):
        whole = window < shape.planes // 4 * shape.kernel_size[1]
        assert passes(shape, window) <= (1 if whole else 2)


def test_windows_of_the_benchmark_have_banks_of_their_own() -> None:
    assert KB83.planes == 3
    assert [passes(KB83, window) for window in range(KB83.windows)] == [1, 1]


@given(shapes())
def test_records_pool_channels_of_one_group_in_one_tile(shape: TileShape) -> None:
    assert shape.group_channels % shape.record_channels == 0
    assert shape.channels % shape.record_channels == 0
    assert shape.record_channels * shape.row_warps * shape.column_warps <= WARP


# ---- seams --------------------------------------------------------------------------------------

# name: (x shape, weight shape, arguments, changes to the limits)
SEAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, int]]] = {
    "tiles along every axis": (
        (1, 2, 3, 10, 18),
        (17, 2, 2, 2, 2),
        {"num_groups": 1},
        {"MOST_WARPS": 1},
    ),
    "a group across channel tiles": ((1, 1, 2, 3), (130, 1, 1, 2), {"num_groups": 26}, {}),
    "warps along rows and columns": ((1, 1, 11, 19), (2, 1, 3, 3), {"num_groups": 2}, {}),
    "a last row and a last column": ((2, 1, 9, 33), (4, 1, 1, 1), {"num_groups": 2}, {}),
    "warps along channels": ((1, 3, 2, 5), (40, 3, 1, 2), {"num_groups": 8}, {}),
    "chunks": ((1, 9, 20), (5, 9, 3), {"num_groups": 5}, {"SHARED_BYTES": 10_000}),
    "40 channels, 5 to a group": ((1, 40, 17), (10, 40, 2), {"num_groups": 2}, {}),
    "17 channels in and out": ((1, 17, 2, 6), (17, 17, 2, 2), {"num_groups": 17}, {}),
    "kernel 5, padding 2": (
        (1, 1, 6, 12),
        (3, 1, 5, 5),
        {"num_groups": 3, "padding": 2},
        {},
    ),
    "padding 3, stride 2": (
        (2, 5, 16),
        (4, 5, 3),
        {"num_groups": 4, "padding": 3, "stride": 2},
        {},
    ),
    "padding 1, kernel 3": ((1, 1, 3, 16), (6, 1, 3, 3), {"num_groups": 2, "padding": 1}, {}),
    "dilation, stride": (
        (1, 2, 9, 21),
        (9, 2, 2, 3),
        {"num_groups": 3, "stride": (2, 1), "dilation": (3, 2), "padding": (1, 2)},
        {},
    ),
    "window of 24": ((1, 1, 40), (2, 1, 3), {"num_groups": 1, "dilation": 11}, {}),
    "width 65": ((1, 2, 65), (3, 2, 1), {"num_groups": 1}, {"MOST_WARPS": 4}),
}


@pytest.mark.parametrize("seam", SEAMS)
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_seams(rung: str, seam: str, limits: Callable[..., None]) -> None:
    x_shape, weight_shape, arguments, changes = SEAMS[seam]
    limits(**changes)
    operands = random_operands(x_shape, weight_shape)
    spec = spec_of(rung, operands, **TRAINING, **arguments)
    out = run(rung, spec, operands, simulator=Simulator(check_races=True))
    assert_accurate(out, spec, operands)


def test_seams_are_what_they_are_called(limits: Callable[..., None]) -> None:
    def seam(name: str, rung: str = "pipelined") -> TileShape:
        x_shape, weight_shape, arguments, changes = SEAMS[name]
        limits(**changes)
        return shape_of(rung, spec_of(rung, random_operands(x_shape, weight_shape), **arguments))

    every = seam("tiles along every axis")
    assert min(*every.tiles, every.out_size[0]) > 1
    across = seam("a group across channel tiles")
    assert across.tiles[0] > 1
    assert across.channels % across.group_channels
    grid = seam("warps along rows and columns")
    assert min(grid.row_warps, grid.column_warps) > 1
    assert seam("warps along channels").channel_warps > 2
    for rung in WORD_FORMATS:
        assert seam("chunks", rung).chunks > 1
    padded = ("padding 3, stride 2", "kernel 5, padding 2", "padding 1, kernel 3")
    assert [seam(name).shift for name in padded] == [1, 2, 3]
    assert seam("window of 24").window_slots == LONGEST_WINDOW
    assert seam("width 65").tiles[2] > 1


@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_pointers_off_16_bytes_give_the_same_bits(rung: str) -> None:
    """Views into larger buffers; aligned tensors are copied four values at a time."""
    operands = random_operands((2, 1, 3, 16), (3, 1, 2, 1))
    spec = spec_of(rung, operands, num_groups=1, **TRAINING)
    assert (shape_of(rung, spec).vector, shape_of(rung, spec, aligned=False).vector) == (4, 1)
    assert (shape_of(rung, spec).store, shape_of(rung, spec, aligned=False).store) == (4, 1)
    expected = run(rung, spec, operands)
    x = torch.empty(operands.x.numel() + 1)[1:].view_as(operands.x).copy_(operands.x)
    out = torch.empty(expected.numel() + 1)[1:].view_as(expected)
    for t in (x, out):
        assert t.data_ptr() % 16
    ladder.run(rung, x, *operands[1:], spec=spec, seed=SEED, out=out)
    assert bits(out) == bits(expected)


# ---- exact products -----------------------------------------------------------------------------


@pytest.mark.parametrize("rung", TENSOR)
@pytest.mark.parametrize(
    ("x_shape", "weight_shape", "arguments"),
    [
        ((1, 3, 2, 6, 10), (4, 3, 2, 3, 3), {}),
        ((1, 5, 7, 16), (2, 5, 1, 1), {"stride": (2, 1)}),
        ((1, 2, 40), (8, 2, 5), {"padding": 2, "stride": 5}),
    ],
    ids=str,
)
def test_convolution_of_small_integers_is_exact(
    rung: str,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    arguments: dict[str, Any],
) -> None:
    """Groups of a power of two of them, so that the mean is; and eps makes rstd a power of two."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-3, 4, shape, generator=generator).float()
        for shape in (x_shape, weight_shape, weight_shape[:1])
    )
    channels = weight_shape[0]
    operands = Operands(x, weight, bias, torch.full((channels,), 2.0**20), torch.zeros(channels))
    spec = spec_of(rung, operands, num_groups=1, eps=2.0**40, **arguments, **UNBOUNDED)
    assert spec.group_size.bit_count() == 1
    z = convolution(spec, operands)
    assert np.array_equal(run(rung, spec, operands).numpy(), z - z.mean())


@pytest.mark.parametrize("rung", ["split", "pipelined"])
def test_halves_are_as_good_as_tf32_where_that_is_enough(rung: str) -> None:
    """With precision "tf32" there is one product, and its error is TF32's, not fp32's."""
    operands = random_operands((1, 3, 4, 20), (4, 3, 3, 3))
    spec = dataclasses.replace(spec_of(rung, operands, num_groups=2), precision="tf32")
    assert not shape_of(rung, spec).split
    out = run(rung, spec, operands)
    assert_accurate(out, spec, operands)
    assert relative_error(out, definition(spec, operands)) > 100 * UNIT_ROUNDOFF[out.dtype]


# ---- scales -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_x", "of_weight"),
    [
        (1e30, 1e-30),
        (1e-30, 1e30),
        (1e30, 1e-14),
        (1e-14, 1e30),
        (1e8, 1e8),
        (1e-15, 1e-15),
        (1e-30, 1.0),
        (1e-39, 1e10),  # subnormal
        (1e10, 1e-39),
        (1e-43, 1e30),
    ],
)
def test_any_magnitude(of_x: float, of_weight: float) -> None:
    """Nothing to hide behind: no beta, no bounds, and eps counts where z is small."""
    operands = random_operands((1, 2, 3, 12), (4, 2, 2, 2), bias=False, affine=False)
    operands = Operands(operands.x * of_x, operands.weight * of_weight)
    spec = spec_of("pipelined", operands, num_groups=2, **UNBOUNDED)
    out = run("pipelined", spec, operands)
    assert out.isfinite().all()
    assert_accurate(out, spec, operands)


def test_each_tile_and_each_channel_has_its_own_scale(limits: Callable[..., None]) -> None:
    """Rows 0 to 7 and 8 to 15 are tiles of their own, 10^8 apart, and the channels 10^6."""
    limits(MOST_WARPS=1)
    operands = random_operands((1, 2, 16, 6), (4, 2, 1, 2), affine=False, bias=False)
    operands.x[:, :, 8:] *= 1e-8
    operands.weight[1:3] *= 1e-6
    spec = spec_of("pipelined", operands, num_groups=4, eps=0.0, **UNBOUNDED)
    assert shape_of("pipelined", spec).tiles[1] == 2
    out, exact = run("pipelined", spec, operands), definition(spec, operands)
    assert_accurate(out, spec, operands)
    # The statistics of a group are those of its first tile: (z - mean) * rstd tells the other's z.
    far = out[:, :, 8:] - out[:, :, 8:].mean(dim=(2, 3), keepdim=True)
    assert relative_error(far, exact[:, :, 8:] - exact[:, :, 8:].mean((2, 3), keepdims=True)) < 1.0


@pytest.mark.parametrize("magnitudes", [(2**-6, 1, 2**6), (2**6, 1, 2**-6), (2**6, 2**-6, 2**6)])
def test_the_scale_may_change_from_chunk_to_chunk(
    magnitudes: tuple[float, ...], limits: Callable[..., None]
) -> None:
    """Weights of the inverse magnitudes: every chunk contributes as much as the others.

    A value 2^-n of the tile's largest keeps 40 - n of its bits, a weight of its channel's, too.
    """
    limits(SHARED_BYTES=9_000)
    operands = random_operands((1, 12, 18), (3, 12, 2))
    factors = torch.tensor(magnitudes).repeat_interleave(4).view(1, 12, 1)
    operands = operands._replace(x=operands.x * factors, weight=operands.weight / factors)
    spec = spec_of("pipelined", operands, num_groups=1, **TRAINING)
    assert shape_of("pipelined", spec).chunks == 3
    assert_accurate(run("pipelined", spec, operands), spec, operands)


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_zeros_only_leave_beta(rung: str, name: str) -> None:
    operands = random_operands((2, 2, 2, 5), (4, 2, 1, 2), bias=False)
    operands = operands._replace(**{name: torch.zeros_like(getattr(operands, name))})
    spec = spec_of(rung, operands, num_groups=2)
    expected = definition(spec, operands).astype(np.float32)
    assert np.array_equal(run(rung, spec, operands).numpy(), expected)


@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_tiles_far_from_zero_keep_their_variance(rung: str, limits: Callable[..., None]) -> None:
    """Offset by 1e3, and four tiles whose own means differ."""
    limits(MOST_WARPS=1)
    x = 1e3 + random_operands((1, 1, 10, 20), (2, 1, 1, 1)).x
    x[:, :, 8:] += 3
    operands = Operands(verify.rounded_to_tf32(x), torch.ones(2, 1, 1, 1))
    spec = spec_of(rung, operands, num_groups=1)
    assert shape_of(rung, spec).tiles_per_sample == 4
    out = run(rung, spec, operands)
    assert_accurate(out, spec, operands)
    assert relative_error(out, definition(spec, operands)) < 1e-4  # E[x^2] - E[x]^2: 1e-2


# ---- NaN and infinities -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_a_bad_value_in_one_tile_poisons_its_sample_alone(
    rung: str, value: float, limits: Callable[..., None]
) -> None:
    limits(MOST_WARPS=1)
    operands = random_operands((3, 1, 9, 5), (2, 1, 1, 1))
    spec = spec_of(rung, operands, num_groups=2, **TRAINING)
    assert shape_of(rung, spec).tiles_per_sample == 2
    out = run(rung, spec, plant(operands, "x", (1, 0, 8, 4), value))
    clean = run(rung, spec, operands)
    assert out[1].isnan().all()
    assert bits(out[[0, 2]]) == bits(clean[[0, 2]])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_a_value_that_no_output_uses_changes_nothing(rung: str, value: float) -> None:
    operands = random_operands((1, 3, 5, 9), (4, 3, 1, 1))
    spec = spec_of(rung, operands, num_groups=2, stride=2, **TRAINING)
    expected = run(rung, spec, operands)
    for position in [(0, 1, 2, 3), (0, 0, 1, 4), (0, 2, 3, 7)]:
        operands = plant(operands, "x", position, value)
    assert bits(run(rung, spec, operands)) == bits(expected)


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 16, 17, 62])
@pytest.mark.parametrize("rung", TENSOR)
def test_the_mask_is_keep_mask(rung: str, width: int) -> None:
    """With min_value above 0 an element is zero exactly where it is dropped."""
    operands = random_operands((1, 1, 3, width), (2, 1, 1, 1))
    spec = spec_of(rung, operands, num_groups=1, min_value=0.25, dropout_p=0.5, training=True)
    assert np.array_equal(run(rung, spec, operands).numpy() != 0, mask(spec))


# ---- blocks that wait for each other ------------------------------------------------------------


def test_persistent_blocks_take_several_samples_in_any_order(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(MOST_WARPS=1)
    operands = random_operands((3, 1, 9, 5), (2, 1, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=1, **TRAINING)
    assert shape_of("pipelined", spec).tiles_per_sample == 2
    all_resident = run("pipelined", spec, operands)
    for blocks, schedule in [(2, None), (2, 1), (3, 2)]:
        monkeypatch.setattr(rung_9_pipelined, "resident_blocks", lambda shape, n=blocks: n)
        simulator = Simulator(schedule_seed=schedule, check_races=schedule == 1)
        out = run("pipelined", spec, operands, simulator=simulator)
        assert simulator.launches[-1].grid == (blocks, 1, 1)
        assert bits(out) == bits(all_resident)
    assert_accurate(all_resident, spec, operands)


def test_fewer_blocks_than_tiles_of_a_sample_would_wait_for_ever(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(MOST_WARPS=1)
    operands = random_operands((5, 1, 9, 5), (2, 1, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=1)
    monkeypatch.setattr(rung_9_pipelined, "resident_blocks", lambda shape: 1)
    with pytest.raises(ValueError, match="a sample has 2 tiles, and the GPU holds 1 blocks"):
        run("pipelined", spec, operands)
