"""What padding has done to a trained network: the mean of its feature maps, and the mean of its kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outlast._core._batches import device_of
from outlast._core._checks import integer
from outlast._core._norm import eval_mode
from outlast._core._random import generator as derived_generator
from outlast._core._result import Result

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, repr=False)
class MapBias(Result):
    """The mean feature map of one layer.

    Attributes:
        name: of the layer.
        border_ratio: mean of the outermost ring over the mean of the rest; 1 where both are 0.
        lr: ``(left - right) / (|left| + |right|)`` over halves.
        tb: the same from top to bottom.
        line: largest distance of the mean of a row or column from the median of its kind, in median absolute deviations (mean ones where
            most lines are alike, so that a single bad line shows).
        constant_border_ratio: the border ratio on an image of one colour, which holds the arithmetic and not the data.
        constant_lr: likewise.
        constant_tb: likewise.
        constant_line: likewise.
        map: the mean over images and channels, ``(H, W)``, float64.
    """

    name: str
    border_ratio: float
    lr: float
    tb: float
    line: float
    constant_border_ratio: float
    constant_lr: float
    constant_tb: float
    constant_line: float
    map: Tensor

    def _draw(self, ax: Any) -> None:
        ax.figure.colorbar(ax.imshow(self.map.numpy()), ax=ax)
        ax.set_title(f"{self.name}: border over interior {self.border_ratio:.2f}")


@dataclass(frozen=True, repr=False)
class FeatureBias(Result):
    """Mean feature maps over inputs.

    Attributes:
        layers: one for each layer.
        items: inputs that were counted.
        flips: whether inputs were mirrored at random, so that what photographs have on top cancels.
    """

    layers: tuple[MapBias, ...]
    items: int
    flips: bool

    def _draw(self, ax: Any) -> None:
        for field in ("lr", "tb", "constant_lr", "constant_tb"):
            ax.plot([getattr(layer, field) for layer in self.layers], marker="o", label=field)
        ax.set_xticks(range(len(self.layers)), [layer.name for layer in self.layers], rotation=90)
        ax.axhline(0.0, color="grey", linestyle="--")
        ax.legend()


def _statistics(M: Tensor) -> tuple[float, float, float, float]:
    """Border over interior, left against right, top against bottom, line."""
    height, width = M.shape
    inside = M[1:-1, 1:-1]
    ring = (M.sum() - inside.sum()) / max(M.numel() - inside.numel(), 1)
    interior = inside.mean() if inside.numel() else ring
    border = float(ring / interior) if interior != 0.0 else 1.0

    def lean(first: Tensor, last: Tensor) -> float:
        a, b = float(first.mean()), float(last.mean())
        return (a - b) / (abs(a) + abs(b)) if abs(a) + abs(b) > 0.0 else 0.0

    left_right = lean(M[:, : width // 2], M[:, -(width // 2) :]) if width > 1 else 0.0
    top_bottom = lean(M[: height // 2], M[-(height // 2) :]) if height > 1 else 0.0
    lines: list[float] = []
    for means in (M.mean(0), M.mean(1)):
        distance = (means - means.median()).abs()
        scale = distance.median() if float(distance.median()) > 0.0 else distance.mean()
        lines.append(float(distance.max() / scale) if scale > 0.0 else 0.0)
    return border, left_right, top_bottom, max(lines)


def feature_bias(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    flips: bool = True,
    max_items: int = 1000,
    seed: int = 0,
) -> FeatureBias:
    """Mean feature maps of a trained network over inputs, and over an image of their mean colour.

    Args:
        model: of images; left as it is.
        loader: batches of images, or of (images, ...).
        layers: names; all convolutions.
        flips: mirror each image at random in both directions, so that only what the network does remains.
        max_items: images to look at; 200 or more give steady maps.
        seed: of the flips.

    Raises:
        TypeError: not a module, or batches without images.
        ValueError: unknown layers, layers without maps, no images, or images of several sizes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    integer("max_items", max_items, low=1)
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)] if layers is None else list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(f"the model has no layer {', '.join(unknown)}" if unknown else "the model has no two-dimensional convolution")
    sums: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if not isinstance(out, Tensor) or out.ndim != 4:
                raise ValueError(f"layer {name!r} gives no feature map of four dimensions")
            found = out.detach().mean(1).sum(0).cpu().double()
            sums[name] = sums[name] + found if name in sums else found

        return hook

    stream = derived_generator(seed, "flips")
    device = device_of(model)
    colour: Tensor | None = None
    shape, dtype = torch.Size(), torch.float32
    items = 0
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in loader:
                images = batch[0] if isinstance(batch, tuple | list) else batch
                if not isinstance(images, Tensor) or images.ndim != 4:
                    raise TypeError("the loader must give images (n, channels, height, width), alone or first in a tuple")
                images = images[: max_items - items].to(device)
                if flips:
                    for axis in (-1, -2):
                        turn = (torch.rand(len(images), generator=stream) < 0.5).to(device)
                        images = torch.where(turn[:, None, None, None], images.flip(axis), images)
                if colour is not None and images.shape[1:] != shape[1:]:
                    raise ValueError(f"images must have one size, got {tuple(shape[1:])} and {tuple(images.shape[1:])}")
                total = images.float().sum((0, -2, -1), keepdim=True)
                colour = total if colour is None else colour + total
                shape, dtype = images.shape, images.dtype
                model(images)
                items += len(images)
                if items >= max_items:
                    break
            if colour is None or not items:
                raise ValueError("the loader gave no images")
            real = {name: value / items for name, value in sums.items()}
            sums.clear()
            model((colour / (items * shape[-1] * shape[-2])).to(dtype).expand(1, *shape[1:]))
    finally:
        for hook in hooks:
            hook.remove()
    found: list[MapBias] = []
    for name in names:
        if name not in real:
            raise ValueError(f"layer {name!r} did not run")
        constant = _statistics(sums[name])
        found.append(MapBias(name, *_statistics(real[name]), *constant, map=real[name]))
    return FeatureBias(tuple(found), items, flips)


