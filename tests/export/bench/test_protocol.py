"""The measuring protocol, on a clock that a test winds."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from compress.exporters.bench.protocol import WARM_CALLS, steady, throttled


class Machine:
    """A clock, and a call that takes the times it is told; the last for ever after."""

    def __init__(self, times: list[float]) -> None:
        self.now, self.calls = 0.0, 0
        self._times: Iterator[float] = iter(times)
        self._last = times[-1]

    def clock(self) -> float:
        return self.now

    def call(self) -> None:
        self.calls += 1
        self.now += next(self._times, self._last)


def test_it_warms_up_until_a_block_of_three_stops_improving() -> None:
    machine = Machine([0.9] * 3 + [0.5] * 3 + [0.2] * 3 + [0.195])
    found = steady(machine.call, 1.0, 4, machine.clock)
    # 0.9 -> 0.5 -> 0.2 improve; 0.195 is less than 5 % better than 0.2.
    assert found["warm_up"] == pytest.approx([0.9] * 3 + [0.5] * 3 + [0.2] * 3 + [0.195] * 3)
    assert found["warm"] and found["samples"] == pytest.approx([0.195] * 6)


def test_a_warm_up_without_end_is_cut_and_said() -> None:
    machine = Machine([0.2 * 0.9**i for i in range(200)])
    found = steady(machine.call, 0.0, 2, machine.clock)
    assert len(found["warm_up"]) == WARM_CALLS and not found["warm"]
    machine = Machine([60.0 * 0.5**i for i in range(50)])
    assert len(steady(machine.call, 0.0, 2, machine.clock)["warm_up"]) == 3, "twenty seconds are over"


def test_it_measures_as_long_and_as_often_as_asked() -> None:
    often = Machine([0.5])
    assert len(steady(often.call, 0.1, 7, often.clock)["samples"]) == 7
    long = Machine([0.5])
    assert len(steady(long.call, 10.0, 2, long.clock)["samples"]) == 20


def test_fast_calls_are_batched_so_that_a_sample_lasts_a_tenth_of_a_second() -> None:
    machine = Machine([0.004])
    found = steady(machine.call, 0.0, 3, machine.clock)
    assert found["calls_per_sample"] == 25
    assert found["samples"] == pytest.approx([0.004] * 3) and machine.calls == len(found["warm_up"]) + 75


def test_a_sample_lasts_as_long_where_a_call_is_faster_than_it_was_when_it_warmed_up() -> None:
    machine = Machine([0.015] * 6 + [0.004])
    found = steady(machine.call, 0.0, 3, machine.clock)
    assert found["warm_up"] == pytest.approx([0.015] * 6) and found["calls_per_sample"] == 7
    assert machine.calls == 6 + 3 * 25 and found["samples"] == pytest.approx([0.004] * 3)


def test_without_batching_every_call_is_a_sample() -> None:
    machine = Machine([0.004])
    found = steady(machine.call, 0.0, 120, machine.clock, sample_seconds=0.0)
    assert found["calls_per_sample"] == 1 and len(found["samples"]) == 120


def test_the_devices_own_clock_is_kept_beside_the_wall_clock() -> None:
    machine = Machine([0.5])
    found = steady(machine.call, 0.0, 3, machine.clock, device=lambda: 0.3)
    assert found["samples"] == pytest.approx([0.5] * 3) and found["device_samples"] == pytest.approx([0.3] * 3)


def test_a_last_quarter_that_is_over_five_percent_slower_is_throttled() -> None:
    assert throttled([1.0] * 6 + [1.06] * 2) is True
    assert throttled([1.0] * 6 + [1.04] * 2) is False
    assert throttled([1.0] * 4 + [9.0] * 3) is None, "quarters of one sample say nothing"
    hot = Machine([0.2] * 15 + [0.3])
    assert steady(hot.call, 0.0, 16, hot.clock)["throttled"] is True


def test_waiting_is_in_a_samples_time_and_not_in_its_cpu_time() -> None:
    asleep = steady(lambda: time.sleep(0.05), 0.0, 3)
    assert min(asleep["samples"]) >= 0.05 and max(asleep["cpu"]) < 0.01

    def count() -> None:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass

    busy = steady(count, 0.0, 3)
    assert len(busy["cpu"]) == 3 and all(0.05 <= spent <= 0.06 for spent in busy["cpu"])
