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
        report: as report.json in the run folder.
        folder: the run folder: the same call goes on there.
        network: FILE.py:FUNCTION that builds the network, where the caller named one or gave a network in memory.
    """

    report: Facts
    folder: Path
    network: str | None = None

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
        return load(self.saved, network=self.network)


@dataclass(frozen=True)
class Swept:
    """What `sweep` has made.

    Attributes:
        facts: as sweep.json in the folder: points, entries (one model in one precision), and of every axis the Pareto
            front and the knee, as places in the entries.
        folder: the sweep's: the same call goes on there.
    """

    facts: Facts
    folder: Path

    def pick(self, point: str = "knee", *, progress: Listener | None = None) -> Result:
        """Finishes a point where it lies, to its release: what `prune` with its budget alone makes, to the byte.

        Args:
            point: its name (``25%``, ``size<=0.8x``), or ``knee``: of the first axis that has one.
        """
        from compress.verbs.sweep import pick

        with _heard(progress):
            found, report = pick(self.folder, point)
        return Result(report, self.folder / found.folder)


def prune(
    model: Any,
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    network: str | None = None,
    fresh: bool = False,
    until: str = "release",
    settings: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
    **overrides: Any,
) -> Result:
    """Prunes a model, saves it, checks it, exports it, measures it and writes its card, as `compress prune` does.

    The same call goes on where an earlier one was stopped. One process; the command line starts many.

    Args:
        model: a name (`compress list models`), a hub id, a folder, FILE.py:FUNCTION of a network; or a model in memory,
            whose weights are saved first (to ``OUT-dense``): a transformers causal language model with its
            ``tokenizer``, or any other torch module. A module's weights are the start; it is trained further where the
            recipe's ``train.epochs`` say so (0: they are taken as they are). Or a `compress.Job`: a network with its
            own data, training and measures; FILE.py:NAME may be one too.
        network: what builds a torch module again in a clean process, with the recipe's ``arguments``: FILE.py:FUNCTION
            or a name of `compress list models`; by default the module's class, or the function that a job's ``network``
            is, in the file where it stands. That it builds the same network is checked, by its layers and its outputs.
        recipe: a name (`compress list recipes`) or a YAML file.
        out: the run folder; ``runs/MODEL-RECIPE`` where it is not given.
        fresh: forgets what an earlier run left in ``out``.
        until: the stage to stop behind, one of `compress.schema.stages.STAGES`.
        settings: keys of the recipe by their path, such as ``{"tyr.search.windows": 8}``.
        progress: called with (label, steps done, steps in all) while something is counted.
        overrides: keys at the recipe's top: ``sparsity=0.5``, ``budget=["size<=0.8x"]``, ``bench=None``.

    Raises:
        CompressError: anything that keeps the promise from being kept; `UsageError` where the call is wrong.
    """
    from compress.pipeline import prune as run
    from compress.schema.stages import STAGES
    from compress.verbs.in_memory import Named, held, named

    if until not in STAGES:
        raise UsageError(f"unknown stage {until!r}", where="until", fix=f"one of: {', '.join(STAGES)}")
    if out is None and not isinstance(model, str | Path):
        raise UsageError("a model in memory has no name", where="out", fix="give out, the run folder")
    folder = Path(out) if out is not None else Path("runs") / f"{Path(model).name}-{Path(recipe).stem}"
    changes = _changes({**(settings or {}), **overrides})
    if isinstance(model, str | Path):
        _no_network(network)
        meant = Named(str(model), network=str(model) if ".py:" in str(model) else None)
    else:
        dense = folder.with_name(f"{folder.name}-dense")
        meant = named(model, dense, str(recipe), changes, tokenizer=tokenizer, network=network)
    changes += meant.changes
    words = ["compress", "prune", meant.name, "--recipe", str(recipe), "--out", str(folder)]
    command = shlex.join([*words, *(word for change in changes for word in ("--set", change))])
    with _heard(progress), held(meant):
        report = run(meant.name, str(recipe), folder, changes, fresh=fresh, until=until, command=command, ask=meant.ask)
    return Result(report, folder, meant.network if meant.network and ".py:" in meant.network else None)


def plan(
    model: Any,
    recipe: str | Path,
    *,
    tokenizer: Any = None,
    network: str | None = None,
    on: str = "this-machine",
    settings: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Facts:
    """What `prune` would do, without a weight being read: budget, shapes, and memory, disk and time by stage.

    Args:
        model, tokenizer, network: as for `prune`.
        on: the machine that is asked about: ``8xh100``, a YAML file, ``this-machine``.
    """
    from compress.verbs.common import plan as run
    from compress.verbs.in_memory import for_a_while, held

    changes = _changes({**(settings or {}), **overrides})
    if isinstance(model, str | Path):
        _no_network(network)
        return run(str(model), str(recipe), changes, on)
    with for_a_while(model, str(recipe), changes, tokenizer=tokenizer, network=network) as meant, held(meant):
        return run(meant.name, str(recipe), [*changes, *meant.changes], on)


def sweep(
    model: str | Path,
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    at: Sequence[float | str] = (),
    budgets: Sequence[str | Sequence[str]] = (),
    precisions: Sequence[str] = (),
    rivals: Sequence[str] = (),
    until: str | None = None,
    fresh: bool = False,
    settings: Mapping[str, Any] | None = None,
    progress: Listener | None = None,
    **overrides: Any,
) -> Swept:
    """Prunes a model to many budgets that share their work, and says which is best for what it takes.

    Every point is a run in a folder of its own in ``out``; a stage that two of them have in common is made once. The
    same call goes on where an earlier one was stopped.

    Args:
        model: a name, a hub id, a folder or FILE.py:FUNCTION, as for `prune`.
        recipe: a name or a YAML file.
        out: the sweep's folder; ``runs/MODEL-RECIPE-sweep`` where it is not given.
        at: shares that go, a point each: ``0.25`` or ``"25%"``; of ``pagcp`` the share of FLOPs.
        budgets: a point each: ``"size<=0.8x"``, or a list of those that hold together.
        precisions: of GGUFs that every point and the dense model are built in; ``rivals``: the dense model alone.
        until: the stage that every point is taken to; by default the first that measures all that is asked for.
        fresh, settings, progress, overrides: as for `prune`.

    Raises:
        CompressError: a point cannot be made, it is named; `UsageError` where the call is wrong.
    """
    from compress.verbs.sweep import order
    from compress.verbs.sweep import sweep as run

    if not isinstance(model, str | Path):
        raise UsageError("a model in memory is not swept", where="model", fix="save it, and name its folder")
    folder = Path(out) if out is not None else Path("runs") / f"{Path(model).name}-{Path(recipe).stem}-sweep"
    together = [one if isinstance(one, str) else ",".join(one) for one in budgets]
    asked = order(
        str(model), str(recipe), _changes({**(settings or {}), **overrides}), at=[str(one) for one in at],
        budgets=together, precisions=precisions, rivals=rivals, until=until,
    )  # fmt: skip
    with _heard(progress):
        made = run(asked, folder, fresh=fresh)
    return Swept(made.facts(), folder)


def evaluate(model: Any, *, like: str | Path | None = None, tokenizer: Any = None, **options: Any) -> Facts:
    """Perplexity of a language model, or a network's figures, on what the run ``like`` held out.

    Args:
        model: a folder, a name, or a model in memory: a transformers one with its ``tokenizer``, or a torch module.
        options: ``text=[FILE, ...]``, ``dialogues=[FILE, ...]``, ``windows``, ``length``, ``task=[NAME, ...]``,
            ``network``.
    """
    from compress.verbs import in_memory
    from compress.verbs.common import evaluate as run

    run_of = Path(like) if like is not None else None
    if isinstance(model, str | Path):
        return run(str(model), run_of, **options)
    if in_memory.is_network(model):
        _no_options(options)
        return in_memory.evaluate_network(model, run_of)
    with in_memory.saved_text(model, tokenizer) as folder:
        return run(folder, run_of, **options) | {"model": type(model).__name__}


def export(
    model: Any,
    out: str | Path,
    formats: Sequence[Any] = (),
    *,
    like: str | Path | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Facts:
    """Exports a model to ONNX, checked against torch; ``out`` appears only when every check has passed. Where GGUF
    alone is asked for, there is no ONNX.

    Args:
        model: a folder, a name, an ONNX file, or a model in memory: a transformers one with its ``tokenizer``, or a
            torch module, which is then checked on samples that the run ``like`` held out.
        formats: `compress.exporters.formats.BuildOptions` of what is to be made beside it.
        like: a run, whose data sets the scales of int8 and judges the formats of a network, and on whose held-out text
            a GGUF is compared.
        options: ``network``.
    """
    from compress.verbs import in_memory
    from compress.verbs.common import export as run

    run_of = Path(like) if like is not None else None
    if isinstance(model, str | Path):
        return run(str(model), Path(out), list(formats), like=run_of, **options)
    if in_memory.is_network(model):
        _no_options(options)
        return in_memory.export_network(model, Path(out), run_of, formats)
    with in_memory.saved_text(model, tokenizer) as folder:
        return run(folder, Path(out), list(formats), like=run_of, **options) | {"model": type(model).__name__}


def bench(dense: str | Path, pruned: str | Path, *, target: str | None = None, **options: Any) -> Facts:
    """Latency and memory of two export folders, measured in turn in fresh processes; times in seconds.

    Args:
        options: ``processes``, ``threads``; ``prompt`` and ``context`` of a language model; ``batch`` of a network, or
            ``inputs``: an .npz file with an array for each input, which both are given.
    """
    from compress.verbs.common import bench as run

    if options.get("inputs") is not None:
        options["inputs"] = Path(options["inputs"])
    return run(Path(dense), Path(pruned), target, **options)


def generate(
    artefact: str | Path,
    text: str,
    *,
    tokens: int = 64,
    chat: bool = False,
    dense: bool = False,
    tokenizer: str | Path | None = None,
) -> Facts:
    """Goes on with a text in the artefact's own runtime, as `compress run` does: the likeliest tokens, timed once.

    Args:
        artefact: a model, run or release folder, or a name (torch); an export folder (ONNX Runtime); a folder of
            ``--format genai`` (ONNX Runtime GenAI); a GGUF, or a folder with one (llama.cpp).
        tokens: that are generated at most.
        chat: the text is what a person says, and goes through the chat template.
        dense: of a run folder, its dense export and its pruned one.
        tokenizer: a model's folder, for an export that has none beside it, and for the chat template of a GGUF.

    Returns:
        ``results``: by name (``model``, or ``dense`` and ``pruned``) ``text``, ``tokens``, ``prompt_tokens``,
        ``ended``, ``runtime``, ``ttft`` (seconds) and ``rate`` (tokens per second behind the first, in this one run).
    """
    from compress.verbs.generate import run

    folder = Path(tokenizer) if tokenizer is not None else None
    return run(str(artefact), text, tokens=tokens, chat=chat, dense=dense, tokenizer=folder)


def gate(baseline: str | Path, candidate: str | Path, budgets: Sequence[str], **options: Any) -> Facts:
    """Whether a candidate keeps its budgets against a baseline: ``verdict`` is pass, fail or inconclusive.

    Args:
        budgets: such as ``latency<=1.05x``, ``size<=0.7x``.
        options: ``inputs``, an .npz file with an array for each input of a network, which both are given; and the
            command line's others.
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
        model: a folder of `prune`, or a name.
        network: FILE.py:FUNCTION, where the network is code of yours; no code of the folder is run.

    Raises:
        CompressError: there is none, or it is not whole.
    """
    from compress.models.saved import find

    if not isinstance(model, str | Path):
        raise UsageError(f"a {type(model).__name__} is no folder", where="model", fix="name the folder of a saved one")
    kind, folder = find(str(model))
    if kind == "network":
        from compress.networks.reload import check_named, reload

        check_named(folder, network)
        return reload(folder, network).model
    from compress.models.families import family_for
    from compress.models.reading import check_weights, load_config, load_model

    check_weights(folder)
    return load_model(folder, family_for(load_config(folder)))


def _no_network(network: str | None) -> None:
    if network is not None:
        raise UsageError(
            "network says what builds a module in memory, and a name is given", where="network", fix="leave it out"
        )


def _no_options(options: Mapping[str, Any]) -> None:
    if options:
        raise UsageError(f"{next(iter(options))} is not for a network in memory", where="model", fix="leave it out")


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
