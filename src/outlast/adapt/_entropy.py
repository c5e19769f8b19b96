"""The entropy of predictions, Tent's loss.

Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021, equation 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from outlast._core import _checks
from outlast._core._typing import Shaped


def entropy(logits: Shaped[Tensor, ...], dim: int = 1, reduction: Literal["mean", "sum", "none"] = "mean") -> Shaped[Tensor, ...]:
    """Shannon entropy of ``softmax(logits)`` in nats, between 0 and ``ln C``.

    Computed from ``log_softmax`` in float32 (float64 for float64 logits): in half precision ``0 * -inf`` would be NaN.
    Logits of ``-inf`` are classes of probability 0 and contribute 0.

    Args:
        logits: shape ``(B, C, ...)`` with classes along ``dim``.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over all other positions, ``"sum"``, or ``"none"``.

    Returns:
        A 0-dim tensor, or with ``"none"`` the shape of ``logits`` without ``dim``.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: no dimension ``dim``, fewer than two classes, unknown reduction.
    """
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no dimension {dim}")
    if logits.shape[dim] < 2:
        raise ValueError(f"entropy needs at least 2 classes along dimension {dim}, got logits of shape {tuple(logits.shape)}")
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim)
    p = log_p.exp()
    values = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim)
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


class Entropy(nn.Module):
    """``entropy`` as a loss module."""

    def __init__(self, dim: int = 1, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        self.dim = dim
        self.reduction: Literal["mean", "sum", "none"] = reduction
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, logits: Tensor) -> Tensor:
        """The entropy of ``softmax(logits)``."""
        return entropy(logits, self.dim, self.reduction)

    def extra_repr(self) -> str:
        """Settings."""
        return f"dim={self.dim}, reduction={self.reduction!r}"
