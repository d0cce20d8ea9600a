"""Is a kernel right? Random cases from a seed, and a judge that cannot be fooled by a constant.

A case is a shape, a set of parameters and a family of inputs, drawn from ``(seed, index)``
alone: case 17 of seed 0 is the same in every run, whatever else runs. No case is degenerate: the
bounds always leave something for the convolution to show. One in five is wide: few channels and
rows of 17 to 130 positions, over which a block's warps can share in every way.

The judge computes the block in fp64 with the kernels' own dropout mask and asks four things:

1. every element was written (the output arrives filled with one particular NaN);
2. NaN and infinities are exactly where the reference has them;
3. the relative error ``||out - ref|| / ||ref||`` is at most twice PyTorch's own in that dtype;
4. zeros from dropout are exactly where the mask has them, which 3 implies for all but tiny values.

What the call allocates arrives filled with NaN as well, so that nobody profits from what an
earlier call left in memory. Of what one right answer does not show, `check` asks two things more,
each in a quarter of the cases (they cost as much again):

5. a second run gives the same bits; in the simulator its threads take turns in a random order;
6. bounds that cross go the chain's way: which of min, lower and upper clamp comes first shows only
   where ``cap < min_value`` or ``max_value < min_value``, which no drawn case has.

`check_gradients` asks 2, 3 and, in every case, 5 of each gradient of the backward kernels. Where
rounding could move a value across a bound, the gradient of the output is zero: one value in 10**8
on the other side would outweigh all rounding errors.

PyTorch's own error is a random number too: on a handful of values its fp32 result can be right
by luck. So it is the worst of several that are equally good: PyTorch as it comes, on the same
problem mirrored in space (which sums in another order), and on inputs a last bit away; and
never less than `LEAST_ERROR`. For precision "tf32" PyTorch's convolutions, and their gradients,
take operands rounded to TF32.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from numba_fused import backward, ladder, rng
from numba_fused.reference import chain, convolution_precision, full_precision
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from numba_fused.simulator import Simulator

SIMULATOR_MACS = 30_000  # a case takes a fraction of a second in the simulator
SIMULATOR_GRADIENT_MACS = 3_000  # for the backward pass, every case of which runs twice
GPU_MACS = 200_000_000
FAMILIES = ("normal", "offset", "integers", "large", "small", "nonfinite")
THREADS_PER_BLOCK = (32, 64, 96, 128, 256, 512, 1024)
# The least error that is held against anyone: one unit in the last place in fp32. In fp64, where
# PyTorch is compared with itself and can agree by luck, 16: still 10**8 times below fp32.
LEAST_ERROR = {"float32": 2.0**-23, "float64": 2.0**-48}
TF32_FRACTION_BITS = 10
# PyTorch evaluations on nudged inputs: a few values need several, many values are an average.
SAMPLES, FEW_SAMPLES, MANY_VALUES = 8, 1, 100_000

# A quiet NaN that no arithmetic makes: what still carries these bits was never written.
POISON = {torch.float32: 0x7FC0DEAD, torch.float64: 0x7FF8DEADDEADDEAD}
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
# What an output element costs besides its taps, in multiply-adds: normalisation and mask.
OVERHEAD_MACS = 20
# Case i is run twice where i % 4 is the first of these, and with crossed bounds where the second.
REPEATED, CROSSED = 1, 3
# Case i is wide where i % 5 is this: rows of the output then have as many positions as tiles of 2
# to 8 warps do, some of which lie across the end of the row and some wholly beyond it.
WIDE = 3
WIDTHS = (17, 130)
# Where h is as close to a bound as this, rounding decides whether it lets a gradient through: that
# of fp32, and that of operands in TF32, which moves h by 3e-4 or so.
MARGIN, TF32_MARGIN = 1e-3, 1e-2
BACKWARD = "backward:"  # what the names of the backward variants begin with here

Compute: TypeAlias = Callable[["Tensors", Tensor], object]
ComputeGradients: TypeAlias = Callable[["Tensors", Tensor], Sequence[Tensor | None]]


class Tensors(NamedTuple):
    """The operands of one call, in the order of the public function."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Tensors:
        """Apply `change` to every tensor there is."""
        bias, gamma, beta = (None if t is None else change(t) for t in self[2:])
        return Tensors(change(self.x), change(self.weight), bias, gamma, beta)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One random problem.

    Attributes
    ----------
    seed, index : int
        Name the case: the same pair and `max_macs` give the same case everywhere.
    max_macs : int
        What its size was limited to.
    forced_dtype : str or None
        The dtype the caller asked for; None lets the case choose.
    arguments : dict
        The public function's keywords, in the caller's spelling (``"same"``, tuples ...).
    spec : BlockSpec
        The same, validated.
    family : str
        One of `FAMILIES`: how the inputs are distributed.
    strided : bool
        Whether x and weight come as non-contiguous views.
    threads_per_block : int
    dropout_seed : int
    """

    seed: int
    index: int
    max_macs: int
    forced_dtype: str | None
    arguments: dict[str, Any]
    spec: BlockSpec
    family: str
    strided: bool
    threads_per_block: int
    dropout_seed: int

    def tensors(self, device: str | torch.device = "cpu") -> Tensors:
        """The operands: the same values on every device."""
        generator = np.random.default_rng([self.seed, self.index])
        spec = self.spec
        x, weight, bias, gamma, beta = _values(generator, spec, self.family)
        dtype = getattr(torch, spec.dtype)

        def tensor(values: np.ndarray, strided: bool = False) -> Tensor:
            t = torch.from_numpy(values).to(device, dtype)
            return _strided(t) if strided else t

        return Tensors(
            tensor(x, self.strided),
            tensor(weight, self.strided),
            tensor(bias) if spec.has_bias else None,
            tensor(gamma) if spec.affine else None,
            tensor(beta) if spec.affine else None,
        )

    def keep_mask(self, device: str | torch.device = "cpu") -> Tensor | None:
        """The kernels' dropout mask, or None where nothing is dropped."""
        return mask_of(self.spec, self.dropout_seed, device)

    def grad_out(self, device: str | torch.device = "cpu") -> Tensor:
        """A gradient of the output, zero where rounding could move h across a bound."""
        tensors = self.tensors(device)
        generator = np.random.default_rng([self.seed, self.index, 1])
        gradient = torch.from_numpy(generator.standard_normal(self.spec.output_shape)).to(device)
        clear_of_bounds(self.spec, tensors.map(Tensor.double), gradient)
        return gradient.to(tensors.x.dtype)

    def crossed(self) -> Case:
        """The like of it with one sample and bounds that cross, either way in half of the cases."""
        spec = self.spec
        if self.index // 4 % 2:
            bounds = {"min_value": spec.max_value, "max_value": spec.min_value}
        else:
            bounds = {"cap": spec.min_value - 0.5}
        return replace(
            self, arguments=self.arguments | bounds, spec=replace(spec, batch=1, **bounds)
        )

    def reproducer(self, variant: str) -> str:
        """The command that runs this case alone, on one of `names`."""
        dtype = f" --dtype {self.forced_dtype}" if self.forced_dtype else ""
        return (
            f"numba-fused verify --seed {self.seed} --only {self.index} "
            f"--max-macs {self.max_macs}{dtype} --variant {variant}"
        )

    def __str__(self) -> str:
        spec = self.spec
        keywords = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return (
            f"x{list(spec.x_shape)} weight{list(spec.weight_shape)} {spec.dtype} {self.family}"
            f"{' strided' if self.strided else ''} bias={spec.has_bias} affine={spec.affine} "
            f"threads_per_block={self.threads_per_block} {keywords}"
        )


