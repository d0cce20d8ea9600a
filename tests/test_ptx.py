"""device/ptx.py: each instruction does what its Python meaning says, and is the one it claims.

The kernels here use one instruction each. They run in the simulator, and on a GPU where there is
one, against definitions that share nothing with the module: matrix fragments, for one, are laid
out as in the tables of NVIDIA's "PTX ISA". The same kernels are compiled to see the instruction.
"""

from __future__ import annotations

import math
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numba import cuda, float32, float64, int32, uint32, uint64

import numba_fused
from numba_fused.device import ptx
from numba_fused.device.tensor_tile import ABSENT
from numba_fused.ladder.rung import gpu_launcher
from numba_fused.simulator import Simulator

WARP = 32
VALUES = 4 * WARP
TWO_WARPS = 2 * VALUES
TWO_WARPS_THREADS = 2 * WARP
TAKING_THREADS, REGISTER_THREADS = 256, 768  # warps that convolve, and those of a block
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0, "a")}
SPACES = ("global", "shared")

Launch = Callable[..., None]


@pytest.fixture(params=["simulator", pytest.param("gpu", marks=pytest.mark.gpu)])
def launch(request: pytest.FixtureRequest) -> Launch:
    """Runs a kernel in one block, by default of one warp, on NumPy arrays, changed in place."""

    def simulated(kernel: Any, *arrays: np.ndarray, threads: int = WARP) -> None:
        Simulator().launch(kernel, 1, threads, *arrays)

    def on_gpu(kernel: Any, *arrays: np.ndarray, threads: int = WARP) -> None:
        tensors = [torch.from_numpy(array).cuda() for array in arrays]
        gpu_launcher(tensors[0].device)(kernel, 1, threads, *tensors)
        for array, tensor in zip(arrays, tensors, strict=True):
            array[...] = tensor.cpu().numpy()

    return on_gpu if request.param == "gpu" else simulated


def padded(values: Any, dtype: type) -> np.ndarray:
    """One value a lane; the last is repeated."""
    values = np.asarray(values, dtype)
    assert values.size <= WARP
    return np.pad(values, (0, WARP - values.size), mode="edge")


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint32).tolist()


# ---- scalars ------------------------------------------------------------------------------------


@cuda.jit
def minimum_kernel(a, b, out):
    i = cuda.threadIdx.x
    out[i] = ptx.minimum_nan(a[i], b[i])


@cuda.jit
def maximum_kernel(a, b, out):
    i = cuda.threadIdx.x
    out[i] = ptx.maximum_nan(a[i], b[i])


@cuda.jit
def float_bits_kernel(values, out):
    i = cuda.threadIdx.x
    out[i] = ptx.float_bits(values[i])


@cuda.jit
def bits_float_kernel(words, out):
    i = cuda.threadIdx.x
    out[i] = ptx.bits_float(words[i])


@cuda.jit
def low_bits_kernel(values, out):
    i = cuda.threadIdx.x
    out[i] = ptx.low_bits(values[i])


@cuda.jit
def join_words_kernel(low, high, out):
    i = cuda.threadIdx.x
    out[i] = ptx.join_words(low[i], high[i])


@cuda.jit
def to_tf32_kernel(values, out):
    i = cuda.threadIdx.x
    out[i] = ptx.to_tf32(values[i])


@cuda.jit
def pack_kernel(low, high, out):
    i = cuda.threadIdx.x
    out[i] = ptx.pack_halves(low[i], high[i])


@cuda.jit
def split_kernel(low, high, out, rest):
    i = cuda.threadIdx.x
    out[i], rest[i] = ptx.split_halves(low[i], high[i])


@cuda.jit
def high_bits_kernel(values, out):
    i = cuda.threadIdx.x
    out[i] = ptx.high_bits(values[i])


@cuda.jit
def thread_index_kernel(out, again):
    i = cuda.threadIdx.x
    out[i] = ptx.thread_index()
    again[i] = ptx.thread_index()


@cuda.jit
def lane_index_kernel(out, again):
    i = cuda.threadIdx.x
    out[i] = ptx.lane_index()
    again[i] = ptx.lane_index()


@cuda.jit
def anew_kernel(values, out, again):
    i = cuda.threadIdx.x
    value = values[i]
    out[i] = ptx.anew(value)
    again[i] = ptx.anew(value)


EXTREMES = [-np.inf, -1.5, 2.0, np.inf, np.nan]


@pytest.mark.parametrize(("kernel", "first"), [(minimum_kernel, 0), (maximum_kernel, -1)])
def test_minimum_and_maximum_propagate_nan(launch: Launch, kernel: Any, first: int) -> None:
    pairs = [(a, b) for a in EXTREMES for b in EXTREMES]
    a, b = (padded(side, np.float32) for side in zip(*pairs, strict=True))
    out = np.zeros(WARP, np.float32)
    launch(kernel, a, b, out)
    for (left, right), found in zip(pairs, out.tolist(), strict=False):
        if np.isnan(left) or np.isnan(right):
            assert np.isnan(found)
        else:
            assert found == sorted([left, right])[first]


PATTERNS = {
    0x00000000: 0.0,
    0x80000000: -0.0,
    0x3F800000: 1.0,
    0xC0490FDB: -3.1415927410125732,
    0x00000001: 2.0**-149,
    0x7F7FFFFF: (2 - 2.0**-23) * 2.0**127,
    0x7F800000: np.inf,
    0xFF800000: -np.inf,
}


