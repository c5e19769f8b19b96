"""Timing rivals against each other in one process."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from outlast.studies._environment import environment

RESULTS = Path(__file__).parent / "results"
TABLE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


@dataclass(frozen=True)
class Row:
    """One measured line: a rival's median, and what it is compared with."""

    benchmark: str
    rival: str
    milliseconds: float
    ratio: float | None = None
    target: str = ""
    met: bool | None = None


def medians(rivals: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each rival; they take turns in random order, so that a slow moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order, shuffle = list(rivals.items()), random.Random(0)
    for repeat in range(repeats + warmup):
        shuffle.shuffle(order)  # what ran before leaves the memory in another state
        for name, call in order:
            start = time.perf_counter()
            call()
            if repeat >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def write(name: str, rows: list[Row]) -> None:
    """Write a table for people and JSON for programs, with the machine that was measured."""
    RESULTS.mkdir(exist_ok=True)
    machine = {**environment(), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "node": platform.machine()}
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": [row.__dict__ for row in rows]}, indent=2) + "\n")
    lines = [
        f"# Benchmarks: {name}",
        "",
        f"`python -m benchmarks {name}` on {machine['processor']}, {machine['threads']} thread, torch {machine['torch']}.",
        "",
    ]
    lines += ["| benchmark | measured | ms (median) | ratio | target | met |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.benchmark} | {row.rival} | {_time(row.milliseconds)} | {ratio} | {row.target} | {_met(row.met)} |")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[4:]))


def summarise(names: Sequence[str]) -> None:
    """One table of all results on disk, misses named; printed, and written into the book."""
    lines = ["# All benchmarks", "", "`make bench` measures all, `python -m benchmarks NAME` one. Medians; ratios within one run.", ""]
    lines += ["| file | benchmark | measured | ms (median) | ratio | target | met |", "|---|---|---|---|---|---|---|"]
    judged = missed = 0
    for name in names:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text())["rows"]:
            if row["met"] is None and row["ratio"] is None:
                continue
            judged, missed = judged + (row["met"] is not None), missed + (row["met"] is False)
            ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
            cells = (name, row["benchmark"], row["rival"], _time(row["milliseconds"]), ratio, row["target"], _met(row["met"]))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"{judged - missed} of {judged} targets met, {missed} missed."]
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines[4:]]))


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds else ""  # rows of memory and accuracy have none


def _met(met: bool | None) -> str:
    return "" if met is None else ("yes" if met else "**missed**")
