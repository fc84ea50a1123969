"""What the command line says of a run of Týr, and of one to come."""

from __future__ import annotations

from typing import Any

from compress.words.wording import duration


def lines(report: dict[str, Any]) -> list[str]:
    from compress.report.build import run_line
    from compress.report.multimodal import lines as whole_lines
    from compress.report.quantised import lines as quantised_lines
    from compress.report.rows import lines as figure_lines
    from compress.report.rows import rows
    from compress.words.wording import megabytes, small

    size = report["size"]
    said = [
        f"removed  {100 * size['backbone_removed']:.2f} % of the backbone, {100 * size['total_removed']:.2f} % of all"
        f" parameters ({size['dense']['total_parameters']:,} -> {size['pruned']['total_parameters']:,})"
    ]
    said += budget_lines(report)
    for layout in report.get("verify", {}).get("layouts", ()):
        said.append(
            f"reloaded {layout['layout']} in a clean process: logits differ by {small(layout['max_logit_difference'])}"
            f" (allowed {small(layout['tolerance'])})"
        )
    said += whole_lines(report)
    if "recover" in report:
        recovered = report["recover"]
        line = f"recover  {recovered['method']}, {recovered['steps']:,} steps of {recovered['tokens']:,} tokens in all"
        if "geometric_mean" in recovered:
            mean = recovered["geometric_mean"]
            line += f": ppl, geometric mean, {mean['before']:.2f} -> {mean['after']:.2f}"
        said.append(line)
    if "export" in report:
        onnx = report["export"]["onnx"]
        dense, pruned = (megabytes(sum(onnx[k]["bytes"].values())) for k in ("dense", "pruned"))
        said.append(
            f"onnx     {dense} -> {pruned}; outputs agree with torch to {small(onnx['pruned']['largest_difference'])}"
        )
    return [*said, *figure_lines(rows(report)), *quantised_lines(report), run_line(report)]


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e9:.1f} GB"


def _each(value: int | list[int], form: str = ",") -> str:
    """What all blocks have, or the least and the most of what they have."""
    return format(value, form) if isinstance(value, int) else f"{min(value):{form}} to {max(value):{form}}"


def forecast_lines(facts: dict[str, Any]) -> list[str]:
    shapes, units, machine = facts["shapes"], facts["units"], facts["machine"]
    gpu = "gpu_bytes" in facts
    head = ("stage", "time", "bound by", *(("GPU/process",) if gpu else ()), "RAM/process", "read", "kept", "scratch")
    rows = [head]
    for row in facts["stages"]:
        rows.append(
            (
                row["stage"],
                duration(row["seconds"]),
                f"{row['bound_by']} {100 * row['bound_share']:.0f} %",
                *((_size(row["gpu_bytes"]),) if gpu else ()),
                _size(row["ram_bytes"]),
                *(_size(row[k]) for k in ("read_bytes", "written_bytes", "scratch_bytes")),
            )
        )
    wide = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = []
    for row in rows:
        cells = (f"{v:{'<' if i in (0, 2) else '>'}{w}}" for i, (v, w) in enumerate(zip(row, wide, strict=True)))
        table.append("         " + "  ".join(cells))
    alone = sum(row["main_alone_seconds"] for row in facts["stages"])
    memory = f"{_size(facts['ram_bytes'])} of RAM a process (in {facts['ram_stage']})"
    if gpu:
        memory = f"{_size(facts['gpu_bytes'])} of GPU memory a process (in {facts['gpu_stage']}), " + memory
    return [
        f"model    {facts['model']} ({facts['family']}): {shapes['layers']} layers, hidden {shapes['hidden']},"
        f" {_each(shapes['heads'], '')} heads in {_each(shapes['kv_heads'], '')} KV groups of"
        f" {_each(shapes['head_dim'], '')}, FFN {_each(shapes['ffn'], '')}",
        f"source   {facts['source']}",
        *[f"whole    {line}" for line in facts.get("whole", ())],
        *_budget(facts),
        f"units    a KV group with its query heads {_each(units['kv_group_parameters'])},"
        f" a neuron {units['neuron_parameters']:,} (in multiples of {units['neurons_round_to']})",
        f"machine  {machine['name']}: {machine['processes']} process{'es' if machine['processes'] > 1 else ''};"
        f" {machine['figures']}",
        f"weights  {'read from disk block by block' if facts['streamed'] else 'held in memory'}"
        f"{'; read once, a part by each process, in every stage' if facts['sharded'] else ''},"
        f" {_size(facts['dense_bytes'])} as stored",
        *table,
        f"time     {duration(facts['seconds'])} up to the saved model, {duration(facts['seconds_low'])} to"
        f" {duration(facts['seconds_high'])}"
        + (f"; {duration(alone)} of it the main process works alone" if machine["processes"] > 1 else ""),
        "         (the interval is what forecasts of measured CPU runs were off by"
        + ("; of GPUs one small run was measured, so the peaks' own uncertainty comes on top)" if gpu else ")"),
        f"memory   {memory}" + (f"; {_size(facts['ram_bytes_node'])} a node" if machine["processes"] > 1 else ""),
        f"disk     {_size(facts['disk_bytes_peak'])} at its fullest, {_size(facts['disk_bytes_end'])} at the end,"
        f" beside the dense model; {_size(facts['read_bytes'])} read by a process",
        "         (final and plan at most: a sublayer that the search leaves dense takes nothing there)",
        *_beside_paper(facts),
        *(f"lacks    {what}" for what in facts["lacks"]),
        *(f"loads    {layout}: {what}" for layout, what in facts["loads_with"].items()),
    ]


