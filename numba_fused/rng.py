"""The dropout mask: xoroshiro128+, one stream per 16-wide run of the output's last axis.

The mask depends on the seed and on the logical position of an element, on nothing else: not
on grid, block, variant, device or contiguity. So every kernel draws the same mask, and a
backward pass draws it again instead of reading it from memory.

    row     = flat index over all axes but the last
    stream  = row * ceil(W / 16) + w // 16
    s0, s1  = mix(seed + g*(2*stream + 1)), mix(seed + g*(2*stream + 2))     splitmix64
    draw j  = position w % 16 of the run: step j // 2, upper 32 bits for even j, lower for odd
    drop the element when draw < round(p * 2**32)

Generator: Blackman and Vigna, "Scrambled linear pseudorandom number generators" (2018
constants 24, 16, 37); seeding by splitmix64 as its authors advise. The device functions and
their NumPy mirror stand side by side below; tests hold them equal bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numba import cuda, int64, uint32, uint64

from numba_fused.spec import check_dropout_p

RUN = 16  # elements of the last axis that share one stream
STREAMS_AT_ONCE = 2**16  # on the host: as many as its caches hold

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
LOW_32 = np.uint64(0xFFFFFFFF)

# ---- on the device ----------------------------------------------------------------------------


@cuda.jit(device=True)
def mix(z):
    """splitmix64's output function: a bijection of 64-bit words that scatters every bit."""
    z = (z ^ (z >> uint64(30))) * MIX_1
    z = (z ^ (z >> uint64(27))) * MIX_2
    return z ^ (z >> uint64(31))


@cuda.jit(device=True)
def seed_stream(seed, stream):
    """State (s0, s1) of a stream; all zeros is the one state xoroshiro never leaves."""
    s0 = mix(seed + GOLDEN * (uint64(2) * stream + uint64(1)))
    s1 = mix(seed + GOLDEN * (uint64(2) * stream + uint64(2)))
    if s0 == uint64(0) and s1 == uint64(0):
        s1 = uint64(1)
    return s0, s1


@cuda.jit(device=True)
def rotate_left(word, bits):
    """Rotate a 64-bit word; `bits` is a uint64, as every operand of a uint64 must be."""
    return (word << bits) | (word >> (uint64(64) - bits))


@cuda.jit(device=True)
def step(s0, s1):
    """One step: the 64-bit result and the next state."""
    result = s0 + s1
    s1 ^= s0
    s0 = rotate_left(s0, uint64(24)) ^ s1 ^ (s1 << uint64(16))
    s1 = rotate_left(s1, uint64(37))
    return result, s0, s1


@cuda.jit(device=True)
def draw(seed, index, width):
    """The 32-bit draw of the output element with flat `index`; `width` is the last axis' size.

    One element by itself, so it walks its stream from the start: up to 8 steps. Kernels that
    own a whole run of 16 take each step once.
    """
    row, w = index // width, index % width
    s0, s1 = seed_stream(seed, uint64(row * ((width + RUN - 1) // RUN) + w // RUN))
    position = w % RUN
    result, s0, s1 = step(s0, s1)
    for _ in range(position // 2):
        result, s0, s1 = step(s0, s1)
    return result & LOW_32 if position % 2 else result >> uint64(32)


@cuda.jit(device=True)
def dropout(value, index, seed, width, drop_threshold, keep_scale):
    """Inverted dropout of the element at flat output `index`.

    seed (1,) int64; drop_threshold is 0 when nothing is to be drawn. A dropped value is
    multiplied by zero, not replaced by it: a dropped NaN or Inf is NaN, as in PyTorch.
    """
    if drop_threshold > 0:
        if int64(draw(uint64(seed[0]), index, width)) < drop_threshold:
            keep_scale -= keep_scale  # a zero of the value's own type
        value *= keep_scale
    return value


@cuda.jit(device=True)
def keep_bits(seed, stream, drop_threshold):
    """The 16 decisions of one stream: bit `j` is set where position `j` of the run survives.

    Compared as 32-bit words, which takes half the instructions of 64-bit ones. The one threshold
    that is not such a word, 2**32, drops all.
    """
    bits = uint32(0)
    if int64(drop_threshold) > int64(LOW_32):
        return bits
    threshold = uint32(drop_threshold)
    s0, s1 = seed_stream(seed, stream)
    for position in range(0, RUN, 2):
        result, s0, s1 = step(s0, s1)
        if uint32(result >> uint64(32)) >= threshold:
            bits = uint32(bits | uint32(1) << uint32(position))
        if uint32(result & LOW_32) >= threshold:
            bits = uint32(bits | uint32(2) << uint32(position))
    return bits


@cuda.jit
def keep_mask_kernel(keep, seed, width, drop_threshold):
    """keep[index] = 1 where element `index` of the flat output survives, else 0."""
    index = cuda.grid(1)
    if index < keep.size:
        keep[index] = int64(draw(uint64(seed[0]), index, width)) >= drop_threshold


# ---- the NumPy mirror -------------------------------------------------------------------------


def draws(seed: int, output_shape: Sequence[int]) -> np.ndarray:
    """The 32-bit draw behind every element of the output.

    Parameters
    ----------
    seed : int
        Taken modulo 2**64.
    output_shape : sequence of int
        (N, C, *spatial); the last axis is the one cut into runs of 16.

    Returns
    -------
    numpy.ndarray
        uint32, of `output_shape`.
    """
    *leading, width = output_shape
    rows, runs = math.prod(leading), -(-width // RUN)
    words = np.empty((rows * runs, RUN), dtype=np.uint32)
    for first in range(0, len(words), STREAMS_AT_ONCE):
        some = words[first : first + STREAMS_AT_ONCE]
        _draw(some, np.uint64(seed % 2**64), np.arange(first, first + len(some), dtype=np.uint64))
    return words.reshape(rows, runs * RUN)[:, :width].reshape(output_shape)


def _draw(words: np.ndarray, seed: np.uint64, stream: np.ndarray) -> None:
    """Fill (streams, RUN) `words` with the draws of these streams."""
    with np.errstate(over="ignore"):
        s0 = _mix(seed + GOLDEN * (np.uint64(2) * stream + np.uint64(1)))
        s1 = _mix(seed + GOLDEN * (np.uint64(2) * stream + np.uint64(2)))
        s1[(s0 == 0) & (s1 == 0)] = 1
        for position in range(0, RUN, 2):
            result = s0 + s1
            words[:, position] = result >> np.uint64(32)
            words[:, position + 1] = result & LOW_32
            s1 ^= s0
            s0 = _rotate_left(s0, 24) ^ s1 ^ (s1 << np.uint64(16))
            s1 = _rotate_left(s1, 37)


def keep_mask(seed: int, output_shape: Sequence[int], p: float) -> np.ndarray:
    """The exact dropout mask the kernels use.

    Parameters
    ----------
    seed : int
        Taken modulo 2**64.
    output_shape : sequence of int
        (N, C, *spatial) of the block's output.
    p : float
        Probability that an element is dropped.

    Returns
    -------
    numpy.ndarray
        bool, of `output_shape`; True where the element is kept (and scaled by 1 / (1 - p)).

    Raises
    ------
    ValueError
        `p` is outside [0, 1] or NaN.
    """
    check_dropout_p(p)
    return draws(seed, output_shape) >= np.uint64(round(p * 2**32))


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * MIX_1
    z = (z ^ (z >> np.uint64(27))) * MIX_2
    return z ^ (z >> np.uint64(31))


def _rotate_left(word: np.ndarray, bits: int) -> np.ndarray:
    return (word << np.uint64(bits)) | (word >> np.uint64(64 - bits))
