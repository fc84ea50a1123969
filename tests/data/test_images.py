"""Data: every layout gives what was written, splits share nothing, and a fault is told by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import packaged
from compress.data.folder_images import Fit, FolderImages
from compress.data.images import load
from compress.data.layouts import HAR_SIGNALS
from compress.data.packaged import over_background
from compress.errors import CompressError
from compress.schema.sections import DataSpec
from tests.networks import write_cifar10, write_class_folders, write_har


def rows(*parts: torch.Tensor) -> list[bytes]:
    return [row.contiguous().numpy().tobytes() for part in parts for row in part]


def test_cifar10s_binary_files_are_read_byte_by_byte_and_split_without_loss(tmp_path: Path) -> None:
    folder, every, labels = write_cifar10(tmp_path / "c")
    found = load(DataSpec(folder=folder))
    assert len(found.test) == 7 and len(found.train) + len(found.calibration) == 35
    got = dict(
        zip(
            rows(found.train.inputs, found.calibration.inputs),  # type: ignore[arg-type]
            torch.cat([found.train.targets["class"], found.calibration.targets["class"]]).tolist(),
            strict=True,
        )
    )
    assert got == dict(zip(rows(every), labels.tolist(), strict=True))
    assert found.tasks[0].classes[3] == "cat" and found.input_shape == (3, 32, 32)


def test_prepared_training_inputs_have_mean_zero_and_spread_one(tmp_path: Path) -> None:
    found = load(DataSpec(folder=write_cifar10(tmp_path / "c")[0]))
    x = found.prepare(found.train.inputs).transpose(0, 1).flatten(1)  # type: ignore[arg-type]
    torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_the_seed_decides_the_split_and_nothing_else_does(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path / "c")[0]
    one, same, other = (load(DataSpec(folder=folder, seed=s)) for s in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256


def test_class_folders_give_pixels_and_labels_as_they_lie_there(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "d")
    found = load(DataSpec(folder=folder))
    assert found.tasks[0].classes == ("bar", "cross", "square")
    assert isinstance(found.test.inputs, torch.Tensor)
    for pixels, label in zip(found.test.inputs, found.test.targets["class"], strict=True):
        name = found.tasks[0].classes[int(label)]
        same = [
            p
            for p in (folder / "test" / name).glob("*.png")
            if np.array_equal(np.array(Image.open(p)), pixels.permute(1, 2, 0))
        ]
        assert len(same) == 1
    assert len(found.train) == 54 and len(found.calibration) == 6
    assert not set(rows(found.train.inputs)) & set(rows(found.calibration.inputs))  # type: ignore[arg-type]


def test_large_folders_are_decoded_as_they_are_asked_for_and_cut_from_the_centre(tmp_path: Path) -> None:
    picture = np.zeros((80, 140, 3), np.uint8)
    picture[:, 35:105] = 200  # the centre square, and a little more
    Image.fromarray(picture).save(tmp_path / "wide.png")
    lazy = FolderImages([tmp_path / "wide.png"] * 3, Fit(56))
    assert len(lazy) == 3 and lazy[torch.tensor([0, 2])].shape == (2, 3, 56, 56)
    # 80 x 140 -> 64 x 112, and the middle 56 x 56 of that.
    assert bool((lazy[torch.tensor([0])][..., 3:-3] == 200).all())
    one, same, other = (lazy.drawn(torch.tensor([0, 1]), seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.shape == (2, 3, 56, 56)
    # Whoever holds an image draws the same part of it.
    assert torch.equal(lazy.drawn(torch.tensor([1]), 1)[0], one[1]) and lazy.drawn(torch.tensor([]), 1).shape[0] == 0


def test_har_splits_calibration_by_person_and_halves_its_classes(tmp_path: Path) -> None:
    folder = write_har(tmp_path / "har")
    found = load(DataSpec(folder=folder, tasks=["class", "binary"]))
    assert found.input_shape == (9, 128) and len(found.calibration) == 5 and len(found.train) == 15
    assert torch.equal(found.train.targets["binary"], (found.train.targets["class"] < 3).long())
    whole = np.loadtxt(folder / "train" / "Inertial Signals" / "body_gyro_y_train.txt", dtype=np.float32)
    assert isinstance(found.train.inputs, torch.Tensor)
    channel = HAR_SIGNALS.index("body_gyro_y")
    every = torch.cat([found.train.inputs, found.calibration.inputs])[:, channel]  # type: ignore[list-item]
    torch.testing.assert_close(every.sort(0).values, torch.from_numpy(whole).sort(0).values)
    # One person is held out whole: five rows in a run of the file.
    at = [int((torch.from_numpy(whole) - row).abs().sum(1).argmin()) for row in found.calibration.inputs[:, channel]]  # type: ignore[index,union-attr]
    assert at == list(range(at[0], at[0] + 5)) and at[0] % 5 == 0


def emoji_rows(monkeypatch: pytest.MonkeyPatch, count: int = 40) -> dict[str, torch.Tensor]:
    """What the packages give once they are decoded: two vendors and two tones of every emoji."""
    emoji = torch.arange(count).repeat(4)
    held = {
        "rgba": torch.randint(
            0, 256, (4 * count, 4, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        ),
        "emoji": emoji,
        "category": emoji % 9,
        "vendor": torch.arange(4 * count) // (2 * count),
        "subcategory": emoji % 99,
        "tone": (torch.arange(4 * count) // count) % 2,
        "words": (emoji[:, None] % torch.arange(2, 18) == 0).to(torch.uint8),
    }
    held["rgba"][:, 0, 0, 0] = emoji.to(torch.uint8)
    held["rgba"][:, 3, 0, 0] = 255  # opaque there: the emoji's number survives any background
    monkeypatch.setattr(packaged, "_kept", lambda name, make: held)
    return held


@pytest.mark.parametrize("tones", [False, True])
def test_no_emoji_is_in_two_splits_whatever_its_vendor_or_tone(tones: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    emoji_rows(monkeypatch)
    found = load(DataSpec(package="emoji", skin_tones=tones, tasks=["category", "vendor", "matte"]))
    parts = [
        {int(n) for n in split.inputs[:, 0, 0, 0]}  # type: ignore[index,call-overload,union-attr]
        for split in (found.train, found.calibration, found.test)
    ]
    assert set.union(*parts) == set(range(40)) and sum(map(len, parts)) == 40
    assert [len(p) for p in parts] == [32, 4, 4]
    assert len(found.train) + len(found.calibration) + len(found.test) == (160 if tones else 80)
    for split in (found.train, found.test):
        assert split.targets["matte"].shape == (len(split), 64, 64) and set(split.targets["vendor"].tolist()) == {0, 1}


def test_emoji_give_attributes_and_an_outline_beside_the_three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    held = emoji_rows(monkeypatch)
    held["rgba"][:, 3] = 0
    held["rgba"][:, 3, 8:40, 16:48] = 255
    names = ["category", "vendor", "matte", "outline", "subcategory", "words", "tone"]
    found = load(DataSpec(package="emoji", size=32, tasks=names, skin_tones=True))
    assert [t.kind for t in found.tasks] == ["classes", "classes", "mask", "edges", "classes", "attributes", "classes"]
    # A square of 16 pixels; its outermost pixels are its outline.
    want = torch.zeros(32, 32)
    want[4:20, 8:24] = 255
    want[5:19, 9:23] = 0
    assert bool((found.test.targets["outline"] == want).all())
    assert found.test.targets["words"].shape == (16, 16) and found.tasks[5].classes[0] == "flag"
    assert set(found.test.targets["tone"].tolist()) == {0, 1}
    with pytest.raises(CompressError, match="no task 'tone'"):
        load(DataSpec(package="emoji", tasks=["tone"]))


def test_words_and_tones_are_read_off_an_emojis_names() -> None:
    words = packaged._words({"name": "WOMAN: RED HAIR", "short_names": ["red_haired_woman", "person-with_ball"]})
    assert [w for w, has in zip(packaged.EMOJI_WORDS, words, strict=True) if has] == ["woman", "person", "hair", "ball"]
    tones = [packaged.EMOJI_TONES[packaged._tone(t)] for t in ("", "1F3FC", "1F3FF-1F3FF", "1F3FB-1F3FF")]
    assert tones == ["none", "medium-light", "dark", "mixed"]


def test_scenes_are_composed_of_emoji_of_their_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    held = emoji_rows(monkeypatch)
    held["rgba"][:, 3] = 255
    held["rgba"][:, :3] = held["emoji"][:, None, None, None].to(torch.uint8) * 5  # the grey tells the emoji
    monkeypatch.setattr(packaged, "SCENES", (60, 12, 12))
    found = load(DataSpec(package="emoji-scenes", size=48))
    assert [len(s) for s in (found.train, found.calibration, found.test)] == [60, 12, 12]
    shown: list[set[int]] = []
    for split in (found.train, found.calibration, found.test):
        shown.append(set())
        for image, boxes in zip(split.inputs, split.targets["boxes"], strict=True):  # type: ignore[call-overload]
            for label, x, y, _, _ in boxes[boxes[:, 0] >= 0].tolist():
                grey = image[:, int(y * 48), int(x * 48)]
                assert len(set(grey.tolist())) == 1 and int(grey[0]) // 5 % 9 == label
                shown[-1].add(int(grey[0]) // 5)
    assert not shown[0] & shown[1] and not shown[0] & shown[2] and not shown[1] & shown[2]
    with pytest.raises(CompressError, match="50 pixels"):
        load(DataSpec(package="emoji-scenes", size=50))


def test_the_background_shows_where_the_matte_is_clear_and_the_seed_draws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rgba = torch.zeros(1, 4, 2, 2, dtype=torch.uint8)
    rgba[0, :, 0, 0] = torch.tensor([10, 20, 30, 255])
    rgba[0, :, 0, 1] = torch.tensor([10, 20, 30, 51])  # a fifth
    out = over_background(rgba, torch.tensor([[200, 100, 50]]))
    assert out[0, :, 0, 0].tolist() == [10, 20, 30]
    assert out[0, :, 1, 1].tolist() == [200, 100, 50]
    assert out[0, :, 0, 1].tolist() == [162, 84, 46]
    emoji_rows(monkeypatch)
    one, same, other = (load(DataSpec(package="emoji", size=16, seed=s)) for s in (0, 0, 1))
    assert one.sha256 == same.sha256 != other.sha256 and one.input_shape == (3, 16, 16)


def test_watch_series_are_read_without_any_code_and_split_by_person(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {
        "windows": torch.arange(10).repeat_interleave(3).float().view(30, 1, 1).expand(30, 6, 128).contiguous(),
        "exercise": torch.arange(30) % 7,
        "person": torch.arange(10).repeat_interleave(3),
    }
    monkeypatch.setattr(packaged, "_kept", lambda name, make: held)
    found = load(DataSpec(package="watch"))
    people = [set(s.inputs[:, 0, 0].tolist()) for s in (found.train, found.calibration, found.test)]  # type: ignore[index,call-overload,union-attr]
    assert [len(p) for p in people] == [6, 2, 2] and len(set.union(*people)) == 10


def test_the_reader_of_object_arrays_builds_arrays_and_refuses_all_else(tmp_path: Path) -> None:
    import io

    good = np.empty(2, dtype=object)
    good[0], good[1] = np.arange(3.0), np.arange(4)
    # Protocol 3 spells the module's name as numpy 1 did, as the file in the package has it.
    stream = pickle.dumps(good, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    got = packaged._ArraysOnly(io.BytesIO(stream), encoding="latin1").load()
    assert got[0].tolist() == [0.0, 1.0, 2.0] and got[1].tolist() == [0, 1, 2, 3]

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(CompressError, match="no array needs"):
        packaged._ArraysOnly(io.BytesIO(pickle.dumps(Bomb()))).load()
    assert not (tmp_path / "ran").exists()


def test_faults_are_told_by_name(tmp_path: Path) -> None:
    def refused(part: str, **spec: object) -> CompressError:
        with pytest.raises(CompressError, match=part) as caught:
            load(DataSpec(**spec))  # type: ignore[arg-type]
        assert caught.value.where and caught.value.fix
        return caught.value

    refused("no such folder", folder=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refused("layout of the data is not known", folder=tmp_path / "empty")
    pickled = tmp_path / "cifar-10-batches-py"
    pickled.mkdir()
    (pickled / "data_batch_1").write_bytes(pickle.dumps({}))
    assert "binary version" in refused("pickle can run code", folder=pickled).fix
    cifar = write_cifar10(tmp_path / "c")[0]
    refused("no task", folder=cifar, tasks=["colour"])
    (cifar / "data_batch_3.bin").write_bytes(b"1" * 3074)
    refused("no multiple of 3,073", folder=cifar)
    classes = write_class_folders(tmp_path / "d")
    broken = next((classes / "train" / "bar").glob("*.png"))
    broken.write_bytes(b"no image")
    assert refused("image cannot be read", folder=classes, size=12).where == str(broken)
    (classes / "test" / "star").mkdir()
    refused("'star' is not among", folder=write_class_folders(classes))
    with pytest.raises(ValueError, match="name one of"):
        DataSpec(package="emoji", hub="a/b")


def test_a_damaged_file_of_the_cache_is_noticed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    made = {"images": torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8), "class": torch.tensor([1, 0])}
    asked: list[int] = []

    def kept() -> dict[str, torch.Tensor]:
        return packaged._kept("tiny-8", lambda: (asked.append(1), made)[1])

    def same() -> bool:
        found = kept()
        return found.keys() == made.keys() and all(torch.equal(found[n], t) for n, t in made.items())

    assert same() and same() and len(asked) == 1 and capsys.readouterr().err == ""
    path = tmp_path / "images" / "tiny-8.safetensors"
    whole = path.read_bytes()
    for number, at in enumerate((0, 9, 60, 150, len(whole) - 200, len(whole) - 1), 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert same() and len(asked) == number, at
        assert str(path) in capsys.readouterr().err
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-3])
    assert same() and same() and path.read_bytes() == whole
