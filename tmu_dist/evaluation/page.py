"""The parts of a report: style, tables of scores, figures for light and dark mode.

Deliberately not here: what every page has (`tmu_dist.html_page`), what a report says (`report`).
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from tmu_dist.evaluation.plots import DARK, LIGHT, SCREEN_DPI, Theme, svg_text
from tmu_dist.evaluation.tables import Cell, Row, TableData
from tmu_dist.html_page import Html, data_uri, element

STYLE = """
:root { --best: #e4f1fb; --bar: #cfe4f5; }
@media (prefers-color-scheme: dark) { :root { --best: #1c3a52; --bar: #24506f; } }
h1 { text-wrap: balance; }
dl.facts { margin: 1.6rem 0 0; padding: 1.1rem 0 0; border-top: 1px solid var(--line); }
dl.terms { font-size: 0.9rem; margin: 1rem 0; max-width: 52rem; }
dl.terms dt { font-weight: 600; margin-top: 0.6rem; }
dl.terms dd { margin: 0; color: var(--muted); }
th:first-child { position: sticky; left: 0; background: var(--paper); }
td.text, th.text { min-width: 8.5rem; }
td.text { color: var(--muted); font-size: 0.86rem; }
td.best { font-weight: 700; }
td.best span { background: var(--best); border-radius: 4px; padding: 0.15rem 0.4rem;
  margin: 0 -0.4rem; }
td.bar { background-image: linear-gradient(var(--bar), var(--bar)); background-repeat: no-repeat;
  background-position: left center; min-width: 7.5rem;
  background-origin: content-box; }
.swatch { background: var(--light); }
@media (prefers-color-scheme: dark) { .swatch { background: var(--dark); } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 0.5rem 2rem; }
.examples { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.examples > section { max-width: 100%; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; }
figure.wide { overflow-x: auto; }
figure.wide img { width: var(--natural); }
li { margin: 0.4rem 0; }
@media (max-width: 40rem) { body { padding-top: 1.8rem; } h2 { margin-top: 2.4rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 0.5rem; }
  th, td { padding: 0.45rem 0.55rem; }
  th:first-child { white-space: normal; min-width: 7.5rem; max-width: 9rem; }
  figure.wide img { width: calc(0.65 * var(--natural)); } }
@media print { :root { --best: #e4f1fb; --bar: #cfe4f5; }
  th, td { padding: 0.3rem 0.4rem; } .scroll, figure.wide { overflow: visible; }
  figure.wide img { max-width: 100%; } figure, tr, pre { break-inside: avoid; } }
"""
"""After that of every page (`tmu_dist.html_page`)."""

_CSS_PIXELS_PER_INCH = 100
"""Size of pixel pictures on the page: one strip of ten frames fills it, or two of five."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure, and what is to be seen in it."""

    draw: Callable[[Theme], Figure]
    alt: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a page: texts, then charts, then tables with their captions."""

    heading: str
    texts: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[tuple[TableData, str], ...] = ()

    def as_html(self) -> list[Html]:
        """Its elements from top to bottom."""
        charts = [picture(chart.draw, alt=chart.alt) for chart in self.charts]
        return [
            element("h2", self.heading),
            *(element("p", text) for text in self.texts),
            *([element("div", *charts, css="charts")] if charts else []),
            *(table(data, caption=caption) for data, caption in self.tables),
        ]


def table(data: TableData, *, caption: str = "") -> Html:
    """A table that scrolls sideways on a narrow screen."""
    is_text = [False, *(cell.is_text for cell in data.rows[0].cells)]
    headings = [
        element("th", text, css="text" if words else "")
        for text, words in zip(data.headings, is_text, strict=True)
    ]
    head = element("thead", element("tr", *headings))
    body = element("tbody", *(_table_row(row) for row in data.rows))
    note = [element("p", caption, css="small")] if caption else []
    return element("div", element("div", element("table", head, body), css="scroll"), *note)


def picture(draw: Callable[[Theme], Figure], *, alt: str, is_photo: bool = False) -> Html:
    """A figure drawn for light and for dark mode, inside the page.

    Args:
        draw: makes the figure in a theme.
        alt: what is to be seen, for those who cannot see it.
        is_photo: made of pixels (PNG, shown at its size) rather than of lines (SVG, fills its
            column).
    """
    encode = _png_uri if is_photo else _svg_uri
    light, dark = draw(LIGHT), draw(DARK)
    width = f"--natural: {_CSS_PIXELS_PER_INCH * light.get_figwidth():.0f}px"
    image = Html(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{encode(dark)}">'
        f'<img src="{encode(light)}" alt="{html.escape(alt)}" style="{width}"></picture>'
    )
    return element("figure", image, css="wide" if is_photo else "chart")


def _table_row(row: Row) -> Html:
    swatch = Html("")
    if row.series is not None:
        colours = f"--light:{LIGHT.colour(row.series)};--dark:{DARK.colour(row.series)}"
        swatch = Html(f'<span class="swatch" style="{colours}"></span>')
    return element("tr", element("th", swatch, row.name), *(_table_cell(c) for c in row.cells))


def _table_cell(cell: Cell) -> Html:
    if cell.bar is not None:
        text = html.escape(cell.text)
        length = f"calc((100% - 3.4em) * {cell.bar:.4f})"  # 3.4em are left for the number
        return Html(f'<td class="bar" style="background-size: {length} 1.5em">{text}</td>')
    if cell.is_best:
        return element("td", element("span", cell.text), css="best")
    return element("td", cell.text, css="text" if cell.is_text else "")


def _svg_uri(figure: Figure) -> str:
    return data_uri("image/svg+xml", svg_text(figure).encode())


def _png_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=SCREEN_DPI)
    return data_uri("image/png", buffer.getvalue())
