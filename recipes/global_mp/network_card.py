"""The card and the plots of a plain network under Global MP, every number taken from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.networks.card import (
    COUNTED,
    data_line,
    inputs_line,
    judged_on,
    latency_plot,
    loaded_lines,
    measures,
    parity_lines,
)
from compress.report.card import INHERITED, frame, publish, runtimes
from compress.report.charts import chart_of
from compress.report.metadata import card_data, network_results, pipeline_tag
from compress.report.plots import Plot, drawn, xs, ys, zeros_per_layer
from compress.report.rows import benches
from compress.words.escape import caption, cell, code, markdown
from compress.words.wording import counted

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def write_network_card(report: dict[str, Any], folder: Path) -> Path:
    return publish(report, folder, metadata, body, plots_of(report))


def metadata(report: dict[str, Any]) -> ModelCardData:
    """The head of a network's card."""
    size = report["size"]
    return card_data(
        report,
        removed=size["pruned_share"],
        tags=["structured-pruning" if size["ranks"] else "unstructured-pruning"],
        library="pytorch",
        results=network_results(report),
        task=pipeline_tag(report["data"]),
    )


def body(report: dict[str, Any], images: Mapping[str, str]) -> str:
    size, model, recipe = report["size"], report["model"], report["recipe"]
    which = "prunable weights" if _left_out(report) else "weights"
    trained = recipe.get("finetune")
    return frame(
        report,
        images,
        title=f"{model['name']}, {100 * size['pruned_share']:.2f} % of the {which} pruned",
        intro=f"{code(model['network'])} pruned with the recipe {code(recipe['method'])} of `compress`: {_how(report)}"
        + (f"; then {counted(trained['epochs'], 'epoch')} of training followed." if trained else ".")
        + f" {data_line(report)} Weights: {markdown(model['source'])}.",
        notes=[COUNTED, "", *_zeros(report), *_left_out(report)],
        pictures=(
            ("sparsity-per-layer", "What each layer gave up"),
            ("accuracy", "Quality against sparsity"),
            ("latency", "Latency, dense and pruned"),
        ),
        sections=_layers(report),
        loading=_loading(report),
        checks=[*loaded_lines(report), *parity_lines(report)],
        said=[judged_on(report), INHERITED],
    )


def _how(report: Mapping[str, Any]) -> str:
    size, options = report["size"], report["recipe"][report["recipe"]["method"]]
    if size["ranks"]:
        return (
            "whole columns of the low-rank factors, those with the smallest absolute sums, were cut out, so the network"
            f" is really smaller (r_W {size['ranks']['r_W']:,}, r_U {size['ranks']['r_U']:,})"
        )
    if options["schedule"] == "gradual":
        return (
            f"the smallest of all layers' weights were set to zero while it was trained from the start"
            f" ({markdown(options['shape'])} schedule, reached by {100 * options['until']:g} % of the epochs)"
        )
    return "the smallest of all layers' weights were set to zero once"


def _zeros(report: Mapping[str, Any]) -> list[str]:
    """What zeros in place bring, and which layers have nothing else left."""
    lines = []
    if not report["size"]["ranks"]:
        measured = ", and the latency above is what was measured, whatever the FLOPs say." if benches(report) else "."
        skipping = ", as those of MNN do: `mnn/model.mnn`." if "mnn" in report.get("export", {}) else "."
        lines += [
            "**Zeros make no dense kernel faster.** The shapes are as they were; an ordinary runtime multiplies by the"
            f" zeros{measured} What is really won is the packed size, and the FLOPs on hardware or kernels that skip"
            f" zeros{skipping}",
            "",
        ]
    if report["empty_layers"]:
        lines += [
            f"**{counted(len(report['empty_layers']), 'layer has', 'layers have')} lost every weight** (such as"
            f" {code(report['empty_layers'][0])}): set a floor (`global-mp.floor`).",
            "",
        ]
    return lines


def _left_out(report: Mapping[str, Any]) -> list[str]:
    """The weights that were not pruned, by name, and of what share they are; reports of before do not say it."""
    left = report.get("left_out")
    if not left or not left["weights"]:
        return []
    unknown = sum(row["flops"] is None for row in left["parameters"])
    said = f"**{100 * left['share']:.1f} % of all weights were left out** ({left['weights']:,}); of all weights"
    said += f" {100 * report['size']['pruned_share_of_all']:.2f} % are pruned."
    if left["flops"]:
        said += f" Their {left['flops']:,} FLOPs a sample are in no figure above."
    if unknown:
        said += f" Of {unknown} of them the FLOPs are not known, or they are counted with their layer."
    rows = [
        f"| {cell(row['name'])} | {markdown(row['kind'])} | {row['weights']:,} | {markdown(row['reason'])} |"
        for row in left["parameters"]
    ]
    return [said, "", "| left out | layer | weights | why |", "|---|---|---|---|", *rows, ""]


def _layers(report: dict[str, Any]) -> list[str]:
    lines = [
        "## Layers",
        "",
        "| layer | weights | non-zero | floor | FLOPs dense | FLOPs sparse |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["layers"]:
        floor = f"{row['floor']:,}" if row["floor"] else ""
        tied = f" (one with {cell(row['tied_to'])})" if "tied_to" in row else ""
        lines.append(
            f"| {cell(row['name'])}{tied} | {row['weights']:,} | {row['nonzero']:,} | {floor} |"
            f" {row['flops']['dense']:,} |"
            f" {row['flops']['sparse']:,} |"
        )
    return [*lines, ""]


def _loading(report: dict[str, Any]) -> list[str]:
    name = report["model"]["network"]
    return [
        "## Loading",
        "",
        "```python",
        "import json",
        "from pathlib import Path",
        "",
        "from compress.models.zoo import build, load_weights",
        "",
        'folder = Path("model")  # this folder',
        'facts = json.loads((folder / "network.json").read_text())',
        'model = build(facts["network"], facts["arguments"]).eval()'
        + ("  # runs the code of that file" if ".py:" in name else ""),
        'load_weights(model, folder / "model.safetensors")',
        "```",
        "",
        inputs_line(report),
        "",
        *runtimes(report),
    ]


def plots_of(report: Mapping[str, Any]) -> dict[str, Plot]:
    """What of a network's report can be drawn."""
    accuracy = {"accuracy": _accuracy} if chart_of(report, "accuracy") else {}
    return {"sparsity-per-layer": _sparsity, **accuracy, **latency_plot(report)}


def _sparsity(report: dict[str, Any], plt: Any) -> Any:
    return zeros_per_layer(report, plt, "whole network", "What each layer gave up")


def _accuracy(report: dict[str, Any], plt: Any) -> Any:
    chart = drawn(report, "accuracy")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for series in chart["series"]:
        dense, points = series["points"][0], series["points"][1:]
        (line,) = axis.plot(xs(points), ys(points), marker="o", label=caption(series["name"]))
        axis.axhline(dense["y"], color=line.get_color(), lw=1, ls="--", label=caption(f"dense, {series['task']}"))
    axis.set_xlabel(chart["x"]["label"])
    axis.set_ylabel(measures(report))
    axis.set_title(f"{chart['title']}, each point trained alike")
    axis.legend(frameon=False, fontsize=8)
    return figure
