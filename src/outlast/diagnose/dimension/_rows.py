"""From what users have (tensors, arrays, memory maps, data sets, loaders) to rows of numbers, checked and told apart."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from outlast._core._batches import arguments_of
from outlast._core._extras import require
from outlast.errors import DamagedFileError, MissingDataError, OutlastWarning

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
Duplicates = Literal["drop", "error", "keep"]
BLOCK = 8192


@dataclass
class Rows:
    """Distinct rows of data.

    Attributes:
        values: floating point, shape ``(n, d)``.
        leader: for each row of the data as given, the number of its row here (that of the first of its copies).
        num_duplicates: exact copies found (those beyond the first of each).
        notes: what was converted.
    """

    values: Tensor
    leader: Tensor
    num_duplicates: int
    notes: tuple[str, ...]


def as_rows(data: Any, *, duplicates: Duplicates = "drop", device: torch.device | str | None = None, least: int = 2) -> Rows:
    """Check data and find exact copies.

    Args:
        data: ``(N, ...)`` as a tensor, array or memory map; a Dataset or an iterable of batches (samples or batches as
            tensors, or tuples whose first entry is one); a folder of images of one size. What is no array is written to a
            temporary file once, row by row, so memory stays small and a shuffling loader does no harm.
        duplicates: ``"drop"`` keeps the first of equal rows, ``"error"`` refuses, ``"keep"`` keeps all.
        device: where to compute; None for where the data are.
        least: how many distinct rows there must be.

    Raises:
        TypeError: complex or text data, or nothing that holds rows.
        ValueError: empty data, NaN or infinity (with the first row), too few distinct rows, copies under ``"error"``.
    """
    if duplicates not in ("drop", "error", "keep"):
        raise ValueError(f"duplicates must be 'drop', 'error' or 'keep', got {duplicates!r}")
    # What lies in a file may be larger than the memory: other numbers of it, and it without its copies, go into another file.
    mapped = (isinstance(data, np.memmap) or not isinstance(data, Tensor | np.ndarray | list | tuple)) and device is None
    notes: list[str] = []
    if isinstance(data, np.memmap) and data.ndim and data.dtype not in (np.float32, np.float64):
        values = _spooled(np.asarray(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK))
        notes.append(f"{data.dtype.name} values taken as {str(values.dtype).removeprefix('torch.')}")
    else:
        values = _matrix(data)
    if device is not None:
        values = values.to(device)
    if values.dtype not in (torch.float32, torch.float64):
        given, values = values.dtype, values.to(_real_type(values.dtype))
        notes.append(f"{str(given).removeprefix('torch.')} values taken as {str(values.dtype).removeprefix('torch.')}")
    _check_finite(values)
    leader = _leaders(values)
    everyone = torch.arange(len(values), device=values.device)
    first = leader == everyone
    copies = int((~first).sum())
    if copies and duplicates == "error":
        second = int((~first).nonzero()[0])
        raise ValueError(f"data holds {copies} exact copies of earlier rows, the first at row {second}; duplicates='drop' removes them")
    distinct = len(values) - copies
    if distinct < least:
        same = "all rows are identical" if distinct == 1 else f"data has {distinct} distinct rows"
        raise ValueError(f"{same} ({len(values)} rows, {copies} exact copies); this needs at least {least} distinct rows")
    if copies and duplicates == "drop":
        leader = (first.cumsum(0) - 1)[leader]
        parts = zip(values.split(BLOCK), first.split(BLOCK), strict=True)
        values = _spooled(part[own] for part, own in parts if own.any()) if mapped else values[first]
    else:
        leader = everyone
    if len(values) < 100:
        _warn(f"{len(values)} rows are too few for an estimate of dimension; below 500 it is mostly noise")
    if _is_binary(values):
        _warn("the data hold two values only (binary or one-hot): Euclidean neighbours tie, and an estimator for Hamming distances fits")
    return Rows(values, leader, copies, tuple(notes))


def _real_type(dtype: torch.dtype) -> torch.dtype:
    """The floating-point type that holds all values of a type: float64 for integers of more than 16 bits."""
    return torch.float64 if dtype in (torch.int32, torch.int64, torch.float64) else torch.float32


def _matrix(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        if data.is_complex():
            raise TypeError("data is complex; give real numbers, for example torch.view_as_real")
        return _flat(data.detach())
    if isinstance(data, np.ndarray):
        return _flat(_from_numpy(cast("np.ndarray[Any, Any]", data)))
    if isinstance(data, PathLike) or (isinstance(data, str) and Path(data).is_dir()):
        return _spooled(ImageFolder(Path(data)))
    if isinstance(data, str | bytes) or not (isinstance(data, Dataset | Iterable)):
        raise TypeError(
            f"data must be a tensor, an array, a Dataset, an iterable of batches or a folder of images, got {type(data).__name__}"
        )
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError("data is empty: it holds no rows")
        if all(isinstance(row, int | float | list | np.generic) for row in cast("list[object]", data)):
            return _flat(_from_numpy(np.asarray(data)))
    return _spooled(data)


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "fiub":
        kind = "complex" if array.dtype.kind == "c" else f"of type {array.dtype}"
        raise TypeError(f"data is {kind}; give real numbers")
    if array.dtype in (np.uint16, np.uint32, np.uint64) or not array.dtype.isnative or array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # we do not write
        return torch.from_numpy(array if min(array.strides, default=0) >= 0 else array.copy())


def _flat(values: Tensor) -> Tensor:
    if values.ndim == 0:
        raise ValueError("data is a single number; give N rows, shape (N, ...)")
    if not values.numel():
        raise ValueError(f"data is empty: shape {tuple(values.shape)}")
    return values.reshape(len(values), -1) if values.ndim != 2 else values


class ImageFolder(Dataset[Any]):
    """The images below a folder, all of one size, as RGB bytes.

    Raises:
        MissingDataError: no such folder, or no images in it.
        MissingExtraError: Pillow (extra ``vision``) is missing.
        ValueError: images of different sizes.
        DamagedFileError: an image that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._open = require("PIL.Image", extra="vision", purpose="reading images").open
        self._files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _PICTURES)
        if not self._files:
            raise MissingDataError(f"{folder} holds no images ({', '.join(_PICTURES)})")
        self._shape = self._read(0).shape

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> npt.NDArray[np.uint8]:
        values = self._read(number)
        if values.shape != self._shape:
            first, here = self._files[0].name, self._files[number].name
            raise ValueError(f"images must have one size: {first} is {self._shape[1]}x{self._shape[0]}, {here} is not")
        return values

    def _read(self, number: int) -> npt.NDArray[np.uint8]:
        try:
            with self._open(self._files[number]) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise DamagedFileError(f"{self._files[number]} cannot be read as an image ({error})") from error


