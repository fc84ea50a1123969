"""A finished run of every method, damaged in every file: it is named, by one error, and never built on."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from compress.claims.verify import verify
from compress.errors import CompressError
from compress.run.folder import SEAL, STAGE_NAMES
from tests.command import compress, one_error
from tests.compress import test_channels, test_network
from tests.networks import write_class_folders
from tests.recipes.global_mp import test_llm
from tests.tiny import prose, saved_tiny, tiny_job

pytestmark = pytest.mark.usefixtures("done_once")

METHODS = (
    pytest.param("tyr", marks=pytest.mark.slow),
    pytest.param("global-mp text", marks=pytest.mark.slow),
    pytest.param("global-mp network", marks=pytest.mark.slow),
    "pagcp",
)


@dataclass(frozen=True)
class Made:
    """A finished run, and the words that made it."""

    out: Path
    words: tuple[object, ...]
    network: str | None  # the file and function it is of


def made(method: str, folder: Path) -> Made:
    folder.mkdir()
    if method == "tyr":
        model, recipe = tiny_job(folder)
        more: tuple[object, ...] = ("--set", "tyr.iterations=1", "--set", "layouts=[per-layer]")
        words: tuple[object, ...] = (model, "-r", recipe, *more)
    elif method == "global-mp text":
        for seed, name in enumerate(("first", "second")):
            (folder / f"{name}.txt").write_text(prose(160, seed))
        (folder / "tiny.yaml").write_text(test_llm.RECIPE.replace("FOLDER", str(folder)))
        words = (saved_tiny(folder / "model"), "-r", folder / "tiny.yaml")
    else:
        module = test_network if method == "global-mp network" else test_channels
        write_class_folders(folder / "data", 96, 32)
        (folder / "mine.py").write_text(test_network.NETWORK if module is test_network else test_channels.MINE)
        (folder / "mine.yaml").write_text(module.RECIPE.replace("FOLDER", str(folder)))
        words = (f"{folder / 'mine.py'}:small", "-r", folder / "mine.yaml", "--set", "train.epochs=1")
    out = folder / "run"
    words = (*words, "--set", "bench=null", "--out", out)
    ran = compress("prune", *words)
    assert ran.code == 0, ran.err
    return Made(out, words, str(words[0]) if ".py:" in str(words[0]) else None)


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(request.param, tmp_path_factory.mktemp("damage") / "job")


def files(out: Path) -> list[Path]:
    return sorted(p for p in out.rglob("*") if p.is_file())


@contextmanager
def damaged(path: Path, how: str, draw: random.Random, aside: Path) -> Iterator[str]:
    """The file with one fault while it is open, and what the fault is; the same file again behind it."""
    if how == "gone":
        path.rename(aside / path.name)
        try:
            yield "gone"
        finally:
            (aside / path.name).rename(path)
        return
    with path.open("r+b") as file:
        before = file.read()
        try:
            at, bit = draw.randrange(len(before)), draw.randrange(8)
            if how == "flip":
                os.pwrite(file.fileno(), bytes([before[at] ^ 1 << bit]), at)
            elif how == "cut":
                os.truncate(path, at)
            else:
                os.pwrite(file.fileno(), b"\n", len(before))
            yield f"{how}, byte {at}, bit {bit}"
        finally:
            os.truncate(path, len(before))
            os.pwrite(file.fileno(), before, 0)


def named_by_verify(run: Made) -> list[str]:
    """The claims that do not hold, or the one error."""
    try:
        return [c["claim"] for c in verify(str(run.out), run.network)["claims"] if c["verdict"] == "does not hold"]
    except CompressError as e:
        return [e.where]


def prune_or_verify_names(run: Made, path: Path, how: str, draw: random.Random, aside: Path, prune: bool) -> str:
    """Who names the damage: "verify", "prune" or "both". What `prune` does not read it may leave to `verify`."""
    with damaged(path, how, draw, aside) as what:
        own = path.name == ".lock"  # nobody but the next run has to do with it
        claims = [] if own else named_by_verify(run)
        assert own or claims, (path, what, "verify finds nothing wrong")
        if own or prune:
            ran = compress("prune", *run.words)
            if ran.code:
                one_error(ran, 1)
                assert path.name in ran.err or path.parent.name in ran.err, (path, what, ran.err)
                return "both" if claims else "prune"
            assert not own or how == "gone", (path, what, "prune finds nothing wrong")
    return "verify"


def damages(out: Path, draw: random.Random, flips: int) -> list[tuple[Path, str]]:
    """Of every file: some flipped bits, an end cut off, a byte more, and the file gone."""
    found = []
    for path in files(out):
        hows = ["flip"] * flips + ["cut", "longer", "gone"]
        # A run's lock may be away or have a longer end; the recipe's is written again.
        drop = {".lock": ("cut", "longer", "gone"), "recipe.lock.yaml": ("gone",)}.get(path.name, ())
        found += [(path, how) for how in hows if how not in drop and path.stat().st_size]
    draw.shuffle(found)
    return found


def check(run: Made, aside: Path, flips: int, prunes: int) -> dict[str, int]:
    draw = random.Random(3)
    told: dict[str, int] = {}
    for number, (path, how) in enumerate(damages(run.out, draw, flips)):
        who = prune_or_verify_names(run, path, how, draw, aside, number < prunes)
        told[who] = told.get(who, 0) + 1
    return told


def test_every_damage_to_a_finished_run_is_named(run: Made, tmp_path: Path) -> None:
    told = check(run, tmp_path, flips=1, prunes=8)
    print(f"{run.out.parent.parent.name}: {sum(told.values())} damages, named by {told}")
    assert told["both"] + told.get("prune", 0) >= 4 and sum(told.values()) > 60
    assert named_by_verify(run) == []
    assert compress("prune", *run.words).code == 0, "put back as it was, it goes on"


@pytest.mark.slow
def test_every_damage_to_a_finished_run_is_named_by_prune_too_or_is_none_to_it(run: Made, tmp_path: Path) -> None:
    told = check(run, tmp_path, flips=12, prunes=200)
    print(f"{run.out.parent.parent.name}: {sum(told.values())} damages, named by {told}")
    assert told["both"] > 100


def test_a_stage_whose_seal_is_gone_is_named_by_verify_and_prune(run: Made, tmp_path: Path) -> None:
    for seal in sorted(run.out.rglob(SEAL)):
        with damaged(seal, "gone", random.Random(0), tmp_path):
            assert any(str(seal.parent.relative_to(run.out)) in claim for claim in named_by_verify(run)), seal
    top = run.out / "plan" / SEAL
    with damaged(top, "gone", random.Random(0), tmp_path):
        one_error(compress("prune", *run.words), 1, f"{run.out}/plan/{SEAL}", "missing")


def test_a_file_more_in_a_stage_is_named_by_verify_and_prune(run: Made) -> None:
    for name in ("plan/model.safetensors", "model/helper.py", "release/more.json"):
        (run.out / name).touch()
        assert named_by_verify(run) == [name]
        one_error(compress("prune", *run.words), 1, name, "not sealed with the stage")
        (run.out / name).unlink()


def test_every_stage_of_every_method_is_known_by_its_name(run: Made) -> None:
    stages = [p.name for p in run.out.iterdir() if p.is_dir() and p.name != ".scratch"]
    assert len(stages) >= 7 and all(STAGE_NAMES.fullmatch(name) for name in stages)


def test_a_stage_that_was_deleted_is_made_again_and_fits_the_rest(run: Made) -> None:
    before = (run.out / "plan" / "plan.json").read_bytes()
    shutil.rmtree(run.out / "plan")
    ran = compress("prune", *run.words)
    assert ran.code == 0, ran.err
    assert (run.out / "plan" / "plan.json").read_bytes() == before
