"""PAGCP as a user calls it: the saved network is smaller, loads, evaluates, exports; what cannot be is one error."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.exporters.onnx_module import write_checked_module
from compress.networks.flops import count_flops
from compress.networks.reload import reload
from compress.networks.surgery import cut
from compress.recipes.pagcp.card import body
from compress.recipes.pagcp.groups import find_groups
from compress.recipes.pagcp.plan import Plan
from compress.recipes.pagcp.stages import GROUPS
from tests import channel_nets as nets
from tests import ranks
from tests.command import compress, one_error
from tests.networks import write_class_folders

RECIPE = """\
extends: pagcp
description: everything as small as it can be
arguments: {}
data: {folder: FOLDER/data, size: 12}
train: {epochs: 4, batch: 16, lr: 0.05, warmup_epochs: 0}
finetune: {epochs: 1, batch: 16, lr: 0.02, warmup_epochs: 0}
export: {samples: 4}
bench: null
pagcp: {flops: 0.4, rounds: 2, between: 1, round_to: 4, batch: 16}
"""

MINE = """\
import torch
from torch import nn
from compress.models.zoo.resnet32 import resnet

class Headed(nn.Module):
    def __init__(self, classes, form):
        super().__init__()
        self.trunk, self.form = resnet(8, classes, 16), form

    def forward(self, x):
        y = self.trunk(x)
        return {"class": y} if self.form == "dict" else [y] if self.form == "list" else y

def small(classes=3):
    return resnet(8, classes, 16, shortcut="conv")

def listed(classes=3):
    return Headed(classes, "list")

def named(classes=3):
    return Headed(classes, "dict")

