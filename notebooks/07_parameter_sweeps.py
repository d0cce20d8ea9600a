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
# # 7. Parameter sweeps: from YAML to figure
#
# **After this notebook you can**
#
# * declare a sweep, and say before it runs what it will measure, for how long, in how much memory;
# * stop it, let it fail, go on, and lose no row;
# * read a row: what was measured, where, with what, and how sure it is;
# * turn rows into curves and heatmaps, read their slopes, and see through the usual traps.
#
# One time of one shape says little. A *sweep* measures along *axes*: batch, channels, kernel size,
# threads per block. `numba-fused sweep` times on a GPU. Here there need not be one: figures of
# times are drawn from the rows in `plots/data`, and the sweep that you will run judges kernels in
# the simulator, by their error, and does not time them.

# %%
import itertools
import math
import statistics
import tempfile
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from lesson import DATA, attempt, compare
from matplotlib.colors import LogNorm

from numba_fused import bench, ladder, plot, results, rng, sweep
from numba_fused import compare as comparing
from numba_fused.explain import MEASURED
from numba_fused.plot.rows import all_block_sizes, by_case, of_cases, timed, varies_only
from numba_fused.plot.style import BLUE, GREEN, ORANGE, SKY, VERMILION
from numba_fused.simulator import Simulator
from numba_fused.sweep import Sweep
from numba_fused.verify import Tensors, yardstick

scratch = tempfile.TemporaryDirectory()
FOLDER = Path(scratch.name)  # for the files of this notebook

# %% [markdown]
# ## Declaring
#
# A sweep is a YAML file. `base` names a case, here the benchmark; what no axis changes is as it is
# there. An axis is a list, or a range in which each value is `factor` times the one before. `where`
# leaves out combinations, in pandas' query language.

# %%
DECLARATION = """
name: lesson
about: Batch and output channels, as far as memory allows.
base: kb83
axes:
  batch: {from: 1, to: 64, factor: 2}
  out_channels: [16, 32, 64]
where: [batch * out_channels <= 1024]
variants: [torch, torch.compile, auto]
"""
file = FOLDER / "lesson.yaml"
file.write_text(DECLARATION)
declared = Sweep.read(file)

# %% [markdown]
# Every combination is measured. There are three `variants` of each: eager PyTorch, `torch.compile`,
# and `auto`, the rung that the package would choose.
#
# **Predict:** how many rows will it measure? Mind the condition.

# %%
predicted_rows = 7 * 3 * 3

# %%
compare(predicted_rows, len(declared.levels), "rows")

# %% [markdown]
# In Python the same sweep is a frozen dataclass with the same names:

# %%
in_python = Sweep(
    name="lesson",
    axes={"batch": {"from": 1, "to": 64, "factor": 2}, "out_channels": [16, 32, 64]},
    where=["batch * out_channels <= 1024"],
    variants=["torch", "torch.compile", "auto"],
)
assert in_python.levels == declared.levels

# %% [markdown]
# What is measured is a *key*: case, variant, precision, threads per block, and whether the backward
# pass is included. A case's name spells out how it differs from its base:

# %%
pd.DataFrame(list(declared.levels)[::13])

# %% [markdown]
# Not every axis means something to every variant. `one_kernel` can be launched with any number of
# threads per block; PyTorch's and cuDNN's kernels choose their own.
#
# **Predict:** how many rows has this sweep of 2 block sizes and 3 variants?

# %%
predicted_rows = 6

# %%
blocks = Sweep(
    name="blocks",
    axes={"threads_per_block": [128, 256]},
    variants=["torch", "one_kernel", "library_conv"],
)
compare(predicted_rows, len(blocks.levels), "rows")

# %% [markdown]
# ## Wrong declarations
#
# A sweep may take an hour, and a mistake should not wait until then. A `Sweep` is checked when it
# is made: every name, every condition, and every case it would measure.
#
# **Predict:** how many of these seven are refused?

# %%
predicted_refused = 3