def test_floats_and_their_bits_are_exchanged_unchanged(launch: Launch) -> None:
    words = padded(list(PATTERNS), np.uint32)
    values = padded(list(PATTERNS.values()), np.float32)
    words_out, values_out = np.ones(WARP, np.uint32), np.ones(WARP, np.float32)
    launch(float_bits_kernel, values, words_out)
    launch(bits_float_kernel, words, values_out)
    assert words_out.tolist() == words.tolist()
    assert bits(values_out) == bits(values)


def test_the_bits_of_a_nan_survive_too(launch: Launch) -> None:
    words = padded([0x7FC12345, 0xFFC00001], np.uint32)
    values, back = np.zeros(WARP, np.float32), np.zeros(WARP, np.uint32)
    launch(bits_float_kernel, words, values)
    assert np.isnan(values).all()
    launch(float_bits_kernel, values, back)
    assert back.tolist() == words.tolist()


def rounded_to_tf32(value: float) -> float:
    """To the nearest multiple of the value's 2**-10, ties away from zero; exact in a double."""
    exponent = max(np.frexp(value)[1] - 1, -126)
    spacing = 2.0 ** (exponent - 10)
    return float(np.copysign(np.floor(abs(value) / spacing + 0.5) * spacing, value))


def test_tf32_rounds_to_the_nearest_and_ties_away_from_zero(launch: Launch) -> None:
    tie, below_tie = 1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23
    special = [tie, -tie, below_tie, -below_tie, 1 + 3 * 2.0**-11, 0.0, 2.0**-149, 2.0**-137]
    carries = [2 - 2.0**-23, -(2 - 2.0**-11), 2.0**-126 * (2 - 2.0**-23), 2.0**-126 - 2.0**-149]
    random = np.random.default_rng(0).normal(size=20) * 2.0 ** np.arange(-60, 60, 6)
    values = padded([*special, *carries, *random], np.float32)
    out = np.zeros(WARP, np.uint32)
    launch(to_tf32_kernel, values, out)
    found = out.view(np.float32).tolist()
    assert found == [rounded_to_tf32(value) for value in values.tolist()]
    assert found[:2] == [1 + 2.0**-10, -1 - 2.0**-10]
    assert found[8:10] == [2, -2]
    assert not (out & 0x1FFF).any()


def test_tf32_keeps_infinities_and_nan_and_overflows_to_infinity(launch: Launch) -> None:
    largest = np.finfo(np.float32).max
    values = padded([np.inf, -np.inf, largest, -largest, np.nan, np.nan], np.float32)
    values[-1:].view(np.uint32)[:] = 0x7FFFFFFF  # the GPU's own NaN: rounding up would give -0
    out = np.zeros(WARP, np.uint32)
    launch(to_tf32_kernel, values, out)
    found = out.view(np.float32)
    assert found[:4].tolist() == [np.inf, -np.inf, np.inf, -np.inf]
    assert np.isnan(found[4:]).all()


def half_word(low: float, high: float) -> int:
    """Two halves in a word, rounded to nearest even by Python's own packer."""
    return struct.unpack("<I", struct.pack("<ee", low, high))[0]


def halves_of(words: np.ndarray) -> np.ndarray:
    """(WARP, 2) floats: low, then high."""
    unpacked = [struct.unpack("<ee", struct.pack("<I", word)) for word in words.tolist()]
    return np.array(unpacked, np.float64)


def scaled_values(seed: int) -> np.ndarray:
    """Of every magnitude that halves can hold, up to the largest."""
    generator = np.random.default_rng(seed)
    values = generator.uniform(1, 2, WARP) * 2.0 ** np.arange(-16, 16)
    return (values * generator.choice([-1, 1], WARP)).clip(-65504, 65504).astype(np.float32)


def test_two_floats_are_packed_as_halves_low_first(launch: Launch) -> None:
    low, high = scaled_values(0), scaled_values(1)[::-1].copy()
    low[:4] = 1 + 2.0**-11, 1 + 3 * 2.0**-11, -0.0, np.inf  # two ties, to even
    out = np.zeros(WARP, np.uint32)
    launch(pack_kernel, low, high, out)
    assert out.tolist() == [half_word(*pair) for pair in zip(low, high, strict=True)]


def test_two_halves_keep_22_bits_of_a_float(launch: Launch) -> None:
    low, high = scaled_values(2), scaled_values(3)[::-1].copy()
    out, rest = np.zeros((2, WARP), np.uint32)
    launch(split_kernel, low, high, out, rest)
    assert out.tolist() == [half_word(*pair) for pair in zip(low, high, strict=True)]
    exact = np.stack([low, high], axis=1).astype(np.float64)
    error = abs(halves_of(out) + halves_of(rest) - exact)
    smallest_half = 2.0**-24
    assert (error <= np.maximum(2.0**-22 * abs(exact), smallest_half / 2)).all()
    assert (abs(halves_of(out) - exact) > 2.0**-20 * abs(exact)).any()  # one half would not do


def test_split_infinities_and_nan_stay_out_of_range(launch: Launch) -> None:
    low, high = padded([np.inf, -np.inf, 1e6, np.nan], np.float32), padded([1.0], np.float32)
    out, rest = np.zeros((2, WARP), np.uint32)
    launch(split_kernel, low, high, out, rest)
    first, left_over = halves_of(out), halves_of(rest)
    assert first[:3, 0].tolist() == [np.inf, -np.inf, np.inf]
    assert np.isnan(first[3:, 0]).all()
    with np.errstate(invalid="ignore"):  # Inf and what it leaves over, -Inf or NaN
        assert not np.isfinite(first + left_over)[:, 0].any()
    assert (first[:, 1] == 1).all()
    assert not left_over[:, 1].any()


