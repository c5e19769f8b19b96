"""What an adaptation has done so far, shared by all adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from outlast._core._result import Result


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
