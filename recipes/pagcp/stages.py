"""A plain network under PAGCP: the stages from the dense training to the card.

Whole channels go, so what is saved is a smaller dense network that every runtime runs faster. Round by round: channel
groups, an order of their units, the oracle's greedy pass on the calibration split, the cut, and training of the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import __version__
from compress.errors import CompressError, UsageError
from compress.networks.setup import (
    WEIGHTS,
    NetworkSetup,
    check_data,
    dense_network,
    describe,
    evaluated,
    exported,
    loaded,
    measured,
    real_inputs,
    released,
    trained,
    write_model,
)
from compress.networks.setup import prepare as _prepare
from compress.processes import distributed
from compress.report.rows import VERSION, better, rows
from compress.report.rows import lines as figure_lines
from compress.run.folder import Run, fingerprint, seal_hash
from compress.schema.sections import NetworkRecipe, TrainSpec
from compress.schema.stages import STAGES
from compress.words.wording import small

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.data.images import Split
    from compress.data.inputs import Inputs
    from compress.recipes.pagcp.greedy import Decision, Pruner
    from compress.recipes.pagcp.groups import Groups
    from compress.recipes.pagcp.norms import Settle
    from compress.recipes.pagcp.options import Tolerance
    from compress.recipes.pagcp.oracle import Judge

__all__ = ["AMOUNT", "SHARED", "card", "forecast", "forecast_lines", "lines", "prepare", "stages"]

DECISION, GROUPS = "decision.json", "groups.json"
SAME = 1e-4  # of masked against sliced outputs in float32, relative to the largest
AMOUNT: str = "pagcp.flops"
SHARED: frozenset[str] = frozenset({"dense", "evaluation-dense", "export-dense"})


def prepare(model: str, recipe: NetworkRecipe) -> NetworkSetup:
    """Checks all that can be checked before data or weights are read."""
    if recipe.sparsity is not None or recipe.sweep:
        key = "sweep" if recipe.sweep else "sparsity"
        raise UsageError(
            f"{key} is about single weights; here whole channels go",
            where=key,
            fix="give the share of FLOPs to remove: --set pagcp.flops=0.5",
        )
    if recipe.options.trials is not None and (recipe.finetune is None or not recipe.finetune.epochs):
        raise UsageError(
            "trials are a fine-tuning in short, and there is none",
            where="pagcp.trials",
            fix="give finetune (finetune.epochs=10), or leave trials out",
        )
    return _prepare(model, recipe)


@dataclass(frozen=True)
class Round:
    """One sealed round: its plan, the network just cut, and the network behind the training."""

    plan: Path
    cut: Path
    trained: Path


def stages(run: Run, setup: NetworkSetup, until: str, command: str) -> dict[str, Any]:
    """The stages up to ``until``; returns the report."""
    recipe, last = setup.recipe, STAGES.index(until)
    report: dict[str, Any] = {"schema_version": VERSION}
    _check(setup)
    dense = dense_network(run, setup)
    rounds = _rounds(run, setup, dense)
    whole = _whole(run, dense, rounds)
    pruned = rounds[-1].trained
    describe(report, setup, dense, command)
    _describe(report, setup, dense, rounds, whole)
    report["stages"] = run.stages()
    if last >= STAGES.index("model"):
        saved = _assemble(run, setup, dense, pruned, report)
    if last >= STAGES.index("evaluation"):
        _evaluate(run, setup, dense, rounds, report)
    if last >= STAGES.index("export") and recipe.export is not None:
        makers: dict[str, tuple[Path, Callable[[], nn.Module]]] = {
            "dense": (dense, lambda: loaded(setup, dense)),
            "pruned": (pruned, lambda: loaded(setup, pruned)),
        }
        folders = exported(run, setup, makers, report)
        if last >= STAGES.index("bench"):
            measured(run, setup, folders, makers, report)
    if last >= STAGES.index("release"):
        return released(run, saved, report, card)
    return report


def _check(setup: NetworkSetup) -> None:
    """The heads fit the data, every task has a tolerance, the splits are apart, and a batch suits the norms: found out
    before anything is trained."""
    from compress.data.inputs import mapped
    from compress.exporters.onnx_module import refuse_untraceable
    from compress.networks.forward import check_branches, check_training_alone, depends_on_values
    from compress.networks.jobs import check_job
    from compress.recipes.pagcp.groups import find_groups
    from compress.recipes.pagcp.job import check_tolerances

    model, options = setup.build(), setup.recipe.options
    _limits(setup)
    place = next(model.parameters()).device
    model.eval()
    if setup.job is not None:
        check_tolerances(setup, check_job(setup))
    x = mapped(real_inputs(setup, 2), lambda t: t.to(place))
    if setup.job is None:
        _check_heads(setup, model, x)
    check_branches(model, x)
    if setup.recipe.export is not None and depends_on_values(model, x):
        refuse_untraceable(model.cpu(), mapped(x, lambda t: t.cpu()), setup.output_names)
        model.to(place)
    check_training_alone(model, x, own=setup.job is not None)
    found = find_groups(model, x, options.round_to, options.skip)
    if not found.groups:
        raise CompressError(
            "no channels can be removed: " + "; ".join(f"{v.layer}: {v.reason}" for v in found.left[:3]),
            where="channel groups",
            fix="prune it with another recipe (global-mp)",
        )


def _check_heads(setup: NetworkSetup, model: nn.Module, x: Tensor) -> None:
    """That the network takes our data and gives what its tasks need, and that every training's batches suit it."""
    from compress.data.tasks import by_task
    from compress.networks.forward import answer, check_steady, check_trainable
    from compress.recipes.pagcp.oracle import calibration

    data = setup.data
    by_task(answer(model, x), data.tasks)
    check_steady(model, x)
    if any(spec is not None and spec.epochs for spec in (setup.recipe.train, setup.recipe.finetune)):
        check_trainable(model, x)
    for name, spec in (("train", setup.recipe.train), ("finetune", setup.recipe.finetune)):
        if spec is not None and spec.epochs:
            _check_batch(model, x, name, spec.batch, len(data.train))
    calibration(data, setup.recipe.options.samples)


