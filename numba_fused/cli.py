"""The command line: ``numba-fused`` or ``python -m numba_fused``.

Exit status: 0 fine, 1 a check failed, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

# numpy, torch and the kernels are imported by the commands that need them: --help is quick.
if TYPE_CHECKING:
    from numba_fused.demo import Line
    from numba_fused.environment import Environment
    from numba_fused.profile import KernelCounters
    from numba_fused.verify import Case, Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A fused convolution block in Numba CUDA: run it, check it, explain it, time it.",
)
console = Console()
messages = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Variants = Annotated[
    list[str] | None, typer.Option("--variant", help="Only this rung; may be repeated.")
]


def main() -> None:
    """Run the command line and exit."""
    app()


@app.command()
def demo(
    figure: Annotated[Path, typer.Option(help="Where the figure goes (.png or .svg).")] = Path(
        "plots/demo.png"
    ),
    as_json: AsJson = False,
) -> None:
    """Run every rung of the ladder and check each against fp64.

    On a GPU: the benchmark case, timed. Without one: a miniature in the simulator, which counts
    the bytes every kernel moves.
    """
    from numba_fused import demo, ladder, plot

    with usage_errors():
        plot.check_suffix(figure)
    spec = demo.spec()
    on_gpu = spec is not demo.MINIATURE
    lines = []
    with progress(len(ladder.names()), "running the rungs") as advance:
        for line in demo.run():
            lines.append(line)
            advance()
    drawn = [line for line in lines if not line.verdict.startswith("skipped")]
    plot.save(
        plot.traffic_figure(
            [line.name for line in drawn],
            [line.bytes_read for line in drawn],
            [line.bytes_written for line in drawn],
            compulsory=spec.compulsory_bytes,
            counted=[line.counted_bytes for line in drawn],
        ),
        figure,
    )
    if as_json:
        print_json([{**vars(line), "ok": line.ok} for line in lines])
    else:
        _print_demo(lines, on_gpu, figure)
    leave(all(line.ok for line in lines))


def _print_demo(lines: list[Line], on_gpu: bool, figure: Path) -> None:
    from numba_fused import demo

    spec = demo.spec()
    where = "on this GPU" if on_gpu else "in the simulator: the same kernels, no GPU needed"
    console.print(
        f"\nconv -> group norm -> min -> clamp -> dropout, {where}\n"
        f"x {list(spec.x_shape)}, weight {list(spec.weight_shape)}, {spec.num_groups} groups, "
        f"output {list(spec.output_shape)}\n"
    )
    measured = ("ms", "GB/s") if on_gpu else ("bytes\ncounted", "cache\nsectors")
    table = numbers_table("rung", ("launches", "bytes\npredicted", *measured, "error"), "verdict")
    for line in lines:
        moved = line.bytes_read + line.bytes_written
        if on_gpu:
            rate = line.milliseconds and moved / line.milliseconds / 1e6
            cells = (number(line.milliseconds, ".3f"), number(rate, ",.0f"))
        else:
            cells = (number(line.counted_bytes, ","), number(line.sectors, ","))
        table.add_row(
            f"{line.number} {line.name}",
            str(line.launches),
            f"{moved:,}",
            *cells,
            number(line.error, ".1e"),
            verdict_text(line.verdict),
        )
    console.print(table)
    bound = max((line.bound for line in lines if line.bound is not None), default=math.nan)
    console.print(
        f"Every rung computes the same answer with the same dropout mask; its error against fp64 "
        f"may be twice PyTorch's own at most, {bound:.1e} here. What "
        f"changes is how often the tensors cross global memory: no kernel can do with fewer than "
        f"{spec.compulsory_bytes:,} bytes (each input read once, the output written once)."
    )
    if not on_gpu:
        console.print(
            "Bytes counted are what the simulated kernels touched, launch by launch; cache sectors "
            "are the 32-byte pieces their warps asked the caches for on the way."
        )
    console.print(
        f"\nThe figure is {figure}. Next: [bold]numba-fused explain[/] for the full-size bill, "
        f"[bold]numba-fused verify[/] for random shapes, numba_fused/ladder/ to read the rungs."
    )


@app.command()
def verify(
    seed: Annotated[int, typer.Option(help="Seed of the cases.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of cases.")] = 20,
    only: Annotated[int | None, typer.Option(min=0, help="Run this one case.")] = None,
    variant: Variants = None,
    device: Annotated[
        str, typer.Option(help="cuda, cpu (the simulator), or auto: cuda if there is one.")
    ] = "auto",
    max_macs: Annotated[
        int | None, typer.Option(help="Largest case, in multiply-adds; by default what suits.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; by default both.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check rungs on random shapes, parameters and inputs against fp64.

    Outputs are filled with NaN first; the error may be at most twice PyTorch's own. A failure
    prints the command that runs it alone.
    """
    import torch

    from numba_fused import ladder, verify
    from numba_fused.results import provenance
    from numba_fused.spec import SUPPORTED_DTYPES

    with usage_errors():
        if dtype not in (None, *SUPPORTED_DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(SUPPORTED_DTYPES)}, not {dtype!r}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cuda", "cpu"):
            raise ValueError(f"device must be auto, cuda or cpu, but got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device here: see numba-fused env, or --device cpu")
        names = [ladder.get(name).name for name in variant or ladder.names()]
        macs = max_macs or (verify.GPU_MACS if device == "cuda" else verify.SIMULATOR_MACS)
        if device == "cpu":
            torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it does
        first, count = (0, count) if only is None else (only, 1)
        drawn = list(verify.cases(seed, count, max_macs=macs, dtype=dtype, first=first))

    outcomes: list[tuple[Case, str, Result]] = []
    with progress(len(drawn) * len(names), f"{len(drawn)} cases x {len(names)} rungs") as advance:
        for case in drawn:
            for name in names:
                result = verify.check(case, name, device)
                outcomes.append((case, name, result))
                advance()
                if not result.ok and not as_json:
                    messages.print(escape(f"FAILED {name}: {result.reason}\n  {case}"))
                    messages.print(f"  {case.reproducer(name)}", soft_wrap=True, markup=False)
    if as_json:
        found = [
            {
                "case": case.index,
                "variant": name,
                "description": str(case),
                "reproducer": case.reproducer(name),
                **vars(result),
            }
            for case, name, result in outcomes
        ]
        print_json({"seed": seed, "device": device, **provenance(), "results": found})
    else:
        _print_verified(outcomes, names, device)
    leave(all(result.ok for _, _, result in outcomes))


