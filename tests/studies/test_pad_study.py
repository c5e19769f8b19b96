"""The study of policy adaptation at toy size."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from helpers import rng

from outlast.studies import pad
from outlast.studies._context import Context
from outlast.studies._grid import Launch

pytest.importorskip("gymnasium")

TINY = pad.Deployment(learner="imitation", train_steps=4, episodes=3, steps=14, batch=4)


def context(seed=0):
    return Context(seed, asdict(Launch("cpu")), lambda *_: None)


@pytest.mark.parametrize(("number", "arm"), [(number, arm.name) for number, part in enumerate(pad.STUDY.parts) for arm in part.arms])
@pytest.mark.filterwarnings("ignore:the auxiliary head")  # four batches do train it no better than a constant
def test_cells_repeat(number, arm, monkeypatch):
    part = pad.STUDY.parts[number]
    config = TINY.model_copy(update=dict(part.arm(arm).changes))
    found = pad.cell(config, 0, context())
    monkeypatch.setattr("outlast.studies._context._SHARED", {})
    assert found.metrics == pad.cell(config, 0, context()).metrics
    assert set(found.metrics) == {metric.name for metric in part.metrics}
    assert found.metrics["reward"] == pytest.approx(found.metrics["frozen"] + found.metrics["gain"])
    thirds = [found.metrics[name] for name in ("worst", "middle", "best")]
    assert sum(thirds) / 3 == pytest.approx(found.metrics["gain"])
    if config.method == "frozen":
        assert found.metrics["gain"] == found.metrics["updates"] == 0.0
    elif config.method not in ("gate", "first", "whole"):  # a calibrated gate may stay shut
        assert found.metrics["updates"] > 50.0


def test_episodes_are_paired():
    """The same colours, start and target for every method: without updates rewards are equal, and other methods share the frozen ones."""
    one, two = (pad.cell(TINY.model_copy(update={"method": method}), 0, context()) for method in ("paper", "default"))
    assert one.series["rewards"] == two.series["rewards"]
    assert one.series["gains"] != two.series["gains"]


def test_augmentations_keep_stacks_together():
    images = torch.rand(8, 9, 6, 6, generator=rng(0))
    images = images[:, :3].repeat(1, 3, 1, 1)
    for augment in (pad._jittered, pad._convolved):
        out = augment(images, rng(1))
        assert out.shape == images.shape
        assert 0.0 <= float(out.min()) <= float(out.max()) <= 1.0
        assert torch.allclose(out[:, :3], out[:, 3:6])
        assert not torch.allclose(out, images)


def test_the_first_layer_alone_adapts_and_a_policy_by_reinforcement_trains():
    config = pad.Deployment(learner="sac", share="features", train_steps=410, episodes=3, steps=8, batch=4, method="ungated")
    parts = pad._trained(config, 0, context())
    adapter = pad._adapter(config, parts, 0)
    assert list(adapter.adapted) == ["encoder.layers.0.weight", "encoder.layers.0.bias"]
    assert len(list(parts[0].parameters())) == 10  # three convolutions and the shared projection
    found = pad.cell(config, 0, context())
    assert found.metrics["updates"] == pytest.approx(100.0 * 6 / 8)
    assert found.metrics["loss_end"] > 0.0


def test_looks_are_ranked_from_another_start():
    config = TINY.model_copy(update={"shift": "color_hard"})
    frozen = pad._frozen(pad._trained(config, 0, context()))
    here, elsewhere = (pad._episodes(frozen, config, 0, learns=False, elsewhere=way) for way in (False, True))
    assert all(a.reward != b.reward for a, b in zip(here, elsewhere, strict=True))
    from outlast.rl import PixelReach

    env = PixelReach(shift="color_hard")
    first, second = env.reset(seed=5)[0], env.reset(seed=5, options={"places": 9})[0]
    assert (first[:, 0, 0] == second[:, 0, 0]).all()  # the same colours
    assert (first != second).any()
