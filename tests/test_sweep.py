"""Sweeps: what they declare, that no row is lost or doubled, and what two files say together."""

import collections
import json
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from numba_fused import bench, cli, cluster, compare, results, sweep
from numba_fused.results import Key, Row
from numba_fused.sweep import GpuLostError, Sweep

GPU = "Test GPU"


def batches(*sizes: int, **rest: Any) -> Sweep:
    return Sweep(
        name="batches", **{"axes": {"batch": list(sizes)}, "variants": ["torch", "tiled"], **rest}
    )


def row_of(key: Key, **rest: Any) -> Row:
    """What `bench` would have measured: a time that follows from the key."""
    spec = bench.case_spec(key.case, key.precision)
    milliseconds = spec.batch * (2.0 if key.variant == "torch" else 1.0)
    times = {"p20_ms": 0.9 * milliseconds, "p50_ms": milliseconds, "p80_ms": 1.1 * milliseconds}
    made = bench.case_row(key.case, spec, backward=key.backward) | key._asdict() | times
    return made | {"status": "ok", "gpu": GPU, "utc": results.now(), **rest}


def stub(*fields: Any) -> Row:
    return row_of(Key(*fields))


def keys_of(path: Path) -> list[Key]:
    return [results.key(row) for row in results.read(path).to_dict("records")]


# ---- declaring --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"axes": {"batches": [1]}}, "unknown axis 'batches': use one of case, threads_per_block"),
        ({"axes": {"batch": 4}}, "axis batch takes a list of values or"),
        ({"axes": {"batch": []}}, "axis batch takes a list of values or"),
        ({"axes": {"batch": ["many"]}}, "parameter batch of a case takes one number"),
        ({"axes": {"batch": [0]}}, "case kb83-b0: unknown case|batch"),
        ({"axes": {"batch": {"from": 1, "to": 8, "factor": 1}}}, "a range on axis batch is"),
        ({"axes": {"batch": {"from": 1, "to": 8}}}, "a range on axis batch is"),
        ({"axes": {"batch": [1]}, "fixed": {"batch": 2}}, "batch cannot be an axis and fixed"),
        ({"axes": {"num_groups": [5]}}, "case kb83,num_groups=5: .* num_groups=5.*under where"),
        ({"axes": {"case": ["kb84"]}}, "unknown case 'kb84'"),
        ({"axes": {"threads_per_block": [100]}}, "multiple of 32 from 32 to 1024, but got 100"),
        ({"axes": {"cap": [-1]}}, "case kb83,cap=-1.0: clamp.* is -1 for every finite h"),
        ({"base": "kb84"}, "unknown case 'kb84'"),
        ({"variants": ["fast"]}, "unknown variant 'fast'"),
        ({"precisions": ["fp8"]}, "precision must be one of"),
        ({"backward": ["yes"]}, r"backward takes a list of true and false, but got \['yes'\]"),
        ({"backward": True}, "backward takes a list of true and false, but got True"),
        ({"backward": []}, "nothing is left to measure"),
        ({"where": ["batch >"]}, "condition 'batch >' under where"),
        ({"where": ["batches > 1"]}, "condition 'batches > 1' under where: .*batches"),
        ({"where": ["batch > 128"]}, "nothing is left to measure"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_runs(
    declared: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=f"sweep wrong: .*({said})"):
        Sweep(name="wrong", **declared)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("axis: {}", "must be a mapping with some of: about, axes, .*; it has axis"),
        ("- batch", "must be a mapping"),
        ("axes: {batch: [1", "is not YAML"),
    ],
)
def test_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        Sweep.read(path)


