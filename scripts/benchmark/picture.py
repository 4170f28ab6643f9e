"""A run's figures as one SVG picture: a panel a workload, a bar a contender, short is good.

The picture stands alone (no fonts, scripts or images from elsewhere) and paints its own ground, so it is readable wherever
it is shown; a viewer who prefers dark gets dark. Each panel has its own scale, begins at zero and writes every value.
"""

from __future__ import annotations

from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmark.report import ROW, TITLES, Book, figure

PANELS = (
    ("first.cold", "Never seen → first file read"),
    ("find.cold", "find -ls, cold"),
    ("tar.cold", "tar of the tree to a pipe, cold"),
    ("small.cold", "open, read, close a small file, cold"),
    ("random-p99.cold", "random 4 KiB read, p99, cold"),
    ("runc.cold", "runc + import numpy, mounted, cold"),
)
"""Rows of the table that are shown, with shorter titles: in all of them less is better."""

WIDTH, COLUMNS, MARGIN, GAP = 960, 2, 24, 28
HEAD, TITLE, BAR, PITCH, FOOT = 58, 26, 15, 22, 34
NAMES, VALUES = 112, 74
"""Pixels for the contenders' names left of the bars, and for the values right of them."""

STYLE = """
 .ground { fill: #ffffff; stroke: #d8dee4 }
 text { font: 12px ui-sans-serif, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
 .head { font-size: 17px; font-weight: 600 }
 .title { font-size: 13px; font-weight: 600 }
 .quiet { fill: #59636e }
 .name { text-anchor: end }
 .ours { fill: #0969da }
 .other { fill: #afb8c1 }
 .us { font-weight: 600 }
 @media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #30363d }
  text { fill: #e6edf3 }
  .quiet { fill: #9198a1 }
  .ours { fill: #4493f8 }
  .other { fill: #484f58 }
 }"""


class Bar(NamedTuple):
    """One contender's figure in a panel."""

    name: str
    value: float
    words: str
    ours: bool


def bars(book: Book, row: str) -> list[Bar]:
    """The figures of a row in the order of the table's columns."""
    found = []
    for contender in book.contenders():
        value = book.median(row, contender.key)
        if value is not None:
            ours = contender.key.startswith("ocifs-")
            found.append(Bar(TITLES[contender.key], value, figure(value, ROW[row].unit), ours))
    return found


def draw(book: Book) -> str:
    """The picture; panels nobody has a figure for are left out."""
    panels = [(title, found) for row, title in PANELS if (found := bars(book, row))]
    width = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
    out: list[str] = []
    top = float(HEAD)
    for first in range(0, len(panels), COLUMNS):
        line = panels[first : first + COLUMNS]
        for column, (title, found) in enumerate(line):
            out += _panel(MARGIN + column * (width + GAP), top, width, title, found)
        top += TITLE + PITCH * max(len(found) for _, found in line) + GAP
    height = top - GAP + FOOT
    facts = ", ".join(book.facts[name] for name in ("machine", "kernel", "date") if name in book.facts)
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}"'
                f' viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="ocifs and its peers: times, shorter is better">'
            ),
            f"<style>{STYLE}\n</style>",
            f'<rect class="ground" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>',
            f'<text class="head" x="{MARGIN}" y="34">ocifs and its peers on one image: shorter is better</text>',
            *out,
            f'<text class="quiet" x="{MARGIN}" y="{height - 14:.0f}">{escape(facts)}</text>',
            "</svg>\n",
        ]
    )


def _panel(left: float, top: float, width: float, title: str, found: list[Bar]) -> list[str]:
    out = [f'<text class="title" x="{left:.1f}" y="{top + 14:.1f}">{escape(title)}</text>']
    room = width - NAMES - VALUES
    largest = max(bar.value for bar in found) or 1.0
    for number, bar in enumerate(found):
        y = top + TITLE + number * PITCH
        length = max(room * bar.value / largest, 1.0)
        us = " us" if bar.ours else ""
        out += [
            f'<text class="name{us}" x="{left + NAMES - 8:.1f}" y="{y + 12:.1f}">{escape(bar.name)}</text>',
            (
                f'<rect class="{"ours" if bar.ours else "other"}" x="{left + NAMES:.1f}" y="{y:.1f}"'
                f' width="{length:.1f}" height="{BAR}" rx="2"/>'
            ),
            (
                f'<text class="{us.strip() or "quiet"}" x="{left + NAMES + length + 6:.1f}" y="{y + 12:.1f}">'
                f"{escape(bar.words)}</text>"
            ),
        ]
    return out
