"""The worst direction inside a ball: the dual-norm problem behind sharpness-aware minimisation.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021,
equation 2: the maximiser of ``eps . g`` over ``||eps||_p <= rho`` is
``rho * sign(g) * |g|^(q-1) / (||g||_q^q)^(1/p)`` with ``1/p + 1/q = 1``. Kwon et al., "ASAM", ICML 2021: the ball is
measured after dividing by ``T = diag(t)``, which makes it invariant to rescaling of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from outlast._core import _checks, _foreach

Batch = TypeVar("Batch")
TINY = 1e-12


def check_p(p: object) -> float:
    """A norm's order, ``1 <= p <= inf``."""
    return _checks.real("p", p, low=1.0, high=math.inf, infinite=True)


def steepest(grads: Sequence[Tensor], p: float) -> tuple[list[Tensor], Tensor]:
    """The unit step of steepest ascent in the p-norm, and the dual norm of the gradient.

    Args:
        grads: the gradient, as any number of tensors seen as one vector.
        p: order of the norm that measures the step, in [1, inf].

    Returns:
        ``(steps, norm)``: steps shaped as ``grads`` with ``||steps||_p = 1`` and ``steps . grads = norm = ||grads||_q``.
        A zero or non-finite gradient gives zero steps. For ``p = 1`` the whole step falls on the largest entry (the
        first of equal ones, in flat order).
    """
    if p == 2.0:
        norm = _foreach.norm(grads)
        scale = torch.where(torch.isfinite(norm), 1.0 / (norm + TINY), torch.zeros_like(norm))
        return [torch.nan_to_num(grad * scale.to(grad), 0.0, 0.0, 0.0) for grad in grads], norm
    largest = torch.stack([grad.abs().max() if grad.numel() else grad.new_zeros(()) for grad in grads]).max()
    if not bool(torch.isfinite(largest)) or float(largest) == 0.0:
        return [torch.zeros_like(grad) for grad in grads], largest
    if p == 1.0:
        return _largest_entry(grads, largest), largest
    q = 1.0 if math.isinf(p) else p / (p - 1.0)
    # dividing by the largest entry first keeps the powers from under- and overflowing
    relative = [grad.abs() / largest for grad in grads]
    powers = torch.stack([part.pow(q).sum() for part in relative]).sum()
    norm = largest * powers.pow(1.0 / q)
    if math.isinf(p):
        return [grad.sign() for grad in grads], norm
    scale = powers.pow(-1.0 / p)
    return [grad.sign() * part.pow(q - 1.0) * scale for grad, part in zip(grads, relative, strict=True)], norm


def _largest_entry(grads: Sequence[Tensor], largest: Tensor) -> list[Tensor]:
    steps = [torch.zeros_like(grad) for grad in grads]
    for step, grad in zip(steps, grads, strict=True):
        hits = (grad.abs() == largest).nonzero()
        if hits.numel():
            index = tuple(hits[0].tolist())
            step[index] = grad[index].sign()
            break
    return steps


def weight_scaling(weight: Tensor, eta: float) -> Tensor:
    """ASAM's ``t = |w| + eta`` for one weight tensor (biases are left unscaled by not calling this)."""
    return weight.detach().abs().add_(eta)


def ball_step(grads: Sequence[Tensor], scalings: Sequence[Tensor | None], p: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Steepest ascent in scaled coordinates.

    Returns:
        ``(u, eps, norm)`` for radius 1: ``u = T^-1 eps`` has p-norm 1, ``norm = ||T g||_q``.
    """
    scaled = [grad if t is None else grad * t for grad, t in zip(grads, scalings, strict=True)]
    steps, norm = steepest(scaled, p)
    return steps, [step if t is None else step * t for step, t in zip(steps, scalings, strict=True)], norm


def inner_rate(inner_steps: int) -> float:
    """Length of one projected ascent step relative to the radius: 1 for a single step, else ``2 / J``."""
    return 1.0 if inner_steps == 1 else 2.0 / inner_steps


def project_to_unit_ball_(tensors: Sequence[Tensor]) -> None:
    """Scale the vector made of all ``tensors`` back to Euclidean norm 1 if it is longer, in place."""
    norm = _foreach.norm(tensors)
    factor = torch.clamp(1.0 / (norm + TINY), max=1.0)
    for tensor in tensors:
        tensor.mul_(factor.to(tensor))


def batch_size(batch: object) -> int:
    """Number of samples of a batch: the common leading dimension of its tensors.

    Raises:
        ValueError: no tensors, or tensors of different leading dimensions.
    """
    sizes = {int(leaf.shape[0]) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim > 0}
    if len(sizes) != 1:
        raise ValueError(f"a batch must hold tensors with one common leading dimension, got leading dimensions {sorted(sizes)}")
    return sizes.pop()


def split_batch(batch: Batch, m: int | None) -> list[tuple[Batch, int]]:
    """Cut a batch (any nesting of tensors) into parts of ``m`` samples, with their sizes; the last may be smaller.

    Raises:
        ValueError: ``m`` below 1 or above the batch's size.
    """
    size = batch_size(batch)
    if m is None:
        return [(batch, size)]
    if not 1 <= m <= size:
        raise ValueError(f"m must be between 1 and the batch's {size} samples, got {m}")
    return [(_take(batch, slice(start, start + m)), min(m, size - start)) for start in range(0, size, m)]


def _take(batch: Batch, index: slice | Tensor) -> Batch:
    def pick(leaf: object) -> object:
        return leaf[index] if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf

    return cast("Batch", tree_map(pick, batch))


def select_samples(batch: Batch, index: Tensor) -> Batch:
    """The samples of a batch with the given numbers, in that order."""
    return _take(batch, index)


def is_weight_name(name: str) -> bool:
    """Whether ASAM scales a parameter of this name: the official rule, which includes norm layers' weights."""
    return "weight" in name
