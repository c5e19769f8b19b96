"""Many crops of one frame through a convolutional encoder at the cost of a few.

Convolutions without padding commute with cropping: the features of a crop are a crop of the frame's features, as long as the crop begins at
a multiple of the encoder's stride. So the crops of a frame are encoded once for each remainder of their places by that stride, on the
smallest part of the frame that holds them all. The result is that of encoding each crop, up to rounding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from outlast.adapt._auxiliary import RandomCrop, as_floats

_POINTWISE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout, nn.BatchNorm2d)
_FUNCTIONS: set[Any] = {torch.relu, torch.tanh, torch.sigmoid, F.relu, F.gelu, F.silu, F.elu}
_WORTH = 0.5  # share of the arithmetic below which the further calls pay

Step = Callable[[Tensor], Tensor]


class CropSharing:
    """The convolutions of an encoder, and what follows them.

    Args:
        convolutions: without padding, and what acts on each position alone.
        rest: what follows, such as a flattening and linear layers.
        stride: of all convolutions together, height and width.
        crop: whose crops are encoded.
    """

    def __init__(self, convolutions: Sequence[Step], rest: Sequence[Step], stride: tuple[int, int], crop: RandomCrop) -> None:
        self._convolutions, self._rest, self._stride, self._crop = convolutions, rest, stride, crop

    @classmethod
    def of(cls, encoder: nn.Module, crop: RandomCrop) -> CropSharing | None:
        """Take an encoder apart; None where it is no chain that begins with such convolutions."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules()):
            return None
        try:
            graph = fx.Tracer().trace(encoder)
        except Exception:  # whatever a user's forward does that cannot be traced
            return None
        before = next(iter(graph.nodes))
        convolutions: list[Step] = []
        rest: list[Step] = []
        stride = (1, 1)
        for node in list(graph.nodes)[1:]:
            if node.op == "output":
                return cls(convolutions, rest, stride, crop) if node.args == (before,) and stride != (1, 1) else None
            if node.all_input_nodes != [before] or len(before.users) != 1 or node.op not in ("call_module", "call_function", "call_method"):
                return None
            step = _step(encoder, node, before)
            module = encoder.get_submodule(str(node.target)) if node.op == "call_module" else None
            plain = node.op == "call_function" and node.target in _FUNCTIONS
            if not rest and isinstance(module, nn.Conv2d) and _unpadded(module):
                stride = (stride[0] * module.stride[0], stride[1] * module.stride[1])
                convolutions.append(step)
            elif not rest and (plain or (type(module) in _POINTWISE and not getattr(module, "training", False))):
                convolutions.append(step)
            else:
                rest.append(step)
            before = node
        return None

    def groups(self, sources: Tensor, tops: Tensor, lefts: Tensor) -> list[tuple[list[int], tuple[int, int, int, int]]]:
        """Crops that are encoded together, and the part of the frame that holds them: top, left, bottom, right."""
        (h, w), (sy, sx) = self._crop.size, self._stride
        members: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        places = list(zip(sources.tolist(), tops.tolist(), lefts.tolist(), strict=True))
        for number, (source, top, left) in enumerate(places):
            members[source, top % sy, left % sx].append(number)
        found: list[tuple[list[int], tuple[int, int, int, int]]] = []
        for numbers in members.values():
            ys, xs = ([places[number][side] for number in numbers] for side in (1, 2))
            found.append((numbers, (min(ys), min(xs), max(ys) + h, max(xs) + w)))
        return found

    def possible(self, crops: int) -> bool:
        """Whether so many crops of a frame can be worth it: a part for each remainder is encoded."""
        return self._stride[0] * self._stride[1] < _WORTH * crops

    def worth(self, groups: Sequence[tuple[list[int], tuple[int, int, int, int]]]) -> bool:
        """Whether encoding parts of frames is much less work than encoding crops."""
        crops = sum(len(numbers) for numbers, _ in groups) * self._crop.size[0] * self._crop.size[1]
        return sum((bottom - top) * (right - left) for _, (top, left, bottom, right) in groups) < _WORTH * crops

    def __call__(
        self,
        frames: Tensor,
        tops: Tensor,
        lefts: Tensor,
        groups: Sequence[tuple[list[int], tuple[int, int, int, int]]],
        dtype: torch.dtype,
    ) -> Tensor:
        """The encoder's features of the crops of ``(B, C, H, W)`` at given places."""
        (h, w), (sy, sx) = self._crop.size, self._stride
        found: list[Tensor | None] = [None] * len(frames)
        size: tuple[int, int] | None = None
        for numbers, (top, left, bottom, right) in groups:
            maps = as_floats(frames[numbers[0] : numbers[0] + 1, :, top:bottom, left:right]).to(dtype)
            for step in self._convolutions:
                maps = step(maps)
            if size is None:  # of a crop's features: those of the whole part, less a row for each stride that the part is longer
                size = maps.shape[-2] - (bottom - top - h) // sy, maps.shape[-1] - (right - left - w) // sx
            for number in numbers:
                y, x = (int(tops[number]) - top) // sy, (int(lefts[number]) - left) // sx
                found[number] = maps[0, :, y : y + size[0], x : x + size[1]]
        features = torch.stack([each for each in found if each is not None])
        for step in self._rest:
            features = step(features)
        return features


def _unpadded(layer: nn.Conv2d) -> bool:
    return layer.padding in ((0, 0), "valid")


def _step(encoder: nn.Module, node: fx.Node, before: fx.Node) -> Step:
    """One node of the chain as a function of the value before it."""
    target: Any = encoder.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def run(x: Tensor) -> Any:
        args, kwargs = (cast("Any", map_arg(part, lambda each: x if each is before else each)) for part in (node.args, node.kwargs))
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    return run
