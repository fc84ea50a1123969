"""Transport over a real sshd on loopback: files once, resumed, checked; the far side's own words; the agent there."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CompressError
from compress.exporters.bench import ssh
from compress.exporters.bench.local import LOCAL, compare, measure_once
from tests.export.bench.loopback import Daemon, sshd
from tests.export.bench.nets import conv_net

SPEC = {"batch": 1, "processes": 2, "threads": 1, "min_seconds": 0.01, "min_runs": 2, "sample_seconds": 0.001}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv_net(tmp_path_factory.mktemp("net"))


def test_two_networks_are_measured_over_ssh_as_here(daemon: Daemon, net: Path, tmp_path: Path) -> None:
    small = conv_net(tmp_path, channels=4)
    found = compare(net, small, SPEC, transport=daemon.host())
    assert found["spec"]["target"].endswith(f"127.0.0.1:{daemon.port}")
    assert found["machine"]["cores"] == os.cpu_count() and not found["emulated"]
    for label in ("dense", "pruned"):
        assert len(found[label]["latency"]["raw"]) == 2 and found[label]["latency"]["median"] > 0
        assert found[label]["peak_rss"] > 1e7
    here = measure_once(net, SPEC)
    there = measure_once(net, SPEC, transport=daemon.host())
    assert here["runtime"] == there["runtime"] and here["sha256"] == there["sha256"]
    assert set(here["figures"]["latency"]) == set(there["figures"]["latency"])


def test_outputs_there_are_those_here(daemon: Daemon, net: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32))
    outputs = []
    for transport in (daemon.host(), LOCAL):
        files = transport.push([net / "model.onnx"])
        given = transport.push([tmp_path / "x.npy"])["x.npy"]
        written = f"{transport.room()}/out-{os.getpid()}.npz"
        transport.run(
            {"do": "run", "format": "onnx", "files": {"model": files["model.onnx"]}, "threads": 1, "input": given,
             "outputs": written}
        )  # fmt: skip
        transport.pull(written, tmp_path / "out.npz")
        with np.load(tmp_path / "out.npz") as held:
            outputs.append(held["classes"])
    assert outputs[0].shape == (2, 5) and np.array_equal(*outputs)


def test_a_file_is_copied_once(daemon: Daemon, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    real = ssh.Ssh._put

    def noted(self: ssh.Ssh, path: Path, *more: object) -> dict[str, object]:
        sent.append(path.name)
        return real(self, path, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(ssh.Ssh, "_put", noted)
    host = daemon.host(folder=str(daemon.folder / "once"))
    first = host.push([net / "model.onnx"])
    assert sent == ["model.onnx"] and host.push([net / "model.onnx"]) == first and sent == ["model.onnx"]
    assert Path(first["model.onnx"]).read_bytes() == (net / "model.onnx").read_bytes()


def test_a_killed_connection_goes_on_where_it_broke(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    big = tmp_path / "weights.data"
    big.write_bytes(np.random.default_rng(0).bytes(48_000_000))
    offsets = []
    real = ssh.Ssh._put

    def noted(self: ssh.Ssh, path: Path, item: object, folder: object, offset: int) -> dict[str, object]:
        offsets.append(offset)
        return real(self, path, item, folder, offset)  # type: ignore[arg-type]

    monkeypatch.setattr(ssh.Ssh, "_put", noted)
    host = daemon.host(folder=str(daemon.folder / "resumed"))

    def cut() -> None:
        """Kills the connection's process as soon as a part of the file has arrived."""
        for _ in range(2000):
            parts = list((daemon.folder / "resumed").rglob("*.partial"))
            if parts and 1_000_000 < parts[0].stat().st_size < 40_000_000:
                for pid in daemon.sessions():
                    os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.002)

    knife = threading.Thread(target=cut)
    knife.start()
    there = host.push([big])
    knife.join()
    assert len(offsets) >= 2 and offsets[0] == 0 and offsets[1] >= 1_000_000, "it went on behind what had arrived"
    assert Path(there["weights.data"]).read_bytes() == big.read_bytes()
    assert not list((daemon.folder / "resumed").rglob("*.partial"))


