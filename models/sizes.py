"""What a decoder's config.json may say of its sizes: types, bounds, and what must divide what.

transformers 5 checks some of it, in words of its own, and takes a thousand million layers for what they are: building
them takes all memory. So it is asked before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError

# key -> the largest that is no mistake, far above any model that there is
LARGEST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 27,
    "max_position_embeddings": 1 << 40,
}
MAY_BE_NULL = ("num_key_value_heads", "head_dim")
TYPES = ("float32", "float16", "bfloat16", "float64")
FIX = "correct it, or fetch the model's own config.json again"


def check_sizes(config: Mapping[str, Any], path: Path, at: str = "") -> None:
    """Asks a configuration and what it says of its text part.

    Raises:
        CompressError: a size is no whole number, zero or beyond all sense; heads do not divide; the type of the weights
            is unknown. ``where`` is ``path``, the key is named.
    """

    def refuse(what: str) -> None:
        raise CompressError(what, where=str(path), fix=FIX)

    for key, most in LARGEST.items():
        value = config.get(key, 1)
        if value is None and key in MAY_BE_NULL:
            continue
        # Some families give every layer its own width.
        for one in value if key == "intermediate_size" and isinstance(value, list) and value else [value]:
            if type(one) is not int:
                refuse(f"{at}{key} is {one!r:.60}, not a whole number")
            if not 1 <= one <= most:
                refuse(f"{at}{key} is {one!s:.40}, not from 1 to {most:,}")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and groups and heads % groups:
        refuse(f"{at}num_attention_heads ({heads}) do not divide among num_key_value_heads ({groups})")
    width = config.get("hidden_size")
    if heads and width and config.get("head_dim") is None and width % heads:
        refuse(
            f"{at}hidden_size ({width}) does not divide among num_attention_heads ({heads}), and there is no head_dim"
        )
    for key in ("dtype", "torch_dtype"):
        dtype = config.get(key)
        if dtype is not None and (not isinstance(dtype, str) or dtype.removeprefix("torch.") not in TYPES):
            refuse(f"{at}{key} is {dtype!r:.60}, not one of {', '.join(TYPES)}")
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        check_sizes(inner, path, f"{at}text_config.")
