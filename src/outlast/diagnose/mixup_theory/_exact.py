"""The expected mixup loss over all pairs, by Gauss-Jacobi quadrature over the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from outlast._core import _checks
from outlast._core._beta import parameters
from outlast.diagnose.mixup_theory._losses import LogPartition, Loss, LossName, Model, Rows, inner, named_loss, targets

Form = Literal["mixed", "label_preserving"]
PAIR_LIMIT = 4_000_000
_BLOCK = 1 << 17  # numbers of a block: two megabytes with what is made of them, which a core's cache holds


def gauss_jacobi(alpha: float, beta: float | None = None, nodes: int = 64) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the quadrature for the mean over ``Beta(alpha, beta)``, exact for polynomials of degree ``2 nodes - 1``.

    The eigenvalues of the Jacobi matrix and the first entries of its eigenvectors (Golub and Welsch, 1969).

    Returns:
        Nodes in [0, 1], ascending, and weights that add up to 1, both ``(nodes,)`` in float64.

    Raises:
        ValueError: parameters that are not positive and finite, fewer than two nodes.
    """
    a, b = parameters(alpha, beta)
    count = _checks.integer("nodes", nodes, low=2)
    total = a + b - 2.0  # of the exponents of the Jacobi weight
    n = np.arange(1, count)
    even = 2.0 * n + total
    diagonal = np.empty(count)
    diagonal[0] = (a - b) / (a + b)
    diagonal[1:] = (a - b) * total / (even * (even + 2.0))
    off = np.empty(count - 1)
    off[0] = 4.0 * a * b / ((a + b) ** 2 * (a + b + 1.0))  # in the general form 0 / 0 for a + b = 1
    n, even = n[1:], even[1:]
    off[1:] = 4.0 * n * (n + a - 1.0) * (n + b - 1.0) * (n + total) / (even**2 * (even + 1.0) * (even - 1.0))
    root = np.sqrt(off)
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(root, 1) + np.diag(root, -1))
    weights = vectors[0] ** 2
    return torch.from_numpy((1.0 + values) / 2.0).clamp(0.0, 1.0), torch.from_numpy(weights / weights.sum())


def _label_preserving_nodes(a: float, b: float, nodes: int) -> tuple[Tensor, Tensor]:
    """The quadrature of the law that keeps labels: a mixture of two Beta distributions."""
    first, second = gauss_jacobi(a + 1.0, b, nodes), gauss_jacobi(b + 1.0, a, nodes)
    share = a / (a + b)
    return torch.cat([first[0], second[0]]), torch.cat([share * first[1], (1.0 - share) * second[1]])


