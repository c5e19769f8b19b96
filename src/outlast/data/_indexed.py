"""Samples that carry their number, so that what is known of a sample stays with it under any shuffle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Indexed(Dataset[tuple[Any, ...]]):
    """A map-style data set whose items end in the number of the sample: ``(x, y)`` becomes ``(x, y, i)``, ``x`` becomes ``(x, i)``.

    Args:
        dataset: anything with ``len`` and ``[]``.
        ids: numbers to give instead of positions, one for each sample, all different; None for positions.

    Raises:
        ValueError: not one number for each sample, or one given twice (named).
        TypeError: a data set without a length, or numbers that are no integers.
    """

    def __init__(self, dataset: Any, ids: Sequence[int] | Tensor | None = None) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"Indexed takes a map-style data set (len and []), got {type(dataset).__name__}")
        self.dataset = dataset
        self.ids: Tensor | None = None
        if ids is not None:
            numbers = torch.as_tensor(ids)
            if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
                raise TypeError(f"ids must be integers, got {numbers.dtype}")
            if numbers.shape != (len(dataset),):
                raise ValueError(f"ids must be one number for each of the {len(dataset)} samples, got shape {tuple(numbers.shape)}")
            values, counts = numbers.unique(return_counts=True)
            if (counts > 1).any():
                raise ValueError(f"id {int(values[counts > 1][0])} is given to more than one sample")
            self.ids = numbers.to(torch.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        item = self.dataset[index]
        position = index + len(self) if index < 0 else int(index)
        number = position if self.ids is None else int(self.ids[position])
        return (*cast("tuple[Any, ...]", item), number) if isinstance(item, tuple | list) else (item, number)
