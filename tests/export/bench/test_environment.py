"""What a device tells of itself; what it does not tell is absent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from compress.exporters.bench import environment
from compress.exporters.bench.packed import agent_file, pack
from compress.system import host


def test_the_record_names_processor_cores_and_memory() -> None:
    fixed = environment.fixed()
    assert fixed["cores"] == os.cpu_count() and fixed["cpu"] and fixed["memory"] > 1e8 and not fixed["emulated"]
    state = environment.state()
    assert state["time"] == pytest.approx(time.time(), abs=60) and state["load_average"] >= 0


def test_arm_programs_on_an_x86_kernel_are_emulated(tmp_path: Path) -> None:
    intel, arm = tmp_path / "intel", tmp_path / "arm"
    intel.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Some Processor\n")
    arm.write_text("processor\t: 0\nBogoMIPS\t: 108.00\nCPU implementer\t: 0x41\nModel\t\t: Raspberry Pi 5\n")
    assert environment.emulated("aarch64", str(intel)) and not environment.emulated("aarch64", str(arm))
    assert not environment.emulated("x86_64", str(intel))
    assert host.processor(str(intel)) == "Some Processor" and host.processor(str(arm)) == "Raspberry Pi 5"


def test_power_is_the_energy_over_the_time_and_a_counter_that_ran_over_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "intel-rapl:0"
    (package / "intel-rapl:0:0").mkdir(parents=True)  # a part of the package: it must not be counted twice
    (package / "intel-rapl:0:0" / "energy_uj").write_text("999\n")
    monkeypatch.setattr(host, "POWERCAP", str(tmp_path))
    (package / "energy_uj").write_text("1000000\n")
    before = environment.meters()
    assert before["rapl"] == 1.0
    (package / "energy_uj").write_text("31000000\n")
    assert environment.watts(before, environment.meters(), 2.0)["rapl"] == 15.0
    (package / "energy_uj").write_text("5\n")
    assert "rapl" not in environment.watts(before, environment.meters(), 2.0)


def test_free_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert environment.free_disk(str(tmp_path / "a" / "b")) == pytest.approx(environment.free_disk("/tmp"), rel=0.5)


def test_the_agent_is_one_file_that_stands_alone_and_is_the_same_each_time() -> None:
    assert pack() == pack() == agent_file().read_bytes()
    whole = agent_file().read_bytes()
    agent_file().write_bytes(whole[:-1] + b"?")  # a damaged cache is not what runs on a device
    agent_file.cache_clear()
    assert agent_file().read_bytes() == whole
    with zipfile.ZipFile(agent_file()) as file:
        assert set(file.namelist()) == {"__main__.py", "protocol.py", "environment.py", "runtimes.py", "host.py"}
        for name in file.namelist():
            source = file.read(name).decode()
            source = source.replace("if __package__:\n    from compress.system import host", "")
            assert "compress." not in source.replace("`compress.", ""), f"{name} imports nothing of the package"
    # In an interpreter that knows nothing of the package.
    done = subprocess.run(
        [sys.executable, "-I", str(agent_file())],
        input='{"do": "look", "format": "onnx", "folder": "/tmp"}',
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert '"runtime": "onnxruntime' in done.stdout
