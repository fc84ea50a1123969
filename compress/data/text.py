"""Text for calibration and evaluation: documents in a fixed order, split once, packed into full windows.

Where the model's tokenizer puts something in front of a text (a begin-of-text token, as a rule), every window begins
with it: without it a model such as Gemma is not the model that its users have. It is read, and never scored.

Documents are joined as the model was trained to see them: behind each its end, in front of the next what the tokenizer
begins a text with (`between`). A single text is one document. Where it has to be split it is cut into pieces, each of
which ends as a document does; but no text begins there, so nothing is put in front of it. A dialogue ends and begins as
its chat template has it, and a window of dialogues begins with one.

The last tenth of a source's documents is for evaluation, the rest for calibration, so the two never overlap; a text
that is only evaluated on is simply not named as a calibration source.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.data.dialogues import Dialogue, read_dialogues, render, template_facts
from compress.data.packaged_text import NAME_FILES, PACKAGES, pieces
from compress.distribution import install_line
from compress.errors import CompressError
from compress.run.cache import sha256_of
from compress.schema.recipe import NamedText, SourceSpec
from compress.system.files import matching, read_text

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["calibration", "evaluation"]

LONGEST = 8 << 30  # bytes of one file
HUB_DOCUMENTS = 20_000  # documents read from a hub data set; its order is fixed, so the split is too
# What a tokenizer does with an ordinary text is seen on this one.
ORDINARY = "The quick brown fox jumps over the lazy dog."
OVERLAP = 64  # a run of this many tokens in both calibration and evaluation text is an overlap


@dataclass(frozen=True)
class Packed:
    """Token windows, and which of their tokens are scored.

    Args:
        ids: (windows, length) int64.
        scored: (windows, length) bool; None where all are, but for those that every window begins with.
    """

    ids: Tensor
    scored: Tensor | None = None


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


def pack(documents: Sequence[str], tokenizer: Any, length: int, windows: int, title: str) -> Packed:
    """Joins documents by what is `between` them, cuts full windows, and takes ``windows`` of them, evenly spaced.

    Returns:
        Windows whose first tokens are the tokenizer's `opening`; the rest is text. What begins a document inside one is
        not scored.

    Raises:
        CompressError: there is less text than that, or no place for it in a window.
    """
    import torch

    begin, close, join = opening(tokenizer), closing(tokenizer), between(tokenizer)
    body = _body(begin, length, title)
    opened = () if isinstance(documents, Pieces) else join[len(close) :]
    ids: list[int] = []
    begins: set[int] = set()  # places of tokens that stand in front of a document
    for i, document in enumerate(documents):
        if i and opened:
            begins.update(range(len(ids), len(ids) + len(opened)))
            ids += opened
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        ids += close
    check_ids([*begin, *ids], tokenizer)
    starts, at = [], 0
    while True:
        while at in begins:  # the window begins so anyway
            at += 1
        if at + body > len(ids):
            break
        starts.append(at)
        at += body
    chosen = [starts[i] for i in _evenly(len(starts), windows, length, f"source {title}", "text")]
    rows = torch.tensor([[*begin, *ids[at : at + body]] for at in chosen], dtype=torch.int64)
    _refuse_alike(rows[:, len(begin) :], title)
    if not any(i in begins for at in chosen for i in range(at, at + body)):
        return Packed(rows)
    own = [[False] * len(begin) + [i not in begins for i in range(at, at + body)] for at in chosen]
    return Packed(rows, torch.tensor(own, dtype=torch.bool))


def pack_dialogues(
    dialogues: Sequence[Dialogue], tokenizer: Any, length: int, windows: int, title: str, scored: bool = True
) -> Packed:
    """Writes dialogues by the tokenizer's chat template and packs them; every window begins with a dialogue, goes on
    with the next ones, and is cut where it is full: what is left of the last one is not read.

    Args:
        scored: tell the assistant's words, and the token that ends a turn of it, from the rest: they alone are scored.

    Raises:
        CompressError: there are fewer dialogues than that, the template is missing or refuses one, or where the
            assistant speaks cannot be told.
    """
    import torch

    begin, close, ends = opening(tokenizer), closing(tokenizer), endings(tokenizer)
    _body(begin, length, title)
    stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in dict.fromkeys((*ends, *close))]
    rows, marks = [], []
    row: list[int] = []
    mark: list[bool] = []
    for dialogue in dialogues:
        ids, said, text = _written(dialogue, tokenizer, scored)
        if not row:
            own = begin if tuple(ids[: len(begin)]) != begin else ()
            row, mark = [*own], [False] * len(own)
        row += ids
        mark += said
        if not text.rstrip().endswith(tuple(stops)):
            row += close
            mark += [False] * len(close)
        if len(row) >= length:
            rows.append(row[:length])
            marks.append(mark[:length])
            row, mark = [], []
    check_ids([i for ids in rows for i in ids], tokenizer)
    at = _evenly(len(rows), windows, length, f"source {title}", "dialogues")
    packed = torch.tensor([rows[i] for i in at], dtype=torch.int64)
    if not scored:
        _refuse_alike(packed, title)
        return Packed(packed)
    spoken = torch.tensor([marks[i] for i in at], dtype=torch.bool)
    if not spoken[:, max(1, len(begin)) :].any():
        raise CompressError(
            f"the assistant says nothing in the first {length} tokens of the dialogues",
            where=f"source {title}",
            fix="ask for longer windows",
        )
    _refuse_alike(packed, title)
    return Packed(packed, spoken)


def _written(dialogue: Dialogue, tokenizer: Any, scored: bool) -> tuple[list[int], list[bool], str]:
    """The token ids of a dialogue, whether each is the assistant's (all False unless ``scored``), and its text."""
    rendered = render(dialogue, tokenizer)
    if not scored:
        ids = list(tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
        return ids, [False] * len(ids), rendered.text
    if rendered.spoken is None or not tokenizer.is_fast:
        raise CompressError(
            "where the assistant speaks cannot be told: "
            + ("the chat template changes what it says" if tokenizer.is_fast else "the tokenizer tells no places"),
            where=dialogue.place,
            fix="calibrate on the dialogues, and evaluate on text: {files: [text/*.txt]}",
        )
    made = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    places = made["offset_mapping"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(endings(tokenizer))
    said, at = [False] * len(places), 0
    for start, end in rendered.spoken:
        while at < len(places) and places[at][1] <= start:
            at += 1
        while at < len(places) and places[at][0] < end:
            said[at] = True
            at += 1
        behind = at
        while behind < len(places) and rendered.text[slice(*places[behind])].isspace():
            behind += 1
        if behind < len(places) and made["input_ids"][behind] in special:
            said[behind] = True  # what tells that the turn is over
    return list(made["input_ids"]), said, rendered.text


def _body(begin: Sequence[int], length: int, title: str) -> int:
    """The tokens of a window that are text."""
    if length - len(begin) < 1:
        raise CompressError(
            f"a window of {length} tokens has no place for text behind the {len(begin)} that the tokenizer begins with",
            where=f"source {title}",
            fix="ask for longer windows",
        )
    return length - len(begin)


def _evenly(available: int, windows: int, length: int, where: str, what: str) -> list[int]:
    """``windows`` numbers of the windows that there are, evenly spaced."""
    import torch

    if available < windows:
        raise CompressError(
            f"the {what} {'give' if what.endswith('s') else 'gives'} {available} windows of {length} tokens,"
            f" {windows} are asked for",
            where=where,
            fix=f"ask for fewer or shorter windows, or name more {what}",
        )
    found: list[int] = torch.linspace(0, available - 1, windows).long().tolist()
    return found


def _refuse_alike(windows: Tensor, title: str) -> None:
    """Raises CompressError where nothing can be measured on the text of ``windows``."""
    alike = "of one token" if bool((windows == windows[0, 0]).all()) else "all alike"
    if alike == "of one token" or (len(windows) > 1 and bool((windows == windows[0]).all())):
        raise CompressError(
            f"the windows of the text are {alike}: nothing can be measured on them",
            where=f"source {title}",
            fix="name a text that people wrote",
        )


def packing_inputs(tokenizer: Any, dialogues: Iterable[SourceSpec]) -> dict[str, Any]:
    """What decides windows beside the text itself, where it is more than the tokenizer's end between documents.

    Args:
        dialogues: the sources of dialogues: their files' content counts, and so does the template.
    """
    begin, found = opening(tokenizer), list(dialogues)
    facts: dict[str, Any] = {"begins_with": begin, "between": between(tokenizer)} if begin else {}
    if found:
        paths = [path for source in found for path in matching(source.dialogues or (), "the dialogues")]
        facts["dialogues"] = [sha256_of(Path(path)) for path in paths]
        facts["chat_template"] = template_facts(tokenizer)
    return facts


def keep_windows(tensors: Mapping[str, Tensor], begin: Sequence[int], path: Path) -> None:
    """Writes token windows, each (n, length) int64, and the ids that all of them begin with."""
    from safetensors.torch import save_file

    metadata = {"begins_with": json.dumps(list(begin))} if begin else None
    save_file({name: ids.contiguous() for name, ids in tensors.items()}, path, metadata=metadata)


def kept_windows(path: Path) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """What `keep_windows` wrote: the windows, and the ids that they begin with."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        begin = json.loads((file.metadata() or {}).get("begins_with", "[]"))
        return {name: file.get_tensor(name) for name in file.keys()}, tuple(begin)  # noqa: SIM118  (it is no dict)


def calibration_windows(
    sources: Sequence[SourceSpec],
    tokenizer: Any,
    windows: int,
    length: int,
) -> Tensor:
    """``windows`` calibration windows (windows, length) int64, evenly from all sources, the sources taking turns."""
    import torch

    parts = []
    weight = sum(source.weight for source in sources)
    taken, before = 0, 0.0
    for source in sources:
        before += source.weight
        share = round(windows * before / weight) - taken
        taken += share
        if share:
            parts.append(_packed(source, "calibration", tokenizer, share, length).ids)
    if not parts:
        raise CompressError("no calibration window was asked for", where="calibration.windows", fix="ask for more")
    turns = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    return torch.stack(turns)


def evaluation_windows(source: SourceSpec, tokenizer: Any, windows: int, length: int) -> Packed:
    """``windows`` held-out windows of one source, each ``length`` tokens; of dialogues, the assistant's are scored."""
    return _packed(source, "evaluation", tokenizer, windows, length)


def _packed(source: SourceSpec, split: Split, tokenizer: Any, windows: int, length: int) -> Packed:
    if source.dialogues is None:
        return pack(load_documents(source, split), tokenizer, length, windows, source.title)
    found = load_dialogues(source, split)
    return pack_dialogues(found, tokenizer, length, windows, source.title, scored=split == "evaluation")


def held_out_tensors(
    texts: Sequence[NamedText], tokenizer: Any, windows: int, length: int, calibration: Tensor | None = None
) -> dict[str, Tensor]:
    """The held-out windows of all texts under the names they are kept by (`held_out_of` reads them): ``evaluation.0``
    and, where not all tokens are scored, ``scored.0``.

    Raises:
        CompressError: as `evaluation_windows`; a text overlaps the ``calibration`` windows.
    """
    tensors = {}
    for i, text in enumerate(texts):
        packed = evaluation_windows(text.source, tokenizer, windows, length)
        if calibration is not None:
            # What a chat template writes around every turn is no overlap.
            said = packed.scored if text.source.dialogues is not None else None
            assert_disjoint(calibration, packed.ids, text.name, said)
        tensors[f"evaluation.{i}"] = packed.ids
        if packed.scored is not None:
            tensors[f"scored.{i}"] = packed.scored
    return tensors


def held_out_of(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Packed]:
    """The held-out windows of every text, by its name."""
    return {name: Packed(tensors[f"evaluation.{i}"], tensors.get(f"scored.{i}")) for i, name in enumerate(names)}


def assert_disjoint(calibration: Tensor, evaluation: Tensor, title: str, scored: Tensor | None = None) -> None:
    """Raises CompressError where a run of 64 tokens stands in both (a text named twice, or quoted in the other).

    Args:
        scored: of the evaluation's tokens, those that may not be in both; all by default.
    """

    def runs(windows: Tensor, counted: Tensor | None = None) -> Iterator[int]:
        for k, row in enumerate(windows.numpy()):
            for i in range(len(row) - OVERLAP + 1):
                if counted is None or counted[k, i : i + OVERLAP].all():
                    yield hash(row[i : i + OVERLAP].tobytes())

    seen = set(runs(calibration))
    if any(run in seen for run in runs(evaluation, scored)):
        raise CompressError(
            f"the evaluation text overlaps the calibration text ({OVERLAP} equal tokens in a row)",
            where=f"evaluation text {title!r}",
            fix="evaluate on text that is not among the calibration sources",
        )


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
