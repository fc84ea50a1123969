"""What a tokenizer puts around a text: the tokens that it begins and ends with, and those between two documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.data.dialogues import template_facts
from compress.errors import CompressError

# What a tokenizer does with an ordinary text is seen on this one.
ORDINARY = "The quick brown fox jumps over the lazy dog."


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts in front of an ordinary text and behind it when it is called on one.

    It is asked, not its settings: many have a begin-of-text token and never add it.

    Raises:
        CompressError: what it makes of a text does not hold the text.
    """
    text: list[int] = list(tokenizer(ORDINARY, add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer(ORDINARY)["input_ids"])
    for at in range(len(whole) - len(text) + 1):
        if text and whole[at : at + len(text)] == text:
            return whole[:at], whole[at + len(text) :]
    if whole == text:  # a tokenizer of few words, that knows none of these
        return [], []
    raise CompressError(
        f"the tokenizer gives {whole[:8]} for a text that is {text[:8]} without its special tokens",
        where="tokenizer",
        fix="what it adds must stand in front of the text or behind it; check the tokenizer's files",
    )


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that every window begins with: what the tokenizer puts in front of a text."""
    return tuple(around(tokenizer)[0])


def endings(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that end what the model says: the tokenizer's own, then those that only the model's settings name
    (`compress.models.reading.end_ids`)."""
    own = tokenizer.eos_token_id
    return tuple(dict.fromkeys((*(() if own is None else (own,)), *getattr(tokenizer, "end_ids", ()))))


def closing(tokenizer: Any) -> tuple[int, ...]:
    """The token ids behind a document: what the tokenizer puts behind a text, else the first of `endings`."""
    return tuple(around(tokenizer)[1]) or endings(tokenizer)[:1]


def between(tokenizer: Any) -> tuple[int, ...]:
    """The token ids between two documents: what closes the one and opens the next. A token that does both (GPT-2's)
    stands there once."""
    close, begin = closing(tokenizer), opening(tokenizer)
    return close if begin and close[-len(begin) :] == begin else (*close, *begin)


def begun(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that is to be gone on with: what stands in front of it is there, what ends it is not."""
    ids = [*opening(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    check_ids(ids, tokenizer)
    return ids


def check_ids(ids: Sequence[int], tokenizer: Any) -> None:
    """Raises CompressError where a token has no row in the embedding of the model that the tokenizer was read with."""
    rows = getattr(tokenizer, "embedding_rows", None)
    largest = max(ids, default=0)
    if rows is not None and largest >= rows:
        raise CompressError(
            f"the token {str(tokenizer.convert_ids_to_tokens(largest))!r:.60} has the id {largest}, and the model's"
            f" embedding has {rows:,} rows (vocab_size); the tokenizer knows {len(tokenizer):,} tokens",
            where=f"{tokenizer.name_or_path}/tokenizer.json",
            fix="take the tokenizer that the model was trained with, or resize the model's embeddings to it",
        )


def text_facts(tokenizer: Any, dialogues: bool = False) -> dict[str, Any]:
    """What the tokenizer makes of texts, for the lock file and the report.

    Args:
        dialogues: whether some are written by its chat template.

    Returns:
        ``{"begins_with", "ends_with", "between"}``, a row a token, and ``chat_template`` (`template_facts`).
    """

    def rows(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": i, "token": str(tokenizer.convert_ids_to_tokens(i))} for i in ids]

    before, behind = around(tokenizer)
    facts: dict[str, Any] = {
        "begins_with": rows(before),
        "ends_with": rows(behind),
        "between": rows(between(tokenizer)),
    }
    return {**facts, "chat_template": template_facts(tokenizer)} if dialogues else facts
