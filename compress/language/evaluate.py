"""How good a model is: perplexity on held-out windows, and lm-evaluation-harness tasks through the extra [eval]."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.special import around
from compress.distribution import install_line
from compress.errors import CompressError
from compress.models.decoder import capped, head, last_hidden
from compress.processes.distributed import device, gather, share
from compress.run.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 4


def perplexity(
    model: Any, windows: Tensor, label: str = "perplexity", begin: int = 0, own: Tensor | None = None
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood of every token but each window's first. Processes divide the windows.

    Args:
        windows: token ids (n, length) int64.
        begin: of a window's first tokens, those that the tokenizer put there: they are read and not scored.
        own: (n, length) bool, which of the others are scored (`compress.data.text.Packed`); all by default.

    Returns:
        ``ppl``, ``nll`` (nats per token, summed in float64) and ``tokens``.

    Raises:
        CompressError: the model gives NaN.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from compress.models.streaming import is_streamed

    scored = max(1, begin)  # the first position that is
    slices = [slice(i, i + BATCH) for i in range(0, len(windows), BATCH)]
    mine = [slices[i] for i in share(len(slices))]
    found: list[tuple[float, int]] = []
    with torch.no_grad(), Progress(len(mine), label) as bar:
        device = model.get_input_embeddings().weight.device
        ids = windows.to(device)
        # Where blocks are read from disk, once for all windows.
        hidden: Any = last_hidden(model, ids[mine[0].start : mine[-1].stop]) if mine and is_streamed(model) else None
        for s in mine:
            logits: Any = model(input_ids=ids[s], use_cache=False).logits if hidden is None else None
            for k, target in enumerate(ids[s]):
                counted = slice(None) if own is None else own[s.start + k, scored:].to(device)
                row = logits[k] if hidden is None else capped(model, head(model, hidden[s.start - mine[0].start + k]))
                losses = cross_entropy(row[scored - 1 : -1].float(), target[scored:], reduction="none")[counted]
                found.append((float(losses.double().sum()), len(losses)))
            bar.update(1)
    # Summed in the order of the windows, whichever process had them.
    every = gather(found)
    total, count = math.fsum(nll for nll, _ in every), sum(n for _, n in every)
    if not math.isfinite(total):
        raise CompressError(
            "the model's logits are not finite", where="evaluation", fix="check it with `compress verify`"
        )
    nll = total / count
    return {"ppl": math.exp(min(nll, 700.0)), "nll": nll, "tokens": count}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def harness_tasks(folder: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """Runs lm-evaluation-harness tasks on a saved model: one row a task and metric.

    What the model's tokenizer puts in front of a text, the harness does too.

    Raises:
        CompressError: the harness is not installed, a task is unknown, or it cannot do as the tokenizer does.
    """
    try:
        import lm_eval
    except ImportError:
        raise CompressError(
            "lm-evaluation-harness is not installed",
            where="evaluation.tasks",
            fix=f"{install_line('eval')}, or leave evaluation.tasks empty",
        ) from None
    from compress.language.checkpoint import remote_source
    from compress.models.folder import seen
    from compress.models.reading import load_tokenizer

    before, behind = around(load_tokenizer(folder))
    if before and behind:
        # Its one switch is for both, and a question that is ended has no answer behind it.
        raise CompressError(
            "the tokenizer puts tokens in front of a text and behind it; lm-evaluation-harness adds both or none",
            where="evaluation.tasks",
            fix="leave evaluation.tasks empty",
        )
    known = lm_eval.tasks.TaskManager()
    unknown = [t for t in tasks if t not in known.all_tasks]
    if unknown:
        raise CompressError(f"unknown task {unknown[0]!r}", where="evaluation.tasks", fix="see `lm_eval ls tasks`")
    place = device().type
    code = remote_source(folder)
    with seen(folder, code=code) as private:
        arguments = {
            "pretrained": str(private),
            "dtype": "float32",
            "trust_remote_code": code is not None,
            "add_bos_token": bool(before),
            # accelerate's dispatch over all GPUs.
            "parallelize": place == "cuda",
        }
        found = lm_eval.simple_evaluate(model="hf", model_args=arguments, tasks=tasks, device=place)
    return [
        {"task": task, "metric": metric.split(",")[0], "value": value}
        for task, metrics in sorted(found["results"].items())
        for metric, value in metrics.items()
        if isinstance(value, float) and not metric.split(",")[0].endswith("_stderr")
    ]
