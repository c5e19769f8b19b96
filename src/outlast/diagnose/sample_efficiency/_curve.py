"""Error against the number of examples, measured by the user's own training."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from outlast._core._checks import integer
from outlast._core._files import write_whole
from outlast._core._random import derived_seed
from outlast._core._random import generator as stream_of
from outlast._core._ray import ray_session
from outlast._core._result import Result
from outlast.diagnose.sample_efficiency._law import LawFit, fit_law
from outlast.errors import DamagedFileError, OutlastWarning

FitAndScore = Callable[[Any, Any], Any]
FORMAT = "outlast.learning_curve.cell"
_MOST_SIZES, _LEAST_SIZE = 7, 16


@dataclass(frozen=True, repr=False)
class FailedCell(Result):
    """A training that raised or gave no error in [0, 1]: its size, its seed's number, and the reason."""

    size: int
    seed: int
    reason: str


@dataclass(frozen=True, repr=False)
class LearningCurve(Result):
    """Errors by number of examples.

    Attributes:
        sizes: numbers of examples.
        errors: ``(sizes, seeds)``, NaN where a training failed.
        failed: those trainings.
    """

    sizes: tuple[int, ...]
    errors: Tensor
    failed: tuple[FailedCell, ...]

    def fit(self, **settings: Any) -> LawFit:
        """``fit_law`` of this curve."""
        return fit_law(self.sizes, self.errors, **settings)

    def __repr__(self) -> str:
        points = ", ".join(
            f"{size:,}: {100.0 * float(error):.3g} %" for size, error in zip(self.sizes, self.errors.nanmean(1), strict=True)
        )
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        return f"LearningCurve({points}{failed})"

    def _draw(self, ax: Any) -> None:
        percent = 100.0 * self.errors.numpy()
        for seed in range(percent.shape[1]):
            ax.plot(self.sizes, percent[:, seed], ".", color="grey", label="one training" if seed == 0 else None)
        ax.plot(self.sizes, 100.0 * self.errors.nanmean(1).numpy(), marker="o", label="mean")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("examples")
        ax.set_ylabel("error, %")
        ax.legend()


