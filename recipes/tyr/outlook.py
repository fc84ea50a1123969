"""What `prune` would do with Týr, without reading a weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def _budgets(setup: Setup, job: Job) -> list[dict[str, Any]]:
    """What is asked of every budget, and the least there is; a time is priced when the run starts."""
    from compress.language.limits import TIMES, parse
    from compress.recipes.tyr.choice import smallest
    from compress.recipes.tyr.last_pass import budget_rows

    known = {row["budget"]: row for row in budget_rows(job, smallest(job))}
    budgets = parse(setup.recipe.budget or (), setup.recipe.bench)
    return [
        {k: v for k, v in known[b.text].items() if k != "table"}
        if b.figure not in TIMES
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
