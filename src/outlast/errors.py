"""The exceptions and the one warning category of the package.

A user's mistake in an argument or in data is a plain ``ValueError`` or ``TypeError``. Everything else that the package
raises derives from ``OutlastError`` and also from the built-in class that callers expect.
"""

from __future__ import annotations

__all__ = [
    "DamagedFileError",
    "DivergedError",
    "MissingDataError",
    "MissingExtraError",
    "NotFittedError",
    "OutlastError",
    "OutlastWarning",
    "StateError",
    "UnsupportedError",
]


class OutlastError(Exception):
    """Base of all errors of the package that are not a plain ``ValueError`` or ``TypeError``."""


class MissingExtraError(OutlastError, ImportError):
    """A package of an optional extra is not installed; the message names the command that installs it."""


class MissingDataError(OutlastError, FileNotFoundError):
    """A data set or weights are not at hand; the message says how to get them."""

    def __str__(self) -> str:
        # OSError formats (errno, strerror) pairs; our errors carry one sentence.
        return str(self.args[0]) if self.args else ""


class DamagedFileError(OutlastError, OSError):
    """A file cannot be read whole or fails its checksum."""


class StateError(OutlastError, RuntimeError):
    """Calls came in an order that has no meaning, such as ``ascend`` twice."""


class UnsupportedError(OutlastError, NotImplementedError):
    """A combination of options or objects that does not exist."""


class DivergedError(OutlastError, RuntimeError):
    """A computation ended in NaN or infinity, or an alarm that was set to raise went off."""


class NotFittedError(OutlastError, ValueError, AttributeError):
    """An estimator is used before ``fit``."""


class OutlastWarning(UserWarning):
    """The one warning category: something is skipped or approximated, said once."""
