"""The exported model against torch: every output compared; on failure the first layer that differs is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from compress.data.special import begun, endings
from compress.errors import CompressError
from compress.exporters.bisect import largest_difference
from compress.exporters.onnx import cached_layers
from compress.exporters.ort import Arrays, OrtLLM

if TYPE_CHECKING:
    from compress.exporters.formats import BuildOptions, Source
    from compress.exporters.runtimes import Runner

    Load = Callable[[Path, str, BuildOptions], Runner]

# The largest difference allowed between a built file and the ONNX file it was made of, relative to the largest value of
# the output: what each precision can hold, times what some tens of layers add up.
TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "fp16": 3e-2, "bf16": 1e-1, "int8": 3e-1, "int8-weights": 1e-1}


def check_llm(
    model: Any, folder: Path, *, tolerance: float, vocab: int, threads: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Compares `prefill` and `decode` with torch, at two batch sizes and lengths, one of them left-padded.

    Returns:
        ``{"outputs": {name: largest relative difference}, "tolerance", "cases"}``; a difference is relative to the
        largest absolute value of torch's output.

    Raises:
        CompressError: an output differs by more than ``tolerance``; the first layer at fault is named.
    """
    runtime = OrtLLM(folder, threads)
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, float] = {}
    cases = [(1, 7, 0), (2, 12, 4)]
    for batch, length, padding in cases:
        ids = torch.randint(0, vocab, (batch, length + 3), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        first, then = ids[:, :length], ids[:, length:]
        want = _torch(model, first, mask[:, :length], None)
        got = runtime.prefill(first.numpy(), mask[:, :length].numpy())
        real = mask[:, :length].numpy().astype(bool)
        _compare("prefill", want, got, worst, real, last_only=True)
        want = _torch(model, then, mask, want)
        got = runtime.decode(then.numpy(), got, mask.numpy())
        _compare("decode", want, got, worst, mask.numpy().astype(bool), last_only=False)
    bad = {name: value for name, value in worst.items() if not value <= tolerance}
    if bad:
        raise CompressError(
            f"the exported model differs from torch: {first_fault(bad, [i for i, *_ in cached_layers(model)])}",
            where=str(folder),
            fix="export it again; where it stays, this torch or ONNX Runtime version is at fault (`compress doctor`)",
        )
    return {"outputs": worst, "tolerance": tolerance, "cases": len(cases)}


def first_fault(bad: dict[str, float], cached: list[int]) -> str:
    """Names the earliest layer among outputs that differ: a layer's cache is the first to show what was done before it.

    Args:
        cached: the layers that keep a cache; one without attention shows nothing of its own.
    """
    caches = sorted((int(name.split(".")[-2]), name) for name in bad if "present." in name)
    if not caches:
        name = next(iter(bad))
        return f"{name} by {bad[name]:.2e}; every layer's cache agrees, so the fault is behind the last of them"
    layer, name = caches[0]
    found = f"first at the inputs of layer {layer}'s cache ({name} by {bad[name]:.2e})"
    if not layer:
        return found
    since = max((c for c in cached if c < layer), default=0)
    suspects = f"layer {since}" if since == layer - 1 else f"layers {since} to {layer - 1}"
    return f"{found}, so the fault is in {suspects} or in layer {layer}'s projections"


def _torch(model: Any, ids: torch.Tensor, mask: torch.Tensor, before: Arrays | None) -> Arrays:
    from transformers import DynamicCache

    layers = [layer for layer, *_ in cached_layers(model)]
    cache: Any = DynamicCache()
    if before is not None:
        for layer in layers:
            cache.update(
                torch.from_numpy(before[f"present.{layer}.key"]),
                torch.from_numpy(before[f"present.{layer}.value"]),
                layer,
            )
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
    found = {"logits": logits.numpy()}
    for layer in layers:
        found[f"present.{layer}.key"] = cache.layers[layer].keys.numpy()
        found[f"present.{layer}.value"] = cache.layers[layer].values.numpy()
    return found


def _compare(
    graph: str, want: Arrays, got: Arrays, worst: dict[str, float], real: NDArray[np.bool_], last_only: bool
) -> None:
    for name, expected in want.items():
        found = got[name]
        if name == "logits":
            expected = expected[:, -1:] if last_only else expected
            difference = np.abs(expected - found)
        else:
            # (b, heads, t, d); what stands at padded positions is never read.
            where = real[:, None, :, None]
            expected = np.where(where, expected, 0.0)
            difference = np.abs(expected - np.where(where, found, 0.0))
        scale = float(np.abs(expected).max()) or 1.0
        key = f"{graph}.{name}"
        # np.maximum, not max: NaN must come through.
        worst[key] = float(np.maximum(worst.get(key, 0.0), difference.max() / scale))


def greedy_agrees(
    model: Any, folder: Path, tokenizer: Any, prompt: str, tokens: int, threads: int = 2
) -> dict[str, Any]:
    """Greedy text from ONNX Runtime and from torch's own `generate`, up to the first token that ends a text: `generate`
    is not let end, and takes another there.

    Raises:
        CompressError: they differ.
    """

    def run(ids: Sequence[int], count: int) -> list[int]:
        return OrtLLM(folder, threads).greedy(np.array([ids], np.int64), count)

    return greedy_same(model, tokenizer, run, prompt, tokens, folder)


def greedy_same(
    model: Any, tokenizer: Any, run: Callable[[list[int], int], list[int]], prompt: str, tokens: int, where: Path
) -> dict[str, Any]:
    """Greedy text of a runtime, ``run(ids, tokens)``, and of torch's own `generate`, as `greedy_agrees` compares them.

    Raises:
        CompressError: they differ.
    """
    ids, ends = torch.tensor([begun(tokenizer, prompt)]), endings(tokenizer)  # (1, n)
    with torch.no_grad():
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=next(iter(ends), None),
        )
    want = whole[0, ids.shape[1] :].tolist()
    got = run(ids[0].tolist(), tokens)
    end = next((i for i, token in enumerate(got) if token in ends), len(got))
    want = want[:end]
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), None)
    if at is not None:
        raise CompressError(
            f"greedy text differs from torch's at token {at}: {tokenizer.decode([got[at]])!r}, torch"
            f" {tokenizer.decode([want[at]])!r}",
            where=str(where),
            fix="see the parity of the outputs; a tie between two tokens can be told by another prompt",
        )
    return {"prompt": prompt, "tokens": len(want), "text": tokenizer.decode(got)}


