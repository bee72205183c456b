"""The picture of the README: learning curves of a run's report, as a file of their own: `python -m dlopt.docs.picture RUN`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from dlopt.api.running import load
from dlopt.docs import PAGES

COLOURS = {"ink": "#1b1f24", "quiet": "#5b6470", "line": "#d5dae1", "accent": "#2457d6", "second": "#b4530a", "alarm": "#b3261e"}
"""Of the report by day, which a picture in a page of somebody else's has at night, too."""
FIGURE = re.compile(r'<figure class="card">\s*<h3>(.*?)</h3>.*?(<svg.*?</svg>)', re.DOTALL)
MOST, GAP, TITLE = 2, 12, 22


def picture(report: str) -> str:
    """The first figures of a report as one SVG."""
    figures = FIGURE.findall(report)[:MOST]
    parts, across, high = [], 0.0, 0.0
    for title, svg in figures:
        _, _, width, height = (float(number) for number in re.findall(r'viewBox="([^"]*)"', svg)[0].split())
        inner = svg.replace("<svg", f'<svg x="{across:g}" y="{TITLE}" width="{width:g}" height="{height:g}"', 1)
        parts.append(f'<text x="{across + 4:g}" y="14" font-size="11" font-weight="bold" fill="{COLOURS["ink"]}">{title}</text>{inner}')
        across, high = across + width + GAP, max(high, height + TITLE)
    content = "".join(parts)
    for name, colour in COLOURS.items():
        content = content.replace(f"var(--{name})", colour)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across - GAP:g} {high:g}" width="{1.25 * across:.0f}" '
        f'font-family="system-ui, sans-serif"><rect width="100%" height="100%" fill="#fff"/>{content}</svg>\n'
    )


if __name__ == "__main__":
    (PAGES / "curves.svg").write_text(picture(Path(load(sys.argv[1]).report).read_text()))
