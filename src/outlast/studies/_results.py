"""Finished cells of one part, as claims and figures read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outlast.studies._grid import row_name


class MissingCellError(LookupError):
    """A claim or figure asks for a cell that is not finished."""


class Results:
    """Metrics and series by arm, seed and setting. The first setting of the scale is the default one.

    ``missing`` names the cells of the grid that are not finished.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        settings: Sequence[str],
        arms: Sequence[str],
        seeds: Sequence[int],
        missing: Sequence[str] = (),
    ) -> None:
        self.missing = tuple(missing)
        self._records = {(row_name(r["setting"], r["arm"]), int(r["seed"])): r for r in records}
        self.settings = tuple(settings)
        self.arms = tuple(arms)
        self.seeds = tuple(seeds)

    def value(self, arm: str, metric: str, seed: int, setting: str | None = None) -> float:
        """One cell's metric."""
        return float(self._record(arm, seed, setting)["metrics"][metric])

    def values(self, arm: str, metric: str, setting: str | None = None) -> list[float]:
        """A metric over the seeds whose cells are finished."""
        row = row_name(self.settings[0] if setting is None else setting, arm)
        return [float(self._records[row, seed]["metrics"][metric]) for seed in self.seeds if (row, seed) in self._records]

    def mean(self, arm: str, metric: str, setting: str | None = None) -> float:
        """A metric's mean over all seeds: arms with other seeds finished are not compared.

        Raises:
            MissingCellError: a seed's cell is missing.
        """
        return sum(self.value(arm, metric, seed, setting) for seed in self.seeds) / len(self.seeds)

    def series(self, arm: str, name: str, seed: int, setting: str | None = None) -> list[float]:
        """One cell's curve."""
        return [float(value) for value in self._record(arm, seed, setting)["series"][name]]

    def has(self, arm: str, setting: str | None = None) -> bool:
        """Whether any cell of the arm is finished."""
        row = row_name(self.settings[0] if setting is None else setting, arm)
        return any((row, seed) in self._records for seed in self.seeds)

    def need_all(self) -> None:
        """For measures over whatever arms the scale has.

        Raises:
            MissingCellError: a cell is missing.
        """
        if self.missing:
            raise MissingCellError(f"{self.missing[0]} is not finished")

    def why(self, error: Exception) -> str:
        """What to say where a measure or a figure failed while cells are missing, which may make it fail in any way."""
        if isinstance(error, MissingCellError):
            return str(error)
        return f"{self.missing[0]} is not finished ({type(error).__name__}: {error})"

    def _record(self, arm: str, seed: int, setting: str | None) -> Mapping[str, Any]:
        row = row_name(self.settings[0] if setting is None else setting, arm)
        if (row, seed) not in self._records:
            raise MissingCellError(f"{row} with seed {seed} is not finished")
        return self._records[row, seed]


def difference(arm: str, over: str, metric: str, setting: str | None = None) -> Callable[[Results, int], float]:
    """A claim's measure: one arm's metric less another's, for each seed."""
    return lambda results, seed: results.value(arm, metric, seed, setting) - results.value(over, metric, seed, setting)
