"""What transformers refuses of a folder is named by its file and key, whatever its own words are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from compress.errors import CompressError
from compress.models.families import family_for
from compress.models.reading import load_config, load_model, load_tokenizer
from tests.tiny import SHAPE, saved_tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny(tmp_path_factory.mktemp("at-fault") / "model")


def copied(folder: Path, place: Path) -> Path:
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (place / path.name).write_bytes(path.read_bytes())
    return place


def configured(place: Path, kind: str, **changes: Any) -> Path:
    """A folder of a configuration alone."""
    (place / "config.json").write_text(json.dumps({**AutoConfig.for_model(kind).to_dict(), **changes}))
    return place


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "nosuch"}},
        {"rope_scaling": {"type": "linear", "factor": "x"}},
        {"text_config": 3},
        {"id2label": {"a": 1}},
        {"num_labels": "x"},
        {"model_type": ["llama"]},
        {"quantization_config": []},
    ],
)
def test_the_key_of_a_configuration_is_named(change: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    (key,) = change
    path = copied(llama, tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CompressError) as e:
        load_config(tmp_path)
    assert e.value.what.startswith((f"{key}: ", f"{key} is ")) and e.value.where == str(path)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("llama", "num_labels", 10**9), ("llama", "num_labels", -1), ("gpt2", "n_layer", 10**9),
        ("gpt2", "n_layer", 0), ("gpt2", "n_head", 0), ("gpt2", "n_embd", 10**12), ("gpt2", "n_inner", 0),
        ("gpt2", "n_positions", 0), ("gpt2", "activation_function", "nosuch"), ("opt", "ffn_dim", -1),
        ("mixtral", "num_local_experts", 10**9), ("bart", "decoder_layers", 10**9), ("llama", "of_ours", 10**16),
    ],
)  # fmt: skip
def test_sizes_of_every_family_have_bounds_by_whatever_name(kind: str, key: str, value: object, tmp_path: Path) -> None:
    """transformers makes an entry for each label and a module for each layer or expert that is asked for."""
    began = time.process_time()
    with pytest.raises(CompressError) as e:
        load_config(configured(tmp_path, kind, **{key: value}))
    assert e.value.what.startswith(f"{key} is ") and e.value.where == str(tmp_path / "config.json")
    assert time.process_time() - began < 5


def test_sizes_of_a_part_that_is_no_text_have_bounds_too(llama: Path, tmp_path: Path) -> None:
    for part in ({"num_hidden_layers": 10**9}, {"stages": [{"depth": 1, "layers": [3, 10**9]}]}):
        with pytest.raises(CompressError, match=r"^vision_config\.[a-z0-9_.]+ is 1000000000, not from 0"):
            load_config(configured(tmp_path, "llama", **SHAPE, vision_config=part))


@pytest.mark.parametrize("change", [{"n_head": 7}, {"n_embd": 41}])
def test_a_configuration_that_does_not_fit_is_not_blamed_on_its_architecture(
    change: dict[str, int], tmp_path: Path
) -> None:
    small = {"n_layer": 2, "n_head": 4, "n_embd": 40, "vocab_size": 300, "n_positions": 64}
    with pytest.raises(CompressError, match=r"no model can be made of the configuration: .*divisible") as e:
        family_for(load_config(configured(tmp_path, "gpt2", **{**small, **change})))
    assert e.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("tokenizer.json", b"\xef\xbb\xbf{}", "no JSON: Unexpected UTF-8 BOM"),
        ("tokenizer.json", b'{"model": 3}', "the tokenizer cannot be read"),
        ("tokenizer_config.json", b"[]", "the whole is a list"),
        ("tokenizer_config.json", "{}".encode("utf-16"), "not UTF-8"),
        ("tokenizer_config.json", b'{"model_max_length": "x"}', "model_max_length: the tokenizer cannot be read"),
        ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token: the tokenizer cannot be read"),
        ("special_tokens_map.json", b"[]", "the whole is a list"),
        ("added_tokens.json", b"3", "the whole is a whole number"),
        ("chat_template.jinja", b"\xff{% for", "not UTF-8"),
    ],
)
def test_the_file_of_a_tokenizer_is_named(name: str, data: bytes, said: str, llama: Path, tmp_path: Path) -> None:
    (copied(llama, tmp_path) / name).write_bytes(data)
    with pytest.raises(CompressError) as e:
        load_tokenizer(tmp_path)
    assert said in e.value.what and e.value.where == str(tmp_path / name) and e.value.fix


def test_settings_for_generation_that_are_none_are_named(llama: Path, tmp_path: Path) -> None:
    copied(llama, tmp_path)
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(CompressError) as e:
        load_model(tmp_path, family_for(load_config(tmp_path)))
    assert e.value.where == str(tmp_path / "generation_config.json")
