"""What a loader yields, and how a model takes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def arguments_of(batch: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch gives a model.

    A tensor is the input; of a tuple or list the first entry is (what follows is labels and the like); a mapping is
    keyword arguments, as transformers' models take them.
    """
    if isinstance(batch, Mapping):
        return (), {str(key): value for key, value in cast("Mapping[object, Any]", batch).items()}
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("a batch is an empty tuple: it must hold the model's input first")
        return (cast("tuple[Any, ...]", batch)[0],), {}
    return (batch,), {}


def call_with(model: nn.Module, batch: object) -> Any:
    """``model(...)`` on a batch of a loader."""
    args, kwargs = arguments_of(batch)
    return model(*args, **kwargs)


def device_of(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """``device`` if it is given, else where the model's parameters are."""
    if device is not None:
        return torch.device(device)
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def rows_of(arguments: object) -> int | None:
    """Number of rows: the leading dimension of the first tensor in any nesting; None where there is none."""
    for leaf in tree_leaves(_plain(arguments)):
        if isinstance(leaf, Tensor) and leaf.ndim > 0:
            return int(leaf.shape[0])
    return None


def some_rows(batch: Any, rows: slice) -> Any:
    """A batch with some of its rows: every tensor whose leading dimension is that of the first is cut."""
    size = rows_of(batch)
    batch = _plain(batch)
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size else leaf, batch)


def _plain(batch: Any) -> Any:
    """Mappings as dictionaries: torch takes transformers' ``BatchEncoding`` and the like for one leaf."""
    return dict(cast("Mapping[str, Any]", batch)) if isinstance(batch, Mapping) else batch
