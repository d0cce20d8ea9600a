"""Figures: of rows alone, the same every time, legible, honest, open about what is missing."""

import functools
import json
import shlex
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made_up_rows import COMPARED, GPU, everything, made_up, written
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from typer.testing import CliRunner, Result

from numba_fused import bench, cli, plot, results, sweep
from numba_fused.plot.mask import PROBABILITIES, deviations
from numba_fused.plot.rows import all_block_sizes, bench_recipe, by_case
from numba_fused.plot.scaling import slope
from numba_fused.plot.style import WIDTH, spread
from numba_fused.report import report
from numba_fused.results import Row

FIGURES = [one.name for one in plot.catalogue()]
SMALLEST = 12  # points, at full width


@functools.cache
def frame() -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        return plot.read_rows(written(Path(folder, "rows.csv"), everything()))


@functools.cache
def figure(name: str) -> Figure:
    (one,) = plot.choose([name])
    drawn = plot.draw(one, frame()).figure
    assert drawn is not None
    FigureCanvasAgg(drawn).draw()
    return drawn


def of_rows(tmp_path: Path, *rows: Row) -> pd.DataFrame:
    return plot.read_rows(written(tmp_path / "rows.csv", list(rows)))


def numba_fused(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def texts(drawn: Figure) -> list[Text]:
    return [t for t in drawn.findobj(Text) if isinstance(t, Text) and t.get_text().strip()]


def said(ax: Axes) -> set[str]:
    return {text.get_text() for text in ax.texts}


def first(values: Any) -> float:
    return float(np.asarray(values).flat[0])


def names(ax: Axes, axis: str = "y") -> list[str]:
    labels = ax.get_yticklabels() if axis == "y" else ax.get_xticklabels()
    return [label.get_text() for label in labels]


# ---- every figure -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_the_same_bytes_every_time(tmp_path: Path, name: str) -> None:
    (one,) = plot.choose([name])
    for folder in ("one", "two"):
        plot.save_drawing(plot.draw(one, frame()), tmp_path / folder)
    for suffix in (".png", ".svg"):
        first, second = (tmp_path / f / f"{name}{suffix}" for f in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
        assert len(first.read_bytes()) > 5000


@pytest.mark.parametrize("name", FIGURES)
def test_every_axis_has_its_unit_and_says_if_it_is_logarithmic(name: str) -> None:
    for ax in figure(name).axes:
        for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
            label = axis.get_label_text()
            categories = any(text.get_text().isidentifier() for text in axis.get_ticklabels())
            if not axis.get_ticklocs().size or categories or not axis.get_visible():
                continue
            if label or ax is figure(name).axes[0]:
                plain = label.removesuffix(" (log scale)")
                assert "(" in label or plain in ("TFLOP/s",), label
                assert (scale == "log") == ("log scale" in label), label


@pytest.mark.parametrize("name", FIGURES)
def test_bars_begin_at_zero_or_the_axis_says_where(name: str) -> None:
    for ax in figure(name).axes:
        bars = [bar for container in ax.containers for bar in container]
        if bars and ax.get_xscale() == "linear":
            assert ax.get_xlim()[0] == 0
        elif bars:
            assert f"starts at {ax.get_xlim()[0]:.2g}" in ax.get_xlabel()


@pytest.mark.parametrize("name", FIGURES)
def test_text_is_legible_at_half_width_and_inside(name: str) -> None:
    drawn = figure(name)
    assert drawn.get_figwidth() == WIDTH
    width, height = drawn.get_size_inches() * drawn.dpi
    shown = [text for text in texts(drawn) if text.get_visible()]
    assert len(shown) > 5
    for text in shown:
        assert float(text.get_fontsize()) >= SMALLEST, text
    everything_drawn = drawn.get_tightbbox()
    assert everything_drawn.x0 >= -0.02
    assert everything_drawn.y0 >= -0.02
    assert everything_drawn.x1 <= width / drawn.dpi + 0.02
    assert everything_drawn.y1 <= height / drawn.dpi + 0.02


@pytest.mark.parametrize("name", ["scaling", "scaling-plane", "roofline"])
def test_names_beside_points_do_not_cover_each_other(name: str) -> None:
    boxes = [Text.get_window_extent(text) for text in figure(name).axes[0].texts]
    assert len(boxes) > 3
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])


