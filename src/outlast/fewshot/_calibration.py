"""Distribution calibration as a classifier: sample from calibrated Gaussians, fit a logistic regression.

Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021 (arXiv 2101.06395), algorithm 1.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from outlast._core import _checks, _random
from outlast.errors import OutlastWarning
from outlast.fewshot._base_statistics import BaseStatistics
from outlast.fewshot._baselines import Normalize, prepared
from outlast.fewshot._calibrate import Calibrated, Dispersion, calibrate
from outlast.fewshot._logistic import batched_logistic_regression
from outlast.fewshot._sklearn import EpisodeClassifier
from outlast.fewshot._transform import Negative, tukey_transform

MISMATCH = 1.5  # of distances, above which the official mixture of two spaces does not fit
RIDGE = 1e-4  # of the mean variance
_BATCH_BYTES = 96 << 20  # of rows; their copies side by side take three times as much


class DistributionCalibration(EpisodeClassifier):
    """Few-shot classifier that borrows mean and covariance of the nearest base classes.

    Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021, algorithm 1.

    ```python
    base = BaseStatistics.from_features(base_features, base_labels)
    classifier = DistributionCalibration(base).fit(support_features, support_labels)
    classifier.predict(query_features)
    ```

    The trap that it takes care of: the official form compares power-transformed supports with untransformed base means, which
    works for activations of order 0.1 to 1 only; a warning says when it does not, and ``base_tukey=True`` with statistics of
    transformed features is the way out.

    Args:
        base: statistics of base classes; None only with ``n_samples=0`` and ``head="logistic"``.
        k: nearest base classes that each support borrows from.
        alpha: dispersion added to the covariance.
        dispersion: ``"ones"`` to every entry (the paper), ``"identity"`` to the diagonal.
        tukey: power of the transform of supports and queries, 1 for none.
        base_tukey: whether ``base`` was computed from features transformed with the same power.
        negative: as in ``tukey_transform``.
        n_samples: drawn for each class in all; each support gives ``n_samples // shots``.
        head: ``"logistic"``, or ``"lda"`` (closed form, nothing is drawn).
        C: inverse strength of the logistic penalty on the sum of losses.
        tol: of its gradient.
        max_iter: most iterations.
        pool_support: average a class's supports first, one Gaussian for each class.
        sampler: ``"factor"`` draws afresh; ``"bank"`` gathers from draws made once for each base class (faster).
        normalize: ``"l2"`` brings supports, queries and samples to length 1 before the classifier; the calibration itself sees them
            as they are. Not with ``head="lda"``.
        random_state: seed; noise is a function of it and of the episode's number, whatever the batches.
        device: where to compute; None for where X is.
        batch_size: episodes at a time; ``"auto"`` for what fits about 300 MiB.

    Attributes:
        classes_: sorted classes.
        coef_: ``(c, d)`` or ``(E, c, d)``.
        intercept_: ``(c,)`` or ``(E, c)``.
        calibrated_: the calibrated distributions; None without a base.
        n_iter_: iterations of each episode.
        converged_: whether each episode's fit converged.

    Raises:
        ValueError, TypeError: in ``fit``, a setting outside of its range, or a ``base`` that does not fit.
    """

    first_episode = 0

    def __init__(
        self,
        base: BaseStatistics | None = None,
        *,
        k: int = 2,
        alpha: float = 0.21,
        dispersion: Dispersion = "ones",
        tukey: float = 0.5,
        base_tukey: bool = False,
        negative: Negative = "raise",
        n_samples: int = 750,
        head: Literal["logistic", "lda"] = "logistic",
        C: float = 1.0,
        tol: float = 1e-4,
        max_iter: int = 1000,
        pool_support: bool = False,
        sampler: Literal["factor", "bank"] = "factor",
        normalize: Normalize | None = None,
        random_state: int | None = None,
        device: torch.device | str | None = None,
        batch_size: int | Literal["auto"] = "auto",
    ) -> None:
        self.base = base
        self.k = k
        self.alpha = alpha
        self.dispersion: Dispersion = dispersion
        self.tukey = tukey
        self.base_tukey = base_tukey
        self.negative: Negative = negative
        self.n_samples = n_samples
        self.head = head
        self.C = C
        self.tol = tol
        self.max_iter = max_iter
        self.pool_support = pool_support
        self.sampler = sampler
        self.normalize = normalize
        self.random_state = random_state
        self.device = device
        self.batch_size = batch_size

    def _check(self, width: int) -> None:
        _checks.integer("n_samples", self.n_samples, low=0)
        _checks.choice("head", self.head, ("logistic", "lda"))
        _checks.choice("sampler", self.sampler, ("factor", "bank"))
        if self.normalize is not None:
            _checks.choice("normalize", self.normalize, ("l2",))
            if self.head == "lda":
                raise ValueError(
                    "head='lda' works with the calibrated covariances, which normalize='l2' leaves as they are; use one of them"
                )
        _checks.integer("k", self.k, low=0)
        _checks.real("alpha", self.alpha, low=0.0)
        _checks.real("C", self.C, low=0.0, low_open=True)
        if self.batch_size != "auto":
            _checks.integer("batch_size", self.batch_size, low=1)
        needs_base = self.n_samples > 0 or self.head == "lda"
        if self.base is None:
            if needs_base:
                raise ValueError(
                    "base is None: give statistics of base classes, BaseStatistics.from_features(features, labels), or n_samples=0"
                )
            return
        if not isinstance(self.base, BaseStatistics):
            raise TypeError(f"base must be BaseStatistics, got {type(self.base).__name__}")
        if self.base.dim != width:
            raise ValueError(f"X has width {width}, the base statistics {self.base.dim}")
        recorded = self.tukey if self.base_tukey else 1.0
        if self.base.tukey != recorded:
            raise ValueError(
                f"base_tukey={self.base_tukey} asks for statistics with lam={recorded:g}, but the statistics were computed with "
                f"lam={self.base.tukey:g}"
            )

    def _fit(self, X: Tensor, y: Tensor, classes: int) -> None:
        self._check(X.shape[2])
        rows = X if self.device is None else X.to(self.device)
        y = y.to(rows.device)
        bent = tukey_transform(rows, self.tukey, negative=self.negative)
        support = torch.nn.functional.normalize(bent, dim=-1) if self.normalize == "l2" else bent
        self.calibrated_: Calibrated | None = None
        if self.base is not None and (self.n_samples > 0 or self.head == "lda"):
            pooled, own = _pooled(bent, y, classes) if self.pool_support else (bent, y)
            self.calibrated_ = calibrate(pooled, self.base, k=self.k, alpha=self.alpha, dispersion=self.dispersion)
            self._warn_of_mismatch(pooled)
            if self.head == "lda":
                self._weight, self._bias = _lda(self.calibrated_, own, classes)
                self.n_iter_, self.converged_ = torch.zeros(len(X), dtype=torch.int64), torch.ones(len(X), dtype=torch.bool)
            else:
                self._sample_and_fit(support, y, self.calibrated_, own, classes)
        else:
            self._keep(batched_logistic_regression(support, y, num_classes=classes, C=self.C, tol=self.tol, max_iter=self.max_iter))
        self.coef_, self.intercept_ = self._out(self._weight), self._out(self._bias)

    def _keep(self, fit: Any) -> None:
        self._weight, self._bias, self.n_iter_, self.converged_ = fit.weight, fit.bias, fit.n_iter, fit.converged

    def _sample_and_fit(self, support: Tensor, y: Tensor, calibrated: Calibrated, own: Tensor, classes: int) -> None:
        """Each episode draws from its own stream and is fitted for itself; batches only share the work."""
        shots = torch.nn.functional.one_hot(own, classes).sum(1)  # (E, c)
        draws = torch.div(self.n_samples, shots, rounding_mode="floor")
        episode_bytes = (support.shape[1] + classes * self.n_samples) * support.shape[2] * support.element_size()
        size = max(1, _BATCH_BYTES // max(1, episode_bytes)) if self.batch_size == "auto" else int(self.batch_size)
        bank = _Bank(calibrated.base, self.n_samples, self._seed(), support) if self.sampler == "bank" else None
        fits: list[Any] = []
        left = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutlastWarning)  # said once for all batches
            lengths = (draws.gather(1, own)).sum(1) + support.shape[1]
            for start, stop in _runs(lengths.tolist(), size):  # padding would change how an episode is solved
                pairs = [self._augmented(e, support, y, calibrated, own, draws, bank) for e in range(start, stop)]
                X, targets = torch.stack([rows for rows, _ in pairs]), torch.stack([labels for _, labels in pairs])
                del pairs
                fits.append(batched_logistic_regression(X, targets, num_classes=classes, C=self.C, tol=self.tol, max_iter=self.max_iter))
                left += int((~fits[-1].converged).sum())
                del X, targets
        if left:
            warnings.warn(
                f"{left} of {len(support)} episodes did not reach tol={self.tol:g} in {self.max_iter} iterations; see converged_",
                OutlastWarning,
                stacklevel=5,
            )
        self._weight = torch.cat([fit.weight for fit in fits])
        self._bias = torch.cat([fit.bias for fit in fits])
        self.n_iter_, self.converged_ = (torch.cat([getattr(fit, name) for fit in fits]) for name in ("n_iter", "converged"))

    def _seed(self) -> int:
        return 0 if self.random_state is None else _checks.integer("random_state", self.random_state, low=0)

    def _augmented(
        self, episode: int, support: Tensor, y: Tensor, calibrated: Calibrated, own: Tensor, draws: Tensor, bank: _Bank | None
    ) -> tuple[Tensor, Tensor]:
        """The supports of an episode and what is drawn for it."""
        stream = _random.generator(self._seed(), "calibration", self.first_episode + episode)
        if bank is not None:
            bank.begin()
        rows, labels = [support[episode]], [y[episode]]
        for place, label in enumerate(own[episode].tolist()):
            count = int(draws[episode, label])
            one = Calibrated(
                calibrated.neighbours[episode, place : place + 1],
                calibrated.distances[episode, place : place + 1],
                calibrated.means[episode, place : place + 1],
                calibrated.base,
                calibrated.alpha,
                calibrated.dispersion,
            )
            drawn = one.sample(count, generator=stream)[0] if bank is None else bank.sample(one, count, stream)
            rows.append(torch.nn.functional.normalize(drawn, dim=-1) if self.normalize == "l2" else drawn)
            labels.append(torch.full((count,), label, device=y.device, dtype=y.dtype))
        return torch.cat(rows), torch.cat(labels)

    def _warn_of_mismatch(self, support: Tensor) -> None:
        if space_mismatch(support, self.base, self.tukey, self.negative) > MISMATCH:
            warnings.warn(
                "transformed supports are far from the raw base means: the official mixture of two spaces does not fit the scale of these "
                "features. Compute the statistics with tukey= and set base_tukey=True",
                OutlastWarning,
                stacklevel=6,
            )

    def _decide(self, X: Tensor) -> Tensor:
        rows = prepared(X if self.device is None else X.to(self.device), self.tukey, self.negative, self.normalize)
        return rows @ self._weight.to(rows).mT + self._bias.to(rows)[:, None]


_BANKS: WeakKeyDictionary[BaseStatistics, tuple[tuple[Any, ...], dict[int, Tensor]]] = WeakKeyDictionary()


class _Bank:
    """Draws of each base class made once: an episode then gathers rows and adds them, with a random sign each.

    The latest bank of some statistics is kept as long as they live, so that many fits share it.
    """

    def __init__(self, base: BaseStatistics, samples: int, seed: int, like: Tensor) -> None:
        self.rows = 2 * max(1, samples)
        self._orders: dict[int, Tensor] = {}  # of the present episode: what is left of each class's rows
        self._base, self._seed, self._like = base, seed, like
        key = (seed, self.rows, like.dtype, like.device, int(base.counts.sum()))  # features that came in change the count
        kept = _BANKS.get(base)
        if kept is None or kept[0] != key:
            kept = _BANKS[base] = (key, {})
        self._draws = kept[1]

    def _of(self, number: int) -> Tensor:
        if number not in self._draws:
            factor = self._base.factors[number].to(self._like)
            stream = _random.generator(self._seed, "bank", number)
            self._draws[number] = torch.randn(self.rows, len(factor), generator=stream, dtype=factor.dtype).to(factor.device) @ factor
        return self._draws[number]

    def begin(self) -> None:
        """Start an episode, within which no row is used twice (while the bank has enough)."""
        self._orders.clear()

    def _next(self, number: int, count: int, stream: torch.Generator) -> Tensor:
        left = self._orders.get(number)
        parts: list[Tensor] = []
        while count > 0:
            if left is None or not len(left):
                left = torch.randperm(self.rows, generator=stream)
            parts.append(left[:count])
            left = left[count:]
            count -= len(parts[-1])
        if left is not None:
            self._orders[number] = left
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def sample(self, calibrated: Calibrated, count: int, stream: torch.Generator) -> Tensor:
        """``(count, d)`` for one support."""
        numbers = calibrated.neighbours[0].tolist()
        found = calibrated.means.expand(count, -1).clone()
        for number in numbers:
            place = self._next(number, count, stream)
            sign = torch.randint(0, 2, (count, 1), generator=stream) * 2 - 1
            found += self._of(number)[place.to(found.device)] * (sign.to(found) * len(numbers) ** -0.5)
        calibrated._disperse(found, stream)
        return found


def _pooled(support: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean support of each class, ``(E, c, d)``, and the classes."""
    members = torch.nn.functional.one_hot(y, classes).to(support.dtype)
    means = members.mT @ support / members.sum(1)[..., None]
    return means, torch.arange(classes, device=y.device).expand(len(support), -1)


