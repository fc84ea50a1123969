"""The real SmolLM2-135M with blocks that differ, in a stock llama.cpp: tokens, logits and greedy text are torch's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data.special import begun
from compress.exporters.formats import BuildOptions, Source, make
from compress.exporters.gguf import Saved
from compress.exporters.llama_cpp.vocabulary import PROBE
from compress.language.checkpoint import save_model
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.sources import resolve

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp")]


@pytest.fixture(scope="module")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a quarter of each block gone, more of every other one, and attention of one, FFN of another, both of a
    third. Units go by position alone: what is asked is whether llama.cpp computes what torch does."""
    dense = resolve("smollm2-135m").folder
    family = family_for(load_config(dense))
    model = load_model(dense, family)
    geometry = family.geometry(model.config)
    blocks = []
    for i, g in enumerate(geometry.blocks):
        groups = 2 if i % 2 else 3
        neurons = 1024 if i % 2 else 1280
        blocks.append(BlockPlan(tuple(range(groups * g.group)), tuple(range(neurons))))
    blocks[7] = BlockPlan((), blocks[7].neurons)
    blocks[11] = BlockPlan(blocks[11].heads, ())
    blocks[15] = BlockPlan((), ())
    plan = Plan(tuple(blocks))
    counts = plan.counts(geometry)
    plan.apply(model, family)
    folder = tmp_path_factory.mktemp("quarter")
    tokenizer = load_tokenizer(dense)
    ids = torch.tensor([begun(tokenizer, PROBE)[:32]])
    save_model(model, family, counts, folder, tokenizer=tokenizer, dtype=torch.float32, tokens=ids)
    return folder


def built(folder: Path, out: Path, precision: str) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)
    window = tuple(begun(tokenizer, PROBE)[:256])
    saved = Saved(tokenizer, (window,), 0, "a text of many kinds", "SmolLM2-135M-pruned")
    return make(Source(folder, saved=saved), out, BuildOptions("gguf", precision))


def test_float16_is_torchs_model_token_for_token(quarter: Path, tmp_path: Path) -> None:
    facts = built(quarter, tmp_path / "out", "f16")
    parity, model = facts["parity"], facts["components"]["model"]
    assert (model["arch"], model["blocks"]) == ("deci", 29)
    assert max(parity["outputs"].values()) < 1e-2 and parity["kl"] < 1e-3 and parity["top"] > 0.99
    assert parity["greedy"] == {"tokens": 24, "same": 24}
    assert abs(parity["perplexity"]["gguf"] / parity["perplexity"]["torch"] - 1) < 1e-2
    assert "blocks without FFN that have one of zeros: 11" in facts["notes"]


@pytest.mark.parametrize(("precision", "bits", "most"), [("q8_0", 8.6, 0.05), ("q4_k_m", 6.7, 0.6)])
def test_fewer_bits_are_as_small_as_they_say_and_near(
    quarter: Path, precision: str, bits: float, most: float, tmp_path: Path
) -> None:
    facts = built(quarter, tmp_path / "out", precision)
    (size,) = facts["bytes"].values()
    assert 8 * size < bits * facts["components"]["model"]["parameters"] + 8 * 4_000_000  # the vocabulary
    assert 0 < facts["parity"]["kl"] < most
