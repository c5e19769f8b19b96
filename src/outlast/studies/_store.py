"""Results on disk: one whole JSON file a cell, checked when read, locked while computed."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from outlast._core._files import write_whole
from outlast.errors import DamagedFileError
from outlast.studies._grid import Cell, Launch, Plan, canonical

FORMAT = "outlast.cell"
Record = dict[str, Any]


class Store:
    """The folder of one study at one scale.

    ``notify`` gets one line for each damaged file that is set aside.
    """

    def __init__(self, root: Path, study: str, scale: str, notify: Callable[[str], None]) -> None:
        self.folder = root / study / scale
        self._notify = notify

    def path(self, cell: Cell) -> Path:
        """Where a cell's result lies."""
        return self.folder / cell.part / cell.file_name

    def prepare(self, plan: Plan) -> None:
        """Make the folder and add the plan to the manifest, so that an unwritable place is known before any work.

        Raises:
            OSError: the folder cannot be made or written.
        """
        with self._lock("manifest", fcntl.LOCK_EX):
            try:
                before = read_plans(self.folder)
            except (FileNotFoundError, DamagedFileError):
                before = ()  # the results themselves do not depend on it
            plans = [asdict(known) for known in (*(known for known in before if known != plan), plan)]
            content = {"format": "outlast.run", "version": 2, "plans": plans}
            write_whole(self.folder / "run.json", (json.dumps(content, indent=2) + "\n").encode())

    def read(self, cell: Cell) -> Record | None:
        """A finished cell's record; None if there is none that can be trusted.

        A file that is not whole or not what it says is set aside beside itself (never deleted) and reported.
        """
        path = self.path(cell)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            return self._checked(data, cell)
        except (ValueError, KeyError, TypeError, DamagedFileError) as error:
            aside = _free_name(path.with_suffix(".damaged"))
            path.rename(aside)
            self._notify(f"damaged result set aside as {aside} ({error}); the cell is computed again")
            return None

    def _checked(self, data: bytes, cell: Cell) -> Record:
        record = json.loads(data)
        if not isinstance(record, dict):
            raise DamagedFileError("not a JSON object")
        record = cast("Record", record)
        digest = record.pop("digest", None)
        if digest != _digest(record):
            raise DamagedFileError("its checksum does not fit")
        if record.get("format") != FORMAT or record["key"] != cell.key:
            raise DamagedFileError("it belongs to another cell")
        return record

    def write(self, cell: Cell, record: Mapping[str, Any]) -> Record:
        """Keep a finished cell: whole or not at all.

        Raises:
            OSError: the disk is full or the folder not writable; earlier results are untouched.
        """
        content: Record = {"format": FORMAT, "version": 1, "key": cell.key, **asdict(cell), **record}
        data = json.dumps({**content, "digest": _digest(content)}, indent=1, allow_nan=False)
        write_whole(self.path(cell), (data + "\n").encode())
        return content

    @contextmanager
    def claim(self, cell: Cell) -> Generator[bool]:
        """Whether this process may compute the cell now; a lock that dies with the process keeps others off it."""
        with self._lock(cell.key[:20], fcntl.LOCK_EX | fcntl.LOCK_NB) as mine:
            yield mine

    @contextmanager
    def _lock(self, name: str, kind: int) -> Generator[bool]:
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        path = locks / name
        with path.open("w") as file:
            try:
                fcntl.flock(file, kind)
            except BlockingIOError:
                yield False
                return
            try:
                yield True
            finally:
                if kind & fcntl.LOCK_NB:  # who waits for a lock would hold it on a file that is gone
                    path.unlink(missing_ok=True)


def read_plans(folder: Path) -> tuple[Plan, ...]:
    """The plans that were run into a folder, as its manifest lists them, the latest last.

    Raises:
        FileNotFoundError: there is no manifest.
        DamagedFileError: it cannot be read.
    """
    path = folder / "run.json"
    data = path.read_bytes()
    try:
        content = json.loads(data)
        entries = [content] if content["version"] == 1 else content["plans"]  # the first form held one plan
        if not entries:
            raise ValueError("no plans")
        return tuple(
            Plan(
                study=entry["study"],
                scale=entry["scale"],
                seeds=int(entry["seeds"]),
                parts=tuple(entry["parts"]),
                overrides=entry["overrides"],
                launch=Launch(**entry["launch"]),
            )
            for entry in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{path} is no manifest of a run ({error})") from error


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(record).encode()).hexdigest()


def _free_name(path: Path) -> Path:
    number = 0
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
