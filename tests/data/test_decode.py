"""Files of every mode and orientation, written by Pillow: what is decoded is what was painted, upright."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.decode import ORIENTATION, SUFFIXES, opened, size_of
from compress.data.folder_images import FolderImages
from compress.data.images import load
from compress.errors import CompressError
from compress.schema.sections import DataSpec

WIDTH, HEIGHT = 12, 8
# Shares of white: a ramp to the right that is darker below, so that no turning gives the same picture.
RAMP = np.linspace(0, 1, WIDTH)[None] * np.linspace(1, 0.5, HEIGHT)[:, None]
GREY = np.rint(RAMP * 255).astype(np.uint8)
# orientation -> what a camera stored of an upright picture (the EXIF standard's table, by numpy alone)
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


def stored(values: np.ndarray[Any, Any], orientation: int) -> Any:
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](values)))


def decoded(path: Path, white: float | None = None) -> np.ndarray[Any, Any]:
    image = opened(path, white)
    assert image.mode == "RGB"
    return np.array(image)


SIXTEEN = np.rint(RAMP * 65535)
DEEP = {
    "16 bits, PNG": (SIXTEEN.astype(np.uint16), "a.png"),
    "16 bits, TIFF": (SIXTEEN.astype("<u2"), "a.tif"),
    "16 bits, the other byte order": (SIXTEEN.astype(">u2"), "a.tiff"),
    "16 bits, PGM": (SIXTEEN.astype(np.uint16), "a.pgm"),
    "32 bits with 16 used": (SIXTEEN.astype(np.int32), "a.tif"),
    "32 bits with 8 used": (GREY.astype(np.int32), "a.tif"),
    "floats to 1": (RAMP.astype(np.float32), "a.tif"),
    "floats to 255": ((RAMP * 255).astype(np.float32), "a.tif"),
    "floats to 65,535": (SIXTEEN.astype(np.float32), "a.tif"),
}


@pytest.mark.parametrize("name", DEEP)
def test_grey_of_more_than_8_bits_keeps_every_shade(name: str, tmp_path: Path) -> None:
    values, file = DEEP[name]
    Image.fromarray(values).save(tmp_path / file)
    got = decoded(tmp_path / file)
    assert np.abs(got.astype(int) - GREY[..., None]).max() <= 1, "a 16-bit step rounds, an 8-bit step does not"
    assert len(np.unique(got)) > 60 and (got == got[..., :1]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "RGBX"])
def test_every_other_mode_gives_the_picture(mode: str, tmp_path: Path) -> None:
    file = {"CMYK": "a.tif", "YCbCr": "a.tif", "RGBX": "a.tif", "PA": "a.tif"}.get(mode, "a.png")
    Image.fromarray(GREY).convert(mode).save(tmp_path / file)
    got = decoded(tmp_path / file)
    want = np.where(GREY > 127, 255, 0) if mode == "1" else GREY
    # One bit is dithered: the mean over a column is what is left of a shade.
    off = np.abs(got.mean(2).mean() - want.mean()) if mode == "1" else np.abs(got.astype(int) - want[..., None]).max()
    assert off <= (20 if mode == "1" else 2)


def test_a_cmyk_jpeg_and_a_palette_keep_their_colours(tmp_path: Path) -> None:
    paint = np.zeros((16, 16, 3), np.uint8)
    paint[:8, :, 0], paint[8:, :, 2] = 200, 180
    Image.fromarray(paint).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    Image.fromarray(paint).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    for name, off in (("a.jpg", 12), ("a.png", 3)):
        got = decoded(tmp_path / name).astype(int)
        assert np.abs(got[2, 8] - paint[2, 8]).max() <= off and np.abs(got[13, 8] - paint[13, 8]).max() <= off


def test_white_can_be_said_of_data_of_fewer_bits(tmp_path: Path) -> None:
    Image.fromarray(np.rint(RAMP * 4095).astype(np.uint16)).save(tmp_path / "a.png")
    assert decoded(tmp_path / "a.png").max() <= 16, "16 bits are scaled by what the format calls white"
    assert np.abs(decoded(tmp_path / "a.png", 4095).astype(int) - GREY[..., None]).max() <= 1
    assert decoded(tmp_path / "a.png", 100).max() == 255, "what is brighter than white is white"


@pytest.mark.parametrize("value", [-3.0, 1e6, float("nan"), float("inf")])
def test_values_without_a_white_are_refused_by_name(value: float, tmp_path: Path) -> None:
    values = RAMP.astype(np.float32)
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(CompressError, match="what is white there is not known") as e:
        opened(tmp_path / "odd.tif")
    assert "odd.tif" in e.value.where and "data.white" in e.value.fix


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("file", ["a.png", "a.jpg", "a.tif", "a.webp", "deep.png", "deep.tif", "floats.tif", "p.png"])
def test_every_orientation_is_turned_upright_once(file: str, orientation: int, tmp_path: Path) -> None:
    big = np.kron(RAMP, np.ones((8, 8)))  # larger than a JPEG's block, so that nothing smears
    grey = np.rint(big * 255).astype(np.uint8)
    values: Any = grey
    if file.startswith("deep"):
        values = np.rint(big * 65535).astype(np.uint16)
    elif file.startswith("floats"):
        values = big.astype(np.float32)
    image = stored(values, orientation)
    if file == "p.png":
        image = image.convert("P")
    more: dict[str, Any] = {"lossless": True} if file.endswith("webp") else {}
    image.save(tmp_path / file, exif=exif(orientation), **({"quality": 100} if file.endswith("jpg") else more))
    assert size_of(tmp_path / file) == (8 * WIDTH, 8 * HEIGHT)
    got = decoded(tmp_path / file)
    assert got.shape == (8 * HEIGHT, 8 * WIDTH, 3)
    assert np.abs(got.astype(int) - grey[..., None]).mean() < 3


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xe1\x00\x10Exif\x00\x00", b"II*\x00"]
)
def test_what_is_no_image_is_one_error_with_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(content)
    for read in (opened, size_of):
        with pytest.raises(CompressError, match="cannot be read") as e:
            read(tmp_path / "broken.png")
        assert "broken.png" in e.value.where


def test_an_image_cut_short_or_too_large_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    (tmp_path / "short.jpg").write_bytes(buffer.getvalue()[:-300])
    with pytest.raises(CompressError, match="cannot be read"):
        opened(tmp_path / "short.jpg")
    (tmp_path / "large.jpg").write_bytes(buffer.getvalue())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(CompressError, match="decompression bomb"):
        opened(tmp_path / "large.jpg")


# --- through the layouts ----------------------------------------------------------------------------------------------


def write_classes(folder: Path, orientation: int = 6, deep: bool = False) -> None:
    """train/, test/: bright above (class up) or below (class down), stored as a camera does that was turned."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 5)):
        for name in ("down", "up"):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                values = draw.uniform(0, 0.2, (16, 16))
                values[8:] += 0.7
                values = values[::-1] if name == "up" else values
                whole = np.rint(values * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)
                stored(whole, orientation).save(place / f"{i}.png", exif=exif(orientation))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_class_folders_are_read_upright_and_in_all_shades(
    lazy: bool, deep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, deep=deep)
    if lazy:
        monkeypatch.setattr("compress.data.folder_images.IN_MEMORY", 0)
    found = load(DataSpec(folder=tmp_path, size=16))
    assert isinstance(found.train.inputs, FolderImages) == lazy
    x = found.train.inputs[torch.arange(len(found.train))].float()
    above, below = x[:, :, :8].mean((1, 2, 3)), x[:, :, 8:].mean((1, 2, 3))
    assert torch.equal((above > below).long(), found.train.targets["class"])
    assert (torch.maximum(above, below) < 240).all() and (torch.minimum(above, below) > 5).all()


