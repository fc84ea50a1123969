"""`compress gate` as a user and as a CI calls it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from junitparser import JUnitXml

from compress.exporters import gate_run
from tests.command import compress, one_error
from tests.export.test_gate_run import Machine, net
from tools.ci.models import chain

pytestmark = pytest.mark.usefixtures("done_once")
TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.onnx, and large.onnx with three times as many of the same layers."""
    folder = tmp_path_factory.mktemp("models")
    chain(folder / "small.onnx", 3)
    chain(folder / "large.onnx", 9)
    return folder


def test_a_slower_model_fails_and_everything_is_left_behind(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = compress(
        *("gate", models / "small.onnx", models / "large.onnx", "-b", "latency<=1.3x", "-b", "size<=5x"),
        *("--samples", 1, "--out", out, "--summary", tmp_path / "summary.md"),
    )
    assert ran.code == 1, ran.err
    assert "fail         latency<=1.3x: " in ran.out and "pass         size<=5x: " in ran.out
    record = json.loads((out / "gate.json").read_text())
    (latency, _) = record["budgets"]
    assert 1.5 < latency["value"] < 4 and latency["rounds"] >= 9
    assert len(record["raw"]["candidate"]) == latency["rounds"]
    assert all(sum(s["latency"]["samples"]) > 0 for s in record["raw"]["baseline"])
    assert record["baseline"]["sha256"].keys() == {"small.onnx"}
    assert JUnitXml.fromfile(str(out / "junit.xml")).failures == 1
    assert "❌ fail" in (tmp_path / "summary.md").read_text()
    assert (out / "gate.png").stat().st_size > 5000


@pytest.mark.slow  # a minute of measuring; what is measured of a network is gated above, by the same rounds
def test_prefill_and_decode_of_a_language_model_are_gated_apart(finished: Path) -> None:
    ran = compress(
        *("gate", f"{finished}:dense", finished, "--samples", 1, "--prompt", 8, "--context", 8, "--json"),
        *("-b", "latency<=9x", "-b", "memory<=2x", "-b", "size<=1.0x", "-b", "perplexity<=1000x"),
    )
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    rows = {r["budget"]: r for r in record["budgets"]}
    assert set(rows) == {"ttft<=9x", "tpot<=9x", "memory<=2x", "size<=1.0x", "perplexity<=1000x"}
    report = json.loads((finished / "release" / "report.json").read_text())
    mean = report["quality"]["geometric_mean"]
    assert rows["perplexity<=1000x"]["value"] == pytest.approx(mean["pruned"] / mean["dense"])
    assert rows["ttft<=9x"]["values"] != rows["tpot<=9x"]["values"]


def test_a_report_that_was_edited_is_no_quality(finished: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    report = run / "release" / "report.json"
    changed = re.sub(r'"pruned_ppl": [0-9.]+', '"pruned_ppl": 1.5', report.read_text())
    report.unlink()
    report.write_text(changed)
    ran = compress("gate", f"{run}:dense", run, "-b", "perplexity<=2x")
    stamp = json.loads(changed)["sha256"][:16]
    one_error(ran, 2, "changed since it was written", f"it says sha256 {stamp}, its content has ")


def test_a_self_test_prints_what_can_be_detected(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawn times: the real ones are measured in tests/slow.
    from compress.verbs import gate as gate_verbs

    def drawn(*words: Any, **more: Any) -> Any:
        return gate_run.self_test(*words, **more, measure=Machine({"small": 1.0}, noise=0.02))

    monkeypatch.setattr(gate_verbs, "against_itself", drawn)
    ran = compress("gate", models / "small.onnx", "--self-test", "-b", "latency<=1.2x")
    assert ran.code == 0, ran.err
    assert "latency   smallest change that can be detected: " in ran.out
    tight = compress("gate", models / "small.onnx", "--self-test", "-b", "latency<=1.001x")
    one_error(tight, 2, "tighter than the smallest change of latency", "latency<=1.001x")


def test_wrong_commands_exit_with_2_and_measure_nothing(models: Path, tmp_path: Path) -> None:
    small = models / "small.onnx"
    other = net(tmp_path / "other.onnx")
    stored = tmp_path / "bench.json"
    stored.write_text("{}")
    budget = ("-b", "latency<=1.05x")
    for words, parts in (
        ((), ("no baseline",)),
        ((small, *budget), ("no candidate",)),
        ((small, small), ("no budget", "latency<=1.05x")),
        ((small, small, "-b", "latncy<=1.05x"), ("'latncy'", "did you mean 'latency'")),
        ((small, tmp_path / "none.onnx", *budget), ("no such file", "none.onnx")),
        ((small, other, *budget), ("shapes of input 'input' differ", "other.onnx")),
        ((stored, small, *budget), ("another machine", "bench.json")),
        ((small, small, "-b", "latency.p90<=40ms"), ("pinned", "--pinned")),
        ((small, small, "-b", "accuracy>=-1%"), ("nothing says what accuracy", "small.onnx")),
        ((small, small, "--self-test"), ("takes no candidate",)),
        ((small, small, *budget, "--shape", "input"), ("--shape",)),
        ((small, small, *budget, "--gate", tmp_path / "none.yaml"), ("no such gate file",)),
        (("git:HEAD", "worktree", *budget), ("git revision", "build")),
    ):
        one_error(compress("gate", *words), 2, *parts)


GATE = """\
baseline: BASELINE
candidate: CANDIDATE
budgets: [size<=1.5x]
"""


def test_a_gate_file_holds_the_models_and_budgets_and_the_command_line_wins(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "gate.yaml"
    text = GATE.replace("BASELINE", str(models / "small.onnx")).replace("CANDIDATE", str(models / "large.onnx"))
    file.write_text(text)
    assert compress("gate", "--gate", file).code == 1
    assert compress("gate", "--gate", file, "-b", "size<=4x").code == 0
    assert compress("gate", models / "large.onnx", "--gate", file).code == 0


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("budgts: [size<=1x]", ("unknown key 'budgts'", "line 4", "did you mean 'budgets'")),
        ("threads: 0", ("threads", "line 4")),
        ("threads: two", ("threads", "line 4")),
        ("build: make", ("build", "line 4")),
        ("build: [make]", ("build and artefact belong together",)),
        ("schema_version: 2", ("schema_version",)),
        ("strict: [", ("not valid YAML", "line 5")),
        ("budgets: [size<=2x]", ("stands twice",)),
    ],
)
def test_a_wrong_gate_file_is_refused_with_its_line(tmp_path: Path, line: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "gate.yaml").write_text(GATE + line + "\n")
    one_error(compress("gate", "--gate", tmp_path / "gate.yaml"), 2, *parts)


def test_a_budget_that_is_no_list_is_told_how_to_become_one(tmp_path: Path) -> None:
    (tmp_path / "gate.yaml").write_text("baseline: a.onnx\ncandidate: b.onnx\nbudgets: size<=1x\n")
    one_error(compress("gate", "--gate", tmp_path / "gate.yaml"), 2, "line 3", "budgets: [size<=1x]")


def test_without_a_verdict_the_exit_code_is_not_that_of_a_fail_and_nothing_is_left(
    models: Path, tmp_path: Path
) -> None:
    small, budget = models / "small.onnx", ("-b", "size<=1x")
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(small.read_bytes()[:5000])
    before = {p.name for p in tmp_path.iterdir()}
    out, summary = tmp_path / "a" / "out", tmp_path / "summary.md"
    ran = compress("gate", small, cut, *budget, "--out", out, "--summary", summary)
    one_error(ran, 2, "no valid ONNX file", "cut.onnx")
    one_error(compress("gate", small, small, *budget, "--out", cut / "out"), 2, "cannot be written", "cut.onnx/out")
    one_error(compress("gate", small, small, *budget, "--summary", tmp_path), 2, "cannot be written", str(tmp_path))
    one_error(compress("gate", small, small, "-b", f"size<={'9' * 400}x"), 2, "no number that can be reached")
    assert {p.name for p in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.verbs import gate as gate_verbs

    def measured(*words: Any, **more: Any) -> Any:
        raise AssertionError("it was measured in vain")

    monkeypatch.setattr(gate_verbs, "compare", measured)
    small = models / "small.onnx"
    (tmp_path / "file").write_text("x")
    for words in (("--out", tmp_path / "file" / "out"), ("--summary", tmp_path / "none" / "summary.md")):
        one_error(compress("gate", small, small, "-b", "latency<=2x", *words), 2, "cannot be written", str(words[1]))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(["git", *identity, "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


BUILD = """\
import sys
from pathlib import Path
from tools.ci.models import chain
chain(Path("build/model.onnx"), int(Path("layers.txt").read_text()))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's repository: a model of 4 layers is committed, 5 are in the working tree."""
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    top = tmp_path / "user"
    top.mkdir()
    git(top, "init", "--quiet")
    (top / "build.py").write_text(BUILD)
    (top / "layers.txt").write_text("4")
    (top / ".gitignore").write_text("build/\n")
    (top / "gate.yaml").write_text(
        f"baseline: git:HEAD\ncandidate: worktree\nbudgets: [size<=1.1x]\nbuild: [{sys.executable}, build.py]\n"
        "artefact: build/model.onnx\n"
    )
    git(top, "add", "-A")
    git(top, "commit", "--quiet", "-m", "four layers")
    (top / "layers.txt").write_text("5")
    return top


def test_a_git_revision_is_built_and_gated_against_the_working_tree(repository: Path) -> None:
    ran = compress("gate", "--gate", repository / "gate.yaml", "--json")
    assert ran.code == 1, ran.err
    record = json.loads(ran.out)
    assert record["budgets"][0]["value"] == pytest.approx(1.25, abs=0.01)
    commit = git(repository, "rev-parse", "HEAD")
    assert record["baseline"]["name"] == f"git:HEAD ({commit[:12]})"
    assert git(repository, "worktree", "list").count("\n") == 0, "the revision's tree is gone again"
    assert git(repository, "status", "--short") == "M layers.txt"
    assert compress("gate", "worktree", "git:HEAD", "--gate", repository / "gate.yaml").code == 0


def test_what_cannot_be_built_is_said_and_leaves_no_tree(repository: Path) -> None:
    file = repository / "gate.yaml"
    for changed, words, code, parts in (
        ({}, ("git:nowhere",), 2, ("no revision 'nowhere'", "fetch-depth")),
        ({}, ("git:--output=x",), 2, ("no revision '--output=x'",)),
        ({}, ("git:HEAD", "git:nowhere"), 2, ("no revision 'nowhere'",)),
        ({"artefact": "build/other.onnx"}, (), 2, ("made no build/other.onnx",)),
        ({"artefact": "../model.onnx"}, (), 2, ("outside the tree",)),
        ({"build": [sys.executable, "-c", "raise SystemExit('no compiler')"]}, (), 2, ("no compiler", "exit code 1")),
        ({"build": ["no-such-command-here"]}, (), 2, ("cannot be started",)),
    ):
        before = yaml.safe_load(file.read_text())
        made = file.with_name("changed.yaml")
        made.write_text(yaml.safe_dump({**before, **changed}))
        ran = compress("gate", *words, "--gate", made)
        assert ran.err.startswith(("building ", "error: ")), ran.err
        assert "nowhere" not in ran.err or "building" not in ran.err, "revisions are looked up before any is built"
        one_error(ran, code, *parts)
        assert git(repository, "worktree", "list").count("\n") == 0


def test_github_gets_annotations_and_its_summary(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    (tmp_path / "step.md").write_text("before\n")
    words = ("gate", models / "small.onnx", models / "large.onnx", "-b", "size<=1.0x")
    ran = compress(*words)
    assert ran.code == 1
    assert ran.out.splitlines()[-1].startswith("::error title=gate%3A fail%3A size<=1.0x::")
    assert (tmp_path / "step.md").read_text().startswith("before\n## compress gate: ❌ fail")
    quiet = compress(*words, "--json")
    assert isinstance(json.loads(quiet.out), dict) and "::error" in quiet.err


def filled(text: str, values: dict[str, str]) -> str:
    """``${{ NAME }}`` filled in, as the runner does."""
    found = re.sub(r"\$\{\{ ([a-z.-]+) \}\}", lambda m: values[m[1]], text)
    assert "${{" not in found
    return found


def run_action(folder: Path, **given: str) -> tuple[int, str, dict[str, str]]:
    """The composite action's steps in their order, in a local stand-in: no GitHub runner can be had here.

    ``python`` is a stand-in too, which notes what it was called with: nothing is installed in a test.

    Returns:
        (the exit code of the step that ended it, all that was said, the action's outputs).
    """
    action = yaml.safe_load((TOP / "action.yml").read_text())
    inputs = {name: str(facts["default"]) for name, facts in action["inputs"].items()}
    asked = {name.replace("_", "-"): value for name, value in given.items()}
    assert set(asked) <= set(inputs) and action["runs"]["using"] == "composite"
    values = {f"inputs.{name}": value for name, value in {**inputs, **asked}.items()}
    programs = {
        "compress": f'exec {sys.executable} -m compress "$@"',
        "python": f'printf "%s\\n" "$@" >{folder}/installed',
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name, line in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / "bin" / name).chmod(0o755)
    said, code = "", 0
    for step in action["runs"]["steps"]:
        # The one form of condition that is used: an input is a word.
        if "if" in step:
            name, wanted = re.fullmatch(r"(inputs\.[a-z-]+) == '(\w+)'", step["if"]).groups()  # type: ignore[union-attr]
            if values[name] != wanted:
                continue
        assert step["shell"] == "bash", "a composite action's step must name its shell"
        (folder / "step.sh").write_text(filled(step["run"], values))
        (folder / "output").write_text("")
        environment = {
            **os.environ,
            "PYTHONPATH": str(TOP),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(TOP),
            "GITHUB_OUTPUT": str(folder / "output"),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            **{k: filled(v, values) for k, v in step.get("env", {}).items()},
        }
        # The runner's own words for `shell: bash`.
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(folder / "step.sh")]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        said, code = said + done.stdout + done.stderr, done.returncode
        for line in (folder / "output").read_text().splitlines():
            name, _, value = line.partition("=")
            values[f"steps.{step['id']}.outputs.{name}"] = value
        if code:
            break
    return code, said, {name: filled(facts["value"], values) for name, facts in action["outputs"].items()}


def test_the_action_passes_and_fails_as_the_gate_does(models: Path, tmp_path: Path) -> None:
    names = {"baseline": str(models / "small.onnx"), "candidate": str(models / "large.onnx")}
    code, said, outputs = run_action(tmp_path, **names, budgets="\n  size<=1.0x\n\n")
    assert code == 1, said
    assert "\n::error title=gate%3A fail%3A size<=1.0x::" in said
    assert "❌ fail" in (tmp_path / "summary.md").read_text()
    assert outputs == {"verdict": "fail", "folder": "compress-gate"}
    assert {p.name for p in (tmp_path / "compress-gate").iterdir()} == {"gate.json", "junit.xml", "summary.md"}
    assert (tmp_path / "installed").read_text().splitlines() == [
        *("-m", "pip", "install", "--quiet", "-c", str(TOP / "constraints.txt"), str(TOP))
    ]
    code, said, outputs = run_action(tmp_path, **names, budgets="size<=4x, size<=4x")
    assert (code, outputs["verdict"]) == (2, "error")
    assert "::error title=gate%3A error::this figure has two budgets; " in said
    (tmp_path / "installed").unlink()
    code, said, outputs = run_action(tmp_path, **names, budgets="  size<=4x  ", out="o", install="false")
    assert (code, outputs) == (0, {"verdict": "pass", "folder": "o"})
    assert "::notice title=gate%3A pass%3A size<=4x::" in said and not (tmp_path / "installed").exists()


def test_the_actions_candidate_alone_is_held_against_the_gate_files_baseline(models: Path, tmp_path: Path) -> None:
    text = GATE.replace("BASELINE", str(models / "small.onnx")).replace("CANDIDATE", str(models / "small.onnx"))
    (tmp_path / "gate.yaml").write_text(text)
    code, said, _ = run_action(tmp_path, gate_file="gate.yaml", candidate=str(models / "large.onnx"))
    assert code == 1 and "small.onnx -> " in said and "large.onnx]" in said
    assert run_action(tmp_path, gate_file="gate.yaml")[0] == 0


def test_nothing_in_the_actions_inputs_is_run(models: Path, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    evil = f'"; touch {mark}; $(touch {mark}) `touch {mark}` #'
    assert run_action(tmp_path, baseline=evil, candidate=evil, budgets=f"size<=4x; touch {mark}")[0] == 2
    small = str(models / "small.onnx")
    code, said, _ = run_action(tmp_path, baseline=f"--summary={mark}", candidate=small, budgets="size<=4x")
    assert code == 2 and "there is no such file or folder" in said, "a name is no option"
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "strict", "expected", "verdict"),
    [(0, "", 0, "pass"), (1, "", 1, "fail"), (3, "", 0, "inconclusive"), (1, "true", 1, "fail"), (2, "", 2, "error")],
)
def test_a_plain_shell_ci_fails_on_a_fail_and_not_on_inconclusive(
    tmp_path: Path, code: int, strict: str, expected: int, verdict: str
) -> None:
    # A stand-in for the command: it notes its words and exits with the code of a verdict.
    command = tmp_path / "compress"
    command.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\nexit {code}\n')
    command.chmod(0o755)
    environment = {
        "PATH": os.environ["PATH"],
        "GATE_COMPRESS": str(command),
        "GATE_BASELINE": "a b.onnx",
        "GATE_CANDIDATE": "c.onnx",
        "GATE_BUDGETS": "latency<=1.05x,size<=1x\nmemory<=1.1x",
        "GATE_STRICT": strict,
        "GITHUB_OUTPUT": str(tmp_path / "output"),
    }
    done = subprocess.run(["bash", str(TOP / "tools/ci/gate.sh")], env=environment, cwd=tmp_path)
    assert done.returncode == expected
    words = (tmp_path / "words").read_text().splitlines()
    assert words[:3] == ["gate", "--out", "compress-gate"] and words[-3:] == ["--", "a b.onnx", "c.onnx"]
    budgets = [w for before, w in pairwise(words) if before == "--budget"]
    assert budgets == ["latency<=1.05x", "size<=1x", "memory<=1.1x"]
    assert ("--strict" in words) == (strict == "true")
    assert (tmp_path / "output").read_text().startswith(f"verdict={verdict}\n")


def test_the_files_to_copy_are_whole() -> None:
    from compress.verbs.gate import load_gate

    workflow = yaml.safe_load((TOP / "tools/ci/latency-gate.yml").read_text())
    action = yaml.safe_load((TOP / "action.yml").read_text())
    (used,) = [s for s in workflow["jobs"]["gate"]["steps"] if "compress@" in s.get("uses", "")]
    assert set(used["with"]) <= set(action["inputs"])
    (checkout,) = [s for s in workflow["jobs"]["gate"]["steps"] if "checkout@" in s.get("uses", "")]
    assert checkout["with"] == {"fetch-depth": 0, "persist-credentials": False}, "the build is anybody's code"
    assert workflow["permissions"] == {"contents": "read"}
    gate = load_gate(TOP / "tools/ci/latency-gate.yaml")
    assert gate.build and gate.artefact == Path("build/model.onnx")
    script = (TOP / "tools/ci/gate.sh").read_text()
    (_, run) = action["runs"]["steps"]
    assert all(name in script for name in run["env"])


def test_the_projects_own_ci_gates_before_its_tests() -> None:
    words = (TOP / ".ci" / "run").read_text()
    assert words.index("gate ||") < words.index("test 2>"), "pytest's closing line comes last"
