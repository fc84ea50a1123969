"""A network through the command line: pruned in one shot, gradually, by columns; killed and resumed; refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.exporters.ort import session
from compress.models.zoo import build
from compress.recipes.global_mp.masks import load_masks
from tests import forks, ranks
from tests.command import compress, one_error
from tests.networks import write_class_folders, write_har

NETWORK = """\
import torch
from torch import nn
from compress.models.zoo.resnet32 import resnet

def small(classes=3, width=4):
    return resnet(8, classes, width)

def nothing(classes=3):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(432))

def half(classes=3):
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(800, classes))
    body[2].to(torch.bfloat16)
    return body

class Shared(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))  # of no dimension
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two, self.three = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.three.weight = self.two.weight
        self.classifier = nn.Linear(8, classes)

    def forward(self, x):
        y = torch.relu(self.one(x))
        y = torch.relu(self.three(torch.relu(self.two(y))))
        return self.classifier(self.scale * y.mean((2, 3)))

def shared(classes=3):
    return Shared(classes)
"""

RECIPE = """\
method: global-mp
task: network
description: everything as small as it can be
sparsity: 0.9
data: {folder: FOLDER/data}
train: {epochs: 4, batch: 16, lr: 0.05, flip: true}
finetune: {epochs: 2, batch: 16, lr: 0.02}
export: {samples: 5}
bench: {processes: 2, min_seconds: 0.01, min_runs: 2}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a network's file and a recipe; tests must not change them."""
    folder = tmp_path_factory.mktemp("network")
    write_class_folders(folder / "data", 90, 30)
    (folder / "mine.py").write_text(NETWORK)
    (folder / "mine.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    return folder


def prune(place: Path, out: Path, *words: object, network: str = "small") -> Any:
    return compress("prune", f"{place / 'mine.py'}:{network}", "--recipe", place / "mine.yaml", "--out", out, *words)


def sizes() -> dict[str, int]:
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3})
    return {n: p.numel() for n, p in model.named_parameters() if p.dim() > 1}


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, dict[str, Any]]:
    """A whole one-shot run with a sweep."""
    ran = prune(place, place / "run", "--sweep", "0.5,0.95", "--json")
    assert ran.code == 0, ran.err
    return place / "run", json.loads(ran.out)


def test_the_saved_network_has_exactly_the_weights_that_were_asked_for(finished: tuple[Path, dict[str, Any]]) -> None:
    run, report = finished
    total = sum(sizes().values())
    want = round(0.9 * total)
    state = load_file(run / "model" / "model.safetensors")
    assert sum(int((state[n] == 0).sum()) for n in sizes()) == want == report["size"]["pruned_weights"]
    masks = load_masks(run / "model" / "masks.safetensors", shapes={n: state[n].shape for n in sizes()})
    assert sum(int((~m).sum()) for m in masks.values()) == want
    assert all(not torch.count_nonzero(state[n][~m]) for n, m in masks.items())


def test_the_masks_are_those_of_a_sort_of_the_dense_weights(finished: tuple[Path, dict[str, Any]]) -> None:
    run, _ = finished
    dense = load_file(run / "dense" / "model.safetensors")
    every = torch.cat([dense[n].abs().flatten() for n in sorted(sizes())])
    prune = round(0.9 * len(every))
    gone = torch.zeros(len(every), dtype=torch.bool)
    gone[every.sort(stable=True).indices[:prune]] = True
    masks = load_masks(run / "plan" / "masks.safetensors")
    assert torch.equal(~torch.cat([masks[n].flatten() for n in sorted(sizes())]), gone)


