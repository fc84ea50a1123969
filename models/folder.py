"""Which files make a language model, and what transformers gets to see of a folder that came from somewhere.

One answer serves hashes, checks, streaming and loading. What transformers is given is a folder of our own that holds
copies of the known data files, links to the weights, and no code but what this version writes: whatever else lies in
the user's folder (an adapter, ``custom_generate/``, a second set of weights) is not there for it to find.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.models.sizes import check_sizes
from compress.run.seals import entries
from compress.run.strict_json import read_json
from compress.run.tensor_files import open_tensors
from compress.schema.strict_yaml import parse_yaml
from compress.system.files import read_bytes

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMOTE_FILE = "modeling_compress"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Besides the weights and these, transformers needs nothing of a language model's folder.
DATA = frozenset(
    {
        CONFIG, GENERATION, "fingerprint.safetensors",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "chat_template.jinja", "chat_template.json",
    }
)  # fmt: skip
SENTENCEPIECE = ".model"
TEMPLATES = "additional_chat_templates"
# Keys with which a configuration names an implementation; a value with a slash is code of a hub repository.
IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
KNOWN = frozenset(
    {
        "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
        "grouped_mm", "batched_mm",
    }
)  # fmt: skip
# Quantised weights are read as floats by nothing here.
QUANTISED = "quantization_config"

CARD_BYTES = 2**20  # of a card whose head is asked for a hint
INDEX_BYTES = 64 * 2**20  # an index of a million tensors takes 60 MB

# What could be run by a loader, a shell or an interpreter. Case does not matter, nor a version behind a library's name.
_CODE = re.compile(
    r"\.(py[a-z0-9]?|pyz|pyd|so(\.[0-9]+)*|dll|dylib|egg|whl|sh|bash|zsh|bat|cmd|ps1|exe|com|js|mjs|cjs|jar)$", re.I
)
# What can run code when it is opened.
_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|joblib|dill|cloudpickle|h5|keras|hdf5)$", re.I)


@dataclass(frozen=True)
class Weights:
    """The safetensors files of a model, in the order of their names, and the file of every tensor."""

    files: tuple[Path, ...]
    places: Mapping[str, Path]


def is_code(name: str) -> bool:
    """Whether a file of that name could be run."""
    return bool(_CODE.search(name))


def is_pickle(name: str) -> bool:
    """Whether a file of that name may be a pickle, which runs code when it is opened."""
    return bool(_PICKLE.search(name))


def own_file(folder: Path, name: str) -> Path:
    """A file that lies directly in ``folder``, with links followed as far as they stay there.

    A snapshot in the hub's cache is made of links to the ``blobs`` of its own repository; these count as its own.

    Raises:
        CompressError: it is missing, no regular file, or a link that leaves the folder.
    """
    path, root = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle
        raise CompressError(
            f"{name} is {'a link to nothing' if path.is_symlink() else 'missing'}",
            where=str(folder),
            fix="fetch or copy the model again",
        ) from e
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and real.parent != blobs:
        raise CompressError(
            f"{name} is a link that leaves the folder (to {real})",
            where=str(folder),
            fix="put the file itself there, or name the folder that holds it",
        )
    if not real.is_file():
        raise CompressError(f"{name} is no regular file", where=str(folder), fix="fetch or copy the model again")
    return real


def refuse_adapter(folder: Path) -> None:
    """Raises CompressError where an adapter lies in the folder: transformers would merge it in silence."""
    found = next((name for name in ADAPTER if os.path.lexists(folder / name)), None)
    if found is None:
        return
    if os.path.lexists(folder / CONFIG):
        raise CompressError(
            f"an adapter lies beside the model ({found}); it would be applied to the weights a second time"
            " where they hold it already",
            where=str(folder / found),
            fix="take the adapter's files out where it is merged, or merge it and name the folder it is saved in",
        )
    base = _base_of(folder)
    raise CompressError(
        f"this is an adapter, not a model ({found})" + (f"; its base is {base}" if base else ""),
        where=str(folder),
        fix="merge it into its base model first (peft's merge_and_unload, then save_pretrained), and name that folder",
    )


def _base_of(folder: Path) -> str | None:
    path = folder / ADAPTER[0]
    facts = read_json(own_file(folder, path.name), "the adapter's configuration") if path.exists() else None
    base = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    return base if isinstance(base, str) and len(base) < 200 else None


def read_config(folder: Path, *, decoder: bool = True) -> dict[str, Any]:
    """config.json, with what would bring other weights or other code into play refused, and sizes that cannot be.

    Args:
        decoder: whether its sizes are a language model's; an image model's are of other kinds, and asked by who builds
            it.

    Raises:
        CompressError: it is missing, cannot be read, or names such a thing or size; an adapter lies in the folder.
    """
    refuse_adapter(folder)
    path = own_file(folder, CONFIG)
    config = read_json(path, "the configuration")
    if not isinstance(config, dict):
        raise CompressError("the configuration is no JSON object", where=str(folder / CONFIG), fix="fetch it again")
    _refuse_keys(config, folder / CONFIG)
    if decoder:
        check_sizes(config, folder / CONFIG)
    return config


def _refuse_keys(config: Mapping[str, Any], path: Path, at: str = "") -> None:
    def refuse(key: str, what: str, fix: str) -> None:
        raise CompressError(f"{at}{key} {what}", where=str(path), fix=fix)

    if "transformers_weights" in config:
        refuse("transformers_weights", "names other weights than the folder's own", "take it out of config.json")
    if config.get(QUANTISED):
        facts = config[QUANTISED]
        how = facts.get("quant_method", "unknown") if isinstance(facts, dict) else "unknown"
        base = _unquantised(path.parent)
        refuse(
            QUANTISED,
            f"says that the weights are quantised ({how!s:.40})",
            "name the unquantised model" + (f": {base}" if base else ""),
        )
    for key in IMPLEMENTATIONS:
        value = config.get(key)
        for one in value.values() if isinstance(value, dict) else [value]:
            if one is not None and (not isinstance(one, str) or one.removeprefix("paged|") not in KNOWN):
                refuse(key, f"names an implementation that is not transformers' own: {one!s:.80}", "take it out")
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config") and key != QUANTISED:
            _refuse_keys(value, path, f"{at}{key}.")


def _unquantised(folder: Path) -> str | None:
    """What a quantised model's own card calls its base, where it is an id of the hub."""
    try:
        text = read_bytes(own_file(folder, "README.md"), "the model's card", CARD_BYTES, "").decode(errors="replace")
        head = text.split("\n---", 1)[0].removeprefix("---\n") if text.startswith("---\n") else ""
        facts = parse_yaml(head, "the model's card", str(folder)).value
    except CompressError:  # a hint in an error's text: without it the error stands as well
        return None
    base = facts.get("base_model") if isinstance(facts, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", base, re.ASCII) else None


def weights_of(folder: Path) -> Weights:
    """The weights of a model folder: each file checked to be the folder's own, each tensor to lie in one file.

    Raises:
        CompressError: there are none or two sets of them; a file is missing, damaged or lies elsewhere; the index and
            the files do not name the same tensors.
    """
    refuse_adapter(folder)
    names, said = _named(folder)
    missing = [n for n in names if not os.path.lexists(folder / n)]
    if missing:
        raise CompressError(
            f"{len(missing)} of {len(names)} weight files are missing: {missing[0]}",
            where=str(folder),
            fix="fetch the model again",
        )
    files = {name: own_file(folder, name) for name in names}
    places: dict[str, str] = {}
    for name, path in files.items():
        with open_tensors(path, "the weight file") as file:
            held = list(file.keys())
        for tensor in held:
            if tensor in places:
                raise CompressError(
                    f"two files hold the weight {tensor}: {places[tensor]} and {name}",
                    where=str(folder),
                    fix="fetch the model again",
                )
            if said is not None and said.get(tensor) != name:
                raise CompressError(
                    f"{name} holds the weight {tensor}, which the index "
                    + (f"says to be in {said[tensor]}" if tensor in said else "does not name"),
                    where=str(folder / INDEX),
                    fix="fetch the model again: the index and the files must belong together",
                )
            places[tensor] = name
    lacking = sorted(set(said or ()) - set(places))
    if said is not None and lacking:
        raise CompressError(
            f"the weight {lacking[0]} is not in {said[lacking[0]]}, where the index says it is",
            where=str(folder / INDEX),
            fix="fetch the model again: the index and the files must belong together",
        )
    return Weights(tuple(folder / name for name in names), {t: folder / name for t, name in places.items()})


def has_weights(folder: Path) -> bool:
    """Whether safetensors weights, or an index of them, lie in the folder."""
    return os.path.lexists(folder / WEIGHTS) or os.path.lexists(folder / INDEX)


def _named(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """(names of the weight files, the index: tensor -> file name, where there is one)."""
    single, indexed = os.path.lexists(folder / WEIGHTS), os.path.lexists(folder / INDEX)
    if not indexed:
        if single:
            return [WEIGHTS], None
        other = sorted(p.name for p in folder.glob("*") if is_pickle(p.name)) if folder.is_dir() else []
        raise CompressError(
            "the folder holds no safetensors weights" + (f", only {other[0]}" if other else ""),
            where=str(folder),
            fix="save the model with save_pretrained (safetensors); pickled weights are not loaded",
        )
    path = folder / INDEX
    facts = read_json(own_file(folder, INDEX), "the index of the weights", limit=INDEX_BYTES)
    said = facts.get("weight_map") if isinstance(facts, dict) else None
    if not isinstance(said, dict) or not said:
        raise CompressError("weight_map is missing, empty or no object", where=str(path), fix="fetch the model again")
    for tensor, name in said.items():
        if not isinstance(name, str) or not _is_plain(name):
            raise CompressError(
                f"weight_map names for {tensor} what is no safetensors file of this folder: {name!s:.120}",
                where=str(path),
                fix="do not use this model, or fetch it again from a source that you trust",
            )
    names = sorted(set(said.values()))
    if single and names != [WEIGHTS]:
        raise CompressError(
            f"there are two sets of weights: {WEIGHTS}, and what {INDEX} names ({names[0]})",
            where=str(folder),
            fix="take out the one that is not the model",
        )
    return names, said


def _is_plain(name: str) -> bool:
    """Whether a name is a safetensors file's, with no folder in it on any system."""
    return (
        name.endswith(".safetensors")
        and not name.startswith(".")
        and not set(name) & set('/\\:\0<>|"?*\n\r')
        and name == name.strip()
    )


@contextmanager
def seen(folder: Path, *, weights: bool = True, code: str | None = None, decoder: bool = True) -> Iterator[Path]:
    """What transformers sees of a model's folder: a private folder that is gone when this is left.

    Small files are copied as they are read, weights are linked where they were found, so a 70B model is not copied.

    Args:
        weights: link them; without, the configuration and the tokenizer can be read.
        code: source of `REMOTE_FILE`, for the one load that runs our own code as a user would.
        decoder: see `read_config`.

    Raises:
        CompressError: as `read_config` and `weights_of`.
    """
    config = read_config(folder, decoder=decoder)
    with tempfile.TemporaryDirectory(prefix="compress-model-") as temporary:
        private = Path(temporary)
        for name, path in data_files(folder):
            target = private / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
        if weights:
            found = weights_of(folder)
            for path in found.files:
                (private / path.name).symlink_to(own_file(folder, path.name))
            if len(found.files) > 1 or os.path.lexists(folder / INDEX):
                (private / INDEX).write_bytes(own_file(folder, INDEX).read_bytes())
        if code is not None:
            (private / f"{REMOTE_FILE}.py").write_text(code, encoding="utf-8")
        # What was checked is what is used. Which kernels a model was last run with is no part of it.
        kept = {k: v for k, v in config.items() if k not in IMPLEMENTATIONS}
        (private / CONFIG).write_text(json.dumps(kept), encoding="utf-8")
        yield private


def data_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of what transformers needs of a model's folder beside its configuration and weights."""
    for name in sorted(p.name for p in folder.iterdir()):
        if name != CONFIG and (name in DATA or name.endswith(SENTENCEPIECE)):
            yield name, own_file(folder, name)
    if (folder / TEMPLATES).is_dir():
        for path in sorted((folder / TEMPLATES).glob("*.jinja")):
            inner = f"{TEMPLATES}/{path.name}"
            yield inner, own_file(folder, inner)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer's files lie in the folder: not where its configuration alone was fetched."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tekken.json")
    return any(os.path.lexists(folder / name) for name in names) or any(folder.glob(f"*{SENTENCEPIECE}"))


def refuse_code(folder: Path, written: Mapping[str, str]) -> None:
    """Raises CompressError where a folder holds code that is not, byte for byte, what this version writes there.

    Args:
        written: relative name -> source, of what may lie there.
    """
    for path in entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and path.is_dir():
            raise CompressError(
                f"{name} is a link to a folder; what lies there was not looked at, and nothing was run",
                where=str(folder),
                fix="take it out, or put the files themselves there",
            )
        if is_code(name) and not path.is_dir() and not (name in written and _same(path, written[name])):
            raise CompressError(
                f"the folder holds code that this version of compress did not write: {name}; it was not run",
                where=str(path),
                fix="take it out, or prune the model again",
            )


def _same(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def refuse_named_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises CompressError where a configuration names other code than our own file, and that file is there."""
    files = {CONFIG: config}
    for name in ("tokenizer_config.json", GENERATION):
        if os.path.lexists(folder / name):
            files[name] = read_json(own_file(folder, name), f"the file {name}")
    for name, facts in files.items():
        named = facts.get("auto_map") if isinstance(facts, Mapping) else None
        values = named.values() if isinstance(named, Mapping) else [] if named is None else [named]
        for value in values:
            # "ORG/NAME--file.Class" would be taken from another repository.
            own = isinstance(value, str) and value.startswith(f"{REMOTE_FILE}.")
            if not own or not (folder / f"{REMOTE_FILE}.py").is_file():
                raise CompressError(
                    f"the folder names code that this version of compress did not write: {value!s:.120};"
                    " it was not run",
                    where=str(folder / name),
                    fix="take it out, or prune the model again",
                )
