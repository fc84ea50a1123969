"""A job: a network with its own data, training and measures, as functions of the user's. Nothing heavy is imported."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TextIO

from compress.errors import CompressError, UsageError
from compress.run.cache import sha256_of
from compress.run.folder import fingerprint

Better = Literal["higher", "lower"]
FUNCTIONS = ("calibrate", "evaluate", "train", "loss", "batches")
OPTIONAL = ("train", "loss", "batches")


@dataclass(frozen=True)
class Job:
    """What a method needs of a network that is trained and measured by code of the user's.

    Args:
        network: a torch module, or a function without arguments that gives one, with the weights to start from: it is
            the dense network, as it is.
        example: samples as the network takes them, two or more: a tensor (b, ...), a tuple of tensors (its arguments),
            or a dict of them by the arguments' names.
        calibrate: model -> {task: number} on data that is held out from training and test. The oracle asks it hundreds
            of times, so it should be quick; it must give the same of the same network.
        evaluate: likewise on the test data. It is asked at the end, and reported.
        better: task -> "higher" or "lower".
        train: trains the network that it is given in place, by a loop of any kind. Where it takes them it is given
            ``epochs`` (of the recipe's ``finetune``, or ``pagcp.between``) and ``seed``. By default nothing is trained
            after a cut.
        loss: (model, batch) -> one number to go backward from, or {task: number}; with ``batches`` it says which
            channels a task needs (``pagcp.saliency: taylor``), and batch norms take their statistics again by it.
        batches: gives the training batches for that, a few hundred samples in all, the same ones each time.

    Raises:
        UsageError: a field is no such thing.
    """

    network: Any
    example: Any
    calibrate: Callable[[Any], Mapping[str, Any]]
    evaluate: Callable[[Any], Mapping[str, Any]]
    better: Mapping[str, Better]
    train: Callable[..., Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    batches: Callable[[], Iterable[Any]] | None = None

    def __post_init__(self) -> None:
        for name in FUNCTIONS:
            given = getattr(self, name)
            if not callable(given) and not (given is None and name in OPTIONAL):
                raise _wrong(f"{name} is {type(given).__name__}, not a function", "give a function")
        if not isinstance(self.better, Mapping) or not self.better:
            raise _wrong("better names no task", 'say which way is better: better={"accuracy": "higher"}')
        for task, way in self.better.items():
            if not isinstance(task, str) or not task or way not in ("higher", "lower"):
                raise _wrong(f"better says {way!r:.40} of {task!r:.40}", 'say "higher" or "lower" of every task')
        if (self.loss is None) != (self.batches is None):
            raise _wrong("loss and batches go together, and one is given", "give both, or neither")


def _wrong(what: str, fix: str) -> UsageError:
    return UsageError(what, where="the job", fix=fix)


@dataclass(frozen=True)
class Figure:
    """A task of a job: a number that its functions give; it stands where a `compress.data.tasks.Task` does."""

    name: str
    higher_is_better: bool
    kind: str = "figure"

    @property
    def metric(self) -> str:
        """What the number is called: the task itself."""
        return self.name


@dataclass(frozen=True)
class NamedJob:
    """A job, what gives its network in a clean process, and what is to be known of its code.

    Args:
        name: FILE.py:NAME.
        sha256: of the files that its functions stand in.
    """

    job: Job
    name: str
    sha256: str
    kept: dict[str, Any] = field(default_factory=dict, compare=False)  # what is asked of it once

    @property
    def tasks(self) -> tuple[Figure, ...]:
        return tuple(Figure(name, way == "higher") for name, way in self.job.better.items())

    @property
    def title(self) -> str:
        """The name without its folder."""
        path, _, own = self.name.rpartition(":")
        return f"{Path(path).name}:{own}"

    def where(self, name: str) -> str:
        """The place of one of its functions, for people."""
        return place_of(getattr(self.job, name), name, self.name)

    def takes(self, name: str, word: str) -> bool:
        """Whether one of its functions takes an argument of that name."""
        try:
            parameters = inspect.signature(getattr(self.job, name)).parameters.values()
        except (TypeError, ValueError):  # of a compiled function nothing is known
            return False
        return any(p.name == word or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)

    def called(self, name: str, *given: Any, **more: Any) -> Any:
        """What one of its functions returns.

        Raises:
            CompressError: it raised something; that is told with the file and line of the user's.
        """
        function = getattr(self.job, name)
        try:
            with aside():
                return function(*given, **more)
        except CompressError:
            raise
        except Exception as e:  # the user's own code may raise anything
            raise fault_of(e, f"the job's {name}", self.where(name), _file(function)) from e
        except SystemExit as e:
            raise CompressError(
                f"the job's {name} ends the program: exit({e.code})", where=self.where(name), fix="let it return"
            ) from e


def named_job(job: Job, name: str) -> NamedJob:
    """A job with what builds its network again: FILE.py:NAME, of the job itself or of a function that gives it."""
    functions = [job.network, *(getattr(job, f) for f in FUNCTIONS)]
    files = {_file(f) for f in functions if f is not None} | {name.rpartition(":")[0]}
    files |= _imported(job, Path(name.rpartition(":")[0]))
    held = sorted(sha256_of(Path(f)) for f in files if f and Path(f).is_file())
    return NamedJob(job, name, fingerprint({"job": held, "better": dict(job.better)}))


def _imported(job: Job, file: Path) -> set[str]:
    """The files in the folder of the job's own, and below, that its functions' modules import, and those in turn."""
    if not file.is_file():
        return set()
    own = [job.network, *(getattr(job, name) for name in FUNCTIONS)]
    todo = [sys.modules.get(getattr(_plain(f), "__module__", None) or "") for f in own if f is not None]
    todo += [m for m in list(sys.modules.values()) if getattr(m, "__file__", None) and _same(m.__file__, file)]
    folder, seen, found = file.resolve().parent, set(), set()
    while todo:
        module = todo.pop()
        place = getattr(module, "__file__", None)
        if module is None or id(module) in seen or not place:
            continue
        seen.add(id(module))
        path = Path(place).resolve()
        if not path.is_relative_to(folder) or "site-packages" in path.parts or module.__name__.startswith("compress"):
            continue
        found.add(str(path))
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            todo.append(sys.modules.get(name) if isinstance(name, str) else None)
    return found


def _same(place: Any, file: Path) -> bool:
    return isinstance(place, str) and Path(place).name == file.name and Path(place).resolve() == file.resolve()


def aside() -> contextlib.redirect_stdout[TextIO]:
    """Within it what code of the user's prints goes to standard error: a verb's own output may be JSON."""
    return contextlib.redirect_stdout(sys.stderr)


def _plain(function: Any) -> Any:
    """The function within partials and decorators, or the class of an object that is called."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return function if hasattr(function, "__code__") or inspect.ismethod(function) else type(function)


def _file(function: Any) -> str:
    """The file that a function or an object's class stands in; empty where there is none (a notebook)."""
    try:
        return str(Path(inspect.getsourcefile(_plain(function)) or "").resolve())
    except (TypeError, OSError):
        return ""


def place_of(function: Any, role: str, otherwise: str) -> str:
    """FILE.py, line N, FUNCTION of a function of the user's."""
    plain = _plain(function)
    file = _file(function)
    if not file:
        return f"{role} of {otherwise}"
    name = getattr(plain, "__qualname__", role).rpartition("<locals>.")[2]
    code = getattr(plain, "__code__", None)
    line = f", line {code.co_firstlineno}" if code is not None else ""
    return f"{file}{line}, {name}" + (f" ({role})" if name != role else "")


def fault_of(error: BaseException, what: str, where: str, file: str) -> CompressError:
    """An exception out of the user's code as one error: theirs, with the file and line of it that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if file and str(Path(f.filename).resolve()) == file]
    last = own[-1] if own else None
    said = (str(error).strip().splitlines() or [""])[0]
    place = f"{file}, line {last.lineno}, {last.name}" if last is not None else where
    return CompressError(f"{what} raised {type(error).__name__}: {said}", where=place, fix="mend it there")
