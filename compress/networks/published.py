"""Networks by a name of others: transformers' image models from the hub or a folder, and timm's.

What such a model says of its data (the size of its images, how they are made square and normalised, its classes) is
laid under the recipe's section ``data``, and stands in the run's lock like the rest of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.models.sources import NetworkAlias
from compress.run.folder import fingerprint
from compress.run.strict_json import read_json

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.networks.setup import NetworkSetup

TIMM = "timm:"
PROCESSOR = "preprocessor_config.json"
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
CROPPED = 0.875  # ConvNeXt's and ResNet's processors, where they do not say


@dataclass(frozen=True)
class PublishedNetwork:
    """A network of others by name.

    Args:
        weights: a hash of its weights and configuration; empty where they are drawn.
        load: puts its weights into the network of a set-up; None where they are drawn.
    """

    alias: NetworkAlias
    name: str
    source: str
    weights: str = ""
    load: Callable[[NetworkSetup, nn.Module], None] | None = None


def published(name: str) -> PublishedNetwork | None:
    """The network that a name of others leads to; None where it is no such name.

    Raises:
        UsageError: timm is not installed, or it is no image model.
        CompressError: the hub cannot be reached, or the folder is not whole.
    """
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM))
    folder, source = Path(name), f"folder {Path(name).name}"
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        from compress.models.sources import from_hub

        folder, source = from_hub(name, None)
    elif not (folder / "config.json").is_file():
        return None
    return _of_folder(folder, source, name)


# --- transformers -----------------------------------------------------------------------------------------------------


def _of_folder(folder: Path, source: str, name: str) -> PublishedNetwork:
    from compress.models.folder import read_config, weights_of
    from compress.models.zoo.published import SAYS_NOTHING, head_of
    from compress.run.cache import sha256_of

    config = read_config(folder, decoder=False)
    head = head_of(config)
    said = _processor(folder)
    files = weights_of(folder).files
    data = _data(said, config, str(folder / PROCESSOR))
    labels = _labels(config)
    arguments: dict[str, Any] = {"config": {k: v for k, v in config.items() if k not in SAYS_NOTHING}, "head": head}
    if said.get("do_flip_channel_order"):
        arguments["bgr"] = True
    hashes = {path.name: sha256_of(path) for path in files}
    alias = NetworkAlias(network="transformers-image", arguments=arguments, data={**data, "labels": labels})

    def load(setup: NetworkSetup, model: nn.Module) -> None:
        _load(folder, head, setup, model, labels)

    weights = fingerprint({"weights": hashes, "config": config})
    return PublishedNetwork(alias, Path(name).name, source, weights, load)


def _processor(folder: Path) -> dict[str, Any]:
    """What a model's folder says of how images are prepared; empty where it does not."""
    path = folder / PROCESSOR
    found = read_json(path, "the image processor's file") if path.is_file() else {}
    if not isinstance(found, dict):
        raise CompressError("the image processor's file is no JSON object", where=str(path), fix="fetch it again")
    return found


def _data(said: Mapping[str, Any], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A processor's file in the words of `compress.schema.sections.DataSpec`.

    Raises:
        CompressError: a size is none, or the means are no numbers.
    """

    def refuse(key: str) -> CompressError:
        return CompressError(f"{key} is {said.get(key)!r:.80}", where=where, fix="fetch the model's own file again")

    size = said.get("size", said.get("crop_size"))
    cut = said.get("crop_size", size) if said.get("do_center_crop") else size
    sides = [_side(s) for s in (size, cut)]
    found: dict[str, Any] = {}
    if said and said.get("do_resize", True) and size is not None:
        whole, side = sides
        if not whole or not side:
            raise refuse("size")
        found["size"] = side
        short = isinstance(size, Mapping) and "shortest_edge" in size
        if "ConvNext" in str(said.get("image_processor_type", said.get("feature_extractor_type", ""))):
            # Its short side is scaled to size / crop_pct before the centre is cut out, but for large ones.
            crop = float(said.get("crop_pct") or CROPPED)
            found |= {"fit": "crop", "crop": crop} if side < 384 else {"fit": "stretch"}
        elif short or said.get("do_center_crop"):
            found |= {"fit": "crop", "crop": min(1.0, side / whole)}
        else:
            found["fit"] = "stretch"
        found["resample"] = "bicubic" if said.get("resample") == 3 else "bilinear"
    elif (side := _side(config.get("image_size"))) is not None:
        found["size"] = side
    mean, std = (said.get(k, IMAGENET[k.removeprefix("image_")]) for k in ("image_mean", "image_std"))
    if said.get("do_normalize") is False:
        mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    for key, value in (("image_mean", mean), ("image_std", std)):
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, int | float) and abs(v) < 1e6 for v in values):
            raise refuse(key)
    factor = 255 * float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 255.0
    # (factor x - mean) / std of x in 0 to 1
    channels = int(config.get("num_channels", 3)) if isinstance(config.get("num_channels", 3), int) else 3
    mean, std = (v * channels if len(v) == 1 else v for v in (mean if isinstance(mean, list) else [mean],
                                                              std if isinstance(std, list) else [std]))  # fmt: skip
    return found | {"mean": [m / factor for m in mean], "std": [s / factor for s in std]}


def _side(size: Any) -> int | None:
    """The side of a square of pixels, however a configuration says it; None where it says none."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge", size.get("height"))
    if isinstance(size, list) and size:
        size = size[0]
    return size if isinstance(size, int) and not isinstance(size, bool) and 4 <= size <= 4096 else None


