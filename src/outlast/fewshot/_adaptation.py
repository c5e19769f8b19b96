"""STARTUP's whole procedure: label the target data with the teacher, choose a rate, train the student, keep the best.

Phoo, Hariharan, ICLR 2021, section 3 and the authors' code.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from outlast._core import _checks
from outlast._core._distributed import from_first, spread_buffers, sum_
from outlast._core._files import write_whole
from outlast._core._foreach import is_sharded
from outlast._core._norm import eval_mode, has_running_statistics, is_batch_norm, recalibrate_batchnorm
from outlast._core._random import derived_seed, generator, seeded
from outlast._core._result import JSON, to_json
from outlast.errors import DamagedFileError, DivergedError, OutlastWarning, UnsupportedError
from outlast.fewshot._pseudo_labels import PseudoLabels, pseudo_label, state_digest
from outlast.fewshot._startup_losses import StartupLoss, StartupLosses, check_source_targets
from outlast.fewshot._student import BatchNormPolicy, StartupStudent, TwoViews, split_classifier

RATES = (0.1, 0.05, 0.03, 0.01, 0.005, 0.003, 0.001)
_TEST_STEPS = 50
_EVERY = 2
_SHARPENING = 0.1
_FILE = "adaptation.pt"

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], Any]
Callback = Callable[[Mapping[str, float]], object]


@dataclass(frozen=True, repr=False)
class AdaptationResult:
    """An adapted representation and how it came about.

    Attributes:
        backbone: of the best validation loss (of the last epoch without validation), in eval mode.
        student: the whole network of that moment.
        history: one record an epoch: ``epoch``, ``lr``, ``total``, ``source``, ``distill``, ``contrast`` (training means) and,
            where it was computed, ``validation``.
        best_epoch: number of the epoch that was kept, from 1.
        lr: learning rate at the start.
        rates: validation losses of the learning rates that were tried; empty where one was given.
        pseudo_labels: of the frozen teacher.
        batchnorm: the policy.
        controls: with ``controls=True``: ``"transfer"``, the teacher's backbone, and, where it has BatchNorm, ``"batchnorm"``:
            the same with running statistics of the target data. Any gain is to be read against both.
    """

    backbone: nn.Module
    student: StartupStudent
    history: tuple[dict[str, float], ...]
    best_epoch: int
    lr: float
    rates: dict[float, float]
    pseudo_labels: PseudoLabels
    batchnorm: BatchNormPolicy
    controls: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])

    def to_dict(self) -> dict[str, JSON]:
        """What is not a network, as JSON types."""
        return {
            "kind": "AdaptationResult",
            "version": 1,
            "history": to_json(self.history),
            "best_epoch": self.best_epoch,
            "lr": self.lr,
            "rates": to_json(self.rates),
            "pseudo_labels": self.pseudo_labels.summary().to_dict(),
            "batchnorm": self.batchnorm,
            "controls": to_json(sorted(self.controls)),
        }

    def __repr__(self) -> str:
        return (
            f"AdaptationResult({len(self.history)} epochs, best {self.best_epoch}, lr {self.lr:g}, batchnorm {self.batchnorm!r}, "
            f"loss {self.history[self.best_epoch - 1]['total']:.4g})"
        )


def adapt_representation(
    teacher: nn.Module | tuple[nn.Module, nn.Module],
    source_loader: DataLoader[Any] | None,
    target_loader: DataLoader[Any],
    *,
    epochs: int,
    loss: StartupLoss | None = None,
    views: Callable[[Tensor], Any] | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    optimizer: MakeOptimizer | None = None,
    scheduler: Literal["plateau", "cosine"] | MakeScheduler | None = "plateau",
    lr: float | Sequence[float] | Literal["auto"] = "auto",
    validation: tuple[float, float] | None = (0.05, 0.1),
    pseudo_labels: PseudoLabels | None = None,
    teacher_update: Literal["frozen", "ema"] = "frozen",
    ema_momentum: float = 0.99,
    batchnorm: BatchNormPolicy = "separate",
    projection_dim: int = 128,
    micro_batch: int | None = None,
    fabric: Any = None,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    controls: bool = False,
) -> AdaptationResult:
    """Adapt a classifier's features to unlabelled data of another domain (STARTUP).

    An epoch is a pass over the target data; source batches cycle beside it. Batch size, workers and collation are those of the
    loaders, the order is a function of ``seed`` and of the epoch, and so is torch's, numpy's and Python's randomness during an
    epoch: a run that was stopped and taken up equals one that was not, bit for bit on one machine with one thread. With several
    processes each takes an equal share of every batch.

    Args:
        teacher: a classifier of the source classes, never changed: a module with ``backbone`` and ``head``, a pair of the two, or
            any network whose last linear layer is the head.
        source_loader: a ``DataLoader`` of ``(inputs, classes)`` over a map-style data set; None where the source has weight 0.
        target_loader: the same of ``(inputs, ids)`` (``outlast.data.Indexed``), with the deterministic test transform.
        epochs: passes over the target data.
        loss: None for ``StartupLoss()``. With contrast weight 0 ("no SS") there is no projector and one view.
        views: two views of a batch of inputs, ``(2, B, ...)`` or a pair: ``TwoViews``. None: inputs are pairs of views
            already, made in the data set; then give ``pseudo_labels``, made without augmentation.
        augment: of a source batch; None for none.
        optimizer: from parameters to an optimizer, of which the learning rate is then set; None for SGD with momentum 0.9 and
            weight decay 1e-4.
        scheduler: ``"plateau"``: halved when the training loss has not fallen for 10 epochs; ``"cosine"``: to zero, step by
            step; a function from the optimizer to a scheduler, stepped after each epoch; None for none.
        lr: a rate; several, of which the one with the least validation loss after 50 steps is taken (NaN and infinity never);
            ``"auto"`` for the paper's seven.
        validation: shares of source and target that are held out; the epoch with the least validation loss (looked at after the
            first, every second and the last) is kept. None for no validation: the last epoch is kept, and ``lr`` must be one
            number. This loss measures imitation of the teacher, not quality.
        pseudo_labels: made earlier; None labels all target data with the teacher now.
        teacher_update: ``"ema"``: the labels of each step come from a moving average of the student (head included, which then
            starts as the teacher's) on the inputs as the loader gives them, sharpened to temperature 0.1.
        ema_momentum: of that average, per step.
        batchnorm: as in ``StartupStudent``; ``"target"`` estimates the running statistics of the result on target data.
        projection_dim: width of the projections.
        micro_batch: target samples in memory at a time (``StartupLoss.backward_in_parts``); None for the whole batch.
        fabric: a launched Lightning Fabric for devices, precision and several processes; None runs where the teacher is.
        seed: of everything random.
        checkpoint_dir: folder of the file that a stopped run is taken up from; written after every epoch.
        callbacks: called with each epoch's record.
        controls: also give the two representations that a gain must be measured against.

    Raises:
        ValueError: the target loader yields no batch; no source and a source weight; labels out of range; nothing to train; a
            checkpoint of other pseudo-labels or settings.
        UnsupportedError: loaders over iterable data sets or with samplers of their own; a sharded strategy of ``fabric``.
        DivergedError: no learning rate gave a finite loss, or training ended in NaN.
    """
    _checks.integer("epochs", epochs, low=1)
    _checks.choice("teacher_update", teacher_update, ("frozen", "ema"))
    ema_momentum = _checks.real("ema_momentum", ema_momentum, low=0.0, high=1.0)
    seed = _checks.integer("seed", seed, low=0)
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise TypeError(f"validation is a pair of shares (source, target) or None, got {validation!r}")
        shares = [_checks.real("validation", share, low=0.0, high=0.9) for share in validation]
        validation = (shares[0], shares[1])
    rate, candidates = _rates(lr)
    objective = StartupLoss() if loss is None else loss
    if not callable(scheduler) and scheduler is not None:
        _checks.choice("scheduler", scheduler, ("plateau", "cosine"))
    if source_loader is None and objective.weights[0]:
        raise ValueError("the source has a weight and there is no source_loader; weights=(0, 1, 1) goes without")
    if views is None and pseudo_labels is None:
        raise ValueError("without views= the loader's inputs are augmented already: give pseudo_labels= made from the test transform")
    if views is None and teacher_update == "ema":
        raise ValueError("teacher_update='ema' labels the loader's inputs as they are: give views= to make the student's from them")
    if not objective.weights[0]:
        source_loader = None  # what has no weight is not run: it would move the statistics of BatchNorm
    data = _Data(source_loader, target_loader, validation, objective.weights, seed, fabric)
    backbone, head = split_classifier(teacher)
    classifier = nn.Sequential(backbone, nn.Flatten(1), head)
    device = next(iter(classifier.parameters())).device if fabric is None else fabric.device
    classifier.to(device)
    if not any(parameter.requires_grad for parameter in backbone.parameters()):
        raise ValueError("no parameter of the backbone requires a gradient: there is nothing to train; call requires_grad_() on it")
    whole = nn.Sequential(teacher[0], nn.Flatten(1), teacher[1]) if isinstance(teacher, tuple) else teacher
    with _seeded(seed, "labels", device):  # the user's data set may draw
        _check_target(data.all_targets(), whole, classifier, device, paired=views is None)
        labels = pseudo_labels if pseudo_labels is not None else pseudo_label(whole, data.all_targets())
    known = state_digest(whole)
    wide = labels.probs.shape[1]
    if getattr(head, "out_features", wide) != wide:
        raise ValueError(f"pseudo_labels have {wide} classes, the teacher {head.out_features}")
    if len(labels) < data.count:
        raise ValueError(f"pseudo_labels are of {len(labels)} samples, the target data have {data.count}")
    with _seeded(seed, "student", device):
        student = StartupStudent.from_teacher(
            backbone,
            wide,
            getattr(head, "in_features", None),
            projection_dim if objective.weights[2] else None,
            copy_head=head if teacher_update == "ema" else None,
            batchnorm=batchnorm,
        )
    if not any(objective.weights[:2]):
        student.head.requires_grad_(False)  # several processes would wait for its gradient
    if pseudo_labels is not None and labels.teacher_digest and labels.teacher_digest != known:
        warnings.warn("pseudo_labels were made by another teacher than this one", OutlastWarning, stacklevel=2)
    run = _Run(
        student=student.to(device),
        classifier=classifier.eval(),
        objective=objective,
        labels=labels,
        data=data,
        views=views,
        augment=augment,
        make_optimizer=optimizer,
        scheduler=scheduler,
        momentum=ema_momentum if teacher_update == "ema" else None,
        micro_batch=micro_batch,
        fabric=fabric,
        seed=seed,
        epochs=epochs,
        device=device,
    )
    settings = {
        "seed": seed,
        "weights": list(objective.weights),
        "temperature": objective.temperature,
        "batchnorm": batchnorm,
        "teacher_update": teacher_update,
        "ema_momentum": ema_momentum,
        "teacher": known,
        "scheduler": scheduler if isinstance(scheduler, str) or scheduler is None else "own",
        "validation": None if validation is None else list(validation),
        "lr": candidates or rate,
        "batches": [data.size, data.source_size],
        "samples": [data.count, data.source_count],
        "projection_dim": projection_dim,
        "micro_batch": micro_batch,
        "optimizer": "SGD" if optimizer is None else type(optimizer(list(student.parameters()))).__name__,
        **({"epochs": epochs} if scheduler == "cosine" else {}),
    }
    path = None if checkpoint_dir is None else Path(checkpoint_dir) / _FILE
    saved = _read(path, labels.digest, settings) if path is not None and path.is_file() else None
    if saved is not None and len(saved["history"]) > epochs:
        raise ValueError(f"{path} has {len(saved['history'])} epochs already, asked for are {epochs}")
    if saved is not None:
        rate, rates = float(saved["rate"]), {float(key): float(value) for key, value in saved["rates"].items()}
    elif rate:
        rates = {}
    else:
        if not data.has_validation:
            raise ValueError("a learning rate is chosen by the validation loss: give validation=, or one number as lr=")
        rate, rates = run.choose(candidates)
    history, best, best_epoch = run.train(rate, saved, callbacks, None if path is None else (path, labels.digest, settings, rates))
    student.load_state_dict(best)
    if batchnorm == "target" and _has_batch_norm(student.backbone):
        run.recalibrate(student.backbone)
    student.eval()
    found: dict[str, nn.Module] = {}
    if controls:
        plain = split_classifier(teacher)[0].to(device).eval()
        found["transfer"] = plain
        if _has_batch_norm(plain):
            found["batchnorm"] = copy.deepcopy(plain)
            run.recalibrate(found["batchnorm"])
    return AdaptationResult(student.backbone, student, tuple(history), best_epoch, rate, rates, labels, batchnorm, found)


@dataclass
class _Run:
    student: Any
    classifier: nn.Module
    objective: StartupLoss
    labels: PseudoLabels
    data: _Data
    views: Callable[[Tensor], Any] | None
    augment: Callable[[Tensor], Tensor] | None
    make_optimizer: MakeOptimizer | None
    scheduler: Literal["plateau", "cosine"] | MakeScheduler | None
    momentum: float | None
    micro_batch: int | None
    fabric: Any
    seed: int
    epochs: int
    device: torch.device

    def __post_init__(self) -> None:
        self.bare: StartupStudent = self.student
        self.start = _copied(self.student.state_dict())
        self.average = copy.deepcopy(self.classifier) if self.momentum is not None else None
        if self.fabric is not None:
            self.student = self.fabric.setup_module(self.student)
            if any(is_sharded(parameter) for parameter in self.student.parameters()):
                raise UnsupportedError("adapt_representation works with replicated modules; use another strategy than a sharded one")

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        if self.make_optimizer is None:
            made: torch.optim.Optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=1e-4)
        else:
            made = self.make_optimizer(parameters)
            for group in made.param_groups:
                group["lr"] = rate
                group.pop("initial_lr", None)
        return made if self.fabric is None else self.fabric.setup_optimizers(made)

    def schedule(self, optimizer: Any) -> Any:
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.scheduler is None:
            return None
        if self.scheduler == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(inner, self.epochs * self.data.steps)
        if self.scheduler == "plateau":
            return torch.optim.lr_scheduler.ReduceLROnPlateau(inner, "min", factor=0.5, patience=10, cooldown=10, min_lr=1e-5)
        return self.scheduler(inner)

    def restore(self) -> None:
        self.bare.load_state_dict(self.start)
        if self.average is not None:
            self.average.load_state_dict(self.classifier.state_dict())

    def choose(self, rates: Sequence[float]) -> tuple[float, dict[float, float]]:
        """The rate with the least validation loss after at least 50 steps from the start."""
        if not rates:
            raise ValueError("lr is an empty sequence")
        found: dict[float, float] = {}
        for rate in rates:
            self.restore()
            optimizer = self.optimizer(rate)
            diverged = False
            for epoch in range(math.ceil(_TEST_STEPS / self.data.steps)):
                if not math.isfinite(self.epoch(optimizer, None, epoch)["total"]):
                    diverged = True
                    break
            found[rate] = math.nan if diverged else self.validate()
        self.restore()
        return best_rate(found), found

    def train(
        self,
        rate: float,
        saved: Mapping[str, Any] | None,
        callbacks: Sequence[Callback],
        store: tuple[Path, str, dict[str, Any], dict[float, float]] | None,
    ) -> tuple[list[dict[str, float]], dict[str, Any], int]:
        optimizer: Any = self.optimizer(rate)
        rates = self.schedule(optimizer)
        history: list[dict[str, float]] = []
        best, best_loss, best_epoch = _copied(self.bare.state_dict()), math.inf, 0
        if saved is not None:
            self.bare.load_state_dict(saved["student"])
            optimizer.load_state_dict(saved["optimizer"])
            if rates is not None:
                rates.load_state_dict(saved["scheduler"])
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            history, best = [dict(record) for record in saved["history"]], dict(saved["best"])
            best_loss, best_epoch = float(saved["best_loss"]), int(saved["best_epoch"])
        for epoch in range(len(history), self.epochs):
            record: dict[str, float] = {"epoch": float(epoch + 1), "lr": float(optimizer.param_groups[0]["lr"])}
            record |= self.epoch(optimizer, rates if self.scheduler == "cosine" else None, epoch)
            if not math.isfinite(record["total"]):
                raise DivergedError(f"the training loss is {record['total']} in epoch {epoch + 1} at learning rate {rate:g}")
            if rates is not None and self.scheduler != "cosine":
                rates.step(*((record["total"],) if self.scheduler == "plateau" else ()))
            last = epoch + 1 == self.epochs
            if not self.data.has_validation:
                spread_buffers(self.bare)
                best, best_epoch = (_copied(self.bare.state_dict()) if last or store is not None else best), epoch + 1
            elif epoch == 0 or (epoch + 1) % _EVERY == 0 or last:
                record["validation"] = self.validate()
                if record["validation"] < best_loss:
                    best, best_loss, best_epoch = _copied(self.bare.state_dict()), record["validation"], epoch + 1
            history.append(record)
            if store is not None and (self.fabric is None or self.fabric.global_rank == 0):
                path, digest, settings, tried = store
                _write(
                    path,
                    {
                        "digest": digest,
                        "settings": settings,
                        "rate": rate,
                        "rates": tried,
                        "student": self.bare.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": None if rates is None else rates.state_dict(),
                        "average": None if self.average is None else self.average.state_dict(),
                        "history": history,
                        "best": best,
                        "best_loss": best_loss,
                        "best_epoch": best_epoch,
                    },
                )
            for callback in callbacks:
                callback(dict(record))
        if best_epoch == 0:
            raise DivergedError("no epoch has a finite validation loss")
        return history, best, best_epoch

    def epoch(self, optimizer: Any, rates: Any, number: int) -> dict[str, float]:
        """One pass over the target data; means of the losses."""
        self.student.train()
        seen: set[int] = set()
        sums = torch.zeros(4, dtype=torch.float64)
        with _seeded(self.seed, f"epoch {self.data.rank}", self.device, number):
            for source, target in self.data.epoch(number):
                if source is not None and source[1].device.type == "cpu":
                    check_source_targets(source[1], self.labels.probs.shape[1])  # a loss on an accelerator does not look
                x, y = (None, None) if source is None else (self._moved(source[0]), source[1].to(self.device))
                if x is not None and self.augment is not None:
                    x = self.augment(x)
                if number == 0:
                    self._note(seen, target[-1])
                views = self._views(target[0]) if any(self.objective.weights[1:]) else None
                pseudo = self._pseudo(target)
                optimizer.zero_grad()
                losses = self._backward(x, y, views, pseudo)
                bad = (~torch.isfinite(losses.total.detach())).float().reshape(1)
                if sum_(bad).item():  # of any process: all stop together
                    return dict.fromkeys(("total", "source", "distill", "contrast"), math.nan)
                optimizer.step()
                if rates is not None:
                    rates.step()
                if self.average is not None and self.momentum is not None:
                    _follow(self.average, nn.Sequential(self.bare.backbone, nn.Flatten(1), self.bare.head), self.momentum)
                sums += torch.stack([losses.total, losses.source, losses.distill, losses.contrast]).detach().double().cpu()
        means = sums / self.data.steps
        if self.fabric is not None and self.fabric.world_size > 1:
            means = cast("Tensor", self.fabric.all_reduce(means.to(self.device))).cpu()
        return dict(zip(("total", "source", "distill", "contrast"), means.tolist(), strict=True))

    @staticmethod
    def _note(seen: set[int], ids: Any) -> None:
        """Refuse an id that comes twice in a pass: it is no number of a sample."""
        for number in torch.as_tensor(ids).tolist():
            if number in seen:
                raise ValueError(
                    f"id {number} comes twice in one pass over the target data: the last entry of a batch must be the numbers of its "
                    "samples, all different (outlast.data.Indexed)"
                )
            seen.add(number)

    def _backward(self, x: Tensor | None, y: Tensor | None, views: Tensor | None, pseudo: Tensor | None) -> StartupLosses:
        backward = torch.Tensor.backward if self.fabric is None else self.fabric.backward
        if self.micro_batch is not None and views is not None:
            return self.objective.backward_in_parts(
                self.student, x, y, views, pseudo, micro_batch=self.micro_batch, backward=backward, no_sync=self._no_sync
            )
        logits, target_logits, projections = self.student(x, () if views is None else views)
        losses = self.objective(logits, y, target_logits, pseudo, projections)
        backward(losses.total)
        return losses

    def _no_sync(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.fabric is None else self.fabric.no_backward_sync(self.student)

    def validate(self) -> float:
        """The first process's loss: running statistics are each process's own, and all must take the same decision."""
        spread_buffers(self.bare)
        return float(from_first(self._validate()))

    def _validate(self) -> float:
        """CE on held-out source, KL on the test view and NT-Xent between test view and one augmented view of held-out target."""
        on_source, on_target, on_views = self.objective.weights
        total = 0.0
        with eval_mode(self.bare), torch.no_grad(), _seeded(self.seed, "validation", self.device):
            if on_source:
                terms: list[tuple[float, int]] = []
                for x, y, *_ in self.data.source_validation():
                    logits = self.bare.head(self.bare.backbone(self._like(x)).flatten(1))
                    only = StartupLoss(weights=(1.0, 0.0, 0.0))
                    terms.append((only(logits, y.to(self.device), logits, None).total.item(), len(y)))
                total += on_source * _mean(terms)
            distills: list[tuple[float, int]] = []
            contrasts: list[tuple[float, int]] = []
            for batch in self.data.target_validation() if any(self.objective.weights[1:]) else ():
                plain, view = self._validation_views(batch[0])
                _, logits, projections = self.bare(None, [plain] if view is None else [plain, view])
                if on_target:
                    only = StartupLoss(weights=(0.0, 1.0, 0.0))
                    distills.append((only(None, None, logits[:1], self._pseudo(batch)).total.item(), len(plain)))
                if on_views and projections is not None and len(plain) > 1:
                    only = StartupLoss(self.objective.temperature, (0.0, 0.0, 1.0), gather=False)
                    contrasts.append((only(None, None, logits, None, projections).total.item(), 1))
            total += on_target * _mean(distills) + on_views * _mean(contrasts)
        return total

    def recalibrate(self, backbone: nn.Module) -> None:
        """Statistics of the training part of the target data, not augmented (one of the two views where the data set makes them)."""
        with _seeded(self.seed, "statistics", self.device):
            recalibrate_batchnorm(
                backbone, (self._like(batch[0] if self.views is not None else batch[0][0]) for batch in self.data.target_batches())
            )

    def _views(self, inputs: Any) -> Tensor:
        single = not self.objective.weights[2]
        if self.views is None:
            found = [self._moved(view) for view in inputs]
        elif single and isinstance(self.views, TwoViews):
            return self.views.first(self._moved(inputs))[None]
        else:
            found = list(self.views(self._moved(inputs)))
        return torch.stack(found[:1] if single else found)

    def _validation_views(self, inputs: Any) -> tuple[Tensor, Tensor | None]:
        """The test view, and one augmented view where the contrast has a weight."""
        plain = self._moved(inputs if self.views is not None else inputs[0])
        if not self.objective.weights[2]:
            return self._like(plain), None
        return self._like(plain), self._like(inputs[1] if self.views is None else next(iter(self.views(plain))))

    def _pseudo(self, batch: Sequence[Any]) -> Tensor | None:
        if not self.objective.weights[1]:
            return None
        if self.average is not None:
            with eval_mode(self.average), torch.no_grad():
                return (self.average(self._moved(batch[0])).float() / _SHARPENING).softmax(1)
        return self.labels.lookup(batch[-1]).to(self.device)

    def _like(self, x: Any) -> Tensor:
        """Inputs of the bare network, in its type where a precision plugin has changed that."""
        x = self._moved(x)
        return x.to(next(self.bare.parameters()).dtype) if x.is_floating_point() else x

    def _moved(self, x: Any) -> Tensor:
        return x.to(self.device, non_blocking=True)


class _Data:
    """Batches of both loaders in an order that is a function of the seed and the epoch."""

    def __init__(
        self,
        source: DataLoader[Any] | None,
        target: DataLoader[Any],
        validation: tuple[float, float] | None,
        weights: Sequence[float],
        seed: int,
        fabric: Any,
    ) -> None:
        self.rank = 0 if fabric is None else int(fabric.global_rank)
        self.world = 1 if fabric is None else int(fabric.world_size)
        self.seed = seed
        self.size = _batch_size(target, "target_loader")
        self.source_size = 0 if source is None else _batch_size(source, "source_loader")
        if source is not None and not len(source.dataset):  # pyright: ignore[reportArgumentType]
            raise ValueError("the source loader is empty; weights=(0, 1, 1) and source_loader=None go without a source")
        for name, size in (("target_loader", self.size), ("source_loader", self.source_size)):
            if size % self.world:
                raise ValueError(f"the batch of {size} of {name} cannot be shared by {self.world} processes")
        shares = (0.0, 0.0) if validation is None else validation
        self.has_validation = validation is not None
        needs = (source is not None and bool(weights[0]), bool(weights[1] or weights[2]))
        if self.has_validation and any(need and not share for need, share in zip(needs, shares, strict=True)):
            raise ValueError(f"validation={validation} holds nothing out of data whose loss has a weight; use validation=None for none")
        self._source, self._target = source, target
        self.count = len(target.dataset)  # pyright: ignore[reportArgumentType]
        self.source_count = 0 if source is None else len(source.dataset)  # pyright: ignore[reportArgumentType]
        self._source_train, self._source_held = _divide(source, shares[0], seed, "source")
        self._target_train, self._target_held = _divide(target, shares[1], seed, "target")
        batches = [
            part for part in self._target_train.split(self.size) if len(part) == self.size or (not target.drop_last and len(part) > 1)
        ]
        self.steps = len(batches)
        if self.world > 1 and len(self._target_train) % self.size:
            self.steps = len(self._target_train) // self.size  # processes share whole batches only
        if self.steps == 0:
            raise ValueError(
                f"the target loader yields no batch: {len(self._target_train)} training samples ({len(self._target_held)} held out), "
                f"batches of {self.size}, drop_last={target.drop_last}"
            )
        self._lengths = [len(part) for part in batches[: self.steps]]

    def epoch(self, number: int) -> Generator[tuple[Any, Any]]:
        order = self._target_train[torch.randperm(len(self._target_train), generator=generator(self.seed, "target order", number))]
        targets = self._loader(self._target, [self._share(part) for part in order[: sum(self._lengths)].split(self.size)], number)
        if self._source is None:
            for batch in targets:
                yield None, batch
            return
        stream = generator(self.seed, "source order", number)
        indices: list[Tensor] = []
        size = min(self.source_size, len(self._source_train) // self.world * self.world)
        if size == 0:
            raise ValueError(f"{len(self._source_train)} source samples are too few for {self.world} processes")
        while len(indices) < self.steps:  # cycled: a fresh order each time the source runs out
            shuffled = self._source_train[torch.randperm(len(self._source_train), generator=stream)]
            indices += [part for part in shuffled.split(size) if len(part) == size]
        sources = self._loader(self._source, [self._share(part) for part in indices[: self.steps]], number)
        yield from zip(sources, targets, strict=True)

    def all_targets(self) -> Iterable[Any]:
        everything = torch.arange(len(self._target.dataset))  # pyright: ignore[reportArgumentType]
        return self._loader(self._target, list(everything.split(self.size)), 0)

    def target_batches(self) -> Iterable[Any]:
        return self._loader(self._target, [part for part in self._target_train.split(self.size) if len(part) > 1], 0)

    def target_validation(self) -> Iterable[Any]:
        return self._loader(self._target, list(self._target_held.split(self.size)), 0)

    def source_validation(self) -> Iterable[Any]:
        return () if self._source is None else self._loader(self._source, list(self._source_held.split(self.source_size)), 0)

    def _share(self, part: Tensor) -> Tensor:
        return part.chunk(self.world)[self.rank]

    def _loader(self, like: DataLoader[Any], indices: list[Tensor], number: int) -> DataLoader[Any]:
        return DataLoader(
            like.dataset,
            batch_sampler=[part.tolist() for part in indices if len(part)],
            num_workers=like.num_workers,
            collate_fn=like.collate_fn,
            pin_memory=like.pin_memory,
            worker_init_fn=like.worker_init_fn,
            generator=generator(self.seed, "workers", number),
        )


def _rates(lr: Any) -> tuple[float, list[float]]:
    """The rate, or 0 and those to choose from."""
    if isinstance(lr, str):
        _checks.choice("lr", lr, ("auto",))
        return 0.0, list(RATES)
    if isinstance(lr, Real):
        return _checks.real("lr", lr, low=0.0, low_open=True), []
    return 0.0, [_checks.real("lr", float(value), low=0.0, low_open=True) for value in lr]


def best_rate(losses: Mapping[float, float]) -> float:
    """The rate with the least finite loss.

    Raises:
        DivergedError: there is none.
    """
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        tried = ", ".join(f"{rate:g}: {loss}" for rate, loss in losses.items())
        raise DivergedError(f"no learning rate gives a finite validation loss ({tried}); give smaller ones as lr=")
    return min(finite, key=lambda rate: finite[rate])


def _batch_size(loader: Any, name: str) -> int:
    if not isinstance(loader, DataLoader):
        raise TypeError(f"{name} must be a torch DataLoader (its data set, batch size and workers are used), got {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedError(f"{name} has an iterable data set; adapt_representation draws samples by number and needs a map-style one")
    if not isinstance(loader.sampler, SequentialSampler | RandomSampler) or loader.batch_size is None:
        raise UnsupportedError(
            f"{name} has a sampler of its own; the order is drawn here, so give a plain or shuffled loader with a batch size"
        )
    return loader.batch_size


def _divide(loader: DataLoader[Any] | None, share: float, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the held-out samples; at least two are held out where any are."""
    if loader is None:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    count = len(loader.dataset)  # pyright: ignore[reportArgumentType]
    held = max(2, round(share * count)) if share else 0
    if held and count - held < 1:
        raise ValueError(f"the {name} has {count} samples, too few to hold any out; give validation=None")
    order = torch.randperm(count, generator=generator(seed, f"{name} validation"))
    return order[held:].sort().values, order[:held].sort().values


def _check_target(batches: Iterable[Any], teacher: nn.Module, divided: nn.Module, device: torch.device, *, paired: bool) -> None:
    """Look at one batch before anything is computed: its form, and whether backbone and head are the teacher."""
    batch: Any = next(iter(batches))
    entries: list[Any] = list(batch) if isinstance(batch, tuple | list) else [batch]
    ids = torch.as_tensor(entries[-1]) if len(entries) > 1 else torch.empty(0)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError("target batches must be (inputs, ids), with the integer number of each sample (outlast.data.Indexed)")
    if paired and isinstance(entries[0], Tensor):
        raise ValueError("without views= target batches must be ((first view, second view), ids); here the first entry is one tensor")
    first = next(iter(teacher.parameters()), None)
    x = entries[0][0] if paired else entries[0]
    with eval_mode(teacher), eval_mode(divided), torch.no_grad():
        expected = teacher(x.to(device if first is None else first.device)).to(device).float()
        found = divided(x.to(device)).float()
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError("the teacher is not its last linear layer on what comes before it; give it as (backbone, head)")


def _has_batch_norm(module: nn.Module) -> bool:
    return any(is_batch_norm(part) and has_running_statistics(part) for part in module.modules())


def _follow(average: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move parameters and floating buffers towards the student's."""
    with torch.no_grad():
        for own, other in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
            if own.is_floating_point():
                own.lerp_(other.to(own.dtype), 1.0 - momentum)
            else:
                own.copy_(other)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()}


def _mean(terms: Sequence[tuple[float, int]]) -> float:
    count = sum(number for _, number in terms)
    return sum(value * number for value, number in terms) / count if count else 0.0


@contextlib.contextmanager
def _seeded(seed: int, name: str, device: torch.device, index: int = 0) -> Generator[None]:
    """Every global generator as a function of (seed, name, index) for a while; afterwards as they were.

    Transforms and dropout draw from them, and they are the user's: they cannot be given a generator.
    """
    with seeded(derived_seed(seed, name, index), device):
        yield


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getvalue())


def _read(path: Path, digest: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found, kept = str(saved["digest"]), dict(saved["settings"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise DamagedFileError(f"{path} cannot be read whole ({error}); remove it to start anew") from error
    if found != digest:
        raise ValueError(f"{path} is of other pseudo-labels: its digest is {found}, that of these is {digest}")
    for name in sorted({*kept, *settings}):
        if kept.get(name) != settings.get(name):
            raise ValueError(
                f"{path} is of another run: {name} was {kept.get(name)!r}, it is {settings.get(name)!r} now; remove it to start anew"
            )
    return saved
