"""Text: split once, packed into full windows, never shared; perplexity against transformers' own loss."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data.documents import Pieces, load_documents
from compress.data.special import around, begun, between, endings, opening, text_facts
from compress.data.text import assert_disjoint, calibration_windows, keep_windows, kept_windows, pack
from compress.errors import CompressError
from compress.language.evaluate import harness_tasks, perplexity
from compress.models.reading import load_tokenizer
from compress.schema.recipe import SourceSpec
from tests.tiny import let_it_add, saved_tiny, tiny, tokens, word_tokenizer

DOCS = SourceSpec(embedded="python-docs")


def test_the_split_is_by_document_and_disjoint() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = load_documents(DOCS, "calibration"), load_documents(DOCS, "evaluation")
    assert len(calibration) + len(evaluation) == len([t for t in topics.values() if t.strip()])
    assert not set(calibration) & set(evaluation) and len(evaluation) == pytest.approx(len(topics) / 10, abs=1)


def test_windows_are_full_and_hold_the_text_with_its_ends(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    found = pack(["the cat", "the mat"], tokenizer, 3, 2, "x")
    packed, ids = found.ids, [*tokenizer("the cat")["input_ids"], 2, *tokenizer("the mat")["input_ids"], 2]
    assert packed.shape == (2, 3) and packed[0].tolist() == ids[:3] and found.scored is None
    with pytest.raises(CompressError, match="gives 2 windows of 3 tokens, 99 are asked"):
        pack(["the cat", "the mat"], tokenizer, 3, 99, "x")


# A tokenizer's template (none: as most are made, with a begin-of-text token that is never added), and what it adds.
ADDED = [
    (None, [], []),
    ("<s> $A", [1], []),
    ("$A </s>", [], [2]),
    ("<s> $A </s>", [1], [2]),
    ("<pad> <s> $A", [0, 1], []),
    ("</s> $A", [2], []),
]


def tokenizer_that_adds(folder: Path, template: str | None) -> Any:
    made = word_tokenizer(folder)
    return let_it_add(folder, template) if template else made


@pytest.mark.parametrize(("template", "before", "behind"), ADDED)
def test_the_tokenizer_is_asked_what_it_adds(
    template: str | None, before: list[int], behind: list[int], tmp_path: Path
) -> None:
    tokenizer = tokenizer_that_adds(tmp_path, template)
    assert tokenizer.bos_token_id == 1  # whatever it adds
    assert around(tokenizer) == (before, behind)
    plain = word_tokenizer(tmp_path / "plain")
    # A text that is to be gone on with is never ended.
    assert begun(tokenizer, "the cat") == [*before, *plain("the cat")["input_ids"]]


@pytest.mark.parametrize(("template", "before", "behind"), ADDED)
def test_every_window_begins_as_the_tokenizer_begins_and_no_text_is_lost(
    template: str | None, before: list[int], behind: list[int], tmp_path: Path
) -> None:
    tokenizer, plain = tokenizer_that_adds(tmp_path, template), word_tokenizer(tmp_path / "plain")
    documents = ["the cat sat on the mat and the dog did not", "an apple a day keeps the cat away", "the mat"]
    put = [] if before == [2] else before  # what stands in front of a document behind the end of another
    whole = [i for text in documents for i in (*put, *plain(text)["input_ids"], 2)][len(put) :]
    length = 8
    rows, rest = [], whole
    while len(rest) >= length - len(before):
        rows.append([*before, *rest[: length - len(before)]])
        rest = rest[length - len(before) :]
        while put and rest and rest[0] in put:  # the next window begins so by itself
            rest = rest[1:]
    packed = pack(documents, tokenizer, length, len(rows), "x")
    assert packed.ids.tolist() == rows
    assert all(plain.decode(i) in "".join(documents) for row in rows for i in row if i > 2)
    scored = [[k >= len(before) and (i not in put) for k, i in enumerate(row)] for row in rows]
    assert packed.scored is None or packed.scored.tolist() == scored
    assert (packed.scored is None) == (not put or sum(i in put for row in rows for i in row) == len(put) * len(rows))


@pytest.mark.parametrize(
    ("template", "join"), [(None, [2]), ("<s> $A", [2, 1]), ("<s> $A <pad>", [0, 1]), ("</s> $A", [2])]
)
def test_between_documents_stands_the_end_of_one_and_the_beginning_of_the_next(
    template: str | None, join: list[int], tmp_path: Path
) -> None:
    tokenizer, plain = tokenizer_that_adds(tmp_path, template), word_tokenizer(tmp_path / "plain")
    documents = ["the cat", "the mat", "the dog"]
    text = [i for words in documents for i in (*join, *plain(words)["input_ids"])][len(join) :]
    first = opening(tokenizer)
    length = len(first) + len(text)
    found = pack(documents, tokenizer, length, 1, "x")
    assert found.ids.tolist() == [[*first, *text]] and list(between(tokenizer)) == join
    facts = text_facts(tokenizer)["between"]
    assert [row["id"] for row in facts] == join and facts[0]["token"] in ("</s>", "<pad>")
    # Pieces of one text: it ends, as it did, and no text begins.
    ended = [i for words in documents for i in (*plain(words)["input_ids"], join[0])]
    pieces = pack(Pieces(documents), tokenizer, len(first) + len(ended), 1, "x")
    assert pieces.ids.tolist() == [[*first, *ended]] and pieces.scored is None


def test_a_text_that_one_file_holds_is_one_text(tmp_path: Path) -> None:
    # The protocol of published figures: all of it in one, whatever headings it has.
    tokenizer = tokenizer_that_adds(tmp_path, "<s> $A")
    text = "= Cats =\n\nthe cat sat on the mat\n\n= Dogs =\n\nthe dog did not\n\n"
    ids = word_tokenizer(tmp_path / "plain")(text)["input_ids"]
    found = pack([text], tokenizer, 11, len(ids) // 10, "x")
    assert [i for row in found.ids.tolist() for i in row[1:]] == ids[: 10 * (len(ids) // 10)] and found.scored is None


ENDS: list[tuple[dict[str, Any], dict[str, Any] | None, tuple[int, ...], str]] = [
    ({"eos_token_id": 2}, None, (2,), ""),
    ({"eos_token_id": 2}, {"eos_token_id": [0, 2, 0]}, (0, 2), ""),
    ({"eos_token_id": [2, 7]}, {}, (2, 7), ""),
    ({}, {"eos_token_id": None}, (), ""),
    ({"text_config": {"eos_token_id": [2, 9], "vocab_size": 300}}, None, (2, 9), ""),
    (
        {"eos_token_id": 5},
        {"eos_token_id": 6},
        (6, 5),
        "end with the tokenizer's </s> (2); the model's settings say 6, 5",
    ),
    ({"eos_token_id": [2, 4000]}, {"eos_token_id": -1}, (2,), "eos_token_id 4000 is left out, the vocabulary has 300"),
]


@pytest.mark.parametrize(("config", "generation", "ends", "said"), ENDS)
def test_every_token_that_ends_a_text_is_read_and_the_tokenizers_ends_documents(
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    ends: tuple[int, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = with_settings(tmp_path, config, generation)
    err = capsys.readouterr().err
    assert tokenizer.end_ids == ends and between(tokenizer) == (2,)
    assert set(endings(tokenizer)) == {2, *ends} and endings(tokenizer)[0] == 2
    assert said in err if said else not err


def test_where_the_tokenizer_names_no_end_the_models_own_ends_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    word_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    tokenizer = with_settings(tmp_path, {}, {"eos_token_id": [0, 2]}, made=True)
    assert tokenizer.eos_token_id is None and between(tokenizer) == (0,)
    assert "the tokenizer names no end token; documents end with <pad> (0)" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["</s>", True, [2, "3"], 2.0, {"id": 2}])
def test_an_end_that_is_no_token_is_one_error(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="eos_token_id is") as caught:
        with_settings(tmp_path, {}, {"eos_token_id": wrong})
    assert caught.value.where == str(tmp_path / "generation_config.json")


def with_settings(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None, made: bool = False) -> Any:
    """The tokenizer of a folder whose two other files say this of ends."""
    if not made:
        word_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_tokenizer(folder)


def test_a_window_that_the_first_tokens_fill_is_one_error(tmp_path: Path) -> None:
    tokenizer = tokenizer_that_adds(tmp_path, "<pad> <s> $A")
    with pytest.raises(CompressError, match="no place for text behind the 2"):
        pack(["the cat sat on the mat"], tokenizer, 2, 1, "x")


def test_a_tokenizer_whose_text_is_not_in_what_it_makes_is_named() -> None:
    def strange(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [7, 8, 9] if not add_special_tokens else [1, 8, 7, 9]}

    with pytest.raises(CompressError, match="without its special tokens"):
        around(strange)


def test_kept_windows_come_back_with_what_they_begin_with(tmp_path: Path) -> None:
    for begin in ((), (1,), (0, 1)):
        windows = {"calibration": tokens(3, 9), "evaluation.0": tokens(2, 9, seed=4)}
        keep_windows(windows, begin, tmp_path / "windows.safetensors")
        found, said = kept_windows(tmp_path / "windows.safetensors")
        assert said == begin and found.keys() == windows.keys()
        assert all(torch.equal(found[name], ids) for name, ids in windows.items())


def test_an_empty_text_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(CompressError, match="empty"):
        load_documents(SourceSpec(files=[str(tmp_path / "empty.txt")]), "calibration")
    with pytest.raises(CompressError, match="no file matches"):
        load_documents(SourceSpec(files=[str(tmp_path / "*.md")]), "calibration")


def test_sources_share_the_windows_by_weight(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    text = "\n\n".join(f"the cat number {i} sat on the mat and did not say why. " * 30 for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    sources = [DOCS, SourceSpec(files=[str(tmp_path / "a.txt")], weight=2)]
    found = calibration_windows(sources, tokenizer, 9, 32)
    docs = calibration_windows([DOCS], tokenizer, 3, 32)
    rows = {tuple(r.tolist()) for r in docs}
    assert found.shape == (9, 32) and sum(tuple(r.tolist()) in rows for r in found) == 3


def test_overlapping_text_is_refused() -> None:
    a, b = tokens(4, 200, seed=1), tokens(4, 200, seed=2)
    assert_disjoint(a, b, "b")
    b[2, 30:94] = a[1, 100:164]
    with pytest.raises(CompressError, match="overlaps"):
        assert_disjoint(a, b, "b")


def test_perplexity_equals_the_loss_of_transformers() -> None:
    model: Any = tiny("llama").double()
    ids = tokens(5, 30)
    with torch.no_grad():
        losses = [float(model(row[None], labels=row[None]).loss) for row in ids]
    found = perplexity(model, ids)
    assert found["nll"] == pytest.approx(sum(losses) / 5, rel=1e-6) and found["tokens"] == 5 * 29


@pytest.mark.parametrize("begin", [0, 1, 2, 3])
def test_what_the_tokenizer_puts_in_front_is_read_and_not_scored(begin: int) -> None:
    model: Any = tiny("gemma3_text").double()
    ids = tokens(3, 20)
    ids[:, :begin] = torch.tensor([1, 0, 2])[:begin]
    labels = ids.clone()
    labels[:, :begin] = -100  # what transformers' own loss leaves out
    with torch.no_grad():
        losses = [float(model(row[None], labels=own[None]).loss) for row, own in zip(ids, labels, strict=True)]
    found = perplexity(model, ids, begin=begin)
    assert found["nll"] == pytest.approx(sum(losses) / 3, rel=1e-6) and found["tokens"] == 3 * (20 - max(1, begin))


@pytest.mark.parametrize(("template", "before", "behind"), ADDED)
def test_the_harness_puts_in_front_what_the_tokenizer_does(
    template: str | None, before: list[int], behind: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def simple_evaluate(**words: Any) -> dict[str, Any]:
        given.update(words["model_args"])
        return {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}}}

    manager = types.SimpleNamespace(TaskManager=lambda: types.SimpleNamespace(all_tasks=["arc_easy"]))
    monkeypatch.setitem(sys.modules, "lm_eval", types.SimpleNamespace(tasks=manager, simple_evaluate=simple_evaluate))
    folder = saved_tiny(tmp_path / "model")
    if template:
        let_it_add(folder, template)
    if before and behind:
        # Its switch adds both, and behind a question that is ended there is no answer.
        with pytest.raises(CompressError, match="in front of a text and behind it"):
            harness_tasks(folder, ["arc_easy"])
        return
    assert harness_tasks(folder, ["arc_easy"])[0]["value"] == 0.5
    assert given["add_bos_token"] is bool(before)


def test_tokens_that_are_not_ones_own_are_not_scored() -> None:
    model: Any = tiny("llama").double()
    ids = tokens(3, 20)
    own = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    own[1] = False  # a window of which nothing counts
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)
    want = [-float(logp[r, t - 1, ids[r, t]]) for r in range(3) for t in range(2, 20) if own[r, t]]
    found = perplexity(model, ids, begin=2, own=own)
    assert found["nll"] == pytest.approx(sum(want) / len(want), rel=1e-6) and found["tokens"] == len(want)
    other = tokens(3, 200, seed=9)
    a = other[0, :200].clone()
    counted = torch.ones(3, 200, dtype=torch.bool)
    with pytest.raises(CompressError, match="overlaps"):
        assert_disjoint(a[None], other, "x", counted)
    counted[0, 40::64] = False  # no run of 64 of it is all ones own
    assert_disjoint(a[None], other, "x", counted)


def test_a_model_of_nan_is_named() -> None:
    model = tiny("llama")
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(CompressError, match="not finite"):
        perplexity(model, tokens(2, 16))


def test_a_file_whose_name_holds_what_is_special_in_a_pattern_is_read(tmp_path: Path) -> None:
    from compress.data.documents import read_files

    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text(name)
    assert read_files([str(tmp_path / "a[1].txt")]) == ["a[1].txt"]
    assert read_files([str(tmp_path / "a[0-9].txt")]) == ["a1.txt"]


# --- text of packages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "least"), [("anarchist-faq", 5_000_000), ("fortunes", 500_000)])
def test_a_debian_archives_text_is_prose_in_a_fixed_order(name: str, least: int) -> None:
    source = SourceSpec(package=name)
    calibration, evaluation = load_documents(source, "calibration"), load_documents(source, "evaluation")
    whole = "\n".join([*calibration, *evaluation])
    assert len(calibration) > 8 * len(evaluation) > 0 and len(whole) > least
    assert not re.search(r"</?(p|div|a|br)\b|\x00", whole)  # no markup
    assert whole.count("\n%\n") < 5  # nor separators, but for those of a few empty sayings
    letters = sum(c.isalpha() or c.isspace() for c in whole)
    assert letters > 0.9 * len(whole)
    assert load_documents(source, "calibration") == calibration