def check_built(source: Source, folder: Path, options: BuildOptions, load: Load) -> dict[str, Any]:
    """Runs what was built and compares every output with the ONNX file in ONNX Runtime, its graph left as it is.

    Args:
        load: the format's own.

    Returns:
        ``{"outputs": {component.output: largest relative difference}, "tolerance", "samples", "runtime"}``, or
        ``{"skipped": reason}`` where the runtime or its driver is not here.

    Raises:
        CompressError: an output differs by more than the tolerance, or the file does not run; the first node at fault
            is named.
    """
    from compress.exporters import formats, runtimes

    tolerance = options.tolerance if options.tolerance is not None else TOLERANCE[options.precision]
    worst: dict[str, float] = {}
    samples, version = 0, ""
    for name, path in formats.components(source.path).items():
        try:
            runner = load(folder, name, options)
            version = runner.version
            reference = runtimes.load("onnx", str(path), options.threads, optimisation="none")
            for feed in formats.feeds_of(source, options, name, formats.read_graph(path)):
                want, got = of_reference(reference, feed, path), runner.run(feed)
                samples += 1
                for output, expected in want.items():
                    difference = largest_difference(expected, got[output])
                    if not difference <= tolerance:
                        fault = first_fault_built(source, folder, options, name, output, feed)
                        raise CompressError(
                            f"{options.format} differs from the ONNX file: {name}.{output} by {difference:.2e} (allowed"
                            f" {tolerance:.0e}); {fault}",
                            where=str(source.path),
                            fix="name another --precision or --format",
                        )
                    key = f"{name}.{output}"
                    worst[key] = max(worst.get(key, 0.0), difference)
        except runtimes.Missing as e:
            return {"skipped": e.what}
        except runtimes.CannotRun as e:
            raise CompressError(
                f"what was built for {options.format} does not run: {e}", where=str(folder), fix="see `compress doctor`"
            ) from e
    return {"outputs": worst, "tolerance": tolerance, "samples": samples, "runtime": version}


