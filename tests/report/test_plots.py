"""What stands on a plot is what a person writes: read off the drawn figures of every method, and of a bench."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from compress.exporters.bench import plots as bench_plots
from compress.recipes.global_mp.card import plots_of as of_zeros
from compress.recipes.global_mp.network_card import plots_of as of_network
from compress.recipes.pagcp.card import plots_of as of_channels
from compress.recipes.tyr.card import plots_of as of_units
from compress.report import charts
from compress.report.plots import figures
from compress.words.wording import counted, megabytes, milliseconds, number
from tests.reports import NAMES, sample

pytestmark = pytest.mark.processes

HOSTILE = "_$x^{2}$ \\frac \n\x1b[31m\u202e" + "w" * 90


PLOTS = {"tyr": of_units, "global-mp-text": of_zeros, "global-mp-network": of_network, "pagcp": of_channels}
DRAWN = of_units({"bench": {}})


def drawn(name: str, report: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, figure) of every plot of a report's card, and of its bench record."""
    yield from figures(report, PLOTS[name](report))
    yield from figures(report["bench"], bench_plots.jobs(report["bench"]))


def texts(figure: Any) -> list[Any]:
    """Every text that is seen: titles, labels, ticks, legends, annotations."""
    import matplotlib.text

    figure.canvas.draw()
    ticks = {id(t) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for t in hidden_ticks(axes, axis)}
    found = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]
    return [t for t in found if id(t) not in ticks]


def hidden_ticks(axes: Any, axis: Any) -> Iterator[Any]:
    """Labels of ticks that lie outside the axis are never drawn."""
    low, high = sorted(axis.get_view_interval())
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
            yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("name", NAMES)
def test_every_label_is_what_a_person_writes(name: str) -> None:
    seen = 0
    for plot, figure in drawn(name, sample(name)):
        for text in texts(figure):
            said = text.get_text()
            assert not re.search(r"\\|\$|mathdefault|\de[+-]?\d|\d\.\d{6}|nan|inf\b", said), f"{plot}: {said!r}"
            seen += 1
    assert seen > 60


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off_and_no_two_labels_of_an_axis_lie_on_each_other(name: str) -> None:
    for plot, figure in drawn(name, sample(name)):
        frame, seen = figure.bbox, texts(figure)
        for text in seen:
            box = text.get_window_extent()
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= frame.x1 + 1 and box.y1 <= frame.y1 + 1, (
                f"{plot}: {text.get_text()!r} is cut off"
            )
        for axes in figure.axes:
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                straight = [t for t in labels if t.get_text() and not t.get_rotation()]
                shown = [t for t in straight if t in seen]
                for a, b in itertools.pairwise(shown):
                    assert not a.get_window_extent().overlaps(b.get_window_extent()), (plot, a.get_text(), b.get_text())


def values(figure: Any) -> set[float]:
    """Every height, place and end that is drawn, on either axis."""
    found: set[float] = set()
    for axes in figure.axes:
        found |= {float(v) for patch in axes.patches for v in (patch.get_height(), patch.get_width())}
        found |= {float(v) for line in axes.lines for v in (*line.get_xdata(), *line.get_ydata())}
        for held in axes.collections:
            found |= {float(v) for point in held.get_offsets() for v in point}
            found |= {float(v) for path in held.get_paths() for point in path.vertices for v in point}
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_shows_what_the_page_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charts' data is what is drawn: all of it, and what is put into it comes out on the picture."""
    report = sample(name)
    both = {chart["id"]: chart for chart in charts.charts(report)}
    plots = {plot: job for plot, job in PLOTS[name](report).items() if plot in both}
    assert len(plots) == len(PLOTS[name](report)) - (name == "pagcp") >= 3  # its sensitivity is a picture alone
    for plot, figure in figures(report, plots):
        want = {float(p["y"]) for series in both[plot]["series"] for p in series["points"]}
        if plot == "latency" and "bench" in report and len(charts.latencies(report)) > 1:
            # Bars with the ends of the processes: the middle ones are not drawn.
            want = {float(end(p["y"] for p in s["points"])) for s in both[plot]["series"] for end in (min, max)}
        if plot == "sparsity-per-layer":
            want -= {100.0}  # a layer without a floor
        drawn_there = values(figure)
        assert all(any(abs(w - v) < 1e-9 for v in drawn_there) for w in want), plot

    made = charts.data

    def moved(of: Any) -> Any:
        found = made(of)
        for chart in found:
            for series in chart["series"]:
                for point in series["points"]:
                    point["y"] *= 0.987654
        return found

    before = {plot: values(figure) for plot, figure in figures(report, plots)}
    monkeypatch.setattr(charts, "data", moved)
    for plot, figure in figures(report, plots):
        assert plot == "latency" or values(figure) != before[plot], plot