@pytest.mark.parametrize(
    ("heights", "moved"),
    [
        ([0.1, 0.5], [0.1, 0.5]),
        ([0.1, 0.1, 0.5], [0.1, 0.2, 0.5]),
        ([0.97, 0.98], [0.88, 0.98]),
        ([], []),
    ],
)
def test_spread(heights: list[float], moved: list[float]) -> None:
    assert spread(heights, 0.1) == pytest.approx(moved)


# ---- what each shows --------------------------------------------------------------------------


def test_scaling_shows_the_slope_of_each_line() -> None:
    ax = figure("scaling").axes[0]
    assert {"torch, 1.00", "torch.compile, 1.00", "auto, 1.00"} <= said(ax)
    lines = [np.asarray(line.get_xdata()) for line in ax.lines]
    assert all(list(xs) == [1, 16, 128, 1024] for xs in lines[:4])
    # A little over 2: the output has two lines less than the input, whatever its size.
    assert "auto, 2.08" in said(figure("scaling-plane").axes[0])
    # Made-up times are those of the bytes, which the kernel's size does not change.
    assert "auto, 0.00" in said(figure("scaling-kernel").axes[0])


def test_every_measured_value_is_named_on_the_axis() -> None:
    assert names(figure("scaling-kernel").axes[0], "x") == ["3", "5"]


def test_slope_is_that_of_the_upper_half() -> None:
    bent = [(1.0, 5.0), (2.0, 5.0), (4.0, 5.0), (8.0, 10.0), (16.0, 20.0)]
    assert slope(bent) == pytest.approx(1)
    assert slope(bent[:2]) == pytest.approx(0)


def test_scaling_takes_cases_that_differ_in_the_axis_only(tmp_path: Path) -> None:
    rows = of_rows(tmp_path, *(made_up(c, "torch") for c in ("kb83-b1", "kb83,plane=8", "2d-3-64")))
    (one,) = plot.choose(["scaling"])
    drawing = plot.draw(one, rows)
    assert [row["case"] for row in drawing.rows] == ["kb83-b1"]
    assert "two values of batch" in drawing.why


def test_roofline_places_variants_by_ledger_and_time() -> None:
    ax = figure("roofline").axes[0]
    row = next(r for r in everything() if r["variant"] == "unfused")
    flops = bench.case_spec("kb83").flops
    wanted = (flops / row["ledger_bytes"], flops / row["p50_ms"] / 1e9)
    points = [(first(line.get_xdata()), first(line.get_ydata())) for line in ax.lines]
    assert any(point == pytest.approx(wanted) for point in points)
    assert f"unfused, {wanted[1]:.3g}" in said(ax)
    assert not any("torch.compile" in text for text in said(ax))


def test_roofline_has_only_ceilings_measured_on_its_gpu() -> None:
    unknown = [t.get_text() for t in figure("roofline").legends[0].get_texts()]
    assert unknown == ["memory at 4 TB/s", "compulsory bytes"]
    rows = [made_up("kb83", "unfused", gpu="NVIDIA H200")]
    known = [t.get_text() for t in plot.roofline_figure(rows).legends[0].get_texts()]
    assert "fp32 units, 50" in known
    assert "TF32 tensor cores, 385" in known


def test_speedup_shows_named_cases_and_their_mean() -> None:
    drawn = figure("speedup")
    # kb83,plane=32 is kb83-v0 by another name, and kb83-b1024 has none.
    assert names(drawn.axes[0]) == ["kb83", "kb83-b16", "kb83-b1", "3d-8-16", "2d-3-64"]
    assert said(drawn.axes[0]) == {"4.00"}
    assert "auto, geometric mean 4.00" in [t.get_text() for t in drawn.legends[0].get_texts()]


def test_speedup_heatmap_has_a_number_or_a_dash_in_every_cell() -> None:
    ax = figure("channels").axes[0]
    assert names(ax, "x") == ["3", "8"]
    assert names(ax) == ["16", "64"]
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 0): "2", (1, 0): "2", (0, 1): "2", (1, 1): "–"}


