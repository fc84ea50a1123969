"""`eval`, `export` and `bench` of networks, as a user calls them; and of two kinds of model that were mixed up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from compress.exporters import onnx, onnx_module
from compress.exporters.ort import session
from compress.models.saved import KINDS
from compress.models.zoo import build
from compress.pipeline import METHODS
from compress.run.seals import read_stamped, stamped
from tests.command import Job, compress, one_error
from tests.networks import write_class_folders, write_har

RECIPE = """\
method: global-mp
task: network
description: everything as small as it can be
sparsity: 0.9
arguments: {depth: 8, width: 4, classes: 3}
data: {folder: FOLDER/data, size: 12}
train: {epochs: 4, batch: 16, lr: 0.05, flip: true}
finetune: {epochs: 2, batch: 16, lr: 0.02}
export: null
bench: null
"""

MINE = """\
from pathlib import Path
from compress.models.zoo.resnet32 import resnet

Path(__file__).with_name("was-run").touch()

def small(classes=3):
    return resnet(8, classes, 4)

def wide(classes=3):
    return resnet(8, classes, 8)
"""


def facts(*words: object) -> Any:
    ran = compress(*words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a recipe and a network's file; tests must not change them."""
    folder = tmp_path_factory.mktemp("networks")
    write_class_folders(folder / "data", 90, 40)
    (folder / "mine.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    (folder / "mine.py").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """A network of the zoo, pruned and evaluated, but not exported; tests must not change it."""
    out = place / "run"
    ran = compress("prune", "resnet8-emoji", "-r", place / "mine.yaml", "--out", out, "--until", "evaluation")
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def exports(run: Path, place: Path) -> tuple[Path, Path]:
    """The dense and the pruned network as `compress export` writes them."""
    for label, folder in (("dense", run / "dense"), ("pruned", run)):
        ran = compress("export", folder, "--out", place / label)
        assert ran.code == 0, ran.err
        assert "held-out samples" in ran.out and "model.onnx" in ran.out
    return place / "dense", place / "pruned"


def pictures(data: Path, facts_of: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The held-out pictures of a data folder and their classes, prepared as a saved network's facts say."""
    told = json.loads((facts_of / "network.json").read_text())
    mean, std = (np.array(told[k], dtype=np.float32)[:, None, None] for k in ("mean", "std"))
    found, labels = [], []
    for label, name in enumerate(told["tasks"][0]["classes"]):
        for path in sorted((data / "test" / name).iterdir()):
            pixels = np.array(Image.open(path), dtype=np.float32).transpose(2, 0, 1) / 255
            found.append((pixels - mean) / std)
            labels.append(label)
    return np.stack(found), np.array(labels)


def network(folder: Path) -> torch.nn.Module:
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3})
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def recounted(folder: Path, data: Path) -> float:
    x, labels = pictures(data, folder)
    with torch.no_grad():
        said = network(folder)(torch.from_numpy(x)).argmax(1).numpy()
    return float((said == labels).mean())


def test_eval_counts_the_runs_held_out_pictures_for_the_model_and_for_every_stage(run: Path, place: Path) -> None:
    for words, folder, noted in (
        (run, run / "model", "pruned"),
        (run / "model", run / "model", "pruned"),
        (run / "dense", run / "dense", "dense"),
        (run / "cut", run / "cut", "cut"),
    ):
        (task,) = facts("eval", words, "--like", run)["tasks"].values()
        assert task["samples"] == 40 and task["accuracy"] == recounted(folder, place / "data")
        (was,) = json.loads((run / f"evaluation-{noted}" / "evaluation.json").read_text()).values()
        assert task["loss"] == pytest.approx(was["loss"], rel=1e-5) and task["accuracy"] == was["accuracy"]
    told = compress("eval", run, "--like", run)
    assert "accuracy class: " in told.out and "(40 samples)" in told.out


