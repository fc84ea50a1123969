"""Two real models in bfloat16, as they are published: from plan to card, in folders with names of people's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.data.documents import load_documents
from compress.errors import CompressError
from compress.models.sources import resolve
from compress.schema.recipe import SourceSpec
from tests.command import compress
from tests.models.test_quantised import fp8_model
from tests.tiny import RECIPE, prose

pytestmark = pytest.mark.slow

# As little as a whole run can have: 4 windows, two candidates a sublayer, no search.
LITTLE = (
    "calibration.sources=[{embedded: python-docs}]",
    "calibration.windows=4",
    "calibration.length=128",
    "evaluation.texts=[{name: docs, source: {embedded: python-docs}}]",
    "evaluation.windows=2",
    "evaluation.length=128",
    "evaluation.curve=[]",
    "layouts=[per-layer]",
    "tyr.iterations=1",
    "tyr.levels=3",
    "tyr.interval=0.25",
    "tyr.head_levels=2",
    "tyr.run_off=null",
    "tyr.search.windows=1",
    "tyr.search.length=64",
    "tyr.search.positions=16",
    "tyr.search.singles_windows=1",
    "tyr.search.generations=0",
    "export.greedy_tokens=4",
    "bench=null",
)
SETTINGS = [word for text in LITTLE for word in ("--set", text)]


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_a_bfloat16_checkpoint_goes_from_plan_to_card(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    try:
        found = resolve(name).folder
    except CompressError as e:
        pytest.skip(f"{name} cannot be had here: {e.what}")
    dense = tmp_path / f"{name} – as published (ü)"
    AutoModelForCausalLM.from_pretrained(found, dtype=torch.bfloat16).save_pretrained(dense)
    for path in found.iterdir():
        if "token" in path.name or path.suffix in (".jinja", ".model"):
            shutil.copy(path, dense / path.name)
    # As many an instruct model has it; transformers refuses to save this.
    generation = dense / "generation_config.json"
    sampling = {**json.loads(generation.read_text()), "do_sample": False, "temperature": 0.6, "top_p": 0.9}
    generation.write_text(json.dumps(sampling))

    ran = compress("plan", dense, "-r", "tyr", "--json", *SETTINGS)
    assert ran.code == 0, ran.err
    planned = json.loads(ran.out)
    text = tmp_path / "some text.txt"
    text.write_text("\n\n".join(load_documents(SourceSpec(embedded="python-docs"), "evaluation"))[:200_000])
    ran = compress("eval", dense, "--text", text, "--windows", 2, "--length", 128, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["geometric_mean"] < 200

    out = tmp_path / "run – one"
    ran = compress("prune", dense, "-r", "tyr", "--sparsity", 0.2, "--out", out, *SETTINGS, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert report["size"]["dense"]["total_parameters"] == planned["total_parameters"]
    assert report["size"]["backbone_removed"] == pytest.approx(0.2, abs=5e-3)
    (layout,) = report["verify"]["layouts"]
    # Saved in bfloat16, reckoned in float32 on both sides: what is left is the order of additions.
    assert layout["max_logit_difference"] <= layout["tolerance"]
    for label in ("dense", "pruned"):
        facts = report["export"]["onnx"][label]
        assert facts["largest_difference"] <= facts["tolerance"] and facts["greedy"]["tokens"] > 0
    saved = load_file(out / "release" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    assert json.loads((out / "release" / "generation_config.json").read_text())["temperature"] == 0.6
    ran = compress("verify", out, "--json")
    assert ran.code == 0, ran.err
    verdicts = {c["claim"]: c["verdict"] for c in json.loads(ran.out)["claims"]}
    assert verdicts["onnx gives what torch gives"] == verdicts["model loads in a clean process"] == "holds"
    assert "does not hold" not in verdicts.values()
    card = (out / "release" / "README.md").read_text()
    assert compress("card", out, "--out", tmp_path / "card").code == 0
    assert (tmp_path / "card" / "README.md").read_text() == card and name in card
    figures = {
        "ppl": report["quality"]["geometric_mean"],
        "reload": layout["max_logit_difference"],
        "onnx": [report["export"]["onnx"][label]["largest_difference"] for label in ("dense", "pruned")],
    }
    print(name, figures)


def test_an_fp8_checkpoint_goes_from_plan_to_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("calibration", "first", "second")):
        (tmp_path / f"{name}.txt").write_text(prose(120, seed))
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    folder, _ = fp8_model(tmp_path / "model")
    run = tmp_path / "run"
    ran = compress("prune", folder, "-r", tmp_path / "tiny.yaml", "--out", run, "--set", "bench=null")
    assert ran.code == 0, ran.err
    words = "weights dequantised from fp8 to bfloat16"
    for path in (run / "recipe.lock.yaml", run / "release" / "README.md", run / "release" / "report.json"):
        assert words in path.read_text()
    assert {t.dtype for t in load_file(run / "release" / "model.safetensors").values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((run / "release" / "config.json").read_text())
    verified = compress("verify", run, "--measure")
    assert verified.code == 0, verified.err
    assert not [p for p in run.rglob("*") if p.name == "dequantised.json"]
