"""The model card: a README.md that the Hugging Face hub accepts, every number taken from report.json."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.report.metadata import assemble, card_data, text_results
from compress.report.multimodal import section as multimodal
from compress.report.plots import Plot, draw
from compress.report.quantised import section as quantised
from compress.report.rows import Row, benches, emulated, figures, here, how, rows
from compress.report.stats import FEWEST
from compress.words.escape import block, code, markdown
from compress.words.wording import counted, megabytes, small

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


def text_metadata(report: dict[str, Any], removed: float, kind: str) -> ModelCardData:
    """The head of a language model's card; ``removed`` is the share in its name, ``kind`` a tag."""
    return card_data(
        report,
        removed=removed,
        tags=[kind],
        library="transformers",
        results=text_results(report),
        task="text-generation",
    )


def publish(
    report: dict[str, Any],
    folder: Path,
    head: Callable[[dict[str, Any]], ModelCardData],
    text: Callable[[dict[str, Any], Mapping[str, str]], str],
    plots: Mapping[str, Plot],
) -> Path:
    """Draws ``plots`` into ``folder``/plots and writes README.md with them; returns its path."""
    drawn = draw(report, folder / "plots", plots)
    images = {name: path.relative_to(folder).as_posix() for name, path in drawn.items()}
    return write_readme(folder, head(report), text(report, images))


