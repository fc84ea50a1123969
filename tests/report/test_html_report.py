"""The HTML report in a real browser: its numbers are the report's, its plots answer, and no name in it runs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.report.build import finish, read_report
from compress.report.charts import charts
from tests.browser import PROGRAM, Page, browser
from tests.command import compress, one_error

EVIL = "</script><script>document.documentElement.dataset.evil=1</script><img src=x onerror=\"document.title='evil'\">"

needs_browser = pytest.mark.skipif(PROGRAM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    found = read_report(finished)
    del found["rows"]  # what a test changes in the sections shows
    return found


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The release's own report.html, open in a browser as a file."""
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        opened.look(1100)
        opened.open(finished / "release" / "report.html")
        yield opened


def made(report: dict[str, Any], folder: Path) -> Path:
    """The page of a changed report, as `compress report` writes it."""
    finish(report)
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    ran = compress("report", folder, "--out", folder / "out.html")
    assert ran.code == 0, ran.err
    return folder / "out.html"


def with_targets(report: dict[str, Any]) -> dict[str, Any]:
    """The report with two targets: one that was emulated, one that could not be measured."""
    found = copy.deepcopy(report)
    bench = copy.deepcopy(report["bench"])
    bench["spec"]["runtime"] = "onnxruntime 1.32.0 on arm64"
    found["targets"] = {"board": {**bench, "emulated": True}, "phone": {"reason": "no device answers"}}
    return found


@needs_browser
def test_the_script_has_run_and_nothing_was_complained_of(page: Page, report: dict[str, Any]) -> None:
    assert int(page.ask("document.documentElement.dataset.drawn")) == len(charts(report)) == 6
    assert page.ask("document.querySelectorAll('.chart svg').length") == 6
    assert page.faults == []


@needs_browser
def test_every_plotted_value_is_the_reports(page: Page, report: dict[str, Any]) -> None:
    for chart in charts(report):
        shown = page.ask(
            f"[...document.querySelectorAll('#chart-{chart['id']} .mark')].map(m => Number(m.dataset.value))"
        )
        assert sorted(shown) == sorted(p["y"] for s in chart["series"] for p in s["points"]), chart["id"]
    layers = page.ask("[...document.querySelectorAll('#chart-sparsity-per-layer rect')].map(m => +m.dataset.value)")
    want = [100 * row[key] for key in ("attention_sparsity", "ffn_sparsity") for row in report["layers"]]
    assert layers == pytest.approx(want, rel=1e-12)
    ttft = page.ask("[...document.querySelectorAll('#chart-latency circle')].map(m => +m.dataset.value)")
    medians = [v for label in ("dense", "pruned") for v in report["bench"][label]["ttft"]["process_medians"]]
    assert ttft == pytest.approx([1000 * v for v in medians], rel=1e-12)


@needs_browser
def test_the_tables_are_the_cards(page: Page, finished: Path, report: dict[str, Any]) -> None:
    cells = page.ask("[...document.querySelectorAll('main > .wide td')].map(c => c.textContent)")
    card = (finished / "release" / "README.md").read_text()
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert len(cells) > 40
    for cell in cells:
        assert any(cell in row.replace("\\", "").replace("`", "") for row in rows), cell
    size = report["size"]
    assert f"{size['pruned']['total_parameters']:,}" in cells
    assert report["sha256"] in page.ask("document.querySelector('footer').textContent")


@needs_browser
def test_pointing_at_a_bar_tells_its_value(page: Page, report: dict[str, Any]) -> None:
    page.ask("document.querySelector('#chart-sparsity-per-layer').scrollIntoView()")
    box = page.ask(
        "(r => ({x: r.x + r.width / 2, y: r.y + r.height / 2}))"
        "([...document.querySelectorAll('#chart-sparsity-per-layer rect')].pop().getBoundingClientRect())"
    )
    page.point(box["x"], box["y"])
    last = report["layers"][-1]
    assert page.ask("document.getElementById('tip').hidden") is False
    said = page.ask("document.getElementById('tip').textContent")
    assert said.startswith(f"FFN, {last['layer']}\n")
    (value,) = re.findall(r"removed, %: ([\d.]+)", said)
    assert float(value) == pytest.approx(100 * last["ffn_sparsity"], rel=1e-3)
    page.point(5, 5)
    assert page.ask("document.getElementById('tip').hidden") is True


@needs_browser
def test_a_series_can_be_switched_off_and_on(page: Page, report: dict[str, Any]) -> None:
    count = len(report["layers"])
    bars = "document.querySelectorAll('#chart-sparsity-per-layer rect').length"
    button = "document.querySelector('#chart-sparsity-per-layer .legend button')"
    assert page.ask(bars) == 2 * count
    page.ask(f"{button}.click()")
    assert page.ask(bars) == count and page.ask(f"{button}.getAttribute('aria-pressed')") == "false"
    page.ask(f"{button}.click()")
    assert page.ask(bars) == 2 * count


