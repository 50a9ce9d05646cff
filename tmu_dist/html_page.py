"""What every self-contained HTML page of the project shares: its frame, elements and style.

Everything given as text is escaped; only `Html` goes in as it is. A page loads nothing: pictures
are data URIs and letters are the reader's own fonts.

Deliberately not here: what pages say and what only one kind of them needs (`evaluation.page`,
`data_prep.report_html`).
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
:root { --paper: #ffffff; --panel: #f5f7f8; --ink: #1d2327; --muted: #5d676f; --line: #dfe3e6;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #181c20; --panel: #20262b; --ink: #e8ecef;
  --muted: #9aa5ad; --line: #30373d; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.55rem, 5vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em;
  margin: 0 0 0.8rem; font-weight: 650; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 3.2rem 0 0.5rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.3rem; font-weight: 600; }
p { max-width: 44rem; margin: 0.5rem 0; }
ul { padding-left: 1.2rem; max-width: 46rem; }
.lead { font-size: 1.08rem; color: var(--muted); }
.small { color: var(--muted); font-size: 0.875rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.84rem; }
pre { background: var(--panel); padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto;
  line-height: 1.6; margin: 0.8rem 0; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem;
  font-size: 0.9rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; min-width: 100%;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
th, td { padding: 0.5rem 0.65rem; text-align: right; white-space: nowrap; }
tbody tr > * { border-top: 1px solid var(--line); }
tbody tr:first-child > * { border-top: 1.5px solid var(--muted); }
thead th { vertical-align: bottom; font-weight: 500; color: var(--muted); font-size: 0.82rem;
  line-height: 1.3; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; font-weight: 550; }
td.text, th.text { text-align: left; white-space: normal; }
.swatch { display: inline-block; width: 0.65em; height: 0.65em; border-radius: 50%;
  margin-right: 0.5em; }
@media print { :root { --paper: #fff; --panel: #f5f7f8; --ink: #000; --muted: #444;
  --line: #ccc; }
  body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 8.5pt; }
  h2, h3 { break-after: avoid; } * { print-color-adjust: exact; } }
"""
"""Of every page; the style of one kind of page comes after it."""


class Html(str):
    """Text that is already HTML."""


def document(title: str, parts: Sequence[Html], *, style: str) -> str:
    """A whole HTML page of these parts.

    Args:
        title: of the window.
        parts: the page from top to bottom.
        style: CSS of this kind of page, after `STYLE`.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def element(tag: str, *content: str, css: str = "", **attributes: str) -> Html:
    """One element; plain strings are escaped. `css` is the class; empty attributes are left out."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    named = {"class": css, **attributes}
    texts = "".join(f' {name}="{html.escape(text)}"' for name, text in named.items() if text)
    return Html(f"<{tag}{texts}>{inside}</{tag}>")


def bullet_list(items: Sequence[str]) -> Html:
    """An unordered list."""
    return element("ul", *(element("li", item) for item in items))


def definition_list(pairs: Sequence[tuple[str, str]], *, css: str = "facts") -> Html:
    """Terms and what they mean; of class "facts" in two columns."""
    return element(
        "dl",
        *(element(tag, text) for pair in pairs for tag, text in zip(("dt", "dd"), pair)),
        css=css,
    )


def data_uri(media_type: str, content: bytes) -> str:
    """A file as an address that holds it."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
