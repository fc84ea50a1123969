"""Bounds that every section has, and rules over several keys: what is wrong, and every way out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from compress.errors import CompressError, UsageError
from compress.exporters.command import builds
from compress.pipeline import METHODS
from compress.run.machines import find_machine
from compress.schema.recipe import load_recipe, recipe_names
from compress.schema.section import LARGEST, whole_number
from compress.verbs.common import plan
from compress.verbs.gate import parse_shapes

pytestmark = pytest.mark.processes


def numbers(model: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a recipe holds numbers."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        here = (*at, name)
        if isinstance(value, BaseModel):
            yield from numbers(value, here)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield here


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_no_number_of_any_recipe_is_boundless(name: str) -> None:
    recipe = load_recipe(name, METHODS)
    paths = [p for p in numbers(recipe) if p != ("schema_version",)]
    assert len(paths) > 5
    for path, wrong in itertools.product(paths, (".inf", ".nan", str(10**23), "true")):
        key = ".".join(recipe.method if p == "options" else p for p in path)
        with pytest.raises(UsageError) as e:
            load_recipe(name, METHODS, [f"{key}={wrong}"])
        assert f"--set {key}" in e.value.where, (key, wrong)
        assert path[-1] in e.value.where, (key, wrong, e.value.where)


@pytest.mark.parametrize("value", ["0", "1", "-0", "'true'", "y", "'off'", "[true]"])
def test_what_is_true_or_false_is_nothing_else(value: str) -> None:
    with pytest.raises(UsageError, match="it is true or false") as e:
        load_recipe("tyr", METHODS, [f"memory.offload={value}"])
    assert e.value.where.startswith("--set memory.offload")
    for word, meant in (("true", True), ("no", False)):  # YAML's own words for them
        assert load_recipe("tyr", METHODS, [f"memory.offload={word}"]).memory.offload is meant


@pytest.mark.parametrize(
    ("recipe", "changes", "what", "fix"),
    [
        ("pagcp", ["pagcp.rounds=1", "pagcp.between=3"], "rounds is 1 and between is", "pagcp.between=0"),
        ("pagcp", ["pagcp.flops=null", "pagcp.trials={}"], "flops is not", "pagcp.flops"),
        ("tyr", ["tyr.search.survivors=[3, 2, 1, 1, 1]"], "survivors must hold", "survivors, or 6 steps"),
        ("tyr", ["memory.shard=true", "memory.stream=false"], "shard: true", "shard: false"),
        ("tyr", ["recover={steps: 1, tokens: 2}"], "both steps and tokens", "leave one out"),
        ("tyr", ["recover={}"], "neither steps nor tokens", "steps: 100"),
        ("global-mp-demo", ["train.warmup_epochs=99"], "must be fewer than epochs", "warmup_epochs=0"),
        ("global-mp-demo", ["export.formats=[ort]"], "onnx", "add onnx"),
    ],
)
def test_a_rule_over_several_keys_names_both_and_the_ways_out(
    recipe: str, changes: list[str], what: str, fix: str
) -> None:
    with pytest.raises(UsageError) as e:
        load_recipe(recipe, METHODS, changes)
    assert what in e.value.what and fix in e.value.fix


@pytest.mark.parametrize(
    ("recipe", "change", "what", "key"),
    [
        ("tyr", "tyr.search.survivors=[0]", "at least 1|greater than or equal to 1", "tyr.search.survivors"),
        ("tyr", "tyr.search.survivors=[-3]", "greater than or equal to 1", "tyr.search.survivors"),
        ("tyr", "layouts=[per-layer, padded, per-layer]", "per-layer is named twice", "layouts"),
        ("tyr", "targets=[this-machine, this-machine]", "this-machine is named twice", "targets"),
        ("tyr", "evaluation.tasks=[piqa, piqa]", "piqa is named twice", "evaluation.tasks"),
        ("global-mp-demo", "export.formats=[onnx, ort, ort]", "ort is named twice", "export.formats"),
        ("global-mp-demo", "data.tasks=[a, a]", "a is named twice", "data.tasks"),
    ],
)
def test_what_stands_in_a_list_is_asked_too(recipe: str, change: str, what: str, key: str) -> None:
    with pytest.raises(UsageError, match=what) as e:
        load_recipe(recipe, METHODS, [change])
    assert f"key {key}" in e.value.where


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("targets=[nosuch]", "nosuch"), ("targets=[no/such.yaml]", "no/such.yaml"), ("export=null", "bench needs"),
    ],
)  # fmt: skip
def test_plan_asks_of_a_recipe_what_prune_asks(change: str, what: str) -> None:
    with pytest.raises(CompressError, match=what):
        plan("llama-8b", "tyr", [change], "8xh100")


def test_a_shorter_training_has_a_shorter_warm_up_where_only_the_recipe_below_says_one(tmp_path: Any) -> None:
    found = load_recipe("pagcp", METHODS, ["finetune.epochs=1", "pagcp.rounds=1"])
    assert (found.finetune.epochs, found.finetune.warmup_epochs, found.options.between) == (1, 0.5, 0)
    assert load_recipe("pagcp", METHODS, ["finetune.epochs=2"]).finetune.warmup_epochs == 1
    (tmp_path / "mine.yaml").write_text("extends: pagcp\nfinetune: {epochs: 1}\npagcp: {rounds: 1}\n")
    found = load_recipe(str(tmp_path / "mine.yaml"), METHODS)
    assert (found.finetune.warmup_epochs, found.options.between) == (0.5, 0)
    for text in ("finetune: {epochs: 1, warmup_epochs: 3}", "finetune: {warmup_epochs: 40}"):
        (tmp_path / "mine.yaml").write_text(f"extends: pagcp\n{text}\n")
        with pytest.raises(UsageError, match="must be fewer than epochs"):
            load_recipe(str(tmp_path / "mine.yaml"), METHODS)


@pytest.mark.parametrize("machine", ["0xh100", "0x0xh100", "2x0xh100", "８xh100", "9999999xh100", "xh100", "8x", ""])
def test_a_machine_has_gpus_counted_in_plain_digits(machine: str, tmp_path: Any) -> None:
    with pytest.raises(UsageError):
        find_machine(machine, tmp_path)


@pytest.mark.parametrize("text", ["0", "-1", "８", " 8", "1_0", "", "1.5", "x", str(LARGEST + 1), "9" * 5000])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        whole_number(text)
    with pytest.raises(UsageError):
        parse_shapes([f"x=1x{text}"])
    with pytest.raises(UsageError):
        builds(["onnx"], shapes=[f"batch={text}"])


def test_precisions_are_asked_for_even_where_no_format_is() -> None:
    assert whole_number("0008") == 8
    for names, precision, what in (
        ([], "fp7", "there is no precision 'fp7'"),
        (["ort"], "fp7", "there is no precision 'fp7'"),
        ([], "int8", "stays fp32"),
    ):
        with pytest.raises(UsageError) as e:
            builds(names, precision)
        assert what in e.value.what
