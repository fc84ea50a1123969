"""The gate on this machine as it is: a real self-test, and real A/A gates and slow-downs.

Where other work runs here a gate may end inconclusive, and must say why; a wrong verdict is a failure anywhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.command import compress
from tools import gate_experiment
from tools.ci.models import chain

pytestmark = pytest.mark.slow


def test_a_real_self_test_tells_what_this_machine_can_detect(tmp_path: Path) -> None:
    model = chain(tmp_path / "m.onnx", 6)
    ran = compress("gate", model, "--self-test", "--samples", 1, "--json")
    assert ran.code == 0, ran.err
    latency, memory = json.loads(ran.out)["self_test"]
    assert latency["figure"] == "latency" and len(latency["values"]) == 21
    assert latency["smallest_change"] > 0 and memory["smallest_change"] < 0.1
    # A large one must come from the noise that was seen.
    assert latency["smallest_change"] < 0.5 or latency["spread_between"] > 0.1


def test_real_gates_do_not_fail_falsely_and_catch_a_tenth_more_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gate_experiment.py", "--out", str(tmp_path), "--gates", "6"])
    gate_experiment.main()
    rows = gate_experiment.read(tmp_path / "gates.jsonl")
    verdicts = {kind: [r["verdict"] for r in rows if r["kind"] == kind] for kind in ("A/A", "slow")}
    assert len(verdicts["A/A"]) == 6 and "fail" not in verdicts["A/A"]
    assert len(verdicts["slow"]) == 2 and "pass" not in verdicts["slow"]
    for row in rows:
        assert (row["verdict"] == "inconclusive") == bool(row["reason"]), row
        assert row["verdict"] != "inconclusive" or "too noisy to decide after 21 rounds" in row["reason"]
    # The same command again adds nothing.
    gate_experiment.main()
    assert gate_experiment.read(tmp_path / "gates.jsonl") == rows
