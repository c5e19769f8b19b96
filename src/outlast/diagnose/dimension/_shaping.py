"""Dimension as something to train on, to stream, and to make data with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core import _checks
from outlast._core._distributed import gather, world_size
from outlast._core._random import derived_seed, generator
from outlast._core._typing import Float
from outlast.diagnose.dimension._estimate import estimate
from outlast.diagnose.dimension._results import DimensionResult


def regularizer(features: Float[Tensor, "n ..."], k: int = 10) -> Float[Tensor, ""]:
    """The ``mackay`` estimate of a batch, differentiable through the distances.

    Args:
        features: shape ``(n, ...)``, more than ``k`` rows; with a gradient it shapes the features.
        k: neighbours.

    Returns:
        0-dim. Rows at distance 0 from their nearest neighbour are left out.

    Raises:
        ValueError: ``k`` below 2, no more than ``k`` rows, or copies everywhere.
    """
    k = _checks.integer("k", k, low=2)
    if len(features) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} rows, got {len(features)}")
    x = features.reshape(len(features), -1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.no_grad():
        centred = x - x.mean(0)
        distances = torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist")
        distances.fill_diagonal_(math.inf)
        index = distances.topk(k, largest=False).indices
    # only the neighbours carry a gradient; measured by differences, whose gradient is exact
    squares = (x[:, None] - x[index]).square().sum(2)
    usable = (squares > 0).all(1)
    if not bool(usable.any()):
        raise ValueError("every row has an exact copy among its neighbours, so there is no dimension to estimate")
    logs = 0.5 * squares[usable].log()
    logs = logs.sort(1).values
    sums = (k - 1) * logs[:, -1] - logs[:, :-1].sum(1)
    return (k - 1) / sums.mean()


class Regularizer(nn.Module):
    """``regularizer`` as a module."""

    def __init__(self, k: int = 10) -> None:
        super().__init__()
        self.k = _checks.integer("k", k, low=2)

    def forward(self, features: Tensor) -> Tensor:
        """The dimension of a batch of features."""
        return regularizer(features, self.k)

    def extra_repr(self) -> str:
        """Settings."""
        return f"k={self.k}"


class Metric:
    """Dimension of features that stream by, over an epoch.

    ```python
    metric = Metric(k=(5, 20), max_samples=5000)
    for batch in loader:
        metric.update(features(batch))
    print(metric.compute())
    metric.reset()
    ```

    A reservoir keeps a uniform sample of ``max_samples`` rows of all that came, whatever their number.

    Args:
        max_samples: rows kept.
        seed: of the reservoir.
        **settings: of ``estimate``.

    Raises:
        ValueError, TypeError: ``max_samples`` below 3; in ``compute``, settings that ``estimate`` refuses.
    """

    def __init__(self, max_samples: int = 5000, *, seed: int = 0, **settings: Any) -> None:
        self.max_samples = _checks.integer("max_samples", max_samples, low=3)
        self.seed = _checks.integer("seed", seed, low=0)
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget all rows; the next epoch draws the same places."""
        self._rng = generator(self.seed, "dimension.metric")
        self._rows: Tensor | None = None
        self._seen = 0

    def update(self, features: Tensor) -> None:
        """Take in a batch, shape ``(n, ...)``."""
        batch = features.detach().reshape(len(features), -1)
        if self._rows is None:
            self._rows = batch.new_empty(0, batch.shape[1])
        if batch.shape[1] != self._rows.shape[1]:
            raise ValueError(f"features have {batch.shape[1]} values a row, earlier ones had {self._rows.shape[1]}")
        free = self.max_samples - len(self._rows)
        if free > 0:
            self._rows = torch.cat([self._rows, batch[:free]])
            self._seen += min(free, len(batch))
            batch = batch[free:]
        for row in batch:
            self._seen += 1
            place = int(torch.randint(0, self._seen, (), generator=self._rng))
            if place < self.max_samples:
                self._rows[place] = row

    def compute(self) -> DimensionResult:
        """The estimate on the rows kept; under ``torch.distributed``, on a sample of the rows of all processes, which must all call this.

        Raises:
            ValueError: no rows yet, or too few.
        """
        rows = self._rows if world_size() == 1 else self._of_all()
        if rows is None:
            raise ValueError("no features yet: call update() first")
        return estimate(rows, seed=self.seed, **self._settings)

    def _of_all(self) -> Tensor | None:
        """A uniform sample of ``max_samples`` rows of all that came anywhere: each process's sample in proportion to what it saw."""
        found = gather((self._seen, None if self._rows is None else self._rows.cpu()))
        parts = [(seen, rows) for seen, rows in found if rows is not None]
        if not parts:
            return None
        seen = [count for count, _ in parts]
        draws = np.random.default_rng(derived_seed(self.seed, "dimension.metric.processes"))
        shares = draws.multivariate_hypergeometric(seen, self.max_samples) if sum(seen) > self.max_samples else seen
        chosen = [rows[draws.permutation(len(rows))[:share]] for share, (_, rows) in zip(shares, parts, strict=True)]
        whole = torch.cat(chosen)
        return whole if self._rows is None else whole.to(self._rows.device)


def synthetic_images(d: int, n: int, size: Sequence[int] = (3, 32, 32), seed: int = 0) -> Float[Tensor, "n ..."]:
    """Images in (0, 1) that lie on a smooth surface of known dimension.

    ``sigmoid(2 tanh(gelu(1.5 z W1) W2) W3)`` with ``z ~ N(0, I_d)`` and fixed random matrices of width 256.

    Args:
        d: dimension, at least 1.
        n: images.
        size: shape of one image.
        seed: of everything.

    Returns:
        float32, shape ``(n, *size)``.
    """
    return synthetic_pairs(d, n, size, seed)[0]


def synthetic_pairs(d: int, n: int, size: Sequence[int] = (3, 32, 32), seed: int = 0, *, width: int = 256) -> tuple[Tensor, Tensor]:
    """The images of ``synthetic_images`` with their ``z``, shape ``(n, d)``."""
    d, n = _checks.integer("d", d, low=1), _checks.integer("n", n, low=1)
    shape = tuple(_checks.integer("size", length, low=1) for length in size)
    weights = generator(seed, "dimension.synthetic.weights")
    w1 = torch.randn(d, width, generator=weights) / math.sqrt(d)
    w2 = torch.randn(width, width, generator=weights) / math.sqrt(width)
    w3 = torch.randn(width, math.prod(shape), generator=weights) / math.sqrt(width)
    z = torch.randn(n, d, generator=generator(seed, "dimension.synthetic.latent"))
    images = torch.sigmoid(2.0 * torch.tanh(F.gelu(1.5 * z @ w1) @ w2) @ w3)
    return images.view(n, *shape), z
