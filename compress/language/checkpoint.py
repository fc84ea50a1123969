"""Models on disk: writing them in a layout, and proving that they load again."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import CompressError
from compress.models import decoder
from compress.models.folder import (
    CONFIG,
    GENERATION,
    REMOTE_FILE,
    read_config,
    refuse_code,
    refuse_named_code,
    seen,
)
from compress.models.reading import is_ragged, load_config, weight_files
from compress.processes.children import python
from compress.processes.distributed import available_bytes
from compress.report.multimodal import NAME as MULTIMODAL

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.families.base import Family

Layout = Literal["per-layer", "padded", "stock"]
FINGERPRINT = "fingerprint.safetensors"
SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-4  # largest difference allowed of reloaded logits, relative to the largest logit


def save_model(
    model: Any,
    family: Family,
    layers: list[tuple[int, int, int]] | None,
    folder: Path,
    *,
    tokenizer: Any,
    dtype: Any,
    tokens: Tensor,
    stock: bool = False,
) -> None:
    """Writes a model so that transformers loads it again, with the logits it must then give.

    Args:
        model: sliced (``layers`` given) or of one shape (``layers`` None: stock classes load it).
        layers: (query heads, KV groups, neurons) of every block: the `per-layer` layout.
        stock: the blocks of ``layers`` are alike or wholly gone: those that stay are written, and stock classes load
            them.
        dtype: the type the weights are stored in.
        tokens: (1, n) int64, the input of the fingerprint.

    Raises:
        CompressError: a weight is not finite.
    """
    import torch
    from safetensors.torch import save_file

    every = range(len(decoder.blocks(model)))
    kept = [i for i in every if any(layers[i])] if stock and layers is not None else every
    _write_weights(model, family, folder, dtype, kept)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        # As it is: transformers reads settings that it refuses to save, such as a temperature without sampling.
        model.generation_config.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    if stock and layers is not None:
        config = _stock_config(config, family, model.config, layers, kept)
    elif layers is not None:
        family.write_layers(config, layers, family.geometry(model.config))
        config["architectures"] = [f"Compressed{family.causal_lm}"]
        config["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE_FILE}.Compressed{family.causal_lm}"}
        (folder / f"{REMOTE_FILE}.py").write_text(family.ragged_source(), encoding="utf-8")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # From what was written, in the type it was written in.
    from compress.models.streaming import stream_model

    device = family.embedding_device(model)
    with torch.no_grad():
        logits = stream_model(folder, family, 1, device)(tokens.to(device)).logits.float().cpu()
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / FINGERPRINT)


def _stock_config(
    config: dict[str, Any], family: Family, dense: Any, layers: Sequence[tuple[int, int, int]], kept: Sequence[int]
) -> dict[str, Any]:
    """The configuration of the blocks ``kept``, which are alike; what it says of every block is said of those.

    Raises:
        CompressError: they are not alike.
    """
    shapes = {layers[i] for i in kept}
    if len(shapes) != 1 or not all(min(shape) for shape in shapes):
        raise CompressError(
            f"{len(shapes)} sizes of blocks stay, and a stock shape has one",
            where="plan.json",
            fix="save it in the layout per-layer, or prune it with tyr.shape=stock",
        )
    sizes = family.layer_overrides(*shapes.pop())
    unknown = sorted({*sizes, "num_hidden_layers"} - set(config))
    if unknown:
        raise CompressError(
            f"this model's configuration has no {unknown[0]}, so its sizes cannot be said in the stock way",
            where="config.json",
            fix="save it in the layout per-layer: --set tyr.shape=ragged --set 'layouts=[per-layer]'",
        )
    every = {n for n, v in config.items() if "layer" in n and isinstance(v, list) and len(v) == len(layers)}
    made = {name: [value[i] for i in kept] if name in every else value for name, value in config.items()}
    head_dim = family.geometry(dense).blocks[0].head_dim
    return {**made, **sizes, "head_dim": head_dim, "num_hidden_layers": len(kept)}


def check_stock(config: Any, family: Family) -> None:
    """Asks beforehand whether blocks that are alike and smaller can be said by the sizes of the configuration alone: a
    model that is built of it must have blocks of the sizes that were meant.

    Raises:
        CompressError: it has no size for them, or makes others of it (a head as wide as hidden / heads).
    """
    from compress.models.families import FAMILIES, family_for

    if config.model_type in FAMILIES:
        return  # theirs are held by the tests
    dense = family.geometry(config).blocks[0]
    groups = max(1, dense.kv_heads // 2)
    heads = groups * dense.group if dense.kv_heads > 1 else max(1, dense.heads // 2)
    meant = replace(dense, heads=heads, kv_heads=groups, ffn=max(1, dense.ffn // 2))
    facts = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "transformers_version")}
    said = ""
    try:
        made = _stock_config(facts, family, config, [(heads, groups, meant.ffn)], [0])
        smaller = type(config)(**{**made, "num_hidden_layers": config.num_hidden_layers})
        found = family_for(smaller).geometry(smaller).blocks[0]
        if found != meant:
            said = f"heads of {meant.head_dim} channels become {found.head_dim} wide where there are fewer of them"
    except Exception as e:  # what it cannot be, transformers says in any type
        said = e.what if isinstance(e, CompressError) else " ".join(str(e).split())[:160]
    if said:
        raise CompressError(
            f"transformers' own class of {config.model_type} does not build smaller blocks that are alike: {said}",
            where="tyr.shape",
            fix="prune it ragged: --set tyr.shape=ragged --set 'layouts=[per-layer]'",
        )


def _write_weights(model: Any, family: Family, folder: Path, dtype: Any, kept: Sequence[int]) -> None:
    """Writes a model's weights block by block, in files of at most `SHARD_BYTES`, named as transformers names them;
    of the blocks those that are ``kept``, numbered anew."""
    import torch
    from safetensors.torch import save_file

    held: dict[str, Tensor] = {}
    shards: list[tuple[Path, list[str]]] = []
    total = 0

    def flush() -> None:
        path = folder / f".shard-{len(shards):05d}"
        save_file(held, path, metadata={"format": "pt"})
        shards.append((path, list(held)))
        held.clear()

    def add(prefix: str, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CompressError(
                    f"the pruned weight {prefix}{name} is not finite", where=str(folder), fix="raise the damping"
                )
            kept = tensor.to("cpu", dtype).contiguous()
            if not torch.isfinite(kept).all():
                raise CompressError(
                    f"the pruned weight {prefix}{name} goes up to {float(tensor.abs().max()):.3g}, which {dtype} cannot"
                    " hold",
                    where=str(folder),
                    fix="store the dense model in bfloat16 or float32",
                )
            if held and sum(t.nbytes for t in held.values()) + kept.nbytes > SHARD_BYTES:
                flush()
            held[prefix + name] = kept
            total += kept.nbytes

    blocks = decoder.blocks(model)
    for index, old in enumerate(kept):
        add(f"{decoder.prefix(model)}{index}.", blocks[old].state_dict())
    rest = {
        n: t
        for n, t in model.state_dict().items()
        if decoder.block_of(n) is None
        and not (n == f"{decoder.head_name(model)}.weight" and family.geometry(model.config).tied)
    }
    add("", rest)
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        places.update(dict.fromkeys(names, name))
    index_facts = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_facts, indent=2) + "\n", encoding="utf-8")


def remote_source(folder: Path) -> str | None:
    """The code that this version writes beside the model, where its layers differ in size."""
    from compress.models.composite import find, source_in
    from compress.models.families import family_for

    if not is_ragged(folder):
        return None
    whole = find(folder)
    return family_for(load_config(folder)).ragged_source() if whole is None else source_in(whole)


def written_code(folder: Path) -> dict[str, str]:
    """Name -> source, of all code that this version writes into a model's folder, and beside a whole checkpoint in it.

    Raises:
        CompressError: a configuration cannot be read.
    """
    places = (folder, folder / MULTIMODAL)
    sources = {place: remote_source(place) for place in places if (place / CONFIG).is_file()}
    name = f"{REMOTE_FILE}.py"
    return {(place / name).relative_to(folder).as_posix(): s for place, s in sources.items() if s is not None}


def check_code(folder: Path) -> None:
    """Raises CompressError where the folder holds or names code other than what `save_model` writes there."""
    refuse_code(folder, written_code(folder))
    refuse_named_code(folder, read_config(folder))


def verify_clean(folder: Path, memory: int | None = None) -> dict[str, Any]:
    """Loads the model in a clean process, as a user does, and compares its logits with the fingerprint.

    Args:
        memory: bytes that are free; measured by default. A model that takes more than half of them in float32 is
            loaded by accelerate's big-model dispatch, with what finds no room left on disk.

    Returns:
        ``max_logit_difference`` and ``tolerance`` (both in logits), ``parameters`` and the ``class`` it loaded as.

    Raises:
        CompressError: it does not load, or the logits differ.
    """
    if not (folder / FINGERPRINT).exists():
        raise CompressError(
            "the model has no fingerprint to be checked against",
            where=str(folder / FINGERPRINT),
            fix="`compress prune` writes it; name a model that was saved by it",
        )
    from compress.models.composite import AUTO, find

    # In float32, beside what the machine does otherwise.
    size = sum(path.stat().st_size for path in weight_files(folder))
    widen = 4 / load_config(folder).dtype.itemsize
    free = available_bytes() if memory is None else memory
    limit = "" if size * widen < 0.5 * free else str(int(0.5 * free))
    auto = "AutoModelForCausalLM" if find(folder) is None else AUTO
    with seen(folder, code=remote_source(folder)) as private, tempfile.TemporaryDirectory() as modules:
        # A module cache of its own: no copy of the folder's code from an earlier load is taken for this one.
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = python(str(Path(__file__).parent / "reload.py"), str(private), limit, auto)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        said = done.stderr.replace(str(private), str(folder))
    if done.returncode:
        lines = [line for line in said.splitlines() if line.strip()] or ["no message"]
        raise CompressError(
            f"the saved model does not load in a clean process: {lines[-1]}",
            where=str(folder),
            fix="make it again with `compress prune --fresh`",
        )
    found = json.loads(done.stdout.splitlines()[-1])
    tolerance = TOLERANCE * found["max_abs_logit"]
    if not found["max_abs_difference"] <= tolerance:
        raise CompressError(
            f"the reloaded model's logits differ by {found['max_abs_difference']:.3g} (allowed: {tolerance:.3g})",
            where=str(folder),
            fix="the weights or the code beside them were changed since they were saved",
        )
    return {
        "max_logit_difference": found["max_abs_difference"],
        "tolerance": tolerance,
        "parameters": found["parameters"],
        "class": found["class"],
        "offloaded": found["offloaded"],
    }