def learning_curve(
    fit_and_score: FitAndScore,
    num_examples: int,
    *,
    sizes: Sequence[int] | None = None,
    seeds: int = 3,
    stratify: Tensor | Sequence[int] | None = None,
    workers: int = 1,
    batched: bool = False,
    folder: str | Path | None = None,
    seed: int = 0,
) -> LearningCurve:
    """Train on growing subsets and collect errors.

    Subsets of a seed are nested: each size's examples are among the next one's. A training is a function of its subset and seed alone, so
    workers and the order of trainings change nothing. One that fails is recorded and does not end the curve.

    Give every size a fair budget: the same number of steps with early stopping on validation examples rather than the same number of
    epochs, which would leave small subsets under-trained and bend the curve.

    Example:
        ```python
        def error_of(index, seed):
            model = train(images[index], labels[index], seed)
            return float((model(test_images).argmax(1) != test_labels).double().mean())

        curve = learning_curve(error_of, len(images), stratify=labels)
        print(curve.fit().needed(0.05))
        ```

    Args:
        fit_and_score: ``fit_and_score(index, seed)`` trains on the examples of those numbers (int64, shuffled) and gives the error on one
            fixed test set, in [0, 1]. With ``batched`` it gets ``(index, seeds)`` of one size, ``(seeds, size)`` and a list, and gives as
            many errors.
        num_examples: how many there are.
        sizes: increasing; otherwise the halves of ``num_examples``, seven sizes or down to 16 (and to one example of each class).
        seeds: trainings at each size; subset and initialisation change with them.
        stratify: classes of the examples; the share of each in every subset is then right within one example.
        workers: trainings at the same time, through Ray (extra ``cluster``).
        batched: train all seeds of a size in one call.
        folder: where finished trainings are kept as JSON and found again; one folder for one curve.
        seed: of the subsets and of the trainings' seeds.

    Raises:
        ValueError: sizes that do not increase, exceed ``num_examples`` or leave a class without an example; a folder of another curve.
        DamagedFileError: a file of the folder cannot be read.
        MissingExtraError: several workers without Ray.
    """
    integer("num_examples", num_examples, low=1)
    integer("seeds", seeds, low=1)
    integer("workers", workers, low=1)
    classes = None if stratify is None else _classes(stratify, num_examples)
    length = num_examples if sizes is None else min(num_examples, max(sizes, default=0))
    sequence = None if classes is None else _class_sequence(torch.bincount(classes).tolist(), length)
    complete = 1 if classes is None or sequence is None else _complete(sequence, int(classes.max()) + 1)
    chosen = _halves(num_examples, max(_LEAST_SIZE, complete)) if sizes is None else [integer("sizes", size, low=1) for size in sizes]
    _check_sizes(chosen, num_examples, complete)
    if batched and workers > 1:
        raise ValueError("batched trains all seeds of a size in one call: use it with workers=1")
    orders = [_order(classes, sequence, num_examples, stream_of(seed, "subset", number))[: chosen[-1]] for number in range(seeds)]
    store = _Store(folder, num_examples, seed, orders) if folder is not None else None
    errors = torch.full((len(chosen), seeds), math.nan, dtype=torch.float64)
    failed: list[FailedCell] = []
    jobs: list[tuple[int, int]] = []
    for place, size in enumerate(chosen):
        for number in range(seeds):
            found = store.read(size, number) if store is not None else None
            if found is None:
                jobs.append((place, number))
            else:
                errors[place, number] = found

    def done(place: int, number: int, result: float | str) -> None:
        if isinstance(result, str):
            failed.append(FailedCell(chosen[place], number, result))
            return
        errors[place, number] = result
        if store is not None:
            store.write(chosen[place], number, result)

    def work(place: int, number: int) -> tuple[Tensor, int]:
        return orders[number][: chosen[place]], derived_seed(seed, f"training {chosen[place]}", number) % 2**31

    if batched:
        for place in dict.fromkeys(place for place, _ in jobs):
            numbers = [number for at, number in jobs if at == place]
            inputs = [work(place, number) for number in numbers]
            for number, result in zip(numbers, _run_batched(fit_and_score, inputs), strict=True):
                done(place, number, result)
    elif workers == 1:
        for place, number in jobs:
            done(place, number, _run(fit_and_score, *work(place, number)))
    else:
        _with_ray(fit_and_score, jobs, work, done, workers)
    if failed:
        warnings.warn(
            f"{len(failed)} of {errors.numel()} trainings failed and are left out, the first: {failed[0].reason}",
            OutlastWarning,
            stacklevel=2,
        )
    failed.sort(key=lambda cell: (cell.size, cell.seed))
    return LearningCurve(tuple(chosen), errors, tuple(failed))


def _classes(stratify: Tensor | Sequence[int], num_examples: int) -> Tensor:
    labels = torch.as_tensor(stratify).detach().cpu()
    if labels.shape != (num_examples,):
        raise ValueError(f"stratify must have one class for each of {num_examples} examples, got shape {tuple(labels.shape)}")
    return labels.unique(return_inverse=True)[1]


