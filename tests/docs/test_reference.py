"""docs/reference: the pages that are written from schemas and docstrings are what would be written now."""

from __future__ import annotations

import inspect
from typing import Literal

import pytest
from pydantic import BaseModel, Field

import compress
from compress.pipeline import METHODS
from tools import reference


@pytest.mark.parametrize("name", reference.pages())
def test_a_page_is_what_the_generator_writes(name: str) -> None:
    assert (reference.FOLDER / name).read_text() == reference.pages()[name], (
        "run: PYTHONPATH=. python tools/reference.py"
    )


def test_every_key_of_every_recipe_and_every_verb_stands_in_a_page() -> None:
    keys, api = reference.pages()["recipe-keys.md"], reference.pages()["api.md"]

    def every(model: type[BaseModel]) -> set[str]:
        inner = {m for f in model.model_fields.values() for m, _ in reference._models(f.annotation)}
        return {n for n in model.model_fields if n != "options"}.union(*map(every, inner))

    for tasks in METHODS.values():
        for task in tasks.values():
            missing = [n for n in every(task.recipe) | every(task.options) if f"| `{n}` |" not in keys]
            assert not missing
    for name in compress.__all__:
        assert f"## {name}\n" in api
        parameters = inspect.signature(getattr(compress, name)).parameters if name == "prune" else {}
        assert all(f"    {p}" in api or f"    **{p}" in api for p in parameters)


class Inner(BaseModel):
    """What is inside."""

    share: float | None = Field(None, gt=0, lt=1, description="of all | of some")


class Outer(BaseModel):
    kind: Literal["a", "b"] = "a"
    inner: list[Inner] = Field(min_length=1)
    named: dict[str, Inner] | None = None
    count: int | float = Field(2, ge=1)


def test_types_limits_and_defaults_are_told_in_words() -> None:
    text = "\n".join(reference._file("Outer", Outer, "Said."))
    assert '| `kind` | `a` or `b` | `"a"` |  |' in text
    assert "| `inner` | list of: [keys](#outer-inner), not empty | must be given |  |" in text
    assert "| `named` | map from text to [keys](#outer-inner) or `null` | `null` |  |" in text
    assert "| `count` | number, at least 1 | `2` |  |" in text
    assert "### Outer: `inner`\n\nWhat is inside.\n" in text
    assert "| `share` | number or `null`, above 0, below 1 | `null` | of all \\| of some |" in text


def test_a_docstring_becomes_prose_and_lists() -> None:
    def function() -> None:
        """Does ``it``.

        Args:
            one: the first,
                on two lines.
            two, three: the others.

        And this at the end.

        Raises:
            ValueError: never.
        """

    assert reference._docstring(function) == (
        "Does `it`.\n\n**Args**\n\n- `one`: the first, on two lines.\n- `two`, `three`: the others.\n\n"
        "And this at the end.\n\n**Raises**\n\n- `ValueError`: never.\n"
    )
