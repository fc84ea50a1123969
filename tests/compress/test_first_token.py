"""Where the tokenizer begins every text with a token, so does all that is calibrated, searched, judged and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compress.language.recover import training_windows
from compress.language.setup import prepare, read_windows
from compress.pipeline import METHODS
from compress.recipes.tyr.card import body
from compress.report.build import read_report
from compress.run.folder import Run
from compress.schema.recipe import load_recipe
from tests.command import Job, compress, one_error
from tests.tiny import let_it_add, tiny_job

pytestmark = pytest.mark.usefixtures("done_once")

SHORT = (
    *("--set", "tyr.iterations=1", "--set", "tyr.search.generations=0", "--set", "bench=null"),
    *("--set", "tyr.run_off={windows: 2, solutions: 2}", "--set", "layouts=[per-layer]"),
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("gemma")
    model, recipe = tiny_job(folder, "gemma3_text")
    let_it_add(model, "<s> $A")
    return Job(model, recipe, folder)


@pytest.fixture(scope="module")
def run(gemma: Job) -> Path:
    """A whole run of a model whose tokenizer begins every text; tests must not change it."""
    ran = compress("prune", gemma.model, "--recipe", gemma.recipe, "--out", gemma.folder / "run", *SHORT)
    assert ran.code == 0, ran.err
    return gemma.folder / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return read_report(run)


def test_every_window_of_a_run_begins_with_it(run: Path) -> None:
    windows = load_file(run / "text" / "windows.safetensors")
    assert {n: len(ids) for n, ids in windows.items()} == {
        **{"calibration": 8, "search": 3, "judging": 2},
        **{"evaluation.0": 2, "evaluation.1": 2},
    }
    for name, ids in windows.items():
        assert ids.shape[1] == 32 and (ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any(), name


def test_the_windows_of_recovery_begin_with_it(gemma: Job, tmp_path: Path) -> None:
    words = ["recover={method: full, steps: 1, batch: 2, windows: 11}", *SHORT[1::2]]
    setup = prepare(str(gemma.model), load_recipe(str(gemma.recipe), METHODS, words))
    with Run.open(tmp_path / "run") as run:
        ids = training_windows(run, setup, read_windows(setup, run))
    assert ids.shape == (11, 32) and (ids[:, 0] == 1).all()


def test_the_fingerprint_begins_as_a_text_does(run: Path) -> None:
    tokens = load_file(run / "model" / "fingerprint.safetensors")["tokens"]
    assert tokens.shape == (1, 64) and tokens[0, 0] == 1


def test_figures_are_those_of_transformers_behind_the_token(run: Path, gemma: Job, report: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    ids = load_file(run / "text" / "windows.safetensors")["evaluation.0"]
    for label, model in (
        ("dense", AutoModelForCausalLM.from_pretrained(gemma.model)),
        ("pruned", AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True)),
    ):
        labels = ids.clone()
        labels[:, 0] = -100
        with torch.no_grad():
            loss = model.eval()(ids, labels=labels).loss
        assert report["quality"]["texts"][0][f"{label}_ppl"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_lock_file_report_and_card_say_so(run: Path, report: dict[str, Any]) -> None:
    first, end = {"id": 1, "token": "<s>"}, {"id": 2, "token": "</s>"}
    want = {"begins_with": [first], "ends_with": [], "between": [end, first]}
    assert yaml.safe_load((run / "recipe.lock.yaml").read_text())["text"] == want == report["text"]
    card = (run / "release" / "README.md").read_text()
    assert "Every window begins with `<s>`" in card and "Between two documents stands `</s>` `<s>`." in card
    assert "[:, :-" not in card


def test_a_prompt_of_the_card_is_not_ended_where_the_tokenizer_ends_texts(report: dict[str, Any]) -> None:
    ending = {**report, "text": {"begins_with": [], "ends_with": [{"id": 2, "token": "</s>"}]}}
    text = body(ending, {})
    assert '["input_ids"][:, :-1]' in text and "the tokenizer puts no token in front" in text


def test_the_exported_models_prompt_begins_with_it(run: Path, report: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    greedy = report["export"]["onnx"]["pruned"]["greedy"]
    ids = tokenizer(greedy["prompt"], return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 1
    words = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad():
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **words)[0, ids.shape[1] :].tolist()
    new = new[: new.index(2)] if 2 in new else new
    assert greedy["tokens"] == len(new) and tokenizer.decode(new) in greedy["text"]


def test_eval_gives_the_reports_figures_from_the_run_and_from_the_text(
    gemma: Job, run: Path, report: dict[str, Any]
) -> None:
    ran = compress("eval", run / "model", "--like", run, "--json")
    found = json.loads(ran.out)
    assert found["begins_with"] == ["<s>"]
    for text in report["quality"]["texts"]:
        assert found["texts"][text["name"]]["ppl"] == pytest.approx(text["pruned_ppl"], rel=1e-6)
        assert found["texts"][text["name"]]["tokens"] == 2 * 31
    other = compress("eval", run / "model", "--text", gemma.folder / "first.txt", "--windows", "4", "--length", "16")
    assert other.code == 0 and "every window begins with <s>" in other.out and "(60 tokens)" in other.out


def test_figures_of_a_release_are_measured_again_behind_the_token(run: Path) -> None:
    ran = compress("verify", run / "release", "--measure", "--json")
    claims = {c["claim"]: c for c in json.loads(ran.out)["claims"]}
    assert ran.code == 0, ran.err
    for name in ("perplexity, first text", "perplexity, first text, dense"):
        assert claims[name]["verdict"] == "holds", claims[name]


def test_a_run_whose_windows_began_otherwise_is_not_gone_on_with(gemma: Job, tmp_path: Path) -> None:
    model = Path(shutil.copytree(gemma.model, tmp_path / "model"))
    words = ("prune", model, "--recipe", gemma.recipe, "--out", tmp_path / "run", *SHORT, "--until", "plan")
    assert compress(*words).code == 0
    let_it_add(model, "$A </s>")
    one_error(compress(*words), 1, "begins_with", "--fresh")


@pytest.mark.parametrize(
    ("template", "first"), [pytest.param("$A </s>", [], marks=pytest.mark.slow), ("<pad> <s> $A", [0, 1])]
)
def test_global_mp_evaluates_as_the_tokenizer_begins(template: str, first: list[int], tmp_path: Path) -> None:
    model, recipe = tiny_job(tmp_path, "qwen2")
    let_it_add(model, template)
    texts = recipe.read_text()[recipe.read_text().index("evaluation:") : recipe.read_text().index("tyr:")]
    head = "method: global-mp\ndescription: small\nsparsity: 0.3\nexport: null\nbench: null\n"
    recipe.write_text(head + texts)
    ran = compress("prune", model, "--recipe", recipe, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    windows = load_file(tmp_path / "run" / "text" / "windows.safetensors")
    for ids in windows.values():
        assert ids.shape == (2, 32) and all(row[: len(first)] == first for row in ids.tolist())
    assert [row["id"] for row in report["text"]["begins_with"]] == first
    tokens = load_file(tmp_path / "run" / "model" / "fingerprint.safetensors")["tokens"]
    assert tokens[0, : len(first)].tolist() == first
    said = "Every window begins with `<pad>` `<s>`" if first else "the tokenizer puts no token in front"
    assert said in (tmp_path / "run" / "release" / "README.md").read_text()
    found = json.loads(compress("eval", tmp_path / "run" / "model", "--like", tmp_path / "run", "--json").out)
    assert found["texts"]["first text"]["tokens"] == 2 * (32 - max(1, len(first)))
    assert found["texts"]["first text"]["ppl"] == pytest.approx(report["quality"]["texts"][0]["pruned_ppl"], rel=1e-6)
