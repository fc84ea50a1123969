"""Checkpoints that see or hear as well: their language part is taken out, pruned as any language model, and put back.

A checkpoint of this kind has a ``text_config`` beside the configurations of its other parts, and the weights of its
language model under a name of their own. What is taken out is a plain causal language model with the weights as they
are; what is put back is the same checkpoint, of which every tensor beside the language model is carried byte for byte.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.models import decoder
from compress.models.folder import (
    CONFIG,
    REMOTE_FILE,
    data_files,
    own_file,
    read_config,
    weights_of,
)
from compress.models.kept import Files, kept
from compress.models.reading import LANGUAGE_OF, from_config, is_ragged, load_config
from compress.run.cache import cache_dir, sha256_of
from compress.run.progress import say
from compress.run.strict_json import read_json
from compress.run.tensor_files import open_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.families.base import Family

TEXT = "text_config"
AUTO = "AutoModelForImageTextToText"  # what the whole is loaded as
DIRECTIONS = ("mrope_section", "mrope_interleaved")  # of positions in images, where a text has one direction
# Of the proof that the part is the whole's function of text, relative to the largest logit: some scale by a float32.
TOLERANCE = 1e-6
MOST = 10**8  # parameters of the model that is proven
# What a processor is made of; the tokenizer's files are among `data_files`.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class Composite:
    """A checkpoint in the folder ``path`` whose language model is a part of it; ``title`` is its class."""

    path: Path
    title: str

    @property
    def words(self) -> str:
        return f"the language part of {self.title}"


def find(folder: Path) -> Composite | None:
    """The checkpoint in the folder, where it has other parts beside its language model; None where it is none.

    Raises:
        CompressError: the configuration is no JSON.
    """
    if not (folder / CONFIG).exists():
        return None
    config = read_json(own_file(folder, CONFIG), "the configuration")
    if not isinstance(config, dict) or not isinstance(config.get(TEXT), dict):
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

    title = CLASSES.get(str(config.get("model_type")))
    return None if title is None else Composite(folder, str(title))


def config_of(model: Composite) -> Any:
    """The configuration of the language part; no weight is read.

    Raises:
        CompressError: as `compress.models.reading.load_config`; the language part is pruned already, or no causal
            language model of transformers has its function.
    """
    if is_ragged(model.path):
        raise CompressError(
            "the language part of this checkpoint was pruned already",
            where=str(model.path),
            fix="name the folder of the language part alone (`model` in a run), or prune the dense checkpoint",
        )
    made = language_of(load_config(model.path))
    made._name_or_path = str(model.path)
    return made


def language_of(config: Any) -> Any:
    """`language_config`, proven: the configuration of a checkpoint's language part, by which it can be pruned alone.

    Raises:
        CompressError: as `language_config` and `prove`.
    """
    made = language_config(config)
    prove(config)
    return made


def language_config(config: Any) -> Any:
    """The configuration of a causal language model with the function of the language part of ``config``.

    Raises:
        CompressError: transformers has none.
    """
    made = _alone(config.get_text_config(), config.model_type)
    # Tied or not is said of the whole, and so are tokens that the language part does not name.
    made.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    made.dtype = made.dtype if made.dtype is not None else config.dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(made, name, None) is None:
            setattr(made, name, getattr(config, name, None))
    return made


def _alone(text: Any, whole: str) -> Any:
    """The configuration of a causal language model with the function of a part of a ``whole``, a type of model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    kind = LANGUAGE_OF.get(text.model_type, text.model_type)
    if kind not in CLASSES:
        raise CompressError(
            f"the language part of {whole!r} is a {text.model_type!r}, of which transformers has no language model"
            " that stands alone",
            where=f"{CONFIG}: {TEXT}.model_type",
            fix="prune a model whose language part is one; to teach compress another, see models/composite.py",
        )
    made: Any = AutoConfig.for_model(kind, **_plain_facts(text))
    made.architectures = [CLASSES[kind]]
    return made


def _plain_facts(text: Any) -> dict[str, Any]:
    facts: dict[str, Any] = text.to_dict()
    for name in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        facts.pop(name, None)
    rope = facts.get("rope_parameters")
    if isinstance(rope, dict) and any(name in rope for name in DIRECTIONS):
        rope = {k: v for k, v in rope.items() if k not in DIRECTIONS}
        facts["rope_parameters"] = {**rope, "rope_type": rope.get("rope_type", "default").replace("mrope", "default")}
    return facts