# %%
wrong = {
    "a misspelt axis": {"axes": {"batches": [1, 2]}},
    "no sample": {"axes": {"batch": [0, 1]}},
    "8 groups of 12 channels": {"axes": {"out_channels": [8, 12, 16]}},
    "a degenerate chain": {"axes": {"cap": [-1.0, 0.5]}},
    "a variant that does not exist": {"variants": ["fastest"]},
    "a condition that means nothing": {"axes": {"batch": [1]}, "where": ["batch <"]},
    "a kernel larger than the input": {"axes": {"kernel_size": [3, 17]}},
}
refused = 0
for name, arguments in wrong.items():
    try:
        Sweep(name="wrong", **arguments)
    except (ValueError, TypeError) as problem:
        refused += 1
        said = str(problem).removeprefix("sweep wrong: ")
        print(f"{name}:\n    {said[:110]}{'...' if len(said) > 110 else ''}")
compare(predicted_refused, refused, "refused")

# %% [markdown]
# Notebook 1 is about the fourth. A time of a constant would be a fine number, and worthless.
#
# ## What first?
#
# The package ships sweeps; `numba-fused sweep` lists them. `batch` goes from 1 to 1,024 samples, 11
# values. GPU time is rented by the hour, jobs are killed. In ascending order an aborted sweep would
# have seen one end of its axis.
#
# **Predict:** `batch` is stopped after 4 of 11 batches. What is the largest that it has seen?

# %%
predicted_batch = 8

# %%
keys = sweep.plan([Sweep.read("batch")])
order = list(dict.fromkeys(bench.case(key.case).batch for key in keys))
compare(predicted_batch, max(order[:4]), "samples")

# %%
figure, ax = plt.subplots(figsize=(7.2, 2.8))
ax.plot(range(1, len(order) + 1), order, "o", color=BLUE)
for number, batch in enumerate(order, 1):
    ax.annotate(f"{batch}", (number, batch), (0, 6), textcoords="offset points", ha="center")
ax.set_yscale("log", base=2)
ax.set_ylim(0.6, 3000)
ax.set_yticks([1, 4, 16, 64, 256, 1024], [1, 4, 16, 64, 256, 1024])
ax.set_xticks(range(1, len(order) + 1))
ax.set_xlabel("measured as (number)")
ax.set_ylabel("batch\n(samples; log scale)")
plt.show()

# %% [markdown]
# First the base case, then both ends, then middles and middles of halves: *coarse to fine*.
# Wherever it stops, it has seen the whole axis. Several sweeps in one command take turns in the
# same way.
#
# ## Before anything runs
#
# `--dry-run` says what would be measured and what it needs:

# %%
units = {unit.case: unit for unit in sweep.preview(keys)}
table = pd.DataFrame([vars(unit) for unit in units.values()])
print(
    f"{table['rows'].sum()} rows, {table['seconds'].sum() / 60:.0f} minutes on one H200, estimated"
)
table.drop(columns="precision").set_index("case").round({"gigabytes": 1, "seconds": 0}).head(4)

# %% [markdown]
# **Predict:** how many GB of GPU memory does measuring `kb83-b1024` take? The default is its input
# and output.

# %%
predicted_gigabytes = bench.case_spec("kb83-b1024").compulsory_bytes / 1e9
print(f"input and output: {predicted_gigabytes:.1f} GB")

# %%
compare(predicted_gigabytes, units["kb83-b1024"].gigabytes, "GB")

# %% [markdown]
# Measuring is more than running. There are at least three sets of inputs and outputs, so that no
# call finds its input in the cache, and right answers in fp64 to judge the output by, before the
# timing and after it. For a smaller GPU one writes a sweep with a `where` of its own.
#
# ## What a row is
#
# Here is a stored one, all columns that it fills, with what they mean:

# %%
frame = plot.read_rows(DATA)
row = by_case(frame, "tf32")["kb83"][0]
pd.set_option("display.max_colwidth", None)
pd.DataFrame(
    [
        (name, f"{row[name]:.6g}" if isinstance(row[name], float) else row[name], meaning)
        for name, meaning in results.COLUMNS.items()
        if row[name] is not None
    ],
    columns=["column", "value", "meaning"],
).set_index("column")

# %% [markdown]
# What was computed, how fast, how wrong, and *where and with what*: GPU, driver, versions, commit,
# time. Who doubts the row can repeat it. Units are part of the names or meanings, and what
# follows from other columns (rates, ratios) is not stored, so it cannot disagree with them.
#
# A time is a median, with the 20th and 80th percentiles beside it.
#
# **Predict:** how far apart are those two, in per cent of the median?

# %%
predicted_spread = 10.0

