"""The head of a card: the hub's own classes read it back, its documented rules hold, and nothing is lost or smuggled.

The hub's validator needs the hub (`ModelCard.validate` posts to it), so the rules are held to by `faults`, and what
huggingface_hub reads back is compared with what was written.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from compress.errors import CompressError
from compress.report.card import text_metadata
from compress.report.metadata import LICENSES, RELATIONS, assemble, card_data, faults
from compress.words.escape import line

REPORT: dict[str, Any] = {
    "model": {"name": "smollm2-135m", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"},
    "recipe": {
        "method": "tyr",
        "calibration": {"sources": [{"hub": "org/calibration"}, {"files": ["a.txt"]}]},
        "evaluation": {
            "texts": [
                {"name": "Moby Dick", "source": {"package": "moby-dick"}},
                {"name": "moby dick", "source": {"files": ["other.txt"]}},
                {"name": "from the hub", "source": {"hub": "org/held-out"}},
            ]
        },
    },
    "quality": {
        "texts": [
            {"name": "Moby Dick", "dense_ppl": 10.0, "pruned_ppl": 12.5},
            {"name": "moby dick", "dense_ppl": 11.0, "pruned_ppl": 13.25},
            {"name": "from the hub", "dense_ppl": 9.0, "pruned_ppl": 9.5},
        ],
        "tasks": [{"task": "arc_easy", "metric": "acc", "dense": 0.5, "pruned": 0.45}],
    },
    "export": {"onnx": {}, "mnn": {}},
}


def head(report: dict[str, Any]) -> dict[str, Any]:
    content = assemble(text_metadata(report, 0.25, "structured-pruning"), "# text\n")
    return dict(yaml.safe_load(content.split("\n---\n")[0].removeprefix("---\n")))


def with_model(**changes: Any) -> dict[str, Any]:
    return {**REPORT, "model": {**REPORT["model"], **changes}}


def test_what_huggingface_hub_reads_back_is_what_was_measured() -> None:
    from huggingface_hub import ModelCard

    data: Any = ModelCard(assemble(text_metadata(REPORT, 0.25, "structured-pruning"), "# text\n")).data
    assert {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results} == {
        ("Moby Dick (held out)", "perplexity"): 12.5,
        ("moby dick (held out)", "perplexity"): 13.25,
        ("from the hub (held out)", "perplexity"): 9.5,
        ("arc_easy", "acc"): 0.45,
    }
    assert data.model_name == "smollm2-135m-pruned-25"
    assert [r.dataset_type for r in data.eval_results] == ["moby-dick", "moby-dick-2", "org/held-out", "arc-easy"]


def test_the_hubs_grouping_would_lose_texts_of_one_type() -> None:
    """What `assemble` guards against: huggingface_hub groups by type, and keeps one name for all."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    one = [EvalResult("text-generation", "text", name, "perplexity", 1.0) for name in ("a", "b")]
    (result,) = eval_results_to_model_index("m", one)[0]["results"]
    assert result["dataset"]["name"] == "a" and len(result["metrics"]) == 2


def test_base_model_relation_license_data_sets_and_tags_stand_where_the_hub_looks() -> None:
    found = head(REPORT)
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["base_model_relation"] == "finetune" and found["base_model_relation"] in RELATIONS
    assert found["license"] == "apache-2.0" and found["library_name"] == "transformers"
    assert found["datasets"] == ["org/calibration", "org/held-out"]
    assert found["tags"] == ["pruned", "structured-pruning", "tyr", "onnx", "mnn"]


def test_a_license_that_the_hub_does_not_list_is_other_with_its_name() -> None:
    found = head(with_model(license="My Own Licence, v2"))
    assert (found["license"], found["license_name"]) == ("other", "my-own-licence-v2")
    assert "license" not in head(with_model(license=None)), "none is made up"
    assert "llama3.1" in LICENSES and "gemma" in LICENSES


def test_a_base_that_is_no_id_of_the_hub_is_left_out_with_its_relation() -> None:
    found = head(with_model(base_model="../my model"))
    assert "base_model" not in found and "base_model_relation" not in found


def test_a_model_with_no_measurement_states_no_result() -> None:
    found = head({k: v for k, v in REPORT.items() if k != "quality"})
    assert "model-index" not in found and "metrics" not in found and "model_name" not in found


