"""``outlast diagnose dimension``: reading rows, printing and drawing the estimate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from outlast._core._files import BROKEN
from outlast.errors import DamagedFileError, MissingDataError

if TYPE_CHECKING:
    from outlast.diagnose.dimension import DimensionResult


def read_rows(source: str, split: str) -> Any:
    """Rows by a data set's name, from an array file, or the path of a folder of images.

    Raises:
        ValueError: neither, or an array file without a single array.
        MissingDataError: the file or folder does not exist.
        DamagedFileError: the file cannot be read.
    """
    from outlast.data import DATASETS, load

    if source in DATASETS:
        try:
            return load(source, split).images  # pyright: ignore[reportArgumentType]
        except MissingDataError:
            if not DATASETS[source].small:
                raise
            return load(source, split, variant="small").images  # pyright: ignore[reportArgumentType]
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not path.exists():
        raise MissingDataError(f"{source!r} is no data set ({', '.join(DATASETS)}), and there is no such file or folder")
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{source!r}: give a .npy or .npz file, a folder of images, or a data set's name ({', '.join(DATASETS)})")
    return _array(path)


def _array(path: Path) -> Any:
    import numpy as np

    try:
        with path.open("rb") as file:  # numpy leaves a damaged archive open that it has opened itself
            if file.read(2) != b"PK":
                return np.load(path, mmap_mode="r", allow_pickle=False)
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                names = found.files
                if len(names) == 1:
                    return found[names[0]]
    except BROKEN as error:
        raise DamagedFileError(f"{path} cannot be read as an array ({error})") from error
    raise ValueError(f"{path} holds {len(names)} arrays ({', '.join(names)}); give a file with one")


def print_dimension(result: DimensionResult) -> None:
    """A table, and what one should know about it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for head in ("k", "dimension", "standard error", "95 % interval", "mean distance"):
        table.add_column(head, justify="right")
    for k, e in result.by_k.items():
        bounds = "" if e.low is None or e.high is None else f"{e.low:.2f} to {e.high:.2f}"
        table.add_row(str(k), f"{e.value:.2f}", f"{e.se:.2f}", bounds, f"{e.radius:.4g}")
    console.print(table)
    lines = [
        f"{result.method}; {result.n_anchors:,} anchors among {result.n:,} distinct rows, {result.n_duplicates:,} exact copies dropped"
    ]
    if result.biased:
        lines.append(f"this formula is biased: {result.biased}")
    if result.near_duplicates:
        lines.append(f"{result.near_duplicates:,} anchors have a near-duplicate (nearest neighbour below 0.2 of the second's distance)")
    if not result.reliable:
        lines.append("beyond what this many rows can tell (2 log2 n): read it as a lower bound")
    lines += result.notes
    for line in lines:
        console.print(Text(line))
