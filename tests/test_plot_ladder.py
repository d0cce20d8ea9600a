"""The ladder's figure: of one precision, or of both and then it says which bar is which."""

from typing import Any

import pytest
from made_up_rows import made_up
from matplotlib.figure import Figure

from numba_fused import plot

IEEE, TF32 = made_up("kb83", "unfused"), made_up("kb83", "torch", "tf32")


def said(figure: Figure) -> tuple[str, str, list[str]]:
    """The figure's title, the axes' own, the bars' names."""
    (ax,) = figure.axes
    names = [name.get_text() for name in ax.get_yticklabels()]
    return figure.get_suptitle(), ax.get_title(loc="right"), names


@pytest.mark.parametrize("rows", [[TF32, IEEE], [IEEE, TF32]], ids=["tf32 first", "ieee first"])
def test_of_both_precisions_each_bar_with_tf32_says_so(rows: list[dict[str, Any]]) -> None:
    title, note, names = said(plot.ladder_figure(rows))
    assert ", float32, " in title
    assert note == "with TF32 where it says so"
    assert sorted(names) == ["torch, TF32", "unfused"]


def test_without_a_time_it_says_why() -> None:
    failed = IEEE | {"status": "failed", "p50_ms": None}
    with pytest.raises(plot.NotMeasuredError, match="time to draw: every one failed"):
        plot.ladder_figure([failed])
    with pytest.raises(plot.NotMeasuredError, match="time to draw: there is none"):
        plot.ladder_figure([])


def test_of_both_passes_it_says_so_beside_the_precision() -> None:
    rows = [made_up("kb83", "auto", precision, backward=True) for precision in ("ieee", "tf32")]
    _, note, _ = said(plot.ladder_figure(rows))
    assert note == "forward and backward pass, with TF32 where it says so"


@pytest.mark.parametrize(
    ("row", "arithmetic"), [(IEEE, "float32"), (TF32, "float32 with TF32")], ids=["ieee", "tf32"]
)
def test_of_one_precision_the_title_says_it(row: dict[str, Any], arithmetic: str) -> None:
    title, note, names = said(plot.ladder_figure([row]))
    assert f", {arithmetic}, " in title
    assert note == ""
    assert names == [row["variant"]]
