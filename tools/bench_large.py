"""The first blocks of a model that no GPU holds, through a whole recipe on one: what `plan` says, and what is measured.

    python tools/bench_large.py --out /tmp/large                     # two blocks of Llama-3.1-70B, on 24 GB of the GPU
    python tools/bench_large.py --out /tmp/large --model llama-8b --blocks 4 --gpu-gb 12

The weights are random and of no use, embeddings and head have their full size, and everything that is done to them is
the real thing: `compress prune` up to the saved model. Without a GPU it runs on the CPU. Of the GPU the process may
allocate no more than is said.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compress.system.files import settle, write_whole

SETTINGS = [
    "calibration.sources=[{embedded: python-docs}]",
    "evaluation.texts=[{name: documentation, source: {embedded: python-docs}}]",
    "evaluation.windows=1",
    "calibration.windows=16",
    "tyr.supernet_windows=16",
    "tyr.search.windows=4",
    "tyr.search.singles_windows=2",
    "tyr.search.generations=2",
    "tyr.search.offspring=4",
    "tyr.search.survivors=[2]",
    "tyr.search.steps=[0.25, 1.0]",
]


def make(folder: Path, alias: str, blocks: int, device: torch.device) -> None:
    """Writes a model of the alias's shape, ``blocks`` deep, with random bfloat16 weights and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from compress.models.sources import load_alias, resolve

    said = load_alias(alias).config  # type: ignore[union-attr]
    config = AutoConfig.for_model(**{**said, "num_hidden_layers": blocks})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made: Path = folder.with_suffix(".partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    shapes = {n: p.shape for n, p in model.state_dict().items()}
    for part in range(-1, blocks):
        prefix = f"model.layers.{part}."
        names = [n for n in shapes if n.startswith(prefix) or (part < 0 and ".layers." not in n)]
        tensors = {}
        for name in names:
            values = torch.ones(shapes[name], device=device)
            if values.dim() == 2:
                values.uniform_(-1, 1, generator=generator).mul_((3 / values.shape[1]) ** 0.5)
            tensors[name] = values.to(torch.bfloat16).cpu()
        file = f"model-{part + 2:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, made / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(names, file))
    config.architectures = [type(model).__name__]
    config.save_pretrained(made)
    (made / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8"
    )
    small = resolve("smollm2-135m").folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, made / name)
    settle(made, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="llama-70b", help="a name with a configuration in models/")
    parser.add_argument("--recipe", default="tyr-large")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--gpu-gb", type=float, default=24.0, help="10^9 bytes that may be allocated on the GPU")
    parser.add_argument("--until", default="model", choices=["plan", "model"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    from compress.pipeline import prune
    from compress.processes.distributed import device, leave_no_gaps
    from compress.verbs.common import plan

    leave_no_gaps()
    where = device()
    folder: Path = given.out / "model"
    began = time.monotonic()
    if not folder.exists():
        make(folder, given.model, given.blocks, where)
    print(f"weights: {sum(p.stat().st_size for p in folder.glob('*.safetensors')) / 1e9:.1f} GB", flush=True)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e9 * given.gpu_gb / torch.cuda.mem_get_info()[1])
    overrides = [*SETTINGS, *given.overrides]
    reckoned = {row["stage"]: row for row in plan(str(folder), given.recipe, overrides)["stages"]}
    began = time.monotonic()
    report = prune(str(folder), given.recipe, given.out / "run", overrides=overrides, until=given.until)
    spent = time.monotonic() - began
    measured = {row["name"]: row for row in report["stages"]}
    write_whole(given.out / "large.json", json.dumps({"plan": reckoned, "measured": measured}, indent=1) + "\n")
    print(table(reckoned, measured))
    print(f"{spent:.0f} s in all", flush=True)
    if where.type == "cuda":
        print(f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved at most, of {given.gpu_gb:g} GB allowed")


def table(reckoned: dict[str, Any], measured: dict[str, Any]) -> str:
    """Markdown: stage by stage, what was foretold and what was."""
    lines = ["| stage | s, plan | s | GPU GB, plan | GPU GB | RAM GB, plan | RAM GB |", "|---|---|---|---|---|---|---|"]
    for name, row in measured.items():
        told = reckoned.get(name)
        if told is None:
            continue
        gpu = f"{row['peak_gpu_bytes'] / 1e9:.1f}" if "peak_gpu_bytes" in row else ""
        foretold = f"{told['gpu_bytes'] / 1e9:.1f}" if "gpu_bytes" in told else ""
        lines.append(
            f"| {name} | {told['seconds']:.0f} | {row['seconds']:.0f} | {foretold} | {gpu}"
            f" | {told['ram_bytes'] / 1e9:.1f} | {row['peak_rss_bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
