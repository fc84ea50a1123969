"""The figures of a report measured again: quality and latency, of the pruned model and of the dense one.

All that is needed is named in the report, and known by its hash: where the dense model was, the held-out text or data,
and the shapes that latency was measured at.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from compress.claims.dense import Dense, find_dense
from compress.claims.verify import FAILS, HOLDS, OPEN, OTHER, REPORT, Claim, Subject, Verdict, made_with
from compress.errors import CompressError
from compress.report.rows import Row, Side, qualities, rows
from compress.report.stats import FEWEST, finding
from compress.run.cache import sha256_of
from compress.run.seals import VERSION, inside, verify_seal

SAME_PERPLEXITY = 1e-3  # relative; other hardware sums in another order
SAME_QUANTISED = 1e-2  # and where activations are rounded to 8 bits as well, as another processor's code does it


def measured(subject: Subject, like: Path | None, named: str | None) -> list[Claim]:
    """Every figure again, as claims.

    Args:
        like: a run folder whose held-out text or data is taken.
        named: the dense model, or an export of it, in place of where the report says.

    Raises:
        UsageError: ``named`` is nothing of the kind.
    """
    dense = find_dense(subject, named)
    assert subject.report is not None
    if "data" in subject.report:
        return [*dense.claims, *_network_quality(subject, like, dense), *_latency(subject, dense)]
    held = _held_out(subject, like)
    quality = _text_quality(subject, held, dense)
    return [*dense.claims, *quality, *_quantised(subject, held), *_latency(subject, dense)]


def _held_out(subject: Subject, like: Path | None) -> dict[str, Any]:
    """By text, its windows and how many tokens begin each, or why there are none."""
    from compress.models.reading import load_tokenizer

    report = subject.report
    assert report is not None
    tokenizer = load_tokenizer(subject.release)
    found: dict[str, Any] = {}
    for text in report["quality"]["texts"]:
        try:
            found[text["name"]] = _windows(subject, report, text, tokenizer, like)
        except CompressError as e:
            found[text["name"]] = f"the text is not here: {e.what} ({e.where})"
    return found


def _quantised(subject: Subject, held: Mapping[str, Any]) -> list[Claim]:
    """Perplexity of the files at fewer bits again, each in its own runtime: of those in the run folder."""
    from compress.language.quantised import perplexity
    from compress.report.quantised import files, name_of

    assert subject.report is not None
    claims: list[Claim] = []
    for file in files(subject.report):
        folder = subject.folder / f"quantised-{name_of(file)}" / file["side"]
        for text, here in held.items():
            title, said = f"perplexity, {text}, {file['side']} {name_of(file)}", file["texts"][text]["ppl"]
            if not folder.is_dir():
                here = f"the file is measured in the run folder ({folder})"

            def measure(folder: Path = folder, form: str = file["format"], here: Any = here) -> float:
                packed, begin = here
                return float(perplexity(folder, form, packed.ids, begin, packed.scored, 1)["ppl"])

            claims.append(_again(title, said, here, measure, SAME_QUANTISED))
    return claims


def _text_quality(subject: Subject, held: Mapping[str, Any], dense: Dense) -> list[Claim]:
    """Perplexity again, on the same held-out windows."""
    report = subject.report
    assert report is not None
    found = qualities(rows(report))
    own = {row.task: row for row in found if row.unit == "perplexity" and row.task}
    texts = [(own[name], here) for name, here in held.items()]
    claims = _perplexities(subject.release, texts, "pruned")
    if dense.folder is not None:
        claims += _perplexities(dense.folder, texts, "dense")
    else:
        claims += [Claim(f"{row.name}, dense", f"{row.dense:.3f}", "", OPEN, dense.why) for row, _ in texts]
    for row in (r for r in found if r.unit == "score"):
        sides: tuple[tuple[Side, Path | None], ...] = (("pruned", subject.release), ("dense", dense.folder))
        for label, folder in sides:
            by = f"`compress eval {folder} --like RUN --task {row.task}` measures it" if folder else dense.why
            title = row.name + (", dense" if label == "dense" else "")
            claims.append(Claim(title, row.value(label), "", OPEN, by))
    return claims


def _perplexities(folder: Path, texts: list[tuple[Row, Any]], label: Side) -> list[Claim]:
    """The claims about the perplexity of the model in ``folder``; it is read where one can be checked."""
    from compress.language.evaluate import perplexity

    model = cache(lambda: _model(folder))
    claims = []
    for row, here in texts:
        title = row.name + (", dense" if label == "dense" else "")

        def measure(title: str = title, here: Any = here) -> float:
            packed, begin = here
            return float(perplexity(model(), packed.ids, title, begin, packed.scored)["ppl"])

        claims.append(_again(title, getattr(row, label), here, measure, SAME_PERPLEXITY))
    return claims


def _again(title: str, said: float, here: Any, measure: Callable[[], float], same: float) -> Claim:
    """A perplexity's claim: open where ``here`` says why there are no windows, or where it cannot be measured.

    Args:
        same: how far it may be off, relative.
    """
    if isinstance(here, str):
        return Claim(title, f"{said:.3f}", "", OPEN, here)
    try:
        found = measure()
    except CompressError as e:
        return Claim(title, f"{said:.3f}", "", OPEN, f"{e.what} ({e.where})")
    if abs(found / said - 1) <= same:
        return Claim(title, f"{said:.3f}", f"{found:.3f}", HOLDS)
    return Claim(title, f"{said:.3f}", f"{found:.3f}", FAILS, f"off by more than {same:.1%}")


def _model(folder: Path) -> Any:
    """A language model in float32, held, or streamed where it would take too much of the memory that is free."""
    from compress.models.families import family_for
    from compress.models.reading import check_weights, load_config, load_model
    from compress.models.streaming import stream_model
    from compress.processes.distributed import device

    family = family_for(load_config(folder))
    check_weights(folder)
    return stream_model(folder, family, 2, device()) if too_large(folder) else load_model(folder, family)


def too_large(folder: Path) -> bool:
    """Whether a language model in float32 takes more of the free memory than `Setup.load` would let it."""
    from compress.language.setup import RESIDENT_SHARE
    from compress.models.reading import load_config, weight_files
    from compress.processes.distributed import available_bytes

    stored = getattr(load_config(folder).dtype, "itemsize", 4)
    size = sum(path.stat().st_size for path in weight_files(folder)) * 4 / stored
    return bool(size > RESIDENT_SHARE * available_bytes())


def _windows(
    subject: Subject, report: Mapping[str, Any], text: Mapping[str, Any], tokenizer: Any, like: Path | None
) -> tuple[Any, int]:
    """The held-out windows of one text, and how many tokens begin each: those of a run, or read again from where the
    recipe has them.

    Raises:
        CompressError: they are not here, or others are.
    """
    from compress.data.special import opening
    from compress.data.text import Packed, evaluation_windows, kept_windows
    from compress.language.stages import text_hash
    from compress.schema.recipe import SourceSpec

    texts = report["recipe"]["evaluation"]["texts"]
    number = next((i for i, t in enumerate(texts) if t["name"] == text["name"]), None)
    if number is None or "sha256" not in text:
        raise CompressError("the report holds no source or no hash of it", where=REPORT)
    kept = (like or subject.folder) / "text" / "windows.safetensors"
    if like is not None and not kept.exists():
        raise CompressError("this is not a run folder with text in it", where=str(like))
    if kept.exists():
        verify_seal(kept.parent, version=VERSION if like is not None else made_with(report))
        windows, begin = kept_windows(kept)
        ids, where = windows.get(f"evaluation.{number}"), str(kept)
        if ids is None:
            raise CompressError("the run holds no such text", where=where)
        packed = Packed(ids, windows.get(f"scored.{number}"))
    else:
        source = SourceSpec.model_validate(texts[number]["source"])
        packed, begin = evaluation_windows(source, tokenizer, text["windows"], text["length"]), opening(tokenizer)
        where = f"source {source.title}"
    found = text_hash(packed.ids)
    if found != text["sha256"]:
        raise CompressError(
            f"what is here is not the one it was measured on: sha256 {text['sha256'][:12]} in the report,"
            f" {found[:12]} here",
            where=where,
        )
    return packed, len(begin)


def _network_quality(subject: Subject, like: Path | None, dense: Dense) -> list[Claim]:
    """The metrics of every task again, on the same held-out samples."""
    from compress.data.images import load
    from compress.networks.run_data import run_data
    from compress.schema.sections import DataSpec

    report = subject.report
    assert report is not None
    if "job" in report["data"]:
        return _job_quality(subject, dense)
    try:
        data = run_data(like) if like is not None else load(DataSpec.model_validate(report["recipe"]["data"]))
        if data.sha256 != report["data"]["sha256"]:
            raise CompressError(
                f"what is here is not what it was measured on: sha256 {report['data']['sha256'][:12]} in the report,"
                f" {data.sha256[:12]} here"
            )
        missing = ""
    except (CompressError, ValueError) as e:
        why = e.what if isinstance(e, CompressError) else "the report does not say which"
        missing = f"the data is not here: {why}"
    claims = []
    sides: tuple[tuple[Side, Path | None, str], ...] = (
        ("pruned", subject.release, ""),
        ("dense", dense.folder, dense.why),
    )
    for label, folder, lacking in sides:
        why = missing or lacking
        found = _metrics(folder, subject.network, data) if not why and folder is not None else None
        claims += [_metric(row, label, found, why) for row in qualities(rows(report))]
    return claims


def _job_quality(subject: Subject, dense: Dense) -> list[Claim]:
    """What the job's ``evaluate`` says again, where the job is named and its files are those of the run."""
    from compress.networks.jobs import asked, job_named
    from compress.networks.reload import reload
    from compress.processes.distributed import device

    report = subject.report
    assert report is not None
    claims = []
    sides: tuple[tuple[Side, Path | None, str], ...] = (
        ("pruned", subject.release, ""),
        ("dense", dense.folder, dense.why),
    )
    for label, folder, why in sides:
        found: dict[str, Any] | None = None
        if not why and folder is not None:
            try:
                seed = report["recipe"].get("seed", 0)
                held = job_named(subject.network)
                if held.sha256 != report["data"]["sha256"]:
                    why = "the files of the job have changed since it was measured"
                else:
                    found = asked(held, reload(folder, subject.network).model.to(device()), seed)
            except CompressError as e:
                why = f"{e.what} ({e.fix})"
        claims += [_metric(row, label, found, why) for row in qualities(rows(report))]
    return claims


