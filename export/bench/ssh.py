"""A device reached by ssh: files brought once and resumed, the agent run in fresh processes.

OpenSSH's own client, by argument lists, never asking (BatchMode). A device's host key must be known beforehand
(StrictHostKeyChecking=yes); ``host_key: accept-new`` in the target notes that of a first contact and still refuses a
changed one. ssh hands the far shell one line whatever it is given: that line is quoted word by word.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.exporters.bench.packed import agent_file
from compress.exporters.bench.transport import answered, folder_name
from compress.run.cache import sha256_of
from compress.system.files import whole_file

RECEIVER = Path(__file__).with_name("receiver.py")
LOST = 255  # ssh's own exit code, whatever befell the connection
ATTEMPTS = 5  # in a row that bring nothing new
CHUNK = 1 << 18

# What ssh says -> what it means and how to mend it; the first that fits. Trying again helps against the last ones only.
REFUSALS = (
    ("permission denied", "the device refuses the key", "name its key and user in the target, or add the key there"),
    ("could not resolve", "there is no such host", "check the target's host"),
    ("host key verification failed", "the device's host key is not the one that is known",
     "check it, then add it to known_hosts (ssh-keyscan), or set host_key: accept-new for a first contact"),
    ("bad permissions", "ssh refuses the key: others may read it", "chmod 600 the key"),
    ("invalid format", "the key is no private key that ssh can read", "name a private key in the target"),
)  # fmt: skip
FAILURES = (
    ("connection refused", "the host refuses the connection", "check the target's host and port, and that sshd runs"),
    ("no route to host", "the host cannot be reached", "check the target's host, and that the device is on"),
    ("network is unreachable", "the host cannot be reached", "check this machine's network"),
    ("timed out", "the host does not answer", "check the target's host, and that the device is on"),
    *(
        (word, "the connection broke", "try it with ssh by hand")
        for word in ("connection", "disconnect", "broken pipe", "timeout", "kex_exchange")
    ),
)


class Lost(CompressError):
    """The connection broke, or could not be made: another attempt may help."""


def _broken(complaint: bytes, title: str) -> CompressError:
    said = complaint.decode(errors="replace").lower()
    for sayings, kind in ((REFUSALS, CompressError), (FAILURES, Lost)):
        for saying, what, fix in sayings:
            if saying in said:
                return kind(f"{what} ({_last(complaint)})", where=title, fix=fix)
    # ssh ends with the same code where the far process was killed, and says nothing of its own.
    return CompressError(
        f"the process on the device was killed: {_last(complaint) or 'it did not say why'}",
        where=title,
        fix="it may have run out of memory, or its runtime does not fit the device: see the device's log",
    )


@dataclass(frozen=True)
class Ssh:
    """
    Args:
        host, port, user, key, known_hosts: as ssh knows them; what is None is as the user's own ssh settings have it.
        host_key: ``strict`` or ``accept-new``.
        python: the interpreter there, with numpy and the runtime.
        folder: where artefacts are kept there.
    """

    host: str
    port: int | None = None
    user: str | None = None
    key: Path | None = None
    known_hosts: Path | None = None
    host_key: str = "strict"
    python: str = "python3"
    folder: str = "~/.cache/compress"
    connect_seconds: int = 10
    options: tuple[str, ...] = ()  # further words for ssh itself

    @property
    def title(self) -> str:
        at = f"{self.user}@{self.host}" if self.user else self.host
        return f"{at}:{self.port}" if self.port else at

    def command(self, *words: str) -> list[str]:
        """The argument list that runs ``words`` there."""
        if shutil.which("ssh") is None:
            raise UsageError("ssh is not installed here", where=self.title, fix="install OpenSSH's client")
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": str(self.connect_seconds),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
            "StrictHostKeyChecking": "accept-new" if self.host_key == "accept-new" else "yes",
        }
        if self.known_hosts is not None:
            settings["UserKnownHostsFile"] = str(self.known_hosts)
        if self.key is not None:
            settings["IdentitiesOnly"] = "yes"
        found = ["ssh", "-T", *(part for k, v in settings.items() for part in ("-o", f"{k}={v}")), *self.options]
        if self.key is not None:
            found += ["-i", str(self.key)]
        if self.port is not None:
            found += ["-p", str(self.port)]
        if self.user is not None:
            found += ["-l", self.user]
        return [*found, "--", self.host, shlex.join(words)]

    def available(self) -> dict[str, Any]:
        return self._look("", ())

    def push(self, files: Sequence[Path]) -> dict[str, str]:
        return self._push(files, folder_name(files))

    @cached_property
    def agent(self) -> str:
        """The agent's path there; brought when it is first asked for."""
        return next(iter(self._push((agent_file(),), "agent").values()))

    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        words = self.command(self.python, self.agent)
        what = json.dumps(request).encode()
        for attempt in range(ATTEMPTS):
            done = subprocess.run(words, input=what, capture_output=True)
            if done.returncode != LOST or attempt == ATTEMPTS - 1:
                break
            broken = _broken(done.stderr, self.title)
            if not isinstance(broken, Lost):
                raise broken
            time.sleep(2**attempt)  # a measurement that was cut off is made again, from its beginning
        if done.returncode:
            raise self._failed(done.returncode, done.stderr)
        return self._json(done.stdout, done.stderr)

    def pull(self, there: str, here: Path) -> None:
        head = json.dumps({"do": "get", "path": there}).encode() + b"\n"
        with whole_file(here) as partial:
            with partial.open("wb") as file:
                done = subprocess.run(self._receiver(), input=head, stdout=file, stderr=subprocess.PIPE)
            if done.returncode:
                raise self._failed(done.returncode, done.stderr)

    def room(self) -> str:
        return str(self._look("scratch", ())["folder"])

    def _receiver(self) -> list[str]:
        return self.command(self.python, "-c", RECEIVER.read_text("utf-8"))

    def _look(self, name: str, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        head = (
            json.dumps({"do": "look", "folder": f"{self.folder}/{name}".rstrip("/"), "files": items}).encode() + b"\n"
        )
        done = subprocess.run(self._receiver(), input=head, capture_output=True)
        if done.returncode:
            raise self._failed(done.returncode, done.stderr)
        return answered(self._json(done.stdout, done.stderr), self.title)

    def _push(self, files: Sequence[Path], name: str) -> dict[str, str]:
        items: list[dict[str, Any]] = [
            {"name": p.name, "sha256": sha256_of(p), "size": p.stat().st_size} for p in files
        ]
        stuck, damaged, most = 0, 0, -1
        while True:
            try:
                seen = self._look(name, items)
                if sum(seen["held"]) > most:
                    stuck, most = 0, sum(seen["held"])
                self._check_room(seen, items)
                for path, item, have in zip(files, items, seen["held"], strict=True):
                    if have < item["size"] or not item["size"]:
                        found = self._put(path, item, seen["folder"], have)
                        damaged += bool(found.get("damaged"))
                        if not found.get("done"):
                            raise Lost(f"{path.name} arrived {'damaged' if 'damaged' in found else 'in part'}")
                return {item["name"]: f"{seen['folder']}/{item['name']}" for item in items}
            except Lost as e:
                stuck += 1
                if most < 0:  # there was no contact at all: what is wrong is said at once
                    raise
                if stuck >= ATTEMPTS or damaged >= ATTEMPTS:
                    raise CompressError(
                        f"copying failed {ATTEMPTS} times on end: {e.what}",
                        where=self.title,
                        fix="the same command goes on where it stopped",
                    ) from e
                time.sleep(0.5 * 2 ** (stuck - 1))

    def _check_room(self, seen: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> None:
        missing = sum(item["size"] - have for item, have in zip(items, seen["held"], strict=True))
        if missing > seen["free"]:
            raise CompressError(
                f"no disk on the device: {missing / 1e6:.1f} MB are to be copied, {seen['free'] / 1e6:.1f} MB are free",
                where=f"{self.title}, {seen['folder']}",
                fix="free some, or name another folder in the target",
            )

    def _put(self, path: Path, item: Mapping[str, Any], folder: str, offset: int) -> dict[str, Any]:
        """Sends a file from ``offset`` on. Raises Lost."""
        head = {"do": "put", "folder": folder, "offset": offset, **item}
        with (
            path.open("rb") as file,
            subprocess.Popen(
                self._receiver(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            file.seek(offset)
            try:
                process.stdin.write(json.dumps(head).encode() + b"\n")
                shutil.copyfileobj(file, process.stdin, CHUNK)
                process.stdin.close()
            except BrokenPipeError:  # why the far side stopped reading stands in what it says
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
            said, complaint = process.stdout.read(), process.stderr.read()
        if process.returncode:
            raise self._failed(process.returncode, complaint)
        return answered(self._json(said, complaint), self.title)

    def _json(self, said: bytes, complaint: bytes) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(said)
            return found
        except ValueError as e:
            raise CompressError(
                f"the device answered something else than asked for: {_last(said) or _last(complaint) or 'nothing'}",
                where=self.title,
                fix="its shell must print nothing of its own when it is used without a terminal",
            ) from e

    def _failed(self, code: int, complaint: bytes) -> CompressError:
        last = _last(complaint)
        if code == LOST:
            return _broken(complaint, self.title)
        if code < 0:
            return Lost(f"ssh itself was killed by signal {-code}", where=self.title, fix="start it again")
        if code in (126, 127):
            return CompressError(
                f"the device has no {self.python} ({last})",
                where=self.title,
                fix="install Python 3.9 or newer there, or name its path as transport.python in the target",
            )
        if code > 128:
            return CompressError(
                f"the process on the device was killed by signal {code - 128} {last}".rstrip(),
                where=self.title,
                fix="it may have run out of memory: see the device's log",
            )
        return CompressError(
            f"on the device: {last or f'it ended with {code}'}", where=self.title, fix="see the device"
        )


def _last(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
