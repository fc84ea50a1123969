"""Models by a name of others: what their own files say of weights, images and classes is what a run starts from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data.images import load
from compress.errors import CompressError, UsageError
from compress.models.zoo import build
from compress.networks import published as of_others
from compress.networks.setup import NetworkSetup, dense_network, loaded, prepare, real_inputs
from compress.pipeline import METHODS
from compress.run.folder import Run
from compress.schema.recipe import load_recipe
from tests.data.test_table import written

LABELS = ["pug", "beagle", "cat"]
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}, "crop_pct": 0.875, "resample": 3,
    "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.5],
}  # fmt: skip


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet that transformers itself has saved."""
    import transformers

    folder = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3,
        id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    transformers.ResNetForImageClassification(config).eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def setup_of(model: str, table: Path, *more: str) -> NetworkSetup:
    words = [f"data.table={table}", "data.columns={breed: classes}", "data.split_column=part", "train.epochs=0", *more]
    recipe = load_recipe("pagcp", METHODS, words)
    return prepare(model, recipe)


def test_a_folder_of_transformers_starts_from_its_weights_its_images_and_its_classes(
    resnet: Path, tmp_path: Path
) -> None:
    import transformers

    setup = setup_of(str(resnet), written(tmp_path / "d"))
    assert setup.data.tasks[0].classes == tuple(LABELS) and setup.data.input_shape == (3, 32, 32)
    dense = dense_network(Run(tmp_path / "run"), setup)
    own = transformers.ResNetForImageClassification.from_pretrained(resnet).eval()
    x = real_inputs(setup, 3)
    with torch.no_grad():
        torch.testing.assert_close(loaded(setup, dense)(x), own(pixel_values=x).logits)
    # What a processor does with an image is done here: resized by bicubics, the middle cut out, normalised.
    row = next(i for i in range(24) if i % 4 == 3)
    with Image.open(tmp_path / "d" / "photos" / f"{row}.png") as image:
        scale = 36 / min(image.size)
        wide = image.resize([max(32, round(s * scale)) for s in image.size], Image.Resampling.BICUBIC)
        left, top = ((s - 32) // 2 for s in wide.size)
        pixels = np.array(wide.crop((left, top, left + 32, top + 32))).astype(np.float32) / 255
    want = (pixels - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), want, atol=1e-5)


def test_classes_of_ones_own_get_a_head_of_their_own_and_something_that_trains_it(resnet: Path, tmp_path: Path) -> None:
    table = written(tmp_path / "d")
    words = ("data.columns={tag: classes}",)
    setup = setup_of(str(resnet), table, *words)
    with pytest.raises(UsageError, match="tells 3 classes apart and the data has 2 of its own"):
        dense_network(Run(tmp_path / "run"), setup)
    setup = setup_of(str(resnet), table, *words, "train.epochs=1")
    model = setup.build()
    drawn = model.net.classifier[1].weight.clone()  # type: ignore[union-attr,index]
    assert setup.load is not None
    setup.load(setup, model)
    import transformers

    own = transformers.ResNetForImageClassification.from_pretrained(resnet)
    assert torch.equal(model.net.classifier[1].weight, drawn) and drawn.shape == (2, 16)  # type: ignore[union-attr,index]
    assert torch.equal(model.net.resnet.embedder.embedder.convolution.weight,  # type: ignore[union-attr]
                       own.resnet.embedder.embedder.convolution.weight)  # fmt: skip


def test_a_segmenter_gives_a_map_of_the_images_size() -> None:
    config = {
        "model_type": "segformer", "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
        "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 2],
    }  # fmt: skip
    arguments = {"config": config, "head": "ForSemanticSegmentation", "classes": 5}
    model = build("transformers-image", arguments).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 32)).shape == (2, 5, 64, 32)


@pytest.mark.parametrize(
    ("said", "want"),
    [
        ({"size": {"height": 224, "width": 224}, "resample": 2}, {"size": 224, "fit": "stretch"}),
        ({"size": 224, "do_center_crop": False}, {"size": 224, "fit": "stretch"}),
        (
            {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}},
            {"size": 224, "fit": "crop", "crop": 0.875},
        ),
        ({**PROCESSOR, "size": {"shortest_edge": 384}}, {"size": 384, "fit": "stretch"}),
        ({"do_normalize": False, "size": 64}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        ({"do_rescale": False, "size": 64, "image_mean": [127.5] * 3, "image_std": [255] * 3}, {"mean": [0.5] * 3}),
        ({}, {"size": 96, "mean": [0.485, 0.456, 0.406]}),
    ],
)  # fmt: skip
def test_what_a_processor_says_is_said_in_the_words_of_a_recipe(said: dict[str, Any], want: dict[str, Any]) -> None:
    found = of_others._data(said, {"image_size": 96}, "preprocessor_config.json")
    for key, value in want.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, list | float) else value), (key, found)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"architectures": ["ResNetModel"]}, "no image classifier or segmenter"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "no image classifier or segmenter"),
        ({"model_type": "nosuch"}, "has no model 'nosuch'"),
        ({"depths": [1, 10**9]}, "depths is 1000000000"),
        ({"hidden_sizes": [8, 10**9]}, "hidden_sizes is 1000000000"),
        ({"auto_map": {"AutoModel": "x.py"}, "hidden_sizes": [8, 12]}, "does not load it|do not fit|not in its folder"),
    ],
)
def test_a_folder_that_is_not_what_it_says_is_one_error(
    resnet: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(resnet, folder)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompressError, match=what):
        setup = setup_of(str(folder), written(tmp_path / "d"))
        dense_network(Run(tmp_path / "run"), setup)


def test_timm_is_asked_for_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="need timm, and it cannot be imported") as caught:
        setup_of("timm:resnet18", written(tmp_path / "d"))
    assert "pip install timm" in str(caught.value.fix)


def test_a_network_of_timm_is_built_by_its_name(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is in no environment of the project: see docs/guide/jobs.md")
    setup = setup_of("timm:resnet10t", written(tmp_path / "d"), "train.epochs=1", "data.size=32")
    assert load(setup.spec).input_shape == (3, 32, 32)
    own = timm.create_model("resnet10t", num_classes=2).state_dict()
    assert {k: v.shape for k, v in setup.build().state_dict().items()} == {k: v.shape for k, v in own.items()}
    with pytest.raises(UsageError, match="no network 'resnet10x'"):
        setup_of("timm:resnet10x", tmp_path / "d" / "labels.csv")
    with pytest.raises(UsageError, match="neither trained nor loaded"):
        setup_of("timm:resnet10t", tmp_path / "d" / "labels.csv")


def test_a_head_is_what_tells_other_classes_apart_and_nothing_else() -> None:
    said = {"net.weight": (3, 3), "decode_head.mix.weight": (3, 5), "decode_head.classifier.weight": (3, 5)}
    held, more = (
        {k: torch.zeros(v) for k, v in of.items()} for of in (said, {**said, "decode_head.classifier.weight": (7, 5)})
    )
    assert of_others._heads(held, held, 3, other=False) == set()
    assert of_others._heads(held, held, 3, other=True) == {"decode_head.classifier.weight"}
    assert of_others._heads(held, more, 3, other=True) == {"decode_head.classifier.weight"}
