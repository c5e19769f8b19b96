"""Further processes that compute cells of the demo's folder, so that it uses more than one core.

The folder is all that they share: a lock keeps each cell with one process. They go through the studies from the last to the first,
towards the process that goes the other way, and leave out parts that measure speed; while one of those runs they stand still.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from outlast.cli._progress import QuietProgress

if TYPE_CHECKING:
    from outlast.studies._design import Study
    from outlast.studies._grid import Cell, Plan
    from outlast.studies._run import Progress


class Helpers:
    """Helping processes, ended with the block.

    Args:
        out: the folder.
        count: of processes; 0 for none.
        names: of the studies.
    """

    def __init__(self, out: Path, count: int, names: Sequence[str]) -> None:
        command = [sys.executable, "-m", "outlast.cli._helper", str(out), *names]
        silent = subprocess.DEVNULL
        # What fails in a helper is computed again, and reported, by the process that it helps.
        self._running = [subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent) for _ in range(count)]  # noqa: S603  our own module

    def __enter__(self) -> Helpers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        self.stand_still(False)
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    def stand_still(self, still: bool) -> None:
        """Stop or continue."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP if still else signal.SIGCONT)


class StandStill:
    """A progress that lets helpers stand still while a cell measures speed; everything else is handed on."""

    def __init__(self, progress: Progress, helpers: Helpers, timed: Callable[[Cell], bool]) -> None:
        self._progress, self._helpers, self._timed = progress, helpers, timed

    def start(self, study: Study, plan: Plan, total: int, finished: int) -> None:
        """Handed on."""
        self._progress.start(study, plan, total, finished)

    def cell_started(self, cell: Cell) -> None:
        """Stop the helpers if the cell measures speed."""
        self._helpers.stand_still(self._timed(cell))
        self._progress.cell_started(cell)

    def epoch(self, cell: Cell, epoch: int, epochs: int, loss: float) -> None:
        """Handed on."""
        self._progress.epoch(cell, epoch, epochs, loss)

    def cell_finished(self, cell: Cell, seconds: float) -> None:
        """Let them go on."""
        self._helpers.stand_still(False)
        self._progress.cell_finished(cell, seconds)

    def cell_failed(self, cell: Cell, error: BaseException) -> None:
        """Let them go on."""
        self._helpers.stand_still(False)
        self._progress.cell_failed(cell, error)

    def note(self, line: str) -> None:
        """Handed on."""
        self._progress.note(line)

    def stop(self) -> None:
        """Handed on."""
        self._progress.stop()


class _Orphan(QuietProgress):
    """Says nothing, and ends the process when the one that it helps is gone."""

    def __init__(self) -> None:
        self._parent = os.getppid()

    def cell_started(self, cell: Cell) -> None:
        """Look for the parent."""
        if os.getppid() != self._parent:
            sys.exit(0)


def main(out: Path, names: Sequence[str]) -> None:
    """Compute cells of the demo's studies until none is left."""
    from outlast.cli._app import demo_plan
    from outlast.errors import MissingDataError, MissingExtraError
    from outlast.studies import get
    from outlast.studies._run import assist

    progress = _Orphan()
    for name in reversed(names):
        study = get(name)
        try:
            assist(study, demo_plan(study), out, progress)
        except (MissingDataError, MissingExtraError):
            continue  # the other process says so


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
