"""Pretrained weights: where they lie, and how their files are known to be whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from outlast._core._extras import require
from outlast.data._registry import EMBEDDED, data_folder
from outlast.errors import DamagedFileError, MissingDataError


@dataclass(frozen=True)
class WeightsInfo:
    """What is known of one file of weights.

    Attributes:
        name: as ``load_weights`` takes it.
        content: architecture, training data and accuracy, in one line.
        licence: terms.
        source: where it comes from.
        file: its name, in the folder ``models`` of ``OUTLAST_DATA`` or of the package.
        sha256: of the file.
        embedded: whether it lies in the package.
    """

    name: str
    content: str
    licence: str
    source: str
    file: str
    sha256: str
    embedded: bool


_SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10"
WEIGHTS: Mapping[str, WeightsInfo] = {
    entry.name: entry
    for entry in (
        WeightsInfo(
            "cifar10-resnet20",
            "residual network of depth 20 for CIFAR-10, 269,722 weights, 8.27 % test error, for inputs normalised as ImageNet's",
            "BSD-2-Clause (Yerlan Idelbayev)",
            _SOURCE,
            "cifar10_resnet20.safetensors",
            "bff94ce6ac95a00413f69cad4dc048817b8a4a72f0d6bab5fdb20e46548d84ee",
            True,
        ),
        WeightsInfo(
            "cifar10-resnet56",
            "residual network of depth 56 for CIFAR-10, 853,018 weights",
            "BSD-2-Clause (Yerlan Idelbayev)",
            _SOURCE,
            "cifar10_resnet56.safetensors",
            "3bcd597e383465395c3f4d37bb7129ecc3b52d8b17bf7f01933cd9e9fdc7352b",
            False,
        ),
    )
}
"""All pretrained weights, by name."""


def find_weights(name: str) -> Path:
    """Where a file of weights lies.

    Raises:
        ValueError: unknown name.
        MissingDataError: not at hand.
    """
    if name not in WEIGHTS:
        raise ValueError(f"unknown weights {name!r}; known: {', '.join(WEIGHTS)}")
    entry = WEIGHTS[name]
    if entry.embedded:
        return EMBEDDED / "models" / entry.file
    folder = data_folder()
    if folder is not None and (folder / "models" / entry.file).is_file():
        return folder / "models" / entry.file
    where = f"not found in {folder}" if folder is not None else "OUTLAST_DATA is not set"
    raise MissingDataError(
        f"the weights {name} are not at hand ({where}). Set OUTLAST_DATA to a folder that holds models/{entry.file} "
        f"(converted from {entry.source})"
    )


def load_weights(name: str) -> dict[str, Tensor]:
    """The state dict of a pretrained model.

    Raises:
        ValueError: unknown name.
        MissingDataError: not at hand.
        DamagedFileError: the file is not the published one.
        MissingExtraError: safetensors (extra ``cli``) is missing.
    """
    path = find_weights(name)
    safetensors = require("safetensors.torch", extra="cli", purpose="reading weights")
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != WEIGHTS[name].sha256:
        raise DamagedFileError(f"{path} is not the published file (SHA-256 {found[:12]}..., expected {WEIGHTS[name].sha256[:12]}...)")
    return safetensors.load(data)