def test_the_upper_word_of_a_double_holds_sign_and_exponent(launch: Launch) -> None:
    special = [0.0, -0.0, 1.0, -np.pi, 2.0**-1074, np.inf, -np.inf]
    values = padded([*special, *np.random.default_rng(4).normal(size=20)], np.float64)
    values[-2:].view(np.uint64)[:] = 0xFFFFFFFF00000001, 0x7FF8000000000000  # NaNs
    out = np.zeros(WARP, np.uint32)
    launch(high_bits_kernel, values, out)
    assert out.tolist() == [struct.unpack("<II", struct.pack("<d", v))[1] for v in values]
    assert out[:3].tolist() == [0, 0x80000000, 0x3FF00000]
    assert out[-2] == ABSENT


def test_two_words_travel_as_a_double(launch: Launch) -> None:
    words = np.random.default_rng(5).integers(2**32, size=(2, WARP), dtype=np.uint32)
    words[:, 0] = 1, ABSENT  # a NaN keeps its bits
    doubles, low, high = np.zeros(WARP), np.zeros(WARP, np.uint32), np.zeros(WARP, np.uint32)
    launch(join_words_kernel, words[0].copy(), words[1].copy(), doubles)
    assert doubles.view(np.uint32).reshape(-1, 2).T.tolist() == words.tolist()
    launch(low_bits_kernel, doubles, low)
    launch(high_bits_kernel, doubles, high)
    assert [low.tolist(), high.tolist()] == words.tolist()


