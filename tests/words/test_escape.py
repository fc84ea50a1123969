"""Text from outside stays text: every escape read back by a parser of the place it is for, with hostile strings."""

from __future__ import annotations

import json
import re
import unicodedata
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from compress.errors import CompressError
from compress.words import escape

PIECES = [
    "\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x1b[31m", "\x1b]0;x\x07", "\x00", "\x7f", "\x85", "\x9b", "\u2028",
    "\u2029", "\u202e", "\u2066", "\u200b", "\ufeff", "\ud800", "\ufffe", "\U000e0041", "\u00a0", "::error::x",
    "::set-output name=a::b", "%0A::error::", "%0D", "%25", "##[error]", "###[group]", "##vso[task.complete]",
    "##teamcity[x]", "|", "\\|", "\\\\|", "`", "``", "```", "~~~", "[a](http://e.x)", "![a](b)", "<b>", "</td>",
    "<!--", "-->", "]]>", "&lt;", "&#60;", "&", "*", "_", "__", "#", "- ", "1. ", "1) ", "+ ", "=", "---", "> ", "$",
    "$$", "\\(", "\\)", "\\", "^", "{", "}", "http://a.b", "WWW.a.b", '"', "'", "a", "b c", " ", "  ", "é", "\u0301",
    ":", "::", "!!python/object", "null", "true", "{{ x }}", "${{ x }}", "$(x)",
]  # fmt: skip
hostile = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=8).map("".join)


class Parsed(HTMLParser):
    """Tags in their order, and the text between them."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.append("!comment")

    handle_decl = unknown_decl = handle_pi = handle_comment


def rendered(source: str) -> Parsed:
    """As the strictest reader of cards has it: raw HTML is passed on, tables and strikethrough are known."""
    return Parsed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(source))


@given(hostile)
@example("exe.\u202egnp\x1b[2J\n::error::x")
def test_what_is_visible_is_one_printable_line_and_printable_text_is_left_as_it_is(text: str) -> None:
    shown = escape.visible(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in shown)
    assert shown.splitlines() in ([], [shown])
    shown.encode("utf-8")
    if text.isprintable():
        assert shown == text


def test_what_cannot_be_seen_is_shown_as_python_writes_it() -> None:
    assert escape.visible("a\nb\tc\x1b[0m\u202ed\u2028") == r"a\nb\tc\x1b[0m\u202ed\u2028"
    assert escape.visible(r"C:\models\new") == r"C:\models\new", "a backslash of one's own is none of ours"


@given(hostile)
def test_markdown_is_text_in_a_paragraph_a_heading_a_list_and_at_the_start_of_a_line(text: str) -> None:
    want = escape.line(text)
    for before, tags in (("x ", ["p"]), ("# x ", ["h1"]), ("- x ", ["ul", "li"]), ("", ["p"])):
        if want or before:
            found = rendered(before + escape.markdown(text) + "\n\nend\n")
            assert found.tags == [*tags, "p"], escape.markdown(text)
            assert found.text.split() == f"{'x ' if before else ''}{want} end".split()


@given(hostile)
def test_a_table_keeps_its_cells_whatever_stands_in_them(text: str) -> None:
    for written in (escape.markdown(text), escape.cell(text)):
        row = f"| {written} | {written} |"
        found = rendered(f"| a | b |\n|---|---|\n{row}\n\nend\n")
        tags = [t for t in found.tags if t != "code"]
        assert tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "p"], row
        # Other parsers end a cell at a bar behind an even number of backslashes: there is none.
        assert not re.search(r"(?<!\\)(?:\\\\)*\|", written), row


@given(hostile)
def test_code_is_one_span_with_the_text_in_it(text: str) -> None:
    found = rendered(f"x {escape.code(text)} y\n")
    assert found.tags == (["p", "code"] if escape.line(text) else ["p"])
    want = re.sub(r"##(?=\w*\[)", "# #", escape.line(text))
    assert found.text.split() == f"x {want} y".split()


@given(st.lists(hostile, min_size=1, max_size=4))
def test_a_block_of_code_holds_all_its_lines_and_ends_behind_them(lines: list[str]) -> None:
    source = "\n".join([*escape.block(lines, "sh"), "", "behind"])
    tokens = MarkdownIt("commonmark").parse(source)
    assert [t.type for t in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert tokens[0].content == "".join(f"{escape.terminal(line)}\n" for line in lines)


@given(hostile)
def test_html_is_text_in_an_element_and_in_an_attribute(text: str) -> None:
    found = Parsed(f'<p title="{escape.html(text)}">{escape.html(text)}</p>')
    assert found.tags == ["p"] and found.text == escape.visible(text)


@given(hostile)
def test_json_in_a_page_cannot_end_its_element(text: str) -> None:
    written = escape.script_json({text: [text]})
    assert not set("<>&") & set(written) and json.loads(written) == {text: [text]}


@given(hostile)
def test_xml_holds_it_as_text_and_attribute(text: str) -> None:
    root = ET.Element("a", {"b": escape.xml(text)})
    root.text = escape.xml(text)
    back = ET.fromstring(ET.tostring(root, encoding="utf-8", xml_declaration=True))
    assert (back.text or "") == back.get("b") == escape.terminal(text) and len(back) == 0


def is_command(line: str) -> bool:
    """Whether GitHub's runner, Azure's agent or TeamCity's would act on the line."""
    return line.lstrip().startswith("::") or bool(re.search(r"##\w*\[", line))