def _print_verified(
    outcomes: list[tuple[Case, str, Result]], names: list[str], device: str
) -> None:
    columns = ("ok", "failed", "skipped", "worst error\n/ allowed", "in case")
    table = numbers_table("rung", columns)
    for name in names:
        results = [(case, result) for case, variant, result in outcomes if variant == name]
        tally = Counter(result.status for _, result in results)
        shares = [(r.error / r.bound, case.index) for case, r in results if not math.isnan(r.error)]
        worst, index = max(shares, default=(None, ""))
        table.add_row(
            name,
            *(str(tally[status]) for status in ("ok", "failed", "skipped")),
            number(worst, ".2f"),
            str(index),
        )
    console.print(table)


@app.command()
def explain(
    x: Annotated[str, typer.Option(help="Shape of x: N,C,[D,[H,]]W.")] = "128,3,16,64,64",
    weight: Annotated[str, typer.Option(help="Shape of weight: K,C/groups,kernel.")] = (
        "16,3,3,3,3"
    ),
    num_groups: Annotated[int, typer.Option(help="Groups of the normalisation.")] = 8,
    min_value: Annotated[float, typer.Option(help="Lower bound.")] = -1.0,
    max_value: Annotated[float, typer.Option(help="Upper bound.")] = 1.0,
    cap: Annotated[
        str, typer.Option(help="What min takes the minimum with; 'none' means min_value.")
    ] = "0.5",
    dropout_p: Annotated[float, typer.Option(help="Probability of a drop.")] = 0.2,
    training: Annotated[bool, typer.Option(help="Whether dropout acts.")] = True,
    stride: Annotated[str, typer.Option(help="One int, or one per axis: 1,2,2.")] = "1",
    padding: Annotated[str, typer.Option(help="The same, or same, or valid.")] = "0",
    dilation: Annotated[str, typer.Option(help="One int, or one per axis.")] = "1",
    groups: Annotated[int, typer.Option(help="Groups of the convolution.")] = 1,
    bias: Annotated[bool, typer.Option(help="Whether the convolution has a bias.")] = True,
    affine: Annotated[bool, typer.Option(help="Whether the norm has gamma and beta.")] = True,
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    as_json: AsJson = False,
) -> None:
    """Account for a call before it runs: shapes, FLOPs, bytes per rung, bounds, degeneracy.

    Without options: the benchmark case.
    """
    from numba_fused.explain import explain

    with usage_errors():
        account = explain(
            shape("--x", x),
            shape("--weight", weight),
            num_groups=num_groups,
            min_value=min_value,
            max_value=max_value,
            cap=None if cap.lower() == "none" else float(cap),
            dropout_p=dropout_p,
            training=training,
            stride=integers("--stride", stride),
            padding=padding if padding in ("same", "valid") else integers("--padding", padding),
            dilation=integers("--dilation", dilation),
            groups=groups,
            bias=bias,
            affine=affine,
            dtype=dtype,
        )
    if as_json:
        print_json(account.to_dict())
    else:
        console.print(str(account), markup=False, highlight=False, soft_wrap=True)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show GPU, driver and versions, and what to do about what is missing or does not fit."""
    from numba_fused.environment import inspect

    found = inspect()
    if as_json:
        print_json(found.to_dict())
    else:
        _print_environment(found)


def _print_environment(found: Environment) -> None:
    console.print(f"GPU     {found.gpu or 'none'} {found.compute_capability}".rstrip())
    console.print(f"driver  {found.driver or 'none'}")
    console.print(f"torch   built for {'CUDA ' + found.torch_cuda if found.torch_cuda else 'CPU'}")
    console.print(f"Python  {found.python}")
    table = Table("package", "installed", "tested with", box=SIMPLE_HEAD, pad_edge=False)
    for name, installed in found.installed.items():
        differs = name in found.mismatches
        shown = installed or "-"
        table.add_row(name, f"[yellow]{shown}[/]" if differs else shown, found.tested.get(name, ""))
    console.print(table)
    if found.mismatches:
        console.print(
            f"{len(found.mismatches)} differ from constraints.txt, the versions this was tested "
            f"with; pip install -c constraints.txt brings those."
        )
    for line in found.advice:
        console.print(f"- {line}", markup=False)
    if not found.advice:
        console.print("Everything fits.")


@app.command()
def bench(
    case: Annotated[
        list[str] | None,
        typer.Option(help="Case, kb83-bN for a batch of N, or all; may be repeated.  [kb83]"),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Only this rung, torch.compile or auto; may be repeated."),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="ieee or tf32; may be repeated.  [ieee]")
    ] = None,
    threads_per_block: Annotated[int, typer.Option(help="32 to 1024, a multiple of 32.")] = 256,
    out: Annotated[
        Path | None, typer.Option(help="File the rows are added to: .csv or .parquet.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="VARIANT[:KERNEL]", help="Do not time; count, as numba-fused profile does."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Time rungs on the GPU beside eager PyTorch and torch.compile, checked before and after."""
    from numba_fused import bench, results
    from numba_fused.spec import check_threads_per_block

    with usage_errors():
        check_threads_per_block(threads_per_block)
        runs = list(itertools.product(bench.case_names(case or ["kb83"]), precision or ["ieee"]))
    if profile is not None:
        counted, _, kernel = profile.partition(":")
        for name, arithmetic in runs:
            _profile(name, counted, kernel, arithmetic, as_json)
        return
    chosen = variant or results.variants()
    with usage_errors():
        for name, arithmetic in runs:
            bench.check_usage(name, chosen, arithmetic)
        if out is not None:
            results.check_file(out)
    timed = []
    with progress(len(runs) * len(chosen), f"timing {len(runs)} x {len(chosen)}") as advance:
        for name, arithmetic in runs:
            rows = []
            for row in bench.run(name, chosen, threads_per_block, arithmetic):
                rows.append(row)
                if out is not None:
                    results.append([row], out)
                advance()
            timed.append(rows)
    if as_json:
        print_json([row for rows in timed for row in rows])
    else:
        for rows in timed:
            _print_timed(rows)
        if len(timed) > 1:
            _print_compared(timed)
    leave(all(row["status"] != "failed" for rows in timed for row in rows))