def test_threads_heatmap_is_relative_to_the_best() -> None:
    ax = figure("threads").axes[0]
    assert names(ax, "x") == ["128", "256", "1024"]
    assert names(ax) == ["one_kernel"]
    assert [text.get_text() for text in ax.texts] == ["3", "1", "3"]


def test_error_shows_both_precisions_and_their_bounds() -> None:
    drawn = figure("error")
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert sorted(labels) == ["ieee", "largest that passes", "tf32"]
    drawn_errors = {first(line.get_xdata()) for line in drawn.axes[0].lines}
    assert drawn_errors == {2e-7, 4e-7, 3e-4, 2e-3}
    assert "tensor_core" not in names(drawn.axes[0])


def test_memory_is_beside_the_size_of_the_output() -> None:
    ax = figure("memory").axes[0]
    output = bench.case_spec("kb83").output_bytes / 1e9
    widths = [bar.get_width() for container in ax.containers for bar in container]  # pyright: ignore
    assert widths[0] == pytest.approx(3 * output)
    assert set(widths[1:]) == {0}
    assert first(ax.lines[0].get_xdata()) == pytest.approx(output)
    assert "(GB)" in ax.get_xlabel()


def test_backward_shows_the_times_of_both_passes_with_their_own_floor() -> None:
    ax = figure("backward").axes[0]
    assert names(ax) == ["torch", "torch.compile", "auto: pipelined"]
    floor = bench.compulsory_bytes(bench.case_spec("kb83"), backward=True) / 4e9
    assert said(ax) == {f"{times * floor:.3g}" for times in (8, 4, 2)}
    assert ax.get_title(loc="right") == "forward and backward pass"
    assert figure("ladder").axes[0].get_title(loc="right") == ""
    legend = {text.get_text() for text in figure("backward").legends[0].get_texts()}
    (line,) = (line for line in ax.lines if line.get_label() == "memory floor")
    assert "memory floor" in legend
    assert first(line.get_xdata()) == pytest.approx(floor)


def test_mask_keeps_its_share() -> None:
    by_p, by_place = deviations()
    assert by_p.shape[0] == len(PROBABILITIES)
    for standard_errors in (by_p, by_place):
        assert np.abs(standard_errors).max() < 4.5  # the limit of the figure's axis
        assert 0.88 < (np.abs(standard_errors) < 2).mean() < 1


# ---- which rows -------------------------------------------------------------------------------


def test_newest_row_counts_whichever_file_it_is_in(tmp_path: Path) -> None:
    new = made_up("kb83", "torch", p50_ms=1.0, utc="2026-02-01T00:00:00+00:00")
    written(tmp_path / "a.csv", [new])
    written(tmp_path / "b.csv", [made_up("kb83", "torch", p50_ms=9.0), made_up("kb83", "auto")])
    rows = plot.read_rows(tmp_path)
    assert {r["variant"]: r["p50_ms"] for r in rows.to_dict("records")}["torch"] == 1.0
    assert len(rows) == 2


def test_folder_may_hold_other_tables_and_parquet_twins(tmp_path: Path) -> None:
    (tmp_path / "counters.csv").write_text("variant,kernel\nunfused,min\n")
    csv = written(tmp_path / "rows.csv", [made_up("kb83", "torch")])
    written(tmp_path / "rows.parquet", [made_up("kb83", "auto")])
    assert len(plot.read_rows(tmp_path)) == 1
    csv.unlink()
    assert list(plot.read_rows(tmp_path)["variant"]) == ["auto"]


def test_folder_without_rows_and_rows_of_two_gpus_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of rows in"):
        plot.read_rows(tmp_path)
    written(tmp_path / "a.csv", [made_up("kb83", "torch")])
    written(tmp_path / "b.csv", [made_up("kb83", "torch", gpu="Other")])
    with pytest.raises(ValueError, match=f"of Other and of {GPU}"):
        plot.read_rows(tmp_path)