def exact_mixup_loss(
    f: Model,
    X: Tensor,
    y: Tensor,
    alpha: float,
    *,
    beta: float | None = None,
    loss: LossName = "bce",
    nodes: int = 64,
    form: Form = "mixed",
    pairs: Literal["all"] | int = "all",
    chunk: int | None = None,
    log_partition: LogPartition | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The expectation of the mixup loss over all pairs of samples and over the weight, in float64.

    ``(1/n^2) sum_ij E l(lambda x_i + (1 - lambda) x_j, lambda y_i + (1 - lambda) y_j)`` with ``lambda ~ Beta(alpha, beta)``
    (``form="mixed"``), or with the label ``y_i`` and the label-preserving law; for losses that are affine in the label both
    are the same number. Differentiable in the model's parameters; blocks are computed again in the backward pass, so that
    memory does not grow with the number of pairs.

    Args:
        f: a module (run in eval mode, left as it was), a function of ``(n, d...)``, or the weights ``(d,)`` or ``(C, d)`` of a
            linear model. Linear models (``nn.Linear`` too) take no forward pass a pair: their outputs are mixed.
        X: inputs ``(n, d...)``.
        y: ``(n,)`` in {0, 1} for ``"bce"``, class ids ``(n,)`` or probabilities ``(n, C)`` for ``"ce"``, values in the shape of
            the output for ``"mse"`` and ``"glm"``.
        alpha: first parameter of the Beta distribution.
        beta: its second parameter; None for ``alpha``.
        loss: ``"bce"``: ``softplus(f) - y f``. ``"ce"``: ``logsumexp(f) - y . f``. ``"mse"``: ``f^2 / 2 - y f`` (half the
            squared error without its constant). ``"glm"``: ``log_partition(f) - y f``.
        nodes: of the quadrature.
        form: mixed labels, or the first sample's label.
        pairs: all of them, or this many random partners for each sample.
        chunk: rows of a block; None for what a core's cache holds.
        log_partition: of ``"glm"``, elementwise.
        generator: of random partners.

    Returns:
        A scalar in float64.

    Raises:
        ValueError: empty data, shapes or labels that do not fit, fewer than two nodes, more than 4 million pairs without
            ``pairs=``.
        TypeError: inputs that are no floating-point tensor, floating-point class ids.
    """
    kind = named_loss(loss, log_partition)
    rows = Rows(f, X, kind, torch.float64)
    _checks.choice("form", form, ("mixed", "label_preserving"))
    law = parameters(alpha, beta)
    partners = draw_partners(len(rows.X), pairs, generator)
    with rows.measured():
        outputs = rows(rows.X)
        return expected_loss(kind, rows, outputs, targets(kind, y, outputs), law, nodes, form, partners, chunk)


def expected_loss(
    loss: Loss,
    rows: Rows,
    outputs: Tensor,
    Y: Tensor,
    law: tuple[float, float],
    nodes: int,
    form: Form,
    partners: Tensor | None,
    chunk: int | None,
) -> Tensor:
    """The mean over pairs and over the weight; ``partners`` as ``draw_partners`` gives them."""
    lam, weight = gauss_jacobi(*law, nodes) if form == "mixed" else _label_preserving_nodes(*law, nodes)
    if rows.linear and partners is None:
        return _linear(loss, outputs, Y, lam, weight, form, symmetric=law[0] == law[1] and form == "mixed")
    return _forward(loss, rows, Y, lam, weight, form, partners, chunk)


def draw_partners(n: int, pairs: Literal["all"] | int, generator: torch.Generator | None) -> Tensor | None:
    """Random partners ``(pairs, n)``, each row a permutation; None for all pairs.

    Raises:
        ValueError: no pairs, or too many without a choice.
    """
    if pairs == "all":
        if n * n > PAIR_LIMIT:
            raise ValueError(f"{n} samples make {n * n} pairs, more than {PAIR_LIMIT}; say pairs= (random partners for each sample)")
        return None
    count = _checks.integer("pairs", pairs, low=1)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(count)])


def blocks(n: int, partners: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers of both samples of every pair, about ``size`` pairs at a time."""
    if partners is None:
        for first in torch.arange(n).split(max(1, size // n)):
            for second in torch.arange(n).split(size):
                yield first.repeat_interleave(len(second)), second.repeat(len(first))
    else:
        own = torch.arange(n).repeat(len(partners))
        yield from zip(own.split(size), partners.flatten().split(size), strict=True)


def block_rows(rows: Rows, chunk: int | None) -> int:
    """Rows of a block."""
    return max(1, 4 * _BLOCK // rows.X.shape[1]) if chunk is None else _checks.integer("chunk", chunk, low=1)


def _forward(
    loss: Loss, rows: Rows, Y: Tensor, lam: Tensor, weight: Tensor, form: Form, partners: Tensor | None, chunk: int | None
) -> Tensor:
    device = rows.X.device

    def part(share: float, i: Tensor, j: Tensor) -> Tensor:
        with rows.measured():  # also when it is computed again in the backward pass, long after the first
            out = rows(torch.lerp(rows.X[j], rows.X[i], share))
        label = torch.lerp(Y[j], Y[i], share) if form == "mixed" else Y[i]
        return loss.value(out, label).sum()

    n = len(rows.X)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, j in blocks(n, partners, block_rows(rows, chunk)):
        i, j = i.to(device), j.to(device)
        for share, mass in zip(lam.tolist(), weight.tolist(), strict=True):
            total = total + mass * _again(part, share, i, j)
    return total / (n * n if partners is None else partners.numel())


def _linear(loss: Loss, outputs: Tensor, Y: Tensor, lam: Tensor, weight: Tensor, form: Form, *, symmetric: bool) -> Tensor:
    """Outputs of a linear model are mixed like its inputs; a symmetric law needs half of the nodes."""
    n = len(outputs)
    own, mean = inner(Y, outputs).mean(), inner(Y.mean(0)[None], outputs.mean(0)[None])[0]
    if form == "mixed":
        alike, cross = float((weight * (lam**2 + (1.0 - lam) ** 2)).sum()), float((weight * 2.0 * lam * (1.0 - lam)).sum())
        label_part = alike * own + cross * mean
    else:
        share = float((weight * lam).sum())
        label_part = share * own + (1.0 - share) * mean
    if symmetric:
        half = len(lam) // 2
        weight = torch.cat([2.0 * weight[:half], weight[half : len(lam) - half]])
        lam = lam[: len(lam) - half]
    size = max(1, _BLOCK // outputs.numel())

    def part(share: float, first: Tensor) -> Tensor:
        mixed = torch.lerp(outputs[None], first[:, None], share)
        return loss.h(mixed.flatten(0, 1)).sum()

    total = torch.zeros((), dtype=torch.float64, device=outputs.device)
    for first in outputs.split(size):
        for share, mass in zip(lam.tolist(), weight.tolist(), strict=True):
            total = total + mass * _again(part, share, first)
    return total / (n * n) - label_part


def _again(part: Callable[..., Tensor], *args: object) -> Tensor:
    """A block that is computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return part(*args)
    return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]