def _print_timed(rows: list[dict[str, Any]]) -> None:
    from numba_fused.results import COMPILED, EAGER, label, times_faster

    first = rows[0]
    floor, moved = first.get("floor_ms"), first["compulsory_bytes"]
    bound = f": memory floor {floor:.3f} ms for {moved / 1e6:,.0f} MB" if floor else ""
    console.print(f"{first['case']} {first['precision']} on {first['gpu']}{bound}")
    columns = ("ms", "GB/s", "% of\nfloor", "x\neager", "x\ncompile", "error", "host\nus")
    table = numbers_table("variant", columns, "status")
    for row in rows:
        middle = row.get("p50_ms")
        table.add_row(
            label(row),
            number(middle, ".3f"),
            number(moved / middle / 1e6 if middle else None, ",.0f"),
            number(100 * floor / middle if middle and floor else None, ".0f"),
            number(times_faster(row, rows, EAGER), ".2f"),
            number(times_faster(row, rows, COMPILED), ".2f"),
            number(row.get("error"), ".1e"),
            number(row.get("host_us"), ".0f"),
            verdict_text(row["status"]),
        )
    console.print(table)
    for row in rows:
        if row.get("reason"):
            console.print(f"{row['variant']} {row['status']}: {row['reason']}", markup=False)


