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
# # 3. Group statistics
#
# **After this notebook you can**
#
# * predict how many digits E[x^2] - E[x]^2 loses, and at which mean it loses all;
# * compute mean and variance in one pass with Welford's update, and merge partial results with
#   Chan's formula;
# * reduce the values of a block to one number with shuffles, shared memory and one barrier;
# * read what the simulator says of a missing barrier, and count bank conflicts.
#
# Group normalisation wants one mean and one variance of each group: in the benchmark 107,632
# values. A block of a few hundred threads has to agree on them.

# %%
import gzip
import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from lesson import DATA, attempt, compare, message, show, show_diff
from numba import cuda, float32

from numba_fused import mistakes
from numba_fused.device import reductions
from numba_fused.plot.style import BLUE, GREEN, ORANGE, VERMILION
from numba_fused.simulator import SimulationError, Simulator

# %% [markdown]
# ## The formula from school
#
# The variance is the mean squared deviation from the mean, and on paper
#
# $$\frac{1}{n}\sum_i (x_i - \mu)^2 \;=\; \frac{1}{n}\sum_i x_i^2 \;-\; \mu^2 .$$
#
# The right-hand side needs one look at each value: add up `x` and `x * x`. The left-hand side
# needs two, because the mean has to be known first. Here are both in fp32, adding up one by one as
# a thread does:


# %%
def running_sum(values):
    return np.add.accumulate(values, dtype=np.float32)[-1]


def one_pass(x):
    mean = running_sum(x) / np.float32(x.size)
    return running_sum(x * x) / np.float32(x.size) - mean * mean


def two_passes(x):
    mean = running_sum(x) / np.float32(x.size)
    return running_sum((x - mean) ** 2) / np.float32(x.size)


def digits(found, x):
    """Correct decimal digits of a variance, by fp64 on the same values."""
    exact = x.astype(np.float64).var()
    return -np.log10(max(abs(found / exact - 1), 2.0**-24))


noise = np.random.default_rng(3).standard_normal(4096).astype(np.float32)
print(f"mean 0: {digits(one_pass(noise), noise):.1f} and {digits(two_passes(noise), noise):.1f}")

# %% [markdown]
# fp32 has 24 bits, about 7 digits. Around a mean of 0 both formulas keep most of them. Now add
# 1,000 to every value. The variance stays 1.
#
# **Predict:** how many digits does `one_pass` get right?

# %%
predicted_digits = 4

# %%
offset = noise + np.float32(1000)
compare(predicted_digits, max(0.0, digits(one_pass(offset), offset)), "digits")
print(f"one pass: {one_pass(offset):.3f}; two passes: {two_passes(offset):.6f}")
print(f"fp64: {offset.astype(np.float64).var():.6f}")

# %% [markdown]
# A negative result is possible, too, and its square root is NaN. The cause is not the sum but the
# subtraction: both numbers are near 1,000,000, neighbouring fp32 numbers there are 1/16
# apart, and the running sum itself rounds to much more than that. What is left of the difference is
# rounding. It is called *cancellation*.
#
# The rule: relative to a variance of 1, the error is about `mean**2` times the relative rounding of
# the sums.

# %%
means = 10.0 ** np.arange(0, 5.01, 0.25)
errors = {"one pass": [], "two passes": []}
for mean in means:
    values = noise + np.float32(mean)
    exact = values.astype(np.float64).var()
    errors["one pass"].append(abs(one_pass(values) / exact - 1))
    errors["two passes"].append(abs(two_passes(values) / exact - 1))

# %% [markdown]
# ## Welford's update
#
# There is a way to look at each value once and never form `mean**2`. Keep three numbers: `count`,
# `mean`, and `m2`, the sum of squared deviations from the mean so far. A new value moves the mean
# a little, and adds to `m2`:

# %%
show(reductions.add_value)

# %% [markdown]
# It is a device function, which kernels call. `py_func` is the Python function it was made from, so
# that we can watch it:

# %%
count, mean, m2 = np.float32(0), np.float32(0), np.float32(0)
for value in np.array([1001, 1003, 998, 1002], np.float32):
    count, mean, m2 = reductions.add_value.py_func(count, mean, m2, value)
    print(f"{value:.0f}:  count {count:.0f}   mean {mean:8.3f}   m2 {m2:6.3f}")
print(f"variance {m2 / count}, NumPy says {np.var([1001, 1003, 998, 1002])}")

