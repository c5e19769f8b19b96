"""Targets of mixed batches, and the losses and metrics that take them.

Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast.errors import OutlastWarning

Criterion = Callable[[Tensor, Tensor], Tensor]

# Not affine in the label, so that a soft label is not the mixture of two losses.
_NOT_AFFINE = ("hinge", "focal", "margin", "ranking", "rdrop")


class MixedTarget(NamedTuple):
    """The two targets of a mixed batch and the weight of the first: what ``labels="pair"`` gives.

    A tuple of tensors, so that collate functions, pinning and transfers to a device take it as it is.

    Attributes:
        a: targets of the samples themselves, in any form.
        b: targets of their partners.
        lam: weight of ``a``, shape ``()`` for the whole batch or ``(B,)``.
    """

    a: Tensor
    b: Tensor
    lam: Tensor


def mixup_loss(criterion: Criterion, output: Any, target: MixedTarget | Tensor) -> Tensor:
    """The loss of a mixed batch, whatever form its targets have.

    For a ``MixedTarget`` it is ``lam * criterion(output, a) + (1 - lam) * criterion(output, b)``. Where ``lam``
    differs between samples, the criterion is asked for its losses of single samples (``reduction="none"``) and its own
    reduction is applied after mixing. The mean of a cross-entropy is taken over the samples that have a label, with class
    weights too: that is what soft labels give, so that both forms of target have one loss (dividing by the weights of
    the drawn labels, as the criterion does for class ids, would make it depend on the form).

    Args:
        criterion: ``criterion(output, target)``: a module, or a function such as ``torch.nn.functional.cross_entropy``.
        output: what the model gives for the mixed inputs.
        target: what the transform gives.

    Returns:
        As the criterion's reduction says; a scalar for ``"mean"`` and ``"sum"``.

    Raises:
        ValueError: weights for single samples and a criterion that gives no loss of single samples.

    Warns:
        OutlastWarning: soft labels with a criterion that is known not to be affine in the label (hinge, focal, ...): the
            result is not the mixed loss. Take ``labels="pair"`` or ``"hard"`` there.
    """
    entropy = _is_cross_entropy(criterion)
    if not isinstance(target, MixedTarget):
        if target.is_floating_point() and _not_affine(criterion):
            warnings.warn(
                f"{_name(criterion)} is not affine in the label, so that its value for a soft label is not the mixed loss; "
                'take labels="pair" or labels="hard"',
                OutlastWarning,
                stacklevel=2,
            )
        if entropy and target.is_floating_point():
            labelled = target.sum(1) != 0  # label smoothing would give a loss to samples without a label
            losses = _unreduced(criterion)(output, target) * labelled
            reduction = _setting(criterion, "reduction", "mean")
            if reduction == "none":
                return losses
            return losses.sum() if reduction == "sum" else losses.sum() / labelled.sum().clamp(min=1)
        return criterion(output, target)
    reduction = _setting(criterion, "reduction", "mean")
    if target.lam.ndim == 0 and not (entropy and reduction == "mean"):
        # any criterion will do, those without losses of single samples included
        return target.lam * criterion(output, target.a) + (1.0 - target.lam) * criterion(output, target.b)
    single = _unreduced(criterion)
    first, second = single(output, target.a), single(output, target.b)
    size = output.shape[0] if isinstance(output, Tensor) else len(target.a)
    if first.ndim == 0 or first.shape[0] != size:
        raise ValueError(
            f"{_name(criterion)} gives shape {tuple(first.shape)} for {size} samples, but lam differs between samples; give a "
            'criterion with reduction="none", or mix a whole batch alike (per_sample=False, ignore_index=None)'
        )
    lam = _aligned(target.lam, first)
    mixed = lam * first + (1.0 - lam) * second
    if reduction == "none":
        return mixed
    if reduction == "sum":
        return mixed.sum()
    if entropy:
        ignored = _setting(criterion, "ignore_index", -100)
        if target.a.is_floating_point():
            return mixed.sum() / (target.a.sum(1) != 0).sum().clamp(min=1)
        labelled = lam * (target.a != ignored) + (1.0 - lam) * (target.b != ignored)  # ignored samples come with lam = 1
        return mixed.sum() / labelled.expand_as(mixed).sum().clamp(min=1.0)
    return mixed.mean()


class MixupLoss(nn.Module):
    """``mixup_loss`` as a module: ``MixupLoss(nn.CrossEntropyLoss())(output, target)`` for targets of any form."""

    def __init__(self, criterion: Criterion) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, output: Any, target: MixedTarget | Tensor) -> Tensor:
        """The loss of a batch."""
        return mixup_loss(self.criterion, output, target)


def mixup_accuracy(output: Tensor, target: MixedTarget | Tensor) -> Tensor:
    """Share of the labels' weight that falls on the predicted class, in [0, 1].

    Accuracy on mixed inputs says little about accuracy on real ones: for following a training only.

    Args:
        output: logits or probabilities, shape ``(B, C)``.
        target: pairs of class ids, class ids, or class probabilities ``(B, C)``.

    Returns:
        A scalar on the device of ``output``.

    Raises:
        ValueError: an output that is not ``(B, C)``, or targets that do not fit it.
    """
    if output.ndim != 2:
        raise ValueError(f"output must be (B, C), got {tuple(output.shape)}")
    predicted = output.argmax(1)
    if not isinstance(target, MixedTarget):
        if target.ndim == 2 and target.shape == output.shape:
            return target.gather(1, predicted[:, None]).sum() / (target.sum(1) != 0).sum().clamp(min=1)
        target = MixedTarget(target, target, torch.ones((), device=output.device))
    if target.a.shape != predicted.shape:
        raise ValueError(f"targets must be class ids of shape {tuple(predicted.shape)}, got {tuple(target.a.shape)}")
    hits = target.lam * (predicted == target.a) + (1.0 - target.lam) * (predicted == target.b)
    labelled = target.lam * (target.a >= 0) + (1.0 - target.lam) * (target.b >= 0)  # ids below 0 stand for no label
    return hits.sum() / labelled.sum().clamp(min=1e-12)


def _aligned(lam: Tensor, losses: Tensor) -> Tensor:
    return lam.to(losses).reshape(-1, *[1] * (losses.ndim - 1)) if lam.ndim else lam.to(losses)


def _is_cross_entropy(criterion: object) -> bool:
    criterion = criterion.func if isinstance(criterion, functools.partial) else criterion
    return criterion in (F.cross_entropy, F.nll_loss) or isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss)


def _setting(criterion: object, name: str, default: Any) -> Any:
    """An option of a criterion: of a module its attribute, of a ``functools.partial`` its keyword."""
    if isinstance(criterion, functools.partial):
        return criterion.keywords.get(name, _setting(criterion.func, name, default))
    return getattr(criterion, name, default)


def _name(criterion: object) -> str:
    criterion = criterion.func if isinstance(criterion, functools.partial) else criterion
    return str(getattr(criterion, "__name__", type(criterion).__name__))


def _not_affine(criterion: object) -> bool:
    name = _name(criterion).lower().replace("_", "")
    return "multilabelsoftmargin" not in name and any(word in name for word in _NOT_AFFINE)


def _unreduced(criterion: Criterion) -> Criterion:
    """The criterion's losses of single samples."""
    if isinstance(criterion, nn.Module):
        if getattr(criterion, "reduction", None) in ("mean", "sum"):
            single = copy.copy(criterion)  # shares parameters and buffers; the user's own keeps its reduction
            single.reduction = "none"  # pyright: ignore[reportArgumentType]
            return single
        return criterion
    try:
        takes = "reduction" in inspect.signature(criterion).parameters
    except (TypeError, ValueError):
        takes = False
    return (lambda output, target: criterion(output, target, reduction="none")) if takes else criterion  # pyright: ignore[reportCallIssue]
