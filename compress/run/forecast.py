"""What a run will cost: its stages' work, priced with speeds fitted on measured runs or with a GPU's published peaks.

A recipe says what its stages do (`Stage`), the machine table what a machine is said to do, and `forecast.yaml`, which
`tools/fit_forecast.py` writes from sealed runs, what a second bought on the machine those ran on and how far off such
forecasts were on runs it had not seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.schema.strict_yaml import read_yaml

if TYPE_CHECKING:
    from compress.run.machines import Machine

FITTED = Path(__file__).with_name("forecast.yaml")

# Kinds of work: unit, and what bounds a stage that spends most of its time on it.
KINDS = {
    "gemm32": ("FLOP", "float32 products"),
    "gemm64": ("FLOP", "float64 solver"),
    "thin64": ("byte", "float64 updates"),
    "touch": ("byte", "memory traffic"),
    "calls": ("block run", "calls"),
    "seals": ("sealed stage", "seals"),
    "read": ("byte", "reading"),
    "logits": ("element pass", "logits"),
    "write": ("byte", "hashing"),
    "save": ("byte", "keeping streams"),
    "make": ("byte", "making blocks"),
    "choose": ("cell", "the knapsack"),
    "sums": ("byte", "sums and parts"),
    "gather": ("byte", "exchange"),
}
# What the main process alone does while the others wait.
ALONE = ("gemm64", "thin64", "write")
# Seconds that the CPU takes to launch a block's kernels: 360 candidates of SmolLM2-135M on an H100 took 34 s, of which
# products are 10 s, in 40,000 calls.
GPU_CALL = 6.5e-4


@dataclass(frozen=True)
class Stage:
    """One stage of a run, of the process that has the most to do and to hold.

    ``work``: amounts by `KINDS`; ``thin64_flops`` beside them, the FLOPs of the updates whose bytes are ``thin64``.
    ``device`` and ``ram``: bytes by what holds them, at the stage's worst moment.
    ``kept``: bytes on disk that stay; ``scratch``: the most that lies beside them meanwhile. ``reads``: bytes read.
    """

    name: str
    work: Mapping[str, float]
    device: Mapping[str, float]
    ram: Mapping[str, float]
    kept: float
    scratch: float
    reads: float = 0.0
    token_layers: float = 0.0
    candidates: int = 0


@dataclass(frozen=True)
class Fit:
    """What `tools/fit_forecast.py` found: CPU seconds a unit of each kind of work, at the speeds of ``reference``
    (FLOP/s and bytes/s); a process's bytes before there is a model, and what one reckoned byte holds in truth.

    ``low`` and ``high``: of runs that were not fitted on, measured time over forecast time, 5 % and 95 %.
    """

    seconds: Mapping[str, float]
    reference: Mapping[str, float]
    base: float
    factor: float
    low: float
    high: float
    runs: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@lru_cache
def load_fit(path: Path = FITTED) -> Fit:
    facts = read_yaml(path, "the table of measured runs").value
    return Fit(
        facts["seconds_per_unit"],
        facts["reference"],
        facts["memory"]["base"],
        facts["memory"]["factor"],
        facts["measured_over_forecast"]["low"],
        facts["measured_over_forecast"]["high"],
        facts["runs"]["fitted"],
        facts,
    )


def cpu_seconds(stage: Stage, fit: Fit) -> dict[str, float]:
    """CPU seconds by kind of work on the machine, and with the one thread, that the fit was made with."""
    return {kind: amount * fit.seconds[kind] for kind, amount in stage.work.items() if kind in KINDS}


def held(stage: Stage, fit: Fit) -> float:
    """Bytes that a process without a GPU holds at the stage's worst moment."""
    return fit.base + fit.factor * (sum(stage.device.values()) + sum(stage.ram.values()))


def seconds(stage: Stage, machine: Machine, fit: Fit, cold: float) -> dict[str, float]:
    """Wall seconds by kind of work on ``machine``; nothing overlaps, as in the code.

    Args:
        cold: bytes, of those the stage reads, that come from the disk; the rest is in the system's cache.
    """
    spent = cpu_seconds(stage, fit)
    here = {"gemm32": machine.float32, "gemm64": machine.float64}
    for kind, rate in here.items():
        if kind in spent:
            wanted = stage.work[kind] / rate
            spent[kind] = wanted if machine.gpu else spent[kind] * fit.reference[kind] / rate
    for kind, moved in (("thin64", 1), ("touch", 1), ("logits", 12)):
        if kind in spent:
            spent[kind] = (
                moved * stage.work[kind] / machine.bandwidth
                if machine.gpu
                else spent[kind] * fit.reference["copy"] / machine.bandwidth
            )
    if machine.gpu:
        if "calls" in spent:
            spent["calls"] = stage.work["calls"] * GPU_CALL
        if "thin64" in spent:
            # A GPU that is slow in float64 is bound by the updates' arithmetic, not by what they move.
            spent["thin64"] = max(spent["thin64"], stage.work.get("thin64_flops", 0.0) / machine.float64)
        for kind in ("make", "sums"):
            if kind in spent:
                spent[kind] = stage.work[kind] / machine.pcie
        if "read" in spent:
            # The speed fitted holds the turning to float32, which a GPU does itself: more than it takes there.
            spent["read"] += stage.work["read"] / machine.pcie
    if machine.disk_read:
        # Written at the rate that is read at, for want of a better figure; by every process what is its own.
        written = stage.work.get("write", 0.0) + machine.count * stage.work.get("save", 0.0)
        spent["disk"] = (cold + written) / machine.disk_read
    return spent


