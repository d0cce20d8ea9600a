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
# # 2. The ladder
#
# **After this notebook you can**
#
# * predict how many bytes a kernel moves through global memory, by reading it;
# * check the prediction by running the kernel in the simulator, which counts them;
# * say what fusion saves, step by step, from five launches to one;
# * tell from stored counters of a real GPU what else than bytes can bind a kernel.
#
# The operator is that of notebook 1: convolution, group normalisation, min, clamp, dropout. The
# ladder computes it in twelve ways, one idea a file. You go up it, and bet on every rung.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from lesson import attempt, compare, message, show, stored_counters, stored_rows
from numba import cuda

import numba_fused as nf
from numba_fused import bench, demo, ladder, plot
from numba_fused.device import pointwise
from numba_fused.explain import MEASURED
from numba_fused.ladder import (
    rung_1_unfused,
    rung_2_pointwise,
    rung_3_epilogue,
    rung_4_one_kernel,
    rung_5_tiled,
    rung_6_recompute,
    rung_9_pipelined,
)
from numba_fused.ladder.tensor_cores import tile_shape
from numba_fused.plot.style import BLUE, GREY, SKY
from numba_fused.simulator import Simulator
from numba_fused.verify import poisoned

# %% [markdown]
# ## What a byte is here
#
# A GPU has a large *global memory* and, near its arithmetic units, small and fast *registers*,
# *shared memory* and caches. A tensor lives in global memory. A kernel that wants a value loads it
# into a register, and what it leaves for the next kernel it has to store: registers end with the
# kernel. So each launch that takes a tensor and makes a tensor is a *round trip* through memory.
#
# We count as follows. Each pass over a tensor costs its size once: the caches serve the
# re-reads within a pass, as of a convolution's overlapping windows, and keep nothing from one pass
# to the next. Write `x` for the bytes of the input and `E` for the bytes of the output, which are
# also those of every tensor in between.
#
# The simulator runs each thread in Python, so the problem is small. Parameters (weight, bias,
# gamma, beta) are a few hundred bytes beside it.

# %%
spec = nf.BlockSpec.from_arguments((1, 1, 6, 10, 18), (4, 1, 3, 3, 3), num_groups=2, **bench.CHAIN)
generator = torch.Generator().manual_seed(2)
operands = [
    torch.randn(shape, generator=generator)
    for shape in (spec.x_shape, spec.weight_shape, (4,), (4,), (4,))
]
SEED, THREADS = 7, 128
print(f"x {spec.x_shape}: {spec.x_bytes:,} bytes")
print(f"E {spec.output_shape}: {spec.output_bytes:,} bytes")
print(f"compulsory, x + E and the parameters: {spec.compulsory_bytes:,} bytes")

# %% [markdown]
# This runs a rung in the simulator, judges its output against fp64, and lists what each kernel
# moved:


# %%
def simulate(name):
    problem = demo.at_its_precision(ladder.get(name), spec)  # fp32; TF32 if it knows only that
    simulator, out = Simulator(count=True), poisoned(problem, "cpu")
    ladder.run(
        name,
        *operands,
        spec=problem,
        seed=SEED,
        out=out,
        threads_per_block=THREADS,
        simulator=simulator,
    )
    exact = [t.double() for t in operands]
    expected = nf.reference(*exact, seed=SEED, num_groups=2, **bench.CHAIN)
    error = torch.linalg.vector_norm(out - expected) / torch.linalg.vector_norm(expected)
    print(f"{name}: {len(simulator.launches)} launches, error {error:.1e}")
    for launch in simulator.launches:
        print(
            f"  {launch.kernel:36} read {launch.bytes_read:6,}   written {launch.bytes_written:6,}"
        )
    return simulator.bytes_read + simulator.bytes_written


moved = {}  # rung -> (predicted, counted) bytes


def measure(name, *, x, E):
    """Compare a prediction, so many times x and so many times E, with the simulator's count."""
    predicted, counted = x * spec.x_bytes + E * spec.output_bytes, simulate(name)
    moved[name] = predicted, counted
    compare(predicted, counted, "bytes")


# %% [markdown]
# ## Rung 0, `torch`: the vendor's answer
#
# Eager PyTorch launches one library kernel or more for each operator. Each reads a tensor and
# writes one; the normalisation reads its input twice, because the first value cannot be normalised
# before the last has been added to the mean; dropout also writes its mask. We cannot look into
# those kernels, so their bytes are reckoned and not counted:

# %%
eager = ladder.get("torch").ledger(spec)
print(f"{eager.launches} launches, {eager.bytes_moved / spec.output_bytes:.1f} E in all")

