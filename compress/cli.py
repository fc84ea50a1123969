"""The command line. Imports nothing heavy: the work is imported inside the verb that does it."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer

try:
    from compress import __version__
except ImportError:
    sys.exit(
        "error: compress/__init__.py is another project's: a package named `compress` was installed over this one"
        "\n  fix:   pip uninstall compress, then pip install --force-reinstall compress-toolchain"
    )
from compress.errors import CompressError
from compress.system import threads
from compress.verbs import sweep_command
from compress.verbs.typed import (
    MOST,
    Budgets,
    Json,
    Model,
    Network,
    Processes,
    RankTimeout,
    RecipeName,
    Set,
    Sparsity,
    TargetName,
    Threads,
    overridden,
    show,
)
from compress.words.escape import terminal_lines

app = typer.Typer(
    help="Makes a trained model smaller and faster on the device it is deployed to, and proves it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

GO_ON = ("prune", "sweep")  # verbs that many processes share, and that go on where they were stopped

_debug = False
_verb = ""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"compress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="shows the traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="prints the version")
    ] = False,
) -> None:
    global _debug, _verb
    _debug, _verb = debug, context.invoked_subcommand or ""
    if context.invoked_subcommand not in GO_ON:
        from compress.processes import distributed

        # Under torchrun and the like: what the other verbs do is done once.
        if not distributed.is_main():
            raise typer.Exit
        distributed.stay_alone()
    from compress.run.progress import busy

    context.with_resource(busy(_verb))


@app.command(
    epilog="Examples:  compress prune smollm2-135m --recipe tyr-demo --out runs/demo   |   "
    "compress prune ./my-llama --recipe tyr --sparsity 0.25 --set 'calibration.sources=[{files: [text/*.txt]}]'"
)
def prune(
    model: Model,
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="the run folder  [default: runs/MODEL-RECIPE]")] = None,
    sparsity: Sparsity = None,
    budget: Budgets = None,
    sweep: Annotated[str | None, typer.Option(help="networks: more sparsities to train, such as 0.8,0.95")] = None,
    set_: Set = None,
    until: Annotated[
        str, typer.Option(help="last stage: plan, recover, model, evaluation, export, bench, release")
    ] = "release",
    fresh: Annotated[bool, typer.Option("--fresh", help="forgets what an earlier run left in the folder")] = False,
    processes: Processes = None,
    rank_timeout: RankTimeout = 1800.0,
    threads_: Threads = None,
    json_: Json = False,
) -> None:
    """Prunes a model, saves it, checks it, exports it, measures it and writes its card.

    The same command again goes on where it was stopped.
    """
    from compress.errors import UsageError
    from compress.processes import distributed

    threads.use(threads_)
    count = distributed.wanted(processes)
    if count > 1:
        raise typer.Exit(distributed.launch(count, sys.argv[1:]))
    from compress.pipeline import method_of
    from compress.pipeline import prune as run
    from compress.schema.stages import STAGES

    if until not in STAGES:
        raise UsageError(f"unknown stage {until!r}", where="--until", fix=f"one of: {', '.join(STAGES)}")
    folder = out or Path("runs") / f"{Path(model).name}-{Path(recipe).stem}"
    command = shlex.join(["compress", *(a for a in sys.argv[1:] if a not in ("--fresh", "--json"))])
    overrides = [*overridden(set_, sparsity, budget), *([f"sweep=[{sweep}]"] if sweep is not None else [])]
    distributed.join(timedelta(seconds=rank_timeout))
    report = run(model, recipe, folder, overrides, fresh=fresh, until=until, command=command)
    if distributed.is_main():
        show({**report, "run": str(folder)}, json_, method_of(report["recipe"]).lines)
    distributed.leave()


app.command("sweep", epilog=sweep_command.EPILOG)(sweep_command.sweep)


@app.command(
    epilog="Examples:  compress plan llama-8b --recipe tyr --sparsity 0.5   |   "
    "compress plan llama-70b --recipe tyr-large --on 8xh100"
)
def plan(
    model: Model,
    recipe: RecipeName,
    sparsity: Sparsity = None,
    budget: Budgets = None,
    set_: Set = None,
    on: Annotated[
        str, typer.Option("--on", metavar="MACHINE", help="8xh100, 2x8xh100, 1x24gb, a YAML file, or this-machine")
    ] = "this-machine",
    threads_: Threads = None,
    json_: Json = False,
) -> None:
    """Says what `prune` would do: budget, shapes, and memory, disk and time stage by stage. Reads no weight."""
    threads.use(threads_)
    from compress.pipeline import method_of
    from compress.verbs.common import plan as run

    facts = run(model, recipe, overridden(set_, sparsity, budget), on)
    show(facts, json_, method_of(facts).forecast_lines)


@app.command(
    "eval", epilog="Examples:  compress eval runs/demo --like runs/demo   |   compress eval smollm2-135m --text a.txt"
)
def eval_(
    model: Annotated[str, typer.Argument(help="a model folder, a run folder, or a model's name")],
    like: Annotated[Path | None, typer.Option(help="a run folder: the text or the data it held out")] = None,
    text: Annotated[list[str] | None, typer.Option(help="a text file or pattern; repeatable")] = None,
    dialogues: Annotated[
        list[str] | None, typer.Option(help="likewise, JSON lines of dialogues: the assistant's words are scored")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, max=MOST, help="windows per text  [default: 16]")] = None,
    length: Annotated[int | None, typer.Option(min=16, max=MOST, help="tokens per window  [default: 512]")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="an lm-evaluation-harness task; needs the extra [eval]")
    ] = None,
    network: Network = None,
    threads_: Threads = None,
    json_: Json = False,
) -> None:
    """Measures perplexity on held-out text; of a network, accuracy on a run's test split."""
    threads.use(threads_)
    from compress.verbs.by_kind import lines
    from compress.verbs.common import evaluate

    facts = evaluate(
        model, like, text=text, dialogues=dialogues, windows=windows, length=length, task=task, network=network
    )
    show(facts, json_, partial(lines, "evaluate"))