def test_the_report_counts_what_the_files_hold(finished: tuple[Path, dict[str, Any]]) -> None:
    run, report = finished
    state = load_file(run / "release" / "model.safetensors")
    for row in report["layers"]:
        assert row["nonzero"] == int(torch.count_nonzero(state[row["name"]]))
        assert row["flops"]["sparse"] * row["weights"] == row["flops"]["dense"] * row["nonzero"]
    size = report["size"]
    assert size["flops"]["sparse"] == sum(r["flops"]["sparse"] for r in report["layers"]) < size["flops"]["dense"]
    assert size["bytes"]["packed"] == sum(p.stat().st_size for p in (run / "packed").glob("*.safetensors"))
    assert size["bytes"]["packed"] < size["bytes"]["dense"]
    (accuracy,) = (r for r in report["quality"]["tasks"] if r["metric"] == "accuracy")
    # The held-out pictures again, through the exported file, from the saved facts alone.
    from PIL import Image

    facts = json.loads((run / "model" / "network.json").read_text())
    runtime = session(run / "release" / "onnx" / "model.onnx", 1)
    hits = count = 0
    for label, name in enumerate(facts["tasks"][0]["classes"]):
        for path in sorted((run.parent / "data" / "test" / name).iterdir()):
            pixels = np.array(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255
            mean, std = (np.array(facts[k], dtype=np.float32)[:, None, None] for k in ("mean", "std"))
            (out,) = runtime.run(None, {"input": ((pixels - mean) / std)[None]})
            hits += int(out[0].argmax()) == label
            count += 1
    assert count == accuracy["samples"] == 30 and accuracy["pruned"] == pytest.approx(hits / count)


def test_the_sweep_trains_every_sparsity_in_one_call_and_draws_it(finished: tuple[Path, dict[str, Any]]) -> None:
    run, report = finished
    assert [round(p["sparsity"], 3) for p in report["quality"]["curve"]] == [0.5, 0.95]
    card = (run / "release" / "README.md").read_text()
    for name in ("sparsity-per-layer", "accuracy", "latency"):
        assert (run / "release" / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" and name in card
    assert "Zeros make no dense kernel faster" in card and "| latency, batch 1" in card
    assert str(run.parent) not in card.split("## Every number again")[0]


@pytest.mark.cold
def test_the_same_command_does_nothing_again_and_verify_finds_it_whole(
    place: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    run, report = finished
    before = {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "recipe.lock.yaml")
    }
    again = prune(place, run, "--sweep", "0.5,0.95", "--json")
    assert json.loads(again.out)["sha256"] == report["sha256"]
    assert {p: p.stat().st_mtime_ns for p in before} == before
    # A folder must not choose the code that is run: the person names it, as the report's own command does.
    own = json.loads((run / "model" / "network.json").read_text())["network"]
    one_error(compress("verify", run), 2, "the network is code of a file", f"--network {own}")
    assert compress("verify", run, "--network", own).code == 0
    assert report["commands"]["verify"].endswith(f" --network {own}")
    assert compress("card", run, "--out", run.parent / "card").code == 0
    changed = prune(place, run, "--sparsity", "0.8")
    one_error(changed, 1, "made from other inputs", "sparsity")
    lie = run.parent / "lie"
    lie.mkdir()
    for path in (p for p in (run / "model").iterdir() if p.name != "seal.json"):
        (lie / path.name).write_bytes(path.read_bytes())
    state = load_file(lie / "model.safetensors")
    save_file({**state, "classifier.bias": state["classifier.bias"] + 1}, lie / "model.safetensors")
    ran = compress("verify", lie, "--network", own)
    assert ran.code == 1 and "other outputs" in ran.err


def test_gradual_pruning_starts_from_an_untrained_network_and_ends_at_the_same_count(
    place: Path, tmp_path: Path
) -> None:
    words = ("--set", "global-mp.schedule=gradual", "--set", "finetune=null", "--until", "evaluation", "--json")
    ran = prune(place, tmp_path / "g", *words)
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "g" / "gradual" / "training.json").read_text())
    pruned = [r["pruned"] for r in rows]
    want = round(0.9 * sum(sizes().values()))
    assert pruned[0] == 0 and pruned == sorted(pruned) and pruned[-1] == want == pruned[2] > pruned[1] > 0
    state = load_file(tmp_path / "g" / "model" / "model.safetensors")
    assert sum(int((state[n] == 0).sum()) for n in sizes()) == want


def test_floors_hold_and_the_total_is_met_all_the_same(place: Path, tmp_path: Path) -> None:
    total, words = sum(sizes().values()), ("--until", "plan", "--sparsity", "0.97", "--json")
    plain = json.loads(prune(place, tmp_path / "p", *words).out)
    held = json.loads(prune(place, tmp_path / "f", *words, "--set", "global-mp.floor=12").out)
    assert plain["size"]["pruned_weights"] == held["size"]["pruned_weights"] == round(0.97 * total)
    assert min(r["nonzero"] for r in plain["layers"]) < 12 == min(r["nonzero"] for r in held["layers"])


