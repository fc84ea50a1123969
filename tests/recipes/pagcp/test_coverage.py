"""Public architectures: small ones of four families here, the table of all in `make slow`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recipes.pagcp.test_groups import awake, same_on_every_group
from tools.coverage import NETWORKS, Plain, measure, passed

pytestmark = pytest.mark.processes

SMALL: dict[str, tuple[str, dict[str, Any], int, set[tuple[str, int]]]] = {
    "ViT": (
        "ViT",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        32,
        {("mlp", 48), ("attention", 4)},
    ),
    "Swin": (
        "Swin",
        {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 2},
        32,
        {("attention", 2), ("attention", 4)},
    ),
    "BiT, whose weights are standardised": (
        "Bit",
        {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "num_groups": 4},
        32,
        {("downsample", 4), ("downsample", 6)},
    ),
    "ConvNeXt V2": ("ConvNextV2", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, 32, {("pwconv", 32)}),
}


@pytest.mark.parametrize("name", SMALL)
def test_heads_and_hidden_widths_of_public_transformers_are_cut(name: str) -> None:
    import transformers

    kind, config, size, wanted = SMALL[name]
    if kind in ("ViT", "Swin"):
        config = config | {"image_size": size} | ({"patch_size": 8} if kind == "ViT" else {})
    made = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**config))
    found = same_on_every_group(awake(Plain(made, "logits")), torch.randn(2, 3, size, size, dtype=torch.float64))
    for part, units in wanted:
        assert any(part in g.name and g.units == units for g in found.groups), [str(g)[:80] for g in found.groups]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, network in NETWORKS.items() if network.library in ("zoo", "transformers")])
def test_the_table_of_architectures_holds(name: str) -> None:
    # Time and memory are measured by the tool, in a process of their own.
    facts = measure(name, onnx=False) | {"seconds": 0, "bytes": 0}
    assert passed(facts) and facts["reach"] >= 0.8, facts
