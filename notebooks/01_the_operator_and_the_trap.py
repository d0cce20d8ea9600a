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
# # 1. The operator and the trap
#
# **After this notebook you can**
#
# * say what each of the five operators does to shapes and values;
# * show, with a line of algebra, why the benchmark's own call has a constant for an answer;
# * write your first CUDA kernel, run it without a GPU, and see it pass a test that it should fail;
# * build the test that it does not pass.
#
# You need to know PyTorch, and no CUDA. Nothing here needs a GPU: kernels run in this package's
# simulator. Before each measurement there is a cell that asks for your prediction. It has a
# default, usually a wrong one. Overwrite it before you run the next cell.

# %%
import math
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lesson import attempt, compare, message, show, show_diff, stored_rows
from numba import cuda

import numba_fused as nf
from numba_fused import bench, ladder, mistakes
from numba_fused.device import pointwise
from numba_fused.plot.style import BLUE, GREEN, ORANGE, VERMILION
from numba_fused.simulator import Simulator

# %% [markdown]
# ## Five operators in a row
#
# The operator is a convolution and four things that usually follow one: group normalisation, a
# minimum with a constant, a clamp, and dropout. On a small input, in PyTorch:

# %%
generator = torch.Generator().manual_seed(83)


def normal(*shape):
    return torch.randn(shape, generator=generator)


x = normal(2, 3, 8, 16, 16)  # (batch, channels, depth, height, width)
weight, bias = normal(16, 3, 3, 3, 3) / 9, normal(16)
gamma, beta = 1 + 0.5 * normal(16), 0.5 * normal(16)

# %%
cap, min_value, max_value, p = 0.5, -1.0, 1.0, 0.2

z = F.conv3d(x, weight, bias)
h = F.group_norm(z, 8, gamma, beta)
m = torch.minimum(h, torch.tensor(cap))
c = m.clamp(min_value, max_value)
out = F.dropout(c, p, training=True)

for name, tensor in {"x": x, "z": z, "h": h, "m": m, "c": c, "out": out}.items():
    print(f"{name:4} {tuple(tensor.shape)!s:22} from {tensor.min():6.2f} to {tensor.max():5.2f}")

# %% [markdown]
# Only the convolution changes the shape: a kernel of 3 without padding takes 2 off each spatial
# axis. *Group normalisation* takes 16 channels as 8 groups of 2, and gives each group of each
# sample mean 0 and variance 1 before it multiplies by `gamma` and adds `beta`. `min` cuts at
# `cap`, `clamp` at both its bounds. *Dropout* sets a share `p` of the elements to zero and divides
# the others by `1 - p`, which keeps the mean where it was.

# %%
stages = {"h, normalised": h, "m = min(h, cap)": m, "c = clamp(m)": c, "out, after dropout": out}
figure, axes = plt.subplots(1, 4, sharex=True, sharey=True, figsize=(9, 2.6))
for ax, (title, tensor) in zip(axes, stages.items(), strict=True):
    ax.hist(tensor.flatten(), bins=np.linspace(-3, 3, 49), color=BLUE, log=True)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("value")
axes[0].set_ylabel("elements (log scale)")
plt.show()

# %% [markdown]
# The tall bars are the values that `min` and `clamp` cut off, and the zeros of dropout.
#
# The package has the chain as one call. `nf.reference` runs it in PyTorch's operators and is the
# judge of every kernel. Without dropout there is no chance in it, and the two agree to the bit:

# %%
chain = {"num_groups": 8, "cap": cap, "min_value": min_value, "max_value": max_value}
assert torch.equal(nf.reference(x, weight, bias, gamma, beta, **chain), c)

# %% [markdown]
# ## The benchmark's call
#
# The operator is problem 83 of level 2 of *KernelBench*, a benchmark of GPU kernels. Its model ends
# like this, with `min_value = 0` and `max_value = 1`:
#
# ```python
# x = torch.min(x, torch.tensor(min_value))
# x = torch.clamp(x, min=min_value, max=max_value)
# x = self.dropout(x)
# ```
#
# One number is the cap *and* the lower bound. What is left of the 16 x 2 x 6 x 14 x 14 numbers?
#
# **Predict:** how many *different* values does its output hold?

# %%
predicted_values = 10_000

# %%
benchmark = F.group_norm(F.conv3d(x, weight, bias), 8, gamma, beta)
benchmark = torch.min(benchmark, torch.tensor(0.0))
benchmark = torch.clamp(benchmark, min=0.0, max=1.0)
benchmark = F.dropout(benchmark, p, training=True)
compare(predicted_values, benchmark.unique().numel(), "different values")
print(benchmark.unique())