# %% [markdown]
# What it adds up are *deviations*, small where the values are close to each other, wherever they
# are.
#
# **Predict:** at a mean of 1,000, how many digits does it get right?

# %%
predicted_digits = 4


# %%
def welford(x):
    count, mean, m2 = np.float32(0), np.float32(0), np.float32(0)
    for value in x:
        count, mean, m2 = reductions.add_value.py_func(count, mean, m2, value)
    return m2 / count


compare(predicted_digits, digits(welford(offset), offset), "digits")

# %%
errors["Welford"] = []
for mean in means:
    values = noise + np.float32(mean)
    errors["Welford"].append(abs(welford(values) / values.astype(np.float64).var() - 1))

figure, ax = plt.subplots(figsize=(7.2, 3.8))
marks = {"one pass": (VERMILION, "s"), "two passes": (BLUE, "o"), "Welford": (GREEN, "^")}
for name, (colour, marker) in marks.items():
    ax.loglog(means, np.maximum(errors[name], 2.0**-26), color=colour, marker=marker, label=name)
ax.axhline(1, color="black", lw=1, ls=":")
ax.text(1, 1.5, "no digit is right above this line", fontsize=10)
ax.set_xlabel("mean of the values, whose variance is 1 (no unit)")
ax.set_ylabel("relative error of the\nvariance (no unit)")
ax.legend()
plt.show()

# %% [markdown]
# Two passes fail at last, too, beyond a mean of 10,000: their running sum of `x` rounds so coarsely
# that the mean is off by more than the deviations are large. Welford's running mean only ever moves
# by a deviation.
#
# Does that matter in a network? A convolution has a bias, inputs are not always centred, and an
# activation with mean 30 and variance 1 is nothing special. One pass has three of seven digits
# left.
#
# ## Chan's merge
#
# Welford is one thread's work. 256 threads have 256 partial results, which have to become one. Two
# sets of values, of which only `(count, mean, m2)` are known, have these together:

# %%
show(reductions.merge)

# %%
zero = np.float32(0)


def moments(x):
    count, mean, m2 = zero, zero, zero
    for value in x:
        count, mean, m2 = reductions.add_value.py_func(count, mean, m2, value)
    return count, mean, m2


count, mean, m2 = reductions.merge.py_func(*moments(offset[:1000]), *moments(offset[1000:]))
print(f"{count:.0f} values, variance {m2 / count:.6f}")

# %% [markdown]
# Merging has a second use. Each update rounds, and a long chain of roundings drifts. The
# package's kernels break their chains after 128 values and merge. Here are 64 threads with up to
# 16,384 values each, as NumPy vectors:

# %%
long = np.random.default_rng(4).standard_normal((16_384, 64)).astype(np.float32) + np.float32(10)


def chained(x, chain):
    total, part = (zero, zero, zero), (zero, zero, zero)
    for value in x:
        part = reductions.add_value.py_func(*part, value)
        if part[0] == chain:
            total, part = reductions.merge.py_func(*total, *part), (zero, zero, zero)
    count, _, m2 = reductions.merge.py_func(*total, *part)
    return m2 / count


# %% [markdown]
# **Predict:** by what factor does breaking the chain reduce the error of the variance?

# %%
predicted_factor = 1.0

# %%
lengths = [128, 512, 2048, 8192, 16_384]
drift = {"one chain": [], "chains of 128, merged": []}
for length in lengths:
    exact = long[:length].astype(np.float64).var(axis=0)
    for name, chain in zip(drift, (10**9, 128), strict=True):
        found = chained(long[:length], chain)
        drift[name].append(np.sqrt(np.mean((found / exact - 1) ** 2)))
unbroken, broken = (values[-1] for values in drift.values())
compare(predicted_factor, unbroken / broken, "times less")

# %%
figure, ax = plt.subplots()
for (name, values), (colour, marker) in zip(
    drift.items(), [(VERMILION, "s"), (BLUE, "o")], strict=True
):
    ax.loglog(lengths, values, color=colour, marker=marker, label=name)
ax.set_xlabel("values that a thread adds up (count)")
ax.set_ylabel("relative error of the\nvariance, rms (no unit)")
ax.legend()
plt.show()

