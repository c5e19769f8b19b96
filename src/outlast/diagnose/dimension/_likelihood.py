"""Maximum-likelihood estimates from distances to neighbours.

Levina and Bickel, "Maximum likelihood estimation of intrinsic dimension", NIPS 2004; MacKay and Ghahramani's comment on it,
2005 (average the inverses); Pope et al., "The Intrinsic Dimension of Images and Its Impact on Learning", ICLR 2021, for the
normalisation that its released code uses; Facco et al., Scientific Reports 7:12140, 2017 (TwoNN); Denti et al., Scientific
Reports 12:20005, 2022 (Gride).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from outlast._core._typing import Float

Method = Literal["mackay", "levina_bickel", "levina_bickel_unbiased", "pope2021"]
METHODS: tuple[Method, ...] = ("mackay", "levina_bickel", "levina_bickel_unbiased", "pope2021")
BIASED = {
    "mackay": "",
    "levina_bickel": "up by (k-1)/(k-2)",
    "levina_bickel_unbiased": "",
    "pope2021": "down by (k-2)/(k-1), as in the released code of Pope et al. 2021",
}
LEAST_K = {"mackay": 2, "levina_bickel": 3, "levina_bickel_unbiased": 3, "pope2021": 3}


def log_ratio_sums(distances: Float[Tensor, "m k"], k: int) -> Float[Tensor, " m"]:
    """``S_k(x) = sum_{j<k} ln(T_k / T_j)``: under a locally uniform density of dimension d it is Gamma(k-1, rate d)."""
    return (distances[:, k - 1 : k] / distances[:, : k - 1]).log().sum(1)  # exactly 0 where all are equal


def value_and_error(sums: Float[Tensor, " m"], k: int, method: Method) -> tuple[float, float]:
    """The estimate from the sums of the anchors, and its standard error."""
    m = len(sums)
    spread = float(sums.std()) if m > 1 else math.nan
    if method in ("mackay", "pope2021"):
        mean = float(sums.mean())
        top = k - 1 if method == "mackay" else k - 2
        value = top / mean if mean > 0 else math.inf
        return value, value * spread / (mean * math.sqrt(m)) if mean > 0 else math.nan
    local = (k - 1 if method == "levina_bickel" else k - 2) / sums
    return float(local.mean()), float(local.std()) / math.sqrt(m) if m > 1 else math.nan


def twonn_fit(ratios: Tensor, discard: float) -> float:
    """Least squares through the origin of ``-ln(1 - i/N)`` on ``ln mu_(i)``, without the largest ratios."""
    n = len(ratios)
    x = ratios.sort().values.log()[: math.floor((1.0 - discard) * n)]
    i = torch.arange(1, len(x) + 1, dtype=torch.float64, device=x.device)
    y = -torch.log1p(-i / n)
    finite = torch.isfinite(y)  # with nothing discarded the last point lies at infinity
    x, y = x[finite], y[finite]
    square = float(x @ x)
    return float(x @ y) / square if square > 0 else math.inf


def twonn_ml(ratios: Tensor) -> float:
    """``(N - 1) / sum ln mu``."""
    total = float(ratios.log().sum())
    return (len(ratios) - 1) / total if total > 0 else math.inf


def gride_ml(log_mu: Tensor, n1: int) -> tuple[float, float]:
    """The maximum-likelihood dimension from ``ln(T_{2n} / T_n)`` at ``n = n1``, and its error by Fisher information.

    The likelihood of Denti et al. 2022, equation 7, is concave in d; its derivative is bisected on [1e-3, 1e3].
    """
    n2 = 2 * n1
    n = len(log_mu)
    total = float(log_mu.sum())
    positive = log_mu[log_mu > 0]
    ties = n - len(positive)  # their terms are the limits at ln mu = 0

    def slope(d: float) -> float:
        # d/dd ln(mu^d - 1) = ln mu / (1 - mu^-d)
        inner = float((positive / -torch.expm1(-d * positive)).sum()) + ties / d if n2 - n1 > 1 else 0.0
        return n / d + (n2 - n1 - 1) * inner - (n2 - 1) * total

    d = bisect(slope, 1e-3, 1e3)
    curvature = n / d**2
    if n2 - n1 > 1:
        inner = positive.square() * torch.exp(-d * positive) / torch.expm1(-d * positive).square()
        curvature += (n2 - n1 - 1) * (float(inner.sum()) + ties / d**2)
    return d, 1.0 / math.sqrt(curvature)


def bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """The zero of a falling function, or the end of the interval that it lies beyond."""
    if falling(low) <= 0:
        return low
    if falling(high) >= 0:
        return high
    for _ in range(200):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
