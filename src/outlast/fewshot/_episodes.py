"""Episodes: small classification tasks drawn from labelled features, and how well a classifier does on many of them.

The protocol of few-shot learning: each episode draws ``way`` classes, ``shot`` labelled support samples and ``query`` test
samples of each. All methods are compared on the same episodes, so that their differences are paired.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from outlast._core import _checks
from outlast._core._batches import call_with
from outlast._core._norm import eval_mode
from outlast._core._random import generator
from outlast._core._result import Result
from outlast._core._typing import Float, Int

_Z = 1.96


@dataclass(frozen=True, repr=False)
class FewShotResult(Result):
    """Accuracy over episodes, in [0, 1].

    Attributes:
        accuracy: mean over episodes.
        ci95: half-width ``1.96 * std / sqrt(E)``, with the population standard deviation over the E episodes.
        per_episode: float64 ``(E,)``.
        way: classes of an episode.
        shot: labelled samples of each class.
        query: test samples of each class.
        seed: of the episodes.
    """

    accuracy: float
    ci95: float
    per_episode: Tensor
    way: int
    shot: int
    query: int
    seed: int

    def minus(self, other: FewShotResult) -> FewShotResult:
        """The paired difference to another result on the same episodes; ``accuracy`` and ``ci95`` are those of the difference.

        Raises:
            ValueError: the episodes are not the same.
        """
        own = (self.way, self.shot, self.query, self.seed, len(self.per_episode))
        others = (other.way, other.shot, other.query, other.seed, len(other.per_episode))
        if own != others:
            raise ValueError(f"only results on the same episodes (way, shot, query, seed, number) can be paired: {own} and {others}")
        return summary(self.per_episode - other.per_episode, self.way, self.shot, self.query, self.seed)

    def __repr__(self) -> str:
        return (
            f"FewShotResult({100 * self.accuracy:.2f} % +- {100 * self.ci95:.2f}, {self.way}-way {self.shot}-shot, "
            f"{len(self.per_episode)} episodes)"
        )

    def _draw(self, ax: Any) -> None:
        ax.hist(100.0 * self.per_episode.numpy(), bins=20)
        ax.axvline(100.0 * self.accuracy, color="black")
        ax.set_xlabel(f"accuracy of an episode (%), {self.way}-way {self.shot}-shot")
        ax.set_ylabel("episodes")


def summary(values: Float[Tensor, " episodes"], way: int, shot: int, query: int, seed: int) -> FewShotResult:
    """Mean and half-width of values over episodes."""
    values = values.detach().double().cpu()
    half = _Z * float(values.std(correction=0)) / math.sqrt(len(values))
    return FewShotResult(float(values.mean()), half, values, way, shot, query, seed)


class EpisodeSampler:
    """Index tensors of episodes; each is a function of (seed, number) alone, so any can be drawn again on its own.

    Classes are drawn uniformly without replacement, and so are samples inside a class. Samples are in the order of their
    class: ``0 0 0 1 1 1 ...``, which ``support_labels`` and ``query_labels`` say.

    Args:
        labels: class of each sample, ``(N,)``; any integers.
        way: classes of an episode.
        shot: support samples of each.
        query: query samples of each.
        episodes: how many.
        seed: of all of them.

    Raises:
        ValueError: fewer classes than ``way``, or a class with fewer than ``shot + query`` samples (named).
        TypeError: labels that are no integers.
    """

    def __init__(self, labels: Any, way: int = 5, shot: int = 1, query: int = 15, episodes: int = 600, seed: int = 0) -> None:
        self.way = _checks.integer("way", way, low=2)
        self.shot = _checks.integer("shot", shot, low=1)
        self.query = _checks.integer("query", query, low=1)
        self.episodes = _checks.integer("episodes", episodes, low=1)
        self.seed = _checks.integer("seed", seed, low=0)
        values = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels).cpu()
        if values.ndim != 1:
            raise ValueError(f"labels must have shape (N,), got {tuple(values.shape)}")
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {values.dtype}")
        order = values.argsort(stable=True)
        self.classes, counts = values.unique(return_counts=True)
        if len(self.classes) < self.way:
            raise ValueError(f"{self.way}-way episodes need at least {self.way} classes, the labels hold {len(self.classes)}")
        few = (counts < self.shot + self.query).nonzero()[:, 0].tolist()
        if few:
            name, count = int(self.classes[few[0]]), int(counts[few[0]])
            raise ValueError(
                f"class {name} has {count} samples, {self.shot} support and {self.query} query samples need {self.shot + self.query} "
                f"({len(few)} such classes); leave them out, or lower shot or query"
            )
        self._members = order.split(counts.tolist())

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.episodes):
            yield self[number]

    def __getitem__(self, number: int) -> tuple[Int[Tensor, " support"], Int[Tensor, " query"]]:
        """Support and query indices of one episode, ``(way * shot,)`` and ``(way * query,)``."""
        if not 0 <= number < self.episodes:
            raise IndexError(f"episode {number} of {self.episodes}")
        stream = generator(self.seed, "episode", number)
        support: list[Tensor] = []
        query: list[Tensor] = []
        for own in torch.randperm(len(self.classes), generator=stream)[: self.way].tolist():
            members = self._members[own]
            drawn = members[torch.randperm(len(members), generator=stream)[: self.shot + self.query]]
            support.append(drawn[: self.shot])
            query.append(drawn[self.shot :])
        return torch.cat(support), torch.cat(query)

    def batch(self, start: int, stop: int) -> tuple[Int[Tensor, "episodes support"], Int[Tensor, "episodes query"]]:
        """Several episodes at once, ``(E, way * shot)`` and ``(E, way * query)``."""
        pairs = [self[number] for number in range(start, min(stop, self.episodes))]
        return torch.stack([support for support, _ in pairs]), torch.stack([query for _, query in pairs])

    @property
    def support_labels(self) -> Int[Tensor, " support"]:
        """Classes 0 to ``way - 1`` of the support samples of any episode."""
        return torch.arange(self.way).repeat_interleave(self.shot)

    @property
    def query_labels(self) -> Int[Tensor, " query"]:
        """The same of query samples."""
        return torch.arange(self.way).repeat_interleave(self.query)


def embed(
    backbone: nn.Module,
    loader: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    amp_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Features of a frozen network for all of a loader, once: what every episode then draws from.

    Args:
        backbone: run in eval mode without gradient; its flags are restored. Outputs are flattened to ``(batch, d)``.
        loader: batches ``(inputs, labels)``.
        device: where inputs go; None for where the backbone's parameters are.
        amp_dtype: run under autocast with this type; features are float32 in any case.
        out: place for the features, ``(n, d)``, for instance a memory map as a tensor; None makes one on the CPU.

    Returns:
        Features and labels on the CPU.

    Raises:
        ValueError: no batches, batches without labels, ``out`` too small.
    """
    first = next(iter(backbone.parameters()), None)
    place = torch.device(device) if device is not None else (first.device if first is not None else torch.device("cpu"))
    parts: list[Tensor] = []
    labels: list[Tensor] = []
    filled = 0
    with eval_mode(backbone), torch.no_grad():
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise ValueError("embed() takes batches (inputs, labels); a loader of inputs alone has no labels")
            with torch.autocast(place.type, amp_dtype, enabled=amp_dtype is not None):
                features = call_with(backbone, batch[0].to(place))
            features = features.flatten(1).float().cpu()
            labels.append(torch.as_tensor(batch[1]).cpu())
            if out is None:
                parts.append(features)
                continue
            if filled + len(features) > len(out):
                raise ValueError(f"out holds {len(out)} rows, the loader gives more")
            out[filled : filled + len(features)] = features
            filled += len(features)
    if not labels:
        raise ValueError("the loader gave no batches: there is nothing to embed")
    return (torch.cat(parts) if out is None else out[:filled]), torch.cat(labels)


