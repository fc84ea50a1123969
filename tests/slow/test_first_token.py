"""The real gemma-3-270m, whose perplexity doubles without its begin-of-text token: minutes, and the network once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.data.documents import load_documents
from compress.data.text import pack
from compress.errors import CompressError
from compress.language.evaluate import perplexity
from compress.models.families import family_for
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.sources import resolve
from compress.schema.recipe import SourceSpec
from tests.command import compress

pytestmark = pytest.mark.slow

WINDOWS, LENGTH = 4, 256


@pytest.fixture(scope="module")
def gemma() -> Path:
    try:
        return resolve("gemma-3-270m").folder
    except CompressError as e:
        pytest.skip(f"gemma-3-270m cannot be had here: {e.what}")


def test_gemma_is_evaluated_behind_its_first_token(gemma: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(load_documents(SourceSpec(embedded="python-docs"), "evaluation")))
    ran = compress("eval", gemma, "--text", text, "--windows", WINDOWS, "--length", LENGTH, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["begins_with"] == ["<bos>"]
    behind = found["texts"][str(text)]["ppl"]
    # The same tokens without it: the model's own windows, less their first.
    tokenizer = load_tokenizer(gemma)
    ids = pack([text.read_text()], tokenizer, LENGTH, WINDOWS, "text").ids
    assert (ids[:, 0] == tokenizer.bos_token_id).all() and ids.shape == (WINDOWS, LENGTH)
    model = load_model(gemma, family_for(load_config(gemma)))
    without = float(perplexity(model, ids[:, 1:])["ppl"])
    assert without > 1.5 * behind, (without, behind)
    # And it is what transformers says of them.
    labels = ids.clone()
    labels[:, 0] = -100
    with torch.no_grad():
        losses = [float(model(row[None], labels=own[None]).loss) for row, own in zip(ids, labels, strict=True)]
    assert behind == pytest.approx(torch.tensor(losses).double().mean().exp().item(), rel=1e-4)
