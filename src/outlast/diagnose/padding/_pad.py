"""Padding of any amount in any mode, convolutions that use it, and rewriting a model's convolutions."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core._checks import choice
from outlast._core._precision import full_precision
from outlast.errors import OutlastWarning, UnsupportedError

PaddingMode = Literal["zeros", "symmetric", "reflect", "replicate", "circular"]
MODES = ("zeros", "symmetric", "reflect", "replicate", "circular")
CONVERSIONS = (*MODES, "partial")
_watchers: list[Callable[[Tensor, Tensor, Sequence[int], str], None]] = []
_COUNTED = "_count_include_pad_before_conversion"


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


_Key = tuple[int, int, int, str, torch.device]
_kept: dict[_Key, Tensor] = {}


def _gathered(x: Tensor, axis: int, left: int, right: int, mode: str) -> Tensor:
    key = (int(x.shape[axis]), left, right, mode, x.device)
    if not _is_plain(x):
        return x.index_select(axis, _sources(*key))
    places = _kept.get(key)
    if places is None:
        places = _sources(*key)
        if type(places) is Tensor:  # a tracer turns even what plain tensors lead to into its own
            if len(_kept) >= 512:
                _kept.clear()
            _kept[key] = places
    return x.index_select(axis, places)


class _Mirror(torch.autograd.Function):
    """Symmetric padding by at most the size of each axis: one copy, mirrored strips, and strips added back on the way back.

    Gathering by index would do, but its gradient adds up element by element.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, amounts: tuple[int, ...]) -> Tensor:
        sizes, inner = list(x.shape), [slice(None)] * x.ndim
        pairs = list(_pairs(x.ndim, amounts))
        for axis, left, right in pairs:
            inner[axis] = slice(left, left + x.shape[axis])
            sizes[axis] += left + right
        out = x.new_empty(sizes)
        out[tuple(inner)] = x
        for axis, left, right in pairs:
            inner[axis] = slice(None)  # strips of later axes reach over the padding of this one
            n = x.shape[axis]
            for start, amount, source in ((0, left, left), (left + n, right, left + n - right)):
                if amount:
                    strip, mirrored = list(inner), list(inner)
                    strip[axis], mirrored[axis] = slice(start, start + amount), slice(source, source + amount)
                    out[tuple(strip)] = out[tuple(mirrored)].flip(axis)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, ...]], output: Tensor) -> None:
        ctx.amounts = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _folded(grads[0], list(_pairs(grads[0].ndim, ctx.amounts))), None


def _folded(grad: Tensor, pairs: Sequence[tuple[int, int, int]]) -> Tensor:
    """The middle of a gradient, to which the padding's part is added; the middle is copied once, whatever the number of axes."""
    if not pairs:
        return grad.clone()
    (axis, left, right), rest = pairs[0], pairs[1:]
    n = grad.shape[axis] - left - right
    inside = _folded(grad.narrow(axis, left, n), rest)
    for start, amount, place in ((0, left, 0), (left + n, right, n - right)):
        if amount:
            inside.narrow(axis, place, amount).add_(_folded(grad.narrow(axis, start, amount), rest).flip(axis))
    return inside


def _pairs(ndim: int, amounts: Sequence[int]) -> Iterable[tuple[int, int, int]]:
    """Axis, left and right amount, from the last axis on."""
    return ((ndim - 1 - place, left, right) for place, (left, right) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)))


def _is_plain(x: Tensor) -> bool:
    """Whether what is made now may be kept: not what a compiler, a tracer or inference mode makes, which would spoil later calls."""
    return type(x) in (Tensor, nn.Parameter) and not _is_recorded() and not torch.is_inference_mode_enabled()


def _is_recorded() -> bool:
    """Whether a graph is being made, which must consist of operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


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
    given = x
    mirrors = mode == "symmetric" and all(max(amounts[2 * axis : 2 * axis + 2]) <= size for axis, size in enumerate(sizes))
    if mirrors and not _is_recorded():
        x = cast("Tensor", _Mirror.apply(x, tuple(amounts)))
    else:
        for axis in range(rank):
            left, right = amounts[2 * axis : 2 * axis + 2]
            if left or right:
                x = _gathered(x, -1 - axis, left, right, mode)
    if _watchers and not _is_recorded():
        for watch in _watchers:
            watch(given, x, amounts, mode)
    return x


@contextmanager
def watching_pads(watch: Callable[[Tensor, Tensor, Sequence[int], str], None]) -> Generator[None]:
    """Call ``watch(input, output, amounts, mode)`` after each pad by gathering, which operators alone do not show."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


