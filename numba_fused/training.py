"""A real training run: a small video classifier whose stem is the block.

Clips of handwritten digits that move and bounce are composed on the fly from the digit images
that scikit-learn brings along; each batch follows from a seed and its number alone. The classifier
is trained with several implementations of its stem, from the same parameters on the same clips:

    reference      `numba_fused.reference` with the block's own dropout masks: the judge of the loss
    torch          eager PyTorch with its own dropout, as one writes it: time, memory, and how far
                   loss curves lie apart that differ in nothing but the masks
    torch.compile  the same, compiled
    numba_fused    the block

The block is within noise if its loss is no further from the reference's than that of `torch` is.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from numba_fused import bench, ladder, results, rng
from numba_fused.ladder.rung_0_torch import draw_mask
from numba_fused.module import FusedConvGroupNormMinClampDropout
from numba_fused.plot import style
from numba_fused.reference import reference
from numba_fused.results import COMPILED, EAGER
from numba_fused.spec import check_precision

Value = TypeVar("Value")

REFERENCE, FUSED = "reference", "numba_fused"
# Where a GPU's rows and their figure go by default.
DATA = results.DATA / "training.csv"
FIGURE = results.DATA.parent / "training.png"

CHANNELS, STEM_CHANNELS, CLASSES = 3, 16, 10
# The benchmark's block, with bounds that leave something to learn from.
STEM: dict[str, Any] = {
    "num_groups": 8,
    "min_value": bench.CHAIN["min_value"],
    "max_value": bench.CHAIN["max_value"],
    "cap": bench.CHAIN["cap"],
}
DROPOUT_P = bench.CHAIN["dropout_p"]

LEARNING_RATE = 3e-3
WARM_UP = 10  # steps in which kernels are compiled and cuDNN chooses its algorithms
HELD_OUT_IMAGES, HELD_OUT_BATCHES = 297, 2

COLUMNS = {
    "implementation": "of the stem: reference, torch, torch.compile or numba_fused",
    "variant": "of the block; empty for the others",
    "step": "from 0",
    "loss": "cross entropy of the step's batch, before its update",
    "accuracy": "of the same batch, dropout acting",
    "seconds": "one step, forward to update: between CUDA events, on the CPU by the clock",
    "timed": "whether the step counts for time and memory; the first ones are warm-up",
    "peak_bytes": "torch.cuda.max_memory_allocated over the run's timed steps; empty on the CPU",
    "held_out_accuracy": "of the trained model on digits it has not seen, in eval mode",
    "batch": "clips a step",
    "clip": "channels x frames x height x width",
    "precision": "ieee (no TF32 anywhere in the step) or tf32",
    "device": "cuda or cpu",
    "seed": "of clips, parameters and masks",
    **{
        name: results.COLUMNS[name]
        for name in ("gpu", "driver", "cuda", "python", "torch", "numba", "numba_cuda", "numpy")
    },
    "commit": results.COLUMNS["commit"],
    "utc": results.COLUMNS["utc"],
}


@dataclass(frozen=True)
class Problem:
    """What is trained on what.

    Attributes
    ----------
    steps, batch : int
        Updates, and clips in each.
    seed : int
        Decides clips, initial parameters and dropout masks.
    device : str
        ``"cuda"`` or ``"cpu"``.
    precision, variant : str
        The block's; with precision ``"ieee"`` no convolution of the model uses TF32.
    frames, plane : int
        Length of a clip, at least 4, and height and width of its frames.
    zoom : int
        Pixels a side for each of a digit's 8 x 8.
    """

    steps: int
    batch: int
    seed: int = 0
    device: str = "cpu"
    precision: str = "ieee"
    variant: str = "auto"
    frames: int = 16
    plane: int = 64
    zoom: int = 4

    def __post_init__(self) -> None:
        # The stem takes two frames, pooling halves what is left.
        for name, least in {"steps": 1, "batch": 1, "frames": 4, "zoom": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, but got {self.seed}")
        if 8 * self.zoom > self.plane:
            raise ValueError(
                f"a digit of {8 * self.zoom} pixels, 8 x zoom, does not fit into a plane of "
                f"{self.plane}: use a smaller zoom or a larger plane"
            )
        check_precision(self.precision)
        if self.variant != "auto":
            ladder.get(self.variant)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, D, H, W) of one clip."""
        return (CHANNELS, self.frames, self.plane, self.plane)


