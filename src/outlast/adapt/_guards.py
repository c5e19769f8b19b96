"""Guards: what keeps an adaptation from doing harm.

Sources of the rules: EATA (Niu et al., ICML 2022: entropy filter, redundancy filter, anchor), SAR (Niu et al., ICLR
2023: recovery), RDumb (Press et al., NeurIPS 2023: periodic reset), CoTTA (Wang et al., CVPR 2022: restore towards the
source); the collapse alarm, the drift limit and the ring buffer are our own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from outlast._core import _checks, _foreach
from outlast._core._batches import arguments_of, rows_of
from outlast._core._random import generator
from outlast.adapt._entropy import entropy
from outlast.errors import DivergedError, OutlastWarning, StateError

Needs = Literal["classifier", "parameters", "actions"]


class Adapter(Protocol):
    """What a guard may ask of the adapter that it guards."""

    @property
    def adapted(self) -> Mapping[str, nn.Parameter]:
        """The adapted parameters by name."""
        ...

    @property
    def source_values(self) -> Mapping[str, Tensor]:
        """Their values before the first update."""
        ...

    @property
    def last_loss(self) -> float:
        """Loss of the last step's rows, before penalties."""
        ...

    @property
    def loss_scale(self) -> float:
        """What relative thresholds on the loss are relative to (``ln C`` for the entropy of C classes)."""
        ...

    def restore(self, reason: str) -> None:
        """Return to the source state; an event and a reset are counted."""
        ...

    def freeze(self) -> None:
        """Adapt no more until ``reset()``."""
        ...

    def note(self, event: str) -> None:
        """Record an event."""
        ...

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over processes; the value itself where there is one."""
        ...


@dataclass(frozen=True)
class Feed:
    """What goes into the model for a batch.

    Attributes:
        args, kwargs: the model's arguments.
        newest: how many of the last rows are to be returned; None for all.
        adapt: whether this batch may lead to an update.
        settled: whether there are rows enough to take statistics from.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    newest: int | None = None
    adapt: bool = True
    settled: bool = True


