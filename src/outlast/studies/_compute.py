"""Computing one cell: in this process, on several devices, or in a worker."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from outlast.errors import DivergedError
from outlast.studies._design import Outcome, Part
from outlast.studies._environment import environment
from outlast.studies._grid import Cell
from outlast.studies._registry import get

Report = Callable[[int, int, float], None]


def compute(cell: Cell, report: Report) -> dict[str, Any]:
    """The record of a cell: metrics, series, seconds, environment; JSON types only."""
    if cell.launch["devices"] == 1:
        return _compute_here(cell, report)
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torch's own launcher starts one process a device and sets the variables from which Fabric finds its rank.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=cell.launch["devices"],
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=cell.key[:12],
        max_restarts=0,  # a cell is deterministic: what fails once fails again
    )
    return elastic_launch(config, _compute_here)(cell, None)[0]


def _compute_here(cell: Cell, report: Report | None) -> dict[str, Any]:
    import torch

    from outlast.studies._context import Context

    torch.set_num_threads(cell.launch["threads"])
    part: Part = get(cell.origin).part(cell.part)
    config = part.settings_type(**cell.config)
    start = time.perf_counter()
    context = Context(cell.seed, cell.launch, report or (lambda _epoch, _epochs, _loss: None))
    outcome = part.cell(config, cell.seed, context)
    seconds = time.perf_counter() - start
    return {
        "metrics": _checked(part, outcome),
        "series": {name: [float(value) for value in values] for name, values in outcome.series.items()},
        "seconds": seconds,
        "environment": environment(),
    }


def _checked(part: Part, outcome: Outcome) -> dict[str, float]:
    expected = [metric.name for metric in part.metrics]
    if sorted(expected) != sorted(outcome.metrics):
        raise ValueError(f"part {part.name!r} declares the metrics {expected}, its cell gave {sorted(outcome.metrics)}")
    for name, value in outcome.metrics.items():
        if not math.isfinite(value):
            raise DivergedError(f"metric {name!r} is {value}")
    return {name: float(outcome.metrics[name]) for name in expected}
