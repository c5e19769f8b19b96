"""Feature maps of linear attention, with their derivatives: what turns a query or a key into random features.

Each map is written twice, forward and backward, since the engine recomputes features chunk by chunk and never hands them to autograd.
A map gives a feature as ``value * exp(log)``: positive maps have only logarithms (``value`` is None), bounded maps only values, and the
trigonometric map has both. The engine subtracts the stabiliser from the logarithm before it takes the exponential.

Shapes: N batch times key heads, C rows of a chunk, d head size, M random vectors, R features.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """Features of one chunk: ``value * exp(log)``; a part that is None is 1 and 0."""

    value: Tensor | None
    log: Tensor | None


class FeatureMap:
    """One feature map. ``scale`` is the softmax scale: rows of ``W`` carry its root already, squared norms are multiplied by it."""

    name: ClassVar[str]
    log_keys: ClassVar[bool] = False
    """Keys have logarithms, so a stabiliser is kept."""
    shared_log: ClassVar[bool] = False
    """One logarithm stands for all features of a key."""
    needs_projection: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    """Features, and so the denominator, can be negative."""

    @staticmethod
    def num_features(M: int, d: int) -> int:
        """R for M random vectors and head size d."""
        return M

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        """Features of the rows of x."""
        raise NotImplementedError

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients by x and by the pre-activation ``x W^T`` (None without projection).

        Args:
            grad_NCR: gradient by the weighted features.
            weighted_NCR: the features times ``weight``, stabilised as they entered the products.
            weight: factor of each row, ``(N, C, 1)``, or None for 1.
            x_NCd: the rows.
            W: the projection.
            scale: as in ``features``.
            query: whether these are queries, whose common factors cancel.
        """
        raise NotImplementedError


def project(x_NCd: Tensor, W: Tensor) -> Tensor:
    """``x W^T`` for one projection ``(M, d)`` or one for each of the N rows of x ``(N, M, d)``."""
    return x_NCd @ W.mT


def _half_norm(x_NCd: Tensor, scale: float) -> Tensor:
    return (x_NCd * x_NCd).sum(-1, keepdim=True).mul_(0.5 * scale)


class Positive(FeatureMap):
    """``exp(w.x - |x|^2/2)``: unbiased for exp(x.y), always positive (Choromanski et al., lemma 1)."""

    name = "positive"
    log_keys = True

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        log = project(x_NCd, W)
        # |q|^2 is one number for a query: it cancels.
        return Features(None, log if query else log.sub_(_half_norm(x_NCd, scale)))

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_log = grad_NCR * weighted_NCR
        grad_x = grad_log @ W
        if not query:
            grad_x -= scale * grad_log.sum(-1, keepdim=True) * x_NCd
        return grad_x, grad_log


class Hyperbolic(FeatureMap):
    """``exp(w.x - |x|^2/2)`` and ``exp(-w.x - |x|^2/2)``: unbiased, less variance than as many positive features."""

    name = "hyperbolic"
    log_keys = True

    @staticmethod
    def num_features(M: int, d: int) -> int:
        return 2 * M

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        p = project(x_NCd, W)
        log = torch.cat([p, -p], -1)
        return Features(None, log if query else log.sub_(_half_norm(x_NCd, scale)))

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        plus, minus = (grad_NCR * weighted_NCR).chunk(2, -1)
        grad_p = plus - minus
        grad_x = grad_p @ W
        if not query:
            grad_x -= scale * (plus.sum(-1, keepdim=True) + minus.sum(-1, keepdim=True)) * x_NCd
        return grad_x, grad_p


def _through_sin_cos(grad_NCR: Tensor, weighted_NCR: Tensor) -> Tensor:
    """Gradient by p of ``w [sin p, cos p]``, the features given as they are."""
    grad_sin, grad_cos = grad_NCR.chunk(2, -1)
    sin, cos = weighted_NCR.chunk(2, -1)
    return grad_sin * cos - grad_cos * sin


