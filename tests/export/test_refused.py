"""What no exporter can take: one line that names the operator and its layer."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto as T
from onnx import helper
from torch import Tensor, nn

from compress.errors import CompressError
from compress.exporters.formats import BuildOptions, Source, make
from compress.exporters.onnx_module import export_module
from compress.exporters.refused import plain
from tests.export.test_formats import here

pytestmark = pytest.mark.processes

LIBRARY = torch.library.Library("strange", "DEF")
LIBRARY.define("twist(Tensor x) -> Tensor")
LIBRARY.impl("twist", lambda x: x * 2, "CPU")


@torch.library.register_fake("strange::twist")
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigh(x @ x.transpose(1, 2))[0]


class Twist(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.strange.twist(x)
        return found


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Length(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(int(x[0, 0, 0].item())).sum()


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()) * 2


class Net(nn.Module):
    """The strange layer is ``body.1``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.stem, self.body = nn.Linear(4, 4), nn.Sequential(nn.ReLU(), inner)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.body(self.stem(x))}


def refused(error: CompressError, *parts: str) -> None:
    """One line, with these words and nothing of an exporter's pages."""
    for part in parts:
        assert part in error.what or part in error.where, (error.what, error.where)
    for text in (error.what, error.where, error.fix):
        assert len(text) < 400 and text.isprintable() and "Next steps" not in text and "http" not in text, text


@pytest.mark.parametrize(
    ("inner", "parts"),
    [
        (Eigen, ("ONNX has no operator aten._linalg_eigh", "body.1 (Eigen)")),
        (Twist, ("ONNX has no operator strange.twist", "body.1 (Twist)")),
        (Branch, ("values that are known only when it runs", "body.1 (Branch)", "if x.sum() > 0:")),
        (Length, ("values that are known only when it runs", "body.1 (Length)", "torch.zeros(int(x[0, 0, 0].item()))")),
        (Foreign, ("numpy() is not supported", "body.1 (Foreign)")),
    ],
)
def test_what_cannot_become_onnx_is_named_with_its_layer(
    inner: type[nn.Module], parts: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CompressError) as e:
        export_module(Net(inner()).eval(), torch.randn(2, 4, 4), ["y"], tmp_path)
    refused(e.value, *parts)
    # torch prints the graph so far; a command's output is its answer alone.
    out, err = capfd.readouterr()
    assert out == "" and "def forward" not in err


def graph(path: Path, operator: str) -> Path:
    nodes = [
        helper.make_node("Relu", ["input"], ["r"], name="/stem/Relu"),
        helper.make_node(operator, ["r"], ["y"], name="/body/strange"),
    ]
    given = helper.make_tensor_value_info("input", T.FLOAT, [2, 4, 4])
    made = helper.make_tensor_value_info("y", T.FLOAT, [2] if operator == "Det" else [2, 4, 4])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [given], [made]), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("inner", "parts"),
    [
        (Eigen, ("ExecuTorch has no operator aten._linalg_eigh", "body.1 (Eigen)")),
        (Twist, ("ExecuTorch has no operator strange.twist", "body.1 (Twist)")),
        (Branch, ("values that are known only when it runs", "body.1 (Branch)")),
    ],
)
def test_what_executorch_lacks_is_named_before_it_is_loaded(
    inner: type[nn.Module], parts: tuple[str, ...], tmp_path: Path
) -> None:
    here("executorch")
    graph(tmp_path / "model.onnx", "Identity")  # names inputs and outputs; what is built is the module
    with pytest.raises(CompressError) as e:
        make(Source(tmp_path, Net(inner()).eval()), tmp_path / "out", BuildOptions("executorch"))
    refused(e.value, *parts)


@pytest.mark.parametrize("form", ["openvino", "tensorrt_rtx", "mnn"])
def test_what_a_reader_of_onnx_does_not_take_is_named_with_its_node(form: str, tmp_path: Path) -> None:
    here(form)
    operator = "Det" if form != "mnn" else "Celu"
    path = graph(tmp_path / "a.onnx", operator)
    if form == "mnn":  # an operator that no runtime has
        model = onnx.load(path)
        model.graph.node[1].domain, model.graph.node[1].op_type = "strange", "Twist"
        model.opset_import.append(helper.make_opsetid("strange", 1))
        onnx.save(model, path)
        operator = "Twist"
    with pytest.raises(CompressError) as e:
        make(Source(path), tmp_path / "out", BuildOptions(form))
    refused(e.value, f"the operator {operator} of the node '/body/strange'", "a.onnx")


def test_the_first_line_that_says_something_is_taken_without_its_colours() -> None:
    said = "\n- Next steps:\n\x1b[1m\x1b[31mNo \x1b[0m kernel\tfor  Foo\x1b[96m\nFor more, see https://x.y"
    assert plain(said) == "No kernel for Foo"
    assert plain("\x1b[0m\n") == plain("") == "it does not say why"
    assert plain("\x1b]0;title\x07words") == "words" and len(plain("x" * 10**5)) == 300