# %%
spread = 100 * (row["p80_ms"] - row["p20_ms"]) / row["p50_ms"]
compare(predicted_spread, spread, "%")

# %% [markdown]
# That is the spread *within one run*, on one machine, in some seconds. It does not say what another
# GPU of the same name would give, or this one tomorrow.
#
# ## A sweep that runs here
#
# `sweep.run` takes the keys, a file, and a function that measures. By default that is `bench`,
# which needs a GPU. Ours runs the kernel in the simulator and judges its output against fp64. The
# columns for times stay empty: the time of a simulation says nothing about a GPU.


# %%
MOST_OPERATIONS = 40_000  # of a convolution; so that this notebook does not take an hour
PROVENANCE = results.provenance() | {"gpu": ""}  # it is the simulator's row, whatever is here


def judge(case, variant, precision, threads_per_block, backward, *, most=MOST_OPERATIONS):
    """The row of one key: error by the simulator, no times."""
    spec, rung = bench.case_spec(case, precision), ladder.get(variant)
    row = bench.case_row(case, spec) | PROVENANCE | {"variant": variant, "utc": results.now()}
    if rung.takes_threads_per_block:
        row["threads_per_block"] = threads_per_block
    if reason := rung.limit(spec):
        return row | {"status": "skipped", "reason": reason}
    if spec.flops > most:
        raise RuntimeError(
            f"{spec.flops:,} operations take too long here: the limit is {most:,}; choose smaller "
            f"sizes or raise it"
        )
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(spec.x_shape, generator=generator)
    weight = torch.randn(spec.weight_shape, generator=generator)
    weight /= math.sqrt(math.prod(spec.weight_shape[1:]))
    keep = torch.from_numpy(rng.keep_mask(1, spec.output_shape, spec.dropout_p))
    simulator = Simulator()
    out = ladder.run(
        variant,
        x,
        weight,
        spec=spec,
        seed=1,
        threads_per_block=threads_per_block or ladder.DEFAULT_THREADS_PER_BLOCK,
        simulator=simulator,
    )
    verdict = yardstick(spec, Tensors(x, weight, None, None, None), keep).judge(out, keep)
    measured = {"error": verdict.error, "torch_error": verdict.torch_error}
    limits = {"error_bound": verdict.bound, "launches": len(simulator.launches)}
    return row | measured | limits | {"status": verdict.status, "reason": verdict.reason or None}


# %% [markdown]
# The question: does the error grow with the number of products in a sum? A value of the output adds
# up `in_channels * kernel_size ** 2` of them, from 4 to 144. Two rungs, one in fp32 and one that
# rounds its operands to TF32, on an image of 6 x 10:

# %%
small = Sweep(
    name="error",
    base="kb83",
    fixed={
        "batch": 1,
        "input_size": [6, 10],
        "out_channels": 4,
        "num_groups": 2,
        "padding": "same",
    },
    axes={"in_channels": [1, 2, 4, 8, 16], "kernel_size": [2, 3]},
    variants=["one_kernel", "tensor_core"],
    precisions=["ieee", "tf32"],
    where=["variant == 'tensor_core' or precision == 'ieee'"],  # one_kernel has no TF32 to judge
)
keys = sweep.plan([small])
print(f"{len(keys)} rows")

# %% [markdown]
# Each row is in the file before the next measurement begins. So let us stop after 12 rows, as if
# the job had been killed:

# %%
rows_file = FOLDER / "rows.csv"
first = list(itertools.islice(sweep.run(keys, rows_file, measure=judge), 12))

# %% [markdown]
# **Predict:** how many rows are missing from the file now?

# %%
predicted_missing = len(keys)

# %%
missing = sweep.missing(keys, rows_file)
compare(predicted_missing, len(missing), "rows")

# %% [markdown]
# Going on is the same call with what is missing. On the command line it is the same command:

# %%
rest = list(sweep.run(missing, rows_file, measure=judge))
found = sweep.load(rows_file, sweep=small)
found["status"].value_counts()

# %% [markdown]
# The file says what happened to each. *Skipped* means that a variant cannot run the case, *failed*
# that it should have and did not. Each has its reason:

# %%
for (status, variant, reason), group in found.groupby(["status", "variant", "reason"]):
    print(f"{len(group):2} {status}, {variant}: {reason}")