def _spooled(data: Any) -> Tensor:
    """Rows of a stream in a temporary file, mapped into memory."""
    width: int | None = None
    count = 0
    dtype = torch.float32
    with tempfile.TemporaryFile() as file:  # the map outlives it; the file has no name and goes with the map
        for part in _parts(data):
            if width is None:
                width, dtype = part.shape[1], _real_type(part.dtype)
            if part.shape[1] != width:
                raise ValueError(f"rows have different lengths: {width} values, then {part.shape[1]} at row {count}")
            count += len(part)
            file.write(part.to(dtype).cpu().contiguous().numpy().tobytes())
        file.flush()
        if width is None or count == 0:
            raise ValueError("data is empty: it yields no rows")
        kind = np.float64 if dtype == torch.float64 else np.float32
        return torch.from_numpy(np.memmap(file, kind, mode="r+", shape=(count, width)))


def _parts(data: Any) -> Iterator[Tensor]:
    """The batches of a loader, or the samples of a data set one by one, as rows."""
    items = (
        (data[n] for n in range(len(cast("Sized", data))))
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset)
        else iter(data)
    )
    samples = isinstance(data, Dataset)
    for item in items:
        if isinstance(item, Mapping):
            raise TypeError(
                f"data yields mappings (keys {', '.join(map(str, cast('Mapping[object, object]', item)))}); yield the rows themselves"
            )
        label = item[1] if isinstance(item, tuple | list) and len(cast("list[object]", item)) > 1 else None
        one = samples or isinstance(label, int | float | str | np.generic) or (isinstance(label, Tensor) and label.ndim == 0)
        (value,), _ = arguments_of(item if isinstance(item, tuple | list) else (item,))
        value = value if isinstance(value, Tensor | np.ndarray) else np.asarray(value)
        yield _matrix(value[None] if one else value)


def _check_finite(values: Tensor) -> None:
    for start in range(0, len(values), BLOCK):
        bad = ~torch.isfinite(values[start : start + BLOCK]).all(1)
        if bool(bad.any()):
            raise ValueError(f"data holds NaN or infinity, first at row {start + int(bad.nonzero()[0])}")


def _leaders(values: Tensor) -> Tensor:
    """For each row the first one that is equal to it: by a hash of its bytes, then by comparison."""
    n, d = values.shape
    rng = np.random.default_rng(0)
    words = d * (values.element_size() // 4)  # of 32 bits
    factors = torch.from_numpy(rng.integers(-(1 << 62), 1 << 62, words, dtype=np.int64) | 1).to(values.device)
    hashes = torch.empty(n, dtype=torch.int64, device=values.device)
    step = max(1, (1 << 20) // words)
    for start in range(0, n, step):
        part = (values[start : start + step] + 0.0).contiguous()  # -0.0 equals 0.0, its bytes do not
        hashes[start : start + step] = (part.view(torch.int32).to(torch.int64) * factors).sum(1)
    order = hashes.argsort(stable=True)
    ranked = hashes[order]
    new = torch.ones(n, dtype=torch.bool, device=values.device)
    new[1:] = ranked[1:] != ranked[:-1]
    leader = order[new.nonzero()[:, 0][new.cumsum(0) - 1]]  # the first row of the same hash
    first = torch.arange(n, device=values.device)
    for start in range(0, n, step):
        here, lead = order[start : start + step], leader[start : start + step]
        suspects = (here != lead).nonzero()[:, 0]
        if len(suspects):
            equal = (values[here[suspects]] == values[lead[suspects]]).all(1)
            first[here[suspects[equal]]] = lead[suspects[equal]]
    return first


def _is_binary(values: Tensor) -> bool:
    head = values[:BLOCK]
    low, high = head.min(), head.max()
    return bool(low < high) and bool(((head == low) | (head == high)).all())


def _warn(message: str) -> None:
    warnings.warn(message, OutlastWarning, stacklevel=4)
