"""What a network returns, however it is nested: its tensors in a fixed order, and by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compress.errors import CompressError


def tensors(outputs: Any) -> list[Tensor]:
    """Every tensor in the outputs, however they are nested, in a fixed order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = [getattr(outputs, f.name) for f in dataclasses.fields(outputs)]
    elif isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    return [t for item in outputs for t in tensors(item)] if isinstance(outputs, list | tuple) else []


def floating(outputs: Any) -> list[Tensor]:
    """Those of `tensors` that hold floats."""
    return [t for t in tensors(outputs) if t.is_floating_point()]


def output_names(outputs: Any) -> list[str]:
    """Names for the floats that a model returned where no task names them: ``output``, the keys in a mapping or
    dataclass, or ``output0``, ``output1`` ... of all that is nested in a list or tuple."""
    if isinstance(outputs, Tensor):
        return ["output"]
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        outputs = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    elif hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    if isinstance(outputs, Mapping):
        return [str(k) for k, value in outputs.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return [f"output{i}" for i in range(len(floating(outputs)))]


def named(outputs: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """What a model returned, by name: a tensor, a mapping, a list or tuple in the order of ``names``, or a dataclass.

    Raises:
        CompressError: it returned something else, another number of tensors, or lacks a name.
    """
    if isinstance(outputs, Tensor):
        if len(names) != 1:
            raise CompressError(
                f"the model has one output, the data {len(names)} tasks",
                where="model",
                fix="return a dict with one entry a task, or name one task (data.tasks)",
            )
        return {names[0]: outputs}
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        # Not asdict: it copies every tensor. transformers' outputs are dataclasses and mappings at once.
        outputs = {f.name: getattr(outputs, f.name) for f in dataclasses.fields(outputs)}
    elif hasattr(outputs, "_asdict"):
        outputs = outputs._asdict()
    if isinstance(outputs, Mapping):
        missing = [name for name in names if not isinstance(outputs.get(name), Tensor)]
        if missing:
            raise CompressError(
                f"the model has no head {missing[0]!r}",
                where="model",
                fix=f"its heads are: {', '.join(str(k) for k in outputs)}",
            )
        return {name: outputs[name] for name in names}
    if isinstance(outputs, list | tuple) and list(names) == [f"output{i}" for i in range(len(names))]:
        outputs = floating(outputs)
    if isinstance(outputs, list | tuple) and all(isinstance(o, Tensor) for o in outputs):
        if len(outputs) != len(names):
            raise CompressError(
                f"the model gives {len(outputs)} tensors, the data has {len(names)} tasks",
                where="model",
                fix="return one a task in the order of data.tasks, or a dict by name",
            )
        return dict(zip(names, outputs, strict=True))
    raise CompressError(
        f"the model returned {type(outputs).__name__}, which holds no heads",
        where="model",
        fix="return a tensor, a dict by task, a list in the order of the tasks, or a dataclass",
    )
