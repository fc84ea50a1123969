"""Against the real adb client, as far as it goes without a device; what a device says is of Android's documentation."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress.errors import CompressError, UsageError
from compress.export.bench.adb import Adb, read_battery
from compress.export.on_target import doctor

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
        subprocess.run(["adb", "kill-server"], capture_output=True, env={**os.environ, "ANDROID_ADB_SERVER_PORT": port})


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
