"""Qwen3: norms on each head's q and k (shared by all heads, so never sliced), head_dim not hidden / heads."""

from compress.models.families.base import Family


class Qwen3(Family):
    name, model_types = "qwen3", ("qwen3",)
    module, causal_lm, decoder_layer = "qwen3", "Qwen3ForCausalLM", "Qwen3DecoderLayer"