def _limits(setup: NetworkSetup) -> dict[str, Tolerance]:
    """Every task's tolerance."""
    from compress.recipes.pagcp.job import job_tolerances
    from compress.recipes.pagcp.oracle import tolerances

    options = setup.recipe.options
    if setup.job is not None:
        return job_tolerances(options, setup.job.tasks)
    return tolerances(options, [t.name for t in setup.data.tasks])


def _settle(setup: NetworkSetup) -> Settle:
    from compress.recipes.pagcp.job import JobSettle
    from compress.recipes.pagcp.norms import Settle

    samples = setup.recipe.options.settle
    if setup.job is not None:
        return JobSettle(setup.job, samples, setup.recipe.seed)
    return Settle(setup.data, samples)


def _check_batch(model: nn.Module, x: Tensor, name: str, batch: int, count: int) -> None:
    """Raises UsageError where a training's smallest batch is one sample and a norm has one value a channel of it."""
    import copy

    import torch

    smallest = min(batch, count % batch or batch)
    if smallest > 1:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(x[:1])
    except ValueError as e:
        raise UsageError(
            f"a step of {name} has one sample, which a batch norm cannot be trained on: {e}",
            where=f"{name}.batch",
            fix=f"take another batch than {batch} ({count:,} samples leave a last one of {count % batch or batch})",
        ) from e


# --- rounds -----------------------------------------------------------------------------------------------------------


def _rounds(run: Run, setup: NetworkSetup, dense: Path) -> list[Round]:
    recipe, options = setup.recipe, setup.recipe.options
    found: list[Round] = []
    start = dense
    for number in range(1, options.rounds + 1):
        # Of what is left every round takes the same share.
        target = 1 - (1 - options.flops) ** (number / options.rounds) if options.flops is not None else None
        name = f"round-{number}"
        spec = recipe.finetune
        if spec is not None and number < options.rounds:
            warm = min(spec.warmup_epochs, options.between / 2)
            spec = spec.model_copy(update={"epochs": options.between, "warmup_epochs": warm})
        plan = _planned(run, setup, number, dense, start, target, spec)
        asked = {"plan": seal_hash(plan), "start": seal_hash(start)}
        cut = trained(run, setup, f"{name}/cut", None, lambda p=plan, s=start: _cut(setup, p, s), inputs=asked)  # type: ignore[misc]
        _same_as_measured(setup, plan, cut)
        last = cut
        if spec is not None and spec.epochs:
            inputs = {"cut": seal_hash(cut)}
            last = trained(
                run,
                setup,
                f"{name}/finetuned",
                spec,
                lambda c=cut: loaded(setup, c),  # type: ignore[misc]
                inputs=inputs,
                seed=number,
            )
        found.append(Round(plan, cut, last))
        start = last
    return found


