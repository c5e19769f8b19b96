"""The terms that mixup adds to the loss, to second order.

Zhang, Deng, Kawaguchi, Ghorbani, Zou, ICLR 2021, section 3: ``L_mix = L_std + R1 + R2 + R3`` up to terms of third order in
``1 - lambda``. With ``phi(t) = l(x_i + t (x_j - x_i), y_i)``, R1 is ``m1`` times the mean of ``phi'(0)`` and R2 + R3 half
``m2`` times that of ``phi''(0)``; R2 is the Gauss-Newton part, R3 has the model's own curvature.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outlast._core._beta import beta_moments, parameters
from outlast._core._result import Result
from outlast.diagnose.mixup_theory._exact import block_rows, blocks, draw_partners, expected_loss
from outlast.diagnose.mixup_theory._losses import LogPartition, Loss, LossName, Model, Rows, inner, jvp, named_loss, targets


@dataclass(frozen=True, repr=False)
class MixupTerms(Result):
    """Standard loss and what mixup adds.

    Attributes:
        standard: mean loss of the samples themselves.
        R1: pull of the outputs towards what they are at the data's mean; negative where the model is wrong with confidence.
        R2: penalty of the slope in directions in which data vary.
        R3: the model's own curvature; 0 for linear models, and almost everywhere for ReLU networks, which hides their kinks.
        approx: ``standard + R1 + R2 + R3``.
        exact: the exact mixup loss over the same pairs; None if it was not asked for.
        rel_error: error of ``R1 + R2 + R3`` relative to ``exact - standard``; None likewise. About 0.1 at logits of order 1,
            above 1 at large ones: the theory describes models of small or moderate confidence.
        stderr: standard errors of R1, R2, R3 and their sum over random pairs, taken as independent (an upper estimate, since
            every sample occurs equally often); zeros for all pairs.
    """

    standard: float
    R1: float
    R2: float
    R3: float
    approx: float
    exact: float | None
    rel_error: float | None
    stderr: Mapping[str, float]

    def _draw(self, ax: Any) -> None:
        names = ["R1", "R2", "R3", "sum"]
        values = [self.R1, self.R2, self.R3, self.approx - self.standard]
        ax.bar(names, values, yerr=[self.stderr[name] for name in names])
        if self.exact is not None:
            ax.axhline(self.exact - self.standard, linestyle="--", label="exact")
            ax.legend()
        ax.set_ylabel("added to the loss by mixup")


def mixup_terms(
    f: Model,
    X: Tensor,
    y: Tensor,
    alpha: float,
    *,
    loss: LossName,
    beta: float | None = None,
    pairs: Literal["all"] | int = "all",
    exact: bool = False,
    nodes: int = 64,
    chunk: int | None = None,
    log_partition: LogPartition | None = None,
    generator: torch.Generator | None = None,
) -> MixupTerms:
    """The regularisers R1, R2 and R3 of a model on data, in float64.

    Each pair costs one directional derivative of a directional derivative (forward mode), about four forward passes.

    Args:
        f: as in ``exact_mixup_loss``; its operations must have forward-mode derivatives.
        X: training inputs ``(n, d...)``.
        y: labels, as in ``exact_mixup_loss``.
        alpha: first parameter of the Beta distribution.
        beta: its second parameter; None for ``alpha``.
        loss: ``"bce"``, ``"ce"``, ``"mse"`` or ``"glm"``.
        pairs: all, or this many random partners for each sample (unbiased, with standard errors).
        exact: compute the exact loss over the same pairs and the relative error.
        nodes: of its quadrature.
        chunk: rows of a block.
        log_partition: of ``"glm"``.
        generator: of random partners.

    Raises:
        ValueError, TypeError: as ``exact_mixup_loss``.
    """
    kind = named_loss(loss, log_partition)
    rows = Rows(f, X, kind, torch.float64)
    moments = beta_moments(alpha, beta)
    partners = draw_partners(len(rows.X), pairs, generator)
    sums = torch.zeros(4, dtype=torch.float64)
    squares = torch.zeros(4, dtype=torch.float64)
    whole: float | None = None
    with rows.measured(), torch.no_grad():
        outputs = rows(rows.X)
        Y = targets(kind, y, outputs)
        standard = float(kind.value(outputs, Y).mean())
        for i, j in blocks(len(rows.X), partners, block_rows(rows, chunk)):
            i, j = i.to(rows.X.device), j.to(rows.X.device)
            one, two, three = _pair_terms(kind, rows, rows.X[i], rows.X[j] - rows.X[i], Y[i])
            parts = torch.stack([moments.m1 * one, 0.5 * moments.m2 * two, 0.5 * moments.m2 * three]).cpu()
            parts = torch.cat([parts, parts.sum(0, keepdim=True)])
            sums += parts.sum(1)
            squares += parts.square().sum(1)
        if exact:
            law = parameters(alpha, beta)
            whole = float(expected_loss(kind, rows, outputs, Y, law, nodes, "label_preserving", partners, chunk))
    count = len(rows.X) ** 2 if partners is None else partners.numel()
    means = sums / count
    spread = (squares / count - means.square()).clamp(min=0.0).sqrt() / math.sqrt(count)
    stderr = torch.zeros(4) if partners is None else spread
    error: float | None = None
    if whole is not None:
        gap = whole - standard
        miss = abs(float(means[3]) - gap)
        error = miss / abs(gap) if gap else (math.inf if miss else 0.0)
    R1, R2, R3, total = means.tolist()
    return MixupTerms(
        standard, R1, R2, R3, standard + total, whole, error, dict(zip(("R1", "R2", "R3", "sum"), stderr.tolist(), strict=True))
    )


def mixup_penalty(
    f: Model,
    x: Tensor,
    y: Tensor,
    alpha: float,
    *,
    loss: LossName,
    beta: float | None = None,
    pairs: Literal["all"] | int = 1,
    log_partition: LogPartition | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R1 + R2 + R3`` of a batch, differentiable: training on ``loss + mixup_penalty`` is training on the approximate mixup loss.

    In the precision of the inputs, with the model in eval mode (BatchNorm frozen, no dropout).

    Args:
        f: as in ``exact_mixup_loss``.
        x: inputs ``(B, d...)``, whose other samples are the partners.
        y: labels.
        alpha: first parameter of the Beta distribution.
        beta: its second parameter; None for ``alpha``.
        loss: ``"bce"``, ``"ce"``, ``"mse"`` or ``"glm"``.
        pairs: random partners for each sample, or all.
        log_partition: of ``"glm"``.
        generator: of the partners.

    Returns:
        A scalar.

    Raises:
        ValueError, TypeError: as ``exact_mixup_loss``.
    """
    kind = named_loss(loss, log_partition)
    rows = Rows(f, x, kind, None)
    moments = beta_moments(alpha, beta)
    partners = draw_partners(len(rows.X), pairs, generator)
    if partners is None:
        partners = torch.stack([torch.arange(len(rows.X)).roll(shift) for shift in range(len(rows.X))])
    with rows.measured():
        with torch.no_grad():
            Y = targets(kind, y, rows(rows.X))
        i = torch.arange(len(rows.X), device=rows.X.device).repeat(len(partners))
        j = partners.flatten().to(rows.X.device)
        one, two, three = _pair_terms(kind, rows, rows.X[i], rows.X[j] - rows.X[i], Y[i])
    return moments.m1 * one.mean() + 0.5 * moments.m2 * (two + three).mean()


def _pair_terms(loss: Loss, rows: Rows, x: Tensor, delta: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``phi'(0)`` and the two parts of ``phi''(0)`` for each pair, shapes ``(pairs,)``."""

    def slope(point: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(rows, (point,), (delta,))

    if rows.linear:  # its derivative is the difference of outputs, and it has no curvature
        out = rows(x)
        first = rows(x + delta) - out
        second = torch.zeros_like(first)
    else:
        (out, first), (_, second) = jvp(slope, (x,), (delta,))
    residual = loss.slope(out) - y
    return inner(residual, first), loss.curvature(out, first), inner(residual, second)