def _budget(facts: dict[str, Any]) -> list[str]:
    """How much is to go, or what may stay."""
    from compress.language.limits import shown

    if "budgets" not in facts:
        return [
            f"budget   remove {facts['remove']:,} of {facts['backbone_parameters']:,} backbone parameters;"
            f" {facts['after']['total_parameters']:,} of {facts['total_parameters']:,} stay"
        ]
    return [
        f"budget   {named(row)}: {shown(row, 'asked')} of {shown(row, 'dense')}; {shown(row, 'floor')} stay at least"
        + _by_table(row)
        if "asked" in row
        else f"budget   {named(row)}: what every shape takes is measured here when the run starts"
        for row in facts["budgets"]
    ]


def _by_table(row: dict[str, Any]) -> str:
    """Of a time that a table of an earlier run prices: when it was measured, and how far off it was."""
    if "measured_on" not in row:
        return ""
    off = row["table_error"]
    return (
        f" (by the table that a run measured here on {row['measured_on']}, off by {100 * off['median']:.1f} % (median)"
        f" and {100 * off['worst']:.1f} % at most; a run measures its own)"
    )


def named(row: dict[str, Any]) -> str:
    """A budget as it was written, with the length that it is taken at where it does not say that itself."""
    at = f" (at {row['length']} tokens)" if "length" in row and "@" not in row["budget"] else ""
    return f"{row['budget']}{at}"


def budget_lines(report: dict[str, Any]) -> list[str]:
    """What every budget asked for and what was found; nothing where there is none."""
    from compress.language.limits import shown

    said = []
    for row in report.get("budgets") or ():
        found = "not measured" if "measured" not in row else f"measured {shown(row, 'measured')}"
        verdict = f", {verdict_of(row)}" if "measured" in row else ""
        said.append(f"budget   {named(row)}: {shown(row, 'asked')} allowed, {found}{verdict}")
    return said


def verdict_of(row: dict[str, Any], stressed: str = "") -> str:
    """Whether a budget is held; what is bad stands between ``stressed``."""
    if "measured" not in row:
        return "not measured"
    if row["held"] is None:
        return "not resolved: it lies within the interval"
    return "held" if row["held"] else f"{stressed}not held{stressed}"


def _beside_paper(facts: dict[str, Any]) -> list[str]:
    """The paper's own figures beside the forecast's."""
    paper = facts["reference"]
    more = paper["token_layers"] / max(1.0, facts["token_layers"])
    said = [
        f"token-layers of the search {facts['token_layers']:.3g}, {paper['token_layers']:.3g} ({more:.1f}x as many)"
    ]
    if "supernet_bytes" in paper:
        said.append(f"supernets on disk {_size(facts['supernet_bytes'])}, {_size(paper['supernet_bytes'])}")
    if "gpu_bytes" in paper and "gpu_bytes" in facts:
        said.append(f"GPU memory {_size(facts['gpu_bytes'])} a process, {_size(paper['gpu_bytes'])} in all")
    if "search_seconds" in paper:
        ours = sum(r["seconds"] for r in facts["stages"] if r["stage"].startswith(("search", "singles")))
        said.append(f"search {duration(ours)} here, {duration(paper['search_seconds'])} on the paper's GPU")
    return [f"paper    ours, the paper's: {one}" for one in said]