@needs_browser
def test_dark_follows_the_system_and_the_button_turns_it(page: Page) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.look(1100, dark=False)
    assert page.ask(ground) == "rgb(255, 255, 255)"
    page.look(1100, dark=True)
    assert page.ask(ground) == "rgb(18, 22, 28)"
    page.ask("document.getElementById('theme').click()")
    assert page.ask(ground) == "rgb(255, 255, 255)"
    page.ask("delete document.documentElement.dataset.theme")
    page.look(1100, dark=False)


@needs_browser
def test_on_a_phone_nothing_stands_out_over_the_side(page: Page) -> None:
    page.look(390)
    assert page.ask("document.documentElement.scrollWidth") == 390
    page.look(1100)


@needs_browser
def test_it_prints(page: Page) -> None:
    assert page.printed().startswith(b"%PDF")


@needs_browser
def test_targets_are_shown_and_an_emulated_one_is_marked(report: dict[str, Any], tmp_path: Path) -> None:
    path = made(with_targets(report), tmp_path / "run")
    with browser(tmp_path) as page:
        page.open(path)
        assert page.faults == []
        text = page.ask("document.body.innerText")
        assert "board (emulated)" in text and "Emulated" in text and "no device answers" in text
        rows = page.ask("[...document.querySelectorAll('#chart-ratios title')].map(t => t.textContent)")
        assert "board (emulated): TTFT, 24 tokens" in rows and "this machine: TTFT, 24 tokens" in rows


@needs_browser
def test_a_name_that_is_markup_stays_text(report: dict[str, Any], tmp_path: Path) -> None:
    bad = with_targets(report)
    bad["model"] |= {"name": EVIL, "source": EVIL}
    old = bad["quality"]["texts"][0]["name"]
    bad["quality"]["texts"][0]["name"] = EVIL
    for point in bad["quality"]["curve"]:
        point["texts"][EVIL] = point["texts"].pop(old)
    bad["targets"][EVIL] = bad["targets"].pop("board")
    bad["environment"]["cpu"] = f"{EVIL} [a](javascript:alert(1)) ![b](http://127.0.0.1:1/c.png)"
    path = made(bad, tmp_path / "run")
    with browser(tmp_path) as page:
        page.open(path)
        assert page.faults == []
        assert page.ask("document.documentElement.dataset.evil === undefined") is True
        assert page.ask("document.title").startswith("</script><script>")
        assert page.ask("document.querySelectorAll('main img, main a, main script').length") == 0
        assert EVIL in page.ask("document.querySelector('#chart-perplexity .legend').textContent")
        assert EVIL in page.ask("document.querySelector('h1').textContent")


def test_the_page_asks_for_nothing_from_elsewhere(finished: Path) -> None:
    text = (finished / "release" / "report.html").read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:)", text) and "url(" not in text and "@import" not in text


def test_a_report_without_measurements_has_no_plot_of_them(report: dict[str, Any], tmp_path: Path) -> None:
    short = {k: v for k, v in copy.deepcopy(report).items() if k not in ("bench", "export")}
    assert {c["id"] for c in charts(short)} == {"sparsity-per-layer", "perplexity", "search"}
    text = made(short, tmp_path / "run").read_text()
    assert "Latency and memory were not measured" in text and "TTFT" not in text


def test_channels_and_rounds_of_a_network_are_drawn() -> None:
    """The report of a method that cuts channels, as far as its plots go."""
    row = {"task": "depth", "metric": "error", "dense": 0.5, "pruned": 0.6, "main": True}
    rounds = [
        {"removed": 0.2, "cut": {"depth": {"error": 0.9}}, "trained": {"depth": {"error": 0.55}}},
        {"removed": 0.4, "cut": {"depth": {"error": 0.8}}, "trained": {"depth": {"error": 0.6}}},
    ]
    found = charts(
        {
            "data": {},
            "size": {"flops_removed": 0.4},
            "layers": [{"name": "stem", "channels": 16, "kept": 16}, {"name": "conv", "channels": 32, "kept": 12}],
            "quality": {"tasks": [row, {**row, "metric": "loss", "main": False}], "curve": rounds},
        }
    )
    by_id = {c["id"]: {s["name"]: [(p["x"], p["y"]) for p in s["points"]] for s in c["series"]} for c in found}
    assert by_id == {
        "channels": {"dense": [("stem", 16), ("conv", 32)], "kept": [("stem", 16), ("conv", 12)]},
        "quality": {
            "error, depth": [(0.0, 0.5), (20.0, 0.55), (40.0, 0.6)],
            "error, depth, just cut": [(20.0, 0.9), (40.0, 0.8)],
        },
    }


def test_the_file_to_write_must_be_one(finished: Path, tmp_path: Path) -> None:
    one_error(compress("report", finished, "--out", tmp_path), 2, "this is a folder")
    one_error(compress("report", tmp_path), 1, "no report.json")
