"""Týr's local stage on a model whose weights are larger than this machine's memory: peak memory against depth.

    python tools/bench_streaming.py --folder /tmp/large             # makes it (random weights) and prunes 24 blocks
    python tools/bench_streaming.py --folder /tmp/large --blocks 8

The weights are random and of no use; reading them, the statistics, the elimination and the refits are the real ones.
Every block is a file of its own. What is printed is this process's peak resident memory up to each block.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from compress.models.blocks import BlockRunner
from compress.models.families import family_for
from compress.models.streaming import StreamedBlocks, stream_model
from compress.recipes.tyr.supernet import Local, Menu, Streams, neuron_counts, prune_block
from compress.system import host
from compress.system.files import whole_file, write_whole


def make(folder: Path, config: object, layers: int) -> int:
    """Writes a Llama of random bfloat16 weights, one file a block; returns its bytes."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {n: p.shape for n, p in model.state_dict().items() if n != "lm_head.weight"}
    places, total = {}, 0
    for part in range(-1, layers):
        prefix = f"model.layers.{part}."
        names = [n for n in shapes if n.startswith(prefix) or (part < 0 and ".layers." not in n)]
        path = folder / f"model-{part + 2:05d}-of-{layers + 1:05d}.safetensors"
        generator = torch.Generator().manual_seed(part + 1)
        tensors = {}
        for name in names:
            made = torch.ones(shapes[name]) if len(shapes[name]) == 1 else torch.empty(shapes[name])
            if made.dim() == 2:
                made.uniform_(-1, 1, generator=generator).mul_((3 / made.shape[1]) ** 0.5)
            tensors[name] = made.to(torch.bfloat16)
        if not path.exists():
            with whole_file(path) as partial:
                save_file(tensors, partial, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, path.name))
        total += path.stat().st_size
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    write_whole(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": places}))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--times-memory", type=float, default=1.1, help="size of the weights, in this machine's memory")
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=24, help="blocks that are pruned")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    from transformers import LlamaConfig

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    h, head = given.hidden, given.hidden // given.heads
    groups = max(1, given.heads // 4)
    block = 2 * (2 * h * h + 2 * h * groups * head + 3 * h * given.ffn)
    layers = int(given.times_memory * memory / block) + 1
    config = LlamaConfig(
        hidden_size=h, intermediate_size=given.ffn, num_hidden_layers=layers, num_attention_heads=given.heads,
        num_key_value_heads=groups, head_dim=head, vocab_size=1000, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    size = make(given.folder, config, layers)
    print(f"{layers} blocks of {block / 1e6:.0f} MB, {size / 1e9:.1f} GB of weights; memory {memory / 1e9:.1f} GB")
    torch.set_grad_enabled(False)
    family = family_for(config)
    costs = family.costs(config)
    model = stream_model(given.folder, family, 1, torch.device("cpu"))
    blocks = model.model.layers
    assert isinstance(blocks, StreamedBlocks)
    runner = BlockRunner(model, family, given.length)
    ids = torch.randint(0, 1000, (given.windows, given.length), generator=torch.Generator().manual_seed(0))
    streams = Streams.start(runner, ids, "expectation")
    menu = Menu(neuron_counts(given.ffn, given.ffn // 2, given.ffn // 8, 9, 16), ((groups, given.heads // groups),))
    how = Local(0.01, "residual", "expectation", "obs", step=16, trim=False, token_weight="norm")
    print("block  seconds  read so far (GB)  peak so far (GB)")
    for index in range(min(given.blocks, layers)):
        began = time.monotonic()
        prune_block(runner, index, streams, menu, costs.blocks[index], how)
        peak = host.peak_memory()
        print(
            f"{index:5} {time.monotonic() - began:8.1f} {blocks.bytes_read / 1e9:17.2f} {peak / 1e9:17.3f}", flush=True
        )


if __name__ == "__main__":
    main()
