"""How sharp the loss is around a model's weights: worst-case rise in a ball, Hessian spectrum, PAC-Bayes bound.

Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021:
sharpness as in equation 1, the spectrum of figure 3, the bound of appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from outlast._core import _checks, _foreach
from outlast._core._norm import eval_mode
from outlast._core._perturbation import (
    ball_step,
    batch_size,
    check_p,
    inner_rate,
    is_weight_name,
    project_to_unit_ball_,
    split_batch,
    weight_scaling,
)
from outlast._core._random import generator
from outlast._core._result import Result
from outlast.errors import DivergedError

__all__ = ["Sharpness", "Spectrum", "hessian_spectrum", "sam_bound", "sharpness"]

LossFunction = Callable[[nn.Module, Any], Tensor]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Sharpness(Result):
    """Worst-case rise of the loss in a ball, found by steepest ascent.

    Attributes:
        value: mean over parts of ``perturbed loss - loss``, weighted by their samples.
        loss: mean loss at the weights.
        perturbed_loss: mean loss at each part's own worst point.
        per_part: the rise of each part, shape ``(parts,)``.
        m: samples a part; None for one part with all data.
        rho: the radius.
    """

    value: float
    loss: float
    perturbed_loss: float
    per_part: FloatArray
    m: int | None
    rho: float

    def _draw(self, ax: Any) -> None:
        ax.hist(self.per_part, bins=min(30, max(1, len(self.per_part))))
        ax.axvline(self.value, linestyle="--")
        ax.set_xlabel(f"rise of the loss within rho = {self.rho:g}")
        ax.set_ylabel("parts")


@dataclass(frozen=True, repr=False)
class Spectrum(Result):
    """The top of a Hessian's spectrum.

    Attributes:
        eigenvalues: the ``k`` largest, descending, shape ``(k,)``.
        residuals: ``||H v - theta v||`` of each with its vector ``v`` of length 1: an eigenvalue lies that near.
        ratio_1_5: first by fifth eigenvalue, NaN with fewer than five.
        density: (nodes, weights) of the spectral density by Lanczos quadrature from one Gaussian start, shape
            ``(2, iterations)``; empty with ``mode="power"``.
        trace: Hutchinson's estimate of the trace.
        trace_stderr: its standard error.
    """

    eigenvalues: FloatArray
    residuals: FloatArray
    ratio_1_5: float
    density: FloatArray
    trace: float
    trace_stderr: float

    def _draw(self, ax: Any) -> None:
        ax.plot(np.arange(1, len(self.eigenvalues) + 1), self.eigenvalues, "o-")
        ax.set_xlabel("number")
        ax.set_ylabel("eigenvalue of the Hessian")


def sharpness(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    rho: float = 0.05,
    p: float = 2.0,
    m: int | None = None,
    steps: int = 1,
    adaptive: bool = False,
    eta: float = 0.01,
) -> Sharpness:
    """Rise of the loss at the worst point within ``rho`` of the weights.

    Args:
        model: measured in eval mode; weights, mode and buffers are as before afterwards.
        loss_fn: ``loss_fn(model, batch)``, a mean loss or one loss a sample.
        data: one batch (tensors in a tuple, list or dict) or an iterable of batches that can be gone through again.
        rho: radius of the ball.
        p: order of its norm; ``steps > 1`` needs 2.
        m: samples a part, each with its own worst point (m-sharpness); None takes all data as one part.
        steps: steps of projected ascent.
        adaptive: measure the ball in ASAM's scaled coordinates.
        eta: floor of those coordinates.

    Raises:
        ValueError: a setting out of range, no data, ``m`` above a batch's size, ``steps > 1`` with ``p`` other than 2.
        DivergedError: the loss is not finite.
    """
    rho = _checks.real("rho", rho, low=0.0)
    eta = _checks.real("eta", eta, low=0.0)
    p = check_p(p)
    steps = _checks.integer("steps", steps, low=1)
    if steps > 1 and p != 2.0:
        raise ValueError(f"steps > 1 projects onto a Euclidean ball and needs p=2, got p={p:g}")
    if m is not None:
        m = _checks.integer("m", m, low=1)
    batches = _batches(data)
    parts = [batches] if m is None else [[part] for batch in batches for part, _ in split_batch(batch, m)]
    rises: list[float] = []
    losses: list[float] = []
    sizes: list[int] = []
    with _evaluated(model) as named:
        for part in parts:
            loss, perturbed = _worst_case(model, loss_fn, part, named, rho=rho, p=p, steps=steps, eta=eta if adaptive else None)
            rises.append(perturbed - loss)
            losses.append(loss)
            sizes.append(sum(batch_size(batch) for batch in part))
    if not np.isfinite([*rises, *losses]).all():
        raise DivergedError("sharpness: the loss is not finite at the weights or at the perturbed weights")
    weights = np.asarray(sizes) / sum(sizes)
    value, mean = float(weights @ np.asarray(rises)), float(weights @ np.asarray(losses))
    return Sharpness(value, mean, mean + value, np.asarray(rises), m, rho)


def _worst_case(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: list[Any],
    named: list[tuple[str, nn.Parameter]],
    *,
    rho: float,
    p: float,
    steps: int,
    eta: float | None,
) -> tuple[float, float]:
    parameters = [parameter for _, parameter in named]
    scalings = [weight_scaling(w, eta) if eta is not None and is_weight_name(name) else None for name, w in named]
    backup = [parameter.detach().clone() for parameter in parameters]
    loss, grads = _mean_loss_and_gradient(model, loss_fn, batches, parameters)
    position: list[Tensor] | None = None
    perturbed = loss
    try:
        for _ in range(steps):
            unit, _, _ = ball_step(grads, scalings, p)
            with torch.no_grad():
                if position is None:
                    position = [torch.zeros_like(step) for step in unit]
                _foreach.add_(position, unit, alpha=inner_rate(steps))
                if steps > 1:
                    project_to_unit_ball_(position)
                _foreach.copy_(parameters, backup)
                shift = [u if t is None else u * t for u, t in zip(position, scalings, strict=True)]
                _foreach.add_(parameters, shift, alpha=rho)
            perturbed, grads = _mean_loss_and_gradient(model, loss_fn, batches, parameters)
    finally:
        with torch.no_grad():
            _foreach.copy_(parameters, backup)
    return loss, perturbed


def hessian_spectrum(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    k: int = 5,
    iters: int = 64,
    seed: int = 0,
    mode: Literal["lanczos", "power"] = "lanczos",
    probes: int = 8,
) -> Spectrum:
    """The largest eigenvalues of the Hessian of the mean loss, by Hessian-vector products.

    Lanczos with full reorthogonalisation keeps ``iters`` vectors of the weights' size, its coefficients are float64;
    ``"power"`` keeps ``k`` (power iteration with deflation) and needs more products for the same accuracy. Power
    iteration finds eigenvalues by magnitude, so a strongly negative one takes a place; Lanczos orders by value.

    Args:
        model: measured in eval mode (BatchNorm with its running statistics); unchanged afterwards.
        loss_fn: ``loss_fn(model, batch)``, twice differentiable, a mean loss or one loss a sample.
        data: one batch or an iterable of batches that can be gone through again; each product goes through all of it.
        k: how many eigenvalues, at most the number of weights.
        iters: Lanczos steps, or power iterations for each eigenvalue.
        seed: of the random starts and probes.
        mode: ``"lanczos"`` or ``"power"``.
        probes: random vectors of the trace estimate, at least 2.

    Raises:
        ValueError: a setting out of range, no data, no weights.
        DivergedError: a product is not finite.
    """
    k = _checks.integer("k", k, low=1)
    iters = _checks.integer("iters", iters, low=1)
    seed = _checks.integer("seed", seed, low=0)
    probes = _checks.integer("probes", probes, low=2)
    _checks.choice("mode", mode, ("lanczos", "power"))
    batches = _batches(data)
    with _evaluated(model) as named:
        operator = _Hessian(model, loss_fn, batches, [parameter for _, parameter in named])
        if k > operator.size:
            raise ValueError(f"k must be at most the model's {operator.size} weights, got {k}")
        rng = generator(seed, "sharpness.hessian_spectrum")
        if mode == "lanczos":
            values, vectors, density = _lanczos(operator, max(iters, k), k, rng)
        else:
            values, vectors = _power_iteration(operator, iters, k, rng)
            density = np.zeros((2, 0))
        residuals = [float(torch.linalg.vector_norm(operator(v) - float(t) * v)) for t, v in zip(values, vectors, strict=True)]
        quadratic = [_probe(operator, rng) for _ in range(probes)]
    ratio = float(values[0] / values[4]) if k >= 5 and values[4] != 0 else math.nan
    stderr = float(np.std(quadratic, ddof=1) / math.sqrt(probes))
    return Spectrum(values, np.asarray(residuals), ratio, density, float(np.mean(quadratic)), stderr)


def sam_bound(perturbed_loss: float, w_norm_sq: float, k: int, n: int, rho: float, delta: float) -> float:
    """The PAC-Bayes bound on the expected loss (Foret et al., appendix A).

    ``perturbed_loss + sqrt((k ln(1 + (w2/rho^2)(1 + sqrt(ln n / k))^2) + 4 ln(n/delta) + 8 ln(6n + 3k)) / (n - 1))``.
    It is vacuous (above 1) for every network of real size: it explains the method, it certifies nothing.

    Args:
        perturbed_loss: worst loss within ``rho`` on the training data, a loss in [0, 1].
        w_norm_sq: squared Euclidean norm of the weights.
        k: number of weights.
        n: number of training samples, at least 2.
        rho: radius, above 0.
        delta: the bound holds with probability ``1 - delta``, in (0, 1].

    Raises:
        ValueError, TypeError: a number outside of its range.
    """
    perturbed_loss = _checks.real("perturbed_loss", perturbed_loss, low=0.0, high=1.0)
    w_norm_sq = _checks.real("w_norm_sq", w_norm_sq, low=0.0)
    k = _checks.integer("k", k, low=1)
    n = _checks.integer("n", n, low=2)
    rho = _checks.real("rho", rho, low=0.0, low_open=True)
    delta = _checks.real("delta", delta, low=0.0, high=1.0, low_open=True)
    spread = (w_norm_sq / rho**2) * (1.0 + math.sqrt(math.log(n) / k)) ** 2
    complexity = k * math.log1p(spread) + 4.0 * math.log(n / delta) + 8.0 * math.log(6 * n + 3 * k)
    return perturbed_loss + math.sqrt(complexity / (n - 1))


class _Hessian:
    """Hessian of the mean loss as a linear map on flat vectors."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, batches: list[Any], parameters: list[nn.Parameter]) -> None:
        self._model = model
        self._loss_fn = loss_fn
        self._batches = batches
        self._parameters = parameters
        self._total = sum(batch_size(batch) for batch in batches)
        self.size = sum(parameter.numel() for parameter in parameters)
        self.like = parameters[0]

    def __call__(self, vector: Tensor) -> Tensor:
        """``H v``, shape ``(size,)``."""
        parts = [piece.view_as(w) for piece, w in zip(vector.split([w.numel() for w in self._parameters]), self._parameters, strict=True)]
        result = torch.zeros_like(vector)
        for batch in self._batches:
            with torch.enable_grad():
                loss = self._loss_fn(self._model, batch).mean()
                grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
                inner = torch.stack([(g * v).sum() for g, v in zip(grads, parts, strict=True)]).sum()
                if not inner.requires_grad:  # a loss that is linear in the weights has no second derivative
                    continue
                product = torch.autograd.grad(inner, self._parameters, materialize_grads=True)
            share = batch_size(batch) / self._total
            result.add_(torch.cat([piece.detach().reshape(-1) for piece in product]), alpha=share)
        if not bool(torch.isfinite(result).all()):
            raise DivergedError("hessian_spectrum: a Hessian-vector product is not finite; check that the loss is")
        return result


