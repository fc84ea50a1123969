"""Export, doctor and bench for a target, by the command line; the plots and the marks that come of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.exporters.bench.plots import speed_up
from compress.exporters.on_target import bench_lines, build_options
from compress.report.plots import draw
from tests.command import compress, one_error
from tests.export.bench.nets import conv_net

QUICK = "measure: {processes: 2, min_seconds: 0.02, min_runs: 8, sample_seconds: 0.001}\n"


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("nets")
    return conv_net(folder / "dense", channels=32, size=32), conv_net(folder / "pruned", channels=18, size=32)


def target(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text("extends: this-machine\n" + QUICK + text)
    return path


def test_the_doctor_says_what_this_machine_is() -> None:
    ran = compress("doctor", "--target", "this-machine", "--json")
    rows = {row["part"]: row for row in json.loads(ran.out)["parts"]}
    assert ran.code == 0 and rows["onnx"]["state"] == "ok" and "onnxruntime" in rows["onnx"]["detail"]
    assert {"disk", "load", "power"} <= set(rows)


def test_a_targets_format_is_built_and_measured(nets: tuple[Path, Path], tmp_path: Path) -> None:
    mine = target(tmp_path, "format: ort\nbudget: 0.000001\n")
    one_error(compress("bench", *nets, "--target", mine), 1, "there is no model.ort", "--target mine")
    built = []
    for net in nets:
        built.append(tmp_path / net.name)
        assert compress("export", net, "--target", mine, "--out", built[-1]).code == 0
        assert (built[-1] / "ort" / "model.ort").is_file()
    ran = compress("bench", *built, "--target", mine)
    assert ran.code == 0 and "0.000001" not in ran.out and "NOT kept" in ran.out, ran.out + ran.err
    file = built[1] / "ort" / "model.ort"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    one_error(compress("bench", *built, "--target", mine), 1, "changed since it was built", "model.ort")


def test_what_was_measured_is_written_with_its_plots_and_reasons(nets: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "measured"
    ran = compress("bench", *nets, "--target", target(tmp_path, ""), "--out", out)
    assert ran.code == 0, ran.err
    found = json.loads((out / "bench.json").read_text())
    assert len(found["pruned"]["latency"]["raw"]) == 2 and found["why"]["model"]["ideal"] > 2
    assert {p.name for p in out.glob("*.png")} == {"distribution.png", "layers-model.png", "memory.png"}
    assert "ideal   model: " in ran.out and f"target  mine: {found['machine']['cpu']}" in ran.out
    # The marks.
    marked = {**found, "emulated": True, "throttled": True, "budget": {"milliseconds": 5.0, "kept": {"latency": None}}}
    said = "\n".join(bench_lines(marked))
    assert "never gated" in said and "mark    throttled" in said and "not judged" in said


def test_options_of_another_kind_are_refused(nets: tuple[Path, Path], tmp_path: Path) -> None:
    one_error(
        compress("bench", *nets, "--target", target(tmp_path, ""), "--prompt", 8), 2, "--prompt is not for this kind"
    )
    one_error(compress("bench", tmp_path, tmp_path, "--target", "this-machine"), 1, "there is no model.onnx")


def test_a_corrupt_file_is_one_error(nets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((nets[0] / "model.onnx").read_bytes()[:500])
    one_error(
        compress("bench", nets[0], tmp_path, "--target", target(tmp_path, "")), 1, "no valid ONNX file", "model.onnx"
    )


def test_an_engine_is_built_for_the_gpus_and_shapes_that_the_target_names(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = build_options("l4")
    assert (options.format, options.precision, options.capabilities) == ("tensorrt_rtx", "fp16", ("sm89",))
    assert options.profiles["model"][0]["batch"] == (1, 1, 1)
    assert options.profiles["prefill"][0]["sequence"] == (1, 128, 4096)
    assert options.profiles["decode"][0]["past"] == (1, 128, 4096)


def test_speed_up_is_drawn_against_the_ideal(tmp_path: Path) -> None:
    points = [
        {"runtime": r, "removed": f, "ratio": {"median": m, "low": m - 0.1, "high": m + 0.1}}
        for r, f, m in (("a", 0.5, 1.8), ("a", 0.75, 3.0), ("b", 0.5, 1.2))
    ]
    seen = {}

    def job(report: dict[str, object], plt: object) -> object:
        panels = [{"title": work, "work": work, "points": points} for work in ("FLOPs", "bytes of weights")]
        figure = speed_up(panels, plt)
        seen["lines"] = {line.get_label(): line for axis in figure.axes for line in axis.get_lines()}
        return figure

    assert draw({}, tmp_path, {"speed-up": job})["speed-up"].stat().st_size > 5000
    for work in ("FLOPs", "bytes of weights"):
        ideal = seen["lines"][f"ideal: 1 / {work} left"]
        x, y = ideal.get_xdata(), ideal.get_ydata()
        assert y == pytest.approx(1 / (1 - x / 100))
