"""What is said of an explained speed-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report.stats import Found, against

GOAL = 0.8  # of the ideal speed-up; above it there is nothing to explain


MATTERS = 0.02  # share of the pruned network's time that a layer must miss to be named


OVERHEAD_SECONDS = 10e-6  # what ONNX Runtime spends on a node that does nothing, rounded up; measured on x86: 2 to 6 us


SMALL_SHARE = 0.3  # of the time in nodes that do next to nothing, from which that is said


def said_of(found: Mapping[str, Any]) -> Found:
    """What may be said of an explained speed-up as a whole; records of before had no rounds."""
    return against(found.get("ratio"), found["ideal"], found.get("ideal_bytes"))


def lines(found: Mapping[str, Any], most: int = 6) -> list[str]:
    """For a report or a card: what was reached, and one line a layer, worst first, where that is a finding."""
    whole = said_of(found)
    said = [whole.words]
    if whole.kind in ("unresolved", "beyond") or found["ratio"]["median"] >= GOAL * found["ideal"]:
        return said
    for f in found["findings"][:most]:
        said.append(
            f"{f['name']}: {1e3 * f['dense_seconds']:.3f} -> {1e3 * f['pruned_seconds']:.3f} ms"
            f" (its share would be {1e3 * f['ideal_seconds']:.3f}): {f['cause']}: {f['words']}; {f['fix']}"
        )
    left = found["findings"][most:]
    if left:
        said.append(f"and {len(left)} more layers, {1e3 * sum(f['missing'] for f in left):.3f} ms together")
    if found["added_seconds"] > MATTERS * found["pruned_seconds"]:
        said.append(
            f"{', '.join(found['added'][:4])}: {1e3 * found['added_seconds']:.3f} ms that the dense network does not"
            " have (the runtime changes the layout between layers): prune with round_to so that all keep one layout"
        )
    small = found["small"]
    if small["share"] > SMALL_SHARE:
        said.append(
            f"overhead: {small['nodes']} of {small['of']} nodes take under {1e6 * OVERHEAD_SECONDS:.0f} us each,"
            f" {100 * small['share']:.0f} % of the time, most of it for being started at all: measure a larger batch or"
            " a longer prompt, or remove whole layers"
        )
    if len(said) == 1:
        said.append("no single layer is at fault: each is a little above its share")
    return said
