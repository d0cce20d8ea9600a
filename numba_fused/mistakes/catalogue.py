"""The mistakes, by what they are about. Each is a line or two of a right kernel, and their double.

The lines are quoted from the definitions they name; a line that changed there must change here.
"""

from __future__ import annotations

from numba_fused.backward.clear import _launch_chain as launch_chain
from numba_fused.backward.clear import gradients
from numba_fused.backward.clear_kernels import (
    block_sum,
    channel_sums_kernel,
    convolution_gradient_kernel,
)
from numba_fused.device.convolution import convolve_at
from numba_fused.device.pointwise import minimum
from numba_fused.device.reductions import block_moments, reciprocal_std, warp_moments
from numba_fused.ladder.rung import LaunchArguments, Operands
from numba_fused.ladder.rung_1_unfused import convolution_kernel
from numba_fused.ladder.rung_4_one_kernel import one_kernel
from numba_fused.mistakes.mistake import BACKWARD, Mistake
from numba_fused.mistakes.naive import (
    NaiveTest,
    dropout_rate,
    loss_falls,
    only_of_the_convolution,
)
from numba_fused.rng import draw, dropout

BENCHMARK = NaiveTest(
    "the benchmark's own check: with cap = min_value = 0 every right output is 0",
    {"cap": None, "min_value": 0.0},
)
WIDE_BOUNDS = NaiveTest(
    "a test whose bounds nothing reaches",
    {"cap": 9.0, "min_value": -9.0, "max_value": 9.0},
)
EVALUATION = NaiveTest(
    "a test in evaluation mode, where outputs are easy to compare", {"training": False}
)
DROPOUT_RATE = NaiveTest(
    "a test that counts zeros, and compares values where there are none", compare=dropout_rate
)
ROUND_SIZES = NaiveTest("a test on sizes that are multiples of the block's")
TYPICAL = NaiveTest("a test on normal inputs, to within 1e-2")

OPERATOR = (
    Mistake(
        name="zeros-only",
        wrong="Nothing is computed; every output is zero.",
        tempting="It is what the benchmark's bounds leave of the chain, and 100 times faster.",
        definition=one_kernel,
        line="out[first + i] = dropout(c, first + i, seed, width, drop_threshold, keep_scale)",
        instead="out[first + i] = x.dtype.type(0)",
        runs="one_kernel",
        passes=BENCHMARK,
    ),
    Mistake(
        name="missing-op",
        wrong="min(h, cap) is left out.",
        tempting="The clamp after it hides it wherever cap is not below max_value.",
        definition=one_kernel,
        line="c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])",
        instead="c = clamp(h, bounds[1], bounds[2])",
        runs="one_kernel",
        passes=NaiveTest("a test with cap = max_value", {"cap": 1.0}),
    ),
    Mistake(
        name="bounds-before-norm",
        wrong="min and clamp act on the convolution, and the norm comes last.",
        tempting="All the operators are there, and between wide bounds their order is idle.",
        definition=one_kernel,
        line="""\
h = normalise(out[first + i], mean, rstd, gamma[k], beta[k])
c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])""",
        instead="""\
m = clamp(minimum(out[first + i], bounds[0]), bounds[1], bounds[2])
c = normalise(m, mean, rstd, gamma[k], beta[k])""",
        runs="one_kernel",
        passes=WIDE_BOUNDS,
    ),
    Mistake(
        name="clamp-before-min",
        wrong="min comes after the clamp, so a cap below min_value wins over it.",
        tempting="Wherever min_value <= cap the two orders agree to the last bit.",
        definition=one_kernel,
        line="c = clamp(minimum(h, bounds[0]), bounds[1], bounds[2])",
        instead="c = minimum(clamp(h, bounds[1], bounds[2]), bounds[0])",
        runs="one_kernel",
        passes=NaiveTest("any test with min_value <= cap"),
    ),
    Mistake(
        name="nan-swallowed",
        wrong="A NaN becomes the cap: every comparison with a NaN is false.",
        tempting="For numbers it is the same minimum, written the other way round.",
        definition=minimum,
        line="return cap if h > cap else h",
        instead="return h if h < cap else cap",
        runs="one_kernel",
        passes=NaiveTest("any test without a NaN"),
    ),
)