def _metrics(folder: Path, network: str | None, data: Any) -> dict[str, dict[str, float]]:
    """The figures of the network in ``folder`` on the test split, its inputs normalised as it was trained."""
    import torch

    from compress.networks import train
    from compress.networks.reload import reload
    from compress.processes.distributed import device

    saved = reload(folder, network)
    data = replace(data, mean=torch.tensor(saved.facts["mean"]), std=torch.tensor(saved.facts["std"]))
    return train.evaluate(saved.model.to(device()), data, data.test)


def _metric(row: Row, label: Side, found: Mapping[str, Any] | None, why: str) -> Claim:
    title, said = row.name + (", dense" if label == "dense" else ""), row.dense if label == "dense" else row.pruned
    assert said is not None  # of a network both are
    if found is None:
        return Claim(title, f"{said:.4f}", "", OPEN, why)
    value, samples = found[row.task][row.metric], found[row.task].get("samples")
    # Another order of sums turns a sample or two that stand on the edge; of a job their number is not known.
    allowed = max(2 / samples if samples else 0.0, 1e-3 * max(1.0, abs(said)))
    same = abs(value - said) <= allowed
    reason = "" if same else f"off by more than {allowed:.4f}"
    return Claim(title, f"{said:.4f}", f"{value:.4f}", HOLDS if same else FAILS, reason)