def write_readme(folder: Path, head: ModelCardData | Mapping[str, Any], text: str) -> Path:
    """Writes README.md: a head that the hub takes, then the text.

    Raises:
        CompressError: the hub would not take the head.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(**head) if isinstance(head, Mapping) else head
    path = folder / "README.md"
    path.write_text(assemble(data, text), encoding="utf-8")
    return path


TABLE = ["| | dense | pruned | |", "|---|---|---|---|"]


def table(found: Sequence[Row], first: str = "") -> list[str]:
    """A row of a table for each figure; ``first`` is a cell before."""
    lines = []
    for row in found:
        way = f" ({row.better} is better)" if row.unit == "score" else ""
        lines.append(
            f"|{first} {markdown(row.name)}{way} | {row.value('dense')} | {row.value('pruned')} | {row.change()} |"
        )
    return lines


def frame(
    report: Mapping[str, Any],
    images: Mapping[str, str],
    *,
    title: str,
    intro: str,
    pictures: Sequence[tuple[str, str]],
    notes: Sequence[str] = (),
    sections: Sequence[str] = (),
    loading: Sequence[str],
    checks: Sequence[str],
    said: Sequence[str],
) -> str:
    """A card's text: what is the same for all methods, around what is not. Lines each; what is quoted is escaped.

    Args:
        notes: below the first table and how its latencies were measured.
        pictures: (name, caption), in this order; those that ``images`` has are shown.
        sections: before how the model is loaded.
        checks: items of a list.
        said: what limits the model has.
    """
    found = rows(report)
    measured = benches(report)
    shown = [line for name, caption in pictures if name in images for line in (f"![{caption}]({images[name]})", "")]
    lines = [f"# {markdown(title)}", "", intro, "", "## What was won and what was lost", ""]
    lines += [*TABLE, *table(here(found))]
    for runtime, record in measured.items():
        lines += ["", f"{runtime}. {conditions(record)}" if len(measured) > 1 else conditions(record)]
    lines += [
        "",
        *why(report.get("bench") or {}),
        *notes,
        *quantised(report),
        *targets(report),
        *shown,
        *sections,
        *loading,
        *multimodal(report),
    ]
    lines += ["## What was checked", "", *(f"- {check}" for check in checks), ""]
    return "\n".join([*lines, *again(report), *limits(report, list(said))])


def beginning(report: Mapping[str, Any]) -> str:
    """What the windows of text begin with and what joins documents, as sentences behind others; empty where the report
    does not say."""
    if "text" not in report:
        return ""

    def tokens(rows: Sequence[Mapping[str, Any]]) -> str:
        return " ".join(code(row["token"]) for row in rows)

    text = report["text"]
    begin, between = tokens(text["begins_with"]), tokens(text.get("between", ()))
    said = (
        f" Every window begins with {begin}, as the tokenizer begins every text; that is read, and not scored."
        if begin
        else " A window begins with text: the tokenizer puts no token in front of it."
    )
    if "between" in text:
        said += f" Between two documents stands {between}." if between else " Nothing stands between two documents."
    return said + _dialogues(report)


def _dialogues(report: Mapping[str, Any]) -> str:
    """How dialogues were written and what of them was scored; empty where there are none."""
    template = report["text"].get("chat_template")
    if template is None:
        return ""
    names = [row["name"] for row in (report.get("quality") or {}).get("texts") or () if row.get("scored")]
    day = f", which is told that the day is {code(template['day'])}" if "day" in template else ""
    said = (
        f" Dialogues are written by the tokenizer's chat template (SHA-256 {code(template['sha256'][:12])}{day}), with"
        " the reasoning of every turn; a window of them begins with one."
    )
    if names:
        said += f" Of {', '.join(map(markdown, names))} the assistant's words alone are scored."
    return said


INHERITED = "It has the limits and biases of the dense model."


def conditions(record: Mapping[str, Any]) -> str:
    """How a latency was measured, as a sentence; no more than the record says."""
    between = [record[m][k].get("spread_between") for m in ("dense", "pruned") for k in figures(record)]
    spread = [b for b in between if b is not None]
    throttled = record.get("throttled") is True
    return (
        f"Latency: {markdown(', '.join(how(record)))}; median of the processes' medians; in brackets the 95 % bootstrap"
        " interval of the paired ratio;"
        f" what that leaves open, and what fewer than {FEWEST} processes say, is not resolved."
        + (f" The processes differ by up to {100 * max(spread):.0f} %." if spread else "")
        + (" **Throttled**: the last quarter of a run is over 5 % slower than its first." if throttled else "")
        + (" **Emulated**: the device was, so these times say nothing of a real one." if emulated(record) else "")
    )


def targets(report: Mapping[str, Any]) -> list[str]:
    """What was measured on each target beside this machine; nothing where there was none."""
    records = report.get("targets") or {}
    if not records:
        return []
    lines = ["## On the targets", "", "| target | | dense | pruned | |", "|---|---|---|---|---|"]
    notes = []
    for name, record in records.items():
        own = [row for row in rows(report) if row.where == name]
        if own:
            mark = " (emulated)" if own[0].emulated else ""
            lines += table(own, f" {markdown(name)}{mark} |")
            notes.append(f"- {markdown(name)}: {conditions(record)}")
            notes += [f"  {line}" if line else "" for line in why(record)]
        else:
            reason = (record.get("reason") or record.get("error")) if isinstance(record, Mapping) else None
            lines.append(f"| {markdown(name)} | not measured | | | {markdown(reason or '')} |")
    return [*lines, "", *notes, *([""] if notes else [])]


def why(record: Mapping[str, Any]) -> list[str]:
    """What a bench record says of the speed-up that the FLOPs promise, and of the layers that fall short of it."""
    from compress.report.explained import lines as explained_lines

    lines = []
    for part, found in (record.get("why") or {}).items():
        head, *rest = explained_lines(found)
        where = "" if part == "model" else f"{markdown(part)}: "
        lines.append(f"- {where}{markdown(head)}" + (", because" if rest else "."))
        lines += [f"  - {markdown(line)}" for line in rest]
    head = "Against the ideal, layer by layer under ONNX Runtime's profiler (the latency above is without it):"
    return [head, "", *lines, ""] if lines else []


def missing(report: Mapping[str, Any]) -> list[str]:
    """What a card would say had it been measured; a sentence each."""
    commands = report.get("commands") or {}
    said = []
    if not report.get("export"):
        said.append("It was not exported: there are no files for other runtimes" + _by(commands.get("export")))
    if not report.get("bench") and not report.get("targets"):
        what = "Latency and memory were not measured, so whether it is faster is not known"
        said.append(what + _by(commands.get("bench")))
    if not (report.get("quality") or {}).get("texts") and not (report.get("quality") or {}).get("tasks"):
        said.append("Its quality was not measured, so what the pruning cost is not known" + _by(commands.get("eval")))
    if not report["model"]["license"]:
        said.append("No licence is stated: none was found with the dense model, and it decides what may be done")
    return said


def _by(command: str | None) -> str:
    return f" ({code(command)})" if command else ""


def limits(report: Mapping[str, Any], said: list[str]) -> list[str]:
    """The section of that name: what holds for this model, then what was not measured."""
    return ["## Limits", "", *(f"- {one}" for one in said), *(f"- {one}." for one in missing(report)), ""]


def again(report: Mapping[str, Any]) -> list[str]:
    """The commands that make every number again, and what it was measured on."""
    lines = ["## Every number again", "", *block([c for c in report["commands"].values() if c], "sh"), ""]
    environment = report["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    lines += [
        f"Measured on {markdown(environment['cpu'])}, {counted(environment['cores'], 'core')},"
        f" {markdown(environment['system'])};"
        f" {markdown(versions)}."
        f" Report {code(report['sha256'][:16])}; the raw samples are in `report.json`, and `report.html` shows all of"
        " this in a browser.",
        "",
        "`compress verify FOLDER_OR_ID` checks a copy of this model against its report: every file's hash, its outputs,"
        " and with `--measure` the figures above, the dense model's too where it can be had.",
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
            " the weights builds each layer from its own entry in `config.json`. Never load it with"
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
    return [*lines, *runtimes(report)]


# How a file of a format is opened: the format's name, what it is called, and code where `folder` is the release.
_TEXT_ONNX = """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "PATH"  # this folder, or huggingface_hub.snapshot_download("ID")
ids = AutoTokenizer.from_pretrained(folder)("Once upon", return_tensors="np")["input_ids"].astype(np.int64)
session = onnxruntime.InferenceSession(f"{folder}/onnx/prefill.onnx")
feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
wanted = {i.name for i in session.get_inputs()}
logits = session.run(["logits"], {k: v for k, v in feed.items() if k in wanted})[0]
"""
_ONNX = """\
import numpy as np
import onnxruntime

