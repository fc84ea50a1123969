"""Contenders and the short training that chooses among them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.data.images import Splits
from compress.data.tasks import Task
from compress.networks.train import evaluate, train
from compress.processes import distributed
from compress.recipes.pagcp import trials as module
from compress.recipes.pagcp.contenders import blend, contenders, uniform
from compress.recipes.pagcp.greedy import Decision, Pruner, State
from compress.recipes.pagcp.options import PAGCPOptions, Tolerance, TrialOptions
from compress.recipes.pagcp.trials import Trials, choose, drop, heats, short, weights
from compress.run.folder import Journal
from compress.schema.sections import TrainSpec
from tests import ranks
from tests.networks import shape_data
from tests.pagcp_round import LOSS, SETTLED, Small, pruner, trained_small

SPEC = TrainSpec(epochs=8, lr=0.05, batch=32, warmup_epochs=2)
OPTIONS = SETTLED.model_copy(update={"trials": TrialOptions(epochs=[1, 2], blends=[0.5]), "flops": 0.5})


@pytest.fixture(scope="module")
def data() -> Splits:
    return shape_data(multitask=True)


@pytest.fixture(scope="module")
def trained(data: Splits) -> nn.Module:
    return trained_small(data, 6)


def held(p: Pruner, data: Splits, place: Path) -> Trials:
    assert p.oracle.base is not None
    place.mkdir(exist_ok=True)
    journal = Journal(place / "trials.jsonl")
    return Trials(p, data, p.oracle.split, p.options.batch, SPEC, 3, p.oracle.base, journal, "test", place)


def chosen(model: nn.Module, data: Splits, place: Path, target: float = 0.5) -> tuple[Decision, dict[str, Any], Pruner]:
    place.mkdir(exist_ok=True)
    p = pruner(model, data, place / "oracle.jsonl", OPTIONS)
    decision, facts = choose(held(p, data, place), p.decide(target), target)
    return decision, facts, p


# --- contenders -------------------------------------------------------------------------------------------------------


def nothing_to_give_back(p: Pruner, state: State, target: float) -> bool:
    """Whether the target is met, and would not be with any one group a step wider."""
    steps = {name: p.levels(name).index(kept) for name, kept in state.items()}  # each a width that the group may have
    wider = [state | {name: p.levels(name)[at - 1]} for name, at in steps.items() if at]
    return p.removal(state) >= target and all(p.removal(s) < target for s in wider)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_every_contender_meets_the_target_and_leaves_nothing_to_give_back(
    trained: nn.Module, data: Splits, tmp_path: Path, target: float
) -> None:
    p = pruner(trained, data, tmp_path / "j", LOSS.model_copy(update={"keep": 0.2}))
    decision = p.decide(target)
    found = contenders(p, {"greedy": decision.state}, decision.order, [0.25, 0.5, 0.75], target)
    assert found["greedy"] == decision.state and len(found) >= 2
    assert len({json.dumps(s, sort_keys=True) for s in found.values()}) == len(found)
    for state in found.values():
        assert nothing_to_give_back(p, state, target)
        assert all(kept >= 0.2 * p.full[name] for name, kept in state.items())


def test_uniform_widths_differ_by_no_more_than_the_steps_that_a_group_is_cut_in(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "j")
    state = uniform(p, list(p.full), 0.5)
    shares = {name: kept / p.full[name] for name, kept in state.items()}
    steps = {name: p.groups[name].step / p.full[name] for name in state}
    for one in shares:
        for other in shares:
            assert shares[one] - shares[other] <= steps[one] + steps[other]
    # A group that may not be cut stays whole, and the others make up for it.
    rest = [name for name in p.full if name != "deep.0"]
    state = uniform(p, rest, 0.5)
    assert state["deep.0"] == p.full["deep.0"] and p.removal(state) >= 0.5


def test_a_blend_begins_at_one_plan_and_ends_at_the_other(trained: nn.Module, data: Splits, tmp_path: Path) -> None:
    p = pruner(trained, data, tmp_path / "j")
    decision = p.decide(0.5)
    even = uniform(p, decision.order, 0.5)
    assert decision.state != even
    assert blend(p, decision.state, even, 1e-9, 0.5) == decision.state
    assert blend(p, decision.state, even, 1 - 1e-9, 0.5) == even


def test_plans_that_are_alike_stand_once_and_one_alone_is_taken_without_a_trial(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "j")
    most = p.removal(p.least())  # every group as narrow as may be: there is no other plan
    assert list(contenders(p, {"greedy": p.least()}, list(p.full), [0.25, 0.5], most)) == ["greedy"]
    decision, facts, p = chosen(trained, data, tmp_path / "run", most)
    assert decision.state == p.least() and decision.values
    assert facts["winner"] == "greedy" and facts["contenders"] == [] and facts["epochs"] == 0
    assert not (tmp_path / "run" / "trials.jsonl").read_text()


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weighed_oracle_multiplies_readings_and_knows_what_was_measured_whole(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    p = pruner(trained, data, tmp_path / "j")
    whole, early = p.full | {"stem.0": 6}, p.least()
    plain = p.measure(whole).least
    assert p.measure(early, {"shape": 0.01, "matte": 0.01}).values is None
    q = p.judged_by(p.oracle.weighed({"matte": 3.0}))
    before = len(p.oracle.journal.rows())
    assert q.measure(whole).least == {"shape": plain["shape"], "matte": 3 * plain["matte"]}
    assert len(p.oracle.journal.rows()) == before
    # What was given up by the first one's bounds is measured for the second.
    assert q.measure(early).values is not None and len(p.oracle.journal.rows()) == before + 1
    # And a lower bound is one of the weighed reading.
    r = p.judged_by(p.oracle.weighed({"matte": 5.0}))
    low = r.measure(p.least() | {"stem.0": 4}, {"shape": 1e9, "matte": 0.01})
    assert low.values is None and low.least["matte"] <= r.measure(p.least() | {"stem.0": 4}).least["matte"]


def test_only_tasks_on_pixels_beside_others_are_spared() -> None:
    classes, mask, depth = Task("a", "classes", ("x", "y")), Task("b", "mask"), Task("c", "depth")
    assert weights([classes, mask, depth], 2.0) == {"b": 2.0, "c": 2.0}
    assert weights([mask, depth], 2.0) == weights([classes], 2.0) == weights([classes, mask], 1.0) == {}


# --- trials -----------------------------------------------------------------------------------------------------------


def test_a_drop_is_in_points_of_a_share_and_in_per_cent_of_a_figure_with_a_unit() -> None:
    assert drop(Task("a", "classes", ("x", "y")), 0.8, 0.75) == pytest.approx(5.0)
    assert drop(Task("b", "mask"), 0.8, 0.81) == pytest.approx(-1.0)
    assert drop(Task("c", "depth"), 0.5, 0.55) == pytest.approx(10.0)
    assert drop(Task("d", "normals"), 20.0, 19.0) == pytest.approx(-5.0)


def test_every_heat_takes_the_better_half_until_one_is_left() -> None:
    assert heats(9, [1, 2, 4]) == [(9, 1), (5, 2), (3, 4)]
    assert heats(2, [1, 2]) == [(2, 1)]
    assert heats(1, [1, 2]) == []


def test_a_trial_is_the_fine_tunings_schedule_in_short() -> None:
    assert (short(SPEC, 2).epochs, short(SPEC, 2).warmup_epochs, short(SPEC, 2).lr) == (2, 0.5, SPEC.lr)
    assert short(SPEC.model_copy(update={"epochs": 0, "warmup_epochs": 0.0}), 1).epochs == 1


def test_the_winner_lost_least_in_its_worst_task_and_is_the_network_that_was_measured(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    decision, facts, p = chosen(trained, data, tmp_path / "run")
    rows, base = facts["contenders"], p.oracle.base
    last = [r for r in rows if r["epochs"] == 2]
    assert len(rows) >= 3 and len(last) == -(-len(rows) // 2)
    assert facts["epochs"] == len(rows) + 2 * len(last)
    assert rows[0]["name"] == facts["winner"] and rows[0]["worst"] == min(r["worst"] for r in last)
    # Done by hand: cut, trained as the fine-tuning in short, judged on the calibration split.
    network = copy.deepcopy(p.cut(decision.state))
    train(network, data, short(SPEC, 2), seed=3)
    found = evaluate(network, data, data.calibration, p.options.batch)
    assert found == rows[0]["values"] and base is not None
    lost = [base[t][m] - found[t][m] for t, m in (("shape", "accuracy"), ("matte", "iou"))]
    assert rows[0]["worst"] == pytest.approx(100 * max(lost))
    # The decision speaks of the winner, just cut.
    just_cut = evaluate(p.cut(decision.state), data, data.calibration, p.options.batch)
    assert decision.values == {t: {k: v for k, v in own.items() if k != "samples"} for t, own in just_cut.items()}
    assert decision.readings == p.oracle.readings(decision.values)
    assert rows[0]["removed"] == p.removal(decision.state) >= 0.5


def test_a_recipes_own_tolerances_say_what_each_task_lost_is_worth(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    limits = {
        "shape": Tolerance(measure="metric", absolute=10.0),
        "matte": Tolerance(measure="metric", absolute=0.001),
    }
    p = pruner(trained, data, tmp_path / "j", OPTIONS.model_copy(update={"tolerances": limits}))
    states = {name: p.full | {"stem.0": kept} for name, kept in (("a", 6), ("b", 2))}
    winner, rows = held(p, data, tmp_path / "t").hold(states, [1])
    base = p.oracle.base
    assert base is not None
    for row in rows:
        assert row["worst"] == pytest.approx((base["matte"]["iou"] - row["values"]["matte"]["iou"]) / 0.001)
        assert row["drops"]["matte"] == pytest.approx(row["worst"] / 10)
    assert winner == min(rows, key=lambda r: r["worst"])["name"]


def test_trials_leave_the_dense_network_as_it_was_also_where_plans_leave_it_whole(
    trained: nn.Module, data: Splits, tmp_path: Path
) -> None:
    before = copy.deepcopy(trained.state_dict())
    decision, facts, p = chosen(trained, data, tmp_path / "run", 0.05)
    cut = p.cut(decision.state).state_dict()
    assert facts["epochs"] and any(v.data_ptr() == cut[k].data_ptr() for k, v in p.model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in trained.state_dict().items())


def test_stopped_trials_go_on_to_the_same_winner_without_training_again(
    trained: nn.Module, data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want, facts, _ = chosen(trained, data, tmp_path / "whole")
    count = len((tmp_path / "whole" / "trials.jsonl").read_text().splitlines())
    seen: list[str] = []

    def stopped(*arguments: Any, **named: Any) -> Any:
        seen.append("")
        if len(seen) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            chosen(trained, data, tmp_path / "b")
    (left,) = (tmp_path / "b").glob("*.safetensors")  # of the trial that was trained and not yet noted
    steps: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        steps.append(named["checkpoint"].exists())
        return train(*arguments, **named)

    monkeypatch.setattr(module, "train", counted)
    again, same, _ = chosen(trained, data, tmp_path / "b")
    assert (again, same) == (want, facts)
    assert steps == [True] + [False] * (count - 3) and not left.exists()
    assert (tmp_path / "b" / "trials.jsonl").read_text() == (tmp_path / "whole" / "trials.jsonl").read_text()


def _chosen(folder: str) -> Any:
    """In a process of its own: the decision and what was said of every contender."""
    torch.manual_seed(0)
    name = f"{distributed.world()}-{distributed.rank()}"
    decision, facts, _ = chosen(Small().eval(), shape_data(multitask=True), Path(folder) / name)
    return decision.state, decision.values, facts


def test_one_process_and_two_choose_the_same_to_the_last_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    alone = _chosen(str(tmp_path))
    assert len(alone[2]["contenders"]) > 2
    assert ranks.run(2, _chosen, str(tmp_path)) == [alone, alone]


def test_trials_ask_for_a_target_and_rising_epochs() -> None:
    with pytest.raises(ValueError, match="flops is not"):
        PAGCPOptions(trials=TrialOptions())
    with pytest.raises(ValueError, match="must rise"):
        TrialOptions(epochs=[2, 1])
