"""What a decoder's config.json may say of its sizes: types, bounds, and what must divide what.

transformers 5 checks some of it, in words of its own, and takes a thousand million layers for what they are: building
them takes all memory. So it is asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError

# key -> the largest that is no mistake, far above any model that there is
LARGEST = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    **dict.fromkeys(("n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"), 1 << 24),
    "num_hidden_layers": 4096,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 27,
    "max_position_embeddings": 1 << 40,
}
MAY_BE_NULL = ("num_key_value_heads", "head_dim", "n_inner", "ffn_hidden_size")
TYPES = ("float32", "float16", "bfloat16", "float64")
# key -> the largest that is no mistake; each is above 0
NUMBERS = {
    "rms_norm_eps": 1.0,
    "rope_theta": 1e12,
    "query_pre_attn_scalar": 1e6,
    "final_logit_softcapping": 1e6,
    "attn_logit_softcapping": 1e6,
    "sliding_window": 1e12,
}
NULL_NUMBERS = ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window", "rope_theta")
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# how a key of any family ends, or what it is -> the largest that is no mistake: each makes so many modules or entries
COUNTS = {"layers": 4096, "n_layer": 4096, "num_blocks": 4096, "heads": 1 << 14, "n_head": 1 << 14,
          "experts": 1 << 16, "num_labels": 1 << 20}  # fmt: skip
ANY = 10**15  # a whole number of any other key
FIX = "correct it, or fetch the model's own config.json again"


def check_sizes(config: Mapping[str, Any], path: Path, at: str = "") -> None:
    """Asks a configuration and what it says of its parts.

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
    if not at:
        _check_counts(config, refuse, at)
    _check_values(config, refuse, at)
    kind = config.get("model_type", "")
    if not isinstance(kind, str):
        refuse(f"{at}model_type is {kind!r:.60}, not a text")
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


def check_own_names(config: Any, path: Path) -> None:
    """Sizes that a family calls otherwise (GPT-2 its layers ``n_layer``), as transformers knows them.

    Args:
        config: transformers' configuration.

    Raises:
        CompressError: as `check_sizes`.
    """
    for standard, own in type(config).attribute_map.items():
        value = getattr(config, own, None)
        if standard in LARGEST and type(value) is int and not 1 <= value <= LARGEST[standard]:
            raise CompressError(f"{own} is {value}, not from 1 to {LARGEST[standard]:,}", where=str(path), fix=FIX)


def _check_counts(value: Any, refuse: Callable[[str], None], at: str) -> None:
    """Whole numbers of every key, however deep: families name their layers as they like, and transformers makes an
    entry for each of ``num_labels``."""
    if isinstance(value, list | tuple | Mapping):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            _check_counts(inner, refuse, f"{at}{key}.")
    elif type(value) is int:
        key = at.rstrip(".")
        name = f"_{next((part for part in reversed(key.split('.')) if not part.isdigit()), key)}"
        most = next((most for end, most in COUNTS.items() if name.endswith(f"_{end}")), None)
        if most is not None and not 0 <= value <= most:
            refuse(f"{key} is {value!s:.40}, not from 0 to {most:,}")
        if abs(value) > ANY:
            refuse(f"{key} is {value!s:.40}, and no number here is beyond {ANY:.0e}")


def _check_values(config: Mapping[str, Any], refuse: Callable[[str], None], at: str) -> None:
    """Numbers that a model computes with, flags and tokens: transformers takes 1e30 and "yes" for what they are."""
    rope = config.get("rope_parameters")
    every = [(key, config[key]) for key in NUMBERS if key in config]
    if isinstance(rope, Mapping):
        kinds = [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
        every += [("rope_theta", one["rope_theta"]) for one in kinds if "rope_theta" in one]
    for key, value in every:
        if value is None and key in NULL_NUMBERS:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(f"{at}{key} is {value!r:.60}, not a number")
        if not 0 < value <= NUMBERS[key]:
            refuse(f"{at}{key} is {value!s:.40}, not above 0 and at most {NUMBERS[key]:g}")
    for key in FLAGS:
        if config.get(key) is not None and type(config[key]) is not bool:
            refuse(f"{at}{key} is {config[key]!r:.60}, not true or false")
    rows = config.get("vocab_size")
    for key in TOKENS:
        value = config.get(key)
        # The embedding has a row for padding; another number that no token has is left out where texts are read.
        most = (rows if key == "pad_token_id" else None) or LARGEST["vocab_size"]
        for one in value if isinstance(value, list) else [value]:
            if one is not None and (type(one) is not int or not -1 <= one < most):
                refuse(f"{at}{key} is {one!r:.40}, not the number of a token (vocab_size is {rows})")
