"""Dialogues: read from JSON lines, written by the tokenizer's chat template; and where in that the assistant speaks.

A template comes from a stranger: transformers renders it, in jinja's sandbox. Many take the reasoning between
``<think>`` and ``</think>`` out of a turn: Qwen3's out of all but the last, DeepSeek-R1's out of all; SmolLM3's leaves
it in. Here it stays: where a template has dropped it, its tags are hidden from the template and put back behind it.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.run.strict_json import member, parse_json, typed
from compress.system.files import matching
from compress.system.host import memory_limit, time_limit

MOST = 20_000  # dialogues read of a source; their order is fixed, so the split is too
LINE = 500_000  # bytes of a line
TEMPLATE = 256 * 1024  # characters of a template
GROWTH = 100_000  # characters that a template may write beside four times what the dialogue holds
SECONDS = 10.0  # to write one dialogue
BYTES = 1 << 29  # of memory for it
CALLS = ("tool_calls", "function_call", "tools", "functions")  # what is not read, and changes what a template writes
ROLES = ("system", "developer", "user", "assistant", "tool")
# What ShareGPT's form calls them.
SPEAKERS = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
# A template that asks for the day is told this one: the same run gives the same text tomorrow. Llama 3.1's template
# has it for itself where it cannot ask.
DAY = datetime.datetime(2024, 7, 26)
ASKS = "strftime_now"  # transformers' function for it
FORMS = 'write {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
THINK = ("<think>", "</think>")
# Characters that no text should have (Unicode's last private ones): what stands for the tags, and for the words.
HIDDEN = {THINK[0]: "\U0010fff0\U0010fff1", THINK[1]: "\U0010fff0\U0010fff2"}
_TAG = re.compile("(</?think>)")
_MARK = re.compile("\U0010fff3([0-9]+)\U0010fff4")
_PRIVATE = re.compile("[\U0010fff0-\U0010fff4]")
# A thinking block that the template itself has written in front of the turn's own, which was hidden from it.
_EMPTY_BLOCK = re.compile(rf"(?:<think>\s*)?</think>\s*(?={HIDDEN[THINK[0]]})")


@dataclass(frozen=True)
class Dialogue:
    """Messages as (role, content) in their order, and the file and line that they stand in."""

    messages: tuple[tuple[str, str], ...]
    place: str


@dataclass(frozen=True)
class Rendered:
    """A dialogue as its template writes it, and the (start, end) of every turn of the assistant's in it; None where
    that cannot be told."""

    text: str
    spoken: tuple[tuple[int, int], ...] | None


# --- reading ---------------------------------------------------------------------------------------------------------


def read_dialogues(patterns: Sequence[str]) -> list[Dialogue]:
    """The dialogues of JSON-lines files in their order, `MOST` at most.

    A line is ``{"messages": [{"role", "content"}, ...]}``, or ``{"conversations": [{"from", "value"}, ...]}`` as of
    ShareGPT. ``reasoning_content`` of a message is put in front of its content, between the tags. Calls of tools are
    refused; other keys are not read.

    Raises:
        CompressError: a pattern matches nothing, a file cannot be read, or a line is no dialogue; ``where`` is the file
            and the line.
    """
    found: list[Dialogue] = []
    for path in matching(patterns, "the dialogues"):
        for number, line in enumerate(_lines(path), 1):
            if len(found) == MOST:
                return found
            found.append(_dialogue(line, f"{path}, line {number}"))
    return found


def _lines(path: str) -> Iterator[bytes]:
    """The lines of a regular file without their ends; none that is too long is read whole."""
    if not Path(path).is_file():
        raise CompressError("the dialogues are no file", where=path, fix="give files of JSON lines")
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(LINE + 2):
                number += 1
                if len(line.rstrip(b"\r\n")) > LINE:
                    raise CompressError(
                        f"the line is longer than {LINE:,} bytes",
                        where=f"{path}, line {number}",
                        fix="take it out, or write a dialogue a line",
                    )
                yield line.rstrip(b"\r\n")
    except OSError as e:
        raise CompressError(
            f"the dialogues cannot be read: {e.strerror or e}", where=path, fix="give files of JSON lines"
        ) from e


def _dialogue(line: bytes, place: str) -> Dialogue:
    if not line.strip():
        raise CompressError("the line is empty", where=place, fix="take it out: a dialogue a line")
    try:
        facts = parse_json(line, "the dialogue", place, fix=FORMS)
    except CompressError as e:
        e.what = e.what.replace("(line 1, ", "(")  # the line is in ``where``
        raise
    if isinstance(facts, list):
        raise CompressError(
            "the line is a list, not a dialogue", where=place, fix="write a dialogue a line: jq -c '.[]' FILE > LINES"
        )
    facts = typed(facts, dict, "", "the dialogue", place, FORMS)
    key = next((k for k in ("messages", "conversations") if k in facts), None)
    if key is None:
        raise CompressError("the dialogue has neither messages nor conversations", where=place, fix=FORMS)
    rows = typed(facts[key], list, key, "the dialogue", place, FORMS)
    if not rows:
        raise CompressError(f"the dialogue is empty: {key} holds nothing", where=place, fix="take the line out")
    _refuse_calls(facts, "", place)
    names = ("role", "content") if key == "messages" else ("from", "value")
    messages = tuple(_message(row, names, f"{key}.{i}", place) for i, row in enumerate(rows))
    return Dialogue(messages, place)


def _refuse_calls(facts: Mapping[str, Any], at: str, place: str) -> None:
    """Without its calls a dialogue is another: answers of tools that nobody has asked for."""
    called = next((key for key in CALLS if facts.get(key)), None)
    if called is not None:
        raise CompressError(
            f"{at}{called} holds calls of tools, which are not read",
            where=place,
            fix="take the line out, or write the calls into the contents as the model was trained to say them",
        )


def _message(row: Any, names: tuple[str, str], at: str, place: str) -> tuple[str, str]:
    what = "the dialogue"
    facts = typed(row, dict, at, what, place, FORMS)
    _refuse_calls(facts, f"{at}.", place)
    speaker = member(facts, names[0], str, what, place, at, FORMS)
    content = member(facts, names[1], str, what, place, at, FORMS)
    known = ROLES if names[0] == "role" else SPEAKERS
    if speaker not in known:
        raise CompressError(
            f"{at}.{names[0]} is {speaker!a:.60}, which is no role", where=place, fix=f"one of: {', '.join(known)}"
        )
    role = SPEAKERS[speaker]
    reasoning = facts.get("reasoning_content")
    if role == "assistant" and reasoning is not None and THINK[1] not in content:
        reasoning = typed(reasoning, str, f"{at}.reasoning_content", what, place, FORMS).strip("\n")
        content = f"{THINK[0]}\n{reasoning}\n{THINK[1]}\n\n{content}" if reasoning.strip() else content
    if role in ("user", "assistant") and not content.strip():
        raise CompressError(f"{at}.{names[1]} is empty", where=place, fix="take the turn out, or the line")
    if _PRIVATE.search(content):
        raise CompressError(
            f"{at}.{names[1]} has a private character (U+10FFF0 to U+10FFF4), which is kept for marks",
            where=place,
            fix="take it out",
        )
    return role, content


# --- writing ---------------------------------------------------------------------------------------------------------


def template_of(tokenizer: Any) -> str:
    """The chat template that dialogues are written by.

    Raises:
        CompressError: the tokenizer has none, or one beyond all sense.
    """
    found = getattr(tokenizer, "chat_template", None)
    where = f"{tokenizer.name_or_path}/chat_template.jinja"
    if isinstance(found, Mapping):
        if "default" not in found:
            raise CompressError(
                f"none of the chat templates is called default: {', '.join(map(ascii, found)):.80}",
                where=where,
                fix="save the one that is meant as chat_template.jinja",
            )
        found = found["default"]
    if not isinstance(found, str) or not found.strip():
        raise CompressError(
            "the tokenizer has no chat template, and dialogues are written by it",
            where=where,
            fix="put the chat_template.jinja of the model there, or take text instead: {files: [text/*.txt]}",
        )
    if len(found) > TEMPLATE:
        raise CompressError(
            f"the chat template has {len(found):,} characters, more than {TEMPLATE:,}",
            where=where,
            fix="take the template that the model was published with",
        )
    return found


def _dated(template: str) -> str:
    """A template that is told `DAY` where it asks for the day."""
    if ASKS not in template:
        return template
    codes = [*("%" + c for c in "aAbBdHIjmMpSuUwWyY"), "%-d", "%-m"]
    told = "".join(f'.replace("{code}", "{_day(code)}")' for code in codes)
    # jinja takes the line's end away with the block.
    return f"{{% macro {ASKS}(format) %}}{{{{ format{told} }}}}{{% endmacro %}}\n{template}"


def _day(code: str) -> str:
    return DAY.strftime(code.replace("-", "")).lstrip("0" if "-" in code else "")


def template_facts(tokenizer: Any) -> dict[str, str]:
    """What the lock file and the report say of the template: its hash and, where it asks for it, the day it is told."""
    import hashlib

    own = template_of(tokenizer)
    said = {"sha256": hashlib.sha256(own.encode()).hexdigest()}
    return {**said, "day": DAY.date().isoformat()} if ASKS in own else said


def render(dialogue: Dialogue, tokenizer: Any) -> Rendered:
    """A dialogue as the tokenizer's chat template writes it, without a prompt for another turn behind it.

    It is `apply_chat_template`'s own text where that keeps the reasoning; where it drops some, the same with that put
    back where it was.

    Raises:
        CompressError: the template is missing, refuses the dialogue, or drops what the assistant says.
    """
    template = _dated(template_of(tokenizer))
    marked, turns, words = _marked(dialogue, frozenset())
    written = _apply(tokenizer, template, marked, dialogue)
    hidden = frozenset(i for i, turn in turns.items() if set(turn) & set(THINK) and not _pattern(turn).search(written))
    if hidden:
        marked, turns, words = _marked(dialogue, hidden)
        written = _shown(_apply(tokenizer, template, marked, dialogue))
        lost = next((i for i in hidden if not _pattern(turns[i]).search(written)), None)
        if lost is not None:
            raise CompressError(
                f"the chat template drops the reasoning of turn {lost}, and it cannot be put back",
                where=dialogue.place,
                fix="take the line out, or its reasoning",
            )
    plain = [(r, _hide(c) if i in hidden else c) for i, (r, c) in enumerate(dialogue.messages)]
    text = _shown(_apply(tokenizer, template, plain, dialogue))
    return Rendered(text, _spoken(written, text, list(turns.values()), words))


def asked(text: str, tokenizer: Any) -> str:
    """What a person says, as the tokenizer's chat template writes it, up to where the model's answer begins.

    Raises:
        CompressError: the template is missing, or refuses it.
    """
    rows = (("user", text),)
    return _apply(tokenizer, _dated(template_of(tokenizer)), rows, Dialogue(rows, "the prompt"), answer=True)


def _marked(
    dialogue: Dialogue, hidden: frozenset[int]
) -> tuple[list[tuple[str, str]], dict[int, list[str]], list[str]]:
    """The messages with a mark for the words of each of the assistant's turns; the tags and marks of every such turn,
    by its number; and the words, by their mark's number. A template sees the tags of no turn in ``hidden``."""
    messages: list[tuple[str, str]] = []
    turns: dict[int, list[str]] = {}
    words: list[str] = []
    for i, (role, content) in enumerate(dialogue.messages):
        if role == "assistant":
            turns[i] = turn = []
            parts = []
            for part in _TAG.split(content):
                core = part.strip()
                if core and part not in THINK:
                    part = part.replace(core, f"\U0010fff3{len(words)}\U0010fff4")
                    turn.append(part.strip())
                    words.append(core)
                elif core:
                    turn.append(part)
                parts.append(part)
            content = "".join(parts)
        messages.append((role, _hide(content) if i in hidden else content))
    return messages, turns, words