@pytest.mark.parametrize(
    "evil",
    ["a\n---\n\nlicense: mit", "x: [", "'\"{}", "<script>alert(1)</script>", "\u202egnp.exe", "- a\n- b", "!!python/x"],
)
def test_a_name_cannot_end_the_head_or_add_to_it(evil: str) -> None:
    bad = with_model(name=evil)
    bad["quality"] = {"texts": [{"name": evil, "dense_ppl": 1.0, "pruned_ppl": 2.0}], "tasks": []}
    found = head(bad)
    assert found["license"] == "apache-2.0"
    assert found["model-index"][0]["name"] == f"{line(evil)}-pruned-25"
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == f"{line(evil)} (held out)"
    assert "\n" not in line(evil) and "\u202e" not in line(evil)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"license": "my-licence"}, "not on the hub's list"),
        ({"license": "other"}, "no license_name"),
        ({"base_model": "no id at all"}, "no id of the hub"),
        ({"base_model_relation": "pruned"}, "not one of"),
        ({"tags": "pruned"}, "not a list of words"),
        ({"tags": ["a", 1]}, "not a list of words"),
        ({"datasets": ["a b"]}, "no id of the hub"),
    ],
)
def test_what_the_hub_would_refuse_is_named(change: dict[str, Any], said: str) -> None:
    assert faults(f"---\n{yaml.safe_dump(head(REPORT))}---\n") == []
    wrong = faults(f"---\n{yaml.safe_dump({**head(REPORT), **change})}---\n")
    assert any(said in w for w in wrong), wrong


def test_a_result_without_its_data_set_or_with_nan_is_named() -> None:
    lacking, infinite = head(REPORT), head(REPORT)
    del lacking["model-index"][0]["results"][0]["dataset"]["name"]
    infinite["model-index"][0]["results"][0]["metrics"][0]["value"] = float("inf")
    assert faults(f"---\n{yaml.safe_dump(lacking)}---\n")
    assert any("finite" in w for w in faults(f"---\n{yaml.safe_dump(infinite)}---\n"))
    assert faults("# no head") and faults("---\na: [\n---\n")


def test_a_card_that_the_hub_would_refuse_is_not_written() -> None:
    data = text_metadata(REPORT, 0.25, "structured-pruning")
    data.base_model_relation = "pruned"
    with pytest.raises(CompressError, match="not what the hub takes"):
        assemble(data, "# text\n")


def test_card_data_takes_the_share_into_the_name() -> None:
    from compress.report.metadata import text_results

    results = text_results(REPORT)
    data = card_data(REPORT, removed=0.506, tags=[], library="transformers", results=results)
    assert data.model_name == "smollm2-135m-pruned-51"


def network(tasks: list[dict[str, Any]], rows: list[dict[str, Any]], shape: tuple[int, ...] = (3, 24, 24)) -> Any:
    return {
        "model": {"name": "resnet8", "base_model": None, "license": None},
        "recipe": {"method": "global-mp"},
        "size": {"ranks": None, "pruned_share": 0.9},
        "data": {"source": "package emoji", "input": list(shape), "tasks": tasks},
        "quality": {"tasks": rows},
    }


def test_a_networks_tasks_have_the_hubs_words_and_their_main_measure() -> None:
    from compress.recipes.global_mp.network_card import metadata

    shape = {"name": "shape", "kind": "classes"}
    rows = [{"task": "shape", "metric": m, "pruned": v, "dense": 0.6} for m, v in (("loss", 1.5), ("accuracy", 0.5))]
    one = metadata(network([shape], rows)).to_dict()
    assert one["pipeline_tag"] == "image-classification"
    (result,) = one["model-index"][0]["results"]
    assert [m["value"] for m in result["metrics"]] == [0.5], "the loss is no measure of another's"
    depth = {"name": "depth", "kind": "depth", "type": "depth-estimation"}
    more = [
        {**rows[1], "main": True},
        {"task": "depth", "metric": "absolute error", "pruned": 0.3, "dense": 0.2, "main": True},
        {"task": "depth", "metric": "rmse", "pruned": 0.9, "dense": 0.8, "main": False},
    ]
    two = metadata(network([shape, depth], more)).to_dict()
    assert "pipeline_tag" not in two, "there is no one word for both"
    found = {r["task"]["type"]: [m["type"] for m in r["metrics"]] for r in two["model-index"][0]["results"]}
    assert found == {"image-classification": ["accuracy"], "depth-estimation": ["absolute error"]}
    assert "pipeline_tag" not in metadata(network([shape], rows, (9, 128))).to_dict()
