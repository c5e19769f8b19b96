"""The user's own code draws from global generators: they are seeded for it and restored afterwards."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int) -> Generator[None]:
    """Python's, numpy's and torch's generators seeded inside, as they were before on leaving, after an exception too."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the user's code may use it
    try:
        with torch.random.fork_rng():
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
