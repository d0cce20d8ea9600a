# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: jupyter,tags
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. Random numbers on a GPU
#
# **After this notebook you can**
#
# * run the generator xoroshiro128+ by hand, and say what its state is;
# * seed a million streams so that they have nothing to do with each other, and see what happens if
#   they are not;
# * tell a dropout mask that depends on the launch from one that depends on the position alone;
# * say what a mask costs, in instructions and in bytes.
#
# Dropout zeroes each element with probability `p`. That takes 110 million random decisions in the
# benchmark, made by threads that do not talk to each other.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson import attempt, compare, message, show, show_diff, stored_counters
from numba import cuda, uint64

import numba_fused as nf
from numba_fused import bench, ladder, mistakes, plot, rng
from numba_fused.plot.style import BLUE, GREEN, ORANGE, SKY
from numba_fused.simulator import Simulator

# %% [markdown]
# ## A generator is a state and a step
#
# A pseudorandom generator keeps a *state*. Each *step* returns a number and the next state. Ours is
# *xoroshiro128+*, "xor, rotate, shift, rotate", with 128 bits of state in two words of 64:

# %%
show(rng.step)

# %% [markdown]
# It is a device function, which kernels call. Here a kernel takes steps, each thread from a state
# of its own:


# %%
@cuda.jit
def walk(s0, s1, results):
    thread = cuda.grid(1)
    a, b = s0[thread], s1[thread]
    for i in range(results.shape[1]):
        results[thread, i], a, b = rng.step(a, b)


def walked(s0, s1, steps):
    """The results of so many steps, one stream a line."""
    results = np.zeros((s0.size, steps), np.uint64)
    Simulator().launch(walk, 1, s0.size, s0, s1, results)
    return results


for result in walked(np.array([83], np.uint64), np.array([12], np.uint64), 6)[0]:
    print(f"{result:016x}")

# %% [markdown]
# In hexadecimal. After a few steps that looks random. The first result does not: it is 83 + 12.
#
# A step needs the state of the step before, so a single generator makes one number after the other.
# A GPU has 100,000 threads at work. Each needs a generator for itself, a *stream*, with a state to
# begin with.
#
# ## Seeding
#
# The obvious states are `(seed, 0)`, `(seed, 1)`, `(seed, 2)` ... All are different. Here each
# thread takes its first draw, the upper 32 bits of the result. An element is dropped if its draw is
# below `p * 2**32`.

# %%
p, seed = 0.2, 1234
threshold = round(p * 2**32)


@cuda.jit
def naive_first_draws(out, seed):
    stream = cuda.grid(1)
    result, _, _ = rng.step(uint64(seed), uint64(stream))
    out[stream] = result >> uint64(32)


naive = np.zeros(1024, np.uint32)
Simulator().launch(naive_first_draws, 8, 128, naive, seed)

# %% [markdown]
# **Predict:** what share of these 1,024 elements is kept?

# %%
predicted_share = 0.8

# %%
compare(predicted_share, (naive >= threshold).mean(), "kept")
print("the first draws:", naive[:8])

# %% [markdown]
# None. The sum of two small numbers has zeros in its upper half. And neighbouring streams stay
# alike for a while, because their states differ in a bit or two and each step stirs only a little.
#
# The authors of xoroshiro advise to fill the state from another generator, *splitmix64*, whose
# output function scatters every bit of its input over the whole word:

# %%
show(rng.mix, rng.seed_stream)

# %% [markdown]
# `GOLDEN` is 2^64 divided by the golden ratio, an odd number without pattern in its bits. Flip one
# bit of a word, mix it, and see which bits of the result flip.
#
# (`py_func` is the Python function that `mix` was made from.)
#
# **Predict:** how many of 64, on average?

# %%
predicted_bits = 1

# %%
words = np.random.default_rng(7).integers(0, 2**64, 4096, dtype=np.uint64)
flipped = words ^ (np.uint64(1) << (np.arange(4096) % 64).astype(np.uint64))
difference = rng.mix.py_func(words) ^ rng.mix.py_func(flipped)
compare(predicted_bits, np.bitwise_count(difference).mean(), "bits")

# %% [markdown]
# Half of them, as a coin would. Below are the decisions of 64 streams, 16 draws each, once from the
# obvious states and once from the mixed ones. White is dropped.


# %%
def decisions(s0, s1):
    """Kept or dropped, one stream a line: two draws a step, the upper and the lower 32 bits."""
    results = walked(s0, s1, 8)
    draws = np.stack([results >> np.uint64(32), results & rng.LOW_32], axis=2)
    return draws.reshape(s0.size, 16) >= threshold


