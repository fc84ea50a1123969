"""How the house is laid out: a room imports only rooms listed below it; a method never imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down.
ROOMS = (
    "cli", "api", "verbs", "claims", "pipeline", "recipes", "networks", "language", "exporters", "models", "report",
    "data", "run", "schema", "processes", "system", "distribution", "errors", "words",
)  # fmt: skip
# Where published cards look.
KEPT = {"compress.reload_network"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (
        ("compress", "compress"),
        ("recipes", "compress.recipes"),
        ("models", "compress.models"),
        ("export", "compress.exporters"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "compress" and inner[0] in ("recipes", "models", "exporters"):
                continue  # links
            found[".".join((package, *inner)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """All of this project that a file imports: at its top, in functions, for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "compress":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "compress")


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and module not in KEPT else None


def test_every_module_is_in_a_room() -> None:
    strangers = {m for m in MODULES if room(m) not in (*ROOMS, None, "__main__")}
    assert not strangers


@pytest.mark.parametrize("upper", ROOMS)
def test_a_room_imports_only_rooms_below_it(upper: str) -> None:
    below = ROOMS[ROOMS.index(upper) :]
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if room(module) == upper
        for other in imported(path)
        if room(other) is not None and room(other) not in below
    ]
    assert not wrong


def test_a_method_imports_no_other_method() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        if room(module) == "recipes" and module.count(".") > 2
        for other in imported(path)
        if room(other) == "recipes" and other.split(".")[2] != module.split(".")[2]
    ]
    assert not wrong


def test_few_files_lie_outside_a_room() -> None:
    assert len(list((ROOT / "compress").glob("*.py"))) <= 8