def test_usual_block_size_and_forward_pass_are_drawn(tmp_path: Path) -> None:
    late = {"utc": "2026-03-01T00:00:00+00:00"}
    rows = of_rows(
        tmp_path,
        made_up("kb83", "unfused", threads_per_block=256, p50_ms=2.0),
        made_up("kb83", "unfused", threads_per_block=1024, p50_ms=1.0, **late),
        made_up("kb83", "one_kernel", threads_per_block=128, p50_ms=4.0),
        made_up("kb83", "torch", p50_ms=3.0),
        made_up("kb83", "torch", p50_ms=7.0, backward=True, **late),
        made_up("kb83", "tiled", p50_ms=7.0, backward=True),
    )
    found = {row["variant"]: row["p50_ms"] for row in by_case(rows, "ieee")["kb83"]}
    assert found == {"torch": 3.0, "unfused": 2.0}
    sizes = all_block_sizes(rows, "kb83", "ieee")
    assert [(row["variant"], row["threads_per_block"]) for row in sizes] == [
        ("unfused", 256),
        ("one_kernel", 128),
        ("unfused", 1024),
    ]
    # What a figure does not show is missing, though it was measured some other way.
    lacking = {key.variant for key in bench_recipe("kb83", ["ieee"]).missing(rows)}
    assert {"one_kernel", "tiled"} < lacking
    assert not {"torch", "unfused"} & lacking


# ---- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "mask"])
def test_figure_without_rows_says_which_and_how_to_measure_them(tmp_path: Path, name: str) -> None:
    rows = of_rows(tmp_path, made_up("2d-256-256", "split"))
    (one,) = plot.choose([name])
    drawing = plot.draw(one, rows)
    assert drawing.figure is None
    assert drawing.why
    assert drawing.missing
    assert f"{len(drawing.missing)} rows are missing (" in drawing.lacks
    assert drawing.recipe is not None
    assert drawing.lacks.endswith(drawing.recipe.command)


@pytest.mark.parametrize("name", [name for name in FIGURES if name != "mask"])
def test_what_is_missing_is_what_the_command_measures(name: str) -> None:
    """Its rows, once they are there, are no longer missing; nothing else is."""
    (one,) = plot.choose([name])
    assert one.recipe is not None
    recipe = one.recipe()
    program, command, *arguments = shlex.split(recipe.command)
    assert program == "numba-fused"
    if command == "sweep":
        measured = sweep.Sweep.read(arguments[0]).levels
        arguments = ["--dry-run", *arguments, "--out", "/nowhere/rows.csv"]
    else:
        assert arguments[:2] == ["--case", "kb83"]
        chosen = [value for option, value in pairwise(arguments) if option == "--variant"]
        backward = "--backward" in arguments
        arguments = ["--help"]
        measured = {
            results.Key("kb83", variant, key.precision, None, backward)
            for variant in chosen or results.variants()
            for key in recipe.keys
        }
    assert numba_fused(command, *arguments).exit_code == 0
    there = pd.DataFrame([key._asdict() for key in measured])
    assert recipe.missing(there) == []
    key = recipe.keys[0]
    assert key in recipe.missing(there.loc[there["variant"] != key.variant])


def test_figure_that_lacks_some_rows_is_drawn_and_says_so(tmp_path: Path) -> None:
    rows = of_rows(tmp_path, made_up("kb83", "unfused"))
    (one,) = plot.choose(["ladder"])
    drawing = plot.draw(one, rows)
    assert drawing.figure is not None
    assert len(drawing.missing) == len(results.variants()) - 1
    assert "kb83 torch ieee, kb83 torch.compile ieee, " in drawing.lacks


def test_failed_and_skipped_rows_are_not_missing(tmp_path: Path) -> None:
    rows = of_rows(tmp_path, made_up("kb83", "split") | {"status": "failed", "p50_ms": None})
    (one,) = plot.choose(["ladder"])
    assert "split" not in [key.variant for key in plot.draw(one, rows).missing]


# ---- the README's tables ----------------------------------------------------------------------


def test_cases_table_is_written_once_auto_was_timed(tmp_path: Path) -> None:
    eager = made_up("kb83", "torch")
    assert plot.readme_tables(of_rows(tmp_path, eager)).keys() == {"ladder"}
    tables = plot.readme_tables(frame())
    assert tables.keys() == {"ladder", "ladder-tf32", "cases", "cases-tf32", "backward"}
    lines = tables["cases"].splitlines()
    # In the order of the named cases; what has no name is left out.
    cases = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:-2]]
    assert cases == ["kb83", "kb83-b16", "kb83-b1", "3d-8-16", "2d-3-64", "geometric mean"]
    assert lines[-3] == "| geometric mean |  |  |  |  |  | 4.00 | 2.00 |"