def _latency(subject: Subject, dense: Dense) -> list[Claim]:
    """The ratio of latencies again, by its interval: times of two machines never compare."""
    from compress.report.rows import figure_name, figures

    report = subject.report
    assert report is not None
    claims = []
    for name, record in (report.get("targets") or {}).items():
        for key in figures(record) if isinstance(record, Mapping) else ():
            title = f"{figure_name(key, record['spec'])} on {name}"
            why = f"it was measured on the target {name}; `compress bench --target {name}` measures there"
            claims.append(Claim(title, interval(record["ratios"][key]), "", OPEN, why))
    bench = report.get("bench")
    if not bench:
        return claims
    records = {"onnx": bench} | {k: v for k, v in bench.items() if isinstance(v, Mapping) and figures(v)}
    for form, record in records.items():
        names = {key: f"{figure_name(key, record['spec'])}, {form}" for key in figures(record)}
        try:
            with _dense_export(subject, dense, form, record) as beside:
                if isinstance(beside, Claim):
                    claims.append(beside)
                    raise CompressError("the export of the dense model that is here is another", where=beside.found)
                spec = {**record["spec"], "processes": max(FEWEST, record["spec"]["processes"])}
                found = _measure(subject, form, beside, spec)
        except CompressError as e:
            why = f"{e.what} ({e.where})" if e.where else e.what
            claims += [Claim(t, interval(record["ratios"][k]), "", OPEN, why) for k, t in names.items()]
            continue
        cpus = _cpus(report)
        for key, title in names.items():
            said, now = record["ratios"][key], found["ratios"][key]
            verdict, reason = judge(said, now, record["spec"]["processes"])
            claims.append(Claim(title, interval(said), interval(now), verdict, "; ".join(filter(None, (reason, cpus)))))
    return claims