@pytest.mark.parametrize("threads", [WARP, 3 * WARP])
def test_a_thread_is_counted_in_its_block_and_a_lane_in_its_warp(
    launch: Launch, threads: int
) -> None:
    thread, lane, again = np.full((3, threads), 999, np.uint32)
    launch(thread_index_kernel, thread, again, threads=threads)
    launch(lane_index_kernel, lane, again, threads=threads)
    assert thread.tolist() == list(range(threads))
    assert lane.tolist() == list(range(WARP)) * (threads // WARP)


def test_a_value_is_itself_anew(launch: Launch) -> None:
    values = (np.arange(WARP) * 3 - 7).astype(np.int32)
    out, again = np.zeros((2, WARP), np.int32)
    launch(anew_kernel, values, out, again)
    assert out.tolist() == again.tolist() == values.tolist()


# ---- memory -------------------------------------------------------------------------------------


@cuda.jit
def reverse_quads_kernel(source, staged_out, target):
    """Reverse quads on the way to shared memory, which is copied out, and the rest from there."""
    staged = cuda.shared.array(VALUES, source.dtype)
    here, there = uint64(4 * cuda.threadIdx.x), uint64(4 * (31 - cuda.threadIdx.x))
    a, b, c, d = ptx.load_4(source, here)
    ptx.store_4(staged, here, d, c, b, a)
    cuda.syncthreads()
    a, b, c, d = ptx.load_4(staged, there)
    ptx.store_4(target, here, a, b, c, d)
    for i in range(4):
        staged_out[here + uint64(i)] = staged[here + uint64(i)]


@cuda.jit
def reverse_pairs_kernel(source, staged_out, target):
    """The same of 64 values, in pairs."""
    staged = cuda.shared.array(VALUES, source.dtype)
    here, there = uint64(2 * cuda.threadIdx.x), uint64(2 * (31 - cuda.threadIdx.x))
    a, b = ptx.load_2(source, here)
    ptx.store_2(staged, here, b, a)
    cuda.syncthreads()
    a, b = ptx.load_2(staged, there)
    ptx.store_2(target, here, a, b)
    for i in range(2):
        staged_out[here + uint64(i)] = staged[here + uint64(i)]


@cuda.jit
def publish_kernel(values, words):
    """Lane i publishes its value to double 31 - i."""
    i = cuda.threadIdx.x
    ptx.publish(words, uint64(2 * (31 - i)), values[i])


@cuda.jit
def load_published_kernel(words, values):
    i = cuda.threadIdx.x
    values[i] = ptx.load_published(words, uint64(2 * (31 - i)))


@cuda.jit
def relay_kernel(values, words, out):
    """Block b waits for what block b + 1 publishes, adds its own value and publishes the sum.

    A whole warp waits, and each lane for its own: only what is published may be used.
    """
    i, b = cuda.threadIdx.x, cuda.blockIdx.x
    total = values[b]
    if b + 1 < cuda.gridDim.x:
        at = uint64(2 * (WARP * (b + 1) + i))
        found = ptx.load_published(words, at)
        while ptx.high_bits(found) == ABSENT:
            cuda.nanosleep(40)
            found = ptx.load_published(words, at)
        total += found
    ptx.publish(words, uint64(2 * (WARP * b + i)), total)
    if b == 0:
        out[i] = total


@cuda.jit
def copy_quads_kernel(source, inside, out):
    """Lane i copies quad 31 - i of `source` to quad i of `out`, by way of shared memory."""
    staged = cuda.shared.array(VALUES, float32)
    i = cuda.threadIdx.x
    ptx.copy_async_4(staged, uint64(4 * i), source, uint64(4 * (31 - i)), inside[i] != 0)
    ptx.wait_for_copies()
    for j in range(4):
        out[4 * i + j] = staged[4 * i + j]


@cuda.jit
def copy_values_kernel(source, inside, out):
    """The same of the first 32 values, one by one."""
    staged = cuda.shared.array(VALUES, float32)
    i = cuda.threadIdx.x
    ptx.copy_async_1(staged, uint64(i), source, uint64(31 - i), inside[i] != 0)
    ptx.wait_for_copies()
    out[i] = staged[i]


@cuda.jit
def copy_out_kernel(source, values, out):
    """Two warps fill shared memory; a thread of the first copies out what the second has stored."""
    staged = cuda.shared.array(TWO_WARPS, float32)
    i = cuda.threadIdx.x
    for j in range(4):
        staged[4 * i + j] = source[4 * i + j]
    ptx.hand_to_copy_engine()
    cuda.syncthreads()
    if i == 5:
        ptx.copy_out(out, uint64(8), staged, uint64(VALUES), values[0])
    ptx.wait_for_copies_out()


@cuda.jit
def copy_out_twice_kernel(source, values, first, second):
    """Lane 7 copies out what the warp has stored, twice, with other values each time."""
    staged = cuda.shared.array(VALUES, float32)
    i = cuda.threadIdx.x
    for j in range(4):
        staged[4 * i + j] = source[4 * i + j]
    ptx.hand_to_copy_engine()
    cuda.syncthreads()
    if i == 7:
        ptx.copy_out(first, uint64(0), staged, uint64(0), values[0])
        ptx.wait_for_copies_out()
    cuda.syncthreads()
    for j in range(4):
        staged[4 * i + j] = source[VALUES + 4 * i + j]
    ptx.hand_to_copy_engine()
    cuda.syncthreads()
    if i == 7:
        ptx.copy_out(second, uint64(0), staged, uint64(0), values[0])
        ptx.wait_for_copies_out()


@cuda.jit
def beyond_kernel(source, out):
    """From the third value on."""
    out[cuda.threadIdx.x] = ptx.beyond(source, uint64(2))[cuda.threadIdx.x]


@cuda.jit
def hand_on_kernel(source, out):
    """The first warp stores and goes on; the second waits until it has, and reads."""
    staged = cuda.shared.array(WARP, float32)
    i = cuda.threadIdx.x
    if i < WARP:
        staged[i] = source[i]
        ptx.arrive(int32(1), int32(TWO_WARPS_THREADS))
    else:
        ptx.barrier(int32(1), int32(TWO_WARPS_THREADS))
        out[i - WARP] = staged[TWO_WARPS_THREADS - 1 - i]


@cuda.jit(launch_bounds=(REGISTER_THREADS, 1))
def exchange_registers_kernel(source, out):
    """Two warpgroups take registers, four give some."""
    i = cuda.threadIdx.x
    if i < TAKING_THREADS:
        ptx.take_registers()
        out[i] = 2 * source[i]
    else:
        ptx.give_registers()
        out[i] = 3 * source[i]


def bulk_copies_here(launch: Launch) -> bool:
    """Whether where the kernel runs there is a copy engine: the simulator has one."""
    if launch.__name__ == "simulated":
        return True
    return torch.cuda.get_device_capability() >= (9, 0)


def test_an_array_beyond_an_element_begins_there(launch: Launch) -> None:
    source, out = np.arange(WARP + 2, dtype=np.float32), np.zeros(WARP, np.float32)
    launch(beyond_kernel, source, out)
    assert out.tolist() == source[2:].tolist()


def test_what_one_warp_stored_another_reads_beyond_a_barrier(launch: Launch) -> None:
    source, out = np.arange(1, WARP + 1, dtype=np.float32), np.zeros(WARP, np.float32)
    launch(hand_on_kernel, source, out, threads=TWO_WARPS_THREADS)
    assert out.tolist() == source[::-1].tolist()


def test_registers_change_hands_and_values_stay(launch: Launch) -> None:
    if not bulk_copies_here(launch):
        pytest.skip("needs sm_90, whose warps hand registers to each other")
    source = np.arange(REGISTER_THREADS, dtype=np.float32)
    out = np.zeros_like(source)
    launch(exchange_registers_kernel, source, out, threads=REGISTER_THREADS)
    factors = np.where(np.arange(REGISTER_THREADS) < TAKING_THREADS, 2, 3)
    assert out.tolist() == (factors * source).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.uint32])
@pytest.mark.parametrize(
    ("kernel", "width"), [(reverse_quads_kernel, 4), (reverse_pairs_kernel, 2)]
)
def test_vectors_are_loaded_and_stored_in_order(
    launch: Launch, kernel: Any, width: int, dtype: type
) -> None:
    """In global and in shared memory, as many values as lanes take and no more."""
    source = np.arange(1, VALUES + 1).astype(dtype)
    staged, target = np.zeros((2, VALUES), dtype)
    launch(kernel, source, staged, target)
    used = source[: width * WARP]
    rest = [0] * (VALUES - used.size)
    assert staged.tolist() == [*used.reshape(WARP, width)[:, ::-1].reshape(-1), *rest]
    assert target.tolist() == [*used[::-1], *rest]


@cuda.jit
def load_matrices_kernel(source, rows, out):
    """Each lane's four words, of matrices whose rows lie where `rows` says."""
    staged = cuda.shared.array(VALUES, uint32)
    i = cuda.threadIdx.x
    for j in range(4):
        staged[4 * i + j] = source[4 * i + j]
    cuda.syncthreads()
    a, b, c, d = ptx.load_matrices(staged, uint64(rows[i]))
    out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = a, b, c, d


