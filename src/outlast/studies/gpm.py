"""Study ``gpm``: does a network that protects its old input directions forget less?

Saha, Garg, Roy, ICLR 2021: table 1 (10-split CIFAR-100) and the permuted-MNIST experiment of its table 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from outlast._core._norm import eval_mode
from outlast.studies._design import Arm, Claim, Figure, Metric, Outcome, Part, Scale, Setting, Settings, Study
from outlast.studies._results import difference

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from outlast.continual import GradientProjectionMemory
    from outlast.studies._context import Context
    from outlast.studies._results import Results

Optimizer = Literal["sgd", "adam", "adamw"]
Method = Literal["none", "step", "gradient", "both", "ewc", "agem", "joint"]


class Sequence(Settings):
    """What both parts share."""

    tasks: int = Field(default=5, ge=2)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=10, ge=1)
    test_size: int = Field(default=2000, ge=1)
    method: Method = "none"
    optimizer: Optimizer = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    keep_state: bool = False
    every: int = Field(default=1, ge=1)
    samples: int = Field(default=300, ge=1)


class Permuted(Sequence):
    """Permuted MNIST: every task shuffles the pixels in its own way; one head."""

    variant: Literal["full", "small"] = "full"
    train_size: int = Field(default=8000, ge=1)
    width: int = Field(default=100, ge=1)


class Split(Sequence):
    """Classes in groups, a head for each group."""

    dataset: Literal["fashion-mnist", "cifar100"] = "cifar100"
    variant: Literal["full", "small"] = "full"
    tasks: int = Field(default=10, ge=2)
    train_size: int = Field(default=2500, ge=1)
    epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=32, ge=1)
    lr: float = Field(default=0.05, gt=0)
    samples: int = Field(default=125, ge=1)
    channels: int = Field(default=16, ge=1)
    hidden: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.0, ge=0, le=2)
    norm: Literal["freeze", "paper", "per_task", "free"] = "freeze"
    threshold: float = Field(default=0.97, gt=0, le=1)
    threshold_step: float = Field(default=0.003, ge=0)
    ewc_strength: float = Field(default=3.0, gt=0)
    agem_samples: int = Field(default=200, ge=1)


def permuted_cell(config: Permuted, seed: int, context: Context) -> Outcome:
    """Learn task after task, testing on all tasks so far after each."""
    import torch

    from outlast.continual import GradientProjectionMemory
    from outlast.data import load
    from outlast.studies._models import mlp

    train, test = (load("mnist", split, variant=config.variant) for split in ("train", "test"))
    index = torch.randperm(len(train), generator=context.generator("subset"))[: config.train_size]
    images, test_images = (_standardised(part, train.images) for part in (train.images[index], test.images[: config.test_size]))
    labels, test_labels = train.labels[index], test.labels[: config.test_size]
    orders = [torch.randperm(784, generator=context.generator("permutation", task)) for task in range(config.tasks)]
    model = context.initialise(lambda: _without_biases(mlp(784, config.width, config.width, 10)))
    memory = None
    if config.method in ("step", "gradient", "both"):
        thresholds = {"1": 0.95, "3": 0.99, "5": 0.99}  # the three layers, as the authors set them
        memory = GradientProjectionMemory(model, threshold=thresholds, keep_reference=False)
    tasks = [((images.flatten(1)[:, order], labels), (test_images.flatten(1)[:, order], test_labels)) for order in orders]
    return _learn(config, context, model, memory, tasks)


def split_cell(config: Split, seed: int, context: Context) -> Outcome:
    """Learn groups of classes one after another, each with its own head."""
    import torch

    from outlast.continual import GradientProjectionMemory
    from outlast.data import load

    train, test = (load(config.dataset, split, variant=config.variant) for split in ("train", "test"))
    classes = len(train.classes)
    each = classes // config.tasks
    names = torch.randperm(classes, generator=context.generator("classes"))
    stream = context.generator("subset")
    tasks: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    for task in range(config.tasks):
        halves: list[tuple[Tensor, Tensor]] = []
        for part, limit in ((train, config.train_size), (test, config.test_size)):
            own = names[task * each : (task + 1) * each]
            chosen = torch.isin(part.labels, own).nonzero()[:, 0]
            chosen = chosen[torch.randperm(len(chosen), generator=stream)][:limit]
            place = torch.empty(classes, dtype=torch.int64).index_copy_(0, own, torch.arange(each))
            halves.append((_standardised(part.images[chosen], train.images), task * each + place[part.labels[chosen]]))
        tasks.append((halves[0], halves[1]))
    shape = train.images.shape[1:]
    model = context.initialise(lambda: _conv_net(shape, config.channels, config.hidden, config.dropout, config.tasks, each))
    memory = None
    if config.method in ("step", "gradient", "both"):
        memory = GradientProjectionMemory(
            model,
            threshold=config.threshold,
            threshold_step=config.threshold_step,
            exclude=["heads"],
            norm=config.norm,
            keep_reference=False,
        )
    return _learn(config, context, model, memory, tasks, heads=each)


def _standardised(images: Tensor, of: Tensor) -> Tensor:
    import torch

    from outlast.data import standardise

    floats = of[:10000].to(torch.float32) / 255.0
    return standardise(images, floats.mean((0, 2, 3)), floats.std((0, 2, 3)))


def _without_biases(model: nn.Sequential) -> nn.Sequential:
    from torch import nn

    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.register_parameter("bias", None)
    return model


def _conv_net(shape: torch.Size, channels: int, hidden: int, dropout: float, tasks: int, classes: int) -> nn.Module:
    """The paper's AlexNet-like network (64, 128, 256 channels and 2,048 units at ``channels=64``), logits of all heads in a row."""
    import torch
    from torch import nn

    size = shape[1]
    trunk: list[nn.Module] = []
    width = shape[0]
    for number, (kernel, rate) in enumerate(((4, 0.2), (3, 0.2), (2, 0.5))):
        out = channels * 2**number
        trunk += [nn.Conv2d(width, out, kernel, bias=False), nn.BatchNorm2d(out), nn.ReLU(), nn.Dropout(rate * dropout), nn.MaxPool2d(2)]
        width, size = out, (size - kernel + 1) // 2
    trunk.append(nn.Flatten())
    width *= size**2
    for _ in range(2):
        trunk += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.5 * dropout)]
        width = hidden

    class MultiHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(*trunk)
            self.heads = nn.ModuleList(nn.Linear(width, classes, bias=False) for _ in range(tasks))

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return torch.cat([head(x) for head in self.heads], 1)

    return MultiHead()


