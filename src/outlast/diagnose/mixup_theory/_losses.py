"""Losses of the form ``h(f) - y . f`` and the models that they are taken of.

Zhang, Deng, Kawaguchi, Ghorbani, Zou, ICLR 2021, section 3: everything that the theory says rests on this form, which is
affine in the label.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core import _checks
from outlast._core._norm import eval_mode

LossName = Literal["bce", "ce", "glm", "mse"]
Model = nn.Module | Tensor | Callable[[Tensor], Tensor]
LogPartition = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """``h`` with its derivatives; ``u`` and targets are ``(n,)``, or ``(n, C)`` for several outputs."""

    name: LossName
    log_partition: LogPartition | None = None

    def h(self, u: Tensor) -> Tensor:
        """Shape ``(n,)``."""
        if self.name == "bce":
            return F.softplus(u, threshold=40.0)  # the default threshold costs 2e-9
        if self.name == "ce":
            return u.logsumexp(-1)
        if self.name == "mse":
            return u.square().div(2.0) if u.ndim == 1 else u.square().div(2.0).sum(-1)
        assert self.log_partition is not None
        return self.log_partition(u)

    def slope(self, u: Tensor) -> Tensor:
        """``h'(u)``, in the shape of ``u``."""
        if self.name == "bce":
            return u.sigmoid()
        if self.name == "ce":
            return u.softmax(-1)
        return u if self.name == "mse" else jvp(self.h, (u,), (torch.ones_like(u),))[1]

    def curvature(self, u: Tensor, v: Tensor) -> Tensor:
        """``v' h''(u) v``, shape ``(n,)``."""
        if self.name == "ce":
            p = u.softmax(-1)
            return (p * v.square()).sum(-1) - (p * v).sum(-1).square()
        if self.name == "bce":
            return u.sigmoid() * (-u).sigmoid() * v.square()
        if self.name == "mse":
            return v.square() if v.ndim == 1 else v.square().sum(-1)
        return jvp(self.slope, (u,), (torch.ones_like(u),))[1] * v.square()

    def value(self, u: Tensor, y: Tensor) -> Tensor:
        """Losses of single samples, shape ``(n,)``."""
        return self.h(u) - inner(y, u)


