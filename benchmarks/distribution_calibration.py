"""Distribution calibration and its parts against the authors' way: numpy's sampler and scikit-learn, episode by episode.

The authors' code is no package; the loop below follows its description: distances in Python, one ``multivariate_normal`` (a
singular value decomposition) for each support, one scikit-learn fit in float64.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from benchmarks._harness import Row, medians, write
from outlast.fewshot import BaseStatistics, DistributionCalibration, EpisodeSampler, SGDLinearClassifier


def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base rows and labels, novel rows and labels, 640 wide, not negative."""
    stream = torch.Generator().manual_seed(0)

    def draw(classes: int, each: int) -> tuple[torch.Tensor, torch.Tensor]:
        means = 0.2 + 0.2 * torch.randn(classes, 640, generator=stream)
        rows = torch.relu(means.repeat_interleave(each, 0) + 0.3 * torch.randn(classes * each, 640, generator=stream))
        return rows, torch.arange(classes).repeat_interleave(each)

    return *draw(64, 600), *draw(20, 40)


def _official(means: np.ndarray, covariances: np.ndarray, support: np.ndarray, query: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    support, query = support**0.5, query**0.5
    rows, labels = [support], [np.arange(5)]
    for label, own in enumerate(support):
        distances = [np.linalg.norm(own - mean) for mean in means]
        near = np.argpartition(distances, 2)[:2]
        mean = np.concatenate([means[near], own[None]]).mean(0)
        rows.append(rng.multivariate_normal(mean, covariances[near].mean(0) + 0.21, 750))
        labels.append(np.full(750, label))
    return LogisticRegression(max_iter=1000).fit(np.concatenate(rows), np.concatenate(labels)).predict(query)


def _calibration() -> list[Row]:
    base_rows, base_labels, rows, labels = features()
    base = BaseStatistics.from_features(base_rows, base_labels)
    wide = base_rows.double().numpy().reshape(64, 600, 640)
    means, covariances = wide.mean(1), np.stack([np.cov(own.T) for own in wide])
    count = 8
    sampler = EpisodeSampler(labels, 5, 1, 15, episodes=count)
    support, query = sampler.batch(0, count)
    X, Q, y = rows[support], rows[query], sampler.support_labels.expand(count, -1)
    rng = np.random.default_rng(0)

    def official() -> None:
        for episode in range(count):
            _official(means, covariances, X[episode].double().numpy(), Q[episode].double().numpy(), rng)

    def ours(**settings: str) -> None:
        DistributionCalibration(base, **settings).fit(X, y).predict(Q)

    def many() -> None:  # 16 times as many: the covariances of the base classes are formed once
        DistributionCalibration(base, head="lda").fit(X.repeat(16, 1, 1), y.repeat(16, 1)).predict(Q.repeat(16, 1, 1))

    rivals = {"official": official, "factor": ours, "bank": lambda: ours(sampler="bank"), "lda": many}
    found = {name: value / count for name, value in medians(rivals, repeats=3, warmup=1).items()}
    found["lda"] /= 16
    name = "an episode, d = 640, 64 base classes x 600, 5-way 1-shot, 750 samples"
    rows_out = [Row(name, "numpy and scikit-learn, one by one", found["official"])]
    for key, title, target in (("factor", "outlast", 4), ("bank", "outlast, sampler='bank'", 4), ("lda", "outlast, head='lda'", 50)):
        ratio = found["official"] / found[key]
        rows_out.append(Row(name, title, found[key], ratio, f">= {target} x faster", ratio >= target))
    return rows_out


def _linear() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    X, y = torch.randn(64, 25, 512, generator=stream), torch.arange(5).repeat_interleave(5).expand(64, -1)

    def one_by_one() -> None:
        for episode in range(8):
            layer = torch.nn.Linear(512, 5)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3)
            for _ in range(100):
                for index in torch.randperm(25).split(4):
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(layer(X[episode, index]), y[episode, index]).backward()
                    optimizer.step()

    found = medians({"one": one_by_one, "ours": lambda: SGDLinearClassifier().fit(X, y)}, repeats=3, warmup=1)
    one, ours = found["one"] / 8, found["ours"] / 64
    name = "linear evaluation of an episode, d = 512, 5-way 5-shot, 700 steps"
    return [
        Row(name, "torch.optim.SGD, one by one", one),
        Row(name, "outlast, 64 episodes at once", ours, one / ours, ">= 8 x faster", one / ours >= 8),
    ]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write("distribution_calibration", [*_calibration(), *_linear()])
