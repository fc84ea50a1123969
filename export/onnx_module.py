"""A plain torch module to ONNX, and the proof that the file gives what torch gives.

One input, ``input`` (batch, ...), or several by name, with the batch dynamic; one output a task, under the task's name.
Zeros stay zeros in the file: a runtime multiplies by them, and the file is as large as the dense one.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.data.inputs import Inputs, call, first, form_of, formed, inputs_by_name, size
from compress.data.outputs import named
from compress.errors import CompressError
from compress.exporters.names import FILE, OPSET
from compress.exporters.onnx import forget_trace
from compress.exporters.ort import session
from compress.exporters.refused import refusal, still
from compress.exporters.tensors import read, walk
from compress.run.progress import say


class _Outputs(nn.Module):
    """The model's outputs as a tuple in a fixed order; where layers are named, theirs behind them."""

    def __init__(self, model: nn.Module, names: Sequence[str], layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.names, self.layers = model, list(names), list(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.of(x)

    def of(self, x: Inputs) -> tuple[Tensor, ...]:
        seen: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        hooks = [
            modules[name].register_forward_hook(lambda _m, _i, out, name=name: seen.setdefault(name, out))
            for name in self.layers
        ]
        out = call(self.model, x)
        for hook in hooks:
            hook.remove()
        heads = named(out, self.names) if self.names else {}
        return (*heads.values(), *(seen[name] for name in self.layers))


class _Several(nn.Module):
    """`_Outputs` of a network with several inputs, or with names for them, which an exporter calls in their order."""

    def __init__(self, outputs: _Outputs, form: str, names: Sequence[str]) -> None:
        super().__init__()
        self.outputs, self.form, self.inputs = outputs, form, list(names)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return self.outputs.of(formed(self.form, dict(zip(self.inputs, given, strict=True))))


def export_module(model: nn.Module, sample: Inputs, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Writes ``folder/model.onnx``.

    Args:
        model: gives one tensor, or a mapping from the names of its tasks.
        sample: (2 or more, ...), a tensor or several (`compress.data.inputs`); the batch becomes dynamic.
        names: the outputs' names, in their order in the file.

    Returns:
        ``{"bytes": {file: size}, "seconds"}``.

    Raises:
        CompressError: the exporter cannot handle the model.
    """
    began = time.monotonic()
    _write(_Outputs(model, names).eval(), sample, list(names), folder / FILE)
    return {"bytes": {FILE: (folder / FILE).stat().st_size}, "seconds": round(time.monotonic() - began, 1)}


def _write(outputs: _Outputs, sample: Inputs, names: list[str], path: Path) -> None:
    import onnx_ir as ir

    program = _program(outputs, sample, names)
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        assert value.shape is not None  # the exporter writes one
        value.shape = ir.Shape([n if isinstance(n, int) else "batch" for n in value.shape])
    forget_trace(program.model)
    ir.save(program.model, path)


def refuse_untraceable(model: nn.Module, sample: Inputs, names: Sequence[str]) -> None:
    """Raises CompressError where the exporter cannot handle a network: asked before it is trained."""
    _program(_Outputs(model, names).eval(), sample, list(names))


def _program(outputs: _Outputs, sample: Inputs, names: list[str]) -> Any:
    import logging

    say("tracing the network for ONNX")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages it can do without
    module, feed, batch = _traceable(outputs, sample), inputs_by_name(sample), torch.export.Dim("batch")
    # Behind a star all inputs are one argument.
    shapes: Any = ({0: batch},) if isinstance(module, _Outputs) else (tuple({0: batch} for _ in feed),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the exporter, nothing a user can act on
        traced = None
        try:
            with still():
                traced = torch.export.export(module, tuple(feed.values()), dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(
                    traced, dynamo=True, opset_version=OPSET, input_names=list(feed), output_names=names, verbose=False
                )
        except Exception as e:  # a user's own forward may raise anything
            raise refusal(e, "ONNX", module, traced) from e
    assert program is not None
    return program


def _traceable(outputs: _Outputs, sample: Inputs) -> nn.Module:
    form = form_of(sample)
    return outputs if form == "tensor" else _Several(outputs, form, list(inputs_by_name(sample))).eval()


@torch.no_grad()
def check_module(
    model: nn.Module, folder: Path, inputs: Inputs, names: Sequence[str], *, tolerance: float, threads: int = 1
) -> dict[str, Any]:
    """Compares ONNX Runtime with torch on real ``inputs`` (n, ...), in one batch and the first alone.

    Returns:
        ``{"outputs": {name: largest difference, relative to the largest value}, "tolerance", "samples", "agree"}``;
        ``agree`` is the share of samples for which the largest class is the same, by output.

    Raises:
        CompressError: an output differs by more than ``tolerance``; the first layer at fault is named.
    """
    runtime = session(folder / FILE, threads)
    outputs = _Outputs(model, names).eval()
    worst: dict[str, float] = dict.fromkeys(names, 0.0)
    agree: dict[str, float] = {}
    for part in (inputs, first(inputs, 1)):
        want = outputs.of(part)
        got = runtime.run(list(names), _feed(part))
        for name, w, g in zip(names, want, got, strict=True):
            expected = w.numpy()
            scale = float(np.abs(expected).max()) or 1.0
            # np.maximum, not max: NaN must come through.
            worst[name] = float(np.maximum(worst[name], np.abs(expected - g).max() / scale))
            if expected.ndim == 2 and size(part) > 1:
                agree[name] = float((expected.argmax(1) == g.argmax(1)).mean())
    bad = {name: value for name, value in worst.items() if not value <= tolerance}
    if bad:
        name, value = next(iter(bad.items()))
        fault = first_fault(model, folder, first(inputs, 2))
        raise CompressError(
            f"the exported network differs from torch: {name} by {value:.2e}; {fault}",
            where=str(folder),
            fix="export it again; where it stays, this torch or ONNX Runtime version is at fault (`compress doctor`)",
        )
    return {"outputs": worst, "tolerance": tolerance, "samples": size(inputs), "agree": agree}


def _feed(x: Inputs) -> dict[str, Any]:
    return {name: t.numpy() for name, t in inputs_by_name(x).items()}


@torch.no_grad()
def first_fault(model: nn.Module, folder: Path, inputs: Inputs, tolerance: float = 1e-3) -> str:
    """Names the first layer of an exported file whose weights or output differ from torch's."""
    import onnx

    whole = read(folder / FILE, weights=True)
    stored = {held.name: onnx.numpy_helper.to_array(held.tensor) for held in walk(whole)}
    for name, parameter in model.named_parameters():
        held = stored.get(f"model.{name}")
        if held is None or held.shape != parameter.shape or parameter.dim() < 2:
            continue
        want, found = parameter.flatten(1).double().numpy(), held.reshape(len(held), -1).astype(np.float64)
        # The exporter folds a norm into the layer before it: a factor for every output channel.
        factor = (want * found).sum(1) / np.maximum((want * want).sum(1), 1e-300)
        if np.abs(found - factor[:, None] * want).max() > 1e-4 * np.abs(found).max():
            return f"the file holds other values of {name}"
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear)]
    once = _Outputs(model, [], layers).eval()
    path = folder / ".layers.onnx"
    try:
        keys = [f"layer {i}" for i in range(len(layers))]
        _write(once, inputs, keys, path)
        got = session(path, 1).run(keys, _feed(inputs))
        for name, told, given in zip(layers, once.of(inputs), got, strict=True):
            scale = float(told.abs().max()) or 1.0
            if not float(np.abs(told.numpy() - given).max()) / scale <= tolerance:
                return f"first in the output of {name}"
    except CompressError as e:
        return f"which layer cannot be told ({e.what})"
    finally:
        path.unlink(missing_ok=True)
    return "every linear and convolutional layer agrees, so the fault is behind the last of them or in this one file"


def write_checked_module(
    model: nn.Module, inputs: Inputs, names: Sequence[str], folder: Path, tolerance: float
) -> dict[str, Any]:
    """Exports into the empty ``folder`` and compares on ``inputs`` (2 or more, ...); the facts go into export.json too.

    Raises:
        CompressError: the export or the comparison failed.
    """
    made = export_module(model, first(inputs, 2), names, folder)
    parity = check_module(model, folder, inputs, names, tolerance=tolerance)
    facts: dict[str, Any] = {
        **made,
        "largest_difference": max(parity["outputs"].values()),
        "outputs_compared": len(parity["outputs"]),
        **parity,
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def input_shape(folder: Path) -> list[int]:
    """The shape of one sample, without the batch."""
    graph = read(folder / FILE).graph
    return [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim[1:]]
