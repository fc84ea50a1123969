"""How the house is laid out: a room imports only rooms listed below it; a method never imports another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield from _named(node)


def _named(node: ast.ImportFrom | ast.Import) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names if name.name.split(".")[0] == "compress")
    elif (node.module or "").split(".")[0] == "compress":
        for name in node.names:
            inner = f"{node.module}.{name.name}"
            yield inner if inner in MODULES else str(node.module)


def needed(path: Path) -> set[str]:
    """All of this project that must be there before the file's own code runs: what it imports at its top."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text("utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo.extend(node.orelse)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found.update(_named(node))
        else:
            todo.extend(ast.iter_child_nodes(node))
    return found


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


def test_the_drawing_of_imports_has_no_circle() -> None:
    TopologicalSorter({module: needed(path) - {module} for module, path in MODULES.items()}).prepare()


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


def test_where_a_decoder_keeps_its_parts_is_said_in_one_place() -> None:
    """Of what the families' own files need beside it, everything else asks `compress.models.decoder`."""
    told = re.compile(r"\.model\.(layers|norm|embed_tokens)\b|\.lm_head\b|[\"'](model\.layers|model\.norm|lm_head)\.")
    inside = ("compress.models.families", "compress.models.decoder")
    wrong = [m for m, path in MODULES.items() if not m.startswith(inside) and told.search(path.read_text("utf-8"))]
    assert not wrong


def test_text_is_utf_8_on_every_system() -> None:
    """Where no encoding is named, Windows has one of its own."""

    def unnamed(call: ast.Call) -> bool:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        keys = {k.arg for k in call.keywords}
        if name in ("read_text", "write_text"):
            return "encoding" not in keys and len(call.args) == (name == "write_text")
        if name in ("run", "Popen", "check_output"):
            return bool(keys & {"text", "universal_newlines"}) and "encoding" not in keys
        if name == "open" and isinstance(call.func, ast.Name):
            return "encoding" not in keys and not any("b" in ast.unparse(mode) for mode in call.args[1:2])
        return False

    wrong = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and unnamed(node)
    ]
    assert not wrong
