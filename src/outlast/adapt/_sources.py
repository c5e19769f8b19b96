"""What adapters have in common that keep source weights: the optimizer's factory, loading, moving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor, nn
from torch.optim import Optimizer


class HasSource(Protocol):
    """An adapter whose source weights must follow what is loaded into its modules."""

    def _new_source(self) -> None: ...


def check_factory(optimizer: object) -> Callable[[list[nn.Parameter]], Optimizer] | None:
    """The factory as it is.

    Raises:
        TypeError: a built optimizer, or no function.
    """
    if isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must be a factory, got a built {kind}; give optimizer=lambda params: torch.optim.{kind}(params, ...)")
    if optimizer is not None and not callable(optimizer):
        raise TypeError(f"optimizer must be a function from parameters to an optimizer, got {type(optimizer).__name__}")
    return cast("Callable[[list[nn.Parameter]], Optimizer] | None", optimizer)


def move_state(optimizer: Optimizer, fn: Callable[[Tensor], Tensor]) -> None:
    """Move an optimizer's state as ``nn.Module.to`` moves the weights; step numbers stay where they are."""
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if isinstance(value, Tensor) and key != "step":
                entries[key] = fn(value)


class Reload:
    """Tells an adapter that a checkpoint was loaded into its model. A copy of the model alone tells nobody."""

    def __init__(self, adapter: HasSource | None) -> None:
        self._adapter = adapter

    def __call__(self, _module: nn.Module, _keys: object) -> None:
        if self._adapter is not None:
            self._adapter._new_source()

    def __deepcopy__(self, memo: dict[int, Any]) -> Reload:
        return Reload(memo.get(id(self._adapter)))
