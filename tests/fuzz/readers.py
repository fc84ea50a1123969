"""Every reader of an outside file: a good input, what is made of it, and which other results are right."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutate import Change
from tests.fuzz.tries import FORMS, Reader, as_it_was_put, sensible
from tests.networks import write_cifar10, write_class_folders, write_har
from tests.tiny import RECIPE, saved_tiny

LARGEST_ID = 300  # rows of the tiny model's embedding


def anything(good: Any, found: Any, change: Change) -> str | None:
    """Whatever came is judged by `sensible` alone."""
    return sensible(found)


# --- recipes and other files of settings ------------------------------------------------------------------------------

PAGCP = """\
method: pagcp
task: network
description: small
arguments: {width: 4}
data: {folder: data, size: 12, tasks: [class]}
train: {epochs: 2, batch: 16, lr: 0.05, warmup_epochs: 0, weights: {class: 1.0}}
finetune: {epochs: 1, batch: 16, lr: 0.02}
export: {samples: 4, formats: [onnx, ort]}
bench: {batch: 2, processes: 2, threads: 1}
pagcp: {flops: 0.3, rounds: 1, between: 0, round_to: 4, batch: 16}
"""
RECOVERED = (
    RECIPE
    + "recover: {rank: 4, steps: 3, batch: 2, targets: [q_proj], hidden_layers: [0, 1]}\nmemory: {stream: true}\n"
)
GLOBAL_MP = """\
method: global-mp
task: network
sparsity: 0.9
data: {package: emoji, size: 16}
train: {epochs: 2, batch: 16}
sweep: [0.5]
targets: [this-machine]
"""
TARGET = """\
name: board
description: a board
format: onnx
precision: fp32
compute_capability: ['8.9']
options: {intra: 1}
transport: {kind: ssh, host: there, port: 22, user: me, python: python3, folder: /tmp/x}
threads: 2
cool_down: 0.5
budget: 20
shapes: {batch: 1, inputs: {x: [1, 3, 8, 8]}, prompts: [16], contexts: [16], max_context: 64}
measure: {processes: 2, min_seconds: 0.1, min_runs: 2, sample_seconds: 0.1}
round_to: 8
"""
GATE = """\
schema_version: 1
description: mine
baseline: git:main
candidate: worktree
budgets: ['latency<=1.05x', 'size<=1.0x']
strict: true
pinned: board
build: [python, make.py]
artefact: out/model.onnx
threads: 1
samples: 3
shapes: {x: [1, 3, 8, 8]}
"""
MACHINE = """\
gpu: {memory: 80, float32: 60, tf32: 400, bfloat16: 800, float64: 30, bandwidth: 3000, pcie: 60, source: a sheet}
count: 8
nodes: 2
ram: 1000
disk: 2000
disk_read: 3
reached: 0.5
"""


def _recipe(folder: Path) -> Any:
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_recipe

    return load_recipe(str(folder / "recipe.yaml"), METHODS).resolved()


def _target(folder: Path) -> Any:
    from compress.exporters.target import load_target

    return load_target(str(folder / "target.yaml")).model_dump(mode="json")


def _gate(folder: Path) -> Any:
    from compress.exporters.gate import parse_budget
    from compress.verbs.gate import load_gate

    found = load_gate(folder / "gate.yaml")
    for text in found.budgets:
        assert math.isfinite(parse_budget(text).limit)
    return found.model_dump(mode="json")


def _machine(folder: Path) -> Any:
    from compress.run.machines import find_machine

    found = find_machine(str(folder / "machine.yaml"), folder)
    return [found.count, found.nodes, found.memory, found.ram, found.disk, found.float32, found.float64, found.pcie]


def _machine_right(good: Any, found: Any, change: Change) -> str | None:
    bad = [n for n in found if not (math.isfinite(n) and 0 < n < 1e40)]
    return f"{bad} was taken" if bad else None


def _settings(name: str, file: str, text: str, read: Callable[[Path], Any], judge: Any = as_it_was_put) -> Reader:
    return Reader(
        name,
        lambda folder: (folder / file).write_text(text) and None,  # type: ignore[func-returns-value]
        {file: "yaml"},
        read,
        judge,
        also=("--budget", "budget ") if file == "gate.yaml" else (),
    )


# --- language models --------------------------------------------------------------------------------------------------


@cache
def _saved(shards: bool) -> Path:
    """A tiny model's folder, made once."""
    from tests.tiny import tiny, word_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    if shards:
        tiny("llama").save_pretrained(folder, max_shard_size="40KB")
        word_tokenizer(folder)
    else:
        saved_tiny(folder)
    return folder


