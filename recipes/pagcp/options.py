"""What a recipe may say of PAGCP."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Tolerance(BaseModel):
    """How much worse a task may become in all, on the calibration split."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: Literal["loss", "metric"] = Field("loss", description="the task's loss, or its own metric (accuracy ...)")
    relative: float | None = Field(None, gt=0, description="of the dense network's value: 0.1 is a tenth")
    absolute: float | None = Field(None, gt=0, description="in the measure's own unit: 0.02 of an accuracy is 2 points")

    @model_validator(mode="after")
    def _one(self) -> Tolerance:
        if (self.relative is None) == (self.absolute is None):
            raise ValueError("give either relative or absolute")
        if self.measure == "metric" and self.relative is not None and self.relative >= 1:
            raise ValueError("relative to a metric must be below 1")
        return self

    @property
    def title(self) -> str:
        how = f"{self.absolute:g}" if self.absolute is not None else f"{100 * float(self.relative or 0):g} %"
        return f"{how} of its {self.measure}"


class TrialOptions(BaseModel):
    """Plans of one size are each trained a little, and the one that lost least on the calibration split is taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
            raise ValueError("epochs must rise")
        return self


class PAGCPOptions(BaseModel):
    """The `pagcp:` section of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flops: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of all FLOPs to remove: the tolerances are then scaled alike until it is reached."
        " By default they are taken as they stand",
    )
    rounds: int = Field(1, ge=1, description="prune and fine-tune so often")
    between: int = Field(0, ge=0, description="epochs of fine-tuning after every round but the last")
    total: float = Field(6.0, gt=1, description="T: a task with no tolerance of its own may have T times its loss")
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
            raise ValueError("between is for several rounds")
        if self.trials is not None and self.flops is None:
            raise ValueError("trials choose among plans of one size: give flops")
        return self
