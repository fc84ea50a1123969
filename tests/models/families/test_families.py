"""Every family: units counted by hand, pieces == whole, masked == sliced, saved == reloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import CompressError
from compress.language.checkpoint import save_model, verify_clean
from compress.language.plan import BlockPlan, Plan
from compress.models.blocks import BlockRunner
from compress.models.decoder import blocks
from compress.models.families import family_for
from compress.models.reading import load_model
from compress.recipes.tyr.stages import others_gone
from tests.tiny import ARCHITECTURES, tiny, tokens, word_tokenizer

families = pytest.mark.parametrize("model_type", ARCHITECTURES)


def ragged_plan(model: Any) -> Plan:
    """Block 0: three of five query heads of each group (6 do not divide the hidden size), 15 neurons. 1: one group
    whole, dense FFN. 2: nothing at all. 3: dense attention, no FFN. Refitted weights in 0 and 1."""
    geometry = family_for(model.config).geometry(model.config).blocks[0]
    blocks = (
        BlockPlan((0, 2, 4, 5, 7, 9), tuple(range(3, 48, 3))),
        BlockPlan((5, 6, 7, 8, 9), tuple(range(48))),
        BlockPlan((), ()),
        BlockPlan(tuple(range(10)), ()),
    )
    generator = torch.Generator().manual_seed(5)
    weights = {
        "blocks.0.o": torch.randn(geometry.hidden, 6 * geometry.head_dim, generator=generator) * 0.1,
        "blocks.0.down": torch.randn(geometry.hidden, 15, generator=generator) * 0.1,
        "blocks.1.o": torch.randn(geometry.hidden, 5 * geometry.head_dim, generator=generator) * 0.1,
    }
    return Plan(blocks, weights)


def linear_parameters(model: Any) -> int:
    """Parameters of all linear layers inside blocks, counted from the modules."""
    blocks = model.model.layers
    return sum(
        p.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters(recurse=False)
    )


@families
def test_costs_equal_what_the_modules_hold(model_type: str) -> None:
    model = tiny(model_type)
    costs = family_for(model.config).costs(model.config)
    assert costs.backbone == linear_parameters(model)
    assert costs.total == sum(p.numel() for p in model.parameters())


def test_llama_costs_by_hand() -> None:
    model = tiny("llama")
    costs = family_for(model.config).costs(model.config).blocks[0]
    # q 80x40, k and v 16x40 each, o 40x80; gate, up, down 48x40 each.
    assert costs.attention_dense == 3200 + 2 * 640 + 3200
    assert costs.ffn(48) == 3 * 48 * 40
    # One group of five queries: half of everything. Both groups, one query each: q and o a fifth, k and v whole.
    assert costs.attention(1, 5) == costs.attention_dense // 2
    assert costs.attention(2, 1) == 640 + 1280 + 640
    assert costs.attention(0, 0) == costs.ffn(0) == 0


@families
def test_pieces_put_together_equal_the_model(model_type: str) -> None:
    model = tiny(model_type)
    family = family_for(model.config)
    ids = tokens(2, 24)
    runner = BlockRunner(model, family, 24)
    with torch.no_grad():
        hidden = runner.embed(ids)
        for i, block in enumerate(runner.blocks):
            whole = runner.run(i, hidden)
            middle = runner.middle(i, hidden, family.o_proj(block)(runner.context(i, hidden)))
            hidden = runner.output(i, middle, family.down_proj(block)(runner.activation(i, middle)))
            torch.testing.assert_close(hidden, whole)
        torch.testing.assert_close(runner.logits(hidden), model(ids).logits)


@families
def test_sliced_equals_masked_and_holds_what_the_costs_say(model_type: str) -> None:
    ids = tokens(2, 24)
    sliced, masked, untouched = tiny(model_type), tiny(model_type), tiny(model_type)
    family = family_for(sliced.config)
    costs = family.costs(untouched.config)
    plan = ragged_plan(sliced)
    plan.apply(sliced, family)
    plan.mask(masked, family)
    with torch.no_grad():
        torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, atol=2e-5, rtol=1e-5)
        assert not torch.allclose(sliced(ids).logits, untouched(ids).logits, atol=1e-2)
    assert linear_parameters(sliced) == costs.backbone - plan.removed(costs)


@families
def test_sliced_decodes_with_a_cache_as_without(model_type: str) -> None:
    model = tiny(model_type)
    ragged_plan(model).apply(model, family_for(model.config))
    ids = tokens(1, 12)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :8], use_cache=True)
        rest = model(ids[:, 8:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, whole[:, 8:], atol=2e-5, rtol=1e-5)


@families
def test_per_layer_layout_reloads_exactly(model_type: str, tmp_path: Any) -> None:
    model = tiny(model_type)
    family = family_for(model.config)
    plan = ragged_plan(model)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    ids = tokens(1, 16)
    tokenizer = word_tokenizer(tmp_path)
    save_model(model, family, counts, tmp_path, tokenizer=tokenizer, dtype=torch.float32, tokens=ids)
    loaded = load_model(tmp_path, family)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert linear_parameters(loaded) == linear_parameters(model)


# A Llama's is loaded so in every whole run, a Gemma's in the one whose texts begin with a token.
@pytest.mark.parametrize(
    "model_type",
    [pytest.param("llama", marks=pytest.mark.slow), "phi3", pytest.param("gemma3_text", marks=pytest.mark.slow)],
)
def test_per_layer_layout_loads_in_a_clean_process(model_type: str, tmp_path: Any) -> None:
    model = tiny(model_type)
    family = family_for(model.config)
    plan = ragged_plan(model)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    save_model(
        model, family, counts, tmp_path, tokenizer=word_tokenizer(tmp_path), dtype=torch.float32, tokens=tokens(1, 16)
    )
    found = verify_clean(tmp_path)
    assert found["max_logit_difference"] == 0.0
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


@families
def test_what_goes_with_a_sublayer_is_counted_as_it_is_saved(model_type: str) -> None:
    """Norms of q and k go with the attention that they stand in."""
    model = tiny(model_type)
    family = family_for(model.config)
    dense = sum(p.numel() for p in model.parameters())
    costs, plan = family.costs(model.config), ragged_plan(model)
    assert any(not b.heads for b in plan.blocks) and any(not b.neurons for b in plan.blocks)
    recipe = SimpleNamespace(layouts=("per-layer",))
    setup: Any = SimpleNamespace(config=model.config, family=family, costs=costs, recipe=recipe)
    counted = dense - plan.removed(costs) - others_gone(setup, plan)
    plan.apply(model, family)
    assert counted == sum(p.numel() for p in model.parameters())


def test_stock_class_refuses_a_ragged_folder_and_the_trap_is_refused(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    family = family_for(model.config)
    plan = ragged_plan(model)
    counts = plan.counts(family.geometry(model.config))
    plan.apply(model, family)
    save_model(
        model, family, counts, tmp_path, tokenizer=word_tokenizer(tmp_path), dtype=torch.float32, tokens=tokens(1, 16)
    )
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(CompressError, match="random numbers"):
        load_model(tmp_path, family, ignore_mismatched_sizes=True)


def test_an_unknown_architecture_is_named() -> None:
    from transformers import GPT2Config

    with pytest.raises(CompressError, match="'gpt2'") as error:
        family_for(GPT2Config())
    # By what was found, and where to say more.
    assert "GPT2Attention" in error.value.what and "models/families/" in error.value.fix


@families
def test_blocks_where_the_cache_reads_its_length_keep_attention(model_type: str) -> None:
    model = tiny(model_type)
    kept = family_for(model.config).keeps_attention(model.config)
    assert 0 in kept
    if model_type == "gemma2":
        assert kept == {0, 1}


@families
def test_any_weight_of_the_sliced_model_can_be_replaced_and_sliced_still_equals_masked(model_type: str) -> None:
    ids = tokens(2, 24)
    sliced, masked, plain = tiny(model_type), tiny(model_type), tiny(model_type)
    family = family_for(sliced.config)
    plan = ragged_plan(sliced)
    plan.apply(plain, family)
    generator = torch.Generator().manual_seed(9)
    names = {"self_attn.o_proj.weight": "o", "mlp.down_proj.weight": "down"}
    for i, block in enumerate(blocks(plain)):
        for name, parameter in block.named_parameters():
            changed = parameter + torch.randn(parameter.shape, generator=generator) * 0.1
            plan.weights[f"blocks.{i}.{names.get(name, name)}"] = changed
    before = {k: v.clone() for k, v in tiny(model_type).state_dict().items()}
    dense = tiny(model_type)
    shared = [blocks(dense)[i] for i in range(4)]
    for i in range(4):
        plan.block(i, family, shared[i], family.sliced)
        plan.block(i, family, shared[i], family.masked)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items()), "the dense model was touched"
    plan.apply(sliced, family)
    plan.mask(masked, family)
    for i, block in enumerate(blocks(sliced)):
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, plan.weights[f"blocks.{i}.{names.get(name, name)}"])
    with torch.no_grad():
        torch.testing.assert_close(sliced(ids).logits, masked(ids).logits, atol=5e-5, rtol=1e-5)
        assert not torch.allclose(sliced(ids).logits, plain(ids).logits, atol=1e-2)


def test_a_replaced_weight_that_does_not_fit_is_refused() -> None:
    family = family_for(tiny("llama").config)
    for name, shape, message in (
        ("self_attn.q_proj.weight", (80, 40), "is .80, 40., not .48, 40."),
        ("self_attn.x_proj.weight", (48, 40), "has no place"),
        ("mlp.gate_proj.weight", (16, 40), "is .16, 40., not .15, 40."),
    ):
        for make in (Plan.apply, Plan.mask):
            model = tiny("llama")
            plan = ragged_plan(model)
            plan.weights[f"blocks.0.{name}"] = torch.zeros(shape)
            with pytest.raises(CompressError, match=message):
                make(plan, model, family)