# %% [markdown]
# ## From 32 threads to one number: shuffles
#
# The 32 threads of a *warp* are its *lanes*. They run together and can look into each other's
# registers: `shfl_xor_sync(mask, value, distance)` gives each lane the value of the lane whose
# number differs in that one bit. Five exchanges, at distances 16, 8, 4, 2 and 1, and every lane has
# the sum of all:

# %%
show(reductions.warp_sum)

# %%
figure, ax = plt.subplots(figsize=(7.2, 2.8))
lanes = np.arange(8)
for level, distance in enumerate((4, 2, 1)):
    for lane in lanes:
        ax.plot([lane, lane], [level, level + 1], color=BLUE, lw=1.5)
        ax.plot([lane ^ distance, lane], [level, level + 1], color=ORANGE, lw=1.5, ls="--")
for level in range(4):
    ax.plot(lanes, np.full(8, level), "o", color="black", ms=5)
ax.set_yticks(range(4), ["at first", "distance 4", "distance 2", "distance 1"])
ax.set_xticks(lanes)
ax.set_xlabel("lane (a warp of 8, for the picture)")
ax.invert_yaxis()
plt.show()

# %% [markdown]
# **Predict:** how many shuffles does a warp of 32 lanes need for a sum that all lanes know?

# %%
predicted_shuffles = 31


# %%
@cuda.jit
def warp_sum_kernel(values, out):
    lane = cuda.laneid
    out[lane] = reductions.warp_sum(values[lane])


simulator, values = Simulator(), np.arange(32, dtype=np.float32)
out = np.empty_like(values)
simulator.launch(warp_sum_kernel, 1, 32, values, out)
compare(predicted_shuffles, sum(simulator.launches[0].collectives.values()), "shuffles")
print("sum in every lane:", np.unique(out))

# %% [markdown]
# ## From a block to one number: shared memory
#
# Warps cannot shuffle with each other. They meet in *shared memory*, which belongs to a block, and
# wait for each other at a *barrier*, `cuda.syncthreads()`: no thread goes on before all have
# arrived. Each warp leaves three numbers; after the barrier each warp merges all of them.

# %%
show(reductions.block_moments)

# %% [markdown]
# A kernel around it, of one block, which is what every group norm of the ladder does first. With
# 256 threads there are 8 warps. **Predict:** how many fp32 words does the block write to shared
# memory?

# %%
predicted_words = 256 * 3


# %%
@cuda.jit
def moments_kernel(values, out):
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, values.dtype)
    count, mean, m2 = reductions.strided_moments(values, 0, values.size)
    count, mean, m2 = reductions.block_moments(count, mean, m2, scratch)
    if cuda.threadIdx.x == 0:
        out[0], out[1], out[2] = count, mean, m2


simulator, out = Simulator(count=True), np.full(3, np.nan, np.float32)
simulator.launch(moments_kernel, 1, 256, offset, out)
launch = simulator.launches[0]
stores = [line for line in launch.lines if line.space == "shared" and line.kind == "store"]
compare(predicted_words, sum(line.accesses for line in stores), "words")
print(f"variance {out[2] / out[0]:.6f}, {digits(out[2] / out[0], offset):.1f} digits")
print(f"collectives: {launch.collectives}")

# %% [markdown]
# One barrier for the block. A reduction in shared memory alone, as many textbooks have it, needs
# one for each halving. Here are two of that kind. They do the same additions, in another order:


# %%
@cuda.jit
def interleaved(values, out):
    scratch = cuda.shared.array(256, float32)
    thread = cuda.threadIdx.x
    scratch[thread] = values[thread]
    distance = 1
    while distance < cuda.blockDim.x:
        cuda.syncthreads()
        place = 2 * distance * thread
        if place < cuda.blockDim.x:
            scratch[place] += scratch[place + distance]
        distance *= 2
    if thread == 0:
        out[0] = scratch[0]


@cuda.jit
def halving(values, out):
    scratch = cuda.shared.array(256, float32)
    thread = cuda.threadIdx.x
    scratch[thread] = values[thread]
    distance = cuda.blockDim.x // 2
    while distance > 0:
        cuda.syncthreads()
        if thread < distance:
            scratch[thread] += scratch[thread + distance]
        distance //= 2
    if thread == 0:
        out[0] = scratch[0]


# %% [markdown]
# Shared memory has 32 *banks*, and word `i` lies in bank `i % 32`. If lanes of one request want
# different words of the same bank, they are served one after the other: a *bank conflict*. In
# `interleaved` the lanes of a warp go to places 2, 4, 8 ... apart.
#
# **Predict** the bank conflicts of each kernel, for 256 values.

