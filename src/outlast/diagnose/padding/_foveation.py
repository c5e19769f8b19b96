"""How strongly each pixel of the input can reach a feature map, by the arithmetic of windows and padding alone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core._checks import choice
from outlast._core._result import Result
from outlast.diagnose.padding._audit import checked_size
from outlast.diagnose.padding._pad import CONVERSIONS, pad, ratio
from outlast.diagnose.padding._trace import Graph, Step, trace

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ADAPTIVE: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, repr=False)
class FoveationMap(Result):
    """Weighted paths from each pixel of the input to a feature map, over their mean in the centre.

    Attributes:
        map: 1 in the middle, float64, with the input's spatial shape.
        layer: whose output is looked at; empty for the last feature map.
        mode: of padding where one was forced, else empty.
        min_ratio: smallest value.
        corner_ratio: mean over the corner blocks, in the order of the axes: ``(first, last)`` along the last axis within along the first.
        bands: mean over the outermost pixels of each side, ``(top, bottom, left, right)`` for images.
        asym_lr: ``sum |F - flip(F)| / sum |F|`` over the last axis.
        asym_tb: the same over the axis before; 0 for one axis.
    """

    map: Tensor
    layer: str
    mode: str
    min_ratio: float
    corner_ratio: tuple[float, ...]
    bands: tuple[float, ...]
    asym_lr: float
    asym_tb: float

    def _draw(self, ax: Any) -> None:
        picture = self.map if self.map.ndim == 2 else self.map[None] if self.map.ndim == 1 else self.map[self.map.shape[0] // 2]
        shown = ax.imshow(picture.numpy(), vmin=0.0, cmap="viridis")
        ax.figure.colorbar(shown, ax=ax, label="reach, 1 in the centre")
        ax.set_title(f"left {self.bands[-2]:.2f}, right {self.bands[-1]:.2f} of the centre")


def foveation(model: nn.Module, input_size: Sequence[int], *, layer: str | None = None, mode: str | None = None) -> FoveationMap:
    """Map of how strongly each pixel of the input reaches a feature map.

    Kernels are taken as uniform, activations and normalisation as the identity, maximum pooling as a mean, gates as 1; branches that are
    joined add up. What remains is linear, so the map does not depend on an input.

    Args:
        model: as ``audit``.
        input_size: channels and spatial sizes.
        layer: name of the layer whose output is looked at; the last feature map.
        mode: give all convolutions this padding mode (``"partial"`` too), explicit pads before them included.

    Raises:
        TypeError: not a module.
        ValueError: sizes out of range, an unknown mode, or a layer without a spatial output (the message names near ones).
        UnsupportedError: the model runs neither without data nor on zeros.
    """
    size = checked_size(model, input_size)
    if mode is not None:
        choice("mode", mode, CONVERSIONS)
    graph = trace(model, size)
    target = _target(graph, layer)
    x = torch.ones(1, 1, *size[1:], dtype=torch.float64, requires_grad=True)
    out = _evaluate(graph, x, target, mode)
    reach = torch.autograd.grad(out.sum(), x)[0][0, 0]
    return _summarise(reach, layer or "", mode or "")


def _target(graph: Graph, layer: str | None) -> int:
    spatial: list[int] = []
    for number, step in enumerate(graph.steps):
        if step.kind == "input" or (step.kind != "global" and any(source in spatial for source in step.sources)):
            spatial.append(number)
    if layer is None:
        return next(number for number in reversed(spatial) if graph.steps[number].kind != "adaptive")
    if any(step.name == layer for step in graph.steps) and not any(graph.steps[number].name == layer for number in spatial):
        raise ValueError(f"layer {layer!r} reads a global mean, which has no places")
    named = [number for number in spatial if graph.steps[number].name == layer]
    inside = named or [number for number in spatial if graph.steps[number].name.startswith(f"{layer}.")]
    if not inside:
        names = list(dict.fromkeys(step.name for step in graph.steps if step.name))
        near = ", ".join(difflib.get_close_matches(layer, names, n=3)) or ", ".join(names[:3])
        raise ValueError(f"no layer {layer!r} with a spatial output; some that have one: {near}")
    return inside[-1]


def _evaluate(graph: Graph, x: Tensor, target: int, mode: str | None) -> Tensor:
    """The one-channel network of a graph up to a step."""
    values: dict[int, Tensor] = {}
    pads: dict[int, tuple[int, list[int]]] = {}
    for number, step in enumerate(graph.steps[: target + 1]):
        if step.kind == "input":
            values[number] = x
        elif step.kind == "join":
            weights = step.weights or (1.0,) * len(step.sources)
            parts = [w * values[source] for w, source in zip(weights, step.sources, strict=True) if source in values and w != 0.0]
            if parts:
                values[number] = torch.stack(parts).sum(0)
        elif step.sources[0] not in values:
            continue
        elif step.kind == "pad":
            amounts = _amounts(step)
            # Kept apart until a convolution reads it, so that a forced mode applies to the whole of its padding.
            first, before = pads.get(step.sources[0], (step.sources[0], [0] * len(amounts)))
            together = [a + b for a, b in zip(before, amounts, strict=True)]
            pads[number] = (first, together)
            values[number] = _padded(values[step.sources[0]], amounts, step.mode)
        elif step.kind == "window":
            values[number] = _window(step, values, pads, mode)
        elif step.kind == "transposed":
            values[number] = _transposed(step, values[step.sources[0]])
        elif step.kind == "resize":
            values[number] = F.interpolate(values[step.sources[0]], size=step.after, mode="nearest")
        elif step.kind == "adaptive":
            values[number] = _ADAPTIVE[len(step.after)](values[step.sources[0]], step.after)
    return values[target]


def _amounts(step: Step) -> list[int]:
    return [value for axis in reversed(step.axes) for value in (axis["left"], axis["right"])]


def _padded(x: Tensor, amounts: list[int], mode: str) -> Tensor:
    return F.pad(x, amounts) if mode in ("zeros", "partial") or min(amounts) < 0 else pad(x, amounts, mode)


def _window(step: Step, values: dict[int, Tensor], pads: dict[int, tuple[int, list[int]]], mode: str | None) -> Tensor:
    rank = len(step.axes)
    kernel, stride, dilation = ([axis[key] for axis in step.axes] for key in ("kernel", "stride", "dilation"))
    x, amounts, own = values[step.sources[0]], _amounts(step), "zeros"
    mode = mode or ("partial" if step.mode == "partial" else None)
    if mode is not None and step.op == "conv":
        own = mode
        if step.sources[0] in pads:
            first, before = pads[step.sources[0]]
            x, amounts = values[first], [a + b for a, b in zip(before, amounts, strict=True)]
    weight = torch.full((1, 1, *kernel), 1.0, dtype=x.dtype) / torch.tensor(kernel).prod()
    if own == "partial":
        factor = ratio(tuple(x.shape[2:]), tuple(kernel), tuple(stride), tuple(dilation), tuple(amounts), x.device, x.dtype)
        return _CONVOLVE[rank](F.pad(x, amounts), weight, None, stride, 0, dilation) * factor
    x = _padded(x, amounts, own)
    missing = [
        max((after - 1) * s + d * (k - 1) + 1 - size, 0)  # what ceil_mode's last windows read beyond the padding
        for after, s, d, k, size in zip(step.after, stride, dilation, kernel, x.shape[2:], strict=True)
    ]
    if any(missing):
        x = F.pad(x, [value for amount in reversed(missing) for value in (0, amount)])
    return _CONVOLVE[rank](x, weight, None, stride, 0, dilation)


def _transposed(step: Step, x: Tensor) -> Tensor:
    rank = len(step.axes)
    kernel, stride, dilation, padding, extra = (
        [axis[key] for axis in step.axes] for key in ("kernel", "stride", "dilation", "pad", "extra")
    )
    weight = torch.full((1, 1, *kernel), 1.0, dtype=x.dtype) / torch.tensor(kernel).prod()
    return _TRANSPOSED[rank](x, weight, None, stride, padding, extra, 1, dilation)


def _summarise(reach: Tensor, layer: str, mode: str) -> FoveationMap:
    block = reach
    for axis, size in enumerate(reach.shape):
        side = min(32, max(size // 2, 1))
        block = block.narrow(axis, (size - side) // 2, side)
    centre = block.mean()
    F_ = reach / centre if centre != 0.0 else torch.ones_like(reach)
    widths = [min(8, max(size // 4, 1)) for size in F_.shape]
    bands = [float(F_.narrow(axis, start, width).mean()) for axis, width in enumerate(widths) for start in (0, F_.shape[axis] - width)]
    corners: list[Tensor] = [F_]
    for axis, width in enumerate(widths):
        corners = [part.narrow(axis, start, width) for part in corners for start in (0, F_.shape[axis] - width)]
    total = F_.abs().sum()

    def asymmetry(axis: int) -> float:
        return float((F_ - F_.flip(axis)).abs().sum() / total) if total > 0.0 else 0.0

    return FoveationMap(
        map=F_,
        layer=layer,
        mode=mode,
        min_ratio=float(F_.min()),
        corner_ratio=tuple(float(part.mean()) for part in corners),
        bands=tuple(bands),
        asym_lr=asymmetry(-1),
        asym_tb=asymmetry(-2) if F_.ndim > 1 else 0.0,
    )
