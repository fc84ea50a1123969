"""`compress verify`: what was changed is named, nothing of a changed folder is loaded, every claim has its verdict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.claims.remeasure import judge
from compress.claims.verify import FAILS, HOLDS, OPEN, OTHER
from compress.report.build import finish
from tests.command import Job, Ran, compress, one_error
from tests.tiny import saved_tiny

pytestmark = pytest.mark.usefixtures("done_once")


@pytest.fixture
def release(finished: Path, tmp_path: Path) -> Path:
    """A copy of the release, as somebody would have it who was given the folder."""
    return Path(shutil.copytree(finished / "release", tmp_path / "release"))


def claims(ran: Ran) -> dict[str, dict[str, Any]]:
    return {c["claim"]: c for c in json.loads(ran.out)["claims"]}


def failed(folder: Path, *words: object) -> dict[str, dict[str, Any]]:
    """The claims that do not hold; the command must say so in one message and its exit code."""
    ran = compress("verify", folder, "--json", *words)
    found = {k: c for k, c in claims(ran).items() if c["verdict"] == FAILS}
    assert ran.code == 1 and found, ran.err
    last = ran.err[ran.err.index("error: ") :]
    assert last.count("\n") == 3 and "not hold" in last and "Traceback" not in ran.err
    return found


def change_report(folder: Path, change: Callable[[dict[str, Any]], object], stamp: bool) -> None:
    """Edits report.json; with ``stamp`` its own hash is made to fit, as a careful forger would."""
    path = folder / "report.json"
    report = json.loads(path.read_text())
    change(report)
    if stamp:
        finish(report)
    path.write_text(json.dumps(report, indent=1) + "\n")


def without_times(report: dict[str, Any]) -> None:
    """What is not about latency need not make an export for it."""
    del report["bench"]


def claim_better(report: dict[str, Any]) -> None:
    report["quality"]["texts"][0]["pruned_ppl"] *= 0.9


def test_a_whole_release_holds_and_what_needs_more_is_said(release: Path, finished: Path) -> None:
    ran = compress("verify", release, "--json")
    assert ran.code == 0, ran.err
    found = claims(ran)
    assert {c["verdict"] for c in found.values()} == {HOLDS}
    assert set(found) == {
        "files named in seals",
        "report.json",
        "files of the model",
        "results in README.md",
        "fingerprint of the outputs",
        "the model loads in a clean process",
        "parameters",
        "onnx gives what torch gives",
    }
    report = json.loads((release / "report.json").read_text())
    assert set(report["files"]) >= {"model.safetensors", "config.json", "onnx/weights.data", "fingerprint.safetensors"}
    assert found["files of the model"]["said"] == f"{len(report['files'])} files"


def test_a_report_edited_by_hand_is_named_with_both_hashes(release: Path) -> None:
    stamp = json.loads((release / "report.json").read_text())["sha256"]
    change_report(release, claim_better, stamp=False)
    bad = failed(release)
    assert set(bad) == {"report.json", "report.json, sealed"}
    assert bad["report.json"]["said"] == f"sha256 {stamp[:12]}" != bad["report.json"]["found"]
    (release / "seal.json").unlink()
    assert "changed since it was written" in failed(release)["report.json"]["reason"]
    one_error(compress("card", release), 1, "changed since it was written", stamp[:16])


def test_a_report_whose_own_hash_was_made_to_fit_is_named_by_the_seal_and_the_card(release: Path) -> None:
    change_report(release, claim_better, stamp=True)
    bad = failed(release)
    assert "by seal.json" in bad["report.json, sealed"]["reason"] and "report.json" not in bad
    assert "does not say what the report does" in bad["README.md: perplexity, first text (held out)"]["reason"]


def test_a_claim_that_was_made_up_does_not_survive_measuring(release: Path) -> None:
    """Hashes cannot tell who wrote a report: a forger who makes all of them fit is found by measuring again."""
    from compress.recipes.tyr.card import write_card

    change_report(release, without_times, stamp=True)
    change_report(release, claim_better, stamp=True)
    (release / "seal.json").unlink()
    write_card(json.loads((release / "report.json").read_text()), release)
    assert set(failed(release, "--measure")) == {"perplexity, first text"}, "every hash fits"


def test_one_changed_byte_of_the_weights_is_named_and_nothing_is_loaded(release: Path) -> None:
    (release / "seal.json").unlink()
    path = release / "onnx" / "weights.data"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()  # it may be a link into another folder
    path.write_bytes(data)
    bad = failed(release)
    assert set(bad) == {"onnx/weights.data"} and bad["onnx/weights.data"]["said"].startswith("sha256 ")
    opened = claims(compress("verify", release, "--json"))["loads in a clean process"]
    assert opened["verdict"] == OPEN and "changed" in opened["reason"]


def test_a_missing_file_and_one_too_many_that_could_run_are_named(release: Path, tmp_path: Path) -> None:
    (release / "seal.json").unlink()
    (release / "generation_config.json").unlink()
    (release / "helper.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (release / "LICENSE").write_text("as you like")
    bad = failed(release)
    assert set(bad) == {"generation_config.json", "helper.py"}
    assert bad["generation_config.json"]["found"] == "missing"
    assert not (tmp_path / "ran").exists()


def test_a_report_that_names_a_file_outside_its_folder_is_refused(release: Path) -> None:
    (release / "seal.json").unlink()
    change_report(release, lambda r: r["files"].update({"../x": {"bytes": 1, "sha256": "0"}}), stamp=True)
    assert "outside its folder" in failed(release)["../x"]["reason"]


def test_code_of_another_repository_is_not_run(release: Path) -> None:
    for name in ("seal.json", "report.json"):
        (release / name).unlink()
    config = json.loads((release / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil/repo--modeling_compress.Class"}
    (release / "config.json").unlink()
    (release / "config.json").write_text(json.dumps(config))
    one_error(compress("verify", release), 1, "evil/repo--modeling_compress.Class", "was not run")


def test_other_outputs_in_the_report_than_in_the_fingerprint_are_named(release: Path) -> None:
    (release / "seal.json").unlink()

    def other(report: dict[str, Any]) -> None:
        report["fingerprint"]["outputs"]["logits"]["values"][3] += 1e-3

    change_report(release, other, stamp=True)
    assert "other outputs" in failed(release)["fingerprint of the outputs"]["reason"]


def test_measuring_again_gives_every_claim_a_verdict(finished: Path) -> None:
    ran = compress("verify", finished, "--measure", "--json")
    found = claims(ran)
    assert found["perplexity, first text"]["verdict"] == HOLDS
    assert found["perplexity, first text"]["said"] == found["perplexity, first text"]["found"]
    assert found["the dense model"]["verdict"] == HOLDS
    dense = found["perplexity, first text, dense"]
    assert dense["verdict"] == HOLDS and dense["said"] == dense["found"] != found["perplexity, first text"]["said"]
    for title in ("TTFT, 24 tokens, onnx", "TPOT at 24 tokens of context, onnx"):
        # Two processes a model are too few for a contradiction, whatever this machine does meanwhile.
        assert found[title]["verdict"] in (HOLDS, OPEN) and found[title]["found"].endswith("]")
    assert ran.code == 0, ran.err


@pytest.mark.usefixtures("unrun")
def test_what_cannot_be_checked_here_is_said_with_its_reason(release: Path) -> None:
    def targets(report: dict[str, Any]) -> None:
        del report["files"], report["fingerprint"]  # as an earlier version wrote it
        report["targets"] = {"pixel-8": report["bench"]}
        report["recipe"]["evaluation"]["texts"][1]["source"] = {"files": ["/nowhere/at/all.txt"]}

    change_report(release, targets, stamp=True)
    (release / "seal.json").unlink()
    ran = compress("verify", release, "--measure")
    assert ran.code == 0, ran.err
    assert "the report names no hashes" in ran.out
    assert "measured on the target pixel-8" in ran.out
    (line,) = [x for x in ran.out.splitlines() if x.startswith("perplexity, second | text  ")]
    assert "cannot be checked here: the text is not here" in line
    assert ran.out.splitlines()[-1].split()[2:5] == ["0", "do", "not"]


@pytest.fixture
def unrun(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Notes which dense export would be measured, and gives the figures of the report for it."""
    from compress.claims import remeasure

    seen: list[Path] = []

    def measured(subject: Any, form: str, dense: Path, spec: Any) -> dict[str, Any]:
        assert (dense / "prefill.onnx").is_file() and (dense / "decode.onnx").is_file()
        seen.append(dense)
        return dict(subject.report["bench"])

    monkeypatch.setattr(remeasure, "_measure", measured)
    return seen


