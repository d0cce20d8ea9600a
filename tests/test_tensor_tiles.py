"""device/tile_shape.py, tensor_tile.py, fragments.py: what is special to tensor-core tiles.

That the rungs keep the operator's promises is for test_ladder to say. Here: the numbers of a tile,
its seams, the scales that keep halves from overflowing, and the blocks that wait for each other.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter, defaultdict
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
from numba import cuda
from test_ladder import SEED, TENSOR, TRAINING, assert_accurate, bits, mask, plant, run, spec_of

from numba_fused import bench, ladder, verify
from numba_fused.device import fragments, ptx
from numba_fused.device.tensor_tile import ABSENT
from numba_fused.device.tile_shape import (
    LONGEST_WINDOW,
    PROCESSOR_SHARED_BYTES,
    RECORD_WORDS,
    SYSTEM_SHARED_BYTES,
    WARP,
    WARPS_PER_PROCESSOR,
    TileShape,
    round_up,
)
from numba_fused.ladder import rung_7_tensor_core, rung_8_split, rung_9_pipelined, tensor_cores
from numba_fused.ladder.rung import once
from numba_fused.ladder.tensor_cores import TileKind
from numba_fused.simulator import Simulator
from numba_fused.spec import BlockSpec

WORD_FORMATS = ["tensor_core", "pipelined"]  # words of one TF32 value, words of two halves
UNBOUNDED = {"min_value": -math.inf, "max_value": math.inf, "cap": math.inf}


def kind_of(rung: str, spec: BlockSpec) -> TileKind:
    if rung == "tensor_core":
        return rung_7_tensor_core.KIND
    return {"split": rung_8_split, "pipelined": rung_9_pipelined}[rung].kind(spec)


def shape_of(rung: str, spec: BlockSpec, aligned: bool = True) -> TileShape:
    return tensor_cores.tile_shape(spec, kind_of(rung, spec), aligned)


def group_records(shape: TileShape) -> int:
    """Records of one group of a sample: what a warp pools."""
    positions = shape.tiles_per_sample // shape.tiles[0]
    return shape.group_channels // shape.record_channels * positions


def forget_shapes() -> None:
    tensor_cores._candidates.cache_clear()
    tensor_cores.tile_shape.cache_clear()
    tensor_cores.tile_plan.cache_clear()
    once.cache_clear()


@pytest.fixture
def limits() -> Iterator[Callable[..., None]]:
    """Sets limits of `tensor_cores`, so that small problems need many tiles or chunks."""
    with pytest.MonkeyPatch.context() as patch:

        def change(**values: Any) -> None:
            patch.undo()
            for name, value in values.items():
                patch.setattr(tensor_cores, name, value)
            forget_shapes()

        yield change
    forget_shapes()


COST = tensor_cores._cost


def fewest_planes(tile: TileShape) -> Any:
    """A cost by which a tile's input comes in as many chunks as can be."""
    return tile.planes, COST(tile)


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
    assert shape.shared_bytes + shape.static_bytes <= tensor_cores.LARGEST_SHARED_BYTES
    assert shape.shared_bytes + shape.static_bytes + SYSTEM_SHARED_BYTES <= PROCESSOR_SHARED_BYTES
    assert shape.warps <= tensor_cores.MOST_WARPS
    assert shape.window_slots <= LONGEST_WINDOW


@given(shapes())
def test_blocks_share_a_processor(shape: TileShape) -> None:
    """Its memory and its registers, of which a thread has 128; one more would not fit."""
    blocks = shape.blocks_per_processor
    of_block = shape.shared_bytes + shape.static_bytes + SYSTEM_SHARED_BYTES
    assert blocks * shape.threads * 128 <= 65_536
    assert blocks * of_block <= PROCESSOR_SHARED_BYTES
    too_many_warps = (blocks + 1) * shape.warps > WARPS_PER_PROCESSOR
    assert too_many_warps or (blocks + 1) * (of_block + 127) > PROCESSOR_SHARED_BYTES


@given(shapes())
def test_regions_of_shared_memory_do_not_overlap(shape: TileShape) -> None:
    """The output lies where the words were; the input that is staged meanwhile lies behind both."""
    staged = shape.staged_planes * shape.in_rows * shape.staged_row
    assert shape.words <= shape.staged_input_at
    assert shape.channels * shape.channel_stride <= shape.staged_input_at
    assert shape.rows * shape.out_row <= shape.channel_stride
    assert 4 * (shape.staged_input_at + staged) == shape.shared_bytes
    assert shape.staged_input_at % 4 == 0