def problem_for(device: str, steps: int | None, batch: int | None, **rest: Any) -> Problem:
    """The benchmark's clips for a GPU, a miniature for the CPU.

    Parameters
    ----------
    device : str
        ``"cuda"``, ``"cpu"``, or ``"auto"``: a GPU if there is one.
    steps, batch : int, optional
        None is what suits the device.
    **rest
        Of `Problem`.

    Raises
    ------
    ValueError
        An unknown device, no GPU for ``"cuda"``, or what `Problem` refuses.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device must be auto, cuda or cpu, but got {device!r}")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: see numba-fused env, or --device cpu")
        return Problem(*_given((steps, batch), (200, 128)), device=device, **rest)
    miniature = {"frames": 4, "plane": 12, "zoom": 1}
    return Problem(*_given((steps, batch), (100, 64)), device=device, **(miniature | rest))


def _given(values: Sequence[int | None], defaults: Sequence[int]) -> Iterator[int]:
    return (d if v is None else v for v, d in zip(values, defaults, strict=True))


# ---- data ---------------------------------------------------------------------------------------


class MovingDigits:
    """Clips of one digit each, in one colour on black, moving straight and bouncing off the edges.

    Parameters
    ----------
    problem : Problem
        Its seed, clip shape and device.
    held_out : bool
        Compose from the images that training never shows.

    Raises
    ------
    RuntimeError
        scikit-learn, which has the images, is not installed.
    """

    def __init__(self, problem: Problem, *, held_out: bool = False) -> None:
        images, labels = digit_images()
        part = slice(-HELD_OUT_IMAGES, None) if held_out else slice(-HELD_OUT_IMAGES)
        enlarged = images[part].repeat(problem.zoom, axis=1).repeat(problem.zoom, axis=2)
        self.problem, self.held_out = problem, held_out
        self.side = enlarged.shape[-1]
        self.images = torch.from_numpy(enlarged).to(problem.device)
        self.labels = torch.from_numpy(labels[part]).to(problem.device)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Clips (N, 3, D, H, W) in [0, 1] and labels (N,) of batch `index`.

        What is random is drawn on the host and the rest is copying and one product, so every
        device gets the same bits.
        """
        count, frames, plane = (getattr(self.problem, n) for n in ("batch", "frames", "plane"))
        random = np.random.default_rng((self.problem.seed, self.held_out, index))
        which = self._put(random.integers(len(self.images), size=count))
        colours = self._put(random.uniform(0.4, 1.0, (count, CHANNELS)).astype(np.float32))
        corners = self._put(trajectories(random, count, frames, plane - self.side))

        along = torch.arange(self.side, device=corners.device)
        rows = corners[..., 0, None, None] + along[:, None]
        columns = corners[..., 1, None, None] + along
        pixels = (rows * plane + columns).flatten(2)  # (N, D, side * side)
        grey = torch.zeros(count, frames, plane * plane, device=pixels.device)
        grey.scatter_(2, pixels, self.images[which].flatten(1)[:, None].expand(pixels.shape))
        clips = grey.view(count, 1, frames, plane, plane) * colours[..., None, None, None]
        return clips, self.labels[which]

    def _put(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.problem.device)


def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: images (1797, 8, 8), float32 in [0, 1], and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError(
            "the clips are made of scikit-learn's digit images, and it is not installed: "
            "pip install 'numba_fused[training]'"
        ) from None
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    return (images.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int64)


def trajectories(random: np.random.Generator, count: int, frames: int, room: int) -> np.ndarray:
    """Upper left corners (count, frames, 2), int64 in [0, room]; at most room / 8 a frame."""
    start = random.uniform(0, room, (count, 1, 2))
    velocity = random.uniform(-room / 8, room / 8, (count, 1, 2))
    straight = start + velocity * np.arange(frames)[:, None]
    bounced = room - np.abs(straight % (2 * max(room, 1)) - room)
    return np.rint(bounced).astype(np.int64)


# ---- model --------------------------------------------------------------------------------------


class PlainStem(nn.Module):
    """The block as one writes it in PyTorch; it draws its own masks and needs no seed."""

    def __init__(self, block: FusedConvGroupNormMinClampDropout) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = block.to_modules()

    def forward(self, x: Tensor, *, seed: Tensor | None = None) -> Tensor:  # noqa: D102
        h = self.norm(self.conv(x))
        m = torch.minimum(h, h.new_full((), STEM["cap"]))
        return self.dropout(torch.clamp(m, STEM["min_value"], STEM["max_value"]))