# %% [markdown]
# One value: zero. Write $a$ for the number that is both cap and lower bound. `min` gives
# something that is at most $a$, and the clamp lifts everything below $a$ to $a$:
#
# $$\min(h, a) \le a \quad\Rightarrow\quad \mathrm{clamp}(\min(h, a),\, a,\, b) = a
#   \quad\text{for every finite } h.$$
#
# Neither the convolution nor the normalisation reaches the output. With $a = 0$ even dropout
# has nothing to do: a zero that is dropped and a zero that is kept look the same.

# %%
heights = torch.linspace(-2.5, 2.5, 501)
choices = {
    "benchmark: cap 0, bounds 0 and 1": (0.0, 0.0, 1.0, VERMILION, "--"),
    "this package: cap 0.5, bounds -1 and 1": (0.5, -1.0, 1.0, BLUE, "-"),
}
figure, ax = plt.subplots()
for name, (a, low, high, colour, dashes) in choices.items():
    values = torch.minimum(heights, torch.tensor(a)).clamp(low, high)
    ax.plot(heights, values, color=colour, ls=dashes, lw=2.5, label=name)
ax.set_xlabel("h, the normalised value (no unit)")
ax.set_ylabel("clamp(min(h, cap))\n(no unit)")
ax.set_ylim(-1.2, 1.2)
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# A chain whose output is constant is called **degenerate** here. In this package `cap` is a
# parameter of its own. Leave it out and you get the benchmark's call, with a warning:

# %%
degenerate = {"num_groups": 8, "min_value": 0.0, "max_value": 1.0}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    nf.fused_conv_group_norm_min_clamp_dropout(x, weight, bias, gamma, beta, **degenerate)
print(f"{caught[0].category.__name__}: {caught[0].message}")

# %% [markdown]
# ## A kernel that computes nothing
#
# Now your first kernel. A *kernel* is a function that a GPU runs in very many *threads* at once.
# Threads come in *blocks* of a fixed size, and a launch names how many blocks there are and how
# large: `kernel[blocks, threads_per_block](arguments)`. `cuda.grid(1)` is the number of the thread
# that asks, counted through all blocks. Here each thread writes one element.


# %%
@cuda.jit
def zeros_kernel(out):
    index = cuda.grid(1)
    if index < out.size:  # blocks are whole, so the last one may reach beyond the end
        out[index] = 0.0


# %% [markdown]
# `Simulator.launch` runs the same kernel on a CPU, from its Python source. The output starts as
# NaN, so that an element that nobody writes cannot pass for a right one.


# %%
def write_zeros(shape, threads_per_block=128):
    out = np.full(math.prod(shape), np.nan, dtype=np.float32)
    blocks = math.ceil(out.size / threads_per_block)
    Simulator().launch(zeros_kernel, blocks, threads_per_block, out)
    return torch.from_numpy(out).view(shape)


small_x = x[:1, :, :5, :9, :12]
small_shape = nf.reference(small_x, weight, bias, gamma, beta, **degenerate).shape
print(f"{tuple(small_shape)}: all zero? {bool((write_zeros(small_shape) == 0).all())}")

# %% [markdown]
# The benchmark accepts a kernel that agrees with PyTorch to within 1e-2, on a handful of random
# inputs.
#
# **Predict:** on how many of 5 random inputs does `zeros_kernel` pass?

# %%
predicted_passes = 0


# %%
def share_right(found, expected):
    return torch.isclose(found, expected, rtol=1e-2, atol=1e-2).float().mean().item()


zeros = write_zeros(small_shape)
shares = []
for _ in range(5):
    operands = normal(*small_x.shape), weight, bias, gamma, beta
    expected = nf.reference(*operands, **degenerate, dropout_p=p, training=True, seed=1)
    shares.append(share_right(zeros, expected))
compare(predicted_passes, sum(share == 1 for share in shares), "of 5 inputs passed")

# %% [markdown]
# It passes everywhere, and more random inputs would change nothing: the answer does not depend on
# the input. The *test* is at fault. With bounds that let the chain compute something:
#
# **Predict:** what share of the elements does `zeros_kernel` get right then, in per cent?

# %%
predicted_share = 50

# %%
operands = small_x, weight, bias, gamma, beta
expected = nf.reference(*operands, **chain, dropout_p=p, training=True, seed=1)
compare(predicted_share, 100 * share_right(zeros, expected), "% right")
print(f"{100 * (~nf.keep_mask(1, small_shape, p)).mean():.1f} % of the elements are dropped")

