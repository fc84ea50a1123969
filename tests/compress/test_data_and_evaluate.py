"""Text: split once, packed into full windows, never shared; perplexity against transformers' own loss."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data import (
    assert_disjoint,
    calibration_windows,
    load_documents,
    pack,
)
from compress.errors import CompressError
from compress.evaluate import perplexity
from compress.recipe import SourceSpec
from tests.tiny import tiny, tokens, word_tokenizer

DOCS = SourceSpec(embedded="python-docs")


def test_the_split_is_by_document_and_disjoint() -> None:
    from pydoc_data.topics import topics

    calibration, evaluation = load_documents(DOCS, "calibration"), load_documents(DOCS, "evaluation")
    assert len(calibration) + len(evaluation) == len([t for t in topics.values() if t.strip()])
    assert not set(calibration) & set(evaluation) and len(evaluation) == pytest.approx(len(topics) / 10, abs=1)


def test_windows_are_full_and_hold_the_text_with_its_ends(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    packed = pack(["the cat", "the mat"], tokenizer, 3, 2, "x")
    ids = [*tokenizer("the cat")["input_ids"], 2, *tokenizer("the mat")["input_ids"], 2]
    assert packed.shape == (2, 3) and packed[0].tolist() == ids[:3]
    with pytest.raises(CompressError, match="gives 2 windows of 3 tokens, 99 are asked"):
        pack(["the cat", "the mat"], tokenizer, 3, 99, "x")


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


def test_a_model_of_nan_is_named() -> None:
    model = tiny("llama")
    model.model.norm.weight[0] = float("nan")
    with pytest.raises(CompressError, match="not finite"):
        perplexity(model, tokens(2, 16))


def test_a_file_whose_name_holds_what_is_special_in_a_pattern_is_read(tmp_path: Path) -> None:
    from compress.data import read_files

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
