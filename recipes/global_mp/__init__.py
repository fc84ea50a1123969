"""Global magnitude pruning: one threshold for all weights of a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from compress.schema.section import Section


class GlobalMPOptions(Section):
    """The `global-mp:` section of a recipe."""

    floor: int | float = Field(
        0.0005,
        ge=0,
        description="weights that every layer keeps at least (MT): an integer is a count, a fraction a share of all"
        " prunable weights; a smaller layer is kept whole. 0 is no floor",
    )
    floors: dict[str, int | float] = Field(
        {}, description="pattern of layer names -> their own floor: a count, or a fraction of the layer"
    )
    pattern: Literal["unstructured", "2:4"] = Field(
        "unstructured", description="2:4: of every 4 consecutive inputs the 2 smallest go; the sparsity is then 0.5"
    )
    skip: list[str] = Field([], description="patterns of layer names that stay dense")
    head: bool = Field(False, description="also prune the output layer of a language model")
    embeddings: bool = Field(False, description="also prune the embeddings of a language model")

    @field_validator("pattern", mode="before")
    @classmethod
    def _not_a_time(cls, value: object) -> object:
        # YAML reads an unquoted 2:4 as two minutes and four seconds.
        return "2:4" if value == 124 else value
