"""The commands of README and guides, run in the order in which they stand.

Where a page speaks of the demo's run, which takes minutes and needs a model from elsewhere, the run of a tiny language
model stands in its place.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command import compress
from tests.docs.pages import ROOT, Block, blocks

QUICK = [b for b in blocks("sh") if not b.mark]
# Of a page with a block that takes minutes all that is not excused, in order: later blocks use what earlier ones made.
PAGES = sorted({b.page for b in blocks("sh") if b.mark == "slow"})


def run(block: Block) -> None:
    for words in block.commands():
        ran = compress(*words)
        assert ran.code == 0, f"{block}: compress {' '.join(words)}\n{ran.err}"
        assert ran.out.strip()


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder we are in: as the reader of a guide has it, with the demo's run."""
    shutil.copytree(finished, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", [b for b in QUICK if any(b.commands())], ids=str)
def test_commands_do_what_the_page_says(block: Block, place: Path) -> None:
    run(block)


def test_there_are_commands_that_are_run() -> None:
    assert sum(len(list(b.commands())) for b in QUICK) >= 8
    assert {b.page for b in QUICK} >= {ROOT / "README.md", ROOT / "docs" / "guide" / "publish-and-verify.md"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_of_commands_that_take_minutes_goes_through(page: Path, place: Path) -> None:
    for block in blocks("sh"):
        if block.page == page and block.mark in ("", "slow"):
            run(block)
