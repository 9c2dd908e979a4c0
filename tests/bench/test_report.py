"""The report, from a real run: the page in a real browser, Markdown, JSON, PNG."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from browser import browse
from PIL import Image

from hf_async_store.bench import charts, merits, report
from hf_async_store.bench.drawing import as_svg
from hf_async_store.bench.places import Places
from hf_async_store.bench.plan import Load
from hf_async_store.bench.results import Results
from hf_async_store.bench.run import Run
from hf_async_store.bench.settings import Series, Settings
from hf_async_store.bench.subjects import chosen

SETTINGS = Settings(
    mode="test",
    loads=(
        Load(workload="save", tasks=4, entities=300),
        Load(workload="get", tasks=1, entities=300),
    ),
    rounds=2,
    duration=0.1,
    steady=0.1,
    series=(
        Series(
            knob="entities",
            values=(100, 200, 400),
            workloads=("get", "save"),
            load=Load(workload="get", tasks=1),
            share=1.0,
        ),
    ),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("places")
    names = ["memory", "json split", "append and sync each", "group commit by hand"]
    with Places(folder=str(folder)) as places:
        run = Run(SETTINGS, chosen(names), places, lambda text: None)
        run.results.settings = {"<b>&": "escaped?"}
        found = asyncio.run(run.whole())
    found.figures = merits.figures(found, [])
    return found


@pytest.fixture
def written(results: Results, tmp_path: Path) -> dict[str, Path]:
    return {each.name: each for each in report.write(results, tmp_path / "report")}


def test_all_files_are_there(written: dict[str, Path], results: Results) -> None:
    assert results.failures == []
    assert set(written) == {
        "report.json",
        "report.html",
        "report.md",
        "report-throughput.png",
        "report-latency.png",
        "report-ratios.png",
        "report-growth.png",
    }
    assert Results.read(written["report.json"]) == results


def test_the_page_needs_nothing_from_outside(written: dict[str, Path]) -> None:
    page = written["report.html"].read_text()
    assert not re.search(r"<(script|link|img|iframe)|url\(|@import|src=", page)
    assert re.findall(r"https?://[^\"'<\s]+", page) == ["http://www.w3.org/2000/svg"] * page.count(
        "<svg"
    )
    assert "<b>&" not in page
    _Balanced().feed(page)


class _Balanced(HTMLParser):
    """Fails on a tag that is not closed where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_markdown_says_the_same(written: dict[str, Path], results: Results) -> None:
    text = written["report.md"].read_text()
    for cell in results.cells:
        assert f"| {cell.subject} |" in text
    for merit in merits.MERITS:
        assert merit.load.name in text
    assert "## Left out" in text


def test_a_browser_shows_the_page(written: dict[str, Path], tmp_path: Path) -> None:
    shown = browse(written["report.html"], tmp_path, "--dump-dom").stdout
    assert shown.count("<svg") == len(list(_drawings(Results.read(written["report.json"]))))
    assert "Figures of merit" in shown
    picture = tmp_path / "page.png"
    browse(written["report.html"], tmp_path, f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (1400, 2400)
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    # The dots of engines and floors, and the green of a verdict, are really painted.
    assert {(11, 98, 196), (138, 144, 160), (232, 245, 236)} <= colours


def test_the_pictures_show_every_chart(written: dict[str, Path]) -> None:
    for name, path in written.items():
        if name.endswith(".png"):
            with Image.open(path) as image:
                assert image.width > 1200
                assert len(image.convert("RGB").getcolors(2**24) or []) > 50


def test_nothing_is_drawn_outside_of_its_chart(results: Results) -> None:
    for drawing in _drawings(results):
        for x, y in re.findall(r'(?:cx|x)="(-?[\d.]+)" (?:cy|y)="(-?[\d.]+)"', as_svg(drawing)):
            assert 0 <= float(x) <= drawing.width, drawing.title
            assert 0 <= float(y) <= drawing.height, drawing.title


def test_growth_has_an_exponent_and_says_what_it_left_out(results: Results) -> None:
    saves = next(each for each in results.sweeps if each.workload == "save")
    assert {each.subject for each in saves.curves} == {"memory", "json split"}
    for curve in saves.curves:
        assert [each.size for each in curve.points] == [100, 200, 400]
        assert curve.exponent is not None
        assert -1 < curve.exponent < 1.5


async def test_a_sweep_stops_at_its_budget(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, loads=(), rounds=1, budget=0.001)
    with Places(folder=str(tmp_path)) as places:
        found = await Run(settings, chosen(["memory"]), places, lambda text: None).whole()
    assert [point.size for point in found.sweeps[0].curves[0].points] == [100]
    assert [each.what for each in found.left_out] == ["growth with entities: memory at 400, 200"]


def test_targets_are_seen_at_a_glance(results: Results) -> None:
    rows = {(each.engine, each.what): each for each in results.figures}
    assert len(rows) >= len(merits.MERITS) + len(merits.ELSEWHERE)
    assert sum(each.value is None for each in results.figures) > 0
    assert all(each.note for each in results.figures if each.value is None)


def _drawings(results: Results) -> Iterator[charts.Drawing]:
    for each in (charts.throughput, charts.latency, charts.ratios, charts.growth):
        yield from each(results)
