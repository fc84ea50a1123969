"""Tiny random models of every supported architecture, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What makes each architecture itself.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"attention_bias": False},
    "phi3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 8},
}


def tiny(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM in float32; norms and biases are random too, so that forgetting one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SHAPE, **ARCHITECTURES[model_type], **changes}
    if model_type == "qwen2":
        del settings["head_dim"]  # Qwen2 has none of its own: hidden / heads
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(seed)
    return _random(AutoModelForCausalLM.from_config(config).eval())


# What differs from `SHAPE` in a block of `uneven`.
UNEVEN: dict[int, dict[str, int]] = {
    1: {"intermediate_size": 80},
    2: {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 32},
}


def uneven(seed: int = 0) -> Any:
    """The same of a dense Llama whose blocks differ in heads and FFN widths."""
    from transformers import LlamaConfig

    from compress.models.families.llama import Llama

    config = LlamaConfig(
        **SHAPE, tie_word_embeddings=True, per_layer_config=UNEVEN, allow_global_per_layer_attribute_access=True
    )
    torch.manual_seed(seed)
    return _random(Llama().ragged_class()(config).eval())


def _random(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or "bias" in name else 0.15
            parameter.add_(torch.randn(parameter.shape) * spread).requires_grad_(False)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed))


def word_tokenizer(folder: Path) -> Any:
    """A real tokenizer (byte-level BPE, trained on a few lines) of at most 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog did not", "an apple a day keeps"], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)
    return made


def let_it_add(folder: Path, template: str) -> Any:
    """Makes the tokenizer in ``folder`` put special tokens around every text, such as ``<s> $A`` or ``$A </s>``."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    special = [(word, made.convert_tokens_to_ids(word)) for word in set(template.split()) - {"$A"}]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def saved_tiny(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A tiny model and its tokenizer as a folder that `compress prune` takes."""
    tiny(model_type, **changes).save_pretrained(folder)
    word_tokenizer(folder)
    return folder


def prose(paragraphs: int, seed: int = 0) -> str:
    """Random words in paragraphs; two seeds share no run of 64 tokens."""
    import random

    words = "the cat sat on mat and dog did not an apple day keeps away home river stone light of under over"
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(words.split(), k=60)) + "." for _ in range(paragraphs)) + "\n"


RECIPE = """\
method: tyr
description: everything as small as it can be
sparsity: 0.3
layouts: [per-layer, padded]
calibration:
  sources:
    - {files: [FOLDER/calibration.txt]}
  windows: 8
  length: 32
evaluation:
  texts:
    - {name: first text, source: {files: [FOLDER/first.txt]}}
    - {name: "second | text", source: {files: [FOLDER/second.txt]}}
  windows: 2
  length: 32
tyr:
  round_to: 4
  iterations: 2
  search:
    {windows: 3, positions: 16, singles_windows: 2, generations: 2, offspring: 4, steps: [0.5, 1.0], survivors: [2]}
export:
  greedy_tokens: 8
bench: {prompt: 24, context: 24, processes: 2, threads: 1, min_seconds: 0.01, min_runs: 2}
"""


def tiny_job(folder: Path, model_type: str = "llama", layers: int = 2) -> tuple[Path, Path]:
    """(model folder, recipe file) of a whole run that takes seconds, with its text beside them. What it takes is mostly
    the export, which grows with the layers."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, paragraphs) in enumerate((("calibration", 120), ("first", 160), ("second", 160))):
        (folder / f"{name}.txt").write_text(prose(paragraphs, seed))
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.replace("FOLDER", str(folder)))
    return saved_tiny(folder / "model", model_type, num_hidden_layers=layers), recipe