def test_a_shared_weight_counts_once_and_stays_shared(place: Path, tmp_path: Path) -> None:
    ran = prune(place, tmp_path / "s", "--until", "model", "--json", network="shared")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["size"]["prunable_weights"] == 8 * 27 + 8 * 72 + 24
    state = load_file(tmp_path / "s" / "model" / "model.safetensors")
    assert torch.equal(state["two.weight"], state["three.weight"])
    assert sum(int((state[n] == 0).sum()) for n in ("one.weight", "two.weight", "classifier.weight")) == round(
        0.9 * 816
    )


def test_fastgrnn_loses_columns_and_is_really_smaller(tmp_path: Path) -> None:
    har = write_har(tmp_path / "har", people=3, windows=12)
    words = ("--recipe", "global-mp-fastgrnn-9-8", "--set", f"data.folder={har}", "--set", "train.epochs=1")
    ran = compress(
        "prune", "fastgrnn-har2", *words, "--set", "finetune.epochs=1", "--set", "train.lr=0.01",
        "--out", tmp_path / "run",
        "--until", "evaluation", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["size"]["ranks"] == {"r_W": 9, "r_U": 8}
    removed = (80 + 80) * 72
    assert report["size"]["pruned_weights"] == removed
    assert report["size"]["parameters"]["dense"] - report["size"]["parameters"]["pruned"] == removed
    state = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert state["U.left.weight"].shape == (80, 8) and state["W.right.weight"].shape == (9, 9)


def killed_run(place: Path, out: Path) -> None:
    torch.set_num_threads(1)
    ran = prune(
        place, out, "--until", "model", "--set", "train.checkpoint_steps=2", "--set", "finetune.checkpoint_steps=2"
    )
    assert ran.code == 0, ran.err


def test_killed_while_it_trains_it_goes_on_to_the_same_bytes(place: Path, tmp_path: Path) -> None:
    def start(out: Path) -> Any:
        process = forks.server.Process(target=killed_run, args=(place, out))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    out = tmp_path / "killed"
    for stage in ("dense", "finetuned"):
        process = start(out)
        checkpoint = out / ".scratch" / stage / "checkpoint.safetensors"
        while not checkpoint.exists():
            assert process.exitcode is None, "it ended before it could be killed"
            time.sleep(0.001)
        process.kill()
        process.join()
        assert not (out / stage).exists()
    last = start(out)
    last.join()
    assert last.exitcode == 0
    for name in (
        "dense/model.safetensors",
        "model/model.safetensors",
        "finetuned/training.json",
    ):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    one, other = (load_masks(folder / "plan" / "masks.safetensors") for folder in (out, tmp_path / "whole"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "1.5", ".nan"])
def test_a_sparsity_out_of_range_is_refused_before_anything_is_read(value: str, place: Path, tmp_path: Path) -> None:
    one_error(prune(place, tmp_path / "x", "--set", f"sparsity={value}"), 2, "sparsity")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("--set", "global-mp.floors={stem*: 109}"), 2, "larger than the layer stem.weight (108)"),
        (("--set", "global-mp.floors={nolayer: 1}"), 2, "matches no prunable layer"),
        (("--set", "global-mp.floor=5000"), 1, "cannot be pruned"),
        (("--set", "global-mp.floor=-1"), 2, "floor"),
        (("--set", "global-mp.skip=[nolayer]"), 2, "matches no prunable layer"),
        (("--sparsity", "0.00001"), 2, "less than one"),
        (("--sweep", "0.5,1.5"), 2, "sweep"),
        (("--set", "global-mp.ranks={r_U: 2}"), 2, "both a sparsity and ranks"),
        (("--set", "global-mp.ranks={r_U: 2}", "--set", "sparsity=null"), 2, "only FastGRNN"),
        (("--set", "train.epochs=0"), 2, "neither trained nor loaded"),
        (("--set", "train.epochs=1", "--set", "global-mp.schedule=gradual"), 2, "at least two epochs"),
        (("--set", "weights=none.safetensors"), 2, "no such file of weights"),
        (("--set", "arguments={depth: 9}"), 2, "cannot be called"),
        (("--set", "arguments={classes: 5}"), 1, "3 are needed"),
        (("--set", "data.tasks=[colour]"), 1, "no task"),
        (("--set", "train.lr=1e14", "--set", "train.weight_decay=1e10"), 1, "the loss is"),
    ],
)
def test_what_cannot_be_done_is_one_clear_error(
    words: tuple[str, ...], code: int, part: str, place: Path, tmp_path: Path
) -> None:
    one_error(prune(place, tmp_path / "x", *words), code, part)


