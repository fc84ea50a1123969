"""Why an exporter cannot take a model, as one error: the operator, and the layer that it stands in.

Exporters say it in pages, with colours for a terminal, and name a node of their own graph. What is asked of them is one
line; the whole text stays in the error's cause (`compress --debug`).
"""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import nn

MOST = 300  # characters of another program's words
_COLOUR = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.")
_TARGET = re.compile(r"%(\w+) : .*?call_function\[target=torch\.ops\.([\w.]+)\]")
_OVERLOAD = re.compile(r"OpOverload\(op='([\w.:]+)'")
_OUT = re.compile(r"Missing out variants: \{'([\w.:]+)'")
_NEXT_STEPS = re.compile(r"^(- |For |\(Refer|## |consider using|Caused by|If you|The |⬆)")


def plain(text: object) -> str:
    """The first line that says something of another program's message, without commands for a terminal."""
    lines = [" ".join(line.split()) for line in _COLOUR.sub("", str(text)).splitlines()]
    telling = [line for line in lines if line and not _NEXT_STEPS.match(line)]
    return (telling or ["it does not say why"])[0][:MOST]


@contextlib.contextmanager
def still() -> Iterator[None]:
    """While it is open, tracing says nothing: torch prints the graph so far where it gives up, and a command's output
    is its answer alone."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def refusal(error: BaseException, title: str, model: nn.Module, program: Any = None) -> CompressError:
    """The error for a model that ``title`` (ONNX, ExecuTorch) cannot take.

    Args:
        error: what tracing or the exporter raised.
        model: what was traced; layers are named as they are in it, without ``model.`` in front where it is one of ours
            around a user's.
        program: the exported program, where tracing was done.
    """
    said = [_COLOUR.sub("", str(e)) for e in _causes(error)]
    operator, node = _operator(said)
    fix = "replace that operator or layer, or name another --format"
    if operator is not None:
        layer = _layer_of(program, node, operator) if program is not None else None
        layer = layer or _layer_traced(error)
        what = f"{title} has no operator {operator}" + (f", which the layer {layer} uses" if layer else "")
        return CompressError(f"the model cannot be exported: {what}", where=layer or type(model).__name__, fix=fix)
    layer = _layer_traced(error)
    if "data-dependent" in said[0] or type(error).__name__ == "GuardOnDataDependentSymNode":
        line, own = _line(error), own_line(error)
        line = line or (own[1] if own else None)
        return CompressError(
            "the model cannot be exported: a shape or a branch depends on values that are known only when it runs"
            + (f", in the layer {layer}" if layer else "")
            + (f": {line}" if line else ""),
            where=layer or (own[0] if own else type(model).__name__),
            fix="write it with operators on whole tensors (torch.where, a mask), or leave it out of the model",
        )
    return CompressError(
        f"the model cannot be exported to {title}: {plain(said[0])}" + (f" (in the layer {layer})" if layer else ""),
        where=layer or type(model).__name__,
        fix="rewrite what it names, or name another --format",
    )


def unknown_operators(names: Sequence[str], program: Any, title: str) -> CompressError:
    """The error for operators that a runtime does not have, though the exporter took them."""
    name = min(names).removesuffix(".out").replace("::", ".")
    layer = _layer_of(program, None, name)
    return CompressError(
        f"the model cannot be exported: {title} has no operator {name}"
        + (f", which the layer {layer} uses" if layer else "")
        + (f" (and {len(names) - 1} more)" if len(names) > 1 else ""),
        where=layer or title,
        fix="replace that operator or layer, or name another --format",
    )


def of_graph(operator: str, graph: Path) -> str:
    """``the operator X of the node 'Y'``, for an operator that the reader of an ONNX file does not take."""
    from compress.exporters.tensors import read

    named = [n.name or (n.output[0] if n.output else "") for n in read(graph).graph.node if n.op_type == operator]
    return f"the operator {operator}" + (f" of the node {named[0]!r}" if named else "")


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _operator(said: Sequence[str]) -> tuple[str | None, str | None]:
    """(the operator, the name of its node) that a message and its causes speak of."""
    for text in said:
        if match := _TARGET.search(text):
            return match[2].removesuffix(".default"), match[1]
    for pattern in (_OVERLOAD, _OUT):
        for text in said:
            if match := pattern.search(text):
                return match[1].replace("::", "."), None
    return None, None


def _layer_of(program: Any, node: str | None, operator: str) -> str | None:
    """The layer in which an exported program uses an operator; the exporters decompose it first, and so is done here
    where the operator does not stand in it as it is."""
    own = _search(program, node, operator)
    if own is None:
        with contextlib.suppress(Exception), still():  # a hint in an error's text: without it the error stands as well
            own = _search(program.run_decompositions(), node, operator)
    return own


def _search(program: Any, node: str | None, operator: str) -> str | None:
    family = operator.split(".")[:2]
    for each in program.graph.nodes:
        target = str(each.target).removeprefix("torch.ops.").split(".")
        if each.op == "call_function" and (each.name == node or target[:2] == family):
            stack = each.meta.get("nn_module_stack") or {}
            named = [(path, kind) for path, kind in stack.values() if path]
            if named:
                path, kind = named[-1]
                return _words(str(path), str(kind).rpartition(".")[2].strip("'>"))
    return None


def _words(path: str, kind: str) -> str | None:
    name = re.sub(r"^(L\['self'\]\.?|_export_root\.|model\.)+", "", path)
    return f"{name} ({kind})" if name not in ("", "model", "_export_root") else None


def _frames(error: BaseException) -> Iterator[tuple[str, TracebackType]]:
    """(layer, place) of every layer's own forward that an error came through, the outermost first."""
    from torch import nn

    names: dict[int, str] = {}
    trace = error.__traceback__
    while trace is not None:
        inside = trace.tb_frame.f_locals.get("self")
        if isinstance(inside, nn.Module) and trace.tb_frame.f_code.co_name == "forward":
            if id(inside) not in names:  # the outermost, perhaps of a copy that was traced
                names |= {id(module): name for name, module in inside.named_modules()}
            name = _words(names[id(inside)], type(inside).__name__)
            if name is not None:
                yield name, trace
        trace = trace.tb_next


def _layer_traced(error: BaseException) -> str | None:
    found = [name for name, _ in _frames(error)]
    return found[-1] if found else None


def own_line(error: BaseException) -> tuple[str, str] | None:
    """(``FILE, line N``, its text) of the last line of the model's own code, neither torch's nor ours, that an error
    came through."""
    found, trace = None, error.__traceback__
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in ("torch", "compress"):
            found = trace
        trace = trace.tb_next
    if found is None:
        return None
    file = found.tb_frame.f_code.co_filename
    return f"{file}, line {found.tb_lineno}", linecache.getline(file, found.tb_lineno).strip()[:100]


def _line(error: BaseException) -> str | None:
    """The line of the innermost layer's code that an error came from."""
    found = [trace for _, trace in _frames(error)]
    if not found:
        return None
    line = linecache.getline(found[-1].tb_frame.f_code.co_filename, found[-1].tb_lineno).strip()
    return line[:100] or None