def of_reference(reference: Runner, feed: Arrays, path: Path) -> Arrays:
    """What the ONNX file itself gives for these inputs.

    Raises:
        CompressError: it does not run on them, or gives NaN; nothing that is built of it can do otherwise.
    """
    from compress.exporters import runtimes

    shown = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feed.items())
    fix = "give inputs that it takes: --inputs x.npz (numpy.savez, an array by each input's name), or --shape"
    try:
        found = dict(reference.run(feed))
    except runtimes.CannotRun as e:
        what = f"the ONNX file itself does not run on these inputs ({shown}): {e}"
        raise CompressError(what, where=str(path), fix=fix) from e
    nan = next((name for name, value in found.items() if value.dtype.kind == "f" and np.isnan(value).any()), None)
    if nan is not None:
        what = f"the ONNX file itself gives NaN in its output {nan!r} on these inputs ({shown})"
        raise CompressError(what, where=str(path), fix=fix)
    return found


def first_fault_built(
    source: Source, folder: Path, options: BuildOptions, component: str, output: str, feed: Arrays
) -> str:
    """Names the first node at fault: by building again what lies before the output, cut shorter and shorter."""
    from compress.exporters import bisect, formats

    tolerance = options.tolerance if options.tolerance is not None else TOLERANCE[options.precision]
    path = formats.components(source.path)[component]
    if options.precision == "int8":
        return "calibrate on more inputs, or leave the layer with the widest range in float32"
    if options.format == "executorch" and component == "model" and options.precision == "fp32":
        from compress.exporters.executorch import first_layer

        return first_layer(source, options, feed, tolerance)
    if formats.FORMATS[options.format].of_torch:
        return "the graph is made of the torch module, so the ONNX file tells no node"
    if options.format == "onnx" and options.fusions == "none":
        return bisect.between_onnx(path, folder / f"{component}.onnx", feed, tolerance)
    return bisect.first_built(path, component, output, feed, tolerance, options)


def check_modules(
    before: Any, after: Any, inputs: torch.Tensor, names: Sequence[str], tolerance: float, seam: str
) -> dict[str, Any]:
    """Compares two torch networks output by output, as the masked one and the sliced one.

    Args:
        inputs: (n, ...) real inputs.
        names: of the outputs.
        seam: what lies between the two, for the message.

    Raises:
        CompressError: an output differs by more than ``tolerance``; the first layer at fault is named.
    """
    from compress.exporters.onnx_module import _Outputs

    with torch.no_grad():
        pairs = zip(names, _Outputs(before, names).eval()(inputs), _Outputs(after, names).eval()(inputs), strict=True)
        worst = {name: largest_difference(a.numpy(), b.numpy()) for name, a, b in pairs}
    bad = {name: value for name, value in worst.items() if not value <= tolerance}
    if bad:
        name, value = next(iter(bad.items()))
        fault = _first_layer(before, after, inputs, tolerance)
        raise CompressError(
            f"the network differs after {seam}: {name} by {value:.2e}; {fault}",
            where=name,
            fix="make the plan again; where it stays, this is a fault of ours",
        )
    return {"outputs": worst, "tolerance": tolerance, "samples": len(inputs)}


def _first_layer(before: Any, after: Any, inputs: torch.Tensor, tolerance: float) -> str:
    """The first layer, in the order they are called, whose output differs; channels that are zero may be gone."""
    from torch import nn

    def outputs(model: nn.Module) -> dict[str, NDArray[Any]]:
        seen: dict[str, NDArray[Any]] = {}

        def keep(name: str) -> Any:
            def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
                seen.setdefault(name, out.detach().numpy())

            return hook

        hooks = [
            m.register_forward_hook(keep(name))
            for name, m in model.named_modules()
            if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d)
        ]
        with torch.no_grad():
            model.eval()(inputs)
        for hook in hooks:
            hook.remove()
        return seen

    want, got = outputs(before), outputs(after)
    for name, expected in want.items():
        if name not in got:
            return f"{name} is not in the network any more"
        found = got[name]
        if expected.shape != found.shape:
            # What a mask zeroed the slice removed: a channel is constant over the samples where nothing feeds it.
            live = [c for c in range(expected.shape[1]) if np.ptp(expected[:, c]) > 0]
            if len(live) != found.shape[1]:
                continue  # the norm behind it still gives its bias; the layers that follow tell
            expected = expected[:, live]
        if not largest_difference(expected, found) <= tolerance:
            return f"first in the output of {name}, by {largest_difference(expected, found):.2e}"
    return "every layer agrees, so the fault is behind the last of them"
