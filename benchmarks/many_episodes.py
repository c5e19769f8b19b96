"""10,000 episodes of distribution calibration in one go, with progress, and the memory that they take."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from benchmarks._harness import Row, write
from benchmarks.distribution_calibration import features
from outlast.fewshot import BaseStatistics, DistributionCalibration, evaluate_episodes

EPISODES = 10_000


def _data(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base_rows, base_labels, rows, labels = features()
    return base_rows[:, :width].contiguous(), base_labels, rows[:, :width].contiguous(), labels


def _run(title: str, name: str, width: int, limit: float | None, settings: dict[str, Any]) -> Row:
    torch.set_num_threads(2)
    base_rows, base_labels, rows, labels = _data(width)
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
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024  # of this process, unlike getrusage's
    rival = f"{title}: {100 * found.accuracy:.2f} +- {100 * found.ci95:.2f} %, peak of the process {peak:,.0f} MB"
    target = "" if limit is None else f"< {limit:g} s"
    return Row(f"{EPISODES:,} episodes, {name} (once)", rival, 1e3 * seconds, None, target, None if limit is None else seconds < limit)


def main() -> None:
    """Measure and write the table, each form in a process of its own, so that its peak is its own."""
    torch.set_num_threads(2)  # as in the processes: written into the table
    paper, small = "d = 640, 750 samples", "d = 128, 200 samples"
    forms: list[tuple[str, str, int, float | None, dict[str, Any]]] = [
        ("head='lda'", paper, 640, None, {"head": "lda"}),
        ("logistic head", small, 128, 300, {"n_samples": 200}),
        ("logistic head, sampler='bank'", paper, 640, None, {"sampler": "bank"}),
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        write("many_episodes", [pool.submit(_run, *form).result() for form in forms])
