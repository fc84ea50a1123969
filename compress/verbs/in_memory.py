"""Models in memory, for verbs that take a name: saved where a clean process can load them, with what builds them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.job import Job
from compress.errors import CompressError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.networks.reload import Reloaded


@dataclass(frozen=True)
class Named:
    """A model as the command line would name it: the name, recipe keys beside it (``key=value``), and what is to be
    asked of the run's set-up. ``network`` is what builds a network."""

    name: str
    changes: tuple[str, ...] = ()
    network: str | None = None
    ask: Callable[[Any], None] | None = None
    job: Job | None = None


@contextmanager
def held(meant: Named) -> Iterator[None]:
    """Within it a job in memory is found by its name."""
    from compress.models.zoo import given

    with given(meant.name, meant.job) if meant.job is not None else nullcontext():
        yield


def is_network(model: Any) -> bool:
    """Whether this is a torch module that is no transformers model.

    Raises:
        UsageError: it is neither.
    """
    from torch import nn
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a {type(model).__name__} is no model", where="model", fix="give a name, a folder or a torch module"
        )
    return not isinstance(model, PreTrainedModel)


def named(
    model: Any, folder: Path, recipe: str, changes: Sequence[str], *, tokenizer: Any = None, network: str | None = None
) -> Named:
    """A name for a model in memory, whose weights are saved in ``folder``, or lie there already.

    Args:
        tokenizer: of a language model.
        network: FILE.py:FUNCTION or a name of `compress list models`, which builds a network; by default its class.

    Raises:
        UsageError: it cannot be built again, the recipe is for another kind, or ``folder`` holds another model.
    """
    if isinstance(model, Job):
        return _named_job(model, recipe, changes, network)
    if not is_network(model):
        if network is not None:
            raise UsageError("this is a language model", where="network", fix="leave it out")
        if tokenizer is None:
            raise UsageError("the model's text needs its tokenizer", where="tokenizer", fix="give it")
        _save(folder, model.state_dict(), partial(_save_text, model, tokenizer))
        return Named(str(folder))
    from compress.networks.live import check_same, code_of, tensors_of

    _for_networks(recipe, changes)
    own = network if network is not None else code_of(model)
    _check_name(own)
    made = _save(folder, tensors_of(model), partial(_save_network, model))

    def ask(setup: Any) -> None:
        try:
            check_same(setup, model)
        except CompressError:
            if made:
                shutil.rmtree(folder)
            raise

    return Named(own, (f"weights={folder / 'model.safetensors'}",), own, ask)


def _named_job(job: Job, recipe: str, changes: Sequence[str], network: str | None) -> Named:
    """A job in memory by what builds its network, which is asked to build the same one before anything is written."""
    from torch import nn

    from compress.networks.live import code_of, function_code

    _for_networks(recipe, changes)
    own = network
    if own is None:
        own = code_of(job.network) if isinstance(job.network, nn.Module) else function_code(job.network)
    if ".py:" not in own:
        raise UsageError(
            f"{own!r} builds none of a job's networks", where="network", fix="name FILE.py:FUNCTION, without arguments"
        )

    def ask(setup: Any) -> None:
        from compress.models.zoo import build
        from compress.networks.live import check_alike

        check_alike(setup.build().cpu(), build(own, {}), own)

    return Named(own, network=own, ask=ask, job=job)


def _check_name(network: str) -> None:
    """Raises UsageError where a name leads nowhere: before anything is written."""
    if ".py:" in network:
        from compress.models.zoo import function

        function(network)
    else:
        from compress.models.sources import network_alias

        network_alias(network)


@contextmanager
def for_a_while(
    model: Any, recipe: str, changes: Sequence[str], *, tokenizer: Any = None, network: str | None = None
) -> Iterator[Named]:
    """`named`, in a folder that is gone behind the block."""
    with tempfile.TemporaryDirectory() as place:
        yield named(model, Path(place) / "model", recipe, changes, tokenizer=tokenizer, network=network)


@contextmanager
def saved_text(model: Any, tokenizer: Any) -> Iterator[str]:
    """The folder of a language model in memory, gone behind the block."""
    if tokenizer is None:
        raise UsageError("the model's text needs its tokenizer", where="tokenizer", fix="give it")
    with tempfile.TemporaryDirectory() as place:
        _save_text(model, tokenizer, Path(place))
        yield place


