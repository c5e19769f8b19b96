"""Running a plan: what is finished is kept, what is missing is computed, what fails is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from outlast._core._ray import ray_session
from outlast.studies._compute import compute
from outlast.studies._design import Study
from outlast.studies._grid import Cell, Plan, cells, chosen_parts
from outlast.studies._store import Record, Store


class Progress(Protocol):
    """Who is told what happens."""

    def start(self, study: Study, plan: Plan, total: int, finished: int) -> None: ...
    def cell_started(self, cell: Cell) -> None: ...
    def epoch(self, cell: Cell, epoch: int, epochs: int, loss: float) -> None: ...
    def cell_finished(self, cell: Cell, seconds: float) -> None: ...
    def cell_failed(self, cell: Cell, error: BaseException) -> None: ...
    def note(self, line: str) -> None: ...
    def stop(self) -> None: ...


@dataclass
class Run:
    """What a run left: the records of finished cells by key, and the cells that failed."""

    study: Study
    plan: Plan
    folder: Path
    cells: list[Cell]
    records: dict[str, Record] = field(default_factory=dict)
    failed: list[tuple[Cell, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every cell is finished."""
        return len(self.records) == len(self.cells)


def check_data(study: Study, plan: Plan) -> None:
    """See that the data of all parts of a plan are at hand.

    Raises:
        MissingDataError: something is not; the message says how to get it.
    """
    needs = {need for part in chosen_parts(study, plan.scale, plan.parts) for need in part.scales[plan.scale].data}
    if needs:
        from outlast.data import TEXTS, find, find_catalogues, find_encoder, find_text

        packages = {"catalogues": find_catalogues, "minilm": find_encoder}
        for name, variant in sorted(needs):
            if variant == "package":
                packages[name]()
            elif name in TEXTS:
                for split in TEXTS[name].files:
                    find_text(name, split, variant)
            else:
                find(name, "train", variant)
                find(name, "test", variant)


def run(study: Study, plan: Plan, root: Path, progress: Progress, *, workers: int = 1) -> Run:
    """Compute the cells of a plan that are not finished yet.

    Cells run one after another in this process, or with ``workers > 1`` through Ray (an existing cluster is used where
    ``RAY_ADDRESS`` names one). Other processes may work on the same folder; each cell is computed once.

    Raises:
        ValueError: the plan does not fit the study.
        MissingDataError, MissingExtraError: before any work.
        OSError: a result cannot be written; finished cells are kept.
    """
    grid = cells(study, plan)
    check_data(study, plan)
    store = Store(root, study.name, plan.scale, progress.note)
    store.prepare(plan)
    result = Run(study, plan, store.folder, grid)
    for cell in grid:
        record = store.read(cell)
        if record is not None:
            result.records[cell.key] = record
    progress.start(study, plan, len(grid), len(result.records))
    try:
        missing = [cell for cell in grid if cell.key not in result.records]
        if missing:
            (_in_process if workers == 1 else _RayWorkers(workers))(missing, store, result, progress)
    finally:
        progress.stop()
    return result


def assist(study: Study, plan: Plan, root: Path, progress: Progress) -> None:
    """Compute cells of a plan that another process runs in the same folder, those excepted that measure speed.

    Returns when all of them are finished. Neither the manifest nor a summary is written: these are the other process's.

    Raises:
        ValueError: the plan does not fit the study.
        MissingDataError, MissingExtraError: before any work.
        OSError: a result cannot be written.
    """
    grid = [cell for cell in cells(study, plan) if not study.part(cell.part).timed]
    check_data(study, plan)
    store = Store(root, study.name, plan.scale, progress.note)
    missing = [cell for cell in grid if store.read(cell) is None]
    _in_process(missing, store, Run(study, plan, store.folder, grid), progress)


def collect(study: Study, plan: Plan, root: Path, notify: Callable[[str], None]) -> Run:
    """The finished cells of a plan, computing nothing."""
    store = Store(root, study.name, plan.scale, notify)
    grid = cells(study, plan)
    found = ((cell, store.read(cell)) for cell in grid)
    return Run(study, plan, store.folder, grid, {cell.key: record for cell, record in found if record is not None})


def _in_process(missing: list[Cell], store: Store, result: Run, progress: Progress) -> None:
    for cell in _until_done(missing):
        with store.claim(cell) as mine:
            if not mine:
                continue
            record = store.read(cell)  # another process may have finished it since
            if record is None:
                progress.cell_started(cell)
                try:
                    record = store.write(cell, compute(cell, lambda e, n, loss, c=cell: progress.epoch(c, e, n, loss)))
                except OSError:
                    raise
                except Exception as error:
                    result.failed.append((cell, f"{type(error).__name__}: {error}"))
                    progress.cell_failed(cell, error)
                    missing.remove(cell)
                    continue
            progress.cell_finished(cell, record["seconds"])
            result.records[cell.key] = record
            missing.remove(cell)


def _until_done(missing: list[Cell]) -> Iterator[Cell]:
    """Go round the missing cells until none is left; wait between rounds in which other processes held them all."""
    while missing:
        before = len(missing)
        yield from list(missing)
        if len(missing) == before:
            time.sleep(0.5)


class _RayWorkers:
    """Cells over Ray: it places, retries and waits; results are written here."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __call__(self, missing: list[Cell], store: Store, result: Run, progress: Progress) -> None:
        timed = [cell for cell in missing if result.study.part(cell.part).timed]
        others = [cell for cell in missing if cell not in timed]
        with ray_session(self._workers, missing[0].launch["threads"], "--workers") as ray:
            for some, workers in ((others, self._workers), (timed, 1)):  # those that measure speed run by themselves
                if some:
                    self._work(ray, some, workers, store, result, progress)

    def _work(self, ray: Any, missing: list[Cell], workers: int, store: Store, result: Run, progress: Progress) -> None:
        gpus = 0 if missing[0].launch["accelerator"] == "cpu" or not ray.cluster_resources().get("GPU") else missing[0].launch["devices"]
        remote = ray.remote(num_cpus=missing[0].launch["threads"], num_gpus=gpus)(_remote_compute)
        running: dict[Any, tuple[Cell, ExitStack]] = {}
        for cell in _until_done(missing):
            under_way = [other for other, _ in running.values()]
            if len(running) == workers or (running and all(any(c is o for o in under_way) for c in missing)):
                self._await_one(ray, running, missing, store, result, progress)
            if any(cell is other for other, _ in running.values()) or cell not in missing:
                continue
            lock = ExitStack()
            if not lock.enter_context(store.claim(cell)):
                lock.close()
                continue
            record = store.read(cell)
            if record is not None:
                lock.close()
                result.records[cell.key] = record
                missing.remove(cell)
                continue
            progress.cell_started(cell)
            running[remote.remote(cell)] = (cell, lock)

    def _await_one(
        self, ray: Any, running: dict[Any, tuple[Cell, ExitStack]], missing: list[Cell], store: Store, result: Run, progress: Progress
    ) -> None:
        done, _ = ray.wait(list(running), num_returns=1)
        cell, lock = running.pop(done[0])
        with lock:
            try:
                record = store.write(cell, ray.get(done[0]))
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                result.failed.append((cell, f"{type(cause).__name__}: {cause}"))
                progress.cell_failed(cell, cause)
            else:
                progress.cell_finished(cell, record["seconds"])
                result.records[cell.key] = record
            missing.remove(cell)


def _remote_compute(cell: Cell) -> dict[str, Any]:
    return compute(cell, lambda _epoch, _epochs, _loss: None)
