"""What a vaccinated step saw and did."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outlast._core._result import JSON, Result, to_json


@dataclass(frozen=True, repr=False)
class GradVacReport(Result):
    """One step. Matrices are float64 on the CPU; K groups (those with shared parameters), T tasks of the batch.

    Attributes:
        tasks: in the order of the matrices' axes.
        groups: names of the groups.
        cosine: of task i's (perhaps already altered) gradient with task j's, as measured, ``(K, T, T)``.
        target: that it was compared with.
        acted: where j's gradient was added to i's.
        effective_weights: the group's gradient is ``sum_j effective_weights[k, j] * g_j``, ``(K, T)``.
        norm_ratio: norm of the combined gradient over that of the plain sum, ``(K,)``.
        finite: False if a gradient was not finite: then the plain sum was written (by the layer engine for the groups that
            were not decided yet) and targets stayed as they were.
    """

    tasks: tuple[Hashable, ...]
    groups: tuple[str, ...]
    cosine: Tensor
    target: Tensor
    acted: Tensor
    effective_weights: Tensor
    norm_ratio: Tensor
    finite: bool = True

    def to_dict(self) -> dict[str, JSON]:
        """All fields as JSON types; names of tasks that have no JSON form by their ``repr``."""
        names = [task if isinstance(task, str | int) else repr(task) for task in self.tasks]
        fields = ("groups", "cosine", "target", "acted", "effective_weights", "norm_ratio", "finite")
        return {
            "kind": type(self).__name__,
            "version": self.version,
            "tasks": list[JSON](names),
            **{name: to_json(getattr(self, name)) for name in fields},
        }

    def __repr__(self) -> str:
        pairs = int(self.acted.sum())
        total = len(self.groups) * len(self.tasks) * (len(self.tasks) - 1)
        if not self.groups:
            return f"GradVacReport(nothing to vaccinate, finite={self.finite})"
        weights = ", ".join(f"{task}: {weight:.2f}" for task, weight in zip(self.tasks, self.effective_weights.mean(0), strict=True))
        return f"GradVacReport({len(self.groups)} groups, acted on {pairs} of {total} pairs, mean weights {weights}, finite={self.finite})"

    def _draw(self, ax: Any) -> None:
        picture = ax.imshow(torch.atleast_3d(self.cosine).mean(0).numpy(), vmin=-1, vmax=1, cmap="RdBu")
        ax.figure.colorbar(picture, ax=ax, label="cosine, mean over groups")
        names = [str(task) for task in self.tasks]
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
