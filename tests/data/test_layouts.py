"""Folders of pixels and boxes: what is written in a layout is what is read, and a fault is told by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from compress.data.folder_images import Fit, FolderImages
from compress.data.images import Split, load
from compress.data.pixel_layouts import PARTS, VOC_CLASSES
from compress.errors import CompressError
from compress.schema.sections import DataSpec
from tests.networks import write_class_folders

draw = np.random.default_rng(0)
TRAIN, VAL = [f"{i:04}" for i in range(1, 13)], [f"{i:04}" for i in range(13, 18)]


def put(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def lists(folder: Path, train: list[str] = TRAIN, val: list[str] = VAL) -> None:
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("\n".join(train) + "\n")
    (folder / "val.txt").write_text("\n".join(val))


def write_nyud(folder: Path, h: int = 20, w: int = 24, png: bool = False) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    held: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    lists(folder / "gt_sets")
    for name in TRAIN + VAL:
        normal = draw.normal(size=(h, w, 3)).astype(np.float32)
        normal /= np.linalg.norm(normal, axis=2, keepdims=True)
        normal[0] = 0
        depth = draw.uniform(0.5, 9, (h, w)).astype(np.float32)
        depth[1], depth[2] = 0, np.nan
        one = held[name] = {
            "images": draw.integers(0, 256, (h, w, 3), dtype=np.uint8),
            "segmentation": draw.integers(0, 41, (h, w), dtype=np.uint8),
            "depth": depth,
            "normals": normal,
            "edges": (draw.random((h, w)) < 0.1).astype(np.uint8) * 255,
        }
        put(folder / "images" / f"{name}.png", one["images"])
        put(folder / "segmentation" / f"{name}.png", one["segmentation"])
        put(folder / "edges" / f"{name}.png", one["edges"])
        if png:
            put(folder / "depth" / f"{name}.png", (np.nan_to_num(depth) * 1000).round().astype(np.uint16))
            put(folder / "normals" / f"{name}.png", ((normal + 1) * 127.5).round().astype(np.uint8) * (normal != 0))
        else:
            put(folder / "depth" / f"{name}.npy", depth)
            put(folder / "normals" / f"{name}.npy", normal)
    return held


def by_image(split: Split, held: dict[str, dict[str, np.ndarray[Any, Any]]], key: str = "images") -> list[str]:
    """Which file each sample is of, by its pixels."""
    assert isinstance(split.inputs, Tensor)
    names = {one[key].tobytes(): name for name, one in held.items()}
    return [names[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in split.inputs]


NYUD = ["segmentation", "depth", "normals", "edges"]


@pytest.mark.parametrize("png", [False, True])
def test_nyud_is_read_pixel_by_pixel_and_what_is_unknown_stays_so(png: bool, tmp_path: Path) -> None:
    held = write_nyud(tmp_path, png=png)
    found = load(DataSpec(folder=tmp_path, tasks=NYUD))
    assert [t.name for t in found.tasks] == NYUD and len(found.tasks[0].classes) == 40
    assert found.input_shape == (3, 20, 24)
    assert sorted(by_image(found.test, held)) == VAL
    assert sorted(by_image(found.train, held) + by_image(found.calibration, held)) == TRAIN
    for split in (found.train, found.test):
        for i, name in enumerate(by_image(split, held)):
            one, got = held[name], {k: t[i].numpy() for k, t in split.targets.items()}
            labels = one["segmentation"].astype(int)
            np.testing.assert_array_equal(got["segmentation"], np.where(labels == 0, 255, labels - 1))
            np.testing.assert_allclose(got["depth"], np.nan_to_num(one["depth"]), atol=6e-4 if png else 0)
            np.testing.assert_allclose(got["normals"].transpose(1, 2, 0), one["normals"], atol=0.01 if png else 1e-6)
            assert not got["normals"][:, 0].any()
            np.testing.assert_array_equal(got["edges"], one["edges"])


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    write_nyud(tmp_path)
    shutil.rmtree(tmp_path / "normals")
    (tmp_path / "edges" / "0003.png").unlink()
    found = load(DataSpec(folder=tmp_path, tasks=["depth", "segmentation"]))
    assert list(found.train.targets) == ["depth", "segmentation"]
    assert [t.name for t in load(DataSpec(folder=tmp_path)).tasks] == ["segmentation"]
    with pytest.raises(CompressError, match="'0003' is missing"):
        load(DataSpec(folder=tmp_path, tasks=["edges"]))
    with pytest.raises(CompressError, match="no task 'normals'"):
        load(DataSpec(folder=tmp_path, tasks=["depth", "normals"]))


def test_images_and_pixels_are_scaled_and_cut_alike(tmp_path: Path) -> None:
    lists(tmp_path / "gt_sets")
    for i, name in enumerate(TRAIN + VAL):
        labels = np.ones((40, 56), np.uint8)  # a square somewhere, dark in the image and class 2 in the labels
        y, x = draw.integers(4, 20), draw.integers(12, 28)
        labels[y : y + 12, x : x + 12] = 3
        grey = np.where(labels == 3, 10, 250 - i).astype(np.uint8)
        put(tmp_path / "images" / f"{name}.png", grey[..., None].repeat(3, 2))
        put(tmp_path / "segmentation" / f"{name}.png", labels)
        put(tmp_path / "depth" / f"{name}.npy", labels.astype(np.float32))
        line = np.zeros((40, 56), np.uint8)
        line[:, x] = 1
        put(tmp_path / "edges" / f"{name}.png", line)
    found = load(DataSpec(folder=tmp_path, tasks=["segmentation", "depth", "edges"], size=20))
    assert isinstance(found.train.inputs, Tensor) and found.input_shape == (3, 20, 20)
    labels, depth = found.train.targets["segmentation"], found.train.targets["depth"]
    dark = found.train.inputs[:, 0] < 130
    # Bilinear and nearest differ by less than a pixel at borders.
    assert float(((labels == 2) != dark).float().mean()) < 0.05 and bool((labels == 2).any())
    assert torch.equal(depth == 3, labels == 2)
    # A line one pixel wide is still there at half the size, and is still thin.
    lines = (found.train.targets["edges"] > 0).sum(2)
    assert bool((lines >= 1).all()) and bool((lines <= 2).all())


def test_pascal_context_is_read_with_its_parts_and_its_own_classes(tmp_path: Path) -> None:
    lists(tmp_path / "ImageSets" / "Context", [f"2008_{n}" for n in TRAIN], [f"2008_{n}" for n in VAL])
    held = {}
    for name in [f"2008_{n}" for n in TRAIN + VAL]:
        h, w = 18, int(draw.integers(18, 30))
        one = held[name] = {
            "labels": draw.choice([*range(21), 255], (h, w)).astype(np.uint8),
            "parts": draw.choice([*range(7), 255], (h, w)).astype(np.uint8),
        }
        put(tmp_path / "JPEGImages" / f"{name}.jpg", draw.integers(0, 256, (h, w, 3), dtype=np.uint8))
        put(tmp_path / "semseg" / f"{name}.png", one["labels"])
        put(tmp_path / "human_parts" / f"{name}.png", one["parts"])
        put(tmp_path / "normals_distill" / f"{name}.png", draw.integers(1, 256, (h, w, 3), dtype=np.uint8))
        put(tmp_path / "sal_distill" / f"{name}.png", draw.choice([0, 255], (h, w)).astype(np.uint8))
    with pytest.raises(CompressError, match="sizes") as caught:
        load(DataSpec(folder=tmp_path))
    assert "data.size" in caught.value.fix
    names = ["segmentation", "parts", "normals", "saliency"]
    found = load(DataSpec(folder=tmp_path, tasks=names, size=18))
    assert found.tasks[0].classes == VOC_CLASSES and found.tasks[1].classes == PARTS
    for i, name in enumerate(sorted(k for k in held if k[5:] in VAL)):
        left = (held[name]["labels"].shape[1] - 18) // 2  # the height fits already: only the centre is cut out
        for task, key in (("segmentation", "labels"), ("parts", "parts")):
            np.testing.assert_array_equal(found.test.targets[task][i], held[name][key][:, left : left + 18])
    length = found.test.targets["normals"].norm(dim=1)
    assert bool(((length - 1).abs() < 1e-5).logical_or(length == 0).all()) and float((length > 0).float().mean()) > 0.9
    first = f"2008_{VAL[0]}"
    put(tmp_path / "semseg" / f"{first}.png", np.full_like(held[first]["labels"], 58))
    assert len(load(DataSpec(folder=tmp_path, size=18)).tasks[0].classes) == 59


def write_yolo(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Wide and high images with bright boxes in them; (class, x, y, w, h) in pixels by name."""
    held = {}
    for part, names in (("train", TRAIN), ("val", VAL)):
        for i, name in enumerate(names):
            h, w = (40, 64) if i % 2 else (64, 40)
            rows = []
            image = draw.integers(0, 60, (h, w, 3), dtype=np.uint8)
            for k in range(i % 3):
                bw, bh = draw.integers(8, 14, 2)
                x, y = 2 + k * 18, int(draw.integers(0, h - 14))
                image[y : y + bh, x : x + bw] = 255
                rows.append([k % 2, x + bw / 2, y + bh / 2, bw, bh])
            held[name] = np.array(rows, dtype=float).reshape(-1, 5)
            put(folder / "images" / part / f"{name}.png", image)
            if rows:  # an image without objects has no file
                text = folder / "labels" / part / f"{name}.txt"
                text.parent.mkdir(parents=True, exist_ok=True)
                text.write_text("\n".join(f"{c:.0f} {x / w} {y / h} {bw / w} {bh / h}" for c, x, y, bw, bh in rows))
    (folder / "data.yaml").write_text("names: {0: plate, 1: cup}\n")
    return held


