"""Compares pruning methods on one LLM: the same calibration windows, removed parameters and held-out text.

    python tools/compare_llm.py --out runs/compare                   # everything; takes hours on two cores
    python tools/compare_llm.py --out runs/compare --table           # prints what has been measured so far
    python tools/compare_llm.py --out runs/compare --ablation        # what each part of Týr brings, at 25 %

Every row is noted in results.jsonl when it is done; the same command again goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from compress.language.evaluate import geometric_mean, perplexity
from compress.language.plan import BlockPlan, Plan
from compress.language.setup import Setup, Windows, fingerprint_of, prepare, read_windows
from compress.models import decoder
from compress.pipeline import METHODS
from compress.recipes.tyr.choice import Choice, Job, even_widths, left_alone, settle
from compress.recipes.tyr.last_pass import final_pass, joined
from compress.recipes.tyr.prune import produce_plan
from compress.recipes.tyr.stages import job_for
from compress.run.folder import SEAL, Journal, Run
from compress.run.progress import say
from compress.schema.recipe import load_recipe
from compress.system import files

LEVELS = (0.125, 0.25, 0.375, 0.5)


def scored_plan(setup: Setup, counts: list[int], score: Callable[[int], torch.Tensor]) -> Plan:
    """Keeps the neurons of highest score in every block; no weight is changed."""
    blocks = []
    for i, count in enumerate(counts):
        heads = tuple(range(setup.geometry.blocks[i].heads))
        kept = score(i).argsort(descending=True)[:count].sort().values
        blocks.append(BlockPlan(heads, tuple(kept.tolist())))
    return Plan(tuple(blocks))


def magnitude(setup: Setup, widths: list[int]) -> Plan:
    def score(i: int) -> torch.Tensor:
        mlp = decoder.blocks(setup.model)[i].mlp
        return (mlp.gate_proj.weight**2).sum(1) + (mlp.up_proj.weight**2).sum(1) + (mlp.down_proj.weight**2).sum(0)

    return scored_plan(setup, widths, score)


def wanda(setup: Setup, windows: Windows, widths: list[int]) -> Plan:
    """Wanda-sp: |W| times the norm of its input, summed over a neuron's column of down_proj; dense activations."""
    model, sums = setup.model, {}
    handles = []
    for i, block in enumerate(decoder.blocks(model)):

        def hook(_: Any, args: tuple[torch.Tensor, ...], i: int = i) -> None:
            sums[i] = sums.get(i, 0) + args[0].double().pow(2).sum((0, 1))

        handles.append(block.mlp.down_proj.register_forward_pre_hook(hook))
    with torch.no_grad():
        for ids in windows.calibration.split(4):
            model.model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()

    def score(i: int) -> torch.Tensor:
        return decoder.blocks(model)[i].mlp.down_proj.weight.abs().sum(0).double() * sums[i].sqrt()

    return scored_plan(setup, widths, score)


def take_over(folder: Path) -> None:
    """Copies from a finished run beside ``folder`` the stages that every sparsity shares."""
    for sibling in sorted(folder.parent.iterdir()):
        # A group of blocks has no seal of its own: what is sealed last tells that it is whole.
        stages = [(["metrics"], "metrics/block-000")]
        if folder.name.startswith("tyr-"):
            stages.append((["supernet-1", "singles-1"], "singles-1"))
        for group, last in stages:
            if not (sibling / last / SEAL).exists() or (folder / group[-1]).exists():
                continue
            with Run.open(folder):
                for stage in group:
                    shutil.copytree(sibling / stage, folder / f".{stage}.copy")
                    files.settle(folder / f".{stage}.copy", folder / stage)


def obs(folder: Path, job: Job, counts: list[int]) -> Plan:
    """OBS with exact refit at given widths, attention left alone; the same last pass as Týr's."""
    choices = [Choice(g.kv_heads, g.group, n) for g, n in zip(job.geometry.blocks, counts, strict=True)]
    take_over(folder)
    with Run.open(folder) as run:
        return Plan.load(final_pass(run, job, choices, []))


def tyr(folder: Path, job: Job) -> Plan:
    """The whole method."""
    take_over(folder)
    with Run.open(folder) as run:
        return Plan.load(produce_plan(run, job))


def knapsack_only(folder: Path, job: Job, searched: Path) -> Plan:
    """The plain knapsack's solution behind a last pass; the run-off's, where that saw all windows."""
    spec = job.options.run_off
    if spec is not None and spec.calibration is None:
        for judged in searched.glob("run-off-*-judged/kl.json"):
            if json.loads(judged.read_text("utf-8"))["solution"] == "knapsack":
                return joined(sorted((searched / judged.parent.name.removesuffix("-judged")).glob("block-*")))
    result = json.loads((searched / "search-1" / "search.json").read_text("utf-8"))
    options = json.loads((searched / "singles-1" / "singles.json").read_text("utf-8"))["options"]
    choices = settle(job, [Choice(**c) for c in result["choices_starts"]["knapsack"]], options)
    take_over(folder)
    with Run.open(folder) as run:
        return Plan.load(final_pass(run, job, choices, []))


