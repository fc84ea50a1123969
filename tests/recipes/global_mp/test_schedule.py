"""Gradual targets: integers that rise to the last one exactly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.recipes.global_mp.schedule import Shape, targets

SHAPES: tuple[Shape, ...] = ("cubic", "linear")


@given(st.integers(0, 10**12), st.integers(1, 400), st.sampled_from(SHAPES), st.data())
def test_targets_rise_and_end_at_the_last_one(final: int, steps: int, shape: Shape, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, final))
    found = targets(final, steps, shape, start)
    assert len(found) == steps and found[-1] == final and start <= found[0]
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert all(isinstance(n, int) for n in found)


def test_cubic_is_the_papers_formula() -> None:
    found = targets(900_000, 10, "cubic", 100_000)
    for t, n in enumerate(found, 1):
        assert n == pytest.approx(900_000 + (100_000 - 900_000) * (1 - t / 10) ** 3, abs=1)


def test_linear_takes_the_same_every_time_and_cubic_most_at_first() -> None:
    assert targets(100, 4, "linear") == [25, 50, 75, 100]
    steps = [b - a for a, b in zip([0, *targets(1000, 5)], targets(1000, 5), strict=False)]
    assert steps == sorted(steps, reverse=True) and steps[0] == 488


@pytest.mark.parametrize(("final", "steps", "start"), [(10, 0, 0), (10, 3, 11), (10, 3, -1)])
def test_what_is_no_schedule_is_refused(final: int, steps: int, start: int) -> None:
    with pytest.raises(ValueError):
        targets(final, steps, "linear", start)
