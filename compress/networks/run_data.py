"""The data that a run was made with, read again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError
from compress.schema.sections import DataSpec

if TYPE_CHECKING:
    from compress.data.images import Splits


def run_data(run: Path) -> Splits:
    """The data that a run was made with, read again.

    Raises:
        CompressError: it is no run with a trained network, or its data cannot be had, or has changed.
    """
    from pydantic import ValidationError

    from compress.data.images import load
    from compress.models.saved import locked_recipe
    from compress.networks.reload import read_facts
    from compress.run.folder import RECIPE_LOCK, read_seal

    recipe = locked_recipe(run, "network")
    if not (run / "dense").is_dir():
        raise CompressError(
            "the run has trained no network yet", where=str(run), fix="finish it: give its command again"
        )
    if "inputs" in read_facts(run / "dense"):
        raise CompressError(
            "the run is of a job, whose data are its own",
            where=str(run),
            fix="name the job: compress eval MODEL --network FILE.py:JOB",
        )
    try:
        spec = DataSpec.model_validate(recipe.get("data"))
    except ValidationError as e:
        raise CompressError(
            "the run does not say what data it was made with", where=str(run / RECIPE_LOCK), fix="name a newer run"
        ) from e
    try:
        data = load(spec)
    except CompressError as e:
        raise CompressError(f"the run's data cannot be had: {e.what}", where=e.where, fix=e.fix) from e
    if data.sha256 != read_seal(run / "dense")["inputs"].get("data"):
        raise CompressError(
            "the data has changed since the run was made", where=f"data {spec.title}", fix="bring back what it was"
        )
    return data
