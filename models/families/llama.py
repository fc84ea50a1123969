"""Llama: the plain case."""

from compress.models.families.base import Family


class Llama(Family):
    name, model_types = "llama", ("llama",)
    module, causal_lm, decoder_layer = "llama", "LlamaForCausalLM", "LlamaDecoderLayer"
