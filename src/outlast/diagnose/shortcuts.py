"""What could be a shortcut in the data, and what a model does when cues are recombined.

After Ahmed, Bengio, van Seijen, Courville, "Systematic Generalisation with Group Invariant Predictions", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from outlast._core import _checks
from outlast._core._batches import device_of
from outlast._core._norm import eval_mode
from outlast._core._random import generator as derived_generator
from outlast._core._result import Result

View = Callable[[Tensor], Tensor] | Tensor


@dataclass(frozen=True, repr=False)
class ShortcutReport(Result):
    """How well poor views of the inputs predict the labels. No verdict: a poor view also predicts well on some clean data.

    Attributes:
        accuracy: held-out accuracy of each view, in [0, 1].
        chance: share of the most frequent class.
        n: examples, a third of them held out.
    """

    accuracy: Mapping[str, float]
    chance: float
    n: int

    def _draw(self, ax: Any) -> None:
        ax.barh(list(self.accuracy), [100.0 * value for value in self.accuracy.values()])
        ax.axvline(100.0 * self.chance, linestyle="--", label="chance")
        ax.set_xlabel("held-out accuracy (%)")
        ax.legend()


@dataclass(frozen=True, repr=False)
class ShiftReport(Result):
    """A model on several test sets, and how it tells a foreign class apart.

    Attributes:
        accuracy: of each data set, in [0, 1].
        drop: accuracy of the first data set minus that of each.
        anomaly_ap: average precision of the score "not sure" (minus the largest probability) for anomalies against each data
            set; empty without anomalies. Chance is the share of anomalies, in ``anomaly_chance``.
        anomaly_chance: likewise.
        n: examples of each.
    """

    accuracy: Mapping[str, float]
    drop: Mapping[str, float]
    anomaly_ap: Mapping[str, float]
    anomaly_chance: Mapping[str, float]
    n: Mapping[str, int]

    def _draw(self, ax: Any) -> None:
        ax.barh(list(self.accuracy), [100.0 * value for value in self.accuracy.values()])
        ax.set_xlabel("accuracy (%)")


def shortcut_probe(
    inputs: Tensor,
    labels: Tensor,
    *,
    views: Sequence[str] | Mapping[str, View] = ("channel_statistics", "thumbnail", "border", "frequency"),
    steps: int = 600,
    generator: torch.Generator | None = None,
) -> ShortcutReport:
    """Train a small network on poor views of the inputs: what they can predict, a lazy model may rely on.

    Ready-made views: ``"channel_statistics"`` (mean, maximum, standard deviation of each channel), ``"thumbnail"`` (4x4),
    ``"border"`` (the outer ring), ``"frequency"`` (radial power spectrum). A view that predicts nearly as well as the model is a
    candidate; whether the model uses it, the report cannot tell.

    Args:
        inputs: images ``(n, C, H, W)``; anything with rows for own views.
        labels: class ids ``(n,)``.
        views: names, or own views by name: a function of the inputs, or a tensor with a row for each example (metadata,
            backgrounds).
        steps: of Adam with batches of 128 on two thirds of the examples.
        generator: of the split, start and batches; None for a fixed seed.

    Raises:
        ValueError: fewer than 30 examples, shapes that do not fit, an unknown view, a view that is not finite.
        TypeError: floating-point labels.
    """
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    n = len(inputs)
    if labels.shape != (n,) or n < 30:
        raise ValueError(f"a probe needs at least 30 examples and one label for each, got {n} inputs and labels of {tuple(labels.shape)}")
    steps = _checks.integer("steps", steps, low=1)
    chosen = _views(inputs, views)
    rng = derived_generator(0, "shortcut_probe") if generator is None else generator
    order = torch.randperm(n, generator=rng)
    held, kept = order[: n // 3], order[n // 3 :]
    classes, y = labels.cpu().unique(return_inverse=True)
    found: dict[str, float] = {}
    for name, rows in chosen.items():
        mean, std = rows[kept].mean(0), rows[kept].std(0)
        standard = (rows - mean) / torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, 1.0)
        found[name] = _probe(standard, y, kept, held, len(classes), steps, rng)
    return ShortcutReport(found, float(y.bincount().max()) / n, n)


def shift_report(
    model: nn.Module,
    datasets: Mapping[str, Iterable[Any]],
    anomalies: Iterable[Any] | None = None,
    *,
    device: torch.device | str | None = None,
) -> ShiftReport:
    """Accuracy on several test sets, the first being the reference, and the detection of anomalies against each.

    Args:
        model: gives logits ``(B, K)``; run in eval mode, left as it was.
        datasets: batches ``(inputs, labels, ...)`` by name, such as in distribution, unseen colours, recombined colours.
        anomalies: batches of inputs of a class that the model does not know.
        device: where inputs go; None for where the model's parameters are.

    Raises:
        ValueError: no data sets, or an empty one.
    """
    if not datasets:
        raise ValueError("datasets is empty: give at least the test set")
    place = device_of(model, device)
    accuracy: dict[str, float] = {}
    unsure: dict[str, Tensor] = {}
    with eval_mode(model), torch.no_grad():
        for name, batches in datasets.items():
            hits, scores = 0, list[Tensor]()
            for batch in batches:
                if not isinstance(batch, tuple | list) or len(batch) < 2:
                    raise ValueError(f"batches of {name!r} must be (inputs, labels, ...)")
                logits = model(batch[0].to(place)).float()
                hits += int((logits.argmax(1).cpu() == batch[1].cpu()).sum())
                scores.append(-logits.softmax(1).amax(1).cpu())
            if not scores:
                raise ValueError(f"data set {name!r} is empty")
            unsure[name] = torch.cat(scores)
            accuracy[name] = hits / len(unsure[name])
        foreign = list[Tensor]()
        for batch in () if anomalies is None else anomalies:
            x = cast("Tensor", batch[0] if isinstance(batch, tuple | list) else batch)
            foreign.append(-model(x.to(place)).float().softmax(1).amax(1).cpu())
    if anomalies is not None and not foreign:
        raise ValueError("anomalies is empty")
    reference = next(iter(accuracy.values()))
    precision: dict[str, float] = {}
    chance: dict[str, float] = {}
    for name, scores in unsure.items() if foreign else ():
        positive = torch.cat(foreign)
        precision[name] = average_precision(torch.cat([positive, scores]), torch.arange(len(positive) + len(scores)) < len(positive))
        chance[name] = len(positive) / (len(positive) + len(scores))
    drop = {name: reference - value for name, value in accuracy.items()}
    return ShiftReport(accuracy, drop, precision, chance, {name: len(scores) for name, scores in unsure.items()})


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Sum over thresholds of precision times the rise of recall, equal scores being one threshold."""
    order = scores.argsort(descending=True)
    ranked, hits = scores[order], positive[order].double().cumsum(0)
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float((precision * torch.diff(recall, prepend=recall.new_zeros(1))).sum())


