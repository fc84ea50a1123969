"""The card and the plots of a language model with whole units gone, every number taken from report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.language.limits import shown
from compress.recipes.tyr.lines import named, verdict_of
from compress.report.card import INHERITED, beginning, frame, loading, onnx_check, publish, text_metadata
from compress.report.plots import COLOURS, PRUNED, Plot, drawn, latency_plot, perplexity, whole_steps, xs, ys
from compress.words.escape import code, markdown
from compress.words.wording import counted, small

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def write_card(report: dict[str, Any], folder: Path) -> Path:
    """The card of a language model that whole units were taken out of."""
    return publish(report, folder, metadata, body, plots_of(report))


def metadata(report: dict[str, Any]) -> ModelCardData:
    """The head of a card for a model with whole units gone."""
    return text_metadata(report, report["size"]["backbone_removed"], "structured-pruning")


def body(report: dict[str, Any], images: Mapping[str, str]) -> str:
    size, quality, model = report["size"], report["quality"], report["model"]
    origin = code(model["base_model"]) if model["base_model"] else code(model["name"])
    first = quality["texts"][0]
    return frame(
        report,
        images,
        title=f"{model['name']}, {100 * size['backbone_removed']:.1f} % of the backbone removed",
        intro=f"{origin} pruned with the recipe {code(report['recipe']['method'])} of `compress`: whole KV groups,"
        f" query heads and FFN neurons are gone, the projections behind them are refitted; {_training(report)}."
        f" Weights were taken from: {markdown(model['source'])}.",
        notes=[
            _asked(report),
            f"Perplexity: {counted(first['windows'], 'window')} of {first['length']:,} tokens a text, none of which"
            " the pruner saw." + beginning(report),
            "",
            *_recovery(report),
        ],
        pictures=(
            ("sparsity-per-layer", "What each layer gave up"),
            ("perplexity", "Perplexity against sparsity"),
            ("latency", "Latency, dense and pruned"),
            ("search", "The search"),
        ),
        sections=[*_budgets(report), *_removed(report)],
        loading=loading(report),
        checks=_checks(report),
        said=[
            "The model was calibrated on "
            + ", ".join(markdown(_source(s)) for s in report["recipe"]["calibration"]["sources"])
            + ". On text unlike these it has lost more than the table's mean says; what it knew of facts, code and"
            " other languages was not measured.",
            INHERITED,
        ],
    )


BACKBONE = "the backbone (all linear layers of the blocks; embeddings, head and norms are not part of it)."


def _asked(report: dict[str, Any]) -> str:
    """How much was to go."""
    if "budgets" in report:
        return f"How much went follows from the budgets below; shares are of {BACKBONE}"
    return f"The sparsity asked for was {100 * report['size']['asked']:.4g} % of {BACKBONE}"


def _budgets(report: dict[str, Any]) -> list[str]:
    """What the budgets asked for, and what was found; nothing where there were none."""
    rows = report.get("budgets")
    if not rows:
        return []
    lines = [
        "## The budgets",
        "",
        "| budget | dense | allowed | least there is | by the table | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [shown(row, key) if key in row else "" for key in ("dense", "asked", "floor", "table", "measured")]
        lines.append(f"| {code(named(row))} | {' | '.join(cells)} | {verdict_of(row, '**')} |")
    return [*lines, "", *_timed(rows)]


def _timed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How times were priced and measured; nothing where there are none."""
    timed = [row for row in rows if row["unit"] == "seconds"]
    if not timed:
        return []
    lines = [
        "A time is that of the fastest call of a fresh process in ONNX Runtime, a share the median over pairs of"
        " processes with its 95 % interval. What every shape takes stands in a table that was measured on small models"
        " of random weights:",
        "",
    ]
    for row in timed:
        off = row["table_error"]
        whole = ""
        if "whole" in row:
            share = row["whole"]
            whole = (
                f"; the chosen shapes with random weights took {share['median']:.3f}x ({share['low']:.3f} to"
                f" {share['high']:.3f}) where the table said {share['predicted']:.3f}x (search {row['search']})"
            )
        lines.append(
            f"- {code(named(row))}: off by {100 * off['median']:.1f} % (median) and {100 * off['worst']:.1f} % at most"
            f" on {off['models']} models that it had not seen{whole}."
        )
    return [*lines, ""]


def _source(spec: Mapping[str, Any]) -> str:
    if "files" in spec or "dialogues" in spec:
        names = spec.get("files") or spec["dialogues"]
        return ", ".join(Path(name).name for name in names)  # where they lay is nobody's business
    return str(next(spec[k] for k in ("hub", "embedded", "package") if k in spec))


def _training(report: dict[str, Any]) -> str:
    recovered = report.get("recover")
    if recovered is None:
        return "nothing was trained afterwards"
    how = "all weights of the blocks" if recovered["method"] == "full" else "low-rank updates, merged,"
    return (
        f"then {how} were trained for {counted(recovered['steps'], 'step')} ({recovered['tokens']:,} tokens) to do"
        " what the dense model does"
    )


