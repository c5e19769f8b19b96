"""The group-invariance penalty and the group-balanced cross-entropy.

Ahmed, Bengio, van Seijen, Courville, "Systematic Generalisation with Group Invariant Predictions", ICLR 2021: for each class
the mean predicted distribution shall be the same where the easy cue is present (group 0) and where it is not (group 1).
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core import _checks
from outlast._core._distributed import differentiable_sum, world_size
from outlast._core._once import Once
from outlast._core._typing import Float, Int

Divergence = Literal["kl", "reverse_kl", "js"]
Reduction = Literal["mean", "sum", "none"]
_FEW = 128  # classes of which a table is cheaper than finding out which of them matter
_once = Once(2)


def invariance_penalty(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    num_groups: int = 2,
    divergence: Divergence = "kl",
    reduction: Reduction = "mean",
    min_per_group: int = 1,
    eps: float = 1e-12,
    process_group: Any = None,
) -> Tensor:
    """Divergence between the mean predictions of the groups of each class.

    For class c, ``KL(m_1 || m_0)`` with ``m_g`` the mean probability of its examples in group g; with more than two groups the
    mean over ``g >= 1`` of ``KL(m_g || m_0)``. A class without examples of both groups in the batch contributes 0. The gradient
    flows through both means. Probabilities are averaged in float32 at least.

    Args:
        logits: shape ``(B, K)``; give those of a detached head (``GroupInvariance`` does) for the paper's gradient.
        labels: class ids in ``[0, K)``.
        groups: 0 for the reference, then 1 to ``num_groups - 1``; -1 for unknown (left out).
        num_groups: number of groups.
        divergence: ``"kl"`` (minority from majority, the paper's), ``"reverse_kl"``, or ``"js"`` (at most log 2).
        reduction: ``"mean"`` over all K classes whether present or not (weights of the authors' MNIST code carry over; divide those
            of its COCO code by the number of classes), ``"sum"`` (the paper's formula), or ``"none"`` for shape ``(K,)``.
        min_per_group: a group of a class with fewer examples in the batch counts as absent.
        eps: mean probabilities are clipped to ``[eps, 1 - eps]``.
        process_group: means are taken over the batches of all processes of this group, so that averaging gradients over
            processes gives those of one process; None for all processes, ``"local"`` for this one alone.

    Returns:
        A scalar, or shape ``(K,)``.

    Raises:
        ValueError: shapes that do not fit, an empty batch, one class, ids out of range, logits that are not finite.
        TypeError: floating-point labels or groups.

    Warns:
        OutlastWarning: no class has both groups in the batch (once a run, and only on the CPU: elsewhere it is not asked).
    """
    _checks.choice("divergence", divergence, ("kl", "reverse_kl", "js"))
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    eps = _checks.real("eps", eps, low=0.0, high=0.1, low_open=True)
    least = _checks.integer("min_per_group", min_per_group, low=1)
    groups_count = _checks.integer("num_groups", num_groups, low=2)
    labels, groups = _check(logits, labels, groups, groups_count)
    K = logits.shape[1]
    slots = torch.where(groups < 0, K * groups_count, labels * groups_count + groups)  # one more for unknown groups
    host = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    if host:
        counts = torch.bincount(slots, minlength=K * groups_count + 1).float()
    else:
        counts = torch.zeros(K * groups_count + 1, device=logits.device, dtype=torch.float32)
        counts = counts.index_add(0, slots, torch.ones_like(slots, dtype=torch.float32))
    shared, team = process_group != "local" and world_size() > 1, cast("Any", process_group)
    if shared:
        torch.distributed.all_reduce(counts, group=team)
    counts = counts[:-1].reshape(K, groups_count)
    present = counts >= least
    both = present[:, 0] & present[:, 1:].any(1)
    if host and not bool(both.any()):
        _once.warn("no class of the batch has examples of both groups, so the penalty is 0; use larger batches or balanced_sampler")
    kept: Tensor | None = None
    if host and K > _FEW:  # a table of all classes would be mostly empty
        kept = both.nonzero()[:, 0]
        rows = (both[labels] & (groups >= 0)).nonzero()[:, 0]
        place = torch.zeros(K, dtype=torch.int64).index_copy(0, kept, torch.arange(len(kept)))
        slots = place[labels[rows]] * groups_count + groups[rows]
        logits, counts, present, both = logits.index_select(0, rows), counts[kept], present[kept], both[kept]
    probs = _wide(logits).softmax(1)
    sums = probs.new_zeros(len(counts) * groups_count + 1, K).index_add(0, slots, probs)[:-1]
    if shared:
        sums = differentiable_sum(sums, team)
    means = (sums / counts.clamp(min=1.0).reshape(-1, 1).to(sums)).clamp(eps, 1.0 - eps).reshape(-1, groups_count, K)
    each = _divergence(means[:, 1:], means[:, :1], divergence) * (present[:, 1:] & both[:, None])
    found = each.sum(1) / (groups_count - 1)
    if reduction == "none":
        return found if kept is None else found.new_zeros(K).index_copy(0, kept, found)
    return found.sum() if reduction == "sum" else found.sum() / K


class InvariancePenalty(nn.Module):
    """``invariance_penalty`` as a module: ``InvariancePenalty()(logits, labels, groups)``, with its keyword arguments."""

    def __init__(
        self,
        *,
        num_groups: int = 2,
        divergence: Divergence = "kl",
        reduction: Reduction = "mean",
        min_per_group: int = 1,
        eps: float = 1e-12,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _checks.choice("divergence", divergence, ("kl", "reverse_kl", "js"))
        self.options: dict[str, Any] = {
            "num_groups": num_groups,
            "divergence": divergence,
            "reduction": reduction,
            "min_per_group": min_per_group,
            "eps": eps,
            "process_group": process_group,
        }

    def forward(self, logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        """The penalty of a batch."""
        return invariance_penalty(logits, labels, groups, **self.options)


def group_balanced_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    groups: Int[Tensor, " batch"],
    *,
    num_groups: int = 2,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    process_group: Any = None,
) -> Float[Tensor, ""]:
    """Mean over the groups in the batch of their mean cross-entropy.

    With one group in the batch, and with groups of equal size, this is the plain mean. Examples of unknown group (-1) count with
    their share of the batch.

    Args:
        logits: shape ``(B, K)``.
        labels: class ids.
        groups: 0 to ``num_groups - 1``, -1 for unknown.
        num_groups: number of groups.
        weight: of the classes, as in ``torch.nn.functional.cross_entropy``.
        label_smoothing: likewise.
        process_group: as in ``invariance_penalty``; each process gives its part times the number of processes, so that
            averaging over processes gives the loss of the whole batch.

    Raises:
        ValueError, TypeError: as ``invariance_penalty``.
    """
    count = _checks.integer("num_groups", num_groups, low=2)
    labels, groups = _check(logits, labels, groups, count)
    losses = F.cross_entropy(_wide(logits), labels, weight=weight, reduction="none", label_smoothing=label_smoothing)
    masses = torch.ones_like(losses) if weight is None else weight.to(losses)[labels]
    slots = torch.where(groups < 0, count, groups)
    totals = torch.zeros(2, count + 1, device=losses.device, dtype=losses.dtype)
    totals[0] = totals[0].index_add(0, slots, masses)
    totals[1] = totals[1].index_add(0, slots, torch.ones_like(losses))
    processes = 1
    if process_group != "local" and world_size() > 1:
        torch.distributed.all_reduce(totals, group=process_group)
        processes = torch.distributed.get_world_size(process_group)
    mass, size = totals
    known = size[:count].sum() / size.sum()
    share = known / (size[:count] > 0).sum().clamp(min=1)
    shares = torch.cat([share.expand(count), (1.0 - known)[None]])
    factors = shares / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return processes * (factors[slots] * losses).sum()


class GroupBalancedCrossEntropy(nn.Module):
    """``group_balanced_cross_entropy`` as a module, with its keyword arguments."""

    def __init__(
        self, *, num_groups: int = 2, weight: Tensor | None = None, label_smoothing: float = 0.0, process_group: Any = None
    ) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.label_smoothing = label_smoothing
        self.process_group = process_group
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, labels: Tensor, groups: Tensor) -> Tensor:
        """The loss of a batch."""
        weight = self.weight if isinstance(self.weight, Tensor) else None
        return group_balanced_cross_entropy(
            logits,
            labels,
            groups,
            num_groups=self.num_groups,
            weight=weight,
            label_smoothing=self.label_smoothing,
            process_group=self.process_group,
        )


def _divergence(other: Tensor, reference: Tensor, divergence: str) -> Tensor:
    if divergence == "kl":
        return _kl(other, reference)
    if divergence == "reverse_kl":
        return _kl(reference, other)
    middle = 0.5 * (other + reference)
    return 0.5 * (_kl(other, middle) + _kl(reference, middle))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.element_size() < 4 else logits


def _check(logits: Tensor, labels: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Labels and groups as int64, or an exception."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or groups.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be (B, K), labels and groups (B,), got {tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(groups.shape)}"
        )
    for name, values in (("labels", labels), ("groups", groups)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {values.dtype}")
    if len(logits) == 0:
        raise ValueError(f"logits have no rows, so the batch is empty: shape {tuple(logits.shape)}")
    if logits.shape[1] < 2:
        raise ValueError("logits have one class: there is nothing to predict")
    labels, groups = labels.long(), groups.long()
    if torch.compiler.is_compiling():
        return labels, groups
    if not bool(torch.isfinite(logits.detach().sum())) and not bool(torch.isfinite(logits.detach()).all()):
        raise ValueError("logits are not finite")
    for name, values, low, high in (("labels", labels, 0, logits.shape[1]), ("groups", groups, -1, num_groups)):
        least, most = (int(value) for value in values.aminmax())
        if least < low or most >= high:
            raise ValueError(f"{name} must be in [{low}, {high}), got {least} to {most}")
    return labels, groups
