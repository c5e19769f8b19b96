"""``python -m benchmarks [NAME ...]``."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time

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


def main(names: list[str]) -> int:
    """Run one benchmark here, several each in a process of its own: what one leaves in memory or in settings reaches no other."""
    unknown = sorted(set(names) - set(NAMES))
    if unknown:
        print(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    if len(names) == 1:
        importlib.import_module(f"benchmarks.{names[0]}").main()
        summarise(NAMES)
        return 0
    failed: list[str] = []
    start = time.perf_counter()
    for name in names or NAMES:
        print(f"\n{name}", flush=True)
        began = time.perf_counter()
        code = f"import importlib; importlib.import_module('benchmarks.{name}').main()"
        if subprocess.run([sys.executable, "-c", code], check=False).returncode:
            failed.append(name)  # its old figures stay; the others are still worth their time
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    summarise(NAMES)
    print(f"\n{len(names or NAMES) - len(failed)} files in {(time.perf_counter() - start) / 60:.1f} minutes")
    if failed:
        print(f"failed, with the figures of an earlier run in the table: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
