"""Optional packages: imported where they are used, and named with their extra when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from outlast.errors import MissingExtraError


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise ``MissingExtraError`` naming the extra that brings it.

    Args:
        module: dotted module name.
        extra: the extra of ``outlast`` that installs it.
        purpose: what it is needed for, as the subject of the sentence ("the training loop of studies").
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f'{purpose} needs the package {package!r}, which is not installed; install it with: pip install "outlast[{extra}]"'
        ) from error