def test_a_part_that_was_damaged_is_sent_again(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "weights.data"
    file.write_bytes(bytes(range(256)) * 100)
    host = daemon.host(folder=str(daemon.folder / "damaged"))
    from compress.exporters.bench.transport import folder_name
    from compress.run.cache import sha256_of

    folder = daemon.folder / "damaged" / folder_name([file])
    folder.mkdir(parents=True)
    (folder / f".weights.data.{sha256_of(file)[:16]}.partial").write_bytes(b"something else" * 100)
    there = host.push([file])
    assert Path(there["weights.data"]).read_bytes() == file.read_bytes()


def test_a_wrong_key_is_one_error(daemon: Daemon) -> None:
    with pytest.raises(CompressError, match="refuses the key") as e:
        daemon.host(key=daemon.folder / "stranger").available()
    assert "Permission denied" in e.value.what and str(daemon.port) in e.value.where and e.value.fix


def test_an_unknown_host_key_is_refused_unless_the_target_allows_a_first_contact(
    daemon: Daemon, tmp_path: Path
) -> None:
    with pytest.raises(CompressError, match="host key"):
        daemon.host(known_hosts=tmp_path / "none").available()
    daemon.host(known_hosts=tmp_path / "none", host_key="accept-new").available()
    # A changed key is refused even so.
    kind, other = (daemon.folder / "stranger.pub").read_text().split()[:2]
    (tmp_path / "changed").write_text(f"[127.0.0.1]:{daemon.port} {kind} {other}\n")
    with pytest.raises(CompressError, match="host key"):
        daemon.host(known_hosts=tmp_path / "changed", host_key="accept-new").available()


def test_an_unreachable_host_is_one_error(daemon: Daemon) -> None:
    with pytest.raises(CompressError, match="refuses the connection"):
        daemon.host(port=1).available()
    with pytest.raises(CompressError, match="no such host"):
        daemon.host(host="nowhere.invalid").available()


def test_a_device_without_python_is_one_error(daemon: Daemon) -> None:
    with pytest.raises(CompressError, match="the device has no python-of-mine"):
        daemon.host(python="python-of-mine").available()


def test_a_device_without_the_runtime_says_what_to_install(daemon: Daemon, net: Path) -> None:
    host = daemon.host(options=("-o", "SetEnv=PYTHONPATH=/nowhere"))
    found = host.run({"do": "look", "format": "litert", "folder": "/"})
    with pytest.raises(CompressError, match="ai_edge_litert, which cannot be imported") as e:
        measure_once(net / "model.onnx", SPEC, format="litert", transport=host)
    assert "missing" in found and e.value.fix.startswith("on the device: pip install")


def test_a_process_that_is_killed_there_is_not_taken_for_a_lost_connection(daemon: Daemon, tmp_path: Path) -> None:
    die = tmp_path / "die"  # in python's place: ends as one does that has run out of memory
    die.write_text('#!/bin/sh\ncase "$1" in -c) exec python3 "$@";; esac\necho out of memory >&2\nkill -9 $$\n')
    die.chmod(0o755)
    began = time.monotonic()
    with pytest.raises(CompressError, match=r"killed.*out of memory"):
        daemon.host(python=str(die)).run({"do": "look", "format": "onnx", "folder": "/"})
    assert time.monotonic() - began < 10, "it is not tried again"


def test_no_disk_on_the_device_is_said_before_anything_is_sent(daemon: Daemon, tmp_path: Path) -> None:
    disk = daemon.folder / "tiny-disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be made by root")
    try:
        (tmp_path / "weights.data").write_bytes(bytes(5_000_000))
        with pytest.raises(CompressError, match=r"no disk on the device: 5\.0 MB are to be copied, 1\.0 MB are free"):
            daemon.host(folder=str(disk)).push([tmp_path / "weights.data"])
        # And where it fills up meanwhile: the device's own words.
        host = daemon.host(folder=str(disk))
        item = {"name": "weights.data", "sha256": "0" * 64, "size": 5_000_000}
        with pytest.raises(CompressError, match="no disk on the device: No space left"):
            host._put(tmp_path / "weights.data", item, str(disk), 0)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_what_fails_there_is_told_in_the_devices_words(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")  # a model of nothing, to ONNX's own reader
    with pytest.raises(CompressError, match=r"ONNX Runtime cannot load model\.onnx") as e:
        measure_once(tmp_path, SPEC, transport=daemon.host())
    assert str(daemon.port) in e.value.where
    with pytest.raises(CompressError, match="KeyError: 'nonsense'"):
        daemon.host().run({"do": "nonsense"})
