"""Study ``sample-efficiency``: how many examples do dense and convolutional networks need, and can one tell beforehand?

Z. Li, Zhang, Arora, "Why Are Convolutional Nets More Sample-Efficient than Fully-Connected Nets?", ICLR 2021: theorems 5.2 and 5.5, table
1, figure 1 (whose learning rates and epochs are not in its text). The extrapolation of learning curves is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.diagnose.equivariance import Trainer
    from outlast.diagnose.sample_efficiency import Law, SampleCurve
    from outlast.studies._context import Context
    from outlast.studies._results import Results

# ---- dimension ------------------------------------------------------------------------------------------------------------------


class Dimension(Settings):
    """Is the first half of a Gaussian vector longer than the second?"""

    model: Literal["dense", "conv"] = "dense"
    dims: tuple[int, ...] = (8, 16, 32)
    conv_dims: tuple[int, ...] = (8, 32, 64)
    compared: int = Field(default=32, ge=2)
    threshold: float = Field(default=0.75, gt=0, lt=1)
    trainings: int = Field(default=5, ge=1)
    steps: int = Field(default=400, ge=1)
    conv_steps: int = Field(default=400, ge=1)
    lr: float = Field(default=0.1, gt=0)
    test_size: int = Field(default=2000, ge=1)


def dimension_cell(config: Dimension, seed: int, context: Context) -> Outcome:
    """Learning curves at every input size, examples for the threshold, and the exponent with which these grow."""
    import math

    from outlast.diagnose.sample_efficiency import quadratic_halves, sample_efficiency
    from outlast.studies._models import Square, circular_conv, gaussian_dense

    def build(dim: int) -> nn.Module:
        if config.model == "dense":
            model = gaussian_dense(dim, dim, Square())
        else:
            model = circular_conv(dim, 4, Square(), blocks=2, divisor=math.sqrt(dim))
        return model.to(context.fabric.device)

    dims, steps = (config.dims, config.steps) if config.model == "dense" else (config.conv_dims, config.conv_steps)

    def sizes(dim: int) -> list[int]:
        least, most = (dim**2 // 4, 4 * dim**2) if config.model == "dense" else (4, 128)
        return [least * 2**power for power in range(int(math.log2(most / least)) + 1)]

    found = sample_efficiency(
        {config.model: build},
        quadratic_halves,
        train=_sgd(config.lr, steps),
        dims=dims,
        threshold=config.threshold,
        sizes=sizes,
        seeds=config.trainings,
        test_size=config.test_size,
        batched=True,
        seed=seed,
    )
    needed = [_needed_or_bound(curve, config.threshold) for curve in found.curves]
    exponent = found.exponents.get(config.model)
    # Where no two curves cross the threshold the bounds still say with which power they grow, at least.
    slope = (math.log(needed[-1]) - math.log(needed[0])) / (math.log(dims[-1]) - math.log(dims[0]))
    value, low, high = (exponent.value, exponent.low, exponent.high) if exponent is not None else (slope, slope, slope)
    return Outcome(
        {
            "exponent": value,
            "low": low,
            "high": high,
            "needed": _needed_or_bound(found.at(0.8).curve(config.model, config.compared), 0.8),
        },
        {
            "dims": [float(dim) for dim in dims],
            "needed": needed,
            **{f"accuracy {dim}": found.curve(config.model, dim).accuracy.mean(1).tolist() for dim in dims},
        },
    )


def _needed_or_bound(curve: SampleCurve, threshold: float) -> float:
    """Examples for the threshold; the smallest or largest number measured where the curve begins above it or does not reach it."""
    if curve.needed is not None:
        return curve.needed
    return float(curve.sizes[0] if float(curve.accuracy[0].mean()) >= threshold else curve.sizes[-1])


def _sgd(lr: float, steps: int, batch_size: int | None = None) -> Trainer:
    import torch

    from outlast.diagnose.equivariance import train_with

    return train_with(
        lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4),
        loss=_logistic,
        steps=steps,
        batch_size=batch_size,
        schedule="cosine",
        clip_norm=1.0,
    )


def _logistic(outputs: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import functional as F

    return F.binary_cross_entropy_with_logits(outputs[:, 0], labels.to(outputs.dtype))


# ---- images ---------------------------------------------------------------------------------------------------------------------

_SIZES = (64, 256, 1024, 4096)


class Images(Settings):
    """Is the first channel of an image longer than the second?"""

    model: Literal["dense", "conv"] = "dense"
    base: Literal["gaussian", "cifar10"] = "gaussian"
    side: int = Field(default=8, ge=2)
    trainings: int = Field(default=2, ge=1)
    steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=0.1, gt=0)
    largest: int = Field(default=4096, ge=4096)
    test_size: int = Field(default=2000, ge=1)


def images_cell(config: Images, seed: int, context: Context) -> Outcome:
    """Accuracy by number of examples."""
    from torch import nn

    from outlast.diagnose.sample_efficiency import channel_norm, sample_efficiency
    from outlast.studies._models import Square, gaussian_dense

    shape = (3, config.side, config.side)

    def build() -> nn.Module:
        if config.model == "dense":
            model = gaussian_dense(3 * config.side**2, 3 * config.side**2, Square())
        else:
            convolve = [nn.Conv2d(3, 10, 3, padding=1), Square(), nn.Conv2d(10, 1, 3, padding=1)]
            model = nn.Sequential(*convolve, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return model.to(context.fabric.device)

    found = sample_efficiency(
        {config.model: build},
        channel_norm(shape, None if config.base == "gaussian" else _small_photographs(config.side)),
        train=_sgd(config.lr, config.steps, config.batch_size),
        sizes=sorted({*_SIZES, config.largest}),
        seeds=config.trainings,
        test_size=config.test_size,
        batched=True,
        seed=seed,
    )
    curve = found.curves[0]
    means = dict(zip(curve.sizes, (100.0 * curve.accuracy.mean(1)).tolist(), strict=True))
    return Outcome({**{f"n{size}": means[size] for size in _SIZES}, "largest": means[config.largest]})


def _small_photographs(side: int) -> torch.Tensor:
    """CIFAR-10's training images averaged to ``side`` pixels and standardised by channel."""
    from torch.nn import functional as F

    from outlast.data import load, standardise

    images = load("cifar10").images
    small = F.adaptive_avg_pool2d(images.float(), side) / 255.0
    return standardise(small * 255.0, small.mean((0, 2, 3)), small.std((0, 2, 3)))