# %% [markdown]
# What remains right are the elements that dropout sets to zero, and the few values that happen
# to be near it.
#
# ## How fast can an honest kernel be?
#
# The full benchmark input is (128, 3, 16, 64, 64). Whoever computes the chain has to read the input
# once and write the output once. These are the *compulsory* bytes. A kernel that writes zeros saves
# the reading. `plots/data` holds what was measured on one NVIDIA H200, among it the rate at which
# that GPU copies memory.
#
# **Predict:** how many times faster than eager PyTorch is the best kernel that memory allows,
# honest, on this input?

# %%
predicted_speedup = 100

# %%
rows = stored_rows("kb83")
eager = rows["torch"]
spec = bench.case_spec("kb83")
rate = eager["copy_gb_per_s"] * 1e9  # bytes a second, read plus written
honest_ms = 1e3 * spec.compulsory_bytes / rate
zeros_ms = 1e3 * spec.output_bytes / rate

print(f"{eager['gpu']}, copy rate {rate / 1e12:.2f} TB/s")
print(f"eager PyTorch        {eager['p50_ms']:6.3f} ms   (measured, {eager['precision']})")
print(f"compulsory bytes     {honest_ms:6.3f} ms   {spec.compulsory_bytes / 1e6:.0f} MB")
print(f"writing zeros alone  {zeros_ms:6.3f} ms   {spec.output_bytes / 1e6:.0f} MB")
compare(predicted_speedup, eager["p50_ms"] / honest_ms, "times eager")

# %%
times = {
    "eager PyTorch (measured)": (eager["p50_ms"], ORANGE),
    "torch.compile (measured)": (rows["torch.compile"]["p50_ms"], GREEN),
    "compulsory bytes (bound)": (honest_ms, BLUE),
    "only zeros (bound)": (zeros_ms, VERMILION),
}
figure, ax = plt.subplots(figsize=(7.2, 2.4))
for name, (milliseconds, colour) in times.items():
    ax.barh(name, milliseconds, color=colour)
    ax.text(milliseconds, name, f" {milliseconds:.2g}", va="center")
ax.invert_yaxis()
ax.set_xlabel("time of one call (ms)")
plt.show()

# %% [markdown]
# This bound is a lie detector. Speed-ups of 60 to 180 times have been published for this problem.
# Beyond the ratio above a kernel does not even move the bytes that the computation must move, so
# it computes something else. **Anything faster than the memory floor is an error, in the kernel or
# in the measurement.**
#
# The constant has a rung of the ladder for itself, `algebra`. It has to be asked for by name, and
# it refuses a chain that depends on its input:

# %%
algebra = ladder.get("algebra")
benchmark_spec = nf.BlockSpec.from_arguments(x.shape, weight.shape, **degenerate)
print("benchmark's bounds:", algebra.limit(benchmark_spec) or "it can run")
print("default bounds:    ", algebra.limit(spec) or "it can run")

# %% [markdown]
# ## Not even the constant is right
#
# "For every *finite* $h$", said the algebra. A NaN, "not a number", is what 0/0 gives. PyTorch
# carries it through `min` and `clamp` to the output, so that a diverged training run is seen. Put
# a single NaN into one of the two samples of `x`. A kernel of size 3 looks at it from at most
# 3 x 3 x 3 places in each of the 16 channels.
#
# **Predict:** how many elements of the benchmark's output, of 37,632, are NaN?

# %%
predicted_nans = 27 * 16

# %%
poisoned = x.clone()
poisoned[0, 0, 4, 8, 8] = torch.nan
out = nf.reference(poisoned, weight, bias, gamma, beta, **degenerate)
compare(predicted_nans, out.isnan().sum().item(), "NaN")
print("by sample:", out.isnan().flatten(1).sum(1).tolist())

# %% [markdown]
# A group's mean takes in all its values, so one NaN poisons its whole group. The convolution
# carries it to all channels, hence to all groups of its sample, and of that sample only. The kernel
# of zeros says nothing about any of it.
#
# A right minimum has to be written with care, because every comparison with NaN is false:

# %%
show(pointwise.minimum, pointwise.clamp)

# %% [markdown]
# `h > cap` is false for a NaN, so `h` is returned, which is the NaN. The other way round,
# `h if h < cap else cap`, is the same for all numbers and swallows NaN. That is one of the wrong
# kernels in this package's gallery of mistakes, each a line away from a right one:

# %%
show_diff(mistakes.get("nan-swallowed"))

