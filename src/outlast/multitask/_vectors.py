"""Gradients of several tasks as vectors: their inner products and weighted sums, in pieces that stay in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 15  # columns at a time
_SMALL = 1e-20  # squared norm; parts of it are above float32's smallest numbers


def gram(rows: Sequence[Tensor]) -> Tensor:
    """Inner products of T vectors, float64 on the CPU, ``(T, T)``.

    Products are taken in float32 at least and added up in float64; where gradients are so small or large that their
    products under- or overflow, all is done again in float64.
    """
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    found = _gram(rows, wide)
    size = found.diagonal()
    if wide == torch.float32 and not bool(((size > _SMALL) & (size < 1.0 / _SMALL)).all()):
        found = _gram(rows, torch.float64)
    return found


def _gram(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for _, part in _chunks(rows):
        wide = part.to(dtype)
        total += (wide @ wide.T).double().cpu()
    return total


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The inner product of two tensors seen as vectors, float64 on the CPU."""
    return gram([left.reshape(-1), right.reshape(-1)])[0, 1]


def combined(rows: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of T vectors."""
    own = weights.to(rows[0].device, rows[0].dtype)
    out = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
    for columns, part in _chunks(rows):
        out[columns] = own @ part
    return out


def _chunks(rows: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    size = rows[0].numel()
    step = max(1, size) if rows[0].is_cuda else _CHUNK
    for start in range(0, size, step):
        columns = slice(start, min(start + step, size))
        yield columns, torch.stack([row[columns] for row in rows])
