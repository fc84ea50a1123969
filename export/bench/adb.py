"""An Android device reached by adb: files brought once, measured by the agent (Termux's Python) or a benchmark program.

Android's own client, by argument lists. adb hands the device's shell one line whatever it is given: that line is quoted
word by word. Files are pushed whole beside their place, checked by hash, and then named.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters.bench.packed import agent_file
from compress.exporters.bench.programs import PROGRAMS, figure
from compress.exporters.bench.transport import folder_name
from compress.run.cache import sha256_of
from compress.system import host
from compress.system.files import whole_file

ATTEMPTS = 3
FOLDER = "/data/local/tmp/compress"


@dataclass(frozen=True)
class Adb:
    """
    Args:
        serial: which device, where several are attached.
        python: the agent's interpreter there; or
        benchmark: the path there of the runtime's own benchmark program, see `programs`.
        folder: where artefacts are kept there.
    """

    serial: str | None = None
    python: str | None = None
    benchmark: str | None = None
    folder: str = FOLDER

    @property
    def title(self) -> str:
        return f"adb {self.serial}" if self.serial else "adb"

    def command(self, *words: str) -> list[str]:
        if shutil.which("adb") is None:
            raise UsageError("adb is not installed here", where=self.title, fix="install Android's platform tools")
        return ["adb", *(("-s", self.serial) if self.serial else ()), *words]

    def shell(self, *words: str, allow: Sequence[int] = (0,)) -> str:
        """Standard output of one command there.

        Raises:
            CompressError: the device is gone, or the command failed; with its own words.
        """
        done = subprocess.run(
            self.command("shell", "-T", shlex.join(words)), capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode not in allow:
            said = (done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}").splitlines()[-1]
            raise CompressError(
                f"on the device, {words[0]}: {said[:300]}", where=self.title, fix="`adb devices` lists what is attached"
            )
        return done.stdout.replace("\r\n", "\n")

    def available(self) -> dict[str, Any]:
        """Checks that exactly the device meant is attached and lets us in."""
        done = subprocess.run(self.command("devices"), capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise CompressError(f"adb does not work: {last}", where=self.title, fix="try `adb devices` by hand")
        attached = dict(re.findall(r"^(\S+)\t(\S+)", done.stdout, re.MULTILINE))
        if not attached:
            raise CompressError(
                "no device is attached", where=self.title,
                fix="plug it in with USB debugging on, or `adb connect ADDRESS`; `adb devices` must list it",
            )  # fmt: skip
        if self.serial is not None and self.serial not in attached:
            raise CompressError(
                f"there is no device {self.serial}",
                where=self.title,
                fix=f"transport.serial: one of {', '.join(attached)}",
            )
        if self.serial is None and len(attached) > 1:
            raise CompressError(
                f"{len(attached)} devices are attached", where=self.title,
                fix=f"say which one as transport.serial: {', '.join(attached)}",
            )  # fmt: skip
        serial = self.serial or next(iter(attached))
        if attached[serial] != "device":
            fix = {"unauthorized": "allow this computer on its screen", "offline": "plug it in again"}
            raise CompressError(
                f"the device {serial} is {attached[serial]}", where=self.title,
                fix=fix.get(attached[serial], "see `adb devices`"),
            )  # fmt: skip
        return {"serial": serial}

    def push(self, files: Sequence[Path]) -> dict[str, str]:
        return self._push(files, folder_name(files))

    @cached_property
    def agent(self) -> str:
        return next(iter(self._push((agent_file(),), "agent").values()))

    def _push(self, files: Sequence[Path], name: str) -> dict[str, str]:
        folder = f"{self.folder}/{name}"
        self.shell("mkdir", "-p", folder)
        missing = [p for p in files if self.shell("ls", f"{folder}/{p.name}", allow=(0, 1, 2)).strip() == ""]
        needed, free = sum(p.stat().st_size for p in missing), self._free(folder)
        if needed > free:
            raise CompressError(
                f"no disk on the device: {needed / 1e6:.1f} MB are to be copied, {free / 1e6:.1f} MB are free",
                where=f"{self.title}, {folder}", fix="free some, or name another folder in the target",
            )  # fmt: skip
        for path in missing:
            self._bring(path, folder)
        return {p.name: f"{folder}/{p.name}" for p in files}

    def _bring(self, path: Path, folder: str) -> None:
        partial, said = f"{folder}/.{path.name}.partial", ""
        for attempt in range(ATTEMPTS):
            done = subprocess.run(
                self.command("push", str(path), partial), capture_output=True, encoding="utf-8", errors="replace"
            )
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1] if done.returncode else ""
            if not done.returncode:
                if self.shell("sha256sum", partial).split()[:1] == [sha256_of(path)]:
                    self.shell("mv", partial, f"{folder}/{path.name}")
                    return
                said = "what arrived is not what was sent"
            time.sleep(2**attempt)
        full = "No space left" in said
        raise CompressError(
            f"{'no disk on the device' if full else 'copying failed'}: {said}", where=f"{self.title}, {path.name}",
            fix="free some, or name another folder in the target" if full else "give the same command again",
        )  # fmt: skip

    def _free(self, folder: str) -> int:
        row = self.shell("df", "-k", folder).strip().splitlines()[-1].split()
        at = next(i for i, cell in enumerate(row) if cell.endswith("%"))
        return int(row[at - 1]) * 1024

    def pull(self, there: str, here: Path) -> None:
        with whole_file(here) as partial:
            done = subprocess.run(
                self.command("pull", there, str(partial)), capture_output=True, encoding="utf-8", errors="replace"
            )
            if done.returncode:
                said = done.stderr.strip() or done.stdout.strip()
                raise CompressError(f"fetching failed: {said}", where=self.title, fix="see the device")

    def room(self) -> str:
        self.shell("mkdir", "-p", f"{self.folder}/scratch")
        return f"{self.folder}/scratch"

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.python is not None:
            return self._agent_run(request, self.python)
        if self.benchmark is None:
            raise UsageError(
                "the target says neither transport.python nor transport.benchmark", where=self.title,
                fix="name Termux's python, or the place of the runtime's benchmark program on the device",
            )  # fmt: skip
        if request["do"] == "look":
            return self._look(self.benchmark)
        if request["do"] != "measure" or "prefill" in request["files"]:
            raise UsageError(
                "a benchmark program can only measure a network", where=self.title,
                fix="install Python with numpy and the runtime in Termux and name it as transport.python",
            )  # fmt: skip
        if request.get("inputs"):
            raise UsageError(
                "a benchmark program makes up its inputs", where=self.title,
                fix="leave --inputs out, or install Python in Termux and name it as transport.python",
            )  # fmt: skip
        return self._program_run(request, self.benchmark)

    def _agent_run(self, request: Mapping[str, Any], python: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as beside:
            asked = Path(beside) / "request.json"
            asked.write_text(json.dumps(dict(request)), encoding="utf-8")
            there = self.push((asked,))[asked.name]
            start = self.conditions()
            found: dict[str, Any] = json.loads(self.shell(python, self.agent, there))
        if "environment" in found:
            found["environment"]["start"].update(start)
            found["environment"]["end"].update(self.conditions())
        elif "state" in found:
            found["state"].update(start)
        return found

    def _program_run(self, request: Mapping[str, Any], benchmark: str) -> dict[str, Any]:
        program = PROGRAMS.get(request["format"])
        if program is None:
            raise UsageError(
                f"no benchmark program is known for the format {request['format']}", where=self.title,
                fix=f"one of: {', '.join(PROGRAMS)}",
            )  # fmt: skip
        raw = f"{self.room()}/samples.csv"
        self.shell("rm", "-f", raw)
        asked = {**request, "runs": max(request["min_runs"], 50), "axes": {"batch": request.get("batch", 1)}}
        start = self.conditions()
        said = self.shell(*program.words(benchmark, request["files"]["model"], asked, raw))
        samples = self.shell("cat", raw) if program.raw else ""
        found = program.read(said, samples)
        device = self._device()
        return {
            "figures": {"latency": figure(found)},
            "runtime": found.get("version") or f"{program.title} {self._hash(benchmark)}",
            "peak_rss": found.get("peak_rss"),
            "environment": {**device, "threads": request["threads"], "start": start, "end": self.conditions()},
            "emulated": device["emulated"],
        }

    def _hash(self, path: str) -> str:
        return self.shell("sha256sum", path).split()[0][:16]

    def _look(self, benchmark: str) -> dict[str, Any]:
        found: dict[str, Any] = {"device": self._device(), "state": self.conditions(), "meters": ["battery"]}
        found["free_disk"] = self._free(self.room())
        try:
            found["runtime"] = f"{Path(benchmark).name} {self._hash(benchmark)}"
        except CompressError as e:
            found["missing"] = {
                "what": e.what,
                "fix": f"push the runtime's benchmark program to {benchmark}, chmod +x it",
            }
        return found

    def _property(self, name: str) -> str:
        return self.shell("getprop", name).strip()

    def _device(self) -> dict[str, Any]:
        chip = self._property("ro.soc.model") or self._property("ro.hardware")
        return {
            "cpu": f"{self._property('ro.product.model')} ({chip})",
            "machine": self._property("ro.product.cpu.abi"),
            "cores": int(self.shell("nproc").strip() or 0),
            "system": f"Android {self._property('ro.build.version.release')} {self._property('ro.build.id')}",
            "emulated": self._property("ro.kernel.qemu") == "1" or self._property("ro.boot.qemu") == "1",
        }

    def conditions(self) -> dict[str, Any]:
        """Battery, thermal status and load."""
        found: dict[str, Any] = {"time": time.time(), "battery": read_battery(self.shell("dumpsys", "battery"))}
        status = re.search(r"Thermal Status:\s*(\d+)", self.shell("dumpsys", "thermalservice", allow=range(256)))
        if status:
            found["thermal_status"] = int(status[1])
        if "temperature" in found["battery"]:
            found["temperature"] = found["battery"]["temperature"]
        found["load_average"] = float(self.shell("cat", host.LOADAVG).split()[0])
        return found


def read_battery(said: str) -> dict[str, Any]:
    """`dumpsys battery`: level in %, degrees Celsius, volts, and whether it is being charged."""
    values = dict(re.findall(r"^\s*([A-Za-z ]+): (\S+)\s*$", said, re.MULTILINE))
    found: dict[str, Any] = {}
    if values.get("level", "").isdigit():
        found["level"] = int(values["level"])
    if values.get("temperature", "").lstrip("-").isdigit():
        found["temperature"] = int(values["temperature"]) / 10
    if values.get("voltage", "").isdigit():
        found["volts"] = int(values["voltage"]) / 1000
    found["charging"] = any(values.get(f"{kind} powered") == "true" for kind in ("AC", "USB", "Wireless", "Dock"))
    return found
