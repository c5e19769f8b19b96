"""What mixup's penalty says about the gap between training and test loss of generalised linear models.

Zhang, Deng, Kawaguchi, Ghorbani, Zou, ICLR 2021, section 3.2. The penalty restricts a class of models whose Rademacher
complexity depends on the rank of the data's covariance, where ridge regression's depends on the dimension.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._beta import beta_moments
from outlast._core._random import generator as derived_generator
from outlast.errors import OutlastWarning

Family = Literal["logistic", "poisson", "gaussian"]


def glm_penalty(
    theta: Tensor, X: Tensor, alpha: float, *, family: Family = "logistic", moment: Literal["ratio", "plain"] = "ratio"
) -> Tensor:
    """``(1 / 2n) sum_i A''(theta . x_i) * c * theta' S theta``, with ``S = (1/n) sum x x'``.

    Args:
        theta: weights ``(d,)``.
        X: inputs ``(n, d)``, centred by the caller.
        alpha: of mixup.
        family: log-partition ``A``: ``"logistic"`` (``A'' = p (1 - p)``), ``"poisson"`` (``exp``), ``"gaussian"`` (1).
        moment: ``"ratio"`` is the paper's, ``c = E ((1 - lambda) / lambda)^2``, which expands the mixed input after dividing it
            by ``lambda``; it is infinite for ``alpha <= 1``, the usual setting. ``"plain"`` is ``E (1 - lambda)^2``, always finite.

    Returns:
        A scalar in float64, differentiable in ``theta``.

    Raises:
        ValueError: shapes that do not fit, an unknown family or moment.

    Warns:
        OutlastWarning: the constant is infinite; the data are not centred.
    """
    _checks.choice("family", family, ("logistic", "poisson", "gaussian"))
    _checks.choice("moment", moment, ("ratio", "plain"))
    x, wide = _data(X), theta.double()
    if wide.shape != x.shape[1:]:
        raise ValueError(f"theta must be ({x.shape[1]},), got {tuple(theta.shape)}")
    moments = beta_moments(alpha)
    c = moments.ratio if moment == "ratio" else moments.m2
    if math.isinf(c):
        warnings.warn(
            f'the ratio moment is infinite for alpha = {alpha:g} (it is finite above 1), and so is this penalty; moment="plain" is finite',
            OutlastWarning,
            stacklevel=2,
        )
    if float(x.mean(0).abs().max()) > 1e-6 * max(float(x.abs().max()), 1e-300):
        warnings.warn("X is not centred, which the penalty supposes: subtract its mean", OutlastWarning, stacklevel=2)
    out = x @ wide
    if math.isinf(c):
        return torch.full((), math.inf, dtype=torch.float64, device=out.device)
    return 0.5 * curvature(family, out).mean() * c * out.square().mean()


def curvature(family: str, u: Tensor) -> Tensor:
    """``A''(u)``."""
    if family == "logistic":
        return u.sigmoid() * (-u).sigmoid()
    return u.exp() if family == "poisson" else torch.ones_like(u)


def rademacher_bound_glm(gamma: float, rho: float, rank: int, n: int, *, tight: bool = False) -> float:
    """Bound of the Rademacher complexity of ``{x -> theta . x : E A''(theta . x) theta' S theta <= gamma}``.

    ``max((gamma/rho)^(1/4), (gamma/rho)^(1/2)) sqrt(rank / n)`` for data that are rho-retentive (``retentivity``); the rank
    is that of the data's covariance, not their dimension. The form was derived again and not compared with the paper's text.

    Args:
        gamma: size of the penalty, at least 0.
        rho: retentivity, in (0, 1/2].
        rank: of the covariance.
        n: samples.
        tight: the smaller constant that the same argument gives.

    Raises:
        ValueError: an argument out of its range.
    """
    gamma, rho = _checks.real("gamma", gamma, low=0.0), _checks.real("rho", rho, low=0.0, high=0.5, low_open=True)
    size = _checks.integer("rank", rank, low=0) / _checks.integer("n", n, low=1)
    if tight:
        return math.sqrt(max(gamma / math.sqrt(rho), (gamma**2 / rho) ** (1.0 / 3.0)) * size)
    return max((gamma / rho) ** 0.25, (gamma / rho) ** 0.5) * math.sqrt(size)


def rademacher_bound_two_layer(gamma: float, rank: int, mean_term: float, n: int) -> float:
    """Bound for a two-layer network whose hidden layer is mixed, under squared loss: ``2 sqrt(gamma (rank + mean_term) / n)``.

    The class is ``theta_1' S theta_1 <= gamma`` with ``S`` the covariance of the hidden layer. The factor 2 is as cited and was
    not checked against the paper's text; without the bias of the output layer the argument gives 1.

    Args:
        gamma: size of the penalty, at least 0.
        rank: of ``S``.
        mean_term: ``|S^(+1/2) mu|^2`` with ``mu`` the mean of the hidden layer.
        n: samples.

    Raises:
        ValueError: an argument out of its range.
    """
    gamma, mean_term = _checks.real("gamma", gamma, low=0.0), _checks.real("mean_term", mean_term, low=0.0)
    return 2.0 * math.sqrt(gamma * (_checks.integer("rank", rank, low=0) + mean_term) / _checks.integer("n", n, low=1))


def retentivity(X: Tensor, family: Family = "logistic", directions: int = 1000, seed: int = 0, *, radius: float = 1.0) -> float:
    """The largest ``rho <= 1/2`` with ``(E A''(x . v))^2 >= rho min(1, E (v . x)^2)`` in all directions that were tried.

    A minimum over random directions and eigenvectors is an upper estimate of the data's retentivity. It must be limited to
    weights of some size: for the logistic family ``A''`` falls to 0 as they grow.

    Args:
        X: inputs ``(n, d)``, centred.
        family: as in ``glm_penalty``.
        directions: random directions.
        seed: of the directions.
        radius: largest root of ``E (v . x)^2`` that is tried.

    Raises:
        ValueError: an argument out of its range, data without variance.
    """
    _checks.choice("family", family, ("logistic", "poisson", "gaussian"))
    count, radius = _checks.integer("directions", directions, low=1), _checks.real("radius", radius, low=0.0, low_open=True)
    x = _data(X)
    second = x.T @ x / len(x)
    stream = derived_generator(seed, "retentivity")
    tried = torch.cat([torch.randn(count, x.shape[1], generator=stream, dtype=torch.float64).to(x.device), torch.linalg.eigh(second)[1].T])
    sizes = ((tried @ second) * tried).sum(1).clamp(min=0.0).sqrt()
    seen = sizes > 1e-9 * sizes.max()
    if not bool(seen.any()):
        raise ValueError("X has no variance in any direction")
    unit = x @ (tried[seen] / sizes[seen, None]).T  # (n, directions), of second moment 1
    smallest = 0.5
    for scale in (radius * torch.linspace(0.05, 1.0, 20)).tolist():
        kept = curvature(family, scale * unit).mean(0).square() / min(1.0, scale**2)
        smallest = min(smallest, float(kept.min()))
    return smallest


def _data(X: Tensor) -> Tensor:
    if X.ndim != 2 or 0 in X.shape:
        raise ValueError(f"X must be (n, d) and not empty, got {tuple(X.shape)}")
    return X.double()
