"""README and docs: their size, links that lead somewhere, commands and recipes that are what the program takes."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from compress.cli import app
from compress.errors import CompressError
from compress.schema.recipe import load_recipe, recipe_names
from tests.docs.pages import PAGES, ROOT, Block, anchors, blocks, links, read

README = ROOT / "README.md"
PEOPLES_OWN = ("mine.yaml", "my-pi.yaml")  # recipes and targets that a page tells its reader to write


def test_the_readme_is_one_screen_and_a_bit() -> None:
    text = README.read_bytes()
    assert len(text) <= 15 * 1024 and text.count(b"\n") <= 200
    first = text.decode().splitlines()[:24]
    assert any("compress prune" in line for line in first) and any(line.startswith("ppl ") for line in first)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), f"{page.name}: {link}"
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_relative_to(ROOT) and target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}; there is {sorted(anchors(target))}"


def test_every_page_of_the_docs_can_be_reached_from_the_readme_and_the_site() -> None:
    seen, todo = set[Path](), [README]
    while todo:
        page = todo.pop()
        seen.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target not in seen and target.is_file():
                todo.append(target)
    # The site's own first page says for it what README says on GitHub.
    assert {p for p in PAGES if p not in seen} <= {ROOT / "docs" / "index.md"}
    held = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def listed(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in listed(part)]

    docs = {str(p.relative_to(ROOT / "docs")) for p in PAGES if p.is_relative_to(ROOT / "docs")}
    assert set(listed(held["nav"])) == docs


def test_figures_have_a_date_and_a_commit() -> None:
    for page in (ROOT / "docs" / "measured").glob("*.md"):
        if page.name != "index.md":
            sections = re.split(r"^## ", read(page)[0], flags=re.M)
            bare = [s.splitlines()[0] for s in sections[1:] if not re.search(DATED, s)]
            assert not bare or re.search(DATED, sections[0]), f"{page.name}: {bare}"


DATED = r"Figures of 20\d\d-\d\d-\d\d.*`[0-9a-f]{7,}`"


def parsed(words: list[str]) -> Any:
    """The command line's own reading of the words, without doing anything."""
    group: Any = typer.main.get_command(app)
    with group.make_context("compress", words[:1], resilient_parsing=True) as context:
        verb = group.get_command(context, words[0])
        assert verb is not None, f"there is no verb {words[0]!r}"
        return verb.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_every_command_is_one_that_the_program_takes(block: Block) -> None:
    from compress.pipeline import METHODS

    assert "compress" in block.text or block.text.lstrip().startswith(("make ", ".venv/", "accelerate", "sbatch"))
    for words in block.commands():
        given = parsed(words).params
        recipe = given.get("recipe")
        if recipe is not None and recipe not in PEOPLES_OWN:
            assert recipe in recipe_names(), f"{block}: {recipe}"
            load_recipe(recipe, METHODS, given.get("set_") or [])


def test_a_command_that_the_program_does_not_take_is_found_out() -> None:
    for wrong in (["prun", "x"], ["prune", "x", "--recipes", "tyr"], ["gate", "a", "b", "--budgets", "x"]):
        with pytest.raises((AssertionError, Exception), match=r"no verb|No such option"):
            parsed(wrong)


def whole(text: str) -> str:
    """A recipe of which a page shows a part, as a file that holds it."""
    held = yaml.safe_load(text)
    return text if "extends" in held else f"extends: tyr\n{text}"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_every_recipe_target_and_gate_file_that_is_shown_is_read(block: Block, tmp_path: Path) -> None:
    from compress.exporters.target import load_target
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_section
    from compress.verbs.gate import GateFile

    (tmp_path / "text").mkdir()
    path = tmp_path / "shown.yaml"
    if "baseline:" in block.text:
        path.write_text(block.text)
        load_section(path, GateFile, "gate file")
    elif "transport:" in block.text:
        path.write_text(block.text)
        assert load_target(str(path))
    else:
        path.write_text(whole(block.text))
        load_recipe(str(path), METHODS)
        path.write_text(whole(block.text) + "\nunheard_of: 1\n")
        with pytest.raises(CompressError, match="unheard_of"):
            load_recipe(str(path), METHODS)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_every_snippet_is_python(block: Block) -> None:
    ast.parse(block.text)


def test_what_is_not_run_says_why() -> None:
    for block in (*blocks("sh"), *blocks("python")):
        assert block.mark in ("", "slow") or len(block.mark) > 10, str(block)
