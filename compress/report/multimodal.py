"""What a report says of a checkpoint that sees as well, of which the model is the language part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.words.escape import code
from compress.words.wording import megabytes, small

NAME = "multimodal"  # of the stage, of its folder in the release and in the report


def published(run_folder: Path, report: Mapping[str, Any]) -> dict[str, Path]:
    """Name in the release -> file, of the whole checkpoint; nothing where there is none."""
    if NAME not in report:
        return {}
    folder = run_folder / NAME
    return {f"{NAME}/{p.relative_to(folder).as_posix()}": p for p in folder.rglob("*") if p.name != "seal.json"}


def section(report: Mapping[str, Any]) -> list[str]:
    """The card's section; nothing where there is none."""
    if NAME not in report:
        return []
    found = report[NAME]
    dense, pruned, rest = found["dense"], found["pruned"], found["carried"]
    return [
        "## The whole checkpoint",
        "",
        f"This model is the language part of a {code(found['title'])}. The folder {code(NAME)} holds all of it, with"
        f" this language part: {pruned['parameters']:,} parameters of {dense['parameters']:,}"
        f" ({megabytes(dense['bytes'])} -> {megabytes(pruned['bytes'])}). The other {rest['parameters']:,}, in"
        f" {rest['tensors']} tensors, are the dense checkpoint's byte for byte. On text it gives this model's logits"
        f" (to {small(found['verify']['max_logit_difference'])}, loaded by transformers in a clean process); what"
        " pruning costs it on images was not measured.",
        "",
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f'model = AutoModelForImageTextToText.from_pretrained("PATH/{NAME}", trust_remote_code=True)',
        f'processor = AutoProcessor.from_pretrained("PATH/{NAME}")',
        "```",
        "",
    ]


def lines(report: Mapping[str, Any]) -> list[str]:
    """What the command line says of it."""
    if NAME not in report:
        return []
    found = report[NAME]
    return [
        f"whole    {found['title']} with it: {found['dense']['parameters']:,} -> {found['pruned']['parameters']:,}"
        f" parameters, {found['carried']['tensors']} other tensors as they were; in {NAME}"
    ]
