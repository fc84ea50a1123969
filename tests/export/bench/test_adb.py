"""Against the real adb client: without a device, and with one whose end of the protocol is the test's own (adbd.py).

What only Android has (getprop, dumpsys, benchmark programs built for it) says what its documentation shows.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import CompressError, UsageError
from compress.exporters.bench.adb import Adb, read_battery
from compress.exporters.bench.local import compare, measure_once
from compress.exporters.on_target import bench, bench_lines, doctor
from tests.export.bench.adbd import adbd
from tests.export.bench.nets import conv_net
from tests.export.bench.test_programs import ORT

real = pytest.mark.skipif(shutil.which("adb") is None, reason="adb is not installed")

# `dumpsys battery`.
BATTERY = """\
Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Max charging current: 500000
  status: 2
  level: 87
  scale: 100
  voltage: 4256
  temperature: 294
"""


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """An adb server of the test's own, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", port)
        yield
        if shutil.which("adb") is not None:
            environment = {**os.environ, "ANDROID_ADB_SERVER_PORT": port}
            subprocess.run(["adb", "kill-server"], capture_output=True, env=environment)


@real
def test_no_device_is_one_clear_error(server: None, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no device is attached") as e:
        Adb().available()
    assert "USB debugging" in e.value.fix
    rows = doctor("pixel-8")
    assert rows[0]["state"] == "missing" and "no device is attached" in rows[0]["detail"]
    (tmp_path / "model.ort").touch()
    with pytest.raises(CompressError, match="no devices"):
        Adb().push([tmp_path / "model.ort"])


@real
def test_a_device_that_is_not_there_is_told_in_adbs_words(server: None) -> None:
    with pytest.raises(CompressError, match="device 'phone' not found"):
        Adb(serial="phone").shell("true")


def test_which_device_is_asked_where_there_are_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # No device can be had here: a program of this name stands for the client and says what adb's documentation shows.
    listed = tmp_path / "adb"
    listed.write_text("#!/bin/sh\nprintf 'List of devices attached\\nA1\\tdevice\\nB2\\tunauthorized\\n\\n'\n")
    listed.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(CompressError, match="2 devices are attached") as e:
        Adb().available()
    assert "A1, B2" in e.value.fix
    with pytest.raises(CompressError, match="B2 is unauthorized") as e:
        Adb(serial="B2").available()
    assert "on its screen" in e.value.fix
    with pytest.raises(CompressError, match="there is no device C3"):
        Adb(serial="C3").available()
    assert Adb(serial="A1").available() == {"serial": "A1"}


def test_words_are_quoted_for_the_devices_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    echo = tmp_path / "adb"  # stands for the client: the device's shell gets its last word
    echo.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    echo.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Adb().shell("printf", "%s|", "a b", "$(id)", "'x';y") == "a b|$(id)|'x';y|"


def test_a_language_model_needs_python_on_the_device() -> None:
    with pytest.raises(UsageError, match="can only measure a network"):
        Adb(benchmark="/data/b").run({"do": "measure", "files": {"prefill": "/data/p"}, "format": "ort"})
    with pytest.raises(UsageError, match=r"neither transport\.python nor transport\.benchmark"):
        Adb().run({"do": "look"})


def test_battery_is_read_in_degrees_and_volts() -> None:
    assert read_battery(BATTERY) == {"level": 87, "temperature": 29.4, "volts": 4.256, "charging": True}
    assert read_battery("") == {"charging": False}


SPEC = {"batch": 1, "processes": 2, "threads": 1, "min_seconds": 0.01, "min_runs": 2, "sample_seconds": 0.001}


@pytest.fixture(scope="module")
def device(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The serial of a device that is attached."""
    if shutil.which("adb") is None:
        pytest.skip("adb is not installed")
    with adbd(tmp_path_factory.mktemp("bin")) as address:
        subprocess.run(["adb", "connect", address], check=True, capture_output=True)
        yield address
        subprocess.run(["adb", "disconnect", address], capture_output=True)


def test_the_agent_measures_through_adb(device: str, tmp_path: Path) -> None:
    net = conv_net(tmp_path / "net")
    phone = Adb(serial=device, python=sys.executable, folder=str(tmp_path / "device"))
    found = measure_once(net, SPEC, transport=phone)
    assert len(found["figures"]["latency"]["samples"]) >= 2 and found["runtime"].startswith("onnxruntime")
    for moment in ("start", "end"):
        assert found["environment"][moment]["battery"]["level"] == 87
        assert found["environment"][moment]["thermal_status"] == 0


def test_a_file_is_pushed_once_and_checked(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my weights.data"
    file.write_bytes(bytes(range(256)) * 2000)
    phone = Adb(serial=device, folder=str(tmp_path / "device"))
    there = phone.push([file])["my weights.data"]
    assert Path(there).read_bytes() == file.read_bytes()
    changed = Path(there).stat().st_mtime_ns
    assert phone.push([file])["my weights.data"] == there and Path(there).stat().st_mtime_ns == changed
    phone.pull(there, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    # What arrives damaged never gets its name.
    monkeypatch.setattr("compress.exporters.bench.adb.sha256_of", lambda _: "0" * 64)
    monkeypatch.setattr("compress.exporters.bench.adb.ATTEMPTS", 1)
    other = Adb(serial=device, folder=str(tmp_path / "other"))
    with pytest.raises(CompressError, match="what arrived is not what was sent"):
        other.push([file])
    assert not list((tmp_path / "other").rglob("my weights.data"))


def test_no_disk_on_the_device_is_said_before_anything_is_sent(device: str, tmp_path: Path) -> None:
    disk = tmp_path / "tiny-disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk can only be made by root")
    try:
        (tmp_path / "weights.data").write_bytes(bytes(5_000_000))
        with pytest.raises(CompressError, match=r"no disk on the device: 5\.0 MB are to be copied, 1\.0 MB are free"):
            Adb(serial=device, folder=str(disk)).push([tmp_path / "weights.data"])
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_benchmark_program_measures_through_adb(device: str, tmp_path: Path) -> None:
    # Not onnxruntime_perf_test itself, which is not to be had here: a script that says what its documentation shows.
    program = tmp_path / "onnxruntime_perf_test"
    program.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'for i in 0 1 2 3 4 5 6 7; do echo "net,0.09$i,271122432,11,$i" >> "$last"; done\n'
        f"cat <<'END'\n{ORT}END\n"
    )
    program.chmod(0o755)
    target = tmp_path / "phone.yaml"
    target.write_text(
        f"extends: pixel-8\ncool_down: 0\nbudget: 100\nformat: onnx\n"
        f"transport: {{serial: '{device}', benchmark: '{program}', folder: {tmp_path}/device}}\n"
    )
    rows = {row["part"]: row for row in doctor(str(target))}
    assert "Pixel 8 (Tensor G3), arm64-v8a" in rows[f"adb {device}"]["detail"]
    assert rows["throttling"]["state"] == rows["battery"]["state"] == rows["onnx"]["state"] == "ok"
    nets = [conv_net(tmp_path / name) for name in ("dense", "pruned")]
    found = compare(
        *nets, SPEC, format="onnx", transport=Adb(serial=device, benchmark=str(program), folder=str(tmp_path))
    )
    assert found["dense"]["latency"]["raw"][0] == [0.09, *(float(f"0.09{i}") for i in range(1, 8))]
    assert found["dense"]["latency"]["load"] == 0.217932 and found["dense"]["latency"]["first"] == 0.196
    assert found["ratios"]["latency"]["median"] == 1 and found["dense"]["peak_rss"] == 271122432
    assert not found["emulated"] and found["machine"]["cpu"] == "Pixel 8 (Tensor G3)"
    with pytest.raises(CompressError, match=r"not found|No such file"):
        measure_once(nets[0], SPEC, transport=Adb(serial=device, benchmark="/data/none", folder=str(tmp_path)))
    assert found["spec"]["target"] == f"adb {device}"


def test_a_phone_without_python_says_so(device: str, tmp_path: Path) -> None:
    net = conv_net(tmp_path / "net")
    with pytest.raises(CompressError, match="no-such-python"):
        measure_once(net, SPEC, transport=Adb(serial=device, python="/no-such-python", folder=str(tmp_path / "device")))


def test_the_command_measures_on_a_phone(device: str, tmp_path: Path) -> None:
    target = tmp_path / "phone.yaml"
    target.write_text(
        "extends: this-machine\nbudget: 1000\nmeasure: {processes: 1, min_seconds: 0.05, min_runs: 8}\n"
        f"transport: {{kind: adb, serial: '{device}', python: '{sys.executable}', folder: {tmp_path}/device}}\n"
    )
    nets = [conv_net(tmp_path / name) for name in ("dense", "pruned")]
    lines = bench_lines(bench(*nets, str(target), {}))
    assert any(line.startswith("budget  latency: 1000 ms are kept") for line in lines)
    assert any(line.startswith("ideal   model: ") for line in lines)