def test_files_that_are_read_otherwise_are_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_classes(tmp_path, deep=True)
    monkeypatch.setattr("compress.data.folder_images.IN_MEMORY", 0)
    known = load(DataSpec(folder=tmp_path, size=16)).sha256
    assert known == load(DataSpec(folder=tmp_path, size=16)).sha256
    assert known != load(DataSpec(folder=tmp_path, size=16, white=4095)).sha256
    monkeypatch.setattr("compress.data.folder_images.VERSION", 3)
    assert known != load(DataSpec(folder=tmp_path, size=16)).sha256


def write_pixels(folder: Path, turned: bool) -> None:
    """NYUDv2's layout; images stored on their side, labels upright, or stored on their side as well."""
    (folder / "gt_sets").mkdir(parents=True)
    names = [f"{i:02}" for i in range(12)]
    (folder / "gt_sets" / "train.txt").write_text("\n".join(names[:8]))
    (folder / "gt_sets" / "val.txt").write_text("\n".join(names[8:]))
    for place in ("images", "segmentation"):
        (folder / place).mkdir()
    for i, name in enumerate(names):
        labels = np.ones((16, 24), np.uint8)
        labels[2 : 6 + i % 4, 14:20] = 3
        stored(np.where(labels == 3, 240 - i, 20).astype(np.uint8), 8).save(folder / f"images/{name}.png", exif=exif(8))
        o = 8 if turned else 1
        stored(labels, o).save(folder / f"segmentation/{name}.png", exif=exif(o))


@pytest.mark.parametrize("turned", [False, True])
def test_masks_lie_over_the_upright_image(turned: bool, tmp_path: Path) -> None:
    write_pixels(tmp_path, turned)
    found = load(DataSpec(folder=tmp_path))
    assert found.input_shape == (3, 16, 24)
    assert torch.equal(found.train.inputs[:, 0] > 128, found.train.targets["segmentation"] == 2)