folder = "PATH"  # this folder, or huggingface_hub.snapshot_download("ID")
session = onnxruntime.InferenceSession(f"{folder}/onnx/model.onnx")
outputs = session.run(None, FEED)
"""
_MNN = """\
from MNN import nn

folder = "PATH"  # this folder, or huggingface_hub.snapshot_download("ID")
module = nn.load_module_from_file(f"{folder}/mnn/model.mnn", [], [])
"""
RUNTIMES: dict[str, tuple[str, str]] = {
    "onnx": ("ONNX Runtime", _ONNX),
    "mnn": ("MNN", _MNN),
    "ort": ("ONNX Runtime Mobile", ""),
    "tensorrt": ("TensorRT", ""),
    "tensorrt-rtx": ("TensorRT for RTX", ""),
    "executorch": ("ExecuTorch", ""),
    "openvino": ("OpenVINO", ""),
    "litert": ("LiteRT", ""),
}


def _prompted(report: Mapping[str, Any]) -> str:
    """The code for a language model's ONNX files; a text that is to be gone on with is not ended."""
    ends = len((report.get("text") or {}).get("ends_with") or ())
    return _TEXT_ONNX.replace('["input_ids"]', f'["input_ids"][:, :-{ends}]') if ends else _TEXT_ONNX


def _feed(data: Mapping[str, Any]) -> str:
    """Arrays for the inputs of a network's ONNX file, as code."""
    ports = data.get("inputs") or {"input": {"shape": data["input"], "dtype": "float32"}}
    arrays = []
    for name, port in ports.items():
        shape = ", ".join(["1", *(str(int(n)) for n in port["shape"])])
        kind = port["dtype"] if re.fullmatch(r"(float|u?int)\d+", str(port["dtype"])) else "bool_"
        arrays.append(f"{json.dumps(str(name))}: np.zeros(({shape}{',' if not port['shape'] else ''}), np.{kind})")
    return f"{{{', '.join(arrays)}}}"


def runtimes(report: Mapping[str, Any]) -> list[str]:
    """How the exported files are opened, a format each; a format without code here is named with its files."""
    lines = []
    for form, facts in (report.get("export") or {}).items():
        pruned = facts.get("pruned", facts) if isinstance(facts, Mapping) else {}
        sizes = pruned.get("bytes") if isinstance(pruned, Mapping) else None
        names = sizes if isinstance(sizes, Mapping) else {}
        title, text = RUNTIMES.get(form, (form, ""))
        lines += [f"### {markdown(title)}", ""]
        if form == "onnx" and "prefill.onnx" in names:
            text = _prompted(report)
        if "data" in report:
            text = text.replace("FEED", _feed(report["data"]))
        if text:
            lines += [*block(text.strip().splitlines(), "python"), ""]
        listed = ", ".join(f"{code(f'{form}/{name}')} ({megabytes(size)})" for name, size in names.items())
        if listed:
            lines += [f"Files: {listed}.", ""]
        if form == "onnx" and "prefill.onnx" in names:
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
        f"ONNX: {counted(facts['outputs_compared'], 'output')} compared with torch, largest relative"
        f" difference {small(facts['largest_difference'])} (allowed {small(facts['tolerance'])});"
        f" {counted(facts['greedy']['tokens'], 'greedy token')} equal torch's"
    ]
