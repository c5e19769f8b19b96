"""What the estimators give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from outlast._core._result import Result

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Estimate(Result):
    """An estimate at one neighbourhood size.

    Attributes:
        value: the dimension.
        se: its standard error over the anchors (delta method; the spread of local dimension is in it).
        k: neighbours, counted to the farthest.
        radius: mean distance to the k-th neighbour, in the data's units.
        low, high: 95 % bootstrap interval over anchors, where one was asked for.
    """

    value: float
    se: float
    k: int
    radius: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, repr=False)
class DimensionResult(Result):
    """Intrinsic dimension of a set of rows.

    Attributes:
        value, se, k, radius: those of the largest ``k``, the estimate with the smallest error.
        by_k: an ``Estimate`` for each ``k``.
        method: the estimator.
        biased: how its value is known to be off; empty where it is not.
        n: distinct rows that were searched.
        n_anchors: rows whose neighbourhoods were used.
        n_duplicates: exact copies found.
        n_excluded: anchors left out because of a neighbour at distance 0 (``duplicates="keep"``).
        near_duplicates: anchors whose nearest neighbour is less than 0.2 times as far as the second.
        reliable: whether ``value < 2 log2(n)``; beyond that neighbour methods underestimate, more so the higher.
        notes: conversions of the data.
    """

    value: float
    se: float
    k: int
    radius: float
    by_k: Mapping[int, Estimate]
    method: str
    biased: str
    n: int
    n_anchors: int
    n_duplicates: int
    n_excluded: int
    near_duplicates: int
    reliable: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ", ".join(f"k={k}: {e.value:.2f} (se {e.se:.2f})" for k, e in self.by_k.items())
        copies = f", {self.n_duplicates} exact copies" if self.n_duplicates else ""
        biased = f" [biased: {self.biased}]" if self.biased else ""
        trust = "" if self.reliable else "; beyond what this many rows can tell: an underestimate"
        return f"intrinsic dimension by {self.method}{biased}: {parts}; {self.n_anchors} anchors among {self.n} rows{copies}{trust}"

    def _draw(self, ax: Any) -> None:
        ks = list(self.by_k)
        ax.errorbar(ks, [e.value for e in self.by_k.values()], [1.96 * e.se for e in self.by_k.values()], marker="o")
        ax.set_xlabel("neighbours k")
        ax.set_ylabel(f"intrinsic dimension ({self.method})")


@dataclass(frozen=True, repr=False)
class ScaleCurve(Result):
    """Dimension against scale. A plateau is the only good evidence for one dimension.

    Attributes:
        method: ``"mackay"``, ``"decimation"`` or ``"gride"``.
        scale: what the scale is: neighbours ``k``, rows of the subsets, or the rank of the farther neighbour.
        scales, values, se, radius: one entry each, from the finest scale on; ``radius`` is a mean distance.
        plateau: whether the slope of ``ln d`` against ``ln radius`` stays below 0.05 over an octave of the radius.
        n: distinct rows.
    """

    method: str
    scale: str
    scales: tuple[int, ...]
    values: FloatArray
    se: FloatArray
    radius: FloatArray
    plateau: bool
    n: int

    def _draw(self, ax: Any) -> None:
        ax.errorbar(self.radius, self.values, 1.96 * self.se, marker="o")
        ax.set_xscale("log")
        ax.set_xlabel(f"mean distance (one point for each {self.scale})")
        ax.set_ylabel("intrinsic dimension")


@dataclass(frozen=True, repr=False)
class LocalPCAResult(Result):
    """Dimension by the spectra of neighbourhoods. It depends on the threshold, which is therefore part of it.

    Attributes:
        value: mean over anchors.
        median: median over anchors.
        se: standard error of the mean.
        values: one for each anchor.
        rule, threshold: how eigenvalues were counted.
        k: neighbours.
        n, n_anchors: rows and anchors.
    """

    value: float
    median: float
    se: float
    values: FloatArray
    rule: str
    threshold: float | None
    k: int
    n: int
    n_anchors: int

    def _draw(self, ax: Any) -> None:
        ax.hist(self.values, bins=30)
        ax.set_xlabel(f"local dimension (PCA, {self.rule}, threshold {self.threshold})")
        ax.set_ylabel("anchors")


@dataclass(frozen=True, repr=False)
class ComparisonResult(Result):
    """Dimensions of several sets, at one number of rows.

    Attributes:
        results: one ``DimensionResult`` for each name.
        n: rows of each set; None where they were not matched.
        ranking: names from the lowest dimension to the highest; None where numbers of rows differ, since the estimate
            depends on them.
        separated: pairs ``(lower, higher)`` whose difference is above 1.96 of its standard error.
    """

    results: Mapping[str, DimensionResult]
    n: int | None
    ranking: tuple[str, ...] | None
    separated: tuple[tuple[str, str], ...]

    def _draw(self, ax: Any) -> None:
        for name, result in self.results.items():
            values = list(result.by_k.values())
            ax.errorbar([e.k for e in values], [e.value for e in values], [1.96 * e.se for e in values], marker="o", label=name)
        ax.set_xlabel("neighbours k")
        ax.set_ylabel("intrinsic dimension")
        ax.legend()
