"""Text: split once, packed into full windows, never shared; perplexity against transformers' own loss."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data.text import (
    around,
    assert_disjoint,
    begun,
    calibration_windows,
    keep_windows,
    kept_windows,
    load_documents,
    pack,
)
from compress.errors import CompressError
from compress.language.evaluate import harness_tasks, perplexity
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


def test_a_model_of_nan_is_named() -> None:
    model = tiny("llama")
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(CompressError, match="not finite"):
        perplexity(model, tokens(2, 16))


def test_a_file_whose_name_holds_what_is_special_in_a_pattern_is_read(tmp_path: Path) -> None:
    from compress.data.text import read_files

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
