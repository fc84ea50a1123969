"""Channel groups: every one that is admitted can be cut, and cut is the same as zero; what cannot be is named."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.models.zoo import build
from compress.networks.flops import count_flops
from compress.networks.surgery import changed_widths, cut, resize, zeroed
from compress.recipes.pagcp.costs import Costs
from compress.recipes.pagcp.groups import Groups, find_groups, tensors
from compress.recipes.pagcp.plan import Plan
from tests import channel_nets as nets

pytestmark = pytest.mark.processes

IMAGES = (2, 3, 16, 16)
MULTI = {"pixels": {"matte": 1}, "labels": {"category": 9, "vendor": 2}}
ZOO: dict[str, tuple[str, dict[str, object], tuple[int, ...]]] = {
    "resnet, padded shortcuts": ("resnet", {"depth": 14, "width": 8}, IMAGES),
    "resnet, 1x1 shortcuts": ("resnet", {"depth": 14, "width": 8, "shortcut": "conv"}, IMAGES),
    "wrn": ("wrn", {"depth": 10, "widen": 1}, IMAGES),
    "mobilenet-v1": ("mobilenet-v1", {"width": 0.25, "stem": "cifar", "classes": 7}, IMAGES),
    "mobilenet-v2": ("mobilenet-v2", {"width": 0.25, "stem": "cifar", "classes": 7}, IMAGES),
    "fastgrnn": ("fastgrnn", {}, (2, 9, 12)),
    "multitask-resnet": (
        "multitask-resnet",
        {"widths": [8, 16, 16], "blocks": [1, 2, 1], "decoder": 16, **MULTI},
        IMAGES,
    ),
    "multitask-resnet, stages joined": (
        "multitask-resnet",
        {"widths": [8, 16, 16], "blocks": [1, 1, 1], "decoder": 16, "how": "joined", **MULTI},
        IMAGES,
    ),
    "detector": ("detector", {"widths": [8, 16, 16, 16], "classes": 3}, IMAGES),
    "multitask-mobilenet": (
        "multitask-mobilenet",
        {"widths": [8, 16, 16], "blocks": [1, 2, 1], "expansion": 2, "decoder": 16, **MULTI},
        IMAGES,
    ),
}
SMALL: dict[str, Callable[[], nn.Module]] = {
    "chunk and concat (C2f)": nets.C2f,
    "grouped convolution and a gate": nets.Grouped,
    "transposed convolution and concat": nets.Transposed,
    "linear behind flatten": nets.Flattened,
    "heads in a dict": nets.Heads,
    "heads in a list": lambda: nets.Heads("list"),
    "heads in a tuple": lambda: nets.Heads("tuple"),
    "heads in a dataclass": lambda: nets.Heads("dataclass"),
    "split by sizes in the code": lambda: nets.C2f(sizes=True),
    "channel shuffle": nets.Shuffled,
    "tokens of which there are none": nets.Registers,
    "activations in place": nets.Activated,
    "group norm": nets.LayerNormed,
    "group norm of four groups": lambda: nets.LayerNormed(4),
    "layer norm, layer scale": lambda: nets.LayerScaled(response=False),
    "global response norm": nets.LayerScaled,
    "frozen batch norm": nets.Frozen,
    "one number a branch": nets.Fused,
    "pixel shuffle": nets.Upscaled,
    "split attention": nets.SplitAttention,
    "attention, fused": nets.Attention,
    "attention, apart": lambda: nets.Attention("apart"),
    "attention, pixels": lambda: nets.Attention("pixels"),
}
# Of every network the root of a group, its units, and the channels of each.
UNITS = {
    "split by sizes in the code": ("first.0", 16, 2),
    "channel shuffle": ("first.0", 8, 2),
    "activations in place": ("body.0", 16, 1),
    "group norm": ("first", 16, 1),
    "group norm of four groups": ("first", 4, 4),
    "layer norm, layer scale": ("stem", 16, 1),
    "global response norm": ("up", 32, 1),
    "frozen batch norm": ("first", 16, 1),
    "one number a branch": ("a", 16, 1),
    "pixel shuffle": ("first", 8, 4),
    "split attention": ("split.0", 16, 2),
    "attention, fused": ("qkv", 4, 24),
    "attention, apart": ("q", 4, 8),
    "attention, pixels": ("qkv", 4, 16),
}


def awake(model: nn.Module) -> nn.Module:
    """Random norms, so that no channel is as good as another."""
    torch.manual_seed(3)
    for module in model.modules():
        for name, vector in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if vector.is_floating_point() and name != "places" and not isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.uniform_(vector, 0.5, 2)  # a factor of 1e-6 would hide what stands behind it
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.double().eval()


def same_on_every_group(model: nn.Module, x: Tensor) -> Groups:
    """Cuts each group alone, other units than the proof cut, and all groups at once; returns the groups."""
    found = find_groups(copy.deepcopy(model).float(), x.float(), 1)
    everything: dict[tuple[str, str], list[int]] = {}
    with torch.no_grad():
        dense = tensors(model(x))
        for group in found.groups:
            removed = group.removed(range(0, group.units - 1, 3))
            for at, gone in removed.items():
                everything.setdefault(at, []).extend(gone)
            want, got = tensors(zeroed(model, removed)(x)), tensors(cut(model, removed)(x))
            for a, b, c in zip(want, got, dense, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(c.abs().max()))
            assert any(not torch.equal(a, c) for a, c in zip(want, dense, strict=True)), group.name
        for a, b in zip(tensors(zeroed(model, everything)(x)), tensors(cut(model, everything)(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9 * float(a.abs().max()))
    return found


@pytest.mark.parametrize("name", ZOO)
def test_masked_is_sliced_on_every_group_of_every_zoo_network(name: str) -> None:
    network, arguments, shape = ZOO[name]
    model = awake(build(network, arguments))
    found = same_on_every_group(model, torch.randn(shape, dtype=torch.float64))
    assert found.groups
    # Whatever is not in a group is named; nothing is passed over.
    rooted = {m.layer for g in found.groups for m in g.members if m.axis == "out"}
    layers = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert layers <= rooted | {v.layer for v in found.left}


@pytest.mark.parametrize("name", SMALL)
def test_masked_is_sliced_on_every_group_of_small_networks(name: str) -> None:
    found = same_on_every_group(awake(SMALL[name]()), torch.randn(IMAGES, dtype=torch.float64))
    if name in UNITS:
        assert UNITS[name] in {(g.name, g.units, g.channels) for g in found.groups}, [str(g) for g in found.groups]


@pytest.mark.parametrize("name", ["global response norm", "attention, fused", "attention, pixels", "channel shuffle"])
def test_a_cut_network_is_built_again_from_its_plan_and_its_widths(name: str, tmp_path: Path) -> None:
    model, x = awake(SMALL[name]()).float(), torch.randn(IMAGES)
    removed: dict[tuple[str, str], list[int]] = {}
    for group in find_groups(model, x, 1).groups:
        for at, gone in group.removed(range(1, group.units, 2)).items():
            removed[at] = sorted({*removed.get(at, ()), *gone})
    Plan.of(model, removed).save(tmp_path)
    plan = Plan.load(tmp_path)
    smaller = plan.apply(model)
    again = resize(SMALL[name]().eval(), json.loads(json.dumps(changed_widths(model, smaller))))
    again.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        want, got, masked = smaller(x), again(x), plan.mask(model)(x)
    assert torch.equal(want, got)
    torch.testing.assert_close(want, masked, rtol=1e-4, atol=1e-4 * float(masked.abs().max()))
    assert sum(p.numel() for p in smaller.parameters()) == Costs(model, x).parameters(removed)
    with pytest.raises(CompressError, match="the plan is for a network with"):
        plan.apply(smaller)


def test_norms_of_a_masked_network_are_of_the_channels_that_are_left() -> None:
    norm = awake(nn.Sequential(nn.LayerNorm(6)))
    x, kept = torch.randn(2, 3, 6, dtype=torch.float64), [0, 2, 5]
    want = torch.zeros_like(x)
    rest = x[..., kept]
    off = rest - rest.mean(-1, keepdim=True)
    at = norm[0].weight[kept] * off / (off.square().mean(-1, keepdim=True) + 1e-5).sqrt() + norm[0].bias[kept]  # type: ignore[index]
    want[..., kept] = at.detach()
    got = zeroed(norm, {("0", "out"): [1, 3, 4]})(x)
    torch.testing.assert_close(got, want)
    response = awake(nets.Response(4))
    whole = torch.linalg.vector_norm(y := torch.randn(2, 3, 3, 4, dtype=torch.float64), dim=(1, 2), keepdim=True)
    masked = zeroed(response, {("weight", "dim:3"): [1], ("bias", "dim:3"): [1]})(y * torch.tensor([1, 0, 1, 1]))
    mean = whole[..., [0, 2, 3]].mean(-1, keepdim=True)
    weight, bias = response.weight.detach(), response.bias.detach()  # type: ignore[union-attr]
    torch.testing.assert_close(masked.detach()[..., 0], (weight * (y * whole / (mean + 1e-6)) + bias + y)[..., 0])


def test_numbers_in_a_file_of_widths_only_ever_fall() -> None:
    for shapes in (
        {"": {"int:heads": 5}}, {"": {"int:heads": 0}}, {"": {"int:how": 1}}, {"": {"int:training": 1}},
        {"table": {"dim:1": 9}}, {"table": {"dim:7": 1}}, {"table": {"dim:x": 1}}, {"nothing": {"dim:0": 1}},
        {"stem": {"int:groups": 1}},
    ):  # fmt: skip
        with pytest.raises(CompressError, match="cannot have the shape"):
            resize(nets.Attention(), shapes)


@pytest.mark.slow
def test_masked_is_sliced_on_every_group_of_resnet50() -> None:
    model = awake(build("resnet50", {"classes": 7}))
    assert len(same_on_every_group(model, torch.randn(2, 3, 64, 64, dtype=torch.float64)).groups) == 37


def test_a_detectors_chunked_blocks_are_all_pruned() -> None:
    found = find_groups(build("detector", {"widths": [16, 32, 32, 32]}), torch.randn(2, 3, 32, 32))
    entered = {g.name: g for g in found.groups if g.name.endswith("enter.0")}
    assert len(entered) == 5 and all(g.channels == 2 for g in entered.values())


def test_a_chunk_loses_the_same_place_of_every_part() -> None:
    found = find_groups(nets.C2f(), torch.randn(IMAGES))
    group = next(g for g in found.groups if g.name == "first.0")
    assert (group.units, group.channels) == (16, 2)
    assert all(b - a == 16 for a, b in next(m for m in group.members if m.layer == "first.0").index)
    # And what is behind the concatenation loses the place of every part that carries it.
    assert {len(unit) for unit in next(m for m in group.members if m.layer == "last.0").index} == {4}


def test_a_grouped_convolution_loses_as_many_of_each_group() -> None:
    found = find_groups(nets.Grouped(), torch.randn(IMAGES))
    group = next(g for g in found.groups if g.name == "grouped.0")
    assert (group.units, group.channels, group.step) == (8, 4, 2)
    smaller = cut(nets.Grouped(), group.removed([0, 1, 5]))
    assert (smaller.grouped[0].out_channels, smaller.grouped[0].groups) == (20, 4)  # type: ignore[index,union-attr]


def test_a_depthwise_convolution_goes_with_its_channels() -> None:
    model = build("mobilenet-v1", {"width": 0.25, "stem": "cifar"})
    group = find_groups(model, torch.randn(2, 3, 32, 32)).groups[1]
    depthwise = cut(model, group.removed(range(8))).features[9]  # type: ignore[index]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 8  # type: ignore[union-attr]


def test_the_root_is_tied_to_all_that_a_residual_sum_ties() -> None:
    found = find_groups(build("resnet", {"depth": 14, "width": 8, "shortcut": "conv"}), torch.randn(IMAGES))
    stem = next(g for g in found.groups if g.name == "stem")
    assert {m.layer for m in stem.members if m.axis == "out"} >= {"stem", "blocks.0.conv2", "blocks.1.conv2"}


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (nets.Unknown(), "first", "the operator _euclidean_dist in Unknown is not followed|_cdist"),
        (nets.Heads(), "classes", "output of the network"),
        (nets.Heads(), "pixels", "one channel"),
    ],
)
def test_what_cannot_be_cut_is_named_with_the_reason(model: nn.Module, layer: str, reason: str) -> None:
    import re

    found = find_groups(model, torch.randn(IMAGES))
    assert layer not in {g.name for g in found.groups}
    said = next(v.reason for v in found.left if v.layer == layer)
    assert re.search(reason, said), said


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(CompressError, match="cannot be traced"):
        find_groups(nets.Detached(), torch.randn(IMAGES))


def test_a_layer_that_the_recipe_skips_stays_dense() -> None:
    found = find_groups(nets.Heads(), torch.randn(IMAGES), 8, ["side"])
    assert "side" not in {g.name for g in found.groups}
    assert next(v.reason for v in found.left if v.layer == "side") == "left out by the recipe (side)"


def test_levels_are_all_units_then_multiples_down_to_what_is_kept() -> None:
    group = find_groups(nets.Heads(width=20), torch.randn(IMAGES)).groups[0]
    assert group.levels() == (20, 16, 8)
    assert group.levels(0.5) == (20, 16)


@pytest.mark.parametrize("name", ["multitask-mobilenet", "resnet, padded shortcuts"])
def test_reckoned_flops_and_parameters_are_those_that_counting_gives(name: str) -> None:
    network, arguments, shape = ZOO[name]
    model, x = build(network, arguments).eval(), torch.randn(shape)
    costs = Costs(model, x)
    for group in find_groups(model, x, 1).groups:
        removed = group.removed(range(0, group.units, 2)[:-1] or [0])
        smaller = cut(model, removed)
        assert {f.name: f.dense for f in count_flops(smaller, x[:1])} == {
            k: v for k, v in costs.flops(removed).items() if costs.layers[k].uses
        }
        assert sum(p.numel() for p in smaller.parameters()) == costs.parameters(removed)


def test_transposed_convolutions_are_counted_by_their_input() -> None:
    model, x = nets.Transposed().eval(), torch.randn(IMAGES)
    up = next(f for f in count_flops(model, x[:1]) if f.name == "up")
    assert up.dense == 2 * 32 * 16 * 2 * 2 * 8 * 8


@pytest.mark.parametrize("name", ["grouped convolution and a gate", "transposed convolution and concat"])
def test_a_network_is_built_again_from_its_widths(name: str) -> None:
    model, x = awake(SMALL[name]()), torch.randn(IMAGES, dtype=torch.float64)
    removed: dict[tuple[str, str], list[int]] = {}
    for group in find_groups(copy.deepcopy(model).float(), x.float()).groups:
        for at, gone in group.removed(range(group.units // 4)).items():
            removed.setdefault(at, []).extend(gone)
    smaller = cut(model, removed)
    again = resize(SMALL[name]().double().eval(), changed_widths(model, smaller))
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(tensors(again(x))[0], tensors(smaller(x))[0])


def test_widths_that_no_layer_can_have_are_refused() -> None:
    for shapes in ({"first.0": {"out": 64, "in": 3, "groups": 1}}, {"nowhere": {"out": 1}}, {"first.0": {"out": 0}}):
        with pytest.raises(CompressError, match="cannot have the shape"):
            resize(nets.Grouped(), shapes)


def test_a_cut_leaves_the_network_it_was_made_of_alone() -> None:
    model = nets.Grouped()
    before = copy.deepcopy(model.state_dict())
    group = find_groups(model, torch.randn(IMAGES)).groups[0]
    cut(model, group.removed([0, 1]))
    zeroed(model, group.removed([0, 1]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["global response norm", "attention, fused", "grouped convolution and a gate"])
def test_zeros_that_are_made_when_asked_for_are_the_same_and_hold_no_memory(name: str) -> None:
    model, x = awake(SMALL[name]()), torch.randn(IMAGES, dtype=torch.float64)
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    removed: dict[tuple[str, str], list[int]] = {}
    for group in find_groups(copy.deepcopy(model).float(), x.float(), 1).groups:
        for at, gone in group.removed(range(0, group.units - 1, 2)).items():
            removed[at] = sorted({*removed.get(at, ()), *gone})
    asked = zeroed(model, removed, held=False)
    assert {t.data_ptr() for t in (*asked.parameters(), *asked.buffers())} == own
    with torch.no_grad():
        want, got, dense = tensors(zeroed(model, removed)(x)), tensors(asked(x)), tensors(model(x))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(want, dense, strict=True))
