"""Data sets are found, checked and refused when they are not whole."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from outlast.data import DATASETS, TEXTS, fetch, find, find_catalogues, find_encoder, load, load_catalogues, load_text, standardise
from outlast.data._registry import EMBEDDED
from outlast.errors import DamagedFileError, MissingDataError

needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(not os.environ.get("OUTLAST_DATA"), reason="OUTLAST_DATA is not set: no full data sets"),
]


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_embedded_subset_is_balanced_and_whole(name):
    train, test = load(name, variant="small"), load(name, "test", variant="small")
    assert train.images.shape == (10_000, 1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.bincount().tolist() == [1000] * 10
    assert len(test) == 10_000
    image, label = train[3]
    assert torch.equal(image, train.images[3])
    assert label == train.labels[3]


def test_embedded_omniglot_is_complete():
    train, test = load("omniglot", variant="small"), load("omniglot", "test", variant="small")
    assert train.images.shape == (19_280, 1, 28, 28)
    assert train.labels.bincount().tolist() == [20] * 964
    assert test.labels.bincount()[964:].tolist() == [20] * 659
    assert train.images.unique().tolist() == [0, 255]
    assert 0.05 < float((train.images > 0).float().mean()) < 0.15
    assert train.classes[0] == "Arcadian 1"
    assert test.classes[964].startswith("Angelic")
    assert len(train.classes) == 1623


def test_omniglot_is_read_in_torchvisions_layout(tmp_path, monkeypatch):
    image_module = pytest.importorskip("PIL.Image", reason="Pillow (extra vision) is not installed")
    folder = tmp_path / "omniglot-py" / "images_evaluation"
    for number, name in ((2, "Syriac_(Serto)/character01"), (1, "Sylheti/character02"), (0, "Sylheti/character01")):
        character = folder / name
        character.mkdir(parents=True)
        for drawer in range(1, 21):
            paper = np.full((105, 105), 255, np.uint8)
            paper[drawer, number] = 0
            image_module.fromarray(paper).convert("1").save(character / f"{1000 - number}_{drawer:02}.png")
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path))
    with pytest.raises(DamagedFileError, match="60 drawings, expected 13180"):
        load("omniglot", "test")
    entry = dataclasses.replace(DATASETS["omniglot"], splits={"train": 19_280, "test": 60})
    monkeypatch.setitem(DATASETS, "omniglot", entry)
    data = load("omniglot", "test")
    assert data.images.shape == (60, 1, 105, 105)
    order = (0, 1, 2) if data.classes.index("Sylheti 1") < data.classes.index("Syriac_(Serto) 1") else (2, 0, 1)
    assert data.images.flatten(1).argmax(1).tolist() == [drawer * 105 + number for number in order for drawer in range(1, 21)]
    (folder / "Klingon" / "character01").mkdir(parents=True)
    shutil.copyfile(folder / "Sylheti/character01/1000_01.png", folder / "Klingon" / "character01" / "1_01.png")
    with pytest.raises(DamagedFileError, match="no alphabet"):
        load("omniglot", "test")


def test_embedded_files_fit_the_limit_and_carry_licence_and_provenance():
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*")) < 16e6
    for folder in EMBEDDED.iterdir():
        assert (folder / "LICENSE.txt").stat().st_size > 500
        provenance = json.loads((folder / "PROVENANCE.json").read_text())
        for name, checksum in provenance.get("sha256", {}).items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == checksum
        unpacked = provenance.get("sha256_of_unpacked_bytes", provenance.get("sha256_of_idx_bytes", {}).get("embedded", {}))
        for name, checksum in unpacked.items():
            assert hashlib.sha256(lzma.decompress((folder / f"{name}.xz").read_bytes())).hexdigest() == checksum


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_damaged_file_is_refused(tmp_path, monkeypatch, damage):
    shutil.copytree(EMBEDDED / "mnist", tmp_path / "mnist")
    path = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.xz"
    data = path.read_bytes()
    path.write_bytes(data[:100] if damage == "truncated" else lzma.compress(lzma.decompress(data)[:-1] + b"\x01"))
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path))
    with pytest.raises(DamagedFileError, match="t10k-labels"):
        load("mnist", "test")


def test_torchvision_layout_is_found(tmp_path, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(lzma.decompress((EMBEDDED / "mnist" / f"{name}.xz").read_bytes()))
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path))
    assert find("mnist", "test").kind == "torchvision"
    assert torch.equal(load("mnist", "test").images, load("mnist", "test", variant="small").images)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("OUTLAST_DATA", raising=False)
    with pytest.raises(MissingDataError, match=r"OUTLAST_DATA is not set.*outlast data fetch cifar10"):
        load("cifar10")
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not found in"):
        load("mnist")
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDataError, match="no folder"):
        load("mnist")


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="known: fashion-mnist, mnist, cifar10"):
        load("imagenet")
    with pytest.raises(ValueError, match="split must be"):
        load("mnist", "validation")
    with pytest.raises(ValueError, match="nothing of CIFAR-10 is embedded"):
        load("cifar10", variant="small")
    with pytest.raises(ValueError, match="variant must be"):
        load("mnist", variant="tiny")


def test_fetch_reports_a_failed_download_in_one_sentence(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets", reason="torchvision (extra vision) is not installed")

    def refuse(*_args, **_kwargs):
        raise RuntimeError("Error downloading:\nTried a mirror")

    monkeypatch.setattr(datasets, "MNIST", refuse)
    with pytest.raises(MissingDataError, match=r"MNIST could not be fetched \(Error downloading: Tried a mirror\)"):
        fetch("mnist", tmp_path)
    monkeypatch.delenv("OUTLAST_DATA", raising=False)
    with pytest.raises(ValueError, match="no folder to fetch into"):
        fetch("mnist")


def test_standardised_images_have_mean_zero_and_deviation_one():
    images = load("mnist", "test", variant="small").images
    floats = images.float() / 255
    result = standardise(images, floats.mean((0, 2, 3)), floats.std((0, 2, 3)))
    assert float(result.mean()) == pytest.approx(0, abs=1e-4)
    assert float(result.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_data) for name in DATASETS])
def test_full_sets_are_whole(name):
    entry = DATASETS[name]
    for split, count in entry.splits.items():
        data = load(name, split)
        assert len(data) == count
        classes = range(len(entry.classes))
        if name == "omniglot":  # whose splits have different characters
            classes = range(964) if split == "train" else range(964, 1623)
        assert set(data.labels.unique().tolist()) == set(classes)


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("OUTLAST_DATA"), reason="OUTLAST_DATA is not set: no full data sets")
def test_embedded_subset_is_part_of_the_full_set():
    full = {(bytes(image.numpy()), int(label)) for image, label in load("mnist")}
    assert all((bytes(image.numpy()), int(label)) in full for image, label in load("mnist", variant="small"))
    assert Path(os.environ["OUTLAST_DATA"]) in find("mnist", "train").files[0].parents


def test_catalogues_are_parallel_text():
    pytest.importorskip("wagtail", reason="wagtail (extra studies) is not installed")
    found = load_catalogues(["de", "fr"])
    assert list(found) == ["de", "fr"]
    common = set(found["de"]) & set(found["fr"])
    assert len(common) > 1500
    assert found["de"]["Change password"] == "Passwort ändern"
    assert all(4 <= len(original) <= 160 and 4 <= len(text) <= 160 and "\x04" not in original for original, text in found["fr"].items())
    assert len(load_catalogues()) > 90
    with pytest.raises(ValueError, match="no catalogue of xx"):
        load_catalogues(["xx"])


def test_missing_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match=r'pip install "outlast\[studies\]"'):
        find_catalogues()


# ---- text --------------------------------------------------------------------------------------------------------------


def test_excerpts_of_novels_are_text_of_the_stated_sizes():
    for split, size in TEXTS["novels"].small.items():
        text = load_text("novels", split, variant="small")
        assert text.dtype == torch.uint8
        assert len(text) == size
        words = bytes(text.tolist()).decode("utf-8").split()
        assert len(words) > size / 8
        assert sum(word == "the" for word in words) > len(words) / 50


@needs_data[0]
@needs_data[1]
def test_whole_novels_hold_the_excerpts():
    for split, size in TEXTS["novels"].sizes.items():
        whole, part = (bytes(load_text("novels", split, variant=variant).tolist()) for variant in ("full", "small"))
        assert len(whole) == size
        assert part[:1000] in whole
        assert part[-1000:] in whole


def test_missing_damaged_and_unknown_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("OUTLAST_DATA", raising=False)
    with pytest.raises(MissingDataError, match="OUTLAST_DATA is not set"):
        load_text("novels")
    monkeypatch.setenv("OUTLAST_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    for name, content, message in (("novels_test.txt", b"call me", "SHA-256"), ("novels_valid.txt.xz", b"xz?", "unpacked")):
        (tmp_path / "text" / name).write_bytes(content)
        with pytest.raises(DamagedFileError, match=message):
            load_text("novels", name.split("_")[1].split(".")[0])
    with pytest.raises(ValueError, match="unknown text"):
        load_text("poems")
    with pytest.raises(ValueError, match="split must be one of"):
        load_text("novels", "dev")
    with pytest.raises(ValueError, match="variant must be"):
        load_text("novels", variant="tiny")


def test_encoder_is_found_in_its_package_or_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="text"):
        find_encoder()