def _cut(setup: NetworkSetup, plan: Path, start: Path) -> nn.Module:
    """The network of a plan; its outputs are those of the one with zeros in place of what is gone."""
    import torch

    from compress.data.inputs import call, mapped
    from compress.data.outputs import tensors
    from compress.recipes.pagcp.plan import Plan

    model, held = loaded(setup, start), Plan.load(plan)
    sliced = held.apply(model)
    with torch.no_grad():
        place = next(model.parameters()).device
        x = mapped(real_inputs(setup, 8), lambda t: t.to(place))
        want, got = tensors(call(held.mask(model), x)), tensors(call(sliced, x))
    scale = max(float(t.abs().max()) for t in want)
    off = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))
    if not off <= SAME * scale:
        raise CompressError(
            f"the sliced network differs from the masked one by {off:.3g} (outputs up to {scale:.3g})",
            where=str(plan),
            fix="leave the groups at fault dense (pagcp.skip), and report it with the network's name",
        )
    return _settle(setup)(sliced)


def _same_as_measured(setup: NetworkSetup, plan: Path, cut: Path) -> None:
    """Raises CompressError where the network that was saved is not the one that the oracle measured."""
    from compress.networks.jobs import figures
    from compress.networks.train import evaluate
    from compress.recipes.pagcp.oracle import calibration

    options, said = setup.recipe.options, json.loads((plan / DECISION).read_text("utf-8"))["values"]
    model = loaded(setup, cut)
    if setup.job is not None:
        own = figures(setup.job, "calibrate", model, setup.recipe.seed)
        found = {task: {task: value} for task, value in own.items()}
    else:
        found = evaluate(model, setup.data, calibration(setup.data, options.samples), options.batch)
    for task, values in said.items():
        for name, value in values.items():
            if setup.job is not None and not math.isclose(found[task][name], value, rel_tol=1e-5, abs_tol=1e-6):
                raise CompressError(
                    f"calibrate gives {name} {found[task][name]:.6g} of the saved network, and gave {value:.6g} before"
                    " it was saved",
                    where=setup.job.where("calibrate"),
                    fix="let it see the same data in every process (seed what splits or draws them); where a file that"
                    " it reads has changed, start over with --fresh",
                )
            if not math.isclose(found[task][name], value, rel_tol=1e-5, abs_tol=1e-6):
                raise CompressError(
                    f"the saved network has {name} {found[task][name]:.6g} of {task}, the oracle measured {value:.6g}",
                    where=str(cut),
                    fix="this is a fault of compress; report it with the network's name",
                )


def _planned(
    run: Run,
    setup: NetworkSetup,
    number: int,
    dense: Path,
    start: Path,
    target: float | None,
    spec: TrainSpec | None,
) -> Path:
    """The sealed plan of a round: groups, what the oracle decided, and the channels that go."""
    from compress.recipes.pagcp.trials import Trials, choose

    name = f"round-{number}"
    options = setup.recipe.options
    asked = {
        **setup.inputs,
        "options": options.model_dump(mode="json", exclude={"cache_bytes"}),
        "target": target,
        "dense": seal_hash(dense),
        "start": seal_hash(start),
        **({"finetune": spec.model_dump(mode="json", exclude={"checkpoint_steps"})} if options.trials and spec else {}),
    }

    def build(folder: Path | None) -> None:
        found = _measured_groups(run, setup, name, dense, start, fingerprint(asked)[:16])
        pruner = found.pruner
        worth = (
            _latency_of(pruner, found.x, found.oracle, setup.output_names)
            if options.contribution == "latency"
            else None
        )
        decision = pruner.decide(target, worth, must=start == dense)
        trials: dict[str, Any] | None = None
        if options.trials is not None:
            assert target is not None  # `PAGCPOptions` asks for it
            assert spec is not None  # nor `prepare` without it
            assert found.split is not None  # a job has no trials: asked by `prepare`
            held = Trials(
                pruner,
                setup.data,
                found.split,
                options.batch,
                spec,
                setup.recipe.seed + number,
                found.oracle.base or {},
                run.journal(f"{name}/plan", "trials.jsonl"),
                found.oracle.of,
                run.scratch(f"{name}/plan"),
                setup.trainer[1] if setup.trainer is not None else None,
            )
            decision, trials = choose(held, decision, target, worth)
        if folder is not None:
            _write_round(folder, found, decision, trials)

    stage = run.stage_together(f"{name}/plan", asked, build)
    run.drop_scratch(f"{name}/plan")
    return stage


