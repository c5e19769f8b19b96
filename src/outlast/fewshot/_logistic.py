"""Multinomial logistic regression for many small problems at once, each with the answer that it has alone.

The objective is scikit-learn's for three classes or more: the sum of losses plus ``||W||^2 / (2 C)`` with a free intercept, here
divided by the number of rows. With two classes scikit-learn penalises one vector where the softmax has two: its ``C`` is half of
this one. Problems with fewer rows than columns are solved in the space that their rows span, where the optimum lies.

Letters: E problems, n rows, d columns, c classes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from outlast._core import _checks
from outlast._core._typing import Float, Int
from outlast.errors import OutlastWarning

_HISTORY = 10
_LARGE = 1 << 18  # entries of one problem above which problems are visited one by one, so that none is copied


@dataclass(frozen=True)
class LogisticFit:
    """Fitted problems.

    Attributes:
        weight: ``(E, c, d)``.
        bias: ``(E, c)``.
        loss: objective divided by the (weighted) number of rows, ``(E,)``.
        grad_norm: largest entry of its gradient, ``(E,)``.
        n_iter: iterations, ``(E,)``.
        converged: whether ``grad_norm <= tol``, ``(E,)``.
    """

    weight: Tensor
    bias: Tensor
    loss: Tensor
    grad_norm: Tensor
    n_iter: Tensor
    converged: Tensor


def batched_logistic_regression(
    X: Float[Tensor, "problems n d"],
    y: Int[Tensor, "problems n"],
    *,
    num_classes: int | None = None,
    C: float = 1.0,
    sample_weight: Tensor | None = None,
    fit_intercept: bool = True,
    tol: float = 1e-4,
    max_iter: int = 1000,
    precondition: Literal["none", "gaussian"] = "none",
    init: tuple[Tensor, Tensor] | None = None,
) -> LogisticFit:
    """L2-regularised multinomial logistic regression of E problems by L-BFGS, with a line search for each.

    Args:
        X: rows, float32 or float64.
        y: classes 0 to c - 1.
        num_classes: c; None for the largest class + 1.
        C: inverse strength of the penalty on the sum of losses; the intercept is not penalised.
        sample_weight: ``(E, n)`` or ``(n,)``, non-negative.
        fit_intercept: with a bias.
        tol: a problem is done when no entry of its gradient (of the mean form) is larger.
        max_iter: most iterations.
        precondition: ``"gaussian"`` starts from the inverse of the penalty plus half the second moment of the rows in place
            of the identity: fewer passes over the rows, for one factorisation of a d x d matrix a problem.
        init: starting ``(weight, bias)``; None starts at zero, so that the classes' weights sum to zero.

    Raises:
        ValueError: shapes that do not fit, labels out of range, values that are not finite, C, tol or max_iter out of range.
        TypeError: X no floating tensor, y no integers.
    """
    if X.ndim != 3 or y.shape != X.shape[:2]:
        raise ValueError(f"X must have shape (E, n, d) and y (E, n), got {tuple(X.shape)} and {tuple(y.shape)}")
    if not X.is_floating_point():
        raise TypeError(f"X must be floating point, got {X.dtype}")
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"y must hold integers, got {y.dtype}")
    if not torch.isfinite(X).all():
        raise ValueError("X holds NaN or infinity")
    low, high = int(y.min()), int(y.max())
    count = high + 1 if num_classes is None else _checks.integer("num_classes", num_classes, low=1)
    if low < 0 or high >= count:
        raise ValueError(f"y must lie in [0, {count - 1}], got {low} to {high}")
    _checks.real("C", C, low=0.0, low_open=True)
    tol = _checks.real("tol", tol, low=0.0)
    max_iter = _checks.integer("max_iter", max_iter, low=0)
    _checks.choice("precondition", precondition, ("none", "gaussian"))
    rows = X.detach().float() if X.dtype in (torch.float16, torch.bfloat16) else X.detach()
    weights = torch.ones(y.shape, dtype=rows.dtype, device=rows.device) if sample_weight is None else sample_weight.to(rows).expand(y.shape)
    if not bool(((weights >= 0) & torch.isfinite(weights)).all()) or not bool((weights.sum(1) > 0).all()):
        raise ValueError("sample_weight must be finite and non-negative, with a positive sum for each problem")
    with torch.no_grad():
        problem = _Problem(rows, y, weights, count, C, intercept=fit_intercept)
        parameters, loss, grad, steps = _lbfgs(
            problem, problem.start(init), tol, max_iter, _metric(problem) if precondition == "gaussian" else None
        )
        size = grad.abs().flatten(1).amax(1)
        weight, bias = problem.finish(parameters)
    done = size <= tol
    if not bool(done.all()):
        warnings.warn(
            f"{int((~done).sum())} of {len(X)} logistic regressions did not reach tol={tol:g} in {max_iter} iterations (largest gradient "
            f"{float(size.max()):.1e}); raise max_iter or tol, or use float64",
            OutlastWarning,
            stacklevel=2,
        )
    return LogisticFit(weight, bias, loss, size, steps, done)


class _Problem:
    """Rows with a column of ones, in the coordinates that the optimum needs."""

    def __init__(self, rows: Tensor, y: Tensor, weights: Tensor, count: int, C: float, *, intercept: bool) -> None:
        self.count, self.intercept = count, intercept
        # With few rows the penalised optimum is a combination of them: a small problem, solved in float64.
        short = rows.shape[1] < rows.shape[2]
        frame, r = torch.linalg.qr(rows.mT.double()) if short else (None, rows.mT)
        self.dtype = rows.dtype
        self.frame: Tensor | None = frame
        self.X = r.mT
        self.width = self.X.shape[2]
        weights = weights.to(self.X.dtype)
        total = weights.sum(1)
        self.share = weights / total[:, None]
        self.penalty = 1.0 / (C * total)
        self.onehot = torch.nn.functional.one_hot(y.long(), count).to(self.X.dtype)
        self.labels = y.long()

    def start(self, init: tuple[Tensor, Tensor] | None) -> Tensor:
        """``(E, c, width + 1)``."""
        found = self.X.new_zeros(len(self.X), self.count, self.width + 1)
        if init is not None:
            weight, bias = init
            found[..., :-1] = weight.to(found) if self.frame is None else weight.to(found) @ self.frame
            found[..., -1] = bias.to(found)
        return found

    def finish(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias in the given coordinates."""
        weight = parameters[..., :-1]
        weight = weight if self.frame is None else weight @ self.frame.mT
        return weight.to(self.dtype).contiguous(), parameters[..., -1].to(self.dtype).contiguous()

    def evaluate(self, parameters: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Objective ``(k,)`` and gradient ``(k, c, width + 1)`` of some problems."""
        weight, bias = parameters[..., :-1], parameters[..., -1]
        if self.X[0].numel() > _LARGE:
            parts = [
                self._evaluate(self.X[number, None], number, weight[place, None], bias[place, None])
                for place, number in enumerate(which.tolist())
            ]
            return torch.cat([loss for loss, _ in parts]), torch.cat([grad for _, grad in parts])
        everyone = len(which) == len(self.X)
        return self._evaluate(self.X if everyone else self.X[which], slice(None) if everyone else which, weight, bias)

    def _evaluate(self, X: Tensor, which: int | slice | Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        own = slice(which, which + 1) if isinstance(which, int) else which
        share, penalty = self.share[own], self.penalty[own]
        log_probs = torch.log_softmax(torch.baddbmm(bias[:, None, :], X, weight.mT), 2)
        loss = -(share * log_probs.gather(2, self.labels[own][..., None])[..., 0]).sum(1)
        loss = loss + 0.5 * penalty * weight.square().sum((1, 2))
        rest = (log_probs.exp() - self.onehot[own]) * share[..., None]
        grad_weight = torch.baddbmm(weight * penalty[:, None, None], rest.mT, X)
        grad_bias = rest.sum(1) if self.intercept else torch.zeros_like(bias)
        return loss, torch.cat([grad_weight, grad_bias[..., None]], 2)


def _metric(problem: _Problem) -> Tensor:
    """Cholesky factors of the penalty plus half the second moment of the rows, a bias row included, ``(E, w + 1, w + 1)``."""
    constant = float(problem.intercept)  # without an intercept the bias must not be drawn along
    ones = problem.X.new_full((*problem.X.shape[:2], 1), constant)
    rows = torch.cat([problem.X, ones], 2).double()
    moment = 0.5 * (rows * problem.share[..., None]).mT @ rows
    diagonal = problem.penalty[:, None].expand(-1, problem.width + 1).double()
    diagonal = diagonal + 1e-6 * moment.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    if not problem.intercept:
        diagonal[:, -1] = 1.0
    factor, failed = torch.linalg.cholesky_ex(moment + torch.diag_embed(diagonal))
    plain = torch.eye(problem.width + 1, dtype=factor.dtype, device=factor.device)
    return torch.where((failed != 0)[:, None, None], plain, factor).to(problem.X.dtype)


def _lbfgs(problem: _Problem, x: Tensor, tol: float, max_iter: int, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Limited-memory BFGS where every problem has its own history, step and end. Shapes ``(E, c, w)`` throughout."""
    everyone = torch.arange(len(x), device=x.device)
    loss, grad = problem.evaluate(x, everyone)
    steps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    shape = (len(x), _HISTORY, x[0].numel())
    moves, changes = x.new_zeros(shape), x.new_zeros(shape)
    curvature = x.new_zeros(shape[:2])
    held = torch.zeros_like(steps)  # pairs in the history
    stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(max_iter):
        active = ((grad.abs().flatten(1).amax(1) > tol) & ~stuck).nonzero()[:, 0]
        if not len(active):
            break
        direction = _direction(grad[active], moves[active], changes[active], curvature[active], held[active], metric, active)
        slope = (direction * grad[active]).flatten(1).sum(1)
        uphill = slope >= 0
        if bool(uphill.any()):  # rounding: go along the gradient
            direction[uphill] = -grad[active][uphill]
            slope = (direction * grad[active]).flatten(1).sum(1)
        first = held[active] == 0
        length = torch.ones_like(slope)
        if metric is None:
            length = torch.where(first, 1.0 / direction.flatten(1).norm(dim=1).clamp(min=1.0), length)
        new_x, new_loss, new_grad, moved = _search(problem, x, loss, active, direction, slope, length)
        stuck[active[~moved]] = True
        rows = active[moved]
        step, change = (new_x - x[active])[moved].flatten(1), (new_grad - grad[active])[moved].flatten(1)
        inner = (step * change).sum(1)
        good = inner > 1e-10 * step.norm(dim=1) * change.norm(dim=1)
        place = held[rows[good]] % _HISTORY
        moves[rows[good], place], changes[rows[good], place] = step[good], change[good]
        curvature[rows[good], place] = inner[good]
        held[rows[good]] += 1
        x[rows], loss[rows], grad[rows] = new_x[moved], new_loss[moved], new_grad[moved]
        steps[rows] += 1
    return x, loss, grad, steps


def _direction(
    grad: Tensor, moves: Tensor, changes: Tensor, curvature: Tensor, held: Tensor, metric: Tensor | None, which: Tensor
) -> Tensor:
    """The two-loop recursion, over all problems at once; slots that a problem has not filled count as nothing."""
    q = grad.flatten(1).clone()
    number = torch.arange(len(q), device=q.device)
    weights: list[tuple[Tensor, Tensor, Tensor]] = []
    deepest = min(_HISTORY, int(held.max()))
    for back in range(1, deepest + 1):
        place = (held - back) % _HISTORY
        there = held >= back
        rho = torch.where(there, 1.0 / curvature[number, place].clamp(min=1e-300 if q.dtype == torch.float64 else 1e-37), 0.0)
        alpha = rho * (moves[number, place] * q).sum(1)
        q = q - alpha[:, None] * changes[number, place]
        weights.append((place, rho, alpha))
    if metric is not None:
        solved = torch.cholesky_solve(q.view_as(grad).mT, metric[which]).mT
        q = solved.reshape(len(q), -1)
    elif deepest:
        last = (held - 1) % _HISTORY
        scale = curvature[number, last] / changes[number, last].square().sum(1).clamp(min=1e-37)
        q = torch.where(held > 0, scale, 1.0)[:, None] * q
    for place, rho, alpha in reversed(weights):
        beta = rho * (changes[number, place] * q).sum(1)
        q = q + (alpha - beta)[:, None] * moves[number, place]
    return -q.view_as(grad)


def _search(
    problem: _Problem, x: Tensor, loss: Tensor, active: Tensor, direction: Tensor, slope: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backtracking to sufficient decrease, for each problem by itself."""
    new_x, new_loss, new_grad = x[active].clone(), loss[active].clone(), torch.zeros_like(direction)
    moved = torch.zeros(len(active), dtype=torch.bool, device=x.device)
    open_ = torch.arange(len(active), device=x.device)
    noise = 8 * torch.finfo(x.dtype).eps
    for _ in range(30):
        trial = x[active[open_]] + length[open_, None, None] * direction[open_]
        value, grad = problem.evaluate(trial, active[open_])
        old = loss[active[open_]]
        fine = value <= old + 1e-4 * length[open_] * slope[open_] + noise * old.abs()
        rows = open_[fine]
        new_x[rows], new_loss[rows], new_grad[rows] = trial[fine], value[fine], grad[fine]
        moved[rows] = True
        open_ = open_[~fine]
        if not len(open_):
            break
        length[open_] *= 0.5
    return new_x, new_loss, new_grad, moved