def test_file_and_python_declare_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        textwrap.dedent("""
            about: A test.
            base: kb83-b16
            axes:
              plane: {from: 8, to: 40, factor: 2}
              threads_per_block: [32, 64]
            fixed: {padding: same, kernel_size: [3, 1, 1]}
            where: [plane * threads_per_block <= 1024, variant != "tiled" or plane < 32]
            variants: [torch, tiled]
            precisions: [tf32]
        """)
    )
    read = Sweep.read(path)
    fixed = {"padding": "same", "kernel_size": [3, 1, 1]}
    assert (read.name, read.about, read.fixed) == ("mine", "A test.", fixed)
    shape = "kernel_size=3x1x1,padding=same"
    assert set(read.levels) == {
        Key(f"kb83-b16,plane=8,{shape}", "torch", "tf32", None, False),
        Key(f"kb83-b16,plane=8,{shape}", "tiled", "tf32", 32, False),
        Key(f"kb83-b16,plane=8,{shape}", "tiled", "tf32", 64, False),
        Key(f"kb83-b16,plane=16,{shape}", "torch", "tf32", None, False),
        Key(f"kb83-b16,plane=16,{shape}", "tiled", "tf32", 32, False),
        Key(f"kb83-b16,plane=16,{shape}", "tiled", "tf32", 64, False),
        Key(f"kb83-b16,plane=32,{shape}", "torch", "tf32", None, False),
    }


ROW_FILES = ("ladder", "cases", "sweeps", "backward")
SWEPT = {
    "batch": {"batch": [2**n for n in range(11)]},
    "plane": {"plane": [8, 16, 32, 64, 128]},
    "channels": {
        "in_channels": [1, 3, 8, 16, 32, 64, 128],
        "out_channels": [8, 16, 32, 64, 128, 256],
    },
    "kernel": {"kernel_size": [1, 2, 3, 4, 5, 6, 7]},
    "groups": {"num_groups": [1, 2, 4, 8, 16]},
    "dropout": {"dropout_p": [0.0, 0.1, 0.2, 0.5, 0.9]},
    "threads": {"threads_per_block": [32, 64, 128, 256, 512, 1024]},
    "ladder": {"precision": ["ieee", "tf32"], "variant": results.variants()},
    "precision": {"precision": ["ieee", "tf32"]},
    "cases": {"case": list(bench.CASES), "precision": ["ieee", "tf32"]},
    "backward": {
        "batch": [1, 16, 128],
        "precision": ["ieee", "tf32"],
        "backward": [False, True],
    },
    "gradients": {"backward": [True], "precision": ["ieee", "tf32"]},
}


@pytest.mark.parametrize("name", SWEPT)
def test_shipped_sweeps_cover_their_axes(name: str) -> None:
    keys = sweep.plan([Sweep.read(name)])
    for axis, values in SWEPT[name].items():
        places = keys if axis in Key._fields else [bench.case(key.case) for key in keys]
        found = {getattr(place, axis) for place in places}
        assert found == set(values) | ({None} if None in found and name != "threads" else set())
    assert Sweep.read(name).about


@pytest.mark.parametrize("name", SWEPT)
def test_shipped_sweeps_were_run(name: str) -> None:
    """On an H200: plots/data has a row of each, measured or with its reason."""
    frames = [results.read(results.DATA / f"{file}.csv") for file in ROW_FILES]
    rows = [row for frame in frames for row in frame.to_dict("records")]
    assert set(sweep.plan([Sweep.read(name)])) <= set(map(results.key, rows))
    assert not any(row["status"] == "failed" for row in rows)


def test_every_shipped_sweep_is_known_here() -> None:
    assert sweep.shipped().keys() == SWEPT.keys()
    with pytest.raises(ValueError, match="unknown sweep 'bathc': use one of backward, batch"):
        Sweep.read("bathc")


# ---- planning ---------------------------------------------------------------------------------


def test_coarse_grid_comes_before_the_fine_one() -> None:
    assert sweep.coarse_to_fine(9) == [1, 4, 3, 4, 2, 4, 3, 4, 1]
    assert sweep.coarse_to_fine(5, start=3) == [1, 3, 2, 0, 1]
    assert sweep.coarse_to_fine(1) == [1]
    keys = sweep.plan([batches(1, 2, 4, 8, 16, 32, 64, 128)])
    order = [bench.case(unit[0].case).batch for unit in sweep.units(keys)]
    assert order[:4] == [128, 1, 8, 2]
    assert sorted(order) == [1, 2, 4, 8, 16, 32, 64, 128]


