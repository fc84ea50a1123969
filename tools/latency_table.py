"""The table that prices times (`compress.language.latency`), of a model's shapes on this machine, and its error.

    python tools/latency_table.py smollm2-135m -b 'tpot@512<=0.7x' -b 'ttft@512<=0.7x'

Weights are random: none is read. What is printed: what every shape takes, the whole dense model, and on models of mixed
shapes that the table has not seen what it says beside what they took.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from compress.exporters.onnx import export_llm
from compress.language.latency import Clock, errors_of, key_of, shaped
from compress.language.limits import parse
from compress.language.setup import outline
from compress.pipeline import METHODS
from compress.recipes.tyr.stages import job_for
from compress.recipes.tyr.timed import levels_of
from compress.schema.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="tyr-demo")
    parser.add_argument("-b", "--budget", action="append", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the table")
    given = parser.parse_args()
    changes = [f"budget={json.dumps(given.budget)}", f"bench.threads={given.threads}", "layouts=[per-layer]"]
    recipe = load_recipe(given.recipe, METHODS, changes)
    setup = outline(given.model, recipe)
    job = job_for(setup, None, {})
    clock = Clock(setup, parse(given.budget, recipe.bench), lambda: Path())
    block = setup.geometry.blocks[0]
    with tempfile.TemporaryDirectory() as temporary:
        dense, folder = Path(temporary) / "dense", Path(temporary) / "table"
        dense.mkdir()
        folder.mkdir()
        export_llm(shaped(setup, [(block.heads, block.kv_heads, block.ffn)] * setup.geometry.layers), dense)
        clock.table(folder, levels_of(job), dense)
        text = (folder / "table.json").read_text("utf-8")
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")
    table = json.loads(text)
    for key in map(key_of, clock.budgets):
        print(f"{key}: the dense model {1000 * table['dense'][key]:.2f} ms")
        for row in table["heads"]:
            shape = f"{row['groups']} KV groups of {row['per_group']}"
            print(f"  attention, {shape:22} {1000 * row['seconds'][key]:.3f} ms")
        for row in table["neurons"]:
            print(f"  FFN, {row['neurons']:5} neurons           {1000 * row['seconds'][key]:.3f} ms")
        for check in table["checks"]:
            one = check["seconds"][key]
            print(
                f"  unseen {check['layers'][1:]}: table {1000 * one['table']:.2f} ms, measured"
                f" {1000 * one['measured']:.2f} ms, {100 * one['error']:+.1f} %"
            )
        off = errors_of(table, key)
        print(f"  off by {100 * off['median']:.1f} % (median), {100 * off['worst']:.1f} % at most")


if __name__ == "__main__":
    main()
