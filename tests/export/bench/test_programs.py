"""What runtimes' own benchmark programs say. The texts are of their documentation and source, not of runs here."""

from __future__ import annotations

import pytest

from compress.errors import CompressError
from compress.exporters.bench.programs import PROGRAMS, figure, read_litert, read_mnn, read_ort

# onnxruntime/test/perftest: README.md and performance_runner.cc.
ORT = """\
Setting intra_op_num_threads to 1

Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.49481 s
Total inference requests: 5
Average inference time cost total: 98.961997 ms
Total inference run time: 0.494854 s
Number of inferences per second: 10.104
Avg CPU usage: 11 %
Peak working set size: 271122432 bytes
Min Latency: 0.0958204 s
Max Latency: 0.101519 s
P50 Latency: 0.0995086 s
P90 Latency: 0.101519 s
"""
ORT_RAW = (
    "net,0.0958204,271122432,11,0\nnet,0.101519,271122432,11,1\nnet,1.5e-3,271122432,11,2\n\nMin Latency: 0.09 s\n"
)
# tensorflow/lite/tools/benchmark.
LITERT = """\
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=1 curr=1357602
INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=1249964 curr=1240143 min=1238588 max=1252566 avg=1.24027e+06 std=2565 p5=1238753\
 median=1239807 p95=1247415
INFO: Inference timings in us: Init: 5579, First inference: 1357602, Warmup (avg): 1.3576e+06,\
 Inference (avg): 1.24027e+06
INFO: Overall peak memory footprint (MB) via periodic monitoring: 24.5
"""
# MNN tools/cpp/MNNV2Basic.cpp.
MNN = "Avg= 5.570600 ms, OpSum = 7.287200 ms min= 5.417000 ms, max= 6.101000 ms\n"


def test_onnxruntime_perf_test_gives_raw_samples_and_its_phases() -> None:
    found = read_ort(ORT, ORT_RAW)
    assert found["samples"] == [0.0958204, 0.101519, 0.0015]
    assert found["load"] == 0.217932 and found["first"] == 0.196 and found["peak_rss"] == 271122432
    assert found["summary"]["median"] == 0.0995086 and found["summary"]["count"] == 5
    assert figure(found)["calls_per_sample"] == 1


def test_older_perf_tests_are_read_too() -> None:
    old = "Session creation time cost:0.0285 s\nTotal inference requests:100\nAverage inference time cost:12.5 ms\n"
    found = read_ort(old)
    assert found["summary"]["mean"] == pytest.approx(0.0125) and "first" not in found
    assert figure(found)["samples"] == [pytest.approx(0.0125)]


def test_benchmark_model_is_read_in_seconds_of_its_steady_phase() -> None:
    found = read_litert(LITERT)
    assert found["load"] == pytest.approx(0.005579) and found["first"] == pytest.approx(1.357602)
    assert found["summary"]["median"] == pytest.approx(1.239807) and found["summary"]["count"] == 50
    assert found["peak_rss"] == 24_500_000
    made = figure(found)
    # One figure of fifty calls: nothing is said of tails or throttling.
    assert made["samples"] == [pytest.approx(1.239807)] and made["calls_per_sample"] == 50 and made["throttled"] is None


def test_mnn_tells_no_load_and_none_is_made_up() -> None:
    made = figure(read_mnn(MNN))
    assert made["samples"] == [pytest.approx(0.0055706)] and made["load"] is None and made["first"] is None


@pytest.mark.parametrize("format", sorted(PROGRAMS))
def test_another_output_is_one_error(format: str) -> None:
    with pytest.raises(CompressError, match="did not say how long"):
        PROGRAMS[format].read("CANNOT LINK EXECUTABLE: library not found\n", "")


def test_words_are_an_argument_list() -> None:
    request = {"threads": 4, "runs": 50, "min_seconds": 2.0, "axes": {"batch": 1}}
    words = PROGRAMS["ort"].words("/data/perf", "/data/my model.ort", request, "/data/raw")
    assert words[0] == "/data/perf" and words[-2:] == ["/data/my model.ort", "/data/raw"] and "batch:1" in words
    assert "--graph=/data/m" in PROGRAMS["litert"].words("/p", "/data/m", request, "")
