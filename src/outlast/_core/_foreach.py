# pyright: reportPrivateImportUsage=none
"""Torch's multi-tensor kernels under typed names, with a plain loop where a caller asks for one.

torch exposes these kernels only under private names; the optimizers of torch itself are built on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor], *, foreach: bool = True) -> None:
    """``target.copy_(source)`` for each pair: into the existing storage, bit exact for equal types."""
    if not targets:
        return
    if foreach:
        torch._foreach_copy_(_local(targets), _local(sources))
    else:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def add_(targets: Sequence[Tensor], others: Sequence[Tensor], *, alpha: float = 1.0, foreach: bool = True) -> None:
    """``target += alpha * other`` for each pair."""
    if not targets:
        return
    if foreach:
        torch._foreach_add_(_local(targets), _local(others), alpha=alpha)
    else:
        for target, other in zip(targets, others, strict=True):
            target.add_(other, alpha=alpha)


def mul_(targets: Sequence[Tensor], factor: Tensor, *, foreach: bool = True) -> None:
    """``target *= factor`` for each, ``factor`` a 0-dim tensor that stays on its device."""
    if not targets:
        return
    if foreach:
        torch._foreach_mul_(_local(targets), factor)
    else:
        for target in targets:
            target.mul_(factor.to(target.dtype))


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of tensors seen as one vector each; float32 at least."""
    return torch.stack([_dot(_wide(a), _wide(b)) for a, b in zip(left, right, strict=True)]).sum()


def norm(tensors: Sequence[Tensor], *, foreach: bool = True) -> Tensor:
    """Euclidean norm of all tensors together as a 0-dim tensor; low-precision inputs are summed in float32.

    Sharded tensors (DTensor) give the norm of the whole, on every rank.
    """
    if not tensors:
        return torch.zeros(())
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    wide = torch.float32
    norms: list[Tensor] = []
    for dtype, group in by_dtype.items():
        own = torch.promote_types(dtype, torch.float32)
        wide = torch.promote_types(wide, own)
        if foreach and not any(map(is_sharded, group)):
            norms += torch._foreach_norm(group, 2.0, dtype=own)
        else:
            norms += [whole(torch.linalg.vector_norm(tensor, dtype=own)) for tensor in group]
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([part.to(device, wide) for part in norms]))


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor (the name is told apart without importing torch.distributed.tensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The full value of a DTensor, or the tensor itself."""
    full: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, sharing its storage, or the tensor itself."""
    return cast("Tensor", cast("Any", tensor).to_local()) if is_sharded(tensor) else tensor


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's shards: what acts on each element acts on them, and DTensor has no multi-tensor kernels."""
    return [local(tensor) for tensor in tensors]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    if is_sharded(a):
        return whole(torch.sum(a * b))
    return torch.dot(a.reshape(-1), b.reshape(-1))  # without the product as a temporary


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
