"""Stock shapes: every one meets the budget, what goes is found by the search, and stock classes load what is saved."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.errors import CompressError
from compress.language.budget import target_removed
from compress.language.checkpoint import save_model
from compress.language.plan import BlockPlan, Plan
from compress.models.blocks import BlockRunner
from compress.models.families import family_for
from compress.recipes.tyr.choice import Choice, Job, check_budget, removed
from compress.recipes.tyr.search import Evaluator
from compress.recipes.tyr.stock import (
    GONE,
    Levels,
    Shape,
    breeder,
    least,
    measure_blocks,
    shape_found,
    shape_of,
    shapes,
    starts,
    stock_menus,
)
from compress.run.folder import Journal
from compress.schema.recipe import load_recipe
from tests.command import Job as Whole
from tests.command import compress, one_error
from tests.recipes.tyr.small import job_on, small_job, whole_kl, written_supernet
from tests.tiny import ARCHITECTURES, saved_tiny, tiny, tokens, uneven, word_tokenizer

pytestmark = pytest.mark.usefixtures("done_once")

STOCK = ("--set", "tyr.shape=stock", "--set", "layouts=[stock]", "--set", "evaluation.curve=[]", "--set", "bench=null")


def choices_of(job: Job, shape: Shape) -> list[Choice]:
    return [GONE] * shape.gone + [shape.block] * (job.geometry.layers - shape.gone)


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.62])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_shape_is_the_one_nearest_to_the_budget_and_no_other_is_as_near(sparsity: float, kind: str) -> None:
    job = small_job(kind, {"shape": "stock"}, sparsity, num_hidden_layers=6)
    g, target = job.geometry.blocks[0], target_removed(sparsity, job.costs.backbone)
    met = 0
    for groups, per_group, gone in product(range(1, 3), range(1, 6), range(6)):
        every = [Shape(groups, per_group, n, gone) for n in {*range(4, g.ffn, 4), g.ffn}]
        every = [s for s in every if removed(job, choices_of(job, s))]
        away = {s: abs(removed(job, choices_of(job, s)) - target) for s in every}
        half = 2 * job.costs.blocks[0].neuron * (6 - gone)  # of a step of 4 neurons in every block that stays
        found = shape_of(job, (groups, per_group), gone)
        assert (found is None) == (min(away.values()) > half)
        if found is not None:
            met += 1
            assert away[found] == min(away.values())
    assert met > 5 or (sparsity < 0.1 and met)


def test_the_shapes_on_offer_are_few_and_those_of_a_second_iteration_lie_around_the_first_ones() -> None:
    job = small_job(options={"shape": "stock", "levels": 3}, sparsity=0.4, num_hidden_layers=8)
    first = shapes(job)
    dense = [s for s in first if (s.groups, s.per_group) == (2, 5)]
    assert len(dense) == 3 and dense[0].gone == 0 and dense == sorted(dense, key=lambda s: s.gone)
    assert len({(s.groups, s.per_group) for s in first}) > 3
    near = shapes(job, dense[1])
    assert dense[1] in near and {abs(s.gone - dense[1].gone) for s in near} <= {0, 1, 2}
    assert shape_found(choices_of(job, dense[1])) == dense[1]
    (menu,) = set(stock_menus(job, None))
    assert menu.neurons[0] == 48 and menu.neurons[-1] == 0 and {s.neurons for s in first} <= set(menu.neurons)
    assert menu.heads[0] == (2, 5) and menu.heads[-1] == (0, 0)


def test_a_budget_that_no_shape_meets_and_blocks_that_differ_are_one_error() -> None:
    coarse = {"shape": "stock", "round_to": 48, "attention": False}
    with pytest.raises(CompressError, match="no stock shape removes"):
        shapes(small_job(options=coarse, sparsity=0.1, num_hidden_layers=3))
    model = uneven()
    job = job_on(model, family_for(model.config).costs(model.config), {"shape": "stock"})
    with pytest.raises(CompressError, match="differ in size"):
        shapes(job)
    job = small_job(options={"shape": "stock"})
    whole = replace(job.geometry, blocks=tuple(replace(b, attention_whole=True) for b in job.geometry.blocks))
    with pytest.raises(CompressError, match="never cut"):
        shapes(replace(job, geometry=whole))


class World:
    def __init__(self, folder: Path) -> None:
        self.job = small_job(options={"shape": "stock", "levels": 4}, sparsity=0.5, num_hidden_layers=5)
        self.shapes = shapes(self.job)
        self.supernet = written_supernet(folder, self.job, stock_menus(self.job, None)[0])
        self.levels = Levels(self.supernet, self.job)

    def evaluator(self, path: Path) -> Evaluator:
        job, windows = self.job, self.job.search
        runner = BlockRunner(job.model, job.family, windows.shape[1])
        most = windows.shape[1] - 1
        return Evaluator(runner, self.supernet, windows, positions=most, top_k=299, seed=0, log=Journal(path), tag="a")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("stock"))


def test_what_a_block_costs_is_the_kl_of_whole_models_without_it(world: World, tmp_path: Path) -> None:
    job, g = world.job, world.job.geometry.blocks[0]
    dense = [Choice(g.kv_heads, g.group, g.ffn)] * 5
    losses = measure_blocks(world.evaluator(tmp_path / "a"), world.levels, dense)
    every = BlockPlan(tuple(range(g.heads)), tuple(range(g.ffn)))
    for block, loss in enumerate(losses):
        plan = Plan(tuple(BlockPlan((), ()) if i == block else every for i in range(5)))
        # All positions but each window's last, which the evaluator does not look at.
        job_windows = job.search[:, :-1]
        assert loss == pytest.approx(whole_kl(job, plan, job_windows), rel=2e-3)
    # A block that is gone is put in again, and that is what it brings.
    shape = next(s for s in world.shapes if s.gone)
    some = choices_of(job, shape)
    again = measure_blocks(world.evaluator(tmp_path / "b"), world.levels, some)
    judge = world.evaluator(tmp_path / "c")
    with_it = [shape.block, *some[1:]]
    want = judge.kl(world.levels.genome(some)) - judge.kl(world.levels.genome(with_it))
    assert again[0] == pytest.approx(want, abs=1e-6)


def test_starts_and_offspring_are_stock_shapes_of_the_budget(world: World) -> None:
    losses = [0.5, 0.1, 0.4, 0.2, 0.3]
    assert least(losses, 2) == [1, 3]
    found = starts(world.shapes, losses, world.levels)
    assert len(found) == len(world.shapes) and len(set(found.values())) == len(found)
    every = {
        world.levels.of(shape, gone): (shape, gone)
        for shape in world.shapes
        for gone in product(range(5), repeat=shape.gone)
        if list(gone) == sorted(set(gone))
    }
    for label, genome in found.items():
        shape, gone = every[genome]
        assert str(shape) == label and list(gone) == least(losses, shape.gone)
    breed = breeder(world.shapes, losses, world.levels)
    parent = next(genome for label, genome in found.items() if not label.startswith("0"))
    seen = {parent}
    children = breed(parent, 12, np.random.default_rng(0), seen)
    assert len(children) == len(set(children)) == 12 and seen == {parent, *children}
    assert all(child in every for child in children)
    assert len({every[child][0] for child in children}) > 2 and len({every[child][1] for child in children}) > 4
    again = breeder(world.shapes, losses, world.levels)(parent, 12, np.random.default_rng(0), {parent})
    assert again == children
    # Where there is nothing more it ends.
    assert len(breed(parent, 40, np.random.default_rng(1), seen)) <= 40
    assert seen <= set(every)


def stock_plan(model: Any, gone: tuple[int, ...]) -> Plan:
    """Every block without half of its neurons and one KV group, those ``gone`` without anything."""
    g = family_for(model.config).geometry(model.config).blocks[0]
    draw = torch.Generator().manual_seed(3)
    blocks = []
    for i in range(model.config.num_hidden_layers):
        neurons = torch.randperm(g.ffn, generator=draw)[: g.ffn // 2].sort().values.tolist()
        kept = BlockPlan(tuple(range(g.group)), tuple(neurons))
        blocks.append(BlockPlan((), ()) if i in gone else kept)
    return Plan(tuple(blocks))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_stock_classes_give_what_the_sliced_model_gives(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny(model_type, num_hidden_layers=6, eos_token_id=[2, 5, 6, 7, 8, 9])
    sliced = copy.deepcopy(model)
    family = family_for(model.config)
    plan = stock_plan(model, (0, 3))
    plan.apply(sliced, family)
    save_model(
        sliced,
        family,
        plan.counts(family.geometry(model.config)),
        tmp_path,
        tokenizer=word_tokenizer(tmp_path),
        dtype=torch.float32,
        tokens=tokens(1, 24),
        stock=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and not list(tmp_path.glob("*.py"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 4 and config["eos_token_id"] == [2, 5, 6, 7, 8, 9]
    if getattr(model.config, "layer_types", None):
        assert config["layer_types"] == [model.config.layer_types[i] for i in (1, 2, 4, 5)]
    ids = tokens(2, 30)
    with torch.no_grad():
        want, got = sliced(ids, use_cache=False).logits, loaded(ids).logits
    assert float((want - got).abs().max()) <= 1e-5 * float(want.abs().max())
    assert torch.equal(load_file(tmp_path / "fingerprint.safetensors")["logits"], loaded(tokens(1, 24)).logits)


def test_blocks_that_differ_are_not_saved_as_stock(tmp_path: Path) -> None:
    model = tiny("llama")
    family = family_for(model.config)
    plan = stock_plan(model, (1,))
    plan = Plan((BlockPlan(plan.blocks[0].heads, plan.blocks[0].neurons[:5]), *plan.blocks[1:]))
    plan.apply(model, family)
    counts = plan.counts(family.geometry(tiny("llama").config))
    with pytest.raises(CompressError, match="2 sizes of blocks stay"):
        save_model(
            model, family, counts, tmp_path, tokenizer=word_tokenizer(tmp_path), dtype=torch.float32,
            tokens=tokens(1, 8), stock=True,
        )  # fmt: skip


def test_a_whole_run_ends_in_a_model_that_stock_classes_load(job: Whole, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from compress.report.build import read_report

    model = saved_tiny(tmp_path / "dense", "gemma3_text", num_hidden_layers=5)
    words = ("prune", model, "-r", job.recipe, *STOCK, "--set", "export=null", "--set", "sparsity=0.5")
    # Attention stays whole: with so little else to take, blocks must go.
    ran = compress(*words, "--set", "tyr.attention=false", "--out", tmp_path / "run")
    assert ran.code == 0, ran.err
    report = read_report(tmp_path / "run")
    kept = [(r["heads"], r["kv_heads"], r["neurons"]) for r in report["layers"] if r["heads"]]
    assert len(set(kept)) == 1 and all(r["neurons"] == 0 for r in report["layers"] if not r["heads"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert loaded.config.num_hidden_layers == len(kept) and type(loaded).__name__ == "Gemma3ForCausalLM"
    assert sum(p.numel() for p in loaded.parameters()) == report["size"]["pruned"]["total_parameters"]
    for row in json.loads((tmp_path / "run" / "search-2" / "search.json").read_text())["starts"].values():
        assert row >= 0
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "trust_remote_code" not in card and "from_pretrained" in card
    ran = compress("verify", tmp_path / "run")
    assert ran.code == 0 and " 0 do not hold" in ran.out, ran.out
    again = compress(*words, "--set", "tyr.attention=false", "--out", tmp_path / "run")
    assert again.code == 0 and "search-1" not in again.err


def test_shape_and_layout_must_fit_and_plan_says_what_loads_it(job: Whole) -> None:
    words = ("plan", job.model, "-r", job.recipe)
    for wrong in (("tyr.shape=stock",), ("layouts=[stock]",), ("tyr.shape=stock", "layouts=[stock,padded]")):
        more = [word for text in wrong for word in ("--set", text)]
        one_error(compress(*words, "--set", "evaluation.curve=[]", *more), 2, "do not fit the shape", "shape: stock")
    more = [*STOCK[:4], "--set", "evaluation.curve=[0.5]"]
    one_error(compress(*words, *more), 2, "evaluation.curve", "curve: []")
    ran = compress(*words, "--set", "serve.tensor_parallel=3", "--set", "tyr.round_to=4")
    one_error(ran, 2, "serve.tensor_parallel=3", "tyr.round_to=12")
    one_error(compress(*words, "--set", "serve.tensor_parallel=4"), 1, "2 KV heads in block 0", "serve.tensor_parallel")
    ran = compress(*words, *STOCK, "--set", "serve.tensor_parallel=2")
    assert ran.code == 0 and "loads    stock: " in ran.out, ran.err
    from compress.pipeline import METHODS

    assert load_recipe("tyr-stock", METHODS).options.shape == "stock"


def test_the_budget_is_checked_as_for_other_shapes() -> None:
    """Attention may be kept whole in what stays; that whole blocks go is another matter."""
    for attention in (True, False):
        options = {"shape": "stock", "attention": attention}
        with pytest.raises(CompressError, match="asks to remove"):
            check_budget(small_job(options=options, sparsity=0.999))
        assert check_budget(small_job(options=options, sparsity=0.7)) > 0


def test_a_class_that_builds_no_smaller_blocks_is_refused_before_a_run() -> None:
    from compress.language.checkpoint import check_stock
    from compress.models.families import family_for
    from tools.decoders import tiny as tiny_of

    fits, wide = (tiny_of(kind).config for kind in ("granite", "gpt_neox"))
    check_stock(fits, family_for(fits))
    with pytest.raises(CompressError, match="heads of 8 channels become 48 wide where there are fewer of them"):
        check_stock(wide, family_for(wide))