@app.command(
    epilog="Examples:  compress export runs/demo --out demo-onnx   |   "
    "compress export net.onnx --format tensorrt_rtx --precision fp16 --shape batch=1:8:32 --out net-rtx"
)
def export(
    model: Annotated[str, typer.Argument(help="a model folder, a run folder, a model's name, or an ONNX file")],
    out: Annotated[Path, typer.Option(help="the folder to make")],
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="onnx, ort, openvino, executorch, mnn, litert, genai, tensorrt, tensorrt_rtx or gguf; repeatable",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, fp16, bf16, int8, int8-weights or int4; of a GGUF f16, bf16, f32, q8_0, q6_k, q4_k_m ..."
            "  [default: fp32; of a GGUF f16]"
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="AXIS=LEAST:BENCHMARKED:LARGEST", help="sizes of an axis that may vary; repeatable"),
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="CUDA devices that tensorrt_rtx builds for, as sm86; repeatable")
    ] = None,
    fusions: Annotated[str, typer.Option(help="written into an ONNX file: none, basic or all")] = "none",
    like: Annotated[
        Path | None,
        typer.Option(
            help="networks: the run whose data calibrates int8 and judges each format; gguf: the run whose held-out"
            " text it is compared on"
        ),
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="ONNX files: real inputs that each format is compared on")
    ] = None,
    network: Network = None,
    target: TargetName = None,
    json_: Json = False,
) -> None:
    """Exports a model to ONNX (language models: prefill and decode with KV cache) and on; each is checked."""
    from compress.exporters.command import builds
    from compress.verbs.by_kind import lines
    from compress.verbs.common import export as run

    asked = builds(format_ or [], precision, shape or [], capability or [], fusions)
    if target is not None:
        from compress.exporters.on_target import build_options

        asked.append(build_options(target))
    show(run(model, out, asked, network=network, like=like, inputs=inputs), json_, partial(lines, "export"))


