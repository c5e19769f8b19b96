"""Which examples the easy cue explains, found from an early model without labels of the cue.

Ahmed, Bengio, van Seijen, Courville, ICLR 2021, section 3: per class a small network on frozen features splits the examples so
that risk and invariance are violated most. Creager, Jacobsen, Zemel, "Environment Inference for Invariant Learning", ICML
2021 (``"eiil"``, here in closed form); Liu et al., "Just Train Twice", ICML 2021 (``"error"``).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from outlast._core import _checks
from outlast._core._batches import call_with, device_of
from outlast._core._calls import eager
from outlast._core._distributed import gather, spread_buffers, unwrapped, world_size
from outlast._core._files import load_arrays, save_arrays
from outlast._core._norm import eval_mode, has_running_statistics, is_batch_norm
from outlast._core._norm import recalibrate_batchnorm as recalibrate
from outlast._core._random import generator as derived_generator
from outlast._core._result import Result
from outlast._core._typing import Float, Int
from outlast.errors import OutlastWarning

Method = Literal["partition", "eiil", "loss", "error"]
_VERSION = 1
_WIDTHS = (64, 32, 21)
_BLOCK = 1 << 24  # numbers of the gathered features of a block of classes


@dataclass(frozen=True, repr=False)
class ClassSplit(Result):
    """How one class was split.

    Attributes:
        label: class id.
        sizes: examples in group 0 and in group 1.
        losses: mean loss of the reference model in both; NaN for an empty group.
        objective: value of the split's objective (``"partition"``, the larger the better); NaN for the other methods.
        split: whether the class has two groups.
        reason: why not, if not.
    """

    label: int
    sizes: tuple[int, int]
    losses: tuple[float, float]
    objective: float
    split: bool
    reason: str = ""


@dataclass(frozen=True, repr=False)
class GroupPartition(Result):
    """Two groups in each class: 0 for what the cue explains, 1 for the rest. No evidence of a bias by itself.

    Without any bias group 1 is simply the hard examples, split off as cleanly and repeatably; see
    ``outlast.diagnose.shortcuts.shortcut_probe``.

    Attributes:
        groups: int64, shape ``(n,)``: 0, 1, or -1 for a number that no example had.
        scores: membership of group 1, float32, shape ``(n,)``; about 0.5 is undecided.
        classes: one entry a class.
        reference_accuracy: share of examples that the reference model classifies rightly.
        stability: mean pairwise Cohen's kappa over restarts; 1 for methods without restarts.
        labels: class ids, shape ``(n,)``; -1 likewise.
    """

    groups: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    classes: tuple[ClassSplit, ...]
    reference_accuracy: float
    stability: float
    labels: Int[Tensor, " n"]

    @property
    def usable(self) -> bool:
        """Whether any class has two groups."""
        return any(entry.split for entry in self.classes)

    @property
    def minority(self) -> float:
        """Share of the examples in group 1."""
        return float((self.groups == 1).sum() / (self.groups >= 0).sum().clamp(min=1))

    def __repr__(self) -> str:
        unsplit = sum(not entry.split for entry in self.classes)
        left = f", {unsplit} unsplit" if unsplit else ""
        return (
            f"GroupPartition({len(self.groups)} examples, {100 * self.minority:.1f} % in group 1, {len(self.classes)} classes{left}, "
            f"reference accuracy {self.reference_accuracy:.3f}, stability {self.stability:.2f})"
        )

    def _draw(self, ax: Any) -> None:
        names = [str(entry.label) for entry in self.classes]
        ax.bar(names, [entry.sizes[0] for entry in self.classes], label="group 0")
        ax.bar(names, [entry.sizes[1] for entry in self.classes], bottom=[entry.sizes[0] for entry in self.classes], label="group 1")
        ax.set_xlabel("class")
        ax.set_ylabel("examples")
        ax.legend()

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``, whole or not at all."""
        entries = self.classes
        arrays = {
            "groups": self.groups.numpy(),
            "scores": self.scores.numpy(),
            "labels": self.labels.numpy(),
            "summary": np.asarray([self.reference_accuracy, self.stability]),
            "class_labels": np.asarray([entry.label for entry in entries]),
            "sizes": np.asarray([entry.sizes for entry in entries]),
            "losses": np.asarray([entry.losses for entry in entries]),
            "objectives": np.asarray([entry.objective for entry in entries]),
            "split": np.asarray([entry.split for entry in entries]),
            "reasons": np.asarray([entry.reason for entry in entries]),
        }
        save_arrays(path, _VERSION, arrays)

    @classmethod
    def load(cls, path: str | Path) -> GroupPartition:
        """Read what ``save`` wrote; nothing is unpickled.

        Raises:
            DamagedFileError: the file cannot be read whole.
        """
        with load_arrays(path, _VERSION, "partition") as data:
            columns = (data[name].tolist() for name in ("class_labels", "sizes", "losses", "objectives", "split", "reasons"))
            entries = tuple(
                ClassSplit(label, (s[0], s[1]), (m[0], m[1]), objective, split, reason)
                for label, s, m, objective, split, reason in zip(*columns, strict=True)
            )
            groups, scores, labels = (torch.from_numpy(data[name]) for name in ("groups", "scores", "labels"))
            accuracy, stability = data["summary"].tolist()
        return cls(groups, scores, entries, accuracy, stability, labels)


