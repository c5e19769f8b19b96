"""Study ``mixup``: what does training on mixtures of images change?

Zhang, Deng, Kawaguchi, Ghorbani, Zou, "How Does Mixup Help With Robustness and Generalization?", ICLR 2021: figures 1 (attacks
by the gradient's sign) and 5 to 8 (gap between training and test loss).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    import torch
    from torch import nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

_EPS = (2, 4, 8, 16)


class Training(Settings):
    """One way to train on Fashion-MNIST."""

    dataset: Literal["fashion-mnist", "mnist", "cifar10"] = "fashion-mnist"
    variant: Literal["full", "small"] = "full"
    transform: Literal["none", "mixup", "cutmix"] = "none"
    labels: Literal["soft", "hard"] = "soft"
    alpha: float = Field(default=1.0, gt=0)
    per_sample: bool = False
    train_size: int = Field(default=4000, ge=2)
    attacked: int = Field(default=2000, ge=1)
    epochs: int = Field(default=25, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.05, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)


def cell(config: Training, seed: int, context: Context) -> Outcome:
    """Train in one way, then measure on clean and on attacked images."""
    import torch
    import torch.nn.functional as F
    from torch.optim import SGD

    from outlast.data import load
    from outlast.diagnose.robustness import fgsm_curve, generalization_gap
    from outlast.robust import CutMix, MixUp

    train, test = (load(config.dataset, split, variant=config.variant) for split in ("train", "test"))
    if config.train_size > len(train):
        raise ValueError(f"train_size is {config.train_size}, but {config.dataset} ({config.variant}) has {len(train)} training images")
    index = torch.randperm(len(train), generator=context.generator("subset"))[: config.train_size]
    images, labels = train.images[index].float() / 255.0, train.labels[index]
    test_images, test_labels = test.images.float() / 255.0, test.labels
    mix: Any = None
    if config.transform != "none":
        kind = MixUp if config.transform == "mixup" else CutMix
        mix = kind(config.alpha, num_classes=10, labels=config.labels, per_sample=config.per_sample, generator=context.generator("mixing"))
    model = context.plain(
        context.train(
            context.initialise(lambda: _network(images)),
            lambda module: SGD(module.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay),
            images,
            labels,
            loss_fn=F.cross_entropy,
            epochs=config.epochs,
            batch_size=config.batch_size,
            mix=mix,
        )
    )

    def batches(x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(x.split(1000), y.split(1000), strict=True))

    gap = generalization_gap(model, batches(images, labels), batches(test_images, test_labels))
    attacked = batches(test_images[: config.attacked], test_labels[: config.attacked])
    curve = fgsm_curve(model, attacked, [eps / 255.0 for eps in _EPS], clip=(0.0, 1.0))
    return Outcome(
        {
            "accuracy": 100.0 * gap.acc_test,
            "test_loss": gap.test,
            "train_loss": gap.train,
            "gap": gap.gap,
            **{f"fgsm{eps}": 100.0 * value for eps, value in zip(_EPS, curve.accuracy, strict=True)},
        }
    )


def _network(images: torch.Tensor) -> nn.Module:
    from torch import nn

    from outlast.studies._models import Standardised

    channels, side = images.shape[1:3]
    width = 32 * (((side + 1) // 2 + 1) // 2) ** 2
    return nn.Sequential(
        Standardised(images.mean((0, 2, 3)), images.std((0, 2, 3))),  # inside, so that attacks are in units of pixels
        nn.Conv2d(channels, 16, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, 2, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _spread(results: Results, seed: int) -> float:
    values = [results.value(arm, "accuracy", seed) for arm in ("mixup", "mixup-sample", "mixup-hard")]
    return max(values) - min(values)


def _gap_ratio(results: Results, seed: int) -> float:
    return results.value("mixup", "gap", seed) / results.value("erm", "gap", seed)


def _draw_attacks(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    for arm in (arm for arm in results.arms if results.has(arm)):
        axes.plot(_EPS, [results.mean(arm, f"fgsm{eps}") for eps in _EPS], marker="o", label=_PART.arm(arm).title)
    axes.set_xlabel("size of the attack (of 255)")
    axes.set_ylabel("accuracy under FGSM (%)")
    axes.legend()


def _describe_attacks(results: Results) -> str:
    parts: list[str] = []
    for arm in (arm for arm in results.arms if results.has(arm)):
        values = ", ".join(f"{results.mean(arm, f'fgsm{eps}'):.1f} % at {eps}/255" for eps in _EPS)
        parts.append(f"{_PART.arm(arm).title}: {values}")
    return "Accuracy under FGSM, mean over seeds. " + "; ".join(parts) + "."


_PART = Part(
    name="images",
    question="What does mixup change in accuracy, loss, and under attacks by the gradient's sign?",
    settings_type=Training,
    cell=cell,
    arms=(
        Arm("erm", "plain training", "baseline"),
        Arm("mixup", "mixup, one weight a batch", "method", {"transform": "mixup"}),
        Arm("mixup-sample", "mixup, one weight a sample", "method", {"transform": "mixup", "per_sample": True}),
        Arm("mixup-hard", "mixup, labels kept", "method", {"transform": "mixup", "labels": "hard"}),
        Arm(
            "mixup-hard-sample",
            "mixup, labels kept, one weight a sample",
            "ablation",
            {"transform": "mixup", "labels": "hard", "per_sample": True},
        ),
        Arm("mixup-0.2", "mixup, alpha 0.2", "ablation", {"transform": "mixup", "alpha": 0.2}),
        Arm("cutmix", "CutMix", "ablation", {"transform": "cutmix"}),
    ),
    metrics=(
        Metric("accuracy", "Test accuracy", "%", "higher"),
        Metric("test_loss", "Test loss", "", "lower", 3),
        Metric("train_loss", "Loss on clean training images", "", None, 3),
        Metric("gap", "Gap of the losses", "", "lower", 3),
        *(Metric(f"fgsm{eps}", f"FGSM {eps}/255", "%", "higher") for eps in _EPS),
    ),
    claims=(
        Claim(
            "accuracy",
            "Mixup is at least half a point more accurate than plain training",
            difference("mixup", "erm", "accuracy"),
            0.5,
            unit="points",
        ),
        Claim(
            "gap", "Mixup's gap between test and training loss is at most half of plain training's", _gap_ratio, 0.5, "at most", digits=2
        ),
        Claim(
            "attack",
            "At FGSM 4/255 mixup is at least 2 points above plain training",
            difference("mixup", "erm", "fgsm4"),
            2.0,
            unit="points",
        ),
        Claim(
            "large-attack",
            "At FGSM 16/255 mixup is no better than plain training: it is no defence",
            difference("mixup", "erm", "fgsm16"),
            0.0,
            "at most",
            unit="points",
        ),
        Claim(
            "forms",
            "The three forms are within half a point of each other in accuracy",
            _spread,
            0.5,
            "at most",
            unit="points",
        ),
    ),
    figures=(Figure("attacks", "Accuracy against the size of the attack", _describe_attacks, _draw_attacks),),
    deviations=(
        "A small network on 4,000 images of Fashion-MNIST; the paper's wide networks on SVHN and CIFAR do not fit: no paper scale.",
        "The paper prints figures, no tables; its alpha is not known to us, the study takes 1.",
    ),
    scales={
        "quick": Scale(
            arms=("erm", "mixup", "mixup-sample", "mixup-hard"),
            changes={"variant": "small", "train_size": 3000, "epochs": 20},
            data=(("fashion-mnist", "small"),),
            dropped="1,000 images, 5 epochs, 2 seeds; alpha 0.2, one weight a sample with labels kept, CutMix",
            minutes=1,
        ),
        "standard": Scale(
            arms=("erm", "mixup", "mixup-sample", "mixup-hard", "mixup-hard-sample", "mixup-0.2", "cutmix"),
            data=(("fashion-mnist", "full"),),
            minutes=6,
            seeds=5,
        ),
    },
)

STUDY = Study(
    name="mixup",
    title="Mixup",
    question="What does training on mixtures of images change?",
    paper="Zhang, Deng, Kawaguchi, Ghorbani, Zou: How Does Mixup Help With Robustness and Generalization? ICLR 2021",
    follows="Figure 1 (FGSM), figures 5 to 8 (gap of the losses)",
    theme="robust optimisation",
    parts=(_PART,),
    origin="outlast.studies.mixup:STUDY",
)
