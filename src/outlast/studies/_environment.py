"""What a result was computed with."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from outlast import __version__

Environment = dict[str, str | int | None]


@cache
def environment() -> Environment:
    """Versions, processor, and the revision of the source where it is a checkout; JSON types only."""
    import numpy as np
    import torch

    return {
        "outlast": __version__,
        "revision": _revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _revision() -> str | None:
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=5, check=True)  # noqa: S603, S607
        return done.stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top / "src" / "outlast" not in folder.parents:  # installed into somebody else's repository
            return None
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return None
