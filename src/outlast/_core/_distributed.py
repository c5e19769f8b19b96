"""The processes that share a computation: those of ``torch.distributed`` where it is initialised, else one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from outlast._core._foreach import is_sharded

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "_FabricModule": "module",
}


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's number."""
    return torch.distributed.get_rank() if _initialised() else 0


def sum_(tensor: Tensor) -> Tensor:
    """Add up a tensor over the processes, in place."""
    if world_size() == 1:
        return tensor
    if not tensor.is_cuda and torch.distributed.get_backend() == "nccl":  # which knows no tensors of the processor
        tensor.copy_(sum_(tensor.cuda()))
    else:
        torch.distributed.all_reduce(tensor)
    return tensor


def from_first(value: Any) -> Any:
    """What the first process has, in all of them; the value must be picklable."""
    if world_size() == 1:
        return value
    boxed = [value]
    torch.distributed.broadcast_object_list(boxed, 0)
    return boxed[0]


def gather(value: object) -> list[Any]:
    """What every process has, in the order of their numbers; the value must be picklable."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def spread_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: running statistics are each process's own."""
    if world_size() > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, 0)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as the DTensor ``like`` is; the tensor itself for any other ``like``."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import DTensor, Replicate

    sharded: Any = like
    spread = DTensor.from_local(full, sharded.device_mesh, [Replicate()] * sharded.device_mesh.ndim, run_check=False)
    return spread.redistribute(placements=sharded.placements).to_local()


def gathered(part: Tensor, like: Tensor, shape: torch.Size | None = None) -> Tensor:
    """The whole of which this process holds ``part``, split as the DTensor ``like`` is; a copy for any other ``like``.

    ``shape`` is the whole's where it differs from that of ``like``.
    """
    if not is_sharded(like):
        return part.clone()
    from torch.distributed.tensor import DTensor

    sharded: Any = like
    size = sharded.shape if shape is None else shape
    stride = torch.empty(size, device="meta").stride()
    return DTensor.from_local(part, sharded.device_mesh, sharded.placements, run_check=False, shape=size, stride=stride).full_tensor()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module below ``torch.compile``, data parallelism and Fabric."""
    name = _WRAPPERS.get(type(model).__name__)  # a user's own module with a child of that name does more than call it
    inner = getattr(model, name, None) if name else None
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def differentiable_sum(tensor: Tensor, group: Any = None) -> Tensor:
    """The sum over the processes of a group (None: all), whose gradient is the sum of theirs.

    Of a loss that all processes compute from such sums, averaging the gradients over processes gives the gradient of one
    process with the whole batch.
    """
    return _Sum.apply(tensor, group)  # pyright: ignore[reportReturnType]