@dataclass(frozen=True)
class _Measured:
    """What a round decides on: the network's groups in a pruner, the inputs it was traced with, and the oracle."""

    pruner: Pruner
    found: Groups
    x: Inputs
    split: Split | None  # none of a job
    limits: Mapping[str, Tolerance]
    oracle: Judge


def _measured_groups(run: Run, setup: NetworkSetup, name: str, dense: Path, start: Path, mark: str) -> _Measured:
    """The groups of the network in ``start``, ranked, and an oracle that has measured the one in ``dense``; its journal
    belongs to the inputs that ``mark`` stands for."""
    from compress.data.inputs import mapped
    from compress.recipes.pagcp.greedy import Pruner
    from compress.recipes.pagcp.groups import find_groups
    from compress.recipes.pagcp.job import JobOracle, job_rankings
    from compress.recipes.pagcp.oracle import Oracle, calibration
    from compress.recipes.pagcp.saliency import rankings

    options, seed = setup.recipe.options, setup.recipe.seed
    model = loaded(setup, start)
    place = next(model.parameters()).device
    x = mapped(real_inputs(setup, 2), lambda t: t.to(place))
    found = find_groups(model, x, options.round_to, options.skip)
    limits, journal = _limits(setup), run.journal(f"{name}/plan", "oracle.jsonl")
    split: Split | None = None
    oracle: Judge
    if setup.job is not None:
        order = job_rankings(setup.job, model, found.groups, options.saliency, seed)
        oracle = JobOracle(setup.job, limits, journal, mark, seed)
    else:
        split = calibration(setup.data, options.samples)
        order = rankings(model, found.groups, setup.data, split, options.saliency)
        oracle = Oracle(setup.data, split, limits, options.batch, journal, mark)
    whole = loaded(setup, dense)
    oracle.base = oracle.measure("dense", whole, 1.0).values
    label = f"{name}: the oracle's pass"
    pruner = Pruner(model, found.groups, order, oracle, options, x, _flops(whole, x), label, _settle(setup))
    return _Measured(pruner, found, x, split, limits, oracle)


def _write_round(folder: Path, made: _Measured, decision: Decision, trials: Mapping[str, Any] | None) -> None:
    """What was decided and at what cost, the groups, and the plan."""
    from compress.recipes.pagcp.greedy import REFERENCE_RATIOS
    from compress.recipes.pagcp.plan import Plan

    pruner, found, oracle = made.pruner, made.found, made.oracle
    facts = {
        **asdict(decision),
        "groups": len(found.groups),
        "base": oracle.base,
        "tolerances": {t: v.model_dump(mode="json", exclude_none=True) for t, v in made.limits.items()},
        **({"samples": len(made.split)} if made.split is not None else {}),
        "removed": pruner.removal(decision.state),
        "passes": oracle.passes + (trials["passes"] if trials else 0),
        "measurements": oracle.measurements + (trials["measurements"] if trials else 0),
        "reference_passes": REFERENCE_RATIOS * len(found.groups),
        **({"trials": trials} if trials else {}),
    }
    facts.pop("trail")
    (folder / DECISION).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (folder / GROUPS).write_text(
        json.dumps({"groups": [g.as_dict() for g in found.groups], "left": [asdict(v) for v in found.left]}) + "\n",
        encoding="utf-8",
    )
    meta = {"kept": decision.state, "removed": facts["removed"]}
    Plan.of(pruner.model, pruner.removed(decision.state), meta).save(folder)


