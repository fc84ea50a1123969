"""Language models from a folder: weights checked, configuration, tokenizer and model loaded; no code is run."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.models import at_fault
from compress.models.folder import (
    CONFIG,
    GENERATION,
    own_file,
    read_config,
    seen,
    weights_of,
)
from compress.models.sizes import check_own_names
from compress.run.cache import sha256_of
from compress.run.progress import say
from compress.run.strict_json import read_json
from compress.run.tensor_files import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.families.base import Family


# transformers otherwise asks on the terminal whether to run a stranger's code, and takes "y" from a pipe.
NO_CODE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}

# A language part that no causal language model of transformers has by itself, and the type of one with its function
# of text. (Those of Qwen2-VL and Qwen2.5-VL have no head size of their own, so blocks of fewer heads are not built.)
LANGUAGE_OF = {"qwen3_vl_text": "qwen3"}
LARGEST_WEIGHT = 1e12  # sums of squares of what it gives are beyond float32; no trained weight is near it


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make a model, see `compress.models.folder.weights_of`."""
    return list(weights_of(folder).files)


def check_weights(folder: Path, *, counts: bool = False) -> None:
    """Reads every tensor once.

    Args:
        counts: whether there may be whole numbers among them, as a batch norm counts its batches.

    Raises:
        CompressError: a file is truncated or damaged, or a tensor is no float of 16 bits or more, holds NaN or
            infinity, or numbers that overflow.
    """
    for path in weight_files(folder):
        with open_tensors(path, "the weight file") as file:
            for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                tensor = file.get_tensor(name)
                what = None if counts and not tensor.is_floating_point() else _wrong_values(tensor)
                if what is not None:
                    raise CompressError(
                        f"the weight {name} {what}",
                        where=str(path),
                        fix="repair or fetch the model again, unquantised; nothing was pruned",
                    )


def _wrong_values(tensor: Tensor) -> str | None:
    import torch

    if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not a float of 16 bits or more"
    if not torch.isfinite(tensor).all():
        return f"holds {int((~torch.isfinite(tensor)).sum()):,} NaN or infinite values"
    if tensor.numel() and float(tensor.abs().max()) > LARGEST_WEIGHT:
        return f"goes up to {float(tensor.abs().max()):.3g}: what is computed with it overflows"
    return None


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

    try:
        with seen(folder, weights=False) as private, rejected(folder, CONFIG, "the configuration cannot be read"):
            config = AutoConfig.from_pretrained(private, **NO_CODE)
        check_own_names(config, folder / CONFIG)
        _check_activation(config.get_text_config(), folder / CONFIG)
        _check_buildable(config, folder)
    except CompressError as e:
        key = None if e.__cause__ is None else at_fault.config_key(folder, str(e.__cause__))
        if key is not None:
            e.what = f"{key}: {e.what}"
        raise
    config._name_or_path = str(folder)
    return config


def _check_activation(config: Any, path: Path) -> None:
    """transformers looks a name up where a block is built, and says then that there is no such key."""
    from transformers.activations import ACT2CLS

    for key in ("hidden_act", "hidden_activation", "activation_function"):
        name = getattr(config, key, None)
        if name is not None and name not in ACT2CLS:
            raise CompressError(
                f"{key} is {name!r:.60}, which transformers does not know",
                where=str(path),
                fix=f"one of: {', '.join(sorted(ACT2CLS))}",
            )


