"""A tokenizer as a GGUF holds it, and the proof that llama.cpp makes the same tokens of a text.

Two kinds are written: byte-level BPE (``gpt2``: merges in their order) and SentencePiece's BPE with bytes to fall back
on (``llama``: the pair of the highest score is merged first). Both are read from tokenizer.json, which is what
transformers itself runs; scores are the ranks of the merges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType

from compress.data.special import around
from compress.errors import CompressError
from compress.exporters.llama_cpp import pretokenisers

SPACE = "▁"  # SentencePiece's sign for a space
UNUSED_SCORE = -10000.0
SPECIAL = "special tokens among words"
# Of many kinds, and each a little: languages and scripts, code, numbers, signs, white space. Composed (NFC) throughout:
# llama.cpp does not compose.
PROBE = (
    "The harbour was quiet. At 06:45 a ship came in, and nobody knew whose she was; \"it's nobody's\", they said.\n\n"
    "Größere Städte wären über die Brücke erreichbar gewesen. L'été dernier, où étiez-vous ? ¿Dónde está el año?\n"
    "Быстрая лиса прыгнула через забор. Η γρήγορη αλεπού. מה שלומך היום? كيف حالك اليوم؟ आप कैसे हैं? สบายดีไหม\n"
    "我们明天去北京，三点钟见。 昨日は雨が降りました。 안녕하세요, 오늘은 어때요?\n"
    "def area(r: float) -> float:\n    # 3.14159 * r ** 2\n\treturn math.pi * r**2  if r >= 0.5e-3 else -1_000_000\n"
    "<p class=\"x\">a &amp; b</p> {\"key\": [1, 22, 333, 4444, 55555]} https://example.org/a?b=c#d $PATH ~/x_y-z\n"
    "   three spaces,      six, and a tab\there; trailing   \n\n\n"
    "Emoji: 🙂 👩‍🚀 🏳️‍🌈 ❤️ ½ × ÷ ≠ ∑ € … — “quoted” ‘so’ I'LL we'd 'tis O'Neill CamelCase snake_case ALLCAPS\n"
)  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """``keys`` of the file, and ``texts`` whose tokens are compared. ``ends``: ids that end a text."""

    keys: Mapping[str, Any]
    texts: Mapping[str, str]
    ends: tuple[int, ...]


def vocabulary(tokenizer: Any, rows: int, where: str) -> Vocabulary:
    """The vocabulary of ``rows`` tokens, as many as the embedding has.

    Raises:
        CompressError: llama.cpp has no such tokenizer, or does not know how it splits text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _strange("it has no tokenizer.json", where)
    description = json.loads(backend.to_str())
    model = description["model"]
    if model.get("type") != "BPE":
        raise _strange(f"it is of the kind {model.get('type')}", where)
    added = {a["id"]: a for a in description.get("added_tokens") or ()}
    if _is_byte_level(description):
        keys = _byte_level(tokenizer, description, added, rows, where)
    elif model.get("byte_fallback"):
        keys = _sentencepiece(tokenizer, description, added, rows)
    else:
        raise _strange("it is a BPE neither of bytes nor with bytes to fall back on", where)
    keys |= _special(tokenizer, rows, where)
    template = tokenizer.chat_template
    if template:
        keys |= _templates(template)
    return Vocabulary(keys, _texts(tokenizer, added, rows), tuple(getattr(tokenizer, "end_ids", ())))


def _strange(what: str, where: str) -> CompressError:
    return CompressError(
        f"llama.cpp has no tokenizer of this kind: {what}",
        where=where,
        fix="byte-level BPE and SentencePiece's BPE are written; name another format",
    )


def _is_byte_level(description: Mapping[str, Any]) -> bool:
    steps = description.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" for step in steps.get("pretokenizers", [steps]))


def _words(model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int) -> list[str]:
    """Every row's token; a row that no token has is named after its number."""
    words = [f"[PAD{i}]" for i in range(rows)]
    for word, i in model["vocab"].items():
        if i < rows:
            words[i] = word
    for i, one in added.items():
        if i < rows:
            words[i] = one["content"]
    return words


def _kinds(model: Mapping[str, Any], added: Mapping[int, Mapping[str, Any]], rows: int) -> list[int]:
    kinds = [TokenType.UNUSED] * rows
    for i in model["vocab"].values():
        if i < rows:
            kinds[i] = TokenType.NORMAL
    for i, one in added.items():
        if i < rows:
            kinds[i] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    return [int(kind) for kind in kinds]


