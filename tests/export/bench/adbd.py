"""The device's end of adb's protocol, for the real client to talk to where no phone can be had.

Speaks what `adb connect`, `shell` (v2), `push` and `pull` need (AOSP: packages/modules/adb protocol.txt, SYNC.TXT,
shell_protocol.h) and runs commands in a shell of this machine. ``getprop`` and ``dumpsys``, which only Android has, are
small programs that say what Android's documentation shows. So the client, its options, quoting, exit codes and
transfers are real; the phone is not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

BANNER = b"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features=shell_v2,cmd\0"
MOST = 1 << 18
PROGRAMS = {
    "getprop": (
        'case "$1" in ro.product.model) echo "Pixel 8";; ro.soc.model) echo "Tensor G3";;'
        " ro.product.cpu.abi) echo arm64-v8a;; ro.build.version.release) echo 15;; ro.build.id) echo AP4A;; esac\n"
    ),
    "dumpsys": (
        'case "$1" in battery) printf "  USB powered: true\\n  level: 87\\n  voltage: 4256\\n  temperature: 294\\n";;'
        ' thermalservice) printf "IsStatusOverride: false\\nThermal Status: 0\\n";; esac\n'
    ),
}


class Stream:
    """One of the connection's streams: what arrives is read in order, what is written waits for the far side's OKAY."""

    def __init__(self, device: Device, mine: int, theirs: int) -> None:
        self.device, self.mine, self.theirs = device, mine, theirs
        self.held, self.closed = b"", False
        self.arrived, self.ready = threading.Condition(), threading.Semaphore(0)

    def read(self, count: int) -> bytes:
        with self.arrived:
            self.arrived.wait_for(lambda: len(self.held) >= count or self.closed)
            found, self.held = self.held[:count], self.held[count:]
        return found

    def write(self, data: bytes) -> None:
        for at in range(0, len(data), MOST // 2):
            self.device.send(b"WRTE", self.mine, self.theirs, data[at : at + MOST // 2])
            self.ready.acquire()

    def close(self) -> None:
        self.device.send(b"CLSE", self.mine, self.theirs)


class Device:
    """One client's connection."""

    def __init__(self, connection: socket.socket, environment: dict[str, str]) -> None:
        self.connection, self.environment = connection, environment
        self.lock = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        number = int.from_bytes(command, "little")
        head = struct.pack("<4s5I", command, first, second, len(data), sum(data) & 0xFFFFFFFF, number ^ 0xFFFFFFFF)
        with self.lock, contextlib.suppress(OSError):
            self.connection.sendall(head + data)

    def serve(self) -> None:
        with self.connection, self.connection.makefile("rb") as source:
            while head := source.read(24):
                command, first, second, size, _, _ = struct.unpack("<4s5I", head)
                data = source.read(size)
                if command == b"CNXN":
                    self.send(b"CNXN", 0x01000001, MOST, BANNER)
                elif command == b"OPEN":
                    stream = self.streams[first] = Stream(self, first, first)
                    self.send(b"OKAY", first, first)
                    threading.Thread(
                        target=self.service, args=(stream, data.rstrip(b"\0").decode()), daemon=True
                    ).start()
                elif second in self.streams:
                    stream = self.streams[second]
                    if command == b"OKAY":
                        stream.ready.release()
                        continue
                    with stream.arrived:
                        stream.held += data
                        stream.closed |= command == b"CLSE"
                        stream.arrived.notify_all()
                    if command == b"WRTE":
                        self.send(b"OKAY", stream.mine, stream.theirs)
                    else:
                        stream.ready.release()

    def service(self, stream: Stream, name: str) -> None:
        kind, _, rest = name.partition(":")
        if kind.startswith("shell"):
            done = subprocess.run(
                ["sh", "-c", rest], capture_output=True, env=self.environment, stdin=subprocess.DEVNULL
            )
            for number, data in ((1, done.stdout), (2, done.stderr), (3, bytes([done.returncode & 255]))):
                if data:
                    stream.write(struct.pack("<BI", number, len(data)) + data)
        elif kind == "sync":
            self.sync(stream)
        stream.close()

    def sync(self, stream: Stream) -> None:
        while len(head := stream.read(8)) == 8:
            command, size = head[:4], struct.unpack("<I", head[4:])[0]
            if command == b"QUIT":
                return
            path = stream.read(size).decode()
            if command == b"STAT":
                mode, length, changed = 0, 0, 0
                with contextlib.suppress(OSError):
                    found = os.stat(path)
                    mode, length, changed = found.st_mode, found.st_size, int(found.st_mtime)
                stream.write(struct.pack("<4s3I", b"STAT", mode, length, changed))
            elif command == b"SEND":
                self.receive(stream, path.rpartition(",")[0])
            elif command == b"RECV":
                held = Path(path).read_bytes()
                for at in range(0, len(held), 1 << 16):
                    part = held[at : at + (1 << 16)]
                    stream.write(struct.pack("<4sI", b"DATA", len(part)) + part)
                stream.write(struct.pack("<4sI", b"DONE", 0))

    def receive(self, stream: Stream, path: str) -> None:
        failed = ""
        parts = []
        while True:
            command, size = struct.unpack("<4sI", stream.read(8))
            if command == b"DONE":
                break
            parts.append(stream.read(size))
        try:
            Path(path).write_bytes(b"".join(parts))
        except OSError as e:
            failed = str(e.strerror)
        said = failed.encode()
        stream.write(struct.pack("<4sI", b"FAIL" if failed else b"OKAY", len(said)) + said)


@contextlib.contextmanager
def adbd(folder: Path) -> Iterator[str]:
    """The address to `adb connect` to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in PROGRAMS.items():
        (folder / name).write_text("#!/bin/sh\n" + text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=Device(connection, environment).serve, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