def bright_boxes(split: Split) -> None:
    """Every box stands around bright pixels, and no bright pixel stands outside of all."""
    assert isinstance(split.inputs, Tensor)
    size = split.inputs.shape[-1]
    for image, boxes in zip(split.inputs, split.targets["boxes"], strict=True):
        bright = (image[0] > 150).clone()
        for label, x, y, w, h in boxes.tolist():
            if label < 0:
                continue
            left, right, top, bottom = (round(size * v) for v in (x - w / 2, x + w / 2, y - h / 2, y + h / 2))
            assert float((image[0, top:bottom, left:right] > 150).float().mean()) > 0.6
            bright[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1] = False
        assert not bool(bright.any())


def test_yolo_boxes_stand_around_what_they_stood_around_before_scaling(tmp_path: Path) -> None:
    held = write_yolo(tmp_path)
    found = load(DataSpec(folder=tmp_path, size=48))
    assert found.tasks[0].classes == ("plate", "cup") and found.input_shape == (3, 48, 48)
    assert sorted(int((b[:, 0] >= 0).sum()) for b in found.test.targets["boxes"]) == sorted(len(held[n]) for n in VAL)
    for split in (found.train, found.calibration, found.test):
        bright_boxes(split)


def test_coco_annotations_say_the_same_as_yolos_files(tmp_path: Path) -> None:
    held = write_yolo(tmp_path / "yolo")
    for part, names in (("train", TRAIN), ("val", VAL)):
        shutil.copytree(tmp_path / "yolo" / "images" / part, tmp_path / "coco" / f"{part}2017")
        rows = [(i, *row) for i, n in enumerate(names) for row in held[n]]
        annotations = [
            {"image_id": i, "category_id": 7 if c else 3, "bbox": [x - w / 2, y - h / 2, w, h], "iscrowd": 0}
            for i, c, x, y, w, h in rows
        ]
        annotations.append({"image_id": 0, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1})
        facts = {
            "images": [{"id": i, "file_name": f"{n}.png"} for i, n in enumerate(names)],
            "categories": [{"id": 7, "name": "cup"}, {"id": 3, "name": "plate"}],
            "annotations": annotations,
        }
        place = tmp_path / "coco" / "annotations" / f"instances_{part}2017.json"
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(facts))
    one, other = (load(DataSpec(folder=tmp_path / n, size=48)) for n in ("coco", "yolo"))
    assert one.tasks == other.tasks
    for a, b in ((one.train, other.train), (one.test, other.test)):
        assert torch.equal(a.inputs, b.inputs)  # type: ignore[arg-type]
        torch.testing.assert_close(a.targets["boxes"], b.targets["boxes"])