# %% [markdown]
# A hole in a table is not that honest: was it forgotten, impossible or wrong? Here the failures are
# our own limit. Raise it, and ask for what failed, as `--retry-failed` does.
#
# **Predict:** how many rows will the *file* have after that? Now it has one for each key.

# %%
predicted_rows = len(keys)

# %%
failed = sweep.missing(keys, rows_file, retry_failed=True)
again = list(sweep.run(failed, rows_file, measure=partial(judge, most=2 * MOST_OPERATIONS)))
compare(predicted_rows, len(results.read(rows_file)), "rows")
found = sweep.load(rows_file, sweep=small)
print(f"{len(found)} newest: {found['status'].value_counts().to_dict()}")

# %% [markdown]
# Nothing is erased. A failed row stays in the file, and of rows with the same key the newest
# counts.
#
# ## From rows to a figure
#
# `sweep.load` gives a tidy frame: one line a row, one column for each parameter. So the figure is
# ordinary pandas. Lines for the two rungs, each against the products in a sum:
#
# **Predict** the slope of TF32's error on log-log axes. 1 means proportional to the number of
# products, 0.5 to its square root, 0 not growing.

# %%
predicted_slope = 0.5

# %%
found["products"] = found["in_channels"] * found["kernel_size"] ** 2
right = found[found["status"] == "ok"]
lines = {}
for variant, precision in (("one_kernel", "ieee"), ("tensor_core", "tf32")):
    chosen = right[(right["variant"] == variant) & (right["precision"] == precision)]
    lines[variant] = chosen.groupby("products")["error"].mean()


def fitted_slope(line):
    """Of the straight line through the logarithms, by least squares."""
    return statistics.linear_regression(np.log(line.index), np.log(line.values)).slope


compare(predicted_slope, fitted_slope(lines["tensor_core"]))

# %%
figure, ax = plt.subplots(figsize=(7.2, 3.4))
marks = {"one_kernel": (BLUE, "o", "one_kernel, fp32"), "tensor_core": (ORANGE, "s", "TF32")}
for variant, (colour, marker, name) in marks.items():
    line = lines[variant]
    label = f"{name}, slope {fitted_slope(line):.2f}"
    ax.loglog(line.index, line.values, color=colour, marker=marker, label=label)
ax.set_ylim(1e-8, 1e-2)
ax.set_xlabel("products in a sum (count; log scale)")
ax.set_ylabel("error against fp64\n(relative; log scale)")
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# Notebook 5 told why: TF32 rounds operands, not sums. Sums in fp32 round more the longer they are.
#
# ## Slopes of times
#
# Now times, from the stored rows. If time is $c \cdot n^s$, then $\log t = \log c + s \log n$: a
# straight line on log-log axes, whose slope is the power $s$. For the batch, 1 is *in proportion*:
# twice the samples, twice the time.
#
# **Predict:** the slope of `auto`, the package's choice, from a batch of 16 to one of 128.

# %%
predicted_slope = 0.5


# %%
def stored_times(variant, axis):
    """Milliseconds by the value of an axis: kb83, and what differs from it in that axis alone."""
    rows = of_cases(frame, "ieee", varies_only("kb83", axis))
    return {
        getattr(bench.case(row["case"]), axis): row["p50_ms"]
        for row in timed(rows)
        if row["variant"] == variant
    }


def slope_between(times, low, high):
    """Of the straight line through two points on log-log axes."""
    for value in (low, high):
        print(f"{value:4}: {times[value]:.4g} ms")
    return math.log(times[high] / times[low]) / math.log(high / low)


compare(predicted_slope, slope_between(stored_times("auto", "batch"), 16, 128))

# %% [markdown]
# Large batches keep the whole GPU busy, and time is nearly proportional. And small ones, which
# leave most of the GPU idle (notebook 2)?
#
# **Predict** the slope from a batch of 1 to one of 4.

# %%
predicted_slope = 1.0

# %%
compare(predicted_slope, slope_between(stored_times("auto", "batch"), 1, 4))

# %% [markdown]
# Four times the work in one and a half times the time. That sounds good. It is the opposite: the
# small batch is slow, not the large one fast. *A slope says how time grows, not how long it takes.*
#
# The package's figure has slopes beside the names, each of the upper half of its points, and the
# memory floor below all:

# %%
plot.draw(plot.choose(["scaling"])[0], frame).figure

