"""What is compared, how it is measured, and when it is refused. Times are drawn where a test says what they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import CompressError, UsageError
from compress.exporters import gate
from compress.exporters.gate import parse_budget
from compress.exporters.gate_measure import Measuring, whole_shapes
from compress.exporters.gate_measure import measure as really
from compress.exporters.gate_models import Artefact, check_inputs, find
from compress.exporters.gate_run import compare, self_test
from tools.ci.models import chain


def net(path: Path, name: str = "input", kind: int = TensorProto.FLOAT, shape: Any = ("batch", 3, 8)) -> Path:
    ends = [helper.make_tensor_value_info(n, kind, list(shape)) for n in (name, "out")]
    graph = helper.make_graph([helper.make_node("Identity", [name], ["out"])], "g", ends[:1], ends[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Machine:
    """A machine whose times and memory a test decides: the place of real measuring processes."""

    def __init__(self, times: dict[str, float], noise: float = 0.001, memory: float = 5e7, slope: float = 0.0) -> None:
        self.times, self.noise, self.memory, self.slope = times, noise, memory, slope
        self.rng = np.random.default_rng(0)
        self.order: list[tuple[str, int]] = []

    def __call__(self, artefact: Artefact, spec: Measuring, seed: int) -> dict[str, Any]:
        self.order.append((artefact.path.stem, seed))
        drift = 1 + self.slope * len(self.order)
        middle = self.times[artefact.path.stem] * float(np.exp(self.noise * self.rng.standard_normal())) * drift
        samples = [middle * (1 + 0.1 * i / spec.samples) for i in range(spec.samples)]
        figure = {"samples": samples, "fastest": samples, "calls_per_sample": 9, "warm": True}
        return {"runtime": "drawn", "peak_rss": self.memory, "latency": figure}


@pytest.fixture
def both(tmp_path: Path) -> tuple[Artefact, Artefact]:
    return find(str(net(tmp_path / "a.onnx"))), find(str(net(tmp_path / "b.onnx")))


def row(record: dict[str, Any], i: int = 0) -> dict[str, Any]:
    return dict(record["budgets"][i])


def test_processes_are_interleaved_abba_and_a_round_has_one_seed(both: tuple[Artefact, Artefact]) -> None:
    machine = Machine({"a": 1.0, "b": 1.0})
    record = compare(*both, [parse_budget("latency<=1.05x")], Measuring(), measure=machine)
    assert [name for name, _ in machine.order[:6]] == ["a", "b", "b", "a", "a", "b"]
    assert [seed for _, seed in machine.order[:6]] == [0, 0, 1, 1, 2, 2]
    assert record["verdict"] == "pass" and row(record)["rounds"] == 7 and len(machine.order) == 14


def test_it_goes_on_while_undecided_and_no_longer(both: tuple[Artefact, Artefact]) -> None:
    budgets = [parse_budget("latency<=1.05x")]
    slow = compare(*both, budgets, Measuring(), measure=Machine({"a": 1.0, "b": 1.1}))
    assert (slow["verdict"], row(slow)["rounds"], slow["exit_code"]) == ("fail", 9, 1)
    unclear = compare(*both, budgets, Measuring(), measure=Machine({"a": 1.0, "b": 1.05}, noise=0.01))
    assert (unclear["verdict"], row(unclear)["rounds"], unclear["exit_code"]) == ("inconclusive", 21, 3)
    strict = compare(*both, budgets, Measuring(), measure=Machine({"a": 1.0, "b": 1.05}, noise=0.01), strict=True)
    assert (strict["verdict"], strict["exit_code"]) == ("inconclusive", 1)


def test_every_figure_can_be_reckoned_again_from_the_raw_samples(both: tuple[Artefact, Artefact]) -> None:
    record = compare(*both, [parse_budget("latency<=1.05x")], Measuring(), measure=Machine({"a": 1.0, "b": 0.8}))
    raw = record["raw"]
    ratios = [
        min(b["latency"]["fastest"]) / min(a["latency"]["fastest"])
        for a, b in zip(raw["baseline"], raw["candidate"], strict=True)
    ]
    assert row(record)["values"] == ratios
    assert row(record)["value"] == float(np.median(ratios))
    assert (row(record)["low"], row(record)["high"]) == (min(ratios), max(ratios)), "of seven pairs, the outermost"


def test_several_budgets_in_one_call_one_fail_fails(both: tuple[Artefact, Artefact]) -> None:
    texts = ["latency<=1.05x", "memory<=1.1x", "size<=0.5x", "latency.median<=1.2x"]
    record = compare(*both, [parse_budget(t) for t in texts], Measuring(), measure=Machine({"a": 1.0, "b": 1.0}))
    verdicts = {r["budget"]: r["verdict"] for r in record["budgets"]}
    assert verdicts == {texts[0]: "pass", texts[1]: "pass", texts[2]: "fail", texts[3]: "pass"}
    assert record["exit_code"] == 1


def test_a_noisy_machine_is_inconclusive_and_says_why(both: tuple[Artefact, Artefact]) -> None:
    machine = Machine({"a": 1.0, "b": 1.0}, noise=0.3, slope=0.02)
    record = compare(*both, [parse_budget("latency<=1.02x")], Measuring(), measure=machine)
    reason = row(record)["reason"]
    assert record["verdict"] == "inconclusive"
    for part in ("nearer to 1 than the smallest change", "spread between processes", "load", "cores", "throttled"):
        assert part in reason


class Bursts(Machine):
    """Three of ten processes take twice as long."""

    def __call__(self, artefact: Artefact, spec: Measuring, seed: int) -> dict[str, Any]:
        found = super().__call__(artefact, spec, seed)
        slower = 2.0 if len(self.order) % 10 in (1, 2, 6) else 1.0
        for key in ("samples", "fastest"):
            found["latency"][key] = [slower * t for t in found["latency"][key]]
        return found


def test_where_processes_are_slowed_down_a_round_is_the_fastest_of_several(both: tuple[Artefact, Artefact]) -> None:
    for slower, verdict in ((1.0, "pass"), (1.1, "fail")):
        machine = Bursts({"a": 1.0, "b": slower})
        record = compare(*both, [parse_budget("latency<=1.05x")], Measuring(), measure=machine)
        assert record["verdict"] == verdict and 7 <= row(record)["rounds"] <= 9
        aside = record["set_aside"]
        assert record["spec"]["processes"] == gate.REPEATS
        assert len(aside["baseline"]) == len(aside["candidate"]) == gate.PILOT
        each = 2 * gate.REPEATS
        assert len(machine.order) == 2 * gate.PILOT + each * row(record)["rounds"]
        first = [name for name, _ in machine.order[2 * gate.PILOT :][:each]]
        assert first == ["a", "b", "b", "a"] * (gate.REPEATS // 2)
        for sample in record["raw"]["candidate"]:
            own = [min(s["latency"]["fastest"]) for s in sample["processes"]]
            assert len(own) == gate.REPEATS and min(sample["latency"]["fastest"]) == min(own)
            medians = [float(np.median(s["latency"]["samples"])) for s in sample["processes"]]
            assert np.median(sample["latency"]["samples"]) == min(medians)
        assert max(row(record)["values"]) < 1.02 * slower


def test_a_figure_for_itself_is_never_the_best_of_several(both: tuple[Artefact, Artefact]) -> None:
    budget = parse_budget("latency<=5s")
    machine = Bursts({"a": 1.0, "b": 1.0})
    record = compare(*both, [budget], Measuring(), measure=machine, pinned="lab board 3")
    assert not record["set_aside"] and len(machine.order) == 2 * row(record)["rounds"]


def test_a_slow_down_below_the_smallest_change_does_not_fail_a_tight_budget(both: tuple[Artefact, Artefact]) -> None:
    machine = Machine({"a": 1.0, "b": 1.01}, noise=0.02)
    record = compare(*both, [parse_budget("latency<=1.0x")], Measuring(), measure=machine)
    assert record["verdict"] == "inconclusive"
    machine = Machine({"a": 1.0, "b": 1.3}, noise=0.02)
    large = compare(*both, [parse_budget("latency<=1.0x")], Measuring(), measure=machine)
    assert large["verdict"] == "fail"


def test_absolute_times_need_a_pinned_device(both: tuple[Artefact, Artefact]) -> None:
    budget = parse_budget("latency.p90<=40ms")
    with pytest.raises(UsageError, match="named, pinned device"):
        compare(*both, [budget], Measuring(), measure=Machine({"a": 0.03, "b": 0.03}))
    times = {"a": 0.03, "b": 0.03}
    record = compare(*both, [budget], Measuring(), measure=Machine(times), pinned="lab board 3")
    assert record["verdict"] == "pass" and record["machine"]["pinned"] == "lab board 3"
    samples = record["raw"]["candidate"][0]["latency"]["samples"]
    assert 7 * len(samples) >= 100
    assert row(record)["values"][0] == pytest.approx(np.percentile(samples, 90))
    over = compare(*both, [budget], Measuring(), measure=Machine({"a": 0.03, "b": 0.05}), pinned="lab board 3")
    assert over["verdict"] == "fail"


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"name": "pixels"}, "only the baseline takes an input 'input'"),
        ({"kind": TensorProto.DOUBLE}, "input 'input' is float and double"),
        ({"shape": ("batch", 3, 16)}, "the shapes of input 'input' differ: batchx3x8 and batchx3x16"),
        ({"shape": ("batch", 3)}, "the shapes of input 'input' differ"),
    ],
)
def test_different_inputs_are_refused_by_name(tmp_path: Path, changed: dict[str, Any], part: str) -> None:
    baseline, candidate = find(str(net(tmp_path / "a.onnx"))), find(str(net(tmp_path / "b.onnx", **changed)))
    with pytest.raises(UsageError) as caught:
        compare(baseline, candidate, [parse_budget("latency<=2x")], Measuring(), measure=Machine({}))
    assert part in str(caught.value)


def test_another_name_of_a_free_dimension_is_no_difference(tmp_path: Path) -> None:
    check_inputs(find(str(net(tmp_path / "a.onnx"))), find(str(net(tmp_path / "b.onnx", shape=("n", 3, 8)))))
    check_inputs(find(str(net(tmp_path / "a.onnx"))), find(str(net(tmp_path / "c.onnx", shape=(1, 3, 8)))))


def test_a_free_dimension_that_is_no_batch_must_be_said(tmp_path: Path) -> None:
    model = find(str(net(tmp_path / "a.onnx", shape=("batch", "length", 8))))
    with pytest.raises(UsageError, match="'length' of input 'input' is free") as caught:
        whole_shapes(model, Measuring())
    assert "--shape input=" in str(caught.value)
    assert whole_shapes(model, Measuring(shapes={"input": [2, 5, 8]})) == {"input": [2, 5, 8]}
    with pytest.raises(UsageError, match="does not fit"):
        whole_shapes(model, Measuring(shapes={"input": [2, 5, 9]}))
    with pytest.raises(UsageError, match="no input 'x'"):
        whole_shapes(model, Measuring(shapes={"x": [1]}))
    fixed = find(str(net(tmp_path / "b.onnx")))
    assert whole_shapes(fixed, Measuring(batch=4)) == {"input": [4, 3, 8]}


def test_a_stored_figure_is_no_baseline(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(UsageError, match="another machine"):
        find(str(tmp_path / "bench.json"))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for name, part in (
        ("nothing.onnx", "no such file"),
        ("notes.txt", "no exported model"),
        ("empty", "no exported model here"),
        ("broken.onnx", "no valid ONNX file"),
        ("a\n::error::b.onnx", "control characters"),
    ):
        with pytest.raises(CompressError, match=part):
            find(str(tmp_path / name))
    net(tmp_path / "two" / "a.onnx"), net(tmp_path / "two" / "b.onnx")
    with pytest.raises(UsageError, match="2 models"):
        find(str(tmp_path / "two"))


def test_weights_beside_the_graph_count_as_size(tmp_path: Path) -> None:
    path = chain(tmp_path / "m.onnx", 3)
    whole = find(str(path)).bytes
    model = onnx.load(path)
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    apart = find(str(tmp_path / "apart.onnx"))
    assert {f.name for f in apart.files} == {"apart.onnx", "apart.data"}
    assert apart.bytes == pytest.approx(whole, rel=0.02)


def test_weights_that_are_missing_or_cut_short_are_no_small_model(tmp_path: Path) -> None:
    model = onnx.load(chain(tmp_path / "m.onnx", 3))
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    weights = tmp_path / "apart.data"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CompressError, match=r"weights of apart\.onnx are cut short: 110,592 bytes are needed"):
        find(str(tmp_path / "apart.onnx"))
    weights.unlink()
    with pytest.raises(CompressError, match=r"weights of apart\.onnx are missing"):
        find(str(tmp_path / "apart.onnx"))


def test_a_file_that_is_read_without_complaint_and_holds_no_network_is_refused(tmp_path: Path) -> None:
    whole = chain(tmp_path / "m.onnx", 3).read_bytes()
    for size in (0, 2):  # nothing at all, and the version alone
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        with pytest.raises(CompressError, match="holds no network"):
            find(str(tmp_path / "cut.onnx"))


def test_quality_is_compared_only_where_reports_say_it(both: tuple[Artefact, Artefact]) -> None:
    with pytest.raises(UsageError, match="nothing says what perplexity"):
        compare(*both, [parse_budget("perplexity<=1.02x")], Measuring())


def judged(accuracy: float, ppl: float = 10.0, windows: int = 8, task: str = "shape") -> Artefact:
    texts = {name: (value, f"{windows} windows of 64 tokens") for name, value in (("t", ppl), ("u", 40.0))}
    quality = {"accuracy": {task: ("accuracy", accuracy)}, "perplexity": texts}
    return Artefact("run", "network", Path("x"), (), {}, quality)


def test_accuracy_is_a_change_in_points_and_perplexity_a_ratio_of_geometric_means() -> None:
    budgets = [parse_budget("accuracy>=-0.5%"), parse_budget("perplexity<=1.42x")]
    good = compare(judged(0.900), judged(0.895, ppl=20.0), budgets, Measuring())
    assert [r["verdict"] for r in good["budgets"]] == ["pass", "pass"]
    assert row(good)["value"] == pytest.approx(-0.005) and row(good)["part"] == "shape"
    assert row(good, 1)["value"] == pytest.approx(2**0.5)
    bad = compare(judged(0.900), judged(0.894, ppl=20.4), budgets, Measuring())
    assert [r["verdict"] for r in bad["budgets"]] == ["fail", "fail"]
    assert bad["raw"] == {"baseline": [], "candidate": []}, "nothing was measured for it"


def test_figures_of_other_texts_or_tasks_are_not_compared() -> None:
    with pytest.raises(UsageError, match="not measure perplexity on the same"):
        compare(judged(0.9), judged(0.9, windows=9), [parse_budget("perplexity<=2x")], Measuring())
    with pytest.raises(UsageError, match="not measure accuracy on the same"):
        compare(judged(0.9), judged(0.9, task="other"), [parse_budget("accuracy>=-5%")], Measuring())


def test_budgets_that_make_no_sense_together_are_refused(both: tuple[Artefact, Artefact]) -> None:
    for texts, part in (
        ([], "no budget"),
        (["latency<=1.1x", "latency<=1.2x"], "two budgets"),
        (["ttft<=1.1x"], "a plain network has no ttft"),
    ):
        with pytest.raises(UsageError, match=part):
            compare(*both, [parse_budget(t) for t in texts], Measuring())


def test_a_self_test_tells_the_smallest_change_and_refuses_a_tighter_budget(both: tuple[Artefact, Artefact]) -> None:
    quiet = self_test(both[0], [parse_budget("latency<=1.05x")], Measuring(), measure=Machine({"a": 1.0}, noise=0.01))
    latency = quiet["self_test"][0]
    assert latency["figure"] == "latency" and 0.005 < latency["smallest_change"] < 0.03
    assert len(latency["values"]) == gate.LAST
    with pytest.raises(UsageError, match="tighter than the smallest change of latency") as caught:
        self_test(both[0], [parse_budget("latency<=1.01x")], Measuring(), measure=Machine({"a": 1.0}, noise=0.05))
    assert "latency<=1." in caught.value.fix


def test_a_real_process_measures_time_and_memory(tmp_path: Path) -> None:
    model = find(str(chain(tmp_path / "m.onnx", 4)))
    found = really(model, Measuring(samples=2), 0)
    latency = found["latency"]
    assert len(latency["samples"]) == len(latency["fastest"]) == 2
    for mean, fastest in zip(latency["samples"], latency["fastest"], strict=True):
        assert 0 < fastest <= mean
    fast = 0.1 / min(latency["warm_up"])
    assert latency["calls_per_sample"] == math.ceil(fast) > 1, "a sample lasts a tenth of a second"
    assert found["peak_rss"] > 2e7 and found["runtime"].startswith("onnxruntime ")


def test_a_measuring_process_that_fails_is_one_error(tmp_path: Path) -> None:
    path = net(tmp_path / "a.onnx")
    model = find(str(path))
    path.write_bytes(b"")  # a model of nothing, to ONNX's own reader
    with pytest.raises(CompressError, match=r"cannot load a\.onnx"):
        really(model, Measuring(), 0)