def _random_vector(operator: _Hessian, rng: torch.Generator) -> Tensor:
    return torch.randn(operator.size, generator=rng, dtype=operator.like.dtype).to(operator.like.device)


def _probe(operator: _Hessian, rng: torch.Generator) -> float:
    signs = torch.randint(0, 2, (operator.size,), generator=rng).to(operator.like) * 2 - 1
    return float(torch.dot(signs.double(), operator(signs).double()))


def _orthogonalise(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        for direction in basis:
            vector = vector - torch.dot(direction, vector) * direction
    return vector


def _lanczos(operator: _Hessian, iters: int, k: int, rng: torch.Generator) -> tuple[FloatArray, list[Tensor], FloatArray]:
    basis: list[Tensor] = []
    diagonal: list[float] = []
    off: list[float] = []
    vector = _random_vector(operator, rng)
    vector = vector / torch.linalg.vector_norm(vector)
    scale = 0.0
    for _ in range(min(iters, operator.size)):
        basis.append(vector)
        image = operator(vector)
        alpha = float(torch.dot(image.double(), vector.double()))
        diagonal.append(alpha)
        if len(basis) == operator.size:
            break
        rest = _orthogonalise(image, basis)
        beta = float(torch.linalg.vector_norm(rest.double()))
        scale = max(scale, abs(alpha), beta)
        if beta <= 1e3 * torch.finfo(image.dtype).eps * max(scale, torch.finfo(image.dtype).tiny):
            # The Krylov space is exhausted: go on in a fresh direction, or repeated eigenvalues are counted once.
            rest = _orthogonalise(_random_vector(operator, rng), basis)
            off.append(0.0)
            vector = rest / torch.linalg.vector_norm(rest)
        else:
            off.append(beta)
            vector = rest / beta
    size = len(diagonal)
    tridiagonal = np.diag(diagonal) + np.diag(off[: size - 1], 1) + np.diag(off[: size - 1], -1)
    nodes, weights = np.linalg.eigh(tridiagonal)
    top = np.argsort(nodes)[::-1][:k]
    matrix = torch.stack(basis, dim=1)
    vectors: list[Tensor] = []
    for index in top:
        ritz = matrix @ torch.from_numpy(weights[:, index].copy()).to(matrix)
        vectors.append(ritz / torch.linalg.vector_norm(ritz))
    return nodes[top], vectors, np.stack([nodes, weights[0] ** 2])


def _power_iteration(operator: _Hessian, iters: int, k: int, rng: torch.Generator) -> tuple[FloatArray, list[Tensor]]:
    values: list[float] = []
    vectors: list[Tensor] = []
    for _ in range(k):
        vector = _orthogonalise(_random_vector(operator, rng), vectors)
        vector = vector / torch.linalg.vector_norm(vector)
        value = 0.0
        for _ in range(iters):
            image = _orthogonalise(operator(vector), vectors)
            value = float(torch.dot(image.double(), vector.double()))
            length = torch.linalg.vector_norm(image)
            if float(length) == 0.0:
                break
            vector = image / length
        values.append(value)
        vectors.append(vector)
    order = np.argsort(values)[::-1]
    return np.asarray(values)[order], [vectors[index] for index in order]


def _mean_loss_and_gradient(
    model: nn.Module, loss_fn: LossFunction, batches: list[Any], parameters: list[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    total = sum(batch_size(batch) for batch in batches)
    loss = 0.0
    grads = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        share = batch_size(batch) / total
        with torch.enable_grad():
            part = loss_fn(model, batch).mean()
            _foreach.add_(grads, torch.autograd.grad(part, parameters, materialize_grads=True), alpha=share)
        loss += share * float(part.detach())
    return loss, grads


def _batches(data: Any) -> list[Any]:
    """One batch as a list of one; an iterable of batches (a DataLoader) as the list of its batches."""
    if isinstance(data, Tensor | dict) or (isinstance(data, tuple) and data and isinstance(data[0], Tensor)):
        return [data]
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        return [cast("list[Any]", data)]
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be a batch of tensors or an iterable of batches, got {type(data).__name__}")
    batches = list(cast("Iterable[Any]", data))
    if not batches:
        raise ValueError("data holds no batches")
    return batches


@contextmanager
def _evaluated(model: nn.Module) -> Generator[list[tuple[str, nn.Parameter]]]:
    """Eval mode for the time of a measurement; gives the named parameters that are trained."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("the model has no parameters with requires_grad, so there is nothing to perturb")
    with eval_mode(model):
        yield named
