"""Small models and plain reference loops that tests share, and the functions that child processes run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


def mlp(*, seed: int = 0, norm: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """4-8-3, with BatchNorm and dropout on demand."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(4, 8)]
    if norm:
        layers.append(nn.BatchNorm1d(8))
    layers.append(nn.Tanh())
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(8, 3)).to(dtype)


def batches(count: int, *, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Batch]:
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 4, generator=rng).to(dtype), torch.randint(0, 3, (size,), generator=rng)) for _ in range(count)]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, batch: Batch, scale: float = 1.0) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scale * cross_entropy(model, batch)
        loss.backward()
        return loss

    return closure


def snapshot(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, copied."""
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def farthest(left: nn.Module, right: nn.Module) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(left.parameters(), right.parameters(), strict=True))


def gradient(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def by_hand(loss_fn: Callable[[], Tensor], parameters: Sequence[nn.Parameter], rho: float) -> tuple[list[Tensor], list[Tensor]]:
    """The plain gradient and the SAM gradient (p = 2), by the four lines of the paper."""
    plain = gradient(loss_fn(), parameters)
    size = flat(plain).norm()
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, grad in zip(parameters, plain, strict=True):
            parameter.add_(grad, alpha=float(rho / size))
    sharp = gradient(loss_fn(), parameters)
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return plain, sharp


def train_by_hand(model: nn.Module, parts_of_steps: Sequence[Sequence[Batch]], *, rho: float, lr: float, momentum: float = 0.0) -> None:
    """SGD on the mean SAM gradient of equally large parts, each with a perturbation of its own."""
    parameters = list(model.parameters())
    base = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    for parts in parts_of_steps:
        found = [by_hand(lambda part=part: cross_entropy(model, part), parameters, rho)[1] for part in parts]
        for parameter, grads in zip(parameters, zip(*found, strict=True), strict=True):
            parameter.grad = torch.stack(grads).mean(0)
        base.step()


# ---- what child processes run ----------------------------------------------------------------------------------------


def in_processes(work: Callable[..., Any], folder: Path, count: int = 2) -> list[Any]:
    """Run ``work(rank, count)`` in gloo processes and return what each returns."""
    import torch.multiprocessing as mp

    mp.spawn(_child, args=(work, str(folder), count), nprocs=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _child(rank: int, work: Callable[..., Any], folder: str, count: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        torch.save(work(rank, count), Path(folder) / f"{rank}.pt")
        torch.distributed.barrier()  # gloo aborts a process whose peer is gone before it
    finally:
        torch.distributed.destroy_process_group()


def _shard(batch: Batch, rank: int, count: int) -> Batch:
    return batch[0].chunk(count)[rank], batch[1].chunk(count)[rank]


def ddp_run(rank: int, count: int) -> dict[str, Any]:
    from torch.nn.parallel import DistributedDataParallel

    from outlast.robust import SAM

    result: dict[str, Any] = {}
    for name, settings in {
        "local": {"sync": "local"},
        "global": {"sync": "global"},
        "local inner": {"sync": "local", "inner_steps": 2},
    }.items():
        model = mlp()
        wrapped = DistributedDataParallel(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.3, **settings)
        for batch in batches(3):
            optimizer.step(closure_of(optimizer, wrapped, _shard(batch, rank, count)))
        result[name] = snapshot(model)
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.3)
    for batch in batches(3):
        with optimizer.first_pass():
            optimizer.zero_grad()
            cross_entropy(wrapped, _shard(batch, rank, count)).backward()
        with optimizer.perturbed():
            cross_entropy(wrapped, _shard(batch, rank, count)).backward()
        optimizer.step()
    result["local two-call"] = snapshot(model)
    return result


def fsdp_run(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from outlast.errors import UnsupportedError
    from outlast.robust import SAM

    model = mlp()
    fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    base = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    try:
        SAM(base, sync="local")
        refused = False
    except UnsupportedError:
        refused = True
    optimizer = SAM(base, rho=0.3, sync="global")
    for batch in batches(3):
        optimizer.step(closure_of(optimizer, model, _shard(batch, rank, count)))
    assert optimizer.last is not None
    return {
        "refused": refused,
        "weights": [parameter.full_tensor().detach() for parameter in model.parameters()],
        "norm": float(optimizer.last.grad_norm),
    }


def tent_run(rank: int, count: int) -> dict[str, Any]:
    """Adapt on a batch that the processes share; a model without BatchNorm gives what one process gives."""
    import warnings

    from outlast.adapt import CollapseAlarm, Diversity, EntropyFilter, Recovery, RedundancyFilter, Tent

    result: dict[str, Any] = {}
    guards = {
        "plain": list,
        "guarded": lambda: [EntropyFilter(0.97), RedundancyFilter(0.999), Recovery(), Diversity(0.5), CollapseAlarm(16)],
    }
    for name, make in guards.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = Tent(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), guards=make())
        for batch in batches(4, size=16):
            adapter(_shard(batch, rank, count)[0])
        result[name] = snapshot(adapter.model)
    return result


def tent_sharded_run(rank: int, count: int) -> dict[str, Any]:
    """The plain run of :func:`tent_run`, with the adapter's model sharded by FSDP2 where there are several processes."""
    import warnings

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from outlast.adapt import Tent

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = Tent(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    if count > 1:
        fully_shard(adapter.model, mesh=init_device_mesh("cpu", (count,)))
    for batch in batches(4, size=16):
        adapter(_shard(batch, rank, count)[0])
    moved = [getattr(parameter, "full_tensor", lambda p=parameter: p)().detach().clone() for parameter in adapter.adapted.values()]
    drift = adapter.report.drift
    adapter.reset()
    return {"moved": moved, "drift": drift, "after reset": adapter.report.drift}


def tent_uneven_run(rank: int, count: int) -> dict[str, Any]:
    """Processes whose batches differ: one too small, one with a row that is not finite, one asked for its report."""
    import warnings

    from outlast.adapt import CollapseAlarm, EntropyFilter, Tent

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = Tent(model, lr=0.05, guards=[EntropyFilter(0.99), CollapseAlarm(16)], min_batch=8)
    counts: list[int] = []
    for number, (x, _) in enumerate(batches(6, size=16)):
        part = x[: 15 + rank]
        if number == 1 and rank == 0:
            part = x[:4]
        if number == 3 and rank == 0:
            part = part.clone()
            part[2, 1] = float("nan")
        adapter(part)
        if rank == 0:
            counts.append(adapter.report.updates)
    return {"weights": snapshot(adapter.model), "updates": adapter.report.updates, "counts": counts}