# %% [markdown]
# ## Rung 1, `unfused`: five kernels
#
# The chain as on paper. These are two of the five:

# %%
show(rung_1_unfused.min_kernel, rung_1_unfused.group_norm_kernel)

# %% [markdown]
# **Predict:** how often does the whole chain move `x`, and how often `E`, reads and writes
# together? The convolution reads `x` and writes `z`; then go through the others.

# %%
x_times, E_times = 1, 8

# %%
measure("unfused", x=x_times, E=E_times)

# %% [markdown]
# Five writes of `E`, and five reads: the normalisation's two, and one each for min, clamp and
# dropout. What is left over are parameters.
#
# The simulator counts by source line, too. Here are the two lines of `min_kernel` that touch
# memory. A *request* is one instruction of a *warp*, the 32 threads that go together; 32
# neighbouring fp32 values are 128 bytes, which the memory moves as four *sectors* of 32 bytes.

# %%
simulator, flat = Simulator(count=True), np.linspace(-1, 1, 1024, dtype=np.float32)
simulator.launch(rung_1_unfused.min_kernel, 8, 128, flat, np.empty_like(flat), np.float32(0.5))
pd.DataFrame(
    [
        (line.kind, line.requests, line.sectors, line.distinct_bytes, line.text)
        for line in simulator.launches[0].lines
    ],
    columns=["kind", "requests", "sectors", "bytes", "line"],
)

# %% [markdown]
# ## Rung 2, `pointwise`: no kernel for what is nearly free
#
# Min, clamp and dropout are a few instructions a value. A kernel of their own costs a round trip.
# So they ride along while the normalisation has the value in a register:

# %%
show(rung_2_pointwise.group_norm_min_clamp_dropout_kernel)

# %% [markdown]
# **Predict** again.

# %%
x_times, E_times = 1, 5

# %%
measure("pointwise", x=x_times, E=E_times)

# %% [markdown]
# `z` written, read twice, `out` written: 4 E. Three reads and three writes are gone.
#
# ## Rung 3, `epilogue`: add up what is in your hand
#
# `z` is still read once only to learn its mean and variance, by a kernel that did not make it. The
# convolution had every value in a register, so now it adds up as it writes:

# %%
show(rung_3_epilogue.convolution_moments_kernel)

# %% [markdown]
# **Predict:**

# %%
x_times, E_times = 1, 4

# %%
measure("epilogue", x=x_times, E=E_times)

# %% [markdown]
# One read of `E` less. In its place each block leaves three numbers (count, mean, sum of squared
# deviations), which a second kernel merges. Notebook 3 is about those.
#
# ## Rung 4, `one_kernel`: a single launch
#
# The classic fused kernel. A block does everything for one group of one sample, so nobody else
# needs that group's statistics, and no second launch has to wait for them:

# %%
show(rung_4_one_kernel.one_kernel)

# %% [markdown]
# **Predict:** does it move fewer bytes than rung 3?

# %%
x_times, E_times = 1, 2

# %%
measure("one_kernel", x=x_times, E=E_times)

# %% [markdown]
# It does not. A group does not fit on chip, so the convolution is parked in the output tensor and
# picked up again. *One launch is not the same as one pass.* What is gone is a launch, the partial
# sums and a whole temporary tensor.
#
# ## Rung 5, `tiled`: the same bytes, fewer instructions
#
# So far each multiply-add fetches two words from a cache and computes where they are. Here a block
# stages a tile of the input in shared memory, and each thread computes many outputs from registers.
# How that is done is its docstring's affair:

# %%
Markdown(f"```text\n{rung_5_tiled.__doc__}```")

# %% [markdown]
# **Predict:** what does that change about global memory?

# %%
x_times, E_times = 1, 3

# %%
measure("tiled", x=x_times, E=E_times)

# %% [markdown]
# Nothing. It is about instructions, and we come back to those.

# %% [markdown]
# ## Rung 6, `recompute`: rather compute than remember
#
# With tiles the convolution has become cheap. So it is done twice: once for the statistics, whose
# values are thrown away, and once for the output.

# %%
show(rung_6_recompute.apply_kernel)

# %% [markdown]
# **Predict:** the convolution's result is never in memory. What is?

# %%
x_times, E_times = 1, 1

# %%
measure("recompute", x=x_times, E=E_times)