def _views(inputs: Tensor, views: Sequence[str] | Mapping[str, View]) -> dict[str, Tensor]:
    ready: dict[str, Callable[[Tensor], Tensor]] = {
        "channel_statistics": _channel_statistics,
        "thumbnail": lambda x: F.adaptive_avg_pool2d(x, 4).flatten(1),
        "border": _border,
        "frequency": _frequency,
    }
    if isinstance(views, str):
        views = (views,)
    chosen: dict[str, View] = {}
    if isinstance(views, Mapping):
        chosen.update(views)
    else:
        for name in views:
            if name not in ready:
                raise ValueError(f"unknown view {name!r}; ready-made: {', '.join(ready)}; own views are given as a mapping")
            if inputs.ndim != 4:
                raise ValueError(f"view {name!r} needs images (n, C, H, W), got {tuple(inputs.shape)}")
            chosen[name] = ready[name]
    if not chosen:
        raise ValueError("views is empty")
    found: dict[str, Tensor] = {}
    values = inputs.detach().cpu().float()
    for name, view in chosen.items():
        rows = torch.as_tensor(view(values) if callable(view) else view).detach().cpu().float()
        if rows.ndim == 0 or len(rows) != len(inputs):
            raise ValueError(f"view {name!r} must have a row for each of the {len(inputs)} examples, got {tuple(rows.shape)}")
        found[name] = rows.reshape(len(rows), -1)
        if not bool(torch.isfinite(found[name]).all()):
            raise ValueError(f"view {name!r} is not finite")
    return found


def _channel_statistics(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    return torch.cat([flat.mean(2), flat.amax(2), flat.std(2, correction=0)], 1)


def _border(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2).flatten(1)


def _frequency(x: Tensor) -> Tensor:
    """Logarithm of the mean power in rings of equal frequency, for each channel."""
    height, width = x.shape[2:]
    power = torch.fft.fft2(x, norm="ortho").abs().square()
    rows, columns = torch.fft.fftfreq(height)[:, None] * height, torch.fft.fftfreq(width)[None] * width
    ring = (rows.square() + columns.square()).sqrt().round().long().clamp(max=min(height, width) // 2).flatten()
    count = int(ring.max()) + 1
    sums = x.new_zeros(*x.shape[:2], count).index_add(2, ring, power.flatten(2))
    return (sums / torch.bincount(ring, minlength=count).clamp(min=1)).add(1e-8).log().flatten(1)


def _probe(rows: Tensor, y: Tensor, kept: Tensor, held: Tensor, classes: int, steps: int, rng: torch.Generator) -> float:
    parameters: list[Tensor] = []
    with torch.inference_mode(False):
        rows = rows.clone()
        for before, after in ((rows.shape[1], 64), (64, classes)):
            uniform = torch.rand(after, before, generator=rng, dtype=rows.dtype)
            parameters.append(((2.0 * uniform - 1.0) / before**0.5).requires_grad_())
            parameters.append(torch.zeros(after, dtype=rows.dtype, requires_grad=True))

    def forward(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, parameters[0], parameters[1]).relu(), parameters[2], parameters[3])

    optimizer = torch.optim.Adam(parameters, lr=3e-3, weight_decay=1e-4)
    with torch.inference_mode(False), torch.enable_grad():
        y = y.clone()
        for _ in range(steps):
            batch = kept[torch.randint(len(kept), (min(128, len(kept)),), generator=rng)]
            optimizer.zero_grad()
            F.cross_entropy(forward(rows[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return float((forward(rows[held]).argmax(1) == y[held]).double().mean())
