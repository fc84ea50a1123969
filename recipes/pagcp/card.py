"""The card and the plots of a network with channels gone, every number taken from report.json."""

from __future__ import annotations

import json
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
from compress.report.metadata import card_data, network_results, pipeline_tag
from compress.report.plots import COLOURS, SLANTED, Plot, drawn, xs, ys
from compress.words.escape import block, caption, cell, code, markdown
from compress.words.wording import counted

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def write_channels_card(report: dict[str, Any], folder: Path) -> Path:
    return publish(report, folder, metadata, body, plots_of(report))


def metadata(report: dict[str, Any]) -> ModelCardData:
    """The head of the card."""
    return card_data(
        report,
        removed=removed(report),
        tags=["structured-pruning"],
        library="pytorch",
        results=network_results(report),
        task=pipeline_tag(report["data"]),
    )


def removed(report: dict[str, Any]) -> float:
    """The share of all FLOPs that is gone: of those of recurrent layers and attention too, which are not cut."""
    size = report["size"]
    if "flops_elsewhere" not in size:
        return float(size["flops_removed"])
    a, b = (size["flops"][k] + size["flops_elsewhere"][k] for k in ("dense", "pruned"))
    return float(1 - b / a)


def _elsewhere(report: dict[str, Any]) -> list[str]:
    """What is no linear layer or convolution, and not among the FLOPs of the tables."""
    size = report["size"]
    if "flops_elsewhere" not in size:
        return []
    return [
        f"Recurrent layers and multi-head attention are not cut and not among these FLOPs; they take"
        f" {size['flops_elsewhere']['dense']:,} a sample more, and of all of them"
        f" **{100 * removed(report):.1f} %** are gone.",
        "",
    ]


def body(report: dict[str, Any], images: Mapping[str, str]) -> str:
    model, recipe = report["model"], report["recipe"]
    options, trained = recipe[recipe["method"]], recipe.get("finetune")
    count = len(report["rounds"])
    after = "nothing trained afterwards"
    if trained:
        epochs = options["between"] * (count - 1) + trained["epochs"]
        after = f"{counted(epochs, 'epoch')} of training after the first cut"
    return frame(
        report,
        images,
        title=f"{model['name']}, {100 * removed(report):.1f} % of the FLOPs removed",
        intro=f"{code(model['network'])} with whole channels gone, by the recipe {code(recipe['method'])} of"
        " `compress`: group after group, as many as the worst-hit task tolerates on a calibration split;"
        f" {counted(count, 'round')}, {after}."
        f" {data_line(report, report['rounds'][0].get('samples'))}"
        f" Weights: {markdown(model['source'])}.",
        notes=[COUNTED, "", *_elsewhere(report)],
        pictures=(
            ("channels", "Channels that every layer keeps"),
            ("quality", "Every task against FLOPs"),
            ("sensitivity", "Which layers each task needs"),
            ("latency", "Latency, dense and pruned"),
        ),
        sections=[*_oracle(report), *_trials(report), *_layers(report)],
        loading=_loading(report),
        checks=[
            *loaded_lines(report),
            f"{counted(len(report['groups']), 'channel group')}: each, cut, gives the same outputs as zeros in its"
            " place (float64, random weights); so did each round's network.",
            "The network that each round saved is the one that the oracle measured: it was measured again from disk.",
            *parity_lines(report),
        ],
        said=[judged_on(report), INHERITED],
    )


_PASS = {
    False: "forward run of the dense network over the calibration split",
    True: "call of the job's calibrate on the dense network",
}


def _oracle(report: dict[str, Any]) -> list[str]:
    lines = [
        "## What the oracle said",
        "",
        "A reading is the share of a task's tolerance that is used up on the calibration split, just cut, before any"
        " training.",
        "",
        "| round | FLOPs gone | " + " | ".join(markdown(t) for t in report["rounds"][0]["readings"]) + " | passes |"
        " reference's passes |",
        "|---|---|" + "---|" * (len(report["rounds"][0]["readings"]) + 2),
    ]
    for number, one in enumerate(report["rounds"], 1):
        said = " | ".join(f"{100 * v:.1f} %" for v in one["readings"].values())
        lines.append(
            f"| {number} | {100 * one['removed']:.1f} % | {said} | {one['passes']:.1f} | {one['reference_passes']:,} |"
        )
    limits = report["rounds"][0]["tolerances"]
    said = "; ".join(f"{markdown(t)}: {_tolerance(v)}" for t, v in limits.items())
    return [
        *lines,
        "",
        f"Tolerances: {said}."
        + (
            f" They were scaled (by {report['rounds'][-1]['scale']:.2f} in the last round) to reach the FLOPs asked."
            if report["size"]["asked"]
            else ""
        )
        + f" A pass is one {_PASS['job' in report['data']]}; the reference tries 19 ratios of every group.",
        "",
    ]


def _trials(report: dict[str, Any]) -> list[str]:
    """A table a round: every contender, what each task lost behind the trial, and the size."""
    held = [(n, one["trials"]) for n, one in enumerate(report["rounds"], 1) if one.get("trials", {}).get("contenders")]
    if not held:
        return []
    tasks = list(report["rounds"][0]["readings"])
    epochs = sum(trials["epochs"] for _, trials in held)
    halved = ""
    if len({row["epochs"] for _, trials in held for row in trials["contenders"]}) > 1:
        halved = " Those with more epochs were the better half behind fewer."
    of = " of its tolerance" if held[0][1]["by_tolerances"] else ""
    lines = [
        "## Trials",
        "",
        "Plans of one size that share out the channels differently, each cut and trained for a few epochs; the points"
        " that every task then lost on the calibration split (below 0: it gained). The plan whose worst task lost least"
        f"{of} was taken, and trained anew from its cut.{halved} The trials took {counted(epochs, 'epoch')} in all,"
        " on top of the training's.",
    ]
    for number, trials in held:
        lines += [
            "",
            "| plan | FLOPs gone | epochs | " + " | ".join(markdown(t) for t in tasks) + " |",
            "|---|---|---|" + "---|" * len(tasks),
        ]
        for row in trials["contenders"]:
            lost = " | ".join(f"{row['drops'][t]:.1f}" for t in tasks)
            name = markdown(row["name"]) if len(held) == 1 else f"round {number}: {markdown(row['name'])}"
            lines.append(f"| {name} | {100 * row['removed']:.1f} % | {row['epochs']:,} | {lost} |")
    return [*lines, ""]


