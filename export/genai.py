"""A folder for ONNX Runtime GenAI: one graph with the KV cache, ``genai_config.json``, the tokenizer and its template.

The graph is ``decode.onnx`` as `compress.exporters.onnx` writes it: the past may be empty and the length is free, so
one file takes the prompt and the steps. The runtime reads the KV heads and the head size of each layer from the shapes
of ``past_key_values.N.key``, so layers may differ, and one without attention has no cache.

The model's type is always ``decoder``: the runtime's own types stand for graphs as its own builder makes them. In fp32
the greedy text is torch's; below, the logits at every position of a piece of real text are held against the ONNX
file's, in two parts, so that the second is read from the cache.
"""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compress.data.dialogues import asked
from compress.data.special import ORDINARY, begun, endings
from compress.errors import CompressError, UsageError
from compress.exporters import formats, onnx_file, parity, quantize, runtimes, tensors
from compress.exporters.ort import OrtLLM
from compress.exporters.passage import TEXT
from compress.run.progress import say
from compress.run.seals import inside as is_inside
from compress.run.strict_json import member, read_json, typed
from compress.schema.recipe import ExportSection

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

CONFIG, GRAPH = "genai_config.json", "model.onnx"
BITS = {"int8": 8, "int4": 4}
# Products on int8: several times as fast as on float32, for a difference far below that of the weights' own 4 bits.
ACCURACY_LEVEL = 4
# The largest mean Kullback-Leibler divergence from the ONNX file, in nats a token.
KL = {"fp16": 0.01, "int8": 0.05, "int4": 1.0}
WINDOWS, LENGTH = 3, 128  # of the text that it is measured on
# Texts on which the runtime's own tokenizer must agree with transformers'.
PROBES = (TEXT, "The sea, 1 ship and 2,048 gulls:\n\n\tdef f(x):  return x  # naïve café, 東京, \u2603", " leading")
MOST = 10**9  # tokens of a context
# Settings of a session that change how fast it runs, and nothing else.
SESSION = {
    "provider_options", "intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern",
    "graph_optimization_level", "log_id", "log_severity_level", "use_env_allocators",
}  # fmt: skip
_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def build(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Writes ``model.onnx`` with its weights beside it, ``genai_config.json`` and the tokenizer's files.

    Raises:
        UsageError: it is no language model of ours, the runtime is missing or too old, or fusions are asked for.
        CompressError: the graph keeps a cache that the runtime does not know, or cannot be cast or quantised.
    """
    began = time.monotonic()
    runtime = _version()
    decode = _decode(source)
    if options.fusions != "none":
        raise UsageError("the format genai is built without fusions", where="--fusions", fix="leave it out")
    facts: dict[str, Any] = {}
    graph = formats.read_graph(decode)
    settings = config(source, graph, decode)
    if options.precision in BITS:
        say(f"genai: {options.precision}")
        facts["quantised"] = quantize.weights_nbits(
            decode, folder / GRAPH, BITS[options.precision], level=ACCURACY_LEVEL
        )
    else:
        facts |= onnx_file.convert(decode, folder / GRAPH, source, "decode", options)
    onnx_file.share_weights(folder, [Path(GRAPH).stem])
    facts["ops"] = dict(formats.read_graph(folder / GRAPH, own_operators=False).ops)
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    source.tokenizer.save_pretrained(folder)
    return {
        "components": {"decode": facts},
        "versions": {"onnxruntime-genai": runtime},
        "seconds": round(time.monotonic() - began, 1),
    }


def _version() -> str:
    """The runtime's version.

    Raises:
        UsageError: it is not here, or too old.
    """
    try:
        return runtimes.available("genai")
    except runtimes.Missing as e:
        raise UsageError(e.what, where="--format", fix=e.fix) from e


def _decode(source: Source) -> Path:
    found = formats.components(source.path).get("decode")
    if found is None or source.tokenizer is None or source.model is None:
        raise UsageError(
            "the format genai is made of a saved language model with its tokenizer",
            where=str(source.path),
            fix="name its folder, a run or a release; networks have other formats",
        )
    return found


def config(source: Source, graph: formats.Graph, where: Path) -> dict[str, Any]:
    """``genai_config.json`` of a model whose graph with the cache is ``graph``.

    Raises:
        CompressError: the graph takes an input that the runtime would not fill, no layer has a cache, or the
            configuration does not say how long a text may be.
    """
    settings = source.model.config.get_text_config()
    caches = [(p, _CACHE.fullmatch(p.name)) for p in graph.inputs]
    plain = [p.name for p, cache in caches if cache is None]
    strange = [name for name in plain if name not in ("input_ids", "attention_mask", "position_ids")]
    layers = sorted({int(cache[1]) for _, cache in caches if cache is not None})
    if strange or not layers or layers[-1] >= settings.num_hidden_layers:
        kept = f"the graph's cache has {strange[0]}" if strange else "no layer of the graph has a cache of its own"
        raise CompressError(
            f"ONNX Runtime GenAI keeps keys and values of attention layers; {kept}",
            where=str(where),
            fix="take the format onnx, and keep the cache yourself",
        )
    length = getattr(settings, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise CompressError(
            "the configuration does not say how long a text may be, and ONNX Runtime GenAI must know",
            where="config.json: max_position_embeddings",
            fix="write it there",
        )
    shapes = [p.shape for p, cache in caches if cache is not None]
    ends = list(endings(source.tokenizer))
    pad = source.tokenizer.pad_token_id
    special = {
        "bos_token_id": source.tokenizer.bos_token_id,
        "eos_token_id": ends or None,
        "pad_token_id": pad if pad is not None else next(iter(ends), None),
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": graph.outputs[0].shape[2],
            "context_length": length,
            **{name: value for name, value in special.items() if value is not None},
            "decoder": {
                "filename": GRAPH,
                # What the runtime starts from; where a layer differs, the graph's own shapes hold.
                "head_size": shapes[0][3],
                "hidden_size": settings.hidden_size,
                "num_attention_heads": settings.num_attention_heads,
                "num_key_value_heads": max(int(s[1]) for s in shapes),
                "num_hidden_layers": settings.num_hidden_layers,
                "inputs": {
                    **{name: name for name in plain},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }


def check_folder(folder: Path) -> int:
    """The context of a folder that may come from anywhere, in tokens.

    Raises:
        CompressError: its settings cannot be read, name a file outside it, or would have code loaded, files written or
            a device chosen; or its weights are missing, or lie outside it.
    """
    what, where, fix = f"the file {CONFIG}", str(folder / CONFIG), "export the model again"
    whole = typed(read_json(folder / CONFIG, what, fix=fix), dict, "", what, where, fix)
    model = member(whole, "model", dict, what, where, fix=fix)
    for key, value in _entries(whole):
        name = key.rpartition(".")[2]
        if name == "session_options":
            strange = sorted(set(typed(value, dict, key, what, where, fix)) - SESSION)
        else:
            strange = [name] if "library" in name or (name == "provider_options" and value) else []
        if strange:
            raise CompressError(
                f"{what} has {key if name == strange[0] else f'{key}.{strange[0]}'}, which could have code loaded or"
                " files written",
                where=where,
                fix="take it out: the runtime does without",
            )
        if name.endswith("filename") and not (isinstance(value, str) and is_inside(value)):
            raise CompressError(f"{what} names a file outside its folder: {value!r:.200}", where=where, fix=fix)
    decoder = member(model, "decoder", dict, what, where, "model", fix)
    tensors.files(folder / member(decoder, "filename", str, what, where, "model.decoder", fix))
    context: int = member(model, "context_length", int, what, where, "model", fix)
    if not 0 < context <= MOST:
        raise CompressError(f"{what} has a context of {context:,} tokens", where=where, fix=fix)
    return context


def _entries(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested settings, with the keys above it, and its value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        place = f"{at}.{key}" if at else str(key)
        yield place, inner
        yield from _entries(inner, place)


class Genai:
    """A folder in ONNX Runtime GenAI; ``context`` is how many tokens a text may have.

    Args:
        threads: of the processor; None leaves it to the runtime.

    Raises:
        UsageError: the runtime is missing or too old.
        CompressError: it cannot load the folder, or must not; see `check_folder`.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        _version()
        self.folder, self.context = folder, check_folder(folder)
        try:
            self.model = runtimes.genai_model(str(folder), threads)
            self.tokenizer = self._og.Tokenizer(self.model)
        except (RuntimeError, runtimes.CannotRun) as e:
            raise self._cannot("load the folder", e) from e

    @property
    def _og(self) -> Any:
        return importlib.import_module("onnxruntime_genai")

    def _cannot(self, what: str, error: Exception) -> CompressError:
        return CompressError(
            f"ONNX Runtime GenAI cannot {what}: {str(error).splitlines()[0][:300]}",
            where=str(self.folder),
            fix="export it again; where it stays, take the format onnx",
        )

    def generator(self, length: int) -> Any:
        """A greedy generator of ``length`` tokens at most, the prompt's among them."""
        try:
            parameters = self._og.GeneratorParams(self.model)
            parameters.set_search_options(do_sample=False, max_length=length)
            return self._og.Generator(self.model, parameters)
        except RuntimeError as e:
            raise self._cannot("begin a text", e) from e

    @cached_property
    def opening(self) -> list[int]:
        """The ids that the tokenizer puts in front of a text; the runtime leaves them out unless it is told."""
        adding = self._og.Tokenizer(self.model)
        adding.update_options(add_special_tokens=True)
        whole, plain = [int(i) for i in adding.encode(ORDINARY)], self.encode(ORDINARY, begin=False)
        at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Token ids of a text; ``begin`` it with what the tokenizer puts in front. A chat template has that itself."""
        try:
            ids = [int(i) for i in self.tokenizer.encode(text)]
            return [*(self.opening if begin else ()), *ids]
        except RuntimeError as e:
            raise self._cannot("make tokens of a text", e) from e

    def asked(self, text: str) -> str:
        """What a person says, as the chat template writes it, up to where the model's answer begins."""
        try:
            said = json.dumps([{"role": "user", "content": text}])
            return str(self.tokenizer.apply_chat_template(said, add_generation_prompt=True))
        except RuntimeError as e:
            raise self._cannot("render the chat template", e) from e

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """(n, vocab) behind each of the tokens; the second half is read behind the cache of the first."""
        generator, half = self.generator(len(ids) + 1), max(1, len(ids) // 2)
        found = []
        try:
            for part in (ids[:half], ids[half:]):
                if part:
                    generator.append_tokens(np.asarray(part, np.int32))
                    found.append(np.array(generator.get_output("logits")[0], np.float32))
        except RuntimeError as e:
            raise self._cannot("run the model", e) from e
        return np.concatenate(found)

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """Up to ``tokens`` likeliest tokens behind ``ids``, one after the other; one that ends a text is the last."""
        return list(self.likeliest(ids, tokens))

    def likeliest(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """`greedy`, token by token."""
        generator, count = self.generator(len(ids) + tokens), 0
        try:
            generator.append_tokens(np.asarray(ids, np.int32))
            while count < tokens and not generator.is_done():
                generator.generate_next_token()
                count += 1
                yield int(generator.get_next_tokens()[0])
        except RuntimeError as e:
            raise self._cannot("run the model", e) from e

    def decode(self, ids: Sequence[int]) -> str:
        try:
            return str(self.tokenizer.decode(np.asarray(ids, np.int32)))
        except RuntimeError as e:
            raise self._cannot("make text of tokens", e) from e


def check(source: Source, folder: Path, options: BuildOptions) -> dict[str, Any]:
    """Loads the folder in the runtime and compares: tokens of texts with transformers', in fp32 the greedy text with
    torch's, and the logits at every position of real text with those of the ONNX file.

    Returns:
        ``{"outputs", "tolerance", "samples", "runtime", "divergence", "words", ...}``; ``divergence`` is as of the
        function of that name.

    Raises:
        CompressError: they differ by more than the precision allows.
    """
    built, tokenizer = Genai(folder, options.threads), source.tokenizer
    _same_tokens(built, tokenizer)
    found: dict[str, Any] = {
        "runtime": _version(), "begins_with": built.opening, "chat_template": _same_template(built, tokenizer)
    }  # fmt: skip
    length = min(LENGTH, int(source.model.config.get_text_config().max_position_embeddings) - 1)
    ids = begun(tokenizer, TEXT)[: WINDOWS * length]
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    measured = divergence(OrtLLM(source.path, options.threads), built, windows)
    found |= {"samples": len(windows), "divergence": measured}
    if options.precision == "fp32":
        tolerance = options.tolerance if options.tolerance is not None else parity.TOLERANCE["fp32"]
        found |= {"outputs": {"decode.logits": measured["largest_difference"]}, "tolerance": tolerance}
        wrong = not measured["largest_difference"] <= tolerance
    else:
        found |= {"outputs": {}, "tolerance": KL[options.precision]}
        wrong = not measured["kl"] <= KL[options.precision]
    if wrong:
        raise CompressError(
            f"the logits in ONNX Runtime GenAI are not those of the ONNX file: {measured['kl']:.3g} nats a token in"
            f" {options.precision}, the largest relative difference {measured['largest_difference']:.2e} (allowed:"
            f" {found['tolerance']:g}{'' if options.precision == 'fp32' else ' nats'})",
            where=str(folder),
            fix="name another --precision",
        )
    if options.precision == "fp32":
        spec = ExportSection()
        found["greedy"] = parity.greedy_same(
            source.model, tokenizer, built.greedy, spec.prompt, min(spec.greedy_tokens, length), folder
        )
    found["words"] = _words(found)
    return found


def _words(found: dict[str, Any]) -> str:
    of = found["divergence"]
    same = f"{found['greedy']['tokens']} greedy tokens equal torch's; " if "greedy" in found else ""
    return (
        f"{same}against ONNX in fp32 {of['kl']:.2g} nats a token, perplexity {of['perplexity'][0]:.3f} ->"
        f" {of['perplexity'][1]:.3f} on {of['tokens']} tokens ({found['runtime']})"
    )


def divergence(reference: OrtLLM, built: Genai, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How far the built file's next-token distributions lie from the ONNX file's, teacher-forced.

    Returns:
        ``{"kl": mean nats a token, "largest_kl", "perplexity": [ONNX, built], "largest_difference": of logits, relative
        to the largest, "tokens"}``; NaN where a logit is no number.
    """
    divergences, losses, worst = [], [], 0.0
    for window in windows:
        ids = np.array([window], np.int64)
        want = reference.decode(ids, reference.empty_cache(1))["logits"][0]  # (n, vocab)
        got = built.logits(window)
        scale = float(np.abs(want).max()) or 1.0
        # np.maximum, not max: NaN must come through.
        worst = float(np.maximum(worst, np.abs(want - got).max() / scale))
        p, q = _log_softmax(want), _log_softmax(got)
        divergences.append((np.exp(p) * (p - q)).sum(1))
        target = ids[0, 1:]
        losses.append(np.stack([-of[np.arange(len(target)), target] for of in (p[:-1], q[:-1])]))
    kl, loss = np.concatenate(divergences), np.concatenate(losses, 1)
    return {
        "kl": float(kl.mean()),
        "largest_kl": float(np.maximum.reduce(kl)),
        "perplexity": [float(np.exp(of.mean())) for of in loss],
        "largest_difference": worst,
        "tokens": loss.shape[1],
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logs


def _same_tokens(built: Genai, tokenizer: Any) -> None:
    """Raises CompressError where the runtime makes other tokens of a text than transformers does."""
    for text in PROBES:
        want, got = begun(tokenizer, text), built.encode(text)
        if want != got:
            at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
            raise CompressError(
                f"ONNX Runtime GenAI makes other tokens of a text than transformers does, first at token {at}:"
                f" {got[at : at + 4]}, transformers {want[at : at + 4]}",
                where=str(built.folder),
                fix="take the format onnx, and make the tokens with transformers",
            )


def _same_template(built: Genai, tokenizer: Any) -> str:
    """Whether the runtime renders the chat template as transformers does; it is said where it does not."""
    if not getattr(tokenizer, "chat_template", None):
        return "none"
    try:
        want = asked("What is a whale?", tokenizer)
        got = built.asked("What is a whale?")
    except CompressError as e:
        say(f"genai: {e.what}; make the text of a dialogue with transformers")
        return "not rendered"
    if want != got:
        say("genai: ONNX Runtime GenAI renders the chat template otherwise than transformers does")
        return "differs"
    return "agrees"


def load(folder: Path, component: str, options: BuildOptions) -> Runner:
    return runtimes.load("genai", str(folder / CONFIG), options.threads)
