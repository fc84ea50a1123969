"""The real SmolLM2-135M-Instruct on dialogues that its own template writes: a minute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.data.dialogues import read_dialogues, render
from compress.data.text import pack_dialogues
from compress.errors import CompressError
from compress.language.evaluate import perplexity
from compress.models.families import family_for
from compress.models.reading import load_config, load_model, load_tokenizer
from compress.models.sources import resolve

pytestmark = pytest.mark.slow

ASKED = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Which planet is closest to the Sun?", "Mercury is the planet closest to the Sun."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("When did the Second World War end?", "The Second World War ended in 1945."),
    ("What is the largest ocean?", "The Pacific Ocean is the largest ocean on Earth."),
    ("How do plants get their energy?", "Plants get their energy from sunlight through photosynthesis."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return resolve("smollm2-135m").folder
    except CompressError as e:
        pytest.skip(f"smollm2-135m cannot be had here: {e.what}")


def test_answers_are_likelier_behind_their_questions_in_the_models_own_format(folder: Path, tmp_path: Path) -> None:
    tokenizer, model = load_tokenizer(folder), load_model(folder, family_for(load_config(folder)))

    def measured(answers: list[str]) -> float:
        rows = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for (q, _), a in zip(ASKED, answers, strict=True)
        ]
        path = tmp_path / "chats.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        found = read_dialogues([str(path)])
        for dialogue, row in zip(found, rows, strict=True):
            text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            assert render(dialogue, tokenizer).text == text and text.startswith("<|im_start|>system\nYou are")
        packed = pack_dialogues(found, tokenizer, 128, 3, "x")
        assert packed.scored is not None
        said = tokenizer.decode(packed.ids[packed.scored]).split("<|im_end|>")
        assert len(said) > 6 and set(said[:2]) < set(answers)
        return float(perplexity(model, packed.ids, own=packed.scored)["ppl"])

    own = [a for _, a in ASKED]
    assert measured(own) < 0.5 * measured([*own[1:], own[0]])
