"""What the studies of few labels share, and their synthetic classes."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from outlast.fewshot import LogisticClassifier
from outlast.studies._context import Context
from outlast.studies._fewshot import StandardisedLogistic, affine, cifar100_classes, flip, jitter
from outlast.studies._grid import Launch
from outlast.studies._models import conv4
from outlast.studies.distribution_calibration import STUDY as CALIBRATION
from outlast.studies.distribution_calibration import Characters, Synthetic, _gaussians, characters_cell, synthetic_cell
from outlast.studies.startup import STUDY as STARTUP
from outlast.studies.startup import Transfer, _target, cell


def test_classes_are_split_once_for_both_studies():
    base, validation, novel = cifar100_classes()
    assert [len(part) for part in (base, validation, novel)] == [64, 16, 20]
    assert sorted([*base, *validation, *novel]) == list(range(100))
    assert cifar100_classes()[0][:3] == base[:3]


def test_affine_maps_cut_windows_out_of_the_image():
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(affine(images, (1.0, 1.0), 0.0), images, rtol=0, atol=1e-5)
    stream = torch.Generator().manual_seed(1)
    one = affine(images, (0.55, 1.0), 15.0, stream)
    two = affine(images, (0.55, 1.0), 15.0, torch.Generator().manual_seed(1))
    assert torch.equal(one, two)
    ones = affine(torch.ones(50, 1, 28, 28), (0.55, 1.0), 0.0, stream)
    assert float(ones[:, :, 2:-2, 2:-2].min()) > 0.99  # a window never leaves the image


def test_jitter_and_flip_act_on_each_image():
    torch.manual_seed(0)
    images = torch.rand(200, 1, 5, 5)
    means = jitter(images).mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.6 <= float(means.min()) < 0.7
    assert 1.3 < float(means.max()) <= 1.4
    mirrored = (flip(images) != images).flatten(1).any(1).float().mean()
    assert 0.35 < float(mirrored) < 0.65


def test_backbone_gives_non_negative_features_of_the_stated_width():
    features = conv4(3, 8)(torch.randn(2, 3, 32, 32)).detach()
    assert features.shape == (2, 32)
    assert float(features.min()) >= 0.0


def test_standardised_classifier_does_not_care_for_scale_and_shift():
    stream = torch.Generator().manual_seed(0)
    X, Q = torch.randn(3, 10, 6, generator=stream), torch.randn(3, 8, 6, generator=stream)
    y = torch.arange(5).repeat(3, 2)
    found = StandardisedLogistic().fit(X, y).predict(Q)
    assert torch.equal(found, StandardisedLogistic().fit(100 * X + 7, y).predict(100 * Q + 7))
    one = X[0] - X[0].mean(0)
    alone = LogisticClassifier().fit(one / one.std(), y[0]).predict((Q[0] - X[0].mean(0)) / one.std())
    assert torch.equal(found[0], alone)


@pytest.mark.parametrize("related", [True, False])
def test_families_share_mean_and_covariance_where_they_are_related(related):
    rows, labels, novel, names = _gaussians(Synthetic(related=related, base_classes=32, novel_classes=16), context())
    assert rows.shape == (32 * 200, 32)
    assert novel.shape == (16 * 40, 32)
    assert labels.unique().tolist() == list(range(32))
    assert names.unique().tolist() == list(range(16))
    one, other = (torch.cov(rows[labels == name].T) for name in (0, 16))  # of one family
    overlap = (one * other).sum() / (one.norm() * other.norm())
    assert (overlap > 0.9) == related
    distance = (rows[labels == 0].mean(0) - novel[names == 0].mean(0)).norm()
    assert (distance < 7.0) == related


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


@pytest.fixture
def cold(monkeypatch):
    """No work shared with earlier cells."""
    monkeypatch.setattr("outlast.studies._context._SHARED", {})


SMALL = {"source": "omniglot", "variant": "small", "source_classes": 20, "width": 4, "teacher_epochs": 1, "batch_size": 32, "episodes": 5}
CLOTHES = Transfer(**SMALL, unlabelled=64, held=25, student_epochs=1)
CHARACTERS = Transfer(**SMALL, target="omniglot", unlabelled=64, student_epochs=1, query=10)


@pytest.mark.parametrize("method", ["transfer", "batchnorm", "no-ss", "startup", "simclr", "ce-simclr"])
@pytest.mark.parametrize("config", [CLOTHES, CHARACTERS], ids=["clothing", "characters"])
def test_cells_of_startup_do_not_depend_on_what_ran_before(config, method, cold):
    own = config.model_copy(update={"method": method})
    first = cell(own, 0, context())
    again = cell(own, 0, context())  # from shared work
    assert dict(first.metrics) == dict(again.metrics)
    assert len(first.series["1 shot"]) == 5
    assert set(first.metrics) == {metric.name for metric in STARTUP.parts[0].metrics}


@pytest.mark.parametrize("config", [CLOTHES, CHARACTERS.model_copy(update={"unlabelled": 2636})], ids=["clothing", "characters"])
def test_no_image_is_both_unlabelled_and_in_an_episode(config, cold):
    unlabelled, held, classes = _target(config, context())
    assert len(unlabelled) == config.unlabelled
    assert len(held) == len(classes)
    if config.target == "omniglot":  # some drawings of different drawers are the same at 28x28
        assert held.shape[0] == 659 * 16
        return
    known = {image.numpy().tobytes() for image in unlabelled}
    assert not any(image.numpy().tobytes() in known for image in held)


@pytest.mark.parametrize("classifier", ["logistic", "nearest", "calibration", "tuned"])
def test_cells_of_calibration_run(classifier, cold):
    short = {"episodes": 5, "tune_episodes": 5, "n_samples": 10}
    gaussians = Synthetic(classifier=classifier, base_classes=32, novel_classes=16, **short)
    first = synthetic_cell(gaussians, 0, context())
    assert dict(first.metrics) == dict(synthetic_cell(gaussians, 0, context()).metrics)
    assert set(first.metrics) == {metric.name for metric in CALIBRATION.part("synthetic").metrics}
    drawn = Characters(classifier=classifier, base_classes=20, epochs=1, width=4, **short)
    found = characters_cell(drawn, 0, context())
    assert set(found.metrics) == {metric.name for metric in CALIBRATION.part("omniglot").metrics}
    assert len(found.series["episodes"]) == 5
