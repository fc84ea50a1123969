"""The scale of the logits: the best on the grid, folded into the last norm of every family."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from compress.language.plan import BlockPlan, Plan
from compress.models.blocks import BlockRunner
from compress.models.families import family_for
from compress.recipes.tyr.choice import Job
from compress.recipes.tyr.rescale import SCALES, fit_scale, kl_at
from tests.recipes.tyr.small import small_job, whole_kl
from tests.tiny import ARCHITECTURES, tiny, tokens


def cut(job: Job) -> Plan:
    return Plan(tuple(BlockPlan(tuple(range(g.heads)), tuple(range(0, g.ffn, 3))) for g in job.geometry.blocks))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_no_scale_on_the_grid_is_better_than_the_one_found(model_type: str) -> None:
    job = small_job(model_type)
    plan = cut(job)
    scale, before, after = fit_scale(job, plan)
    assert before == pytest.approx(whole_kl(job, plan, job.search), rel=1e-4)

    def at(s: float) -> float:
        return whole_kl(job, Plan(plan.blocks, {"norm": job.family.scaled_norm(job.model, s)}), job.search)

    assert after == pytest.approx(at(scale), rel=1e-4)
    assert all(at(s) >= after - 1e-6 for s in SCALES[::6])
    assert scale != 1.0 and after < before


@pytest.mark.parametrize(("begin", "skip"), [(0, 0), (1, 0), (3, 2)])
def test_a_position_whose_next_token_begins_every_text_is_not_judged(begin: int, skip: int) -> None:
    job = replace(small_job(), begin=begin)
    plan = cut(job)
    pruned = copy.deepcopy(job.model)
    plan.apply(pruned, job.family)
    with torch.no_grad():
        models: Any = (job.model, pruned)
        p, q = (m(job.search).logits[:, skip:].double().log_softmax(-1) for m in models)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert float(kl_at(job, plan, job.search, (1.0,), "x")) == pytest.approx(want, rel=1e-4)


def test_a_model_that_lost_nothing_keeps_its_scale() -> None:
    job = small_job()
    whole = Plan(tuple(BlockPlan(tuple(range(g.heads)), tuple(range(g.ffn))) for g in job.geometry.blocks))
    assert fit_scale(job, whole) == (1.0, pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_scaled_norm_scales_the_logits_and_leaves_a_shared_model_alone(model_type: str) -> None:
    model: Any = tiny(model_type)
    family = family_for(model.config)
    before = copy.deepcopy(model.state_dict())
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.model = copy.copy(model.model)
    other.model._modules = dict(model.model._modules)
    family.replace_norm(other, family.scaled_norm(model, 0.7))
    hidden = torch.randn(2, 5, model.config.hidden_size)
    length = tokens(1, 5).shape[1]
    with torch.no_grad():
        want = 0.7 * BlockRunner(model, family, length).raw_logits(hidden)
        got = BlockRunner(other, family, length).raw_logits(hidden)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