def prove(config: Any) -> None:
    """Holds the language part against the whole checkpoint on text: a few blocks, one of each kind, narrower where the
    real ones are large, in float64, the same random weights in both.

    Raises:
        CompressError: they differ, or the whole cannot be run so.
    """
    import torch

    try:
        whole, plain = _narrow(config)
        ids = torch.randint(0, plain.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            want, got = (m(input_ids=ids, use_cache=False).logits for m in (whole, plain))
    except CompressError:
        raise
    except Exception as e:  # what a class cannot be built or run with, each says in its own type
        said = " ".join(str(e).split())[:200] or type(e).__name__
        raise _unproven(config, f"it cannot be run on text alone ({said})") from e
    worst = float((want - got).abs().max()) / float(want.abs().max())
    if not worst <= TOLERANCE:
        raise _unproven(config, f"on text the whole gives other logits than its language part, {worst:.2g} apart")


def _unproven(config: Any, what: str) -> CompressError:
    return CompressError(
        f"the language part of {config.model_type!r} cannot be pruned by itself: {what}",
        where=CONFIG,
        fix="prune a model whose language part stands alone; to teach compress another, see models/composite.py",
    )


def _narrow(config: Any) -> tuple[Any, Any]:
    """(the whole, of which only the language part has weights; the language part as a plain model with the same)."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    from compress.models.families.proof import randomise, small_config

    small = copy.deepcopy(config)
    text = small.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ())
    layers = max([2, *(1 + kinds.index(kind) for kind in set(kinds))])
    narrow = small_config(text, layers, lambda own: _alone(own, config.model_type), MOST)
    small.text_config, small.pad_token_id = narrow, narrow.pad_token_id
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(small, dtype=torch.float64, trust_remote_code=False).eval()
    plain: Any = AutoModelForCausalLM
    plain = plain.from_config(language_config(small), dtype=torch.float64, trust_remote_code=False).eval()
    randomise(plain)
    own = AutoModel.from_config(narrow, dtype=torch.float64, trust_remote_code=False).eval()
    own.load_state_dict(decoder.body(plain).state_dict())
    for old, new in ((whole.get_decoder(), own), (whole.get_output_embeddings(), plain.get_output_embeddings())):
        path = next(name for name, module in whole.named_modules() if module is old)
        whole.set_submodule(path, new)
    return whole, plain


@dataclass(frozen=True)
class Names:
    """What the language part's weights are called: a name of the plain model begins with ``body``, one of the
    checkpoint with ``within``; ``head`` and ``outer`` are the two names of the head, where it has one of its own."""

    body: str
    within: str
    head: str
    outer: str

    def inner(self, name: str) -> str | None:
        """The plain model's name of a tensor of the checkpoint; None where it is of another part."""
        if name == self.outer:
            return self.head
        return self.body + name.removeprefix(self.within) if name.startswith(self.within) else None

    def outside(self, name: str) -> str:
        """The checkpoint's name of a tensor of the plain model."""
        return self.outer if name == self.head else self.within + name.removeprefix(self.body)


def names_of(config: Any, places: Iterable[str], where: str) -> Names:
    """Finds the language part among the names of a checkpoint's tensors, by the names that the plain model wants.

    Args:
        config: of the plain model.

    Raises:
        CompressError: there is not just one place that holds all of it.
    """
    import torch

    with torch.device("meta"):
        model = from_config(copy.deepcopy(config))
    every = set(places)
    body = f"{decoder.body_name(model)}."
    wanted = [n.removeprefix(body) for n in model.state_dict() if n.startswith(body)]
    first = wanted[0]
    prefixes = sorted(n.removesuffix(first) for n in every if n == first or n.endswith(f".{first}"))
    whole = [p for p in prefixes if all(p + name in every for name in wanted)]
    if len(whole) != 1:
        lacking = next((p + n for p in prefixes for n in wanted if p + n not in every), first)
        raise CompressError(
            f"{len(whole)} places in the checkpoint hold a whole language model"
            + (f"; {lacking} is missing" if not whole else f": {', '.join(whole)}"),
            where=where,
            fix="fetch the model again; weights under other names than transformers saves them by are not known",
        )
    # What is not carried is written anew: nothing of another part may be taken for the language model's.
    own = {whole[0] + name for name in wanted}
    strange = sorted(n for n in every if n.startswith(whole[0]) and n not in own and not n.endswith(".inv_freq"))
    if strange:
        raise CompressError(
            f"{strange[0]} stands among the language model's weights ({whole[0]}...), and is none of them",
            where=where,
            fix="save the checkpoint anew by transformers' save_pretrained, which keeps its parts apart",
        )
    head = f"{decoder.head_name(model)}.weight"
    heads = sorted(n for n in every if n == head or n.endswith(f".{head}"))
    if len(heads) > 1 or (not heads and not config.tie_word_embeddings):
        raise CompressError(
            f"the checkpoint holds {len(heads)} heads of a language model ({head})",
            where=where,
            fix="fetch the model again",
        )
    return Names(body, whole[0], head, heads[0] if heads else head)


def language_part(model: Composite) -> Path:
    """The folder with the language part as a plain model, made where the cache does not hold it.

    Raises:
        CompressError: as `config_of` and `names_of`; the family is not known; the disk is full.
    """
    from compress.models.families import family_for

    config = config_of(model)
    family_for(config)  # what is wrong with it is said before any weight is read
    found = weights_of(model.path)
    names = names_of(config, found.places, str(model.path))
    beside = [path for _, path in data_files(model.path)]
    read = (*found.files, model.path / CONFIG, *beside)
    key = hashlib.sha256("\n".join(f"{p.name}:{sha256_of(p)}" for p in read).encode()).hexdigest()

    def make(made: Path) -> None:
        say(f"{model.path.name}: {model.words}")
        made.mkdir()
        files = Files(made)
        for path in found.files:
            held = _tensors(path, lambda name: names.inner(name) is not None)
            held = {str(names.inner(name)): tensor for name, tensor in held.items()}
            if config.tie_word_embeddings:
                held.pop(names.head, None)  # a copy of the embedding, which the plain model has not
            files.add(path.name, held)
        files.index()
        for name, path in data_files(model.path):
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / name)
        config.save_pretrained(made)

    return kept(cache_dir() / "models" / f"language-{key[:16]}", model.words, make)


