"""The gate on what language models are run as: GGUF in llama.cpp, folders in ONNX Runtime GenAI."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from compress.exporters import gate_measure, gate_models
from compress.exporters.formats import describe
from tests.command import compress, one_error
from tests.export.test_gguf import FEW, Plan, built, dense, pruned
from tools.ci.models import chain

pytestmark = [
    pytest.mark.skipif(not find_spec("xllamacpp"), reason="needs xllamacpp"),
    pytest.mark.processes,
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense-gguf and pruned-gguf, each of two blocks, built and compared with torch."""
    place = tmp_path_factory.mktemp("gguf")
    built(dense(place / "dense", "llama"), place / "dense-gguf")
    built(pruned(place / "pruned", "llama", Plan(FEW), num_hidden_layers=2), place / "pruned-gguf")
    return place


def test_size_and_perplexity_of_two_ggufs_are_gated_as_they_stand(folders: Path) -> None:
    before, after = folders / "dense-gguf", folders / "pruned-gguf"
    ran = compress("gate", before, after, "-b", "size<=1x", "-b", "perplexity<=0.0001x", "--json")
    assert ran.code == 1, ran.err
    size, quality = json.loads(ran.out)["budgets"]
    files = [next(folder.glob("*.gguf")) for folder in (before, after)]
    assert size["value"] == pytest.approx(files[1].stat().st_size / files[0].stat().st_size) and size["value"] < 1
    measured = [describe(folder, "gguf")["parity"]["perplexity"]["gguf"] for folder in (before, after)]
    assert quality["value"] == pytest.approx(measured[1] / measured[0])
    assert (size["verdict"], quality["verdict"]) == ("pass", "fail")
    # The file itself is the folder's.
    assert compress("gate", *files, "-b", "size<=1x").code == 0


def test_what_cannot_be_gated_is_one_error_and_nothing_is_measured(folders: Path, tmp_path: Path) -> None:
    before, after = folders / "dense-gguf", folders / "pruned-gguf"
    one_error(compress("gate", before, after, "-b", "latency.p90<=20"), 2, "latency.p90<=20")
    one_error(compress("gate", before, after, "-b", "tpot<=20ms"), 2, "one named, pinned device only")
    one_error(compress("gate", before, after, "-b", "accuracy>=-0.5%"), 2, "nothing says what accuracy")
    other = built(dense(tmp_path / "model", "llama", vocab_size=320), tmp_path / "other")
    assert other["bytes"]
    one_error(compress("gate", before, tmp_path / "other", "-b", "size<=9x"), 2, "300 token ids, the candidate 320")
    # A file whose record is elsewhere has no perplexity; one that is cut short is none.
    alone = tmp_path / "alone.gguf"
    shutil.copy(next(after.glob("*.gguf")), alone)
    one_error(compress("gate", before, alone, "-b", "perplexity<=2x"), 2, "nothing says what perplexity", "alone.gguf")
    alone.write_bytes(alone.read_bytes()[:500])
    one_error(compress("gate", before, alone, "-b", "size<=2x"), 2, "no whole GGUF", "alone.gguf")
    shutil.copytree(after, tmp_path / "changed")
    record = json.loads((tmp_path / "changed" / "gguf.json").read_text())
    record["parity"] = "good"
    (tmp_path / "changed" / "gguf.json").write_text(json.dumps(record))
    one_error(compress("gate", before, tmp_path / "changed", "-b", "perplexity<=2x"), 2, "parity", "gguf.json")


def test_another_runtime_is_no_candidate(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "genai").mkdir()
    settings = {"model": {"context_length": 64, "vocab_size": 300, "decoder": {"filename": "model.onnx"}}}
    (tmp_path / "genai" / "genai_config.json").write_text(json.dumps(settings))
    chain(tmp_path / "genai" / "model.onnx", 1)
    ran = compress("gate", folders / "dense-gguf", tmp_path / "genai", "-b", "size<=2x")
    one_error(ran, 2, "runs in llama.cpp, the candidate in ONNX Runtime GenAI")
    del settings["model"]["vocab_size"]
    (tmp_path / "genai" / "genai_config.json").write_text(json.dumps(settings))
    ran = compress("gate", tmp_path / "genai", tmp_path / "genai", "-b", "size<=2x")
    one_error(ran, 2, "vocab_size", "genai_config.json")


def test_one_process_gives_what_a_round_needs(folders: Path) -> None:
    """The rounds around it are those of any model, and tested with those."""
    found = gate_models.find(str(folders / "pruned-gguf"))
    sample = gate_measure.measure(found, gate_measure.Measuring(samples=2, prompt=8, context=8), 0)
    assert "llamacpp" in sample["runtime"] and sample["peak_rss"] > 1e6
    for figure in ("ttft", "tpot"):
        assert len(sample[figure]["samples"]) >= 2 and 0 < min(sample[figure]["fastest"]) < 1


@pytest.mark.slow
def test_time_memory_size_and_perplexity_of_a_gguf_are_gated(folders: Path) -> None:
    ran = compress(
        *("gate", folders / "dense-gguf", folders / "pruned-gguf", "--samples", 1, "--prompt", 8, "--context", 8),
        *("-b", "latency<=9x", "-b", "memory<=2x", "-b", "size<=1x", "-b", "perplexity<=9x", "--json"),
    )
    assert ran.code == 0, ran.err
    rows = {row["budget"] for row in json.loads(ran.out)["budgets"]}
    assert rows == {"ttft<=9x", "tpot<=9x", "memory<=2x", "size<=1x", "perplexity<=9x"}
