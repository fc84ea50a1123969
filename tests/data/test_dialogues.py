"""Dialogues: read line by line, written by the tokenizer's chat template with all reasoning in, packed, and scored."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.data import dialogues as module
from compress.data.dialogues import DAY, Dialogue, read_dialogues, render, template_facts
from compress.data.documents import load_dialogues
from compress.data.text import evaluation_windows, pack_dialogues
from compress.errors import CompressError
from compress.schema.recipe import SourceSpec
from tests.chats import BEGINS, DATED, LAST_THINKS, NONE_THINK, PLAIN, SAYS_NONE, chat, let_it_chat, write_chats
from tests.tiny import let_it_add, word_tokenizer

THINKING: list[tuple[str, str]] = [
    ("user", "What is 17 + 4?"),
    ("assistant", "<think>\nTake 17.\nAdd 4.\n</think>\n\n21."),
    ("user", "And <think> of 3 more?"),
    ("assistant", "<think>\n\n</think>\n\n24."),
    ("user", "Are you sure?"),
    ("assistant", "<think>\n21 + 3 = 24.\n</think>\n\nYes, 24."),
]


def dialogue(messages: list[tuple[str, str]]) -> Dialogue:
    return Dialogue(tuple(messages), "chats.jsonl, line 1")


def chatting(folder: Path, template: str, adds: str | None = None) -> Any:
    word_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "eos_token_id": 2}))
    if adds:
        let_it_add(folder, adds)
    return let_it_chat(folder, template)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_both_forms_are_read_and_reasoning_beside_an_answer_is_put_in_front_of_it(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 4)
    for number, found in enumerate(read_dialogues([str(tmp_path / "*.jsonl")])):
        assert [{"role": r, "content": c} for r, c in found.messages] == chat(number)
        assert found.place == f"{path}, line {number + 1}"
    answer = {"role": "assistant", "content": "21.", "reasoning_content": "17 and 4.\n", "tool_calls": None}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "17 + 4?"}, answer], "weight": 1}))
    assert read_dialogues([str(path)])[0].messages[1] == ("assistant", "<think>\n17 and 4.\n</think>\n\n21.")


def line(**facts: Any) -> bytes:
    return json.dumps(facts).encode()


USER = {"role": "user", "content": "Why?"}
BAD: list[tuple[bytes, str]] = [
    (b"{'messages': []}", "no JSON: Expecting property name enclosed in double quotes (column 2)"),
    (b"\xff\xfe{", "not UTF-8"),
    (b"", "the line is empty"),
    (b"[1, 2]", "a list, not a dialogue"),
    (b"3", "not an object"),
    (line(text="hello"), "neither messages nor conversations"),
    (line(messages=[]), "the dialogue is empty"),
    (line(messages={"role": "user"}), "'messages' is an object, not a list"),
    (line(messages=[USER, "hi"]), "'messages.1' is a text, not an object"),
    (line(messages=[{"content": "hi"}]), "'messages.0.role' is missing"),
    (line(messages=[USER, {"role": "assistant", "content": None}]), "'messages.1.content' is null, not a text"),
    (line(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]), "is a list, not a text"),
    (line(messages=[{"role": "robot", "content": "hi"}]), "messages.0.role is 'robot', which is no role"),
    (line(conversations=[{"from": "narrator", "value": "hi"}]), "conversations.0.from is 'narrator'"),
    (line(messages=[USER, {"role": "assistant", "content": " \n"}]), "messages.1.content is empty"),
    (line(messages=[{"role": "user", "content": "\U0010fff1"}]), "private character"),
    (
        line(messages=[USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]),
        "messages.1.tool_calls holds calls of tools, which are not read",
    ),
    (line(messages=[USER, {"role": "assistant", "content": "So.", "function_call": {"name": "f"}}]), "function_call"),
    (line(messages=[USER], tools=[{"type": "function"}]), "tools holds calls of tools"),
    (b'{"messages": ' + b"[" * 200 + b"]" * 200 + b"}", "nests more than"),
    (line(messages=[{"role": "user", "content": "a" * 10**6}]), "longer than 500,000 bytes"),
]


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_bad_line_is_one_error_with_its_number(bad: bytes, said: str, tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 2)
    path.write_bytes(path.read_bytes() + bad + b"\n" + line(messages=[USER]) + b"\n")
    with pytest.raises(CompressError) as caught:
        read_dialogues([str(path)])
    assert said in caught.value.what and caught.value.where == f"{path}, line 3" and caught.value.fix


def test_what_is_no_file_and_what_cannot_be_split_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no file matches"):
        read_dialogues([str(tmp_path / "none.jsonl")])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(CompressError, match="are no file"):
        read_dialogues([str(tmp_path / "*.jsonl")])
    path = write_chats(tmp_path / "one.json", 1)
    with pytest.raises(CompressError, match="1 dialogues cannot be split"):
        load_dialogues(SourceSpec(dialogues=[str(path)]), "calibration")


def test_no_more_are_read_than_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    a, b = (write_chats(tmp_path / f"{name}.jsonl", 2, first) for name, first in (("a", 0), ("b", 2)))
    assert len(read_dialogues([str(a), str(b)])) == 3


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, BEGINS, LAST_THINKS, NONE_THINK, SAYS_NONE, "\n  " + PLAIN])
def test_a_dialogue_is_what_apply_chat_template_makes_of_it(template: str, tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, template, "<s> $A" if "bos_token" in template else None)
    messages = [{"role": "system", "content": " Be short. "}, *chat(3), *chat(4, 1)]
    messages[2]["content"] = f"\n {messages[2]['content']}\n"
    own = dialogue([(m["role"], m["content"]) for m in messages])
    want = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    text = render(own, tokenizer).text
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == want
    # And so it stands in a window, begun once.
    packed = pack_dialogues([own], tokenizer, len(want), 1, "x")
    assert packed.ids.tolist() == [want] and want.count(1) == ("bos_token" in template)


@pytest.mark.parametrize("template", [PLAIN, LAST_THINKS, NONE_THINK, SAYS_NONE])
def test_the_reasoning_of_every_turn_stays_and_nothing_else_changes(template: str, tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, template)
    own = dialogue(THINKING)
    messages = [{"role": r, "content": c} for r, c in THINKING]
    theirs = tokenizer.apply_chat_template(messages, tokenize=False)
    found = render(own, tokenizer)
    answers = [c for r, c in THINKING if r == "assistant"]
    assert (theirs == found.text) == (template == PLAIN)  # the others drop some
    assert found.spoken is not None
    assert [found.text[a:b] for a, b in found.spoken] == answers
    # A turn thinks once; the user's word for it is no tag.
    assert found.text.count("<think>") == 4 and found.text.count("</think>") == 3
    # Around the turns, all is as the template has it for answers without reasoning.
    bare = [(r, c.split("</think>")[-1].strip()) for r, c in THINKING]
    without = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in bare], tokenize=False)
    rest = found.text
    for _, c in THINKING:
        if c in answers:
            rest = rest.replace(c, c.split("</think>")[-1].strip(), 1)
    assert rest == without.replace("</think>", "").replace("<a>\n<think>\n\n\n\n", "<a>\n")


def test_reasoning_whose_beginning_was_the_prompts_stays(tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, NONE_THINK)
    found = render(dialogue([("user", "Why?"), ("assistant", "Hm, why.\n</think>\n\nSo.")]), tokenizer)
    assert found.text == "<s><U>Why?<A>Hm, why.\n</think>\n\nSo.</s>"


def test_a_template_that_asks_for_the_day_is_told_always_the_same(tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, DATED)
    text = render(dialogue([("user", "Hello?"), ("assistant", "Yes.")]), tokenizer).text
    assert text == f"Today: {DAY.strftime('%d %B %Y')}\n<user>\nHello?</s>\n<assistant>\nYes.</s>\n"
    file = hashlib.sha256((tmp_path / "chat_template.jinja").read_bytes()).hexdigest()
    assert template_facts(tokenizer) == {"sha256": file, "day": "2024-07-26"}
    assert "day" not in template_facts(chatting(tmp_path, PLAIN))


STRANGE: list[tuple[str, str]] = [
    ("{{ raise_exception('roles must alternate') }}", "refuses the dialogue: roles must alternate"),
    ("{% if messages %}", "cannot be read"),
    ("{{ messages[7].content }}", "refuses the dialogue"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the dialogue: access to attribute '__class__'"),
    ("{{ messages.append(1) }}", "refuses the dialogue"),
    ("{% for i in range(300) %}{{ 'a' * 1000 }}{% endfor %}", "more than 100,160 characters"),
    ("{% set x = 1 %}", "drops the reasoning"),
    ("{{ 'a' * 10**10 }}", "asks for more than 536,870,912 bytes of memory"),
    ("{{ 'a'.ljust(10**11) }}", "asks for more than"),
    ("{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "asks for more"),
    (" \n", "has no chat template"),
    ("{#" + "a" * 2**19 + "#}", "has 524,292 characters"),
]


@pytest.mark.parametrize(("template", "said"), STRANGE)
def test_a_strange_template_is_one_error(template: str, said: str, tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, template)
    with pytest.raises(CompressError) as caught:
        render(dialogue(THINKING[:2]), tokenizer)
    assert said in caught.value.what, caught.value.what
    assert str(tmp_path / "chat_template.jinja") in f"{caught.value.where} {caught.value.fix}" or "drops" in said


ENDLESS = """
import sys
from pathlib import Path
from compress.data import dialogues
from compress.errors import CompressError
from compress.models.reading import load_tokenizer

