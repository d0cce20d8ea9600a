"""rng.py: the dropout mask is xoroshiro128+ by the book, the same everywhere, and random.

The judge is a generator written again here from its definition, in Python's unbounded integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numba import cuda, uint64

import numba_fused as nf
from numba_fused import rng
from numba_fused.ladder.rung_1_unfused import dropout_kernel
from numba_fused.reference import draw_seed, seed_tensor
from numba_fused.simulator import Simulator

WORD = 2**64
# At the fourth, g * 1 + seed wraps to 0; generators that add their index to a seed fail there.
SEEDS = [0, 1, 2**64 - 1, 0x61C8864680B583EB, 2**63, -1, -(2**63), 2**64 + 1, 123456789]
WIDTHS = [1, 15, 16, 17, 33]

# ---- the definition -----------------------------------------------------------------------------


def splitmix64(z: int) -> int:
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % WORD
    return z ^ z >> 31


def rotate_left(word: int, bits: int) -> int:
    return (word << bits | word >> (64 - bits)) % WORD


def xoroshiro128plus(s0: int, s1: int) -> Iterator[int]:
    while True:
        yield (s0 + s1) % WORD
        s1 ^= s0
        s0 = rotate_left(s0, 24) ^ s1 ^ (s1 << 16) % WORD
        s1 = rotate_left(s1, 37)


def stream_of(seed: int, stream: int) -> Iterator[int]:
    g = 0x9E3779B97F4A7C15
    s0, s1 = (splitmix64((seed + g * (2 * stream + i)) % WORD) for i in (1, 2))
    return xoroshiro128plus(s0, s1 or int(not s0))


def expected_draws(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    *leading, width = shape
    rows = []
    for row in range(math.prod(leading)):
        for run in range(-(-width // 16)):
            words = stream_of(seed, row * -(-width // 16) + run)
            halves = [h for _ in range(8) for h in divmod(next(words), 2**32)]
            rows += halves[: width - 16 * run]
    return np.array(rows, dtype=np.uint32).reshape(shape)


# ---- published vectors --------------------------------------------------------------------------


def test_splitmix64_gives_its_published_first_outputs() -> None:
    """Stream k of seed 0 is seeded with outputs 2k and 2k + 1 of splitmix64 started at 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [splitmix64(0x9E3779B97F4A7C15 * i % WORD) for i in (1, 2, 3, 4)] == published
    first, second = rng.draws(0, (2, 1)).ravel().tolist()
    assert first == sum(published[:2]) % WORD >> 32
    assert second == sum(published[2:]) % WORD >> 32


XOROSHIRO_FROM_1_2 = [
    3,
    412333834243,
    2360170716294286339,
    9295852285959843169,
    2797080929874688578,
    6019711933173041966,
    3076529664176959358,
    3521761819100106140,
    7493067640054542992,
    920801338098114767,
]


@cuda.jit
def step_kernel(state, results):
    s0, s1 = uint64(state[0]), uint64(state[1])
    for i in range(results.size):
        results[i], s0, s1 = rng.step(s0, s1)


def test_xoroshiro128plus_gives_the_vector_of_its_authors_code() -> None:
    """State (1, 2), constants 24, 16, 37: what xoroshiro128plus.c of 2018 prints."""
    words = xoroshiro128plus(1, 2)
    assert [next(words) for _ in XOROSHIRO_FROM_1_2] == XOROSHIRO_FROM_1_2
    results = np.zeros(len(XOROSHIRO_FROM_1_2), dtype=np.uint64)
    Simulator().launch(step_kernel, 1, 1, np.array([1, 2], dtype=np.uint64), results)
    assert results.tolist() == XOROSHIRO_FROM_1_2


# ---- bit equality -------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_numpy_mirror_is_the_definition(seed: int, width: int) -> None:
    shape = (2, 1, 3, width)
    expected = expected_draws(seed, shape)
    assert np.array_equal(rng.draws(seed, shape), expected)
    for p in (0.001, 0.2, 0.5):
        kept = nf.keep_mask(seed, shape, p)
        assert kept.dtype == np.bool_
        assert np.array_equal(kept, expected >= np.uint32(round(p * 2**32)))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("seed", SEEDS)