@dataclass(frozen=True)
class Result:
    """The judge's verdict on one case and variant.

    Attributes
    ----------
    status : str
        ``"ok"``, ``"failed"``, or ``"skipped"`` where the variant cannot run the shape.
    error, torch_error, bound : float
        Relative L2 errors against fp64: the variant's, PyTorch's, and what is allowed.
    reason : str
        Why it failed or was skipped.
    """

    status: str
    error: float = math.nan
    torch_error: float = math.nan
    bound: float = math.nan
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; a skipped case is not wrong."""
        return self.status != "failed"


# ---- drawing cases ----------------------------------------------------------------------------


def cases(
    seed: int,
    count: int,
    *,
    max_macs: int = SIMULATOR_MACS,
    dtype: str | None = None,
    first: int = 0,
) -> Iterator[Case]:
    """Cases `first` to ``first + count - 1`` of a seed.

    Parameters
    ----------
    seed, count : int
    max_macs : int
        Upper limit on a case's multiply-adds: `SIMULATOR_MACS` suits the simulator, `GPU_MACS` a
        GPU.
    dtype : str, optional
        ``"float32"`` or ``"float64"``; by default a quarter of the cases are fp64.
    first : int
        Index of the first case.

    Yields
    ------
    Case

    Raises
    ------
    ValueError
        `max_macs` is too small to hold any case.
    """
    if max_macs < 1000:
        raise ValueError(f"max_macs must be at least 1000 to hold a case, but got {max_macs}")
    for index in range(first, first + count):
        yield _case(seed, index, max_macs, dtype)


def _case(seed: int, index: int, max_macs: int, dtype: str | None) -> Case:
    draw = random.Random(f"{seed}/{index}")
    chosen = draw.choice(("float32", "float32", "float32", "float64"))
    while True:
        shapes = _shapes(draw, max_macs, wide=index % 5 == WIDE)
        if shapes is None:
            continue
        x_shape, weight_shape, arguments = shapes
        arguments |= _chain_parameters(draw, weight_shape[0])
        has_bias, affine = draw.random() < 0.7, draw.random() < 0.7
        spec = _valid_spec(
            x_shape,
            weight_shape,
            arguments,
            has_bias=has_bias,
            affine=affine,
            dtype=dtype or chosen,
        )
        if spec is not None and spec.flops <= 2 * max_macs:
            return Case(
                seed=seed,
                index=index,
                max_macs=max_macs,
                forced_dtype=dtype,
                arguments=arguments,
                spec=spec,
                family=draw.choice(FAMILIES),
                strided=draw.random() < 0.25,
                threads_per_block=draw.choice(THREADS_PER_BLOCK),
                dropout_seed=draw.randrange(2**63),
            )


def _shapes(
    draw: random.Random, max_macs: int, *, wide: bool
) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]] | None:
    """Shapes of x and weight and the convolution's keywords; None if they came out too large."""
    axes = draw.choice((1, 2, 3, 3))
    kernel = [draw.choice((1, 2, 3, 3, 3, 4, 5)) for _ in range(axes)]
    groups, channels, out_channels = _channels(draw, wide)
    batch = draw.choice((1, 2) if wide else (1, 1, 2, 3, 5))
    macs = channels // groups * math.prod(kernel) + OVERHEAD_MACS
    most_positions = max_macs // (macs * out_channels * batch)
    if most_positions < 4:
        return None

    dilation = [draw.choice((1, 1, 1, 2, 3)) for _ in range(axes)]
    stride = [draw.choice((1, 1, 1, 2, 3)) for _ in range(axes)]
    padding: int | str | list[int] = draw.choice(
        (0, "valid", 1, draw.randrange(3), [draw.randrange(3) for _ in range(axes)])
    )
    if draw.random() < 0.2:
        padding, stride = "same", [1] * axes
    output = _wide_size(draw, axes) if wide else _output_size(draw, axes, most_positions)
    if math.prod(output) > most_positions:
        return None
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    zeros = _total_padding(padding, spans)
    size = [
        max(1, (o - 1) * s + span - z + draw.randrange(s))
        for o, s, span, z in zip(output, stride, spans, zeros, strict=True)
    ]
    arguments = {
        "stride": _spelling(draw, stride),
        "padding": padding if isinstance(padding, (str, int)) else tuple(padding),
        "dilation": _spelling(draw, dilation),
        "groups": groups,
    }
    x_shape = (batch, channels, *size)
    return x_shape, (out_channels, channels // groups, *kernel), arguments


def _channels(draw: random.Random, wide: bool) -> tuple[int, int, int]:
    """Groups of the convolution, channels in and out; few where the row takes all the work."""
    if wide:
        return 1, draw.choice((1, 2, 3)), draw.choice((1, 2, 3, 4))
    groups = draw.choice((1, 1, 1, 2, 3, 4))
    channels = groups * draw.choice((1, 2, 3, 4, 5, 8))
    return groups, channels, groups * draw.choice((1, 2, 3, 4, 5, 8, 16))


def _wide_size(draw: random.Random, axes: int) -> list[int]:
    """One long row, or two where there is an axis for it; most often of whole runs.

    A warp has the positions of one run. If the row ends where the run does, what the next warp
    would compute is not zero: its taps still reach the input's edge.
    """
    sizes = [1] * axes
    if axes > 1:
        sizes[-2] = draw.choice((1, 2))
    runs = rng.RUN * draw.choice((3, 5, 6, 7))
    sizes[-1] = draw.choice((runs, runs, runs + draw.choice((-1, 1)), draw.randint(*WIDTHS)))
    return sizes


def _output_size(draw: random.Random, axes: int, most_positions: int) -> list[int]:
    """Up to `most_positions` positions spread unevenly over the axes, the last one longest."""
    positions = math.exp(draw.uniform(math.log(2), math.log(most_positions)))
    weights = [draw.uniform(0.3, 1.0) for _ in range(axes - 1)] + [draw.uniform(0.8, 1.6)]
    sizes = [max(1, int(positions ** (w / sum(weights)))) for w in weights]
    if draw.random() < 0.15:
        sizes[draw.randrange(axes)] = 1
    return sizes


def _total_padding(padding: int | str | list[int], spans: list[int]) -> list[int]:
    if padding == "same":
        return [span - 1 for span in spans]
    if isinstance(padding, list):
        return [2 * p for p in padding]
    return [2 * padding if isinstance(padding, int) else 0] * len(spans)


def _spelling(draw: random.Random, values: list[int]) -> int | tuple[int, ...]:
    """An int where all axes agree, half of the time; a tuple otherwise."""
    return values[0] if len(set(values)) == 1 and draw.random() < 0.5 else tuple(values)


def _chain_parameters(draw: random.Random, out_channels: int) -> dict[str, Any]:
    """Bounds that let the input through, and the dropout."""
    divisors = [g for g in range(1, out_channels + 1) if out_channels % g == 0]
    min_value = round(draw.uniform(-1.5, 0.3), 2)
    return {
        "num_groups": draw.choice(divisors),
        "min_value": min_value,
        "max_value": round(min_value + draw.uniform(0.3, 2.5), 2),
        "cap": round(min_value + draw.uniform(0.3, 2.5), 2),
        "dropout_p": draw.choice((0.0, 0.2, 0.2, 0.5, 1.0, round(draw.random(), 3))),
        "training": draw.random() < 0.75,
        "eps": draw.choice((1e-5, 1e-5, 1e-3)),
        "precision": draw.choice(("ieee", "ieee", "tf32")),
    }


def _valid_spec(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], arguments: dict[str, Any], **rest: Any
) -> BlockSpec | None:
    """The spec, or None for the rare draw that leaves an empty output or one value per group."""
    try:
        spec = BlockSpec.from_arguments(x_shape, weight_shape, **arguments, **rest)
    except (RuntimeError, ValueError):
        return None
    return spec if spec.constant is None and spec.group_size > 1 else None


