"""The parts of a self-contained HTML page: style, tables, pictures inside, light and dark mode.

Everything given as text is escaped; only `Html` goes in as it is. The page loads nothing: pictures
are data URIs and letters are the reader's own fonts.

Deliberately not here: what a report says (`report`).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from tmu_dist.evaluation.plots import DARK, LIGHT, SCREEN_DPI, Theme, svg_text
from tmu_dist.evaluation.tables import Cell, Row, TableData

STYLE = """
:root { --paper: #ffffff; --panel: #f5f7f8; --ink: #1d2327; --muted: #5d676f; --line: #dfe3e6;
  --best: #e4f1fb; --bar: #cfe4f5; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #181c20; --panel: #20262b; --ink: #e8ecef;
  --muted: #9aa5ad; --line: #30373d; --best: #1c3a52; --bar: #24506f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.25rem 4rem; max-width: 70rem; background: var(--paper);
  color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.55rem, 5vw, 2.2rem); line-height: 1.2; letter-spacing: -0.015em;
  margin: 0 0 0.8rem; font-weight: 650; text-wrap: balance; }
h2 { font-size: 1.2rem; letter-spacing: -0.005em; margin: 3.2rem 0 0.5rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.3rem; font-weight: 600; }
p { max-width: 44rem; margin: 0.5rem 0; }
.lead { font-size: 1.08rem; color: var(--muted); }
.small { color: var(--muted); font-size: 0.875rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 0.84rem; }
pre { background: var(--panel); padding: 0.9rem 1.1rem; border-radius: 6px; overflow-x: auto;
  line-height: 1.6; margin: 0.8rem 0; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem;
  margin: 1.6rem 0 0; padding: 1.1rem 0 0; border-top: 1px solid var(--line); font-size: 0.9rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
dl.terms { font-size: 0.9rem; margin: 1rem 0; max-width: 52rem; }
dl.terms dt { font-weight: 600; margin-top: 0.6rem; }
dl.terms dd { margin: 0; color: var(--muted); }
.scroll { overflow-x: auto; margin: 1rem 0; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.9rem; min-width: 100%;
  font-variant-numeric: tabular-nums; border-bottom: 1px solid var(--line); }
th, td { padding: 0.5rem 0.65rem; text-align: right; white-space: nowrap; }
tbody tr > * { border-top: 1px solid var(--line); }
tbody tr:first-child > * { border-top: 1.5px solid var(--muted); }
thead th { vertical-align: bottom; font-weight: 500; color: var(--muted); font-size: 0.82rem;
  line-height: 1.3; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
  padding-left: 0; font-weight: 550; }
td.text, th.text { text-align: left; white-space: normal; min-width: 8.5rem; }
td.text { color: var(--muted); font-size: 0.86rem; }
td.best { font-weight: 700; }
td.best span { background: var(--best); border-radius: 4px; padding: 0.15rem 0.4rem;
  margin: 0 -0.4rem; }
td.bar { background-image: linear-gradient(var(--bar), var(--bar)); background-repeat: no-repeat;
  background-position: left center; min-width: 7.5rem;
  background-origin: content-box; }
.swatch { display: inline-block; width: 0.65em; height: 0.65em; border-radius: 50%;
  margin-right: 0.5em; background: var(--light); }
@media (prefers-color-scheme: dark) { .swatch { background: var(--dark); } }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
  gap: 0.5rem 2rem; }
.examples { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.examples > section { max-width: 100%; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; height: auto; }
figure.wide { overflow-x: auto; }
figure.wide img { width: var(--natural); }
ul { padding-left: 1.2rem; max-width: 46rem; }
li { margin: 0.4rem 0; }
@media (max-width: 40rem) { body { padding-top: 1.8rem; } h2 { margin-top: 2.4rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; } dl.facts dd { margin-bottom: 0.5rem; }
  th, td { padding: 0.45rem 0.55rem; }
  th:first-child { white-space: normal; min-width: 7.5rem; max-width: 9rem; }
  figure.wide img { width: calc(0.65 * var(--natural)); } }
@media print { :root { --paper: #fff; --panel: #f5f7f8; --ink: #000; --muted: #444;
  --line: #ccc; --best: #e4f1fb; --bar: #cfe4f5; }
  body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 8.5pt; }
  th, td { padding: 0.3rem 0.4rem; } .scroll, figure.wide { overflow: visible; }
  figure.wide img { max-width: 100%; } figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; } * { print-color-adjust: exact; } }
"""

_CSS_PIXELS_PER_INCH = 100
"""Size of pixel pictures on the page: one strip of ten frames fills it, or two of five."""


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


def element(tag: str, *content: str, css: str = "") -> Html:
    """One element; plain strings are escaped."""
    inside = "".join(part if isinstance(part, Html) else html.escape(part) for part in content)
    return Html(f'<{tag} class="{css}">{inside}</{tag}>' if css else f"<{tag}>{inside}</{tag}>")


def bullet_list(items: Sequence[str]) -> Html:
    """An unordered list."""
    return element("ul", *(element("li", item) for item in items))


def definition_list(pairs: Sequence[tuple[str, str]], *, css: str) -> Html:
    """Terms and what they mean; `css` is "facts" (two columns) or "terms"."""
    return element(
        "dl",
        *(element(tag, text) for pair in pairs for tag, text in zip(("dt", "dd"), pair)),
        css=css,
    )


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
    return _data_uri("image/svg+xml", svg_text(figure).encode())


def _png_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=SCREEN_DPI)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
