"""Episodes and their evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from outlast.fewshot import EpisodeSampler, LogisticClassifier, NearestMean, embed, evaluate_episodes
from outlast.fewshot._episodes import summary


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(classes=8, each=20, d=6, spread=0.1, seed=0):
    means = torch.randn(classes, d, generator=rng(seed)).repeat_interleave(each, 0)
    return means + spread * torch.randn(classes * each, d, generator=rng(seed + 1)), torch.arange(classes).repeat_interleave(each) * 3


def test_episodes_are_functions_of_seed_and_number():
    _, labels = clusters()
    one, two = (EpisodeSampler(labels, 5, 2, 4, episodes=10, seed=3) for _ in range(2))
    for (support, query), (other, same) in zip(one, two, strict=True):
        assert torch.equal(support, other)
        assert torch.equal(query, same)
        assert not set(support.tolist()) & set(query.tolist())
        assert len(labels[support].unique()) == 5
        assert torch.equal(labels[support].view(5, 2)[:, 0], labels[query].view(5, 4)[:, 0])
        assert len(set(support.tolist())) == 10
    support, query = one.batch(8, 12)
    assert support.shape == (2, 10)
    assert torch.equal(support[1], one[9][0])
    assert not torch.equal(one[0][0], EpisodeSampler(labels, 5, 2, 4, seed=4)[0][0])
    assert one.support_labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    with pytest.raises(IndexError):
        one[10]


def test_every_class_and_sample_is_drawn_equally_often():
    labels = torch.arange(6).repeat_interleave(7)
    counts = torch.zeros(42)
    for support, query in EpisodeSampler(labels, 3, 2, 3, episodes=2000):
        counts[support] += 1
        counts[query] += 1
    expected = 2000 * 15 / 42
    assert float((counts / expected - 1).abs().max()) < 0.12


def test_wrong_labels_are_refused():
    with pytest.raises(ValueError, match="at least 5 classes, the labels hold 2"):
        EpisodeSampler([0, 1] * 30)
    with pytest.raises(ValueError, match=r"class 3 has 2 samples, .* need 4"):
        EpisodeSampler([1] * 9 + [2] * 9 + [3] * 2, 3, 1, 3)
    with pytest.raises(TypeError, match="integers"):
        EpisodeSampler([0.5, 1.0])
    with pytest.raises(ValueError, match="shape"):
        EpisodeSampler(np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="way must be at least 2"):
        EpisodeSampler([0, 1], 1)


def test_interval_is_the_stated_formula():
    values = torch.tensor([0.2, 0.4, 0.9, 0.7])
    found = summary(values, 5, 1, 15, 0)
    assert found.ci95 == pytest.approx(1.96 * float(values.std(correction=0)) / math.sqrt(4))
    assert summary(torch.full((9,), 0.6), 5, 1, 15, 0).ci95 == pytest.approx(0.0, abs=1e-12)
    assert found.to_dict()["kind"] == "FewShotResult"
    assert "5-way 1-shot" in repr(found)
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert found.plot(axes) is axes


def test_separable_clusters_are_solved_and_shuffled_labels_are_chance():
    features, labels = clusters()
    assert evaluate_episodes(NearestMean(), features, labels, query=5, episodes=50).accuracy == 1.0
    shuffled = labels[torch.randperm(len(labels), generator=rng(5))]
    found = evaluate_episodes(NearestMean(), features, shuffled, query=5, episodes=400)
    assert abs(found.accuracy - 0.2) < 3 * found.ci95


def test_batches_do_not_change_results_and_differences_are_paired():
    features, labels = clusters(spread=1.0)
    results = [evaluate_episodes(LogisticClassifier(), features, labels, query=5, episodes=20, batch_size=size) for size in (1, 7, 20)]
    assert torch.equal(results[0].per_episode, results[1].per_episode)
    assert torch.equal(results[0].per_episode, results[2].per_episode)
    other = evaluate_episodes(NearestMean(), features, labels, query=5, episodes=20)
    paired = results[0].minus(other)
    assert paired.accuracy == pytest.approx(results[0].accuracy - other.accuracy)
    with pytest.raises(ValueError, match="same episodes"):
        results[0].minus(evaluate_episodes(NearestMean(), features, labels, query=5, episodes=20, seed=1))


def test_any_scikit_learn_classifier_is_evaluated_on_the_same_episodes():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn (extra vision) is not installed")
    features, labels = clusters(spread=1.0)
    theirs = evaluate_episodes(linear_model.LogisticRegression(tol=1e-8, max_iter=2000), features.double(), labels, query=5, episodes=20)
    ours = evaluate_episodes(LogisticClassifier(tol=1e-8, max_iter=2000), features.double(), labels, query=5, episodes=20)
    assert torch.equal(theirs.per_episode, ours.per_episode)


def test_progress_and_wrong_features():
    features, labels = clusters()
    seen = []
    evaluate_episodes(NearestMean(), features, labels, query=5, episodes=10, batch_size=4, progress=lambda *done: seen.append(done))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    with pytest.raises(ValueError, match="NaN"):
        evaluate_episodes(NearestMean(), features * float("nan"), labels)
    with pytest.raises(ValueError, match="rows and labels"):
        evaluate_episodes(NearestMean(), features[:-1], labels, query=5)
    with pytest.raises(ValueError, match="shape"):
        evaluate_episodes(NearestMean(), features[0], labels)


def test_features_are_embedded_once_in_eval_mode():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5))
    loader = [(torch.randn(4, 1, 5, 5, generator=rng(n)), torch.full((4,), n)) for n in range(3)]
    features, labels = embed(net, loader)
    assert features.shape == (12, 18)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert net.training
    place = torch.zeros(20, 18)
    again, _ = embed(net, loader, out=place)
    assert torch.equal(again, features)
    assert torch.equal(place[:12], features)
    half, _ = embed(net, loader, amp_dtype=torch.bfloat16)
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="no batches"):
        embed(net, [])
    with pytest.raises(ValueError, match="no labels"):
        embed(net, [torch.zeros(2, 1, 5, 5)])
    with pytest.raises(ValueError, match="holds 5 rows"):
        embed(net, loader, out=torch.zeros(5, 18))
