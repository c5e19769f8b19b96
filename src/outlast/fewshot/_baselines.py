"""Classifiers that calibration must beat, on tensors of episodes: nearest mean, and logistic regression on transformed features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from outlast._core import _checks
from outlast.fewshot._logistic import batched_logistic_regression
from outlast.fewshot._sklearn import EpisodeClassifier
from outlast.fewshot._transform import Negative, tukey_transform

Normalize = Literal["l2"]


def prepared(x: Tensor, tukey: float, negative: Negative, normalize: str | None) -> Tensor:
    """Features through the power transform and, if asked, to length 1."""
    x = tukey_transform(x, tukey, negative=negative)
    return torch.nn.functional.normalize(x, dim=-1) if normalize == "l2" else x


class NearestMean(EpisodeClassifier):
    """The class whose mean support is nearest, after a transform (prototypes; Snell et al. 2017 without training).

    Args:
        tukey: power of the transform, 1 for none.
        negative: as in ``tukey_transform``.
        normalize: ``"l2"`` brings features to length 1.
    """

    def __init__(self, tukey: float = 1.0, negative: Negative = "raise", normalize: Normalize | None = None) -> None:
        self.tukey = tukey
        self.negative: Negative = negative
        self.normalize = normalize

    def _fit(self, X: Tensor, y: Tensor, classes: int) -> None:
        rows = prepared(X, self.tukey, self.negative, self.normalize)
        members = torch.nn.functional.one_hot(y, classes).to(rows.dtype)
        self.means_ = members.mT @ rows / members.sum(1)[..., None]

    def _decide(self, X: Tensor) -> Tensor:
        rows = prepared(X, self.tukey, self.negative, self.normalize)
        means = self.means_.to(rows)
        return 2.0 * rows @ means.mT - means.square().sum(-1)[:, None]


class LogisticClassifier(EpisodeClassifier):
    """L2-regularised logistic regression on transformed features, for one problem or a batch of episodes.

    Args:
        C: inverse strength of the penalty on the sum of losses.
        tukey: power of the transform, 1 for none.
        negative: as in ``tukey_transform``.
        normalize: ``"l2"`` brings features to length 1.
        tol: of the gradient's largest entry.
        max_iter: most iterations.
    """

    def __init__(
        self,
        C: float = 1.0,
        tukey: float = 1.0,
        negative: Negative = "raise",
        normalize: Normalize | None = None,
        tol: float = 1e-4,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.tukey = tukey
        self.negative: Negative = negative
        self.normalize = normalize
        self.tol = tol
        self.max_iter = max_iter

    def _fit(self, X: Tensor, y: Tensor, classes: int) -> None:
        if self.normalize is not None:
            _checks.choice("normalize", self.normalize, ("l2",))
        rows = prepared(X, self.tukey, self.negative, self.normalize)
        fit = batched_logistic_regression(rows, y, num_classes=classes, C=self.C, tol=self.tol, max_iter=self.max_iter)
        self._weight, self._bias = fit.weight, fit.bias
        self.coef_, self.intercept_ = self._out(fit.weight), self._out(fit.bias)
        self.n_iter_, self.converged_ = fit.n_iter, fit.converged

    def _decide(self, X: Tensor) -> Tensor:
        rows = prepared(X, self.tukey, self.negative, self.normalize)
        return rows @ self._weight.to(rows).mT + self._bias.to(rows)[:, None]


_BASELINES: dict[str, Any] = {
    "nearest mean": NearestMean(),
    "logistic": LogisticClassifier(),
    "logistic, Tukey": LogisticClassifier(tukey=0.5),
    "logistic, L2": LogisticClassifier(normalize="l2"),
    "logistic, Tukey and L2": LogisticClassifier(tukey=0.5, normalize="l2"),
}


def fewshot_baselines(X_s: Any, y_s: Any, X_q: Any, *, negative: Negative = "raise") -> dict[str, Any]:
    """Predictions of the simple classifiers for one problem or a batch of episodes: a gain is never quoted without them.

    Args:
        X_s: supports, ``(S, d)`` or ``(E, S, d)``.
        y_s: their classes.
        X_q: queries, ``(Q, d)`` or ``(E, Q, d)``.
        negative: as in ``tukey_transform``.

    Returns:
        For each classifier (nearest mean; logistic regression on raw, Tukey, L2, Tukey and L2 features) its predictions.
    """
    found: dict[str, Any] = {}
    for name, model in _BASELINES.items():
        own = type(model)(**{**model.get_params(), "negative": negative})
        found[name] = own.fit(X_s, y_s).predict(X_q)
    return found