@app.command(
    "run",
    epilog="Examples:  compress run runs/demo 'The sea'   |   compress run runs/demo 'The sea' --dense   |   "
    "compress run demo-genai/genai-int4 'What is a whale?' --chat",
)
def run_(
    artefact: Annotated[
        str, typer.Argument(help="a model, run or release folder, a model's name, an ONNX export, one of genai, a GGUF")
    ],
    text: Annotated[str, typer.Argument(help="what the model goes on with")],
    tokens: Annotated[int, typer.Option(min=1, max=MOST, help="that are generated at most")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="the text is said to it, through its chat template")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="run folders: the dense export beside the pruned one")] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="ONNX exports, chats with a GGUF: the folder of the model it was made of")
    ] = None,
    json_: Json = False,
) -> None:
    """Goes on with a text, in the artefact's own runtime: the likeliest tokens, and how long they took."""
    from compress.run.progress import say
    from compress.verbs.generate import lines, measured, run

    facts = run(artefact, text, tokens=tokens, chat=chat, dense=dense, tokenizer=tokenizer)
    show(facts, json_, lines)
    for line in measured(facts):
        say(line)


@app.command(
    epilog="Examples:  compress bench runs/demo/export-dense runs/demo/export-pruned   |   "
    "compress bench dense-pi pruned-pi --target my-pi.yaml"
)
def bench(
    dense: Annotated[Path, typer.Argument(help="export folder of the dense model")],
    pruned: Annotated[Path, typer.Argument(help="export folder of the pruned model")],
    prompt: Annotated[int | None, typer.Option(min=1, max=MOST, help="language models: tokens of the prompt")] = None,
    context: Annotated[int | None, typer.Option(min=1, max=MOST, help="language models: tokens in the cache")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=MOST, help="networks: samples of one call")] = None,
    processes: Annotated[int | None, typer.Option(min=1, max=1000, help="fresh processes per model")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="networks: an array for each input, which both are given")
    ] = None,
    target: TargetName = None,
    out: Annotated[Path | None, typer.Option(help="a folder for bench.json and the plots")] = None,
    json_: Json = False,
) -> None:
    """Measures latency and memory of two exports, interleaved in fresh processes, here or on a target."""
    from contextlib import nullcontext

    from compress.exporters.on_target import RECORD, bench_lines, write
    from compress.run.written import refuse_replacing, written
    from compress.system.files import disk_errors
    from compress.verbs.by_kind import lines
    from compress.verbs.common import bench as run

    # Before anything is measured: a place that cannot be written is said at once.
    with nullcontext() if out is None else written(out, (RECORD,), refuse_replacing) as beside:
        facts = run(
            dense,
            pruned,
            prompt=prompt,
            context=context,
            batch=batch,
            processes=processes,
            threads=threads,
            inputs=inputs,
            target=target,
        )
        if out is not None and beside is not None:
            with disk_errors(out):
                write(facts, beside)
    show(facts, json_, partial(lines, "bench") if target is None else bench_lines)


@app.command(
    epilog="Examples:  compress gate old.onnx new.onnx --budget 'latency<=1.05x' --budget 'size<=1.0x'   |   "
    "compress gate runs/demo:dense runs/demo -b 'latency<=0.9x' -b 'perplexity<=1.5x'   |   "
    "compress gate git:main worktree --gate latency-gate.yaml --out gate   |   "
    "compress gate old.onnx --self-test.  Exit codes: 0 pass, 1 fail, 3 inconclusive, 2 the command is wrong"
)
def gate(
    baseline: Annotated[
        str | None, typer.Argument(help="an ONNX file, an export or run folder (RUN or RUN:dense), or git:REV")
    ] = None,
    candidate: Annotated[
        str | None, typer.Argument(help="likewise, or `worktree`: what the gate file builds in the working tree")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", "-b", help="what the candidate may be, such as latency<=1.05x; repeatable"),
    ] = None,
    gate_file: Annotated[Path | None, typer.Option("--gate", metavar="FILE", help="a gate file (YAML)")] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test", help="baseline against itself: the smallest change this machine can detect")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="inconclusive fails")] = False,
    pinned: Annotated[
        str | None, typer.Option(metavar="NAME", help="this is the pinned device NAME: budgets in ms are allowed")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="a folder for gate.json (raw samples), junit.xml, summary.md and the plot")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="append the Markdown summary to it  [default: $GITHUB_STEP_SUMMARY]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=4096)] = None,
    samples: Annotated[int | None, typer.Option(min=1, max=MOST, help="of 0.1 s or more, in one process")] = None,
    batch: Annotated[int | None, typer.Option(min=1, max=MOST, help="networks: samples of one call")] = None,
    prompt: Annotated[int | None, typer.Option(min=1, max=MOST, help="language models: tokens of the prompt")] = None,
    context: Annotated[int | None, typer.Option(min=1, max=MOST, help="language models: tokens in the cache")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NAME=1x3x32x32", help="an input's whole shape; repeatable")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="networks: an array for each input, which both are given")
    ] = None,
    json_: Json = False,
) -> None:
    """Latency, memory, size and quality of a candidate against a baseline, for CI: pass, fail or inconclusive."""
    from compress.exporters.gate_outputs import error_command, workflow_commands
    from compress.verbs.gate import lines, on_github, parse_shapes, run

    try:
        record = run(
            baseline,
            candidate,
            budget or [],
            file=gate_file,
            self_test=self_test,
            strict=strict,
            pinned=pinned,
            out=out,
            summary=summary,
            threads=threads,
            samples=samples,
            batch=batch,
            prompt=prompt,
            context=context,
            shapes=parse_shapes(shape or []),
            inputs=inputs,
        )
    except CompressError as e:
        if on_github():
            print(error_command(e), file=sys.stderr)
        raise
    show(record, json_, lines)
    if on_github() and not self_test:
        print("\n".join(workflow_commands(record)), file=sys.stderr if json_ else sys.stdout)
    if record["exit_code"]:
        raise typer.Exit(record["exit_code"])