@given(shapes())
def test_the_copy_engine_is_asked_for_aligned_runs(shape: TileShape) -> None:
    """Of every channel of every tile, the last of a sample included, in both memories."""
    if not shape.bulk_store:
        assert not (shape.aligned and shape.whole_rows and math.prod(shape.out_size[1:]) % 4 == 0)
        return
    _, height, width = shape.out_size
    assert shape.channel_stride % 4 == 0
    for row in range(0, height, shape.rows):
        assert row * width % 4 == 0
        assert min(shape.rows, height - row) * width % 4 == 0
    assert height * width % 4 == 0
    assert not dataclasses.replace(shape, bulk_copies=False).bulk_store
    assert not dataclasses.replace(shape, aligned=False).bulk_store


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


def test_a_tile_of_the_benchmark_leaves_room_for_a_second_block() -> None:
    assert (KB83.tiles, KB83.chunks) == ((1, 4, 1), 1)
    assert KB83.bulk_store
    assert KB83.blocks_per_processor == 2


def test_less_memory_makes_more_chunks(limits: Callable[..., None]) -> None:
    spec = BlockSpec.from_arguments((1, 40, 9, 20), (8, 40, 3, 3), num_groups=2, **BOUNDS)
    chunks = []
    for kilobytes in (224, 40, 20):
        limits(LARGEST_SHARED_BYTES=1024 * kilobytes, _cost=lambda tile: (-tile.planes, COST(tile)))
        shape = shape_of("split", spec)
        assert shape.shared_bytes <= 1024 * kilobytes
        chunks.append(shape.chunks)
    assert chunks == sorted(set(chunks))
    assert chunks[0] == 1


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
SEAMS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "tiles along every axis": (
        (1, 1, 3, 10, 18),
        (17, 1, 2, 2, 2),
        {"num_groups": 1},
        {"MOST_WARPS": 1},
    ),
    "a group across channel tiles": (
        (1, 1, 2, 3),
        (18, 1, 1, 2),
        {"num_groups": 6},
        {"MOST_WARPS": 1},
    ),
    "warps along rows and columns": ((1, 1, 11, 19), (2, 1, 3, 3), {"num_groups": 2}, {}),
    "a last row and a last column": (
        (2, 1, 9, 17),
        (4, 1, 1, 1),
        {"num_groups": 2},
        {"MOST_WARPS": 1},
    ),
    "warps along channels": ((1, 3, 2, 5), (40, 3, 1, 2), {"num_groups": 8}, {}),
    "chunks": ((1, 9, 20), (5, 9, 3), {"num_groups": 5}, {"_cost": fewest_planes}),
    "chunks in several tiles": (
        (1, 9, 9, 6),
        (3, 9, 1, 3),
        {"num_groups": 3},
        {"_cost": fewest_planes, "MOST_WARPS": 1},
    ),
    "10 channels, 5 to a group": ((1, 12, 17), (10, 12, 2), {"num_groups": 2}, {}),
    "several records a lane": (
        (1, 1, 3, 9, 17),
        (5, 1, 1, 1, 1),
        {"num_groups": 1},
        {"MOST_WARPS": 1},
    ),
    "a last row stored in bulk": (
        (1, 1, 9, 12),
        (2, 1, 1, 1),
        {"num_groups": 1},
        {"MOST_WARPS": 1},
    ),
    "parts of rows stored by fours": (
        (1, 1, 9, 20),
        (3, 1, 1, 1),
        {"num_groups": 1},
        {"MOST_WARPS": 1},
    ),
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
        several = seam("chunks in several tiles", rung)
        assert min(several.chunks, several.tiles_per_sample) > 1
    assert WARP < group_records(seam("several records a lane")) < 4 * WARP
    assert group_records(every) > 4 * WARP  # more than a warp loads at once
    bulk, other = seam("a last row stored in bulk"), seam("parts of rows stored by fours")
    assert (bulk.bulk_store, bulk.tiles[1], bulk.out_size[1] % bulk.rows) == (True, 2, 1)
    assert (other.whole_rows, other.store, other.tiles[2]) == (False, 4, 2)
    assert [seam(name).bulk_store for name in ("width 65", "17 channels in and out")] == [False] * 2
    padded = ("padding 3, stride 2", "kernel 5, padding 2", "padding 1, kernel 3")
    assert [seam(name).shift for name in padded] == [1, 2, 3]
    assert seam("window of 24").window_slots == LONGEST_WINDOW
    assert seam("width 65").tiles[2] > 1


