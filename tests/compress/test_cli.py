"""The command line: light to start, helpful, and clean on standard output."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from compress.run import progress
from compress.run.progress import Progress
from tests.command import Job, compress, one_error
from tools.ci.models import chain

pytestmark = pytest.mark.usefixtures("done_once")

VERBS = ("prune", "sweep", "plan", "eval", "export", "bench", "gate", "card", "report", "verify", "list", "doctor")
HEAVY = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "safetensors", "matplotlib", "pydantic", "yaml")


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['compress', '--help']\n"
        "from compress.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert all(verb in done.stdout for verb in VERBS)


def test_what_reads_files_alone_starts_without_torch(tmp_path: Path) -> None:
    """A second of a processor, on every machine that gates a change."""
    net = str(chain(tmp_path / "net.onnx", 2))
    script = (
        "import sys\n"
        "from compress.cli import main\n"
        f"for words in (['list', 'recipes'], ['list', 'targets'], ['gate', {net!r}, {net!r}, '-b', 'size<=1x']):\n"
        "    sys.argv = ['compress', *words]\n"
        "    try:\n        main()\n    except SystemExit as e:\n        assert not e.code\n"
        f"print([m for m in {(*HEAVY[:2], *HEAVY[4:7])!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_takes_less_than_a_third_of_a_second_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        subprocess.run([sys.executable, "-m", "compress", "--help"], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3 < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example_of_itself(verb: str) -> None:
    ran = compress(verb, "--help")
    assert ran.code == 0
    assert f"compress {verb}" in ran.out.split("Example", 1)[1]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json(verb: str) -> None:
    assert "--json" in compress(verb, "--help").out


def test_a_wrong_word_exits_with_2_and_starts_nothing(tmp_path: Path) -> None:
    assert compress("prun").code == 2
    assert compress("prune", "model", "--out", tmp_path / "run").code == 2  # no --recipe
    assert compress("prune", "m", "--recipe", "tyr", "--out", tmp_path / "run", "--sparsity", "half").code == 2
    assert not (tmp_path / "run").exists()
    one_error(compress("prune", "m", "-r", "tyr", "--until", "modle"), 2, "'modle'", "--until", "evaluation")


def test_json_stands_alone_on_standard_output(job: Job, finished: Path, tmp_path: Path) -> None:
    export, card = tmp_path / "onnx", tmp_path / "card"
    small = ("--prompt", 8, "--context", 8, "--processes", 1, "--threads", 1)
    commands: dict[str, tuple[object, ...]] = {
        "prune": (job.model, "--recipe", job.recipe, "--out", tmp_path / "run", "--until", "plan"),
        "sweep": (job.model, "--recipe", job.recipe, "--at", "20%,40%", "--plan"),
        "plan": (job.model, "--recipe", job.recipe),
        "eval": (finished, "--like", finished),
        "export": (finished, "--out", export),
        "bench": (export, export, *small),
        "gate": (export, export, "--budget", "size<=1.0x"),
        "card": (finished, "--out", card),
        "report": (finished, "--out", card / "page.html"),
        "verify": (finished,),
        "list": (),
        "doctor": (),
    }
    assert set(commands) == set(VERBS)
    for verb, words in commands.items():
        ran = compress(verb, *words, "--json")
        assert ran.code == 0, ran.err
        assert isinstance(json.loads(ran.out), dict), verb


def test_debug_shows_the_traceback() -> None:
    from compress.errors import UsageError

    with pytest.raises(UsageError):
        compress("--debug", "plan", "no-such-model", "-r", "tyr-demo")


def test_a_gpu_whose_memory_is_full_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from compress.verbs import common as verbs

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 4.41 GiB. GPU 0 has a total capacity of 79.18 GiB of which 56.80 GiB"
        )

    monkeypatch.setattr(verbs, "plan", full)
    ran = compress("plan", "llama-8b", "-r", "tyr")
    assert ran.code == 1 and ran.err.count("error: ") == 1
    assert "the GPU's memory does not suffice: 4.41 GiB more were asked for" in ran.err and "memory.stream" in ran.err


def test_version() -> None:
    from compress import __version__

    assert compress("--version").out == f"compress {__version__}\n"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else runs on this machine, nothing is said of it."""
    monkeypatch.setattr("compress.run.progress.host.waited", lambda: None)


@pytest.fixture
def clock(calm: None, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("compress.run.progress.time", made)
    return made


def test_progress_is_plain_lines_when_not_a_terminal(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, "blocks") as bar:
        for _ in range(100):
            clock.now += 1.0
            bar.update(1, note="KL 0.1")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and "\x1b" not in err
    lines = err.splitlines()
    # A line every fifteen seconds and one at the end.
    assert len(lines) == 7 and lines[0] == "blocks 15/100 (15s, 1m25s left) KL 0.1"
    assert lines[-1].startswith("blocks 100/100 (1m40s")


def test_progress_says_nothing_of_short_work(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, "blocks") as bar:
        clock.now += 1.9
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress(4, "blocks") as bar:
        for _ in range(4):
            clock.now += 3.0
            bar.update(1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\r\x1b[K[#####...............] blocks 1/4" in err and "[####################]" in err


def test_a_resumed_bar_reckons_only_with_what_it_did_itself(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, "blocks", start=90) as bar:
        clock.now += 20.0
        bar.update(5)
    assert capsys.readouterr().err.splitlines()[0] == "blocks 95/100 (20s, 20s left)"


@pytest.mark.usefixtures("calm")
@pytest.mark.parametrize("live", [True, False])
def test_work_that_counts_no_steps_is_shown_with_its_time(
    live: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: live, raising=False)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.2)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)
    with progress.busy("prune"), progress.busy("export-dense"):
        time.sleep(1.3)
        progress.say("tracing")
    err = capsys.readouterr().err
    assert "export-dense (1s)" in err and "prune" not in err
    # What is drawn over leaves nothing on the line.
    assert err.splitlines()[-1].endswith("tracing") and (err.count("\r\x1b[K") >= 2) == live
    with progress.busy("gate"):
        pass
    assert capsys.readouterr().err == ""
    assert not [t for t in threading.enumerate() if t.name == "progress"]


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m compress list --json | head -n 0", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""
