"""Models to and from the Hugging Face hub, through `huggingface_hub` alone.

Where the hub is, and who asks, `huggingface_hub` decides itself (HF_ENDPOINT, HF_TOKEN or `hf auth login`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.report.metadata import is_repo
from compress.run.folder import SEAL, read_seal
from compress.run.progress import say

REPORT = "report.json"
HUBS_OWN = {".gitattributes"}  # what the hub puts into a new repository by itself


def fetch(repo: str) -> Path:
    """The whole repository of a model, in huggingface_hub's cache.

    Raises:
        UsageError: it is no id.
        CompressError: the hub cannot be reached, has no such model, or does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from compress.models.sources import hub_cache

    _check_id(repo)
    with _errors(repo):
        try:
            with hub_cache():
                return Path(snapshot_download(repo))
        except LocalEntryNotFoundError as e:
            raise CompressError(
                f"there is no folder {repo}, and the hub cannot be reached for a model of that name",
                where=repo,
                fix="check the path, or the network",
            ) from e


def push(run: Path, repo: str, *, public: bool = False, replace: bool = False, network: str | None = None) -> Any:
    """Uploads a release as it is: one commit, after every claim that can be checked without measuring was checked.

    Args:
        run: a run folder, or its release.
        public: a new repository is private without it; one that is there stays as it is.
        replace: what else is in the repository is deleted in the same commit.

    Returns:
        ``{"repo", "url", "commit", "private", "files", "bytes", "unchanged"}``.

    Raises:
        UsageError: the id is none.
        CompressError: the release is not whole, or the hub refuses; no file was changed there then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    _check_id(repo)
    release = run / "release" if (run / "release" / REPORT).exists() else run
    report = _verified(release, network)
    files = sorted(p for p in release.rglob("*") if p.is_file())
    api, fresh = HfApi(), False
    with _errors(repo):
        api.whoami()
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.create_repo(repo, repo_type="model", private=not public)
            info, fresh = api.model_info(repo), True
        there = {s.rfilename for s in info.siblings or ()} - HUBS_OWN
        facts = {"repo": repo, "url": f"{api.endpoint}/{repo}", "private": bool(info.private), "files": len(files)}
        if there and _report_there(api, repo, there) == report["sha256"]:
            return {**facts, "commit": info.sha, "bytes": 0, "unchanged": True}
        if there and not replace:
            raise CompressError(
                f"the repository holds something else already: {len(there)} files, such as {min(there)}",
                where=repo,
                fix="name another repository, or give --replace to put this release in its place",
            )
        names = {p.relative_to(release).as_posix(): p for p in files}
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in names.items()]
        operations += [CommitOperationDelete(name) for name in sorted(there - set(names))]
        say(f"uploading {len(files)} files to {repo}")
        done = api.create_commit(
            repo,
            operations,
            commit_message=f"{report['model']['name']}, pruned ({report['recipe']['method']})"[:200],
            commit_description=f"report.json {report['sha256']}",
            parent_commit=None if fresh else info.sha,
        )
    return {**facts, "commit": done.oid, "bytes": sum(p.stat().st_size for p in files), "unchanged": False}


def _check_id(repo: str) -> None:
    if repo.count("/") != 1 or not is_repo(repo):
        raise UsageError(f"{repo!r} is no id of the hub", where="the repository", fix="write it as ORG/NAME")


def _verified(release: Path, network: str | None) -> dict[str, Any]:
    """The report of a release that is sealed and bears out what it says.

    Raises:
        CompressError: it is not.
    """
    from compress.claims.verify import refuse_failed, verify
    from compress.report.build import read_report

    for name in (SEAL, REPORT, "README.md"):
        if not (release / name).is_file():
            raise CompressError(
                f"this is no sealed release: it has no {name}",
                where=str(release),
                fix="finish the run with `compress prune`, and name its folder",
            )
    sealed = read_seal(release)["files"]
    more = sorted(
        name
        for name in (p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_file())
        if name != SEAL and name not in sealed
    )
    if more:
        raise CompressError(
            f"the release holds a file that was not sealed with it: {more[0]}", where=str(release), fix="take it out"
        )
    refuse_failed(verify(str(release), network))
    return read_report(release)


def _report_there(api: Any, repo: str, there: set[str]) -> str | None:
    """The hash that the report in a repository says it has."""
    if REPORT not in there:
        return None
    try:
        return str(json.loads(Path(api.hf_hub_download(repo, REPORT)).read_text("utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    """Every way in which the hub says no, as one message."""
    from huggingface_hub import errors

    http: Any = errors.HfHubHTTPError.__bases__[0]  # the client's own error: a name that has changed between versions
    try:
        yield
    except CompressError:
        raise
    except errors.LocalTokenNotFoundError as e:
        raise CompressError(
            "the hub asks who you are, and there is no token", where=repo, fix="`hf auth login`, or set HF_TOKEN"
        ) from e
    except errors.OfflineModeIsEnabled as e:
        raise CompressError("HF_HUB_OFFLINE is set", where=repo, fix="unset it to reach the hub") from e
    except errors.GatedRepoError as e:
        raise CompressError(
            "the model asks you to accept its terms first", where=repo, fix="accept them, then `hf auth login`"
        ) from e
    except errors.RepositoryNotFoundError as e:
        raise CompressError("the hub has no such model, or does not show it to you", where=repo, fix=LOGIN) from e
    except errors.HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else None
        if status in (401, 403):
            raise CompressError("the hub does not allow it with this token", where=repo, fix=LOGIN) from e
        if status == 412:
            raise CompressError("the repository was changed meanwhile", where=repo, fix="give the command again") from e
        said = " ".join(str(e.server_message or e).split())[:200]
        raise CompressError(f"the hub says no ({status}): {said}", where=repo, fix="mend what it names") from e
    except ValueError as e:
        raise CompressError(f"the hub refuses the card: {' '.join(str(e).split())[:200]}", where=repo, fix=CARD) from e
    except (OSError, http) as e:
        raise CompressError(
            f"the hub cannot be reached: {' '.join(str(e).split())[:120] or type(e).__name__}",
            where=repo,
            fix="check the network, and HF_ENDPOINT where it is set",
        ) from e


LOGIN = "check the id; `hf auth login` with a token that may write there"
CARD = "mend README.md's head: the hub names the key"