def test_a_network_without_a_prunable_weight_is_refused(place: Path, tmp_path: Path) -> None:
    one_error(prune(place, tmp_path / "x", network="nothing"), 1, "no prunable weight")


def test_a_network_with_weights_of_half_precision_is_refused_by_the_weights_name(place: Path, tmp_path: Path) -> None:
    one_error(prune(place, tmp_path / "x", network="half"), 2, "the weight 2.weight is bfloat16", "float32")


def test_weights_that_are_nan_pickled_or_of_another_network_are_refused(place: Path, tmp_path: Path) -> None:
    def refused(path: Path, part: str) -> None:
        ran = prune(place, tmp_path / "x", "--fresh", "--set", f"weights={path}", "--set", "train.epochs=0")
        one_error(ran, 1, part)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"stem.weight": Bomb()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "pickle")
    os.rename(tmp_path / "w.pt", tmp_path / "w.safetensors")  # a name proves nothing
    refused(tmp_path / "w.safetensors", "pickle")
    assert not (tmp_path / "ran").exists()
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3})
    state = model.state_dict()
    save_file({**state, "stem.weight": torch.full_like(state["stem.weight"], torch.nan)}, tmp_path / "nan.safetensors")
    refused(tmp_path / "nan.safetensors", "NaN")
    other = build("resnet", {"depth": 8, "width": 8, "classes": 3})
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "in the network")