class _Padded:
    """Convolution whose padding comes from ``pad``; mixed into torch's classes, so parameters and state dict stay theirs."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        choice("padding_mode", padding_mode, MODES)
        settings: dict[str, Any] = {"padding_mode": "zeros", "device": device, "dtype": dtype}  # torch's constructor knows zeros
        torch_class: Any = super()
        torch_class.__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **settings)
        self.padding_mode = padding_mode

    _convolve: Callable[..., Tensor]
    _reversed_padding_repeated_twice: list[int]
    padding_mode: Any
    stride: Any
    dilation: Any
    groups: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        padded = pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
        return type(self)._convolve(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class Conv1d(_Padded, nn.Conv1d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv1d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv1d)


class Conv2d(_Padded, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv2d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv2d)


class Conv3d(_Padded, nn.Conv3d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """``torch.nn.Conv3d`` whose ``padding_mode`` may be ``"symmetric"`` too, and whose padding may exceed the input."""

    _convolve = staticmethod(F.conv3d)


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        torch_class: Any = super()
        torch_class.__init__(*args, **kwargs)
        if torch_class.__getattribute__("padding_mode") != "zeros":
            raise ValueError("a partial convolution has a padding of its own: padding_mode must be 'zeros'")

    _convolve: Callable[..., Tensor]
    _reversed_padding_repeated_twice: list[int]
    kernel_size: Any
    padding: Any
    stride: Any
    dilation: Any
    groups: int

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002  torch's name
        amounts = tuple(self._reversed_padding_repeated_twice)
        rank = len(amounts) // 2
        found = type(self)._convolve(input, weight, None, self.stride, self.padding, self.dilation, self.groups)
        wide = torch.float64 if found.dtype == torch.float64 else torch.float32
        sizes = tuple(int(size) for size in input.shape[-rank:])
        count = _kept_ratio if _is_plain(found) else ratio
        with full_precision(found.device):
            factor = count(sizes, tuple(self.kernel_size), tuple(self.stride), tuple(self.dilation), amounts, found.device, wide)[0, 0]
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


_PADS = (nn.modules.padding._ConstantPadNd, nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd)
_PLAIN: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PADDED: tuple[type[nn.Module], ...] = (Conv1d, Conv2d, Conv3d)
_PARTIAL: tuple[type[nn.Module], ...] = (PartialConv1d, PartialConv2d, PartialConv3d)


def convert(
    model: nn.Module, mode: str, *, where: Iterable[str] | Callable[[str, nn.Module], bool] | None = None, inplace: bool = False
) -> nn.Module:
    """Give the convolutions of a model another padding mode; names, parameters and state dict stay.

    A trained model must be trained on, or at least have its BatchNorm statistics estimated again: its weights expect the old borders.
    Change the input size first (``suggest_sizes``): a mode does not remove the lean of strided layers.

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
            if _is_padded(module.padding):
                original = getattr(module, _COUNTED, module.count_include_pad)  # kept, so that the way back is open
                wanted = original if mode == "zeros" else False
                changed += wanted != module.count_include_pad
                setattr(module, _COUNTED, original)
                module.count_include_pad = wanted
            continue
        if isinstance(module, _PADS):
            warnings.warn(f"layer {name!r} pads by itself and is left as it is", OutlastWarning, stacklevel=2)
        changed += _convert_layer(name, module, mode)
    if not changed:
        warnings.warn(f"changed=0: no padded convolution was given padding mode {mode!r}", OutlastWarning, stacklevel=2)
    return model


def _is_padded(padding: Any) -> bool:
    return padding == "same" or (not isinstance(padding, str) and any(padding if isinstance(padding, tuple) else (padding,)))


def _convert_layer(name: str, module: nn.Module, mode: str) -> bool:
    for plain, padded, partial in zip(_PLAIN, _PADDED, _PARTIAL, strict=True):
        if not isinstance(module, plain):
            continue
        own = type(module) not in (plain, padded, partial)
        if not _is_padded(module.padding) and not (own and max(cast("tuple[int, ...]", module.kernel_size)) > 1):
            continue
        if own:
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
