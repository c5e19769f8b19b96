"""Which data sets there are, where each may lie, and how its files are known to be whole.

This module imports neither torch nor numpy: the command lists data sets without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from outlast.errors import MissingDataError

Split = Literal["train", "test"]
Variant = Literal["full", "small"]
EMBEDDED = Path(__file__).parent / "_embedded"


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of one data set.

    Attributes:
        name: as ``load`` and the command take it.
        title: as it is printed.
        content: one line on shape and size.
        licence: terms, with the source's own words where it states none.
        source: where it comes from.
        folder: its folder inside ``OUTLAST_DATA`` (and inside the package, for an embedded subset).
        classes: names of the classes, in the order of the labels.
        splits: images in each split of the full set.
        small: images in each split of the embedded subset; empty where nothing is embedded.
        files: SHA-256 by split and file name of the full set: of the file itself for archives, of the unpacked bytes
            for IDX files, which lie packed or unpacked.
        small_files: the same of the embedded subset.
        torchvision: name of torchvision's class, and the folder that it keeps its files in.
        note: what a reader of results must know.
    """

    name: str
    title: str
    content: str
    licence: str
    source: str
    folder: str
    classes: tuple[str, ...]
    splits: Mapping[str, int]
    small: Mapping[str, int]
    files: Mapping[str, Mapping[str, str]]
    small_files: Mapping[str, Mapping[str, str]]
    torchvision: tuple[str, str]
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where the files of one split were found."""

    kind: Literal["embedded", "folder", "torchvision"]
    files: tuple[Path, ...]
    checksums: tuple[str, ...]


def _idx(train_images: str, train_labels: str, test_images: str, test_labels: str) -> dict[str, dict[str, str]]:
    return {
        "train": {"train-images-idx3-ubyte": train_images, "train-labels-idx1-ubyte": train_labels},
        "test": {"t10k-images-idx3-ubyte": test_images, "t10k-labels-idx1-ubyte": test_labels},
    }


_FASHION_TEST = (
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_MNIST_TEST = (
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)

_CIFAR100_CLASSES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm "
)

_OMNIGLOT = (  # alphabets with the number of their characters: 30 of the background, 20 of the evaluation
    "Arcadian:26 Armenian:41 Asomtavruli_(Georgian):40 Balinese:24 Bengali:46 "
    "Blackfoot_(Canadian_Aboriginal_Syllabics):14 Braille:26 Cyrillic:33 Early_Aramaic:22 Syriac_(Estrangelo):23 "
    "Anglo-Saxon_Futhorc:29 Futurama:26 Grantha:43 Greek:24 Gujarati:48 Hebrew:22 Japanese_(hiragana):52 "
    "Inuktitut_(Canadian_Aboriginal_Syllabics):16 Malay_(Jawi_-_Arabic):40 Japanese_(katakana):47 Korean:40 "
    "Latin:26 Alphabet_of_the_Magi:20 Mkhedruli_(Georgian):41 Burmese_(Myanmar):34 N_Ko:33 "
    "Ojibwe_(Canadian_Aboriginal_Syllabics):14 Sanskrit:42 Tagalog:17 Tifinaghs:55 Angelic:20 Atemayar_Qelisayer:26 "
    "Atlantean:26 Aurek-Besh:26 Avesta:26 Ge_ez:26 Glagolitic:45 Gurmukhi:45 Kannada:41 Keble:26 Malayalam:47 "
    "Manipuri:40 Mongolian:30 Old_Church_Slavonic_(Cyrillic):45 Oriya:46 Syriac_(Serto):23 Sylheti:28 Tengwar:25 "
    "Tibetan:42 ULOG:26 "
)


def _characters() -> tuple[str, ...]:
    alphabets = (entry.rpartition(":")[::2] for entry in _OMNIGLOT.split())
    return tuple(f"{alphabet} {number}" for alphabet, count in alphabets for number in range(1, int(count) + 1))


_ALL = (
    DatasetInfo(
        name="fashion-mnist",
        title="Fashion-MNIST",
        content="grey 28x28 pictures of clothing in 10 classes",
        licence="MIT (Zalando SE)",
        source="https://github.com/zalandoresearch/fashion-mnist",
        folder="fashion_mnist",
        classes=("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        splits={"train": 60_000, "test": 10_000},
        small={"train": 10_000, "test": 10_000},
        files=_idx(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            *_FASHION_TEST,
        ),
        small_files=_idx(
            "3590ca343312c6764475469c15b99eb03e920b3530b0f4d69b4b2b648a37f279",
            "a4624fcf3983054db9239851297e2af6158640723d1e89cfebddde715d4dae0f",
            *_FASHION_TEST,
        ),
        torchvision=("FashionMNIST", "FashionMNIST/raw"),
    ),
    DatasetInfo(
        name="mnist",
        title="MNIST",
        content="grey 28x28 handwritten digits",
        licence="CC BY-SA 3.0 as usually stated (LeCun, Cortes, Burges); the PNG conversion that it came through is MIT",
        source="http://yann.lecun.com/exdb/mnist/",
        folder="mnist",
        classes=tuple("0123456789"),
        splits={"train": 60_000, "test": 10_000},
        small={"train": 10_000, "test": 10_000},
        files=_idx(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            *_MNIST_TEST,
        ),
        small_files=_idx(
            "3e8f200b980a97e08d2c9f873c33833f7cf222bae2e39047ab6a0277311f0fd7",
            "f07ab3d0559a9fbe959eb0dc2184f2d39f5a8bff4c31d2ed6c0e331d237cb1cf",
            *_MNIST_TEST,
        ),
        torchvision=("MNIST", "MNIST/raw"),
    ),
    DatasetInfo(
        name="cifar10",
        title="CIFAR-10",
        content="colour 32x32 photographs in 10 classes",
        licence="none stated by the authors; free for research with the citation Krizhevsky 2009",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        folder="cifar10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        splits={"train": 50_000, "test": 10_000},
        small={},
        files={
            "train": {"train_jpeg.zip": "eff091ebc7d716e4226f111f5158cb830d6aa443013ac072c193a2311d041757"},
            "test": {"test_lossless.zip": "cbe8344a01b681eb1da3c2a0b419d4437185e91f0b0e575aba2ba3c223b119a3"},
        },
        small_files={},
        torchvision=("CIFAR10", "cifar-10-batches-py"),
        note="in the outlast layout training images are JPEG (quality 90) and test images exact; torchvision's copy is exact",
    ),
    DatasetInfo(
        name="cifar100",
        title="CIFAR-100",
        content="colour 32x32 photographs in 100 classes",
        licence="none stated by the authors; free for research with the citation Krizhevsky 2009",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
        folder="cifar100",
        classes=tuple(_CIFAR100_CLASSES.split()),
        splits={"train": 50_000, "test": 10_000},
        small={},
        files={
            "train": {"train_jpeg.zip": "7ea55bf8dac80a8ab0a37370f9d0f1e193925aca1f34d398333f91931caa25b3"},
            "test": {"test_jpeg.zip": "5a6d19455cdd46f41d388ffb5365925f60038e426585f7ac71fadd0b557fc3cd"},
        },
        small_files={},
        torchvision=("CIFAR100", "cifar-100-python"),
        note="in the outlast layout both splits are JPEG (quality 80): for comparisons between methods, not with papers' figures",
    ),
    DatasetInfo(
        name="omniglot",
        title="Omniglot",
        content="black and white 105x105 drawings of 1,623 characters, 20 of each (embedded: all of them at 28x28)",
        licence="MIT (Brenden Lake)",
        source="https://github.com/brendenlake/omniglot",
        folder="omniglot",
        classes=_characters(),
        splits={"train": 19_280, "test": 13_180},
        small={"train": 19_280, "test": 13_180},
        files={
            "train": {"images_background.npz": "8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199"},
            "test": {"images_evaluation.npz": "0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276"},
        },
        small_files={
            "train": {"background-28x28-1bit": "f8c000bcbcb6e3506aa8cc802190ea1e6d5bb25fc23dca1e79e3429803948d7a"},
            "test": {"evaluation-28x28-1bit": "e7df8303784935d8e2d8a5a595659fd27bb9c53bb5de1f27c55f7bf4e17462bd"},
        },
        torchvision=("Omniglot", "omniglot-py"),
        note="train is the background set (characters 0 to 963), test the evaluation set (964 to 1,622); ink is 255, paper 0",
    ),
)

DATASETS: Mapping[str, DatasetInfo] = {entry.name: entry for entry in _ALL}
"""All image sets, by name."""


def info(name: str) -> DatasetInfo:
    """The entry of a data set.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name]


