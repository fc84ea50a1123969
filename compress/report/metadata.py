"""The head of a model card, built with the hub's own classes, and the hub's rules for it.

The hub's validator (`huggingface_hub.ModelCard.validate`) posts the card to the hub; there is none that works offline.
`faults` therefore holds the rules that the hub documents (hub-docs: modelcard.md, model-cards.md,
repositories-licenses.md) and what `huggingface_hub` reads back; ``compress card --push`` asks the hub itself as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.report.quantised import files
from compress.report.rows import qualities
from compress.report.rows import rows as read_rows
from compress.words.escape import line

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

# The hub's words for how a model comes from another; it has none for pruning. Weights that were changed and saved
# whole are a "finetune" there.
RELATIONS = ("adapter", "finetune", "merge", "quantized")

# The hub's words for what an image network does; it has none for a signal's classes.
PIPELINES = {"image-classification", "image-segmentation", "depth-estimation", "object-detection"}

# The identifiers that the hub lists; another licence is "other" with its name.
LICENSES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
    openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma
    h-research unknown other
    """.split()  # noqa: SIM905  (a list of 80 quoted words is no easier to read)
)


def card_data(
    report: Mapping[str, Any],
    *,
    removed: float,
    tags: Sequence[str],
    library: str,
    results: Sequence[EvalResult],
    task: str | None = None,
) -> ModelCardData:
    """The head of a card.

    Args:
        removed: the share that stands in the model's name.
        tags: beside "pruned", the method and the formats it was exported to.
        results: what was measured (`text_results`, `network_results`); with none there is no model-index.
        task: the hub's pipeline tag.
    """
    from huggingface_hub import ModelCardData

    model = report["model"]
    more: dict[str, Any] = {}
    base = model["base_model"] if model["base_model"] and is_repo(model["base_model"]) else None
    if base:
        more["base_model_relation"] = "finetune"
    license_ = line(model["license"] or "") or None
    if license_ and license_ not in LICENSES:
        more["license_name"] = re.sub(r"[^a-z0-9.]+", "-", license_.lower()).strip("-") or "unnamed"
        license_ = "other"
    measured = list(results)
    datasets = sorted(set(_hub_sources(report["recipe"])))
    return ModelCardData(
        license=license_,
        base_model=base,
        library_name=library,
        pipeline_tag=task,
        tags=["pruned", *tags, line(report["recipe"]["method"]), *(line(f) for f in _formats(report))],
        datasets=datasets or None,
        metrics=sorted({r.metric_type for r in measured}) or None,
        model_name=f"{line(model['name'])}-pruned-{round(100 * removed)}" if measured else None,
        eval_results=measured or None,
        **more,
    )


def _formats(report: Mapping[str, Any]) -> list[str]:
    """What it was exported to; the hub finds a GGUF by that tag."""
    return list(dict.fromkeys([*(report.get("export") or {}), *(row["format"] for row in files(report))]))


def is_repo(name: object) -> bool:
    """Whether this is a model's or data set's id, as the hub writes them."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return False
    return True


def _hub_sources(value: Any) -> list[str]:
    """The data sets of the hub that a recipe names."""
    if isinstance(value, Mapping):
        own = [str(value["hub"])] if isinstance(value.get("hub"), str) and is_repo(value["hub"]) else []
        return own + [name for v in value.values() for name in _hub_sources(v)]
    if isinstance(value, list | tuple):
        return [name for v in value for name in _hub_sources(v)]
    return []


def text_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """Perplexities and harness tasks of the pruned model."""
    from huggingface_hub import EvalResult

    named = {t["name"]: t["source"] for t in report["recipe"].get("evaluation", {}).get("texts", ())}
    rows = []
    for row in qualities(read_rows(report)):
        if row.pruned is None or not row.task:
            continue
        held = row.unit == "perplexity"
        title, source = (f"{row.task} (held out)", named.get(row.task, {})) if held else (row.task, {})
        rows.append((row.task, title, source.get("hub"), row.metric, row.pruned))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=line(title),
            metric_type=line(metric),
            metric_name=line(metric),
            metric_value=round(value, 4),
        )
        for (_, title, _, metric, value), dataset in zip(rows, _datasets([r[:3] for r in rows]), strict=True)
    ]


def network_results(report: Mapping[str, Any]) -> list[EvalResult]:
    """What a network's tasks reach on the held-out samples; the loss is no measure of another's."""
    from huggingface_hub import EvalResult

    data = report["data"]
    # Where a task has several measures, its main one stands in the head.
    rows = [(row, row.pruned) for row in qualities(read_rows(report)) if row.main and row.pruned is not None]
    name = f"{line(data['source'])} (held out)"
    types = {t["name"]: task_type(t, data.get("input", ())) for t in data["tasks"]}
    return [
        EvalResult(
            task_type=types[row.task],
            task_name=line(row.task),
            dataset_type=slug(data["source"]),
            dataset_name=name,
            dataset_config=line(row.task),
            metric_type=line(row.metric),
            metric_name=line(row.name),
            metric_value=round(value, 4),
        )
        for row, value in rows
    ]


def task_type(task: Mapping[str, Any], shape: Sequence[int]) -> str:
    """The hub's word for a network's task: what the report says, or what its kind and its input's shape come to."""
    if task.get("type"):
        return line(task["type"])
    if task["kind"] == "classes":
        return "image-classification" if len(shape) == 3 else "time-series-classification"
    return line(task["kind"])


