"""How a classifier does under attack by the sign of the gradient, and between training and test data.

Goodfellow, Shlens, Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015 (FGSM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core import _checks
from outlast._core._batches import device_of
from outlast._core._norm import eval_mode
from outlast._core._result import Result

LossFunction = Callable[[Tensor, Tensor], Tensor]
Clip = tuple[float, float] | None


@dataclass(frozen=True, repr=False)
class Robustness(Result):
    """Accuracy and loss under FGSM, which is a weak attack: it shows brittleness, not robustness.

    Attributes:
        eps: sizes of the attack, in the units of the network's input.
        accuracy: share of samples classified as labelled, one for each size.
        loss: mean loss, likewise.
        n: samples.
    """

    eps: tuple[float, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    n: int

    def _draw(self, ax: Any) -> None:
        ax.plot(self.eps, [100.0 * value for value in self.accuracy], marker="o")
        ax.set_xlabel("eps")
        ax.set_ylabel("accuracy under FGSM (%)")


@dataclass(frozen=True, repr=False)
class Gap(Result):
    """Loss and accuracy on training and test data, without mixing or attack.

    Attributes:
        train: mean loss on training data.
        test: mean loss on test data.
        gap: ``test - train``.
        acc_train: share of training samples classified as labelled.
        acc_test: share of test samples.
    """

    train: float
    test: float
    gap: float
    acc_train: float
    acc_test: float


def fgsm(
    model: nn.Module, x: Tensor, y: Tensor, eps: float | Tensor, *, loss_fn: LossFunction = F.cross_entropy, clip: Clip = None
) -> Tensor:
    """``x + eps sign(grad_x loss)``, clipped.

    Args:
        model: run in eval mode, left as it was; gradients of its parameters are not touched.
        x: inputs ``(B, ...)``.
        y: labels.
        eps: size of the attack in the units of ``x`` (after normalisation that is eps / std), a number or a tensor that
            broadcasts to ``x``, such as one for each channel ``(C, 1, 1)``.
        loss_fn: ``loss_fn(model(x), y)``, a mean or sum.
        clip: lowest and highest value of an input; None for no limit.

    Returns:
        Attacked inputs, detached, in the shape of ``x``.

    Raises:
        ValueError: a negative eps, a clip that is no interval.
        TypeError: inputs that are not floating-point numbers.
    """
    size = eps if isinstance(eps, Tensor) else _checks.real("eps", eps, low=0.0)
    if isinstance(size, Tensor) and not bool((size >= 0).all()):
        raise ValueError("eps must be at least 0 everywhere")
    with eval_mode(model):
        sign = _sign(model, x, y, loss_fn)
    return _attacked(x, sign, size, _interval(clip))


def fgsm_curve(
    model: nn.Module,
    data: Iterable[Any] | tuple[Tensor, Tensor],
    eps: Sequence[float],
    *,
    loss_fn: LossFunction = F.cross_entropy,
    clip: Clip = None,
    device: torch.device | str | None = None,
) -> Robustness:
    """Accuracy under FGSM for several sizes of attack; the gradient is taken once.

    Args:
        model: gives logits ``(B, C)``; run in eval mode, left as it was.
        data: batches ``(x, y, ...)``, or one such tuple of tensors.
        eps: sizes, in the units of the inputs; 0 is no attack.
        loss_fn: attacked and reported, a mean over the batch.
        clip: lowest and highest value of an input.
        device: where batches go; None for where the model's parameters are.

    Raises:
        ValueError: no data, no sizes, a size below 0.
        TypeError: inputs that are not floating-point numbers.
    """
    sizes = tuple(_checks.real("eps", value, low=0.0) for value in eps)
    if not sizes:
        raise ValueError("eps is empty: give at least one size of attack")
    hits, losses, count = [0] * len(sizes), [0.0] * len(sizes), 0
    interval = _interval(clip)
    with eval_mode(model):
        for x, y in _labelled_batches(data, device_of(model, device), "data"):
            sign = _sign(model, x, y, loss_fn)
            for place, size in enumerate(sizes):
                with torch.no_grad():
                    logits = model(_attacked(x, sign, size, interval))
                    losses[place] += len(x) * float(loss_fn(logits, y))
                    hits[place] += int((logits.argmax(1) == y).sum())
            count += len(x)
    if count == 0:
        raise ValueError("data is empty")
    return Robustness(sizes, tuple(hit / count for hit in hits), tuple(loss / count for loss in losses), count)


def generalization_gap(
    model: nn.Module,
    train: Iterable[Any] | tuple[Tensor, Tensor],
    test: Iterable[Any] | tuple[Tensor, Tensor],
    loss_fn: LossFunction = F.cross_entropy,
    *,
    device: torch.device | str | None = None,
) -> Gap:
    """Loss and accuracy on clean training data and on test data.

    Args:
        model: gives logits ``(B, C)``; run in eval mode, left as it was.
        train: batches ``(x, y, ...)`` without augmentation, or one such tuple of tensors.
        test: likewise.
        loss_fn: a mean over the batch.
        device: where batches go; None for where the model's parameters are.

    Raises:
        ValueError: no data.
    """
    place = device_of(model, device)
    with eval_mode(model), torch.no_grad():
        loss_train, acc_train = _measure(model, train, loss_fn, place, "train")
        loss_test, acc_test = _measure(model, test, loss_fn, place, "test")
    return Gap(loss_train, loss_test, loss_test - loss_train, acc_train, acc_test)


def _measure(model: nn.Module, data: Any, loss_fn: LossFunction, device: torch.device, name: str) -> tuple[float, float]:
    loss, hits, count = 0.0, 0, 0
    for x, y in _labelled_batches(data, device, name):
        logits = model(x)
        loss += len(x) * float(loss_fn(logits, y))
        hits += int((logits.argmax(1) == y).sum())
        count += len(x)
    if count == 0:
        raise ValueError(f"{name} is empty")
    return loss / count, hits / count


def _sign(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFunction) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"inputs must be floating-point numbers, got {x.dtype}")
    with torch.inference_mode(False), torch.enable_grad():
        point = x.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_fn(model(point), y), point, materialize_grads=True)
    return grad.sign()


def _attacked(x: Tensor, sign: Tensor, eps: float | Tensor, clip: Clip) -> Tensor:
    moved = x.detach() + eps * sign
    return moved if clip is None else moved.clamp(*clip)


def _interval(clip: Clip) -> Clip:
    if clip is None:
        return None
    low, high = (_checks.real("clip", value) for value in clip)
    if low >= high:
        raise ValueError(f"clip must be (low, high) with low < high, got {clip!r}")
    return low, high


def _labelled_batches(data: Any, device: torch.device, name: str) -> Iterable[tuple[Tensor, Tensor]]:
    single = isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor)
    whole = single and data[0].ndim > 0 and data[1].ndim > 0 and len(data[0]) == len(data[1])
    for batch in [data] if whole else cast("Iterable[Any]", data):
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError(f"batches of {name} must be (inputs, labels, ...), got {type(batch).__name__}")
        yield batch[0].to(device), batch[1].to(device)
