"""``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import importlib
import sys

from benchmarks._harness import summarise

NAMES = (
    "sam",
    "tent",
    "pad",
    "dimension",
    "gpm",
    "gradvac",
    "startup",
    "distribution_calibration",
    "many_episodes",
    "mixup",
    "group_invariance",
    "attention",
    "padding",
    "sample_efficiency",
)

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
    summarise(NAMES)
