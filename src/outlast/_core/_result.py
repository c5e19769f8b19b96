"""Frozen results: small, printable, serialisable, plottable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch

from outlast._core._extras import require

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]


def to_json(value: object) -> JSON:
    """Reduce a value to JSON types; arrays become lists, non-finite numbers become None (JSON has no name for them)."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, torch.Tensor):
        return to_json(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray):
        return to_json(cast("object", value.tolist()))
    if isinstance(value, np.generic):
        return to_json(cast("object", value.item()))
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in cast("Mapping[object, object]", value).items()}
    if isinstance(value, Sequence):
        return [to_json(item) for item in cast("Sequence[object]", value)]
    raise TypeError(f"a result holds {type(value).__name__}, which has no JSON form")


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """Base of all results of diagnostics and reports.

    ``to_dict()`` gives JSON types only, with ``kind`` (the class) and ``version``; ``repr`` shows numbers shortly and
    arrays by their shape; ``plot(ax=None)`` draws with matplotlib (extra ``report``).
    """

    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, JSON]:
        """All fields as JSON types, with ``kind`` and ``version``."""
        fields = {field.name: to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"kind": type(self).__name__, "version": self.version, **fields}

    def plot(self, ax: Any = None) -> Any:
        """Draw the result and return the matplotlib axes."""
        if ax is None:
            pyplot = require("matplotlib.pyplot", extra="report", purpose="plot()")
            ax = pyplot.subplots()[1]
        self._draw(ax)
        return ax

    def _draw(self, ax: Any) -> None:
        raise TypeError(f"{type(self).__name__} has no picture")

    def __repr__(self) -> str:
        parts = [f"{field.name}={_short(getattr(self, field.name))}" for field in dataclasses.fields(self)]
        return f"{type(self).__name__}({', '.join(parts)})"


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        if value.ndim == 0:
            return f"{float(value):.4g}"
        return f"<{'x'.join(map(str, value.shape))} array>"
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value)
