"""`run`: text from any artefact of a language model, in its own runtime; greedily, and timed once.

What an artefact is, and what runs it, is the table `RUNTIMES`: the first that knows it takes it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.words.wording import counted

TOKENS = 64
MOST = 10**7  # tokens of one call


# Told every token as it comes; None where the prompt begins to be read only now, the model being loaded.
Seen = Callable[[int | None], None]


@dataclass(frozen=True)
class Loaded:
    """A language model in its runtime.

    Args:
        runtime: its name and version.
        encode: (text, chat) -> token ids; with ``chat`` what a person says, as the chat template writes it.
        decode: token ids -> text, without the tokens that end it.
        generate: (ids, count, seen) calls ``seen`` with the likeliest tokens one after the other, ``count`` at most;
            one that ends a text is the last.
        context: tokens that the model was made for, where it says so.
    """

    runtime: str
    encode: Callable[[str, bool], list[int]]
    decode: Callable[[Sequence[int]], str]
    generate: Callable[[list[int], int, Seen], None]
    context: int | None = None


@dataclass(frozen=True)
class Runtime:
    """``takes(artefact)``: whether it is this one's; ``load(artefact, tokenizer)``: the model, where ``tokenizer`` is a
    folder that the user has named."""

    takes: Callable[[Path], bool]
    load: Callable[[Path, Path | None], Loaded]


def run(
    artefact: str,
    text: str,
    *,
    tokens: int = TOKENS,
    chat: bool = False,
    dense: bool = False,
    tokenizer: Path | None = None,
) -> dict[str, Any]:
    """Goes on with a text.

    Args:
        artefact: a model, run or release folder, a name, an export folder, a folder for ONNX Runtime GenAI, a GGUF.
        tokens: that are generated at most.
        chat: the text is what a person says, and goes through the chat template.
        dense: of a run folder, its dense export and its pruned one.
        tokenizer: a folder, for an artefact that has no tokenizer of its own.

    Returns:
        ``{"artefact", "prompt", "chat", "results": {name: ...}}`` by ``pruned`` and ``dense``, or ``model``; each
        ``{"runtime", "text", "prompt_tokens", "tokens", "ended", "ttft", "rate"}``: seconds to the first token, and
        tokens per second behind it (None of one token), in one run.

    Raises:
        UsageError: the text is empty, no token is asked for, or there is no dense model beside.
        CompressError: the artefact is no language model, cannot be loaded, or has no tokenizer or chat template.
    """
    if not text.strip():
        raise UsageError("the text is empty", where="TEXT", fix="give the words to go on with")
    if not 0 < tokens <= MOST:
        raise UsageError(f"{tokens:,} tokens cannot be generated", where="--tokens", fix=f"from 1 to {MOST:,}")
    found = {
        name: _one(_loaded(place, path, tokenizer), text, tokens, chat)
        for name, (place, path) in _artefacts(artefact, dense).items()
    }
    return {"artefact": artefact, "prompt": text, "chat": chat, "results": found}


def _artefacts(artefact: str, dense: bool) -> dict[str, tuple[str, Path]]:
    """name -> what is to be run, as the user would name it, and its path."""
    path = Path(artefact)
    if not dense:
        return {"model": (artefact, path)}
    places = {name: path / f"export-{name}" for name in ("dense", "pruned")}
    absent = next((place for place in places.values() if not _is_export(place)), None)
    if absent is not None:
        raise UsageError(
            f"there is no dense model beside the pruned one: {absent.name} is missing",
            where=artefact,
            fix="name a run folder of a language model whose export stage is done, or leave --dense out",
        )
    return {name: (str(place), place) for name, place in places.items()}


def _loaded(artefact: str, path: Path, tokenizer: Path | None) -> Loaded:
    found = next((runtime for runtime in RUNTIMES if runtime.takes(path)), None)
    if found is not None:
        return found.load(path, tokenizer)
    below = [] if _holds_a_model(path) else [p for p in sorted(path.glob("*/")) if any(r.takes(p) for r in RUNTIMES)]
    if below:
        raise UsageError(
            f"the folder is no model; there are models in it: {', '.join(p.name for p in below)}",
            where=artefact,
            fix=f"name one of them: {below[0]}",
        )
    return _in_torch(artefact, tokenizer)


def _holds_a_model(path: Path) -> bool:
    from compress.models.saved import KINDS

    return any((place / kind.facts).is_file() for place in (path, path / "model") for kind in KINDS.values())


def _one(model: Loaded, text: str, tokens: int, chat: bool) -> dict[str, Any]:
    ids = model.encode(text, chat)
    if not ids:
        raise UsageError("the tokenizer makes no token of the text", where="TEXT", fix="give other words")
    if model.context is not None and len(ids) + tokens > model.context:
        raise UsageError(
            f"the text has {len(ids):,} tokens and {tokens:,} are to follow, and the model reads {model.context:,}",
            where="--tokens",
            fix="give a shorter text, or ask for fewer",
        )
    found: list[int] = []
    times: list[float] = []

    starts: list[float] = []

    def seen(token: int | None) -> None:
        (starts if token is None else times).append(time.perf_counter())
        if token is not None:
            found.append(token)

    seen(None)
    model.generate(ids, tokens, seen)
    if not found:
        raise CompressError("the runtime gave no token", where=model.runtime, fix="give another text")
    return {
        "runtime": model.runtime,
        "text": model.decode(found),
        "prompt_tokens": len(ids),
        "tokens": len(found),
        "ended": len(found) < tokens,
        "ttft": times[0] - starts[-1],
        "rate": (len(found) - 1) / (times[-1] - times[0]) if len(found) > 1 else None,
    }


def lines(facts: dict[str, Any]) -> list[str]:
    """The text: behind the prompt that it goes on with; a chat's answer alone."""
    found = []
    for name, result in facts["results"].items():
        if len(facts["results"]) > 1:
            found.append(f"{name}:")
        found += ((("" if facts["chat"] else facts["prompt"]) + result["text"]).strip()).split("\n")
    return found


