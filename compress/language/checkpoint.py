"""Models on disk: reading them with every fault named, writing them in a layout, and proving that they load again."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.errors import CompressError
from compress.models.folder import (
    CONFIG,
    REMOTE_FILE,
    read_config,
    refuse_code,
    refuse_named_code,
    seen,
    weights_of,
)
from compress.processes.children import python
from compress.processes.distributed import available_bytes
from compress.run.cache import sha256_of

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.families.base import Family

Layout = Literal["per-layer", "padded"]
FINGERPRINT = "fingerprint.safetensors"
SHARD_BYTES = 5 * 10**9
# transformers otherwise asks on the terminal whether to run a stranger's code, and takes "y" from a pipe.
NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
TOLERANCE = 1e-4  # largest difference allowed of reloaded logits, relative to the largest logit


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make a model, see `compress.models.folder.weights_of`."""
    return list(weights_of(folder).files)


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
    """The transformers configuration of a model folder; no weight is needed, and no code is run.

    Raises:
        CompressError: it cannot be read, transformers rejects it, or it wants code or weights that are not the
            folder's own.
    """
    from transformers import AutoConfig

    with seen(folder, weights=False) as private, _rejected(folder, CONFIG, "the configuration cannot be read"):
        config = AutoConfig.from_pretrained(private, **NO_CODE)
    config._name_or_path = str(folder)
    return config


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; no code is run.

    Raises:
        CompressError: it cannot be read, or wants code of its own.
    """
    from transformers import AutoTokenizer

    with seen(folder, weights=False) as private, _rejected(folder, "", "the tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(private, **NO_CODE)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def from_config(config: Any, cls: Any = None) -> Any:
    """An untrained model in float32: ``cls``, or transformers' own class for the configuration. No code is run."""
    import torch
    from transformers import AutoModelForCausalLM

    if cls is not None:
        return cls._from_config(config, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


@contextmanager
def _rejected(folder: Path, name: str, what: str) -> Iterator[None]:
    """transformers' refusals as one error each."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except CompressError:
        raise
    except (StrictDataclassError, ValueError, TypeError, OSError, KeyError, AttributeError, RuntimeError) as e:
        said = " ".join(line.strip() for line in str(e).splitlines() if line.strip()) or type(e).__name__
        if "trust_remote_code" in said:
            said, fix = "it needs code of its own, which is not run", "name a model that transformers knows by itself"
        else:
            fix = "the folder must hold a model that transformers knows"
        raise CompressError(f"{what}: {said[:300]}", where=str(folder / name) if name else str(folder), fix=fix) from e


def is_ragged(folder: Path) -> bool:
    """Whether the folder holds a model in the `per-layer` layout."""
    return bool(read_config(folder).get("per_layer_config"))


def refuse_ragged(folder: Path) -> None:
    """Raises CompressError where the folder's model is a pruned one."""
    if (folder / CONFIG).exists() and is_ragged(folder):
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
    ragged = is_ragged(folder)
    cls: Any = family.ragged_class() if ragged else AutoModelForCausalLM
    given = {"dtype": torch.float32, "local_files_only": True, **({} if ragged else NO_CODE), **options}
    with seen(folder) as private, _rejected(folder, "", "the model cannot be loaded"):
        model, info = cls.from_pretrained(private, config=config, output_loading_info=True, **given)
    model.name_or_path = model.config._name_or_path = str(folder)
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


def remote_source(folder: Path) -> str | None:
    """The code that this version writes beside the model, where its layers differ in size."""
    from compress.models.families import family_for

    return family_for(load_config(folder)).ragged_source() if is_ragged(folder) else None


def check_code(folder: Path) -> None:
    """Raises CompressError where the folder holds or names code other than what `save_model` writes there."""
    source = remote_source(folder)
    refuse_code(folder, {} if source is None else {f"{REMOTE_FILE}.py": source})
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
    # In float32, beside what the machine does otherwise.
    size = sum(path.stat().st_size for path in weight_files(folder))
    widen = 4 / load_config(folder).dtype.itemsize
    free = available_bytes() if memory is None else memory
    limit = [] if size * widen < 0.5 * free else [str(int(0.5 * free))]
    with seen(folder, code=remote_source(folder)) as private, tempfile.TemporaryDirectory() as modules:
        # A module cache of its own: no copy of the folder's code from an earlier load is taken for this one.
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": modules,
            "TRANSFORMERS_VERBOSITY": "error",
        }
        command = python(str(Path(__file__).parent / "reload.py"), str(private), *limit)
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
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
