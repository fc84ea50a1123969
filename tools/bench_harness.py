"""What the measuring itself costs, and whether it agrees with the plain loop that onnxruntime_perf_test runs.

    python tools/bench_harness.py                       # a convolutional network of about 10 ms
    python tools/bench_harness.py --model model.onnx    # any network's file

Three things, in one process and on one session, so that nothing but the loop differs:

1. the loop alone: the protocol around a call that does nothing, in seconds a call and as a share of 10 ms;
2. agreement: blocks of the protocol and of the plain loop (a clock reading before and after every `session.run`, the
   median of all) take turns; the median of their paired ratios with its 95 % interval;
3. noise: the same ratio of the plain loop's blocks to each other. Agreement is asked for within it.

The definitions side by side: onnxruntime_perf_test calls once to warm up and reports the mean and quantiles of single
calls; trtexec warms up for 200 ms, measures for 3 s and 10 runs at least, and reports the same of its host latency;
this protocol warms up until a block stops improving by 5 %, stops on time and count, and tells no tail below 100 calls.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from compress.exporters import runtimes
from compress.exporters.bench.protocol import SAMPLE_SECONDS, steady
from compress.report.stats import paired_ratio

TEN = 0.01  # seconds


def network(folder: Path, channels: int) -> Path:
    """Four convolutions over 64 x 64 values."""
    from tests.export.bench.nets import conv_net

    return conv_net(folder, channels=channels, size=64, layers=4) / "model.onnx"


def plain(session: Any, feed: dict[str, Any], count: int) -> list[float]:
    """onnxruntime_perf_test's loop: seconds of every single call."""
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        session.run(None, feed)
        samples.append(time.perf_counter() - start)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a block")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    empty = [median(steady(_nothing, 0.2, 5, sample_seconds=s)["samples"]) for s in (SAMPLE_SECONDS, 0.0)]
    with tempfile.TemporaryDirectory() as beside:
        path = given.model or network(Path(beside), given.channels)
        runner = runtimes.load("onnx", str(path), 1)
        draw = np.random.default_rng(0)
        feed = {
            v.name: draw.standard_normal([1 if n is None else n for n in v.shape]).astype(v.dtype)
            for v in runner.inputs
        }
        call, session = runner.prepare(feed), runner.native
        for _ in range(10):
            call()
        took = median(plain(session, feed, 10))
        count = max(5, round(given.seconds / took))
        ours, theirs, again = [], [], []
        for i in range(given.rounds):
            for which in (0, 1, 2) if i % 2 == 0 else (2, 1, 0):
                if which == 1:
                    ours.append(median(steady(call, given.seconds, 5)["samples"]))
                else:
                    (theirs if which == 0 else again).append(median(plain(session, feed, count)))
    either = [(a + b) / 2 for a, b in zip(theirs, again, strict=True)]
    agreement, noise = paired_ratio(ours, either), paired_ratio(theirs, again)
    found = {
        "loop_seconds": {"batched": empty[0], "single": empty[1]},
        "share_of_10_ms": {"batched": empty[0] / TEN, "single": empty[1] / TEN},
        "plain_loop_ms": 1e3 * median(either),
        "protocol_ms": 1e3 * median(ours),
        "agreement": {k: agreement[k] for k in ("median", "low", "high")},
        "noise": {k: noise[k] for k in ("median", "low", "high")},
        "rounds": given.rounds,
    }
    if given.json:
        print(json.dumps(found, indent=1))
        return
    for name, seconds in found["loop_seconds"].items():  # type: ignore[attr-defined]
        print(f"the loop alone, {name} samples: {1e9 * seconds:.0f} ns a call, {100 * seconds / TEN:.4f} % of 10 ms")
    print(f"plain loop {1e3 * median(either):.3f} ms, this protocol {1e3 * median(ours):.3f} ms")
    for name, r in (("protocol / plain loop", agreement), ("plain loop / itself   ", noise)):
        print(f"{name}: {r['median']:.4f} (95 %: {r['low']:.4f} to {r['high']:.4f}, {given.rounds} rounds)")


def _nothing() -> None:
    return None


if __name__ == "__main__":
    main()
