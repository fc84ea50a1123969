"""`compress sweep`: one model at many budgets, each a run of its own that takes over what another has made.

The points are run folders in the sweep's: a stage that is the same for two of them (the text, the supernet, single
losses, a latency table, the dense network and its figures) is made once and linked. A point is therefore what `compress
prune` with that budget alone makes, to the byte, and goes on where it lies.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.pipeline import METHODS, method_of, prune
from compress.processes import distributed
from compress.report.sweep import NAME, Point, Sweep, axes_of, entries_of, read_sweep
from compress.report.sweep_page import PAGE, PLOT, lines, write_page
from compress.run.folder import LOCK, RECIPE_LOCK, Run, differences, sealed_folders
from compress.run.progress import say
from compress.run.seals import read_stamped
from compress.schema.recipe import TEXT, AnyRecipe, Recipe, layers_of, load_recipe
from compress.schema.stages import STAGES
from compress.schema.strict_yaml import parse_yaml
from compress.words.wording import duration, megabytes

FEWEST, MOST = 2, 64  # points of a sweep
EXAMPLE = "--at 12.5%,25%,50%"
OWN_FILES = (NAME, PAGE, PLOT)


@dataclass(frozen=True)
class Asked:
    """One point that is asked for: its name, its folder's, and what it lays over the recipe."""

    name: str
    folder: str
    overrides: tuple[str, ...]
    words: tuple[str, ...]  # the same on the command line
    same: frozenset[tuple[Any, ...]]  # what it asks for, however that is written
    timed: bool = False  # it asks for a time


@dataclass(frozen=True)
class Order:
    """A whole sweep as it was asked for. ``recipe``: the first point's."""

    model: str
    recipe_name: str
    settings: tuple[str, ...]
    points: tuple[Asked, ...]
    until: str
    recipe: AnyRecipe

    def overrides(self, point: Asked) -> list[str]:
        return [*self.settings, *point.overrides]


def order(
    model: str,
    recipe_name: str,
    settings: Sequence[str],
    *,
    at: Sequence[str] = (),
    budgets: Sequence[str] = (),
    precisions: Sequence[str] = (),
    rivals: Sequence[str] = (),
    until: str | None = None,
) -> Order:
    """Checks what is asked for, before anything is read but the recipe.

    Args:
        at: shares, such as ``25%`` or ``0.25``, a point each; several may stand in one, behind commas.
        budgets: a point each, such as ``size<=0.8x``; those that hold together in one point stand behind commas.
        precisions: of a GGUF that every point is built in as well; ``rivals``: that the dense model alone is built in.
        until: the stage that every point is taken to; by default the first that measures all that is asked for:
            ``evaluation``, ``bench`` where a budget is of a time, ``quantise`` where there are precisions.

    Raises:
        UsageError: fewer than two points, the same one twice, one that contradicts the recipe or its settings, or a
            value that cannot be read.
    """
    more = [*_listed("quantise.gguf", precisions), *_listed("quantise.rivals", rivals)]
    given = [*settings, *more]
    layers = layers_of(recipe_name)
    method, task = layers.get("method"), layers.get("task", TEXT)
    known = METHODS.get(str(method), {}).get(str(task))
    amount = method_of({"method": method, "task": task}).AMOUNT if known is not None else "sparsity"
    _refuse_amounts(settings, amount)
    _check_precisions(precisions, rivals, [*settings, *layers], str(task))
    points = [_share(text, amount, layers) for one in at for text in one.split(",")]
    if budgets and not (known is not None and issubclass(known.recipe, Recipe)):
        raise UsageError(
            f"{method} keeps no budgets: its axis is {amount}, a share", where=f"--budget {budgets[0]!r}", fix=EXAMPLE
        )
    bench = None
    if budgets:
        bench = load_recipe(recipe_name, METHODS, [*given, f"budget={json.dumps(budgets[0].split(','))}"]).bench
    points += [_budget(one, bench) for one in budgets]
    _check_points(points)
    recipes = [load_recipe(recipe_name, METHODS, [*given, *point.overrides]) for point in points]
    stage = _until(until, recipes[0], any(point.timed for point in points), bool(more))
    return Order(model, recipe_name, tuple(given), tuple(points), stage, recipes[0])


