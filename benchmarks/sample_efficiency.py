"""Laws of learning curves against SciPy's curve_fit, batched seeds against scikit-learn, a coupled test."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks._harness import Row, write
from outlast.diagnose.equivariance import equivariance_test, train_with
from outlast.diagnose.sample_efficiency import fit_law, quadratic_halves, sample_efficiency
from outlast.studies._models import Square, gaussian_dense, mlp


def _median(call: Callable[[], object], repeats: int = 7) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


# Five three- and four-parameter laws as learning-curve packages fit them one by one with SciPy, starting from ones.
_LAWS: tuple[tuple[int, Callable[..., np.ndarray]], ...] = (
    (3, lambda n, a, b, c: c + a * np.power(n, -b)),
    (4, lambda n, a, b, c, d: c + a * np.power(n + d, -b)),
    (3, lambda n, a, b, c: a * np.exp(-b * n) + c),
    (3, lambda n, a, b, c: a / np.log(n + b) + c),
    (2, lambda n, a, b: a * np.power(n, -b)),
)


def _fit_all(sizes: Sequence[int], errors: np.ndarray) -> Callable[[float], float]:
    """The loop of a peer that is no installable package: every law by curve_fit, the best by its fit."""
    from scipy.optimize import curve_fit

    n = np.asarray(sizes, float)
    best, law, found = math.inf, _LAWS[-1][1], np.ones(2)
    for count, each in _LAWS:
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                values, _ = curve_fit(each, n, errors, p0=np.ones(count), maxfev=2000)
                misfit = float(np.square(each(n, *values) - errors).sum())
        except (RuntimeError, ValueError):
            continue
        if misfit < best:
            best, law, found = misfit, each, values
    return lambda size: float(law(np.asarray([size], float), *found)[0])


def _laws() -> list[Row]:
    stream = torch.Generator().manual_seed(0)
    sizes = [100 * 2**power for power in range(8)]
    ours: list[float] = []
    theirs: list[float] = []
    curve = torch.zeros(0)
    for _ in range(20):
        a, b, c = (low + width * float(torch.rand((), generator=stream)) for low, width in ((0.5, 1.0), (0.2, 0.4), (0.0, 0.1)))
        truth = torch.tensor([min(0.9, a * n**-b + c) for n in sizes])
        curve = torch.binomial(torch.full((8, 3), 2000.0), truth[:, None].expand(-1, 3), generator=stream) / 2000.0
        target = float(truth[-1])
        fit = fit_law(sizes[:-2], curve[:-2], test_size=2000, generator=stream)
        ours.append(abs(fit.predict(sizes[-1]).value / target - 1.0))
        theirs.append(abs(_fit_all(sizes[:-2], curve[:-2].mean(1).numpy())(sizes[-1]) / target - 1.0))
    draws = 1000
    all_draws = _median(lambda: fit_law(sizes, curve, test_size=2000, bootstrap=draws))
    one = _median(lambda: _fit_all(sizes, curve.mean(1).numpy()))
    ratio = one / (all_draws / draws)
    errors = (100.0 * float(np.mean(ours)), 100.0 * float(np.mean(theirs)))
    return [
        Row("law of 8 sizes x 3 seeds", "outlast, 1,000 bootstrap draws", all_draws, None, "< 50 ms", all_draws < 50.0),
        Row("law of 8 sizes x 3 seeds", "reference loop: five laws by SciPy, one draw", one),
        Row("law of 8 sizes x 3 seeds", "outlast, a draw; ratio of the loop", all_draws / draws, ratio, ">= 20", ratio >= 20.0),
        Row("error at four times the sizes, 20 curves", "outlast, % (not ms)", errors[0], None, "no worse", errors[0] <= errors[1]),
        Row("error at four times the sizes, 20 curves", "reference loop, % (not ms)", errors[1]),
    ]


def _batched() -> list[Row]:
    from sklearn.model_selection import learning_curve
    from sklearn.neural_network import MLPClassifier

    sizes, seeds, dim = [64, 128, 256, 512, 1024], 5, 16
    train = train_with(
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        loss=lambda outputs, labels: F.cross_entropy(outputs, labels),
        steps=300,
    )
    x, y = quadratic_halves(dim).sample(3024, torch.Generator().manual_seed(0))
    inputs, labels = x.numpy(), y.numpy()
    splits = [(np.roll(np.arange(1024), 200 * seed), np.arange(1024, 3024)) for seed in range(seeds)]

    def ours(*, batched: bool) -> float:
        found = sample_efficiency(
            {"mlp": lambda _: mlp(dim, 64, 2)}, quadratic_halves, train=train, dims=(dim,), sizes=sizes, seeds=seeds, batched=batched
        )
        return float(found.curves[0].accuracy.mean())

    def theirs() -> float:
        settings = {"learning_rate_init": 0.01, "batch_size": 1024, "max_iter": 300, "n_iter_no_change": 10**6, "alpha": 0.0}
        model = MLPClassifier((64,), **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = learning_curve(model, inputs, labels, train_sizes=sizes, cv=splits)[2]
        return float(scores.mean())

    means: dict[str, float] = {}
    times: dict[str, float] = {}
    for name, call in (("batched", lambda: ours(batched=True)), ("loop", lambda: ours(batched=False)), ("sklearn", theirs)):
        call()
        start = time.perf_counter()
        means[name] = 100.0 * call()
        times[name] = 1e3 * (time.perf_counter() - start)
    ratio = times["sklearn"] / times["batched"]
    gap = abs(means["sklearn"] - means["batched"])
    name = "learning curve, D = 16, 5 sizes x 5 seeds, 300 full-batch Adam steps"
    met = ratio >= 3.0 and gap <= 1.0
    return [
        Row(name, f"scikit-learn learning_curve, MLPClassifier ({means['sklearn']:.1f} % accuracy)", times["sklearn"]),
        Row(name, f"outlast, one training after another ({means['loop']:.1f} %)", times["loop"]),
        Row(name, f"outlast, seeds at once ({means['batched']:.1f} %)", times["batched"], ratio, ">= 3 at equal accuracy", met),
    ]


def _coupled() -> list[Row]:
    x, y = quadratic_halves(16).sample(64, torch.Generator().manual_seed(0))
    train = train_with(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype)),
        steps=150,
    )
    seconds = _median(lambda: equivariance_test(lambda: gaussian_dense(16, 32, Square()), train, x, y), 3)
    return [Row("equivariance test, 16 features, three groups x three draws", "eleven trainings of 150 steps", seconds)]


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(1)
    write("sample_efficiency", [*_laws(), *_batched(), *_coupled()])
