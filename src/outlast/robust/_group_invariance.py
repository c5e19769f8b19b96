"""The whole method for a user's loop: infer groups once, then train on balanced cross-entropy and the penalty.

Ahmed, Bengio, van Seijen, Courville, ICLR 2021, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Sampler
from torch.utils.hooks import RemovableHandle

from outlast._core import _checks
from outlast._core._batches import call_with, device_of
from outlast._core._calls import eager
from outlast._core._distributed import rank, unwrapped
from outlast._core._norm import eval_mode
from outlast._core._random import generator as derived_generator
from outlast.robust._group_inference import (
    GroupPartition,
    by_number,
    catch,
    collect,
    features_of,
    find_head,
    infer_groups,
    logits_of,
    of_all_processes,
)
from outlast.robust._invariance import Divergence, group_balanced_cross_entropy, invariance_penalty


@dataclass(frozen=True)
class InvarianceLoss:
    """One step's loss.

    Attributes:
        total: ``cross_entropy + weight * penalty``: call ``backward`` on it.
        cross_entropy: balanced over the groups once they are known.
        penalty: 0-dim; zero before groups are known.
        weight: of the penalty in this step.
        logits: of the batch, detached, for metrics.
    """

    total: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    weight: float
    logits: Tensor


class GroupInvariance:
    """Group-invariant predictions in a training loop.

    Ahmed, Bengio, van Seijen, Courville, "Systematic Generalisation with Group Invariant Predictions", ICLR 2021.

    ```python
    method = GroupInvariance(model, head="fc", weight=10.0, ramp_steps=5 * len(loader))
    for epoch in range(epochs):
        for x, y, i in loader:  # over outlast.data.Indexed(dataset)
            loss = method.loss(x, y, i)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        if epoch == 1:
            method.infer(evaluation_loader)  # over the same Indexed data set, without augmentation
    ```

    One forward pass a step: the penalty takes the features that the head got, through a detached copy of the head, so that
    the head learns from the cross-entropy alone. A compiled model runs uncompiled in ``loss``. Groups are inferred once; a
    resumed training must restore them (``state_dict``), not infer them again.

    Args:
        model: classifier that gives logits ``(B, K)``, wrapped in DistributedDataParallel or not.
        head: the layer that turns features ``(B, D)`` into logits, or its name.
        weight: of the penalty after the ramp. No value fits all data, and too large a one is worse than none: choose it without
            shifted data by ``group_accuracy`` and ``choose_weight``.
        ramp_steps: steps over which the weight rises, from ``weight / ramp_steps`` at the first.
        balanced: balance the cross-entropy over groups; else take its plain mean.
        detach_head: give the penalty's gradient to the features alone.
        divergence: of ``invariance_penalty``.
        min_per_group: likewise.

    Raises:
        ValueError: a head that the model does not have, an option out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head: str | nn.Module,
        weight: float = 10.0,
        ramp_steps: int,
        balanced: bool = True,
        detach_head: bool = True,
        divergence: Divergence = "kl",
        min_per_group: int = 1,
    ) -> None:
        self.model = model
        self.head = find_head(unwrapped(model), head)
        self._head_given = head
        self.weight = _checks.real("weight", weight, low=0.0)
        self.ramp_steps = _checks.integer("ramp_steps", ramp_steps, low=1)
        self.balanced = balanced
        self.detach_head = detach_head
        self.divergence: Divergence = divergence
        _checks.choice("divergence", divergence, ("kl", "reverse_kl", "js"))
        self.min_per_group = _checks.integer("min_per_group", min_per_group, low=1)
        self.groups: Tensor | None = None
        self.steps = 0
        self._hook: RemovableHandle | None = None

    def __repr__(self) -> str:
        known = "no groups yet" if self.groups is None else f"{len(self.groups)} examples with groups, step {self.steps}"
        return f"GroupInvariance({type(self.model).__name__}, weight={self.weight:g}, ramp_steps={self.ramp_steps}, {known})"

    def infer(
        self,
        loader: Iterable[Any],
        *,
        recalibrate_batchnorm: bool = True,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> GroupPartition:
        """Infer groups from the model as it is, and use them from the next step on.

        Args:
            loader: batches ``(inputs, labels, numbers)`` with the evaluation transform, over ``outlast.data.Indexed``. Of several
                processes each must call this and may have its part; recalibrated statistics are the first one's.
            recalibrate_batchnorm: as in ``collect_features``.
            device: likewise.
            options: for ``infer_groups``.

        Returns:
            The partition, by number of the example; -1 for numbers that did not occur.

        Raises:
            ValueError: batches without numbers; as ``collect_features`` and ``infer_groups``.
        """
        features, logits, labels, numbers = collect(
            self.model, loader, head=self._head_given, recalibrate_batchnorm=recalibrate_batchnorm, device=device, together=True
        )
        if numbers is None:
            raise ValueError("the loader gives no numbers of the examples; wrap its data set in outlast.data.Indexed")
        features, logits, labels, numbers = of_all_processes(features, logits, labels, numbers)
        if int(numbers[0]) < 0:
            raise ValueError(f"numbers of examples must not be negative, got {int(numbers[0])}")
        partition = by_number(infer_groups(features, logits, labels, **options), numbers)
        self.set_groups(partition)
        return partition

    def set_groups(self, groups: Tensor | GroupPartition) -> None:
        """Use these groups, by number of the example, and start the ramp.

        Args:
            groups: a partition, or int64 ``(n,)`` with 0, 1 and -1 for unknown.

        Raises:
            ValueError: another shape or other values.
            TypeError: no integers.
        """
        values = groups.groups if isinstance(groups, GroupPartition) else groups
        if values.is_floating_point() or values.dtype == torch.bool:
            raise TypeError(f"groups must be integers, got {values.dtype}")
        if values.ndim != 1 or bool(((values < -1) | (values > 1)).any()):
            raise ValueError("groups must be one number for each example: 0, 1, or -1 for unknown")
        self.groups = values.detach().cpu().long().clone()
        self.steps = 0

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Let the ramp count this optimizer's steps instead of calls of ``loss``.

        Needed where a step calls the loss more than once: gradient accumulation, or SAM, both of whose passes then weigh the penalty alike.

        Args:
            optimizer: the one that trains the model.

        Returns:
            A handle; ``remove()`` goes back to counting calls.
        """

        def count(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
            self.steps += self.groups is not None

        self._hook = optimizer.register_step_post_hook(count)
        return self._hook

    def _counts_steps(self) -> bool:
        return self._hook is not None and self._hook.id in (self._hook.hooks_dict_ref() or {})

    def loss(self, inputs: Any, labels: Tensor, index: Tensor) -> InvarianceLoss:
        """The loss of a batch; with gradients enabled it counts as a step of the ramp, unless ``attach`` counts steps.

        Args:
            inputs: what the model takes.
            labels: class ids ``(B,)``.
            index: numbers of the examples ``(B,)``, as in the loader given to ``infer``.

        Raises:
            ValueError: numbers outside of the partition; groups that split no class.
        """
        seen: list[Tensor] = []
        labels = labels.long()
        handle = catch(self.head, seen)
        try:
            with eager():  # a compiled graph would not know of the hook
                logits = logits_of(call_with(self.model, inputs))
        finally:
            handle.remove()
        if self.groups is None:
            plain = F.cross_entropy(logits, labels)
            return InvarianceLoss(plain, plain.detach(), torch.zeros_like(plain.detach()), 0.0, logits.detach())
        groups = self._groups_of(index).to(labels.device, non_blocking=True)
        entropy = group_balanced_cross_entropy(logits, labels, groups) if self.balanced else F.cross_entropy(logits, labels)
        weight = self.weight * min(1.0, (self.steps + 1) / self.ramp_steps)
        judged = logits
        if self.detach_head:
            state = {name: value.detach() for name, value in self.head.named_parameters()}
            state.update({name: value.clone() for name, value in self.head.named_buffers()})  # statistics see one pass a step
            judged = logits_of(torch.func.functional_call(self.head, state, (features_of(seen, self._head_given),)))
        penalty = invariance_penalty(judged, labels, groups, divergence=self.divergence, min_per_group=self.min_per_group)
        if torch.is_grad_enabled() and not self._counts_steps():
            self.steps += 1
        total = entropy + weight * penalty if weight else entropy
        return InvarianceLoss(total, entropy.detach(), penalty.detach(), weight, logits.detach())

    def _groups_of(self, index: Tensor) -> Tensor:
        assert self.groups is not None
        if not bool((self.groups == 1).any()):
            raise ValueError("the groups split no class, so there is nothing to be invariant to; go on with plain training")
        if index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"numbers of examples must be integers, got {index.dtype}")
        numbers = index.detach().cpu().long()
        if bool(((numbers < 0) | (numbers >= len(self.groups))).any()):
            raise ValueError(
                f"numbers {int(numbers.min())} to {int(numbers.max())} are not all in the partition of {len(self.groups)} examples"
            )
        return self.groups[numbers]

    def group_accuracy(self, loader: Iterable[Any], groups: GroupPartition | Tensor) -> float:
        """Mean accuracy over the (class, group) cells of held-out data with inferred groups, in [0, 1].

        Args:
            loader: batches ``(inputs, labels, numbers)`` of the validation split.
            groups: of its examples, by number: ``infer_groups`` on the validation split with the same reference model.

        Raises:
            ValueError: no batches.
        """
        known = groups.groups if isinstance(groups, GroupPartition) else groups
        hits: dict[tuple[int, int], list[int]] = {}
        bare = unwrapped(self.model)
        place = device_of(bare)
        with eval_mode(bare), torch.no_grad():
            for x, y, i in loader:
                right = logits_of(call_with(bare, x.to(place))).argmax(1).cpu() == y.cpu()
                for label, group, hit in zip(y.tolist(), known[i.cpu()].tolist(), right.tolist(), strict=True):
                    cell = hits.setdefault((label, group), [0, 0])
                    cell[0] += hit
                    cell[1] += 1
        cells = [cell for (_, group), cell in hits.items() if group >= 0]
        if not cells:
            raise ValueError("the loader gave no examples with groups")
        return sum(hit / count for hit, count in cells) / len(cells)

    @staticmethod
    def choose_weight(curve: Mapping[float, float], *, tolerance: float = 0.03) -> float:
        """The largest weight whose balanced group accuracy is within ``tolerance`` of the best; no shifted data is needed.

        Args:
            curve: ``group_accuracy`` of trainings with different weights, such as 0, 1, 3, 10 and 30.
            tolerance: what may be lost.

        Raises:
            ValueError: an empty curve.
        """
        if not curve:
            raise ValueError("curve is empty: give the accuracies of at least one weight")
        best = max(curve.values())
        return max(weight for weight, value in curve.items() if value >= best - tolerance)

    def state_dict(self) -> dict[str, Any]:
        """Groups, steps and weight, for ``torch.load(weights_only=True)``."""
        return {"groups": None if self.groups is None else self.groups.clone(), "steps": self.steps, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: a state of something else.
        """
        if set(state) != {"groups", "steps", "weight"}:
            raise ValueError(f"a state holds 'groups', 'steps' and 'weight', got {sorted(state)}")
        if state["groups"] is None:
            self.groups = None
        else:
            self.set_groups(state["groups"])
        self.steps, self.weight = int(state["steps"]), float(state["weight"])


class balanced_sampler(Sampler[list[int]]):  # noqa: N801  a constructor that reads like a function, as the specification names it
    """Batches in which every (class, group) of a partition has its share, for ``DataLoader(batch_sampler=...)``.

    Every cell is drawn through its own permutation, again and again: small cells repeat. An epoch has as many batches as
    examples make. Draws are functions of (seed, epoch, process): every epoch and every process has its own, and
    ``set_epoch`` repeats one after a restart.

    Args:
        partition: from ``infer_groups``; examples of unknown group are left out.
        batch_size: at least the number of cells; 4 for each class or more.
        generator: gives the seed (one number is drawn at once); None for a fixed seed.

    Raises:
        ValueError: a batch smaller than the number of cells, or no example with a group.
    """

    def __init__(self, partition: GroupPartition, batch_size: int, *, generator: torch.Generator | None = None) -> None:
        self.batch_size = _checks.integer("batch_size", batch_size, low=1)
        self._seed = 0 if generator is None else int(torch.randint(2**63 - 1, (), generator=generator))
        self._epoch = 0
        keys = torch.where(partition.groups < 0, -1, 2 * partition.labels + partition.groups)
        self._cells = [(keys == key).nonzero()[:, 0] for key in keys.unique().tolist() if key >= 0]
        self._count = int((keys >= 0).sum())
        if not self._cells:
            raise ValueError("the partition has no example with a group")
        if self.batch_size < len(self._cells):
            raise ValueError(f"batches of {self.batch_size} cannot hold all {len(self._cells)} pairs of class and group")

    def __len__(self) -> int:
        return max(1, self._count // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration draws."""
        self._epoch = _checks.integer("epoch", epoch, low=0)

    def __iter__(self) -> Iterator[list[int]]:
        rng = derived_generator(self._seed, f"balanced_sampler, process {rank()}", self._epoch)
        self._epoch += 1
        streams = [_endless(cell, rng) for cell in self._cells]
        place = 0
        for _ in range(len(self)):
            batch: list[int] = []
            for _ in range(self.batch_size):
                batch.append(next(streams[place % len(streams)]))
                place += 1
            yield batch


def _endless(cell: Tensor, rng: torch.Generator) -> Iterator[int]:
    while True:
        yield from cell[torch.randperm(len(cell), generator=rng)].tolist()
