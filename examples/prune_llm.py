"""Prunes a language model that is in memory, and generates with what is left.

`compress.prune` takes a transformers model and its tokenizer as they are, or a folder, or a hub id. Here it is a small
Llama that is made on the spot; with arguments it is yours: `python examples/prune_llm.py OUT org/name tyr`. What comes
back is the report, the run folder, and the pruned model: transformers' own class, with its `forward` and `generate`.

    python examples/prune_llm.py [OUT [MODEL RECIPE]]
"""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from transformers import AutoTokenizer

import compress

here = Path(__file__).parent
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/examples/llm")

if len(sys.argv) > 3:
    result = compress.prune(sys.argv[2], sys.argv[3], out)
else:
    model, tokenizer = tiny.make()
    result = compress.prune(model, here / "tiny.yaml", out, tokenizer=tokenizer, export=None, bench=None)

size, quality = result.report["size"], result.report["quality"]
print(f"removed {100 * size['backbone_removed']:.1f} % of the blocks' weights")
print(f"perplexity {quality['geometric_mean']['dense']:.1f} -> {quality['geometric_mean']['pruned']:.1f}")

pruned, tokenizer = result.model, AutoTokenizer.from_pretrained(result.saved)
words = tokenizer("The statement", return_tensors="pt")
torch.manual_seed(0)
ids = pruned.generate(**words, max_new_tokens=32, do_sample=True, top_k=10)
print(" ".join(tokenizer.decode(ids[0]).split()))
print(f"the model card: {result.release / 'README.md'}")
