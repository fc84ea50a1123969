"""Lists the functions that are longer than they should be: over 60 lines by default.

    python tools/long_functions.py [LINES]

A line each, the longest first: its lines, its parameters, where it is.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("compress", "recipes", "export", "models")


def functions() -> Iterator[tuple[int, int, str]]:
    """(lines, parameters, place) of every function in the rooms; what is reached by a link counts where it lies."""
    for path in sorted({p.resolve() for room in ROOMS for p in (ROOT / room).rglob("*.py")}):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                given = node.args
                parameters = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
                yield (
                    node.end_lineno - node.lineno + 1,
                    parameters,
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}",
                )


def main() -> None:
    most = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    for lines, parameters, place in sorted(functions(), reverse=True):
        if lines > most:
            print(f"{lines:4} lines {parameters:3} parameters  {place}")


if __name__ == "__main__":
    main()
