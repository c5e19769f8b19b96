"""What a cell gets besides its configuration, and the one training loop of all studies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from outlast._core import _random
from outlast._core._extras import require
from outlast._core._foreach import whole
from outlast.errors import DivergedError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Report = Callable[[int, int, float], None]
_SHARED: dict[tuple[Hashable, ...], Any] = {}
_SHARED_LIMIT = 6


class Context:
    """Devices, random streams and progress of one cell.

    Attributes:
        seed: the cell's seed.
        fabric: Lightning Fabric, launched.
    """

    def __init__(self, seed: int, launch: Mapping[str, Any], report: Report) -> None:
        fabric_module = require("lightning_fabric", extra="train", purpose="the training loop of studies")
        self.seed = seed
        self._launch = dict(launch)
        self.sharded = launch["strategy"] == "fsdp"
        strategy: Any = launch["strategy"]
        if self.sharded:
            strategies = require("lightning_fabric.strategies", extra="train", purpose="--strategy fsdp")
            strategy = strategies.ModelParallelStrategy(_shard, data_parallel_size=launch["devices"], tensor_parallel_size=1)
        self.fabric: Fabric = fabric_module.Fabric(
            accelerator=launch["accelerator"], devices=launch["devices"], precision=launch["precision"], strategy=strategy
        )
        self.fabric.launch()
        self.report = report  # of (step, steps, loss), for cells with a loop of their own
        self._unsharded: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()

    def generator(self, name: str, index: int = 0) -> torch.Generator:
        """A generator that is a function of (seed, name, index): arms of one seed draw the same data, order and start."""
        return _random.generator(self.seed, name, index)

    def shared(self, key: tuple[Hashable, ...], build: Callable[[], Any]) -> Any:
        """Work that several cells of one seed have in common, such as a trained source model, done once a process.

        ``build`` must be a pure function of the seed and of what ``key`` holds, and nobody may change what it gives: then
        a cell's result is the same whether the work was done before or not. The latest few are kept.
        """
        full = (self.seed, *sorted(self._launch.items()), *key)
        if full not in _SHARED:
            while len(_SHARED) >= _SHARED_LIMIT:
                del _SHARED[next(iter(_SHARED))]
            _SHARED[full] = build()
        _SHARED[full] = _SHARED.pop(full)  # the one used last goes last
        return _SHARED[full]

    def clock(self) -> float:
        """Seconds, read once the device has done what it was given: an accelerator works on after a call returns."""
        if self.fabric.device.type != "cpu":
            torch.accelerator.synchronize(self.fabric.device)
        return time.perf_counter()

    def initialise(self, build: Callable[[], nn.Module]) -> nn.Module:
        """Build a model with an initialisation that is a function of the seed, leaving torch's generator alone."""
        with _random.seeded(_random.derived_seed(self.seed, "initialisation")):
            return build()

    def train(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        images: Tensor,
        labels: Tensor,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        objective: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] | None = None,
        epochs: int,
        batch_size: int,
        micro_batch: int | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        order: Callable[[int, torch.Generator], Tensor] | None = None,
        after_epoch: Callable[[nn.Module, int], None] | None = None,
        max_steps: int | None = None,
        schedule: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None = None,
        stream: str = "",
    ) -> nn.Module:
        """Train with a cosine schedule that ends at zero (or ``schedule(optimizer, steps)``), and return the wrapped model.

        Every epoch goes through a fresh permutation (or ``order(epoch, generator)``) and drops the incomplete last batch. With
        several devices each takes an equal share of every batch. Each update is one ``optimizer.step(closure)``, or
        ``step([closures])`` over ``micro_batch`` samples each, for optimizers that take such. ``mix(images, labels)`` changes each
        batch once an update (mixup). The loss is ``loss_fn(model(images), labels)``, or ``objective(model, images, labels, index)``
        with the numbers of the samples. ``stream`` names the random order of this training where a cell trains more than once.

        Raises:
            DivergedError: an epoch's loss is not finite.
        """
        if (loss_fn is None) == (objective is None):
            raise ValueError("give loss_fn or objective, one of them")
        if objective is not None and micro_batch is not None:
            raise ValueError("micro_batch is for loss_fn; an objective takes whole batches")
        fabric = self.fabric
        unsharded = copy.deepcopy(model) if self.sharded else None  # a sharded module cannot be copied any more
        model = fabric.setup_module(model)
        if unsharded is not None:
            self._unsharded[model] = unsharded
        optimizer: Any = fabric.setup_optimizers(make_optimizer(model))
        images, labels = images.to(fabric.device), labels.to(fabric.device)
        steps_per_epoch = len(images) // batch_size
        total = epochs * steps_per_epoch
        rates = (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, total)
            if schedule is None
            else schedule(optimizer.optimizer, total)
        )
        share = batch_size // fabric.world_size
        done = 0
        for epoch in range(epochs):
            model.train()
            places = self.generator(f"{stream}order", epoch)
            samples = torch.randperm(len(images), generator=places) if order is None else order(epoch, places)
            samples = samples.to(fabric.device)
            draws = self.generator(f"{stream}augmentation", epoch)
            loss_sum = torch.zeros((), device=fabric.device)
            for step in range(steps_per_epoch):
                start = step * batch_size + fabric.global_rank * share
                index = samples[start : start + share]
                batch = images[index] if augment is None else augment(images[index], draws)
                target = labels[index]
                if mix is not None:
                    batch, target = mix(batch, target)
                if objective is None:
                    assert loss_fn is not None
                    closures = self._closures(model, optimizer, batch, target, loss_fn, micro_batch)
                else:
                    own: tuple[Any, ...] = (model, batch, target, index)
                    closures = [self._closure(optimizer, lambda own=own: objective(*own))]
                loss = optimizer.step(closures[0] if micro_batch is None else closures)
                rates.step()
                loss_sum += loss.detach()
                done += 1
                if done == max_steps:
                    return model
            mean = float(loss_sum) / steps_per_epoch
            if not mean < float("inf"):
                raise DivergedError(f"the training loss is {mean} after epoch {epoch + 1}")
            if after_epoch is not None:
                after_epoch(model, epoch)
            self.report(epoch + 1, epochs, mean)
        return model

    def _closures(
        self,
        model: nn.Module,
        optimizer: Any,
        images: Tensor,
        labels: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        size: int | None,
    ) -> list[Callable[[], Tensor]]:
        pieces = [(images, labels)] if size is None else list(zip(images.split(size), labels.split(size), strict=True))

        return [
            self._closure(optimizer, lambda x=x, y=y: loss_fn(model(x), y) * (len(y) / len(labels)))  # pyright: ignore[reportUnknownLambdaType]
            for x, y in pieces
        ]

    def _closure(self, optimizer: Any, evaluate: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = evaluate()
            self.fabric.backward(loss)
            return loss

        return closure

    def plain(self, model: nn.Module) -> nn.Module:
        """The module without Fabric's wrappers; of a sharded one a copy with whole parameters, for measurements."""
        module: nn.Module = getattr(model, "module", model)
        if not self.sharded:
            return module
        bare = self._unsharded[model].to(self.fabric.device)
        bare.load_state_dict({name: whole(value) for name, value in module.state_dict().items()})
        return bare


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model
