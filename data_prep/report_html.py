"""The parts of a self-contained HTML page about an archive: style, elements, tables, bars.

Everything given as text is escaped; only `Html` goes in as it is. The page loads nothing: pictures
are data URIs, charts are inline SVG in the page's own colours, letters are the reader's fonts. It
looks like the pages of `tmu_dist.evaluation`, which this package must not know.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

SPLIT_COLOURS = {"train": "--train", "val": "--val", "test": "--test"}
"""CSS variable of each split's colour."""

STYLE = """
:root { --paper: #ffffff; --panel: #f5f7f8; --ink: #1d2327; --muted: #5d676f; --line: #dfe3e6;
  --bar: #6ba3d6; --train: #2f78c4; --val: #e0912f; --test: #a83279; --gap: #c62f2f;
  --terms: #fdf6e3; --terms-line: #d9a93f; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #181c20; --panel: #20262b; --ink: #e8ecef;
  --muted: #9aa5ad; --line: #30373d; --bar: #3f7fb5; --train: #5b9fe0; --val: #e8a552;
  --test: #d673ae; --gap: #f07070; --terms: #2b2718; --terms-line: #a5832f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.55rem, 5vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em;
  margin: 0 0 0.8rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 3.2rem 0 0.5rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.3rem; font-weight: 600; }
p { max-width: 44rem; margin: 0.5rem 0; }
.lead { font-size: 1.08rem; color: var(--muted); max-width: none; text-wrap: pretty; }
.small { color: var(--muted); font-size: 0.875rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.84rem; }
pre { background: var(--panel); padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto;
  line-height: 1.5; margin: 0.8rem 0; }
.terms { background: var(--terms); border-left: 4px solid var(--terms-line); border-radius: 4px;
  padding: 0.8rem 1.1rem; margin: 1.6rem 0; }
.terms p { margin: 0.15rem 0; max-width: none; overflow-wrap: anywhere; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem;
  margin: 1.2rem 0 0; font-size: 0.9rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 1rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; min-width: 100%;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
th, td { padding: 0.45rem 0.65rem; text-align: right; white-space: nowrap; }
tbody tr > * { border-top: 1px solid var(--line); }
tbody tr:first-child > * { border-top: 1.5px solid var(--muted); }
thead th { vertical-align: bottom; font-weight: 500; color: var(--muted); font-size: 0.82rem;
  line-height: 1.3; white-space: normal; }
th:first-child { text-align: left; padding-left: 0; font-weight: 550; }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 0.65em; height: 0.65em; border-radius: 50%;
  margin-right: 0.5em; }
.beside { display: grid; grid-template-columns: minmax(0, 2.4fr) minmax(14rem, 1fr);
  gap: 0.5rem 2.5rem; align-items: start; }
.beside dl.facts { margin-top: 0.6rem; gap: 0.25rem 1rem; }
.beside dl.facts dd { text-align: right; font-variant-numeric: tabular-nums; }
.strip { display: grid; gap: 3px; margin: 0.15rem 0 1.1rem; }
.strip figure { margin: 0; min-width: 0; }
.strip img { display: block; width: 100%; height: auto; }
.strip.outlined img { outline: 1px solid #9aa3aa; outline-offset: -1px; }
.strips { overflow-x: auto; }
.strip figcaption { font-size: 0.72rem; color: var(--muted); text-align: center;
  white-space: nowrap; line-height: 1.5; font-variant-numeric: tabular-nums; }
.strip-title { font-size: 0.86rem; margin: 0.9rem 0 0; max-width: none; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit; fill: var(--muted); font-size: 12px; }
svg text.ink { fill: var(--ink); }
.chart { min-width: 38rem; }
.colour-bar { max-width: 34rem; margin: 0.6rem 0; }
span.key { margin-right: 1.2em; white-space: nowrap; }
details { margin: 0.8rem 0; }
summary { cursor: pointer; font-size: 0.92rem; }
ul { padding-left: 1.2rem; max-width: 46rem; margin: 0.5rem 0; }
li { margin: 0.25rem 0; overflow-wrap: anywhere; }
@media screen and (max-width: 48rem) { body { padding-top: 1.8rem; } h2 { margin-top: 2.4rem; }
  .beside { grid-template-columns: minmax(0, 1fr); }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 0.5rem; }
  .beside dl.facts { grid-template-columns: max-content 1fr; }
  .strip { min-width: 44rem; } }
@media print { :root { --paper: #fff; --panel: #f5f7f8; --ink: #000; --muted: #444;
  --line: #ccc; --bar: #6ba3d6; --train: #2f78c4; --val: #e0912f; --test: #a83279;
  --gap: #c62f2f; --terms: #fdf6e3; --terms-line: #d9a93f; }
  body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 8.5pt; }
  h2 { margin-top: 1.6rem; } th, td { padding: 0.25rem 0.4rem; } .scroll { overflow: visible; }
  .chart, .strip { min-width: 0; } .strip figcaption { font-size: 6.5pt; }
  .strip, tr, svg, .terms, .beside { break-inside: avoid; } h2, h3, .strip-title, p.small {
  break-after: avoid; } pre { white-space: pre-wrap; } * { print-color-adjust: exact; } }
"""


