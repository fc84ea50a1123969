"""Takes and gives files on a device; runs there alone (`python -c`), with Python 3.9 and nothing else.

Reads one JSON line, then bytes. ``look``: how much of each file is there, and what the device is. ``put``: the bytes
from ``offset`` on; what has arrived stays when the connection breaks, and a file gets its name when its hash is right.
``get``: the file's bytes. An answer is one JSON object.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
from typing import Any

CHUNK = 1 << 20


def partial(folder, item):  # type: ignore[no-untyped-def]
    return os.path.join(folder, "." + item["name"] + "." + item["sha256"][:16] + ".partial")


def held(folder, item):  # type: ignore[no-untyped-def]
    """Bytes that are there already; all of them where the file has its name."""
    for path in (os.path.join(folder, item["name"]), partial(folder, item)):
        if os.path.exists(path):
            return os.path.getsize(path)
    return 0


def look(head, source):  # type: ignore[no-untyped-def]
    folder = os.path.abspath(os.path.expanduser(head["folder"]))
    os.makedirs(folder, exist_ok=True)
    return {
        "folder": folder,
        "held": [held(folder, item) for item in head["files"]],
        "free": shutil.disk_usage(folder).free,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def put(head, source):  # type: ignore[no-untyped-def]
    path = partial(head["folder"], head)
    # Unbuffered: what has arrived is on the disk, whenever the connection breaks.
    with open(path, "r+b" if os.path.exists(path) else "w+b", buffering=0) as file:
        file.seek(head["offset"])
        file.truncate()
        while True:
            some = source.read(CHUNK)
            if not some:
                break
            file.write(some)
        file.seek(0)
        digest, size = hashlib.sha256(), 0
        while True:
            some = file.read(CHUNK)
            if not some:
                break
            digest.update(some)
            size += len(some)
    if size < head["size"]:
        return {"held": size}
    if digest.hexdigest() != head["sha256"]:
        os.remove(path)
        return {"held": 0, "damaged": True}
    os.replace(path, os.path.join(head["folder"], head["name"]))
    return {"held": size, "done": True}


def main() -> None:
    source: Any = open(0, "rb", buffering=0)  # noqa: SIM115 - it ends with the process
    line = b""
    while not line.endswith(b"\n"):
        one = source.read(1)
        if not one:
            break
        line += one
    head = json.loads(line)
    try:
        if head["do"] == "get":
            with open(head["path"], "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            return
        found = {"look": look, "put": put}[head["do"]](head, source)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some, or name another folder in the target" if full else "see the device"
        where = e.filename or head.get("folder")
        what = ("no disk on the device: " if full else "") + f"{e.strerror}: {where}"
        found = {"error": {"what": what, "fix": fix}}
    print(json.dumps(found))


main()
