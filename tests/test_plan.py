"""plan: which variant differentiates a call on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from definition import BOUNDS

from numba_fused import plan
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
