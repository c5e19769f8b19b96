"""Which tasks belong together: cosines of their gradients, the measuring half of gradient vaccine.

Wang, Tsvetkov, Firat, Cao, ICLR 2021, section 3: similarity along training follows the kinship of languages.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from outlast._core._batches import rows_of, some_rows
from outlast._core._distributed import unwrapped
from outlast._core._extras import require
from outlast._core._norm import eval_mode
from outlast._core._result import JSON, Result, to_json
from outlast.errors import OutlastWarning
from outlast.multitask._groups import Groups, partition
from outlast.multitask._vectors import dot
from outlast.multitask._vectors import gram as gram_of

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, repr=False)
class SimilarityResult(Result):
    """Cosines of tasks' gradients, float64 on the CPU; K groups, T tasks.

    Attributes:
        tasks: in the order of the matrices' axes.
        groups: names of the groups of parameters.
        cosine: within each group, ``(K, T, T)``.
        overall: over all parameters together, ``(T, T)``.
        debiased: whether the noise's share was taken out of the norms.
    """

    tasks: tuple[Hashable, ...]
    groups: tuple[str, ...]
    cosine: Tensor
    overall: Tensor
    debiased: bool

    def nearest(self) -> dict[Hashable, Hashable]:
        """For each task the other one with the highest overall cosine."""
        others = self.overall.clone().fill_diagonal_(-float("inf"))
        return {task: self.tasks[int(others[i].argmax())] for i, task in enumerate(self.tasks)}

    def order(self) -> tuple[Hashable, ...]:
        """Tasks in the order of an average-linkage clustering of ``1 - cosine`` (scipy, extra ``train``)."""
        if len(self.tasks) < 3:
            return self.tasks
        hierarchy: Any = require("scipy.cluster.hierarchy", extra="train", purpose="clustering tasks")
        leaves: list[int] = hierarchy.leaves_list(self._linkage(hierarchy)).tolist()
        return tuple(self.tasks[leaf] for leaf in leaves)

    def clusters(self, count: int) -> tuple[tuple[Hashable, ...], ...]:
        """At most ``count`` groups of tasks, by the same clustering.

        Raises:
            ValueError: ``count`` is not between 1 and the number of tasks.
        """
        if not 1 <= count <= len(self.tasks):
            raise ValueError(f"count must lie between 1 and the {len(self.tasks)} tasks, got {count}")
        if len(self.tasks) == 1:
            return (self.tasks,)
        hierarchy: Any = require("scipy.cluster.hierarchy", extra="train", purpose="clustering tasks")
        labels: list[int] = hierarchy.fcluster(self._linkage(hierarchy), count, "maxclust").tolist()
        found: dict[int, list[Hashable]] = {}
        for task, label in zip(self.tasks, labels, strict=True):
            found.setdefault(label, []).append(task)
        return tuple(tuple(members) for members in found.values())

    def _linkage(self, hierarchy: Any) -> Any:
        rows, columns = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        return hierarchy.linkage((1.0 - self.overall[rows, columns]).numpy(), "average", optimal_ordering=True)

    def to_dict(self) -> dict[str, JSON]:
        """All fields as JSON types; names of tasks that have no JSON form by their ``repr``."""
        names = [task if isinstance(task, str | int) else repr(task) for task in self.tasks]
        rest = {name: to_json(getattr(self, name)) for name in ("groups", "cosine", "overall", "debiased")}
        return {"kind": type(self).__name__, "version": self.version, "tasks": list[JSON](names), **rest}

    def _draw(self, ax: Any) -> None:
        order = [self.tasks.index(task) for task in self.order()]
        picture = ax.imshow(self.overall[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu")
        ax.figure.colorbar(picture, ax=ax, label="cosine of gradients")
        names = [str(self.tasks[number]) for number in order]
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)


@dataclass
class _Halves:
    """A task's gradient as the parts that two halves of its rows give, which add up to it."""

    first: list[Tensor]
    second: list[Tensor] | None = None
    share: float = 1.0  # of the rows that gave the first part

    def whole(self, number: int) -> Tensor:
        return self.first[number] if self.second is None else self.first[number] + self.second[number]

    def clean_square(self, number: int) -> float:
        """Squared norm without the noise's share: the two halves' noises are independent."""
        assert self.second is not None
        return float(dot(self.first[number], self.second[number])) / (self.share * (1.0 - self.share))


