"""Gemma-2: a norm behind each sublayer as well, logits capped, sliding and full attention in turn."""

from typing import Any

from torch import Tensor, nn

from compress.models.families.base import Family


class Gemma2(Family):
    name, model_types = "gemma2", ("gemma2",)
    module, causal_lm, decoder_layer = "gemma2", "Gemma2ForCausalLM", "Gemma2DecoderLayer"
    post_norm = True

    def ffn_norm(self, block: Any) -> nn.Module:
        norm: nn.Module = block.pre_feedforward_layernorm
        return norm

    def after_attention(self, block: Any, attention: Tensor) -> Tensor:
        out: Tensor = block.post_attention_layernorm(attention)
        return out

    def after_ffn(self, block: Any, ffn: Tensor) -> Tensor:
        out: Tensor = block.post_feedforward_layernorm(ffn)
        return out

    def scaled_norm(self, model: Any, scale: float) -> Tensor:
        # Its norms multiply by 1 + weight.
        weight: Tensor = (1.0 + model.model.norm.weight) * scale - 1.0
        return weight