def measured(facts: dict[str, Any]) -> list[str]:
    """What the runs took, for the person at the terminal."""
    found = []
    for name, result in facts["results"].items():
        rate = f", then {result['rate']:.1f} tokens a second" if result["rate"] is not None else ""
        label = f"{name} " if len(facts["results"]) > 1 else ""
        found.append(
            f"{label}in {result['runtime']}: {counted(result['tokens'], 'token')}"
            f"{', and the text ends' if result['ended'] else ''}; the first {1000 * result['ttft']:.0f} ms after a"
            f" prompt of {result['prompt_tokens']}{rate} (one run, no benchmark)"
        )
    return found


# --- the runtimes ----------------------------------------------------------------------------------------------------


def _is_genai(path: Path) -> bool:
    from compress.exporters.genai import CONFIG

    return (path / CONFIG).is_file()


def _in_genai(path: Path, tokenizer: Path | None) -> Loaded:
    from compress.exporters import runtimes
    from compress.exporters.genai import Genai

    if tokenizer is not None:
        raise UsageError("this folder has a tokenizer of its own", where="--tokenizer", fix="leave it out")
    model = Genai(path)

    def encode(text: str, chat: bool) -> list[int]:
        return model.encode(model.asked(text), begin=False) if chat else model.encode(text)

    def generate(ids: list[int], count: int, seen: Seen) -> None:
        for token in model.likeliest(ids, count):
            seen(token)

    return Loaded(runtimes.available("genai"), encode, model.decode, generate, model.context)


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" or (path / "gguf.json").is_file()


def _in_llama_cpp(path: Path, tokenizer: Path | None) -> Loaded:
    from compress.exporters.gguf import the_file
    from compress.exporters.llama_cpp import library
    from compress.exporters.llama_cpp.ask import ask, go_on
    from compress.models.reading import load_tokenizer
    from compress.system.host import processors

    file = the_file(path) if path.is_dir() else path
    if not file.is_file():
        raise UsageError("there is no such file", where=str(file), fix="name a GGUF file, or a folder with one")
    said: list[str] = []

    def generate(ids: list[int], count: int, seen: Seen) -> None:
        said.append(go_on(file, ids, count, processors(), seen))

    if tokenizer is not None:
        return _of(load_tokenizer(_named_tokenizer(tokenizer)), library.title(), generate)

    def encode(text: str, chat: bool) -> list[int]:
        if chat:
            raise UsageError(
                "a GGUF's chat template is rendered by its tokenizer's own folder",
                where="--chat",
                fix="name the folder of the model that it was made of: --tokenizer FOLDER",
            )
        return ask(file, texts=[text]).tokens[0]

    return Loaded(library.title(), encode, lambda _: said[-1], generate)


def _is_export(path: Path) -> bool:
    from compress.exporters.names import DECODE, PREFILL

    return (path / PREFILL).is_file() and (path / DECODE).is_file()


