"""Mistral: Llama with a head_dim of its own (Mistral-Nemo) and sliding windows."""

from compress.models.families.base import Family


class Mistral(Family):
    name, model_types = "mistral", ("mistral",)
    module, causal_lm, decoder_layer = "mistral", "MistralForCausalLM", "MistralDecoderLayer"
