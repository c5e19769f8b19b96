"""The tasks of the theorems, as samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from outlast._core._checks import integer, real

Draw = Callable[[int, torch.Generator | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """A law of labelled examples.

    Attributes:
        name: of the task.
        shape: of an input.
        draw: ``draw(n, generator)`` gives inputs ``(n, *shape)`` and labels ``(n,)`` of 0 and 1.
    """

    name: str
    shape: tuple[int, ...]
    draw: Draw

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Inputs ``(n, *shape)`` in float32 and labels ``(n,)`` in int64.

        Raises:
            ValueError: n below 1, or more than a finite set of images holds.
        """
        return self.draw(integer("n", n, low=1), generator)


def quadratic_halves(dim: int) -> Task:
    """Is the first half of a Gaussian vector longer than the second?

    The task of theorems 4.1 and 5.2.

    Every training that is blind to rotations needs order ``dim**2`` examples; a two-layer convolutional network a constant number.

    Args:
        dim: features D = 2d; the paper's d is half of it.

    Raises:
        ValueError: not even and at least 2.
    """
    if integer("dim", dim, low=2) % 2:
        raise ValueError(f"dim must be even (two halves), got {dim}")

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, dim, generator=generator)
        first, second = x.square().view(n, 2, dim // 2).sum(2).unbind(1)
        return x, (first > second).long()

    return Task(f"quadratic halves, {dim} features", (dim,), draw)


def channel_norm(shape: Sequence[int], base: Tensor | None = None) -> Task:
    """Is the first channel longer than the second?

    The task of figure 1.

    Args:
        shape: ``(channels, ...)`` of an input, two channels or more.
        base: images ``(n, *shape)`` from which inputs are drawn without replacement; Gaussian inputs otherwise.

    Raises:
        ValueError: fewer than two channels, or images of another shape.
    """
    size = tuple(integer("shape", value, low=1) for value in shape)
    if len(size) < 2 or size[0] < 2:
        raise ValueError(f"shape must be (channels, ...) with two channels or more, got {size}")
    if base is not None and tuple(base.shape[1:]) != size:
        raise ValueError(f"base must be images of shape {size}, got {tuple(base.shape[1:])}")

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        if base is None:
            x = torch.randn(n, *size, generator=generator)
        elif n > len(base):
            raise ValueError(f"{n} examples were asked for, base holds {len(base)} images")
        else:
            x = base[torch.randperm(len(base), generator=generator)[:n]].float()
        first, second = x[:, :2].flatten(2).square().sum(2).unbind(1)
        return x, (first > second).long()

    return Task(f"channel norm, {'x'.join(map(str, size))}{'' if base is None else ', images'}", size, draw)


def local_texture(dim: int) -> Task:
    """Are the two ones of a vector next to each other (0) or two apart (1)?

    The task of theorem 5.5, uniform on 2 ``dim`` points.
    Every training that is blind to permutations, Adam's included, needs order ``dim`` examples.

    Raises:
        ValueError: fewer than 5 features.
    """
    integer("dim", dim, low=5)

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        place = torch.randint(dim, (n,), generator=generator)
        y = torch.randint(2, (n,), generator=generator)
        x = torch.zeros(n, dim)
        rows = torch.arange(n)
        x[rows, place] = 1.0
        x[rows, (place + 1 + y) % dim] = 1.0
        return x, y

    return Task(f"local texture, {dim} features", (dim,), draw)


def one_hot_sign(dim: int) -> Task:
    """What is the sign (1 for plus) of the only entry that is not 0?

    The paper's warm-up.
    A training that is blind to rotations and has seen fewer than ``dim / 2`` examples errs on at least a quarter.

    Raises:
        ValueError: no features.
    """
    integer("dim", dim, low=1)

    def draw(n: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        place = torch.randint(dim, (n,), generator=generator)
        y = torch.randint(2, (n,), generator=generator)
        x = torch.zeros(n, dim)
        x[torch.arange(n), place] = 2.0 * y - 1.0
        return x, y

    return Task(f"one-hot sign, {dim} features", (dim,), draw)


def quadratic_bound(dim: int, eps: float) -> float:
    """Examples below which no training blind to rotations learns all forms ``sum a_i x_i^2`` to relative squared error ``eps``.

    ``d (d + 3) / 2 (1 - eps) - 1`` (theorem 5.4), against d examples for least squares on the squares themselves.

    Args:
        dim: features d.
        eps: error relative to ``E y^2``, in [0, 1].

    Raises:
        ValueError: out of range.
    """
    d = integer("dim", dim, low=1)
    return d * (d + 3) / 2.0 * (1.0 - real("eps", eps, low=0.0, high=1.0)) - 1.0
