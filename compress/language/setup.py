"""What a run works on: the model that was found, the recipe, and the text, all checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from typing_extensions import TypeVar

from compress import __version__
from compress.language.computing import Computing
from compress.models import decoder
from compress.run.folder import Run
from compress.schema.recipe import Recipe, TextRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from compress.language.plan import Plan
    from compress.models.families.base import Costs, Family, Geometry
    from compress.models.sources import Resolved


# A model is held in memory where it takes at most this share of what a process can have: what is made of it, and
# activations, want the rest.
RESIDENT_SHARE = 0.3

AnyText = TypeVar("AnyText", bound=TextRecipe, default=Recipe)


@dataclass
class Setup(Generic[AnyText]):
    """A model and a recipe, checked; the weights are read when they are first asked for."""

    resolved: Resolved
    recipe: AnyText
    family: Family
    geometry: Geometry
    costs: Costs
    config: Any
    weights: str  # hash
    computing: Computing = field(default_factory=Computing)  # settled when the run folder is open

    def computed(self) -> dict[str, str]:
        """The type that forwards are computed in, among what decides a stage; nothing where it is float32."""
        return {"compute": self.computing.type} if self.computing.type != "float32" else {}

    @cached_property
    def tokenizer(self) -> Any:
        from compress.models.reading import load_tokenizer

        return load_tokenizer(self.resolved.folder)

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """The token ids that the tokenizer puts in front of a text: every window begins with them."""
        from compress.data.special import opening

        return opening(self.tokenizer)

    @cached_property
    def model(self) -> Any:
        """The dense model in float32, every weight checked to be finite; streamed where it would not fit."""
        from compress.models.reading import check_weights

        check_weights(self.resolved.folder)
        return self.load(self.resolved.folder)

    def load(self, folder: Path) -> Any:
        """A model in float32 on this process's device, held or streamed."""
        from compress.models.reading import load_model
        from compress.models.streaming import stream_model
        from compress.processes.distributed import device

        if self.streamed:
            memory = self.recipe.memory
            return stream_model(folder, self.family, memory.cache_blocks, device(), memory.shard)
        return load_model(folder, self.family).to(device())

    @cached_property
    def streamed(self) -> bool:
        """Whether blocks are read from disk when they are run, as the recipe says or as the memory asks for.

        The main process decides for all.
        """
        from compress.processes.distributed import available_bytes, device_bytes, main_says, world

        if self.recipe.memory.shard and world() > 1:
            return True
        if self.recipe.memory.stream is not None:
            return self.recipe.memory.stream
        return main_says(lambda: 4 * self.costs.total > RESIDENT_SHARE * min(available_bytes(), device_bytes()))

    def pruned(self, plan: Plan) -> tuple[Any, list[tuple[int, int, int]]]:
        """A sliced model, and (query heads, KV groups, neurons) of its blocks."""
        model = self._beside()
        plan.apply(model, self.family)
        return model, plan.counts(self.geometry)

    def masked(self, plan: Plan) -> Any:
        """A model of the same function at full shape."""
        model = self._beside()
        plan.mask(model, self.family)
        return model

    def as_saved(self, plan: Plan) -> Any:
        """The sliced model with the weights that it would have if it were saved, in the type the model is stored in."""
        from compress.models.streaming import as_stored

        return as_stored(self.pruned(plan)[0], self.stored_dtype)

    def _beside(self) -> Any:
        """A model whose blocks can be exchanged without the dense one's; all tensors are shared with it."""
        model = decoder.beside(self.model)
        layers = decoder.blocks(self.model)
        if not self.streamed:
            decoder.put_blocks(model, type(layers)(list(layers)))
        return model

    @cached_property
    def stored_dtype(self) -> Any:
        import torch

        named = getattr(self.config, "dtype", None)
        return named if isinstance(named, torch.dtype) else torch.float32


def quiet() -> None:
    """Stills the bars and warnings of the libraries: what a user should know is said by compress itself."""
    import logging
    import os

    # torchao, where it is installed, is imported by transformers whether it is used or not, and talks about it.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def prepare(model: str, recipe: AnyText) -> Setup[AnyText]:
    """Finds the model and checks that it can be pruned, before any weight is read."""
    from compress.language.limits import parse
    from compress.language.quantised import check as check_quantised
    from compress.language.recover import check as check_recovery
    from compress.models.families import family_for
    from compress.models.reading import load_config, refuse_ragged, weight_files, weights_hash
    from compress.models.sources import resolve

    quiet()
    if isinstance(recipe, Recipe):
        parse(recipe.budget or (), recipe.bench)  # before anything is fetched
    resolved = resolve(model)
    config = load_config(resolved.folder)
    family = family_for(config)
    refuse_ragged(resolved.folder)
    weight_files(resolved.folder)
    check_dialogues(resolved.folder, recipe)
    if isinstance(recipe, Recipe):
        check_recovery(recipe, family, config)
    if recipe.quantise is not None:
        check_quantised(recipe, family, config)
    return Setup(
        resolved, recipe, family, family.geometry(config), family.costs(config), config, weights_hash(resolved.folder)
    )


