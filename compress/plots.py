"""The plots of the model card, drawn from report.json alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Two colours that stay apart for colour-blind readers and in grey.
DENSE, PRUNED, QUIET = "#7a869a", "#0b6e8f", "#c9ced6"


# Draws one figure from a report, given pyplot.
Plot = Callable[[dict[str, Any], Any], Any]


def draw(
    report: dict[str, Any], folder: Path, plots: Mapping[str, Plot] | None = None, latency: bool = True
) -> dict[str, Path]:
    """Draws what the report has figures for; returns name -> PNG.

    Args:
        plots: by name, in place of those of a method that removes whole units; latency comes with either.
        latency: draws the report's own, where it has one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    style: Any = {
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
    drawn = {}
    with plt.rc_context(style):
        jobs = dict(plots or {"sparsity-per-layer": _layers, "search": _search, "perplexity": perplexity})
        if latency and "bench" in report:
            jobs["latency"] = _latency
        for name, job in jobs.items():
            figure = job(report, plt)
            figure.tight_layout()
            drawn[name] = folder / f"{name}.png"
            figure.savefig(drawn[name], metadata={"Software": None})
            plt.close(figure)
    return drawn


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
                x, row["kl"], "D" if start else ".", color=DENSE if start else QUIET, ms=5 if start else 6,
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
        (line,) = axis.plot(xs, ys, "o--", lw=1, ms=3, label=text["name"])
        axis.plot([removed], [text["pruned_ppl"]], "*", ms=13, color=line.get_color())
        axis.annotate(
            f"{text['pruned_ppl']:.1f}",
            (removed, text["pruned_ppl"]),
            xytext=(8, -3),
            textcoords="offset points",
            va="top",
        )
    axis.plot([], [], "*", ms=11, color="black", ls="none", label="this model")
    if curve:
        axis.plot([], [], "o--", lw=1, ms=3, color="black", label=others)
    axis.set_yscale("log")
    axis.set_xlim(-2, max([removed, *(100 * point[share] for point in curve)]) * 1.08)
    axis.set_xlabel(f"{unit}, %")
    axis.set_ylabel("perplexity (log scale)")
    axis.set_title("Perplexity against sparsity, held-out text")
    axis.legend(frameon=False, loc="upper left")
    return figure


def _latency(report: dict[str, Any], plt: Any) -> Any:
    bench = report["bench"]
    figure, axes = plt.subplots(1, 3, figsize=(7.4, 3))
    spec = bench["spec"]
    for axis, key, title in (
        (axes[0], "ttft", f"TTFT, {spec['prompt']} tokens\nms"),
        (axes[1], "tpot", f"TPOT at {spec['context']} tokens\nms"),
    ):
        for x, (label, colour) in enumerate((("dense", DENSE), ("pruned", PRUNED))):
            values = [1000 * v for v in bench[label][key]["process_medians"]]
            middle = 1000 * bench[label][key]["median"]
            axis.bar(x, middle, color=colour, width=0.65)
            axis.errorbar(x, middle, [[middle - min(values)], [max(values) - middle]], color="black", capsize=4, lw=1)
            axis.annotate(f"{middle:.3g}", (x, max(values)), xytext=(0, 4), textcoords="offset points", ha="center")
        ratio = bench["ratios"][key]
        axis.set_title(f"{title}", loc="left")
        axis.set_xticks([0, 1], ["dense", f"pruned\n{ratio['median']:.2f}x"])
        axis.margins(y=0.15)
    axis = axes[2]
    for x, (label, colour) in enumerate((("dense", DENSE), ("pruned", PRUNED))):
        size = bench[label]["bytes"] / 1e6
        axis.bar(x, size, color=colour, width=0.65)
        axis.annotate(f"{size:.3g}", (x, size), xytext=(0, 4), textcoords="offset points", ha="center")
    axis.set_title("ONNX files\nMB", loc="left")
    axis.set_xticks([0, 1], ["dense", f"pruned\n{bench['dense']['bytes'] / bench['pruned']['bytes']:.2f}x"])
    axis.margins(y=0.15)
    return figure
