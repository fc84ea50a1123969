"""What is typed behind a verb: numbers of options, KEY=VALUE, names of models, files and machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from hypothesis import strategies as st

from compress.errors import CompressError, UsageError
from tests.fuzz.mutate import ODD, Raw, written
from tests.fuzz.tries import Ended, attempt, sensible

NUMBERS = (
    "", " ", "0", "-1", "1", "2", "1.5", "-0", "nan", "inf", "-inf", "1e3", "1e400", "1e-400", "0x10", "1_0",
    "８", "١", "+1",
    " 3 ", "1,5", "9" * 30, "9" * 5000, "x", "\u202e1", "1\n", "--", "\udcff", "None", "true",
    "10000000000000000000000",
)  # fmt: skip
NAMES = (
    "", " ", ".", "..", "/", "-", "~", "~nobody/x", "*", "[", "?", "x\ny", "\u202etxt", "\udcff",
    "\udcff/x.yaml", "x" * 300,
    "x" * 5000, "a/" * 2500, "x" * 300 + ".yaml", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/1/mem",
    "/dev/null",
    "git:", "git:--help", ":dense", "x:dense", "a/b", "a/b/c", "../a", "a//b", "org/" + "x" * 300, "%s", "{x}",
    "$(x)", "x.onnx",
    "x.yaml", "0xh100", "8xh100", "9999999xh100", "\udcff.onnx", "worktree", "é", "x\t", "CON", "a\\b", "x\x7f",
)  # fmt: skip
SHAPES = ("batch=1", "batch=1:8:32", "=1", "x", "x=", "x=1:2", "x=3:2:1", "x=0", "x=-1", "x=９", "x=1e3",
    "x=" + "9" * 40,
          "x.0=1", "x.y.z=1", "a=1x2", "a=1x", "a=x", "\udcff=1", "a=1:1:1:1", "a=\u202e",
          "x" * 5000 + "=1")  # fmt: skip
BUDGETS = ("size<=1.0x", "latency<=0x", "latency<=-1x", "latency<=nanx", "latency<=" + "9" * 400 + "x",
           "latency<=５x", "size>=1x", "accuracy>=-0.5%", "accuracy>=1", "x<=1x", "", "<=", "latency<=1.05",
           "latency.p99<=3ms",
           "latency.p99<=1x", "\udcff<=1x", "latency<=1x" * 1000, "memory<=1QB", "ttft <= 1.0 x",
           "latency<=.x")  # fmt: skip


class Number(NamedTuple):
    """An option that takes a number, and the bounds that it is declared with."""

    verb: str
    option: str
    parameter: str
    least: float | None
    most: float | None


def _verb(command: Any) -> str:
    return str(command.name or command.callback.__name__)


@cache
def _numeric() -> tuple[Number, ...]:
    from compress import cli

    found = []
    for command in cli.app.registered_commands:
        hints = get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            kinds = {int, float} & {*get_args(get_args(hint)[0]), get_args(hint)[0]} if get_args(hint) else set()
            if kinds and hasattr(hint, "__metadata__"):
                info = hint.__metadata__[0]
                # In an annotation the first name stands where a default would.
                named = (d for d in (info.default, *(info.param_decls or ())) if isinstance(d, str))
                option = next((d for d in named if d.startswith("--")), f"--{name.replace('_', '-')}")
                found.append(Number(_verb(command), option, name, info.min, info.max))
    return tuple(found)


REQUIRED = {
    "prune": ["m", "--recipe", "r"], "plan": ["m", "--recipe", "r"], "eval": ["m"], "export": ["m", "--out", "o"],
    "bench": ["a", "b"], "gate": ["a", "b"], "run": ["a", "b"], "sweep": ["m", "--recipe", "r", "--at", "25%,50%"],
}  # fmt: skip


def _parsed(number: Number, word: str) -> Any:
    """The value that the verb would get; what the command line refuses is an error of exit code 2."""
    from compress import cli

    command = next(c for c in cli.app.registered_commands if _verb(c) == number.verb)
    work, got = command.callback, list[Any]()
    assert work is not None

    @wraps(work)
    def instead(**given: Any) -> None:
        got.append(given[number.parameter])

    command.callback = instead
    try:
        _run([number.verb, *REQUIRED[number.verb], f"{number.option}={word}"])
    finally:
        command.callback = work
    if number.parameter == "sparsity":
        from compress.pipeline import METHODS
        from compress.schema.recipe import load_recipe

        return [load_recipe("tyr", METHODS, [f"sparsity={got[0]}"]).sparsity, 0, 1]
    return [got[0], number.least, number.most]


def _number_right(found: Any) -> str:
    value, least, most = found
    if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        return f"{value!r} was taken, of {least} to {most}"
    return "allowed"


def number_tries() -> st.SearchStrategy[tuple[str, Callable[[], Ended]]]:
    def one(number: Number, word: str) -> tuple[str, Callable[[], Ended]]:
        what = f"compress {number.verb} {number.option}={ascii(word)[:80]}"
        return what, lambda: attempt(lambda: _parsed(number, word), lambda e: None, _number_right)

    return st.builds(one, st.sampled_from(_numeric()), st.sampled_from(NUMBERS))


def _keys(value: Any, at: str = "") -> Iterator[str]:
    for key, inner in value.items():
        yield f"{at}{key}"
        if isinstance(inner, dict):
            yield from _keys(inner, f"{at}{key}.")


@cache
def _recipe_keys() -> tuple[tuple[str, str], ...]:
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_recipe, recipe_names

    return tuple(
        (name, key)
        for name in sorted(recipe_names())
        for key in (
            *_keys(load_recipe(name, METHODS).resolved()),
            "recover.steps",
            "data.size",
            "data.folder",
            "x",
            "",
            ".",
            "a..b",
        )
    )


def _set(recipe: str, key: str, text: str) -> Any:
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_recipe

    return load_recipe(recipe, METHODS, [f"{key}={text}"]).resolved()


def set_tries() -> st.SearchStrategy[tuple[str, Callable[[], Ended]]]:
    def one(place: tuple[str, str], value: Any) -> tuple[str, Callable[[], Ended]]:
        recipe, key = place
        text = value if isinstance(value, str) and not isinstance(value, Raw) else written(value)

        def culprit(e: CompressError) -> str | None:
            return None if "--set" in e.where else "--set is not named"

        def judge(found: Any) -> str:
            return sensible(found) or ("allowed" if "\ud800" not in repr(found) else "half a character was taken")

        what = f"--set {key!a}={ascii(text)[:60]} of {recipe}"
        return what, lambda: attempt(lambda: _set(recipe, key, text), culprit, judge)

    return st.builds(one, st.sampled_from(_recipe_keys()), st.sampled_from((*ODD, *NUMBERS, *NAMES)))


def _run(words: list[Any]) -> Any:
    """A command to its end; what it prints must be one error where it fails."""
    from tests.command import compress

    ran = compress(*words)
    if ran.code == 0:
        return ran.out
    said = ran.err[ran.err.rfind("error: ") :] if "error: " in ran.err else ran.err
    parts = [line.partition(":")[2].strip() for line in said.strip().splitlines()]
    if "Usage:" in ran.err or "Error: " in ran.err:  # the command line's own
        raise UsageError("the command line is wrong", "the command line", "see --help")
    assert len(parts) == 3 and "Traceback" not in ran.err and ran.code in (1, 2), ran.err[-2000:]
    raise CompressError(*parts)


def _verbs(word: str, place: Path) -> list[list[Any]]:
    """Every place of a command where a name stands."""
    model, good, out = place / "model", place / "onnx" / "net.onnx", place / "out"
    asked = ("--format", "ort", "--shape", "batch=1", "--out", out)
    return [
        ["verify", word],
        ["card", word, "--out", out],
        ["report", word, "--out", out / "x.html"],
        ["eval", word, "--text", place / "a.txt"],
        ["eval", model, "--text", word],
        ["eval", model, "--like", word],
        ["export", word, *asked],
        ["export", good, "--inputs", word, *asked],
        ["export", good, "--target", word, *asked],
        ["bench", word, word],
        ["gate", word, word, "-b", "size<=1x"],
        ["gate", good, good, "-b", word],
        ["gate", good, good, "--gate", word],
        ["gate", good, good, "-b", "size<=1x", "--shape", word],
        ["plan", word, "-r", "tyr"],
        ["plan", model, "-r", word],
        ["plan", model, "-r", "tyr", "--on", word],
        ["plan", "x.py:f", "-r", "global-mp-network", "--set", f"data.folder={word}"],
        ["prune", word, "-r", "tyr", "--out", out],
        ["prune", model, "-r", word, "--out", out],
        ["run", word, "a text"],
        ["run", model, "a text", "--tokenizer", word],
        ["plan", f"{place / 'job.py'}:{word}", "-r", "pagcp"],
        ["prune", f"{place / 'job.py'}:{word}", "-r", "pagcp", "--out", out],
        ["eval", f"{place / 'job.py'}:{word}"],
        ["bench", good, good, "--inputs", word],
        ["gate", good, good, "-b", "size<=1x", "--inputs", word],
        ["export", model, "--format", word, "--out", out],
        ["plan", model, "-r", "tyr", "-b", word],
        ["doctor", "--target", word],
        ["list", word],
        ["export", good, "--format", word, "--out", out],
        ["export", good, "--format", "ort", "--precision", word, "--out", out],
        ["export", good, "--format", "ort", "--shape", word, "--out", out],
        ["verify", model, "--network", word],
        ["prune", model, "-r", "tyr", "--until", word, "--out", out],
    ]  # fmt: skip


def make(place: Path) -> None:
    """What the words stand beside."""
    from tests.fuzz.readers import READERS
    from tests.tiny import prose

    for name, reader in (("model", "config-planned"), ("onnx", "onnx")):
        (place / name).mkdir()
        READERS[reader].make(place / name)
    (place / "a.txt").write_text(prose(3))
    (place / "job.py").write_text("x = 3\n\n\ndef f():\n    return None\n")


def name_tries(place: Path) -> st.SearchStrategy[tuple[str, Callable[[], Ended]]]:
    import shutil

    def one(word: str, at: int) -> tuple[str, Callable[[], Ended]]:
        shutil.rmtree(place / "out", ignore_errors=True)
        words = _verbs(word, place)[at]
        what = "compress " + " ".join(ascii(str(w))[:80] for w in words)
        return what, lambda: attempt(lambda: _run(words), lambda e: None, lambda found: "allowed")

    every = len(_verbs("x", place))
    return st.builds(one, st.sampled_from((*NAMES, *SHAPES, *BUDGETS)), st.integers(0, every - 1))
