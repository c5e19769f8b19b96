"""Does calibration help here? Asked of held-out base classes, before any novel label is used; and what may speak against it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._random import generator
from outlast._core._result import JSON, Result, to_json
from outlast.errors import OutlastWarning
from outlast.fewshot._base_statistics import BaseStatistics
from outlast.fewshot._calibrate import calibrate
from outlast.fewshot._calibration import MISMATCH, RIDGE, DistributionCalibration, space_mismatch
from outlast.fewshot._episodes import FewShotResult, evaluate_episodes

_PLAIN: tuple[dict[str, Any], ...] = (
    {"n_samples": 0, "tukey": 1.0},
    {"n_samples": 0, "tukey": 0.5},
    {"n_samples": 0, "tukey": 1.0, "normalize": "l2"},
    {"n_samples": 0, "tukey": 0.5, "normalize": "l2"},
)
_CALIBRATED: tuple[dict[str, Any], ...] = (
    {"tukey": 0.5, "k": 2},
    {"tukey": 0.5, "k": 2, "base_tukey": True},
    {"tukey": 0.5, "k": 1, "base_tukey": True},
    {"tukey": 1.0, "k": 2},
    {"tukey": 1.0, "k": 1},
    {"tukey": 0.5, "k": 2, "base_tukey": True, "head": "lda"},
    {"tukey": 1.0, "k": 2, "head": "lda"},
)


@dataclass(frozen=True, repr=False)
class TuningResult(Result):
    """What simulated episodes say.

    Attributes:
        settings: the best settings of ``DistributionCalibration`` (``n_samples=0``: no calibration).
        result: accuracy with them.
        plain: accuracy of the best settings without calibration.
        gain: paired difference of the two; of no use as a test, since the best was picked on the same episodes.
        tried: every entry of the grid with its accuracy, best first.
    """

    settings: dict[str, Any]
    result: FewShotResult
    plain: FewShotResult
    gain: FewShotResult
    tried: tuple[tuple[dict[str, Any], float], ...]

    def __repr__(self) -> str:
        return f"TuningResult({self.settings}: {100 * self.result.accuracy:.1f} %, without calibration {100 * self.plain.accuracy:.1f} %)"

    def _draw(self, ax: Any) -> None:
        names = [", ".join(f"{key}={value}" for key, value in settings.items()) for settings, _ in self.tried]
        ax.barh(names, [100.0 * accuracy for _, accuracy in self.tried])
        ax.invert_yaxis()
        ax.set_xlabel("accuracy on episodes of held-out base classes (%)")


def tune_calibration(
    base_features: Any,
    base_labels: Any,
    *,
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    grid: Sequence[dict[str, Any]] | None = None,
    n_samples: int = 750,
    held_out: float = 0.25,
    episodes: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TuningResult:
    """Choose settings on episodes of held-out base classes, with their statistics left out of the base.

    No novel label is used. The grid always holds logistic regression without calibration (raw, Tukey, L2, both), so that "no"
    is among the answers; a calibrated setting is taken only if it beats the best of them by more than the paired half-width.

    Args:
        base_features: ``(N, d)``, non-negative where the grid has a power of 0.5.
        base_labels: ``(N,)`` integers.
        way: classes of an episode.
        shot: supports of each.
        query: test samples of each.
        grid: settings of ``DistributionCalibration`` to try beside the plain ones; None for a small grid of ours.
        n_samples: of the grid's entries that do not say it themselves.
        held_out: share of the base classes that simulate novel ones (at least ``way``).
        episodes: how many.
        seed: of the held-out classes and of the episodes.
        progress: called with (done, all).

    Raises:
        ValueError: too few classes to hold ``way`` of them out and keep two.

    Warns:
        OutlastWarning: a setting has more neighbours than base classes are left, and is not tried.
    """
    rows = torch.as_tensor(base_features)
    labels = torch.as_tensor(base_labels)
    share = _checks.real("held_out", held_out, low=0.0, high=1.0, low_open=True)
    classes = labels.unique()
    count = max(way, round(share * len(classes)))
    if len(classes) - count < 2:
        raise ValueError(f"{len(classes)} base classes are too few to hold {count} of them out and keep two")
    order = classes[torch.randperm(len(classes), generator=generator(seed, "held-out classes"))]
    novel = torch.isin(labels, order[:count])
    signed = bool((rows < 0).any())
    tried: list[tuple[dict[str, Any], FewShotResult]] = []
    entries = [*_PLAIN, *({"n_samples": n_samples, **entry} for entry in (_CALIBRATED if grid is None else grid))]
    statistics: dict[float, BaseStatistics] = {}
    for number, settings in enumerate(entries):
        own: dict[str, Any] = {"random_state": seed, **({"negative": "signed"} if signed else {}), **settings}
        if not _is_plain(own):
            bent = float(own.get("tukey", 0.5)) if own.get("base_tukey") else 1.0
            if bent not in statistics:
                statistics[bent] = _statistics(rows[~novel], labels[~novel], bent, signed=signed)
            if own.get("k", 2) > len(statistics[bent]):
                left = len(statistics[bent])
                warnings.warn(f"not tried, since {left} base classes are left: {settings}", OutlastWarning, stacklevel=2)
                if progress is not None:
                    progress(number + 1, len(entries))
                continue
            own["base"] = statistics[bent]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutlastWarning)  # a setting that does not fit shows in its accuracy
            found = evaluate_episodes(
                DistributionCalibration(**own), rows[novel], labels[novel], way=way, shot=shot, query=query, episodes=episodes, seed=seed
            )
        tried.append((dict(settings), found))
        if progress is not None:
            progress(number + 1, len(entries))
    plain = max((pair for pair in tried if _is_plain(pair[0])), key=lambda pair: pair[1].accuracy)
    best = max(tried, key=lambda pair: pair[1].accuracy)
    difference = best[1].minus(plain[1])
    if difference.accuracy <= difference.ci95:
        best, difference = plain, plain[1].minus(plain[1])
    ordered = sorted(((settings, found.accuracy) for settings, found in tried), key=lambda pair: -pair[1])
    settings = {**({"negative": "signed"} if signed else {}), **best[0]}
    return TuningResult(settings, best[1], plain[1], difference, tuple(ordered))


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether nothing is borrowed from base classes."""
    return settings.get("n_samples") == 0 and settings.get("head", "logistic") == "logistic"


