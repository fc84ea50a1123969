"""`compress gate`: the gate file, models from git revisions, and what is left behind for people and for CI."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from compress.errors import CompressError, UsageError
from compress.exporters import gate
from compress.exporters import gate_outputs as outputs
from compress.exporters.gate_measure import Measuring
from compress.exporters.gate_models import Artefact, check_inputs, find
from compress.exporters.gate_run import compare
from compress.exporters.gate_run import self_test as against_itself
from compress.exporters.inputs import given
from compress.run.written import append, refuse_replacing, written
from compress.schema.recipe import load_section
from compress.schema.section import Clash, Count, Section, whole_number
from compress.system.files import disk_errors

GIT, WORKTREE = "git:", "worktree"
NAMES = (*outputs.FILES, "gate.png")


class NotJudged(CompressError):
    """There is no verdict. Its exit code is not 1: that says that the candidate is over a budget."""

    exit_code = 2


class GateFile(Section):
    """A gate that is kept in the user's repository."""

    schema_version: Literal[1] = 1
    description: str = ""
    baseline: str | None = Field(None, description="as on the command line, which wins")
    candidate: str | None = None
    budgets: list[str] = Field(min_length=1)
    strict: bool = Field(False, description="inconclusive fails")
    pinned: str | None = Field(None, min_length=1, description="the name of the device, if it is a pinned one")
    build: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, description="the command, as a list of arguments, that makes the artefact in a git tree"
    )
    artefact: Path | None = Field(None, description="what the command makes, relative to the tree's top")
    threads: int = Field(1, ge=1)
    samples: int = Field(gate.SAMPLES, ge=1, description="of 0.1 s or more, in one process")
    batch: int = Field(1, ge=1, description="networks: samples of one call")
    prompt: int = Field(128, ge=1, description="language models: tokens of the prompt")
    context: int = Field(128, ge=1, description="language models: tokens in the cache")
    shapes: dict[str, list[Count]] = Field({}, description="whole shapes of inputs, by name")
    inputs: Path | None = Field(
        None, description="networks: an .npz file with an array for each input, which both are given"
    )

    @model_validator(mode="after")
    def _whole(self) -> GateFile:
        if (self.build is None) != (self.artefact is None):
            missing = "artefact" if self.artefact is None else "build"
            raise Clash(
                f"build and artefact belong together (the command, and what it makes), and {missing} is missing",
                f"give {missing}, or neither",
            )
        if self.inputs is not None and (self.shapes or "batch" in self.model_fields_set):
            raise Clash("inputs have shapes of their own", "give inputs, or batch and shapes")
        return self


def load_gate(path: Path) -> GateFile:
    """Reads and checks a gate file.

    Raises:
        UsageError: there is none, or anything in it is wrong: line, key and the nearest valid name are given.
    """
    if not path.is_file():
        raise UsageError("there is no such gate file", where=str(path), fix="check the path of --gate")
    found: GateFile = load_section(path, GateFile, "gate file")
    return found


