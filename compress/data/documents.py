"""The documents and dialogues of a source, in a fixed order, split once into those to calibrate and to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from compress.data.dialogues import Dialogue, read_dialogues
from compress.data.packaged_text import NAME_FILES, PACKAGES, pieces
from compress.distribution import install_line
from compress.errors import CompressError
from compress.schema.recipe import SourceSpec
from compress.system.files import matching, read_text

Split = Literal["calibration", "evaluation"]

LONGEST = 8 << 30  # bytes of one file
HUB_DOCUMENTS = 20_000  # documents read from a hub data set; its order is fixed, so the split is too


class Pieces(list[str]):
    """Documents that are pieces of one text."""


def load_documents(source: SourceSpec, split: Split) -> list[str]:
    """The documents of one split of a source, in a fixed order; `Pieces` where it is a single text.

    Raises:
        CompressError: the source cannot be reached, or holds no text.
    """
    documents = [d for d in _all_documents(source) if d.strip()]
    if len(documents) == 1:
        # One long file: its paragraphs in runs are as good as documents.
        documents = Pieces(pieces(documents[0]))
    if len(documents) < 2:
        raise CompressError(
            "the text is empty" if not documents else "the text is too short to be split",
            where=f"source {source.title}",
            fix="name a source that holds text of more than a few paragraphs",
        )
    return type(documents)(_part(documents, split))


def load_dialogues(source: SourceSpec, split: Split) -> list[Dialogue]:
    """The dialogues of one split of a source, in a fixed order.

    Raises:
        CompressError: a file or a line of it is wrong, or there are fewer than two.
    """
    assert source.dialogues is not None  # asked by the caller
    found = read_dialogues(source.dialogues)
    if len(found) < 2:
        raise CompressError(
            f"{len(found)} dialogues cannot be split", where=f"source {source.title}", fix="give more lines"
        )
    return list(_part(found, split))


def _part(documents: Sequence[Any], split: Split) -> Sequence[Any]:
    cut = min(len(documents) - 1, int(0.9 * len(documents)))
    return documents[:cut] if split == "calibration" else documents[cut:]


def _all_documents(source: SourceSpec) -> list[str]:
    if source.embedded is not None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source.files is not None:
        return read_files(source.files)
    if source.package is not None:
        return PACKAGES[source.package]()
    return _from_hub(source)


def read_files(patterns: Sequence[str]) -> list[str]:
    """The files that match, in order.

    Raises:
        CompressError: a pattern matches nothing, or a file is not UTF-8 text.
    """
    documents = []
    for path in matching(patterns, "the text files"):
        try:
            documents.append(read_text(Path(path), "the text", LONGEST, "give UTF-8 text files"))
        except CompressError as e:
            raise CompressError(f"the text cannot be read: {e.what}", where=e.where, fix=e.fix) from e
    return documents


def _from_hub(source: SourceSpec) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CompressError(
            "text from the hub needs the package 'datasets'",
            where=f"source {source.hub}",
            fix=f"{install_line('hub')}, or {NAME_FILES}",
        ) from None
    try:
        rows = load_dataset(source.hub, source.config, split=source.split, streaming=True).take(HUB_DOCUMENTS)
        return [row[source.column] for row in rows]
    except KeyError as e:
        raise CompressError(f"the data set has no column {e}", where=f"source {source.hub}", fix="set 'column'") from e
    except (OSError, ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CompressError(
            f"the data set cannot be read from the hub: {reason}",
            where=f"source {source.hub}",
            fix=f"check the network and the name, or {NAME_FILES}",
        ) from e
