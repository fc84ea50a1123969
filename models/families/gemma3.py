"""Gemma-3 (text): Gemma-2's norms, q/k norms, five sliding blocks to one full."""

from compress.models.families.gemma2 import Gemma2


class Gemma3(Gemma2):
    name, model_types = "gemma3", ("gemma3_text",)
    module, causal_lm, decoder_layer = "gemma3", "Gemma3ForCausalLM", "Gemma3DecoderLayer"
