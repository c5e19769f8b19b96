"""Files that are whole or absent: written beside, synced, renamed; and files of arrays with a version."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from outlast.errors import DamagedFileError

# What a damaged archive makes numpy and zipfile raise: a changed byte may ask for a password, or another version.
BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)


def save_arrays(path: str | Path, version: int, arrays: Mapping[str, Any]) -> None:
    """Write an ``.npz`` with its version, whole or not at all.

    Raises:
        OSError: as ``write_whole``.
    """
    buffer = io.BytesIO()
    np.savez(buffer, version=np.asarray(version), **arrays)
    write_whole(Path(path), buffer.getvalue())


@contextmanager
def load_arrays(path: str | Path, version: int, what: str) -> Generator[Any]:
    """The arrays of ``save_arrays``, by name; nothing is unpickled. What goes wrong inside the block counts as damage, too.

    Args:
        path: of the file.
        version: that can be read.
        what: the file should hold, in the plural or without an article, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it is of another version or kind, or damaged.
    """
    with Path(path).open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as data:
                found = int(data["version"]) if "version" in data.files else None
                if found == version:
                    yield data
        except BROKEN as error:
            raise DamagedFileError(f"{path} holds no {what} that can be read whole ({error})") from error
    if found != version:
        has = "no version" if found is None else f"version {found}"
        raise DamagedFileError(f"{path} holds no {what} that can be read: it has {has}, this is version {version}")


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    The temporary file lies in the same folder (a rename is atomic only within one file system) and is removed on
    failure. Folders are made as needed.

    Raises:
        OSError: the folder is not writable, the disk is full, and so on; nothing of ``path`` has changed then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; results are as readable as any other file
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)
