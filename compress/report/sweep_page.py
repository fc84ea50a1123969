"""How a sweep is shown: the table on the terminal, the page, and the plot of its fronts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from compress.report.plots import DENSE as GREY
from compress.report.plots import PRUNED, QUIET, draw
from compress.report.sweep import DENSE, NAME, Axis, Entry, Sweep
from compress.system.files import whole_file, write_whole
from compress.words.escape import block, caption, code, markdown
from compress.words.wording import milliseconds, number

PAGE, PLOT = "README.md", "fronts.png"


def write_page(sweep: Sweep, folder: Path) -> None:
    """sweep.json, the plot and the page, each whole or not there; sweep.json comes last, and says that all are."""
    with tempfile.TemporaryDirectory() as place:
        made = draw({"sweep": sweep}, Path(place), {"fronts": _plot})["fronts"]
        with whole_file(folder / PLOT) as partial:
            partial.write_bytes(made.read_bytes())
    write_whole(folder / PAGE, "\n".join(page(sweep)) + "\n")
    write_whole(folder / NAME, sweep.text())


def cost(axis: Axis, entry: Entry, sweep: Sweep, beside: bool = True) -> str:
    """What an entry takes on an axis, with how many times the dense model's it is."""
    value = entry.costs.get(axis.key)
    if value is None:
        return ""
    dense = next((e.costs.get(axis.key) for e in sweep.entries if e.point == DENSE and not e.precision), None)
    if axis.unit == "seconds":
        said = milliseconds(value)
    elif axis.unit == "bytes":
        said = f"{number(value / 1e6)} MB" if value >= 1e5 else f"{value:,} bytes"
    else:
        said = f"{value:,}" if value < 1e6 else f"{number(value / 1e6)} M"
    return f"{said} ({value / dense:.3f}x)" if beside and dense else said


def marks(sweep: Sweep, index: int) -> str:
    """The axes on whose front an entry lies, and those whose knee it is."""
    on = [axis.title for axis in sweep.axes if index in axis.front]
    knees = [axis.title for axis in sweep.axes if axis.knee == index]
    return ", ".join([*on, *([f"knee of {' and '.join(knees)}"] if knees else [])])


def lines(sweep: Sweep, folder: Path) -> list[str]:
    """The table as the command line shows it, and how to get a point's finished release."""
    head = ("", sweep.quality.name, *(axis.title for axis in sweep.axes), "best for its")
    table = [head]
    for i, entry in enumerate(sweep.entries):
        costs = (cost(axis, entry, sweep) for axis in sweep.axes)
        table.append((entry.name, sweep.quality.shown(entry.quality), *costs, marks(sweep, i)))
    wide = [max(len(row[k]) for row in table) for k in range(len(head))]
    said = [
        "  ".join(
            f"{v:{'<' if k in (0, len(head) - 1) else '>'}{w}}" for k, (v, w) in enumerate(zip(row, wide, strict=True))
        )
        for row in table
    ]
    return [
        *(line.rstrip() for line in said),
        *_unheld(sweep),
        f"pick     {sweep.points[0].pick.rsplit(' ', 1)[0]} POINT  (or knee) finishes a point where it lies",
        f"sweep    {folder}  ({PAGE}, {PLOT}, {NAME})",
    ]


def _unheld(sweep: Sweep) -> list[str]:
    """Budgets that a point did not keep, or that its interval leaves open."""
    return [
        f"budget   {point.name}: {row['budget']} " + ("is not held" if row["held"] is False else "is not resolved")
        for point in sweep.points
        for row in point.budgets
        if "held" in row and row["held"] is not True
    ]


