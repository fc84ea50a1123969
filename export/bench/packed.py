"""The agent as one file: a zip that Python runs, made of the files that stand alone on a device."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path

from compress.run.cache import cache_dir
from compress.system import host
from compress.system.files import whole_file

_HERE = Path(__file__).parent
FILES = {
    "__main__.py": _HERE / "agent.py",
    "protocol.py": _HERE / "protocol.py",
    "environment.py": _HERE / "environment.py",
    "runtimes.py": _HERE.parent / "runtimes.py",
    "host.py": Path(host.__file__),
}


def pack() -> bytes:
    """The same bytes for the same files: its hash names it on the device."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
        for name, path in FILES.items():
            file.writestr(zipfile.ZipInfo(name), path.read_bytes())
    return held.getvalue()


@cache
def agent_file() -> Path:
    """Where it lies on this machine; written when it is not there yet."""
    made = pack()
    path = cache_dir() / "agent" / f"agent-{hashlib.sha256(made).hexdigest()[:16]}.pyz"
    if not path.is_file() or path.read_bytes() != made:
        with whole_file(path) as partial:
            partial.write_bytes(made)
    return path