def test_a_calibration_split_that_overlaps_the_test_split_is_refused(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "d")
    (folder / "calibration").mkdir()
    for name in ("square", "bar", "cross"):
        images = sorted((folder / "train" / name).glob("*.png"))[:3]
        for image in images:
            target = folder / "calibration" / name / image.name
            target.parent.mkdir(exist_ok=True)
            image.rename(target)
    found = load(DataSpec(folder=folder))
    assert len(found.calibration) == 9 and len(found.train) == 51 and found.notes == ()
    copied = next((folder / "test" / "bar").glob("*.png"))
    shutil.copy(copied, folder / "calibration" / "cross" / "another-name.png")
    with pytest.raises(CompressError, match="1 of 10 calibration samples are test samples too"):
        load(DataSpec(folder=folder))


def test_training_samples_that_are_held_out_too_are_left_out_and_said(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "d")
    for name in ("square", "bar"):
        copied = next((folder / "test" / name).glob("*.png"))
        shutil.copy(copied, folder / "train" / name / "again.png")
    found = load(DataSpec(folder=folder))
    assert len(found.train) + len(found.calibration) == 60 and found.notes and "left out" in found.notes[0]


def test_files_that_are_read_as_they_are_needed_are_compared_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.data import images

    folder = write_class_folders(tmp_path / "d", train=30, test=12)
    paths = [sorted((folder / part).rglob("*.png")) for part in ("train", "test")]
    again = folder / "elsewhere.png"
    shutil.copy(paths[1][4], again)
    splits = [Split(FolderImages(p, Fit(12)), {}) for p in ([*paths[0], again], paths[1])]
    assert images._shared(*splits).tolist() == [len(paths[0])]
    # Files whose ends alone agree are no copies.
    near = bytearray(paths[1][4].read_bytes())
    near[len(near) // 2] ^= 1
    again.write_bytes(bytes(near))
    monkeypatch.setattr(images, "_content", lambda inputs, i: b"the same ends")
    assert images._shared(*splits).tolist() == []


def test_faults_in_folders_of_pixels_and_boxes_are_told_by_name(tmp_path: Path) -> None:
    def refused(part: str, **spec: Any) -> CompressError:
        with pytest.raises(CompressError, match=part) as caught:
            load(DataSpec(**spec))
        assert caught.value.where and caught.value.fix
        return caught.value

    nyud = tmp_path / "nyud"
    write_nyud(nyud)
    put(nyud / "segmentation" / "0002.png", np.zeros((9, 9), np.uint8))
    refused("9x9 pixels, the image 24x20", folder=nyud)
    (nyud / "depth" / "0002.npy").write_bytes(b"no array")
    refused("target cannot be read", folder=nyud, tasks=["depth"])
    (nyud / "segmentation" / "0002.png").unlink()
    (nyud / "segmentation" / "0002.mat").write_bytes(b"MATLAB")
    assert ".mat is not read" in refused("'0002' is missing", folder=nyud).fix
    (nyud / "gt_sets" / "train.txt").unlink()
    refused("lists no training images", folder=nyud)
    yolo = tmp_path / "yolo"
    write_yolo(yolo)
    refused("need one size", folder=yolo)
    (yolo / "labels" / "train" / "0002.txt").write_text("0 0.5 0.5 1.5 0.1")
    refused("shares from 0 to 1", folder=yolo, size=32)
    (yolo / "labels" / "train" / "0002.txt").write_text("2 0.5 0.5 0.5 0.1")
    refused("class 2 is not among the 2 names", folder=yolo, size=32)
