"""`import compress`: the verbs as functions, and that no room or module takes their names."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.cli import app
from tests.command import Job
from tests.test_rooms import MODULES

pytestmark = pytest.mark.usefixtures("done_once")

VERBS = ("prune", "plan", "evaluate", "export", "bench", "gate", "generate", "verify", "load", "sweep")


def test_every_name_is_what_it_says_after_every_room_is_imported() -> None:
    for module in MODULES:
        if module not in ("compress.__main__", "compress.exporters.bench.agent", "compress.exporters.bench.receiver"):
            importlib.import_module(module)
    for name in VERBS:
        found = getattr(compress, name)
        assert inspect.isfunction(found) and found.__module__ == "compress.api" and found.__doc__, name
    assert set(VERBS) < set(compress.__all__) <= set(dir(compress))
    taken = {module.split(".")[1] for module in MODULES if module.count(".")}
    assert not set(compress.__all__) & taken


def test_import_is_quick_since_nothing_heavy_comes_with_it() -> None:
    code = (
        "import sys, compress; print([m for m in ('torch', 'numpy', 'pydantic', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verb_of_the_command_line_that_makes_something_is_there() -> None:
    typed = {c.name or c.callback.__name__.rstrip("_") for c in app.registered_commands if c.callback is not None}
    assert {"prune", "plan", "eval", "export", "bench", "gate", "run", "sweep", "verify"} <= typed


def test_prune_gives_what_the_command_line_gives(job: Job, finished: Path, tmp_path: Path) -> None:
    counted: list[tuple[str, int, int]] = []
    result = compress.prune(
        job.model, job.recipe, tmp_path / "run", until="model", progress=lambda *step: counted.append(step)
    )
    same = [(folder / "model" / "model.safetensors").read_bytes() for folder in (finished, result.folder)]
    assert same[0] == same[1]
    assert result.report["size"]["backbone_removed"] > 0
    assert counted and all(0 <= done <= total for _, done, total in counted)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert result.model(tokens).logits.shape[:2] == (1, 20)
    assert compress.plan(job.model, job.recipe)["remove"] > 0
    assert compress.verify(result.saved)["fail"] == 0


def test_a_language_model_in_memory_is_pruned_like_its_folder(job: Job, finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.model)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    result = compress.prune(model, job.recipe, tmp_path / "run", tokenizer=tokenizer, until="plan")
    plans = [(folder / "plan" / "plan.safetensors").read_bytes() for folder in (finished, result.folder)]
    assert plans[0] == plans[1]
    with torch.no_grad():
        model.model.norm.weight += 1
    with pytest.raises(compress.UsageError, match="another model lies there"):
        compress.prune(model, job.recipe, tmp_path / "run", tokenizer=tokenizer, until="plan")


def test_a_language_model_in_memory_is_planned_evaluated_and_exported(job: Job, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.model)
    own: Any = {"tokenizer": AutoTokenizer.from_pretrained(job.model)}
    text: Any = {"text": [str(job.folder / "first.txt")], "windows": 2, "length": 32}
    assert compress.plan(model, job.recipe, **own)["remove"] == compress.plan(job.model, job.recipe)["remove"]
    found = compress.evaluate(model, **text, **own)
    assert found["texts"] == compress.evaluate(job.model, **text)["texts"]
    assert found["model"] == "LlamaForCausalLM"
    assert compress.export(model, tmp_path / "onnx", **own)["out"] == str(tmp_path / "onnx")
    assert (tmp_path / "onnx" / "prefill.onnx").is_file()
    with pytest.raises(compress.UsageError, match="tokenizer"):
        compress.evaluate(model, **text)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda job, out: compress.prune(job.model, "no-such", out), "no-such"),
        (lambda job, out: compress.prune(job.model, job.recipe, out, until="never"), "unknown stage"),
        (lambda job, out: compress.prune(torch.nn.Linear(2, 2), "global-mp-demo", out), "FILE.py:FUNCTION"),
        (lambda job, out: compress.prune(torch.nn.Linear(2, 2), job.recipe), "no name"),
        (lambda job, out: compress.prune(job.model, job.recipe, out, sparsity=object()), "sparsity"),
        (lambda job, out: compress.prune(job.model, job.recipe, out, sparsty=0.5), "sparsity"),
        (lambda job, out: compress.plan(torch.nn.Linear(2, 2), "global-mp-demo"), "in memory"),
        (lambda job, out: compress.plan(5, job.recipe), "no model"),
    ],
)
def test_a_wrong_call_is_one_error_and_leaves_nothing(job: Job, tmp_path: Path, call: Any, words: str) -> None:
    with pytest.raises(compress.UsageError) as e:
        call(job, tmp_path / "run")
    assert words in str(e.value)
    assert not list(tmp_path.iterdir())
