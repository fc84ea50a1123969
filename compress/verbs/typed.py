"""What several verbs take on the command line, and how what they found is printed. Nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from compress.words.escape import json_text, terminal

MOST = 10**7  # tokens, samples or windows of one call


def finite(value: float) -> float:
    """A bound alone lets what is no number pass, and a year of waiting is no timeout."""
    if not value <= 31_536_000:
        raise typer.BadParameter(f"{value} is not in the range 1<=x<=31536000 (a year).")
    return value


def overridden(given: list[str] | None, sparsity: float | None, budgets: list[str] | None) -> list[str]:
    said = [f"sparsity={sparsity}"] if sparsity is not None else []
    return [*(given or []), *said, *([f"budget={json.dumps(budgets)}"] if budgets else [])]


def show(facts: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    print(json_text(facts) if as_json else "\n".join(map(terminal, lines(facts))))


Model = Annotated[str, typer.Argument(help="a name from `compress list models`, a hub id, a local folder or a GGUF")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="a name from `compress list recipes`, or a YAML file")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="changes a recipe value; repeatable")]
Json = Annotated[bool, typer.Option("--json", help="prints the result as JSON")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=4096, help="of each process  [default: as many as processors]")
]
Sparsity = Annotated[float | None, typer.Option(help="share of the backbone to remove; short for --set sparsity=")]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="FIGURE<=LIMIT",
        help="in place of a sparsity, such as size<=0.8x, kv_cache@4096<=64MB, tpot<=0.7x; repeatable",
    ),
]
TargetName = Annotated[
    str | None, typer.Option("--target", "-t", help="a name from `compress list targets`, or a YAML file")
]
Network = Annotated[
    str | None, typer.Option(metavar="FILE.py:FUNCTION", help="networks of a file of your own: its code is run")
]
Processes = Annotated[
    int | None,
    typer.Option("--processes", "-n", min=1, max=4096, help="to start  [default: one per GPU, one without]"),
]
RankTimeout = Annotated[
    float,
    typer.Option(min=1, callback=finite, help="seconds after which a process that does not answer is given up"),
]
