"""How a figure is measured: warm up until it is steady, then long enough and often enough.

Imports nothing but the standard library: it is copied to the device together with the agent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

SAMPLE_SECONDS = 0.1  # a sample lasts at least this long; faster calls are batched
STEADY = 0.05  # warmed up when a block is not this much better than the one before it
WARM_BLOCK, WARM_CALLS, WARM_SECONDS = 3, 30, 20.0
THROTTLED = 0.05  # the last quarter's median this much slower than the first's
QUARTER = 2  # samples a quarter needs before it says anything


def steady(
    call: Callable[[], Any],
    min_seconds: float,
    min_runs: int,
    clock: Callable[[], float] = time.perf_counter,
    sample_seconds: float = SAMPLE_SECONDS,
    device: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Times ``call()``.

    Args:
        min_seconds, min_runs: it stops when both are reached.
        sample_seconds: calls that are faster are batched into samples of this length; 0: every call is a sample, as
            quantiles need it.
        device: seconds of the last call by the device's own clock, transfers not counted.

    Returns:
        dict: ``samples`` (seconds a call), ``fastest`` (seconds of each sample's fastest call), ``cpu`` (seconds a call
        that this process's threads ran, together: waiting for a core that others use is not in it),
        ``calls_per_sample`` (at least), ``warm_up`` (seconds of each warm-up call), ``warm`` (False where a cap ended
        it), ``throttled`` (None where there are too few samples to tell) and, with ``device``, ``device_samples``.
    """
    warm_up: list[float] = []
    best, warm = math.inf, False
    began = clock()
    while len(warm_up) < WARM_CALLS and clock() - began < WARM_SECONDS:
        for _ in range(WARM_BLOCK):
            start = clock()
            call()
            warm_up.append(clock() - start)
        block = min(warm_up[-WARM_BLOCK:])
        if block > best * (1 - STEADY):
            warm = True
            break
        best = min(best, block)
    calls = max(1, math.ceil(sample_seconds / max(min(warm_up), 1e-9)))
    # More where a call has become faster since; a bound, lest a clock that stands still is waited for.
    least, most = sample_seconds - 1e-9 if calls > 1 else 0.0, 10 * calls
    samples: list[float] = []
    fastest: list[float] = []
    cpu: list[float] = []
    on_device: list[float] = []
    began = clock()
    while len(samples) < min_runs or clock() - began < min_seconds:
        best, there, made = math.inf, 0.0, 0
        ran = time.process_time()
        start = before = clock()
        while made < calls or (before - start < least and made < most):
            call()
            after = clock()
            best, before = min(best, after - before), after
            made += 1
            if device is not None:
                there += device()
        samples.append((before - start) / made if device is None else (clock() - start) / made)
        cpu.append((time.process_time() - ran) / made)
        fastest.append(best)
        on_device.append(there / made)
    found: dict[str, Any] = {"samples": samples, "fastest": fastest, "cpu": cpu, "calls_per_sample": calls}
    found = {**found, "warm_up": warm_up, "warm": warm, "throttled": throttled(samples)}
    return {**found, "device_samples": on_device} if device is not None else found


def throttled(samples: list[float]) -> bool | None:
    """Whether the last quarter is over 5 % slower than the first; None where a quarter is under two samples."""
    quarter = len(samples) // 4
    if quarter < QUARTER:
        return None
    return _median(samples[-quarter:]) > (1 + THROTTLED) * _median(samples[:quarter])


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
