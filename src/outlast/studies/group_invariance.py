"""Study ``group-invariance``: can a network be kept from the easy cue without labels of the cue?

Ahmed, Bengio, van Seijen, Courville, "Systematic Generalisation with Group Invariant Predictions", ICLR 2021: its coloured
MNIST, with the controls that it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.studies._context import Context
    from outlast.studies._results import Results

Method = Literal["erm", "balanced", "pgi", "irm", "rex", "reweight", "dro", "cmmd"]
_CLASS_COLOURS = (
    (0, 100, 0),
    (188, 143, 143),
    (255, 0, 0),
    (255, 215, 0),
    (0, 255, 0),
    (65, 105, 225),
    (0, 225, 225),
    (0, 0, 255),
    (255, 20, 147),
)


class Coloured(Settings):
    """One way to train on coloured digits or clothes."""

    dataset: Literal["mnist", "fashion-mnist"] = "mnist"
    variant: Literal["full", "small"] = "full"
    method: Method = "erm"
    groups: Literal["inferred", "stale", "true"] = "inferred"
    split: Literal["partition", "eiil", "loss", "error"] = "partition"
    weight: float = Field(default=10.0, ge=0)
    detach: bool = True
    biased: bool = True
    images: int | None = Field(default=10000, ge=1000)
    side: Literal[14, 28] = 14
    width: int = Field(default=16, ge=1)
    epochs: int = Field(default=15, ge=2)
    split_after: int = Field(default=2, ge=1)
    ramp_epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=128, ge=2)
    lr: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    milestones: tuple[float, ...] = (0.5, 0.8)
    gamma: float = Field(default=10.0, ge=0)


def cell(config: Coloured, seed: int, context: Context) -> Outcome:
    """Train with one method, infer groups on the way, test where colours are recombined."""
    import torch
    from torch.optim import SGD
    from torch.optim.lr_scheduler import MultiStepLR

    from outlast.diagnose.shortcuts import shift_report

    data = context.shared(
        ("coloured", config.dataset, config.variant, config.images, config.side, config.biased), lambda: _data(config, context)
    )
    trainer = _Trainer(config, data, context)
    model = context.plain(
        context.train(
            context.initialise(lambda: _network(config)),
            lambda module: SGD(module.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay),
            data["train"][0],
            data["train"][1],
            objective=trainer.objective,
            order=trainer.order,
            epochs=config.epochs,
            batch_size=config.batch_size,
            after_epoch=trainer.after_epoch,
            schedule=lambda optimizer, steps: MultiStepLR(optimizer, [int(share * steps) for share in config.milestones]),
        )
    )
    sets = {name: _batches(*data[name]) for name in ("in", "unseen", "systematic")}
    report = shift_report(model, sets, [(x,) for x in data["anomalies"].split(1000)])
    found = trainer.quality()
    with torch.no_grad():
        return Outcome(
            {
                "in": 100.0 * report.accuracy["in"],
                "unseen": 100.0 * report.accuracy["unseen"],
                "systematic": 100.0 * report.accuracy["systematic"],
                "ap_unseen": 100.0 * report.anomaly_ap["unseen"],
                "ap_in": 100.0 * report.anomaly_ap["in"],
                "validation": 100.0 * trainer.validation(model),
                **found,
            }
        )


class _Trainer:
    """The losses of all methods on the same inferred groups."""

    def __init__(self, config: Coloured, data: dict[str, Any], context: Context) -> None:
        self._config = config
        self._data = data
        self._context = context
        self._method: Any = None
        self._partition: Any = None
        self._held: Any = None
        self._q: Any = None
        self._ramp = 1
        self._steps = 0

    def order(self, _epoch: int, stream: torch.Generator) -> Tensor:
        """Group DRO draws batches that are balanced over the groups, the others permutations."""
        import torch

        count = len(self._data["train"][0])
        if self._config.method != "dro" or self._partition is None:
            return torch.randperm(count, generator=stream)
        groups = self._method.groups
        sizes = torch.bincount(groups, minlength=2).clamp(min=1)
        return torch.multinomial(1.0 / sizes[groups].double(), count, replacement=True, generator=stream)

    def objective(self, model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        from outlast.robust import GroupInvariance, group_balanced_cross_entropy
        from outlast.studies import _group_baselines as baselines

        config = self._config
        if self._method is None:
            steps = len(self._data["train"][0]) // config.batch_size
            self._ramp = config.ramp_epochs * steps
            self._method = GroupInvariance(model, head="head", weight=config.weight, ramp_steps=self._ramp, detach_head=config.detach)
            self._q = torch.full((2,), 0.5, device=x.device)
        if config.method == "erm" or self._partition is None:
            return F.cross_entropy(model(x), y)
        if config.method == "pgi":
            return self._method.loss(x, y, index).total
        groups = self._method.groups[index.cpu()].to(x.device)
        features, logits = self._forward(model, x)
        if config.method == "reweight":
            return baselines.reweighted(logits, y, groups, config.weight)
        if config.method == "dro":
            return baselines.dro(logits, y, groups, self._q, 0.01)
        entropy = group_balanced_cross_entropy(logits, y, groups)
        if config.method == "balanced":
            return entropy
        self._steps += 1
        weight = config.weight * min(1.0, self._steps / self._ramp)  # as the penalty's, so that no method has the better start
        if config.method == "cmmd":
            return entropy + weight * baselines.cmmd(features, y, groups)
        penalty = baselines.irm(logits, y, groups) if config.method == "irm" else baselines.rex(logits, y, groups)
        return (entropy + weight * penalty) / max(1.0, weight)

    def _forward(self, model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features before the head, and logits."""
        seen: list[Tensor] = []
        handle = self._method.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        logits = model(x)
        handle.remove()
        return seen[0], logits

    def after_epoch(self, model: nn.Module, epoch: int) -> None:
        from outlast.robust import collect_features, infer_groups

        config = self._config
        if epoch + 1 != config.split_after:
            return
        context, device = self._context, self._context.fabric.device
        bare = context.plain(model)
        options: dict[str, Any] = {"method": config.split, "gamma": config.gamma}
        fresh = config.groups != "stale"
        train, held = (_batches(*self._data[name]) for name in ("train", "validation"))
        features = collect_features(bare, train, head="head", recalibrate_batchnorm=fresh, device=device)
        self._partition = infer_groups(*features, generator=context.generator("groups"), **options)
        features = collect_features(bare, held, head="head", recalibrate_batchnorm=False, device=device)
        self._held = infer_groups(*features, generator=context.generator("validation groups"), **options)
        self._method.set_groups(self._data["minority"].long() if config.groups == "true" else self._partition)

    def validation(self, model: nn.Module) -> float:
        """Mean accuracy over (class, inferred group) of the validation split, which is coloured as the training split is."""
        import torch

        from outlast.robust import GroupInvariance

        images, labels = self._data["validation"]
        method = GroupInvariance(model, head="head", ramp_steps=1)
        numbers = torch.arange(len(labels))
        return method.group_accuracy([(images, labels, numbers)], self._held)

    def quality(self) -> dict[str, float]:
        """How well group 1 is the minority that does not have its class's colour."""
        inferred, minority = self._partition.groups == 1, self._data["minority"]
        both = float((inferred & minority).sum())
        return {
            "minority": 100.0 * self._partition.minority,
            "precision": 100.0 * both / max(1.0, float(inferred.sum())),
            "recall": 100.0 * both / max(1.0, float(minority.sum())),
            "stability": self._partition.stability,
        }


