"""How a figure is measured: warm up until it is steady, then long enough and often enough.

Imports nothing but the standard library: it is copied to the device together with the agent.
"""

import math
import time

SAMPLE_SECONDS = 0.1  # a sample lasts at least this long; faster calls are batched
STEADY = 0.05  # warmed up when a block is not this much better than the one before it
WARM_BLOCK, WARM_CALLS, WARM_SECONDS = 3, 30, 20.0


def steady(call, min_seconds, min_runs, clock=time.perf_counter):  # type: ignore[no-untyped-def]
    """Times ``call()``.

    Returns:
        dict: ``samples`` (seconds a call), ``fastest`` (seconds of each sample's fastest call), ``calls_per_sample``,
        ``warm_up`` (seconds of each warm-up call), and ``warm`` (False where a cap ended the warm-up).
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
    calls = max(1, math.ceil(SAMPLE_SECONDS / min(warm_up)))
    samples: list[float] = []
    fastest: list[float] = []
    began = clock()
    while len(samples) < min_runs or clock() - began < min_seconds:
        best = math.inf
        start = before = clock()
        for _ in range(calls):
            call()
            after = clock()
            best, before = min(best, after - before), after
        samples.append((before - start) / calls)
        fastest.append(best)
    return {"samples": samples, "fastest": fastest, "calls_per_sample": calls, "warm_up": warm_up, "warm": warm}
