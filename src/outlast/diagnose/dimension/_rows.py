"""From what users have (tensors, arrays, memory maps, data sets, loaders) to rows of numbers, checked and told apart."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from outlast._core._batches import arguments_of
from outlast.errors import OutlastWarning

Duplicates = Literal["drop", "error", "keep"]
_BLOCK = 8192


@dataclass
class Rows:
    """Distinct rows of data.

    Attributes:
        values: floating point, shape ``(n, d)``.
        index: number of each row in the data as given.
        num_duplicates: exact copies found (those beyond the first of each).
        notes: what was converted.
    """

    values: Tensor
    index: Tensor
    num_duplicates: int
    notes: tuple[str, ...]


def as_rows(data: Any, *, duplicates: Duplicates = "drop", device: torch.device | str | None = None, least: int = 2) -> Rows:
    """Check data and find exact copies.

    Args:
        data: ``(N, ...)`` as a tensor, array or memory map; a Dataset or an iterable of batches (samples or batches as
            tensors, or tuples whose first entry is one). What is no array is written to a temporary file once, row by row,
            so memory stays small and a shuffling loader does no harm.
        duplicates: ``"drop"`` keeps the first of equal rows, ``"error"`` refuses, ``"keep"`` keeps all.
        device: where to compute; None for where the data are.
        least: how many distinct rows there must be.

    Raises:
        TypeError: complex or text data, or nothing that holds rows.
        ValueError: empty data, NaN or infinity (with the first row), too few distinct rows, copies under ``"error"``.
    """
    if duplicates not in ("drop", "error", "keep"):
        raise ValueError(f"duplicates must be 'drop', 'error' or 'keep', got {duplicates!r}")
    values = _matrix(data)
    notes: list[str] = []
    if device is not None:
        values = values.to(device)
    if values.dtype == torch.bool or not values.is_floating_point():
        largest = 255.0 if values.dtype == torch.uint8 else max(1.0, float(values.abs().max())) if values.numel() else 1.0
        notes.append(f"{str(values.dtype).removeprefix('torch.')} values divided by {largest:g}, as float32")
        values = values.to(torch.float32) / largest
    elif values.dtype in (torch.float16, torch.bfloat16):
        values = values.to(torch.float32)
    if not len(values) or not values.shape[1]:
        raise ValueError(f"data is empty: shape {tuple(values.shape)}")
    _check_finite(values)
    first = _first_of_copies(values)
    copies = int((~first).sum())
    index = torch.arange(len(values), device=values.device)
    if copies and duplicates == "error":
        second = int((~first).nonzero()[0])
        raise ValueError(f"data holds {copies} exact copies of earlier rows, the first at row {second}; duplicates='drop' removes them")
    distinct = len(values) - copies
    if distinct < least:
        same = "all rows are identical" if distinct == 1 else f"data has {distinct} distinct rows"
        raise ValueError(f"{same} ({len(values)} rows, {copies} exact copies); this needs at least {least} distinct rows")
    if copies and duplicates == "drop":
        values, index = values[first], index[first]
    if len(values) < 100:
        _warn(f"{len(values)} rows are too few for an estimate of dimension; below 500 it is mostly noise")
    if _is_binary(values):
        _warn("the data hold two values only (binary or one-hot): Euclidean neighbours tie, and an estimator for Hamming distances fits")
    return Rows(values, index, copies, tuple(notes))


def _matrix(data: Any) -> Tensor:
    if isinstance(data, Tensor):
        if data.is_complex():
            raise TypeError("data is complex; give real numbers, for example torch.view_as_real")
        return _flat(data.detach())
    if isinstance(data, np.ndarray):
        return _flat(_from_numpy(cast("np.ndarray[Any, Any]", data)))
    if isinstance(data, str | bytes) or not (isinstance(data, Dataset | Iterable)):
        raise TypeError(f"data must be a tensor, an array, a Dataset or an iterable of batches, got {type(data).__name__}")
    if isinstance(data, list | tuple):
        try:
            return _flat(_from_numpy(np.asarray(data)))
        except ValueError:
            pass  # ragged: batches
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
    return values.reshape(len(values), -1) if values.ndim != 2 else values


def _spooled(data: Any) -> Tensor:
    """Rows of a stream in a temporary file, mapped into memory."""
    width: int | None = None
    count = 0
    with tempfile.TemporaryFile() as file:  # the map outlives it; the file has no name and goes with the map
        for part in _parts(data):
            if width is not None and part.shape[1] != width:
                raise ValueError(f"rows have different lengths: {width} values, then {part.shape[1]} at row {count}")
            width = part.shape[1]
            count += len(part)
            file.write(part.contiguous().numpy().tobytes())
        file.flush()
        if width is None or count == 0:
            raise ValueError("data is empty: it yields no rows")
        return torch.from_numpy(np.memmap(file, np.float32, mode="r+", shape=(count, width)))


def _parts(data: Any) -> Iterator[Tensor]:
    """The batches of a loader, or the samples of a data set one by one, as float32 rows."""
    samples = isinstance(data, Dataset)
    source = (data[n] for n in range(len(cast("Sized", data)))) if samples and hasattr(data, "__getitem__") else iter(data)
    for item in source:
        (value,), _ = arguments_of(item if isinstance(item, tuple | list) else (item,))
        value = value if isinstance(value, Tensor | np.ndarray) else np.asarray(value)
        part = _matrix(value[None] if samples else value)
        if not part.is_floating_point():
            part = part.to(torch.float32) / (255.0 if part.dtype == torch.uint8 else 1.0)
        yield part.to(torch.float32).cpu()


def _check_finite(values: Tensor) -> None:
    for start in range(0, len(values), _BLOCK):
        bad = ~torch.isfinite(values[start : start + _BLOCK]).all(1)
        if bool(bad.any()):
            raise ValueError(f"data holds NaN or infinity, first at row {start + int(bad.nonzero()[0])}")


def _first_of_copies(values: Tensor) -> Tensor:
    """Whether each row is the first of its kind: by a hash of its bytes, then by comparison."""
    n, d = values.shape
    rng = np.random.default_rng(0)
    words = d * (values.element_size() // 4)
    factors = torch.from_numpy(rng.integers(-(1 << 62), 1 << 62, words, dtype=np.int64) | 1).to(values.device)
    hashes = torch.empty(n, dtype=torch.int64, device=values.device)
    step = max(1, (1 << 22) // words)
    for start in range(0, n, step):
        part = (values[start : start + step] + 0.0).contiguous()  # -0.0 equals 0.0, its bytes do not
        hashes[start : start + step] = (part.view(torch.int32).to(torch.int64) * factors).sum(1)
    order = hashes.argsort(stable=True)
    ranked = hashes[order]
    new = torch.ones(n, dtype=torch.bool, device=values.device)
    new[1:] = ranked[1:] != ranked[:-1]
    leader = order[new.nonzero()[:, 0][new.cumsum(0) - 1]]  # the first row of the same hash
    first = torch.ones(n, dtype=torch.bool, device=values.device)
    for start in range(0, n, step):
        here, lead = order[start : start + step], leader[start : start + step]
        suspects = (here != lead).nonzero()[:, 0]
        if len(suspects):
            equal = (values[here[suspects]] == values[lead[suspects]]).all(1)
            first[here[suspects[equal]]] = False
    return first


def _is_binary(values: Tensor) -> bool:
    head = values[:_BLOCK]
    low, high = head.min(), head.max()
    return bool(low < high) and bool(((head == low) | (head == high)).all())


def _warn(message: str) -> None:
    warnings.warn(message, OutlastWarning, stacklevel=4)
