"""Examples that models need on one task, and how that number grows with the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from outlast._core._batches import device_of
from outlast._core._checks import integer, real
from outlast._core._norm import eval_mode
from outlast._core._random import derived_seed, seeded
from outlast._core._random import generator as stream_of
from outlast._core._result import Result
from outlast.diagnose.equivariance import Trainer
from outlast.diagnose.sample_efficiency._tasks import Task
from outlast.errors import DivergedError

Train = Callable[[nn.Module, Tensor, Tensor], Any]
Sizes = Sequence[int] | Callable[[int], Sequence[int]]
_START = 8


@dataclass(frozen=True, repr=False)
class SampleCurve(Result):
    """Accuracy of one model at one input size.

    Attributes:
        model: its name.
        dim: as given; None for a data set.
        sizes: numbers of examples.
        accuracy: ``(sizes, seeds)``; NaN where a training diverged.
        needed: examples for the threshold, by isotonic regression of the mean accuracy in log n; None where the curve does not reach it
            or begins above it.
    """

    model: str
    dim: int | None
    sizes: tuple[int, ...]
    accuracy: Tensor
    needed: float | None


@dataclass(frozen=True, repr=False)
class Exponent(Result):
    """Slope of log needed examples over log dim, with a parametric bootstrap interval.

    The interval is meant for 95 %; in simulations with three to eight seeds it held the truth in about 90 %.

    Attributes:
        value: the slope.
        low: lower end.
        high: upper end.
        dims: input sizes that it rests on.
    """

    value: float
    low: float
    high: float
    dims: tuple[int, ...]

    def __repr__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, repr=False)
class SampleEfficiency(Result):
    """Curves, needed examples, exponents.

    Attributes:
        threshold: accuracy that counts as learned.
        curves: one for each model and input size.
        exponents: by model, where two input sizes or more reach the threshold.
        ratios: for each pair ``"a / b"`` of models how many times more examples the first needs, by input size (``"data"`` for a data set).
        notes: trainings that diverged, and input sizes that are left out because their curve does not cross the threshold.
    """

    threshold: float
    curves: tuple[SampleCurve, ...]
    exponents: dict[str, Exponent]
    ratios: dict[str, dict[str, float]]
    notes: tuple[str, ...]

    def curve(self, model: str, dim: int | None = None) -> SampleCurve:
        """One of the curves.

        Raises:
            KeyError: there is none.
        """
        for each in self.curves:
            if each.model == model and each.dim == dim:
                return each
        raise KeyError((model, dim))

    def at(self, threshold: float, *, bootstrap: int = 1000, seed: int = 0) -> SampleEfficiency:
        """The same trainings judged at another accuracy."""
        real("threshold", threshold, low=0.0, high=1.0, low_open=True)
        return _judged(self.curves, threshold, integer("bootstrap", bootstrap, low=100), seed)

    def __repr__(self) -> str:
        lines = [f"SampleEfficiency(examples for {100.0 * self.threshold:.3g} % accuracy)"]
        for model in dict.fromkeys(curve.model for curve in self.curves):
            parts = [
                f"{'' if curve.dim is None else f'{curve.dim}: '}{'not crossed' if curve.needed is None else f'{curve.needed:.0f}'}"
                for curve in self.curves
                if curve.model == model
            ]
            exponent = f"; exponent {self.exponents[model]!r}" if model in self.exponents else ""
            lines.append(f"  {model}: {', '.join(parts)}{exponent}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _draw(self, ax: Any) -> None:
        if any(curve.dim is not None for curve in self.curves):
            for model in dict.fromkeys(curve.model for curve in self.curves):
                points = [(curve.dim, curve.needed) for curve in self.curves if curve.model == model and curve.needed is not None]
                label = f"{model}, exponent {self.exponents[model]!r}" if model in self.exponents else model
                ax.plot([dim for dim, _ in points], [needed for _, needed in points], marker="o", label=label)
            ax.set_yscale("log")
            ax.set_xlabel("input size D")
            ax.set_ylabel(f"examples for {100.0 * self.threshold:.3g} %")
        else:
            for curve in self.curves:
                ax.plot(curve.sizes, 100.0 * curve.accuracy.nanmean(1).numpy(), marker="o", label=curve.model)
            ax.axhline(100.0 * self.threshold, linestyle="--", color="grey")
            ax.set_xlabel("examples")
            ax.set_ylabel("accuracy, %")
        ax.set_xscale("log")
        ax.legend()


def sample_efficiency(
    models: Mapping[str, Callable[..., nn.Module]],
    task: Callable[[int], Task] | Task | Dataset[Any],
    *,
    train: Train | Mapping[str, Train],
    dims: Sequence[int] | None = None,
    threshold: float = 0.8,
    sizes: Sizes | Mapping[str, Sizes] | None = None,
    seeds: int = 3,
    test_size: int = 2000,
    batched: bool = False,
    bootstrap: int = 1000,
    seed: int = 0,
) -> SampleEfficiency:
    """Measure how many examples each model needs, and with which power of the input size that number grows.

    Example:
        ```python
        models = {"dense": lambda dim: dense(dim), "conv": lambda dim: conv(dim)}
        print(sample_efficiency(models, quadratic_halves, train=train, dims=(8, 16, 32)))
        ```

    Args:
        models: by name a function that builds one from global generators, which are seeded for it and restored: ``build(dim)``, or
            ``build()`` where there are no ``dims``. Outputs ``(n, classes)``, or ``(n,)`` or ``(n, 1)`` whose sign decides.
        task: ``task(dim)`` for every one of ``dims``; without these a ``Task`` or a data set of ``(input, label)``.
        train: ``train(model, inputs, labels)``, for all or by model's name; ``outlast.diagnose.equivariance.train_with`` makes one.
        dims: input sizes.
        threshold: accuracy that counts as learned.
        sizes: numbers of examples, or ``sizes(dim)``, for all or by model's name; otherwise doubling from 8 to at most 4 ``dim**2``, or to
            what a data set has besides its test examples, or to 4,096 for a task without ``dims``.
        seeds: trainings at each size. Subsets of a seed are nested; its test examples are its own. One seed has no spread, hence no
            exponent.
        test_size: test examples of each seed.
        batched: train all seeds of a size at once (a ``Trainer`` without buffers and dropout): much faster for small models.
        bootstrap: draws for the exponents, 100 or more. Mean accuracies are drawn with the variance of the seeds, which is drawn towards
            its mean over the sizes of a curve: resampling three seeds would give intervals that are too narrow.
        seed: of data, initialisations and bootstrap.

    Raises:
        TypeError: ``batched`` with a training of another kind, or outputs that are no tensor.
        ValueError: arguments out of range, unknown names, sizes that do not increase or exceed the data.
    """
    integer("seeds", seeds, low=1)
    integer("test_size", test_size, low=1)
    integer("bootstrap", bootstrap, low=100)
    real("threshold", threshold, low=0.0, high=1.0, low_open=True)
    if not models:
        raise ValueError("models is empty")
    if dims is not None and not dims:
        raise ValueError("dims is empty")
    if dims is not None and (isinstance(task, Task | Dataset) or not callable(task)):
        raise ValueError("with dims, task must be a function of the input size, such as quadratic_halves")
    curves: list[SampleCurve] = []
    for name, build in models.items():
        method = _of(train, name, "train")
        if batched and not isinstance(method, Trainer):
            raise TypeError(f"batched needs a trainer made by train_with, got {type(method).__name__} for {name!r}")
        for dim in [None] if dims is None else dims:
            source: Any = task(dim) if dim is not None else task  # pyright: ignore[reportCallIssue]
            wanted = _sizes(None if sizes is None else _of(sizes, name, "sizes"), dim, source, test_size)
            accuracy = _measure(build, dim, source, method, wanted, seeds, test_size, seed, batched=batched)
            curves.append(SampleCurve(name, dim, tuple(wanted), accuracy, None))
    return _judged(curves, threshold, bootstrap, seed)


def _judged(curves: Sequence[SampleCurve], threshold: float, bootstrap: int, seed: int) -> SampleEfficiency:
    """Needed examples, exponents and ratios at a threshold."""
    notes: list[str] = []
    judged: list[SampleCurve] = []
    for curve in curves:
        where = curve.model if curve.dim is None else f"{curve.model} at {curve.dim}"
        gone = int(curve.accuracy.isnan().sum())
        if gone:
            notes.append(f"{where}: {gone} of {curve.accuracy.numel()} trainings diverged and are left out")
        sizes, accuracy = _without_gaps(curve)
        smooth = isotonic(accuracy.nanmean(1))
        needed = _needed(sizes, smooth, threshold)
        if needed is None:
            verb = "begins above" if len(smooth) and float(smooth[0]) >= threshold else "does not reach"
            notes.append(f"{where} {verb} {100.0 * threshold:.3g} %: left out")
        judged.append(replace(curve, needed=needed))
    exponents: dict[str, Exponent] = {}
    for name in dict.fromkeys(curve.model for curve in judged):
        found = exponent([curve for curve in judged if curve.model == name], threshold, bootstrap, stream_of(seed, "bootstrap"))
        if found is not None:
            exponents[name] = found
    return SampleEfficiency(threshold, tuple(judged), exponents, _ratios(judged), tuple(notes))


def _of(given: Any, name: str, argument: str) -> Any:
    if not isinstance(given, Mapping):
        return given
    if name not in given:
        raise ValueError(f"{argument} has no entry for the model {name!r}")
    return given[name]


def _sizes(given: Sizes | None, dim: int | None, source: Any, test_size: int) -> list[int]:
    if given is None:
        most = 4 * dim**2 if dim is not None else len(source) - test_size if isinstance(source, Dataset) else 4096  # pyright: ignore[reportArgumentType]
        count = max(1, 1 + int(math.log2(max(most, _START) / _START)))
        return [_START * 2**power for power in range(count)]
    if callable(given):
        if dim is None:
            raise ValueError("sizes is a function of the input size, but there are no dims")
        given = given(dim)
    sizes = [integer("sizes", size, low=1) for size in given]
    if not sizes or any(later <= size for size, later in pairwise(sizes)):
        raise ValueError(f"sizes must increase, got {tuple(sizes)}")
    return sizes


def _examples(source: Any, n: int, stream: torch.Generator) -> tuple[Tensor, Tensor]:
    if isinstance(source, Task):
        return source.sample(n, stream)
    if not isinstance(source, Dataset):
        raise ValueError(f"task must be a Task, a data set of (input, label), or with dims a function, got {type(source).__name__}")
    total = len(source)  # pyright: ignore[reportArgumentType]
    if n > total:
        raise ValueError(f"{n} examples are needed for training and test, the data set has {total}")
    items = [source[int(place)] for place in torch.randperm(total, generator=stream)[:n]]
    return torch.stack([torch.as_tensor(item[0]) for item in items]), torch.as_tensor([int(item[1]) for item in items])


def _measure(
    build: Callable[..., nn.Module],
    dim: int | None,
    source: Any,
    train: Any,
    sizes: Sequence[int],
    seeds: int,
    test_size: int,
    seed: int,
    *,
    batched: bool,
) -> Tensor:
    """Accuracy ``(sizes, seeds)``."""
    data = [_examples(source, test_size + sizes[-1], stream_of(seed, f"data {dim}", number)) for number in range(seeds)]
    accuracy = torch.zeros(len(sizes), seeds, dtype=torch.float64)
    for place, size in enumerate(sizes):
        models: list[nn.Module] = []
        for number in range(seeds):
            with seeded(derived_seed(seed, f"initialisation {dim} {size}", number)):
                models.append(build() if dim is None else build(dim))
        part = slice(test_size, test_size + size)
        if batched:
            # A model that diverges leaves the others as they are; its outputs tell.
            with suppress(DivergedError):
                train.batched(models, *(torch.stack([entry[side][part] for entry in data]) for side in (0, 1)))
        else:
            for number, model in enumerate(models):
                with seeded(derived_seed(seed, f"training {dim} {size}", number)), suppress(DivergedError):
                    train(model, data[number][0][part], data[number][1][part])
        for number, model in enumerate(models):
            accuracy[place, number] = _accuracy(model, *(each[:test_size] for each in data[number]))
    return accuracy


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    with torch.no_grad(), eval_mode(model):
        outputs = model(inputs.to(device_of(model)))
    if not isinstance(outputs, Tensor):
        raise TypeError(f"the model's output must be a tensor, got {type(outputs).__name__}; wrap it to return its logits")
    outputs = outputs.cpu()
    if not bool(outputs.isfinite().all()):
        return math.nan
    outputs = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None]
    decided = outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0.0).long()
    return float((decided == labels).double().mean())


def isotonic(values: Tensor) -> Tensor:
    """Least-squares increasing fit of each row ``(..., n)``: the largest of the least averages of stretches around each place."""
    n = values.shape[-1]
    sums = torch.cat([torch.zeros_like(values[..., :1]), values.cumsum(-1)], -1)
    start, end = torch.arange(n)[:, None], torch.arange(n)[None]
    averages = (sums[..., None, 1:] - sums[..., :-1, None]) / (end - start + 1).clamp_min(1)
    averages = averages.masked_fill(end < start, math.inf)  # (..., start, end)
    least = averages.flip(-1).cummin(-1).values.flip(-1)  # over ends from each place on
    return least.masked_fill(end < start, -math.inf).cummax(-2).values.diagonal(dim1=-2, dim2=-1)


def _crossing(log_n: Tensor, accuracy: Tensor, threshold: float) -> Tensor:
    """Log n where increasing accuracies ``(rows, n)`` reach the threshold, linear between sizes; NaN where they do not cross it."""
    reached = accuracy >= threshold
    first = reached.int().argmax(1)
    inside = reached.any(1) & (first > 0)
    right = first.clamp_min(1)
    high, low = (accuracy.gather(1, place[:, None])[:, 0] for place in (right, right - 1))
    share = (threshold - low) / (high - low)
    found = log_n[right - 1] + share * (log_n[right] - log_n[right - 1])
    return torch.where(inside, found, math.nan)


def _without_gaps(curve: SampleCurve) -> tuple[list[int], Tensor]:
    """Sizes at which a training succeeded, and their accuracies."""
    good = ~curve.accuracy.isnan().all(1)
    return [size for size, keep in zip(curve.sizes, good.tolist(), strict=True) if keep], curve.accuracy[good].double()


def _needed(sizes: Sequence[int], accuracy: Tensor, threshold: float) -> float | None:
    if len(sizes) < 2:
        return None
    found = float(_crossing(_logs(sizes), accuracy[None], threshold)[0])
    return None if math.isnan(found) else math.exp(found)


def _logs(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([float(size) for size in sizes], dtype=torch.float64).log()


def exponent(curves: Sequence[SampleCurve], threshold: float, bootstrap: int, stream: torch.Generator) -> Exponent | None:
    """Slope over the input sizes whose curve crosses the threshold; None for fewer than two, or one seed.

    A bootstrap draw in which one of them does not cross leaves that one out.
    """
    used = [curve for curve in curves if curve.needed is not None and curve.dim is not None]
    if len(used) < 2 or min(curve.accuracy.shape[1] for curve in used) < 2:
        return None
    log_dim = torch.tensor([float(curve.dim or 0) for curve in used], dtype=torch.float64).log()
    point = torch.tensor([curve.needed for curve in used], dtype=torch.float64).log()
    drawn: list[Tensor] = []
    for curve in used:
        sizes, accuracy = _without_gaps(curve)
        spread = _spread(accuracy)
        means = accuracy.nanmean(1) + spread * torch.randn(bootstrap, len(sizes), generator=stream, dtype=torch.float64)
        drawn.append(_crossing(_logs(sizes), isotonic(means), threshold))
    slopes = _slopes(log_dim, torch.stack(drawn, 1))
    slopes = slopes[slopes.isfinite()]
    value = float(_slopes(log_dim, point[None])[0])
    low, high = slopes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Exponent(value, low, high, tuple(int(curve.dim or 0) for curve in used))


def _spread(accuracy: Tensor) -> Tensor:
    """Standard deviation of each mean accuracy; variances over few seeds are drawn towards their mean over sizes."""
    count = (~accuracy.isnan()).sum(1).double()
    squares = (accuracy - accuracy.nanmean(1, keepdim=True)).square().nansum(1)
    pooled = squares.sum() / (count - 1.0).sum().clamp_min(1.0)
    own = 2.0  # prior degrees of freedom: accuracies vary most where curves are steep
    return ((squares + own * pooled) / (count - 1.0 + own) / count).sqrt()


def _slopes(x: Tensor, y: Tensor) -> Tensor:
    """Least-squares slope of every row of ``y``, NaNs left out."""
    known = y.isfinite()
    count = known.sum(1, keepdim=True)
    filled = y.where(known, 0.0)
    off = (x - (known * x).sum(1, keepdim=True) / count) * known
    return (off * filled).sum(1) / off.square().sum(1)


def _ratios(curves: Sequence[SampleCurve]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for first in curves:
        for second in curves:
            if first.model != second.model and first.dim == second.dim and first.needed is not None and second.needed is not None:
                place = "data" if first.dim is None else str(first.dim)
                found.setdefault(f"{first.model} / {second.model}", {})[place] = first.needed / second.needed
    return found
