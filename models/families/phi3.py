"""Phi-3: q, k and v fused in one layer, gate and up in another."""

from typing import Any

import torch
from torch import Tensor

from compress.models.families.base import Family, spans, take_rows


class Phi3(Family):
    name, model_types = "phi3", ("phi3",)
    module, causal_lm, decoder_layer = "phi3", "Phi3ForCausalLM", "Phi3DecoderLayer"

    def slice_queries(self, attention: Any, heads: Tensor, groups: Tensor, head_dim: int) -> None:
        queries = attention.config.num_attention_heads * head_dim
        keys = attention.config.num_key_value_heads * head_dim
        kept = spans(groups, head_dim)
        rows = torch.cat([spans(heads, head_dim), queries + kept, queries + keys + kept])
        attention.qkv_proj = take_rows(attention.qkv_proj, rows)

    def slice_gate_up(self, mlp: Any, neurons: Tensor) -> None:
        ffn = mlp.gate_up_proj.weight.shape[0] // 2
        mlp.gate_up_proj = take_rows(mlp.gate_up_proj, torch.cat([neurons, ffn + neurons]))