def _network(config: Coloured) -> nn.Module:
    from outlast.studies._models import pooled_conv

    return pooled_conv(config.width, last_pool=config.side == 28, num_classes=9)


def _data(config: Coloured, context: Context) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from outlast.data import load

    pool = load(config.dataset, "train", variant=config.variant)
    chosen = torch.randperm(len(pool), generator=context.generator("pool"))[: config.images]
    masks = (pool.images[chosen].float() / 255.0 > 0.5).float()
    masks = F.avg_pool2d(masks, 2) if config.side == 14 else masks
    labels = pool.labels[chosen]
    foreign, known = masks[labels == 0], masks[labels != 0]
    labels = labels[labels != 0] - 1
    first, second = int(0.7 * len(labels)), int(0.8 * len(labels))
    own, drawn, unseen = (torch.tensor(colours, dtype=torch.float32) for colours in _colours())
    stream = context.generator("colouring")

    def share(y: Tensor) -> tuple[Tensor, Tensor]:
        """80 % in their class's colour, the rest in one of ten others; without bias all of them."""
        other = torch.rand(len(y), generator=stream) >= (0.8 if config.biased else 0.0)
        return torch.where(other[:, None], drawn[torch.randint(10, (len(y),), generator=stream)], own[y]), other

    train_y, validation_y, test_y = labels[:first], labels[first:second], labels[second:]
    train_colours, minority = share(train_y)
    wrong = (test_y + torch.randint(1, 9, (len(test_y),), generator=stream)) % 9
    test = known[second:]
    return {
        "train": (_paint(known[:first], train_colours), train_y),
        "minority": minority,
        "validation": (_paint(known[first:second], share(validation_y)[0]), validation_y),
        "in": (_paint(test, share(test_y)[0]), test_y),
        "unseen": (_paint(test, unseen[torch.randint(10, (len(test_y),), generator=stream)]), test_y),
        "systematic": (_paint(test, own[wrong]), test_y),
        "anomalies": _paint(foreign, own[torch.randint(9, (len(foreign),), generator=stream)]),
    }


