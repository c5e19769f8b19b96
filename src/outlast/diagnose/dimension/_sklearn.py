"""The scikit-learn estimator. This module needs the extra ``vision``; it is imported when ``Estimator`` is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from outlast._core._extras import require
from outlast.diagnose.dimension._estimate import estimate, local
from outlast.diagnose.dimension._likelihood import LEAST_K

_base: Any = require("sklearn.base", extra="vision", purpose="dimension.Estimator")
_validation: Any = require("sklearn.utils.validation", extra="vision", purpose="dimension.Estimator")


class Estimator(_base.BaseEstimator):
    """``outlast.diagnose.dimension.estimate`` as a scikit-learn estimator.

    Args:
        method: as in ``estimate``.
        k: neighbours; lowered to what a small data set has, with the value used in ``k_``.
        random_state: of anchors.

    Attributes:
        dimension_: the estimate.
        dimension_se_: its standard error.
        dimension_pw_: dimension around each row.
        k_: neighbours used.
        result_: the whole result.
    """

    def __init__(self, method: str = "mackay", k: int = 20, random_state: int | None = 0) -> None:
        self.method = method
        self.k = k
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Estimator:
        """Estimate the dimension of ``X``, shape ``(n_samples, n_features)``."""
        rows = _validation.validate_data(self, X, ensure_min_samples=4, dtype=[np.float64, np.float32])
        distinct = len(np.unique(rows, axis=0))
        method: Any = self.method
        self.k_ = max(LEAST_K.get(method, 2), min(self.k, distinct - 1)) if isinstance(self.k, int) else self.k
        self.result_ = estimate(rows, method, self.k_, seed=0 if self.random_state is None else self.random_state)
        self.dimension_ = self.result_.value
        self.dimension_se_ = self.result_.se
        self.dimension_pw_ = local(rows, self.k_).cpu().numpy()
        return self
