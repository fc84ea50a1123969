"""Quantisation as a stage: both models at every precision, measured in their own runtimes, sealed and resumed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compress.language.evaluate import perplexity
from compress.report.build import read_report
from compress.report.quantised import best
from compress.report.rows import rows
from tests.command import Job, compress, one_error
from tests.recipes.global_mp.test_llm import RECIPE as SPARSE
from tests.tiny import tiny_job

pytestmark = [
    pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp"),
    pytest.mark.processes,
    pytest.mark.usefixtures("done_once"),
]
BRIEF = "bench={prompt: 8, context: 8, processes: 1, threads: 1, min_seconds: 0.01, min_runs: 2}"


def words(job: Job, out: Path) -> tuple[object, ...]:
    more = (
        "layouts=[per-layer]",
        "evaluation.curve=[]",
        "tyr.iterations=1",
        "quantise={gguf: [f16], rivals: [q4_0]}",
        BRIEF,
    )
    return "prune", job.model, "--recipe", job.recipe, "--out", out, *(w for one in more for w in ("--set", one))


@pytest.fixture(scope="module")
def run(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "run"
    ran = compress(*words(job, folder))
    assert ran.code == 0, ran.err
    return folder


@pytest.fixture(scope="module")
def report(run: Path) -> dict[str, Any]:
    return read_report(run)


def test_both_models_stand_at_every_precision_and_a_rival_is_dense_alone(report: dict[str, Any]) -> None:
    found = {(row["side"], row["precision"]) for row in report["quantised"]["files"]}
    assert found == {("dense", "f16"), ("pruned", "f16"), ("dense", "q4_0")}
    beside = {name: record["pruned_is"] for name, record in report["quantised"]["bench"].items()}
    assert beside == {"gguf-f16": "gguf-f16", "gguf-q4_0": "gguf-f16"}
    shown = {(row.where, row.name) for row in rows(report) if row.where}
    assert ("gguf-f16", "perplexity, geometric mean") in shown and ("gguf-f16", "file") in shown


def test_float16_in_llama_cpp_has_the_perplexity_of_torch_on_the_same_windows(
    run: Path, report: dict[str, Any]
) -> None:
    windows = load_file(run / "text" / "windows.safetensors")
    row = next(r for r in report["quantised"]["files"] if (r["side"], r["precision"]) == ("pruned", "f16"))
    model = AutoModelForCausalLM.from_pretrained(run / "model", trust_remote_code=True, dtype=torch.float32)
    for i, text in enumerate(report["quality"]["texts"]):
        want = perplexity(model, windows[f"evaluation.{i}"])
        assert row["texts"][text["name"]]["tokens"] == want["tokens"]
        assert row["texts"][text["name"]]["ppl"] == pytest.approx(want["ppl"], rel=2e-3)


def test_the_release_holds_the_pruned_files_and_the_card_their_table(run: Path, report: dict[str, Any]) -> None:
    held = sorted(path.name for path in (run / "release").glob("*.gguf"))
    assert len(held) == 1 and held[0].endswith("-pruned-F16.gguf")
    card = (run / "release" / "README.md").read_text("utf-8")
    table = [line for line in card.splitlines() if line.startswith(("| dense, gguf", "| pruned, gguf"))]
    assert len(table) == 3 and any("**bytes" in line for line in table)
    assert "- gguf" in card.split("\n---\n")[0]
    assert compress("verify", run).code == 0


def test_the_same_command_again_measures_nothing(job: Job, run: Path, report: dict[str, Any]) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("seal.json")}
    ran = compress(*words(job, run), "--json")
    assert ran.code == 0 and json.loads(ran.out)["quantised"] == report["quantised"]
    assert {p: p.stat().st_mtime_ns for p in run.rglob("seal.json")} == before


def test_verify_measures_every_file_again(run: Path, report: dict[str, Any]) -> None:
    ran = compress("verify", run, "--measure", "--json")
    claims = [c for c in json.loads(ran.out)["claims"] if c["claim"].endswith(("gguf-f16", "gguf-q4_0"))]
    assert {c["verdict"] for c in claims if c["claim"].startswith("perplexity")} == {"holds"}
    assert sum(c["claim"].startswith("perplexity") for c in claims) == 3 * len(report["quality"]["texts"])


def test_a_damaged_file_is_found(run: Path, report: dict[str, Any]) -> None:
    path = next((run / "quantised-gguf-q4_0" / "dense").glob("*.gguf"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert "does not hold" in compress("verify", run).out + compress("verify", run).err
    finally:
        path.write_bytes(whole)


def test_a_row_is_best_where_no_other_is_as_good_for_less() -> None:
    table = [
        {"perplexity": 10.0, "bytes": 100},
        {"perplexity": 12.0, "bytes": 50},
        {"perplexity": 12.0, "bytes": 60},
        {"perplexity": 13.0, "bytes": 55},
        {"perplexity": 10.0, "bytes": 100},
    ]
    # By hand: 12 at 50 beats the third and the fourth; two that are alike are both best.
    assert best(table, "bytes") == [True, True, False, False, True]
    assert best(table, "tpot") == [False] * 5


def test_what_llama_cpp_cannot_hold_and_widths_that_do_not_fit_are_said_by_plan(job: Job, tmp_path: Path) -> None:
    asked = ("--set", "quantise={gguf: [q8_0, q4_k_m]}", "--set", "layouts=[per-layer]", "--set", "tyr.round_to=32")
    model, recipe = tiny_job(tmp_path / "gemma", "gemma3_text")
    one_error(compress("plan", model, "-r", recipe, *asked), 1, "llama.cpp cannot hold this model", "quantise.gguf")
    ran = compress("plan", job.model, "-r", job.recipe, *asked)
    assert ran.code == 0, ran.err
    assert "gguf q4_k_m: FFN widths in steps of 32 are not all in blocks of 256" in ran.err
    assert "round_to: 256 avoids it" in ran.err and "q8_0" not in ran.err


@pytest.mark.slow
def test_global_mp_has_the_stage_too(job: Job, tmp_path: Path) -> None:
    recipe = tmp_path / "sparse.yaml"
    recipe.write_text(SPARSE.replace("FOLDER", str(job.folder)))
    given = ("--set", "quantise={gguf: [f16, q8_0]}", "--set", BRIEF, "--set", "evaluation.curve=[]")
    ran = compress("prune", job.model, "--recipe", recipe, "--out", tmp_path / "run", *given)
    assert ran.code == 0, ran.err
    report = read_report(tmp_path / "run")
    assert len(report["quantised"]["files"]) == 4 and len(list((tmp_path / "run" / "release").glob("*.gguf"))) == 2
    for row in report["quantised"]["files"]:
        for text in report["quality"]["texts"]:
            near = 2e-3 if row["precision"] == "f16" else 2e-2
            assert row["texts"][text["name"]]["ppl"] == pytest.approx(text[f"{row['side']}_ppl"], rel=near)
    assert compress("verify", tmp_path / "run").code == 0


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("onnxruntime_genai"), reason="needs onnxruntime-genai")
def test_genai_at_fewer_bits_is_measured_in_its_own_runtime(job: Job, tmp_path: Path) -> None:
    more = ("layouts=[per-layer]", "evaluation.curve=[]", "tyr.iterations=1", "quantise={genai: [fp16, int8]}", BRIEF)
    given = (w for one in more for w in ("--set", one))
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", *given)
    assert ran.code == 0, ran.err
    report = read_report(tmp_path / "run")
    for row in report["quantised"]["files"]:
        for text in report["quality"]["texts"]:
            own = row["texts"][text["name"]]["ppl"]
            assert own == pytest.approx(text[f"{row['side']}_ppl"], rel=5e-3 if row["precision"] == "fp16" else 5e-2)
    assert (tmp_path / "run" / "release" / "genai-int8" / "genai_config.json").is_file()
    ran = compress("verify", tmp_path / "run", "--measure", "--json")
    claims = [c for c in json.loads(ran.out)["claims"] if c["claim"].endswith(("genai-fp16", "genai-int8"))]
    assert claims and {c["verdict"] for c in claims if c["claim"].startswith("perplexity")} == {"holds"}


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ("{}", "no precision is named"),
        ("{gguf: [q4_0], rivals: [q4_0]}", "q4_0 is named twice"),
        ("{gguf: [q9_9]}", "q9_9"),
    ],
)
def test_a_wrong_section_is_refused_before_anything_starts(job: Job, tmp_path: Path, said: str, what: str) -> None:
    ran = compress("prune", job.model, "--recipe", job.recipe, "--out", tmp_path / "run", "--set", f"quantise={said}")
    assert what in ran.err
    one_error(ran, 2)
    assert not (tmp_path / "run").exists()