class Trigonometric(FeatureMap):
    """``exp(|x|^2/2) [sin(w.x), cos(w.x)]``: unbiased for exp(x.y) but of either sign; a baseline."""

    name = "trig"
    log_keys = True
    shared_log = True
    signed = True

    @staticmethod
    def num_features(M: int, d: int) -> int:
        return 2 * M

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        p = project(x_NCd, W)
        return Features(torch.cat([p.sin(), p.cos()], -1), None if query else _half_norm(x_NCd, scale))

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_p = _through_sin_cos(grad_NCR, weighted_NCR)
        grad_x = grad_p @ W
        if not query:
            grad_x += scale * (grad_NCR * weighted_NCR).sum(-1, keepdim=True) * x_NCd
        return grad_x, grad_p


class Gaussian(FeatureMap):
    """``D^-1/2 [sin(w.x), cos(w.x)]``: unbiased for exp(-|x-y|^2/2) (Peng et al., section 2.2)."""

    name = "gaussian"
    signed = True

    @staticmethod
    def num_features(M: int, d: int) -> int:
        return 2 * M

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        p = project(x_NCd, W)
        D = p.shape[-1]
        value = p.new_empty(*p.shape[:-1], 2 * D)
        torch.sin(p, out=value[..., :D])
        torch.cos(p, out=value[..., D:])
        return Features(value.mul_(D**-0.5), None)

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_p = _through_sin_cos(grad_NCR, weighted_NCR)
        return grad_p @ W, grad_p


class Arccos(FeatureMap):
    """``D^-1/2 relu(w.x)``: the arc-cosine kernel of degree one, never negative (Peng et al., section 2.2)."""

    name = "arccos"

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        p = project(x_NCd, W)
        return Features(p.relu_().mul_(p.shape[-1] ** -0.5), None)

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_p = grad_NCR.mul(W.shape[-2] ** -0.5).masked_fill_(weighted_NCR == 0.0, 0.0)
        if weight is not None:
            grad_p *= weight
        return grad_p @ W, grad_p


class Relu(FeatureMap):
    """``relu(w.x) + 1e-3``: the generalised kernel that the paper found best on proteins; no estimate of softmax."""

    name = "relu"
    epsilon: ClassVar[float] = 1e-3

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        return Features(project(x_NCd, W).relu_().add_(Relu.epsilon), None)

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        grad_p = grad_NCR.masked_fill(project(x_NCd, W) <= 0.0, 0.0)
        if weight is not None:
            grad_p *= weight
        return grad_p @ W, grad_p


class Elu1(FeatureMap):
    """``elu(x) + 1``, the linear transformer's map: no random vectors, R = d; a baseline."""

    name = "elu1"
    needs_projection = False

    @staticmethod
    def num_features(M: int, d: int) -> int:
        return d

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        x = x_NCd * scale**0.5
        return Features(x.clamp_max(0.0).exp_().add_(x.relu_()), None)  # torch's elu is many times slower on a CPU

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        root = scale**0.5
        grad_x = grad_NCR * (x_NCd * root).clamp_max(0.0).exp_() * root
        return (grad_x if weight is None else grad_x * weight), None


class Given(FeatureMap):
    """The rows are features already."""

    name = "given"
    needs_projection = False

    @staticmethod
    def num_features(M: int, d: int) -> int:
        return d

    @staticmethod
    def features(x_NCd: Tensor, W: Tensor, scale: float, *, query: bool) -> Features:
        return Features(x_NCd.clone(), None)

    @staticmethod
    def backward(
        grad_NCR: Tensor, weighted_NCR: Tensor, weight: Tensor | None, x_NCd: Tensor, W: Tensor, scale: float, *, query: bool
    ) -> tuple[Tensor, Tensor | None]:
        return (grad_NCR if weight is None else grad_NCR * weight), None


MAPS: dict[str, type[FeatureMap]] = {each.name: each for each in (Positive, Hyperbolic, Trigonometric, Gaussian, Arccos, Relu, Elu1, Given)}