def _values(generator: np.random.Generator, spec: BlockSpec, family: str) -> tuple[np.ndarray, ...]:
    """x, weight, bias, gamma and beta of one family, in fp64 but exact in `spec.dtype`."""
    dtype, channels = np.dtype(spec.dtype), spec.out_channels
    fan_in = math.prod(spec.weight_shape[1:])
    x = generator.standard_normal(spec.x_shape)
    weight = generator.standard_normal(spec.weight_shape) / math.sqrt(fan_in)
    bias = generator.standard_normal(channels)
    gamma = 1.0 + 0.5 * generator.standard_normal(channels)
    beta = 0.5 * generator.standard_normal(channels)
    if family == "offset":
        # Weights that sum to one a channel carry the offset to z; else channels of a group would
        # differ by it, and its variance would be too large to be destroyed.
        x += 1e3
        taps = tuple(range(1, weight.ndim))
        weight += (1 - weight.sum(axis=taps, keepdims=True)) / fan_in
    elif family == "integers":
        x = generator.integers(-4, 5, spec.x_shape)
        weight = generator.integers(-3, 4, spec.weight_shape)
        bias = generator.integers(-3, 4, channels)
    elif family == "large":
        x, weight, bias = x * 1e4, weight * 1e2, bias * 1e6
    elif family == "small":
        x, bias = x * 1e-4, bias * 1e-4
    elif family == "nonfinite":
        target = (x, weight, bias, beta)[generator.choice(4, p=(0.55, 0.15, 0.15, 0.15))]
        if target is weight and any(map(sum, spec.padding)):
            # Whether a library multiplies padding by a NaN or skips it is its own affair.
            target = x
        for _ in range(generator.integers(1, 3)):
            position = generator.integers(target.size)
            target.flat[position] = generator.choice((np.nan, np.inf, -np.inf))
    return tuple(np.asarray(v).astype(dtype) for v in (x, weight, bias, gamma, beta))