def test_sweeps_together_measure_what_they_share_once_and_interleave() -> None:
    planes = Sweep(name="planes", axes={"plane": [8, 16, 64]}, variants=["torch", "auto"])
    keys = sweep.plan([batches(1, 2, 128), planes])
    assert len(keys) == len(set(keys))
    of_kb83 = [key.variant for key in keys if key.case == "kb83"]
    assert of_kb83 == ["torch", "tiled", "auto"] == [key.variant for key in keys[:3]]
    cases = list(dict.fromkeys(key.case for key in keys))
    assert cases == ["kb83", "kb83-b1", "kb83,plane=8", "kb83-b2", "kb83,plane=16"]


def test_rows_of_a_workload_stay_together() -> None:
    declared = batches(1, 2, precisions=["ieee", "tf32"], fixed={"threads_per_block": 64})
    keys = sweep.plan([declared])
    assert [key for unit in sweep.units(keys) for key in unit] == keys
    assert [len(unit) for unit in sweep.units(keys)] == [2, 2, 2, 2]
    assert {key.threads_per_block for key in keys} == {None, 64}


def test_both_passes_share_a_workload_and_take_no_block_size() -> None:
    declared = batches(1, axes={"threads_per_block": [64, 128]}, backward=[False, True])
    keys = sweep.plan([declared])
    assert [len(unit) for unit in sweep.units(keys)] == [5]
    both = [key for key in keys if key.backward]
    assert [(key.variant, key.threads_per_block) for key in both] == [
        ("torch", None),
        ("tiled", None),
    ]
    assert {key.threads_per_block for key in keys if key not in both} == {None, 64, 128}


def test_preview_counts_the_backward_pass() -> None:
    forward, both = (
        sweep.preview(sweep.plan([batches(128, backward=backward)]))[0]
        for backward in ([False], [True])
    )
    spec, key = bench.case_spec("kb83"), sweep.plan([batches(128)])[0]
    assert 1.5 * forward.gigabytes < both.gigabytes < 3 * forward.gigabytes
    alone, with_backward = (
        sweep._row_seconds(spec, key._replace(backward=backward), 3) for backward in (False, True)
    )
    assert alone < with_backward
    assert forward.seconds < both.seconds
    one = sweep.preview(sweep.plan([batches(128, backward=[False, True])]))[0]
    assert one.rows == forward.rows + both.rows
    assert one.gigabytes == both.gigabytes
    assert max(forward.seconds, both.seconds) < one.seconds < forward.seconds + both.seconds


def test_preview_grows_with_the_work() -> None:
    small, large = sweep.preview(sweep.plan([batches(1, 1024)]))
    assert (small.rows, large.rows) == (2, 2)
    spec = bench.case_spec("kb83-b1024")
    tensors = bench.MIN_SETS * spec.compulsory_bytes / 1e9
    assert tensors < large.gigabytes < 8 * tensors
    assert 0 < small.seconds < large.seconds < 600


# ---- running ----------------------------------------------------------------------------------


def test_rows_are_in_the_file_when_they_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    keys = sweep.plan([batches(1, 2)])
    for count, row in enumerate(sweep.run(keys, path, measure=stub), start=1):
        assert results.key(row) == keys[count - 1]
        assert keys_of(path) == keys[:count]
    assert sweep.missing(keys, path) == []