def outline(model: str, recipe: AnyText) -> Setup[AnyText]:
    """What `prepare` finds, from the configuration alone: no weight is fetched or read, so none can be asked for."""
    from compress.language.limits import parse
    from compress.language.quantised import check as check_quantised
    from compress.models.families import family_for
    from compress.models.sources import describe

    quiet()
    if isinstance(recipe, Recipe):
        parse(recipe.budget or (), recipe.bench)
    resolved, config = describe(model, tokenizer=bool(recipe.dialogues()))
    check_dialogues(resolved.folder, recipe)
    family = family_for(config)
    if recipe.quantise is not None:
        check_quantised(recipe, family, config)
    return Setup(resolved, recipe, family, family.geometry(config), family.costs(config), config, weights="")


def check_dialogues(folder: Path, recipe: TextRecipe) -> None:
    """Reads every line of the dialogues that a recipe names, and has the chat template write the first of each source.

    Raises:
        CompressError: a line is no dialogue, or there are fewer than two; the tokenizer has no chat template, or it
            refuses the dialogue.
    """
    from compress.data.dialogues import render
    from compress.data.documents import load_dialogues
    from compress.models.folder import has_tokenizer
    from compress.models.reading import load_tokenizer
    from compress.run.progress import say

    found = [load_dialogues(source, "calibration") for source in recipe.dialogues()]
    if not found:
        return
    if not has_tokenizer(folder) and not any(folder.glob("*.safetensors")):
        say("chat template: not checked, no tokenizer could be fetched")
        return
    tokenizer = load_tokenizer(folder)
    for dialogues in found:
        render(dialogues[0], tokenizer)


@dataclass
class Windows:
    """Token windows (n, length) int64: what is calibrated on, searched on, judged on in the run-off, and held out.

    ``begin``: the token ids that every one of them begins with, which are not scored; ``own``: (n, length) bool, which
    tokens of a held-out text are, where it is not all others."""

    calibration: Tensor
    search: Tensor
    evaluation: dict[str, Tensor]
    judging: Tensor | None = None
    begin: tuple[int, ...] = ()
    own: dict[str, Tensor] = field(default_factory=dict)


def set_aside(options: Any) -> tuple[int, int]:
    """(windows that are taken from the calibration text beside those calibrated on; of them, those judged on)."""
    judged = options.run_off.windows if options.run_off else 0
    return options.search.windows + judged, judged


def read_windows(setup: Setup, run: Run) -> Windows:
    """Reads and packs all text once; sealed in the run, so that a resumed run sees the same."""
    import torch

    from compress.data.text import (
        calibration_windows,
        held_out_of,
        held_out_tensors,
        keep_windows,
        kept_windows,
        packing_inputs,
    )

    recipe = setup.recipe
    wanted, judged = set_aside(recipe.options)

    def build(folder: Path) -> None:
        spec = recipe.calibration
        every = calibration_windows(spec.sources, setup.tokenizer, spec.windows + wanted, spec.length)
        # The windows searched on stand evenly among the others, and are taken out of them.
        at = torch.linspace(0, len(every) - 1, wanted).long()
        rest = torch.ones(len(every), dtype=torch.bool)
        rest[at] = False
        judging = torch.zeros(wanted, dtype=torch.bool)
        judging[torch.linspace(0, wanted - 1, judged).long()] = True
        tensors = {"calibration": every[rest], "search": every[at[~judging]], "judging": every[at[judging]]}
        judged_on = recipe.evaluation
        tensors |= held_out_tensors(judged_on.texts, setup.tokenizer, judged_on.windows, judged_on.length, every)
        _ = setup.model  # a fault in the weights is to be found before anything is sealed for them
        keep_windows(tensors, setup.begin, folder / "windows.safetensors")

    inputs = {
        "version": __version__,
        "weights": setup.weights,
        "search_windows": recipe.options.search.windows,
        **({"run_off_windows": judged} if judged else {}),
        **packing_inputs(setup.tokenizer, recipe.dialogues()),
        "calibration": recipe.calibration.model_dump(mode="json", exclude_none=True),
        "evaluation": recipe.evaluation.model_dump(mode="json", exclude_none=True, exclude={"tasks", "curve"}),
    }
    tensors, begin = kept_windows(run.stage("text", inputs, build) / "windows.safetensors")
    held_out = held_out_of(tensors, [text.name for text in recipe.evaluation.texts])
    length = recipe.options.search.length
    return Windows(
        tensors["calibration"],
        tensors["search"][:, :length],
        {name: packed.ids for name, packed in held_out.items()},
        tensors["judging"] if judged else None,
        begin,
        {name: packed.scored for name, packed in held_out.items() if packed.scored is not None},
    )


def fingerprint_of(windows: Windows) -> dict[str, str]:
    import hashlib

    parts = {"calibration": windows.calibration, "search": windows.search, "judging": windows.judging}
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]
        for name, tensor in parts.items()
        if tensor is not None
    }
