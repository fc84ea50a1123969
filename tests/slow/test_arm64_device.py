"""A pruned network and a pruned language model on an emulated arm64 device: real sshd, real arm64 runtime."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.exporters.bench.local import LOCAL
from compress.exporters.bench.transport import Transport, answered, artefact
from compress.exporters.on_target import bench, bench_lines, doctor
from compress.exporters.onnx_module import export_module
from compress.exporters.target import load_target, transport_of
from compress.models.zoo import build
from tools import arm64_device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("debootstrap") or not shutil.which(arm64_device.QEMU),
        reason="needs root, debootstrap and qemu-user-static",
    ),
]


@pytest.fixture(scope="module")
def target() -> Iterator[Path]:
    yield arm64_device.start()
    arm64_device.stop()


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A residual network of 16 channels and the same with half of every group of channels removed, as ONNX."""
    import torch_pruning

    folders = []
    for label in ("dense", "pruned"):
        torch.manual_seed(0)
        model = build("resnet", {"depth": 8, "width": 16, "classes": 10}).eval()
        x = torch.randn(2, 3, 32, 32)
        if label == "pruned":
            importance = torch_pruning.importance.MagnitudeImportance()
            torch_pruning.pruner.MagnitudePruner(
                model, x, importance, pruning_ratio=0.5, ignored_layers=[model.classifier]
            ).step()
        folder = tmp_path_factory.mktemp(label)
        export_module(model, x, ["classes"], folder)
        folders.append(folder)
    return folders[0], folders[1]


def outputs(transport: Transport, file: Path, feed: dict[str, np.ndarray], work: Path) -> dict[str, np.ndarray]:
    """What the runtime at the far end makes of ``feed``."""
    made = artefact(file)
    files = transport.push(made.files)
    np.savez(work / "feed.npz", **feed)  # type: ignore[arg-type]
    given = transport.push([work / "feed.npz"])["feed.npz"]
    written = f"{transport.room()}/outputs-{os.getpid()}.npz"
    answered(
        transport.run(
            {"do": "run", "format": "onnx", "files": {"model": files[file.name]}, "threads": 1, "input": given,
             "outputs": written}
        ),
        transport.title,
    )  # fmt: skip
    transport.pull(written, work / "outputs.npz")
    with np.load(work / "outputs.npz") as held:
        return {name: held[name] for name in held.files}


def difference(there: dict[str, np.ndarray], here: dict[str, np.ndarray]) -> float:
    """The largest, relative to the largest value of the output."""
    assert set(there) == set(here)
    return max(float(np.abs(there[k] - here[k]).max() / (np.abs(here[k]).max() or 1)) for k in here)


def test_the_device_says_what_it_is(target: Path) -> None:
    rows = {row["part"]: row for row in doctor(str(target))}
    device = next(iter(rows.values()))
    assert device["state"] == "ok" and "aarch64" in device["detail"]
    assert rows["onnx"]["state"] == "ok" and rows["processor"]["state"] == "warn"


def test_a_pruned_networks_outputs_there_are_those_here_and_its_latency_is_marked_emulated(
    target: Path, networks: tuple[Path, Path], tmp_path: Path
) -> None:
    device = transport_of(load_target(str(target)))
    feed = {"input": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    for folder in networks:
        file = folder / "model.onnx"
        found = difference(outputs(device, file, feed, tmp_path), outputs(LOCAL, file, feed, tmp_path))
        print(f"{folder.name}: outputs there and here differ by {found:.1e}")
        assert found <= 1e-5
    measured = bench(*networks, str(target), {"processes": 2})
    print("\n".join(bench_lines(measured)))
    assert measured["emulated"] and measured["machine"]["machine"] == "aarch64"
    assert measured["pruned"]["latency"]["median"] > 0 and any("emulated" in line for line in bench_lines(measured))


def test_a_pruned_language_models_outputs_there_are_those_here(target: Path, finished: Path, tmp_path: Path) -> None:
    """The tiny Llama that the whole pipeline pruned: prefill, and decode behind its cache."""
    device = transport_of(load_target(str(target)))
    ids = np.random.default_rng(0).integers(3, 300, (1, 24))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(24)[None]}
    for label in ("dense", "pruned"):
        folder = finished / f"export-{label}"
        there, here = (outputs(t, folder / "prefill.onnx", feed, tmp_path) for t in (device, LOCAL))
        assert difference(there, here) <= 1e-5
        step = {
            "input_ids": ids[:, :1],
            "attention_mask": np.ones((1, 25), np.int64),
            "position_ids": np.array([[24]]),
            **{f"past_key_values.{k.removeprefix('present.')}": v for k, v in here.items() if k != "logits"},
        }
        there, here = (outputs(t, folder / "decode.onnx", step, tmp_path) for t in (device, LOCAL))
        assert difference(there, here) <= 1e-5
    given = {"processes": 1, "prompt": 24, "context": 24}
    measured = bench(finished / "export-dense", finished / "export-pruned", str(target), given)
    print("\n".join(bench_lines(measured)))
    assert measured["emulated"] and measured["pruned"]["tpot"]["median"] > 0