def test_the_dense_model_of_a_release_is_found_where_the_report_says_and_exported_to_be_timed(
    release: Path, job: Job, unrun: list[Path]
) -> None:
    report = json.loads((release / "report.json").read_text())
    assert report["origin"] == {"folder": str(job.model)}
    found = claims(compress("verify", release, "--measure", "--json"))
    assert found["the dense model"]["reason"] == f"folder {job.model}: {job.model}"
    for text in report["quality"]["texts"]:
        row = found[f"perplexity, {text['name']}, dense"]
        assert row["verdict"] == HOLDS and row["found"] == f"{text['dense_ppl']:.3f}"
    assert found["TTFT, 24 tokens, onnx"]["verdict"] == HOLDS
    (made,) = unrun
    assert not made.exists(), "what was exported for it is gone again"


def test_a_dense_figure_that_was_made_up_does_not_survive_measuring(release: Path) -> None:
    """A worse dense model makes the pruned one look better."""
    from compress.recipes.tyr.card import write_card

    change_report(release, without_times, stamp=True)
    change_report(release, lambda r: r["quality"]["texts"][0].update(dense_ppl=1e3), stamp=True)
    (release / "seal.json").unlink()
    write_card(json.loads((release / "report.json").read_text()), release)
    bad = failed(release, "--measure")
    assert set(bad) == {"perplexity, first text, dense"} and bad["perplexity, first text, dense"]["said"] == "1000.000"


