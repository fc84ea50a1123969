"""The data of all plots, from report.json alone: `report.js` draws it on the HTML page, `plots` as the card's pictures.

A chart is ``{"id", "title", "kind", "x", "y", "series", "rules"}``. ``kind`` is ``bars`` (x is a category), ``lines``
(x is a number), ``dots`` (one row a category, x is the value) or ``intervals`` (likewise, from ``low`` to ``high``).
Values are the report's own: what is shown is rounded by the browser, what is carried is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compress.report.rows import Row, emulated, figure_name, figures, judges, rows
from compress.report.stats import found_in
from compress.words.escape import shown

Chart = dict[str, Any]
Series = dict[str, Any]
THIS = "this model"  # the label of a point that is the report's own model


def charts(report: Mapping[str, Any]) -> list[Chart]:
    """Every chart that the report has figures for, in the order of the card's plots; what it quotes can be seen."""
    found: list[Chart] = shown(data(report))
    return found


def chart_of(report: Mapping[str, Any], name: str) -> Chart | None:
    """One chart, its texts as the report has them; None where there are no figures for it."""
    return next((chart for chart in data(report) if chart["id"] == name), None)


def latencies(report: Mapping[str, Any]) -> list[Chart]:
    """Those of this machine's own bench record, a figure each."""
    return [chart for chart in _latency(report) if chart["of"] == ""]


def data(report: Mapping[str, Any]) -> list[Chart]:
    """The charts, their texts as the report has them."""
    makers: tuple[Callable[[Mapping[str, Any]], list[Chart]], ...] = (
        _layers, _channels, _perplexity, _metrics, _rounds, _latency, _ratios, _search
    )  # fmt: skip
    return [chart for make in makers for chart in make(report)]


def _chart(name: str, title: str, kind: str, x: str, y: str, series: list[Series], **more: Any) -> Chart:
    axis = more.pop("axis", {})
    return {
        "id": name, "title": title, "kind": kind, "x": {"label": x}, "y": {"label": y, **axis}, "series": series, **more
    }  # fmt: skip


def _layers(report: Mapping[str, Any]) -> list[Chart]:
    rows = report.get("layers") or []
    if not rows:
        return []
    if "attention_sparsity" in rows[0]:
        series: list[Series] = [
            {"name": title, "points": [{"x": str(r["layer"]), "y": 100 * r[key]} for r in rows]}
            for title, key in (("attention", "attention_sparsity"), ("FFN", "ffn_sparsity"))
        ]
        rule = {"value": 100 * report["size"]["backbone_removed"], "name": "whole backbone"}
    elif "pruned" in rows[0] and "weights" in rows[0]:
        names = [r["name"].removesuffix(".weight") for r in rows]
        series = [
            {
                "name": "pruned",
                "points": [{"x": n, "y": 100 * r["pruned"] / r["weights"]} for n, r in zip(names, rows, strict=True)],
            }
        ]
        if any(r.get("floor") for r in rows):
            limits = [100 * (1 - r["floor"] / r["weights"]) for r in rows]
            series.append(
                {
                    "name": "the most its floor allows",
                    "marks": True,
                    "points": [{"x": n, "y": v} for n, v in zip(names, limits, strict=True)],
                }
            )
        rule = {"value": 100 * report["size"]["pruned_share"], "name": "all layers"}
    else:
        return []
    axis = {"min": 0, "max": 100}
    return [
        _chart(
            "sparsity-per-layer", "What each layer gave up", "bars", "layer", "removed, %", series, rules=[rule],
            axis=axis,
        )
    ]  # fmt: skip


def _channels(report: Mapping[str, Any]) -> list[Chart]:
    rows = report.get("layers") or []
    if not rows or not {"channels", "kept"} <= rows[0].keys():
        return []
    series: list[Series] = [
        {"name": name, "colour": colour, "points": [{"x": r["name"], "y": r[key]} for r in rows]}
        for name, key, colour in (("dense", "channels", "quiet"), ("kept", "kept", "pruned"))
    ]
    title = "Channels that every layer keeps"
    return [_chart("channels", title, "bars", "layer", "output channels", series, axis={"min": 0})]


def _rounds(report: Mapping[str, Any]) -> list[Chart]:
    """Every task after each round of a network whose channels are cut: just cut, and trained."""
    quality = report.get("quality") or {}
    curve = quality.get("curve") or ()
    if not curve or not {"removed", "trained", "cut"} <= curve[0].keys():
        return []
    series: list[Series] = []
    for row in _judges(report):
        name = row.name
        points: list[dict[str, Any]] = [{"x": 0.0, "y": row.dense, "label": "dense"}]
        for part in ("trained", "cut"):
            found = [
                {"x": 100 * p["removed"], "y": p[part][row.task][row.metric], "label": f"round {i}, {part}"}
                for i, p in enumerate(curve, 1)
            ]
            if part == "trained":
                series.append({"name": name, "points": [*points, *found]})
            else:
                series.append({"name": f"{name}, just cut", "marks": True, "points": found})
    title = "Every task against FLOPs, round by round"
    return [_chart("quality", title, "lines", "FLOPs removed, %", "quality", series)] if series else []


def _judges(report: Mapping[str, Any]) -> list[Row]:
    """The rows that a network's tasks are judged by."""
    return [row for row in judges(report) if row.unit == "score"]