# %% [markdown]
# **Predict:** the slope of `auto` over `plane`, the height and width of the input, from 32
# to 64.

# %%
predicted_slope = 1.0

# %%
compare(predicted_slope, slope_between(stored_times("auto", "plane"), 32, 64))

# %% [markdown]
# Twice the height and width is four times the values. What "in proportion" means depends on
# what the axis counts.
#
# ## Two axes at once
#
# With two axes a figure of lines is a tangle, and a heatmap has one cell for each pair. The sweep
# `threads` has six rungs, each with blocks of several sizes.
#
# **Predict:** `one_kernel` with 32 threads per block takes how many times as long as with 1,024?

# %%
predicted_times = 1024 / 32

# %%
by_threads = {
    int(row["threads_per_block"]): row["p50_ms"]
    for row in timed(all_block_sizes(frame, "kb83", "ieee"))
    if row["variant"] == "one_kernel"
}
compare(predicted_times, by_threads[32] / by_threads[1024], "times as long")
plot.draw(plot.choose(["threads"])[0], frame).figure

# %% [markdown]
# `one_kernel` has 1,024 blocks, whatever their size, so small ones leave it few threads. The
# multiprocessors can hold eight times as many, which is why it is not 32 times as slow. For `tiled`
# and `recompute` 1,024 is too many: a block of that size leaves a thread 64 registers at most, and
# they compute in registers. Where a line is all of one colour the choice does not matter. (Compare
# along a line. Each has its own unit, and nothing here says which rung is faster.)
#
# Now two axes of the problem. Before any times: what should one expect of input channels and kernel
# sizes? More of either means more operations for each byte. A GPU has its *balance*: the operations
# it can do in the time in which it moves a byte. A case that needs more of them is bound by
# arithmetic, at best.

# %%
bandwidth, operations_a_second = MEASURED["NVIDIA H200"]
balance = operations_a_second / bandwidth
print(f"H200, without tensor cores: {balance:.1f} operations a byte")
two_axes = Sweep(
    name="intensity",
    fixed={"batch": 16, "plane": 32, "padding": "same"},
    axes={"in_channels": [1, 2, 4, 8, 16, 32, 64], "kernel_size": [1, 2, 3, 4, 5]},
    variants=["auto"],
)

# %% [markdown]
# **Predict:** how many of these 35 cases are?

# %%
predicted_bound = 5

# %%
intensity = {}
for key in two_axes.levels:
    case, spec = bench.case(key.case), bench.case_spec(key.case)
    intensity[case.in_channels, case.kernel_size] = spec.flops / spec.compulsory_bytes
compare(predicted_bound, sum(value > balance for value in intensity.values()), "cases")

# %%
grid = pd.Series(intensity).unstack(0)  # lines: kernel sizes, columns: channels
figure, ax = plt.subplots(figsize=(7.2, 3.6))
norm = LogNorm(grid.min().min(), grid.max().max())
mesh = ax.pcolormesh(grid, cmap="cividis_r", norm=norm, edgecolors="white", lw=1)
for (line, column), value in np.ndenumerate(grid.to_numpy()):
    text = f"{value:.3g}{'*' if value > balance else ''}"
    colour = "white" if norm(value) > 0.4 else "black"
    ax.text(column + 0.5, line + 0.5, text, ha="center", va="center", color=colour)
ax.set_xticks(np.arange(grid.shape[1]) + 0.5, grid.columns)
ax.set_yticks(np.arange(grid.shape[0]) + 0.5, grid.index)
ax.tick_params(length=0)
ax.spines[:].set_visible(False)
ax.set_xlabel("in_channels (count)")
ax.set_ylabel("kernel_size (along each axis)")
figure.colorbar(mesh, label="operations a byte\n(log scale; * above balance)")
plt.show()

# %% [markdown]
# Every cell carries its number; colours alone would make you guess. This is what arithmetic says.
# What a GPU says has been measured along one of the axes, with a batch of 32: 3 input channels,
# kernels from 1 to 7.
#
# **Predict:** how many times as long as for a kernel of 2, with its 8 times as many products, does
# `auto` take for a kernel of 1?

# %%
predicted_times = 1 / 8