def test_a_dense_model_that_is_not_here_leaves_its_claims_open_and_says_where_it_was_looked_for(release: Path) -> None:
    change_report(release, lambda r: r.update(origin={"folder": "/nowhere/at/all"}), stamp=True)
    (release / "seal.json").unlink()
    ran = compress("verify", release, "--measure", "--json")
    assert ran.code == 0, ran.err
    found = claims(ran)
    for title in ("the dense model", "perplexity, first text, dense", "TTFT, 24 tokens, onnx"):
        assert found[title]["verdict"] == OPEN, found[title]
        assert "folder /nowhere/at/all" in found[title]["reason"] and "--dense" in found[title]["reason"]
    assert found["perplexity, first text"]["verdict"] == HOLDS
    change_report(release, lambda r: r.pop("origin"), stamp=True)
    row = claims(compress("verify", release, "--measure", "--json"))["the dense model"]
    assert row["verdict"] == OPEN and "does not say where it was" in row["reason"], "as an earlier version wrote it"


def test_a_dense_model_that_is_damaged_leaves_its_claims_open(release: Path, job: Job, tmp_path: Path) -> None:
    for name, text, part in (
        ("model.safetensors.index.json", "{", "is no JSON"),
        ("model.safetensors", None, "no safetensors weights"),
    ):
        broken = Path(shutil.copytree(job.model, tmp_path / name))
        (broken / name).unlink(missing_ok=True)
        if text is not None:
            (broken / name).write_text(text)
        row = claims(compress("verify", release, "--measure", "--dense", broken, "--json"))["the dense model"]
        assert row["verdict"] == OPEN and part in row["reason"] and str(broken) in row["reason"]


def test_another_dense_model_is_a_verdict_of_its_own_that_names_both_hashes(
    release: Path, job: Job, tmp_path: Path
) -> None:
    from compress.models.reading import weights_hash

    other = saved_tiny(tmp_path / "other", seed=5)
    ran = compress("verify", release, "--measure", "--dense", other, "--json")
    assert ran.code == 0, ran.err
    row = claims(ran)["the dense model"]
    assert row["verdict"] == OTHER and str(other) in row["reason"]
    assert row["said"] == f"sha256 {weights_hash(job.model)[:12]}" != row["found"]
    assert row["found"] == f"sha256 {weights_hash(other)[:12]}"
    opened = claims(ran)["perplexity, first text, dense"]
    assert opened["verdict"] == OPEN and row["said"] in opened["reason"] and row["found"] in opened["reason"]
    assert json.loads(ran.out)["other"] == 1
    assert " 1 is another, " in compress("verify", release, "--measure", "--dense", other).out.splitlines()[-1]
    one_error(compress("verify", release, "--measure", "--dense", "smollm2-135"), 2, "did you mean 'smollm2-135m'?")