class ReferenceStem(PlainStem):
    """The judge, `numba_fused.reference`, with the mask that the block draws from a seed."""

    def forward(self, x: Tensor, *, seed: Tensor | None = None) -> Tensor:  # noqa: D102
        keep = None
        if self.training and seed is not None:
            shape = (*x.shape[:1], STEM_CHANNELS, *(size - 2 for size in x.shape[2:]))
            keep = draw_mask(seed, shape, DROPOUT_P)
        return reference(
            x,
            *(self.conv.weight, self.conv.bias, self.norm.weight, self.norm.bias),
            keep_mask=keep,
            dropout_p=DROPOUT_P,
            training=self.training,
            **STEM,
        )


class Classifier(nn.Module):
    """A stem at full resolution, two convolutions at that of the digit images, a maximum.

    The second convolution sees 13 of those pixels across, a digit has 8: all of it, wherever it is.
    """

    def __init__(self, stem: nn.Module, zoom: int) -> None:
        super().__init__()
        self.stem = stem
        self.head = nn.Sequential(
            nn.AvgPool3d((2, zoom, zoom)),
            nn.Conv3d(STEM_CHANNELS, 32, (3, 5, 5), stride=(1, 2, 2), padding=(1, 2, 2)),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
            nn.Conv3d(32, 64, (3, 5, 5), padding=(1, 2, 2)),
            nn.GroupNorm(8, 64),
            nn.ReLU(),
            nn.AdaptiveMaxPool3d(1),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )

    def forward(self, clips: Tensor, seed: Tensor | None = None) -> Tensor:
        """Scores (N, 10) of clips (N, 3, D, H, W); `seed` fixes the stem's dropout mask."""
        return self.head(self.stem(clips, seed=seed))


def classifier(problem: Problem, implementation: str) -> Classifier:
    """A classifier with that stem; its parameters depend on the problem's seed alone."""
    with _random_state(problem):
        block = FusedConvGroupNormMinClampDropout(
            CHANNELS,
            STEM_CHANNELS,
            kernel_size=3,
            dropout_p=DROPOUT_P,
            precision=problem.precision,
            variant=problem.variant,
            **STEM,
        )
        stems = {REFERENCE: ReferenceStem, EAGER: PlainStem, COMPILED: PlainStem}
        stem = block if implementation == FUSED else stems[implementation](block)
        return Classifier(stem, problem.zoom).to(problem.device)


# ---- training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One update; the fields are those of `COLUMNS`."""

    step: int
    loss: float
    accuracy: float
    seconds: float
    timed: bool


@dataclass(frozen=True)
class Result:
    """One training run.

    Attributes
    ----------
    implementation : str
    steps : list of Step
    held_out_accuracy : float
        On digits that training has not shown, in eval mode.
    peak_bytes : int, optional
        Most memory allocated on the GPU during the timed steps; None on the CPU.
    """

    implementation: str
    steps: list[Step]
    held_out_accuracy: float
    peak_bytes: int | None

    @property
    def losses(self) -> np.ndarray:
        """Loss of every step."""
        return np.array([step.loss for step in self.steps])

    @property
    def seconds(self) -> float:
        """Median time of a timed step."""
        return statistics.median(step.seconds for step in self.steps if step.timed)


def implementations(compiled: bool) -> list[str]:
    """What is trained, in order; torch.compile if it is wanted.

    The block comes first: what its variant cannot run is told before the others are trained.
    """
    return [FUSED, REFERENCE, EAGER, *([COMPILED] if compiled else [])]


