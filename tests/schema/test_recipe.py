"""Recipes: everything wrong is said with file, line, key and the nearest valid name, before any weight is read."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml

from compress.errors import UsageError
from compress.pipeline import METHODS
from compress.schema.recipe import load_recipe, lock_text, recipe_names

GOOD = """\
method: tyr
sparsity: 0.3
calibration:
  sources:
    - {embedded: python-docs}
  windows: 4
  length: 32
evaluation:
  texts:
    - name: docs
      source: {embedded: python-docs}
  windows: 2
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def refused(name: str, *overrides: str) -> UsageError:
    with pytest.raises(UsageError) as error:
        load_recipe(name, METHODS, overrides)
    return error.value


@pytest.mark.parametrize("name", sorted(recipe_names()))
def test_every_shipped_recipe_is_valid(name: str) -> None:
    method = load_recipe(name, METHODS).method
    assert name == method or name.startswith(f"{method}-")


@pytest.mark.parametrize("method", METHODS)
def test_every_task_of_a_method_names_a_module_that_runs_it(method: str) -> None:
    for task in METHODS[method].values():
        module = importlib.import_module(task.pipeline)
        assert all(callable(getattr(module, name)) for name in ("prepare", "stages", "card")), task.pipeline


def test_a_mistyped_key_gives_file_line_key_and_the_nearest_name(tmp_path: Path) -> None:
    error = refused(write(tmp_path, GOOD.replace("  windows: 4", "  windos: 4")))
    assert "'windos'" in error.what
    assert "mine.yaml, line 6, key calibration.windos" in error.where
    assert "did you mean 'windows'?" in error.fix


def test_a_mistyped_key_of_the_method_is_named_too(tmp_path: Path) -> None:
    error = refused(write(tmp_path, GOOD + "tyr:\n  search:\n    ofspring: 3\n"))
    assert "line 15, key tyr.search.ofspring" in error.where
    assert "'offspring'" in error.fix


@pytest.mark.parametrize("value", ["1.01", "0", "-0.1", "1"])
def test_a_budget_out_of_range_is_refused_with_its_line(tmp_path: Path, value: str) -> None:
    error = refused(write(tmp_path, GOOD.replace("0.3", value)))
    assert "sparsity" in error.what and "line 2" in error.where and "0.5" in error.fix


def test_a_wrong_type_is_refused(tmp_path: Path) -> None:
    assert "'many'" in refused(write(tmp_path, GOOD.replace("windows: 4", "windows: many"))).what


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert "'sparsity' is missing" in refused(write(tmp_path, GOOD.replace("sparsity: 0.3\n", ""))).what


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    error = refused(write(tmp_path, GOOD + "sparsity: 0.5\n"))
    assert "twice" in error.what and "line 13" in error.where


def test_broken_yaml_gives_its_line(tmp_path: Path) -> None:
    assert "line" in refused(write(tmp_path, "method: [tyr\nsparsity: 0.3")).where


def test_a_source_must_be_exactly_one(tmp_path: Path) -> None:
    error = refused(
        write(tmp_path, GOOD.replace("{embedded: python-docs}\n  windows", "{hub: a/b, files: [x]}\n  windows"))
    )
    assert "exactly one" in error.what


def test_set_lays_over_the_file_and_its_faults_name_it(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, METHODS, ["sparsity=0.4", "tyr.search.steps=[0.5, 1.0]", "tyr.search.survivors=[2]"])
    assert recipe.sparsity == 0.4 and recipe.options.search.survivors == [2]
    assert "--set tyr.levls=3" in refused(path, "tyr.levls=3").where
    assert "KEY=VALUE" in refused(path, "sparsity").what


def test_extends_lays_key_by_key_and_faults_name_the_right_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "base.yaml")
    recipe = load_recipe(write(tmp_path, "extends: base.yaml\ncalibration: {windows: 9}\n"), METHODS)
    assert recipe.calibration.windows == 9 and recipe.calibration.length == 32
    error = refused(write(tmp_path, "extends: base.yaml\n\nseeed: 1\n"))
    assert "mine.yaml, line 3" in error.where
    write(tmp_path, GOOD.replace("sparsity: 0.3", "sparsity: 3"), "base.yaml")
    assert "base.yaml, line 2" in refused(write(tmp_path, "extends: base.yaml\nseed: 1\n")).where
    assert "extends itself" in refused(write(tmp_path, "extends: mine.yaml\n")).what


def test_an_unknown_recipe_or_method_is_named(tmp_path: Path) -> None:
    assert "did you mean 'tyr-demo'" in refused("tyr-dem").fix
    assert "'tir'" in refused(write(tmp_path, GOOD.replace("tyr", "tir"))).what


def test_the_lock_file_gives_the_same_recipe_again(tmp_path: Path) -> None:
    recipe = load_recipe("tyr-demo", METHODS, ["sparsity=0.2"])
    lock = yaml.safe_load(lock_text(recipe, {"versions": {}}))
    assert load_recipe(write(tmp_path, yaml.safe_dump(lock["recipe"])), METHODS) == recipe
