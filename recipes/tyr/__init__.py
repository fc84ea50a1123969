"""Týr: layer-wise optimal-brain-surgeon candidates, then a search for how much each sublayer gives up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from compress.schema.section import Clash, Count, Section


class SearchOptions(Section):
    """How the per-sublayer sparsities are found once the candidates stand."""

    windows: int = Field(8, ge=1, description="windows the search measures KL on; none of them is calibrated on")
    length: int | None = Field(None, ge=16, description="tokens of each window that are used; all by default")
    positions: int = Field(128, ge=1, description="positions per window whose logits are compared")
    teacher_top_k: int = Field(512, ge=1, description="dense logits kept per position; the rest is one bucket")
    singles_windows: int = Field(4, ge=1, description="windows for the KL of each single candidate")
    generations: int = Field(8, ge=0)
    offspring: int = Field(16, ge=1)
    steps: list[float] = Field(
        [0.25, 1.0], min_length=1, description="share of the search windows at each selection step"
    )
    survivors: list[Count] = Field([4], description="offspring that pass from each step to the next")
    patience: int = Field(3, ge=1, description="stop after this many generations without a better parent")
    seconds: float | None = Field(None, gt=0, description="time limit of one iteration's evolution")

    @model_validator(mode="after")
    def _steps_fit(self) -> SearchOptions:
        if len(self.survivors) != len(self.steps) - 1:
            raise Clash(
                f"survivors must hold one number fewer than steps ({len(self.steps) - 1}),"
                f" it holds {len(self.survivors)}",
                f"give {len(self.steps) - 1} survivors, or {len(self.survivors) + 1} steps",
            )
        if sorted(self.steps) != self.steps or self.steps[0] <= 0 or self.steps[-1] != 1.0:
            raise Clash("steps must rise, start above 0 and end at 1.0", "for example steps: [0.25, 0.5, 1.0]")
        return self


class RunOff(Section):
    """The last word between solutions: each goes through a whole last pass and is judged on text it has not seen.

    The search measures candidates as they come from the supernet, each refitted in a dense model, on few tokens. Which
    of its best solutions is best once it is refitted to its own stream is another question."""

    solutions: int = Field(
        3,
        ge=2,
        description="the first search's, the knapsack's, the best starting points: so many; further searches' on top",
    )
    windows: int = Field(16, ge=1, description="windows they are judged on; none is calibrated or searched on")
    calibration: int | None = Field(
        None, ge=1, description="calibration windows of their passes; all by default, and the winner's pass is the last"
    )


class TyrOptions(Section):
    """The `tyr:` section of a recipe."""

    score: Literal["obs", "tyr"] = "obs"
    target: Literal["own", "output", "residual"] = "residual"
    damping: float = Field(0.01, gt=0, le=10)
    accumulation: Literal["expectation", "uniform", "none"] = "expectation"
    levels: int = Field(9, ge=2, le=65, description="candidates of an FFN (E)")
    refine_levels: int = Field(5, ge=2, le=65, description="candidates of an FFN from the second iteration on")
    head_levels: int = Field(9, ge=2, le=65, description="candidates of an attention sublayer, at most")
    interval: float = Field(0.125, gt=0, le=0.5, description="distance of two levels in the first iteration")
    supernet_windows: int | None = Field(
        None,
        ge=1,
        description="calibration windows the supernets are made from; all by default. The last pass uses all",
    )
    iterations: int = Field(2, ge=1, le=8, description="searches, each between levels at half the distance")
    round_to: int = Field(16, ge=1, description="FFN neurons are removed in multiples of this")
    query_heads: bool = Field(True, description="also trim query heads, equally in every kept KV group")
    attention: bool = Field(True, description="false leaves attention dense")
    shape: Literal["ragged", "stock"] = Field(
        "ragged",
        description="stock: every block alike and some whole blocks gone: every runtime's own classes load it",
    )
    metric: Literal["fisher", "none"] = Field(
        "fisher", description="output metric the choice of units is made in; fisher needs one backward pass"
    )
    metric_windows: int = Field(8, ge=1, description="calibration windows the metric is measured on")
    token_weight: Literal["norm", "none"] = Field(
        "norm", description="norm: a token's error counts relative to the size of its residual stream"
    )
    rescale: bool = Field(True, description="scale the logits, by the last norm, to be as sure as the dense model's")
    search: SearchOptions = SearchOptions()
    run_off: RunOff | None = Field(None, description="null takes the search's solution as it is")