def _model(shards: bool = False) -> Callable[[Path], None]:
    return lambda folder: shutil.copytree(_saved(shards), folder, dirs_exist_ok=True) and None  # type: ignore[func-returns-value]


@cache
def _saved_seeing() -> Path:
    from tests.seeing import saved_seeing

    return saved_seeing(Path(tempfile.mkdtemp(prefix="fuzz-model-")), "gemma3")


def _seeing(folder: Path) -> None:
    shutil.copytree(_saved_seeing(), folder, dirs_exist_ok=True)


def _planned(folder: Path) -> Any:
    """What `compress plan` reads of a model: its configuration alone."""
    from compress.language.setup import outline
    from compress.pipeline import METHODS
    from compress.schema.recipe import load_recipe

    setup = outline(str(folder), load_recipe("tyr", METHODS, ["sparsity=0.3"]))
    return [setup.costs.total, setup.costs.backbone, *(vars(b) for b in setup.geometry.blocks)]


def _loaded(folder: Path) -> Any:
    """What `compress eval` and `prune` read of a model: outputs, and tokens of a text."""
    import torch

    from compress.data.special import begun
    from compress.verbs.language import _load

    model, _, tokenizer = _load(folder)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 9, 200, 3]])).logits
    return {"logits": logits.double().flatten().tolist(), "ids": begun(tokenizer, "the cat sat on the mat")}


def _tokens(folder: Path) -> Any:
    from compress.data.special import begun, text_facts
    from compress.data.text import pack
    from compress.models.reading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    text_facts(tokenizer)
    words = "the cat sat on the mat and the dog did not. " * 20
    ids = pack([words, words], tokenizer, 16, 2, "text").ids.tolist()
    return {"ids": ids, "one": begun(tokenizer, "an apple a day"), "said": tokenizer.decode(ids[0])}


def _ids_right(good: Any, found: Any, change: Change) -> str | None:
    ids = [*found["one"], *(i for row in found["ids"] for i in row)] if "one" in found else found["ids"]
    if not ids or not all(type(i) is int and 0 <= i < LARGEST_ID for i in ids):
        return f"the ids {ids[:5]} were taken"
    return None


# Keys of config.json that change what a model computes, and none of its shapes: any sensible value is a model.
MEANT = {"rope_theta", "rope_parameters", "rms_norm_eps", "hidden_act", "max_position_embeddings", "rope_scaling"}


def _loaded_right(good: Any, found: Any, change: Change) -> str | None:
    if not all(map(math.isfinite, found["logits"])):
        return "outputs that are no numbers"
    if not any(found["logits"]):
        return "outputs that are all zero"
    of_config = change.file == "config.json" and change.at is not None
    if found["logits"] != good["logits"] and of_config and not set(map(str, change.at or ())) & MEANT:
        return "other outputs than the weights'"
    return _ids_right(good, found, change)


def _weights_right(good: Any, found: Any, change: Change) -> str | None:
    """Other bytes of a weight are another model; what stands beside the weights is not."""
    if change.file.endswith(".json") and found["logits"] != good["logits"]:
        return "other outputs than the weights'"
    return None if all(map(math.isfinite, found["logits"])) else "outputs that are no numbers"


def _plan_right(good: Any, found: Any, change: Change) -> str | None:
    wrong = sensible(found)
    if wrong is None and not all(n > 0 for n in found[:2]):
        return "a model without weights"
    return wrong


# --- dialogues, GGUF --------------------------------------------------------------------------------------------------


def _chats(folder: Path) -> None:
    from tests.chats import LAST_THINKS, write_chats
    from tests.tiny import word_tokenizer

    word_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text(LAST_THINKS)
    write_chats(folder / "chats.jsonl", 6)


