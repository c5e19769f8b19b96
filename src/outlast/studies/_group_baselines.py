"""Losses that are compared with group-invariant predictions on the same groups.

Formulas as in the authors' comparison: Arjovsky et al. 2019 (IRM), Krueger et al. 2021 (REx), Sagawa et al. 2020 (group DRO);
a reweighting, and the class-conditional maximum mean discrepancy of features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def irm(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Squared gradient of each group's risk with respect to multipliers of the logits, mean over the groups.

    The product of two halves of the batch, since the square of one batch's gradient is biased.
    """
    slopes = (logits.softmax(1) - F.one_hot(labels, logits.shape[1])) * logits
    found: list[Tensor] = []
    for group in (0, 1):
        own = slopes[groups == group]
        if len(own) >= 2:
            found.append((own[::2].mean(0) * own[1::2].mean(0)).sum())
    return torch.stack(found).mean() if found else logits.sum() * 0.0


def rex(logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Variance of the groups' risks, with the factor one half."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    risks = [losses[groups == group].mean() for group in (0, 1) if bool((groups == group).any())]
    stacked = torch.stack(risks)
    return 0.5 * (stacked - stacked.mean()).square().sum()


def reweighted(logits: Tensor, labels: Tensor, groups: Tensor, weight: float) -> Tensor:
    """Cross-entropy with weight 1 in group 1 and ``1 / (1 + weight)`` in group 0, normalised."""
    weights = torch.where(groups == 1, 1.0, 1.0 / (1.0 + weight))
    return (weights * F.cross_entropy(logits, labels, reduction="none")).sum() / weights.sum()


def dro(logits: Tensor, labels: Tensor, groups: Tensor, q: Tensor, eta: float) -> Tensor:
    """Risk under group weights ``q``, which rise where the normalised risk is large; ``q`` is changed in place.

    For batches that are balanced over the groups; of a batch that lacks one the plain mean is taken.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    if not bool((groups == 0).any() and (groups == 1).any()):
        return losses.mean()
    risks = torch.stack([losses[groups == g].mean() for g in (0, 1)])
    with torch.no_grad():
        q *= (eta * risks / risks.sum().clamp(min=1e-12)).exp()
        q /= q.sum()
    return (q * risks).sum()


def cmmd(features: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the groups' features of each class, mean of Gaussian kernels of width 1, 5 and 10."""
    total = features.sum() * 0.0
    classes = labels.unique().tolist()
    for c in classes:
        one, two = (features[(labels == c) & (groups == g)] for g in (0, 1))
        if len(one) and len(two):
            total = total + _kernel(one, one).mean() + _kernel(two, two).mean() - 2.0 * _kernel(one, two).mean()
    return total / len(classes)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    squared = (a[:, None] - b[None]).square().sum(2)
    return torch.stack([(-squared / (2.0 * width**2)).exp() for width in (1.0, 5.0, 10.0)]).mean(0)