def _perplexity(report: Mapping[str, Any]) -> list[Chart]:
    quality = report.get("quality") or {}
    if not quality.get("texts"):
        return []
    size = report["size"]
    share = next((k for k in ("backbone_removed", "pruned_share") if k in size), None)
    if share is None:
        return []
    series: list[Series] = []
    for text in quality["texts"]:
        points: list[dict[str, Any]] = [{"x": 0.0, "y": text["dense_ppl"], "label": "dense"}]
        points += [
            {"x": 100 * p[share], "y": p["texts"][text["name"]], "label": "another sparsity"}
            for p in quality.get("curve", ())
        ]
        points.append({"x": 100 * size[share], "y": text["pruned_ppl"], "label": THIS})
        series.append({"name": text["name"], "points": sorted(points, key=lambda p: p["x"])})
    title, axis = "Perplexity against sparsity, held-out text", {"log": True}
    return [_chart("perplexity", title, "lines", "removed, %", "perplexity", series, axis=axis)]


def _metrics(report: Mapping[str, Any]) -> list[Chart]:
    quality, size = report.get("quality") or {}, report["size"]
    judges = _judges(report)
    if "data" not in report or not judges or "pruned_share" not in size or not quality.get("curve"):
        return []
    series: list[Series] = []
    for row in judges:
        points = [{"x": 0.0, "y": row.dense, "label": "dense"}]
        for point in quality.get("curve") or ():
            if point["sparsity"] != size["pruned_share"]:
                value = point["tasks"][row.task][row.metric]
                points.append({"x": 100 * point["sparsity"], "y": value, "label": "another sparsity"})
        points.append({"x": 100 * size["pruned_share"], "y": row.pruned, "label": THIS})
        series.append({"name": row.name, "task": row.task, "points": sorted(points, key=lambda p: p["x"])})
    return [_chart("accuracy", "Quality against sparsity", "lines", "weights pruned, %", "quality", series)]


def _records(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """(where, bench record) of everything that was timed."""
    found = []
    bench = report.get("bench") or {}
    if bench:
        found.append(("this machine", bench))
        # A record of another runtime may stand in this machine's.
        found += [(k, v) for k, v in bench.items() if isinstance(v, Mapping) and "ratios" in v and "spec" in v]
    found += [(k, v) for k, v in (report.get("targets") or {}).items() if isinstance(v, Mapping) and figures(v)]
    return [(f"{k} (emulated)" if emulated(v) else k, v) for k, v in found]


def _latency(report: Mapping[str, Any]) -> list[Chart]:
    found: list[Chart] = []
    for number, (where, record) in enumerate(_records(report)):
        for key in figures(record):
            series = []
            for label in ("dense", "pruned"):
                medians = record[label][key].get("process_medians") or [record[label][key]["median"]]
                points = [{"x": label, "y": 1000 * v, "label": f"process {i + 1}"} for i, v in enumerate(medians)]
                series.append({"name": label, "colour": label, "points": points,
                               "median": 1000 * record[label][key]["median"]})  # fmt: skip
            name = "latency" if not found else f"latency-{number}-{key}"
            own = "" if record is report.get("bench") else where
            name_ = figure_name(key, record["spec"])
            title = f"{name_[:1].upper()}{name_[1:]}: {where}"
            x, said = "ms; a dot is a process, the bar their median", found_in(record, key)
            found.append(
                _chart(name, title, "dots", x, "", series, of=own, figure=name_, said=said.words, short=said.short)
            )
    return found


def _ratios(report: Mapping[str, Any]) -> list[Chart]:
    points = []
    for row in rows(report):
        found = row.found()
        if found is None or row.ratio is None or row.unit != "seconds":
            continue
        where = f"{row.where or 'this machine'}{' (emulated)' if row.emulated else ''}"
        points.append(
            {"x": f"{where}: {row.name}", "y": row.ratio.median, "low": row.ratio.low, "high": row.ratio.high,
             "label": found.words, "quiet": found.kind in ("unresolved", "beyond")}
        )  # fmt: skip
    if not points:
        return []
    series = [{"name": "dense / pruned, 95 % interval", "colour": "pruned", "points": points}]
    rule = {"value": 1.0, "name": "as fast as the dense model"}
    return [_chart("ratios", "How many times as fast", "intervals", "times as fast", "", series, rules=[rule])]


def _search(report: Mapping[str, Any]) -> list[Chart]:
    log = [r for r in (report.get("search") or {}).get("log") or () if r.get("phase") != "single"]
    if not log:
        return []
    offset = 0.0
    best_ever: list[dict[str, Any]] = []
    starts: list[dict[str, Any]] = []
    candidates: list[dict[str, Any]] = []
    for iteration in sorted({r["iteration"] for r in log}):
        rows, best = [r for r in log if r["iteration"] == iteration], float("inf")
        for row in rows:
            at = (offset + row["work"]) / 1e6
            (starts if row["phase"].startswith("start") else candidates).append(
                {"x": at, "y": row["kl"], "label": f"iteration {iteration}, {row['phase']}"}
            )
            best = min(best, row["kl"])
            best_ever.append({"x": at, "y": best, "label": f"iteration {iteration}"})
        offset += max(r["work"] for r in rows)
    series = [
        {"name": "candidate", "colour": "quiet", "marks": True, "points": candidates},
        {"name": "starting point", "colour": "dense", "marks": True, "points": starts},
        {"name": "best so far", "colour": "pruned", "step": True, "points": best_ever},
    ]
    x, y = "work, million tokens x layers", "KL to the dense model, nats"
    return [_chart("search", "The search: KL over work", "lines", x, y, [s for s in series if s["points"]])]