def _runs(lengths: list[int], size: int) -> list[tuple[int, int]]:
    """Stretches of at most ``size`` neighbours of equal length."""
    found: list[tuple[int, int]] = []
    start = 0
    for place in range(1, len(lengths) + 1):
        if place == len(lengths) or place - start == size or lengths[place] != lengths[start]:
            found.append((start, place))
            start = place
    return found


def _lda(calibrated: Calibrated, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Linear discriminants from the calibrated means and their mean covariance, one Cholesky factorisation an episode."""
    means = calibrated.means
    episodes, supports, d = means.shape
    members = torch.nn.functional.one_hot(y, classes).to(means.dtype)
    counts = members.sum(1)
    centres = members.mT @ means / counts[..., None]
    weight = means.new_empty(episodes, classes, d)
    eye = torch.eye(d, dtype=means.dtype, device=means.device)
    covariances: dict[int, Tensor] = {}
    for episode in range(episodes):
        shares: dict[int, float] = {}
        for row in calibrated.neighbours[episode].tolist():
            for number in row:
                shares[number] = shares.get(number, 0.0) + 1.0 / (len(row) * supports)
        shared = means.new_zeros(d, d)
        for number, share in shares.items():
            if number not in covariances:
                covariances[number] = calibrated.base.covariance(number).to(means)
            shared.add_(covariances[number], alpha=share)
        shared += calibrated.alpha * (1.0 if calibrated.dispersion == "ones" else eye)
        spread = means[episode] - centres[episode, y[episode]]
        if supports > classes:
            shared.addmm_(spread.mT, spread, alpha=1.0 / (supports - classes))
        trace = float(shared.diagonal().sum())
        ridge = RIDGE * trace / d if trace > 0 else 1.0
        weight[episode] = torch.cholesky_solve(centres[episode].mT, torch.linalg.cholesky(shared + ridge * eye)).mT
    return weight, -0.5 * (weight * centres).sum(-1)


def space_mismatch(support: Tensor, base: BaseStatistics | None, tukey: float, negative: Negative = "raise") -> float:
    """Median distance of transformed supports to raw base means over that to transformed ones; 1 where both spaces are one."""
    if base is None or not len(base) or tukey == 1.0 or tukey <= 0.0 or base.tukey == tukey:
        return 1.0
    means = base.means.to(support)
    bent = tukey_transform(means, tukey, negative="relu" if negative == "raise" else negative)
    flat = support.reshape(-1, support.shape[-1])[:200]
    raw, same = (float(torch.cdist(flat, own).median()) for own in (means, bent))
    return raw / same if same > 0 else 1.0
