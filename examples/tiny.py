"""A small Llama for the other examples: made and trained here, in seconds, on the text of Python's own help.

Four blocks of 64 channels and a tokenizer of 512 tokens, 0.2 million parameters in all. It has seen just enough text to
write word-like things, and most of what it learnt lies in its embeddings: that pruning its blocks costs it next to
nothing says nothing of real models. Nothing is fetched.

    python examples/tiny.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)  # so small a model is no faster on more

VOCABULARY, STEPS, WINDOWS, LENGTH = 512, 180, 8, 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model, trained, and its tokenizer."""
    # The last tenth is left for the evaluation, which a recipe that names this text makes of it.
    texts = [topics[name] for name in sorted(topics)]
    tokenizer = tokenizer_of(texts[:20])
    ids = torch.tensor(tokenizer("\n\n".join(texts[: len(texts) * 9 // 10])[:100_000])["input_ids"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (WINDOWS,))
        batch = ids[starts[:, None] + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval(), tokenizer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "config.json").exists():
        for part in make():
            part.save_pretrained(folder)
    print(folder)
