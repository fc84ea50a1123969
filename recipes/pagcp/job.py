"""PAGCP on a job: the oracle asks the user's own ``calibrate``, and readings are of the figures that it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from compress.data.job import Figure, NamedJob
from compress.errors import CompressError, UsageError
from compress.networks.jobs import batches, figures, losses
from compress.recipes.pagcp.groups import Group
from compress.recipes.pagcp.norms import NORMS, Feed, Settle
from compress.recipes.pagcp.options import PAGCPOptions, Tolerance
from compress.recipes.pagcp.oracle import Found, Judge, Readings, tolerances
from compress.recipes.pagcp.replay import Replay
from compress.recipes.pagcp.saliency import first_order, ranked, weight_scores
from compress.run.folder import Journal, Notes

if TYPE_CHECKING:
    from compress.networks.setup import NetworkSetup


def job_tolerances(options: PAGCPOptions, tasks: Sequence[Figure]) -> dict[str, Tolerance]:
    """Every task's tolerance, of the figure that the job gives for it. By default it may become T times worse: T times
    as much where less is better, 1/T of it where more is.

    Raises:
        UsageError: see `tolerances`; or all of a figure is allowed to go.
    """
    found = {}
    for task, limit in zip(tasks, tolerances(options, [t.name for t in tasks]).values(), strict=True):
        relative = limit.relative
        if options.tolerance is None and not options.tolerances:
            relative = 1 - 1 / options.total if task.higher_is_better else options.total - 1
        elif task.higher_is_better and relative is not None and relative >= 1:
            raise UsageError(
                f"a tolerance of {100 * relative:g} % of {task.name!r} is all of it: more of it is better",
                where=f"pagcp.tolerances.{task.name}",
                fix="give relative below 1, or absolute in its own unit",
            )
        # A loss may grow beyond twice its value, and a figure of which less is better may too.
        found[task.name] = limit.model_copy(update={"measure": "metric", "relative": relative})
    return found


def check_tolerances(setup: NetworkSetup, found: Mapping[str, float]) -> None:
    """Raises UsageError where a tolerance is a share of what ``calibrate`` says of the dense network, and that is none.

    Args:
        found: what it says, by task.
    """
    assert setup.job is not None  # asked by the caller
    for name, limit in job_tolerances(setup.recipe.options, setup.job.tasks).items():
        if limit.absolute is None and found[name] <= 0:
            raise UsageError(
                f"calibrate gives {found[name]:.6g} for {name!r} of the dense network, and its tolerance is a share of"
                " that",
                where=f"pagcp.tolerances.{name}",
                fix="give it an absolute one, and the others theirs:"
                f" --set 'pagcp.tolerances={{{name}: {{absolute: 0.1}}}}'",
            )


class JobOracle(Judge):
    """Measures networks by a job's ``calibrate``, whole every time."""

    def __init__(
        self, held: NamedJob, limits: Mapping[str, Tolerance], journal: Journal | Notes, of: str, seed: int
    ) -> None:
        super().__init__(held.tasks, limits, journal, of)
        self.held, self.seed = held, seed

    def measure(
        self,
        key: str,
        model: Any,
        share: float,
        *,
        bound: Readings | None = None,
        replay: Replay | None = None,
        replayed_share: float = 0.0,
        extra: float = 0.0,
    ) -> Found:
        row = self.known.get(key)
        if row is None:
            network = model if isinstance(model, nn.Module) else model()
            row = self._note(key, self.values(network), share + extra)
        return self._found(row)

    def values(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """What ``calibrate`` says of a network, as `Oracle` has figures: by task and name."""
        found = figures(self.held, "calibrate", model, self.seed)
        return {task: {task: value} for task, value in found.items()}

    def settling(self, samples: int) -> float:
        return 0.0  # how many samples calibrate takes is not known

    def rise(self, before: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, float]:
        found = {}
        for task in self.tasks:
            was, now = before[task.name][task.metric], values[task.name][task.metric]
            worse = was - now if task.higher_is_better else now - was
            found[task.name] = worse / abs(was) if was else worse
        return found


class JobSettle(Settle):
    """`Settle` by the job's loss on its batches; where it has none, norms stay as they were cut."""

    def __init__(self, held: NamedJob, samples: int, seed: int) -> None:
        self.held, self.samples = held, 0
        listed = batches(held, seed) if samples and held.job.loss is not None else []
        self.feeds: Sequence[Feed] = [partial(_fed, held, batch, seed) for batch in listed]

    def __call__(self, model: nn.Module) -> nn.Module:
        settled = super().__call__(model)
        norms = {n: m for n, m in settled.named_modules() if isinstance(m, NORMS) and m.track_running_stats}
        idle = next((n for n, m in norms.items() if self.feeds and not int(m.num_batches_tracked or 0)), None)
        if idle is not None:
            raise CompressError(
                f"loss runs the batch norm {idle} in evaluation mode, or not at all: it can take no statistics",
                where=self.held.where("loss"),
                fix="leave out model.eval() there, or set pagcp.settle=0",
            )
        return settled


def _fed(held: NamedJob, batch: Any, seed: int, model: nn.Module) -> None:
    losses(held, model, batch, seed)


def job_rankings(
    held: NamedJob, model: nn.Module, groups: Sequence[Group], saliency: str, seed: int
) -> dict[str, tuple[int, ...]]:
    """`compress.recipes.pagcp.saliency.rankings` by the job's loss on its batches."""
    if saliency != "taylor":
        return ranked(groups, [weight_scores(model, group, 1 if saliency == "l1" else 2) for group in groups])
    own = copy.deepcopy(model)  # the loss may train its norms
    parts: list[Callable[[], list[Tensor]]] = [partial(losses, held, own, batch, seed) for batch in batches(held, seed)]
    return ranked(groups, first_order(own, groups, parts))
