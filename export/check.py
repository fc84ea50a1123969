"""An export that is believed: written, compared with torch output by output, and its greedy text with torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import CompressError
from compress.exporters.onnx import export_llm
from compress.exporters.parity import check_llm, greedy_agrees
from compress.models.decoder import blocks
from compress.run.progress import say

if TYPE_CHECKING:
    from compress.schema.recipe import ExportSection


def write_checked(model: Any, tokenizer: Any, folder: Path, spec: ExportSection, vocab: int) -> dict[str, Any]:
    """Exports ``model`` into the empty ``folder``; returns the facts that also go into export.json.

    Raises:
        CompressError: the export or a check failed.
    """
    made = export_llm(model, folder)
    try:
        parity = check_llm(model, folder, tolerance=spec.tolerance, vocab=vocab)
    except CompressError as e:
        if made.traced == len(blocks(model)):
            raise
        # Blocks can differ in what no attribute says; then the graphs of them all are traced.
        say(f"one block's graph is not another's ({e.what}): every one is traced")
        for path in folder.iterdir():
            path.unlink()
        made = export_llm(model, folder, each=True)
        parity = check_llm(model, folder, tolerance=spec.tolerance, vocab=vocab)
    facts = {
        "bytes": made.bytes,
        "seconds": round(made.seconds, 1),
        "largest_difference": max(parity["outputs"].values()),
        "outputs_compared": len(parity["outputs"]),
        "tolerance": parity["tolerance"],
        "greedy": greedy_agrees(model, folder, tokenizer, spec.prompt, spec.greedy_tokens),
    }
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts
