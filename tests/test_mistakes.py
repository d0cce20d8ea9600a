"""mistakes/: every famous wrong kernel is one change away from a right one, and gets caught."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache

import pytest
from typer.testing import CliRunner

from numba_fused import cli, ladder, mistakes, verify
from numba_fused.backward import clear_kernels
from numba_fused.device import reductions
from numba_fused.ladder import rung_4_one_kernel
from numba_fused.mistakes import Mistake, gallery
from numba_fused.mistakes.mistake import BACKWARD, PACKAGE
from numba_fused.mistakes.naive import NaiveTest

# What catches each, and words of the verifier's message.
EXPECTED = {
    "zeros-only": ("wrong zeros", r"^error 1.00e\+00 is above the bound"),
    "missing-op": ("error above bound", r"^error .* above the bound"),
    "bounds-before-norm": ("error above bound", r"^error .* above the bound"),
    "clamp-before-min": ("error above bound", r"^error .* with bounds that cross: min .* cap "),
    "nan-swallowed": ("not finite", r"^NaN is not where the reference has it"),
    "no-scaling": ("error above bound", r"^error .* above the bound"),
    "mask-in-eval": ("wrong zeros", r"zero where the reference is not: \d+ of"),
    "one-seed-for-all": ("mask differs", r"^not dropped where the mask says so: \d+ of"),
    "grid-dependent-mask": ("mask differs", r"^not dropped where the mask says so: \d+ of"),
    "wrong-group-indexing": ("error above bound", r"^error .* above the bound"),
    "wrong-halo": ("out of bounds", r"outside global array 'x' .* at convolution.py with wrong-h"),
    "off-by-one-tail": ("out of bounds", r"outside global array .* convolution_kernel"),
    "tail-left-out": ("not finite", r"^NaN is not where the reference has it"),
    "stride-ignored": ("error above bound", r"^error .* above the bound"),
    "groups-ignored": ("error above bound", r"^error .* above the bound"),
    "variance-n-1": ("error above bound", r"^error .* above the bound"),
    "raw-moments": ("error above bound", r"^error .* above the bound"),
    "missing-barrier": ("uninitialised read", r"array 'scratch' .* before anything wrote it"),
    "stale-shared-memory": ("uninitialised read", r"array 'scratch' .* before anything wrote it"),
    "reused-scratch": ("race", r"(?s)'scratch_g' .*no barrier orders.*reads it at.*writes it at"),
    "float-atomics": ("not deterministic", r"^gradient of \w+: two runs differ: \d+ of"),
    "dgamma-without-xhat": ("gradient wrong", r"^gradient of gamma: error .* above the bound"),
    "missing-mean-terms": ("gradient wrong", r"^gradient of x: error .* above the bound"),
    "fresh-mask": ("gradient wrong", r"^gradient of x: error .* above the bound"),
}
SOME = mistakes.get("missing-barrier")
every_mistake = pytest.mark.parametrize("name", mistakes.names())


examine = mistakes.examine  # some tests replace it


@cache
def verdict_on(name: str) -> mistakes.Verdict:
    return examine(mistakes.get(name))


def changed(**fields: object) -> Mistake:
    return dataclasses.replace(SOME, **fields)  # pyright: ignore[reportArgumentType]


# ---- the verifier rejects them, and says why ----------------------------------------------------


def test_every_mistake_is_expected() -> None:
    assert sorted(EXPECTED) == sorted(mistakes.names())


@every_mistake
def test_the_verifier_rejects_it_and_says_why(name: str) -> None:
    caught_by, words = EXPECTED[name]
    verdict = verdict_on(name)
    assert verdict.caught
    assert verdict.caught_by == caught_by, verdict.message
    assert re.search(words, verdict.message), verdict.message


def test_right_kernels_pass_where_the_wrong_ones_fail() -> None:
    """So it is the change that is rejected; and the package is as it was before."""
    tried = {}
    for verdict in map(verdict_on, mistakes.names()):
        assert verdict.case is not None
        tried[verdict.mistake.runs, verdict.case.index] = verdict.case
    for (runs, _), case in tried.items():
        result = verify.check_gradients(case) if runs == BACKWARD else verify.check(case, runs)
        assert result.status == "ok", f"{runs}: {case}: {result.reason}"


@every_mistake
def test_a_naive_test_does_not_see_it(name: str) -> None:
    """It accepts the wrong kernel, and the right one too."""
    mistake = mistakes.get(name)
    assert mistake.passes_naive_test()
    assert mistake.passes.accepts(mistake.runs)


def test_a_naive_test_can_fail() -> None:
    zeros, missing_means = mistakes.get("zeros-only"), mistakes.get("missing-mean-terms")
    plain = NaiveTest("a test on plain bounds and all gradients")
    assert not dataclasses.replace(zeros, passes=plain).passes_naive_test()
    assert not dataclasses.replace(missing_means, passes=plain).passes_naive_test()
    # ... and those that look at something look at it.
    assert not dataclasses.replace(
        zeros, passes=mistakes.get("one-seed-for-all").passes
    ).passes_naive_test()
    fresh_mask = mistakes.get("fresh-mask")
    convolution_alone = mistakes.get("dgamma-without-xhat").passes
    assert not dataclasses.replace(fresh_mask, passes=convolution_alone).passes_naive_test()


# ---- one small change away ----------------------------------------------------------------------


@every_mistake
def test_the_diff_is_the_mistake(name: str) -> None:
    """Its removed and added lines are the mistake's, in the file that holds them."""
    mistake = mistakes.get(name)
    header, _, *body = mistake.diff().splitlines()
    assert header == f"--- {mistake.file}"
    removed, added = ([line[1:].strip() for line in body if line.startswith(sign)] for sign in "-+")
    right, wrong = mistake.line.splitlines(), mistake.instead.splitlines()
    assert 0 < len(removed) + len(added) <= 13
    assert set(removed) <= {line.strip() for line in right}
    assert set(added) <= {line.strip() for line in wrong}
    file = (PACKAGE.parent / mistake.file).read_text()
    assert all(line in file for line in removed)


