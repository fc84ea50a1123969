"""Many budgets in one folder: what they share is made once, each is what prune alone makes, and what was stopped or is
given again ends with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import compress as package
from compress.errors import CompressError
from compress.pipeline import METHODS, method_of
from compress.recipes.tyr.stages import SHARED
from compress.report.build import read_report
from compress.report.sweep import read_sweep
from compress.run import folder as run_folder
from compress.run.folder import SEAL, sealed_folders
from compress.verbs.sweep import held, order
from tests.command import Job, Ran, compress, one_error, start
from tests.networks import write_class_folders

pytestmark = pytest.mark.usefixtures("done_once")

SHORT = ("layouts=[per-layer]", "tyr.iterations=1", "export=null", "bench=null", "evaluation.curve=[]")
SETTINGS = tuple(word for one in SHORT for word in ("--set", one))
POINTS = ("--at", "0.4", "-b", "size<=0.9x,kv_cache@100<=0.8x")
FOLDERS = ("sparsity-0.4", "size-0.9x+kv-cache@100-0.8x")
RESULTS = (
    "plan/plan.safetensors", "plan/plan.json", "plan/search.json", "model/model.safetensors", "model/config.json",
    "evaluation-pruned/evaluation.json", "evaluation-dense/evaluation.json",
)  # fmt: skip


def sweep(job: Job, out: Path, *words: object, points: tuple[object, ...] = POINTS) -> Ran:
    return compress("sweep", job.model, "-r", job.recipe, *points, *SETTINGS, "--out", out, *words)


@pytest.fixture(scope="module")
def done(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """A whole sweep and its folder; tests must not change it."""
    out = tmp_path_factory.mktemp("sweep") / "all"
    ran = sweep(job, out)
    assert ran.code == 0, ran.err
    return ran, out


@pytest.fixture(scope="module")
def swept(done: tuple[Ran, Path]) -> Path:
    return done[1]


@pytest.fixture
def mine(swept: Path, tmp_path: Path) -> Path:
    """The sweep's folder, to be changed: a copy in whose place it is not known, for it is named in its files."""
    return Path(shutil.copytree(swept, tmp_path / "all"))


def seals(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob(SEAL)}


def test_what_points_share_is_made_once_and_is_what_the_method_says(swept: Path) -> None:
    first, *others = [swept / name for name in FOLDERS]
    stages = {f.relative_to(first).as_posix() for f in sealed_folders(first)}
    for other in others:
        assert {f.relative_to(other).as_posix() for f in sealed_folders(other)} == stages
        same = {s for s in stages if (first / s / SEAL).samefile(other / s / SEAL)}
        assert {s.split("/")[0] for s in same} == SHARED & {s.split("/")[0] for s in stages}
        assert {s.split("/")[0] for s in same} >= {"text", "metrics", "supernet-1", "singles-1", "evaluation-dense"}
        assert all((first / s / f).samefile(other / s / f) for s in same for f in read(first / s / SEAL)["files"])


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        (FOLDERS[1], ("-b", "size<=0.9x", "-b", "kv_cache@100<=0.8x")),
        pytest.param(FOLDERS[0], ("--sparsity", 0.4), marks=pytest.mark.slow),
    ],
)
def test_a_point_is_what_prune_with_its_budget_alone_makes(
    folder: str, words: tuple[object, ...], job: Job, swept: Path, tmp_path: Path
) -> None:
    out = tmp_path / "alone"
    ran = compress("prune", job.model, "-r", job.recipe, *words, *SETTINGS, "--out", out, "--until", "evaluation")
    assert ran.code == 0, ran.err
    for name in RESULTS:
        assert (out / name).read_bytes() == (swept / folder / name).read_bytes(), name
    names = [f.relative_to(out).as_posix() for f in sealed_folders(out)]
    for name in names:
        a, b = read(out / name / SEAL), read(swept / folder / name / SEAL)
        assert (a["inputs"], a["files"]) == (b["inputs"], b["files"]), name