MASK = (
    Mistake(
        name="no-scaling",
        wrong="Elements that dropout keeps are not scaled by 1 / (1 - p).",
        tempting="The zeros are right, and evaluation, where nobody scales, is right.",
        definition=dropout,
        line="""\
        keep_scale -= keep_scale  # a zero of the value's own type
    value *= keep_scale""",
        instead="""\
        keep_scale -= keep_scale  # a zero of the value's own type
        value *= keep_scale""",
        runs="one_kernel",
        passes=EVALUATION,
    ),
    Mistake(
        name="mask-in-eval",
        wrong="The threshold comes from p alone, so evaluation drops elements too.",
        tempting="In training, where one looks at dropout, nothing is wrong.",
        definition=LaunchArguments,
        line="return self.output_size[2], spec.drop_threshold, self.real(spec.keep_scale)",
        instead="""\
drop_threshold = round(spec.dropout_p * 2**32)
return self.output_size[2], drop_threshold, self.real(spec.keep_scale)""",
        runs="one_kernel",
        passes=NaiveTest("a test in training mode"),
    ),
    Mistake(
        name="one-seed-for-all",
        wrong="Every run of 16 draws from the same stream, so the mask repeats.",
        tempting="Zeros appear at the rate p, and each thread draws its own number.",
        definition=draw,
        line="s0, s1 = seed_stream(seed, uint64(row * ((width + RUN - 1) // RUN) + w // RUN))",
        instead="s0, s1 = seed_stream(seed, uint64(0))",
        runs="one_kernel",
        passes=DROPOUT_RATE,
    ),
    Mistake(
        name="grid-dependent-mask",
        wrong="The mask follows the thread and not the element: another block size, another mask.",
        tempting="Zeros appear at the rate p, the same ones in every run.",
        definition=one_kernel,
        line="out[first + i] = dropout(c, first + i, seed, width, drop_threshold, keep_scale)",
        instead="""\
thread = cuda.grid(1)
out[first + i] = dropout(c, thread, seed, width, drop_threshold, keep_scale)""",
        runs="one_kernel",
        passes=DROPOUT_RATE,
    ),
)

SHAPES = (
    Mistake(
        name="wrong-group-indexing",
        wrong="A group's first channel is taken to be the group's number.",
        tempting="A new norm has gamma 1 and beta 0 in all channels: any of them will do.",
        definition=one_kernel,
        line="first_channel = group * channels",
        instead="first_channel = group",
        runs="one_kernel",
        passes=NaiveTest("a test of a module as constructed: gamma 1, beta 0", {"affine": False}),
    ),
    Mistake(
        name="wrong-halo",
        wrong="One row beyond the input counts as inside: padding reads the next plane.",
        tempting="Without padding no tap gets there; with it, most reads still find memory.",
        definition=convolve_at,
        line="if xh < 0 or xh >= x_shape[3]:",
        instead="if xh < 0 or xh > x_shape[3]:",
        runs="one_kernel",
        passes=NaiveTest("a test with padding 0, the benchmark's"),
    ),
    Mistake(
        name="off-by-one-tail",
        wrong="One thread too many passes the guard at the end of the tensor.",
        tempting="Where the block divides the size there is no such thread.",
        definition=convolution_kernel,
        line="if index < z.size:",
        instead="if index <= z.size:",
        runs="unfused",
        passes=ROUND_SIZES,
    ),
    Mistake(
        name="tail-left-out",
        wrong="The number of blocks is rounded down: nobody computes the last elements of z.",
        tempting="Round sizes have no rest, and the rest may hold an earlier call's right values.",
        definition=Operands,
        line="return -(-self.out.numel() // self.threads_per_block)",
        instead="return max(1, self.out.numel() // self.threads_per_block)",
        runs="pointwise",
        passes=ROUND_SIZES,
    ),
    Mistake(
        name="stride-ignored",
        wrong="Windows move along w by one element, whatever the stride.",
        tempting="Shapes come out right, being computed elsewhere, and most strides are 1.",
        definition=convolve_at,
        line="first_w = int32(w * stride[2] - padding[2])",
        instead="first_w = int32(w - padding[2])",
        runs="one_kernel",
        passes=NaiveTest("a test with stride 1, the benchmark's"),
    ),
    Mistake(
        name="groups-ignored",
        wrong="Every group of the convolution reads the first group's channels.",
        tempting="The loop runs over the right number of channels, and most have one group.",
        definition=convolve_at,
        line="x_plane = int32((group * channels + c) * x_shape[2] + xd)",
        instead="x_plane = int32(c * x_shape[2] + xd)",
        runs="one_kernel",
        passes=NaiveTest("a test with groups = 1, the benchmark's"),
    ),
)

