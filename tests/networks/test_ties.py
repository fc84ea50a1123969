"""Weights that are one stay one, from the training to the exported file, and count once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.errors import CompressError
from compress.exporters.onnx_module import FILE, export_module
from compress.models.zoo import load_weights
from compress.networks.reload import reload
from compress.networks.ties import aliases, tied
from compress.recipes.pagcp.groups import find_groups
from tests import tied_nets as nets
from tests.command import compress
from tests.networks import write_class_folders

pytestmark = pytest.mark.processes

RECIPE = """\
method: METHOD
task: network
description: everything as small as it can be
MORE
arguments: {}
data: {folder: FOLDER/data, size: 12}
train: {epochs: 2, batch: 16, lr: 0.05, warmup_epochs: 0}
finetune: {epochs: 1, batch: 16, lr: 0.02, warmup_epochs: 0}
export: {samples: 4}
bench: null
"""
MORE = {
    "global-mp": "sparsity: 0.8",
    "pagcp": "pagcp: {flops: 0.1, rounds: 2, between: 1, round_to: 4, batch: 16}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ties")
    write_class_folders(folder / "data", 90, 40)
    (folder / "net.py").write_text(Path(nets.__file__).read_text())
    for method, more in MORE.items():
        text = RECIPE.replace("METHOD", method).replace("MORE", more).replace("FOLDER", str(folder))
        (folder / f"{method}.yaml").write_text(text)
    return folder


def prune(place: Path, network: str, method: str, out: Path, *words: str) -> Any:
    ran = compress(
        "prune", f"{place / 'net.py'}:{network}", "--recipe", place / f"{method}.yaml", "--out", out, "--json", *words
    )
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def floats(path: Path) -> int:
    """Numbers that the initialisers of an ONNX file hold."""
    held = onnx.load(path).graph.initializer
    return sum(torch.Size(t.dims).numel() for t in held if t.data_type == onnx.TensorProto.FLOAT)


def test_what_is_tied_is_found_in_every_way_of_tying() -> None:
    for how in ("parameter", "memory", "transpose"):
        assert tied(nets.Twins(how=how)) == {"a.weight": ["b.weight"], "b.weight": ["a.weight"]}, how
    assert tied(nets.Twins(how="bias")) == {"a.bias": ["b.bias"], "b.bias": ["a.bias"]}
    assert tied(nets.Twins(how="bare")) == {"own": ["a.weight"], "a.weight": ["own"]}
    assert tied(nets.Words()) == {"words.weight": ["out.weight"], "out.weight": ["words.weight"]}
    # One module under two names is one place; two that only look alike are two.
    assert tied(nets.Twins(how="module")) == tied(nets.Twins(how="none")) == {}
    assert set(aliases(nets.Twins(how="memory"))) == {"a.weight", "b.weight"}
    assert aliases(nets.Twins(how="parameter")) == {}


def test_parts_of_one_memory_are_tied_only_where_they_overlap() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    whole = torch.randn(12, 4)
    for i, layer in enumerate(model):
        layer.weight.data = whole[3 * i : 3 * i + 4]
    assert tied(model) == {"0.weight": ["1.weight"], "1.weight": ["0.weight", "2.weight"], "2.weight": ["1.weight"]}
    for i, layer in enumerate(model):
        layer.weight.data = whole[4 * i : 4 * i + 4]
    assert tied(model) == {}
    with torch.device("meta"):
        assert tied(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == {}


@pytest.mark.parametrize("how", ["parameter", "memory", "transpose", "bias", "bare"])
def test_tied_layers_are_in_no_channel_group_and_the_reason_says_with_what(how: str) -> None:
    found = find_groups(nets.Twins(how=how), torch.randn(2, 3, 8, 8), 4)
    assert [g.name for g in found.groups] == (["b", "c"] if how == "bare" else ["c"])
    left = {v.layer: v.reason for v in found.left}
    other = "own" if how == "bare" else f"b.{'bias' if how == 'bias' else 'weight'}"
    assert other in left["a"] and "a is tied to it" in left["stem"]


def test_a_module_that_is_used_twice_is_cut_as_one() -> None:
    found = find_groups(nets.Twins(how="module"), torch.randn(2, 3, 8, 8), 4)
    assert {m.layer for m in found.groups[0].members} == {"stem", "a", "c"}


def test_pagcp_keeps_ties_through_cut_training_and_reload(place: Path, tmp_path: Path) -> None:
    report = prune(place, "twins", "pagcp", tmp_path / "run", "--until", "export")
    left = {v["layer"]: v["reason"] for v in report["left"]}
    assert {"stem", "a", "b"} <= set(left) and left["b"] == "its weight is also a.weight"
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(saved["a.weight"], saved["b.weight"]) and saved["c.weight"].shape[0] < 24
    model = reload(tmp_path / "run" / "model", f"{place / 'net.py'}:twins").model
    assert model.get_submodule("a").weight is model.get_submodule("b").weight
    counts = report["size"]["parameters"]
    assert counts["pruned"] == sum(p.numel() for p in model.parameters()) < counts["dense"]
    for label in ("dense", "pruned"):
        assert floats(tmp_path / "run" / f"export-{label}" / FILE) == counts[label], "an exported weight is held once"


def test_global_mp_counts_and_prunes_a_shared_weight_once(place: Path, tmp_path: Path) -> None:
    report = prune(place, "twins", "global-mp", tmp_path / "run")
    size, sizes = report["size"], {"stem": 432, "a": 2304, "c": 3456, "head": 72}
    assert size["prunable_weights"] == sum(sizes.values()) and size["pruned_weights"] == round(
        0.8 * sum(sizes.values())
    )
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(saved["a.weight"], saved["b.weight"])
    assert sum(int((saved[f"{name}.weight"] == 0).sum()) for name in sizes) == size["pruned_weights"]
    assert report["left_out"]["weights"] == 0 and size["pruned_share_of_all"] == size["pruned_share"]
    rows = {row["name"]: row for row in report["layers"]}
    assert rows["b.weight"]["tied_to"] == "a.weight" and rows["b.weight"]["flops"] == rows["a.weight"]["flops"]
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "`b.weight` (one with `a.weight`)" in card and "were left out" not in card


def test_an_embedding_tied_to_a_linear_layer_is_pruned_with_it_and_once(place: Path, tmp_path: Path) -> None:
    report = prune(place, "words", "global-mp", tmp_path / "run", "--until", "model")
    assert report["size"]["prunable_weights"] == 8 * 8 * 3 + 16 * 8 + 16 * 3 and not report["left_out"]["parameters"]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(saved["words.weight"], saved["out.weight"]) and (saved["out.weight"] == 0).any()


def test_an_export_holds_a_tied_weight_once(tmp_path: Path) -> None:
    model = nets.Twins().eval()
    export_module(model, torch.randn(2, 3, 12, 12), ["class"], tmp_path)
    assert floats(tmp_path / FILE) == sum(p.numel() for p in model.parameters())


def test_a_file_that_says_two_things_of_one_weight_is_refused(tmp_path: Path) -> None:
    model = nets.Twins()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "good.safetensors")
    load_weights(model, tmp_path / "good.safetensors")
    save_file(state | {"b.weight": state["b.weight"] + 1}, tmp_path / "two.safetensors")
    for how in ("parameter", "memory"):
        with pytest.raises(CompressError, match=r"ties (a|b).weight to another parameter"):
            load_weights(nets.Twins(how=how), tmp_path / "two.safetensors")
    load_weights(nets.Twins(how="none"), tmp_path / "two.safetensors")