class Html(str):
    """Text that is already HTML."""


def document(title: str, parts: Sequence[Html]) -> str:
    """A whole HTML page of these parts."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        "<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def element(tag: str, *content: str, **attributes: str) -> Html:
    """One element; plain strings are escaped. `css` is the class attribute."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    named = {("class" if name == "css" else name): text for name, text in attributes.items()}
    texts = "".join(f' {name}="{html.escape(text)}"' for name, text in named.items() if text)
    return Html(f"<{tag}{texts}>{inside}</{tag}>")


def facts_list(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names and what they are, in two columns; pairs without a text are left out."""
    shown = [pair for pair in pairs if pair[1]]
    return element(
        "dl",
        *(element(tag, text) for pair in shown for tag, text in zip(("dt", "dd"), pair)),
        css="facts",
    )


def bullet_list(items: Sequence[str]) -> Html:
    """An unordered list."""
    return element("ul", *(element("li", item) for item in items))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> Html:
    """A table that scrolls sideways on a narrow screen.

    Args:
        headings: of the columns.
        rows: the cells, the first of each being its name.
        words: so many columns, from the left, hold words; the others are numbers, to the right.
    """

    def cell(tag: str, text: str, column: int) -> Html:
        return element(tag, text, css="text" if 0 < column < words else "")

    head = element("tr", *(cell("th", text, i) for i, text in enumerate(headings)))
    body = [
        element("tr", *(cell("td" if i else "th", text, i) for i, text in enumerate(row)))
        for row in rows
    ]
    whole = element("table", element("thead", head), element("tbody", *body))
    return element("div", whole, css="scroll")


def details(summary: str, *content: str) -> Html:
    """Content that is folded away."""
    return element("details", element("summary", summary), *content)


def section(record: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """A part of a JSON record; empty where it is not there or no object."""
    for name in path:
        part = record.get(name)
        record = part if isinstance(part, Mapping) else {}
    return record


def absent(what: str, why: str) -> Html:
    """The line that stands for a section without data."""
    return element("p", f"{what}: left out, because {why}.", css="small")


def number_text(value: Any) -> str:
    """A number of a JSON record with its thousands apart; "" for anything else."""
    return f"{value:,}" if isinstance(value, int | float) else ""


def split_name(split: str) -> Html:
    """The name of a split behind a dot in its colour."""
    colour = f"background: var({SPLIT_COLOURS.get(split, '--muted')})"
    return Html(element("span", "", css="swatch", style=colour) + html.escape(split))


def picture(image: Image, *, alt: str) -> Html:
    """A picture inside the page, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Html(
        f'<img src="{uri}" alt="{html.escape(alt)}" width="{image.width}" height="{image.height}">'
    )
