"""The verbs as Python functions. `import compress` gives them by name; torch is imported when one is called."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.errors import UsageError

Facts = dict[str, Any]
Listener = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Result:
    """What `prune` has made.

    Attributes:
        report: as report.json, see docs/reference.
        folder: the run folder: the same call goes on there.
    """

    report: Facts
    folder: Path

    @property
    def saved(self) -> Path:
        """The folder of the pruned model."""
        return self.folder / "model"

    @property
    def release(self) -> Path:
        """The folder to publish: model, exports, report, plots and card (README.md)."""
        return self.folder / "release"

    @cached_property
    def model(self) -> Any:
        """The pruned model, loaded as `load` does."""
        network = self.report["model"].get("network")
        return load(self.saved, network=network if network and ".py:" in network else None)


def prune(
    model: Any,
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    fresh: bool = False,
    until: str = "release",
    settings: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
    **overrides: Any,
) -> Result:
    """Prunes a model, saves it, checks it, exports it, measures it and writes its card, as `compress prune` does.

    The same call goes on where an earlier one was stopped. One process; see docs/guide for many.

    Args:
        model: a name (`compress list models`), a hub id, a folder, FILE.py:FUNCTION of a network, or a transformers
            causal language model in memory, which is saved first (to ``OUT-dense``), with its ``tokenizer``.
        recipe: a name (`compress list recipes`) or a YAML file.
        out: the run folder; ``runs/MODEL-RECIPE`` where it is not given.
        fresh: forgets what an earlier run left in ``out``.
        until: the stage to stop behind, one of `compress.schema.stages.STAGES`.
        settings: keys of the recipe by their path, such as ``{"tyr.search.windows": 8}``.
        progress: called with (label, steps done, steps in all) while something is counted.
        overrides: keys at the recipe's top: ``sparsity=0.5``, ``bench=None``.

    Raises:
        CompressError: anything that keeps the promise from being kept; `UsageError` where the call is wrong.
    """
    from compress.pipeline import prune as run
    from compress.schema.stages import STAGES

    if until not in STAGES:
        raise UsageError(f"unknown stage {until!r}", where="until", fix=f"one of: {', '.join(STAGES)}")
    if out is None and not isinstance(model, str | Path):
        raise UsageError("a model in memory has no name", where="out", fix="give out, the run folder")
    folder = Path(out) if out is not None else Path("runs") / f"{Path(model).name}-{Path(recipe).stem}"
    name = _named(model, tokenizer, folder)
    changes = _changes({**(settings or {}), **overrides})
    words = ["compress", "prune", name, "--recipe", str(recipe), "--out", str(folder)]
    command = shlex.join([*words, *(word for change in changes for word in ("--set", change))])
    with _heard(progress):
        report = run(name, str(recipe), folder, changes, fresh=fresh, until=until, command=command)
    return Result(report, folder)


def plan(
    model: Any,
    recipe: str | Path,
    *,
    on: str = "this-machine",
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Facts:
    """What `prune` would do, without a weight being read: budget, shapes, and memory, disk and time by stage.

    Args:
        on: the machine that is asked about: ``8xh100``, a YAML file, ``this-machine``.
    """
    from compress.verbs.common import plan as run

    return run(_place(model), str(recipe), _changes({**(settings or {}), **overrides}), on)


def evaluate(model: str | Path, *, like: str | Path | None = None, **options: Any) -> Facts:
    """Perplexity of a language model, or a network's figures, on what the run ``like`` held out.

    Args:
        options: ``text=[FILE, ...]``, ``windows``, ``length``, ``task=[NAME, ...]``, ``network``.
    """
    from compress.verbs.common import evaluate as run

    return run(_place(model), Path(like) if like is not None else None, **options)


def export(model: str | Path, out: str | Path, formats: Sequence[Any] = (), **options: Any) -> Facts:
    """Exports a saved model to ONNX, checked against torch; ``out`` appears only when every check has passed.

    Args:
        formats: `compress.exporters.formats.BuildOptions` of what is to be made beside it.
    """
    from compress.verbs.common import export as run

    return run(_place(model), Path(out), list(formats), **options)


def bench(dense: str | Path, pruned: str | Path, *, target: str | None = None, **options: Any) -> Facts:
    """Latency and memory of two export folders, measured in turn in fresh processes; times in seconds."""
    from compress.verbs.common import bench as run

    return run(Path(dense), Path(pruned), target, **options)


def gate(baseline: str | Path, candidate: str | Path, budgets: Sequence[str], **options: Any) -> Facts:
    """Whether a candidate keeps its budgets against a baseline: ``verdict`` is pass, fail or inconclusive.

    Args:
        budgets: such as ``latency<=1.05x``, ``size<=0.7x``.
    """
    from compress.verbs.gate import run

    return run(str(baseline), str(candidate), list(budgets), **options)


def verify(
    model: str | Path,
    *,
    network: str | None = None,
    measure: bool = False,
    like: str | Path | None = None,
    dense: str | Path | None = None,
) -> Facts:
    """A saved or published model against its own report: ``claims``, and how many ``hold`` and ``fail``."""
    from compress.claims.verify import verify as run

    return run(
        str(model),
        network,
        measure=measure,
        like=Path(like) if like is not None else None,
        dense=str(dense) if dense is not None else None,
    )


def load(model: str | Path, *, network: str | None = None) -> Any:
    """A saved model in evaluation mode on the CPU: a transformers model in float32, or the network as a torch module.

    Args:
        network: FILE.py:FUNCTION, where the network is code of yours; no code of the folder is run.

    Raises:
        CompressError: there is none, or it is not whole.
    """
    from compress.models.saved import find

    kind, folder = find(str(model))
    if kind == "network":
        from compress.networks.reload import check_named, reload

        check_named(folder, network)
        return reload(folder, network).model
    from compress.models.families import family_for
    from compress.models.reading import check_weights, load_config, load_model

    check_weights(folder)
    return load_model(folder, family_for(load_config(folder)))


def _place(model: Any) -> str:
    if not isinstance(model, str | Path):
        raise UsageError(
            f"a model in memory ({type(model).__name__}) cannot be named", where="model", fix="save it, name its folder"
        )
    return str(model)


def _named(model: Any, tokenizer: Any, out: Path) -> str:
    """The name of a model; one in memory is saved beside the run folder first, where it is not there already."""
    if isinstance(model, str | Path):
        return str(model)
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"a {type(model).__name__} in memory cannot be built again in a clean process",
            where="model",
            fix="name the function that makes it: FILE.py:FUNCTION",
        )
    if tokenizer is None:
        raise UsageError("the model's text needs its tokenizer", where="tokenizer", fix="give it")
    from compress.run.written import whole

    folder = out.with_name(f"{out.name}-dense")
    if not folder.exists():
        with whole(folder) as made:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
    else:
        _same(model, folder)
    return str(folder)


def _same(model: Any, folder: Path) -> None:
    """Raises UsageError where a folder holds other weights than the model in memory."""
    import torch
    from safetensors import safe_open

    from compress.models.reading import weight_files

    state = model.state_dict()
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                if name not in state or not torch.equal(file.get_tensor(name), state[name].cpu()):
                    raise UsageError(
                        f"another model lies there: {name} differs", where=str(folder), fix="give another out"
                    )


def _changes(values: Mapping[str, Any]) -> list[str]:
    """``key=value`` with JSON values, which are YAML values too."""
    changes = []
    for key, value in values.items():
        plain = str(value) if isinstance(value, Path) else value
        try:
            changes.append(f"{key}={json.dumps(plain)}")
        except TypeError as e:
            raise UsageError(f"{key} cannot be written in a recipe: {e}", where=key, fix="give plain values") from e
    return changes


@contextmanager
def _heard(listener: Listener | None) -> Iterator[None]:
    from compress.run import progress

    before, progress.listener = progress.listener, listener
    try:
        yield
    finally:
        progress.listener = before