def _tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    with open_tensors(path, "the weight file") as file:
        return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118  (keys() alone)


@dataclass(frozen=True)
class Carried:
    """What stands beside the language part: how many tensors and parameters, and the SHA-256 of their names, types,
    shapes and bytes."""

    tensors: int
    parameters: int
    sha256: str


def carried(folder: Path, names: Names) -> Carried:
    """What a checkpoint holds beside its language part.

    Raises:
        CompressError: a file is missing or damaged.
    """
    import torch

    count, parameters = 0, 0
    digest = hashlib.sha256()
    places = weights_of(folder).places
    for name in sorted(n for n in places if names.inner(n) is None):
        with open_tensors(places[name], "the weight file") as file:
            tensor = file.get_tensor(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        count, parameters = count + 1, parameters + tensor.numel()
    return Carried(count, parameters, digest.hexdigest())


def put_back(model: Composite, dense: Path, pruned: Path, family: Family, folder: Path) -> Names:
    """Writes the checkpoint with another language part into ``folder``: configuration, weights, tokenizer, processor.

    Args:
        dense: the language part as it was taken out (`language_part`).
        pruned: the folder that it was saved in behind pruning.

    Raises:
        CompressError: blocks went away, and the other parts speak of blocks by number; as `names_of`.
    """
    whole, before, after = (read_config(place) for place in (model.path, dense, pruned))
    found, parts = weights_of(model.path), weights_of(pruned)
    names = names_of(config_of(model), found.places, str(model.path))
    changes = {k: v for k, v in after.items() if k not in _OF_THE_FILE and before.get(k) != v}
    if "num_hidden_layers" in changes and (whole.get("vision_config") or {}).get("deepstack_visual_indexes"):
        raise CompressError(
            "whole blocks are gone, and this model gives what it sees to blocks by their number"
            " (vision_config.deepstack_visual_indexes)",
            where=str(pruned),
            fix="prune it in the layout per-layer, where blocks keep their numbers: --recipe tyr",
        )
    config = {**whole, TEXT: {**whole[TEXT], **changes}}
    if "auto_map" in after:
        title = f"Compressed{model.title}"
        config |= {"architectures": [title], "auto_map": {AUTO: f"{REMOTE_FILE}.{title}"}}
        (folder / f"{REMOTE_FILE}.py").write_text(_source(model, family), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    others = [p for p in found.files if any(q == p and names.inner(n) is None for n, q in found.places.items())]
    files, count = Files(folder), len(others) + len(parts.files)
    for number, path in enumerate((*others, *parts.files), 1):
        if number <= len(others):
            held = _tensors(path, lambda name: names.inner(name) is None)
        else:
            held = {names.outside(name): tensor for name, tensor in _tensors(path, lambda _: True).items()}
        files.add(f"model-{number:05d}-of-{count:05d}.safetensors", held)
    files.index()
    for name, path in _beside(model.path):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    return names


_OF_THE_FILE = ("architectures", "auto_map", "dtype", "transformers_version")  # not what the model is


def _beside(folder: Path) -> Iterator[tuple[str, Path]]:
    yield from data_files(folder)
    yield from ((name, own_file(folder, name)) for name in PROCESSOR if (folder / name).exists())


def source_in(model: Composite) -> str:
    """The code that this version writes beside a pruned checkpoint of this kind."""
    from compress.models.families import family_for

    return _source(model, family_for(language_config(load_config(model.path))))


def _source(model: Composite, family: Family) -> str:
    import transformers

    return family.within_source(model.title, getattr(transformers, model.title).__module__)
