"""Normalisation layers: telling them apart, and keeping the buffers of a model fixed during a pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from outlast._core import _foreach

_TORCH_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def is_norm_layer(module: nn.Module) -> bool:
    """Whether ``module`` normalises its input: torch's layers, and classes of other libraries named ``...Norm``.

    timm's ``LayerNorm2d`` and transformers' ``LlamaRMSNorm`` derive from nothing common; their names are the field's
    convention.
    """
    name = type(module).__name__.rstrip("123d")
    return isinstance(module, _TORCH_NORMS) or name.endswith("Norm")


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
