"""Dialogues through the verbs: calibrated on beside prose, judged on, told in lock file, report and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from compress.claims.remeasure import measured
from compress.claims.verify import Subject
from compress.data.documents import load_dialogues
from compress.language.setup import prepare, read_windows
from compress.pipeline import METHODS
from compress.report.build import read_report
from compress.run.folder import Run
from compress.schema.recipe import SourceSpec, load_recipe
from tests.chats import BEGINS, PLAIN, chat, let_it_chat, write_chats
from tests.command import Job, compress, one_error
from tests.tiny import let_it_add, tiny_job

JUDGED = "{texts: [{name: chats, source: {dialogues: [FOLDER/chats.jsonl]}}, {name: prose, source: {files: [FOLDER/first.txt]}}], windows: 3, length: 64}"  # noqa: E501


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("chats")
    model, recipe = tiny_job(folder)
    let_it_add(model, "<s> $A")
    let_it_chat(model, BEGINS)
    write_chats(folder / "chats.jsonl", 60)
    return Job(model, recipe, folder)


@pytest.fixture(scope="module")
def run(job: Job) -> Path:
    """A whole run judged on dialogues and on prose; tests must not change it."""
    recipe = job.folder / "global-mp.yaml"
    head = "method: global-mp\ndescription: small\nsparsity: 0.3\nexport: null\nbench: null\n"
    recipe.write_text(f"{head}evaluation: {JUDGED.replace('FOLDER', str(job.folder))}\n")
    ran = compress("prune", job.model, "--recipe", recipe, "--out", job.folder / "run", "--set", "evaluation.curve=[]")
    assert ran.code == 0, ran.err
    return job.folder / "run"


def test_windows_are_calibrated_on_dialogues_by_their_share(job: Job, tmp_path: Path) -> None:
    source = f"{{dialogues: [{job.folder}/chats.jsonl], weight: 3}}"
    prose = f"{{files: [{job.folder}/calibration.txt]}}"
    words = [f"calibration.sources=[{source}, {prose}]", f"evaluation={JUDGED.replace('FOLDER', str(job.folder))}"]
    setup = prepare(str(job.model), load_recipe(str(job.recipe), METHODS, words))
    with Run.open(tmp_path / "run") as run:
        windows = read_windows(setup, run)
    every = torch.cat([windows.calibration, windows.search])  # 8 and 3
    texts = [setup.tokenizer.decode(ids) for ids in every]
    assert sum(text.startswith("<s><user>\n") for text in texts) == 8 and all(t.count("<s>") == 1 for t in texts)
    # And on none that is judged on.
    held_out = load_dialogues(SourceSpec(dialogues=[str(job.folder / "chats.jsonl")]), "evaluation")
    assert [d.messages for d in held_out] == [tuple((m["role"], m["content"]) for m in chat(i)) for i in range(54, 60)]
    assert not any(d.messages[0][1][:20] in text for d in held_out for text in texts)


def test_figures_are_those_of_transformers_on_the_assistants_tokens(job: Job, run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    report, tensors = read_report(run), load_file(run / "text" / "windows.safetensors")
    ids, scored = tensors["evaluation.0"], tensors["scored.0"]
    assert "scored.1" not in tensors
    answers = {m["content"] for i in range(54, 60) for m in chat(i) if m["role"] == "assistant"}
    said = [part for row, own in zip(ids, scored, strict=True) for part in tokenizer.decode(row[own]).split("</s>")]
    assert {part for part in said if part in answers} and all(any(a.startswith(p) for a in answers) for p in said)
    for label, model in (
        ("dense", AutoModelForCausalLM.from_pretrained(job.model)),
        ("pruned", AutoModelForCausalLM.from_pretrained(run / "model")),
    ):
        with torch.no_grad():
            loss = model.eval()(ids, labels=ids.masked_fill(~scored, -100)).loss
        assert report["quality"]["texts"][0][f"{label}_ppl"] == pytest.approx(float(loss.exp()), rel=1e-4)


def test_lock_file_report_and_card_say_how_dialogues_were_written_and_scored(run: Path) -> None:
    report = read_report(run)
    facts = yaml.safe_load((run / "recipe.lock.yaml").read_text())["text"]
    assert facts == report["text"] and facts["chat_template"].keys() == {"sha256"}
    row = report["quality"]["texts"][0]
    scored = int(load_file(run / "text" / "windows.safetensors")["scored.0"].sum())
    assert (row["scored"], row["tokens"]) == ("assistant", scored) and "scored" not in report["quality"]["texts"][1]
    conditions = {r["name"]: r.get("conditions") for r in report["rows"]}
    assert conditions["perplexity, chats"] == f"3 windows of 64 tokens, of which the assistant's {scored} are scored"
    card = (run / "release" / "README.md").read_text()
    assert "Dialogues are written by the tokenizer's chat template" in card
    assert "Of chats the assistant's words alone are scored." in card and str(run.parent) not in card.split("##")[0]


def test_eval_measures_the_same_from_the_run_and_dialogues_of_a_file(job: Job, run: Path, tmp_path: Path) -> None:
    want = read_report(run)["quality"]["texts"][0]
    found = json.loads(compress("eval", run / "model", "--like", run, "--json").out)["texts"]["chats"]
    assert found["ppl"] == pytest.approx(want["pruned_ppl"], rel=1e-6)
    assert (found["tokens"], found["scored"]) == (want["tokens"], "assistant")
    path = write_chats(tmp_path / "others.jsonl", 9, first=70)
    ran = compress("eval", run / "model", "--dialogues", path, "--windows", "2", "--length", "64")
    assert ran.code == 0 and "tokens of the assistant)" in ran.out, ran.err


def test_a_release_is_measured_again_from_the_dialogues(run: Path) -> None:
    release = run / "release"
    claims = measured(Subject(release, release, read_report(run), None), None, None)
    verdicts = {c.claim: c.verdict for c in claims}
    assert verdicts["perplexity, chats"] == verdicts["perplexity, chats, dense"] == "holds", claims


# --- what is wrong, said by `plan` already ----------------------------------------------------------------------------


def planned(model: Path, recipe: Path, chats: Path) -> Any:
    return compress(
        "plan", model, "--recipe", recipe, "--on", "8xh100", "--set", f"calibration.sources=[{{dialogues: [{chats}]}}]"
    )


def test_plan_says_what_is_wrong_with_template_and_lines(tmp_path: Path) -> None:
    model, recipe = tiny_job(tmp_path)
    chats = write_chats(tmp_path / "chats.jsonl", 20)
    one_error(
        planned(model, recipe, chats), 1, "no chat template", f"{model}/chat_template.jinja", "files: [text/*.txt]"
    )
    (model / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role + ' here') }}")
    one_error(planned(model, recipe, chats), 1, "no user here", f"{chats}, line 1", "chat_template.jinja")
    (model / "chat_template.jinja").write_text(PLAIN)
    assert planned(model, recipe, chats).code == 0
    chats.write_text(chats.read_text() + '{"messages": []}\n')
    one_error(planned(model, recipe, chats), 1, "the dialogue is empty", f"{chats}, line 21")
    one_error(planned(model, recipe, tmp_path / "none.jsonl"), 1, "no file matches", "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    one_error(planned(model, recipe, tmp_path / "empty.jsonl"), 1, "0 dialogues cannot be split", "empty.jsonl")
    one_error(
        compress("plan", model, "--recipe", recipe, "--set", "calibration.sources=[{dialogues: x, files: [y]}]"),
        *(2, "dialogues"),
    )
    one_error(compress("eval", model, "--dialogues", chats), 1, "the dialogue is empty", "line 21")
    one_error(compress("eval", model, "--dialogues", chats, "--like", tmp_path), 2, "--dialogues FILE")
    one_error(compress("eval", model, "--dialogues", chats, "--text", chats), 2, "as text and as dialogues")


def test_a_run_whose_dialogues_or_template_are_others_is_not_gone_on_with(job: Job, run: Path) -> None:
    chats, template = job.folder / "chats.jsonl", job.model / "chat_template.jinja"
    words = ("prune", job.model, "--recipe", job.folder / "global-mp.yaml", "--set", "evaluation.curve=[]")
    for path in (chats, template):
        own = path.read_text()
        try:
            path.write_text(own.replace("cat", "dog") if path == chats else own + "\n!")
            one_error(compress(*words, "--out", run), 1, path.stem.replace("chats", "dialogues"), "--fresh")
        finally:
            path.write_text(own)
