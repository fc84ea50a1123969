"""The model card: a README.md that the Hugging Face hub accepts, every number taken from report.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def escape(text: object) -> str:
    """Text from outside, made harmless in Markdown: no markup, no links, no new lines."""
    flat = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", flat)


def code(text: object) -> str:
    """Text from outside as inline code."""
    return "`" + re.sub(r"\s+", " ", str(text)).replace("`", "'") + "`"


def metadata(report: dict[str, Any]) -> dict[str, Any]:
    """The YAML head of a card for a model with whole units gone."""
    return text_metadata(report, report["size"]["backbone_removed"], "structured-pruning")


def text_metadata(report: dict[str, Any], removed: float, kind: str) -> dict[str, Any]:
    """The YAML head of a language model's card; ``removed`` is the share in its name, ``kind`` a tag."""
    model, quality = report["model"], report["quality"]
    head: dict[str, Any] = {}
    if model["license"]:
        head["license"] = model["license"]
    if model["base_model"]:
        head["base_model"] = model["base_model"]
        head["base_model_relation"] = "finetune"
    head |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", kind, report["recipe"]["method"], "onnx"],
    }
    name = f"{model['name']}-pruned-{round(100 * removed)}"
    head["model-index"] = [
        {
            "name": name,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": "text", "name": f"{text['name']} (held out)"},
                    "metrics": [{"type": "perplexity", "value": round(text["pruned_ppl"], 3), "name": "perplexity"}],
                }
                for text in quality["texts"]
            ],
        }
    ]
    return head


def write_card(report: dict[str, Any], folder: Path, plots: Mapping[str, Path]) -> Path:
    """Writes README.md into ``folder``; ``plots`` lie below it."""
    images = {name: str(plot.relative_to(folder)) for name, plot in plots.items()}
    return write_readme(folder, metadata(report), body(report, images))


def write_readme(folder: Path, head: Mapping[str, Any], text: str) -> Path:
    path = folder / "README.md"
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True)
    path.write_text(f"---\n{front}---\n\n{text}", encoding="utf-8")
    return path


def body(report: dict[str, Any], images: Mapping[str, str]) -> str:
    size, quality, model = report["size"], report["quality"], report["model"]
    dense, pruned = size["dense"], size["pruned"]
    title = f"{model['name']}, {100 * size['backbone_removed']:.1f} % of the backbone removed"
    lines = [f"# {escape(title)}", ""]
    origin = code(model["base_model"]) if model["base_model"] else code(model["name"])
    lines += [
        f"{origin} pruned with the recipe {code(report['recipe']['method'])} of `compress`: whole KV groups, query"
        f" heads and FFN neurons are gone, the projections behind them are refitted; {_training(report)}."
        f" Weights were taken from: {escape(model['source'])}.",
        "",
        "## What was won and what was lost",
        "",
        "| | dense | pruned | |",
        "|---|---|---|---|",
        _row(
            "backbone parameters", dense["backbone_parameters"], pruned["backbone_parameters"], size["backbone_removed"]
        ),
        _row("all parameters", dense["total_parameters"], pruned["total_parameters"], size["total_removed"]),
    ]
    lines += quality_rows(quality)
    bench = report.get("bench")
    if bench:
        lines += latency_rows(bench)
    lines += ["", f"The sparsity asked for was {100 * size['asked']:.4g} % of the backbone (all linear layers of the"]
    lines[-1] += " blocks; embeddings, head and norms are not part of it)."
    first = quality["texts"][0]
    lines += [
        f"Perplexity: {first['windows']} windows of {first['length']} tokens a text, none of which the pruner saw.",
        "",
    ]
    lines += _recovery(report)
    for name, caption in (
        ("sparsity-per-layer", "What each layer gave up"),
        ("perplexity", "Perplexity against sparsity"),
        ("latency", "Latency, dense and pruned"),
        ("search", "The search"),
    ):
        if name in images:
            lines += [f"![{caption}]({images[name]})", ""]
    lines += loading(report)
    lines += _checks(report)
    lines += again(report)
    lines += [
        "## Limits",
        "",
        "The model was calibrated on "
        + ", ".join(escape(_source(s)) for s in report["recipe"]["calibration"]["sources"])
        + ". On text unlike these it has lost more than the table's mean says; what it knew of facts, code and other"
        " languages was not measured. It inherits the limits and biases of the dense model.",
        "",
    ]
    return "\n".join(lines)


def _training(report: dict[str, Any]) -> str:
    recovered = report.get("recover")
    if recovered is None:
        return "nothing was trained afterwards"
    how = "all weights of the blocks" if recovered["method"] == "full" else "low-rank updates, merged,"
    return (
        f"then {how} were trained for {recovered['steps']:,} steps ({recovered['tokens']:,} tokens) to do what the"
        " dense model does"
    )


def _recovery(report: dict[str, Any]) -> list[str]:
    """What the training brought, where there was one."""
    recovered = report.get("recover")
    if recovered is None:
        return []
    mean = recovered["geometric_mean"]
    return [
        f"Recovery ({recovered['method']}, {recovered['trained_parameters']:,} parameters trained): perplexity,"
        f" geometric mean, {mean['before']:.2f} before and {mean['after']:.2f} after; without it:"
        f" {code(report['commands']['unrecovered'])}.",
        "",
    ]