def _strided(t: Tensor) -> Tensor:
    """The same values as every second element of a buffer whose first two axes are swapped."""
    shape = (t.shape[1], t.shape[0], *t.shape[2:-1], 2 * t.shape[-1])
    buffer = torch.full(shape, torch.nan, dtype=t.dtype, device=t.device)
    view = buffer.transpose(0, 1)[..., ::2]
    view.copy_(t)
    return view


# ---- judging ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Yardstick:
    """The right answer of one call, and how far off an answer may be.

    Attributes
    ----------
    reference : Tensor
        fp64.
    torch_error : float
        PyTorch's own relative error in the call's dtype.
    dtype : str
        What the answer must come in.
    """

    reference: Tensor
    torch_error: float
    dtype: str

    @property
    def bound(self) -> float:
        """The largest error that passes."""
        # An fp64 reference has rounding errors of its own, as large as those it judges.
        factor = 3.0 if self.dtype == "float64" else 2.0
        return factor * max(self.torch_error, LEAST_ERROR[self.dtype])

    def judge(self, out: Tensor, keep_mask: Tensor | None = None) -> Result:
        """Compare `out`, which was poisoned before the call, with the reference."""
        error = relative_error(out, self.reference)
        reason = self._fault(out, keep_mask, error)
        return Result("failed" if reason else "ok", error, self.torch_error, self.bound, reason)

    def _fault(self, out: Tensor, keep_mask: Tensor | None, error: float) -> str:
        if out.shape != self.reference.shape:
            return f"shape {list(out.shape)} instead of {list(self.reference.shape)}"
        if str(out.dtype) != f"torch.{self.dtype}":
            return f"dtype {out.dtype} instead of torch.{self.dtype}"
        if places := _where(out.view(BITS[out.dtype]) == POISON[out.dtype]):
            return f"never written: {places}"
        for name, test in (
            ("NaN", torch.isnan),
            ("+Inf", torch.isposinf),
            ("-Inf", torch.isneginf),
        ):
            if places := _where(test(out) != test(self.reference)):
                return f"{name} is not where the reference has it: {places}"
        if keep_mask is not None and (places := _where(~keep_mask & (out != 0) & ~out.isnan())):
            return f"not dropped where the mask says so: {places}"
        if not error <= self.bound:
            reason = f"error {error:.2e} is above the bound {self.bound:.2e}"
            places = _where((out == 0) & (self.reference != 0))
            return f"{reason}, and zero where the reference is not: {places}" if places else reason
        return ""


