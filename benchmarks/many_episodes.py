"""The paper's 10,000 episodes of distribution calibration at d = 640 in one go, with progress, and the memory that it takes."""

from __future__ import annotations

import resource
import time

from rich.progress import Progress

from benchmarks._harness import Row, write
from benchmarks.distribution_calibration import features
from outlast.fewshot import BaseStatistics, DistributionCalibration, evaluate_episodes

EPISODES = 10_000


def main() -> None:
    """Measure and write the table."""
    base_rows, base_labels, rows, labels = features()
    base = BaseStatistics.from_features(base_rows, base_labels)
    table: list[Row] = []
    for title, settings in (("head='lda'", {"head": "lda"}), ("logistic head, sampler='bank'", {"sampler": "bank"})):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        with Progress() as bar:
            task = bar.add_task(title, total=EPISODES)
            found = evaluate_episodes(
                DistributionCalibration(base, **settings),
                rows,
                labels,
                episodes=EPISODES,
                batch_size=64,
                progress=lambda done, _all, task=task, bar=bar: bar.update(task, completed=done),
            )
        seconds = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        name = f"{EPISODES:,} episodes, d = 640, 64 base classes x 600, 5-way 1-shot, 750 samples"
        table.append(
            Row(name, f"{title}: {100 * found.accuracy:.2f} +- {100 * found.ci95:.2f} %, {grown:,.0f} MB more at the peak", 1e3 * seconds)
        )
    write("many_episodes", table)