def evaluate_episodes(
    estimator: Any,
    features: Any,
    labels: Any,
    *,
    way: int = 5,
    shot: int = 1,
    query: int = 15,
    episodes: int = 600,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> FewShotResult:
    """Mean accuracy of a classifier over episodes, with its confidence interval.

    Estimators of this package take a batch of episodes at once; any other scikit-learn classifier is fitted on one after
    another. Memory is that of one batch of episodes. Every estimator sees the same episodes for the same seed.

    Args:
        estimator: with ``fit(X, y)`` and ``predict(X)``; a copy of it is fitted.
        features: ``(N, d)``, tensor or array.
        labels: ``(N,)``, integers.
        way: classes of an episode.
        shot: support samples of each.
        query: query samples of each.
        episodes: how many.
        seed: of the episodes.
        batch_size: episodes at a time.
        progress: called with (done, all) after each batch.

    Raises:
        ValueError: as ``EpisodeSampler``, or features that are not finite or not as many as labels.
    """
    rows = torch.as_tensor(features) if not isinstance(features, Tensor) else features
    if rows.ndim != 2:
        raise ValueError(f"features must have shape (N, d), got {tuple(rows.shape)}")
    if not torch.isfinite(rows).all():
        raise ValueError("features hold NaN or infinity")
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    sampler = EpisodeSampler(labels, way, shot, query, episodes, seed)
    if len(rows) != len(labels):
        raise ValueError(f"features are {len(rows)} rows and labels {len(labels)}")
    batch_size = _checks.integer("batch_size", batch_size, low=1)
    batched = bool(getattr(estimator, "takes_episodes", False))
    hits: list[Tensor] = []
    truth = sampler.query_labels
    for start in range(0, episodes, batch_size):
        support, queries = sampler.batch(start, start + batch_size)
        own = sampler.support_labels.expand(len(support), -1)
        if batched:
            fitted = copy.copy(estimator)
            if hasattr(fitted, "first_episode"):
                fitted.first_episode = start  # noise is a function of the episode's number, whatever the batch
            found = fitted.fit(rows[support], own.to(rows.device)).predict(rows[queries]).cpu()
        else:
            found = torch.stack([_one(estimator, rows[s], sampler.support_labels, rows[q]) for s, q in zip(support, queries, strict=True)])
        hits.append((found == truth).double().mean(1))
        if progress is not None:
            progress(min(start + batch_size, episodes), episodes)
    return summary(torch.cat(hits), way, shot, query, seed)


def _one(estimator: Any, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    fitted = copy.deepcopy(estimator).fit(support.cpu().numpy(), labels.numpy())
    return torch.as_tensor(np.asarray(fitted.predict(query.cpu().numpy())))
