"""FLOPs: against counts by hand, with zeros, groups, strides and layers that are used several times."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.zoo import build
from compress.networks.flops import count_flops


def test_layers_count_as_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8x8 -> 4x4
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(),
        nn.Linear(128, 5),
    )
    first, depthwise, last = count_flops(model, torch.zeros(1, 3, 8, 8))
    assert first.dense == 2 * (8 * 3 * 9) * 16
    assert depthwise.dense == 2 * (8 * 9) * 16
    assert last.dense == 2 * 128 * 5
    assert [layer.sparse for layer in (first, depthwise, last)] == [layer.dense for layer in (first, depthwise, last)]


def test_zeros_are_left_out_each_as_often_as_its_weight_is_used() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].weight[0, 0] = 0
    first, last = count_flops(model, torch.zeros(1, 3, 6, 6))
    assert (first.nonzero, first.sparse) == (81, 2 * 81 * 16)
    assert (last.nonzero, last.sparse) == (7, 2 * 7 * 16)
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = True
    assert count_flops(model, torch.zeros(1, 3, 6, 6), {"0.weight": mask})[0].sparse == 2 * 16


def test_a_recurrent_networks_layers_count_once_a_step_and_batch_does_not_matter() -> None:
    model = build("fastgrnn", {"channels": 3, "hidden": 5, "classes": 2, "r_W": 2, "r_U": 4})
    one = {layer.name: layer.dense for layer in count_flops(model, torch.zeros(1, 3, 7))}
    assert one == {
        "W.right": 2 * 3 * 2 * 7, "W.left": 2 * 2 * 5 * 7, "U.right": 2 * 5 * 4 * 7, "U.left": 2 * 4 * 5 * 7,
        "classifier": 2 * 5 * 2,
    }  # fmt: skip
    assert {layer.name: layer.dense for layer in count_flops(model, torch.zeros(4, 3, 7))} == one


def test_published_counts_are_met() -> None:
    # Multiply-adds as the papers give them: MobileNet-V1 569 M, MobileNet-V2 300 M, ResNet-50 about 4.1 G.
    for name, published, tolerance in (
        ("mobilenet-v1", 569e6, 0.01),
        ("mobilenet-v2", 300e6, 0.01),
        ("resnet50", 4.1e9, 0.01),
    ):
        model = build(name, {})
        found = sum(layer.dense for layer in count_flops(model, torch.zeros(1, 3, 224, 224))) / 2
        assert abs(found / published - 1) < tolerance, (name, found)
