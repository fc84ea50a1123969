"""Plans: saved, read, checked, compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from tests.models.families.test_families import ragged_plan
from tests.tiny import tiny


def test_a_plan_survives_saving(tmp_path: Path) -> None:
    plan = ragged_plan(tiny("llama"))
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.blocks == plan.blocks and plan.compare(again) == ""
    readable = json.loads((tmp_path / "plan.json").read_text())["blocks"][1]
    assert readable["kept_heads"] == 5 and readable["kept_neurons"] == 48


def test_compare_names_the_block_and_what_differs() -> None:
    plan = ragged_plan(tiny("llama"))
    blocks = list(plan.blocks)
    blocks[1] = BlockPlan(blocks[1].heads, blocks[1].neurons[1:])
    weights = {**plan.weights, "blocks.0.o": plan.weights["blocks.0.o"] + 1}
    text = plan.compare(dataclasses.replace(plan, blocks=tuple(blocks), weights=weights))
    assert text.splitlines() == ["block 0: o weights", "block 1: neurons 48 -> 47 (+0 -1)"]


@pytest.mark.parametrize(
    ("block", "weights", "message"),
    [
        (BlockPlan((0, 99), (0,)), {}, "below 10"),
        (BlockPlan((1, 0), (0,)), {}, "sorted"),
        (BlockPlan((0, 1, 5), (0,)), {}, "equally many"),
        (BlockPlan((), (0, 1)), {"blocks.0.down": torch.zeros(40, 3)}, "not .40, 2."),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(block: BlockPlan, weights: dict[str, torch.Tensor], message: str) -> None:
    model = tiny("llama")
    whole = BlockPlan(tuple(range(10)), tuple(range(48)))
    with pytest.raises(CompressError, match=message):
        Plan((block, whole, whole, whole), weights).apply(model, family_for(model.config))


def test_no_plan_and_a_broken_plan_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="the plan is missing"):
        Plan.load(tmp_path)
    ragged_plan(tiny("llama")).save(tmp_path)
    (tmp_path / "plan.json").write_text('{"blocks": [')
    with pytest.raises(CompressError, match="is no JSON"):
        Plan.load(tmp_path)