streams = np.arange(64, dtype=np.uint64)
panels = {
    "states (seed, 0), (seed, 1) ...": decisions(np.full_like(streams, seed), streams),
    "states from splitmix64": nf.keep_mask(seed, (1, 64, 16), p)[0],
}
figure, axes = plt.subplots(1, 2, sharey=True, figsize=(7.2, 4.6))
for ax, (title, kept) in zip(axes, panels.items(), strict=True):
    ax.imshow(kept, cmap="Blues", vmin=0, vmax=1.3, aspect="auto", interpolation="nearest")
    ax.set_title(f"{title}\n{100 * kept.mean():.0f} % kept", fontsize=11)
    ax.set_xlabel("draw (number)")
axes[0].set_ylabel("stream (number)")
plt.show()

# %% [markdown]
# The columns on the left are decisions that all streams share. In a network whole groups of
# neighbouring units would be dropped together.
#
# ## Whose stream is it?
#
# Next question: which stream does an element of the output draw from? Numba's own
# `numba.cuda.random` keeps a state for each *thread*, and so do many kernels. This kernel does so,
# with a *grid-stride loop*: a thread takes every n-th element, n being the number of threads.


# %%
@cuda.jit
def mask_by_thread(keep, seed, threshold):
    thread = cuda.grid(1)
    s0, s1 = rng.seed_stream(uint64(seed), uint64(thread))
    for index in range(thread, keep.size, cuda.gridsize(1)):
        result, s0, s1 = rng.step(s0, s1)
        keep[index] = (result >> uint64(32)) >= uint64(threshold)


def run_by_thread(blocks, threads):
    keep = np.zeros(2048, np.uint8)
    Simulator().launch(mask_by_thread, blocks, threads, keep, seed, threshold)
    return keep


# %% [markdown]
# The streams are well seeded, and each run gives the same mask. Now launch 8 blocks of 32 threads,
# and then 4 blocks of 32.
#
# **Predict:** what share of the elements is decided differently?

# %%
predicted_share = 0.0

# %%
one, two = run_by_thread(8, 32), run_by_thread(4, 32)
print(f"kept: {one.mean():.3f} and {two.mean():.3f}")
compare(predicted_share, (one != two).mean(), "differ")

# %% [markdown]
# Two independent masks differ in a share of $2p(1-p) = 0.32$, and these nearly are. A better GPU,
# another block size, a faster kernel: each would change the results of a seeded training run. The
# backward pass, which is another kernel, could not draw the same mask again.
#
# So here the stream belongs to the *position*. The last axis of the output is cut into runs of 16.
# Each run has a stream, numbered through the output:

