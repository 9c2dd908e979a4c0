"""The report of a real run: the page in a real browser, Markdown, JSON, PNG."""

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

from hf_async_store import ConfigurationError
from hf_async_store_bench import charts, report, tables, targets
from hf_async_store_bench.environments import Environments
from hf_async_store_bench.messages import Load
from hf_async_store_bench.results import Results
from hf_async_store_bench.run import Run
from hf_async_store_bench.settings import Series, Settings
from hf_async_store_bench.statistics import ratio_of_runs
from hf_async_store_bench.systems import chosen, named
from hf_async_store_bench.tables import shown

SETTINGS = Settings(
    mode="test",
    loads=(
        Load(workload="save", tasks=4, entities=300),
        Load(workload="get", tasks=1, entities=300),
    ),
    rounds=2,
    duration=0.04,
    steady=0.04,
    series=(
        Series(
            parameter="entities",
            values=(100, 200, 400),
            workloads=("get", "save"),
            load=Load(workload="get", tasks=1),
            share=1.0,
        ),
    ),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("environments")
    names = ["memory", "json split", "append and sync each", "group commit by hand"]
    with Environments(folder=str(folder)) as environments:
        run = Run(SETTINGS, chosen(names), environments, lambda text: None)
        run.results.settings = {"<b>&": "escaped?"}
        found = asyncio.run(run.whole())
    found.figures = targets.figures(found)
    return found


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written") / "report"
    return {each.name: each for each in report.write(results, folder)}


def test_all_files_are_there(written: dict[str, Path], results: Results) -> None:
    assert results.failures == []
    sheets = {f"report-{each}.png" for each in ("engines", "compared", "ratios", "growth")}
    assert set(written) == {"report.json", "report.html", "report.md", *sheets}
    assert Results.read(written["report.json"]) == results


def test_the_page_loads_no_external_resources(written: dict[str, Path]) -> None:
    page = written["report.html"].read_text()
    assert not re.search(r"<(script|link|img|iframe)|@import|src=", page)
    # References inside a drawing are local; XML namespaces are not addresses.
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert set(re.findall(r"https?://([^\"'/<\s]+)", page)) == {"www.w3.org"}
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

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """The tag is self-closing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_recommendation_comes_first_and_the_targets_last(written: dict[str, Path]) -> None:
    page = written["report.html"].read_text()
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads[0] == "Which engine is fast enough?"
    assert heads[-1] == "Our own targets"
    first = page[page.index(heads[0]) : page.index(heads[1])]
    assert first.count("<svg") == len(SETTINGS.loads)
    # Figures that this small run has not measured are in one collapsed list.
    assert page.count("not in this run") == page[page.index("What was not measured") :].count(
        "not in this run"
    )
    assert "<details><summary>What was not measured, and why</summary>" in page


def test_baselines_say_how_they_are_made(written: dict[str, Path]) -> None:
    for name in ("report.html", "report.md"):
        assert "appends the line to a file, fdatasync" in written[name].read_text()


def test_markdown_says_the_same(written: dict[str, Path], results: Results) -> None:
    text = written["report.md"].read_text()
    for cell in results.cells:
        assert f"| {cell.system} |" in text
    for target in targets.TARGETS:
        assert target.what in text
    assert "## Not measured" in text


@pytest.mark.hf_sampled
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_the_page(written: dict[str, Path], tmp_path: Path, width: int) -> None:
    size = f"--window-size={width},2400"
    shown = browse(written["report.html"], tmp_path, size, "--dump-dom").stdout
    assert shown.count("<svg") == len(list(_charts(Results.read(written["report.json"]))))
    picture = tmp_path / "page.png"
    browse(written["report.html"], tmp_path, size, f"--screenshot={picture}")
    with Image.open(picture) as image:
        assert image.size == (width, 2400)
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    # The dots of two engines and the green of a verdict are visible.
    assert {(95, 99, 104), (86, 180, 233), (232, 245, 236)} <= colours


def test_the_pictures_show_every_chart(written: dict[str, Path]) -> None:
    for name, path in written.items():
        if name.endswith(".png"):
            with Image.open(path) as image:
                assert image.width > 1000
                assert len(image.convert("RGB").getcolors(2**24) or []) > 50


def test_names_and_numbers_are_in_the_drawings(results: Results) -> None:
    drawn = [charts.as_svg(each) for each in charts.engines(results)]
    for load, svg in zip(results.loads, drawn, strict=True):
        for cell in results.of(load):
            if cell.role == "strategy":
                assert cell.system in svg
                assert shown(cell.rate) in svg


def test_growth_has_an_exponent(results: Results) -> None:
    saves = next(each for each in results.sweeps if each.workload == "save")
    assert {each.system for each in saves.curves} == {"memory", "json split"}
    for curve in saves.curves:
        assert [each.size for each in curve.points] == [100, 200, 400]
        assert curve.exponent is not None  # its value: tests/bench/test_statistics.py


async def test_a_sweep_stops_at_its_budget(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, loads=(), rounds=1, budget=0.001)
    with Environments(folder=str(tmp_path)) as environments:
        found = await Run(settings, chosen(["memory"]), environments, lambda text: None).whole()
    assert [point.size for point in found.sweeps[0].curves[0].points] == [100]
    skipped = [f"growth with entities: at {each}" for each in (200, 400)]
    assert [each.what for each in found.skipped] == skipped


def test_every_target_has_a_row(results: Results) -> None:
    rows = {(each.engine, each.what) for each in results.figures}
    assert {(each.engine, each.what) for each in targets.TARGETS} <= rows
    assert all(each.note for each in results.figures if each.value is None)


async def test_latencies_are_measured_at_several_shares(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, series=(), shares=(0.25, 0.5))
    names = ["json", "group commit by hand"]
    with Environments(folder=str(tmp_path)) as environments:
        found = await Run(
            settings, list(map(named, names)), environments, lambda text: None
        ).whole()
    ways = ("as fast as it is answered", "25% at fixed times", "50% at fixed times")
    assert [each[:3] for each in tables.latencies(found).rows] == [
        ("save, 4 tasks", name, each) for name in names for each in ways
    ]


def test_the_table_of_speed_measures_each_target_and_nothing_else() -> None:
    settings = targets.speed()
    pairs = settings.pairs or {}
    assert {each.name for each in settings.loads} == pairs.keys()
    for target in targets.TARGETS:
        if target.table:
            assert target.engine in pairs[target.load.name]
            assert (target.against or target.engine) in pairs[target.other_load.name]


def test_another_load_may_be_the_baseline(results: Results) -> None:
    """The rate of one load in parts of that of another, in the same run."""
    target = targets.PerformanceTarget(
        engine="memory", workload="get", tasks=1, against="memory", other="save", other_tasks=4,
        of="rate", at_least=1.0,
    )  # fmt: skip
    figure = targets._measured(results, target)
    assert figure.what == "get, 1 task, against memory: save, 4 tasks"
    get, save = (results.cell("memory", each) for each in ("get, 1 task", "save, 4 tasks"))
    assert get is not None
    assert save is not None
    assert (figure.value, figure.low, figure.high) == ratio_of_runs(get.rates, save.rates)
    assert "x by processor time" in figure.detail


def test_the_results_of_a_run_are_written_where_the_page_has_its_lines(
    results: Results, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    lines = [f"<!-- results: written by `make bench-{each}` -->" for each in ("full", "speed")]
    page.write_text("".join(f"{each}\n\nold\n\n<!-- end of results -->\n" for each in lines))
    report.write_into(page, msgspec.structs.replace(results, mode="speed"))
    full, speed = page.read_text().split(lines[1])
    assert "old" in full
    assert "old" not in speed
    assert "| memory |" in speed
    with pytest.raises(ConfigurationError, match="bench-short"):
        report.around_results(page, "short")


def _charts(results: Results) -> Iterator[charts.Chart]:
    for each in (charts.engines, charts.compared, charts.ratios, charts.growth):
        yield from each(results)
