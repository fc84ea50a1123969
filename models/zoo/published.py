"""Networks of transformers and timm, built from a configuration alone: no weights are fetched, and no code but theirs
is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress.distribution import install_line
from compress.errors import UsageError

# The end of an architecture's name -> the class of transformers that builds all of its kind.
HEADS = {
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSemanticSegmentation": "AutoModelForSemanticSegmentation",
}
# What else such an architecture is called.
OTHER_NAMES = {"ForImageClassificationWithTeacher": "ForImageClassification"}
LARGEST = 100_000  # of a size in a configuration
DEEPEST = 1_000  # layers
SAYS_NOTHING = ("architectures", "id2label", "label2id", "num_labels", "dtype", "torch_dtype", "_name_or_path")


def head_of(config: Mapping[str, Any]) -> str:
    """Which of `HEADS` a configuration's architecture has.

    Raises:
        UsageError: none of them.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    for end, other in (*((h, h) for h in HEADS), *OTHER_NAMES.items()):
        if name.endswith(end):
            return other
    raise UsageError(
        f"the model is {name or 'of no architecture that is named'}, and no image classifier or segmenter of"
        " transformers",
        where="MODEL",
        fix=f"name one whose architecture ends in {' or '.join(HEADS)}, or give it as a job (docs/guide/jobs.md)",
    )


class Published(nn.Module):
    """A network of transformers that gives one tensor: logits (b, classes), or (b, classes, h, w) of the image's size.

    Args:
        bgr: it was trained on blue in front, and images come with red there.
    """

    def __init__(self, net: nn.Module, bgr: bool = False) -> None:
        super().__init__()
        self.net, self.bgr = net, bgr

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(pixel_values=x.flip(1) if self.bgr else x).logits
        if logits.dim() == 2:
            return logits
        return functional.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)


def transformers_image(
    config: Mapping[str, Any], head: str = "ForImageClassification", classes: int = 1000, bgr: bool = False
) -> nn.Module:
    """What a model's config.json builds, with a head of ``classes`` outputs and weights that are drawn.

    Raises:
        UsageError: transformers has no such model, or does not take the configuration.
    """
    import transformers

    kind = str(config.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING or head not in HEADS:
        raise UsageError(
            f"transformers {transformers.__version__} has no model {kind!r:.40} with a head {head!r:.40}",
            where="network arguments",
            fix="a newer transformers may have it",
        )
    _check_sizes(config)
    own = {k: v for k, v in config.items() if k not in SAYS_NOTHING}
    try:
        made = transformers.CONFIG_MAPPING[kind].from_dict({**own, "num_labels": classes})
        net = getattr(transformers, HEADS[head]).from_config(made, trust_remote_code=False, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as e:
        said = " ".join(str(e).split())[:200]
        raise UsageError(
            f"transformers does not build it: {type(e).__name__}: {said}",
            where="network arguments",
            fix="fetch the model's own config.json again",
        ) from e
    return Published(net, bgr)


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Raises UsageError where a number is beyond all sense: building it would take all memory, or for ever."""
    for key, value in _numbers(config):
        depth = "layers" in key or "depth" in key
        if abs(value) > (DEEPEST if depth else LARGEST):
            raise UsageError(f"{key} is {value}", where="network arguments", fix="fetch the model's config.json again")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    if isinstance(value, Mapping):
        for k, v in value.items():
            yield from _numbers(v, str(k))
    elif isinstance(value, list):
        for v in value:
            yield from _numbers(v, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def timm_library() -> Any:
    """The module timm.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("timm")
    except (ImportError, RuntimeError) as e:  # torchvision of another torch raises RuntimeError
        raise UsageError(
            f"networks of timm need timm, and it cannot be imported: {' '.join(str(e).split())[:150]}",
            where="MODEL",
            fix="pip install timm, with the torchvision of this torch; "
            f"or name a model of transformers ({install_line('hub')} for the hub)",
        ) from e


def timm_model(name: str, classes: int = 1000) -> nn.Module:
    """A network of timm by its name, with a head of ``classes`` outputs and weights that are drawn.

    Raises:
        UsageError: timm is not installed, or has no such network.
    """
    import difflib

    timm = timm_library()
    plain = name.partition(".")[0]
    if plain not in timm.list_models():
        close = difflib.get_close_matches(plain, timm.list_models(), n=1)
        raise UsageError(
            f"timm {timm.__version__} has no network {plain!r:.60}",
            where="MODEL",
            fix=f"did you mean timm:{close[0]}?" if close else "see timm.list_models()",
        )
    made: nn.Module = timm.create_model(plain, pretrained=False, num_classes=classes)
    return made