def _print_compared(timed: list[list[dict[str, Any]]]) -> None:
    from numba_fused.results import compare, verdict

    comparisons = [compare(rows) for rows in timed]
    columns = ("floor\nms", "eager\nms", "compile\nms", "auto\nms", "x\neager", "x faster\nof both")
    table = numbers_table("case", columns, "auto runs")
    for c in comparisons:
        times = (c.floor_ms, c.eager_ms, c.compile_ms, c.auto_ms)
        ratios = (c.times_eager, c.times_best)
        cells = [*(number(t, ".3f") for t in times), *(number(r, ".2f") for r in ratios)]
        table.add_row(f"{c.case} {c.precision}", *cells, c.runs)
    console.print(table)
    for precision in dict.fromkeys(c.precision for c in comparisons):
        said = verdict([c for c in comparisons if c.precision == precision])
        console.print(f"{precision}: {said}", markup=False)


@app.command()
def profile(
    case: Annotated[str, typer.Argument(help="Name of the benchmark case.")],
    variant: Annotated[str, typer.Argument(help="A rung, torch.compile or auto.")],
    kernel: Annotated[str, typer.Option(help="Only kernels with this in their name.")] = "",
    precision: Annotated[str, typer.Option(help="ieee or tf32.")] = "ieee",
    as_json: AsJson = False,
) -> None:
    """Run one call under ncu and show, kernel by kernel, the counters that matter."""
    _profile(case, variant, kernel, precision, as_json)