def test_matrices_of_halves_are_loaded_transposed(launch: Launch) -> None:
    """NVIDIA's "PTX ISA", ldmatrix with .trans: a lane gets two rows of its column."""
    halves = np.arange(2 * VALUES, dtype=np.uint16)
    rows = np.random.default_rng(0).permutation(WARP).astype(np.uint32)
    out = np.zeros(VALUES, np.uint32)
    launch(load_matrices_kernel, halves.view(np.uint32), 4 * rows, out)
    matrices = halves.reshape(WARP, 8)[rows].reshape(4, 8, 8)
    found = out.view(np.uint16).reshape(8, 4, 4, 2)  # g, t, matrix, half
    for g, t, i, half in np.ndindex(found.shape):
        assert found[g, t, i, half] == matrices[i, 2 * t + half, g]


def doubles() -> np.ndarray:
    """Of every magnitude, both words of each unlike the other; special values, and two NaNs."""
    generator = np.random.default_rng(5)
    values = generator.normal(size=WARP) * 2.0 ** np.linspace(-1022, 1000, WARP)
    values[:6] = 0.0, -0.0, np.inf, -np.inf, 2.0**-1074, np.finfo(np.float64).max
    values[6:8].view(np.uint64)[:] = 0x7FF8000012345678, 0xFFF8000000000000
    return values


def test_a_published_double_is_its_two_words_lower_first(launch: Launch) -> None:
    values, words = doubles(), np.zeros(2 * WARP, np.uint32)
    launch(publish_kernel, values, words)
    assert words.view(np.uint64).tolist() == values.view(np.uint64)[::-1].tolist()


def test_published_doubles_are_read_and_left_alone(launch: Launch) -> None:
    words, values = doubles().view(np.uint32), np.zeros(WARP, np.float64)
    before = words.copy()
    launch(load_published_kernel, words, values)
    assert values.view(np.uint64).tolist() == before.view(np.uint64)[::-1].tolist()
    assert words.tolist() == before.tolist()


@pytest.mark.parametrize("schedule", [None, 1, 2, 3])
def test_blocks_wait_for_what_others_publish(schedule: int | None) -> None:
    """In natural order the first block comes first and has to wait for all others."""
    blocks = 5
    values = 1 + 2.0 ** -np.arange(10, 10 + blocks)
    words, out = np.full(2 * WARP * blocks, ABSENT), np.zeros(WARP)
    Simulator(schedule_seed=schedule, check_races=True).launch(
        relay_kernel, blocks, WARP, values, words, out
    )
    assert out.tolist() == [values.sum()] * WARP


@pytest.mark.gpu
def test_blocks_wait_for_what_others_publish_on_a_gpu() -> None:
    blocks = 64
    values = 1 + 2.0 ** -np.arange(blocks, dtype=np.float64)
    words = torch.full((2 * WARP * blocks,), -1, dtype=torch.int32).view(torch.uint32).cuda()
    out = torch.zeros(WARP, dtype=torch.float64).cuda()
    launcher = gpu_launcher(out.device)
    launcher(
        relay_kernel, blocks, WARP, torch.from_numpy(values).cuda(), words, out, cooperative=True
    )
    expected = 0.0
    for value in values[::-1].tolist():  # in the order of the blocks
        expected += value
    assert out.tolist() == [expected] * WARP


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.5], ids=str)
def test_no_arithmetic_makes_what_stands_for_an_absent_record(value: float) -> None:
    """Its upper word is a NaN's with every bit set: neither Python's NaN nor 0 / 0 has it."""
    with np.errstate(invalid="ignore"):
        made = np.array([value, -value, np.float64(0) * value, np.float64(value) - value])
    assert ABSENT not in made.view(np.uint32)[1::2]
    assert np.isnan(np.array([0, ABSENT], np.uint32).view(np.float64)[0])


@pytest.mark.parametrize("values", [4, 8, 60, VALUES])
def test_bulk_copies_write_a_run_and_nothing_beyond(launch: Launch, values: int) -> None:
    """From the second warp's half of shared memory, which another thread has filled."""
    if not bulk_copies_here(launch):
        pytest.skip("this GPU has no copy engine for shared memory")
    source = np.arange(1, 2 * VALUES + 1).astype(np.float32)
    out = np.full(2 * VALUES, np.nan, np.float32)
    launch(copy_out_kernel, source, np.array([values], np.int32), out, threads=2 * WARP)
    assert out[8 : 8 + values].tolist() == source[VALUES : VALUES + values].tolist()
    assert np.isnan(out[:8]).all()
    assert np.isnan(out[8 + values :]).all()


@pytest.mark.parametrize("values", [4, VALUES])
def test_what_a_bulk_copy_has_read_may_be_overwritten(launch: Launch, values: int) -> None:
    if not bulk_copies_here(launch):
        pytest.skip("this GPU has no copy engine for shared memory")
    source = np.arange(1, 2 * VALUES + 1).astype(np.float32)
    first, second = np.full((2, VALUES), np.nan, np.float32)
    launch(copy_out_twice_kernel, source, np.array([values], np.int32), first, second)
    assert first[:values].tolist() == source[:values].tolist()
    assert second[:values].tolist() == source[VALUES : VALUES + values].tolist()


@pytest.mark.parametrize(("kernel", "width"), [(copy_quads_kernel, 4), (copy_values_kernel, 1)])
def test_asynchronous_copies_bring_zeros_from_outside(
    launch: Launch, kernel: Any, width: int
) -> None:
    source = np.arange(1, VALUES + 1).astype(np.float32)
    inside = (np.arange(WARP) % 3 != 1).astype(np.int32)
    out = np.full(VALUES, np.nan, np.float32)
    launch(kernel, source, inside, out)
    size = width * WARP
    expected = source[:size].reshape(WARP, width)[::-1] * inside[:, None]
    assert out[:size].tolist() == expected.reshape(-1).tolist()
    assert np.isnan(out[size:]).all()


