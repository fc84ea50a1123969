"""A checkpoint that sees as well, from `plan` to `verify`: its language part pruned, the rest carried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.claims.verify import Subject, _carried
from compress.models.folder import weights_of
from tests.command import compress
from tests.seeing import saved_seeing
from tests.tiny import tiny_job

SHORT = ("--set", "export=null", "--set", "bench=null", "--set", "layouts=[per-layer]", "--set", "tyr.iterations=1")
GLOBAL_MP = """\
method: global-mp
description: small
sparsity: 0.5
evaluation:
  texts:
    - {name: first, source: {files: [FOLDER/first.txt]}}
  windows: 2
  length: 32
export: null
bench: null
global-mp:
  floor: 0.005
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def test_a_run_prunes_the_language_part_and_releases_the_whole(tmp_path: Path) -> None:
    _, recipe = tiny_job(tmp_path / "job")
    seeing, run = saved_seeing(tmp_path / "seeing", "gemma3", dtype=torch.bfloat16), tmp_path / "run"
    (seeing / "preprocessor_config.json").write_text('{"do_resize": true}')
    planned = compress("plan", seeing, "-r", recipe, *SHORT)
    assert "source   local folder, the language part of Gemma3ForConditionalGeneration" in planned.out
    ran = compress("prune", seeing, "-r", recipe, *SHORT, "--out", run)
    assert ran.code == 0, ran.err
    assert "whole    Gemma3ForConditionalGeneration with it: " in ran.out
    release = run / "release"
    assert (release / "multimodal" / "preprocessor_config.json").read_text() == '{"do_resize": true}'
    report = json.loads((release / "report.json").read_text())
    facts = report["multimodal"]
    assert facts["dense"]["parameters"] == sum(t.numel() for t in load_file(seeing / "model.safetensors").values())
    assert facts["dense"]["parameters"] - facts["pruned"]["parameters"] == (
        report["size"]["dense"]["total_parameters"] - report["size"]["pruned"]["total_parameters"]
    )
    card = (release / "README.md").read_text()
    assert f"{facts['pruned']['parameters']:,} parameters of {facts['dense']['parameters']:,}" in card

    # The same command writes no seal again; both folders hold what they say.
    stamp = (run / "multimodal" / "seal.json").stat().st_mtime_ns
    assert compress("prune", seeing, "-r", recipe, *SHORT, "--out", run).code == 0
    assert (run / "multimodal" / "seal.json").stat().st_mtime_ns == stamp
    said = compress("verify", release)
    assert said.code == 0 and " 0 do not hold" in said.out, said.err
    assert "their bytes" in said.out and "as CompressedGemma3ForConditionalGeneration" in said.out

    # Another vision part, though every file were sealed anew: the report's own sum of the other parts shows it.
    lied = tmp_path / "lied"
    _copy(release, lied)
    path = next(p for p in sorted((lied / "multimodal").glob("*.safetensors")) if "vision" in str(load_file(p).keys()))
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if "vision" in n)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = {str(lied / "multimodal"): {"parameters": facts["pruned"]["parameters"]}}
    verdicts = {c.claim: c.verdict for c in _carried(Subject(lied, lied, report, None), loaded)}
    assert verdicts == {
        "parameters of multimodal": "holds",
        "tensors beside the language part": "holds",
        "their bytes": "does not hold",
    }


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())


@pytest.mark.slow
def test_masks_go_into_the_whole_as_well(tmp_path: Path) -> None:
    tiny_job(tmp_path / "job")
    recipe = tmp_path / "mp.yaml"
    recipe.write_text(GLOBAL_MP.replace("FOLDER", str(tmp_path / "job")))
    seeing, run = saved_seeing(tmp_path / "seeing", "qwen3_vl"), tmp_path / "run"
    ran = compress("prune", seeing, "-r", recipe, "--out", run)
    assert ran.code == 0, ran.err
    assert not (run / "multimodal" / "modeling_compress.py").exists()  # transformers' own class loads it
    language, whole = (
        {name: tensor for path in weights_of(run / place).files for name, tensor in load_file(path).items()}
        for place in ("model", "multimodal")
    )
    zeros = [int((t == 0).sum()) for t in language.values()]
    assert sum(zeros) > 0.3 * sum(t.numel() for t in language.values())
    assert all(torch.equal(whole["model.language_model." + n.removeprefix("model.")], t) for n, t in language.items())
    assert compress("verify", run).code == 0