@dataclass(frozen=True, repr=False)
class KernelRow(Result):
    """The mean kernel of one layer.

    Attributes:
        name: of the layer.
        asym_h: ``|K - flip(K)| / |K|`` from left to right, K the mean over output and input channels.
        asym_v: from top to bottom.
        p_h: share of random flips of single kernels with at least this asymmetry, from left to right.
        p_v: from top to bottom.
        strided: whether the layer has a stride.
    """

    name: str
    asym_h: float
    asym_v: float
    p_h: float
    p_v: float
    strided: bool


@dataclass(frozen=True, repr=False)
class KernelAsymmetry(Result):
    """Asymmetry of mean kernels, with its chance level.

    Attributes:
        layers: one for each convolution with a kernel larger than 1.
        num_permutations: random flips behind each p-value.
    """

    layers: tuple[KernelRow, ...]
    num_permutations: int

    def _draw(self, ax: Any) -> None:
        for field in ("p_h", "p_v"):
            ax.plot([getattr(layer, field) for layer in self.layers], "o", label=field)
        ax.set_xticks(range(len(self.layers)), [layer.name for layer in self.layers], rotation=90)
        ax.set_yscale("log")
        ax.legend()


def kernel_asymmetry(model: nn.Module, num_permutations: int = 200, seed: int = 0) -> KernelAsymmetry:
    """How far mean kernels are from mirror symmetry, and how often chance gives as much.

    The raw number says nothing: random kernels are asymmetric too. Each kernel is therefore flipped at random, again and again.

    Args:
        model: any model with convolutions.
        num_permutations: random flips.
        seed: of the flips.

    Raises:
        TypeError: not a module.
        ValueError: no permutation.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    integer("num_permutations", num_permutations, low=1)
    rows: list[KernelRow] = []
    for name, module in model.named_modules():
        if not isinstance(module, _CONVOLUTIONS) or max(module.kernel_size) == 1:
            continue
        kernels = module.weight.detach().double().cpu().flatten(0, 1)
        strided = max(module.stride) > 1
        stream = derived_generator(seed, f"kernels/{name}")
        h = _asymmetry(kernels, -1, num_permutations, stream)
        v = _asymmetry(kernels, -2, num_permutations, stream) if kernels.ndim > 2 else (0.0, 1.0)
        rows.append(KernelRow(name, h[0], v[0], h[1], v[1], strided))
    return KernelAsymmetry(tuple(rows), num_permutations)


def _asymmetry(kernels: Tensor, axis: int, count: int, stream: torch.Generator) -> tuple[float, float]:
    """Asymmetry of the mean kernel and its p-value."""
    # K and its flip depend on the kernels through their even and odd parts; a flip changes the sign of the odd one.
    even = (kernels + kernels.flip(axis)).flatten(1).mean(0) / 2.0
    odd = (kernels - kernels.flip(axis)).flatten(1) / 2.0
    signs = torch.rand(count, len(kernels), generator=stream, dtype=torch.float64).lt(0.5).double() * 2.0 - 1.0

    def of(mean_odd: Tensor) -> Tensor:
        size = (even.square().sum() + mean_odd.square().sum(-1)).sqrt()
        return torch.where(size > 0.0, 2.0 * mean_odd.norm(dim=-1) / size, 0.0)

    observed = of(odd.mean(0))
    if not (even.any() or odd.mean(0).any()):
        return 0.0, 1.0
    drawn = of(signs @ odd / len(kernels))
    return float(observed), (1.0 + float((drawn >= observed * (1.0 - 1e-12)).sum())) / (count + 1.0)
