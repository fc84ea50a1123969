"""Fits the forecast's speeds and memory on measured runs, and checks it on runs of other shapes.

    python tools/fit_forecast.py --runs runs/forecast           # measures what is missing, fits, writes forecast.yaml
    python tools/fit_forecast.py --runs runs/forecast --check   # held-out runs: prints predicted / measured

Runs are `compress prune ... --until plan` on random LLMs, one thread a process. What is fitted is CPU time, from the
seals: on a machine that others work on it hardly changes, where wall time does. Each run is noted in runs.jsonl when it
is done; the same command again goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from compress.language.budget import Option, knapsack, nearest_feasible
from compress.run.folder import SEAL, Journal
from compress.run.forecast import FITTED, KINDS, Fit, Stage, cpu_seconds, held, load_fit
from compress.system.files import write_whole

# Measured alone: bytes read as blocks are, kept as streams are, hashed into a seal, summed and gathered between
# processes; cells of the knapsack.
DIRECT = ("read", "save", "write", "sums", "gather", "choose")
PATIENCE = 20  # generations without a better parent: more than there are, so that the work is what was asked for


@dataclass(frozen=True)
class Case:
    """A random model and a recipe for it."""

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    windows: int
    length: int
    search_windows: int
    search_length: int
    offspring: int = 8
    generations: int = 2
    levels: int = 5
    iterations: int = 1
    streamed: bool = False
    processes: int = 1
    shard: bool = False
    metric: str = "fisher"
    round_to: int = 16
    sparsity: float = 0.4
    recover: dict[str, Any] | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        text = {"files": ["text.txt"]}
        return {
            "method": "tyr",
            "sparsity": self.sparsity,
            "calibration": {"sources": [text], "windows": self.windows, "length": self.length},
            "evaluation": {"texts": [{"name": "none", "source": {"files": ["other.txt"]}}], "windows": 1, "length": 16},
            "memory": {"stream": self.streamed, "shard": self.shard},
            "recover": self.recover,
            "tyr": {
                "levels": self.levels,
                "interval": 1 / (self.levels - 1),
                "head_levels": 3,
                "iterations": self.iterations,
                "refine_levels": 3,
                "round_to": self.round_to,
                "metric": self.metric,
                "search": {
                    "windows": self.search_windows,
                    "length": self.search_length,
                    "positions": self.search_length // 2,
                    "singles_windows": max(1, self.search_windows // 2),
                    "generations": self.generations,
                    "offspring": self.offspring,
                    "steps": [0.5, 1.0],
                    "survivors": [2],
                    "patience": PATIENCE,
                },
            },
        }


#                name    hidden  ffn  L  q  kv  vocab  windows     search
FITTED_ON = (
    Case("narrow", 128, 512, 6, 4, 2, 2000, 24, 128, 6, 64),
    Case("wide-ffn", 256, 2048, 4, 4, 2, 2000, 16, 128, 4, 64, round_to=32),
    Case("heads", 512, 768, 4, 16, 4, 4000, 16, 128, 4, 64),
    Case("deep", 192, 512, 14, 6, 3, 2000, 16, 128, 4, 64, generations=1),
    Case("tokens", 256, 768, 4, 4, 4, 2000, 64, 256, 4, 128),
    Case("vocabulary", 256, 512, 4, 4, 2, 32000, 16, 128, 6, 128),
    Case("twice", 256, 768, 5, 8, 4, 2000, 16, 128, 4, 64, iterations=2),
    Case("streamed", 512, 1536, 5, 8, 2, 8000, 16, 128, 4, 64, streamed=True, generations=1),
    Case("searching", 256, 768, 5, 4, 2, 2000, 16, 128, 12, 128, generations=3, offspring=12),
    Case("no-metric", 384, 1024, 6, 6, 3, 4000, 24, 128, 4, 64, metric="none"),
    Case("two", 256, 1024, 5, 4, 2, 4000, 32, 128, 4, 64, processes=2),
    Case("large", 768, 2048, 4, 12, 4, 16000, 16, 128, 2, 64, round_to=64, levels=4, generations=1),
)
# Of other shapes than any above.
HELD_OUT = (
    Case("unseen-mid",   320,  1280,  7, 5,  5,  6000,  20,  192,   5,  96),
    Case("unseen-twice", 448,   896,  5, 7,  7,  3000,  24,  128,   4,  64, iterations=2, generations=3),
    Case("unseen-read",  640,  1792,  4, 10, 2, 12000,  18,  160,   4,  80, streamed=True, round_to=32),
    Case("unseen-two",   384,  1152,  6, 6,  2,  5000,  36,  128,   4,  64, processes=2, levels=7),
    Case("unseen-parts", 512,  1408,  6, 8,  4,  4000,  28,  144,   4,  72, processes=2, streamed=True, shard=True),
    Case("unseen-deep",  288,   640, 10, 9,  3,  7000,  22,  176,   6,  88, levels=7, sparsity=0.3),
)  # fmt: skip


def make(case: Case, folder: Path) -> None:
    """A random bfloat16 Llama, a tokenizer of whole words, and text, in ``folder``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocab,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=case.hidden**-0.5,  # sublayers as strong as the stream: losses that mean something
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    words = {f"w{i}": i for i in range(case.vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2")
    made.save_pretrained(folder / "model")
    draw = np.random.default_rng(0)
    tokens = int(1.3 * (case.windows + case.search_windows + 2) * case.length) + 600
    for name, count in (("text", tokens), ("other", 1200)):
        lines = (" ".join(f"w{i}" for i in draw.integers(3, case.vocab, 50)) for _ in range(count // 50 + 2))
        (folder / f"{name}.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(case.recipe), encoding="utf-8")


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Runs a case and reads its seals: CPU seconds, bytes and the highest memory so far of every stage."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    make(case, folder)
    words = ["prune", "model", "--recipe", "recipe.yaml", "--out", "run", "-n", str(case.processes)]
    words += ["--until", "recover" if case.recover else "plan"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "compress", *words], cwd=folder, env=environment, stdout=log, stderr=log
        )
        fullest = 0
        while child.poll() is None:
            time.sleep(0.02)
            fullest = max(fullest, folder_bytes(folder / "run"))
    if child.returncode:
        raise SystemExit(f"{case.name} failed:\n{(folder / 'log').read_text('utf-8')[-2000:]}")
    rows = sealed(folder / "run")
    searches = [json.loads(p.read_text("utf-8")) for p in (folder / "run").glob("search-*/search.json")]
    blocks = json.loads((folder / "run" / "plan" / "plan.json").read_text("utf-8"))["blocks"]
    group = case.heads // case.kv_heads
    found = [(len({h // group for h in b["heads"]}), len(b["heads"]), len(b["neurons"])) for b in blocks]
    shutil.rmtree(folder)
    return {
        "case": asdict(case),
        "wall_seconds": round(time.monotonic() - began, 2),
        "disk_bytes_peak": fullest,
        "stages": rows,
        "token_layers": sum(search["work_token_layers"] for search in searches),
        "found": [[groups, heads // groups if groups else 0, neurons] for groups, heads, neurons in found],
    }


def folder_bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # the run has just renamed or removed it
    return total


def sealed(run: Path) -> list[dict[str, Any]]:
    """Per stage (of blocks: all together), in their order: CPU seconds, the highest memory so far, bytes kept."""
    seals = [json.loads(p.read_text("utf-8")) | {"seal_bytes": p.stat().st_size} for p in run.rglob(SEAL)]
    rows: dict[str, dict[str, Any]] = {}
    before = 0.0
    for seal in sorted(seals, key=lambda s: s["cpu_seconds_so_far"]):
        row = rows.setdefault(
            seal["stage"].split("/")[0], {"cpu_seconds": 0.0, "seconds": 0.0, "bytes": 0, "peak_rss_bytes": 0}
        )
        row["cpu_seconds"] += seal["cpu_seconds_so_far"] - before
        before = seal["cpu_seconds_so_far"]
        row["seconds"] += seal["seconds"]
        row["bytes"] += seal["seal_bytes"] + sum(f["bytes"] for f in seal["files"].values())
        row["peak_rss_bytes"] = max(row["peak_rss_bytes"], seal["peak_rss_bytes"])
    return [{"stage": name, **row} for name, row in rows.items()]


def foreseen(case: Case, found: Sequence[Sequence[int]] | None = None) -> list[Stage]:
    """The stages of a case, reckoned from its shapes.

    Args:
        found: (KV groups, query heads a group, neurons) of each block, where the search is over.
    """
    import torch
    from transformers import LlamaConfig

    from compress.language.setup import Setup
    from compress.models.families import family_for
    from compress.recipes.tyr import TyrOptions
    from compress.recipes.tyr.choice import Choice
    from compress.recipes.tyr.forecast import shape_of, stages
    from compress.recipes.tyr.stages import job_for
    from compress.schema.recipe import Recipe

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        vocab_size=case.vocab,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    data = case.recipe
    options = TyrOptions(**data.pop("tyr"))
    recipe = Recipe(**data, options=options)
    family = family_for(config)
    setup = Setup(None, recipe, family, family.geometry(config), family.costs(config), config, "")  # type: ignore[arg-type]
    chosen = None if found is None else [Choice(*c) for c in found]
    return stages(shape_of(setup, case.processes, case.streamed, None), job_for(setup, None, {}), chosen)


def pairs(measured: dict[str, Any], knowing: bool = False) -> list[tuple[Stage, dict[str, Any]]]:
    """(reckoned, measured) of every stage up to the plan.

    Args:
        knowing: reckon with what the search chose, on which the bytes of a plan depend.
    """
    case = Case(**measured["case"])
    by_name = {s.name: s for s in foreseen(case, measured.get("found") if knowing else None)}
    return [(by_name[row["stage"]], row) for row in measured["stages"]]


def least_squares(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min ||A x - b|| over x >= 0, by coordinate descent: few unknowns, so thousands of rounds cost nothing."""
    scale = np.linalg.norm(A, axis=0)
    scale[scale == 0] = 1.0
    M = A / scale
    gram, right = M.T @ M, M.T @ b
    x = np.zeros(A.shape[1])
    for _ in range(20000):
        moved = 0.0
        for k in range(len(x)):
            if gram[k, k] > 0:
                new = max(0.0, x[k] + (right[k] - gram[k] @ x) / gram[k, k])
                moved = max(moved, abs(new - x[k]))
                x[k] = new
        if moved < 1e-12:
            break
    return x / scale


def fit(runs: list[dict[str, Any]], reference: dict[str, float]) -> tuple[dict[str, float], float, float]:
    """(CPU seconds a unit by kind, base bytes, factor), least relative squares over all stages of all runs.

    No kind is done faster than ``reference`` says the machine can.
    """
    least = np.array([1 / reference[kind] if kind in reference else 0.0 for kind in KINDS])
    rows, aims, marks = [], [], []
    for run in runs:
        highest = 0.0
        for (blind, row), (stage, _) in zip(pairs(run), pairs(run, knowing=True), strict=True):
            highest = max(highest, sum(blind.device.values()) + sum(blind.ram.values()))
            marks.append((highest, row["peak_rss_bytes"]))
            if stage.name == "text":
                continue  # starting Python and packing text: no work that grows with the model alone
            # Relative errors count, but those of stages that hardly take time do not.
            weight = 1 / (row["cpu_seconds"] + 0.3)
            amounts = np.array([stage.work.get(kind, 0.0) for kind in KINDS])
            rows.append([0.0 if kind in DIRECT else a * weight for kind, a in zip(KINDS, amounts, strict=True)])
            aims.append((row["cpu_seconds"] - amounts @ least) * weight)
    found = least + least_squares(np.array(rows), np.array(aims))
    x, y = np.array(marks, dtype=float).T
    A = np.stack([np.ones_like(x), x], 1) / y[:, None]
    base, factor = np.linalg.lstsq(A, np.ones_like(y), rcond=None)[0]
    return dict(zip(KINDS, (float(v) for v in found), strict=True)), float(base), float(factor)


def ratios(runs: list[dict[str, Any]], model: Fit) -> list[float]:
    """Measured over forecast CPU seconds of whole runs, from the text's seal to the plan's."""
    out = []
    for run in runs:
        both = [(sum(cpu_seconds(s, model).values()), r["cpu_seconds"]) for s, r in pairs(run) if s.name != "text"]
        out.append(sum(b for _, b in both) / sum(a for a, _ in both))
    return out


def unseen(runs: list[dict[str, Any]], reference: dict[str, float]) -> list[float]:
    """The same for every run, forecast from a fit on all the others."""
    out = []
    for i, run in enumerate(runs):
        others = runs[:i] + runs[i + 1 :]
        seconds, base, factor = fit(others, reference)
        out += ratios([run], Fit(seconds, reference, base, factor, 1, 1, len(others)))
    return out


def table(runs: list[dict[str, Any]], model: Fit) -> tuple[list[str], dict[str, float]]:
    """Predicted / measured / error of every stage; and the largest errors of whole runs.

    Time and memory are foretold without knowing what the search would choose; bytes kept with it.
    """
    lines = [f"{'run':13} {'stage':12} {'CPU s':>17} {'error':>7}   {'highest memory so far, MB':>26} {'error':>7}"
             f"   {'kept, MB':>17} {'error':>7}"]  # fmt: skip
    worst = {"time": 0.0, "memory": 0.0, "memory above base": 0.0, "disk": 0.0, "disk at its fullest": 0.0}
    worst["token-layers"] = 0.0

    def off(predicted: float, measured: float) -> float:
        return predicted / measured - 1

    def note(what: str, error: float) -> None:
        worst[what] = max(worst[what], abs(error))

    for run in runs:
        name = run["case"]["name"]
        highest = kept = fullest = spent = took = written = 0.0
        for (stage, row), (known, _) in zip(pairs(run), pairs(run, knowing=True), strict=True):
            highest = max(highest, held(stage, model))
            predicted = 0.0 if stage.name == "text" else sum(cpu_seconds(stage, model).values())
            measured = 0.0 if stage.name == "text" else row["cpu_seconds"]
            spent, took, written = spent + predicted, took + measured, written + row["bytes"]
            fullest = max(fullest, kept + known.kept + known.scratch)
            kept += known.kept
            first = f"{predicted:7.2f} / {measured:7.2f} {off(predicted, measured):+7.0%}" if measured else " " * 25
            lines.append(
                f"{name:13} {stage.name:12} {first}   {highest / 1e6:12.0f} / {row['peak_rss_bytes'] / 1e6:11.0f}"
                f" {off(highest, row['peak_rss_bytes']):+7.0%}   {known.kept / 1e6:7.2f} / {row['bytes'] / 1e6:7.2f}"
                f" {off(known.kept, row['bytes']):+7.0%}"
            )
            note("memory", off(highest, row["peak_rss_bytes"]))
        last = run["stages"][-1]["peak_rss_bytes"]
        note("time", off(spent, took))
        note("disk", off(kept, written))
        note("disk at its fullest", off(fullest, run["disk_bytes_peak"]))
        note("memory above base", off(highest - model.base, last - model.base))
        layers = sum(s.token_layers for s, _ in pairs(run))
        note("token-layers", off(layers, run["token_layers"]))
        lines.append(
            f"{name:13} {'whole run':12} {spent:7.2f} / {took:7.2f} {off(spent, took):+7.0%}   "
            f"{highest / 1e6:12.0f} / {last / 1e6:11.0f} {off(highest, last):+7.0%}   "
            f"{kept / 1e6:7.2f} / {written / 1e6:7.2f} {off(kept, written):+7.0%}"
            f"   fullest {fullest / 1e6:.2f} / {run['disk_bytes_peak'] / 1e6:.2f} MB"
            f" {off(fullest, run['disk_bytes_peak']):+.0%}, token-layers {off(layers, run['token_layers']):+.0%}"
        )
    return lines, worst


def measured(cases: tuple[Case, ...], folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "runs.jsonl")
    for case in cases:
        if not any(row["case"] == asdict(case) for row in journal.rows()):
            print(f"measuring {case.name}", file=sys.stderr, flush=True)
            journal.append(measure(case, folder / case.name))
    return [row for case in cases for row in journal.rows() if row["case"] == asdict(case)]


def exchange(number: int, folder: str) -> None:
    """One of two processes that sum and gather 32 MiB over gloo; the first notes bytes a CPU second."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=number, world_size=2)
    mine = torch.zeros(2**22, dtype=torch.int64)
    parts = [torch.empty_like(mine) for _ in range(2)]
    found = {}
    for kind, work in (("sums", lambda: dist.all_reduce(mine)), ("gather", lambda: dist.all_gather(parts, mine))):
        work()
        began = time.process_time()
        for _ in range(5):
            work()
        found[kind] = 5 * mine.nbytes / (time.process_time() - began)
    if number == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def speeds() -> dict[str, float]:
    """What one core does at best, in CPU time: float32 and float64 products (FLOP/s), copies (bytes/s); and what is
    measured alone and not fitted (`DIRECT`, bytes/s)."""
    import hashlib

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from compress.run.machines import speed

    torch.set_num_threads(1)
    where = torch.device("cpu")
    kinds = {"gemm32": (torch.float32, False), "gemm64": (torch.float64, False), "copy": (torch.float32, True)}
    found = {k: max(speed(where, *how, clock=time.process_time) for _ in range(5)) for k, how in kinds.items()}
    block = {"x": torch.randn(2**26).to(torch.bfloat16)}

    def read(path: Path) -> None:
        with safe_open(path, "pt") as file:
            file.get_tensor("x").clone().to(torch.float32)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.safetensors"
        jobs: dict[str, Callable[[], Any]] = {
            "save": lambda: save_file(block, path),
            "read": lambda: read(path),
            "write": lambda: hashlib.sha256(path.read_bytes()),
        }
        for kind, job in jobs.items():
            spent = []
            for _ in range(4):
                began = time.process_time()
                job()
                spent.append(time.process_time() - began)
            found[kind] = block["x"].nbytes / min(spent)
        menus = [[Option(e * (i % 3 + 2), float(e * e)) for e in range(8)] for i in range(60)]
        began = time.process_time()
        knapsack(menus, 600)
        coarse = time.process_time() - began
        fine = [[Option(o.saving * 100 + (o.saving > 0), o.loss) for o in menu] for menu in menus]
        began = time.process_time()
        knapsack(fine, nearest_feasible(fine, 60_000))
        # Both differ in their cells alone (the search for a total is a part of the start, and is left in).
        found["choose"] = 480 * (60_000 - 600) / max(1e-9, time.process_time() - began - coarse)
        torch.multiprocessing.spawn(exchange, (folder,), nprocs=2)
        found |= json.loads((Path(folder) / "found.json").read_text("utf-8"))
    return found


def fitted(runs: list[dict[str, Any]]) -> str:
    """The text of forecast.yaml."""
    reference = speeds()
    seconds, base, factor = fit(runs, reference)
    spread = np.log(unseen(runs, reference))
    # 5 % and 95 % of a normal law with the errors' own mean and spread.
    middle, wide = float(spread.mean()), 1.645 * float(spread.std(ddof=1)) * math.sqrt(1 + 1 / len(spread))
    facts = {
        "seconds_per_unit": {k: float(f"{v:.4g}") for k, v in seconds.items()},
        "reference": {k: float(f"{v:.4g}") for k, v in reference.items()},
        "memory": {"base": round(base), "factor": round(factor, 4)},
        "measured_over_forecast": {
            "low": round(math.exp(middle - wide), 3),
            "high": round(math.exp(middle + wide), 3),
            "each": [round(float(math.exp(v)), 3) for v in spread],
        },
        "runs": {"fitted": len(runs), "stages": sum(len(r["stages"]) for r in runs)},
    }
    return (
        "# Written by tools/fit_forecast.py: CPU seconds a unit of work on one core of the machine it ran on, and how\n"
        "# far off each run was when it was forecast from the others.\n" + yaml.safe_dump(facts, sort_keys=False)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/forecast"), help="folder of the measurements")
    parser.add_argument("--check", action="store_true", help="on held-out runs, with forecast.yaml as it is")
    parser.add_argument("--seen", action="store_true", help="prints the table of the runs that were fitted")
    args = parser.parse_args()
    if args.check or args.seen:
        lines, worst = table(measured(HELD_OUT if args.check else FITTED_ON, args.runs), load_fit())
        print("\n".join(lines))
        print("largest errors of whole runs: " + ", ".join(f"{k} {v:.0%}" for k, v in worst.items()))
        limits = {"time": 0.35, "memory": 0.2, "disk": 0.2, "disk at its fullest": 0.2}
        missed = [k for k, limit in limits.items() if worst[k] > limit]
        print("within 20 % for memory and disk and 35 % for time" if not missed else f"missed: {', '.join(missed)}")
        sys.exit(bool(missed))
    write_whole(FITTED, fitted(measured(FITTED_ON, args.runs)))
    print(FITTED.read_text("utf-8"))


if __name__ == "__main__":
    main()
