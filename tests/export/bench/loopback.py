"""A real sshd on loopback, with keys and a port of its own, for the length of a test."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compress.exporters.bench.ssh import Ssh

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@dataclass
class Daemon:
    """``host`` has everything `Ssh` needs to reach it; ``pid`` is the listener's."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    def host(self, **changes: Any) -> Ssh:
        settings: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "key": self.folder / "key",
            "known_hosts": self.folder / "known_hosts",
            "python": sys.executable,
            "folder": str(self.folder / "device"),
        }
        return Ssh(**{**settings, **changes})

    def sessions(self) -> list[int]:
        """The processes that serve a connection now."""
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                if lines.get("PPid") == str(self.process.pid):
                    found.append(int(status.parent.name))
        return found


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[Daemon]:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("OpenSSH's server or client is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("host", "key", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kind, public = (folder / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {kind} {public}\n")
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where a root's sshd locks its unprivileged half in
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stdout=log, stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None:
                pytest.fail(f"sshd does not start: {(folder / 'log').read_text().strip()}")
            time.sleep(0.05)
        yield Daemon(folder, port, process)
    finally:
        process.terminate()
        process.wait()
