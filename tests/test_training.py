"""The training run: clips that can be had again, curves that agree, rows that say what was run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from typer.testing import CliRunner

import numba_fused as nf
from numba_fused import cli, ladder, results, training
from numba_fused.training import COMPILED, EAGER, FUSED, REFERENCE, MovingDigits, Problem

TINY = Problem(steps=8, batch=8, frames=4, plane=12, zoom=1)


@pytest.fixture(scope="module")
def trained() -> dict[str, training.Result]:
    """A few steps with each stem that needs no compiler."""
    return {name: training.train(TINY, name) for name in training.implementations(False)}


@pytest.fixture(scope="module")
def frame(trained: dict[str, training.Result]) -> pd.DataFrame:
    return training.rows(TINY, list(trained.values()))


# ---- clips --------------------------------------------------------------------------------------


def trimmed(image: np.ndarray) -> np.ndarray:
    """What is left without black margins, of maximum 1."""
    rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] / image.max()


@pytest.mark.parametrize("zoom", [1, 2])
@pytest.mark.parametrize("held_out", [False, True])
def test_every_frame_shows_the_whole_of_one_image_of_the_label(zoom: int, held_out: bool) -> None:
    images, labels = training.digit_images()
    part = slice(-training.HELD_OUT_IMAGES, None) if held_out else slice(-training.HELD_OUT_IMAGES)
    problem = replace(TINY, plane=8 * zoom + 5, zoom=zoom)
    clips, found = MovingDigits(problem, held_out=held_out).batch(0)
    assert clips.shape == (8, *problem.clip_shape)
    for clip, label in zip(clips.numpy(), found, strict=True):
        candidates = images[part][labels[part] == int(label)]
        enlarged = [trimmed(np.kron(image, np.ones((zoom, zoom)))) for image in candidates]
        same = {
            index
            for index, image in enumerate(enlarged)
            if all(
                trimmed(shown).shape == image.shape and np.allclose(trimmed(shown), image)
                for shown in clip.reshape(-1, *clip.shape[-2:])
            )
        }
        assert same


def test_batches_depend_on_seed_and_index_alone() -> None:
    first = MovingDigits(TINY)
    first.batch(5)
    clips, labels = first.batch(3)
    again = MovingDigits(TINY).batch(3)
    assert torch.equal(clips, again[0])
    assert torch.equal(labels, again[1])
    for other in (
        first.batch(4),
        MovingDigits(replace(TINY, seed=1)).batch(3),
        MovingDigits(TINY, held_out=True).batch(3),
    ):
        assert not torch.equal(clips, other[0])


def test_digits_move_straight_and_stay_inside() -> None:
    room = 40
    paths = training.trajectories(np.random.default_rng(0), 2000, 16, room)
    assert paths.min() >= 0
    assert paths.max() <= room
    assert (np.ptp(paths, axis=1) > 0).any(axis=1).mean() > 0.95
    # Straight but for rounding, unless the path met an edge.
    inside = ((paths > 5) & (paths < room - 5)).all(axis=(1, 2))
    assert inside.sum() > 10
    assert np.abs(np.diff(paths[inside], n=2, axis=1)).max() <= 2


def test_a_digit_as_large_as_the_plane_stands_still() -> None:
    clips, _ = MovingDigits(replace(TINY, plane=8)).batch(0)
    assert (clips == clips[:, :, :1]).all()
    assert clips.amax() > 0.4


def test_without_scikit_learn_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'numba_fused\[training\]'"):
        training.digit_images()


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 16, 17, 40])
@pytest.mark.parametrize("seed", [0, 83, 2**64 - 1, -5])
def test_a_shards_seed_gives_its_part_of_the_whole_batchs_mask(seed: int, width: int) -> None:
    shape = (6, 4, 3, width)
    whole = nf.keep_mask(seed, shape, 0.5)
    for first, count in ((0, 2), (2, 1), (3, 3)):
        shard = (count, *shape[1:])
        mask = nf.keep_mask(training.seed_of_shard(seed, first, shard), shard, 0.5)
        assert np.array_equal(mask, whole[first : first + count])


def test_steps_and_problems_have_masks_of_their_own() -> None:
    seeds = {
        training.mask_seed(replace(TINY, seed=seed), step) for seed in range(5) for step in range(9)
    }
    assert len(seeds) == 45
    assert all(0 <= training.mask_seed(replace(TINY, seed=2**70), step) < 2**63 for step in (0, 9))


# ---- curves -------------------------------------------------------------------------------------


def test_all_stems_start_from_the_same_parameters() -> None:
    states = [training.classifier(TINY, name).state_dict() for name in (REFERENCE, EAGER, FUSED)]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())
    other = training.classifier(replace(TINY, seed=1), FUSED).state_dict()
    assert not torch.equal(other["stem.conv.weight"], states[0]["stem.conv.weight"])


def test_with_the_same_masks_the_curves_are_the_same(trained: dict[str, training.Result]) -> None:
    """CPU tensors take PyTorch's operators: nothing but rounding may differ."""
    assert len(trained[FUSED].losses) == TINY.steps
    np.testing.assert_allclose(trained[FUSED].losses, trained[REFERENCE].losses, rtol=1e-5)
    assert np.abs(trained[EAGER].losses - trained[REFERENCE].losses).max() > 1e-3


