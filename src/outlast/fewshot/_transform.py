"""Tukey's ladder of powers: features after a ReLU are skewed, and their root is nearer to a Gaussian."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from outlast._core import _checks

Negative = Literal["raise", "signed", "relu"]


def tukey_transform(x: Any, lam: float = 0.5, *, negative: Negative = "raise", eps: float = 0.0) -> Any:
    """``x ** lam`` element by element, the logarithm for ``lam = 0``, the identity for ``lam = 1``.

    Yang, Liu, Xu, ICLR 2021, equation 3.

    Args:
        x: tensor or array of any shape; the result is of the same kind.
        lam: the power.
        negative: what to do with negative entries: ``"raise"``, ``"signed"`` (``sign(x) |x| ** lam``, for features that have
            signs: CLIP, DINO, after a LayerNorm), or ``"relu"`` (0).
        eps: added before the power.

    Raises:
        ValueError: negative entries with ``"raise"`` (unless ``lam`` is a positive integer), zeros with ``lam <= 0``, values
            that are not finite.
    """
    lam = _checks.real("lam", lam)
    eps = _checks.real("eps", eps, low=0.0)
    _checks.choice("negative", negative, ("raise", "signed", "relu"))
    tensor = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.float64 if isinstance(x, np.ndarray) else torch.float32)
    if not torch.isfinite(tensor).all():
        raise ValueError("x holds NaN or infinity")
    found = tensor if lam == 1.0 and eps == 0.0 and negative != "relu" else _power(tensor, lam, negative, eps)
    return found if isinstance(x, Tensor) else found.numpy()


def _power(x: Tensor, lam: float, negative: str, eps: float) -> Tensor:
    below = x < 0
    whole = lam > 0 and float(lam).is_integer()
    if negative == "relu":
        x = x.clamp(min=0.0)
    elif negative == "raise" and not whole and bool(below.any()):
        raise ValueError(
            f"{int(below.sum())} features are negative (the smallest {float(x.min()):.4g}), and x ** {lam:g} is not defined there; use "
            "negative='signed' for features with signs, or 'relu'"
        )
    size = (x.abs() if negative == "signed" else x) + eps
    if lam <= 0 and bool((size == 0).any()):
        raise ValueError(f"{int((size == 0).sum())} features are zero, and lam={lam:g} is not defined there; give eps > 0 or lam > 0")
    powered = size.log() if lam == 0 else size.pow(lam)
    return powered * x.sign() if negative == "signed" and lam != 0 else powered