@contextmanager
def _dense_export(subject: Subject, dense: Dense, form: str, record: Mapping[str, Any]) -> Iterator[Path | Claim]:
    """The dense model's export: that of the run or the one named, or one that is made here of the dense model; or the
    claim that it is another than was measured.

    Raises:
        CompressError: there is none, and none can be made.
    """
    beside = dense.export or subject.folder / "export-dense"
    if beside.is_dir():
        said = record["dense"].get("files")
        if not said:
            raise CompressError("the report holds no hash of the dense model's export", where=REPORT)
        found = {n: sha256_of(beside / n) for n in said if inside(n) and (beside / n).is_file()}
        name = next((n for n in said if found.get(n) != said[n]), None)
        if name is None:
            yield beside
        else:
            reason = f"{name} in {beside} is not the one that was measured"
            shown = f"sha256 {found[name][:12]}" if name in found else "missing"
            yield Claim(f"the dense model's export, {form}", f"sha256 {said[name][:12]}", shown, OTHER, reason)
        return
    if dense.folder is None:
        raise CompressError(f"the dense model's export is not here, and none can be made: {dense.why}")
    with tempfile.TemporaryDirectory() as place:
        _export(subject, dense.folder, form, Path(place))
        yield Path(place)


def _export(subject: Subject, folder: Path, form: str, out: Path) -> None:
    """The dense model in ``folder`` exported as the report's recipe says, and checked against torch."""
    report = subject.report
    assert report is not None
    if "data" in report:
        from compress.exporters.onnx_module import write_checked_module
        from compress.networks.reload import reload
        from compress.schema.sections import NetworkExport

        saved = reload(folder, subject.network)
        names = [task["name"] for task in saved.facts["tasks"]]
        tolerance = NetworkExport.model_validate(report["recipe"]["export"]).tolerance
        write_checked_module(saved.model, saved.inputs, names, out, tolerance)
        if form == "mnn":
            from compress.exporters.mnn import require_mnn, write_checked_mnn

            require_mnn()
            write_checked_mnn(saved.model, saved.inputs, names, out, tolerance)
        return

    from compress.exporters.check import write_checked
    from compress.models.families import family_for
    from compress.models.reading import load_config, load_model, load_tokenizer
    from compress.schema.recipe import ExportSection

    if too_large(folder):
        raise CompressError(
            "the dense model is too large to be exported in this memory; name its export with --dense",
            where=str(folder),
        )
    family = family_for(load_config(folder))
    model = load_model(folder, family)
    spec = ExportSection.model_validate(report["recipe"]["export"])
    vocab = family.geometry(model.config).vocab
    write_checked(model, load_tokenizer(folder), out, spec, vocab)


def _measure(subject: Subject, form: str, dense: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    pruned = subject.folder / "export-pruned"
    if not pruned.is_dir():
        pruned = subject.release / form
    if (subject.release / "network.json").exists():
        from compress.exporters.bench.local import compare_modules
        from compress.exporters.names import FILE

        if form == "mnn":
            from compress.exporters.mnn import FILE as MNN_FILE

            if not (pruned / FILE).exists():
                raise CompressError("MNN is measured beside the ONNX file", where=str(pruned))
            return compare_modules(dense, pruned, dict(spec), MNN_FILE)
        return compare_modules(dense, pruned, dict(spec), FILE)
    from compress.exporters.bench.local import compare_llm
    from compress.models.families import family_for
    from compress.models.reading import load_config

    config = load_config(subject.release)
    return compare_llm(dense, pruned, dict(spec), family_for(config).geometry(config).vocab)


def judge(said: Mapping[str, float], found: Mapping[str, float], processes: int) -> tuple[Verdict, str]:
    """Whether a measured ratio (dense / pruned, more is faster) bears out the one in the report, by their intervals.

    Args:
        processes: of a model, in the measurement that had fewer. Two sets of five from one distribution lie apart, this
            way round, once in 252 times; of two, once in 6.
    """
    if found["high"] < said["low"]:
        if processes < FEWEST:
            return OPEN, f"slower, but {processes} processes are too few for an interval ({FEWEST} are needed)"
        return FAILS, "slower here than the report's interval allows"
    if found["low"] > said["high"]:
        return HOLDS, "faster here than the report says"
    return HOLDS, ""


def interval(ratio: Mapping[str, float]) -> str:
    return finding(ratio).words


def _cpus(report: Mapping[str, Any]) -> str:
    """Says so where the report's machine is another."""
    from compress.run.doctor import environment

    here, there = environment()["cpu"], report["environment"]["cpu"]
    return "" if here == there else f"measured on {here}, the report's on {there}"
