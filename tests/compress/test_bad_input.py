"""Everything a user can get wrong: one clear error each, the right exit code, and nothing half-written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.run.folder import Run
from tests.command import Job, Ran, compress, one_error, start
from tests.networks import write_class_folders
from tests.tiny import prose


@pytest.fixture
def mine(job: Job, tmp_path: Path) -> Job:
    """A copy of the job that a test may spoil."""
    folder = tmp_path / "job"
    shutil.copytree(job.folder, folder, ignore=shutil.ignore_patterns("run"))
    recipe = folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace(str(job.folder), str(folder)))
    return Job(folder / "model", recipe, folder)


def prune(job: Job, *words: object) -> Ran:
    return compress("prune", job.model, "--recipe", job.recipe, "--out", job.folder / "run", "--until", "plan", *words)


def nothing_sealed(job: Job) -> bool:
    left = [p for p in (job.folder / "run").rglob("*") if p.is_file() and p.name not in (".lock", "recipe.lock.yaml")]
    return not left


def spoil(job: Job, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = job.model / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "instead", "parts"),
    [
        ("  round_to: 4", "  roundto: 4", ("unknown key 'roundto'", "tiny.yaml, line 17", "did you mean 'round_to'?")),
        ("  windows: 8", "  windos: 8", ("tiny.yaml, line 8, key calibration.windos", "did you mean 'windows'?")),
        ("sparsity: 0.3", "sparsity: 1.01", ("sparsity", "tiny.yaml, line 3", "between 0 and 1")),
        ("sparsity: 0.3", "sparsity: 101%", ("sparsity", "'101%'", "tiny.yaml, line 3")),
        ("  iterations: 2", "  iterations: two", ("iterations", "'two'", "tiny.yaml, line 18")),
        ("  iterations: 2", "  iterations: 0", ("iterations", "greater than or equal to 1", "line 18")),
        ("method: tyr", "method: tir", ("unknown method 'tir'", "line 1", "did you mean 'tyr'?")),
    ],
)
def test_a_wrong_recipe_is_said_with_file_line_key_and_cure(
    mine: Job, line: str, instead: str, parts: tuple[str, ...]
) -> None:
    text = mine.recipe.read_text()
    assert line in text
    mine.recipe.write_text(text.replace(line, instead))
    # The weights are no weights: a recipe is checked before they are looked at.
    (mine.model / "model.safetensors").write_text("no weights")
    one_error(prune(mine), 2, *parts)
    assert not (mine.folder / "run").exists()


def test_a_budget_of_101_percent_on_the_command_line(mine: Job) -> None:
    one_error(prune(mine, "--sparsity", "1.01"), 2, "sparsity", "--set sparsity=1.01", "between 0 and 1")
    assert not (mine.folder / "run").exists()


@pytest.mark.parametrize("verb", ["prune", "plan"])
def test_a_sparsity_no_combination_can_meet_is_said_before_any_work(mine: Job, verb: str) -> None:
    words = ("--sparsity", "0.9", "--set", "tyr.attention=false")
    given = compress("plan", mine.model, "-r", mine.recipe, *words) if verb == "plan" else prune(mine, *words)
    # FFNs hold 4 x 5,760 of 53,760 parameters.
    one_error(given, 1, "11,520", "42.9%", "where: sparsity", "ask for at most 0.428")
    assert not list((mine.folder / "run").glob("supernet-*"))


def test_an_unknown_recipe_and_an_unknown_model(mine: Job) -> None:
    one_error(compress("prune", mine.model, "-r", "tyr-dmo"), 2, "unknown recipe 'tyr-dmo'", "did you mean 'tyr-demo'?")
    one_error(compress("plan", "smollm2-135", "-r", mine.recipe), 2, "'smollm2-135'", "did you mean 'smollm2-135m'?")


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_model_folder_without_weights(mine: Job) -> None:
    (mine.model / "model.safetensors").rename(mine.model / "pytorch_model.bin")
    one_error(prune(mine), 1, "no safetensors weights, only pytorch_model.bin", str(mine.model), "save_pretrained")
    assert not (mine.folder / "run").exists()


def test_a_folder_that_is_no_model(mine: Job) -> None:
    one_error(compress("plan", mine.folder, "-r", mine.recipe), 1, "no config.json", str(mine.folder))


def test_a_truncated_weight_file(mine: Job) -> None:
    path = mine.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    one_error(prune(mine), 1, "damaged or cut short", str(path), "fetch or copy it again")
    assert nothing_sealed(mine)


def test_nan_in_a_weight(mine: Job) -> None:
    spoil(mine, lambda weights: weights["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    one_error(prune(mine), 1, "model.layers.1.mlp.up_proj.weight holds 40 NaN", "model.safetensors")
    assert nothing_sealed(mine)


def test_a_weight_that_is_missing(mine: Job) -> None:
    spoil(mine, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    one_error(prune(mine), 1, "missing", "model.layers.1.mlp.down_proj.weight")
    assert nothing_sealed(mine)


def test_an_unknown_architecture(mine: Job) -> None:
    path = mine.model / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"model_type": "llama"', '"model_type": "mamba"'))
    one_error(prune(mine), 1, "'mamba' is not supported", "config.json: model_type", "models/families/")
    # One that is known by its structure, of which these are not the weights.
    path.write_text(whole.replace('"model_type": "llama"', '"model_type": "gpt_neox"'))
    one_error(prune(mine), 1, "weights are missing", "gpt_neox.embed_in.weight")
    path.write_text(whole.replace('"model_type": "llama"', '"model_type": "llamma"'))
    one_error(prune(mine), 1, "llamma", "config.json")
    path.write_text("{")
    one_error(prune(mine), 1, "config", "config.json")


def test_a_folder_without_a_tokenizer(mine: Job) -> None:
    for path in mine.model.glob("tokenizer*"):
        path.unlink()
    one_error(prune(mine), 1, "tokenizer", str(mine.model))


def test_pruning_a_pruned_model_again(job: Job, finished: Path, tmp_path: Path) -> None:
    ran = compress("prune", finished / "model", "-r", job.recipe, "--out", tmp_path / "run")
    one_error(ran, 1, "already differ in size", "dense model")


# --- the text --------------------------------------------------------------------------------------------------------


def test_an_empty_calibration_text(mine: Job) -> None:
    (mine.folder / "calibration.txt").write_text("\n \n")
    one_error(prune(mine), 1, "the text is empty", "calibration.txt")
    assert nothing_sealed(mine)


def test_a_calibration_text_that_is_too_short(mine: Job) -> None:
    (mine.folder / "calibration.txt").write_text("the cat\n\n" * 2000)
    one_error(prune(mine, "--set", "calibration.windows=4000"), 1, "4003 are asked for", "calibration.txt")


def test_evaluation_text_that_is_calibrated_on(mine: Job) -> None:
    both = prose(40, seed=7)
    (mine.folder / "calibration.txt").write_text(both + prose(10, seed=8))
    # The tail of one file is the middle of the other.
    (mine.folder / "second.txt").write_text(prose(300, seed=9) + both)
    ran = prune(mine, "--set", "calibration.windows=20", "--set", "calibration.length=128",
                "--set", "evaluation.windows=4", "--set", "evaluation.length=128")  # fmt: skip
    one_error(ran, 1, "overlaps the calibration text", "second | text")
    assert nothing_sealed(mine)


def test_text_files_that_are_not_there_or_no_text(mine: Job) -> None:
    (mine.folder / "calibration.txt").write_bytes(b"\xff\xfe\x00" * 500)
    one_error(prune(mine), 1, "cannot be read", "calibration.txt", "UTF-8")
    (mine.folder / "calibration.txt").unlink()
    one_error(prune(mine), 1, "no file matches", "calibration.txt")


# --- the folder and the machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a file", "no rights"])
def test_an_out_folder_that_cannot_be_written(mine: Job, where: str) -> None:
    out = mine.recipe / "run" if where == "a file" else Path("/proc/run")
    ran = compress("prune", mine.model, "-r", mine.recipe, "--out", out)
    one_error(ran, 1, "cannot be written", str(out), "--out")


def test_an_out_folder_of_somebody_elses(mine: Job) -> None:
    (mine.folder / "run").mkdir()
    (mine.folder / "run" / "thesis.txt").write_text("years of work")
    one_error(prune(mine, "--fresh"), 1, "not made by compress")
    assert [p.name for p in (mine.folder / "run").iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder(mine: Job) -> None:
    with Run.open(mine.folder / "run"):
        one_error(prune(mine), 1, f"another run holds this folder (process {os.getpid()}", "--out")


def test_a_full_disk_and_then_more_space(mine: Job) -> None:
    disk = mine.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        words = ("prune", mine.model, "-r", mine.recipe, "--out", disk / "run", "--until", "plan")
        one_error(compress(*words), 1, "the disk is full", "bytes are free", "goes on behind the last whole stage")
        sealed = {p: p.stat().st_mtime_ns for p in (disk / "run").rglob("seal.json")}
        assert sealed
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        ran = compress(*words)
        assert ran.code == 0, ran.err
        assert {p: p.stat().st_mtime_ns for p in sealed} == sealed
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_leaves_whole_stages_and_exit_code_130(mine: Job) -> None:
    out = mine.folder / "run"
    words = ("prune", mine.model, "-r", mine.recipe, "--out", out, "--until", "plan")
    # So many generations that it is in the middle of them for certain.
    long = ("--set", "tyr.search.generations=100000", "--set", "tyr.search.patience=100000")
    child = start(*words, *long)
    while not (out / ".scratch" / "search-1").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    printed, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert printed == "" and "Traceback" not in said
    assert said.strip().splitlines()[-1] == "stopped; the same command goes on behind the last whole stage"
    assert {p.name for p in out.iterdir()} >= {"text", "supernet-1", "singles-1"} and not (out / "search-1").exists()
    assert compress(*words).code == 0
    assert not list(out.rglob("*.partial"))


# What compiled code does with an exception that Python code called by it raises.
CAUGHT = """
import signal, sys, time
from compress import cli

