"""What an artefact is made of, whatever its format."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from compress.errors import CompressError
from compress.exporters.bench.transport import artefact, folder_name


def files(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        weights = "weights.data" if "weights.data" in names else None
        (folder / name).write_bytes(graph(weights) if name.endswith(".onnx") else name.encode())
    return folder


def graph(weights: str | None) -> bytes:
    """An ONNX file, the bytes of its one weight in the file ``weights``."""
    weight = onnx.TensorProto(name="w", dims=[8], data_type=onnx.TensorProto.INT8, raw_data=bytes(8))
    if weights is not None:
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=weights)
    return bytes(onnx.ModelProto(graph=onnx.GraphProto(initializer=[weight])).SerializeToString())


def test_a_language_model_has_two_parts_and_their_weights(tmp_path: Path) -> None:
    made = artefact(files(tmp_path, "prefill.onnx", "decode.onnx", "weights.data", "other.data", "export.json"))
    assert made.format == "onnx" and set(made.parts) == {"prefill", "decode"}
    assert {p.name for p in made.files} == {"prefill.onnx", "decode.onnx", "weights.data"}
    assert made.bytes == 2 * len(graph("weights.data")) + len("weights.data")


def test_a_format_is_told_by_its_files_and_can_be_named_where_there_are_several(tmp_path: Path) -> None:
    folder = files(tmp_path, "model.onnx", "model.ort", "model.xml", "model.bin", "model.engine")
    assert artefact(folder).format == "onnx" and artefact(folder, "ort").parts["model"].name == "model.ort"
    assert {p.name for p in artefact(folder, "openvino").files} == {"model.xml", "model.bin"}
    assert artefact(folder, "tensorrt_rtx").parts["model"].name == "model.engine"
    assert artefact(folder / "model.ort").format == "ort"
    assert artefact(folder, file="model.ort").format == "ort"


def test_both_methods_of_an_executorch_program_lie_in_one_file(tmp_path: Path) -> None:
    folder = files(tmp_path, "model.pte")
    assert set(artefact(folder, "executorch").parts) == {"model"}
    (folder / "executorch.json").write_text(json.dumps({"components": {"prefill": {}, "decode": {}}}))
    made = artefact(folder, "executorch")
    assert {part: p.name for part, p in made.parts.items()} == {"prefill": "model.pte", "decode": "model.pte"}
    assert [p.name for p in made.files] == ["model.pte"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"there is no model\.ort, and no prefill\.ort with decode\.ort"):
        artefact(tmp_path, "ort")
    with pytest.raises(CompressError, match=r"a file \.zip is of no format"):
        artefact(files(tmp_path, "a.zip") / "a.zip")


def test_a_folder_on_the_device_is_named_by_names_and_contents(tmp_path: Path) -> None:
    a, b = files(tmp_path / "a", "model.onnx") / "model.onnx", files(tmp_path / "b", "model.onnx") / "model.onnx"
    assert folder_name([a]) == folder_name([b])
    b.write_bytes(b"other")
    assert folder_name([a]) != folder_name([b])
