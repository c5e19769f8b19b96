"""scikit-learn's estimator protocol without scikit-learn: classifiers of this room work with it and without it."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from outlast.errors import NotFittedError


class EpisodeClassifier:
    """Base of classifiers that also take a leading dimension of episodes.

    ``X`` is ``(n, d)`` or ``(E, n, d)``, tensor or array; what comes out is of the same kind. Labels of the plain form are
    any integers or names; those of the batched form are integers. Subclasses implement ``_fit(X, y, classes)`` on tensors
    ``(E, n, d)`` with classes 0 to c - 1, and ``_decide(X)``.
    """

    takes_episodes = True
    _estimator_type = "classifier"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> Any:
        """Change some of the constructor's arguments.

        Raises:
            ValueError: an unknown one.
        """
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"invalid parameter {name!r} for {type(self).__name__}; valid: {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from outlast._core._extras import require

        utils: Any = require("sklearn.utils", extra="vision", purpose="scikit-learn's tags")
        tags = utils.Tags(
            estimator_type="classifier",
            target_tags=utils.TargetTags(required=True),
            classifier_tags=utils.ClassifierTags(),
            input_tags=utils.InputTags(),
        )
        return tags

    def __repr__(self) -> str:
        default = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = {name: value for name, value in self.get_params().items() if value is not default[name] and value != default[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    # ---- fitting -------------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any) -> Any:
        """Learn from supports.

        Args:
            X: ``(S, d)`` or ``(E, S, d)``.
            y: ``(S,)`` or ``(E, S)``.

        Raises:
            ValueError: shapes that do not fit, values that are not finite, one class alone, episodes with different numbers of
                classes.
            TypeError: X that holds no numbers.
        """
        self._keeps_tensors = isinstance(X, Tensor)
        self._device = X.device if isinstance(X, Tensor) else torch.device("cpu")
        given = _given(X)
        self._batched = given.ndim == 3
        rows = _numbers(given, self._batched)
        if self._batched:
            coded, self.classes_ = _episode_codes(y, rows.shape[:2])
            coded = coded.to(rows.device)
        else:
            coded, self.classes_ = _codes(y, len(rows))
            rows, coded = rows[None], coded.to(rows.device)[None]
        self.n_features_in_ = rows.shape[2]
        with torch.no_grad():
            self._fit(rows, coded, int(coded.max()) + 1)
        return self

    def _fit(self, X: Tensor, y: Tensor, classes: int) -> None:
        raise NotImplementedError

    def _decide(self, X: Tensor) -> Tensor:
        raise NotImplementedError

    # ---- predicting ----------------------------------------------------------------------------------------------------

    def _scores(self, X: Any) -> Tensor:
        if not hasattr(self, "classes_"):
            raise not_fitted(type(self).__name__)
        given = _given(X)
        if given.ndim != (3 if self._batched else 2):
            form = "(E, Q, d)" if self._batched else "(Q, d)"
            raise ValueError(f"Reshape your data: X must have shape {form} as in fit, got {tuple(given.shape)}")
        rows = _numbers(given, self._batched)
        if self._batched and len(rows) != len(self.classes_):
            raise ValueError(f"X has {len(rows)} episodes, fit saw {len(self.classes_)}")
        self._device = rows.device
        if rows.shape[-1] != self.n_features_in_:
            raise ValueError(
                f"X has {rows.shape[-1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features as input"
            )
        with torch.no_grad():
            return self._decide(rows if self._batched else rows[None])

    def _out(self, values: Tensor) -> Any:
        values = values if self._batched else values[0]
        return values.to(self._device) if self._keeps_tensors else values.cpu().numpy()

    def decision_function(self, X: Any) -> Any:
        """Scores of each class, ``(Q, c)`` or ``(E, Q, c)``; of two classes in the plain form the difference, ``(Q,)``."""
        scores = self._scores(X)
        if not self._batched and scores.shape[2] == 2:
            scores = scores[..., 1] - scores[..., 0]
        return self._out(scores)

    def predict_proba(self, X: Any) -> Any:
        """Softmax of the scores, ``(Q, c)`` or ``(E, Q, c)``."""
        return self._out(torch.softmax(self._scores(X), -1))

    def predict(self, X: Any) -> Any:
        """Class of each row, named as in ``fit``."""
        best = self._scores(X).argmax(-1).cpu()
        if self._batched:
            return self._out(self._classes_tensor().gather(1, best))
        names = self.classes_
        if isinstance(names, Tensor):
            return names[best[0]]
        found = names[best[0].numpy()]
        return torch.from_numpy(found).to(self._device) if self._keeps_tensors and found.dtype.kind in "iub" else found

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy."""
        found, truth = (np.asarray(v.cpu() if isinstance(v, Tensor) else v).reshape(-1) for v in (self.predict(X), y))
        if len(found) != len(truth):
            raise ValueError(f"Found input variables with inconsistent numbers of samples: {len(found)}, {len(truth)}")
        weights = None if sample_weight is None else np.asarray(sample_weight).reshape(-1)
        return float(np.average(found == truth, weights=weights))

    def _classes_tensor(self) -> Tensor:
        return self.classes_ if isinstance(self.classes_, Tensor) else torch.as_tensor(self.classes_)


