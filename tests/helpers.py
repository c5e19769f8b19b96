"""Small models and plain reference loops that tests share, and the functions that child processes run."""

from __future__ import annotations

import gc
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
        gc.collect()  # a wrapped model in a cycle keeps the group alive into the interpreter's exit, where gloo's threads abort
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
        "local looksam": {"sync": "local", "every": 2, "reuse": "looksam"},
        "global looksam": {"sync": "global", "every": 2, "reuse": "looksam"},
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
    for name in ("micro", "global"):
        model = mlp()
        wrapped = DistributedDataParallel(model)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), rho=0.3, accumulate=name, sync="global")
        for batch in batches(3):
            x, y = _shard(batch, rank, count)
            optimizer.step([closure_of(optimizer, wrapped, part, 0.5) for part in zip(x.chunk(2), y.chunk(2), strict=True)])
        result[f"accumulate {name}"] = snapshot(model)
    result["trainer"] = _trained_by_mixin(rank, count)
    return result


def padding_run(rank: int, count: int) -> dict[str, Any]:
    """Audits of a network with skips, whole and sharded; the second one looks at its data, so it runs on zeros."""
    import warnings

    import torchvision
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from outlast.diagnose import padding

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            return out if bool((out == out).all()) else x

    same: dict[str, Any] = {}
    for name, build in {"resnet18": lambda: torchvision.models.resnet18(weights=None), "looking": Looking}.items():
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = padding.audit(model, (3, 64, 64)).to_dict()
            mesh = init_device_mesh("cpu", (count,))
            fully_shard(list(model.children())[:2], mesh=mesh)  # a group, whose hooks are functions
            fully_shard(model, mesh=mesh)
            sharded = padding.audit(model, (3, 64, 64)).to_dict()
        out = model(torch.ones(1, 3, 64, 64))  # it still gathers its weights
        same[name] = sharded == own and bool(torch.isfinite(out).all())
    return same


def dimension_run(rank: int, count: int) -> dict[str, Any]:
    from outlast.diagnose import dimension

    data = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    own = data[rank::count]
    whole = dimension.estimate(data, k=(5, 10), anchors=101)
    metric = dimension.Metric(k=(5, 10))
    metric.update(own)
    net = nn.Linear(6, 4)
    nn.init.eye_(net.weight)
    nn.init.zeros_(net.bias)
    refused: list[str] = []
    inside = data.clone()
    inside[200] += rank  # neither the first nor the last row
    for other in (own, inside):
        try:
            dimension.estimate(other, k=5)
        except ValueError as error:
            refused.append(str(error))
    alone = dimension.Metric(k=(5, 10))
    if rank == 0:
        alone.update(data)  # the others have seen nothing
    few = dimension.Metric(100, k=(5, 10))
    few.update(data[:300] if rank == 0 else data[300:])
    layer = dimension.by_layer(net, own.split(50), [""], k=(5, 10))[""]
    return {
        "estimate": whole.value,
        "se": whole.se,
        "metric": metric.compute().value,
        "alone": alone.compute().value,
        "few": (few.compute().n, few.compute().value),
        "layer": layer.value,
        "refused": refused,
    }


def _trained_by_mixin(rank: int, count: int) -> list[Tensor]:
    """What transformers' Trainer does with two micro-batches a step, of which the last alone is reduced."""
    from torch.nn.parallel import DistributedDataParallel

    from outlast.robust import SAMTrainerMixin

    class Loop:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def training_step(self, model: nn.Module, inputs: Batch) -> Tensor:
            loss = 0.5 * cross_entropy(model, inputs)
            loss.backward()
            return loss.detach()

    class Trainer(SAMTrainerMixin, Loop):
        pass

    model = mlp()
    wrapped = DistributedDataParallel(model)
    trainer = Trainer(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), sam={"rho": 0.3})
    for batch in batches(3):
        first, last = zip(*(part.chunk(2) for part in _shard(batch, rank, count)), strict=True)
        with wrapped.no_sync():
            trainer.training_step(wrapped, first)
        trainer.training_step(wrapped, last)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    return snapshot(model)


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
    for stats in ("ema", "blend"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.SyncBatchNorm(8), nn.Tanh(), nn.Linear(8, 3))
        adapter = Tent(model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1), stats=stats, min_batch=2)
        for batch in batches(4, size=16):
            adapter(_shard(batch, rank, count)[0])
        result[stats] = snapshot(adapter.model)
        if count > 1 and rank == 0:
            adapter.predict(batches(1, size=16)[0][0])  # nobody else is asked
        if count > 1:
            adapter(batches(1, size=16)[0][0][: 1 + 15 * rank])  # too small for one, so nothing is learnt
            result[f"{stats} after"] = snapshot(adapter.model)
            result[f"{stats} running"] = [value for pair in adapter._statistics.to_state() or [] for value in pair]
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


