"""Figures as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from typing import Any

from outlast._core._extras import require
from outlast.studies._design import Figure
from outlast.studies._results import Results

# Colours that stand for the page's variables: drawn as these, written as var(...), so that one figure serves light and dark.
_INK, _GRID = "#0a0b0c", "#0d0e0f"
_SERIES = ("#0a1001", "#0a1002", "#0a1003", "#0a1004", "#0a1005", "#0a1006", "#0a1007", "#0a1008", "#0a1009")
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)", **{colour: f"var(--series-{n + 1})" for n, colour in enumerate(_SERIES)}}
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (2, 2)))


def draw(figure: Figure, results: Results, *, identity: str) -> str:
    """A figure as an SVG element without width and height, to scale with the page.

    ``identity`` makes the ids inside distinct from those of other figures of the page. Series differ in dash as well as
    in colour, for readers who do not see the difference of colours.
    """
    matplotlib: Any = require("matplotlib", extra="report", purpose="the figures of a report")
    from cycler import cycler

    style = {
        "axes.edgecolor": _INK,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": _INK,
        "axes.prop_cycle": cycler(color=_SERIES) + cycler(linestyle=_DASHES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "none",
        "font.size": 11,
        "grid.color": _GRID,
        "legend.frameon": False,
        "legend.labelcolor": _INK,
        "svg.fonttype": "none",
        "svg.hashsalt": identity,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }
    with matplotlib.rc_context(style):
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=(7, 4), layout="constrained")
        figure.draw(canvas, results)
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), identity)


def _inline(text: str, identity: str) -> str:
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    svg = re.sub(r'\bid="', f'id="{identity}-', svg)
    svg = re.sub(r'href="#', f'href="#{identity}-', svg).replace("url(#", f"url(#{identity}-")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 var(--font)", svg)