# %%
shape = (1, 2, 3, 40)  # (batch, channels, height, width)
runs = -(-shape[-1] // rng.RUN)
row, w = np.meshgrid(np.arange(6), np.arange(shape[-1]), indexing="ij")
stream = row * runs + w // rng.RUN

figure, ax = plt.subplots(figsize=(7.2, 2.6))
ax.imshow(stream % 3, cmap="Blues", vmin=-1, vmax=4, aspect="auto")
for number in range(stream.max() + 1):
    inside = stream == number
    ax.text(w[inside].mean(), row[inside].mean(), f"stream {number}", ha="center", va="center")
ax.set_xlabel("w, position in the last axis (elements)")
ax.set_ylabel("row of the output\n(number)")
plt.show()

# %%
show(rng.draw)

# %% [markdown]
# `draw` knows the seed, the index and the width, and nothing of threads. `keep_mask_kernel` calls
# it for every element, and `nf.keep_mask` is the same in NumPy. **Predict** again, for three
# launches:

# %%
predicted_different = 0

# %%
shape = (2, 3, 5, 20)
expected = nf.keep_mask(seed, shape, p)
different = 0
for blocks, threads in ((5, 128), (20, 32), (1, 640)):
    keep = np.zeros(expected.size, np.uint8)
    seeds = np.array([seed], np.int64)
    Simulator().launch(rng.keep_mask_kernel, blocks, threads, keep, seeds, shape[-1], threshold)
    different += (keep.reshape(shape) != expected).sum()
compare(predicted_different, different, "elements differ")

# %% [markdown]
# And in the rungs of the ladder, whatever their tiles, blocks and launches are:

# %%
generator = torch.Generator().manual_seed(1)
x = torch.randn((1, 2, 3, 6, 22), generator=generator)
weight = torch.randn((4, 2, 2, 3, 3), generator=generator)
spec = nf.BlockSpec.from_arguments(x.shape, weight.shape, num_groups=2, **bench.CHAIN)
mask = nf.keep_mask(seed, spec.output_shape, bench.CHAIN["dropout_p"])

for name, threads in (
    ("pointwise", 64),
    ("one_kernel", 256),
    ("tiled", 128),
    ("library_conv", 128),
):
    out = ladder.run(name, x, weight, spec=spec, seed=seed, threads_per_block=threads)
    print(f"{name:13} {threads:3} threads: same mask? {np.array_equal(out.numpy() != 0, mask)}")

# %% [markdown]
# The gallery of mistakes has the other kind. It passes a test that counts zeros:

# %%
show_diff(mistakes.get("grid-dependent-mask"))

# %%
mistake = mistakes.get("grid-dependent-mask")
print("passes", mistake.passes.story, "-", mistake.passes_naive_test())
verdict = mistakes.examine(mistake)
print(f"verifier: {verdict.caught_by}; {verdict.summary}")

# %% [markdown]
# ## Is it a fair coin?
#
# **Predict:** of 1,048,576 elements, how many are kept at p = 0.2? The standard error is
# $\sqrt{n\,p\,(1-p)} \approx 410$.

# %%
predicted_kept = 838_861

# %%
kept = nf.keep_mask(seed, (1, 1024, 1024), p).sum()
compare(predicted_kept, kept, "kept")
print(f"{(kept - 2**20 * 0.8) / np.sqrt(2**20 * p * (1 - p)):.2f} standard errors from the mean")

# %% [markdown]
# The same for many seeds and probabilities, and for each position in a stream. For fair masks 95 %
# of the points lie in the band:

# %%
plot.mask_figure()

# %% [markdown]
# ## What dropout does with it
#
# *Inverted* dropout divides what it keeps by `1 - p`, so that the expected value stays the same and
# evaluation needs no correction:

# %%
show(rng.dropout)

# %% [markdown]
# A dropped value is *multiplied* by zero, and not replaced by it.
#
# **Predict:** a NaN is dropped. How many NaN does the output have?

# %%
predicted_nans = 0


# %%
@cuda.jit
def dropout_kernel(values, out, seed, width, drop_threshold, keep_scale):
    index = cuda.grid(1)
    if index < values.size:
        out[index] = rng.dropout(values[index], index, seed, width, drop_threshold, keep_scale)


values = np.ones(1024, np.float32)
values[np.flatnonzero(~nf.keep_mask(seed, (1, 1, 1024), p))[0]] = np.nan  # the first dropped one
out, scale = np.zeros_like(values), np.float32(1 / (1 - p))
Simulator().launch(
    dropout_kernel, 8, 128, values, out, np.array([seed], np.int64), 1024, threshold, scale
)
compare(predicted_nans, np.isnan(out).sum(), "NaN")
print(f"mean of the others {np.nanmean(out):.3f}; values {np.unique(out[~np.isnan(out)])}")

# %% [markdown]
# ## What a mask costs
#
# The stored counters of the H200 have three kernels of rung 1 that move the same bytes: min, clamp
# and dropout. **Predict:** how many ms does dropout take?

# %%
counters = stored_counters()
milliseconds = counters["nanoseconds"] / 1e6
print(f"min {milliseconds['unfused', 'min_kernel']:.3f} ms")
predicted_ms = milliseconds["unfused", "min_kernel"]

# %%
compare(predicted_ms, milliseconds["unfused", "dropout_kernel"], "ms")

# %% [markdown]
# It is no longer bound by memory: a draw by itself seeds the stream and then walks it up to its own
# position, which takes up to 8 steps. Whoever owns a whole run of 16 seeds once and takes each step
# once.
#
# **Predict:** how many times fewer steps is that?

# %%
predicted_times = 2

# %%
by_value = sum(position // 2 + 1 for position in range(rng.RUN))
by_run = rng.RUN // 2
print(f"steps for 16 elements: {by_value} value by value, {by_run} as a run; seedings: 16 and 1")
compare(predicted_times, by_value / by_run, "times fewer")

# %%
outputs = np.prod(bench.case_spec("kb83").output_shape)
per_value = counters["instructions"] * 32 / outputs  # a warp instruction is of 32 lanes
shown = {
    "min (rung 1)": (per_value["unfused", "min_kernel"], GREEN),
    "clamp (rung 1)": (per_value["unfused", "clamp_kernel"], SKY),
    "dropout, by value (rung 1)": (per_value["unfused", "dropout_kernel"], ORANGE),
    "norm, min, clamp and dropout,\nby runs (rung 10)": (
        per_value["library_conv", "apply_kernel"],
        BLUE,
    ),
}
figure, ax = plt.subplots(figsize=(7.2, 2.6))
for name, (count, colour) in shown.items():
    ax.barh(name, count, color=colour)
    ax.text(count, name, f" {count:.0f}", va="center")
ax.invert_yaxis()
ax.set_xlabel("instructions for one element (count)")
plt.show()

# %% [markdown]
# With runs, the whole kernel with the normalisation in it needs fewer instructions than dropout
# by itself.
#
# And the bytes? PyTorch stores the mask for the backward pass, a byte for each element. Here the
# backward pass draws it again.
#
# **Predict:** how many MB does the benchmark's mask take, stored as bytes?

# %%
predicted_megabytes = 10

# %%
compare(predicted_megabytes, outputs / 1e6, "MB")
print("drawn again: 8 bytes, the seed")

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write `place_of(index, shape)`: for the element at a multi-index, for example
# `(n, k, d, h, w)`, of an output of that shape, the pair `(stream, draw)`, where `draw` counts from
# 0 to 15.


# %%
def check_1(place_of):
    for shape in ((2, 3, 40), (2, 4, 3, 5, 17), (1, 2, 6, 16)):
        streams = np.arange(np.prod(shape[:-1]) * -(-shape[-1] // 16)).reshape(*shape[:-1], -1)
        for index in np.ndindex(*shape):
            expected = streams[(*index[:-1], index[-1] // 16)], index[-1] % 16
            found = place_of(index, shape)
            assert tuple(found) == expected, f"{index} of {shape}: {found} is not {expected}"


my_place_of = None  # def place_of(index, shape): ...
attempt(check_1, my_place_of)

# %% [markdown]
# **Exercise 2.** Write a kernel `(keep, seed, width, threshold)`, with one thread for each
# *stream*, that seeds once, takes 8 steps, and writes the decisions of its run into the flat array
# `keep`, 1 for kept. `seed` is an int64 array of one element. The last run of a row may be shorter
# than 16, and there are more threads than streams.


# %%
def check_2(kernel):
    for shape in ((1, 3, 32), (2, 3, 21)):
        expected = nf.keep_mask(99, shape, p)
        keep = np.full(expected.size, 7, np.uint8)
        seeds = np.array([99], np.int64)
        try:
            Simulator().launch(kernel, 1, 32, keep, seeds, shape[-1], threshold)
        except Exception as error:
            raise AssertionError(message(error)) from None
        wrong = (keep.reshape(shape) != expected).sum()
        assert not wrong, f"{wrong} of {expected.size} elements differ for {shape}"


my_kernel = None  # @cuda.jit above a def
attempt(check_2, my_kernel)

# %% [markdown]
# **Exercise 3.** Streams are seeded from `seed + g * (2 * stream + 1)` and `... + 2)`, modulo 2^64,
# `g` being `rng.GOLDEN`. So there is a seed whose stream 0 is stream 1 of seed 0, its stream 1 is
# stream 2 of seed 0, and so on: the masks are the same, shifted by a run. Find it.


# %%
def check_3(other):
    here = nf.keep_mask(0, (1, 1, 1024), 0.5)[0, 0]
    there = nf.keep_mask(other, (1, 1, 1024), 0.5)[0, 0]
    equal = (there[:-16] == here[16:]).mean()
    assert equal == 1, f"{100 * equal:.0f} % agree, as do any two masks"


my_seed = None
attempt(check_3, my_seed)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_1(index, shape):
    row = 0
    for position, size in zip(index[:-1], shape[:-1], strict=True):
        row = row * size + position
    w, width = index[-1], shape[-1]
    return row * -(-width // 16) + w // 16, w % 16


check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_2(keep, seed, width, threshold):
    stream = cuda.grid(1)
    runs = (width + rng.RUN - 1) // rng.RUN
    row, first = stream // runs, stream % runs * rng.RUN
    if row < keep.size // width:
        s0, s1 = rng.seed_stream(uint64(seed[0]), uint64(stream))
        for w in range(first, first + rng.RUN, 2):
            result, s0, s1 = rng.step(s0, s1)
            if w < width:
                keep[row * width + w] = (result >> uint64(32)) >= uint64(threshold)
            if w + 1 < width:
                keep[row * width + w + 1] = (result & rng.LOW_32) >= uint64(threshold)


check_2(solution_2)
print("solution 2 is right")

# %% jupyter={"source_hidden": true} tags=["solution"]
solution_3 = 2 * int(rng.GOLDEN) % 2**64
check_3(solution_3)
print(f"solution 3 is right: {solution_3}")

# %% [markdown]
# Such pairs of seeds exist wherever streams are seeded along one long sequence. A seed
# drawn at random hits one with a probability of about the number of streams in 2^64.
#
# **Next:** [5. Tensor cores from Python](05_tensor_cores.ipynb).