# %% [markdown]
# `x` twice, `E` once. Here `E` is 1.9 times `x`; in the benchmark it is 4.4 times `x`, and the
# second look at `x` is cheap.
#
# ## Rungs 7 and 8, `tensor_core` and `split`: another arithmetic
#
# *Tensor cores* multiply small matrices, 1,024 multiply-adds in one instruction of a warp, on
# numbers of 11 bits (TF32). Rung 7 does rung 6's two passes with those. Its error shows the
# missing bits. Rung 8 splits each number into two halves of 11 bits and adds three products, which
# gives fp32's accuracy back. Both first pack the weights in the order in which the lanes of a warp
# want them; a tile has 16 channels and ours uses 4, so the packing weighs more than it should.
#
# **Predict:** how often `x` and `E`, the packing aside?

# %%
x_times, E_times = 2, 1

# %%
measure("tensor_core", x=x_times, E=E_times)

# %%
measure("split", x=x_times, E=E_times)

# %% [markdown]
# ## Rung 9, `pipelined`: park it and go on
#
# What a large GPU holds at once is more than a sample. So a block convolves its tile, publishes its
# sums and *parks* the tile in shared memory until all tiles of the sample have done the same. In
# the meantime it convolves the next one. Each phase has warps of its own: some pack the input, some
# convolve, some finish, and they hand tiles on at barriers (`PARKED`, `FINISHED`). Those that
# finish do this, and `find_coefficients` is where they wait for the sums of the other blocks:

# %%
show(rung_9_pipelined.finishing)

# %% [markdown]
# **Predict:**

# %%
x_times, E_times = 2, 1

# %%
measure("pipelined", x=x_times, E=E_times)

# %% [markdown]
# Without the packing it is `x + E`: the compulsory bytes, in one pass.
#
# ## Rungs 10 and 11
#
# `library_conv` leaves the convolution to NVIDIA's cuDNN, which is hard to beat where channels are
# many, and does the rest in two kernels. `algebra` fills in the constant of a degenerate chain; it
# cannot run this one. The simulator runs only our own kernels, so of rung 10 it sees two of three
# launches.
#
# **Predict** the bytes of those two: statistics, and everything after.

# %%
x_times, E_times = 0, 2

# %%
measure("library_conv", x=x_times, E=E_times)

# %% [markdown]
# ## The bill for the real problem
#
# Every rung has a *ledger*: a formula for the bytes and launches it should need. On our small
# problem it has to agree with the simulator's count, or one of the two is wrong:

# %%
for name, (_, counted) in moved.items():
    rung = ladder.get(name)
    ledger = rung.ledger(demo.at_its_precision(rung, spec), THREADS)
    note = "   (and a library kernel)" if ledger.library_launches else ""
    print(f"{name:13} ledger {ledger.bytes_moved:7,}   counted {counted:7,}{note}")

# %% [markdown]
# The tensor-core rungs' ledger keeps to the round sums and leaves some of the small change out.
# For the others it is exact.
#
# Now the same formulas at the benchmark's size, x (128, 3, 16, 64, 64). The bytes were also counted
# in hardware, by NVIDIA's profiler `ncu` on an H200. Those are the diamonds.

# %%
case = bench.case_spec("kb83")
counters = stored_counters()
counters["dram"] = counters["dram_read"] + counters["dram_written"]
dram = counters["dram"].groupby("variant").sum()
ledgers = {
    rung.name: rung.ledger(demo.at_its_precision(rung, case))
    for rung in ladder.rungs()
    if rung.name != "algebra"
}
plot.traffic_figure(
    list(ledgers),
    [ledger.bytes_read for ledger in ledgers.values()],
    [ledger.bytes_written for ledger in ledgers.values()],
    compulsory=case.compulsory_bytes,
    counted=[int(dram[name]) if name in dram else None for name in ledgers],
)

# %% [markdown]
# ## And the time
#
# `plots/data/ladder.csv` holds measured times. Bytes go down by a factor from `unfused` to
# `pointwise`.
#
# **Predict:** by what factor does the time go down?

# %%
rows = stored_rows("kb83")
bytes_ratio = ledgers["unfused"].bytes_moved / ledgers["pointwise"].bytes_moved
print(f"bytes: {bytes_ratio:.2f} times fewer")
predicted_ratio = bytes_ratio

# %%
compare(predicted_ratio, rows["unfused"]["p50_ms"] / rows["pointwise"]["p50_ms"], "times faster")

# %%
figure = plot.ladder_figure(list(rows.values()))
arithmetic = {"tf32": "TF32", "ieee": "fp32"}[rows["torch"]["precision"]]
figure.suptitle(f"kb83 on one {rows['torch']['gpu']}; PyTorch's convolution in {arithmetic}")
figure