def test_failing_measurement_is_a_row_with_its_reason(tmp_path: Path) -> None:
    path, keys = tmp_path / "rows.csv", sweep.plan([batches(1, 2)])

    def measure(*fields: Any) -> Row:
        if Key(*fields) == keys[1]:
            raise RuntimeError("out of luck\nand more")
        return stub(*fields)

    statuses = [row["status"] for row in sweep.run(keys, path, measure=measure)]
    assert statuses == ["ok", "failed", "ok", "ok"]
    failed = results.read(path).iloc[1]
    assert not failed["backward"]
    assert failed["reason"] == "RuntimeError: out of luck"
    assert (failed["x_shape"], failed["threads_per_block"]) == ("1x3x16x64x64", 256)
    assert failed["torch"]
    assert failed["utc"]
    assert sweep.missing(keys, path) == []
    assert sweep.missing(keys, path, retry_failed=True) == [keys[1]]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, GpuLostError])
def test_interrupted_sweep_goes_on_where_it_stopped(
    tmp_path: Path, interruption: type[BaseException]
) -> None:
    path, keys = tmp_path / "rows.csv", sweep.plan([batches(1, 2, 4)])
    measured = collections.Counter[Key]()

    def measure(*fields: Any) -> Row:
        if len(measured) == 3:
            raise interruption("now")
        measured[Key(*fields)] += 1
        return stub(*fields)

    with pytest.raises(interruption):
        list(sweep.run(keys, path, measure=measure))
    left = sweep.missing(keys, path)
    assert left == keys[3:]
    list(sweep.run(left, path, measure=stub))
    assert keys_of(path) == keys


def test_sweep_that_is_killed_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    script = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from numba_fused import sweep
        from test_sweep import batches, stub
        measured = []
        def measure(*fields):
            if len(measured) == 3:
                open({str(path)!r}, "a").write("kb83-b2,torch,,ok")  # a write the crash cuts short
                os.kill(os.getpid(), 9)
            measured.append(fields)
            return stub(*fields)
        list(sweep.run(sweep.plan([batches(1, 2, 4)]), {str(path)!r}, measure=measure))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    keys = sweep.plan([batches(1, 2, 4)])
    left = sweep.missing(keys, path)
    assert left == keys[3:]
    list(sweep.run(left, path, measure=stub))
    assert keys_of(path) == keys


def test_nothing_is_started_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = tmp_path / "rows.csv", sweep.plan([batches(1, 2, 4)])
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def measure(*fields: Any) -> Row:
        clock[0] += 50
        return stub(*fields)

    list(sweep.run(keys, path, measure=measure, minutes=2))
    assert keys_of(path) == keys[:3]


def test_file_is_of_one_gpu_and_one_sweep_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, keys = tmp_path / "rows.csv", sweep.plan([batches(1, 2)])
    first = sweep.run(keys[:2], path, measure=stub)
    next(first)
    with pytest.raises(ValueError, match="another sweep is writing"):
        next(sweep.run(keys[2:], path, measure=stub))
    list(first)
    monkeypatch.setattr(results, "gpu_name", lambda: "Other GPU")
    with pytest.raises(ValueError, match="rows of Other GPU and Test GPU do not go into one file"):
        next(sweep.run(keys[2:], path, measure=stub))
    assert keys_of(path) == keys[:2]


def test_measuring_is_that_of_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    stand = bench.Bench()
    asked = []
    monkeypatch.setattr(sweep, "_bench", lambda: stand)
    monkeypatch.setattr(
        stand, "row", lambda *arguments, backward: asked.append((*arguments, backward)) or {}
    )
    sweep.measure("kb83-b1", "tiled", "ieee", 64, False)
    sweep.measure("kb83-b1", "auto", "tf32", None, True)
    assert asked == [
        ("kb83-b1", "tiled", 64, "ieee", False),
        ("kb83-b1", "auto", 256, "tf32", True),
    ]
    stand.lost_to = "tiled"
    with pytest.raises(GpuLostError, match="the GPU was lost to tiled"):
        sweep.measure("kb83-b1", "auto", "ieee", None, False)


# ---- several workers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two real worker processes, each pinned to a GPU that need not be there."""
    with cluster.on_gpus(["0", "1"]) as client:
        yield client


