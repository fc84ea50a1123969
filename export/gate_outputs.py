"""What a gate leaves behind: JUnit XML, GitHub annotations, a Markdown summary, the record as JSON, and a plot.

Names come from outside (files, tasks, revisions): each form escapes what it quotes.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.exporters.inputs import words
from compress.report.rows import FIGURES
from compress.words.escape import annotation, caption, cell, code, json_text, markdown, terminal, xml

# Of a row's unit: how many of what is written make one of it, its name, and the digits that are told.
UNITS: dict[str, tuple[float, str, int]] = {
    "seconds": (1000.0, "ms", 3), "bytes": (1e-6, "MB", 2), "score": (1.0, "", 4), "perplexity": (1.0, "", 3)
}  # fmt: skip
LEVELS = {"pass": "notice", "inconclusive": "warning", "fail": "error"}
MARKS = {"pass": "✅ pass", "inconclusive": "⚠️ inconclusive", "fail": "❌ fail"}


def quantity(row: Mapping[str, Any], value: float) -> str:
    """A value in its budget's unit."""
    if row["kind"] == "points":
        return f"{100 * value:+.2f} %"
    return f"{value:.3f}x" if row["kind"] == "relative" else plain(row["figure"], value)


def plain(figure: str, value: float) -> str:
    """A figure of one model, with its unit."""
    scale, unit, digits = UNITS[FIGURES[figure]]
    return f"{scale * value:.{digits}f}{unit and ' ' + unit}"


def title(row: Mapping[str, Any]) -> str:
    return terminal(row["budget"] + (f" ({row['part']})" if "part" in row else ""))


def line(row: Mapping[str, Any]) -> str:
    """One budget's outcome on one line, without its name and verdict."""
    said = quantity(row, row["value"])
    if "low" in row:
        said += f", 95 %: {quantity(row, row['low'])} to {quantity(row, row['high'])}, {row['rounds']} rounds"
    said += f" ({plain(row['figure'], row['baseline'])} -> {plain(row['figure'], row['candidate'])})"
    return said + (f"; {terminal(row['reason'])}" if row["reason"] else "")


def workflow_commands(record: Mapping[str, Any]) -> list[str]:
    """GitHub workflow commands, one a budget."""
    found = []
    for row in record["budgets"]:
        level = "error" if row["verdict"] == "inconclusive" and record["strict"] else LEVELS[row["verdict"]]
        names = f"{record['baseline']['name']} -> {record['candidate']['name']}"
        found.append(annotation(level, f"gate: {row['verdict']}: {title(row)}", f"{line(row)} [{names}]"))
    return found


def error_command(error: CompressError) -> str:
    """GitHub's workflow command for an error that left no verdict."""
    return annotation("error", "gate: error", "; ".join(p for p in (error.what, error.where, error.fix) if p))


