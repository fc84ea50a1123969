"""Qwen2 and Qwen2.5: biases on q, k and v, none on o."""

from typing import Any

from compress.models.families.base import Biases, Family


class Qwen2(Family):
    name, model_types = "qwen2", ("qwen2",)
    module, causal_lm, decoder_layer = "qwen2", "Qwen2ForCausalLM", "Qwen2DecoderLayer"

    def biases(self, config: Any) -> Biases:
        return Biases(qkv=True)