def _flops(model: nn.Module, x: Inputs) -> int:
    from compress.data.inputs import first
    from compress.networks.flops import count_flops

    return sum(layer.dense for layer in count_flops(model, first(x, 1)))


def _latency_of(pruner: Pruner, x: Inputs, oracle: Judge, names: list[str]) -> Callable[[str, dict[str, int]], float]:
    """Seconds that a state saves in ONNX Runtime on this machine, measured once and noted."""
    import tempfile

    from compress.data.inputs import first, inputs_by_name, mapped
    from compress.exporters.names import FILE
    from compress.exporters.onnx_module import export_module
    from compress.exporters.ort import session

    def seconds(name: str, state: dict[str, int]) -> float:
        import time
        from statistics import median

        with tempfile.TemporaryDirectory() as place:
            runs = []
            for label, network in (("whole", pruner.cut(pruner.full)), ("cut", pruner.cut(state))):
                folder = Path(place) / label
                folder.mkdir()
                export_module(network.cpu(), mapped(x, lambda t: t.cpu()), names, folder)
                runs.append(session(folder / FILE, 1))
            feed = {name: t.cpu().numpy() for name, t in inputs_by_name(first(x, 1)).items()}
            times: list[list[float]] = [[], []]
            for i in range(60):
                for which in (0, 1) if i % 2 else (1, 0):
                    began = time.perf_counter()
                    runs[which].run(names, feed)
                    times[which].append(time.perf_counter() - began)
        # The first few warm up.
        return median(times[0][10:]) - median(times[1][10:])

    def worth(name: str, state: dict[str, int]) -> float:
        return float(oracle.noted(f"latency {name}", lambda: distributed.main_says(lambda: seconds(name, state))))

    return worth


def _whole(run: Run, dense: Path, rounds: list[Round]) -> Path:
    """All rounds' plans as one, for the dense network."""
    from compress.recipes.pagcp.plan import Plan

    def build(folder: Path) -> None:
        plan = Plan.load(rounds[0].plan)
        for later in rounds[1:]:
            plan = plan.then(Plan.load(later.plan))
        plan.save(folder)

    inputs = {"version": __version__, "dense": seal_hash(dense), "rounds": [seal_hash(r.plan) for r in rounds]}
    return run.stage("plan", inputs, build)


# --- the report -------------------------------------------------------------------------------------------------------


def _describe(report: dict[str, Any], setup: NetworkSetup, dense: Path, rounds: list[Round], whole: Path) -> None:
    """Sizes, FLOPs and channels, counted in the networks as they are saved; and what the oracle said in every round."""
    from compress.networks.flops import count_flops, flops_elsewhere
    from compress.recipes.pagcp.plan import Plan

    sample = setup.sample(1)
    before, after = loaded(setup, dense).cpu(), loaded(setup, rounds[-1].trained).cpu()
    was, now = ({f.name: f for f in count_flops(m, sample)} for m in (before, after))
    flops = {"dense": sum(f.dense for f in was.values()), "pruned": sum(f.dense for f in now.values())}
    elsewhere = [sum(flops_elsewhere(m, sample).values()) for m in (before, after)]
    plan = Plan.load(whole)
    report["size"] = {
        "asked": setup.recipe.options.flops,
        "flops": flops,
        **({"flops_elsewhere": dict(zip(("dense", "pruned"), elsewhere, strict=True))} if any(elsewhere) else {}),
        "flops_removed": 1 - flops["pruned"] / flops["dense"],
        "parameters": {
            "dense": sum(p.numel() for p in before.parameters()),
            "pruned": sum(p.numel() for p in after.parameters()),
        },
        "bytes": {
            "dense": (dense / WEIGHTS).stat().st_size,
            "saved": (rounds[-1].trained / WEIGHTS).stat().st_size,
        },
    }
    report["layers"] = [
        {
            "name": name,
            "channels": plan.dense[name, "out"],
            "kept": plan.dense[name, "out"] - len(plan.removed.get((name, "out"), ())),
            "flops": {"dense": was[name].dense, "pruned": now[name].dense},
        }
        for name in was
    ]
    report["rounds"] = []
    for one in rounds:
        facts = json.loads((one.plan / DECISION).read_text("utf-8"))
        report["rounds"].append({k: v for k, v in facts.items() if k != "probes"} | {"probes": facts["probes"]})
    held = json.loads((rounds[0].plan / GROUPS).read_text("utf-8"))
    report["groups"] = [
        {
            "name": g["name"],
            "units": g["units"],
            "channels": g["channels"],
            "step": g["step"],
            "layers": sorted({m["layer"] for m in g["members"] if m["axis"] == "out"}),
        }
        for g in held["groups"]
    ]
    report["left"] = held["left"] + [
        {"layer": name, "reason": reason} for name, reason in report["rounds"][0]["unpruned"].items()
    ]


