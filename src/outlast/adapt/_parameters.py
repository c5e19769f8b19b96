"""Which parameters adapt: all scales and shifts of normalisation layers, or all but those near the output."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from outlast._core import _checks

_BLOCK = re.compile(r"^(?:.*\.)?\d+(?=\.|$)")


def _block(name: str) -> str | None:
    """The innermost numbered module around the normalisation layer that a parameter belongs to."""
    around = name.rpartition(".")[0].rpartition(".")[0]
    found = _BLOCK.match(around)
    return found.group() if found else None


class NormAffineExcept:
    """The choice that ``norm_affine_except`` makes."""

    def __init__(self, last: int | tuple[str, ...]) -> None:
        self._last = last

    def choose(self, names: Sequence[str]) -> list[str]:
        """The names that stay, of all scales and shifts in the model's order."""
        if isinstance(self._last, tuple):
            for prefix in self._last:
                if not any(_below(name, prefix) for name in names):
                    raise ValueError(f"no normalisation parameter lies below {prefix!r}; they are {', '.join(names[:6])}, ...")
            return [name for name in names if not any(_below(name, prefix) for prefix in self._last)]
        blocks = list(dict.fromkeys(block for name in names if (block := _block(name)) is not None))
        if self._last == 0:
            return list(names)
        if len(blocks) <= self._last:
            raise ValueError(f"last={self._last} leaves nothing to adapt: the normalisation layers lie in {len(blocks)} numbered blocks")
        out = set(blocks[-self._last :])
        first = min(n for n, name in enumerate(names) if _block(name) in out)
        # what comes after the blocks, such as a transformer's final norm, is nearer still to the output
        return [name for n, name in enumerate(names) if n < first]

    def __call__(self, name: str, _parameter: nn.Parameter) -> bool:
        """Whether a single parameter stays, for a choice by names."""
        if not isinstance(self._last, tuple):
            raise TypeError("norm_affine_except(last=<number>) chooses among all names of a model; hand it to an adapter as params=")
        return not any(_below(name, prefix) for prefix in self._last)

    def __repr__(self) -> str:
        return f"norm_affine_except(last={self._last!r})"


def norm_affine_except(last: int | str | Sequence[str]) -> NormAffineExcept:
    """Scales and shifts of all normalisation layers but the last ones (SAR's advice for models without BatchNorm).

    ```python
    Tent(vit, params=norm_affine_except(last=3))  # not the last three blocks, nor what follows them
    Tent(resnet, params=norm_affine_except(last="layer4"))
    ```

    Args:
        last: a number of numbered blocks (``blocks.11``, ``layer4.1``, ``encoder.layer.5``), counted from the output, or
            the names of modules whose normalisation layers stay as they are.

    Raises:
        ValueError: a negative number; when used: a name that the model does not have, or nothing left to adapt.
    """
    if isinstance(last, str):
        return NormAffineExcept((last,))
    if isinstance(last, Sequence):
        return NormAffineExcept(tuple(last))
    return NormAffineExcept(_checks.integer("last", last, low=0))


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")
