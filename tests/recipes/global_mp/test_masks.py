"""Masks and sparse models on disk, and the 2:4 pattern: exact round trips, every fault named."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import CompressError
from compress.recipes.global_mp.magnitude import global_masks
from compress.recipes.global_mp.masks import (
    load_masks,
    masked,
    pack_bits,
    save_masks,
    unpack_bits,
    weights_sha,
)
from compress.recipes.global_mp.packed import pack, pack_file, unpack, unpack_file, unpack_folder
from compress.recipes.global_mp.pattern import check_two_four, fits, two_four_mask, two_four_masks
from tests.recipes.global_mp.test_magnitude import Code

SHAPES: dict[str, list[int]] = {"a.weight": [3, 7], "b.weight": [2, 4, 3, 3], "scalar": [], "row": [1]}


@pytest.fixture
def masks() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in SHAPES.items()}


@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back_and_lie_as_the_format_says(values: list[bool]) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.numel() == -(-len(values) // 8)
    assert [bool(bits[i // 8] >> (i % 8) & 1) for i in range(len(values))] == values
    assert torch.equal(unpack_bits(bits, [len(values)]), mask)


def test_masks_come_back(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    save_masks(tmp_path / "masks.safetensors", masks, "f" * 64)
    found = load_masks(tmp_path / "masks.safetensors", "f" * 64, SHAPES)
    assert found.keys() == masks.keys()
    assert all(torch.equal(found[name], masks[name]) for name in masks)
    # Made again, and one at a time, it is the same file.
    for _ in range(10):
        save_masks(tmp_path / "again.safetensors", iter(masks.items()), "f" * 64)
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "masks.safetensors").read_bytes()


def _edit(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def _longer(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["a.weight"] = torch.zeros(4, dtype=torch.uint8)


def _padding(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors["a.weight"] = torch.full((3,), 255, dtype=torch.uint8)


def _gone(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    del tensors["row"]


def _no_json(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["compress"] = "{"


def _no_shapes(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["compress"] = metadata["compress"].replace('"shapes"', '"shape"')


def _other_format(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["compress"] = metadata["compress"].replace('"format": "compress', '"format": "other')


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_longer, "the mask of a.weight is damaged"),
        (_padding, "bits behind the last of 21 weights"),
        (_gone, "row has no shape or no bits"),
        (_no_json, "the metadata of the mask file is no JSON"),
        (_no_shapes, "the shapes in the mask file cannot be read"),
        (_other_format, "this is no mask file"),
    ],
)
def test_a_damaged_mask_file_is_named(
    tmp_path: Path, masks: dict[str, Tensor], change: Callable[[dict[str, Tensor], dict[str, str]], None], part: str
) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks, "f" * 64)
    _edit(path, change)
    with pytest.raises(CompressError) as error:
        load_masks(path)
    assert part in error.value.what and error.value.where == str(path) and error.value.fix


def test_a_mask_file_of_another_model_is_refused(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks, "f" * 64)
    with pytest.raises(CompressError, match="belong to other weights"):
        load_masks(path, "e" * 64)
    for shapes, part in (
        ({**SHAPES, "row": [2]}, r"the mask of row is \[1\], the weight \[2\]"),
        ({**SHAPES, "a.weight": [7, 3]}, r"the mask of a.weight is \[3, 7\], the weight \[7, 3\]"),
        ({**SHAPES, "more": [1]}, "the masks of 1 layers are missing, such as more"),
        ({"row": [1]}, "there are masks of 3 unknown layers, such as a.weight"),
    ):
        with pytest.raises(CompressError, match=part):
            load_masks(path, "f" * 64, shapes)


def test_what_is_no_whole_file_is_refused(tmp_path: Path, masks: dict[str, Tensor]) -> None:
    path = tmp_path / "masks.safetensors"
    with pytest.raises(CompressError, match="there is no mask file here"):
        load_masks(path)
    save_masks(path, masks, "f" * 64)
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CompressError, match="damaged or cut short"):
            load_masks(path)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(CompressError, match="a pickle is never read"):
        load_masks(path)


def test_the_hash_of_weights_sees_every_change_and_no_order() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0]], dtype=torch.bfloat16)}
    sha = weights_sha(weights.items)
    assert sha == weights_sha(lambda: reversed(weights.items()))
    for changed in (
        {**weights, "a": torch.tensor([1.0, 2.0000002])},
        {**weights, "a": torch.tensor([[1.0, 2.0]])},
        {**weights, "b": torch.tensor([[3.0]])},
        {"a": weights["a"], "c": weights["b"]},
    ):
        assert sha != weights_sha(changed.items)


def test_a_masked_weight_is_zero_without_a_sign() -> None:
    weight = torch.tensor([-1.0, 2.0, -0.0])
    assert masked(weight, torch.tensor([False, True, True])).view(torch.int32).tolist() == [
        0,
        torch.tensor(2.0).view(torch.int32).item(),
        -(2**31),
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
    st.lists(st.integers(0, 4), max_size=3),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_any_tensor_comes_back_bit_for_bit(dtype: torch.dtype, shape: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 9
    weight = torch.where(torch.rand(shape, generator=generator) < density, weight, torch.zeros(()))
    weight = torch.where(torch.rand(shape, generator=generator) < 0.1, torch.tensor(-0.0), weight).to(dtype)
    if weight.is_floating_point() and weight.numel():
        weight.view(-1)[0] = float("nan")
    stored, shapes = pack({"w": weight, "other": torch.ones(2)})
    back = unpack(stored, shapes)
    assert back.keys() == {"w", "other"} and back["w"].dtype == dtype and back["w"].shape == weight.shape
    assert torch.equal(back["w"].reshape(-1).view(torch.uint8), weight.reshape(-1).view(torch.uint8))


def test_a_dense_tensor_is_not_made_larger() -> None:
    stored, shapes = pack({"w": torch.ones(100)})
    assert stored.keys() == {"w"} and not shapes


def test_a_packed_file_comes_back_with_its_metadata(tmp_path: Path) -> None:
    tensors = {"w": torch.eye(40), "norm": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    pack_file(tmp_path / "model.safetensors", tmp_path / "model.packed.safetensors")
    assert (tmp_path / "model.packed.safetensors").stat().st_size < 0.2 * (
        tmp_path / "model.safetensors"
    ).stat().st_size
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    packed = tmp_path / "packed"
    packed.mkdir()
    (tmp_path / "model.packed.safetensors").rename(packed / "model.packed.safetensors")
    (tmp_path / "config.json").rename(packed / "config.json")
    unpack_folder(packed, tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {"model.safetensors", "config.json"}
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(found[n], tensors[n]) for n in tensors) and found.keys() == tensors.keys()
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with pytest.raises(CompressError, match="not empty"):
        unpack_folder(packed, tmp_path / "back")
    with pytest.raises(CompressError, match="no packed model"):
        unpack_folder(tmp_path, tmp_path / "elsewhere")


def test_a_damaged_packed_file_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.eye(40)}, tmp_path / "model.safetensors")
    path = tmp_path / "p.safetensors"

    def values(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        tensors["w.values"] = tensors["w.values"][:-1].clone()

    def gone(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
        del tensors["w.bits"]

    for change, part in ((values, "39 values for 40 places"), (gone, "has no bits"), (_other_format, "no packed file")):
        pack_file(tmp_path / "model.safetensors", path)
        _edit(path, change)
        with pytest.raises(CompressError, match=part):
            unpack_file(path, tmp_path / "out.safetensors")
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(CompressError, match="a pickle is never read"):
        unpack_file(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 32 + 0.1), (torch.bfloat16, 1 / 16 + 0.1)])
def test_at_90_percent_a_packed_resnet_50_is_under_a_fifth(tmp_path: Path, dtype: torch.dtype, share: float) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    model: Any = ResNetForImageClassification(ResNetConfig())  # ResNet-50
    model = model.to(dtype)
    layers = {n: p.data for n, p in model.named_parameters() if p.dim() >= 2}
    total = sum(w.numel() for w in layers.values())
    keep = global_masks(layers, round(0.9 * total))
    state = {n: masked(t, keep[n]) if n in keep else t for n, t in model.state_dict().items()}
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "model.safetensors")
    pack_file(tmp_path / "model.safetensors", tmp_path / "packed.safetensors")
    ratio = (tmp_path / "packed.safetensors").stat().st_size / (tmp_path / "model.safetensors").stat().st_size
    # A bit and a tenth of the values; norms and statistics stay dense.
    assert ratio == pytest.approx(share, abs=0.006)
    unpack_file(tmp_path / "packed.safetensors", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)


def _two_of_four_by_hand(weight: Tensor) -> Tensor:
    mask = torch.ones_like(weight, dtype=torch.bool)
    places = itertools.product(*(range(n) for n in (weight.shape[0], *weight.shape[2:])))
    for out, *rest in places:
        for start in range(0, weight.shape[1], 4):
            group = [(abs(float(weight[(out, i, *rest)])), i) for i in range(start, start + 4)]
            for _, i in sorted(group)[:2]:
                mask[(out, i, *rest)] = False
    return mask


@pytest.mark.parametrize("shape", [(5, 8), (3, 12, 3, 3), (2, 4, 5), (2, 4, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_of_every_four_input_channels_go(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for w in (weight.to(dtype), (weight * 2).round().to(dtype), torch.zeros(shape, dtype=dtype)):
        mask = two_four_mask(w)
        assert torch.equal(mask, _two_of_four_by_hand(w))
        assert mask.float().mean() == 0.5
        assert check_two_four({"w": masked(w, mask)}) == ["w"]


def test_a_layer_that_does_not_fit_stays_dense() -> None:
    weights = {"first": torch.randn(8, 3, 3, 3), "depthwise": torch.randn(8, 1, 3, 3), "linear": torch.randn(4, 8)}
    assert [fits(w) for w in weights.values()] == [False, False, True]
    masks = two_four_masks(weights)
    assert masks["first"].all() and masks["depthwise"].all() and masks["linear"].float().mean() == 0.5
    pruned = {name: masked(w, masks[name]) for name, w in weights.items()}
    assert check_two_four(pruned) == ["linear"]
    del weights["linear"]
    with pytest.raises(CompressError, match="no prunable layer has input channels in fours"):
        two_four_masks(weights)


def test_a_broken_pattern_names_the_layers() -> None:
    good = masked(torch.ones(4, 8), two_four_mask(torch.ones(4, 8)))
    bad = good.clone()
    bad[1, 4:7] = 1.0
    with pytest.raises(CompressError, match="1 layers do not have the pattern 2:4, the first is bad"):
        check_two_four({"good": good, "bad": bad})
    with pytest.raises(CompressError, match="the weight w holds NaN"):
        two_four_masks({"w": torch.full((4, 4), float("nan"))})
