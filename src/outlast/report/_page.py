"""The page: a scoreboard, then a section for each study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from outlast import __version__
from outlast._core._extras import require
from outlast._core._files import write_whole
from outlast.report._figures import draw
from outlast.studies._design import Figure
from outlast.studies._results import Results
from outlast.studies._statistics import Interval
from outlast.studies._summary import JudgedClaim, Summary, tally

_FOLDER = Path(__file__).parent


Figures = dict[tuple[int, str, str], dict[str, Any]]  # by number of the summary, part and figure


def render(summaries: Sequence[Summary], drawn: Figures | None = None) -> str:
    """The whole page as text. Everything that comes from data is escaped.

    Args:
        summaries: a section each.
        drawn: figures of earlier summaries of the same list, which are not drawn again; new ones are added.

    Raises:
        MissingExtraError: Jinja2 or matplotlib (extra ``report``) is missing.
    """
    jinja2: Any = require("jinja2", extra="report", purpose="a report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = _number
    environment.filters["bounds"] = _bounds
    environment.filters["effect"] = _effect
    figures: Figures = {} if drawn is None else drawn
    figures |= {
        (number, part.name, figure.name): _drawn(figure, part.results, f"s{number}-{part.name}-{figure.name}", environment.filters["safe"])
        for number, summary in enumerate(summaries)
        for part in summary.parts
        for figure in part.figures
        if (number, part.name, figure.name) not in figures
    }
    return environment.get_template("page.html.jinja").render(
        summaries=summaries,
        tally=tally,
        claims=[claim for summary in summaries for claim in summary.claims],
        figures=figures,
        style=environment.filters["safe"]((_FOLDER / "page.css").read_text()),
        version=__version__,
    )


def write_report(summaries: Sequence[Summary], path: Path, drawn: Figures | None = None) -> None:
    """Write the page, whole or not at all: a browser may reload it while a demo runs.

    Args:
        summaries: as ``render``.
        path: of the page.
        drawn: as ``render``, where a growing list is written again and again.

    Raises:
        OSError: the place cannot be written.
    """
    write_whole(path, render(summaries, drawn).encode())


def _drawn(figure: Figure, results: Results, identity: str, safe: Callable[[str], Any]) -> dict[str, Any]:
    """The picture and its description; where cells are missing, the reason in its place, so that the rest of the page stands."""
    try:
        return {"svg": safe(draw(figure, results, identity=identity)), "alt": figure.alt(results)}
    except Exception as error:
        if not results.missing:
            raise
        return {"svg": "", "alt": f"Not drawn: {results.why(error)}."}


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _bounds(value: Interval, digits: int) -> str:
    if value.low is None or value.high is None:
        return "no interval"
    return f"{_number(value.low, digits)} to {_number(value.high, digits)}"


def _effect(judged: JudgedClaim) -> str:
    if judged.measured is None:
        return judged.reason or "not measured"
    claim = judged.claim
    unit = f" {claim.unit}" if claim.unit else ""
    text = f"{_number(judged.measured.mean, claim.digits)}{unit} ({_bounds(judged.measured, claim.digits)})"
    return f"{text}; {judged.reason}" if judged.reason else text
