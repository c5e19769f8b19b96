"""Few-shot classification by calibrated distributions in a scikit-learn pipeline (extra vision)."""

import numpy as np
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from outlast.fewshot import BaseStatistics, DistributionCalibration

draws = np.random.default_rng(0)
means = draws.gamma(2.0, 1.0, (30, 64))  # features after a ReLU, of 30 classes with many examples each


def features(classes, each):
    labels = np.repeat(classes, each)
    return np.abs(means[labels] + 1.5 * draws.standard_normal((len(labels), 64))), labels


base, base_labels = features(np.arange(25), 100)
statistics = BaseStatistics.from_features(base, base_labels, tukey=0.5)
novel, labels = features(np.arange(25, 30), 20)

model = make_pipeline(
    FunctionTransformer(np.nan_to_num),
    DistributionCalibration(statistics, base_tukey=True, random_state=0),
)
one_of_each = [np.flatnonzero(labels == c)[0] for c in range(25, 30)]
rest = np.setdiff1d(np.arange(len(labels)), one_of_each)
model.fit(novel[one_of_each], labels[one_of_each])
print(f"accuracy with one example of each new class: {model.score(novel[rest], labels[rest]):.2f}")
print(f"five folds of all: {cross_val_score(model, novel, labels, cv=5).mean():.2f}")