def junit(record: Mapping[str, Any]) -> bytes:
    """One test case a budget: a fail is a failure, an inconclusive one is skipped, or a failure where it is strict."""
    rows = record["budgets"]
    failed = [r["verdict"] == "fail" or (record["strict"] and r["verdict"] == "inconclusive") for r in rows]
    skipped = [r["verdict"] == "inconclusive" and not record["strict"] for r in rows]
    counts = {"tests": len(rows), "failures": sum(failed), "errors": 0}
    total = {k: str(v) for k, v in counts.items()}
    root = ET.Element("testsuites", {"name": "compress gate", **total})
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": "compress gate",
            **total,
            "skipped": str(sum(skipped)),
            "time": f"{record['seconds']:.3f}",
            "timestamp": record["time"],
        },
    )
    properties = ET.SubElement(suite, "properties")
    for side in ("baseline", "candidate"):
        ET.SubElement(properties, "property", {"name": side, "value": xml(record[side]["name"])})
    if "inputs" in record["spec"]:
        ET.SubElement(properties, "property", {"name": "inputs", "value": xml(words(record["spec"]["inputs"]))})
    for row, fails, skips in zip(rows, failed, skipped, strict=True):
        case = ET.SubElement(
            suite,
            "testcase",
            {"classname": f"gate.{row['figure']}", "name": xml(title(row)), "time": "0"},
        )
        said = xml(line(row))
        if fails:
            element = ET.SubElement(case, "failure", {"message": said, "type": row["verdict"]})
            element.text = said
        elif skips:
            ET.SubElement(case, "skipped", {"message": said})
        ET.SubElement(case, "system-out").text = said
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def summary(record: Mapping[str, Any]) -> str:
    """The summary: what was asked, what came out, and under which conditions."""
    said = MARKS[record["verdict"]] + (" (strict: fails)" if record["strict"] and record["exit_code"] == 1 else "")
    lines = [
        f"## compress gate: {said}",
        "",
        f"Baseline {code(record['baseline']['name'])}, candidate {code(record['candidate']['name'])}.",
        "",
        "| budget | verdict | measured | 95 % interval | baseline | candidate | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["budgets"]:
        interval = f"{quantity(row, row['low'])} to {quantity(row, row['high'])}" if "low" in row else "exact"
        cells = (
            cell(title(row)),
            MARKS[row["verdict"]],
            quantity(row, row["value"]),
            interval,
            plain(row["figure"], row["baseline"]),
            plain(row["figure"], row["candidate"]),
            str(row.get("rounds", "")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- {code(title(row))}: {markdown(row['reason'])}." for row in record["budgets"] if row["reason"]]
    spec, machine = record["spec"], record["machine"]
    if spec["runtime"]:
        where = f"pinned device {code(machine['pinned'])}" if machine["pinned"] else "this machine"
        runtime = markdown(spec["runtime"])
        threads = f"{spec['threads']} thread{'s' if spec['threads'] != 1 else ''}"
        loads = [machine[when].get("load_average") for when in ("before", "after")]
        load = "" if None in loads else f", load {loads[0]:.1f} to {loads[1]:.1f}"
        lines += [
            "",
            f"Measured on {where}: baseline and candidate in turn (ABBA), fresh processes, {runtime},"
            f" {threads}, {spec['samples']} or more samples of 0.1 s a process; {machine['cores']} cores{load}. A time"
            " is that of a process's fastest call unless the budget says otherwise; ratios are candidate / baseline.",
        ]
    if "inputs" in spec:
        lines += ["", f"Both were given the arrays of {code(words(spec['inputs']))}."]
    lines += ["", f"Again: {code(record['command'])}", ""]
    return "\n".join(lines)


def plot(record: Mapping[str, Any], plt: Any) -> Any:
    """The pairs of every measured budget, with interval and limit."""
    from compress.report.plots import DENSE, PRUNED, QUIET

    rows = [r for r in record["budgets"] if "values" in r]
    figure, axes = plt.subplots(1, len(rows), figsize=(1.2 + 3.2 * len(rows), 3.2), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        scale, unit, _ = UNITS[FIGURES[row["figure"]]]
        scale = 1.0 if row["kind"] == "relative" else scale
        values = [scale * v for v in row["values"]]
        axis.axhspan(scale * row["low"], scale * row["high"], color=QUIET, alpha=0.6, lw=0, label="95 % interval")
        axis.axhline(scale * row["value"], color=PRUNED, lw=1, label="median")
        axis.plot(range(1, len(values) + 1), values, "o", ms=4, color=PRUNED, label="rounds")
        axis.axhline(scale * row["limit"], color="#b3261e", lw=1.2, ls="--", label="budget")
        if row["kind"] == "relative":
            axis.axhline(1.0, color=DENSE, lw=0.8, ls=":")
        axis.set_title(f"{caption(row['budget'])}: {row['verdict']}", fontsize=9)
        axis.set_xlabel("round")
        axis.set_ylabel("candidate / baseline" if row["kind"] == "relative" else unit)
        axis.margins(y=0.15)
    axes[0][-1].legend(frameon=False, fontsize=7)
    return figure


FILES = ("gate.json", "junit.xml", "summary.md")


def write(record: Mapping[str, Any], folder: Path) -> list[str]:
    """gate.json (with the raw samples), junit.xml, summary.md and gate.png where anything was measured; their names."""
    from compress.report.plots import draw

    texts = ((json_text(record, nan=False) + "\n").encode(), junit(record), summary(record).encode())
    for name, text in zip(FILES, texts, strict=True):
        (folder / name).write_bytes(text)
    if not any("values" in row for row in record["budgets"]):
        return list(FILES)
    return [*FILES, *(path.name for path in draw(dict(record), folder, {"gate": plot}).values())]


def now() -> str:
    """UTC, to the second, as JUnit wants it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
