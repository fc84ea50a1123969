"""The pictures of the model card, drawn from the data of `charts`: what the HTML page shows, for those who print it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.report.charts import THIS, Chart, chart_of, latencies
from compress.report.rows import here, rows
from compress.words.escape import caption
from compress.words.wording import number

# Two colours that stay apart for colour-blind readers and in grey.
DENSE, PRUNED, QUIET = "#7a869a", "#0b6e8f", "#c9ced6"
COLOURS = {"dense": DENSE, "pruned": PRUNED, "quiet": QUIET}
SLANTED: dict[str, Any] = {"rotation": 60, "fontsize": 6, "ha": "right", "rotation_mode": "anchor"}
FEW_LAYERS = 24  # of which each has its name on an axis


# Draws one figure from a report, given pyplot.
Plot = Callable[[dict[str, Any], Any], Any]


def draw(report: dict[str, Any], folder: Path, plots: Mapping[str, Plot]) -> dict[str, Path]:
    """Draws figures of a report into ``folder``; returns name -> PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name, figure in figures(report, plots):
        made[name] = folder / f"{name}.png"
        figure.savefig(made[name], metadata={"Software": None})
    return made


STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e8ec",
    "axes.axisbelow": True,
    "font.size": 9,
    "text.parse_math": False,  # a name with $ in it is no formula
}


def figures(report: dict[str, Any], jobs: Mapping[str, Plot]) -> Iterator[tuple[str, Any]]:
    """(name, matplotlib figure) of each plot, laid out and ready to be saved; each is closed behind its turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, job in jobs.items():
        with plt.rc_context(STYLE):
            figure = job(report, plt)
            for axes in figure.axes:
                _plain_ticks(axes)
            figure.tight_layout()
            yield name, figure
            plt.close(figure)


def _plain_ticks(axes: Any) -> None:
    """Labels as a person writes numbers. matplotlib's own of a log scale are formulas, which are not read here."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, ScalarFormatter

    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted(limits)
        if axis.get_scale() == "log":
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            at = [v for v in (m * 10.0**p for p in powers for m in (1, 2, 5)) if low <= v <= high]
            if len(at) < 3:
                at = [v for v in MaxNLocator(6).tick_values(low, high) if low <= v <= high]
            axis.set_major_locator(FixedLocator(at))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
        elif isinstance(axis.get_major_formatter(), ScalarFormatter):
            if max(abs(low), abs(high)) >= 10_000:
                axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))
            else:
                axis.get_major_formatter().set_useOffset(False)
                axis.get_major_formatter().set_scientific(False)


def wrapped(text: str, width: int = 42) -> str:
    """For a title above a plot that is not wide."""
    return "\n".join(textwrap.wrap(text, width))


def whole_steps(axis: Any) -> None:
    """Ticks where something is counted, such as layers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def drawn(report: Mapping[str, Any], name: str) -> Chart:
    """The data of a plot that a report's method has."""
    chart = chart_of(report, name)
    if chart is None:
        raise CompressError(
            f"the report has no figures for the plot {name!r}", where="report.json", fix="make it again"
        )
    return chart


