"""What a consolidation added."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from outlast._core._result import JSON, Result, to_json


@dataclass(frozen=True, repr=False)
class LayerReport(Result):
    """One layer after a task.

    Attributes:
        name: of the layer or parameter.
        kind: linear, conv, conv_transpose, addmm (transformers' ``Conv1D``), attention (stacked projections), embedding.
        dim: width of a row, the constant 1 of the bias included; number of tokens of an embedding.
        groups: groups of a convolution, each with its own basis.
        rank_before: directions held before; the largest of the groups, as in ``added`` and ``rank``.
        added: directions that this task added.
        rank: directions held now.
        energy_before: share of this task's energy inside the old basis (mean over groups).
        energy_after: share inside the new one.
        threshold: share that was asked for.
        rows: rows that were seen in each group; tokens of an embedding.
    """

    name: str
    kind: str
    dim: int
    groups: int
    rank_before: int
    added: int
    rank: int
    energy_before: float
    energy_after: float
    threshold: float
    rows: int


@dataclass(frozen=True, repr=False)
class ConsolidationReport(Result):
    """All layers after a task.

    Attributes:
        task: its key.
        layers: one report a layer, in the order of the model.
        capacity: share of the constrained weights' degrees of freedom that is taken now.
        seconds: wall time.
    """

    task: Hashable
    layers: tuple[LayerReport, ...]
    capacity: float
    seconds: float

    def to_dict(self) -> dict[str, JSON]:
        """All fields as JSON types; a task's key that has no JSON form by its ``repr``."""
        task = self.task if isinstance(self.task, str | int | float | bool) else repr(self.task)
        return {
            "kind": type(self).__name__,
            "version": self.version,
            "task": task,
            "layers": to_json(self.layers),
            "capacity": self.capacity,
            "seconds": self.seconds,
        }

    def __repr__(self) -> str:
        ranks = ", ".join(f"{layer.name} {layer.rank_before}+{layer.added}/{layer.dim}" for layer in self.layers)
        return f"ConsolidationReport(task {self.task!r}: {ranks}; {100 * self.capacity:.1f} % taken)"

    def _draw(self, ax: Any) -> None:
        names = [layer.name for layer in self.layers]
        before = [100.0 * layer.rank_before / layer.dim for layer in self.layers]
        added = [100.0 * layer.added / layer.dim for layer in self.layers]
        ax.barh(names, before, label="before")
        ax.barh(names, added, left=before, label=f"added by task {self.task}")
        ax.set_xlim(0, 100)
        ax.invert_yaxis()
        ax.set_xlabel("input directions held (% of the width)")
        ax.legend()