def _pattern(turn: Sequence[str]) -> re.Pattern[str]:
    return re.compile(r"\s*".join(map(re.escape, turn)))


def _hide(content: str) -> str:
    return _TAG.sub(lambda found: HIDDEN[found.group()], content)


def _shown(text: str) -> str:
    """The hidden tags put back; a turn thinks once, so an empty block of the template's own in front of one goes."""
    text = _EMPTY_BLOCK.sub("", text)
    for tag, hidden in HIDDEN.items():
        text = text.replace(hidden, tag)
    return text


def _spoken(
    written: str, text: str, turns: Sequence[Sequence[str]], words: Sequence[str]
) -> tuple[tuple[int, int], ...] | None:
    """Where the turns are in ``text``, of which ``written`` is the same with marks for the words. None where the two
    differ in more: a template that looks at what is said, or changes it."""
    parts, length, at, found = [], 0, 0, []

    def add(part: str) -> None:
        nonlocal length
        parts.append(part)
        length += len(part)

    for turn in turns:
        match = _pattern(turn).search(written, at)
        if match is None:
            return None
        add(written[at : match.start()])
        start = length
        add(_MARK.sub(lambda mark: words[int(mark[1])], match.group()))
        found.append((start, length))
        at = match.end()
    add(written[at:])
    return tuple(found) if "".join(parts) == text else None


