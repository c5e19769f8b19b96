"""Functional calls that multiply rows by a weight, told from inside a ``torch.overrides.TorchFunctionMode``.

Modules, functional use and tied weights all end in these few functions, so that what is keyed by the identity of a weight
sees every use of it. A mode sees a call before autograd does, with the parameters themselves as arguments.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_LINEAR = ("input", "weight", "bias")
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ATTENTION = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
)  # fmt: skip

# function -> (kind, names of its positional arguments)
CALLS: Mapping[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    F.linear: ("linear", _LINEAR),
    torch.addmm: ("addmm", ("bias", "input", "weight")),
    torch.conv1d: ("conv", _CONV),
    torch.conv2d: ("conv", _CONV),
    torch.conv3d: ("conv", _CONV),
    torch.conv_transpose1d: ("conv_transpose", _TRANSPOSED),
    torch.conv_transpose2d: ("conv_transpose", _TRANSPOSED),
    torch.conv_transpose3d: ("conv_transpose", _TRANSPOSED),
    F.embedding: ("embedding", ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")),
    F.embedding_bag: ("embedding_bag", ("input", "weight", "offsets")),
    F.multi_head_attention_forward: ("attention", _ATTENTION),
    F.layer_norm: ("layer_norm", ("input", "normalized_shape", "weight", "bias", "eps")),
    F.rms_norm: ("rms_norm", ("input", "normalized_shape", "weight", "eps")),
    F.group_norm: ("group_norm", ("input", "num_groups", "weight", "bias", "eps")),
    F.batch_norm: ("batch_norm", ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")),
}


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name. ``torch.addmm`` calls its matrices ``mat1`` and ``mat2``: those become ``input`` and ``weight``."""
    bound = {**dict(zip(names, args, strict=False)), **kwargs}
    if "mat2" in bound:
        bound["bias"] = bound.pop("input", bound.get("bias"))
        bound["input"], bound["weight"] = bound.pop("mat1"), bound.pop("mat2")
    return bound


def eager() -> AbstractContextManager[Any]:
    """Compiled models run uncompiled inside: a mode does not see what happens in a graph."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing the compiler takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def spatial(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One number for each spatial dimension."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * count if len(value) == 1 else tuple(value)


def padded(x: Tensor, weight: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The input of a convolution, batched, with its zeros around it (other paddings are applied before the call)."""
    count = weight.ndim - 2
    x = x if x.ndim == weight.ndim else x[None]
    padding = call.get("padding", 0)
    if padding == "valid":
        return x
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(spatial(call.get("dilation", 1), count), weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in spatial(padding, count)]
    return F.pad(x, [amount for side in reversed(sides) for amount in side])


def patches(x: Tensor, weight: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The patches that a convolution multiplies, shape ``(groups, rows, channels / groups * kernel)``, in the order of ``weight``."""
    count, groups = weight.ndim - 2, int(call.get("groups", 1))
    strides, dilations = spatial(call.get("stride", 1), count), spatial(call.get("dilation", 1), count)
    windows = padded(x, weight, call)
    for axis, (kernel, stride, dilation) in enumerate(zip(weight.shape[2:], strides, dilations, strict=True)):
        windows = windows.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    n, channels = windows.shape[:2]
    windows = windows.reshape(n, groups, channels // groups, *windows.shape[2:])
    places = range(3, 3 + count)
    kernel_axes = range(3 + count, 3 + 2 * count)
    return windows.permute(1, 0, *places, 2, *kernel_axes).reshape(groups, -1, weight[0].numel())


def channel_rows(x: Tensor, weight: Tensor, call: Mapping[str, Any]) -> Tensor:
    """The channel vectors that a transposed convolution multiplies, shape ``(groups, rows, channels / groups)``."""
    groups = int(call.get("groups", 1))
    x = x if x.ndim == weight.ndim else x[None]
    return x.reshape(len(x), groups, x.shape[1] // groups, -1).permute(1, 0, 3, 2).reshape(groups, -1, x.shape[1] // groups)
