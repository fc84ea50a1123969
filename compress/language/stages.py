"""What every method does alike with a language model behind its plan: evaluation, export, bench, release."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.run.folder import fingerprint

if TYPE_CHECKING:
    from compress.language.setup import Setup


import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from compress import __version__
from compress.language.setup import Setup, Windows
from compress.run.folder import Run, link, seal_hash

if TYPE_CHECKING:
    from torch import Tensor


def fixed_tokens(setup: Setup[Any], count: int = 64) -> Tensor:
    """Fixed token ids (1, count) for fingerprints: any model's vocabulary will do. They begin as a text does."""
    import torch

    ids = torch.randint(0, setup.geometry.vocab, (1, count), generator=torch.Generator().manual_seed(setup.recipe.seed))
    begin = torch.tensor(setup.begin[:count], dtype=torch.int64)
    ids[0, : len(begin)] = begin
    return ids


def perplexities(model: Any, windows: Windows, label: str) -> dict[str, dict[str, float | int]]:
    """What `compress.language.evaluate.perplexity` finds on each held-out text."""
    from compress.language.evaluate import perplexity

    begin = len(windows.begin)
    return {
        n: perplexity(model, ids, f"{label}, {n}", begin, windows.own.get(n)) for n, ids in windows.evaluation.items()
    }


