"""Checkpoints that see as well: what is taken out is their function of text, what is put back sees as before."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import CompressError
from compress.language.checkpoint import check_code, save_model, verify_clean
from compress.language.plan import BlockPlan, Plan
from compress.models.composite import Names, carried, put_back
from compress.models.families import family_for
from compress.models.folder import weights_of
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.saved import find as find_saved
from compress.models.sources import describe, resolve
from tests.seeing import saved_seeing, seeing, with_image
from tests.tiny import tokens

TITLES = {"gemma3": "Gemma3ForConditionalGeneration", "qwen3_vl": "Qwen3VLForConditionalGeneration"}
MORE = ("smolvlm", "mistral3", "lfm2_vl")  # held by `make slow`
PLAN = (BlockPlan(tuple(range(5, 10)), tuple(range(0, 48, 2))), BlockPlan((), tuple(range(3, 48))))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in weights_of(folder).files for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    "model_type", ["gemma3", "qwen3_vl", "llava", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)]
)
def test_the_language_part_gives_what_the_whole_gives_on_text(tmp_path: Path, model_type: str) -> None:
    folder = saved_seeing(tmp_path / "seeing", model_type)
    found = resolve(str(folder))
    assert found.whole is not None and found.whole.path == folder and found.source.endswith(found.whole.words)
    config = load_config(found.folder)
    alone = load_model(found.folder, family_for(config))
    ids = tokens(2, 24)
    with torch.no_grad():
        want, got = (m(input_ids=ids).logits for m in (seeing(model_type), alone))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert load_tokenizer(found.folder).vocab_size <= config.vocab_size
    # What `plan` reads says the same, and no weight of it.
    outlined, said = describe(str(folder))
    assert outlined.source == found.source and said.to_dict() == config.to_dict() | {"_name_or_path": str(folder)}
    assert find_saved(str(folder)) == ("text", found.folder)


def pruned(folder: Path, out: Path) -> tuple[Any, Any, Names]:
    """Prunes the language part of the checkpoint in ``folder`` by `PLAN`, and puts it back into ``out``."""
    found = resolve(str(folder))
    family = family_for(load_config(found.folder))
    model = load_model(found.folder, family)
    plan = Plan(PLAN)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    saved = out.parent / "language"
    for place in (saved, out):
        place.mkdir()
    save_model(
        model, family, counts, saved, tokenizer=load_tokenizer(found.folder), dtype=torch.float32, tokens=tokens(1, 16)
    )
    assert found.whole is not None
    names = put_back(found.whole, found.folder, saved, family, out)
    (out / "fingerprint.safetensors").write_bytes((saved / "fingerprint.safetensors").read_bytes())
    return family, plan, names


@pytest.mark.parametrize("model_type", ["gemma3", "qwen3_vl"])
def test_what_is_put_back_sees_as_the_dense_one_with_zeros_in_place(tmp_path: Path, model_type: str) -> None:
    folder, out = saved_seeing(tmp_path / "seeing", model_type), tmp_path / "whole"
    family, plan, names = pruned(folder, out)
    before, after = tensors(folder), tensors(out)
    others = {name for name in before if names.inner(name) is None}
    assert others and others == {name for name in after if names.inner(name) is None}
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert carried(out, names) == carried(folder, names) and carried(out, names).tensors == len(others)
    assert sum(t.numel() for t in after.values()) < sum(t.numel() for t in before.values())

    cls = runpy.run_path(str(out / "modeling_compress.py"))[f"Compressed{TITLES[model_type]}"]
    made, info = cls.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    masked, alone = seeing(model_type), load_model(resolve(str(folder)).folder, family)
    plan.mask(alone, family)
    own = masked.get_decoder().state_dict()
    masked.get_decoder().load_state_dict({n: t for n, t in alone.model.state_dict().items() if n in own})
    assert set(own) == set(alone.model.state_dict())
    inputs = with_image(model_type)
    with torch.no_grad():
        want, got = (m.eval()(**inputs).logits for m in (masked, made))
        blind = masked(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(blind, want, rtol=1e-3, atol=1e-3)  # it does look at the image


def test_it_loads_in_a_clean_process_or_says_what_is_missing(tmp_path: Path) -> None:
    folder, out = saved_seeing(tmp_path / "seeing", "llava"), tmp_path / "whole"
    _, _, names = pruned(folder, out)
    check_code(out)
    found = verify_clean(out)
    assert found["class"] == "CompressedLlavaForConditionalGeneration"
    assert found["parameters"] == sum(t.numel() for t in tensors(out).values())
    # A weight of the other parts that is not there would be a random one: text alone would not show it.
    gone = next(name for name in sorted(tensors(out)) if names.inner(name) is None)
    places = {name: path for name, path in weights_of(out).places.items()}
    left = {name: tensor for name, tensor in load_file(places[gone]).items() if name != gone}
    save_file(left, places[gone], metadata={"format": "pt"})
    index = out / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    del facts["weight_map"][gone]
    index.write_text(json.dumps(facts))
    with pytest.raises(CompressError, match="has no weight for"):
        verify_clean(out)


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_that_scales_its_logits_otherwise_is_refused_beforehand(tmp_path: Path) -> None:
    saved_seeing(tmp_path / "seeing", "aya_vision")
    with pytest.raises(CompressError, match=r"on text the whole gives other logits than its language part"):
        describe(str(tmp_path / "seeing"))


def test_a_language_part_that_does_not_stand_alone_is_named(tmp_path: Path) -> None:
    saved_seeing(tmp_path / "seeing", "glm4v")
    with pytest.raises(CompressError, match=r"the language part of 'glm4v' is a 'glm4v_text', of which"):
        describe(str(tmp_path / "seeing"))


def test_one_that_was_pruned_is_not_pruned_again(tmp_path: Path) -> None:
    pruned(saved_seeing(tmp_path / "seeing", "smolvlm"), tmp_path / "whole")
    with pytest.raises(CompressError, match="was pruned already"):
        resolve(str(tmp_path / "whole"))


def test_a_weight_that_is_missing_is_named_as_the_checkpoint_calls_it(tmp_path: Path) -> None:
    folder = saved_seeing(tmp_path / "seeing", "gemma3")
    held = tensors(folder)
    gone = next(name for name in held if name.endswith("layers.1.mlp.up_proj.weight") and "vision" not in name)
    del held[gone]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=rf"0 places .* {gone} is missing"):
        resolve(str(folder))


def test_parts_that_are_not_kept_apart_are_refused_before_one_is_lost(tmp_path: Path) -> None:
    folder = saved_seeing(tmp_path / "seeing", "gemma3")
    mixed = {f"model.{name.removeprefix('language_model.model.')}": tensor for name, tensor in tensors(folder).items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"stands among the language model's weights .* and is none of them"):
        resolve(str(folder))


def test_blocks_that_are_told_by_number_what_was_seen_are_not_taken_out(tmp_path: Path) -> None:
    folder, saved = saved_seeing(tmp_path / "seeing", "qwen3_vl"), tmp_path / "language"
    found = resolve(str(folder))
    family = family_for(load_config(found.folder))
    saved.mkdir()
    for path in found.folder.iterdir():
        (saved / path.name).write_bytes(path.read_bytes())
    edited(saved, num_hidden_layers=1)
    assert found.whole is not None
    (tmp_path / "out").mkdir()
    with pytest.raises(CompressError, match="by their number"):
        put_back(found.whole, found.folder, saved, family, tmp_path / "out")
