"""Intrinsic dimension of data and features: how many numbers it takes to describe them.

Pope, Zhu, Abdelkader, Goldblum, Goldstein, "The Intrinsic Dimension of Images and Its Impact on Learning", ICLR 2021, with
the corrected normalisation, standard errors, and further estimators. Every neighbour method underestimates when there are
few rows for the dimension; compare sets at equal N and k.
"""

from typing import TYPE_CHECKING, Any

from outlast.diagnose.dimension._estimate import (
    by_class,
    by_layer,
    compare,
    estimate,
    from_distances,
    gride,
    knn,
    local,
    local_pca,
    scales,
    twonn,
)
from outlast.diagnose.dimension._results import ComparisonResult, DimensionResult, Estimate, LocalPCAResult, ScaleCurve
from outlast.diagnose.dimension._shaping import Metric, Regularizer, regularizer, synthetic_images

if TYPE_CHECKING:
    from outlast.diagnose.dimension._sklearn import Estimator

__all__ = [
    "ComparisonResult",
    "DimensionResult",
    "Estimate",
    "Estimator",
    "LocalPCAResult",
    "Metric",
    "Regularizer",
    "ScaleCurve",
    "by_class",
    "by_layer",
    "compare",
    "estimate",
    "from_distances",
    "gride",
    "knn",
    "local",
    "local_pca",
    "regularizer",
    "scales",
    "synthetic_images",
    "twonn",
]


def __getattr__(name: str) -> Any:
    if name == "Estimator":  # its base class comes from an extra
        from outlast.diagnose.dimension._sklearn import Estimator

        return Estimator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