def _check_precisions(precisions: Sequence[str], rivals: Sequence[str], said: Sequence[str], task: str) -> None:
    """``said``: keys of the recipe, and its settings."""
    if (precisions or rivals) and task != TEXT:
        raise UsageError(
            "precisions are those of a language model's GGUF",
            where="--precision",
            fix="leave --precision and --rival out",
        )
    if rivals and not precisions and not any(text.startswith("quantise") for text in said):
        raise UsageError(
            "rivals stand beside the points' own GGUFs, and no --precision is named",
            where=f"--rival {rivals[0]}",
            fix=f"--precision {rivals[0].split(',')[0]} builds the points in it, and the dense model",
        )


def _until(asked: str | None, recipe: AnyRecipe, timed: bool, precise: bool) -> str:
    """The stage that every point is taken to: the last that was asked for, or the first that measures all that is."""
    able = STAGES[STAGES.index("evaluation") :]
    if asked is None:
        quantised = getattr(recipe, "quantise", None) is not None
        return "quantise" if quantised else "bench" if timed else "evaluation"
    if asked not in able:
        raise UsageError(
            f"a point is judged behind its evaluation, and {asked!r} is no stage from there on",
            where="--until",
            fix=f"one of: {', '.join(able)}",
        )
    for wanted, last, what in ((precise, "quantise", "precisions are built"), (timed, "bench", "times are measured")):
        if wanted and STAGES.index(asked) < STAGES.index(last):
            raise UsageError(
                f"{what} in the stage {last}, and --until {asked} stops before it",
                where="--until",
                fix=f"leave --until out, or say {last}",
            )
    return asked


def _refuse_amounts(settings: Sequence[str], amount: str) -> None:
    for text in settings:
        key = text.partition("=")[0]
        if key in (amount, "sparsity", "budget"):
            raise UsageError(
                f"a sweep says how much goes by its points, and {key} says it for all of them",
                where=f"--set {text}",
                fix="leave it out, and name points with --at or --budget",
            )


def _listed(key: str, values: Sequence[str]) -> list[str]:
    every = [v.strip() for one in values for v in one.split(",")]
    return [f"{key}={json.dumps(every)}"] if every else []


def _share(text: str, amount: str, layers: Mapping[str, Any]) -> Asked:
    """A point that is a share of what can go."""
    said = text.strip()
    number = said.removesuffix("%")
    if not re.fullmatch(r"[0-9]{0,9}(\.[0-9]{0,12})?", number) or number in ("", "."):
        raise UsageError(f"{said!r} is no share", where=f"--at {text}", fix=f"for example: {EXAMPLE}")
    share = Fraction(number) / (100 if said.endswith("%") else 1)
    if not 0 < share < 1:
        meant = f"{number}% or {float(Fraction(number) / 100):g}" if 1 < share < 100 else "a number between 0 and 1"
        raise UsageError(f"{said} is no share between nothing and all", where=f"--at {text}", fix=f"say {meant}")
    value = float(share)
    overrides = [f"{amount}={value!r}"]
    words = ["--sparsity", f"{value!r}"] if amount == "sparsity" else ["--set", f"{amount}={value!r}"]
    if layers.get("budget") is not None:  # the share takes its place
        overrides.append("budget=null")
        words += ["--set", "budget=null"]
    return Asked(
        f"{100 * value:g}%",
        f"{amount.split('.')[-1]}-{value!r}",
        tuple(overrides),
        tuple(words),
        frozenset({("share", share)}),
    )


def _budget(text: str, bench: Any) -> Asked:
    """A point that keeps one budget or several."""
    from compress.language.limits import TIMES, parse

    parsed = parse(text.split(","), bench)
    said = [b.text for b in parsed]
    folder = "+".join(re.sub(r"[^A-Za-z0-9.@]+", "-", one).strip("-") for one in said)
    words = [word for one in said for word in ("-b", one)]
    same = frozenset((b.figure, b.length, b.kind, b.limit) for b in parsed)
    return Asked(
        ", ".join(said),
        folder,
        (f"budget={json.dumps(said)}",),
        tuple(words),
        same,
        any(b.figure in TIMES for b in parsed),
    )


def _check_points(points: Sequence[Asked]) -> None:
    if len(points) < FEWEST:
        raise UsageError(
            f"a sweep takes {FEWEST} points or more, and {len(points) or 'none'} is named",
            where="sweep",
            fix=f"{EXAMPLE}, or several --budget; `compress prune` makes one",
        )
    if len(points) > MOST:
        raise UsageError(f"these are {len(points)} points, of {MOST} at most", where="sweep", fix="name fewer")
    for i, point in enumerate(points):
        if any(point.same == other.same or point.folder.lower() == other.folder.lower() for other in points[:i]):
            raise UsageError(f"the point {point.name} is named twice", where="sweep", fix="name it once")


