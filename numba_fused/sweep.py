"""Sweeps: measure along axes, resumably, most informative cases first.

A sweep is declared as a `Sweep`, in Python or as YAML::

    name: batch
    about: From one sample to a thousand.
    base: kb83                                  # what no axis changes is this case's
    axes:
      batch: {from: 1, to: 1024, factor: 2}     # a logarithmic range; or a list: [1, 16, 128]
    fixed: {padding: same}
    where: [batch * out_channels <= 4096]       # pandas' query language, on all parameters
    variants: [torch, torch.compile, auto]      # all by default
    precisions: [ieee, tf32]
    backward: [false, true]                     # the forward pass alone, and with the backward pass

Axes and fixed values are the parameters of `bench.Case`, ``plane``, ``threads_per_block``, or
``case``: whole cases by name. Everything is checked before anything is measured.

The rows go to a CSV file, each as soon as it is measured: what a file holds is not measured
again, so a sweep that was interrupted, by whatever, goes on where it stopped. The columns and their
units are `results.COLUMNS`. `load` gives the newest row of everything as a tidy frame, with
a column for each parameter.

The measuring is `bench`'s. It happens in this process, one row after another, or on the workers
of a Dask cluster: see `numba_fused.cluster`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd

from numba_fused import bench, ladder, results
from numba_fused.results import COMPILED, Key, Row
from numba_fused.spec import BlockSpec, check_precision, check_threads_per_block

if TYPE_CHECKING:
    from distributed import Client

# Called with the fields of a `Key`; gives its row.
Measure: TypeAlias = Callable[..., Row]
SHIPPED = Path(__file__).parent / "sweeps"
# What an axis may be called besides the parameters of a case.
LAUNCH_AXES = ("case", "threads_per_block")


# ---- declaring --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What to measure; valid once it exists.

    Attributes
    ----------
    name : str
    about : str
        One sentence.
    base : str
        Name of the case that everything not on an axis and not fixed is taken from.
    axes : mapping
        Of a parameter's name to its values: a sequence, or a mapping with ``from``, ``to`` and
        ``factor`` for a logarithmic range. Every combination is measured.
    fixed : mapping
        Of a parameter's name to its one value.
    where : sequence of str
        Conditions in the language of `pandas.DataFrame.query` that a combination must meet.
    variants : sequence of str
        Of `results.variants`; empty for all.
    precisions : sequence of str
    backward : sequence of bool
        With the backward pass, `threads_per_block` changes nothing: see `bench.run`.

    Raises
    ------
    ValueError, TypeError
        A name, value or condition that means nothing, or a combination that cannot be computed.
    """

    name: str
    about: str = ""
    base: str = "kb83"
    axes: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    where: Sequence[str] = ()
    variants: Sequence[str] = ()
    precisions: Sequence[str] = ("ieee",)
    backward: Sequence[bool] = (False,)

    def __post_init__(self) -> None:
        with self._naming_it():
            for variant in self.variants:
                bench.check_variant(variant)
            for precision in self.precisions:
                check_precision(precision)
            _check_backward(self.backward)
            for threads in self._values.get("threads_per_block", ()):
                check_threads_per_block(threads)
            if not self.levels:
                raise ValueError("nothing is left to measure: loosen `where`")
            for case, precision in dict.fromkeys((k.case, k.precision) for k in self.levels):
                _check_case(case, precision)

    @classmethod
    def read(cls, source: str | Path) -> Sweep:
        """The sweep of a YAML file, or one of the `shipped` ones by its name.

        Raises
        ------
        ValueError, TypeError, OSError
            There is no such sweep or file, or it declares nothing sensible.
        RuntimeError
            PyYAML is not installed.
        """
        path = shipped().get(str(source), Path(source))
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"unknown sweep {str(source)!r}: use one of {', '.join(shipped())}, or a .yaml file"
            )
        declared = _load_yaml(path)
        known = {parameter.name for parameter in dataclasses.fields(cls)}
        if not isinstance(declared, dict) or not declared.keys() <= known:
            extra = sorted(set(declared) - known) if isinstance(declared, dict) else []
            raise ValueError(
                f"{path} must be a mapping with some of: {', '.join(sorted(known))}"
                + (f"; it has {', '.join(map(str, extra))}" if extra else "")
            )
        return cls(**{"name": path.stem, **declared})

    @functools.cached_property
    def levels(self) -> dict[Key, int]:
        """What is measured, and how early: level 0 first, the coarse grid before the fine one."""
        frame = self._combinations()
        for condition in self.where:
            try:
                frame = frame.query(condition, local_dict={}, global_dict={})
            except Exception as problem:  # whatever pandas makes of it
                raise ValueError(f"condition {condition!r} under where: {problem}") from None
        found: dict[Key, int] = {}
        for line in frame.to_dict("records"):
            takes = bench.takes_threads_per_block(line["variant"], backward=line["backward"])
            key = Key(
                case=line["case"],
                variant=line["variant"],
                precision=line["precision"],
                threads_per_block=line["threads_per_block"] if takes else None,
                backward=line["backward"],
            )
            level: int = line["level"]
            found[key] = min(level, found.get(key, level))
        return found

    def _combinations(self) -> pd.DataFrame:
        """A line for each combination: all parameters of its case, how to launch, its level."""
        values = self._values
        ranks = {axis: self._ranks(axis) for axis in self.axes}
        fixed = {"threads_per_block": [ladder.DEFAULT_THREADS_PER_BLOCK]}
        # Precisions last but for what shares a workload: cases that differ in nothing else share
        # the dropout mask, which is drawn on the host.
        loops = {
            **(fixed | values),
            "precision": self.precisions,
            "backward": self.backward,
            "variant": self.variants or results.variants(),
        }
        lines = []
        for point in itertools.product(*loops.values()):
            line = dict(zip(loops, point, strict=True))
            changes = {k: v for k, v in line.items() if k in bench.PARAMETERS}
            name = bench.case_name(line.get("case", self.base), **changes)
            case = bench.case(name)
            level = sum(ranks[axis][line[axis]] for axis in self.axes)
            about_case = {"plane": case.plane, **dataclasses.asdict(case), "case": name}
            lines.append({**line, **about_case, "level": level})
        return pd.DataFrame(lines)

    @functools.cached_property
    def _values(self) -> dict[str, list[Any]]:
        """The values of every axis, and the one of everything fixed."""
        allowed = (*LAUNCH_AXES, *bench.PARAMETERS)
        for name in (*self.axes, *self.fixed):
            if name not in allowed:
                raise ValueError(f"unknown axis {name!r}: use one of {', '.join(allowed)}")
        if both := self.axes.keys() & self.fixed.keys():
            raise ValueError(f"{', '.join(sorted(both))} cannot be an axis and fixed as well")
        axes = {name: _axis(name, values) for name, values in self.axes.items()}
        return axes | {name: [value] for name, value in self.fixed.items()}

    def _ranks(self, axis: str) -> dict[Any, int]:
        """How late each value of an axis comes; names and the like have no order: all first."""
        values = self._values[axis]
        if axis == "case" or any(isinstance(v, (str, tuple)) for v in values):
            return dict.fromkeys(values, 0)
        known = ladder.DEFAULT_THREADS_PER_BLOCK
        if axis != "threads_per_block":
            known = getattr(bench.case(self.base), axis)
        start = values.index(known) if known in values else None
        return dict(zip(values, coarse_to_fine(len(values), start), strict=True))

    @contextlib.contextmanager
    def _naming_it(self) -> Iterator[None]:
        """Put the sweep's name before what is wrong with it."""
        try:
            yield
        except (ValueError, RuntimeError, TypeError) as problem:
            kind = TypeError if isinstance(problem, TypeError) else ValueError
            raise kind(f"sweep {self.name}: {problem}") from None