# %%
rate = rows["unfused"]["copy_gb_per_s"] * 1e9
table = pd.DataFrame(
    [
        {
            "rung": name,
            "arithmetic": row["precision"],
            "MB": ledgers[name].bytes_moved / 1e6,
            "ms for its bytes": 1e3 * ledgers[name].bytes_moved / rate,
            "ms measured": row["p50_ms"],
        }
        for name, row in rows.items()
        if name in ledgers
    ]
)
table.set_index("rung").round({"MB": 0, "ms for its bytes": 3, "ms measured": 3})

# %% [markdown]
# Each takes at least three times as long as its bytes do. Rung 6 moves less than half as many as
# rung 5.
#
# **Predict:** how many times faster is `recompute` than `tiled`?

# %%
predicted_ratio = ledgers["tiled"].bytes_moved / ledgers["recompute"].bytes_moved
print(f"bytes: {predicted_ratio:.2f} times fewer")

# %%
compare(predicted_ratio, rows["tiled"]["p50_ms"] / rows["recompute"]["p50_ms"], "times faster")
pairs = {"tiled": "one_kernel", "split": "recompute", "pipelined": "split"}
for name, before in pairs.items():
    times = rows[before]["p50_ms"] / rows[name]["p50_ms"]
    bytes_ratio = ledgers[before].bytes_moved / ledgers[name].bytes_moved
    print(f"{name} after {before}: {times:.1f} times faster, {bytes_ratio:.2f} times fewer bytes")

# %% [markdown]
# It is slower: the second convolution costs more than the bytes that it saves. The great steps
# are those of arithmetic. Rung 5 computes from registers, at the same bytes; rung 8 multiplies on
# tensor cores, at rung 6's bytes; and rung 9 convolves once. Rung 4 is slower than rung 3,
# with a launch less.
#
# So most rungs are not bound by memory. Then by what?
#
# A GPU also has to *issue* every instruction. An H200 has 132 *multiprocessors*, each of which
# issues up to 4 warp instructions a cycle, at about 1.75 GHz. The profiler counted the warp
# instructions of each kernel.
#
# **Predict** the time of rung 1's convolution from its instructions, in ms. (Divide.)

# %%
of_unfused = counters.loc["unfused"]
instructions = of_unfused["instructions"]
print(f"convolution: {instructions['convolution_kernel'] / 1e9:.2f} billion warp instructions")
predicted_ms = 1.0

# %%
issue_rate = 132 * 4 * 1.75e9  # warp instructions a second
milliseconds = of_unfused["nanoseconds"] / 1e6
of_bytes = of_unfused["dram"] / rate * 1e3
of_instructions = instructions / issue_rate * 1e3
compare(predicted_ms, milliseconds["convolution_kernel"], "ms")
print(
    f"bytes alone {of_bytes['convolution_kernel']:.2f} ms, "
    f"instructions alone {of_instructions['convolution_kernel']:.2f} ms"
)

# %%
places = np.arange(len(milliseconds))
figure, ax = plt.subplots(figsize=(7.2, 3.4))
bars = {
    "measured": (milliseconds, BLUE, ""),
    "its instructions alone": (of_instructions, SKY, "//"),
    "its bytes alone": (of_bytes, GREY, ".."),
}
for offset, (label, (values, colour, hatch)) in enumerate(bars.items()):
    ax.barh(
        places + 0.27 * (offset - 1),
        values,
        height=0.25,
        color=colour,
        hatch=hatch,
        edgecolor="white",
        label=label,
    )
ax.set_yticks(places, milliseconds.index)
ax.invert_yaxis()
ax.set_xscale("log")
ax.set_xlabel("time (ms; log scale that starts at 0.1)")
ax.set_xlim(0.1, 20)
ax.legend(loc="center right")
plt.show()

# %% [markdown]
# The naive convolution is bound by instructions: it spends dozens on the addresses of three
# multiply-adds. `min` and `clamp` are bound by bytes. Dropout moves no more bytes than those two,
# and takes several times as long: it computes random numbers (notebook 4). Fusing three kernels
# that take a small part of the time cannot save more than that part. *Measure before you fuse.*
# That is why rung 5 exists, which saves no bytes at all.
#
# ## One more trap: too little work
#
# A GPU is fast because much of it works at once. The stored rows have the benchmark with a batch of
# 1, too: 1/128 of the work.
#
# **Predict:** how many ms does `pipelined` take for a batch of 1?

# %%
predicted_ms = rows["pipelined"]["p50_ms"] / 128
print(f"1/128 of the time would be {predicted_ms:.4f} ms")

