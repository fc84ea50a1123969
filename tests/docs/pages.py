"""The project's Markdown: its pages, their headings and links, and their code blocks with what is said of running them.

A comment in front of a block says what a test may do with it: `<!-- slow -->` is run by `make slow`,
`<!-- not run: REASON -->` by nobody. Any other is run by `make test`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md")
METHODS = sorted((ROOT / "recipes").glob("*/README.md"))
PAGES = sorted([*FIRST, *METHODS, *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^(`{3,})(\w*)\s*$")
MARK = re.compile(r"^<!-- (slow|not run: (.+)) -->$")


@dataclass(frozen=True)
class Block:
    """A code block: where it begins, its language, its text, and the mark in front of it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str  # "", "slow" or the reason why it is not run

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> Iterator[list[str]]:
        """The words of every `compress` command in a shell block."""
        for line in self.text.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s&&\s", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["compress"]:
                    yield words[1:]


def read(page: Path) -> tuple[str, list[Block]]:
    """A page's text without its code blocks, and the blocks."""
    prose, blocks = [], list[Block]()
    fence, start, language, held, mark = "", 0, "", list[str](), ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        match = FENCE.match(line.strip())
        if fence:
            if line.strip() == fence:
                blocks.append(Block(page, start, language, "\n".join(held), mark))
                fence, held, mark = "", [], ""
            else:
                held.append(line)
        elif match:
            fence, language, start = match[1], match[2], number
        else:
            marked = MARK.match(line.strip())
            mark = (marked[2] or marked[1]) if marked else mark if not line.strip() else ""
            prose.append(line)
    assert not fence, f"{page}: a code block is not closed"
    return "\n".join(prose), blocks


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in read(page)[1] if block.language == language]


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by, as GitHub and mkdocs make them."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.+)$", read(page)[0], re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def links(page: Path) -> list[str]:
    """Where a page's links and images lead."""
    prose = re.sub(r"`[^`\n]*`", "", read(page)[0])
    return re.findall(r"\]\(([^)\s]+)\)", prose)