class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@cli.app.command()
def translated():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        raise RuntimeError("a tensor could not be read") from None

@cli.app.command()
def swallowed():
    Late()
    time.sleep(50)
    print("went on")

cli.main()
"""


@pytest.mark.parametrize("how", ["translated", "swallowed"])
def test_ctrl_c_that_falls_into_foreign_code_stops_all_the_same(how: str) -> None:
    ran = subprocess.run([sys.executable, "-c", CAUGHT, how], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "\nstopped\n")


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_one_clear_line(mine: Job, tmp_path: Path) -> None:
    # Port 9 of this machine: nobody listens there.
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    child = start("plan", "nobody/nothing", "-r", mine.recipe, **nowhere)
    out, err = child.communicate(timeout=120)
    one_error(Ran(child.returncode, out, err), 1, "the hub cannot be reached for nobody/nothing", "local folder")


def test_an_offline_hub_is_one_clear_line(mine: Job) -> None:
    ran = compress("prune", "llama-70b", "-r", mine.recipe, "--out", mine.folder / "offline")
    one_error(ran, 1, "cannot be reached for meta-llama/Llama-3.1-70B")


# --- the other verbs -------------------------------------------------------------------------------------------------


def test_verbs_that_are_given_the_wrong_folder(job: Job, finished: Path, tmp_path: Path) -> None:
    one_error(compress("verify", tmp_path / "none"), 2, "no such folder")
    one_error(compress("verify", tmp_path), 1, "no model here")
    one_error(compress("verify", job.model), 1, "no fingerprint")
    one_error(compress("card", tmp_path), 1, "no report.json")
    one_error(compress("eval", job.model), 2, "either --like RUN, or --text FILE")
    one_error(compress("eval", job.model, "--like", tmp_path), 1, "not a run folder")
    one_error(compress("eval", tmp_path, "--like", finished), 1, "no model here")
    one_error(compress("bench", tmp_path, tmp_path), 1, "no prefill.onnx", "compress export")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    one_error(compress("export", job.model, "--out", tmp_path / "full"), 2, "not empty")
    one_error(compress("list", "devices"), 2, "'devices'", "recipes, models, targets")


def test_lm_evaluation_harness_says_what_to_install(job: Job, finished: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        ran = compress("eval", job.model, "--like", finished, "--task", "piqa")
        one_error(ran, 1, "not installed", "compress-toolchain[eval]")
    else:
        pytest.skip("lm-evaluation-harness is installed")


def test_what_a_user_has_at_the_place_to_write_is_left_alone_by_every_verb(
    job: Job, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = finished / "export-dense", finished / "export-pruned"
    (tmp_path / ".eo.partial").mkdir()
    (tmp_path / ".eo.partial" / "thesis").write_text("years")
    for name in ("file", "card/README.md", "bench/bench.json", "gate/junit.xml", "report.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("<testsuites/> {} my own")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    with monkeypatch.context() as patched:
        for work in (
            "compress.verbs.by_kind.call",
            "compress.report.build.read_report",
            "compress.exporters.gate_measure.measure_once",
        ):
            patched.setattr(work, never if work != "compress.report.build.read_report" else lambda _: {"recipe": {}})
        for words, said in (
            (("export", job.model, "--out", tmp_path / "eo"), (1, ".eo.partial is in the way")),
            (("export", job.model, "--out", tmp_path / "file"), (2, "this is no folder")),
            (("export", job.model, "--out", tmp_path / "file" / "x"), (1, "cannot be written")),
            (("bench", *exports, "--out", tmp_path / "file"), (1, "cannot be written")),
            (("bench", *exports, "--out", tmp_path / "bench"), (2, "there is a bench.json already")),
            (("gate", *exports, "-b", "latency<=9x", "--out", tmp_path / "gate"), (2, "there is a junit.xml already")),
            (("card", finished, "--out", tmp_path / "card"), (2, "there is a README.md already")),
            (("report", finished, "--out", tmp_path / "report.html"), (2, "there is a report.html already")),
        ):
            one_error(compress(*words), *said)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    # What a verb wrote itself it writes again.
    for _ in range(2):
        assert compress("card", finished, "--out", tmp_path / "own").code == 0
        assert compress("report", finished, "--out", tmp_path / "own.html").code == 0
        ran = compress("gate", *exports, "-b", "size<=9x", "--out", tmp_path / "own-gate", "--summary", tmp_path / "s")
        assert ran.code == 0, ran.err


def test_a_cache_that_cannot_be_made_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.run.cache import cache_dir

    monkeypatch.setenv("COMPRESS_CACHE", "/proc/none")
    with pytest.raises(CompressError, match="the cache cannot be written") as caught:
        cache_dir()
    assert caught.value.where == "/proc/none" and "COMPRESS_CACHE" in caught.value.fix


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        (bytes(range(128, 228)), "not UTF-8"),
        (b"", "no JSON"),
        (b"[]", "a list, not an object"),
        (b"{}", "'sha256' is missing"),
        (b'{"sha256": 3}', "'sha256' is a whole number, not a text"),
        (b'{"sha256": "a", "sha256": "b"}', "'sha256' twice"),
        (b'{"model": ' + b"[" * 5000, "nests"),
        (b'{"sha256": "a", "size": ' + b"7" * 5000 + b"}", "digits"),
        (b'{"sha256": "a"}', "changed since it was written"),
    ],
)
def test_a_report_that_is_none_is_one_error(raw: bytes, part: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(raw)
    for words in (("card", tmp_path), ("card", path), ("report", tmp_path, "--out", tmp_path / "page.html")):
        one_error(compress(*words), 1, "report.json", part)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


NETWORKS = {
    "pagcp": "extends: pagcp\narguments: {}\n",
    "global-mp": "method: global-mp\ntask: network\nsparsity: 0.5\ntrain: {epochs: 1}\n",
}


@pytest.mark.parametrize("method", NETWORKS)
def test_a_fault_of_a_network_found_before_its_first_stage_leaves_no_folder(method: str, tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data", 12, 6)
    (tmp_path / "net.yaml").write_text(f"{NETWORKS[method]}data: {{folder: {tmp_path / 'data'}}}\n")
    (tmp_path / "net.py").write_text("import torch\n\ndef small(classes=3):\n    return torch.nn.Linear(7, classes)\n")
    for function, words in (("nosuch", ()), ("small", ()), ("small", ("--set", "data.folder=/nowhere"))):
        given = (f"{tmp_path / 'net.py'}:{function}", "-r", tmp_path / "net.yaml", *words)
        ran = compress("prune", *given, "--out", tmp_path / "runs" / "left")
        assert ran.code in (1, 2) and ran.err.count("error: ") == 1, ran.err
        assert not (tmp_path / "runs").exists(), (function, words)


def test_a_fault_of_a_text_that_is_found_in_the_first_stage_leaves_no_folder(mine: Job, tmp_path: Path) -> None:
    (mine.folder / "first.txt").write_text("too short")
    masks = mine.folder / "masks.yaml"
    texts = f"[{{name: a, source: {{files: [{mine.folder / 'first.txt'}]}}}}]"
    masks.write_text(f"method: global-mp\nsparsity: 0.5\nevaluation: {{texts: {texts}, windows: 2, length: 32}}\n")
    for recipe in (mine.recipe, masks):
        ran = compress("prune", mine.model, "-r", recipe, "--out", tmp_path / "runs" / "left")
        assert ran.code == 1 and ran.err.count("error: ") == 1, ran.err
        assert not (tmp_path / "runs").exists(), recipe


# --- names and places ------------------------------------------------------------------------------------------------


def test_a_name_that_no_file_can_have_is_one_error(mine: Job) -> None:
    for name in ("x" * 300, "x" * 5000, "a/" * 2500):
        one_error(compress("verify", name), 1, "there can be no file of that name", name[:100])
        one_error(compress("plan", mine.model, "-r", f"./{name}.yaml"), 1, "no file of that name")
    one_error(compress("verify", "  "), 2, "no such folder", "where: '  '")


def test_names_that_are_not_utf_8_are_names_like_others(mine: Job) -> None:
    """A file's name is bytes; Python shows those that are no UTF-8 as halves of characters."""
    odd = mine.folder / os.fsdecode(b"m\xff\xe9")
    mine.model.rename(odd)
    one_error(compress("plan", odd / "none", "-r", mine.recipe), 2, "none", "\\udcff")
    ran = compress("eval", odd, "--text", mine.folder / "first.txt", "--windows", 1, "--length", 16)
    one_error(ran, 1, "its name is not UTF-8", "m\\udcff\\udce9/model.safetensors", "rename it")
    odd.rename(mine.model)
    text = mine.folder / os.fsdecode(b"t\xff.txt")
    (mine.folder / "first.txt").rename(text)
    ran = compress("eval", mine.model, "--text", text, "--windows", 1, "--length", 16, "--json")
    assert ran.code == 0 and "\\udcff" in ran.out, ran.err


def test_a_cache_of_the_hubs_that_cannot_be_made_is_no_fault_of_the_network(mine: Job) -> None:
    from huggingface_hub import constants

    from compress.models.sources import hub_cache

    child = start("plan", "nobody/nothing", "-r", mine.recipe, HF_HOME="/proc/none", HF_HUB_OFFLINE="0")
    out, err = child.communicate(timeout=120)
    one_error(Ran(child.returncode, out, err), 1, "the hub's cache cannot be written", "/proc/none", "HF_HOME=FOLDER")
    with pytest.raises(CompressError, match="the hub's cache cannot be written"), hub_cache():
        raise PermissionError(13, "Permission denied", f"{constants.HF_HUB_CACHE}/models--x")
