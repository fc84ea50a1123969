"""What a gate leaves behind: read by real parsers, and harmless whatever the names are."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from junitparser import Failure, JUnitXml, Skipped
from markdown_it import MarkdownIt
from PIL import Image

from compress.exporters import gate_outputs as outputs

NASTY = 'a|b`c`<script>alert(1)</script> ##[error]x ]]> & "q" %0A::error::y\n::error::z\x00\x1b[31m $\\alpha$ \ud800'


def row(verdict: str, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "budget": "latency<=1.05x",
        "figure": "latency",
        "statistic": "fastest",
        "kind": "relative",
        "limit": 1.05,
        "value": 1.1,
        "verdict": verdict,
        "reason": "",
        "baseline": 0.001,
        "candidate": 0.0011,
        "low": 1.08,
        "high": 1.12,
        "rounds": 3,
        "values": [1.08, 1.1, 1.12],
    }
    return {**made, **more}


def record(*rows: dict[str, Any], strict: bool = False, name: str = "new.onnx") -> dict[str, Any]:
    return {
        "verdict": rows[0]["verdict"],
        "strict": strict,
        "exit_code": 1,
        "budgets": list(rows),
        "baseline": {"name": "old.onnx"},
        "candidate": {"name": name},
        "spec": {"runtime": "onnxruntime", "threads": 1, "samples": 3},
        "machine": {
            "before": {"load_average": 0.5},
            "after": {"load_average": 1.5},
            "cores": 2,
            "pinned": None,
        },
        "time": "2026-01-02T03:04:05",
        "seconds": 12.5,
        "command": "compress gate old.onnx new.onnx",
    }


ROWS = (
    row("fail"),
    row("inconclusive", budget="memory<=1.1x", figure="memory", baseline=5e7, candidate=6e7, reason="too noisy"),
    row("pass", budget="ttft<=2x", figure="ttft"),
)

# The attributes and children that Jenkins' and the Ant schema know, in our use of them.
SCHEMA: dict[str, tuple[set[str], set[str]]] = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors", "skipped", "time", "timestamp", "hostname", "id", "package"},
        {"properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), {"property"}),
    "property": ({"name", "value"}, set()),
    "testcase": ({"name", "classname", "time"}, {"skipped", "error", "failure", "system-out", "system-err"}),
    "failure": ({"message", "type"}, set()),
    "skipped": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


@pytest.mark.parametrize("strict", [False, True])
def test_junit_is_read_by_a_real_parser(strict: bool) -> None:
    xml = JUnitXml.fromstring(outputs.junit(record(*ROWS, strict=strict)))
    (suite,) = xml
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (3, 1 + strict, 0, 1 - strict)
    assert suite.time == 12.5 and suite.timestamp == "2026-01-02T03:04:05"
    results = {case.name: [type(r) for r in case.result] for case in suite}
    assert results == {
        "latency<=1.05x": [Failure],
        "memory<=1.1x": [Failure if strict else Skipped],
        "ttft<=2x": [],
    }
    failure = next(iter(suite)).result[0]
    assert "1.100x, 95 %: 1.080x to 1.120x, 3 rounds (1.000 ms -> 1.100 ms)" in failure.message


def test_junit_keeps_to_the_schema_that_viewers_share() -> None:
    def check(element: ET.Element) -> None:
        attributes, children = SCHEMA[element.tag]
        assert set(element.attrib) <= attributes, element.tag
        for child in element:
            assert child.tag in children, (element.tag, child.tag)
            check(child)

    root = ET.fromstring(outputs.junit(record(*ROWS)))
    check(root)
    for suite in root:
        assert {"name", "tests", "failures", "errors"} <= set(suite.attrib)
        assert re.fullmatch(r"\d*(\.\d*)?", suite.attrib["time"])


def nasty() -> dict[str, Any]:
    return record(row("fail", part=NASTY, reason=NASTY), name=NASTY)


def test_names_cannot_break_the_xml() -> None:
    text = outputs.junit(nasty())
    (suite,) = JUnitXml.fromstring(text)
    (case,) = suite
    assert "<script>" in case.name and b"<script>" not in text
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)


def test_annotations_are_one_command_each_whatever_the_names_are() -> None:
    found = outputs.workflow_commands(nasty())
    (line,) = found
    assert "\n" not in line and "\r" not in line and "##[" not in line and "\x1b" not in line
    # As the runner takes it apart: properties up to the second `::`, then %25, %0A and so on turned back.
    match = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line)
    assert match is not None and match.group(1) == "error"
    message = match.group(3).replace("%0D", "\r").replace("%0A", "\n").replace("%25", "%")
    assert "\n" not in message and "%0A::error::y" in message, "what was a text stays that text"


def test_annotations_have_the_level_of_their_verdict() -> None:
    levels = [line.split(" ")[0] for line in outputs.workflow_commands(record(*ROWS))]
    assert levels == ["::error", "::warning", "::notice"]
    strict = [line.split(" ")[0] for line in outputs.workflow_commands(record(*ROWS, strict=True))]
    assert strict == ["::error", "::error", "::notice"]


def test_lines_on_the_terminal_hold_no_command() -> None:
    from compress.verbs.gate import lines

    for line in lines(nasty()):
        assert "\n" not in line and "##[" not in line and "\x1b" not in line and not line.lstrip().startswith("::")
    assert "##[" not in outputs.json_text(record(row("fail"), name="##[error]x"))
    assert json.loads(outputs.json_text(record(row("fail"), name="##[error]x")))["candidate"]["name"] == "##[error]x"


def test_the_summary_stays_a_table_and_holds_no_markup_of_others() -> None:
    text = outputs.summary(nasty())
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in html and html.count("<table>") == 1
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    assert len(rows) == 2 and all(len(re.findall(r"<t[dh]>", r)) == 7 for r in rows)


def test_the_summary_says_what_came_out() -> None:
    text = outputs.summary(record(*ROWS))
    assert "## compress gate: ❌ fail" in text
    assert "| `latency<=1.05x` | ❌ fail | 1.100x | 1.080x to 1.120x | 1.000 ms | 1.100 ms | 3 |" in text
    assert "- `memory<=1.1x`: too noisy." in text
    assert "load 0.5 to 1.5" in text and "compress gate old.onnx new.onnx" in text


def test_everything_is_written_whole(tmp_path: Path) -> None:
    made = record(*ROWS, name='$x^{2 <b>"')
    files = outputs.write(made, tmp_path)
    assert set(files) == {"gate.json", "junit.xml", "summary.md", "gate.png"}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    assert json.loads((tmp_path / "gate.json").read_text()) == made
    with Image.open(tmp_path / "gate.png") as image:
        assert image.width > 600 and len(set(image.convert("RGB").resize((200, 80)).getdata())) > 20


def test_without_a_measurement_there_is_no_plot(tmp_path: Path) -> None:
    size = {"budget": "size<=1x", "figure": "size", "kind": "relative", "limit": 1.0, "value": 0.5, "verdict": "pass"}
    files = outputs.write(record({**size, "reason": "", "baseline": 2e6, "candidate": 1e6}), tmp_path)
    assert set(files) == {"gate.json", "junit.xml", "summary.md"}
    assert "| `size<=1x` | ✅ pass | 0.500x | exact | 2.00 MB | 1.00 MB |  |" in (tmp_path / "summary.md").read_text()
