from __future__ import annotations

import json

import pytest
import torch
from helpers import drawn, rng
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from outlast.diagnose.robustness import fgsm, fgsm_curve, generalization_gap


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def data(n=40):
    return torch.rand(n, 3, 2, 2, generator=rng()), torch.randint(0, 3, (n,), generator=rng(1))


def test_attack_moves_every_input_by_eps_and_leaves_the_model_alone():
    net = model().train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = data()
    moved = fgsm(net, x, y, 0.01)
    size = (moved - x).abs()
    torch.testing.assert_close(size[size > 0], torch.full_like(size[size > 0], 0.01), rtol=0, atol=1e-6)
    assert float((size > 0).float().mean()) > 0.9
    assert F.cross_entropy(net.eval()(moved), y) > F.cross_entropy(net(x), y)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    clipped = fgsm(net, x, y, 0.3, clip=(0.0, 1.0))
    assert float(clipped.min()) >= 0.0
    assert float(clipped.max()) <= 1.0
    each = fgsm(net, x, y, torch.tensor([0.0, 0.1, 0.2])[:, None, None])
    torch.testing.assert_close((each - x).abs().amax((0, 2, 3)), torch.tensor([0.0, 0.1, 0.2]))
    with torch.no_grad():
        assert not fgsm(net, x, y, 0.1).requires_grad


def test_curve_is_that_of_single_attacks():
    net = model().train()
    x, y = data()
    curve = fgsm_curve(net, DataLoader(TensorDataset(x, y), 16), (0.0, 0.05, 0.2), clip=(0, 1))
    assert net.training
    net.eval()
    for eps, accuracy, loss in zip(curve.eps, curve.accuracy, curve.loss, strict=True):
        logits = net(fgsm(net, x, y, eps, clip=(0, 1)))
        assert accuracy == pytest.approx(float((logits.argmax(1) == y).float().mean()))
        assert loss == pytest.approx(float(F.cross_entropy(logits, y).detach()), rel=1e-4)
    assert curve.n == 40
    assert curve.to_dict()["kind"] == "Robustness"
    assert fgsm_curve(net, (x, y), (0.0,)).accuracy[0] == curve.accuracy[0]


def test_gap():
    net = model().eval()
    x, y = data()
    found = generalization_gap(net, (x[:30], y[:30]), DataLoader(TensorDataset(x[30:], y[30:]), 4))
    assert found.train == pytest.approx(float(F.cross_entropy(net(x[:30]), y[:30]).detach()), rel=1e-5)
    assert found.test == pytest.approx(float(F.cross_entropy(net(x[30:]), y[30:]).detach()), rel=1e-5)
    assert found.gap == pytest.approx(found.test - found.train)
    assert found.acc_test == pytest.approx(float((net(x[30:]).argmax(1) == y[30:]).float().mean()))
    assert json.dumps(found.to_dict())


def test_bad_input():
    net, (x, y) = model(), data()
    for call, error, text in (
        (lambda: fgsm(net, x, y, -0.1), ValueError, "eps"),
        (lambda: fgsm(net, x, y, torch.tensor(-0.1)), ValueError, "eps"),
        (lambda: fgsm(net, x, y, 0.1, clip=(1.0, 0.0)), ValueError, "clip"),
        (lambda: fgsm(net, x.mul(255).byte(), y, 0.1), TypeError, "floating-point"),
        (lambda: fgsm_curve(net, [], (0.1,)), ValueError, "data is empty"),
        (lambda: fgsm_curve(net, (x, y), ()), ValueError, "eps is empty"),
        (lambda: fgsm_curve(net, [x], (0.1,)), ValueError, "batches of data must be"),
        (lambda: generalization_gap(net, [], (x, y)), ValueError, "train is empty"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_picture():
    pytest.importorskip("matplotlib")
    net, (x, y) = model(), data()
    assert drawn(fgsm_curve(net, (x, y), (0.0, 0.1)))
