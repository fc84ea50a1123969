"""Adapters: how each architecture is cut into units. One that needs words
of its own is one file here and one line below; all others are known by their structure (`proof.by_structure`)."""

from __future__ import annotations

from typing import Any

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
    """The adapter for a transformers config: a family's own, or one by structure that has proven itself on the
    configuration at hand.

    Raises:
        CompressError: it has none, by what was found.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    from compress.models.families.proof import by_structure

    return by_structure(config)
