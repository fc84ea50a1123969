"""Every row of the paper's table of recipes is there, with the table's own values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.models.sources import network_alias
from compress.models.zoo import build
from compress.pipeline import METHODS
from compress.recipes.global_mp.fastgrnn import kept_columns
from compress.recipes.global_mp.network import budget, prunable
from compress.schema.recipe import load_recipe, recipe_names

# (model, sparsity, epochs, batch, momentum, weight decay, rate, warm-up, smoothing, nesterov, MT in per cent)
ONE_SHOT = {
    "resnet50-one-shot-80": ("resnet50-imagenet", 0.8, 100, 256, 0.875, 2.3e-5, 0.0256, 5, 0.1, False, 0),
    "resnet50-one-shot-90": ("resnet50-imagenet", 0.9, 100, 256, 0.875, 7e-6, 0.1024, 0, 0.1, False, 0),
    "resnet50-one-shot-95.3": ("resnet50-imagenet", 0.953, 100, 256, 0.95, 0, 0.0512, 0, 0.05, False, 0),
    "resnet50-one-shot-98.05": ("resnet50-imagenet", 0.9805, 100, 256, 0.95, 0, 0.0512, 0, 0.05, False, 0),
    "mobilenet-v1-75": ("mobilenet-v1-imagenet", 0.7528, 120, 256, 0.875, 1e-5, 0.0512, 0, 0.1, False, 0),
    "mobilenet-v1-90": ("mobilenet-v1-imagenet", 0.9, 120, 256, 0.875, 1e-5, 0.0256, 0, 0.1, False, 0),
    "mobilenet-v1-90-mt": ("mobilenet-v1-imagenet", 0.9, 120, 256, 0.875, 0, 0.0512, 0, 0.1, False, 0.2),
    "wrn-28-8-90": ("wrn-28-8-cifar10", 0.9, 200, 128, 0.9, 0, 0.0512, 0, 0, True, 0),
    "wrn-28-8-95": ("wrn-28-8-cifar10", 0.95, 200, 128, 0.9, 2e-5, 0.0256, 0, 0, True, 0),
    "wrn-28-8-97.5": ("wrn-28-8-cifar10", 0.975, 200, 128, 0.9, 0, 0.0128, 0, 0, True, 0),
    "resnet32-90": ("resnet32-cifar10", 0.9, 300, 128, 0.9, 1e-3, 0.01, 0, 0, False, 0),
    "resnet32-95": ("resnet32-cifar10", 0.95, 300, 128, 0.9, 1e-5, 0.01, 0, 0, False, 0),
}
GRADUAL = {f"resnet50-gradual-{100 * s:g}": s for s in (0.8, 0.9, 0.953, 0.9805)}
FASTGRNN = {"fastgrnn-9-8": (9, 8), "fastgrnn-9-7": (9, 7), "fastgrnn-8-7": (8, 7)}
# Not rows of the table, but of the text on layer collapse: (model, sparsity, MT in per cent).
COLLAPSE = {
    "mobilenet-v2-98-mt": ("mobilenet-v2-cifar10", 0.98, 0.02),
    "wrn-22-8-99.9": ("wrn-22-8-cifar10", 0.999, 0),
}
MINE = {"demo", "fastgrnn-watch"}


def recipe(stem: str) -> Any:
    return load_recipe(f"global-mp-{stem}", METHODS)


@pytest.mark.parametrize("stem", ONE_SHOT)
def test_a_one_shot_row_holds_the_papers_values(stem: str) -> None:
    _, sparsity, epochs, batch, momentum, decay, rate, warm, smoothing, nesterov, mt = ONE_SHOT[stem]
    found = recipe(stem)
    tune = found.finetune
    assert (found.sparsity, tune.epochs, tune.batch, tune.momentum) == (sparsity, epochs, batch, momentum)
    assert (tune.weight_decay, tune.lr, tune.warmup_epochs) == (decay, rate, warm)
    assert (tune.label_smoothing, tune.nesterov, tune.optimizer) == (smoothing, nesterov, "sgd")
    assert found.options.schedule == "one-shot" and found.options.floor == pytest.approx(mt / 100)


@pytest.mark.parametrize("stem", GRADUAL)
def test_a_gradual_row_trains_as_the_papers_dense_network(stem: str) -> None:
    found = recipe(stem)
    train = found.train
    assert (found.sparsity, found.options.schedule, found.finetune) == (GRADUAL[stem], "gradual", None)
    assert (train.epochs, train.batch, train.momentum, train.weight_decay) == (100, 256, 0.875, 3.1e-5)
    assert (train.lr, train.warmup_epochs, train.label_smoothing) == (0.256, 5, 0.1)


@pytest.mark.parametrize("stem", FASTGRNN)
def test_a_fastgrnn_row_asks_for_the_papers_ranks(stem: str) -> None:
    found = recipe(stem)
    assert tuple(found.options.ranks[k] for k in ("r_W", "r_U")) == FASTGRNN[stem]
    assert found.finetune.epochs == 300 and found.finetune.optimizer == "adam" and 0.5 <= found.finetune.lr <= 0.55
    model = build("fastgrnn", network_alias("fastgrnn-har2").arguments)
    assert {k: len(v) for k, v in kept_columns(model, found.options.ranks).items()} == dict(found.options.ranks)


@pytest.mark.parametrize("stem", [*ONE_SHOT, *GRADUAL, *COLLAPSE])
def test_a_row_can_be_met_on_its_own_network_to_the_weight(stem: str) -> None:
    name = ONE_SHOT[stem][0] if stem in ONE_SHOT else COLLAPSE[stem][0] if stem in COLLAPSE else "resnet50-imagenet"
    alias, found = network_alias(name), recipe(stem)
    with torch.device("meta"):
        weights = prunable(build(alias.network, alias.arguments))
    prune, floors = budget(weights, found.sparsity, found.options)
    total = sum(w.numel() for w in weights.values())
    assert abs(prune - found.sparsity * total) <= 0.5
    mt = ONE_SHOT[stem][-1] if stem in ONE_SHOT else COLLAPSE[stem][-1] if stem in COLLAPSE else 0
    for layer, weight in weights.items():
        # sigma = N_total * mt / 100; a smaller layer stays whole
        assert abs(floors[layer] - min(weight.numel(), total * mt / 100)) < 1


def test_no_row_is_missing_and_none_stands_for_nothing() -> None:
    there = {name.removeprefix("global-mp-") for name in recipe_names() if name.startswith("global-mp-")}
    networks = {stem for stem in there if getattr(recipe(stem), "task", "text") == "network"}
    assert networks == {*ONE_SHOT, *GRADUAL, *FASTGRNN, *COLLAPSE, *MINE, "network"}
