"""What recovery brings to one plan: perplexity on held-out text, pruned, after low-rank updates, and after all weights.

    python tools/compare_recovery.py --plan runs/compare/tyr-0.25/plan --out runs/recovery
    python tools/compare_recovery.py --plan ... --out runs/recovery --set recover.steps=100 --methods lora

Every row is noted in results.jsonl when it is done; the same command again goes on behind the last checkpoint.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from compress.language.evaluate import geometric_mean
from compress.language.plan import Plan
from compress.language.recover import recover, training_windows
from compress.language.setup import Setup, Windows, prepare, read_windows
from compress.language.stages import perplexities
from compress.pipeline import METHODS
from compress.run.folder import Journal, Run
from compress.run.progress import say
from compress.schema.recipe import load_recipe


def measure(setup: Setup, windows: Windows, plan: Plan | None, label: str) -> dict[str, Any]:
    model = setup.model if plan is None else setup.pruned(plan)[0]
    found = {n: float(p["ppl"]) for n, p in perplexities(model, windows, label).items()}
    return {"method": label, "texts": found, "geometric_mean": geometric_mean(list(found.values()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="a folder with plan.json and plan.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--recipe", default="tyr-compare")
    parser.add_argument("--methods", nargs="*", default=["lora", "full"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = Journal(given.out / "results.jsonl")
    defaults = ["recover.steps=40", "recover.batch=4", "recover.windows=160", "recover.checkpoint_every=5"]

    def setup_for(method: str) -> Setup:
        words = [*defaults, *given.overrides, f"recover.method={method}"]
        return prepare(given.model, load_recipe(given.recipe, METHODS, words))

    def take_over(folder: Path) -> None:
        for name in ("plan.json", "plan.safetensors"):
            shutil.copy(given.plan / name, folder)

    def row(found: dict[str, Any], **more: Any) -> None:
        results.append({**found, **more})
        say(f"{found['method']}: {found['geometric_mean']:.2f} {found['texts']}")

    done = {r["method"] for r in results.rows()}
    setup = setup_for(given.methods[0])
    with Run.open(given.out / "text") as run:
        windows = read_windows(setup, run)
        trained_on = training_windows(run, setup, windows)
    for label, plan in (("dense", None), ("pruned", Plan.load(given.plan))):
        if label not in done:
            row(measure(setup, windows, plan, label))
    for method in given.methods:
        if method in done:
            continue
        made = setup_for(method)
        made.__dict__["model"] = setup.model  # loaded once for all rows
        began = time.monotonic()
        with Run.open(given.out / method) as run:
            start = run.stage("plan", {}, take_over)
            folder = recover(run, made, trained_on, start, len(windows.begin))
        seconds = round(time.monotonic() - began)
        assert made.recipe.recover is not None  # set above
        plan = Plan.load(folder)
        row(
            measure(made, windows, plan, method),
            seconds=seconds,
            **plan.meta["recovered"],
            recover=made.recipe.recover.model_dump(mode="json", exclude_none=True),
        )


if __name__ == "__main__":
    main()