def evaluate_network(model: nn.Module, like: Path | None) -> dict[str, Any]:
    """`compress.verbs.network.evaluate` of a network in memory, whose inputs are normalised as the run's are."""
    from compress.networks import train
    from compress.networks.live import judged
    from compress.networks.run_data import run_data

    data = run_data(_run(like, "eval"))
    with judged(model):
        try:
            found = train.evaluate(model, data, data.test)
        except RuntimeError as e:
            raise _strange(e, like) from e
    return {
        "kind": "network",
        "model": type(model).__name__,
        "like": str(like),
        "data": {"source": data.source, "sha256": data.sha256},
        "tasks": {name: {**figures, "samples": len(data.test)} for name, figures in found.items()},
    }


def export_network(model: nn.Module, out: Path, like: Path | None, builds: Sequence[Any]) -> dict[str, Any]:
    """`compress.verbs.network.export` of a network in memory, checked on samples that the run ``like`` held out."""
    from compress.run.written import whole
    from compress.verbs.network import export_loaded

    with whole(out) as made:
        loaded = _with_samples(model, _run(like, "export"))
        facts = export_loaded(loaded, made, like=like, builds=builds)
    return {"model": type(model).__name__, "out": str(out), "kind": "network", **facts}


def _with_samples(model: nn.Module, like: Path) -> Reloaded:
    """A copy of the network on the CPU, with held-out samples of a run that it takes."""
    import copy

    import torch

    from compress.data.tasks import by_task
    from compress.networks.reload import Reloaded
    from compress.networks.run_data import run_data
    from compress.schema.sections import NetworkExport

    data, own = run_data(like), copy.deepcopy(model).cpu().eval()
    x = data.prepare(data.test.inputs[torch.arange(min(NetworkExport().samples, len(data.test)))])
    try:
        with torch.no_grad():
            by_task(own(x), data.tasks)
    except RuntimeError as e:
        raise _strange(e, like) from e
    return Reloaded(own, {"tasks": [t.facts() for t in data.tasks]}, x, {})


def _run(like: Path | None, verb: str) -> Path:
    if like is None:
        raise UsageError("a network in memory comes with no data", where=verb, fix="name a run on its data: like=RUN")
    return like


def _strange(error: RuntimeError, like: Path | None) -> CompressError:
    return CompressError(
        f"the network does not take the run's data: {str(error).splitlines()[0]}",
        where=str(like),
        fix="name a run on the data that it was trained for",
    )


def _for_networks(recipe: str, changes: Sequence[str]) -> None:
    """Raises UsageError where a recipe is wrong, is for language models, or names weights beside those in memory."""
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_recipe
    from compress.schema.sections import NetworkRecipe

    found = load_recipe(recipe, METHODS, changes)
    if not isinstance(found, NetworkRecipe):
        raise UsageError(
            "the recipe is for language models, and this is a network",
            where=recipe,
            fix="take one for networks, such as global-mp-network or pagcp (`compress list recipes`)",
        )
    if any(change.startswith("weights=") and change != "weights=null" for change in changes):
        raise UsageError(
            "weights are named beside those in memory", where="weights", fix="leave them out, or load them first"
        )


def _save(folder: Path, state: Mapping[str, Tensor], write: Callable[[Path], None]) -> bool:
    """Writes a model into a folder by one rename; where one lies there already, it must be the same.

    Returns:
        Whether it was written.
    """
    from compress.run.written import whole

    if folder.exists():
        _same(state, folder)
        return False
    with whole(folder) as made:
        write(made)
    return True


def _save_text(model: Any, tokenizer: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    from compress.models.folder import GENERATION

    # Settings that transformers reads and refuses to save, such as a temperature without sampling, stay as they are.
    kept = getattr(model, "generation_config", None)
    if kept is None:
        model.save_pretrained(folder)
    else:
        try:
            model.generation_config = GenerationConfig()
            model.save_pretrained(folder)
        finally:
            model.generation_config = kept
        kept.to_json_file(folder / GENERATION, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def _save_network(model: nn.Module, folder: Path) -> None:
    from compress.networks.setup import WEIGHTS, save_weights

    save_weights(model, folder / WEIGHTS)


def _same(state: Mapping[str, Tensor], folder: Path) -> None:
    """Raises UsageError where a folder holds other weights than the model in memory."""
    import torch
    from safetensors import safe_open

    from compress.models.reading import weight_files

    def same(one: Tensor, other: Tensor) -> bool:
        return one.dtype == other.dtype and torch.equal(one, other.cpu())

    # transformers writes tied weights once.
    missing = set[str]() if (folder / "config.json").exists() else set(state)
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it has keys() alone)
                if name not in state or not same(file.get_tensor(name), state[name]):
                    raise _another(folder, name)
                missing.discard(name)
    if missing:
        raise _another(folder, min(missing))


def _another(folder: Path, name: str) -> UsageError:
    return UsageError(f"another model lies there: {name} differs", where=str(folder), fix="give another out")