def not_fitted(name: str) -> NotFittedError:
    """The package's error, which is also scikit-learn's own where that is loaded."""
    message = f"this {name} is not fitted yet: call fit() first"
    module: Any = sys.modules.get("sklearn.exceptions")
    if module is None:
        return NotFittedError(message)
    kind: Any = type("NotFittedError", (NotFittedError, module.NotFittedError), {})
    return kind(message)


def _given(X: Any) -> Any:
    """A tensor as it is, anything else as an array."""
    if isinstance(X, Tensor):
        return X
    if hasattr(X, "toarray"):
        raise TypeError("Sparse data was passed, but dense data is required: use X.toarray()")
    return np.asarray(X)


def _numbers(X: Any, batched: bool) -> Tensor:
    """Rows as a floating tensor ``(..., n, d)``, checked."""
    if isinstance(X, Tensor):
        rows = X
    else:
        array = np.asarray(X)
        if array.dtype.kind == "c":
            raise ValueError("Complex data not supported")
        if array.dtype.kind not in "fiub":
            array = array.astype(np.float64)
        rows = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    if rows.is_complex():
        raise ValueError("Complex data not supported")
    if rows.ndim != (3 if batched else 2):
        raise ValueError(f"Reshape your data: X must have shape (n, d) or (E, n, d), got {tuple(rows.shape)}")
    if rows.shape[-2] == 0 or rows.shape[0] == 0:
        raise ValueError(f"Found array with 0 sample(s) (shape={tuple(rows.shape)}) while a minimum of 1 is required.")
    if rows.shape[-1] == 0:
        raise ValueError(f"Found array with 0 feature(s) (shape={tuple(rows.shape)}) while a minimum of 1 is required.")
    if not rows.is_floating_point():
        rows = rows.double() if not isinstance(X, Tensor) else rows.float()
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    if not torch.isfinite(rows).all():
        raise ValueError("Input X contains NaN or infinity")
    return rows.detach()


def _codes(y: Any, rows: int) -> tuple[Tensor, Any]:
    """Classes as 0 to c - 1, with their sorted names."""
    if y is None:
        raise ValueError("requires y to be passed, but the target y is None")
    if isinstance(y, Tensor):
        y = y.cpu().numpy()
    array = np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1:
        import warnings

        from outlast._core._extras import require

        exceptions: Any = require("sklearn.exceptions", extra="vision", purpose="a column of labels")
        warnings.warn("A column-vector y was passed when a 1d array was expected.", exceptions.DataConversionWarning, stacklevel=4)
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"y should be a 1d array, got an array of shape {array.shape} instead.")
    if len(array) != rows:
        raise ValueError(f"Found input variables with inconsistent numbers of samples: {rows}, {len(array)}")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError("Input y contains NaN or infinity")
        if (array != np.floor(array)).any():
            raise ValueError("Unknown label type: continuous. y must hold classes")
    classes, coded = np.unique(array, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y holds one class alone ({classes[0]!r}): a classifier can't train when only one class is present")
    return torch.from_numpy(np.asarray(coded)).reshape(-1), classes


def _episode_codes(y: Any, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The same for each episode; all must have equally many classes."""
    labels = y.cpu() if isinstance(y, Tensor) else torch.as_tensor(np.asarray(y))
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels of batched episodes must be integers, got {labels.dtype}")
    if labels.shape != shape:
        raise ValueError(f"y must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    classes: list[Tensor] = []
    coded: list[Tensor] = []
    for number, own in enumerate(labels):
        names, codes = own.unique(return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"episode {number} holds one class alone")
        if classes and len(names) != len(classes[0]):
            raise ValueError(f"episode {number} has {len(names)} classes, the ones before it {len(classes[0])}; fit them apart")
        classes.append(names)
        coded.append(codes)
    return torch.stack(coded), torch.stack(classes)
