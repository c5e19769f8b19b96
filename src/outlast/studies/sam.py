"""Study ``sam``: does a flat minimum resist wrong labels?

Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021: section 3.4 and table 4 (label noise), figure 3 (spectrum), figure 4 and
section 4.1 (m-sharpness).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results


class LabelNoise(Settings):
    """Configuration of the label-noise grid."""

    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    variant: Literal["full", "small"] = "full"
    train_size: int | None = Field(default=4000, ge=2)
    test_size: int | None = Field(default=None, ge=1)
    noise: float = Field(default=0.4, ge=0, le=1)
    model: Literal["mlp", "resnet32"] = "mlp"
    width: int = Field(default=256, ge=1)
    epochs: int = Field(default=40, ge=1)
    epoch_factor: int = Field(default=1, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    augment: bool = False
    rho: float = Field(default=0.0, ge=0)
    adaptive: bool = False
    m: int | None = Field(default=None, ge=1)
    spectrum_samples: int = Field(default=4000, ge=1)
    spectrum_iterations: int = Field(default=20, ge=1)
    evaluations: int = Field(default=40, ge=1)
    max_steps: int | None = Field(default=None, ge=1)


def cell(config: LabelNoise, seed: int, context: Context) -> Outcome:
    """Train on noisy labels, test on clean ones, measure the curvature at the end."""
    import torch.nn.functional as F

    from outlast.diagnose.sharpness import hessian_spectrum
    from outlast.studies._models import accuracy

    images, labels, test_images, test_labels = _data(config, context)
    noisy = _redraw(labels, config.noise, 10, context)
    device = context.fabric.device
    test_images, test_labels = test_images.to(device), test_labels.to(device)
    curve: list[float] = []
    epochs = config.epochs * config.epoch_factor
    every = max(1, epochs // config.evaluations)

    def evaluate(module: nn.Module, epoch: int) -> None:
        if (epoch + 1) % every == 0:
            curve.append(accuracy(module, test_images, test_labels))

    model = context.train(
        context.initialise(lambda: _build(config, images.shape[1:])),
        lambda module: _optimizer(config, module, sharded=context.sharded),
        images,
        noisy,
        loss_fn=F.cross_entropy,
        epochs=epochs,
        batch_size=config.batch_size,
        micro_batch=config.m,
        augment=_crop_and_flip if config.augment else None,
        after_epoch=evaluate,
        max_steps=config.max_steps,
    )
    bare = context.plain(model)
    images, noisy = images.to(device), noisy.to(device)
    sample = slice(0, config.spectrum_samples)
    spectrum = hessian_spectrum(
        bare,
        lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        list(zip(images[sample].split(2000), noisy[sample].split(2000), strict=True)),
        k=1,
        iters=config.spectrum_iterations,
        seed=seed,
        probes=2,
    )
    final = accuracy(bare, test_images, test_labels)
    metrics = {
        "final": final,
        "best": max([*curve, final]),
        "train": accuracy(bare, images, noisy),
        "lambda_max": float(spectrum.eigenvalues[0]),
    }
    return Outcome(metrics, {"test accuracy": curve})


def _data(config: LabelNoise, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    import torch

    from outlast.data import load, standardise

    train, test = (load(config.dataset, split, variant=config.variant) for split in ("train", "test"))
    floats = train.images.to(torch.float32) / 255.0
    mean, std = floats.mean((0, 2, 3)), floats.std((0, 2, 3))
    if config.train_size is not None and config.train_size > len(train):
        raise ValueError(f"train_size is {config.train_size}, but {config.dataset} ({config.variant}) has {len(train)} training images")
    index = torch.randperm(len(train), generator=context.generator("subset"))[: config.train_size]
    test_images, test_labels = test.images[: config.test_size], test.labels[: config.test_size]
    return standardise(train.images[index], mean, std), train.labels[index], standardise(test_images, mean, std), test_labels


def _redraw(labels: Tensor, noise: float, classes: int, context: Context) -> Tensor:
    """Symmetric noise: a fraction of labels is drawn anew, uniformly over all classes."""
    import torch

    stream = context.generator("label noise")
    chosen = torch.rand(len(labels), generator=stream) < noise
    drawn = torch.randint(0, classes, (len(labels),), generator=stream)
    return torch.where(chosen, drawn, labels)


def _build(config: LabelNoise, shape: torch.Size) -> nn.Module:
    from outlast.studies._models import CifarResNet, mlp

    if config.model == "resnet32":
        return CifarResNet(32)
    return mlp(shape.numel(), config.width, config.width, 10)


def _optimizer(config: LabelNoise, module: nn.Module, *, sharded: bool) -> torch.optim.Optimizer:
    from torch.optim import SGD

    from outlast.robust import SAM

    base = SGD(module.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    if config.rho == 0.0:
        return base
    return SAM(base, rho=config.rho, adaptive=config.adaptive, sync="global" if sharded else "local")


def _crop_and_flip(images: Tensor, stream: torch.Generator) -> Tensor:
    """Random crops after padding by 4, and horizontal flips: the basic augmentation of CIFAR."""
    import torch
    import torch.nn.functional as F

    n, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, n), generator=stream)
    flip = torch.rand(n, generator=stream) < 0.5
    rows = (top[:, None] + torch.arange(height))[:, None, :, None].to(images.device)
    columns = left[:, None] + torch.where(flip[:, None], torch.arange(width - 1, -1, -1), torch.arange(width))
    samples = torch.arange(n, device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[samples, channels, rows, columns[:, None, None, :].to(images.device)]


def _curvature_ratio(results: Results, seed: int) -> float:
    return results.value("sam-0.1", "lambda_max", seed) / results.value("sgd", "lambda_max", seed)


def _mean_curve(results: Results, arm: str) -> list[float]:
    curves = [
        results.series(arm, "test accuracy", seed) for seed in results.seeds if len(results.values(arm, "final")) == len(results.seeds)
    ]
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


_SHOWN = ("sgd", "sgd-2x", "sam-0.1", "sam-0.1-m32")


def _draw_curves(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for arm in (arm for arm in _SHOWN if results.has(arm)):
        curve = _mean_curve(results, arm)
        axes.plot([100.0 * (epoch + 1) / len(curve) for epoch in range(len(curve))], curve, label=_PART.arm(arm).title)
    axes.set_xlabel("training (% of its epochs)")
    axes.set_ylabel("accuracy on clean test images (%)")
    figure.legend(loc="outside upper center", ncols=2)


def _describe_curves(results: Results) -> str:
    parts: list[str] = []
    for arm in (arm for arm in _SHOWN if results.has(arm)):
        curve = _mean_curve(results, arm)
        if curve:
            parts.append(f"{_PART.arm(arm).title}: best {max(curve):.1f} %, at the end {curve[-1]:.1f} %")
    return "Clean test accuracy over training, mean over seeds. " + "; ".join(parts) + "."


def _draw_flatness(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for arm in (arm for arm in results.arms if results.has(arm)):
        axes.plot(results.values(arm, "lambda_max"), results.values(arm, "final"), "o", label=_PART.arm(arm).title)
    axes.set_xscale("log")
    axes.set_xlabel("largest eigenvalue of the Hessian of the training loss")
    axes.set_ylabel("accuracy on clean test images (%)")
    figure.legend(loc="outside upper center", ncols=2)


def _describe_flatness(results: Results) -> str:
    points: list[str] = []
    for arm in (arm for arm in results.arms if results.has(arm)):
        curvature, final = results.values(arm, "lambda_max"), results.values(arm, "final")
        means = sum(curvature) / len(curvature), sum(final) / len(final)
        points.append(f"{_PART.arm(arm).title}: eigenvalue {means[0]:.1f}, accuracy {means[1]:.1f} %")
    return "Each point is one training. " + "; ".join(points) + "."


_ARMS = (
    Arm("sgd", "SGD", "baseline"),
    Arm("sgd-2x", "SGD, twice the epochs (equal compute)", "baseline", {"epoch_factor": 2}),
    Arm("sam-0.05", "SAM, rho 0.05", "method", {"rho": 0.05}),
    Arm("sam-0.1", "SAM, rho 0.1", "method", {"rho": 0.1}),
    Arm("sam-0.2", "SAM, rho 0.2", "method", {"rho": 0.2}),
    Arm("sam-0.1-m32", "SAM, rho 0.1, m = 32", "ablation", {"rho": 0.1, "m": 32}),
    Arm("asam-0.5", "ASAM, rho 0.5", "ablation", {"rho": 0.5, "adaptive": True}),
    Arm("asam-1", "ASAM, rho 1", "ablation", {"rho": 1.0, "adaptive": True}),
    Arm("asam-2", "ASAM, rho 2", "ablation", {"rho": 2.0, "adaptive": True}),
)

_PART = Part(
    name="label-noise",
    question="With part of the training labels redrawn at random, how well does the network that training ends with classify clean images?",
    settings_type=LabelNoise,
    cell=cell,
    arms=_ARMS,
    metrics=(
        Metric("final", "Final accuracy", "%", "higher"),
        Metric("best", "Best epoch", "%", "higher"),
        Metric("train", "Training accuracy (noisy labels)", "%"),
        Metric("lambda_max", "Largest Hessian eigenvalue", "", "lower"),
    ),
    claims=(
        Claim(
            "accuracy",
            "At 40 % label noise SAM (rho 0.1) ends at least 7 points of clean accuracy above SGD",
            difference("sam-0.1", "sgd", "final"),
            7.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "equal-compute",
            "At 40 % label noise SAM (rho 0.1) ends at least 7 points above SGD with twice the epochs",
            difference("sam-0.1", "sgd-2x", "final"),
            7.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "curvature",
            "SAM (rho 0.1) ends where the largest Hessian eigenvalue is at most half of SGD's",
            _curvature_ratio,
            0.5,
            "at most",
            digits=2,
            scales=("quick", "standard"),
        ),
        Claim(
            "m-sharpness",
            "Perturbing for each 32 samples on their own ends at least 1 point above one perturbation for all 128",
            difference("sam-0.1-m32", "sam-0.1", "final"),
            1.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "paper-accuracy",
            "On CIFAR-10 with 40 % label noise SAM (rho 0.1) ends at least 15 points above SGD (24.6 in the paper)",
            difference("sam-0.1", "sgd", "final"),
            15.0,
            unit="points",
            scales=("paper",),
        ),
    ),
    figures=(
        Figure("curves", "SGD learns, then learns the wrong labels; SAM keeps what it learned", _describe_curves, _draw_curves),
        Figure("flatness", "The flatter the end, the better it classifies", _describe_flatness, _draw_flatness),
    ),
    deviations=(
        "Quick and standard scale train a small perceptron on at most 4,000 images of Fashion-MNIST; the paper a ResNet-32 on CIFAR-10.",
        "The paper prints no batch size, learning rate or weight decay for its label-noise table; the paper scale takes 128, 0.1, 5e-4.",
    ),
    scales={
        "quick": Scale(
            arms=("sgd", "sgd-2x", "sam-0.1", "sam-0.1-m32"),
            settings=(Setting("", "40 % of the labels redrawn"),),
            changes={"variant": "small", "train_size": 2000, "epochs": 30, "evaluations": 10, "spectrum_iterations": 12},
            data=(("fashion-mnist", "small"),),
            dropped="half of the training images, a quarter of the epochs, other radii, ASAM, other noise levels",
            minutes=1,
        ),
        "standard": Scale(
            arms=tuple(arm.name for arm in _ARMS),
            settings=(
                Setting("noise-0.4", "40 % of the labels redrawn", {"noise": 0.4}),
                Setting("clean", "clean labels", {"noise": 0.0}, ("sgd", "sam-0.05", "sam-0.1", "sam-0.2")),
                Setting("noise-0.6", "60 % of the labels redrawn", {"noise": 0.6}, ("sgd", "sgd-2x", "sam-0.1", "sam-0.2")),
            ),
            data=(("fashion-mnist", "full"),),
            minutes=10,
        ),
        "paper": Scale(
            arms=("sgd", "sgd-2x", "sam-0.05", "sam-0.1", "sam-0.2"),
            settings=tuple(
                Setting(f"noise-{noise}", f"{noise * 100:.0f} % of the labels redrawn", {"noise": noise}) for noise in (0.4, 0.2, 0.6, 0.8)
            ),
            changes={
                "dataset": "cifar10",
                "train_size": None,
                "model": "resnet32",
                "epochs": 200,
                "lr": 0.1,
                "augment": True,
                "spectrum_samples": 10000,
            },
            data=(("cifar10", "full"),),
            minutes=6000,
            machine="one GPU (estimated, not measured)",
            seeds=5,
        ),
    },
)

STUDY = Study(
    name="sam",
    title="Sharpness-aware minimisation",
    question="Does a flat minimum resist wrong labels?",
    paper="Foret, Kleiner, Mobahi, Neyshabur: Sharpness-Aware Minimization for Efficiently Improving Generalization. ICLR 2021",
    follows="Table 4 (label noise), figure 3 (spectrum), section 4.1 (m-sharpness)",
    theme="robust optimisation",
    parts=(_PART,),
    origin="outlast.studies.sam:STUDY",
)