def _assemble(run: Run, setup: NetworkSetup, dense: Path, pruned: Path, report: dict[str, Any]) -> Path:
    """The model folder, sealed only when a clean process has given the same outputs."""

    def build(folder: Path) -> None:
        write_model(setup, loaded(setup, pruned), folder)

    inputs = {"version": __version__, "pruned": seal_hash(pruned), "data": setup.data_sha256}
    folder = run.stage("model", inputs, build)
    verified = json.loads((folder / "verified.json").read_text("utf-8"))
    report["verify"] = {"layouts": [{"layout": "network", **verified}]}
    report["stages"] = run.stages()
    return folder


def _evaluate(run: Run, setup: NetworkSetup, dense: Path, rounds: list[Round], report: dict[str, Any]) -> None:
    """Every task on the test split: dense, behind every round, and just cut before its training."""

    def on(name: str, folder: Path) -> dict[str, dict[str, float]]:
        return evaluated(run, setup, name, folder, lambda: loaded(setup, folder))

    before = on("evaluation-dense", dense)
    curve = []
    for number, one in enumerate(rounds, 1):
        cut = on(f"round-{number}/evaluation-cut", one.cut)
        after = on(f"round-{number}/evaluation", one.trained) if one.trained != one.cut else cut
        curve.append({"removed": report["rounds"][number - 1]["removed"], "cut": cut, "trained": after})
    last = curve[-1]
    rows = []
    for task in setup.tasks:
        for metric, value in before[task.name].items():
            if metric == "samples":
                continue
            rows.append(
                {
                    "task": task.name,
                    "kind": task.kind,
                    "metric": metric,
                    "main": metric == task.metric,
                    "higher_is_better": better(metric, task.higher_is_better) == "higher",
                    **({"samples": int(before[task.name]["samples"])} if setup.job is None else {}),
                    "dense": value,
                    "pruned": last["trained"][task.name][metric],
                    "before_training": last["cut"][task.name][metric] if rounds[-1].trained != rounds[-1].cut else None,
                }
            )
    report["quality"] = {"tasks": rows, "curve": curve}
    report["training"] = {
        "dense": json.loads((dense / "training.json").read_text("utf-8")),
        "pruned": json.loads((rounds[-1].trained / "training.json").read_text("utf-8")),
    }
    report["stages"] = run.stages()


def card(report: dict[str, Any], folder: Path) -> Path:
    """Draws the plots and writes the card."""
    from compress.recipes.pagcp.card import write_channels_card

    return write_channels_card(report, folder)


