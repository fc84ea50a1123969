"""Dialogues and chat templates for tests: what the templates do to turns is what published ones do, in few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import prose

# Every turn ends with the end token, as in Llama-2's and Zephyr's.
PLAIN = "{% for m in messages %}{{ '<' + m.role + '>\n' + m.content | trim + eos_token + '\n' }}{% endfor %}"
# And begins with the token that the tokenizer puts in front of a text, as in Llama-3's and Gemma's.
BEGINS = "{{ bos_token }}" + PLAIN
# Qwen3's: reasoning goes from all turns but those behind the last question; the last has a block of it at any rate.
LAST_THINKS = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set content = m.content %}{% set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<a>\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content + eos_token + '\\n' }}
        {%- else %}
            {{- '<a>\\n' + content + eos_token + '\\n' }}
        {%- endif %}
    {%- else %}
        {{- '<' + m.role + '>\\n' + m.content + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}"""
# DeepSeek-R1's: it goes from every turn.
NONE_THINK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<A>' + content + eos_token }}{% else %}{{ '<U>' + m.content }}{% endif %}{% endfor %}"
)
# DeepSeek-V3.1's: likewise, and says so in front of every answer.
SAYS_NONE = NONE_THINK.replace("'<A>'", "'<A></think>'")
# SmolLM3's: what a turn holds stays, and the system's turn has the day.
DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\n' }}" + PLAIN


def let_it_chat(folder: Path, template: str) -> Any:
    """Gives the tokenizer in ``folder`` a chat template, as published folders have it."""
    from compress.models.reading import load_tokenizer

    (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def chat(number: int, turns: int = 2) -> list[dict[str, str]]:
    """Messages of random words, a question and an answer by turns; two numbers share none of length."""
    words = prose(1, number).split()
    said = [" ".join(words[9 * i : 9 * i + 5 + (number + i) % 5]) for i in range(2 * turns)]
    return [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"{text}{'?' if i % 2 == 0 else '.'}"}
        for i, text in enumerate(said)
    ]


def write_chats(path: Path, count: int, first: int = 0) -> Path:
    """``count`` dialogues as JSON lines, every second one in ShareGPT's form."""
    lines = []
    for number in range(first, first + count):
        messages = chat(number)
        if number % 2:
            names = {"user": "human", "assistant": "gpt"}
            rows = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
            lines.append(json.dumps({"id": number, "conversations": rows}))
        else:
            lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path
