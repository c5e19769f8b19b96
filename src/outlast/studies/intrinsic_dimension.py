"""Study ``intrinsic-dimension``: how many numbers describe an image, and does it matter?

Pope, Zhu, Abdelkader, Goldblum, Goldstein, "The Intrinsic Dimension of Images and Its Impact on Learning", ICLR 2021: the
table of estimates over k, the validation on generated images, the experiments on noise, augmentation and learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study

if TYPE_CHECKING:
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

KS = (3, 5, 10, 20)


# ---- cells -------------------------------------------------------------------------------------------------------------


class Real(Settings):
    """Estimates on a real data set."""

    method: Literal["mackay", "pope2021"] = "mackay"
    images: Literal["fashion", "fashion-small", "cifar-train", "cifar-test"] = "fashion"
    rows: int | None = Field(default=None, ge=100)
    anchors: int | None = Field(default=2500, ge=10)


def real_cell(config: Real, seed: int, context: Context) -> Outcome:
    """Estimates by the right and by the published normalisation, on the same distances."""
    from outlast.diagnose import dimension

    def distances() -> tuple[Tensor, int]:
        import torch

        data = _images(config.images)
        if config.rows is not None:
            data = data[torch.randperm(len(data), generator=context.generator("rows"))[: config.rows]]
        if config.anchors is None:
            return dimension.knn(data, max(KS))[0], len(data)
        chosen = torch.randperm(len(data), generator=context.generator("anchors"))[: config.anchors]
        from outlast._core._neighbours import nearest

        return nearest(data, max(KS), rows=chosen)[0], len(data)

    table, n = context.shared(("real", config.images, config.rows, config.anchors), distances)
    return Outcome(_by_k(dimension.from_distances(table, config.method, KS, n=n)))


class Ladder(Settings):
    """Estimates on generated images of known dimension."""

    d: int = Field(default=8, ge=1)
    n: int = Field(default=2000, ge=100)
    draws: int = Field(default=3, ge=1)


def ladder_cell(config: Ladder, seed: int, context: Context) -> Outcome:
    """The estimates over k, and TwoNN, mean over independent surfaces."""
    from outlast.diagnose import dimension
    from outlast.diagnose.dimension._likelihood import twonn_fit

    found: list[dict[str, float]] = []
    for draw in range(config.draws):
        images = dimension.synthetic_images(config.d, config.n, seed=seed * config.draws + draw)
        distances = dimension.knn(images, max(KS))[0]  # one search for both
        ratios = distances[:, 1] / distances[:, 0]
        found.append({**_by_k(dimension.from_distances(distances, k=KS)), "twonn": twonn_fit(ratios, discard=0.1)})
    return Outcome({name: _mean([values[name] for values in found]) for name in found[0]})


class Change(Settings):
    """Estimates on changed Fashion-MNIST images."""

    change: Literal["none", "noise-8", "noise-32", "noise-128", "gaussian", "flip"] = "none"
    n: int = Field(default=3000, ge=100)


def change_cell(config: Change, seed: int, context: Context) -> Outcome:
    """Noise, a flipped partner for each image, other numbers of images."""
    import torch

    from outlast.diagnose import dimension

    images = _fashion_sample(config.n, context)
    rng = context.generator("change")
    if config.change.startswith("noise-"):
        flat = images.flatten(1).clone()
        places = torch.rand(flat.shape, generator=rng).topk(int(config.change.removeprefix("noise-")), dim=1).indices
        images = flat.scatter_(1, places, torch.rand(places.shape, generator=rng))
    elif config.change == "gaussian":
        images = images + 0.05 * torch.randn(images.shape, generator=rng)
    elif config.change == "flip":
        images = torch.cat([images, images.flip(-1)])
    return Outcome(_by_k(dimension.estimate(images, k=KS)))


class Upscaling(Settings):
    """Estimates on enlarged images."""

    factor: int = Field(default=1, ge=1)
    mode: Literal["nearest", "bilinear"] = "nearest"
    n: int = Field(default=2000, ge=100)


def upscaling_cell(config: Upscaling, seed: int, context: Context) -> Outcome:
    """The same images with more pixels."""
    import torch.nn.functional as F

    from outlast.diagnose import dimension

    images = _fashion_sample(config.n, context)
    large = F.interpolate(images, scale_factor=config.factor, mode=config.mode) if config.factor > 1 else images
    return Outcome({**_by_k(dimension.estimate(large, k=KS)), "pixels": float(large[0].numel())})


class Learning(Settings):
    """A perceptron on generated images of two classes."""

    d: int = Field(default=4, ge=1)
    side: int = Field(default=16, ge=4)
    sizes: tuple[int, ...] = (50, 150, 500, 1500)
    steps: int = Field(default=200, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    goal: float = Field(default=0.7, gt=0.5, le=1)
    draws: int = Field(default=3, ge=1)


def learning_cell(config: Learning, seed: int, context: Context) -> Outcome:
    """Test accuracy after a fixed number of steps at several training sizes, and steps to a given accuracy at the largest.

    The mean over independent surfaces and classes.
    """
    found = [_learn(config, seed * config.draws + draw, context) for draw in range(config.draws)]
    return Outcome({name: _mean([values[name] for values in found]) for name in found[0]})


def _learn(config: Learning, draw: int, context: Context) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from outlast.diagnose.dimension._shaping import synthetic_pairs
    from outlast.studies._models import mlp

    largest = max(config.sizes)
    images, z = synthetic_pairs(config.d, largest + 2000, (1, config.side, config.side), draw, width=128)
    direction = torch.randn(config.d, generator=context.generator("classes", draw))
    labels = (z @ direction > 0).long()
    images = (images - images[:largest].mean(0)) / images[:largest].std()
    test, truth = images[largest:], labels[largest:]
    metrics: dict[str, float] = {}
    reached = float(config.steps)
    for size in config.sizes:
        model = context.initialise(lambda: mlp(config.side**2, 128, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
        stream = context.generator(f"batches {size}", draw)
        for step in range(config.steps):
            index = torch.randint(0, size, (config.batch_size,), generator=stream)
            loss = F.cross_entropy(model(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if size == largest and reached == config.steps:
                with torch.no_grad():
                    if float((model(test).argmax(1) == truth).float().mean()) >= config.goal:
                        reached = float(step + 1)
        with torch.no_grad():
            metrics[f"n{size}"] = 100.0 * float((model(test).argmax(1) == truth).float().mean())
    return {**metrics, "steps": reached}


class Gan(Settings):
    """A small generative network, and estimates on what it draws from few latent coordinates."""

    latent: int = Field(default=32, ge=2)
    train_size: int = Field(default=20_000, ge=100)
    steps: int = Field(default=1500, ge=1)
    batch_size: int = Field(default=64, ge=2)
    lr: float = Field(default=2e-4, gt=0)
    n: int = Field(default=3000, ge=100)
    shown: int = Field(default=8, ge=1)


GAN_D = (2, 4, 8, 16, 32)


def gan_cell(config: Gan, seed: int, context: Context) -> Outcome:
    """Train, then hold all but d latent coordinates at zero."""
    import torch

    from outlast.diagnose import dimension

    generator = _train_gan(config, context)
    metrics: dict[str, float] = {}
    series: dict[str, list[float]] = {}
    for d in GAN_D:
        z = torch.zeros(config.n, config.latent)
        z[:, :d] = torch.randn(config.n, d, generator=context.generator("samples", d))
        with torch.no_grad():
            images = torch.cat([generator(part) for part in z.split(500)])
        metrics[f"d{d}"] = dimension.estimate(images, k=20).value
        series[f"samples {d}"] = [round(float(v), 3) for v in images[: config.shown, 0, ::2, ::2].flatten()]
    return Outcome(metrics, series)


def _train_gan(config: Gan, context: Context) -> nn.Module:
    import torch
    import torch.nn.functional as F
    from torch import nn

    def generator() -> nn.Module:
        return nn.Sequential(
            nn.Linear(config.latent, 64 * 49), nn.Unflatten(1, (64, 7, 7)), nn.BatchNorm2d(64), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip

    def critic() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(64 * 49, 1)
        )

    real = _images("fashion").view(-1, 1, 28, 28)
    real = real[torch.randperm(len(real), generator=context.generator("rows"))[: config.train_size]]
    draw, judge = context.initialise(generator), context.initialise(critic)
    steps = [torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.5, 0.999)) for net in (draw, judge)]
    rng = context.generator("training")
    for step in range(config.steps):
        x = real[torch.randint(0, len(real), (config.batch_size,), generator=rng)]
        fake = draw(torch.randn(config.batch_size, config.latent, generator=rng))
        loss = F.softplus(-judge(x)).mean() + F.softplus(judge(fake.detach())).mean()
        steps[1].zero_grad()
        loss.backward()
        steps[1].step()
        loss = F.softplus(-judge(fake)).mean()
        steps[0].zero_grad()
        loss.backward()
        steps[0].step()
        if (step + 1) % 100 == 0:
            context.report((step + 1) // 100, config.steps // 100, float(loss))
    return draw.eval()


# ---- data --------------------------------------------------------------------------------------------------------------


def _images(name: str) -> Tensor:
    """Rows of pixels in [0, 1]."""
    from outlast.data import load

    if name == "fashion-small":
        data = load("fashion-mnist", variant="small")
    elif name == "fashion":
        data = load("fashion-mnist")
    else:
        data = load("cifar10", name.removeprefix("cifar-"))  # pyright: ignore[reportArgumentType]
    return data.images.flatten(1).float() / 255.0


def _fashion_sample(n: int, context: Context) -> Tensor:
    """Test images, drawn by seed."""
    import torch

    from outlast.data import load

    data = load("fashion-mnist", "test", variant="small")
    return data.images[torch.randperm(len(data), generator=context.generator("rows"))[:n]].float() / 255.0


def _by_k(result: Any) -> dict[str, float]:
    return {f"k{k}": estimate.value for k, estimate in result.by_k.items()} | {"se20": result.by_k[20].se}


# ---- measures ----------------------------------------------------------------------------------------------------------


def _ks(results: Results, arm: str, seed: int, setting: str | None = None) -> list[float]:
    return [results.value(arm, f"k{k}", seed, setting) for k in KS]


def _normalisation_gap(results: Results, seed: int) -> float:
    pairs = zip(KS, _ks(results, "pope2021", seed), _ks(results, "mackay", seed), strict=True)
    return max(abs(published / right - (k - 2) / (k - 1)) for k, published, right in pairs)


def _rise(arm: str) -> Callable[[Results, int], float]:
    return lambda results, seed: results.value(arm, "k20", seed) / results.value(arm, "k3", seed)


# estimates and standard errors of earlier runs on other anchors
_REFERENCE = {
    "fashion": ((15.06, 0.31), (15.21, 0.23), (14.88, 0.17), (14.44, 0.14)),
    "cifar-train": ((24.97, 0.67), (27.08, 0.47), (28.06, 0.32), (27.58, 0.24)),
}
_TEST_ROW = (28.38, 27.61, 26.20, 24.23)


def _worst_z(results: Results, seed: int) -> float:
    worst = 0.0
    for setting, reference in _REFERENCE.items():
        se20 = results.value("mackay", "se20", seed, setting)
        for (value, se), found in zip(reference, _ks(results, "mackay", seed, setting), strict=True):
            # of our own errors only that at k = 20 is kept; those at smaller k are in proportion to the reference's
            own = se20 * se / reference[-1][1]
            worst = max(worst, abs(found - value) / (se**2 + own**2) ** 0.5)
    return worst


def _test_row_gap(results: Results, seed: int) -> float:
    return max(abs(a - b) for a, b in zip(_TEST_ROW, _ks(results, "mackay", seed, "cifar-test"), strict=True))


def _train_test_gap(results: Results, seed: int) -> float:
    pairs = zip(_ks(results, "mackay", seed, "cifar-train-10k"), _ks(results, "mackay", seed, "cifar-test"), strict=True)
    return 100.0 * max(abs(a / b - 1.0) for a, b in pairs)


def _ladder_error(ds: Sequence[int]) -> Callable[[Results, int], float]:
    return lambda results, seed: 100.0 * max(abs(v / d - 1.0) for d in ds for v in _ks(results, "estimate", seed, f"d-{d}"))


_LADDER = (1, 2, 4, 8, 16, 32, 64)


def _ladder_rise(results: Results, seed: int) -> float:
    rows = [_ks(results, "estimate", seed, f"d-{d}") for d in _LADDER]
    return min(b / a for low, high in pairwise(rows) for a, b in zip(low, high, strict=True))


def _noise_rise(results: Results, seed: int) -> float:
    values = [results.value(arm, "k3", seed) for arm in ("none", "noise-8", "noise-32", "noise-128")]
    return min(b / a for a, b in pairwise(values))


def _learning_fall(results: Results, seed: int) -> float:
    return min(
        results.value("mlp", f"n{n}", seed, f"d{low}-{pixels}") - results.value("mlp", f"n{n}", seed, f"d{high}-{pixels}")
        for pixels in (256, 1024)
        for low, high in ((4, 16), (16, 64))
        for n in (150, 500, 1500)
    )


def _pixel_share(results: Results, seed: int) -> float:
    sizes, ds, pixels = (50, 150, 500, 1500), (4, 16, 64), (256, 1024)
    table = {(d, p, n): results.value("mlp", f"n{n}", seed, f"d{d}-{p}") for d in ds for p in pixels for n in sizes}
    change = [abs(table[d, 1024, n] - table[d, 256, n]) for d in ds for n in sizes]
    fall = [table[a, p, n] - table[b, p, n] for a, b in ((4, 16), (16, 64)) for p in pixels for n in sizes]
    return (sum(change) / len(change)) / (sum(fall) / len(fall))


def _steps_ratio(results: Results, seed: int) -> float:
    return results.value("mlp", "steps", seed, "d64-1024") / results.value("mlp", "steps", seed, "d4-1024")


def _upscaling_gap(mode: str) -> Callable[[Results, int], float]:
    def measure(results: Results, seed: int) -> float:
        plain = _ks(results, "images", seed, "pixels-1")
        return 100.0 * max(
            abs(a / b - 1.0) for f in (2, 4) for a, b in zip(_ks(results, "images", seed, f"{mode}-{f}"), plain, strict=True)
        )

    return measure


def _bilinear_gap(results: Results, seed: int) -> float:
    pairs = zip(_ks(results, "images", seed, "bilinear-4"), _ks(results, "images", seed, "bilinear-2"), strict=True)
    return 100.0 * max(abs(a / b - 1.0) for a, b in pairs)


def _gan_excess(results: Results, seed: int) -> float:
    return max(results.value("gan", f"d{d}", seed) / d for d in GAN_D)


def _gan_rise(results: Results, seed: int) -> float:
    values = [results.value("gan", f"d{d}", seed) for d in GAN_D]
    return min(b / a for a, b in pairwise(values))


# ---- figures -----------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _k_figure(name: str, title: str, rows: Sequence[tuple[str, str, str | None]]) -> Figure:
    """Estimates over k; ``rows`` are (label, arm, setting)."""

    def shown(results: Results) -> list[tuple[str, list[float]]]:
        found: list[tuple[str, list[float]]] = []
        for label, arm, setting in rows:
            if (setting is None or setting in results.settings) and results.values(arm, "k3", setting):
                found.append((label, [_mean(results.values(arm, f"k{k}", setting)) for k in KS]))
        return found

    def draw(figure: Any, results: Results) -> None:
        axes = figure.subplots()
        for label, values in shown(results):
            axes.plot(KS, values, marker="o", label=label)
        axes.set_xlabel("neighbours k")
        axes.set_ylabel("intrinsic dimension")
        axes.legend()

    def describe(results: Results) -> str:
        parts = [f"{label}: " + ", ".join(f"{v:.1f}" for v in values) for label, values in shown(results)]
        return f"Estimates at k = {', '.join(map(str, KS))}, mean over seeds. " + "; ".join(parts) + "."

    return Figure(name, title, describe, draw)


def _draw_ladder(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    ds = [d for d in _LADDER if f"d-{d}" in results.settings]
    axes.plot(ds, ds, label="true")
    for metric, label in (("k3", "mackay, k = 3"), ("k20", "mackay, k = 20"), ("twonn", "TwoNN")):
        axes.plot(ds, [_mean(results.values("estimate", metric, f"d-{d}")) for d in ds], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("true dimension of the generated images")
    axes.set_ylabel("estimate")
    axes.legend()


def _describe_ladder(results: Results) -> str:
    values = [f"{d}: {_mean(results.values('estimate', 'k20', f'd-{d}')):.1f}" for d in _LADDER if f"d-{d}" in results.settings]
    return "True dimension and the estimate at k = 20, mean over seeds: " + "; ".join(values) + ". Above 16 it falls behind."


def _draw_learning(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    sizes = (50, 150, 500, 1500)
    for d in (4, 16, 64):
        for pixels in (256, 1024):
            means = [_mean(results.values("mlp", f"n{n}", f"d{d}-{pixels}")) for n in sizes]
            axes.plot(sizes, means, marker="o", label=f"d = {d}, {pixels} pixels")
    axes.set_xscale("log")
    axes.set_xlabel("training images")
    axes.set_ylabel("test accuracy (%)")
    axes.legend()


def _describe_learning(results: Results) -> str:
    parts = [f"d = {d}, {p} pixels: {_mean(results.values('mlp', 'n1500', f'd{d}-{p}')):.1f} %" for d in (4, 16, 64) for p in (256, 1024)]
    return "Accuracy with 1,500 training images, mean over seeds. " + "; ".join(parts) + "."


def _draw_gan(figure: Any, results: Results) -> None:
    import numpy as np

    rows = [np.asarray(results.series("gan", f"samples {d}", results.seeds[0])).reshape(-1, 14, 14) for d in GAN_D]
    grid = figure.subplots(len(GAN_D), 1)
    for axes, d, images in zip(grid, GAN_D, rows, strict=True):
        axes.imshow(np.concatenate(list(images), axis=1), cmap="gray", vmin=0, vmax=1)
        axes.set_yticks([])
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.set_ylabel(f"{d}", rotation=0, labelpad=12)


def _describe_gan(results: Results) -> str:
    values = [f"{d} free coordinates: {_mean(results.values('gan', f'd{d}')):.1f}" for d in GAN_D]
    return (
        "Samples of the first seed with 2, 4, 8, 16, 32 free latent coordinates, at half resolution. Estimates: " + "; ".join(values) + "."
    )


# ---- declarations ------------------------------------------------------------------------------------------------------

_K_METRICS = (*(Metric(f"k{k}", f"k = {k}", digits=2) for k in KS), Metric("se20", "error of one run, k = 20", digits=2))
_ESTIMATORS = (
    Arm("mackay", "mackay (inverse of the mean inverse)", "method"),
    Arm("pope2021", "formula of the released code", "baseline", {"method": "pope2021"}),
)

_REAL = Part(
    name="real",
    question="What is the dimension of image sets, and how much of the published rise with k is the formula?",
    settings_type=Real,
    cell=real_cell,
    arms=_ESTIMATORS,
    metrics=_K_METRICS,
    claims=(
        Claim(
            "normalisation",
            "The released formula is (k-2)/(k-1) times the consistent one, at every k (largest gap)",
            _normalisation_gap,
            1e-6,
            "at most",
            digits=6,
        ),
        Claim(
            "published-rise",
            "On Fashion-MNIST the released formula rises by at least half from k = 3 to k = 20 (ratio)",
            _rise("pope2021"),
            1.5,
            digits=2,
        ),
        Claim(
            "no-rise",
            "On Fashion-MNIST the consistent formula does not rise (ratio of k = 20 to k = 3 at most 1)",
            _rise("mackay"),
            1.0,
            "at most",
            digits=3,
        ),
        Claim(
            "anchors",
            "On Fashion-MNIST and CIFAR-10 estimates from 2,500 anchors lie within 3 combined standard errors of earlier ones (worst)",
            _worst_z,
            3.0,
            "at most",
            digits=2,
            scales=("standard",),
        ),
        Claim(
            "exact-row",
            "On the 10,000 exact test images of CIFAR-10 the estimates repeat to 0.01",
            _test_row_gap,
            0.01,
            "at most",
            digits=4,
            scales=("standard",),
        ),
        Claim(
            "equal-n",
            "At equal N = 10,000 the training and test images of CIFAR-10 agree within 2 % at every k",
            _train_test_gap,
            2.0,
            "at most",
            unit="%",
            scales=("standard",),
        ),
    ),
    figures=(
        _k_figure(
            "normalisation",
            "The same distances, two formulas",
            [("Fashion-MNIST, mackay", "mackay", None), ("Fashion-MNIST, released formula", "pope2021", None)]
            + [(f"CIFAR-10 test, {arm}", arm, "cifar-test") for arm in ("mackay", "pope2021")],
        ),
    ),
    deviations=(
        "CIFAR-10 training images are JPEG (quality 90), test images exact; at this quality that moves the estimate by 0.4 % at most.",
        "The paper's own table could not be opened here: what is compared is the formula of its released code.",
    ),
    scales={
        "quick": Scale(
            arms=("mackay", "pope2021"),
            settings=(Setting("", "Fashion-MNIST, 2,500 anchors in 10,000", {"images": "fashion-small"}),),
            data=(("fashion-mnist", "small"),),
            dropped="CIFAR-10, five sixths of Fashion-MNIST",
            minutes=0.1,
        ),
        "standard": Scale(
            arms=("mackay", "pope2021"),
            settings=(
                Setting("fashion", "Fashion-MNIST, 2,500 anchors in 60,000", {"images": "fashion"}),
                Setting("cifar-train", "CIFAR-10 training (JPEG-90), 2,500 in 50,000", {"images": "cifar-train"}),
                Setting("cifar-test", "CIFAR-10 test (exact), all 10,000", {"images": "cifar-test", "anchors": None}),
                Setting(
                    "cifar-train-10k",
                    "CIFAR-10 training, 10,000 among themselves",
                    {"images": "cifar-train", "rows": 10_000, "anchors": None},
                ),
            ),
            data=(("cifar10", "full"), ("fashion-mnist", "full")),
            minutes=2,
        ),
    },
)

_LADDER_PART = Part(
    name="ladder",
    question="Up to which dimension is the estimate right?",
    settings_type=Ladder,
    cell=ladder_cell,
    arms=(Arm("estimate", "Estimates", "method"),),
    metrics=(*_K_METRICS, Metric("twonn", "TwoNN", digits=2)),
    claims=(
        Claim("ladder-8", "Up to dimension 8 every estimate is within 5 %", _ladder_error((1, 2, 4, 8)), 5.0, "at most", unit="%"),
        Claim("ladder-16", "At dimension 16 every estimate is within 10 %", _ladder_error((16,)), 10.0, "at most", unit="%"),
        Claim("ladder-rise", "Estimates rise with the true dimension up to 64 (least ratio of neighbours)", _ladder_rise, 1.0, digits=2),
    ),
    figures=(Figure("ladder", "True dimension and estimates", _describe_ladder, _draw_ladder),),
    deviations=(
        "The paper validates on a large pretrained GAN; these are images of a fixed random network with a known number of inputs.",
    ),
    scales={
        name: Scale(arms=("estimate",), settings=tuple(Setting(f"d-{d}", f"true dimension {d}", {"d": d}) for d in _LADDER), minutes=0.2)
        for name in ("quick", "standard")
    },
)

_CURVES = Part(
    name="curves",
    question="What do noise, augmentation and the number of images do to the estimate?",
    settings_type=Change,
    cell=change_cell,
    arms=(
        Arm("none", "3,000 images", "baseline"),
        *(Arm(f"noise-{n}", f"{n} random pixels of each replaced", "ablation", {"change": f"noise-{n}"}) for n in (8, 32, 128)),
        Arm("gaussian", "Gaussian noise 0.05", "ablation", {"change": "gaussian"}),
        Arm("flip", "each with its mirror image", "ablation", {"change": "flip"}),
        Arm("n-1000", "1,000 images", "ablation", {"n": 1000}),
        Arm("n-10000", "10,000 images", "ablation", {"n": 10_000}),
    ),
    metrics=_K_METRICS,
    claims=(
        Claim("noise", "More noisy pixels, higher dimension at k = 3 (least ratio of 0, 8, 32, 128)", _noise_rise, 1.1, digits=2),
        Claim(
            "gaussian",
            "Gaussian noise of 0.05 raises the estimate at k = 3 (ratio)",
            lambda results, seed: results.value("gaussian", "k3", seed) / results.value("none", "k3", seed),
            1.1,
            digits=2,
        ),
        Claim(
            "flip",
            "A mirror image beside each image lowers the estimate at k = 3 by at least a quarter (ratio)",
            lambda results, seed: results.value("flip", "k3", seed) / results.value("none", "k3", seed),
            0.75,
            "at most",
            digits=2,
        ),
        Claim(
            "sample-size",
            "At k = 20 the estimate grows with the number of images, 1,000 to 10,000 (ratio)",
            lambda results, seed: results.value("n-10000", "k20", seed) / results.value("n-1000", "k20", seed),
            1.1,
            digits=2,
        ),
    ),
    figures=(
        _k_figure(
            "changes",
            "Changes of the images and the estimate",
            [
                ("3,000 images", "none", None),
                ("8 noisy pixels", "noise-8", None),
                ("32 noisy pixels", "noise-32", None),
                ("with mirror images", "flip", None),
                ("1,000 images", "n-1000", None),
                ("10,000 images", "n-10000", None),
            ],
        ),
    ),
    deviations=("Noisy pixels are drawn once for each image; the paper draws ten copies.",),
    scales={
        name: Scale(
            arms=("none", "noise-8", "noise-32", "noise-128", "gaussian", "flip", "n-1000", "n-10000"),
            settings=(Setting("", "Fashion-MNIST test images"),),
            data=(("fashion-mnist", "small"),),
            minutes=0.2,
        )
        for name in ("quick", "standard")
    },
)

_LEARNING = Part(
    name="learning",
    question="Is it the intrinsic dimension or the number of pixels that costs labels and steps?",
    settings_type=Learning,
    cell=learning_cell,
    arms=(Arm("mlp", "Perceptron", "method"),),
    metrics=(
        *(Metric(f"n{n}", f"Accuracy, {n} images", "%", "higher") for n in (50, 150, 500, 1500)),
        Metric("steps", "Steps to 70 % (1,500 images)", "", "lower", 0),
    ),
    claims=(
        Claim(
            "dimension-costs",
            "With 150 to 1,500 images accuracy falls by at least 5 points from dimension 4 to 16 and from 16 to 64 (least fall)",
            _learning_fall,
            5.0,
            unit="points",
        ),
        Claim(
            "pixels-do-not",
            "Four times the pixels change accuracy by less than half of what the next dimension does (ratio of means)",
            _pixel_share,
            0.5,
            "at most",
            digits=2,
        ),
        Claim(
            "steps",
            "At dimension 64 training takes at least twice the steps to 70 % accuracy that it takes at dimension 4 (ratio)",
            _steps_ratio,
            2.0,
            digits=1,
        ),
    ),
    figures=(Figure("learning", "Accuracy by dimension, pixels and training images", _describe_learning, _draw_learning),),
    deviations=("Generated images and a perceptron; the paper trains residual networks on GAN images and real sets.",),
    scales={
        name: Scale(
            arms=("mlp",),
            settings=tuple(
                Setting(f"d{d}-{side**2}", f"dimension {d}, {side**2} pixels", {"d": d, "side": side})
                for d in (4, 16, 64)
                for side in (16, 32)
            ),
            minutes=0.4,
        )
        for name in ("quick", "standard")
    },
)

_UPSCALING = Part(
    name="upscaling",
    question="Does the dimension stay when the pixels multiply?",
    settings_type=Upscaling,
    cell=upscaling_cell,
    arms=(Arm("images", "Fashion-MNIST", "method"),),
    metrics=(*_K_METRICS, Metric("pixels", "Pixels", digits=0)),
    claims=(
        Claim(
            "nearest", "Repeated pixels change no estimate by more than 1 %", _upscaling_gap("nearest"), 1.0, "at most", unit="%", digits=3
        ),
        Claim(
            "more-pixels",
            "Between two- and fourfold smooth enlargement, four times the pixels, no estimate moves by more than 5 %",
            _bilinear_gap,
            5.0,
            "at most",
            unit="%",
        ),
        Claim(
            "bilinear", "Smooth enlargement changes no estimate by more than 10 %", _upscaling_gap("bilinear"), 10.0, "at most", unit="%"
        ),
    ),
    figures=(
        _k_figure(
            "upscaling",
            "The same images with more pixels",
            [("784 pixels", "images", "pixels-1")]
            + [(f"{mode}, {784 * f * f} pixels", "images", f"{mode}-{f}") for mode in ("nearest", "bilinear") for f in (2, 4)],
        ),
    ),
    deviations=(
        "Bilinear interpolation also smooths: it takes noise out of the pixels, and with it some dimension, once and for all factors.",
    ),
    scales={
        name: Scale(
            arms=("images",),
            changes={"n": 1000 if name == "quick" else 2000},
            settings=(
                Setting("pixels-1", "as they are"),
                *(
                    Setting(f"{mode}-{f}", f"{mode}, {f}-fold", {"factor": f, "mode": mode})
                    for mode in ("nearest", "bilinear")
                    for f in (2, 4)
                ),
            ),
            data=(("fashion-mnist", "small"),),
            minutes=0.3,
        )
        for name in ("quick", "standard")
    },
)

_GAN = Part(
    name="gan",
    question="On images of a trained generator with d free latent coordinates: does the estimate stay below d and rise with it?",
    settings_type=Gan,
    cell=gan_cell,
    arms=(Arm("gan", "Samples of the generator", "method"),),
    metrics=tuple(Metric(f"d{d}", f"{d} free coordinates", digits=2) for d in GAN_D),
    claims=(
        Claim(
            "gan-below", "The estimate (k = 20) is at most 1.1 times the number of free coordinates", _gan_excess, 1.1, "at most", digits=2
        ),
        Claim("gan-rise", "It rises with their number (least ratio of 2, 4, 8, 16, 32)", _gan_rise, 1.0, digits=2),
    ),
    figures=(Figure("samples", "Samples by number of free coordinates", _describe_gan, _draw_gan),),
    deviations=("A small network trained here on Fashion-MNIST; the paper takes a pretrained BigGAN of ImageNet.",),
    scales={"standard": Scale(arms=("gan",), data=(("fashion-mnist", "full"),), minutes=6)},
)

STUDY = Study(
    name="intrinsic-dimension",
    title="Intrinsic dimension of images",
    question="How many numbers describe an image, and does it matter for learning?",
    paper="Pope, Zhu, Abdelkader, Goldblum, Goldstein: The Intrinsic Dimension of Images and Its Impact on Learning. ICLR 2021",
    follows="The table of estimates over k, the validation on generated images, the experiments on noise, augmentation and learning",
    theme="know your network and your data",
    parts=(_REAL, _LADDER_PART, _CURVES, _UPSCALING, _LEARNING, _GAN),
    origin="outlast.studies.intrinsic_dimension:STUDY",
)
