"""Phi-3: q, k and v fused in one layer, gate and up in another."""

from typing import Any

import torch
from torch import Tensor

from compress.models.families.base import BlockGeometry, Family, spans, take_rows


class Phi3(Family):
    name, model_types = "phi3", ("phi3",)
    module, causal_lm, decoder_layer = "phi3", "Phi3ForCausalLM", "Phi3DecoderLayer"

    def slice_queries(self, attention: Any, heads: Tensor, groups: Tensor, dense: BlockGeometry) -> None:
        keys = dense.kv_heads * dense.head_dim
        kept = spans(groups, dense.head_dim)
        rows = torch.cat([spans(heads, dense.head_dim), dense.inputs + kept, dense.inputs + keys + kept])
        attention.qkv_proj = take_rows(attention.qkv_proj, rows)

    def slice_gate_up(self, mlp: Any, neurons: Tensor) -> None:
        ffn = mlp.gate_up_proj.weight.shape[0] // 2
        mlp.gate_up_proj = take_rows(mlp.gate_up_proj, torch.cat([neurons, ffn + neurons]))
