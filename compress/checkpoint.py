"""Models on disk: reading them with every fault named, writing them in a layout, and proving that they load again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.cache import sha256_of
from compress.distributed import available_bytes
from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.families.base import Family

Layout = Literal["per-layer", "padded"]
FINGERPRINT = "fingerprint.safetensors"
REMOTE_FILE = "modeling_compress"
SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-4  # largest difference allowed of reloaded logits, relative to the largest logit


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, checked to be all there.

    Raises:
        CompressError: there are none, or a shard that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [n for n in names if not (folder / n).exists()]
        if missing:
            raise CompressError(
                f"{len(missing)} of {len(names)} weight files are missing: {missing[0]}",
                where=str(folder),
                fix="fetch the model again",
            )
        return [folder / n for n in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    other = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))]
    raise CompressError(
        "the folder holds no safetensors weights" + (f", only {other[0]}" if other else ""),
        where=str(folder),
        fix="save the model with save_pretrained (safetensors); pickled weights are not loaded",
    )


def check_weights(folder: Path) -> None:
    """Reads every tensor once.

    Raises:
        CompressError: a file is truncated or damaged, or a tensor holds NaN or infinity.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        bad = int((~torch.isfinite(tensor)).sum())
                        raise CompressError(
                            f"the weight {name} holds {bad:,} NaN or infinite values",
                            where=str(path),
                            fix="repair or fetch the model again; nothing was pruned",
                        )
        except SafetensorError as e:
            raise CompressError(
                f"the weight file is damaged or cut short: {e}", where=str(path), fix="fetch or copy it again"
            ) from e


def weights_hash(folder: Path) -> str:
    """Hex SHA-256 over a model's weight files and its config."""
    import hashlib

    parts = [f"{path.name}:{sha256_of(path)}" for path in (*weight_files(folder), folder / "config.json")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as e:
        raise CompressError(
            f"the configuration cannot be read: {str(e).splitlines()[0]}",
            where=str(folder / "config.json"),
            fix="the folder must hold a model that transformers knows",
        ) from e


def is_ragged(folder: Path) -> bool:
    """Whether the folder holds a model in the `per-layer` layout."""
    return bool(json.loads((folder / "config.json").read_text()).get("per_layer_config"))


def refuse_ragged(folder: Path) -> None:
    """Raises CompressError where the folder's model is a pruned one."""
    if (folder / "config.json").exists() and is_ragged(folder):
        raise CompressError(
            "the model's layers already differ in size; pruning a pruned model again is not supported",
            where=str(folder),
            fix="prune the dense model at the higher sparsity",
        )


def load_model(folder: Path, family: Family, **options: Any) -> Any:
    """A model in float32, in evaluation mode, from either layout; code in the folder is never run.

    Raises:
        CompressError: weights are missing, or do not have the shapes that config.json says.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if options.pop("ignore_mismatched_sizes", False):
        raise CompressError(
            "ignore_mismatched_sizes would fill mismatched weights with random numbers",
            where=str(folder),
            fix="load the model without it",
        )
    config = load_config(folder)
    cls: Any = family.ragged_class() if is_ragged(folder) else AutoModelForCausalLM
    try:
        model, info = cls.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
        )
    except (RuntimeError, ValueError, OSError) as e:
        lines = [line for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
        raise CompressError(
            f"the model cannot be loaded: {lines[0]}",
            where=str(folder),
            fix="weights and config.json must belong together",
        ) from e
    missing = sorted(info["missing_keys"])
    if missing:
        raise CompressError(
            f"{len(missing)} weights are missing, the first is {missing[0]}",
            where=str(folder),
            fix="fetch the model again",
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def save_model(
    model: Any,
    family: Family,
    layers: list[tuple[int, int, int]] | None,
    folder: Path,
    *,
    tokenizer: Any,
    dtype: Any,
    tokens: Tensor,
) -> None:
    """Writes a model so that transformers loads it again, with the logits it must then give.

    Args:
        model: sliced (``layers`` given) or of one shape (``layers`` None: stock classes load it).
        layers: (query heads, KV groups, neurons) of every block: the `per-layer` layout.
        dtype: the type the weights are stored in.
        tokens: (1, n) int64, the input of the fingerprint.

    Raises:
        CompressError: a weight is not finite.
    """
    import torch
    from safetensors.torch import save_file

    _write_weights(model, family, folder, dtype)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if layers is not None:
        geometry = family.geometry(load_config_dict(config))
        dense = (geometry.heads, geometry.kv_heads, geometry.ffn)
        config["per_layer_config"] = {
            str(i): family.layer_overrides(*layer) for i, layer in enumerate(layers) if layer != dense
        }
        # Without it some families take hidden / heads, which a layer with fewer heads gets wrong.
        config["head_dim"] = geometry.head_dim
        config["allow_global_per_layer_attribute_access"] = True
        config["architectures"] = [f"Compressed{family.causal_lm}"]
        config["auto_map"] = {"AutoModelForCausalLM": f"{REMOTE_FILE}.Compressed{family.causal_lm}"}
        (folder / f"{REMOTE_FILE}.py").write_text(family.ragged_source())
    path.write_text(json.dumps(config, indent=2) + "\n")
    # From what was written, in the type it was written in.
    from compress.models.streaming import stream_model

    device = family.embedding_device(model)
    with torch.no_grad():
        logits = stream_model(folder, family, 1, device)(tokens.to(device)).logits.float().cpu()
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / FINGERPRINT)


def _write_weights(model: Any, family: Family, folder: Path, dtype: Any) -> None:
    """Writes a model's weights block by block, in files of at most `SHARD_BYTES`, named as transformers names them."""
    import torch
    from safetensors.torch import save_file

    from compress.models.streaming import PREFIX

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
            if held and sum(t.nbytes for t in held.values()) + kept.nbytes > SHARD_BYTES:
                flush()
            held[prefix + name] = kept
            total += kept.nbytes

    blocks = family.blocks(model)
    for index, block in enumerate(blocks):
        add(f"{PREFIX}{index}.", block.state_dict())
    rest = {
        n: t
        for n, t in model.state_dict().items()
        if not n.startswith(PREFIX) and not (n == "lm_head.weight" and family.geometry(model.config).tied)
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_facts, indent=2) + "\n")