def test_an_axis_of_perplexities_says_them_in_whole_numbers_or_decimals() -> None:
    report = sample("tyr")
    for low, high in ((280.0, 340.0), (3.1, 3.9), (9.0, 15_000.0), (300.0, 301.0)):
        for text in report["quality"]["texts"]:
            text["dense_ppl"], text["pruned_ppl"] = low, high
        report["quality"]["curve"] = []
        ((_, figure),) = figures(report, {"perplexity": DRAWN["perplexity"]})
        figure.canvas.draw()
        axis = figure.axes[0].yaxis
        said = [t.get_text() for t in axis.get_ticklabels()]
        values = axis.get_majorticklocs()
        assert len(said) >= 3, (low, high)
        assert [float(s.replace(",", "")) for s in said] == pytest.approx(list(values), rel=1e-9)
        assert not axis.get_ticklabels(minor=True)


def test_slow_latencies_are_written_out() -> None:
    report = sample("tyr")
    for side in ("dense", "pruned"):
        figure = report["bench"][side]["ttft"]
        figure["median"], figure["process_medians"] = 4.96, [4.9, 4.96, 5.0]
    ((_, figure),) = figures(report, {"latency": DRAWN["latency"]})
    said = [t.get_text() for t in texts(figure)]
    assert "4,960" in said and not any("e+" in s for s in said)


def test_layers_are_counted_in_whole_steps() -> None:
    ((_, figure),) = figures(sample("tyr"), {"layers": DRAWN["sparsity-per-layer"]})
    said = [t.get_text() for t in texts(figure)]
    assert {"0", "1", "2", "3"} <= set(said) and not any(re.fullmatch(r"-?\d+\.5", s) for s in said)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_is_text_on_every_plot_and_stays_in_its_legend(name: str) -> None:
    report = sample(name)
    for text in report["quality"].get("texts", ()):
        for point in report["quality"]["curve"]:
            point["texts"][HOSTILE + text["name"]] = point["texts"].pop(text["name"])
        text["name"] = HOSTILE + text["name"]
    for row in report["layers"]:
        if "name" in row:
            row["name"] = HOSTILE + row["name"]
    found = []
    for _, figure in drawn(name, report):
        for text in texts(figure):
            said = text.get_text().replace("\n", " ")
            assert said.isprintable() and len(said) < 200
            assert not text.get_parse_math()
            found.append(said)
    assert any("$x^{2}$" in said for said in found)


def test_a_latency_that_noise_leaves_open_has_no_ratio_on_its_plot() -> None:
    report = sample("tyr")
    report["bench"]["ratios"]["ttft"] = {"median": 1.11, "low": 0.79, "high": 1.96, "pairs": [1.11] * 5}
    for job in (DRAWN["latency"], bench_plots.distribution):
        ((_, figure),) = figures(report if job is DRAWN["latency"] else report["bench"], {"latency": job})
        said = " ".join(t.get_text() for t in texts(figure)).replace("\n", " ")
        assert "not resolved" in said and "1.11" not in said


@pytest.mark.parametrize(
    ("value", "want"),
    [(0, "0"), (4960, "4,960"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.64, "0.640"), (0.0123, "0.0123")],
)
def test_numbers_have_three_figures_or_all_their_whole_ones(value: float, want: str) -> None:
    assert number(value) == want


def test_units_and_plurals() -> None:
    assert (milliseconds(4.96), milliseconds(0.0123), milliseconds(0.000512)) == ("4,960 ms", "12.3 ms", "0.512 ms")
    assert (megabytes(99_999), megabytes(354_000), megabytes(2.5e9)) == ("99,999 bytes", "0.354 MB", "2,500 MB")
    assert (counted(1, "epoch"), counted(2000, "epoch")) == ("1 epoch", "2,000 epochs")
    assert counted(1, "process", "processes") == "1 process"