def _labels(config: Mapping[str, Any]) -> list[str]:
    """The classes of a configuration in their order; none where it only numbers them."""
    said = config.get("id2label")
    if not isinstance(said, dict) or not said:
        return []
    names = [said.get(str(i)) for i in range(len(said))]
    known = all(isinstance(n, str) and n for n in names) and len(set(names)) == len(names)
    return [] if not known or all(n == f"LABEL_{i}" for i, n in enumerate(names)) else [str(n) for n in names]


def _load(folder: Path, head: str, setup: NetworkSetup, model: nn.Module, labels: list[str]) -> None:
    """Puts the weights of a folder into the network of a set-up; where the data's classes are other ones than the
    model's, its head stays as it was drawn.

    Raises:
        UsageError: nothing would train such a head.
        CompressError: the folder does not hold the model that it says.
    """
    import torch
    import transformers

    from compress.models.folder import seen
    from compress.models.reading import NO_CODE, check_weights
    from compress.models.zoo.published import HEADS

    check_weights(folder, counts=True)
    kind = getattr(transformers, HEADS[head])
    with seen(folder, decoder=False) as private:
        try:
            held, notes = kind.from_pretrained(
                private, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **NO_CODE
            )
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as e:
            said = " ".join(str(e).split())[:300]
            raise CompressError(
                f"transformers does not load it: {said}", where=str(folder), fix="fetch it again"
            ) from e
    missing = sorted(notes["missing_keys"])
    if missing:
        raise CompressError(
            f"{len(missing)} weights of the model are not in its folder: {missing[0]}",
            where=str(folder),
            fix="name a model that was trained for this task, not its backbone alone",
        )
    inner: Any = model.net
    task = setup.data.tasks[0]
    other = bool(labels) and task.kind == "classes" and list(task.classes) != labels
    said, count = held.state_dict(), int(held.config.num_labels)
    heads = _heads(said, inner.state_dict(), count, other)
    _put(said, inner, heads, (count, int(inner.config.num_labels)), setup, str(folder))


def _put(
    said: Mapping[str, Tensor],
    model: nn.Module,
    heads: set[str],
    classes: tuple[int, int],
    setup: NetworkSetup,
    where: str,
) -> None:
    """Copies all weights but those of ``heads``, which stay as they were drawn.

    Args:
        classes: how many the weights tell apart, and the data has.

    Raises:
        UsageError: nothing would train what was drawn.
        CompressError: the weights are another network's.
    """
    import torch

    own = model.state_dict()
    wrong = next((n for n in own if n not in said or (n not in heads and own[n].shape != said[n].shape)), None)
    if wrong is not None:
        raise CompressError(f"the weights do not fit the network: {wrong}", where=where, fix="fetch the model again")
    if heads and not setup.recipe.train.epochs:
        raise UsageError(
            f"the model tells {classes[0]} classes apart and the data has {classes[1]} of its own: its head"
            f" ({min(heads)}) would be drawn, and nothing trains it",
            where="train.epochs",
            fix="train it for some epochs (--set train.epochs=3), or give data whose classes are among the model's",
        )
    with torch.no_grad():
        for name in own.keys() - heads:
            own[name].copy_(said[name])


def _heads(said: Mapping[str, Tensor], own: Mapping[str, Tensor], count: int, other: bool) -> set[str]:
    """The tensors of a head for ``count`` classes that is of no use: of another shape, or for other classes."""
    found = {n for n, t in said.items() if n in own and t.dim() and len(t) == count and t.shape != own[n].shape}
    if other and not found:
        named = re.compile(r"classifier|(^|\.)head\.")
        found = {n for n, t in said.items() if n in own and t.dim() and len(t) == count and named.search(n)}
    return found


# --- timm -------------------------------------------------------------------------------------------------------------


def _of_timm(name: str) -> PublishedNetwork:
    """A network of timm: ``resnet18`` with drawn weights, ``resnet18.a1_in1k`` with those of that name."""
    from compress.models.zoo.published import timm_library, timm_model

    timm = timm_library()
    timm_model(name)  # whether there is one
    said = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model_pretrained(name) else None
    data: dict[str, Any] = {}
    if said is not None:
        data = {"size": int(said.input_size[-1]), "mean": list(said.mean), "std": list(said.std)}
        data |= {"crop": float(said.crop_pct), "fit": "stretch" if said.crop_mode == "squash" else "crop"}
        data["resample"] = "bicubic" if said.interpolation == "bicubic" else "bilinear"
    alias = NetworkAlias(network="timm", arguments={"name": name.partition(".")[0]}, data=data)
    if "." not in name:
        return PublishedNetwork(alias, name, f"timm {timm.__version__}, weights drawn by seed")
    if said is None:
        raise UsageError(f"timm has no weights {name!r:.80}", where="MODEL", fix="see timm.list_pretrained()")

    def load(setup: NetworkSetup, model: nn.Module) -> None:
        _load_timm(name, setup, model)

    version = f"timm {timm.__version__}"
    return PublishedNetwork(alias, name, version, fingerprint({"timm": name, "version": version}), load)


def _load_timm(name: str, setup: NetworkSetup, model: nn.Module) -> None:
    from compress.models.zoo.published import timm_library

    try:
        held = timm_library().create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as e:
        raise CompressError(
            f"timm cannot fetch its weights: {' '.join(str(e).split())[:200]}",
            where=f"{TIMM}{name}",
            fix="check the network, or name weights of your own (weights: FILE.safetensors)",
        ) from e
    head, said = held.get_classifier(), held.state_dict()
    count = int(getattr(head, "out_features", getattr(head, "out_channels", 0)))
    heads = _heads(said, model.state_dict(), count, False)
    _put(said, model, heads, (count, setup.data.tasks[0].outputs), setup, f"{TIMM}{name}")