# %%
predicted_interleaved, predicted_halving = 10, 10


# %%
def conflicts(kernel):
    counting, out = Simulator(count=True), np.zeros(1, np.float32)
    counting.launch(kernel, 1, 256, np.arange(256, dtype=np.float32), out)
    assert out[0] == 255 * 128
    shared = [line for line in counting.launches[0].lines if line.space == "shared"]
    return sum(line.bank_conflicts for line in shared), counting.launches[0].collectives


for kernel, predicted in ((interleaved, predicted_interleaved), (halving, predicted_halving)):
    found, collectives = conflicts(kernel)
    print(kernel.py_func.__name__, collectives)
    compare(predicted, found, "bank conflicts")

# %% [markdown]
# ## What goes wrong
#
# Leave out the barrier. On a GPU the result is right or wrong as the warps happen to run, often
# right for years. The simulator looks at which accesses nothing puts in order, so it need
# not be lucky.


# %%
@cuda.jit
def without_barrier(values, out):
    scratch = cuda.shared.array(256, float32)
    thread = cuda.threadIdx.x
    scratch[thread] = values[thread]
    cuda.syncthreads()
    distance = cuda.blockDim.x // 2
    while distance > 0:
        if thread < distance:
            scratch[thread] += scratch[thread + distance]
        distance //= 2
    if thread == 0:
        out[0] = scratch[0]


try:
    Simulator().launch(without_barrier, 1, 256, np.ones(256, np.float32), np.zeros(1, np.float32))
except SimulationError as error:
    print(message(error))

# %% [markdown]
# The gallery of mistakes has reductions that are one line away from `block_moments`. This one reads
# shared memory that nobody wrote:

# %%
show_diff(mistakes.get("stale-shared-memory"))

# %% [markdown]
# **Predict:** of these four wrong kernels, how many pass a plausible test?

# %%
predicted_pass = 1

# %%
names = ["missing-barrier", "stale-shared-memory", "raw-moments", "variance-n-1"]
passed = 0
for name in names:
    mistake = mistakes.get(name)
    passed += mistake.passes_naive_test()
    print(f"{name:20} passes {mistake.passes.story}")
    print(f"{'':20} verifier: {mistakes.examine(mistake).caught_by}")
compare(predicted_pass, passed, "pass")

# %% [markdown]
# ## On the H200
#
# `plots/data/verify.json.gz` holds the verifier's random cases on a real GPU. Some of them have
# inputs with a large mean (`offset`). Each result has the kernel's error against fp64, PyTorch's
# own error on the same input, and the error that is allowed.
#
# **Predict:** what is the largest error of a kernel, in multiples of PyTorch's own, over all cases
# with a large mean?

# %%
predicted_worst = 10.0

# %%
with gzip.open(DATA / "verify.json.gz", "rt") as file:
    stored = json.load(file)
frame = pd.DataFrame(stored["results"])
frame = frame[~frame["variant"].str.startswith("backward:")]  # of which notebook 6 is
ours = frame[(frame["variant"] != "torch") & (frame["torch_error"] > 0)].copy()
ours["ratio"] = ours["error"] / ours["torch_error"]
large_mean = ours["description"].str.contains(" offset ")
print(f"{stored['gpu']}: {len(ours)} results, {large_mean.sum()} with a large mean")
compare(predicted_worst, ours.loc[large_mean, "ratio"].max(), "times PyTorch's error")

# %%
figure, ax = plt.subplots()
bins = np.logspace(-2, 1, 49)
kinds = {"other inputs": (~large_mean, BLUE, None), "large mean": (large_mean, ORANGE, "//")}
for name, (chosen, colour, hatch) in kinds.items():
    ax.hist(ours.loc[chosen, "ratio"], bins=bins, color=colour, hatch=hatch, alpha=0.7, label=name)
ax.axvline(1, color="black", lw=1)
ax.set_xscale("log")
ax.set_xlabel("error of the kernel / error of PyTorch (no unit, log scale)")
ax.set_ylabel("results (count)")
ax.legend()
plt.show()

# %% [markdown]
# Left of the line a kernel is closer to the truth than PyTorch's own operators, on the line both
# are equally close. Welford and Chan cost a division here and there; they do not cost digits.
#
# ## Exercises
#
# **Exercise 1.** Write `pooled(parts)`: from a list of `(count, mean, variance)`, biased variances,
# the same three numbers of all values together. No NumPy needed.


