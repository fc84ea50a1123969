"""Writes a family for an architecture that has none of its own: Seed-OSS, and prunes a small one.

compress would tell this one by its structure; a family's own file is for what structure does not say. A family says how
a decoder's blocks are cut into units. Most are Llama with a difference or two, and say that alone; here it is the bias
of `o_proj`, which has a key of its own in the config. What is claimed is checked: parameters by hand, the sliced model
against the same one with zeros in place, and the saved model in a process that has never heard of this file. To keep a
family, put its class into `models/families/` (docs/guide/add-a-family.md).

    python examples/custom_family.py [OUT]
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM, SeedOssConfig

import compress
from compress.language.plan import BlockPlan, Plan
from compress.models.families import FAMILIES
from compress.models.families.base import Biases, Family


class SeedOss(Family):
    """Seed-OSS: biases on q, k and v, and on o only where `attention_out_bias` says so."""

    name, model_types = "seed-oss", ("seed_oss",)
    module, causal_lm, decoder_layer = "seed_oss", "SeedOssForCausalLM", "SeedOssDecoderLayer"

    def biases(self, config: Any) -> Biases:
        mlp = bool(config.mlp_bias)
        return Biases(qkv=config.attention_bias, o=config.attention_out_bias, gate_up=mlp, down=mlp)


FAMILIES["seed_oss"] = SeedOss()

here = Path(__file__).parent
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/family")


def small() -> Any:
    """A random Seed-OSS; biases are random too, so that forgetting one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SeedOssConfig(**{**tiny.SIZES, "attention_out_bias": True})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.1)
    return model


model, family = small(), FAMILIES["seed_oss"]
linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
assert family.costs(model.config).backbone == sum(p.numel() for m in linear for p in m.parameters())

# Half of the heads and a third of the neurons of block 0, no attention in block 2: cut out, and as zeros in place.
whole = BlockPlan(tuple(range(8)), tuple(range(128)))
plan = Plan((BlockPlan((0, 2, 4, 6), tuple(range(0, 128, 3))), whole, BlockPlan((), whole.neurons), whole), {})
sliced, masked, ids = small(), small(), torch.arange(3, 35)[None]
plan.apply(sliced, family)
plan.mask(masked, family)
with torch.no_grad():
    torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, atol=1e-5, rtol=1e-5)
print("sliced equals masked")

tokenizer = tiny.tokenizer_of([topics[name] for name in sorted(topics)][:20])
result = compress.prune(model, here / "tiny.yaml", out, tokenizer=tokenizer, until="model")
(layout,) = result.report["verify"]["layouts"]
print(f"loaded in a clean process as {layout['class']}: logits differ by {layout['max_logit_difference']:.1e}")