dialogues.SECONDS = 0.2
one = dialogues.Dialogue((("user", "Hello?"), ("assistant", "Yes.")), "here")
try:
    dialogues.render(one, load_tokenizer(Path(sys.argv[1])))
except CompressError as e:
    print(e.what)
"""


def test_a_template_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    """In a process of its own: one that had run many tests was lost here twice, and why is not known."""
    chatting(tmp_path, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    words = [sys.executable, "-X", "faulthandler", "-c", ENDLESS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "it took more than 0.2 seconds" in done.stdout, done


def test_of_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, PLAIN)
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "default": "{{ messages[0].content }}"}
    assert render(dialogue([("user", "Hello?")]), tokenizer).text == "Hello?"
    tokenizer.chat_template = {"tool_use": "{{ 1 }}"}
    with pytest.raises(CompressError, match="none of the chat templates is called default: 'tool_use'"):
        render(dialogue([("user", "Hello?")]), tokenizer)


# --- packing and scoring ---------------------------------------------------------------------------------------------


def spoken_by_hand(tokenizer: Any, messages: list[tuple[str, str]], header: Callable[[str], str]) -> list[bool]:
    """Whether a token is the assistant's or ends its turn, from the turns' own tokens."""
    marks: list[bool] = []
    for role, content in messages:
        head = len(tokenizer(header(role), add_special_tokens=False)["input_ids"])
        body = len(tokenizer(content, add_special_tokens=False)["input_ids"])
        behind = len(tokenizer("\n", add_special_tokens=False)["input_ids"])
        said = role == "assistant"
        marks += [False] * head + [said] * (body + 1) + [False] * behind
    return marks


def test_the_assistants_words_and_the_end_of_its_turn_are_scored(tmp_path: Path) -> None:
    tokenizer = chatting(tmp_path, PLAIN)
    marks = spoken_by_hand(tokenizer, THINKING, lambda role: f"<{role}>\n")
    packed = pack_dialogues([dialogue(THINKING)], tokenizer, len(marks), 1, "x")
    assert packed.scored is not None and packed.scored.tolist() == [marks]
    said = tokenizer.decode(packed.ids[packed.scored])
    assert said == "".join(f"{c}</s>" for r, c in THINKING if r == "assistant")


@pytest.mark.parametrize("adds", [None, "<s> $A"])
@pytest.mark.parametrize("template", [PLAIN, BEGINS, "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"])
def test_windows_begin_with_a_dialogue_and_dialogues_end_and_begin_once(
    template: str, adds: str | None, tmp_path: Path
) -> None:
    tokenizer = chatting(tmp_path, template, adds)
    found = [dialogue([(m["role"], m["content"]) for m in chat(i)]) for i in range(40)]
    length = 400
    packed = pack_dialogues(found, tokenizer, length, 3, "x", scored=False)
    assert packed.scored is None
    begins, ends = [1] if adds else [], [] if "eos" in template else [2]
    made = [[*tokenizer(render(d, tokenizer).text, add_special_tokens=False)["input_ids"], *ends] for d in found]
    rows, row = [], []
    for ids in made:
        row = row or ([] if ids[: len(begins)] == begins else [*begins])
        row = [*row, *ids]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    at = torch.linspace(0, len(rows) - 1, 3).long().tolist()
    assert packed.ids.tolist() == [rows[i] for i in at]
    assert not any(a == b == 1 for row in packed.ids.tolist() for a, b in pairwise(row))


def test_the_model_may_end_a_turn_with_another_token_than_a_text(tmp_path: Path) -> None:
    chatting(tmp_path, PLAIN)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    tokenizer = let_it_chat(tmp_path, PLAIN.replace("eos_token", "pad_token"))  # Gemma's <end_of_turn>
    assert tokenizer.end_ids == (2, 0) and tokenizer.eos_token_id == 2
    marks = spoken_by_hand(tokenizer, THINKING, lambda role: f"<{role}>\n")
    packed = pack_dialogues([dialogue(THINKING), dialogue(THINKING)], tokenizer, 2 * len(marks), 1, "x")
    assert packed.scored is not None and packed.scored.tolist() == [2 * marks]
    assert 2 not in packed.ids.tolist()[0]  # nothing is put behind what has ended


def test_what_cannot_be_scored_is_one_error(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "chats.jsonl", 60)
    source = SourceSpec(dialogues=[str(path)])
    upper = chatting(tmp_path, PLAIN.replace("m.content", "m.content | upper"))
    with pytest.raises(CompressError, match="the chat template changes what it says") as caught:
        evaluation_windows(source, upper, 2, 16)
    assert caught.value.where == f"{path}, line 55"
    with pytest.raises(CompressError, match="the dialogues give 6 windows of 16 tokens, 60 are asked for"):
        evaluation_windows(source, let_it_chat(tmp_path, PLAIN), 60, 16)
    silent = chatting(tmp_path, "{{ 'x ' * 99 }}" + PLAIN)
    with pytest.raises(CompressError, match="the assistant says nothing in the first 16 tokens"):
        evaluation_windows(source, silent, 2, 16)