def _least_gap(setting: str) -> Callable[[Results, int], float]:
    return lambda results, seed: min(
        results.value("conv", f"n{size}", seed, setting) - results.value("dense", f"n{size}", seed, setting) for size in _SIZES
    )


# ---- texture --------------------------------------------------------------------------------------------------------------------


class Texture(Settings):
    """Are two ones next to each other or two apart?"""

    model: Literal["dense", "conv"] = "dense"
    dim: int = Field(default=256, ge=20)
    trainings: int = Field(default=5, ge=1)
    steps: int = Field(default=150, ge=1)
    lr: float = Field(default=0.01, gt=0)
    test_size: int = Field(default=2000, ge=1)


def texture_cell(config: Texture, seed: int, context: Context) -> Outcome:
    """Accuracy (median over trainings: small convolutions sometimes die) by number of examples."""
    import torch
    from torch import nn

    from outlast.diagnose.equivariance import train_with
    from outlast.diagnose.sample_efficiency import local_texture, sample_efficiency
    from outlast.studies._models import circular_conv

    def build() -> nn.Module:
        if config.model == "dense":
            model = nn.Sequential(nn.Linear(config.dim, 256), nn.ReLU(), nn.Linear(256, 1))
        else:
            model = circular_conv(config.dim, 8, nn.ReLU())
        return model.to(context.fabric.device)

    train = train_with(lambda parameters: torch.optim.Adam(parameters, lr=config.lr), loss=_logistic, steps=config.steps)
    sizes = {"few": 8, "tenth": config.dim // 10, "half": config.dim // 2, "once": config.dim, "twice": 2 * config.dim}
    found = sample_efficiency(
        {config.model: build},
        local_texture(config.dim),
        train=train,
        sizes=sorted(set(sizes.values())),
        seeds=config.trainings,
        test_size=config.test_size,
        batched=True,
        seed=seed,
    )
    curve = found.curves[0]
    medians = dict(zip(curve.sizes, (100.0 * curve.accuracy.median(1).values).tolist(), strict=True))
    return Outcome({name: medians[size] for name, size in sizes.items()})


# ---- equivariance ---------------------------------------------------------------------------------------------------------------

_GROUPS = ("orthogonal", "signed_permutation", "permutation")
_FLOOR = 1e-17  # a difference of exactly 0 has no logarithm


class Triple(Settings):
    """A way of training a small dense network on 16 features."""

    optimizer: Literal["sgd", "nesterov", "adam", "adamw", "adagrad", "rmsprop", "adafactor", "lbfgs"] = "sgd"
    extra: Literal["none", "clip-norm", "clip-value", "l1", "batchnorm", "layernorm"] = "none"
    model: Literal["dense", "conv"] = "dense"
    n: int = Field(default=64, ge=2)
    steps: int = Field(default=150, ge=1)
    draws: int = Field(default=3, ge=1)


def triple_cell(config: Triple, seed: int, context: Context) -> Outcome:
    """Size of the largest difference between the two coupled trainings, as a power of ten."""
    import math

    import torch
    from torch import nn

    from outlast.diagnose.equivariance import equivariance_test, train_with
    from outlast.studies._models import circular_conv

    stream = context.generator("data")
    x = torch.randn(config.n, 16, generator=stream)
    y = (x[:, 0] * x[:, 1] + 0.5 * x[:, 2] > 0.0).long()

    def build() -> nn.Module:
        if config.model == "conv":
            return circular_conv(16, 8, nn.ReLU())
        layers: list[nn.Module] = []
        if config.extra in ("batchnorm", "layernorm"):
            layers.append(nn.BatchNorm1d(16) if config.extra == "batchnorm" else nn.LayerNorm(16))
        first = nn.Linear(16, 32)
        nn.init.normal_(first.weight, std=0.25)
        return nn.Sequential(*layers, first, nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    optim = torch.optim
    make: Callable[[Any], torch.optim.Optimizer] = {
        "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
        "nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        "adam": lambda p: optim.Adam(p, lr=0.01),
        "adamw": lambda p: optim.AdamW(p, lr=0.01),
        "adagrad": lambda p: optim.Adagrad(p, lr=0.05),
        "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
        "adafactor": lambda p: optim.Adafactor(p, lr=0.01),
        "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=5),
    }[config.optimizer]
    train = train_with(
        make,
        loss=_logistic,
        steps=max(1, config.steps // 15) if config.optimizer == "lbfgs" else config.steps,
        clip_norm=0.1 if config.extra == "clip-norm" else None,
        clip_value=1e-3 if config.extra == "clip-value" else None,
        penalty=_l1 if config.extra == "l1" else None,
    )
    groups = (*_GROUPS, "shift")
    found = equivariance_test(build, train, x, y, groups=groups, draws=config.draws, generator=context.generator("test"))
    return Outcome({group: math.log10(max(_FLOOR, *found[group].r)) for group in groups})


def _l1(model: nn.Module) -> Tensor:
    import torch

    return 1e-3 * torch.stack([parameter.abs().sum() for parameter in model.parameters()]).sum()


# ---- extrapolation --------------------------------------------------------------------------------------------------------------


class Extrapolation(Settings):
    """A learning curve of clothes at 14x14 pixels whose end is predicted from its beginning."""

    variant: Literal["full", "small"] = "full"
    smallest: int = Field(default=125, ge=10)
    doublings: int = Field(default=8, ge=5)
    trainings: int = Field(default=3, ge=2)
    hidden: int = Field(default=64, ge=1)
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=1e-3, gt=0)


_LAWS: dict[str, tuple[Law, ...]] = {"chosen": ("power", "power_floor"), "power": ("power",), "power_floor": ("power_floor",)}


def extrapolation_cell(config: Extrapolation, seed: int, context: Context) -> Outcome:
    """Measure the curve, fit its law without the two largest sizes, and compare there."""
    import torch
    from torch.nn import functional as F

    from outlast._core._random import seeded
    from outlast.data import load
    from outlast.diagnose.equivariance import train_with
    from outlast.diagnose.sample_efficiency import fit_law, learning_curve
    from outlast.studies._models import accuracy, mlp

    train, test = (load("fashion-mnist", split, variant=config.variant) for split in ("train", "test"))
    images, test_images = (F.avg_pool2d(split.images.float() / 255.0, 2).flatten(1) for split in (train, test))
    mean, std = images.mean(), images.std()
    images, test_images = (images - mean) / std, (test_images - mean) / std
    trainer = train_with(
        lambda parameters: torch.optim.AdamW(parameters, lr=config.lr),
        loss=F.cross_entropy,
        steps=config.steps,
        batch_size=config.batch_size,
        schedule="cosine",
        seed=seed,
    )

    def errors(index: Tensor, seeds: list[int]) -> list[float]:
        models: list[nn.Module] = []
        for each in seeds:
            with seeded(each):
                models.append(mlp(images.shape[1], config.hidden, 10).to(context.fabric.device))
        trainer.batched(models, images[index], train.labels[index])
        device = context.fabric.device
        return [1.0 - accuracy(model, test_images.to(device), test.labels.to(device)) / 100.0 for model in models]

    sizes = [config.smallest * 2**power for power in range(config.doublings)]
    curve = learning_curve(errors, len(images), sizes=sizes, seeds=config.trainings, stratify=train.labels, batched=True, seed=seed)
    truth = curve.errors.mean(1).tolist()
    fit = {
        name: fit_law(sizes[:-2], curve.errors[:-2], laws=laws, test_size=len(test_images), generator=context.generator("bootstrap"))
        for name, laws in _LAWS.items()
    }
    predicted = {name: each.predict(sizes[-1]) for name, each in fit.items()}
    chosen = predicted["chosen"]
    inside = chosen.low <= truth[-1] and (chosen.high is None or truth[-1] <= chosen.high)
    return Outcome(
        {
            "error": 100.0 * truth[-1],
            "predicted": 100.0 * chosen.value,
            **{f"off_{name}": 100.0 * abs(each.value / truth[-1] - 1.0) for name, each in predicted.items()},
            "inside": 100.0 * inside,
        },
        {"sizes": [float(size) for size in sizes], "errors": [100.0 * value for value in truth]}
        | {f"law {name}": [100.0 * each.predict(size).value for size in sizes] for name, each in fit.items()},
    )


# ---- figures --------------------------------------------------------------------------------------------------------------------


def _needed(results: Results, arm: str) -> dict[int, float]:
    """Examples for the threshold by input size, geometric mean over seeds; sizes whose curve does not cross are left out."""
    import math

    by_seed = [dict(zip(*(results.series(arm, name, seed) for name in ("dims", "needed")), strict=True)) for seed in results.seeds]
    shared = [dim for dim in by_seed[0] if all(entry[dim] > 0.0 for entry in by_seed)]
    return {int(dim): math.exp(sum(math.log(entry[dim]) for entry in by_seed) / len(by_seed)) for dim in shared}


def _draw_dimension(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for arm, title in (("dense", "dense network, 75 %"), ("conv", "convolution, 90 %")):
        found = _needed(results, arm)
        axes.loglog(list(found), list(found.values()), marker="o", label=f"{title}: exponent {results.mean(arm, 'exponent'):.2f}")
    ticks = sorted({*_needed(results, "dense"), *_needed(results, "conv")})
    axes.set_xticks(ticks, [str(dim) for dim in ticks])
    axes.minorticks_off()
    axes.set_xlabel("input size D")
    axes.set_ylabel("examples")
    axes.legend()


def _describe_dimension(results: Results) -> str:
    parts = [
        f"{arm}: " + ", ".join(f"{needed:.0f} at D = {dim}" for dim, needed in _needed(results, arm).items()) for arm in ("dense", "conv")
    ]
    return "Examples for 75 % (dense) and 90 % accuracy (convolution) over the input size. " + "; ".join(parts) + "."


def _draw_images(figure: Any, results: Results) -> None:
    axes = figure.subplots(1, len(results.settings), squeeze=False, sharey=True)[0]
    for ax, setting in zip(axes, results.settings, strict=True):
        for arm, title in (("dense", "dense"), ("conv", "convolution")):
            ax.plot(_SIZES, [results.mean(arm, f"n{size}", setting) for size in _SIZES], marker="o", label=title)
        ax.set_xscale("log")
        ax.set_xticks(_SIZES, [f"{size:,}" for size in _SIZES])
        ax.minorticks_off()
        ax.set_title(setting)
        ax.set_xlabel("examples")
    axes[0].set_ylabel("accuracy, %")
    axes[0].legend()


def _describe_images(results: Results) -> str:
    parts = [
        f"{setting}, {arm}: " + ", ".join(f"{results.mean(arm, f'n{size}', setting):.0f} % with {size:,}" for size in _SIZES)
        for setting in results.settings
        for arm in ("dense", "conv")
    ]
    return "Accuracy over the number of examples. " + "; ".join(parts) + "."


def _draw_extrapolation(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    seed = results.seeds[0]
    sizes, errors = (results.series("mlp", name, seed) for name in ("sizes", "errors"))
    for name, title in (("power", "power law"), ("power_floor", "power law with a floor")):
        axes.plot(sizes, results.series("mlp", f"law {name}", seed), label=title)
    axes.plot(sizes[:-2], errors[:-2], "o", color="black", label="measured, fitted on")
    axes.plot(sizes[-2:], errors[-2:], "o", color="black", fillstyle="none", label="measured afterwards")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    ticks = [10, 15, 20, 30, 40]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("examples")
    axes.set_ylabel("error, %")
    axes.legend()


def _describe_extrapolation(results: Results) -> str:
    parts = [
        f"seed {seed}: predicted {results.value('mlp', 'predicted', seed):.1f} %, measured {results.value('mlp', 'error', seed):.1f} %"
        for seed in results.seeds
    ]
    return "Error at four times the largest number of examples that the law was fitted on. " + "; ".join(parts) + "."


# ---- declaration ----------------------------------------------------------------------------------------------------------------

_DENSE = Arm("dense", "dense network", "baseline")
_CONV = Arm("conv", "convolution", "method", {"model": "conv"})


def _decades_apart(results: Results, seed: int) -> float:
    import math

    return math.log10(results.value("dense", "needed", seed) / results.value("conv", "needed", seed))


_DIMENSION = Part(
    name="dimension",
    question="With which power of the input size does the number of examples grow?",
    settings_type=Dimension,
    cell=dimension_cell,
    arms=(
        Arm("dense", "dense network, for 75 %", "baseline"),
        Arm("conv", "convolution, for 90 %", "method", {"model": "conv", "threshold": 0.9}),
    ),
    metrics=(
        Metric("exponent", "Exponent", "", "lower", 2),
        Metric("low", "Lower end within a seed", "", None, 2),
        Metric("high", "Upper end within a seed", "", None, 2),
        Metric("needed", "Examples for 80 % at D = 32", "", "lower", 0),
    ),
    claims=(
        Claim(
            "dense-low",
            "The examples that a dense network needs grow at least with the power 1.6 of the input size",
            lambda results, seed: results.value("dense", "exponent", seed),
            1.6,
            digits=2,
        ),
        Claim(
            "dense-high",
            "The examples that a dense network needs grow at most with the power 2.4 of the input size (theory: 2)",
            lambda results, seed: results.value("dense", "exponent", seed),
            2.4,
            "at most",
            digits=2,
        ),
        Claim(
            "conv",
            "The examples that a convolution needs grow at most with the power 0.5 of the input size (theory: 0)",
            lambda results, seed: results.value("conv", "exponent", seed),
            0.5,
            "at most",
            digits=2,
        ),
        Claim(
            "ratio",
            "At 32 inputs the dense network needs at least 50 times the examples of the convolution (1.7 as a power of ten)",
            _decades_apart,
            1.7,
            digits=2,
        ),
    ),
    version=2,
    figures=(Figure("needed", "Examples that are needed over the size of the input", _describe_dimension, _draw_dimension),),
    scales={
        "quick": Scale(
            arms=("dense", "conv"),
            changes={"trainings": 8, "conv_steps": 200},
            dropped="dense networks of 24, 48, 64 and 96 inputs, convolutions of 16, half of their steps",
            minutes=0.5,
        ),
        "standard": Scale(
            arms=("dense", "conv"),
            changes={"dims": (8, 16, 24, 32, 48, 64, 96), "conv_dims": (8, 16, 32, 64)},
            minutes=10,
        ),
    },
)

_IMAGES = Part(
    name="images",
    question="Is a convolution ahead on images, too?",
    settings_type=Images,
    cell=images_cell,
    arms=(_DENSE, _CONV),
    metrics=(
        *(Metric(f"n{size}", f"Accuracy with {size:,}", "%", "higher") for size in _SIZES),
        Metric("largest", "With the largest set", "%", "higher"),
    ),
    claims=(
        Claim(
            "gaussian",
            "Telling which channel of a Gaussian image is longer, a convolution is at least 5 points ahead of a dense network with 64 to "
            "4,096 examples",
            _least_gap("gaussian"),
            5.0,
            unit="points",
        ),
        Claim(
            "natural",
            "Telling which channel of a photograph is longer, a convolution is at least 5 points ahead of a dense network with 64 to 4,096 "
            "examples",
            _least_gap("natural"),
            5.0,
            unit="points",
            scales=("standard", "paper"),
        ),
    ),
    figures=(Figure("accuracy", "Which channel is longer? Accuracy over examples", _describe_images, _draw_images),),
    scales={
        "quick": Scale(
            arms=("dense", "conv"),
            settings=(Setting("gaussian", "Gaussian images of 3x8x8"),),
            changes={"trainings": 1, "steps": 200},
            dropped="photographs, images of 3x16x16, the second training of a seed, half of the steps",
            minutes=0.2,
        ),
        "standard": Scale(
            arms=("dense", "conv"),
            settings=(
                Setting("gaussian", "Gaussian images of 3x8x8"),
                Setting("natural", "CIFAR-10 at 3x8x8, standardised", {"base": "cifar10"}),
                Setting("gaussian-16", "Gaussian images of 3x16x16", {"side": 16}),
            ),
            changes={"largest": 16384},
            data=(("cifar10", "full"),),
            minutes=8,
        ),
        "paper": Scale(
            arms=("dense", "conv"),
            settings=(
                Setting("gaussian", "Gaussian images of 3x32x32", {"side": 32}),
                Setting("natural", "CIFAR-10, standardised", {"side": 32, "base": "cifar10"}),
            ),
            changes={"largest": 48_000, "steps": 20_000},
            data=(("cifar10", "full"),),
            minutes=120,
            machine="estimated for one GPU",
        ),
    },
    deviations=("Learning rates, batches and steps are ours: the paper's text has none.",),
)

_TEXTURE = Part(
    name="texture",
    question="Is Adam blind to the order of features?",
    settings_type=Texture,
    cell=texture_cell,
    arms=(_DENSE, _CONV),
    metrics=(
        Metric("few", "Accuracy with 8", "%", "higher"),
        Metric("tenth", "With d / 10", "%", "higher"),
        Metric("half", "With d / 2", "%", "higher"),
        Metric("once", "With d", "%", "higher"),
        Metric("twice", "With 2 d", "%", "higher"),
    ),
    claims=(
        Claim(
            "dense",
            "Telling neighbouring features from features two apart (chance: 50 %), a dense network trained by Adam on d / 2 examples is "
            "right in at most 65 %",
            lambda results, seed: results.value("dense", "half", seed),
            65.0,
            "at most",
            "%",
        ),
        Claim(
            "conv",
            "Telling neighbouring features from features two apart (chance: 50 %), a convolution trained by Adam on 8 examples is right "
            "in at least 95 %",
            lambda results, seed: results.value("conv", "few", seed),
            95.0,
            unit="%",
        ),
    ),
    scales={
        "quick": Scale(
            arms=("dense", "conv"),
            settings=(Setting("d128", "128 features", {"dim": 128}),),
            changes={"trainings": 3},
            dropped="32, 64 and 256 features, two of five trainings of a seed",
            minutes=0.1,
        ),
        "standard": Scale(
            arms=("dense", "conv"),
            settings=tuple(Setting(f"d{dim}", f"{dim} features", {"dim": dim}) for dim in (256, 128, 64, 32)),
            minutes=2,
        ),
    },
)

_TRIPLES = (
    Arm("sgd", "SGD, momentum, weight decay", "method"),
    Arm("nesterov", "SGD, Nesterov", "ablation", {"optimizer": "nesterov"}),
    Arm("clip-norm", "SGD, gradient clipped by norm", "ablation", {"extra": "clip-norm"}),
    Arm("clip-value", "SGD, gradient clipped by value", "ablation", {"extra": "clip-value"}),
    Arm("l1", "SGD, L1 penalty", "ablation", {"extra": "l1"}),
    Arm("batchnorm", "SGD, BatchNorm on the input", "ablation", {"extra": "batchnorm"}),
    Arm("layernorm", "SGD, LayerNorm on the input", "ablation", {"extra": "layernorm"}),
    Arm("adam", "Adam", "method", {"optimizer": "adam"}),
    Arm("adamw", "AdamW", "ablation", {"optimizer": "adamw"}),
    Arm("adagrad", "Adagrad", "ablation", {"optimizer": "adagrad"}),
    Arm("rmsprop", "RMSprop", "ablation", {"optimizer": "rmsprop"}),
    Arm("adafactor", "Adafactor", "ablation", {"optimizer": "adafactor"}),
    Arm("lbfgs", "LBFGS", "ablation", {"optimizer": "lbfgs"}),
    Arm("conv", "circular convolution, SGD", "method", {"model": "conv"}),
)


def _decades(arm: str, group: str) -> Callable[[Results, int], float]:
    return lambda results, seed: results.value(arm, group, seed)


_EQUIVARIANCE = Part(
    name="equivariance",
    question="Which ways of training are blind to which transformations of the input?",
    settings_type=Triple,
    cell=triple_cell,
    arms=_TRIPLES,
    metrics=(
        Metric("orthogonal", "Rotations (log10 of the difference)", "", None, 1),
        Metric("signed_permutation", "Signed permutations", "", None, 1),
        Metric("permutation", "Permutations", "", None, 1),
        Metric("shift", "Shifts", "", None, 1),
    ),
    claims=(
        Claim(
            "sgd",
            "SGD on a dense network commutes with rotations: outputs of coupled trainings differ by at most 1e-10 standard deviations",
            _decades("sgd", "orthogonal"),
            -10.0,
            "at most",
        ),
        Claim(
            "adam",
            "Adam on a dense network does not commute with rotations: outputs differ by 0.01 standard deviations or more",
            _decades("adam", "orthogonal"),
            -2.0,
        ),
        Claim(
            "adam-order",
            "Adam on a dense network commutes with permutations: outputs of coupled trainings differ by at most 1e-10 standard deviations",
            _decades("adam", "permutation"),
            -10.0,
            "at most",
        ),
        Claim(
            "conv-shift",
            "SGD on a circular convolution commutes with shifts: outputs of the two trainings differ by at most 1e-10 standard deviations",
            _decades("conv", "shift"),
            -10.0,
            "at most",
        ),
        Claim(
            "conv-order",
            "SGD on a circular convolution does not commute with permutations: outputs differ by 0.01 standard deviations or more",
            _decades("conv", "permutation"),
            -2.0,
        ),
    ),
    scales={
        "quick": Scale(
            arms=("sgd", "layernorm", "adam", "conv"),
            changes={"draws": 1, "steps": 60},
            dropped="ten of fourteen ways of training, two of three draws, 90 of 150 steps",
            minutes=0.2,
        ),
        "standard": Scale(arms=tuple(arm.name for arm in _TRIPLES), minutes=2),
    },
)

_EXTRAPOLATION = Part(
    name="extrapolation",
    question="Does the law of a learning curve predict the error at four times the examples?",
    settings_type=Extrapolation,
    cell=extrapolation_cell,
    arms=(Arm("mlp", "MLP 196-64-10, AdamW", "method"),),
    metrics=(
        Metric("error", "Error, measured", "%", "lower"),
        Metric("predicted", "Predicted", "%", None),
        Metric("off_chosen", "Off by: the chosen law", "%", "lower"),
        Metric("off_power", "Power law", "%", "lower"),
        Metric("off_power_floor", "Power law with a floor", "%", "lower"),
        Metric("inside", "Inside the interval", "%", "higher", 0),
    ),
    claims=(
        Claim(
            "predicted",
            "The law that was chosen by extrapolation predicts the error of four times the examples within 10 %",
            lambda results, seed: results.value("mlp", "off_chosen", seed),
            10.0,
            "at most",
            "%",
        ),
    ),
    version=2,
    figures=(Figure("curve", "A learning curve and the laws fitted to its beginning", _describe_extrapolation, _draw_extrapolation),),
    scales={
        "quick": Scale(
            arms=("mlp",),
            changes={"variant": "small", "smallest": 62, "steps": 300, "batch_size": 64},
            data=(("fashion-mnist", "small"),),
            dropped="sizes beyond 7,936 images, 700 of 1,000 steps, half of each batch",
            minutes=0.2,
        ),
        "standard": Scale(arms=("mlp",), changes={"doublings": 9}, data=(("fashion-mnist", "full"),), minutes=2),
    },
)

STUDY = Study(
    name="sample-efficiency",
    title="Sample efficiency and equivariance",
    question="How many examples do dense and convolutional networks need, and can one tell beforehand?",
    paper="Z. Li, Zhang, Arora: Why Are Convolutional Nets More Sample-Efficient than Fully-Connected Nets? ICLR 2021",
    follows="Theorems 5.2 and 5.5, table 1 and figure 1; the extrapolation of learning curves is ours",
    theme="know your network and your data",
    parts=(_DIMENSION, _IMAGES, _TEXTURE, _EQUIVARIANCE, _EXTRAPOLATION),
    origin="outlast.studies.sample_efficiency:STUDY",
)