@given(hostile)
@example("  ::add-mask::x")
@example("####vso[task.setvariable]")
def test_a_line_on_a_terminal_is_no_command_of_a_terminal_or_a_ci(text: str) -> None:
    shown = escape.terminal(text)
    assert not is_command(shown) and not re.search(r"[\x00-\x1f\x7f-\x9f]", shown)
    assert escape.terminal(shown) == shown
    assert escape.terminal("plain: a::b ## c [d]") == "plain: a::b ## c [d]"


@given(hostile, hostile, hostile)
def test_an_error_is_three_lines_and_no_command(what: str, where: str, fix: str) -> None:
    lines = str(CompressError(what, where, fix)).split("\n")
    assert len(lines) == 1 + bool(where) + bool(fix)
    assert not any(is_command(line) or (not line.isprintable() and "\u00a0" not in line) for line in lines)


@given(hostile, hostile)
def test_an_annotation_is_one_command_with_the_texts_in_it(title: str, message: str) -> None:
    written = escape.annotation("error", title, message)
    assert written.count("\n") == 0 and "\r" not in written and "##[" not in written
    # As GitHub's runner takes it apart: properties up to the second `::`, then %25 and so on turned back.
    head, said = written.removeprefix("::").split("::", 1)
    name, properties = head.split(" ", 1)
    assert name == "error"
    pairs = dict(p.split("=", 1) for p in properties.split(","))
    assert list(pairs) == ["title"]

    def back(value: str, more: bool) -> str:
        for code, character in (("%0D", "\r"), ("%0A", "\n"), *((("%3A", ":"), ("%2C", ",")) if more else ())):
            value = value.replace(code, character)
        return value.replace("%25", "%")

    assert back(said, False) == escape.terminal(message)
    assert back(pairs["title"], True) == escape.terminal(title)


@given(hostile)
def test_printed_json_is_read_back_and_holds_no_command(text: str) -> None:
    written = escape.json_text({"a": text})
    assert json.loads(written) == {"a": text} and written.isascii()
    assert not any(is_command(line) for line in written.split("\n"))


@given(hostile)
def test_a_line_in_a_cards_head_is_one_scalar_of_yaml(text: str) -> None:
    head = yaml.safe_dump({"a": escape.line(text), "b": [escape.line(text)]})
    assert yaml.safe_load(head) == {"a": escape.line(text), "b": [escape.line(text)]}
    assert "\n---" not in head


@pytest.mark.parametrize(("text", "want"), [("_hidden", " _hidden"), ("x" * 99, "x" * 24 + "…" + "x" * 23)])
def test_a_label_of_a_plot_is_short_and_none_that_a_legend_leaves_out(text: str, want: str) -> None:
    assert escape.caption(text) == want


def test_a_traceback_is_shown_line_by_line() -> None:
    assert escape.terminal_lines("Traceback:\n  x\n::error::y") == "Traceback:\n  x\n: :error::y"