def test_mask_kernel_is_the_numpy_mirror(seed: int, width: int) -> None:
    p, expected = 0.3, nf.keep_mask(seed, (5, width), 0.3).ravel()
    words = seed_tensor(seed, torch.device("cpu"))
    for threads in (32, 96):
        keep = np.full(expected.size, 7, dtype=np.uint8)
        blocks = -(-keep.size // threads)
        Simulator().launch(
            rng.keep_mask_kernel, blocks, threads, keep, words, width, round(p * 2**32)
        )
        assert np.array_equal(keep, expected)


@cuda.jit
def keep_bits_kernel(bits, seed, drop_threshold):
    bits[cuda.threadIdx.x] = rng.keep_bits(
        uint64(seed[0]), uint64(cuda.threadIdx.x), drop_threshold
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_a_whole_run_at_once_is_the_same_mask(seed: int) -> None:
    p, bits = 0.3, np.zeros(7, dtype=np.uint32)
    words = seed_tensor(seed, torch.device("cpu"))
    Simulator().launch(keep_bits_kernel, 1, 7, bits, words, round(p * 2**32))
    kept = bits[:, None] >> np.arange(16, dtype=np.uint32) & 1
    assert np.array_equal(kept, nf.keep_mask(seed, (7, 16), p))


def test_a_whole_runs_thresholds_are_exact_to_the_last_draw() -> None:
    """A draw is kept if it is the threshold, not below it; 0 keeps all and 2**32 nothing."""
    seed, streams = 5, 4
    words = seed_tensor(seed, torch.device("cpu"))
    drawn = rng.draws(seed, (streams, 16)).astype(np.int64)
    for threshold in (0, 1, 2**31, *drawn[2].tolist(), *(drawn[2] + 1).tolist(), 2**32 - 1, 2**32):
        bits = np.zeros(streams, dtype=np.uint32)
        Simulator().launch(keep_bits_kernel, 1, streams, bits, words, threshold)
        kept = bits[:, None] >> np.arange(16, dtype=np.uint32) & 1
        assert np.array_equal(kept, drawn >= threshold), threshold


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("width", WIDTHS)
def test_dropout_scales_what_it_keeps_and_zeroes_the_rest(width: int, dtype: type) -> None:
    p, seed = 0.2, -5
    kept = nf.keep_mask(seed, (3, width), p).ravel()
    values = np.linspace(1, 2, kept.size, dtype=dtype)
    out = np.full_like(values, np.nan)
    scale = dtype(1 / (1 - p))
    arguments = (seed_tensor(seed, torch.device("cpu")), width, round(p * 2**32), scale)
    Simulator().launch(dropout_kernel, -(-kept.size // 64), 64, values, out, *arguments)
    assert np.array_equal(out, np.where(kept, values * scale, 0))


def test_dropout_makes_dropped_nan_and_inf_nan() -> None:
    kept = nf.keep_mask(1, (1, 64), 0.5).ravel()
    for value in (np.nan, np.inf, -np.inf):
        values = np.full(64, value, dtype=np.float32)
        out = np.zeros_like(values)
        arguments = (seed_tensor(1, torch.device("cpu")), 64, 2**31, np.float32(2))
        Simulator().launch(dropout_kernel, 1, 64, values, out, *arguments)
        assert np.array_equal(out, np.where(kept, values, np.nan).astype(np.float32), True)


# ---- what the mask depends on -------------------------------------------------------------------


def test_only_the_flat_row_and_the_position_in_it_matter() -> None:
    flat = nf.keep_mask(3, (24, 21), 0.5)
    for leading in [(2, 3, 4), (4, 6), (1, 24, 1, 1), (24, 1, 1)]:
        assert np.array_equal(nf.keep_mask(3, (*leading, 21), 0.5).reshape(24, 21), flat)
    assert np.array_equal(nf.keep_mask(3, (7, 21), 0.5), flat[:7])  # a smaller batch


def test_a_run_of_16_is_one_stream_however_wide_the_axis() -> None:
    wide, narrow = (rng.draws(3, (1, width)).ravel() for width in (64, 19))
    assert np.array_equal(narrow, wide[:19])


def test_a_larger_p_drops_all_that_a_smaller_one_does() -> None:
    masks = [nf.keep_mask(9, (50, 50), p) for p in (0.0, 0.001, 0.2, 0.5, 0.999, 1.0)]
    assert masks[0].all()
    assert not masks[-1].any()
    for lenient, strict in itertools.pairwise(masks):
        assert not (strict & ~lenient).any()


def test_seeds_are_taken_modulo_2_to_the_64() -> None:
    for seed in (-1, 5, 2**63):
        for same in (seed + WORD, seed - 3 * WORD):
            assert np.array_equal(rng.draws(seed, (4, 20)), rng.draws(same, (4, 20)))
            assert torch.equal(*(seed_tensor(s, torch.device("cpu")) for s in (seed, same)))


def test_it_does_not_matter_how_many_streams_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = rng.draws(83, (5, 40))
    monkeypatch.setattr(rng, "STREAMS_AT_ONCE", 4)  # of 15: the last few are fewer
    assert (rng.draws(83, (5, 40)) == whole).all()


def test_shapes_without_elements_have_empty_masks() -> None:
    assert nf.keep_mask(0, (0, 3, 5), 0.5).shape == (0, 3, 5)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_p_must_be_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
        nf.keep_mask(0, (2, 3), p)


# ---- randomness ---------------------------------------------------------------------------------
# Seeds are fixed, so these cannot flake; bounds are what a perfect generator passes with
# probability 1 - 1e-5 or better.


def deviations(kept: np.ndarray | int, trials: int, p: float) -> np.ndarray:
    """How many standard deviations Binomial(trials, 1 - p) counts are from their mean."""
    return (np.asarray(kept) - trials * (1 - p)) / math.sqrt(trials * p * (1 - p))


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_keep_rate_is_one_minus_p(p: float) -> None:
    for seed in (0, 2**64 - 1, 0x61C8864680B583EB, 42):
        kept = nf.keep_mask(seed, (1024, 1000), p)
        assert abs(deviations(int(kept.sum()), kept.size, p)) < 4.5


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_every_position_is_kept_equally_often(p: float) -> None:
    """No position is favoured over consecutive seeds: each count, and their spread."""
    trials, shape = 4000, (3, 37)
    counts = sum(nf.keep_mask(seed, shape, p).astype(np.int64) for seed in range(trials))
    z = deviations(counts, trials, p)
    assert np.abs(z).max() < 5.5
    # The sum of squares is chi-squared: mean n, variance 2 n. Too even is suspicious as well.
    assert abs((z**2).sum() - z.size) < 4.5 * math.sqrt(2 * z.size)


def next_step_seeds() -> tuple[int, int]:
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    pair = [int(draw_seed(torch.device("cpu"))) for _ in range(2)]
    torch.random.set_rng_state(generator_state)
    return pair[0], pair[1]


NEIGHBOURS = {
    "streams": lambda: (rng.draws(1, (40001, 16))[:-1], rng.draws(1, (40001, 16))[1:]),
    "draws": lambda: (rng.draws(2, (40000, 16))[:, :-1], rng.draws(2, (40000, 16))[:, 1:]),
    "steps": lambda: (rng.draws(2, (40000, 16))[:, :-2], rng.draws(2, (40000, 16))[:, 2:]),
    "seeds": lambda: (rng.draws(7, (40000, 16)), rng.draws(8, (40000, 16))),
    "training steps": lambda: tuple(rng.draws(s, (40000, 16)) for s in next_step_seeds()),
    "negated seeds": lambda: (rng.draws(7, (40000, 16)), rng.draws(-7, (40000, 16))),
}


@pytest.mark.parametrize("pair", NEIGHBOURS)
def test_neighbours_are_uncorrelated(pair: str) -> None:
    first, second = NEIGHBOURS[pair]()
    views = [
        (first.astype(np.float64), second.astype(np.float64)),
        *((first < t, second < t) for t in (2**31, round(0.2 * 2**32))),  # the masks themselves
        *((first >> b & 1, second >> b & 1) for b in (0, 1, 31)),
    ]
    for a, b in views:
        for column in range(first.shape[1]):
            correlation = np.corrcoef(a[:, column], b[:, column])[0, 1]
            assert abs(correlation) * math.sqrt(len(first)) < 5


def binary_rank(bits: np.ndarray) -> int:
    """Rank over GF(2)."""
    rows = [int("".join(map(str, row)), 2) for row in bits.astype(int)]
    rank = 0
    while rows:
        pivot = rows.pop()
        if pivot:
            rank += 1
            low = pivot & -pivot
            rows = [row ^ pivot if row & low else row for row in rows]
    return rank


def test_rank_test_finds_the_linear_lowest_bit_of_the_generator() -> None:
    """Positive control: bit 0 of xoroshiro128+ is a linear function of 128 state bits."""
    source = stream_of(0, 0)
    words = np.array([next(source) for _ in range(256 * 256)], dtype=np.uint64).reshape(256, 256)
    assert binary_rank(words & np.uint64(1)) <= 128
    for bit in (20, 32, 63):
        # A random 256 x 256 matrix has rank below 251 with probability 2e-11.
        assert binary_rank(words >> np.uint64(bit) & np.uint64(1)) > 250


@pytest.mark.parametrize("bit", [0, 16, 31])
def test_no_bit_of_the_masks_draws_is_linear(bit: int) -> None:
    """Streams of 8 steps are too short for the lowest bit's linearity to show."""
    assert binary_rank(rng.draws(11, (256, 256)) >> bit & 1) > 250
