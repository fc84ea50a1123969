"""From a trained run to every format: by its recipe, and by `compress export`, where its data judges int8."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.command import compress
from tests.compress.test_network import RECIPE
from tests.networks import write_class_folders

pytestmark = pytest.mark.processes

SET = ("--set", "bench=null", "--set", "arguments={depth: 8, width: 4, classes: 3}")
FORMATS = ["onnx", "ort", *(f for f in ("openvino", "tensorrt_rtx") if find_spec(f))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run whose recipe names formats; tests must not change it."""
    folder = tmp_path_factory.mktemp("formats")
    write_class_folders(folder / "data", 90, 40)
    recipe = RECIPE.replace("FOLDER", str(folder)).replace("{samples: 5}", f"{{samples: 5, formats: {FORMATS}}}")
    (folder / "mine.yaml").write_text(recipe)
    ran = compress("prune", "resnet8-emoji", "-r", folder / "mine.yaml", "--out", folder / "run", *SET)
    assert ran.code == 0, ran.err
    for form in FORMATS:
        assert f"\n{form:8} " in "\n" + ran.out
    return folder / "run"


def test_a_recipe_names_formats_and_finds_them_checked_in_the_release(run: Path) -> None:
    report = json.loads((run / "release" / "report.json").read_text())
    for form in FORMATS[1:]:
        facts = report["export"][form]["pruned"]
        for name, size in facts["bytes"].items():
            assert (run / "release" / form / name).stat().st_size == size
        assert "skipped" in facts or facts["largest_difference"] < 1e-4
    card = (run / "release" / "README.md").read_text()
    assert "ORT against ONNX on" in card
    assert "tensorrt_rtx" not in FORMATS or "TENSORRT\\_RTX: built, and not run where it was built" in card


def test_int8_is_calibrated_and_judged_on_the_data_of_the_run(run: Path, tmp_path: Path) -> None:
    words = ("--format", "ort", "--format", "onnx", "--precision", "int8", "--shape", "batch=8", "--like", run)
    ran = compress("export", run, *words, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    facts = json.loads((tmp_path / "out" / "ort-int8" / "ort.json").read_text())
    before, after = facts["measures"]["before"], facts["measures"]["after"]
    told = json.loads((run / "release" / "report.json").read_text())["quality"]["tasks"]
    accuracy = next(t for t in told if t["metric"] == "accuracy")
    (name,) = (k for k in before if k.startswith("accuracy"))
    # What ONNX gets right is what the run's own evaluation counted; int8 loses a few pictures of 120 at most.
    assert before[name] == pytest.approx(accuracy["pruned"], abs=1e-6)
    assert abs(after[name] - before[name]) < 0.05 and after != before
    assert f"{name}: {before[name]:.4f} -> {after[name]:.4f}" in ran.out
