"""One adapted copy of a policy for each environment, computed together; and the worker that computes a gradient while the policy acts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from outlast.adapt._auxiliary import AuxTask
from outlast.adapt._transitions import Arrived, Rows
from outlast.errors import UnsupportedError

if TYPE_CHECKING:
    from outlast.adapt._policy import PolicyAdapter

Found = tuple[float, Sequence[Tensor | None], float, int]
"""A loss, its gradients, the seconds that they took, and the transitions that they are of."""


class TaskLoss(nn.Module):
    """Encoder and task in one module, for ``torch.func.functional_call``."""

    def __init__(self, encoder: nn.Module, aux: AuxTask) -> None:
        super().__init__()
        self.encoder, self.aux = encoder, aux

    def forward(self, obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        return self.aux.compare(self.encoder, obs, action, next_obs)


class _Acting(nn.Module):
    """Encoder and policy in one module, likewise."""

    def __init__(self, adapter: PolicyAdapter) -> None:
        super().__init__()
        self.encoder, self.policy, self._act_fn = adapter.encoder, adapter.policy, adapter._act_fn

    def forward(self, x: Tensor) -> Tensor:
        out = self.policy(self.encoder(x))
        return out if self._act_fn is None else self._act_fn(out)


@cache
def background() -> ThreadPoolExecutor:
    """The one worker thread of this process; it is started when it is first needed."""
    return ThreadPoolExecutor(1, thread_name_prefix="outlast-adapt")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=background.cache_clear)  # the child has no such thread


def loss_and_grads(task: TaskLoss, weights: dict[str, Tensor], batch: Rows, seconds: float) -> Found:
    """The loss of a batch at given weights, and its gradients; ``seconds`` went into the batch."""
    start = time.perf_counter()
    with torch.enable_grad():
        loss = functional_call(task, weights, batch)
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return float(loss.detach()), grads, seconds + time.perf_counter() - start, len(batch[0])


class Copies:
    """Adapters of single environments whose weights lie in one tensor for each name.

    Each copy counts, remembers, guards and steps for itself, exactly as an adapter of its own would; forward and backward passes
    run for all that learn at once.

    Args:
        make: the copy of an environment.
        n: environments.
    """

    def __init__(self, make: Callable[[int], PolicyAdapter], n: int) -> None:
        self.all = [make(place) for place in range(n)]
        self._unused: set[str] | None = None  # names that the loss does not reach
        self._link()

    def _link(self) -> None:
        """Lay the copies' weights side by side: each parameter becomes a view of its row."""
        first = self.all[0]
        self._stacked = {name: torch.stack([each.adapted[name].detach() for each in self.all]) for name in first.adapted}
        for place, each in enumerate(self.all):
            for name, parameter in each.adapted.items():
                parameter.data = self._stacked[name][place]
        self._acting, self._task = _Acting(first), TaskLoss(first.encoder, first.aux)
        self._of_acting = [name for name in self._stacked if name.startswith("encoder.")]

    def __getstate__(self) -> dict[str, Any]:
        return {"all": self.all, "unused": self._unused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.all, self._unused = state["all"], state["unused"]
        self._link()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the copies as ``nn.Module.to`` does."""
        for each in self.all:
            each._apply(fn)
        self._link()

    def act(self, x: Tensor) -> Tensor:
        """The action of each environment's copy for its observation."""
        weights = {name: self._stacked[name] for name in self._of_acting}

        def one(weights: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(self._acting, weights, (image[None],))[0]

        return self._mapped("policy", one, (0, 0))(weights, self.all[0]._middle(x))

    def observe(self, arrived: Arrived) -> float | None:
        """One update of each copy that learns from its transition; the mean of their last losses."""
        for place, each in enumerate(self.all):  # before anything is counted
            each._episodes.check(arrived.counted[place : place + 1])
        admitted: dict[int, Rows] = {}
        for place, each in enumerate(self.all):
            own = slice(place, place + 1)
            ends, counted = arrived.ends[own], arrived.counted[own]
            if bool(counted.all()):
                rows = each._admitted(Arrived(arrived.before[own], arrived.action[own], arrived.after[own], ends, counted))
                if rows is not None:
                    admitted[place] = rows
        losses: dict[int, float] = {}
        for _ in range(self.all[0]._steps):
            losses |= self._update(admitted)
            admitted = {place: rows for place, rows in admitted.items() if place in losses and not self.all[place]._counters.frozen}
        return sum(losses.values()) / len(losses) if losses else None

    def _update(self, admitted: dict[int, Rows]) -> dict[int, float]:
        if not admitted:
            return {}
        start = time.perf_counter()
        places = list(admitted)
        batches = [self.all[place]._drawn(rows) for place, rows in admitted.items()]
        batch = tuple(torch.stack([each[side] for each in batches]) for side in range(3))
        everywhere = len(places) == len(self.all)
        weights = {name: value if everywhere else value[places] for name, value in self._stacked.items()}

        def loss(weights: dict[str, Tensor], before: Tensor, action: Tensor, after: Tensor) -> Tensor:
            return functional_call(self._task, weights, (before, action, after))

        unused = self._unreached(batches[0], self.all[places[0]])
        grads, values = self._mapped("task", grad_and_value(loss), (0, 0, 0, 0))(weights, *batch)
        share = (time.perf_counter() - start) / len(places)  # of the common pass
        found: dict[int, float] = {}
        for row, (place, value) in enumerate(zip(places, values.tolist(), strict=True)):
            own = self.all[place]
            of_loss = [None if name in unused else grads[name][row] for name in self._stacked]
            stepped = own._stepped(value, own._with_penalty(of_loss), share, batch[0].shape[1])
            if stepped is not None:
                found[place] = stepped
        return found

    def _unreached(self, batch: Rows, adapter: PolicyAdapter) -> set[str]:
        """Names without a gradient, which an optimizer with weight decay must leave alone; vmap would give them zeros."""
        if self._unused is None:
            leaves = {name: value.detach().requires_grad_() for name, value in adapter.adapted.items()}
            _, grads, _, _ = loss_and_grads(self._task, leaves, batch, 0.0)
            self._unused = {name for name, grad in zip(leaves, grads, strict=True) if grad is None}
        return self._unused

    def _mapped(self, what: Literal["policy", "task"], function: Callable[..., Any], dims: tuple[int, ...]) -> Callable[..., Any]:
        mapped = vmap(function, in_dims=dims)

        def call(*args: Any) -> Any:
            try:
                return mapped(*args)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                raise UnsupportedError(f"per_env=True cannot map this {what} over environments (torch.func.vmap): {error}") from error

        return call

    def begin(self, mask: Any) -> None:
        """New episodes: everywhere, or where a mask says so."""
        chosen = torch.ones(len(self.all), dtype=torch.bool) if mask is None else torch.as_tensor(mask, dtype=torch.bool).flatten()
        if len(chosen) != len(self.all):
            raise ValueError(f"mask must have one entry for each of {len(self.all)} environments, got {len(chosen)}")
        for each, begins in zip(self.all, chosen.tolist(), strict=True):
            if begins:
                each.begin_episode()
