"""The card and the plots of a language model with zeros in place, every number taken from report.json."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.report.card import INHERITED, beginning, frame, loading, onnx_check, publish, text_metadata
from compress.report.plots import Plot, latency_plot, perplexity, zeros_per_layer
from compress.report.stats import found_in
from compress.words.escape import code, markdown
from compress.words.wording import counted, small

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def metadata(report: dict[str, Any]) -> ModelCardData:
    """The head of the card."""
    return text_metadata(report, report["size"]["pruned_share"], "unstructured-pruning")


def write_card(report: dict[str, Any], folder: Path) -> Path:
    return publish(report, folder, metadata, body, plots_of(report))


def body(report: dict[str, Any], images: Mapping[str, str]) -> str:
    size, quality, model = report["size"], report["quality"], report["model"]
    which = "of every 4 consecutive inputs the 2 smallest" if size["pattern"] == "2:4" else "the smallest of all layers"
    first = quality["texts"][0]
    return frame(
        report,
        images,
        title=f"{model['name']}, {100 * size['pruned_share']:.1f} % of the linear layers' weights zero",
        intro=f"{code(model['base_model'] or model['name'])} pruned by magnitude with the recipe"
        f" {code(report['recipe']['method'])} of `compress`: {which} are zero, in place; nothing was trained"
        f" afterwards. Weights were taken from: {markdown(model['source'])}.",
        notes=[
            _speed(report.get("bench"), size["pattern"]),
            "",
            f"Pruned: {counted(len(report['layers']), 'layer')} with {size['prunable_weights']:,} of"
            f" {size['total_parameters']:,} parameters;"
            " norms and biases are not, nor are embeddings and the output layer unless the recipe asks for it."
            f" {_floors(report)}"
            f" Perplexity: {counted(first['windows'], 'window')} of {first['length']:,} tokens a text; no text was"
            " calibrated on." + beginning(report),
            "",
        ],
        pictures=(
            ("sparsity-per-layer", "What each layer gave up"),
            ("perplexity", "Perplexity against sparsity"),
            ("latency", "Latency, dense and pruned"),
        ),
        loading=[
            *loading(report),
            "`masks.safetensors` holds a bit for every pruned layer's weight. The run folder's `packed/` holds the"
            " model as bits and non-zero values; `compress.recipes.global_mp.packed.unpack_folder` makes this folder's"
            " weights of it, bit for bit.",
            "",
        ],
        checks=[
            *(
                f"loaded in a clean process as {code(layout['class'])}; logits differ by"
                f" {small(layout['max_logit_difference'])} from those of the dense model masked in memory (allowed"
                f" {small(layout['tolerance'])})"
                for layout in report["verify"]["layouts"]
            ),
            f"{size['pruned_weights']:,} weights were pruned, which is the number asked for; the non-zeros were counted"
            " in the saved files",
            "the packed form gave every tensor back bit for bit",
            *onnx_check(report),
        ],
        said=["What the model knew of other text, of facts, code and other languages was not measured.", INHERITED],
    )


def _speed(bench: dict[str, Any] | None, pattern: str) -> str:
    """What the zeros do for speed, no more than was found."""
    said = (
        "Zeros in place save neither memory nor time where the runtime multiplies by them, as ONNX Runtime and torch"
        " do: the gain is the packed size."
    )
    if bench:
        kinds = {found_in(bench, key).kind for key in ("ttft", "tpot")}
        if kinds <= {"same", "less"}:
            said += " The latency above is measured, and no faster than the dense model's."
        elif kinds == {"more"}:
            said += " The latency above is measured, and faster than the dense model's."
        else:
            said += " The latency above is measured; it does not tell the two models apart."
    else:
        said += " Latency was not measured in this run."
    if pattern == "2:4":
        said += " The pattern 2:4 is for sparse tensor cores (TensorRT); it was not run on one here."
    return said


def _floors(report: dict[str, Any]) -> str:
    floors = [row["floor"] for row in report["layers"]]
    if not any(floors):
        return "No layer had a floor."
    held = sum(row["held_by_floor"] for row in report["layers"])
    least, most = min(floors), max(floors)
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return f"Every layer had to keep at least {span} weights; layers that keep no more than that: {held}."


def plots_of(report: Mapping[str, Any]) -> dict[str, Plot]:
    """What of such a report can be drawn."""
    curve = partial(perplexity, unit="weights of the pruned layers that are zero", others="other sparsities")
    layers = partial(
        zeros_per_layer, all_layers="all layers together", title="What each layer gave up to one threshold"
    )
    return {"sparsity-per-layer": layers, "perplexity": curve, **latency_plot(report)}
