"""Mixup as an upper bound of an adversarial loss.

Zhang, Deng, Kawaguchi, Ghorbani, Zou, ICLR 2021, section 3.1: for models without bias, on centred data that they classify
rightly, the quadratic mixup loss is at least the quadratic adversarial loss at a radius that the data decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from outlast._core._beta import beta_moments
from outlast._core._result import Result
from outlast.diagnose.mixup_theory._losses import Loss, Model, Rows, targets
from outlast.diagnose.mixup_theory._terms import mixup_terms

_TOLERANCE = 1e-8


@dataclass(frozen=True, repr=False)
class AdvBound(Result):
    """The quadratic mixup loss and the quadratic adversarial losses that it bounds.

    Attributes:
        mixup_quadratic: ``L_std + R1 + R2 + R3``.
        adv_own: adversarial loss at radius ``R_i |x_i| m1``, each sample's own.
        adv_i: at radius ``eps_i sqrt(d)`` with ``eps_i = R_i c_x m1``.
        adv_mix: at radius ``eps_mix sqrt(d)`` with ``eps_mix = min R_i c_x m1``.
        eps_i: shape ``(n,)``.
        eps_mix: the smallest of them.
        R: ``|cos(grad f, x)|`` of each sample, shape ``(n,)``; 0 where either is 0.
        c_x: smallest ``|x_i| / sqrt(d)``.
        holds: whether all conditions are met and the four losses are in that order.
        violations: what is not met, with its size: ``"not centred"`` (largest entry of the mean), ``"misclassified"`` (samples),
            ``"bias"`` (largest ``|grad f . x - f|``), ``"curvature"`` (``|R3|``), ``"order"`` (by how much a loss is too large).
    """

    mixup_quadratic: float
    adv_own: float
    adv_i: float
    adv_mix: float
    eps_i: Tensor
    eps_mix: float
    R: Tensor
    c_x: float
    holds: bool
    violations: Mapping[str, float]

    def _draw(self, ax: Any) -> None:
        ax.bar(["mixup", "own", "i", "mix"], [self.mixup_quadratic, self.adv_own, self.adv_i, self.adv_mix])
        ax.set_ylabel("quadratic loss")


def adversarial_bound(
    f: Model,
    X: Tensor,
    y: Tensor,
    alpha: float,
    *,
    beta: float | None = None,
    pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> AdvBound:
    """Compare the quadratic mixup loss of a binary classifier with the adversarial losses that it should bound, in float64.

    Nothing is raised where the theorem does not apply: ``holds`` is False and ``violations`` says why. Real networks before
    interpolation fail the condition that every sample is classified rightly.

    Args:
        f: gives the logit of class 1, ``(n,)``; as in ``exact_mixup_loss``.
        X: inputs ``(n, d...)``, centred by the caller (the mean of every feature, or pixel, subtracted).
        y: labels in {0, 1}.
        alpha: first parameter of mixup's Beta distribution.
        beta: its second parameter; None for ``alpha``.
        pairs: random partners for each sample for the curvature term R3 alone; None for all pairs.
        generator: of random partners.

    Raises:
        ValueError, TypeError: as ``exact_mixup_loss``.
    """
    loss = Loss("bce")
    rows = Rows(f, X, loss, torch.float64)
    moments = beta_moments(alpha, beta)
    out, grad, Y = _outputs_and_gradients(rows, y)
    x, n, d = rows.X, *rows.X.shape
    mean = x.mean(0)
    residual, h2 = out.sigmoid() - Y, out.sigmoid() * (-out).sigmoid()
    away = (grad * (mean - x)).sum(1)
    covariance = (x - mean).T @ (x - mean) / n
    spread = ((grad @ covariance) * grad).sum(1) + away.square()  # of grad . (r - x_i) over the training inputs r
    r1, r2 = moments.m1 * (residual * away).mean(), 0.5 * moments.m2 * (h2 * spread).mean()
    r3 = 0.0
    if not rows.linear:
        r3 = mixup_terms(f, X, y, alpha, beta=beta, loss="bce", pairs="all" if pairs is None else pairs, generator=generator).R3
    quadratic = float(loss.value(out, Y).mean() + r1 + r2) + r3
    lengths, slopes = x.norm(dim=1), grad.norm(dim=1)
    product = lengths * slopes
    R = torch.where(product > 0.0, (grad * x).sum(1).abs() / product.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    c_x = float(lengths.min()) / d**0.5
    eps_i = R * c_x * moments.m1
    eps_mix = float(eps_i.min())
    own, each, common = (
        float(_quadratic(loss, out, Y, slopes, radius).mean()) for radius in (R * lengths * moments.m1, eps_i * d**0.5, eps_mix * d**0.5)
    )
    scale = max(1.0, abs(quadratic))
    violations: dict[str, float] = {}
    rounding = 4.0 * torch.finfo(X.dtype).eps  # of a mean that was subtracted in that precision
    if float(mean.abs().max()) > max(_TOLERANCE, rounding) * max(float(x.abs().max()), 1e-300):
        violations["not centred"] = float(mean.abs().max())
    wrong = int(((2.0 * Y - 1.0) * out < 0.0).sum())
    if wrong:
        violations["misclassified"] = float(wrong)
    bias = float(((grad * x).sum(1) - out).abs().max())
    if bias > _TOLERANCE * max(1.0, float(out.abs().max())):
        violations["bias"] = bias
    if abs(r3) > _TOLERANCE * scale:
        violations["curvature"] = abs(r3)
    excess = max(own - quadratic, each - own, common - each)
    if excess > 1e-10 * scale:
        violations["order"] = excess
    return AdvBound(quadratic, own, each, common, eps_i, eps_mix, R, c_x, not violations, violations)


def adversarial_loss_logistic(theta: Tensor, X: Tensor, y: Tensor, eta: Tensor | float, norm: float = 2) -> Tensor:
    """The exact worst loss of a linear logistic model within a radius: ``softplus(-s theta . x + eta |theta|_*)``, mean over samples.

    Args:
        theta: weights ``(d,)``.
        X: inputs ``(n, d...)``.
        y: labels in {0, 1}.
        eta: radius, a number or one for each sample.
        norm: of the attack: 2, or ``inf`` (then the dual norm of the weights is their sum; FGSM attains it exactly).

    Returns:
        A scalar in float64, differentiable.

    Raises:
        ValueError: another norm, a negative radius, labels or shapes that do not fit.
    """
    if norm not in (2, float("inf")):
        raise ValueError(f"norm must be 2 or inf, got {norm!r}")
    loss = Loss("bce")
    rows = Rows(theta, X, loss, torch.float64)
    out = rows(rows.X)
    sign = 2.0 * targets(loss, y, out) - 1.0
    wide = theta.double()
    dual = torch.linalg.vector_norm(wide, 2 if norm == 2 else 1)
    return F.softplus(-sign * out + _radius(eta, out) * dual, threshold=40.0).mean()


def adversarial_loss_quadratic(f: Model, X: Tensor, y: Tensor, eta: Tensor | float) -> Tensor:
    """The worst loss within a Euclidean radius, to second order in it, mean over samples.

    ``l + eta |h'(f) - y| |grad f| + eta^2 / 2 h''(f) |grad f|^2`` for a binary classifier.

    Args:
        f: gives the logit of class 1, as in ``exact_mixup_loss``.
        X: inputs ``(n, d...)``.
        y: labels in {0, 1}.
        eta: radius, a number or one for each sample.

    Returns:
        A scalar in float64.

    Raises:
        ValueError, TypeError: as ``exact_mixup_loss``; a negative radius.
    """
    loss = Loss("bce")
    out, grad, Y = _outputs_and_gradients(Rows(f, X, loss, torch.float64), y)
    return _quadratic(loss, out, Y, grad.norm(dim=1), _radius(eta, out)).mean()


def _quadratic(loss: Loss, out: Tensor, Y: Tensor, slopes: Tensor, eta: Tensor | float) -> Tensor:
    return loss.value(out, Y) + eta * (out.sigmoid() - Y).abs() * slopes + 0.5 * loss.curvature(out, eta * slopes)


def _radius(eta: Tensor | float, out: Tensor) -> Tensor:
    radius = torch.as_tensor(eta, dtype=torch.float64, device=out.device)
    if radius.ndim > 1 or (radius.ndim == 1 and len(radius) != len(out)) or not bool((radius >= 0.0).all()):
        raise ValueError(f"eta must be a radius of at least 0, or one for each of the {len(out)} samples, got {eta!r}")
    return radius


def _outputs_and_gradients(rows: Rows, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(n,)``, their gradients with respect to the inputs ``(n, d)``, targets ``(n,)``."""
    with torch.inference_mode(False), rows.measured(), torch.enable_grad():
        x = rows.X.detach().clone().requires_grad_()
        out = rows(x)
        Y = targets(Loss("bce"), y, out.detach())
        (grad,) = torch.autograd.grad(out.sum(), x, materialize_grads=True)
    return out.detach(), grad, Y
