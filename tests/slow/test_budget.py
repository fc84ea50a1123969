"""A budget of a time on a model whose times can be told apart, in the runtime itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.claims.verify import HOLDS
from compress.report.build import read_report
from tests.command import compress
from tests.tiny import saved_tiny, tiny_job

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
SETTINGS = (
    "layouts=[per-layer]", "evaluation.curve=[]", "tyr.round_to=64", "tyr.levels=3", "tyr.head_levels=2",
    "tyr.interval=0.5", "tyr.iterations=1",
    "bench={prompt: 24, context: 24, processes: 5, threads: 1, min_seconds: 0.3, min_runs: 3}",
)  # fmt: skip


def test_a_run_under_a_budget_of_tpot_is_faster_by_it_or_says_that_it_is_not(tmp_path: Path) -> None:
    _, recipe = tiny_job(tmp_path / "job")
    model = saved_tiny(tmp_path / "model", **SIZES)
    words = [word for setting in SETTINGS for word in ("--set", setting)]
    out = tmp_path / "run"
    ran = compress("prune", model, "--recipe", recipe, "--out", out, *words, "-b", "tpot<=0.6x", "-b", "size<=0.9x")
    assert ran.code == 0, ran.err
    size, time = read_report(out)["budgets"]
    assert size["held"] and size["measured"] <= size["asked"]
    assert time["table"] <= time["asked"] < time["dense"] and time["table_error"]["models"] == 3
    share = time["share"]
    assert share["low"] <= share["median"] <= share["high"] < 1  # faster than the dense model, whatever the noise
    assert time["held"] is (True if share["high"] <= 0.6 else False if share["low"] > 0.6 else None)
    assert time["held"] is not False or "not held" in ran.out
    # What was timed before its weights were made is the model that was made.
    layers = json.loads((out / f"latency-whole-{time['search']}" / "seal.json").read_text())["inputs"]["shapes"]
    assert layers == [[row["heads"], row["kv_heads"], row["neurons"]] for row in read_report(out)["layers"]]
    found = json.loads(compress("verify", out, "--json").out)["claims"]
    assert {c["verdict"] for c in found} == {HOLDS}
    again = compress("prune", model, "--recipe", recipe, "--out", out, *words, "-b", "tpot<=0.6x", "-b", "size<=0.9x")
    assert again.out == ran.out
