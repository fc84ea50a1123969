"""Tiny random models that see as well, for tests: their language parts have the shape of `tests.tiny`'s models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import SHAPE, word_tokenizer

IMAGE = 299  # the token that stands for a part of an image
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "out_hidden_size": 40,
    "deepstack_visual_indexes": [0], "patch_size": 14,
}  # fmt: skip
DIRECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
# Type -> (what the language part says beside `SHAPE`, the vision part, what stands around them).
SEEING: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"sliding_window": 16, "query_pre_attn_scalar": 8},
        TOWER,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 298, "eoi_token_index": 297},
    ),
    "qwen3_vl": ({"rope_parameters": DIRECTIONS}, QWEN, {"image_token_id": IMAGE, "tie_word_embeddings": True}),
    "smolvlm": ({"model_type": "llama"}, TOWER, {"image_token_id": IMAGE, "scale_factor": 1, "pad_token_id": 0}),
    "llava": ({"model_type": "llama"}, {**TOWER, "model_type": "clip_vision_model"}, {"image_token_index": IMAGE}),
    "mistral3": ({"model_type": "mistral"}, {**TOWER, "model_type": "pixtral", "head_dim": 8}, {}),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        TOWER,
        {},
    ),
    "aya_vision": ({"model_type": "cohere2"}, TOWER, {}),
    "glm4v": ({}, {"hidden_size": 32, "depth": 1}, {}),
}


def seeing(model_type: str, layers: int = 2) -> Any:
    """A random model in float32; norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, around = SEEING[model_type]
    text = {**SHAPE, "num_hidden_layers": layers, **text}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=dict(vision), **around)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15).requires_grad_(False)
    return model


def saved_seeing(folder: Path, model_type: str, layers: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    seeing(model_type, layers).to(dtype).save_pretrained(folder)
    word_tokenizer(folder)
    return folder


def with_image(model_type: str) -> dict[str, torch.Tensor]:
    """Inputs of one image among a text, for ``gemma3`` and ``qwen3_vl``."""
    drawn = torch.Generator().manual_seed(3)
    count = 4 if model_type == "gemma3" else 1
    ids = torch.randint(3, 290, (1, 16), generator=drawn)
    ids[0, 4 : 4 + count] = IMAGE
    if model_type == "gemma3":
        seen = (ids == IMAGE).long()
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28, generator=drawn), "token_type_ids": seen}
    patches = torch.randn(4, 3 * 2 * 14 * 14, generator=drawn)  # (patches, channels x frames x patch)
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
