"""Global MP on the real smollm2-135m: minutes, and the network where nothing is cached yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import compress

pytestmark = pytest.mark.slow

# Text that every Python carries, few windows, no other sparsity, no measurement of latency.
SMALL = (
    "evaluation.texts=[{name: docs, source: {embedded: python-docs}}]",
    "evaluation.windows=4",
    "evaluation.length=256",
    "evaluation.curve=[]",
    "bench=null",
)
SETTINGS = [word for text in SMALL for word in ("--set", text)]
# SmolLM2-135M: 30 blocks of 576 x 576 q and o, 192 x 576 k and v, and 3 x 1,536 x 576.
LINEAR = 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)


def test_smollm2_from_its_name_to_its_card(tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--sparsity", "0.3", "--out", out, *SETTINGS, "--json")
    ran = compress("prune", "smollm2-135m", "-r", "global-mp", *words)
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    size = report["size"]
    assert size["prunable_weights"] == LINEAR and size["pruned_weights"] == round(0.3 * LINEAR)
    assert size["total_parameters"] == 134_515_008
    # The package's weights are 4-bit ones dequantised: many are equal, and the count is exact all the same.
    assert size["nonzero_weights"] <= LINEAR - size["pruned_weights"]
    (text,) = report["quality"]["texts"]
    assert text["dense_ppl"] < text["pruned_ppl"] < 3 * text["dense_ppl"]
    assert report["export"]["onnx"]["pruned"]["greedy"]["tokens"] > 0
    assert compress("verify", out).code == 0


def test_smollm2_at_90_percent_packs_its_linear_layers_in_under_a_fifth(tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = compress(
        "prune",
        "smollm2-135m",
        "-r",
        "global-mp",
        "--sparsity",
        "0.9",
        *SETTINGS,
        "--until",
        "model",
        "--out",
        out,
        "--json",
    )
    assert ran.code == 0, ran.err
    size = json.loads(ran.out)["size"]
    dense_rest = 4 * (size["total_parameters"] - LINEAR)  # embeddings and norms in float32
    assert (size["bytes"]["packed"] - dense_rest) / (4 * LINEAR) < 0.14
    assert size["bytes"]["packed"] / size["bytes"]["dense"] < 0.33
