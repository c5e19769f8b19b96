"""Pictures of results, written where ``--figure`` says."""

from __future__ import annotations

from pathlib import Path

from outlast._core._extras import require
from outlast._core._result import Result


def write_figure(result: Result, path: Path) -> None:
    """Draw a result.

    Raises:
        ValueError: a suffix that matplotlib does not write.
    """
    figure_module = require("matplotlib.figure", extra="report", purpose="--figure")
    figure = figure_module.Figure(figsize=(6, 4), layout="constrained")
    result.plot(figure.subplots())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
