"""Every method and every shape of its report through every renderer: none trips over what was not measured."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from compress.data.tasks import KINDS
from compress.errors import CompressError
from compress.pipeline import method_of
from compress.report.build import finish, read_report
from compress.report.charts import charts
from compress.report.html import page
from compress.report.metadata import assemble
from compress.report.rows import VERSION, Row, better, check, made, qualities, rows
from compress.words.escape import terminal
from tests.report.test_hostile_reports import BODIES, HEADS
from tests.report.test_plots import drawn
from tests.reports import NAMES, sample

Report = dict[str, Any]
TEXTS, NETWORKS = ("tyr", "global-mp-text"), ("global-mp-network", "pagcp")


def whole(report: Report) -> None:
    pass


def without_export(report: Report) -> None:
    del report["export"], report["bench"]


def without_bench(report: Report) -> None:
    del report["bench"]


def built_but_not_run(report: Report) -> None:
    if "data" in report:  # of a language model there is ONNX alone
        sizes = {"bytes": {"model.engine": 1000}, "skipped": "no GPU"}
        report["export"]["tensorrt"] = {"dense": sizes, "pruned": sizes}
        del report["bench"]


def on_several_targets(report: Report) -> None:
    board = copy.deepcopy(report["bench"])
    board["spec"]["runtime"] = "onnxruntime 1.32.0 on arm64"
    report["targets"] = {"board": board, "slow": {**board, "emulated": True}, "phone": {"reason": "no answer"}}


def measured_on_targets_alone(report: Report) -> None:
    on_several_targets(report)
    del report["bench"]


def in_mnn_too(report: Report) -> None:
    if "data" in report:
        report["export"]["mnn"] = copy.deepcopy(report["export"]["onnx"])
        report["bench"]["mnn"] = copy.deepcopy(report["bench"])


def of_several_tasks(report: Report) -> None:
    quality = report["quality"]
    if "data" not in report:
        quality["tasks"] = [
            {"task": task, "metric": metric, "dense": 0.5, "pruned": 0.4}
            for task, metric in (("arc_easy", "acc"), ("wikitext", "word_perplexity"))
        ]
        return
    report["data"]["tasks"] += [
        {"name": "depth", "kind": "depth", "outputs": 1, "metric": "rmse", "higher_is_better": False},
        {"name": "things", "kind": "boxes", "outputs": 7, "metric": "map50", "higher_is_better": True},
    ]
    figures = {"depth": {"loss": 0.4, "rmse": 0.3}, "things": {"map50": 0.7, "box_loss": 0.2, "loss": 0.9}}
    for task, values in figures.items():
        kind = next(t for t in report["data"]["tasks"] if t["name"] == task)
        quality["tasks"] += [
            {
                "task": task, "metric": metric, "main": metric == kind["metric"], "samples": 9, "dense": value,
                "pruned": value, "before_training": None, "higher_is_better": kind["higher_is_better"],
            }
            for metric, value in values.items()
        ]  # fmt: skip
        for point in quality["curve"]:
            for part in ("cut", "trained", "tasks"):
                if part in point:
                    point[part][task] = values
    for one in report.get("rounds", ()):
        for task in figures:
            one["readings"][task] = 0.1
            one["tolerances"][task] = {"measure": "loss", "relative": 0.05}
            for probe in one["probes"]:
                probe["loss"][task] = 0.01


def not_recovered(report: Report) -> None:
    report.pop("recover", None)


def trained_no_more(report: Report) -> None:
    report["recipe"]["finetune"] = None
    for row in report["quality"]["tasks"]:
        row["before_training"] = None


def with_no_curve(report: Report) -> None:
    if "rounds" not in report:
        report["quality"]["curve"] = []


SHAPES: tuple[Callable[[Report], None], ...] = (
    whole, without_export, without_bench, built_but_not_run, on_several_targets, measured_on_targets_alone, in_mnn_too,
    of_several_tasks, not_recovered, trained_no_more, with_no_curve,
)  # fmt: skip


def lines_of(report: Report) -> list[str]:
    return method_of(report["recipe"]).lines(report | {"run": "run"})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_renderer_takes_every_shape_of_every_methods_report(name: str, shape: Callable[[Report], None]) -> None:
    report = sample(name)
    shape(report)
    finish(report)
    assert report["schema_version"] == VERSION and rows(report) == made(report)
    text = BODIES[name](report, {"latency": "plots/latency.png"})
    assert assemble(HEADS[name](report), text)
    html = MarkdownIt("commonmark").enable("table").render(text)
    # Every figure stands in a table, with its unit and no more than its spread supports.
    for row in rows(report):
        if not row.where:
            assert f"<td>{row.value('dense')}</td>\n<td>{row.value('pruned')}</td>\n<td>{row.change()}</td>" in html
    prose = re.sub(r"<(pre|code)>.*?</\1>", "", html, flags=re.DOTALL)
    assert html.count("<h1>") == 1 and not re.search(r"\b(nan|inf|None|True|False)\b", prose)
    said = page(report, text, Path("nowhere"))
    assert all(f'id="chart-{c["id"]}"' in said for c in charts(report))
    lines = lines_of(report)
    assert all(terminal(line) == line for line in lines) and lines[-1].startswith("run ")
    for row in qualities(rows(report)):
        if row.main and row.task:
            assert any(row.task in line and row.value("pruned") in line for line in lines)


@pytest.mark.parametrize("shape", [without_export, on_several_targets, of_several_tasks, with_no_curve])
@pytest.mark.parametrize("name", NAMES)
def test_every_shape_can_be_drawn(name: str, shape: Callable[[Report], None]) -> None:
    report = sample(name)
    shape(report)
    if "bench" not in report:
        report["bench"] = sample(name)["bench"]  # the record's own plots are drawn of it
    assert len([figure for _, figure in drawn(name, report)]) >= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("last", ["plan", "model", "evaluation"])
def test_a_run_that_was_stopped_early_has_its_lines(name: str, last: str) -> None:
    report = sample(name)
    for key in {"plan": ("verify", "quality", "export", "bench", "commands", "recover"), "model": ("quality", "export",
                "bench", "commands"), "evaluation": ("export", "bench", "commands")}[last]:  # fmt: skip
        report.pop(key, None)
    if last == "plan" and "data" in report:
        report["size"].pop("bytes")
    assert lines_of(report)


def test_a_format_that_was_built_and_not_run_is_said_and_ends_no_run() -> None:
    """The lines of a PAGCP run ended in a KeyError here; those of its twin did not."""
    report = sample("pagcp")
    built_but_not_run(report)
    assert "tensorrt 1,000 -> 1,000 bytes; not run: no GPU" in lines_of(report)


def test_a_part_of_a_detectors_loss_is_better_when_it_is_lower_whatever_an_old_report_says() -> None:
    report = sample("pagcp")
    of_several_tasks(report)
    found = {row.name: row.better for row in qualities(made(report))}
    assert found["box_loss, things"] == found["loss, things"] == found["rmse, depth"] == "lower"
    assert found["map50, things"] == found["accuracy, class"] == "higher"
    text = BODIES["pagcp"](report, {})
    assert "| box\\_loss, things (lower is better) |" in text and "| map50, things (higher is better) |" in text


def test_one_place_knows_every_measure_of_every_task() -> None:
    for kind in KINDS.values():
        assert better(kind.metric, kind.higher_is_better) == ("higher" if kind.higher_is_better else "lower")
        assert better(kind.metric) == better(kind.metric, kind.higher_is_better), "told by its name alone"
    for metric in ("loss", "box_loss", "objectness_loss", "class_loss", "cross-entropy loss"):
        assert better(metric) == better(metric, True) == "lower"
    for metric, way in (("acc", "higher"), ("word_perplexity", "lower"), ("bits_per_byte", "lower"), ("f1", "higher")):
        assert better(metric) == way


@pytest.mark.parametrize("name", NAMES)
def test_a_release_of_schema_version_1_is_read_and_shown(name: str, tmp_path: Path) -> None:
    import json

    from compress.run.folder import fingerprint

    report = sample(name)
    report.pop("rows", None)
    report.pop("sha256")
    report["schema_version"] = 1
    (tmp_path / "report.json").write_text(json.dumps({**report, "sha256": fingerprint(report)}))
    old = read_report(tmp_path)
    assert old["schema_version"] == 1
    new = sample(name)
    finish(new)
    assert rows(old) == rows(new)
    assert BODIES[name](old, {}).splitlines()[:20] == BODIES[name](new, {}).splitlines()[:20]


def test_rows_are_read_back_as_they_were_written_and_nonsense_in_them_is_one_error() -> None:
    report = sample("pagcp")
    finish(report)
    assert rows(report) == made(report) and all(isinstance(row, Row) for row in rows(report))
    for change in ({"unit": "apples"}, {"dense": "many"}, {"better": "sideways"}, {"surprise": 1}):
        bad = copy.deepcopy(report)
        bad["rows"][0] |= change
        with pytest.raises(CompressError, match="cannot be read"):
            rows(bad)
    for section in ({"tasks": [{"task": "x"}]}, {"texts": "none"}, []):
        with pytest.raises(CompressError, match="cannot be read"):
            rows({**sample("tyr"), "quality": section or {"texts": 1}})
    lying = copy.deepcopy(report)
    next(row for row in lying["rows"] if row.get("main"))["pruned"] = 0.99
    with pytest.raises(CompressError, match="not those of its measurements: accuracy, class"):
        check(lying)
    with pytest.raises(CompressError, match="schema version 3"):
        rows({**report, "schema_version": VERSION + 1})


@pytest.mark.parametrize("version", [0, -5, True, "2", 1.5, None, [2]])
def test_a_version_that_is_none_is_refused(version: Any) -> None:
    report = {k: v for k, v in sample("tyr").items() if k != "rows"}
    with pytest.raises(CompressError, match="schema_version is"):
        rows({**report, "schema_version": version})
