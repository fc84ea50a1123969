"""What a recipe may say of Global MP on a plain network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from compress.schema.section import Clash, Section


class NetworkOptions(Section):
    """The `global-mp:` section of a recipe for networks (``task: network``)."""

    schedule: Literal["one-shot", "gradual"] = Field(
        "one-shot", description="prune the trained network and fine-tune it, or prune a new one while it is trained"
    )
    shape: Literal["cubic", "linear"] = Field("cubic", description="gradual: how the sparsity grows")
    until: float = Field(0.6, gt=0, le=1, description="gradual: share of the epochs by which the sparsity is reached")
    floor: int | float = Field(
        0,
        ge=0,
        description="weights that every layer keeps at least (MT): an integer is a count, a fraction a share of all"
        " prunable weights; a smaller layer is kept whole. 0 is no floor",
    )
    floors: dict[str, int | float] = Field(
        {}, description="pattern of layer names -> their own floor: a count, or a fraction of the layer"
    )
    skip: list[str] = Field([], description="patterns of layer names that stay dense")
    masks: Path | None = Field(None, description="one-shot: a mask file of these weights, in place of new masks")
    ranks: dict[Literal["r_W", "r_U"], Annotated[int, Field(ge=1)]] | None = Field(
        None, description="FastGRNN: whole columns of the factors go until these ranks are left; no sparsity is given"
    )

    @model_validator(mode="after")
    def _fits(self) -> NetworkOptions:
        if self.ranks is not None and (self.floor or self.floors or self.skip or self.masks):
            others = ", ".join(k for k in ("floor", "floors", "skip", "masks") if getattr(self, k))
            raise Clash(
                f"ranks and {others} are given: ranks remove whole columns, and know no {others}",
                f"leave out ranks (null), or {others}",
            )
        if self.schedule == "gradual" and (self.masks or self.ranks):
            named = "masks" if self.masks else "ranks"
            raise Clash(
                f"{named} and schedule: gradual do not go together: {named} say at once what goes",
                f"set schedule: one-shot, or leave {named} out (null)",
            )
        return self