def _learn(
    config: Permuted | Split,
    context: Context,
    model: nn.Module,
    memory: GradientProjectionMemory | None,
    tasks: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    heads: int | None = None,
) -> Outcome:
    import torch
    import torch.nn.functional as F

    from outlast.continual import continual_metrics

    def loss_fn(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(*_own_head(logits, labels, heads))

    device = context.fabric.device
    model.to(device)
    regular = _EWC(config.ewc_strength) if isinstance(config, Split) and config.method == "ewc" else None
    replay = _AGEM(config.agem_samples, loss_fn) if isinstance(config, Split) and config.method == "agem" else None
    optimizer = _optimizer(config, model)
    handle = None
    if memory is not None:
        mode: Any = config.method
        handle = memory.attach(optimizer, mode=mode, every=config.every, force=True, reset_state=not config.keep_state)

    def make(module: nn.Module) -> torch.optim.Optimizer:
        if replay is not None:
            return replay.around(optimizer, module)
        return optimizer

    count = len(tasks)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    ranks: list[float] = []
    seconds = 0.0
    rounds = [tasks] if config.method == "joint" else [[task] for task in tasks]
    for number, group in enumerate(rounds):
        images = torch.cat([train[0] for train, _ in group])
        labels = torch.cat([train[1] for train, _ in group])
        if memory is None and not config.keep_state:
            optimizer.state.clear()
        start = context.clock()
        wrapped = context.train(
            model,
            make,
            images,
            labels,
            loss_fn=loss_fn if regular is None else lambda logits, y: loss_fn(logits, y) + regular.penalty(),
            epochs=config.epochs,
            batch_size=config.batch_size,
            schedule=lambda opt, _: torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0),
            stream=f"task {number} ",
        )
        model = context.plain(wrapped)
        draw = torch.randperm(len(images), generator=context.generator("samples", number))
        if memory is not None:
            memory.consolidate(images[draw[: config.samples]].to(device).split(100), max_samples=None)
            if heads is not None:
                memory.freeze(f"heads.{number}")
            ranks += [rank / dim for rank, dim in memory.ranks.values()]
        if regular is not None:
            chosen = draw[:500]
            regular.remember(model, images[chosen].to(device), labels[chosen].to(device), loss_fn)
        if replay is not None:
            chosen = draw[: config.agem_samples // count] if isinstance(config, Split) else draw[:0]
            replay.remember(images[chosen].to(device), labels[chosen].to(device))
        seconds += context.clock() - start
        shown = range(count) if config.method == "joint" else range(number + 1)
        for other in shown:
            score = _score(model, memory, other, tasks[other][1], heads, per_task=isinstance(config, Split) and config.norm == "per_task")
            matrix[number if len(rounds) > 1 else slice(None), other] = score
    if handle is not None:
        handle.remove()
    found = continual_metrics(matrix)
    metrics = {
        "acc": found.acc,
        "bwt": found.bwt,
        "learned": found.learning_accuracy,
        "capacity": 100.0 * memory.capacity if memory is not None else 0.0,
        "memory": memory.nbytes / 1e6 if memory is not None else 0.0,
        "train_seconds": seconds,
    }
    return Outcome(metrics, {"matrix": matrix.flatten().tolist(), "ranks": ranks})


def _own_head(logits: Tensor, labels: Tensor, heads: int | None) -> tuple[Tensor, Tensor]:
    """Logits of each sample's own head and its class within it: the task is known in the multi-head setting."""
    import torch

    if heads is None:
        return logits, labels
    own = logits.view(len(logits), -1, heads)[torch.arange(len(labels), device=labels.device), labels // heads]
    return own, labels % heads


def _score(model: nn.Module, memory: Any, task: int, test: tuple[Tensor, Tensor], heads: int | None, *, per_task: bool) -> float:
    import torch

    device = next(model.parameters()).device
    if per_task and memory is not None:
        memory.set_task(task)
    hits = 0
    with eval_mode(model), torch.no_grad():
        for x, y in zip(test[0].split(500), test[1].split(500), strict=True):
            own, label = _own_head(model(x.to(device)), y.to(device), heads)
            hits += int((own.argmax(1) == label).sum())
    if per_task and memory is not None:
        memory.set_task(None)
    return 100.0 * hits / len(test[1])


def _optimizer(config: Sequence, model: nn.Module) -> torch.optim.Optimizer:
    from torch.optim import SGD, Adam, AdamW

    if config.optimizer == "sgd":
        return SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = Adam if config.optimizer == "adam" else AdamW
    return kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)


class _EWC:
    """Elastic weight consolidation (Kirkpatrick et al. 2017): a quadratic penalty weighted by the diagonal Fisher information."""

    def __init__(self, strength: float) -> None:
        self._strength = strength
        self._terms: list[tuple[Tensor, Tensor, Tensor]] = []  # parameter, Fisher information summed over tasks, value at the last one

    def penalty(self) -> Tensor | float:
        """To be added to the loss of a batch."""
        return self._strength / 2 * sum((fisher * (p - kept).square()).sum() for p, fisher, kept in self._terms)

    def remember(self, model: nn.Module, images: Tensor, labels: Tensor, loss_fn: Any) -> None:
        """Add a finished task's Fisher information, from single samples' gradients in eval mode."""
        import torch

        parameters = [p for p in model.parameters() if p.requires_grad]
        total = [torch.zeros_like(p) for p in parameters]
        with eval_mode(model):
            for x, y in zip(images.split(1), labels.split(1), strict=True):
                for place, grad in zip(total, torch.autograd.grad(loss_fn(model(x), y), parameters), strict=True):
                    place.addcmul_(grad, grad, value=1.0 / len(images))
        if self._terms:
            for place, (_, fisher, _) in zip(total, self._terms, strict=True):
                place += fisher
        self._terms = [(p, fisher, p.detach().clone()) for p, fisher in zip(parameters, total, strict=True)]


class _AGEM:
    """Averaged gradient episodic memory (Chaudhry et al. 2019): replays stored samples as a constraint on the gradient."""

    def __init__(self, batch: int, loss_fn: Any) -> None:
        self._batch = batch
        self._loss_fn = loss_fn
        self._stored: tuple[Tensor, Tensor] | None = None

    def remember(self, images: Tensor, labels: Tensor) -> None:
        """Store samples of a finished task."""
        import torch

        old = self._stored
        self._stored = (images, labels) if old is None else (torch.cat([old[0], images]), torch.cat([old[1], labels]))

    def around(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer with each step's gradient kept from growing the loss on stored samples."""
        import torch

        own, parameters = self, [p for p in model.parameters() if p.requires_grad]

        class Constrained(torch.optim.Optimizer):
            def __init__(self) -> None:
                super().__init__(optimizer.param_groups, {})
                self.param_groups = optimizer.param_groups

            def step(self, closure: Any = None) -> Any:
                loss = closure()
                if own._stored is not None:
                    with torch.enable_grad():
                        reference = torch.autograd.grad(own._loss_fn(model(own._stored[0]), own._stored[1]), parameters)
                    along = sum((p.grad * r).sum() for p, r in zip(parameters, reference, strict=True) if p.grad is not None)
                    if along < 0:
                        size = sum(r.square().sum() for r in reference)
                        for p, r in zip(parameters, reference, strict=True):
                            if p.grad is not None:
                                p.grad.sub_(r, alpha=float(along / size))
                optimizer.step()
                return loss

        return Constrained()


# ---- claims and figures ----------------------------------------------------------------------------------------------


def _value(arm: str, metric: str) -> Any:
    return lambda results, seed: results.value(arm, metric, seed)


def _mean_matrix(results: Results, arm: str) -> Any:
    import numpy as np

    flat = np.mean([results.series(arm, "matrix", seed) for seed in results.seeds], 0)
    side = round(len(flat) ** 0.5)
    return flat.reshape(side, side)


def _draw_matrices(arms: tuple[str, ...], titles: tuple[str, ...]) -> Any:
    def draw(figure: Any, results: Results) -> None:
        import numpy as np

        axes = figure.subplots(1, len(arms), sharey=True)
        picture: Any = None
        for ax, arm, title in zip(np.atleast_1d(axes), arms, titles, strict=True):
            matrix = _mean_matrix(results, arm)
            masked = np.where(np.tril(np.ones_like(matrix)) > 0, matrix, np.nan)
            picture = ax.imshow(masked, vmin=np.nanmin(_mean_matrix(results, arms[0])[-1]), vmax=100, cmap="viridis")
            ax.set_title(title)
            ax.set_xlabel("accuracy on task")
            ax.set_xticks(range(len(matrix)), [str(number + 1) for number in range(len(matrix))])
            if ax is np.atleast_1d(axes)[0]:
                ax.set_ylabel("after learning task")
            ax.set_yticks(range(len(matrix)), [str(number + 1) for number in range(len(matrix))])
            for row in range(len(matrix)):
                for column in range(row + 1):
                    ax.text(column, row, f"{matrix[row, column]:.0f}", ha="center", va="center", color="white", fontsize=7)
        figure.colorbar(picture, ax=axes, label="%")

    return draw


def _describe_matrices(arms: tuple[str, ...], titles: tuple[str, ...]) -> Any:
    def describe(results: Results) -> str:
        parts: list[str] = []
        for arm, title in zip(arms, titles, strict=True):
            matrix = _mean_matrix(results, arm)
            parts.append(f"{title}: task 1 at {matrix[0, 0]:.1f} % when learned and {matrix[-1, 0]:.1f} % at the end")
        return "Accuracy on each task (columns) after each task learned (rows), mean over seeds. " + "; ".join(parts) + "."

    return describe


_METRICS = (
    Metric("acc", "ACC", "%", "higher"),
    Metric("bwt", "BWT", "points", "higher"),
    Metric("learned", "Accuracy when learned", "%", "higher"),
    Metric("capacity", "Capacity taken", "%", "lower"),
    Metric("memory", "Memory", "MB", "lower"),
    Metric("train_seconds", "Training", "s", "lower"),
)

_ADAM = {"optimizer": "adam", "lr": 1e-3, "batch_size": 32}
_ADAMW = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 32, "weight_decay": 0.1}
_MOMENTUM = {"momentum": 0.9, "batch_size": 32, "method": "gradient"}
_DECAY = {"lr": 0.05, "weight_decay": 1e-3, "batch_size": 32}

_PERMUTED_ARMS = (
    Arm("none", "SGD alone", "baseline"),
    Arm("gpm", "SGD + GPM", "method", {"method": "step"}),
    Arm("gpm-gradient", "SGD + GPM, gradient projected (the paper)", "method", {"method": "gradient"}),
    Arm("adam", "Adam alone", "baseline", _ADAM),
    Arm("adam-gradient", "Adam, gradient projected only", "ablation", {**_ADAM, "method": "gradient"}),
    Arm("adam-step", "Adam + GPM", "method", {**_ADAM, "method": "step"}),
    Arm("adam-both", "Adam + GPM, both", "ablation", {**_ADAM, "method": "both"}),
    Arm("adamw-gradient", "AdamW, gradient projected only", "ablation", {**_ADAMW, "method": "gradient"}),
    Arm("adamw-step", "AdamW + GPM", "method", {**_ADAMW, "method": "step"}),
    Arm("adamw-both", "AdamW + GPM, both", "ablation", {**_ADAMW, "method": "both"}),
    Arm("momentum-fresh", "SGD with momentum, gradient projected, fresh buffer", "ablation", _MOMENTUM),
    Arm("momentum-kept", "SGD with momentum, gradient projected, buffer kept", "ablation", {**_MOMENTUM, "keep_state": True}),
    Arm("decay-gradient", "SGD with decay, gradient projected", "ablation", {**_DECAY, "method": "gradient"}),
    Arm("decay-both", "SGD with decay + GPM, both", "ablation", {**_DECAY, "method": "both"}),
)

_MATRIX_ARMS = ("none", "gpm"), ("SGD alone", "SGD + GPM")

_PERMUTED = Part(
    name="permuted",
    question="One network learns digits whose pixels are shuffled anew for each task: how much of the first tasks is left at the end?",
    settings_type=Permuted,
    cell=permuted_cell,
    arms=_PERMUTED_ARMS,
    metrics=_METRICS,
    claims=(
        Claim("acc", "SGD with GPM ends at least 5 points of ACC above SGD alone", difference("gpm", "none", "acc"), 5.0, unit="points"),
        Claim("bwt", "With GPM old tasks lose at most 2.5 points", _value("gpm", "bwt"), -2.5, unit="points"),
        Claim(
            "adamw-step",
            "With AdamW and its weight decay, GPM on the step loses at most 2.5 points",
            _value("adamw-step", "bwt"),
            -2.5,
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "adamw-gradient",
            "AdamW with gradient projection alone forgets: at least 10 points",
            _value("adamw-gradient", "bwt"),
            -10.0,
            "at most",
            unit="points",
            scales=("quick", "standard"),
        ),
        Claim(
            "paper-acc",
            "Ten tasks of 54,000 images end at an ACC of at least 93.4 % (93.9 in the paper)",
            _value("gpm-gradient", "acc"),
            93.4,
            unit="%",
            scales=("paper",),
        ),
    ),
    figures=(Figure("matrix", "What is left of each task", _describe_matrices(*_MATRIX_ARMS), _draw_matrices(*_MATRIX_ARMS)),),
    deviations=("Five tasks of 8,000 digits and 3 epochs at standard scale; the paper ten tasks of 54,000 and 5 epochs.",),
    scales={
        "quick": Scale(
            arms=("none", "gpm", "adamw-gradient", "adamw-step"),
            changes={"variant": "small", "train_size": 3000, "epochs": 5, "every": 4},
            data=(("mnist", "small"),),
            dropped="the other optimizers; 3,000 digits a task for 5 epochs; anchors are restored at every fourth step",
            minutes=1,
        ),
        "standard": Scale(arms=tuple(arm.name for arm in _PERMUTED_ARMS), data=(("mnist", "full"),), minutes=10),
        "paper": Scale(
            arms=("none", "gpm", "gpm-gradient"),
            changes={"tasks": 10, "train_size": 54000, "epochs": 5, "test_size": 10000},
            data=(("mnist", "full"),),
            minutes=60,
            machine="one CPU core (estimated, not measured)",
            seeds=5,
        ),
    },
)

_STEP = {"method": "step"}
_SPLIT_ARMS = (
    Arm("none", "SGD alone", "baseline"),
    Arm("ewc", "EWC, strength 3", "baseline", {"method": "ewc"}),
    Arm("agem", "A-GEM, 200 stored images", "baseline", {"method": "agem"}),
    Arm("gpm", "GPM, norm layers frozen", "method", _STEP),
    Arm("gpm-paper", "GPM, norm layers as in the paper", "ablation", {**_STEP, "norm": "paper"}),
    Arm("gpm-per-task", "GPM, norm layers per task", "ablation", {**_STEP, "norm": "per_task"}),
    Arm("gpm-free", "GPM, norm layers free", "ablation", {**_STEP, "norm": "free"}),
    Arm("joint", "All tasks at once (upper bound)", "baseline", {"method": "joint"}),
)

_SPLIT = Part(
    name="split",
    question="Groups of classes arrive one after another, each with a head of its own: which norm policy and which baseline keep them?",
    settings_type=Split,
    cell=split_cell,
    arms=_SPLIT_ARMS,
    metrics=_METRICS,
    claims=(
        Claim("split-acc", "GPM ends at least 5 points of ACC above SGD alone", difference("gpm", "none", "acc"), 5.0, unit="points"),
        Claim("split-bwt", "GPM with frozen norm layers loses at most 2.5 points on old tasks", _value("gpm", "bwt"), -2.5, unit="points"),
        Claim(
            "free-norm",
            "With free norm layers GPM forgets at least 2 points more than with frozen ones",
            difference("gpm", "gpm-free", "bwt"),
            2.0,
            unit="points",
            scales=("quick", "standard"),
        ),
    ),
    figures=(Figure("matrix", "What is left of each group of classes", _describe_matrices(*_MATRIX_ARMS), _draw_matrices(*_MATRIX_ARMS)),),
    deviations=(
        "Standard scale: a quarter of the paper's channels, no dropout, 250 JPEG images a class, 5 epochs.",
        "Rate 0.05 and batches of 32; the paper 0.01 and 64, 500 exact images a class and up to 200 epochs.",
        "The learning rate is constant at every scale; the paper halves it where the validation loss stalls.",
        "EWC's strength is the largest of 1, 3, 10, 30, 100 with which one training did not diverge; A-GEM's memory is not tuned.",
    ),
    scales={
        "quick": Scale(
            arms=("none", "gpm", "gpm-free"),
            settings=(Setting("", "Fashion-MNIST, five tasks of two classes"),),
            changes={
                "dataset": "fashion-mnist",
                "variant": "small",
                "tasks": 5,
                "train_size": 800,
                "channels": 8,
                "hidden": 64,
                "epochs": 4,
                "batch_size": 16,
            },
            data=(("fashion-mnist", "small"),),
            dropped="CIFAR-100, the baselines and the other norm policies",
            minutes=1,
        ),
        "standard": Scale(
            arms=tuple(arm.name for arm in _SPLIT_ARMS),
            settings=(Setting("", "CIFAR-100, ten tasks of ten classes"),),
            data=(("cifar100", "full"),),
            minutes=25,
        ),
        "paper": Scale(
            arms=tuple(arm.name for arm in _SPLIT_ARMS),
            settings=(Setting("", "CIFAR-100, ten tasks of ten classes"),),
            changes={"channels": 64, "hidden": 2048, "dropout": 1.0, "lr": 0.01, "batch_size": 64, "train_size": 5000, "epochs": 100},
            data=(("cifar100", "full"),),
            minutes=3000,
            machine="one GPU (estimated, not measured)",
            seeds=5,
        ),
    },
)

STUDY = Study(
    name="gpm",
    title="Gradient projection memory",
    question="Does a network that protects its old input directions forget less?",
    paper="Saha, Garg, Roy: Gradient Projection Memory for Continual Learning. ICLR 2021",
    follows="Table 1 (10-split CIFAR-100, permuted MNIST)",
    theme="continual learning",
    parts=(_PERMUTED, _SPLIT),
    origin="outlast.studies.gpm:STUDY",
)