# %%
kernels = {
    bench.case(row["case"]).kernel_size: row
    for row in of_cases(frame, "ieee", varies_only("kb83-b32,padding=same", "kernel_size"))
    if row["variant"] == "auto"
}
compare(predicted_times, kernels[1]["p50_ms"] / kernels[2]["p50_ms"], "times as long")
for size, row in sorted(kernels.items()):
    print(f"kernel {size}: {row['runs']:12} {row['p50_ms']:.3f} ms")
plot.draw(plot.choose(["scaling-kernel"])[0], frame).figure

# %% [markdown]
# The work grows with the cube of the kernel's size. All lines come near that slope at the end; for
# small kernels most of the time is that of everything else, which does not grow.
#
# `auto` is a choice and not a kernel, and a row says in `runs` what was chosen: along this axis
# always the same. Channels have a sweep, too, `numba-fused sweep channels`, whose figure is a
# heatmap:

# %%
plot.draw(plot.choose(["channels"])[0], frame).figure

# %% [markdown]
# In the last column `auto` ran `library_conv`. That is PyTorch's own convolution, so nothing is
# gained. Was it the best choice? Only rows of another rung can say. **Predict:** how many times as
# fast is `pipelined` with 128 channels in and 16 out?

# %%
predicted_times = 1.0

# %%
rungs = ["pipelined", "library_conv"]
wide = frame[frame["case"].str.contains("in_channels=128") & frame["variant"].isin(rungs)]
wide = wide.assign(out_channels=[bench.case(name).out_channels for name in wide["case"]])
times = wide.pivot(index="out_channels", columns=["precision", "variant"], values="p50_ms")
compare(
    predicted_times, times["ieee"]["library_conv"][16] / times["ieee"]["pipelined"][16], "times"
)
times.round(2)

# %% [markdown]
# It was not. A limit in `numba_fused/plan.py` was set by wider outputs; `auto` takes `pipelined`
# there since, and its rows in the figure are of before. A sweep's outliers are worth a look.
#
# ## Two files
#
# You changed a kernel, or got another GPU. Is it faster? `numba-fused compare A B` pairs the rows
# of two files by key. For each pair it forms the ratio of the medians, and its range from the
# percentiles: A's 20th over B's 80th, and the other way round. If 1 is outside this range, they
# *differ*.
#
# To know the truth, let us make up the second file: the stored rows, each time multiplied by a
# random number within half a per cent or so of 1; and `library_conv` 5 % faster, as if someone had
# improved it.

# %%
before = results.read(DATA / "ladder.csv")
after = before.copy()
factor = np.exp(np.random.default_rng(7).normal(0, 0.005, len(after)))
factor[after["variant"] == "library_conv"] /= 1.05
after[["p20_ms", "p50_ms", "p80_ms"]] = after[["p20_ms", "p50_ms", "p80_ms"]].mul(factor, axis=0)
improved = (after["variant"] == "library_conv").sum()
print(f"{improved} rows are of library_conv")

# %% [markdown]
# **Predict:** how many pairs differ?

# %%
predicted_differing = improved

# %%
pairs = [pair for pair in comparing.compare(before, after) if pair.ratio]
compare(predicted_differing, sum(pair.differs for pair in pairs), f"of {len(pairs)} pairs")

# %%
figure, ax = plt.subplots(figsize=(7.2, 3))
for number, pair in enumerate(pairs):
    true = pair.key.variant == "library_conv"
    colour = BLUE if true else VERMILION if pair.differs else "#999999"
    ax.plot([number, number], [pair.low, pair.high], color=colour, lw=2)
    ax.plot(number, pair.ratio, "s" if true else "o", color=colour, ms=6 if true else 4)
ax.axhline(1, color="black", lw=1, ls=":")
for colour, marker, name in (
    (BLUE, "s", "library_conv: 5 % faster"),
    (VERMILION, "o", "unchanged, and differs"),
    ("#999999", "o", "unchanged"),
):
    ax.plot([], [], marker, color=colour, label=name)
ax.set_xlabel("pair (number)")
ax.set_ylabel("A / B (ratio of times)")
ax.set_ylim(0.97, 1.13)
ax.legend(ncols=3, loc="upper center", fontsize=9)
plt.show()

