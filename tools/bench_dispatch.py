"""A forward through a model that is not held, four ways: what calibration and search do, against accelerate's dispatch.

    PYTHONPATH=. python tools/bench_dispatch.py --folder /tmp/dispatch      # makes a model of random weights, 2.2 GB

- streamed: blocks read from safetensors one by one (`memory.stream`)
- dispatched: accelerate's big-model dispatch with every block on disk
- streamed x 2, sharded x 2: two processes, each with half of the windows; every one reads every block, or holds a part
  of each (`memory.shard`, FSDP2)

Each in fresh processes of one thread, in turn. What is printed: seconds a pass, the largest process's peak memory,
bytes read from the files in all, and how far the logits are from the first row's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.language.setup import quiet
from compress.models.families import family_for
from compress.models.streaming import in_step, stream_model
from compress.processes import distributed
from compress.system import host
from compress.system.files import write_whole
from tools.bench_streaming import make

WAYS = {"streamed": 1, "dispatched": 1, "streamed x 2": 2, "sharded x 2": 2}


def passed(way: str, folder: Path, ids: Tensor) -> dict[str, Any]:
    """One pass of this process's windows; its logits at the last token of each."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    mine = ids[list(distributed.share(len(ids)))]
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        if way == "dispatched":
            # Room for what is not a block, and for one block.
            embeddings = 4 * config.vocab_size * config.hidden_size
            block = 4 * sum(p.numel() for p in _one_block(config).parameters())
            model = distributed.dispatched(folder, config, 2 * embeddings + 2 * block, Path(beside))
        else:
            model = stream_model(folder, family_for(config), 1, torch.device("cpu"), way.startswith("sharded"))
        began = time.monotonic()
        with in_step(model) if way != "dispatched" else torch.no_grad():
            hidden = model.model(input_ids=mine, use_cache=False).last_hidden_state[:, -1]
        spent = time.monotonic() - began
        logits = model.lm_head(hidden)
        read = getattr(model.model.layers, "bytes_read", 0)
    return {
        "seconds": spent,
        "peak": host.peak_memory(),
        "read": read,
        "logits": logits.tolist(),
    }


def _one_block(config: Any) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    with distributed.empty_weights():
        found: torch.nn.Module = AutoModelForCausalLM.from_config(config).model.layers[0]
    return found


def work(way: str, folder: Path, windows: int, length: int, out: Path) -> None:
    """What each process does; the main one writes what all have found."""
    quiet()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    distributed.join()
    ids = torch.randint(0, 1000, (windows, length), generator=torch.Generator().manual_seed(0))
    found = distributed.gather([passed(way, folder, ids)])
    if distributed.is_main():
        write_whole(out, json.dumps(found))
    distributed.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5504)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        work(given.way, given.folder, given.windows, given.length, given.out)
        return
    from transformers import LlamaConfig

    heads = given.hidden // 128
    config = LlamaConfig(
        hidden_size=given.hidden, intermediate_size=given.ffn, num_hidden_layers=given.layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), head_dim=128, vocab_size=1000,
        tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    size = make(given.folder, config, given.layers)
    print(f"{given.layers} blocks, {size / 1e9:.1f} GB of weights", flush=True)
    found: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
    for _ in range(given.times):
        for way, count in WAYS.items():
            found[way].append(_in_fresh_processes(way, count, given))
    first = torch.tensor([row for p in found["streamed"][0] for row in p["logits"]])
    print("| | seconds | peak of a process, MB | read in all, MB | logits apart |\n|---|---|---|---|---|")
    for way, runs in found.items():
        spent = [max(p["seconds"] for p in run) for run in runs]
        peak = statistics.median(max(p["peak"] for p in run) for run in runs)
        read = sum(p["read"] for p in runs[0])
        logits = torch.tensor([row for p in runs[0] for row in p["logits"]])
        told = f"{read / 1e6:.0f}" if read else "not told"
        print(
            f"| {way} | {statistics.median(spent):.1f} ({min(spent):.1f} to {max(spent):.1f}) | {peak / 1e6:.0f} |"
            f" {told} | {float((logits - first).abs().max()):.1e} |"
        )


def _in_fresh_processes(way: str, count: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [
            sys.executable, "-m", "tools.bench_dispatch", "--folder", str(given.folder), "--way", way,
            "--out", str(out), "--windows", str(given.windows), "--length", str(given.length),
        ]  # fmt: skip
        places = distributed.places(count) if count > 1 else [{}]
        running = [subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **p}) for p in places]
        codes = [process.wait() for process in running]
        if any(codes):
            raise SystemExit(f"{way} failed")
        rows: list[dict[str, Any]] = json.loads(out.read_text("utf-8"))
    return rows


if __name__ == "__main__":
    main()
