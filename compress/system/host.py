"""What one operating system has and another has not: memory, processors, locks, how a child ends with its parent.

The one file that knows fcntl, resource, /proc and /sys. Where a system does not tell, the answer says so (None, or an
empty string), and no caller guesses. Linux is asked by its own files; macOS and Windows by psutil, which a device that
is measured need not have: this file goes there with the agent, runs under Python 3.9 and imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import platform
import signal
import sys
import threading
import time
from typing import Any  # Python 3.9

WINDOWS = sys.platform == "win32"
CPUINFO = "/proc/cpuinfo"
BFLOAT16 = ("amx_bf16", "avx512_bf16")  # what the kernel calls the units for products of bfloat16
LOADAVG = "/proc/loadavg"
CPUS = "/sys/devices/system/cpu"
POWERCAP = "/sys/class/powercap"
ZONES = "/sys/class/thermal/thermal_zone*/temp"
BOARD = "/proc/device-tree/model"
CGROUP = "/sys/fs/cgroup"
NO_LOCK = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
LOCKED_BYTE = 1 << 30  # Windows keeps others from reading what is locked: a byte that nobody reads


def read(path: str) -> str | None:
    """The text of a file of the kernel's, or None where there is none or it may not be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def _psutil() -> Any:
    try:
        import psutil
    except ImportError:  # a device that only measures
        return None
    return psutil


# --- time ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(seconds: float) -> Any:
    """Raises TimeoutError in the block after so many seconds; a timer that ran already runs on behind it.

    Python's own code is stopped, a single call of C is not. Beside the main thread, and on Windows, there is no limit.
    """
    if WINDOWS or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)


def limit_processor(seconds: int) -> None:
    """Has the system end this process (SIGXCPU) when it has used so many seconds of a processor. Not on Windows."""
    if not WINDOWS:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))