def test_another_export_of_the_dense_model_is_not_timed(release: Path, finished: Path, unrun: list[Path]) -> None:
    found = claims(compress("verify", release, "--measure", "--dense", finished / "export-pruned", "--json"))
    row = found["the dense model's export, onnx"]
    files = json.loads((release / "report.json").read_text())["bench"]["dense"]["files"]
    assert row["verdict"] == OTHER and row["said"].removeprefix("sha256 ") in {sha[:12] for sha in files.values()}
    assert found["TTFT, 24 tokens, onnx"]["verdict"] == OPEN and not unrun
    assert found["perplexity, first text, dense"]["verdict"] == HOLDS, "the model itself is where the report says"
    for named in (finished / "export-dense", finished):
        again = claims(compress("verify", release, "--measure", "--dense", named, "--json"))
        assert again["TTFT, 24 tokens, onnx"]["verdict"] == HOLDS
    assert unrun == [finished / "export-dense"] * 2


def test_a_package_that_a_report_names_is_not_fetched_unless_an_alias_of_ours_names_it(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.models import sources

    def fetched(source: Any) -> tuple[Path, str]:
        raise AssertionError("pip could run what such a package brings")

    monkeypatch.setattr(sources, "_from_package", fetched)

    def evil(report: dict[str, Any]) -> None:
        report["origin"] = {"alias": "smollm2-135m"}
        report["model"]["source"] = "package evil==1.0, dequantised from model.gguf"

    change_report(release, evil, stamp=True)
    (release / "seal.json").unlink()
    row = claims(compress("verify", release, "--measure", "--json"))["the dense model"]
    assert row["verdict"] == OPEN and "does not name the source 'package evil==1.0" in row["reason"]


def test_a_text_without_a_hash_in_the_report_is_not_measured_on(release: Path) -> None:
    change_report(release, without_times, stamp=True)
    change_report(release, lambda r: r["quality"]["texts"][0].pop("sha256"), stamp=True)
    (release / "seal.json").unlink()
    row = claims(compress("verify", release, "--measure", "--json"))["perplexity, first text"]
    assert row["verdict"] == OPEN and "no hash" in row["reason"]


@pytest.mark.usefixtures("unrun")
def test_another_text_than_was_measured_on_is_no_verdict(release: Path, finished: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from compress.run.cache import sha256_of
    from compress.run.seals import read_seal, seal_text

    other = tmp_path / "other"
    windows = other / "text" / "windows.safetensors"
    shutil.copytree(finished / "text", windows.parent)
    tensors = load_file(windows)
    tensors["evaluation.0"] = tensors["evaluation.0"].flip(1).contiguous()
    save_file(tensors, windows)
    seal = read_seal(windows.parent)
    del seal["sha256"]
    seal["files"][windows.name] = {"bytes": windows.stat().st_size, "sha256": sha256_of(windows)}
    (windows.parent / "seal.json").write_text(seal_text(seal))
    dense = ("--dense", finished / "export-dense")
    found = claims(compress("verify", release, "--measure", "--like", other, *dense, "--json"))
    assert found["perplexity, first text"]["verdict"] == OPEN
    said = json.loads((release / "report.json").read_text())["quality"]["texts"][0]["sha256"][:12]
    reason = found["perplexity, first text"]["reason"]
    assert "not the one it was measured on" in reason and f"sha256 {said} in the report" in reason
    assert found["perplexity, second | text"]["verdict"] == HOLDS


def ratio(low: float, high: float) -> dict[str, float]:
    return {"low": low, "median": (low + high) / 2, "high": high}


@pytest.mark.parametrize(
    ("said", "found", "processes", "verdict"),
    [
        ((1.15, 1.25), (1.20, 1.30), 5, HOLDS),
        ((1.15, 1.25), (1.00, 1.16), 5, HOLDS),
        ((1.15, 1.25), (1.00, 1.10), 5, FAILS),
        ((1.15, 1.25), (1.00, 1.10), 2, OPEN),
        ((1.15, 1.25), (1.40, 1.50), 5, HOLDS),
    ],
)
def test_a_ratio_is_judged_by_the_intervals(
    said: tuple[float, float], found: tuple[float, float], processes: int, verdict: str
) -> None:
    assert judge(ratio(*said), ratio(*found), processes)[0] == verdict