def page(sweep: Sweep) -> list[str]:
    """README.md."""
    q = sweep.quality
    titles = [markdown(axis.title) for axis in sweep.axes]
    text = [
        f"# {markdown(sweep.model)} at {len(sweep.points)} budgets",
        "",
        f"Recipe {code(sweep.recipe_name)}; quality is {markdown(q.name)}, {q.better} is better, of the pruned"
        f" models as they are saved{f' ({markdown(q.conditions)})' if q.conditions else ''}.",
        "",
        f"![Pareto fronts]({PLOT})",
        "",
        f"| model | {markdown(q.name)} | {' | '.join(titles)} | best for its |",
        "|---" * (len(titles) + 3) + "|",
    ]
    for i, entry in enumerate(sweep.entries):
        cells = [cost(axis, entry, sweep) for axis in sweep.axes]
        mark = marks(sweep, i)
        row = [markdown(entry.name), q.shown(entry.quality), *cells, f"**{markdown(mark)}**" if mark else ""]
        text.append(f"| {' | '.join(row)} |")
    text += ["", *(f"- {markdown(one)}." for one in _notes(sweep)), "", "## Make a point", ""]
    for point in sweep.points:
        text += [f"{markdown(point.name)}: finished where it lies, or made alone:", ""]
        text += [*block([point.pick, point.make], "sh"), ""]
    return text


def _notes(sweep: Sweep) -> list[str]:
    said = [
        "Best for its: no other model here has as good a quality for as little of it; parameters and FLOPs are compared"
        " among models as they are saved, bytes and times among all files",
        "The knee lies farthest below the line between the ends of a front, each axis from 0 to 1 along it"
        + (", the perplexity by its logarithm" if sweep.quality.unit == "perplexity" else ""),
    ]
    if any(axis.unit == "seconds" for axis in sweep.axes):
        said.append(
            "Times are of this machine: the dense model's median in the first point's bench, over the ratio of each"
            " point's own pairs of processes; intervals, and what each bench read, stand in sweep.json"
        )
    return [*said, *(line.removeprefix("budget   ") for line in _unheld(sweep))]


def _plot(facts: dict[str, Any], plt: Any) -> Any:
    """A panel for each axis: every model, and the line through the front."""
    sweep: Sweep = facts["sweep"]
    count = len(sweep.axes)
    figure, panels = plt.subplots(1, count, figsize=(max(6.4, 4.2 * count), 4), squeeze=False)
    precisions = list(dict.fromkeys(e.precision for e in sweep.entries))
    shapes = dict(zip(precisions, ("o", "^", "s", "D", "v", "P", "X"), strict=False))
    for panel, axis in zip(panels[0], sweep.axes, strict=True):
        scale = {"bytes": 1e6, "seconds": 1e-3, "FLOPs": 1e6}.get(axis.unit, 1e6 if _large(sweep, axis) else 1)
        unit = {"bytes": "MB", "seconds": "ms"}.get(axis.unit, f"million {axis.title}" if scale > 1 else axis.title)
        on = [sweep.entries[i] for i in axis.front]
        panel.plot([e.costs[axis.key] / scale for e in on], [e.quality for e in on], "-", color=QUIET, lw=1.5, zorder=1)
        for i, entry in enumerate(sweep.entries):
            if axis.key not in entry.costs:
                continue
            at = entry.costs[axis.key] / scale, entry.quality
            colour = GREY if entry.point == DENSE else PRUNED
            panel.plot(*at, shapes.get(entry.precision, "o"), color=colour, ms=6, alpha=1 if i in axis.front else 0.45)
            if i == axis.knee:
                panel.plot(*at, "o", mfc="none", mec="black", ms=13)
            label = entry.point + (" (knee)" if i == axis.knee else "")
            panel.annotate(caption(label, 32), at, xytext=(5, 5), textcoords="offset points", fontsize=7)
        if sweep.quality.unit == "perplexity":
            panel.set_yscale("log")
        panel.set_xlabel(unit if unit.endswith(axis.title) else f"{axis.title}, {unit}")
        panel.locator_params(axis="x", nbins=5)
        panel.margins(x=0.16, y=0.14)
    panels[0][0].set_ylabel(
        caption(sweep.quality.name, 60) + (" (log scale)" if sweep.quality.unit == "perplexity" else "")
    )
    for precision in precisions if len(precisions) > 1 else ():
        title = precision.replace("-", " ", 1) or "as saved"
        panels[0][-1].plot([], [], shapes.get(precision, "o"), color="black", ls="none", label=title)
    if len(precisions) > 1:
        panels[0][-1].legend(frameon=False, fontsize=7)
    figure.suptitle(caption(f"{sweep.model}: grey dense, blue pruned; the line is the Pareto front", 90), fontsize=10)
    return figure


def _large(sweep: Sweep, axis: Axis) -> bool:
    return max(e.costs[axis.key] for e in sweep.entries if axis.key in e.costs) >= 1e6
