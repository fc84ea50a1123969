"""Tables of images: what a row says is what is read, and a fault is told by file, row and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.folder_images import Fit, FolderImages
from compress.data.images import load
from compress.data.tasks import KINDS, Task
from compress.errors import CompressError
from compress.schema.sections import DataSpec

KINDS_SAID: Any = {"breed": "classes", "age": "number", "collar": "attribute", "tag": "attribute"}
HEAD = "path,breed,age,collar,tag,part"


def written(folder: Path, rows: int = 24, head: str = HEAD, **changes: str) -> Path:
    """A table and its images, of which no two are alike nor of one size; ``changes``: "COLUMN_ROW" -> another cell."""
    (folder / "photos").mkdir(parents=True)
    generator = np.random.default_rng(0)
    lines = [head]
    for i in range(rows):
        pixels = generator.integers(0, 256, (20 + i % 5, 24 + i % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        part = ("train", "train", "calibration", "test")[i % 4]
        row = {"path": f"photos/{i}.png", "breed": ("pug", "beagle")[i // 4 % 2], "age": str(i / 2)}
        row |= {"collar": str(i % 2), "tag": str(int(i % 3 == 0)), "part": part}
        row |= {k.rpartition("_")[0]: v for k, v in changes.items() if k.rpartition("_")[2] == str(i)}
        lines.append(",".join(row[name] for name in head.split(",")))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "labels.csv"


def spec(table: Path, **more: Any) -> DataSpec:
    given = {"columns": KINDS_SAID, "split_column": "part", "size": 16, "tasks": ["breed", "age", "attributes"], **more}
    return DataSpec(table=table, **given)


def test_every_column_is_read_as_what_it_is_and_every_row_is_in_its_part(tmp_path: Path) -> None:
    found = load(spec(written(tmp_path / "d")))
    assert [(t.name, t.kind, t.classes) for t in found.tasks] == [
        ("breed", "classes", ("beagle", "pug")),
        ("age", "number", ()),
        ("attributes", "attributes", ("collar", "tag")),
    ]
    rows = {name: [i for i in range(24) if ("train", "train", "calibration", "test")[i % 4] == name]
            for name in ("train", "calibration", "test")}  # fmt: skip
    for name, at in rows.items():
        split = getattr(found, name)
        assert len(split) == len(at)
        assert split.targets["breed"].tolist() == [1 - i // 4 % 2 for i in at]
        assert split.targets["age"].tolist() == [i / 2 for i in at]
        assert split.targets["attributes"].tolist() == [[i % 2, int(i % 3 == 0)] for i in at]
        lazy = FolderImages([tmp_path / "d" / "photos" / f"{i}.png" for i in at], Fit(16))
        assert torch.equal(split.inputs[torch.arange(len(at))], lazy[torch.arange(len(at))])
    ages = np.array([i / 2 for i in rows["train"]])
    assert found.tasks[1].centre == pytest.approx(ages.mean()) and found.tasks[1].scale == pytest.approx(ages.std())


def test_parts_that_no_column_says_are_drawn_and_are_disjoint(tmp_path: Path) -> None:
    found = load(spec(written(tmp_path / "d", 40), split_column=None))
    ages = [set(getattr(found, p).targets["age"].tolist()) for p in ("train", "calibration", "test")]
    assert sum(map(len, ages)) == 40 == len(set.union(*ages)) and all(ages)


def test_columns_of_text_are_classes_by_themselves(tmp_path: Path) -> None:
    table = written(tmp_path / "d", head="path,breed,part")
    assert load(DataSpec(table=table, split_column="part", size=16)).tasks == (
        Task("breed", "classes", ("beagle", "pug")),
    )


def test_what_is_unknown_counts_nowhere(tmp_path: Path) -> None:
    found = load(spec(written(tmp_path / "d", age_0="?", breed_1="?", collar_4="?"), unknown="?"))
    split = found.train
    assert split.targets["age"].isnan().tolist() == [True] + [False] * 11
    assert split.targets["breed"][1] == -1 and split.targets["attributes"][2, 0] == 255
    age = found.tasks[1]
    said = torch.randn(12, 1)
    counts = KINDS["number"].count(age, said, split.targets["age"])
    figures = KINDS["number"].measure(age, counts)
    known = ~split.targets["age"].isnan()
    off = (said[known, 0].double() * age.scale + age.centre - split.targets["age"][known].double()).abs()
    assert figures["mae"] == pytest.approx(float(off.mean()), rel=1e-5)
    assert figures["rmse"] == pytest.approx(float((off**2).mean().sqrt()), rel=1e-5)
    loss = KINDS["number"].loss(age, said, split.targets["age"], 0.0)
    scaled = off / age.scale
    huber = torch.where(scaled < 1, 0.5 * scaled**2, scaled - 0.5).sum()
    assert float(loss) == pytest.approx(float(huber), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "more", "what", "where"),
    [
        ({"path_3": "photos/none.png"}, {}, "there is no image 'photos/none.png'", "row 5, column 'path'"),
        ({"path_2": "../elsewhere.png"}, {}, "leaves", "row 4, column 'path'"),
        ({"path_2": "labels.csv"}, {}, "is no image", "row 4, column 'path'"),
        ({"breed_5": ""}, {}, "the cell is empty", "row 7, column 'breed'"),
        ({"age_6": ""}, {}, "the cell is empty", "row 8, column 'age'"),
        ({"breed_3": "poodle"}, {}, "the label 'poodle' is in no training row", "row 5, column 'breed'"),
        ({"age_9": "old"}, {}, "'old' is no number", "row 11, column 'age'"),
        ({"age_9": "inf"}, {}, "'inf' is no number", "row 11, column 'age'"),
        ({"collar_0": "yes"}, {}, "'yes' is neither 0 nor 1", "row 2, column 'collar'"),
        ({"part_1": "rest"}, {}, "'rest' is no part", "row 3, column 'part'"),
        ({"breed_1": "pug,extra"}, {}, "the row has 7 cells, and there are 6 columns", "row 3"),
        ({}, {"columns": {"bred": "classes"}}, "the table has no column 'bred'", "labels.csv"),
        ({}, {"columns": {}}, "the column 'age' holds numbers", "labels.csv"),
        ({}, {"path_column": "image"}, "the table has no column 'image'", "labels.csv"),
        ({}, {"columns": {"tag": "number", "breed": "number"}}, "'pug' is no number", "row 2, column 'breed'"),
    ],
)
def test_a_fault_is_one_error_with_its_row_and_column(
    tmp_path: Path, changes: dict[str, str], more: dict[str, Any], what: str, where: str
) -> None:
    table = written(tmp_path / "d", **changes)
    (tmp_path / "elsewhere.png").write_bytes((tmp_path / "d" / "photos" / "0.png").read_bytes())
    with pytest.raises(CompressError) as caught:
        load(spec(table, **more))
    assert what in caught.value.what and where in str(caught.value.where), caught.value


def test_an_image_that_is_none_is_told_by_its_name(tmp_path: Path) -> None:
    table = written(tmp_path / "d")
    (tmp_path / "d" / "photos" / "7.png").write_bytes(b"no image")
    with pytest.raises(CompressError, match="cannot be read") as caught:
        load(spec(table))
    assert str(caught.value.where).endswith("7.png")


def test_how_images_become_squares_is_said_and_workers_change_nothing(tmp_path: Path) -> None:
    written(tmp_path / "d")
    paths = [tmp_path / "d" / "photos" / f"{i}.png" for i in range(6)]
    at = torch.arange(6)
    one, many = (FolderImages(paths, Fit(16, workers=n)) for n in (1, 4))
    assert torch.equal(one[at], many[at]) and torch.equal(one.drawn(at, 3), many.drawn(at, 3))
    with Image.open(paths[1]) as image:
        for name, how in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
            want = torch.from_numpy(np.array(image.convert("RGB").resize((16, 16), how))).permute(2, 0, 1)
            assert torch.equal(FolderImages(paths, Fit(16, "stretch", resample=name))[at][1], want)  # type: ignore[arg-type]
    wide = FolderImages(paths, Fit(16, crop=1.0))
    assert not torch.equal(wide[at], one[at]) and wide.signature() != one.signature()


def test_classes_take_a_models_order_where_all_of_them_are_its_own(tmp_path: Path) -> None:
    table = written(tmp_path / "d")
    own = load(spec(table))
    more = {"labels": ["cat", "pug", "beagle"], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.5]}
    found = load(spec(table, **more))
    assert found.tasks[0].classes == ("cat", "pug", "beagle")
    assert torch.equal(found.test.targets["breed"], torch.tensor([2, 1])[own.test.targets["breed"]])
    x = found.prepare(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert x[0, :, 0, 0].tolist() == [2.0, 2.0, 1.0]
    other = load(spec(table, labels=["cat", "pug"]))
    assert other.tasks[0].classes == ("beagle", "pug") and "'beagle' is none of the 2" in other.notes[-1]
    with pytest.raises(CompressError, match="mean has 1"):
        load(spec(table, mean=[0.5], std=[0.5]))


@pytest.mark.parametrize("recipe", ["pagcp", "global-mp-network"])
def test_plan_reads_the_table_and_opens_no_image(tmp_path: Path, recipe: str) -> None:
    from tests.command import compress, one_error

    table = written(tmp_path / "d")
    (tmp_path / "d" / "photos" / "5.png").write_bytes(b"no image")
    network = "from torch import nn\n\ndef made():\n    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), "
    network += "nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))\n"
    (tmp_path / "net.py").write_text(network)
    settings = [f"data.table={table}", "data.columns={breed: classes}", "data.split_column=part", "data.size=16"]
    words = ("plan", f"{tmp_path / 'net.py'}:made", "-r", recipe, *(w for s in settings for w in ("--set", s)))
    assert compress(*words).code == 0
    (tmp_path / "d" / "photos" / "5.png").unlink()
    one_error(compress(*words), 1, "there is no image 'photos/5.png'", "row 7, column 'path'")
