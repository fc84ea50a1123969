"""Report and card: one source, every number the same, accepted by the hub's own reader, nothing smuggled in."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from compress.cli import app
from compress.errors import CompressError
from compress.recipes.tyr.card import body, metadata, write_card
from compress.report.build import finish, read_report
from compress.words.escape import markdown
from tests.command import Job, compress, one_error

pytestmark = pytest.mark.usefixtures("done_once")


@pytest.fixture(scope="module")
def report(finished: Path) -> dict[str, Any]:
    found = read_report(finished)
    del found["rows"]  # what a test changes in the sections shows
    return found


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    return (finished / "release" / "README.md").read_text()


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_the_hubs_own_reader_takes_the_card(finished: Path, report: dict[str, Any]) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(finished / "release" / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    results = {r.dataset_name: r.metric_value for r in card.data.eval_results}
    for quality in report["quality"]["texts"]:
        assert results[f"{quality['name']} (held out)"] == pytest.approx(quality["pruned_ppl"], abs=5e-4)


def test_base_model_and_license_stand_where_the_hub_looks_for_them(report: dict[str, Any], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    known = copy.deepcopy(report)
    known["model"] |= {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
    data = ModelCard.load(write_card(known, tmp_path)).data
    assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_what_was_dequantised_is_said(report: dict[str, Any], tmp_path: Path) -> None:
    known = copy.deepcopy(report)
    known["model"]["source"] = "local folder, weights dequantised from fp8 to bfloat16"
    assert "local folder, weights dequantised from fp8 to bfloat16." in write_card(known, tmp_path).read_text()


def test_the_cards_table_is_the_reports(text: str, report: dict[str, Any]) -> None:
    size = report["size"]
    assert row(text, "backbone parameters") == [
        f"{size['dense']['backbone_parameters']:,}",
        f"{size['pruned']['backbone_parameters']:,}",
        f"-{100 * size['backbone_removed']:.1f} %",
    ]
    assert row(text, "all parameters")[:2] == [f"{size[k]['total_parameters']:,}" for k in ("dense", "pruned")]
    first = report["quality"]["texts"][0]
    assert row(text, "perplexity, first text")[:2] == [f"{first['dense_ppl']:.2f}", f"{first['pruned_ppl']:.2f}"]
    ttft = report["bench"]["ratios"]["ttft"]
    spread = f"[{ttft['low']:.2f}, {ttft['high']:.2f}]"
    assert row(text, "TTFT, 24 tokens")[2] in (
        f"not resolved on this machine {spread}, of 2 processes",
        f"no change {spread}",
    )
    assert f"{report['sha256'][:16]}" in text
    mean = report["quality"]["geometric_mean"]["pruned"]
    a, b = (t["pruned_ppl"] for t in report["quality"]["texts"])
    assert mean == pytest.approx((a * b) ** 0.5)


def test_every_picture_the_card_shows_is_there(finished: Path, text: str) -> None:
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(shown) == 4
    for name in shown:
        assert (finished / "release" / name).read_bytes().startswith(b"\x89PNG")


def test_every_command_the_card_names_is_one_of_ours(text: str) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    verbs = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    lines = block.strip().splitlines()
    assert len(lines) == 6
    for line in lines:
        program, verb, *words = shlex.split(line)
        assert program == "compress" and verb in verbs and words


def test_the_command_for_perplexity_gives_the_cards_numbers(text: str, report: dict[str, Any]) -> None:
    (line,) = [line for line in text.splitlines() if line.startswith("compress eval ")]
    found = json.loads(compress(*shlex.split(line)[1:], "--json").out)
    assert found["geometric_mean"] == pytest.approx(report["quality"]["geometric_mean"]["pruned"], rel=1e-5)


def test_the_card_can_be_written_again_from_the_report_alone(finished: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "report.json").write_bytes((finished / "release" / "report.json").read_bytes())
    assert compress("card", tmp_path / "in", "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "README.md").read_text() == text


def test_the_release_loads_as_the_card_says(finished: Path, text: str) -> None:
    import torch

    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("PATH_OR_ID", str(finished / "release")), names)
    ids = names["tokenizer"]("the cat sat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert names["model"](ids).logits.shape == (1, ids.shape[1], 300)


def test_the_onnx_file_opens_as_the_card_says(finished: Path, text: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    snippet = text.split("### ONNX Runtime", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {}
    exec(snippet.replace("PATH", str(finished / "release")), names)
    model = AutoModelForCausalLM.from_pretrained(finished / "release", trust_remote_code=True)
    with torch.no_grad():
        want = model(torch.from_numpy(names["ids"])).logits[:, -1]
    assert torch.allclose(torch.from_numpy(names["logits"])[:, -1], want, atol=1e-4)


def test_every_layer_of_the_card_is_the_reports(text: str, report: dict[str, Any]) -> None:
    section = text.split("## What was removed", 1)[1].split("##", 1)[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(report["layers"])
    for cells, row in zip(rows, report["layers"], strict=True):
        left = f"{row['neurons']} of {row['dense_neurons']}" if row["neurons"] != row["dense_neurons"] else "all"
        assert cells[0] == str(row["layer"]) and cells[3] == left
        assert cells[5] in (f"-{100 * row['ffn_sparsity']:.1f} %", "0 %")


def test_latency_on_each_target_stands_with_its_interval_and_conditions(report: dict[str, Any]) -> None:
    more = copy.deepcopy(report)
    board = copy.deepcopy(report["bench"])
    board["spec"] |= {"runtime": "onnxruntime 1.32.0 on arm64", "threads": 4, "processes": 5}
    board.pop("why")
    board["ratios"]["ttft"] = {"median": 1.5, "low": 1.25, "high": 1.75}
    module = {
        "spec": {"runtime": "MNN 3.6", "threads": 1, "processes": 5, "order": "ABBA", "batch": 8},
        "dense": {"latency": {"median": 0.5, "spread_between": 0.1}, "bytes": 4_000_000},
        "pruned": {"latency": {"median": 0.0025, "spread_between": 0.2}, "bytes": 2_000_000},
        "ratios": {"latency": {"median": 200.0, "low": 190.0, "high": 210.0}},
    }
    more["targets"] = {"board|x": {**board, "emulated": True}, "phone": module, "jetson": {"reason": "no answer"}}
    text = body(more, {})
    assert "1.50x as fast [1.25, 1.75]" in text
    assert "| board\\|x (emulated) | TTFT, 24 tokens |" in text
    assert "- board\\|x: Latency: onnxruntime 1.32.0 on arm64, on " in text and ", 4 threads, " in text
    assert "**Emulated**" in text
    assert "| phone | latency, batch 8 | 500.0 ms | 2.50 ms | 200.00x as fast [190.00, 210.00] |" in text
    assert "| phone | files | 4.00 MB | 2.00 MB | -50.0 % |" in text
    assert "The processes differ by up to 20 %." in text
    assert "| jetson | not measured | | | no answer |" in text


def test_a_run_off_stands_on_the_card_with_every_solutions_kl(report: dict[str, Any]) -> None:
    assert "run-off" not in body(report, {})
    judged = copy.deepcopy(report)
    judged["run_off"] = {"search": 0.25, "edges left alone": 0.31254, "knapsack": 0.2}
    (line,) = [line for line in body(judged, {}).splitlines() if line.startswith("- run-off")]
    assert line.endswith(": knapsack 0.2000, search 0.2500, edges left alone 0.3125")


def test_a_card_says_what_was_not_measured(report: dict[str, Any]) -> None:
    short = {k: v for k, v in copy.deepcopy(report).items() if k not in ("bench", "export")}
    limits = body(short, {}).split("## Limits", 1)[1]
    assert "It was not exported" in limits and "Latency and memory were not measured" in limits
    assert "No licence is stated" in limits
    full = copy.deepcopy(report)
    full["model"]["license"] = "mit"
    limits = body(full, {}).split("## Limits", 1)[1]
    assert "not exported" not in limits and "were not measured" not in limits and "licence" not in limits


def test_a_card_of_a_run_that_was_stopped_early_says_what_it_lacks(job: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert compress("prune", job.model, "--recipe", job.recipe, "--out", out, "--until", "plan").code == 0
    ran = compress("card", out)
    assert ran.code == 1
    assert "saved no model, measured no quality, exported nothing, measured no latency" in ran.err


def test_where_the_users_files_lay_is_not_published_as_their_source(text: str, job: Job) -> None:
    limits = text.split("## Limits", 1)[1]
    assert "calibration.txt" in limits and str(job.folder) not in limits


def test_what_is_quoted_cannot_become_markup(report: dict[str, Any]) -> None:
    bad = copy.deepcopy(report)
    evil = "<script>x</script> | a ![i](http://e.vil) `c`\n# head"
    bad["quality"]["texts"][0]["name"] = evil
    bad["model"] |= {"name": evil, "source": evil, "base_model": evil}
    bad["environment"]["cpu"] = evil
    text = body(bad, {})
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<h1>head" not in html and "<script" not in html and "<img" not in html and 'e.vil"' not in html
    (line,) = [line for line in text.splitlines() if line.startswith("| perplexity, \\<script")]
    assert len(re.split(r"(?<!\\)\|", line)) == 6, "five bars: the name has added none"
    assert markdown("a*b_c[d](e)|f#g!h<i>~&") == r"a\*b\_c\[d\](e)\|f\#g\!h\<i\>\~\&"
    head = metadata(bad).to_dict()
    assert "base_model" not in head, "it is no id of the hub"
    assert head["model-index"][0]["results"][0]["dataset"]["name"] == evil.replace("\n", "\\n") + " (held out)"


def test_a_name_with_markup_or_a_formula_is_shown_as_it_is_in_card_plots_and_page(
    report: dict[str, Any], tmp_path: Path
) -> None:
    name = "<b>x</b>[y](http://z) $x^{$ ![i](j)"
    bad = copy.deepcopy(report)
    bad["model"] |= {"name": name, "source": name}
    bad["quality"]["texts"][0]["name"] = bad["recipe"]["evaluation"]["texts"][0]["name"] = name
    for point in bad["quality"]["curve"]:
        point["texts"][name] = point["texts"].pop("first text")
    bad["commands"]["prune"] = "compress prune 'a\n```\n<script>x</script>'"
    (tmp_path / "in").mkdir()
    finish(bad)
    (tmp_path / "in" / "report.json").write_text(json.dumps(bad))
    ran = compress("card", tmp_path / "in", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    card = (tmp_path / "out" / "README.md").read_text().split("\n---\n", 1)[1]
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    assert "<script" not in html and "<b>" not in html and 'href="http://z"' not in html and "<img" in html
    assert html.count("&lt;b&gt;x&lt;/b&gt;[y](http://z) $x^{$ ![i](j)") >= 4
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<b>x" not in page and "<script>x" not in page


def test_a_card_that_cannot_be_written_is_one_error_and_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for words in (("card", finished, "--out"), ("report", finished, "--out")):
        one_error(compress(*words, tmp_path / "file" / "x"), 1, "cannot be written", "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_of_a_card(finished: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        one_error(compress("card", finished, "--out", disk / "card"), 1, "the disk is full", str(disk / "card"))
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_card_names_no_command_for_what_was_not_made(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("prune", job.model, "--recipe", job.recipe, "--set", "export=null", "--set", "bench=null")
    assert compress(*words, "--out", out).code == 0
    text = (out / "release" / "README.md").read_text()
    assert "compress bench" not in text and "compress export" in text
    assert "Latency and memory were not measured, so whether it is faster is not known." in text


def test_a_changed_report_is_refused(finished: Path, tmp_path: Path) -> None:
    report = json.loads((finished / "release" / "report.json").read_text())
    report["quality"]["texts"][0]["pruned_ppl"] = 1.0
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(CompressError, match="was changed"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(CompressError, match="is not what it should be"):
        read_report(tmp_path)


def test_a_report_that_lacks_a_section_is_not_finished(report: dict[str, Any]) -> None:
    with pytest.raises(CompressError, match="lacks quality"):
        finish({k: v for k, v in report.items() if k != "quality"})


def test_a_card_without_bench_and_export_says_nothing_of_them(report: dict[str, Any]) -> None:
    short = {k: v for k, v in report.items() if k not in ("bench", "export")}
    text = body(short, {})
    assert "TTFT" not in text and "onnx/" not in text and "ONNX" not in text.split("## Limits")[0]
