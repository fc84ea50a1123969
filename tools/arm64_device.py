"""An emulated arm64 device: a Debian arm64 root under user-mode emulation, with a real sshd on loopback inside it.

    python tools/arm64_device.py build            # once: minutes, about 450 MB under ~/.cache/compress/arm64-device
    python tools/arm64_device.py start            # prints the target file that measures on it
    python tools/arm64_device.py stop

What is real: the arm64 build of Python and of ONNX Runtime, sshd, the transport. What is not: the speed. A latency from
it is marked *emulated* and never gated. Needs root, debootstrap and qemu-user-static (all Debian packages), pip for
the arm64 wheels, and the kernel's binfmt_misc, where the emulator is registered for arm64 programs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
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
# Not /sys: it tells of the host's x86 processors, and ONNX Runtime for arm64 crashes when it reads of them there.
MOUNTS = ("proc", "dev")
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
            f"not installed: {', '.join(missing)}",
            where="arm64 device",
            fix="apt-get install debootstrap qemu-user-static",
        )
    if os.geteuid() != 0:
        raise UsageError("a chroot needs root", where="arm64 device", fix="run it as root")


def register() -> None:
    """Lets the kernel start arm64 programs through the emulator; does nothing where it already does."""
    if not (BINFMT / "register").exists():
        _run("mount", "-t", "binfmt_misc", "binfmt_misc", BINFMT)
    if any(entry.name.startswith("qemu-aarch64") for entry in BINFMT.iterdir()):
        return
    (BINFMT / "register").write_text(f":qemu-aarch64:M::{_MAGIC}:{_MASK}:{shutil.which(QEMU)}:OPF\n", encoding="utf-8")


def mirror() -> tuple[str, str]:
    """(URL, suite) of this system's own Debian mirror."""
    for line in _run(
        "apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT)", "Created-By: Packages"
    ).splitlines():
        site, codename, component = line.split()
        if component == "main" and codename == "bookworm":
            return site, codename
    raise UsageError("apt knows no mirror of Debian bookworm", where="/etc/apt", fix="add one to its sources")


def _mounted() -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]


def build(home: Path = HOME) -> Path:
    """Makes the root if it is not there yet; it appears whole or not at all."""
    root = home / "root"
    if root.is_dir():
        return root
    require()
    register()
    partial = home / "root.partial"
    if partial.exists():
        _unmount_below(partial)  # debootstrap leaves /proc behind; what is mounted must not be deleted
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
    _unmount_below(partial)
    partial.rename(root)
    return root


def _unmount_below(folder: Path) -> None:
    for place in reversed(_mounted()):
        if place.startswith(f"{folder.resolve()}/"):
            _run("umount", "--lazy", place)


def start(home: Path = HOME, port: int = PORT) -> Path:
    """Starts sshd inside and returns the target file that measures on it.

    Raises:
        CompressError: sshd does not start; with its own words.
    """
    root = build(home).resolve()
    register()
    for name in MOUNTS:
        if str(root / name) not in _mounted():
            _run("mount", "--rbind", "--make-rslave", f"/{name}", root / name)
    for name in ("key", "host"):
        if not (home / name).exists():
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / name)
    for name, source, mode in (("host", "host", 0o600), ("authorized_keys", "key.pub", 0o600)):
        there = root / "etc" / "ssh" / f"device_{name}"
        there.write_bytes((home / source).read_bytes())
        there.chmod(mode)
    (root / "run" / "sshd").mkdir(parents=True, exist_ok=True)
    (root / "etc" / "ssh" / "device_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey /etc/ssh/device_host\nPidFile /run/device.pid\n"
        "AuthorizedKeysFile /etc/ssh/device_authorized_keys\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nUsePAM no\nStrictModes no\n",
        encoding="utf-8",
    )
    kind, public = (home / "host.pub").read_text("utf-8").split()[:2]
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {public}\n", encoding="utf-8")
    stop(home, unmount=False)
    with (home / "log").open("wb") as log:
        sshd = subprocess.Popen(
            ["chroot", root, "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/device_config"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        if sshd.poll() is not None:
            said = (home / "log").read_text("utf-8").strip().splitlines()
            raise CompressError(
                f"sshd does not start: {said[-1] if said else sshd.returncode}",
                where=str(home / "log"),
                fix="see there",
            )
        time.sleep(0.1)
    (home / "pid").write_text(str(sshd.pid), encoding="utf-8")
    target = home / "arm64-device.yaml"
    facts = {
        "description": "an emulated arm64 device on loopback",
        "extends": "raspberry-pi-5",
        "transport": {
            "kind": "ssh", "host": "127.0.0.1", "port": port, "user": "root",
            "key": str(home / "key"), "known_hosts": str(home / "known_hosts"),
        },
        "threads": 1,
        "cool_down": 0,
        "emulated": True,
    }  # fmt: skip
    target.write_text(yaml.safe_dump(facts, sort_keys=False), encoding="utf-8")
    return target


def stop(home: Path = HOME, unmount: bool = True) -> None:
    """Ends the sshd that `start` started, and takes away what it mounted."""
    held = home / "pid"
    if held.exists():
        pid = int(held.read_text("utf-8"))
        with contextlib.suppress(OSError):
            # The number may be another process's by now: only one that runs in this root is ended.
            if Path(f"/proc/{pid}/root").resolve() == (home / "root").resolve():
                os.kill(pid, signal.SIGTERM)
        held.unlink()
    root = (home / "root").resolve()
    for name in MOUNTS if unmount else ():
        if str(root / name) in _mounted():
            _run("umount", "--recursive", "--lazy", root / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "start", "stop"])
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args()
    try:
        if given.what == "build":
            print(build(given.home))
        elif given.what == "start":
            print(start(given.home, given.port))
        else:
            stop(given.home)
    except CompressError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