# %%
def check_1(pooled):
    generator = np.random.default_rng(5)
    sets = [1e6 + generator.standard_normal(size) for size in (3, 50, 1, 700)]
    found = pooled([(values.size, values.mean(), values.var()) for values in sets])
    together = np.concatenate(sets)
    expected = together.size, together.mean(), together.var()
    assert np.allclose(found, expected, rtol=1e-9), f"{found} is not {expected}"


my_pooled = None  # def pooled(parts): ...
attempt(check_1, my_pooled)

# %% [markdown]
# **Exercise 2.** Write a kernel `(values, out)` for one block that leaves the largest absolute
# value of all `values` in `out[0]`. There are more values than threads. It is tried with 32, 64 and
# 256 threads and a random schedule, and races are errors.


# %%
def check_2(kernel):
    values = np.random.default_rng(6).standard_normal(1000).astype(np.float32)
    for threads in (32, 64, 256):
        out = np.full(1, np.nan, np.float32)
        try:
            Simulator(schedule_seed=threads).launch(kernel, 1, threads, values, out)
        except Exception as error:
            raise AssertionError(message(error)) from None
        assert out[0] == np.abs(values).max(), f"{out[0]} with {threads} threads"


my_largest = None  # @cuda.jit above a def
attempt(check_2, my_largest)

# %% [markdown]
# **Exercise 3.** This kernel takes the moments of two arrays through one scratch. It has a race.
# Write it with the one line it lacks.


# %%
@cuda.jit
def two_arrays(a, b, out):
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, a.dtype)
    count_a, mean_a, m2_a = reductions.strided_moments(a, 0, a.size)
    count_a, mean_a, m2_a = reductions.block_moments(count_a, mean_a, m2_a, scratch)
    count_b, mean_b, m2_b = reductions.strided_moments(b, 0, b.size)
    count_b, mean_b, m2_b = reductions.block_moments(count_b, mean_b, m2_b, scratch)
    if cuda.threadIdx.x == 0:
        out[0], out[1] = mean_a, mean_b


def check_3(kernel):
    a, b, out = noise[:300], offset[:300], np.full(2, np.nan, np.float32)
    try:
        Simulator(schedule_seed=1).launch(kernel, 1, 128, a, b, out)
    except Exception as error:
        raise AssertionError(message(error)) from None
    assert np.allclose(out, [a.mean(), b.mean()], atol=1e-4), "wrong means"


attempt(check_3, two_arrays)  # put your kernel here

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_1(parts):
    count, mean, m2 = 0, 0.0, 0.0
    for n, mean_n, variance in parts:
        delta, total = mean_n - mean, count + n
        mean += delta * n / total
        m2 += n * variance + delta * delta * count * n / total
        count = total
    return count, mean, m2 / count


check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_2(values, out):
    scratch = cuda.shared.array(1024, float32)
    thread = cuda.threadIdx.x
    largest = float32(0)
    for i in range(thread, values.size, cuda.blockDim.x):
        largest = max(largest, abs(values[i]))
    scratch[thread] = largest
    distance = cuda.blockDim.x // 2
    while distance > 0:
        cuda.syncthreads()
        if thread < distance:
            scratch[thread] = max(scratch[thread], scratch[thread + distance])
        distance //= 2
    if thread == 0:
        out[0] = scratch[0]


check_2(solution_2)
print("solution 2 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_3(a, b, out):
    scratch = cuda.shared.array(reductions.MOMENTS_SHAPE, a.dtype)
    count_a, mean_a, m2_a = reductions.strided_moments(a, 0, a.size)
    count_a, mean_a, m2_a = reductions.block_moments(count_a, mean_a, m2_a, scratch)
    count_b, mean_b, m2_b = reductions.strided_moments(b, 0, b.size)
    cuda.syncthreads()  # slower warps may still read the first result from scratch
    count_b, mean_b, m2_b = reductions.block_moments(count_b, mean_b, m2_b, scratch)
    if cuda.threadIdx.x == 0:
        out[0], out[1] = mean_a, mean_b


check_3(solution_3)
print("solution 3 is right")

# %% [markdown]
# **Next:** [4. Random numbers](04_random_numbers.ipynb): a dropout mask that every kernel draws
# alike.
