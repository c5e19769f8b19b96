"""10,000 episodes of distribution calibration in one go, with progress, and the memory that they take."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks._harness import Row, write
from benchmarks.distribution_calibration import features
from outlast.fewshot import BaseStatistics, DistributionCalibration, evaluate_episodes

EPISODES = 10_000


def _run(title: str, name: str, data: tuple[Tensor, Tensor, Tensor, Tensor], limit: float | None, **settings: Any) -> Row:
    base_rows, base_labels, rows, labels = data
    base = BaseStatistics.from_features(base_rows, base_labels)
    start = time.perf_counter()
    with Progress() as bar:
        task = bar.add_task(f"{name}, {title}", total=EPISODES)
        found = evaluate_episodes(
            DistributionCalibration(base, **settings),
            rows,
            labels,
            episodes=EPISODES,
            batch_size=64,
            progress=lambda done, _all: bar.update(task, completed=done),
        )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process so far: lean forms come first
    rival = f"{title}: {100 * found.accuracy:.2f} +- {100 * found.ci95:.2f} %, peak of the process {peak:,.0f} MB"
    target = "" if limit is None else f"< {limit:g} s"
    return Row(f"{EPISODES:,} episodes, {name} (once)", rival, 1e3 * seconds, None, target, None if limit is None else seconds < limit)


def main() -> None:
    """Measure and write the table."""
    torch.set_num_threads(2)
    wide = features()
    narrow = (wide[0][:, :128].contiguous(), wide[1], wide[2][:, :128].contiguous(), wide[3])
    paper, small = "d = 640, 750 samples", "d = 128, 200 samples"
    write(
        "many_episodes",
        [
            _run("head='lda'", paper, wide, None, head="lda"),
            _run("logistic head", small, narrow, 300, n_samples=200),
            _run("logistic head, sampler='bank'", paper, wide, None, sampler="bank"),
        ],
    )
