"""A torch module in memory through the Python API: pruned from its own weights, loaded elsewhere, refused in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compress
from compress.models.zoo import build
from tests.command import Job
from tests.command import compress as typed
from tests.networks import write_class_folders

CODE = """\
from torch import nn
import torch

class Net(nn.Module):
    def __init__(self, classes, width=16, scale=1.0):
        super().__init__()
        self.scale = scale
        self.one, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.two, self.drop = nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        y = torch.relu(self.norm(self.one(x)))
        return self.scale * self.head(self.drop(torch.relu(self.two(y))).mean((2, 3)))

def narrow(classes):
    return Net(classes, width=8)

def local():
    class Inner(Net):
        pass
    return Inner(3)
"""

COMMON = """\
data: {folder: FOLDER/data, size: 12}
train: {epochs: 0}
finetune: {epochs: 1, batch: 16, lr: 0.02, warmup_epochs: 0}
export: {samples: 4}
bench: null
"""

RECIPES = {
    "mp": "method: global-mp\ntask: network\ndescription: small\nsparsity: 0.5\n" + COMMON,
    "pagcp": "method: pagcp\ntask: network\ndescription: small\n"
    + COMMON
    + "pagcp: {flops: 0.4, round_to: 4, batch: 16}\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, recipes and the file of a network; tests must not change them."""
    folder = tmp_path_factory.mktemp("live")
    write_class_folders(folder / "data", 90, 40)
    (folder / "live_net.py").write_text(CODE)
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="module")
def net(place: Path) -> Any:
    """The network's file, imported as a user's own module is."""
    sys.path.insert(0, str(place))
    import importlib

    yield importlib.import_module("live_net")
    sys.path.remove(str(place))
    del sys.modules["live_net"]


def trained_somewhere(net: ModuleType, **arguments: Any) -> nn.Module:
    """A network with weights that no seed of ours draws, left in training mode with its norm frozen."""
    torch.manual_seed(77)
    model: nn.Module = net.Net(3, **arguments).train()
    with torch.no_grad():
        model.norm.running_mean.add_(0.1)
    model.norm.eval()
    return model


@pytest.fixture(scope="module")
def finished(place: Path, net: ModuleType) -> tuple[nn.Module, dict[str, compress.Result]]:
    """A network in memory, pruned by both methods; tests must not change it."""
    model = trained_somewhere(net)
    return model, {name: compress.prune(model, place / f"{name}.yaml", place / name) for name in RECIPES}


def test_the_dense_network_is_the_one_in_memory_which_is_left_as_it_was(finished: Any) -> None:
    model, results = finished
    for result in results.values():
        dense = load_file(result.folder / "dense" / "model.safetensors")
        assert {n: t.tolist() for n, t in dense.items()} == {n: t.tolist() for n, t in model.state_dict().items()}
    assert model.training and model.drop.training and not model.norm.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_masks_are_those_of_a_sort_of_the_weights_in_memory(finished: Any) -> None:
    model, results = finished
    weights = {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}
    every = torch.cat([w.abs().flatten() for w in weights.values()]).sort().values
    cut = load_file(results["mp"].folder / "cut" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(cut[name] == 0, weight.abs() < every[round(0.5 * len(every))])


def test_the_result_holds_the_report_the_folders_and_the_pruned_network(finished: Any, net: ModuleType) -> None:
    _, results = finished
    for name, result in results.items():
        assert type(result.model).__qualname__ == "Net" and not result.model.training
        want = load_file(result.saved / "model.safetensors")
        assert all(torch.equal(t, want[n]) for n, t in result.model.state_dict().items())
        assert (result.release / "README.md").is_file() and result.report["quality"]["tasks"], name
    assert results["pagcp"].model.one.out_channels < 16 == results["mp"].model.one.out_channels


def test_a_process_elsewhere_loads_and_verifies_the_release_by_the_reports_command(
    finished: Any, place: Path, tmp_path: Path
) -> None:
    _, results = finished
    for result in results.values():
        words = result.report["commands"]["verify"].split()
        assert words[-2:] == ["--network", f"{place / 'live_net.py'}:Net"]
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, env=os.environ
        )
        assert done.returncode == 0 and " 0 do not hold" in done.stdout, done.stderr
        # The command of the report makes the same release again.
        again = typed(*result.report["command"].split()[1:], "--json")
        assert json.loads(again.out)["sha256"] == result.report["sha256"], again.err


def test_a_network_may_be_named_by_a_function_by_arguments_or_as_one_of_the_zoo(
    place: Path, net: ModuleType, tmp_path: Path
) -> None:
    words: Any = {"until": "plan", "finetune": None}
    model = trained_somewhere(net, width=8)
    narrow = f"{place}/live_net.py:narrow"
    by_function = compress.prune(model, place / "mp.yaml", tmp_path / "a", network=narrow, **words)
    by_arguments = compress.prune(model, place / "mp.yaml", tmp_path / "b", arguments={"width": 8}, **words)
    assert by_function.report["layers"] == by_arguments.report["layers"]
    zoo = build("resnet", {"depth": 8, "width": 4, "classes": 3}, seed=5)
    small = {"depth": 8, "width": 4, "classes": 3}
    found = compress.prune(zoo, place / "mp.yaml", tmp_path / "c", network="resnet8-emoji", arguments=small, **words)
    dense = load_file(found.folder / "dense" / "model.safetensors")
    assert all(torch.equal(dense[n], t) for n, t in zoo.state_dict().items())