@every_mistake
def test_the_explanation_is_two_lines(name: str) -> None:
    mistake = mistakes.get(name)
    for line in (mistake.wrong, mistake.tempting):
        assert 20 < len(line) <= 100
        assert line.endswith(".")


def test_a_line_the_kernel_does_not_have_is_an_error() -> None:
    for line in ("cuda.syncthread()", "cuda.syncthreads() ", "count, mean, m2 = warp_moments("):
        with pytest.raises(ValueError, match=r"'missing-barrier' changes lines that block_moments"):
            changed(line=line).diff()
    with pytest.raises(ValueError, match="exactly once"), changed(line="cuda.barrier()").made():
        pass


def test_a_line_the_kernel_has_twice_is_an_error() -> None:
    twice = changed(definition=clear_kernels.channel_sums_kernel, line="cuda.threadIdx.x")
    with pytest.raises(ValueError, match="exactly once"):
        twice.diff()
    kernel = clear_kernels.weight_gradient_kernel
    once = changed(definition=kernel, line="row, w = divide(i, output_size[2])")
    assert "-        row, w = divide" in once.diff()


def test_the_package_has_the_mistake_within_the_context_alone() -> None:
    right = reductions.block_moments
    users = reductions, rung_4_one_kernel, ladder.rung_2_pointwise, clear_kernels

    def fail_halfway() -> None:
        with SOME.made():
            assert len({id(vars(user)["block_moments"]) for user in users} - {id(right)}) == 1
            raise KeyError("halfway")

    with pytest.raises(KeyError, match="halfway"):
        fail_halfway()
    assert all(vars(user)["block_moments"] is right for user in users)


def test_an_idle_change_is_not_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gallery does not reject everything; what nothing catches is said, and fails."""
    idle = changed(name="idle", instead="cuda.syncthreads()  # at ease")
    cases = gallery.telling_cases(idle.runs)[:2]
    monkeypatch.setattr(gallery, "telling_cases", lambda runs: cases)
    monkeypatch.setattr(gallery, "MISTAKES", (idle,))
    verdict = mistakes.examine(idle)
    assert (verdict.caught, verdict.caught_by, verdict.case) == (False, "nothing", None)
    shown = CliRunner().invoke(cli.app, ["mistakes", "idle"])
    assert shown.exit_code == 1
    assert re.search(r"caught by\s+nothing", shown.output)


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def examined_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's own verdicts would be the same ones."""
    monkeypatch.setattr(mistakes, "examine", lambda mistake: verdict_on(mistake.name))


@pytest.mark.usefixtures("examined_before")
@pytest.mark.parametrize("columns", [80, 120])
def test_the_table(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", columns)
    shown = CliRunner().invoke(cli.app, ["mistakes"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= columns
    for name, (caught_by, _) in EXPECTED.items():
        assert any(re.match(rf" ?{name}  +{caught_by}  +\w", line) for line in lines), name
    assert f"{len(EXPECTED)} of {len(EXPECTED)} caught" in shown.output
    assert ("yet it passes" in shown.output) == (columns == 120)


@pytest.mark.usefixtures("examined_before")
def test_one_mistake_in_full() -> None:
    shown = CliRunner().invoke(cli.app, ["mistakes", "reused-scratch"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    mistake = mistakes.get("reused-scratch")
    assert mistake.wrong in text
    assert mistake.tempting in text
    assert mistake.passes.story in text
    assert "- total_gx = block_sum(total_gx, scratch_gx)" in text
    assert "+ total_gx = block_sum(total_gx, scratch_g)" in text
    assert "caught by race" in text
    assert "writes it at numba_fused/backward/clear_kernels.py" in text


@pytest.mark.usefixtures("examined_before")
def test_json_has_it_all() -> None:
    shown = CliRunner().invoke(cli.app, ["mistakes", "--json"])
    found = {entry["name"]: entry for entry in json.loads(shown.stdout)}
    assert {name: entry["caught_by"] for name, entry in found.items()} == {
        name: caught_by for name, (caught_by, _) in EXPECTED.items()
    }
    assert found["missing-barrier"]["diff"] == SOME.diff()


def test_an_unknown_mistake_is_bad_usage() -> None:
    shown = CliRunner().invoke(cli.app, ["mistakes", "typo"])
    assert shown.exit_code == 2
    assert "unknown mistake 'typo': use one of zeros-only, " in shown.output
