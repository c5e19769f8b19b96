"""Seeds that are functions of (seed, name, index), so that any draw can be repeated on its own."""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, name: str, index: int = 0) -> int:
    """A 63-bit seed that depends on all three arguments and on nothing else.

    A hash rather than arithmetic: neighbouring seeds or indices must not give related streams.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, name: str, index: int = 0, *, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded with :func:`derived_seed`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, name, index))
