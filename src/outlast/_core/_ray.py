"""Ray, started for one piece of work."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlast._core._extras import require


@contextmanager
def ray_session(workers: int, threads: int, purpose: str) -> Generator[Any]:
    """The module ``ray``, connected to the cluster that ``RAY_ADDRESS`` names or to one of ``workers`` CPUs started here.

    A connection that is there already is used and left. Workers compute with ``threads`` threads each, and find a user's own modules
    in the current folder and in ``PYTHONPATH``.

    Raises:
        MissingExtraError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray: Any = require("ray", extra="cluster", purpose=purpose)
    if ray.is_initialized():
        yield ray
        return
    own = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(own))
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": workers, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
    try:
        yield ray
    finally:
        ray.shutdown()