def test_the_table_holds_what_the_runs_have_measured(swept: Path, job: Job) -> None:
    found = read_sweep(swept)
    assert [e.name for e in found.entries] == ["dense", "40%", "size<=0.9x, kv_cache@100<=0.8x"]
    for entry, folder in zip(found.entries[1:], FOLDERS, strict=True):
        texts = read(swept / folder / "evaluation-pruned" / "evaluation.json")["texts"]
        mean = (texts["first text"]["ppl"] * texts["second | text"]["ppl"]) ** 0.5
        assert entry.quality == pytest.approx(mean)
        saved = (swept / folder / "model" / "model.safetensors").stat().st_size
        assert 0 <= saved - entry.costs["bytes"] < 5000  # the header
        assert entry.costs["bytes"] == 4 * entry.costs["parameters"]
    dense = (job.model / "model.safetensors").stat().st_size
    assert 0 <= dense - found.entries[0].costs["bytes"] < 5000
    budgets = found.points[1].budgets
    assert [row["held"] for row in budgets] == [True, True] and not found.points[0].budgets
    for axis in found.axes:
        taken = [(found.entries[i].costs[axis.key], found.entries[i].quality) for i in axis.front]
        assert all(a[0] <= b[0] and a[1] >= b[1] for a, b in pairwise(taken))


def test_lines_page_and_plot_say_what_sweep_json_holds(done: tuple[Ran, Path]) -> None:
    ran, out = done
    found = read_sweep(out)
    rows = ran.out.splitlines()
    assert rows[1].startswith("dense ") and rows[2].startswith("40% ") and rows[3].startswith("size<=0.9x, kv")
    page = (out / "README.md").read_text("utf-8")
    for entry in found.entries:
        assert f"{entry.quality:.2f}" in page and f"{entry.quality:.2f}" in ran.out
        assert f"{entry.costs['parameters']:,}" in page and f"{entry.costs['parameters']:,}" in ran.out
    for point in found.points:
        assert point.make in page and point.pick in page
    assert (out / "fronts.png").read_bytes().startswith(b"\x89PNG") and "(fronts.png)" in page
    # The forecast comes first, on the other stream: of the first point whole, then what all take.
    said = ran.err
    assert said.index("point    40%, the first of 2:") < said.index("budget   remove") < said.index("shared   text, ")
    assert said.index("sweep    2 points") < said.index("point 1 of 2: 40%") < said.index("point 2 of 2: size<=0.9x")


def test_the_same_command_again_makes_nothing_and_the_same_bytes(job: Job, done: tuple[Ran, Path]) -> None:
    ran, out = done
    before, names = seals(out), ("sweep.json", "README.md", "fronts.png")
    files = {name: (out / name).read_bytes() for name in names}
    again = sweep(job, out)
    assert again.code == 0 and again.out == ran.out
    assert seals(out) == before and {name: (out / name).read_bytes() for name in names} == files


def test_another_point_goes_on_from_what_is_there(job: Job, mine: Path) -> None:
    before = seals(mine)
    ran = sweep(job, mine, "--json", points=("--at", "40%,30%"))
    assert ran.code == 0, ran.err
    assert [p["name"] for p in json.loads(ran.out)["points"]] == ["40%", "30%"]
    after = seals(mine)
    assert {p: after[p] for p in before} == before
    for stage in ("text", "supernet-1/block-000", "singles-1", "evaluation-dense"):
        assert any((mine / "sparsity-0.3" / stage / SEAL).samefile(mine / f / stage / SEAL) for f in FOLDERS)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("wanted", [*(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 10, 17)), 14])
