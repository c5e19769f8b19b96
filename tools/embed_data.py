"""Make the embedded subsets from the full sets in OUTLAST_DATA, with their provenance.

Run ``OUTLAST_DATA=... python tools/embed_data.py``; the output is the same bytes every time. The training subset is the
first 1,000 images of each class in the order of a fixed permutation; the test sets are whole. Omniglot is whole, at 28x28
with one bit a pixel. Of the novels, excerpts of whole lines at equal distances.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

TARGET = Path(__file__).parent.parent / "src" / "outlast" / "data" / "_embedded"
PER_CLASS = 1000
SETS = {
    "fashion_mnist": {
        "title": "Fashion-MNIST",
        "source": "https://github.com/zalandoresearch/fashion-mnist",
        "citation": "Xiao, Rasul, Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017",
        "licence": "MIT",
        "licence_file": "fashion-mnist-MIT.txt",
    },
    "mnist": {
        "title": "MNIST",
        "source": "http://yann.lecun.com/exdb/mnist/, through the PNG conversion https://github.com/rasbt/mnist-pngs",
        "citation": "LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998",
        "licence": "CC BY-SA 3.0 as usually stated for MNIST; the PNG conversion is MIT",
        "licence_file": "mnist-png-conversion-MIT.txt",
    },
}


def read_idx(path: Path) -> tuple[np.ndarray, str]:
    data = lzma.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape), hashlib.sha256(data).hexdigest()


def write_idx(path: Path, array: np.ndarray) -> str:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    data = header + np.ascontiguousarray(array).tobytes()
    path.write_bytes(lzma.compress(data, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
    return hashlib.sha256(data).hexdigest()


def embed_omniglot(source: Path) -> None:
    folder = TARGET / "omniglot"
    folder.mkdir(parents=True, exist_ok=True)
    whole, embedded = {}, {}
    for split in ("background", "evaluation"):
        file = source / "omniglot" / f"images_{split}.npz"
        whole[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        with np.load(file, allow_pickle=False) as arrays:
            ink = torch.from_numpy(~arrays["images"].reshape(-1, 1, 105, 105))
        small = [F.interpolate(part.float(), size=(28, 28), mode="bilinear", antialias=True) > 0.3 for part in ink.split(1000)]
        bits = np.packbits(torch.cat(small).numpy()).tobytes()
        name = f"{split}-28x28-1bit"
        (folder / f"{name}.xz").write_bytes(lzma.compress(bits, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
        embedded[name] = hashlib.sha256(bits).hexdigest()
    provenance = {
        "title": "Omniglot",
        "source": "https://github.com/brendenlake/omniglot, through the conversion https://github.com/bitsandscraps/omniglot",
        "citation": "Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction, 2015",
        "licence": "MIT",
        "subset": "all 1,623 characters x 20 drawers, resized to 28x28 (bilinear with antialiasing), ink where its share is above 0.3, "
        "one bit a pixel, row by row, in the order of characters and drawers",
        "sha256_of_whole_files": whole,
        "sha256_of_unpacked_bytes": embedded,
    }
    shutil.copyfile(source / "LICENSES" / "omniglot-MIT.txt", folder / "LICENSE.txt")
    (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"omniglot: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


NOVELS_LICENCE = """The texts in this folder are excerpts of novels whose authors died before 1931. They come from Project Gutenberg's
texts, of which headers, footers and credits were removed, and are in the public domain in the United States and in
countries where copyright ends 70 years after the author's death or earlier (translations included: Constance Garnett
died in 1946; Louise and Aylmer Maude in 1939 and 1938).

Training: War and Peace, Moby Dick, Middlemarch, Bleak House, Anna Karenina, The Brothers Karamazov, Crime and
Punishment. Validation: David Copperfield. Test: Pride and Prejudice, The Adventures of Sherlock Holmes.

"Project Gutenberg" is a trademark of the Project Gutenberg Literary Archive Foundation, which has not reviewed these excerpts.
"""


def embed_novels(source: Path) -> None:
    folder = TARGET / "novels"
    folder.mkdir(parents=True, exist_ok=True)
    whole, embedded, sizes = {}, {}, {}
    for split, (pieces, size) in {"train": (8, 200_000), "valid": (2, 100_000), "test": (2, 100_000)}.items():
        data = lzma.decompress((source / "text" / f"novels_{split}.txt.xz").read_bytes())
        whole[f"novels_{split}.txt"] = hashlib.sha256(data).hexdigest()
        kept = b""
        for piece in range(pieces):
            start = data.index(b"\n", (2 * piece + 1) * len(data) // (2 * pieces)) + 1  # from the middle of each equal part
            kept += data[start : data.index(b"\n", start + size) + 1]
        name = f"novels_{split}_excerpts.txt"
        (folder / f"{name}.xz").write_bytes(lzma.compress(kept, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))
        embedded[name], sizes[split] = hashlib.sha256(kept).hexdigest(), len(kept)
    provenance = {
        "title": "Novels",
        "source": "https://github.com/GITenberg, numbers 2600, 2701, 145, 1023, 1399, 28054, 2554, 766, 1342, 1661",
        "licence": "public domain in the USA",
        "subset": "train: eight excerpts of 200,000 bytes, each from the middle of an eighth of the text; validation and test: "
        "two of 100,000; "
        "whole lines",
        "bytes": sizes,
        "sha256_of_whole_texts": whole,
        "sha256_of_unpacked_bytes": embedded,
    }
    (folder / "LICENSE.txt").write_text(NOVELS_LICENCE)
    (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
    print(f"novels: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


def main() -> None:
    source = Path(os.environ["OUTLAST_DATA"])
    embed_omniglot(source)
    embed_novels(source)
    for name, facts in SETS.items():
        folder = TARGET / name
        folder.mkdir(parents=True, exist_ok=True)
        provenance = {key: value for key, value in facts.items() if key != "licence_file"}
        provenance["subset"] = (
            f"train: the first {PER_CLASS} images of each class in the order of numpy.random.default_rng(0).permutation(60000), "
            "kept in that order; test: all 10,000 images in the original order"
        )
        provenance["sha256_of_idx_bytes"] = {"whole": {}, "embedded": {}}
        whole, embedded = provenance["sha256_of_idx_bytes"]["whole"], provenance["sha256_of_idx_bytes"]["embedded"]
        labels, _ = read_idx(source / name / "train-labels-idx1-ubyte.xz")
        order = np.random.default_rng(0).permutation(len(labels))
        rank = np.zeros(len(labels), int)
        for label in range(10):
            chosen = order[labels[order] == label]
            rank[chosen] = np.arange(len(chosen))
        keep = order[rank[order] < PER_CLASS]
        for kind in ("images-idx3", "labels-idx1"):
            for split in ("train", "t10k"):
                file = f"{split}-{kind}-ubyte"
                array, whole[file] = read_idx(source / name / f"{file}.xz")
                embedded[file] = write_idx(folder / f"{file}.xz", array[keep] if split == "train" else array)
        shutil.copyfile(source / "LICENSES" / facts["licence_file"], folder / "LICENSE.txt")
        (folder / "PROVENANCE.json").write_text(json.dumps(provenance, indent=2) + "\n")
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{name}: {len(keep)} training images, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