def _check_buildable(config: Any, folder: Path) -> None:
    """transformers says much of what is wrong with a configuration only where it makes a model of it."""
    import torch

    from compress.models.families import FAMILIES

    if config.model_type in FAMILIES and not is_ragged(folder):
        with rejected(folder, CONFIG, "no model can be made of the configuration"), torch.device("meta"):
            from_config(copy.deepcopy(config))  # it takes the type that it is made in into its configuration


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; no code is run.

    Raises:
        CompressError: it cannot be read, or wants code of its own.
    """
    from transformers import AutoTokenizer

    def load(private: Path) -> Any:
        found = AutoTokenizer.from_pretrained(private, **NO_CODE)
        # What its files hold of a wrong type is often noticed only where it is used.
        _check_ids(found("The sea, 1 ship.")["input_ids"], len(found))
        found.convert_ids_to_tokens(found("The sea", add_special_tokens=False)["input_ids"])
        return found

    try:
        with seen(folder, weights=False) as private, rejected(folder, "", "the tokenizer cannot be read"):
            tokenizer = load(private)
    except CompressError as e:
        if e.__cause__ is not None and e.where == str(folder):
            e.where, key = at_fault.tokenizer_place(folder, load)
            e.what = f"{key}: {e.what}" if key else e.what
        raise
    # Some have tokens that no row of the embedding stands for (Gemma's images): where a text uses one, it is refused.
    tokenizer.embedding_rows = _embedding_rows(folder)
    tokenizer.name_or_path = str(folder)
    tokenizer.end_ids = end_ids(folder, tokenizer)
    return tokenizer


def end_ids(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that generation_config.json and config.json end a text with: one, or a list (Llama 3, Gemma).

    A document ends with the tokenizer's own; where that has none, with the first of these, which is said. So is an id
    that no token has: it is left out.

    Raises:
        CompressError: an ``eos_token_id`` is neither a whole number nor a list of such.
    """
    found: list[int] = []
    rows = tokenizer.embedding_rows if tokenizer.embedding_rows is not None else len(tokenizer)
    for name in ("generation_config.json", CONFIG):
        for one in _ids(folder, name):
            if 0 <= one < rows:
                found.append(one)
            else:
                say(f"{folder / name}: eos_token_id {one} is left out, the vocabulary has {rows:,} tokens")
    ends = tuple(dict.fromkeys(found))
    own = tokenizer.eos_token_id
    if own is None and ends:
        token = tokenizer.convert_ids_to_tokens(ends[0])
        say(f"{folder}: the tokenizer names no end token; documents end with {token} ({ends[0]}), as the model does")
    elif ends and own not in ends:
        token = tokenizer.convert_ids_to_tokens(own)
        told = ", ".join(map(str, ends))
        say(f"{folder}: documents end with the tokenizer's {token} ({own}); the model's settings say {told}")
    return ends


def _ids(folder: Path, name: str) -> list[int]:
    """``eos_token_id`` of a file of the folder; empty where there is none."""
    if not (folder / name).exists():
        return []
    facts = read_config(folder) if name == CONFIG else read_json(own_file(folder, name), f"the file {name}")
    inner = facts.get("text_config") if isinstance(facts, dict) else None
    value = facts.get("eos_token_id") if isinstance(facts, dict) else None
    if value is None and isinstance(inner, dict):
        value = inner.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for one in ids:
        if type(one) is not int:
            raise CompressError(
                f"eos_token_id is {value!r:.60}, neither a token's number nor a list of such",
                where=str(folder / name),
                fix="write the number of the token that ends a text, or take the key out",
            )
    return ids


def _check_ids(ids: Any, most: int) -> None:
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"it makes {ids!r:.60} of a text, and it knows {most:,} tokens")


def from_config(config: Any, cls: Any = None) -> Any:
    """An untrained model in float32: ``cls``, or transformers' own class for the configuration. No code is run."""
    import torch
    from transformers import AutoModelForCausalLM

    if cls is not None:
        return cls._from_config(config, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)


@contextmanager
def rejected(folder: Path, name: str, what: str) -> Iterator[None]:
    """transformers' refusals of the file ``name`` in ``folder``, or of the folder, as one error each."""
    try:
        yield
    except (CompressError, MemoryError):
        raise
    except Exception as e:  # transformers says what is wrong in any type, and tokenizers in a bare Exception
        if not name:
            at_fault.check_files(folder)
        said = " ".join(line.strip() for line in str(e).splitlines() if line.strip()) or type(e).__name__
        if "trust_remote_code" in said:
            said, fix = "it needs code of its own, which is not run", "name a model that transformers knows by itself"
        else:
            fix = "the folder must hold a model that transformers knows"
        raise CompressError(f"{what}: {said[:300]}", where=str(folder / name) if name else str(folder), fix=fix) from e


def read_generation(model: Any, folder: Path) -> None:
    """Gives a model that was built from its configuration the folder's own settings for generation, if it has any."""
    from transformers import GenerationConfig

    if os.path.lexists(folder / GENERATION):
        with seen(folder, weights=False) as private, rejected(folder, GENERATION, "the settings cannot be read"):
            model.generation_config = GenerationConfig.from_pretrained(private, local_files_only=True)


def _embedding_rows(folder: Path) -> int | None:
    """What config.json says of the vocabulary; None where it says nothing."""
    config = read_config(folder) if (folder / CONFIG).exists() else {}
    inner = config.get("text_config")
    rows: int | None = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return rows


def is_ragged(folder: Path) -> bool:
    """Whether the folder holds a model in the `per-layer` layout."""
    from compress.models.families import FAMILIES

    def is_one(config: Any) -> bool:
        kind = config.get("model_type")
        # Of other architectures per_layer_config is their own way of saying that layers differ.
        own = LANGUAGE_OF.get(kind, kind) in FAMILIES
        return "compress_layers" in config or bool(own and config.get("per_layer_config"))

    config = read_config(folder)
    inner = config.get("text_config")
    return is_one(config) or (isinstance(inner, dict) and is_one(inner))


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
    with seen(folder) as private, rejected(folder, "", "the model cannot be loaded"):
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
