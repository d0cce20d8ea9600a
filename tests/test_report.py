"""The report: one page that holds everything it shows, and says how to make it again."""

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from made_up_rows import everything, made_up, written
from typer.testing import CliRunner

from numba_fused import cli, plot
from numba_fused.report import report

FIGURES = [one.name for one in plot.catalogue()]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Collects elements, and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: dict[str, str] = {}
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        if tag == "img":
            self.images[found["alt"].partition(":")[0]] = found["src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    return plot.read_rows(written(tmp_path_factory.mktemp("rows") / "rows.csv", everything()))


@pytest.fixture(scope="module")
def page(frame: pd.DataFrame) -> str:
    return report(frame)


def test_page_needs_nothing_but_itself(page: str) -> None:
    found = Page(page)
    for link in found.links:
        assert link.startswith(("#", "data:image/svg+xml;base64,"))
        assert not link.startswith("#") or link[1:] in found.ids
    assert "<script" not in page
    assert not re.search(r"@import|url\(", page)


def test_page_is_the_same_every_time(frame: pd.DataFrame, page: str) -> None:
    assert report(frame) == page


def test_page_has_every_figure_with_its_rows_and_commands(page: str) -> None:
    found = Page(page)
    assert {"tables", "provenance", *FIGURES} == set(found.ids)
    assert len(found.images) == len(FIGURES)
    for address in found.images.values():
        image = base64.b64decode(address.partition("base64,")[2]).decode()
        assert "<svg" in image
        assert set(re.findall(r'href="(#|data:|[^"]*)', image)) <= {"#", "data:"}
    for name in FIGURES:
        assert f"numba-fused plot {name}\n" in found.text
    assert "numba-fused sweep batch --out plots/data/batch.csv" in found.text
    assert "The 3 rows behind it" in found.text


def test_page_says_what_is_fastest_and_where_it_was_measured(page: str) -> None:
    text = Page(page).text
    assert re.search(r"ieee: the fastest on kb83 is .* 4.00 times faster than eager PyTorch", text)
    assert "the memory floor is 0.135 ms, 50 % of that" in text
    assert "auto is 4.00 times faster than eager PyTorch, in the geometric mean of 5 cases" in text
    assert "Test GPU" in text
    assert "0123abcd" in text


def test_reasons_are_text_not_markup(page: str) -> None:
    assert "it needs &lt;tf32&gt; &amp; more" in page
    assert "<tf32>" not in page


def test_figures_without_rows_are_told_not_left_out(tmp_path: Path) -> None:
    rows = plot.read_rows(written(tmp_path / "rows.csv", [made_up("kb83", "unfused")]))
    found = Page(report(rows))
    assert set(FIGURES) < set(found.ids)
    assert "Peak memory" in found.images
    assert "Scaling with the batch" not in found.images
    assert "Not drawn: no variant has times at two values of batch" in found.text
    assert "Measure on a GPU: numba-fused sweep batch" in found.text


def test_command_writes_the_page_and_repeats_its_options(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.csv", [made_up("kb83-b16", "unfused")])
    out = tmp_path / "folder" / "report.html"
    told = ["report", "--rows", str(rows), "--case", "kb83-b16", "--out", str(out)]
    result = CliRunner().invoke(cli.app, told)
    assert result.exit_code == 0, result.output
    assert f"numba-fused plot ladder --rows {rows} --case kb83-b16" in Page(out.read_text()).text
    assert CliRunner().invoke(cli.app, [*told[:-1], "report.txt"]).exit_code == 2


def test_without_jinja_the_extra_is_named(
    frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeError, match=r"numba_fused\[report\]"):
        report(frame)
