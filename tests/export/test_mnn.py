"""Networks in MNN: outputs are torch's, zeros are left out of the file, what is wrong is found out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("MNN", reason="needs the extra [mnn]")

from compress.errors import CompressError, UsageError
from compress.exporters import mnn
from compress.exporters.bench.local import compare_modules
from compress.exporters.mnn import CONVERT, FILE, check_mnn, export_mnn, run_mnn, write_checked_mnn
from compress.exporters.onnx_module import export_module
from compress.models.zoo import build
from tests.command import compress, one_error
from tests.compress.test_network import NETWORK, RECIPE
from tests.export.test_onnx_module import inputs
from tests.networks import write_class_folders
from tests.networks.test_train import TwoHeads

Made = tuple[nn.Module, Path]


def network(sparsity: float, *, block: int = 1) -> nn.Module:
    """A small MobileNet whose norms have seen data, its 1x1 convolutions pruned in blocks of output channels."""
    model = build("mobilenet-v1", {"width": 0.25, "classes": 3, "stem": "cifar"}, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1):
                out, width = m.weight.shape[:2]
                drawn = torch.rand(out // block, width, generator=generator)
                m.weight[(drawn < sparsity).repeat_interleave(block, 0)] = 0
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = 1.0
        model.train()(inputs(50))
    return model.eval()


def exported(folder: Path, sparsity: float) -> Made:
    model = network(sparsity)
    export_module(model, inputs(2), ["shape"], folder)
    facts = write_checked_mnn(model, inputs(), ["shape"], folder, 1e-4)
    assert facts["largest_difference"] <= 1e-4 and facts["samples"] == 9
    assert facts["bytes"] == {FILE: (folder / FILE).stat().st_size}
    assert json.loads((folder / "mnn.json").read_text()) == facts
    return model, folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return exported(tmp_path_factory.mktemp("dense"), 0.0)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return exported(tmp_path_factory.mktemp("pruned"), 0.9)


def layers(path: Path) -> list[dict[str, Any]]:
    """The convolutions as MNN's own converter writes them out."""
    dumped = path.parent / "dump.json"
    arguments = ["-f", "MNN", "--modelFile", str(path), "--JsonFile", str(dumped)]
    subprocess.run([sys.executable, "-c", CONVERT, *arguments], check=True, capture_output=True)
    ops = json.loads(dumped.read_text())["oplists"]
    return [op["main"] for op in ops if op["type"] in ("Convolution", "ConvolutionDepthwise")]