def _statistics(rows: Tensor, labels: Tensor, power: float, *, signed: bool) -> BaseStatistics:
    if power == 1.0:
        return BaseStatistics.from_features(rows, labels)
    return BaseStatistics.from_features(rows, labels, tukey=power, negative="signed" if signed else "raise")


@dataclass(frozen=True, repr=False)
class CalibrationReport(Result):
    """Whether supports and base classes fit together.

    Attributes:
        nearest: distance of each support to its nearest base mean, ``(S,)``.
        typical: median distance of a base mean to the nearest other one.
        far: share of supports whose nearest base class is farther than twice that.
        mismatch: median distance of transformed supports to raw base means over that to transformed ones; above 1.5 the
            official mixture of two spaces does not fit the features' scale.
        effective_rank: of each support's calibrated covariance, ``(trace)^2 / trace of the square``, ``(S,)``.
        ridge: share of the mean variance that ``head="lda"`` adds to the diagonal.
    """

    nearest: Tensor
    typical: float
    far: float
    mismatch: float
    effective_rank: Tensor
    ridge: float

    @property
    def fits(self) -> bool:
        """Neither far from the base classes nor in another space."""
        return self.far < 0.5 and self.mismatch <= MISMATCH

    def to_dict(self) -> dict[str, JSON]:
        """All fields and the judgement."""
        return {**super().to_dict(), "fits": to_json(self.fits)}

    def _draw(self, ax: Any) -> None:
        ax.hist(self.nearest.cpu().numpy(), bins=20)
        ax.axvline(self.typical, color="black")
        ax.set_xlabel("distance of a support to its nearest base class (line: between base classes)")


def calibration_report(base: BaseStatistics, support: Tensor, *, k: int = 2, alpha: float = 0.21, tukey: float = 0.5) -> CalibrationReport:
    """Look at supports before trusting a calibration.

    Args:
        base: statistics of the base classes, at least two.
        support: already transformed, ``(S, d)``.
        k: neighbours.
        alpha: dispersion.
        tukey: the power that ``support`` was transformed with.

    Raises:
        ValueError: as ``calibrate``, or fewer than two base classes.
    """
    if len(base) < 2:
        raise ValueError(f"a report needs at least two base classes, got {len(base)}")
    found = calibrate(support, base, k=max(1, k), alpha=alpha)
    between = torch.cdist(base.means.double(), base.means.double()).fill_diagonal_(float("inf"))
    typical = float(between.min(1).values.median())
    nearest = found.distances[..., 0].reshape(-1).double()
    ranks = [
        float(c.diagonal().sum().square() / c.square().sum().clamp(min=1e-300))
        for c in found.covariance().reshape(-1, base.dim, base.dim).double()
    ]
    return CalibrationReport(
        nearest, typical, float((nearest > 2 * typical).double().mean()), space_mismatch(support, base, tukey), torch.tensor(ranks), RIDGE
    )