def _recovery(report: dict[str, Any]) -> list[str]:
    """What the training brought, where there was one."""
    recovered = report.get("recover")
    if recovered is None:
        return []
    mean = recovered["geometric_mean"]
    return [
        f"Recovery ({markdown(recovered['method'])}, {recovered['trained_parameters']:,} parameters trained):"
        f" perplexity, geometric mean, {mean['before']:.2f} before and {mean['after']:.2f} after; without it:"
        f" {code(report['commands']['unrecovered'])}.",
        "",
    ]


def _removed(report: dict[str, Any]) -> list[str]:
    """What each layer gave up, as counts."""
    lines = [
        "## What was removed",
        "",
        "| layer | KV groups | query heads | FFN neurons | attention | FFN |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        counts = (
            f"{row[kept]:,} of {row[f'dense_{kept}']:,}" if row[kept] != row[f"dense_{kept}"] else "all"
            for kept in ("kv_heads", "heads", "neurons")
        )
        gone = (100 * row[f"{part}_sparsity"] for part in ("attention", "ffn"))
        shares = (f"-{share:.1f} %" if share else "0 %" for share in gone)
        lines.append(f"| {markdown(row['layer'])} | {' | '.join(counts)} | {' | '.join(shares)} |")
    return [*lines, ""]


def _checks(report: dict[str, Any]) -> list[str]:
    lines = []
    for layout in report["verify"]["layouts"]:
        lines.append(
            f"layout {code(layout['layout'])}: loaded in a clean process as {code(layout['class'])}; logits differ by"
            f" {small(layout['max_logit_difference'])} from those it was saved with (allowed"
            f" {small(layout['tolerance'])}), the sliced model from the masked one by"
            f" {small(layout['masked_difference'])}"
        )
    lines += onnx_check(report)
    search = report["search"]
    lines.append(
        f"search: {search['work_token_layers']:,} tokens x layers,"
        f" {search['reference_token_layers'] / search['work_token_layers']:,.0f} times less than the paper's schedule"
    )
    if judged := report.get("run_off"):
        said = ", ".join(f"{markdown(label)} {kl:.4f}" for label, kl in sorted(judged.items(), key=lambda r: r[1]))
        lines.append(f"run-off, KL to the dense model in nats on text that nothing had seen: {said}")
    scale = report["logit_scale"]
    if scale is not None:
        lines.append(
            f"scale of the logits: {scale['scale']:.2f}, folded into the last norm; it takes the KL to the dense"
            f" model on the search windows from {scale['kl_before']:.4f} to {scale['kl']:.4f} nats"
        )
    return lines


def plots_of(report: Mapping[str, Any]) -> dict[str, Plot]:
    """What of a report of a method that removes whole units can be drawn."""
    return {"sparsity-per-layer": _layers, "search": _search, "perplexity": perplexity, **latency_plot(report)}


def _layers(report: dict[str, Any], plt: Any) -> Any:
    chart = drawn(report, "sparsity-per-layer")
    figure, axes = plt.subplots(2, 1, figsize=(7, 4), sharex=True)
    for axis, series in zip(axes, chart["series"], strict=True):
        axis.bar([int(x) for x in xs(series["points"])], ys(series["points"]), color=PRUNED, width=0.8)
        axis.set_ylabel(f"{series['name']}\n{chart['y']['label']}")
        axis.set_ylim(chart["y"]["min"], chart["y"]["max"])
    axes[1].set_xlabel(chart["x"]["label"])
    whole_steps(axes[1].xaxis)
    axes[0].set_title(f"{chart['title']}: {chart['rules'][0]['value']:.1f} % of the backbone in all")
    return figure


def _search(report: dict[str, Any], plt: Any) -> Any:
    chart = drawn(report, "search")
    figure, axis = plt.subplots(figsize=(7, 3.4))
    kls: list[float] = []
    for series in chart["series"]:
        points, colour = series["points"], COLOURS[series["colour"]]
        if series.get("step"):
            # An iteration starts from another model: its best is no better or worse than the last one's.
            for i, (_, own) in enumerate(groupby(points, key=lambda p: p["label"])):
                part = list(own)
                label = None if i else series["name"]
                axis.step(xs(part), ys(part), where="post", color=colour, label=label)
            continue
        start = series["colour"] == "dense"
        axis.plot(
            xs(points), ys(points), "D" if start else ".", color=colour, ms=5 if start else 6, label=series["name"]
        )
        kls += ys(points)
    low, top = min(kls), max(kls)
    axis.set_ylim(max(0, low - 0.15 * (top - low)), min(top, 4 * low) * 1.05)
    axis.set_xlabel(f"{chart['x']['label']} (singles included)")
    axis.set_ylabel(chart["y"]["label"])
    axis.set_title(chart["title"])
    axis.legend(frameon=False, loc="upper right")
    return figure
