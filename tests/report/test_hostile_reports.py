"""Reports of strangers: whatever their texts are, every renderer shows text, read back by a parser of its place."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from markdown_it import MarkdownIt

from compress.errors import CompressError
from compress.pipeline import method_of
from compress.recipes.global_mp import card as sparse_card
from compress.recipes.global_mp import network_card
from compress.recipes.pagcp import card as channels_card
from compress.recipes.tyr import card
from compress.report.build import fingerprint, read_report
from compress.report.html import page
from compress.report.metadata import assemble
from compress.words.escape import json_text, terminal
from tests.reports import NAMES, sample
from tests.words.test_escape import Parsed, hostile, is_command

pytestmark = pytest.mark.processes

BODIES = {
    "tyr": card.body,
    "global-mp-text": sparse_card.body,
    "global-mp-network": network_card.body,
    "pagcp": channels_card.body,
}
HEADS: dict[str, Any] = {
    "tyr": card.metadata,
    "global-mp-text": sparse_card.metadata,
    "global-mp-network": network_card.metadata,
    "pagcp": channels_card.metadata,
}
# Words that decide which part of a card is written, and no more.
KEPT = {"method", "schedule", "pattern", "sha256", "winner"}


def names(report: dict[str, Any]) -> set[str]:
    """What is a key in one place and a value in another."""
    quality = report["quality"]
    found = {t["name"] for t in quality.get("texts", ())} | {g["name"] for g in report.get("groups", ())}
    for row in quality.get("tasks", ()):
        found |= {row["task"], row["metric"]}
    return found


def quantised(report: dict[str, Any], text: str) -> dict[str, Any]:
    """A section of files at fewer bits with ``text`` wherever it has a text of its own."""
    row = {
        "format": "gguf", "precision": "q4_0", "bytes": 100, "perplexity": 9.0, "ttft": 0.1, "tpot": 0.01,
        "peak_rss": 1000, "runtime": f"llama.cpp{text}", "notes": [f"a row{text}"], "texts": {}, "files": {text: 1},
    }  # fmt: skip
    record = copy.deepcopy(report["bench"]) | {"pruned_is": f"gguf-q4_0{text}"}
    record["spec"]["order"] += text
    files = [row | {"side": "dense"}, row | {"side": "pruned", "bytes": 50}]
    return {"files": files, "bench": {"gguf-q4_0": record}, "cache": 1 << 20}


def poisoned(report: dict[str, Any], evil: str) -> dict[str, Any]:
    """The report with ``evil`` behind every text in it, and as names of a target, a format and a file."""
    report = copy.deepcopy(report)
    keys = names(report)

    def within(value: Any, key: str = "") -> Any:
        if isinstance(value, str) and key not in KEPT:
            return value + evil
        if isinstance(value, dict):
            return {(k + evil if k in keys else k): within(v, k) for k, v in value.items()}
        return [within(v, key) for v in value] if isinstance(value, list) else value

    found: dict[str, Any] = within(report)
    found["targets"] = {f"board{evil}": copy.deepcopy(found["bench"]), f"phone{evil}": {"reason": evil}}
    if "texts" in found["quality"]:
        found["quantised"] = quantised(found, evil)
    if "data" in found:
        found["export"][f"other{evil}"] = {"pruned": {"bytes": {evil: 1}, "skipped": evil}}
    found["commands"] = {k: evil for k in report["commands"]}
    return found


OURS = {"h1", "h2", "h3", "p", "ul", "li", "strong", "code", "pre", "table", "thead", "tbody", "tr", "th", "td", "img"}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(evil=hostile)
def test_a_card_holds_nothing_but_its_own_markup(name: str, evil: str) -> None:
    clean, dirty = sample(name), poisoned(sample(name), evil)
    clean["targets"] = {"board": copy.deepcopy(clean["bench"]), "phone": {"reason": ""}}
    if "texts" in clean["quality"]:
        clean["quantised"] = quantised(clean, "x")
    if "data" in clean:
        clean["export"]["other"] = {"pruned": {"bytes": {"x": 1}, "skipped": "x"}}
    shape = []
    for report in (clean, dirty):
        text = BODIES[name](report, {"latency": "plots/latency.png"})
        assert not any(is_command(line) for line in text.splitlines() if not line.startswith("#"))
        reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
        found = Parsed(reader.render(text))
        assert set(found.tags) <= OURS and found.tags.count("img") == 1
        assert all(c.isprintable() or c in "\n\u00a0" for c in text)
        shape.append([t for t in found.tags if t not in ("code", "p", "li")])
    assert shape[0] == shape[1], "no table, heading or list more, and no cell"


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(evil=hostile)
def test_a_cards_head_is_the_same_yaml_with_other_texts(name: str, evil: str) -> None:
    heads = []
    for report in (poisoned(sample(name), ""), poisoned(sample(name), evil)):
        content = assemble(HEADS[name](report), "# text\n")
        head = yaml.safe_load(content.split("\n---\n", 1)[0].removeprefix("---\n"))
        (index,) = head.pop("model-index")
        heads.append((set(head) - {"license", "license_name", "pipeline_tag"}, len(index["results"])))
    assert heads[0] == heads[1]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(evil=hostile)
def test_a_page_holds_the_same_elements_whatever_the_texts_are(name: str, evil: str) -> None:
    found = []
    for text in ("x", evil):
        report = poisoned(sample(name), text)
        body = BODIES[name](report, {"latency": "plots/latency.png"})
        parsed = Parsed(page(report | {"sha256": text}, body, Path("nowhere")))
        found.append([t for t in parsed.tags if t not in ("code", "p", "li")])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(evil=hostile)
def test_lines_and_json_of_a_run_hold_no_command(name: str, evil: str) -> None:

    report = poisoned(sample(name), evil) | {"run": evil}
    report["export"] = {k: v for k, v in report["export"].items() if "other" not in k}
    lines = method_of(sample(name)["recipe"]).lines(report)
    for line in map(terminal, lines):
        assert not is_command(line) and not re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u202e]", line)
    assert not any(is_command(line) for line in json_text(report).split("\n"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"side": "../.."},
        {"format": "gguf-../../x"},
        {"precision": "q4_0/../../elsewhere"},
        {"precision": 4},
        {"side": None},
        {"bytes": "many"},
        {"perplexity": []},
    ],
)
@pytest.mark.parametrize("name", ["tyr", "global-mp-text"])
def test_a_row_that_names_another_folder_is_no_row(name: str, wrong: dict[str, Any], tmp_path: Path) -> None:
    """Its words are parts of paths; whoever reads a report is told before anything is opened."""
    report = sample(name)
    report["quantised"] = quantised(report, "")
    write(report, tmp_path)
    assert read_report(tmp_path)["quantised"] == report["quantised"]
    report["quantised"]["files"][1].update(wrong)
    write(report, tmp_path)
    with pytest.raises(CompressError, match="a figure of the report cannot be read"):
        read_report(tmp_path)


def write(report: dict[str, Any], folder: Path) -> None:
    content = {k: v for k, v in report.items() if k != "sha256"}
    (folder / "report.json").write_text(json.dumps(content | {"sha256": fingerprint(content)}))


def test_the_samples_are_poisoned_where_texts_of_strangers_stand() -> None:
    report = poisoned(sample("pagcp"), "!")
    assert report["model"]["name"].endswith("!") and report["environment"]["cpu"].endswith("!")
    assert all(k.endswith("!") for k in report["rounds"][0]["readings"])
