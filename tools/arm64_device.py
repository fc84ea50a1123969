"""An emulated arm64 device: a Debian arm64 root under user-mode emulation, with a real sshd on loopback inside it.

    python tools/arm64_device.py build            # once: minutes, about 700 MB under ~/.cache/compress/arm64-device
    python tools/arm64_device.py start            # prints the target file that measures on it
    python tools/arm64_device.py stop

What is real: the arm64 build of Python and of ONNX Runtime, sshd, the transport. What is not: the speed. A latency from
it is marked *emulated* and never gated. Needs root, debootstrap and qemu-user-static (all Debian packages), pip for
the arm64 wheels, and the kernel's binfmt_misc, where the emulator is registered for arm64 programs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from compress.errors import CompressError, UsageError

HOME = Path.home() / ".cache" / "compress" / "arm64-device"
QEMU = "qemu-aarch64-static"
BINFMT = Path("/proc/sys/fs/binfmt_misc")
PACKAGES = ("openssh-server", "python3")
PYTHON = "3.11"  # of Debian bookworm
PORT = 22422
# The kernel's rule: ELF, 64 bits, little-endian, machine 0xb7; flag F keeps the emulator open, so that a chroot needs
# no copy of it. Source: QEMU's scripts/qemu-binfmt-conf.sh.
_MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"


def _run(*arguments: str | Path) -> str:
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"it ended with {done.returncode}").splitlines()[-3:]
        raise CompressError(
            f"{arguments[0]} failed: {' / '.join(last)}", where=" ".join(map(str, arguments)), fix="see its message"
        )
    return done.stdout


def require() -> None:
    """Raises:
    UsageError: something it needs is not here.
    """
    missing = [name for name in ("debootstrap", QEMU) if shutil.which(name) is None]
    if missing:
        raise UsageError(
            f"not installed: {', '.join(missing)}", where="arm64 device", fix="apt-get install debootstrap qemu-user-static"
        )
    if os.geteuid() != 0:
        raise UsageError("a chroot needs root", where="arm64 device", fix="run it as root")


def register() -> None:
    """Lets the kernel start arm64 programs through the emulator; does nothing where it already does."""
    if not (BINFMT / "register").exists():
        _run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if any(entry.name.startswith("qemu-aarch64") for entry in BINFMT.iterdir()):
        return
    (BINFMT / "register").write_text(f":qemu-aarch64:M::{_MAGIC}:{_MASK}:{shutil.which(QEMU)}:OPF\n")


def mirror() -> tuple[str, str]:
    """(URL, suite) of this system's own Debian mirror."""
    for line in _run("apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT)", "Created-By: Packages").splitlines():
        site, codename, component = line.split()
        if component == "main" and codename == "bookworm":
            return site, codename
    raise UsageError("apt knows no mirror of Debian bookworm", where="/etc/apt", fix="add one to its sources")


def build(home: Path = HOME) -> Path:
    """Makes the root if it is not there yet; it appears whole or not at all."""
    root = home / "root"
    if root.is_dir():
        return root
    require()
    register()
    partial = home / "root.partial"
    if partial.exists():
        shutil.rmtree(partial)
    home.mkdir(parents=True, exist_ok=True)
    url, suite = mirror()
    print(f"debootstrap {suite} arm64", flush=True)
    _run("debootstrap", "--arch=arm64", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, partial, url)
    print("arm64 wheels", flush=True)
    wheels = home / "wheels"
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels, "--only-binary=:all:",
        "--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}",
        "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_27_aarch64",
        "--platform", "manylinux2014_aarch64", "onnxruntime", "numpy",
    )  # fmt: skip
    packages = partial / "usr" / "lib" / "python3" / "dist-packages"
    for wheel in wheels.glob("*.whl"):
        shutil.unpack_archive(wheel, packages, "zip")
    partial.rename(root)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "start", "stop"])
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args()
    try:
        if given.what == "build":
            print(build(given.home))
    except CompressError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
