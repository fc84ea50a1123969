"""Adapters: how each architecture is cut into units. A new family is one file here and one line below."""

from __future__ import annotations

from typing import Any

from compress.errors import CompressError
from compress.models.families.base import Family
from compress.models.families.gemma2 import Gemma2
from compress.models.families.gemma3 import Gemma3
from compress.models.families.llama import Llama
from compress.models.families.mistral import Mistral
from compress.models.families.phi3 import Phi3
from compress.models.families.qwen2 import Qwen2
from compress.models.families.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {
    model_type: family
    for family in (Llama(), Mistral(), Qwen2(), Qwen3(), Phi3(), Gemma2(), Gemma3())
    for model_type in family.model_types
}


def family_for(config: Any) -> Family:
    """The adapter for a transformers config.

    Raises:
        CompressError: the architecture has none.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise CompressError(
            f"the architecture {model_type!r} is not supported",
            where="config.json: model_type",
            fix=f"supported: {', '.join(sorted(FAMILIES))}; to add one, see models/families/ in the source",
        )
    return FAMILIES[model_type]
