"""Pairs of methods that the documentation promises to work together, each as one small training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from helpers import Batch, batches, mlp, rng, snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from outlast.attention import FavorAttention, redraw_after_steps
from outlast.continual import GradientProjectionMemory
from outlast.diagnose import padding
from outlast.multitask import GradVac
from outlast.robust import SAM, GroupInvariance, MixUp

Shard = Callable[[Tensor], Tensor]
STEPS = 6  # of a training; a task ends in the middle where there is a memory


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


class Composition:
    """A model, what trains it, and one step. ``wrapped`` is what runs the forward pass."""

    def __init__(self, model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> None:
        self.model, self.wrapped = model, wrap(model)

    bf16 = False  # around forward passes and losses, as a training loop has it

    def precision(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with self.precision():
            return F.cross_entropy(self.wrapped(x), y)

    def batch(self, number: int) -> Batch:
        return batches(1, size=16, seed=100 + number)[0]

    def step(self, number: int, parts: int, shard: Shard) -> None:
        """One step; with ``parts`` the batch comes in pieces whose gradients accumulate; ``shard`` takes this process's rows."""
        raise NotImplementedError

    def between(self, number: int, shard: Shard) -> None:
        """What happens after a step."""

    def stateful(self) -> dict[str, Any]:
        """Everything with a state_dict."""
        raise NotImplementedError

    def run(self, steps: Sequence[int], parts: int = 1, shard: Shard = lambda x: x) -> list[Tensor]:
        for number in steps:
            self.step(number, parts, shard)
            self.between(number, shard)
        return snapshot(self.model)

    def state(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.stateful().items()}

    def load(self, state: dict[str, Any]) -> None:
        for name, each in self.stateful().items():
            each.load_state_dict(state[name])


class SamMixUp(Composition):
    """The mix is drawn once a step, outside of the closure."""

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = SAM(sgd(self.model), rho=0.1, sync="global")
        self.mixup = MixUp(alpha=1.0, num_classes=3, generator=rng(5))

    def step(self, number, parts, shard):
        x, y = self.mixup(*(shard(part) for part in self.batch(number)))  # each process draws for its own rows

        def closure():
            self.optimizer.zero_grad()
            for own in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (self.loss(*own) / parts).backward()
            return torch.zeros(())

        self.optimizer.step(closure)

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "mixup": self.mixup}


class SamInvariance(Composition):
    """The ramp counts the optimizer's steps, since both passes call the loss."""

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = SAM(sgd(self.model), rho=0.1, sync="global")
        self.method = GroupInvariance(self.wrapped, head="2", weight=2.0, ramp_steps=4)
        self.method.set_groups(torch.arange(16) % 2)
        self.method.attach(self.optimizer)

    def step(self, number, parts, shard):
        x, y = self.batch(number)
        own = [shard(part) for part in (x, y, torch.arange(16))]

        def closure():
            self.optimizer.zero_grad()
            with self.precision():
                loss = self.method.loss(*own).total
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "method": self.method}


class WithMemory(Composition):
    """A task ends after the third step; its inputs use half of the directions, all of which the first layer's memory holds."""

    memory: GradientProjectionMemory

    def batch(self, number):
        x, y = super().batch(number)
        return (self.of_first_task(x), y) if number % 10 < STEPS // 2 else (x, y)

    def of_first_task(self, x):
        return torch.cat([x[..., :2], torch.zeros_like(x[..., 2:])], -1)

    def remember(self):
        held, others = next(iter(dict(self.model.named_children()))), 0.6
        memory = GradientProjectionMemory(self.wrapped, threshold=lambda name, _task: 0.9999 if name == held else others)
        memory.attach(self.optimizer)
        return memory

    def between(self, number, shard):
        if number == STEPS // 2 - 1:
            with self.precision():
                self.memory.consolidate([tuple(shard(part) for part in self.batch(50))], max_samples=None)


class SamMemory(WithMemory):
    """Only SAM's real step meets the memory."""

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = SAM(sgd(self.model), rho=0.1, sync="global")
        self.memory = self.remember()

    def step(self, number, parts, shard):
        x, y = (shard(part) for part in self.batch(number))

        def closure():
            self.optimizer.zero_grad()
            for own in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (self.loss(*own) / parts).backward()
            return torch.zeros(())

        self.optimizer.step(closure)

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "memory": self.memory}


class MixUpMemory(WithMemory):
    """The memory is filled with inputs as they are."""

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = sgd(self.model)
        self.memory = self.remember()
        self.mixup = MixUp(alpha=1.0, num_classes=3, generator=rng(5))

    def step(self, number, parts, shard):
        x, y = self.mixup(*(shard(part) for part in self.batch(number)))  # each process draws for its own rows
        self.optimizer.zero_grad()
        for own in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (self.loss(*own) / parts).backward()
        self.optimizer.step()

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "memory": self.memory, "mixup": self.mixup}


