"""Weights on disk: every fault is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from compress.errors import CompressError
from compress.language.checkpoint import save_model, verify_clean
from compress.models.families import family_for
from compress.models.reading import check_weights, load_model, weight_files
from tests.tiny import tiny, tokens, word_tokenizer
from tests.warm import WARM

pytestmark = pytest.mark.processes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = tiny("llama")
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(
        model,
        family_for(model.config),
        None,
        folder,
        tokenizer=word_tokenizer(folder),
        dtype=torch.float32,
        tokens=tokens(1, 16),
    )
    return folder


@pytest.mark.cold
def test_the_padded_layout_loads_with_stock_classes(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, forks = verify_clean(saved), WARM.forks
    assert fresh["class"] == "LlamaForCausalLM"
    # A fork of a clean interpreter, as most tests have it, finds the same.
    monkeypatch.setattr(WARM, "cold", False)
    assert verify_clean(saved) == fresh and WARM.forks == forks + 1
    assert not (saved / "modeling_compress.py").exists()


def test_a_folder_without_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CompressError, match="no safetensors weights"):
        weight_files(saved)


def test_a_missing_shard(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m-1.safetensors"}}))
    with pytest.raises(CompressError, match="1 of 1 weight files are missing"):
        weight_files(saved)


def test_a_truncated_file(saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CompressError, match="damaged or cut short"):
        check_weights(saved)


def test_nan_in_a_weight_is_named(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.layers\.2\.mlp\.down_proj\.weight holds 1 NaN"):
        check_weights(saved)


def test_a_missing_weight_is_named(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"1 weights are missing, the first is model\.layers\.1\.mlp\.up_proj"):
        load_model(saved, family_for(tiny("llama").config))


def test_weights_changed_behind_its_back_fail_the_clean_reload(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="logits differ"):
        verify_clean(saved)


def test_a_model_larger_than_memory_is_reloaded_with_its_rest_on_disk(finished: Path) -> None:
    held, dispatched = verify_clean(finished / "model"), verify_clean(finished / "model", memory=200_000)
    assert held["offloaded"] == [] and dispatched["offloaded"] != []
    assert dispatched["max_logit_difference"] <= dispatched["tolerance"]
