"""Small linear algebra in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh_descending(matrix: Tensor, *, vectors: bool = True) -> tuple[Tensor, Tensor | None]:
    """Eigenvalues of symmetric positive semidefinite matrices ``(..., n, n)``, largest first, clamped at 0, in float64.

    Returns:
        ``(values, vectors)``: ``(..., n)`` and the matching columns ``(..., n, n)`` (None without ``vectors``).
    """
    wide = matrix.double()
    if not vectors:
        return torch.linalg.eigvalsh(wide).flip(-1).clamp(min=0.0), None
    values, basis = torch.linalg.eigh(wide)
    return values.flip(-1).clamp(min=0.0), basis.flip(-1)
