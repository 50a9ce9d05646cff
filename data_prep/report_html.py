"""The parts of a page about an archive: style, facts, tables, pictures, what is not there.

Charts are inline SVG in the page's own colours.

Not here: what every page has (`tmu_dist.html_page`).
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from tmu_dist.html_page import Html, data_uri, definition_list, element

SPLIT_COLOURS = {"train": "--train", "val": "--val", "test": "--test"}
"""CSS variable of each split's colour."""

STYLE = """
:root { --bar: #6ba3d6; --train: #2f78c4; --val: #e0912f; --test: #a83279; --gap: #c62f2f;
  --terms: #fdf6e3; --terms-line: #d9a93f; }
@media (prefers-color-scheme: dark) { :root { --bar: #3f7fb5; --train: #5b9fe0; --val: #e8a552;
  --test: #d673ae; --gap: #f07070; --terms: #2b2718; --terms-line: #a5832f; } }
h1 { overflow-wrap: anywhere; }
.lead { max-width: none; text-wrap: pretty; }
pre { line-height: 1.5; }
.terms { background: var(--terms); border-left: 4px solid var(--terms-line); border-radius: 4px;
  padding: 0.8rem 1.1rem; margin: 1.6rem 0; }
.terms p { margin: 0.15rem 0; max-width: none; overflow-wrap: anywhere; }
dl.facts { margin: 1.2rem 0 0; }
th, td { padding: 0.45rem 0.65rem; }
td.text, th.text { overflow-wrap: anywhere; }
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
ul { margin: 0.5rem 0; }
li { margin: 0.25rem 0; overflow-wrap: anywhere; }
@media screen and (max-width: 48rem) { body { padding-top: 1.8rem; } h2 { margin-top: 2.4rem; }
  .beside { grid-template-columns: minmax(0, 1fr); }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 0.5rem; }
  .beside dl.facts { grid-template-columns: max-content 1fr; }
  .strip { min-width: 44rem; } }
@media print { :root { --bar: #6ba3d6; --train: #2f78c4; --val: #e0912f; --test: #a83279;
  --gap: #c62f2f; --terms: #fdf6e3; --terms-line: #d9a93f; }
  h2 { margin-top: 1.6rem; } th, td { padding: 0.25rem 0.4rem; } .scroll { overflow: visible; }
  .chart, .strip { min-width: 0; } .strip figcaption { font-size: 6.5pt; }
  .strip, tr, svg, .terms, .beside { break-inside: avoid; } .strip-title, p.small {
  break-after: avoid; } pre { white-space: pre-wrap; } }
"""


def facts_list(pairs: Sequence[tuple[str, str]]) -> Html:
    """Names and what they are, in two columns; pairs without a text are left out."""
    return definition_list([pair for pair in pairs if pair[1]])


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
    uri = data_uri("image/png", buffer.getvalue())
    return Html(
        f'<img src="{uri}" alt="{html.escape(alt)}" width="{image.width}" height="{image.height}">'
    )
