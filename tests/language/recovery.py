"""What the tests of recovery share: a tiny model, a ragged plan of it, and its training by any number of processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.language.plan import Plan
from compress.language.recover import recover
from compress.language.recover_student import merged, student
from compress.language.setup import Setup, prepare
from compress.pipeline import METHODS
from compress.run.folder import Run
from compress.schema.recipe import load_recipe
from tests.models.families.test_families import ragged_plan
from tests.tiny import tiny, tiny_job, tokens

LORA = {"method": "lora", "rank": 3, "steps": 4, "batch": 5, "learning_rate": 0.01}
FULL = {"method": "full", "steps": 4, "batch": 5, "hidden": 0.5, "learning_rate": 0.002, "weight_decay": 0.1}


@dataclass(frozen=True)
class Recovered:
    plan: Plan
    facts: dict[str, Any]
    bytes: bytes


def setup_of(job: Path, model_type: str = "llama", stream: bool = False, **spec: Any) -> Setup:
    """A tiny model's set-up with this `recover:` section; ``stream``: as if the model did not fit."""
    model, recipe = (job / "model", job / "tiny.yaml") if job.exists() else tiny_job(job, model_type, layers=4)
    words = [f"recover={json.dumps(spec)}", f"memory.stream={stream}"]
    return prepare(str(model), load_recipe(str(recipe), METHODS, words))


def train(job: Path, out: Path, spec: dict[str, Any], stream: bool = False, begin: int = 0) -> None:
    """Recovers the ragged plan on 8 random windows into the run folder ``out``; every process of a group calls it."""
    setup = setup_of(job, stream=stream, **spec)
    with Run.open(out) as run:
        plan = run.stage("plan", {}, lambda folder: ragged_plan(tiny("llama")).save(folder))
        recover(run, setup, tokens(8, 24, seed=3), plan, begin)


def read(out: Path) -> Recovered:
    folder = out / "recover"
    return Recovered(
        Plan.load(folder),
        json.loads((folder / "recover.json").read_text()),
        (folder / "plan.safetensors").read_bytes(),
    )


def distance(a: Plan, b: Plan, start: dict[str, torch.Tensor]) -> float:
    """How far two plans' weights are from each other, relative to how far training has moved them from ``start``."""
    assert a.weights.keys() == b.weights.keys() >= start.keys()
    apart = sum(float((a.weights[k] - b.weights[k]).double().square().sum()) for k in start)
    moved = sum(float((a.weights[k] - start[k]).double().square().sum()) for k in start)
    assert moved > 0
    return float((apart / moved) ** 0.5)


def start_of(job: Path, settings: dict[str, Any] = FULL) -> dict[str, torch.Tensor]:
    """The weights before training, under the names a plan gives them."""
    setup = setup_of(job, **settings)
    model = student(setup, ragged_plan(setup.model))
    return {k: w.clone() for k, w in merged(model, setup.recipe.recover, setup.family).items()}  # type: ignore[arg-type]
