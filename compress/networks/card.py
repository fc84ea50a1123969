"""What the cards of plain networks have in common, whatever the method, every number taken from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.charts import latencies
from compress.report.plots import COLOURS, Plot, wrapped, ys
from compress.report.rows import judges
from compress.words.escape import caption, markdown
from compress.words.wording import counted, small

COUNTED = "A multiplication is two FLOPs with its addition; norms, activations and biases are not counted."


def loaded_lines(report: Mapping[str, Any]) -> list[str]:
    return [
        f"Loaded in a clean process: outputs differ by {small(layout['max_logit_difference'])}"
        f" (allowed {small(layout['tolerance'])})."
        for layout in report["verify"]["layouts"]
    ]


def parity_lines(report: Mapping[str, Any]) -> list[str]:
    """What every export was compared with, and how far it is from that."""
    lines = []
    for form, both in (report.get("export") or {}).items():
        facts, title = both["pruned"], markdown(form.upper())
        if "skipped" in facts:
            lines.append(f"{title}: built, and not run where it was built ({markdown(facts['skipped'])}).")
            continue
        agree = "".join(
            f"; the largest class of {markdown(k)} is the same for {100 * v:.0f} %"
            for k, v in facts.get("agree", {}).items()
        )
        reference = "torch" if form in ("onnx", "mnn") else "ONNX"
        samples = "sample" if "job" in report["data"] else "held-out sample"
        lines.append(
            f"{title} against {reference} on {counted(facts['samples'], samples)}:"
            f" {counted(facts['outputs_compared'], 'output')} "
            f"{'differs' if facts['outputs_compared'] == 1 else 'differ'} by at most"
            f" {small(facts['largest_difference'])} of the largest value{agree}."
        )
    return lines


def data_line(report: Mapping[str, Any], decided: int | None = None) -> str:
    """What it was trained and measured on; ``decided``: the samples that decided what goes."""
    data = report["data"]
    if "job" in data:
        said = ["measured", *(["trained"] if data["job"]["train"] else [])]
        return f"It was {' and '.join(said)} by the functions of {markdown(data['source'])}, on data of their own."
    return (
        f"Data: {markdown(data['source'])}; {counted(data['samples']['train'], 'sample')} trained on,"
        + (f" {decided:,} to decide on," if decided is not None else "")
        + f" {data['samples']['test']:,} held out."
    )


def inputs_line(report: Mapping[str, Any]) -> str:
    """What the network takes and gives, in every runtime."""
    if "job" in report["data"]:
        return (
            "Inputs are those of the network itself, in every runtime; exports give its outputs of floats, in order, by"
            " the names in `network.json`."
        )
    return (
        "Inputs are floats from 0 to 1 (signals as they are), less `mean`, over `std` of that file, in every runtime;"
        " exports name one output a task."
    )


def judged_on(report: Mapping[str, Any]) -> str:
    data = report["data"]
    if "job" in data:
        return (
            f"It was judged by evaluate of {markdown(data['source'])} alone; on other data, under noise or another"
            " camera or sensor, nothing was measured."
        )
    return (
        f"It was judged on {counted(data['samples']['test'], 'held-out sample')} of {markdown(data['source'])} alone;"
        " on other data, under noise or another camera or sensor, nothing was measured."
    )


def latency_plot(report: Mapping[str, Any]) -> dict[str, Plot]:
    """One figure here, with a plot of its own; none where it was not measured."""
    return {"latency": _latency} if "bench" in report else {}


def measures(report: Mapping[str, Any]) -> str:
    """For an axis: the one measure that all tasks are judged by, or what holds for several."""
    names = {row.metric for row in judges(report)}
    return caption(names.pop()) if len(names) == 1 else "quality, each task by its own measure"


def _latency(report: dict[str, Any], plt: Any) -> Any:
    (chart,) = latencies(report)
    figure, axis = plt.subplots(figsize=(7, 2.6))
    for i, series in enumerate(chart["series"]):
        colour = COLOURS[series["colour"]]
        axis.scatter(ys(series["points"]), [i] * len(series["points"]), color=colour, s=18, alpha=0.7)
        axis.plot([series["median"]] * 2, [i - 0.25, i + 0.25], color=colour, lw=2)
    axis.set_yticks([0, 1], [series["name"] for series in chart["series"]])
    axis.set_ylim(1.6, -0.6)
    axis.margins(x=0.06)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"ms a batch of {report['bench']['spec']['batch']}; a dot is a process, the bar their median")
    axis.set_title(wrapped(f"Latency: {chart['said']}", 80))
    return figure
