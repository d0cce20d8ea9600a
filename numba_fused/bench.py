"""Time the rungs on a GPU: check, time, check again.

A call is timed on the GPU alone, by events around replays of a CUDA graph, so that Python's
launch cost does not hide in it; that cost is measured by itself, through the public function, as
`host_us`. The graph goes through several sets of inputs and outputs that together exceed twice
the L2 cache, so every call finds its input in memory, not in cache. Outputs are filled with NaN
before they are timed and judged after it against fp64: a kernel that is fast because it is wrong
has no time here.

PyTorch runs with its own dropout (it is not charged for our mask), cudnn.benchmark on, and at
the precision that is asked of the rungs: ``"ieee"`` keeps TF32 out of cuDNN, ``"tf32"`` is
PyTorch's default, which admits it.

With ``backward`` a call is a forward pass, that of a rung through the public function, and the
gradients of all five operands, for a given gradient of the output. Every gradient is judged before
and after as the output is, by the yardstick of `verify`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import re
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from numba_fused import backward as gradient_kernels
from numba_fused import ladder, ops, plan, results, rng
from numba_fused.reference import chain, convolution_precision
from numba_fused.results import AUTO, COMPILED, EAGER, Row, variants
from numba_fused.spec import BlockSpec
from numba_fused.verify import (
    Result,
    Tensors,
    Yardstick,
    clear_of_bounds,
    gradient_yardsticks,
    gradients,
    judge_each,
    poisoned,
    relative_error,
    yardstick,
)

# Never degenerate: cap is above min_value.
CHAIN = {"min_value": -1.0, "max_value": 1.0, "cap": 0.5, "dropout_p": 0.2, "training": True}
DROPOUT_SEED = 83
SAMPLES = 30
SAMPLE_MS = 3.0  # a timed sample is at least this long: event resolution is 0.5 us
MIN_SETS = 3
# What PyTorch may be off by where it may use TF32, as it does by default.
TF32_BASELINE_BOUND = 2e-3
ALL_GRADIENTS: gradient_kernels.Wanted = (True, True, True, True, True)
# PyTorch's gradients may be off by this many times what a rung's may be. torch.compile sums in
# another order than eager, and it is here to be timed: a wrong gradient is off by far more.
BASELINE_SLACK = 5
GRADIENT_SEED = 10_000  # plus the input set; inputs have seeds from 0

Call: TypeAlias = Callable[[int], Tensor]


# ---- cases ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to time, by the parameters that a case's name or a sweep may change.

    Sizes are ints, or tuples with an int for each spatial axis, as the public function takes them.
    """

    batch: int
    in_channels: int
    input_size: tuple[int, ...]
    out_channels: int
    kernel_size: int | tuple[int, ...] = 3
    num_groups: int = 8
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    dropout_p: float = CHAIN["dropout_p"]
    min_value: float = CHAIN["min_value"]
    max_value: float = CHAIN["max_value"]
    cap: float = CHAIN["cap"]
    dtype: str = "float32"

    @property
    def plane(self) -> int | None:
        """Size of the last two axes where they are equal, of the only one of a 1-D case."""
        sizes = set(self.input_size[-2:])
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(N, C, *input_size)."""
        return (self.batch, self.in_channels, *self.input_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(K, C // groups, *kernel_size); that the groups divide C is for the spec to check."""
        kernel = self.kernel_size
        if isinstance(kernel, int):
            kernel = (kernel,) * len(self.input_size)
        return (self.out_channels, self.in_channels // max(1, self.groups), *kernel)

    def keywords(self, precision: str = "ieee") -> dict[str, Any]:
        """The keywords of the public function; the shapes and the dtype are those of x."""
        names = ("num_groups", "stride", "padding", "dilation", "groups", *BOUNDS, "dropout_p")
        return {name: getattr(self, name) for name in names} | {
            "training": CHAIN["training"],
            "precision": precision,
        }

    def spec(self, precision: str = "ieee") -> BlockSpec:
        """The validated call; raises what `BlockSpec.from_arguments` raises."""
        return BlockSpec.from_arguments(
            self.x_shape, self.weight_shape, dtype=self.dtype, **self.keywords(precision)
        )

    def vary(self, **changes: Any) -> Case:
        """The case with other parameters; ``plane`` sets the last two axes of `input_size`.

        Values may be text: ``"3"``, ``"3x1x1"``, ``"same"``, ``"0.5"``.

        Raises
        ------
        ValueError
            There is no such parameter, or it takes another kind of value.
        """
        values = {name: _parameter(name, value) for name, value in changes.items()}
        if plane := values.pop("plane", None):
            size = self.input_size
            values["input_size"] = (*size[:-2], *(plane,) * len(size[-2:]))
        return replace(self, **values)


BOUNDS = ("min_value", "max_value", "cap")
# What a name or a sweep may set, in the order in which names spell it.
PARAMETERS = ("plane", *(parameter.name for parameter in dataclasses.fields(Case)))
SIZES = ("kernel_size", "stride", "padding", "dilation", "input_size")


def _kb83(batch: int, plane: int = 64) -> Case:
    """KernelBench level 2, problem 83; its older version has a plane of 32 x 32."""
    return Case(batch=batch, in_channels=3, input_size=(16, plane, plane), out_channels=16)


def _wide(batch: int, in_channels: int, out_channels: int, *size: int, **rest: Any) -> Case:
    return Case(
        batch=batch,
        in_channels=in_channels,
        out_channels=out_channels,
        input_size=size,
        **{"padding": 1, **rest},
    )


# Named by dimension, channels in and out, and what else is special.
CASES: dict[str, Case] = {
    "kb83": _kb83(128),
    "kb83-v0": _kb83(128, 32),
    "kb83-b16": _kb83(16),
    "kb83-b1": _kb83(1),
    "3d-8-16": _wide(16, 8, 16, 32, 64, 64, num_groups=4),
    "3d-16-32": _wide(8, 16, 32, 32, 64, 64),
    "3d-32-64": _wide(4, 32, 64, 32, 64, 64),
    "3d-64-128": _wide(4, 64, 128, 16, 32, 32, num_groups=16),
    "3d-32-64-s2": _wide(4, 32, 64, 32, 64, 64, stride=2),
    "3d-32-64-k1": _wide(8, 32, 64, 32, 64, 64, kernel_size=1, padding=0),
    "3d-3-16-k5": _wide(16, 3, 16, 16, 64, 64, kernel_size=5, padding=2),
    "3d-32-depthwise": _wide(8, 32, 32, 32, 64, 64, groups=32),
    "2d-3-64": _wide(64, 3, 64, 224, 224),
    "2d-64-64": _wide(32, 64, 64, 112, 112),
    "2d-256-256": _wide(32, 256, 256, 28, 28, num_groups=32),
}
# A case with another batch, and perhaps with other parameters: kb83-b16,plane=32,dropout_p=0
NAME = re.compile(r"(?P<root>[^,]+?)(?:-b(?P<batch>[1-9]\d*))?(?:,(?P<changes>.+))?")


def case(name: str) -> Case:
    """The case that a name stands for: ``ROOT[-bN][,parameter=value]...``, ROOT one of `CASES`.

    Raises
    ------
    ValueError
        No case has that name; the message names those there are. Or a parameter does not exist.
    """
    root, batch, changes = _parts(name)
    found = CASES[root] if batch is None else CASES[root].vary(batch=batch)
    pairs = (change.partition("=") for change in changes.split(",") if change)
    return found.vary(**{parameter: value for parameter, _, value in pairs})


def case_name(base: str, **changes: Any) -> str:
    """The name of the case `base` with other parameters: one spelling for one set of them.

    Raises
    ------
    ValueError
        As `case` and `Case.vary`.
    """
    root = _parts(base)[0]
    start, wanted = CASES[root], case(base).vary(**changes)
    name = root if wanted.batch == start.batch else f"{root}-b{wanted.batch}"
    start = start.vary(batch=wanted.batch)
    moved = start.vary(plane=wanted.plane or start.plane)
    if moved.input_size == wanted.input_size != start.input_size:
        name, start = f"{name},plane={wanted.plane}", moved
    for parameter in PARAMETERS[1:]:
        if (value := getattr(wanted, parameter)) != getattr(start, parameter):
            name += f",{parameter}={_text(value)}"
    return name


def case_names(chosen: Sequence[str]) -> list[str]:
    """The chosen cases, each once; ``"all"`` stands for `CASES`.

    Raises
    ------
    ValueError
        No case has that name; the message names those there are.
    """
    wanted = [name for choice in chosen for name in (CASES if choice == "all" else [choice])]
    for name in wanted:
        case(name)
    return list(dict.fromkeys(wanted))


def case_spec(name: str, precision: str = "ieee") -> BlockSpec:
    """The spec of a named case.

    Raises
    ------
    ValueError
        No case has that name; the message names those there are.
    """
    return case(name).spec(precision)


def _parts(name: str) -> tuple[str, str | None, str]:
    """Root, batch if the name has one, and what it changes."""
    found = NAME.fullmatch(name)
    if found is None or found["root"] not in CASES:
        raise ValueError(
            f"unknown case {name!r}: use one of {', '.join(CASES)}, or kb83-bN for a batch of N, "
            f"or kb83,plane=32,dropout_p=0 for other parameters"
        )
    return found["root"], found["batch"], found["changes"] or ""


def _parameter(name: str, value: Any) -> Any:
    """A parameter's value from what a name or a sweep says."""
    if name not in PARAMETERS:
        raise ValueError(
            f"unknown parameter {name!r} of a case: use one of {', '.join(PARAMETERS)}"
        )
    if name == "dtype" or (name == "padding" and value in ("same", "valid")):
        return str(value)
    try:
        if name in (*BOUNDS, "dropout_p"):
            return float(value)
        if name not in SIZES:
            return _whole(value)
        sizes = value.split("x") if isinstance(value, str) else value
        sizes = tuple(map(_whole, sizes if isinstance(sizes, Sequence) else [sizes]))
    except (TypeError, ValueError):
        form = "ints joined by x" if name in SIZES else "one number"
        raise ValueError(f"parameter {name} of a case takes {form}, but got {value!r}") from None
    # One spelling each: a size that is the same along every axis is an int.
    return sizes[0] if len(set(sizes)) == 1 and name != "input_size" else sizes


def _whole(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError
    return int(value)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


# ---- rows -------------------------------------------------------------------------------------


def run(
    name: str,
    chosen: Sequence[str] | None = None,
    threads_per_block: int = ladder.DEFAULT_THREADS_PER_BLOCK,
    precision: str = "ieee",
    *,
    backward: bool = False,
) -> Iterator[Row]:
    """Measure variants of a benchmark case on the current GPU.

    Parameters
    ----------
    name : str
        As `case` takes it.
    chosen : sequence of str, optional
        Of `results.variants`; all by default.
    threads_per_block : int
        For the rungs that take it.
    precision : str
        ``"ieee"`` or ``"tf32"``, for the rungs and for PyTorch.
    backward : bool
        Time forward and backward pass together, through the public function, which chooses the
        launch configuration by itself.

    Yields
    ------
    dict
        One row a variant; a variant that is wrong, crashes, runs out of memory or cannot run has
        a row that says so. After an error that loses the GPU for this process the rest fail.

    Raises
    ------
    RuntimeError
        There is no GPU.
    ValueError
        Unknown case or variant, or a launch configuration with `backward`.
    """
    check_usage(name, chosen, precision)
    if backward:
        check_usual_threads(threads_per_block)
    bench = Bench()
    for variant in chosen or variants():
        yield bench.row(name, variant, threads_per_block, precision, backward=backward)


@dataclass
class Bench:
    """Measures one row after another; those of one case and precision share its workload.

    Attributes
    ----------
    lost_to : str
        The variant that lost the GPU for this process; empty as long as none has.
    """

    lost_to: str = ""
    _set_up: tuple[str, str] | None = None
    _workload: Workload | None = None
    _failure: Row = field(default_factory=dict)

    def row(
        self,
        name: str,
        variant: str,
        threads_per_block: int = ladder.DEFAULT_THREADS_PER_BLOCK,
        precision: str = "ieee",
        *,
        backward: bool = False,
    ) -> Row:
        """The row of one variant, whatever becomes of it; its seconds include a case's set-up."""
        began = time.perf_counter()
        row = case_row(name, case_spec(name, precision), backward=backward) | {"variant": variant}
        if takes_threads_per_block(variant, backward=backward):
            row["threads_per_block"] = threads_per_block
        with gpu_to_itself(), _cudnn_benchmark():
            if self._set_up != (name, precision):
                self._prepare(name, precision)
            row |= self._provenance
            work = self._workload
            if work:
                row |= work.row(backward=backward)
                row |= measure(work, variant, threads_per_block, backward=backward)
            else:
                row |= self._failure
            if work and _gpu_is_lost():
                self.lost_to = variant
                self._workload, self._failure = None, _failed(f"the GPU was lost to {variant}")
        seconds = round(time.perf_counter() - began, 3)
        return row | {"seconds": seconds, "utc": results.now()}

    def _prepare(self, name: str, precision: str) -> None:
        # The last case's tensors are gone before the next one's are made.
        self._set_up, self._workload, self._failure = (name, precision), None, {}
        try:
            self._workload = Workload.build(name, case_spec(name, precision))
        except Exception as problem:  # every variant has its row, come what may
            self._failure = _failed(f"the case could not be set up: {one_line(problem)}")

    @functools.cached_property
    def _provenance(self) -> Row:
        return results.provenance()


def takes_threads_per_block(variant: str, *, backward: bool = False) -> bool:
    """Whether `threads_per_block` is an axis of the variant: the public function chooses it."""
    if backward or variant in (COMPILED, AUTO):
        return False
    return ladder.get(variant).takes_threads_per_block


@contextlib.contextmanager
def gpu_to_itself() -> Iterator[None]:
    """Wait until no other process or thread of this user times anything on the current GPU.

    The operating system lets go of the lock when its holder ends, however that comes about.
    """
    name = f"numba_fused-{os.getuid()}-{results.gpu_uuid() or 'no-gpu'}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def check_usage(name: str, chosen: Sequence[str] | None = None, precision: str = "ieee") -> None:
    """Raise what `run` would raise, before anything is built."""
    case_spec(name, precision)
    for variant in chosen or ():
        check_variant(variant)
    check_gpu()


def check_gpu() -> None:
    """Raise `RuntimeError` unless there is a GPU to time on."""
    if not torch.cuda.is_available():
        raise RuntimeError("timing needs a CUDA GPU and a torch built for it: see numba-fused env")


def check_usual_threads(threads_per_block: int) -> None:
    """Raise `ValueError` for a launch configuration that the public function does not take."""
    usual = ladder.DEFAULT_THREADS_PER_BLOCK
    if threads_per_block != usual:
        raise ValueError(
            f"threads_per_block={threads_per_block} does not go with backward, which is timed "
            f"through the public function: it launches blocks of {usual}. Leave one of them out"
        )


def check_variant(variant: str) -> None:
    """Raise `ValueError` unless `variant` can be timed."""
    if variant not in (COMPILED, AUTO):
        ladder.get(variant)


def case_row(name: str, spec: BlockSpec, *, backward: bool = False) -> Row:
    """The columns that follow from the case alone."""
    return {
        "case": name,
        "x_shape": _text(spec.x_shape),
        "weight_shape": _text(spec.weight_shape),
        "stride": _text(spec.stride),
        "padding": "x".join(f"{a}" if a == b else f"{a}:{b}" for a, b in spec.padding),
        "dilation": _text(spec.dilation),
        "groups": spec.groups,
        "num_groups": spec.num_groups,
        **{name: getattr(spec, name) for name in BOUNDS},
        "dropout_p": spec.dropout_p if spec.draws else 0.0,
        "backward": backward,
        "dtype": spec.dtype,
        "precision": spec.precision,
        "compulsory_bytes": compulsory_bytes(spec, backward=backward),
    }


def compulsory_bytes(spec: BlockSpec, *, backward: bool) -> int:
    """Fewest bytes that forward moves; with `backward`, that both passes move.

    The backward pass reads x, the parameters and the output's gradient, and writes a gradient of
    x and of the parameters.
    """
    if not backward:
        return spec.compulsory_bytes
    return spec.compulsory_bytes + spec.output_bytes + gradient_bytes(spec) * 2


def gradient_bytes(spec: BlockSpec) -> int:
    """Bytes of the gradients of x, weight, bias, gamma and beta."""
    return spec.x_bytes + spec.parameter_bytes


@dataclass
class Workload:
    """One case on one GPU: rotating inputs and outputs, and the right answers of two of them."""

    name: str
    spec: BlockSpec
    inputs: list[Tensors]
    outs: list[Tensor]
    seed: Tensor
    keep_mask: Tensor | None
    yardsticks: tuple[Yardstick, Yardstick]
    copy_bytes_per_second: float

    @classmethod
    def build(cls, name: str, spec: BlockSpec) -> Workload:
        """Draw the inputs and compute the fp64 answers on the current GPU."""
        sets = input_sets(spec, torch.cuda.get_device_properties(0).L2_cache_size)
        inputs = [random_inputs(spec, index) for index in range(sets)]
        keep_mask = None
        if spec.draws:
            mask = keep_mask_on_host(DROPOUT_SEED, spec.output_shape, spec.dropout_p)
            keep_mask = torch.from_numpy(mask).to("cuda")
        return cls(
            name=name,
            spec=spec,
            inputs=inputs,
            outs=[poisoned(spec, "cuda") for _ in range(sets)],
            seed=torch.tensor([DROPOUT_SEED], device="cuda"),
            keep_mask=keep_mask,
            yardsticks=(
                yardstick(spec, inputs[0], keep_mask),
                yardstick(spec, inputs[-1], keep_mask),
            ),
            copy_bytes_per_second=copy_bandwidth(),
        )

    def row(self, *, backward: bool = False) -> Row:
        """The columns that were measured with the case."""
        return {
            "input_sets": len(self.inputs),
            "copy_gb_per_s": self.copy_bytes_per_second / 1e9,
            "floor_ms": self.floor_ms(backward=backward),
            "torch_error": self.yardsticks[0].torch_error,
        }

    def floor_ms(self, *, backward: bool = False) -> float:
        """Time to copy the compulsory bytes."""
        moved = compulsory_bytes(self.spec, backward=backward)
        return 1e3 * moved / self.copy_bytes_per_second

    @functools.cached_property
    def differentiated(self) -> Differentiated:
        """What the backward pass takes besides: made for the first row that asks for it."""
        return Differentiated.build(self.spec, self.inputs, self.keep_mask)


@dataclass(frozen=True)
class Differentiated:
    """A workload's operands as leaves of autograd, and the right gradients of two input sets.

    Attributes
    ----------
    leaves : list of list of Tensor
        The five operands of each input set, in its memory.
    grad_outs : list of Tensor
        The gradient of the output of each set.
    yardsticks : tuple of list of Yardstick
        For each of the five gradients, of the first and of the last set.
    """

    leaves: list[list[Tensor]]
    grad_outs: list[Tensor]
    yardsticks: tuple[list[Yardstick | None], list[Yardstick | None]]

    @classmethod
    def build(
        cls, spec: BlockSpec, inputs: Sequence[Tensors], keep_mask: Tensor | None
    ) -> Differentiated:
        """Draw the gradients of the output and differentiate in fp64."""
        grad_outs = [random_grad_out(spec, tensors, i) for i, tensors in enumerate(inputs)]
        return cls(
            leaves=[
                [t.detach().requires_grad_() for t in tensors if t is not None]
                for tensors in inputs
            ],
            grad_outs=grad_outs,
            yardsticks=(
                gradient_yardsticks(spec, inputs[0], grad_outs[0], keep_mask),
                gradient_yardsticks(spec, inputs[-1], grad_outs[-1], keep_mask),
            ),
        )


# Drawn on the host; cases of one output shape share it.
keep_mask_on_host = functools.lru_cache(maxsize=1)(rng.keep_mask)


def input_sets(spec: BlockSpec, l2_bytes: int) -> int:
    """How many sets of inputs and outputs together exceed twice the L2 cache."""
    return max(MIN_SETS, math.ceil(2 * l2_bytes / spec.compulsory_bytes) + 1)


def random_inputs(spec: BlockSpec, index: int) -> Tensors:
    """Set `index` of a case's inputs, on the current GPU."""
    generator = torch.Generator("cuda").manual_seed(index)
    dtype = getattr(torch, spec.dtype)

    def normal(shape: Sequence[int], scale: float = 1.0, offset: float = 0.0) -> Tensor:
        values = torch.randn(tuple(shape), dtype=dtype, device="cuda", generator=generator)
        return offset + scale * values

    channels = (spec.out_channels,)
    return Tensors(
        normal(spec.x_shape),
        normal(spec.weight_shape, 1 / math.sqrt(math.prod(spec.weight_shape[1:]))),
        normal(channels),
        normal(channels, 0.5, 1.0),
        normal(channels, 0.5),
    )


def random_grad_out(spec: BlockSpec, tensors: Tensors, index: int) -> Tensor:
    """The gradient of the output for input set `index`, zero where it could not be judged.

    That is close to a bound, and close to zero: there PyTorch's output does not tell whether its
    own dropout kept the value.
    """
    x = tensors.x
    generator = torch.Generator(x.device).manual_seed(GRADIENT_SEED + index)
    gradient = torch.randn(spec.output_shape, dtype=x.dtype, device=x.device, generator=generator)
    clear_of_bounds(spec, tensors, gradient, 0.0)
    return gradient


# ---- variants ---------------------------------------------------------------------------------


def measure(
    workload: Workload,
    variant: str,
    threads_per_block: int = ladder.DEFAULT_THREADS_PER_BLOCK,
    *,
    backward: bool = False,
) -> Row:
    """The columns that depend on the variant."""
    row: Row = {"status": "ok"}
    baseline = _measure_baseline_step if backward else _measure_baseline
    try:
        if variant == COMPILED:
            return row | baseline(workload, variant)
        rung = ladder.get(resolve(variant, workload.spec))
        if variant == AUTO:
            row["runs"], threads_per_block = rung.name, ladder.DEFAULT_THREADS_PER_BLOCK
        if reason := rung.obstacle(workload.spec, ladder.capability()):
            return row | {"status": "skipped", "reason": reason}
        if not backward:  # a block size is that of the forward pass
            ledger = rung.ledger(workload.spec, threads_per_block)
            row |= {"launches": ledger.launches, "ledger_bytes": ledger.bytes_moved}
            if rung.takes_threads_per_block:
                row["threads_per_block"] = threads_per_block
        if variant == EAGER:
            return row | baseline(workload, variant)
        if backward:
            row |= both_passes(workload.spec, rung)
            return row | _measure_variant_step(workload, variant)
        return row | _measure_rung(workload, variant, rung.name, threads_per_block)
    except Exception as problem:  # a crash is a row with its reason, not a hole
        return row | _failed(one_line(problem))
    finally:
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost
            torch.cuda.empty_cache()


def both_passes(spec: BlockSpec, rung: ladder.Rung) -> Row:
    """Row columns: who differentiates, and both passes' ledgers together where there are two."""
    variant = plan.choose_backward(spec)
    if variant is None:
        return {"differentiates": EAGER}
    first = rung.ledger(spec)
    second = gradient_kernels.ledger(
        spec, ALL_GRADIENTS, has_statistics=rung.keeps_statistics, variant=variant
    )
    return {
        "differentiates": variant,
        "launches": first.launches + second.launches,
        "ledger_bytes": first.bytes_moved + second.bytes_moved,
    }


def resolve(variant: str, spec: BlockSpec) -> str:
    """The rung behind a variant: what the plan chooses for ``"auto"``."""
    return plan.choose(spec) if variant == AUTO else variant


def public_block(name: str, variant: str, precision: str, seed: Tensor) -> Callable[..., Tensor]:
    """The public function with a case's parameters: a function of the five operands."""
    return functools.partial(
        ops.fused_conv_group_norm_min_clamp_dropout,
        seed=seed,
        variant=variant,
        **case(name).keywords(precision),
    )


def _measure_rung(workload: Workload, variant: str, rung: str, threads_per_block: int) -> Row:
    spec, (first, last) = workload.spec, workload.yardsticks
    block = public_block(workload.name, variant, spec.precision, workload.seed)

    def call(index: int) -> Tensor:
        return ladder.run(
            rung,
            *workload.inputs[index],
            spec=spec,
            seed=workload.seed,
            out=workload.outs[index],
            threads_per_block=threads_per_block,
        )

    def public_call(index: int) -> Tensor:
        with torch.no_grad():
            return block(*workload.inputs[index])

    for out in workload.outs:
        out.copy_(poisoned(spec, out.device))
    before = first.judge(call(0), workload.keep_mask)
    row: Row = {"error": before.error, "error_bound": before.bound}
    if not before.ok:
        return row | _failed(before.reason)
    public = first.judge(public_call(0), workload.keep_mask)
    if not public.ok:
        return row | _failed(f"by the public function: {public.reason}")
    sets = len(workload.inputs)
    row |= {
        "peak_extra_bytes": peak_extra_bytes(public_call, spec.output_bytes),
        "host_us": host_us(public_call, sets),
        **gpu_time(call, sets),
    }
    after = last.judge(workload.outs[-1], workload.keep_mask)
    row["error"] = max(before.error, after.error)
    if not after.ok:
        return row | _failed(f"after timing: {after.reason}")
    return row | _plausible(row["p50_ms"], workload.floor_ms())


def _measure_baseline(workload: Workload, variant: str) -> Row:
    spec, sets = workload.spec, len(workload.inputs)
    outs: list[Tensor | None] = [None] * sets  # kept, so that no call finds its output in L2
    bound = workload.yardsticks[0].bound if spec.precision == "ieee" else TF32_BASELINE_BOUND
    function = torch_chain(variant)

    def call(index: int) -> Tensor:
        with torch.no_grad():
            out = outs[index] = function(spec, *workload.inputs[index])
        return out

    # The flag rules when torch.compile compiles, when cuDNN chooses, and when either runs.
    with convolution_precision(spec):
        error, reason = _baseline_error(workload, call(0), 0, bound)
        row: Row = {"error": error, "error_bound": bound}
        if reason:
            return row | _failed(reason)
        row |= {
            "peak_extra_bytes": peak_extra_bytes(call, spec.output_bytes),
            "host_us": host_us(call, sets),
            **gpu_time(call, sets),
        }
    last = outs[-1]
    assert last is not None
    error_after, reason = _baseline_error(workload, last, sets - 1, bound)
    row["error"] = max(error, error_after)
    if reason:
        return row | _failed(f"after timing: {reason}")
    return row | _plausible(row["p50_ms"], workload.floor_ms())


@dataclass
class Step:
    """A forward and a backward pass on an input set; the last results of every set are kept.

    Attributes
    ----------
    forward : callable
        Called with the five operands, gives the output.
    work : Differentiated
    results : list of list of Tensor
        Of every set: the output and the five gradients; empty before its first call.
    """

    forward: Callable[..., Tensor]
    work: Differentiated
    results: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.results = [[] for _ in self.work.leaves]

    def __call__(self, index: int) -> Tensor:
        """Both passes on input set `index`; gives the output."""
        out = self.only_forward(index)
        found = torch.autograd.grad(out, self.work.leaves[index], self.work.grad_outs[index])
        # Nothing of autograd's graph is kept: its nodes belong to the stream of this call, and one
        # that a later call found again would bring that stream into a capture.
        self.results[index] = [out.detach(), *found]
        return self.results[index][0]

    def only_forward(self, index: int) -> Tensor:
        """The output, with all that backward needs."""
        return self.forward(*self.work.leaves[index])

    def poison(self) -> None:
        """Fill the results with NaN where they are."""
        for of_set in self.results:
            for tensor in of_set:
                tensor.fill_(math.nan)


def _measure_variant_step(workload: Workload, variant: str) -> Row:
    """Forward by the variant, backward as the public function does it."""
    forward = public_block(workload.name, variant, workload.spec.precision, workload.seed)

    def judge(results: list[Tensor], place: int) -> Row:
        out, *of_operands = results
        found = workload.yardsticks[place].judge(out, workload.keep_mask)
        rulers = workload.differentiated.yardsticks[place]
        return _judged(found, judge_each(of_operands, rulers))

    return _measure_step(workload, Step(forward, workload.differentiated), judge)


def _measure_baseline_step(workload: Workload, variant: str) -> Row:
    """PyTorch's forward and backward, judged under the mask that its own dropout drew."""
    spec = workload.spec
    function = torch_chain(variant)
    bound = workload.yardsticks[0].bound if spec.precision == "ieee" else TF32_BASELINE_BOUND

    def judge(results: list[Tensor], place: int) -> Row:
        out, *of_operands = results
        error, reason = _baseline_error(workload, out, place, bound)
        found = Result("failed" if reason else "ok", error, bound=bound, reason=reason)
        return _judged(found, judge_each(of_operands, _baseline_rulers(workload, out, place)))

    with convolution_precision(spec):
        step = Step(functools.partial(function, spec), workload.differentiated)
        return _measure_step(workload, step, judge)


def _measure_step(workload: Workload, step: Step, judge: Callable[[list[Tensor], int], Row]) -> Row:
    """Check, time and check a step; `judge` takes results and the place of their input set."""
    spec, sets = workload.spec, len(workload.inputs)
    step(0)
    before = judge(step.results[0], 0)
    if "reason" in before:
        return before
    row = before | {
        "forward_peak_extra_bytes": peak_extra_bytes(step.only_forward, spec.output_bytes),
        "peak_extra_bytes": peak_extra_bytes(step, spec.output_bytes + gradient_bytes(spec)),
        "host_us": host_us(step, sets),
        **gpu_time(step, sets, step.poison),
    }
    after = judge(step.results[-1], -1)
    row |= _worse(before, after)
    if "reason" in after:
        return row | _failed(f"after timing: {after['reason']}")
    return row | _plausible(row["p50_ms"], workload.floor_ms(backward=True))


def _judged(out: Result, gradients: Result) -> Row:
    """The errors of an output and of its gradients, and what is wrong with them."""
    row: Row = {
        "error": out.error,
        "error_bound": out.bound,
        "gradient_error": gradients.error,
        "gradient_error_bound": gradients.bound,
    }
    reason = out.reason or gradients.reason
    return row | (_failed(reason) if reason else {})


def _worse(before: Row, after: Row) -> Row:
    """Of two judgements the larger errors; gradients have bounds of their own."""
    nearer = max(before, after, key=lambda r: r["gradient_error"] / r["gradient_error_bound"])
    return {
        "error": max(before["error"], after["error"]),
        "gradient_error": nearer["gradient_error"],
        "gradient_error_bound": nearer["gradient_error_bound"],
    }


def _baseline_rulers(workload: Workload, out: Tensor, place: int) -> list[Yardstick]:
    """Yardsticks of the gradients under the mask that shows in PyTorch's output."""
    work, tensors = workload.differentiated, workload.inputs[place]
    keep_mask = out != 0 if workload.spec.draws else None
    wide, grad_out = tensors.map(Tensor.double), work.grad_outs[place].double()
    exact = gradients(lambda t: chain(workload.spec, *t, keep_mask), wide, grad_out)
    return [
        replace(ruler, reference=reference, torch_error=BASELINE_SLACK * ruler.torch_error)
        for ruler, reference in zip(work.yardsticks[place], exact, strict=True)
        if ruler is not None and reference is not None  # inputs are drawn for every operand
    ]


def native_chain(
    spec: BlockSpec,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    """The chain as one writes it in PyTorch, with PyTorch's own dropout."""
    c = chain(spec, x, weight, bias, gamma, beta, None)
    return F.dropout(c, spec.dropout_p, spec.training)


def torch_chain(variant: str) -> Callable[..., Tensor]:
    """`native_chain`, eager or compiled: a function of a spec and the five operands."""
    return compiled_chain() if variant == COMPILED else native_chain


def compiled_chain() -> Callable[..., Tensor]:
    """`native_chain` by torch.compile, afresh: after 8 shapes of a function it gives up on it."""
    torch.compiler.reset()
    return torch.compile(native_chain, dynamic=False)


def _baseline_error(workload: Workload, out: Tensor, index: int, bound: float) -> tuple[float, str]:
    """Error of an output with PyTorch's own mask, against the answer under that same mask."""
    spec = workload.spec
    kept = out != 0
    with torch.no_grad():
        wide = workload.inputs[index].map(Tensor.double)
        unmasked = chain(replace(spec, training=False), *wide, None)
    error = relative_error(out, unmasked * (kept * spec.keep_scale))
    if not error <= bound:
        return error, f"error {error:.2e} is above the bound {bound:.2e}"
    rate, expected = float(kept.double().mean()), 1 - spec.dropout_p * spec.draws
    if abs(rate - expected) > 6 * math.sqrt(0.25 / kept.numel()) + 1e-4:
        return error, f"keeps {rate:.4f} of the elements, not {expected:.4f}"
    return error, ""


def _plausible(p50_ms: float, floor_ms: float) -> Row:
    """Nothing beats the floor; what seems to has been measured wrongly."""
    if p50_ms >= 0.97 * floor_ms:
        return {}
    return _failed(
        f"{p50_ms:.4f} ms is below the memory floor of {floor_ms:.4f} ms: measured wrongly"
    )


def _failed(reason: str) -> Row:
    return {"status": "failed", "reason": reason}


def one_line(problem: Exception) -> str:
    """What went wrong, in one line that a table can hold."""
    if isinstance(problem, torch.OutOfMemoryError):
        return f"out of memory: {' '.join(str(problem).split('. ')[:2])}"
    first_line = str(problem).strip().partition("\n")[0]
    return textwrap.shorten(f"{type(problem).__name__}: {first_line}", 200)


def _gpu_is_lost() -> bool:
    """Whether this process can no longer use the GPU: some CUDA errors leave it to no one."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# ---- timing -----------------------------------------------------------------------------------


def gpu_time(call: Call, sets: int, poison: Callable[[], None] = lambda: None) -> Row:
    """GPU time of one call, as row columns.

    Parameters
    ----------
    call : callable
        ``call(index)`` queues one call on input set `index`.
    sets : int
        Number of input sets to rotate through.
    poison : callable
        Spoils results that calls have left, in the memory that replays will write.
    """
    try:
        replay, method = _captured(call, sets), "graph"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # something in the call cannot be captured
        torch.cuda.synchronize()
        replay, method = (lambda: [call(index) for index in range(sets)]), "launches"
    poison()
    _event_ms(replay)  # the first replay uploads the graph
    inner = max(1, math.ceil(SAMPLE_MS / _event_ms(replay)))

    def sample() -> None:
        for _ in range(inner):
            replay()

    times = [_event_ms(sample) / (inner * sets) for _ in range(SAMPLES)]
    p20, p50, p80 = (float(p) for p in np.percentile(times, (20, 50, 80)))
    return {
        "p20_ms": p20,
        "p50_ms": p50,
        "p80_ms": p80,
        "method": method,
        "samples": SAMPLES,
    }


def _captured(call: Call, sets: int) -> Callable[[], object]:
    """A CUDA graph of one call on every set; calls are warm already."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for index in range(sets):
            call(index)
    return graph.replay


def _event_ms(work: Callable[[], object]) -> float:
    """GPU time between events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def host_us(call: Call, sets: int) -> float:
    """How long a call keeps Python busy: few enough of them that the queue never fills."""
    samples = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for index in range(8):
            call(index % sets)
        samples.append((time.perf_counter() - start) / 8)
    torch.cuda.synchronize()
    return 1e6 * float(np.median(samples))


def peak_extra_bytes(call: Call, result_bytes: int) -> int:
    """Most device memory that one call holds besides its inputs and its results."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    call(0)
    # What was requested: what was allocated for it includes up to 1 MiB of rounding a tensor.
    held = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    return held - before["requested_bytes.all.current"] - result_bytes


def copy_bandwidth(size: int = 2**30) -> float:
    """Bytes per second, read plus written, of a large copy on the current GPU."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [_event_ms(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * size / (1e-3 * float(np.median(times[2:])))


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN choose its fastest algorithm, as a careful PyTorch user would."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