class Detached(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Conv2d(3, classes, 3)

    def forward(self, x):
        return self.layer(x).mean((2, 3)).detach() + 0 * self.layer.bias.detach()

def detached(classes=3):
    return Detached(classes)

class Flat(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3 * 144, 16), nn.BatchNorm1d(16), nn.Linear(16, classes)

    def forward(self, x):
        return self.b(torch.relu(self.norm(self.a(x.flatten(1)))))

def flat(classes=3):
    return Flat(classes)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a recipe and networks; tests must not change them."""
    folder = tmp_path_factory.mktemp("channels")
    write_class_folders(folder / "data", 90, 40)
    (folder / "mine.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    (folder / "mine.py").write_text(MINE)
    return folder


def prune(place: Path, out: Path, *words: object, network: str = "small") -> Any:
    return compress("prune", f"{place}/mine.py:{network}", "-r", place / "mine.yaml", "--out", out, *words)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any]]:
    """A whole run; tests must not change it."""
    ran = prune(place, place / "run")
    assert ran.code == 0, ran.err
    assert "fewer)" in ran.out and "measurements" in ran.out
    return place / "run", json.loads((place / "run" / "release" / "report.json").read_text())


def named(place: Path, network: str = "small") -> str:
    return f"{place}/mine.py:{network}"


def test_the_saved_network_is_as_small_as_was_asked_for(finished: tuple[Path, dict[str, Any]], place: Path) -> None:
    run, report = finished
    model = reload(run / "model", named(place)).model
    flops = sum(f.dense for f in count_flops(model, torch.zeros(1, 3, 12, 12)))
    assert flops == report["size"]["flops"]["pruned"]
    assert 0.4 <= report["size"]["flops_removed"] < 0.55
    assert sum(p.numel() for p in model.parameters()) == report["size"]["parameters"]["pruned"]
    held = sum(t.numel() for n, t in load_file(run / "model" / "model.safetensors").items() if "running" not in n)
    assert held - 9 == report["size"]["parameters"]["pruned"]  # nine norms count their batches
    # Every group keeps a multiple of what widths are rounded to.
    for row in report["layers"]:
        assert row["kept"] == row["channels"] or row["kept"] % 4 == 0


def test_all_rounds_plans_together_cut_the_dense_network_to_the_saved_shapes(
    finished: tuple[Path, dict[str, Any]], place: Path
) -> None:
    run, report = finished
    dense, pruned = reload(run / "dense", named(place)).model, reload(run / "model", named(place)).model
    smaller = Plan.load(run / "plan").apply(dense)
    assert {n: p.shape for n, p in smaller.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}
    assert len(report["rounds"]) == 2 and report["rounds"][0]["removed"] < report["rounds"][1]["removed"]
    assert (run / "round-1" / "plan" / GROUPS).is_file()


def test_every_verb_works_on_the_smaller_network(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    run, report = finished
    own = ("--network", named(place))
    ran = compress("eval", run, "--like", run, *own, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["tasks"]["class"]
    row = next(r for r in report["quality"]["tasks"] if r["metric"] == "accuracy")
    assert found["accuracy"] == row["pruned"]
    for label, folder in (("dense", run / "dense"), ("pruned", run)):
        ran = compress("export", folder, "--out", tmp_path / label, *own)
        assert ran.code == 0, ran.err
    sizes = [(tmp_path / label / "model.onnx").stat().st_size for label in ("dense", "pruned")]
    assert sizes[1] < sizes[0]
    ran = compress("verify", run, *own)
    assert ran.code == 0, ran.err
    ran = compress("card", run, "--out", tmp_path / "card")
    assert ran.code == 0, ran.err
    text = (tmp_path / "card" / "README.md").read_text()
    assert "What the oracle said" in text and "passes" in text
    for plot in ("channels", "quality", "sensitivity"):
        assert (tmp_path / "card" / "plots" / f"{plot}.png").stat().st_size > 5000


def test_a_run_builds_for_and_measures_on_the_targets_that_its_recipe_names(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    again, mine = tmp_path / "run", tmp_path / "mine.yaml"
    shutil.copytree(finished[0], again)
    shutil.rmtree(again / "release")
    few = "measure: {processes: 1, min_seconds: 0.1, min_runs: 2}"
    for form in ("openvino", "onnx"):
        (tmp_path / f"here-{form}.yaml").write_text(f"extends: this-machine\nformat: {form}\n{few}\n")
    bench = "{batch: 1, processes: 1, threads: 1, min_seconds: 0.1, min_runs: 2}"
    named = [str(tmp_path / f"here-{form}.yaml") for form in ("openvino", "onnx")]
    mine.write_text(f"extends: {place / 'mine.yaml'}\nbench: {bench}\ntargets: {json.dumps(named)}\n")
    ran = compress("prune", f"{place}/mine.py:small", "-r", mine, "--out", again)
    assert ran.code == 0, ran.err
    report = json.loads((again / "release" / "report.json").read_text())
    assert {n: r["spec"]["runtime"].split()[0] for n, r in report["targets"].items()} == {
        "here-openvino": "openvino", "here-onnx": "onnxruntime",
    }  # fmt: skip
    text = (again / "release" / "README.md").read_text()
    assert "here-openvino" in text and ", of 1 process |" in text and "the FLOPs promise" in text
    assert report["bench"]["why"]["model"]["ideal"] == pytest.approx(
        report["size"]["flops"]["dense"] / report["size"]["flops"]["pruned"], rel=0.1
    )


def test_a_card_says_of_each_export_what_it_was_compared_with_or_that_it_was_not_run(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    report = copy.deepcopy(finished[1])
    compared = {"largest_difference": 1e-5, "outputs_compared": 1, "samples": 7, "bytes": {"model.xml": 10}}
    report["export"]["openvino"] = {"dense": compared, "pruned": compared}
    report["export"]["tensorrt_rtx"] = {"pruned": {"skipped": "no CUDA driver", "bytes": {"model.engine": 10}}}
    text = body(report, {})
    assert "- ONNX against torch on 4 held-out samples" in text
    assert "- OPENVINO against ONNX on 7 held-out samples" in text
    assert "- TENSORRT\\_RTX: built, and not run where it was built (no CUDA driver)" in text
    assert "`tensorrt_rtx/model.engine`" in text and "lower is better" in text


def test_a_target_that_is_unknown_is_refused_before_anything_is_trained(place: Path, tmp_path: Path) -> None:
    ran = prune(place, tmp_path / "run", "--set", 'targets=["this-machin"]')
    one_error(ran, 2, "this-machine")
    assert not (tmp_path / "run").exists()


def test_the_same_command_goes_on_to_the_same_bytes_from_any_stage(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    run, _ = finished
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for stage in ("round-2", "plan", "model", "evaluation-dense", "export-dense", "export-pruned", "release"):
        shutil.rmtree(again / stage)
    ran = prune(place, again)
    assert ran.code == 0, ran.err
    for name in ("round-2/plan/plan.safetensors", "model/model.safetensors", "model/network.json"):
        assert (again / name).read_bytes() == (run / name).read_bytes(), name


def test_widths_of_a_model_folder_that_were_tampered_with_are_refused(
    finished: tuple[Path, dict[str, Any]], place: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder, ignore=shutil.ignore_patterns("seal.json"))
    facts = json.loads((folder / "network.json").read_text())
    layer = next(iter(facts["widths"]))
    facts["widths"][layer]["out"] = 10**6
    (folder / "network.json").write_text(json.dumps(facts))
    ran = compress("verify", folder, "--network", named(place))
    assert ran.code == 1 and "does not hold" in ran.out, ran.err
    assert "cannot have the shape" in ran.out + ran.err


@pytest.mark.parametrize("network", [pytest.param("listed", marks=pytest.mark.slow), "named"])
def test_heads_in_a_list_or_a_dict_are_pruned_and_exported_by_name(network: str, place: Path, tmp_path: Path) -> None:
    ran = prune(place, tmp_path / "run", "--set", "pagcp.rounds=1", "--set", "pagcp.between=0", network=network)
    assert ran.code == 0, ran.err
    import onnx

    graph = onnx.load(tmp_path / "run" / "release" / "onnx" / "model.onnx").graph
    assert [o.name for o in graph.output] == ["class"]


@pytest.mark.parametrize("form", ["dict", "dataclass"])
def test_two_heads_of_a_cut_network_are_exported_by_name(form: str, tmp_path: Path) -> None:
    model = nets.Heads(form).eval()
    x = torch.randn(4, 3, 12, 12)
    group = next(g for g in find_groups(model, x).groups if g.name == "side")
    facts = write_checked_module(cut(model, group.removed(range(8))), x, ["shape", "matte"], tmp_path, 1e-3)
    assert set(facts["outputs"]) == {"shape", "matte"}


def test_plan_says_groups_the_most_that_can_go_and_the_oracles_work(place: Path) -> None:
    ran = compress("plan", named(place), "-r", place / "mine.yaml", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert 0.4 < facts["most"] < 1 and facts["reference_passes"] == 19 * len(facts["groups"])
    assert facts["measurements"][0] * 4 < facts["reference_passes"]
    told = compress("plan", named(place), "-r", place / "mine.yaml")
    assert "at least" in told.out and "classifier: it is an output of the network" in told.out


@pytest.mark.parametrize(
    ("network", "words", "code", "parts"),
    [
        ("small", ("--sparsity", "0.5"), 2, ("whole channels go", "pagcp.flops")),
        ("small", ("--sweep", "0.5"), 2, ("whole channels go",)),
        ("small", ("--set", "pagcp.tolerances={nope: {relative: 0.1}}"), 2, ("no task 'nope'",)),
        (
            "small",
            ("--set", "pagcp.tolerance={relative: 0.1, absolute: 0.1}"),
            2,
            ("relative and absolute are two ways",),
        ),
        ("small", ("--set", "pagcp.round_to=64"), 1, ("multiples of 64",)),
        ("small", ("--set", "pagcp.flops=0.99", "--set", "pagcp.keep=0.5"), 1, ("cannot go", "at most")),
        ("detached", (), 1, ("nothing of the network can be trained",)),
        ("flat", ("--set", "train.batch=1"), 2, ("one sample", "train.batch")),
        ("small", ("--set", "pagcp.trials={}", "--set", "pagcp.flops=null"), 2, ("trials choose", "give pagcp.flops")),
        ("small", ("--set", "pagcp.trials={}", "--set", "finetune=null"), 2, ("trials are a fine-tuning in short",)),
        ("small", ("--set", "pagcp.shares=1"), 2, ("unknown key 'shares'",)),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    network: str, words: tuple[str, ...], code: int, parts: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    words = (*words, "--set", "train.epochs=1") if "train.batch=1" not in words else words
    one_error(prune(place, tmp_path / "run", *words, network=network), code, *parts)
    assert not (tmp_path / "run" / "plan").exists() and not (tmp_path / "run" / "round-1" / "plan").exists()


TRIED = ("--set", "pagcp.rounds=1", "--set", "pagcp.between=0", "--set", "pagcp.trials={epochs: [1]}")


def test_trials_decide_the_plan_are_told_on_the_card_and_come_out_the_same_again(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = prune(place, run, *TRIED, "--set", "export=null")
    assert ran.code == 0, ran.err
    assert "round 1  trials of" in ran.out and "won, its worst task" in ran.out
    report = json.loads((run / "release" / "report.json").read_text())
    (one,) = report["rounds"]
    rows = one["trials"]["contenders"]
    assert {"greedy", "uniform"} <= {r["name"] for r in rows} and one["trials"]["epochs"] == len(rows)
    assert one["trials"]["winner"] == rows[0]["name"]
    assert rows[0]["worst"] == min(r["worst"] for r in rows) == rows[0]["drops"]["class"]
    assert one["removed"] == rows[0]["removed"] == pytest.approx(report["size"]["flops_removed"])
    text = (run / "release" / "README.md").read_text()
    assert "## Trials" in text and f"The trials took {len(rows)} epochs in all" in text
    for row in rows:
        assert f"| {row['name']} | {100 * row['removed']:.1f} % | 1 | {row['drops']['class']:.1f} |" in text
    before = {p: (run / p).read_bytes() for p in ("round-1/plan/decision.json", "model/model.safetensors")}
    for stage in ("round-1", "plan", "model", "release"):
        shutil.rmtree(run / stage)
    ran = prune(place, run, *TRIED, "--set", "export=null", "--until", "model")
    assert ran.code == 0, ran.err
    assert {p: (run / p).read_bytes() for p in before} == before
    assert not list((run / ".scratch").iterdir())


def test_plan_says_how_many_epochs_trials_take(place: Path) -> None:
    told = compress("plan", named(place), "-r", place / "mine.yaml", *TRIED)
    assert "trials   5 plans a round at most, 5 epochs in all" in told.out


def test_a_training_of_ones_own_is_the_only_one_that_is_called(place: Path, tmp_path: Path) -> None:
    from compress.networks.train import train
    from compress.pipeline import prune as run

    labels = []

    def mine(model: Any, data: Any, spec: Any, **more: Any) -> Any:
        labels.append(more["label"])
        return train(model, data, spec, **more)

    def take(setup: Any) -> None:
        setup.trainer = ("hash of my code", mine)

    short = ["train.epochs=1", "pagcp.rounds=1", "pagcp.between=0", "pagcp.trials={epochs: [1]}"]
    run(named(place), str(place / "mine.yaml"), tmp_path / "run", short, until="plan", ask=take)
    assert {"dense", "trial of greedy"} <= set(labels)
    seal = json.loads((tmp_path / "run" / "dense" / "seal.json").read_text())
    assert seal["inputs"]["trainer"] == "hash of my code"


def _whole_run(place: Path, out: Path) -> None:
    from compress.pipeline import prune as run

    run(named(place), str(place / "mine.yaml"), out, ["pagcp.rounds=1", "pagcp.between=0"], until="plan")


def test_two_processes_prune_a_whole_run(place: Path, tmp_path: Path) -> None:
    ranks.run(2, _whole_run, place, tmp_path / "two")
    one = json.loads((tmp_path / "two" / "round-1" / "plan" / "decision.json").read_text())
    assert one["removed"] >= 0.4
    assert reload(tmp_path / "two" / "round-1" / "finetuned", named(place)).found["max_abs_difference"] < 1e-4
