"""The real SmolLM2-135M at two sparsities: engines for named GPUs, other runtimes; smaller where it is pruned."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.exporters.command import text_source
from compress.exporters.formats import BuildOptions, make, text_profiles
from compress.exporters.onnx import export_llm
from compress.language.plan import BlockPlan, Plan
from compress.models.families import family_for
from compress.models.reading import load_config, load_model
from compress.models.sources import resolve

pytestmark = pytest.mark.slow

KEEP = (1.0, 0.75, 0.5)  # of the KV groups and neurons, more in the outer blocks, less in the middle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[float, tuple[Any, Path]]:
    """Sliced to uneven layers by position alone: what the engines weigh does not depend on which units are left."""
    folder = resolve("smollm2-135m").folder
    family = family_for(load_config(folder))
    made = {}
    for keep in KEEP:
        model = load_model(folder, family).float().eval()
        if keep < 1:
            blocks = []
            for i, g in enumerate(family.geometry(model.config).blocks):
                share = keep + 0.2 * (1 if i % 2 else -1) * (1 - keep)
                groups = max(1, round(share * g.heads / g.group))
                neurons = 8 * round(share * g.ffn / 8)
                blocks.append(BlockPlan(tuple(range(groups * g.group)), tuple(range(neurons))))
            Plan(tuple(blocks)).apply(model, family)
        out = tmp_path_factory.mktemp(f"keep-{keep}")
        export_llm(model, out)
        made[keep] = (model, out)
    return made


def weights(folder: Path) -> int:
    return (folder / "weights.data").stat().st_size


@pytest.mark.skipif(not find_spec("tensorrt_rtx"), reason="needs the extra [tensorrt]")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engines_shrink_with_the_weights(
    exported: dict[float, tuple[Any, Path]], precision: str, tmp_path: Path
) -> None:
    size = {}
    for keep, (_, folder) in exported.items():
        options = BuildOptions("tensorrt_rtx", precision, text_profiles(128, 128, most=512), ("sm86", "sm89"))
        from compress.exporters.formats import Source

        facts = make(Source(folder), tmp_path / f"{precision}-{keep}", options)
        size[keep] = facts["bytes"]
        print(f"{precision} keep {keep}: {facts['bytes']}, weights {weights(folder)}, {facts['seconds']} s")
        for file in (tmp_path / f"{precision}-{keep}").iterdir():
            file.unlink()
    half = 1 if precision == "fp32" else 2
    for name in ("prefill.engine", "decode.engine"):
        for more, less in ((1.0, 0.75), (0.75, 0.5)):
            saved = (weights(exported[more][1]) - weights(exported[less][1])) / half
            assert 0.9 < (size[more][name] - size[less][name]) / saved < 1.1


@pytest.mark.parametrize("form", ["openvino", "executorch"])
def test_the_pruned_model_gives_the_same_in_other_runtimes(
    exported: dict[float, tuple[Any, Path]], form: str, tmp_path: Path
) -> None:
    if not find_spec(form):
        pytest.skip(f"needs the extra [{form}]")
    model, folder = exported[0.5]
    options = BuildOptions(form, "fp32", text_profiles(32, 32))
    source = text_source(folder, model, np.arange(100, 140), options)
    facts = make(source, tmp_path / form, options)
    print(form, facts["bytes"], facts["seconds"], max(facts["parity"]["outputs"].values()))
    assert len(facts["parity"]["outputs"]) == 2 * (1 + 2 * 30)
    assert max(facts["parity"]["outputs"].values()) < 1e-3
    if form == "executorch":
        # prefill and decode share the weights; beside them stands the embedding, which the head uses in another form.
        assert facts["bytes"]["model.pte"] < 1.6 * weights(folder)
