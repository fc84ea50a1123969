"""Data that says nothing, lies, or is beyond all memory: one clear error before anything is trained or measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.documents import read_files
from compress.data.images import load
from compress.data.text import pack
from compress.errors import CompressError, UsageError
from compress.schema.sections import DataSpec
from compress.system.arrays import read_array, read_arrays
from tests.command import compress, one_error
from tests.fuzz.readers import READERS
from tests.networks import write_cifar10, write_class_folders, write_har
from tests.tiny import saved_tiny, word_tokenizer


def refused(folder: Path, *parts: str, **spec: Any) -> None:
    with pytest.raises(CompressError) as e:
        load(DataSpec(folder=folder, **spec))
    for part in parts:
        assert part in f"{e.value.what} {e.value.where} {e.value.fix}", e.value
    assert e.value.where and e.value.fix


def test_images_that_are_all_alike(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 12, 6)
    for path in (tmp_path / "train").rglob("*.png"):
        Image.new("RGB", (12, 12), (9, 9, 9)).save(path)
    refused(tmp_path, "alike")


def test_a_channel_that_is_black_in_training_is_not_blown_up_in_the_test_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 12, 6)
    for path in (tmp_path / "train").rglob("*.png"):
        pixels = np.array(Image.open(path))
        pixels[..., 2] = 0
        Image.fromarray(pixels).save(path)
    splits = load(DataSpec(folder=tmp_path))
    assert splits.prepare(splits.test.inputs).abs().max() < 10  # type: ignore[arg-type]


def test_a_folder_of_a_class_without_images_is_refused_and_a_programs_own_is_none(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 12, 6)
    for part in ("train", "test"):
        (tmp_path / part / ".ipynb_checkpoints").mkdir()
    assert load(DataSpec(folder=tmp_path)).tasks[0].classes == ("bar", "cross", "square")
    (tmp_path / "train" / "__MACOSX").mkdir()
    refused(tmp_path, "there is no image of the class '__MACOSX'", str(tmp_path / "train" / "__MACOSX"))


def test_labels_of_one_class_and_labels_of_none(tmp_path: Path) -> None:
    folder, *_ = write_cifar10(tmp_path / "cifar")
    for path in folder.glob("data_batch_*.bin"):
        rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
        rows[:, 0] = 3
        rows.tofile(path)
    refused(folder, "nothing to tell apart", "'cat'")
    rows[0, 0] = 10
    rows.tofile(path)
    refused(folder, "a label is above 9", path.name)
    folder = write_har(tmp_path / "har")
    for text, said in (("7\n", "1 to 6"), ("0\n", "1 to 6"), ("1.5\n", "1 to 6"), ("nan\n", "no number")):
        (folder / "test" / "y_test.txt").write_text(text * 20)
        refused(folder, said, "y_test.txt")


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a\0\0\0\0", b"P6 0 0 255\n", b"P6 99999999 99999999 255\n"]
)
def test_an_image_of_no_pixels_or_of_more_than_any(data: bytes, tmp_path: Path) -> None:
    write_class_folders(tmp_path, 12, 6)
    path = next((tmp_path / "train" / "bar").glob("*.png"))
    path.write_bytes(data)
    refused(tmp_path, "cannot be read", str(path), size=12)


def test_pictures_beyond_all_memory_are_refused_before_any_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="4096"):
        DataSpec(folder=tmp_path, size=100_000)
    monkeypatch.setattr("compress.processes.distributed.available_bytes", lambda: 10**6)
    for name in ("yolo", "nyud"):
        (tmp_path / name).mkdir()
        READERS[name].make(tmp_path / name)
        refused(tmp_path / name, "GB", "data.size", size=512)
    write_class_folders(tmp_path / "classes", 12, 6)
    refused(tmp_path / "classes", "GB", "data.size", size=512)


def test_the_classes_of_cocos_parts_are_numbered_together(tmp_path: Path) -> None:
    READERS["coco"].make(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    held = json.loads(path.read_text())
    held["categories"].insert(0, {"id": 0, "name": "tree"})  # no box of the training part is one
    path.write_text(json.dumps(held))
    splits = load(DataSpec(folder=tmp_path, size=16))
    assert splits.tasks[0].classes == ("tree", "person", "car")
    for split in (splits.train, splits.calibration, splits.test):
        labels = split.targets["boxes"][..., 0]
        assert set(labels[labels >= 0].int().tolist()) <= {1, 2}
    held["categories"][1]["name"] = "cat"
    path.write_text(json.dumps(held))
    refused(tmp_path, "'cat' here and 'person'", path.name, size=16)


def test_names_of_classes_are_taken_by_their_numbers(tmp_path: Path) -> None:
    READERS["yolo"].make(tmp_path)
    (tmp_path / "data.yaml").write_text("names: {1: car, 0: person}\n")
    assert load(DataSpec(folder=tmp_path, size=16)).tasks[0].classes == ("person", "car")
    for names in ("{1: car, 2: person}", "[car, car]", "[car, '']", "[[car], x]", "car"):
        (tmp_path / "data.yaml").write_text(f"names: {names}\n")
        refused(tmp_path, "`names`", "data.yaml", size=16)


def test_an_array_takes_no_more_memory_than_its_file_has_bytes(tmp_path: Path) -> None:
    good = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "a.npy", good)
    np.save(tmp_path / "b.npy", np.asfortranarray(good))
    assert all((read_array(tmp_path / n, "it", "mend it") == good).all() for n in ("a.npy", "b.npy"))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data.replace(b"(2, 3)", b"(9e9,)").replace(b"(9e9,)", b"(9**9)"))
    with pytest.raises(CompressError, match="cannot be read"):
        read_array(tmp_path / "a.npy", "it", "mend it")
    (tmp_path / "a.npy").write_bytes(data.replace(b"(2, 3), }     ", b"(99999999999,)}"))
    with pytest.raises(CompressError, match="cannot be read"):
        read_array(tmp_path / "a.npy", "it", "mend it")
    np.savez_compressed(tmp_path / "z.npz", x=np.zeros(2**20))
    assert read_arrays(tmp_path / "z.npz", "it", "mend it")["x"].shape == (2**20,)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(CompressError, match="no file"):
        read_files([str(tmp_path / "*.txt")])


def test_a_text_of_one_token_and_a_text_that_is_all_alike(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises(CompressError, match="of one token"):
        pack(["!" * 4000], tokenizer, 32, 4, "x")
    row = list(tokenizer("the cat sat on", add_special_tokens=False)["input_ids"])
    with pytest.raises(CompressError, match="all alike"):
        pack(["the cat sat on" * 400], tokenizer, 4 * len(row), 4, "x")
    with pytest.raises(CompressError, match="gives 0 windows"):
        pack(["the cat"], tokenizer, 64, 1, "x")


def test_weights_that_overflow_are_named_before_anything_is_measured(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved_tiny(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][0, 0] = 1e30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "a.txt").write_text("the cat sat on the mat. " * 200)
    ran = compress("eval", folder, "--text", tmp_path / "a.txt", "--windows", 1, "--length", 16)
    one_error(ran, 1, name, "1e+30", "model.safetensors")
    weights[name] = torch.zeros(weights[name].shape, dtype=torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ran = compress("eval", folder, "--text", tmp_path / "a.txt", "--windows", 1, "--length", 16)
    one_error(ran, 1, name, "float8", "unquantised")


def test_a_size_beyond_sense_is_a_fault_of_the_command(tmp_path: Path) -> None:
    ran = compress("plan", "resnet8-emoji", "-r", "global-mp-network", "--set", "data.size=100000")
    one_error(ran, 2, "data.size", "4096")
    assert UsageError.exit_code == 2