def names() -> list[str]:
    """What `check` takes: the rungs in order, then ``"backward:clear"`` and its like."""
    return [*ladder.names(), *(BACKWARD + variant for variant in backward.VARIANTS)]


def check_name(variant: str) -> None:
    """Raise `ValueError` unless `variant` is one of `names`."""
    if variant not in names():
        raise ValueError(f"unknown variant {variant!r}: use one of {', '.join(names())}")


def most_macs(variant: str, device: str) -> int:
    """Multiply-adds of the largest case that suits a variant on ``"cuda"`` or ``"cpu"``."""
    if device == "cuda":
        return GPU_MACS
    return SIMULATOR_GRADIENT_MACS if variant.startswith(BACKWARD) else SIMULATOR_MACS


def check(case: Case, variant: str, device: str | torch.device = "cpu") -> Result:
    """Run one rung, or one variant of the backward pass, on one case and judge it.

    Parameters
    ----------
    case : Case
    variant : str
        One of `names`; those of the backward pass go to `check_gradients`.
    device : str or torch.device
        ``"cpu"`` runs the kernels in the simulator.

    Returns
    -------
    Result
        ``"skipped"`` where the rung has a limit that the case exceeds. An exception of the rung is
        a failure whose reason is its message. Two runs that differ are a failure, and so are
        crossed bounds that go wrong, whose errors the result then has.

    Raises
    ------
    ValueError
        No variant has that name; the message names those there are.
    """
    check_name(variant)
    if variant.startswith(BACKWARD):
        return check_gradients(case, device, variant.removeprefix(BACKWARD))
    reason = ladder.get(variant).obstacle(case.spec, ladder.capability(torch.device(device)))
    if reason is not None:
        return Result("skipped", reason=reason)

    again = _rung(case, variant, _shuffled(case)) if case.index % 4 == REPEATED else None
    result = judge(case, _rung(case, variant), device, again)
    if result.ok and case.index % 4 == CROSSED:
        crossed = case.crossed()
        found = judge(crossed, _rung(crossed, variant), device)
        if not found.ok:
            spec = crossed.spec
            bounds = f"min {spec.min_value:g}, max {spec.max_value:g}, cap {spec.cap:g}"
            return replace(found, reason=f"{found.reason}, with bounds that cross: {bounds}")
    return result


def _rung(case: Case, variant: str, simulator: Simulator | None = None) -> Compute:
    def compute(tensors: Tensors, out: Tensor) -> None:
        ladder.run(
            variant,
            *tensors,
            spec=case.spec,
            seed=case.dropout_seed,
            out=out,
            threads_per_block=case.threads_per_block,
            simulator=simulator,
        )

    return compute


def _shuffled(case: Case) -> Simulator:
    """Threads take turns in a random order; races are looked for in the first run."""
    from numba_fused.simulator import Simulator

    return Simulator(schedule_seed=case.index, check_races=False)


