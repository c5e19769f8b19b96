"""The three losses of STARTUP: source labels, the teacher's soft labels on target data, agreement of two views.

Phoo, Hariharan, "Self-training for Few-shot Transfer Across Extreme Task Differences", ICLR 2021, section 3.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outlast._core import _checks, _distributed
from outlast._core._norm import BufferSnapshot, is_batch_norm
from outlast._core._typing import Float

Gather = bool | Literal["auto"]
Reduction = Literal["mean", "sum", "none"]
_TINY = 1e-12
_TOLERANCE = 1e-3


def nt_xent(
    z1: Float[Tensor, "batch width"],
    z2: Float[Tensor, "batch width"],
    *,
    temperature: float = 1.0,
    gather: Gather = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Normalised temperature-scaled cross-entropy between two views (SimCLR's loss; STARTUP's L_ss).

    Each of the 2B rows has one positive, the other view of its sample, and 2B - 2 negatives; similarity is the cosine over
    ``temperature``. It runs in float32 (float64 for such input) whatever the autocast type. A zero row has cosine 0 with
    everything and gets no gradient.

    Args:
        z1: projections of one view, ``(B, p)``.
        z2: of the other, in the same order.
        temperature: the paper's code has 1.0; SimCLR usually 0.1 to 0.5.
        gather: take the rows of all processes as negatives, with gradient. Value, and gradient once it is averaged over
            processes as DistributedDataParallel does, are those of one process with all rows; batches may differ in size.
            ``"auto"``: where there are several processes.
        reduction: ``"mean"``, ``"sum"`` over this process's rows, or ``"none"``: ``(2B,)``, first those of ``z1``.

    Raises:
        ValueError: different shapes, fewer than two samples (one has no negative), a temperature that is not positive.
        TypeError: integers.
    """
    _checks.real("temperature", temperature, low=0.0, low_open=True)
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    if not isinstance(gather, bool):
        _checks.choice("gather", gather, ("auto",))
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must have one shape (batch, width), got {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not z1.is_floating_point() or not z2.is_floating_point():
        raise TypeError(f"projections must be floating, got {z1.dtype} and {z2.dtype}")
    size = len(z1)
    several = bool(gather) and _distributed.world_size() > 1
    with torch.autocast(z1.device.type, enabled=False):
        first, second = _unit(z1), _unit(z2)
        offset, total = 0, size
        every = torch.cat([first, second])
        columns = every
        if several:
            sizes = _distributed.gather(size)
            offset, total = sum(sizes[: _distributed.rank()]), sum(sizes)
            columns = torch.cat([_from_all(first, sizes), _from_all(second, sizes)])
        if total < 2:
            raise ValueError("NT-Xent needs at least 2 samples: one alone has no negative, so its loss is always 0")
        own = torch.arange(offset, offset + size, device=z1.device)
        # A row is not its own negative. Minus infinity is added, not written over: that would copy the matrix once more going back
        similarity = every.new_zeros(2 * size, 2 * total).scatter_(1, torch.cat([own, own + total])[:, None], -torch.inf)
        similarity = torch.addmm(similarity, every, columns.T, alpha=1.0 / temperature)
        losses = F.cross_entropy(similarity, torch.cat([own + total, own]), reduction="none" if reduction == "none" else "sum")
        if reduction != "mean":
            return losses
        if not several:
            return losses / (2 * total)
        share = losses * _distributed.world_size() / (2 * total)
        everywhere = _distributed.sum_(losses.detach().clone()) / (2 * total)
        return share + (everywhere - share.detach())  # the value of all rows with the gradient of this process's share


def soft_distillation(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_probs: Float[Tensor, "*rows classes"],
    *,
    reduction: Literal["batchmean", "sum", "none"] = "batchmean",
) -> Tensor:
    """Kullback-Leibler divergence from the teacher's probabilities to the student's (STARTUP's L_kd).

    Args:
        student_logits: ``(..., B, K)``.
        teacher_probs: ``(B, K)``, rows that sum to 1 (checked on the CPU, where that needs no synchronisation, outside of
            ``torch.compile``). They get no gradient. Leading dimensions of the logits (views) share them.
        reduction: ``"batchmean"``: mean over all rows; ``"sum"``; ``"none"``: ``(..., B)``.

    Raises:
        ValueError: shapes that do not fit, or a row that is no distribution (its number is named).
    """
    _checks.choice("reduction", reduction, ("batchmean", "sum", "none"))
    if student_logits.ndim < 2 or student_logits.shape[-2:] != teacher_probs.shape:
        raise ValueError(
            f"student_logits (..., B, K) do not fit teacher_probs (B, K): {tuple(student_logits.shape)}, {tuple(teacher_probs.shape)}"
        )
    if not torch.compiler.is_compiling() and teacher_probs.device.type == "cpu":
        check_distributions(teacher_probs, "teacher_probs")
    with torch.autocast(student_logits.device.type, enabled=False):
        logits = _full(student_logits)
        probs = teacher_probs.detach().to(logits.dtype)
        losses = torch.xlogy(probs, probs).sum(-1) - (probs * logits.log_softmax(-1)).sum(-1)
    return {"batchmean": losses.mean, "sum": losses.sum, "none": lambda: losses}[reduction]()


def check_distributions(probs: Tensor, name: str) -> None:
    """Refuse rows that are negative, not finite or do not sum to 1 within 1e-3 (and 1e-6 a class, the authors' offset)."""
    values = probs.detach().float()
    bad = ~torch.isfinite(values).all(1) | (values < 0).any(1) | ((values.sum(1) - 1).abs() > _TOLERANCE + 1.1e-6 * values.shape[1])
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"row {row} of {name} is no distribution (sum {float(values[row].sum()):.6g}, least {float(values[row].min()):.6g})"
        )


