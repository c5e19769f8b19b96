"""Normalisation layers: telling them apart, keeping buffers fixed during a pass, estimating statistics anew."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from outlast._core import _foreach
from outlast._core._batches import call_with

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# timm's LayerNorm2d and RmsNormAct2d, transformers' LlamaRMSNorm derive from nothing common; their names are the field's
# convention. Weight and spectral normalisation act on weights, not on activations.
_NORM_NAME = re.compile(r"(?<!Weight)(?<!Spectral)Norm\d?(Act)?([123]d)?$")


def is_norm_layer(module: nn.Module) -> bool:
    """Whether ``module`` normalises its input: torch's layers, and classes of other libraries named ``...Norm``."""
    return isinstance(module, _TORCH_NORMS) or _NORM_NAME.search(type(module).__name__) is not None


def is_batch_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalises over the batch (any BatchNorm, SyncBatchNorm, timm's with an activation)."""
    return isinstance(module, _BatchNorm)


def has_running_statistics(module: nn.Module) -> bool:
    """Whether ``module`` keeps statistics of the training data for its use in eval mode."""
    return isinstance(module, _NormBase) and module.running_mean is not None


class BufferSnapshot:
    """The floating and integer buffers of modules in training mode, to be put back after a pass.

    A copy and a restore is exact for every layer (BatchNorm with cumulative average, InstanceNorm, SyncBatchNorm,
    spectral normalisation), while switching ``track_running_stats`` or ``momentum`` off misses some of them and makes
    compiled models recompile. Boolean buffers are masks and are left alone.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._values: list[Tensor] = []
        for module in modules:
            if not module.training:
                continue
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype != torch.bool:
                    self._places.append((module, name))
                    self._values.append(buffer.detach().clone())

    def restore(self) -> None:
        """Copy the kept values into the buffers as they are now."""
        with torch.no_grad():
            current = [module.get_buffer(name) for module, name in self._places]
            _foreach.copy_(current, self._values)


@contextmanager
def eval_mode(model: nn.Module) -> Generator[None]:
    """Eval mode for the time of a measurement; afterwards every module's own flag is as it was."""
    with _mode(model, training=False):
        yield


@contextmanager
def train_mode(model: nn.Module) -> Generator[None]:
    """Training mode for a while; afterwards every module's own flag is as it was."""
    with _mode(model, training=True):
        yield


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Generator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[object]) -> None:
    """Estimate the running statistics of every BatchNorm layer anew, in one pass over data.

    Statistics are reset, then averaged over the batches with equal weights (so batches should be of one size). Other
    layers stay in eval mode during the pass (no dropout); modes and momenta are as before afterwards.

    Args:
        model: changed in place.
        batches: tensors, tuples or lists whose first entry is the input, or mappings of keyword arguments.

    Raises:
        ValueError: no layer with running statistics, or no batches.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and has_running_statistics(module)]
    if not layers:
        raise ValueError("the model has no BatchNorm layer with running statistics, so there is nothing to recalibrate")
    momenta = [layer.momentum for layer in layers]
    kept = [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers()]
    count = 0
    with eval_mode(model), torch.no_grad():
        try:
            for batch in batches:
                if count == 0:
                    for layer in layers:
                        layer.reset_running_stats()
                        layer.momentum = None  # the cumulative average
                        layer.train()
                call_with(model, batch)
                count += 1
        except BaseException:
            for buffer, value in kept:
                buffer.copy_(value)
            raise
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if count == 0:
        raise ValueError("batches is empty, so there is nothing to estimate statistics from")