def jvp(function: Callable[..., Any], points: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """``torch.func.jvp`` without the warning that torch's own formulas give when they are loaded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
    return torch.func.jvp(function, points, tangents)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, shape ``(n,)``."""
    return a * b if a.ndim == 1 else (a * b).sum(-1)


def named_loss(name: str, log_partition: LogPartition | None = None) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: unknown, ``"glm"`` without its log-partition function, or another with one.
    """
    _checks.choice("loss", name, ("bce", "ce", "glm", "mse"))
    if (name == "glm") != (log_partition is not None):
        raise ValueError(
            'loss="glm" is A(f) - y f and needs log_partition=A (torch.exp for counts); the other losses take none, '
            f"got loss={name!r} {'without' if log_partition is None else 'with'} it"
        )
    return Loss(name, log_partition)  # pyright: ignore[reportArgumentType]


def targets(loss: Loss, y: Tensor, outputs: Tensor) -> Tensor:
    """Labels as rows that fit the outputs.

    Raises:
        ValueError: labels outside of {0, 1} or of the classes, shapes that do not fit.
        TypeError: floating-point class ids.
    """
    n = len(outputs)
    y = torch.as_tensor(y, device=outputs.device)
    if y.ndim == 0 or len(y) != n:
        raise ValueError(f"X has {n} rows, y has shape {tuple(y.shape)}")
    if outputs.ndim == 1 and y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if loss.name == "ce":
        if outputs.ndim != 2:
            raise ValueError(f'loss="ce" needs logits (n, C), the model gives {tuple(outputs.shape)}')
        if y.ndim == 2:
            if y.shape != outputs.shape:
                raise ValueError(f"y has shape {tuple(y.shape)}, the logits {tuple(outputs.shape)}")
            return y.to(outputs)
        if y.is_floating_point():
            raise TypeError(f"class ids must be integers, got {y.dtype}")
        if bool(((y < 0) | (y >= outputs.shape[1])).any()):
            raise ValueError(f"class ids must be in [0, {outputs.shape[1]}), got {int(y.min())} to {int(y.max())}")
        return F.one_hot(y.long(), outputs.shape[1]).to(outputs)
    if y.shape != outputs.shape:
        raise ValueError(f"y has shape {tuple(y.shape)}, the model gives {tuple(outputs.shape)}")
    if loss.name == "bce" and not bool(((y == 0) | (y == 1)).all()):
        raise ValueError(f"binary labels must be 0 or 1, got {float(y.min()):g} to {float(y.max()):g}")
    return y.to(outputs)


class Rows:
    """A model as a function of flat rows, in one precision."""

    def __init__(self, f: Model, X: Tensor, loss: Loss, dtype: torch.dtype | None) -> None:
        if not isinstance(X, Tensor) or not X.is_floating_point():
            raise TypeError(f"X must be a floating-point tensor, got {getattr(X, 'dtype', type(X).__name__)}")
        if X.ndim < 2 or len(X) == 0 or X[0].numel() == 0:
            raise ValueError(f"X must be (n, d...) and not empty, got shape {tuple(X.shape)}")
        if not bool(torch.isfinite(X).all()):
            raise ValueError("X must be finite")
        self.shape = X.shape[1:]
        self.dtype = X.dtype if dtype is None else dtype
        self.X = X.to(self.dtype).flatten(1)
        self._loss = loss
        self._f = f
        self._state: dict[str, Tensor] = {}
        if isinstance(f, nn.Module):
            everything = [*f.named_parameters(), *f.named_buffers()]
            self._state = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in everything}
        elif isinstance(f, Tensor):
            if f.shape[-1] != self.X.shape[1] or f.ndim > 2:
                raise ValueError(f"a linear model is (d,) or (C, d) with d = {self.X.shape[1]}, got {tuple(f.shape)}")
            self._f = f.to(self.dtype)

    @property
    def linear(self) -> bool:
        """Whether the model is known to be affine in its input: a tensor, or a linear layer after at most a flattening."""
        if isinstance(self._f, Tensor):
            return True
        layers = list(self._f.children()) if isinstance(self._f, nn.Sequential) else [self._f]
        layers = [layer for layer in layers if not isinstance(layer, nn.Flatten | nn.Identity)]
        return len(layers) == 1 and type(layers[0]) is nn.Linear

    @contextmanager
    def measured(self) -> Generator[None]:
        """Eval mode, as it was afterwards: BatchNorm must not mix rows."""
        if isinstance(self._f, nn.Module):
            with eval_mode(self._f):
                yield
        else:
            yield

    def __call__(self, rows: Tensor) -> Tensor:
        """Outputs ``(n,)`` or ``(n, C)``; a single column is dropped for losses of one output."""
        if isinstance(self._f, Tensor):
            return rows @ self._f.mT if self._f.ndim == 2 else rows @ self._f
        shaped = rows.unflatten(1, self.shape)
        out = torch.func.functional_call(self._f, self._state, (shaped,)) if isinstance(self._f, nn.Module) else self._f(shaped)
        if not isinstance(out, Tensor) or out.ndim not in (1, 2) or len(out) != len(rows):
            raise ValueError(f"the model must map {len(rows)} rows to (n,) or (n, C), it gives {_shape(out)}")
        if out.ndim == 2 and out.shape[1] == 1 and self._loss.name != "ce":
            return out[:, 0]
        if out.ndim == 2 and self._loss.name in ("bce", "glm"):
            raise ValueError(f'loss="{self._loss.name}" is for one output, the model gives {tuple(out.shape)}')
        return out


def _shape(out: Any) -> object:
    return tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