def judge(
    case: Case,
    compute: Compute,
    device: str | torch.device = "cpu",
    again: Compute | None = None,
) -> Result:
    """Judge any function that fills an output: ``compute(tensors, out)``.

    If there is an `again`, it must fill another output with the same bits.
    """
    tensors, keep = case.tensors(device), case.keep_mask(device)
    ruler = yardstick(case.spec, tensors, keep)
    out = poisoned(case.spec, device)
    try:
        with NanInEmpty():
            compute(tensors, out)
        result = ruler.judge(out, keep)
        if result.ok and again is not None:
            second = poisoned(case.spec, device)
            again(tensors, second)
            if places := _different(out, second):
                return replace(result, status="failed", reason=f"two runs differ: {places}")
        return result
    except Exception as problem:  # a crash is a verdict on the variant, not the end of the run
        return Result("failed", math.nan, ruler.torch_error, ruler.bound, _crash(problem))


def _crash(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}"


class NanInEmpty(TorchDispatchMode):
    """Fills with NaN what `torch.empty` and its kin allocate.

    Otherwise a kernel that reads what nobody wrote may find the right answer there, left behind
    by the call before. Integers are filled with -1.
    """

    KIN = (
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self.KIN:
            result.fill_(math.nan if result.is_floating_point() else -1)
        return result


# ---- judging gradients ------------------------------------------------------------------------


def check_gradients(
    case: Case, device: str | torch.device = "cpu", variant: str = "clear"
) -> Result:
    """Run the backward kernels on one case and judge every gradient.

    Parameters
    ----------
    case : Case
        Of any family; those with NaN or infinities are ``"skipped"``.
    device : str or torch.device
        ``"cpu"`` runs the kernels in the simulator.
    variant : str
        One of `backward.VARIANTS`.

    Returns
    -------
    Result
        Its errors are those of the gradient that comes closest to its bound, or exceeds it most.
        ``"skipped"`` where the variant has a limit that the case exceeds.

    Raises
    ------
    ValueError
        No variant has that name; the message names those there are.
    """
    capability = ladder.capability(torch.device(device))
    if (reason := backward.obstacle(variant, case.spec, capability)) is not None:
        return Result("skipped", reason=reason)
    compute, again = _backward(case, variant), _backward(case, variant, _shuffled(case))
    return judge_gradients(case, compute, device, again)


def _backward(case: Case, variant: str, simulator: Simulator | None = None) -> ComputeGradients:
    def compute(tensors: Tensors, grad_out: Tensor) -> Sequence[Tensor | None]:
        x, weight, bias, gamma, beta = (t is not None for t in tensors)
        return backward.run(
            *tensors,
            grad_out,
            spec=case.spec,
            seed=case.dropout_seed,
            wanted=(x, weight, bias, gamma, beta),
            variant=variant,
            simulator=simulator,
        )

    return compute


def judge_gradients(
    case: Case,
    compute: ComputeGradients,
    device: str | torch.device = "cpu",
    again: ComputeGradients | None = None,
) -> Result:
    """Judge any function that gives the five gradients: ``compute(tensors, grad_out)``.

    Each one's error against autograd in fp64 may be twice PyTorch's own, as the output's may. If
    there is an `again`, it must give the same bits.
    """
    if case.family == "nonfinite":
        return Result("skipped", reason="gradients of NaN and infinities are not compared")
    tensors, grad_out, keep = case.tensors(device), case.grad_out(device), case.keep_mask(device)
    rulers = gradient_yardsticks(case.spec, tensors, grad_out, keep)
    try:
        with NanInEmpty():
            found = compute(tensors, grad_out)
        result = judge_each(found, rulers)
        if result.ok and again is not None:
            return _compare_each(found, again(tensors, grad_out), result)
        return result
    except Exception as problem:  # as in `judge`
        return Result("failed", reason=_crash(problem))


def judge_each(found: Sequence[Tensor | None], rulers: Sequence[Yardstick | None]) -> Result:
    """The first of the five gradients that fails, or else the one that comes closest to its bound.

    Where there is no ruler, none is asked for.
    """
    results = []
    for name, gradient, ruler in zip(backward.NAMES, found, rulers, strict=True):
        if ruler is None:
            continue
        if gradient is None:
            return Result("failed", reason=f"gradient of {name}: none")
        result = ruler.judge(gradient)
        if not result.ok:
            return replace(result, reason=f"gradient of {name}: {result.reason}")
        results.append(result)
    return max(results, key=lambda r: r.error / r.bound)


def _compare_each(
    found: Sequence[Tensor | None], again: Sequence[Tensor | None], result: Result
) -> Result:
    for name, one, two in zip(backward.NAMES, found, again, strict=True):
        if one is not None and two is not None and (places := _different(one, two)):
            reason = f"gradient of {name}: two runs differ: {places}"
            return replace(result, status="failed", reason=reason)
    return result


def gradient_yardsticks(
    spec: BlockSpec, tensors: Tensors, grad_out: Tensor, keep_mask: Tensor | None
) -> list[Yardstick | None]:
    """As `yardstick`, for each of the five gradients; None where there is no such tensor."""

    def plain(operands: Tensors) -> Tensor:
        return chain(spec, *operands, keep_mask)

    def mirror(operands: Tensors) -> Tensor:
        return mirrored(spec, operands, keep_mask)

    generator = torch.Generator(tensors.x.device).manual_seed(0)
    exact = gradients(plain, tensors.map(Tensor.double), grad_out.double())
    with full_precision(), _rounding(spec):
        samples = [gradients(f, tensors, grad_out) for f in (plain, mirror)]
        for _ in range(SAMPLES):
            nudged = tensors.map(lambda t: _nudged(t, generator))
            samples.append(gradients(plain, nudged, _nudged(grad_out, generator)))
    if _takes_tf32(spec):
        with convolution_precision(spec):  # a library may cut off where `_rounding` rounds
            samples.append(gradients(plain, tensors, grad_out))
    rulers: list[Yardstick | None] = []
    for reference, *others in zip(exact, *samples, strict=True):
        if reference is None:
            rulers.append(None)
            continue
        errors = [relative_error(g, reference) for g in others if g is not None]
        rulers.append(Yardstick(reference, max(errors), spec.dtype))
    return rulers


def gradients(
    evaluate: Callable[[Tensors], Tensor], tensors: Tensors, grad_out: Tensor
) -> list[Tensor | None]:
    """Autograd's of the five operands; None where there is no such tensor."""
    leaves = tensors.map(lambda t: t.detach().requires_grad_())
    present = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(evaluate(leaves), present, grad_out))
    return [None if t is None else next(found) for t in leaves]


