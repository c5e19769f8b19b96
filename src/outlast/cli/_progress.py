"""Progress on standard error: a live display on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

if TYPE_CHECKING:
    from outlast.studies._design import Study
    from outlast.studies._grid import Cell, Plan


class QuietProgress:
    """Only what went wrong."""

    def start(self, study: Study, plan: Plan, total: int, finished: int) -> None:
        """Nothing."""

    def cell_started(self, cell: Cell) -> None:
        """Nothing."""

    def epoch(self, cell: Cell, epoch: int, epochs: int, loss: float) -> None:
        """Nothing."""

    def cell_finished(self, cell: Cell, seconds: float) -> None:
        """Nothing."""

    def cell_failed(self, cell: Cell, error: BaseException) -> None:
        """One line: a failure is not progress."""
        self.note(f"cell failed: {cell}: {type(error).__name__}: {error}")

    def note(self, line: str) -> None:
        """One line."""
        print(f"outlast: {line}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Nothing."""


class PlainProgress(QuietProgress):
    """A line for each cell, and one every few seconds inside a long one."""

    def __init__(self) -> None:
        self._done = self._total = 0
        self._spoke = self._begin = time.monotonic()
        self._new = 0

    def start(self, study: Study, plan: Plan, total: int, finished: int) -> None:
        """What is going to run."""
        self._done, self._total, self._new = finished, total, 0
        self._begin = time.monotonic()
        kept = f", {finished} already finished" if finished else ""
        self._say(f"{study.name}: {study.question} ({plan.scale} scale, {total} cells{kept})")

    def epoch(self, cell: Cell, epoch: int, epochs: int, loss: float) -> None:
        """At most a line every ten seconds."""
        if time.monotonic() - self._spoke > 10:
            self._say(f"  {cell.row} seed {cell.seed}: epoch {epoch}/{epochs}, loss {loss:.3f}")

    def cell_finished(self, cell: Cell, seconds: float) -> None:
        """One line with the time left, as far as the finished cells tell."""
        self._done += 1
        self._new += 1
        left = (time.monotonic() - self._begin) / self._new * (self._total - self._done)
        self._say(
            f"  [{self._done}/{self._total}] {cell.row} seed {cell.seed}: {seconds:.1f} s" + (f", about {left:.0f} s left" if left else "")
        )

    def cell_failed(self, cell: Cell, error: BaseException) -> None:
        """One line."""
        self._done += 1
        super().cell_failed(cell, error)

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class RichProgress(QuietProgress):
    """Bars for the study and for the running cell."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichBars | None = None

    def start(self, study: Study, plan: Plan, total: int, finished: int) -> None:
        """Open the display."""
        self._console.print(f"[bold]{study.name}[/bold]: {study.question} ({plan.scale} scale, {total} cells)")
        left = TextColumn("left")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), left
        self._bars = RichBars(*columns, console=self._console, transient=True, speed_estimate_period=3600.0)  # cells last minutes
        self._study = self._bars.add_task(study.name, total=total, completed=finished)
        self._cell = self._bars.add_task("", total=None, visible=False)
        self._bars.start()

    def cell_started(self, cell: Cell) -> None:
        """A fresh bar for the cell."""
        if self._bars is not None:
            self._bars.reset(self._cell, description=f"{cell.row} seed {cell.seed}", total=None, visible=True)

    def epoch(self, cell: Cell, epoch: int, epochs: int, loss: float) -> None:
        """Move the cell's bar."""
        if self._bars is not None:
            self._bars.update(self._cell, completed=epoch, total=epochs, description=f"{cell.row} seed {cell.seed}, loss {loss:.3f}")

    def cell_finished(self, cell: Cell, seconds: float) -> None:
        """Move the study's bar."""
        if self._bars is not None:
            self._bars.advance(self._study)

    def cell_failed(self, cell: Cell, error: BaseException) -> None:
        """A line, and the study's bar moves: nothing more comes of this cell."""
        super().cell_failed(cell, error)
        self.cell_finished(cell, 0.0)

    def note(self, line: str) -> None:
        """A line above the bars."""
        self._console.print(f"outlast: {line}", markup=False)

    def stop(self) -> None:
        """Close the display."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def make_progress(*, quiet: bool) -> QuietProgress:
    """The display that fits where standard error goes."""
    if quiet:
        return QuietProgress()
    console = Console(stderr=True)
    return RichProgress(console) if console.is_terminal else PlainProgress()
