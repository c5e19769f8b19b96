"""Padding of any amount in any mode, convolutions that use it, and rewriting a model's convolutions."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core._checks import choice
from outlast.errors import OutlastWarning, UnsupportedError

PaddingMode = Literal["zeros", "symmetric", "reflect", "replicate", "circular"]
MODES = ("zeros", "symmetric", "reflect", "replicate", "circular")
CONVERSIONS = (*MODES, "partial")


def _sources(n: int, left: int, right: int, mode: str, device: torch.device) -> Tensor:
    """Which of n pixels stands at each place from ``-left`` to ``n + right``."""
    i = torch.arange(-left, n + right, device=device)
    if mode == "symmetric":
        j = i % (2 * n)
        return torch.where(j < n, j, 2 * n - 1 - j)
    if mode == "reflect":
        j = i % max(2 * n - 2, 1)
        return torch.where(j < n, j, 2 * n - 2 - j)
    return i.clamp(0, n - 1) if mode == "replicate" else i % n


_kept_sources = functools.lru_cache(maxsize=512)(_sources)


def pad(x: Tensor, amounts: Sequence[int], mode: PaddingMode | str) -> Tensor:
    """Pad the last axes, like ``torch.nn.functional.pad``, by any amount in any mode.

    Args:
        x: any leading shape.
        amounts: ``(left, right)``, ``(left, right, top, bottom)``, ...: pairs from the last axis on.
        mode: ``"zeros"``; ``"symmetric"`` mirrors with the border pixel repeated; ``"reflect"`` without; ``"replicate"`` repeats the border
            pixel; ``"circular"`` wraps. Unlike in torch, amounts may exceed the size.

    Raises:
        ValueError: an odd number of amounts, more pairs than axes, a negative amount, an empty axis to mirror, an unknown mode.
    """
    choice("mode", mode, MODES)
    amounts = [int(amount) for amount in amounts]
    if len(amounts) % 2 or len(amounts) > 2 * x.ndim:
        raise ValueError(f"amounts must be pairs for at most {x.ndim} axes, got {len(amounts)} values")
    if any(amount < 0 for amount in amounts):
        raise ValueError(f"amounts must not be negative, got {tuple(amounts)}; slice the tensor to crop it")
    if mode == "zeros":
        return F.pad(x, amounts)
    rank = len(amounts) // 2
    sizes = [x.shape[-1 - axis] for axis in range(rank)]
    if any(size == 0 and sum(amounts[2 * axis : 2 * axis + 2]) for axis, size in enumerate(sizes)):
        raise ValueError(f"nothing to take padding from: the tensor has shape {tuple(x.shape)}")
    if max(amounts, default=0) == 0:
        return x
    if mode == "symmetric" and max(amounts) <= 1:
        mode = "replicate"  # the same thing, and one kernel
    if x.ndim == rank + 2 and 1 <= rank <= 3 and mode != "symmetric":
        limit = {"reflect": -1, "circular": 0}.get(mode)
        pairs = zip(sizes, amounts[::2], amounts[1::2], strict=True)
        if limit is None or all(max(left, right) <= size + limit for size, left, right in pairs):
            return F.pad(x, amounts, mode=mode)
    sources = _sources if torch.compiler.is_compiling() else _kept_sources  # a compiled graph keeps them itself
    for axis, size in enumerate(sizes):
        left, right = amounts[2 * axis : 2 * axis + 2]
        if left or right:
            x = x.index_select(-1 - axis, sources(size, left, right, mode, x.device))
    return x


class _Padded:
    """Convolution whose padding comes from :func:`pad`; mixed into torch's classes, so parameters and state dict stay theirs."""

    _convolve: Callable[..., Tensor]
    _reversed_padding_repeated_twice: list[int]
    padding_mode: Any
    stride: Any
    dilation: Any
    groups: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        padded = pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return type(self)._convolve(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


def _built(kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Checks the mode and hands torch's constructor one that it knows."""
    mode = kwargs.get("padding_mode", "zeros")
    choice("padding_mode", mode, MODES)
    return {**kwargs, "padding_mode": "zeros"}


class Conv1d(_Padded, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv1d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv1d)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_built(nn.Conv1d, args, kwargs))
        self.padding_mode = kwargs.get("padding_mode", "zeros")


class Conv2d(_Padded, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv2d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv2d)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_built(nn.Conv2d, args, kwargs))
        self.padding_mode = kwargs.get("padding_mode", "zeros")


class Conv3d(_Padded, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv3d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv3d)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_built(nn.Conv3d, args, kwargs))
        self.padding_mode = kwargs.get("padding_mode", "zeros")


