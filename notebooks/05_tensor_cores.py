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
# # 5. Tensor cores from Python
#
# **After this notebook you can**
#
# * say which lane of a warp holds which element of a matrix that a tensor core multiplies;
# * make a machine instruction callable from Python, with a meaning that runs without a GPU;
# * multiply matrices with it, and predict the error of TF32 and of numbers split into two halves;
# * say how a tensor core adds, why its long sums drift, and how to stop that;
# * count the matrix instructions of a convolution before it runs, and find them in machine code.
#
# Notebook 2 ended with a convolution that is bound by instructions. Here one instruction does the
# work of many.

# %%
import importlib
import math
import subprocess
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from lesson import DATA, attempt, compare, message, show
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from numba import cuda, float32, uint32
from numba.cuda.cudadrv import nvvm

import numba_fused as nf
from numba_fused import bench, ladder, plot
from numba_fused.device import ptx, tensor_tile
from numba_fused.device.tile_shape import LONGEST_CHAIN, TileShape
from numba_fused.ladder import rung_7_tensor_core
from numba_fused.ladder.tensor_cores import tile_shape
from numba_fused.plot.rows import by_case, of_case, timed
from numba_fused.plot.style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION
from numba_fused.simulator import Simulator

# %% [markdown]
# ## A matrix product as one instruction
#
# An ordinary multiply-add instruction makes each of the 32 lanes of a warp compute `c + a * b`
# once. *Tensor cores* are units that compute $C + A B$ for small matrices. The instruction for them
# is `mma.sync`, "matrix multiply-add". All 32 lanes execute it together, each holding a part of
# each matrix in its registers. Two of its shapes are used here:
#
# | PTX name | A | B | C | what A and B hold |
# |---|---|---|---|---|
# | `mma.sync...m16n8k8` | 16 x 8 | 8 x 8 | 16 x 8, fp32 | TF32, 32 bits a value |
# | `mma.sync...m16n8k16` | 16 x 16 | 16 x 8 | 16 x 8, fp32 | halves, 16 bits a value |
#
# **Predict:** how many ordinary multiply-add instructions of a warp does one `m16n8k8` replace?

# %%
predicted_instructions = 8

# %%
compare(predicted_instructions, 16 * 8 * 8 / 32, "instructions")

# %% [markdown]
# ## Who holds what
#
# Nobody passes a matrix to `mma.sync`. A lane passes words of its own: four of A (`a0` to `a3`),
# two of B, four of C; 32 lanes with four words make up the 16 x 8 values of A. A lane's words of a
# matrix are its *fragment*. Write the lane's number as $4g + t$, so that `g` is 0 to 7 and `t` 0 to
# 3. Then for `m16n8k8` the words have these places:

# %%
A_PLACES = {  # word: (row, column) of the matrix, from g and t
    "a0": lambda g, t: (g, t),
    "a1": lambda g, t: (g + 8, t),
    "a2": lambda g, t: (g, t + 4),
    "a3": lambda g, t: (g + 8, t + 4),
}
B_PLACES = {"b0": lambda g, t: (t, g), "b1": lambda g, t: (t + 4, g)}
C_PLACES = {
    "c0": lambda g, t: (g, 2 * t),
    "c1": lambda g, t: (g, 2 * t + 1),
    "c2": lambda g, t: (g + 8, 2 * t),
    "c3": lambda g, t: (g + 8, 2 * t + 1),
}

# %% [markdown]
# **Predict:** in which row of A is word `a1` of lane 13?

# %%
predicted_row = 13

