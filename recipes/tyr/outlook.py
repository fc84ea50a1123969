"""What `prune` would do with Týr, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.schema.recipe import Recipe

if TYPE_CHECKING:
    from compress.language.setup import Setup
    from compress.recipes.tyr.choice import Job

# The paper's own figures (arXiv 2503.09657): supernet on disk, GPU memory of the whole process, and hours of search
# reckoned from its 190 s a generation.
PAPER: dict[str, dict[str, float]] = {
    "llama-70b": {"supernet_bytes": 414.7e9, "gpu_bytes": 140e9},
    "llama-8b": {"supernet_bytes": 39.6e9, "search_seconds": 10.6 * 3600},
    "llama-2-7b": {"supernet_bytes": 39.6e9},
    "mistral-7b": {"supernet_bytes": 39.6e9},
}


LOADS_RAGGED = {
    "per-layer": "transformers with trust_remote_code=True; ONNX Runtime",
    "padded": "any server that knows the family, without the gain in speed",
}
LOADS_STOCK = {"stock": "whatever knows the family, with its own classes and at full speed"}


def forecast(model: str, recipe: Recipe, on: str = "this-machine") -> dict[str, Any]:
    """Shapes, budget, disk, memory and time stage by stage, and what will load the model.

    Args:
        on: the machine that is asked about; see `compress.run.machines`.
    """
    from compress.language.setup import RESIDENT_SHARE, outline
    from compress.models.families.base import one_or_all
    from compress.recipes.tyr.choice import check_budget
    from compress.recipes.tyr.forecast import reference_token_layers, shape_of, stages
    from compress.recipes.tyr.stages import job_for, say_kept
    from compress.run.forecast import forecast
    from compress.run.machines import find_machine

    machine = find_machine(on, Path("runs"))
    setup = outline(model, recipe)
    job = job_for(setup, None, {})
    if job.clock is not None:
        job = _by_a_known_table(job)
    with _by_what_table(job):
        target = check_budget(job)
    if recipe.budget:
        say_kept(job)
    g, costs, options = setup.geometry, setup.costs, recipe.options
    shared = recipe.memory.shard and machine.world > 1
    streamed = shared or recipe.memory.stream
    if streamed is None:
        free = machine.memory if machine.gpu else machine.ram / machine.count
        streamed = 4 * costs.total > RESIDENT_SHARE * free
    gpu = machine.memory if machine.gpu else None
    reckoned = stages(shape_of(setup, machine.world, streamed, gpu, job.sparsity), job)
    dense = costs.total * setup.stored_dtype.itemsize
    found = forecast(reckoned, machine, dense)
    return {
        "method": recipe.method,
        "model": setup.resolved.name,
        "source": setup.resolved.source,
        "family": setup.family.name,
        "shapes": g.facts(),
        **_whole_facts(setup),
        "backbone_parameters": costs.backbone,
        "total_parameters": costs.total,
        **({"budgets": _budgets(setup, job)} if recipe.budget else {"remove": target}),
        "units": {
            "kv_group_parameters": one_or_all([block.attention(1, block.geometry.group) for block in costs.blocks]),
            "neuron_parameters": costs.neuron,
            "neurons_round_to": options.round_to,
        },
        **(
            {}
            if recipe.budget
            else {
                "after": {
                    "total_parameters": costs.total - target,
                    "bytes": (costs.total - target) * setup.stored_dtype.itemsize,
                }
            }
        ),
        "dense_bytes": dense,
        "streamed": streamed,
        "sharded": shared,
        **found,
        "supernet_bytes": sum(s.kept for s in reckoned if s.name.startswith("supernet")),
        "reference": PAPER.get(model, {}) | {"token_layers": reference_token_layers(g.layers)},
        "iterations": options.iterations,
        "loads_with": LOADS_STOCK if options.shape == "stock" else LOADS_RAGGED,
    }


def _by_a_known_table(job: Job) -> Job:
    """The job with the limits of its times, where a run has measured such shapes on this machine."""
    from compress.language.tables import priced
    from compress.recipes.tyr.forecast import implied

    assert job.clock is not None  # asked by the caller
    found = priced(job.clock)
    if found is None:
        return job
    limits, told = found
    job = replace(job, limits=(*job.limits, *limits), told=told)
    return replace(job, sparsity=implied(job))


@contextmanager
def _by_what_table(job: Job) -> Iterator[None]:
    """A budget of a time that is refused by an earlier run's table says so."""
    try:
        yield
    except CompressError as e:
        told = [row for text, row in job.told.items() if text in e.where]
        if told:
            e.fix += (
                f" (by a table measured here on {told[0]['measured_on']}; without {told[0]['kept']} plan knows none)"
            )
        raise


def _budgets(setup: Setup, job: Job) -> list[dict[str, Any]]:
    """What is asked of every budget, and the least there is; a time that no table prices is priced when the run
    starts."""
    from compress.language.limits import parse
    from compress.recipes.tyr.choice import smallest
    from compress.recipes.tyr.last_pass import budget_rows

    known = {row["budget"]: row for row in budget_rows(job, smallest(job))}
    budgets = parse(setup.recipe.budget or (), setup.recipe.bench)
    return [
        {k: v for k, v in known[b.text].items() if k != "table"}
        if b.text in known
        else {"budget": b.text, "figure": b.figure, "length": b.length, "unit": "seconds"}
        for b in budgets
    ]


def _whole_facts(setup: Setup) -> dict[str, Any]:
    """What of the model is never cut, in words, where there is anything."""
    whole = setup.family.whole(setup.config)
    reasons = dict.fromkeys((w.sublayer, w.reason) for w in whole)
    lines = [
        f"{kind} of {_blocks([w.block for w in whole if (w.sublayer, w.reason) == (kind, why)], setup)}: {why}"
        for kind, why in reasons
    ]
    return {"whole": lines} if lines else {}


def _blocks(at: list[int], setup: Setup) -> str:
    layers = setup.geometry.layers
    return "every block" if len(at) == layers else f"{len(at)} of {layers} blocks"
