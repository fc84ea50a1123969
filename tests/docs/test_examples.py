"""The scripts in examples/, each run as its reader runs it; and that the list of them is whole."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, links

EXAMPLES = ROOT / "examples"
SHARED = {"tiny.py", "scene_net.py"}
NEEDS = {"yolo_job.py": "ultralytics"}
# What the last lines say, and whether it takes over 20 s of two quiet cores.
RUN = {
    "prune_llm.py": (r"removed 2\d\.\d %.*\nperplexity \d+\.\d -> \d+\.\d\nThe statement.{10,}", False),
    "prune_multitask.py": (r"miou segmentation: 0\.\d+ -> 0\.\d+\n(.*\n)*SceneNet with", True),
    "digits_job.py": (r"FLOPs 1,807,744 -> .*\naccuracy: 0\.9\d+ -> 0\.9\d+\nink error: .*\nDigits with", True),
    "trainer_job.py": (r"FLOPs 5,498,112 -> 2,\d+,\d+\naccuracy: 0\.9\d+ -> 0\.9\d+\nloss: ", True),
    "yolo_job.py": (r"FLOPs [\d,]+ -> [\d,]+\nmAP50 0\.\d+ -> 0\.\d+", True),
    "gate_in_ci.sh": (r"gate +pass\n(.*\n)*the second gate failed, as it must", True),
    "custom_target.sh": (r"latency pruned +\d+(.*\n)*budget +latency: 50 ms are", False),
    "custom_family.py": (r"sliced equals masked\n(.*\n)*.*logits differ by 0\.0e\+00", False),
    "resume_after_kill.py": (r"killed; .*text(.*\n)*the same bytes as", True),
}


def test_every_example_is_listed_run_and_told_of() -> None:
    scripts = {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".sh")}
    assert scripts == {*RUN, *SHARED}
    assert set(links(EXAMPLES / "README.md")) == set(RUN)
    for name in RUN:
        text = (EXAMPLES / name).read_text()
        told = ast.get_docstring(ast.parse(text)) if name.endswith(".py") else text.partition("set -eu")[0]
        assert told and len(told) > 300 and f"examples/{name}" in told.splitlines()[-1], name


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if slow else [], id=n) for n, (_, slow) in RUN.items()]
)
def test_an_example_runs_from_elsewhere_and_ends_with_what_it_shows(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is in no environment of the project")
    before = {p for p in EXAMPLES.rglob("*") if "__pycache__" not in p.parts}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable if name.endswith(".py") else "sh", str(EXAMPLES / name), str(tmp_path / "out")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **own})
    assert done.returncode == 0, done.stderr
    assert re.search(RUN[name][0], done.stdout), done.stdout
    assert {p for p in EXAMPLES.rglob("*") if "__pycache__" not in p.parts} == before
