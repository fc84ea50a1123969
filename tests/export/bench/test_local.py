"""Two exports measured: fresh processes, interleaved, raw samples kept, memory that is the process's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError
from compress.exporters.bench import local
from compress.exporters.bench.explain import OVERHEAD_SECONDS, why
from compress.exporters.bench.local import LOCAL, compare_llm
from compress.exporters.bench.packed import agent_file
from compress.report.explained import SMALL_SHARE, lines

SPEC = {"prompt": 8, "context": 8, "processes": 3, "threads": 1, "min_seconds": 0.01, "min_runs": 2}


@pytest.fixture(scope="module")
def measured(finished: Path) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """(record, the order in which processes were started)."""
    order: list[tuple[str, int]] = []
    real = local.Local.run

    def noted(here: local.Local, request: Mapping[str, Any]) -> dict[str, Any]:
        order.append((Path(request["files"]["prefill"]).parent.name, request["seed"]))
        return real(here, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.Local, "run", noted)
        return compare_llm(finished / "export-dense", finished / "export-pruned", SPEC, 300), order


def test_processes_are_interleaved_abba(measured: tuple[dict[str, Any], list[tuple[str, int]]]) -> None:
    names = [name.removeprefix("export-") for name, _ in measured[1]]
    assert names == ["dense", "pruned", "pruned", "dense", "dense", "pruned"]
    assert [seed for _, seed in measured[1]] == [0, 0, 1, 1, 2, 2], "both models of a round read the same tokens"


def test_every_figure_can_be_reckoned_again_from_the_raw_samples(
    measured: tuple[dict[str, Any], list[tuple[str, int]]], finished: Path
) -> None:
    record = json.loads(json.dumps(measured[0]))
    for label in ("dense", "pruned"):
        for figure in ("ttft", "tpot"):
            found = record[label][figure]
            medians = [median(samples) for samples in found["raw"]]
            assert found["process_medians"] == medians and found["median"] == median(medians)
            assert len(found["raw"]) == 3 and all(len(s) >= 2 for s in found["raw"])
            assert found["spread_between"] == pytest.approx((max(medians) - min(medians)) / median(medians))
        files = [p for p in (finished / f"export-{label}").iterdir() if p.suffix in (".onnx", ".data")]
        assert len(files) == 3 and record[label]["bytes"] == sum(p.stat().st_size for p in files)
    dense, pruned = (np.array(record[k]["ttft"]["process_medians"]) for k in ("dense", "pruned"))
    assert record["ratios"]["ttft"]["median"] == pytest.approx(np.median(dense / pruned))
    assert record["spec"]["runtime"].startswith("onnxruntime ")


def test_peak_memory_is_the_agents_own_whoever_starts_it(finished: Path) -> None:
    # The parent fills 600 MB before it starts the agent.
    script = (
        "import json, subprocess, sys\n"
        "fat = bytearray(b'x') * 600_000_000\n"
        "done = subprocess.run([sys.executable, sys.argv[1]], input=sys.argv[2], capture_output=True, text=True)\n"
        "print(json.loads(done.stdout)['peak_rss'])\n"
    )
    folder = finished / "export-pruned"
    files = {name: str(folder / f"{name}.onnx") for name in ("prefill", "decode")}
    request = {**SPEC, "do": "measure", "format": "onnx", "files": files, "vocab": 300, "seed": 0}
    request |= {"prompts": [8], "contexts": [8]}
    agent = agent_file()
    done = subprocess.run(
        [sys.executable, "-c", script, str(agent), json.dumps(request)], capture_output=True, text=True, check=True
    )
    assert 20e6 < int(done.stdout) < 400e6


def test_a_measuring_process_that_fails_is_one_error(finished: Path, tmp_path: Path) -> None:
    for name in ("prefill.onnx", "decode.onnx", "weights.data"):
        (tmp_path / name).write_bytes(b"")  # a model of nothing, to ONNX's own reader
    with pytest.raises(CompressError, match=r"ONNX Runtime cannot load prefill\.onnx"):
        compare_llm(finished / "export-dense", tmp_path, SPEC, 300)


def test_a_language_models_two_graphs_are_explained(finished: Path) -> None:
    spec = {"threads": 1, "prompt": 16, "context": 16, "processes": 2}
    found = why(finished / "export-dense", finished / "export-pruned", spec, LOCAL)
    assert set(found) == {"prefill", "decode"}
    for part in found.values():
        assert part["ideal"] > 1.05 and sum(bool(r["dense_flops"]) for r in part["layers"]) > 10
        small = part["small"]
        both = sum(r["pruned_seconds"] < OVERHEAD_SECONDS for r in part["layers"])
        assert small["of"] == len(part["layers"]) + len(part["added"])
        assert 0 < both <= small["nodes"] <= both + len(part["added"])
        if part["reached"] < 0.8 and small["share"] > SMALL_SHARE:
            said = lines({**part, "ratio": {"median": part["measured"], "low": 1.0, "high": 1.0, "pairs": [1.0] * 5}})
            assert any("nodes take under" in line for line in said)
