"""The Beta distribution of mixing weights: moments, and a sampler that is right for every positive parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._result import Result

Law = Literal["beta", "tilde"]


@dataclass(frozen=True, repr=False)
class BetaMoments(Result):
    """Moments of ``1 - lambda`` under the label-preserving law of mixup.

    With ``lambda ~ Beta(a, b)`` for mixed labels, the form that keeps the label of the first sample draws ``lambda`` from
    ``a/(a+b) Beta(a+1, b) + b/(a+b) Beta(b+1, a)``.

    Attributes:
        m1: mean of ``1 - lambda``.
        m2: mean of its square; always ``m1 / 2``, and the mean of ``lambda (1 - lambda)`` under ``Beta(a, b)``.
        ratio: mean of ``((1 - lambda) / lambda) ** 2``; infinite unless ``a > 1`` and ``b > 1``.
    """

    m1: float
    m2: float
    ratio: float


def parameters(alpha: Any, beta: Any = None) -> tuple[float, float]:
    """Both parameters of the law, ``beta`` being ``alpha`` where it is None.

    Raises:
        TypeError: no numbers.
        ValueError: not positive and finite.
    """
    first = _checks.real("alpha", alpha, low=0.0, low_open=True)
    return first, first if beta is None else _checks.real("beta", beta, low=0.0, low_open=True)


def beta_moments(alpha: float, beta: float | None = None) -> BetaMoments:
    """Moments of the label-preserving law of ``Beta(alpha, beta)`` (``Beta(alpha, alpha)`` for ``beta=None``), in closed form.

    Raises:
        ValueError: parameters that are not positive and finite.
    """
    a, b = parameters(alpha, beta)
    m2 = (a / (a + b)) * b / (a + b + 1.0)
    ratio = math.inf
    if min(a, b) > 1.0:
        ratio = (b * (b + 1.0) / (a - 1.0) + a * (a + 1.0) / (b - 1.0)) / (a + b)
    return BetaMoments(2.0 * m2, m2, ratio)


def sample_lambda(
    alpha: float,
    beta: float | None = None,
    shape: tuple[int, ...] = (),
    *,
    law: Law = "beta",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw mixing weights on the processor.

    A Gamma variable of shape ``a`` is one of shape ``a + 1`` times ``U ** (1 / a)``; the ratio of two is taken through
    their logarithms, so that a tiny ``alpha`` gives weights near 0 and 1 and not the 0.5 of 0 / 0
    (``torch.distributions.Beta`` gives exactly 0.5 for a quarter of the draws at ``alpha = 1e-3``).

    Args:
        alpha: first parameter, positive.
        beta: second parameter, positive; None for ``alpha``.
        shape: of the result.
        law: ``"beta"``, or ``"tilde"`` for the weight of the first sample where labels are kept (``BetaMoments``).
        generator: on the CPU; None for torch's own.
        dtype: of the result; the draw is made in float64.

    Returns:
        Weights in [0, 1] of that shape.

    Raises:
        ValueError: parameters that are not positive and finite, an unknown law.
    """
    a, b = parameters(alpha, beta)
    _checks.choice("law", law, ("beta", "tilde"))
    if law == "beta":
        return torch.sigmoid(_log_gamma(a, shape, generator) - _log_gamma(b, shape, generator)).to(dtype)
    own = torch.rand(shape, generator=generator, dtype=torch.float64) < a / (a + b)
    first = torch.sigmoid(_log_gamma(a + 1.0, shape, generator) - _log_gamma(b, shape, generator))
    if a == b:
        return first.to(dtype)
    second = torch.sigmoid(_log_gamma(b + 1.0, shape, generator) - _log_gamma(a, shape, generator))
    return torch.where(own, first, second).to(dtype)


def _log_gamma(a: float, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Logarithm of a standard Gamma variable."""
    draw = torch._standard_gamma(torch.full(shape, a + 1.0, dtype=torch.float64), generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    uniform = 1.0 - torch.rand(shape, generator=generator, dtype=torch.float64)  # in (0, 1]
    return draw.log() + uniform.log().div(a).clamp(min=-1e300)