def infer_groups(
    features: Float[Tensor, "n dim"],
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    *,
    method: Method = "partition",
    gamma: float = 10.0,
    temperature: float = 10.0,
    steps: int = 100,
    lr: float = 1e-4,
    batch_size: int = 512,
    quantile: float = 0.8,
    restarts: int = 3,
    generator: torch.Generator | None = None,
) -> GroupPartition:
    """Split each class into what the easy cue explains (group 0) and the rest (group 1), from an early model.

    ``"partition"`` maximises, with a small network a class on the features, the risk of both parts and ``gamma`` times the
    squared gradient of their risks with respect to multipliers of the logits. Its small size, temperature and number of steps
    are what keeps it from isolating a few extreme losses: do not train it longer.

    Args:
        features: of the reference model, before its head, ``(n, D)``.
        logits: of the same examples, ``(n, K)``.
        labels: class ids.
        method: ``"partition"``; ``"eiil"`` (one split of all examples by the sign of their gradient, the optimum of that
            method's objective); ``"loss"`` (the highest losses of each class); ``"error"`` (misclassified examples).
        gamma: weight of the gradients; 10 for coloured digits, 0.1 and below for natural images in the paper's code.
        temperature: of the memberships, ``(1 + tanh(g / T)) / 2``.
        steps: of Adam.
        lr: of Adam.
        batch_size: examples of a class in a step.
        quantile: share of each class that ``"loss"`` leaves in group 0.
        restarts: independent fits; that with the best objective is taken, class by class, and their agreement is ``stability``.
        generator: of starts and batches; None for a fixed seed.

    Raises:
        ValueError: shapes that do not fit, ids out of range, values that are not finite, an option out of its range.
        TypeError: floating-point labels.

    Warns:
        OutlastWarning: a reference model at chance, or fitted to the end; restarts that agree little (kappa below 0.7).
    """
    _checks.choice("method", method, ("partition", "eiil", "loss", "error"))
    _check_inputs(features, logits, labels)
    gamma = _checks.real("gamma", gamma, low=0.0)
    temperature = _checks.real("temperature", temperature, low=0.0, low_open=True)
    share = _checks.real("quantile", quantile, low=0.0, high=1.0)
    counts = [_checks.integer(name, value, low=1) for name, value in (("steps", steps), ("batch_size", batch_size), ("restarts", restarts))]
    lr = _checks.real("lr", lr, low=0.0, low_open=True)
    with torch.inference_mode(False):  # features often come from there
        f, z = (values.detach().to("cpu", torch.float32, copy=True) for values in (features, logits))
        y = labels.detach().to("cpu", torch.int64, copy=True)
    log_probs = z.log_softmax(1)
    losses = -log_probs.gather(1, y[:, None])[:, 0]
    accuracy = float((z.argmax(1) == y).double().mean())
    _warn_about_reference(accuracy, float(losses.mean()), z.shape[1])
    members = {c: (y == c).nonzero()[:, 0] for c in y.unique().tolist()}
    reasons = {c: _unsplittable(f[own], losses[own], method) for c, own in members.items()}
    open_classes = {c: own for c, own in members.items() if not reasons[c]}
    groups, scores = torch.zeros(len(y), dtype=torch.int64), torch.zeros(len(y))
    objectives: dict[int, float] = {}
    stability = 1.0
    if method == "partition" and open_classes:
        rng = derived_generator(0, "infer_groups") if generator is None else generator
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            found = _partition(f, z, losses.clone(), y, open_classes, gamma, temperature, lr, rng, *counts)
        groups, scores, objectives, stability = found
        if stability < 0.7:
            warnings.warn(
                f"restarts agree little on the groups (Cohen's kappa {stability:.2f}): the split may be noise", OutlastWarning, stacklevel=2
            )
    elif method == "eiil":
        values = (log_probs.exp() * z).sum(1) - z.gather(1, y[:, None])[:, 0]  # of (softmax - one-hot) . z
        scores = (values > 0).float()
        groups = scores.long()
        if float(losses[groups == 1].mean()) < float(losses[groups == 0].mean()):  # the optimum is the same with both groups exchanged
            groups, scores = 1 - groups, 1.0 - scores
    elif method == "loss":
        for own in open_classes.values():
            ranks = losses[own].argsort().argsort().float()
            scores[own] = (ranks + 0.5) / len(own)
            groups[own] = (losses[own] > losses[own].quantile(share)).long()
    elif method == "error":
        groups = (z.argmax(1) != y).long()
        scores = groups.float()
    entries = _class_splits(y, groups, losses, objectives, reasons)
    for entry in entries:
        if not entry.split:
            groups[members[entry.label]], scores[members[entry.label]] = 0, 0.0
    return GroupPartition(groups, scores, entries, accuracy, stability, y)


