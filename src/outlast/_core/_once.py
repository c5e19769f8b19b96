"""Warnings that come once."""

from __future__ import annotations

import warnings

from outlast.errors import OutlastWarning


class Once:
    """Warns of each thing the first time only.

    Args:
        stacklevel: frames from whoever calls ``warn`` up to the line that the warning should name, as of ``warnings.warn``.
    """

    def __init__(self, stacklevel: int) -> None:
        self._stacklevel = stacklevel
        self._said: set[str] = set()

    def warn(self, message: str, *, key: str | None = None) -> None:
        """Warn, unless the same was said before; ``key`` stands for messages that differ in figures only."""
        if (key or message) not in self._said:
            self._said.add(key or message)
            warnings.warn(message, OutlastWarning, stacklevel=self._stacklevel + 1)
