"""The command line: ``numba-fused`` or ``python -m numba_fused``.

Exit status: 0 fine, 1 a check failed, 2 bad usage.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import shlex
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
    from numba_fused.compare import Pair
    from numba_fused.demo import Line
    from numba_fused.environment import Environment
    from numba_fused.plot import Drawing
    from numba_fused.profile import Call, KernelCounters
    from numba_fused.sweep import Unit
    from numba_fused.training import Agreement, Problem
    from numba_fused.training import Result as Training
    from numba_fused.verify import Case, Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A fused convolution block in Numba CUDA: run it, check it, explain it, time it.",
)
console = Console()
messages = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


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
            verdict_text(line.verdict.partition(":")[0]),
        )
    console.print(table)
    for line in lines:
        if ":" in line.verdict:
            console.print(f"{line.name} {line.verdict}.\n", markup=False)
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
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this rung, or variant of the backward pass, such as backward:clear; "
            "may be repeated."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cuda, cpu (the simulator), or auto: cuda if there is one.")
    ] = "auto",
    max_macs: Annotated[
        int | None,
        typer.Option(
            help="Largest case, in multiply-adds; by default what suits: on the CPU a tenth for "
            "the backward pass."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or float64; by default both.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check rungs and gradients on random shapes, parameters and inputs against fp64.

    Outputs are filled with NaN first; the error may be at most twice PyTorch's
    own, that of each gradient too. A failure prints the command that runs it
    alone.
    """
    import torch

    from numba_fused import verify
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
        names = variant or verify.names()
        for name in names:
            verify.check_name(name)
        limits = {name: max_macs or verify.most_macs(name, device) for name in names}
        if device == "cpu":
            torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it does
        first, count = (0, count) if only is None else (only, 1)
        drawn = {
            macs: list(verify.cases(seed, count, max_macs=macs, dtype=dtype, first=first))
            for macs in set(limits.values())
        }

    outcomes: list[tuple[Case, str, Result]] = []
    with progress(count * len(names), f"{count} cases x {len(names)} variants") as advance:
        for place in range(count):
            for name in names:
                case = drawn[limits[name]][place]
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
    table = numbers_table("variant", columns)
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
def mistakes(
    name: Annotated[str | None, typer.Argument(help="Show this one in full.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give the verifier kernels that are wrong in famous ways, and show what catches each."""
    import torch

    from numba_fused import mistakes
    from numba_fused.mistakes import show

    with usage_errors():
        chosen = mistakes.MISTAKES if name is None else (mistakes.get(name),)
    torch.set_num_threads(1)  # tiny tensors, as in verify
    verdicts = []
    with progress(len(chosen), "making mistakes") as advance:
        for mistake in chosen:
            verdicts.append(mistakes.examine(mistake))
            advance()
    if as_json:
        print_json([verdict.to_dict() for verdict in verdicts])
    elif name is None:
        console.print(show.table(verdicts, console.width))
    else:
        console.print(show.one(verdicts[0]))
    leave(all(verdict.caught for verdict in verdicts))


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
    backward: Annotated[
        bool, typer.Option("--backward", help="Time forward + backward: all five gradients.")
    ] = False,
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
        if backward:
            bench.check_usual_threads(threads_per_block)
        runs = list(itertools.product(bench.case_names(case or ["kb83"]), precision or ["ieee"]))
    if profile is not None:
        from numba_fused.profile import Call

        counted, _, kernel = profile.partition(":")
        for name, arithmetic in runs:
            _profile(Call(name, counted, arithmetic, backward), kernel, None, as_json)
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
            for row in bench.run(name, chosen, threads_per_block, arithmetic, backward=backward):
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
    from numba_fused.results import label

    first = rows[0]
    floor, moved = first.get("floor_ms"), first["compulsory_bytes"]
    bound = f": memory floor {floor:.3f} ms for {moved / 1e6:,.0f} MB" if floor else ""
    both = ", forward + backward" if first["backward"] else ""
    console.print(f"{first['case']} {first['precision']}{both} on {first['gpu']}{bound}")
    table = numbers_table("variant", tuple(_timed_cells(first, rows)), "status")
    for row in rows:
        table.add_row(label(row), *_timed_cells(row, rows).values(), verdict_text(row["status"]))
    console.print(table)
    for row in rows:
        if row.get("reason"):
            console.print(f"{row['variant']} {row['status']}: {row['reason']}", markup=False)


def _timed_cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """A timed variant's cells by their headings; memory and gradients are of both passes."""
    from numba_fused.results import COMPILED, EAGER, times_faster

    middle, floor, extra = (row.get(name) for name in ("p50_ms", "floor_ms", "peak_extra_bytes"))
    rate = row["compulsory_bytes"] / middle / 1e6 if middle else None
    if row["backward"]:
        memory = {"extra\nMB": number(None if extra is None else extra / 1e6, ",.0f")}
        gradient = {"gradient\nerror": number(row.get("gradient_error"), ".1e")}
    else:
        memory, gradient = {"GB/s": number(rate, ",.0f")}, {}
    return {
        "ms": number(middle, ".3f"),
        **memory,
        "% of\nfloor": number(100 * floor / middle if middle and floor else None, ".0f"),
        "x\neager": number(times_faster(row, rows, EAGER), ".2f"),
        "x\ncompile": number(times_faster(row, rows, COMPILED), ".2f"),
        "error": number(row.get("error"), ".1e"),
        **gradient,
        "host\nus": number(row.get("host_us"), ".0f"),
    }


def _print_compared(timed: list[list[dict[str, Any]]]) -> None:
    from numba_fused.results import compare, verdict

    comparisons = [compare(rows) for rows in timed]
    if timed[0][0]["backward"]:
        console.print("forward + backward:")
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
    backward: Annotated[
        bool, typer.Option("--backward", help="Count forward + backward: all five gradients.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="File for the counters, which may hold others' already.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run one call under ncu and show, kernel by kernel, the counters that matter."""
    from numba_fused.profile import Call

    _profile(Call(case, variant, precision, backward), kernel, out, as_json)


def _profile(call: Call, kernel: str, out: Path | None, as_json: bool) -> None:
    from numba_fused import profile, results

    with usage_errors():
        if out is not None:
            results.check_table(out)
        counters = profile.run(call, kernel)
        ledger = profile.ledger_bytes(call)
        if out is not None:
            profile.keep(counters, call, ledger, out)
    if as_json:
        print_json([{"ledger_bytes": ledger, **launch.to_dict()} for launch in counters])
        return
    moved = sum((c.dram_read or 0) + (c.dram_written or 0) for c in counters)
    predicted = f"; the whole call by its ledger: {ledger / 1e6:,.1f} MB" if ledger else ""
    both = ", forward + backward" if call.backward else ""
    what = f"{call.variant} on {call.case}, {call.precision}{both}"
    console.print(f"{what}: DRAM {moved / 1e6:,.1f} MB{predicted}")
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
    ("instructions, M", "instructions", 1e-6, ",.1f"),
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
def first_call(
    case: Annotated[str, typer.Option(help="A small one.")] = "kb83-b1",
    precision: Annotated[str, typer.Option(help="ieee or tf32.")] = "ieee",
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of processes.")] = 3,
    out: Annotated[Path | None, typer.Option(help="File for the rows, .csv or .parquet.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time the first call of a new process: kernels compiled, and loaded from the disk cache."""
    from numba_fused import first_call, results

    with usage_errors():
        if out is not None:
            results.check_table(out)
        rows = first_call.run(case, precision, repeats)
        if out is not None:
            results.write_table(rows, out)
    if as_json:
        print_json(rows.to_dict("records"))
        return
    table = numbers_table("cache of kernels", ("least s", "median s", "most s"))
    for cache, seconds in rows.groupby("cache", sort=False)["seconds"]:
        table.add_row(str(cache), *(f"{seconds.quantile(q):.2f}" for q in (0, 0.5, 1)))
    console.print(table)


RowFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--rows", help="File of rows, or a folder of them; may be repeated.  [plots/data]"
    ),
]
OneCase = Annotated[
    str, typer.Option("--case", help="Case of the figures and tables that are of one case.")
]


@app.command()
def plot(
    figures: Annotated[
        list[str] | None, typer.Argument(help="Figures by name; without any: all.")
    ] = None,
    rows: RowFiles = None,
    case: OneCase = "kb83",
    out: Annotated[
        Path, typer.Option(help="Folder the figures go to, each as PNG and as SVG.")
    ] = Path("plots"),
    readme: Annotated[
        Path | None,
        typer.Option(help="Also put the tables into this README, between their markers."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw figures from measured rows, and say of the others which rows are missing.

    No GPU is needed. Exit status 1 if a figure that was asked for by name has no rows.
    """
    from numba_fused import plot, results

    with usage_errors():
        if out.suffix:
            raise ValueError(f"--out takes a folder, but got {out}; the figures have names")
        chosen = plot.choose(figures or (), case)
        frame = plot.read_rows(*(rows or [results.DATA]))
        drawings = []
        with progress(len(chosen), "drawing") as advance:
            for one in chosen:
                drawings.append(plot.draw(one, frame))
                plot.save_drawing(drawings[-1], out)
                advance()
        changed = readme and plot.update_readme(readme, plot.readme_tables(frame, case))
    if as_json:
        print_json([drawing.to_dict(out) for drawing in drawings])
    else:
        _print_drawings(drawings, out)
        if readme is not None:
            outcome = "updated" if changed else "was up to date"
            console.print(f"{readme} {outcome}", markup=False, soft_wrap=True)
    leave(not figures or all(drawing.figure for drawing in drawings))


def _print_drawings(drawings: list[Drawing], out: Path) -> None:
    for drawing in drawings:
        if drawing.figure:
            files = " and ".join(map(str, drawing.files(out)))
            console.print(f"drew {files}", markup=False, soft_wrap=True)
        else:
            said = f"skipped {drawing.plot.name}: {drawing.why}"
            console.print(said, markup=False, soft_wrap=True)
        if drawing.lacks:
            console.print(f"  {drawing.lacks}", markup=False, soft_wrap=True)


@app.command()
def report(
    rows: RowFiles = None,
    case: OneCase = "kb83",
    out: Annotated[Path, typer.Option(help="Where the page goes (.html).")] = Path(
        "plots/report.html"
    ),
) -> None:
    """Write one HTML page, complete in itself: figures, tables, provenance, commands."""
    from numba_fused import plot, report, results

    with usage_errors():
        if out.suffix != ".html":
            raise ValueError(f"the report is an .html file, but got {out}")
        told = "".join(f" --rows {shlex.quote(str(path))}" for path in rows or ())
        told += "" if case == "kb83" else f" --case {shlex.quote(case)}"
        page = report.report(plot.read_rows(*(rows or [results.DATA])), case, told)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page)
    console.print(f"wrote {out}: open it in a browser", markup=False, soft_wrap=True)


@app.command()
def sweep(
    sweeps: Annotated[
        list[str] | None,
        typer.Argument(help="Sweeps by name, or .yaml files; without any: what there is."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File the rows are added to, or a folder for rows.csv.")
    ] = Path("sweeps"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured; measure nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what the file has already.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what failed.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure this many rows at most.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(min=0, help="Start nothing after this time.", show_default="no end")
    ] = math.inf,
    gpus: Annotated[
        str, typer.Option(metavar="all|0,1", help="One worker for each of these GPUs.")
    ] = "",
    scheduler: Annotated[
        str, typer.Option(metavar="tcp://...", help="Measure on this Dask cluster.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Measure along axes: batch, plane, channels, threads per block and more.

    Rows are kept as they are measured, the most informative first; the same command goes on
    where it was stopped.
    """
    from numba_fused import sweep

    if not sweeps:
        _list_sweeps(as_json)
        return
    with usage_errors():
        csv, parquet = sweep.files(out)
        keys = sweep.plan([sweep.Sweep.read(name) for name in sweeps])
        missing = keys if force else sweep.missing(keys, csv, retry_failed=retry_failed)
        wanted = missing[:limit]
        units = sweep.preview(wanted)
        if dry_run:
            _print_preview(units, len(keys), len(missing), as_json)
            return
        with (
            _sweep_client(gpus, scheduler) as client,
            contextlib.closing(sweep.run(wanted, csv, client=client, minutes=minutes)) as rows,
        ):
            tally, stopped = _measure_rows(rows, len(wanted))
        left = len(missing) - sum(tally.values())
        _write_parquet(csv, parquet)
    if as_json:
        print_json({"file": csv, "left": left, "stopped": stopped, **tally})
    else:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(tally.items()))
        rest = f"; {left} to go: run the same command again" if left else ""
        console.print(f"{csv}: {counts or 'nothing to measure'}{rest}", soft_wrap=True)
    leave(not stopped and not tally["failed"])


def _measure_rows(rows: Iterator[dict[str, Any]], total: int) -> tuple[Counter[str], bool]:
    """Show rows as they come; how many there are of each status, and whether more was to come."""
    from numba_fused.sweep import GpuLostError

    tally = Counter[str]()
    try:
        with progress(total, f"measuring {total} rows") as advance:
            for row in rows:
                tally[row["status"]] += 1
                messages.print(_row_line(row, sum(tally.values()), total), soft_wrap=True)
                advance()
    except KeyboardInterrupt:
        messages.print("stopped; every row above is in the file")
        return tally, True
    except GpuLostError as problem:
        messages.print(f"stopped: {problem}", markup=False, soft_wrap=True)
        return tally, True
    return tally, False


def _row_line(row: dict[str, Any], count: int, total: int) -> str:
    """One measured row: where it stands, what it is, and its time or why it has none."""
    threads = f" @{row['threads_per_block']}" if row.get("threads_per_block") else ""
    both = " + backward" if row.get("backward") else ""
    name = f"{count}/{total} {row['case']} {row['precision']} {row['variant']}{threads}{both}"
    if row["status"] == "ok":
        return f"{escape(name)} {row['p50_ms']:.4g} ms"
    return f"{escape(name)} {verdict_text(row['status'])}: {escape(str(row.get('reason')))}"


def _sweep_client(gpus: str, scheduler: str) -> contextlib.AbstractContextManager[Any]:
    """A client of the cluster that is asked for; None where this process measures by itself."""
    from numba_fused import bench, cluster

    if gpus and scheduler:
        raise ValueError("give --gpus or --scheduler, not both: the cluster has its own GPUs")
    if scheduler:
        return cluster.connected(scheduler)
    if gpus:
        return cluster.on_gpus(cluster.chosen_gpus(gpus))
    bench.check_gpu()
    return contextlib.nullcontext()


def _write_parquet(csv: Path, parquet: Path) -> None:
    from numba_fused import sweep

    try:
        sweep.write_parquet(csv, parquet)
    except RuntimeError as problem:  # pyarrow is not needed for the rows themselves
        messages.print(f"no {parquet.name}: {problem}", markup=False, soft_wrap=True)


def _list_sweeps(as_json: bool) -> None:
    from numba_fused import sweep

    table = numbers_table("sweep", ("cases", "rows", "GB", "minutes"), "what")
    found = []
    for name in sweep.shipped():
        read = sweep.Sweep.read(name)
        units = sweep.preview(sweep.plan([read]))
        rows, seconds, gigabytes = _needs(units)
        found.append({"name": name, "about": read.about, "rows": rows, "seconds": seconds})
        cells = (str(len(units)), str(rows), f"{gigabytes:.0f}", f"{seconds / 60:.0f}")
        table.add_row(name, *cells, read.about)
    if as_json:
        print_json(found)
    else:
        console.print(table)
        console.print("Minutes and GB of GPU memory are estimates for one H200.")


def _needs(units: Sequence[Unit]) -> tuple[int, float, float]:
    """Rows and seconds of all units, gigabytes of the largest."""
    rows, seconds = sum(unit.rows for unit in units), sum(unit.seconds for unit in units)
    return rows, seconds, max((unit.gigabytes for unit in units), default=0.0)


SHOWN_UNITS = 20


def _print_preview(units: list[Unit], declared: int, missing: int, as_json: bool) -> None:
    rows, seconds, gigabytes = _needs(units)
    if as_json:
        summary = {"declared": declared, "missing": missing, "rows": rows, "seconds": seconds}
        print_json({**summary, "gigabytes": gigabytes, "cases": [vars(unit) for unit in units]})
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("case, in the order of measuring", overflow="fold")
    for heading in ("precision", "rows", "GB", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for unit in units[:SHOWN_UNITS]:
        cells = (str(unit.rows), f"{unit.gigabytes:.1f}", f"{unit.seconds:.0f}")
        # With blanks, so that a long name is broken between its parameters.
        table.add_row(escape(unit.case.replace(",", ", ")), unit.precision, *cells)
    console.print(table)
    if len(units) > SHOWN_UNITS:
        console.print(f"and {len(units) - SHOWN_UNITS} more")
    console.print(
        f"{declared} rows are declared, {declared - missing} are in the file. Measured would be "
        f"{rows} rows of {len(units)} cases: about {math.ceil(seconds / 60)} minutes on one H200, "
        f"and {gigabytes:.1f} GB of GPU memory for the largest."
    )


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="File of rows, .csv or .parquet.")],
    b: Annotated[Path, typer.Argument(help="Another one: later, or of another machine.")],
    as_json: AsJson = False,
) -> None:
    """Compare two files of rows: how many times faster B is, and whether beyond the spread."""
    from numba_fused import compare, results

    with usage_errors():
        frames = {"A": results.read(a), "B": results.read(b)}
        pairs = compare.compare(*frames.values())
    told = {name: compare.circumstances(frame) for name, frame in frames.items()}
    if as_json:
        print_json({**told, "pairs": [pair.to_dict() for pair in pairs]})
        return
    for name, path in (("A", a), ("B", b)):
        said = ", ".join(f"{key} {value}" for key, value in told[name].items() if value)
        console.print(f"{name}  {path}: {said}", markup=False, highlight=False)
    _print_pairs([pair for pair in pairs if not pair.only_in])
    table = numbers_table("variant", ("pairs", "A/B,\ngeometric\nmean", "least", "most"))
    for variant, (count, *ratios) in compare.by_variant(pairs).items():
        table.add_row(variant, str(count), *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    differing = sum(pair.differs for pair in pairs)
    only = Counter(pair.only_in for pair in pairs)
    console.print(
        f"A/B says how many times faster B is; low and high are its range from the 20th to the "
        f"80th percentiles. {differing} of {sum(pair.ratio is not None for pair in pairs)} differ "
        f"by more than that. Only in A: {only['A']} rows; only in B: {only['B']}."
    )


def _print_pairs(pairs: Sequence[Pair]) -> None:
    for case, group in itertools.groupby(pairs, lambda p: f"{p.key.case} {p.key.precision}"):
        console.print(escape(case), style="bold", highlight=False)
        table = numbers_table("variant", ("A ms", "B ms", "A/B", "low", "high"), "B is")
        for pair in group:
            threads = pair.key.threads_per_block
            times = (number(ms, ".4g") for ms in (pair.a_ms, pair.b_ms))
            ratios = (number(ratio, ".3f") for ratio in (pair.ratio, pair.low, pair.high))
            said = "[green]faster[/]" if (pair.ratio or 0) > 1 else "[red]slower[/]"
            name = f"{pair.name} @{threads}" if threads else pair.name
            table.add_row(name, *times, *ratios, said if pair.differs else escape(pair.note))
        console.print(table)


@app.command()
def train(
    steps: Annotated[
        int | None, typer.Option(min=1, help="Updates.  [200 on a GPU, 100 on a CPU]")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips a step.  [128 on a GPU, 64 on a CPU]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of clips, parameters and masks.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda if there is one.")] = "auto",
    precision: Annotated[str, typer.Option(help="ieee or tf32, of the whole model.")] = "ieee",
    variant: Annotated[str, typer.Option(help="auto, or a rung for the stem.")] = "auto",
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile, too.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the rows, .csv or .parquet.  "
            "[plots/data/training.csv on a GPU, none on a CPU]"
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Where the figure goes, as .png and as .svg.  "
            "[plots/training.png on a GPU, nowhere on a CPU]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a video classifier with the block as its stem, beside PyTorch: loss, time, memory.

    Clips of moving digits; on a CPU tiny ones. Fails if the losses differ by more than other
    dropout masks make them differ.
    """
    from numba_fused import results, training
    from numba_fused.plot import check_suffix, save

    with usage_errors():
        options = {"seed": seed, "precision": precision, "variant": variant}
        problem = training.problem_for(device, steps, batch, **options)
        if problem.device == "cuda":  # a CPU's rows do not take the place of a GPU's
            out, figure = out or training.DATA, figure or training.FIGURE
        if out:
            results.check_table(out)
        if figure:
            check_suffix(figure)
        names = training.implementations(compiled)
        with progress(len(names) * problem.steps, "training") as advance:
            runs = [training.train(problem, name, advance) for name in names]
        rows = training.rows(problem, runs)
        if out:
            results.write_table(rows, out)
        if figure:
            drawn = training.figure(rows)
            for suffix in (".png", ".svg"):
                save(drawn, figure.with_suffix(suffix))
    agreement = training.agreement(rows)
    if as_json:
        print_json({**vars(agreement), "ok": agreement.ok, "rows": rows.to_dict("records")})
    else:
        _print_trained(problem, runs, agreement)
        for option, what, place in (("out", "rows", out), ("figure", "figure", figure)):
            told = f"{what} in {place}" if place else f"no {what} kept: --{option} names a file"
            console.print(told, markup=False, soft_wrap=True)
    leave(agreement.ok)


def _print_trained(problem: Problem, runs: Sequence[Training], agreement: Agreement) -> None:
    from numba_fused.training import LABELS

    clip = "x".join(map(str, problem.clip_shape))
    where = f"{problem.precision} on {problem.device}"
    console.print(f"{problem.steps} steps of {problem.batch} clips of {clip}, {where}")
    columns = ("ms\na step", "peak\nGB", "first\nloss", "last\nloss", "held-out\naccuracy")
    table = numbers_table("stem", columns)
    for run in runs:
        peak = run.peak_bytes and run.peak_bytes / 1e9
        table.add_row(
            LABELS[run.implementation],
            f"{1e3 * run.seconds:.3g}",
            number(peak, ".3g"),
            *(f"{run.losses[place]:.3f}" for place in (0, -1)),
            f"{100 * run.held_out_accuracy:.0f} %",
        )
    console.print(table)
    console.print(
        f"With the same masks the loss of numba_fused is {agreement.fused:.1e} from PyTorch's in "
        f"the mean over the steps; other masks alone make {agreement.masks:.1e}: "
        f"{verdict_text('ok' if agreement.ok else 'more than noise')}"
    )


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
    return f"[{colours.get(verdict, 'bold red')}]{escape(verdict)}[/]"
