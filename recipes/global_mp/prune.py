"""Global MP on a language model's files: which layers, which masks, and the same files with zeros in place.

No weight is trained, and no model is built: the threshold is found and the masks are applied tensor by tensor, as they
come from the safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError, UsageError
from compress.recipes.global_mp import GlobalMPOptions
from compress.recipes.global_mp.floors import budget as exact_budget
from compress.recipes.global_mp.magnitude import Cut, Source, find_cuts, safetensors_source
from compress.recipes.global_mp.masks import load_masks, masked, save_masks
from compress.recipes.global_mp.pattern import PATTERN, check_two_four, fits, two_four_mask
from compress.run.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

MASKS = "masks.safetensors"
PLAN = "plan.json"


def language_layers(config: Any, files: Sequence[Path], options: GlobalMPOptions) -> dict[str, list[int]]:
    """The layers of a causal language model that are pruned: weight name -> shape, (out, in) each.

    They are all linear layers but the output layer, and the embeddings and the output layer where the options ask for
    them (where the two are tied they are one weight). Norms and biases are never pruned.

    Raises:
        UsageError: a pattern of ``skip`` matches no layer, or skips all.
        CompressError: the files lack a layer that the config says the model has.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) and module is not head)
        or (options.head and module is head)
        or (options.embeddings and module is embeddings)
    ]
    shapes = shapes_of(files)
    if config.tie_word_embeddings:
        # The files hold a tied weight once, under one of its two names.
        ends = {f"{name}.weight" for name, module in model.named_modules() if module in (head, embeddings)}
        stored = ends & shapes.keys()
        if ends & set(names) and stored:
            names = [name for name in names if name not in ends] + [min(stored)]
    for pattern in options.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} matches no prunable layer",
                where="global-mp.skip",
                fix=f"the layers are {', '.join(names[:4])} and so on",
            )
    names = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in options.skip)]
    if not names:
        raise UsageError("every layer is skipped", where="global-mp.skip", fix="leave some layers to prune")
    missing = [name for name in names if name not in shapes]
    if missing:
        raise CompressError(
            f"the weight files lack {len(missing)} layers, the first is {missing[0]}",
            where=str(files[0].parent),
            fix="weights and config.json must belong together",
        )
    return {name: shapes[name] for name in names}


def shapes_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """The shape of every tensor in safetensors files, of which only the heads are read."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found.update({name: list(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
        except SafetensorError as e:
            raise CompressError(
                f"the weight file is damaged or cut short: {e}", where=str(path), fix="fetch or copy it again"
            ) from e
    return found


def budget(
    shapes: Mapping[str, Sequence[int]], sparsity: float, options: GlobalMPOptions
) -> tuple[int, dict[str, int]]:
    """How many weights go, and the floor of every layer; checked to be feasible, before any weight is read.

    Raises:
        UsageError, CompressError: see `floors`; or the pattern and the sparsity contradict each other.
    """
    from math import prod

    sizes = {name: prod(shape) for name, shape in shapes.items()}
    if options.pattern == PATTERN:
        if sparsity != 0.5:
            raise UsageError(
                f"the pattern {PATTERN} prunes half, not {sparsity:g}",
                where="sparsity",
                fix="set sparsity to 0.5, or pattern to unstructured",
            )
        return sum(sizes[name] // 2 for name, shape in shapes.items() if _fours(shape)), dict.fromkeys(sizes, 0)
    return exact_budget(sizes, sparsity, options.floor, options.floors)


def cuts_of(files: Sequence[Path], floors: Mapping[str, int], prune: int, label: str) -> dict[str, Cut]:
    """The cut of every layer named in ``floors``."""
    with Progress(3 * len(floors), label) as bar:
        return find_cuts(_watched(safetensors_source(files, floors), bar), prune, floors)


def write_plan(
    folder: Path,
    files: Sequence[Path],
    shapes: Mapping[str, Sequence[int]],
    sparsity: float,
    options: GlobalMPOptions,
    weights: str,
) -> None:
    """Writes the masks, and plan.json: the threshold, and what every layer loses and may not lose.

    Args:
        weights: the hash of the model, which the masks are bound to.
    """
    prune, floors = budget(shapes, sparsity, options)
    source = safetensors_source(files, shapes)
    pruned: dict[str, int] = {}
    threshold: float | None = None
    if options.pattern == PATTERN:
        _refuse_not_finite(source)

        def make() -> Iterator[tuple[str, Tensor]]:
            for name, weight in source():
                yield name, two_four_mask(weight)
    else:
        cuts = cuts_of(files, floors, prune, "threshold, layers")
        threshold = max(cut.threshold for cut in cuts.values())

        def make() -> Iterator[tuple[str, Tensor]]:
            for name, weight in source():
                yield name, cuts[name].mask(weight)

    def counted() -> Iterator[tuple[str, Tensor]]:
        with Progress(len(shapes), "masks, layers") as bar:
            for name, mask in make():
                pruned[name] = mask.numel() - int(mask.count_nonzero())
                yield name, mask
                bar.update(1)

    save_masks(folder / MASKS, counted(), weights)
    if sum(pruned.values()) != prune:
        raise AssertionError(f"{sum(pruned.values())} pruned, not {prune}")
    rows = [
        {"name": name, "shape": list(shape), "pruned": pruned[name], "floor": floors[name]}
        for name, shape in shapes.items()
    ]
    head = {"schema_version": 1, "pattern": options.pattern, "threshold": threshold, "pruned": prune}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    (folder / PLAN).write_text(f'{json.dumps(head, indent=1)[:-2]},\n "layers": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def read_masks(folder: Path, weights: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The masks that `write_plan` wrote for this model."""
    return load_masks(folder / MASKS, weights, shapes)


def write_masked(
    files: Sequence[Path], masks: Mapping[str, Tensor], folder: Path, pattern: str
) -> dict[str, tuple[int, int]]:
    """Writes every weight file again into ``folder``, with zeros in place.

    Returns:
        The non-zeros of every tensor, before and after.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    nonzero: dict[str, tuple[int, int]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            own = file.metadata()
        for name, dense in tensors.items():
            tensors[name] = masked(dense, masks[name]) if name in masks else dense
            nonzero[name] = int(dense.count_nonzero()), int(tensors[name].count_nonzero())
        if pattern == PATTERN:
            check_two_four({name: tensors[name] for name in tensors if name in masks})
        save_file(tensors, folder / path.name, metadata=own)
    return nonzero


def apply_in_place(model: Any, masks: Mapping[str, Tensor]) -> None:
    """Sets the masked weights of a model in memory to zero."""
    import torch

    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0.0)


def _fours(shape: Sequence[int]) -> bool:
    import torch

    return fits(torch.empty(tuple(shape), device="meta"))


def _refuse_not_finite(source: Source) -> None:
    # The counting refuses what is not finite; the pattern counts nothing.
    find_cuts(source, 0)


def _watched(source: Source, bar: Progress) -> Source:
    def read() -> Iterator[tuple[str, Tensor]]:
        for name, weight in source():
            yield name, weight
            bar.update(1)

    return read
