"""The name that this project's package goes by on an index, and whether a package of another name has taken its place.

`compress` on the public index is somebody else's: who installs that gets another program, whose files lie where ours
would. So the package is called otherwise; what is imported and typed stays `compress`. Run as a script, this
file takes an install of this project under that old name out of an environment, before the new one goes in; so it
imports nothing but the standard library.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "compress-toolchain"
STRANGER = "compress"  # the package of that name on the index; ours too, until it was renamed
HERE = Path(__file__).resolve().parent


def install_line(extra: str) -> str:
    """How to install an extra of ours, as every message words it."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def examine() -> list[dict[str, str]]:
    """Rows for `compress doctor`: whether what runs is what is installed, and whose package has the name `compress`.

    States: ``ok``, ``absent`` (run from a source tree), ``old`` (installed under the name of before), ``wrong``.
    """
    from compress import __version__

    own = list(_installed(DISTRIBUTION))
    row = {"part": DISTRIBUTION, "state": "ok", "for": "this program", "detail": __version__}
    fault = next((f for f in map(_fault, own) if f), None)
    if not own:
        row |= {"state": "absent", "detail": f"run from {HERE.parent}; pip install -e {HERE.parent}"}
    elif fault is not None:
        row |= {"state": "wrong", "detail": fault}
    return [row, *map(_row_of_namesake, _installed(STRANGER))]


def is_ours(found: Distribution) -> bool:
    """Whether a distribution is this project, whatever it is called: its command starts our command line."""
    return any(
        (e.group, e.name, e.value) == ("console_scripts", "compress", "compress.cli:main") for e in found.entry_points
    )


def _installed(name: str, places: Sequence[str] | None = None) -> Iterator[Distribution]:
    """Distributions of that name, each place once."""
    seen = set()
    found = importlib.metadata.distributions(name=name, path=list(sys.path if places is None else places))
    for each in found:
        place = _metadata_folder(each)
        if place is not None and place not in seen and not _left_by_a_build(place):
            seen.add(place)
            yield each


def _left_by_a_build(place: Path) -> bool:
    """Whether these are facts that setuptools wrote beside a project's sources: nothing is installed there."""
    return place.suffix == ".egg-info" and (place.parent / "pyproject.toml").is_file()


def _metadata_folder(found: Distribution) -> Path | None:
    path = getattr(found, "_path", None)  # there is no public name for it
    return Path(path).resolve() if path is not None else None


def _row_of_namesake(found: Distribution) -> dict[str, str]:
    if is_ours(found):
        state, use = "old", "this program under the name it had"
        how = f"pip uninstall {STRANGER}, then install it anew"
    else:
        state, use = "wrong", "another project's package, whose files lie where this program's do"
        how = f"pip uninstall {STRANGER}, then pip install --force-reinstall {DISTRIBUTION}"
    return {"part": STRANGER, "state": state, "for": use, "detail": f"{found.version}; {how}"}


def _fault(found: Distribution) -> str | None:
    """What is wrong with an install of ours; None where its files are those that run."""
    installed = _source_tree(found) or Path(str(found.locate_file("")))
    place = (installed / "compress").resolve()
    if place != HERE:
        return f"what runs is {HERE}, installed is {place}: check PYTHONPATH and the folder you are in"
    changed = _changed(found)
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return (
            f"{changed[0]}{more}: not as installed; another package may have written there:"
            f" pip install --force-reinstall {DISTRIBUTION}"
        )
    return None


def _source_tree(found: Distribution) -> Path | None:
    """The folder of an editable install."""
    try:
        facts = json.loads(found.read_text("direct_url.json") or "{}")
        editable = facts["dir_info"]["editable"]
    except (ValueError, KeyError, TypeError):
        return None  # a wheel, or an install whose facts another tool wrote
    return Path(unquote(urlsplit(str(facts["url"])).path)) if editable else None


def _changed(found: Distribution) -> list[str]:
    """Files of a wheel that are gone, or whose content is not what was installed."""
    changed = []
    for file in found.files or ():
        if file.hash is None or file.suffix not in (".py", ".yaml", ".css", ".js"):
            continue
        path = Path(str(found.locate_file(file)))
        same = path.is_file() and file.hash.value == _record_hash(path, file.hash.mode)
        if not same:
            changed.append(str(file))
    return changed


def _record_hash(path: Path, mode: str) -> str:
    """A file's hash as RECORD has it: urlsafe base64 without padding."""
    return base64.urlsafe_b64encode(hashlib.new(mode, path.read_bytes()).digest()).rstrip(b"=").decode()


def replace_old_install(places: Sequence[str]) -> str | None:
    """Uninstalls this project under its old name; returns what to do where that name is somebody else's.

    Args:
        places: the folders of packages that are looked at.
    """
    for found in _installed(STRANGER, places):
        if not is_ours(found):
            return (
                f"{STRANGER} {found.version} in {places[0]} is another project's package, and its files lie where this"
                f" program's go: take it out ({sys.executable} -m pip uninstall {STRANGER}), or remove .venv"
            )
        # -P: no file of the folder we are in is imported, nor its build's leavings taken for the install.
        subprocess.run(
            [sys.executable, "-P", "-m", "pip", "uninstall", "--quiet", "--yes", STRANGER], check=True, timeout=600
        )
    return None


if __name__ == "__main__":
    sys.exit(replace_old_install([sysconfig.get_path("purelib")]))