def noting(
    log: Path, fate: Callable[[Key], None] = lambda key: None, seconds: float = 0.02
) -> sweep.Measure:
    """A stub that notes where and when it measures what; `fate` happens in the middle of it."""

    def measure(*fields: Any) -> Row:
        import os
        import time

        def note(event: str) -> None:
            with log.open("a") as file:
                said = (os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic(), event, list(fields))
                file.write(json.dumps(said) + "\n")

        note("start")
        fate(Key(*fields))
        time.sleep(seconds)
        note("end")
        key = Key(*fields)
        return {**key._asdict(), "status": "ok", "gpu": "", "utc": results.now()}

    return measure


def noted(log: Path) -> pd.DataFrame:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    frame = pd.DataFrame(lines, columns=["gpu", "time", "event", "fields"])
    return frame.assign(key=[Key(*fields) for fields in frame["fields"]])


def test_workers_are_pinned_and_share_the_work_once(client: Any, tmp_path: Path) -> None:
    path, log = tmp_path / "rows.csv", tmp_path / "log"
    keys = sweep.plan([batches(1, 2, 4, 8, variants=["torch", "tiled", "auto", "split"])])
    list(sweep.run(keys, path, measure=noting(log, seconds=0.1), client=client))
    assert sorted(keys_of(path), key=keys.index) == keys
    seen = noted(log)
    assert set(seen["gpu"]) == {"0", "1"}
    assert list(client.nthreads().values()) == [1, 1]
    assert sorted(seen.loc[seen["event"] == "end", "key"], key=keys.index) == keys
    # One at a time on each: what starts ends before the next one starts.
    for _, on_one in seen.groupby("gpu"):
        assert list(on_one.sort_values("time")["event"]) == ["start", "end"] * (len(on_one) // 2)
        assert len(on_one) >= 8
    # Workers keep to a case: nearly always, so far less often than once a row it is set up.
    cases = [on_one.sort_values("time")["key"].str[0] for _, on_one in seen.groupby("gpu")]
    assert sum((case != case.shift()).sum() for case in cases) <= len(keys) // 2


def test_one_workload_is_shared_by_idle_workers(client: Any, tmp_path: Path) -> None:
    path, log = tmp_path / "rows.csv", tmp_path / "log"
    keys = sweep.plan([batches(1, variants=results.variants())])
    measure = noting(log, seconds=0.2)  # longer than a busy machine keeps a worker waiting
    list(sweep.run(keys, path, measure=measure, client=client))
    assert sorted(keys_of(path), key=keys.index) == keys
    assert min(noted(log)["gpu"].value_counts()) >= 2 * len(keys) // 3


def test_worker_that_dies_loses_nothing_and_doubles_nothing(client: Any, tmp_path: Path) -> None:
    path, log = tmp_path / "rows.csv", tmp_path / "log"
    keys = sweep.plan([batches(1, 2, 4)])
    killed, lost = keys[1], keys[4]

    def fate(key: Key) -> None:
        import os
        import signal

        from numba_fused.sweep import GpuLostError

        marker = log.with_name(f"{key.case} {key.variant}")
        if key not in (killed, lost) or marker.exists():
            return
        marker.touch()
        if key == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise GpuLostError("lost to an earlier measurement")

    rows = list(sweep.run(keys, path, measure=noting(log, fate), client=client))
    assert {row["status"] for row in rows} == {"ok"}
    assert sorted(keys_of(path), key=keys.index) == keys
    seen = noted(log)
    starts, ends = (collections.Counter(seen.query("event == @e")["key"]) for e in ("start", "end"))
    assert starts[killed] > ends[killed]
    assert starts[lost] > ends[lost]


def test_measurement_that_kills_or_fails_is_a_row_with_its_reason(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    path, log = tmp_path / "rows.csv", tmp_path / "log"
    keys = sweep.plan([batches(1, 2)])
    killer, failing = keys[0], keys[3]

    def fate(key: Key) -> None:
        import os
        import signal

        if key == killer:
            os.kill(os.getpid(), signal.SIGKILL)
        if key == failing:
            raise ZeroDivisionError("by accident")

    list(sweep.run(keys, path, measure=noting(log, fate), client=client))
    frame = results.read(path)
    reasons = {
        results.key(row): row["reason"]
        for row in frame.to_dict("records")
        if row["status"] == "failed"
    }
    assert reasons.keys() == {killer, failing}
    assert reasons[killer].startswith("KilledWorker")
    assert reasons[failing] == "ZeroDivisionError: by accident"
    assert len(frame) == len(keys)


def test_stopping_a_cluster_leaves_what_was_not_started(client: Any, tmp_path: Path) -> None:
    path, log = tmp_path / "rows.csv", tmp_path / "log"
    keys = sweep.plan([batches(1, 2, 4, 8, 16)])
    client.wait_for_workers(2)
    assert list(sweep.run(keys, path, measure=noting(log), client=client, minutes=0)) == []
    assert not log.exists()
    rows = sweep.run(keys, path, measure=noting(log), client=client)
    first = [next(rows), next(rows)]
    rows.close()  # what Ctrl-C does
    assert keys_of(path) == [results.key(row) for row in first]
    left = sweep.missing(keys, path)
    list(sweep.run(left, path, measure=noting(log), client=client))
    assert sorted(keys_of(path), key=keys.index) == keys


def test_gpus_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cluster.chosen_gpus("all") == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc,7")
    assert cluster.chosen_gpus("all") == ["5", "GPU-abc", "7"]
    assert cluster.chosen_gpus("7,5") == ["7", "5"]
    for wrong in ("0", "5,5", ""):
        with pytest.raises(ValueError, match="--gpus takes all, or some of 5, GPU-abc, 7"):
            cluster.chosen_gpus(wrong)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU is here"):
        cluster.chosen_gpus("all")


# ---- rows of a sweep --------------------------------------------------------------------------


def test_tidy_frame_has_the_newest_row_of_everything_with_its_axes(tmp_path: Path) -> None:
    path, parquet = sweep.files(tmp_path)
    planes = Sweep(name="planes", axes={"plane": [8, 64]}, variants=["torch"])
    keys = sweep.plan([batches(1, 128), planes])
    results.append([row_of(key) for key in keys], path)
    results.append([row_of(keys[0], p50_ms=7.0)], path)
    frame = sweep.load(path)
    assert len(results.read(path)) == len(frame) + 1 == len(keys) + 1
    again = frame.loc[(frame["case"] == "kb83") & (frame["variant"] == keys[0].variant)]
    assert list(again["p50_ms"]) == [7.0]
    assert set(sweep.load(path, sweep=planes)["plane"]) == {8, 64}
    assert {"batch", "in_channels", "plane", "kernel_size", *results.COLUMNS} <= set(frame)
    assert frame.columns.is_unique
    sweep.write_parquet(path, parquet)
    kept = (made.dropna(axis="columns", how="all") for made in (sweep.load(parquet), frame))
    pd.testing.assert_frame_equal(*kept, check_dtype=False)


def test_rows_of_two_machines_are_one_frame(tmp_path: Path) -> None:
    key = sweep.plan([batches(1)])[0]
    for name in ("a", "b"):
        results.append([row_of(key, gpu=f"GPU {name}")], tmp_path / f"{name}.csv")
    assert list(sweep.load(tmp_path / "a.csv", tmp_path / "b.csv")["gpu"]) == ["GPU a", "GPU b"]
    assert len(sweep.load(tmp_path / "a.csv", tmp_path / "a.csv")) == 1


def frame_of(*rows: Row) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(results.COLUMNS))


def test_comparison_is_a_ratio_with_its_spread() -> None:
    torch, tiled, torch_2, tiled_2 = sweep.plan([batches(1, 2)])
    a = frame_of(row_of(torch), row_of(tiled), row_of(torch_2))
    slower = {"p20_ms": 2.7, "p50_ms": 3.0, "p80_ms": 3.3}
    failed = {"status": "failed", "p50_ms": None}
    b = frame_of(row_of(tiled_2), row_of(torch, **slower), row_of(tiled), row_of(torch_2, **failed))
    pairs = compare.compare(a, b)
    assert [pair.key for pair in pairs] == [torch, tiled, torch_2, tiled_2]
    first = pairs[0]
    assert first.ratio == pytest.approx(2 / 3)
    assert (first.low, first.high) == (pytest.approx(1.8 / 3.3), pytest.approx(2.2 / 2.7))
    assert [pair.differs for pair in pairs] == [True, False, False, False]
    assert [pair.note for pair in pairs] == ["", "", "failed in B", ""]
    assert [pair.only_in for pair in pairs] == ["", "", "", "B"]
    both = compare.Pair(torch._replace(backward=True), 30.0, 3.0, 10.0, 9.0, 11.0)
    found = compare.by_variant([*pairs, compare.Pair(torch, 3.0, 2.0, 1.5, 1.4, 1.6), both])
    assert found["torch"] == (2, pytest.approx(1.0), pytest.approx(2 / 3), 1.5)
    assert found["torch + backward"] == (1, pytest.approx(10.0), 10.0, 10.0)


def test_passes_are_compared_with_their_like() -> None:
    alone, both = sweep.plan([batches(1, variants=["torch"], backward=[False, True])])
    slow, slower = {"p50_ms": 20.0}, {"p50_ms": 40.0}
    a = frame_of(row_of(alone), row_of(both, **slow))
    b = frame_of(row_of(both, **slower), row_of(alone))
    assert [pair.ratio for pair in compare.compare(a, b)] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"no measurement in common.*backward"):
        compare.compare(frame_of(row_of(alone)), frame_of(row_of(both)))