# ---- what judging takes -----------------------------------------------------------------------


def mask_of(spec: BlockSpec, seed: int, device: str | torch.device) -> Tensor | None:
    """The dropout mask of a call on `device`, or None where nothing is dropped."""
    if not spec.draws:
        return None
    mask = rng.keep_mask(seed, spec.output_shape, spec.dropout_p)
    return torch.from_numpy(mask).to(device)


def poisoned(spec: BlockSpec, device: str | torch.device) -> Tensor:
    """An output buffer in which every element is the NaN that says "never written"."""
    dtype = getattr(torch, spec.dtype)
    out = torch.empty(spec.output_shape, dtype=dtype, device=device)
    out.view(BITS[dtype]).fill_(POISON[dtype])
    return out


def yardstick(spec: BlockSpec, tensors: Tensors, keep_mask: Tensor | None) -> Yardstick:
    """The fp64 answer of a call and PyTorch's own error in the call's dtype.

    In fp64 there is nothing more precise to measure PyTorch against, so its evaluations are
    compared with the first of them: what they differ by is rounding.
    """
    wide = tensors.map(Tensor.double)
    dtype = getattr(torch, spec.dtype)
    narrow = tensors.map(lambda t: t.to(dtype))
    generator = torch.Generator(tensors.x.device).manual_seed(0)
    samples = FEW_SAMPLES if math.prod(spec.output_shape) > MANY_VALUES else SAMPLES
    with torch.no_grad():
        reference = chain(spec, *wide, keep_mask)
    with torch.no_grad(), full_precision(), _rounding(spec):
        errors = [
            relative_error(chain(spec, *narrow, keep_mask), reference),
            relative_error(mirrored(spec, narrow, keep_mask), reference),
        ]
        for _ in range(samples):
            nudged = narrow.map(lambda t: _nudged(t, generator))
            errors.append(relative_error(chain(spec, *nudged, keep_mask), reference))
    if _takes_tf32(spec):
        with torch.no_grad(), convolution_precision(spec):  # a library may cut off, not round
            errors.append(relative_error(chain(spec, *narrow, keep_mask), reference))
    return Yardstick(reference, max(errors), spec.dtype)