class Tiny(nn.Module):
    """Embedding, attention, Linear, transformers-like Conv1D by hand: every layer kind that shards differently."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.left = nn.Parameter(torch.randn(8, 6) * 0.3)  # inputs in front
        self.out = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.attention(x, x, x)[0]
        flat = torch.addmm(torch.zeros(6), x.mean(1), self.left)
        return self.out(torch.tanh(flat))


def token_batches(count: int, *, size: int = 8, seed: int = 3) -> list[Batch]:
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randint(0, 12, (size, 4), generator=rng), torch.randint(0, 3, (size,), generator=rng)) for _ in range(count)]


def gpm_run(rank: int, count: int) -> dict[str, Any]:
    """Three tasks under DistributedDataParallel; with one process the plain run."""
    from torch.nn.parallel import DistributedDataParallel

    from outlast.continual import GradientProjectionMemory

    torch.manual_seed(0)
    model = Tiny()
    wrapped = DistributedDataParallel(model) if count > 1 else model
    memory = GradientProjectionMemory(wrapped, threshold=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
    memory.attach(optimizer)
    ranks = []
    for task in range(3):
        for batch in token_batches(3, seed=task):
            optimizer.zero_grad()
            cross_entropy(wrapped, _shard(batch, rank, count)).backward()
            optimizer.step()
        own = [_shard(batch, rank, count) for batch in token_batches(2, seed=10 + task)]
        memory.consolidate(own, max_samples=None)
        ranks.append(memory.ranks)
    try:
        memory.consolidate([(torch.zeros(0, 4, dtype=torch.int64),)] if rank else [])
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {"weights": snapshot(model), "ranks": ranks, "refused": refused}


def gpm_sharded_run(rank: int, count: int) -> dict[str, Any]:
    """The same with FSDP2, saved in the middle and taken up by a fresh memory."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from outlast.continual import GradientProjectionMemory

    def build() -> tuple[nn.Module, GradientProjectionMemory, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = Tiny()
        if count > 1:
            mesh = init_device_mesh("cpu", (count,))
            for module in (model.table, model.attention, model.out):
                fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
        memory = GradientProjectionMemory(model, threshold=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)
        memory.attach(optimizer, mode="both")
        return model, memory, optimizer

    model, memory, optimizer = build()
    state: dict[str, Any] = {}
    for task in range(3):
        for batch in token_batches(3, seed=task):
            optimizer.zero_grad()
            cross_entropy(model, _shard(batch, rank, count)).backward()
            optimizer.step()
        memory.consolidate([_shard(batch, rank, count) for batch in token_batches(2, seed=10 + task)], max_samples=None)
        if task == 1:
            state = memory.state_dict()
            other, again, stepper = build()
            other.load_state_dict(model.state_dict())
            again.load_state_dict(state)
            for batch in token_batches(3, seed=2):
                stepper.zero_grad()
                cross_entropy(other, _shard(batch, rank, count)).backward()
                stepper.step()
            resumed = [_whole(parameter) for parameter in other.parameters()]
    return {
        "weights": [_whole(parameter) for parameter in model.parameters()],
        "resumed": resumed,
        "ranks": memory.ranks,
        "state": {name: entry.get("basis", entry.get("protected")) for name, entry in state["layers"].items()},
        "anchor": state["layers"]["out"]["anchor"],
    }


def _whole(parameter: Tensor) -> Tensor:
    return getattr(parameter, "full_tensor", lambda: parameter)().detach().clone()


def gradvac_run(rank: int, count: int) -> dict[str, Any]:
    """Three tasks, in both engines; the last step lacks a task on the second process."""
    from torch.nn.parallel import DistributedDataParallel

    from outlast.multitask import GradVac

    result: dict[str, Any] = {}
    for engine in ("loop", "layer"):
        model = mlp()
        wrapped = DistributedDataParallel(model) if count > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        vaccine = GradVac(optimizer, ["a", "b", "c"], model=wrapped, beta=0.3, engine=engine)
        for step in range(4):
            data = {name: batches(1, size=4, seed=10 * step + number)[0] for number, name in enumerate("abc")}
            own = {name: _shard(batch, rank, count) for name, batch in data.items()}
            optimizer.zero_grad()
            if engine == "layer":
                x = torch.cat([batch[0] for batch in own.values()])
                with vaccine.rows(torch.arange(3).repeat_interleave(4 // count)):
                    out = wrapped(x)
                parts = out.split(4 // count)
                vaccine.backward({n: F.cross_entropy(o, b[1]) for (n, b), o in zip(own.items(), parts, strict=True)})
            else:
                counts = None
                if step == 3:  # c: all rows on the first process, none on the second
                    own["c"] = data["c"]
                    if count > 1 and rank == 1:
                        del own["c"]
                    counts = {name: len(batch[0]) for name, batch in own.items()}
                vaccine.backward({name: cross_entropy(wrapped, batch) for name, batch in own.items()}, counts=counts)
            optimizer.step()
        result[engine] = snapshot(model)
        result[f"{engine} targets"] = vaccine.state_dict()["targets"]
    return result


def gradvac_sharded_run(rank: int, count: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from outlast.multitask import GradVac

    model = mlp()
    if count > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    vaccine = GradVac(optimizer, ["a", "b", "c"], model=model, beta=0.3)
    for step in range(3):
        data = {name: batches(1, size=4, seed=10 * step + number)[0] for number, name in enumerate("abc")}
        optimizer.zero_grad()
        vaccine.backward({name: cross_entropy(model, _shard(batch, rank, count)) for name, batch in data.items()})
        optimizer.step()
    return {"weights": [_whole(parameter) for parameter in model.parameters()], "targets": vaccine.state_dict()["targets"]}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def families(*, seed: int = 0, d: int = 16, classes: int = 40, each: int = 60, unrelated: bool = False) -> tuple[Batch, Batch]:
    """Classes in families that share mean and shape, as calibration assumes; base classes and new ones."""
    stream = rng(seed)
    means = 1.5 * torch.randn(8, d, generator=stream)
    shapes = torch.stack([torch.linalg.qr(torch.randn(d, d, generator=stream)).Q for _ in range(8)])
    shapes = shapes * torch.tensor([2.0] * 4 + [0.35] * (d - 4))

    def draw(count, own_means, own_shapes):
        family = torch.randint(0, 8, (count,), generator=stream)
        centre = own_means[family] + 0.5 * torch.randn(count, d, generator=stream)
        rows = centre[:, None] + torch.einsum("nij,npj->npi", own_shapes[family], torch.randn(count, each, d, generator=stream))
        return rows.reshape(-1, d), torch.arange(count).repeat_interleave(each)

    if unrelated:
        other = 1.5 * torch.randn(8, d, generator=stream)
        return draw(classes, other, shapes[torch.randperm(8, generator=stream)]), draw(20, means, shapes)
    return draw(classes, means, shapes), draw(20, means, shapes)


def nt_xent_run(rank: int, count: int) -> dict[str, Any]:
    """Gathered NT-Xent of seven samples, four of them on the first process; the gradient averaged as DDP does."""
    from outlast.fewshot import nt_xent

    z = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    weight = torch.eye(5).requires_grad_()
    own = z if count == 1 else z[:, :4] if rank == 0 else z[:, 4:]
    first, second = own @ weight
    loss = nt_xent(first, second, temperature=0.5, gather="auto")
    loss.backward()
    grad = weight.grad
    assert grad is not None
    if count > 1:
        torch.distributed.all_reduce(grad)
        grad /= count
    alone = nt_xent(first.detach(), second.detach(), temperature=0.5)
    return {"loss": loss.detach(), "grad": grad, "alone": alone}


def startup_run(rank: int, count: int) -> dict[str, Any]:
    """STARTUP through Fabric, without BatchNorm and augmentation, whole and in micro-batches."""
    from lightning_fabric import Fabric
    from torch.utils.data import DataLoader, TensorDataset

    from outlast.data import Indexed
    from outlast.fewshot import TwoViews, adapt_representation

    if count > 1:
        _as_torchrun(rank, count)
    fabric = Fabric(accelerator="cpu", devices=count, strategy="ddp" if count > 1 else "auto")
    fabric.launch()
    rng = torch.Generator().manual_seed(0)
    x, y, u = torch.randn(40, 4, generator=rng), torch.randint(0, 3, (40,), generator=rng), torch.randn(36, 4, generator=rng)
    result: dict[str, Any] = {}
    for name, size in {"whole": None, "parts": 2}.items():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        found = adapt_representation(
            teacher,
            DataLoader(TensorDataset(x, y), 8),
            DataLoader(Indexed(TensorDataset(u)), 8),
            epochs=2,
            lr=0.05,
            views=TwoViews(lambda v: 1.5 * v, lambda v: v + 0.3, batch_ndim=2),
            micro_batch=size,
            fabric=fabric,
        )
        result[name] = snapshot(found.student)
        result[f"{name} loss"] = torch.tensor(found.history[-1]["total"])
    return result


def startup_norm_run(rank: int, count: int) -> dict[str, Any]:
    """STARTUP with BatchNorm, a choice of rates and terms without weight, through Fabric."""
    from lightning_fabric import Fabric
    from torch.utils.data import DataLoader, TensorDataset

    from outlast.data import Indexed
    from outlast.fewshot import StartupLoss, TwoViews, adapt_representation

    _as_torchrun(rank, count)
    fabric = Fabric(accelerator="cpu", devices=count, strategy="ddp")
    fabric.launch()
    rng = torch.Generator().manual_seed(0)
    x, y, u = torch.randn(40, 4, generator=rng), torch.randint(0, 3, (40,), generator=rng), torch.randn(36, 4, generator=rng)
    result: dict[str, Any] = {}
    for name, weights in {"all": (1.0, 1.0, 1.0), "simclr": (0.0, 0.0, 1.0), "source": (1.0, 0.0, 0.0)}.items():
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        found = adapt_representation(
            teacher,
            DataLoader(TensorDataset(x, y), 8),
            DataLoader(Indexed(TensorDataset(u)), 8),
            epochs=4,
            lr=[0.05, 0.04, 0.06, 0.07, 0.03],
            loss=StartupLoss(0.5, weights),
            views=TwoViews(lambda v: v + 0.3 * torch.randn(v.shape), batch_ndim=2),
            fabric=fabric,
        )
        result[name] = {"state": list(found.student.state_dict().values()), "lr": found.lr, "epoch": found.best_epoch, "rates": found.rates}
    return result


def _as_torchrun(rank: int, count: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        TORCHELASTIC_RUN_ID="test",
    )


def mixup_draws(rank: int, count: int) -> dict[str, Any]:
    """Draws of each process, and those after loading the first process's state."""
    from outlast.robust import MixUp

    mixup = MixUp(per_sample=True, generator=rng(0))
    lam = mixup.draw(6).lam
    boxes: list[Any] = [mixup.state_dict()]
    torch.distributed.broadcast_object_list(boxes, 0)
    following = mixup.draw(6).lam
    other = MixUp(per_sample=True, generator=rng(9))
    other.load_state_dict(boxes[0])
    return {"lam": lam, "next": following, "resumed": other.draw(6).lam}


def invariance_run(rank: int, count: int) -> dict[str, Any]:
    """Penalty, balanced cross-entropy and the gradient of both, averaged as DDP does; groups inferred from parts of the data."""
    import warnings

    from outlast.robust import GroupInvariance, group_balanced_cross_entropy, invariance_penalty

    stream = rng(0)
    x, y, g = (
        torch.randn(24, 6, generator=stream),
        torch.randint(0, 3, (24,), generator=stream),
        torch.randint(-1, 2, (24,), generator=stream),
    )
    own = slice(None) if count == 1 else slice(0, 14) if rank == 0 else slice(14, 24)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    logits = net(x[own])
    penalty = invariance_penalty(logits, y[own], g[own])
    entropy = group_balanced_cross_entropy(logits, y[own], g[own])
    (penalty + entropy).backward()
    grads = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None])
    whole = entropy.detach()
    if count > 1:
        torch.distributed.all_reduce(grads)
        torch.distributed.all_reduce(whole)
    method = GroupInvariance(net, head="2", ramp_steps=1)
    local = invariance_penalty(logits.detach(), y[own], g[own], process_group="local") if count > 1 else penalty.detach()
    assert count == 1 or not torch.equal(local, penalty.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference is a toy
        partition = method.infer([(x[own], y[own], torch.arange(24)[own])], method="loss")
        normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        GroupInvariance(normed, head="2", ramp_steps=1).infer([(x[own], y[own], torch.arange(24)[own])], method="loss")
    result = {"penalty": penalty.detach(), "entropy": whole / count, "grads": grads / count, "groups": partition.groups}
    return result if count == 1 else {**result, "statistics": normed[1].running_mean}


def drawn(result) -> bool:
    """Whether a result's picture shows anything."""
    axes = result.plot()
    shown = axes.has_data() or bool(axes.texts)
    axes.figure.clear()
    return shown
