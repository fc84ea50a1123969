"""What a run does on the targets that its recipe names: build both models for each, and measure them there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import UsageError
from compress.run.folder import Run, seal_hash

if TYPE_CHECKING:
    from torch import nn


def check(names: Sequence[str]) -> None:
    """Raises UsageError where a target is unknown, its file is wrong, or what builds its format is not installed."""
    from compress.exporters.on_target import build_options

    _each(names, build_options)


def check_files(names: Sequence[str]) -> None:
    """Raises UsageError where a target is unknown, or its file is wrong."""
    from compress.exporters.target import load_target

    _each(names, load_target)


def _each(names: Sequence[str], load: Callable[[str], object]) -> None:
    for name in names:
        try:
            load(name)
        except UsageError as e:
            where = "targets" if e.where in (None, "--target") else e.where
            raise UsageError(e.what, where=where, fix=e.fix) from None


def on_targets(
    run: Run,
    names: Sequence[str],
    exported: Mapping[str, Path],
    models: Mapping[str, Callable[[], nn.Module]],
    report: dict[str, Any],
) -> None:
    """Builds and measures ``exported`` (``dense`` and ``pruned``, ONNX) on every target, into ``report["targets"]``.

    Each target is a stage of its own: one that cannot be reached stops the run, which goes on there next time.

    Args:
        models: makes the torch modules, for formats that are not made of ONNX.
    """
    from compress.exporters import on_target
    from compress.exporters.target import load_target

    found = {}
    for name in names:
        target = load_target(name)

        def build(folder: Path, name: str = name) -> None:
            options = on_target.build_options(name)
            places = {
                label: on_target.built(source, models[label], folder / label, options)
                for label, source in exported.items()
            }
            record = on_target.bench(places["dense"], places["pruned"], name, {})
            (folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

        inputs = {
            "version": __version__,
            "target": target.model_dump(mode="json"),
            **{label: seal_hash(folder) for label, folder in exported.items()},
        }
        stage = run.stage(f"target-{target.name}", inputs, build)
        found[target.name] = json.loads((stage / "bench.json").read_text("utf-8"))
    if found:
        report["targets"] = found
        report["stages"] = run.stages()