class Guard:
    """Base of all guards: hooks that do nothing. Guards run in the order in which they are given.

    A guard belongs to one adapter, since it has state. Your own guard overrides the hooks that it wants, and
    ``reset``, ``state_dict`` and ``load_state_dict`` where it has state.

    Attributes:
        needs: ``"classifier"`` (inputs and logits), ``"parameters"`` (only the loss and the adapted parameters), or
            ``"actions"``; an adapter refuses guards that need what it does not have.
    """

    needs: ClassVar[Needs] = "parameters"
    needs_source: ClassVar[bool] = False

    def before_forward(self, feed: Feed) -> Feed:
        """Change what goes into the model."""
        return feed

    def select(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Which rows count: bool, shape ``(B,)``, given float32 logits ``(B, C, ...)`` and the rows kept so far."""
        return kept

    def selected(self, logits: Tensor, kept: Tensor) -> None:
        """The rows that count after all guards have selected."""

    def discarded(self) -> None:
        """The batch of the latest ``selected`` was not learnt from: its loss or gradient is not finite."""

    def penalty(self, logits: Tensor | None, adapter: Adapter) -> Tensor | None:
        """A 0-dim term added to the loss, with its gradient."""
        return None

    def after_step(self, adapter: Adapter) -> None:
        """After an optimizer step."""

    def after_batch(self, probabilities: Tensor, adapter: Adapter) -> None:
        """After each batch, with the returned predictions, shape ``(B, C)``."""

    def restored(self) -> None:
        """The adapter went back to its source state."""

    def reset(self) -> None:
        """Forget everything: as if new."""
        self.restored()

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move tensors of the state as ``nn.Module.to`` moves the model's."""

    def state_dict(self) -> dict[str, Any]:
        """State as tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of ``state_dict``."""


class EntropyFilter(Guard):
    """Use only rows whose entropy is below a margin (EATA, SAR): confident rows carry the cleaner gradient.

    Args:
        margin: in units of ``ln C``, or in nats with ``relative=False``.
        relative: see ``margin``.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs: ClassVar[Needs] = "classifier"

    def __init__(self, margin: float = 0.4, relative: bool = True) -> None:
        self.margin = _checks.real("margin", margin, low=0.0, low_open=True)
        self.relative = bool(relative)

    def select(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Rows whose (mean) entropy is below the margin."""
        values = entropy(logits, reduction="none").reshape(len(logits), -1).mean(1)
        return kept & (values < self.margin * (math.log(logits.shape[1]) if self.relative else 1.0))


class RedundancyFilter(Guard):
    """Use only rows whose prediction differs from the running mean of the predictions used (EATA).

    Args:
        threshold: keep a row if the absolute cosine to that mean is below it; 0.05 for 1,000 classes, 0.4 for 10.
        momentum: of the running mean.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs: ClassVar[Needs] = "classifier"

    def __init__(self, threshold: float, momentum: float = 0.9) -> None:
        self.threshold = _checks.real("threshold", threshold, low=0.0, high=1.0, low_open=True)
        self.momentum = _checks.real("momentum", momentum, low=0.0, high=1.0)
        self._mean: Tensor | None = None
        self._pending: Tensor | None = None
        self._before: Tensor | None = None

    def select(self, logits: Tensor, kept: Tensor) -> Tensor:
        """Rows that are kept so far and not redundant."""
        p = row_probabilities(logits)
        if self._mean is not None:
            kept = kept & (torch.cosine_similarity(p, self._mean.to(p)[None], dim=1).abs() < self.threshold)
        return kept

    def selected(self, logits: Tensor, kept: Tensor) -> None:
        """Sum up the predictions that are used."""
        p = torch.where(kept[:, None], row_probabilities(logits), 0.0)  # a weight of 0 does not stop NaN
        sums = torch.cat([p.sum(0), kept.sum()[None].to(p)])
        self._before = self._pending
        self._pending = sums if self._pending is None else self._pending + sums

    def discarded(self) -> None:
        """Forget the predictions of that batch."""
        self._pending, self._before = self._before, None

    def after_step(self, adapter: Adapter) -> None:
        """The mean moves by the rows that were used, over all processes."""
        if self._pending is None:
            return
        total = adapter.all_sum(self._pending)
        mean = total[:-1] / total[-1].clamp(min=1.0)
        self._mean = mean if self._mean is None else self.momentum * self._mean + (1.0 - self.momentum) * mean
        self._pending = None

    def restored(self) -> None:
        """Forget the mean."""
        self._mean = self._pending = self._before = None

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """The mean and what waits for it."""
        self._mean, self._pending = (None if value is None else move(value) for value in (self._mean, self._pending))

    def state_dict(self) -> dict[str, Any]:
        """The running mean, and what waits for the next step."""
        return {"mean": self._mean, "pending": self._pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both."""
        self._mean, self._pending = state["mean"], state["pending"]


class Recovery(Guard):
    """Return to the source when the running mean of the loss falls so low that the model must have collapsed (SAR).

    Args:
        threshold: in units of ``ln C``, or of the loss itself with ``relative=False``. SAR's literal 0.2 for 1,000
            classes is 0.03 here; with 10 classes 0.2 nats would restore after every batch.
        relative: see ``threshold``.
        momentum: of the running mean.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, threshold: float = 0.03, relative: bool = True, momentum: float = 0.9) -> None:
        self.threshold = _checks.real("threshold", threshold, low=0.0)
        self.relative = bool(relative)
        self.momentum = _checks.real("momentum", momentum, low=0.0, high=1.0)
        self._mean: float | None = None

    def after_step(self, adapter: Adapter) -> None:
        """Follow the loss; restore and forget it where it is too low."""
        loss = adapter.last_loss
        self._mean = loss if self._mean is None else self.momentum * self._mean + (1.0 - self.momentum) * loss
        if self._mean < self.threshold * (adapter.loss_scale if self.relative else 1.0):
            adapter.restore("recovery")

    def restored(self) -> None:
        """Forget the running mean, or the next batch would restore again."""
        self._mean = None

    def state_dict(self) -> dict[str, Any]:
        """The running mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the running mean."""
        self._mean = state["mean"]


class PeriodicReset(Guard):
    """Return to the source every ``every`` updates (RDumb): a bound on how far things can go.

    Args:
        every: updates between returns, at least 1.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, every: int = 1000) -> None:
        self.every = _checks.integer("every", every, low=1)
        self._count = 0

    def after_step(self, adapter: Adapter) -> None:
        """Count, and restore when it is time."""
        self._count += 1
        if self._count >= self.every:
            adapter.restore("periodic reset")

    def restored(self) -> None:
        """Count anew."""
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """Updates since the last return."""
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the count."""
        self._count = int(state["count"])


class Diversity(Guard):
    """Reward a varied mean prediction: ``- weight * H(mean_i p_i)`` of the present batch is added to the loss.

    The strongest guard against collapse where classes are balanced in the stream; where they are not, it pushes towards
    a balance that is not there.

    Args:
        weight: of the entropy of the mean prediction, at least 0.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs: ClassVar[Needs] = "classifier"

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = _checks.real("weight", weight, low=0.0)

    def penalty(self, logits: Tensor | None, adapter: Adapter) -> Tensor | None:
        """Minus the entropy of the mean prediction over all processes; each has the gradient of its own rows."""
        assert logits is not None
        total = row_probabilities(logits).sum(0)
        sums = adapter.all_sum(torch.cat([total.detach(), total.new_full((1,), float(len(logits)))]))
        # clamped, since the derivative of the entropy is infinite at 0, where a class may be masked
        mean = ((sums[:-1] + total - total.detach()) / sums[-1]).clamp(min=torch.finfo(total.dtype).tiny)
        return self.weight * (mean * mean.log()).sum()


