"""What recovery does, reckoned from shapes alone; the figures follow `compress.language.recover` line by line."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compress.run.forecast import Stage

if TYPE_CHECKING:
    from compress.models.families.base import BlockGeometry, Costs, Geometry
    from compress.schema.recipe import RecoverSection

# Bytes that clipping and AdamW move for a trained weight in a step: its gradient, both moments and itself, some of
# them more than once.
STEPPED = 80
# Time of the student's products over that of a forward's: the way back runs other shapes, and more between products.
# Seen in runs of a 7-block model, not derived.
HARDER = 1.3
# Passes over the logits: the teacher's normaliser and its likeliest, the student's, and the way back.
PASSES = 12


def trained_parameters(spec: RecoverSection, geometry: Geometry, backbone: float, kept: float) -> float:
    """Weights that are trained, where a share ``kept`` of every layer is left. All linear layers count as targets where
    only some are named: no fewer are ever trained."""
    if spec.method == "full":
        return backbone + (2 * geometry.layers + 1) * geometry.hidden
    return sum(spec.rank * _ends(spec, block, kept) for block in geometry.blocks)


def _ends(spec: RecoverSection, g: BlockGeometry, kept: float) -> float:
    """Rows and columns of the targets in a block, of which a low-rank update holds its rank each."""
    q, kv, ffn = kept * g.heads * g.head_dim, kept * g.kv_heads * g.head_dim, kept * g.ffn
    ends = {
        "q_proj": g.hidden + q,
        "k_proj": g.hidden + kv,
        "v_proj": g.hidden + kv,
        "o_proj": q + g.hidden,
        "gate_proj": g.hidden + ffn,
        "up_proj": g.hidden + ffn,
        "down_proj": ffn + g.hidden,
    }
    named = [ends[t] for t in spec.targets or ends if t in ends]
    return sum(named or ends.values())


def recover_stage(
    spec: RecoverSection,
    costs: Costs,
    *,
    length: int,
    kept: float,
    dtype_bytes: int,
    world: int,
    streamed: bool,
) -> Stage:
    """The stage `recover` of the process that has the most to do and to hold.

    Args:
        length: tokens of a window.
        kept: share of the backbone that is left.
        dtype_bytes: of the stored weights.
        streamed: the dense model is not held; its teacher is then dispatched.
    """
    from compress.language.recover import steps_of

    g, steps = costs.geometry, steps_of(spec, length)
    inputs = sum(block.inputs for block in g.blocks)
    mine = math.ceil(spec.batch / world)
    tokens = mine * length
    backbone = kept * costs.backbone
    rest = costs.total - costs.backbone
    trained = trained_parameters(spec, g, backbone, kept)

    def forward(share: float) -> float:
        return share * tokens * (2 * costs.backbone + 4 * length * inputs)

    head = 2.0 * tokens * g.hidden * g.vocab
    # The student's forward, the gradients of its inputs, and of the weights that are trained.
    own = (3 if spec.save_memory else 2) * forward(kept) + 2 * head + 2 * tokens * trained
    flops = forward(1.0) + head + HARDER * own
    sharded = world if spec.shard == "fsdp" else 1
    away = spec.teacher == "dispatch" or streamed
    dense = 4.0 * costs.total
    micro = spec.micro * length
    widths = [12 * g.hidden + kept * (4 * block.ffn + 5 * block.inputs) for block in g.blocks]
    held = 4.0 * micro * (g.layers * g.hidden + max(widths) if spec.save_memory else sum(widths))
    made = 4.0 * backbone  # the merged weights, in float32 as they are trained
    checkpoint = 3 * 4.0 * trained
    return Stage(
        "recover",
        work={
            "gemm32": steps * flops,
            "logits": steps * PASSES * tokens * g.vocab,
            "touch": steps * STEPPED * trained / sharded,
            "calls": steps * 4.0 * g.layers * math.ceil(mine / spec.micro),
            "read": dtype_bytes * costs.backbone * (steps * math.ceil(mine / spec.micro) if away else 0.0),
            "save": math.ceil(steps / spec.checkpoint_every) * checkpoint,
            "write": made,
        },
        device={
            "the teacher": 0.0 if away else dense,
            "the student": 4.0 * (backbone / sharded + rest),
            "gradients and moments": 12.0 * trained / sharded,
            "activations": held,
            "logits": 6 * 4.0 * micro * g.vocab,
        },
        ram={
            "the teacher, dispatched": min(dense, spec.teacher_memory or dense) if away else 0.0,
            "a checkpoint": made,
        },
        kept=made,
        scratch=2 * checkpoint + (dense if away else 0.0),
        reads=dtype_bytes * costs.backbone * (steps if away else 0.0),
    )