def test_masks_of_another_network_or_no_masks_at_all_are_refused(
    place: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = finished
    weights = ("--set", f"weights={run / 'dense' / 'model.safetensors'}", "--set", "train.epochs=0", "--until", "plan")

    def with_masks(path: Path, *words: str) -> Any:
        return prune(place, tmp_path / "x", "--fresh", *weights, "--set", f"global-mp.masks={path}", *words)

    good = with_masks(run / "plan" / "masks.safetensors")
    assert good.code == 0, good.err
    one, other = (load_masks(folder / "plan" / "masks.safetensors") for folder in (tmp_path / "x", run))
    assert all(torch.equal(one[k], other[k]) for k in other)
    one_error(with_masks(run / "plan" / "masks.safetensors", "--sparsity", "0.8"), 1, "the sparsity asks for")
    one_error(with_masks(tmp_path / "none.safetensors"), 1, "no mask file")
    one_error(with_masks(run / "dense" / "model.safetensors"), 1, "no mask file")
    torch.save({}, tmp_path / "m.safetensors")
    one_error(with_masks(tmp_path / "m.safetensors"), 1, "damaged or cut short")
    state = load_file(run / "dense" / "model.safetensors")
    save_file({**state, "stem.weight": state["stem.weight"] + 1}, tmp_path / "changed.safetensors")
    one_error(
        with_masks(run / "plan" / "masks.safetensors", "--set", f"weights={tmp_path / 'changed.safetensors'}"),
        1,
        "belong to other weights",
    )


def test_models_and_recipes_that_do_not_belong_together_are_told_apart(place: Path, tmp_path: Path) -> None:
    def run(model: str, recipe: str) -> Any:
        return compress("prune", model, "--recipe", recipe, "--out", tmp_path / "x")

    one_error(run("smollm2-135m", "global-mp-network"), 2, "not a plain network")
    one_error(run("resnet32-cifar10", "global-mp"), 2, "not a language model")
    one_error(run("resnet32-cifar", "global-mp-network"), 2, "did you mean 'resnet32-cifar10'")
    one_error(run(f"{place / 'none.py'}:f", "global-mp-network"), 2, "no such file")


def test_plan_says_what_would_be_done_without_data(place: Path) -> None:
    ran = compress("plan", "wrn-28-8-cifar10", "--recipe", "global-mp-wrn-28-8-95", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["parameters"] == 23_354_842 and facts["prune"] == round(0.95 * facts["prunable_weights"])
    text = compress("plan", "fastgrnn-har2", "--recipe", "global-mp-fastgrnn-8-7").out
    assert "r_W is 8, r_U is 7" in text


def ranked_run(place: Path, out: Path) -> None:
    short = ("--set", "train.epochs=1", "--set", "finetune.epochs=1")
    ran = prune(place, out, "--until", "evaluation", *short)
    assert ran.code == 0, ran.err


def test_processes_share_the_training_of_a_whole_run(place: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        ranks.run(count, ranked_run, place, tmp_path / str(count))
    one, two = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("1", "2"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Gradients are sums of floats: the last bits may differ, and long training would carry them far.
        torch.testing.assert_close(two[name].float(), tensor.float(), rtol=1e-3, atol=1e-4, msg=name)
    pruned = [sum(int((t == 0).sum()) for n, t in m.items() if t.dim() > 1) for m in (one, two)]
    assert pruned[0] == pruned[1]
    first, second = (
        json.loads((tmp_path / n / "evaluation-dense" / "evaluation.json").read_text()) for n in ("1", "2")
    )
    for task, figures in first.items():
        assert second[task]["samples"] == figures["samples"]
        assert second[task]["loss"] == pytest.approx(figures["loss"], rel=2e-2)


def test_verify_measures_a_network_again_and_its_report_is_a_page(finished: tuple[Path, dict[str, Any]]) -> None:
    run, report = finished
    own = json.loads((run / "model" / "network.json").read_text())["network"]
    ran = compress("verify", run, "--network", own, "--measure", "--json")
    assert ran.code == 0, ran.err
    found = {c["claim"]: c for c in json.loads(ran.out)["claims"]}
    (accuracy,) = (r for r in report["quality"]["tasks"] if r["metric"] == "accuracy")
    assert found[f"accuracy, {accuracy['task']}"]["found"] == f"{accuracy['pruned']:.4f}"
    assert found[f"accuracy, {accuracy['task']}"]["verdict"] == "holds"
    dense = found[f"accuracy, {accuracy['task']}, dense"]
    assert dense["verdict"] == "holds" and dense["found"] == f"{accuracy['dense']:.4f}"
    assert found["the dense model"]["verdict"] == "holds"
    assert found["non-zero parameters"]["found"] == f"{report['size']['nonzero_parameters']:,}"
    assert found["onnx gives what torch gives"]["verdict"] == "holds"
    assert found["latency, batch 1, onnx"]["found"].endswith("]")
    page = (run / "release" / "report.html").read_text()
    for name in ("sparsity-per-layer", "accuracy", "latency", "ratios"):
        assert page.count(f'id="chart-{name}"') == 1


def test_the_dense_network_of_a_release_is_the_one_that_is_named_if_its_hash_fits(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.claims import remeasure

    timed: list[Path] = []

    def measured(subject: Any, form: str, dense: Path, spec: Any) -> dict[str, Any]:
        assert (dense / "model.onnx").is_file()
        timed.append(dense)
        return dict(subject.report["bench"])

    monkeypatch.setattr(remeasure, "_measure", measured)
    run, report = finished
    own = json.loads((run / "model" / "network.json").read_text())["network"]
    words = ("verify", run / "release", "--network", own, "--measure", "--json")

    def found(*more: object) -> dict[str, dict[str, Any]]:
        ran = compress(*words, *more)
        assert ran.code == 0, ran.err
        return {c["claim"]: c for c in json.loads(ran.out)["claims"]}

    alone = found()
    assert alone["the dense model"]["verdict"] == "cannot be checked here" and not timed
    assert "release/dense" in alone["latency, batch 1, onnx"]["reason"]
    other = found("--dense", run / "model")["the dense model"]
    assert other["verdict"] == "is another"
    assert other["said"] == f"sha256 {report['model']['dense_sha256'][:12]}" != other["found"]
    named = found("--dense", run / "dense")
    assert named["the dense model"]["verdict"] == named["latency, batch 1, onnx"]["verdict"] == "holds"
    (exported,) = timed
    assert not exported.exists(), "what was exported for it is gone again"
    (loss,) = (r for r in report["quality"]["tasks"] if r["metric"] == "loss")
    assert named[f"loss, {loss['task']}, dense"]["verdict"] == "holds"
    assert found("--dense", run)["latency, batch 1, onnx"]["verdict"] == "holds" and timed[-1] == run / "export-dense"
