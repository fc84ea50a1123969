"""What a recipe may say of PAGCP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.schema.section import Clash, Section


class Tolerance(Section):
    """How much worse a task may become in all, on the calibration split."""

    measure: Literal["loss", "metric"] = Field("loss", description="the task's loss, or its own metric (accuracy ...)")
    relative: float | None = Field(None, gt=0, description="of the dense network's value: 0.1 is a tenth")
    absolute: float | None = Field(None, gt=0, description="in the measure's own unit: 0.02 of an accuracy is 2 points")

    @model_validator(mode="after")
    def _one(self) -> Tolerance:
        if (self.relative is None) == (self.absolute is None):
            raise Clash(
                "relative and absolute are two ways to say one thing",
                "give one: relative: 0.1 or absolute: 0.02",
            )
        if self.measure == "metric" and self.relative is not None and self.relative >= 1:
            raise Clash(
                "relative to a metric, 1 and more is no tolerance",
                "give relative below 1, absolute, or measure: loss",
            )
        return self

    @property
    def title(self) -> str:
        how = f"{self.absolute:g}" if self.absolute is not None else f"{100 * float(self.relative or 0):g} %"
        return f"{how} of its {self.measure}"


class TrialOptions(Section):
    """Plans of one size are each trained a little, and the one that lost least on the calibration split is taken."""

    epochs: list[Annotated[int, Field(ge=1)]] = Field(
        [3],
        min_length=1,
        description="all contenders are trained for the first, the better half of them for the next, and so on, each"
        " from its cut on, by the fine-tuning's schedule in short",
    )
    spare: float = Field(
        2.5,
        ge=1,
        description="a second greedy plan counts readings of tasks on pixels so many times, where there are others"
        " beside them; 1: no second plan",
    )
    blends: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.5], description="shares of the way from a greedy plan's widths to uniform ones"
    )

    @model_validator(mode="after")
    def _rising(self) -> TrialOptions:
        if self.epochs != sorted(set(self.epochs)):
            raise Clash(f"epochs must rise from trial to trial, not {self.epochs}", "for example epochs: [1, 2, 4]")
        return self


class PAGCPOptions(Section):
    """The `pagcp:` section of a recipe."""

    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of all FLOPs to remove: the tolerances are then scaled alike until it is reached."
        " By default they are taken as they stand",
    )
    rounds: int = Field(1, ge=1, description="prune and fine-tune so often")
    between: int = Field(0, ge=0, description="epochs of fine-tuning after every round but the last")
    total: float = Field(
        6.0,
        gt=1,
        description="T: a task with no tolerance of its own may have T times its loss; of a job be T times worse",
    )
    r0: float | None = Field(
        None,
        gt=0,
        description="what the first group may take; those behind it take lambda times less. By default 1.68 times what"
        " equal parts would be, as the reference's .06 is with its 51 groups",
    )
    tolerance: Tolerance | None = Field(None, description="of every task that `tolerances` does not name")
    tolerances: dict[str, Tolerance] = Field({}, description="task -> its own tolerance")
    saliency: Literal["l1", "l2", "taylor"] = Field(
        "taylor", description="which channels of a group go first; l1 is the paper's"
    )
    contribution: Literal["flops", "parameters", "latency"] = Field(
        "flops", description="the group that saves most of it comes first; latency is measured in ONNX Runtime here"
    )
    share: float = Field(1.0, gt=0, le=1, description="P: share of the groups that may be pruned, the cheapest first")
    probe: float = Field(0.3, gt=0, lt=1, description="share of a group that is cut to tell what it is worth")
    round_to: int = Field(8, ge=1, description="a group keeps a multiple of so many channels")
    keep: float = Field(0.1, ge=0, lt=1, description="share of its channels that every group keeps at least")
    skip: list[str] = Field([], description="patterns of layer names whose groups stay dense")
    samples: int | None = Field(None, ge=1, description="calibration samples that are looked at; all by default")
    batch: Annotated[int, Field(ge=1)] = Field(128, description="calibration samples of one forward pass")
    settle: int = Field(
        128, ge=0, description="training samples on which batch norms take their statistics again after a cut; 0: none"
    )
    trials: TrialOptions | None = Field(
        None, description="contenders for `flops`, judged behind a short training; by default the greedy plan is taken"
    )
    cache_bytes: int = Field(1 << 30, ge=0, description="memory for activations in front of the group being tried")

    @model_validator(mode="after")
    def _fits(self) -> PAGCPOptions:
        if self.rounds == 1 and self.between:
            raise Clash(
                f"rounds is 1 and between is {self.between}: there is nothing between the rounds of one",
                "set pagcp.between=0, or pagcp.rounds to 2 or more",
            )
        if self.trials is not None and self.flops is None:
            raise Clash(
                "trials is given and flops is not: trials choose among plans of one size",
                "give pagcp.flops, or leave pagcp.trials out (null)",
            )
        return self