def test_stopped_anywhere_it_ends_with_the_same_bytes(
    wanted: int, job: Job, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first point, in what a later one links, and behind that."""
    out, settled = tmp_path / "all", run_folder.settle
    left = iter(range(wanted))

    def settle(made: Path, place: Path) -> None:
        if next(left, None) is None:
            raise Killed
        settled(made, place)

    monkeypatch.setattr(run_folder, "settle", settle)
    with pytest.raises(Killed):
        sweep(job, out)
    monkeypatch.undo()
    assert not (out / "sweep.json").exists()
    ran = sweep(job, out)
    assert ran.code == 0, ran.err
    for name in (f"{folder}/{result}" for folder in FOLDERS for result in RESULTS):
        assert (out / name).read_bytes() == (swept / name).read_bytes(), name
    assert elsewhere(out) == elsewhere(swept)
    assert (out / "fronts.png").read_bytes() == (swept / "fronts.png").read_bytes()


def elsewhere(out: Path) -> Any:
    """sweep.json without the place it lies in."""
    facts = json.loads((out / "sweep.json").read_text("utf-8").replace(str(out), "OUT"))
    return {k: v for k, v in facts.items() if k != "sha256"}


def test_a_picked_point_is_finished_where_it_lies(mine: Path) -> None:
    before = seals(mine)
    ran = compress("sweep", mine, "--pick", "40%")
    assert ran.code == 0, ran.err
    assert "release/README.md is the model card" in ran.out
    report = read_report(mine / "sparsity-0.4")
    assert report["size"]["asked"] == 0.4
    after = seals(mine)
    assert {p: after[p] for p in before} == before
    assert {p.parent.name for p in set(after) - set(before)} == {"release"}
    assert compress("verify", mine / "sparsity-0.4").code == 0


def test_python_sweeps_and_picks_as_the_command_line_does(job: Job, swept: Path, tmp_path: Path) -> None:
    settings = {"layouts": ["per-layer"], "tyr.iterations": 1, "export": None, "bench": None, "evaluation.curve": []}
    shutil.copytree(swept, tmp_path / "all")
    found = package.sweep(
        job.model, job.recipe, tmp_path / "all", at=[0.4], budgets=[["size<=0.9x", "kv_cache@100<=0.8x"]],
        settings=settings,
    )  # fmt: skip
    assert {k: found.facts[k] for k in ("entries", "axes")} == {
        k: read(swept / "sweep.json")[k] for k in ("entries", "axes")
    }
    result = found.pick("40%")
    assert result.folder == tmp_path / "all" / "sparsity-0.4" and result.release.is_dir()
    with pytest.raises(package.CompressError, match="no point 'no'"):
        found.pick("no")
    with pytest.raises(package.UsageError, match="in memory"):
        package.sweep(object(), job.recipe, tmp_path / "no", at=[0.2, 0.4])  # type: ignore[arg-type]


def test_a_changed_option_and_a_run_that_is_no_sweep_are_refused(job: Job, mine: Path, tmp_path: Path) -> None:
    before = seals(mine)
    one_error(
        sweep(job, mine, "--set", "tyr.damping=0.5"), 1, "other options: tyr.damping was 0.01, now 0.5", "--fresh"
    )
    assert seals(mine) == before
    own = mine / "sparsity-0.4"
    one_error(sweep(job, own), 1, "folder of a single run", "--out")
    one_error(compress("sweep", own, "--pick", "knee"), 1, "there is no sweep.json", "finished sweep")
    (tmp_path / "hers").mkdir()
    (tmp_path / "hers" / "letter.txt").write_text("dear")
    one_error(sweep(job, tmp_path / "hers"), 1, "not made by compress")
    (tmp_path / "file").write_text("")
    one_error(sweep(job, tmp_path / "file"), 1, "file", "--out")


def test_fresh_forgets_every_point_and_nothing_else(job: Job, mine: Path) -> None:
    asked = order(str(job.model), str(job.recipe), [*SHORT, "seed=1"], at=["20%,30%"])
    (mine / "sparsity-0.4" / "letter.txt").write_text("dear")
    with pytest.raises(CompressError, match="what no run has made"), held(mine, asked, fresh=True):
        pass
    (mine / "sparsity-0.4" / "letter.txt").unlink()
    with pytest.raises(CompressError, match="seed was 0, now 1"), held(mine, asked, fresh=False):
        pass
    with held(mine, asked, fresh=True):
        assert [path.name for path in mine.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (("--at", "25%"), 2, ("takes 2 points or more, and 1 is named", "compress prune")),
        ((), 2, ("and none is named", "--at 12.5%,25%,50%")),
        (("--at", "25%,0.25"), 2, ("the point 25% is named twice",)),
        (("-b", "size<=0.8x", "-b", "size<=0.8 x"), 2, ("is named twice",)),
        (("-b", "size<=0.9x,kv_cache<=0.8x", "-b", "kv_cache<=0.8x,size<=0.9x"), 2, ("is named twice",)),
        (("-b", "size<=0.8x,size<=0.7x", "-b", "size<=0.9x"), 2, ("two budgets are of size", "tighter")),
        (("--at", "25,50%"), 2, ("25 is no share", "25% or 0.25")),
        (("--at", "0%,50%"), 2, ("0% is no share", "between 0 and 1")),
        (("--at", "a lot,50%"), 2, ("'a lot' is no share", "--at 12.5%")),
        (("--at", "25%,", "--at", "50%"), 2, ("'' is no share",)),
        (("--at", "20%,40%", "--set", "sparsity=0.3"), 2, ("and sparsity says it for all of them", "leave it out")),
        (("--at", "20%,40%", "--set", "budget=[size<=0.8x]"), 2, ("by its points, and budget says it",)),
        (("-b", "tpot<=20ms", "-b", "tpot<=30ms"), 2, ("named, pinned device",)),
        (("-b", "sizes<=0.8x", "-b", "size<=0.7x"), 2, ("no figure 'sizes'", "did you mean 'size'")),
        (("--at", "20%,40%", "--precision", "q9_9"), 2, ("q9_9", "quantise")),
        (("--at", "20%,40%", "--rival", "q4_k_m"), 2, ("no --precision is named", "--precision q4_k_m")),
        (("--at", "20%,40%", "--until", "plan"), 2, ("no stage from there on", "evaluation, export")),
        (("--at", "20%,40%", "--precision", "f16", "--until", "evaluation"), 2, ("stops before it",)),
        (("-b", "tpot<=0.8x", "-b", "tpot<=0.7x", "--until", "export"), 2, ("times are measured in the stage bench",)),
        (("--at", "20%,40%", "--set", "tyr.levells=3"), 2, ("unknown key 'levells'",)),
        (("--at", "5%,60%", "--set", "tyr.attention=false"), 1, ("point 60%:", "asks to remove", "at most")),
        (("-b", "size<=0.8x", "-b", "kv_cache<=0.01x"), 1, ("point kv_cache<=0.01x:", "ask for kv_cache<=0.25")),
        (("-b", "size<=0.8x", "-b", "size<=1.2x"), 1, ("point size<=1.2x:", "keeps size<=1.2x already")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_error_before_any_work(
    words: tuple[object, ...], code: int, parts: tuple[str, ...], job: Job, tmp_path: Path
) -> None:
    for more in ((), ("--plan",)) if code == 1 else ((),):
        ran = compress("sweep", job.model, "-r", job.recipe, *words, "--out", tmp_path / "out", *more)
        one_error(ran, code, *parts)
        assert not (tmp_path / "out").exists()


def test_a_pick_alone_takes_no_other_option_and_names_the_points(swept: Path, job: Job) -> None:
    one_error(compress("sweep", swept), 2, "--recipe is missing", "--pick")
    one_error(compress("sweep", swept, "--pick", "40%", "--at", "30%"), 2, "--at says what a sweep is made of")
    one_error(compress("sweep", swept, "--pick", "50%"), 1, "there is no point '50%'", "one of: knee, 40%, size")
    one_error(compress("sweep", swept, "--pick", "dense"), 1, "the dense model is no point")


def test_a_sweep_that_was_changed_is_refused(mine: Path) -> None:
    text = (mine / "sweep.json").read_text("utf-8")
    (mine / "sweep.json").write_text(text.replace('"40%"', '"41%"'))
    one_error(compress("sweep", mine, "--pick", "41%"), 1, "changed since it was written")
    (mine / "sweep.json").write_text(text.replace('"schema_version": 1', '"schema_version": 2'))
    one_error(compress("sweep", mine, "--pick", "40%"), 1, "schema_version is 2", "reads 1")
    (mine / "sweep.json").write_text("[]")
    one_error(compress("sweep", mine, "--pick", "40%"), 1, "sweep.json")


def test_plan_says_what_a_sweep_takes_and_reads_no_weight(job: Job, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    words = ("sweep", model, "-r", job.recipe, *POINTS, "--plan")
    facts = json.loads(compress(*words, "--json").out)
    alone = [p["seconds"] for p in facts["points"]]
    assert facts["shared_stages"] == ["text", "metrics", "supernet-1", "singles-1"]
    assert facts["seconds"] == pytest.approx(sum(alone) - facts["shared_seconds"], rel=0.2)
    assert max(alone) < facts["seconds"] < sum(alone)
    said = compress(*words).out
    assert "shared   text, metrics, supernet-1, singles-1: made once" in said and "sweep    2 points" in said


def test_a_point_is_taken_as_far_as_what_is_asked_for_is_measured(job: Job) -> None:
    def until(**more: Any) -> str:
        return order("model", str(job.recipe), [], **more).until

    assert until(at=["20%,30%"]) == until(budgets=["size<=0.8x", "size<=0.7x"]) == "evaluation"
    assert until(budgets=["size<=0.8x,tpot<=0.9x", "size<=0.7x"]) == "bench"
    assert (
        until(at=["20%,30%"], precisions=["f16"]) == "quantise" and until(at=["20%,30%"], until="release") == "release"
    )


def test_a_recipe_with_a_budget_gives_way_to_shares(job: Job, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"extends: {job.recipe}\nbudget: [size<=0.8x]\n")
    asked = order("model", str(tmp_path / "mine.yaml"), [], at=["20%,40%"])
    assert asked.points[0].overrides == ("sparsity=0.2", "budget=null")
    assert asked.points[0].words == ("--sparsity", "0.2", "--set", "budget=null") and asked.recipe.sparsity == 0.2


def test_every_method_says_its_axis_and_what_is_shared() -> None:
    for name, tasks in METHODS.items():
        for task in tasks:
            method = method_of({"method": name, "task": task})
            assert method.AMOUNT in ("sparsity", "pagcp.flops") and "evaluation-dense" in method.SHARED


@pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp")
def test_precisions_and_rivals_stand_beside_the_points(job: Job, mine: Path) -> None:
    """The points go on from what is there: only their GGUFs are made."""
    ran = sweep(job, mine, "--precision", "f16", "--rival", "q4_0")
    assert ran.code == 0, ran.err
    found = read_sweep(mine)
    assert found.until == "quantise"
    assert [e.name for e in found.entries if e.precision] == [
        "dense, gguf f16", "dense, gguf q4_0", "40%, gguf f16", "size<=0.9x, kv_cache@100<=0.8x, gguf f16",
    ]  # fmt: skip
    rows = read(mine / FOLDERS[0] / "quantised-gguf-f16" / "quantised.json")
    (entry,) = (e for e in found.entries if e.name == "40%, gguf f16")
    assert (entry.quality, entry.costs) == (rows["pruned"]["perplexity"], {"bytes": rows["pruned"]["bytes"]})
    sizes = next(axis for axis in found.axes if axis.key == "bytes")
    pairs = [(e.quality, e.costs["bytes"]) for e in found.entries]
    assert sorted(sizes.front) == [
        i for i, a in enumerate(pairs) if not any(b[0] <= a[0] and b[1] <= a[1] for b in pairs if b != a)
    ]
    parameters = next(axis for axis in found.axes if axis.key == "parameters")
    assert not any(found.entries[i].precision for i in parameters.front)
    # The dense rival is of no point, and made once.
    assert len({(mine / f / "quantised-gguf-q4_0" / SEAL).stat().st_ino for f in FOLDERS}) == 1
    assert "dense, gguf q4\\_0" in (mine / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, networks, and a recipe of each method on them."""
    folder = tmp_path_factory.mktemp("networks")
    write_class_folders(folder / "data", 30, 12)
    (folder / "mine.py").write_text("from compress.models.zoo.resnet32 import resnet\n\n"
                                    "def small(classes=3):\n    return resnet(8, classes, 8)\n")  # fmt: skip
    lines = (
        "extends: {}\narguments: {{}}\ndata: {{folder: {}/data, size: 12}}\nexport: null\nbench: null\n"
        "train: {{epochs: 1, batch: 16, lr: 0.05, warmup_epochs: 0}}\nfinetune: {}\n{}\n"
    )
    again = "{epochs: 1, batch: 16, lr: 0.02, warmup_epochs: 0}"
    (folder / "masks.yaml").write_text(lines.format("global-mp-network", folder, "null", ""))
    (folder / "cuts.yaml").write_text(
        lines.format("pagcp", folder, again, "pagcp: {flops: 0.4, rounds: 1, between: 0, round_to: 4, batch: 16}")
    )
    return folder


@pytest.mark.parametrize(
    ("recipe", "folders", "axes"),
    [
        ("masks", ["sparsity-0.5", "sparsity-0.7"], ["parameters", "bytes", "FLOPs"]),
        pytest.param("cuts", ["flops-0.5", "flops-0.7"], ["parameters", "bytes", "FLOPs"], marks=pytest.mark.slow),
    ],
)
def test_networks_take_part_with_their_own_axis_and_are_trained_once(
    recipe: str, folders: list[str], axes: list[str], networks: Path, tmp_path: Path
) -> None:
    ran = compress(
        "sweep", f"{networks}/mine.py:small", "-r", networks / f"{recipe}.yaml", "--at", "50%,70%",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    found = read_sweep(tmp_path / "o")
    assert [p.folder for p in found.points] == folders and [a.key for a in found.axes] == axes
    first, second = (tmp_path / "o" / name for name in folders)
    for stage in ("dense", "evaluation-dense"):
        assert (first / stage / SEAL).samefile(second / stage / SEAL)
    dense, *points = found.entries
    assert found.quality.name == "accuracy, class" and found.quality.better == "higher"
    assert all(p.costs[key] < dense.costs[key] for p in points for key in axes)
    for point, share in zip(points, (0.5, 0.7), strict=True):
        key = "FLOPs" if recipe == "cuts" else "parameters"
        assert point.costs[key] / dense.costs[key] == pytest.approx(1 - share, abs=0.1)


def test_what_networks_do_not_take_is_refused(networks: Path, tmp_path: Path) -> None:
    def refused(recipe: str, *words: object, parts: tuple[str, ...]) -> None:
        path = networks / f"{recipe}.yaml"
        ran = compress("sweep", f"{networks}/mine.py:small", "-r", path, *words, "--out", tmp_path / "o")
        one_error(ran, 2 if "point" not in parts[0] else 1, *parts)
        assert not (tmp_path / "o").exists()

    refused("cuts", "-b", "size<=0.8x", "-b", "size<=0.7x", parts=("pagcp keeps no budgets: its axis is pagcp.flops",))
    refused(
        "masks", "-b", "size<=0.8x", "-b", "size<=0.7x", parts=("global-mp keeps no budgets: its axis is sparsity",)
    )
    refused("masks", "--at", "50%,80%", "--precision", "q8_0", parts=("of a language model's GGUF",))
    refused("cuts", "--at", "50%,80%", "--set", "pagcp.flops=0.3", parts=("and pagcp.flops says it for all",))
    refused("cuts", "--at", "50%,99.9%", parts=("point 99.9%: 99.9 % of the FLOPs cannot go", "ask for"))


@pytest.mark.slow
def test_two_processes_sweep_as_one_does(job: Job, swept: Path, tmp_path: Path) -> None:
    words = ("sweep", job.model, "-r", job.recipe, *POINTS, *SETTINGS, "--out", tmp_path / "all", "--processes", 2)
    process = start(*words, OMP_NUM_THREADS="1")
    said, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert said.count("best for its") == 1 and elsewhere(tmp_path / "all") == elsewhere(swept)
    for name in (f"{folder}/{result}" for folder in FOLDERS for result in RESULTS[:5]):
        assert (tmp_path / "all" / name).read_bytes() == (swept / name).read_bytes(), name


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_bytes(
    job: Job, swept: Path, tmp_path: Path
) -> None:
    """SIGKILL, ever further on: behind so many seals of all points."""
    out = tmp_path / "all"
    words = ("sweep", job.model, "-r", job.recipe, *POINTS, *SETTINGS, "--out", out)
    kills = 0
    for wanted in (1, 5, 9, 12, 15, 19, 22):
        process = start(*words, OMP_NUM_THREADS="1")
        while process.poll() is None and sum(SEAL in files for _, _, files in os.walk(out)) < wanted:
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills >= 5
    ran = sweep(job, out)
    assert ran.code == 0, ran.err
    for name in (f"{folder}/{result}" for folder in FOLDERS for result in RESULTS):
        assert (out / name).read_bytes() == (swept / name).read_bytes(), name
    assert elsewhere(out) == elsewhere(swept)