def _in_onnx_runtime(path: Path, tokenizer: Path | None) -> Loaded:
    import numpy as np

    from compress.data.special import endings
    from compress.exporters import runtimes
    from compress.exporters.ort import OrtLLM
    from compress.models.reading import load_tokenizer
    from compress.models.saved import check_where_sealed

    check_where_sealed(path)
    words = load_tokenizer(_tokenizer_beside(path) if tokenizer is None else _named_tokenizer(tokenizer))
    model, ends = OrtLLM(path, 0), endings(words)  # as many threads as the runtime takes

    def generate(ids: list[int], count: int, seen: Seen) -> None:
        for token in islice(model.likeliest(np.array([ids], np.int64)), count):
            seen(token)
            if token in ends:
                return

    return _of(words, runtimes.available("onnx"), generate)


def _tokenizer_beside(path: Path) -> Path:
    """A run's export has its model's folder beside it, and a release's lies in the model's."""
    for place in (path, path.parent, path.parent / "model", path.parent.parent):
        if (place / "tokenizer_config.json").is_file() or (place / "tokenizer.json").is_file():
            return place
    raise UsageError(
        "this export has no tokenizer beside it",
        where=str(path),
        fix="name the folder of the model that it was made of: --tokenizer FOLDER",
    )


def _named_tokenizer(folder: Path) -> Path:
    from compress.models.saved import find

    kind, found = find(str(folder))
    _refuse_network(kind, str(folder))
    return found


def _in_torch(artefact: str, tokenizer: Path | None) -> Loaded:
    """transformers' own `generate`."""
    import torch

    from compress.data.special import endings
    from compress.models.saved import find
    from compress.verbs.language import _load

    kind, folder = find(artefact)
    _refuse_network(kind, artefact)
    if tokenizer is not None:
        raise UsageError("this model has a tokenizer of its own", where="--tokenizer", fix="leave it out")
    model, _, words = _load(folder)
    ends = list(endings(words))

    def generate(ids: list[int], count: int, seen: Seen) -> None:
        given = torch.tensor([ids])  # (1, n)
        with torch.no_grad():
            model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=next(iter(ends), None),
                streamer=_Streamer(seen),
            )

    return _of(words, f"torch {torch.__version__.split('+')[0]}", generate, model.config.get_text_config())


class _Streamer:
    """What transformers hands the prompt, then token after token."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.prompt = seen, True

    def put(self, value: Any) -> None:
        if not self.prompt:
            self.seen(int(value))
        self.prompt = False

    def end(self) -> None:
        """There is nothing to flush."""


def _of(tokenizer: Any, runtime: str, generate: Callable[[list[int], int, Seen], None], config: Any = None) -> Loaded:
    """A model with a tokenizer of transformers."""
    from compress.data.dialogues import asked
    from compress.data.special import begun, check_ids

    def encode(text: str, chat: bool) -> list[int]:
        if not chat:
            return begun(tokenizer, text)
        ids: list[int] = tokenizer(asked(text, tokenizer), add_special_tokens=False)["input_ids"]
        check_ids(ids, tokenizer)
        return ids

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    context = getattr(config, "max_position_embeddings", None)
    return Loaded(runtime, encode, decode, generate, context if isinstance(context, int) else None)


def _refuse_network(kind: str, where: str) -> None:
    from compress.schema.recipe import TEXT

    if kind != TEXT:
        raise CompressError(
            "this is a network, and only a language model goes on with a text",
            where=where,
            fix="see what it is worth with `compress eval`, and how fast it is with `compress bench`",
        )


def _is_network_export(path: Path) -> bool:
    from compress.exporters.names import FILE

    return path.suffix.lower() == ".onnx" or (path / FILE).is_file()


def _refused(path: Path, tokenizer: Path | None) -> Loaded:
    if path.is_file():
        raise UsageError("this is one file of an export", where=str(path), fix="name the folder that it lies in")
    raise CompressError(
        "this is the export of a network, and only a language model goes on with a text",
        where=str(path),
        fix="name a folder with prefill.onnx and decode.onnx, or one made with --format genai",
    )


# What is none of these is a saved model, by its folder or its name, and runs in torch.
RUNTIMES = (
    Runtime(_is_genai, _in_genai),
    Runtime(_is_gguf, _in_llama_cpp),
    Runtime(_is_export, _in_onnx_runtime),
    Runtime(_is_network_export, _refused),
)
