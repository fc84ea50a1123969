"""Networks with several heads and the detector: sizes of what they give, seeds, ONNX, and that the detector learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.data.boxes import grids
from compress.data.images import Split, Splits
from compress.data.packaged import compose
from compress.data.tasks import Task, by_task
from compress.errors import UsageError
from compress.exporters.onnx_module import write_checked_module
from compress.models.sources import NetworkAlias, alias_names, load_alias
from compress.models.zoo import build
from compress.networks.train import evaluate, train
from compress.schema.sections import DataSpec, TrainSpec

pytestmark = pytest.mark.processes

HEADS = {"pixels": {"depth": 1, "normals": 3, "labels": 5}, "labels": {"kind": 4, "words": 7}}
SMALL = {"widths": [8, 16], "blocks": [1, 1], "decoder": 8, "hidden": 8}
TASKS = (
    Task("depth", "depth"),
    Task("normals", "normals"),
    Task("labels", "labels", tuple("abcde")),
    Task("kind", "classes", tuple("abcd")),
    Task("words", "attributes", tuple("abcdefg")),
)


@pytest.mark.parametrize("name", ["multitask-resnet", "multitask-mobilenet"])
@pytest.mark.parametrize("how", ["pyramid", "joined"])
@pytest.mark.parametrize("size", [(32, 32), (25, 31)])
def test_pixels_have_the_inputs_size_and_every_task_its_head(name: str, how: str, size: tuple[int, int]) -> None:
    model = build(name, {**SMALL, **HEADS, "how": how}).eval()
    found = by_task(model(torch.randn(2, 3, *size)), TASKS)
    assert all(found[t.name].shape[2:] == size for t in TASKS[:3])
    assert found["kind"].shape == (2, 4) and found["words"].shape == (2, 7)


@pytest.mark.parametrize("name", ["multitask-resnet", "multitask-mobilenet", "detector"])
def test_the_seed_decides_the_weights(name: str) -> None:
    arguments = {} if name == "detector" else {**SMALL, **HEADS}
    one, same, other = (build(name, arguments, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_a_fine_stem_sees_the_full_size_and_other_channels_fit() -> None:
    model = build("multitask-resnet", {**SMALL, "pixels": {"m": 1}, "fine": True, "channels": 1})
    assert model(torch.randn(2, 1, 16, 16))["m"].shape == (2, 1, 16, 16)
    assert [m.stride[0] for m in model.modules() if isinstance(m, nn.Conv2d)][:2] == [1, 2]


def test_every_hidden_width_of_the_named_networks_is_a_multiple_of_8() -> None:
    aliases = {n: a for n in alias_names() if isinstance(a := load_alias(n), NetworkAlias)}
    named = {n: a for n, a in aliases.items() if n.startswith(("multitask", "detector"))}
    assert len(named) >= 3
    for name, alias in named.items():
        DataSpec.model_validate(alias.data)
        model = build(alias.network, alias.arguments)
        heads = {id(m) for n, m in model.named_modules() if n.endswith((".out", ".box", ".object", ".label"))}
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and id(module) not in heads:
                assert module.out_channels % 8 == 0, name


@pytest.mark.parametrize("name", ["multitask-mobilenet", "detector"])
def test_onnx_gives_every_head_under_its_name(name: str, tmp_path: Path) -> None:
    detector = name == "detector"
    given = {"widths": [8, 8, 8, 8], "classes": 3} if detector else {**SMALL, **HEADS, "how": "joined"}
    model = build(name, given).eval()
    names = ["boxes"] if detector else [t.name for t in TASKS]
    facts = write_checked_module(model, torch.randn(3, 3, 32, 32), names, tmp_path, 1e-4)
    assert list(facts["outputs"]) == names


def test_what_cannot_be_built_is_told() -> None:
    for name, arguments, told in (
        ("multitask-resnet", {}, "no head"),
        ("multitask-resnet", {"pixels": {"a": 1}, "labels": {"a": 2}}, "'a' is among pixels and labels"),
        ("multitask-mobilenet", {"widths": [8], "blocks": [1, 1], "pixels": {"a": 1}}, "1 widths and 2 numbers"),
        ("multitask-resnet", {"how": "beside", "pixels": {"a": 1}}, "pyramid or joined, not 'beside'"),
        ("detector", {"widths": [8, 8, 9, 8]}, "four even widths"),
    ):
        with pytest.raises(UsageError, match=told):
            build(name, arguments)


def scenes(count: int, seed: int) -> Split:
    """Discs, bars and rings on canvases, composed as emoji are."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    radius = ((x - 15.5) ** 2 + (y - 15.5) ** 2).sqrt()
    mattes = torch.stack([radius < 15, (y - 15.5).abs() < 5, (radius < 15) & (radius > 9)])
    rgba = torch.zeros(3, 4, 32, 32, dtype=torch.uint8)
    rgba[:, 3] = mattes * 255
    rgba[:, :3] = torch.tensor([[230, 40, 40], [40, 230, 40], [60, 60, 240]], dtype=torch.uint8)[:, :, None, None]
    images, boxes = compose(rgba, torch.arange(3), count, 48, torch.Generator().manual_seed(seed))
    return Split(images, {"boxes": boxes})


def scene_data(count: int, held: int) -> Splits:
    parts = [scenes(n, i) for i, n in enumerate((count, held, held))]
    task = Task("boxes", "boxes", ("disc", "bar", "ring"))
    return Splits(*parts, (task,), torch.full((3,), 0.45), torch.full((3,), 0.25), "scenes")


def test_composed_scenes_hold_what_their_boxes_say() -> None:
    split = scenes(30, 0)
    assert isinstance(split.inputs, Tensor)
    target = split.targets["boxes"]
    assert target.shape[1:] == (4, 5) and bool((target[:, 0, 0] >= 0).all())
    assert target[..., 0].unique().tolist() == [-1, 0, 1, 2]
    colours = torch.tensor([[230, 40, 40], [40, 230, 40], [60, 60, 240]])
    for image, objects in zip(split.inputs, target, strict=True):
        for label, x, y, w, h in objects[objects[:, 0] >= 0].tolist():
            own = ((image.long() - colours[int(label)][:, None, None]).abs().sum(0) < 40).nonzero()
            inside = (own[:, 1] >= (x - w / 2) * 48 - 1) & (own[:, 1] < (x + w / 2) * 48 + 1)
            inside &= (own[:, 0] >= (y - h / 2) * 48 - 1) & (own[:, 0] < (y + h / 2) * 48 + 1)
            found = own[inside]
            assert len(found) > 0.3 * w * h * 48 * 48 or label == 2
            assert int(found[:, 1].max() - found[:, 1].min()) + 1 == pytest.approx(w * 48, abs=3)  # ends are half clear


def test_every_part_of_a_detectors_loss_falls_in_training() -> None:
    data = scene_data(16, 3)
    model = build("detector", {"widths": [8, 16, 24, 32], "classes": 3})
    assert grids(model(torch.randn(2, 3, 48, 48))["boxes"].shape[2]) == [6, 3]
    before = evaluate(model, data, data.train)["boxes"]
    train(model, data, TrainSpec(epochs=40, batch=8, lr=4e-3, optimizer="adam", warmup_epochs=1))
    after = evaluate(model, data, data.train)["boxes"]
    assert all(after[k] < before[k] for k in ("loss", "box_loss", "objectness_loss", "class_loss")), (before, after)
