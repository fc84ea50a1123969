"""The oracle and the greedy pass: the paper's schedule, exact measurements, and what is saved by not measuring."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.data.images import Splits
from compress.errors import CompressError, UsageError
from compress.networks.flops import count_flops
from compress.networks.surgery import cut
from compress.networks.train import evaluate
from compress.recipes.pagcp.greedy import REFERENCE_RATIOS, decay, first_rate, portions
from compress.recipes.pagcp.groups import find_groups, tensors
from compress.recipes.pagcp.norms import Settle
from compress.recipes.pagcp.options import PAGCPOptions, Tolerance
from compress.recipes.pagcp.oracle import calibration, tolerances, used
from compress.recipes.pagcp.plan import Plan
from compress.recipes.pagcp.replay import Replay, before, calls
from compress.recipes.pagcp.saliency import taylor_scores, weight_scores
from tests import ranks
from tests.networks import shape_data
from tests.pagcp_round import LOSS, SETTLED, Small, pruner, trained_small


@pytest.fixture(scope="module")
def data() -> Splits:
    return shape_data(multitask=True)


@pytest.fixture(scope="module")
def trained(data: Splits) -> nn.Module:
    return trained_small(data, 12)


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_the_decay_is_the_papers() -> None:
    """r0 = .06, T = 6, N = 51: lambda about .977, the last tolerance about 1.9 %."""
    value = decay(0.06, 51, 6.0)
    assert abs(value - 0.977) < 5e-4
    assert math.isclose(math.prod(1 + 0.06 * value**i for i in range(51)), 6.0, rel_tol=1e-9)
    assert abs(0.06 * value**50 - 0.019) < 5e-4


def test_the_portions_multiply_to_the_whole_tolerance_also_where_they_grow() -> None:
    for count in (1, 5, 60, 200):
        parts = portions(0.06, count, 6.0)
        assert math.isclose(sum(parts), 1.0) and len(parts) == count
    assert portions(0.06, 5, 6.0)[0] < portions(0.06, 5, 6.0)[-1]


def test_a_first_part_that_is_more_than_all_is_refused() -> None:
    assert first_rate(None, 51, 6.0) == pytest.approx(0.06, rel=0.02)
    assert all(0.5 < decay(first_rate(None, n, 6.0), n, 6.0) < 1 for n in range(3, 100))
    with pytest.raises(CompressError, match="alone is more"):
        decay(6.0, 10, 5.0)


# --- tolerances -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "base", "worst", "rising"),
    [
        (Tolerance(relative=5.0), 0.4, 2.4, False),
        (Tolerance(absolute=0.3), 0.4, 0.7, False),
        (Tolerance(measure="metric", absolute=0.02), 0.9, 0.88, True),
        (Tolerance(measure="metric", relative=0.1), 0.9, 0.81, True),
        (Tolerance(measure="metric", relative=0.1), 2.0, 2.2, False),
    ],
)
def test_a_reading_is_0_at_the_dense_value_and_1_at_the_worst_allowed(
    limit: Tolerance, base: float, worst: float, rising: bool
) -> None:
    assert math.isclose(used(limit, base, base, rising), 0.0, abs_tol=1e-12)
    assert math.isclose(used(limit, base, worst, rising), 1.0, rel_tol=1e-9)
    assert used(limit, base, base + (base - worst) / 2, rising) < 0


def test_a_task_without_a_tolerance_is_asked_for_where_others_have_one() -> None:
    some = PAGCPOptions(tolerances={"shape": Tolerance(relative=0.1)})
    with pytest.raises(UsageError, match="'matte' has no tolerance"):
        tolerances(some, ["shape", "matte"])
    rest = some.model_copy(update={"tolerance": Tolerance(measure="metric", absolute=0.01)})
    assert tolerances(rest, ["shape", "matte"])["matte"].absolute == 0.01
    assert tolerances(PAGCPOptions(total=6.0), ["shape"])["shape"].relative == 5.0
    with pytest.raises(UsageError, match="no task 'shap'"):
        tolerances(PAGCPOptions(tolerances={"shap": Tolerance(relative=0.1)}), ["shape"])


def test_a_calibration_split_that_overlaps_the_test_split_is_refused(data: Splits) -> None:
    shared = replace(data, calibration=data.test.take(torch.arange(5)))
    with pytest.raises(CompressError, match="5 samples are in the calibration split and in the test split"):
        calibration(shared, None)
    assert len(calibration(data, 20)) == 20


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_oracle_measures_what_evaluate_does(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    said = pruner(trained, data, tmp_path / "j").oracle.base
    found = evaluate(trained, data, data.calibration, 16)
    assert said == {t: {k: v for k, v in own.items() if k != "samples"} for t, own in found.items()}


def test_replayed_activations_give_the_same_outputs_for_every_group(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "j")
    x = data.prepare(data.calibration.inputs[:9])
    shared = 0
    for name, group in p.groups.items():
        replay = Replay(p.seen, {m.layer for m in group.members}, 1 << 30)
        for kept in p.levels(name)[1:]:
            network = p.cut(p.full | {name: kept})
            with torch.no_grad():
                want = tensors(network(x))
            for _ in range(2):
                got, _ = replay.run(network, 0, x)
                assert all(torch.equal(a, b) for a, b in zip(want, tensors(got), strict=True)), name
        shared += bool(replay.kept)
    assert shared >= 3


def test_a_network_that_writes_into_what_was_kept_is_run_whole() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            self.act(y)  # its result is not used: y itself was changed
            out: torch.Tensor = self.second(y)
            return out

    model, x = InPlace().eval(), torch.randn(4, 3, 5, 5)
    replay = Replay(calls(model, x), {"second"}, 1 << 30)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(replay.run(model, 0, x)[0], model(x))
    assert not replay.kept


def test_only_modules_that_end_before_the_first_changed_layer_are_kept() -> None:
    seen = calls(Small().eval(), torch.randn(2, 3, 12, 12))
    assert before(seen, {"last.0", "classes", "mix.0"}) == ["block", "deep", "stem"]
    assert before(seen, {"stem.0"}) == []


def test_a_hopeless_candidate_is_given_up_early_and_never_wrongly(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "a")
    narrow = p.least()
    early = p.measure(narrow, {"shape": 0.05, "matte": 0.05})
    whole = pruner(trained, data, tmp_path / "b").measure(narrow)
    assert early.values is None and p.oracle.known[p.oracle.journal.rows()[-1]["key"]]["work"] < 1
    assert all(early.least[t] <= whole.least[t] + 1e-9 for t in whole.least)
    # A later, wider bound has it measured whole.
    again = p.measure(narrow, {t: v + 1 for t, v in whole.least.items()})
    assert again.values == whole.values


# --- deciding ---------------------------------------------------------------------------------------------------------


def test_bisection_decides_as_the_exhaustive_scan_with_a_fifth_of_the_passes(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "a")
    order = [q.group for q in sorted(p.probe(None), key=lambda q: -q.contribution)]
    parts = portions(first_rate(None, len(order), 60.0), len(order), 60.0)
    state, _ = p.greedy(order, parts, 1.0, 1.0)
    other = pruner(trained, data, tmp_path / "b")
    scanned, _ = other.scan(order, parts, 1.0, 1.0)
    for name in order:
        levels = p.levels(name)
        assert abs(levels.index(state[name]) - levels.index(scanned[name])) <= 1, name
    assert state != p.full
    assert p.oracle.passes * 5 <= REFERENCE_RATIOS * len(p.groups)


@pytest.mark.parametrize("own", [LOSS, SETTLED])
def test_no_task_passes_its_tolerance_and_the_decision_is_the_network_measured(
    trained: nn.Module, data: Splits, tmp_path: Path, own: PAGCPOptions
) -> None:
    limits = {"shape": Tolerance(measure="metric", absolute=0.4), "matte": Tolerance(relative=30.0)}
    p = pruner(trained, data, tmp_path / "j", own.model_copy(update={"tolerances": limits}))
    decision = p.decide(None)
    assert 0 < p.removal(decision.state) < 1
    assert all(v <= 1 + 1e-9 for v in decision.readings.values())
    found = evaluate(p.cut(decision.state), data, data.calibration, 16)
    for task, values in decision.values.items():
        assert values == pytest.approx({k: v for k, v in found[task].items() if k != "samples"})
    assert p.oracle.base is not None
    assert p.oracle.base["shape"]["accuracy"] - found["shape"]["accuracy"] <= 0.4 + 1e-9
    assert found["matte"]["loss"] <= 31 * p.oracle.base["matte"]["loss"] + 1e-9


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_a_target_of_flops_is_reached_and_nothing_more_could_be_given_back(
    trained: nn.Module, data: Splits, tmp_path: Path, target: float
) -> None:
    p = pruner(trained, data, tmp_path / "j")
    state = p.decide(target).state
    assert p.removal(state) >= target
    for name, kept in state.items():
        levels = p.levels(name)
        at = levels.index(kept)
        assert not at or p.removal(state | {name: levels[at - 1]}) < target
    counted = sum(f.dense for f in count_flops(p.cut(state), torch.zeros(1, 3, 12, 12)))
    assert math.isclose(p.removal(state), 1 - counted / p.dense_flops)


def test_a_target_out_of_reach_names_the_most_there_is(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "j", LOSS.model_copy(update={"keep": 0.5}))
    with pytest.raises(CompressError, match=r"cannot go.*it is \d"):
        p.decide(0.95)


def test_a_tolerance_that_no_pruning_meets_says_so(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    tight = LOSS.model_copy(update={"tolerance": Tolerance(relative=1e-9)})
    with pytest.raises(CompressError, match="no group can lose a step"):
        pruner(trained, data, tmp_path / "j", tight).decide(None)
    later = pruner(trained, data, tmp_path / "j", tight)
    assert later.decide(None, must=False).state == later.full


def test_the_layer_filter_leaves_the_dearest_groups_dense(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "j", LOSS.model_copy(update={"share": 0.5}))
    decision = p.decide(None)
    assert len(decision.probes) == round(0.5 * len(p.groups))
    assert all(decision.state[name] == p.full[name] for name in decision.unpruned)


def test_groups_narrower_than_a_step_are_named(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "j", LOSS.model_copy(update={"round_to": 8, "total": 1e6}))
    decision = p.decide(None)
    assert decision.unpruned["side"].startswith("8 channels cannot be fewer in steps of 8")
    with pytest.raises(CompressError, match="in multiples of 64"):
        pruner(trained, data, tmp_path / "k", LOSS.model_copy(update={"round_to": 64})).decide(None)


def test_a_stopped_pass_goes_on_to_the_same_decision_without_measuring_again(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    whole = pruner(trained, data, tmp_path / "a")
    want = whole.decide(0.5)
    rows = (tmp_path / "a").read_text().splitlines(keepends=True)
    for stopped in (1, len(rows) // 2, len(rows) - 1):
        path = tmp_path / f"b{stopped}"
        path.write_text("".join(rows[:stopped]) + rows[stopped][:20])  # the last line was cut short by a kill
        again = pruner(trained, data, path)
        assert again.decide(0.5) == want
        assert path.read_text() == "".join(rows)


def _decided(folder: str, saliency: str) -> Any:
    """In a process of its own: the decision, and every measurement that led to it."""
    from compress.processes import distributed

    data = shape_data(multitask=True)
    torch.manual_seed(0)
    model = Small()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
    options = SETTLED.model_copy(update={"saliency": saliency})
    p = pruner(model.eval(), data, Path(folder) / f"{distributed.world()}-{distributed.rank()}.jsonl", options)
    decision = p.decide(0.4)
    return decision.state, decision.values, [json.dumps(row) for row in p.oracle.journal.rows()]


@pytest.mark.parametrize("saliency", [pytest.param("l1", marks=pytest.mark.slow), "taylor"])
def test_one_process_and_two_measure_and_decide_the_same_to_the_last_bit(tmp_path: Path, saliency: str) -> None:
    torch.set_num_threads(1)
    alone = _decided(str(tmp_path), saliency)
    assert ranks.run(2, _decided, str(tmp_path), saliency) == [alone, alone]


# --- saliency ---------------------------------------------------------------------------------------------------------


def test_the_l1_saliency_is_the_sum_of_mean_weights_over_the_layers_tied(trained: nn.Module, data: Splits) -> None:
    group = next(g for g in find_groups(trained, torch.randn(2, 3, 12, 12)).groups if g.name == "stem.0")
    modules = dict(trained.named_modules())
    want = sum(modules[name].weight.detach().double().abs().mean((1, 2, 3)) for name in ("stem.0", "block.0"))  # type: ignore[union-attr,operator]
    torch.testing.assert_close(weight_scores(trained, group, 1), want)


def test_the_taylor_saliency_is_the_gradient_of_a_gate_on_each_channel(trained: nn.Module, data: Splits) -> None:
    """What sums up w dL/dw over all that makes a channel is dL/dg of a gate g = 1 on each of its layers."""
    x = torch.randn(2, 3, 12, 12)
    group = next(g for g in find_groups(trained, x).groups if g.name == "side")
    split = data.calibration.take(torch.arange(8))
    one = replace(data, tasks=data.tasks[1:])
    (found,) = taylor_scores(copy.deepcopy(trained), [group], one, split, batch=8)
    gate = torch.ones(1, 8, 1, 1, requires_grad=True)
    side = trained.side
    assert isinstance(side, nn.Module)
    handle = side.register_forward_hook(lambda _m, _i, out: out * gate)
    out = trained(data.prepare(split.inputs))["matte"][:, 0]
    handle.remove()
    target = split.targets["matte"].float() / 255
    loss = nn.functional.binary_cross_entropy_with_logits(out, target)
    (gradient,) = torch.autograd.grad(loss, gate)
    want = gradient.flatten().double().square()
    torch.testing.assert_close(found, want / want.mean(), rtol=1e-3, atol=1e-6)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_a_plan_is_saved_read_compared_and_applied_once(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "j")
    plan = Plan.of(trained, p.removed(p.full | {"stem.0": 8, "last.0": 10}), {"note": 1})
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again == plan and not plan.compare(again)
    x = data.prepare(data.test.inputs[:4])
    smaller = again.apply(trained)
    with torch.no_grad():
        for a, b in zip(tensors(smaller(x)), tensors(again.mask(trained)(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(CompressError, match="the plan is for a network with"):
        again.apply(smaller)
    other = Plan.of(trained, p.removed(p.full | {"stem.0": 10}))
    assert "stem.0.out: removes 4 -> 2" in plan.compare(other)


def test_two_plans_one_after_the_other_are_one_plan(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "a")
    first = Plan.of(trained, p.removed(p.full | {"stem.0": 8, "deep.0": 12}))
    middle = first.apply(trained)
    q = pruner(middle, data, tmp_path / "b")
    second = Plan.of(middle, q.removed(q.full | {"stem.0": 4, "last.0": 6}))
    x = data.prepare(data.test.inputs[:4])
    with torch.no_grad():
        want, got = tensors(second.apply(middle)(x)), tensors(first.then(second).apply(trained)(x))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


# --- norms ------------------------------------------------------------------------------------------------------------


def test_settled_norms_have_the_statistics_of_the_samples_and_the_first_network_keeps_its_own(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    before = copy.deepcopy(trained.state_dict())
    p = pruner(trained, data, tmp_path / "j")
    smaller = cut(trained, p.removed(p.full | {"stem.0": 8}))
    Settle(data, 100, batch=50)(smaller)
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())
    at = torch.arange(100) * len(data.train) // 100
    with torch.no_grad():
        seen = [smaller.stem[0](data.prepare(data.train.inputs[part])) for part in at.split(50)]  # type: ignore[index,operator]
    norm = smaller.stem[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0))  # type: ignore[union-attr]
    var = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in seen]).mean(0)
    torch.testing.assert_close(norm.running_var, var)  # type: ignore[union-attr]
    assert norm.momentum == 0.1 and not smaller.training  # type: ignore[union-attr]