class Anchor(Guard):
    """Pull the adapted parameters towards their source values: ``strength * sum_j F_j (A_j - A0_j)^2`` (EATA).

    Args:
        strength: 2000 for ImageNet in EATA, 1 for CIFAR in one peer, both with Fisher weights.
        fisher: weight of each scalar by parameter name, as ``fisher_of`` computes it; None weighs all alike.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, strength: float = 1.0, fisher: Mapping[str, Tensor] | None = None) -> None:
        self.strength = _checks.real("strength", strength, low=0.0)
        self.fisher = dict(fisher) if fisher is not None else None

    def penalty(self, logits: Tensor | None, adapter: Adapter) -> Tensor | None:
        """The weighted squared distance from the source."""
        parts: list[Tensor] = []
        for name, parameter in adapter.adapted.items():
            gap = (parameter - adapter.source_values[name]).square()
            if self.fisher is not None:
                if name not in self.fisher:
                    raise ValueError(f"the Anchor's fisher has no entry for the adapted parameter {name!r}")
                gap = gap * self.fisher[name].to(gap)
            parts.append(gap.sum())
        total = torch.stack(parts).sum()
        return self.strength * total / adapter.all_sum(torch.ones_like(total))  # each process adds its share

    @staticmethod
    def fisher_of(model: nn.Module, batches: Iterable[object], *, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Diagonal Fisher information: the mean over batches of the squared gradient of the cross entropy to the model's own labels.

        Args:
            model: gives logits ``(B, C, ...)``; run as it is (put it in eval mode).
            batches: source-like inputs, some 2,000 rows.
            parameters: what to weigh, by the names that the adapter uses (``adapter.adapted``).

        Raises:
            ValueError: no batches.
        """
        total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        count = 0
        for batch in batches:
            args, kwargs = arguments_of(batch)
            with torch.enable_grad():
                logits = model(*args, **kwargs)
                loss = nn.functional.cross_entropy(logits, logits.argmax(1))
                grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
            for name, grad in zip(parameters, grads, strict=True):
                total[name].add_(grad.square())
            count += 1
        if count == 0:
            raise ValueError("batches is empty, so there is no Fisher information to compute")
        return {name: value / count for name, value in total.items()}


class StochasticRestore(Guard):
    """After each step every adapted scalar returns to its source value with probability ``p`` (CoTTA).

    Args:
        p: probability of each scalar after each step, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, p: float = 0.01, seed: int = 0) -> None:
        self.p = _checks.real("p", p, low=0.0, high=1.0)
        self.seed = _checks.integer("seed", seed, low=0)
        self._count = 0

    @torch.no_grad()
    def after_step(self, adapter: Adapter) -> None:
        """Draws are a function of (seed, number of the step), so all processes draw the same."""
        rng = generator(self.seed, "adapt.stochastic_restore", self._count)
        self._count += 1
        for name, parameter in adapter.adapted.items():
            drawn = (torch.rand(parameter.shape, generator=rng) < self.p).to(parameter.device)
            parameter.copy_(torch.where(drawn, adapter.source_values[name], parameter))

    def reset(self) -> None:
        """Draw the same again."""
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """Steps so far."""
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the count."""
        self._count = int(state["count"])