def evaluate(
    run: Run,
    setup: Setup[Any],
    windows: Windows,
    saved: Mapping[str, Path],
    report: dict[str, Any],
    curve: Callable[[Mapping[str, Any]], list[dict[str, Any]]],
) -> None:
    """Measures the dense and the saved model; ``curve`` measures others, given what decides a measurement."""
    from compress.language.evaluate import geometric_mean, harness_tasks

    tasks = setup.recipe.evaluation.tasks

    def measure(folder: Path | None, load: Callable[[], Any], label: str, source: Path) -> None:
        model = load()
        found: dict[str, Any] = {"texts": perplexities(model, windows, f"perplexity, {label}")}
        if folder is not None:
            found["tasks"] = harness_tasks(source, tasks) if tasks else []
            (folder / "evaluation.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

    common = {"version": __version__, "text": held_out(windows), "tasks": tasks}
    layout, folder = next(iter(saved.items()))
    results = {}
    for label, load, source, inputs in (
        ("dense", lambda: setup.model, setup.resolved.folder, {"weights": setup.weights}),
        ("pruned", lambda: setup.load(folder), folder, {"model": seal_hash(folder)}),
    ):
        stage = run.stage_together(
            f"evaluation-{label}",
            {**common, **inputs},
            lambda f, load=load, label=label, source=source: measure(f, load, label, source),  # type: ignore[misc]
        )
        results[label] = json.loads((stage / "evaluation.json").read_text("utf-8"))
    dense, pruned = results["dense"]["texts"], results["pruned"]["texts"]
    spoken = {text.name for text in setup.recipe.evaluation.texts if text.source.dialogues is not None}
    report["quality"] = {
        "texts": [
            {
                "name": name,
                "windows": len(windows.evaluation[name]),
                "length": windows.evaluation[name].shape[1],
                "sha256": text_hash(windows.evaluation[name]),
                **({"scored": "assistant", "tokens": dense[name]["tokens"]} if name in spoken else {}),
                "dense_ppl": dense[name]["ppl"],
                "pruned_ppl": pruned[name]["ppl"],
            }
            for name in windows.evaluation
        ],
        "geometric_mean": {
            "dense": geometric_mean([v["ppl"] for v in dense.values()]),
            "pruned": geometric_mean([v["ppl"] for v in pruned.values()]),
        },
        "tasks": [
            {"task": d["task"], "metric": d["metric"], "dense": d["value"], "pruned": p["value"]}
            for d, p in zip(results["dense"]["tasks"], results["pruned"]["tasks"], strict=True)
        ],
        "layout": layout,
        "curve": curve(common),
    }
    report["stages"] = run.stages()


def held_out(windows: Windows) -> dict[str, str]:
    """A hash of every text that is evaluated on, and of which tokens of it are scored where it is not all."""
    return {
        n: text_hash(w) + (f" {text_hash(windows.own[n])}" if n in windows.own else "")
        for n, w in windows.evaluation.items()
    }


def text_hash(windows: Tensor) -> str:
    """The first 16 digits of the SHA-256 of token windows (n, length)."""
    import hashlib

    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


def export_dense(run: Run, setup: Setup[Any]) -> Path:
    """The sealed folder of the dense model's export."""
    from compress.exporters.check import write_checked
    from compress.models.streaming import on_cpu

    assert setup.recipe.export is not None  # asked by the caller
    spec, vocab = setup.recipe.export, setup.geometry.vocab
    inputs = {"version": __version__, "weights": setup.weights, "export": spec.model_dump(mode="json")}
    return run.stage(
        "export-dense", inputs, lambda f: write_checked(on_cpu(setup.model), setup.tokenizer, f, spec, vocab)
    )


def export(
    run: Run, setup: Setup[Any], pruned: Callable[[], Any], saved: Path, report: dict[str, Any]
) -> dict[str, Path]:
    """Exports the dense model and the one that ``pruned`` makes of the weights in the sealed folder ``saved``."""
    from compress.exporters.check import write_checked
    from compress.models.streaming import on_cpu

    assert setup.recipe.export is not None  # asked by the caller
    spec = setup.recipe.export
    vocab = setup.geometry.vocab
    common = {"version": __version__, "weights": setup.weights, "export": spec.model_dump(mode="json")}
    folders = {
        "dense": export_dense(run, setup),
        "pruned": run.stage(
            "export-pruned",
            {**common, "model": seal_hash(saved)},
            lambda f: write_checked(on_cpu(pruned()), setup.tokenizer, f, spec, vocab),
        ),
    }
    facts = {label: json.loads((folder / "export.json").read_text("utf-8")) for label, folder in folders.items()}
    report["export"] = {"onnx": {label: fact for label, fact in facts.items()}}
    report["export"]["onnx"]["size_ratio"] = sum(facts["pruned"]["bytes"].values()) / sum(
        facts["dense"]["bytes"].values()
    )
    report["stages"] = run.stages()
    return folders


def bench(
    run: Run,
    setup: Setup[Any],
    exported: Mapping[str, Path],
    models: Mapping[str, Callable[[], Any]],
    report: dict[str, Any],
) -> None:
    """Latency here and on the recipe's targets; ``models`` make the torch modules of ``exported``."""
    from compress.exporters.stages import on_targets

    if setup.recipe.bench is not None:
        _bench(run, setup, exported, report)
    on_targets(run, setup.recipe.targets, exported, models, report)


def _bench(run: Run, setup: Setup[Any], exported: Mapping[str, Path], report: dict[str, Any]) -> None:
    from compress.exporters.bench.explain import why
    from compress.exporters.bench.local import LOCAL, compare_llm

    spec = setup.recipe.bench
    assert spec is not None  # asked by the caller
    inputs = {
        "version": __version__,
        "bench": spec.model_dump(mode="json"),
        **{label: seal_hash(folder) for label, folder in exported.items()},
    }

    def build(folder: Path) -> None:
        found = compare_llm(exported["dense"], exported["pruned"], spec.model_dump(), setup.geometry.vocab)
        if found["dense"]["bytes"] != found["pruned"]["bytes"]:  # zeros alone change no layer's work
            found["why"] = why(exported["dense"], exported["pruned"], spec.model_dump(), LOCAL)
        (folder / "bench.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    report["bench"] = json.loads((run.stage("bench", inputs, build) / "bench.json").read_text("utf-8"))
    report["stages"] = run.stages()


def release(
    run: Run,
    setup: Setup[Any],
    saved: Mapping[str, Path],
    report: dict[str, Any],
    card: Callable[[dict[str, Any], Path], Path],
) -> dict[str, Any]:
    """The folder to publish: the saved model, its ONNX files, the report, the plots and the card.

    Returns:
        The report as it was sealed, by this run or an earlier one.
    """
    from compress.language.quantised import commands as quantised_commands
    from compress.language.quantised import published
    from compress.report.build import finish, read_report, write_release
    from compress.report.multimodal import published as whole_published

    report["commands"] = {**commands(setup, run.folder, report["command"]), **quantised_commands(run.folder, report)}
    finish(report)

    def build(folder: Path) -> None:
        for path in next(iter(saved.values())).rglob("*"):
            if path.is_file() and path.name != "seal.json":
                link(path, folder / path.relative_to(next(iter(saved.values()))))
        if "export" in report:
            (folder / "onnx").mkdir()
            for name in report["export"]["onnx"]["pruned"]["bytes"]:
                link(run.folder / "export-pruned" / name, folder / "onnx" / name)
        for name, path in (published(run.folder, report) | whole_published(run.folder, report)).items():
            link(path, folder / name)
        write_release(report, folder, card)

    # Clock readings, and where the dense model lay, are part of the report, not of what decides whether it is the same
    # release.
    told = ("stages", "command", "commands", "environment", "sha256", "origin", "rows")
    facts = {k: v for k, v in report.items() if k not in told}
    return read_report(run.stage("release", {"version": __version__, "report": fingerprint(facts)}, build))


def commands(setup: Setup[Any], folder: Path, prune_command: str) -> dict[str, str]:
    """The commands that make each number of the report again."""
    there = shlex.quote(str(folder))
    return {
        "prune": prune_command,
        "eval": f"compress eval {there}/model --like {there}",
        "export": f"compress export {there}/model --out onnx",
        **(
            {"bench": f"compress bench {there}/export-dense {there}/export-pruned"}
            if setup.recipe.export is not None
            else {}
        ),
        "verify": f"compress verify {there}",
        "card": f"compress card {there}",
        **(
            {"unrecovered": f"{prune_command} --set recover=null --out {there}-unrecovered"}
            if getattr(setup.recipe, "recover", None) is not None
            else {}
        ),
    }


def describe_model(report: dict[str, Any], setup: Setup[Any], command: str) -> None:
    """Fills in where a language model came from, the recipe, the command and the machine."""
    from compress.data.special import text_facts
    from compress.run.doctor import environment

    report["model"] = {
        "name": setup.resolved.name,
        "source": setup.resolved.source,
        "base_model": setup.resolved.base_model,
        "license": setup.resolved.license,
        "family": setup.family.name,
        "sha256": setup.weights,
    }
    report["origin"] = dict(setup.resolved.origin)
    report["text"] = text_facts(setup.tokenizer, bool(setup.recipe.dialogues()))
    report["recipe"] = setup.recipe.resolved()
    report["command"] = command
    report["environment"] = environment()