class Vaccine(Composition):
    """Two tasks."""

    def losses(self, number: int, part: int, parts: int, shard: Shard) -> dict[str, Tensor]:
        found = {}
        for place, name in enumerate("ab"):
            x, y = (shard(each).chunk(parts)[part] for each in self.batch(10 * place + number))
            found[name] = self.loss(x, y) / parts
        return found

    def step(self, number, parts, shard):
        self.optimizer.zero_grad()
        for part in range(parts):
            self.vaccine.backward(self.losses(number, part, parts, shard), final=part == parts - 1)
        self.optimizer.step()


class VaccineMemory(WithMemory, Vaccine):
    """The vaccine makes the gradient, the memory holds the step."""

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = sgd(self.model)
        self.memory = self.remember()
        self.vaccine = GradVac(self.optimizer, ["a", "b"], model=self.wrapped, beta=0.3)

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "memory": self.memory, "vaccine": self.vaccine}


class SamVaccine(Vaccine):
    """The first pass takes the plain sum; the vaccine combines in the second, so that its targets move once a step.

    The vaccine reduces over processes in DistributedDataParallel's place, so the first pass stays local, which is SAM's default.
    """

    def __init__(self, wrap):
        super().__init__(mlp(), wrap)
        self.optimizer = SAM(sgd(self.model), rho=0.1)
        self.vaccine = GradVac(self.optimizer, ["a", "b"], model=self.wrapped, beta=0.3)

    def step(self, number, parts, shard):
        with self.optimizer.first_pass():
            self.optimizer.zero_grad()
            for part in range(parts):
                sum(self.losses(number, part, parts, shard).values()).backward()
        with self.optimizer.perturbed():
            for part in range(parts):
                self.vaccine.backward(self.losses(number, part, parts, shard), final=part == parts - 1)
        self.optimizer.step()

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "vaccine": self.vaccine}


class Attentive(nn.Module):
    """Tokens of width 4, one layer of linear attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 24), nn.Linear(8, 3)
        self.attend = FavorAttention(4, 2, 16, seed=3)
        self.attend.redraw_interval = 2

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.head(self.attend(q, k, v).transpose(1, 2).flatten(-2).mean(1))


class Attending(Composition):
    def batch(self, number):
        stream = rng(200 + number)
        return torch.randn(16, 5, 4, generator=stream), torch.randint(0, 3, (16,), generator=stream)


class MemoryAttention(WithMemory, Attending):
    """Random vectors are buffers: the memory holds the linear maps around them."""

    def __init__(self, wrap):
        torch.manual_seed(0)
        super().__init__(Attentive(), wrap)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.memory = self.remember()
        redraw_after_steps(self.model, self.optimizer)

    def step(self, number, parts, shard):
        x, y = (shard(part) for part in self.batch(number))
        self.optimizer.zero_grad()
        for own in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (self.loss(*own) / parts).backward()
        self.optimizer.step()

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "memory": self.memory}


class SamAttention(Attending):
    """Both passes see the same vectors; new ones come between steps."""

    def __init__(self, wrap):
        torch.manual_seed(0)
        super().__init__(Attentive(), wrap)
        self.optimizer = SAM(sgd(self.model), rho=0.1, sync="global")
        redraw_after_steps(self.model, self.optimizer)

    step = SamMemory.step

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer}


class VaccineAttention(Attending, Vaccine):
    def __init__(self, wrap):
        torch.manual_seed(0)
        super().__init__(Attentive(), wrap)
        self.optimizer = sgd(self.model)
        self.vaccine = GradVac(self.optimizer, ["a", "b"], model=self.wrapped, beta=0.3)
        redraw_after_steps(self.model, self.optimizer)

    def stateful(self):
        return {"model": self.model, "optimizer": self.optimizer, "vaccine": self.vaccine}


class Pictures(Composition):
    def batch(self, number):
        stream = rng(300 + number)
        return torch.randn(16, 1, 8, 8, generator=stream), torch.randint(0, 3, (16,), generator=stream)


class PaddingMemory(WithMemory, Pictures):
    """The memory takes the patches that converted convolutions see: of an even image each is even, up to the border."""

    def of_first_task(self, x):
        return x[..., :1, :1].expand_as(x).contiguous()

    def __init__(self, wrap):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        net = padding.convert(net, "symmetric")
        super().__init__(net, wrap)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.memory = self.remember()

    step = MemoryAttention.step
    stateful = MemoryAttention.stateful


ALL = (
    SamMixUp,
    SamInvariance,
    SamMemory,
    MixUpMemory,
    VaccineMemory,
    SamVaccine,
    MemoryAttention,
    SamAttention,
    VaccineAttention,
    PaddingMemory,
)
NO_PARTS = (SamInvariance,)  # the penalty compares means of a batch, so pieces are another loss
# Each process draws its own mixtures, or takes its own first pass: no run of one process is the same.
APART = (SamMixUp, MixUpMemory, SamVaccine)


def in_two(rank: int, count: int) -> dict[str, Any]:
    """Every composition under DistributedDataParallel; with one process the plain run."""
    from torch.nn.parallel import DistributedDataParallel

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if count > 1 else model

    def shard(x: Tensor) -> Tensor:
        return x.chunk(count)[rank]

    return {kind.__name__: kind(wrap).run(range(STEPS), shard=shard) for kind in ALL}
