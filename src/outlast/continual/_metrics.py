"""What a sequence of tasks left behind, in the usual figures of continual learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from outlast._core._result import Result


@dataclass(frozen=True, repr=False)
class ContinualMetrics(Result):
    """Figures of a matrix R, where ``R[t, i]`` is the score on task i after learning task t; in the matrix's own unit.

    Attributes:
        acc: mean score on all tasks at the end.
        bwt: backward transfer, mean over old tasks of ``R[T, i] - R[i, i]``; negative where tasks are forgotten.
        forgetting: mean over old tasks of the best score so far minus the last.
        learning_accuracy: mean of ``R[i, i]``, how well each task was learned in its turn.
        matrix: R, float64, shape ``(T, T)``.
    """

    acc: float
    bwt: float
    forgetting: float
    learning_accuracy: float
    matrix: Tensor

    def _draw(self, ax: Any) -> None:
        count = len(self.matrix)
        lower = torch.full_like(self.matrix, float("nan"))
        rows, columns = torch.tril_indices(count, count)
        lower[rows, columns] = self.matrix[rows, columns]
        ax.figure.colorbar(ax.imshow(lower.numpy(), cmap="viridis"), ax=ax)
        ax.set_xlabel("task")
        ax.set_ylabel("after learning task")
        ax.set_xticks(range(count), [str(number + 1) for number in range(count)])
        ax.set_yticks(range(count), [str(number + 1) for number in range(count)])
        ax.set_title(f"ACC {self.acc:.1f}, BWT {self.bwt:.1f}")


def continual_metrics(R: Tensor | Sequence[Sequence[float]]) -> ContinualMetrics:
    """ACC, BWT, forgetting and learning accuracy (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018).

    Args:
        R: ``(T, T)``, ``R[t, i]`` the score on task i after learning task t. Entries above the diagonal are not used.

    Raises:
        ValueError: not square, empty, or an entry on or below the diagonal that is not finite.
    """
    matrix = torch.as_tensor(R, dtype=torch.float64).detach().cpu()
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) == 0:
        raise ValueError(f"R must be a square matrix of scores, got shape {tuple(matrix.shape)}")
    count = len(matrix)
    rows, columns = torch.tril_indices(count, count)
    if not torch.isfinite(matrix[rows, columns]).all():
        raise ValueError("R holds a score on or below its diagonal that is not finite")
    learned = matrix.diagonal()
    bwt = forgetting = 0.0
    if count > 1:
        last = matrix[-1, :-1]
        bwt = float((last - learned[:-1]).mean())
        best = torch.stack([matrix[task:-1, task].max() for task in range(count - 1)])
        forgetting = float((best - last).mean())
    return ContinualMetrics(float(matrix[-1].mean()), bwt, forgetting, float(learned.mean()), matrix)
