"""The account of a call: its numbers, its words, its picture."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import numba_fused as nf
from numba_fused.explain import H200, Machine, explain

KB83 = {"num_groups": 8, "min_value": -1.0, "max_value": 1.0, "cap": 0.5}
X, WEIGHT = (128, 3, 16, 64, 64), (16, 3, 3, 3, 3)
NUMBERS = ("bytes_read", "bytes_written", "launches", "memory_ms")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same account on every machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_benchmark_case_by_hand() -> None:
    account = explain(X, WEIGHT, **KB83).to_dict()
    outputs = 128 * 16 * 14 * 62 * 62
    assert account["output_shape"] == [128, 16, 14, 62, 62]
    assert account["flops"] == 2 * outputs * 3 * 27
    x_bytes, parameter_bytes = 4 * math.prod(X), 4 * (16 * 81 + 3 * 16)
    assert account["compulsory_bytes"] == x_bytes + parameter_bytes + 4 * outputs
    assert account["flops_per_byte"] == pytest.approx(32.97, abs=0.01)
    # 541.6 MB at the measured 4.19 TB/s; 17.85 GFLOP at the measured 50 TFLOP/s.
    assert account["memory_floor_ms"] == pytest.approx(0.1293, abs=1e-4)
    assert account["arithmetic_ms"] == pytest.approx(0.3570, abs=1e-4)
    assert account["roofline_ms"] == account["arithmetic_ms"]


def test_every_rung_is_accounted_for() -> None:
    account = explain(X, WEIGHT, **KB83).to_dict()
    assert [rung["name"] for rung in account["rungs"]] == nf.ladder.names()
    cannot = {rung["name"]: rung["limit"] for rung in account["rungs"] if rung["limit"]}
    assert cannot.keys() == {"tensor_core", "algebra"}
    assert "precision='tf32'" in cannot["tensor_core"]
    for rung in account["rungs"]:
        if rung["limit"]:
            assert not {rung[key] for key in NUMBERS} - {None}
            continue
        moved = rung["bytes_read"] + rung["bytes_written"]
        assert rung["launches"] >= 1
        assert rung["memory_ms"] == pytest.approx(1e3 * moved / 4.19e12)
    unfused = next(rung for rung in account["rungs"] if rung["name"] == "unfused")
    assert unfused["bytes_written"] == unfused["launches"] * 4 * math.prod(account["output_shape"])


def test_tensors_and_shapes_give_the_same_account() -> None:
    x, weight = torch.empty(2, 4, 9), torch.empty(6, 2, 3)
    words = {"num_groups": 3, "min_value": 0.0, "max_value": 1.0, "cap": 0.5, "groups": 2}
    assert str(explain(x, weight, **words)) == str(explain((2, 4, 9), (6, 2, 3), **words))
    double = explain(x.double(), weight.double(), **words)
    assert double.spec.dtype == "float64"
    assert double.spec.compulsory_bytes == 2 * explain(x, weight, **words).spec.compulsory_bytes


def test_without_a_gpu_the_machine_is_assumed_and_named() -> None:
    text = str(explain(X, WEIGHT, **KB83))
    assert H200 in text
    assert "assumed, no GPU here" in text
    assert Machine.of(None, "float64").flops_per_second < Machine.of(None).flops_per_second


def test_degenerate_chain_is_spelled_out() -> None:
    degenerate = explain(X, WEIGHT, num_groups=8, min_value=0.25, max_value=1.0)
    assert degenerate.to_dict()["constant"] == 0.25
    assert "clamp(min(h, 0.25), 0.25, 1) is 0.25 for every finite h" in " ".join(
        str(degenerate).split()
    )
    sound = explain(X, WEIGHT, **KB83)
    assert sound.to_dict()["constant"] is None
    assert "depends on its input" in str(sound)


def test_text_fits_100_columns_and_names_the_rungs() -> None:
    text = str(explain(X, WEIGHT, stride=(1, 2, 2), padding="valid", **KB83))
    assert max(map(len, text.splitlines())) <= 100
    for rung in nf.ladder.rungs():
        assert f"{rung.number} {rung.name}" in text


def test_limit_is_shown_instead_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        nf.ladder.Rung, "limit", lambda self, spec: "a < b" if self.name == "epilogue" else None
    )
    account = explain(X, WEIGHT, **KB83)
    assert "cannot run: a < b" in str(account)
    assert "cannot run: a &lt; b" in account._repr_html_()
    labels = [label.get_text() for label in account.plot(Figure().subplots()).get_yticklabels()]
    assert "epilogue" not in labels
    assert "unfused" in labels


def test_shapes_that_no_tile_fits_are_accounted_for() -> None:
    """A rung without a tile has no ledger to ask for; the others have theirs."""
    words = {"num_groups": 1, "min_value": -1.0, "max_value": 1.0, "cap": 0.5, "stride": (1000, 1)}
    account = explain((1, 1, 3000, 16), (2, 1, 1, 3), **words)
    rungs = {rung.name: rung for rung in account.rungs}
    for name in ("tensor_core", "split", "pipelined"):
        assert rungs[name].ledger is None
        assert rungs[name].limit
    assert "shared memory" in str(rungs["split"].limit)
    assert rungs["one_kernel"].ledger is not None
    assert "cannot run: its input tile" in str(account)
    assert json.loads(json.dumps(account.to_dict()))["rungs"][8]["bytes_read"] is None


def test_html_has_a_row_for_every_rung() -> None:
    account = explain(X, WEIGHT, **KB83)
    assert account._repr_html_().count("<tr>") == len(account.facts()) + 1 + len(account.rungs)


def test_plot_draws_the_ledger() -> None:
    account = explain(X, WEIGHT, **KB83)
    axes = account.plot(Figure().subplots())
    bars = axes.containers
    drawn = [rung.ledger for rung in account.rungs if rung.ledger is not None]
    assert len(drawn) == len(account.rungs) - 2
    read = [bar.get_width() for bar in bars[0]]
    assert read == pytest.approx([ledger.bytes_read / 1e9 for ledger in drawn])
    line = axes.get_lines()[-1]
    assert np.asarray(line.get_xdata()) == pytest.approx(account.spec.compulsory_bytes / 1e9)


def test_json_round_trip() -> None:
    account = explain(X, WEIGHT, **KB83).to_dict()
    assert json.loads(json.dumps(account)) == account


def test_bad_arguments_raise_as_the_operator_does() -> None:
    with pytest.raises(RuntimeError, match="num_groups"):
        explain(X, WEIGHT, num_groups=5, min_value=0.0, max_value=1.0)
    with pytest.raises(RuntimeError, match="expected x of 5 dimensions"):
        explain((3, 4), WEIGHT, **KB83)
    with pytest.raises(ValueError, match="between 0 and 1"):
        explain(X, WEIGHT, dropout_p=1.5, **KB83)