def lines(report: dict[str, Any]) -> list[str]:
    """What the command line says of a finished run."""
    from compress.recipes.pagcp.card import removed
    from compress.report.build import export_lines, run_line

    size = report["size"]
    found = []
    for name, unit in (("flops", " a sample"), ("parameters", "")):
        a, b = size[name]["dense"], size[name]["pruned"]
        found.append(f"{name:8} {a:,} -> {b:,}{unit} ({100 * (1 - b / a):.1f} % fewer)")
        if name == "flops" and "flops_elsewhere" in size:
            found[-1] += f"; of all, with recurrent layers and attention, {100 * removed(report):.1f} % fewer"
    for number, one in enumerate(report["rounds"], 1):
        found.append(
            f"round {number}  {100 * one['removed']:.1f} % of the FLOPs gone; {one['measurements']} measurements,"
            f" {one['passes']:.1f} passes over the calibration split (trying {one['reference_passes'] // one['groups']}"
            f" ratios of every group: {one['reference_passes']})"
        )
        if "trials" in one:
            found.append(f"round {number}  {_trials_line(one['trials'])}")
    dense = [f"{v['layer']} ({v['reason']})" for v in report["left"]]
    if dense:
        found.append(f"dense    {len(dense)} layers stay as they were: {'; '.join(dense[:3])}")
    for layout in report.get("verify", {}).get("layouts", ()):
        found.append(
            f"reloaded in a clean process: outputs differ by {small(layout['max_logit_difference'])}"
            f" (allowed {small(layout['tolerance'])})"
        )
    return [*found, *export_lines(report), *figure_lines(rows(report), "just cut"), run_line(report)]


def _trials_line(trials: dict[str, Any]) -> str:
    rows = trials["contenders"]
    if not rows:
        return f"no trials: {trials['winner']!r} is the only plan of that size"
    worst = rows[0]["worst"]
    lost = f"at {100 * worst:.1f} % of its tolerance" if trials["by_tolerances"] else f"{-worst:+.1f} points"
    return (
        f"trials of {len(rows)} plans, {trials['epochs']} epochs in all: {trials['winner']!r} won, its worst task"
        f" {lost} behind {rows[0]['epochs']} epochs"
    )


# --- beforehand -------------------------------------------------------------------------------------------------------


def forecast(model: str, recipe: NetworkRecipe, on: str = "this-machine") -> dict[str, Any]:
    """What `prune` would do, without weights: groups, FLOPs, the most that can go, and the oracle's work."""
    from compress.recipes.pagcp.costs import Costs
    from compress.recipes.pagcp.greedy import REFERENCE_RATIOS, SCALES
    from compress.recipes.pagcp.groups import find_groups
    from compress.recipes.pagcp.trials import heats

    setup = prepare(model, recipe)
    check_data(setup)
    recipe, options = setup.recipe, setup.recipe.options
    network, x = _looked_at(setup)
    found = find_groups(network, x, options.round_to, options.skip)
    costs = Costs(network, x)
    dense = sum(costs.flops({}).values())
    rows, gone = [], dict[tuple[str, str], list[int]]()
    searches = 0
    for group in found.groups:
        levels = group.levels(options.keep)
        alone = group.removed(range(group.units - levels[-1]))
        for at, channels in alone.items():
            gone.setdefault(at, []).extend(channels)
        searches += math.ceil(math.log2(len(levels))) if len(levels) > 1 else 0
        rows.append(
            {
                "name": group.name,
                "channels": group.units * group.channels,
                "least": levels[-1] * group.channels,
                "step": group.step * group.channels,
                "flops": dense - sum(costs.flops(alone).values()),
            }
        )
    most = 1 - sum(costs.flops(gone).values()) / dense
    if options.flops is not None and options.flops > most:
        raise CompressError(
            f"{100 * options.flops:g} % of the FLOPs cannot go: with every group as narrow as it may be it is"
            f" {100 * most:.1f} %",
            where="pagcp.flops",
            fix=f"ask for {math.floor(1000 * most) / 1000:g} at most, or lower pagcp.keep or pagcp.round_to",
        )
    passes = 1 if options.flops is None else SCALES
    trials = None
    if options.trials is not None:
        greedy = 1 + (options.trials.spare > 1)  # at most: data, and its tasks, are not read here
        passes *= greedy
        count = greedy * (1 + len(options.trials.blends)) + 1
        trials = {
            "contenders": count,
            "epochs": options.rounds * sum(n * each for n, each in heats(count, options.trials.epochs)),
        }
    measurements = [len(rows) + searches, len(rows) + passes * searches]
    return {
        "method": recipe.method,
        "task": recipe.task,
        "model": setup.resolved.name,
        "source": setup.resolved.source,
        "data": setup.title,
        "parameters": sum(p.numel() for p in network.parameters()),
        "flops": dense,
        "asked": options.flops,
        "most": most,
        "groups": rows,
        "left": [asdict(v) for v in found.left],
        "rounds": options.rounds,
        "measurements": measurements,
        **({"job": _job_forecast(setup, measurements)} if setup.job is not None else {}),
        "reference_passes": REFERENCE_RATIOS * len(rows),
        "epochs": {
            "dense": recipe.train.epochs,
            "between": options.between * (options.rounds - 1),
            "finetune": recipe.finetune.epochs if recipe.finetune is not None else 0,
        },
        "trials": trials,
    }


