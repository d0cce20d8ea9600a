"""plan: which variant runs a call on a GPU, and which differentiates it."""

from __future__ import annotations

from typing import Any

import pytest
from definition import BOUNDS

from numba_fused import bench, ladder, plan, results
from numba_fused.spec import BlockSpec

BENCHMARK = (128, 3, 16, 64, 64), (16, 3, 3, 3, 3)
WIDE = (16, 64, 32, 32), (64, 64, 3, 3)


@pytest.mark.parametrize(
    ("shapes", "arguments", "capability", "expected"),
    [
        (BENCHMARK, {}, (9, 0), "tensor_core"),
        (BENCHMARK, {}, (7, 5), "library_conv"),
        (BENCHMARK, {"dtype": "float64"}, (9, 0), "library_conv"),
        (BENCHMARK, {"stride": 2}, (9, 0), "library_conv"),
        (WIDE, {}, (9, 0), "library_conv"),
        (((1, 8, 2**28), (8, 8, 1)), {}, (9, 0), None),  # beyond 32-bit indices
    ],
)
def test_backward_variant(
    shapes: tuple[Any, Any], arguments: dict[str, Any], capability: Any, expected: str | None
) -> None:
    spec = BlockSpec.from_arguments(*shapes, num_groups=8, **(BOUNDS | arguments))
    assert plan._choose_backward(spec, capability) == expected


def measured() -> list[tuple[str, str, str]]:
    """File, case and precision where rungs were timed beside each other on an H200."""
    found = []
    for file in ("cases.csv", "sweeps.csv"):
        frame = results.read(results.DATA / file)
        beside = frame[(frame["variant"] == "library_conv") & (frame["status"] == "ok")]
        pairs = dict.fromkeys(zip(beside["case"], beside["precision"], strict=True))
        found += [(file, case, precision) for case, precision in pairs]
    return found


def test_all_named_cases_were_measured() -> None:
    assert {case for _, case, _ in measured()} >= set(bench.CASES)


@pytest.mark.parametrize(("file", "case", "precision"), measured())
def test_auto_is_the_fastest_that_was_measured(file: str, case: str, precision: str) -> None:
    """Within what two runs differ by."""
    rows = results.latest(results.read(results.DATA / file), case, precision)
    times = {row["variant"]: row["p50_ms"] for row in rows if row["status"] == "ok"}
    fastest = min(time for name, time in times.items() if name in plan.ORDER)
    chosen = plan._choose(bench.case_spec(case, precision=precision), (9, 0))
    assert times[chosen] <= 1.03 * fastest


@pytest.mark.parametrize(
    ("arguments", "capability", "expected"),
    [
        ({}, (7, 5), "tiled"),  # before tensor cores
        ({"dtype": "float64"}, (9, 0), "library_conv"),
        ({"stride": 2}, (9, 0), "pipelined"),
    ],
)
def test_where_the_fastest_cannot_run_the_next_one_does(
    arguments: dict[str, Any], capability: Any, expected: str
) -> None:
    spec = BlockSpec.from_arguments(*BENCHMARK, num_groups=8, **(BOUNDS | arguments))
    assert plan._choose(spec, capability) == expected
    assert ladder.get(expected).obstacle(spec, capability) is None