@contextlib.contextmanager
def memory_limit(more: int) -> Any:
    """Within the block this process gets ``more`` bytes of address space at most, and what asks for others a
    MemoryError; a limit that is lower already stays. Without limit where the system has none, or does not tell what is
    held."""
    held = (read("/proc/self/statm") or "").split()
    if not held:
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    most = int(held[0]) * resource.getpagesize() + more
    lower = most if before[0] == resource.RLIM_INFINITY else min(most, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (lower, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- memory and processors -------------------------------------------------------------------------------------------


def _meminfo(key: str) -> int | None:
    for line in (read("/proc/meminfo") or "").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def total_memory() -> int | None:
    """Bytes of RAM."""
    found, psutil = _meminfo("MemTotal"), _psutil()
    return found if found is not None or psutil is None else int(psutil.virtual_memory().total)


def free_memory() -> int | None:
    """Bytes of RAM that can be had without swapping, within what the container may hold."""
    free, psutil = _meminfo("MemAvailable"), _psutil()
    if free is None and psutil is not None:
        free = int(psutil.virtual_memory().available)
    limit, used = (read(f"{CGROUP}/memory.{name}") or "" for name in ("max", "current"))
    if free is not None and limit.strip().isdigit() and used.strip().isdigit():
        free = min(free, int(limit) - int(used))
    return free


def peak_memory() -> int | None:
    """Bytes that this process has held at most.

    Linux's ru_maxrss survives exec: a child of a large process would be told its parent's. macOS's is bytes.
    """
    for line in (read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        psutil = _psutil()
        held = psutil.Process().memory_info() if psutil is not None else None
        peak = getattr(held, "peak_wset", None)
        return None if peak is None else int(peak)
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def waited() -> float | None:
    """Seconds that threads of this process could have run and were kept waiting for a processor, in all; None where it
    is not told (other systems than Linux)."""
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return None
    told = [(read(f"/proc/self/task/{thread}/schedstat") or "").split() for thread in threads]
    found = [int(words[1]) for words in told if len(words) == 3]
    return sum(found) / 1e9 if found else None


def give_back_memory() -> None:
    """The C library gives what was freed back to the system, where it knows how to (glibc)."""
    if WINDOWS:
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def processors() -> int:
    """How many this process may run on."""
    allowed = allowed_processors()
    return allowed if allowed is not None else os.cpu_count() or 1


def allowed_processors() -> int | None:
    """Those that the system lets this process run on; None where it does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def processor(cpuinfo: str = CPUINFO) -> str:
    """The processor's name; on ARM, where the kernel tells no name, the board's."""
    said = read(cpuinfo)
    if said is None:
        return platform.processor() or platform.machine()
    for line in said.splitlines():
        if line.startswith(("model name", "Model", "Hardware")):
            return line.split(":", 1)[1].strip()
    return (read(BOARD) or "").strip("\0\n ") or platform.machine()


def last_cache() -> int | None:
    """Bytes of the last cache of the first processor, where the system tells."""
    said = read(f"{CPUS}/cpu0/cache/index3/size") or read(f"{CPUS}/cpu0/cache/index2/size")
    number = said.strip() if said else ""
    if not number.rstrip("KM").isdigit():
        return None
    return int(number.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(number[-1], 1)


def bfloat16_units(cpuinfo: str = CPUINFO) -> str:
    """What this processor has to multiply bfloat16 with, by the kernel's name; empty where it has nothing, or the
    system does not tell."""
    for line in (read(cpuinfo) or "").splitlines():
        if line.startswith("flags"):
            flags = line.split(":", 1)[1].split()
            return next((name for name in BFLOAT16 if name in flags), "")
    return ""


def load_average() -> float | None:
    """Processes that want to run, over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def governor() -> str | None:
    """How the kernel sets the clocks."""
    said = read(f"{CPUS}/cpu0/cpufreq/scaling_governor")
    return said.strip() if said else None


def clocks() -> list[str]:
    """What each processor's clock file says, in kHz."""
    return [(read(path) or "").strip() for path in glob.glob(f"{CPUS}/cpu[0-9]*/cpufreq/scaling_cur_freq")]


def has_nvidia_driver() -> bool:
    """Whether the kernel has NVIDIA's driver, told without loading anything; false where no file tells."""
    return os.path.exists("/proc/driver/nvidia")


# --- other processes -------------------------------------------------------------------------------------------------


def started(process: int) -> str:
    """When a process of this machine started, in the system's own words; empty where it does not run."""
    said = read(f"/proc/{process}/stat")
    if said is not None:
        return said.rsplit(")", 1)[1].split()[19]
    psutil = _psutil()
    if psutil is None or os.path.exists("/proc/self/stat"):
        return ""
    try:
        return str(psutil.Process(process).create_time())
    except psutil.Error:
        return ""


def command_of(process: int) -> list[str]:
    """The words a process was started with; none where they cannot be told."""
    said = read(f"/proc/{process}/cmdline")
    if said is not None:
        return said.split("\0")
    psutil = _psutil()
    try:
        return list(psutil.Process(process).cmdline()) if psutil is not None else []
    except psutil.Error:
        return []


def ends_with_parent() -> dict[str, Any]:
    """What `subprocess.Popen` is to be told so that a child ends when the process that started it is gone, however it
    went: Linux's kernel does that. Elsewhere nothing: there `launch` ends its children, unless it is killed itself."""
    return {"preexec_fn": _die_with_parent} if sys.platform == "linux" else {}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def was_killed(number: int) -> bool:
    """Whether a signal is the one that no process can refuse, as the kernel sends it when memory is short."""
    return number == getattr(signal, "SIGKILL", None)


def interrupt() -> signal.Signals:
    """What asks a child to end as Ctrl-C does; Windows knows only how to end it."""
    return signal.SIGTERM if WINDOWS else signal.SIGINT


# --- files that processes share --------------------------------------------------------------------------------------


def open_shared(path: str) -> int:
    """A handle of a file to read and write, made if need be, that no child inherits; a link is refused where the
    system can."""
    return os.open(path, os.O_RDWR | os.O_CREAT | _flags("O_NOFOLLOW"), 0o644)


def open_to_read(path: str) -> int:
    """A handle that no child inherits; a pipe or a device is not waited for where the system knows how."""
    return os.open(path, os.O_RDONLY | _flags("O_NONBLOCK"))


def _flags(*words: str) -> int:
    found = 0
    for word in (*words, "O_CLOEXEC", "O_NOINHERIT", "O_BINARY"):
        found |= getattr(os, word, 0)
    return found


def read_at(handle: int, count: int, offset: int) -> bytes:
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, count)


def write_at(handle: int, text: bytes, offset: int) -> None:
    os.lseek(handle, offset, os.SEEK_SET)
    while text:
        text = text[os.write(handle, text) :]


def touch(handle: int, path: str) -> None:
    """The file's time becomes now."""
    os.utime(handle if os.utime in os.supports_fd else path)


def lock(handle: int) -> bool | None:
    """True: the system's lock of the file is ours, until the handle is closed; False: another's; None: it has none."""
    try:
        import fcntl
    except ImportError:
        return _lock_byte(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        if e.errno in NO_LOCK:
            return None
        raise
    return True


def _lock_byte(handle: int) -> bool | None:
    try:
        import msvcrt
    except ImportError:
        return None
    windows: Any = msvcrt
    os.lseek(handle, LOCKED_BYTE, os.SEEK_SET)
    with contextlib.suppress(OSError):
        windows.locking(handle, windows.LK_NBLCK, 1)
        return True
    return False