# ---- warps --------------------------------------------------------------------------------------


@cuda.jit
def warp_max_kernel(words, out):
    i = cuda.threadIdx.x
    out[i] = ptx.warp_max(words[i])


@cuda.jit
def mma_half_kernel(words, c, out):
    """words (32, 6): a0 to a3, b0, b1 of each lane; c, out (32, 4)."""
    i = cuda.threadIdx.x
    out[i, 0], out[i, 1], out[i, 2], out[i, 3] = ptx.mma_half(
        words[i, 0], words[i, 1], words[i, 2], words[i, 3], words[i, 4], words[i, 5],
        c[i, 0], c[i, 1], c[i, 2], c[i, 3],
    )  # fmt: skip


@cuda.jit
def mma_tf32_kernel(words, c, out):
    """As `mma_half_kernel`."""
    i = cuda.threadIdx.x
    out[i, 0], out[i, 1], out[i, 2], out[i, 3] = ptx.mma_tf32(
        words[i, 0], words[i, 1], words[i, 2], words[i, 3], words[i, 4], words[i, 5],
        c[i, 0], c[i, 1], c[i, 2], c[i, 3],
    )  # fmt: skip


@pytest.mark.parametrize("lane", [0, 13, 31])
def test_the_largest_word_of_a_warp_reaches_every_lane(launch: Launch, lane: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**31, WARP).astype(np.uint32)
    words[lane] = 2**31 + 5  # as a signed word it would be the smallest
    out = np.zeros(WARP, np.uint32)
    launch(warp_max_kernel, words, out)
    assert out.tolist() == [2**31 + 5] * WARP


# Row and column of each lane's values, copied from the figures of "PTX ISA", sections "Matrix
# Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k8": a warp's lanes
# as (groupID, threadID_in_group), and the values a0, a1 ... of a lane in order.


Places = list[tuple[int, int]]


def fragment_of_c(group: int, thread: int) -> Places:
    return [(group if i < 2 else group + 8, 2 * thread + (i & 1)) for i in range(4)]


def half_fragments(group: int, thread: int) -> tuple[Places, Places]:
    """Of A, 16x16, eight halves; of B, 16x8, four."""
    a_rows = [group if i < 2 or 4 <= i < 6 else group + 8 for i in range(8)]
    a_columns = [2 * thread + (i & 1) + (8 if i >= 4 else 0) for i in range(8)]
    b_rows = [2 * thread + (i & 1) + (8 if i >= 2 else 0) for i in range(4)]
    return list(zip(a_rows, a_columns, strict=True)), [(row, group) for row in b_rows]


def tf32_fragments(group: int, thread: int) -> tuple[Places, Places]:
    """Of A, 16x8, four values; of B, 8x8, two."""
    a_rows = [group, group + 8, group, group + 8]
    a_columns = [thread, thread, thread + 4, thread + 4]
    b_rows = [thread, thread + 4]
    return list(zip(a_rows, a_columns, strict=True)), [(row, group) for row in b_rows]


