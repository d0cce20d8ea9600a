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
# # 6. Backward by recomputation
#
# **After this notebook you can**
#
# * measure what autograd keeps for the backward pass, and reckon it for any size;
# * derive the chain's gradient, operator by operator, and check each step by itself;
# * read the kernels of the backward pass, predict their bytes, and count them;
# * name four wrong backward passes that a plausible test lets through, and what catches each;
# * say what recomputing costs in time and saves in memory;
# * lay its products out for tensor cores, and say what stays in registers.
#
# The operator is that of notebook 1. So far it went forward; training goes back through it, too.

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lesson import DATA, attempt, compare, message, show, show_diff
from numba import cuda, float32

import numba_fused as nf
from numba_fused import backward, bench, mistakes, plot
from numba_fused.backward import clear_kernels, tensor_core
from numba_fused.device import reductions
from numba_fused.explain import MEASURED
from numba_fused.ladder.tensor_cores import tile_shape
from numba_fused.plot.rows import of_case
from numba_fused.plot.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION
from numba_fused.simulator import Simulator

# %% [markdown]
# The problem is small, because the simulator runs every thread in Python, and two-dimensional,
# because two indices are easier to read than three. Everything is in fp64, so that a formula that
# is right agrees to 15 digits and one that is wrong does not.

# %%
generator = torch.Generator().manual_seed(6)