def _job_forecast(setup: NetworkSetup, measurements: list[int]) -> dict[str, Any]:
    """Seconds of a call of the job's functions, and how many calls there will be, at least and at most."""
    from compress.networks.jobs import timed

    options, finetune = setup.recipe.options, setup.recipe.finetune
    epochs = options.between * (options.rounds - 1) + (finetune.epochs if finetune is not None else 0)
    # Beside the oracle's: twice before anything is made, and of every round's dense network and what it has saved.
    calls = [2 + options.rounds * (n + 3) for n in measurements]
    trained = options.rounds if options.between else 1
    figures = 1 + options.rounds + (trained if epochs else 0)
    return {
        "seconds": timed(setup),
        "calls": {"calibrate": calls, "evaluate": [figures, figures], "train": [epochs, epochs]},
        "untrained": setup.job is not None and setup.job.job.train is None,
    }


def _looked_at(setup: NetworkSetup) -> tuple[nn.Module, Inputs]:
    """The network, which can be pruned as far as its calls tell, and two samples of the shape that it is to see; data
    is read only where no size is given."""
    import torch

    from compress.models.zoo import build
    from compress.networks.forward import check_branches, check_training_alone
    from compress.networks.jobs import check_job
    from compress.recipes.pagcp.job import check_tolerances

    if setup.job is not None:
        check_tolerances(setup, check_job(setup))
        network, x = setup.build().cpu(), setup.sample(2)
    else:
        given, size = setup.given, setup.spec.size
        if size is not None:
            x = torch.zeros(2, int(given.get("channels", 3)), size, size)
        else:
            x, given = setup.sample(2), setup.arguments
        network = build(setup.network, given, setup.recipe.seed)
    network.eval()
    check_branches(network, x)
    check_training_alone(network, x, own=setup.job is not None)
    return network, x


def _trained_line(facts: Mapping[str, Any]) -> str:
    epochs = facts["epochs"]
    return (
        f"train    {epochs['dense']} epochs dense, {epochs['between']} between {facts['rounds']} rounds,"
        f" {epochs['finetune']} at the end"
    )


def forecast_lines(facts: dict[str, Any]) -> list[str]:
    from compress.networks.jobs import timed_lines

    low, high = facts["measurements"]
    wide = max(len(g["name"]) for g in facts["groups"])
    asked = f"{100 * facts['asked']:g} % asked" if facts["asked"] else "as much as the tolerances allow"
    return [
        f"model    {facts['model']}: {facts['parameters']:,} parameters, {facts['flops']:,} FLOPs a sample;"
        f" {facts['source']}",
        f"budget   {asked}; {100 * facts['most']:.1f} % of the FLOPs at most, with every group as narrow as it may be",
        f"groups   {len(facts['groups'])}",
        *(
            f"         {g['name']:{wide}}  {g['channels']:>5} channels, {g['least']} at least, by {g['step']};"
            f" {100 * g['flops'] / facts['flops']:.1f} % of the FLOPs can go with it"
            for g in facts["groups"]
        ),
        *(f"dense    {v['layer']}: {v['reason']}" for v in facts["left"]),
        f"oracle   {low} measurements a round"
        + (f", up to {high} with the search for the scale" if high > low else "")
        + f"; trying 19 ratios of every group takes {facts['reference_passes']} passes",
        f"data     {facts['data']}",
        *(timed_lines(facts["job"]) if "job" in facts else []),
        *([] if facts.get("job", {}).get("untrained") else [_trained_line(facts)]),
        *(
            f"trials   {trials['contenders']} plans a round at most, {trials['epochs']} epochs in all"
            for trials in [facts["trials"]]
            if trials
        ),
        "loads    torch, by compress.networks.reload; ONNX Runtime: a smaller dense network, faster in any runtime",
    ]
