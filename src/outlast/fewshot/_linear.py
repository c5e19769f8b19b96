"""The linear evaluation of STARTUP and BSCD-FSL: a linear layer trained by SGD on each episode's supports, all episodes at once.

Phoo, Hariharan, ICLR 2021, section 4, with the settings of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from outlast._core import _checks, _random
from outlast.fewshot._sklearn import EpisodeClassifier


class SGDLinearClassifier(EpisodeClassifier):
    """A linear layer trained by SGD with momentum and dampening, in random batches of a few supports.

    Initial weights and orders are functions of ``random_state`` and of the episode's number, so that batching episodes never
    changes a result beyond rounding.

    Args:
        lr: learning rate.
        momentum: of the update.
        dampening: of the momentum, as in ``torch.optim.SGD``.
        weight_decay: on weights and biases.
        epochs: passes over the supports.
        batch_size: supports a step.
        random_state: seed.

    Raises:
        ValueError, TypeError: in ``fit``, a setting outside of its range, or another type.
    """

    first_episode = 0

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.9,
        weight_decay: float = 1e-3,
        epochs: int = 100,
        batch_size: int = 4,
        random_state: int | None = None,
    ) -> None:
        self.lr = lr
        self.momentum = momentum
        self.dampening = dampening
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.random_state = random_state

    def _fit(self, X: Tensor, y: Tensor, classes: int) -> None:
        _checks.real("lr", self.lr, low=0.0, low_open=True)
        _checks.real("momentum", self.momentum, low=0.0)
        _checks.real("dampening", self.dampening, low=0.0, high=1.0)
        _checks.real("weight_decay", self.weight_decay, low=0.0)
        epochs = _checks.integer("epochs", self.epochs, low=1)
        size = _checks.integer("batch_size", self.batch_size, low=1)
        seed = 0 if self.random_state is None else _checks.integer("random_state", self.random_state, low=0)
        starts: list[Tensor] = []
        orders: list[Tensor] = []
        for episode in range(len(X)):
            stream = _random.generator(seed, "linear", self.first_episode + episode)
            starts.append((2.0 * torch.rand(classes, X.shape[2] + 1, generator=stream, dtype=torch.float64) - 1.0) * X.shape[2] ** -0.5)
            orders.append(torch.stack([torch.randperm(X.shape[1], generator=stream) for _ in range(epochs)]))
        parameters = train_linear(
            X,
            y,
            torch.stack(starts).to(X),
            torch.stack(orders).to(X.device),
            lr=self.lr,
            momentum=self.momentum,
            dampening=self.dampening,
            weight_decay=self.weight_decay,
            batch_size=size,
        )
        self._weight, self._bias = parameters[..., :-1], parameters[..., -1]
        self.coef_, self.intercept_ = self._out(self._weight), self._out(self._bias)
        self.n_iter_ = epochs

    def _decide(self, X: Tensor) -> Tensor:
        return X @ self._weight.to(X).mT + self._bias.to(X)[:, None]


def train_linear(
    X: Tensor,
    y: Tensor,
    start: Tensor,
    orders: Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    batch_size: int,
) -> Tensor:
    """Weights with their biases behind, ``(E, c, d + 1)``, after ``torch.optim.SGD`` on cross-entropy for each episode.

    Args:
        X: supports ``(E, n, d)``.
        y: classes ``(E, n)``.
        start: initial weights and biases ``(E, c, d + 1)``.
        orders: permutation of the supports in each epoch, ``(E, epochs, n)``.
        lr: learning rate.
        momentum: of the update.
        dampening: of the momentum.
        weight_decay: on weights and biases.
        batch_size: supports a step; the last step of an epoch may have fewer.
    """
    rows = torch.cat([X, X.new_ones(*X.shape[:2], 1)], 2)
    onehot = torch.nn.functional.one_hot(y, start.shape[1]).to(X.dtype)
    parameters = start.clone()
    velocity: Tensor | None = None
    episode = torch.arange(len(X), device=X.device)[:, None]
    for epoch in orders.unbind(1):
        for index in epoch.split(batch_size, 1):
            batch, target = rows[episode, index], onehot[episode, index]
            rest = (torch.softmax(batch @ parameters.mT, 2) - target) / index.shape[1]
            grad = torch.baddbmm(parameters, rest.mT, batch, beta=weight_decay)
            velocity = grad if velocity is None else velocity.mul_(momentum).add_(grad, alpha=1.0 - dampening)
            parameters.add_(velocity, alpha=-lr)
    return parameters