def _paint(masks: Tensor, colours: Tensor) -> Tensor:
    """Coloured shapes on black, in [-1, 1]."""
    return 2.0 * masks * colours[:, :, None, None] / 255.0 - 1.0


def _colours() -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Colours of the classes, ten of the minority, ten that only the test has; squared distances above 2,500."""
    import torch

    from outlast._core._random import generator

    stream = generator(0, "colours of the study")

    def draw(far_from: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        while len(found) < 10:
            colour = tuple(torch.randint(256, (3,), generator=stream).tolist())
            if all(sum((a - b) ** 2 for a, b in zip(colour, other, strict=True)) > 2500 for other in far_from):
                found.append(colour)
        return found

    own: list[tuple[int, ...]] = list(_CLASS_COLOURS)
    minority = draw(own)
    return own, minority, draw([*own, *minority])


def _batches(images: torch.Tensor, labels: torch.Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(500), labels.split(500), strict=True))


_WEIGHTS = {0.0: "balanced", 1.0: "pgi-1", 3.0: "pgi-3", 10.0: "pgi", 30.0: "pgi-30"}


def _chosen(setting: str) -> Callable[[Results, int], float]:
    def measure(results: Results, seed: int) -> float:
        from outlast.robust import GroupInvariance

        curve = {weight: results.value(arm, "validation", seed, setting) / 100.0 for weight, arm in _WEIGHTS.items()}
        arm = _WEIGHTS[GroupInvariance.choose_weight(curve)]
        return difference(arm, "erm", "systematic", setting)(results, seed)

    return measure


_SHIFTS = (("in", "in distribution"), ("unseen", "unseen colours"), ("systematic", "systematic shift"))


def _draw_shifts(figure: Any, results: Results) -> None:
    axes = figure.subplots()
    arms = [arm for arm in results.arms if results.has(arm)]
    for place, (metric, title) in enumerate(_SHIFTS):
        axes.bar([x + 0.27 * place for x in range(len(arms))], [results.mean(arm, metric) for arm in arms], 0.25, label=title)
    axes.set_xticks([x + 0.27 for x in range(len(arms))], [_PART.arm(arm).title for arm in arms], rotation=20, ha="right")
    axes.set_ylabel("accuracy (%)")
    figure.legend(loc="outside upper center", ncols=3)


def _describe_shifts(results: Results) -> str:
    parts: list[str] = []
    for arm in (arm for arm in results.arms if results.has(arm)):
        values = ", ".join(f"{title} {results.mean(arm, metric):.1f} %" for metric, title in _SHIFTS)
        parts.append(f"{_PART.arm(arm).title}: {values}")
    return "Accuracy, mean over seeds. " + "; ".join(parts) + "."


_CONTROL = Setting("control", "no bias: all digits in random colours", {"biased": False}, ("erm", "pgi"))
_DIGITS = Setting("digits", "coloured digits")

_PART = Part(
    name="coloured",
    question="Which training keeps accuracy where every shape has another class's colour?",
    settings_type=Coloured,
    cell=cell,
    version=2,
    arms=(
        Arm("erm", "plain training", "baseline"),
        Arm("balanced", "balanced cross-entropy, inferred groups", "baseline", {"method": "balanced"}),
        Arm("pgi", "invariance penalty", "method", {"method": "pgi"}),
        Arm("pgi-1", "invariance penalty, weight 1", "ablation", {"method": "pgi", "weight": 1.0}),
        Arm("pgi-3", "invariance penalty, weight 3", "ablation", {"method": "pgi", "weight": 3.0}),
        Arm("pgi-30", "invariance penalty, weight 30", "ablation", {"method": "pgi", "weight": 30.0}),
        Arm("pgi-true", "invariance penalty, true groups", "ablation", {"method": "pgi", "groups": "true"}),
        Arm("pgi-stale", "invariance penalty, BatchNorm not recalibrated", "ablation", {"method": "pgi", "groups": "stale"}),
        Arm("pgi-eiil", "invariance penalty, groups of EIIL", "ablation", {"method": "pgi", "split": "eiil"}),
        Arm("pgi-error", "invariance penalty, misclassified as group 1", "ablation", {"method": "pgi", "split": "error"}),
        Arm("pgi-attached", "invariance penalty, head not detached", "ablation", {"method": "pgi", "detach": False}),
        Arm("irm", "IRM, weight 10", "baseline", {"method": "irm", "weight": 10.0}),
        Arm("rex", "REx, weight 10", "baseline", {"method": "rex", "weight": 10.0}),
        Arm("reweight", "reweighting, weight 10", "baseline", {"method": "reweight", "weight": 10.0}),
        Arm("dro", "group DRO", "baseline", {"method": "dro"}),
        Arm("cmmd", "class-conditional MMD, weight 10", "baseline", {"method": "cmmd", "weight": 10.0}),
    ),
    metrics=(
        Metric("in", "In distribution", "%", "higher"),
        Metric("unseen", "Unseen colours", "%", "higher"),
        Metric("systematic", "Systematic shift", "%", "higher"),
        Metric("ap_unseen", "Anomaly AP (unseen colours)", "%", "higher"),
        Metric("ap_in", "Anomaly AP (in distribution)", "%", "higher"),
        Metric("validation", "Balanced group accuracy (validation)", "%", "higher"),
        Metric("minority", "Inferred minority", "%"),
        Metric("precision", "Its precision", "%", "higher"),
        Metric("recall", "Its recall", "%", "higher"),
        Metric("stability", "Kappa of restarts", "", "higher", 2),
    ),
    claims=(
        Claim(
            "systematic",
            "With every digit in another class's colour the penalty is at least 20 points above plain training",
            difference("pgi", "erm", "systematic"),
            20.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "over-balanced",
            "It is at least 10 points above balanced cross-entropy on the same groups",
            difference("pgi", "balanced", "systematic"),
            10.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "price",
            "It loses at most 4 points in distribution",
            difference("pgi", "erm", "in"),
            -4.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "anomalies",
            "Average precision for a foreign digit rises by at least 20 points",
            difference("pgi", "erm", "ap_unseen"),
            20.0,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "control",
            "Without a bias it costs accuracy: in distribution it is below plain training",
            difference("pgi", "erm", "in", "control"),
            0.0,
            "at most",
            unit="points",
            scales=("quick", "standard"),
        ),
        *(
            Claim(
                f"chosen-{setting}",
                f"The weight that validation without shifted data chooses is at least 20 points above plain training ({title})",
                _chosen(setting),
                20.0,
                unit="points",
                scales=("standard",),
            )
            for setting, title in (("digits", "digits"), ("clothes", "clothes"))
        ),
        Claim(
            "stale",
            "Groups from stale BatchNorm statistics cost at least 20 points under systematic shift",
            difference("pgi", "pgi-stale", "systematic"),
            20.0,
            unit="points",
            scales=("standard",),
        ),
        Claim(
            "paper",
            "On coloured MNIST with the authors' network and schedule the penalty is at least 20 points above plain training",
            difference("pgi", "erm", "systematic"),
            20.0,
            unit="points",
            scales=("paper",),
        ),
    ),
    figures=(Figure("shifts", "Plain training takes the colour; the penalty takes the shape", _describe_shifts, _draw_shifts),),
    deviations=(
        "Quick and standard: 16, 32 and 64 channels, 6,300 images of 14x14, 15 epochs; the paper 64 to 256, 45,000 of 28x28, 30 epochs.",
        "Weight 10 was chosen by a look at shifted images; standard scale also chooses the weight by validation.",
        "IRM takes the product of two half batches, the MMD the classes of the batch. Baselines have one weight, with the penalty's ramp.",
        "The paper scale takes 70 % of the nine digits (37,900 images) where the paper has 45,068.",
        "COCO-on-Colours and COCO-on-Places need COCO and Places and are not built.",
        "Groups come from recalibrated BatchNorm statistics after two epochs (the authors': after one, as they stand).",
    ),
    scales={
        "quick": Scale(
            arms=("erm", "balanced", "pgi"),
            settings=(_DIGITS, _CONTROL),
            changes={"variant": "small", "images": 6000},
            data=(("mnist", "small"),),
            dropped="four of ten thousand images, IRM, REx, reweighting, group DRO, MMD, other weights and splits, Fashion-MNIST",
            minutes=1.2,
        ),
        "standard": Scale(
            arms=(
                *("erm", "balanced", "pgi", "pgi-1", "pgi-3", "pgi-30", "pgi-true", "pgi-stale", "pgi-eiil", "pgi-error", "pgi-attached"),
                *("irm", "rex", "reweight", "dro", "cmmd"),
            ),
            settings=(
                _DIGITS,
                _CONTROL,
                Setting(
                    "clothes",
                    "coloured clothes (Fashion-MNIST)",
                    {"dataset": "fashion-mnist"},
                    ("erm", "balanced", "pgi", "pgi-1", "pgi-3", "pgi-30", "irm"),
                ),
            ),
            data=(("mnist", "full"), ("fashion-mnist", "full")),
            minutes=18,
            seeds=6,
        ),
        "paper": Scale(
            arms=("erm", "balanced", "pgi", "irm", "rex", "reweight", "dro", "cmmd"),
            settings=(_DIGITS,),
            changes={
                "images": None,
                "side": 28,
                "width": 64,
                "epochs": 30,
                "split_after": 1,
                "batch_size": 512,
                "milestones": (0.3, 0.6, 0.8),
                "weight": 50.0,
            },
            data=(("mnist", "full"),),
            minutes=100,
            machine="one GPU (estimated, not measured)",
            seeds=5,
        ),
    },
)

STUDY = Study(
    name="group-invariance",
    title="Group-invariant predictions",
    question="Can a network be kept from the easy cue without labels of the cue?",
    paper="Ahmed, Bengio, van Seijen, Courville: Systematic Generalisation with Group Invariant Predictions. ICLR 2021",
    follows="Coloured MNIST",
    theme="robust optimisation",
    parts=(_PART,),
    origin="outlast.studies.group_invariance:STUDY",
)
