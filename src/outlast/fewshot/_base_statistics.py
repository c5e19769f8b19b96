"""Means and covariances of base classes, streamed, merged exactly, kept as factors.

A factor R (r x d) with ``R^T R`` equal to the covariance replaces the covariance itself: it exists for singular ones too,
needs no factorisation to sample from, and two of them are joined by putting their rows below each other.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._files import load_arrays, save_arrays
from outlast._core._typing import Float
from outlast.errors import OutlastWarning
from outlast.fewshot._transform import Negative, tukey_transform

_VERSION = 1


class BaseStatistics:
    """Count, mean and covariance factor of each base class.

    Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021.

    ```python
    base = BaseStatistics.from_features(features, labels)
    ```

    Features that come in parts: start empty, ``BaseStatistics(d)``, and call ``partial_fit``; other processes' parts
    come in by ``merge``. Any division gives the statistics of all at once.

    Args:
        dim: width of the features.
        tukey: power of the transform that the features were brought through, 1 for none; recorded only.
        dtype: of means and factors as they are kept; every update is computed in float64 and rounded to it.
        device: where they lie.

    Raises:
        ValueError, TypeError: ``dim`` below 1, ``tukey`` no number, or a ``dtype`` that is not floating.

    Attributes:
        labels: names of the classes, in order, as they were given.
        counts: features of each class, int64 ``(B,)``.
        means: ``(B, d)``.
        factors: one ``(r_i, d)`` for each class, ``r_i`` at most ``min(n_i, d)``; rows may be zero.
        tukey: as given.
    """

    def __init__(
        self, dim: int, *, tukey: float = 1.0, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        self.dim = _checks.integer("dim", dim, low=1)
        self.tukey = _checks.real("tukey", tukey)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type, got {dtype}")
        self.dtype = dtype
        self.device = torch.device("cpu" if device is None else device)
        self.labels: list[Any] = []
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.means = torch.zeros(0, dim, dtype=dtype, device=self.device)
        self.factors: list[Tensor] = []
        self._borrowed = False  # whether another object has the same tensors

    def __copy__(self) -> BaseStatistics:
        """Statistics that share tensors with these until one of both is changed."""
        found = self.of(range(len(self)))
        found.counts, found.means = self.counts, self.means
        found._borrowed = self._borrowed = True
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> BaseStatistics:
        return self.__copy__()

    @classmethod
    def from_features(
        cls,
        features: Any,
        labels: Any,
        *,
        tukey: float | None = None,
        rank: int | None = None,
        min_count: int | None = None,
        max_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        negative: Negative = "raise",
    ) -> BaseStatistics:
        """Statistics of labelled features.

        Args:
            features: ``(N, d)``, tensor or array. Untransformed for the official protocol.
            labels: ``(N,)``: integers or any hashable names.
            tukey: transform the features with this power first (``tukey_transform``); None leaves them as they are.
            rank: keep that many leading directions of each covariance (updates later keep all of theirs); None keeps all.
            min_count: leave out classes with fewer features, with a warning that names them; None refuses classes with one.
            max_bytes: refuse before anything is made if the statistics would take more.
            dtype: of means and factors.
            device: where they lie.
            negative: as in ``tukey_transform``, with ``tukey``.

        Raises:
            ValueError: shapes that do not fit, values that are not finite (in the features, or in the statistics for their
                ``dtype``), a class with one feature, too many bytes.
        """
        rows = _rows(features, "features")
        members = _members(labels, len(rows))
        least = 2 if min_count is None else _checks.integer("min_count", min_count, low=2)
        few = [name for name, own in members.items() if len(own) < least]
        if few and min_count is None:
            raise ValueError(f"class {few[0]!r} has one feature, and a covariance needs two; give min_count= to leave such classes out")
        if few:
            warnings.warn(
                f"classes with fewer than {least} features are left out: {', '.join(map(repr, few[:10]))}"
                + (f" and {len(few) - 10} more" if len(few) > 10 else ""),
                OutlastWarning,
                stacklevel=2,
            )
        kept = _sorted([name for name in members if name not in set(few)])
        if not kept:
            raise ValueError(f"no base class is left: all {len(members)} have fewer than min_count={least} features")
        if tukey is not None:
            rows = tukey_transform(rows, tukey, negative=negative)
        found = cls(rows.shape[1], tukey=1.0 if tukey is None else tukey, dtype=dtype, device=device)
        if rank is not None:
            _checks.integer("rank", rank, low=1)
        size = torch.empty((), dtype=dtype).element_size() * rows.shape[1]
        ranks = [min(len(members[name]), rows.shape[1], rank or rows.shape[1]) for name in kept]
        if max_bytes is not None and size * (sum(ranks) + len(kept)) > max_bytes:
            fits = max_bytes // (size * len(kept)) - 1
            way_out = f"rank={fits} fits" if fits >= 1 else "no rank fits"
            raise ValueError(f"the statistics would take {size * (sum(ranks) + len(kept)):,} bytes, max_bytes is {max_bytes:,}; {way_out}")
        for name in kept:
            found._add(name, rows[members[name]])
            if rank is not None:
                found.factors[-1] = _truncated(found.factors[-1], rank)
        return found

    def partial_fit(self, features: Any, labels: Any, *, transformed: bool | None = None, negative: Negative = "raise") -> BaseStatistics:
        """Take in more features; classes may be new or known.

        Args:
            features: ``(N, d)``, tensor or array.
            labels: ``(N,)``: integers or any hashable names.
            transformed: with a power (``tukey`` other than 1), whether these features were brought through it already; False
                transforms them here. It must be said then, since a mixture of both would go unnoticed.
            negative: as in ``tukey_transform``, with ``transformed=False``.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, ``transformed`` missing.
        """
        rows = _rows(features, "features")
        if self.tukey != 1.0 and transformed is None:
            raise ValueError(f"the statistics have tukey={self.tukey:g}: say transformed=True or False of these features")
        if self.tukey != 1.0 and not transformed:
            rows = tukey_transform(rows, self.tukey, negative=negative)
        if rows.shape[1] != self.dim:
            raise ValueError(f"features have width {rows.shape[1]}, the statistics {self.dim}")
        members = _members(labels, len(rows))
        draft = self.__copy__()
        for name in _sorted(list(members)):
            draft._add(name, rows[members[name]])
        return self._become(draft)

    def merge(self, other: BaseStatistics) -> BaseStatistics:
        """Take in another shard's statistics, as if all features had been seen here.

        Raises:
            ValueError: another width, or another recorded transform.
        """
        if other.dim != self.dim or other.tukey != self.tukey:
            raise ValueError(
                f"cannot merge statistics of width {other.dim}, tukey={other.tukey:g} into width {self.dim}, tukey={self.tukey:g}"
            )
        draft = self.__copy__()
        for number, name in enumerate(other.labels):
            draft._join(name, int(other.counts[number]), other.means[number], other.factors[number])
        return self._become(draft)

    def _become(self, draft: BaseStatistics) -> BaseStatistics:
        """Take in all or nothing: what is refused half-way was added to the draft only."""
        self.labels, self.counts, self.means, self.factors = draft.labels, draft.counts, draft.means, draft.factors
        self._borrowed = draft._borrowed
        return self

    def _add(self, name: Any, rows: Tensor) -> None:
        wide = rows.to(self.device, torch.float64)
        mean = wide.mean(0)
        factor = (wide - mean) / math.sqrt(max(1, len(wide) - 1))
        self._join(name, len(wide), mean, factor)

    def _join(self, name: Any, count: int, mean: Tensor, factor: Tensor) -> None:
        """Pairwise update: the scatters add up, and so does what lies between the means."""
        mean, factor = mean.double().to(self.device), factor.double().to(self.device)
        if self._borrowed:
            self.counts, self.means, self._borrowed = self.counts.clone(), self.means.clone(), False
        if name not in self.labels:
            self.labels.append(name)
            self.counts = torch.cat([self.counts, torch.tensor([count])])
            self.means = torch.cat([self.means, mean.to(self.dtype)[None]])
            self.factors.append(_compact(factor).to(self.dtype))
            self._check_finite(len(self) - 1)
            return
        place = self.labels.index(name)
        old, total = int(self.counts[place]), int(self.counts[place]) + count
        before = self.means[place].double()
        between = (mean - before) * math.sqrt(old * count / total)
        scatter = [self.factors[place].double() * math.sqrt(max(0, old - 1)), factor * math.sqrt(max(0, count - 1)), between[None]]
        self.counts[place] = total
        self.means[place] = (before + (mean - before) * (count / total)).to(self.dtype)
        self.factors[place] = _compact(torch.cat(scatter) / math.sqrt(max(1, total - 1))).to(self.dtype)
        self._check_finite(place)

    def __len__(self) -> int:
        return len(self.labels)

    def covariance(self, i: int) -> Float[Tensor, "d d"]:
        """Covariance of class number ``i``."""
        return self.factors[i].mT @ self.factors[i]

    @property
    def nbytes(self) -> int:
        """Bytes of means and factors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.means, *self.factors))

    def without(self, labels: Sequence[Any]) -> BaseStatistics:
        """The statistics of the other classes."""
        return self.of([number for number, name in enumerate(self.labels) if name not in set(labels)])

    def of(self, numbers: Sequence[int]) -> BaseStatistics:
        """The statistics of some classes, by their numbers."""
        found = BaseStatistics(self.dim, tukey=self.tukey, dtype=self.dtype, device=self.device)
        found.labels = [self.labels[number] for number in numbers]
        index = torch.tensor(list(numbers), dtype=torch.int64)
        found.counts, found.means = self.counts[index], self.means[index.to(self.device)]
        found.factors = [self.factors[number] for number in numbers]
        return found

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BaseStatistics:
        """A copy elsewhere or in another precision.

        Raises:
            ValueError: statistics that overflow in it.
        """
        found = self.of(range(len(self)))
        found.device = torch.device(device) if device is not None else self.device
        found.dtype = dtype or self.dtype
        found.means = self.means.to(found.device, found.dtype, copy=True)
        found.factors = [factor.to(found.device, found.dtype) for factor in self.factors]
        for number in range(len(found)):
            found._check_finite(number)
        return found

    def save(self, path: str | Path) -> None:
        """Write to one ``.npz`` file, whole or not at all.

        Raises:
            TypeError: names of classes that are neither integers nor strings.
        """
        labels = [name.item() if isinstance(name, np.generic) else name for name in self.labels]
        if not all(isinstance(name, int | str) for name in labels):
            raise TypeError("only classes named by integers or strings can be saved")
        about = {
            "dim": self.dim,
            "tukey": self.tukey,
            "labels": labels,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        arrays: dict[str, Any] = {f"factor_{number}": _array(factor) for number, factor in enumerate(self.factors)}
        arrays |= {"about": np.array(json.dumps(about)), "counts": self.counts.numpy(), "means": _array(self.means)}
        save_arrays(path, _VERSION, arrays)

    @classmethod
    def load(cls, path: str | Path) -> BaseStatistics:
        """Read a file of ``save``; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFileError: it is no such file.
            ValueError: statistics that are not finite.
        """
        with load_arrays(path, _VERSION, "base statistics") as file:
            about: dict[str, Any] = json.loads(str(file["about"]))
            dtype: torch.dtype = getattr(torch, about["dtype"])
            found = cls(about["dim"], tukey=about["tukey"], dtype=dtype)
            found.labels = list(about["labels"])
            found.counts = torch.from_numpy(file["counts"])
            found.means = _tensor(file["means"], dtype)
            found.factors = [_tensor(file[f"factor_{number}"], dtype) for number in range(len(found.labels))]
        for number in range(len(found)):
            found._check_finite(number)
        return found

    def _check_finite(self, number: int) -> None:
        """One entry would get into every distance, through the centre of all means."""
        if not (torch.isfinite(self.means[number]).all() and torch.isfinite(self.factors[number]).all()):
            raise ValueError(f"the statistics of base class {self.labels[number]!r} hold NaN or infinity in {self.dtype}")

    def __repr__(self) -> str:
        size = f"{self.nbytes / 1e6:.1f} MB"
        return f"BaseStatistics({len(self)} classes, width {self.dim}, {int(self.counts.sum())} features, tukey={self.tukey:g}, {size})"


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Numpy knows no bfloat16: its bits travel as int16."""
    kept = tensor.cpu().contiguous()
    return kept.view(torch.int16).numpy() if kept.dtype == torch.bfloat16 else kept.numpy()


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(array)
    return found.view(torch.bfloat16) if dtype == torch.bfloat16 else found


def _compact(factor: Tensor) -> Tensor:
    """A factor with at most d rows and the same ``R^T R``."""
    if len(factor) <= factor.shape[1]:
        return factor
    return torch.linalg.qr(factor, mode="r").R


def _truncated(factor: Tensor, rank: int) -> Tensor:
    if len(factor) <= rank:
        return factor
    _, values, vectors = torch.linalg.svd(factor.double(), full_matrices=False)
    return (values[:rank, None] * vectors[:rank]).to(factor.dtype)


def _rows(features: Any, name: str) -> Tensor:
    rows = features if isinstance(features, Tensor) else torch.as_tensor(np.asarray(features))
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"{name} must have shape (N, d) with at least one row, got {tuple(rows.shape)}")
    if not rows.is_floating_point():
        rows = rows.float()
    if not torch.isfinite(rows).all():
        raise ValueError(f"{name} hold NaN or infinity")
    return rows.detach()


def _members(labels: Any, rows: int) -> dict[Any, list[int]]:
    """Numbers of each class's rows."""
    names: list[Any] = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(names) != rows:
        raise ValueError(f"features are {rows} rows and labels {len(names)}")
    found: dict[Any, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name, []).append(number)
    return found


def _sorted(names: list[Any]) -> list[Any]:
    try:
        return sorted(names)
    except TypeError:  # names of several types stay in the order in which they came
        return names