def test_a_mask_of_the_image_as_it_is_stored_is_refused(tmp_path: Path) -> None:
    write_pixels(tmp_path, False)
    image = Image.open(tmp_path / "segmentation" / "00.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "segmentation" / "00.png")
    with pytest.raises(CompressError, match="16x24 pixels, the image 24x16") as e:
        load(DataSpec(folder=tmp_path))
    assert "EXIF" in e.value.fix


def test_masks_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    from compress.data.pixel_layouts import _Pixels, _target

    values = np.rint(RAMP * 65535).astype(np.uint16)
    got = _target(_Pixels("saliency", "mask", ()), values, (HEIGHT, WIDTH), tmp_path / "a.png")
    assert np.abs(got.astype(int) - GREY).max() <= 1
    unit = np.stack([RAMP, 1 - RAMP, RAMP * 0], 2) / np.sqrt(RAMP**2 + (1 - RAMP) ** 2)[..., None]
    normals = np.rint((unit + 1) / 2 * 65535).astype(np.uint16)
    got = _target(_Pixels("normals", "normals", ()), normals, (HEIGHT, WIDTH), tmp_path / "a.npy")
    np.testing.assert_allclose(got.transpose(1, 2, 0), unit, atol=1e-3)


SCENE = (4, 18, 6, 10)  # top, left, height and width of a bright thing in 24 x 40 upright pixels


def write_scene(path: Path, orientation: int, shade: int) -> None:
    top, left, h, w = SCENE
    values = np.full((24, 40), shade, np.uint8)
    values[top : top + h, left : left + w] = 250
    path.parent.mkdir(parents=True, exist_ok=True)
    stored(values, orientation).save(path, exif=exif(orientation))


def inside(found: Any) -> None:
    """Every box holds the bright thing and nothing else, within the half pixel that scaling blurs."""
    for split in (found.train, found.test):
        for image, rows in zip(split.inputs, split.targets["boxes"], strict=True):
            _, x, y, w, h = (rows[0] * 40).tolist()
            bright = (image[0] > 180).nonzero().float()
            (top, left), (bottom, right) = bright.amin(0).tolist(), (bright.amax(0) + 1).tolist()
            np.testing.assert_allclose([x - w / 2, y - h / 2, x + w / 2, y + h / 2], [left, top, right, bottom], atol=1)


def test_boxes_of_yolo_are_of_the_upright_image(tmp_path: Path) -> None:
    top, left, h, w = SCENE
    line = f"0 {(left + w / 2) / 40} {(top + h / 2) / 24} {w / 40} {h / 24}\n"
    for part, count in (("train", 8), ("val", 8)):
        for i in range(count):
            write_scene(tmp_path / "images" / part / f"{i}.png", 1 + i, len(part) * 10 + i)
            words = tmp_path / "labels" / part / f"{i}.txt"
            words.parent.mkdir(parents=True, exist_ok=True)
            words.write_text(line)
    inside(load(DataSpec(folder=tmp_path, size=40)))


def write_coco(folder: Path, size: tuple[int, int] | None) -> None:
    top, left, h, w = SCENE
    (folder / "annotations").mkdir(parents=True)
    for part, count in (("train2017", 8), ("val2017", 8)):
        images = [{"id": i, "file_name": f"{i}.png"} for i in range(count)]
        if size is not None:
            images = [one | {"width": size[0], "height": size[1]} for one in images]
        boxes = [{"image_id": i, "category_id": 7, "bbox": [left, top, w, h]} for i in range(count)]
        facts = {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "thing"}]}
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(facts))
        for i in range(count):
            write_scene(folder / part / f"{i}.png", 1 + i, len(part) * 5 + i)


@pytest.mark.parametrize("size", [None, (40, 24)])
def test_boxes_of_coco_are_of_the_upright_image(size: tuple[int, int] | None, tmp_path: Path) -> None:
    write_coco(tmp_path, size)
    inside(load(DataSpec(folder=tmp_path, size=40)))


@pytest.mark.parametrize(("size", "words"), [((24, 40), "upright"), ((400, 240), "were made for")])
def test_annotations_of_another_size_are_refused(size: tuple[int, int], words: str, tmp_path: Path) -> None:
    write_coco(tmp_path, size)
    with pytest.raises(CompressError, match="the annotations are of an image of") as e:
        load(DataSpec(folder=tmp_path, size=40))
    assert words in e.value.fix and e.value.where.endswith(".png")


def test_splits_of_the_same_images_are_refused(tmp_path: Path) -> None:
    for i in range(8):
        for part in ("train", "val"):
            write_scene(tmp_path / "images" / part / f"{i}.png", 1 + i, 10)
            (tmp_path / "labels" / part).mkdir(parents=True, exist_ok=True)
            (tmp_path / "labels" / part / f"{i}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(CompressError, match="every training sample is in another split too"):
        load(DataSpec(folder=tmp_path, size=40))


def test_tiff_files_are_images_too(tmp_path: Path) -> None:
    write_classes(tmp_path)
    for path in tmp_path.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".TIF"))
        path.unlink()
    assert len(load(DataSpec(folder=tmp_path)).test) == 10 and ".tif" in SUFFIXES
