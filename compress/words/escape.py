"""Text from outside, made harmless where it is shown: one function a place.

Names of models, files, layers, operators, tasks, targets and texts, descriptions, licences and the errors that quote
them come from strangers. Wherever they go, what cannot be seen is shown as Python writes it (``\\n``, ``\\x1b``,
``\\u202e``), so that a text stays on its line and reads as it is; and what is markup or a command in that place is
text there. `terminal`, `xml` and `annotation` hold no command for a CI that reads the output line by line.
"""

from __future__ import annotations

import html as _html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

# What a CI reads as a command: `::error::` at the start of a line (GitHub), `##[error]`, `##vso[...]` (Azure, GitHub's
# old form) and `##teamcity[...]` anywhere in it.
_ANYWHERE = re.compile(r"##(?=\w*\[)")
_AT_START = re.compile(r"^(\s*):(?=:)")
# ASCII that is markup somewhere in a line of Markdown; a backslash and a dollar sign go as character references, as
# math between `\(` or `$` is found in the source before Markdown is.
_MARKUP = re.compile(r"([`*_{}\[\]<>#|!~&^])")
_LINE_START = re.compile(r"^(?=[-+=:])|^(\d+)(?=[.)](?:\s|$))")
_ADDRESS = re.compile(r"(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def visible(text: object) -> str:
    """On one line, with every character that cannot be seen (control, formatting, half of a pair) as its escape."""
    return "".join(c if c.isprintable() or c == "\u00a0" else _shown(c) for c in str(text))


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def line(text: object) -> str:
    """`visible`, without spaces in excess: for the head of a card and titles."""
    return re.sub(r" +", " ", visible(text)).strip()


def terminal(text: object) -> str:
    """For a line that is printed: it speaks neither to the terminal nor to a CI that reads the log."""
    return _AT_START.sub(r"\1: ", _ANYWHERE.sub("# #", visible(text)))


def terminal_lines(text: str) -> str:
    """A text of several lines of ours, such as a traceback, each as `terminal` shows it."""
    return "\n".join(terminal(one) for one in text.split("\n"))


def json_text(value: Any, nan: bool = True) -> str:
    """JSON to be printed or kept: ASCII, and without a command for a CI. ``nan``: False raises ValueError on one."""
    return _ANYWHERE.sub(r"#\\u0023", json.dumps(value, indent=1, allow_nan=nan))


def markdown(text: object) -> str:
    """For running text, headings and table cells: no markup, no link, no formula."""
    parts = (_MARKUP.sub(r"\\\1", part).replace("$", "&#36;") for part in line(text).split("\\"))
    said = "&#92;".join(parts)
    said = _ADDRESS.sub(lambda found: "\\" + found[0], said)
    return _LINE_START.sub(lambda found: f"{found[1] or ''}\\", said)


def code(text: object) -> str:
    """For inline code in running text; in a table see `cell`."""
    said = _ANYWHERE.sub("# #", line(text))
    if not said:
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", said)), default=0))
    space = " " if said[0] == "`" or said[-1] == "`" else ""
    return f"{fence}{space}{said}{space}{fence}"


def cell(text: object) -> str:
    """For inline code in a table; as text where it holds what would end cell or code in one parser or another."""
    return markdown(text) if re.search(r"[\\|`]", line(text)) else code(text)


def block(lines: Iterable[str], language: str) -> list[str]:
    """A fenced block of code, which none of its lines can end."""
    shown = [terminal(one) for one in lines]
    fence = "`" * max(3, 1 + max((len(run) for one in shown for run in re.findall(r"`+", one)), default=0))
    return [f"{fence}{language}", *shown, fence]


def html(text: object) -> str:
    """For an element's text or a quoted attribute."""
    return _html.escape(visible(text), quote=True)


def script_json(value: Any) -> str:
    """JSON for a script element: it cannot end the element, nor be read as markup."""
    text = json.dumps(value, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def shown(value: Any) -> Any:
    """Every text of a JSON-like value as `visible` has it, keys left alone: for plots that a script draws."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {k: shown(v) for k, v in value.items()}
    return [shown(v) for v in value] if isinstance(value, list | tuple) else value


def xml(text: object) -> str:
    """For the writer of an XML file, which escapes markup itself: nothing that XML 1.0 cannot hold, and no command."""
    return terminal(text)


def annotation(level: str, title: str, message: str) -> str:
    """A workflow command of GitHub's (``level``: error, warning, notice) that is one command whatever the texts are."""
    head = _data(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={head}::{_data(message)}"


def _data(text: str) -> str:
    return terminal(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def caption(text: object, most: int = 48) -> str:
    """For a plot: cut in its middle where it is long. A legend leaves out what begins with an underscore."""
    said = line(text)
    if len(said) > most:
        said = f"{said[: most // 2]}…{said[-(most - most // 2 - 1) :]}"
    return f" {said}" if said.startswith("_") else said