# %%
single = stored_rows("kb83-b1")
compare(predicted_ms, single["pipelined"]["p50_ms"], "ms")
tiles = tile_shape(case, rung_9_pipelined.kind(case)).tiles_per_sample
print(f"tiles of a sample, one for a block: {tiles}")
print(f"torch.compile: {single['torch.compile']['p50_ms']:.3f} ms")
print(f"torch:         {single['torch']['p50_ms']:.3f} ms")

# %% [markdown]
# One sample makes that many blocks, one to a multiprocessor, and an H200 has 132 of those: most of
# it is idle. What is left is the time of one tile from beginning to end, and that of two
# launches. Rung 4, with a block for each sample and group, would have 8 blocks. The best kernel
# depends on the shape, which is why `variant="auto"` exists.
#
# ## Exercises
#
# **Exercise 1.** A pointwise compiler fuses min with clamp, but leaves the normalisation and
# dropout alone. Give `(launches, x_times, E_times)` of the whole chain, with reads and writes
# together.


# %%
def check_1(answer):
    launches, x_times, E_times = answer
    assert launches == 4, "convolution, normalisation, min with clamp, dropout"
    assert x_times == 1, "only the convolution reads x"
    assert E_times == 10 - 2, "one round trip less than rung 1"


my_bill = None  # (launches, x_times, E_times)
attempt(check_1, my_bill)

# %% [markdown]
# **Exercise 2.** Write that kernel: `(h, c, cap, min_value, max_value)` for flat arrays, with
# `pointwise.minimum` and `pointwise.clamp`, which are device functions: kernels may call them. The
# check counts its bytes.


# %%
def check_2(kernel):
    h = torch.randn(1000, generator=torch.Generator().manual_seed(1)).numpy()
    c, counting = np.full_like(h, np.nan), Simulator(count=True)
    bounds = np.float32(0.5), np.float32(-1), np.float32(1)
    try:
        counting.launch(kernel, 8, 128, h, c, *bounds)
    except Exception as error:
        raise AssertionError(message(error)) from None
    assert np.array_equal(c, np.clip(np.minimum(h, bounds[0]), -1, 1)), "wrong values"
    found = counting.bytes_read, counting.bytes_written
    assert found == (h.nbytes, c.nbytes), f"(read, written) is {found}, not {(h.nbytes, c.nbytes)}"


my_kernel = None  # @cuda.jit above a def
attempt(check_2, my_kernel)

# %% [markdown]
# **Exercise 3.** Rung 6 saves 2 E of rung 5's bytes, reads `x` once more, and computes the
# convolution once more. The H200 moves 4.19e12 bytes a second and does 50e12 fp32 operations a
# second outside its tensor cores. Of the cases in `bench.CASES`, for which does the second
# convolution (`spec.flops`) cost less time than the bytes it saves? Give a set of names.


# %%
def check_3(names):
    bandwidth, flop_rate = MEASURED["NVIDIA H200"]
    expected = set()
    for name in bench.CASES:
        s = bench.case_spec(name)
        saved = (2 * s.output_bytes - s.x_bytes) / bandwidth
        if s.flops / flop_rate < saved:
            expected.add(name)
    extra, missing = set(names) - expected, expected - set(names)
    assert not extra, f"not so for {sorted(extra)[0]}"
    assert not missing, f"{len(missing)} missing"


my_cases = None  # {"kb83", ...}
attempt(check_3, my_cases)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.

# %% jupyter={"source_hidden": true} tags=["solution"]
solution_1 = (4, 1, 8)
check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_2(h, c, cap, min_value, max_value):
    index = cuda.grid(1)
    if index < h.size:
        c[index] = pointwise.clamp(pointwise.minimum(h[index], cap), min_value, max_value)


check_2(solution_2)
print("solution 2 is right")

# %% jupyter={"source_hidden": true} tags=["solution"]
bandwidth, flop_rate = MEASURED["NVIDIA H200"]
solution_3 = set()
for name in bench.CASES:
    s = bench.case_spec(name)
    if s.flops / flop_rate < (2 * s.output_bytes - s.x_bytes) / bandwidth:
        solution_3.add(name)
check_3(solution_3)
print("solution 3 is right:", ", ".join(sorted(solution_3)))

# %% [markdown]
# A convolution with few multiply-adds a value, in both cases. The benchmark is not among them: with
# the ordinary units recomputing does not pay there, as the measured times said, and that is why
# rung 7 turns to tensor cores.

# %% [markdown]
# **Next:** [3. Group statistics](03_group_statistics.ipynb): how 256 threads agree on one mean.