def forecast(stages: Sequence[Stage], machine: Machine, dense_bytes: float) -> dict[str, Any]:
    """Prices all stages on a machine. Bytes, seconds; JSON-like.

    Args:
        dense_bytes: the stored model's, which a node's cache may hold.
    """
    fit = load_fit()
    rows: list[dict[str, Any]] = []
    kept = peak = 0.0
    warm = False
    for stage in stages:
        device, ram = sum(stage.device.values()), sum(stage.ram.values())
        if machine.gpu:
            own = {"gpu_bytes": fit.factor * device, "ram_bytes": fit.base + fit.factor * ram}
        else:
            own = {"ram_bytes": held(stage, fit)}
        # Once read, the weights stay in the system's cache where the node has room for them.
        room = machine.ram - machine.count * own["ram_bytes"] > dense_bytes
        first = min(stage.reads, dense_bytes)
        cold = (0.0 if warm and room else first) if room else stage.reads * machine.count
        warm = room
        spent = seconds(stage, machine, fit, cold)
        total = sum(spent.values())
        main = max(spent, key=lambda k: spent[k]) if total else "calls"
        peak = max(peak, kept + stage.kept + stage.scratch)
        kept += stage.kept
        everything = {**stage.ram, **({} if machine.gpu else stage.device)}
        rows.append(
            {
                "stage": stage.name,
                "seconds": total,
                "bound_by": "disk" if main == "disk" else KINDS[main][1],
                "bound_share": spent[main] / total if total else 0.0,
                "main_alone_seconds": sum(spent.get(k, 0.0) for k in ALONE),
                "seconds_by_kind": spent,
                **own,
                "gpu_largest": max(stage.device, key=lambda k: stage.device[k]),
                "ram_largest": max(everything, key=lambda k: everything[k]),
                "read_bytes": stage.reads,
                "written_bytes": stage.kept,
                "scratch_bytes": stage.scratch,
                "disk_bytes": kept + stage.scratch,
                "token_layers": stage.token_layers,
                "candidates": stage.candidates,
            }
        )
    total = sum(r["seconds"] for r in rows)
    worst_ram = max(rows, key=lambda r: r["ram_bytes"])
    found: dict[str, Any] = {
        "machine": {
            "name": machine.title,
            "processes": machine.world,
            "nodes": machine.nodes,
            "gpu": machine.gpu,
            "figures": machine.words,
        },
        "stages": rows,
        "seconds": total,
        "seconds_low": total * fit.low,
        "seconds_high": total * fit.high,
        "ram_bytes": worst_ram["ram_bytes"],
        "ram_stage": worst_ram["stage"],
        "ram_bytes_node": machine.count * worst_ram["ram_bytes"],
        "disk_bytes_peak": peak,
        "disk_bytes_end": kept,
        "read_bytes": sum(r["read_bytes"] for r in rows),
        "token_layers": sum(r["token_layers"] for r in rows),
        "lacks": [],
        "fit": {
            "runs": fit.runs,
            "measured_on": "this project's development machine, one core",
            "low": fit.low,
            "high": fit.high,
        },
    }
    lacks = found["lacks"]
    if machine.gpu:
        worst = max(rows, key=lambda r: r["gpu_bytes"])
        found |= {"gpu_bytes": worst["gpu_bytes"], "gpu_stage": worst["stage"]}
        for row in rows:
            if row["gpu_bytes"] > machine.memory:
                lacks.append(
                    f"{row['stage']}: {row['gpu_bytes'] / 1e9:.0f} GB of GPU memory, {machine.memory / 1e9:.0f} are"
                    f" there (mostly {row['gpu_largest']})"
                )
    for row in rows:
        if machine.count * row["ram_bytes"] > machine.ram:
            lacks.append(
                f"{row['stage']}: {machine.count * row['ram_bytes'] / 1e9:.0f} GB of RAM on a node,"
                f" {machine.ram / 1e9:.0f} are there (mostly {row['ram_largest']})"
            )
    if peak > machine.disk:
        lacks.append(f"disk: {peak / 1e9:.0f} GB at its fullest, {machine.disk / 1e9:.0f} are there")
    return found