def test_a_run_can_be_had_again_and_leaves_the_generator_alone(
    trained: dict[str, training.Result],
) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    again = training.train(TINY, EAGER)  # which draws its masks from the generator
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_allclose(again.losses, trained[EAGER].losses, rtol=1e-5)
    assert again.held_out_accuracy == pytest.approx(trained[EAGER].held_out_accuracy, abs=0.1)


def test_the_classifier_learns() -> None:
    problem = training.problem_for("cpu", None, None)
    result = training.train(problem, FUSED)
    assert result.losses[:3].mean() > 2.2
    assert result.losses[-10:].mean() < 1.2
    assert result.held_out_accuracy > 0.5


def test_a_kernels_forward_and_gradients_are_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second loss follows from the first step's gradients."""
    monkeypatch.setattr(training, "HELD_OUT_BATCHES", 1)
    problem = replace(TINY, steps=2, batch=1, plane=8, variant="one_kernel")
    launched: list[tuple[str, bool]] = []
    run = ladder.run

    def watched(rung: str, *operands: Any, **options: Any) -> torch.Tensor:
        launched.append((rung, options["spec"].training))
        return run(rung, *operands, **options)

    monkeypatch.setattr(ladder, "run", watched)
    ours = training.train(problem, FUSED)
    assert launched == [("one_kernel", True)] * 2 + [("one_kernel", False)]
    judge = training.train(problem, REFERENCE)
    np.testing.assert_allclose(ours.losses, judge.losses, rtol=1e-4)
    assert ours.held_out_accuracy == judge.held_out_accuracy
    assert len(launched) == 3


def test_a_kernels_gradients_have_the_right_length() -> None:
    """Which losses cannot show: Adam's steps are the same for gradients twice as long."""
    problem = replace(TINY, batch=1, plane=8, variant="one_kernel")
    clips, labels = MovingDigits(problem).batch(0)
    models = [training.classifier(problem, name) for name in (FUSED, REFERENCE)]
    for model in models:
        scores = model(clips, torch.tensor([training.mask_seed(problem, 0)]))
        torch.nn.functional.cross_entropy(scores, labels).backward()
    for ours, judge in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours.grad, judge.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, but got 0"),
        ({"batch": 0}, "batch must be at least 1, but got 0"),
        ({"frames": 3}, "frames must be at least 4, but got 3"),
        ({"zoom": 0}, "zoom must be at least 1, but got 0"),
        ({"zoom": 2}, "16 pixels, 8 x zoom, does not fit into a plane of 12: use a smaller zoom"),
        ({"seed": -1}, "seed must be at least 0, but got -1"),
        ({"precision": "fp8"}, "but got 'fp8'"),
        ({"variant": "best"}, "unknown variant 'best'"),
    ],
    ids=str,
)
def test_problems_that_cannot_be_trained_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        replace(TINY, **changes)


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="device must be auto, cuda or cpu, but got 'tpu'"):
        training.problem_for("tpu", None, None)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no CUDA device here"):
            training.problem_for("cuda", None, None)
        assert training.problem_for("auto", 3, None).device == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_on_a_gpu_time_and_memory_are_measured_and_the_curves_agree(precision: str) -> None:
    problem = training.problem_for("cuda", 24, 8, precision=precision)
    runs = [training.train(problem, name) for name in training.implementations(False)]
    for run in runs:
        assert 0 < run.seconds < 1
        assert run.peak_bytes is not None
        assert run.peak_bytes > 8 * 16 * 14 * 62 * 62 * 4  # the stem's output
    assert training.agreement(training.rows(problem, runs)).ok


