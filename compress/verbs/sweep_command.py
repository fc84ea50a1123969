"""`compress sweep` on the command line: words in, lines out. Nothing heavy is imported before it is called."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from compress.errors import UsageError
from compress.system import threads
from compress.verbs.typed import Json, Processes, RankTimeout, Set, Threads, show

EPILOG = (
    "Examples:  compress sweep smollm2-135m -r tyr-demo --at 12.5%,25%,37.5%,50% --out runs/sweep   |   "
    "compress sweep ./my-llama -r tyr -b 'size<=0.8x' -b 'size<=0.6x,kv_cache<=0.5x' --precision q8_0 --rival q4_k_m"
    "   |   compress sweep runs/sweep --pick knee"
)


def sweep(
    model: Annotated[str, typer.Argument(help="a model, as for `prune`; with --pick alone a finished sweep's folder")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="a name from `compress list recipes`, or a YAML file")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the sweep's folder  [default: runs/MODEL-RECIPE-sweep]")] = None,
    at: Annotated[
        list[str] | None, typer.Option(metavar="SHARE,...", help="a point each, such as 12.5%,25% or 0.25; repeatable")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget", "-b", metavar="FIGURE<=LIMIT,...", help="a point each; budgets behind commas hold together"
        ),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="of GGUFs that every point and the dense model are built in; repeatable")
    ] = None,
    rival: Annotated[
        list[str] | None, typer.Option(help="of GGUFs that the dense model alone is built in; repeatable")
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="last stage of a point: evaluation, export, bench (times), quantise or release"),
    ] = None,
    set_: Set = None,
    plan: Annotated[bool, typer.Option("--plan", help="only says what it would do; reads no weight")] = False,
    pick: Annotated[
        str | None, typer.Option(metavar="POINT", help="finishes a point, or `knee`, to its release, where it lies")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="forgets what an earlier sweep left in the folder")] = False,
    processes: Processes = None,
    rank_timeout: RankTimeout = 1800.0,
    threads_: Threads = None,
    json_: Json = False,
) -> None:
    """Prunes a model to many budgets that share their work, and says which is best for what it takes.

    The same command again goes on where it was stopped.
    """
    from compress.processes import distributed

    threads.use(threads_)
    if recipe is None:
        if pick is None:
            raise UsageError("the option --recipe is missing", where="sweep", fix="name one; --pick alone needs none")
        given = {"--at": at, "--budget": budget, "--precision": precision, "--rival": rival, "--until": until,
                 "--set": set_, "--out": out, "--fresh": fresh, "--plan": plan}  # fmt: skip
        if strange := [name for name, value in given.items() if value]:
            raise UsageError(
                f"{strange[0]} says what a sweep is made of, and --pick alone takes a finished one",
                where="sweep",
                fix="leave it out, or name the model and its --recipe",
            )
    count = distributed.wanted(processes)
    if count > 1 and not plan:
        raise typer.Exit(distributed.launch(count, sys.argv[1:]))
    from compress.pipeline import method_of
    from compress.verbs import sweep as verb

    folder = Path(model) if recipe is None else out or Path("runs") / f"{Path(model).name}-{Path(recipe).stem}-sweep"
    if recipe is not None:
        asked = verb.order(
            model, recipe, set_ or [], at=at or [], budgets=budget or [], precisions=precision or [],
            rivals=rival or [], until=until,
        )  # fmt: skip
        if plan:
            show(verb.forecast(asked), json_, verb.forecast_lines)
            return
    distributed.join(timedelta(seconds=rank_timeout))
    if recipe is not None:
        made = verb.sweep(asked, folder, fresh=fresh)
        if distributed.is_main() and (pick is None or not json_):
            show(made.facts(), json_, lambda _: verb.lines(made, folder))
    if pick is not None:
        point, report = verb.pick(folder, pick)
        if distributed.is_main():
            told = {**report, "run": str(folder / point.folder)}
            show(told, json_, method_of(report["recipe"]).lines)
    distributed.leave()
