"""One way to validate a number that a user gives."""

from __future__ import annotations

import math
from numbers import Integral, Real


def real(
    name: str, value: object, *, low: float = -math.inf, high: float = math.inf, low_open: bool = False, infinite: bool = False
) -> float:
    """Return ``value`` as a float, or raise naming the argument, the value and the accepted range.

    Raises:
        TypeError: not a real number (booleans are refused: they are a mistake far more often than a choice).
        ValueError: NaN, infinite (unless ``infinite``), or outside ``[low, high]`` (``(low, high]`` if ``low_open``).
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    inside = (number > low if low_open else number >= low) and number <= high
    if math.isnan(number) or (math.isinf(number) and not infinite) or not inside:
        left = "(" if low_open or math.isinf(low) else "["
        right = ")" if math.isinf(high) and not infinite else "]"
        kind = "a number" if infinite else "a finite number"
        raise ValueError(f"{name} must be {kind} in {left}{low:g}, {high:g}{right}, got {value!r}")
    return number


def integer(name: str, value: object, *, low: int) -> int:
    """Return ``value`` as an int of at least ``low``.

    Raises:
        TypeError: not an integer.
        ValueError: below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return number


def choice(name: str, value: object, accepted: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``accepted``.

    Raises:
        ValueError: anything else; the message lists what is accepted.
    """
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value
