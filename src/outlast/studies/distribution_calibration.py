"""Study ``distribution-calibration``: where do borrowed class statistics help a classifier with one label a class?

Yang, Liu, Xu, "Free Lunch for Few-shot Learning: Distribution Calibration", ICLR 2021: its table 2, on data where its
assumptions hold, on data where they do not, and on features of small networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    from torch import Tensor

    from outlast.studies._context import Context
    from outlast.studies._results import Results

Features = tuple["Tensor", "Tensor", "Tensor", "Tensor"]
"""Base features and labels, novel features and labels."""


class Episodes(Settings):
    """A classifier on episodes of novel classes."""

    classifier: Literal["logistic", "nearest", "calibration", "tuned"] = "logistic"
    tukey: float = 1.0
    normalize: Literal["l2"] | None = None
    k: int = Field(default=2, ge=0)
    base_tukey: bool = False
    head: Literal["logistic", "lda"] = "logistic"
    pool_support: bool = False
    n_samples: int = Field(default=100, ge=0)
    shot: int = Field(default=1, ge=1)
    way: int = Field(default=5, ge=2)
    episodes: int = Field(default=200, ge=1)
    tune_episodes: int = Field(default=200, ge=1)


class Synthetic(Episodes):
    """Gaussian classes in families that share their covariance."""

    related: bool = True
    n_samples: int = Field(default=200, ge=0)
    episodes: int = Field(default=300, ge=1)
    dim: int = Field(default=32, ge=8)
    families: int = Field(default=16, ge=2)
    base_classes: int = Field(default=128, ge=16)
    novel_classes: int = Field(default=64, ge=5)


class Photographs(Episodes):
    """CIFAR-100: 64 base and 20 novel classes."""

    per_class: int = Field(default=220, ge=2)
    epochs: int = Field(default=6, ge=1)
    width: int = Field(default=32, ge=1)


class Characters(Episodes):
    """Omniglot: 964 base and 659 novel characters."""

    base_classes: int = Field(default=964, ge=16)
    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(default=64, ge=2)
    width: int = Field(default=16, ge=1)
    n_samples: int = Field(default=60, ge=0)
    episodes: int = Field(default=150, ge=1)


def synthetic_cell(config: Synthetic, seed: int, context: Context) -> Outcome:
    """A classifier on Gaussian classes."""
    key = ("gaussians", config.related, config.dim, config.families, config.base_classes, config.novel_classes)
    return _measure(config, context.shared(key, lambda: _gaussians(config, context)), seed)


def photographs_cell(config: Photographs, seed: int, context: Context) -> Outcome:
    """A classifier on features of a network trained on the base classes of CIFAR-100."""
    key = ("photographs", config.per_class, config.epochs, config.width)
    features, hits = context.shared(key, lambda: _photographs(config, context))
    return _measure(config, features, seed, hits)


def characters_cell(config: Characters, seed: int, context: Context) -> Outcome:
    """The same on Omniglot."""
    key = ("characters", config.base_classes, config.epochs, config.batch_size, config.width)
    features, hits = context.shared(key, lambda: _characters(config, context))
    return _measure(config, features, seed, hits)


def _measure(config: Episodes, features: Features, seed: int, hits: float | None = None) -> Outcome:
    import warnings

    from outlast.errors import OutlastWarning
    from outlast.fewshot import evaluate_episodes

    base_rows, base_labels, rows, labels = features
    estimator, calibrated = _estimator(config, base_rows, base_labels, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OutlastWarning)  # of mixed spaces: what the study is about
        found = evaluate_episodes(
            estimator, rows, labels, way=config.way, shot=config.shot, query=15, episodes=config.episodes, seed=seed, batch_size=50
        )
    return Outcome(
        {
            "accuracy": 100.0 * found.accuracy,
            "ci": 100.0 * found.ci95,
            "calibrated": calibrated,
            **({} if hits is None else {"network": hits}),
        },
        {"episodes": (100.0 * found.per_episode).tolist()},
    )


def _estimator(config: Episodes, base_rows: Tensor, base_labels: Tensor, seed: int) -> tuple[Any, float]:
    """The classifier, and whether it calibrates."""
    from outlast.fewshot import BaseStatistics, DistributionCalibration, LogisticClassifier, NearestMean, tune_calibration

    if config.classifier == "logistic":
        return LogisticClassifier(tukey=config.tukey, normalize=config.normalize), 0.0
    if config.classifier == "nearest":
        return NearestMean(tukey=config.tukey, normalize=config.normalize), 0.0
    settings: dict[str, Any] = {
        "tukey": config.tukey,
        "k": config.k,
        "base_tukey": config.base_tukey,
        "head": config.head,
        "pool_support": config.pool_support,
        "n_samples": config.n_samples,
    }
    if config.classifier == "tuned":
        found = tune_calibration(
            base_rows,
            base_labels,
            way=config.way,
            shot=config.shot,
            query=15,
            n_samples=config.n_samples,
            episodes=config.tune_episodes,
            seed=seed,
        )
        settings = found.settings
    if settings.get("n_samples") == 0 and settings.get("head", "logistic") == "logistic":
        return DistributionCalibration(random_state=seed, **settings), 0.0
    bent = settings["tukey"] if settings.get("base_tukey") else None
    base = BaseStatistics.from_features(base_rows, base_labels, tukey=bent, negative=settings.get("negative", "raise"))
    return DistributionCalibration(base, random_state=seed, **settings), 1.0


# ---- data --------------------------------------------------------------------------------------------------------------


def _gaussians(config: Synthetic, context: Context) -> Features:
    """Families with a mean and 6 wide axes; base and novel classes lie near their family's mean.

    With ``related=False`` the base classes have means and axes of their own.
    """
    import torch

    stream = context.generator("gaussians")
    dim = config.dim

    def factor() -> Tensor:
        scales = torch.full((dim,), 0.35)
        scales[:6] = 2.0
        return torch.linalg.qr(torch.randn(dim, dim, generator=stream)).Q * scales

    means = 1.5 * torch.randn(config.families, dim, generator=stream)
    factors = torch.stack([factor() for _ in range(config.families)])

    def draw(classes: int, each: int, *, own: bool = False) -> tuple[Tensor, Tensor]:
        family = torch.arange(classes) % config.families
        centres = (1.5 * torch.randn(classes, dim, generator=stream) if own else means[family]) + 0.5 * torch.randn(
            classes, dim, generator=stream
        )
        axes = torch.stack([factor() for _ in range(classes)]) if own else factors[family]
        rows = centres[:, None] + torch.randn(classes, each, dim, generator=stream) @ axes.mT
        return rows.flatten(0, 1), torch.arange(classes).repeat_interleave(each)

    novel = draw(config.novel_classes, 40)
    return *draw(config.base_classes, 200, own=not config.related), *novel


def _photographs(config: Photographs, context: Context) -> tuple[Features, float]:
    from outlast.studies._fewshot import cifar100, cifar100_classes, features_of, train_classifier
    from outlast.studies._models import accuracy

    base, _, novel = cifar100_classes()
    images, labels = cifar100(base, config.per_class, splits=("train", "test"))
    model = train_classifier(context, images, labels, width=config.width, epochs=config.epochs, batch_size=128, max_lr=0.1, mirror=True)
    found = features_of(model[0], *cifar100(novel, 600, splits=("train", "test")))
    return (*features_of(model[0], images, labels), *found), accuracy(model, images, labels)


def _characters(config: Characters, context: Context) -> tuple[Features, float]:
    from outlast.data import load
    from outlast.studies._fewshot import features_of, train_classifier
    from outlast.studies._models import accuracy

    data, novel = load("omniglot", variant="small"), load("omniglot", "test", variant="small")
    kept = data.labels < config.base_classes
    images, labels = data.images[kept].float() / 255.0, data.labels[kept]
    model = train_classifier(
        context, images, labels, width=config.width, epochs=config.epochs, batch_size=config.batch_size, max_lr=0.1, mirror=False
    )
    found = features_of(model[0], novel.images.float() / 255.0, novel.labels)
    return (*features_of(model[0], images, labels), *found), accuracy(model, images, labels)


# ---- claims and figures ------------------------------------------------------------------------------------------------

_PLAIN = ("logistic", "tukey", "l2", "tukey-l2", "nearest", "nearest-l2")


def _over_best(arm: str, setting: str | None = None) -> Callable[[Results, int], float]:
    """How far an arm is above the best of the plain classifiers of that seed: they were picked on these very episodes."""

    def measured(results: Results, seed: int) -> float:
        results.need_all()
        plain = [results.value(name, "accuracy", seed, setting) for name in _PLAIN if results.has(name, setting)]
        return results.value(arm, "accuracy", seed, setting) - max(plain)

    return measured


def _figure(arms: Callable[[], Sequence[Arm]]) -> Figure:
    def rows(results: Results) -> list[tuple[str, list[float]]]:
        found: list[tuple[str, list[float]]] = []
        for arm in arms():
            values = [results.values(arm.name, "accuracy", setting) for setting in results.settings]
            if any(values):
                found.append((arm.title, [sum(v) / len(v) if v else float("nan") for v in values]))
        return found

    def draw(figure: Any, results: Results) -> None:
        axes = figure.subplots()
        shown = rows(results)
        height = 0.8 / max(1, len(results.settings))
        for place, setting in enumerate(results.settings):
            axes.barh(
                [number + place * height for number in range(len(shown))], [means[place] for _, means in shown], height, label=setting
            )
        axes.set_yticks([number + 0.4 for number in range(len(shown))], [title for title, _ in shown])
        lowest = min(value for _, means in shown for value in means if value == value)
        axes.set_xlim(left=max(0.0, lowest - 5.0))
        axes.invert_yaxis()
        axes.set_xlabel("accuracy of episodes (%)")
        figure.legend(loc="outside lower center", ncols=3)

    def describe(results: Results) -> str:
        parts = [
            f"{title}: "
            + ", ".join(f"{setting} {value:.1f}" for setting, value in zip(results.settings, means, strict=True) if value == value)
            for title, means in rows(results)
        ]
        return "Accuracy in per cent, mean over seeds. " + "; ".join(parts) + "."

    return Figure("accuracy", "Accuracy by classifier", describe, draw)


_LOGISTIC = Arm("logistic", "Logistic regression", "baseline")
_NEAREST = Arm("nearest", "Nearest mean", "baseline", {"classifier": "nearest"})
_TUNED = Arm("tuned", "What tune_calibration chooses from base classes", "method", {"classifier": "tuned"})
_TRANSFORMED = (
    Arm("tukey", "Logistic regression, Tukey", "baseline", {"tukey": 0.5}),
    Arm("l2", "Logistic regression, L2", "baseline", {"normalize": "l2"}),
    Arm("tukey-l2", "Logistic regression, Tukey and L2", "baseline", {"tukey": 0.5, "normalize": "l2"}),
)
_DC = {"classifier": "calibration"}
_ON_FEATURES = (
    _LOGISTIC,
    *_TRANSFORMED,
    _NEAREST,
    Arm("nearest-l2", "Nearest mean, L2", "baseline", {"classifier": "nearest", "normalize": "l2"}),
    Arm("official", "Distribution calibration, official", "method", {**_DC, "tukey": 0.5}),
    Arm("base-tukey", "The same, base classes transformed too", "ablation", {**_DC, "tukey": 0.5, "base_tukey": True}),
    Arm("no-tukey", "The same without any transform", "ablation", _DC),
    Arm("pooled", "Base classes transformed, supports pooled", "ablation", {**_DC, "tukey": 0.5, "base_tukey": True, "pool_support": True}),
    Arm("lda", "LDA head, base classes transformed", "ablation", {**_DC, "tukey": 0.5, "base_tukey": True, "head": "lda"}),
    _TUNED,
)
_ON_GAUSSIANS = (
    _LOGISTIC,
    _NEAREST,
    Arm("dc-1", "Distribution calibration, k = 1", "ablation", {**_DC, "k": 1}),
    Arm("dc-2", "Distribution calibration, k = 2", "method", _DC),
    Arm("dc-4", "Distribution calibration, k = 4", "ablation", {**_DC, "k": 4}),
    Arm("lda", "The same with an LDA head, k = 2", "ablation", {**_DC, "head": "lda"}),
    _TUNED,
)
_METRICS = (
    Metric("accuracy", "Accuracy", "%", "higher"),
    Metric("ci", "Half-width over episodes", "points", digits=2),
    Metric("calibrated", "Calibrates", digits=1),
)
_FEATURE_METRICS = (*_METRICS, Metric("network", "Network's training accuracy", "%"))

_SYNTHETIC = Part(
    name="synthetic",
    question="Classes in families with a common covariance, as the method assumes: what does it give, and what with foreign base classes?",
    settings_type=Synthetic,
    cell=synthetic_cell,
    arms=_ON_GAUSSIANS,
    metrics=_METRICS,
    claims=(
        Claim(
            "gain",
            "With 1 label a class calibration (k = 2) is at least 3 points above the better of logistic regression and nearest mean",
            _over_best("dc-2", "related-1"),
            3.0,
            unit="points",
        ),
        Claim(
            "gain-5",
            "With 5 labels it is above logistic regression",
            difference("dc-2", "logistic", "accuracy", "related-5"),
            0.0,
            unit="points",
        ),
        Claim(
            "unrelated",
            "With unrelated base classes it is below logistic regression",
            difference("dc-2", "logistic", "accuracy", "unrelated-1"),
            0.0,
            "at most",
            unit="points",
        ),
        Claim(
            "tuned",
            "tune_calibration finds the gain: with 1 label at least 3 points above the better baseline",
            _over_best("tuned", "related-1"),
            3.0,
            unit="points",
        ),
    ),
    figures=(_figure(lambda: _ON_GAUSSIANS),),
    deviations=("The paper has no synthetic experiment; this one is where its assumptions hold by construction.",),
    scales={
        "quick": Scale(
            arms=("logistic", "nearest", "dc-2", "lda", "tuned"),
            settings=(
                Setting("related-1", "base classes of the same families, 1 label a class"),
                Setting("related-5", "the same, 5 labels", {"shot": 5}, ("logistic", "nearest", "dc-2", "lda")),
                Setting("unrelated-1", "foreign base classes, 1 label", {"related": False}, ("logistic", "nearest", "dc-2")),
            ),
            changes={"episodes": 150, "n_samples": 100, "tune_episodes": 60},
            dropped="k of 1 and 4, half of the episodes and of the samples",
            minutes=0.5,
        ),
        "standard": Scale(
            arms=tuple(arm.name for arm in _ON_GAUSSIANS),
            settings=(
                Setting("related-1", "base classes of the same families, 1 label a class"),
                Setting("related-5", "the same, 5 labels", {"shot": 5}),
                Setting("unrelated-1", "foreign base classes, 1 label", {"related": False}),
            ),
            minutes=3,
        ),
    },
)

_LOSES = Claim(
    "official",
    "The official form is below plain logistic regression with 1 label a class",
    difference("official", "logistic", "accuracy", "shot-1"),
    0.0,
    "at most",
    unit="points",
)
_SAFE = Claim(
    "tuned",
    "What tune_calibration chooses from base classes alone loses at most 0.5 points to the best simple classifier, 1 label a class",
    _over_best("tuned", "shot-1"),
    -0.5,
    unit="points",
)
_SAFE_5 = Claim(
    "tuned-5",
    "The same with 5 labels a class",
    _over_best("tuned", "shot-5"),
    -0.5,
    unit="points",
    scales=("standard",),
)
_WEAKER = "The paper's features come from a wide residual network with rotation and manifold mixup; here from four convolutions."

_CIFAR = Part(
    name="cifar100",
    question="Features of a small network on photographs: does calibration help it too?",
    settings_type=Photographs,
    cell=photographs_cell,
    version=2,
    arms=_ON_FEATURES,
    metrics=_FEATURE_METRICS,
    claims=(_LOSES, _SAFE, _SAFE_5),
    figures=(_figure(lambda: _ON_FEATURES),),
    deviations=(
        _WEAKER,
        "CIFAR-100 by a split of our own (64 base, 20 novel classes), neither CIFAR-FS nor FC100.",
        "The network on all images is of the same size: a stronger one does not fit half an hour.",
    ),
    scales={
        "standard": Scale(
            arms=tuple(arm.name for arm in _ON_FEATURES),
            settings=(
                Setting("shot-1", "1 label a class"),
                Setting("shot-5", "5 labels a class", {"shot": 5}),
                Setting("more-1", "1 label, a network trained on all 600 images a class", {"per_class": 600}),
            ),
            data=(("cifar100", "full"),),
            minutes=30,
        ),
    },
)

_OMNIGLOT = Part(
    name="omniglot",
    question="Features of a network on characters, with large activations: what does mixing two feature spaces cost?",
    settings_type=Characters,
    cell=characters_cell,
    version=2,
    arms=_ON_FEATURES,
    metrics=_FEATURE_METRICS,
    claims=(
        _LOSES,
        Claim(
            "spaces",
            "Transforming the base classes too takes back at least half of that loss",
            lambda results, seed: (
                difference("base-tukey", "official", "accuracy", "shot-1")(results, seed)
                + 0.5 * difference("official", "logistic", "accuracy", "shot-1")(results, seed)
            ),
            0.0,
            unit="points",
        ),
        _SAFE,
        _SAFE_5,
    ),
    figures=(_figure(lambda: _ON_FEATURES),),
    deviations=(_WEAKER,),
    scales={
        "quick": Scale(
            arms=("logistic", "tukey", "l2", "tukey-l2", "nearest", "nearest-l2", "official", "base-tukey", "tuned"),
            settings=(Setting("shot-1", "1 label a class"),),
            changes={"base_classes": 200, "epochs": 12, "episodes": 100, "tune_episodes": 60},
            data=(("omniglot", "small"),),
            dropped="5 labels a class, 20-way episodes, no transform, pooling, the LDA head; four fifths of the base characters",
            minutes=1,
        ),
        "standard": Scale(
            arms=tuple(arm.name for arm in _ON_FEATURES),
            settings=(
                Setting("shot-1", "1 label a class"),
                Setting("shot-5", "5 labels a class", {"shot": 5}),
                Setting("way-20", "20 classes, 1 label each", {"way": 20, "episodes": 60}),
            ),
            data=(("omniglot", "small"),),
            minutes=12,
        ),
    },
)

STUDY = Study(
    name="distribution-calibration",
    title="Distribution calibration",
    question="Where do borrowed class statistics help a classifier with one label a class?",
    paper="Yang, Liu, Xu: Free Lunch for Few-shot Learning: Distribution Calibration. ICLR 2021",
    follows="Table 2 (1 and 5 shots), with the simple classifiers that it lacks, where it helps and where it hurts",
    theme="few labels",
    parts=(_SYNTHETIC, _CIFAR, _OMNIGLOT),
    origin="outlast.studies.distribution_calibration:STUDY",
)