# %% [markdown]
# ## A test that can fail
#
# The gallery asks what a test is worth. For each wrong kernel it keeps a plausible test that the
# kernel passes, and gives the kernel to the package's verifier as well, which tries random shapes,
# bounds, NaNs and block sizes. These are the mistakes about the operator itself:

# %%
for mistake in mistakes.catalogue.OPERATOR:
    passed = mistake.passes_naive_test()
    verdict = mistakes.examine(mistake)
    print(f"{mistake.name:18} {'passes' if passed else 'fails':6} {mistake.passes.story}")
    print(f"{'':18} verifier: {verdict.caught_by} (case {verdict.tried})")

# %% [markdown]
# What the verifier's tests have and the naive ones lack:
#
# * bounds with `min_value < cap`, so that the output depends on the input;
# * an output that is full of NaN beforehand, so that nothing unwritten passes;
# * a reference in fp64, and a tolerance that follows from rounding instead of a round 1e-2;
# * NaN and infinity among the inputs.
#
# ## Exercises
#
# Each has a cell for your answer and a check. Solutions are at the end, in collapsed cells.
#
# **Exercise 1.** Write `constant_of(cap, min_value, max_value)`: the constant that
# `clamp(min(h, cap), min_value, max_value)` is for every finite h, or `None` if it depends on h.
# Mind bounds that cross: PyTorch's clamp returns `max_value` if `min_value > max_value`.


# %%
def check_1(constant_of):
    points = torch.linspace(-9, 9, 181)
    for a in (-2.0, 0.0, 0.5, 3.0):
        for low in (-1.0, 0.0, 0.5, 2.0):
            for high in (-1.0, 0.0, 1.0):
                values = torch.minimum(points, torch.tensor(a)).clamp(low, high).unique()
                expected = values.item() if values.numel() == 1 else None
                found = constant_of(a, low, high)
                assert found == expected, f"cap {a}, bounds {low} and {high}: not {found}"


my_constant_of = None  # def my_constant_of(cap, min_value, max_value): ...
attempt(check_1, my_constant_of)

# %% [markdown]
# **Exercise 2.** Choose `(cap, min_value, max_value)` with `min_value < cap` for which the kernel
# of zeros still gets more than 99 % of the elements of `h` right to within 1e-2, in evaluation
# mode, where nothing is dropped. So `min_value < cap` alone does not make a good test.


# %%
def check_2(bounds):
    a, low, high = bounds
    assert low < min(a, high), "the chain must not be degenerate"
    expected = torch.minimum(h, torch.tensor(a)).clamp(low, high)
    share = share_right(torch.zeros_like(h), expected)
    assert share > 0.99, f"zeros are right in {100 * share:.1f} % of the elements"


my_bounds = None  # (cap, min_value, max_value)
attempt(check_2, my_bounds)

# %% [markdown]
# **Exercise 3.** Your second kernel: `(h, out, cap, low, high)`, flat arrays and three numbers. It
# writes `clamp(min(h, cap), low, high)` and lets NaN through. Watch the end of the array: it is
# launched in blocks of 64 threads on 1,000 elements.


# %%
def check_3(kernel):
    values = h.flatten()[:1000].clone()
    values[::97] = torch.nan
    out = torch.full_like(values, 7.0)
    try:
        Simulator().launch(
            kernel, 16, 64, values, out, np.float32(0.5), np.float32(-1), np.float32(1)
        )
    except Exception as error:
        raise AssertionError(message(error)) from None
    expected = torch.minimum(values, torch.tensor(0.5)).clamp(-1, 1)
    assert torch.equal(out.isnan(), expected.isnan()), "a NaN is lost or invented"
    assert torch.equal(out.nan_to_num(), expected.nan_to_num()), "some values are wrong"


my_kernel = None  # @cuda.jit above a def
attempt(check_3, my_kernel)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_1(cap, min_value, max_value):
    if min_value >= max_value:
        return max_value
    return min_value if cap <= min_value else None


check_1(solution_1)
print("solution 1 is right")

# %% jupyter={"source_hidden": true} tags=["solution"]
solution_2 = (0.005, -0.005, 1.0)  # everything is cut to within a tolerance of zero
check_2(solution_2)
print("solution 2 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_3(h, out, cap, low, high):
    index = cuda.grid(1)
    if index < h.size:
        value = h[index]
        value = cap if value > cap else value  # false for NaN: NaN stays
        value = low if value < low else value
        out[index] = high if value > high else value


check_3(solution_3)
print("solution 3 is right")

# %% [markdown]
# **Next:** [2. The ladder](02_the_ladder.ipynb), in which the chain gets eleven kernels and loses
# most of its bytes.
