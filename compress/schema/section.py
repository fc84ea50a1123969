"""What every part of a file of settings has: unknown keys are refused, and so are values beyond all sense."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

LARGEST = 10**15  # no count, share, rate or number of bytes that can be meant is larger
LARGEST_SEED = 2**32 - 1  # what every generator takes

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=1)]


def _once(values: list[str]) -> list[str]:
    twice = next((v for i, v in enumerate(values) if v in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice")
    return values


Once = AfterValidator(_once)  # of a list of names: each makes a folder, or a row of the report


class Section(BaseModel):
    """A part of a recipe, target, gate or machine file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _sensible(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        if type(value) is bool and not _takes(annotation, bool):
            raise ValueError("true and false are no value here")
        if type(value) is not bool and value is not None and annotation in (bool, bool | None):
            raise ValueError("it is true or false")  # pydantic takes 0, 1, "off" and "y" as well
        if value == "" and _takes(cls.model_fields[info.field_name].annotation, Path):
            raise ValueError("a path is not empty")
        if not _holds_section(cls.model_fields[info.field_name].annotation):  # its own fields are asked by themselves
            check_sizes(value)
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _sensible_as_read(cls, value: Any, info: ValidationInfo) -> Any:
        """A text is read as a number where one is meant, and YAML takes 1e30 for a text."""
        assert info.field_name is not None
        if not _holds_section(cls.model_fields[info.field_name].annotation):
            check_sizes(value)
        return value


class Clash(ValueError):
    """A rule over several keys is broken; ``fix`` names every way out."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.fix = fix


def check_sizes(value: Any) -> None:
    """Raises ValueError where a number in ``value``, however deep, is larger than `LARGEST`."""
    if isinstance(value, int | float) and abs(value) > LARGEST:  # infinity too
        raise ValueError(f"no number here is beyond {LARGEST:.0e}")
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for inner in value:
        check_sizes(inner)


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a field of this annotation takes a ``kind``."""
    if annotation is Any or annotation is kind:
        return True
    return any(_takes(inner, kind) for inner in typing.get_args(annotation))


def _holds_section(annotation: Any) -> bool:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return issubclass(annotation, BaseModel)
    return any(_holds_section(inner) for inner in typing.get_args(annotation))


def whole_number(text: str) -> int:
    """A whole number from 1 to `LARGEST` in plain digits; ValueError otherwise (`int` takes " 8 ", "1_0" and "８")."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:17]) <= LARGEST:
        raise ValueError(f"{text[:40]!r} is no whole number from 1")
    return int(text)