def _rendered(folder: Path) -> Any:
    """What `plan` and `prune` make of dialogues: read, written by the template, packed."""
    from compress.data.dialogues import read_dialogues, render
    from compress.data.text import pack_dialogues
    from compress.models.reading import load_tokenizer

    found, tokenizer = read_dialogues([str(folder / "chats.jsonl")]), load_tokenizer(folder)
    texts = [render(dialogue, tokenizer).text for dialogue in found]
    return {"texts": texts, "ids": pack_dialogues(found, tokenizer, 32, 2, "the dialogues").ids.tolist()}


def _rendered_right(good: Any, found: Any, change: Change) -> str | None:
    for text in found["texts"]:
        text.encode()
    return _ids_right(good, {"ids": [i for row in found["ids"] for i in row]}, change)


def _gguf(folder: Path) -> None:
    from tests.models.test_quantised import gguf_model

    gguf_model(folder / "model.gguf")


def _gguf_read(folder: Path) -> Any:
    from compress.language.setup import quiet
    from compress.models import quantised
    from compress.models.sources import resolve

    quiet()
    shapes = quantised.shapes(folder / "model.gguf")
    cache = folder.parent / "cache"
    before = os.environ.get("COMPRESS_CACHE")
    os.environ["COMPRESS_CACHE"] = str(cache)
    try:
        found = resolve(str(folder / "model.gguf")).folder
        return {"shapes": {k: list(v) for k, v in sorted(shapes.items())}, **_loaded(found)}
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        if before is None:
            del os.environ["COMPRESS_CACHE"]
        else:
            os.environ["COMPRESS_CACHE"] = before


# --- reports, seals, folders ------------------------------------------------------------------------------------------


