"""Model folders as people publish them: settings that cannot be saved, tokenizers and embeddings of unlike size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.language.checkpoint import save_model
from compress.models.families import family_for
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.sources import resolve
from compress.models.streaming import stream_model
from compress.verbs import in_memory
from tests.command import compress, one_error
from tests.models.test_model_folder import edit
from tests.tiny import prose, saved_tiny, tokens, word_tokenizer

# transformers reads this, and refuses to save it once anything in it is changed.
SAMPLING = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 20}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = saved_tiny(tmp_path / "Modèle (v2) – 模型 & more")
    edit(folder / "generation_config.json", **SAMPLING)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "generation_config.json").read_text())
    return {k: found.get(k) for k in (*SAMPLING, "eos_token_id")}


@pytest.mark.parametrize("streamed", [False, True])
def test_settings_for_generation_are_saved_as_they_were_read(model: Path, tmp_path: Path, streamed: bool) -> None:
    family = family_for(load_config(model))
    cpu = torch.device("cpu")
    loaded = stream_model(model, family, 1, cpu) if streamed else load_model(model, family)
    loaded.generation_config.max_length = 99
    with pytest.raises(ValueError, match="temperature"):
        loaded.generation_config.save_pretrained(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    more = {"tokenizer": load_tokenizer(model), "dtype": torch.float32, "tokens": tokens(1, 16)}
    save_model(loaded, family, None, out, **more)
    assert settings(out) == settings(model) and settings(out)["temperature"] == 0.6
    assert load_model(out, family).generation_config.temperature == 0.6
    if streamed:
        return
    # The same of a model that is in memory.
    with in_memory.saved_text(loaded, more["tokenizer"]) as folder:
        assert settings(Path(folder)) == settings(model)
    assert loaded.generation_config.temperature == 0.6


def test_a_folder_of_any_name_is_planned_and_evaluated(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "un texte – 文.txt"
    text.write_text(prose(40))
    ran = compress("eval", model, "--text", text, "--windows", 2, "--length", 32, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["texts"][str(text)]["tokens"] > 0
    assert resolve(str(model)).name == model.name
    ran = compress("plan", model, "-r", "tyr-demo", "--set", "tyr.round_to=4", "--json")
    assert ran.code == 0 and json.loads(ran.out)["model"] == model.name, ran.err


@pytest.mark.parametrize("rows", [300, 512])
def test_an_embedding_with_more_rows_than_the_tokenizer_has_words_is_kept_whole(tmp_path: Path, rows: int) -> None:
    """Vocabularies are padded to a multiple of 64 or 128: no text has such an id, and every row stays."""
    folder = saved_tiny(tmp_path / "model", vocab_size=rows)
    family = family_for(load_config(folder))
    loaded, tokenizer = load_model(folder, family), load_tokenizer(folder)
    assert len(tokenizer) < rows == tokenizer.embedding_rows == family.geometry(loaded.config).vocab
    out = tmp_path / "out"
    out.mkdir()
    save_model(loaded, family, None, out, tokenizer=tokenizer, dtype=torch.float32, tokens=tokens(1, 16))
    again = load_model(out, family)
    assert again.get_input_embeddings().weight.shape[0] == rows
    assert torch.equal(again(tokens(1, 16)).logits, loaded(tokens(1, 16)).logits)
    (tmp_path / "t.txt").write_text(prose(40))
    assert compress("eval", out, "--text", tmp_path / "t.txt", "--windows", 2, "--length", 32).code == 0


def test_a_tokenizer_larger_than_the_embedding_is_refused_only_where_a_text_needs_it(tmp_path: Path) -> None:
    folder = saved_tiny(tmp_path / "model")
    made = word_tokenizer(folder)
    made.add_tokens(["<picture>", "<sound>"])
    made.save_pretrained(folder)
    edit(folder / "config.json", vocab_size=len(made) - 1)
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held["model.embed_tokens.weight"] = held["model.embed_tokens.weight"][: len(made) - 1].clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text(prose(40))
    words = ("--windows", 2, "--length", 32)
    ran = compress("eval", folder, "--text", tmp_path / "t.txt", *words)
    assert ran.code == 0, ran.err
    (tmp_path / "t.txt").write_text("<sound> " + prose(40))
    one_error(compress("eval", folder, "--text", tmp_path / "t.txt", *words), 1, "<sound>")
    assert compress("plan", folder, "-r", "tyr-demo", "--set", "tyr.round_to=4").code == 0


def test_an_adapters_folder_says_what_to_merge_it_into(tmp_path: Path) -> None:
    folder = tmp_path / "my adapter ü"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for verb in (("plan", folder, "-r", "tyr-demo"), ("eval", folder, "--text", __file__)):
        one_error(compress(*verb), 1, "its base is org/base", "merge it into its base model first")
    # A GGUF beside it does not make a model of it.
    (folder / "x.gguf").write_bytes(b"GGUF")
    one_error(compress("plan", folder, "-r", "tyr-demo"), 1, "this is an adapter, not a model")