def _halves(num_examples: int, least: int) -> list[int]:
    sizes = [num_examples]
    while len(sizes) < _MOST_SIZES and sizes[-1] // 2 >= least:
        sizes.append(sizes[-1] // 2)
    return sizes[::-1]


def _check_sizes(sizes: Sequence[int], num_examples: int, complete: int) -> None:
    if not sizes or any(later <= size for size, later in pairwise(sizes)):
        raise ValueError(f"sizes must increase, got {tuple(sizes)}")
    if sizes[-1] > num_examples:
        raise ValueError(f"sizes go up to {sizes[-1]}, but there are {num_examples} examples")
    if sizes[0] < complete:
        raise ValueError(f"the smallest size, {sizes[0]}, leaves a class without an example; {complete} or more hold one of each")


def _order(classes: Tensor | None, sequence: Sequence[int] | None, num_examples: int, stream: torch.Generator) -> Tensor:
    """Numbers of examples; every prefix is a subset, stratified where classes are given."""
    shuffled = torch.randperm(num_examples, generator=stream)
    if classes is None or sequence is None:
        return shuffled
    by_class = [shuffled[classes[shuffled] == label] for label in range(int(classes.max()) + 1)]
    taken = [0] * len(by_class)
    order: list[Tensor] = []
    for label in sequence:
        order.append(by_class[label][taken[label]])
        taken[label] += 1
    return torch.stack(order)


def _class_sequence(counts: Sequence[int], length: int) -> list[int]:
    """A sequence of classes of which every prefix has the shares of ``counts`` within less than one example.

    Tijdeman's rule for the chairman assignment problem: among the classes that may come next without running ahead, the one that would
    fall behind first.
    """
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    if len(counts) == 1:
        return [0] * length
    ahead = 1.0 / (2 * len(counts) - 2)
    due = torch.zeros(len(counts), dtype=torch.float64)
    sequence: list[int] = []
    for _ in range(length):
        due += share
        wait = torch.where(due >= ahead - 1e-12, (1.0 - ahead - due) / share, math.inf)
        label = int(wait.argmin())
        due[label] -= 1.0
        sequence.append(label)
    return sequence


def _complete(sequence: Sequence[int], classes: int) -> int:
    """How much of a sequence holds every class; one more than its length where it does not."""
    seen = dict.fromkeys(sequence)
    return 1 + max(sequence.index(label) for label in seen) if len(seen) == classes else len(sequence) + 1


def _number(result: object) -> float | str:
    try:
        error = float(cast("Any", result))
    except (TypeError, ValueError):
        return f"fit_and_score gave {type(result).__name__}, not a number"
    return error if 0.0 <= error <= 1.0 else f"fit_and_score gave {error:g}, not an error in [0, 1]"


def _run(fit_and_score: FitAndScore, index: Tensor, seed: int) -> float | str:
    try:
        return _number(fit_and_score(index, seed))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _run_batched(fit_and_score: FitAndScore, inputs: Sequence[tuple[Tensor, int]]) -> list[float | str]:
    try:
        results = list(fit_and_score(torch.stack([index for index, _ in inputs]), [seed for _, seed in inputs]))
    except Exception as error:
        return [f"{type(error).__name__}: {error}"] * len(inputs)
    if len(results) != len(inputs):
        raise ValueError(f"fit_and_score gave {len(results)} errors for {len(inputs)} seeds")
    return [_number(result) for result in results]


def _with_ray(
    fit_and_score: FitAndScore,
    jobs: Sequence[tuple[int, int]],
    work: Callable[[int, int], tuple[Tensor, int]],
    done: Callable[[int, int, float | str], None],
    workers: int,
) -> None:
    with ray_session(workers, 1, "workers > 1") as ray:
        remote = ray.remote(num_cpus=1)(_run)
        call = ray.put(fit_and_score)
        waiting, running = list(jobs), dict[Any, tuple[int, int]]()
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[remote.remote(call, *work(*job))] = job
            for finished in ray.wait(list(running), num_returns=1)[0]:
                job = running.pop(finished)
                try:
                    result: float | str = ray.get(finished)
                except ray.exceptions.RayError as error:  # the worker died
                    result = f"{type(error).__name__}: {error}"
                done(*job, result)


class _Store:
    """Finished trainings of one curve in a folder, one whole JSON file each."""

    def __init__(self, folder: str | Path, num_examples: int, seed: int, orders: Sequence[Tensor]) -> None:
        self._folder = Path(folder)
        self._orders = orders
        self._shared = {"format": FORMAT, "num_examples": num_examples, "curve_seed": seed}

    def _identity(self, size: int, number: int) -> dict[str, Any]:
        digest = hashlib.sha256(self._orders[number][:size].numpy().tobytes()).hexdigest()
        return {**self._shared, "size": size, "seed": number, "examples": digest}

    def _path(self, size: int, number: int) -> Path:
        return self._folder / f"n{size}-seed{number}.json"

    def read(self, size: int, number: int) -> float | None:
        path = self._path(size, number)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_bytes())
            error = float(record.pop("error"))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise DamagedFileError(f"{path} is no finished training ({problem}); remove it") from problem
        if not 0.0 <= error <= 1.0:
            raise DamagedFileError(f"{path} holds the error {error}, which is not in [0, 1]; remove it")
        if record != self._identity(size, number):
            raise ValueError(f"{path} belongs to another curve (other examples, classes or seed): give this one a folder of its own")
        return error

    def write(self, size: int, number: int, error: float) -> None:
        write_whole(self._path(size, number), (json.dumps({**self._identity(size, number), "error": error}, indent=1) + "\n").encode())