def data_folder() -> Path | None:
    """The folder that ``OUTLAST_DATA`` names; None if it is not set.

    Raises:
        MissingDataError: it is set, and there is no such folder.
    """
    setting = os.environ.get("OUTLAST_DATA", "")
    if not setting:
        return None
    folder = Path(setting).expanduser()
    if not folder.is_dir():
        raise MissingDataError(f"OUTLAST_DATA names {setting!r}, which is no folder")
    return folder


def find(name: str, split: Split, variant: Variant = "full") -> Place:
    """Where the files of a split lie, without opening them.

    The full set is looked for in ``OUTLAST_DATA``, first in the layout of this project, then in torchvision's.

    Raises:
        ValueError: unknown name, split or variant, or a set of which nothing is embedded.
        MissingDataError: not at hand; the message says how to get it.
    """
    entry = info(name)
    if split not in entry.splits:
        raise ValueError(f"split must be one of {', '.join(map(repr, entry.splits))}, got {split!r}")
    if variant == "small":
        if not entry.small_files:
            raise ValueError(f"nothing of {entry.title} is embedded, so it has no variant 'small'")
        names = entry.small_files[split]
        return Place("embedded", tuple(EMBEDDED / entry.folder / f"{file}.xz" for file in names), tuple(names.values()))
    if variant != "full":
        raise ValueError(f"variant must be 'full' or 'small', got {variant!r}")
    folder = data_folder()
    if folder is not None:
        files = entry.files[split]
        layouts: tuple[tuple[Literal["folder", "torchvision"], Path], ...] = (
            ("folder", folder / entry.folder),
            ("torchvision", folder / entry.torchvision[1]),
        )
        for place, root in layouts:
            found = [_present(root, file) for file in files]
            if all(path is not None for path in found):
                return Place(place, tuple(path for path in found if path is not None), tuple(files.values()))
        drawings = folder / entry.torchvision[1] / f"images_{'background' if split == 'train' else 'evaluation'}"
        if name == "omniglot" and drawings.is_dir():
            return Place("torchvision", (drawings,), ())
        meta = {"cifar10": "batches.meta", "cifar100": "meta"}.get(name)
        if meta is not None and (folder / entry.torchvision[1] / meta).is_file():
            return Place("torchvision", (folder,), ())
    where = f"not found in {folder}" if folder is not None else "OUTLAST_DATA is not set"
    raise MissingDataError(
        f"{entry.title} ({split}) is not at hand ({where}). Set OUTLAST_DATA to a folder that holds it, or fetch it there with: "
        f"outlast data fetch {name}" + (f". An embedded subset is variant='small' ({entry.small[split]:,} images)" if entry.small else "")
    )


def _present(root: Path, file: str) -> Path | None:
    """A file as it is, or packed."""
    for name in (file, f"{file}.xz", f"{file}.gz"):
        if (root / name).is_file():
            return root / name
    return None