def train(
    problem: Problem, implementation: str, on_step: Callable[[], object] = lambda: None
) -> Result:
    """Train a classifier with one implementation of its stem.

    Parameters
    ----------
    problem : Problem
    implementation : str
        One of `implementations`.
    on_step : callable
        Called after every step.

    Returns
    -------
    Result

    Raises
    ------
    RuntimeError
        scikit-learn is not installed.
    """
    digits = MovingDigits(problem)
    model = classifier(problem, implementation)
    called = torch.compile(model, dynamic=False) if implementation == COMPILED else model
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    warm_up = min(WARM_UP, problem.steps // 2)
    steps = []

    def update(clips: Tensor, labels: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        scores = called(clips, seed)
        loss = F.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
        return loss.detach(), scores.detach()

    on_gpu = problem.device == "cuda"
    alone = bench.gpu_to_itself() if on_gpu else contextlib.nullcontext()
    with alone, _random_state(problem), _arithmetic(problem):
        for index in range(problem.steps):
            clips, labels = digits.batch(index)
            seed = torch.tensor([mask_seed(problem, index)], device=problem.device)
            if on_gpu and index == warm_up:
                torch.cuda.reset_peak_memory_stats()
            (loss, scores), seconds = _timed(lambda: update(clips, labels, seed), on_gpu)  # noqa: B023
            accuracy = float((scores.argmax(1) == labels).float().mean())
            steps.append(Step(index, float(loss), accuracy, seconds, index >= warm_up))
            on_step()
        peak_bytes = torch.cuda.max_memory_allocated() if on_gpu else None
        return Result(implementation, steps, held_out_accuracy(problem, model), peak_bytes)


@torch.no_grad()
def held_out_accuracy(problem: Problem, model: Classifier) -> float:
    """Share of clips of unseen digits that a trained model names, in eval mode."""
    digits = MovingDigits(problem, held_out=True)
    model.eval()
    right = []
    for index in range(HELD_OUT_BATCHES):
        clips, labels = digits.batch(index)
        right.append((model(clips).argmax(1) == labels).float().mean())
    return float(torch.stack(right).mean())


def mask_seed(problem: Problem, step: int) -> int:
    """Seed of a step's dropout mask: of other steps and other problems, other masks."""
    return (problem.seed * 2**32 + step) % 2**63


def seed_of_shard(seed: int, first_sample: int, output_shape: Sequence[int]) -> int:
    """The seed that gives samples of a larger batch the mask they have there.

    A rank that computes samples ``first_sample ...`` of a batch passes this instead of `seed`; the
    ranks' masks, put together, are then that of the whole batch under `seed`, however many ranks
    there are. It works because a mask's stream enters its generator as ``seed + 2 * g * stream``:
    the streams of the samples before are skipped by moving the seed.

    Parameters
    ----------
    seed : int
        Of the whole batch.
    first_sample : int
        Index in it of the shard's first sample.
    output_shape : sequence of int
        (N, C, *spatial) of the block's output; N does not matter.

    Returns
    -------
    int
        In [0, 2**64).
    """
    *rows, width = output_shape[1:]
    streams = first_sample * math.prod(rows) * -(-width // rng.RUN)
    return (seed + 2 * int(rng.GOLDEN) * streams) % 2**64


@contextlib.contextmanager
def _random_state(problem: Problem) -> Iterator[None]:
    """Torch's generators from the problem's seed, and afterwards as they were."""
    devices = [torch.cuda.current_device()] if problem.device == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(problem.seed)
        yield


def _arithmetic(problem: Problem) -> contextlib.AbstractContextManager[Any]:
    """cuDNN with its fastest algorithms, and TF32 only where the problem's precision allows it."""
    return torch.backends.cudnn.flags(
        enabled=True,
        benchmark=True,
        deterministic=False,
        allow_tf32=problem.precision == "tf32",
    )


def _timed(work: Callable[[], Value], on_gpu: bool) -> tuple[Value, float]:
    """What `work` returns, and the seconds it took on its device."""
    if not on_gpu:
        began = time.perf_counter()
        return work(), time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    value = work()
    end.record()
    end.synchronize()
    return value, start.elapsed_time(end) / 1e3


# ---- what came out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How far losses lie from the reference's, mean over the steps of the absolute difference.

    Attributes
    ----------
    fused : float
        The block's, with the reference's masks.
    masks : float
        Eager PyTorch's, with masks of its own: the noise.
    """

    fused: float
    masks: float

    @property
    def ok(self) -> bool:
        """Whether the block is within the noise; NaN is not."""
        return self.fused <= self.masks


def agreement(frame: pd.DataFrame) -> Agreement:
    """Compare the loss curves in rows that have the reference, eager PyTorch and the block."""
    apart = differences(frame)
    return Agreement(fused=float(apart[FUSED].mean()), masks=float(apart[EAGER].mean()))


def differences(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """|loss - loss of the reference| at every step, by implementation."""
    losses = {name: run["loss"].to_numpy() for name, run in by_implementation(frame).items()}
    judge = losses.pop(REFERENCE)
    return {name: np.abs(loss - judge) for name, loss in losses.items()}


def by_implementation(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each run, in order of steps; the runs in the order of `LABELS`."""
    runs = {str(name): run.sort_values("step") for name, run in frame.groupby("implementation")}
    return {name: runs[name] for name in LABELS if name in runs}


def rows(problem: Problem, runs: Sequence[Result]) -> pd.DataFrame:
    """A row for each step of each run, with everything in `COLUMNS`."""
    common = {
        "batch": problem.batch,
        "clip": "x".join(map(str, problem.clip_shape)),
        "precision": problem.precision,
        "device": problem.device,
        "seed": problem.seed,
        **results.provenance(),
    }
    records = [
        {
            **common,
            "implementation": run.implementation,
            "variant": problem.variant if run.implementation == FUSED else None,
            "peak_bytes": run.peak_bytes,
            "held_out_accuracy": run.held_out_accuracy,
            **asdict(step),
        }
        for run in runs
        for step in run.steps
    ]
    return pd.DataFrame(records, columns=list(COLUMNS))


# ---- the figure ---------------------------------------------------------------------------------

LABELS = {
    REFERENCE: "PyTorch, our masks",
    EAGER: style.BASELINES[EAGER][0],
    COMPILED: style.BASELINES[COMPILED][0],
    FUSED: "numba_fused",
}
# The reference is a broad band, so that a curve upon it leaves it visible.
LINES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": "0.75", "lw": 7},
    EAGER: {"color": style.ORANGE, "lw": 1.5},
    COMPILED: {"color": style.GREEN, "lw": 1.5, "ls": "--"},
    FUSED: {"color": style.BLUE, "lw": 2},
}


@style.styled
def figure(frame: pd.DataFrame) -> Figure:
    """Draw loss curves, their distance from the reference's, time per step and peak memory.

    Parameters
    ----------
    frame : pandas.DataFrame
        Rows of one command, as `rows` gives them.

    Returns
    -------
    matplotlib.figure.Figure
    """
    runs, first = by_implementation(frame), frame.iloc[0]
    bars = ["time", "memory"] if first.device == "cuda" else ["time", "time"]
    layout: list[Any] = [["loss", "loss"], ["apart", "apart"], bars]
    drawn = style.new_figure(9.5)
    axes = drawn.subplot_mosaic(layout, height_ratios=[3, 2, 1.5])
    arithmetic = "fp32 with TF32" if first.precision == "tf32" else "fp32"
    where = first.gpu if first.device == "cuda" else "CPU"
    drawn.suptitle(f"{first.batch} clips of {first['clip']}, {arithmetic}, {where}", fontsize=14)
    for name, run in runs.items():
        axes["loss"].plot(run.step, run.loss, label=LABELS[name], **LINES[name])
    axes["loss"].set_ylabel("training loss (nats)")
    axes["loss"].set_ylim(bottom=0)
    _draw_differences(axes["apart"], differences(frame))
    timed = {name: run[run.timed] for name, run in runs.items() if name != REFERENCE}
    milliseconds = {name: 1e3 * float(run.seconds.median()) for name, run in timed.items()}
    _draw_bars(axes["time"], milliseconds, "time per step (ms)")
    if "memory" in axes:
        gigabytes = {name: run.peak_bytes.iloc[0] / 1e9 for name, run in timed.items()}
        _draw_bars(axes["memory"], gigabytes, "peak memory (GB)")
        axes["memory"].set_yticklabels([])
    style.legend_below(drawn, 2)
    return drawn


def _draw_differences(ax: Axes, apart: dict[str, np.ndarray]) -> None:
    for name, values in apart.items():
        if values.any():
            ax.plot(np.where(values > 0, values, np.nan), **LINES[name])
        else:  # which a log scale cannot show
            ax.set_title(f"{LABELS[name]}: 0 at every step", loc="right", fontsize=13)
    ax.set_yscale("log")
    ax.set_ylabel("|loss - loss of\nPyTorch, our masks|")
    ax.set_xlabel("step")


def _draw_bars(ax: Axes, values: dict[str, float], label: str) -> None:
    colours = [LINES[name]["color"] for name in values]
    bars = ax.barh(range(len(values)), list(values.values()), color=colours)
    ax.bar_label(bars, fmt="{:.3g}", padding=4)
    ax.set_yticks(range(len(values)), [LABELS[name] for name in values])
    ax.invert_yaxis()
    ax.margins(x=0.25)
    ax.set_xlabel(label)