def ratio(
    sizes: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    amounts: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Taps of a window over its taps on real pixels, at each output position; 0 where there is none."""
    with torch.no_grad():
        ones = F.pad(torch.ones(1, 1, *sizes, dtype=dtype, device=device), amounts)
        weight = torch.ones(1, 1, *kernel, dtype=dtype, device=device)
        counts = (F.conv1d, F.conv2d, F.conv3d)[len(sizes) - 1](ones, weight, None, stride, 0, dilation)
        return torch.where(counts > 0.5, weight.numel() / counts.clamp_min(1.0), 0.0)


_kept_ratio = functools.lru_cache(maxsize=256)(ratio)


class _Partial:
    """Partial convolution (Liu et al., 2018, as padding): sums over real pixels, scaled up to the whole window."""

    _convolve: Callable[..., Tensor]
    _reversed_padding_repeated_twice: list[int]
    kernel_size: Any
    stride: Any
    dilation: Any
    groups: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        amounts = tuple(self._reversed_padding_repeated_twice)
        rank = len(amounts) // 2
        found = type(self)._convolve(F.pad(input, amounts), weight, None, self.stride, 0, self.dilation, self.groups)
        wide = torch.float64 if found.dtype == torch.float64 else torch.float32
        sizes = tuple(int(size) for size in input.shape[-rank:])
        count = ratio if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() else _kept_ratio
        with torch.autocast(found.device.type, enabled=False):
            factor = count(sizes, tuple(self.kernel_size), tuple(self.stride), tuple(self.dilation), amounts, found.device, wide)
        found = (found * factor).to(found.dtype)
        return found if bias is None else found + bias.to(found.dtype).view(-1, *[1] * rank)


class PartialConv1d(_Partial, nn.Conv1d):
    """``torch.nn.Conv1d`` without dark borders: padding does not count."""

    _convolve = staticmethod(F.conv1d)


class PartialConv2d(_Partial, nn.Conv2d):
    """``torch.nn.Conv2d`` without dark borders: padding does not count."""

    _convolve = staticmethod(F.conv2d)


class PartialConv3d(_Partial, nn.Conv3d):
    """``torch.nn.Conv3d`` without dark borders: padding does not count."""

    _convolve = staticmethod(F.conv3d)


_PLAIN: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADDED: tuple[type[nn.Module], ...] = (Conv1d, Conv2d, Conv3d)
_PARTIAL: tuple[type[nn.Module], ...] = (PartialConv1d, PartialConv2d, PartialConv3d)


def convert(
    model: nn.Module, mode: str, *, where: Iterable[str] | Callable[[str, nn.Module], bool] | None = None, inplace: bool = False
) -> nn.Module:
    """Give the convolutions of a model another padding mode; names, parameters and state dict stay.

    A trained model must be trained on, or at least have its BatchNorm statistics estimated again: its weights expect the old borders.
    Change the input size first (:func:`suggest_sizes`): a mode does not remove the lean of strided layers.

    Args:
        model: any model.
        mode: ``"zeros"``, ``"symmetric"``, ``"reflect"``, ``"replicate"``, ``"circular"`` or ``"partial"``.
        where: names of the layers, or a function of name and module; all padded convolutions.
        inplace: change the model itself.

    Returns:
        The converted model. Where nothing was to change, an unchanged one, and a warning.

    Raises:
        TypeError: not a module.
        ValueError: unknown mode or names.
        UnsupportedError: quantised convolutions.
    """
    choice("mode", mode, CONVERSIONS)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names = None if where is None or callable(where) else set(where)
    if names is not None and names - {name for name, _ in model.named_modules()}:
        raise ValueError(f"the model has no layer {', '.join(sorted(names - {name for name, _ in model.named_modules()}))}")
    for name, module in model.named_modules():
        if (
            type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))
            and "Conv" in type(module).__name__
        ):
            raise UnsupportedError(f"layer {name!r} is a quantised convolution, whose padding is fixed; convert before quantising")
    if not inplace:
        model = copy.deepcopy(model)
    changed = 0
    for name, module in model.named_modules():
        if where is not None and not (where(name, module) if callable(where) else name in cast("set[str]", names)):
            continue
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d):
            if _is_padded(module.padding) and mode != "zeros":
                changed += module.count_include_pad
                module.count_include_pad = False
            continue
        changed += _convert_layer(name, module, mode)
    if not changed:
        warnings.warn(f"changed=0: no padded convolution was given padding mode {mode!r}", OutlastWarning, stacklevel=2)
    return model


def _is_padded(padding: Any) -> bool:
    return padding == "same" or (not isinstance(padding, str) and any(padding if isinstance(padding, tuple) else (padding,)))


def _convert_layer(name: str, module: nn.Module, mode: str) -> bool:
    for plain, padded, partial in zip(_PLAIN, _PADDED, _PARTIAL, strict=True):
        if not isinstance(module, plain) or not _is_padded(module.padding):
            continue
        if type(module) not in (plain, padded, partial):
            message = f"layer {name!r} is a {type(module).__name__}, which pads in its own way; it is left as it is"
            warnings.warn(message, OutlastWarning, stacklevel=4)
            return False
        wanted = plain if mode == "zeros" else partial if mode == "partial" else padded
        before = (type(module), module.padding_mode)
        layer: Any = module
        layer.__class__ = wanted
        layer.padding_mode = "zeros" if mode == "partial" else mode
        return before != (wanted, layer.padding_mode)
    return False