def quality_rows(quality: dict[str, Any]) -> list[str]:
    """Perplexities and task scores, dense and pruned, as rows of the table."""
    rows = []
    mean = quality["geometric_mean"]
    for text in quality["texts"]:
        ratio = text["pruned_ppl"] / text["dense_ppl"]
        rows.append(
            f"| perplexity, {escape(text['name'])} | {text['dense_ppl']:.2f} | {text['pruned_ppl']:.2f} |"
            f" {ratio:.2f}x |"
        )
    if len(quality["texts"]) > 1:
        rows.append(
            f"| perplexity, geometric mean | {mean['dense']:.2f} | {mean['pruned']:.2f} |"
            f" {mean['pruned'] / mean['dense']:.2f}x |"
        )
    for task in quality["tasks"]:
        rows.append(
            f"| {escape(task['task'])}, {escape(task['metric'])} | {task['dense']:.4f} | {task['pruned']:.4f} | |"
        )
    return rows


def _source(spec: Mapping[str, Any]) -> str:
    if "files" in spec:
        return ", ".join(Path(name).name for name in spec["files"])  # where they lay is nobody's business
    return str(next(spec[k] for k in ("hub", "embedded", "package") if k in spec))


def _row(name: str, dense: int, pruned: int, removed: float) -> str:
    return f"| {name} | {dense:,} | {pruned:,} | -{100 * removed:.1f} % |"


def latency_rows(bench: dict[str, Any]) -> list[str]:
    spec = bench["spec"]
    rows = []
    for key, name in (
        ("ttft", f"TTFT, {spec['prompt']} tokens"),
        ("tpot", f"TPOT at {spec['context']} tokens of context"),
    ):
        dense, pruned, ratio = bench["dense"][key], bench["pruned"][key], bench["ratios"][key]
        rows.append(
            f"| {name} | {1000 * dense['median']:.1f} ms | {1000 * pruned['median']:.1f} ms |"
            f" {ratio['median']:.2f}x as fast [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
        )
    dense, pruned = bench["dense"], bench["pruned"]
    rows.append(
        f"| peak memory | {dense['peak_rss'] / 1e6:.0f} MB | {pruned['peak_rss'] / 1e6:.0f} MB |"
        f" {dense['peak_rss'] / pruned['peak_rss']:.2f}x as small |"
    )
    rows.append(
        f"| ONNX files | {dense['bytes'] / 1e6:.0f} MB | {pruned['bytes'] / 1e6:.0f} MB |"
        f" {dense['bytes'] / pruned['bytes']:.2f}x as small |"
    )
    between = max(bench[m][k]["spread_between"] for m in ("dense", "pruned") for k in ("ttft", "tpot"))
    rows.append("")
    rows.append(
        f"Latency: {escape(spec['runtime'])} on {spec['threads']} threads, {spec['processes']} fresh processes a model,"
        f" interleaved {spec['order']}, median of the processes' medians; in brackets the 95 % bootstrap interval of"
        f" the paired ratio. The processes differ by up to {100 * between:.0f} %."
    )
    return rows


def again(report: dict[str, Any]) -> list[str]:
    """The commands that make every number again, and what it was measured on."""
    lines = ["## Every number again", "", "```sh"]
    lines += [f"{command}" for command in report["commands"].values() if command]
    lines += ["```", ""]
    environment = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    lines += [
        f"Measured on {escape(environment['cpu'])}, {environment['cores']} cores, {environment['system']}; {versions}."
        f" Report {code(report['sha256'][:16])}; the raw samples are in `report.json`.",
        "",
    ]
    return lines


def loading(report: dict[str, Any]) -> list[str]:
    lines = ["## Loading it", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if report["quality"]["layout"] == "per-layer":
        lines += [
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID", trust_remote_code=True)',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
            "```",
            "",
            "Its layers differ in size, which transformers' own classes do not read yet: `modeling_compress.py` beside"
            " the weights builds each layer from its own entry of `per_layer_config`. Never load it with"
            " `ignore_mismatched_sizes=True`: that would fill the layers with random numbers.",
            "",
        ]
    else:
        lines += [
            'model = AutoModelForCausalLM.from_pretrained("PATH_OR_ID")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_ID")',
            "```",
            "",
        ]
    if "export" in report:
        lines += [
            "`onnx/prefill.onnx` (prompt to first token) and `onnx/decode.onnx` (with KV cache) share"
            " `onnx/weights.data`.",
            "",
        ]
    return lines


def onnx_check(report: dict[str, Any]) -> list[str]:
    """What was compared of the exported model, as a line; none where it was not exported."""
    if "export" not in report:
        return []
    facts = report["export"]["onnx"]["pruned"]
    return [
        f"- ONNX: {facts['outputs_compared']} outputs compared with torch, largest relative difference"
        f" {facts['largest_difference']:.1e} (allowed {facts['tolerance']:.1e}); {facts['greedy']['tokens']} greedy"
        " tokens equal torch's"
    ]


def _checks(report: dict[str, Any]) -> list[str]:
    lines = ["## What was checked", ""]
    for layout in report["verify"]["layouts"]:
        lines.append(
            f"- layout {code(layout['layout'])}: loaded in a clean process as {code(layout['class'])}; logits differ by"
            f" {layout['max_logit_difference']:.1e} from those it was saved with (allowed {layout['tolerance']:.1e}),"
            f" the sliced model from the masked one by {layout['masked_difference']:.1e}"
        )
    lines += onnx_check(report)
    search = report["search"]
    lines.append(
        f"- search: {search['work_token_layers']:,} tokens x layers,"
        f" {search['reference_token_layers'] / search['work_token_layers']:,.0f} times less than the paper's schedule"
    )
    scale = report["logit_scale"]
    if scale is not None:
        lines.append(
            f"- scale of the logits: {scale['scale']:.2f}, folded into the last norm; it takes the KL to the dense"
            f" model on the search windows from {scale['kl_before']:.4f} to {scale['kl']:.4f} nats"
        )
    return [*lines, ""]
