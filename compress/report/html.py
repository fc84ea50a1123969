"""A run's report as one HTML file: the card's own text and tables, and plots that can be asked; no server, no network.

The text is the card's Markdown, so that the two cannot disagree; the plots are drawn in the browser from `charts`.
Nothing that a report quotes becomes markup: Markdown is rendered without HTML, the plots' data is escaped JSON that the
script writes as text, and the page's own policy allows its one script and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from compress.report.charts import Chart, charts
from compress.system.files import write_whole
from compress.words.escape import html, script_json

NAME = "report.html"


def write_html(report: Mapping[str, Any], card: Path, path: Path) -> Path:
    """Writes the page to ``path``.

    Args:
        card: the README.md that was made from the same report; pictures it shows lie beside it.
    """
    text = card.read_text(encoding="utf-8").split("\n---\n", 1)[1]
    write_whole(path, page(report, text, card.parent))
    return path


def page(report: Mapping[str, Any], text: str, folder: Path) -> str:
    """The whole page.

    Args:
        text: the card's Markdown, without its head.
        folder: where the pictures lie that ``text`` shows; one that no chart stands for is carried as it is.
    """
    found = charts(report)
    style = (files("compress.report") / "report.css").read_text(encoding="utf-8")
    script = (files("compress.report") / "report.js").read_text(encoding="utf-8")
    body, title = _render(text, found, folder)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{allowed}'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html(title)}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            '<header><span>compress</span><button id="theme" type="button" hidden>dark</button></header>',
            f"<main>\n{body}</main>",
            f"<footer>report.json {html(report['sha256'])}</footer>",
            '<div id="tip" role="status" hidden></div>',
            f'<script type="application/json" id="charts">{script_json(found)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _render(text: str, found: Sequence[Chart], folder: Path) -> tuple[str, str]:
    """(HTML of the Markdown with its pictures replaced by figures, its first heading as plain text)."""
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    by_id = {chart["id"]: chart for chart in found}
    shown: set[str] = set()

    def image(tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        source, caption = str(tokens[at].attrs["src"]), tokens[at].content
        name = Path(source).stem
        if name in by_id:
            return "".join(_figure(by_id[n]) for n in _together(name, by_id, shown))
        picture = folder / source
        if Path(source).is_absolute() or ".." in Path(source).parts or not picture.is_file():
            return html(caption)
        data = base64.b64encode(picture.read_bytes()).decode()
        return f'<img alt="{html(caption)}" src="data:image/png;base64,{data}">'

    tokens = reader.parse(text)
    heading = next((t for before, t in pairwise(tokens) if before.tag == "h1"), None)
    title = "".join(t.content for t in heading.children or ()) if heading is not None else "report"
    reader.renderer.rules["image"] = image  # type: ignore[attr-defined]
    body = reader.renderer.render(tokens, reader.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    left = [chart for chart in found if chart["id"] not in shown]
    if left:
        body += "<h2>More plots</h2>\n" + "".join(_figure(chart) for chart in left)
    return body, title


def _together(name: str, by_id: Mapping[str, Chart], shown: set[str]) -> list[str]:
    """The charts that stand for one picture of the card; a latency picture holds every figure, and the ratios."""
    names = [n for n in by_id if n == name or (name == "latency" and (n.startswith("latency-") or n == "ratios"))]
    new = [n for n in names if n not in shown]
    shown.update(new)
    return new


def _figure(chart: Chart) -> str:
    return (
        f'<figure class="chart" id="chart-{html(chart["id"])}" data-chart="{html(chart["id"])}">'
        f"<figcaption>{html(chart['title'])}</figcaption>"
        "<noscript>The plot is drawn by a script of this file; the tables need none.</noscript></figure>\n"
    )
