"""What can disturb a timing, as the device tells it: clocks, governor, temperature, load, memory, power.

Imports nothing but the standard library: it is copied to the device together with the agent. What a platform does not
tell is absent, never guessed.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import shutil
import time
from collections.abc import Callable
from typing import Any

if __package__:
    from compress.system import host
else:  # the agent: it lies beside this file
    import host  # type: ignore[no-redef]


def read(path: str) -> str | None:
    """The first line of a file, or None where there is none or it may not be read."""
    said = host.read(path)
    return None if said is None else said.partition("\n")[0].strip()


def emulated(machine: str | None = None, cpuinfo: str = host.CPUINFO) -> bool:
    """Whether this program runs under user-mode emulation: it was built for ARM, and the kernel's processor is x86."""
    if (machine or platform.machine()) not in ("aarch64", "arm64", "armv7l"):
        return False
    said = host.read(cpuinfo) or ""
    return any(line.startswith("vendor_id") for line in said.splitlines())  # a line that only x86 kernels write


def temperature() -> float | None:
    """The hottest thermal zone, degrees Celsius."""
    zones = (read(path) for path in glob.glob(host.ZONES))
    found = [int(zone) / 1000 for zone in zones if zone and zone.lstrip("-").isdigit()]
    return max((t for t in found if 0 < t < 150), default=None)


def state() -> dict[str, Any]:
    """What changes while it is measured: load, clocks, temperature."""
    found: dict[str, Any] = {"time": time.time()}
    load = host.load_average()
    if load is not None:
        found["load_average"] = load
    mhz = [int(clock) / 1000 for clock in host.clocks() if clock.isdigit()]
    if mhz:
        found["cpu_mhz"] = {"min": min(mhz), "max": max(mhz)}
    hot = temperature()
    if hot is not None:
        found["temperature"] = hot
    gpu = gpu_state()
    return {**found, "gpu": gpu} if gpu else found


def fixed() -> dict[str, Any]:
    """What stays: processor, cores, system, governor, memory."""
    found: dict[str, Any] = {
        "cpu": host.processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "emulated": emulated(),
    }
    told = {
        "cores_allowed": host.allowed_processors(),
        "governor": host.governor(),
        "turbo_off": read(f"{host.CPUS}/intel_pstate/no_turbo"),
        "power_mode": read("/var/lib/nvpmodel/status"),  # of a Jetson
        "memory": host.total_memory(),
    }
    return found | {name: value for name, value in told.items() if value}


def free_disk(folder: str) -> int:
    """Bytes free where ``folder`` is, or would be made."""
    while not os.path.exists(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    return shutil.disk_usage(folder).free


def rapl() -> float | None:
    """Joules that the processor's packages have taken since some moment; None where the kernel does not tell."""
    packages = glob.glob(f"{host.POWERCAP}/intel-rapl:[0-9]*/energy_uj")
    counters = (read(path) for path in packages if path.count(":") == 1)
    found = [int(counter) for counter in counters if counter]
    return sum(found) / 1e6 if found else None


class _Nvml:
    """The little of NVIDIA's management library that is needed, by its C interface."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        if self.lib.nvmlInit_v2() or self.lib.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.handle)):
            raise OSError("NVML sees no device")

    def number(self, function: str, *before: int, kind: Any = ctypes.c_uint) -> int | None:
        found = kind()
        return None if getattr(self.lib, function)(self.handle, *before, ctypes.byref(found)) else int(found.value)

    def text(self, function: str, of_device: bool) -> str | None:
        found = ctypes.create_string_buffer(96)
        of = (self.handle,) if of_device else ()
        return None if getattr(self.lib, function)(*of, found, ctypes.c_uint(96)) else found.value.decode()


_nvml: Any = None


def nvml() -> _Nvml | None:
    """NVML for the first GPU, or None where there is none."""
    global _nvml
    if _nvml is None:
        try:
            _nvml = _Nvml()
        except (OSError, AttributeError):
            _nvml = False
    return _nvml or None


def gpu_state() -> dict[str, Any]:
    """Name, driver, clocks, temperature and power limit of the first GPU; empty where there is none."""
    it = nvml()
    if it is None:
        return {}
    milliwatts = it.number("nvmlDeviceGetEnforcedPowerLimit")
    found = {
        "name": it.text("nvmlDeviceGetName", True),
        "driver": it.text("nvmlSystemGetDriverVersion", False),
        "sm_mhz": it.number("nvmlDeviceGetClockInfo", 1),
        "memory_mhz": it.number("nvmlDeviceGetClockInfo", 2),
        "temperature": it.number("nvmlDeviceGetTemperature", 0),
        "power_limit_watts": milliwatts / 1000 if milliwatts is not None else None,
    }
    return {k: v for k, v in found.items() if v is not None}


def gpu_joules() -> float | None:
    """Joules that the first GPU has taken since its driver was loaded."""
    it = nvml()
    used = it.number("nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong) if it is not None else None
    return used / 1000 if used is not None else None


METERS: dict[str, Callable[[], float | None]] = {"rapl": rapl, "nvml": gpu_joules}


def meters() -> dict[str, float]:
    """Joules so far, by every meter that this platform has."""
    readings = {name: meter() for name, meter in METERS.items()}
    return {name: value for name, value in readings.items() if value is not None}


def watts(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """Mean power between two readings; a counter that ran over in between says nothing."""
    return {
        name: (after[name] - used) / seconds
        for name, used in before.items()
        if name in after and after[name] > used and seconds > 0
    }