def gradient_similarity(
    model: nn.Module,
    losses: Mapping[Hashable, Tensor] | Mapping[Hashable, Iterable[Any]],
    *,
    loss_fn: LossFn | None = None,
    groups: Groups = "layer",
    debias: bool = True,
    parameters: Iterable[nn.Parameter] | None = None,
) -> SimilarityResult:
    """Cosines between the gradients of tasks.

    Args:
        model: whose parameters the gradients belong to.
        losses: for each task a loss (a scalar, or one value a row), or an iterable of batches together with ``loss_fn``.
            With batches the model is in eval mode, and a task's gradient is the mean over its rows.
        loss_fn: ``loss_fn(model, batch)``, the mean over the batch.
        groups: as in ``GradVac``.
        debias: take the noise's share out of the norms, from the inner product of gradients of two halves of each task's
            rows: without it noise pulls every cosine towards 0. Each task must have rows of its own (losses on the same rows
            share their noise). Needs rows; with scalar losses a warning says that it is off.
        parameters: those that count; None for all that train.

    Raises:
        ValueError: fewer than two tasks, no batches, a loss that depends on no parameter, gradients that are not finite.
        TypeError: batches without ``loss_fn``.
    """
    if not isinstance(losses, Mapping) or len(losses) < 2:
        raise ValueError("losses must be a mapping that holds at least two tasks")
    bare = unwrapped(model)
    chosen = [p for p in (bare.parameters() if parameters is None else parameters) if p.requires_grad]
    names_of = {id(parameter): name for name, parameter in bare.named_parameters()}
    if any(id(parameter) not in names_of for parameter in chosen):
        raise ValueError("parameters holds some that the model does not have")
    parts = partition(chosen, [names_of[id(p)] for p in chosen], groups, known=True)
    halves: dict[Hashable, _Halves] = {}
    for number, (task, given) in enumerate(losses.items()):
        if isinstance(given, Tensor):
            halves[task] = _from_loss(task, given, chosen, debias=debias, keep=number + 1 < len(losses))
        elif loss_fn is None:
            raise TypeError(f"task {task!r} gives a {type(given).__name__}: batches need loss_fn=, a loss is a tensor")
        else:
            with eval_mode(bare):
                halves[task] = _from_batches(task, bare, given, loss_fn, chosen, debias=debias)
    split = debias and all(own.second is not None for own in halves.values())
    if debias and not split:
        warnings.warn(
            "debias needs rows: give one value a row instead of a scalar loss, or batches of at least two rows. Cosines are not debiased",
            OutlastWarning,
            stacklevel=2,
        )
    grams: list[Tensor] = []
    clean: list[Tensor] = []
    tasks = list(halves)
    for part in parts:
        sums = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        squares = torch.zeros(len(tasks), dtype=torch.float64)
        for n in part.members:
            rows = [own.whole(n).reshape(-1) for own in halves.values()]
            sums += gram_of(rows)
            if split:
                squares += torch.tensor([own.clean_square(n) for own in halves.values()], dtype=torch.float64)
        grams.append(sums)
        clean.append(squares if split else sums.diagonal())
    gram, square = torch.stack(grams), torch.stack(clean)
    if not torch.isfinite(gram).all():
        bad = [repr(task) for task, finite in zip(tasks, gram.sum(0).diagonal().isfinite().tolist(), strict=True) if not finite]
        raise ValueError(f"the gradient of {', '.join(bad) or 'a task'} is not finite")
    cosine = _cosines(gram, square)
    return SimilarityResult(
        tuple(tasks), tuple(part.name for part in parts), cosine, _cosines(gram.sum(0, keepdim=True), square.sum(0, keepdim=True))[0], split
    )


def _cosines(gram: Tensor, square: Tensor) -> Tensor:
    """``(K, T, T)`` from Gram matrices and squared norms ``(K, T)``, which are not trusted below a thousandth of the naive ones."""
    norm = square.maximum(1e-3 * gram.diagonal(dim1=1, dim2=2)).sqrt()
    cosine = (gram / (norm[:, :, None] * norm[:, None, :]).clamp(min=1e-300)).clamp(-1.0, 1.0)
    eye = torch.eye(gram.shape[1], dtype=torch.bool)
    return torch.where(eye, (norm > 0).double()[:, :, None], cosine)


def _from_loss(task: Hashable, loss: Tensor, chosen: list[nn.Parameter], *, debias: bool, keep: bool) -> _Halves:
    if loss.ndim > 1:
        raise ValueError(f"the loss of task {task!r} must be a scalar or one value a row, got shape {tuple(loss.shape)}")
    if debias and loss.ndim == 1 and len(loss) > 1:
        half = len(loss) // 2
        first = _gradient(task, loss[:half].sum() / len(loss), chosen, keep=True)
        return _Halves(first, _gradient(task, loss[half:].sum() / len(loss), chosen, keep=keep), half / len(loss))
    return _Halves(_gradient(task, loss.mean(), chosen, keep=keep))


def _from_batches(
    task: Hashable, model: nn.Module, batches: Iterable[Any], loss_fn: LossFn, chosen: list[nn.Parameter], *, debias: bool
) -> _Halves:
    sums: dict[int, list[Tensor]] = {}
    counts = [0, 0]
    for batch, half in _halves(batches, debias=debias):
        rows = rows_of(batch) or 1
        grads = [grad * rows for grad in _gradient(task, loss_fn(model, batch), chosen, keep=False)]
        sums[half] = [a + b for a, b in zip(sums[half], grads, strict=True)] if half in sums else grads
        counts[half] += rows
    if not sums:
        raise ValueError(f"task {task!r} has no batches")
    total = sum(counts)
    first = [grad / total for grad in sums[0]]
    return _Halves(first) if 1 not in sums else _Halves(first, [grad / total for grad in sums[1]], counts[0] / total)


def _halves(batches: Iterable[Any], *, debias: bool) -> Iterable[tuple[Any, int]]:
    """Batches with the half that each belongs to: by turns, a single one cut in two."""
    stream = iter(batches)
    ahead = list(itertools.islice(stream, 2))
    rows = rows_of(ahead[0]) if ahead else None
    if debias and len(ahead) == 1 and rows is not None and rows > 1:
        return [(some_rows(ahead[0], slice(0, rows // 2)), 0), (some_rows(ahead[0], slice(rows // 2, None)), 1)]
    return ((batch, number % 2 if debias else 0) for number, batch in enumerate(itertools.chain(ahead, stream)))


def _gradient(task: Hashable, loss: Tensor, chosen: list[nn.Parameter], *, keep: bool) -> list[Tensor]:
    if loss.ndim != 0 or not loss.requires_grad:
        raise ValueError(f"the loss of task {task!r} must be a scalar that depends on the model, got shape {tuple(loss.shape)}")
    found: Any = torch.autograd.grad(loss, chosen, retain_graph=keep, allow_unused=True)
    if all(grad is None for grad in found):
        raise ValueError(f"the loss of task {task!r} depends on no parameter that counts")
    grads = [grad.to_dense() if grad is not None and grad.is_sparse else grad for grad in found]
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(chosen, grads, strict=True)]