# %%
compare(predicted_row, A_PLACES["a1"](13 // 4, 13 % 4)[0])

# %%
PALE = ["#DCEBF7", "#9CCBEB", "#FBE5B8", "#F2BC5E"]


def draw_fragments(ax, title, shape, places):
    word, lane = np.zeros(shape, int), np.zeros(shape, int)
    for number, place in enumerate(places.values()):
        for holder in range(32):
            where = place(holder // 4, holder % 4)
            word[where], lane[where] = number, holder
    ax.pcolormesh(word, cmap=ListedColormap(PALE), vmin=0, vmax=3, edgecolors="white", lw=1)
    for (row, column), holder in np.ndenumerate(lane):
        ax.text(column + 0.5, row + 0.52, holder, ha="center", va="center", fontsize=9)
    ax.set_xticks(np.arange(shape[1]) + 0.5, range(shape[1]), fontsize=9)
    ax.set_yticks(np.arange(shape[0]) + 0.5, range(shape[0]), fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_ylim(18.5, 0)  # the same for all three, with room for the legend
    ax.set_aspect("equal")
    ax.set_title(title, fontsize=11)
    ax.spines[:].set_visible(False)
    patches = [Patch(color=PALE[i], label=name) for i, name in enumerate(places)]
    below = {"bbox_to_anchor": (4, shape[0] + 0.2), "bbox_transform": ax.transData}
    ax.legend(handles=patches, ncols=2, loc="upper center", **below)


figure, axes = plt.subplots(1, 3, figsize=(9.4, 6.8))
draw_fragments(axes[0], "A, 16 x 8", (16, 8), A_PLACES)
draw_fragments(axes[1], "B, 8 x 8", (8, 8), B_PLACES)
draw_fragments(axes[2], "C, 16 x 8", (16, 8), C_PLACES)
axes[0].set_ylabel("row of the matrix")
figure.supxlabel(
    "column of the matrix; the number in a cell is the lane that holds it", fontsize=11
)
plt.show()

# %% [markdown]
# Find lane 13 in each matrix. A *row* of A lies with the four lanes of one `g`, and so does a
# *column* of B: lanes 12 to 15 hold rows 3 and 11 of A, and column 3 of B.
#
# ## An instruction that Python has no word for
#
# Numba cannot write `mma.sync`. But it has *intrinsics*: functions whose machine code one gives by
# hand. `device/ptx.py` has a decorator for them. Here is a simple one:

# %%
show(ptx.to_tf32.simulated_as)

# %% [markdown]
# The decorator has the instruction in PTX, NVIDIA's assembly language (`$0` is the result, `$1` the
# argument), which registers it wants (`=r`: a 32-bit result; `f`: a float), and the types. The
# *body* is what the instruction means, in NumPy. The compiler never looks at the body, the
# simulator at nothing else, and a test on a GPU holds one against the other. `mma.sync` in the same
# way, for all lanes at once:

# %%
show(ptx.mma_tf32.simulated_as, ptx._sums)

# %% [markdown]
# `exchange_sync` is the simulator's: each lane gives its words and waits. From those of all lanes
# `_sums` computes the whole result, and each lane takes its own four elements.
#
# Now a matrix product by one warp: A is 16 x K, B is K x 8. Each step takes 8 of the K columns.


# %%
@cuda.jit
def product_tf32(a, b, c):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    for k in range(0, a.shape[1], 8):
        a0, a1 = ptx.to_tf32(a[g, k + t]), ptx.to_tf32(a[g + 8, k + t])
        a2, a3 = ptx.to_tf32(a[g, k + t + 4]), ptx.to_tf32(a[g + 8, k + t + 4])
        b0, b1 = ptx.to_tf32(b[k + t, g]), ptx.to_tf32(b[k + t + 4, g])
        c0, c1, c2, c3 = ptx.mma_tf32(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    c[g, 2 * t], c[g, 2 * t + 1] = c0, c1
    c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = c2, c3


# %% [markdown]
# **Predict:** how many matrix instructions does the warp execute for K = 40?

# %%
predicted_mmas = 40

# %%
random = np.random.default_rng(5)


def normal(*shape):
    return random.standard_normal(shape).astype(np.float32)


def run(kernel, a, b, *options):
    """C by one warp, and how many matrix instructions it took."""
    c, counting = np.full((a.shape[0], b.shape[1]), np.nan, np.float32), Simulator(count=True)
    counting.launch(kernel, 1, 32, a, b, c, *options)
    # Each of the 32 lanes calls the intrinsic; the warp executes it once.
    calls = counting.launches[0].intrinsics
    return c, (calls.get("mma_tf32", 0) + calls.get("mma_half", 0)) // 32


a, b = normal(16, 40), normal(40, 8)
c, mmas = run(product_tf32, a, b)
compare(predicted_mmas, mmas, "matrix instructions")
print(f"largest difference from NumPy: {np.abs(c - a @ b).max():.1e}")

# %% [markdown]
# The layout above is right, or the product would be nonsense. The difference is far more than fp32
# rounds to, though.
#
# ## What TF32 leaves out
#
# A float has a sign, an *exponent*, which is its range, and a *fraction*, which are its digits:

# %%
formats = {"fp32": (1, 8, 23), "TF32": (1, 8, 10), "half": (1, 5, 10)}
figure, ax = plt.subplots(figsize=(7.2, 1.9))
for line, bits in enumerate(formats.values()):
    start = 0
    for count, colour in zip(bits, (GREY, ORANGE, SKY), strict=True):
        for bit in range(start, start + count):
            ax.barh(line, 0.9, left=bit, height=0.7, color=colour)
        start += count
ax.set_yticks(range(3), formats)
ax.set_xlabel("bits")
ax.set_xticks(range(0, 33, 8))
ax.invert_yaxis()
parts = {"sign": GREY, "exponent": ORANGE, "fraction": SKY}
handles = [Patch(color=colour, label=name) for name, colour in parts.items()]
ax.legend(handles=handles, loc="lower right", ncols=1, fontsize=10)
plt.show()

# %% [markdown]
# A leading 1 is not stored, so TF32 and half have 11 significant bits. Neighbouring numbers are
# apart by $2^{-10}$ of their size at most.
#
# **Predict:** what is the largest relative error of rounding a number to TF32?

# %%
predicted_error = 2.0**-24


# %%
def tf32(values):
    """As `ptx.to_tf32`, for arrays."""
    bits = values.view(np.uint32) + np.uint32(0x1000)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


values = normal(100_000)
compare(predicted_error, np.abs(tf32(values) / values - 1).max())
print(f"2**-11 is {2.0**-11:.4g}")

# %% [markdown]
# C is not rounded to TF32: sums are kept in fp32. So operands lose most, and each product is off by
# two roundings. They differ in sign, and a sum of many products has many of them.
#
# **Predict:** what is the relative error of the product for K = 256?

# %%
predicted_error = 256 * 2.0**-11


# %%
def error(found, a, b):
    """Of a product, by the norms of matrices, against fp64."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    return distance if np.isfinite(distance) else 1.0


a, b = normal(16, 256), normal(256, 8)
compare(predicted_error, error(run(product_tf32, a, b)[0], a, b))

# %% [markdown]
# Errors with random signs grow as the sum itself does, so their ratio stays where it is: TF32 has
# the same error whatever the size. It is good enough for most training, and it is not fp32.
#
# ## Two halves make nearly a float
#
# Halves have the same 11 bits. But what rounding took away can be kept in a second half:
# `x = high + low`, `high` being the nearest half to `x`, and `low` the nearest half to `x - high`.

# %%
show(ptx.split_halves.simulated_as)

# %% [markdown]
# **Predict:** what is the largest relative error of `high + low`, for numbers from 1 to 2?

# %%
predicted_error = 2.0**-12

# %%
values = random.uniform(1, 2, 100_000).astype(np.float32)
high = values.astype(np.float16)
low = (values - high.astype(np.float32)).astype(np.float16)
together = high.astype(np.float64) + low.astype(np.float64)
compare(predicted_error, np.abs(together / values - 1).max())
print(f"2**-23 is {2.0**-23:.4g}")

# %% [markdown]
# Eleven bits and eleven bits, and the sign of `low` is worth one more. A product of two such sums
# has four parts:
#
# $$(a_h + a_l)(b_h + b_l) = a_h b_h + a_l b_h + a_h b_l + a_l b_l .$$
#
# The last is about $2^{-22}$ of the first. This kernel takes the first alone, the first three, or
# all four. A word holds two halves, so `m16n8k16` has fragments of the same size as before and
# twice the K:


# %%
@cuda.jit(device=True)
def split_a(a, row, k):
    return ptx.split_halves(a[row, k], a[row, k + 1])


@cuda.jit(device=True)
def split_b(b, k, column):
    return ptx.split_halves(b[k, column], b[k + 1, column])


@cuda.jit
def product_halves(a, b, c, products):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    for k in range(2 * t, a.shape[1], 16):
        a0, a0_low = split_a(a, g, k)
        a1, a1_low = split_a(a, g + 8, k)
        a2, a2_low = split_a(a, g, k + 8)
        a3, a3_low = split_a(a, g + 8, k + 8)
        b0, b0_low = split_b(b, k, g)
        b1, b1_low = split_b(b, k + 8, g)
        if products == 4:
            c0, c1, c2, c3 = ptx.mma_half(
                a0_low, a1_low, a2_low, a3_low, b0_low, b1_low, c0, c1, c2, c3
            )
        if products >= 3:
            c0, c1, c2, c3 = ptx.mma_half(a0_low, a1_low, a2_low, a3_low, b0, b1, c0, c1, c2, c3)
            c0, c1, c2, c3 = ptx.mma_half(a0, a1, a2, a3, b0_low, b1_low, c0, c1, c2, c3)
        c0, c1, c2, c3 = ptx.mma_half(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    c[g, 2 * t], c[g, 2 * t + 1] = c0, c1
    c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = c2, c3


# %% [markdown]
# **Predict:** how many times smaller is the error with three products than with one, for K = 256?

# %%
predicted_times = 3.0

# %%
errors = {count: error(run(product_halves, a, b, count)[0], a, b) for count in (1, 3, 4)}
compare(predicted_times, errors[1] / errors[3], "times smaller")
for count, found in errors.items():
    print(f"{count} of the four products: error {found:.2e}")

# %% [markdown]
# The fourth product changes nothing that one could see.
#
# **Predict:** how many times as many matrix instructions as TF32 do three products of halves take?

# %%
predicted_ratio = 3.0

# %%
of_halves, of_tf32 = run(product_halves, a, b, 3)[1], run(product_tf32, a, b)[1]
print(f"{of_halves} and {of_tf32}")
compare(predicted_ratio, of_halves / of_tf32, "times as many")

# %% [markdown]
# Half as many steps, three instructions each. And this is how errors grow with K, beside NumPy in
# fp32:

# %%
sizes = [16, 32, 64, 128, 256]
ways = {
    "TF32": (product_tf32, (), ORANGE, "s"),
    "halves, one product": (product_halves, (1,), VERMILION, "v"),
    "halves, three products": (product_halves, (3,), BLUE, "o"),
}
curves = {name: [] for name in [*ways, "fp32, NumPy"]}
for size in sizes:
    a, b = normal(16, size), normal(size, 8)
    for name, (kernel, options, *_) in ways.items():
        curves[name].append(error(run(kernel, a, b, *options)[0], a, b))
    curves["fp32, NumPy"].append(error(a @ b, a, b))

marks = {name: mark for name, (_, _, *mark) in ways.items()} | {"fp32, NumPy": (GREEN, "^")}
figure, ax = plt.subplots(figsize=(7.2, 3.6))
for name, found in curves.items():
    colour, marker = marks[name]
    size = 11 if name == "TF32" else 6  # another curve lies upon it
    ax.loglog(sizes, found, color=colour, marker=marker, markersize=size, label=name)
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.set_ylim(1e-8, 3e-3)
ax.set_xlabel("K, products in a sum (count; log scale)")
ax.set_ylabel("error against fp64\n(relative; log scale)")
ax.legend(loc="center right", fontsize=10)
plt.show()

# %% [markdown]
# The two curves at the top lie upon each other: TF32 and halves have the same 11 bits. Three
# products begin near fp32, and leave it as K grows. The operands are not to blame, which have as
# many bits for any K. So it is the sum.
#
# ## Sums that are cut off
#
# An addition in fp32 takes the float nearest to the exact sum: it errs to either side. What a
# tensor core does NVIDIA does not say. `_sums` above was found by experiment, and agrees with
# an H200 to the last bit: the products and C are shifted to the largest exponent among them; of
# what then lies below the last digit of a float two bits are kept, and the rest is *cut off*; and
# so is the end of the result, where fp32 would round.
#
# The float after 1 is $1 + 2^{-23}$. Let C be 1 and the only product $1.75 \cdot 2^{-24}$, which is
# most of the way to it.
#
# **Predict:** how far above 1 is the result, in units of $2^{-24}$?

# %%
predicted_step = 2.0


# %%
@cuda.jit
def add_products(a, b, c):
    """C + A @ B, in place, by one instruction."""
    g, t = cuda.laneid // 4, cuda.laneid % 4
    a0, a1 = ptx.to_tf32(a[g, t]), ptx.to_tf32(a[g + 8, t])
    a2, a3 = ptx.to_tf32(a[g, t + 4]), ptx.to_tf32(a[g + 8, t + 4])
    b0, b1 = ptx.to_tf32(b[t, g]), ptx.to_tf32(b[t + 4, g])
    upper, lower = (g, 2 * t), (g + 8, 2 * t)
    c0, c1, c2, c3 = c[upper], c[g, 2 * t + 1], c[lower], c[g + 8, 2 * t + 1]
    c0, c1, c2, c3 = ptx.mma_tf32(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
    c[upper], c[g, 2 * t + 1] = c0, c1
    c[lower], c[g + 8, 2 * t + 1] = c2, c3


UNIT = 2.0**-24
steps = np.array([1.75, 1, 2, 3, 3.75, 4, -0.25, -0.5, -1, -1.75], np.float32)  # in units
a, b = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
a[: steps.size, 0], b[0] = steps * np.float32(UNIT), 1
sums = np.ones((16, 8), np.float32)
Simulator().launch(add_products, 1, 32, a, b, sums)
found = (sums[: steps.size, 0].astype(np.float64) - 1) / UNIT
compare(predicted_step, found[0], "units")
in_fp32 = ((np.float32(1) + a[: steps.size, 0]).astype(np.float64) - 1) / UNIT
table = pd.DataFrame({"product (units)": steps, "1 + product, fp32": in_fp32, "tensor core": found})
table.set_index("product (units)")

# %% [markdown]
# The end of a sum is never rounded up. (Below 1 floats are twice as dense, and $-0.25$ of a unit
# is what the two extra bits do not hold: nothing is left of it.) One such error is less than
# two units where rounding makes one at most: hardly worse. But the errors of $n$ roundings have
# random signs, and grow like $\sqrt n$. The errors of $n$ cuts point to zero, and grow like $n$.
#
# This kernel takes three products of halves again. After every `length` steps an ordinary addition,
# which rounds, joins what they have added up, and they begin at zero anew:


# %%
@cuda.jit
def product_in_chains(a, b, c, length):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    for first in range(0, a.shape[1], 16 * length):
        s0, s1, s2, s3 = float32(0), float32(0), float32(0), float32(0)
        for start in range(first, min(first + 16 * length, a.shape[1]), 16):
            k = start + 2 * t
            a0, a0_low = split_a(a, g, k)
            a1, a1_low = split_a(a, g + 8, k)
            a2, a2_low = split_a(a, g, k + 8)
            a3, a3_low = split_a(a, g + 8, k + 8)
            b0, b0_low = split_b(b, k, g)
            b1, b1_low = split_b(b, k + 8, g)
            s0, s1, s2, s3 = ptx.mma_half(a0_low, a1_low, a2_low, a3_low, b0, b1, s0, s1, s2, s3)
            s0, s1, s2, s3 = ptx.mma_half(a0, a1, a2, a3, b0_low, b1_low, s0, s1, s2, s3)
            s0, s1, s2, s3 = ptx.mma_half(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
        c0, c1, c2, c3 = c0 + s0, c1 + s1, c2 + s2, c3 + s3
    c[g, 2 * t], c[g, 2 * t + 1] = c0, c1
    c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = c2, c3


# %% [markdown]
# **Predict:** for 2,304 products, nine times 256, how many times as large is the error of a single
# chain as for 256?

# %%
predicted_growth = np.sqrt(2304 / 256)

# %%
sizes = [16, 64, 256, 768, 2304]
whole, apart, rounded = [], [], []
for size in sizes:
    a, b = normal(16, size), normal(size, 8)
    whole.append(error(run(product_in_chains, a, b, size)[0], a, b))
    apart.append(error(run(product_in_chains, a, b, 1)[0], a, b))
    rounded.append(error(a @ b, a, b))
compare(predicted_growth, whole[-1] / whole[sizes.index(256)], "times as large")

# %% [markdown]
# Below, the same with sums of their own for each step; and the errors that an H200 has made of rung
# 8, `split`, on the stored cases. Rungs 8 and 9 give the matrix instructions of a window sums of
# their own where an output has more than `LONGEST_CHAIN` products (`TileShape.sums_apart`). Before
# they did, the H200's errors were 5.6e-7 to 5.0e-6 for 216 to 2,304 products: the upper curve.

# %%
frame = plot.read_rows(DATA)
on_gpu = [
    (math.prod(bench.case_spec(case).weight_shape[1:]), row["error"])
    for case, found in by_case(frame, "ieee").items()
    for row in timed(found)
    if row["variant"] == "split"
]
figure, ax = plt.subplots(figsize=(7.2, 3.6))
ax.loglog(sizes, whole, color=VERMILION, marker="v", label="a single chain")
ax.loglog(sizes, apart, color=BLUE, marker="o", label="own sums for each step")
ax.loglog(sizes, rounded, color=GREEN, marker="^", label="fp32, NumPy")
ax.loglog(*zip(*on_gpu, strict=True), "D", color="black", label="split on an H200 (rows)")
ax.axvline(LONGEST_CHAIN, color=GREY, lw=1, ls=":")
ax.text(LONGEST_CHAIN, 1.3e-8, " LONGEST_CHAIN", fontsize=10)
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.set_ylim(1e-8, 2e-5)
ax.set_xlabel("products in a sum (count; log scale)")
ax.set_ylabel("error against fp64\n(relative; log scale)")
ax.legend(loc="upper left", fontsize=10)
plt.show()

# %% [markdown]
# The cure costs an addition for each sum, and registers for the second set of sums, so a window of
# the tile kernels then serves half as many positions. With TF32 the operands' errors are a hundred
# times larger, and the kernels leave the chain whole.
#
# ## The price: range
#
# A half has 5 bits of exponent. The largest is 65,504, and below 0.00006 they lose bits, too, until
# nothing is left under 0.00000003. So inputs that are small or large are a problem that TF32 does
# not have.
#
# **Predict:** the error of three products, if all of A is multiplied by 1e-4.

# %%
predicted_error = errors[3]

# %%
a, b = normal(16, 64), normal(64, 8)
small = a * np.float32(1e-4)
compare(predicted_error, error(run(product_halves, small, b, 3)[0], small, b))

# %% [markdown]
# `low` has fallen out of the range, and with it half of the digits. The cure is to multiply by a
# power of two, which costs no digit, so that the largest value lies just below the limit; and to
# divide the result by it. In the tile kernels, which find the largest value of each tile:

# %%
show(tensor_tile.scale_exponent)


# %%
def scaled(values):
    """`values` times a power of two that brings the largest into [2^14, 2^15), and that power."""
    power = np.float32(2.0) ** (14 - np.floor(np.log2(np.abs(values).max())))
    return values * power, power


magnitudes = 10.0 ** np.arange(-8, 8.1, 1)
curves = {"as they are": [], "scaled by a power of two": []}
for magnitude in magnitudes:
    inputs = a * np.float32(magnitude)
    curves["as they are"].append(error(run(product_halves, inputs, b, 3)[0], inputs, b))
    ready, power = scaled(inputs)
    found = run(product_halves, ready, b, 3)[0] / power
    curves["scaled by a power of two"].append(error(found, inputs, b))

figure, ax = plt.subplots(figsize=(7.2, 3.4))
for (name, found), mark in zip(curves.items(), ((VERMILION, "s"), (BLUE, "o")), strict=True):
    ax.loglog(magnitudes, found, color=mark[0], marker=mark[1], label=name)
ax.axhline(1, color="black", lw=1, ls=":")
ax.text(1, 1.6, "nothing is right", fontsize=10, ha="center")
ax.set_ylim(1e-8, 10)
ax.set_xlabel("magnitude of A (no unit; log scale)")
ax.set_ylabel("error of three products\n(relative; log scale)")
ax.legend(loc="center", bbox_to_anchor=(0.5, 0.5), fontsize=10)
plt.show()

# %% [markdown]
# One power serves all values of a tile. A value much smaller than the largest still loses digits,
# relative to itself. Relative to the sum, in which the large one takes part, they do not count.
#
# ## A convolution as matrix products
#
# A convolution's output is a sum over input channels and taps, so it is a matrix product:
#
# $$C[\text{channel}, \text{row}] \mathrel{+}= A[\text{channel}, k]\, B[k, \text{row}]$$
#
# with the weights as A and 16 output channels as its rows. What are the columns of B? Textbooks
# take neighbouring outputs and copy each input value once for each tap (*im2col*). Rung 7 copies
# nothing: the 8 columns are 8 output *rows*, all at the same position along w. Position after
# position, tap after tap, a lane walks along its row and takes the next value, which it has in a
# register already.
#
# Here is that idea for 8 input channels and a kernel of 1 x 3. Then k is the channel, and each tap
# is one matrix instruction:

# %%
POSITIONS, TAPS = 16, 3
COLUMNS = POSITIONS + TAPS - 1


@cuda.jit
def convolve(x, weight, out):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    window = cuda.local.array((2, COLUMNS), uint32)  # all that this lane needs of its row g
    for column in range(COLUMNS):
        window[0, column] = ptx.to_tf32(x[t, g, column])
        window[1, column] = ptx.to_tf32(x[t + 4, g, column])
    for position in range(POSITIONS):
        c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
        for tap in range(TAPS):
            a0, a1 = ptx.to_tf32(weight[g, t, tap]), ptx.to_tf32(weight[g + 8, t, tap])
            a2, a3 = ptx.to_tf32(weight[g, t + 4, tap]), ptx.to_tf32(weight[g + 8, t + 4, tap])
            b0, b1 = window[0, position + tap], window[1, position + tap]
            c0, c1, c2, c3 = ptx.mma_tf32(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3)
        out[g, 2 * t, position], out[g, 2 * t + 1, position] = c0, c1
        out[g + 8, 2 * t, position], out[g + 8, 2 * t + 1, position] = c2, c3


# %% [markdown]
# The 48 matrix instructions take two words of B each. **Predict:** how many words of `x` does a
# lane load?

# %%
predicted_loads = 48 * 2

# %%
x, weight = normal(8, 8, COLUMNS), normal(16, 8, TAPS)  # (channel, row, column), (out, in, tap)
out, counting = np.full((16, 8, POSITIONS), np.nan, np.float32), Simulator(count=True)
counting.launch(convolve, 1, 32, x, weight, out)
launch = counting.launches[0]
loads = sum(line.accesses for line in launch.lines if line.array == "x")
expected = torch.conv2d(torch.from_numpy(x)[None], torch.from_numpy(weight)[:, :, None])[0]
distance = np.linalg.norm(out - expected.numpy()) / np.linalg.norm(expected)
print(f"error {distance:.1e}; {launch.intrinsics['mma_tf32'] // 32} matrix instructions")
compare(predicted_loads, loads / 32, "words a lane")

# %% [markdown]
# The registers of a lane are a *window* onto its row, and each value in it serves three products.
#
# With other kernels k runs over (tap along d, input channel) pairs, the *sources*, and taps along
# h. Sources have to be shared out among the four lanes `t`; what does not come out even is
# filled up with zeros. `TileShape.slots` has the result: which source and tap each lane has in each
# step. For the benchmark, 3 channels and a kernel of 3 x 3 x 3, which is 81 products an output:

# %%
case = bench.case_spec("kb83", "tf32")
shape = tile_shape(case, rung_7_tensor_core.KIND)


def products_used(shape: TileShape) -> np.ndarray:
    """(steps, 8): whether a column of A holds weights, or is filled up with zeros."""
    used = np.zeros((shape.steps, 8), bool)
    taps = shape.kernel_size[1] * shape.kernel_size[2]
    for (step, t), slot in np.ndenumerate(shape.slots):
        for word in range(2):
            source = 2 * (slot // taps) + word
            used[step, t + 4 * word] = slot >= 0 and source < shape.sources
    return used


band = np.full((POSITIONS, COLUMNS), np.nan)
for position in range(POSITIONS):
    band[position, position : position + TAPS] = range(TAPS)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(1.6, 1))
colours = ListedColormap([SKY, ORANGE, GREEN])
axes[0].pcolormesh(band, cmap=colours, edgecolors="white", lw=0.5)
for (position, column), tap in np.ndenumerate(band):
    if np.isfinite(tap):
        axes[0].text(column + 0.5, position + 0.55, f"{tap:.0f}", ha="center", va="center", size=8)
axes[0].set(xlabel="column of x (number)", ylabel="output position along w (number)")
axes[0].set_title("tap that meets a column", fontsize=11)
axes[0].invert_yaxis()
used = products_used(shape)
axes[1].pcolormesh(used, cmap=ListedColormap(["#E8E8E8", BLUE]), edgecolors="white", lw=1)
axes[1].set(xlabel="k within a step (number)", ylabel="step (number)")
axes[1].set_title(f"kb83: {used.sum()} of {used.size} columns of A used", fontsize=11)
axes[1].invert_yaxis()
plt.show()

# %% [markdown]
# Each step is executed for 16 positions. The weights are the same for all of them and for all
# tiles, so a kernel of its own *packs* them first: it rounds them and writes each lane's four words
# of each step side by side, for a single 128-bit load.
#
# Now the whole of rung 7 on a small problem: one tile of 16 channels, 8 rows and 16 columns. Its
# convolution has 16 x 8 x 16 outputs of 81 products, 1,024 of which fit into an instruction, and it
# is done twice, for the statistics and for the output.
#
# **Predict:** how many matrix instructions are that?

# %%
predicted_mmas = 2 * 16 * 8 * 16 * 81 / 1024

# %%
spec = nf.BlockSpec.from_arguments(
    (1, 3, 3, 10, 18), (16, 3, 3, 3, 3), num_groups=8, precision="tf32", **bench.CHAIN
)
generator = torch.Generator().manual_seed(5)
x = torch.randn(spec.x_shape, generator=generator)
weight = torch.randn(spec.weight_shape, generator=generator) / 9
counting = Simulator(count=True)
out = ladder.run("tensor_core", x, weight, spec=spec, seed=1, simulator=counting)
found = sum(launch.intrinsics.get("mma_tf32", 0) for launch in counting.launches) // 32
compare(predicted_mmas, found, "matrix instructions")
exact = nf.reference(x.double(), weight.double(), seed=1, num_groups=8, **bench.CHAIN)
distance = torch.linalg.vector_norm(out - exact) / torch.linalg.vector_norm(exact)
print(f"error against fp64: {distance:.1e}")

# %% [markdown]
# The difference are the zeros. From `TileShape` the number can be told exactly, for any size:


# %%
def mmas_of(spec):
    """Matrix instructions of rung 7."""
    shape = tile_shape(spec, rung_7_tensor_core.KIND)
    of_warp = shape.chunks * shape.steps * POSITIONS
    return 2 * spec.batch * shape.tiles_per_sample * shape.warps * of_warp


assert mmas_of(spec) == found
multiply_adds = 2 * case.flops / 2  # two passes; a multiply-add counts as two operations
print(f"small problem: {mmas_of(spec):,}")
print(f"benchmark:     {mmas_of(case):,}, {multiply_adds / 1024 / mmas_of(case):.0%} of it useful")

# %% [markdown]
# ## Into machine code, without a GPU
#
# The compiler runs on any machine. It turns a kernel into PTX for an architecture, `sm_90a` being
# the H200's.
#
# **Predict:** how often does `mma.sync` stand in the PTX of `product_tf32`, which calls it once, in
# a loop?

# %%
predicted_places = 1

# %%
matrix = float32[:, ::1]
if nvvm.is_available():
    assembly, _ = cuda.compile_ptx(product_tf32.py_func, (matrix,) * 3, cc=(9, 0, "a"))
    lines = [line.strip() for line in assembly.splitlines() if "mma.sync" in line]
    compare(predicted_places, len(lines), "places")
    print(lines[0])
else:
    print("no compiler here; pip install 'numba-cuda[cu13]' brings it")

# %% [markdown]
# The compiler has unrolled the loop: four steps in its body, and one for what is left over. PTX is
# not the last word. `ptxas` turns it into machine code, whose name for the instruction is `HMMA`,
# and `nvdisasm` shows that. Both come with NVIDIA's packages for developers, where the following
# cell looks for them.


# %%
def tool(name):
    """A program of NVIDIA's packages, or None."""
    try:
        roots = importlib.import_module("nvidia").__path__
    except ModuleNotFoundError:
        return None
    return next((path for root in roots for path in Path(root).rglob(f"bin/{name}")), None)


def disassembled(assembly):
    """Machine code for the H200, as text."""
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(assembly)
        subprocess.run([tool("ptxas"), "-arch=sm_90a", source, "-o", cubin], check=True)
        command = [tool("nvdisasm"), "-c", cubin]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if nvvm.is_available() and tool("ptxas") and tool("nvdisasm"):
    for line in disassembled(assembly).splitlines():
        if "HMMA" in line:
            print(" ".join(line.split()[1:]).rstrip("; "))
else:
    print("no ptxas and nvdisasm here: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")

# %% [markdown]
# The shape is in the name: 16 x 8 x 8, in TF32. The operands are the first registers of the result,
# of a lane's four words of A, of its two of B, and of the sums that are added to.
#
# ## On a GPU
#
# PyTorch uses the same tensor cores where it may: `precision="tf32"` in the stored rows is its
# default for convolutions.
#
# **Predict:** the relative error of eager PyTorch on the benchmark with TF32 allowed.

# %%
predicted_error = 1e-6

# %%
rows = {
    (row["variant"], row["precision"]): row
    for row in of_case(frame, "kb83", ["ieee", "tf32"])
    if row["status"] == "ok"
}
compare(predicted_error, rows["torch", "tf32"]["error"])

# %% [markdown]
# And the rungs, beside the last ones without tensor cores (`tiled`, `recompute`):

# %%
shown = ["torch", "torch.compile", "tiled", "recompute", "tensor_core", "split", "pipelined"]
table = pd.DataFrame(
    [
        {
            "variant": variant,
            "precision": precision,
            "ms": row["p50_ms"],
            "error": f"{row['error']:.1e}",
        }
        for (variant, precision), row in rows.items()
        if variant in shown
    ]
)
lacking = [name for name in shown if not any(variant == name for variant, _ in rows)]
if lacking:
    print("not measured yet:", ", ".join(lacking))
    print("numba-fused bench --case kb83 --precision ieee --precision tf32", end=" ")
    print("--out plots/data/ladder.csv")
table.set_index(["variant", "precision"]).round({"ms": 3})

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** Write `holder(row, column)`: which lane holds that element of the 16 x 8 matrix C,
# and in which word, 0 to 3? No search: a formula.


# %%
def check_1(holder):
    for lane in range(32):
        for word, place in enumerate(C_PLACES.values()):
            where = place(lane // 4, lane % 4)
            found = holder(*where)
            assert tuple(found) == (lane, word), f"{where} is in word {word} of lane {lane}"


my_holder = None  # def my_holder(row, column): ...
attempt(check_1, my_holder)

# %% [markdown]
# **Exercise 2.** Write a kernel `(a, b, c)` for one warp that computes `c = a @ b.T`, with `a` and
# `b` both 16 x 16, in two instructions `mma_half`. `ptx.pack_halves(low, high)` makes a word of two
# floats.


# %%
def check_2(kernel):
    a, b = normal(16, 16), normal(16, 16)
    try:
        c, mmas = run(kernel, a, b)
    except Exception as problem:
        raise AssertionError(message(problem)) from None
    assert not np.isnan(c).any(), f"{np.isnan(c).sum()} elements are not written"
    assert (distance := error(c, a, b.T)) < 1e-3, f"the error is {distance:.1e}"
    assert mmas == 2, f"{mmas} matrix instructions"


my_product = None  # @cuda.jit above a def
attempt(check_2, my_product)

# %% [markdown]
# **Exercise 3.** Make an instruction of your own. The PTX instruction `mul.hi.u32` gives the upper
# 32 bits of the product of two 32-bit words, `mul.hi.u32 $0, $1, $2;`. Write `upper(a, b)` with
# `@ptx.instruction(assembly, constraints, signature)` and its meaning in Python. The constraints of
# the result and two words are `"=r,r,r"`, the signature is `uint32(uint32, uint32)`.


# %%
def check_3(upper):
    @cuda.jit
    def kernel(a, b, c):
        i = cuda.grid(1)
        c[i] = upper(a[i], b[i])

    a, b = random.integers(0, 2**32, (2, 32), dtype=np.uint32)
    c = np.zeros_like(a)
    try:
        Simulator().launch(kernel, 1, 32, a, b, c)
    except Exception as problem:
        raise AssertionError(message(problem)) from None
    expected = (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)
    assert (c == expected).all(), f"{(c != expected).sum()} of 32 are wrong in the simulator"
    if nvvm.is_available():
        words = uint32[::1]
        assembly, _ = cuda.compile_ptx(kernel.py_func, (words,) * 3, cc=(9, 0, "a"))
        assert "mul.hi.u32" in assembly, "it is not in the PTX"


my_upper = None  # @ptx.instruction(...) above a def
attempt(check_3, my_upper)

# %% [markdown]
# **Exercise 4.** `product_tf32` is a single chain. Write a kernel `(a, b, c)` for one warp that
# computes `c = a @ b` in TF32 with as many matrix instructions, one for 8 of the K columns, and
# whose sums are about as good as fp32's. The values of the check have 11 bits, so that rounding to
# TF32 takes nothing away and what is left is the error of the sums.


# %%
def check_4(kernel):
    a, b = tf32(normal(16, 768)), tf32(normal(768, 8))
    chain = error(run(product_tf32, a, b)[0], a, b)
    try:
        c, mmas = run(kernel, a, b)
    except Exception as problem:
        raise AssertionError(message(problem)) from None
    distance = error(c, a, b)
    assert distance < chain / 4, f"the error is {distance:.1e}, that of a single chain {chain:.1e}"
    assert mmas == 768 // 8, f"{mmas} matrix instructions"


my_chains = None  # @cuda.jit above a def
attempt(check_4, my_chains)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_1(row, column):
    return 4 * (row % 8) + column // 2, 2 * (row // 8) + column % 2


check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_2(a, b, c):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    k = 2 * t
    a0, a1 = ptx.pack_halves(a[g, k], a[g, k + 1]), ptx.pack_halves(a[g + 8, k], a[g + 8, k + 1])
    a2 = ptx.pack_halves(a[g, k + 8], a[g, k + 9])
    a3 = ptx.pack_halves(a[g + 8, k + 8], a[g + 8, k + 9])
    for first in range(0, 16, 8):  # columns of the result, rows of b
        row = first + g
        b0 = ptx.pack_halves(b[row, k], b[row, k + 1])
        b1 = ptx.pack_halves(b[row, k + 8], b[row, k + 9])
        zero = float32(0)
        c0, c1, c2, c3 = ptx.mma_half(a0, a1, a2, a3, b0, b1, zero, zero, zero, zero)
        c[g, first + k], c[g, first + k + 1] = c0, c1
        c[g + 8, first + k], c[g + 8, first + k + 1] = c2, c3


check_2(solution_2)
print("solution 2 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@ptx.instruction("mul.hi.u32 $0, $1, $2;", "=r,r,r", uint32(uint32, uint32))
def solution_3(a, b):
    return np.uint32(int(a) * int(b) >> 32)


check_3(solution_3)
print("solution 3 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_4(a, b, c):
    g, t = cuda.laneid // 4, cuda.laneid % 4
    c0, c1, c2, c3 = float32(0), float32(0), float32(0), float32(0)
    for k in range(0, a.shape[1], 8):
        a0, a1 = ptx.to_tf32(a[g, k + t]), ptx.to_tf32(a[g + 8, k + t])
        a2, a3 = ptx.to_tf32(a[g, k + t + 4]), ptx.to_tf32(a[g + 8, k + t + 4])
        b0, b1 = ptx.to_tf32(b[k + t, g]), ptx.to_tf32(b[k + t + 4, g])
        zero = float32(0)
        s0, s1, s2, s3 = ptx.mma_tf32(a0, a1, a2, a3, b0, b1, zero, zero, zero, zero)
        c0, c1, c2, c3 = c0 + s0, c1 + s1, c2 + s2, c3 + s3
    c[g, 2 * t], c[g, 2 * t + 1] = c0, c1
    c[g + 8, 2 * t], c[g + 8, 2 * t + 1] = c2, c3


check_4(solution_4)
print("solution 4 is right")

# %% [markdown]
# **Next:** [6. Backward by recomputation](06_backward_by_recomputation.ipynb): what a backward pass
# has to know, and what it can compute again.