@app.command(epilog="Examples:  compress card runs/demo --out card   |   compress card runs/demo --push me/my-model")
def card(
    run: Annotated[Path, typer.Argument(help="a finished run folder, or a folder with report.json")],
    out: Annotated[Path | None, typer.Option(help="the folder to write to  [default: RUN-card]")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="uploads the release (model, card, report) instead")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="a new repository is for all to see")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="what else the repository holds is deleted")] = False,
    network: Network = None,
    json_: Json = False,
) -> None:
    """Writes the model card, its plots and the HTML report from report.json; or uploads the release with them.

    A release is uploaded as it was sealed, once it is verified. A new repository is private unless --public is given.
    """
    from compress.verbs.common import card as write
    from compress.verbs.common import push as upload

    if push is not None:
        if out is not None:
            from compress.errors import UsageError

            raise UsageError("--out and --push do not go together", where="card", fix="the release is what is uploaded")
        show(
            upload(run, push, public=public, replace=replace, network=network),
            json_,
            lambda f: [
                f"there already, the same release: {f['url']}"
                if f["unchanged"]
                else f"uploaded {f['files']} files ({f['bytes'] / 1e6:,.1f} MB) to {f['url']}"
                f" ({'private' if f['private'] else 'public'}), commit {f['commit'][:12]}"
            ],
        )
        return
    if public or replace:
        from compress.errors import UsageError

        raise UsageError("--public and --replace are for an upload", where="card", fix="name it: --push ORG/NAME")
    show(write(run, out), json_, lambda f: [f"card     {f['card']}"])


@app.command(epilog="Example:  compress report runs/demo --out report.html")
def report(
    run: Annotated[Path, typer.Argument(help="a finished run folder, or a folder with report.json")],
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("report.html"),
    json_: Json = False,
) -> None:
    """Writes the report of a run as one HTML file with plots that can be asked; it needs no server."""
    from compress.verbs.common import report_page

    show(report_page(run, out), json_, lambda f: [f"report   {f['html']}"])


@app.command(epilog="Examples:  compress verify runs/demo --measure   |   compress verify org/name")
def verify(
    model: Annotated[str, typer.Argument(help="a run folder, a release or model folder, or a hub id")],
    measure: Annotated[bool, typer.Option("--measure", help="measures quality and latency again")] = False,
    like: Annotated[Path | None, typer.Option(help="a run folder: the text or the data it held out")] = None,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the dense model, or its export  [default: where the report says]"),
    ] = None,
    network: Network = None,
    json_: Json = False,
) -> None:
    """Checks a model against its own report: hashes, a clean reload, its exports, and what is measured again."""
    from compress.claims.verify import lines, refuse_failed
    from compress.claims.verify import verify as run

    facts = run(model, network, measure=measure, like=like, dense=dense)
    show(facts, json_, lines)
    refuse_failed(facts)