def test_epochs_of_the_recipe_train_further_from_the_weights_in_memory(
    place: Path, net: ModuleType, tmp_path: Path
) -> None:
    model, words = trained_somewhere(net), {"until": "plan", "settings": {"train.epochs": 1, "train.lr": 1e-9}}
    result = compress.prune(model, place / "mp.yaml", tmp_path / "run", **words)
    dense = load_file(result.folder / "dense" / "model.safetensors")
    assert torch.allclose(dense["two.weight"], model.two.weight, atol=1e-5)
    assert len(json.loads((result.folder / "dense" / "training.json").read_text())) == 1
    with torch.no_grad():
        model.two.weight[0, 0, 0, 0] += 1
    with pytest.raises(compress.UsageError, match=r"two.weight differs"):
        compress.prune(model, place / "mp.yaml", tmp_path / "run", **words)


def test_a_network_in_memory_is_planned_evaluated_and_exported(
    finished: Any, place: Path, net: ModuleType, tmp_path: Path
) -> None:
    model, results = finished
    plan = compress.plan(model, place / "mp.yaml", arguments={"classes": 3})
    assert plan["prunable_weights"] == 27 * 16 + 144 * 16 + 48 == 2 * plan["prune"]
    run = results["mp"].folder
    rows = {r["metric"]: r for r in results["mp"].report["quality"]["tasks"]}
    for which, label in ((model, "dense"), (results["mp"].model, "pruned")):
        (found,) = compress.evaluate(which, like=run)["tasks"].values()
        assert found["accuracy"] == rows["accuracy"][label]
        assert found["loss"] == pytest.approx(rows["loss"][label], rel=1e-5)
    facts = compress.export(results["pagcp"].model, tmp_path / "onnx", like=run)
    assert facts["largest_difference"] < 1e-3 and (tmp_path / "onnx" / "model.onnx").is_file()
    assert model.training and not model.norm.training


def broken(net: ModuleType, **changes: Any) -> nn.Module:
    model = trained_somewhere(net)
    for name, value in changes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("make", "words", "more"),
    [
        (lambda net: nn.Sequential(nn.Conv2d(3, 8, 3)), "Sequential is one of torch", {}),
        (lambda net: net.local(), "stands in a function", {}),
        (lambda net: type("Net", (net.Net,), {"__module__": "__main__"})(3), "running script or notebook", {}),
        (lambda net: type("Gone", (net.Net,), {"__module__": "live_net"})(3), "has no function 'Gone'", {}),
        (lambda net: net.Net(3, width=8), r"\(8, 3, 3, 3\) in memory, \(16, 3, 3, 3\) as built", {}),
        (lambda net: net.Net(3).bfloat16(), "bfloat16 in memory, float32", {}),
        (lambda net: broken(net, drop=nn.Dropout(0.5)), r"Dropout\(p=0.5", {}),
        (lambda net: broken(net, drop=nn.Sequential(nn.ReLU())), "drop.0 is in memory alone", {}),
        (lambda net: net.Net(3, scale=2.0), "outputs differ", {}),
        (lambda net: net.Net(3), "weights are named beside", {"weights": "a.safetensors"}),
        (lambda net: net.Net(3), "no such file", {"network": "gone.py:net"}),
        (lambda net: net.Net(3), "unknown network", {"network": "resnett"}),
        (lambda net: net.Net(3), "cannot be called so", {"arguments": {"wide": 3}}),
        (lambda net: 5, "a int is no model", {}),
    ],
)
def test_what_cannot_be_built_again_is_one_error_and_no_run(
    make: Any, words: str, more: dict[str, Any], place: Path, net: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(compress.UsageError, match=words) as e:
        compress.prune(make(net), place / "mp.yaml", tmp_path / "run", **more)
    assert e.value.where and e.value.fix and not list(tmp_path.iterdir())


def test_a_recipe_for_language_models_and_a_verb_without_data_are_refused(
    place: Path, net: ModuleType, job: Job, tmp_path: Path
) -> None:
    model = net.Net(3)
    with pytest.raises(compress.UsageError, match="for language models"):
        compress.prune(model, job.recipe, tmp_path / "run")
    for call in (lambda: compress.evaluate(model), lambda: compress.export(model, tmp_path / "out")):
        with pytest.raises(compress.UsageError, match="comes with no data"):
            call()
    with pytest.raises(compress.UsageError, match="is no folder"):
        compress.load(model)
    with pytest.raises(compress.UsageError, match="a name is given"):
        compress.prune("resnet8-emoji", place / "mp.yaml", tmp_path / "run", network="x.py:y")
    assert not list(tmp_path.iterdir())