def collect_features(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | nn.Module,
    recalibrate_batchnorm: bool = True,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features before a model's head, logits and labels over a loader, in eval mode.

    Args:
        model: classifier.
        loader: batches ``(inputs, labels, ...)`` with the evaluation transform.
        head: the layer that turns features ``(B, D)`` into logits, or its name.
        recalibrate_batchnorm: estimate the statistics of BatchNorm layers anew before (a second pass); they stay. A few epochs
            into training running statistics lag, which ruins the split.
        device: where inputs go; None for where the model's parameters are.

    Returns:
        ``(features (n, D), logits (n, K), labels (n,))`` on the CPU.

    Raises:
        ValueError: no batches, a head that the model does not have or that did not run, features that are no rows.
    """
    return collect(model, loader, head=head, recalibrate_batchnorm=recalibrate_batchnorm, device=device)[:3]


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    head: str | nn.Module,
    recalibrate_batchnorm: bool,
    device: torch.device | str | None,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As ``collect_features``, with the numbers of the examples where batches end in them.

    ``together``: all processes take part, and go on with the first one's statistics.
    """
    bare = unwrapped(model)
    layer = find_head(bare, head)
    place = device_of(bare, device)

    def inputs(batch: Any) -> Any:
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            raise ValueError("batches must be (inputs, labels) or (inputs, labels, numbers)")
        return batch[0].to(place) if isinstance(batch[0], Tensor) else batch[0]

    if recalibrate_batchnorm and any(is_batch_norm(module) and has_running_statistics(module) for module in bare.modules()):
        recalibrate(bare, (inputs(batch) for batch in loader))
        if together:
            spread_buffers(bare)  # processes see other parts of the data
    seen: list[Tensor] = []
    handle = catch(layer, seen)
    columns: list[tuple[Tensor, ...]] = []
    try:
        with eager(), eval_mode(bare), torch.no_grad():
            for batch in loader:
                seen.clear()
                logits = logits_of(call_with(bare, inputs(batch)))
                columns.append(
                    (features_of(seen, head).float().cpu(), logits.float().cpu(), *(torch.as_tensor(v).cpu() for v in batch[1:3]))
                )
    finally:
        handle.remove()
    if not columns:
        raise ValueError("the loader gave no batches (it is gone through twice where there is BatchNorm: an iterator will not do)")
    features, logits, labels, *numbers = (torch.cat(parts) for parts in zip(*columns, strict=True))
    return features, logits, labels, numbers[0] if numbers else None


def find_head(model: nn.Module, head: str | nn.Module) -> nn.Module:
    """The head itself.

    Raises:
        ValueError: the model does not have it.
    """
    names = dict(model.named_modules())
    if isinstance(head, str):
        if head not in names or head == "":
            raise ValueError(f"the model has no layer {head!r}; its last layers: {', '.join(list(names)[-5:])}")
        return names[head]
    if head not in names.values():
        raise ValueError(f"the {type(head).__name__} given as head is no part of the model")
    return head


def catch(head: nn.Module, seen: list[Tensor]) -> RemovableHandle:
    """Append what the head gets to ``seen``, until the handle is removed."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append([*args, *kwargs.values()][0])

    return head.register_forward_pre_hook(hook, with_kwargs=True)


def features_of(seen: list[Tensor], head: str | nn.Module) -> Tensor:
    """What the head got in one forward pass."""
    name = repr(head) if isinstance(head, str) else type(head).__name__
    if len(seen) != 1:
        raise ValueError(f"the head {name} ran {len(seen)} times in a forward pass, it must run once")
    if seen[0].ndim != 2:
        raise ValueError(f"the head {name} gets {tuple(seen[0].shape)}, features must be rows (B, D); name the layer after pooling")
    return seen[0]


def logits_of(output: Any) -> Tensor:
    """A model's logits, those of transformers' outputs too."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ValueError(f"the model must give logits (B, K), it gives {getattr(found, 'shape', type(output).__name__)}")
    return found


def by_number(partition: GroupPartition, numbers: Tensor) -> GroupPartition:
    """The partition with a place for every number up to the largest."""
    size = int(numbers.max()) + 1
    if size == len(numbers):
        return partition
    groups, labels, scores = torch.full((size,), -1), torch.full((size,), -1), torch.zeros(size)
    groups[numbers], labels[numbers], scores[numbers] = partition.groups, partition.labels, partition.scores
    return replace(partition, groups=groups, scores=scores, labels=labels)


def of_all_processes(features: Tensor, logits: Tensor, labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The examples of all processes, each once (distributed samplers repeat some), ordered by their numbers."""
    if world_size() > 1:
        parts = gather((features, logits, labels, numbers))
        features, logits, labels, numbers = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = numbers.argsort(stable=True)
    ordered = numbers[order]
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), ordered[1:] != ordered[:-1]])]
    return features[order], logits[order], labels[order], numbers[order]


def cohen_kappa(one: Tensor, two: Tensor) -> float:
    """Agreement of two splits beyond chance."""
    agree = float((one == two).double().mean())
    p, q = float(one.double().mean()), float(two.double().mean())
    chance = p * q + (1.0 - p) * (1.0 - q)
    return 1.0 if chance == 1.0 else (agree - chance) / (1.0 - chance)


def _check_inputs(features: Tensor, logits: Tensor, labels: Tensor) -> None:
    n = len(labels)
    if features.ndim != 2 or logits.ndim != 2 or labels.ndim != 1 or len(features) != n or len(logits) != n:
        raise ValueError(
            "features must be (n, D), logits (n, K), labels (n,), got "
            f"{tuple(features.shape)}, {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if n == 0:
        raise ValueError(f"features have no rows: shape {tuple(features.shape)}")
    if labels.is_floating_point():
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if logits.shape[1] < 2:
        raise ValueError("logits have one class: there is nothing to predict")
    if bool(((labels < 0) | (labels >= logits.shape[1])).any()):
        raise ValueError(f"labels must be in [0, {logits.shape[1]}), got {int(labels.min())} to {int(labels.max())}")
    for values in (features, logits):  # a sum is cheap; it is not finite for large finite values either
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise ValueError("features and logits must be finite")


def _warn_about_reference(accuracy: float, loss: float, classes: int) -> None:
    if accuracy <= 1.5 / classes:
        warnings.warn(
            f"the reference model is at chance ({100 * accuracy:.1f} % of {classes} classes): trained too little to show a bias",
            OutlastWarning,
            stacklevel=3,
        )
    elif accuracy == 1.0 and loss < 1e-4:
        warnings.warn("the reference model fits every example: trained too long to show a bias", OutlastWarning, stacklevel=3)


def _unsplittable(features: Tensor, losses: Tensor, method: str) -> str:
    if len(losses) < 4:
        return "fewer than 4 examples"
    if method == "partition" and bool((features == features[0]).all()):
        return "constant features"
    return "all losses equal" if bool((losses == losses[0]).all()) else ""


def _class_splits(
    y: Tensor, groups: Tensor, losses: Tensor, objectives: dict[int, float], reasons: dict[int, str]
) -> tuple[ClassSplit, ...]:
    sizes = torch.bincount(2 * y + groups, minlength=2 * (max(reasons) + 1)).reshape(-1, 2).tolist()
    sums = torch.bincount(2 * y + groups, weights=losses.double(), minlength=2 * (max(reasons) + 1)).reshape(-1, 2).tolist()
    found: list[ClassSplit] = []
    for label, reason in reasons.items():
        (n0, n1), (s0, s1), objective = sizes[label], sums[label], objectives.get(label, math.nan)
        if reason or 0 in (n0, n1):
            mean = (s0 + s1) / (n0 + n1)
            reason = reason or "all examples fell in one group"
            found.append(ClassSplit(label, (n0 + n1, 0), (mean, math.nan), objective, False, reason))
        else:
            found.append(ClassSplit(label, (n0, n1), (s0 / n0, s1 / n1), objective, True))
    return tuple(found)


# ---- the partition network, for all classes and restarts at once ---------------------------------------------------------------


def _partition(
    f: Tensor,
    z: Tensor,
    losses: Tensor,
    y: Tensor,
    members: dict[int, Tensor],
    gamma: float,
    temperature: float,
    lr: float,
    rng: torch.Generator,
    steps: int,
    batch_size: int,
    restarts: int,
) -> tuple[Tensor, Tensor, dict[int, float], float]:
    gradients = (z.softmax(1) - F.one_hot(y, z.shape[1])) * z  # of the loss with respect to multipliers of the logits, at 1
    every = torch.zeros(restarts, len(y), dtype=torch.int64)
    groups, scores = torch.zeros(len(y), dtype=torch.int64), torch.zeros(len(y), dtype=f.dtype)
    objectives: dict[int, float] = {}
    at_once = max(1, _BLOCK // (restarts * batch_size * f.shape[1]))
    classes = list(members)
    for start in range(0, len(classes), at_once):
        block = classes[start : start + at_once]
        nets = _Splitters(restarts * len(block), f.shape[1], rng)
        optimizer = torch.optim.Adam(nets.parameters, lr=lr)
        for _ in range(steps):
            index, mask = _draw([members[c] for c in block], restarts, batch_size, rng)
            value = _objective(nets(f[index]), losses[index], gradients[index], mask, gamma, temperature)
            optimizer.zero_grad()
            (-value.sum()).backward()
            optimizer.step()
        with torch.no_grad():
            for place, c in enumerate(block):
                own = members[c]
                chosen = slice(place * restarts, (place + 1) * restarts)
                raw = nets(f[own].expand(restarts, -1, -1), chosen)
                mask = torch.ones(restarts, len(own), dtype=f.dtype)
                value = _objective(raw, losses[own].expand(restarts, -1), gradients[own].expand(restarts, -1, -1), mask, gamma, temperature)
                member = torch.sigmoid(2.0 * raw / temperature)  # (1 + tanh(g / T)) / 2
                hard = member > 0.5
                one_sided = hard.all(1) | ~hard.any(1)
                hard[one_sided] = False  # no split, whichever side it was
                value = value.masked_fill(one_sided & bool((~one_sided).any()), -math.inf)
                for r in range(restarts):
                    if not one_sided[r] and losses[own][hard[r]].mean() < losses[own][~hard[r]].mean():
                        member[r] = 1.0 - member[r]
                        hard[r] = ~hard[r]
                every[:, own] = hard.long()
                best = int(value.argmax())
                groups[own], scores[own] = hard[best].long(), member[best]
                objectives[c] = float(value[best])
    everyone = torch.cat(list(members.values()))
    pairs = list(itertools.combinations(range(restarts), 2))
    kappas = [cohen_kappa(every[a, everyone], every[b, everyone]) for a, b in pairs]
    return groups, scores, objectives, sum(kappas) / len(kappas) if kappas else 1.0


def _draw(members: list[Tensor], restarts: int, batch_size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Examples for every network, without replacement; classes smaller than the batch are padded and masked."""
    size = min(batch_size, max(map(len, members)))
    index = torch.zeros(len(members) * restarts, size, dtype=torch.int64)
    mask = torch.zeros(len(members) * restarts, size, dtype=torch.float32)
    for place, own in enumerate(members):
        for row in range(place * restarts, (place + 1) * restarts):
            chosen = own if len(own) <= size else own[torch.randperm(len(own), generator=rng)[:size]]
            index[row, : len(chosen)] = chosen
            mask[row, : len(chosen)] = 1.0
    return index, mask


def _objective(raw: Tensor, losses: Tensor, gradients: Tensor, mask: Tensor, gamma: float, temperature: float) -> Tensor:
    """Half of the risks of both parts plus ``gamma`` times their squared gradients, shape ``(networks,)``."""
    member = torch.sigmoid(2.0 * raw / temperature)
    total = raw.new_zeros(len(raw))
    for weight in (member * mask, (1.0 - member) * mask):
        mass = weight.sum(1)
        risk = (weight * losses).sum(1) / mass
        slope = torch.bmm(weight[:, None], gradients)[:, 0] / mass[:, None]
        total = total + risk + gamma * slope.square().sum(1)
    return 0.5 * total


class _Splitters:
    """Perceptrons ``D -> 64 -> 32 -> 21 -> 1`` side by side, with spectral normalisation, LayerNorm without scale and ReLU."""

    def __init__(self, count: int, dim: int, rng: torch.Generator) -> None:
        widths = (dim, *_WIDTHS, 1)
        self.weights: list[Tensor] = []
        self.biases: list[Tensor] = []
        self.left: list[Tensor] = []
        for before, after in itertools.pairwise(widths):
            bound = math.sqrt(6.0 / (before + after))  # Glorot
            weight = (2.0 * torch.rand(count, before, after, generator=rng, dtype=torch.float32) - 1.0) * bound
            self.weights.append(weight.requires_grad_())
            self.left.append(F.normalize(torch.randn(count, before, 1, generator=rng, dtype=torch.float32), dim=1))
        self.biases = [torch.full((count, 1, width), 0.01, dtype=torch.float32, requires_grad=True) for width in _WIDTHS]
        for _ in range(15):
            self._norms()

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def _norms(self) -> list[Tensor]:
        """Largest singular values, by one step of power iteration from where the last one ended."""
        norms: list[Tensor] = []
        for place, weight in enumerate(self.weights):
            with torch.no_grad():
                right = F.normalize(weight.mT @ self.left[place], dim=1)
                self.left[place] = F.normalize(weight @ right, dim=1)
            norms.append(self.left[place].mT @ weight @ right)
        return norms

    def __call__(self, rows: Tensor, chosen: slice = slice(None)) -> Tensor:
        """Raw memberships ``(networks, rows)`` of ``(networks, rows, dim)``."""
        norms = (
            self._norms()
            if torch.is_grad_enabled()
            else [u.mT @ w @ F.normalize(w.mT @ u, dim=1) for u, w in zip(self.left, self.weights, strict=True)]
        )
        h = rows
        for weight, bias, norm in zip(self.weights[:-1], self.biases, norms[:-1], strict=True):
            h = torch.baddbmm(bias[chosen], h, (weight / norm)[chosen])
            h = F.layer_norm(h, h.shape[-1:]).relu()
        return torch.bmm(h, (self.weights[-1] / norms[-1])[chosen])[..., 0]