def shipped() -> dict[str, Path]:
    """The sweeps that come with the package: files by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def coarse_to_fine(count: int, start: int | None = None) -> list[int]:
    """How late each of `count` values in a row is measured.

    The one at `start` first, then the ends, then the middle, the middles of the halves and so on:
    wherever a sweep stops, it has seen the whole axis.
    """
    levels = {0: 1, count - 1: 1}
    gaps, level = [(0, count - 1)], 2
    while gaps:
        halves = [(low, (low + high) // 2, high) for low, high in gaps if high - low > 1]
        levels |= {middle: level for _, middle, _ in halves}
        gaps = [gap for low, middle, high in halves for gap in ((low, middle), (middle, high))]
        level += 1
    if start is not None:
        levels[start] = 0
    return [levels[index] for index in range(count)]


def _axis(name: str, values: Any) -> list[Any]:
    """The values of one axis, each once."""
    if isinstance(values, Mapping):
        return _log_range(name, values)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(
            f"axis {name} takes a list of values or {{from: 1, to: 64, factor: 2}}, but got "
            f"{values!r}"
        )
    return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in values))


def _log_range(name: str, declared: Mapping[str, Any]) -> list[int | float]:
    first, last, factor = (declared.get(word, 0) for word in ("from", "to", "factor"))
    numbers = all(isinstance(value, (int, float)) for value in (first, last, factor))
    if len(declared) != 3 or not numbers or not (0 < first <= last and factor > 1):
        raise ValueError(
            f"a range on axis {name} is {{from: A, to: B, factor: F}} with 0 < A <= B and F > 1, "
            f"but got {dict(declared)!r}"
        )
    steps = math.floor(math.log(last / first, factor) + 1e-9)
    values = [first * factor**step for step in range(steps + 1)]
    return list(dict.fromkeys(map(round, values) if isinstance(first, int) else values))


def _check_backward(values: Any) -> None:
    """Raise `ValueError` unless it is a list of truth values."""
    if not isinstance(values, Sequence) or not all(isinstance(value, bool) for value in values):
        raise ValueError(f"backward takes a list of true and false, but got {values!r}")


def _check_case(name: str, precision: str) -> None:
    """Raise `ValueError` unless the case can be computed and its output depends on its input."""
    try:
        spec = bench.case_spec(name, precision)
    except (ValueError, RuntimeError, TypeError) as problem:
        raise ValueError(
            f"case {name}: {problem}. Change the axes or exclude it under where"
        ) from None
    if spec.constant is not None:
        raise ValueError(f"case {name}: {spec.degeneracy}")


def _load_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise RuntimeError(
            "sweeps in YAML need PyYAML: pip install 'numba_fused[sweeps]'"
        ) from None
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as problem:
        raise ValueError(f"{path} is not YAML: {problem}") from None


# ---- planning ---------------------------------------------------------------------------------


def plan(sweeps: Sequence[Sweep]) -> list[Key]:
    """Everything the sweeps measure, each once, in the order of measuring.

    The coarse grids of all of them come before the fine grid of any; rows that share a workload
    stay together.
    """
    levels: dict[Key, int] = {}
    for sweep in sweeps:
        for key, level in sweep.levels.items():
            levels[key] = min(level, levels.get(key, level))
    return [key for unit in units(sorted(levels, key=lambda key: levels[key])) for key in unit]


def units(keys: Iterable[Key]) -> list[list[Key]]:
    """Keys by case and precision: those of a unit share their inputs and right answers."""
    found: dict[tuple[str, str], list[Key]] = {}
    for key in keys:
        found.setdefault((key.case, key.precision), []).append(key)
    return list(found.values())


def missing(keys: Sequence[Key], path: Path, *, retry_failed: bool = False) -> list[Key]:
    """Those of `keys` that a file of rows has no row of; or only a failed one."""
    if not path.exists():
        return list(keys)
    rows = newest(results.read(path)).to_dict("records")
    done = {results.key(r) for r in rows if not (retry_failed and r["status"] == "failed")}
    return [key for key in keys if key not in done]


@dataclass(frozen=True)
class Unit:
    """What measuring a case at one precision needs, roughly.

    Attributes
    ----------
    case, precision : str
    rows : int
        How many variants and launch configurations.
    gigabytes : float
        GPU memory, in 1e9 bytes.
    seconds : float
    """

    case: str
    precision: str
    rows: int
    gigabytes: float
    seconds: float


# What things take, by the rows of one H200: good enough to plan by.
ROW_SECONDS, COMPILE_SECONDS = 3.0, 12.0  # a rung's first launch; torch.compile
SETUP_SECONDS, MASK_SECONDS = 2.0, 6e-8  # a case; an element of its dropout mask
FLOPS_PER_SECOND, SLOW_FLOPS_PER_SECOND = 6e12, 1.2e12  # the latter of the rungs 1 to 4
L2_BYTES = 60e6
WIDE_TENSORS = 7  # of the output's size, in fp64: two answers, and what making one takes
# With the backward pass: twice as many, for what autograd keeps and makes. The pass itself takes
# 3.4 times as long as the forward pass, in eager PyTorch on kb83.
BACKWARD_WIDE_TENSORS, BACKWARD_FORWARD = 14, 3.4
GRADIENT_EVALUATIONS = 22  # of both passes in PyTorch: two answers, and PyTorch's own errors


def preview(keys: Sequence[Key]) -> list[Unit]:
    """What measuring `keys` needs, case by case, before anything runs."""
    found = []
    for unit in units(keys):
        spec = bench.case_spec(unit[0].case, unit[0].precision)
        sets = bench.input_sets(spec, int(L2_BYTES))
        backward = any(key.backward for key in unit)
        found.append(
            Unit(
                case=unit[0].case,
                precision=unit[0].precision,
                rows=len(unit),
                gigabytes=_gigabytes(spec, sets, backward),
                seconds=_setup_seconds(spec, backward)
                + sum(_row_seconds(spec, key, sets) for key in unit),
            )
        )
    return found


def _gigabytes(spec: BlockSpec, sets: int, backward: bool) -> float:
    of_set, wide = spec.compulsory_bytes, WIDE_TENSORS
    if backward:  # the gradient of the output, and another output with the gradients it led to
        of_set += 2 * spec.output_bytes + bench.gradient_bytes(spec)
        wide = BACKWARD_WIDE_TENSORS
    return (sets * of_set + 8 * wide * math.prod(spec.output_shape)) / 1e9


def _setup_seconds(spec: BlockSpec, backward: bool) -> float:
    setup = SETUP_SECONDS + MASK_SECONDS * math.prod(spec.output_shape)
    evaluations = GRADIENT_EVALUATIONS if backward else 0
    return setup + evaluations * (1 + BACKWARD_FORWARD) * spec.flops / FLOPS_PER_SECOND


def _row_seconds(spec: BlockSpec, key: Key, sets: int) -> float:
    slow = key.variant in ladder.names()[1:5]
    call = spec.flops / (SLOW_FLOPS_PER_SECOND if slow else FLOPS_PER_SECOND)
    if key.backward:
        call += BACKWARD_FORWARD * spec.flops / FLOPS_PER_SECOND
    # The checks and the host's time, then samples of whole rounds through the sets.
    calls = 64 + (bench.SAMPLES + 2) * max(sets, 1e-3 * bench.SAMPLE_MS / max(call, 1e-6))
    return (COMPILE_SECONDS if key.variant == COMPILED else ROW_SECONDS) + calls * call


# ---- measuring --------------------------------------------------------------------------------


class GpuLostError(RuntimeError):
    """The GPU can no longer be used by this process; by another one it can."""


_bench = functools.cache(bench.Bench)  # one a process


def measure(
    case: str, variant: str, precision: str, threads_per_block: int | None, backward: bool
) -> Row:
    """The row of one key, measured by `bench` on this process's GPU.

    Raises
    ------
    GpuLostError
        An earlier row lost it.
    """
    stand = _bench()
    if stand.lost_to:
        raise GpuLostError(
            f"the GPU was lost to {stand.lost_to}, whose row says why; a new process can go on: "
            f"run the same command again"
        )
    threads = threads_per_block or ladder.DEFAULT_THREADS_PER_BLOCK
    return stand.row(case, variant, threads, precision, backward=backward)


def run(
    keys: Sequence[Key],
    path: str | Path,
    *,
    measure: Measure = measure,
    client: Client | None = None,
    minutes: float = math.inf,
) -> Generator[Row]:
    """Measure `keys` in their order and add each row to a CSV file as soon as it is there.

    Parameters
    ----------
    keys : sequence of Key
        From `plan` and `missing`.
    path : str or Path
        The file; `missing` tells afterwards what it still lacks.
    measure : callable
        Called with the fields of a key, gives its row; what it raises becomes a failed row.
    client : distributed.Client, optional
        Measure on its workers: see `numba_fused.cluster`.
    minutes : float
        Nothing is started later than this; what runs by then is finished.

    Yields
    ------
    dict
        The rows, when they are in the file.

    Raises
    ------
    GpuLostError
        The GPU is lost to this process. Workers of a cluster are replaced instead.
    ValueError
        Another process is writing the file, or it holds rows of another GPU.
    """
    path, until = Path(path), time.monotonic() + 60 * minutes
    if client is None:
        gpus = {results.gpu_name()}
        outcomes = _here(keys, measure, until)
    else:
        from numba_fused import cluster

        gpus = cluster.gpu_names(client)
        outcomes = cluster.outcomes(client, units(keys), measure, until)
    _check_gpus(path, gpus)
    with _held(path), contextlib.closing(outcomes):
        for key, outcome in outcomes:
            row = outcome if isinstance(outcome, dict) else _failed(key, outcome, gpus)
            results.append([row], path)
            yield row


def _here(
    keys: Iterable[Key], measure: Measure, until: float
) -> Generator[tuple[Key, Row | Exception]]:
    """Measure in this process."""
    for key in keys:
        if time.monotonic() >= until:
            return
        try:
            yield key, measure(*key)
        except GpuLostError:
            raise
        except Exception as problem:  # a row, not a hole
            yield key, problem


def _failed(key: Key, problem: Exception, gpus: Iterable[str]) -> Row:
    """The row of what could not even be measured."""
    spec = bench.case_spec(key.case, key.precision)
    return {
        **bench.case_row(key.case, spec, backward=key.backward),
        **key._asdict(),
        **results.provenance(),
        "gpu": next(iter(gpus), ""),
        "status": "failed",
        "reason": bench.one_line(problem),
    }


def _check_gpus(path: Path, gpus: set[str]) -> None:
    """Raise `ValueError` unless all GPUs and the rows there are alike: a file is of one kind."""
    if path.exists():
        gpus = gpus | set(results.read(path)["gpu"].dropna().unique())
    if len(kinds := sorted(gpus - {""})) > 1:
        raise ValueError(
            f"rows of {' and '.join(kinds)} do not go into one file: name another --out, and "
            f"compare the files with numba-fused compare"
        )


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keep other sweeps from writing the file, for as long as this process lives at most."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another sweep is writing {path}: wait for it or name another --out"
            ) from None
        yield


# ---- rows -------------------------------------------------------------------------------------


def files(out: Path) -> tuple[Path, Path]:
    """The CSV file that rows are added to, and the parquet file made of it: of a file or folder."""
    file = out if out.suffix in (".csv", ".parquet") else out / "rows.csv"
    return file.with_suffix(".csv"), file.with_suffix(".parquet")


def newest(frame: pd.DataFrame) -> pd.DataFrame:
    """The newest row of every key and GPU, in the order of the file."""
    keys = pd.DataFrame([results.key(row) for row in frame.to_dict("records")], index=frame.index)
    repeated = keys.assign(gpu=frame["gpu"]).duplicated(keep="last")
    return frame.loc[~repeated]


def load(*paths: str | Path, sweep: Sweep | None = None) -> pd.DataFrame:
    """Rows of one or more files as a tidy frame: one line a measurement.

    Parameters
    ----------
    *paths : str or Path
        Files of rows, of any machines.
    sweep : Sweep, optional
        Keep what it measures.

    Returns
    -------
    pandas.DataFrame
        The newest row of every key and GPU: `results.COLUMNS`, and before them every parameter of
        `bench.Case` that is no column already, and ``plane``.
    """
    frame = newest(pd.concat([results.read(path) for path in paths], ignore_index=True))
    if sweep is not None:
        wanted = [results.key(row) in sweep.levels for row in frame.to_dict("records")]
        frame = frame.loc[wanted]
    frame = frame.reset_index(drop=True)
    cases = [bench.case(name) for name in frame["case"]]
    parameters = [{"plane": case.plane, **dataclasses.asdict(case)} for case in cases]
    axes = pd.DataFrame(parameters, index=frame.index)
    return axes[[name for name in axes if name not in frame]].join(frame)


def write_parquet(csv: Path, parquet: Path) -> None:
    """Write the newest rows of a CSV file as parquet.

    Raises
    ------
    RuntimeError
        pyarrow is not installed.
    """
    parquet.unlink(missing_ok=True)
    results.append(newest(results.read(csv)).to_dict("records"), parquet)