class DriftLimit(Guard):
    """Keep ``||A - A0|| <= max_relative * ||A0||`` by projection after each step.

    Args:
        max_relative: largest distance from the source, relative to the source's norm, above 0.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs_source: ClassVar[bool] = True

    def __init__(self, max_relative: float = 0.5) -> None:
        self.max_relative = _checks.real("max_relative", max_relative, low=0.0, low_open=True)

    @torch.no_grad()
    def after_step(self, adapter: Adapter) -> None:
        """Scale the departure from the source back into the ball."""
        now = list(adapter.adapted.values())
        source = [adapter.source_values[name] for name in adapter.adapted]
        gaps = [a - b for a, b in zip(now, source, strict=True)]
        limit = self.max_relative * _foreach.norm(source)
        factor = (limit / _foreach.norm(gaps)).clamp(max=1.0)
        if float(factor) < 1.0:
            _foreach.copy_(now, [b + factor.to(gap) * gap for b, gap in zip(source, gaps, strict=True)])


ACTIONS = ("freeze", "reset", "warn", "raise")


class _Alarm(Guard):
    """A guard that acts when something is seen."""

    action: str
    _warned: bool

    def _go_off(self, adapter: Adapter, event: str, message: str) -> None:
        """Bring the source back (and stay there), raise, or warn once, as ``action`` says."""
        if self.action in ("freeze", "reset"):
            adapter.restore(event)
            if self.action == "freeze":
                adapter.freeze()
        elif self.action == "raise":
            adapter.note(event)
            raise DivergedError(message)
        elif not self._warned:
            self._warned = True
            adapter.note(event)
            warnings.warn(message, OutlastWarning, stacklevel=3)


class CollapseAlarm(_Alarm):
    """Watch the variety of the returned predictions, and act when it falls.

    ``M`` is the entropy of the mean of the last ``window`` predictions, divided by ``ln C``. The first full window after
    the start or a reset gives ``M0``; the alarm goes off when ``M < M0 - max_drop``, or below the absolute
    ``min_marginal_entropy`` if that is given. It is blind to a class-ordered stream under batch statistics, where every
    batch looks balanced.

    Args:
        window: rows.
        max_drop: in units of ``ln C``.
        min_marginal_entropy: an absolute floor, in units of ``ln C``.
        action: ``"freeze"`` restores the source and adapts no more until ``reset()``; ``"reset"`` restores and goes on;
            ``"warn"`` warns once; ``"raise"`` raises ``DivergedError``, also after ten batches in a row that are not finite.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs: ClassVar[Needs] = "classifier"

    def __init__(
        self,
        window: int = 256,
        max_drop: float = 0.05,
        min_marginal_entropy: float | None = None,
        action: Literal["freeze", "reset", "warn", "raise"] = "freeze",
    ) -> None:
        self.window = _checks.integer("window", window, low=1)
        self.max_drop = _checks.real("max_drop", max_drop, low=0.0)
        self.min_marginal_entropy = (
            None if min_marginal_entropy is None else _checks.real("min_marginal_entropy", min_marginal_entropy, low=0.0, high=1.0)
        )
        self.action = _checks.choice("action", action, ACTIONS)
        self._rows = Window(self.window)
        self._first: float | None = None
        self._warned = False

    def after_batch(self, probabilities: Tensor, adapter: Adapter) -> None:
        """Look once, as soon as the window is full (over all processes, which all ask at every batch)."""
        self._rows.add(probabilities)
        held = self._rows.sums(probabilities)
        totals = adapter.all_sum(torch.cat([held, held.new_ones(1)])).tolist()
        *sums, rows, processes = totals
        if rows < self.window * processes:
            return
        value = _entropy_of(sums, rows)
        if self._first is None:
            self._first = value
        low = value < self._first - self.max_drop
        if not low and (self.min_marginal_entropy is None or value >= self.min_marginal_entropy):
            return
        message = f"the predictions collapse: marginal entropy {value:.3f}, {self._first:.3f} at the start (in units of ln C)"
        self._go_off(adapter, "collapse alarm", message)

    def restored(self) -> None:
        """The window starts anew, and so does its reference."""
        self._rows.clear()
        self._first = None

    def reset(self) -> None:
        """As new."""
        self.restored()
        self._warned = False

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """The window."""
        self._rows.rows = None if self._rows.rows is None else move(self._rows.rows)

    def state_dict(self) -> dict[str, Any]:
        """Window and reference."""
        return {"rows": self._rows.rows, "first": self._first, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take window and reference."""
        self._rows.rows, self._first, self._warned = state["rows"], state["first"], bool(state["warned"])


class ActionWatch(_Alarm):
    """Act when the adapted policy departs from the source policy on the present observation.

    Args:
        limit: largest mean absolute difference of their actions.
        action: ``"reset"`` restores the source and goes on, ``"freeze"`` restores it and adapts no more until ``reset()``, ``"warn"`` warns
            once, ``"raise"`` raises ``DivergedError``.
        every: updates between two looks, each of which is a pass of the source policy.

    Raises:
        ValueError: out of range.
    """

    needs: ClassVar[Needs] = "actions"
    needs_source: ClassVar[bool] = True

    def __init__(self, limit: float, action: Literal["reset", "freeze", "warn", "raise"] = "reset", every: int = 1) -> None:
        self.limit = _checks.real("limit", limit, low=0.0, low_open=True)
        self.action = _checks.choice("action", action, ACTIONS)
        self.every = _checks.integer("every", every, low=1)
        self._count, self._warned = 0, False

    def after_step(self, adapter: Adapter) -> None:
        """Compare, and act."""
        self._count += 1
        if self._count % self.every:
            return
        departure = float(cast("Any", adapter).departure())
        if departure > self.limit:
            message = f"the adapted policy departs from the source policy by {departure:.3g}, more than {self.limit:g}"
            self._go_off(adapter, "action watch", message)

    def restored(self) -> None:
        """Count anew."""
        self._count = 0

    def reset(self) -> None:
        """As new."""
        self._count, self._warned = 0, False

    def state_dict(self) -> dict[str, Any]:
        """Updates so far, and whether it has warned."""
        return {"count": self._count, "warned": self._warned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take both."""
        self._count, self._warned = int(state["count"]), bool(state["warned"])


class RingBuffer(Guard):
    """For streams of single rows: keep the last ``size`` inputs, forward them all, return the newest, update once per ``size`` rows.

    Until ``min_rows`` inputs are there, predictions use the source statistics.

    Args:
        size: rows kept, the batch size that was good in the laboratory.
        min_rows: rows from which statistics are taken; None for a quarter of ``size``.

    Raises:
        ValueError, TypeError: a number outside of its range, or another type.
    """

    needs: ClassVar[Needs] = "classifier"

    def __init__(self, size: int = 64, min_rows: int | None = None) -> None:
        self.size = _checks.integer("size", size, low=1)
        self.min_rows = max(1, size // 4) if min_rows is None else _checks.integer("min_rows", min_rows, low=1)
        if self.min_rows > self.size:
            raise ValueError(f"min_rows must be at most size={self.size}, got {self.min_rows}")
        self._leaves: list[Tensor] | None = None
        self._new = 0

    def before_forward(self, feed: Feed) -> Feed:
        """The buffer with the new rows at its end, which it keeps."""
        return self._joined(feed, keep=True)

    def preview(self, feed: Feed) -> Feed:
        """The same, keeping nothing."""
        return self._joined(feed, keep=False)

    def _joined(self, feed: Feed, *, keep: bool) -> Feed:
        leaves, form = tree_flatten((feed.args, feed.kwargs))
        new = rows_of((feed.args, feed.kwargs)) or 0
        places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == new]
        if self._leaves is not None and [leaf.shape[1:] for leaf in self._leaves] != [leaves[n].shape[1:] for n in places]:
            raise ValueError(
                f"RingBuffer holds rows of shape {[tuple(leaf.shape[1:]) for leaf in self._leaves]}, "
                f"got {[tuple(leaves[n].shape[1:]) for n in places]}; reset() before the shape changes"
            )
        fresh = [leaves[n].detach() for n in places]
        rows = fresh if self._leaves is None else [torch.cat([old, row]) for old, row in zip(self._leaves, fresh, strict=True)]
        rows = [row[-max(self.size, new) :] for row in rows]
        for n, row in zip(places, rows, strict=True):
            leaves[n] = row
        args, kwargs = tree_unflatten(leaves, form)
        count = len(rows[0]) if rows else new
        due = self._new + new >= self.size
        if keep:
            self._new = 0 if due else self._new + new
            self._store(fresh)
        return replace(feed, args=args, kwargs=kwargs, newest=new, adapt=feed.adapt and due, settled=count >= self.min_rows)

    def _store(self, fresh: list[Tensor]) -> None:
        """Keep the new rows that are finite: a bad one would spoil the statistics of all that follow."""
        good = torch.ones(len(fresh[0]), dtype=torch.bool, device=fresh[0].device) if fresh else None
        for row in fresh:
            if row.is_floating_point() and good is not None:
                good &= torch.isfinite(row).reshape(len(row), -1).all(1).to(good.device)
        chosen = [row[good.to(row.device)] for row in fresh] if good is not None else []
        if self._leaves is not None:
            chosen = [torch.cat([old, row]) for old, row in zip(self._leaves, chosen, strict=True)]
        self._leaves = [row[-self.size :].clone() for row in chosen]

    def reset(self) -> None:
        """Empty the buffer."""
        self._leaves, self._new = None, 0

    def apply(self, move: Callable[[Tensor], Tensor]) -> None:
        """The rows."""
        self._leaves = None if self._leaves is None else [move(leaf) for leaf in self._leaves]

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the count of new rows."""
        return {"leaves": self._leaves, "new": self._new}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the buffer and the count."""
        self._leaves, self._new = state["leaves"], int(state["new"])


class Window:
    """The last rows of predictions, shape ``(n, C)``."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Append, and drop the oldest."""
        rows = rows.detach()
        fits = self.rows is not None and self.rows.shape[1:] == rows.shape[1:] and self.rows.device == rows.device
        joined = torch.cat([self.rows, rows]) if self.rows is not None and fits else rows
        self.rows = joined[-self.size :].clone()

    def clear(self) -> None:
        """Forget all."""
        self.rows = None

    def sums(self, like: Tensor) -> Tensor:
        """The sum of the rows and their number, shape ``(C + 1,)``, as floats beside ``like`` ``(B, C)``."""
        rows = like.new_zeros(0, like.shape[1]) if self.rows is None else self.rows
        return torch.cat([rows.sum(0), rows.new_full((1,), float(len(rows)))])

    def marginal_entropy(self) -> float:
        """Entropy of the mean row of this process, divided by ``ln C``; NaN without rows."""
        if self.rows is None or not len(self.rows):
            return math.nan
        *sums, count = self.sums(self.rows).tolist()
        return _entropy_of(sums, count)


def _entropy_of(sums: list[float], count: float) -> float:
    """Entropy of the mean ``sums / count``, divided by ``ln C``."""
    return -sum((s / count) * math.log(s / count) for s in sums if s > 0) / math.log(len(sums))


def check_guards(guards: Iterable[object], provided: tuple[Needs, ...], *, adapter: str, keeps_source: bool) -> tuple[Guard, ...]:
    """See that guards fit an adapter, and mark them as its own.

    Raises:
        TypeError: something that is no guard.
        ValueError: a guard that needs what the adapter does not have, or that belongs to another adapter.
    """
    found: list[Guard] = []
    if isinstance(guards, Guard):
        raise TypeError(f"guards is a sequence: give [{type(guards).__name__}(...)]")
    for guard in guards:
        if not isinstance(guard, Guard):
            raise TypeError(f"guards must be Guard objects, got {guard!r} of type {type(guard).__name__}")
        if guard.needs not in provided:
            raise ValueError(f"{type(guard).__name__} needs {_NEEDS[guard.needs]}, which {adapter} does not see")
        restores = guard.needs_source or (isinstance(guard, CollapseAlarm) and guard.action in ("freeze", "reset"))
        if restores and not keeps_source:
            raise ValueError(f"{type(guard).__name__} goes back to the source values, which keep_source=False does not keep")
        if getattr(guard, "_owned", False) or any(guard is other for other in found):
            raise ValueError(
                f"this {type(guard).__name__} is in use already, in this or another adapter; make a new one, since it has state"
            )
        found.append(guard)
    for guard in found:
        guard._owned = True  # pyright: ignore[reportAttributeAccessIssue]
    return tuple(found)


_NEEDS = {"classifier": "the inputs and logits of a classifier", "actions": "the actions of a policy", "parameters": "parameters"}


def load_guards(guards: tuple[Guard, ...], states: list[tuple[str, Mapping[str, Any]]], device: torch.device) -> None:
    """Give guards their saved states, on a device.

    Raises:
        ValueError: the saved guards are others.
    """
    kinds, saved = [type(guard).__name__ for guard in guards], [kind for kind, _ in states]
    if kinds != saved:
        raise ValueError(f"the state was saved with the guards {saved}, this adapter has {kinds}")
    for guard, (_, state) in zip(guards, states, strict=True):
        guard.load_state_dict(tree_map(lambda leaf: leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf, dict(state)))


def source_or_raise(values: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The source values.

    Raises:
        StateError: they were not kept.
    """
    if values is None:
        raise StateError("the source values were not kept (keep_source=False), so there is nothing to go back to")
    return values


def row_probabilities(logits: Tensor) -> Tensor:
    """Probabilities of each row, mean over positions: ``(B, C, ...)`` to ``(B, C)``."""
    p = torch.softmax(logits, 1)
    return p if p.ndim == 2 else p.flatten(2).mean(2)