def test_eval_on_another_runs_data_normalises_as_the_network_was_trained(
    run: Path, place: Path, tmp_path: Path
) -> None:
    other = tmp_path / "dark"
    write_class_folders(other, 50, 40)
    for path in other.rglob("*.png"):
        Image.fromarray(np.array(Image.open(path)) // 3).save(path)
    words = ("--set", f"data.folder={other}", "--set", "train.epochs=1", "--set", "finetune=null", "--until", "plan")
    ran = compress("prune", "resnet8-emoji", "-r", place / "mine.yaml", "--out", tmp_path / "run", *words)
    assert ran.code == 0, ran.err
    (task,) = facts("eval", run, "--like", tmp_path / "run")["tasks"].values()
    means = [json.loads((folder / "dense" / "network.json").read_text())["mean"] for folder in (run, tmp_path / "run")]
    assert means[0][0] > 2 * means[1][0]
    x, labels = pictures(other, run / "model")
    with torch.no_grad():
        out = network(run / "model")(torch.from_numpy(x))
    want = torch.nn.functional.cross_entropy(out, torch.from_numpy(labels))
    assert task["loss"] == pytest.approx(float(want), rel=1e-4)
    assert task["accuracy"] == float((out.argmax(1).numpy() == labels).mean())


def test_the_export_gives_torchs_outputs_on_all_held_out_pictures(
    run: Path, place: Path, exports: tuple[Path, Path]
) -> None:
    for folder, stage in zip(exports, ("dense", "model"), strict=True):
        x, _ = pictures(place / "data", run / stage)
        (got,) = session(folder / "model.onnx", 1).run(["class"], {"input": x})
        with torch.no_grad():
            want = network(run / stage)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
        noted = json.loads((folder / "export.json").read_text())
        assert noted["samples"] == 4 and noted["largest_difference"] <= noted["tolerance"]


def test_a_failed_check_leaves_no_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = onnx_module._write

    def off(module: Any, sample: Any, names: list[str], path: Path) -> None:
        with torch.no_grad():
            module.model.classifier.bias += 1
        write(module, sample, names, path)
        with torch.no_grad():
            module.model.classifier.bias -= 1

    monkeypatch.setattr(onnx_module, "_write", off)
    one_error(compress("export", run, "--out", tmp_path / "x"), 1, "differs from torch")
    assert not list(tmp_path.iterdir())


def test_bench_measures_both_exports_by_the_sample_and_by_the_batch(exports: tuple[Path, Path]) -> None:
    small = ("--processes", 2, "--threads", 1)
    one, many = (facts("bench", *exports, *small, "--batch", n) for n in (1, 64))
    for found, batch in ((one, 1), (many, 64)):
        assert found["kind"] == "network" and found["spec"]["batch"] == batch and found["spec"]["processes"] == 2
        for label, folder in zip(("dense", "pruned"), exports, strict=True):
            latency = found[label]["latency"]
            assert [len(r) for r in latency["raw"]] and len(latency["raw"]) == 2
            assert found[label]["bytes"] == (folder / "model.onnx").stat().st_size
        low, high = (found["ratios"]["latency"][k] for k in ("low", "high"))
        assert low <= found["ratios"]["latency"]["median"] <= high
    assert many["dense"]["latency"]["median"] > 2 * one["dense"]["latency"]["median"]
    told = compress("bench", *exports, "--processes", 1)
    assert told.code == 0 and "latency dense" in told.out and "latency ratio" in told.out


def test_a_fastgrnn_that_lost_columns_is_evaluated_as_the_smaller_cell_it_is(tmp_path: Path) -> None:
    har, out = write_har(tmp_path / "har", people=3, windows=12), tmp_path / "run"
    ran = compress(
        "prune", "fastgrnn-har2", "--recipe", "global-mp-fastgrnn-9-8", "--set", f"data.folder={har}",
        "--set", "train.epochs=1", "--set", "finetune.epochs=1", "--set", "train.lr=0.01",
        "--out", out, "--until", "model",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for stage in ("dense", "cut", "finetuned", "model"):
        (task,) = facts("eval", out / stage, "--like", out)["tasks"].values()
        assert task["samples"] == 36
    ranks = {s: json.loads((out / s / "network.json").read_text())["arguments"]["r_U"] for s in ("dense", "cut")}
    assert ranks == {"dense": 80, "cut": 8}


def test_code_that_a_folder_names_is_run_only_when_the_user_names_it_too(place: Path, tmp_path: Path) -> None:
    out, mine = tmp_path / "run", f"{place / 'mine.py'}:small"
    ran = compress("prune", mine, "-r", place / "mine.yaml", "--set", "arguments={}", "--out", out, "--until", "model")
    assert ran.code == 0, ran.err
    for words in (("eval", out, "--like", out), ("export", out, "--out", tmp_path / "onnx")):
        (place / "was-run").unlink()
        one_error(compress(*words), 2, "code of a file", f"--network {mine}")
        assert not (place / "was-run").exists()
        one_error(compress(*words, "--network", f"{place / 'mine.py'}:wide"), 1, "in the network")
        one_error(compress(*words, "--network", f"{place / 'none.py'}:small"), 2, "no such file")
        one_error(compress(*words, "--network", "resnet"), 2, "not FILE.py:FUNCTION")
        # The file may have moved since.
        moved = tmp_path / f"moved-{words[0]}.py"
        shutil.copyfile(place / "mine.py", moved)
        told = compress(*words, "--network", f"{moved}:small")
        assert told.code == 0, told.err


# --- bad input --------------------------------------------------------------------------------------------------------


def test_two_kinds_of_model_are_not_mixed(job: Job, run: Path, exports: tuple[Path, Path], tmp_path: Path) -> None:
    language, plain = "a language model", "a plain network"
    # All that is looked at before these are refused: the lock of a language model's run, the name of its export.
    text, graphs = tmp_path / "text", tmp_path / "graphs"
    lock = stamped("recipe: {method: tyr}\n")
    for folder, name, words in ((text, "recipe.lock.yaml", lock), (graphs, "prefill.onnx", "")):
        folder.mkdir()
        (folder / name).write_text(words)
    one_error(compress("eval", run, "--like", text), 1, f"the model is {plain}, the run is of {language}")
    one_error(compress("eval", job.model, "--like", run), 1, f"the model is {language}, the run is of {plain}")
    one_error(compress("bench", exports[0], graphs), 1, f"one export is of {plain}, the other of {language}")
    one_error(compress("bench", graphs, exports[1]), 1, f"one export is of {language}, the other of {plain}")
    one_error(compress("eval", run, "--text", job.folder / "first.txt"), 2, f"--text is not for {plain}")
    one_error(compress("eval", run, "--like", run, "--length", 64), 2, f"--length is not for {plain}")
    one_error(compress("eval", run, "--like", run, "--task", "piqa"), 2, f"--task is not for {plain}")
    one_error(compress("bench", *exports, "--prompt", 8), 2, f"--prompt is not for {plain}")
    one_error(compress("bench", graphs, graphs, "--batch", 8), 2, f"--batch is not for {language}")
    one_error(compress("eval", job.model, "--like", text, "--network", "a.py:b"), 2, f"not for {language}")
    both = tmp_path / "both"
    both.mkdir()
    for path in (run / "model" / "network.json", job.model / "config.json"):
        shutil.copy(path, both)
    one_error(compress("eval", both, "--like", run), 1, "two kinds of model")
    for path in (exports[0] / "model.onnx", graphs / "prefill.onnx"):
        shutil.copy(path, both)
    one_error(compress("bench", both, exports[1]), 1, "both prefill.onnx and model.onnx")
    for verb in (("eval", "resnet8-emoji", "--like", run), ("export", "resnet8-emoji", "--out", tmp_path / "x")):
        one_error(compress(*verb), 2, "yet to be trained")
    assert not (tmp_path / "x").exists()


def test_a_run_whose_data_cannot_be_had_or_fits_no_more_is_refused(run: Path, place: Path, tmp_path: Path) -> None:
    one_error(compress("eval", run), 2, "--like RUN")
    one_error(compress("eval", run, "--like", tmp_path), 1, "not a run folder")
    one_error(compress("eval", run, "--like", run / "model"), 1, "not a run folder")
    lock = read_stamped(run / "recipe.lock.yaml", "the lock", "")

    def like(name: str, text: str, dense: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "recipe.lock.yaml").write_text(stamped(text))
        if dense:
            shutil.copytree(run / "dense", folder / "dense")
        return folder

    one_error(compress("eval", run, "--like", like("broken", "recipe: [\n")), 1, "not a run folder")
    one_error(compress("eval", run, "--like", like("empty", "")), 1, "not a run folder")
    (like("torn", lock) / "recipe.lock.yaml").write_text(lock)
    one_error(compress("eval", run, "--like", tmp_path / "torn"), 1, "not a run folder", "no hash of its own")
    one_error(compress("eval", run, "--like", like("untrained", lock, dense=False)), 1, "trained no network yet")
    data = f"folder: {place / 'data'}"
    assert data in lock
    gone = like("gone", lock.replace(data, f"folder: {tmp_path / 'none'}"))
    one_error(compress("eval", run, "--like", gone), 1, "data cannot be had: there is no such folder")
    other = write_class_folders(tmp_path / "other", 60, 20)
    changed = like("changed", lock.replace(data, f"folder: {other}"))
    one_error(compress("eval", run, "--like", changed), 1, "has changed")
    one_error(compress("eval", run, "--like", like("silent", lock.replace(data, "wrong: 1"))), 1, "does not say")


def test_a_network_and_data_of_other_classes_or_another_size_are_told_apart(
    run: Path, place: Path, tmp_path: Path
) -> None:
    two = shutil.copytree(place / "data", tmp_path / "two")
    for part in ("train", "test"):
        shutil.rmtree(two / part / "cross")
    words = ("--set", "train.epochs=1", "--set", "finetune=null", "--until", "plan")
    for name, value, classes, part in (
        ("folder", two, 2, "tasks or classes"),
        ("size", 16, 3, "shape of an input"),
    ):
        out = tmp_path / f"run-{name}"
        own = ("--set", f"data.{name}={value}", "--set", f"arguments.classes={classes}")
        given = ("-r", place / "mine.yaml", *own, *words)
        ran = compress("prune", "resnet8-emoji", *given, "--out", out)
        assert ran.code == 0, ran.err
        one_error(compress("eval", run, "--like", out), 1, f"differ in the {part}")
        one_error(compress("eval", out / "dense", "--like", run), 1, f"differ in the {part}")
    a, b = tmp_path / "a", tmp_path / "b"
    facts("export", run, "--out", a)
    facts("export", tmp_path / "run-size" / "dense", "--out", b)
    one_error(compress("bench", a, b), 1, "take other inputs: [3, 12, 12] and [3, 16, 16]")


def test_a_model_folder_that_is_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        folder = Path(shutil.copytree(run / "model", tmp_path / name))
        (folder / "seal.json").unlink()  # else it is what says so
        return folder

    def refused(folder: Path, part: str) -> None:
        for words in (("eval", folder, "--like", run), ("export", folder, "--out", tmp_path / "onnx")):
            one_error(compress(*words), 1, part)
        assert not (tmp_path / "onnx").exists()

    folder = broken("weights")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "classifier.bias": state["classifier.bias"] + 1}, folder / "model.safetensors")
    refused(folder, "other outputs")
    (folder / "model.safetensors").unlink()
    refused(folder, "no such file of weights")
    torch.save(state, folder / "model.safetensors")
    refused(folder, "pickle")
    folder = broken("facts")
    (folder / "network.json").write_text("{}")
    refused(folder, "the facts of the network")
    folder = broken("fingerprint")
    (folder / "fingerprint.safetensors").unlink()
    refused(folder, "the fingerprint")


def test_every_task_of_a_method_has_a_kind_with_its_files_and_verbs() -> None:
    assert set(KINDS) == {task for tasks in METHODS.values() for task in tasks}
    assert KINDS["text"].graphs[0] == onnx.PREFILL and KINDS["network"].graphs == (onnx_module.FILE,)
