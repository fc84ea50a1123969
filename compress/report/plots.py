"""The plots of the model card, drawn from report.json alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.report.stats import found_in
from compress.words.escape import caption
from compress.words.wording import number

# Two colours that stay apart for colour-blind readers and in grey.
DENSE, PRUNED, QUIET = "#7a869a", "#0b6e8f", "#c9ced6"


# Draws one figure from a report, given pyplot.
Plot = Callable[[dict[str, Any], Any], Any]


def draw(report: dict[str, Any], folder: Path, plots: Mapping[str, Plot]) -> dict[str, Path]:
    """Draws figures of a report into ``folder``; returns name -> PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, figure in figures(report, plots):
        drawn[name] = folder / f"{name}.png"
        figure.savefig(drawn[name], metadata={"Software": None})
    return drawn


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


def _layers(report: dict[str, Any], plt: Any) -> Any:
    rows = report["layers"]
    figure, axes = plt.subplots(2, 1, figsize=(7, 4), sharex=True)
    at = [r["layer"] for r in rows]
    for axis, key, title in (
        (axes[0], "attention_sparsity", "attention"),
        (axes[1], "ffn_sparsity", "FFN"),
    ):
        axis.bar(at, [100 * r[key] for r in rows], color=PRUNED, width=0.8)
        axis.set_ylabel(f"{title}\nremoved, %")
        axis.set_ylim(0, 100)
    axes[1].set_xlabel("layer")
    whole_steps(axes[1].xaxis)
    axes[0].set_title(
        f"What each layer gave up: {100 * report['size']['backbone_removed']:.1f} % of the backbone in all"
    )
    return figure


def _search(report: dict[str, Any], plt: Any) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.4))
    offset = 0
    labels = set()
    log = [r for r in report["search"]["log"] if r["phase"] != "single"]
    top = 0.0
    for iteration in sorted({r["iteration"] for r in log}):
        rows = [r for r in log if r["iteration"] == iteration]
        best = float("inf")
        line_x, line_y = [], []
        for row in rows:
            x = (offset + row["work"]) / 1e6
            start = row["phase"].startswith("start")
            label = "starting point" if start else "candidate"
            axis.plot(
                x,
                row["kl"],
                "D" if start else ".",
                color=DENSE if start else QUIET,
                ms=5 if start else 6,
                label=None if label in labels else label,
            )
            labels.add(label)
            best = min(best, row["kl"])
            line_x.append(x)
            line_y.append(best)
        axis.step(line_x, line_y, where="post", color=PRUNED, label=None if "best" in labels else "best so far")
        labels.add("best")
        offset += max((r["work"] for r in rows), default=0)
        top = max(top, *(r["kl"] for r in rows))
    low = min(r["kl"] for r in log)
    axis.set_ylim(max(0, low - 0.15 * (top - low)), min(top, 4 * low) * 1.05)
    axis.set_xlabel("work, million tokens x layers (singles included)")
    axis.set_ylabel("KL to the dense model, nats")
    axis.set_title("The search: KL over work")
    axis.legend(frameon=False, loc="upper right")
    return figure


def perplexity(
    report: dict[str, Any],
    plt: Any,
    share: str = "backbone_removed",
    unit: str = "backbone parameters removed",
    others: str = "knapsack alone",
) -> Any:
    """``share`` is the key of the sparsity, ``unit`` says of what, and ``others`` what the curve's points are."""
    figure, axis = plt.subplots(figsize=(7, 3.6))
    removed = 100 * report["size"][share]
    curve = report["quality"]["curve"]
    for text in report["quality"]["texts"]:
        xs = [0.0, *(100 * point[share] for point in curve)]
        ys = [text["dense_ppl"], *(point["texts"][text["name"]] for point in curve)]
        (line,) = axis.plot(xs, ys, "o--", lw=1, ms=3, label=caption(text["name"]))
        axis.plot([removed], [text["pruned_ppl"]], "*", ms=13, color=line.get_color())
        axis.annotate(
            number(text["pruned_ppl"]),
            (removed, text["pruned_ppl"]),
            xytext=(8, -3),
            textcoords="offset points",
            va="top",
        )
    axis.plot([], [], "*", ms=11, color="black", ls="none", label="this model")
    if curve:
        axis.plot([], [], "o--", lw=1, ms=3, color="black", label=others)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xlim(-2, max([removed, *(100 * point[share] for point in curve)]) * 1.08)
    axis.set_xlabel(f"{unit}, %")
    axis.set_ylabel("perplexity (log scale)")
    axis.set_title("Perplexity against sparsity, held-out text")
    axis.legend(frameon=False, loc="upper left")
    return figure


def _smaller(bench: Mapping[str, Any]) -> str:
    ratio = f"{bench['dense']['bytes'] / bench['pruned']['bytes']:.2f}x"
    return "no change" if ratio == "1.00x" else ratio


def _latency(report: dict[str, Any], plt: Any) -> Any:
    bench = report["bench"]
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 3))
    spec = bench["spec"]
    for axis, key, title in (
        (axes[0], "ttft", f"TTFT, {spec['prompt']} tokens"),
        (axes[1], "tpot", f"TPOT at {spec['context']} tokens"),
    ):
        for x, (label, colour) in enumerate((("dense", DENSE), ("pruned", PRUNED))):
            values = [1000 * v for v in bench[label][key]["process_medians"]]
            middle = 1000 * bench[label][key]["median"]
            axis.bar(x, middle, color=colour, width=0.65)
            axis.errorbar(x, middle, [[middle - min(values)], [max(values) - middle]], color="black", capsize=4, lw=1)
            axis.annotate(number(middle), (x, max(values)), xytext=(0, 4), textcoords="offset points", ha="center")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("ms")
        axis.set_xticks([0, 1], ["dense", f"pruned\n{found_in(bench, key).short}"])
        axis.margins(y=0.15)
    axis = axes[2]
    for x, (label, colour) in enumerate((("dense", DENSE), ("pruned", PRUNED))):
        size = bench[label]["bytes"] / 1e6
        axis.bar(x, size, color=colour, width=0.65)
        axis.annotate(number(size), (x, size), xytext=(0, 4), textcoords="offset points", ha="center")
    axis.set_title("ONNX files", loc="left", fontsize=10)
    axis.set_ylabel("MB")
    axis.set_xticks([0, 1], ["dense", f"pruned\n{_smaller(bench)}"])
    axis.margins(y=0.15)
    return figure


def plots_of(report: Mapping[str, Any]) -> dict[str, Plot]:
    """What of a report of a method that removes whole units can be drawn."""
    return {"sparsity-per-layer": _layers, "search": _search, "perplexity": perplexity, **latency_plot(report)}


def latency_plot(report: Mapping[str, Any]) -> dict[str, Plot]:
    """That of a language model's exports; none where they were not measured."""
    return {"latency": _latency} if "bench" in report else {}
