"""Seconds of a decoder's export to ONNX with one block of each kind traced, and with every one, in one run.

PYTHONPATH=. python tools/bench_export.py smollm2-135m --out build/bench-export.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from compress.exporters.onnx import DECODE, PREFILL, export_llm
from compress.exporters.parity import check_llm
from compress.models.families import family_for
from compress.models.reading import load_config, load_model
from compress.models.sources import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    folder = resolve(given.model).folder
    model = load_model(folder, family_for(load_config(folder))).float()
    for each in (False, True):
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            made = export_llm(model, Path(place), each=each)
            seconds = time.monotonic() - began
            found = check_llm(model, Path(place), tolerance=1e-3, vocab=int(model.config.vocab_size))
            rows.append(
                {
                    "traced": made.traced,
                    "seconds": round(seconds, 1),
                    "bytes": {name: made.bytes[name] for name in (PREFILL, DECODE)},
                    "largest_difference": max(found["outputs"].values()),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
