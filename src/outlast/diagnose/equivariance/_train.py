"""A ready-made way of training, for one model or for several of one architecture at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from outlast._core._batches import device_of
from outlast._core._checks import choice, integer, real
from outlast._core._norm import is_batch_norm, train_mode
from outlast._core._random import generator as stream_of
from outlast.errors import DivergedError, UnsupportedError

MakeOptimizer = Callable[[Iterable[Any]], torch.optim.Optimizer]
LossFunction = Callable[[Tensor, Tensor], Tensor]

# Their updates act on each entry by itself, so parameters of several models may be stacked.
_ENTRYWISE = (
    torch.optim.SGD,
    torch.optim.ASGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)


class Trainer:
    """``train(model, X, y)``, and ``train.batched(models, X, y)``. Made by ``train_with``."""

    def __init__(
        self,
        optimizer: MakeOptimizer,
        loss: LossFunction,
        steps: int,
        batch_size: int | None,
        schedule: str,
        clip_norm: float | None,
        clip_value: float | None,
        penalty: Callable[[nn.Module], Tensor] | None,
        seed: int,
    ) -> None:
        self._optimizer = optimizer
        self._loss = loss
        self._steps = steps
        self._batch_size = batch_size
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._clip_value = clip_value
        self._penalty = penalty
        self._seed = seed

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        """Train in place.

        Raises:
            ValueError: no data.
            DivergedError: the last loss is not finite.
        """
        with train_mode(model):
            self._train(model, inputs.to(device_of(model)), targets.to(device_of(model)))

    def _train(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = self._optimizer(parameters)
        rates = self._rates(optimizer)
        last: list[Tensor] = []

        for rows in self._batches(len(inputs)):
            x, y = inputs[rows], targets[rows]

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = self._loss(model(x), y)
                if self._penalty is not None:
                    loss = loss + self._penalty(model)
                loss.backward()
                if self._clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
                if self._clip_value is not None:
                    torch.nn.utils.clip_grad_value_(parameters, self._clip_value)
                last[:] = [loss.detach()]
                return loss

            optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]
            rates.step()
        _check_finite(last)

    def batched(self, models: Sequence[nn.Module], inputs: Tensor, targets: Tensor) -> None:
        """Train several models of one architecture at once, in place: the same result as one after another, up to rounding.

        Args:
            models: k of them, without buffers that training changes (BatchNorm), dropout and tied weights.
            inputs: ``(k, n, ...)``, one set for each.
            targets: ``(k, n, ...)``.

        Raises:
            ValueError: no models, or other numbers of models and of sets.
            UnsupportedError: an optimizer whose update mixes entries or that groups parameters by their shape, changing buffers, dropout,
                tied weights, or a ``penalty``.
            DivergedError: the last loss of a model is not finite.
        """
        if not models or len(models) != len(inputs) or len(models) != len(targets):
            raise ValueError(f"{len(models)} models need as many sets, got {len(inputs)} of inputs and {len(targets)} of targets")
        self._check_batched(models[0])
        base = copy.deepcopy(models[0]).to("meta").train()
        inputs, targets = inputs.to(device_of(models[0])), targets.to(device_of(models[0]))
        stacked, buffers = stack_module_state(list(models))  # pyright: ignore[reportArgumentType]
        kept = {name: value.clone() for name, value in buffers.items()}
        names = [name for name, parameter in models[0].named_parameters() if parameter.requires_grad]
        fixed = {name: value.detach() for name, value in stacked.items() if name not in names} | buffers
        values = {name: stacked[name].detach().requires_grad_() for name in names}
        optimizer = self._optimizer(list(values.values()))
        self._check_optimizer(optimizer, list(values.values()), [dict(models[0].named_parameters())[name] for name in names])
        rates = self._rates(optimizer)
        each = torch.vmap(lambda state, x: functional_call(base, state, (x,)), randomness="error")
        losses = torch.vmap(self._loss)
        last: list[Tensor] = []
        for rows in self._batches(inputs.shape[1]):
            optimizer.zero_grad()
            try:
                loss = losses(each({**values, **fixed}, inputs[:, rows]), targets[:, rows])
            except RuntimeError as error:
                if "random" in str(error):
                    raise UnsupportedError("models that draw (dropout) cannot be trained at once; train them one after another") from error
                raise
            loss.sum().backward()
            if self._clip_norm is not None:
                _clip_each(list(values.values()), self._clip_norm)
            if self._clip_value is not None:
                torch.nn.utils.clip_grad_value_(list(values.values()), self._clip_value)
            optimizer.step()
            rates.step()
            last[:] = [loss.detach()]
        if any(not torch.equal(value, kept[name]) for name, value in buffers.items()):
            raise UnsupportedError("training changes buffers of these models, so they cannot be trained at once")
        with torch.no_grad():
            for index, model in enumerate(models):
                own = dict(model.named_parameters())
                for name in names:
                    own[name].copy_(values[name][index])
        _check_finite(last)

    def _check_batched(self, model: nn.Module) -> None:
        if self._penalty is not None:
            raise UnsupportedError("a penalty takes one model; train one after another")
        if any(is_batch_norm(module) or getattr(module, "track_running_stats", False) for module in model.modules()):
            raise UnsupportedError("models that keep statistics in buffers (BatchNorm) cannot be trained at once")
        if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.named_parameters())):
            raise UnsupportedError("models with tied weights cannot be trained at once; train them one after another")
        if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0 for module in model.modules()):
            raise UnsupportedError("models with dropout cannot be trained at once; train them one after another")

    def _check_optimizer(self, optimizer: torch.optim.Optimizer, stacked: list[Tensor], single: list[Tensor]) -> None:
        """The optimizer must treat stacked parameters as it would treat those of one model."""
        if type(optimizer) not in _ENTRYWISE:  # a subclass may do anything
            raise UnsupportedError(
                f"{type(optimizer).__name__} may mix entries of its parameters, so models cannot be trained at once with it; "
                "train them one after another"
            )

        def groups(built: torch.optim.Optimizer, parameters: list[Tensor]) -> list[tuple[list[int], dict[str, str]]]:
            places = {id(parameter): place for place, parameter in enumerate(parameters)}
            skipped = ("params", "param_names")
            return [
                ([places[id(p)] for p in group["params"]], {key: repr(value) for key, value in group.items() if key not in skipped})
                for group in built.param_groups
            ]

        if groups(optimizer, stacked) != groups(self._optimizer(single), single):
            raise UnsupportedError("the optimizer groups parameters by their shape, so models cannot be trained at once with it")

    def _rates(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        if self._schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self._steps)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 0)

    def _batches(self, n: int) -> Iterable[slice | Tensor]:
        """All rows, or batches that go through one permutation after another."""
        if n == 0:
            raise ValueError("there are no examples to train on")
        if self._batch_size is None or self._batch_size >= n:
            yield from [slice(None)] * self._steps
            return
        order, start = torch.empty(0, dtype=torch.long), 0
        stream = stream_of(self._seed, "batches")
        for _ in range(self._steps):
            if start + self._batch_size > len(order):
                order, start = torch.randperm(n, generator=stream), 0
            yield order[start : start + self._batch_size]
            start += self._batch_size


def train_with(
    optimizer: MakeOptimizer,
    *,
    loss: LossFunction,
    steps: int,
    batch_size: int | None = None,
    schedule: Literal["constant", "cosine"] = "constant",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    seed: int = 0,
) -> Trainer:
    """A ready-made ``train(model, inputs, targets)`` for ``equivariance_test`` and ``sample_efficiency``.

    Args:
        optimizer: takes the parameters and gives an optimizer: ``lambda p: torch.optim.SGD(p, lr=0.1)``.
        loss: ``loss(model(x), y)``, a mean.
        steps: updates.
        batch_size: examples in each; None, or more than there are, for all.
        schedule: ``"cosine"`` lets the rate fall to 0.
        clip_norm: largest norm of a model's gradient.
        clip_value: largest size of an entry of it.
        penalty: added to the loss, ``penalty(model)``.
        seed: of the order of batches, the same at every call.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    integer("steps", steps, low=1)
    if batch_size is not None:
        integer("batch_size", batch_size, low=1)
    choice("schedule", schedule, ("constant", "cosine"))
    for name, value in (("clip_norm", clip_norm), ("clip_value", clip_value)):
        if value is not None:
            real(name, value, low=0.0, low_open=True)
    for name, call in (("optimizer", optimizer), ("loss", loss)):
        if not callable(call):
            raise TypeError(f"{name} must be callable, got {type(call).__name__}")
    return Trainer(optimizer, loss, steps, batch_size, schedule, clip_norm, clip_value, penalty, seed)


def _clip_each(parameters: list[Tensor], limit: float) -> None:
    """Clip the gradient of every stacked model by its own norm."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    scale = (limit / (norms + 1e-6)).clamp_max(1.0)  # as torch clips
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))


def _check_finite(last: list[Tensor]) -> None:
    if last and not bool(last[0].isfinite().all()):
        raise DivergedError(f"training ended with a loss of {last[0].tolist()}; lower the learning rate or clip gradients")