STATISTICS = (
    Mistake(
        name="variance-n-1",
        wrong="The variance is divided by n - 1, not by n.",
        tempting="It is what var() gives by default, and over large groups hardly differs.",
        definition=reciprocal_std,
        line="return float32(1) / math.sqrt(m2 / count + eps)",
        instead="return float32(1) / math.sqrt(m2 / (count - float32(1)) + eps)",
        runs="one_kernel",
        passes=TYPICAL,
    ),
    Mistake(
        name="raw-moments",
        wrong="The variance is E[x^2] - E[x]^2: a large mean leaves no digit of it.",
        tempting="It is the same formula on paper, and on inputs of mean 0 the same number.",
        definition=warp_moments,
        line="return total, total_mean, warp_sum(m2 + delta * (delta * count))",
        instead="""\
m2 = warp_sum(m2 + mean * mean * count) - total_mean * total_mean * total
return total, total_mean, m2""",
        runs="one_kernel",
        passes=TYPICAL,
    ),
)

THREADS = (
    Mistake(
        name="missing-barrier",
        wrong="Warps read each other's sums from shared memory without waiting for them.",
        tempting="One warp waits for nobody, and several may happen to keep in step.",
        definition=block_moments,
        line="cuda.syncthreads()",
        instead="",
        runs="one_kernel",
        passes=NaiveTest("a test with blocks of one warp", threads_per_block=32),
    ),
    Mistake(
        name="stale-shared-memory",
        wrong="All 32 places of the scratch are merged; only as many as there are warps hold sums.",
        tempting="Blocks of 1024 threads fill them all, and fresh memory is often zero.",
        definition=block_moments,
        line="if lane < cuda.blockDim.x // WARP:",
        instead="if lane < WARP:",
        runs="one_kernel",
        passes=NaiveTest("a test with blocks of 1024 threads", threads_per_block=1024),
    ),
    Mistake(
        name="reused-scratch",
        wrong="A second sum goes through the scratch that slower warps still read the first from.",
        tempting="It saves an array, and the readers are usually done by then.",
        definition=channel_sums_kernel,
        line="total_gx = block_sum(total_gx, scratch_gx)",
        instead="total_gx = block_sum(total_gx, scratch_g)",
        runs=BACKWARD,
        passes=NaiveTest("a test on planes of no more values than a warp has lanes"),
    ),
    Mistake(
        name="float-atomics",
        wrong="Warps add to one number as they arrive, and every order rounds its own way.",
        tempting="It is shorter, it is right to within rounding, and there is no race.",
        definition=block_sum,
        line="""\
if lane == 0:
    scratch[warp] = value
cuda.syncthreads()
value = scratch.dtype.type(0)
if lane < cuda.blockDim.x // WARP:
    value = scratch[lane]
return warp_sum(value)""",
        instead="""\
if cuda.threadIdx.x == 0:
    scratch[0] = scratch.dtype.type(0)
cuda.syncthreads()
if lane == 0:
    cuda.atomic.add(scratch, 0, value)
cuda.syncthreads()
return scratch[0]""",
        runs=BACKWARD,
        passes=TYPICAL,
    ),
)

GRADIENTS = (
    Mistake(
        name="dgamma-without-xhat",
        wrong="dgamma is the sum of g, which is dbeta, and not of g * xhat.",
        tempting="It has the right shape and size, and no other gradient depends on it.",
        definition=gradients,
        line="found[3] = sum_over_samples(launch, operands, sum_gx)",
        instead="found[3] = sum_over_samples(launch, operands, sum_g)",
        runs=BACKWARD,
        passes=NaiveTest("a test of the convolution's gradients", compare=only_of_the_convolution),
    ),
    Mistake(
        name="missing-mean-terms",
        wrong="The norm's gradient takes mean and variance for constants.",
        tempting="The right dz is a projection of this one: the loss falls all the same.",
        definition=convolution_gradient_kernel,
        line="value = affine[1] * (g * affine[2] - from_mean - xhat * from_variance)",
        instead="value = affine[1] * (g * affine[2])",
        runs=BACKWARD,
        passes=NaiveTest("a test that the loss falls", compare=loss_falls),
    ),
    Mistake(
        name="fresh-mask",
        wrong="The backward pass draws a new mask instead of forward's.",
        tempting="It is a fair mask of the right rate, and without dropout there is none.",
        definition=launch_chain,
        line="operands.seed,",
        instead="operands.seed.clone().random_(),",
        runs=BACKWARD,
        passes=NaiveTest("gradcheck with p = 0", {"dropout_p": 0.0}),
    ),
)

SUBJECTS = (OPERATOR, MASK, SHAPES, STATISTICS, THREADS, GRADIENTS)
MISTAKES = tuple(mistake for subject in SUBJECTS for mistake in subject)