def clear_of_bounds(spec: BlockSpec, tensors: Tensors, gradient: Tensor, *more: float) -> None:
    """Set a gradient of the output to zero where rounding could move h across a bound, in place.

    `more` are values of h to keep clear of besides the spec's three bounds.
    """
    unbounded = replace(spec, min_value=-math.inf, max_value=math.inf, cap=math.inf, training=False)
    with torch.no_grad(), full_precision():
        h = chain(unbounded, *tensors, keep_mask=None)
    margin = TF32_MARGIN if _takes_tf32(spec) else MARGIN
    for bound in (spec.min_value, spec.max_value, spec.cap, *more):
        gradient.masked_fill_((h - bound).abs() < margin, 0.0)


def _takes_tf32(spec: BlockSpec) -> bool:
    """Whether the products may be of operands in TF32; those in fp64 stay what they are."""
    return spec.precision == "tf32" and spec.dtype == "float32"


def _rounding(spec: BlockSpec) -> AbstractContextManager[object]:
    """What PyTorch's convolutions do to their operands where the spec's precision allows it."""
    return ConvolutionsInTf32() if _takes_tf32(spec) else nullcontext()


class ConvolutionsInTf32(TorchDispatchMode):
    """Convolutions of fp32 tensors take operands rounded to TF32, and so do their gradients.

    That is what cuDNN does on tensor cores, and on the CPU nobody else. The gradient of the bias is
    a sum without products: nothing of it is rounded.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.convolution.default:
            return func(*map(rounded_to_tf32, args[:2]), *args[2:], **kwargs)
        if func is torch.ops.aten.convolution_backward.default:
            *of_products, _ = func(*map(rounded_to_tf32, args[:3]), *args[3:], **kwargs)
            of_bias = func(*args[:-1], (False, False, args[-1][2]), **kwargs)[2]
            return *of_products, of_bias
        return func(*args, **kwargs)


def rounded_to_tf32(t: Tensor) -> Tensor:
    """fp32 values rounded to the nearest with 10 fraction bits, as a tensor core takes them."""
    dropped = 23 - TF32_FRACTION_BITS
    bits = t.contiguous().view(torch.int32)
    rounded = bits + (1 << (dropped - 1)) & -(1 << dropped)
    return torch.where(torch.isfinite(t), rounded.view(torch.float32), t)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """``||out - reference|| / ||reference||`` where the reference is finite.

    Where it is zero throughout, the norm of `out` itself; infinite where only `out` is not finite.
    """
    if out.shape != reference.shape:
        return math.inf
    finite = torch.isfinite(reference)
    if not bool(finite.all()):
        out, reference = out[finite], reference[finite]
    norm = float(torch.linalg.vector_norm(reference))
    error = float(torch.linalg.vector_norm(out.double() - reference))
    error = math.inf if math.isnan(error) else error
    return error / norm if norm > 0 else error


def mirrored(spec: BlockSpec, tensors: Tensors, keep_mask: Tensor | None) -> Tensor:
    """The same answer from PyTorch on the mirror image, whose taps are summed in reverse.

    A stride can leave the end of the padded input unread; mirrored, that end is the start, and
    must go. Negative padding crops.
    """
    axes = tuple(range(2, 2 + len(spec.kernel_size)))
    padding = []
    for axis, (before, after) in enumerate(spec.padding):
        read = (spec.output_size[axis] - 1) * spec.stride[axis] + 1
        read += spec.dilation[axis] * (spec.kernel_size[axis] - 1)
        unread = spec.input_size[axis] + before + after - read
        padding.append((after - unread, before))
    mirror = replace(spec, padding=tuple(padding))
    keep = None if keep_mask is None else keep_mask.flip(axes)
    x, weight, bias, gamma, beta = tensors
    return chain(mirror, x.flip(axes), weight.flip(axes), bias, gamma, beta, keep).flip(axes)


def _nudged(t: Tensor, generator: torch.Generator) -> Tensor:
    """`t` with a quarter of its values one unit in the last place up, a quarter down."""
    draws = torch.randint(4, t.shape, device=t.device, generator=generator)
    direction = (draws == 3).to(t.dtype) - (draws == 0).to(t.dtype)
    return t * (1.0 + torch.finfo(t.dtype).eps * direction)


def _different(one: Tensor, two: Tensor) -> str:
    """Where the bits of two results differ; empty if nowhere."""
    bits = BITS[one.dtype]
    return _where(one.view(bits) != two.view(bits))


def _where(wrong: Tensor) -> str:
    """How many, and where the first is; empty if nowhere."""
    count = int(wrong.sum())
    if not count:
        return ""
    first = tuple(int(i) for i in wrong.nonzero()[0])
    return f"{count} of {wrong.numel()} elements, the first at {list(first)}"