@dataclass(frozen=True)
class StartupLosses:
    """The weighted sum to minimise, and its three terms before weighting (0 where a weight is 0)."""

    total: Tensor
    source: Tensor
    distill: Tensor
    contrast: Tensor

    def to_dict(self) -> dict[str, float]:
        """The four as floats without a graph."""
        return {"total": self.total.item(), "source": self.source.item(), "distill": self.distill.item(), "contrast": self.contrast.item()}


class StartupLoss(nn.Module):
    """Cross-entropy on source data plus distillation plus NT-Xent on target data, all with weight 1 by default.

    ``weights=(1, 1, 0)`` is the paper's "no SS"; a term with weight 0 is neither computed nor asked for.

    Args:
        temperature: of NT-Xent.
        weights: of source, distillation and contrast.
        gather: as in ``nt_xent``.

    Raises:
        ValueError: a temperature that is not positive, weights that are negative or all zero.
    """

    def __init__(self, temperature: float = 1.0, weights: Sequence[float] = (1.0, 1.0, 1.0), gather: Gather = "auto") -> None:
        super().__init__()
        self.temperature = _checks.real("temperature", temperature, low=0.0, low_open=True)
        if len(weights) != 3:
            raise ValueError(f"weights are three numbers (source, distillation, contrast), got {len(weights)}")
        self.weights = tuple(_checks.real("a weight", weight, low=0.0) for weight in weights)
        if not any(self.weights):
            raise ValueError("weights are all zero: there is nothing to minimise")
        if not isinstance(gather, bool):
            _checks.choice("gather", gather, ("auto",))
        self.gather: Gather = gather

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, weights={self.weights}, gather={self.gather!r}"

    def forward(
        self,
        source_logits: Tensor | None,
        source_targets: Tensor | None,
        target_logits: Tensor | None,
        pseudo_labels: Tensor | None,
        projections: Tensor | None = None,
    ) -> StartupLosses:
        """The losses of one step.

        Args:
            source_logits: ``(Bs, K)``; None where the weight of the source is 0.
            source_targets: classes ``(Bs,)`` or probabilities ``(Bs, K)``.
            target_logits: ``(B, K)``, or ``(V, B, K)`` for V views, of which the mean is taken; None where the weight of the
                distillation is 0.
            pseudo_labels: ``(B, K)``; None where the weight of the distillation is 0.
            projections: ``(2, B, p)``, or None ("no SS").

        Raises:
            ValueError: classes that differ in number, targets out of range, something missing whose weight is not 0.
        """
        given = next((value for value in (target_logits, source_logits, projections) if value is not None), None)
        if given is None:
            raise ValueError("there are neither logits nor projections")
        zero = given.new_zeros((), dtype=_full(given).dtype)
        on_source, on_target, on_views = self.weights
        self._require(source_logits, source_targets, pseudo_labels)
        widths = [None if value is None else value.shape[-1] for value in (pseudo_labels, source_logits, target_logits)]
        if len({width for width in widths if width is not None}) > 1:
            raise ValueError(f"classes differ: pseudo_labels have {widths[0]}, source_logits {widths[1]}, target_logits {widths[2]}")
        source = distill = contrast = zero
        if on_source and source_logits is not None and source_targets is not None:
            source = _source_loss(source_logits, source_targets)
        if on_target and pseudo_labels is not None:
            if target_logits is None:
                raise ValueError("distillation has a weight, so target_logits are needed")
            distill = soft_distillation(target_logits, pseudo_labels)
        if on_views and projections is not None:
            if projections.ndim != 3 or len(projections) != 2:
                raise ValueError(f"projections must have shape (2, B, p), got {tuple(projections.shape)}")
            contrast = nt_xent(projections[0], projections[1], temperature=self.temperature, gather=self.gather)
        total = on_source * source + on_target * distill + on_views * contrast
        return StartupLosses(total, source, distill, contrast)

    def _require(self, source: Tensor | None, source_targets: Tensor | None, pseudo_labels: Tensor | None) -> None:
        if self.weights[0] and (source is None or source_targets is None):
            raise ValueError("the source has a weight, so source and source_targets are needed; weights=(0, 1, 1) goes without")
        if self.weights[1] and pseudo_labels is None:
            raise ValueError("distillation has a weight, so pseudo_labels are needed; weights=(1, 0, 1) goes without")

    def backward_in_parts(
        self,
        student: nn.Module,
        source: Tensor | None,
        source_targets: Tensor | None,
        target_views: Tensor,
        pseudo_labels: Tensor | None,
        *,
        micro_batch: int,
        backward: Callable[[Tensor], Any] = torch.Tensor.backward,
        no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> StartupLosses:
        """Gradients of the loss of a whole batch in the memory of a small one, added to ``.grad``.

        NT-Xent is no mean over samples, so that plain accumulation would use fewer negatives. Here all parts are embedded
        without a graph, the gradient of the loss by the projections is computed, and each part is then run again and
        backpropagated: exact for networks without BatchNorm, and with it exact but for the batch statistics, which are
        those of the parts. Dropout draws the same in both passes.

        Args:
            student: ``student(source, views) -> (source_logits, target_logits, projections)``.
            source: ``(Bs, ...)`` or None.
            source_targets: as in ``forward``.
            target_views: ``(V, B, ...)``.
            pseudo_labels: ``(B, K)``.
            micro_batch: most target samples in a part; parts are of nearly equal size, and the source is cut into as many.
            backward: what to call instead of ``loss.backward()``, such as ``fabric.backward``.
            no_sync: gives the context in which all parts but the last run, such as ``lambda: fabric.no_backward_sync(student)``;
                None for the student's own ``no_sync``, if it has one.
        """
        size = _checks.integer("micro_batch", micro_batch, low=1)
        self._require(source, source_targets, pseudo_labels)
        if not self.weights[0]:
            source = source_targets = None  # it would only move the statistics of BatchNorm
        count = math.ceil(target_views.shape[1] / size)
        views = target_views.tensor_split(count, 1)
        sources, targets, labels = (_parts(value, count) for value in (source, source_targets, pseudo_labels))
        if any(is_batch_norm(module) and module.training for module in student.modules()):
            smallest = min([part.shape[1] for part in views] + [len(part) for part in sources if part is not None])
            if smallest < 2:
                raise ValueError(f"micro_batch={size} leaves a part of one sample, which BatchNorm cannot normalise; give a larger one")
        device = target_views.device
        states: list[Any] = []
        found: list[Tensor] = []
        gradients: list[Tensor] = []
        contrast = target_views.new_zeros(())
        if self.weights[2]:
            kept = BufferSnapshot(student.modules())
            with torch.no_grad():
                for part_source, part in zip(sources, views, strict=True):
                    states.append(_random_state(device))
                    projections = student(part_source, part)[2]
                    if projections is None:
                        raise ValueError("the contrast has a weight and the student has no projector; give it one, or weights=(1, 1, 0)")
                    found.append(projections)
            kept.restore()
            whole = torch.cat(found, 1).detach().requires_grad_(True)
            with torch.enable_grad():
                contrast = nt_xent(whole[0], whole[1], temperature=self.temperature, gather=self.gather)
            (gradient,) = torch.autograd.grad(contrast, whole)
            gradients = list(gradient.tensor_split(count, 1))
            contrast = contrast.detach()
        quiet = no_sync or getattr(student, "no_sync", contextlib.nullcontext)  # processes average gradients in the last part only
        samples, rows = target_views.shape[1], 0 if source is None else len(source)
        source_sum = distill_sum = target_views.new_zeros(())
        for number, part in enumerate(views):
            own, own_targets, own_labels = sources[number], targets[number], labels[number]
            with _random_state_of(device, states[number] if states else None), quiet() if number + 1 < count else contextlib.nullcontext():
                logits, target_logits, projections = student(own, part)
                surrogate = target_logits.new_zeros((), dtype=_full(target_logits).dtype)
                if self.weights[0] and own is not None and own_targets is not None:
                    term = _source_loss(logits, own_targets) * (len(own) / rows)
                    surrogate, source_sum = surrogate + self.weights[0] * term, source_sum + term.detach()
                if self.weights[1] and own_labels is not None:
                    term = soft_distillation(target_logits, own_labels) * (part.shape[1] / samples)
                    surrogate, distill_sum = surrogate + self.weights[1] * term, distill_sum + term.detach()
                if gradients:
                    surrogate = surrogate + self.weights[2] * (projections * gradients[number]).sum()
                if surrogate.requires_grad:  # a part beyond the source's has nothing to say where only the source has a weight
                    backward(surrogate)
        total = self.weights[0] * source_sum + self.weights[1] * distill_sum + self.weights[2] * contrast
        return StartupLosses(total, source_sum, distill_sum, contrast)


class NTXentLoss(nn.Module):
    """``nt_xent`` as a module."""

    def __init__(self, temperature: float = 1.0, gather: Gather = False, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.temperature = _checks.real("temperature", temperature, low=0.0, low_open=True)
        self.gather: Gather = gather
        self.reduction: Reduction = reduction

    def forward(self, z1: Tensor, z2: Tensor) -> Tensor:
        """The loss of two views ``(B, p)``."""
        return nt_xent(z1, z2, temperature=self.temperature, gather=self.gather, reduction=self.reduction)


class SoftDistillationLoss(nn.Module):
    """``soft_distillation`` as a module."""

    def __init__(self, reduction: Literal["batchmean", "sum", "none"] = "batchmean") -> None:
        super().__init__()
        self.reduction: Literal["batchmean", "sum", "none"] = reduction

    def forward(self, student_logits: Tensor, teacher_probs: Tensor) -> Tensor:
        """The divergence of logits ``(..., B, K)`` from probabilities ``(B, K)``."""
        return soft_distillation(student_logits, teacher_probs, reduction=self.reduction)


def check_source_targets(targets: Tensor, classes: int) -> None:
    """Refuse labels outside of the classes, and rows that are no distribution; a loss on a GPU would skip or crash on them."""
    if targets.numel() and targets.is_floating_point():
        check_distributions(targets, "source_targets")
    elif targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        raise ValueError(f"source labels must lie in [0, {classes}), got {int(targets.min())} to {int(targets.max())}")


def _source_loss(logits: Tensor, targets: Tensor) -> Tensor:
    soft = targets.is_floating_point()
    if targets.dtype == torch.bool or targets.shape != (logits.shape if soft else logits.shape[:1]):
        raise ValueError(
            f"source_targets are classes (B,) of integers or probabilities (B, K), got {targets.dtype} of shape {tuple(targets.shape)} "
            f"for logits {tuple(logits.shape)}"
        )
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_source_targets(targets, logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        full = _full(logits)
        return F.cross_entropy(full, targets.to(full.dtype) if soft else targets.long())


def _full(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _unit(z: Tensor) -> Tensor:
    z = _full(z)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    return z * ((norm > _TINY) / norm.clamp_min(_TINY))


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of this process's rows is the sum of what all of them say."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        places = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(places, padded)
        return torch.cat([place[:size] for place, size in zip(places, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rank = _distributed.rank()
        start = sum(ctx.sizes[:rank])
        return _distributed.sum_(grads[0].contiguous().clone())[start : start + ctx.sizes[rank]], None


def _from_all(rows: Tensor, sizes: list[int]) -> Tensor:
    return _Gather.apply(rows, sizes)  # pyright: ignore[reportReturnType]


def _parts(values: Tensor | None, count: int) -> list[Tensor | None]:
    """As many parts of nearly equal size as asked for, None where there is nothing left."""
    return [None] * count if values is None else [part if len(part) else None for part in values.tensor_split(count)]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _random_state_of(device: torch.device, state: tuple[Tensor, Tensor | None] | None) -> Generator[None]:
    """Torch's generators as they were, for one pass; afterwards as the last pass left them."""
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
    yield
