"""Where normalisation layers take their statistics from: the batch, the source, or something between.

Buffers are never deleted or written: which statistics count is a matter of two flags that torch's layers (and timm's with
an activation, and SyncBatchNorm) read, and of a hook for the modes between.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from outlast._core._distributed import differentiable_sum, world_size
from outlast._core._norm import has_running_statistics, is_batch_norm

Mode = Literal["batch", "source", "ema", "blend"]
MODES: tuple[Mode, ...] = ("batch", "source", "ema", "blend")


class Statistics:
    """The layers of a model that keep running statistics, and the mode that they are in.

    - ``"batch"``: mean and biased variance of the present batch (InstanceNorm: of the instance).
    - ``"source"``: the running statistics of the training.
    - ``"blend"``: ``N/(N+n)`` of the source's and ``n/(N+n)`` of the batch's, ``n`` being the batch's rows.
    - ``"ema"``: a running estimate that starts at the source's and takes ``momentum`` of each batch.
    """

    def __init__(self, model: nn.Module, mode: Mode, *, prior: int, momentum: float) -> None:
        self.mode: Mode = mode
        self.prior = prior
        self.momentum = momentum
        self.layers = [module for module in model.modules() if isinstance(module, _NormBase) and has_running_statistics(module)]
        self._now: Mode = mode
        self._fixed = False
        self._together = False
        self._running: list[tuple[Tensor, Tensor]] | None = None
        self._pending: dict[int, tuple[Tensor, Tensor]] = {}
        if mode in ("ema", "blend"):
            for number, layer in enumerate(self.layers):
                if is_batch_norm(layer):
                    layer.register_forward_pre_hook(_Mixing(self, number))

    @contextmanager
    def using(self, mode: Mode, *, fixed: bool = False) -> Generator[None]:
        """The layers in a mode for the passes inside; ``fixed`` keeps ``"ema"`` from taking in the batch.

        Outside of passes the flags are those of a plain model in eval mode, on which loading a checkpoint depends.
        """
        self._now, self._fixed = mode, fixed
        of_batch = mode == "batch"
        for layer in self.layers:
            layer.track_running_stats = not of_batch
            layer.training = of_batch and is_batch_norm(layer)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.track_running_stats, layer.training = True, False

    @property
    def running(self) -> list[tuple[Tensor, Tensor]]:
        """The running estimate of ``"ema"``: mean and variance of each layer."""
        if self._running is None:
            self._running = [(_mean(layer).clone(), _var(layer).clone()) for layer in self.layers]
        return self._running

    @contextmanager
    def together(self, *, all_mix: bool) -> Generator[None]:
        """Let SyncBatchNorm's mixed statistics be those of all processes in the passes inside, if all of them mix there.

        Elsewhere (a process that predicts by itself, or whose batch is too small) they are the process's own: the others would wait.
        """
        self._together = all_mix and world_size() > 1
        try:
            yield
        finally:
            self._together = False

    def commit(self) -> None:
        """Let the running estimate take in the batch that went through."""
        for number, pair in self._pending.items():
            self.running[number] = pair
        self._pending = {}

    def discard(self) -> None:
        """Forget the batch that went through."""
        self._pending = {}

    def reset(self) -> None:
        """Back to the source's statistics."""
        self._running, self._pending = None, {}

    def mixed(self, number: int, x: Tensor) -> Tensor:
        """``x`` changed so that the layer, using its source statistics, normalises with the mixed ones.

        With ``h' = (h - mu) sqrt((var_s + eps) / (var + eps)) + mu_s`` the layer's own forward gives what it would give
        with ``mu`` and ``var``, whatever it does besides (an activation, say).
        """
        layer = self.layers[number]
        shape = [1, -1] + [1] * (x.ndim - 2)
        h = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_s, var_s = _mean(layer).to(h), _var(layer).to(h)
        if self._now == "ema" and self._fixed:
            mean, var = (value.to(h) for value in self.running[number])
        else:
            shared = isinstance(layer, nn.SyncBatchNorm) and world_size() > 1
            var_b, mean_b, rows = _batch_statistics(layer, h, together=shared and self._together)
            if self._now == "blend":
                share = rows / (self.prior + rows)
                mean, var = torch.lerp(mean_s, mean_b, share), torch.lerp(var_s, var_b, share)
            else:
                pairs = zip(self.running[number], (mean_b, var_b), strict=True)
                mean, var = (torch.lerp(old.to(h), new, self.momentum) for old, new in pairs)
                if self._together or not shared:  # the running estimate stays the same in all processes
                    self._pending[number] = (mean.detach(), var.detach())
        scale = torch.sqrt((var_s + layer.eps) / (var + layer.eps))
        return ((h - mean.view(shape)) * scale.view(shape) + mean_s.view(shape)).to(x.dtype)

    @property
    def mixes(self) -> bool:
        """Whether the present mode lies between batch and source."""
        return self._now in ("ema", "blend")

    def to_state(self) -> list[tuple[Tensor, Tensor]] | None:
        """The running estimate, or None where it is still the source's."""
        return self._running

    def from_state(self, state: Iterable[tuple[Tensor, Tensor]] | None) -> None:
        """Take a running estimate."""
        self._pending = {}
        if state is None:
            self._running = None
            return
        like = [_mean(layer) for layer in self.layers]
        self._running = [(mean.to(m.device, copy=True), var.to(m.device, copy=True)) for m, (mean, var) in zip(like, state, strict=True)]

    def apply(self, move: Any) -> None:
        """Move the running estimate with the model (``nn.Module._apply``)."""
        if self._running is not None:
            self._running = [(move(mean), move(var)) for mean, var in self._running]


class _Mixing:
    """The hook of one layer; an object, so that a copy of the adapter copies it with its statistics."""

    def __init__(self, statistics: Statistics, number: int) -> None:
        self._statistics = statistics
        self._number = number

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self._statistics.mixes:
            return None
        return (self._statistics.mixed(self._number, inputs[0]), *inputs[1:])


def _batch_statistics(layer: _NormBase, h: Tensor, *, together: bool) -> tuple[Tensor, Tensor, float]:
    """Biased variance and mean of the channels, and the rows that they are of: this process's, or those of all."""
    places = [0, *range(2, h.ndim)]
    if not together:
        var, mean = torch.var_mean(h, places, correction=0)
        return var, mean, float(len(h))
    group: Any = getattr(layer, "process_group", None)
    own = h.new_tensor([len(h), h.numel() / h.shape[1]])
    torch.distributed.all_reduce(own, group=group)
    rows, count = own.tolist()
    mean = differentiable_sum(h.sum(places), group) / count
    around = h - mean.view([1, -1] + [1] * (h.ndim - 2))
    return differentiable_sum(around.square().sum(places), group) / count, mean, rows


def _mean(layer: _NormBase) -> Tensor:
    return cast("Tensor", layer.running_mean)


def _var(layer: _NormBase) -> Tensor:
    return cast("Tensor", layer.running_var)