def _profile(case: str, variant: str, kernel: str, precision: str, as_json: bool) -> None:
    from numba_fused import profile

    with usage_errors():
        counters = profile.run(case, variant, kernel, precision)
        ledger = profile.ledger_bytes(case, variant, precision)
    if as_json:
        print_json([{"ledger_bytes": ledger, **launch.to_dict()} for launch in counters])
        return
    moved = sum((c.dram_read or 0) + (c.dram_written or 0) for c in counters)
    predicted = f"; the whole call by its ledger: {ledger / 1e6:,.1f} MB" if ledger else ""
    console.print(f"{variant} on {case}, {precision}: DRAM {moved / 1e6:,.1f} MB{predicted}")
    fitting = max(1, (console.width - 24) // 18)
    for start in range(0, len(counters), fitting):
        _print_counters(counters[start : start + fitting])


PROFILE_LINES = (
    ("time, us", "nanoseconds", 1e-3, ",.1f"),
    ("DRAM read, MB", "dram_read", 1e-6, ",.1f"),
    ("DRAM written, MB", "dram_written", 1e-6, ",.1f"),
    ("DRAM GB/s", "dram_gb_per_s", 1, ",.0f"),
    ("L2 hits, %", "l2_hit_rate", 1, ".1f"),
    ("issue slots busy, %", "issue_active", 1, ".1f"),
    ("IPC per SM", "ipc", 1, ".2f"),
    ("tensor pipe, %", "tensor_pipe", 1, ".1f"),
    ("FMA pipe, %", "fma_pipe", 1, ".1f"),
    ("ALU pipe, %", "alu_pipe", 1, ".1f"),
    ("shared wavefronts, M", "shared_wavefronts", 1e-6, ",.2f"),
    ("bank conflicts, M", "bank_conflicts", 1e-6, ",.2f"),
    ("occupancy, %", "occupancy", 1, ".1f"),
    ("registers a thread", "registers", 1, ".0f"),
    ("shared a block, KB", "shared_bytes", 1e-3, ",.1f"),
)


def _print_counters(counters: list[KernelCounters]) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for launch in counters:
        table.add_column(escape(launch.kernel), justify="right", overflow="fold", max_width=16)
    for heading, field, scale, form in PROFILE_LINES:
        values = (getattr(launch, field) for launch in counters)
        table.add_row(heading, *(number(None if v is None else v * scale, form) for v in values))
    table.add_row("most waited for", *(launch.top_stall or "" for launch in counters))
    table.add_row("grid", *(launch.grid for launch in counters))
    table.add_row("block", *(launch.block for launch in counters))
    console.print(table)


@app.command()
def plot(
    rows: Annotated[Path, typer.Option(help="File of rows, .csv or .parquet.")] = Path(
        "plots/data/ladder.csv"
    ),
    case: Annotated[str, typer.Option(help="Case to draw.")] = "kb83",
    precision: Annotated[str, typer.Option(help="ieee or tf32.")] = "ieee",
    out: Annotated[Path, typer.Option(help="Where the figure goes (.png or .svg).")] = Path(
        "plots/ladder.png"
    ),
    readme: Annotated[
        Path | None,
        typer.Option(help="Also put the tables into this README, between their markers."),
    ] = None,
) -> None:
    """Draw the ladder from measured rows: time per rung, the floor, eager and torch.compile."""
    from numba_fused import plot, results

    with usage_errors():
        frame = results.read(rows)
        chosen = results.latest(frame, case, precision)
        plot.save(plot.ladder_figure(chosen), out)
        console.print(f"drew {out}", markup=False, soft_wrap=True)
        if readme is not None:
            every_case = list(results.newest(frame, precision).values())
            tables = {"ladder": plot.ladder_table(chosen), "cases": plot.cases_table(every_case)}
            changed = plot.update_readme(readme, tables)
            outcome = "updated" if changed else "was up to date"
            console.print(f"{readme} {outcome}", markup=False, soft_wrap=True)


# ---- shared by the commands -------------------------------------------------------------------


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn what a bad argument raises into one line and exit status 2."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError, OSError) as problem:
        messages.print(f"numba-fused: {problem}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Any]:
    """A progress bar on a terminal, nothing elsewhere; yields what moves it on by one."""
    bar = Progress(console=messages, transient=True, disable=not messages.is_terminal)
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def leave(fine: bool) -> NoReturn:
    """Exit with status 0 or 1."""
    raise typer.Exit(0 if fine else 1)


def print_json(value: Any) -> None:
    """Print strict JSON; NaN and infinities, which it lacks, become null."""
    print(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def shape(option: str, text: str) -> tuple[int, ...]:
    """``"1,2"`` as (1, 2)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes ints separated by commas, but got {text!r}") from None


def integers(option: str, text: str) -> int | tuple[int, ...]:
    """``"3"`` as 3, ``"1,2"`` as (1, 2)."""
    values = shape(option, text)
    return values[0] if len(values) == 1 else values


def numbers_table(name: str, numbers: Sequence[str], verdict: str | None = None) -> Table:
    """A table of a name, right-aligned numbers and perhaps a verdict; 80 columns suffice."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(name, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    if verdict:
        table.add_column(verdict, overflow="fold")
    return table


def number(value: float | None, form: str) -> str:
    """A table cell: empty where there is no value."""
    return "" if value is None else f"{value:{form}}"


def verdict_text(verdict: str) -> str:
    """A verdict in its colour."""
    colours = {"right": "green", "ok": "green", "skipped": "yellow"}
    return f"[{colours.get(verdict.partition(':')[0], 'bold red')}]{escape(verdict)}[/]"
