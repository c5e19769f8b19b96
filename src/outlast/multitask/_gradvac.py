"""Gradient vaccine: many tasks in one model, each pair of gradients kept as aligned as it usually is.

Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively Multilingual
Models", ICLR 2021 (arXiv 2010.05874). There is no official code. PCGrad (Yu et al., NeurIPS 2020) is the case of target 0.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from outlast._core import _checks, _distributed
from outlast._core._calls import eager
from outlast._core._foreach import is_sharded, local
from outlast._core._once import Once
from outlast.errors import OutlastWarning, StateError
from outlast.multitask import _vectors
from outlast.multitask._coefficients import check_max_target, draw_order, gradvac_coefficients
from outlast.multitask._groups import Group, Groups, known_names, named, partition
from outlast.multitask._report import GradVacReport
from outlast.multitask._rows import Contribution, Dense, Labelling, Labels, Session, dense, merged

Losses = Mapping[Hashable, Tensor]
Grads = list[Tensor | None]
_LARGEST = 1e6  # of an effective weight
_HOLD = 1 << 22  # entries of contributions that wait for their groups to be decided together


@dataclass
class _GroupOutcome:
    """What one group's gradients led to."""

    group: int
    weights: Tensor  # (T,): column sums, without static weights
    phi: Tensor
    target: Tensor
    acted: Tensor
    new: Tensor
    ratio: float
    factor: float


@dataclass
class _Step:
    """One combination of gradients under way."""

    tasks: list[Hashable]
    numbers: list[int]
    outcomes: list[_GroupOutcome]
    order: Tensor | None = None  # drawn when the first group is decided
    finite: bool = True


@dataclass
class _Pending:
    """One group of a labelled pass before it is decided."""

    group: int
    uses: dict[int, Contribution]
    gram: Tensor | None  # None where nothing of the group takes part
    debiased: Tensor | None

    @property
    def size(self) -> int:
        return sum(own.size for own in self.uses.values())


