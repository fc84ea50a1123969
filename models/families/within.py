"""Blocks of a language model that is a part of a larger checkpoint, made as large as its ``text_config`` says.

One of these functions is copied into every such checkpoint that is saved with blocks that differ, behind the code of
the language model alone, whose names it uses; so it needs nothing but that, torch and transformers.
"""

from compress.models.families.ragged import NoAttention, NoFFN
from compress.models.families.resized import resize


def ragged_blocks(layers, config):  # type: ignore[no-untyped-def]
    for index in range(len(layers)):
        own = config.per_layer_config[index]
        layer = type(layers[index])(own, index)
        skip = getattr(own, "skip", None) or ()
        if "attention" in skip:
            layer.self_attn = NoAttention()
        if "mlp" in skip:
            layer.mlp = NoFFN()
        layers[index] = layer


def resized_blocks(layers, config):  # type: ignore[no-untyped-def]
    for index, entry in config.compress_layers.items():
        if not index.isdecimal() or int(index) >= len(layers):
            raise ValueError(f"compress_layers: there is no block {index}")
        resize(layers[int(index)], entry)