def test_backward_table_is_of_both_passes_and_written_once_they_were_timed(tmp_path: Path) -> None:
    assert "backward" not in plot.readme_tables(of_rows(tmp_path, made_up("kb83", "torch")))
    *lines, _, note = plot.readme_tables(frame())["backward"].splitlines()
    assert lines[0] == "| variant | ms | x eager | x compile | gradient error | peak extra MB |"
    # The times of `made_up` are in proportion to the bytes of both passes.
    moved = bench.compulsory_bytes(bench.case_spec("kb83"), backward=True)
    extra = 3 * bench.case_spec("kb83").output_bytes / 1e6
    assert lines[2] == f"| torch | {8 * moved / 4e9:.3g} | 1.00 | 0.50 | 5.0e-07 | {extra:.0f} |"
    assert lines[4] == f"| auto: pipelined | {2 * moved / 4e9:.3g} | 4.00 | 2.00 | 5.0e-07 | 0 |"
    assert "Forward and backward pass together, medians on one Test GPU" in note
    assert f"The {moved / 1e6:.0f} MB that must be moved" in note
    assert "Forward and backward, ieee" in report(frame())


def test_backward_table_of_another_case_and_a_failed_row(tmp_path: Path) -> None:
    failed = {"status": "failed", "reason": "wrong | worse", "p50_ms": None, "gradient_error": None}
    rows = of_rows(tmp_path, made_up("kb83-b1", "auto", "tf32", backward=True) | failed)
    assert plot.readme_tables(rows) == {}
    (name, table), *others = plot.readme_tables(rows, "kb83-b1").items()
    assert (name, others) == ("backward-tf32", [])
    assert "| auto: pipelined | failed: wrong \\| worse |  |  |  |  |" in table


# ---- the command ------------------------------------------------------------------------------


def test_command_draws_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.csv", [made_up("kb83", v) for v in COMPARED])
    result = numba_fused("plot", "ladder", "scaling", "--rows", rows, "--out", tmp_path / "out")
    assert result.exit_code == 1  # it was asked for by name
    drawn = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert drawn == ["ladder.png", "ladder.svg"]
    assert "skipped scaling: no variant has times at two values of batch" in result.stdout
    assert "Measure on a GPU: numba-fused sweep batch --out plots/data/batch.csv" in result.stdout


def test_command_as_json(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.csv", [made_up("kb83", v) for v in COMPARED])
    result = numba_fused("plot", "ladder", "--rows", rows, "--out", tmp_path, "--json")
    assert result.exit_code == 0
    (told,) = json.loads(result.stdout)
    assert told["files"] == [str(tmp_path / "ladder.png"), str(tmp_path / "ladder.svg")]
    assert told["measure"].startswith("numba-fused bench --case kb83")
    assert len(told["missing"]) == len(results.variants()) - 3


def test_command_updates_a_readme(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.csv", [made_up("kb83", v) for v in COMPARED])
    readme = tmp_path / "README.md"
    readme.write_text("\n".join(["before", *plot.markers("cases"), "after"]))
    told = ("plot", "ladder", "--rows", rows, "--out", tmp_path, "--readme", readme)
    assert "updated" in numba_fused(*told).stdout
    assert "| geometric mean |  |  |  |  |  | 4.00 | 2.00 |" in readme.read_text()
    assert "was up to date" in numba_fused(*told).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["spiral"], "unknown figure 'spiral': use some of ladder"),
        (["--out", "ladder.png"], "--out takes a folder"),
        (["--case", "kb99"], "unknown case 'kb99'"),
        (["--rows", "/nowhere/rows.csv"], "rows.csv"),
    ],
)
def test_command_refuses(arguments: list[str], said: str) -> None:
    result = numba_fused("plot", *arguments)
    assert result.exit_code == 2
    assert said in result.output