def normal(*shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


x, weight, bias = normal(2, 2, 7, 18), normal(4, 2, 3, 3) / 4, normal(4)
gamma, beta = 1 + 0.5 * normal(4), 0.5 * normal(4)
operands = [t.requires_grad_() for t in (x, weight, bias, gamma, beta)]

spec = nf.BlockSpec.from_arguments(
    x.shape, weight.shape, num_groups=2, dtype="float64", **bench.CHAIN
)
cap, min_value, max_value, p = spec.cap, spec.min_value, spec.max_value, spec.dropout_p
SEED = 6
print(f"x {spec.x_shape}, output {spec.output_shape}, cap {cap}, bounds {min_value}, {max_value}")

# %% [markdown]
# ## What autograd keeps
#
# The gradient of a product needs its factors, so an operator keeps tensors of the forward pass
# until the backward pass has used them. PyTorch lets us listen: `saved_tensors_hooks` calls a
# function for every tensor that is kept. Here is the eager chain, operator by operator. As before,
# `E` are the bytes of the output, which are those of every tensor in between.
#
# **Predict:** how many tensors' worth of `E` does the whole chain keep?

# %%
predicted_tensors = 1


# %%
def listening(kept, operator, call):
    """What `call` returns; what it keeps is noted by its memory, once however often it is kept."""

    def keep(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), (operator, tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return call()


def of_the_outputs_size(kept):
    return {operator: t.nbytes for operator, t in kept.values() if t.shape == spec.output_shape}


kept = {}
z = listening(kept, "convolution", lambda: F.conv2d(x, weight, bias))
h = listening(kept, "group norm", lambda: F.group_norm(z, 2, gamma, beta))
m = listening(kept, "min", lambda: torch.minimum(h, torch.tensor(cap, dtype=h.dtype)))
c = listening(kept, "clamp", lambda: m.clamp(min_value, max_value))
out = listening(kept, "dropout", lambda: F.dropout(c, p, training=True))

compare(predicted_tensors, sum(of_the_outputs_size(kept).values()) / spec.output_bytes, "E")
pd.DataFrame(
    [(operator, tuple(t.shape), t.nbytes) for operator, t in kept.values()],
    columns=["kept by", "shape", "bytes"],
)

# %% [markdown]
# The convolution keeps its operands, and `x` was there before. The norm keeps its input `z`, min
# keeps its input `h`, clamp keeps its input `m`, dropout keeps its mask. On a GPU the mask takes
# one byte an element, on the CPU PyTorch keeps it as floating-point numbers.
#
# Now the benchmark, (128, 3, 16, 64, 64) in fp32, on a GPU. Its `E` is 441 MB.
#
# **Predict:** how many MB stay in memory between the forward and the backward pass?

# %%
predicted_megabytes = 441


# %%
def kept_by_eager(spec):
    """z, h and m, a mask of a byte an element, mean and rstd; besides x and the parameters."""
    statistics = 2 * spec.batch * spec.num_groups * spec.itemsize
    return {
        "z, by the norm": spec.output_bytes,
        "h, by min": spec.output_bytes,
        "m, by clamp": spec.output_bytes,
        "mask": spec.output_bytes // spec.itemsize,
        "mean and rstd": statistics,
    }


case = bench.case_spec("kb83")
compare(predicted_megabytes, sum(kept_by_eager(case).values()) / 1e6, "MB")
print(f"x, which the layer before has made anyway: {case.x_bytes / 1e6:.0f} MB")

# %% [markdown]
# What of this is needed? `z` follows from `x` and the parameters. `h` follows from `z`, its mean
# and its standard deviation, `m` from `h`. The mask follows from the seed and the position
# (notebook 4). So whoever is ready to compute them *again* needs `x`, the parameters and the seed;
# and a mean and a reciprocal standard deviation `rstd` of each group, or the time to compute those
# again, too.
#
# The block's kernels take that way. (On the CPU `variant="auto"` means PyTorch's own operators,
# which keep what they keep.) This runs a kernel, by its name, in the simulator.
#
# **Predict:** how many tensors' worth of `E` does the block keep?

# %%
predicted_tensors = 1

# %%
block = nf.FusedConvGroupNormMinClampDropout(
    2, 4, 3, 2, min_value, max_value, p, cap=cap, dim=2, dtype=torch.float64, variant="one_kernel"
)
kept_by_block = {}
listening(kept_by_block, "the block", lambda: block(x, seed=SEED))
compare(
    predicted_tensors, sum(of_the_outputs_size(kept_by_block).values()) / spec.output_bytes, "E"
)
print("kept:", ", ".join(str(tuple(t.shape)) for _, t in kept_by_block.values()))


# %%
def kept_by_recomputing(spec):
    """Mean and rstd of each group, and the seed; besides x and the parameters."""
    return 2 * spec.batch * spec.num_groups * spec.itemsize + 8


figure, ax = plt.subplots(figsize=(7.2, 2.2))
left = 0.0
colours = SKY, GREEN, ORANGE, PURPLE, GREY
for (name, size), colour in zip(kept_by_eager(case).items(), colours, strict=True):
    ax.barh("eager PyTorch", size / 1e6, left=left, color=colour)
    if size > 0.1 * case.output_bytes:
        ax.text(left + size / 2e6, 0, name, ha="center", va="center")
    left += size / 1e6
few = kept_by_recomputing(case)
ax.barh("recomputing", few / 1e6, color=GREY)
ax.text(few / 1e6, 1, f"  mean, rstd and the seed: {few / 1e6:.3f} MB", va="center")
ax.invert_yaxis()
ax.set_xlabel("kept until the backward pass, besides x and the parameters (MB)")
plt.show()

# %% [markdown]
# ## From the output back to h
#
# Now the derivation. The backward pass is given `grad_out`, the gradient of some loss with respect
# to `out`, and goes through the operators from the last to the first. We do the same by hand, and
# let autograd do it, too; `retain_grad` makes it show the gradients on the way. Any gradient of the
# output will do. Ours grows with `h`, which will show what the norm does to a trend.

# %%
z = F.conv2d(x, weight, bias)
h = F.group_norm(z, spec.num_groups, gamma, beta, spec.eps)
c = torch.minimum(h, torch.tensor(cap, dtype=h.dtype)).clamp(min_value, max_value)
keep = torch.from_numpy(nf.keep_mask(SEED, spec.output_shape, p))
out = c * keep / (1 - p)
grad_out = 2 * h.detach() - 1 + 0.5 * normal(*out.shape)

for tensor in (z, h, c):
    tensor.retain_grad()
out.backward(grad_out)


def agree(name, found, expected):
    error = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    print(f"{name:16} relative difference from autograd's {error:.0e}")
    assert error < 1e-12, f"{name} is wrong"


# %% [markdown]
# **Dropout** multiplied by 0 or by `1 / (1 - p)`, and so does its gradient. The mask is drawn
# again, from the seed and the position:

# %%
keep_again = torch.from_numpy(nf.keep_mask(SEED, spec.output_shape, p))
print("forward's mask to the bit:", torch.equal(keep_again, keep))
grad_c = grad_out * keep_again / (1 - p)
agree("gradient of c", grad_c, c.grad)

# %% [markdown]
# And if a careless backward pass drew a *new* mask, a fair one at the right rate? Nothing
# would crash.
#
# **Predict:** by how much would the gradient of `c` be off, in per cent of its norm?

# %%
predicted_percent = 10

# %%
fresh = torch.from_numpy(nf.keep_mask(SEED + 1, spec.output_shape, p))
wrong = grad_out * fresh / (1 - p)
off = torch.linalg.vector_norm(wrong - grad_c) / torch.linalg.vector_norm(grad_c)
compare(predicted_percent, 100 * off.item(), "% off")
print(f"the square root of 2 p: {100 * np.sqrt(2 * p):.0f} %")

# %% [markdown]
# Two masks differ in a share $2p(1-p)$ of the elements, and a mask keeps $1-p$ of them: relative to
# the gradient's square the error's is $2p$. A gradient that is wrong by more than half is still no
# error message: on average over many steps it even points the right way, since the expected value
# of the mask is that of forward's.
#
# **Min and clamp** pass a value or replace it by a constant. A value that is passed has the slope
# 1, a constant has the slope 0:
#
# $$g = \begin{cases} \mathrm{grad}_c & \text{if } a < h < b \text{ and } h < \mathrm{cap} \\
#   0 & \text{elsewhere} \end{cases}$$
#
# with the bounds $a$, $b$ of the clamp. The comparisons are *strict*. Exactly at a bound the
# function has a corner and no slope; one has to choose, and PyTorch's own choice there has changed
# with its versions. Here it is zero. All comparisons with NaN are false, so its gradient is zero
# as well.

# %%
heights = torch.linspace(-2, 2, 401, dtype=torch.float64)
chain_values = heights.clamp(max=cap).clamp(min_value, max_value)
slopes = ((min_value < heights) & (heights < max_value) & (heights < cap)).double()
figure, axes = plt.subplots(2, 1, sharex=True, figsize=(7.2, 3.8))
axes[0].plot(heights, chain_values, color=BLUE, lw=2.5)
axes[0].set_ylabel("clamp(min(h, cap))\n(no unit)")
axes[1].fill_between(heights, slopes, color=SKY, step="mid")
axes[1].plot([min_value, cap], [0, 0], "o", color=VERMILION)
axes[1].text(cap + 0.08, 0.06, "0 at the bounds themselves")
axes[1].set_ylabel("slope\n(no unit)")
axes[1].set_xlabel("h, the normalised value (no unit)")
plt.show()

# %% [markdown]
# **Predict:** what share of the gradient's elements survives both the mask and the bounds? `h` has
# about mean 0 and variance 1, the bounds are -1 and 0.5.

# %%
predicted_share = 0.8

# %%
passes = (min_value < h) & (h < max_value) & (h < cap)
g = torch.where(passes, grad_c, 0.0)
compare(predicted_share, (g != 0).double().mean().item(), "of the elements")
agree("g", g, h.grad)

# %% [markdown]
# What is cut off is *replaced* by zero, and what is dropped is *multiplied* by zero. A NaN in
# `grad_out` shows the difference: at a dropped element it goes on, at one that was cut off it ends
# there. PyTorch's operators do just so, and so has to whoever replaces them.
#
# ## Back through the group norm
#
# With $\hat x = (z - \mu)\,r$, where $r$ is `rstd`, and $h = \gamma \hat x + \beta$, the
# parameters are quick. Each channel's $\gamma$ and $\beta$ act on all samples and positions, so
# their gradients are sums over those:
#
# $$d\beta = \sum g, \qquad d\gamma = \sum g\,\hat x .$$

# %%
groups = z.detach().view(spec.batch, spec.num_groups, -1)  # (samples, groups, values)
mean = groups.mean(dim=2, keepdim=True)
rstd = (groups.var(dim=2, correction=0, keepdim=True) + spec.eps).rsqrt()
xhat = ((groups - mean) * rstd).view_as(z)

over_samples_and_positions = 0, 2, 3
agree("dbeta", g.sum(over_samples_and_positions), beta.grad)
agree("dgamma", (g * xhat).sum(over_samples_and_positions), gamma.grad)

# %% [markdown]
# The gradient of `z` is the famous part. Move one value $z_i$ of a group of $n$. Its own $\hat x_i$
# moves, at a rate $r$. But it also moves the mean, by $1/n$, and with it *every* $\hat x_j$; and it
# moves the variance, which scales every $\hat x_j$. Together
#
# $$\frac{\partial \hat x_j}{\partial z_i} = r \left( \delta_{ij} - \frac{1}{n}
#   - \frac{\hat x_i\,\hat x_j}{n} \right).$$
#
# Multiply by $u_j = g_j \gamma_j$, the gradient of $\hat x_j$, and add up over $j$. Each of the
# last two terms becomes a mean over the group:
#
# $$dz_i = r \left( u_i - \mathrm{mean}(u) - \hat x_i\,\mathrm{mean}(u\,\hat x) \right).$$

# %%
u = (g * gamma.detach()[:, None, None]).view_as(groups)
xhat_of_group = xhat.view_as(groups)
mean_u = u.mean(dim=2, keepdim=True)
mean_ux = (u * xhat_of_group).mean(dim=2, keepdim=True)
dz = (rstd * (u - mean_u - xhat_of_group * mean_ux)).view_as(z)
agree("dz", dz, z.grad)

# %% [markdown]
# In pictures: `u` of one group, over $\hat x$, has a mean and a trend. Both are taken out of it.
# What they would do to $z$, shift the whole group or stretch it, the norm takes back anyway.

# %%
figure, axes = plt.subplots(1, 2, sharex=True, sharey=True, figsize=(7.2, 3.2))
panels = {"u, before": u[0, 0], "dz / rstd, after": (dz.view_as(groups) / rstd)[0, 0]}
for ax, (title, values) in zip(axes, panels.items(), strict=True):
    places = xhat_of_group[0, 0]
    slope, height = np.polyfit(places, values.detach(), 1)
    ax.plot(places, values.detach(), ".", color=BLUE, alpha=0.6)
    ends = np.array([places.min(), places.max()])
    ax.plot(ends, height + slope * ends, color=VERMILION, lw=2.5, label="mean and trend")
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("normalised value (no unit)")
axes[0].set_ylabel("gradient (no unit)")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# One more parameter: the bias of the convolution was added to every `z` of its channel, so
# $db = \sum dz$, over samples and positions. There are four of them here, two channels in each
# group.
#
# **Predict:** what is the sum of all four?

# %%
predicted_sum = 1.0

# %%
dbias = dz.sum(over_samples_and_positions)
agree("dbias", dbias, bias.grad)
print("dbias:", [round(value, 3) for value in dbias.tolist()])
compare(predicted_sum, round(dbias.sum().item(), 9))

# %% [markdown]
# Zero: a constant that is added to a whole group is subtracted again with the mean. In a norm of
# one channel a group, the bias before it would have no gradient at all, and no effect.
#
# ## Back through the convolution
#
# `z` is, for every tap of the kernel, the product of a weight with a shifted `x`, added up. So
# each tap's weight gets the sum of `dz` times the `x` that lay under the tap, and each `x` gets,
# for every tap it lay under, `dz` times the weight:

# %%
height, width = spec.output_size
dweight, dx = torch.zeros_like(weight), torch.zeros_like(x)
with torch.no_grad():
    for a in range(3):
        for b in range(3):
            window = np.s_[:, :, a : a + height, b : b + width]  # of x, under tap (a, b)
            dweight[:, :, a, b] = torch.einsum("nkhw,nchw->kc", dz, x[window])
            dx[window] += torch.einsum("nkhw,kc->nchw", dz, weight[:, :, a, b])
agree("dweight", dweight, weight.grad)
agree("dx", dx, x.grad)

# %% [markdown]
# That is the whole chain. The two gradients of a convolution need the same number of products as
# the convolution itself, each. But their *shapes* differ. In the benchmark an element of `dx` is a
# sum of at most 27 taps times 16 channels, 432 products.
#
# **Predict:** of how many products is one element of `dweight` the sum, in the benchmark?

# %%
predicted_products = 432

# %%
compare(predicted_products, case.batch * np.prod(case.output_size), "products")
print(f"and dweight has {np.prod(case.weight_shape):,} elements, dx {np.prod(case.x_shape):,}")

# %% [markdown]
# `dx` is like a convolution: many outputs, short sums, a thread for each. `dweight` is the
# opposite, a few long sums, each of which many threads have to share. How threads add up without
# losing digits was notebook 3's matter; here an order of addition is at stake as well, as we shall
# see.
#
# ## The kernels
#
# `numba_fused/backward/clear.py` is the derivation as kernels, each one idea. This device function
# is the way from `grad_out` to `g`. It computes `z` again, and with it `h`, and draws the mask
# again:

# %%
show(clear_kernels.gradient_at)

# %% [markdown]
# Two kernels call it: one that adds up `g` and `g * xhat` for each sample and channel, and, once
# the group's two means are known from these, one that writes `dz`:

# %%
show(clear_kernels.convolution_gradient_kernel)

# %% [markdown]
# From `dz` the last two take `dweight`, a block for each weight, and `dx`, a thread for each
# element. What is written in between, `dz`, is *scratch*: it has the size of the output, but it
# lives only during the call.
#
# The whole backward pass in the simulator, against autograd:

# %%
ALL = (True, True, True, True, True)  # dx, dweight, dbias, dgamma, dbeta
simulator = Simulator(count=True)
found = backward.run(*operands, grad_out, spec=spec, seed=SEED, wanted=ALL, simulator=simulator)
for name, gradient, operand in zip(backward.NAMES, found, operands, strict=True):
    agree(f"gradient of {name}", gradient, operand.grad)

# %% [markdown]
# ### Their bytes
#
# Here is what they launched. Statistics, the sums and `dz` each compute the convolution from `x`;
# the sums and `dz` read `grad_out`; the last two read `dz`.
#
# **Predict:** how often is `x` moved, and how often `E`, reads and writes together? (`dx` has the
# size of `x`.)

# %%
x_times, E_times = 2, 3
for launch in simulator.launches:
    print(launch.kernel)

# %%
counted = simulator.bytes_read + simulator.bytes_written
compare(x_times * spec.x_bytes + E_times * spec.output_bytes, counted, "bytes")
pd.DataFrame(
    [(launch.kernel, launch.bytes_read, launch.bytes_written) for launch in simulator.launches],
    columns=["kernel", "bytes read", "bytes written"],
)

# %%
ledger = backward.ledger(spec, ALL, has_statistics=False)
print(f"ledger {ledger.bytes_moved:,}, counted {counted:,}, in {ledger.launches} launches")

# %% [markdown]
# Four reads of `x` and its gradient written, four reads of `E` and `dz` written, 5 x + 5 E; what is
# left are parameters. If the forward pass hands over mean and rstd, one read of `x` and one of the
# three convolutions are saved.
#
# ### gradcheck
#
# PyTorch's `gradcheck` knows no formula. It moves the inputs by a millionth and looks at what the
# output does. One often reads that it needs dropout switched off; with a seed that fixes the mask
# it does not. The forward pass here is PyTorch's, the backward pass the kernels', and the problem a
# corner of ours:


# %%
corner = [x[:1, :, :5, :10].detach().requires_grad_(), *operands[1:]]
corner_spec = replace(spec, batch=1, input_size=(5, 10))


class ByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *operands):
        ctx.save_for_backward(*operands)
        return nf.reference(*operands, seed=SEED, num_groups=2, **bench.CHAIN)

    @staticmethod
    def backward(ctx, grad_out):
        return backward.run(*ctx.saved_tensors, grad_out, spec=corner_spec, seed=SEED, wanted=ALL)


print("gradcheck:", torch.autograd.gradcheck(ByKernels.apply, corner, fast_mode=True))

# %% [markdown]
# ## What goes wrong
#
# A wrong forward pass shows in its values. A wrong backward pass shows as a network that learns a
# little worse. The gallery has four, each a line or a few away from the right kernels. Here are
# two:

# %%
show_diff(mistakes.get("dgamma-without-xhat"))

# %%
show_diff(mistakes.get("missing-mean-terms"))

# %% [markdown]
# The second takes mean and variance for constants. What it leaves out is what the picture above
# took out, and a step along the wrong gradient still goes downhill, since the right one is a
# projection of it.
#
# **Predict:** of the four, how many pass a test that one might write?

# %%
predicted_pass = 1

# %%
names = ["dgamma-without-xhat", "missing-mean-terms", "fresh-mask", "float-atomics"]
passed = 0
for name in names:
    mistake = mistakes.get(name)
    passed += mistake.passes_naive_test()
    verdict = mistakes.examine(mistake)
    print(f"{name:20} passes {mistake.passes.story}")
    print(f"{'':20} verifier: {verdict.caught_by}; {verdict.summary}")
compare(predicted_pass, passed, "pass")

# %% [markdown]
# The last one deserves a look. Long sums tempt one to `cuda.atomic.add`: all threads add to one
# number, in whatever order they arrive. It is right to within rounding, and rounding depends on the
# order. The simulator can shuffle the order in which warps run; here `dbeta` and `dgamma` in fp32,
# under 3 schedules:


# %%
single = replace(spec, dtype="float32")
single_operands = [t.detach().float() for t in (*operands, grad_out)]


def different_results(schedules):
    wanted = (False, False, False, True, True)
    results = set()
    for schedule_seed in range(schedules):
        simulator = Simulator(schedule_seed=schedule_seed, check_races=False)
        sums = backward.run(
            *single_operands, spec=single, seed=SEED, wanted=wanted, simulator=simulator
        )
        results.add(tuple(sums[3].tolist() + sums[4].tolist()))
    return len(results)


# %% [markdown]
# **Predict:** how many different results do the 3 runs give, with atomics and as it is?

# %%
predicted_atomic, predicted_ordered = 1, 1

# %%
with mistakes.get("float-atomics").made():
    compare(predicted_atomic, different_results(3), "different results with atomics")
compare(predicted_ordered, different_results(3), "with sums in a fixed order")

# %% [markdown]
# Runs that differ in the last bit drift apart, and then nobody can say any more whether a change
# in a result comes from a change in the code. So there are no float atomics here: each block
# leaves its sum in a place of its own, and one more small kernel adds those up in order.
#
# ## Is it worth it?
#
# Compute or keep, that is a trade of time against memory. The package knows of one GPU how fast it
# copies memory, and how many fp32 operations it does in a second outside its tensor cores. Keeping
# `z` costs writing it once and reading it again. Recomputing it costs a convolution.
#
# **Predict:** on the benchmark, how many times as long as writing and reading `z` does one
# convolution take, at these rates?

# %%
predicted_ratio = 0.5
bandwidth, flop_rate = MEASURED["NVIDIA H200"]
print(f"NVIDIA H200: {bandwidth / 1e12:.2f} TB/s, {flop_rate / 1e12:.0f} TFLOP/s")

# %%
keep_ms = 1e3 * 2 * case.output_bytes / bandwidth
again_ms = 1e3 * case.flops / flop_rate
compare(predicted_ratio, again_ms / keep_ms, "times as long")
print(f"write z and read it again {keep_ms:.2f} ms, convolve again {again_ms:.2f} ms")

# %% [markdown]
# With ordinary arithmetic recomputing buys memory with time, and the clear kernels pay that price
# three times. The way out is to multiply faster, on tensor cores (notebook 5). The trade also
# depends on the shape: a convolution's products grow with its input channels and its taps, and the
# bytes of `z` do not.

# %%
rows = []
for name in bench.CASES:
    s = bench.case_spec(name)
    rows.append(
        {
            "case": name,
            "eager keeps (MB)": sum(kept_by_eager(s).values()) / 1e6,
            "recomputing keeps (MB)": kept_by_recomputing(s) / 1e6,
            "z written and read (ms)": 1e3 * 2 * s.output_bytes / bandwidth,
            "convolved again (ms)": 1e3 * s.flops / flop_rate,
        }
    )
pd.DataFrame(rows).set_index("case").round(3)

# %% [markdown]
# ## The fast variant
#
# `numba_fused/backward/tensor_core.py` has the mathematics of this notebook on tensor cores. What
# is new is where things are.
#
# `z` is never in memory. The tiles of the forward pass compute it, and it stays in the registers of
# the warp that did, while the same tile of `grad_out` arrives in shared memory. But `dz` takes the
# means of its whole group. So a tile publishes its sums, waits for those of the other tiles of its
# sample, and forms `dz` from what it still holds: `z` is computed once. All tiles of a sample must
# be on the GPU at the same time for that, as for rung 9; where they are too many, a second kernel
# convolves once more.
#
# `dz` does go to memory, because an element of `dx` or `dweight` takes `dz` from the tiles of many
# blocks. It goes there as tensor cores will want it: in halves, scaled by a power of two for each
# sample, and *channels last*, so that 16 channels of a position are eight words side by side. With
# `precision="ieee"` a second array takes what rounding to halves left over (notebook 5).
#
# **Predict:** how many bytes does the kernel that forms `dz` write then, in multiples of `E`?

# %%
predicted_dz = 0.5

# %%
fast = [normal(1, 2, 5, 10), normal(16, 2, 3, 3) / 4, normal(16), 1 + 0.5 * normal(16), normal(16)]
fast_spec = nf.BlockSpec.from_arguments(fast[0].shape, fast[1].shape, num_groups=4, **bench.CHAIN)
fast_grad_out = normal(*fast_spec.output_shape)

simulator = Simulator(count=True)
found = backward.run(
    *[t.float() for t in (*fast, fast_grad_out)],
    spec=fast_spec,
    seed=SEED,
    wanted=ALL,
    variant="tensor_core",
    simulator=simulator,
)
written = {launch.kernel: launch.bytes_written for launch in simulator.launches}
compare(predicted_dz, written["chain_kernel"] / fast_spec.output_bytes, "E")

# %% [markdown]
# Two halves of two bytes are as much as one float, and what is above 1 are the sums that tiles
# publish: much here, next to nothing in the benchmark. At this precision `dz` takes as many bytes
# as in the clear variant. But `z` is computed once less, so the whole pass moves 4 x + 4 E
# instead of 5 x + 5 E. With `precision="tf32"` the second array is not there, and of the four `E`
# only two and a half are left.
#
# In halves it must not lose digits. The gradients against fp64, beside the error of PyTorch's own
# in fp32:


# %%
def by_autograd(dtype):
    leaves = [t.to(dtype).requires_grad_() for t in fast]
    out = nf.reference(*leaves, seed=SEED, num_groups=4, **bench.CHAIN)
    return torch.autograd.grad(out, leaves, fast_grad_out.to(dtype))


def relative_errors(gradients):
    pairs = zip(gradients, by_autograd(torch.float64), strict=True)
    return [((g.double() - exact).norm() / exact.norm()).item() for g, exact in pairs]


errors = pd.DataFrame(
    {"tensor_core": relative_errors(found), "PyTorch": relative_errors(by_autograd(torch.float32))},
    index=list(backward.NAMES),
)
assert (errors["tensor_core"] < 2 * errors["PyTorch"]).all()
errors.map("{:.1e}".format)

# %% [markdown]
# A matrix instruction multiplies 16 rows by 16 columns with 16 rows by 8 columns, and adds up over
# the 16 in the middle. What goes where?
#
# * `dweight` has few elements and long sums, so the *positions* go in the middle: 16 channels of
#   `dz` at 16 positions, times `x` at these positions under 8 taps of a row. The sums of all taps
#   stay in registers while a warp goes through its positions: `dz` is read once, and nothing is
#   written on the way. A warp has several rows of `dz`, one below the other: a row of `x` that it
#   loads from shared memory serves each row of taps, with another row of `dz`.
# * `dx` has many elements. The channels of `dz` go in the middle, 8 positions are the columns, and
#   the rows could be the input channels. The benchmark has 3 of those, and 13 rows would be for
#   nothing. But a plane of `dz` feeds as many planes of `dx` as the kernel is deep. So a row is a
#   pair of an input channel and a plane. A block walks along the depth; each plane of `dz` on its
#   way completes a plane of `dx`, which is written, and whose rows start anew.
#
# **Predict:** what share of the 16 rows does `dx` fill in the benchmark, with its kernel of 3?

# %%
predicted_share = 3 / 16

# %%
tile = tile_shape(case, tensor_core.kind(case))
input_tile, weight_tile = tensor_core.InputTile(tile, planes=1), tensor_core.WeightTile(tile)
compare(predicted_share, input_tile.rows / (16 * input_tile.row_groups), "of the rows")
instructions = weight_tile.fragments * weight_tile.tap_rows
print(f"dweight: {weight_tile.row_taps} taps a row, 8 an instruction: {instructions} for all rows")

# %% [markdown]
# And on a real GPU? There autograd uses this variant where the convolution is narrow. Where it is
# wide, many products would be computed more than once: `numba_fused/backward/library_conv.py` lets
# the vendor's library convolve, once, and keeps `z` as scratch. Both have been timed, forward and
# backward pass together, in `plots/data/backward.csv`.
#
# **Predict:** how many times as fast as eager PyTorch are both passes of the benchmark, in fp32?

# %%
frame = plot.read_rows(DATA)
forward, both = (
    {row["variant"]: row for row in of_case(frame, "kb83", ["ieee"], backward=with_backward)}
    for with_backward in (False, True)
)
predicted_times = forward["torch"]["p50_ms"] / forward["auto"]["p50_ms"]
print(f"the forward pass alone: {predicted_times:.1f} times")

# %%
compare(predicted_times, both["torch"]["p50_ms"] / both["auto"]["p50_ms"], "times as fast")
for name, row in both.items():
    passes = row["p50_ms"], forward[name]["p50_ms"]
    print(f"{name:13} {passes[0]:5.2f} ms, of which the forward pass takes {passes[1]:.2f}")
plot.draw(plot.choose(["backward"])[0], frame).figure

# %% [markdown]
# The block's backward pass convolves once more, and both passes together take less time than eager
# PyTorch's forward pass. And memory? A row has the most that a call holds besides its inputs, its
# output and the gradients that it returns.
#
# **Predict** it in MB, for eager PyTorch and for the block. The defaults are what is kept from the
# forward pass, as reckoned above.

# %%
predicted_eager = sum(kept_by_eager(case).values()) / 1e6
predicted_block = kept_by_recomputing(case) / 1e6

# %%
compare(predicted_eager, both["torch"]["peak_extra_bytes"] / 1e6, "MB, eager PyTorch")
compare(predicted_block, both["auto"]["peak_extra_bytes"] / 1e6, "MB, the block")
print(f"its forward pass alone: {both['auto']['forward_peak_extra_bytes'] / 1e6:.2f} MB")
print(f"dz of a run of samples: {tensor_core.MOST_DZ_BYTES / 1e6:.0f} MB at most")

# %% [markdown]
# Eager PyTorch needs about two gradients of the size of `E` on top of what it keeps. The block
# keeps next to nothing, but `dz` has to be somewhere. It is computed for a run of samples, turned
# into their part of `dx` and `dweight`, and its memory is used again for the next run.
#
# One case proves little. These are all that have been measured, in ms, and how many times as fast
# the block is as the faster of eager PyTorch and `torch.compile`:

# %%
of_both = frame[frame["backward"].eq(True)]
table = of_both.pivot(index=["case", "precision"], columns="variant", values="p50_ms")
table = table[["torch", "torch.compile", "auto"]]
table["times"] = table[["torch", "torch.compile"]].min(axis=1) / table["auto"]
kernels = of_both[of_both["variant"] == "auto"].set_index(["case", "precision"])
table["backward by"] = kernels["differentiates"]
table.round({"torch": 3, "torch.compile": 3, "auto": 3, "times": 2})

# %%
for row in of_both[of_both["status"] == "failed"].itertuples():
    print(f"{row.case} {row.variant} {row.precision}: {row.reason}")
print(f"measured at commit {', '.join(of_both['commit'].unique())}")

# %% [markdown]
# Below 1 the block is slower: on wide convolutions, whose products are the library's in any case.
#
# A gradient that is not accurate enough counts for nothing, however fast it is: its row would have
# a reason, listed here, and no time. The sums of `dweight` run over all positions, and as a single
# chain of matrix instructions they drift (notebook 5). That is why `weight_gradient.py` gives each
# step sums of its own.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** In a first layer nobody wants `dx`. And suppose that the forward pass kept mean
# and rstd. Give `(launches, x_times, E_times)` of the clear backward pass then, reads and writes
# together, for the other four gradients.


# %%
def check_1(answer):
    launches, x_times, E_times = answer
    ledger = backward.ledger(case, (False, True, True, True, True), has_statistics=True)
    assert x_times == 3, "the sums, dz and dweight read x"
    assert E_times == 4, "two reads of grad_out, one of dz, and dz written"
    assert launches == ledger.launches, "each parameter but the weight has a launch of its own"


my_bill = None  # (launches, x_times, E_times)
attempt(check_1, my_bill)

# %% [markdown]
# **Exercise 2.** Write a kernel `(g, dbeta, positions)` for `dbeta`: `g` is flat, (N, K,
# positions) in that order, `dbeta` has K elements. There is a block of 128 threads for each
# channel. It is tried under several schedules: the bits have to be the same, so no atomics, and
# races are errors. `reductions.warp_sum(value)` gives every lane of a warp the warp's sum.


# %%
def check_2(kernel):
    values = np.random.default_rng(2).standard_normal((3, 4, 500)).astype(np.float32)
    results = set()
    for schedule_seed in range(5):
        dbeta = np.full(4, np.nan, np.float32)
        try:
            Simulator(schedule_seed=schedule_seed).launch(
                kernel, 4, 128, values.ravel(), dbeta, 500
            )
        except Exception as error:
            raise AssertionError(message(error)) from None
        assert np.allclose(dbeta, values.sum((0, 2)), atol=1e-3), "wrong sums"
        results.add(tuple(dbeta.tolist()))
    assert len(results) == 1, f"{len(results)} results under 5 schedules"


my_dbeta = None  # @cuda.jit above a def
attempt(check_2, my_dbeta)

# %% [markdown]
# **Exercise 3.** Find a gradient `u` of the normalised values of a group that is not zero, and
# with which the norm's `dz` is zero nevertheless. Give a function of `xhat`, (values,), that
# returns `u`, (values,).


# %%
def check_3(gradient):
    places = xhat_of_group[0, 0].detach()
    u = gradient(places)
    assert u.shape == places.shape, "one number for each value"
    assert torch.linalg.vector_norm(u) > 1e-3, "that is zero"
    left_over = u - u.mean() - places * (u * places).mean()
    share = (torch.linalg.vector_norm(left_over) / torch.linalg.vector_norm(u)).item()
    assert share < 1e-4, f"{100 * share:.1f} % of it arrives at z"


my_gradient = None  # def my_gradient(xhat): ...
attempt(check_3, my_gradient)

# %% [markdown]
# ## Solutions
#
# Expand a cell to read it. Each is run through the same check.

# %% jupyter={"source_hidden": true} tags=["solution"]
solution_1 = (7, 3, 4)  # sums, means, dz, dweight, and a small sum each for three parameters
check_1(solution_1)
print("solution 1 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
@cuda.jit
def solution_2(g, dbeta, positions):
    of_warps = cuda.shared.array(4, float32)
    channel, thread = cuda.blockIdx.x, cuda.threadIdx.x
    total = float32(0)
    for sample in range(g.size // (dbeta.size * positions)):
        first = (sample * dbeta.size + channel) * positions
        for i in range(thread, positions, 128):
            total += g[first + i]
    total = reductions.warp_sum(total)
    if cuda.laneid == 0:
        of_warps[thread // 32] = total
    cuda.syncthreads()
    if thread == 0:
        dbeta[channel] = (of_warps[0] + of_warps[1]) + (of_warps[2] + of_warps[3])


check_2(solution_2)
print("solution 2 is right")


# %% jupyter={"source_hidden": true} tags=["solution"]
def solution_3(xhat):
    return 2 + 0 * xhat  # a constant; 2 + 3 * xhat would do, but for eps


check_3(solution_3)
print("solution 3 is right")

# %% [markdown]
# Such a gradient wants to shift the whole group, or to stretch it, and the norm has decided both.
#
# **Next:** [7. Parameter sweeps](07_parameter_sweeps.ipynb).
