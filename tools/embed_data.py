"""Make the embedded subsets from the full sets in OUTLAST_DATA, with their provenance.

Run ``OUTLAST_DATA=... python tools/embed_data.py``; the output is the same bytes every time. The training subset is the
first 1,000 images of each class in the order of a fixed permutation; the test sets are whole. Omniglot is whole, at 28x28
with one bit a pixel.
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


def main() -> None:
    source = Path(os.environ["OUTLAST_DATA"])
    embed_omniglot(source)
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
