"""The vaccine on Gram matrices: which combination of the tasks' gradients each task contributes.

Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine", ICLR 2021 (arXiv 2010.05874), algorithm 1. An altered gradient is always a
combination of original ones, so the T x T matrix of inner products says all that is needed, and no gradient is touched
before the end.

Letters: K groups, T tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._typing import Float

_ZERO = 1e-7  # of the sum of the parts' norms: below it a combination is rounding error of parts that cancel


def gradvac_coefficients(
    gram: Float[Tensor, "*groups T T"],
    target: Float[Tensor, "*groups T T"],
    *,
    beta: float = 0.01,
    vaccinate: Tensor | None = None,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_target: float = 0.99,
    floor: float | None = None,
    debiased: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine tasks so that each cosine reaches its target.

    Task i's altered gradient is ``sum_j C[i, j] g_j``: going through the other tasks j in a random order, g_j is added as far
    as the cosine of the altered gradient with g_j lies below ``target[i, j]`` (never subtracted). Target 0 is PCGrad.

    Args:
        gram: inner products of the tasks' gradients in each group, ``(K, T, T)`` or ``(T, T)``, symmetric.
        target: of the same shape; the diagonal is ignored.
        beta: rate of the targets' moving average, in [0, 1]; 0 keeps them fixed.
        vaccinate: bool ``(T,)``, tasks whose gradients may be altered; None means all.
        order: int ``(K, T, T - 1)`` or ``(T, T - 1)``: for each task the others, in the order of visit. None draws it.
        generator: of that draw; None seeds a fresh one with 0.
        max_target: cap of targets: the norm grows without bound as they approach 1.
        floor: lower bound of targets.
        debiased: squared norms ``(K, T)`` without the noise's share, for the cosine that feeds the moving average.

    Returns:
        ``(C, new_target, phi)``, each of the shape of ``gram``, float64. ``phi`` holds each pair's cosine as measured before
        it was acted on (the original cosine where it was not visited). Pairs with a zero gradient are skipped.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, a rate or bound out of range, an order that is none.
    """
    if gram.ndim not in (2, 3) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must have shape (K, T, T) or (T, T), got {tuple(gram.shape)}")
    if target.shape != gram.shape:
        raise ValueError(f"target must have the shape of gram, {tuple(gram.shape)}, got {tuple(target.shape)}")
    _checks.real("beta", beta, low=0.0, high=1.0)
    check_max_target(max_target)
    if floor is not None:
        _checks.real("floor", floor, low=-1.0, high=1.0)
    single = gram.ndim == 2
    q = gram.detach().double()
    old = target.detach().to(q.device, torch.float64)
    if single:
        q, old = q[None], old[None]
    if not (torch.isfinite(q).all() and torch.isfinite(old).all()):
        raise ValueError("gram and target must be finite; a step whose gradients are not finite has no vaccine")
    groups, count, _ = q.shape
    if vaccinate is None:
        allowed = torch.ones(count, dtype=torch.bool, device=q.device)
    else:
        if vaccinate.shape != (count,) or vaccinate.dtype != torch.bool:
            raise ValueError(
                f"vaccinate must be a bool tensor of shape ({count},), got {vaccinate.dtype} of shape {tuple(vaccinate.shape)}"
            )
        allowed = vaccinate.to(q.device)
    visit = draw_order(groups, count, generator) if order is None else _check_order(order, groups, count)
    c, new, phi = _combine(q, old, allowed, visit.to(q.device), beta, max_target, floor, debiased)
    return (c[0], new[0], phi[0]) if single else (c, new, phi)


def _combine(
    q: Tensor, old: Tensor, allowed: Tensor, visit: Tensor, beta: float, max_target: float, floor: float | None, debiased: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups, count, _ = q.shape
    goal = old.clamp(max=max_target) if floor is None else old.clamp(min=floor).clamp(max=max_target)
    square = q.diagonal(dim1=1, dim2=2).clamp(min=0.0)
    norm = square.sqrt()
    noise = torch.zeros_like(square) if debiased is None else debiased.double() - square  # to be added to squared norms
    clean = (square + noise).maximum(1e-3 * square).sqrt()
    c = torch.eye(count, dtype=q.dtype, device=q.device).repeat(groups, 1, 1)
    products = q.clone()  # <g'_i, g_j>
    own_square, parts = square, norm
    phi = (q / (norm[:, :, None] * norm[:, None, :]).clamp(min=1e-300)).clamp(-1.0, 1.0)
    new = old.clone()
    for step in range(count - 1):  # the rows i do not interact: each is altered by original gradients only
        j = visit[:, :, step]
        at = j[..., None]
        own, other = own_square.clamp(min=0.0).sqrt(), norm.gather(1, j)
        valid = allowed & (own > _ZERO * parts) & (other > 0.0)
        product = products.gather(2, at)[..., 0]
        cosine = torch.where(valid, product / (own * other).clamp(min=1e-300), 0.0).clamp(-1.0, 1.0)
        wanted = goal.gather(2, at)[..., 0]
        act = valid & (cosine < wanted)
        rest = (1.0 - wanted.square()).sqrt()
        weight = own * (wanted * (1.0 - cosine.square()).sqrt() - cosine * rest) / (other * rest).clamp(min=1e-300)
        weight = torch.where(act, weight, 0.0)
        fed = cosine
        if debiased is not None:
            mine = own_square + (c.square() * noise[:, None, :]).sum(2)
            mine = mine.maximum(1e-3 * own_square).clamp(min=1e-300).sqrt()
            fed = (product / (mine * clean.gather(1, j)).clamp(min=1e-300)).clamp(-1.0, 1.0)
        before = new.gather(2, at)[..., 0]
        new.scatter_(2, at, torch.where(valid, (1.0 - beta) * before + beta * fed, before)[..., None])
        phi.scatter_(2, at, torch.where(valid, cosine, phi.gather(2, at)[..., 0])[..., None])
        c.scatter_add_(2, at, weight[..., None])
        products = products + weight[..., None] * q.gather(1, at.expand(-1, -1, count))
        own_square = (products * c).sum(2)
        parts = parts + weight * other
    return c, new, phi


def draw_order(groups: int, count: int, generator: torch.Generator | None) -> Tensor:
    """For each group and task the other tasks in random order, ``(K, T, T - 1)``."""
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    keys = torch.rand(groups, count, count, generator=generator, device=generator.device)
    keys.diagonal(dim1=1, dim2=2).fill_(2.0)  # a task itself comes last and is cut off
    return keys.argsort(2)[:, :, : count - 1]


def _check_order(order: Tensor, groups: int, count: int) -> Tensor:
    if order.ndim == 2:
        order = order.expand(groups, *order.shape)
    if order.shape != (groups, count, count - 1):
        raise ValueError(f"order must have shape ({groups}, {count}, {count - 1}) or ({count}, {count - 1}), got {tuple(order.shape)}")
    whole = torch.cat([order, torch.arange(count, device=order.device).expand(groups, count)[..., None]], 2)
    if not torch.equal(whole.sort(2).values, torch.arange(count, device=order.device).expand(groups, count, count)):
        raise ValueError("order must hold for each task every other task once")
    return order


def check_max_target(value: object) -> float:
    """A cap in (0, 1)."""
    number = _checks.real("max_target", value, low=0.0, high=1.0, low_open=True)
    if number == 1.0:
        raise ValueError("max_target must be below 1: the norm of an altered gradient grows without bound there")
    return number