def load_config_dict(config: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    plain = {k: v for k, v in config.items() if k not in ("model_type", "auto_map", "per_layer_config")}
    return AutoConfig.for_model(config["model_type"], **plain)


def check_code(folder: Path) -> None:
    """Raises CompressError where the folder holds code other than what `save_model` writes there."""
    from compress.models.families import family_for

    for path in sorted(folder.glob("*.py")):
        written = family_for(load_config(folder)).ragged_source()
        if path.name != f"{REMOTE_FILE}.py" or path.read_text() != written:
            raise CompressError(
                "the folder holds code that this version of compress did not write; it was not run",
                where=str(path),
                fix="take it out, or prune the model again",
            )
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        named = json.loads(path.read_text()).get("auto_map", {}) if path.exists() else {}
        for value in named.values() if isinstance(named, dict) else [named]:
            # "ORG/NAME--file.Class" would be taken from another repository.
            if not str(value).startswith(f"{REMOTE_FILE}.") or not (folder / f"{REMOTE_FILE}.py").is_file():
                raise CompressError(
                    f"the folder names code that this version of compress did not write: {value}; it was not run",
                    where=str(path),
                    fix="take it out, or prune the model again",
                )


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
    # In float32, beside what the machine does otherwise.
    size = sum(path.stat().st_size for path in weight_files(folder))
    widen = 4 / load_config(folder).dtype.itemsize
    free = available_bytes() if memory is None else memory
    limit = [] if size * widen < 0.5 * free else [str(int(0.5 * free))]
    with tempfile.TemporaryDirectory() as modules:
        # A module cache of its own: no copy of the folder's code from an earlier load is taken for this one.
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).parent / "reload.py"), str(folder), *limit],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
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
