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
from typing import TYPE_CHECKING, Any

from compress.data.dialogues import Dialogue, render, template_facts
from compress.data.documents import Pieces, Split, load_dialogues, load_documents
from compress.data.special import between, check_ids, closing, endings, opening
from compress.errors import CompressError
from compress.run.cache import sha256_of
from compress.schema.recipe import NamedText, SourceSpec
from compress.system.files import matching

if TYPE_CHECKING:
    from torch import Tensor

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