# ---- the two ways to write the output ----------------------------------------------------------

# name: (x shape, kernel size, store with the copy engine, store of aligned tensors without it)
STORES: dict[str, tuple[tuple[int, ...], tuple[int, int], tuple[bool, int], int]] = {
    "whole rows": ((2, 1, 9, 12), (2, 1), (True, 4), 4),
    "an odd width": ((1, 1, 9, 9), (1, 3), (False, 1), 1),
    "an odd width, and a plane of fours": ((1, 1, 8, 9), (1, 3), (True, 4), 4),
    "more columns than the tile": ((1, 1, 2, 20), (1, 1), (False, 4), 4),
    "more columns, and odd": ((1, 1, 2, 19), (1, 1), (False, 1), 1),
}


def unaligned(t: torch.Tensor) -> torch.Tensor:
    """A copy that does not begin at a multiple of 16 bytes: a view into a larger buffer."""
    view = torch.empty(t.numel() + 1)[1:].view_as(t).copy_(t)
    assert view.data_ptr() % 16
    return view


@pytest.mark.parametrize("rung", ["tensor_core", "split", "pipelined"])
def test_mean_and_rstd_are_kept_for_whom_it_concerns(
    rung: str, limits: Callable[..., None]
) -> None:
    """Of every (sample, group), each with channels in two tiles; asking changes no bit."""
    limits(MOST_WARPS=1)
    operands = random_operands((2, 2, 4, 5), (48, 2, 2, 2))
    spec = spec_of(rung, operands, num_groups=2, **TRAINING)
    statistics = torch.full((2, spec.batch, spec.num_groups), torch.nan)
    out = ladder.run(rung, *operands, spec=spec, seed=SEED, statistics=statistics)
    assert bits(out) == bits(ladder.run(rung, *operands, spec=spec, seed=SEED))
    x, weight, bias, *_ = operands.to(torch.float64)
    z = torch.nn.functional.conv2d(x, weight, bias).view(spec.batch, spec.num_groups, -1)
    variance, mean = torch.var_mean(z, dim=2, correction=0)
    exact = torch.stack([mean, (variance + spec.eps).rsqrt()]).float()
    torch.testing.assert_close(statistics, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rung", "store"),
    [("tensor_core", "whole rows"), *(("pipelined", store) for store in STORES)],
)
def test_every_way_to_store_gives_the_same_bits(
    rung: str, store: str, limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the copy engine, without it, and from and to pointers off 16 bytes."""
    limits(MOST_WARPS=1)
    x_shape, kernel, (bulk, with_engine), without = STORES[store]
    operands = random_operands(x_shape, (3, 1, *kernel))
    spec = spec_of(rung, operands, num_groups=1, **TRAINING)
    aligned, off = shape_of(rung, spec), shape_of(rung, spec, aligned=False)
    assert (aligned.bulk_store, aligned.store) == (bulk, with_engine)
    assert (off.bulk_store, off.store, off.vector) == (False, 1, 1)

    simulator = Simulator(count=True, check_races=True)
    out = run(rung, spec, operands, simulator=simulator)
    assert_accurate(out, spec, operands)
    called, tiles = simulator.launches[-1].intrinsics, spec.batch * aligned.tiles_per_sample
    assert called.get("copy_out", 0) == bulk * tiles * spec.out_channels
    assert called.get("hand_to_copy_engine", 0) == bulk * tiles * aligned.threads

    out_off = unaligned(torch.full(spec.output_shape, torch.nan))
    x = unaligned(operands.x)
    ladder.run(rung, x, *operands[1:], spec=spec, seed=SEED, out=out_off)
    assert bits(out_off) == bits(out)
    assert torch.equal(x, operands.x)

    monkeypatch.setattr(tensor_cores, "has_bulk_copies", lambda device: False)
    shape = tensor_cores.tile_plan(spec, kind_of(rung, spec), True, False).shape
    assert (shape.bulk_store, shape.store) == (False, without)
    simulator = Simulator(count=True)
    assert bits(run(rung, spec, operands, simulator=simulator)) == bits(out)
    assert "copy_out" not in simulator.launches[-1].intrinsics


# ---- copies that take their time ----------------------------------------------------------------

Asked = defaultdict[tuple[str, int, int], list[tuple[Any, tuple[Any, ...]]]]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Lets asynchronous copies happen as late as may be: when the thread that asked for them waits.

    In the simulator they are done at once otherwise. What is returned holds those that nobody has
    waited for.
    """
    asked: Asked = defaultdict(list)

    def later(copy: Any, wait: str) -> Any:
        def ask(target, target_index, source, source_index, what):
            copies = asked[wait, cuda.blockIdx.x, cuda.threadIdx.x]
            copies.append((copy, (target, target_index, source, source_index, what)))

        return ask

    def waiting(wait: str) -> Any:
        def done():
            for copy, args in asked.pop((wait, cuda.blockIdx.x, cuda.threadIdx.x), []):
                copy(*args)

        return done

    for wait, copies in {
        "wait_for_copies": ("copy_async_1", "copy_async_4"),
        "wait_for_copies_out": ("copy_out",),
    }.items():
        for copy in (getattr(ptx, name) for name in copies):
            monkeypatch.setattr(copy, "simulated_as", later(copy.simulated_as, wait))
        monkeypatch.setattr(getattr(ptx, wait), "simulated_as", waiting(wait))
    return asked


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(
    ("rung", "schedule"), [("tensor_core", None), ("pipelined", None), ("pipelined", 1)]
)
def test_what_is_copied_is_waited_for(
    rung: str,
    schedule: int | None,
    chunks: int,
    late: Asked,
    limits: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before it is read, before what it reads is overwritten, and before the kernel ends.

    Two persistent blocks take four tiles: the next one's input is copied to shared memory while
    they wait, and the one before is still being copied out of it.
    """
    limits(MOST_WARPS=1, _cost=fewest_planes)
    monkeypatch.setattr(rung_9_pipelined, "resident_blocks", lambda shape: 2)
    sources = 4 if rung == "pipelined" else 2  # of a plane
    operands = random_operands((2, chunks * sources, 9, 8), (2, chunks * sources, 1, 1))
    spec = spec_of(rung, operands, num_groups=1, **TRAINING)
    shape = shape_of(rung, spec)
    assert (shape.chunks, shape.tiles_per_sample, shape.bulk_store) == (chunks, 2, True)
    simulator = Simulator(schedule_seed=schedule, check_races=True)
    out = run(rung, spec, operands, simulator=simulator)
    assert not late  # nothing is left in flight
    assert ptx.copy_out.simulated_as.__name__ == "ask"
    assert_accurate(out, spec, operands)


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


@pytest.mark.parametrize("kernel", [(1, 3), (5, 1)], ids=["windows", "tail"])
def test_long_chains_drift_no_more_than_pytorchs(
    kernel: tuple[int, int], limits: Callable[..., None]
) -> None:
    """Matrix instructions cut sums off, always towards zero: the errors of a chain add up."""
    limits(MOST_WARPS=1)
    channels = 480 // math.prod(kernel)
    operands = random_operands((1, channels, 6, 10), (2, channels, *kernel))
    spec = spec_of("pipelined", operands, num_groups=1, **UNBOUNDED)
    assert shape_of("pipelined", spec).sums_apart
    assert_accurate(run("pipelined", spec, operands), spec, operands)


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
    limits(_cost=fewest_planes)
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


# ---- records ------------------------------------------------------------------------------------


class Keeping(Simulator):
    """Keeps the scratch memory of the last launch, as words."""

    scratch: np.ndarray

    def launch(self, kernel: Any, grid: Any, block: Any, *args: Any, **options: Any) -> None:
        super().launch(kernel, grid, block, *args, **options)
        self.scratch = inspect.signature(kernel.py_func).bind(*args).arguments["scratch"].numpy()

    def records(self, shape: TileShape) -> np.ndarray:
        """(n, record, tile position, sum and sum of squares)."""
        positions = shape.tiles_per_sample // shape.tiles[0]
        doubles = self.scratch[shape.records_at :].view(np.float64)
        return doubles.reshape(-1, shape.records, positions, RECORD_WORDS // 2)


def positions(shape: TileShape) -> list[tuple[int, slice, slice]]:
    """Output plane, rows and columns of each tile position, in order."""
    depth, height, width = shape.out_size
    return [
        (d, slice(h, h + shape.rows), slice(w, w + shape.columns))
        for d in range(depth)
        for h in range(0, height, shape.rows)
        for w in range(0, width, shape.columns)
    ]


@pytest.mark.parametrize(("channels", "num_groups", "pooled"), [(4, 2, 2), (17, 1, 1), (3, 3, 1)])
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_records_are_sums_and_sums_of_squares(
    rung: str, channels: int, num_groups: int, pooled: int, limits: Callable[..., None]
) -> None:
    """One for each sample, run of channels and tile position; what a tile has too much is left out.

    Of values 30 away from zero, so that a position counted twice or not at all would be seen.
    """
    limits(MOST_WARPS=1)
    size = (2, 9, 17) if channels == 4 else (1, 1, 17)
    operands = random_operands((2, 1, *size), (channels, 1, 1, 1, 1))
    operands = operands._replace(bias=torch.full((channels,), 30.0))
    spec = spec_of(rung, operands, num_groups=num_groups)
    shape, simulator = shape_of(rung, spec), Keeping(check_races=False)
    assert shape.record_channels == pooled
    run(rung, spec, operands, simulator=simulator)
    z = convolution(spec, operands)
    z = z.reshape(2, shape.records, pooled, *shape.out_size).astype(np.float64)
    for at, (d, rows, columns) in enumerate(positions(shape)):
        values = z[:, :, :, d, rows, columns].reshape(2, shape.records, -1)
        found = simulator.records(shape)[:, :, at]
        np.testing.assert_allclose(found[..., 0], values.sum(-1), rtol=1e-4)
        np.testing.assert_allclose(found[..., 1], (values**2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("name", ["bias", "weight"])
@pytest.mark.parametrize("rung", WORD_FORMATS)
def test_no_record_looks_absent_even_of_nan(rung: str, name: str) -> None:
    """A NaN of the very bits that mark what is absent: whoever published it would be waited for."""
    operands = random_operands((2, 1, 3, 4), (4, 1, 1, 1))
    marked = getattr(operands, name).clone()
    marked.view(-1)[1:2].view(torch.int32).fill_(-1)
    operands = operands._replace(**{name: marked})
    spec = spec_of(rung, operands, num_groups=2, **TRAINING)
    shape, simulator = shape_of(rung, spec), Keeping()
    out = run(rung, spec, operands, simulator=simulator)
    assert out[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()
    records = simulator.records(shape)
    assert np.isnan(records).any()
    assert ABSENT not in records.view(np.uint32)[..., 1::2]


def test_every_record_is_marked_as_absent_and_nothing_else() -> None:
    """By more blocks than there are weights for; the packed weights are the same as without."""
    operands = random_operands((36, 1, 4), (16, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=16)
    plan = tensor_cores.tile_plan(spec, kind_of("pipelined", spec))
    shape = plan.shape
    records = plan.record_words
    marking_blocks = tensor_cores.marking_blocks(shape, int(records))
    assert marking_blocks > shape.packed_tiles
    assert records % (marking_blocks * fragments.THREADS)  # the last ones, too
    packed = []
    for blocks, absent in [(marking_blocks, records), (shape.packed_tiles, 0)]:
        scratch = np.full(shape.records_at + records, 7, np.uint32)
        weight = operands.weight.view(-1).numpy()
        Simulator().launch(
            fragments.pack_kernel(shape), blocks, fragments.THREADS, weight, scratch, absent
        )
        assert (scratch[shape.records_at :] == (ABSENT if absent else 7)).all()
        packed.append(scratch[: shape.records_at].tolist())
    assert packed[0] == packed[1]
    assert len(packed[0]) == shape.fragment_words + 16
    assert 7 not in packed[0]


def test_a_group_of_equal_values_has_no_variance(limits: Callable[..., None]) -> None:
    """Not even a negative one, by rounding: its root would be NaN, and gamma = 0 leaves beta.

    Of 20 bits, so that sums are exact; times 1 / 99 they are not, and eps is smaller than that.
    """
    limits(MOST_WARPS=1)
    x = torch.full((1, 1, 1, 33), 2.0**20 - 1)
    share, total = 1 / 99, 99 * (2.0**20 - 1)
    assert total * (2.0**20 - 1) * share - (total * share) ** 2 < -1e-5
    operands = Operands(x, torch.ones(3, 1, 1, 1), None, torch.zeros(3), torch.full((3,), 0.25))
    spec = spec_of("pipelined", operands, num_groups=1)
    assert shape_of("pipelined", spec).tiles_per_sample > 1
    assert (run("pipelined", spec, operands) == 0.25).all()


# ---- blocks that wait for each other ------------------------------------------------------------


@pytest.mark.parametrize("in_channels", [1, 9], ids=["one chunk", "three chunks"])
def test_persistent_blocks_take_several_samples_in_any_order(
    in_channels: int, limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(MOST_WARPS=1, _cost=fewest_planes)
    operands = random_operands((3, in_channels, 9, 2), (2, in_channels, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=1, **TRAINING)
    shape = shape_of("pipelined", spec)
    assert (shape.tiles_per_sample, shape.chunks) == (2, -(-in_channels // 4))
    all_resident = run("pipelined", spec, operands)
    for blocks, schedule in [(2, None), (3, 2)]:
        monkeypatch.setattr(rung_9_pipelined, "resident_blocks", lambda shape, n=blocks: n)
        simulator = Simulator(schedule_seed=schedule, check_races=schedule is None)
        out = run("pipelined", spec, operands, simulator=simulator)
        assert simulator.launches[-1].grid == (blocks, 1, 1)
        assert bits(out) == bits(all_resident)
    assert_accurate(all_resident, spec, operands)


@pytest.mark.parametrize("schedule", [1, 2])
def test_tiles_wait_for_all_records_of_their_groups(
    schedule: int, limits: Callable[..., None]
) -> None:
    """Whatever the order of blocks and threads; some lanes wait for one record, others for two."""
    limits(MOST_WARPS=1)
    operands = random_operands((1, 1, 3, 9, 18), (5, 1, 1, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=1, **TRAINING)
    assert WARP < group_records(shape_of("pipelined", spec)) < 2 * WARP
    simulator = Simulator(schedule_seed=schedule, check_races=True)
    out = run("pipelined", spec, operands, simulator=simulator)
    assert_accurate(out, spec, operands)


def test_a_block_may_have_the_tiles_that_it_parks_and_one_more_of_a_sample(
    limits: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With yet another one, it would wait for sums that it has no room to compute."""
    limits(MOST_WARPS=1)
    monkeypatch.setattr(rung_9_pipelined, "resident_blocks", lambda shape: 1)
    operands = random_operands((2, 1, 24, 5), (2, 1, 1, 1))
    spec = spec_of("pipelined", operands, num_groups=1, **TRAINING)
    shape = shape_of("pipelined", spec)
    assert (shape.tiles_per_sample, shape.parked) == (3, 2)
    out = run("pipelined", spec, operands, simulator=Simulator(check_races=True))
    assert_accurate(out, spec, operands)

    operands = random_operands((2, 1, 25, 5), (2, 1, 1, 1))
    message = "a sample has 4 tiles, and the GPU holds 1 blocks at once, of 3 each"
    with pytest.raises(ValueError, match=message):
        run("pipelined", spec_of("pipelined", operands, num_groups=1, **TRAINING), operands)


@pytest.mark.parametrize("rung", ["split", "pipelined"])
def test_sums_beyond_32_bits_are_refused(rung: str) -> None:
    """Before anything is allocated: a million samples of 1024 groups, one record each."""
    spec = BlockSpec.from_arguments(
        (10**6, 1, 3), (1024, 1, 2), num_groups=1024, **BOUNDS, **TRAINING
    )
    reason = ladder.get(rung).limit(spec)
    assert reason is not None
    assert "4,096,000,000 words" in reason


@pytest.mark.parametrize("rung", ["tensor_core", "split", "pipelined"])
def test_warps_beyond_the_last_column_count_for_nothing(rung: str) -> None:
    """The fourth warp of a tile 48 wide has inputs under it, but no outputs."""
    operands = random_operands((1, 1, 2, 50), (2, 1, 1, 3))
    spec = spec_of(rung, operands, num_groups=1, **TRAINING)
    shape = shape_of(rung, spec)
    assert shape.out_size[2] == shape.columns - 16
    assert_accurate(run(rung, spec, operands), spec, operands)