def _apply(
    tokenizer: Any, template: str, messages: Sequence[tuple[str, str]], dialogue: Dialogue, *, answer: bool = False
) -> str:
    """transformers' rendering, with its sandbox; bounded in time and in what comes out. ``answer``: one follows."""
    from jinja2 import TemplateSyntaxError

    rows = [{"role": role, "content": content} for role, content in messages]
    where = f"{tokenizer.name_or_path}/chat_template.jinja"
    try:
        with time_limit(SECONDS), memory_limit(BYTES):
            text = tokenizer.apply_chat_template(
                rows, chat_template=template, tokenize=False, add_generation_prompt=answer
            )
    except TemplateSyntaxError as e:
        raise CompressError(
            f"the chat template cannot be read: {_said(e)} (line {e.lineno})",
            where=where,
            fix="take the template that the model was published with",
        ) from e
    except MemoryError as e:
        raise CompressError(
            f"the chat template asks for more than {BYTES:,} bytes of memory",
            where=dialogue.place,
            fix=f"take the template that the model was published with; it is {where}",
        ) from e
    except Exception as e:  # a stranger's code: there is nothing that it could not raise
        raise CompressError(
            f"the chat template refuses the dialogue: {_said(e)}",
            where=dialogue.place,
            fix=f"mend the line or take it out; the template is {where}",
        ) from e
    most = GROWTH + 4 * sum(len(content) for _, content in messages)
    if not isinstance(text, str) or len(text) > most:
        raise CompressError(
            f"the chat template makes more than {most:,} characters of the dialogue",
            where=dialogue.place,
            fix=f"take the template that the model was published with; it is {where}",
        )
    return text


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