def test_mnn_gives_torchs_outputs_at_any_batch(pruned: Made) -> None:
    model, folder = pruned
    for count in (1, 2, 31):
        (got,) = run_mnn(folder / FILE, inputs(count).numpy(), ["shape"])
        with torch.no_grad():
            want = model(inputs(count)).numpy()
        assert want.std() > 0.01  # a network that says nothing would agree with anything
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_pruned_layers_and_only_they_are_stored_and_run_without_zeros(dense: Made, pruned: Made) -> None:
    for folder, pointwise in ((dense[1], 0), (pruned[1], 13)):
        sparse = [layer for layer in layers(folder / FILE) if layer.get("sparseParameter")]
        assert len(sparse) == pointwise
    weights = sum(m.weight.numel() for m in pruned[0].modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    saved = (dense[1] / FILE).stat().st_size - (pruned[1] / FILE).stat().st_size
    assert saved > 0.4 * 4 * weights  # of the 90 %: each value that is left has its place beside it


def test_without_the_flag_zeros_are_multiplied_by(pruned: Made, tmp_path: Path) -> None:
    export_mnn(pruned[1] / "model.onnx", tmp_path, sparse=False)
    assert not any(layer.get("sparseParameter") for layer in layers(tmp_path / FILE))


def test_blocks_of_output_channels_are_told_to_the_runtime_and_give_the_same_outputs(tmp_path: Path) -> None:
    model = network(0.9, block=4)
    export_module(model, inputs(2), ["shape"], tmp_path)
    export_mnn(tmp_path / "model.onnx", tmp_path, block=4)
    found = [layer["sparseParameter"] for layer in layers(tmp_path / FILE) if layer.get("sparseParameter")]
    assert found and all({"key": "sparseBlockOC", "i": 4}.items() <= _named(f, "sparseBlockOC").items() for f in found)
    check_mnn(model, tmp_path, inputs(), ["shape"], tolerance=1e-4)


def _named(parameter: dict[str, Any], key: str) -> dict[str, Any]:
    return next(a for a in parameter["args"] if a["key"] == key)


def test_a_file_of_another_network_is_found_out(dense: Made, pruned: Made) -> None:
    with pytest.raises(CompressError, match="differs from torch: shape by"):
        check_mnn(dense[0], pruned[1], inputs(), ["shape"], tolerance=1e-4)


def test_two_heads_are_two_named_outputs_each_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    export_module(model, inputs(2), ["shape", "matte"], tmp_path)
    facts = write_checked_mnn(model, inputs(), ["shape", "matte"], tmp_path, 1e-4)
    assert set(facts["outputs"]) == {"shape", "matte"}
    (got,) = run_mnn(tmp_path / FILE, inputs(3).numpy(), ["matte"])
    with torch.no_grad():
        np.testing.assert_allclose(got, model(inputs(3))["matte"].numpy(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_converted_or_run_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no model")
    (tmp_path / FILE).write_text("an older file, which must not pass for the new one")
    with pytest.raises(CompressError, match="MNN cannot convert"):
        export_mnn(tmp_path / "model.onnx", tmp_path)
    (tmp_path / FILE).write_text("no model")
    with pytest.raises(CompressError, match="MNN cannot run"):
        run_mnn(tmp_path / FILE, inputs(1).numpy(), ["shape"])


def test_outputs_that_the_kernels_for_zeros_get_wrong_are_refused_and_told_apart(tmp_path: Path) -> None:
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3}, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p[torch.rand(p.shape) < 0.9] = 0
        model.train()(inputs(50))
    export_module(model.eval(), inputs(2), ["shape"], tmp_path)
    try:
        write_checked_mnn(model, inputs(), ["shape"], tmp_path, 1e-3)
    except CompressError as e:
        assert "kernels for zeros are wrong" in str(e)
    else:
        pytest.skip("this MNN computes it right on this processor")


def test_a_missing_runtime_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mnn.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="not installed") as caught:
        export_mnn(tmp_path / "model.onnx", tmp_path)
    assert "compress-toolchain[mnn]" in str(caught.value.fix)


def test_the_converter_that_is_called_sends_nothing_away(pruned: Made, tmp_path: Path) -> None:
    """MNN's own script would import what sends usage figures; ours must not."""
    arguments = ["-f", "ONNX", "--modelFile", str(pruned[1] / "model.onnx"), "--MNNModel", str(tmp_path / FILE)]
    code = f"{CONVERT}\nassert not [m for m in sys.modules if m.split('.')[0] in ('aliyun', 'urllib', 'socket', 'MNN')]"
    subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}", *arguments], check=True
    )
    assert (tmp_path / FILE).exists()


def test_latency_of_mnn_is_measured_in_fresh_processes(dense: Made, pruned: Made) -> None:
    spec = {"batch": 1, "processes": 2, "threads": 1, "min_seconds": 0.05, "min_runs": 3}
    found = compare_modules(dense[1], pruned[1], spec, FILE)
    assert found["spec"]["runtime"].startswith("MNN ")
    assert found["pruned"]["bytes"] == (pruned[1] / FILE).stat().st_size
    assert all(len(raw) >= 3 and min(raw) > 0 for raw in found["pruned"]["latency"]["raw"])
    # 90 % zeros in half of a tiny network's work: the noise of a busy machine may hide it, never turn it round.
    assert found["ratios"]["latency"]["median"] > 0.5


def test_a_recipe_that_names_mnn_exports_checks_measures_and_publishes_it(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data", 30, 9)
    (tmp_path / "mine.py").write_text(NETWORK)
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("FOLDER", str(tmp_path)))
    wide = ["--set", "arguments.width=8"]
    words = [
        "prune",
        f"{tmp_path / 'mine.py'}:small",
        "--recipe",
        tmp_path / "mine.yaml",
        "--set",
        "train.epochs=1",
        *wide,
    ]
    one_error(compress(*words, "--out", tmp_path / "x", "--set", "export.formats=[mnn]"), 2, "name onnx", "formats")
    ran = compress(*words, "--out", tmp_path / "run", "--set", "export.formats=[onnx, mnn]", "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    facts, released = report["export"]["mnn"], tmp_path / "run" / "release" / "mnn" / FILE
    assert facts["pruned"]["bytes"] == {FILE: released.stat().st_size} and facts["size_ratio"] < 0.8
    assert facts["pruned"]["largest_difference"] <= 1e-3
    assert report["bench"]["mnn"]["spec"]["runtime"].startswith("MNN ")
    assert report["bench"]["spec"]["runtime"].startswith("onnxruntime ")
    card = (tmp_path / "run" / "release" / "README.md").read_text()
    assert "batch 1, MNN |" in card and "MNN against torch" in card and "`mnn/model.mnn`" in card
