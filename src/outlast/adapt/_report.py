"""What an adaptation has done so far, shared by all adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from outlast._core._result import Result

_HISTORY = 2000


def smoothed(before: float, value: float, share: float = 0.9) -> float:
    """A moving average that starts at its first value."""
    return value if math.isnan(before) else share * before + (1.0 - share) * value


@dataclass
class Counters:
    """What a report tells and what changes with each batch or step."""

    updates: int = 0
    skipped: int = 0
    resets: int = 0
    seen: int = 0
    used: int = 0
    loss: float = math.nan
    last_loss: float = math.nan
    frozen: bool = False
    events: list[tuple[int, str]] = field(default_factory=list)
    history: list[tuple[int, float]] = field(default_factory=list)

    def note(self, event: str) -> None:
        """Record an event with the number of updates so far."""
        self.events.append((self.updates, event))

    def step(self, loss: float) -> None:
        """Count an update with its loss."""
        self.updates += 1
        self.last_loss = loss
        self.loss = smoothed(self.loss, loss)
        self.history.append((self.updates, loss))
        if len(self.history) > _HISTORY:
            self.history = self.history[::2]

    def reported(self) -> dict[str, Any]:
        """The fields that every report has."""
        counts = {name: getattr(self, name) for name in ("updates", "skipped", "resets", "seen", "used", "loss")}
        return counts | {"events": tuple(self.events), "history": np.asarray(self.history, np.float64).reshape(-1, 2)}

    def to_state(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Of ``to_state``, which a file may have turned into lists."""
        fields = dict(state)
        fields["events"] = [(int(number), str(kind)) for number, kind in fields["events"]]
        fields["history"] = [(int(number), float(value)) for number, value in fields["history"]]
        return cls(**fields)


@dataclass(frozen=True, repr=False)
class AdaptReport(Result):
    """Counters and figures since the start or the last ``reset()``.

    Attributes:
        updates: optimizer steps taken.
        skipped: batches that led to no step (too small, empty, all rows filtered, not finite, frozen by an alarm).
        resets: returns to the source state by guards.
        seen: rows given to ``forward`` or ``adapt``.
        used: rows whose loss entered a step.
        loss: moving average (0.9/0.1) of the loss of the rows used, before penalties; NaN before the first.
        drift: Euclidean distance of the adapted parameters from their source values, relative to those.
        events: ``(update number, what happened)``, in order.
        history: loss of each update, shape ``(n, 2)`` of update number and loss; thinned to at most 2,000 rows.
    """

    updates: int
    skipped: int
    resets: int
    seen: int
    used: int
    loss: float
    drift: float
    events: tuple[tuple[int, str], ...]
    history: npt.NDArray[Any]

    def _draw(self, ax: Any) -> None:
        ax.plot(self.history[:, 0], self.history[:, 1], "-")
        for number, kind in dict(reversed(self.events)).items() if len(self.events) > 20 else self.events:
            ax.axvline(number, linestyle=":")
            ax.annotate(kind, (number, 1.0), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right")
        ax.set_xlabel("update")
        ax.set_ylabel("loss")


@dataclass(frozen=True, repr=False)
class ClassifierReport(AdaptReport):
    """An ``AdaptReport`` of a classifier.

    Attributes:
        entropy: moving average (0.9/0.1, a batch a step) of the mean entropy of the returned predictions, in nats.
        marginal_entropy: entropy of the mean of the last 256 returned predictions, divided by ``ln C``: 1 for a stream
            whose predictions are balanced, 0 where one class is all that is left.
    """

    entropy: float
    marginal_entropy: float


@dataclass(frozen=True, repr=False)
class PolicyAdaptReport(AdaptReport):
    """An ``AdaptReport`` of a policy.

    Attributes:
        departure: mean absolute difference between the adapted and the source policy's action on the newest observation (share of
            different ones for discrete actions); NaN before the first.
        threshold: of the gate; None without one.
        gate_loss: moving average (0.8/0.2) of the loss that the gate looks at; NaN without a gate.
        milliseconds: mean time of an update.
    """

    departure: float
    threshold: float | None
    gate_loss: float
    milliseconds: float


def together(reports: Sequence[PolicyAdaptReport]) -> PolicyAdaptReport:
    """Sums of counters, means of figures; events and losses in the order of the environments."""

    def mean(name: str) -> float:
        known = [value for report in reports if not math.isnan(value := float(getattr(report, name)))]
        return sum(known) / len(known) if known else math.nan

    return PolicyAdaptReport(
        updates=sum(report.updates for report in reports),
        skipped=sum(report.skipped for report in reports),
        resets=sum(report.resets for report in reports),
        seen=sum(report.seen for report in reports),
        used=sum(report.used for report in reports),
        **{name: mean(name) for name in ("loss", "drift", "departure", "gate_loss", "milliseconds")},
        events=tuple((number, f"environment {place}: {kind}") for place, report in enumerate(reports) for number, kind in report.events),
        history=np.concatenate([report.history for report in reports]),
        threshold=reports[0].threshold,
    )
