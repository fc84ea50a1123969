"""Networks in ONNX: every output against torch on real samples, at any batch; a wrong file is found out, by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from compress.errors import CompressError
from compress.exporters.bench.local import compare_modules
from compress.exporters.onnx_module import FILE, check_module, export_module, input_shape, write_checked_module
from compress.exporters.ort import session
from compress.models.zoo import build
from tests.networks import shape_data
from tests.networks.test_train import TwoHeads

pytestmark = pytest.mark.processes


def inputs(count: int = 9) -> Tensor:
    data = shape_data()
    return data.prepare(data.test.inputs[torch.arange(count)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path]:
    """A sparse network whose norms have seen data, and its export."""
    model = build("resnet", {"depth": 8, "width": 4, "classes": 3})
    model.train()(inputs(50))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p[torch.rand(p.shape) < 0.8] = 0
    folder = tmp_path_factory.mktemp("onnx")
    facts = write_checked_module(model.eval(), inputs(), ["shape"], folder, 1e-4)
    assert facts["largest_difference"] <= 1e-4 and facts["samples"] == 9
    return model, folder


def test_the_file_gives_torchs_outputs_at_any_batch(small: tuple[torch.nn.Module, Path]) -> None:
    model, folder = small
    runtime = session(folder / FILE, 1)
    for count in (1, 2, 31):
        (got,) = runtime.run(["shape"], {"input": inputs(count).numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(inputs(count)).numpy(), rtol=1e-4, atol=1e-5)
    assert input_shape(folder) == [3, 12, 12]


def test_the_files_zeros_are_the_networks(small: tuple[torch.nn.Module, Path]) -> None:
    model, folder = small
    stored = [onnx.numpy_helper.to_array(i) for i in onnx.load(folder / FILE).graph.initializer]
    zeros = sum(int((v == 0).sum()) for v in stored if v.ndim == 4)
    assert zeros == sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 4)


def test_no_path_of_this_machine_is_in_the_file(small: tuple[torch.nn.Module, Path]) -> None:
    held = (small[1] / FILE).read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in held and b"site-packages" not in held


def test_a_changed_weight_is_found_and_its_layer_named(small: tuple[torch.nn.Module, Path], tmp_path: Path) -> None:
    model, folder = small
    graph = onnx.load(folder / FILE)
    weight = next(i for i in graph.graph.initializer if i.name.endswith("blocks.1.conv2.weight"))
    changed = onnx.numpy_helper.to_array(weight).copy()
    changed[0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(graph, tmp_path / FILE)
    with pytest.raises(CompressError, match=r"other values of blocks\.1\.conv2\.weight"):
        check_module(model, tmp_path, inputs(), ["shape"], tolerance=1e-4)


def test_two_heads_are_two_named_outputs_each_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TwoHeads().eval()
    facts = write_checked_module(model, inputs(), ["shape", "matte"], tmp_path, 1e-4)
    assert set(facts["outputs"]) == {"shape", "matte"}
    got = session(tmp_path / FILE, 1).run(["matte"], {"input": inputs(3).numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(inputs(3))["matte"].numpy(), rtol=1e-4, atol=1e-5)


def test_a_network_that_cannot_be_traced_is_one_error(tmp_path: Path) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(CompressError, match="cannot be exported"):
        export_module(Branches(), inputs(2), ["shape"], tmp_path)


def test_latency_is_measured_in_fresh_processes_and_raw_samples_are_kept(small: tuple[torch.nn.Module, Path]) -> None:
    spec = {"batch": 2, "processes": 2, "threads": 1, "min_seconds": 0.01, "min_runs": 2}
    found = compare_modules(small[1], small[1], spec)
    for label in ("dense", "pruned"):
        raw = found[label]["latency"]["raw"]
        assert len(raw) == 2 and all(len(r) >= 2 and min(r) > 0 for r in raw)
        assert found[label]["bytes"] == (small[1] / FILE).stat().st_size
    # The same file twice: the ratio is near 1 on the noisiest machine.
    assert 0.2 < found["ratios"]["latency"]["median"] < 5
    with pytest.raises(CompressError, match="there is no"):
        compare_modules(small[1] / "none", small[1], spec)
