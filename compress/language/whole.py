"""A checkpoint that sees as well, with its language part pruned: put together, loaded in a clean process, compared."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError
from compress.report.multimodal import NAME
from compress.run.folder import Run, seal_hash

if TYPE_CHECKING:
    from compress.language.setup import Setup

FACTS = "multimodal.json"


def whole(run: Run, setup: Setup[Any], saved: Path, report: dict[str, Any]) -> None:
    """The checkpoint with the pruned language part ``saved`` in it, where the model was a part of one.

    Raises:
        CompressError: its other parts are not what they were, or on text it gives other logits than ``saved``.
    """
    from compress.models.reading import weights_hash

    model = setup.resolved.whole
    if model is None:
        return
    inputs = {"version": __version__, "whole": weights_hash(model.path), "model": seal_hash(saved)}
    folder = run.stage(NAME, inputs, lambda made: _build(setup, saved, made))
    report[NAME] = json.loads((folder / FACTS).read_text("utf-8"))
    report["stages"] = run.stages()


def _build(setup: Setup[Any], saved: Path, folder: Path) -> None:
    from compress.language.checkpoint import FINGERPRINT, verify_clean
    from compress.models.composite import carried, put_back
    from compress.models.reading import weight_files

    model = setup.resolved.whole
    assert model is not None  # asked by the caller
    names = put_back(model, setup.resolved.folder, saved, setup.family, folder)
    before, after = carried(model.path, names), carried(folder, names)
    if before != after:
        raise CompressError(
            "what stands beside the language part is not what it was",
            where=str(folder),
            fix="this is a fault of compress; report it with the model's name",
        )
    shutil.copyfile(saved / FINGERPRINT, folder / FINGERPRINT)
    found = verify_clean(folder)
    bytes_of = [sum(path.stat().st_size for path in weight_files(place)) for place in (model.path, folder)]
    facts = {
        "title": model.title,
        "names": asdict(names),
        "carried": asdict(after),
        "dense": {"parameters": after.parameters + setup.costs.total, "bytes": bytes_of[0]},
        "pruned": {"parameters": found["parameters"], "bytes": bytes_of[1]},
        "verify": found,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
