"""GGUF: a language model, dense or pruned, as one file for a stock llama.cpp and all that is built on it.

It is made of the saved folder, tensor by tensor, not of ONNX. What is written is loaded in a stock libllama (package
`xllamacpp`, or the library that `COMPRESS_LIBLLAMA` names) and held against torch in float32: the tokens of a text of
many kinds against the tokenizer's, the logits at every position of real text, once in one batch and once token by
token.

Floats are held to a tolerance, with llama.cpp's cache in float32 and its plain attention, so that what differs is the
file. Quantised weights differ by what they are: mean Kullback-Leibler divergence and perplexity are recorded, as users
run them, and only what is no nearer to torch at a position than at the next is refused.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.exporters.llama_cpp import architectures, library, quantise, writer
from compress.exporters.llama_cpp.ask import Answer, ask
from compress.exporters.llama_cpp.quantise import FLOATS
from compress.exporters.llama_cpp.vocabulary import Vocabulary, compare, vocabulary
from compress.models.families import family_for
from compress.models.reading import check_weights, load_config
from compress.models.streaming import stream_model
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

TOLERANCE = {"f32": 1e-3, "f16": 3e-2, "bf16": 1e-1}
# A divergence that is not so much smaller than that from the next position's logits is of another model: what is none
# at all has as large a one.
NONSENSE = 0.8
ROOM = 1 << 27  # logits that are held of each side
GREEDY = 24  # tokens


@dataclass(frozen=True)
class Saved:
    """What is known of a saved language model beside its folder.

    Args:
        windows: token ids of real text, of one length; what the logits are compared on.
        begin: of each window's first ids, those that stand in front of every text.
        text: what the text is, for the record.
        name: of the file, without precision and suffix.
        license, base_model: where they are known.
    """

    tokenizer: Any
    windows: tuple[tuple[int, ...], ...]
    begin: int
    text: str
    name: str
    license: str | None = None
    base_model: str | None = None


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``folder/NAME-PRECISION.gguf``.

    Returns:
        ``{"components": {"model": {file, arch, blocks, parameters, types}}, "notes", "versions", "seconds"}``.

    Raises:
        CompressError: llama.cpp has no architecture or tokenizer for the model, a weight is missing or damaged, or does
            not fit the precision.
    """
    began = time.monotonic()
    saved: Saved = source.saved
    where = str(source.path)
    config = load_config(source.path)
    family = family_for(config)
    plan = architectures.plan(config, family, where)
    words = vocabulary(saved.tokenizer, config.vocab_size, where)
    check_weights(source.path)
    first = next(b for b in plan.blocks if b.heads)
    tensors = quantise.typed(plan.parts, options.precision, first.heads // first.kv_heads)
    notes = [*plan.notes, *quantise.fallbacks(tensors)]
    for note in notes:
        say(f"gguf: {note}")
    parameters = sum(int(np.prod(t.part.shape)) for t in tensors)
    keys = {
        **_general(saved, options.precision, parameters),
        **{f"{plan.arch}.{key}": value for key, value in plan.keys.items()},
        **words.keys,
    }
    path = folder / file_name(saved.name, options.precision)
    writer.write(path, plan.arch, keys, tensors, source.path, quantise.Converter(options.threads))
    types = Counter(t.type.name.lower() for t in tensors)
    made = {
        "file": path.name, "arch": plan.arch, "blocks": len(plan.blocks), "parameters": parameters,
        "context": plan.keys["context_length"], "types": dict(sorted(types.items())),
    }  # fmt: skip
    return {
        "components": {"model": made},
        "notes": notes,
        "versions": {"llama.cpp": library.title()},
        "seconds": round(time.monotonic() - began, 1),
    }


def file_name(name: str, precision: str) -> str:
    """As the hub's GGUF repositories name theirs: ``SmolLM2-135M-Q4_K_M.gguf``."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    label = precision.upper()
    return f"{plain}-{label}.gguf"


def _general(saved: Saved, precision: str, parameters: int) -> dict[str, Any]:
    kind, number = quantise.BASE[precision]
    found: dict[str, Any] = {
        "general.type": "model",
        "general.name": saved.name,
        "general.size_label": size_label(parameters),
        "general.file_type": int(number),
    }
    if saved.license:
        found["general.license"] = saved.license
    if saved.base_model:
        organisation, _, name = saved.base_model.rpartition("/")
        found |= {"general.base_model.count": 1, "general.base_model.0.name": name}
        if organisation:
            found["general.base_model.0.organization"] = organisation
            found["general.base_model.0.repo_url"] = f"https://huggingface.co/{saved.base_model}"
    if kind.name.lower() not in FLOATS:
        found["general.quantization_version"] = 2
    return found


def size_label(parameters: int) -> str:
    """``135M``, ``1.7B``: as names of models have it."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}".removesuffix(".0") + letter if value < 10 else f"{value:.0f}{letter}"
    return str(parameters)


def the_file(folder: Path) -> Path:
    """The GGUF of a built folder.

    Raises:
        CompressError: there is not just one.
    """
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        raise CompressError(
            f"there are {len(found)} GGUF files here",
            where=str(folder),
            fix="name a folder that `compress export` made",
        )
    return found[0]


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Runs the file in libllama and compares tokens and logits with torch's.

    Returns:
        ``{"outputs": {"batch", "stepped"}: largest difference relative to the largest logit, "tolerance" (floats),
        "kl": mean divergence in nats, "perplexity": {"torch", "gguf"}, "top": share of positions of one likeliest
        token, "tokens": {text: tokens}, "differs" (if they do), "greedy": {tokens, same}, "positions", "text",
        "samples", "runtime"}``.

    Raises:
        CompressError: llama.cpp does not load the file, makes other tokens, or computes something else.
    """
    saved: Saved = source.saved
    config = load_config(source.path)
    path = the_file(folder)
    context = architectures.plan(config, family_for(config), str(source.path)).keys["context_length"]
    words = vocabulary(saved.tokenizer, config.vocab_size, str(source.path))
    windows = _windows(saved, config.vocab_size, context)
    prompt = windows[0][: max(1, min(16, len(windows[0]), context - GREEDY))]
    answer = ask(
        path,
        texts=list(words.texts.values()),
        windows=windows,
        stepped=True,
        prompt=prompt,
        greedy=max(0, min(GREEDY, context - len(prompt))),
        ends=words.ends,
        threads=options.threads,
        plain_cache=options.precision in FLOATS,
    )
    same = compare(saved.tokenizer, words.texts, answer.tokens, str(source.path))
    wants = _torch(source.path, [*windows, [*prompt, *answer.greedy]])
    found = _measured(wants, answer, windows, saved.begin)
    _judge(found, options, str(path))
    greedy = wants[-1][len(prompt) - 1 :].argmax(-1)[: len(answer.greedy)]
    alike = next((i for i, (a, b) in enumerate(zip(greedy, answer.greedy, strict=True)) if a != b), len(answer.greedy))
    return {
        **found,
        **same,
        "greedy": {"tokens": len(answer.greedy), "same": alike},
        "text": saved.text,
        "samples": len(windows),
        "runtime": library.title(),
        **_not_ending(words, answer),
    }


def _not_ending(words: Vocabulary, answer: Answer) -> dict[str, Any]:
    """Ids that end the model's texts and do not end llama.cpp's, where there are any."""
    others = [i for i in words.ends if i not in answer.ends]
    return {"not_ending": others} if others else {}


def _windows(saved: Saved, vocab: int, context: int) -> list[list[int]]:
    """The source's windows, as many tokens of them as there is room for logits, none longer than the context."""
    most = max(2, ROOM // vocab)
    length = min(len(saved.windows[0]), context, most)
    return [list(w[:length]) for w in saved.windows[: max(1, most // length)]]


def _torch(folder: Path, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """(n, vocab) logits of each window, in float32, the blocks read from disk one at a time.

    Windows are filled up behind their ends; no token sees what stands behind it.
    """
    family = family_for(load_config(folder))
    model = stream_model(folder, family, 1, torch.device("cpu"))
    longest = max(map(len, windows))
    ids = torch.tensor([[*w, *[w[-1]] * (longest - len(w))] for w in windows])  # (b, longest)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().numpy()  # (b, longest, vocab)
    return [rows[: len(w)] for rows, w in zip(logits, windows, strict=True)]


def _measured(
    wants: Sequence[NDArray[np.float32]], answer: Answer, windows: Sequence[Sequence[int]], begin: int
) -> dict[str, Any]:
    """How far what llama.cpp computes is from torch; see `check`. ``wants`` has one more, of the greedy text."""
    largest = max(float(np.abs(want).max()) for want in wants) or 1.0
    assert answer.stepped is not None  # asked for
    worst = {
        "batch": max(_furthest(want, got) for want, got in zip(wants, answer.windows, strict=False)) / largest,
        "stepped": _furthest(wants[0], answer.stepped) / largest,
    }
    near, far, before, after, top, count, scored = 0.0, 0.0, 0.0, 0.0, 0, 0, 0
    for want, got, ids in zip(wants, answer.windows, windows, strict=False):
        p, q = (torch.log_softmax(torch.from_numpy(rows), -1) for rows in (want, got))
        weight = p.exp()
        near += float((weight * (p - q)).sum(-1).double().sum())
        far += float((weight * (p - q.roll(1, 0))).sum(-1).double().sum())
        top += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(ids)
        at = torch.arange(max(begin, 1), len(ids))
        following = torch.tensor(ids)[at]
        before -= float(p[at - 1, following].double().sum())
        after -= float(q[at - 1, following].double().sum())
        scored += len(at)
    return {
        "outputs": worst,
        "kl": near / count,
        "kl_of_the_next_position": far / count,
        "perplexity": {"torch": float(np.exp(before / scored)), "gguf": float(np.exp(after / scored))},
        "top": top / count,
        "positions": count,
    }


def _furthest(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """The largest difference; NaN stays NaN."""
    return float(np.abs(want - got).max())


def _judge(found: dict[str, Any], options: BuildOptions, where: str) -> None:
    """Raises CompressError where what llama.cpp computes is not this model."""
    if options.precision in FLOATS:
        tolerance = options.tolerance if options.tolerance is not None else TOLERANCE[options.precision]
        found["tolerance"] = tolerance
        for how, value in found["outputs"].items():
            if not value <= tolerance:
                words = {"batch": "in one batch", "stepped": "token by token"}[how]
                raise CompressError(
                    f"the logits in llama.cpp differ from torch's by {value:.2e} of the largest, {words} (allowed"
                    f" {tolerance:.0e})",
                    where=where,
                    fix="where f32 agrees name --precision f32 or bf16: activations may be beyond float16; else this"
                    " is a fault of ours",
                )
        return
    if not found["kl"] <= NONSENSE * found["kl_of_the_next_position"]:
        raise CompressError(
            f"what {options.precision} computes in llama.cpp is far from this model: a divergence of {found['kl']:.3g}"
            f" nats, where the next position's logits have {found['kl_of_the_next_position']:.3g}",
            where=where,
            fix="name a --precision of more bits",
        )


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    """The file in libllama: ``input_ids`` (1, n) int64 -> ``logits`` (1, n, vocab), in a fresh process at every
    call."""
    from compress.exporters.runtimes import CannotRun, Runner, Value

    path = the_file(folder)
    if component != "model":
        raise CannotRun(f"a GGUF has one component, model, and no {component}")

    def run(feed: Any) -> dict[str, Any]:
        ids = [int(i) for i in np.asarray(feed["input_ids"]).reshape(-1)]
        return {"logits": ask(path, windows=[ids], threads=options.threads).windows[0][None]}

    inputs, outputs = [Value("input_ids", (1, None), "int64")], [Value("logits", (1, None, None), "float32")]
    return Runner("gguf", library.title(), inputs, outputs, run, lambda feed: lambda: list(run(feed).values()))
