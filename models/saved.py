"""What kind of model a folder holds, told by the files it was written with, and the module that knows the kind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.run.folder import RECIPE_LOCK
from compress.run.seals import SEAL, read_stamped, verify_seal
from compress.schema.recipe import TEXT
from compress.schema.strict_yaml import parse_yaml


@dataclass(frozen=True)
class Kind:
    """One kind of model: ``facts`` says how a saved one is built, one of ``graphs`` is in every export of one; or
    ``settings`` are, beside a graph of any name, in one that a runtime of its own reads.

    ``verbs`` is a module with ``evaluate(folder, like, ...)``, ``export(folder, out, ...)`` and
    ``bench(dense, pruned, ...)``, where what is behind the places are the options a user may give for this kind; and
    ``evaluate_lines(facts)`` and so on, what the command line says of what they return.
    """

    title: str
    facts: str
    graphs: tuple[str, ...]
    verbs: str
    settings: str = ""


# The task of a recipe (`compress.pipeline.METHODS`) -> the kind of model it is about.
KINDS = {
    TEXT: Kind(
        "a language model",
        "config.json",
        ("prefill.onnx", "gguf.json"),
        "compress.verbs.language",
        "genai_config.json",
    ),
    "network": Kind("a plain network", "network.json", ("model.onnx",), "compress.verbs.network"),
}


def find(model: str) -> tuple[str, Path]:
    """(kind, folder) of a saved model: the folder itself, a run folder's model, or what `resolve` knows by name; of one
    that is quantised, or that sees or hears as well, the folder of the plain language model that is made of it.

    Raises:
        CompressError: there is no model, it cannot be fetched, or it is not what was sealed.
        UsageError: there is no such name, or it is that of a network, which no folder comes with.
    """
    from compress.models.quantised import find as find_quantised
    from compress.models.sources import NetworkAlias, alias_names, load_alias, plain_folder, resolve

    path = Path(model)
    if find_quantised(path) is not None:
        return TEXT, plain_folder(path)
    if not path.exists():
        if model in alias_names() and isinstance(load_alias(model), NetworkAlias):
            raise UsageError(
                f"{model} names a network that is yet to be trained",
                where="MODEL",
                fix="name the folder of a run or of a model that `compress prune` saved",
            )
        path = resolve(model).folder
    for place in (path, path / "model"):
        kinds = [name for name, kind in KINDS.items() if (place / kind.facts).is_file()]
        if len(kinds) > 1:
            raise CompressError(
                "two kinds of model lie here: " + " and ".join(KINDS[k].facts for k in kinds),
                where=str(place),
                fix="keep each in a folder of its own",
            )
        if kinds:
            check_where_sealed(place)
            return kinds[0], plain_folder(place) if kinds[0] == TEXT else place
    raise CompressError("there is no model here", where=str(path), fix="name a model folder or a finished run folder")


def exported_kind(folders: tuple[Path, Path]) -> str:
    """The kind that two export folders share.

    Raises:
        CompressError: one is no export, is not what was sealed, or they are not of one kind.
    """
    found = []
    for folder in folders:
        check_where_sealed(folder)
        kinds = [name for name, kind in KINDS.items() if kind.settings and (folder / kind.settings).is_file()]
        kinds = kinds or [name for name, kind in KINDS.items() if any((folder / g).is_file() for g in kind.graphs)]
        if len(kinds) != 1:
            graphs = [kind.graphs[0] for kind in KINDS.values()]
            raise CompressError(
                f"there is no {' or '.join(graphs)}" if not kinds else f"there are both {' and '.join(graphs)}",
                where=str(folder),
                fix="name a folder made by `compress export`",
            )
        found += kinds
    if found[0] != found[1]:
        raise CompressError(
            f"one export is of {KINDS[found[0]].title}, the other of {KINDS[found[1]].title}",
            where=f"{folders[0]}, {folders[1]}",
            fix="name two exports of one kind",
        )
    return found[0]


def check_where_sealed(folder: Path) -> None:
    """Raises CompressError where a folder has a seal and does not hold what it says. Files more are no matter here."""
    if os.path.lexists(folder / SEAL):
        verify_seal(folder, strangers=False)


def locked_recipe(run: Path, kind: str) -> dict[str, Any]:
    """The recipe that a run folder was made by, as `AnyRecipe.resolved` wrote it.

    Raises:
        CompressError: it is no run folder, or a run of another kind.
    """
    lock = run / RECIPE_LOCK
    fix = "name a folder that `compress prune` made; it writes the file again where it is deleted"
    try:
        held = parse_yaml(read_stamped(lock, RECIPE_LOCK, fix), RECIPE_LOCK, str(lock))
        recipe: dict[str, Any] = held.value["recipe"]
        task = recipe.get("task", TEXT)
    except CompressError as e:
        raise CompressError(f"this is not a run folder: {e.what}", where=e.where, fix=e.fix) from e
    except (KeyError, TypeError, AttributeError) as e:
        raise CompressError(f"this is not a run folder: it has no whole {RECIPE_LOCK}", where=str(run), fix=fix) from e
    if task != kind:
        what = KINDS[task].title if task in KINDS else f"a {task}"
        raise CompressError(
            f"the model is {KINDS[kind].title}, the run is of {what}", where=str(run), fix="name a run of the same kind"
        )
    return recipe