def _tolerance(value: Mapping[str, Any]) -> str:
    if "absolute" in value:
        return f"{value['absolute']:g} of its {markdown(value['measure'])}"
    return f"{100 * value['relative']:g} % of its {markdown(value['measure'])}"


def _layers(report: dict[str, Any]) -> list[str]:
    lines = ["## Layers", "", "| layer | channels | kept | FLOPs dense | FLOPs pruned |", "|---|---|---|---|---|"]
    for row in report["layers"]:
        lines.append(
            f"| {cell(row['name'])} | {row['channels']:,} | {row['kept']:,} | {row['flops']['dense']:,} |"
            f" {row['flops']['pruned']:,} |"
        )
    if report["left"]:
        lines += ["", "Left as they were:", ""]
        lines += [f"- {code(v['layer'])}: {markdown(v['reason'])}" for v in report["left"]]
    return [*lines, ""]


def _loading(report: dict[str, Any]) -> list[str]:
    name = report["model"]["network"]
    own = f", {json.dumps(name)})  # runs the code of that file" if ".py:" in name else ")"
    return [
        "## Loading",
        "",
        *block(
            [
                "from pathlib import Path",
                "",
                "from compress.networks.reload import reload",
                "",
                f'model = reload(Path("model"){own}',
                "model = model.model  # a torch module in evaluation mode",
            ],
            "python",
        ),
        "",
        "The layers' widths stand in `network.json`. " + inputs_line(report),
        "",
        *runtimes(report),
    ]


# --- plots ------------------------------------------------------------------------------------------------------------


def plots_of(report: Mapping[str, Any]) -> dict[str, Plot]:
    """What of such a network's report can be drawn."""
    return {"channels": _channels, "sensitivity": _sensitivity, "quality": _quality, **latency_plot(report)}


def _channels(report: dict[str, Any], plt: Any) -> Any:
    chart = drawn(report, "channels")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    names = xs(chart["series"][0]["points"])
    for series in chart["series"]:
        bars = ys(series["points"])
        axis.bar(range(len(names)), bars, color=COLOURS[series["colour"]], width=0.8, label=series["name"])
    axis.set_ylabel(chart["y"]["label"])
    axis.set_xlabel("layer, from the input")
    if len(names) <= 40:
        axis.set_xticks(range(len(names)), [caption(name, 30) for name in names], **SLANTED)
    axis.set_title(chart["title"])
    axis.set_ylim(0, 1.2 * max(y for series in chart["series"] for y in ys(series["points"])))  # room for the legend
    axis.legend(frameon=False, fontsize=8, loc="upper left", ncol=2)
    return figure


def _sensitivity(report: dict[str, Any], plt: Any) -> Any:
    """A row a task, a column a group from the input on: the rise of the loss for each per cent of FLOPs saved."""
    dense = report["size"]["flops"]["dense"]
    order = [g["name"] for g in report["groups"]]
    probes = {p["group"]: p for p in report["rounds"][0]["probes"]}
    groups = [name for name in order if name in probes]
    tasks = list(report["rounds"][0]["readings"])
    values = [
        [max(0.0, 100 * probes[g]["loss"][t]) / max(1e-9, 100 * probes[g]["saved_flops"] / dense) for g in groups]
        for t in tasks
    ]
    figure, axis = plt.subplots(figsize=(7, 1.6 + 0.4 * len(tasks)))
    # Each task by its own largest: what is compared is which layers it needs.
    shown = [[v / (max(row) or 1.0) for v in row] for row in values]
    axis.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = shown[i][j] > 0.6
            axis.annotate(
                f"{value:.2g}", (j, i), ha="center", va="center", fontsize=6, color="white" if dark else "black"
            )
    axis.set_yticks(range(len(tasks)), [caption(t, 24) for t in tasks], fontsize=8)
    axis.set_xticks(range(len(groups)), [caption(g, 30) for g in groups], **SLANTED)
    axis.grid(False)
    what = "How much worse, %," if "job" in report["data"] else "Loss rise, %"
    axis.set_title(f"{what} for each % of FLOPs saved; shaded by each task's largest", fontsize=9)
    return figure


def _quality(report: dict[str, Any], plt: Any) -> Any:
    chart = drawn(report, "quality")
    figure, axis = plt.subplots(figsize=(7, 3.6))
    # After every task's line come its points just cut.
    for trained, cut in zip(chart["series"][::2], chart["series"][1::2], strict=True):
        left = [100 - x for x in xs(trained["points"])]
        (line,) = axis.plot(left, ys(trained["points"]), marker="o", label=caption(trained["name"]))
        axis.plot([100 - x for x in xs(cut["points"])], ys(cut["points"]), "x", color=line.get_color())
    axis.plot([], [], "x", color="black", label="just cut")
    axis.set_xlabel("FLOPs left, %")
    axis.set_ylabel(measures(report))
    axis.invert_xaxis()
    axis.set_title(chart["title"] if "job" in report["data"] else f"{chart['title']} (held-out samples)")
    axis.legend(frameon=False, fontsize=8)
    return figure
