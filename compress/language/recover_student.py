"""The model that recovery trains: sliced, with low-rank updates or in full, and its weights as a plan names them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.language.plan import Plan
from compress.models import decoder
from compress.processes.distributed import empty_weights
from compress.schema.recipe import RecoverSection

if TYPE_CHECKING:
    from torch import Tensor

    from compress.language.setup import Setup
    from compress.models.families.base import Family


def student(setup: Setup, plan: Plan, there: Any = "cpu", empty: bool = False) -> Any:
    """The sliced model on the device ``there``, sharing no tensor with the dense one, with low-rank updates where the
    recipe asks for them; what is to be trained wants a gradient, nothing else does. ``empty``: without weights."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    spec = setup.recipe.recover
    assert spec is not None  # asked by the caller
    if empty:
        with empty_weights():
            model = AutoModelForCausalLM.from_config(setup.config, dtype=torch.float32)
        model.tie_weights()
        plan.apply(model, setup.family)
        model.eval()
    else:
        pruned = setup.pruned(plan)[0]
        # One at a time: where the dense model is streamed, a block is there only as long as it is looked at.
        blocks = [copy.deepcopy(block).to(there) for block in decoder.blocks(pruned)]
        with decoder.without_blocks(pruned):
            model = copy.deepcopy(pruned).to(there)
        decoder.put_blocks(model, nn.ModuleList(blocks))
    model.requires_grad_(False)
    if spec.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(decoder.block_of(name) is not None or name == decoder.norm_weight(model))
        return model
    from peft import LoraConfig, inject_adapter_in_model

    names = _target_names(model, spec)
    if not names:
        raise CompressError(
            "the plan leaves none of the layers that are to be trained", where="recover.targets", fix="name others"
        )
    alpha = spec.alpha if spec.alpha is not None else 2.0 * spec.rank
    config = LoraConfig(r=spec.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(setup))
        inject_adapter_in_model(config, model)
    # Adapters are in the mode they were made in; there is no dropout to switch on.
    return model.eval()


def _target_names(model: Any, spec: RecoverSection) -> list[str]:
    from torch import nn

    return [
        name
        for name, module in model.named_modules()
        if decoder.block_of(name) is not None
        and isinstance(module, nn.Linear)
        and (spec.targets is None or name.rsplit(".", 1)[-1] in spec.targets)
    ]


def trained_weights(model: Any) -> dict[str, Any]:
    """The weights of a `student` that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seed_of(setup: Setup) -> int:
    """The recovery's own seed, or the recipe's."""
    spec = setup.recipe.recover
    return setup.recipe.seed if spec is None or spec.seed is None else spec.seed


def merged(model: Any, spec: RecoverSection, family: Family) -> dict[str, Tensor]:
    """The trained weights of a `student` under the names they have in a plan; low-rank updates are added in."""
    if spec.method == "full":
        found = {name: p.detach() for name, p in trained_weights(model).items()}
    else:
        from peft.tuners.lora import LoraLayer

        found = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                layer: Any = module
                layer.merge()
                found[f"{name}.weight"] = layer.get_base_layer().weight.detach()
    return {_plan_name(name, decoder.norm_weight(model), family): tensor for name, tensor in found.items()}


def _plan_name(name: str, norm: str, family: Family) -> str:
    if name == norm:
        return "norm"
    place = decoder.block_of(name)
    assert place is not None  # only what lies in blocks is trained beside the last norm
    block, inside = place
    return f"blocks.{block}.{family.short_names.get(inside, inside)}"
