"""`compress run`: the same greedy text from each artefact of a model, in its own runtime; what is none is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import compress as api
from compress.data.special import begun
from compress.models.reading import load_tokenizer
from compress.verbs import generate
from compress.words.escape import terminal
from tests.command import Job, compress, one_error
from tests.docs.pages import blocks

pytestmark = pytest.mark.usefixtures("done_once")

TEXT = "the cat sat on the mat"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def want(folder: Path, text: str, tokens: int, begin: bool = True) -> str:
    """Greedily by whole forward passes, without a cache."""
    model, tokenizer = api.load(folder), load_tokenizer(folder)
    ids = begun(tokenizer, text) if begin else tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def told(finished: Path) -> str:
    return want(finished / "model", TEXT, 8)


@pytest.mark.parametrize("name", [".", "model", "release", "export-pruned", "release/onnx"])
def test_a_run_its_model_its_release_and_its_export_go_on_alike(finished: Path, told: str, name: str) -> None:
    facts = api.generate(finished / name, TEXT, tokens=8)
    result = facts["results"]["model"]
    assert result["text"] == told
    assert result["runtime"].startswith("onnxruntime" if name in ("export-pruned", "release/onnx") else "torch")
    assert result["prompt_tokens"] == len(begun(load_tokenizer(finished / "model"), TEXT))
    assert result["tokens"] <= 8 and result["ttft"] > 0 and result["rate"] > 0


def test_the_text_is_printed_and_what_it_took_is_said_beside_it(finished: Path, told: str) -> None:
    ran = compress("run", finished, TEXT, "--tokens", 8)
    assert ran.code == 0, ran.err
    assert ran.out == "\n".join(map(terminal, (TEXT + told).strip().split("\n"))) + "\n"
    said = ran.err.strip().splitlines()[-1]
    assert "in torch " in said and "tokens a second (one run, no benchmark)" in said
    ran = compress("run", finished, TEXT, "--tokens", 1, "--json")
    (result,) = json.loads(ran.out)["results"].values()
    assert result["tokens"] == 1 and result["rate"] is None


def test_dense_and_pruned_stand_beside_each_other(finished: Path, job: Job, told: str) -> None:
    facts = api.generate(finished, TEXT, tokens=8, dense=True)
    assert list(facts["results"]) == ["dense", "pruned"]
    assert facts["results"]["pruned"]["text"] == told
    assert facts["results"]["dense"]["text"] == want(job.model, TEXT, 8) != told
    ran = compress("run", finished, TEXT, "--tokens", 8, "--dense")
    assert ran.out.startswith("dense:\nthe cat sat") and "\npruned:\nthe cat sat" in ran.out
    assert ran.err.count("(one run, no benchmark)") == 2


def test_a_chat_goes_through_the_template(job: Job, tmp_path: Path) -> None:
    shutil.copytree(job.model, tmp_path / "model")
    one_error(compress("run", tmp_path / "model", TEXT, "--chat"), 1, "no chat template")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    facts = api.generate(tmp_path / "model", TEXT, tokens=6, chat=True)
    # As the template has it, without what the tokenizer would put in front.
    assert facts["results"]["model"]["text"] == want(job.model, f"user: {TEXT}\na:", 6, begin=False)
    assert generate.lines(facts)[0] == facts["results"]["model"]["text"].strip().split("\n")[0]


def test_an_export_elsewhere_needs_a_tokenizer_named(finished: Path, told: str, tmp_path: Path) -> None:
    shutil.copytree(finished / "export-pruned", tmp_path / "there" / "onnx")
    there = tmp_path / "there" / "onnx"
    one_error(compress("run", there, TEXT), 2, "no tokenizer beside it", "--tokenizer")
    assert api.generate(there, TEXT, tokens=8, tokenizer=finished)["results"]["model"]["text"] == told
    one_error(compress("run", finished, TEXT, "--tokenizer", finished), 2, "a tokenizer of its own")


def test_what_cannot_go_on_is_refused_in_one_sentence(finished: Path, job: Job, tmp_path: Path) -> None:
    one_error(compress("run", finished, "  \n"), 2, "the text is empty")
    ran = compress("run", finished, TEXT, "--tokens", 0)
    assert ran.code == 2 and ran.out == "" and "Invalid value for '--tokens'" in ran.err
    with pytest.raises(api.UsageError, match="0 tokens cannot be generated"):
        api.generate(finished, TEXT, tokens=0)
    one_error(compress("run", finished, TEXT, "--tokens", 256), 2, "the model reads 256")
    one_error(compress("run", job.model, TEXT, "--dense"), 2, "no dense model beside the pruned one")
    one_error(compress("run", finished / "export-pruned" / "decode.onnx", TEXT), 2, "one file of an export")
    one_error(compress("run", tmp_path / "nothing-here", TEXT), 2, "nothing-here")
    shutil.copytree(finished / "export-pruned", tmp_path / "above" / "onnx")
    (tmp_path / "above" / "empty").mkdir()
    one_error(
        compress("run", tmp_path / "above", TEXT), 2, "there are models in it: onnx", str(tmp_path / "above/onnx")
    )
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "network.json").write_text("{}")
    one_error(compress("run", tmp_path / "net", TEXT), 1, "this is a network")
    (tmp_path / "net-onnx").mkdir()
    (tmp_path / "net-onnx" / "model.onnx").write_bytes(b"")
    one_error(compress("run", tmp_path / "net-onnx", TEXT), 1, "the export of a network")
    shutil.copytree(job.model, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    one_error(compress("run", tmp_path / "model", TEXT), 1, "the tokenizer cannot be read")


@pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="needs the extra [genai]")
def test_a_release_becomes_a_genai_folder_that_goes_on_as_it_did(
    finished: Path, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = compress("export", finished / "release", "--out", tmp_path / "out", "--format", "genai")
    assert ran.code == 0, ran.err
    made = tmp_path / "out" / "genai"
    result = api.generate(made, TEXT, tokens=8)["results"]["model"]
    assert result["text"] == told and result["runtime"].startswith("onnxruntime_genai 0.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").rename("demo-genai")
    made = made.parents[1] / "demo-genai" / "genai"
    (lines,) = (b for b in blocks("python") if b.page.name == "onnxruntime-genai.md")
    code = lines.text.replace("genai-int4", "genai").replace("The sea", TEXT)
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True).stdout
    assert said.startswith(told)
    one_error(compress("run", made, TEXT, "--chat"), 1, "chat template")
    one_error(compress("run", made, TEXT, "--tokens", 400), 2, "the model reads 256")
    one_error(compress("run", made, TEXT, "--tokenizer", made), 2, "a tokenizer of its own")
    with monkeypatch.context() as patch:
        patch.setattr("onnxruntime_genai.__version__", "0.4.0")
        one_error(compress("run", made, TEXT), 2, "0.18 or newer, and 0.4.0 is installed")
