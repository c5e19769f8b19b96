"""The runtime checker of shapes: array annotations only.

Everything else that a signature says is checked by the functions themselves, with messages for the user, and it is those
messages that the tests of bad input look at.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray


def arrays_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and results of a function whose annotations are arrays (or hold some)."""
    if not callable(function) or isinstance(function, type):
        return function
    kept = {name: annotation for name, annotation in function.__annotations__.items() if _has_array(annotation)}
    if not kept:
        return function
    function.__annotations__ = kept
    return beartype(function)


def _has_array(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(_has_array(part) for part in typing.get_args(annotation))