def test_comparison_of_what_cannot_be_compared_is_refused() -> None:
    first, second = (frame_of(row_of(key)) for key in sweep.plan([batches(1)]))
    with pytest.raises(ValueError, match="no measurement in common"):
        compare.compare(first, second)
    with pytest.raises(ValueError, match="file B has rows of Test GPU and GPU b"):
        compare.compare(first, pd.concat([first, first.assign(gpu="GPU b")]))


# ---- the command line -------------------------------------------------------------------------


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[Key]:
    """A GPU that is not there, and how often what was measured on it."""
    measured = collections.Counter[Key]()

    def measure(*fields: Any) -> Row:
        measured[Key(*fields)] += 1
        return row_of(Key(*fields), **({"status": "skipped"} if fields[1] == "split" else {}))

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(results, "gpu_name", lambda: GPU)
    honest = sweep.run
    monkeypatch.setattr(sweep, "run", lambda *a, **rest: honest(*a, measure=measure, **rest))
    return measured


def numba_fused(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_command_measures_what_is_missing(
    stubbed: collections.Counter[Key], tmp_path: Path
) -> None:
    keys = sweep.plan([Sweep.read("threads"), Sweep.read("precision")])
    command = ("sweep", "threads", "precision", "--out", tmp_path / "out")
    dry = json.loads(numba_fused(*command, "--dry-run", "--json").stdout)
    assert (dry["declared"], dry["missing"], dry["rows"]) == (len(keys),) * 3
    assert not (tmp_path / "out").exists()
    first = numba_fused(*command, "--limit", "7")
    assert first.exit_code == 0, first.output
    assert list(stubbed) == keys[:7]
    assert f"7 ok; {len(keys) - 7} to go: run the same command again" in first.stdout
    assert "7/7 kb83 ieee" in first.stderr
    assert numba_fused(*command).exit_code == 0
    assert stubbed == dict.fromkeys(keys, 1)
    assert "nothing to measure" in numba_fused(*command).stdout
    assert numba_fused(*command, "--force", "--limit", "2").exit_code == 0
    assert stubbed.total() == len(keys) + 2
    csv, parquet = sweep.files(tmp_path / "out")
    assert len(results.read(csv)) == len(keys) + 2
    assert len(results.read(parquet)) == len(keys)


def test_command_measures_both_passes_and_says_which(
    stubbed: collections.Counter[Key], tmp_path: Path
) -> None:
    done = numba_fused("sweep", "backward", "--out", tmp_path / "rows.csv")
    assert done.exit_code == 0, done.output
    assert collections.Counter(key.backward for key in stubbed) == {False: 18, True: 18}
    assert "kb83 ieee torch 256 ms" in done.stderr
    assert "kb83 ieee torch + backward 256 ms" in done.stderr
    assert sweep.missing(list(stubbed), tmp_path / "rows.csv") == []
    rows = results.read(tmp_path / "rows.csv")
    both = rows.loc[rows["backward"]]
    assert set(both["compulsory_bytes"]).isdisjoint(rows.loc[~rows["backward"], "compulsory_bytes"])
    compared = numba_fused("compare", tmp_path / "rows.csv", tmp_path / "rows.csv").stdout
    assert "torch.compile + backward" in compared


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch", "--gpus", "all", "--scheduler", "tcp://there"], "not both"),
        (["batch", "--gpus", "7"], "--gpus takes all"),
        (["bathc"], "unknown sweep 'bathc'"),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["batch", "--limit", "0"], "limit"),
        (["batch"], "timing needs a CUDA GPU"),
    ],
)
def test_bad_usage_of_the_command(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = numba_fused("sweep", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_command_exits_with_1_when_something_fails_or_the_gpu_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stubbed: collections.Counter[Key]
) -> None:
    key, other = sweep.plan([batches(1)])

    def run(*_: object, **__: object) -> Iterator[Row]:
        yield row_of(key, status="failed", reason="[odd] markup")

    def lose(*_: object, **__: object) -> Iterator[Row]:
        yield row_of(other)
        raise GpuLostError("the GPU was lost to tiled")

    for broken, said in ((run, "failed: [odd] markup"), (lose, "the GPU was lost to tiled")):
        monkeypatch.setattr(sweep, "run", broken)
        results.append([row_of(key)], tmp_path / "rows.csv")
        result = numba_fused("sweep", "ladder", "--out", tmp_path)
        assert result.exit_code == 1
        assert said in result.output


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=width))
    keys = sweep.plan([Sweep.read("channels")])[:40]
    for name, factor in (("a", 1.0), ("b", 1.3)):
        rows = [row_of(key) for key in keys]
        slowed = [{k: factor * v if k.endswith("_ms") else v for k, v in r.items()} for r in rows]
        results.append(slowed, tmp_path / f"{name}.csv")
    listed = numba_fused("sweep").stdout
    assert all(name in listed for name in sweep.shipped())
    dry = numba_fused("sweep", "channels", "--dry-run", "--out", tmp_path / "a.csv").stdout
    assert "40 are in the file" in " ".join(dry.split())
    compared = numba_fused("compare", tmp_path / "a.csv", tmp_path / "b.csv")
    assert compared.exit_code == 0
    said = " ".join(compared.stdout.split())
    assert "slower" in said
    assert f"{len(keys)} of {len(keys)} differ by more than that" in said
    for text in (listed, dry, compared.stdout.partition("\nkb83")[2]):
        assert max(map(len, text.splitlines())) <= width
    pairs = json.loads(
        numba_fused("compare", tmp_path / "a.csv", tmp_path / "b.csv", "--json").stdout
    )["pairs"]
    assert {round(pair["ratio"], 3) for pair in pairs} == {round(1 / 1.3, 3)}


def test_without_its_extras_the_command_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("yaml", "distributed"):
        monkeypatch.setitem(sys.modules, module, None)
    assert "numba_fused[sweeps]" in numba_fused("sweep", "batch").output
    with pytest.raises(RuntimeError, match=r"numba_fused\[sweeps\]"), cluster.on_gpus(["0"]):
        pass