def measure(setup: Setup, windows: Windows, plan: Plan | None) -> dict[str, Any]:
    model = setup.model if plan is None else setup.pruned(plan)[0]
    begin = len(windows.begin)
    found = {
        name: perplexity(model, ids, name, begin, windows.own.get(name))["ppl"]
        for name, ids in windows.evaluation.items()
    }
    removed = 0 if plan is None else plan.removed(setup.costs)
    return {"texts": found, "geometric_mean": geometric_mean(list(found.values())), "removed": removed}


def table(rows: list[dict[str, Any]], levels: tuple[float, ...]) -> str:
    """Markdown: geometric mean of the perplexities, and beside it the ratio to dense."""
    dense = next((r["geometric_mean"] for r in rows if r["method"] == "dense"), None)
    if dense is None:
        return "nothing measured yet"
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"))
    found = {(r["method"], r["sparsity"]): r["geometric_mean"] for r in rows}
    lines = [
        f"dense {dense:.2f}; geometric mean over the texts (ratio to dense)",
        "",
        "| method | " + " | ".join(f"{100 * s:g} %" for s in levels) + " |",
        "|---|" + "---|" * len(levels),
    ]
    for method in methods:
        cells = [found.get((method, s)) for s in levels]
        lines.append(
            f"| {method} | " + " | ".join("" if c is None else f"{c:.1f} ({c / dense:.2f}x)" for c in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="tyr-compare")
    parser.add_argument("--levels", type=float, nargs="*", default=list(LEVELS))
    parser.add_argument("--methods", nargs="*", help="only these rows")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--ablation", action="store_true", help="edges left alone at 25 %%, one part changed at a time")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = Journal(given.out / "results.jsonl")
    if given.table:
        print(table(results.rows(), tuple(sorted({r["sparsity"] for r in results.rows()} - {0.0}))))
        return
    torch.set_grad_enabled(False)
    setup = prepare(given.model, load_recipe(given.recipe, METHODS, given.overrides))
    with Run.open(given.out / "text") as run:
        windows = read_windows(setup, run)

    def job(sparsity: float, **changes: Any) -> Job:
        # Only the whole method rescales the logits.
        options = setup.recipe.options.model_copy(update={"rescale": False, **changes})
        recipe = setup.recipe.model_copy(update={"sparsity": sparsity, "options": options})
        made = Setup(setup.resolved, recipe, setup.family, setup.geometry, setup.costs, setup.config, setup.weights)
        made.__dict__["model"] = setup.model  # loaded once for all rows
        found: Job = job_for(made, windows, fingerprint_of(windows))
        return found

    def row(method: str, sparsity: float, make: Callable[[], Plan | None]) -> None:
        if any(r["method"] == method and r["sparsity"] == sparsity for r in results.rows()):
            return
        if given.methods and method not in given.methods and method != "dense":
            return
        began = time.monotonic()
        found = measure(setup, windows, make())
        results.append({"method": method, "sparsity": sparsity, **found, "seconds": round(time.monotonic() - began)})
        say(f"{method} {sparsity:g}: {found['geometric_mean']:.2f} {found['texts']}")

    row("dense", 0.0, lambda: None)
    if given.ablation:
        counts = even_widths(job(0.25), *left_alone(setup.geometry.layers))
        for label, changes in (
            ("as shipped", {}),
            ("without error accumulation", {"accumulation": "none"}),
            ("fitted to the dense weights, not to the dense stream", {"target": "own"}),
            ("every output direction alike", {"metric": "none"}),
            ("every token alike", {"token_weight": "none"}),
            ("damping 0.01", {"damping": 0.01}),
            ("score tyr", {"score": "tyr"}),
        ):
            row(
                f"ablation, {label}",
                0.25,
                lambda label=label, changes=changes: obs(  # type: ignore[misc]
                    given.out / f"ablation-{label.replace(' ', '-').replace(',', '')}", job(0.25, **changes), counts
                ),
            )
    else:
        for s in given.levels:
            row("Týr in full", s, lambda s=s: tyr(given.out / f"tyr-{s:g}", job(s, rescale=True)))  # type: ignore[misc]
        for s in given.levels:
            row(
                "knapsack only",
                s,
                lambda s=s: knapsack_only(  # type: ignore[misc]
                    given.out / f"knapsack-{s:g}", job(s), given.out / f"tyr-{s:g}"
                ),
            )
        for s in given.levels:
            row(
                "uniform OBS + refit, edges left alone",
                s,
                lambda s=s: obs(  # type: ignore[misc]
                    given.out / f"edges-{s:g}", job(s), even_widths(job(s), *left_alone(setup.geometry.layers))
                ),
            )
        for s in given.levels:
            row("Wanda-sp", s, lambda s=s: wanda(setup, windows, even_widths(job(s), 0, 0)))  # type: ignore[misc]
            row("magnitude", s, lambda s=s: magnitude(setup, even_widths(job(s), 0, 0)))  # type: ignore[misc]
        for s in given.levels:
            row(
                "uniform OBS + refit",
                s,
                lambda s=s: obs(  # type: ignore[misc]
                    given.out / f"uniform-{s:g}", job(s), even_widths(job(s), 0, 0)
                ),
            )
    print(table(results.rows(), tuple(given.levels)))


if __name__ == "__main__":
    main()
