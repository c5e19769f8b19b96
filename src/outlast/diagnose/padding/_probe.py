"""Where a trained model is blind: its answer to a small stimulus at every place of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from outlast._core._batches import device_of
from outlast._core._checks import integer, real
from outlast._core._norm import eval_mode
from outlast._core._result import Result

Score = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class BlindSpotMap(Result):
    """The score of a stimulus by place, mean over backgrounds.

    Attributes:
        scores: ``(rows, columns)`` of the grid.
        rows: top edges of the stimulus, in pixels.
        columns: left edges.
        centre: median score over the central half of the grid.
        blind: share of places whose score lies more than ``1 - rel`` of the centre's size below the centre (below ``rel`` times a centre
            above 0).
        rel: as given.
        bands: mean over the two outermost rows or columns, ``(top, bottom, left, right)``.
        argmin: ``(row, column)`` of the least score, in pixels.
    """

    scores: Tensor
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    centre: float
    blind: float
    rel: float
    bands: tuple[float, float, float, float]
    argmin: tuple[int, int]

    def _draw(self, ax: Any) -> None:
        edges = [[places[0] - 0.5, *((a + b) / 2.0 for a, b in pairwise(places)), places[-1] + 0.5] for places in (self.columns, self.rows)]
        shown = ax.pcolormesh(*edges, self.scores.numpy(), cmap="viridis")
        ax.invert_yaxis()
        ax.set_aspect("equal")
        ax.figure.colorbar(shown, ax=ax, label="score")
        ax.set_title(f"{100 * self.blind:.0f} % of the places are blind")
        ax.set_xlabel("left edge of the stimulus")
        ax.set_ylabel("top edge")


def probe(
    model: nn.Module,
    stimulus: Tensor,
    backgrounds: Tensor,
    score: Score,
    *,
    stride: int = 4,
    batch_size: int = 64,
    alpha: Tensor | None = None,
    rel: float = 0.5,
) -> BlindSpotMap:
    """Paste a stimulus at every place of a grid and score the model's answer.

    The arithmetic of padding shows a risk; this shows damage.

    Args:
        model: of images; left as it is.
        stimulus: ``(channels, h, w)``.
        backgrounds: ``(n, channels, H, W)``, or one without n.
        score: ``score(output, places)`` gives one number for each image, shape ``(batch,)``; ``places`` are the centres of the stimulus,
            ``(batch, 2)`` as (y, x) in pixels. Ready-made: ``class_logit``, ``heat_map``, ``detection``.
        stride: pixels between places, counted from both edges to the middle, so that opposite edges compare.
        batch_size: images at a time.
        alpha: opacity of the stimulus, ``(h, w)`` or its shape; 1 everywhere.
        rel: a place counts as blind below this share of the centre's score (see ``BlindSpotMap.blind``).

    Raises:
        TypeError: not a module, or a score of another shape.
        ValueError: a stimulus larger than the background, other channels, an opacity of another shape, settings out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    integer("stride", stride, low=1)
    integer("batch_size", batch_size, low=1)
    real("rel", rel, low=0.0)
    scenes = backgrounds[None] if backgrounds.ndim == 3 else backgrounds
    if scenes.ndim != 4 or stimulus.ndim != 3 or stimulus.shape[0] != scenes.shape[1]:
        raise ValueError(
            f"stimulus must be (channels, h, w) and backgrounds (n, channels, H, W), got {tuple(stimulus.shape)} and "
            f"{tuple(backgrounds.shape)}"
        )
    h, w = stimulus.shape[1:]
    H, W = scenes.shape[2:]
    if h > H or w > W or not len(scenes):
        raise ValueError(f"a stimulus of {h}x{w} does not fit into {len(scenes)} backgrounds of {H}x{W}")
    rows, columns = _grid(H - h, stride), _grid(W - w, stride)
    device = device_of(model)
    opacity = torch.ones(h, w) if alpha is None else alpha.cpu()
    if tuple(opacity.shape) not in ((h, w), (1, h, w), tuple(stimulus.shape)) or not bool(((opacity >= 0.0) & (opacity <= 1.0)).all()):
        raise ValueError(f"alpha must be in [0, 1] and of the stimulus's size {(h, w)}, got shape {tuple(opacity.shape)}")
    scenes, stimulus = scenes.cpu(), stimulus.cpu()
    grid = [(y, x) for y in rows for x in columns]
    jobs = [(scene, y, x) for scene in range(len(scenes)) for y, x in grid]
    found: list[Tensor] = []
    with torch.no_grad(), eval_mode(model):
        for start in range(0, len(jobs), batch_size):
            part = jobs[start : start + batch_size]
            images = torch.stack([scenes[scene] for scene, _, _ in part])
            for image, (_, y, x) in zip(images, part, strict=True):
                patch = image[:, y : y + h, x : x + w]
                image[:, y : y + h, x : x + w] = opacity * stimulus + (1.0 - opacity) * patch
            places = torch.tensor([[y + (h - 1) / 2.0, x + (w - 1) / 2.0] for _, y, x in part], device=device)
            scores = score(model(images.to(device)), places)
            if not isinstance(scores, Tensor) or scores.shape != (len(part),):
                shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise TypeError(f"score must give one number for each image, shape ({len(part)},), got {shape}")
            found.append(scores.detach().cpu().double())
    if not all(bool(scores.isfinite().all()) for scores in found):
        raise ValueError("score gave NaN or infinity: a map that holds them, or a diverged model")
    mean = torch.cat(found).view(len(scenes), len(rows), len(columns)).mean(0)
    inner = mean[len(rows) // 4 : len(rows) - len(rows) // 4, len(columns) // 4 : len(columns) - len(columns) // 4]
    centre = float(inner.median())
    low = int(mean.argmin())
    return BlindSpotMap(
        scores=mean,
        rows=tuple(rows),
        columns=tuple(columns),
        centre=centre,
        blind=float((mean < centre - (1.0 - rel) * abs(centre)).double().mean()),
        rel=rel,
        bands=tuple(float(band.mean()) for band in (mean[:2], mean[-2:], mean[:, :2], mean[:, -2:])),  # pyright: ignore[reportArgumentType]
        argmin=(rows[low // len(columns)], columns[low % len(columns)]),
    )


def _grid(last: int, stride: int) -> list[int]:
    """Places every ``stride`` pixels from both ends to the middle: mirror symmetric, both edges included."""
    lower = list(range(0, last // 2 + 1, stride))
    middle = [last // 2, last - last // 2] if last - 2 * lower[-1] > stride else []
    return sorted({*lower, *middle, *(last - place for place in lower)})


def class_logit(index: int) -> Score:
    """Score of a classifier: the logit of a class."""

    def score(output: Any, _: Tensor) -> Tensor:
        return output[:, index]

    return score


def heat_map(channel: int, stride: float, radius: float) -> Score:
    """Score of a heat map ``(batch, channels, h, w)``: its largest value near the stimulus.

    Args:
        channel: of the map.
        stride: pixels of the input between neighbours of the map, whose first is at pixel 0.
        radius: in cells of the map; the nearest cell always counts.
    """

    def score(output: Any, places: Tensor) -> Tensor:
        maps = output[:, channel]
        y, x = (torch.arange(size, device=maps.device, dtype=places.dtype) for size in maps.shape[1:])
        at = places / stride
        rows, columns = ((cells[None] - at[:, [axis]]).abs() for axis, cells in enumerate((y, x)))
        # The nearest cell always counts: a small radius may hold none, and the last one may end before the border.
        rows, columns = (d <= torch.maximum(d.amin(1, keepdim=True), d.new_tensor(radius)) for d in (rows, columns))
        near = rows[:, :, None] & columns[:, None]
        return maps.masked_fill(~near, -torch.inf).flatten(1).amax(1)

    return score


def detection(label: int, size: Sequence[float], iou: float = 0.5) -> Score:
    """Score of a torchvision detector: the best score of a box of a label that overlaps the stimulus enough, else 0.

    Args:
        label: of the class.
        size: height and width of the stimulus.
        iou: least intersection over union.
    """
    h, w = (real("size", value, low=0.0, low_open=True) for value in size)

    def score(output: Any, places: Tensor) -> Tensor:
        values: list[Tensor] = []
        for found, (y, x) in zip(output, places, strict=True):
            boxes, top, left = found["boxes"], y + 0.5 - h / 2.0, x + 0.5 - w / 2.0  # from the centre of a pixel to edges
            width = (torch.minimum(boxes[:, 2], left + w) - torch.maximum(boxes[:, 0], left)).clamp_min(0.0)
            height = (torch.minimum(boxes[:, 3], top + h) - torch.maximum(boxes[:, 1], top)).clamp_min(0.0)
            shared = width * height
            union = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) + h * w - shared
            hit = (shared >= iou * union) & (found["labels"] == label)
            values.append(torch.where(hit, found["scores"], 0.0).max() if len(boxes) else places.new_zeros(()))
        return torch.stack(values)

    return score
