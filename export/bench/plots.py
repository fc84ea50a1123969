"""What a person looks at after a measurement: distributions, speed-up against work, time per layer, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.report.explained import lines, said_of
from compress.report.plots import DENSE, PRUNED, QUIET, Plot, wrapped
from compress.report.plots import draw as draw_all
from compress.report.stats import found_in
from compress.words.escape import caption
from compress.words.wording import number

NAMES = {"latency": "latency of one call", "ttft": "time to first token", "tpot": "time per output token"}


def draw(bench: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """The plots of one comparison (`local.compare`); returns name -> PNG."""
    return draw_all(dict(bench), folder, jobs(bench))


def jobs(bench: Mapping[str, Any]) -> dict[str, Plot]:
    """What of a bench record can be drawn."""
    found: dict[str, Plot] = {"distribution": distribution, "memory": memory}
    for part in bench.get("why", {}):
        found[f"layers-{part}"] = lambda record, plt, part=part: layers(record["why"][part], plt)  # type: ignore[misc]
    return found


def figures_of(bench: Mapping[str, Any]) -> list[str]:
    return [name for name in NAMES if name in bench["dense"]]


def distribution(bench: Mapping[str, Any], plt: Any) -> Any:
    """Every sample as a step of its cumulative curve, dense against pruned: medians, spread and tails at one look."""
    names = figures_of(bench)
    figure, axes = plt.subplots(1, len(names), figsize=(3.7 * len(names) + 0.6, 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for label, colour in (("dense", DENSE), ("pruned", PRUNED)):
            runs = [1000 * np.sort(np.asarray(samples)) for samples in bench[label][name]["raw"]]
            for one in runs:  # a thin line a process: the spread between them
                axis.step(one, np.arange(1, len(one) + 1) / len(one), where="post", color=colour, lw=0.6, alpha=0.5)
            every = np.sort(np.concatenate(runs))
            axis.step(every, np.arange(1, len(every) + 1) / len(every), where="post", color=colour, lw=1.8, label=label)
            axis.axvline(1000 * bench[label][name]["median"], color=colour, lw=0.8, ls="--")
        axis.set_title(f"{NAMES[name]}\n{wrapped(found_in(bench, name).words)}", loc="left", fontsize=9)
        axis.set_xlabel("ms" + (", emulated" if bench.get("emulated") else ""))
        axis.set_ylim(0, 1.02)
        axis.set_xlim(left=0)
    axes[0][0].set_ylabel("share of samples at most this")
    axes[0][0].legend(frameon=False)
    return figure


def speed_up(panels: Sequence[Mapping[str, Any]], plt: Any) -> Any:
    """Measured speed-up over the work removed, and what the work promises.

    Args:
        panels: ``title``, ``work`` (what is counted, such as FLOPs) and ``points`` each: ``removed`` (share of the
            work), ``ratio`` (``median``, ``low``, ``high``), ``runtime``.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels) + 0.6, 3.9), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        points = panel["points"]
        x = np.linspace(0, min(1.1 * max(p["removed"] for p in points), 0.98), 200)
        ideal = f"ideal: 1 / {panel['work']} left"
        axis.plot(100 * x, 1 / (1 - x), color="black", lw=1, ls="--", label=ideal)
        axis.fill_between(100 * x, 0.8 / (1 - x), 1 / (1 - x), color=QUIET, alpha=0.5, lw=0, label="80 % of it or more")
        runtimes = list(dict.fromkeys(p["runtime"] for p in points))
        for i, runtime in enumerate(runtimes):
            rows = sorted((p for p in points if p["runtime"] == runtime), key=lambda p: float(p["removed"]))
            middle = [p["ratio"]["median"] for p in rows]
            below = [p["ratio"]["median"] - p["ratio"]["low"] for p in rows]
            above = [p["ratio"]["high"] - p["ratio"]["median"] for p in rows]
            # All runtimes have the same abscissas: side by side, so that none hides another.
            aside = (i - (len(runtimes) - 1) / 2) * 1.2 * x[-1]
            at = [100 * p["removed"] + aside for p in rows]
            axis.errorbar(at, middle, [below, above], fmt="o", ms=4, lw=1.2, capsize=2, label=caption(runtime))
        axis.axhline(1, color=DENSE, lw=0.8)
        axis.set_xlabel(f"{panel['work']} removed, %")
        axis.set_title(caption(panel["title"]), loc="left")
        axis.legend(frameon=False, loc="upper left", fontsize=7.5)
    axes[0][0].set_ylabel("times as fast as dense")
    return figure


def layers(explained: Mapping[str, Any], plt: Any, most: int = 18) -> Any:
    """Time of the costliest layers before and after, and what each would take if it had fallen with its work."""
    rows = sorted(explained["layers"], key=lambda r: -max(r["dense_seconds"], r["pruned_seconds"]))[:most]
    order = {row["name"]: i for i, row in enumerate(explained["layers"])}
    rows.sort(key=lambda r: -order[r["name"]])
    figure, axis = plt.subplots(figsize=(8.6, 0.28 * len(rows) + 1.6))
    at = np.arange(len(rows))
    axis.barh(at + 0.2, [1e3 * r["dense_seconds"] for r in rows], 0.4, color=DENSE, label="dense")
    axis.barh(at - 0.2, [1e3 * r["pruned_seconds"] for r in rows], 0.4, color=PRUNED, label="pruned")
    shares = [r["pruned_flops"] / r["dense_flops"] if r["dense_flops"] else np.nan for r in rows]
    ideal = [1e3 * r["dense_seconds"] * share for r, share in zip(rows, shares, strict=True)]
    axis.plot(ideal, at - 0.2, "|", color="black", ms=9, mew=1.5, label="had it fallen with its FLOPs")
    causes = {f["name"]: f["cause"] for f in explained["findings"] if len(lines(explained)) > 1}
    for y, row in zip(at, rows, strict=True):
        if row["name"] in causes:
            axis.annotate(
                causes[row["name"]], (1e3 * max(row["dense_seconds"], row["pruned_seconds"]), y), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
    axis.set_yticks(at, [caption(r["name"], 40) for r in rows])
    axis.grid(axis="x", color="#e6e8ec")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.14)
    axis.set_xlabel("ms a call, under ONNX Runtime's profiler")
    axis.set_title(wrapped(said_of(explained).words, 90), loc="left", fontsize=9)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # no bar is free of it inside
    return figure


def memory(bench: Mapping[str, Any], plt: Any) -> Any:
    """Peak memory of the measuring process, and the artefact's size."""
    figure, axes = plt.subplots(1, 2, figsize=(5.6, 2.9))
    for axis, key, title in ((axes[0], "peak_rss", "peak memory of the process\nMB"), (axes[1], "bytes", "files\nMB")):
        for x, (label, colour) in enumerate((("dense", DENSE), ("pruned", PRUNED))):
            value = bench[label][key]
            if value is None:
                axis.annotate("not told", (x, 0), ha="center")
                continue
            axis.bar(x, value / 1e6, color=colour, width=0.65)
            axis.annotate(number(value / 1e6), (x, value / 1e6), xytext=(0, 4), textcoords="offset points", ha="center")
        axis.set_title(title, loc="left")
        axis.set_xticks([0, 1], ["dense", "pruned"])
        axis.margins(y=0.15)
    return figure
