"""The batched linear evaluation, and the choice of settings on held-out base classes."""

from __future__ import annotations

import pytest
import torch
from helpers import families
from torch import nn
from torch.nn import functional as F

from outlast.errors import OutlastWarning
from outlast.fewshot import BaseStatistics, SGDLinearClassifier, calibration_report, evaluate_episodes, tune_calibration
from outlast.fewshot._linear import train_linear


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [5, 10])
def test_batched_training_is_torch_s_sgd_for_each_episode(n):
    X, y = torch.randn(3, n, 7, generator=rng(), dtype=torch.float64), torch.arange(n).remainder(5).expand(3, -1)
    start = torch.randn(3, 5, 8, generator=rng(1), dtype=torch.float64)
    orders = torch.stack([torch.stack([torch.randperm(n, generator=rng(10 * e + t)) for t in range(100)]) for e in range(3)])
    found = train_linear(X, y, start, orders, lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3, batch_size=4)
    for e in range(3):
        layer = nn.Linear(7, 5, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(start[e, :, :-1])
            layer.bias.copy_(start[e, :, -1])
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9, dampening=0.9, weight_decay=1e-3)
        for order in orders[e]:
            for index in order.split(4):
                optimizer.zero_grad()
                F.cross_entropy(layer(X[e, index]), y[e, index]).backward()
                optimizer.step()
        assert float((found[e, :, :-1] - layer.weight.detach()).abs().max()) < 1e-6
        assert float((found[e, :, -1] - layer.bias.detach()).abs().max()) < 1e-6


def test_linear_evaluation_learns_whatever_the_batch():
    (_, _), (nx, ny) = families()
    found = [evaluate_episodes(SGDLinearClassifier(epochs=20), nx, ny, shot=3, episodes=10, batch_size=size) for size in (10, 3)]
    assert torch.equal(found[0].per_episode, found[1].per_episode)
    assert found[0].accuracy > 0.6
    rows, labels = torch.eye(8).repeat_interleave(20, 0), torch.arange(8).repeat_interleave(20)
    rows = 5.0 * rows + 0.1 * torch.randn(160, 8, generator=rng())
    assert evaluate_episodes(SGDLinearClassifier(), rows, labels, episodes=20).accuracy == 1.0
    mixed = labels[torch.randperm(160, generator=rng(1))]
    chance = evaluate_episodes(SGDLinearClassifier(), rows, mixed, episodes=200)
    assert abs(chance.accuracy - 0.2) < 3 * chance.ci95
    with pytest.raises(ValueError, match="lr must be"):
        SGDLinearClassifier(lr=0.0).fit(nx[:4], [0, 0, 1, 1])


@pytest.mark.filterwarnings("ignore")
def test_linear_evaluation_passes_scikit_learn_s_checks():
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="scikit-learn (extra vision) is not installed")
    failed = [record for record in checks.check_estimator(SGDLinearClassifier(lr=0.1), on_fail=None) if record["status"] == "failed"]
    assert not failed, [(record["check_name"], repr(record["exception"])[:200]) for record in failed]


def test_tuning_finds_the_gain_where_there_is_one():
    (bx, by), _ = families(classes=60)
    seen = []
    found = tune_calibration(bx, by, episodes=60, grid=[{"tukey": 1.0, "k": 2, "n_samples": 60}], progress=lambda *done: seen.append(done))
    assert found.settings == {"negative": "signed", "tukey": 1.0, "k": 2, "n_samples": 60}
    assert found.gain.accuracy > found.gain.ci95
    assert found.result.accuracy == found.tried[0][1]
    assert seen[-1] == (5, 5)
    assert "without calibration" in repr(found)
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert found.plot(axes) is axes


def test_tuning_says_no_where_calibration_hurts():
    stream = rng(4)
    means = torch.rand(40, 16, generator=stream) * 3
    rows = (means.repeat_interleave(20, 0) + 0.3 * torch.randn(800, 16, generator=stream)).clamp(min=0)
    found = tune_calibration(
        rows, torch.arange(40).repeat_interleave(20), query=5, episodes=60, grid=[{"tukey": 0.5, "k": 2, "n_samples": 60}]
    )
    assert found.settings["n_samples"] == 0
    assert found.gain.accuracy == 0.0
    with pytest.raises(ValueError, match="too few"):
        tune_calibration(rows[:120], torch.arange(6).repeat_interleave(20), query=5)
    with pytest.warns(OutlastWarning, match=r"not tried, since 2 base classes are left: .*'k': 3"):
        tune_calibration(rows[:140], torch.arange(7).repeat_interleave(20), query=5, episodes=2, grid=[{"k": 3, "n_samples": 5}])


def test_report_says_whether_supports_fit():
    (bx, by), (nx, _) = families()
    base = BaseStatistics.from_features(bx, by)
    near = calibration_report(base, nx[::60], tukey=1.0)
    assert near.fits
    assert near.mismatch == 1.0
    assert bool((near.effective_rank > 1).all())
    far = calibration_report(base, nx[::60] + 100, tukey=1.0)
    assert not far.fits
    assert far.far == 1.0
    bent = calibration_report(BaseStatistics.from_features(bx.abs() * 10, by), (nx[::60].abs() * 10).sqrt())
    assert bent.mismatch > 1.5
    assert bent.to_dict()["fits"] is False
    axes = pytest.importorskip("matplotlib.pyplot", reason="matplotlib (extra report) is not installed").figure().subplots()
    assert near.plot(axes) is axes
    with pytest.raises(ValueError, match="two base classes"):
        calibration_report(base.of([0]), nx[:2])


def test_tuning_draws_as_many_samples_as_it_is_told():
    stream = torch.Generator().manual_seed(0)
    rows, labels = torch.rand(12 * 25, 6, generator=stream), torch.arange(12).repeat_interleave(25)
    found = tune_calibration(rows, labels, way=3, shot=1, query=5, episodes=3, n_samples=7, grid=[{"k": 1}, {"k": 1, "n_samples": 9}])
    assert sorted(settings["n_samples"] for settings, _ in found.tried if settings["n_samples"]) == [7, 9]