def forecast(asked: Order) -> dict[str, Any]:
    """What the sweep would do, without a weight being read: of every point what `compress plan` says.

    Raises:
        CompressError: a point cannot be reached; it is named.
    """
    method = method_of(asked.recipe)
    points = []
    for point in asked.points:
        with _of_point(point):
            recipe = load_recipe(asked.recipe_name, METHODS, asked.overrides(point))
            points.append({"point": point.name, **method.forecast(asked.model, recipe)})
    first = points[0]
    facts: dict[str, Any] = {"kind": "sweep", "until": asked.until, "points": points}
    if "stages" not in first:
        return facts
    once = [
        row["stage"]
        for row in first["stages"]
        if row["stage"].split("/")[0] in method.SHARED and all(_same_stage(row, p) for p in points[1:])
    ]
    shared = sum(row["seconds"] for row in first["stages"] if row["stage"] in once)
    seconds = shared + sum(p["seconds"] - shared for p in points)
    low, high = (first[key] / first["seconds"] for key in ("seconds_low", "seconds_high"))
    disk_once = sum(row["written_bytes"] for row in first["stages"] if row["stage"] in once)
    disk = disk_once + sum(p["disk_bytes_end"] - disk_once for p in points)
    peak = disk + max(p["disk_bytes_peak"] - p["disk_bytes_end"] for p in points)
    return {
        **facts,
        "shared_stages": once,
        "shared_seconds": shared,
        "seconds": seconds,
        "seconds_low": low * seconds,
        "seconds_high": high * seconds,
        "disk_bytes_end": disk,
        "disk_bytes_peak": peak,
    }