def run(
    baseline: str | None,
    candidate: str | None,
    budgets: Sequence[str],
    *,
    file: Path | None = None,
    self_test: bool = False,
    strict: bool = False,
    pinned: str | None = None,
    out: Path | None = None,
    summary: Path | None = None,
    inputs: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Gates a candidate, or tests the machine, and writes what is asked for.

    Args:
        baseline: a file, a folder, a run, or ``git:REV``; the gate file's where it is None.
        candidate: likewise, or ``worktree``: what the gate file's command builds in the working tree.
        budgets: in place of the gate file's, where there are any.
        out: a folder for gate.json, junit.xml, summary.md and the plot.
        summary: a file that the Markdown summary is appended to; ``$GITHUB_STEP_SUMMARY`` where it is None.
        inputs: an .npz file with an array for each input of a network, which both are given; the gate file's where it
            is None.
        options: other fields of `Measuring`; None: the gate file's, or the default.

    Returns:
        The record; its ``exit_code`` is the command's.

    Raises:
        UsageError: what was asked for is wrong; nothing was measured.
        NotJudged: a model, a build, a measurement or the disk failed; nothing is left behind.
    """
    for folder, option in ((out, "--out"), (summary.parent if summary else None, "--summary")):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError("this is no folder", where=f"{option} {folder}", fix="name another")
    gate_file = load_gate(file) if file is not None else None
    texts = list(budgets) or (gate_file.budgets if gate_file else [])
    parsed = [gate.parse_budget(text) for text in texts]
    names = [baseline or (gate_file and gate_file.baseline), candidate or (gate_file and gate_file.candidate)]
    if names[0] is None:
        raise UsageError("there is no baseline", where="gate", fix="compress gate BASELINE CANDIDATE --budget ...")
    if self_test:
        if candidate is not None:
            raise UsageError("a self-test takes no candidate", where=candidate, fix="leave it out")
        names = names[:1]
    elif names[1] is None:
        raise UsageError("there is no candidate", where="gate", fix="compress gate BASELINE CANDIDATE --budget ...")
    elif not parsed:
        raise UsageError("there is no budget", where="gate", fix=f"--budget, for example: {gate.EXAMPLES}")
    if inputs is not None and (options.get("batch") or options.get("shapes")):
        raise UsageError(
            "the arrays have shapes of their own", where="--inputs", fix="leave --batch and --shape out, or --inputs"
        )
    arrays = Path(inputs) if inputs is not None else gate_file.inputs if gate_file else None
    spec = _measuring(gate_file, options)
    began, at = time.monotonic(), outputs.now()
    step = os.environ.get("GITHUB_STEP_SUMMARY")
    to = None if self_test else summary or (Path(step) if step else None)
    try:
        # Before anything is measured: a place that cannot be written is said at once.
        with nullcontext() if out is None or self_test else written(out, NAMES, refuse_replacing) as beside:
            if to is not None:
                append(to, "")
            with _trees([str(n) for n in names], gate_file, file) as found, _with(arrays, found, spec) as spec:
                if self_test:
                    record = against_itself(found[0], parsed, spec)
                else:
                    record = compare(
                        found[0],
                        found[1],
                        parsed,
                        spec,
                        strict=strict or (gate_file is not None and gate_file.strict),
                        pinned=pinned or (gate_file.pinned if gate_file else None),
                    )
            record |= {
                "time": at,
                "seconds": round(time.monotonic() - began, 3),
                "command": shlex.join(["compress", *sys.argv[1:]]),
            }
            if beside is not None and out is not None:
                with disk_errors(out):
                    record["files"] = {name: str(out / name) for name in outputs.write(record, beside)}
        if to is not None:
            append(to, outputs.summary(record) + "\n")
    except UsageError:
        raise
    except CompressError as e:
        raise NotJudged(e.what, e.where, e.fix) from e
    return record


@contextmanager
def _with(arrays: Path | None, found: Sequence[Artefact], spec: Measuring) -> Iterator[Measuring]:
    """``spec`` with the arrays that every artefact is given."""
    if arrays is None:
        yield spec
        return
    if len(found) == 2:
        check_inputs(*found)
    with given(arrays, [artefact.graph for artefact in found]) as inputs:
        yield replace(spec, inputs=inputs, shapes=None)


def on_github() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def _measuring(gate_file: GateFile | None, options: dict[str, Any]) -> Measuring:
    base: dict[str, Any] = {}
    if gate_file is not None:
        base = {k: getattr(gate_file, k) for k in ("threads", "samples", "batch", "prompt", "context", "shapes")}
    return Measuring(**{**base, **{k: v for k, v in options.items() if v}})


def parse_shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """``NAME=1x3x32x32`` -> ``{NAME: [1, 3, 32, 32]}``."""
    found = {}
    for text in texts:
        name, _, dims = text.rpartition("=")
        try:
            found[name] = [whole_number(d) for d in dims.split("x")]
        except ValueError:
            found[name] = []
        if not name or not found[name] or min(found[name]) < 1:
            raise UsageError(f"{text!r} is not NAME=1x3x32x32", where="--shape", fix="say the whole shape of one input")
    return found


@contextmanager
def _trees(names: Sequence[str], gate_file: GateFile | None, file: Path | None) -> Iterator[list[Artefact]]:
    """The artefacts of the names; those of git revisions are built, and their trees removed at the end."""
    if not any(n.startswith(GIT) or n == WORKTREE for n in names):
        yield [find(n) for n in names]
        return
    if gate_file is None or gate_file.build is None:
        raise UsageError(
            "nothing says how a model is built from a git revision",
            where=next(n for n in names if n.startswith(GIT) or n == WORKTREE),
            fix="--gate FILE with `build: [COMMAND, ARGUMENT, ...]` and `artefact: PATH`",
        )
    assert file is not None
    top = Path(_git(file.resolve().parent, "rev-parse", "--show-toplevel"))
    with tempfile.TemporaryDirectory(prefix="compress-gate-") as scratch:
        # All of them, before any is built.
        commits = {
            n: _git(top, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{n.removeprefix(GIT)}^{{commit}}")
            for n in names
            if n.startswith(GIT)
        }
        made: list[Path] = []
        try:
            found = []
            for i, name in enumerate(names):
                if name.startswith(GIT):
                    tree, commit = Path(scratch) / str(i), commits[name]
                    _git(top, "worktree", "add", "--detach", "--quiet", str(tree), commit)
                    made.append(tree)
                    found.append(_built(f"{name} ({commit[:12]})", tree, gate_file))
                else:
                    found.append(_built(name, top, gate_file) if name == WORKTREE else find(name))
            yield found
        finally:
            for tree in made:
                _git(top, "worktree", "remove", "--force", str(tree))


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError as e:
        fix = "install it, or name models by their files"
        raise UsageError("git is not installed", where=str(folder), fix=fix) from e
    if done.returncode:
        if words[0] == "rev-parse" and "--verify" in words:
            raise UsageError(
                f"git knows no revision {words[-1].removesuffix('^{commit}')!r}",
                where=str(folder),
                fix="check it with `git rev-parse`; in CI, fetch the history (fetch-depth: 0)",
            )
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(f"git {words[0]} failed: {last}", where=str(folder), fix="mend that, then try again")
    return done.stdout.strip()


def _built(name: str, tree: Path, gate_file: GateFile) -> Artefact:
    """What the gate file's command makes in ``tree``."""
    from compress.run.progress import say

    assert gate_file.build is not None and gate_file.artefact is not None
    say(f"building {name}")
    try:
        done = subprocess.run(gate_file.build, cwd=tree, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as e:
        raise UsageError(f"the build command cannot be started: {e}", where=name, fix="check `build`") from e
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CompressError(
            f"the build command failed with exit code {done.returncode}: {last}",
            where=f"{name}: {' '.join(gate_file.build)}",
            fix="run it there by hand",
        )
    made = tree / gate_file.artefact
    if not made.resolve().is_relative_to(tree.resolve()):
        raise UsageError("the artefact lies outside the tree", where=str(gate_file.artefact), fix="name one inside")
    if not made.exists():
        raise CompressError(
            f"the build command made no {gate_file.artefact}", where=name, fix="check `build` and `artefact`"
        )
    return find(name, made)


def lines(record: dict[str, Any]) -> list[str]:
    """What the command line says."""
    if "self_test" in record:
        return [
            f"{row['figure']:9} smallest change that can be detected: {100 * row['smallest_change']:.1f} %"
            f"  (A/A ratio {row['value']:.3f}, 95 %: {row['low']:.3f} to {row['high']:.3f};"
            f" spread between processes {100 * row['spread_between']:.1f} %)"
            for row in record["self_test"]
        ]
    return [
        *(row_line(row) for row in record["budgets"]),
        *([f"written      {', '.join(sorted(record['files'].values()))}"] if "files" in record else []),
        f"gate         {record['verdict']}",
    ]


def row_line(row: dict[str, Any]) -> str:
    """One budget's outcome, on one line."""
    return f"{row['verdict']:12} {outputs.title(row)}: {outputs.line(row)}"
