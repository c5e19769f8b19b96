"""Study ``startup``: does a teacher of other classes help to prepare features for a far domain?

Phoo, Hariharan, "Self-training for Few-shot Transfer Across Extreme Task Differences", ICLR 2021: its main table, with the
two controls that it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, ScaleName, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    from torch import Tensor, nn

    from outlast.fewshot import PseudoLabels
    from outlast.studies._context import Context
    from outlast.studies._results import Results

Method = Literal["transfer", "batchnorm", "no-ss", "startup", "simclr", "ce-simclr"]
_WEIGHTS = {"no-ss": (1.0, 1.0, 0.0), "startup": (1.0, 1.0, 1.0), "simclr": (0.0, 0.0, 1.0), "ce-simclr": (1.0, 0.0, 1.0)}


class Transfer(Settings):
    """One way from a source teacher to target features."""

    method: Method = "transfer"
    source: Literal["cifar100", "omniglot"] = "cifar100"
    target: Literal["fashion-mnist", "omniglot"] = "fashion-mnist"
    variant: Literal["full", "small"] = "full"
    source_classes: int = Field(default=64, ge=5)
    per_class: int = Field(default=220, ge=2)
    unlabelled: int = Field(default=6000, ge=2)
    held: int = Field(default=500, ge=20)
    width: int = Field(default=32, ge=1)
    teacher_epochs: int = Field(default=3, ge=1)
    student_epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=128, ge=2)
    student_lr: float = Field(default=0.05, gt=0)
    temperature: float = Field(default=0.5, gt=0)
    episodes: int = Field(default=600, ge=1)
    query: int = Field(default=15, ge=1)


def cell(config: Transfer, seed: int, context: Context) -> Outcome:
    """Prepare features in one way and classify episodes of the target with them."""
    from outlast.fewshot import evaluate_episodes
    from outlast.studies._fewshot import StandardisedLogistic, features_of

    source = ("source", config.source, config.variant, config.source_classes, config.per_class)
    images, labels = context.shared(source, lambda: _source(config))
    training = (*source, config.width, config.teacher_epochs, config.batch_size)
    teacher, hits = context.shared(("teacher", *training), lambda: _teacher(config, images, labels, context))
    unlabelled, held, classes = context.shared(
        ("target", config.target, config.variant, config.unlabelled, config.held), lambda: _target(config, context)
    )
    pseudo: PseudoLabels = context.shared(
        ("pseudo-labels", *training, config.target, config.unlabelled), lambda: _pseudo_labels(teacher, unlabelled)
    )
    backbone = _backbone(config, teacher, images, labels, unlabelled, pseudo, seed, context)
    features = features_of(backbone.cpu(), held, classes)
    one, five = (
        evaluate_episodes(StandardisedLogistic(), *features, shot=shot, query=config.query, episodes=config.episodes, seed=seed)
        for shot in (1, 5)
    )
    said = pseudo.summary()
    return Outcome(
        {
            "one": 100.0 * one.accuracy,
            "five": 100.0 * five.accuracy,
            "ci": 100.0 * one.ci95,
            "teacher": hits,
            "used": said.used_classes,
            "confidence": said.confidence,
        },
        {"1 shot": (100.0 * one.per_episode).tolist(), "5 shots": (100.0 * five.per_episode).tolist()},
    )


def _backbone(
    config: Transfer,
    teacher: nn.Sequential,
    images: Tensor,
    labels: Tensor,
    unlabelled: Tensor,
    pseudo: PseudoLabels,
    seed: int,
    context: Context,
) -> nn.Module:
    import copy

    from torch.utils.data import DataLoader, TensorDataset

    from outlast.adapt import recalibrate_batchnorm
    from outlast.data import Indexed
    from outlast.fewshot import StartupLoss, TwoViews, adapt_representation
    from outlast.studies._fewshot import affine, flip, jitter

    if config.method in ("transfer", "batchnorm"):
        backbone = copy.deepcopy(teacher[0])
        if config.method == "batchnorm":
            recalibrate_batchnorm(backbone, unlabelled.split(config.batch_size)[: len(unlabelled) // config.batch_size])
        return backbone

    def view(batch: Tensor) -> Tensor:
        moved = jitter(affine(batch, (0.55, 1.0), 15.0))
        return flip(moved) if config.target == "fashion-mnist" else moved

    weights = _WEIGHTS[config.method]
    found = adapt_representation(
        (teacher[0], teacher[1]),
        DataLoader(TensorDataset(images, labels), config.batch_size) if weights[0] else None,
        DataLoader(Indexed(TensorDataset(unlabelled)), config.batch_size, drop_last=True),
        epochs=config.student_epochs,
        loss=StartupLoss(config.temperature, weights),
        views=TwoViews(view),
        augment=lambda batch: affine(batch, (0.85, 1.1), 10.0),
        scheduler="cosine",
        lr=config.student_lr,
        validation=None,
        pseudo_labels=pseudo,
        fabric=context.fabric,
        seed=seed,
        callbacks=[lambda record: context.report(int(record["epoch"]), config.student_epochs, record["total"])],
    )
    return found.backbone


# ---- data and teacher ------------------------------------------------------------------------------------------------


def _source(config: Transfer) -> tuple[Tensor, Tensor]:
    """Grey 28x28 images in [0, 1] and their classes."""
    import torch
    import torch.nn.functional as F

    from outlast.data import load
    from outlast.studies._fewshot import cifar100, cifar100_classes

    if config.source == "omniglot":
        data = load("omniglot", variant="small")
        kept = data.labels < config.source_classes
        return data.images[kept].float() / 255.0, data.labels[kept]
    colour, labels = cifar100(cifar100_classes()[0][: config.source_classes], config.per_class)
    grey = (colour * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return F.interpolate(grey, size=(28, 28), mode="bilinear", antialias=True), labels


def _target(config: Transfer, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """Unlabelled images, and others with their classes for episodes."""
    import torch

    from outlast.data import load

    if config.target == "omniglot":
        data = load("omniglot", "test", variant="small")
        order = torch.stack([torch.randperm(20, generator=context.generator("drawings", number)) for number in range(659)])
        index = order + 20 * torch.arange(659)[:, None]
        images = data.images.float() / 255.0
        return images[index[:, :4].flatten()][: config.unlabelled], images[index[:, 4:].flatten()], data.labels[index[:, 4:].flatten()]
    data = load("fashion-mnist", variant=config.variant)
    chosen = torch.randperm(len(data), generator=context.generator("unlabelled"))[: config.unlabelled]
    test = load("fashion-mnist", "test", variant=config.variant)
    order = torch.randperm(len(test), generator=context.generator("held"))
    held = torch.cat([order[test.labels[order] == name][: config.held] for name in range(10)])
    return data.images[chosen].float() / 255.0, test.images[held].float() / 255.0, test.labels[held]


def _teacher(config: Transfer, images: Tensor, labels: Tensor, context: Context) -> tuple[nn.Sequential, float]:
    from outlast.studies._fewshot import train_classifier
    from outlast.studies._models import accuracy

    model = train_classifier(
        context,
        images,
        labels,
        width=config.width,
        epochs=config.teacher_epochs,
        batch_size=config.batch_size,
        max_lr=0.1,
        mirror=config.source == "cifar100",
    )
    return model, accuracy(model, images, labels)


def _pseudo_labels(teacher: nn.Module, unlabelled: Tensor) -> PseudoLabels:
    import warnings

    from outlast.errors import OutlastWarning
    from outlast.fewshot import pseudo_label

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)  # of a collapsed teacher: the metrics "used" and "confidence" say it
        return pseudo_label(teacher, unlabelled.split(500), ids=range(len(unlabelled)))


# ---- declarations ------------------------------------------------------------------------------------------------------


def _draw(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    arms = [arm for arm in results.arms if results.has(arm)]
    for place, (metric, title) in enumerate((("one", "1 shot"), ("five", "5 shots"))):
        means = [sum(results.values(arm, metric)) / len(results.values(arm, metric)) for arm in arms]
        axes.barh([number + 0.4 * place for number in range(len(arms))], means, 0.4, label=title)
    axes.set_yticks([number + 0.2 for number in range(len(arms))], [_TITLES[arm] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy of 5-way episodes (%)")
    figure.legend(loc="outside lower center", ncols=2)


def _describe(results: Results) -> str:
    parts: list[str] = []
    for arm in (arm for arm in results.arms if results.has(arm)):
        one, five = (results.values(arm, metric) for metric in ("one", "five"))
        parts.append(f"{_TITLES[arm]} {sum(one) / len(one):.1f} and {sum(five) / len(five):.1f}")
    return "Accuracy in per cent with 1 and 5 labels a class, mean over seeds. " + "; ".join(parts) + "."


_ARMS = (
    Arm("transfer", "Transfer", "baseline"),
    Arm("batchnorm", "Transfer, BatchNorm statistics of the target", "baseline", {"method": "batchnorm"}),
    Arm("simclr", "SimCLR from the teacher", "baseline", {"method": "simclr"}),
    Arm("ce-simclr", "Source labels and SimCLR", "ablation", {"method": "ce-simclr"}),
    Arm("no-ss", "STARTUP without the contrast", "ablation", {"method": "no-ss"}),
    Arm("startup", "STARTUP", "method", {"method": "startup"}),
)
_TITLES = {arm.name: arm.title for arm in _ARMS}
_METRICS = (
    Metric("one", "1 shot", "%", "higher"),
    Metric("five", "5 shots", "%", "higher"),
    Metric("ci", "Half-width over episodes, 1 shot", "points", digits=2),
    Metric("teacher", "Teacher's training accuracy", "%"),
    Metric("used", "Classes that the teacher uses"),
    Metric("confidence", "Its mean confidence", digits=2),
)
_CLAIMS = (
    Claim("transfer", "STARTUP is above transfer with 1 label a class", difference("startup", "transfer", "one"), 0.0, unit="points"),
    Claim(
        "batchnorm",
        "STARTUP is above transfer with BatchNorm statistics of the target, which cost nothing, with 1 label a class",
        difference("startup", "batchnorm", "one"),
        0.0,
        unit="points",
    ),
    Claim(
        "five",
        "STARTUP is above transfer with BatchNorm statistics of the target with 5 labels a class",
        difference("startup", "batchnorm", "five"),
        0.0,
        unit="points",
    ),
    Claim(
        "contrast",
        "STARTUP is above SimCLR from the same teacher with 1 label a class",
        difference("startup", "simclr", "one"),
        0.0,
        unit="points",
    ),
)
_ALL = tuple(arm.name for arm in _ARMS)
_DEVIATIONS = (
    "The paper trains ResNets for 1,000 epochs and tests on satellite, disease, skin and X-ray images; here four convolutions, minutes.",
    "An independent re-run of the paper finds STARTUP and SimCLR from the same teacher within noise of each other.",
    "Features of an episode are centred and scaled by its supports, then classified by logistic regression; the paper's layer is SGD's.",
)


def _part(name: str, question: str, scales: Mapping[ScaleName, Scale]) -> Part:
    return Part(
        name=name,
        question=question,
        settings_type=Transfer,
        cell=cell,
        version=2,
        arms=_ARMS,
        metrics=_METRICS,
        claims=_CLAIMS,
        figures=(Figure("rows", "What unlabelled target images give", _describe, _draw),),
        deviations=_DEVIATIONS,
        scales=scales,
    )


_CLOTHING = _part(
    "clothing",
    "From photographs (quick: characters) to silhouettes of clothing: which use of unlabelled images helps most?",
    {
        "quick": Scale(
            arms=("transfer", "batchnorm", "simclr", "startup"),
            changes={
                "source": "omniglot",
                "variant": "small",
                "source_classes": 200,
                "unlabelled": 2560,
                "width": 16,
                "teacher_epochs": 8,
                "episodes": 300,
            },
            data=(("omniglot", "small"), ("fashion-mnist", "small")),
            dropped="photographs as source (Omniglot stands in), two ablations; half of the channels, images, student's steps and episodes",
            minutes=1.5,
        ),
        "standard": Scale(arms=_ALL, data=(("cifar100", "full"), ("fashion-mnist", "full")), minutes=10),
    },
)
_CHARACTERS = _part(
    "characters",
    "From photographs to handwritten characters: which use of four unlabelled drawings of each helps most?",
    {
        "standard": Scale(
            arms=_ALL,
            changes={"target": "omniglot", "unlabelled": 2636, "student_epochs": 7, "query": 10},
            data=(("cifar100", "full"), ("omniglot", "small")),
            minutes=10,
        ),
    },
)

STUDY = Study(
    name="startup",
    title="STARTUP",
    question="Does a teacher of other classes help to prepare features for a far domain?",
    paper="Phoo, Hariharan: Self-training for Few-shot Transfer Across Extreme Task Differences. ICLR 2021",
    follows="The main table (1 and 5 shots), with transfer and re-estimated BatchNorm statistics as controls",
    theme="few labels",
    parts=(_CLOTHING, _CHARACTERS),
    origin="outlast.studies.startup:STUDY",
)