# %% [markdown]
# What is unchanged and differs is a false alarm. The range knows the spread within a run, and our
# noise is *between* runs. "Differs" is a reason to look, not a proof. Measure A twice and compare A
# with A: what differs then is your noise.
#
# (The vertical axis of this figure does not begin at 0. Is that a trap?)
#
# ## Traps
#
# **A truncated axis.** Here are four rungs and their stored times, twice. On the right the axis
# begins just below the shortest bar.

# %%
rungs = ["unfused", "pointwise", "epilogue", "one_kernel"]
times = {row["variant"]: row["p50_ms"] for row in by_case(frame, "ieee")["kb83"]}
heights = [times[name] for name in rungs]
start = 0.99 * min(heights)
figure, axes = plt.subplots(1, 2, figsize=(9, 3))
for ax, bottom in zip(axes, (0, start), strict=True):
    ax.bar(rungs, heights, color=[SKY, BLUE, GREEN, ORANGE])
    ax.set_ylim(bottom, max(heights) * (1.1 if bottom == 0 else 1.005))
    ax.set_ylabel("time of one call (ms)")
    ax.tick_params(axis="x", labelsize=10)
plt.show()

# %% [markdown]
# **Predict:** by what factor is the longest bar longer than the shortest, in the picture on the
# right?

# %%
predicted_factor = max(heights) / min(heights)
print(f"the times differ by a factor of {predicted_factor:.2f}")

# %%
compare(predicted_factor, (max(heights) - start) / (min(heights) - start), "times longer")

# %% [markdown]
# The length of a bar *is* the number, so bars begin at 0. Points show a position, and may have an
# axis around it, as those of the comparison above: there 1 is what one looks for.
#
# **Means of ratios.** A kernel is 4 times faster than PyTorch on one case and 4 times slower on
# another.
#
# **Predict** the honest mean of the speed-ups 4 and 0.25.

# %%
predicted_mean = statistics.mean([4, 0.25])

# %%
compare(predicted_mean, statistics.geometric_mean([4, 0.25]), "times faster")

# %% [markdown]
# Divide the other way round, and the arithmetic mean calls PyTorch the faster one by the same
# factor. The geometric mean gives the same verdict from both sides. The package uses it, and says
# where a variant is slower.
#
# **Mixed rows.** A file of two GPUs makes curves with a kink that no kernel has. So rows of two
# GPUs are refused, unless one says which:

# %%
results.append(results.read(DATA / "ladder.csv").to_dict("records"), FOLDER / "a.csv")
elsewhere = before.head(2).assign(gpu="another GPU")
results.append(elsewhere.to_dict("records"), FOLDER / "b.csv")
try:
    plot.read_rows(FOLDER / "a.csv", FOLDER / "b.csv")
except ValueError as problem:
    print(problem)

# %% [markdown]
# The same goes for precisions: PyTorch with TF32 beside a kernel in fp32 compares two computations.
# They have rows of their own, and a figure is of one.
#
# ## Many GPUs
#
# A sweep is a list of independent measurements, so several GPUs can share it.
# [Dask](https://www.dask.org) hands out whole cases, each to one GPU: rows of a case share their
# inputs and right answers. No two measurements share a GPU, or they would disturb each other.
#
# ```
# numba-fused sweep batch channels --dry-run             # what would be measured
# numba-fused sweep batch --out batch.csv                # this GPU
# numba-fused sweep batch --out batch.csv --gpus all     # every GPU of this machine
# numba-fused sweep batch --out batch.csv --minutes 50   # start nothing later than that
# numba-fused sweep batch --out batch.csv --retry-failed
# numba-fused sweep batch --out batch.csv --scheduler tcp://host:8786   # a Dask cluster
# numba-fused compare batch.csv other.csv
# numba-fused plot scaling --rows batch.csv
# ```
#
# `numba_fused/cluster.py` begins with a SLURM cluster in ten lines. All GPUs of a sweep must be
# of one kind, for the reason above, and their rows go to one file, written by one process.
#
# ## Exercises
#
# **Exercise 1.** Declare a `Sweep` of `kb83` over batches 1, 4, 16, 64 and planes 16, 32, 64,
# without those whose batch times plane is above 1,024; for the variants `torch` and `pipelined`, in
# both precisions.