def half_values(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    return generator.normal(size=shape).astype(np.float16)


def tf32_values(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    words = generator.normal(size=shape).astype(np.float32).view(np.uint32)
    return (words & 0xFFFFE000).view(np.float32)


@pytest.mark.parametrize(
    ("kernel", "inner", "values", "fragments"),
    [
        (mma_half_kernel, 16, half_values, half_fragments),
        (mma_tf32_kernel, 8, tf32_values, tf32_fragments),
    ],
    ids=["half", "tf32"],
)
def test_matrix_instructions_multiply_the_documented_fragments(
    launch: Launch, kernel: Any, inner: int, values: Any, fragments: Any
) -> None:
    """Random A, B and C have no symmetry: a value in a wrong place is a wrong product."""
    generator = np.random.default_rng(inner)
    A, B = values((16, inner), generator), values((inner, 8), generator)
    C = generator.normal(size=(16, 8)).astype(np.float32)
    words = np.zeros((WARP, 6), np.uint32)
    c, out = np.zeros((2, WARP, 4), np.float32)
    places = [fragment_of_c(lane // 4, lane % 4) for lane in range(WARP)]
    for lane in range(WARP):
        of_a, of_b = fragments(lane // 4, lane % 4)
        held = np.array([*(A[place] for place in of_a), *(B[place] for place in of_b)])
        words[lane] = held.view(np.uint32)
        c[lane] = [C[place] for place in places[lane]]
    launch(kernel, words, c, out)
    found = np.full((16, 8), np.nan)
    for lane in range(WARP):
        for place, value in zip(places[lane], out[lane], strict=True):
            found[place] = value
    expected = C.astype(np.float64) + A.astype(np.float64) @ B.astype(np.float64)
    assert np.allclose(found, expected, rtol=0, atol=2.0**-18)


def one_product(a: float, b: float, c: float, kernel: Any, launch: Launch) -> float:
    """``c`` and one product, by the first lane."""
    words, out = np.zeros((WARP, 6), np.uint32), np.zeros((WARP, 4), np.float32)
    both = np.array([a, b])
    as_words = both.astype(np.float16).view(np.uint16) if kernel is mma_half_kernel else None
    words[0, [0, 4]] = both.astype(np.float32).view(np.uint32) if as_words is None else as_words
    launch(kernel, words, np.full((WARP, 4), c, np.float32), out)
    return float(out[0, 0])


@pytest.mark.parametrize("kernel", [mma_half_kernel, mma_tf32_kernel], ids=["half", "tf32"])
@pytest.mark.parametrize("sign", [1, -1])
def test_matrix_instructions_cut_off_what_does_not_fit(
    launch: Launch, kernel: Any, sign: int
) -> None:
    """Towards zero: 1 + 2^-23 is the next number, and 1 + 1.75 * 2^-24 is not rounded to it.

    Below 1 that is 1 - 2^-24, which less than 2^-25 does not lead to.
    """
    tiny = 2.0**-12
    below = 1 - 2.0**-24
    for factor, expected in ((2.0, 1 + 2.0**-23), (1.75, 1.0), (-0.5, below), (-0.25, 1.0)):
        found = one_product(sign * factor * tiny, tiny, sign, kernel, launch)
        assert found == sign * expected


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [mma_half_kernel, mma_tf32_kernel], ids=["half", "tf32"])
@pytest.mark.parametrize("spread", [0, 4])
def test_the_simulator_adds_as_a_hopper_does(kernel: Any, spread: int) -> None:
    """To the last bit; older GPUs add fewer products at a time and keep fewer bits."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the meaning of the matrix instructions is an H200's")
    generator = np.random.default_rng(spread)
    exponents = generator.integers(-spread, spread + 1, (100, WARP, 6, 2))
    values = generator.normal(size=exponents.shape) * np.exp2(exponents)
    if kernel is mma_half_kernel:
        words = values.astype(np.float16).view(np.uint32)[..., 0]
    else:
        words = values[..., 0].astype(np.float32).view(np.uint32) & 0xFFFFE000
    c = generator.normal(size=(100, WARP, 4)) * generator.choice([0, 1, 8, 64], (100, WARP, 4))
    launcher = gpu_launcher(torch.device("cuda"))
    for of_warp, sums in zip(words, c.astype(np.float32), strict=True):
        simulated, out = np.zeros((2, WARP, 4), np.float32)
        Simulator().launch(kernel, 1, WARP, of_warp, sums, simulated)
        tensors = [torch.from_numpy(array).cuda() for array in (of_warp, sums, out)]
        launcher(kernel, 1, WARP, *tensors)
        assert np.array_equal(tensors[2].cpu().numpy(), simulated)


# ---- what they compile to -----------------------------------------------------------------------

F32, F64, U32, I32 = (t[::1] for t in (float32, float64, uint32, int32))
MMA_TYPES = (uint32[:, ::1], float32[:, ::1], float32[:, ::1])
VECTORS = {4: reverse_quads_kernel, 2: reverse_pairs_kernel}

# (intrinsic, kernel, types of the kernel's arguments, what its PTX contains)
INSTRUCTIONS: list[tuple[Any, Any, tuple[Any, ...], list[str]]] = [
    (ptx.minimum_nan, minimum_kernel, (F32, F32, F32), ["min.NaN.f32"]),
    (ptx.maximum_nan, maximum_kernel, (F32, F32, F32), ["max.NaN.f32"]),
    (ptx.float_bits, float_bits_kernel, (F32, U32), ["mov.b32"]),
    (ptx.bits_float, bits_float_kernel, (U32, F32), ["mov.b32"]),
    (ptx.to_tf32, to_tf32_kernel, (F32, U32), ["cvt.rna.tf32.f32"]),
    (ptx.pack_halves, pack_kernel, (F32, F32, U32), ["cvt.rn.f16x2.f32"]),
    (ptx.split_halves, split_kernel, (F32, F32, U32, U32), ["cvt.rn.f16x2.f32", "cvt.f32.f16"]),
    (ptx.thread_index, thread_index_kernel, (U32, U32), ["mov.u32 %r1, %tid.x"]),
    (ptx.anew, anew_kernel, (I32, I32, I32), ["mov.b32"]),
    (ptx.lane_index, lane_index_kernel, (U32, U32), ["mov.u32 %r1, %laneid"]),
    *(
        (intrinsic, kernel, (element,) * 3, [f"{name}.{space}.v{lanes}." for space in SPACES])
        for lanes, kernel in VECTORS.items()
        for name, intrinsic in [
            ("ld", getattr(ptx, f"load_{lanes}")),
            ("st", getattr(ptx, f"store_{lanes}")),
        ]
        for element in (F32, U32)
    ),
    (ptx.beyond, beyond_kernel, (F32, F32), []),
    (ptx.barrier, hand_on_kernel, (F32, F32), ["bar.sync"]),
    (ptx.arrive, hand_on_kernel, (F32, F32), ["bar.arrive"]),
    (
        ptx.take_registers,
        exchange_registers_kernel,
        (F32, F32),
        ["setmaxnreg.inc.sync.aligned.u32 128"],
    ),
    (
        ptx.give_registers,
        exchange_registers_kernel,
        (F32, F32),
        ["setmaxnreg.dec.sync.aligned.u32 48"],
    ),
    (ptx.high_bits, high_bits_kernel, (F64, U32), ["mov.b64 {low, "]),
    (ptx.low_bits, low_bits_kernel, (F64, U32), ["mov.b64 {"]),
    (ptx.join_words, join_words_kernel, (U32, U32, F64), ["mov.b64 %fd"]),
    (
        ptx.load_matrices,
        load_matrices_kernel,
        (U32, U32, U32),
        ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"],
    ),
    (ptx.publish, publish_kernel, (F64, U32), ["st.relaxed.gpu.global.f64"]),
    (ptx.load_published, load_published_kernel, (U32, F64), ["ld.relaxed.gpu.global.f64"]),
    (ptx.warp_max, warp_max_kernel, (U32, U32), ["redux.sync.max.u32"]),
    (ptx.mma_half, mma_half_kernel, MMA_TYPES, ["mma.sync.aligned.m16n8k16"]),
    (ptx.mma_tf32, mma_tf32_kernel, MMA_TYPES, ["mma.sync.aligned.m16n8k8"]),
    (ptx.copy_async_4, copy_quads_kernel, (F32, I32, F32), ["cp.async.cg.shared.global"]),
    (ptx.copy_async_1, copy_values_kernel, (F32, I32, F32), ["cp.async.ca.shared.global"]),
    (ptx.wait_for_copies, copy_values_kernel, (F32, I32, F32), ["cp.async.wait_all"]),
    (
        ptx.copy_out,
        copy_out_kernel,
        (F32, I32, F32),
        ["cp.async.bulk.global.shared::cta.bulk_group", "cp.async.bulk.commit_group"],
    ),
    (
        ptx.hand_to_copy_engine,
        copy_out_kernel,
        (F32, I32, F32),
        ["fence.proxy.async.shared::cta"],
    ),
    (
        ptx.wait_for_copies_out,
        copy_out_twice_kernel,
        (F32, I32, F32, F32),
        ["cp.async.bulk.wait_group.read 0"],
    ),
]
# sm_80 has no instructions for them.
FROM_SM_90 = {copy_out_kernel, copy_out_twice_kernel, exchange_registers_kernel}


def compiled(kernel: Any, types: tuple[Any, ...], architecture: str) -> str:
    """PTX of a kernel, as numba compiles it for a launch."""
    source, _ = cuda.compile_ptx(
        kernel.py_func,
        types,
        cc=ARCHITECTURES[architecture],
        launch_bounds=kernel.targetoptions.get("launch_bounds"),
    )
    return source


def assembled(source: str, architecture: str, cubin: Path) -> str:
    """Write the machine code of `source` to `cubin`; what ptxas says about registers and stack."""
    file = cubin.with_suffix(".ptx")
    file.write_text(source)
    command = [tool("ptxas"), "-v", f"-arch={architecture}", file, "-o", cubin]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def disassembly(cubin: Path) -> str:
    command = [tool("nvdisasm"), "-c", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tool(name: str) -> Path:
    """A program of the CUDA toolkit, from NVIDIA's Python packages."""
    nvidia = pytest.importorskip("nvidia", reason=f"pip install nvidia-cuda-nvcc brings {name}")
    found = [path for root in nvidia.__path__ for path in Path(root).rglob(f"bin/{name}")]
    assert found, f"no {name} in the nvidia-cuda packages"
    return found[0]


@pytest.mark.parametrize(
    ("kernel", "types", "parts", "architecture"),
    [
        pytest.param(
            *row[1:], architecture, id=f"{row[0].__name__}-{row[2][0].dtype}-{architecture}"
        )
        for row in INSTRUCTIONS
        for architecture in ARCHITECTURES
        if architecture == "sm_90a" or row[1] not in FROM_SM_90
    ],
)
def test_the_compiler_emits_the_instruction_and_the_assembler_takes_it(
    kernel: Any, types: tuple[Any, ...], parts: list[str], architecture: str, tmp_path: Path
) -> None:
    source = compiled(kernel, types, architecture)
    assert [part for part in parts if part not in source] == []
    assembled(source, architecture, tmp_path / "kernel.cubin")


# Machine instructions whose names tell what ptxas made of the PTX: one 64-bit access past the
# first-level cache for a published double, and the copy engine for a bulk copy.
@pytest.mark.parametrize(
    ("kernel", "types", "name"),
    [
        (publish_kernel, (F64, U32), "STG.E.64.STRONG.GPU"),
        (load_published_kernel, (U32, F64), "LDG.E.64.STRONG.GPU"),
        (copy_out_kernel, (F32, I32, F32), "UBLKCP.G.S"),
        (copy_out_kernel, (F32, I32, F32), "FENCE.VIEW.ASYNC.S"),
    ],
)
def test_machine_instructions_of_what_blocks_tell_each_other(
    kernel: Any, types: tuple[Any, ...], name: str, tmp_path: Path
) -> None:
    cubin = tmp_path / "kernel.cubin"
    assembled(compiled(kernel, types, "sm_90a"), "sm_90a", cubin)
    assert f" {name}" in disassembly(cubin)


@pytest.mark.parametrize(
    ("kernel", "types", "move"),
    [
        (thread_index_kernel, (U32, U32), r"mov\.u32 %r\d+, %tid\.x;"),
        (lane_index_kernel, (U32, U32), r"mov\.u32 %r\d+, %laneid;"),
        (anew_kernel, (I32, I32, I32), r"mov\.b32 %r\d+, %r\d+;"),
    ],
)
def test_what_is_read_anew_is_read_at_each_use(
    kernel: Any, types: tuple[Any, ...], move: str
) -> None:
    assert len(re.findall(move, compiled(kernel, types, "sm_90a"))) == 2


def test_every_intrinsic_is_compiled_above() -> None:
    found = {name for name, value in vars(ptx).items() if hasattr(value, "simulated_as")}
    assert found == {row[0].__name__ for row in INSTRUCTIONS}


def test_no_other_module_knows_ptx() -> None:
    package = Path(numba_fused.__path__[0])
    words = re.compile(r"InlineAsm|numba\.cuda\.extending")
    found = [file for file in package.rglob("*.py") if words.search(file.read_text())]
    assert found == [package / "device" / "ptx.py"]