def pipeline_tag(data: Mapping[str, Any]) -> str | None:
    """The one word for what a network does, where all its tasks have one that the hub knows."""
    found = {task_type(task, data.get("input", ())) for task in data["tasks"]}
    return found.pop() if len(found) == 1 and found <= PIPELINES else None


def results(report: Mapping[str, Any]) -> list[EvalResult]:
    """What a report's card states in its head, of either kind of model."""
    return network_results(report) if "data" in report else text_results(report)


def slug(text: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", line(text).lower()).strip("-") or "unnamed"


def _datasets(rows: Sequence[tuple[str, str, str | None]]) -> list[str]:
    """A data set type for each (name, title, hub id), no two alike for two names.

    `eval_results_to_model_index` groups by the type and not by the name: two texts of one type would become one.
    """
    found: dict[str, str] = {}
    for name, _, hub in rows:
        if name in found:
            continue
        wanted = hub if hub and is_repo(hub) else slug(name)
        taken, count, chosen = set(found.values()), 1, wanted
        while chosen in taken:
            count += 1
            chosen = f"{wanted}-{count}"
        found[name] = chosen
    return [found[name] for name, _, _ in rows]


def faults(content: str) -> list[str]:
    """What the hub would not take of a card's head, or not show; an empty list where all is well."""
    import yaml
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return ["there is no head between two lines of ---"]
    try:
        # As it is written: huggingface_hub's reader mends some things that the hub does not.
        head = yaml.safe_load(block.group(2))
        ModelCard(content)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as e:
        return [f"huggingface_hub cannot read it: {' '.join(str(e).split())}"]
    if not head:
        return ["the head is empty"]
    found = []
    bases = head.get("base_model")
    for base in bases if isinstance(bases, list) else [bases] if bases is not None else []:
        if not is_repo(base):
            found.append(f"base_model {base!r} is no id of the hub")
    relation = head.get("base_model_relation")
    if relation is not None and (relation not in RELATIONS or bases is None):
        found.append(f"base_model_relation {relation!r} is not one of {', '.join(RELATIONS)}, or has no base_model")
    if "license" in head and head["license"] not in LICENSES:
        found.append(f"license {head['license']!r} is not on the hub's list (other, with license_name)")
    if head.get("license") == "other" and not head.get("license_name"):
        found.append("license other has no license_name")
    for key in ("tags", "datasets", "metrics"):
        values = head.get(key, [])
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            found.append(f"{key} is not a list of words")
    found += [f"data set {d!r} is no id of the hub" for d in head.get("datasets", []) if not is_repo(d)]
    index = head.get("model-index")
    if index is None:
        return found
    for result in (r for model in index for r in model["results"]):
        places = (("task", "type"), ("dataset", "type"), ("dataset", "name"))
        lacking = [f"{a}.{b}" for a, b in places if not (isinstance(result[a].get(b), str) and result[a][b])]
        for metric in result["metrics"]:
            if not metric.get("type"):
                lacking.append("metric.type")
            value = metric.get("value")
            if isinstance(value, float) and not math.isfinite(value):
                lacking.append("a finite metric.value")
        found += [f"a result lacks {what}" for what in lacking]
    if not all(isinstance(model["name"], str) and model["name"] for model in index):
        found.append("the model-index has no name")
    name, results = model_index_to_eval_results(index)
    if eval_results_to_model_index(name, results) != index:
        found.append("the model-index does not come back as it was written")
    return found


def assemble(data: ModelCardData, text: str) -> str:
    """A card's whole content.

    Raises:
        CompressError: the hub would not take it, or results were lost on the way.
    """
    from huggingface_hub import ModelCard

    content = f"---\n{data.to_yaml()}\n---\n\n{text}"
    wrong = faults(content)
    back: Any = ModelCard(content).data if not wrong else None
    kept = len(back.eval_results or ()) if not wrong else 0
    if not wrong and kept != len(data.eval_results or ()):
        wrong = [f"{len(data.eval_results or ())} results became {kept}"]
    if wrong:
        raise CompressError(
            f"the card's head is not what the hub takes: {wrong[0]}", where="README.md", fix="mend the report's names"
        )
    return content