def _same_stage(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether another point's stage of that name does the same work."""
    return any(
        r["stage"] == row["stage"] and r["seconds_by_kind"].keys() == row["seconds_by_kind"].keys()
        and r["written_bytes"] == row["written_bytes"] and r["token_layers"] == row["token_layers"]
        for r in other["stages"]
    )  # fmt: skip


def forecast_lines(facts: dict[str, Any]) -> list[str]:
    """The first point's forecast, as `compress plan` shows it, then what all points take together."""
    points, span = (
        facts["points"],
        [duration(facts[k]) for k in ("seconds", "seconds_low", "seconds_high") if k in facts],
    )
    method = method_of(points[0])
    said = [f"point    {points[0]['point']}, the first of {len(points)}:", *method.forecast_lines(points[0])]
    for other in points[1:]:
        own = [line for line in method.forecast_lines(other) if line.startswith("budget")]
        took = f", {duration(other['seconds'])} alone" if "seconds" in other else ""
        said += [f"point    {other['point']}{took}", *own]
    if "seconds" not in facts:
        return said
    return [
        *said,
        f"shared   {', '.join(facts['shared_stages'])}: made once, {duration(facts['shared_seconds'])}",
        f"sweep    {len(points)} points, {span[0]} up to their saved models, {span[1]} to {span[2]};"
        f" {megabytes(facts['disk_bytes_peak'])} of disk at its fullest,"
        f" {megabytes(facts['disk_bytes_end'])} at the end",
    ]


def sweep(asked: Order, out: Path, *, fresh: bool = False) -> Sweep:
    """Makes every point, or goes on where an earlier call stopped, and writes the table, the page and the plot.

    Raises:
        CompressError: a point cannot be made (it is named), or the folder was begun with other options.
    """

    def ready() -> None:
        for line in forecast_lines(forecast(asked)):
            say(line)

    distributed.main_says(ready)
    with held(out, asked, fresh):
        reports = {}
        for number, point in enumerate(asked.points, 1):
            say(f"point {number} of {len(asked.points)}: {point.name}")
            with _of_point(point):
                reports[point.name] = _make(asked, point, out)
        made = _written(asked, out, reports)
        distributed.main_says(lambda: write_page(made, out))
    return made


def _make(asked: Order, point: Asked, out: Path) -> dict[str, Any]:
    folder = out / point.folder
    return prune(
        asked.model,
        asked.recipe_name,
        folder,
        asked.overrides(point),
        until=asked.until,
        command=command_of(asked, point, out),
        beside=[run for run in runs_in(out) if run != folder],
    )


def _written(asked: Order, out: Path, reports: Mapping[str, Mapping[str, Any]]) -> Sweep:
    from compress.report.rows import rows

    quality, entries, titles = entries_of(reports)
    first = next(iter(reports.values()))
    return Sweep(
        model=first["model"]["name"],
        asked_model=asked.model,
        weights=first["model"]["sha256"],
        recipe_name=asked.recipe_name,
        settings=list(asked.settings),
        recipe=common(asked.recipe.resolved()),
        until=asked.until,
        quality=quality,
        points=[
            Point(
                name=point.name,
                overrides=list(point.overrides),
                folder=point.folder,
                make=command_of(asked, point, out),
                pick=shlex.join(["compress", "sweep", str(out), "--pick", point.name]),
                rows=rows(reports[point.name]),
                budgets=reports[point.name].get("budgets") or [],
            )
            for point in asked.points
        ],
        entries=entries,
        axes=axes_of(entries, quality, titles),
    )


def command_of(asked: Order, point: Asked, out: Path) -> str:
    """The command that makes a point alone; in the sweep's folder it goes on there."""
    settings = (word for text in asked.settings for word in ("--set", text))
    words = ["compress", "prune", asked.model, "--recipe", asked.recipe_name, *settings, *point.words]
    return shlex.join([*words, "--out", str(out / point.folder)])


def pick(out: Path, name: str) -> tuple[Point, dict[str, Any]]:
    """Finishes a point of a finished sweep in its own folder, to its release.

    Returns:
        The point, and its report.

    Raises:
        CompressError: there is no such sweep or point, or its run cannot go on.
    """
    made = distributed.main_says(lambda: read_sweep(out))
    point = made.point(name)
    folder = out / point.folder
    if folder.parent != out:
        raise CompressError(f"{NAME} names a folder outside its own", where=point.folder, fix="make the sweep again")
    with Run.open(out):
        report = prune(
            made.asked_model,
            made.recipe_name,
            folder,
            [*made.settings, *point.overrides],
            command=point.make,
            beside=[run for run in runs_in(out) if run != folder],
        )
    return point, report


def common(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the points of a sweep have in common of a resolved recipe: all but how much goes, and precisions."""
    kept = {k: v for k, v in recipe.items() if k not in ("budget", "quantise")}
    section, _, key = method_of(recipe).AMOUNT.rpartition(".")
    if section:
        kept[section] = {k: v for k, v in kept[section].items() if k != key}
    else:
        kept.pop(key, None)
    return kept


def runs_in(out: Path) -> list[Path]:
    """The run folders of a sweep's points, in order; of earlier commands as well."""
    return [path for path in sorted(out.iterdir()) if not path.is_symlink() and (path / RECIPE_LOCK).is_file()]


@contextmanager
def held(out: Path, asked: Order, fresh: bool) -> Iterator[None]:
    """The sweep's folder, locked, and found to be begun with the same options.

    Raises:
        CompressError: it cannot be written, is another's, is a single run's, or was begun with other options.
    """
    with Run.open(out):
        distributed.main_says(lambda: _look(out, asked, fresh))
        yield


def _look(out: Path, asked: Order, fresh: bool) -> None:
    if os.path.lexists(out / RECIPE_LOCK) or any(path.parent == out for path in sealed_folders(out)):
        raise CompressError("this is the folder of a single run", where=str(out), fix="name another --out folder")
    if fresh:
        for run in runs_in(out):
            with Run.open(run, fresh=True):
                pass
            (run / LOCK).unlink()
            run.rmdir()
        for name in OWN_FILES:
            (out / name).unlink(missing_ok=True)
        return
    now = json.loads(json.dumps(common(asked.recipe.resolved())))
    for run in runs_in(out):
        lock = run / RECIPE_LOCK
        before = _recipe_in(lock)
        changed = list(differences(before, now))
        if changed:
            raise CompressError(
                f"the sweep was begun with other options: {'; '.join(changed[:5])}"
                + (f"; and {len(changed) - 5} more" if len(changed) > 5 else ""),
                where=str(lock),
                fix="go back to the earlier option, name another --out folder, or start over with --fresh",
            )


def _recipe_in(lock: Path) -> dict[str, Any]:
    fix = "delete it: the same command writes it again"
    found = parse_yaml(read_stamped(lock, lock.name, fix), lock.name, str(lock), fix).value
    recipe = found.get("recipe") if isinstance(found, dict) else None
    if not isinstance(recipe, dict) or recipe.get("method") not in METHODS:
        raise CompressError(f"{lock.name} holds no recipe", where=str(lock), fix=fix)
    return common(recipe)


@contextmanager
def _of_point(point: Asked) -> Iterator[None]:
    """An error in the block says which point it is of."""
    try:
        yield
    except CompressError as e:
        e.what = f"point {point.name}: {e.what}"
        e.args = (e.what,)
        raise


__all__ = ["Order", "forecast", "forecast_lines", "lines", "order", "pick", "sweep"]