def _byte_level(
    tokenizer: Any, description: Mapping[str, Any], added: Mapping[int, Any], rows: int, where: str
) -> dict[str, Any]:
    model = description["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if not merges:
        raise _strange("it merges nothing", where)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pretokenisers.name(tokenizer, description, where),
        "tokenizer.ggml.tokens": _words(model, added, rows),
        "tokenizer.ggml.token_type": _kinds(model, added, rows),
        "tokenizer.ggml.merges": merges,
    }


def _sentencepiece(
    tokenizer: Any, description: Mapping[str, Any], added: Mapping[int, Any], rows: int
) -> dict[str, Any]:
    model = description["model"]
    words, kinds = _words(model, added, rows), _kinds(model, added, rows)
    scores = [0.0 if kind != TokenType.UNUSED else UNUSED_SCORE for kind in kinds]
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        i = model["vocab"].get(left + right)
        if i is not None and i < rows and scores[i] == 0.0:
            scores[i] = -1.0 - rank  # the first of the merges that make it
    unknown = model["vocab"].get(model.get("unk_token"))
    for i, word in enumerate(words):
        if i == unknown:
            kinds[i] = int(TokenType.UNKNOWN)
        elif len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[i] = int(TokenType.BYTE)
        elif kinds[i] == TokenType.USER_DEFINED:
            words[i] = word.replace(SPACE, " ")  # looked for in the text itself, where spaces are spaces
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"][:1])[0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": first.startswith(SPACE),
    }


def _special(tokenizer: Any, rows: int, where: str) -> dict[str, Any]:
    """The tokens of a purpose, and what is put around a text."""
    found: dict[str, Any] = {}
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
    for name, attribute in ids.items():
        value = getattr(tokenizer, attribute, None)
        if value is not None and value < rows:
            found[f"tokenizer.ggml.{name}_token_id"] = int(value)
    front, behind = around(tokenizer)
    for name, given, own in (("bos", front, tokenizer.bos_token_id), ("eos", behind, tokenizer.eos_token_id)):
        if given not in ([], [own]):
            raise CompressError(
                f"the tokenizer puts {tokenizer.convert_ids_to_tokens(given)} around a text, and llama.cpp its {name}"
                " token or nothing",
                where=where,
                fix="name another format",
            )
        found[f"tokenizer.ggml.add_{name}_token"] = bool(given)
    own = tokenizer.eos_token_id
    others = [i for i in getattr(tokenizer, "end_ids", ()) if i != own and i < rows]
    for name, i in zip(("eot", "eom"), others, strict=False):
        found[f"tokenizer.ggml.{name}_token_id"] = int(i)
    return found


def _templates(template: str | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    named = {n: t for n, t in template.items() if n != "default"}
    found: dict[str, Any] = {f"tokenizer.chat_template.{n}": t for n, t in named.items()}
    if named:
        found["tokenizer.chat_templates"] = sorted(named)
    if "default" in template:
        found["tokenizer.chat_template"] = template["default"]
    return found


def _texts(tokenizer: Any, added: Mapping[int, Mapping[str, Any]], rows: int) -> dict[str, str]:
    """What is compared: a text of many kinds, and its special tokens with words between them."""
    special = [one["content"] for i, one in sorted(added.items()) if one["special"] and i < rows]
    put = {tokenizer.convert_ids_to_tokens(i) for i in (*around(tokenizer)[0], *around(tokenizer)[1])}
    between = [word for word in special if word not in put][:8]
    found = {"a text of many languages, code and signs": PROBE}
    if between:
        found[SPECIAL] = "".join(f"one{word}two" for word in between)
    return found


def compare(tokenizer: Any, texts: Mapping[str, str], got: Sequence[Sequence[int]], where: str) -> dict[str, Any]:
    """``{"tokens": {text: how many, the same in both}}``, and what ``differs`` where that is a space behind a special
    token: llama.cpp puts one before a word there, as SentencePiece's older tokenizers did.

    Raises:
        CompressError: llama.cpp makes others of a text, or does not see a special token.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    found: dict[str, Any] = {"tokens": {}}
    for (title, text), ids in zip(texts.items(), got, strict=True):
        want = list(tokenizer(text)["input_ids"])
        if want == list(ids):
            found["tokens"][title] = len(want)
        elif title == SPECIAL and [i for i in want if i in special] == [i for i in ids if i in special]:
            found["differs"] = "the words between special tokens"
        else:
            at = next((i for i, (a, b) in enumerate(zip(want, ids, strict=False)) if a != b), min(len(want), len(ids)))
            mine, theirs = (tokenizer.convert_ids_to_tokens(list(side[at : at + 3])) for side in (want, ids))
            raise CompressError(
                f"llama.cpp makes other tokens of {title} than the tokenizer: at token {at} {theirs}, and it {mine}",
                where=where,
                fix="name a model whose tokenizer llama.cpp has, or another format",
            )
    return found
