"""A model whose blocks are read when they are run, against the same model held in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.language import checkpoint
from compress.language.evaluate import perplexity
from compress.models.families import family_for
from compress.models.reading import load_model
from compress.models.streaming import StreamedBlocks, is_streamed, only_blocks, stream_model
from tests.command import Job, compress
from tests.tiny import ARCHITECTURES, tiny, tokens

pytestmark = [pytest.mark.usefixtures("done_once"), pytest.mark.processes]

CPU = torch.device("cpu")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_streamed_model_gives_the_logits_of_the_held_one(model_type: str, tmp_path: Path) -> None:
    model = tiny(model_type)
    model.save_pretrained(tmp_path)
    family = family_for(model.config)
    streamed = stream_model(tmp_path, family, 1, CPU)
    with torch.no_grad():
        assert torch.equal(streamed(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert is_streamed(streamed) and not is_streamed(model)
    held = load_model(tmp_path, family)
    found, expected = perplexity(streamed, tokens(5, 20)), perplexity(held, tokens(5, 20))
    assert found["ppl"] == pytest.approx(expected["ppl"], rel=1e-6) and found["tokens"] == expected["tokens"]


def test_only_the_blocks_that_are_kept_are_not_read_again(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    streamed = stream_model(tmp_path, family_for(model.config), 2, CPU)
    blocks = streamed.model.layers
    assert isinstance(blocks, StreamedBlocks) and len(blocks) == 4
    size = sum(p.nbytes for p in model.model.layers[0].parameters())
    first = blocks[0]
    assert blocks[0] is first and blocks.bytes_read == size
    blocks[1], blocks[0], blocks[2]
    assert blocks.bytes_read == 3 * size and blocks[0] is first  # block 1 had to go, not the later used block 0
    assert blocks[1] is not None and blocks.bytes_read == 4 * size
    assert blocks[-1] is blocks[3]
    # What is not a block is held; what is has no weights until it is read.
    assert all(p.device.type == "meta" for p in blocks.skeleton(0).parameters())
    assert {p.device.type for n, p in streamed.named_parameters() if "layers" not in n} == {"cpu"}


def test_what_is_not_a_block_leaves_the_device_while_blocks_are_walked_and_comes_back(tmp_path: Path) -> None:
    # There is no second device here: torch's device without storage stands in for a GPU, so only the moves are seen.
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    streamed = stream_model(tmp_path, family_for(model.config), 1, CPU)
    blocks = streamed.model.layers
    expected = streamed.lm_head.weight.clone()
    with only_blocks(streamed, torch.device("meta")):
        assert streamed.model.layers is blocks and torch.equal(streamed.lm_head.weight, expected)
    assert streamed.model.layers is blocks and blocks[0].mlp.down_proj.weight.device.type == "cpu"
    rest = {p.device.type for n, p in streamed.named_parameters() if not n.startswith("model.layers.")}
    assert rest == {"meta"}


def test_a_model_that_is_held_or_has_no_device_of_its_own_stays_where_it_is(tmp_path: Path) -> None:
    model = tiny("llama")
    with only_blocks(model, torch.device("meta")):
        pass
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_weights_that_do_not_fit_the_configuration_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    family, file = family_for(model.config), tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if k != "model.norm.weight"}, file)
    with pytest.raises(CompressError, match=r"model\.norm\.weight is missing"):
        stream_model(tmp_path, family, 1, CPU)
    save_file({k: v[:5] if k.endswith("2.mlp.up_proj.weight") else v for k, v in whole.items()}, file)
    streamed = stream_model(tmp_path, family, 1, CPU)
    with pytest.raises(CompressError, match=r"block 2's weights do not fit.*up_proj"):
        streamed.model.layers[2]


def test_a_run_that_streams_ends_with_the_bytes_of_one_that_does_not(job: Job, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ran = compress(
        "prune", job.model, "--recipe", job.recipe, "--out", out, "--until", "evaluation",
        "--set", "memory={stream: true, cache_blocks: 1, offload: true}",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    for name in ("plan/plan.safetensors", "plan/plan.json", "model/model.safetensors", "model/fingerprint.safetensors"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name
    found, expected = (
        json.loads((run / "evaluation-pruned" / "evaluation.json").read_text())["texts"] for run in (out, finished)
    )
    for name, text in expected.items():
        assert found[name]["ppl"] == pytest.approx(text["ppl"], rel=1e-6)


def test_a_large_model_is_written_in_shards_that_transformers_loads(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 30_000)
    out = tmp_path / "run"
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", out, "--until", "model")
    assert ran.code == 0, ran.err  # reloaded by a clean process before it was sealed
    index = json.loads((out / "model" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = 0
    for name in files:
        assert (out / "model" / name).stat().st_size < 60_000
        with safe_open(out / "model" / name, "pt") as file:
            total += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  (it has keys() alone)
    assert total == index["metadata"]["total_size"]
