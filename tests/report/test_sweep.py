"""Fronts and knees against brute force; what the points are judged by."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.report.sweep import DENSE, Axis, Entry, Quality, Sweep, entries_of, front_of, judged, knee_of
from compress.report.sweep_page import lines, page

PPL = Quality(name="perplexity", unit="perplexity", better="lower")
ACC = Quality(name="accuracy", unit="score", better="higher")


def entries(pairs: list[tuple[float, float]]) -> list[Entry]:
    return [Entry(point=f"p{i}", quality=q, costs={"bytes": c}) for i, (c, q) in enumerate(pairs)]


@pytest.mark.parametrize("quality", [PPL, ACC])
@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_beats(seed: int, quality: Quality) -> None:
    draw = random.Random(seed)
    made = entries([(draw.randint(1, 6), draw.randint(1, 6) / 2) for _ in range(9)])
    made.append(Entry(point="without", quality=100.0, costs={}))

    def beats(a: Entry, b: Entry) -> bool:
        good = a.quality <= b.quality if quality is PPL else a.quality >= b.quality
        return good and a.costs["bytes"] <= b.costs["bytes"] and (a.quality, a.costs) != (b.quality, b.costs)

    priced = made[:-1]
    want = [i for i, e in enumerate(priced) if not any(beats(o, e) for o in priced)]
    found = front_of(made, quality, "bytes")
    assert sorted(found) == want
    assert [made[i].costs["bytes"] for i in found] == sorted(made[i].costs["bytes"] for i in found)


@pytest.mark.parametrize("seed", range(20))
def test_the_knee_is_farthest_from_the_line_between_the_ends(seed: int) -> None:
    draw = random.Random(seed)
    costs = sorted(draw.sample(range(1, 100), 6))
    logs = sorted((draw.uniform(1, 4) for _ in costs), reverse=True)
    made = entries([(c, math.exp(v)) for c, v in zip(costs, logs, strict=True)])
    front = front_of(made, PPL, "bytes")
    knee = knee_of(made, front, PPL, "bytes")
    # Distance from a point to the line through the ends, by the cross product, with both axes from 0 to 1.
    ends = (costs[0], logs[0]), (costs[-1], logs[-1])
    across, down = ends[1][0] - ends[0][0], ends[0][1] - ends[1][1]

    def off(i: int) -> float:
        x, y = (costs[i] - ends[0][0]) / across, (logs[i] - ends[1][1]) / down
        return (1 - x - y) / math.sqrt(2)

    best = max(range(len(costs)), key=off)
    assert knee == (best if off(best) > 1e-9 else None)


def test_a_front_of_two_or_a_straight_or_bulging_one_has_no_knee() -> None:
    two = entries([(1, 4.0), (2, 3.0)])
    assert knee_of(two, front_of(two, ACC, "bytes"), ACC, "bytes") is None
    straight = [Entry(point=f"p{c}", quality=c / 10, costs={"bytes": c}) for c in (1, 2, 3)]
    assert knee_of(straight, front_of(straight, ACC, "bytes"), ACC, "bytes") is None
    bulging = [Entry(point=f"p{c}", quality=q, costs={"bytes": c}) for c, q in ((1, 0.1), (2, 0.15), (3, 0.5))]
    assert knee_of(bulging, front_of(bulging, ACC, "bytes"), ACC, "bytes") is None
    bent = [Entry(point=f"p{c}", quality=q, costs={"bytes": c}) for c, q in ((1, 0.1), (2, 0.45), (3, 0.5))]
    assert knee_of(bent, front_of(bent, ACC, "bytes"), ACC, "bytes") == 1


def test_the_dense_model_is_on_a_front_and_never_its_knee() -> None:
    made = [
        Entry(point="50%", quality=0.1, costs={"bytes": 1}),
        Entry(point=DENSE, precision="gguf-q4_0", quality=0.48, costs={"bytes": 1.2}),
        Entry(point="25%", quality=0.49, costs={"bytes": 2}),
        Entry(point=DENSE, quality=0.5, costs={"bytes": 4}),
    ]
    front = front_of(made, ACC, "bytes")
    assert front == [0, 1, 2, 3] and knee_of(made, front, ACC, "bytes") == 2


def report(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 2, "size": {}, "rows": list(rows)}


def score(task: str, dense: float, pruned: float, better: str = "higher") -> dict[str, Any]:
    return {
        "name": f"m, {task}", "unit": "score", "better": better, "dense": dense, "pruned": pruned, "task": task,
        "metric": "m", "main": True,
    }  # fmt: skip


def test_several_tasks_are_judged_by_the_mean_share_that_is_kept() -> None:
    quality, dense, pruned = judged(report(score("a", 0.8, 0.6), score("b", 2.0, 4.0, "lower")))
    assert (dense, quality.better) == (1.0, "higher") and pruned == pytest.approx((0.75 + 0.5) / 2)
    alone, dense, pruned = judged(report(score("b", 2.0, 4.0, "lower")))
    assert (alone.name, alone.better, dense, pruned) == ("m, b", "lower", 2.0, 4.0)
    with pytest.raises(CompressError, match="no share of it can be told"):
        judged(report(score("a", 0.0, 0.6), score("b", 2.0, 4.0)))
    with pytest.raises(CompressError, match="no figure that the points can be judged by"):
        judged(report())


def test_times_are_held_together_by_each_point_s_own_pairs() -> None:
    """The machine was twice as slow for the second point: its dense model says so."""

    def timed(dense: float, pruned: float) -> dict[str, Any]:
        row = {
            "name": "TPOT", "unit": "seconds", "better": "lower", "dense": dense, "pruned": pruned, "metric": "tpot",
            "ratio": {"median": dense / pruned, "low": 1.0, "high": 3.0},
        }  # fmt: skip
        files = [
            {"format": "gguf", "precision": "f16", "side": side, "bytes": 5, "perplexity": 9.0, "tpot": seconds}
            for side, seconds in (("dense", dense / 4), ("pruned", pruned / 4))
        ]
        record = {"dense": {"tpot": {"median": dense / 4}}, "ratios": {"tpot": {"median": dense / pruned}}}
        quantised = {"files": files, "bench": {"gguf-f16": {**record, "pruned_is": "gguf-f16"}}}
        return {**report(score("a", 0.8, 0.6), row), "quantised": quantised}

    _, found, titles = entries_of({"25%": timed(8.0, 6.0), "50%": timed(16.0, 8.0)})
    assert {e.name: e.costs["tpot"] for e in found} == {
        "dense": 8.0, "25%": 6.0, "50%": 4.0,
        "dense, gguf f16": 2.0, "25%, gguf f16": 1.5, "50%, gguf f16": 1.0,
    }  # fmt: skip
    assert list(titles) == ["bytes", "tpot"]


def test_hostile_names_stay_in_their_cells() -> None:
    bad = "x|y](http://z)\n# no"
    point = {"overrides": [], "folder": "a", "make": "compress prune", "pick": "compress sweep a --pick b", "rows": []}
    made = Sweep.model_validate(
        {
            "model": bad, "asked_model": bad, "weights": "", "recipe_name": bad,
            "settings": [], "recipe": {}, "until": "evaluation",
            "quality": {"name": bad, "unit": "score", "better": "higher"},
            "points": [{**point, "name": bad}, {**point, "name": "b"}],
            "entries": [{"point": bad, "quality": 0.5, "costs": {"bytes": 5}}],
            "axes": [Axis(key="bytes", title=bad, unit="bytes", front=[0]).model_dump()],
        }
    )  # fmt: skip
    text = page(made)
    assert not [line for line in text if line.startswith("# no")]
    assert "](http" not in "\n".join(text).replace("\\](http", "").replace(f"`{bad[:14]}", "")
    (row,) = [line for line in text if "0.5000" in line]
    assert row.replace("\\|", "").count("|") == 5
    assert len(lines(made, Path("a"))) == 4
