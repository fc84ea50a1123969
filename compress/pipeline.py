"""The methods there are, and `prune`, which runs one."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from compress.errors import CompressError
from compress.language.computing import BATCH_TOKENS
from compress.language.setup import Setup
from compress.processes import distributed
from compress.recipes.global_mp import GlobalMPOptions
from compress.recipes.global_mp.options import NetworkOptions
from compress.recipes.pagcp.options import PAGCPOptions
from compress.recipes.tyr import TyrOptions
from compress.run.folder import RECIPE_LOCK, Run
from compress.run.seals import read_stamped, stamped
from compress.schema.recipe import TEXT, AnyRecipe, Recipe, Task, TextRecipe, load_recipe, lock_text
from compress.schema.sections import NetworkRecipe
from compress.schema.stages import STAGES
from compress.schema.strict_yaml import parse_yaml
from compress.system.files import write_whole

if TYPE_CHECKING:
    from compress.recipes.global_mp import network_stages, text_stages
    from compress.recipes.pagcp import stages as pagcp_stages
    from compress.recipes.tyr import stages as tyr_stages

    # Each module is checked to be a method.
    _METHODS: tuple[Method, ...] = (tyr_stages, text_stages, network_stages, pagcp_stages)

METHODS: dict[str, dict[str, Task]] = {
    "tyr": {"text": Task(TyrOptions, Recipe, "compress.recipes.tyr.stages")},
    "global-mp": {
        "text": Task(GlobalMPOptions, TextRecipe, "compress.recipes.global_mp.text_stages"),
        "network": Task(NetworkOptions, NetworkRecipe, "compress.recipes.global_mp.network_stages"),
    },
    "pagcp": {"network": Task(PAGCPOptions, NetworkRecipe, "compress.recipes.pagcp.stages")},
}


_BEFORE = {"type": "float32", "batch_tokens": BATCH_TOKENS}


class Method(Protocol):
    """What a method is on one kind of model: a module of its folder that has these.

    ``AMOUNT``: the key of its recipes that says how much goes, as a share. ``SHARED``: first parts of the names of
    stages that are the same however much goes, where nothing else differs.
    """

    AMOUNT: str
    SHARED: frozenset[str]

    def prepare(self, model: str, recipe: Any) -> Any:
        """A setup with ``recipe``, ``resolved`` and ``weights``, checked before any weight is read."""

    def stages(self, run: Run, setup: Any, until: str, command: str) -> dict[str, Any]:
        """Runs `compress.schema.stages.STAGES` up to ``until``; returns the report."""

    def card(self, report: dict[str, Any], folder: Path) -> Path:
        """Draws the plots and writes the card; returns its path."""

    def lines(self, report: dict[str, Any]) -> list[str]:
        """What the command line says of a finished run."""

    def forecast(self, model: str, recipe: Any, on: str = "this-machine") -> dict[str, Any]:
        """What a run would do, without a weight being read: with ``method`` and, where it is not text, ``task``."""

    def forecast_lines(self, facts: dict[str, Any]) -> list[str]:
        """What the command line says of a forecast."""


def method_of(recipe: AnyRecipe | Mapping[str, Any]) -> Method:
    """The method that a recipe, or facts with the keys ``method`` and ``task``, names."""
    facts = recipe if isinstance(recipe, Mapping) else {"method": recipe.method, "task": getattr(recipe, "task", TEXT)}
    found: Any = importlib.import_module(METHODS[facts["method"]][facts.get("task", TEXT)].pipeline)
    return cast(Method, found)


def check(recipe: AnyRecipe) -> None:
    """What `plan` and `prune` ask of a recipe that its schema cannot: parts that need one another, files of targets.

    Raises:
        CompressError: one of them is not there, or a target is unknown or wrong.
    """
    if getattr(recipe, "bench", None) is not None and getattr(recipe, "export", None) is None:
        raise CompressError("bench needs the exported model", where="export", fix="set bench to null as well")
    if recipe.targets:
        from compress.exporters.stages import check_files

        if getattr(recipe, "export", None) is None:
            raise CompressError("targets need the exported model", where="export", fix="leave targets out as well")
        check_files(recipe.targets)


def prune(
    model: str,
    recipe_name: str,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    fresh: bool = False,
    until: str = STAGES[-1],
    command: str = "",
    ask: Callable[[Any], None] | None = None,
    beside: Sequence[Path] = (),
) -> dict[str, Any]:
    """Runs the whole pipeline into the run folder ``out``, or goes on where an earlier call stopped.

    Args:
        ask: is given the set-up before anything is written, and raises where it is not what was meant.
        beside: other run folders, whose stages are taken over where they were made from the same inputs.

    Returns:
        The report (up to the stage that was asked for).

    Raises:
        CompressError: anything that keeps the promise from being kept.
    """

    def ready() -> tuple[Method, Any]:
        recipe = load_recipe(recipe_name, METHODS, overrides)
        check(recipe)
        if recipe.targets:
            from compress.exporters.stages import check as check_builders

            check_builders(recipe.targets)
        method = method_of(recipe)
        setup = method.prepare(model, recipe)
        if ask is not None:
            ask(setup)
        return method, setup

    # The main process first: what is wrong is said once, and what is fetched is fetched once.
    checked: list[tuple[Method, Any]] = []
    distributed.main_says(lambda: checked.append(ready()))
    method, setup = checked[0] if checked else ready()
    with Run.open(out, fresh, beside) as run:
        lock = run.folder / RECIPE_LOCK
        there, locked = distributed.main_says(lambda: _read_lock(lock))
        if isinstance(setup, Setup) and hasattr(setup.recipe, "compute"):
            from compress.language.computing import settle

            setup.computing = settle(setup.recipe.compute, setup.geometry, locked, str(lock))
        if not there:
            distributed.main_says(lambda: _write_lock(lock, setup, command))
        report: dict[str, Any] = method.stages(run, setup, until, command)
        # Only now: a recipe that was refused must not stand for the stages that another one made.
        if distributed.is_main():
            _write_lock(lock, setup, command)
        return report


def _read_lock(path: Path) -> tuple[bool, Any]:
    """Whether there is a lock file of a recipe, and what it says that the run computes with."""
    if not os.path.lexists(path):
        return False, None
    fix = "delete it: the same command writes it again"
    found = parse_yaml(read_stamped(path, path.name, fix), path.name, str(path), fix).value
    if not isinstance(found, dict):
        raise CompressError(f"{path.name} is no map", where=str(path), fix=fix)
    # A run that was begun before there was a choice goes on in float32.
    return True, found.get("compute", _BEFORE)


def _write_lock(path: Path, setup: Any, command: str) -> None:
    from compress.run.doctor import versions

    text = lock_text(
        setup.recipe,
        {
            "model": {"name": setup.resolved.name, "source": setup.resolved.source, "sha256": setup.weights},
            # What a language model's windows begin with, what an ended text would end with, what stands between two.
            **_text_facts(setup),
            **({"compute": setup.computing.facts()} if hasattr(setup.recipe, "compute") else {}),
            "versions": versions(),
            "command": command,
        },
    )
    write_whole(path, stamped(text))


def _text_facts(setup: Any) -> dict[str, Any]:
    from compress.data.special import text_facts

    if not isinstance(setup, Setup):
        return {}
    return {"text": text_facts(setup.tokenizer, bool(setup.recipe.dialogues()))}