def xs(points: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [p["x"] for p in points]


def ys(points: Sequence[Mapping[str, Any]]) -> list[float]:
    return [p["y"] for p in points]


def zeros_per_layer(report: dict[str, Any], plt: Any, all_layers: str, title: str) -> Any:
    """A bar a layer, the most that its floor allows, and all of them together, which ``all_layers`` names."""
    chart = drawn(report, "sparsity-per-layer")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    bars, *floors = chart["series"]
    at = range(len(bars["points"]))
    axis.bar(at, ys(bars["points"]), color=PRUNED, width=0.8)
    for series in floors:
        limited = [(i, p["y"]) for i, p in zip(at, series["points"], strict=True) if p["y"] < 100]
        ends = [i - 0.4 for i, _ in limited], [i + 0.4 for i, _ in limited]
        axis.hlines([y for _, y in limited], *ends, color="black", lw=1.5, label=series["name"])
    axis.axhline(chart["rules"][0]["value"], color=DENSE, lw=1, ls="--", label=all_layers)
    axis.set_ylim(0, 125)  # the legend has room above the bars
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("weights pruned, %")
    axis.set_xlabel("layer, from the input")
    if len(bars["points"]) <= FEW_LAYERS:
        axis.set_xticks(list(at), [caption(x, 30) for x in xs(bars["points"])], **SLANTED)
    axis.set_title(title + ("; no bar can pass its floor" if floors else ""))
    axis.legend(frameon=False, fontsize=8, loc="upper center", ncol=2)
    return figure


def perplexity(
    report: dict[str, Any],
    plt: Any,
    unit: str = "backbone parameters removed",
    others: str = "knapsack alone",
) -> Any:
    """``unit`` says of what the sparsity is, and ``others`` what the curve's points are."""
    chart = drawn(report, "perplexity")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for series in chart["series"]:
        way = [p for p in series["points"] if p["label"] != THIS]
        (line,) = axis.plot(xs(way), ys(way), "o--", lw=1, ms=3, label=caption(series["name"]))
        (own,) = (p for p in series["points"] if p["label"] == THIS)
        axis.plot([own["x"]], [own["y"]], "*", ms=13, color=line.get_color())
        axis.annotate(number(own["y"]), (own["x"], own["y"]), xytext=(8, -3), textcoords="offset points", va="top")
    axis.plot([], [], "*", ms=11, color="black", ls="none", label=THIS)
    if any(len(series["points"]) > 2 for series in chart["series"]):
        axis.plot([], [], "o--", lw=1, ms=3, color="black", label=others)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xlim(-2, max(x for series in chart["series"] for x in xs(series["points"])) * 1.08)
    axis.set_xlabel(f"{unit}, %")
    axis.set_ylabel(f"{chart['y']['label']} (log scale)")
    axis.set_title(chart["title"])
    axis.legend(frameon=False, loc="upper left")
    return figure


def _latency(report: dict[str, Any], plt: Any) -> Any:
    found = latencies(report)
    figure, axes = plt.subplots(1, len(found) + 1, figsize=(7.4 * (len(found) + 1) / 3, 3))
    for axis, chart in zip(axes, found, strict=False):
        for x, series in enumerate(chart["series"]):
            values, middle = ys(series["points"]), series["median"]
            axis.bar(x, middle, color=COLOURS[series["colour"]], width=0.65)
            axis.errorbar(x, middle, [[middle - min(values)], [max(values) - middle]], color="black", capsize=4, lw=1)
            axis.annotate(number(middle), (x, max(values)), xytext=(0, 4), textcoords="offset points", ha="center")
        axis.set_title(chart["figure"].removesuffix(" of context"), loc="left", fontsize=10)
        axis.set_ylabel("ms")
        axis.set_xticks([0, 1], ["dense", f"pruned\n{chart['short']}"])
        axis.margins(y=0.15)
    (files,) = (row for row in here(rows(report)) if row.metric == "bytes")
    assert files.dense and files.pruned  # a row of what was measured has both
    axis = axes[-1]
    for x, (size, colour) in enumerate(((files.dense, DENSE), (files.pruned, PRUNED))):
        axis.bar(x, size / 1e6, color=colour, width=0.65)
        axis.annotate(number(size / 1e6), (x, size / 1e6), xytext=(0, 4), textcoords="offset points", ha="center")
    ratio = f"{files.dense / files.pruned:.2f}x"
    axis.set_title(files.name, loc="left", fontsize=10)
    axis.set_ylabel("MB")
    axis.set_xticks([0, 1], ["dense", f"pruned\n{'no change' if ratio == '1.00x' else ratio}"])
    axis.margins(y=0.15)
    return figure


def latency_plot(report: Mapping[str, Any]) -> dict[str, Plot]:
    """That of a language model's exports; none where they were not measured."""
    return {"latency": _latency} if "bench" in report else {}