@pytest.mark.gpu
@pytest.mark.slow
def test_on_a_gpu_torch_compile_trains_too() -> None:
    problem = training.problem_for("cuda", 4, 8)
    compiled, eager = (training.train(problem, name) for name in (COMPILED, EAGER))
    assert np.abs(compiled.losses - eager.losses).max() < 0.5  # other masks, same everything else


# ---- rows ---------------------------------------------------------------------------------------


def test_a_row_for_each_step_of_each_run(
    frame: pd.DataFrame, trained: dict[str, training.Result]
) -> None:
    assert list(frame.columns) == list(training.COLUMNS)
    assert len(frame) == 3 * TINY.steps
    for name, run in training.by_implementation(frame).items():
        assert list(run["step"]) == list(range(TINY.steps))
        assert list(run["loss"]) == list(trained[name].losses)
        assert list(run["timed"]) == [False] * 4 + [True] * 4
        assert trained[name].seconds == pytest.approx(np.median(run["seconds"][4:]))
    assert set(training.by_implementation(frame)[FUSED]["variant"]) == {"auto"}
    assert pd.isna(training.by_implementation(frame)[EAGER]["variant"]).to_numpy().all()
    assert pd.isna(frame["peak_bytes"]).to_numpy().all()


def test_rows_carry_their_provenance(frame: pd.DataFrame) -> None:
    first = frame.iloc[0]
    assert first["torch"] == torch.__version__
    assert first["utc"].startswith("20")
    assert (first["clip"], first["batch"], first["device"]) == ("3x4x12x12", 8, "cpu")
    assert (first["precision"], first["seed"]) == ("ieee", 0)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_holds_the_rows_of_the_last_command(
    frame: pd.DataFrame, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / "new" / f"rows{suffix}"
    results.write_table(frame.head(2), path)
    results.write_table(frame, path)
    found = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert list(found.columns) == list(training.COLUMNS)
    np.testing.assert_allclose(found["loss"], frame["loss"])
    assert list(found["timed"]) == list(frame["timed"])


def test_files_that_cannot_be_written_are_refused_beforehand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match=r"as \.csv or \.parquet, but got 'rows.txt'"):
        results.check_table(Path("rows.txt"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RuntimeError, match=r"pip install 'numba_fused\[parquet\]'"):
        results.check_table(Path("rows.parquet"))


# ---- agreement ----------------------------------------------------------------------------------


def with_loss(frame: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """The rows with other losses of the block."""
    changed = frame.copy()
    ours = changed["implementation"] == FUSED
    changed.loc[ours, "loss"] = change(changed.loc[ours, "loss"])
    return changed


def test_agreement_is_measured_by_what_other_masks_do(frame: pd.DataFrame) -> None:
    found = training.agreement(frame)
    assert found.ok
    assert found.fused < 1e-5 < 1e-3 < found.masks
    moved = training.agreement(with_loss(frame, lambda loss: loss + 0.5 * found.masks))
    assert moved.ok
    assert moved.fused == pytest.approx(0.5 * found.masks)
    assert not training.agreement(with_loss(frame, lambda loss: loss + 1.5 * found.masks)).ok
    assert not training.agreement(with_loss(frame, lambda loss: loss * math.nan)).ok


# ---- the figure ---------------------------------------------------------------------------------


def as_on_a_gpu(frame: pd.DataFrame) -> pd.DataFrame:
    compiled = frame[frame["implementation"] == EAGER].assign(implementation=COMPILED)
    on_gpu = pd.concat([frame, compiled], ignore_index=True)
    return on_gpu.assign(device="cuda", gpu="NVIDIA H200", peak_bytes=9.7e9)


def widths(ax: Axes) -> list[float]:
    """Lengths of the horizontal bars."""
    return [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)]


def test_the_figure_shows_curves_times_and_memory_with_units(
    frame: pd.DataFrame, trained: dict[str, training.Result]
) -> None:
    figure = training.figure(as_on_a_gpu(frame))
    loss, apart, seconds, memory = figure.axes
    shown = {line.get_label(): np.asarray(line.get_ydata()) for line in loss.lines}
    assert set(shown) == set(training.LABELS.values())
    for name, run in training.by_implementation(frame).items():
        np.testing.assert_allclose(shown[training.LABELS[name]], run["loss"])
    assert loss.get_ylabel() == "training loss (nats)"
    assert apart.get_yscale() == "log"
    assert seconds.get_xlabel() == "time per step (ms)"
    assert memory.get_xlabel() == "peak memory (GB)"
    assert widths(memory) == pytest.approx([9.7] * 3)
    assert widths(seconds)[2] == pytest.approx(1e3 * trained[FUSED].seconds)
    assert "8 clips of 3x4x12x12, fp32, NVIDIA H200" in figure.get_suptitle()


def test_a_cpus_figure_has_no_memory_and_says_what_a_log_scale_cannot(frame: pd.DataFrame) -> None:
    loss, apart, seconds = training.figure(frame).axes
    assert len(loss.lines) == 3
    assert apart.get_title(loc="right") == "numba_fused: 0 at every step"
    assert len(apart.lines) == 1
    assert len(seconds.patches) == 2


# ---- the command --------------------------------------------------------------------------------


def train_command(folder: Path, *arguments: str) -> Any:
    places = ("--out", str(folder / "rows.csv"), "--figure", str(folder / "curve.png"))
    tiny = ("--device", "cpu", "--steps", "2", "--batch", "2")
    return CliRunner().invoke(cli.app, ["train", *tiny, *places, *arguments])


def test_the_command_writes_rows_and_both_figures(tmp_path: Path) -> None:
    done = train_command(tmp_path, "--json", "--seed", "4", "--precision", "tf32")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    rows = pd.read_csv(tmp_path / "rows.csv")
    assert told["ok"]
    assert len(told["rows"]) == len(rows) == 6
    assert (set(rows["seed"]), set(rows["precision"])) == ({4}, {"tf32"})
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "training loss (nats)" in (tmp_path / "curve.svg").read_text()


def test_only_a_gpus_rows_are_kept_without_being_asked(
    tmp_path: Path, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ("--steps", "2", "--batch", "2")
    done = CliRunner().invoke(cli.app, ["train", "--device", "cpu", *tiny])
    assert done.exit_code in (0, 1), done.output
    assert not list(tmp_path.iterdir())
    assert "no rows kept: --out names a file" in done.stdout

    # No GPU is needed to see where a GPU's would go.
    on_gpu = replace(TINY, device="cuda")
    result = training.Result(FUSED, [training.Step(0, 1.0, 0.5, 0.1, True)], 0.5, 10)
    monkeypatch.setattr(training, "problem_for", lambda *_, **__: on_gpu)
    monkeypatch.setattr(training, "train", lambda *_: result)
    monkeypatch.setattr(training, "rows", lambda *_: as_on_a_gpu(frame))
    done = CliRunner().invoke(cli.app, ["train"])
    assert done.exit_code == 0, done.output
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*")}
    assert written == {"plots/data/training.csv", "plots/training.png", "plots/training.svg"}


def test_the_command_fails_when_the_curves_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = training.Agreement(fused=0.2, masks=0.1)
    monkeypatch.setattr(training, "agreement", lambda frame: apart)
    done = train_command(tmp_path)
    assert done.exit_code == 1
    assert "more than noise" in done.stdout
    assert (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "device must be auto, cuda or cpu"),
        (("--precision", "fp8"), "but got 'fp8'"),
        (("--variant", "best"), "unknown variant 'best'"),
        (("--out", "rows.txt"), "rows are written as .csv or .parquet"),
        (("--figure", "curve.gif"), "saved as .png or .svg"),
    ],
)
def test_bad_usage_is_told_before_anything_is_trained(
    tmp_path: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("it trained"))
    done = train_command(tmp_path, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
