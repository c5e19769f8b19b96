"""Fetching a data set on request, through torchvision's downloaders."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from outlast._core._extras import require
from outlast.data._registry import data_folder, info
from outlast.errors import MissingDataError


def fetch(name: str, folder: Path | None = None) -> Path:
    """Download a data set into a folder, in torchvision's layout, with checksums and a progress bar.

    Args:
        name: one of ``DATASETS``.
        folder: where to; None for the folder that ``OUTLAST_DATA`` names.

    Returns:
        The folder of the set.

    Raises:
        ValueError: unknown name, or no folder given and ``OUTLAST_DATA`` not set.
        MissingDataError: the source cannot be reached, or sent something else.
        MissingExtraError: torchvision (extra ``vision``) is missing.
    """
    entry = info(name)
    target = folder if folder is not None else data_folder()
    if target is None:
        raise ValueError("no folder to fetch into: set OUTLAST_DATA to one, or name one with --folder")
    datasets = require("torchvision.datasets", extra="vision", purpose="fetching data sets")
    cls_name, subfolder = entry.torchvision
    try:
        # torchvision prints to standard output, which belongs to results
        with contextlib.redirect_stdout(sys.stderr):
            for train in (True, False):
                split = {"background": train} if name == "omniglot" else {"train": train}
                getattr(datasets, cls_name)(str(target), **split, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise MissingDataError(
            f"{entry.title} could not be fetched ({reason}). Offline, copy it from another machine into {target / subfolder}"
        ) from error
    return target / subfolder
