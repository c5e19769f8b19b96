"""Reading data sets into tensors, refusing files that are not whole."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from outlast._core._extras import require
from outlast._core._typing import Float, Int, UInt8
from outlast.data._registry import DatasetInfo, Place, Split, Variant, find, info
from outlast.errors import DamagedFileError

UInt8Array = npt.NDArray[np.uint8]


class ImageSet(TensorDataset):
    """Labelled images as two tensors and as a ``torch.utils.data.Dataset`` of ``(image, label)``.

    Attributes:
        images: uint8, shape ``(n, channels, height, width)``.
        labels: int64, shape ``(n,)``.
        classes: names of the classes.
        origin: where the pixels come from, for the record of a result.
    """

    def __init__(self, images: UInt8[Tensor, "n c h w"], labels: Int[Tensor, " n"], classes: tuple[str, ...], origin: str) -> None:
        super().__init__(images, labels)
        self.images = images
        self.labels = labels
        self.classes = classes
        self.origin = origin

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images of {'x'.join(map(str, self.images.shape[1:]))}, {len(self.classes)} classes, {self.origin})"


def load(name: str, split: Split = "train", *, variant: Variant = "full") -> ImageSet:
    """Load a split of a data set.

    Args:
        name: one of ``DATASETS``: ``"fashion-mnist"``, ``"mnist"``, ``"cifar10"``, ``"cifar100"``, ``"omniglot"``.
        split: ``"train"`` or ``"test"``.
        variant: ``"full"`` from the folder that ``OUTLAST_DATA`` names, or ``"small"``, the subset inside the package.

    Raises:
        ValueError: unknown name, split or variant.
        MissingDataError: the files are not at hand.
        DamagedFileError: a file is truncated or is not the published one.
        MissingExtraError: CIFAR needs the extra ``vision`` (it is stored as pictures).
    """
    entry = info(name)
    place = find(name, split, variant)
    if name in ("cifar10", "cifar100"):
        images, labels, origin = _load_cifar(entry, place, split)
    elif name == "omniglot":
        images, labels, origin = _load_omniglot(entry, place, split)
    else:
        images, labels = (_read_idx(path, checksum) for path, checksum in zip(place.files, place.checksums, strict=True))
        images = images[:, None]
        origin = f"{entry.title} {split}, {'embedded subset' if place.kind == 'embedded' else 'full set'}"
    expected = (entry.small if variant == "small" else entry.splits)[split]
    if len(images) != expected or len(labels) != expected:
        raise DamagedFileError(f"{place.files[0]} holds {len(images)} images and {len(labels)} labels, expected {expected}")
    return ImageSet(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), entry.classes, origin)


def standardise(images: UInt8[Tensor, "n c h w"], mean: Tensor, std: Tensor) -> Float[Tensor, "n c h w"]:
    """Images in [0, 1] minus ``mean`` over ``std``, per channel (both of shape ``(c,)``), as float32."""
    scaled = images.to(torch.float32) / 255.0
    return (scaled - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)


def _unpack(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if path.suffix == ".xz":
            return lzma.decompress(data)
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path} cannot be unpacked ({error}); get it again") from error


def _check(path: Path, data: bytes, checksum: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != checksum:
        raise DamagedFileError(f"{path} is not the published file (SHA-256 {found[:12]}..., expected {checksum[:12]}...); get it again")


def _read_idx(path: Path, checksum: str) -> UInt8Array:
    data = _unpack(path)
    _check(path, data, checksum)
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(data[3])]
    assert len(data) == 4 + 4 * len(shape) + math.prod(shape)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _load_cifar(entry: DatasetInfo, place: Place, split: Split) -> tuple[UInt8Array, UInt8Array, str]:
    if place.kind == "torchvision":
        datasets = require("torchvision.datasets", extra="vision", purpose=f"reading {entry.title} in torchvision's layout")
        try:  # torchvision compares checksums before it opens the batches
            dataset = getattr(datasets, entry.torchvision[0])(str(place.files[0]), train=split == "train", download=False)
        except RuntimeError as error:
            raise DamagedFileError(f"{place.files[0]}: torchvision finds {entry.title} incomplete or damaged; get it again") from error
        images = np.asarray(dataset.data, np.uint8).transpose(0, 3, 1, 2)
        return images, np.asarray(dataset.targets, np.uint8), f"{entry.title} {split}, exact"
    image_module = require("PIL.Image", extra="vision", purpose=f"reading {entry.title}")
    path = place.files[0]
    data = path.read_bytes()
    _check(path, data, place.checksums[0])
    tiles_by_class: list[UInt8Array] = []
    labels_by_class: list[UInt8Array] = []
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        index = json.loads(archive.read("index.json"))
        tile, columns = int(index["tile"]), int(index["columns"])
        for name in sorted(set(archive.namelist()) - {"index.json"}):
            mosaic = np.asarray(image_module.open(io.BytesIO(archive.read(name))).convert("RGB"))
            tiles = mosaic.reshape(mosaic.shape[0] // tile, tile, columns, tile, 3).transpose(0, 2, 4, 1, 3)
            tiles_by_class.append(tiles.reshape(-1, 3, tile, tile))
            labels_by_class.append(np.full(len(tiles_by_class[-1]), int(name[:3]), np.uint8))
    codec = "exact" if index["options"].get("lossless") else f"{index['format']} quality {index['options']['quality']}"
    return np.concatenate(tiles_by_class), np.concatenate(labels_by_class), f"{entry.title} {split}, {codec}"


def _load_omniglot(entry: DatasetInfo, place: Place, split: Split) -> tuple[UInt8Array, npt.NDArray[np.int64], str]:
    """20 drawings of each character, in the order of characters and drawers; ink is 255."""
    path = place.files[0]
    if place.kind == "embedded":
        data = _unpack(path)
        _check(path, data, place.checksums[0])
        ink = np.unpackbits(np.frombuffer(data, np.uint8)).reshape(-1, 28, 28)
        origin = f"{entry.title} {split}, embedded at 28x28"
    elif place.kind == "folder":
        data = path.read_bytes()
        _check(path, data, place.checksums[0])
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            ink = ~arrays["images"].reshape(-1, 105, 105)
        origin = f"{entry.title} {split}, full set"
    else:
        image_module = require("PIL.Image", extra="vision", purpose=f"reading {entry.title}")
        places = {name.rpartition(" ")[0].rstrip("s"): number for number, name in enumerate(entry.classes)}  # "Tifinagh" in the archive
        drawings = list(path.glob("*/*/*.png"))
        unknown = {file.parts[-3] for file in drawings if file.parts[-3].rstrip("s") not in places}
        if unknown:
            raise DamagedFileError(f"{path} holds {min(unknown)!r}, which is no alphabet of {entry.title}")
        drawings.sort(key=lambda file: (places[file.parts[-3].rstrip("s")], file.parts[-2], file.stem.rpartition("_")[2]))
        if len(drawings) != entry.splits[split]:
            raise DamagedFileError(f"{path} holds {len(drawings)} drawings, expected {entry.splits[split]}; get it again")
        ink = np.stack([~np.asarray(image_module.open(file).convert("1")) for file in drawings])
        origin = f"{entry.title} {split}, full set"
    first = 0 if split == "train" else 964
    return (ink.astype(np.uint8) * np.uint8(255))[:, None], first + np.arange(len(ink)) // 20, origin