def _report(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from compress.run.folder import fingerprint
        from tests.reports import sample

        report = sample(name)
        report.pop("sha256", None)
        (folder / "report.json").write_text(json.dumps({**report, "sha256": fingerprint(report)}))

    return make


def _stamp(folder: Path) -> None:
    """The report's hash fits whatever it says: its author wrote it so."""
    from compress.run.folder import fingerprint

    path = folder / "report.json"
    report = json.loads(path.read_bytes()) if path.is_file() else None
    if isinstance(report, dict) and "sha256" in report and path.read_bytes().count(b"sha256") < 400:
        pairs = json.loads(path.read_bytes(), object_pairs_hook=list)
        if len(dict(pairs)) == len(pairs):
            report.pop("sha256")
            path.write_text(json.dumps({**report, "sha256": fingerprint(report)}))


def _shown(folder: Path) -> Any:
    """What `compress card` makes of a report, and what `verify` says of it."""
    from compress.claims.verify import _own_report
    from compress.verbs.common import card

    shutil.rmtree(folder.parent / "card", ignore_errors=True)
    card(folder, folder.parent / "card")
    _own_report(folder)
    places = [folder.parent / "card" / name for name in ("README.md", "report.html")]
    return {"card": places[0].read_text("utf-8"), "page": places[1].stat().st_size}


def _shown_right(good: Any, found: Any, change: Change) -> str | None:
    if len(found["card"]) > 3_000_000 or found["page"] > 20_000_000:
        return "a card beyond all reading"
    return None


def _sealed(folder: Path) -> None:
    from compress.run.folder import Run

    with Run.open(folder / "run") as run:
        run.stage("plan", {"a": 1}, lambda place: (place / "plan.json").write_text('{"x": 1}') and None)  # type: ignore[func-returns-value]
    made = folder / "run" / "plan"
    shutil.copytree(made, folder / "sealed")


def _unsealed(folder: Path) -> Any:
    from compress.run.seals import verify_seal

    return verify_seal(folder / "sealed")


def _one_of_our_own(good: Any, found: Any, change: Change) -> str | None:
    return "what was changed was taken"


def _built(folder: Path) -> None:
    from compress.run.cache import sha256_of

    (folder / "model.onnx").write_bytes(b"x" * 100)
    facts = {
        "format": "ort", "precision": "fp32", "bytes": {"model.onnx": 100},
        "sha256": {"model.onnx": sha256_of(folder / "model.onnx")}, "components": {"model": {}}, "seconds": 1.0,
    }  # fmt: skip
    (folder / "ort.json").write_text(json.dumps(facts))


def _described(folder: Path) -> Any:
    from compress.exporters.formats import describe

    return describe(folder, "ort")


def _network(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from compress.models.zoo import build

    arguments = {"depth": 8, "width": 4, "classes": 3}
    torch.manual_seed(0)
    model = build("resnet", arguments).eval()
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        out = model(x)
    facts = {
        "network": "resnet", "arguments": arguments, "input": [3, 12, 12], "mean": [0.4] * 3, "std": [0.3] * 3,
        "widths": {}, "tasks": [{"name": "class", "kind": "classes", "classes": ["a", "b", "c"]}],
    }  # fmt: skip
    (folder / "network.json").write_text(json.dumps(facts))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    save_file({"input": x, "output.class": out}, folder / "fingerprint.safetensors")


def _job_network(folder: Path) -> None:
    """The same as a job saves it: inputs by name, and outputs that are no task's."""
    from safetensors.torch import load_file, save_file

    _network(folder)
    facts = json.loads((folder / "network.json").read_text())
    ports = {"form": "dict", "inputs": {"x": {"shape": facts.pop("input"), "dtype": "float32"}}}
    kept = {k: v for k, v in facts.items() if k not in ("mean", "std")}
    tasks = [{"name": "output", "kind": "output", "classes": []}]
    (folder / "network.json").write_text(json.dumps({**kept, **ports, "tasks": tasks}))
    held = load_file(folder / "fingerprint.safetensors")
    save_file({"input.x": held["input"], "output.output": held["output.class"]}, folder / "fingerprint.safetensors")


def _reloaded(folder: Path) -> Any:
    from compress.data.inputs import inputs_by_name
    from compress.verbs.network import _load

    loaded = _load(folder, None)
    return {
        "facts": loaded.facts,
        "inputs": sum(x.double().sum().item() for x in inputs_by_name(loaded.inputs).values()),
        "parameters": loaded.found["parameters"],
    }


def _reloaded_right(good: Any, found: Any, change: Change) -> str | None:
    if change.file == "network.json":
        if found["parameters"] != good["parameters"]:
            return "another network than the weights'"
        return as_it_was_put(good["facts"], found["facts"], change)
    return None


def _text_plan(folder: Path) -> None:
    import torch

    from compress.language.plan import BlockPlan, Plan

    blocks = tuple(BlockPlan((0, 1, 5, 6), (0, 2, 5)) for _ in range(2))
    Plan(blocks, {"blocks.0.down": torch.ones(40, 3)}, {"sparsity": 0.3}).save(folder)


def _text_planned(folder: Path) -> Any:
    from compress.language.plan import Plan
    from compress.models.families.base import BlockGeometry, Geometry

    plan = Plan.load(folder)
    plan.check(Geometry(tuple(BlockGeometry(40, 10, 2, 8, 48) for _ in range(2)), 300, True))
    return {"blocks": [[list(b.heads), list(b.neurons)] for b in plan.blocks], "meta": plan.meta}


def _indices_right(good: Any, found: Any, change: Change) -> str | None:
    if not all(type(i) is int for block in found["blocks"] for part in block for i in part):
        return "indices that are no whole numbers"
    return None if isinstance(found["meta"], dict) else "meta that is no object"


# --- data -------------------------------------------------------------------------------------------------------------


def _text(folder: Path) -> None:
    from tests.tiny import prose

    (folder / "a.txt").write_text(prose(20))


def _documents(folder: Path) -> Any:
    from compress.data.documents import load_documents
    from compress.schema.recipe import SourceSpec

    return load_documents(SourceSpec(files=[str(folder / "*.txt")]), "calibration")


def _text_right(good: Any, found: Any, change: Change) -> str | None:
    for document in found:
        document.encode()
    return None


def _spec(**more: Any) -> Any:
    from compress.schema.sections import DataSpec

    return DataSpec(**more)


def _folder_data(**more: Any) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        import torch

        from compress.data.images import load

        splits = load(_spec(folder=folder, **more))
        found: dict[str, Any] = {"tasks": [[t.name, t.kind, list(t.classes)] for t in splits.tasks]}
        for name in ("train", "calibration", "test"):
            split = getattr(splits, name)
            every = split.inputs[torch.arange(len(split))]
            found[name] = {
                "samples": len(split),
                "inputs": every.double().sum().item(),
                "ready": splits.prepare(every).double().abs().max().item(),
                **{
                    k: [v.double().min().item(), v.double().max().item(), v.double().sum().item()]
                    for k, v in split.targets.items()
                },
            }
        return found

    return read


def _data_right(good: Any, found: Any, change: Change) -> str | None:
    for name in ("train", "calibration", "test"):
        split = found[name]
        if not all(map(math.isfinite, (split["inputs"], split["ready"]))) or split["ready"] > 1e7:
            return f"inputs of {name} go up to {split['ready']}"
        for task, kind, classes in found["tasks"]:
            least, most, total = split[task]
            if not all(map(math.isfinite, (least, most, total))):
                return f"targets of {name} that are no numbers"
            if kind == "classes" and not 0 <= least <= most < len(classes):
                return f"labels of {name} from {least} to {most}, and {len(classes)} classes"
            if kind == "labels" and not (most == 255 or most < len(classes)):
                return f"labels of {name} up to {most}, and {len(classes)} classes"
            if kind == "boxes" and (least < -1 or most > max(2, len(classes))):
                return f"boxes of {name} from {least} to {most}, and {len(classes)} classes"
    return None


def _images(folder: Path) -> None:
    write_class_folders(folder, 12, 6)
    from PIL import Image

    place = folder / "train" / "square"
    first = sorted(place.glob("*.png"))
    for suffix, path in zip((".jpg", ".tif", ".bmp", ".webp", ".ppm"), first, strict=False):
        Image.open(path).save(place / f"odd{suffix}")
    (place / "odd.png").write_bytes(first[0].read_bytes()[:-12] + first[0].read_bytes()[-12:])


def _yolo(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        (folder / "images" / part).mkdir(parents=True)
        (folder / "labels" / part).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(
                folder / "images" / part / f"{i}.png"
            )
            (folder / "labels" / part / f"{i}.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.25 0.75 0.1 0.2\n")
    (folder / "data.yaml").write_text("train: images/train\nnames: {0: person, 1: car}\nnc: 2\n")


def _coco(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    (folder / "annotations").mkdir()
    for part, count in (("train2017", 8), ("val2017", 4)):
        (folder / part).mkdir()
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / part / f"{i}.png")
        facts = {
            "info": {"year": 2017},
            "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 16} for i in range(count)],
            "annotations": [
                {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [2, 3, 8, 6.5], "iscrowd": 0, "area": 52}
                for i in range(count)
            ],
            "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}],
        }
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(facts))


def _har(folder: Path) -> None:
    write_har(folder, people=3, windows=3)


def _cifar(folder: Path) -> None:
    write_cifar10(folder, 4)


def _nyud(folder: Path) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("images", "segmentation", "depth", "normals", "edges", "gt_sets"):
        (folder / name).mkdir()
    for i in range(8):
        Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(folder / "images" / f"n{i}.png")
        Image.fromarray(draw.integers(0, 41, (12, 16), dtype=np.uint8)).save(folder / "segmentation" / f"n{i}.png")
        np.save(folder / "depth" / f"n{i}.npy", draw.uniform(0.5, 5, (12, 16)).astype(np.float32))
        np.save(folder / "normals" / f"n{i}.npy", draw.normal(size=(12, 16, 3)).astype(np.float32))
        Image.fromarray((draw.integers(0, 2, (12, 16)) * 255).astype(np.uint8)).save(folder / "edges" / f"n{i}.png")
    (folder / "gt_sets" / "train.txt").write_text("n0\nn1\nn2\nn3\nn4\n")
    (folder / "gt_sets" / "val.txt").write_text("n5\nn6\nn7\n")


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx(outside: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import onnx
        from onnx import TensorProto as T
        from onnx import helper, numpy_helper

        draw = np.random.default_rng(0).standard_normal
        held = {"W": draw((16, 12)).astype(np.float32), "E": draw((9, 16)).astype(np.float32)}
        graph = helper.make_graph(
            [
                helper.make_node("Gather", ["E", "ids"], ["e"]),
                helper.make_node("Add", ["e", "x"], ["s"]),
                helper.make_node("MatMul", ["s", "W"], ["y"]),
            ],
            "g",
            [
                helper.make_tensor_value_info("ids", T.INT64, ["batch", 4]),
                helper.make_tensor_value_info("x", T.FLOAT, ["batch", 4, 16]),
            ],
            [helper.make_tensor_value_info("y", T.FLOAT, ["batch", 4, 12])],
            [numpy_helper.from_array(v, k) for k, v in held.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        more: dict[str, Any] = (
            {"save_as_external_data": True, "size_threshold": 0, "location": "net.data"} if outside else {}
        )
        onnx.save(model, folder / "net.onnx", **more)
        np.savez(folder / "in.npz", ids=np.array([[0, 1, 2, 8]]), x=draw((1, 4, 16)).astype(np.float32))

    return make


def _genai(folder: Path) -> None:
    _onnx(True)(folder)
    inputs = {"past_key_names": "past.%d", "input_ids": "ids"}
    decoder = {"filename": "net.onnx", "head_size": 8, "session_options": {"log_id": "x"}, "inputs": inputs}
    settings = {"model": {"type": "decoder", "context_length": 64, "eos_token_id": [2, 5], "decoder": decoder}}
    (folder / "genai_config.json").write_text(json.dumps({**settings, "search": {"max_length": 64}}))


def _genai_checked(folder: Path) -> Any:
    """What `run` and `bench` read of a folder before ONNX Runtime GenAI is given it."""
    from compress.exporters.bench.transport import artefact
    from compress.exporters.genai import check_folder

    return {"context": check_folder(folder), "files": [str(p.name) for p in artefact(folder).files]}


def _graph(folder: Path) -> Any:
    """What `export`, `gate` and `bench` read of an ONNX file before anything is built of it."""
    from compress.exporters import gate_models, tensors
    from compress.exporters.formats import random_feed, read_graph

    graph = read_graph(folder / "net.onnx")
    found = gate_models.find(str(folder / "net.onnx"))
    feed = random_feed(graph, {"batch": 1})
    copied = folder.parent / "gathered.onnx"
    tensors.gather(folder / "net.onnx", copied)
    return {"in": [[p.name, list(p.shape), p.dtype] for p in graph.inputs], "bytes": found.bytes,
            "fed": sorted(feed), "ops": graph.ops}  # fmt: skip


def _inputs(folder: Path) -> Any:
    from compress.exporters.command import read_inputs
    from compress.exporters.formats import read_graph

    found = read_inputs(folder / "in.npz", read_graph(folder / "net.onnx"))
    return {k: [list(v.shape), str(v.dtype), v.ravel().tolist()] for k, v in found.items()}


def _inputs_right(good: Any, found: Any, change: Change) -> str | None:
    return sensible(found) or (None if [v[1] for v in found.values()] == ["int64", "float32"] else "other types")


def _exported(folder: Path) -> Any:
    """`compress export`, to the end."""
    from tests.command import compress, one_error

    out = folder.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    ran = compress(
        "export", folder / "net.onnx", "--inputs", folder / "in.npz", "--format", "ort", "--out", out, "--json"
    )
    if ran.code:
        from compress.errors import CompressError

        one_error(ran, ran.code)
        assert ran.code in (1, 2), ran
        what, where, fix = (line.split(":", 1)[1].strip() for line in ran.err[ran.err.index("error: ") :].splitlines())
        raise CompressError(what, where, fix)
    return json.loads(ran.out)["formats"]["ort"]["parity"]


READERS: dict[str, Reader] = {}


def _add(name: str, make: Any, files: dict[str, FORMS], read: Any, judge: Any, **more: Any) -> None:
    READERS[name] = Reader(name, make, files, read, judge, **more)


for _reader in (
    _settings("recipe-tyr", "recipe.yaml", RECOVERED.replace("FOLDER", "text"), _recipe),
    _settings("recipe-pagcp", "recipe.yaml", PAGCP, _recipe),
    _settings("recipe-global-mp", "recipe.yaml", GLOBAL_MP, _recipe),
    _settings("target", "target.yaml", TARGET, _target),
    _settings("gate-file", "gate.yaml", GATE, _gate),
    _settings("machine-file", "machine.yaml", MACHINE, _machine, _machine_right),
):
    READERS[_reader.name] = _reader

_add("config-planned", _model(), {"config.json": "json"}, _planned, _plan_right)
_add("config-seeing", _seeing, {"config.json": "json"}, _planned, _plan_right)
_add(
    "config-loaded",
    _model(),
    {"config.json": "json", "generation_config.json": "json"},
    _loaded,
    _loaded_right,
    optional=frozenset(("generation_config.json",)),
)
_add(
    "tokenizer",
    _model(),
    {"tokenizer.json": "json", "tokenizer_config.json": "json"},
    _tokens,
    _ids_right,
    optional=frozenset(("tokenizer_config.json",)),
)
_add("weights", _model(), {"model.safetensors": "header"}, _loaded, _weights_right)
_add(
    "weights-index",
    _model(True),
    {"model.safetensors.index.json": "json", "model-00001-of-00007.safetensors": "header"},
    _loaded,
    _weights_right,
)
for _name in ("tyr", "global-mp-text", "global-mp-network", "pagcp"):
    _add(f"report-{_name}", _report(_name), {"report.json": "json"}, _shown, _shown_right, before=_stamp)
_add("seal", _sealed, {"sealed/seal.json": "json", "sealed/plan.json": "json"}, _unsealed, _one_of_our_own)
_add("format-facts", _built, {"ort.json": "json", "model.onnx": "bytes"}, _described, as_it_was_put)
_add(
    "network",
    _network,
    {"network.json": "json", "model.safetensors": "header", "fingerprint.safetensors": "header"},
    _reloaded,
    _reloaded_right,
)
_add(
    "network-of-a-job",
    _job_network,
    {"network.json": "json", "fingerprint.safetensors": "header"},
    _reloaded,
    _reloaded_right,
)
_add("plan-files", _text_plan, {"plan.json": "json", "plan.safetensors": "header"}, _text_planned, _indices_right)
_add("text", _text, {"a.txt": "text"}, _documents, _text_right)
_add(
    "images",
    _images,
    {f"train/square/odd{s}": "bytes" for s in (".png", ".jpg", ".tif", ".bmp", ".webp", ".ppm")},
    _folder_data(size=12),
    _data_right,
    optional=frozenset(f"train/square/odd{s}" for s in (".png", ".jpg", ".tif", ".bmp", ".webp", ".ppm")),
)
_add(
    "yolo",
    _yolo,
    {"labels/train/0.txt": "text", "labels/val/0.txt": "text", "data.yaml": "yaml", "images/train/0.png": "bytes"},
    _folder_data(size=16),
    _data_right,
    optional=frozenset(("labels/train/0.txt", "labels/val/0.txt", "data.yaml")),
)
_add(
    "coco",
    _coco,
    {"annotations/instances_train2017.json": "json", "annotations/instances_val2017.json": "json"},
    _folder_data(size=16),
    _data_right,
    also=("2017/",),
    optional=frozenset(("annotations/instances_val2017.json",)),
)
_add(
    "har",
    _har,
    {
        "train/y_train.txt": "text",
        "train/subject_train.txt": "text",
        "test/y_test.txt": "text",
        "train/Inertial Signals/body_acc_x_train.txt": "text",
    },
    _folder_data(),
    _data_right,
)
_add("cifar", _cifar, {"data_batch_1.bin": "bytes", "test_batch.bin": "bytes"}, _folder_data(), _data_right)
_add(
    "nyud",
    _nyud,
    {
        "gt_sets/train.txt": "text",
        "gt_sets/val.txt": "text",
        "depth/n0.npy": "bytes",
        "normals/n5.npy": "bytes",
        "segmentation/n1.png": "bytes",
        "edges/n2.png": "bytes",
    },
    _folder_data(tasks=["segmentation", "depth", "normals", "edges"]),
    _data_right,
    also=("the file of",),
    optional=frozenset(("gt_sets/val.txt",)),
)
_add("onnx", _onnx(False), {"net.onnx": "bytes"}, _graph, anything)
_add("onnx-outside", _onnx(True), {"net.onnx": "bytes", "net.data": "bytes"}, _graph, anything)
_add("genai", _genai, {"genai_config.json": "json", "net.onnx": "bytes"}, _genai_checked, anything)
_add(
    "dialogues",
    _chats,
    {"chats.jsonl": "text", "chat_template.jinja": "text"},
    _rendered,
    _rendered_right,
    also=("the template is", "the dialogues"),
)
_add("gguf", _gguf, {"model.gguf": "bytes"}, _gguf_read, _weights_right)
_add("npz", _onnx(False), {"in.npz": "bytes"}, _inputs, _inputs_right)
_add("export", _onnx(False), {"net.onnx": "bytes", "in.npz": "bytes"}, _exported, anything)
