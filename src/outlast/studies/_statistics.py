"""Means over seeds, their intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outlast._core._extras import require

Verdict = Literal["holds", "fails", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its two-sided 95 % interval (Student's t); no interval from fewer than two values."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    def to_dict(self) -> dict[str, object]:
        """As ``--json`` prints it."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "values": list(self.values)}


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of values that are independent over seeds."""
    numbers = np.asarray(values, np.float64)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Interval(mean, None, None, tuple(values))
    special = require("scipy.special", extra="train", purpose="an interval over seeds")
    half = float(special.stdtrit(len(numbers) - 1, 0.975)) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Interval(mean, mean - half, mean + half, tuple(values))


def verdict(measured: Interval, threshold: float, direction: Literal["at least", "at most"], *, min_seeds: int) -> Verdict:
    """``holds`` if the whole interval lies on the claimed side of the threshold, ``fails`` if the whole lies on the other."""
    if measured.low is None or measured.high is None or len(measured.values) < min_seeds:
        return "undecided"
    low, high = (measured.low, measured.high) if direction == "at least" else (-measured.high, -measured.low)
    bar = threshold if direction == "at least" else -threshold
    if low >= bar:
        return "holds"
    return "fails" if high < bar else "undecided"