class GradVac:
    """Combines the gradients of several losses into ``.grad``, for any optimizer.

    Wang, Tsvetkov, Firat, Cao, "Gradient Vaccine", ICLR 2021, algorithm 1.

    ```python
    vaccine = GradVac(optimizer, tasks=["de", "fr", "tr"])
    optimizer.zero_grad()
    vaccine.backward({"de": loss_de, "fr": loss_fr, "tr": loss_tr})
    optimizer.step()
    ```

    Where the cosine of two tasks' gradients falls below its target, just enough of the other gradient is added to reach it.
    The target is a moving average of that cosine for each ordered pair and each group of parameters, or a fixed number.
    Vaccinating a task up-weights the others: compare with static weights equal to ``report.effective_weights``.

    With one batch made of all tasks' rows, ``rows`` costs one forward and one backward pass in place of T:

    ```python
    with vaccine.rows(ids):  # task number of each row
        loss = loss_fn(model(inputs), labels)
    loss.backward()
    ```

    Under DistributedDataParallel give ``model``: its own reduction is switched off, and each task's gradient is averaged over
    the processes before any cosine is taken (averaged local cosines are another thing). Sharded models (FSDP2) work with a
    loss for each task; every process must have every task then.

    Args:
        optimizer: whose parameters are trained.
        tasks: names of the tasks; None lets them come as they are met. Each may be absent from any batch.
        model: gives parameters their names and layers, and is needed for DistributedDataParallel.
        groups: parameters that share a cosine: ``"layer"`` (what one module owns; told by the order of parameters where
            neither the model nor the optimizer knows names), ``"model"``, ``"tensor"``, a mapping from names to parameters
            (others form the group ``rest``), or a function of the parameter's name.
        shared: parameters that take part; others get the plain sum. ``"auto"``: those to which two tasks give a gradient.
        beta: rate of the moving average.
        target: None for adaptive targets; a number, or numbers by ``(task_i, task_j)`` (others adaptive), for fixed ones.
        vaccinate: tasks whose gradients may be altered; None means all.
        floor: lower bound of targets.
        max_target: cap of targets, below 1.
        reduction: ``"sum"`` of the tasks' gradients, or their ``"mean"``.
        rescale: ``"preserve"`` gives each group's gradient the norm of the plain sum.
        weights: static weights of the losses; tasks that are not named have 1.
        engine: what ``rows`` does where a weight's use has no rows (parameters added to activations, ...): ``"layer"``
            raises; ``"auto"`` takes a backward pass for each loss given to ``backward``; ``"loop"`` always does.
        debias: take the noise's share out of the norms of the cosine that feeds the moving average: each task's rows are
            split in two. Losses must then be one value a row.
        generator: of the order in which pairs are visited; None for one of its own, seeded with 0.

    Raises:
        ValueError: a number out of range, an unknown task, parameters that do not belong together.
        TypeError: no optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tasks: Sequence[Hashable] | None = None,
        *,
        model: nn.Module | None = None,
        groups: Groups = "layer",
        shared: Iterable[nn.Parameter] | Literal["auto"] = "auto",
        beta: float = 0.01,
        target: float | Mapping[tuple[Hashable, Hashable], float] | None = None,
        vaccinate: Collection[Hashable] | None = None,
        floor: float | None = None,
        max_target: float = 0.99,
        reduction: Literal["sum", "mean"] = "sum",
        rescale: Literal["none", "preserve"] = "none",
        weights: Mapping[Hashable, float] | None = None,
        engine: Literal["auto", "loop", "layer"] = "auto",
        debias: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._beta = _checks.real("beta", beta, low=0.0, high=1.0)
        self._max_target = check_max_target(max_target)
        self._floor = None if floor is None else _checks.real("floor", floor, low=-1.0, high=1.0)
        self._mean = _checks.choice("reduction", reduction, ("sum", "mean")) == "mean"
        self._preserve = _checks.choice("rescale", rescale, ("none", "preserve")) == "preserve"
        self._engine = _checks.choice("engine", engine, ("auto", "loop", "layer"))
        self._debias = bool(debias)
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._fixed_tasks = tasks is not None
        self._tasks: list[Hashable] = list(tasks) if tasks is not None else []
        if len(set(self._tasks)) != len(self._tasks):
            raise ValueError(f"tasks holds a name twice: {self._tasks}")
        if tasks is not None and not self._tasks:
            raise ValueError("tasks is empty; leave it out to let tasks come as they are met")
        self._optimizer = inner
        self._model = None if model is None else _distributed.unwrapped(model)
        self._grouping: Groups = groups
        self._parameters: list[nn.Parameter] = []
        self._groups: list[Group] = []
        self._targets = torch.zeros(0, len(self._tasks), len(self._tasks), dtype=torch.float64)
        self._buffers: dict[Hashable, Grads] = {}
        self._session: weakref.ref[Session] | None = None  # the latest labelled pass
        self._shared: frozenset[int] | None = None
        self._shared_parameters: list[nn.Parameter] | None = None
        self._refresh()
        if isinstance(shared, str):
            _checks.choice("shared", shared, ("auto",))
        else:
            self._shared_parameters = list(shared)
            self._shared = self._numbers_of(self._shared_parameters)
        self._vaccinate = None if vaccinate is None else frozenset(self._known("vaccinate", vaccinate))
        self._weights = {name: _checks.real(f"weight of task {name!r}", value) for name, value in (weights or {}).items()}
        self._known("weights", self._weights)
        self._fixed, self._fixed_pairs = self._fixed_targets(target)
        self._labels_rows = False  # whether rows() was ever used
        self._once = Once(4)
        self.last: GradVacReport | None = None  # report of the last combination, also of combine() and rows()
        for module in [] if model is None else model.modules():
            if type(module).__name__ == "DistributedDataParallel":
                # Its reducer would wait for gradients that never come, and would average before any cosine is taken.
                module.__dict__["require_backward_grad_sync"] = False

    def _refresh(self) -> None:
        """Take up the optimizer's parameters; groups that are new start with targets 0."""
        present = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._let_go()
        if list(map(id, present)) == list(map(id, self._parameters)):
            return
        for number, parameter in enumerate(present):
            if parameter.is_complex():
                raise TypeError(f"parameter {number} is complex: the cosine of complex gradients is not defined here")
        names = known_names(self._model, self._optimizer.param_groups)
        before = {group.name: number for number, group in enumerate(self._groups)}
        before_parameters = self._parameters
        self._parameters = present
        self._names = named(present, names)
        known = all(id(parameter) in names for parameter in present)
        self._groups = partition(present, self._names, self._grouping, known=known)
        self._group_of = {number: index for index, group in enumerate(self._groups) for number in group.members}
        targets = torch.zeros(len(self._groups), *self._targets.shape[1:], dtype=torch.float64)
        for number, group in enumerate(self._groups):
            if group.name in before:
                targets[number] = self._targets[before[group.name]]
        self._targets = targets
        old = {id(parameter): number for number, parameter in enumerate(before_parameters)}
        self._buffers = {task: [grads[old[id(p)]] if id(p) in old else None for p in present] for task, grads in self._buffers.items()}
        if self._shared_parameters is not None:
            place = {id(parameter): number for number, parameter in enumerate(present)}
            self._shared = frozenset(place[id(p)] for p in self._shared_parameters if id(p) in place)

    def _let_go(self) -> None:
        """Take off what a backward pass that failed has left on the parameters."""
        session = None if self._session is None else self._session()
        if session is not None:
            session.let_go()

    # ---- names ---------------------------------------------------------------------------------------------------------

    def _numbers_of(self, parameters: Iterable[nn.Parameter]) -> frozenset[int]:
        place = {id(parameter): number for number, parameter in enumerate(self._parameters)}
        given = list(parameters)
        if any(id(parameter) not in place for parameter in given):
            raise ValueError("shared holds parameters that the optimizer does not have")
        return frozenset(place[id(parameter)] for parameter in given)

    def _known(self, argument: str, names: Iterable[Hashable]) -> list[Hashable]:
        found = list(names)
        unknown = [name for name in found if name not in self._tasks]
        if self._fixed_tasks and unknown:
            raise ValueError(
                f"{argument} names {', '.join(map(repr, unknown))}, which is no task; the tasks are {', '.join(map(repr, self._tasks))}"
            )
        return found

    def _fixed_targets(
        self, target: float | Mapping[tuple[Hashable, Hashable], float] | None
    ) -> tuple[float | None, dict[tuple[Hashable, Hashable], float]]:
        """The target of all pairs, and those of some."""
        if target is None:
            return None, {}
        if isinstance(target, Mapping):
            for pair in target:
                if not (isinstance(pair, tuple) and len(pair) == 2):
                    raise ValueError(f"target is a mapping from pairs of tasks to numbers, got the key {pair!r}")
                self._known("target", pair)
            return None, {pair: self._check_target(value) for pair, value in target.items()}
        return self._check_target(target), {}

    def _check_target(self, value: float) -> float:
        number = _checks.real("target", value, low=-1.0, high=1.0, low_open=True)
        if number > self._max_target:
            warnings.warn(f"target {number:g} is above max_target and is capped at {self._max_target:g}", OutlastWarning, stacklevel=4)
        return min(number, self._max_target)

    def _numbers(self, names: Iterable[Hashable]) -> list[int]:
        """Numbers of tasks; makes room for new names."""
        for name in names:
            if name not in self._tasks:
                if self._fixed_tasks:
                    raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(map(repr, self._tasks))}")
                self._tasks.append(name)
        count = len(self._tasks)
        if self._targets.shape[1] < count:
            larger = torch.zeros(len(self._groups), count, count, dtype=torch.float64)
            old = self._targets.shape[1]
            larger[:, :old, :old] = self._targets
            self._targets = larger
        return [self._tasks.index(name) for name in names]

    # ---- what users call -----------------------------------------------------------------------------------------------

    def backward(self, losses: Losses, *, counts: Mapping[Hashable, int] | None = None, final: bool = True) -> GradVacReport | None:
        """Add the combined gradient to ``.grad``, as ``backward()`` of a plain sum would.

        Args:
            losses: a scalar for each task present (with ``debias`` one value a row).
            counts: rows behind each loss, which weight the processes of a distributed run; None counts each the same.
            final: False only adds to the tasks' own gradient buffers; the next call with True combines all of them
                (gradient accumulation, exact).

        Returns:
            The report; None with ``final=False``.

        Raises:
            ValueError: no losses, an unknown task, a loss that is no scalar or has no graph to the parameters.
        """
        self._refresh()
        session = self._session_of(losses)
        self._check_losses(losses, labelled=session is not None and session.failed is None)
        if self._debias and (not final or self._buffers):
            raise ValueError("debias=True needs both halves of a task's rows in one call; final=False is not supported with it")
        if session is not None and session.failed is None:
            if not final:
                raise ValueError("final=False keeps a gradient for each task, which rows() never forms; use a forward pass without rows()")
            _one_pass(losses, None)
            return self.last
        if session is not None:
            session.looped = True
        return self._loop(losses, None, counts, final=final)

    def combine(self, losses: Losses, *, counts: Mapping[Hashable, int] | None = None) -> Tensor:
        """A scalar whose ``backward()`` does what ``backward`` does: for Lightning, Fabric and transformers' Trainer.

        Its value is the (weighted) sum of the losses. The factor that comes in (loss scaling, division by accumulation
        steps) reaches every gradient. With gradient accumulation each micro-batch is combined by itself.

        Raises:
            ValueError: as ``backward``.
        """
        if not torch.is_grad_enabled():  # an evaluation
            return self._total(losses)
        self._refresh()
        session = self._session_of(losses)
        self._check_losses(losses, labelled=session is not None and session.failed is None)
        value = self._total(losses).detach()
        handle = torch.zeros((), device=value.device, requires_grad=True)
        combined: Any = _Combine.apply(handle, value, self, dict(losses), counts)
        return combined

    @contextmanager
    def rows(self, ids: Tensor) -> Generator[None]:
        """Around a forward pass on one batch of all tasks' rows; the backward pass that follows keeps the tasks apart.

        A task's gradient is that of its rows' share in the loss. Every weight must be used by a linear map, a convolution,
        an embedding or a normalisation whose input has the labelled rows in front; batch normalisation in training mode,
        activation checkpointing and hooks on gradients are refused. An input with N rows by chance (N positions) counts as
        labelled. The backward pass writes ``.grad`` whoever asks for it, ``torch.autograd.grad`` of an input included.

        Args:
            ids: for each row the task's number in ``tasks``, int ``(N,)``.

        Raises:
            ValueError: no tasks were named, ids out of range, or with ``engine="layer"`` a weight that is used otherwise.
        """
        if self._engine == "loop":
            raise ValueError("engine='loop' takes a loss for each task; rows() needs engine='auto' or 'layer'")
        if not self._tasks:
            raise ValueError("rows() needs the tasks' names: GradVac(optimizer, tasks=[...])")
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or len(ids) == 0:
            raise ValueError(f"ids must be a vector of task numbers, one for each row, got {ids.dtype} of shape {tuple(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= len(self._tasks):
            raise ValueError(f"ids must lie in [0, {len(self._tasks) - 1}], got {int(ids.min())} to {int(ids.max())}")
        self._refresh()
        session = self._labelled(ids.long())
        self._labels_rows = True
        self._session = weakref.ref(session)
        with eager(), Labelling(session):
            yield
        if session.failed is not None:
            self._once.warn(f"rows() cannot keep the tasks apart: {session.failed}. Give backward() a loss for each task")

    def state_dict(self) -> dict[str, Any]:
        """Targets by task name and group, and the generator: tensors and plain values only."""
        return {
            "tasks": list(self._tasks),
            "groups": [group.name for group in self._groups],
            "targets": self._targets.clone(),
            "generator": self._generator.get_state(),
            "buffers": {task: [None if g is None else g.clone() for g in grads] for task, grads in self._buffers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state; tasks that this vaccine does not know are added, those that the state lacks keep their targets.

        Raises:
            ValueError: other groups, or unknown tasks where ``tasks`` was given.
        """
        missing = [name for name in ("tasks", "groups", "targets", "generator", "buffers") if name not in state]
        if missing:
            raise ValueError(f"this is no state of a GradVac: it lacks {', '.join(missing)}")
        own = [group.name for group in self._groups]
        if list(state["groups"]) != own:
            differing = sorted({*state["groups"]} ^ {*own}) or ["their order"]
            raise ValueError(
                f"the state has other groups of parameters ({len(state['groups'])}, here {len(own)}): {', '.join(differing[:6])}"
            )
        names: list[Hashable] = list(state["tasks"])
        numbers = torch.tensor(self._numbers(names), dtype=torch.int64)
        self._targets[:, numbers[:, None], numbers[None, :]] = state["targets"].to(torch.float64)
        self._generator.set_state(state["generator"])
        self._buffers = {task: [None if g is None else g.clone() for g in grads] for task, grads in state["buffers"].items()}

    @property
    def tasks(self) -> tuple[Hashable, ...]:
        """Names of the tasks known so far."""
        return tuple(self._tasks)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Names of the parameters in each group."""
        return {group.name: [self._names[number] for number in group.members] for group in self._groups}

    @property
    def targets(self) -> dict[str, dict[tuple[Hashable, Hashable], float]]:
        """Present targets by group and ordered pair of tasks."""
        goal = self._goal(list(range(len(self._tasks))), range(len(self._groups)))
        pairs = [(i, j) for i in range(len(self._tasks)) for j in range(len(self._tasks)) if i != j]
        return {
            group.name: {(self._tasks[i], self._tasks[j]): float(goal[k, i, j]) for i, j in pairs} for k, group in enumerate(self._groups)
        }

    def reset(self, tasks: Collection[Hashable] | None = None) -> None:
        """Set the adaptive targets of all pairs, or of all pairs with these tasks, back to 0, and drop these tasks' gradient buffers."""
        numbers = list(range(len(self._tasks))) if tasks is None else [self._tasks.index(name) for name in self._check_tasks(tasks)]
        self._targets[:, numbers, :] = 0.0
        self._targets[:, :, numbers] = 0.0
        for number in numbers:
            self._buffers.pop(self._tasks[number], None)

    def _check_tasks(self, tasks: Collection[Hashable]) -> list[Hashable]:
        unknown = [name for name in tasks if name not in self._tasks]
        if unknown:
            raise ValueError(f"unknown task {unknown[0]!r}; the tasks are {', '.join(map(repr, self._tasks))}")
        return list(tasks)

    def __repr__(self) -> str:
        kind = "fixed" if self._fixed is not None else ("partly fixed" if self._fixed_pairs else "adaptive")
        return f"GradVac({len(self._tasks)} tasks, {len(self._groups)} groups of {len(self._parameters)} parameters, {kind} targets)"

    # ---- checks --------------------------------------------------------------------------------------------------------

    def _session_of(self, losses: Losses) -> Session | None:
        """The labelled forward pass that losses come from, if any: found among the nodes of their graphs."""
        if not self._labels_rows or not isinstance(losses, Mapping):
            return None
        found = {task: _find_session(loss) for task, loss in losses.items() if isinstance(loss, Tensor)}
        sessions = {id(session): session for session in found.values()}
        if len(sessions) > 1:
            plain = ", ".join(repr(task) for task, session in found.items() if session is None)
            raise ValueError(f"losses come from different forward passes; without rows(): {plain or 'none'}")
        session = next(iter(sessions.values()), None)
        if session is not None and session.failed is None and frozenset(losses) != session.tasks:
            raise ValueError(f"the losses are of {sorted(map(repr, losses))}, the labelled rows of {sorted(map(repr, session.tasks))}")
        return session

    def _check_losses(self, losses: Losses, *, labelled: bool) -> None:
        if not isinstance(losses, Mapping) or not losses:
            raise ValueError("losses must be a mapping from tasks to losses that holds at least one")
        for task, loss in losses.items():
            if self._fixed_tasks and task not in self._tasks:
                raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(map(repr, self._tasks))}")
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss of task {task!r} is a {type(loss).__name__}, not a tensor")
            wanted = 1 if self._debias and not labelled else 0
            if loss.ndim != wanted:
                form = "one value for each row (debias=True)" if wanted else "a scalar"
                raise ValueError(f"the loss of task {task!r} must be {form}, got shape {tuple(loss.shape)}")
            if wanted and (loss.ndim != 1 or len(loss) < 2):
                raise ValueError(
                    f"debias=True splits each task's rows in two: the loss of task {task!r} must hold one value for each of at least 2 rows"
                )
            if loss.grad_fn is None and not loss.requires_grad:
                raise ValueError(f"the loss of task {task!r} has no graph: it does not depend on anything that requires a gradient")

    def _weight(self, task: Hashable) -> float:
        return self._weights.get(task, 1.0)

    def _total(self, losses: Losses) -> Tensor:
        total = torch.stack([self._weight(task) * loss.mean() for task, loss in losses.items()]).sum()
        return total / len(losses) if self._mean else total

    # ---- the loop engine -----------------------------------------------------------------------------------------------

    def _loop(self, losses: Losses, factor: Tensor | None, counts: Mapping[Hashable, int] | None, *, final: bool) -> GradVacReport | None:
        wholes, halves = self._task_gradients(losses, factor)
        if all(grad is None for grads in wholes.values() for grad in grads):
            raise ValueError("no loss depends on a parameter of the optimizer")
        wholes, halves = self._across_processes(wholes, halves, counts)
        for task, kept in self._buffers.items():
            if task in wholes:
                wholes[task] = _added([kept, wholes[task]], [1.0, 1.0])
            else:
                wholes[task] = kept
        if not final:
            self._buffers = wholes
            return None
        self._buffers = {}
        self.last = self._combine(wholes, halves)
        return self.last

    def _task_gradients(self, losses: Losses, factor: Tensor | None) -> tuple[dict[Hashable, Grads], dict[Hashable, tuple[Grads, Grads]]]:
        trained = [p for p in self._parameters if p.requires_grad]
        sharded = any(map(is_sharded, trained))
        pieces: list[tuple[Hashable, float, Tensor]] = []  # task, share of its rows, loss
        for task, loss in losses.items():
            if self._debias:
                half = len(loss) // 2
                pieces += [(task, half / len(loss), loss[:half].mean()), (task, 1 - half / len(loss), loss[half:].mean())]
            else:
                pieces.append((task, 1.0, loss))
        found: dict[Hashable, list[Grads]] = {}
        before = [(p, p.grad) for p in trained] if sharded else []
        keeps = _shared_later([loss for _, _, loss in pieces])
        for (task, _, loss), keep in zip(pieces, keeps, strict=True):
            scale = None if factor is None else factor.to(loss.dtype)
            if sharded:
                grads = self._sharded_gradient(trained, loss, scale, keep=keep)
            else:
                grads = list(torch.autograd.grad(loss, trained, scale, retain_graph=keep, allow_unused=True))
            by_id = dict(zip(map(id, trained), grads, strict=True))
            dense_grads = [g.to_dense() if g is not None and g.is_sparse else g for g in (by_id.get(id(p)) for p in self._parameters)]
            found.setdefault(task, []).append(dense_grads)
        for parameter, grad in before:
            parameter.grad = grad
        shares: dict[Hashable, list[float]] = {}
        for task, share, _ in pieces:
            shares.setdefault(task, []).append(share)
        wholes = {task: parts[0] if len(parts) == 1 else _added(parts, shares[task]) for task, parts in found.items()}
        halves = {task: (parts[0], parts[1]) for task, parts in found.items() if len(parts) == 2}
        return wholes, halves

    def _sharded_gradient(self, trained: list[nn.Parameter], loss: Tensor, factor: Tensor | None, *, keep: bool) -> Grads:
        # FSDP2 reduces gradients in hooks of backward(); autograd.grad would give those of unsharded copies.
        for parameter in trained:
            parameter.grad = None
        loss.backward(factor, retain_graph=keep)
        grads: Grads = [None if p.grad is None else local(p.grad) for p in trained]
        for parameter in trained:
            parameter.grad = None
        return grads

    def _across_processes(
        self, wholes: dict[Hashable, Grads], halves: dict[Hashable, tuple[Grads, Grads]], counts: Mapping[Hashable, int] | None
    ) -> tuple[dict[Hashable, Grads], dict[Hashable, tuple[Grads, Grads]]]:
        """Each task's gradient averaged over the processes that have it, weighted by their rows."""
        if _distributed.world_size() == 1:
            return wholes, halves
        mine = {task: (1 if counts is None else counts[task], [g is not None for g in grads]) for task, grads in wholes.items()}
        everyone: list[dict[Hashable, tuple[int, list[bool]]]] = _distributed.gather(mine)
        tasks = list(dict.fromkeys(task for present in everyone for task in present))
        tasks.sort(key=lambda task: self._tasks.index(task) if task in self._tasks else len(self._tasks))
        if any(map(is_sharded, self._parameters)):
            if any(set(present) != set(tasks) for present in everyone):
                raise ValueError("with sharded parameters every process must have every task of a step")
            return {task: wholes[task] for task in tasks}, halves
        averaged: dict[Hashable, Grads] = {}
        averaged_halves: dict[Hashable, tuple[Grads, Grads]] = {}
        for task in tasks:
            total = sum(present[task][0] for present in everyone if task in present)
            share = mine[task][0] / total if task in mine else 0.0
            used = [any(task in present and present[task][1][n] for present in everyone) for n in range(len(self._parameters))]
            averaged[task] = self._average(wholes.get(task), share, used)
            if self._debias:
                own = halves.get(task, (None, None))
                averaged_halves[task] = (self._average(own[0], share, used), self._average(own[1], share, used))
        return averaged, averaged_halves

    def _average(self, grads: Grads | None, share: float, used: list[bool]) -> Grads:
        parts: list[Tensor] = []
        for number, parameter in enumerate(self._parameters):
            if used[number]:
                grad = None if grads is None else grads[number]
                parts.append(torch.zeros_like(parameter).reshape(-1) if grad is None else grad.reshape(-1) * share)
        if not parts:
            return [None] * len(self._parameters)
        flat = _distributed.sum_(torch.cat(parts))
        pieces = iter(flat.split([part.numel() for part in parts]))
        return [next(pieces).view_as(parameter) if used[number] else None for number, parameter in enumerate(self._parameters)]

    def _combine(self, grads: dict[Hashable, Grads], halves: dict[Hashable, tuple[Grads, Grads]]) -> GradVacReport:
        step = self._begin(list(grads))
        takes_part = self._taking_part(grads)
        active = [k for k, group in enumerate(self._groups) if any(n in takes_part for n in group.members)]
        count = len(step.tasks)
        if not active and count > 1:
            self._once.warn("no parameter is shared by two tasks, so there is nothing to vaccinate: the plain sum is used")
        members = {k: [n for n in self._groups[k].members if n in takes_part] for k in active}
        rows = {n: _flat([grads[task][n] for task in step.tasks]) for k in active for n in members[k]}
        grams = [
            sum((_vectors.gram(rows[n]) / self._replicas(n) for n in members[k]), torch.zeros(count, count, dtype=torch.float64))
            for k in active
        ]
        debiased: Tensor | None = None
        if self._debias and active:
            debiased = torch.stack([torch.stack([self._clean_square(halves[task], members[k]) for task in step.tasks]) for k in active])
        if active:
            stacked = torch.stack(grams)
            if any(map(is_sharded, self._parameters)):
                stacked = _distributed.sum_(stacked)
                debiased = None if debiased is None else _distributed.sum_(debiased)
            if bool(torch.isfinite(stacked).all()):
                self._decide(step, active, stacked, debiased)
            else:
                step.finite = False  # the plain sum everywhere
        static = torch.tensor([self._weight(task) for task in step.tasks], dtype=torch.float64)
        if self._mean:
            static = static / count
        weights = {outcome.group: outcome.weights * outcome.factor * static for outcome in step.outcomes}
        for number, parameter in enumerate(self._parameters):
            if number in rows and self._group_of[number] in weights:
                self._write(parameter, _vectors.combined(rows[number], weights[self._group_of[number]]).view_as(local(parameter)))
            else:
                present = [(float(w), grads[task][number]) for w, task in zip(static, step.tasks, strict=True)]
                plain = [g if w == 1.0 else g * w for w, g in present if g is not None]
                if plain:
                    whole_sum = plain[0].clone(memory_format=torch.contiguous_format) if len(plain) == 1 else torch.stack(plain).sum(0)
                    self._write(parameter, whole_sum)
        return self._end(step, static)

    def _taking_part(self, grads: dict[Hashable, Grads]) -> set[int]:
        """Parameters that two tasks give a gradient to (of those in ``shared``)."""
        numbers = range(len(self._parameters)) if self._shared is None else self._shared
        return {n for n in numbers if sum(own[n] is not None for own in grads.values()) >= 2}

    def _replicas(self, number: int) -> int:
        """How many processes hold the same part of a sharded parameter."""
        parameter: Any = self._parameters[number]
        count = 1
        for axis, placement in enumerate(getattr(parameter, "placements", ())):
            if placement.is_replicate():
                count *= parameter.device_mesh.size(axis)
        return count

    def _clean_square(self, halves: tuple[Grads, Grads], members: list[int]) -> Tensor:
        """Squared norm without the noise's share: the halves' rows are different, so their noises are independent."""
        parts = [
            _vectors.dot(a, b) / self._replicas(n)
            for n, a, b in ((n, halves[0][n], halves[1][n]) for n in members)
            if a is not None and b is not None
        ]
        return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)

    def _write(self, parameter: nn.Parameter, value: Tensor) -> None:
        value = value.to(parameter.dtype)
        if is_sharded(parameter):
            from torch.distributed.tensor import DTensor

            sharded: Any = parameter
            value = DTensor.from_local(
                value, sharded.device_mesh, sharded.placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
            )
        if parameter.grad is None:
            parameter.grad = value
        else:
            parameter.grad.add_(value)

    # ---- deciding ------------------------------------------------------------------------------------------------------

    def _begin(self, tasks: list[Hashable]) -> _Step:
        numbers = self._numbers(tasks)
        known = sorted(range(len(tasks)), key=lambda place: numbers[place])  # the mapping's own order must not matter
        tasks, numbers = [tasks[place] for place in known], [numbers[place] for place in known]
        return _Step(tasks, numbers, [])

    def _goal(self, numbers: list[int], groups: Sequence[int]) -> Tensor:
        """Targets of the tasks of a step in some groups, fixed ones in their places, ``(K, T, T)``."""
        index = torch.tensor(numbers, dtype=torch.int64)
        goal = self._targets[torch.tensor(groups)[:, None, None], index[:, None], index[None, :]]
        if self._fixed is not None:
            return torch.full_like(goal, self._fixed)
        if self._fixed_pairs:
            for i, a in enumerate(numbers):
                for j, b in enumerate(numbers):
                    goal[:, i, j] = self._fixed_pairs.get((self._tasks[a], self._tasks[b]), goal[:, i, j])
        return goal

    def _decide(self, step: _Step, active: list[int], grams: Tensor, debiased: Tensor | None) -> None:
        """Coefficients of some groups from their Gram matrices; nothing where those are not finite."""
        finite = torch.isfinite(grams).all((1, 2))
        if not bool(finite.all()):
            step.finite = False
            active = [k for k, fine in zip(active, finite.tolist(), strict=True) if fine]
            grams = grams[finite]
            debiased = None if debiased is None else debiased[finite]
        count = len(step.tasks)
        if not active or count < 2:
            if count == 1:
                step.outcomes += [_alone(k) for k in active]
            return
        static = torch.tensor([self._weight(task) for task in step.tasks], dtype=torch.float64)
        if step.order is None:  # for all groups at once: in whatever order they come, each gets the same
            step.order = draw_order(len(self._groups), count, self._generator)
        goal = self._goal(step.numbers, active)
        allowed = torch.tensor([self._vaccinate is None or task in self._vaccinate for task in step.tasks])
        scaled = grams * static[:, None] * static[None, :]
        c, new, phi = gradvac_coefficients(
            scaled,
            goal,
            beta=self._beta,
            vaccinate=allowed,
            order=step.order[active],
            max_target=self._max_target,
            floor=self._floor,
            debiased=None if debiased is None else debiased * static.square(),
        )
        weights = c.sum(1)
        if not bool(torch.isfinite(weights).all() and (weights.abs() < _LARGEST).all()):
            self._once.warn(
                "the vaccine's combination grew beyond all bounds (high targets for many tasks that oppose each other) and is left out; "
                "lower target or max_target"
            )
            step.finite = False
            return
        plain = scaled.sum((1, 2)).clamp(min=0.0).sqrt()
        own = torch.einsum("ki,kij,kj->k", weights, scaled, weights).clamp(min=0.0).sqrt()
        ratio = torch.where(plain > 0, own / plain.clamp(min=1e-300), 1.0)
        eye = torch.eye(count, dtype=torch.bool)
        for place, k in enumerate(active):
            change = float(1.0 / ratio[place]) if self._preserve and ratio[place] > 0 else 1.0
            acted = (c[place] != 0.0) & ~eye
            step.outcomes.append(
                _GroupOutcome(k, weights[place], phi[place], goal[place], acted, new[place], float(ratio[place]) * change, change)
            )

    def _end(self, step: _Step, static: Tensor) -> GradVacReport:
        """Keep the new targets and make the report."""
        outcomes = sorted(step.outcomes, key=lambda outcome: outcome.group)
        count = len(step.tasks)
        if step.finite and count > 1 and self._fixed is None and outcomes:
            index = torch.tensor(step.numbers)
            groups = torch.tensor([outcome.group for outcome in outcomes])
            new = torch.stack([outcome.new for outcome in outcomes])
            free = torch.tensor([[a != b and (a, b) not in self._fixed_pairs for b in step.tasks] for a in step.tasks])
            place = (groups[:, None, None], index[:, None], index[None, :])
            self._targets[place] = torch.where(free, new, self._targets[place])
        if not step.finite:
            outcomes = []
        shape = (0, count, count)
        stack = lambda values, empty: torch.stack(values) if values else empty  # noqa: E731
        return GradVacReport(
            tasks=tuple(step.tasks),
            groups=tuple(self._groups[outcome.group].name for outcome in outcomes),
            cosine=stack([o.phi for o in outcomes], torch.zeros(shape, dtype=torch.float64)),
            target=stack([o.target for o in outcomes], torch.zeros(shape, dtype=torch.float64)),
            acted=stack([o.acted for o in outcomes], torch.zeros(shape, dtype=torch.bool)),
            effective_weights=stack([o.weights * o.factor * static for o in outcomes], torch.zeros(0, count, dtype=torch.float64)),
            norm_ratio=torch.tensor([o.ratio for o in outcomes], dtype=torch.float64),
            finite=step.finite,
        )

    # ---- the layer engine ----------------------------------------------------------------------------------------------

    def _labelled(self, ids: Tensor) -> Session:
        present = sorted({number for own in _distributed.gather(ids.unique().tolist()) for number in own})
        step = self._begin([self._tasks[number] for number in present])
        place = torch.zeros(len(self._tasks), dtype=torch.int64, device=ids.device)
        place[torch.tensor(step.numbers, device=ids.device)] = torch.arange(len(step.numbers), device=ids.device)
        labels = place[ids]
        count = len(step.numbers)
        if self._debias:
            labels, count = _halved(labels, count), 2 * count
        tracked = {n: p for n, p in enumerate(self._parameters) if p.requires_grad}
        static = torch.tensor([self._weight(task) for task in step.tasks], dtype=torch.float64)
        if self._mean:
            static = static / len(step.tasks)
        # What takes no part in the vaccine may as well go the ordinary way, if that is the same.
        ordinary = bool((static == 1.0).all()) and _distributed.world_size() == 1 and self._shared is not None
        optional = frozenset(tracked) - (self._shared or frozenset(tracked)) if ordinary else frozenset[int]()
        pending: list[_Pending] = []

        def ready(session: Session, group: int, parts: dict[int, list[Contribution]]) -> None:
            pending.append(self._taken(session, step, group, parts))
            if sum(own.size for own in pending) > _HOLD:
                self._decide_pending(step, pending, static)

        def done(_session: Session) -> None:
            self._decide_pending(step, pending, static)
            self.last = self._end(step, static)

        strict = self._engine == "layer"
        session = Session(Labels(labels, count), tracked, self._names, self._group_of, ready, done, strict=strict, optional=optional)
        session.tasks = frozenset(step.tasks)
        if any(map(is_sharded, self._parameters)):
            session.fail("sharded parameters take a loss for each task")
        return session

    def _taken(self, session: Session, step: _Step, group: int, parts: dict[int, list[Contribution]]) -> _Pending:
        """One group's contributions with their Gram matrix."""
        uses = {number: own[0] if len(own) == 1 else merged(own) for number, own in parts.items()}
        if _distributed.world_size() > 1:
            uses = {number: _averaged(own) for number, own in uses.items()}
        grams = [own.gram() for number, own in uses.items() if self._shared is None or number in self._shared]
        if not grams:
            return _Pending(group, uses, None, None)
        gram = torch.stack(grams).sum(0)
        if not self._debias:
            return _Pending(group, uses, gram, None)
        count = len(step.tasks)
        split = gram.view(count, 2, count, 2)
        sizes = _distributed.sum_(torch.tensor(session.labels.sizes, dtype=torch.float64)).view(count, 2)
        shares = sizes / sizes.sum(1, keepdim=True)
        return _Pending(group, uses, split.sum((1, 3)), split[:, 0, :, 1].diagonal() / shares.prod(1).clamp(min=1e-3))

    def _decide_pending(self, step: _Step, pending: list[_Pending], static: Tensor) -> None:
        """Vaccinate the groups that wait, write their gradients and let go of them."""
        deciding = [own for own in pending if own.gram is not None]
        if deciding:
            debiased = torch.stack([own.debiased for own in deciding if own.debiased is not None]) if self._debias else None
            self._decide(
                step, [own.group for own in deciding], torch.stack([own.gram for own in deciding if own.gram is not None]), debiased
            )
        outcomes = {outcome.group: outcome for outcome in step.outcomes}
        for own in pending:
            for number, part in own.uses.items():
                weights = static
                if own.group in outcomes and (self._shared is None or number in self._shared):
                    weights = outcomes[own.group].weights * outcomes[own.group].factor * static
                weights = weights.repeat_interleave(2) if self._debias else weights
                parameter = self._parameters[number]
                self._write(parameter, part.combine(weights).view_as(parameter))
        pending.clear()


class _Combine(torch.autograd.Function):
    """The backward pass of ``GradVac.combine``: goes back into the engine for each task."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, value: Tensor, vaccine: GradVac, losses: Losses, counts: Any) -> Tensor:
        ctx.vaccine, ctx.losses, ctx.counts = vaccine, losses, counts
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        vaccine: GradVac = ctx.vaccine
        losses, ctx.losses = ctx.losses, None
        if losses is None:
            raise StateError("backward() of a combined loss a second time: its graphs are gone")
        session = vaccine._session_of(losses)
        with torch.enable_grad():
            if session is not None and session.failed is None:
                _one_pass(losses, grads[0])
            else:
                if session is not None:
                    session.looped = True
                vaccine._loop(losses, grads[0], ctx.counts, final=True)
        return None, None, None, None, None


def pcgrad(optimizer: Optimizer, tasks: Sequence[Hashable] | None = None, **settings: Any) -> GradVac:
    """PCGrad (Yu et al., NeurIPS 2020): ``GradVac`` with the fixed target 0, by default over the whole model.

    ``settings`` are those of ``GradVac`` but ``target``.
    """
    chosen: dict[str, Any] = {"groups": "model", **settings, "target": 0.0}
    return GradVac(optimizer, tasks, **chosen)


def _shared_later(losses: list[Tensor]) -> list[bool]:
    """For each loss whether a later one goes through some of the same graph, which must outlive its backward pass then."""
    reached: list[set[Any]] = []
    for loss in losses:
        nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
        seen = set(nodes)
        while nodes:
            below = [node for node, _ in nodes.pop().next_functions if node is not None and node not in seen]
            below = [node for node in below if node.next_functions]  # parameters are no part of a graph that is freed
            seen.update(below)
            nodes += below
        reached.append(seen)
    later: set[Any] = set()
    keeps: list[bool] = []
    for seen in reversed(reached):
        keeps.append(not later.isdisjoint(seen))
        later |= seen
    return keeps[::-1]


def _find_session(loss: Tensor) -> Session | None:
    """The labelled forward pass behind a loss."""
    nodes: list[Any] = [] if loss.grad_fn is None else [loss.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        session = getattr(node, "session", None)
        if isinstance(session, Session):
            return session
        below = [next_node for next_node, _ in node.next_functions if next_node is not None and next_node not in seen]
        seen.update(below)
        nodes += below
    return None


def _one_pass(losses: Losses, factor: Tensor | None) -> None:
    """One backward pass for all tasks; the session weights them."""
    total = torch.stack([loss.mean() for loss in losses.values()]).sum()
    total.backward(None if factor is None else factor.to(total.dtype))


def _alone(group: int) -> _GroupOutcome:
    """A group in a step with one task."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return _GroupOutcome(group, torch.ones(1, dtype=torch.float64), one, one, torch.zeros(1, 1, dtype=torch.bool), one, 1.0, 1.0)


def _added(parts: list[Grads], shares: list[float]) -> Grads:
    found: Grads = []
    for grads in zip(*parts, strict=True):
        present = [grad * share for grad, share in zip(grads, shares, strict=True) if grad is not None]
        found.append(torch.stack(present).sum(0) if present else None)
    return found


def _flat(grads: Grads) -> list[Tensor]:
    """One parameter's gradients as vectors, zero where a task gives none."""
    like = next(grad for grad in grads if grad is not None)
    zero = torch.zeros_like(like).reshape(-1)
    return [zero if grad is None else grad.reshape(-1) for grad in grads]


def _averaged(part: Contribution) -> Contribution:
    """A contribution averaged over the processes."""
    return Dense(_distributed.sum_(dense(part)) / _distributed.world_size())


def _halved(labels: Tensor, count: int) -> Tensor:
    """Labels of each task's first and second half of rows: ``2 * task`` and ``2 * task + 1``."""
    members = torch.nn.functional.one_hot(labels, count)
    place = (members.cumsum(0) * members).sum(1) - 1
    sizes = members.sum(0)[labels]
    return 2 * labels + (place >= sizes // 2).long()