@app.command("list", epilog="Example:  compress list models")
def list_(
    what: Annotated[str | None, typer.Argument(help="recipes, models or targets; all by default")] = None,
    json_: Json = False,
) -> None:
    """Lists recipes, models and targets."""
    from compress.verbs.common import listing

    show(
        listing(what),
        json_,
        lambda f: [line for kind, rows in f.items() for line in (kind, *(f"  {n:16} {t}" for n, t in rows.items()))],
    )


@app.command(epilog="Examples:  compress doctor   |   compress doctor --target pixel-8")
def doctor(target: TargetName = None, json_: Json = False) -> None:
    """Says which parts are installed here, and what to do about those that are not; or how a target is."""
    if target is None:
        from compress.run.doctor import examine

        rows = examine()
    else:
        from compress.exporters.on_target import doctor as examine_target

        rows = examine_target(target)
    show(
        {"parts": rows},
        json_,
        lambda f: [f"{r['state']:8} {r['part']:17} {r['detail']:28} {r['for']}" for r in f["parts"]],
    )
    if any(r["state"] in ("missing", "wrong") for r in rows):
        raise typer.Exit(1)


def _trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of the program, as Python shows it; what its message quotes is no command for a CI."""
    print(terminal_lines("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr)


class Stopped(BaseException):
    """Ctrl-C. Not KeyboardInterrupt: typer would turn that into an exit code of its own."""


_stopping = False


def _stop(number: int, frame: object) -> None:
    global _stopping
    _stopping = True
    raise Stopped


def _swallowed(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a finalizer or a callback: a Ctrl-C that fell into one comes again outside it."""
    if unraisable.exc_type is Stopped:
        threading.Timer(0.05, _stop_again).start()
    else:
        sys.__unraisablehook__(unraisable)


def _stop_again() -> None:
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # ends what the main thread waits for, too
    else:
        _thread.interrupt_main()


@contextlib.contextmanager
def _as_it_was_meant() -> Iterator[None]:
    """Compiled code that calls Python may turn a Ctrl-C that falls into it into an error of its own."""
    try:
        yield
    except Exception as e:
        if _stopping:
            raise Stopped from e
        raise


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """A GPU whose memory does not suffice is no fault of the program."""
    try:
        yield
    except RuntimeError as e:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(e, torch.OutOfMemoryError):
            raise
        asked = re.search(r"Tried to allocate ([\d.]+ [KMG]iB)", str(e))
        raise CompressError(
            f"the GPU's memory does not suffice{f': {asked[1]} more were asked for' if asked else ''}",
            where=f"a GPU with {torch.cuda.mem_get_info()[1] / 1e9:.0f} GB" if torch.cuda.is_available() else "the GPU",
            fix="see `compress plan --on this-machine`; --set memory.stream=true holds one block at a time",
        ) from e


@contextlib.contextmanager
def _name_errors() -> Iterator[None]:
    """A name that no file can have, wherever it was looked for."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ) or e.filename is None:
            raise
        raise CompressError(
            f"there can be no file of that name: {os.strerror(e.errno)}", where=str(e.filename), fix="check the name"
        ) from e


def main() -> None:
    """Runs the command line; every error a user can act on is one message and an exit code."""
    from compress.processes import distributed

    distributed.leave_no_gaps()
    threads.wait_passively()
    global _stopping
    _stopping = False
    sys.excepthook = _trace
    sys.unraisablehook = _swallowed
    try:
        signal.signal(signal.SIGINT, _stop)
        with _memory_errors(), _name_errors(), _as_it_was_meant():
            app()
    except CompressError as e:
        if distributed.report(e, e.exit_code, _debug):
            sys.exit(e.exit_code)
        if _debug:
            raise
        who = f"rank {distributed.rank()}: " if distributed.rank() else ""
        print(f"error: {who}{e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except Stopped:
        if distributed.is_main():
            goes_on = "; the same command goes on behind the last whole stage" if _verb in GO_ON else ""
            print(f"\nstopped{goes_on}", file=sys.stderr)
        sys.exit(130)
    except distributed.Aborted:
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as e:
        if distributed.report(e, 1):
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
