"""Seeds that are functions of (seed, name, index), so that any draw can be repeated on its own, and orthogonal draws.

Also the one place where global generators are seeded: around code of the user that draws from them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derived_seed(seed: int, name: str, index: int = 0) -> int:
    """A 63-bit seed that depends on all three arguments and on nothing else.

    A hash rather than arithmetic: neighbouring seeds or indices must not give related streams.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, name: str, index: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded with ``derived_seed``."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, name, index))


def own_stream(given: torch.Generator | None, name: str) -> torch.Generator:
    """The generator that was given, or a fixed one of this name: never the global one."""
    return generator(0, name) if given is None else given


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Generator[None]:
    """Python's, numpy's and torch's generators seeded inside, as they were before on leaving, after an exception too.

    Of devices only the one that is named, or the current one if it is in use: naming none to torch would take all of them, with a
    warning.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  the user's code may use it
    try:
        if device is not None:
            devices = [device] if device.type == "cuda" else []
        else:
            devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def haar_orthogonal(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices ``(..., d, k)`` with k <= d orthonormal columns, uniform (Haar): orthogonal ones where k = d.

    LAPACK fixes signs in its QR factorisation, so its Q alone is not uniform: an estimator that is not even in the rows, such as
    positive random features, would be biased. Multiplying column j by the sign of R_jj makes the factorisation unique, hence Haar
    (Mezzadri, 2007).
    """
    device = generator.device if generator is not None else None
    q, r = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=dtype, device=device))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0.0, -1.0, 1.0).to(dtype)
    return q * signs.unsqueeze(-2)


def orthogonal_blocks(*shape: int, generator: torch.Generator | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrices of unit rows, shape ``(..., rows, d)``: rows are orthogonal within each block of d, blocks are independent."""
    *leading, rows, d = shape
    blocks = -(-rows // d)
    stacked = haar_orthogonal(*leading, blocks, d, d, generator=generator, dtype=dtype).mT
    return stacked.reshape(*leading, blocks * d, d)[..., :rows, :]
