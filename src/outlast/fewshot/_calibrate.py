"""A Gaussian for a new class from one labelled feature and the nearest base classes.

Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021 (arXiv 2101.06395), equations 5 to 7.

Letters: ... leading dimensions (episodes), S supports, k neighbours, d width, n samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._result import Result
from outlast._core._typing import Float, Int
from outlast.fewshot._base_statistics import BaseStatistics

Dispersion = Literal["ones", "identity"]


@dataclass(frozen=True, repr=False)
class Calibrated(Result):
    """Calibrated distributions of supports.

    Attributes:
        neighbours: numbers of the nearest base classes, nearest first, int64 ``(..., S, k)``.
        distances: Euclidean distances to their means, ``(..., S, k)``.
        means: ``(..., S, d)``.
        base: the statistics.
        alpha: dispersion added to the covariance.
        dispersion: ``"ones"`` adds it to every entry (the paper: a common random shift of all coordinates), ``"identity"`` to
            the diagonal.
    """

    neighbours: Tensor
    distances: Tensor
    means: Tensor
    base: BaseStatistics
    alpha: float
    dispersion: Dispersion

    def covariance(self) -> Float[Tensor, "*supports d d"]:
        """``(..., S, d, d)``; large: for looking at, not for sampling."""
        d = self.base.dim
        flat = self.neighbours.reshape(self.means.numel() // d, -1)
        extra = self.alpha * (torch.ones(d, d) if self.dispersion == "ones" else torch.eye(d)).to(self.means)
        found = [self._mean_covariance(row.tolist()) + extra for row in flat]
        return torch.stack(found).reshape(*self.means.shape, d)

    def _mean_covariance(self, numbers: list[int]) -> Tensor:
        d = self.base.dim
        if not numbers:
            return self.means.new_zeros(d, d)
        return torch.stack([self.base.covariance(number).to(self.means) for number in numbers]).mean(0)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Float[Tensor, "*supports n d"]:
        """``n`` draws for each support, ``(..., S, n, d)``, without any factorisation.

        The sum of the neighbours' factors times independent normal vectors has the mean of their covariances, singular or
        not. None seeds a fresh generator with 0.
        """
        n = _checks.integer("n", n, low=0)
        stream = torch.Generator(device=self.means.device).manual_seed(0) if generator is None else generator
        flat_means = self.means.reshape(-1, self.base.dim)
        flat = self.neighbours.reshape(len(flat_means), -1).tolist()
        found = self.means.new_empty(len(flat_means), n, self.base.dim)
        for place, (mean, numbers) in enumerate(zip(flat_means, flat, strict=True)):
            found[place] = mean
            for number in numbers:
                factor = self.base.factors[number].to(self.means)
                noise = torch.randn(n, len(factor), generator=stream, device=stream.device, dtype=factor.dtype).to(factor.device)
                found[place].addmm_(noise, factor, alpha=len(numbers) ** -0.5)
            self._disperse(found[place], stream)
        return found.reshape(*self.means.shape[:-1], n, self.base.dim)

    def _disperse(self, rows: Tensor, stream: torch.Generator) -> None:
        if self.alpha > 0:
            width = 1 if self.dispersion == "ones" else rows.shape[1]
            noise = torch.randn(len(rows), width, generator=stream, device=stream.device, dtype=rows.dtype)
            rows += self.alpha**0.5 * noise.to(rows.device)

    def to_dict(self) -> dict[str, Any]:
        """Neighbours by name, distances and means; the base statistics by their size."""
        names = [
            [self.base.labels[number] for number in row]
            for row in self.neighbours.reshape(self.means.numel() // self.base.dim, -1).tolist()
        ]
        return {
            "kind": "Calibrated",
            "version": self.version,
            "neighbours": [[name if isinstance(name, int | str) else repr(name) for name in row] for row in names],
            "distances": self.distances.reshape(len(names), -1).tolist(),
            "means": self.means.reshape(-1, self.base.dim).tolist(),
            "base_classes": len(self.base),
            "alpha": self.alpha,
            "dispersion": self.dispersion,
        }

    def _draw(self, ax: Any) -> None:
        distances = self.distances.reshape(-1, self.distances.shape[-1]).cpu().numpy()
        for place, row in enumerate(distances):
            ax.plot([place] * len(row), row, "o")
        ax.set_xlabel("support")
        ax.set_ylabel("distance to its nearest base classes")


def calibrate(
    support: Float[Tensor, "*supports d"], base: BaseStatistics, *, k: int = 2, alpha: float = 0.21, dispersion: Dispersion = "ones"
) -> Calibrated:
    """Blend each support with its nearest base classes.

    The mean is that of the support and the k nearest base means, all with equal weight; the covariance is the mean of the k
    covariances plus ``alpha``.

    Args:
        support: already transformed, ``(..., S, d)``.
        base: statistics of the base classes.
        k: neighbours, from 0 (the support alone) to all.
        alpha: dispersion.
        dispersion: ``"ones"`` as in the paper's code, or ``"identity"``.

    Raises:
        ValueError: another width, k out of range, alpha negative, values that are not finite.
    """
    if support.ndim < 2 or support.shape[-1] != base.dim:
        raise ValueError(f"support must have shape (..., S, {base.dim}), as wide as the base statistics, got {tuple(support.shape)}")
    k = _checks.integer("k", k, low=0)
    if k > len(base):
        raise ValueError(f"k={k} is more than the {len(base)} base classes")
    alpha = _checks.real("alpha", alpha, low=0.0)
    _checks.choice("dispersion", dispersion, ("ones", "identity"))
    if not torch.isfinite(support).all():
        raise ValueError("support holds NaN or infinity")
    support = support.detach()
    if k and bool((base.counts < 2).any()):
        single = base.labels[int((base.counts < 2).nonzero()[0, 0])]
        raise ValueError(f"base class {single!r} has one feature, and a covariance needs two: leave it out with base.without([...])")
    if not support.is_floating_point():
        support = support.to(base.dtype)
    support = support.float() if support.dtype in (torch.float16, torch.bfloat16) else support
    numbers, distances = _nearest_means(support, base, k)
    means = base.means.to(support)
    total = support + means[numbers].sum(-2)
    return Calibrated(numbers, distances, total / (k + 1), base, alpha, dispersion)


def _nearest_means(support: Tensor, base: BaseStatistics, k: int) -> tuple[Int[Tensor, "*supports k"], Tensor]:
    """The nearest base classes by one product around their centre, measured again by differences."""
    means = base.means.to(support.device, torch.float64)
    centre = means.mean(0)
    wide, around = support.double() - centre, means - centre
    squares = around.square().sum(-1) - 2.0 * wide @ around.mT
    numbers = squares.topk(k, largest=False).indices if k else squares[..., :0].long()
    exact = (support.double()[..., None, :] - means[numbers]).square().sum(-1)
    order = exact.argsort(dim=-1, stable=True)
    return numbers.gather(-1, order), exact.gather(-1, order).sqrt().to(support.dtype)