# %%
def check_1(answer):
    assert set(answer.variants) == {"torch", "pipelined"}, f"variants: {answer.variants}"
    cases = {bench.case(key.case) for key in answer.levels}
    found = {(case.batch, case.plane) for case in cases}
    wanted = {(b, p) for b in (1, 4, 16, 64) for p in (16, 32, 64) if b * p <= 1024}
    assert found <= wanted, f"(batch, plane) {min(found - wanted)} should not be there"
    assert found == wanted, f"(batch, plane) {min(wanted - found)} is missing"
    assert len(answer.levels) == 4 * len(wanted), f"{len(answer.levels)} rows"


my_sweep = None  # Sweep(name="mine", ...)
attempt(check_1, my_sweep)

# %% [markdown]
# **Exercise 2.** A launch costs 4 microseconds and each sample 2 more, so that $t = 4 + 2n$
# microseconds for $n$ samples. Write `local_slope(n)`: the slope of this curve on log-log axes at
# `n`. From which `n` on is it above 0.9?


# %%
def check_2(local_slope):
    for n in (1, 2, 18, 1000):
        low, high = n / 1.0001, n * 1.0001
        expected = math.log((4 + 2 * high) / (4 + 2 * low)) / math.log(high / low)
        found = local_slope(n)
        assert abs(found - expected) < 1e-4, f"at {n} it is {expected:.3f}, not {found:.3f}"


my_slope = None  # def my_slope(n): ...
attempt(check_2, my_slope)

# %% [markdown]
# **Exercise 3.** Write a `measure(case, variant, precision, threads_per_block, backward)` that runs
# nothing. Its rows have the columns of `bench.case_row(case, spec)`, `variant`, `threads_per_block`
# if it is not None, `utc`, and by the rung's ledger (`rung.ledger(spec, threads)`) `launches` and
# `ledger_bytes`; `status` is `"ok"`, or `"skipped"` with the `reason` if `rung.limit(spec)` gives
# one.


# %%
def check_3(measure):
    asked = Sweep(
        name="bytes",
        axes={"batch": [1, 2], "threads_per_block": [128, 256]},
        variants=["unfused", "epilogue", "algebra"],
    )
    path = FOLDER / f"{measure.__name__}.csv"
    path.unlink(missing_ok=True)
    for row in sweep.run(sweep.plan([asked]), path, measure=measure):
        assert row["status"] != "failed", row["reason"]
    found = sweep.load(path, sweep=asked)
    assert len(found) == len(asked.levels), f"{len(found)} of {len(asked.levels)} keys have a row"
    for row in found.to_dict("records"):
        name, spec = f"{row['case']} {row['variant']}", bench.case_spec(row["case"])
        rung = ladder.get(row["variant"])
        if rung.limit(spec):
            assert row["status"] == "skipped", f"{name} cannot run"
            continue
        threads = int(row["threads_per_block"])
        expected = rung.ledger(spec, threads).bytes_moved
        assert row["ledger_bytes"] == expected, f"{name}: {row['ledger_bytes']}, not {expected}"


my_measure = None  # def my_measure(case, variant, precision, threads_per_block, backward): ...
attempt(check_3, my_measure)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.

# %% jupyter={"source_hidden": true} tags=["solution"]
solution_1 = Sweep(
    name="mine",
    axes={"batch": {"from": 1, "to": 64, "factor": 4}, "plane": [16, 32, 64]},
    where=["batch * plane <= 1024"],
    variants=["torch", "pipelined"],
    precisions=["ieee", "tf32"],
)
check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_2(n):
    return 2 * n / (4 + 2 * n)  # n / t * dt / dn: the share of the time that grows


check_2(solution_2)
print("solution 2 is right; above 0.9 for n > 18")


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_3(case, variant, precision, threads_per_block, backward):
    spec, rung = bench.case_spec(case, precision), ladder.get(variant)
    row = bench.case_row(case, spec) | {"variant": variant, "utc": results.now()}
    if threads_per_block is not None:
        row["threads_per_block"] = threads_per_block
    if reason := rung.limit(spec):
        return row | {"status": "skipped", "reason": reason}
    ledger = rung.ledger(spec, threads_per_block or ladder.DEFAULT_THREADS_PER_BLOCK)
    counted = {"launches": ledger.launches, "ledger_bytes": ledger.bytes_moved}
    return row | counted | {"status": "ok"}


check_3(solution_3)
print("solution 3 is right")

# %%
scratch.cleanup()

# %% [markdown]
# **Next:** [8. Training](08_training.ipynb): the block in a network that learns.
